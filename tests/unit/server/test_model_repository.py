"""Copies of model repositories from Beam's file systems: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from beam_triton import ConfigurationError
from beam_triton.server.model_repository import copy_repository
from tests.support.bucket import Bucket, BucketFileSystem

FILES = {
    "resnet/config.pbtxt": b"backend: ...",
    "resnet/1/model.onnx": os.urandom(1000),
    "resnet/2/model.onnx": os.urandom(2000),
    "resnet/2/vocabulary.txt.gz": b"\x1f\x8b not unpacked",
    "both/config.pbtxt": b"platform: ensemble",
    "empty/1/__init__.py": b"",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "source"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("lists_folders", [False, True], ids=["as an object store", "as HDFS"])
@pytest.mark.parametrize("ending", ["", "/"])
def test_every_file_keeps_its_place_and_its_bytes(
    lists_folders: bool, ending: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are folders, files named .gz stay packed, and an ensemble gets the version that it needs."""
    monkeypatch.setattr(BucketFileSystem, "folders_listed", lists_folders)
    bucket = Bucket(tmp_path / "bucket", "models", source)
    size = copy_repository(f"{bucket.url}/models{ending}", tmp_path / "copy")
    assert files_of(tmp_path / "copy") == FILES
    assert size == sum(map(len, FILES.values()))
    assert (tmp_path / "copy" / "both" / "1").is_dir()
    assert not (tmp_path / "copy" / "resnet" / "3").exists()
    assert not (tmp_path / "copy.partial").exists()


def test_another_folder_that_begins_alike_is_not_copied(source: Path, tmp_path: Path) -> None:
    """A listing of a bucket goes by the beginning of names."""
    bucket = Bucket(tmp_path / "bucket", "models", source)
    (tmp_path / "bucket" / "objects" / "models_old").mkdir()
    (tmp_path / "bucket" / "objects" / "models_old" / "config.pbtxt").write_text("old")
    copy_repository(f"{bucket.url}/models", tmp_path / "copy")
    assert files_of(tmp_path / "copy") == FILES


def test_an_empty_repository_is_refused(source: Path, tmp_path: Path) -> None:
    """A URL with a fault holds nothing."""
    bucket = Bucket(tmp_path / "bucket", "models", source)
    with pytest.raises(ConfigurationError, match=r"nothing' holds no files, or does not exist"):
        copy_repository(f"{bucket.url}/nothing", tmp_path / "copy")


def test_a_scheme_that_beam_does_not_know_is_named(tmp_path: Path) -> None:
    """With Beam's advice which package brings it."""
    with pytest.raises(ConfigurationError, match=r"'ftp://host/models' cannot be copied.*ValueError"):
        copy_repository("ftp://host/models", tmp_path / "copy")


def test_a_repository_that_is_too_large_is_refused_before_it_fills_the_disk(
    source: Path, tmp_path: Path
) -> None:
    """Both figures are in the message."""
    os.truncate(source / "resnet/1/model.onnx", 8 << 40)
    bucket = Bucket.__new__(Bucket)
    bucket.url = f"bucket://{str(tmp_path).lstrip('/')}"
    with pytest.raises(
        ConfigurationError, match=r"takes 8,796,09\d,\d{3},\d{3} bytes, and .* has [\d,]+ free"
    ):
        copy_repository(f"{bucket.url}/source", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_nothing_is_left_of_a_copy_that_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the file system's own error."""
    bucket = Bucket(tmp_path / "bucket", "models", source)
    broken = tmp_path / "bucket" / "objects" / "models" / "resnet" / "2" / "model.onnx"
    real = BucketFileSystem.open

    def open_but_one(self: BucketFileSystem, path: str, *options: str, **more: str) -> object:
        if path.endswith("2/model.onnx"):
            broken.unlink(missing_ok=True)
        return real(self, path, *options, **more)

    monkeypatch.setattr(BucketFileSystem, "open", open_but_one)
    with pytest.raises(ConfigurationError, match=r"cannot be copied to .*FileNotFoundError"):
        copy_repository(f"{bucket.url}/models", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "copy.partial").exists()
