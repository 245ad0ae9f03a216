"""Other clients of a server, in a process of their own: so many requests are always in flight.

``python -m tests.support.other_clients URL MODEL REQUESTS_IN_FLIGHT``, until it is ended.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from beam_triton import TritonClient

_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def busy_with_others(endpoint: str, model_name: str, requests: int) -> Iterator[None]:
    """A context in which others keep so many requests in flight to a model that takes x, FP32 [128]."""
    command = [sys.executable, "-m", __name__, endpoint, model_name, str(requests)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield
        finally:
            process.kill()


def _send_for_ever(client: TritonClient, model_name: str) -> None:
    x = np.ones((8, 128), np.float32)
    while True:
        client.infer(model_name, {"x": x})


if __name__ == "__main__":
    url, name, in_flight = sys.argv[1:]
    # Each has a limit of its own, and so none gives way to another.
    clients = [TritonClient(url, timeout_seconds=60.0 + number) for number in range(int(in_flight))]
    threads = [threading.Thread(target=_send_for_ever, args=(client, name)) for client in clients]
    for thread in threads:
        thread.start()
    print("busy", flush=True)
    for thread in threads:
        thread.join()
