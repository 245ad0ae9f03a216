"""Regions of shared memory: their names, their files, and who owns them."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_triton.transport import shared_region
from beam_triton.transport.shared_region import SharedRegion, is_abandoned, unlink_abandoned

pytestmark = pytest.mark.skipif(not shared_region.is_supported(), reason="need Linux's shared memory")


def file_of(name: str) -> Path:
    return Path("/dev/shm") / name


@pytest.fixture
def region() -> Any:
    region = SharedRegion(4096)
    yield region
    region.unlink()


def test_others_can_open_it_until_it_loses_its_name(region: SharedRegion) -> None:
    region.memory[:3] = b"abc"
    assert file_of(region.name).read_bytes()[:3] == b"abc"
    assert file_of(region.name).stat().st_mode & 0o777 == 0o600
    region.unlink()
    region.unlink()
    assert not file_of(region.name).exists()
    assert bytes(region.memory[:3]) == b"abc"


def test_what_is_lent_is_returned_once_no_view_is_left(region: SharedRegion) -> None:
    """A view of a view, in another type, keeps it: NumPy's views refer to the array that was lent."""
    returned: list[SharedRegion] = []
    array: Any = np.ndarray((10, 10), np.float32, region.lend(returned.append)[64:464])
    row = array[3].view(np.uint8)[1:]
    del array
    assert returned == []
    del row
    assert returned == [region]
    region.lend(returned.append)
    assert returned == [region, region]


def test_memory_that_the_system_does_not_have_is_an_error_and_leaves_nothing() -> None:
    with pytest.raises(OSError):
        SharedRegion(1 << 50)
    assert not list(Path("/dev/shm").glob(f"beam_triton.{shared_region._owner_name()}.*"))


def test_names_that_are_not_of_this_library_are_never_abandoned(region: SharedRegion) -> None:
    namespace = region.name.split(".")[1].split("-")[0]
    owner = f"{namespace}-0123456789abcdef"
    for name in ("", "other", "beam_triton.x.1", f"beam_triton.{owner}.1x", region.name):
        assert not is_abandoned(name)
    assert is_abandoned(f"beam_triton.{owner}.1")


def test_an_owner_whose_sockets_cannot_be_seen_is_never_called_dead(region: SharedRegion) -> None:
    """Containers may share memory and have networks of their own: each would take the others for dead."""
    namespace = region.name.split(".")[1].split("-")[0]
    other = f"{int(namespace, 16) + 1:x}-0123456789abcdef"
    assert not is_abandoned(f"beam_triton.{other}.1")


def _make_region(names: Any, may_end: Any) -> None:
    names.put(SharedRegion(4096).name)
    may_end.wait(30)
    os._exit(9)


def test_a_region_is_abandoned_once_its_owner_has_ended(region: SharedRegion) -> None:
    """A forked child has another owner's name than its parent; its file goes once it is a minute old."""
    context = multiprocessing.get_context("fork")
    names, may_end = context.Queue(), context.Event()
    child = context.Process(target=_make_region, args=(names, may_end))
    child.start()
    name = names.get(timeout=30)
    assert name.split(".")[1] != region.name.split(".")[1]
    assert not is_abandoned(name)
    may_end.set()
    child.join(30)
    assert is_abandoned(name)
    unlink_abandoned()
    assert file_of(name).exists()
    old = time.time() - 100
    os.utime(file_of(name), (old, old))
    os.utime(file_of(region.name), (old, old))
    unlink_abandoned()
    assert not file_of(name).exists()
    assert file_of(region.name).exists()
