"""URL paths of the protocol, below the server's base URL.

Names are percent-encoded: a model may be called ``a/b c``. A version is a string to the protocol, such as
MLServer's ``v0.1.0``; Triton's router takes only digits, and answers a plain 404 to anything else (even
"latest") and to a trailing slash.
"""

from __future__ import annotations

from urllib.parse import quote

from beam_triton.errors import ConfigurationError

SERVER_METADATA = "/v2"
SERVER_LIVE = "/v2/health/live"
SERVER_READY = "/v2/health/ready"
REPOSITORY_INDEX = "/v2/repository/index"
MODEL_NAMES = "/v2/models"


def model_path(model_name: str, model_version: str | int | None = None) -> str:
    """``/v2/models/{m}[/versions/{v}]``, the model's metadata; None leaves the version to the server.

    Raises ConfigurationError for an empty name and for what cannot be a version.
    """
    if not isinstance(model_name, str) or not model_name:
        raise ConfigurationError(f"model_name must be a model's name, not {model_name!r}")
    path = "/v2/models/" + _segment(model_name)
    version = checked_version(model_version)
    return path if version is None else f"{path}/versions/{_segment(version, 'model_version')}"


def checked_version(model_version: str | int | None) -> str | None:
    """The version as text, None for None or "". Raises ConfigurationError for what cannot be one."""
    if model_version is None or model_version == "":
        return None
    text = str(model_version)
    is_version = isinstance(model_version, str | int) and not isinstance(model_version, bool)
    if not is_version or text.startswith("-") or text.split() != [text] or not text.isprintable():
        raise ConfigurationError(
            f"model_version must be a version such as 3 or 'v0.1.0' (leave it out for the version that the "
            f"server chooses), not {model_version!r}"
        )
    _segment(text, "model_version")
    return text


def infer_path(model_name: str, model_version: str | int | None = None) -> str:
    return model_path(model_name, model_version) + "/infer"


def generate_path(model_name: str, model_version: str | int | None = None, *, stream: bool) -> str:
    """Triton's generate extension: one answer, or with ``stream`` any number as server-sent events."""
    return model_path(model_name, model_version) + ("/generate_stream" if stream else "/generate")


def model_ready_path(model_name: str, model_version: str | int | None = None) -> str:
    return model_path(model_name, model_version) + "/ready"


def model_config_path(model_name: str, model_version: str | int | None = None) -> str:
    return model_path(model_name, model_version) + "/config"


def model_statistics_path(model_name: str | None = None, model_version: str | int | None = None) -> str:
    """``…/stats`` of one model, or of all models if none is named."""
    if model_name is None:
        return "/v2/models/stats"
    return model_path(model_name, model_version) + "/stats"


def repository_load_path(model_name: str) -> str:
    return f"/v2/repository/models/{_segment(model_name)}/load"


def repository_unload_path(model_name: str) -> str:
    return f"/v2/repository/models/{_segment(model_name)}/unload"


SHARED_MEMORY_STATUS = "/v2/systemsharedmemory/status"


def shared_memory_path(region: str, action: str) -> str:
    """Of a system shared memory region, to ``register`` or ``unregister``."""
    return f"/v2/systemsharedmemory/region/{_segment(region, 'region')}/{action}"


def _segment(name: str, option: str = "model_name") -> str:
    try:
        encoded = quote(name, safe="")
    except UnicodeEncodeError:
        raise ConfigurationError(f"{option} {name!r} cannot be written in a URL") from None
    # HTTP clients and proxies resolve "." and ".." away, and no encoding protects them.
    if encoded in (".", ".."):
        raise ConfigurationError(f"{option} {name!r} cannot be written in a URL")
    return encoded
