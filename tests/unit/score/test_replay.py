"""Rows out of failures files; `tests/integration/test_replay.py` scores them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.score.replay import FailedRows
from beam_triton.score.row_reading import Piece, RowBlock

FAILED = b'{"file": "a.jsonl", "row": 1, "error": "E", "message": "m", "data": {"x": [1]}}\n'


def test_a_file_whose_name_could_be_a_pattern_is_that_file(tmp_path: Path) -> None:
    """Not the one that the pattern matches."""
    for name in ("a[1].bin", "a1.bin"):
        (tmp_path / name).write_text(name)
    failed = {"file": str(tmp_path / "a[1].bin"), "row": None, "error": "E", "message": "m", "data": None}
    (tmp_path / "failures.jsonl").write_text(json.dumps(failed))
    source = FailedRows(format="bytes")
    (block,) = source.read(Piece(str(tmp_path / "failures.jsonl")), lambda names: names)
    assert isinstance(block, RowBlock)
    assert block.values("content") == [b"a[1].bin"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("failures.jsonl", FAILED + b'{"file": "a'),
        ("failures.jsonl.gz", gzip.compress(FAILED * 1000)[:-20]),
        ("rows.json", b'[{"x": 1}, {"x": 2}]'),
    ],
)
def test_a_file_that_is_not_of_failures_alone_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    """It would be replaced by what could be read of it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{name} does not hold failures of score alone: "):
        list(FailedRows().read(Piece(str(path)), lambda names: names))
