"""The options of the embeddings, and what they write into artifacts."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
import pytest
from apache_beam.ml.rag.embeddings.base import create_rag_adapter
from apache_beam.ml.transforms.base import MLTransform

from beam_triton import (
    ConfigurationError,
    ModelSpec,
    TensorSpec,
    TritonImageEmbeddings,
    TritonTextEmbeddings,
)
from beam_triton.testing import FakeModel, FakeTriton
from tests.support.pipelines import release_the_last_model

_MODEL = ModelSpec("m", inputs=(TensorSpec("text", "BYTES", (1,)),), max_batch_size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "text"}, r"list of column names, such as \['text'\], not 'text'"),
        ({"columns": []}, "list of column names"),
        ({"columns": ["text"], "type_adapter": create_rag_adapter()}, "not both"),
        ({"preprocess": "tokenizer"}, "preprocess must be a function"),
        ({"output": "a", "outputs": ["a"]}, "leave outputs out"),
        ({"max_batch_size": 0}, "max_batch_size must be a whole number"),
        ({"inference_args": {"a": [1]}}, "a"),
        ({"timeouts": 1}, "did you mean 'timeout_seconds'"),
        ({"preproces": len}, "Embeddings has no option 'preproces' .did you mean 'preprocess'"),
        ({"inputs": {"text": "body"}}, "input names the model's input"),
    ],
)
@pytest.mark.parametrize("kind", [TritonTextEmbeddings, TritonImageEmbeddings])
def test_options_are_checked_at_construction(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kind("http://any", "m", **{"columns": ["text"], **options})


@pytest.mark.parametrize(
    "options",
    [{"auth_token": "hunter2"}, {"headers": {"X-Api-Key": "hunter2"}}],
    ids=["auth_token", "header"],
)
def test_artifacts_hold_no_secret(tmp_path: Any, options: dict[str, Any]) -> None:
    """A secret that is given itself is refused before anything is written; a reference is written."""
    given: dict[str, Any] = {"endpoint": "http://any", "model_name": "m", "columns": ["text"]}
    embeddings = TritonTextEmbeddings(**{**given, **options})
    with pytest.raises(ConfigurationError, match="would write into its artifacts") as caught:
        embeddings.get_ptransform_for_processing(artifact_location=str(tmp_path))
    assert "hunter2" not in str(caught.value)
    proxies = {"http": "env:PROXY", "https": None, "all": "http://proxy:3128"}
    headers = {"Accept": "*/*", "X-Api-Key": "file:/key"}
    referred = TritonTextEmbeddings(**given, auth_token="env:TOKEN", proxies=proxies, headers=headers)
    assert referred.get_ptransform_for_processing() is not None


def test_batch_sizes_are_those_of_the_arguments() -> None:
    """``min_batch_size`` and ``max_batch_size`` replace the sizes that the model's own would give."""

    def sizes(**given: Any) -> tuple[int, int]:
        embeddings = TritonTextEmbeddings("http://any", "m", columns=["text"], model_spec=_MODEL, **given)
        arguments = embeddings.get_model_handler().batch_elements_kwargs()
        return arguments["min_batch_size"], arguments["max_batch_size"]

    own = 8 * 32
    assert sizes() == (own, own)
    assert sizes(max_batch_size=5) == (5, 5)
    assert sizes(min_batch_size=2, max_batch_size=5) == (2, 5)
    assert sizes(min_batch_size=1000) == (1000, 1000)


def test_steps_are_named_by_their_columns() -> None:
    """So that two embeddings can follow one another in an MLTransform."""
    embeddings = TritonTextEmbeddings("http://any", "m", columns=["a", "b"])
    embed = embeddings.get_ptransform_for_processing()
    assert embed.default_label() == "TritonTextEmbeddings(a, b)"
    assert MLTransform(write_artifact_location="x").with_transform(embeddings) is not None
    assert embed.annotations()["model_handler"] == "TritonTextEmbeddings(http://any:80, 'm')"


def test_elements_that_are_no_chunks_need_columns(tmp_path: Any) -> None:
    """The error says so, and nothing about attributes."""
    model = FakeModel(
        lambda inputs: {"y": inputs["text"] == b""},
        inputs={"text": ("BYTES", [1])},
        outputs={"y": ("BOOL", [1])},
    )
    with FakeTriton({"m": model}) as triton:
        embed = MLTransform(write_artifact_location=str(tmp_path)).with_transform(
            TritonTextEmbeddings(triton.endpoint, "m")
        )
        with (
            pytest.raises(Exception, match=r"a Chunk .*not of type dict: .* by columns=\["),
            beam.Pipeline() as pipeline,
        ):
            _ = pipeline | beam.Create([{"text": "a"}]) | embed
        release_the_last_model()
