"""Parquet to Parquet on the fast model, beside wrk, which neither reads files nor writes them."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beam_triton import TritonBatchInference
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import Case, Scale, rates, take_turns, throughput_row
from benchmarks.peers import BEAM_TRITON, WRK
from benchmarks.peers.peer import PeerMissing
from benchmarks.process import peak_bytes, run_in_fresh_process
from benchmarks.results import CaseResult, Figure, ratios
from benchmarks.server import ECHO, target
from benchmarks.workload import Target, Throughput, Workload

_WIDTH = 128
_REQUEST_ROWS = 64
_GROUP_ROWS = 8192
_REQUIRED = 0.6
_OF_TABLES = f"{BEAM_TRITON.name}, Arrow tables in a pipeline"
_BY_SCORE = f"{BEAM_TRITON.name}, python -m beam_triton score"
_NOTES = [
    "requests of 64 rows of 128 FP32; a row group has 8,192 rows of such a list and a number, which is kept",
    "the pipeline is Beam's ReadFromParquetBatched, TritonBatchInference and Beam's WriteToParquetBatched",
    "timed from the first call to the closed file: starting the pipeline is included, importing packages is "
    "not; the server shares the processors with the client",
]


def _parquet(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """The file is written anew; what comes out holds every row once, unchanged."""
    count = scale.count(2_000_000, least=1_000)
    work = Workload(
        target(server, ECHO),
        count,
        batch_size=_REQUEST_ROWS,
        load_connections=4,
        load_seconds=scale.seconds(5),
    )
    notes = [*_NOTES]
    with tempfile.TemporaryDirectory(prefix="beam_triton_parquet_") as name:
        folder = Path(name)
        _write_rows(folder / "rows.parquet", count)
        measures = {
            label: partial(run_in_fresh_process, function, work.target, folder)
            for label, function in ((_BY_SCORE, _by_score), (_OF_TABLES, _by_tables))
        }
        try:
            WRK.check_installed()
            measures[WRK.name] = partial(run_in_fresh_process, WRK.score, work)
        except PeerMissing as missing:
            notes.append(f"left out: {missing}")
        runs = take_turns(rounds, measures)
    figures = [
        Figure.of_rounds(
            f"rows/s of {what}, relative to {WRK.name} -c4",
            "at least",
            _REQUIRED,
            ratios(rates(runs[label]), rates(runs[WRK.name])),
        )
        for what, label in (("the file command", _BY_SCORE), ("Arrow tables in a pipeline", _OF_TABLES))
        if WRK.name in runs
    ]
    rows = [throughput_row(label, taken) for label, taken in runs.items()]
    return CaseResult(CASE.name, CASE.title, rows, figures, notes=notes, rounds=rounds)


def _write_rows(path: Path, count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    values = np.random.default_rng(1).random(count * _WIDTH, np.float32)
    table = pyarrow.table(
        {"id": np.arange(count), "x": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), _WIDTH)}
    )
    pyarrow.parquet.write_table(table, path, row_group_size=_GROUP_ROWS, use_dictionary=["id"])


def _by_score(of: Target, folder: Path) -> Throughput:
    from beam_triton.score import score_command

    rows, output = folder / "rows.parquet", folder / "score.parquet"
    arguments = [
        *("--files", str(rows), "--endpoint", of.endpoint, "--model", of.model_name, "--output", str(output)),
        *("--keep", "id", "--batch_size", str(_REQUEST_ROWS), "--progress_seconds=0"),
    ]
    began, cpu_began = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        exit_code = score_command.main(arguments)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    assert exit_code == 0, f"exit code {exit_code}"
    return Throughput(_compare(rows, [output]), seconds, cpu_seconds, peak_bytes())


def _by_tables(of: Target, folder: Path) -> Throughput:
    import apache_beam as beam
    import pyarrow.parquet

    rows = folder / "rows.parquet"
    began, cpu_began = time.perf_counter(), time.process_time()
    score = TritonBatchInference(
        of.endpoint, of.model_name, batching={"max_batch_size": _REQUEST_ROWS}, keep=["id"]
    )
    schema = score.output_schema(pyarrow.parquet.read_schema(rows))
    pipeline = beam.Pipeline("FnApiRunner")
    write: Any = beam.io.WriteToParquetBatched(f"{folder}/tables", schema, file_name_suffix=".parquet")
    _ = pipeline | beam.io.ReadFromParquetBatched(str(rows)) | score | write
    pipeline.run().wait_until_finish()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return Throughput(_compare(rows, sorted(folder.glob("tables-*"))), seconds, cpu_seconds, peak_bytes())


def _compare(given: Path, written: list[Path]) -> int:
    """The number of rows, if each came out once, with the numbers that it had."""
    import pyarrow
    import pyarrow.parquet

    sent = pyarrow.parquet.read_table(given)
    found = pyarrow.concat_tables(map(pyarrow.parquet.read_table, written)).sort_by("id")
    assert found["id"].equals(sent["id"])
    values = [pyarrow.compute.list_flatten(column).to_numpy() for column in (sent["x"], found["y"])]
    assert np.array_equal(*values)
    return int(found.num_rows)


CASE = Case("parquet", "A model that costs nothing; 2,000,000 rows of 128 FP32 from file to file", _parquet)
