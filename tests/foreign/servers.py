"""Servers of the Open Inference Protocol that nobody here wrote, each started with models of its own.

    with mlserver(folder) as server:
        server.endpoint, server.kill(), server.start()

`mlserver`, `kserve`, `pytriton` and `omle_server` make a `ForeignServer`; the models are in ``models``.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from beam_triton.server.platform_check import PythonInterpreter, examine
from beam_triton.server.process import ServerProcess
from beam_triton.testing import ports
from tests.foreign.environments import python_of

_MODELS = Path(__file__).parent / "models"
_STARTUP_SECONDS = 120.0


class ForeignServer:
    """One server on a port of 127.0.0.1, which it keeps when it is started again.

    Args:
        name: of its environment.
        folder: its working folder; its log is written there.
        command: gives the arguments of the environment's Python for the ports of HTTP and of gRPC.
        models: the names of its models, which are ready when it is started.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        command: Callable[[int, int], Sequence[str]],
        models: Sequence[str],
    ) -> None:
        self.name = name
        self.models = tuple(models)
        self._folder = folder
        self._port = ports.free_port()
        self._grpc_port = ports.free_port()
        self._command = [str(python_of(name)), *command(self._port, self._grpc_port)]
        interpreter = examine(python_of(name))
        assert isinstance(interpreter, PythonInterpreter), interpreter
        self._libraries = str(interpreter.library_folder)
        self._process: ServerProcess | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> ForeignServer:
        """Starts the server, and waits until all its models are ready."""
        prefix = f"beam_triton_foreign_{os.getpid()}_{uuid.uuid4().hex[:12]}_"
        # Its Python must not find the packages of the Python that runs the tests.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        bin_folder = str(Path(self._command[0]).parent)
        self._process = ServerProcess(
            self._command,
            environment={
                **inherited,
                **threads,
                "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)]),
                # The stub of PyTriton's models would find the system's libpython, which another Python uses.
                "LD_LIBRARY_PATH": os.pathsep.join([self._libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
                "PYTHONNOUSERSITE": "1",
            },
            log_path=self._log,
            shared_memory_prefix=prefix,
            folder=self._folder / "temporary",
            working_folder=self._folder,
        )
        deadline = time.monotonic() + _STARTUP_SECONDS
        try:
            while not all(self._is_ready(model) for model in self.models):
                assert self._process.exit_code is None, f"{self.name} ended:\n{self.log_tail()}"
                assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.log_tail()}"
                time.sleep(0.1)
        except BaseException:
            self.kill()
            raise
        return self

    def kill(self) -> None:
        """Sends SIGKILL to the server and all its processes."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop(timeout_seconds=2.0)

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    @property
    def _log(self) -> Path:
        return self._folder / "server.log"

    def _is_ready(self, model: str) -> bool:
        try:
            answer = requests.get(f"{self.endpoint}/v2/models/{model}/ready", timeout=10)
        except requests.RequestException:
            return False
        return answer.status_code == 200

    def __enter__(self) -> ForeignServer:
        return self.start()

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _vector(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1, *shape]}


def mlserver(folder: Path) -> ForeignServer:
    """MLServer: classifiers by its runtimes for scikit-learn and XGBoost, the other models by a custom one.

    The metadata of ``iris`` and ``unnamed`` name nothing. Those of ``iris_named`` and ``iris_boosted`` name
    ``predict`` and ``predict_proba``, of which they give the second one only where it is asked for. ``total``
    sums up all its rows. ``double`` is version "v0.1.0".
    """
    _run_in("mlserver", "iris.py", folder)
    custom = {"implementation": "mlserver_runtime.Runtime"}
    fitted = {
        "implementation": "mlserver_sklearn.SKLearnModel",
        "parameters": {"uri": str(folder / "iris.joblib")},
    }
    boosted = {
        "implementation": "mlserver_xgboost.XGBoostModel",
        "parameters": {"uri": str(folder / "iris.ubj")},
    }

    def classes(datatype: str) -> dict[str, Any]:
        outputs = [_vector("predict", "INT64", 1), _vector("predict_proba", datatype, 3)]
        return {"inputs": [_vector("x", "FP64", 4)], "outputs": outputs}

    four = {"inputs": [_vector("x", "FP32", 4)], "outputs": [_vector("y", "FP32", 4)]}
    first = {"parameters": {"version": "v0.1.0"}, "versions": ["v0.1.0"]}
    models: dict[str, dict[str, Any]] = {
        "iris": fitted,
        "iris_named": {**fitted, **classes("FP64")},
        "iris_boosted": {**boosted, **classes("FP32")},
        "double": {**custom, **four, **first},
        "unnamed": custom,
        "root": {**custom, **four},
        "half": {**custom, "inputs": [_vector("x", "FP16", 4)], "outputs": [_vector("y", "FP16", 4)]},
        "echo": {**custom, "inputs": [_vector("x", "FP32", 1)], "outputs": [_vector("y", "FP32", 1)]},
        "shout": {
            **custom,
            "inputs": [_vector("text", "BYTES", 1)],
            "outputs": [_vector("loud", "BYTES", 1)],
        },
        "total": {**custom, **four, "outputs": [{"name": "total", "datatype": "FP32", "shape": [1]}]},
    }
    for name, settings in models.items():
        (folder / name).mkdir()
        (folder / name / "model-settings.json").write_text(json.dumps({"name": name, **settings}))

    def command(port: int, grpc_port: int) -> list[str]:
        (folder / "settings.json").write_text(
            json.dumps(
                {
                    "host": "127.0.0.1",
                    "http_port": port,
                    "grpc_port": grpc_port,
                    "metrics_endpoint": None,
                    "parallel_workers": 0,
                    "debug": False,
                }
            )
        )
        # The console script's first line names the folder in which its environment was made.
        start = f"import sys; sys.path.insert(0, {str(_MODELS)!r}); from mlserver.cli import main; main()"
        return ["-c", start, "start", str(folder)]

    return ForeignServer("mlserver", folder, command, list(models))


def kserve(folder: Path) -> ForeignServer:
    """KServe's own server: custom models, of which ``unnamed`` has no metadata."""
    models = ["double", "unnamed", "root", "half", "echo", "shout"]
    script = str(_MODELS / "kserve_server.py")
    return ForeignServer("kserve", folder, lambda port, grpc_port: [script, str(port)], models)


def pytriton(folder: Path) -> ForeignServer:
    """Functions bound by PyTriton, which start a Triton: ``add_if_given`` has an optional input."""
    models = ["double", "root", "half", "echo", "shout", "add_if_given"]
    script = str(_MODELS / "pytriton_server.py")
    return ForeignServer("pytriton", folder, lambda port, grpc_port: [script, str(port)], models)


def omle_server(folder: Path) -> ForeignServer:
    """OMLE's server, in C++: ``tree`` classifies points; ``labelled_tree`` names its labels STRING."""
    _run_in("omle-server", "omle_models.py", folder)

    def command(port: int, grpc_port: int) -> list[str]:
        start = "import os, omle_server, sys; os.execv(omle_server.binary_path(), sys.argv)"
        arguments = ["--model-dir", str(folder), "--rest-port", str(port), "--grpc-port", str(grpc_port)]
        return ["-c", start, *arguments]

    return ForeignServer("omle-server", folder, command, ["tree", "labelled_tree"])


def _run_in(server: str, script: str, argument: Path) -> None:
    command = [str(python_of(server)), "-E", str(_MODELS / script), str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
