"""What is left of shared memory: files of this machine, and regions that a server has registered."""

from __future__ import annotations

import http.client
import json
from pathlib import Path


def files_of_regions() -> list[str]:
    """The regions that have a name, which others could open."""
    return sorted(file.name for file in Path("/dev/shm").glob("beam_triton.*"))


def registered_regions(endpoint: str) -> list[str]:
    """The names of the regions that a Triton has registered."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
    try:
        connection.request("GET", "/v2/systemsharedmemory/status")
        return sorted(region["name"] for region in json.loads(connection.getresponse().read()))
    finally:
        connection.close()
