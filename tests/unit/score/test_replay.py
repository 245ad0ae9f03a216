"""Rows out of failures files; `tests/integration/test_replay.py` scores them."""

from __future__ import annotations

import json
from pathlib import Path

from beam_triton.score.replay import FailedRows
from beam_triton.score.row_reading import Piece, RowBlock


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
