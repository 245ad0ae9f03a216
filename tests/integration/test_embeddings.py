"""Embeddings for MLTransform and Beam's RAG on a real Triton, with a real model of texts."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Sequence  # noqa: UP035

import apache_beam as beam
import numpy as np
import pyarrow.parquet
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.ml.rag.types import Chunk, Content
from apache_beam.ml.transforms.base import EmbeddingTypeAdapter, MLTransform
from apache_beam.typehints.schemas import named_fields_from_element_type
from PIL import Image

from beam_triton import TritonImageEmbeddings, TritonTextEmbeddings
from beam_triton.testing import LocalTriton
from beam_triton.transport.session import SESSIONS
from pipelines import embed_documents
from tests.support.embedding_models import DIMENSIONS, wordllama_tokenizer, write_embedding_models
from tests.support.models import throwaway_triton, write_models
from tests.support.pipelines import Run, release_the_last_model, run, score

_PAGE = Path(__file__).parents[2] / "docs" / "embeddings.md"


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A server with embedding models, and some that are none."""
    repository = write_embedding_models(tmp_path_factory.mktemp("embedding_models"))
    write_models(repository, ["sum_and_difference", "transpose", "zeros", "shout", "optional_input"])
    with throwaway_triton(repository, startup_timeout_seconds=300) as server:
        yield server


@pytest.fixture(autouse=True)
def no_session_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing holds a session once Beam's last model is gone."""
    yield
    # Log records of errors hold tracebacks, whose frames hold the model.
    caplog.get_records("call").clear()
    release_the_last_model()
    assert len(SESSIONS) == 0


def embed(
    elements: list[Any], embeddings: Any, folder: Path, *, handling: dict[str, Any] | None = None
) -> Run:
    """Run ``MLTransform`` in write mode; with ``handling`` under these arguments of exception handling."""

    def build(pipeline: beam.Pipeline) -> Any:
        transform = MLTransform(write_artifact_location=str(folder)).with_transform(embeddings)
        if handling is not None:
            transform = transform.with_exception_handling(**handling)
        return pipeline | beam.Create(elements, reshuffle=False) | transform

    return run(build)


def cosine(a: list[float], b: list[float]) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


class Named(NamedTuple):
    text: str
    number: int


TEXTS = ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Interest rates rose sharply."]


def test_columns_become_vectors(triton: LocalTriton, tmp_path: Path) -> None:
    """Each named column becomes a list of floats, others stay, and near texts have near vectors."""
    rows = [beam.Row(id=n, title=text[:6], body=text) for n, text in enumerate(TEXTS)]
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["title", "body"])
    found = embed(rows, embeddings, tmp_path / "artifacts").results
    assert [row.id for row in found] == [0, 1, 2]
    cat, kitten, rates = (row.body for row in found)
    assert type(cat) is list and type(cat[0]) is float and len(cat) == len(found[0].title) == DIMENSIONS
    assert cosine(cat, kitten) > 0.3 > cosine(cat, rates)


def test_elements_are_dicts_rows_or_named_tuples_and_stay_unchanged(
    triton: LocalTriton, tmp_path: Path
) -> None:
    """Dicts stay dicts, named tuples become rows, and the elements that were given are not changed."""
    given: list[Any] = [{"text": TEXTS[0], "number": 1}, {"text": TEXTS[1], "more": 2}, Named(TEXTS[2], 3)]
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"])

    def build(pipeline: beam.Pipeline) -> dict[str, Any]:
        elements = pipeline | beam.Create(given, reshuffle=False)
        location = str(tmp_path / "artifacts")
        embedded = elements | MLTransform(write_artifact_location=location).with_transform(embeddings)
        return {"results": embedded, "originals": elements}

    outcome = run(build)
    first, second, row = outcome.results
    assert (first["number"], second["more"], len(second["text"])) == (1, 2, DIMENSIONS)
    assert (type(row), row.number, len(row.text)) == (beam.Row, 3, DIMENSIONS)
    assert [output.value for output in outcome.outputs["originals"]] == given


def test_the_output_has_a_schema(triton: LocalTriton, tmp_path: Path) -> None:
    """Rows with a schema come out with one: a transform behind needs none written by hand."""
    pipeline = beam.Pipeline()
    rows = pipeline | beam.Create([beam.Row(id=1, text="a")])
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"])
    embedded = rows | MLTransform(write_artifact_location=str(tmp_path / "a")).with_transform(embeddings)
    fields = dict(named_fields_from_element_type(embedded.element_type))
    assert fields["text"] == Sequence[np.float64]


