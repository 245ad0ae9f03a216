"""BYTES tensors of many short strings, encoded to wire bytes and decoded again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from beam_triton.protocol import TensorSpec, to_array
from beam_triton.protocol.byte_strings import decode_byte_strings, object_array
from beam_triton.protocol.tensors import wire_bytes
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale
from benchmarks.peers import BEAM_TRITON
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios

_STRING_BYTES = 32
_PEER = "tritonclient.utils"
_ENCODE, _DECODE = "encode us", "decode us"


def _byte_strings(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """An object array of bytes, encoded and decoded in memory; the first turn doesn't count."""
    count = scale.count(10_000, least=500)
    turns = scale.count(20 * rounds, least=3)
    times = run_in_fresh_process(_measure, count, turns)
    rows = [Row.of(name, quantities) for name, quantities in times.items()]
    ours, theirs = times[BEAM_TRITON.name], times[_PEER]
    figures = []
    for what, key in (("encode", _ENCODE), ("decode", _DECODE)):
        reached = ratios(ours[key], theirs[key])
        figures.append(Figure.of_rounds(f"time to {what} relative to tritonclient", "at most", 0.33, reached))
    return CaseResult(CASE.name, CASE.title, rows, figures, rounds=rounds)


def _measure(count: int, turns: int) -> dict[str, dict[str, list[float]]]:
    from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

    spec = TensorSpec("text", "BYTES", (count,))
    generator = np.random.default_rng(1)
    codecs: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
        BEAM_TRITON.name: (
            lambda strings: wire_bytes(to_array(strings, spec), "BYTES"),
            lambda wire: object_array(decode_byte_strings(wire, count, "text"), count, (count,)),
        ),
        _PEER: (lambda strings: serialize_byte_tensor(strings).item(), deserialize_bytes_tensor),
    }
    times: dict[str, dict[str, list[float]]] = {name: {_ENCODE: [], _DECODE: []} for name in codecs}
    for turn in range(1 + turns):
        # Fresh strings each turn, as in a pipeline, so that no earlier turn has warmed a cache for them.
        strings = np.array([generator.bytes(_STRING_BYTES) for _ in range(count)], object)
        wires = set()
        for name, (encode, decode) in codecs.items():
            before = time.perf_counter()
            wire = encode(strings)
            between = time.perf_counter()
            decoded = decode(wire)
            after = time.perf_counter()
            if turn:
                times[name][_ENCODE].append(1e6 * (between - before))
                times[name][_DECODE].append(1e6 * (after - between))
            wires.add(bytes(wire))
            if not np.array_equal(np.asarray(decoded), strings):
                raise AssertionError(f"{name} decoded strings that differ from those it encoded")
        if len(wires) != 1:
            raise AssertionError("the two encoders made different bytes of the same strings")
    return times


CASE = Case("byte_strings", "10,000 strings of 32 bytes, encoded and decoded", _byte_strings)
