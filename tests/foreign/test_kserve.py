"""KServe's Python server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest

from beam_triton import ModelSpec, TensorSpec, TritonInference
from tests.foreign.every_server import GOOD, ServerOfUnnamedInputs, values_of
from tests.foreign.servers import ForeignServer, kserve
from tests.support.pipelines import score


class TestKServe(ServerOfUnnamedInputs):
    start = staticmethod(kserve)
    text_output = "y"
    # KServe takes FP16 in binary only, and does not announce that it takes binary.
    options_for_fp16: ClassVar[Mapping[str, Any]] = {"binary": True}

    def test_half_precision_as_json_is_refused_with_the_servers_reason(self, server: ForeignServer) -> None:
        """What to do is in the message."""
        elements = [each.astype(np.float16) for each in GOOD[:2]]
        run = score(elements, TritonInference(server.endpoint, "half").with_exception_handling())
        assert len(run.failures) == 2
        assert "binary" in run.failures[0][1][1]

    def test_unnamed_inputs_are_described_by_the_elements(self, server: ForeignServer) -> None:
        """A model without metadata gets what a dict names; its elements are sent one at a time."""
        run = score(
            [{"x": each[None]} for each in GOOD[:2]],
            TritonInference(server.endpoint, "unnamed"),
        )
        assert sorted(result.inference["y"].tolist() for result in run.results) == [
            [[0, 0, 2, 0.5]],
            [[2, 1, 4, 0.5]],
        ]

    def test_inputs_may_be_named_by_a_model_spec(self, server: ForeignServer) -> None:
        """The tensors travel as the server takes them."""
        spec = ModelSpec("unnamed", inputs=(TensorSpec("x", "FP32", (4,)),), max_batch_size=8)
        run = score(GOOD, TritonInference(server.endpoint, "unnamed", model_spec=spec))
        assert values_of(run, "y") == [(2 * each).tolist() for each in GOOD]
        assert run.counters["requests"] == 1

    def test_binary_tensors_may_be_asked_for(self, server: ForeignServer) -> None:
        """KServe announces nothing, and reads binary tensors all the same."""
        run = score(GOOD, TritonInference(server.endpoint, "double", binary=True))
        assert values_of(run, "y") == [(2 * each).tolist() for each in GOOD]

    def test_a_version_is_refused_with_the_servers_reason(self, server: ForeignServer) -> None:
        """KServe has no versions, and says so."""
        with pytest.raises(Exception, match=r"(?i)version"):
            score(GOOD, TritonInference(server.endpoint, "double", model_version="2"))

    def test_an_element_with_a_batch_dimension_of_its_own(self, server: ForeignServer) -> None:
        """The error says that elements come without it."""
        run = score(
            [np.stack(GOOD[:2])], TritonInference(server.endpoint, "double").with_exception_handling()
        )
        assert len(run.failures) == 1
        assert "without the batch dimension" in run.failures[0][1][1]
