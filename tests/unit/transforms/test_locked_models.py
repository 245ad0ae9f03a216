"""Workers hold the served model to the lock file that the pipeline was built with."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from beam_triton import (
    ConfigurationError,
    ModelMismatchError,
    ModelSpec,
    TensorSpec,
    TritonBatchInference,
    TritonInference,
    TritonInferenceDoFn,
    TritonModelHandler,
)
from beam_triton.cli.main import main
from beam_triton.control_plane import _warn_once
from beam_triton.score import score_command
from beam_triton.testing import FakeModel, FakeTriton
from beam_triton.testing.ports import free_port
from tests.support.faults import refusing_port
from tests.support.pipelines import bundle_of, score

LOCKED = ModelSpec("m", "", (TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),), 64)
ROWS = [np.full(4, number, np.float32) for number in range(100)]


@pytest.fixture
def lock(tmp_path: Path) -> str:
    path = tmp_path / "m.lock.json"
    LOCKED.save(path)
    return str(path)


def echo(**changes: Any) -> FakeModel:
    """Gives x as each of its outputs."""
    given: dict[str, Any] = {"inputs": {"x": ("FP32", [4])}, "outputs": {"y": ("FP32", [4])}, **changes}
    return FakeModel(lambda inputs: dict.fromkeys(given["outputs"], inputs["x"]), **given)


@contextmanager
def serving(**changes: Any) -> Iterator[FakeTriton]:
    with FakeTriton({"m": echo(**changes)}) as triton:
        yield triton


TRANSFORMS = (TritonInference, TritonInferenceDoFn, TritonModelHandler, TritonBatchInference)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nothing_is_asked_while_a_pipeline_is_built(transform: Any, lock: str) -> None:
    """And the lock of another model is refused."""
    with refusing_port() as port:
        built = transform(f"http://127.0.0.1:{port}", "m", model_spec=lock, timeout_seconds=1)
        assert pickle.loads(pickle.dumps(built))
        with pytest.raises(ConfigurationError, match="that of model 'm', not 'other'"):
            transform(f"http://127.0.0.1:{port}", "other", model_spec=lock)


def test_rows_have_the_schema_of_the_lock(lock: str) -> None:
    """And columns are compared with it, without a server."""
    with refusing_port() as port:
        score_rows = TritonInference(f"http://127.0.0.1:{port}", "m", model_spec=lock, output="row")
        pipeline = beam.Pipeline()
        scored = pipeline | "Good" >> beam.Create([beam.Row(id=1, x=[1.0] * 4)]) | score_rows
        assert [name for name, _ in scored.element_type._fields] == ["id", "y"]
        with pytest.raises(ConfigurationError, match="'x'"):
            _ = pipeline | "Bad" >> beam.Create([beam.Row(id=1)]) | "ScoreBad" >> score_rows


@pytest.mark.parametrize("transform", [TritonInferenceDoFn, TritonModelHandler])
def test_workers_refuse_another_model(transform: Any, lock: str) -> None:
    """All differences are named, and what to do."""
    with serving(inputs={"x": ("FP32", [5])}, outputs={"z": ("FP32", [4])}) as triton:
        made = transform(triton.endpoint, "m", model_spec=lock)
        with pytest.raises(ModelMismatchError) as caught:
            made.setup() if transform is TritonInferenceDoFn else made.load_model()
    for part in (
        "m.lock.json",
        "input 'x' has shape [5], not [4]; output 'y' is gone; output z FP32 [4] is new",
        f"python -m beam_triton lock {triton.endpoint} m",
    ):
        assert part in str(caught.value)


def test_another_model_fails_the_job(lock: str) -> None:
    """Its error comes out of the runner."""
    with (
        serving(outputs={"y": ("FP64", [4])}) as triton,
        pytest.raises(Exception, match="y' is FP64, not FP32"),
    ):
        score(ROWS, TritonInference(triton.endpoint, "m", model_spec=lock))


def test_harmless_differences_are_said_once_and_the_lock_holds(
    lock: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The new output is not asked for, and batches are as small as the served model wants them."""
    _warn_once.cache_clear()
    with serving(outputs={"z": ("FP32", [4]), "y": ("FP32", [4])}, max_batch_size=16) as triton:
        for _ in range(2):
            run = score(ROWS, TritonInference(triton.endpoint, "m", model_spec=lock))
        sizes = [request.batch_size for request in triton.requests]
    assert [list(result.inference) for result in run.results] == [["y"]] * 100
    assert max(sizes) == 16
    said = [record.getMessage() for record in caplog.records if "m.lock.json" in record.getMessage()]
    assert len(said) == 1
    assert "output z FP32 [4] is new; max_batch_size is 16, not 64" in said[0]


def test_outputs_that_are_not_used_may_be_gone(tmp_path: Path) -> None:
    """``outputs`` says which are used."""
    path = tmp_path / "m.lock.json"
    replace(LOCKED, outputs=(*LOCKED.outputs, TensorSpec("w", "INT8", (1,)))).save(path)
    with serving() as triton:
        run = score(ROWS, TritonInference(triton.endpoint, "m", model_spec=path, outputs=["y"]))
        assert len(run.results) == 100
        with pytest.raises(ModelMismatchError, match="output 'w' is gone"):
            TritonInferenceDoFn(triton.endpoint, "m", model_spec=path).setup()


