"""Options on command lines: names, help and defaults are those of the option classes."""

from __future__ import annotations

import argparse
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from beam_triton.errors import ConfigurationError
from beam_triton.flags import ALL_FLAGS, Spelling, with_texts, with_values
from beam_triton.options import InferenceOptions
from beam_triton.policy.retry import RetryPolicy

ALL = Spelling({name: f"--{name}" for name in ALL_FLAGS})


def read(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    ALL.add_to(parser)
    return with_values({"endpoint": "http://t:8000"}, ALL.values(parser.parse_args(words)))


def test_every_option_is_a_flag() -> None:
    """One that has none would be missing on every command line; those of policies are named after both."""
    assert {flag.path[0] for flag in ALL_FLAGS.values()} == {field.name for field in fields(InferenceOptions)}
    assert {name for name in ALL_FLAGS if name.startswith("retry_")} == {
        f"retry_{field.name}" for field in fields(RetryPolicy)
    }
    assert read() == {"endpoint": "http://t:8000"}


def test_help_is_the_docstrings_first_sentence_and_the_default() -> None:
    """Without the marks of reStructuredText."""
    parser = argparse.ArgumentParser()
    ALL.add_to(parser)
    text = " ".join(parser.format_help().split())
    assert "--timeout_seconds SECONDS deadline of a request" in text
    assert "where the doubling ends (default: 30)" in text
    assert "elements per request; None takes the model's own limit" in text
    assert "`" not in text
    assert sum(not flag.help for flag in ALL_FLAGS.values()) <= 1


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (
            ["--endpoint=http://a:1,http://b:2", "--endpoint=http://c:3"],
            {"endpoint": ("http://a:1", "http://b:2", "http://c:3")},
        ),
        (["--timeout_seconds=5"], {"timeout_seconds": 5.0}),
        (
            ["--pool_max_total=50", "--pool_max_age_seconds=none"],
            {"pool": {"max_total": 50, "max_age_seconds": None}},
        ),
        (["--circuit_breaker=none"], {"circuit_breaker": None}),
        (["--circuit_breaker_when_open=fail"], {"circuit_breaker": {"when_open": "fail"}}),
        (["--tls_verify=false", "--binary"], {"tls": {"verify": False}, "binary": True}),
        (
            ["--batching_bucket_boundaries=[32,64]", "--batching_pad=0", "--batching_mask=m"],
            {"batching": {"bucket_boundaries": [32, 64], "pad": 0, "mask": ("m",)}},
        ),
        (["--outputs=a, b"], {"outputs": ("a", "b")}),
        (["--model_version=3", "--compression=gzip"], {"model_version": "3", "compression": "gzip"}),
        (
            ["--classification", '{"y": 3}', "--default_value=0"],
            {"classification": {"y": 3}, "default_value": 0},
        ),
        (
            ["--headers", '{"X-Key": "env:KEY"}', "--auth_token=file:t"],
            {"headers": {"X-Key": "env:KEY"}, "auth_token": "file:t"},
        ),
        (["--proxies", '{"https": "http://proxy:3128"}'], {"proxies": {"https": "http://proxy:3128"}}),
    ],
)
def test_text_becomes_the_options_value(words: list[str], options: dict[str, Any]) -> None:
    """Which the option classes take."""
    made = read(*words)
    assert made == {"endpoint": "http://t:8000", **options}
    InferenceOptions.from_options(made)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--auth_token=s3cret"], "--auth_token must be env:NAME or file:PATH"),
        (["--headers", '{"X-Key": "s3cret"}'], "--headers X-Key must be env:NAME or file:PATH"),
        (["--headers", '{"X-Key": 5}'], "--headers X-Key must be env:NAME or file:PATH"),
        (["--proxies", '{"all": "http://u:s3cret@p:1"}'], "--proxies all has a password"),
        (["--request_parameters=5"], "--request_parameters takes a JSON object"),
        (["--outputs=a,,b"], "--outputs 'a,,b' must be names"),
        (["--auth=azure"], "--auth auth is google"),
        (
            ["--circuit_breaker=none", "--circuit_breaker_open_seconds=5"],
            "no meaning where circuit_breaker is none",
        ),
    ],
)
def test_impossible_texts_are_refused_without_secrets(words: list[str], message: str) -> None:
    """By the flag's name."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        read(*words)
    assert "s3cret" not in str(caught.value)


def test_values_set_in_python_are_taken_as_they_are() -> None:
    """Beam's options may be set by keyword."""
    given = {
        "tls_verify": False,
        "outputs": ["a"],
        "headers": {"Accept": "x"},
        "auth": len,
        "default_value": [1],
    }
    given["model_spec"] = {"name": "m"}
    found = ALL.values(SimpleNamespace(**given))
    assert found == {**given, "outputs": ("a",)}


def test_flags_change_fields_of_a_policy() -> None:
    """Those that no flag names stay, in dicts and objects."""
    values = {"retry_max_retries": 3}
    assert with_values({"retry": {"budget_ratio": 0.5}}, values)["retry"] == {
        "budget_ratio": 0.5,
        "max_retries": 3,
    }
    changed = with_values({"retry": RetryPolicy(budget_ratio=0.5)}, values)["retry"]
    assert changed == RetryPolicy(budget_ratio=0.5, max_retries=3)
    assert with_values({"retry": None}, values)["retry"] == {"max_retries": 3}


def test_option_texts_change_fields_of_a_policy() -> None:
    """And replace everything else."""
    options = with_texts(
        {"pool": {"max_idle": 1}, "outputs": ("a",)}, ['pool={"max_total": 5}', 'outputs=["b"]']
    )
    assert options == {"pool": {"max_idle": 1, "max_total": 5}, "outputs": ["b"]}
