"""Servers for tests and demos: a test double for any operating system, and a real Triton without Docker.

`FakeTriton` serves Python functions from a thread of the test's process. `LocalTriton` starts NVIDIA's own
``tritonserver`` binary out of the ``nvidia-pytriton`` wheel, in an environment of its own, on Linux on
x86-64, without a GPU. Only the Python backend is inside: models of other frameworks run within a
Python-backend ``model.py``.
"""

from __future__ import annotations

from beam_triton.server.environment import ServerEnvironment, find_or_make_server_environment
from beam_triton.testing.fake_model import FakeModel
from beam_triton.testing.fake_triton import FakeTriton, RecordedRequest
from beam_triton.testing.local_triton import LocalTriton

__all__ = [
    "FakeModel",
    "FakeTriton",
    "LocalTriton",
    "RecordedRequest",
    "ServerEnvironment",
    "find_or_make_server_environment",
]
