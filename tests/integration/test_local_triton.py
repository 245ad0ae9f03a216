"""LocalTriton with the real binary: start, stop, kill, ports, model control, and what cannot start."""

from __future__ import annotations

import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beam_triton.errors import ConfigurationError, InferenceError
from beam_triton.testing import LocalTriton
from beam_triton.testing.ports import free_port
from tests.support.models import write_models

# Triton takes three seconds to stop. Only the tests of `stop` wait for that.
quick = functools.partial(LocalTriton, stop_timeout_seconds=0.1)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models."""
    return write_models(tmp_path_factory.mktemp("models"), ["double", "slow"], instances=1)


@pytest.fixture(scope="module")
def explicit_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of which cannot be loaded."""
    return write_models(tmp_path_factory.mktemp("models"), ["double", "broken"])


def doubled(triton: LocalTriton) -> list[float]:
    """The answer of the model named double to four numbers."""
    return ask(triton, "double", [1, 2, 3, 4])


def ask(triton: LocalTriton, model: str, values: list[float]) -> list[float]:
    """One row through a model."""
    body = {"inputs": [{"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}]}
    connection = http.client.HTTPConnection(triton.endpoint.removeprefix("http://"), timeout=30)
    try:
        connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))
        answer = json.load(connection.getresponse())
    finally:
        connection.close()
    data: list[float] = answer["outputs"][0]["data"]
    return data


def eventually(condition: Callable[[], bool], timeout_seconds: float = 10) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def members(process_group: int) -> list[str]:
    """The processes of a group as /proc shows them, zombies included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            line = stat.read_text(errors="replace")
        except OSError:
            continue
        if line.rpartition(")")[2].split()[2] == str(process_group):
            found.append(line)
    return found


def shared_memory() -> set[Path]:
    """The memory regions of all servers that this process runs."""
    return set(Path("/dev/shm").glob(f"beam_triton_{os.getpid()}_*"))


def test_stop_leaves_no_process_memory_or_folder(repository: Path) -> None:
    """The server answers within the context; afterwards process, stubs, memory and folder are gone."""
    of_others = shared_memory()
    with LocalTriton(repository) as triton:
        assert triton.is_alive and triton.is_ready
        assert triton.endpoint.startswith("http://127.0.0.1:")
        assert doubled(triton) == [2, 4, 6, 8]
        pid = triton.pid
        assert pid is not None
        assert shared_memory() > of_others
        assert len(members(pid)) == 3  # the server, and a stub for each model
    assert not triton.is_alive and not triton.is_ready and triton.pid is None
    assert eventually(lambda: not members(pid))
    assert shared_memory() == of_others
    assert "CUDA" in triton.log_tail()


def test_a_killed_server_starts_again_on_its_port(repository: Path) -> None:
    """SIGKILL ends the server and its stubs at once; it comes back on the same port."""
    with quick(repository) as triton:
        endpoint, pid = triton.endpoint, triton.pid
        assert pid is not None
        triton.kill()
        assert not triton.is_alive
        # Init collects the orphaned stubs a moment later.
        assert eventually(lambda: not members(pid))
        with pytest.raises(ConnectionRefusedError):
            doubled(triton)
        triton.start()
        assert triton.endpoint == endpoint and triton.pid != pid
        assert doubled(triton) == [2, 4, 6, 8]


def test_restart_keeps_the_port(repository: Path, tmp_path: Path) -> None:
    """A restart binds the port that was given, with connections of the old server lingering in TIME_WAIT."""
    port, log_path = free_port(), tmp_path / "triton.log"
    with quick(repository, http_port=port, log_path=log_path) as triton:
        endpoint, pid = triton.endpoint, triton.pid
        assert endpoint == f"http://127.0.0.1:{port}"
        assert doubled(triton) == [2, 4, 6, 8]
        triton.restart()
        assert (triton.endpoint, triton.is_ready) == (endpoint, True)
        assert triton.pid != pid
        assert doubled(triton) == [2, 4, 6, 8]
    assert log_path.read_text().count("CudaDriverHelper") == 2  # logged at each start


def test_stop_waits_for_requests_in_flight(repository: Path) -> None:
    """A request in flight gets its answer while the server stops."""
    answers: list[list[float]] = []
    with LocalTriton(repository) as triton:
        request = threading.Thread(target=lambda: answers.append(ask(triton, "slow", [1.0])))
        request.start()
        time.sleep(0.4)
    request.join()
    assert answers == [[1.0]]


def test_servers_do_not_share_ports_or_memory(repository: Path) -> None:
    """Two servers have ports and shared memory of their own: killing one does not affect the other."""
    with quick(repository) as first, quick(repository) as second:
        assert first.endpoint != second.endpoint
        first.kill()
        assert doubled(second) == [2, 4, 6, 8]


def test_listens_on_loopback_only(triton: LocalTriton) -> None:
    """HTTP, gRPC and metrics are bound to 127.0.0.1 and nothing else."""
    assert triton.pid is not None
    inodes = set()
    for descriptor in Path(f"/proc/{triton.pid}/fd").iterdir():
        target = os.readlink(descriptor)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{triton.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                listening.add((address, int(port, 16)))
    loopback = "0100007F"
    mapped_loopback = "0000000000000000FFFF0000" + loopback  # how gRPC binds an IPv4 address
    assert {address for address, _ in listening} <= {loopback, mapped_loopback}
    assert {port for _, port in listening} == {
        int(endpoint.split("//")[-1].split("/")[0].split(":")[1])
        for endpoint in (triton.endpoint, triton.grpc_endpoint, triton.metrics_endpoint)
    }


def test_metrics_are_served(triton: LocalTriton) -> None:
    """With metrics=True the Prometheus page is there."""
    host, _, path = triton.metrics_endpoint.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", "/" + path)
    assert b"nv_inference_count" in connection.getresponse().read()
    connection.close()


_CHILD = """
import os, sys, threading, time
from beam_triton.testing import LocalTriton
triton = LocalTriton(sys.argv[1])
# In a thread that ends: the server must outlive it.
thread = threading.Thread(target=triton.start)
thread.start()
thread.join()
time.sleep(0.5)
assert triton.is_ready
print(triton.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["exit", "SIGKILL"])
def test_dies_with_its_parent(repository: Path, tmp_path: Path, end: str) -> None:
    """However the Python process ends: server, stubs, shared memory and temporary folder are removed."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(repository)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert child.stdin is not None and child.stdout is not None
    pid = int(child.stdout.readline())
    assert members(pid)
    if end == "SIGKILL":
        child.kill()
    else:
        child.stdin.close()
    child.wait(30)
    child.stdout.close()
    child.stdin.close()
    assert eventually(lambda: not members(pid))
    assert eventually(lambda: not list(Path("/dev/shm").glob(f"beam_triton_{child.pid}_*")))
    assert eventually(lambda: not list(tmp_path.iterdir()))


def test_a_forked_process_does_not_stop_the_server(repository: Path) -> None:
    """A forked process that ends, exit handlers included, does not stop its parent's server."""
    script = """
import os, sys
from beam_triton.testing import LocalTriton
triton = LocalTriton(sys.argv[1]).start()
if os.fork() == 0:
    sys.exit()
os.wait()
print(triton.is_ready)
triton.stop()
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(repository)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert ran.stdout.strip() == "True", ran.stderr


def test_load_and_unload(explicit_repository: Path) -> None:
    """Under explicit control a model serves between load and unload; a broken one says why it cannot."""
    with quick(explicit_repository, models_control="explicit", load_models=["double"]) as triton:
        assert doubled(triton) == [2, 4, 6, 8]
        triton.unload_model("double")
        with pytest.raises(KeyError):
            doubled(triton)
        triton.load_model("double")
        assert doubled(triton) == [2, 4, 6, 8]
        with pytest.raises(InferenceError, match="broken on purpose") as caught:
            triton.load_model("broken")
        assert caught.value.model_name == "broken"
        assert caught.value.status == 400


def test_polling_sees_a_new_model(tmp_path: Path) -> None:
    """Under poll, a model that is added to the folder is served without a restart."""
    write_models(tmp_path, ["slow"])
    with quick(tmp_path, models_control="poll") as triton:
        write_models(tmp_path, ["double"])

        def serves() -> bool:
            try:
                return doubled(triton) == [2, 4, 6, 8]
            except KeyError:
                return False

        assert eventually(serves)


def test_a_model_that_cannot_load_fails_the_start(explicit_repository: Path) -> None:
    """A server that cannot load a model does not start, and the error shows the model's own message."""
    triton = quick(explicit_repository)
    with pytest.raises(ConfigurationError, match="broken on purpose"):
        triton.start()
    assert not triton.is_alive
    assert "broken on purpose" in triton.log_tail()


def test_an_unknown_argument_fails_the_start(repository: Path) -> None:
    """The error names an argument that tritonserver does not know."""
    with pytest.raises(ConfigurationError, match="no-such-option"):
        quick(repository, extra_args=["--no-such-option"]).start()


def test_a_port_in_use_is_refused(repository: Path) -> None:
    """A port that another process listens on is named in the error, and never replaced."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"http_port {port} .* in use"):
            quick(repository, http_port=port).start()


def test_start_up_time_is_bounded(tmp_path: Path) -> None:
    """A server whose models load too slowly is stopped, and the error names the limit."""
    model = write_models(tmp_path, ["double"]) / "double" / "1" / "model.py"
    model.write_text("import time\ntime.sleep(60)\n" + model.read_text())
    triton = quick(tmp_path, startup_timeout_seconds=2)
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match="startup_timeout_seconds=2"):
        triton.start()
    assert time.monotonic() - started < 15
    assert not triton.is_alive


def test_models_get_environment_variables(tmp_path: Path) -> None:
    """Variables given to the server reach its models, and PYTHONPATH of this process does not."""
    model = write_models(tmp_path, ["double"]) / "double" / "1" / "model.py"
    model.write_text(
        "import os\nassert os.environ['COLOUR'] == 'green'\nassert 'PYTHONPATH' not in os.environ\n"
        + model.read_text()
    )
    os.environ.setdefault("PYTHONPATH", "")
    with quick(tmp_path, environment_variables={"COLOUR": "green"}) as triton:
        assert doubled(triton) == [2, 4, 6, 8]


def test_a_paused_server_can_be_stopped(repository: Path) -> None:
    """A server under SIGSTOP accepts and does not answer; stop ends it too."""
    with quick(repository) as triton:
        pid = triton.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        assert eventually(lambda: not triton.is_ready)
        assert triton.is_alive
    assert eventually(lambda: not members(pid))


def test_wrong_use_is_refused_at_construction(repository: Path, tmp_path: Path) -> None:
    """Each wrong argument gives an error that names it, before any process is started."""
    with pytest.raises(ConfigurationError, match="not a folder"):
        quick(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="models_control must be one of"):
        quick(repository, models_control="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="load_models needs"):
        quick(repository, load_models=["double"])
    with pytest.raises(ConfigurationError, match="http_port is 70000"):
        quick(repository, http_port=70000)
    with pytest.raises(ConfigurationError, match="startup_timeout_seconds is 0"):
        quick(repository, startup_timeout_seconds=0)
    triton = quick(repository)
    with pytest.raises(ConfigurationError, match="has not been started"):
        _ = triton.endpoint
    with pytest.raises(ConfigurationError, match="grpc=True"):
        _ = triton.grpc_endpoint
    with pytest.raises(ConfigurationError, match="models_control='explicit' only"):
        triton.load_model("double")
