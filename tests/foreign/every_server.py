"""What users of any server of the protocol rely on: one class, of which each server's tests are a child.

The servers have the models ``double`` (refuses negative numbers), ``root`` (of a negative number: NaN),
``half`` (FP16), ``shout`` (text) and ``echo``: from a vector to a vector, with one input and one output.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from beam_triton import ModelNotFoundError, TritonClient, TritonInference
from beam_triton.cli.main import main
from pipelines import score_files
from tests.foreign.servers import ForeignServer
from tests.support.numbered_run import kill_and_restart, repeat_during_run, run_numbered
from tests.support.pipelines import Run, score

REFUSAL = "negative numbers are not taken: -1.0"
GOOD = [np.array([number, number / 2, number + 1, 0.25], np.float32) for number in range(8)]


def failing_and_good(bad: Any) -> list[Any]:
    """Eight elements, enough for a batch, of which the fourth is bad."""
    return [*GOOD[:3], bad, *GOOD[3:]]


def values_of(run: Run, output: str) -> list[Any]:
    """The values of one output, in the order of the elements of `GOOD`."""
    results = sorted(run.results, key=lambda result: float(np.nan_to_num(result.example[0], nan=-1)))
    return [result.inference[output].tolist() for result in results]


def printed_by(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, after checking its exit code."""
    capsys.readouterr()
    found = main(arguments)
    captured = capsys.readouterr()
    assert found == code, captured
    return captured.out + captured.err


def score_rows(
    server: ForeignServer, model: str, path: Path, *arguments: object
) -> tuple[int, list[Any], list[Any]]:
    """The exit code of the file application for one file, its results and its failures."""
    output = path.with_name("results.jsonl")
    code = score_files.main(
        [
            *("--files", str(path), "--endpoint", server.endpoint, "--model", model),
            *("--output", str(output), "--progress_seconds=0", *map(str, arguments)),
        ]
    )
    results, failures = (
        [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for file in (output, output.with_name("results-failures.jsonl"))
    )
    return code, results, failures


def write_csv(path: Path, rows: Iterable[Iterable[Any]], names: str = "x") -> Path:
    """A file of rows ``id``, and the numbers of a row in columns ``x0``, ``x1`` …"""
    numbers = [list(map(float, row)) for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *(f"{names}{column}" for column in range(len(numbers[0])))])
        writer.writerows([number, *row] for number, row in enumerate(numbers))
    return path


