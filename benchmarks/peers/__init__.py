"""Those who are compared: the library, what a user would write instead, and the limits above both."""

from __future__ import annotations

from benchmarks.peers.beam_triton_transform import BeamTriton
from benchmarks.peers.flink_way import OneRowOneRequest
from benchmarks.peers.nothing import Nothing
from benchmarks.peers.requests_post import RequestsPost
from benchmarks.peers.tritonclient_grpc import TritonclientGrpc
from benchmarks.peers.tritonclient_http import TritonclientHttp
from benchmarks.peers.wrk import Wrk

BEAM_TRITON = BeamTriton()
TRITONCLIENT_HTTP = TritonclientHttp()
TRITONCLIENT_GRPC = TritonclientGrpc()
REQUESTS_POST = RequestsPost()
ONE_ROW_ONE_REQUEST = OneRowOneRequest()
WRK = Wrk()
NOTHING = Nothing()

__all__ = [
    "BEAM_TRITON",
    "NOTHING",
    "ONE_ROW_ONE_REQUEST",
    "REQUESTS_POST",
    "TRITONCLIENT_GRPC",
    "TRITONCLIENT_HTTP",
    "WRK",
]
