"""Images and whole files as rows: what is decoded, what is batched, what fails."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beam_triton.errors import ConfigurationError
from beam_triton.score import score_command
from beam_triton.score.file_reading import AnyFileSource, ImageDecoding
from beam_triton.score.row_reading import Failure, RowBlock
from beam_triton.testing import FakeModel, FakeTriton

PIXELS = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)

BRIGHTNESS = FakeModel(
    lambda inputs: {"mean": inputs["pixels"].mean(axis=(1, 2, 3), keepdims=True)[:, :, 0, 0]},
    inputs={"pixels": ("FP32", [-1, -1, 3])},
    outputs={"mean": ("FP32", [1])},
)
SIZE = FakeModel(
    lambda inputs: {"bytes": [[len(content)] for content in inputs["content"][:, 0]]},
    inputs={"content": ("BYTES", [1])},
    outputs={"bytes": ("INT64", [1])},
)


def png(pixels: Any = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_image_is_decoded_to_its_pixels() -> None:
    """Without options: RGB, as they are in the file, rows first."""
    pixels = ImageDecoding().decode(png())
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, PIXELS)


def test_options_resize_scale_and_turn_the_image() -> None:
    """In the order of every image processor: size, factor, mean and standard deviation, layout."""
    texts = ["size=[2,3]", "rescale_factor=0.5", "mean=[1,2,3]", "std=2", "layout=CHW"]
    grey = np.full((6, 6, 3), 8, np.uint8)
    pixels = ImageDecoding.from_texts(texts).decode(png(grey))
    assert pixels.dtype == np.float32 and pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 0].tolist() == [1.5, 1.0, 0.5]


def test_grey_image_has_one_channel() -> None:
    """Whatever the file has."""
    assert ImageDecoding(mode="L").decode(png()).shape == (5, 4, 1)


def test_image_is_turned_upright(tmp_path: Path) -> None:
    """A camera says in EXIF how it was held."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "photo.jpg", exif=exif)
    assert ImageDecoding().decode((tmp_path / "photo.jpg").read_bytes()).shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size", "must be NAME=JSON"),
        ("size=3", r"\[height, width\]"),
        ("size=[0,3]", "ImageDecoding.size"),
        ("mode=CMYK", "ImageDecoding.mode"),
        ("layout=chw", "ImageDecoding.layout"),
        ("mean=[1,2]", "3 of them, for RGB"),
        ("scale=2", "has no option 'scale'"),
    ],
)
def test_options_that_cannot_be_are_refused(text: str, message: str) -> None:
    """By their names."""
    with pytest.raises(ConfigurationError, match=message):
        ImageDecoding.from_texts([text])


def test_files_share_a_piece_up_to_its_limits() -> None:
    """64 files or 4 MiB; rows of files travel as before, and a format of its own is a piece of its own."""
    source = AnyFileSource()
    files = [(f"{n:03}.png", 1000) for n in range(100)] + [("a.csv", 9), ("b.png", 5 << 20)]
    pieces = list(source.all_pieces(files))
    assert sorted(1 + len(piece.others) for piece in pieces) == [1, 1, 36, 64]
    assert {path for piece in pieces for path in (piece.file, *piece.others)} == {path for path, _ in files}


def test_broken_image_is_a_failure_of_its_own(tmp_path: Path) -> None:
    """The others of its piece are read."""
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    broken = png(noise)[:2000]
    for name, content in (("a", png()), ("b", b"no image"), ("c", broken)):
        (tmp_path / f"{name}.png").write_bytes(content)
    source = AnyFileSource()
    (piece,) = source.all_pieces([(str(tmp_path / f"{name}.png"), 1) for name in "abc"])
    items = list(source.read(piece, lambda names: names))
    failed = [item for item in items if isinstance(item, Failure)]
    (block,) = [item for item in items if isinstance(item, RowBlock)]
    assert [Path(failure.file).name for failure in failed] == ["b.png", "c.png"]
    assert all("cannot be read as an image" in failure.message for failure in failed)
    assert len(block) == 1


def score(*arguments: object) -> int:
    return score_command.main([*map(str, arguments), "--progress_seconds=0"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images_are_scored_from_the_command_line(tmp_path: Path) -> None:
    """In batches; each result is found by its file, and a broken image is among the failures."""
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(png(np.full((4, 4, 3), number, np.uint8)))
    (tmp_path / "broken.png").write_bytes(b"no image")
    output = tmp_path / "results.jsonl"
    with FakeTriton({"brightness": BRIGHTNESS}) as triton:
        code = score(
            *("--files", tmp_path / "*.png", "--endpoint", triton.endpoint, "--model", "brightness"),
            *(
                "--input",
                "pixels=image",
                "--image",
                "rescale_factor=0.5",
                "--keep",
                "file",
                "--output",
                output,
            ),
        )
        assert [request.batch_size for request in triton.requests] == [20]
    assert code == 0
    means = {Path(result["file"]).stem: result["mean"] for result in lines(output)}
    assert means == {str(number): number / 2 for number in range(20)}
    (failure,) = lines(tmp_path / "results-failures.jsonl")
    assert failure["file"].endswith("broken.png") and failure["data"] is None


def test_files_are_scored_as_bytes(tmp_path: Path) -> None:
    """Models that decode by themselves get what is in the file, image or not."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b").write_bytes(b"\0\xff")
    output = tmp_path / "out" / "results.jsonl"
    with FakeTriton({"size": SIZE}) as triton:
        code = score(
            *("--files", tmp_path / "a.png", tmp_path / "b", "--input_format", "bytes", "--with_origin"),
            *("--endpoint", triton.endpoint, "--model", "size", "--output", output),
        )
    assert code == 0
    found = {Path(result["file"]).name: (result["row"], result["bytes"]) for result in lines(output)}
    assert found == {"a.png": (1, len(png())), "b": (1, 2)}
