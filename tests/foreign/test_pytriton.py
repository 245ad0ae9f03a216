"""PyTriton's own binding: functions on a Triton that it starts."""

from __future__ import annotations

import numpy as np
import pytest

from beam_triton import InferenceError, TritonClient, TritonInference
from tests.foreign.every_server import GOOD, EveryServer, printed_by
from tests.foreign.servers import ForeignServer, pytriton
from tests.support.pipelines import score


class TestPyTriton(EveryServer):
    start = staticmethod(pytriton)
    # It is a Triton: the configuration says how large a batch may be.
    reports_batch_limits = True
    # PyTriton asks for a token of its own where its Triton lists models.
    lists_models = False
    # NumPy's bytes are uppercased, which leaves what is beyond ASCII as it is.
    text_is_unicode = False

    def model_id(self, model: str) -> str:
        return f"{model}:1"

    def test_the_reason_at_the_end_of_a_long_traceback_is_kept(self, server: ForeignServer) -> None:
        """PyTriton answers with a traceback of more than a thousand characters, whose last line says why."""
        with TritonClient(server.endpoint) as client, pytest.raises(InferenceError) as caught:
            client.infer("double", {"x": np.full((1, 4), -1, np.float32)})
        assert "ValueError: negative numbers are not taken: -1.0" in str(caught.value)
        assert "Traceback" in str(caught.value)

    def test_optional_inputs(self, server: ForeignServer) -> None:
        """Elements with and without it are sent in requests of their own."""
        added = np.full(4, 10, np.float32)
        run = score(
            [{"x": GOOD[0]}, {"x": GOOD[1], "added": added}, {"x": GOOD[2]}],
            TritonInference(server.endpoint, "add_if_given"),
        )
        assert sorted(result.inference["y"].tolist() for result in run.results) == sorted(
            each.tolist() for each in (GOOD[0], GOOD[1] + 10, GOOD[2])
        )

    @pytest.mark.parametrize("shape", [[], ["--shape", "added=4"]])
    def test_check_sends_optional_inputs_where_they_are_named(
        self, server: ForeignServer, shape: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = printed_by(["check", server.endpoint, "--model", "add_if_given", *shape], 0, capsys)
        assert ("added FP32 [4]" in text.partition("round trip")[2]) == bool(shape)
