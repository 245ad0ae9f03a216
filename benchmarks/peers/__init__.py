"""The peers: the library, what a user would write instead, and two upper limits (`NO_OP`, `WRK`)."""

from __future__ import annotations

from benchmarks.peers.beam_triton_transform import BeamTriton
from benchmarks.peers.no_op import NoOp
from benchmarks.peers.requests_peers import RequestsPost
from benchmarks.peers.tritonclient_peers import Tritonclient
from benchmarks.peers.wrk import Wrk

BEAM_TRITON = BeamTriton()
BEAM_TRITON_SHARED = BeamTriton(shares_memory=True)
TRITONCLIENT_HTTP = Tritonclient("http")
TRITONCLIENT_GRPC = Tritonclient("grpc")
TRITONCLIENT_HTTP_SHARED = Tritonclient("http", shares_memory=True)
TRITONCLIENT_GRPC_SHARED = Tritonclient("grpc", shares_memory=True)
REQUESTS_POST = RequestsPost()
WRK = Wrk()
NO_OP = NoOp()

__all__ = [
    "BEAM_TRITON",
    "BEAM_TRITON_SHARED",
    "NO_OP",
    "REQUESTS_POST",
    "TRITONCLIENT_GRPC",
    "TRITONCLIENT_GRPC_SHARED",
    "TRITONCLIENT_HTTP",
    "TRITONCLIENT_HTTP_SHARED",
    "WRK",
]
