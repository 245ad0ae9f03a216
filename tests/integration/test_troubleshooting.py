"""Every symptom of docs/troubleshooting.md is produced here, and says what the page quotes.

A test has the name of the page's symptom, and hands what was raised or logged to ``says``, which looks for
the quotes of that symptom in it. ``…`` in a quote stands for what differs from run to run.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.internal import pickler
from apache_beam.io import WriteToJson

from beam_triton import (
    ServerOverloadedError,
    TritonClient,
    TritonError,
    TritonInference,
    TritonInferenceDoFn,
    TritonSequenceInference,
)
from beam_triton.testing import FakeModel, FakeTriton, LocalTriton
from tests.support import faults
from tests.support.answers import Answer, always, forward_to
from tests.support.certificates import Certificates
from tests.support.fault_server import FaultServer
from tests.support.models import sleeping, throwaway_triton, write_models
from tests.support.nginx import Nginx
from tests.support.pipelines import Run, score
from tests.support.tinyproxy import Tinyproxy

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
SYMPTOM = re.compile(r"<!-- symptom: (\w+) -->(.*?)(?=<!-- symptom|\Z)", re.DOTALL)
QUOTE = re.compile(r"```text\n(.*?)```", re.DOTALL)

# What the library waits for a server that is down is not what these tests are about.
IMPATIENT: dict[str, Any] = {
    "timeout_seconds": 2.0,
    "pool": {"connect_timeout_seconds": 1.0},
    "circuit_breaker": None,
    "retry": {"max_retries": 0},
}
X = [1.0, 2.0, 3.0, 4.0]

Says = Callable[[str], None]


def symptoms() -> dict[str, list[str]]:
    """The quoted lines of each symptom of the page."""
    text = PAGE.read_text(encoding="utf-8")
    return {
        name: [line for quote in QUOTE.findall(section) for line in quote.splitlines() if line.strip()]
        for name, section in SYMPTOM.findall(text)
    }


@pytest.fixture
def says(request: pytest.FixtureRequest) -> Iterator[Says]:
    """Takes what was seen; the test fails unless the page's quotes of its symptom are all in it."""
    name = request.node.originalname.removeprefix("test_")
    seen: list[str] = []
    yield seen.append
    if os.environ.get("SHOW_SYMPTOMS"):
        print(f"\n=== {name}\n" + "\n".join(seen))
        return
    quotes = symptoms()[name]
    assert quotes, f"{PAGE.name} quotes nothing for {name}"
    text = "\n".join(seen)
    for quote in quotes:
        pattern = ".*".join(map(re.escape, quote.strip().split("…")))
        assert re.search(pattern, text), f"{PAGE.name} quotes {quote!r}, but this is what is said:\n{text}"


@pytest.fixture
def port(triton: LocalTriton) -> int:
    return int(triton.endpoint.rpartition(":")[2])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def raised_by(call: Callable[[], object]) -> str:
    """The type and text of what the call raises."""
    with pytest.raises(Exception) as info:
        call()
    return f"{type(info.value).__name__}: {info.value}"


def asked(endpoint: str, model: str = "double", element: Any = X, **options: Any) -> Callable[[], object]:
    """A call that scores one element, and waits for nothing that can be left out."""

    def call() -> None:
        with TritonClient(endpoint, **{**IMPATIENT, **options}) as client:
            client.infer(model, {"x": np.array([element], np.float32)})

    return call


def dead_letter(endpoint: str, model: str, element: Any, **options: Any) -> str:
    """The error of the failure that an element becomes."""
    transform = TritonInference(endpoint, model, **options).with_exception_handling()
    ((_, (kind, message, _)),) = score([element], transform).failures
    return f"{kind.__name__}: {message}"


def applied(transform: Any, elements: list[Any]) -> Callable[[], object]:
    """A pipeline that scores elements without dead letters."""
    return lambda: score(elements, transform)


# The server is not reached.


def test_connection_refused(says: Says) -> None:
    with faults.refusing_port() as port:
        says(raised_by(asked(f"http://127.0.0.1:{port}")))


def test_unknown_host(says: Says) -> None:
    says(raised_by(asked("http://triton.invalid:8000")))


def test_connect_timeout(says: Says) -> None:
    with faults.unanswering_port() as port:
        says(
            raised_by(
                asked(f"http://127.0.0.1:{port}", timeout_seconds=1.0, pool={"connect_timeout_seconds": 0.5})
            )
        )


