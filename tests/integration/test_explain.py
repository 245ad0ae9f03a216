"""What `explain` says of jobs that are slow for a known reason, and of some that are not.

Each job runs on a runner of Beam's against a real Triton, behind a real proxy where that is the reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.io.restriction_trackers import OffsetRange, OffsetRestrictionTracker
from apache_beam.transforms.core import RestrictionProvider

import beam_triton
from beam_triton import Explanation, TritonInference
from beam_triton.cli.main import main
from beam_triton.policy import diagnosis
from beam_triton.testing import LocalTriton
from benchmarks.delay_proxy import delayed
from tests.support.connection_proxy import ConnectionProxy
from tests.support.executions import port
from tests.support.models import write_models
from tests.support.nginx import Nginx
from tests.support.other_clients import busy_with_others
from tests.support.pipelines import RUNNER

X = np.ones(128, np.float32)
TWO_AT_A_TIME = "two_at_a_time"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A Triton with models of known times."""
    repository = write_models(tmp_path_factory.mktemp("models"), ["echo", "echo_variable", "attend"])
    write_models(repository, ["remote_like"], name=TWO_AT_A_TIME, instances=2)
    with LocalTriton(repository, stop_timeout_seconds=0.1) as triton:
        yield triton


def explained(
    elements: Sequence[Any], transform: Any, before: Callable[[Any], Any] = lambda element: element
) -> Explanation:
    """What is said of a job whose one bundle has these elements, each taken by ``before`` first."""
    numbers = beam.Create(range(len(elements)), reshuffle=False)
    return run(numbers, beam.Map(lambda index: before(elements[index])), transform)


def run(*steps: Any) -> Explanation:
    pipeline = beam.Pipeline(runner=RUNNER)
    values: Any = pipeline
    for number, step in enumerate(steps):
        values = values | f"Step {number}" >> step
    result = pipeline.run()
    result.wait_until_finish()
    said = beam_triton.explain(result.metrics())
    print(said)
    return said


class _Numbers(RestrictionProvider):
    def initial_restriction(self, element: int) -> OffsetRange:
        return OffsetRange(0, element)

    def create_tracker(self, restriction: OffsetRange) -> OffsetRestrictionTracker:
        return OffsetRestrictionTracker(restriction)

    def restriction_size(self, element: int, restriction: OffsetRange) -> int:
        return int(restriction.size())


_NUMBERS = beam.DoFn.RestrictionParam(_Numbers())


class Trickle(beam.DoFn):
    """A source that gives so many elements in bundles of two, as those of streams do."""

    def process(self, element: int, tracker: Any = _NUMBERS) -> Iterator[Any]:
        first = tracker.current_restriction().start
        for position in (first, first + 1):
            if not tracker.try_claim(position):
                return
            yield X
        tracker.defer_remainder()


def trickled(elements: int, transform: Any) -> Explanation:
    """What is said of a job whose bundles have two elements each."""
    trickle: Any = Trickle
    return run(beam.Create([elements], reshuffle=False), beam.ParDo(trickle()), transform)


def in_sixty_fours(endpoint: str, **options: Any) -> TritonInference:
    return TritonInference(endpoint, "echo", batching={"max_batch_size": 64}, **options)


def test_job_that_uses_its_server_fully_needs_no_change(server: LocalTriton) -> None:
    """Its requests are full, and keep the model's instances busy."""
    said = explained([X] * 16_000, TritonInference(server.endpoint, TWO_AT_A_TIME))
    assert said.advice is None, said
    assert "fully" in said.summary, said
    assert said.share(diagnosis.COMPUTING) > 0.3, said


def test_server_that_others_keep_busy_lacks_instances(server: LocalTriton) -> None:
    """The same job, beside sixteen requests of others: most of the time it waits in the queue."""
    with busy_with_others(server.endpoint, TWO_AT_A_TIME, requests=16):
        said = explained([X] * 4_000, TritonInference(server.endpoint, TWO_AT_A_TIME))
    assert said.advice is not None, said
    assert said.advice.setting == "instance_group", said
    assert said.share(diagnosis.QUEUE) > said.share(diagnosis.COMPUTING), said


