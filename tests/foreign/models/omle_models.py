"""Writes OMLE's models into a folder; runs in OMLE's own Python. ``omle_models.py FOLDER``"""

import copy
import json
import sys
from pathlib import Path

import omle

LABELS = ("low", "middle", "high")


def with_labels(tree):
    """The same tree, whose metadata name its predictions as strings: a datatype of OMLE's own."""
    labelled = copy.deepcopy(tree)
    target = labelled["model_schema"]["targets"][0]
    target["class_labels"] = [{"string_value": label} for label in LABELS]
    for tensor in (labelled["outputs"][0], labelled["nodes"][0]["outputs"][0], target):
        tensor["type"]["dtype"] = "STRING"
    return labelled


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tree = json.loads(Path(__file__).with_name("omle_tree.json").read_text())
    for name, model in (("tree", tree), ("labelled_tree", with_labels(tree))):
        source = folder / f"{name}.json"
        source.write_text(json.dumps(model))
        omle.save(omle.load(str(source)), str(folder / f"{name}.omle"))