def test_a_description_by_hand_is_not_compared() -> None:
    """It replaces what the server says, as ever."""
    with serving(outputs={"z": ("FP32", [4])}) as triton:
        dofn = TritonInferenceDoFn(triton.endpoint, "m", model_spec=LOCKED)
        with bundle_of(dofn):
            assert dofn._model is not None and dofn._model.spec is LOCKED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": {"y": ("FP64", [4])}}, "the model has changed: .*output 'y' is FP64, not FP32"),
        ({"max_batch_size": 16}, ""),
    ],
    ids=["harmful", "harmless"],
)
def test_the_lock_holds_where_the_model_changes_in_mid_job(
    changes: dict[str, Any], message: str, lock: str
) -> None:
    """A harmful change fails the bundle, which dead letters would hide; a harmless one is followed."""
    outputs: list[Any] = []
    port = free_port()
    dofn = TritonInferenceDoFn(f"http://127.0.0.1:{port}", "m", model_spec=lock, with_exception_handling=True)

    def send(rows: list[Any]) -> None:
        for each in map(GlobalWindows.windowed_value, rows):
            outputs.extend(dofn.process(each.value, each))

    with FakeTriton({"m": echo()}, port=port), bundle_of(dofn):
        send(ROWS)
        outputs.extend(dofn.finish_bundle())
        assert len(outputs) == 100
    with FakeTriton({"m": echo()}, port=port) as before, bundle_of(dofn):
        before.stop()
        with FakeTriton({"m": echo(**changes)}, port=port) as after:
            if message:
                with pytest.raises(ModelMismatchError, match=message):
                    send(ROWS)
                    dofn.finish_bundle()
                return
            send(ROWS)
            outputs.extend(dofn.finish_bundle())
            assert max(request.batch_size for request in after.requests if request.status == 200) == 16
    assert all(isinstance(output, WindowedValue) for output in outputs) and len(outputs) == 200


def test_a_lock_among_many_models_holds_its_own(lock: str) -> None:
    """Elements that name another model are scored on it; those of the locked one fail where it differs."""
    other = echo(outputs={"y": ("FP64", [4])})
    with FakeTriton({"m": echo(), "n": other}) as triton:
        named = TritonInference(triton.endpoint, lambda row: "n" if row[0] % 2 else "m", model_spec=lock)
        assert len(score(ROWS, named).results) == 100
    with FakeTriton({"m": other, "n": echo()}) as triton:
        named = TritonInference(triton.endpoint, lambda row: "n" if row[0] % 2 else "m", model_spec=lock)
        run = score(ROWS, named.with_exception_handling())
    assert (len(run.results), len(run.failures)) == (50, 50)
    assert "output 'y' is FP64, not FP32" in run.failures[0][1][1]


def test_a_server_that_does_not_describe_its_model_is_not_asked(
    lock: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SageMaker has inference only: the lock is used as it is, which is said once."""
    _warn_once.cache_clear()
    with refusing_port() as port:
        dofn = TritonInferenceDoFn(f"http://127.0.0.1:{port}/invocations", "m", model_spec=lock)
        for _ in range(2):
            with bundle_of(dofn):
                pass
    said = [record.getMessage() for record in caplog.records if "m.lock.json" in record.getMessage()]
    assert len(said) == 1 and "used without a comparison" in said[0]


def test_lock_command_writes_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 where a difference does harm, 2 for a file that is none; the version only where pinned."""
    monkeypatch.chdir(tmp_path)
    with serving(versions=("1", "2")) as triton:
        assert main(["lock", triton.endpoint, "m"]) == 0
        assert main(["lock", triton.endpoint, "m", "--model-version", "1", "--output", "m1.json"]) == 0
        assert (ModelSpec.load("m.lock.json").version, ModelSpec.load("m1.json").version) == ("", "1")
        assert main(["lock", triton.endpoint, "m", "--check", "m.lock.json"]) == 0
        assert "is the one that m.lock.json describes" in capsys.readouterr().out
        assert main(["lock", triton.endpoint, "m", "--check", "m1.json"]) == 0
        assert capsys.readouterr().out == "harmless: its version is 2, not 1\n"
        assert main(["lock", triton.endpoint, "m", "--check", "missing.json"]) == 2
    with serving(inputs={"x": ("INT8", [4])}, max_batch_size=8) as triton:
        check = ["--check", "m.lock.json"]
        assert main(["lock", triton.endpoint, "m", *check]) == 1
        out = "PROBLEM: input 'x' is INT8, not FP32\nharmless: max_batch_size is 8, not 64\n"
        assert capsys.readouterr().out == out
        with_lock = ["--model", "m", "--option", "model_spec=m.lock.json"]
        assert main(["check", triton.endpoint, *with_lock]) == 1
        assert "input 'x' is INT8, not FP32" in capsys.readouterr().err


def test_score_takes_a_lock_file(lock: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And compares before it starts."""
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"x": [1, 2, 3, 4]}\n')
    arguments = ["--model", "m", "--files", str(rows), "--output", str(output), "--progress_seconds=0"]
    arguments += ["--option", f"model_spec={lock}"]
    with serving() as triton:
        assert score_command.main([*arguments, "--endpoint", triton.endpoint]) == 0
    assert '"y": [1, 2, 3, 4]' in output.read_text()
    with serving(inputs={"z": ("FP32", [4])}) as triton:
        assert score_command.main([*arguments, "--endpoint", triton.endpoint]) == 2
    assert "input 'x' is gone" in capsys.readouterr().err
