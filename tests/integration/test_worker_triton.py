"""One real Triton a machine: started by the first process, shared by all, gone with the last."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that, equal_to

from beam_triton import ConfigurationError, TritonClient, TritonInference, WorkerTriton
from beam_triton.server import supervisor
from beam_triton.server.lease import lease_server
from beam_triton.server.supervisor import Status
from beam_triton.testing import ports
from tests.support.bucket import Bucket
from tests.support.models import write_models
from tests.support.numbered_run import MODEL, Progress, run_numbered
from tests.support.server_users import (
    ServerUser,
    SharingWatch,
    processes_of,
    status_of,
    supervisor_of,
    wait_until,
)


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of the test's own, whose servers have all ended when the test ends."""
    folder = Path(tempfile.mkdtemp(prefix="wt-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    wait_until(lambda: not processes_of(folder))
    left = [file.name for file in folder.rglob("*") if file.name in ("http.sock", "spec.json", "repository")]
    left += [file.name for file in folder.rglob("run-*")]
    left += [file.name for file in Path("/dev/shm").glob("beam_triton_run-*") if is_of(file, folder)]
    assert left == []
    shutil.rmtree(folder)


def is_of(region: Path, folder: Path) -> bool:
    """Whether a region of shared memory belongs to a server of the folder that has ended."""
    run = region.name.removeprefix("beam_triton_").partition("_")[0]
    return any(run in status.read_text() for status in folder.rglob("status.json"))


def worker_triton(model_repository: str | Path, **options: Any) -> WorkerTriton:
    """One whose server ends a second after its last user; tritonserver itself takes four for its goodbye."""
    arguments = ["--exit-timeout-secs=1", *options.pop("arguments", ())]
    return WorkerTriton(str(model_repository), arguments=arguments, **options)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(
        tmp_path_factory.mktemp("models"), [MODEL], instances=2, parameters={"sleep_seconds": "0.05"}
    )


def test_processes_that_start_at_once_share_one_server(repository: Path, temporary: Path) -> None:
    """One that is killed takes nothing with it, not even the one that started the server; the last does."""
    config = worker_triton(repository)
    with ExitStack() as stack:
        users = [stack.enter_context(ServerUser(config)) for _ in range(4)]
        assert [user.result() for user in users] == [None] * 4
        server = status_of(config).server_pid
        assert sum("bin/tritonserver" in command for command in processes_of(temporary).values()) == 1
        for user in users:
            user.kill()
            survivors = users[users.index(user) + 1 :]
            assert all(each.scores(7.0) for each in survivors)
        assert (status_of(config).server_pid, status_of(config).restarts) == (server, 0)
    killed = time.monotonic()
    wait_until(lambda: not processes_of(temporary))
    assert time.monotonic() - killed < 8.0


def test_nothing_is_lost_while_the_server_and_its_supervisor_are_killed(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same endpoint comes back each time, the requests in flight are sent again, and the log says why."""
    config = worker_triton(repository, linger_seconds=0)
    seen: list[tuple[str, int]] = []

    def note_ready() -> bool:
        status = Status.read(config.folder)
        if status is None or status.state != "ready" or status.server_pid is None:
            return False
        if (status.run, status.server_pid) not in seen:
            seen.append((status.run, status.server_pid))
        return True

    def kill_both(progress: Progress) -> None:
        progress.wait_until(note_ready)
        for victim in ("server", "supervisor"):
            time.sleep(0.4)
            count = len(seen)
            os.kill(seen[-1][1] if victim == "server" else supervisor_of(config), signal.SIGKILL)
            progress.wait_until(lambda count=count: note_ready() and len(seen) > count)  # type: ignore[misc]

    transform = TritonInference(config, MODEL, batching={"max_batch_size": 4}, max_concurrent_requests=4)
    run_numbered(transform, 500, meanwhile=kill_both)
    (first, _), (again, _), (another, _) = seen
    assert first == again != another
    assert "is started again: tritonserver ended with exit code -9; the last lines of its log:" in caplog.text
    assert "another supervisor is started, the last one: killed" in caplog.text


def test_two_jobs_and_processes_of_the_direct_runner_share_one_server(repository: Path) -> None:
    """A job of two worker processes, and a job in this process at the same time."""
    config = worker_triton(repository, linger_seconds=0)
    here = threading.Thread(target=run_numbered, args=(TritonInference(config, MODEL), 500))
    options = PipelineOptions(["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
    with SharingWatch(config) as watch, TritonClient(config):
        here.start()
        with beam.Pipeline("FnApiRunner", options=options) as pipeline:
            numbers = (
                pipeline
                | beam.Create([np.array([n], np.float32) for n in range(40)], reshuffle=True)
                | TritonInference(worker_triton(repository), MODEL)
                | beam.Map(lambda result: float(result.inference["y"][0]))
            )
            assert_that(numbers, equal_to(list(map(float, range(40)))))
        here.join()
    assert len(watch.servers) == 1
    assert os.getpid() in watch.users
    assert len(watch.users) == 3


def test_a_process_keeps_the_server_for_a_while(repository: Path) -> None:
    """Torn down and set up again, a DoFn finds the server that it had; after linger_seconds it is drained.

    At a port: where another server has it, the error says so.
    """
    config = worker_triton(repository, http_port=ports.free_port(), linger_seconds=1.0)
    with TritonClient(config) as client:
        assert config.url == f"http://127.0.0.1:{config.http_port}"
        assert client.is_model_ready(MODEL)
        server = status_of(config).server_pid
        other = worker_triton(repository, http_port=config.http_port, arguments=["--log-info=1"])
        with pytest.raises(
            ConfigurationError, match=r"http_port \d+ of 127.0.0.1 is in use by another process"
        ):
            lease_server(other)
    time.sleep(0.6)
    with TritonClient(pickle.loads(pickle.dumps(config))):
        assert (status_of(config).server_pid, status_of(config).restarts) == (server, 0)
    wait_until(lambda: status_of(config).state == "stopped")


def test_a_model_that_does_not_load_is_told_to_all(tmp_path: Path) -> None:
    """Two processes wait for one attempt, and both raise with the server's own lines."""
    config = worker_triton(write_models(tmp_path / "models", ["broken"]))
    with ServerUser(config) as first, ServerUser(config) as second:
        for message in (first.result(), second.result()):
            assert message.startswith("ConfigurationError: WorkerTriton(")
            assert "does not start on this machine: tritonserver ended with exit code 1" in message
            assert "failed to load 'broken'" in message
    assert status_of(config).state == "failed"


def test_a_server_that_is_not_ready_in_time_is_ended(repository: Path) -> None:
    """startup_timeout_seconds bounds the wait of the first user."""
    config = worker_triton(repository, startup_timeout_seconds=0.2)
    with pytest.raises(ConfigurationError, match=r"not ready within startup_timeout_seconds=0\.2"):
        lease_server(config)


def test_a_copy_that_is_interrupted_is_made_again_and_only_once(
    repository: Path, temporary: Path, tmp_path: Path
) -> None:
    """The process that copies is killed in mid-file; one that waits copies anew, a third one does not."""
    bucket = Bucket(tmp_path / "bucket", "models", repository)
    config = worker_triton(bucket.url + "/models")
    with ServerUser(config, bucket.block_after(bytes_read=10)) as first:
        wait_until(lambda: list(config.folder.glob("repository.partial/*")))
        with ServerUser(config, bucket.register) as second:
            first.kill()
            interrupted = bucket.files_opened()
            assert second.result() is None
            assert second.scores(3.0)
            with ServerUser(config, bucket.register) as third:
                assert third.result() is None
                assert third.scores(4.0)
            assert bucket.files_opened() == interrupted + 2
            # A supervisor that takes over keeps the copy.
            os.kill(supervisor_of(config), signal.SIGKILL)
            assert second.scores(5.0)
            assert bucket.files_opened() == interrupted + 2
            # Where all are killed, the server is, too; whoever comes next removes what is left.
            second.kill()
            os.kill(supervisor_of(config), signal.SIGKILL)
    wait_until(lambda: not processes_of(temporary), within_seconds=5.0)
    assert (config.folder / "repository").exists()
    with pytest.raises(ConfigurationError, match="failed to load 'broken'"):
        lease_server(worker_triton(write_models(tmp_path / "broken", ["broken"])))
    assert not (config.folder / "repository").exists()


def test_a_server_that_does_not_answer_is_started_again(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped server is alive for the kernel, and answers nobody."""
    config = worker_triton(repository, linger_seconds=0)
    real = supervisor.Spec.write

    def write_impatient(spec: supervisor.Spec, folder: Path) -> None:
        spec.unanswered_seconds, spec.live_every_seconds = 1.0, 0.3
        real(spec, folder)

    monkeypatch.setattr(supervisor.Spec, "write", write_impatient)
    with TritonClient(config) as client:
        pid = status_of(config).server_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: (status_of(config).restarts, status_of(config).state) == (1, "ready"))
        assert client.infer(MODEL, {"x": np.ones((1, 1), np.float32)}).outputs["y"] == 1.0
        assert status_of(config).server_pid != pid