def test_tiny_bundles_want_larger_ones(server: LocalTriton) -> None:
    """Two elements a bundle: each waits for a request of its own."""
    said = trickled(200, TritonInference(server.endpoint, TWO_AT_A_TIME))
    assert said.advice is not None, said
    assert said.advice.setting == "bundle size", said
    assert "2.0 elements" in said.advice.figure, said


def test_worker_bound_by_its_cpu_wants_more_workers(server: LocalTriton) -> None:
    """A step that computes for 0.3 ms an element is fused with the scoring of them."""

    def compute(x: Any) -> Any:
        end = time.thread_time() + 0.0003
        while time.thread_time() < end:
            pass
        return x

    scoring = in_sixty_fours(server.endpoint)
    said = explained([X] * 10_000, scoring, compute)
    assert said.advice is not None, said
    assert said.advice.setting == "worker processes", said
    assert said.share(diagnosis.BEAM) > 0.6, said


def test_step_that_waits_wants_a_reshuffle(server: LocalTriton) -> None:
    """A step that waits 1 ms an element, as for a service: more CPU would not help."""

    def wait(x: Any) -> Any:
        time.sleep(0.001)
        return x

    scoring = TritonInference(server.endpoint, "echo", batching={"max_batch_size": 16})
    said = explained([X] * 2_500, scoring, wait)
    assert said.advice is not None, said
    assert said.advice.setting == "beam.Reshuffle()", said


def test_slow_link_wants_compression_where_the_bytes_allow_it(server: LocalTriton) -> None:
    """4 MB/s; what is sent compresses to next to nothing."""
    with ConnectionProxy(port(server), bytes_per_second=4e6) as link:
        said = explained([X] * 20_000, in_sixty_fours(link.endpoint))
    assert said.advice is not None, said
    assert said.advice.setting == "compression", said
    assert said.share(diagnosis.NETWORK) > 0.6, said


def test_slow_link_wants_near_workers_where_the_bytes_do_not_compress(server: LocalTriton) -> None:
    """The same link, with random bytes."""
    noise = np.random.default_rng(7).integers(0, 2**32, (20_000, 128), dtype=np.uint32).view(np.float32)
    with ConnectionProxy(port(server), bytes_per_second=4e6) as link:
        said = explained(list(np.nan_to_num(noise)), in_sixty_fours(link.endpoint))
    assert said.advice is not None, said
    assert (said.advice.setting, said.advice.where) == ("region", "runner"), said
    assert "MB/s" in said.advice.figure, said


def test_far_server_wants_near_workers(server: LocalTriton) -> None:
    """30 ms away: bundles of one full request each wait for a round trip."""
    with delayed(server.endpoint, 0.03) as endpoint:
        said = trickled(200, TritonInference(endpoint, "echo", batching={"max_batch_size": 2}))
    assert said.advice is not None, said
    assert (said.advice.setting, said.advice.where) == ("region", "runner"), said
    assert "a round trip to the server takes 3" in said.advice.figure, said


def test_far_server_wants_more_requests_in_flight(server: LocalTriton) -> None:
    """30 ms away, as many requests as the job may have are in flight all the time."""
    with delayed(server.endpoint, 0.03) as endpoint:
        said = explained([X] * 10_000, in_sixty_fours(endpoint, max_concurrent_requests=2))
    assert said.advice is not None, said
    assert said.advice.setting == "max_concurrent_requests", said


