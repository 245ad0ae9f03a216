"""Install every engine that is not there yet: ``python -m tests.support.engines``."""

from __future__ import annotations

import sys

from tests.support.engines.install import InstallError, all_engines
from tests.support.engines.tools import MissingToolsError

try:
    all_engines()
except (MissingToolsError, InstallError) as error:
    sys.exit(f"error: {error}")