def test_grpc_port(triton: LocalTriton, says: Says) -> None:
    says(
        raised_by(
            asked(triton.grpc_endpoint if "://" in triton.grpc_endpoint else f"http://{triton.grpc_endpoint}")
        )
    )


def test_metrics_port(triton: LocalTriton, says: Says) -> None:
    endpoint = triton.metrics_endpoint.removesuffix("/metrics")
    says(raised_by(asked(endpoint)))


def test_endpoint_without_scheme(says: Says) -> None:
    says(raised_by(lambda: TritonInference("triton:8000", "digits")))


@pytest.mark.tinyproxy
def test_proxy_refuses(says: Says) -> None:
    with Tinyproxy(allows_tunnels=False) as proxy:
        says(
            raised_by(
                asked("https://triton.example:8000", proxies={"https": f"http://127.0.0.1:{proxy.port}"})
            )
        )


@pytest.mark.nginx
def test_certificate_refused(port: int, certificates: Certificates, says: Says) -> None:
    with Nginx([port], certificate=certificates.good) as nginx:
        says(raised_by(asked(nginx.endpoint)))


@pytest.mark.nginx
def test_certificate_of_another_name(port: int, certificates: Certificates, says: Says) -> None:
    with Nginx([port], certificate=certificates.wrong_host) as nginx:
        says(raised_by(asked(nginx.endpoint, tls={"ca_bundle": str(certificates.ca)})))


def test_https_to_a_plain_port(triton: LocalTriton, says: Says) -> None:
    says(raised_by(asked(triton.endpoint.replace("http:", "https:"))))


@pytest.mark.nginx
def test_http_to_a_tls_port(port: int, certificates: Certificates, says: Says) -> None:
    with Nginx([port], certificate=certificates.good) as nginx:
        says(raised_by(asked(nginx.endpoint.replace("https:", "http:"))))


# The server refuses.


def test_unknown_model(triton: LocalTriton, says: Says) -> None:
    says(raised_by(asked(triton.endpoint, "dobule")))


def test_unknown_version(triton: LocalTriton, says: Says) -> None:
    says(raised_by(asked(triton.endpoint, "double", model_version=7)))


def test_version_latest(triton: LocalTriton, says: Says) -> None:
    says(raised_by(asked(triton.endpoint, model_version="latest")))


def test_model_failed_to_load(tmp_path: Path, says: Says) -> None:
    repository = write_models(tmp_path, ["broken", "double"])
    with throwaway_triton(repository, models_control="explicit", load_models=["double"]) as triton:
        with pytest.raises(TritonError):
            triton.load_model("broken")
        says(raised_by(asked(triton.endpoint, "broken", [1.0])))


def test_server_is_starting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, says: Says
) -> None:
    monkeypatch.setattr("beam_triton.client._LOG_EVERY_SECONDS", 0.3)
    starting = Answer(503, b'{"error": "Model with name m is not ready."}')
    options = {**IMPATIENT, "circuit_breaker": {"max_wait_seconds": 1.0}}
    with FaultServer(always(starting)) as server, TritonClient(server.endpoint, **options) as client:
        says(raised_by(lambda: client.open_model("m", wait_seconds=1.0)))
    says(caplog.text)


def test_restricted_api(tmp_path: Path, says: Says) -> None:
    repository = write_models(tmp_path, ["double"])
    arguments = ["--http-restricted-api=inference:secret-header=secret"]
    with throwaway_triton(repository, extra_args=arguments) as triton:
        says(raised_by(asked(triton.endpoint)))


def test_secret_missing(says: Says) -> None:
    says(raised_by(asked("http://triton:8000", auth_token="env:NO_SUCH_TOKEN")))


@pytest.mark.nginx
def test_body_limit_of_a_proxy(port: int, caplog: pytest.LogCaptureFixture, says: Says) -> None:
    with Nginx([port], max_body="100k") as nginx, caplog.at_level(logging.WARNING):
        elements = [np.ones(8_000, np.float32)] * 32
        score(elements, TritonInference(nginx.endpoint, "echo_variable", shared_memory="never"))
        says(caplog.text)
        says(dead_letter(nginx.endpoint, "echo_variable", np.ones(30_000, np.float32), shared_memory="never"))


