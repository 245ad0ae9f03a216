"""A Python environment as on a worker before anything was staged: Beam and its build tools, nothing of ours.

``python -m engines.bare_environment FOLDER`` makes one, in a tenth of a second: the packages
stay where they are installed once, as those of an image do.
"""

from __future__ import annotations

import sys
import venv
from pathlib import Path

from engines import install


def bare_environment(folder: Path) -> Path:
    """Make the environment, and return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    line = f"import site; site.addsitedir({str(install.worker_packages())!r})\n"
    (site_packages / "worker_packages.pth").write_text(line)
    return folder / "bin" / "python"


if __name__ == "__main__":
    bare_environment(Path(sys.argv[1]))
