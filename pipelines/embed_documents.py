"""Files of text are cut into chunks, embedded on a Triton server, and written with their vectors as Parquet.

    python pipelines/embed_documents.py --endpoint http://triton:8000 --model e5 \\
        --write_artifacts out/embedding --documents 'docs/*.md' --output out/vectors

The artifacts say which model made the vectors, so that queries meet the same one:

    python pipelines/embed_documents.py --read_artifacts out/embedding \\
        --documents queries.txt --output out/queries

A row of the output is a chunk: id, source, index, text, vector. Chunks that failed are in the file
``…-failures.jsonl``, with the reason. Other options are Beam's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import pyarrow
from apache_beam.io import fileio
from apache_beam.ml.rag.types import Chunk, Content
from apache_beam.ml.transforms.base import MLTransform
from apache_beam.options.pipeline_options import PipelineOptions

from beam_triton import TritonTextEmbeddings

_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("source", pyarrow.string()),
        ("index", pyarrow.int64()),
        ("text", pyarrow.string()),
        ("vector", pyarrow.list_(pyarrow.float32())),
    ]
)


def chunks_of(file: Any, words: int, overlap: int) -> Iterator[Chunk]:
    """Chunks of a file's text: ``words`` words each, of which ``overlap`` are the end of the chunk before."""
    path, found = file.metadata.path, file.read_utf8().split()
    for index, start in enumerate(range(0, max(1, len(found) - overlap), words - overlap)):
        text = " ".join(found[start : start + words])
        # The id is the same whenever a worker repeats this.
        yield Chunk(Content(text=text), id=f"{path}#{index}", index=index, metadata={"source": path})


def row_of(chunk: Chunk) -> dict[str, Any]:
    """A row of the output."""
    return {
        "id": chunk.id,
        "source": chunk.metadata["source"],
        "index": chunk.index,
        "text": chunk.content.text,
        "vector": chunk.dense_embedding,
    }


def failure_of(failure: Any) -> str:
    """A line of the file of failures."""
    return json.dumps({"id": failure.element.id, "reason": failure.msg})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--endpoint", help="URL of the server; needed with --write_artifacts")
    parser.add_argument("--model", help="the embedding model; needed with --write_artifacts")
    parser.add_argument("--documents", required=True, help="pattern of the text files")
    parser.add_argument("--output", required=True, help="prefix of the files that are written")
    artifacts = parser.add_mutually_exclusive_group(required=True)
    artifacts.add_argument("--write_artifacts", help="a new folder")
    artifacts.add_argument("--read_artifacts", help="the folder that an earlier run wrote")
    parser.add_argument("--words", type=int, default=120, help="words of a chunk (120)")
    parser.add_argument("--overlap", type=int, default=20, help="words that a chunk repeats (20)")
    options, others = parser.parse_known_args(arguments)
    if not 0 <= options.overlap < options.words:
        parser.error("--overlap must be 0 or more, and less than --words")
    embed: MLTransform[Any, Any]
    if options.read_artifacts:
        embed = MLTransform(read_artifact_location=options.read_artifacts)
    elif options.endpoint and options.model:
        embed = MLTransform(write_artifact_location=options.write_artifacts).with_transform(
            TritonTextEmbeddings(options.endpoint, options.model)
        )
    else:
        parser.error("--write_artifacts needs --endpoint and --model")
    with beam.Pipeline(options=PipelineOptions(others)) as pipeline:
        chunks = (
            pipeline
            | "Find" >> fileio.MatchFiles(options.documents)
            | "Read" >> fileio.ReadMatches()
            | "Chunk" >> beam.FlatMap(chunks_of, options.words, options.overlap)
        )
        embedded, failures = chunks | "Embed" >> embed.with_exception_handling()
        _ = (
            embedded
            | "Rows" >> beam.Map(row_of)
            | "Write" >> beam.io.WriteToParquet(options.output, _SCHEMA, file_name_suffix=".parquet")
        )
        _ = (
            failures
            | "Reasons" >> beam.Map(failure_of)
            | "WriteFailures"
            >> beam.io.WriteToText(f"{options.output}-failures", ".jsonl", shard_name_template="")
        )


if __name__ == "__main__":
    main(sys.argv[1:])