def test_artifacts_restore_the_embeddings(triton: LocalTriton, tmp_path: Path) -> None:
    """A job that reads the artifacts embeds as the one that wrote them, its lambda included."""
    shouting = TritonTextEmbeddings(
        triton.endpoint,
        "wordllama",
        columns=["text"],
        preprocess=lambda texts: [text.upper() for text in texts],
        max_batch_size=2,
        retry={"max_retries": 3},
    )
    rows = [beam.Row(text=text) for text in TEXTS]
    written = embed(rows, shouting, tmp_path / "artifacts").results
    read = run(
        lambda pipeline: (
            pipeline
            | beam.Create(rows, reshuffle=False)
            | MLTransform(read_artifact_location=str(tmp_path / "artifacts"))
        )
    ).results
    assert read == written
    plain = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"])
    assert embed(rows, plain, tmp_path / "plain").results != written


def test_token_ids_come_from_preprocess(triton: LocalTriton, tmp_path: Path) -> None:
    """A tokenizer feeds a model of token ids; names that the model does not have are left out."""
    tokenizer = wordllama_tokenizer()

    def tokenize(texts: list[str]) -> dict[str, Any]:
        tokens = tokenizer(texts)
        return {**tokens, "token_type_ids": [[0] * len(ids) for ids in tokens["input_ids"]]}

    rows = [beam.Row(text=text) for text in TEXTS]
    by_ids = TritonTextEmbeddings(triton.endpoint, "wordllama_tokens", columns=["text"], preprocess=tokenize)
    by_text = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"])
    found = embed(rows, by_ids, tmp_path / "ids")
    assert found.results == embed(rows, by_text, tmp_path / "text").results


def test_chunks_get_their_embeddings(triton: LocalTriton, tmp_path: Path) -> None:
    """Without columns the elements are chunks of Beam's RAG; those without text are dead letters alone."""
    chunks = [Chunk(Content(text=text), id=str(n)) for n, text in enumerate([TEXTS[0], "", TEXTS[1]])]
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama")
    outcome = embed(chunks, embeddings, tmp_path / "artifacts", handling={})
    assert [chunk.id for chunk in outcome.results] == ["0", "2"]
    assert len(outcome.results[0].embedding.dense_embedding) == DIMENSIONS
    (failure,) = outcome.failures
    assert failure.element.id == "1" and "text" in failure.msg
    assert "TritonTextEmbeddings" in failure.transform_name


def test_a_type_adapter_takes_other_elements(triton: LocalTriton, tmp_path: Path) -> None:
    """Elements of any type are embedded by Beam's adapter, several texts each if it gives several."""
    adapter: Any = EmbeddingTypeAdapter(
        input_fn=lambda pairs: [text for pair in pairs for text in pair],
        output_fn=lambda pairs, vectors: [(pairs[0], cosine(*vectors))],
    )
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", type_adapter=adapter)
    results = embed([(TEXTS[0], TEXTS[0]), (TEXTS[0], TEXTS[2])], embeddings, tmp_path / "a").results
    assert results[0][1] == pytest.approx(1.0) and results[1][1] < 0.3


def test_a_failed_element_is_a_dead_letter_alone(triton: LocalTriton, tmp_path: Path) -> None:
    """What the server refuses, and what is no text, leaves alone and says its column."""
    texts: list[Any] = [*TEXTS, b"\xff", None]
    rows = [beam.Row(id=n, title="a title", body=text) for n, text in enumerate(texts)]
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["title", "body"])
    outcome = embed(rows, embeddings, tmp_path / "a", handling={})
    assert sorted(row.id for row in outcome.results) == [0, 1, 2]
    reasons = {failure.element.id: failure.msg for failure in outcome.failures}
    assert reasons[3].startswith("column 'body': ") and "not UTF-8" in reasons[3]
    assert "column 'body': a text is expected, not None" in reasons[4]


def test_without_exception_handling_the_error_names_element_and_column(
    triton: LocalTriton, tmp_path: Path
) -> None:
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"])
    with pytest.raises(Exception, match="of its batch: column 'text': a text is expected, not 5"):
        embed([{"text": 5}], embeddings, tmp_path / "a")


def test_exception_handling_keeps_its_arguments(triton: LocalTriton, tmp_path: Path) -> None:
    """``exc_class`` and ``threshold`` mean what they mean for every other transform."""
    rows = [{"text": "a"}, {"text": None}, {"text": None}]
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"])
    with pytest.raises(Exception, match="a text is expected"):
        embed(rows, embeddings, tmp_path / "a", handling={"exc_class": ConnectionError})
    with pytest.raises(Exception, match="2 of 3 elements failed"):
        embed(rows, embeddings, tmp_path / "b", handling={"threshold": 0.5})
    kept = embed(rows, embeddings, tmp_path / "c", handling={"threshold": 0.7})
    assert len(kept.failures) == 2