@pytest.mark.nginx
def test_proxy_without_a_server(says: Says) -> None:
    with faults.refusing_port() as port, Nginx([port]) as nginx:
        says(raised_by(asked(nginx.endpoint)))


@pytest.mark.nginx
def test_proxy_gives_up_first(port: int, says: Says) -> None:
    with Nginx([port], read_timeout_seconds=0.3) as nginx:
        says(raised_by(asked(nginx.endpoint, "slow", [1.0])))


def test_queue_full(triton: LocalTriton, says: Says) -> None:
    messages = []

    def ask(number: int) -> None:
        # Clients of one process with equal policies share a limit of what is in flight.
        own_limit = {"max_retries": 0, "max_backoff_seconds": 30.0 + number}
        try:
            breaker = {"when_open": "fail"}
            asked(triton.endpoint, "full_queue", [1.0], circuit_breaker=breaker, retry=own_limit)()
        except ServerOverloadedError as error:
            messages.append(f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(24) as threads:
        list(threads.map(ask, range(24)))
    says("\n".join(messages))


def test_breaker_opens(caplog: pytest.LogCaptureFixture, says: Says) -> None:
    double = FakeModel(
        lambda inputs: {"y": inputs["x"]}, inputs={"x": ("FP32", [4])}, outputs={"y": ("FP32", [4])}
    )
    breaker = {"when_open": "fail", "minimum_requests": 2}
    options = {**IMPATIENT, "circuit_breaker": breaker}
    x = {"x": np.array([X], np.float32)}
    with FakeTriton({"double": double}) as triton, TritonClient(triton.endpoint, **options) as client:
        client.infer("double", x)
        triton.stop()
        for _ in range(4):
            says(raised_by(lambda: client.infer("double", x)))
    says(caplog.text)


def test_deadline(tmp_path: Path, says: Says) -> None:
    sleeping("sleepy", 2.0).write(tmp_path)
    with throwaway_triton(tmp_path) as triton:
        says(
            raised_by(
                asked(
                    triton.endpoint,
                    "sleepy",
                    [1.0],
                    timeout_seconds=0.5,
                    pool={"connect_timeout_seconds": 0.2},
                )
            )
        )


def test_model_raises(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "raising", np.array([-1.0], np.float32)))


def test_server_rejects_an_element(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "rejecting", np.array([-1.0], np.float32)))


def test_model_out_of_memory(triton: LocalTriton, caplog: pytest.LogCaptureFixture, says: Says) -> None:
    with caplog.at_level(logging.WARNING):
        score([[float(n)] for n in range(256)], TritonInference(triton.endpoint, "short_of_memory"))
    says(caplog.text)


# The element does not fit.


def test_shape(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "double", [1.0, 2.0]))


def test_batch_dimension_given(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "double", np.ones((8, 4), np.float32)))


def test_batch_dimension_missing(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "unbatched", X))


def test_datatype(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "sum_and_difference", {"a": [0.5] * 16, "b": [1] * 16}))


def test_text_for_numbers(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "double", "1,2,3,4"))


def test_pixels(triton: LocalTriton, caplog: pytest.LogCaptureFixture, says: Says) -> None:
    with caplog.at_level(logging.WARNING):
        score([np.array([0, 128, 255, 3], np.uint8)], TritonInference(triton.endpoint, "double"))
    says(caplog.text)


def test_missing_column(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "double", {"pixels": X}))


def test_missing_column_of_a_schema(triton: LocalTriton, says: Says) -> None:
    transform = TritonInference(triton.endpoint, "double", output="row")
    says(raised_by(applied(transform, [beam.Row(id=1, pixels=X)])))


def test_decoupled_model(triton: LocalTriton, says: Says) -> None:
    says(raised_by(applied(TritonInference(triton.endpoint, "countdown"), [[3]])))


def test_sequence_model(triton: LocalTriton, says: Says) -> None:
    says(raised_by(applied(TritonInference(triton.endpoint, "running_sum"), [[3]])))


def test_no_sequence_model(triton: LocalTriton, says: Says) -> None:
    says(raised_by(applied(TritonSequenceInference(triton.endpoint, "double"), [("a", X)])))


def test_rows_of_the_answer(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "one_row_less", [1.0]))


def test_answer_too_large(triton: LocalTriton, says: Says) -> None:
    says(dead_letter(triton.endpoint, "echo", np.ones(128, np.float32), max_response_bytes=100))


# The job.


