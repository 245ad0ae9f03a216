"""``make flink-demo``: a Flink cluster and a Triton on this machine, and the digits scored on them."""

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
from engines import FlinkCluster, install, served
from engines.engine import PipelineRun
from engines.flink_rest import FlinkRest
from engines.jobs import accuracy, digits_arguments, read_digits
from engines.processes import EngineError
from engines.tools import MissingToolsError

OUTPUT = install.REPOSITORY / "out" / "flink-demo" / "digits.jsonl"

_MODELS = install.REPOSITORY / "pipelines" / "model_repository"
_TOTAL = 898


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--keep_running",
        action="store_true",
        help="leave the cluster up after the job, until Enter is pressed",
    )
    arguments = parser.parse_args()
    try:
        install.all_engines()
        _run(arguments.keep_running)
    except (EngineError, MissingToolsError, install.InstallError, TritonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(keep_running: bool) -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="beam_triton_flink_") as folder, contextlib.ExitStack() as parts:
        with _step("starting Triton with the digits model"):
            triton = parts.enter_context(LocalTriton(_MODELS, stop_timeout_seconds=2))
        with _step("starting a job manager and two task managers of two slots"):
            cluster = parts.enter_context(FlinkCluster(Path(folder)))
        print(f"Flink's page: {cluster.rest_url}   Triton: {triton.endpoint}", flush=True)
        with _step("the job: workers install the package, score the digits and write the results"):
            arguments = digits_arguments(triton.endpoint, OUTPUT)
            _watch(cluster.start_pipeline(*arguments), cluster, triton)
        _show()
        if keep_running and sys.stdin.isatty():
            input("Press Enter to stop everything. ")


def _watch(run: PipelineRun, cluster: FlinkCluster, triton: LocalTriton) -> None:
    """One line a change, the last one after the job: what Flink says of it, and what Triton has scored."""
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
    """How far the job is, as far as the job manager and Triton tell."""
    # A busy machine may keep an answer back: how the job ends is for its own process to say.
    try:
        states = ", ".join(sorted(set(rest.states().values()))) or "on its way to the cluster"
        statistics = client.statistics(served.DIGITS)["model_stats"][0]
    except (OSError, TritonError) as error:
        return f"cannot be seen just now: {error}"
    return f"{states.lower()}, {statistics['inference_count']:,} of {_TOTAL} digits scored"


def _show() -> None:
    results = read_digits(OUTPUT)
    print(f"{len(results)} digits scored, {accuracy(results):.1%} of them recognized; for example")
    for name, (meant, said) in list(results.items())[:3]:
        print(f"  {name}: a {meant}, taken for a {said}")
    print(f"results: {OUTPUT.relative_to(install.REPOSITORY)}")


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"{what} …", flush=True)
    started = time.monotonic()
    yield
    print(f"  done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
