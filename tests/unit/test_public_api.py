"""The public names: all present, all documented, none by accident."""

from __future__ import annotations

import inspect
import pickle
import types
from collections.abc import Iterator
from typing import Any

import pytest

import beam_triton
from beam_triton import errors
from beam_triton import testing as testing_module

# Other people's pipelines and benchmarks depend on these.
_PROMISED = {
    "BatchingPolicy",
    "CircuitBreakerPolicy",
    "ConnectionPoolConfig",
    "RetryPolicy",
    "TlsConfig",
    "TritonClient",
    "TritonInference",
    "TritonInferenceDoFn",
    "TritonModelHandler",
}


_PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (beam_triton, testing_module)
    for name in module.__all__
}


def _public_members(owner: type) -> Iterator[tuple[str, Any]]:
    """The methods and properties that a class or one of its private bases defines for users."""
    for base in owner.__mro__:
        is_ours = base.__module__.startswith("beam_triton")
        if not is_ours or (base is not owner and base in _PUBLIC.values()):
            continue
        for name, member in vars(base).items():
            unwrapped = getattr(member, "__func__", member)
            is_code = isinstance(unwrapped, types.FunctionType | property)
            if is_code and not name.startswith("_"):
                yield name, getattr(owner, name)


def test_promised_names_can_be_imported() -> None:
    """Each promised name can be imported from the package itself."""
    assert set(beam_triton.__all__) >= _PROMISED


def test_all_names_exist_once() -> None:
    """Every name in ``__all__`` exists, and none is listed twice."""
    assert len(beam_triton.__all__) == len(set(beam_triton.__all__))
    for name in beam_triton.__all__:
        assert hasattr(beam_triton, name)


def test_nothing_is_public_by_accident() -> None:
    """Every name in the package except its modules is in ``__all__``."""
    visible = {
        name
        for name, value in vars(beam_triton).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert visible == set(beam_triton.__all__)


def test_every_error_is_public() -> None:
    """A user can catch each error that the library raises by a name of the package."""
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TritonError)
    }
    assert defined <= set(beam_triton.__all__)


@pytest.mark.parametrize("name", _PUBLIC)
def test_everything_public_is_documented(name: str) -> None:
    """Each public name, and each public method and property of it, has a docstring of its own."""
    value = _PUBLIC[name]
    assert inspect.getdoc(value), f"{name} has no docstring"
    if isinstance(value, type):
        assert value.__doc__ and not value.__doc__.startswith(f"{value.__name__}("), (
            f"{name} has only the docstring that dataclasses generate"
        )
        for member_name, member in _public_members(value):
            assert inspect.getdoc(member), f"{name}.{member_name} has no docstring"


@pytest.mark.parametrize("name", sorted(_PROMISED - {"TritonClient"}))
def test_public_classes_are_found_by_pickle(name: str) -> None:
    """A class pickles by reference: workers find it under its ``__qualname__``."""
    cls = getattr(beam_triton, name)
    assert pickle.loads(pickle.dumps(cls)) is cls
