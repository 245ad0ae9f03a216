"""``make flink-demo``: starts a Flink cluster and a Triton on this machine, and scores digits on them."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from beam_triton import TritonClient, TritonError
from beam_triton.testing import LocalTriton
from engines import FlinkCluster, install
from engines.digits_job import MODEL, MODELS, accuracy, digits_arguments, read_results
from engines.engine import PipelineRun
from engines.flink_rest import FlinkRest
from engines.processes import EngineError
from engines.tools import MissingToolsError

OUTPUT = install.REPOSITORY / "out" / "flink-demo" / "digits.jsonl"

_DIGITS = 898


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--keep_running",
        action="store_true",
        help="leave the cluster running after the job, until Enter is pressed",
    )
    arguments = parser.parse_args()
    try:
        install.require_all()
        _run(arguments.keep_running)
    except (EngineError, MissingToolsError, install.NotInstalledError, TritonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(keep_running: bool) -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="beam_triton_flink_") as folder, contextlib.ExitStack() as parts:
        with _step("Starting Triton with the digits model"):
            triton = parts.enter_context(LocalTriton(MODELS, stop_timeout_seconds=2))
        with _step("Starting a job manager and two task managers with two slots each"):
            cluster = parts.enter_context(FlinkCluster(Path(folder)))
        print(f"Flink's web page: {cluster.rest.url}   Triton: {triton.endpoint}", flush=True)
        with _step("Running the job: workers install the package, score the digits and write the results"):
            arguments = digits_arguments(triton.endpoint, OUTPUT)
            _follow(cluster.start_pipeline(*arguments), cluster, triton)
        _print_results()
        if keep_running and sys.stdin.isatty():
            input("Press Enter to stop everything. ")


def _follow(run: PipelineRun, cluster: FlinkCluster, triton: LocalTriton) -> None:
    """Print the job's progress whenever it changes, and once more when the job has ended."""
    last = ""
    with TritonClient(triton.endpoint) as client:
        has_ended = False
        while not has_ended:
            has_ended = run.process.poll() is not None
            line = progress(cluster.rest, client)
            if line != last:
                print(f"  {time.monotonic() - run.started:4.0f} s  {line}", flush=True)
                last = line
            if not has_ended:
                time.sleep(0.5)
    run.finish()


def progress(rest: FlinkRest, client: TritonClient) -> str:
    """The job's state according to Flink, and the number of digits that Triton has scored."""
    # A busy server may miss one answer; the exit code of the job's process decides whether the job failed.
    try:
        states = ", ".join(sorted(set(rest.job_states().values()))) or "being submitted"
        statistics = client.statistics(MODEL)["model_stats"][0]
    except (OSError, TritonError) as error:
        return f"progress unknown: {error}"
    return f"{states.lower()}, {statistics['inference_count']:,} of {_DIGITS} digits scored"


def _print_results() -> None:
    results = read_results(OUTPUT)
    print(f"{len(results)} digits scored, {accuracy(results):.1%} of them recognized; for example")
    for name, (label, predicted) in list(results.items())[:3]:
        print(f"  {name}: a {label}, recognized as a {predicted}")
    print(f"Results: {OUTPUT.relative_to(install.REPOSITORY)}")


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"{what} …", flush=True)
    started = time.monotonic()
    yield
    print(f"  done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
