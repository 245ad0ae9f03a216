"""Files scored by ``python -m beam_triton score``, beside the script that a user without Beam writes."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import CPU_MICROSECONDS, ELEMENTS, ELEMENTS_PER_SECOND, Case, Scale, take_turns
from benchmarks.peers import BEAM_TRITON
from benchmarks.process import run_in_fresh_process
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import ECHO_VARIABLE
from pipelines.score_files import MODEL_REPOSITORY

_WIDTH = 64
_REQUEST_ROWS = 256
_SCRIPT = "pyarrow + tritonclient.http"
_REQUIRED = 2.0
_NOTES = [
    "echo gives the 64 FP32 values of a row back; digits, the shipped classifier, gives 10 FP32 and an INT64",
    "the script reads the file whole, sends 256 rows a request, one request after the other, and writes "
    "json.dumps of each row",
    "timed from the first call to the closed file: starting the pipeline is included, importing packages is "
    "in neither; the server shares the processors with the client",
]


class _Model(NamedTuple):
    label: str
    name: str
    input: str
    outputs: tuple[str, ...]


_ECHO = _Model("echo", ECHO_VARIABLE, "x", ("y",))
_DIGITS = _Model("digits", "digits", "image", ("probabilities", "label"))


class _Run(NamedTuple):
    seconds: float
    cpu_seconds: float


def _score_files(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Rows of 64 numbers, from Parquet and from CSV, to JSON Lines; both write the same results."""
    count = scale.count(200_000, least=600)
    runs: dict[str, list[_Run]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="beam_triton_score_") as name,
        LocalTriton(MODEL_REPOSITORY) as digits,
    ):
        folder = Path(name)
        _write_rows(folder, count)
        for model, endpoint in ((_ECHO, server.endpoint), (_DIGITS, digits.endpoint)):
            _warm_up(endpoint, model)
            for kind in ("parquet", "csv"):
                outputs = {peer: folder / f"{peer}.jsonl" for peer in (BEAM_TRITON.name, _SCRIPT)}
                functions = {BEAM_TRITON.name: _by_the_command, _SCRIPT: _by_a_script}
                measures = {
                    f"{model.label}, {kind}: {peer}": partial(
                        run_in_fresh_process,
                        functions[peer],
                        endpoint,
                        model,
                        folder / f"rows.{kind}",
                        output,
                    )
                    for peer, output in outputs.items()
                }
                runs |= take_turns(rounds, measures)
                _compare(outputs[BEAM_TRITON.name], outputs[_SCRIPT], model, count)
    speeds = {label: [count / run.seconds for run in taken] for label, taken in runs.items()}
    rows = [
        Row.of(
            label,
            {
                ELEMENTS_PER_SECOND: speeds[label],
                ELEMENTS: [float(count)] * rounds,
                CPU_MICROSECONDS: [1e6 * run.cpu_seconds / count for run in taken],
            },
        )
        for label, taken in runs.items()
    ]
    figures = [
        Figure.of_rounds(
            f"rows/s from {kind} to {model.label}, relative to {_SCRIPT}",
            "at least",
            _REQUIRED,
            ratios(
                speeds[f"{model.label}, {kind}: {BEAM_TRITON.name}"],
                speeds[f"{model.label}, {kind}: {_SCRIPT}"],
            ),
        )
        for model in (_ECHO, _DIGITS)
        for kind in ("parquet", "csv")
    ]
    return CaseResult(
        CASE.name, CASE.title, rows, figures, notes=_NOTES, chosen=ELEMENTS_PER_SECOND, rounds=rounds
    )


def _write_rows(folder: Path, count: int) -> None:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    # The model refuses pixels that are not between 0 and 16.
    values = np.random.default_rng(1).random((count, _WIDTH), np.float32) * 16
    columns = {f"p{place}": np.round(values[:, place], 4) for place in range(_WIDTH)}
    table = pyarrow.table({"id": np.arange(count), **columns})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    pyarrow.csv.write_csv(table, folder / "rows.csv")


def _warm_up(endpoint: str, model: _Model) -> None:
    with TritonClient(endpoint) as client:
        for _ in range(64):
            client.infer(model.name, {model.input: np.zeros((_REQUEST_ROWS, _WIDTH), np.float32)})


def _timed(work: Callable[[], None]) -> _Run:
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    return _Run(time.perf_counter() - began, time.process_time() - cpu_began)


def _by_the_command(endpoint: str, model: _Model, path: Path, output: Path) -> _Run:
    from beam_triton.score import score_command

    arguments = [
        *("--files", str(path), "--endpoint", endpoint, "--model", model.name, "--output", str(output)),
        *("--input", f"{model.input}=p0:p{_WIDTH - 1}", "--keep", "id", "--progress_seconds=0"),
    ]

    def work() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            exit_code = score_command.main(arguments)
        assert exit_code == 0, f"exit code {exit_code}"

    return _timed(work)


def _by_a_script(endpoint: str, model: _Model, path: Path, output: Path) -> _Run:
    import pyarrow.csv
    import pyarrow.parquet
    from tritonclient.http import InferenceServerClient, InferInput

    def work() -> None:
        read = pyarrow.csv.read_csv if path.suffix == ".csv" else pyarrow.parquet.read_table
        client = InferenceServerClient(endpoint.removeprefix("http://"))
        with output.open("w") as file:
            for batch in read(path).to_batches(max_chunksize=_REQUEST_ROWS):
                columns = [batch.column(f"p{place}").to_numpy() for place in range(_WIDTH)]
                image = np.stack(columns, axis=1).astype(np.float32)
                tensor = InferInput(model.input, list(image.shape), "FP32")
                tensor.set_data_from_numpy(image)
                answer = client.infer(model.name, [tensor])
                found = [batch.column("id").to_pylist()]
                for name in model.outputs:
                    array = answer.as_numpy(name)
                    found.append((array[:, 0] if array.shape[1] == 1 else array).tolist())
                for row in zip(*found, strict=True):
                    file.write(json.dumps(dict(zip(("id", *model.outputs), row, strict=True))) + "\n")

    return _timed(work)


def _compare(ours: Path, theirs: Path, model: _Model, count: int) -> None:
    """Both have a result for every row, and the same numbers in it."""
    found = [{int(row["id"]): row for row in map(json.loads, path.open())} for path in (ours, theirs)]
    assert [sorted(each) for each in found] == [list(range(count))] * 2
    for name in model.outputs:
        own, other = (np.array([each[id][name] for id in range(count)]) for each in found)
        # FP32 sums depend on the size of the batch, and with them now and then a label.
        assert np.mean(np.isclose(own, other, atol=1e-3)) > 0.999, name


CASE = Case("score_files", "200,000 rows of 64 numbers from a file to JSON Lines", _score_files)
