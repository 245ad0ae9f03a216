"""The Open Inference Protocol and Triton's binary tensor extension, as pure functions of values and bytes."""

from __future__ import annotations

from beam_triton.protocol.casting import to_array
from beam_triton.protocol.datatypes import DATATYPES, Datatype
from beam_triton.protocol.json_tensors import from_json_data, to_json_data
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.prepare import PreparedElement
from beam_triton.protocol.request import EncodedRequest, InferRequestEncoder
from beam_triton.protocol.request_options import check_output_options, checked_parameters
from beam_triton.protocol.response import InferResponse, decode_infer_response, join_responses
from beam_triton.protocol.status import error_from_response, parse_retry_after
from beam_triton.protocol.tensors import from_wire, wire_bytes

__all__ = [
    "DATATYPES",
    "Datatype",
    "EncodedRequest",
    "InferRequestEncoder",
    "InferResponse",
    "ModelSpec",
    "PreparedElement",
    "TensorSpec",
    "check_output_options",
    "checked_parameters",
    "decode_infer_response",
    "error_from_response",
    "from_json_data",
    "from_wire",
    "join_responses",
    "parse_retry_after",
    "to_array",
    "to_json_data",
    "wire_bytes",
]
