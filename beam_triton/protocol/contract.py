"""Whether a served model keeps the contract of a lock file: every difference, and which of them do harm.

Harmful is what may make an element unfit or change a result's name, datatype or shape. A pipeline built for
the locked model runs on unchanged with a model that differs harmlessly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

from beam_triton.protocol.model import ModelSpec, TensorSpec


class Difference(NamedTuple):
    """A sentence about the served model, such as ``input 'x' is FP64, not FP32``."""

    text: str
    is_harmful: bool


def differences(
    locked: ModelSpec,
    served: ModelSpec,
    *,
    outputs: Collection[str] | None = None,
    max_batch_size: int | None = None,
) -> list[Difference]:
    """How ``served`` differs from ``locked``, the harmful differences first.

    ``outputs`` are those in use (None: all that are locked). Batch limits above ``max_batch_size`` are equal
    to whoever wants no more. Where one of the two names no inputs or no outputs, these are not compared.
    """
    found = [*_of_inputs(locked, served), *_of_outputs(locked, served, outputs)]
    for flag, kind in (("decoupled", "is decoupled"), ("sequence_batching", "batches sequences")):
        if getattr(served, flag) != getattr(locked, flag):
            now = getattr(served, flag)
            found.append(Difference(f"it {kind} now" if now else f"it {kind} no longer", now))
    limits = [min(spec.max_batch_size, max_batch_size or spec.max_batch_size) for spec in (served, locked)]
    if limits[0] != limits[1]:
        found.append(
            Difference(f"max_batch_size is {served.max_batch_size}, not {locked.max_batch_size}", False)
        )
    for name in ("version", "platform"):
        now, before = getattr(served, name), getattr(locked, name)
        if now and before and now != before:
            found.append(Difference(f"its {name} is {now}, not {before}", False))
    return sorted(found, key=lambda difference: not difference.is_harmful)


def agreed(locked: ModelSpec, served: ModelSpec, outputs: Collection[str] | None = None) -> ModelSpec:
    """The served model as the lock allows it to be used, where no difference is harmful.

    Tensors are the locked ones, except for outputs that are not in use, which may have changed; a request
    holds no more elements than either of them says, and one at least.
    """
    now = {output.name: output for output in served.outputs}
    kept = [
        output if outputs is None or output.name in outputs else now.get(output.name)
        for output in locked.outputs
    ]
    return replace(
        served,
        inputs=locked.inputs or served.inputs,
        outputs=tuple(filter(None, kept if served.outputs else locked.outputs)) or served.outputs,
        max_batch_size=min(max(locked.max_batch_size, 1), served.max_batch_size),
    )


def _of_inputs(locked: ModelSpec, served: ModelSpec) -> Iterator[Difference]:
    if not locked.inputs or not served.inputs:
        return
    now = {tensor.name: tensor for tensor in served.inputs}
    for tensor in locked.inputs:
        other = now.pop(tensor.name, None)
        yield from _of_tensor("input", tensor, other, is_used=True)
        if other is not None and other.optional != tensor.optional:
            kind = "optional" if other.optional else "required"
            yield Difference(f"input {tensor.name!r} is {kind} now", not other.optional)
    for tensor in now.values():
        kind = "new" if tensor.optional else "new, and required"
        yield Difference(f"input {tensor.describe()} is {kind}", not tensor.optional)


def _of_outputs(
    locked: ModelSpec, served: ModelSpec, outputs: Collection[str] | None
) -> Iterator[Difference]:
    if not locked.outputs or not served.outputs:
        return
    now = {tensor.name: tensor for tensor in served.outputs}
    for tensor in locked.outputs:
        is_used = outputs is None or tensor.name in outputs
        other = now.pop(tensor.name, None)
        yield from _of_tensor("output", tensor, other, is_used=is_used)
        if other is not None and (tensor.name in served.whole_outputs) != (
            tensor.name in locked.whole_outputs
        ):
            whole = "no" if tensor.name in served.whole_outputs else "a"
            yield Difference(f"output {tensor.name!r} has {whole} batch dimension now", is_used)
    for tensor in now.values():
        yield Difference(f"output {tensor.describe()} is new", False)


def _of_tensor(
    side: str, locked: TensorSpec, served: TensorSpec | None, *, is_used: bool
) -> Iterator[Difference]:
    what = f"{side} {locked.name!r}"
    if served is None:
        yield Difference(f"{what} is gone", is_used)
        return
    if served.datatype != locked.datatype:
        yield Difference(f"{what} is {served.datatype}, not {locked.datatype}", is_used)
    if served.shape != locked.shape:
        # An input may take more shapes than before, an output have fewer.
        few, many = (locked, served) if side == "input" else (served, locked)
        fits = len(few.shape) == len(many.shape) and all(
            size in (-1, one) for one, size in zip(few.shape, many.shape, strict=True)
        )
        text = f"{what} has shape {list(served.shape)}, not {list(locked.shape)}"
        yield Difference(text, is_used and not fits)
