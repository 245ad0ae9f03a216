"""Options, markers and the closing lines that say which tests were left out, and what would run them."""

from __future__ import annotations

import pytest

from tests.support.nginx import nginx_binary

_LEFT_OUT = pytest.StashKey[dict[str, int]]()
_NO_NGINX = "need nginx, which is not installed (Debian: apt-get install nginx-light)"
_LONG = "are long chaos runs (run them with --long)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long chaos tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nginx: needs a real nginx; left out where there is none")
    config.addinivalue_line("markers", "long: takes minutes; runs with --long only")
    config.stash[_LEFT_OUT] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_nginx = nginx_binary() is not None
    runs_long = bool(config.getoption("--long"))
    left_out = config.stash[_LEFT_OUT]
    for item in items:
        for marker, wanted, reason in (("nginx", has_nginx, _NO_NGINX), ("long", runs_long, _LONG)):
            if item.get_closest_marker(marker) and not wanted:
                item.add_marker(pytest.mark.skip(reason=reason))
                left_out[reason] = left_out.get(reason, 0) + 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[_LEFT_OUT]
    if not left_out:
        return
    terminalreporter.section("left out")
    for reason, count in left_out.items():
        terminalreporter.line(f"{count} test(s) left out: they {reason}")
