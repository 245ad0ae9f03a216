"""What would be sent to Dataflow, looked at offline: package, graph, job page, options and secrets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from google.cloud.dataflow_v1beta3 import TemplateMetadata

from beam_triton import TritonInference
from beam_triton.score.job_options import ScoreJob, ScoreOptions
from engines.install import BEAM, REPOSITORY
from engines.workers import bare_environment
from tests.support.dataflow import Template, write_template

DATAFLOW = REPOSITORY / "pipelines" / "dataflow"

# Found nowhere but in the launching process's environment.
TOKEN = "tr1t0n-t0k3n-0f-the-tests"

VARIABLES = {
    "PROJECT": "my-project",
    "REGION": "europe-west4",
    "BUCKET": "gs://my-bucket",
    "ENDPOINT": "http://10.0.0.5:8000",
    "MODEL": "digits",
    "SUBNETWORK": "scoring",
    "DIGITS_TOKEN": TOKEN,
}

JOB = [
    "--files=gs://my-bucket/digits-*.csv",
    "--input=image=image",
    "--keep=id",
    "--output=gs://my-bucket/scored-*.jsonl",
    "--auth_token=env:DIGITS_TOKEN",
]

# Loads what the graph holds in an environment that has nothing but Beam and the package.
LOAD_PICKLES = """
import sys
from apache_beam.internal import pickler
for line in sys.stdin.buffer.read().splitlines():
    pickler.loads(line)
assert "tests" not in sys.modules and "pipelines" not in sys.modules
"""

IMPORT_ALL = """
import importlib, pkgutil, beam_triton
for module in pkgutil.walk_packages(beam_triton.__path__, "beam_triton."):
    # Beam YAML is an extra of Beam's.
    if not module.name.endswith("__main__") and module.name != "beam_triton.yaml":
        importlib.import_module(module.name)
print(beam_triton.__file__)
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """The launch example with a token in its environment, as a classic template."""
    folder = tmp_path_factory.mktemp("dataflow") / "staged"
    return write_template(
        folder, [str(DATAFLOW / "launch.sh"), *JOB], cwd=folder.parent, environment=VARIABLES
    )


