"""The documentation names files and tests that exist."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from beam_triton import BatchingPolicy, CircuitBreakerPolicy, ConnectionPoolConfig, RetryPolicy, TlsConfig
from beam_triton.options import InferenceOptions
from benchmarks.__main__ import PAGES as MEASURED_PAGES
from benchmarks.__main__ import RESULTS, results_of
from benchmarks.cases import CASES, NAMED_CASES
from benchmarks.tables import filled_text
from tests.support.pages import blocks_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
POLICIES = {
    "batching": BatchingPolicy,
    "circuit_breaker": CircuitBreakerPolicy,
    "pool": ConnectionPoolConfig,
    "retry": RetryPolicy,
    "tls": TlsConfig,
}
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
EXCERPT = re.compile(r"<!-- from: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
CODE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    """Each test that a page names exists under that name."""
    for file, test in TEST_NAME.findall(page.read_text(encoding="utf-8")):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{page.name} names {file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_excerpts_are_lines_of_their_file(page: Path) -> None:
    """An example that a page takes from a pipeline is there, word for word, where a test runs it."""
    for file, excerpt in EXCERPT.findall(page.read_text(encoding="utf-8")):
        lines = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        for line in filter(None, map(str.strip, excerpt.splitlines())):
            assert line in lines, f"{page.name} has {line!r}, which is not in {file}"


@pytest.mark.parametrize("page", MEASURED_PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    """The measured figures on a page are those of the stored results."""
    text = page.read_text(encoding="utf-8")
    assert "<!-- measured: " in text
    assert filled_text(text, results_of(RESULTS)) == text


def test_every_case_has_results() -> None:
    """All cases of ``make bench``, and the engines."""
    assert {result.case for result in results_of(RESULTS)} == {case.name for case in (*CASES, *NAMED_CASES)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """A relative link leads to a file of the repository."""
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def slugs_of(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "beam_triton/policy/diagnosis.py"], ids=lambda page: page.name
)
def test_links_lead_to_headings(page: Path) -> None:
    """On GitHub as on the site; also those of the advice that `explain` gives."""
    text = CODE.sub("", page.read_text(encoding="utf-8")).replace("{_TUNING}", "docs/tuning.md")
    found = re.findall(r"([\w/.-]+\.md)#([\w-]+)", text)
    for file, heading in found:
        target = (ROOT if page.suffix == ".py" else page.parent) / file
        assert heading in slugs_of(target), f"{page.name} links to {file}#{heading}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_python_examples_are_run(page: Path) -> None:
    """Each is an excerpt of what tests run, says why it is not run, or is on a page that a test runs."""
    unmarked = [block.line for block in blocks_of(page) if block.language == "python" and not block.marker]
    tests = {
        test.name: test.read_text("utf-8") for test in (ROOT / "tests" / "integration").glob("test_*.py")
    }
    named = any(f'"{page.name}"' in source for source in tests.values())
    runs = named or f'"{page.stem}"' in tests["test_pages.py"]
    assert runs or not unmarked, f"no test runs {page.name}, with examples in the lines {unmarked}"


def defaults_of_options() -> dict[str, object]:
    """Every option and every field of a policy, with its default."""
    defaults: dict[str, object] = {}
    for option in fields(InferenceOptions):
        kind = POLICIES.get(option.name)
        if kind is None or option.name == "circuit_breaker":
            defaults[option.name] = option.default
        if kind is not None:
            defaults.update({f"{option.name}.{each.name}": each.default for each in fields(kind)})
    return defaults


def shown_default(value: object) -> str:
    if value is MISSING:
        return ""
    return "none" if value is None else f"`{value}`" if isinstance(value, bool) else f"{value:g}"


def test_every_option_has_its_row() -> None:
    """docs/options.md has each option with its default, and no other; what it costs and when to change it
    is for people to judge."""
    rows = re.findall(
        r"^\| `([\w.]+)` \| ([^|]*?) ?\| [^|]*\|",
        (ROOT / "docs" / "options.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert sorted(name for name, _ in rows) == sorted(defaults_of_options())
    odd = {
        "batching.max_batch_bytes": "4 MiB",
        "max_response_bytes": "1 GiB",
        "circuit_breaker": "`CircuitBreakerPolicy()`",
    }
    for name, default in rows:
        value = defaults_of_options()[name]
        expected = odd.get(name) or (f'`"{value}"`' if isinstance(value, str) else shown_default(value))
        assert default == expected, f"{name} is {value!r} by default"