def test_elements_of_many_lengths_want_buckets(server: LocalTriton) -> None:
    """Requests of equal lengths hold a few of the bundle's elements each."""
    drawn = np.random.default_rng(7).lognormal(np.log(100), 0.8, 60_000)
    ids = [np.ones(length, np.int64) for length in np.clip(drawn, 1, 2048).astype(int)]
    elements = [{"input_ids": each, "attention_mask": each} for each in ids]
    said = explained(elements, TritonInference(server.endpoint, "attend"))
    assert said.advice is not None, said
    assert said.advice.setting == "batching.bucket_boundaries", said


@pytest.mark.nginx
def test_proxy_that_compresses_should_not(server: LocalTriton) -> None:
    """It asks the server for gzip in the name of clients that did not."""
    elements = list(np.random.default_rng(7).standard_normal((40_000, 128), dtype=np.float32))
    with Nginx([port(server)], directives="proxy_set_header Accept-Encoding gzip;") as nginx:
        said = explained(elements, in_sixty_fours(nginx.endpoint))
    assert said.advice is not None, said
    assert (said.advice.setting, said.advice.where) == ("Accept-Encoding", "proxy"), said


@pytest.mark.nginx
def test_proxy_that_does_not_compress_needs_no_change(server: LocalTriton) -> None:
    """The same job behind the same proxy, on the model that is the limit."""
    with Nginx([port(server)]) as nginx:
        said = explained([X] * 16_000, TritonInference(nginx.endpoint, TWO_AT_A_TIME))
    assert said.advice is None, said


def full_of_small_requests(path: Path) -> str:
    """The file of a job whose requests of two elements keep the model's instances busy."""
    counters = {
        "bundles": 10,
        "bundle_microseconds": 100_000_000,
        "bundle_wait_microseconds": 90_000_000,
        "answer_microseconds": 90_000_000,
        "server_requests": 1_000,
        "server_requests_of_job": 1_000,
        "server_executions": 1_000,
        "server_microseconds": 88_000_000,
        "server_queue_microseconds": 40_000_000,
        "server_compute_microseconds": 48_000_000,
        "server_busy_microseconds": 48_000_000,
        "server_instance_microseconds": 50_000_000,
        "limited_batches": 10,
        "batch_limits": 640,
        "workers": 1,
    }
    distributions = {
        "batch_size": {"count": 1_000, "sum": 2_000, "min": 2, "max": 2},
        "request_latency_milliseconds": {"count": 1_000, "sum": 90_000, "min": 88, "max": 99},
    }
    path.write_text(json.dumps({"counters": counters, "distributions": distributions}))
    return str(path)


def test_command_asks_the_server_for_what_a_job_cannot_see(
    server: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it has dynamic batching."""
    path = full_of_small_requests(tmp_path / "metrics.json")
    assert main(["explain", path]) == 0
    assert "Nothing to change: the job uses its server fully" in capsys.readouterr().out
    assert main(["explain", path, "--endpoint", server.endpoint, "--model", TWO_AT_A_TIME]) == 0
    assert "Change: dynamic_batching (server)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--model", "echo"], ["--endpoint", "http://x:1"]])
def test_command_wants_endpoint_and_model_together(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, as for any wrong use."""
    assert main(["explain", full_of_small_requests(tmp_path / "metrics.json"), *arguments]) == 2
    assert "--endpoint and --model" in capsys.readouterr().err


def test_score_ends_with_an_explanation_and_keeps_the_metrics(
    server: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of rows; the command says the same of what ``--metrics`` has written."""
    rows, kept = tmp_path / "rows.jsonl", tmp_path / "metrics.json"
    rows.write_text("".join(json.dumps({"x": [0.5] * 128}) + "\n" for _ in range(6_000)))
    arguments = ["--files", str(rows), "--output", str(tmp_path / "results.jsonl"), "--metrics", str(kept)]
    arguments += ["--endpoint", server.endpoint, "--model", TWO_AT_A_TIME, "--progress_seconds", "0"]
    assert main(["score", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "where the time goes" in printed
    assert main(["explain", str(kept)]) == 0
    assert printed.endswith(f"\n\n{capsys.readouterr().out}")
