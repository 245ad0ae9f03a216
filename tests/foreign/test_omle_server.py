"""OMLE's server: JSON written by C++, with values that are not quite those of the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import PredictionResult

from beam_triton import ModelNotFoundError, TritonClient, TritonInference
from tests.foreign.every_server import printed_by, score_rows, write_csv
from tests.foreign.servers import ForeignServer, omle_server
from tests.support.numbered_run import kill_and_restart, repeat_during_run, run_numbered
from tests.support.pipelines import score

# The tree's three leaves, in the order of its classes.
POINTS = [np.array(point) for point in ([0.0, 0.0], [5.0, 9.0], [1.0, 9.0])]
CLASSES = {(0.0, 0.0): 0, (5.0, 9.0): 1, (1.0, 9.0): 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForeignServer]:
    with omle_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def classes_of(results: list[Any]) -> dict[tuple[float, ...], int]:
    return {tuple(each.example): int(each.inference["y_pred"].item()) for each in results}


def test_whole_numbers_written_as_floats(server: ForeignServer) -> None:
    """An INT64 comes as ``0.0``: it is the integer."""
    with TritonClient(server.endpoint) as client:
        outputs = client.infer("tree", {"X": np.stack(POINTS)}).outputs
    assert outputs["y_pred"].dtype == np.int64
    assert outputs["y_pred"].ravel().tolist() == [0, 1, 2]
    assert outputs["y_prob"].shape == (3, 3)


def test_elements_without_the_batch_dimension_share_requests(server: ForeignServer) -> None:
    """With default options. ``y_pred`` is a scalar in the metadata, and a vector of one in the answer."""
    run = score(POINTS, TritonInference(server.endpoint, "tree"))
    assert classes_of(run.results) == CLASSES
    assert run.counters["requests"] == 1
    for result in run.results:
        likely = np.zeros(3)
        likely[CLASSES[tuple(result.example)]] = 1
        assert result.inference["y_prob"].tolist() == likely.tolist()


def test_a_result_names_the_only_version(server: ForeignServer) -> None:
    """The answer has no version, the metadata name one; never a bare colon."""
    run = score(POINTS, TritonInference(server.endpoint, "tree"))
    assert {result.model_id for result in run.results} <= {"tree:1", "tree"}


def test_an_output_of_a_datatype_of_the_servers_own(server: ForeignServer) -> None:
    """The metadata say STRING: the other outputs are given."""
    for transform in (
        TritonInference(server.endpoint, "labelled_tree", outputs=["y_prob"]),
        TritonInference(server.endpoint, "labelled_tree"),
    ):
        run = score(POINTS, transform)
        likely = {tuple(each.example): int(each.inference["y_prob"].argmax()) for each in run.results}
        assert likely == CLASSES


def test_only_the_element_of_a_wrong_shape_is_a_dead_letter(server: ForeignServer) -> None:
    run = score(
        [POINTS[0], np.zeros(3), *POINTS[1:]],
        TritonInference(server.endpoint, "tree").with_exception_handling(),
    )
    ((element, (_, message, _)),) = run.failures
    assert element.tolist() == [0, 0, 0]
    assert "[2]" in message and "[3]" in message
    assert classes_of(run.results) == CLASSES


def test_a_gap_in_an_element_is_scored(server: ForeignServer) -> None:
    """NaN as null: the tree sends it down its default branch."""
    run = score(
        [*POINTS, np.array([0.0, np.nan])],
        TritonInference(server.endpoint, "tree").with_exception_handling(),
    )
    assert run.failures == []
    assert len(run.results) == 4


class ScoreNumbers(beam.PTransform[Any, Any]):
    """Scores a point for each number of `run_numbered`, and gives the number back if its class is right."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self._endpoint = endpoint

    def expand(self, numbers: Any) -> Any:
        return (
            numbers
            | beam.Map(lambda number: (int(number[0]), POINTS[int(number[0]) % len(POINTS)]))
            | TritonInference(self._endpoint, "tree")
            | beam.MapTuple(_as_numbered)
        )


def _as_numbered(number: int, result: Any) -> PredictionResult:
    is_right = classes_of([result]) == {tuple(result.example): number % len(POINTS)}
    return PredictionResult([number], {"y": [number if is_right else -1]})


def test_a_killed_server_loses_nothing(server: ForeignServer) -> None:
    """``kill -9`` in mid-job, and a start on the same port: each element has its result, once."""
    elements = 10_000
    run = run_numbered(
        ScoreNumbers(server.endpoint),
        elements,
        meanwhile=repeat_during_run(1, elements, kill_and_restart(server)),
        pace_seconds=0.1,
    )
    assert run.counters.get("failures", 0) == 0
    assert run.counters["retries"] > 0


@pytest.mark.parametrize("batch_size", [None, 8])
def test_files_are_scored(server: ForeignServer, tmp_path: Path, batch_size: int | None) -> None:
    path = write_csv(tmp_path / "points.csv", POINTS)
    size = [] if batch_size is None else ["--batch_size", batch_size]
    code, results, failures = score_rows(server, "tree", path, "--input", "X=x0:x1", "--keep", "id", *size)
    assert (code, failures) == (0, [])
    found = {int(each["id"]): np.ravel(each["y_pred"]).tolist() for each in results}
    assert found == {number: [CLASSES[tuple(point)]] for number, point in enumerate(POINTS)}
    assert not any(each["model"].endswith(":") for each in results), json.dumps(results)


def test_unknown_model_is_named(server: ForeignServer) -> None:
    """The server lists no models: its 404 there is a page of HTML, which nobody is shown."""
    with TritonClient(server.endpoint) as client, pytest.raises(ModelNotFoundError) as caught:
        client.infer("nosuch", {"X": np.zeros((1, 2))})
    message = str(caught.value)
    assert "nosuch" in message and "does not list its models" in message
    assert "<html" not in message.lower()
    assert "no server of the Open Inference Protocol" not in message


def test_check_shows_no_page_of_html(server: ForeignServer, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--model", "tree"], ["--model", "labelled_tree"]):
        text = printed_by(["check", server.endpoint, *arguments], 0, capsys)
        assert "<html" not in text.lower(), text
        assert "No problems found." in text


def test_tune_recommends_a_setting(server: ForeignServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert "max_batch_size" in printed_by(
        ["tune", server.endpoint, "--model", "tree", "--seconds", "1"], 0, capsys
    )
