"""Resident memory of this process, as Linux tells it."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the current size


def resident_bytes() -> int:
    """What is resident now."""
    return _field("VmRSS")


def peak_bytes() -> int:
    """The most that was resident at a time since the process began, or since `reset_peak`."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Forget the peak so far, such as that of the imports."""
    _CLEAR.write_text(_RESET_PEAK)


def _field(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {name}: memory is measured on Linux only")
    return int(match.group(1)) * 1024
