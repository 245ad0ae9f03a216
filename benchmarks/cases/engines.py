"""The same pipeline on every engine: elements per second, requests, batches and connections."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from beam_triton import TritonClient
from beam_triton.testing import LocalTriton
from benchmarks.cases.case import ELEMENTS, ELEMENTS_PER_SECOND, Case, CaseLeftOut, Scale, rates, take_turns
from benchmarks.cases.throughput import BATCH_SIZE
from benchmarks.peers import BEAM_TRITON, TRITONCLIENT_HTTP, WRK
from benchmarks.peers.peer import Peer, PeerMissing
from benchmarks.process import MeasurementError
from benchmarks.results import CaseResult, Figure, Row, ratios
from benchmarks.server import REMOTE_LIKE, target
from benchmarks.workload import Target, Throughput, Workload
from engines import DirectRunner, FlinkCluster, FlinkJobServer, Prism, install, tools
from engines.engine import Engine
from engines.processes import EngineError
from tests.support.sockets import client_ports

_SCRIPT = Path(__file__).resolve().parent.parent / "engine_pipeline.py"
_REQUESTS, _BATCH, _CONNECTIONS = "requests", "elements a request", "connections opened"
_CLUSTER = "Flink cluster"
_AT_ONCE = 16
_WRK = f"{WRK.name} -c{_AT_ONCE}"


@dataclass(frozen=True)
class _Place:
    """An engine, the number of bundles it runs at a time, and further arguments of its pipeline."""

    name: str
    slots: int
    start: Callable[[Path], Engine]
    arguments: Sequence[str] = ()


PLACES = (
    _Place("DirectRunner, in_memory", 1, DirectRunner),
    _Place("DirectRunner, multi_threading x 2", 2, partial(DirectRunner, mode="multi_threading", workers=2)),
    _Place(
        "DirectRunner, multi_processing x 2", 2, partial(DirectRunner, mode="multi_processing", workers=2)
    ),
    _Place("Prism, worker process", 1, partial(Prism, worker_processes=True)),
    _Place("Flink, embedded", 2, FlinkJobServer),
    _Place(_CLUSTER, 4, FlinkCluster),
    # Flink limits a bundle to 1,000 of its own elements; with blocks of one, these are the digits.
    _Place(f"{_CLUSTER}, streaming", 4, FlinkCluster, ("--streaming", "--block_elements=1")),
)


@dataclass(frozen=True)
class EngineRun:
    """A job's rate, and the requests and connections that the server counted."""

    throughput: Throughput
    requests: int
    connections: int


def _engines(server: LocalTriton, rounds: int, scale: Scale) -> CaseResult:
    """Start each engine once and let the peers take turns on it."""
    try:
        install.install_all()
    except tools.MissingToolsError as missing:
        raise CaseLeftOut(str(missing)) from None
    except install.InstallError as error:
        raise MeasurementError(str(error)) from error
    served = target(server, REMOTE_LIKE)
    runs: dict[str, list[EngineRun]] = {}
    for place in PLACES:
        elements: dict[Peer, int] = {
            BEAM_TRITON: scale.count(200_000, least=2_000),
            TRITONCLIENT_HTTP: scale.count(20_000 * place.slots, least=1_000),
        }
        runs |= _measured(place, served, rounds, elements)
    rows = [_row(name, taken) for name, taken in runs.items()]
    rates_by_name = {name: rates([run.throughput for run in taken]) for name, taken in runs.items()}
    notes = [
        "digits padded to the model's 128 values; seconds from the first element made to the last result",
        f"{TRITONCLIENT_HTTP.name} scores fewer elements, 20,000 per slot: its rate does not depend on it",
    ]
    load = Workload(
        served, 1, batch_size=BATCH_SIZE, load_connections=_AT_ONCE, load_seconds=scale.seconds(5)
    )
    try:
        WRK.check_installed()
        rates_by_name[_WRK] = rates(take_turns(rounds, {_WRK: partial(WRK.score, load)})[_WRK])
        rows.append(Row.of(_WRK, {ELEMENTS_PER_SECOND: rates_by_name[_WRK]}))
    except PeerMissing as missing:
        notes.append(f"left out: {missing}")
    reached = _reached(rates_by_name)
    notes += [f"{_CLUSTER}: elements/s relative to {name}: {each:.2f}" for name, (each, _) in reached.items()]
    figure = Figure(
        f"{_CLUSTER}: elements/s relative to "
        + " or ".join(f"{enough:g} x {name}" for name, (_, enough) in reached.items()),
        "at least",
        1,
        max(times / enough for times, enough in reached.values()),
    )
    return CaseResult(CASE.name, CASE.title, rows, [figure], notes=notes, rounds=rounds)


