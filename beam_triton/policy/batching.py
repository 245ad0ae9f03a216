"""Which elements share a request: buffers by tensor signature, and a batch whenever one is full.

Elements of different signatures (tensor shapes, optional inputs) cannot share a request, so each signature
fills a batch of its own. With ``bucket_boundaries`` elements of several lengths have one signature, that of
their bucket; `protocol/padding.py` pads them.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeAlias, TypeVar

from beam_triton.errors import ConfigurationError
from beam_triton.policy.learned_size import LearnedSizes, SizeLimits
from beam_triton.validation import Options, check, not_negative, positive_integer, rule

# How many full batches' bytes, and how many signatures, may be buffered at a time.
_MAX_PENDING_BATCHES = 4
_MAX_OPEN_SIGNATURES = 1024

Item = TypeVar("Item")
PadValue: TypeAlias = bool | int | float | str | bytes


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_pad_value(value: Any) -> bool:
    return isinstance(value, (numbers.Real, str, bytes))


def _is_mapping(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(_is_name(key) and of(value[key]) for key in value)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and len(value) > 0 and all(map(of, value))


def _are_boundaries(value: Any) -> bool:
    if not _is_list(value, lambda each: type(each) is int):
        return False
    return all(below < above for below, above in pairwise([0, *value]))


def _is_padding(value: Any) -> bool:
    return _is_pad_value(value) or _is_mapping(value, _is_pad_value) or _is_list(value, _is_padding_of_inputs)


def _is_padding_of_inputs(value: Any) -> bool:
    return _is_mapping(value, _is_pad_value)


_boundaries = rule(_are_boundaries, "a list of whole numbers in ascending order, such as [32, 64, 128]")
_padding = rule(
    _is_padding, "a value to pad with, a mapping of input names to values, or a list of such mappings"
)
_mask = rule(
    lambda value: _is_name(value) or _is_list(value, _is_name), "the name of an input, or a list of them"
)
_lengths_of_outputs = rule(
    lambda value: _is_mapping(value, lambda name: name is None or _is_name(name)),
    "a mapping of output names to input names or None",
)


@dataclass(frozen=True, kw_only=True)
class BatchingPolicy(Options):
    """When a batch is full, or has waited long enough.

    Attributes:
        max_batch_size: elements per request; ``None`` takes the model's own limit, and a larger value is
            reduced to it, because Triton refuses a larger batch and never splits one.
        max_batch_bytes: tensor bytes per request; a larger element is sent alone. More than a few MiB gain
            nothing for elements of 16 KiB to 4 MiB (docs/tuning.md) and cost memory in client and server;
            raise it for a model that is much better at larger batches of large elements.
        linger_seconds: how long a batch that is not full waits for more elements of its bundle; 0
            keeps it until it is full or the bundle ends.
        bucket_boundaries: lengths in ascending order, such as ``[32, 64, 128]``: elements of different
            lengths share requests, each padded to the first boundary that is not below its length, and
            outputs of the padded length are cut back. ``None`` pads nothing: elements of equal shapes share a
            request. All variable dimensions (-1) of the model's inputs count as lengths, an image's height
            and width each by itself. Padding goes to the boundary, not to the longest element, so that the
            server meets few shapes: Triton's dynamic batching joins requests of equal shapes only, and
            TensorRT, XLA and ``torch.compile`` prepare each new shape. Beyond the last boundary each bucket
            ends at twice the length of the one before, and its elements are padded to the longest of their
            request, as the model may take no more. ``max_batch_bytes`` counts padding.
        pad: the value to pad with: one for all inputs; or input name to value, and other inputs are not
            padded. ``None`` is 0, and ``b""`` for BYTES. Inputs with as many variable dimensions must agree
            in an element's lengths (token ids and their mask). Inputs of independent lengths, such as a query
            and a document, come in a list: ``[{"query": 0, "query_mask": 0}, {"document": 0}]``.
        mask: the input that is 1 where an element has values and 0 where it is padded, or a list of such
            inputs; made where an element does not give it.
        cut_outputs: output name to the input whose lengths it has, or to ``None`` if it is never to be cut,
            for outputs that the rule gets wrong. The rule: an output has the lengths of the inputs with as
            many variable dimensions, or else of the only inputs with one; and is cut in those variable
            dimensions that are of the padded size in the answer.

    Raises:
        ConfigurationError: a value is out of range; or, on the worker, does not fit the model.
    """

    max_batch_size: int | None = None
    max_batch_bytes: int = 4 * 1024 * 1024
    linger_seconds: float = 0.0
    bucket_boundaries: Sequence[int] | None = None
    pad: PadValue | Mapping[str, PadValue] | Sequence[Mapping[str, PadValue]] | None = None
    mask: str | Sequence[str] | None = None
    cut_outputs: Mapping[str, str | None] | None = None

    def __post_init__(self) -> None:
        check(self, positive_integer, "max_batch_size", allow_none=True)
        check(self, positive_integer, "max_batch_bytes")
        check(self, not_negative, "linger_seconds")
        check(self, _boundaries, "bucket_boundaries", allow_none=True)
        check(self, _padding, "pad", allow_none=True)
        check(self, _mask, "mask", allow_none=True)
        check(self, _lengths_of_outputs, "cut_outputs", allow_none=True)
        if self.bucket_boundaries is None:
            for name in ("pad", "mask", "cut_outputs"):
                if getattr(self, name) is not None:
                    raise ConfigurationError(
                        f"BatchingPolicy.{name} needs bucket_boundaries, such as [32, 64, 128]"
                    )

    def limits(self, model_limit: int, learned: LearnedSizes | None = None) -> SizeLimits:
        """How large batches may be for a model of this ``max_batch_size``, of which ``learned`` is known.

        A ``model_limit`` of 0 means that the model has no batch dimension: every element travels alone.
        """
        rows = min(model_limit, self.max_batch_size or model_limit) if model_limit > 0 else 1
        return SizeLimits(rows, self.max_batch_bytes, learned)


class Batcher(Generic[Item]):
    """Collects items into batches of one signature each. Not thread-safe: one bundle owns it.

    ``clock`` gives monotonic seconds, and is read only where the policy lets batches linger; ``model_limit``
    and ``learned`` are as for `BatchingPolicy.limits`.

    Buffers are bounded by four times ``max_batch_bytes`` and by 1,024 signatures. Beyond the first the
    largest batch leaves before it is full, beyond the second the oldest.

    Attributes:
        left_early: how many batches have left for one of these bounds.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        model_limit: int,
        clock: Callable[[], float],
        learned: LearnedSizes | None = None,
    ) -> None:
        self._limits = policy.limits(model_limit, learned)
        self._max_pending_bytes = _MAX_PENDING_BATCHES * policy.max_batch_bytes
        self._linger_seconds = policy.linger_seconds
        self._clock = clock
        # In the order in which the batches were begun.
        self._open: dict[Hashable, _OpenBatch[Item]] = {}
        self.pending_bytes = 0
        self.left_early = 0

    @property
    def pending_count(self) -> int:
        """How many items wait."""
        return sum(len(batch.items) for batch in self._open.values())

    def add(self, signature: Hashable, item: Item, nbytes: int) -> list[Item] | None:
        """Add ``item`` of ``nbytes`` tensor bytes; returns the batch that has to leave for it, or None.

        The batch that leaves need not hold ``item``, nor be of its signature.
        """
        batch = self._open.get(signature)
        if batch is None:
            return self._begin(signature, item, nbytes)
        size = batch.nbytes + nbytes
        if size > batch.max_bytes:
            return self._overflow(signature, batch, item, nbytes)
        items = batch.items
        items.append(item)
        if len(items) >= batch.max_rows:
            return self._remove(signature)
        batch.nbytes = size
        self.pending_bytes += nbytes
        if self.pending_bytes > self._max_pending_bytes:
            return self._remove_largest()
        return None

    def expired(self) -> list[list[Item]]:
        """The batches that have waited for ``linger_seconds``, the oldest first."""
        if not self._linger_seconds or not self._open:
            return []
        begun_before = self._clock() - self._linger_seconds
        old = []
        for signature, batch in self._open.items():
            if batch.begun_at > begun_before:
                break
            old.append(signature)
        return [self._remove(signature) for signature in old]

    def usual_limit(self) -> int:
        """How many items like those that wait a batch holds; 0 where none does."""
        if not self._open:
            return 0
        first = next(iter(self._open.values()))
        item_bytes = max(1, self.pending_bytes // self.pending_count)
        return max(1, min(first.max_rows, first.max_bytes // item_bytes))

    def drain(self) -> list[list[Item]]:
        """Everything buffered, the oldest batch first; nothing is buffered afterwards."""
        batches = [batch.items for batch in self._open.values()]
        self._open.clear()
        self.pending_bytes = 0
        return batches

    def _begin(self, signature: Hashable, item: Item, nbytes: int) -> list[Item] | None:
        max_rows, max_bytes = self._limits.next_batch()
        if max_rows == 1 or nbytes >= max_bytes:
            return [item]
        leaving = None
        if len(self._open) == _MAX_OPEN_SIGNATURES:
            oldest, batch = next(iter(self._open.items()))
            if self.pending_bytes - batch.nbytes + nbytes > self._max_pending_bytes:
                return [item]
            leaving = self._remove(oldest)
            self.left_early += 1
        self._open_batch(signature, item, nbytes, max_rows, max_bytes)
        if self.pending_bytes > self._max_pending_bytes:
            leaving = self._remove_largest()
        return leaving

    def _overflow(self, signature: Hashable, batch: _OpenBatch[Item], item: Item, nbytes: int) -> list[Item]:
        # The larger part leaves, so that the buffer never grows here.
        if nbytes >= batch.nbytes:
            return [item]
        leaving = self._remove(signature)
        self._open_batch(signature, item, nbytes, *self._limits.next_batch())
        return leaving

    def _open_batch(
        self, signature: Hashable, item: Item, nbytes: int, max_rows: int, max_bytes: int
    ) -> None:
        begun_at = self._clock() if self._linger_seconds else 0.0
        self._open[signature] = _OpenBatch([item], nbytes, begun_at, max_rows, max_bytes)
        self.pending_bytes += nbytes

    def _remove(self, signature: Hashable) -> list[Item]:
        batch = self._open.pop(signature)
        self.pending_bytes -= batch.nbytes
        return batch.items

    def _remove_largest(self) -> list[Item]:
        self.left_early += 1
        return self._remove(max(self._open, key=lambda signature: self._open[signature].nbytes))


@dataclass(eq=False, slots=True)
class _OpenBatch(Generic[Item]):
    items: list[Item]
    nbytes: int
    begun_at: float
    max_rows: int
    max_bytes: int
