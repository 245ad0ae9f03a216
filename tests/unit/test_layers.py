"""Imports only go down: the architecture, checked on the source with `ast`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parents[2] / "beam_triton"

# From the bottom up. Parts of one layer never import each other.
_LAYERS = (
    {"errors"},
    {"validation", "credentials", "compression", "doors"},
    {"auth"},
    {"protocol", "policy", "transport", "server"},
    {"dispatch", "options"},
    {"remote_model", "control_plane", "flags"},
    {"client"},
    {"transforms", "testing", "watching"},
    {"score", "rows"},
    {"cli", "yaml"},
    {"__init__", "__main__"},
)
_HEIGHT = {part: height for height, parts in enumerate(_LAYERS) for part in parts}

# What a part may import from outside the standard library; other parts may import nothing.
_THIRD_PARTIES = {
    "auth": {"botocore", "google", "requests"},
    "protocol": {"numpy"},
    "transport": {"numpy", "requests", "urllib3"},
    # Lazily, to copy models from its file systems.
    "server": {"apache_beam"},
    "dispatch": {"opentelemetry", "requests", "urllib3"},
    "control_plane": {"requests"},
    "client": {"numpy"},
    "remote_model": {"numpy"},
    "transforms": {"PIL", "apache_beam", "numpy", "pyarrow"},
    "testing": {"numpy"},
    "watching": {"rich"},
    # pyarrow and matplotlib lazily: to read a table, to draw a chart.
    "cli": {"matplotlib", "numpy", "pyarrow", "requests"},
    "score": {"PIL", "apache_beam", "numpy", "pyarrow"},
    "rows": {"apache_beam"},
    "yaml": {"apache_beam"},
}


def _part(file: Path) -> str:
    return file.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _imported_modules(file: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            if node.module == "beam_triton":
                yield from (f"beam_triton.{alias.name}" for alias in node.names)
            else:
                yield node.module


_FILES = sorted(_PACKAGE.rglob("*.py"))


def test_every_part_has_a_layer() -> None:
    """Each file and folder of the package is in the list of layers."""
    parts = {_part(file) for file in _FILES}
    assert parts <= set(_HEIGHT), f"add these to a layer: {parts - set(_HEIGHT)}"
    assert len(_FILES) > 20


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(_PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    """A file imports its own part and lower layers, nothing above and no sibling."""
    part = _part(file)
    assert part in _HEIGHT, f"add {part} to a layer"
    for module in _imported_modules(file):
        if not module.startswith("beam_triton."):
            continue
        imported = module.split(".")[1]
        assert imported in _HEIGHT, f"{file} imports {module}, which is not in the package"
        assert imported == part or _HEIGHT[imported] < _HEIGHT[part], f"{file} imports {module}"


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(_PACKAGE)))
def test_third_parties_stay_in_their_layers(file: Path) -> None:
    """Each part imports only the third-party packages that its layer allows."""
    allowed = _THIRD_PARTIES.get(_part(file), set()) | {"beam_triton"}
    for module in _imported_modules(file):
        root = module.split(".")[0]
        assert root in sys.stdlib_module_names or root in allowed, f"{file} imports {module}"


def test_nested_imports_are_found(tmp_path: Path) -> None:
    """Imports inside functions and conditions count, too."""
    source = tmp_path / "source.py"
    source.write_text("def f():\n    import a.b\nif f:\n    from c.d import e\nfrom beam_triton import g\n")
    assert set(_imported_modules(source)) == {"a.b", "c.d", "beam_triton.g"}