def test_unknown_option(says: Says) -> None:
    says(raised_by(lambda: TritonInference("http://triton:8000", "digits", timeout=5)))


def test_pool_too_small(says: Says) -> None:
    says(
        raised_by(
            lambda: TritonInference("http://triton:8000", "digits", pool={"max_total": 10, "max_idle": 10})
        )
    )


def test_too_many_failures(triton: LocalTriton, says: Says) -> None:
    transform = TritonInference(triton.endpoint, "rejecting").with_exception_handling(threshold=0.05)
    says(raised_by(lambda: score([[-1.0], [1.0]], transform)))


def test_pickling(says: Says) -> None:
    with socket.socket() as to_key_server:

        def sign(method: str, url: str, headers: Any, body: bytes) -> dict[str, str]:
            return {"X-Key": to_key_server.recv(32).hex()}

        dofn = TritonInferenceDoFn("http://triton:8000", "digits", auth=sign)
        says(raised_by(lambda: pickler.dumps(dofn)))


def test_package_missing_on_workers(tmp_path: Path, says: Says) -> None:
    """What a worker does with a DoFn that was pickled where the package is."""
    (tmp_path / "dofn").write_bytes(pickler.dumps(TritonInferenceDoFn("http://triton:8000", "digits")))
    # Without the site module, an editable installation of this package is not found.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path.append({packages!r})\n"
        "from apache_beam.internal import pickler\n"
        "pickler.loads(open('dofn', 'rb').read())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, env={}, check=False
    )
    says(done.stderr)


def test_consumers_in_batches(triton: LocalTriton, says: Says) -> None:
    def build() -> None:
        with beam.Pipeline("FnApiRunner") as pipeline:
            results = pipeline | beam.Create([X]) | TritonInference(triton.endpoint, "double")
            _ = results | WriteToJson("out.jsonl")

    says(raised_by(build))


def test_shared_memory_off(
    triton: LocalTriton, port: int, caplog: pytest.LogCaptureFixture, says: Says
) -> None:
    """Triton above 2.68 answers so unless --allow-client-shm is set."""
    real = forward_to(port)
    reason = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
    refusal = Answer(501, f'{{"error": "{reason}"}}'.encode())
    with (
        FaultServer(lambda request: refusal if "sharedmemory" in request.target else real(request)) as server,
        caplog.at_level(logging.INFO),
        TritonClient(server.endpoint) as client,
    ):
        for _ in range(20):
            client.infer("echo_variable", {"x": np.ones((1, 100_000), np.float32)})
    says(caplog.text)


# What no error says.


def metrics_of(run: Run) -> str:
    lines = [f"{name} {value}" for name, value in run.counters.items()]
    lines += [
        f"{name} mean {value.sum / value.count:.1f}"
        for name, value in run.distributions.items()
        if value.count
    ]
    return "\n".join(lines)


def test_ragged_elements(triton: LocalTriton, says: Says) -> None:
    elements = [[1.0] * (1 + n) for n in range(40)]
    says(metrics_of(score(elements, TritonInference(triton.endpoint, "ragged"))))


@pytest.mark.nginx
def test_connections_closed_between_requests(port: int, says: Says) -> None:
    with Nginx([port], requests_per_connection=1) as nginx:
        elements = [[float(n)] * 128 for n in range(40)]
        says(
            metrics_of(
                score(elements, TritonInference(nginx.endpoint, "echo", batching={"max_batch_size": 1}))
            )
        )


def test_no_dynamic_batching(triton: LocalTriton, says: Says) -> None:
    def counts(client: TritonClient) -> tuple[int, int]:
        (model,) = client.statistics("echo")["model_stats"]
        return model["inference_count"], model["execution_count"]

    with TritonClient(triton.endpoint) as client:
        before = counts(client)
        single = TritonInference(triton.endpoint, "echo", batching={"max_batch_size": 1})
        score([[float(n)] * 128 for n in range(64)], single)
        rows, executions = (now - then for now, then in zip(counts(client), before, strict=True))
    says(f"inference_count {rows}, execution_count {executions}")


def test_page_and_tests_have_the_same_symptoms() -> None:
    """Each symptom of the page is produced by a test, and each test's is on the page."""
    source = Path(__file__).read_text(encoding="utf-8")
    produced = re.findall(r"^def test_(\w+)\([^)]*says: Says", source, re.MULTILINE)
    assert sorted(symptoms()) == sorted(produced)