class EveryServer:
    """A child says how its server is started, and what differs.

    Attributes:
        reports_batch_limits: the server says how large a batch may be; elsewhere the library decides.
        lists_models: anybody may ask for the names of its models.
        options_for_fp16: what is to be said for a model of FP16.
        text_output: the output of ``shout``.
        text_is_unicode: ``shout`` also changes what is beyond ASCII.
    """

    start: Callable[[Path], ForeignServer]
    reports_batch_limits = False
    lists_models = True
    options_for_fp16: ClassVar[Mapping[str, Any]] = {}
    text_output = "loud"
    text_is_unicode = True

    def model_id(self, model: str) -> str:
        """What results say of a model; most servers have no versions."""
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterable[ForeignServer]:
        with cls.start(tmp_path_factory.mktemp("server")) as server:
            yield server

    def test_client_reads_metadata_and_gets_results(self, server: ForeignServer) -> None:
        """Name, shape without the batch, datatype; a batch of two rows."""
        with TritonClient(server.endpoint) as client:
            spec = client.model_spec("double")
            assert [(each.name, each.datatype, each.shape) for each in spec.inputs] == [("x", "FP32", (4,))]
            assert [(each.name, each.datatype, each.shape) for each in spec.outputs] == [("y", "FP32", (4,))]
            assert spec.max_batch_size > 1
            outputs = client.infer("double", {"x": np.stack(GOOD[:2])}).outputs
            assert client.is_model_ready("double")
        assert outputs["y"].dtype == np.float32
        assert outputs["y"].tolist() == [[0, 0, 2, 0.5], [2, 1, 4, 0.5]]

    def test_elements_without_the_batch_dimension_share_requests(self, server: ForeignServer) -> None:
        """With default options: one dimension less than the metadata, and batches of a default size."""
        elements = [np.array([number, 0, 0, 0], np.float32) for number in range(64)]
        run = score(elements, TritonInference(server.endpoint, "double"))
        assert values_of(run, "y") == [[2 * number, 0, 0, 0] for number in range(64)]
        assert run.counters["requests"] <= 8

    def test_batch_size_may_be_given(self, server: ForeignServer) -> None:
        """``batching`` overrides what was found out."""
        transform = TritonInference(server.endpoint, "double", batching={"max_batch_size": 4})
        run = score(GOOD, transform)
        assert values_of(run, "y") == [(2 * each).tolist() for each in GOOD]
        assert run.distributions["batch_size"].max == 4

    def test_the_log_says_once_how_batches_are_made(
        self, server: ForeignServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Where the server does not report a batch limit, and only there."""
        # Each warning comes once in a process: by another name, it is another server.
        endpoint = server.endpoint.replace("127.0.0.1", "localhost")
        with caplog.at_level(logging.WARNING, "beam_triton"):
            for _ in range(2):
                score(GOOD, TritonInference(endpoint, "double"))
        said = [record.getMessage() for record in caplog.records if "max_batch_size" in record.getMessage()]
        assert len(said) == (0 if self.reports_batch_limits else 1), said

    def test_nan_in_a_result_is_nan(self, server: ForeignServer) -> None:
        """JSON writes NaN as null: it is the value of one number, and no other element's business."""
        bad = np.array([16, -1, 9, 16], np.float32)
        run = score(
            [np.square(GOOD[1]), bad, np.square(GOOD[2])],
            TritonInference(server.endpoint, "root").with_exception_handling(),
        )
        assert run.failures == []
        results = {float(result.example[0]): result.inference["y"] for result in run.results}
        assert len(results) == 3
        np.testing.assert_array_equal(results[16.0], [4, np.nan, 3, 4])
        np.testing.assert_array_equal(results[1.0], GOOD[1])
        np.testing.assert_array_equal(results[4.0], GOOD[2])

    def test_nan_in_an_element_reaches_the_model(self, server: ForeignServer) -> None:
        """A gap in tabular data goes to the model as NaN, and the elements beside it are scored."""
        run = score(
            failing_and_good(np.array([1000, np.nan, 1, 1], np.float32)),
            TritonInference(server.endpoint, "double").with_exception_handling(),
        )
        assert run.failures == []
        results = {float(result.example[0]): result.inference["y"] for result in run.results}
        assert len(results) == 9
        np.testing.assert_array_equal(results[1000.0], [2000, np.nan, 2, 2])
        np.testing.assert_array_equal(results[7.0], 2 * GOOD[7])

    def test_infinity_in_a_result(self, server: ForeignServer) -> None:
        """Infinity comes back as itself where the server can say it, else as NaN; never as a failure."""
        run = score(
            failing_and_good(np.array([1000, np.inf, 1, 1], np.float32)),
            TritonInference(server.endpoint, "root").with_exception_handling(),
        )
        assert run.failures == []
        results = {float(result.example[0]): result.inference["y"] for result in run.results}
        assert not np.isfinite(results[1000.0][1])
        np.testing.assert_array_equal(results[4.0], np.sqrt(GOOD[4]))

    def test_only_the_refused_element_is_a_dead_letter(self, server: ForeignServer) -> None:
        """The model raises for a whole batch: bisecting leaves one failure, with the model's own reason."""
        bad = np.array([-1, 0, 0, 0], np.float32)
        run = score(
            failing_and_good(bad), TritonInference(server.endpoint, "double").with_exception_handling()
        )
        ((element, (kind, message, _)),) = run.failures
        assert element.tolist() == [-1, 0, 0, 0]
        assert REFUSAL in message, (kind, message)
        assert values_of(run, "y") == [(2 * each).tolist() for each in GOOD]

    def test_half_precision(self, server: ForeignServer) -> None:
        """FP16 travels as numbers where it does not travel in binary."""
        elements = [each.astype(np.float16) for each in GOOD]
        run = score(elements, TritonInference(server.endpoint, "half", **self.options_for_fp16))
        assert values_of(run, "y") == [(each / 2).tolist() for each in elements]
        assert {result.inference["y"].dtype for result in run.results} == {np.dtype(np.float16)}

    def test_text(self, server: ForeignServer) -> None:
        """Strings in and out, with characters that JSON escapes."""
        words = ["hello", 'say "hi"', "caf\u00e9"] if self.text_is_unicode else ["hello", 'say "hi"', "a\\b"]
        run = score(words, TritonInference(server.endpoint, "shout"))
        loud = {result.example: result.inference[self.text_output].tolist() for result in run.results}
        assert loud == {word: [word.upper().encode()] for word in words}

    def test_a_result_names_its_model(self, server: ForeignServer) -> None:
        """Name and version where the server has versions; no bare colon where it has none."""
        run = score(GOOD, TritonInference(server.endpoint, "double"))
        assert {result.model_id for result in run.results} == {self.model_id("double")}

    def test_unknown_model_is_named_with_those_that_there_are(self, server: ForeignServer) -> None:
        """The server speaks the protocol: the error does not doubt it."""
        with TritonClient(server.endpoint) as client, pytest.raises(ModelNotFoundError) as caught:
            client.infer("nosuch", {"x": np.zeros((1, 4), np.float32)})
        message = str(caught.value)
        assert "nosuch" in message
        assert "no server of the Open Inference Protocol" not in message
        assert "8001" not in message and "<html" not in message.lower()
        models = server.models if self.lists_models else ["does not list its models"]
        assert all(model in message for model in models), message

    def test_a_killed_server_loses_nothing(self, server: ForeignServer) -> None:
        """``kill -9`` in mid-job, and a start on the same port: each element has its result, once."""
        elements = 10_000
        run = run_numbered(
            TritonInference(server.endpoint, "echo"),
            elements,
            meanwhile=repeat_during_run(1, elements, kill_and_restart(server)),
            pace_seconds=0.1,
        )
        assert run.counters["elements"] == elements
        assert run.counters.get("failures", 0) == 0
        assert run.counters["retries"] > 0

    @pytest.mark.parametrize("batch_size", [None, 8])
    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_files_are_scored(
        self, server: ForeignServer, tmp_path: Path, kind: str, batch_size: int | None
    ) -> None:
        """Each row has its own result; the row that the model refuses is the one failure."""
        rows = failing_and_good(np.array([-1, 0, 0, 0], np.float32))
        path = write_csv(tmp_path / "rows.csv", rows)
        columns = "x=x0:x3"
        if kind == "jsonl":
            path = tmp_path / "rows.jsonl"
            path.write_text(
                "".join(json.dumps({"id": i, "x": row.tolist()}) + "\n" for i, row in enumerate(rows))
            )
            columns = "x=x"
        size = [] if batch_size is None else ["--batch_size", batch_size]
        code, results, failures = score_rows(
            server, "double", path, "--input", columns, "--keep", "id", *size
        )
        assert code == 0
        assert {int(each["id"]): each["y"] for each in results} == {
            number: (2 * row).tolist() for number, row in enumerate(rows) if number != 3
        }
        assert {each["model"] for each in results} == {self.model_id("double")}
        assert len(failures) == 1 and REFUSAL in json.dumps(failures), failures

    def test_check_says_what_it_found_and_does(
        self, server: ForeignServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Exit code 0; shapes of an element, the batch size in use, and the option that changes it."""
        text = printed_by(["check", server.endpoint, "--model", "double"], 0, capsys)
        assert "No problems found." in text
        assert re.search(r"^inputs +x FP32 \[4\]$", text, re.M), text
        assert "received: y [1, 4]" in text
        assert re.search(r"at most \d+ elements a request", text), text
        if not self.reports_batch_limits:
            assert "max_batch_size" in text

    def test_check_of_the_server_lists_its_models(
        self, server: ForeignServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without a model, the server alone; never a page of HTML."""
        text = printed_by(["check", server.endpoint], 0, capsys)
        assert "<html" not in text.lower()
        models = server.models if self.lists_models else ["does not list its models"]
        assert all(re.search(rf"\b{model}\b", text) for model in models), text

    def test_tune_recommends_a_setting(
        self, server: ForeignServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A search of two seconds, in batches of more than one."""
        text = printed_by(["tune", server.endpoint, "--model", "double", "--seconds", "2"], 0, capsys)
        assert "max_batch_size" in text
        sizes = {int(size) for size in re.findall(r"^ *(\d+) +\d+ +[\d,]+ ", text, re.M)}
        assert max(sizes) > 1, text


class ServerOfUnnamedInputs(EveryServer):
    """Its model ``unnamed`` has no metadata."""

    @pytest.mark.parametrize(
        ("command", "expected"),
        [(["check"], "received: y [1, 4]"), (["tune", "--seconds", "1"], "Recommended, for ")],
        ids=["check", "tune"],
    )
    def test_commands_take_real_inputs_for_a_model_without_metadata(
        self,
        server: ForeignServer,
        tmp_path: Path,
        command: list[str],
        expected: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Nothing can be made up for it: what helps is said, an element of the user's from a file."""
        arguments = [command[0], server.endpoint, "--model", "unnamed", *command[1:]]
        text = printed_by(arguments, 2, capsys)
        assert "does not name the inputs" in text and "--inputs" in text
        path = tmp_path / "element.json"
        path.write_text(json.dumps({"x": [1, 2, 3, 4]}))
        text = printed_by([*arguments, "--inputs", str(path), "--max-batch-size", "8"], 0, capsys)
        assert expected in text