def _measured(
    place: _Place, served: Target, rounds: int, elements: Mapping[Peer, int]
) -> dict[str, list[EngineRun]]:
    with tempfile.TemporaryDirectory(prefix="beam_triton_engine_") as folder:
        try:
            with place.start(Path(folder)) as engine:
                measures = {
                    _row_name(place, peer): partial(score_on, engine, peer, served, count, place.arguments)
                    for peer, count in elements.items()
                }
                return take_turns(rounds, measures)
        except EngineError as error:
            raise MeasurementError(f"{place.name}: {error}") from error


def _row(name: str, taken: Sequence[EngineRun]) -> Row:
    return Row.of(
        name,
        {
            ELEMENTS_PER_SECOND: rates([run.throughput for run in taken]),
            ELEMENTS: [run.throughput.elements for run in taken],
            _REQUESTS: [run.requests for run in taken],
            _BATCH: [run.throughput.elements / run.requests for run in taken],
            _CONNECTIONS: [run.connections for run in taken],
        },
    )


def _row_name(place: _Place, peer: Peer) -> str:
    return f"{place.name}: {peer.name_in_pipelines}"


def score_on(
    engine: Engine,
    peer: Peer,
    served: Target,
    elements: int,
    more: Sequence[str] = (),
    *,
    batch_size: int = BATCH_SIZE,
) -> EngineRun:
    """Run `engine_pipeline.py`, with ``more`` arguments, on a started engine.

    Raises:
        EngineError: the pipeline failed, or a result was missing, repeated or wrong.
    """
    summary = engine.folder / "summary.json"
    arguments = {
        "peer": peer.name,
        "endpoint": served.endpoint,
        "model": served.model_name,
        "batch_size": batch_size,
        "elements": elements,
        "summary": summary,
    }
    requests_before = _requests(served)
    with _connections_opened(served) as opened:
        engine.run_pipeline(_SCRIPT, *(f"--{name}={value}" for name, value in arguments.items()), *more)
    seconds = json.loads(summary.read_text())["seconds"]
    summary.unlink()
    return EngineRun(Throughput(elements, seconds), _requests(served) - requests_before, len(opened))


def _requests(served: Target) -> int:
    """The number of requests that the model has answered so far."""
    with TritonClient(served.endpoint) as client:
        (model,) = client.statistics(served.model_name)["model_stats"]
    return int(model["inference_stats"]["success"]["count"])


@contextmanager
def _connections_opened(served: Target) -> Iterator[set[int]]:
    """Collect the ports of clients that connect within the block; TIME_WAIT keeps closed ones visible."""
    port = int(served.endpoint.rpartition(":")[2])
    before, opened = client_ports(port), set[int]()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            opened.update(client_ports(port) - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield opened
    finally:
        over.set()
        watcher.join()
        opened |= client_ports(port) - before


def _reached(rates_by_name: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """The cluster's rate divided by the peer's, which has one request in flight per slot, and by wrk's.

    Each comes with the ratio to reach; one of the two is enough.
    """
    cluster = next(place for place in PLACES if place.name == _CLUSTER)
    ours, peers = (rates_by_name[_row_name(cluster, peer)] for peer in (BEAM_TRITON, TRITONCLIENT_HTTP))
    reached = {TRITONCLIENT_HTTP.name_in_pipelines: (statistics.median(ratios(ours, peers)), 3.0)}
    if _WRK in rates_by_name:
        reached[_WRK] = (statistics.median(ratios(ours, rates_by_name[_WRK])), 0.8)
    return reached


CASE = Case("engines", "The digits on every engine; 20 ms a request, 16 requests at a time", _engines)
