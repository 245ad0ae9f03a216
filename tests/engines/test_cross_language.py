"""Pipelines in Java and Go whose rows are scored by this library, through Python's expansion service."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from engines import FlinkJobServer, install, tools
from engines.install import REPOSITORY
from engines.processes import Scope, accepts, free_ports, tail
from pipelines.train_digits import DATA

ROWS = 200
TOO_SHORT = 7

JAVA_PIPELINE = REPOSITORY / "pipelines" / "ScoreRows.java"


@pytest.fixture
def scope(tmp_path: Path) -> Iterator[Scope]:
    with Scope(tmp_path) as scope:
        yield scope


@pytest.fixture
def expansion(scope: Scope) -> str:
    """The address of an expansion service that also runs the worker of what it has expanded."""
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    service = "apache_beam.runners.portability.expansion_service_main"
    command = [sys.executable, "-m", service, f"--port={port}", "--fully_qualified_name_glob=beam_triton.*"]
    worker = ["--serve_loopback_worker", "--environment_type=EXTERNAL", f"--environment_config={address}"]
    process = scope.start("expansion", [*command, *worker], environment={"PYTHONPATH": str(REPOSITORY)})
    scope.await_ready("expansion", process, lambda: accepts(port), within_seconds=60)
    return address


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Lines of id and image, one of them with too few pixels."""
    path = tmp_path / "digits.jsonl"
    with DATA.open(encoding="utf-8") as source, path.open("w", encoding="utf-8") as file:
        for number, digit in zip(range(ROWS), csv.DictReader(source), strict=False):
            image = json.loads(digit["image"])[: 5 if number == TOO_SHORT else None]
            file.write(json.dumps({"id": digit["id"], "image": image}) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_results(triton: LocalTriton, rows: Path, output: str, reason: str) -> None:
    """Every row has the label that the model gives without Beam; the short one is a failure."""
    good = read(rows)
    odd = good.pop(TOO_SHORT)
    with TritonClient(triton.endpoint) as client:
        answer = client.infer("digits", {"image": [row["image"] for row in good]}, outputs=["label"])
    expected = {row["id"]: int(label) for row, (label,) in zip(good, answer.outputs["label"], strict=True)}
    scored = read(Path(f"{output}-scored.jsonl"))
    assert len(scored) == len(expected)
    assert {row["id"]: row["label"] for row in scored} == expected
    (failed,) = read(Path(f"{output}-failed.jsonl"))
    assert failed["id"] == odd["id"]
    assert "takes FP32 of shape [64], not shape [5]" in failed[reason]


def test_a_java_pipeline_scores_rows_on_prism(
    scope: Scope, expansion: str, triton: LocalTriton, rows: Path, tmp_path: Path
) -> None:
    """Options are rows, a list and numbers; results and failures have schemas that Java reads."""
    classpath = f"{install.beam_java()}/*"
    compiler = tools.java().with_name("javac")
    subprocess.run([compiler, "-cp", classpath, "-d", tmp_path, JAVA_PIPELINE], check=True)
    job_port, worker_port = free_ports(2)
    options = [f"--job_port={job_port}", "--serve_http=false", "--idle_shutdown_timeout=-1s"]
    prism = scope.start("prism", [install.go_programs().prism, *options])
    scope.await_ready("prism", prism, lambda: accepts(job_port), within_seconds=30)
    output = str(tmp_path / "java")
    run_to_end(
        scope,
        "java",
        *(tools.java(), "-cp", f"{classpath}{os.pathsep}{tmp_path}", "ScoreRows"),
        *(f"--triton={triton.endpoint}", f"--expansion={expansion}", f"--files={rows}", f"--output={output}"),
        *("--runner=PortableRunner", f"--jobEndpoint=127.0.0.1:{job_port}"),
        # Java's own steps run in its process, which needs its address before Python's are expanded.
        *("--defaultEnvironmentType=LOOPBACK", f"--defaultEnvironmentConfig=127.0.0.1:{worker_port}"),
        # Otherwise all jars, for workers elsewhere.
        f"--filesToStage={rows}",
    )
    check_results(triton, rows, output, reason="msg")


def test_a_go_pipeline_scores_rows_on_flink(
    scope: Scope, expansion: str, triton: LocalTriton, rows: Path, tmp_path: Path
) -> None:
    """The same with options as structs, whose results are structs."""
    output = str(tmp_path / "go")
    with FlinkJobServer(tmp_path / "flink") as flink:
        run_to_end(
            scope,
            "go",
            install.go_programs().score_rows,
            *(f"--triton={triton.endpoint}", f"--expansion={expansion}"),
            *(f"--files={rows}", f"--output={output}"),
            *("--runner=universal", f"--endpoint={flink.endpoint}", "--environment_type=LOOPBACK"),
        )
    check_results(triton, rows, output, reason="reason")


def run_to_end(scope: Scope, name: str, *command: str | Path) -> None:
    """Run a pipeline. AssertionError with the end of its log if it fails."""
    process = scope.start(name, command)
    assert process.wait(timeout=90) == 0, tail(scope.log(name))
