"""``python -m beam_triton COMMAND``: see `beam_triton.cli.main`."""

from __future__ import annotations

import sys

from beam_triton.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
