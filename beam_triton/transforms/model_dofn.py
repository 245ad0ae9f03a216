"""What the DoFns that score have in common: a model from setup to teardown, and a scorer for each bundle."""

import logging
import weakref
from typing import Protocol

import apache_beam as beam

from beam_triton.dispatch.channel import Channel
from beam_triton.errors import ConfigurationError
from beam_triton.options import InferenceOptions
from beam_triton.remote_model import RemoteModel
from beam_triton.transforms.opened_model import close_with, open_model
from beam_triton.transforms.results import DefaultValue

_logger = logging.getLogger(__name__)


class Scorer(Protocol):
    """What a bundle's elements are on their way in."""

    def cancel(self) -> None: ...


class ModelDoFn(beam.DoFn):
    """Holds a model, and a reference to the process's session, from ``setup`` to ``teardown``.

    A subclass makes ``_scorer`` in ``start_bundle``.

    Raises:
        ConfigurationError: ``model_name`` is no name.
    """

    def __init__(self, options: InferenceOptions, model_name: str) -> None:
        if not isinstance(model_name, str) or not model_name:
            raise ConfigurationError(f"model_name must be the model's name, not {model_name!r}")
        self._options = options
        self._model_name = model_name
        self._model: RemoteModel | None = None
        self._default: DefaultValue | None = None
        self._scorer: Scorer | None = None
        self._release: weakref.finalize[[Channel], ModelDoFn] | None = None

    def setup(self) -> None:
        """Ask for the model and take a reference to the shared session."""
        self._model, self._default = open_model(self._options, self._model_name)
        self._release = close_with(self, self._model)

    def teardown(self) -> None:
        """Give the reference to the shared session back. Never raises; may be called twice."""
        try:
            self._cancel()
            if self._release is not None:
                self._release.detach()
            if self._model is not None:
                self._model.close()
        except Exception:
            _logger.exception("teardown could not give everything back")
        self._model = None

    def _cancel(self) -> None:
        """Let go of what the bundle has in flight, if anything."""
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.cancel()
