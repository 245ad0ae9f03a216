"""``pipelines/worker_triton.py`` as a job whose workers share a Triton of their machine, and its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beam_triton import TritonClient, WorkerTriton
from engines.digits_job import MODELS
from engines.engine import Engine, PipelineRun
from engines.install import REPOSITORY
from tests.support.server_users import SharingWatch, processes_of, wait_until

DIGITS = 1797

_PIPELINE = REPOSITORY / "pipelines" / "worker_triton.py"


@contextmanager
def one_server() -> Iterator[SharingWatch]:
    """The server of the jobs' workers, which this process uses as well, so that it lasts for two jobs.

    AssertionError if there was another one, or if something of it is left at the end.
    """
    config = WorkerTriton(str(MODELS), linger_seconds=0)
    with SharingWatch(config) as watch:
        with TritonClient(config):
            yield watch
        assert len(watch.servers) == 1
    wait_until(lambda: not processes_of(config.folder))


def start_job(engine: Engine, folder: Path) -> PipelineRun:
    """Start the job, which writes into the folder."""
    folder.mkdir()
    return engine.start_pipeline(_PIPELINE, f"--output={folder / 'digits'}")


def scored_digits(folder: Path) -> list[str]:
    """What the job has written: a digit and its label a line."""
    return sorted(line for file in folder.glob("digits*.csv") for line in file.read_text().split())
