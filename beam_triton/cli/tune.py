"""``tune``: measures settings on the user's own server, and says which to use."""

from __future__ import annotations

import argparse
import time
from typing import Any

from beam_triton.cli.arguments import add_model, add_server, explained, options_of, shapes_of
from beam_triton.cli.load import Load, Measurement
from beam_triton.cli.search import Search
from beam_triton.cli.zeros import describe_zeros, zeros_request
from beam_triton.client import TritonClient
from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.policy.batching import BatchingPolicy
from beam_triton.remote_model import RemoteModel
from beam_triton.transport.config import ConnectionPoolConfig

# So many settings fit into the time that is given; a search seldom needs more.
_SETTINGS = 20
_SHORTEST_SECONDS = 0.1
_WARM_UP_SHARE = 0.05

_HEAD = f"{'elements':>10}{'requests':>10}{'elements':>12}{'requests':>10}{'latency, ms':>16}\n"
_HEAD += f"{'a request':>10}{'in flight':>10}{'a second':>12}{'a second':>10}{'p50':>8}{'p99':>8}"


def add_arguments(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="measure the model with many settings, and say which to use",
        description="Put a model under load with requests of zeros, for a bounded time, in batches of "
        "different sizes and with different numbers of requests in flight. Not for a server that others "
        "are using at the time.",
    )
    add_server(parser)
    add_model(parser, required=True)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="how long to measure in all (default: %(default)g)"
    )
    parser.add_argument(
        "--max-in-flight",
        type=int,
        default=64,
        metavar="N",
        help="the most requests at a time to try (default: %(default)d)",
    )
    parser.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        help="the most elements a request to try (default: the model's limit)",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> bool:
    """Whether a setting was found that works.

    Raises:
        ConfigurationError: an argument makes no sense, or the model cannot be scored in batches.
        TritonError: the server or the model is not there.
    """
    for name in ("seconds", "max_in_flight", "max_batch_size"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be above 0, and is {value}")
    given_options, shapes = options_of(given), shapes_of(given)
    # The pool that its recommendation gets without asking for one.
    given_options["pool"] = ConnectionPoolConfig.for_requests(given.max_in_flight, given.timeout_seconds)
    options = InferenceOptions.from_options({"endpoint": given.endpoint, **given_options})
    with TritonClient.from_inference_options(options) as client:
        model = client.open_model(given.model)
        try:
            if model.spec.decoupled or model.spec.sequence_batching:
                raise ConfigurationError(
                    f"model {given.model!r} is decoupled or batches sequences: it is not scored in batches"
                )
            largest = given.max_batch_size or _largest_batch(model, shapes)
            largest = min(largest, max(1, model.spec.max_batch_size))
            zeros = describe_zeros(model.spec, shapes)
            print(f"{model.spec.model_id} at {options.urls[0]} for about {given.seconds:g} s, zeros: {zeros}")
            print(_HEAD, flush=True)
            chosen, measured = _search(Load(options, model, shapes), given, largest)
        finally:
            model.close()
    if chosen is None:
        error = next((each.first_error for each in measured if each.first_error is not None), None)
        print("No setting worked" + (f": {explained(error)}" if error is not None else "."))
        return False
    _recommend(chosen, given, options)
    return True


def _search(
    load: Load, given: argparse.Namespace, largest: int
) -> tuple[Measurement | None, list[Measurement]]:
    each_seconds = max(_SHORTEST_SECONDS, given.seconds / _SETTINGS)
    ends = time.monotonic() + given.seconds
    load.measure(largest, 1, given.seconds * _WARM_UP_SHARE)

    def measure(batch_size: int, in_flight: int) -> Measurement:
        found = load.measure(batch_size, in_flight, each_seconds)
        print(_row(found), flush=True)
        return found

    search = Search(
        measure, largest, given.max_in_flight, may_go_on=lambda: time.monotonic() + each_seconds / 2 < ends
    )
    return search.run(), list(search.measured.values())


def _row(found: Measurement) -> str:
    row = (
        f"{found.batch_size:>10,}{found.in_flight:>10,}{found.elements_per_second:>12,.0f}"
        f"{found.requests_per_second:>10,.0f}{found.latency_milliseconds(0.5):>8.1f}"
        f"{found.latency_milliseconds(0.99):>8.1f}"
    )
    if found.first_error is not None:
        row += f"  failed: {found.first_error.message}"
    return row


def _largest_batch(model: RemoteModel, shapes: dict[str, tuple[int, ...]]) -> int:
    """As many elements as the default of ``max_batch_bytes`` lets into a request."""
    nbytes = zeros_request(model, shapes, 1).content_length
    return max(1, BatchingPolicy().max_batch_bytes // nbytes)


def _recommend(chosen: Measurement, given: argparse.Namespace, options: InferenceOptions) -> None:
    print(
        f"\nUse, for {chosen.elements_per_second:,.0f} elements a second:\n\n"
        f'    TritonInference("{options.urls[0]}", "{given.model}",\n'
        f'                    batching={{"max_batch_size": {chosen.batch_size}}},\n'
        f"                    max_concurrent_requests={chosen.in_flight})\n\n"
        f"That is the fewest elements in flight within 5 % of the fastest, from this one process; where a\n"
        f"job has several processes on this server, each needs its share of max_concurrent_requests."
    )
