"""URL paths."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_triton.errors import ConfigurationError
from beam_triton.protocol import paths


def test_paths_match_tritons_routes() -> None:
    """The routes of Triton's HTTP frontend, with and without a version."""
    assert paths.model_path("digits") == "/v2/models/digits"
    assert paths.infer_path("digits", "3") == "/v2/models/digits/versions/3/infer"
    assert paths.infer_path("digits", 3) == "/v2/models/digits/versions/3/infer"
    assert paths.infer_path("digits", "") == paths.infer_path("digits") == "/v2/models/digits/infer"
    assert paths.model_ready_path("digits") == "/v2/models/digits/ready"
    assert paths.model_config_path("digits", 1) == "/v2/models/digits/versions/1/config"
    assert paths.model_statistics_path() == "/v2/models/stats"
    assert paths.model_statistics_path("digits", 2) == "/v2/models/digits/versions/2/stats"
    assert paths.model_path("a b") == "/v2/models/a%20b"
    assert paths.repository_load_path("a b") == "/v2/repository/models/a%20b/load"
    assert paths.repository_unload_path("digits") == "/v2/repository/models/digits/unload"


@given(st.text(min_size=1).filter(lambda name: name not in (".", "..")))
def test_any_model_name_is_one_path_segment(name: str) -> None:
    """Slashes, question marks and spaces in a name stay inside it; only lone surrogates are refused."""
    try:
        segment = paths.model_path(name).removeprefix("/v2/models/")
    except ConfigurationError:
        assert any("\ud800" <= char <= "\udfff" for char in name)
        return
    assert segment.isascii() and not set(segment) & set("/?# ")
    assert unquote(segment) == name


@pytest.mark.parametrize("name", ["", ".", "..", None, 3])
def test_a_model_name_that_no_url_can_hold_is_refused(name: Any) -> None:
    """Empty, not a string, or resolved away by clients and proxies."""
    with pytest.raises(ConfigurationError, match="model_name"):
        paths.model_path(name)


def test_a_version_is_a_string_of_one_path_segment() -> None:
    """MLServer's own example is v0.1.0; what a URL means otherwise is encoded."""
    assert paths.infer_path("iris", "v0.1.0") == "/v2/models/iris/versions/v0.1.0/infer"
    assert paths.model_path("iris", "1/../2") == "/v2/models/iris/versions/1%2F..%2F2"


@pytest.mark.parametrize("version", ["-1", "the latest", " 1", "1\n", "..", True, 1.0, -1])
def test_what_cannot_be_a_version_is_refused(version: Any) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigurationError, match="model_version"):
        paths.infer_path("digits", version)
