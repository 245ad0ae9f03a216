"""``check``: what a server reports about itself and a model, and whether the model answers."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any

from beam_triton.cli import EXIT_OK, EXIT_PROBLEM
from beam_triton.cli.arguments import FLAGS, add_model, add_server, explained, options_of, shapes_of
from beam_triton.cli.check_warnings import (
    batching_warnings,
    compression_warnings,
    connection_warnings,
    shared_memory_warnings,
)
from beam_triton.cli.sample import Sample, read_sample
from beam_triton.client import TritonClient
from beam_triton.dispatch.dispatcher import Dispatcher
from beam_triton.errors import ConfigurationError, ModelNotFoundError, RemoteProtocolError, TritonError
from beam_triton.options import InferenceOptions
from beam_triton.protocol import EncodedRequest, InferResponse
from beam_triton.protocol.text import printable
from beam_triton.remote_model import RemoteModel
from beam_triton.transport.exchange import Exchange
from beam_triton.transport.response_head import ResponseHead

_ROUND_TRIPS = 5
# Of a line: servers may name themselves, their models and tensors as they like.
_MOST_CHARACTERS = 10_000


def add_arguments(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "check",
        help="check that the server is healthy and that the model answers",
        description="Show a server's health, extensions and models, what the library makes of a model and "
        "the options that change it, and send zeros or an element of yours to the model.",
        epilog="A PROBLEM keeps the model from being scored: the exit code is 1. A WARNING says what makes "
        "it slower than it could be, and what to set: the exit code is 0.",
    )
    add_server(parser)
    add_model(parser, required=False)
    FLAGS.add_to(parser, "batching_max_batch_size")
    parser.add_argument(
        "--idle-seconds",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="keep a connection idle for so long, and say whether it was closed (default: only what answers "
        "say about it)",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print what the server reports, then what was found; EXIT_PROBLEM if there are problems.

    Raises:
        ConfigurationError: an argument makes no sense.
    """
    if not given.idle_seconds >= 0:
        raise ConfigurationError(f"--idle-seconds must be 0 or more, not {given.idle_seconds}")
    sample = read_sample(given.inputs, shapes_of(given))
    options = InferenceOptions.from_options({"endpoint": given.endpoint, **options_of(given)})
    with TritonClient.from_inference_options(options) as client:
        check = _Check(client)
        if check.server(given.endpoint):
            check.warnings += connection_warnings(options, given.idle_seconds)
            check.warnings += shared_memory_warnings(options)
            if given.model is not None:
                check.model(given.model, sample, options)
    for warning in check.warnings:
        print(f"WARNING: {printable(warning, _MOST_CHARACTERS)}")
    for problem in check.problems:
        print(f"PROBLEM: {printable(problem, _MOST_CHARACTERS)}")
    if not check.problems:
        print("No problems found.")
    return EXIT_PROBLEM if check.problems else EXIT_OK