def test_a_value_that_preprocess_cannot_take_fails_alone(triton: LocalTriton, tmp_path: Path) -> None:
    def checked(texts: list[str]) -> list[str]:
        if any(text == "bad" for text in texts):
            raise ValueError("bad text")
        return texts

    rows = [beam.Row(text=text) for text in ("a", "bad", "c")]
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"], preprocess=checked)
    outcome = embed(rows, embeddings, tmp_path / "a", handling={})
    assert len(outcome.results) == 2
    assert outcome.failures[0].msg == "column 'text': preprocess failed: ValueError: bad text"
    assert "in checked" in outcome.failures[0].stack


def test_the_bare_handler_gives_vectors(triton: LocalTriton) -> None:
    """``get_model_handler`` is for RunInference over the values themselves; inference_args are sent."""
    embeddings = TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["text"], inference_args={"a": 1})
    results = score(TEXTS, RunInference(embeddings.get_model_handler())).results
    assert [len(vector) for vector in results] == [DIMENSIONS] * 3


def test_default_value_stands_in_for_a_failed_vector(triton: LocalTriton, tmp_path: Path) -> None:
    embeddings = TritonTextEmbeddings(
        triton.endpoint, "wordllama", columns=["text"], default_value=np.zeros(DIMENSIONS, np.float32)
    )
    rows = [{"text": b"\xff"}, {"text": "a"}]
    found = embed(rows, embeddings, tmp_path / "a").results
    assert found[0]["text"] == [0.0] * DIMENSIONS != found[1]["text"]


@pytest.mark.parametrize(
    ("model_name", "options", "message"),
    [
        ("wordllama_tokens", {}, "2 inputs: give preprocess"),
        ("wordllama_tokens", {"input": "input_ids"}, "input_ids INT64 .* takes no text: give preprocess"),
        ("wordllama", {"input": "words"}, "no input 'words': name one of them"),
        ("shout", {}, "2 outputs: name the one with the vectors by output="),
        ("shout", {"output": "loud"}, "'loud' holds object, and a vector holds numbers"),
        ("transpose", {"preprocess": len}, r"y FP32 \[-1, -1\] is no vector for each element"),
    ],
)
def test_a_model_that_does_not_fit_says_why(
    triton: LocalTriton, tmp_path: Path, model_name: str, options: dict[str, Any], message: str
) -> None:
    embeddings = TritonTextEmbeddings(triton.endpoint, model_name, columns=["text"], **options)
    with pytest.raises(Exception, match=message):
        embed([{"text": "a"}], embeddings, tmp_path / "a")


def test_an_empty_vector_is_an_error_with_its_shape(triton: LocalTriton, tmp_path: Path) -> None:
    embeddings = TritonTextEmbeddings(
        triton.endpoint, "zeros", columns=["text"], preprocess=lambda texts: [[0] for _ in texts]
    )
    with pytest.raises(Exception, match=r"column 'text': output 'y' has the shape \[0\]"):
        embed([{"text": "a"}], embeddings, tmp_path / "a")


