"""MLServer: its runtimes for scikit-learn and XGBoost, and custom ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from beam_triton import ModelSpec, TensorSpec, TritonClient, TritonInference
from tests.foreign.every_server import (
    GOOD,
    ServerOfUnnamedInputs,
    printed_by,
    score_rows,
    values_of,
    write_csv,
)
from tests.foreign.servers import ForeignServer, mlserver
from tests.support.pipelines import score

SETOSA, VERSICOLOR, VIRGINICA = [5.1, 3.5, 1.4, 0.2], [6.0, 2.7, 4.5, 1.5], [7.7, 2.6, 6.9, 2.3]
FLOWERS = [np.array(flower) for flower in (SETOSA, VERSICOLOR, VIRGINICA)]

CLASSIFIERS = pytest.mark.parametrize("classifier", ["iris_named", "iris_boosted"])


class TestMLServer(ServerOfUnnamedInputs):
    start = staticmethod(mlserver)

    def model_id(self, model: str) -> str:
        return "double:v0.1.0" if model == "double" else model

    @CLASSIFIERS
    def test_outputs_that_come_only_when_asked_for(self, server: ForeignServer, classifier: str) -> None:
        """The metadata name ``predict_proba``, which the server leaves out unless it is requested."""
        with TritonClient(server.endpoint) as client:
            outputs = client.infer(classifier, {"x": np.stack(FLOWERS)}).outputs
        assert outputs["predict"].ravel().tolist() == [0, 1, 2]
        run = score(FLOWERS, TritonInference(server.endpoint, classifier))
        kinds = {tuple(result.example): int(result.inference["predict"].item()) for result in run.results}
        assert kinds == {tuple(SETOSA): 0, tuple(VERSICOLOR): 1, tuple(VIRGINICA): 2}

    @CLASSIFIERS
    def test_such_outputs_are_given_where_they_are_requested(
        self, server: ForeignServer, classifier: str
    ) -> None:
        """Each element has its own row of both."""
        run = score(
            FLOWERS,
            TritonInference(server.endpoint, classifier, outputs=["predict", "predict_proba"]),
        )
        for result in run.results:
            likely = result.inference["predict_proba"]
            assert likely.shape == (3,)
            assert likely.sum() == pytest.approx(1.0)
            assert int(likely.argmax()) == int(result.inference["predict"].item())

    @pytest.mark.parametrize("command", [["check"], ["tune", "--seconds", "1"]])
    @CLASSIFIERS
    def test_commands_take_such_a_model(
        self,
        server: ForeignServer,
        classifier: str,
        command: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """With zeros, and with elements of a file."""
        arguments = [command[0], server.endpoint, "--model", classifier, *command[1:]]
        assert "zeros: x FP64 [4]" in printed_by(arguments, 0, capsys)
        path = tmp_path / "flowers.jsonl"
        path.write_text("".join(json.dumps({"x": list(flower)}) + "\n" for flower in FLOWERS))
        text = printed_by([*arguments, "--inputs", str(path)], 0, capsys)
        assert f"elements of {path}" in text
        assert ("max_batch_size" if command[0] == "tune" else "received: predict [1, 1]") in text

    @CLASSIFIERS
    def test_files_are_scored_on_such_a_model(
        self, server: ForeignServer, classifier: str, tmp_path: Path
    ) -> None:
        """Each row has its class."""
        path = write_csv(tmp_path / "flowers.csv", FLOWERS)
        arguments = ("--input", "x=x0:x3", "--keep", "id", "--batch_size", 8)
        code, results, failures = score_rows(server, classifier, path, *arguments)
        assert (code, failures) == (0, [])
        assert {int(each["id"]): np.ravel(each["predict"]).tolist() for each in results} == {
            0: [0],
            1: [1],
            2: [2],
        }

    def test_a_gap_is_a_value_for_xgboost_and_none_for_scikit_learn(self, server: ForeignServer) -> None:
        """A tree has a branch for it; a regression refuses the batch, and its neighbours are scored."""
        elements = [*FLOWERS, np.array([np.nan, *SETOSA[1:]])]
        boosted = score(elements, TritonInference(server.endpoint, "iris_boosted").with_exception_handling())
        assert boosted.failures == []
        assert sorted(int(result.inference["predict"].item()) for result in boosted.results) == [0, 0, 1, 2]
        fitted = score(elements, TritonInference(server.endpoint, "iris_named").with_exception_handling())
        assert len(fitted.results) == 3
        ((element, _),) = fitted.failures
        assert np.isnan(element[0])

    def test_unnamed_inputs_are_described_by_the_elements(self, server: ForeignServer) -> None:
        """A batch of one, as nothing says that there is a batch dimension."""
        run = score([{"x": each[None]} for each in FLOWERS], TritonInference(server.endpoint, "iris"))
        assert sorted(int(result.inference["predict"].item()) for result in run.results) == [0, 1, 2]

    def test_unnamed_inputs_share_requests_where_a_batch_size_is_given(self, server: ForeignServer) -> None:
        transform = TritonInference(server.endpoint, "iris", batching={"max_batch_size": 8})
        run = score([{"x": each} for each in FLOWERS], transform)
        assert sorted(int(result.inference["predict"].item()) for result in run.results) == [0, 1, 2]
        assert run.counters["requests"] == 1

    def test_inputs_may_be_named_by_a_model_spec(self, server: ForeignServer) -> None:
        """MLServer reads no binary tensors: a described model is sent JSON all the same."""
        spec = ModelSpec("iris", inputs=(TensorSpec("x", "FP64", (4,)),), max_batch_size=8)
        run = score(FLOWERS, TritonInference(server.endpoint, "iris", model_spec=spec))
        assert sorted(int(result.inference["predict"].item()) for result in run.results) == [0, 1, 2]
        text = ModelSpec("shout", inputs=(TensorSpec("text", "BYTES", (1,)),), max_batch_size=8)
        run = score(["hello"], TritonInference(server.endpoint, "shout", model_spec=text, binary=False))
        assert run.results[0].inference["loud"].tolist() == [b"HELLO"]

    def test_a_version_that_is_no_number(self, server: ForeignServer) -> None:
        """MLServer's versions are strings."""
        run = score(GOOD, TritonInference(server.endpoint, "double", model_version="v0.1.0"))
        assert values_of(run, "y") == [(2 * each).tolist() for each in GOOD]
        assert {result.model_id for result in run.results} == {"double:v0.1.0"}

    def test_an_output_without_a_batch_dimension_reaches_no_wrong_element(
        self, server: ForeignServer
    ) -> None:
        """``total`` sums up all rows of a request: batches of it are refused by the output's name."""
        transform = TritonInference(server.endpoint, "total", batching={"max_batch_size": 8})
        with pytest.raises(Exception, match=r"output total FP32 \[1\] has no batch dimension"):
            score(GOOD, transform)
        run = score(GOOD, TritonInference(server.endpoint, "total", batching={"max_batch_size": 1}))
        assert len(run.results) == len(GOOD)
        for result in run.results:
            assert result.inference["total"].ravel().tolist() == [result.example.sum()]

    def test_content_types_are_parameters_of_an_input(self, server: ForeignServer) -> None:
        """MLServer decodes an input as its ``content_type`` says."""
        spec = ModelSpec("iris", inputs=(TensorSpec("x", "FP64", (4,)),), max_batch_size=8)
        run = score(
            FLOWERS,
            TritonInference(
                server.endpoint,
                "iris",
                model_spec=spec,
                input_parameters={"x": {"content_type": "np"}},
            ),
        )
        assert sorted(int(result.inference["predict"].item()) for result in run.results) == [0, 1, 2]

    def test_a_file_with_a_gap(self, server: ForeignServer, tmp_path: Path) -> None:
        """``nan`` in a file is NaN for the model."""
        path = write_csv(tmp_path / "rows.csv", [[1, np.nan, 2, 3], [1, 2, 3, 4]])
        code, results, failures = score_rows(server, "double", path, "--input", "x=x0:x3")
        assert (code, failures) == (0, [])
        gap, whole = sorted((each["y"] for each in results), key=lambda row: row[3])
        assert whole == [2, 4, 6, 8]
        assert gap[0] == 2 and np.isnan(float(gap[1]))
