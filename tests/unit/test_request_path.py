"""The files that one request passes, traced: a reader has to know all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from apache_beam.transforms.window import GlobalWindows

import beam_triton
from beam_triton import ModelSpec, TensorSpec, TritonInferenceDoFn
from tests.support.answers import Answer, Request
from tests.support.fault_server import FaultServer

PACKAGE = Path(beam_triton.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"
SPEC = ModelSpec("m", "1", (TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (4,)),), 2)
MOST_FILES = 26


def answer(request: Request) -> Answer:
    """Two rows of zeros."""
    parameters = {"binary_data_size": 32}
    output = {"name": "y", "datatype": "FP32", "shape": [2, 4], "parameters": parameters}
    head = json.dumps({"model_name": "m", "model_version": "1", "outputs": [output]}).encode()
    return Answer(200, head + bytes(32), (("Inference-Header-Content-Length", str(len(head))),))


def score_bundle(dofn: TritonInferenceDoFn) -> list[Any]:
    """A full batch of two arrays: from the first element to the end of the bundle."""
    outputs: list[Any] = []
    for _ in range(2):
        element = GlobalWindows.windowed_value(np.zeros(4, np.float32))
        outputs += dofn.process(element.value, element) or ()
    outputs += dofn.finish_bundle()
    return outputs


def traced_files() -> list[str]:
    """The package's files in the order in which a request on a warm connection enters them."""
    files: dict[str, None] = {}

    def on_call(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files[path.relative_to(PACKAGE).as_posix()] = None

    with FaultServer(answer) as server:
        dofn = TritonInferenceDoFn(server.endpoint, "m", model_spec=SPEC)
        dofn.setup()
        try:
            dofn.start_bundle()
            score_bundle(dofn)
            dofn.start_bundle()
            sys.setprofile(on_call)
            try:
                outputs = score_bundle(dofn)
            finally:
                sys.setprofile(None)
            assert len(outputs) == 2
        finally:
            dofn.teardown()
    return list(files)


def test_a_request_passes_few_files_and_the_architecture_page_names_them() -> None:
    """No more than 26, each of them drawn on the page."""
    files = traced_files()
    assert 10 < len(files) <= MOST_FILES, files
    page = ARCHITECTURE.read_text(encoding="utf-8")
    assert [file for file in files if Path(file).name not in page] == []
