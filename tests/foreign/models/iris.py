"""Trains the classifiers that MLServer serves; runs in MLServer's own Python. ``iris.py FOLDER``"""

import sys
from pathlib import Path

import joblib
import xgboost
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    flowers, kinds = load_iris(return_X_y=True)
    joblib.dump(LogisticRegression(max_iter=1000).fit(flowers, kinds), folder / "iris.joblib")
    xgboost.XGBClassifier(n_estimators=5, max_depth=3).fit(flowers, kinds).save_model(folder / "iris.ubj")
