"""``python -m beam_triton check|tune ENDPOINT``: is the server well, and what settings suit it?"""

from __future__ import annotations

import sys

from beam_triton.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
