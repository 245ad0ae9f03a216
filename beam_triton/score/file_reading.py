"""Whole files as rows: an image decoded, or a file's bytes as they are; each file is a row of its own."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_triton.errors import ConfigurationError
from beam_triton.flags import json_or_text
from beam_triton.score.job_report import PROGRESS
from beam_triton.score.row_reading import (
    CorruptFileError,
    Failure,
    FileSource,
    Piece,
    RowBlock,
    Wanted,
    open_file,
)
from beam_triton.validation import Options, check, one_of, positive_integer, rule

FILE, IMAGE, CONTENT = "file", "image", "content"

# Enough for a request of a usual model, little enough to share among workers.
_MAX_PIECE_FILES = 64
_MAX_PIECE_BYTES = 4 << 20


def _is_list_of(count: int) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        is_list = isinstance(value, (list, tuple)) and len(value) == count
        return is_list and all(isinstance(each, (int, float)) for each in value)

    return accepts


@dataclass(frozen=True, kw_only=True)
class ImageDecoding(Options):
    """What an image becomes before it is sent: an array of the pixels, upright as its EXIF data say.

    Attributes:
        mode: Pillow's: ``RGB``, ``L`` (grey, with one channel), ``RGBA``.
        size: ``[height, width]`` to resize to (bilinear); ``None`` keeps each image's own.
        layout: ``HWC`` or ``CHW``: where the channels are.
        rescale_factor: multiplies every value, 1/255 makes 0 to 1; then ``mean`` is subtracted and ``std``
            divided by, a value for each channel or one for all. Without any of these values stay uint8, from
            0 to 255.

    Raises:
        ConfigurationError: a value is out of range, or Pillow is not installed.
    """

    mode: str = "RGB"
    size: Sequence[int] | None = None
    layout: str = "HWC"
    rescale_factor: float | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        check(self, one_of(("RGB", "L", "RGBA")), "mode")
        check(self, one_of(("HWC", "CHW")), "layout")
        if self.size is not None:
            check(self, rule(_is_list_of(2), "[height, width]"), "size")
            for each in self.size:
                positive_integer("ImageDecoding.size", each)
        channels = _is_list_of(len(self.mode))
        number = rule(lambda value: isinstance(value, (int, float)), "a number")
        check(self, number, "rescale_factor", allow_none=True)
        for name in ("mean", "std"):
            text = f"a number or {len(self.mode)} of them, for {self.mode}"
            check(
                self,
                rule(lambda value: isinstance(value, (int, float)) or channels(value), text),
                name,
                allow_none=True,
            )

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> ImageDecoding:
        """Read ``NAME=JSON`` options; text that is no JSON is a string. Raises ConfigurationError."""
        given: dict[str, object] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals:
                raise ConfigurationError(f"--image {text!r} must be NAME=JSON, such as size=[224,224]")
            given[name] = json_or_text(value)
        return cls.from_options(given)

    def decode(self, content: bytes) -> npt.NDArray[Any]:
        """The pixels of an image file. Raises whatever Pillow does for a file that is none."""
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(content)) as opened:
            image = ImageOps.exif_transpose(opened).convert(self.mode)
        if self.size is not None:
            height, width = self.size
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels: npt.NDArray[Any] = np.asarray(image)
        if pixels.ndim == 2:
            pixels = pixels[:, :, np.newaxis]
        if (self.rescale_factor, self.mean, self.std) != (None, None, None):
            factor = 1 if self.rescale_factor is None else self.rescale_factor
            mean = np.asarray(0 if self.mean is None else self.mean, np.float32)
            std = np.asarray(1 if self.std is None else self.std, np.float32)
            pixels = (pixels * np.float32(factor) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if self.layout == "CHW" else pixels


@dataclass
class FileBlock(RowBlock):
    """Files, a row each, with its path as the column ``file``, and ``image`` or ``content``."""

    @property
    def origins(self) -> Any:
        return pa.array(self.column(FILE))

    def take(self, indices: npt.NDArray[np.int64], names: Collection[str] | None = None) -> FileBlock:
        kept = [self.objects[index] for index in indices]
        if names is not None:
            # Its pixels would travel to the results.
            kept = [{name: row[name] for name in row if name == FILE or name in names} for row in kept]
        return FileBlock(self.file, self.numbers[indices], None, kept)

    def failure(self, index: int, error: Any) -> Failure:
        return Failure(self.objects[index][FILE], None, type(error).__name__, str(error), None)


class _Files(NamedTuple):
    paths: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class AnyFileSource(FileSource):
    """Also the formats ``image`` and ``bytes``, whose files are a row each; ``images`` says how to decode."""

    images: ImageDecoding = ImageDecoding()

    def format_of(self, path: str) -> str:
        found = super().format_of(path)
        if found == IMAGE and importlib.util.find_spec("PIL") is None:
            raise ConfigurationError("images need Pillow: pip install beam-triton[image]")
        return found

    def all_pieces(self, files: Sequence[tuple[str, int]]) -> Iterator[Piece]:
        whole: dict[str, _Files] = {}
        for path, size_bytes in files:
            kind = self.format_of(path)
            if kind not in (IMAGE, "bytes"):
                yield from self.pieces(path, size_bytes)
                continue
            paths, total_bytes = whole.get(kind, _Files((), 0))
            if paths and (len(paths) == _MAX_PIECE_FILES or total_bytes + size_bytes > _MAX_PIECE_BYTES):
                yield Piece(paths[0], others=paths[1:])
                paths, total_bytes = (), 0
            whole[kind] = _Files((*paths, path), total_bytes + size_bytes)
        for paths, _ in whole.values():
            yield Piece(paths[0], others=paths[1:])

    def read(self, piece: Piece, wanted: Wanted) -> Iterator[RowBlock | Failure]:
        kind = self.format_of(piece.file)
        if kind not in (IMAGE, "bytes"):
            yield from super().read(piece, wanted)
            return
        rows: list[dict[str, Any]] = []
        for path in (piece.file, *piece.others):
            with open_file(path) as stored:
                content = stored.read()
            PROGRESS.bytes_read += len(content)
            if kind == "bytes":
                rows.append({FILE: path, CONTENT: content})
                continue
            try:
                rows.append({FILE: path, IMAGE: self.images.decode(content)})
            except Exception as error:
                # Pillow raises errors of many kinds for what is no image, or a broken one.
                message = f"{path} cannot be read as an image: {error}"
                yield Failure(path, None, CorruptFileError.__name__, message, None)
        if rows:
            yield FileBlock("", np.ones(len(rows), np.int64), None, rows)
