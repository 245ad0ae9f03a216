"""`beam_triton.rows` and `beam_triton.yaml`: plain data as options, and what types come out; no server."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import pytest
from apache_beam.portability.api import external_transforms_pb2
from apache_beam.transforms.external import ImplicitSchemaPayloadBuilder
from apache_beam.transforms.fully_qualified_named_transform import FullyQualifiedNamedTransform
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints.schemas import named_fields_from_element_type
from apache_beam.yaml.yaml_ml import ModelHandlerProvider
from apache_beam.yaml.yaml_provider import InlineProvider, load_providers

import beam_triton.yaml
from beam_triton import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.rows import TritonInference, plain_options

URL = "http://triton:8000"

MODEL = {
    "name": "digits",
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [64]}],
    "outputs": [
        {"name": "label", "datatype": "INT64", "shape": [1]},
        {"name": "note", "datatype": "BYTES", "shape": [2]},
    ],
    "max_batch_size": 64,
}

# A value other than the default for every option that has one in YAML.
EVERY_OPTION: dict[str, Any] = {
    "discovery": "dns",
    "discovery_interval_seconds": 10,
    "model_version": 3,
    "timeout_seconds": 20,
    "max_concurrent_requests": 4,
    "pool": {"max_total": 8, "max_idle": 8, "connect_timeout_seconds": 5},
    "tls": {"verify": False},
    "trust_env": False,
    "proxies": {"http": "http://proxy:3128"},
    "batching": {"max_batch_size": 64},
    "retry": {"max_retries": 2},
    "circuit_breaker": {"open_seconds": 5},
    "headers": {"X-Tenant": "env:TENANT"},
    "auth_token": "file:/run/token",
    "auth": None,
    "tracing": True,
    "compression": "gzip",
    "response_compression": "gzip",
    "politeness": "background",
    "shared_memory": "never",
    "priority": 1,
    "request_parameters": {"beam": 4},
    "input_parameters": {"image": {"content_type": "np"}},
    "binary": True,
    "outputs": ["label"],
    "classification": {"label": 1},
    "default_value": {"label": 0},
    "max_response_bytes": 1000,
    "model_spec": MODEL,
}


class Element(NamedTuple):
    id: str
    image: list[float]


def as_rows(value: Any) -> Any:
    if isinstance(value, dict):
        return beam.Row(**{name: as_rows(each) for name, each in value.items()})
    return [*map(as_rows, value)] if isinstance(value, list) else value


def received(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as an expansion service gets them from another SDK: structures are rows."""
    builder = ImplicitSchemaPayloadBuilder({"constructor": "any", "kwargs": arguments})
    payload = external_transforms_pb2.ExternalConfigurationPayload.FromString(builder.payload())
    made = FullyQualifiedNamedTransform.from_runner_api_parameter(None, payload, None)
    return dict(made._kwargs)


def columns(pcoll: Any) -> dict[str, Any]:
    return dict(named_fields_from_element_type(pcoll.element_type))


def test_every_option_is_reachable_by_plain_data() -> None:
    """A dict of YAML reaches each option, and none is forgotten here."""
    assert EVERY_OPTION.keys() | {"endpoint"} == {option.name for option in fields(InferenceOptions)}
    made = InferenceOptions.from_options({"endpoint": URL, **plain_options(EVERY_OPTION)})
    assert made.batching.max_batch_size == 64
    assert made.shown()["headers"] == "X-Tenant: ***"


def test_rows_of_another_sdk_are_options_like_dicts() -> None:
    """Structures that come as rows, one in another, make the same options."""
    given = {name: value for name, value in EVERY_OPTION.items() if value is not None}
    # A map: no field of a row has such a name.
    rows = received({name: value if name == "headers" else as_rows(value) for name, value in given.items()})
    assert not isinstance(rows["batching"], dict)
    assert plain_options(rows) == given


@pytest.mark.parametrize(
    ("handling", "message"),
    [
        ({}, r"error_handling needs output"),
        ({"threshold": 0.1}, r"error_handling needs output"),
        ("bad", r"error_handling needs output"),
        (
            {"output": "bad", "treshold": 0.1},
            r"no option 'treshold'; its options: output, main_tag, threshold",
        ),
        ({"output": "bad", "threshold": 2}, r"threshold is the share"),
    ],
)
def test_wrong_error_handling_is_refused(handling: Any, message: str) -> None:
    """The error says what ``error_handling`` takes."""
    with pytest.raises(ConfigurationError, match=message):
        TritonInference(URL, "digits", error_handling=handling)


def test_failures_have_the_columns_of_beam_yaml() -> None:
    """Results keep what feeds no input; a failure is the element, a message and a stack."""
    rows = beam.Pipeline() | beam.Create([Element("a", [])]).with_output_types(Element)
    scored = rows | TritonInference(URL, "digits", model_spec=MODEL, error_handling={"output": "bad"})
    assert scored.keys() == {"good", "bad"}
    assert columns(scored["good"]).keys() == {"id", "label", "note"}
    assert [*columns(scored["bad"])] == ["element", "msg", "stack"]


def test_byte_strings_are_text_unless_told_otherwise() -> None:
    """JSON and CSV have no bytes."""
    rows = beam.Pipeline() | beam.Create([Element("a", [])]).with_output_types(Element)
    text = rows | "text" >> TritonInference(URL, "digits", model_spec=MODEL)
    raw = rows | "raw" >> TritonInference(URL, "digits", model_spec=MODEL, text_outputs=False)
    assert "str" in str(columns(text)["note"])
    assert "bytes" in str(columns(raw)["note"])


def test_the_provider_file_names_transforms_that_exist() -> None:
    """Beam reads the file, and can describe the arguments of what it names."""
    file = Path(beam_triton.yaml.__file__).with_name("providers.yaml")
    (provider,) = load_providers(str(file))
    assert isinstance(provider, InlineProvider)
    assert set(provider.provided_transforms()) == {"TritonInference", "RunInference"}
    documented = {field.name: field.description for field in provider.config_schema("TritonInference").fields}
    assert "error_handling" in documented
    assert all(documented.values()), documented


def test_the_inference_has_the_type_of_the_outputs() -> None:
    """Without a postprocess function, the type comes from the model; with one, from its annotation."""
    config: dict[str, Any] = {"endpoint": URL, "model_name": "digits", "model_spec": MODEL}
    made = ModelHandlerProvider.create_handler({"type": "Triton", "config": config})
    assert [name for name, _ in named_fields_from_element_type(made.inference_output_type())] == [
        "label",
        "note",
    ]
    for source, expected in (("def f(x) -> str:\n    return ''\n", str), ("lambda x: x", AnyType)):
        config["postprocess"] = {"callable": source}
        made = ModelHandlerProvider.create_handler({"type": "Triton", "config": config})
        assert made.inference_output_type() == expected


def test_a_wrong_option_of_the_handler_is_named() -> None:
    """Beam's error ends with ours."""
    config = {"endpoint": URL, "model_name": "digits", "model_spec": MODEL, "batching": {"max_batch": 1}}
    with pytest.raises(ValueError, match=r"did you mean 'max_batch_\w+'"):
        ModelHandlerProvider.create_handler({"type": "Triton", "config": config})