@pytest.fixture(scope="module")
def worker_python(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a bare worker environment in which the staged package has been installed, offline."""
    python = bare_environment(tmp_path_factory.mktemp("worker") / "environment")
    run_on_worker(python, ["-m", "pip", "install", "--quiet", "--no-build-isolation", str(template.package)])
    return python


def run_on_worker(python: Path, arguments: list[str], *, stdin: bytes = b"") -> str:
    # Without an index: what the package requires has to be there already.
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [str(python), *arguments],
        input=stdin,
        cwd=python.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def display_data(pipeline: beam_runner_api_pb2.Pipeline) -> Iterator[tuple[str, str, str, str]]:
    """Step, key, label and text of everything that the job page shows."""
    for transform in pipeline.components.transforms.values():
        for item in transform.display_data:
            payload = beam_runner_api_pb2.LabelledPayload.FromString(item.payload)
            yield transform.unique_name, payload.key, payload.label, payload.string_value


def test_the_package_holds_the_library_and_nothing_else(template: Template) -> None:
    """Every module is in it; tests, benchmarks, documentation, pipelines and their data are not."""
    library = REPOSITORY / "beam_triton"
    expected = {str(path.relative_to(REPOSITORY)) for path in library.rglob("*.py")}
    expected |= {"pytest_beam_triton.py", "setup.py"}
    files = template.package_files()
    assert {path for path in files if path.endswith(".py")} == expected
    assert "beam_triton/py.typed" in files
    assert {path.partition("/")[0] for path in files if "/" in path} == {
        "beam_triton",
        "beam_triton.egg-info",
    }
    assert template.package.stat().st_size < 1_000_000


def test_dataflow_installs_this_package_and_no_other(template: Template) -> None:
    """The package list is the library and Beam's own note of the submitting environment."""
    packages = {package["name"] for package in template.worker_pool["packages"]}
    assert packages == {"workflow.tar.gz", "submission_environment_dependencies.txt"}


def test_a_bare_worker_installs_the_package_and_imports_all_of_it(worker_python: Path) -> None:
    """With what Beam's image holds, and no index to download from, every module can be imported."""
    assert str(worker_python.parent.parent) in run_on_worker(worker_python, ["-c", IMPORT_ALL])


def test_a_bare_worker_loads_the_graph(template: Template, worker_python: Path) -> None:
    """Every function of the graph unpickles where neither tests nor pipelines can be imported."""
    pickles = list(template.pickles())
    assert len(pickles) > 5
    run_on_worker(worker_python, ["-c", LOAD_PICKLES], stdin=b"\n".join(pickles))


def test_steps_have_names_that_a_person_understands(template: Template) -> None:
    """The steps that the job page shows first say what they do."""
    components = template.pipeline.components
    (root,) = template.pipeline.root_transform_ids
    steps = {components.transforms[step].unique_name for step in components.transforms[root].subtransforms}
    assert steps == {"Read", "Score", "WriteResults", "AllFailures", "WriteFailures"}


def test_the_scoring_step_shows_where_and_what_it_asks(template: Template) -> None:
    """Endpoint, model and the token's reference are on the job page, with labels."""
    shown = {
        (label, text) for step, _, label, text in display_data(template.pipeline) if step.startswith("Score/")
    }
    assert ("Endpoint", "http://10.0.0.5:8000") in shown
    assert ("Model name", "digits") in shown
    assert ("Auth token", "env:DIGITS_TOKEN") in shown


def test_no_staged_byte_holds_the_token(template: Template) -> None:
    """Neither files, nor the package, nor what is inside pickles: the reference travels, not the token."""
    staged = list(template.staged_bytes())
    # The search sees into pickles: this is in one, and cannot be read in the graph's bytes.
    assert any(name == "a pickle" and b"env:DIGITS_TOKEN" in content for name, content in staged)
    assert [name for name, content in staged if TOKEN.encode() in content] == []


def test_the_job_page_shows_no_credentials() -> None:
    """Credentials in a URL, a header or a token are not in any display data of a pipeline."""
    pipeline = beam.Pipeline(options=PipelineOptions([]))
    _ = (
        pipeline
        | beam.Create([1.0])
        | TritonInference(
            ["https://user:pa55word@a.example:8000", "https://b.example:8000"],
            "digits",
            headers={"X-Api-Key": "k3y-0f-the-user"},
            auth_token="t0k3n-0f-the-user",
        )
    )
    shown = list(display_data(pipeline.to_runner_api()))
    texts = " ".join(text for *_, text in shown)
    assert "a.example" in texts and "X-Api-Key" in texts
    for secret in ("pa55word", "k3y-0f-the-user", "t0k3n-0f-the-user"):
        assert secret not in texts


def test_the_launch_examples_options_reach_the_job(template: Template) -> None:
    """Machine type, autoscaling, network, processes and threads are in the job that Dataflow would get."""
    pool = template.worker_pool
    environment = template.job["environment"]
    assert pool["machineType"] == "n2-standard-2"
    assert pool["autoscalingSettings"] == {"algorithm": "AUTOSCALING_ALGORITHM_BASIC", "maxNumWorkers": 8}
    assert pool["subnetwork"] == "regions/europe-west4/subnetworks/scoring"
    assert pool["ipConfiguration"] == "WORKER_IP_PRIVATE"
    assert "no_use_multiple_sdk_containers" in environment["experiments"]
    assert "use_multiple_sdk_containers" not in environment["experiments"]
    assert environment["sdkPipelineOptions"]["options"]["number_of_worker_harness_threads"] == 2
    (image,) = {image["containerImage"] for image in pool["sdkHarnessContainerImages"]}
    assert image.endswith(f":{BEAM}")


def test_options_behind_the_launch_example_win(tmp_path: Path) -> None:
    """What a user adds to the command line replaces what the example says."""
    launch = [str(DATAFLOW / "launch.sh"), *JOB, "--machine_type=n2-standard-16", "--max_num_workers=2"]
    pool = write_template(tmp_path / "staged", launch, cwd=tmp_path, environment=VARIABLES).worker_pool
    assert pool["machineType"] == "n2-standard-16"
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 2


def test_the_launch_example_names_what_is_missing() -> None:
    """Without an endpoint nothing is launched, and the message says which variable is meant."""
    environment = {"PATH": os.environ["PATH"], **{k: v for k, v in VARIABLES.items() if k != "ENDPOINT"}}
    done = subprocess.run(
        [str(DATAFLOW / "launch.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ENDPOINT: URL of the Triton server" in done.stderr


@pytest.fixture(scope="module")
def flex_metadata() -> TemplateMetadata:
    """The Flex Template's metadata, read as Dataflow's API defines it: unknown fields are refused."""
    metadata: TemplateMetadata = TemplateMetadata.from_json(
        (DATAFLOW / "metadata.json").read_text(), ignore_unknown_fields=False
    )
    return metadata


FLEX_VALUES: Mapping[str, str] = {
    "endpoint": "http://10.0.0.5:8000,http://10.0.0.6:8000",
    "model": "digits",
    "model_version": "3",
    "files": "gs://my-bucket/digits-*.csv",
    "input_format": "csv",
    "input": "image=p0:p63",
    "where": "split=test",
    "outputs": "label",
    "keep": "id,expected=digit",
    "output": "gs://my-bucket/scored-*.jsonl",
    "failures": "gs://my-bucket/failed-*.jsonl",
    "max_failures": "10",
    "auth_token": "env:DIGITS_TOKEN",
    "batch_size": "64",
    "max_concurrent_requests": "16",
    "timeout_seconds": "45.5",
    "sdk_container_image": "europe-west4-docker.pkg.dev/my-project/my-repository/score-files:1",
}


def test_flex_parameters_are_options_of_score_files(flex_metadata: TemplateMetadata) -> None:
    """Each parameter is an option that the pipeline takes, and a job of all of them passes its checks."""
    names = [parameter.name for parameter in flex_metadata.parameters]
    assert sorted(names) == sorted(FLEX_VALUES)
    options = PipelineOptions([f"--{name}={value}" for name, value in FLEX_VALUES.items()])
    known = {*vars(options.view_as(ScoreOptions)._visible_options), "sdk_container_image"}
    assert set(names) <= known
    job = ScoreJob(options)
    assert job.endpoint == ("http://10.0.0.5:8000", "http://10.0.0.6:8000")
    assert job.given.max_concurrent_requests == 16


def test_flex_parameters_accept_and_refuse_as_the_pipeline_does(flex_metadata: TemplateMetadata) -> None:
    """The console takes the values that work, and refuses a token in clear and a URL with a password."""
    patterns = {parameter.name: list(parameter.regexes) for parameter in flex_metadata.parameters}
    for name, value in FLEX_VALUES.items():
        assert all(re.fullmatch(pattern, value) for pattern in patterns[name]), name
    refused = {
        "auth_token": "t0k3n",
        "endpoint": "http://user:pa55word@10.0.0.5:8000",
        "output": "gs://b/out.txt",
    }
    for name, value in refused.items():
        assert not any(re.fullmatch(pattern, value) for pattern in patterns[name]), name


def test_what_the_image_copies_is_enough_to_build_the_graph(
    flex_metadata: TemplateMetadata, tmp_path: Path
) -> None:
    """A folder with just the Dockerfile's COPY lines in it writes a template with every parameter given."""
    dockerfile = (DATAFLOW / "Dockerfile").read_text().replace("\\\n", " ")
    assert re.findall(r"^FROM apache/beam_python\S+_sdk:(\S+)$", dockerfile, re.M) == [BEAM]
    image = tmp_path / "template"
    for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M):
        copy_as_docker_does(line.split(), image)
    script = dict(re.findall(r"^ENV (\w+)=(\S+)$", dockerfile, re.M))["FLEX_TEMPLATE_PYTHON_PY_FILE"]
    parameters = [f"--{name}={value}" for name, value in FLEX_VALUES.items()]
    launch = ["--runner=DataflowRunner", "--project=my-project", "--region=europe-west4"]
    environment = {"PYTHONPATH": str(image), "DIGITS_TOKEN": TOKEN}
    staged = tmp_path / "staged"
    command = [sys.executable, str(image / Path(script).relative_to("/template")), *parameters, *launch]
    template = write_template(staged, command, cwd=tmp_path, environment=environment)
    (image_name,) = {image["containerImage"] for image in template.worker_pool["sdkHarnessContainerImages"]}
    assert image_name == FLEX_VALUES["sdk_container_image"]


def copy_as_docker_does(words: list[str], target: Path) -> None:
    """COPY: a folder's contents, or files into a folder that ends with a slash. Every source must exist."""
    *sources, destination = words
    for source in sources:
        found = sorted(path for path in REPOSITORY.glob(source))
        assert found, f"the Dockerfile copies {source}, which is not there"
        for path in found:
            place = target / destination
            if path.is_dir():
                shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)


def test_the_image_holds_no_more_than_it_needs() -> None:
    """No COPY line takes in tests, benchmarks, data or the whole repository."""
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", (DATAFLOW / "Dockerfile").read_text(), re.M)
    sources = " ".join(lines).split()
    assert not [
        source for source in sources if any(fnmatch(name, source) for name in ("tests", "benchmarks", "."))
    ]


def test_the_classic_templates_readme_names_existing_files() -> None:
    """Every relative link of the folder's README leads somewhere."""
    links = re.findall(r"\]\(([^)#]+)\)", (DATAFLOW / "README.md").read_text())
    assert links
    assert [link for link in links if not (DATAFLOW / link).exists()] == []