class _Check:
    """Prints what the server reports, and collects problems and warnings as sentences."""

    def __init__(self, client: TritonClient) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._client = client

    def server(self, endpoint: str) -> bool:
        """Check the server; False if it did not answer."""
        started = time.perf_counter()
        try:
            metadata = self._client.server_metadata()
        except ConfigurationError:
            raise
        except ModelNotFoundError:
            _say("server", "does not describe itself (GET /v2 is not there); its models do")
            self._models()
            return True
        except TritonError as error:
            self.problems.append(explained(error))
            return False
        milliseconds = (time.perf_counter() - started) * 1000
        name, version = metadata.get("name", "a server"), metadata.get("version", "of unknown version")
        _say("server", f"{name} {version}, answered in {milliseconds:.1f} ms (including the connection)")
        live, ready = self._client.is_server_live(), self._client.is_server_ready()
        _say("health", f"{'live' if live else 'NOT live'}, {'ready' if ready else 'NOT ready'}")
        if not live:
            self.problems.append("The server reports that it is not live: it is starting or shutting down.")
        elif not ready:
            self.problems.append("The server is live but not ready: a model is loading, or failed to load.")
        extensions = metadata.get("extensions") or []
        lines = [", ".join(map(str, extensions)) or "none"]
        if "binary_tensor_data" not in extensions:
            lines.append("no binary_tensor_data: tensors travel as JSON, which is slower, unless binary=True")
        if "model_configuration" not in extensions:
            lines.append("no model_configuration: batch limits are not reported, see the model's notes")
        _say("extensions", *lines)
        self._models()
        return True

    def _models(self) -> None:
        try:
            index = self._client.listed_models()
        except TritonError as error:
            _say("models", f"the server does not list its models ({error.message})")
            return
        lines = []
        for entry in sorted(index, key=lambda entry: str(entry.get("name"))):
            words = [entry.get("name"), entry.get("version"), entry.get("state") or "UNAVAILABLE"]
            reason = f": {entry['reason']}" if entry.get("reason") else ""
            lines.append(" ".join(str(word) for word in words if word) + reason)
        _say("models", *(lines or ["none"]))

    def model(self, model_name: str, sample: Sample, options: InferenceOptions) -> None:
        """Check a model, and send it the sample."""
        try:
            notes = self._client.model_findings(model_name).notes
            model = self._client.open_model(model_name)
        except ConfigurationError:
            raise
        except TritonError as error:
            self.problems.append(explained(error))
            return
        try:
            spec = model.spec
            _say("model", f"{spec.model_id}, {spec.describe_limit()}")
            for label, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
                _say(label, *([tensor.describe() for tensor in tensors] or ["not named by the server"]))
            _say("tensors", "binary" if model.encoder.binary else "JSON (binary=True sends them in binary)")
            _say("notes", *notes)
            if spec.decoupled or spec.sequence_batching:
                kind = "is decoupled" if spec.decoupled else "batches sequences"
                self.problems.append(
                    f"Model {model_name!r} {kind}: this library cannot score its elements in batches."
                )
                return
            self.warnings += batching_warnings(self._config(model_name), spec)
            self._round_trip(model, sample, options)
        finally:
            model.close()

    def _config(self, model_name: str) -> Mapping[str, Any]:
        try:
            return self._client.model_config(model_name)
        except TritonError:
            return {}

    def _round_trip(self, model: RemoteModel, sample: Sample, options: InferenceOptions) -> None:
        times = []
        try:
            request = sample.request(model, 1)
            for _ in range(_ROUND_TRIPS):
                started = time.perf_counter()
                response, head = _answer(model, request)
                times.append(time.perf_counter() - started)
        except ConfigurationError:
            raise
        except TritonError as error:
            what = sample.describe(model.spec)
            hint = "" if sample.elements else " Give other shapes with --shape, or an element with --inputs."
            self.problems.append(f"The model did not answer a request ({what}): {explained(error)}{hint}")
            return
        self.warnings += compression_warnings(head, options)
        missing = [output.name for output in model.spec.outputs if output.name not in response.outputs]
        if missing:
            _say("outputs", f"{', '.join(missing)}: not given unless outputs=[…] asks for them")
        came_back = ", ".join(f"{name} {list(array.shape)}" for name, array in response.outputs.items())
        milliseconds = statistics.median(times) * 1000
        _say(
            "round trip",
            f"{milliseconds:.1f} ms (median of {_ROUND_TRIPS} on an open connection)",
            f"sent one element, {sample.describe(model.spec)}; received: {came_back}",
        )
        if model.spec.has_batch_dimension:
            try:
                response.of_elements(model.spec, 1).rows(1)
            except RemoteProtocolError as error:
                self.problems.append(f"An element has no result of its own: {error.message}.")


def _answer(model: RemoteModel, request: EncodedRequest) -> tuple[InferResponse, ResponseHead]:
    """The model's answer, and the head that it came with."""
    heads: list[ResponseHead] = []

    def read(exchange: Exchange, **places: Any) -> InferResponse:
        assert exchange.head is not None
        heads.append(exchange.head)
        return model.read_response(exchange, **places)

    dispatcher: Dispatcher[None] = Dispatcher(model.channel)
    try:
        dispatcher.submit(None, model.http_request(request), read)
        dispatcher.drain()
        _, call = dispatcher.completed.popleft()
    finally:
        dispatcher.cancel()
    if call.error is not None:
        raise call.error
    return call.result, heads[-1]


def _say(label: str, *lines: str) -> None:
    for number, line in enumerate(lines):
        print(f"{'' if number else label:<12}{printable(line, _MOST_CHARACTERS)}", flush=True)
