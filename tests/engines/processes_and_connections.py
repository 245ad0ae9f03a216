"""Counts the processes, DoFns, sessions and connections of a pipeline on an engine, and checks them."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.engine import Engine
from tests.engines.numbers_job import NUMBERS
from tests.support.sockets import established, settles
from tests.support.watch import Watch

NUMBERS_PIPELINE = Path(__file__).resolve().parent / "numbers_pipeline.py"

_ESTABLISHED = "01"


def connections_by_process(port: int, processes: Iterable[int]) -> Counter[int]:
    """The number of established connections to ``port`` of this machine that each of these processes has."""
    inodes = _client_inodes(port)
    counts: Counter[int] = Counter()
    for pid in processes:
        held = sum(inode in inodes for inode in _socket_inodes(pid))
        if held:
            counts[pid] = held
    return counts


class ConnectionWatch(Watch):
    """Counts five times a second a server's connections and the processes that hold them.

    ``at_server`` is the highest count of the server, ``by_process`` that of each process id.
    """

    def __init__(self, port: int, engine: Engine) -> None:
        super().__init__()
        self._port = port
        self._engine = engine
        self.at_server = 0
        self.by_process: Counter[int] = Counter()

    def look(self) -> None:
        self.at_server = max(self.at_server, established(self._port))
        self.by_process |= connections_by_process(self._port, self._engine.members())


@dataclass(frozen=True)
class DoFnNotes:
    """What the DoFns of `numbers_pipeline.py` wrote down, read after the pipeline's end."""

    processes: frozenset[int]
    instances: int
    sessions_in_a_process: int
    instances_torn_down: int
    teardown_threads: frozenset[str]
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> DoFnNotes:
        notes = [
            json.loads(line)
            for file in (folder / "notes").glob("*.jsonl")
            for line in file.read_text().splitlines()
        ]
        teardowns = [note for note in notes if note["event"] == "teardown"]
        summary = folder / "summary.json"
        return cls(
            processes=frozenset(note["process"] for note in notes),
            instances=len({note["instance"] for note in notes}),
            sessions_in_a_process=max((note["sessions"] for note in notes), default=0),
            instances_torn_down=len({note["instance"] for note in teardowns}),
            teardown_threads=frozenset(note["thread"] for note in teardowns),
            metrics=json.loads(summary.read_text()) if summary.exists() else {},
        )


@dataclass(frozen=True)
class Counts:
    """The counts of one finished run of `numbers_pipeline.py`."""

    dofns: DoFnNotes
    numbers: list[int]
    max_total: int
    connections_at_server: int
    connections_by_process: dict[int, int]
    connections_left: int

    @property
    def connection_waits(self) -> int:
        """Requests that waited because ``max_total`` connections were in use."""
        return int(self.dofns.metrics.get("connection_waits", 0))

    def figures(self) -> dict[str, Any]:
        """The engine's row in the table of ``docs/engines.md``."""
        return {
            "processes": len(self.dofns.processes),
            "dofn_instances": self.dofns.instances,
            "sessions_in_a_process": self.dofns.sessions_in_a_process,
            "max_total": self.max_total,
            "connection_waits": self.connection_waits,
            "connections_at_server": self.connections_at_server,
            "connections_in_a_process": max(self.connections_by_process.values(), default=0),
            "torn_down": f"{self.dofns.instances_torn_down} of {self.dofns.instances}",
            "connections_left": self.connections_left,
            "elements_a_request": round(self.dofns.metrics.get("batch_size", {}).get("mean", 0), 1),
        }


def count_on(
    engine: Engine,
    endpoint: str,
    folder: Path,
    *,
    elements: int,
    max_total: int = 8,
    options: Sequence[str] = (),
) -> Counts:
    """Run numbered elements on an engine, and count processes and connections during the run."""
    folder.mkdir(exist_ok=True)
    port = port_of(endpoint)
    with ConnectionWatch(port, engine) as watch:
        engine.run_pipeline(
            NUMBERS_PIPELINE, *pipeline_arguments(endpoint, folder, elements, max_total), *options
        )
    return Counts(
        dofns=DoFnNotes.read(folder),
        numbers=output_numbers(folder),
        max_total=max_total,
        connections_at_server=watch.at_server,
        connections_by_process=dict(watch.by_process),
        connections_left=settles(lambda: established(port), 0),
    )


def check_counts(counts: Counts, *, elements: int) -> None:
    """Assert what holds on every engine.

    Each element comes out once, a process has one session and at most ``max_total`` connections, and the
    server has no connection left.
    """
    assert counts.numbers == list(range(elements))
    assert counts.dofns.sessions_in_a_process == 1
    assert counts.connections_by_process.keys() <= counts.dofns.processes
    assert 0 < max(counts.connections_by_process.values()) <= counts.max_total
    assert counts.connections_at_server <= counts.max_total * len(counts.dofns.processes)
    assert counts.connection_waits > 0, "no request waited for a connection: max_total limited nothing"
    assert counts.connections_left == 0


def wait_until(reached: Callable[[], bool], *, within_seconds: float) -> None:
    """Poll ``reached`` five times a second until it is true. AssertionError after ``within_seconds``."""
    deadline = time.monotonic() + within_seconds
    while not reached():
        assert time.monotonic() < deadline, f"not reached within {within_seconds:g} s"
        time.sleep(0.2)


def pipeline_arguments(endpoint: str, folder: Path, elements: int, max_total: int) -> list[str]:
    """The command line of `numbers_pipeline.py`."""
    return [
        f"--endpoint={endpoint}",
        *("--models", *NUMBERS),
        f"--folder={folder}",
        f"--elements={elements}",
        f"--max_total={max_total}",
    ]


def port_of(endpoint: str) -> int:
    """The port of ``http://host:port``."""
    return int(endpoint.rpartition(":")[2])


def output_numbers(folder: Path) -> list[int]:
    """The numbers that the pipeline has written so far, in ascending order."""
    return sorted(int(line) for file in (folder / "output").glob("*.txt") for line in file.open())


def output_windows(folder: Path) -> list[tuple[int, list[int]]]:
    """The output of a streaming pipeline: each window's start, and its numbers in ascending order."""
    return sorted(
        (int(file.name.partition("-")[0]), sorted(map(int, file.open())))
        for file in (folder / "output").glob("*.txt")
    )


def _client_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            entry = line.split()
            if entry[3] == _ESTABLISHED and int(entry[2].rpartition(":")[2], 16) == port:
                inodes.add(entry[9])
    return inodes


def _socket_inodes(pid: int) -> Iterable[str]:
    folder = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(folder)
    except OSError:  # the process has ended
        return
    for descriptor in descriptors:
        try:
            target = os.readlink(f"{folder}/{descriptor}")
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]
