"""The model repository on this machine: a folder as it is, or a copy from one of Beam's file systems."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from beam_triton.credentials import redact_url
from beam_triton.errors import ConfigurationError

_COPIES_AT_A_TIME = 8
_CHUNK_BYTES = 16 << 20


def copy_repository(url: str, folder: Path) -> int:
    """Copies the repository at ``url`` to ``folder``, which appears when it is complete; gives its bytes.

    Raises:
        ConfigurationError: there is nothing, a file cannot be read, or the machine has no room for it.
    """
    # Here, so that only who copies imports Beam.
    from apache_beam.io.filesystems import FileSystems

    shown = redact_url(url)
    partial_folder = folder.with_name(folder.name + ".partial")
    root = url.rstrip("/") + "/"
    try:
        files = list(_files(FileSystems, root))
        if not files:
            raise ConfigurationError(f"model_repository {shown!r} holds no files, or does not exist")
        names = [_relative(root, file.path) for file in files]
        size = sum(file.size_in_bytes or 0 for file in files)
        free = shutil.disk_usage(folder.parent).free
        if size > free:
            raise ConfigurationError(
                f"model_repository {shown!r} takes {size:,} bytes, and {folder.parent} has {free:,} free: "
                f"give the workers a larger disk, or name another folder by TMPDIR"
            )
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        with ThreadPoolExecutor(_COPIES_AT_A_TIME, "beam_triton-copy") as threads:
            copy = partial(_copy, FileSystems, partial_folder)
            try:
                list(threads.map(copy, files, names))
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        _add_version_folders(partial_folder)
        partial_folder.rename(folder)
        return size
    except ConfigurationError:
        raise
    # Each file system has its own errors, with the reason in words.
    except Exception as error:
        raise ConfigurationError(
            f"model_repository {shown!r} cannot be copied to {folder}: {type(error).__name__}: {error}"
        ) from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _files(file_systems: Any, root: str) -> Iterator[Any]:
    """Metadata of all files below ``root``, and of the empty objects that stand for folders."""
    from apache_beam.io.filesystem import BeamIOError

    has_folders = file_systems.get_filesystem(root).has_dirs()
    for found in file_systems.match([root + "**"])[0].metadata_list:
        inside = []
        if has_folders and not found.size_in_bytes:
            # File systems with folders may list them, not what is in them (HDFS).
            with contextlib.suppress(BeamIOError):
                inside = list(_files(file_systems, found.path + "/"))
        yield from inside or (found,)


def _relative(root: str, path: str) -> str:
    name = path.removeprefix(root)
    if name == path or ".." in name.split("/"):
        raise ConfigurationError(f"model_repository: {redact_url(path)!r} is not below {redact_url(root)!r}")
    return name


def _copy(file_systems: Any, folder: Path, file: Any, name: str) -> None:
    target = folder / name
    if name.endswith("/"):
        target.mkdir(parents=True, exist_ok=True)
        return
    from apache_beam.io.filesystem import CompressionTypes

    target.parent.mkdir(parents=True, exist_ok=True)
    # By default Beam would unpack what is named .gz.
    source = file_systems.open(file.path, compression_type=CompressionTypes.UNCOMPRESSED)
    with source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, _CHUNK_BYTES)
    copied = os.path.getsize(target)
    if file.size_in_bytes is not None and copied != file.size_in_bytes:
        raise ConfigurationError(
            f"model_repository: {redact_url(file.path)!r} changed while it was copied "
            f"({file.size_in_bytes:,} bytes were listed, {copied:,} read)"
        )


def _add_version_folders(repository: Path) -> None:
    """A bucket has no empty folders, and Triton wants a version's folder even of an ensemble, which has no
    files in it."""
    for configuration in repository.glob("*/config.pbtxt"):
        if not any(entry.is_dir() and entry.name.isdigit() for entry in configuration.parent.iterdir()):
            (configuration.parent / "1").mkdir()
