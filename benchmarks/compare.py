"""Two checkouts of the library side by side: ``python -m benchmarks compare PATH_OF_OTHER_CHECKOUT``.

Each run is a fresh process with ``beam_triton`` from one of the checkouts and the workload from this one. The
process runs this same file, which therefore imports public names only: the other checkout may be laid out
differently.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import beam_triton
from beam_triton import TritonInference
from benchmarks.results import Summary, ratios
from benchmarks.workload import Target, Throughput, Workload, run_pipeline

_ROOT = Path(__file__).resolve().parent.parent
_WARM_UP_ELEMENTS = 2_000


class ComparisonError(Exception):
    """A checkout could not be measured; the message says which and why."""


@dataclass(frozen=True)
class Comparison:
    """The runs of one case on both checkouts, one of each a round."""

    case: str
    these: Sequence[Throughput]
    others: Sequence[Throughput]

    def render(self) -> str:
        """Two lines for the terminal: the median ratio and its quartiles, then the medians themselves."""
        rates = [[run.elements_per_second for run in runs] for runs in (self.these, self.others)]
        cpu = [[run.cpu_seconds for run in runs] for runs in (self.these, self.others)]
        return "\n".join(
            [
                f"{self.case:12} elements/s   {_ratios(*rates)}; medians {_medians(*rates, form=',.0f')}",
                f"{self.case:12} CPU seconds  {_ratios(*cpu)}; medians {_medians(*cpu, form='.3f')}",
            ]
        )


def compare(works: Mapping[str, Workload], other: Path, rounds: int) -> Iterator[Comparison]:
    """Run each workload ``rounds`` times on both checkouts; which one goes first alternates.

    Raises:
        ComparisonError: ``other`` is no checkout, or a run failed.
    """
    with tempfile.TemporaryDirectory(prefix="beam_triton_compare_") as folder:
        this = _package_folder(Path(folder) / "this", _ROOT)
        that = _package_folder(Path(folder) / "other", other.resolve())
        for case, work in works.items():
            runs: dict[Path, list[Throughput]] = {this: [], that: []}
            for number in range(1, rounds + 1):
                print(f"  {case}: round {number}/{rounds}", file=sys.stderr, flush=True)
                for package in (this, that) if number % 2 else (that, this):
                    runs[package].append(_run_apart(package, work))
            yield Comparison(case, runs[this], runs[that])


def _package_folder(folder: Path, root: Path) -> Path:
    """A folder to import from that holds the checkout's ``beam_triton`` and not its ``benchmarks``."""
    package = root / "beam_triton"
    if not (package / "__init__.py").is_file():
        raise ComparisonError(f"{root} is no checkout: it has no beam_triton/__init__.py")
    folder.mkdir()
    (folder / "beam_triton").symlink_to(package)
    return folder


def _run_apart(package: Path, work: Workload) -> Throughput:
    given = {
        "target": asdict(work.target),
        "elements": work.elements,
        "batch_size": work.batch_size,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", json.dumps(given)],
        cwd=package,
        env={**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{_ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ComparisonError(f"the run with {(package / 'beam_triton').resolve()} failed: see above")
    return Throughput(**json.loads(done.stdout.splitlines()[-1]))


def _ratios(these: Sequence[float], others: Sequence[float]) -> str:
    summary = Summary.of(ratios(these, others))
    return (
        f"this / other {summary.median:.3f} "
        f"(quartiles {summary.lower_quartile:.3f} to {summary.upper_quartile:.3f} of {summary.n} rounds)"
    )


def _medians(these: Sequence[float], others: Sequence[float], *, form: str) -> str:
    return f"{statistics.median(these):{form}} / {statistics.median(others):{form}}"


def main() -> None:
    """Score the workload that the only argument describes, in this process, and print its `Throughput`."""
    given = json.loads(sys.argv[1])
    package = Path(beam_triton.__file__).parent.parent
    if package != Path.cwd():
        sys.exit(f"imported beam_triton from {package} instead of {Path.cwd()}")
    target = Target(**given["target"])
    transform = TritonInference(
        target.endpoint, target.model_name, batching={"max_batch_size": given["batch_size"]}
    )
    work = Workload(target, given["elements"], batch_size=given["batch_size"])
    # The first pipeline of a process loads what Beam imports late.
    run_pipeline(transform, Workload(target, _WARM_UP_ELEMENTS, batch_size=given["batch_size"]))
    print(json.dumps(asdict(run_pipeline(transform, work))))


if __name__ == "__main__":
    main()
