"""Trains the classifier that MLServer serves; runs in MLServer's own Python. ``iris.py FILE``"""

import sys

import joblib
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

if __name__ == "__main__":
    flowers, kinds = load_iris(return_X_y=True)
    joblib.dump(LogisticRegression(max_iter=1000).fit(flowers, kinds), sys.argv[1])
