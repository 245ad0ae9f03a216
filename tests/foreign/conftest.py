"""A check that the servers are installed; each file of tests starts its own server."""

from __future__ import annotations

import pytest

from beam_triton.errors import ConfigurationError
from tests.foreign.environments import SERVERS, python_of

pytest.register_assert_rewrite("tests.foreign.every_server")


@pytest.fixture(scope="session", autouse=True)
def environments() -> None:
    """The servers are installed; otherwise the run ends with one line that says what is missing."""
    try:
        for server in SERVERS:
            python_of(server)
    except ConfigurationError as error:
        pytest.exit(f"error: {error}", returncode=1)