def picture(color: tuple[int, int, int], size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_images_are_files_paths_pictures_or_arrays(triton: LocalTriton, tmp_path: Path) -> None:
    """For an input of numbers all forms of an image make the same array; a broken file fails alone."""
    image = picture((255, 0, 0))
    path = tmp_path / "red.png"
    path.write_bytes(png(image))
    forms = [png(image), str(path), image, np.asarray(image), image.convert("P"), b"no image"]
    embeddings = TritonImageEmbeddings(triton.endpoint, "color_histogram", columns=["image"])
    rows = [{"id": n, "image": form} for n, form in enumerate(forms)]
    outcome = embed(rows, embeddings, tmp_path / "a", handling={})
    vectors = [row["image"] for row in outcome.results]
    assert len(vectors) == 5 and all(vector == vectors[0] for vector in vectors)
    assert len(vectors[0]) == 64 and max(vectors[0]) == 1.0
    (failure,) = outcome.failures
    assert failure.element["id"] == 5 and "column 'image': UnidentifiedImageError" in failure.msg


def test_a_model_of_files_gets_files(triton: LocalTriton, tmp_path: Path) -> None:
    """An input of BYTES gets the file's bytes, and PNG of a picture; an array is refused."""
    image = picture((1, 2, 3))
    embeddings = TritonImageEmbeddings(triton.endpoint, "byte_histogram", columns=["image"])
    rows = [{"image": png(image)}, {"image": image}, {"image": np.asarray(image)}]
    outcome = embed(rows, embeddings, tmp_path / "a", handling={})
    assert outcome.results[0] == outcome.results[1]
    assert sum(outcome.results[0]["image"]) == len(png(image))
    assert "takes the bytes of an image file, not a value of type ndarray" in outcome.failures[0].msg


@pytest.mark.skipif(not hasattr(Chunk, "from_image"), reason="this Beam's chunks hold no images")
def test_images_of_rag_are_bytes_or_paths(triton: LocalTriton, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(png(picture((255, 0, 0))))
    items = [Chunk.from_image(str(path)), Chunk.from_image(path.read_bytes()), Chunk.from_text("no image")]
    outcome = embed(
        items, TritonImageEmbeddings(triton.endpoint, "color_histogram"), tmp_path / "a", handling={}
    )
    first, second = (item.embedding.dense_embedding for item in outcome.results)
    assert first == second and len(first) == 64
    assert "holds no image" in outcome.failures[0].msg


def test_texts_and_images_of_one_element(triton: LocalTriton, tmp_path: Path) -> None:
    """Two embeddings follow one another in an MLTransform, each for its columns."""
    transforms: list[Any] = [
        TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["caption"]),
        TritonTextEmbeddings(triton.endpoint, "wordllama", columns=["alt"]),
        TritonImageEmbeddings(triton.endpoint, "color_histogram", columns=["image"]),
    ]
    rows = [{"caption": "red", "alt": "a red square", "image": png(picture((255, 0, 0)))}]
    transform: Any = MLTransform(write_artifact_location=str(tmp_path / "a"), transforms=transforms)
    (found,) = score(rows, transform).results
    assert [len(found[name]) for name in ("caption", "alt", "image")] == [DIMENSIONS, DIMENSIONS, 64]


def test_documents_become_files_of_vectors(triton: LocalTriton, tmp_path: Path) -> None:
    """The example: a query embedded from its artifacts finds the document that answers it."""
    documents = {
        "cats": "The kitten naps on a couch and dreams of mice. " * 20,
        "rates": "The central bank raised interest rates to slow inflation. " * 20,
        "bread": "Knead the dough, let it rise, then bake the loaf in a hot oven. " * 20,
    }
    for name, text in documents.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "query.md").write_text("How do I make a loaf of sourdough?")
    artifacts = str(tmp_path / "artifacts")
    embed_documents.main(
        [
            *("--endpoint", triton.endpoint, "--model", "wordllama", "--write_artifacts", artifacts),
            *("--documents", str(tmp_path / "*.txt"), "--output", str(tmp_path / "vectors")),
            "--runner=FnApiRunner",
        ]
    )
    embed_documents.main(
        [
            *("--read_artifacts", artifacts, "--documents", str(tmp_path / "*.md")),
            *("--output", str(tmp_path / "queries"), "--runner=FnApiRunner"),
        ]
    )
    chunks = pyarrow.parquet.read_table(next(tmp_path.glob("vectors*.parquet"))).to_pylist()
    (query,) = pyarrow.parquet.read_table(next(tmp_path.glob("queries*.parquet"))).to_pylist()
    assert {Path(chunk["source"]).stem for chunk in chunks} == set(documents)
    assert chunks[0]["id"] == f"{chunks[0]['source']}#{chunks[0]['index']}"
    nearest = max(chunks, key=lambda chunk: cosine(chunk["vector"], query["vector"]))
    assert Path(nearest["source"]).stem == "bread"
    (failure,) = (tmp_path / "vectors-failures.jsonl").read_text().splitlines()
    assert json.loads(failure)["id"].endswith("empty.txt#0")


def test_the_page_of_embeddings_runs(triton: LocalTriton, tmp_path: Path) -> None:
    """Every example of docs/embeddings.md runs, in order."""
    (tmp_path / "red.png").write_bytes(png(picture((255, 0, 0))))
    names: dict[str, Any] = {
        "articles": [{"id": 1, "title": "Cats", "body": TEXTS[0]}, {"id": 2, "title": "None", "body": None}],
        "chunks": [Chunk(Content(text=text)) for text in TEXTS],
        "tokenizer": wordllama_tokenizer(),
        "photos": [{"photo": str(tmp_path / "red.png")}],
        "reviews": [beam.Row(id=1, comment="good"), beam.Row(id=2, comment="bad")],
    }
    blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        code = block.replace("http://triton:8000", triton.endpoint).replace("gs://bucket", str(tmp_path))
        exec(code.replace("beam.Pipeline()", "beam.Pipeline('FnApiRunner')"), names)
