"""`WorkerTriton`: in place of an endpoint, a server that each worker machine runs for itself."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, astuple, dataclass, field
from pathlib import Path
from urllib.parse import quote

from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError
from beam_triton.validation import boolean, not_negative, positive, rule

SOCKET = "http.sock"
_LONGEST_SOCKET_PATH = 100  # Linux takes 107 bytes.
# Processes share a folder only where they agree on what is in it.
_FORMAT = 1
_OWN_ARGUMENTS = ("--http-address", "--http-port", "--allow-http")

_port = rule(
    lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536,
    "a port between 1 and 65535",
)


@dataclass(frozen=True)
class WorkerTriton:
    """A Triton that runs on the workers; takes the place of ``endpoint`` everywhere.

    ::

        TritonInference(WorkerTriton("gs://bucket/models"), "resnet")

    The first process on a machine that needs it copies the models and starts the server; the others on the
    machine, which Dataflow starts one a vCPU, share it. A supervisor of its own, not a process of Beam, holds
    the server: it starts a crashed one again, and asks it to end a second after the last process that uses it
    has ended, by whatever signal. Requests wait while the server starts again. Nothing is started where the
    pipeline is built.

    Args:
      model_repository: a Triton model repository: a folder of the workers, which is used where it is, or a
        URL of any file system that Beam knows on the workers (``gs://``, ``s3://``, …), which is copied to
        the temporary folder of each machine before its server starts. A server keeps the models that it
        started with: new ones belong at a new URL.
      binary: the tritonserver program, with ``lib`` and ``backends`` beside its ``bin``, as in NVIDIA's
        images. By default the first of: the one on ``PATH``, ``/opt/tritonserver/bin/tritonserver``, that of
        the ``nvidia-pytriton`` wheel (75 MB, installed once a machine, Python models only, no GPU).
      backend_directory: the folder of backends, where it is not beside ``bin``.
      model_names: loads these models only; by default all of the repository.
      arguments: further arguments of tritonserver, such as ``["--log-info=1"]``; they come last. Left out of
        ``repr`` and display data, as they may hold keys.
      shared_memory: clients may register shared memory, for which Triton has asked since 2.69.
      http_port: a port of 127.0.0.1 to serve at. By default it is a unix socket in a folder that only this
        user can read, which needs no free port.
      startup_timeout_seconds: how long tritonserver may take until all its models are ready. Copying them
        does not count.
      linger_seconds: how long a process keeps a server that it does not use: Beam tears DoFns down after a
        minute without work, and sets them up again. A process that ends keeps nothing.

    Raises:
      ConfigurationError: a value is of the wrong kind. Where a worker cannot start the server, setting up
        fails with the last lines of its log.
    """

    model_repository: str
    _: KW_ONLY
    binary: str | None = None
    backend_directory: str | None = None
    model_names: Sequence[str] | None = None
    arguments: Sequence[str] = field(default=(), repr=False)
    shared_memory: bool = True
    http_port: int | None = None
    startup_timeout_seconds: float = 600.0
    linger_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("model_repository", "binary", "backend_directory"):
            value = getattr(self, name)
            if value is None and name != "model_repository":
                continue
            if not isinstance(value, str | os.PathLike) or not os.fspath(value):
                raise ConfigurationError(f"WorkerTriton.{name} must be a path, not {value!r}")
            object.__setattr__(self, name, str(os.fspath(value)))
        if not self.is_remote:
            object.__setattr__(self, "model_repository", os.path.abspath(self.model_repository))
        for name in ("model_names", "arguments"):
            value = getattr(self, name)
            if value is None and name == "model_names":
                continue
            if isinstance(value, str) or not all(isinstance(each, str) and each for each in value):
                raise ConfigurationError(f"WorkerTriton.{name} must be a list of texts")
            object.__setattr__(self, name, tuple(value))
        if self.model_names == ():
            raise ConfigurationError("WorkerTriton.model_names names no model; None loads all")
        for argument in self.arguments:
            if argument.partition("=")[0] in _OWN_ARGUMENTS:
                raise ConfigurationError(
                    f"WorkerTriton.arguments: {argument.partition('=')[0]} is set by the library; http_port "
                    f"chooses a port"
                )
        boolean("WorkerTriton.shared_memory", self.shared_memory)
        if self.http_port is not None:
            _port("WorkerTriton.http_port", self.http_port)
        positive("WorkerTriton.startup_timeout_seconds", self.startup_timeout_seconds)
        not_negative("WorkerTriton.linger_seconds", self.linger_seconds)

    @property
    def is_remote(self) -> bool:
        """Whether the repository is copied to the worker."""
        return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", self.model_repository) is not None

    @property
    def folder(self) -> Path:
        """Where processes of this machine that are configured alike meet: locks, state, log, copied models.

        It depends on the machine's temporary folder: workers do not ask where the pipeline was built.
        """
        what = astuple(self)[:-2]  # Not the durations: processes that differ in them share a server.
        name = hashlib.sha256(repr((_FORMAT, what)).encode()).hexdigest()[:16]
        user = os.getuid() if hasattr(os, "getuid") else 0
        for temporary in (tempfile.gettempdir(), "/tmp"):
            folder = Path(temporary) / f"beam_triton-{user}" / name
            if len(os.fsencode(folder / SOCKET)) <= _LONGEST_SOCKET_PATH:
                return folder
        raise AssertionError("/tmp is short enough")

    @property
    def place(self) -> Path | int:
        """The unix socket, or the port of 127.0.0.1, that the server listens on."""
        return self.http_port or self.folder / SOCKET

    @property
    def url(self) -> str:
        """The endpoint on this machine, the same through all restarts. Nobody may be there yet."""
        if self.http_port is not None:
            return f"http://127.0.0.1:{self.http_port}"
        return f"http+unix://{quote(str(self.place), safe='')}"

    def __str__(self) -> str:
        return f"WorkerTriton({redact_url(self.model_repository)!r})"

    __repr__ = __str__
