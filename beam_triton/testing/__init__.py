"""A real Triton Inference Server on this machine, without Docker or GPU.

For tests, demos and the DirectRunner. The server is NVIDIA's own ``tritonserver`` binary out of the
``nvidia-pytriton`` wheel, in an environment of its own. Only the Python backend is inside: other
frameworks run within a Python-backend ``model.py``.
"""

from __future__ import annotations

from beam_triton.testing.local_triton import LocalTriton
from beam_triton.testing.server_environment import ServerEnvironment, find_or_make_server_environment

__all__ = ["LocalTriton", "ServerEnvironment", "find_or_make_server_environment"]
