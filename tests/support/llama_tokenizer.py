"""Llama's tokenizer in plain Python, called as HuggingFace's tokenizers are.

Runs in the server as well as in tests; of the tokenizer's file it needs the vocabulary and the merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_SPACE = "\u2581"
_WORD = re.compile(f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+")


class LlamaTokenizer:
    """``tokenizer(texts)`` gives ``input_ids`` and ``attention_mask``, padded to the longest text."""

    def __init__(self, file: Path) -> None:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        self._ids: dict[str, int] = model["vocab"]
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(model["merges"])}
        self._known_words: dict[str, list[int]] = {}
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return LlamaTokenizer, (self._file,)

    def __call__(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        encoded = [self._encode(text) for text in texts]
        longest = max(map(len, encoded), default=0)
        return {
            "input_ids": [ids + [0] * (longest - len(ids)) for ids in encoded],
            "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded],
        }

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in _WORD.findall(_SPACE + text.replace(" ", _SPACE)) if text else ():
            if word not in self._known_words:
                self._known_words[word] = self._encode_word(word)
            ids += self._known_words[word]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        parts: list[str] = []
        for character in word:
            # A character without a token of its own stands for the bytes of its UTF-8.
            is_known = character in self._ids
            parts += [character] if is_known else [f"<0x{byte:02X}>" for byte in character.encode()]
        while True:
            pairs = [(self._ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in self._ranks]
            if not pairs:
                return [self._ids[part] for part in parts]
            _, first = min(pairs)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
