"""The pytest plugin of beam_triton: the fixtures ``fake_triton`` and ``local_triton``.

It stands beside the package, not in it, because pytest imports plugins when it starts: importing anything of
`beam_triton` imports Apache Beam, which takes seconds. The fixtures import what they need when a test asks
for one. ``-p no:beam_triton`` leaves the plugin out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from beam_triton.testing import FakeModel, FakeTriton, LocalTriton


@pytest.fixture
def fake_triton() -> Iterator[Callable[..., FakeTriton]]:
    """A function that starts a `FakeTriton`; its servers end with the test.

    ``fake_triton({"double": FakeModel(…)})`` takes the arguments of `FakeTriton`.
    """
    from beam_triton.testing import FakeTriton

    with ExitStack() as servers:

        def start(models: Mapping[str, FakeModel], **options: Any) -> FakeTriton:
            return servers.enter_context(FakeTriton(models, **options))

        yield start


@pytest.fixture(scope="session")
def local_triton() -> Iterator[Callable[..., LocalTriton]]:
    """A function that gives a running `LocalTriton`, one for the whole session for the same arguments.

    ``local_triton("model_repository")`` takes the arguments of `LocalTriton`. A server that a test stopped or
    killed is started again for the next one that asks. Where no Triton runs (it needs Linux on x86-64 and
    glibc 2.35) the test is skipped; everything else that goes wrong is an error.
    """
    from beam_triton.server.platform_check import unsupported_reason
    from beam_triton.testing import LocalTriton

    servers: dict[str, LocalTriton] = {}

    def start(model_repository: str | os.PathLike[str], **options: Any) -> LocalTriton:
        reason = unsupported_reason()
        if reason is not None:
            pytest.skip(reason)
        key = repr((os.path.abspath(model_repository), sorted(options.items())))
        if key not in servers:
            servers[key] = LocalTriton(model_repository, **options)
        return servers[key].start()

    yield start
    for server in servers.values():
        server.stop()
