"""Beam's own tests of RunInference, its fake handlers replaced by ours over models of a real Triton.

The tests are those of the installed Beam, whatever its version; `UNFIT` names those that cannot pass, and
why. A test that a newer Beam adds is run.
"""

from __future__ import annotations

import dataclasses
import unittest
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from apache_beam.ml.inference import base_test
from apache_beam.ml.inference.base import PredictionResult
from apache_beam.testing.test_pipeline import TestPipeline

from beam_triton import TritonModelHandler
from beam_triton.transforms.run_inference import _IN_PROCESS
from beam_triton.transport.session import SESSIONS
from tests.support.models import CATALOGUE, Tensor, throwaway_triton, write_models
from tests.support.pipelines import RUNNER

_COUNTS = "the fake model counts its calls, and the count of a model on a server is not a worker's"
_PREDICTS = "calls the fake model itself, in the worker"
_NO_MODEL = "the fake answers without its model; test_run_inference.py has the situation"
_NO_HANDLER = "about classes of Beam's own, with no handler or another one"
_LONG = "takes 5 to 22 s; test_run_inference.py has the situation in a second"

UNFIT = {
    "test_failed_batches_counter_no_failures": _NO_MODEL,
    "test_forwards_batch_args": _NO_MODEL,
    "test_increment_failed_batches_counter": _NO_MODEL,
    "test_model_handler_compatibility": _NO_HANDLER,
    "test_model_handler_manager_evicts_models": _PREDICTS,
    "test_model_handler_manager_evicts_models_after_being_incremented": _PREDICTS,
    "test_model_handler_manager_evicts_models_after_update": _PREDICTS,
    "test_model_handler_manager_loads_shared_model": _PREDICTS,
    # The same four, as Beam 2.70 names them.
    "test_model_manager_evicts_correct_num_of_models_after_being_incremented": _PREDICTS,
    "test_model_manager_evicts_models": _PREDICTS,
    "test_model_manager_evicts_models_after_update": _PREDICTS,
    "test_model_manager_loads_shared_model": _PREDICTS,
    "test_model_status_provides_valid_garbage_collection": _NO_HANDLER,
    "test_model_status_provides_valid_tags": _NO_HANDLER,
    "test_run_inference_impl_inference_args": _NO_MODEL,
    "test_run_inference_impl_keyed_mps_incrementing_multi_copy": _COUNTS,
    "test_run_inference_impl_mps_nobatch_incrementing_multi_copy": _COUNTS,
    "test_run_inference_impl_multi_process_shared_incrementing_multi_copy": _COUNTS,
    "test_run_inference_keyed_examples_with_unkeyed_model_handler": (
        "expects the fake's TypeError; test_run_inference.py has the hint at KeyedModelHandler"
    ),
    "test_run_inference_loads_different_models": _COUNTS,
    "test_run_inference_loads_different_models_multi_process_shared": _COUNTS,
    "test_run_inference_side_input_in_batch_per_key_models": _COUNTS,
    "test_run_inference_timeout_does_garbage_collection": (
        "a model on a server is not reloaded after a timeout, and test_run_inference.py has the rest"
    ),
    "test_run_inference_timeout_not_hit": _LONG,
    "test_run_inference_timeout_on_inference_dlq": _LONG,
    "test_run_inference_timeout_on_load_dlq": _LONG,
    "test_run_inference_with_side_inputin_streaming": "Beam skips it, except on a streaming runner",
    "test_runinference_loads_same_model_with_identifier_multi_process_shared": _COUNTS,
    "test_unexpected_inference_args_passed": _NO_MODEL,
}

_endpoint = ""


class AddOne(TritonModelHandler):
    """Takes and gives what Beam's fake does: a number, and the number after it."""

    def __init__(
        self,
        clock: Any = None,
        min_batch_size: int = 1,
        max_batch_size: int = 9999,
        multi_process_shared: bool = False,
        state: int | None = None,
        max_copies: int = 1,
        num_bytes_per_element: int | None = None,
        model_id: str = "fake_model_id_default",
        **options: Any,
    ) -> None:
        assert state in (None, 200)
        super().__init__(_endpoint, model_id if state is None else "two_hundred", **options)
        self._clock = clock
        self._sizes = {"min_batch_size": min_batch_size, "max_batch_size": max_batch_size}
        self._shared = multi_process_shared
        self._copies = max_copies
        self._element_bytes = num_bytes_per_element

    def load_model(self) -> Any:
        if self._clock:
            self._clock.current_time_ns += 500_000_000
        return super().load_model()

    def run_inference(self, batch: Sequence[Any], model: Any, inference_args: Any = None) -> Any:
        if self._clock:
            self._clock.current_time_ns += 3_000_000
        results = super().run_inference([[example] for example in batch], model, inference_args)
        return [self.as_fake(example, result) for example, result in zip(batch, results, strict=True)]

    def as_fake(self, example: Any, result: Any) -> Any:
        """A result as the fake gives it."""
        return int(result.inference["y"][0])

    def batch_elements_kwargs(self) -> Any:
        return self._sizes

    def share_model_across_processes(self) -> bool:
        return self._shared

    def model_copies(self) -> int:
        return self._copies

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        if self._element_bytes is None:
            return super().get_num_bytes(batch)
        return self._element_bytes * len(batch)


class AddOneWithModelId(AddOne):
    """Names the model that answered."""

    def as_fake(self, example: Any, result: Any) -> Any:
        name = result.model_id.split(":")[0]
        return PredictionResult(example, super().as_fake(example, result), name)


@pytest.fixture(scope="module", autouse=True)
def handlers_over_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global _endpoint
    repository = write_models(tmp_path_factory.mktemp("add_one"), [])
    model_ids = ("fake_model_id_default", "fake_model_id_1", "fake_model_id_2")
    for name, function in (("two_hundred", "two_hundred"), *((each, "add_one") for each in model_ids)):
        dataclasses.replace(
            CATALOGUE["double"],
            name=name,
            inputs=(Tensor("x", "INT64", (1,)),),
            outputs=(Tensor("y", "INT64", (1,)),),
            parameters={"function": function},
        ).write(repository)
    with throwaway_triton(repository) as server, pytest.MonkeyPatch.context() as patch:
        _endpoint = server.endpoint
        for name in ("FakeModelHandler", "FakeModelHandlerNoEnvVars"):
            patch.setattr(base_test, name, AddOne)
        patch.setattr(base_test, "FakeModelHandlerReturnsPredictionResult", AddOneWithModelId)
        # DirectRunner may try to download Prism first.
        patch.setattr(
            base_test, "TestPipeline", lambda runner=RUNNER, **options: TestPipeline(runner, **options)
        )
        yield
    # Beam keeps what it shares across processes for as long as the process lives.
    for model in list(_IN_PROCESS.values()):
        model.close()
    assert len(SESSIONS) == 0


def names() -> list[str]:
    """The tests that are run."""
    every = unittest.defaultTestLoader.getTestCaseNames(base_test.RunInferenceBaseTest)
    return [name for name in every if name not in UNFIT]


@pytest.mark.parametrize("name", names())
def test_beam_test_passes(name: str) -> None:
    """A test of Beam's passes with our handler."""
    base_test.RunInferenceBaseTest(name).debug()


def test_most_of_the_tests_are_run() -> None:
    """Beam has not renamed its tests, nor this list lost sight of them."""
    assert len(names()) >= 35
