"""The Open Inference Protocol and Triton's binary tensor extension, as pure functions of values and bytes."""

from __future__ import annotations

from beam_triton.protocol.casting import to_array
from beam_triton.protocol.datatypes import DATATYPES
from beam_triton.protocol.model import ModelSpec, TensorSpec
from beam_triton.protocol.padding import PaddedLengths
from beam_triton.protocol.prepare import PreparedElement
from beam_triton.protocol.request import EncodedRequest, InferRequestEncoder
from beam_triton.protocol.request_options import check_request_options, checked_parameters
from beam_triton.protocol.response import InferResponse, decode_infer_response, join_responses
from beam_triton.protocol.status import error_from_response

__all__ = [
    "DATATYPES",
    "EncodedRequest",
    "InferRequestEncoder",
    "InferResponse",
    "ModelSpec",
    "PaddedLengths",
    "PreparedElement",
    "TensorSpec",
    "check_request_options",
    "checked_parameters",
    "decode_infer_response",
    "error_from_response",
    "join_responses",
    "to_array",
]
