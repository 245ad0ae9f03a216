"""``replay`` killed in its midst."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from beam_triton.testing import LocalTriton

ROWS = 4_000
KILLS = 5


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def failed_ids(path: Path) -> list[int]:
    return [json.loads(line)["data"]["id"] for line in path.read_text().splitlines()]


def test_a_killed_replay_loses_no_row(triton: LocalTriton, tmp_path: Path) -> None:
    """Killed at several moments of its writing; after one that ends, every row has a result."""
    output, failures = tmp_path / "out.jsonl", tmp_path / "out-failures.jsonl"
    output.write_text("".join(json.dumps({"id": i, "y": 0.0, "model": "m:1"}) + "\n" for i in range(100)))
    failed = {"file": "gone.jsonl", "error": "ServerUnavailableError", "message": "down"}
    rows = ({**failed, "row": i + 1, "data": {"id": i, "x": [float(i)]}} for i in range(100, ROWS))
    failures.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "beam_triton", "replay", str(failures), "--endpoint", triton.endpoint]
    command += ["--model", "rejecting", "--keep", "id", "--output", str(output), "--progress_seconds=0"]
    for kill in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # It has begun to write; 0 to 0.4 s later it may have put its results in place.
            while not list(tmp_path.glob(".out*")) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(kill * 0.1)
        finally:
            process.kill()
            process.wait()
        assert {*ids(output)} | {*failed_ids(failures)} == {*range(ROWS)}
        for folder in tmp_path.glob(".out*"):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {*ids(output)} == {*range(ROWS)}
    assert failed_ids(failures) == []
