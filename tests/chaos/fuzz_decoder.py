"""Fuzz the response decoder: whatever the bytes, only RemoteProtocolError may escape.

    python tests/chaos/fuzz_decoder.py --runs 1000000 [--seed N]
    python tests/chaos/fuzz_decoder.py --atheris [libFuzzer's own arguments]

Valid answers are mutated at random; with ``--atheris`` (where atheris is installed) coverage guides the
mutations. ``check`` is the entry for either.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from beam_triton.compression import compress, decompress
from beam_triton.errors import RemoteProtocolError
from beam_triton.protocol import DATATYPES, decode_infer_response

MAX_BYTES = 1 << 20
_PLAIN, _GZIP, _DEFLATE = range(3)
_ENCODINGS = {_GZIP: "gzip", _DEFLATE: "deflate"}
_NO_HEADER_LENGTH = 0xFFFF

# Pieces of headers: swapped for one another, they get further into the decoder than random bytes.
_TOKENS = (
    *(json.dumps(name).encode() for name in DATATYPES),
    b'"binary_data_size":',
    b'"data":',
    b'"shape":',
    b'"outputs":',
    b'"parameters":',
    b'"name":"y"',
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b"[]",
    b"{}",
    b"null",
    b"true",
    b"NaN",
    b"-1",
    b"0",
    b"1e999",
    b"4611686018427387904",
    b"9" * 400,
    b'"\\ud800"',
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"[" * 2000,
)


def check(data: bytes) -> bool:
    """Decode ``data`` as an answer and read its rows; True if it is valid, False if it is refused.

    The first three bytes stand for the HTTP headers: the encoding of the body, and the length of its JSON
    (65535: no such header).
    """
    if len(data) < 3:
        return False
    encoding = _ENCODINGS.get(data[0])
    (json_length,) = struct.unpack_from("<H", data, 1)
    body = data[3:]
    try:
        if encoding is not None:
            body = decompress(body, encoding, max_bytes=MAX_BYTES)
            assert len(body) <= MAX_BYTES
        answer = decode_infer_response(body, None if json_length == _NO_HEADER_LENGTH else json_length)
        held = sum(array.nbytes for array in answer.outputs.values())
        # BF16 doubles, and eight bytes point to each BYTES value, which has four bytes or two characters.
        assert held <= 16 * len(body), f"{held} bytes of arrays from a body of {len(body)}"
        list(answer.rows(2))
    except RemoteProtocolError:
        return False
    return True


def valid_inputs() -> list[bytes]:
    """Valid inputs for ``check``: every datatype, binary, JSON, empty and compressed."""
    entries = []
    tails = []
    for name, datatype in DATATYPES.items():
        tail = b"\x02\0\0\0ab\0\0\0\0" if datatype.is_bytes else bytes(range(2 * datatype.item_bytes))
        tails.append(tail)
        entries.append(_binary_output(name.lower(), name, [2, 1], len(tail)))
    in_json = [
        {"name": "f", "datatype": "FP32", "shape": [2, 2], "data": [[1.5, 2], [3, 4e5]]},
        {"name": "s", "datatype": "BYTES", "shape": [2], "data": ["a", "\u00f1"]},
        {"name": "b", "datatype": "BOOL", "shape": [2, 1], "data": [True, False]},
    ]
    empty = [_binary_output("e", "FP32", [2, 0], 0)]
    answers = [
        (entries, b"".join(tails)),
        (entries[:1], tails[0]),
        ([entries[0], *in_json, entries[-1]], tails[0] + tails[-1]),
        (in_json, None),
        (empty, None),
        ([_binary_output("s", "BYTES", [2, 2], 40)], b"\x06\0\0\0abcdef" * 4),
    ]
    plain = [_framed(_PLAIN, outputs, tail) for outputs, tail in answers]
    # Nearly every change of a compressed answer fails at its checksum: a few of them are enough.
    return [*plain, _framed(_GZIP, *answers[1]), _framed(_DEFLATE, *answers[1])]


def _binary_output(name: str, datatype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def _framed(encoding: int, outputs: list[dict[str, Any]], tail: bytes | None) -> bytes:
    document = {"model_name": "m", "model_version": "1", "id": "q", "outputs": outputs}
    head = json.dumps(document, separators=(",", ":")).encode()
    body = head + (tail or b"")
    if encoding != _PLAIN:
        body = compress([body], _ENCODINGS[encoding])
    return struct.pack("<BH", encoding, _NO_HEADER_LENGTH if tail is None else len(head)) + body


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` after one to four random changes; a plain answer's header length follows its header."""
    body = bytearray(data[3:])
    (json_length,) = struct.unpack_from("<H", data, 1)
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(body))
        end = min(len(body), start + rng.choice((0, 1, 1, 2, 4, 16, 64)))
        kind = rng.randrange(6)
        if kind == 0:
            new = b""
        elif kind == 1:
            new = rng.choice(_TOKENS)
        elif kind == 2:
            new = rng.randbytes(end - start)
        elif kind == 3:
            copied = rng.randint(0, len(body))
            new = bytes(body[copied : copied + rng.randint(0, 64)])
        elif kind == 4:
            new = str(rng.choice((0, 1, 2, 3, 8, 255, 2**31, 2**62, -1))).encode()
        else:
            new = bytes(byte ^ (1 << rng.randrange(8)) for byte in body[start:end])
        body[start:end] = new
        if start < json_length != _NO_HEADER_LENGTH and data[0] == _PLAIN and rng.random() < 0.9:
            json_length = max(0, min(json_length + len(new) - (end - start), _NO_HEADER_LENGTH - 1))
    return struct.pack("<BH", data[0], json_length) + bytes(body)


def run(runs: int, seed: int) -> tuple[int, int]:
    """Check ``runs`` mutated answers; the numbers of those decoded and those refused.

    Any other exception ends the run, after its input has been printed.
    """
    rng = random.Random(seed)
    seeds = valid_inputs()
    decoded = 0
    for number in range(runs):
        data = mutated(rng.choice(seeds), rng)
        try:
            decoded += check(data)
        except BaseException:
            print(f"run {number} of seed {seed} failed on {data!r}", file=sys.stderr)
            raise
    return decoded, runs - decoded


def main() -> None:
    if "--atheris" in sys.argv:
        _run_atheris()
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100_000, help="answers to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="makes a run repeatable (default: %(default)s)")
    options = parser.parse_args()
    started = time.monotonic()
    decoded, refused = run(options.runs, options.seed)
    seconds = time.monotonic() - started
    print(f"{options.runs} answers in {seconds:.0f} s: {decoded} decoded, {refused} refused, nothing else")


def _check_one(data: bytes) -> None:
    check(data)


def _run_atheris() -> None:
    import atheris

    # atheris measures coverage in modules imported under it: only the codec, not all that Beam imports.
    fuzzed = ("beam_triton.protocol", "beam_triton.compression")
    for name in [name for name in sys.modules if name.startswith(fuzzed)]:
        del sys.modules[name]
    with atheris.instrument_imports(include=list(fuzzed)):
        protocol, compression = map(importlib.import_module, fuzzed)
    globals().update(decode_infer_response=protocol.decode_infer_response, decompress=compression.decompress)
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(valid_inputs()):
            (Path(corpus) / str(number)).write_bytes(data)
        arguments = [argument for argument in sys.argv if argument != "--atheris"]
        atheris.Setup([*arguments, corpus], _check_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
