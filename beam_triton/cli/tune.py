"""``tune``: measures settings on the user's own server, recommends one, and says what to change there.

It measures this library's own dispatcher, which a general load generator cannot. `Search` chooses the
settings to try, `Load` measures one of them, `advice` reads what the server counted meanwhile, and `run`
prints what they find.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from beam_triton.cli import EXIT_OK, EXIT_PROBLEM
from beam_triton.cli.advice import ModelSettings, advice
from beam_triton.cli.arguments import (
    add_model,
    add_server,
    explained,
    given_options_of,
    options_of,
    shapes_of,
)
from beam_triton.cli.chart import check_chart, draw
from beam_triton.cli.load import Load, Measurement
from beam_triton.cli.pipeline_code import PipelineCode, example_of
from beam_triton.cli.sample import Sample, read_sample
from beam_triton.cli.search import Goal, Search
from beam_triton.cli.server_side import read_counts, utilization
from beam_triton.client import TritonClient
from beam_triton.errors import ConfigurationError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.protocol.text import printable
from beam_triton.remote_model import RemoteModel
from beam_triton.transport.config import ConnectionPoolConfig

# The given time is divided for this many settings; a search needs about half of them. At a rate only sizes
# are tried, and a p99 needs more time.
_SETTINGS, _SETTINGS_AT_RATE = 25, 8
_SHORTEST_SECONDS = 0.1
_WARM_UP_SHARE = 0.05
# Requests of this share of the largest batch show what small ones cost.
_SMALL_SHARE = 8
# Triton renews its metrics every two seconds: after twice that they are of the setting that is measured.
_METRICS_SECONDS = 4.0

# Of a line: a server may name its tensors as it likes.
_MOST_CHARACTERS = 1000

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s)")

_HEAD = f"{'elements':>10}{'requests':>10}{'elements':>12}{'requests':>10}{'latency, ms':>16}\n"
_HEAD += f"{'a request':>10}{'in flight':>10}{'a second':>12}{'a second':>10}{'p50':>8}{'p99':>8}"


def add_arguments(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="measure a model with many settings, and recommend one",
        description="Put a model under load with requests of zeros or of elements of yours, for a limited "
        "time, with different batch sizes and numbers of requests in flight. Print each measurement, the "
        "best setting as a pipeline in Python and in Beam YAML, and what to change on the server. Do not run "
        "it against a server that others are using.",
        epilog="Latencies are of requests, from when they are handed over, so that waiting for their turn "
        "counts; with --rate of elements, from when they arrive, whatever the server does meanwhile. "
        "The exit code is 1 where no setting works, keeps the limit or keeps up with the rate.",
    )
    add_server(parser)
    add_model(parser, required=True)
    parser.add_argument(
        "--p99",
        metavar="DURATION",
        help="limit of the latency that 99 %% stay below, such as 50ms or 1.5s (default: none)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="N",
        help="elements that arrive a second, at random: find the batch size with the lowest p99 (default: as "
        "many as the server takes)",
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="total time to measure (default: %(default)g)"
    )
    parser.add_argument(
        "--max-in-flight",
        type=int,
        default=64,
        metavar="N",
        help="largest number of requests in flight to try (default: %(default)d)",
    )
    parser.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help="largest number of elements per request to try (default: the model's limit)",
    )
    parser.add_argument(
        "--chart", metavar="FILE", help="draw the measurements: .svg, .png or .pdf (needs matplotlib)"
    )
    parser.add_argument(
        "--metrics-url",
        metavar="URL",
        help="the server's metrics, such as http://triton:8002/metrics: how busy its processors and GPU are",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Measure, print the measurements and recommend a setting; EXIT_PROBLEM if none reaches the goal.

    Raises:
        ConfigurationError: an argument makes no sense, or the model cannot be scored in batches.
        TritonError: the server does not answer, or does not have the model.
    """
    for name in ("seconds", "max_in_flight", "max_batch_size", "rate"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be a number above 0, not {value}")
    goal = Goal(_duration_seconds(given.p99), given.rate)
    if given.chart is not None:
        check_chart(given.chart)
    if given.metrics_url is not None:
        utilization(given.metrics_url)
    client_options, sample = options_of(given), read_sample(given.inputs, shapes_of(given))
    # The pool that users of the recommendation get by default.
    client_options["pool"] = ConnectionPoolConfig.for_requests(given.max_in_flight, given.timeout_seconds)
    options = InferenceOptions.from_options({"endpoint": given.endpoint, **client_options})
    with TritonClient.from_inference_options(options) as client:
        model = client.open_model(given.model)
        try:
            spec = model.spec
            if spec.decoupled or spec.sequence_batching:
                raise ConfigurationError(
                    f"model {given.model!r} is decoupled or batches sequences: it cannot be scored in batches"
                )
            largest = given.max_batch_size or _largest_batch(model, sample)
            largest = min(largest, max(1, spec.max_batch_size))
            title = f"{spec.model_id} at {options.urls[0]}"
            head = f"{title} for about {given.seconds:g} s, {sample.describe(spec)}"
            print(printable(head, _MOST_CHARACTERS))
            print(_HEAD, flush=True)
            counts = partial(read_counts, client, given.model, time.monotonic)
            session = _Session(Load(options, model, sample, counts), given, goal, largest)
            chosen = session.search()
            config = _config(client, given.model)
            if chosen is not None and config is not None and config.executes_alone:
                session.look_at_small_requests()
            measured = list(session.measured.values())
            if chosen is None:
                _print_failure(session.closest(), measured, goal)
            else:
                code = PipelineCode(
                    str(options.urls[0]),
                    given.model,
                    _recommended(given, chosen, spec.has_batch_dimension),
                    example_of(sample, spec),
                )
                _print_recommendation(chosen, goal, code)
                _print_advice(config, session, chosen)
            if given.chart is not None:
                draw(given.chart, title, measured, chosen, goal)
                print(f"\nChart: {given.chart}")
        finally:
            model.close()
    return EXIT_PROBLEM if chosen is None else EXIT_OK


class _Session:
    """The measurements of one call, within its time, each printed as it is made."""

    def __init__(self, load: Load, given: argparse.Namespace, goal: Goal, largest: int) -> None:
        self._load, self._given, self._goal = load, given, goal
        self._largest, self._most = largest, given.max_in_flight
        settings = _SETTINGS if goal.rate is None else _SETTINGS_AT_RATE
        self._seconds_each: float = max(_SHORTEST_SECONDS, given.seconds / settings)
        self._progress = _Progress(given.seconds)
        self._ends: float = time.monotonic() + given.seconds
        self._search = Search(self._measure, largest, self._most, self._may_go_on, goal)

    @property
    def measured(self) -> Mapping[tuple[int, int], Measurement]:
        return self._search.measured

    def closest(self) -> Measurement | None:
        return self._search.closest()

    def search(self) -> Measurement | None:
        self._progress.show("warming up")
        self._load.measure(self._largest, self._most, self._given.seconds * _WARM_UP_SHARE, ends_early=True)
        try:
            return self._search.run()
        finally:
            self._progress.clear()

    def look_at_small_requests(self) -> None:
        """What requests of one element cost, if there is time left and no small ones have been measured."""
        smallest = min(size for size, _ in self.measured)
        if smallest > max(1, self._largest // _SMALL_SHARE) and self._may_go_on():
            self._search.measured[1, self._most] = self._measure(1, self._most, True)
            self._progress.clear()

    def busy(self, chosen: Measurement) -> Mapping[str, float]:
        """How busy the server is with the chosen setting, where its metrics are known."""
        if self._given.metrics_url is None:
            return {}
        self._progress.show("reading the server's metrics")
        size, count, rate = chosen.batch_size, chosen.in_flight, self._goal.rate
        if rate is None:
            self._load.measure(size, count, _METRICS_SECONDS)
        else:
            self._load.measure_rate(size, count, _METRICS_SECONDS, rate)
        self._progress.clear()
        return utilization(self._given.metrics_url)

    def _may_go_on(self) -> bool:
        return time.monotonic() + self._seconds_each / 2 < self._ends

    def _measure(self, batch_size: int, in_flight: int, is_look: bool) -> Measurement:
        self._progress.show(f"batches of {batch_size:,}, {in_flight:,} in flight")
        found = self._measurement(batch_size, in_flight, self._seconds_each, is_look=is_look)
        self._progress.clear()
        print(_row(found, self._goal), flush=True)
        return found

    def _measurement(
        self, batch_size: int, in_flight: int, seconds: float, *, is_look: bool = False
    ) -> Measurement:
        if self._goal.rate is not None:
            return self._load.measure_rate(batch_size, in_flight, seconds, self._goal.rate)
        limit = self._goal.p99_seconds
        # Where there is a limit the slowest answers count, of which there are few.
        ends_early = is_look or math.isinf(limit)
        return self._load.measure(batch_size, in_flight, seconds, ends_early=ends_early, p99_seconds=limit)


class _Progress:
    """What is going on, on standard error: one line that is written over where somebody looks at it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        text = f"{time.monotonic() - self._started:.0f} of {self._seconds:.0f} s: {text}"
        print(f"\r\x1b[K{text}" if self._is_terminal else text, end="", file=sys.stderr)
        print("", end="" if self._is_terminal else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _duration_seconds(text: str | None) -> float:
    if text is None:
        return math.inf
    found = _DURATION.fullmatch(text.strip())
    seconds = 0.0 if found is None else float(found[1]) / (1000 if found[2] == "ms" else 1)
    if not seconds > 0:
        raise ConfigurationError(f"--p99 {text!r}: give a time with its unit, such as 50ms or 1.5s")
    return seconds


def _row(found: Measurement, goal: Goal) -> str:
    row = (
        f"{found.batch_size:>10,}{found.in_flight:>10,}{found.elements_per_second:>12,.0f}"
        f"{found.requests_per_second:>10,.0f}{found.latency_seconds(0.5) * 1000:>8.1f}"
        f"{found.latency_seconds(0.99) * 1000:>8.1f}"
    )
    if found.first_error is not None:
        row += f"  failed: {found.first_error.message}"
    elif not found.keeps_up:
        row += "  does not keep up"
    elif not goal.keeps_limit(found):
        row += "  too slow"
    return row


def _largest_batch(model: RemoteModel, sample: Sample) -> int:
    """The number of elements that the default of ``max_batch_bytes`` allows in a request."""
    nbytes = sample.request(model, 1).content_length
    return max(1, BatchingPolicy().max_batch_bytes // nbytes)


def _recommended(given: argparse.Namespace, chosen: Measurement, has_batches: bool) -> dict[str, Any]:
    options = given_options_of(given)
    if has_batches:
        # Given for a model without a batch dimension, the option would make one of its first dimension.
        options["batching"] = {**options.get("batching", {}), "max_batch_size": chosen.batch_size}
    return {**options, "max_concurrent_requests": chosen.in_flight}


def _print_recommendation(chosen: Measurement, goal: Goal, code: PipelineCode) -> None:
    p99 = f"{chosen.latency_seconds(0.99) * 1000:,.1f} ms"
    reached = f"{chosen.elements_per_second:,.0f} elements a second"
    if goal.rate is not None:
        reached = f"{goal.rate:,g} elements a second with a p99 of {p99}"
    elif not math.isinf(goal.p99_seconds):
        reached += f" with a p99 of {p99}"
    print(f"\nRecommended, for {reached}:\n\n# In Python\n{code.python()}")
    print(f"# In Beam YAML: python -m apache_beam.yaml.main --yaml_pipeline_file=FILE\n{code.yaml()}")
    print(
        "No setting within 5 % of the best has fewer elements in flight. This was one process: several\n"
        "processes share the server by themselves, below max_concurrent_requests each."
    )


def _config(client: TritonClient, model_name: str) -> ModelSettings | None:
    try:
        return ModelSettings.of(client.model_config(model_name))
    except TritonError:
        return None


def _print_advice(config: ModelSettings | None, session: _Session, chosen: Measurement) -> None:
    measured = list(session.measured.values())
    if config is None or all(each.server is None for each in measured):
        print(
            "\nOn the server: it shows no configuration or no statistics of the model, so nothing is advised."
        )
        return
    found = advice(config, measured, chosen, session.busy(chosen))
    if not found:
        print("\nOn the server: what was measured gives no reason to change anything.")
        return
    print("\nOn the server:")
    for sentence in found:
        print(f"- {sentence}")


def _print_failure(closest: Measurement | None, measured: list[Measurement], goal: Goal) -> None:
    error = next((each.first_error for each in measured if each.first_error is not None), None)
    if closest is None:
        print("\nNo setting worked" + (f": {explained(error)}" if error is not None else "."))
        return
    setting = f"with {closest.batch_size:,} elements a request and {closest.in_flight:,} in flight"
    if not closest.keeps_up:
        print(
            f"\nNo setting keeps up with {goal.rate:,g} elements a second: the most were "
            f"{closest.elements_per_second:,.0f}, {setting}."
        )
    else:
        print(
            f"\nNo setting keeps the p99 within {goal.p99_seconds * 1000:,g} ms: the lowest was "
            f"{closest.latency_seconds(0.99) * 1000:,.1f} ms, {setting}."
        )
