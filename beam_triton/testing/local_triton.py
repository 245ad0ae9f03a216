"""`LocalTriton`: a real tritonserver on this machine, as a context manager."""

from __future__ import annotations

import atexit
import http.client
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from beam_triton.errors import ConfigurationError, DeadlineExceededError
from beam_triton.protocol import error_from_response
from beam_triton.protocol.paths import (
    REPOSITORY_INDEX,
    repository_load_path,
    repository_unload_path,
)
from beam_triton.server.binary import ServerBinary, server_command
from beam_triton.server.environment import find_or_make_packages, find_or_make_server_environment
from beam_triton.server.probe import READY, accepts, answers
from beam_triton.server.process import ServerProcess, log_tail, startup_log
from beam_triton.testing import ports

ModelsControl = Literal["none", "explicit", "poll"]

_LOG_TAIL_LINES = 40
_ATTEMPTS_TO_BIND = 3
_BIND_FAILURES = ("address already in use", "failed to start http service", "failed to start grpc service")


class LocalTriton:
    """A Triton server on 127.0.0.1 that serves the models of one folder.

    ::

        with LocalTriton("model_repository") as triton:
            TritonInference(triton.endpoint, "digits")

    Args:
      model_repository: a Triton model repository: a folder with one folder a model.
      http_port: the port; None takes a free one and keeps it for the life of this object.
      grpc: also serve gRPC, at `grpc_endpoint`.
      metrics: also serve Prometheus metrics, at `metrics_endpoint`.
      models_control: "none" loads every model at start; "explicit" loads ``load_models`` and then what
        `load_model` asks for; "poll" follows changes of the folder.
      load_models: the models to load at start under "explicit".
      extra_args: further arguments of tritonserver, for example ``["--http-thread-count=4"]``.
      server_environment: the folder of the server's own virtual environment. By default the one that
        ``BEAM_TRITON_SERVER_ENVIRONMENT`` names, or one in the user's cache folder; it is made if it
        does not exist (75 MB to download, once).
      packages: Python packages that the models import, such as ``["onnxruntime==1.23.2"]``: requirements as
        pip takes them, installed with their dependencies in the user's cache folder, once.
      environment_variables: added to the server's environment, for models that read them.
        ``PYTHONPATH`` is not inherited: it could put NumPy 2 before the server's own.
      startup_timeout_seconds: how long the server may take until all its models are ready.
      stop_timeout_seconds: how long `stop` waits for requests in flight before it kills.
      log_path: where the server's log goes, appended; by default a temporary file, see `log_tail`.

    The server ends with this process, however it ends. Raises `ConfigurationError` for wrong arguments and,
    when started, where the server cannot run on this machine or does not become ready (the message ends
    with the log's last lines). Thread-safe.
    """

    def __init__(
        self,
        model_repository: str | os.PathLike[str],
        *,
        http_port: int | None = None,
        grpc: bool = False,
        metrics: bool = False,
        models_control: ModelsControl = "none",
        load_models: Sequence[str] = (),
        extra_args: Sequence[str] = (),
        server_environment: str | os.PathLike[str] | None = None,
        packages: Sequence[str] = (),
        environment_variables: Mapping[str, str] | None = None,
        startup_timeout_seconds: float = 120.0,
        stop_timeout_seconds: float = 30.0,
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self._model_repository = Path(model_repository).absolute()
        if not self._model_repository.is_dir():
            raise ConfigurationError(f"model_repository {os.fspath(model_repository)!r} is not a folder")
        if models_control not in get_args(ModelsControl):
            raise ConfigurationError(
                f"models_control must be one of {get_args(ModelsControl)}, and is {models_control!r}"
            )
        if load_models and models_control != "explicit":
            raise ConfigurationError(
                f"load_models needs models_control='explicit'; with {models_control!r} every model is loaded"
            )
        if isinstance(packages, str) or not all(isinstance(each, str) for each in packages):
            raise ConfigurationError(f"packages must be a list of requirements, and is {packages!r}")
        if http_port is not None and not 0 < http_port < 65536:
            raise ConfigurationError(f"http_port is {http_port}, and must be between 1 and 65535")
        for name, value in (("startup", startup_timeout_seconds), ("stop", stop_timeout_seconds)):
            if not value > 0:
                raise ConfigurationError(f"{name}_timeout_seconds is {value}, and must be positive")
        self._http_port = http_port
        self._grpc = grpc
        self._grpc_port: int | None = None
        self._metrics = metrics
        self._metrics_port: int | None = None
        self._models_control = models_control
        self._load_models = tuple(load_models)
        self._extra_args = tuple(extra_args)
        self._server_environment = server_environment
        self._packages = tuple(packages)
        self._environment_variables = dict(environment_variables or {})
        self._startup_timeout_seconds = startup_timeout_seconds
        self._stop_timeout_seconds = stop_timeout_seconds
        self._given_log_path = None if log_path is None else Path(log_path).absolute()
        self._lock = threading.RLock()
        self._folder: Path | None = None
        self._process: ServerProcess | None = None
        self._log_start_bytes = 0
        self._last_log = ""

    @property
    def endpoint(self) -> str:
        """``http://127.0.0.1:PORT``; the same after every restart."""
        return f"http://127.0.0.1:{self._port('http', self._http_port)}"

    @property
    def grpc_endpoint(self) -> str:
        """``127.0.0.1:PORT``, as gRPC clients take it; only with ``grpc=True``."""
        return f"127.0.0.1:{self._port('grpc', self._grpc_port)}"

    @property
    def metrics_endpoint(self) -> str:
        """``http://127.0.0.1:PORT/metrics``; only with ``metrics=True``."""
        return f"http://127.0.0.1:{self._port('metrics', self._metrics_port)}/metrics"

    def _port(self, name: str, port: int | None) -> int:
        if port is None:
            hint = "it has not been started" if name == "http" else f"give {name}=True, and start it"
            raise ConfigurationError(f"this LocalTriton serves no {name}: {hint}")
        return port

    @property
    def pid(self) -> int | None:
        """The process id of tritonserver, which leads its stubs' process group; None when not running."""
        with self._lock:
            return self._process.pid if self._process is not None and self.is_alive else None

    @property
    def is_alive(self) -> bool:
        """Whether the server process runs; it may not be ready yet."""
        process = self._process
        return process is not None and process.exit_code is None

    @property
    def is_ready(self) -> bool:
        """Whether the server answers, and all its models can serve."""
        return self.is_alive and self._http_port is not None and _is_ready(self._http_port)

    def __enter__(self) -> LocalTriton:
        return self.start()

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> LocalTriton:
        """Starts the server and waits until all its models are ready; does nothing if it runs."""
        with self._lock:
            if self.is_alive:
                return self
            environment = find_or_make_server_environment(self._server_environment)
            packages = find_or_make_packages(environment, self._packages) if self._packages else None
            for attempt in range(1, _ATTEMPTS_TO_BIND + 1):
                try:
                    self._start_once(ServerBinary.of_wheel(environment), packages)
                    break
                except _PortTaken:
                    # Another process took the port after it was chosen. A port that clients know already is
                    # never changed.
                    if self._http_port is not None or attempt == _ATTEMPTS_TO_BIND:
                        raise
            _started[self] = os.getpid()
            return self

    def _start_once(self, binary: ServerBinary, packages: Path | None) -> None:
        self._end_process(kill=True)
        http_port = self._http_port or ports.free_port()
        if not ports.is_free(http_port):
            raise _PortTaken(f"http_port {http_port} of 127.0.0.1 is in use by another process")
        if self._grpc and self._grpc_port is None:
            self._grpc_port = ports.free_port()
        if self._metrics and self._metrics_port is None:
            self._metrics_port = ports.free_port()
        shared_memory_prefix = f"beam_triton_{os.getpid()}_{uuid.uuid4().hex[:12]}_"
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="beam_triton_"))
                binary.lay_out_backends(self._folder / "backends", packages)
            log_path = self._log_path()
            self._log_start_bytes = log_path.stat().st_size if log_path.exists() else 0
            self._process = ServerProcess(
                self._command(binary, http_port, shared_memory_prefix),
                environment=binary.variables(self._environment_variables),
                log_path=log_path,
                shared_memory_prefix=shared_memory_prefix,
                folder=self._folder,
            )
            self._wait_until_ready(http_port)
        except BaseException:
            self._end_process(kill=True)
            self._remove_folder()
            raise
        self._http_port = http_port

    def _command(self, binary: ServerBinary, http_port: int, shared_memory_prefix: str) -> list[str]:
        assert self._folder is not None
        ports_of = {"http": http_port, "grpc": self._grpc_port, "metrics": self._metrics_port}
        more = [f"--model-control-mode={self._models_control}"]
        if self._models_control == "poll":
            more.append("--repository-poll-secs=1")
        more += [f"--load-model={name}" for name in self._load_models]
        return server_command(
            binary,
            self._model_repository,
            backends=self._folder / "backends",
            shared_memory_prefix=shared_memory_prefix,
            exit_timeout_seconds=self._stop_timeout_seconds,
            services={name: None if port is None else ("127.0.0.1", port) for name, port in ports_of.items()},
            more=[*more, *self._extra_args],
        )

    def _wait_until_ready(self, http_port: int) -> None:
        process = self._process
        assert process is not None
        deadline = time.monotonic() + self._startup_timeout_seconds
        # Triton binds the metrics port last, after it reports itself ready.
        others = [port for port in (self._grpc_port, self._metrics_port) if port is not None]
        while not (_is_ready(http_port) and all(map(accepts, others))):
            if process.exit_code is not None:
                log = startup_log(self._log_path(), self._log_start_bytes)
                port_taken = any(text in log.lower() for text in _BIND_FAILURES)
                raise (_PortTaken if port_taken else ConfigurationError)(
                    f"tritonserver ended with exit code {process.exit_code} while it started; its log:\n{log}"
                )
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"tritonserver was not ready within startup_timeout_seconds="
                    f"{self._startup_timeout_seconds}; the last lines of its log:\n{self.log_tail()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops the server; requests in flight have ``stop_timeout_seconds`` to end."""
        with self._lock:
            self._end_process(kill=False)
            self._remove_folder()
            _started.pop(self, None)

    def kill(self) -> None:
        """Sends SIGKILL to the server and its stubs, whatever they are doing; `start` brings it back."""
        with self._lock:
            self._end_process(kill=True)

    def restart(self) -> None:
        """Stops the server if it runs, and starts it on the same port."""
        with self._lock:
            self._end_process(kill=False)
            self.start()

    def _end_process(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.stop(self._stop_timeout_seconds)

    def _remove_folder(self) -> None:
        self._last_log = self.log_tail()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _log_path(self) -> Path:
        assert self._folder is not None
        return self._given_log_path or self._folder / "server.log"

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The last lines of the server's log since it was started: warnings, errors, models' prints.

        They can still be read after `stop`.
        """
        if self._folder is None:
            return "\n".join(self._last_log.splitlines()[-lines:])
        return log_tail(self._log_path(), self._log_start_bytes, lines)

    def load_model(self, model_name: str, *, timeout_seconds: float = 60.0) -> None:
        """Loads, or reloads, a model of the repository; needs ``models_control="explicit"``.

        Raises `InferenceError` with the server's reason if the model cannot be loaded.
        """
        path = repository_load_path(model_name)
        _control(self._controlled_port(), path, "load", model_name, timeout_seconds)

    def unload_model(self, model_name: str, *, timeout_seconds: float = 60.0) -> None:
        """Unloads a model, and waits until its last version has ended; needs ``models_control="explicit"``.

        Raises `InferenceError` with the server's reason, and `DeadlineExceededError` if requests in flight
        keep the model loaded.
        """
        deadline = time.monotonic() + timeout_seconds
        port = self._controlled_port()
        _control(port, repository_unload_path(model_name), "unload", model_name, timeout_seconds)
        while _is_loaded(port, model_name, timeout_seconds):
            if time.monotonic() > deadline:
                raise DeadlineExceededError(
                    f"model {model_name!r} still serves requests {timeout_seconds} s after it was unloaded"
                )
            time.sleep(0.02)

    def _controlled_port(self) -> int:
        if self._models_control != "explicit":
            raise ConfigurationError(
                f"models are loaded and unloaded under models_control='explicit' only, and this server has "
                f"{self._models_control!r}"
            )
        return self._port("http", self._http_port)

    def __repr__(self) -> str:
        state = "running" if self.is_alive else "not running"
        return f"<LocalTriton {self._model_repository} {state} port={self._http_port}>"


class _PortTaken(ConfigurationError):
    """Another process listens on the port."""


def _is_ready(port: int) -> bool:
    return answers(port, READY, 2.0)


def _control(port: int, path: str, what: str, model_name: str, timeout_seconds: float) -> bytes:
    """The body of the answer to a POST. Raises `InferenceError` with the server's reason."""
    status, body = _post(port, path, timeout_seconds)
    if status != 200:
        raise error_from_response(status, body, model_name=model_name, what=what)
    return body


def _is_loaded(port: int, model_name: str, timeout_seconds: float) -> bool:
    """Whether some version of the model is loaded, or still unloading."""
    rows = json.loads(_control(port, REPOSITORY_INDEX, "repository index", "", timeout_seconds))
    return any(row["name"] == model_name and row.get("state", "UNAVAILABLE") != "UNAVAILABLE" for row in rows)


def _post(port: int, path: str, timeout_seconds: float) -> tuple[int, bytes]:
    # http.client, because urllib.request would send loopback requests to a proxy named in the environment.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
    try:
        connection.request("POST", path, body=b"{}")
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# The servers to stop when the interpreter ends, and the process that started each: a forked process runs exit
# handlers too, and must not stop its parent's servers.
_started: dict[LocalTriton, int] = {}


@atexit.register
def _stop_all() -> None:
    for triton, owner in list(_started.items()):
        if owner == os.getpid():
            triton.stop()
