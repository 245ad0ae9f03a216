"""Prints the changelog of a release: ``python .github/release_notes.py v1.2.3``.

Fails where the tag is not the version of setup.py, or the changelog has nothing about it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def release_notes(tag: str, setup: str, changelog: str) -> str:
    """The part of ``changelog`` about the version of ``tag``; raises SystemExit where there is none."""
    (version,) = re.findall(r'^VERSION = "(.+)"$', setup, re.MULTILINE)
    if tag != f"v{version}":
        raise SystemExit(f"the tag is {tag}, setup.py has version {version}")
    part = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.M | re.S
    )
    if part is None or not part[1].strip():
        raise SystemExit(f"CHANGELOG.md has no part '## [{version}] - YYYY-MM-DD'")
    return part[1].strip()


if __name__ == "__main__":
    print(release_notes(sys.argv[1], (ROOT / "setup.py").read_text(), (ROOT / "CHANGELOG.md").read_text()))
