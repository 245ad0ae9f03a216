"""Where output goes: one file, or shards of one name."""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass, field

from beam_triton.errors import ConfigurationError
from beam_triton.score.encoders import OUTPUT_FORMATS
from beam_triton.score.streams import compression_of, is_compressed

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_SHARD_NUMBERS = "{shard:05d}-of-{shards:05d}"


def _split(path: str) -> tuple[str, str]:
    # As every FileSystem does it, but without asking one: its package may be on the workers only.
    folder, slash, name = path.rpartition("/")
    return folder or slash, name


def _in_folder(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def _same_for_same_file(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A path to write to, such as ``out/results.jsonl`` or ``gs://bucket/results-*.parquet``.

    A ``*`` in the name stands for the numbers of shards, ``00000-of-00042``: each worker's file is renamed
    into its place. Without one, there is one file in the end, copied together from the shards by one worker.
    ``format`` is one of `OUTPUT_FORMATS`; None is what the name's suffix says. ``temporary_folder`` is where
    files are written before they are put in place; None is a new one beside the target.
    Raises ConfigurationError for a path whose format cannot be told, or that cannot be a file.
    """

    path: str
    format: str | None = None
    temporary_folder: str = field(default="")

    def __post_init__(self) -> None:
        folder, name = _split(self.path)
        if not name or "*" in folder or name.count("*") > 1:
            raise ConfigurationError(
                f"output {self.path!r} must be a file, or shards with one * in the file's name"
            )
        if self.format is None:
            stem = name.rsplit(".", 1)[0] if is_compressed(name) else name
            found = _SUFFIXES.get("." + stem.rsplit(".", 1)[-1].lower()) if "." in stem else None
            if found is None:
                raise ConfigurationError(
                    f"output {self.path!r}: the suffix does not tell the format ({', '.join(_SUFFIXES)}); "
                    f"give the output format: {', '.join(OUTPUT_FORMATS)}"
                )
            object.__setattr__(self, "format", found)
        elif self.format not in OUTPUT_FORMATS:
            raise ConfigurationError(f"output format {self.format!r} is none of {', '.join(OUTPUT_FORMATS)}")
        if self.format == "parquet" and is_compressed(name):
            raise ConfigurationError(f"output {self.path!r}: Parquet compresses by itself")
        if not self.temporary_folder:
            hidden = f".{name.replace('*', '')}-{uuid.uuid4().hex[:12]}"
            object.__setattr__(self, "temporary_folder", _in_folder(folder, hidden))

    @property
    def is_sharded(self) -> bool:
        return "*" in _split(self.path)[1]

    @property
    def compression(self) -> str:
        return compression_of(self.path)

    def temporary_path(self) -> str:
        """A new name for a shard, with the target's suffix, so that it is compressed as the target is."""
        suffix = _split(self.path)[1].rpartition("*")[2]
        return _in_folder(self.temporary_folder, f"{uuid.uuid4().hex}-{suffix.lstrip('-_')}")

    def final_path(self, shard: int, shards: int) -> str:
        """The name of one of the shards, or of the one file."""
        folder, name = _split(self.path)
        numbered = name.replace("*", _SHARD_NUMBERS.format(shard=shard, shards=shards))
        return _in_folder(folder, numbered)

    def writes(self, path: str) -> bool:
        """Whether a run with this target replaces or deletes the file of that path, however it is written."""
        own, other = _same_for_same_file(self.path), _same_for_same_file(path)
        is_beside = _split(own)[0] == _split(other)[0]
        return own == other or (self.is_sharded and is_beside and self.is_final_path(other))

    def is_final_path(self, path: str) -> bool:
        """Whether a path is one that some run with this target wrote."""
        name = _split(self.path)[1]
        pattern = re.escape(name).replace(r"\*", r"\d{5,}-of-\d{5,}")
        return re.fullmatch(pattern, _split(path)[1]) is not None
