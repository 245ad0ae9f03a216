"""A measurement in a process of its own: nothing is warm, and its memory is its own.

Children are forked from a server that has imported the large packages already, which makes a fresh
process cost milliseconds instead of the seconds that importing Beam takes.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Imported only: a gRPC channel or a thread made before the fork would not survive it.
_PRELOADED = ["apache_beam", "apache_beam.ml.inference.base", "numpy", "beam_triton"]


class MeasurementError(Exception):
    """A measurement failed, or its results were wrong; the message ends with the child's traceback."""


def in_own_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` in a fresh process and give its result; all three have to pickle.

    Raises:
        MeasurementError: it raised, or its process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args, kwargs))
    process.start()
    # The child's end has to be the only one: it is by its closing that a dead child is noticed.
    sender.close()
    try:
        result, failure = receiver.recv()
    except EOFError:
        process.join()
        raise MeasurementError(f"the process of {function!r} died: exit code {process.exitcode}") from None
    finally:
        receiver.close()
        # What is left of a runner's or a client's threads is of no interest once the result is here.
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
