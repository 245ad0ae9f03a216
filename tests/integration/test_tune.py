"""``tune`` on a real Triton: what it finds, the pipelines that it prints, and advice that helps."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apache_beam.yaml import main as yaml_main

from beam_triton.cli.main import main
from beam_triton.testing import LocalTriton
from tests.support.answers import Answer, always
from tests.support.fault_server import FaultServer
from tests.support.models import Model, replaceable, sleeping, throwaway_triton

_ROW = re.compile(r"^ *([\d,]+) +([\d,]+) +([\d,]+) +[\d,]+ +[\d.]+ +([\d.]+)(?:  (.*))?$", re.M)


def printed_by(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, after checking its exit code."""
    found = main(["tune", *arguments])
    captured = capsys.readouterr()
    assert found == code, captured
    return captured.out


def rows(text: str) -> dict[tuple[int, int], tuple[int, float]]:
    """Elements a second and p99 in milliseconds, by elements a request and requests in flight, of those that
    worked."""
    found = {}
    for size, in_flight, rate, p99, said in _ROW.findall(text):
        if said.startswith("failed"):
            continue
        key = int(size.replace(",", "")), int(in_flight)
        found[key] = int(rate.replace(",", "")), float(p99)
    assert found, text
    return found


def recommended(text: str) -> tuple[int, int]:
    found = re.search(r'"max_batch_size": (\d+)\},\s+max_concurrent_requests=(\d+)', text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def advised(text: str) -> list[str]:
    """The subjects of the advice."""
    return re.findall(r"^- ([^:]+): ", text, re.M)


def pipelines(text: str) -> tuple[str, str]:
    """The Python and the YAML of what was printed."""
    found = re.search(r"# In Python\n(.*?)\n# In Beam YAML[^\n]*\n(.*?)\n\n", text, re.S)
    assert found is not None, text
    return found[1], found[2]


@pytest.mark.parametrize(
    ("model_name", "largest_batch", "most_a_second"),
    [
        # 16 instances of 20 ms.
        ("remote_like", 64, 64 * 16 / 0.02),
        # One instance of 50 ms, whose queue of two refuses more.
        ("full_queue", 4, 4 / 0.05),
    ],
)
def test_tune_recommends_the_fewest_in_flight_of_the_fastest_settings(
    triton: LocalTriton,
    model_name: str,
    largest_batch: int,
    most_a_second: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the rates that it shows, whatever a busy machine made of them, and in about the given time."""
    started = time.monotonic()
    arguments = ["--model", model_name, "--seconds", "6", "--max-in-flight", "16"]
    text = printed_by([triton.endpoint, *arguments], 0, capsys)
    assert time.monotonic() - started < 12
    found = rows(text)
    assert f"\n{largest_batch:>10}{16:>10} " in text, text
    # Requests of one element are looked at for the advice, after the choice.
    rates = {setting: rate for setting, (rate, _) in found.items()}
    fastest = max(rates.values())
    assert fastest < 1.5 * most_a_second, text
    size, in_flight = recommended(text)
    # The share is 95 %, and the figures are rounded.
    assert rates[size, in_flight] >= 0.93 * fastest, text
    fewer = [rate for (s, c), rate in rates.items() if (s * c, c) < (size * in_flight, in_flight)]
    assert all(rate < 0.97 * fastest for rate in fewer), text


def test_progress_is_on_standard_error_and_results_on_standard_output(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that results can be redirected; without a terminal nothing is written over."""
    assert main(["tune", triton.endpoint, "--model", "double", "--seconds", "1"]) == 0
    said = capsys.readouterr()
    assert re.search(r"^0 of 1 s: batches of 32, 64 in flight$", said.err, re.M)
    assert "of 1 s" not in said.out and "\r" not in said.err


def test_a_limit_of_the_p99_is_kept(triton: LocalTriton, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen instances of 20 ms: as many requests as do not wait, and no more."""
    arguments = ["--model", "remote_like", "--seconds", "10", "--p99", "35ms"]
    text = printed_by([triton.endpoint, *arguments], 0, capsys)
    rate, p99 = rows(text)[recommended(text)]
    assert p99 <= 35
    assert rate > 0.3 * 64 * 16 / 0.02, text
    assert re.search(rf"Recommended, for [\d,]+ elements a second with a p99 of {p99} ms", text)
    assert "too slow" in text


def test_a_limit_that_no_setting_keeps_is_a_problem(
    triton: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the closest, and recommends nothing."""
    arguments = ["--model", "remote_like", "--seconds", "3", "--p99", "5ms"]
    text = printed_by([triton.endpoint, *arguments], 1, capsys)
    found = re.search(r"No setting keeps the p99 within 5 ms: the lowest was ([\d.]+) ms", text)
    assert found is not None and float(found[1]) > 20
    assert "Recommended" not in text


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTriton]:
    """A model of one instance that takes 20 ms an execution."""
    repository = tmp_path_factory.mktemp("models")
    sleeping("m", 0.02, max_batch_size=64).write(repository)
    with throwaway_triton(repository, metrics=True) as server:
        yield server


def test_a_rate_needs_batches_that_keep_up_and_do_not_wait(
    one_at_a_time: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 a second: single elements are too many executions, and 64 wait for a third of a second."""
    arguments = ["--model", "m", "--seconds", "8", "--rate", "200"]
    text = printed_by([one_at_a_time.endpoint, *arguments], 0, capsys)
    size, _ = recommended(text)
    assert 4 <= size <= 32, text
    assert re.search(r"^ *1 .*does not keep up$", text, re.M)
    assert "Recommended, for 200 elements a second with a p99 of" in text


def test_a_rate_that_no_setting_keeps_up_with_is_a_problem(
    one_at_a_time: LocalTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the most: 64 elements in 20 ms."""
    arguments = ["--model", "m", "--seconds", "4", "--rate", "20000"]
    text = printed_by([one_at_a_time.endpoint, *arguments], 1, capsys)
    found = re.search(r"No setting keeps up with 20,000 elements a second: the most were ([\d,]+)", text)
    assert found is not None and int(found[1].replace(",", "")) < 3300


@pytest.mark.parametrize("model_name", ["double", "remote_like", "shout", "unbatched"])
def test_the_printed_pipelines_run_as_they_are(
    triton: LocalTriton, model_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors that are written out and tensors that are made, text, and a model without batches."""
    arguments = [triton.endpoint, "--model", model_name, "--seconds", "0.5", "--option", "trust_env=false"]
    python, yaml = pipelines(printed_by(arguments, 0, capsys))
    assert "trust_env=False" in python and "trust_env: false" in yaml
    assert ("max_batch_size" in python) == ("max_batch_size" in yaml) == (model_name != "unbatched")
    script, pipeline = tmp_path / "printed.py", tmp_path / "printed.yaml"
    script.write_text(python)
    pipeline.write_text(yaml)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "PredictionResult" in done.stdout
    yaml_main.run([f"--yaml_pipeline_file={pipeline}", "--runner=FnApiRunner"])


def test_the_elements_of_a_file_are_sent_and_printed(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of different lengths, which share no request; the first of them is in the pipelines."""
    path = tmp_path / "elements.jsonl"
    path.write_text("".join(f'{{"values": {[float(n)] * (n % 3 + 1)}}}\n' for n in range(1, 40)))
    arguments = [triton.endpoint, "--model", "ragged", "--seconds", "0.5", "--inputs", str(path)]
    text = printed_by(arguments, 0, capsys)
    assert f"39 elements of {path}" in text
    python, yaml = pipelines(text)
    assert '{"values": [1.0, 1.0]}' in python and '{"values": [1.0, 1.0]}' in yaml


def test_a_chart_shows_the_settings_and_the_limit(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An SVG that needs nothing else, with its text as text."""
    chart = tmp_path / "chart.svg"
    arguments = ["--model", "double", "--seconds", "1", "--p99", "500ms", "--chart", str(chart)]
    text = printed_by([triton.endpoint, *arguments], 0, capsys)
    assert f"Chart: {chart}" in text
    words = "".join(ElementTree.parse(chart).getroot().itertext())
    for expected in ("elements a second", "p99 latency, ms", "recommended", "limit", "double"):
        assert expected in words
    assert 'href="http' not in chart.read_text()


def test_tune_of_a_model_without_batches(triton: LocalTriton, capsys: pytest.CaptureFixture[str]) -> None:
    """One element per request: only the number in flight varies."""
    arguments = ["--model", "unbatched", "--shape", "x=3,4", "--seconds", "1", "--max-in-flight", "4"]
    text = printed_by([triton.endpoint, *arguments], 0, capsys)
    assert "max_concurrent_requests=" in text and "max_batch_size" not in text.partition("On the server")[0]


@pytest.mark.parametrize(("model_name", "code"), [("countdown", 2), ("doubel", 1)])
def test_tune_refuses_models_that_cannot_be_scored(
    triton: LocalTriton, model_name: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is measured."""
    assert "latency" not in printed_by([triton.endpoint, "--model", model_name], code, capsys)


def tuned(endpoint: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return printed_by([endpoint, "--model", "m", "--seconds", "5", *arguments], 0, capsys)


_DYNAMIC = "dynamic_batching { }"


@pytest.mark.parametrize(
    ("model", "subject", "change"),
    [
        # One instance that sleeps: the machine has room for more.
        pytest.param(sleeping("m", 0.02, settings=_DYNAMIC), "Instances", {"instances": 2}, id="instances"),
        # As long for 4 as for one.
        pytest.param(
            sleeping("m", 0.02, max_batch_size=4, settings=_DYNAMIC),
            "max_batch_size",
            {"max_batch_size": 16},
            id="max_batch_size",
        ),
    ],
)
def test_following_the_advice_scores_more(
    tmp_path: Path, model: Model, subject: str, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is changed as advised, and measured again."""
    with replaceable(tmp_path, model) as server:
        before = tuned(server.endpoint, capsys)
        assert subject in advised(before), before
        assert f"{next(iter(change.values()))}" in re.findall(rf"^- {subject}: .*$", before, re.M)[0]
        server.replace(**change)
        after = tuned(server.endpoint, capsys)
    most = [rows(text)[recommended(text)][0] for text in (before, after)]
    assert most[1] > 1.6 * most[0], (before, after)


def seconds_for_small_requests(endpoint: str) -> float:
    """What sixteen other clients take for ten elements each, one after the other."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0.0]}
    body = json.dumps({"inputs": [tensor]}).encode()
    port = int(endpoint.rpartition(":")[2])

    def score_ten(_: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for _ in range(10):
            connection.request("POST", "/v2/models/m/infer", body)
            assert connection.getresponse().read()
        connection.close()

    started = time.monotonic()
    with ThreadPoolExecutor(16) as clients:
        list(clients.map(score_ten, range(16)))
    return time.monotonic() - started


def test_dynamic_batching_lets_small_requests_share_executions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of other clients are answered several times as fast; the advice is gone then."""
    with replaceable(tmp_path, sleeping("m", 0.02, max_batch_size=64)) as server:
        text = tuned(server.endpoint, capsys)
        assert "Dynamic batching" in advised(text), text
        assert "`dynamic_batching { }`" in text
        before = seconds_for_small_requests(server.endpoint)
        server.replace(settings=_DYNAMIC)
        after = seconds_for_small_requests(server.endpoint)
        assert "Dynamic batching" not in advised(tuned(server.endpoint, capsys))
    assert after < before / 3


def test_a_queue_delay_that_joins_nothing_is_only_a_delay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few elements arrive: each waits for the delay, and without it is answered at once."""
    delay = "dynamic_batching { max_queue_delay_microseconds: 60000 }"
    arrivals = ("--rate", "20", "--max-batch-size", "1")
    with replaceable(tmp_path, sleeping("m", 0.002, instances=2, settings=delay)) as server:
        before = tuned(server.endpoint, capsys, *arrivals)
        assert "Queue delay" in advised(before), before
        server.replace(settings=_DYNAMIC)
        after = tuned(server.endpoint, capsys, *arrivals)
        assert "Queue delay" not in advised(after)
    # Medians: on a busy machine the slowest are late for other reasons.
    medians = [
        float(re.findall(r"^ +1 +\d+ +[\d,]+ +[\d,]+ +([\d.]+)", text, re.M)[0]) for text in (before, after)
    ]
    assert medians[1] < medians[0] - 25, (before, after)


@pytest.mark.parametrize(("busy", "expected"), [(0.12, True), (0.95, False)])
def test_instances_are_advised_where_the_metrics_show_room_for_them(
    one_at_a_time: LocalTriton, busy: float, expected: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton's own metrics, but for how busy the machine is, which other tests decide."""
    real = urllib.request.urlopen(one_at_a_time.metrics_endpoint).read().decode()
    staged, count = re.subn(r"^nv_cpu_utilization .*$", f"nv_cpu_utilization {busy}", real, flags=re.M)
    assert count == 1
    with FaultServer(always(Answer(200, staged.encode()))) as metrics:
        text = tuned(one_at_a_time.endpoint, capsys, "--metrics-url", f"{metrics.endpoint}/metrics")
    assert ("Instances" in advised(text)) == expected, text
    assert ("while the server's processors were 12% busy" in text) == expected


def test_arrays_of_a_file_stand_for_the_elements(
    triton: LocalTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An array of many values is not written out in the pipelines."""
    path = tmp_path / "x.npy"
    np.save(path, np.ones(128, np.float32))
    arguments = [triton.endpoint, "--model", "remote_like", "--seconds", "0.5", "--inputs", str(path)]
    python, yaml = pipelines(printed_by(arguments, 0, capsys))
    assert 'np.zeros([128], "float32")' in python and 'numpy.zeros([128], "float32")' in yaml
