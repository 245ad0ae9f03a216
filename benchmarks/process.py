"""A fresh process for each measurement, and the memory that a process takes.

Children are forked from a server that has already imported the large packages, so a fresh process costs
milliseconds instead of the seconds that importing Beam takes.
"""

from __future__ import annotations

import multiprocessing
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Imported only: a gRPC channel or a thread made before the fork would not survive it.
_PRELOADED = ["apache_beam", "apache_beam.ml.inference.base", "numpy", "beam_triton"]
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM to the current size


class MeasurementError(Exception):
    """A measurement failed, or its results were wrong; the message ends with the child's traceback."""


def run_in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` in a fresh process and return its result; function, arguments and result must pickle.

    Raises:
        MeasurementError: it raised, or its process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args, kwargs))
    process.start()
    # Only the child may hold the sending end: recv() then ends with EOFError if the child dies.
    sender.close()
    try:
        result, failure = receiver.recv()
    except EOFError:
        process.join()
        raise MeasurementError(f"the process of {function!r} died: exit code {process.exitcode}") from None
    finally:
        receiver.close()
        # The result has arrived: threads of a runner or a client that still run don't matter.
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
    if failure is not None:
        raise MeasurementError(f"{function!r} failed:\n{failure}")
    return result  # type: ignore[no-any-return]


def _call(
    sender: Connection, function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    answer: tuple[object, str | None]
    try:
        answer = (function(*args, **kwargs), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    sender.send(answer)
    sender.close()


def resident_bytes() -> int:
    """This process's resident memory now."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """This process's highest resident memory since it began, or since `reset_peak`."""
    return _status_bytes("VmHWM")


def reset_peak() -> None:
    """Start the peak at the current memory, so that the peak of the imports doesn't count."""
    _CLEAR.write_text(_RESET_PEAK)


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {name}: memory is measured on Linux only")
    return int(match.group(1)) * 1024
