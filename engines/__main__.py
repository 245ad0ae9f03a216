"""Install every engine that is not there yet: ``python -m engines``.

With ``--tools_only`` nothing is installed: what is missing to do so is told, in one line.
"""

from __future__ import annotations

import argparse
import sys

from engines import tools
from engines.install import InstallError, all_engines

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tools_only", action="store_true", help="only look for Java, Maven and Go")
arguments = parser.parse_args()
try:
    if arguments.tools_only:
        tools.require_all()
    else:
        all_engines()
except (tools.MissingToolsError, InstallError) as error:
    sys.exit(f"error: {error}")
