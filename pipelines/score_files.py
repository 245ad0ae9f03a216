"""``python -m beam_triton score`` as a file, for runners that start one and stage a package with it.

Nothing of this file or its folder is imported on workers: what runs there is `beam_triton.score`, part of
the package that ``--setup_file=./setup.py`` stages. Without ``--endpoint`` the shipped models are served.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Run as a file: what stands beside it is found from the folder above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from beam_triton.score import score_command

MODEL_REPOSITORY = Path(__file__).resolve().parent / "model_repository"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return score_command.main(given, program="score_files", model_repository=MODEL_REPOSITORY)


if __name__ == "__main__":
    sys.exit(main())
