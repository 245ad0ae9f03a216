"""What a run did: which processes, DoFn instances, sessions and connections there were, and what is left."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from engines.engine import Engine
from engines.served import NUMBERS
from tests.support.sockets import established, settles

OBSERVED_PIPELINE = Path(__file__).resolve().parent / "observed_pipeline.py"

_ESTABLISHED = "01"


def connections_by_process(port: int, processes: Iterable[int]) -> Counter[int]:
    """How many established connections to ``port`` of this machine each of these processes holds."""
    inodes = _client_inodes(port)
    counts: Counter[int] = Counter()
    for pid in processes:
        held = sum(inode in inodes for inode in _socket_inodes(pid))
        if held:
            counts[pid] = held
    return counts


class ConnectionWatch:
    """Looks five times a second how many connections a server has, and which processes hold them.

    ``at_server`` and ``by_process`` are the most seen at once: in all, and by process id.
    """

    def __init__(self, port: int, engine: Engine) -> None:
        self._port = port
        self._engine = engine
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="connection watch")
        self.at_server = 0
        self.by_process: Counter[int] = Counter()

    def __enter__(self) -> ConnectionWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.at_server = max(self.at_server, established(self._port))
            self.by_process |= connections_by_process(self._port, self._engine.members())


@dataclass(frozen=True)
class Observed:
    """What `observed_pipeline.py` left in its folder, once its process has ended or was ended."""

    processes: frozenset[int]
    instances: int
    sessions_in_a_process: int
    instances_torn_down: int
    teardown_threads: frozenset[str]
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Observed:
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
class Observation:
    """A finished run of `observed_pipeline.py`: what its DoFns noted, and what the server's side showed."""

    dofns: Observed
    numbers: list[int]
    max_total: int
    connections_at_server: int
    connections_by_process: dict[int, int]
    connections_left: int

    @property
    def connection_waits(self) -> int:
        """Requests that found ``max_total`` connections in use, and waited for one of them."""
        return int(self.dofns.metrics.get("connection_waits", 0))

    def facts(self) -> dict[str, Any]:
        """The figures for the table of engines."""
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


def observe(
    engine: Engine,
    endpoint: str,
    folder: Path,
    *,
    elements: int,
    max_total: int = 8,
    options: Sequence[str] = (),
) -> Observation:
    """Run numbered elements on an engine, and watch the server's connections meanwhile."""
    folder.mkdir(exist_ok=True)
    port = port_of(endpoint)
    with ConnectionWatch(port, engine) as watch:
        engine.run_pipeline(
            OBSERVED_PIPELINE, *observed_arguments(endpoint, folder, elements, max_total), *options
        )
    return Observation(
        dofns=Observed.read(folder),
        numbers=output_numbers(folder),
        max_total=max_total,
        connections_at_server=watch.at_server,
        connections_by_process=dict(watch.by_process),
        connections_left=settles(lambda: established(port), 0),
    )


def observed_arguments(endpoint: str, folder: Path, elements: int, max_total: int) -> list[str]:
    """The command line of `observed_pipeline.py`."""
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
    """Every number that the pipeline has written, in ascending order."""
    return sorted(int(line) for file in (folder / "output").glob("*.txt") for line in file.open())


def output_windows(folder: Path) -> list[tuple[int, list[int]]]:
    """What a streaming pipeline has written: a window's start, and its numbers in ascending order."""
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
    except OSError:  # ended in the meantime
        return
    for descriptor in descriptors:
        try:
            target = os.readlink(f"{folder}/{descriptor}")
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]
