"""Writes Dataflow templates offline, and reads everything that was staged for them."""

from __future__ import annotations

import base64
import bz2
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apache_beam.portability.api import beam_runner_api_pb2

# Beam writes pickles as base64 of bzip2: this is how "BZh" begins.
_PICKLE = re.compile(rb"QlpoO[0-9A-Za-z+/]+={0,2}")

# A template is a set of files, so Dataflow is never called; nothing listens on the discard port.
OFFLINE = ("--no_auth", "--dataflow_endpoint=http://localhost:9")


@dataclass(frozen=True)
class Template:
    """A template and its staged files, in one folder."""

    folder: Path

    @property
    def job(self) -> dict[str, Any]:
        """The job as the Dataflow API receives it."""
        job: dict[str, Any] = json.loads((self.folder / "template.json").read_text())
        return job

    @property
    def worker_pool(self) -> dict[str, Any]:
        (pool,) = self.job["environment"]["workerPools"]
        assert isinstance(pool, dict)
        return pool

    @property
    def pipeline(self) -> beam_runner_api_pb2.Pipeline:
        """The graph that the workers run."""
        pipeline = beam_runner_api_pb2.Pipeline()
        pipeline.ParseFromString((self.folder / "pipeline.pb").read_bytes())
        return pipeline

    @property
    def package(self) -> Path:
        return self.folder / "workflow.tar.gz"

    def package_files(self) -> set[str]:
        """Paths in the package, without the top-level folder of the sdist."""
        with tarfile.open(self.package) as package:
            return {member.name.partition("/")[2] for member in package if member.isfile()}

    def pickles(self) -> Iterator[bytes]:
        """Beam's pickles in the graph, as base64."""
        yield from _PICKLE.findall((self.folder / "pipeline.pb").read_bytes())

    def staged_bytes(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of everything that leaves this machine: files, package members, pickles."""
        for file in self.folder.iterdir():
            yield file.name, file.read_bytes()
        with tarfile.open(self.package) as package:
            for member in package:
                content = package.extractfile(member)
                if content is not None:
                    yield member.name, content.read()
        for pickle in self.pickles():
            yield "a pickle", unpacked(pickle)


def unpacked(pickle: bytes) -> bytes:
    """The plain bytes of one of Beam's pickles."""
    whole = len(pickle) - len(pickle) % 4
    return bz2.BZ2Decompressor().decompress(base64.b64decode(pickle[:whole]))


def write_template(
    folder: Path, command: list[str], *, cwd: Path, environment: Mapping[str, str] | None = None
) -> Template:
    """Run a command that launches on Dataflow, with options that make it write a template instead.

    AssertionError with the command's output if it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = [
        *OFFLINE,
        f"--staging_location={folder}",
        f"--temp_location={folder}",
        f"--template_location={folder / 'template.json'}",
    ]
    done = subprocess.run(
        [*command, *options],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Template(folder)
