"""``with_exception_handling``: which failures become dead letters, and how many a job may have."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection
from apache_beam.transforms.combiners import CountCombineFn
from apache_beam.transforms.core import Windowing
from apache_beam.transforms.window import WindowFn
from apache_beam.typehints import Any as AnyType
from apache_beam.typehints import List, Tuple

from beam_triton.errors import ConfigurationError, TooManyFailuresError, TritonError
from beam_triton.transforms.results import FAILURES_TAG, DefaultResult, failure_of, split_key

_logger = logging.getLogger(__name__)

ExceptionClasses = type[BaseException] | tuple[type[BaseException], ...]
FailureCallback = Callable[[Exception, Any], None]


@dataclass(frozen=True)
class DeadLetters:
    """Which failed elements leave as dead letters, under which tag, and what makes these; the others fail
    their bundle."""

    tag: str = FAILURES_TAG
    exc_class: ExceptionClasses = Exception
    on_failure_callback: FailureCallback | None = None
    make: Callable[[Any, TritonError], Any] = failure_of

    @classmethod
    def of_option(cls, with_exception_handling: bool | DeadLetters) -> DeadLetters | None:
        """What a DoFn's argument ``with_exception_handling`` means."""
        return cls() if with_exception_handling is True else with_exception_handling or None

    def of(self, element: Any, error: TritonError) -> Any | None:
        """The element's dead letter; None where its error is not of ``exc_class``."""
        if not isinstance(error, self.exc_class):
            return None
        if self.on_failure_callback is not None:
            try:
                self.on_failure_callback(error, element)
            except Exception:
                _logger.warning("on_failure_callback failed", exc_info=True)
        return self.make(element, error)


@dataclass(frozen=True, kw_only=True)
class ExceptionHandling:
    """The arguments of ``with_exception_handling``, with the meaning that they have for Beam's ``ParDo``.

    Raises:
        ConfigurationError: a value is of the wrong kind, or cannot have a meaning here.
    """

    main_tag: str
    dead_letter_tag: str
    exc_class: ExceptionClasses
    use_subprocess: bool
    threshold: float
    threshold_windowing: WindowFn | Windowing | None
    timeout: float | None
    error_handler: Any
    on_failure_callback: FailureCallback | None

    def __post_init__(self) -> None:
        for name in ("main_tag", "dead_letter_tag"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigurationError(f"{name} must be a name, not {getattr(self, name)!r}")
        if self.main_tag == self.dead_letter_tag:
            raise ConfigurationError(f"main_tag and dead_letter_tag are both {self.main_tag!r}")
        classes = self.exc_class if isinstance(self.exc_class, tuple) else (self.exc_class,)
        if not classes or not all(
            isinstance(each, type) and issubclass(each, BaseException) for each in classes
        ):
            raise ConfigurationError(
                f"exc_class must be an exception class or a tuple of them, not {self.exc_class!r}"
            )
        if self.use_subprocess:
            raise ConfigurationError(
                "use_subprocess protects a worker from code that crashes it, but the model runs on the "
                "server, whose crash is an error like any other. Leave use_subprocess out"
            )
        if not _is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ConfigurationError(
                f"threshold is the share of elements that may fail, from 0 to 1, not {self.threshold!r}"
            )
        if self.threshold_windowing is not None and not isinstance(
            self.threshold_windowing, WindowFn | Windowing
        ):
            raise ConfigurationError(
                f"threshold_windowing must be a WindowFn such as FixedWindows(60), not "
                f"{self.threshold_windowing!r}"
            )
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0):
            raise ConfigurationError(f"timeout must be a positive number of seconds, not {self.timeout!r}")
        if self.on_failure_callback is not None and not callable(self.on_failure_callback):
            raise ConfigurationError(
                f"on_failure_callback must be callable with an exception and an element, not "
                f"{self.on_failure_callback!r}"
            )

    @property
    def dead_letters(self) -> DeadLetters:
        """What the workers need of it."""
        return DeadLetters(self.dead_letter_tag, self.exc_class, self.on_failure_callback)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Scored(tuple[Any, ...]):
    """``(results, failures)``, also by tag as Beam's own: ``scored.bad`` and ``scored["bad"]``."""

    _by_tag: dict[str, PCollection[Any]]

    def __new__(cls, results: Any, failures: Any, handling: ExceptionHandling) -> Scored:
        scored = super().__new__(cls, (results, failures))
        scored._by_tag = {handling.main_tag: results, handling.dead_letter_tag: failures}
        return scored

    def __getitem__(self, key: Any) -> Any:
        return self._by_tag[key] if isinstance(key, str) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_by_tag"][name]
        except KeyError:
            raise AttributeError(name) from None


def dead_letter_type(element_type: Any) -> Any:
    """Beam's type of the dead letters of elements of that type."""
    return Tuple[AnyType if element_type is None else element_type, Tuple[type, str, List[str]]]


class FailureThreshold(beam.PTransform[Any, Any]):
    """Fails the job when more than a share of the elements of a window failed, as Beam's ``threshold`` does.

    Applied to ``(elements, results, failures)``. A result that is the default value counts as a failure.

    Args:
        share: of the elements, from 0 to 1.
        windowing: of the counting; None: that of the elements.
        has_default: failed elements are among the results, with their default value.
    """

    def __init__(self, share: float, windowing: WindowFn | Windowing | None, *, has_default: bool) -> None:
        super().__init__()
        self._share = share
        self._windowing = windowing
        self._has_default = has_default

    def expand(self, counted: tuple[Any, Any, Any]) -> Any:
        elements, results, failures = counted
        if self._has_default:
            failures = results | "Defaults" >> beam.Filter(_is_default)
        total = beam.pvalue.AsSingleton(elements | "CountElements" >> _Count(self._windowing), 0)
        return (
            failures
            | "CountFailures" >> _Count(self._windowing)
            | "Check" >> beam.Map(_check_share, total, self._share)
        )


class _Count(beam.PTransform[Any, Any]):
    def __init__(self, windowing: WindowFn | Windowing | None) -> None:
        super().__init__()
        self._windowing = windowing

    def expand(self, pcoll: PCollection[Any]) -> Any:
        if self._windowing is not None:
            pcoll |= "Window" >> beam.WindowInto(self._windowing)
        return pcoll | "Count" >> beam.CombineGlobally(CountCombineFn()).without_defaults()


def _is_default(result: Any) -> bool:
    return isinstance(split_key(result)[2], DefaultResult)


def _check_share(failed: int, total: int, share: float, window: Any = beam.DoFn.WindowParam) -> None:
    if failed > total * share:
        raise TooManyFailuresError(
            f"{failed} of {total} elements failed, more than threshold={share:g} of them (window {window}); "
            f"the dead letters have the reasons"
        )
