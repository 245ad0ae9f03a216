"""The lock file: a model's contract as text that people read and version control compares.

It says what `beam_triton.protocol.ModelSpec` says, a line a tensor, and holds a hash of the contract: a file
that was edited, or merged wrongly, is found out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_ABOUT = "Written by python -m beam_triton lock. Lock the model again rather than edit this."
_HASH = "contract_sha256"
# What may change while elements and results stay as they are.
_VOLATILE = ("version", "platform")
_SIDES = ("inputs", "outputs")


def contract_hash(contract: Mapping[str, Any]) -> str:
    """SHA-256 of what elements and results depend on; the order of the tensors makes no difference."""
    fixed = {key: value for key, value in contract.items() if key not in _VOLATILE}
    for side in _SIDES:
        fixed[side] = sorted(map(_canonical, fixed.get(side, ())))
    return hashlib.sha256(_canonical(fixed).encode()).hexdigest()


def lock_text(contract: Mapping[str, Any]) -> str:
    """The text of the file. ``contract`` has the fields of a ModelSpec, its tensors as dicts."""
    document = {"about": _ABOUT, **contract, _HASH: contract_hash(contract)}
    lines = []
    for key, value in document.items():
        text = json.dumps(value, ensure_ascii=False)
        if key in _SIDES and value:
            tensors = (f"    {json.dumps(tensor, ensure_ascii=False)}" for tensor in value)
            text = "[\n" + ",\n".join(tensors) + "\n  ]"
        lines.append(f'  "{key}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def contract_of(text: str) -> dict[str, Any]:
    """The contract that the text of a file holds.

    Raises ValueError for what is no lock file as it was written; the message follows the file's name.
    """
    try:
        contract = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}), and so no lock file") from None
    if not isinstance(contract, dict) or _HASH not in contract:
        raise ValueError(f"is JSON without {_HASH}, and so no lock file")
    said = contract.pop(_HASH)
    contract.pop("about", None)
    try:
        found = contract_hash(contract)
    except TypeError:
        found = ""
    if said != found:
        raise ValueError(f"has been edited: its {_HASH} is not that of its contents")
    return contract


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
