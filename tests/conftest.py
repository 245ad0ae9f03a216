"""Options and markers, and closing lines that say which tests were skipped and what would run them."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import settings

from tests.support.local_process import find_binary
from tests.support.nginx import nginx_binary
from tests.support.tinyproxy import tinyproxy_binary

_NO_NGINX = "need nginx, which is not installed (Debian: apt-get install nginx-light)"
_NO_TINYPROXY = "need tinyproxy, which is not installed (Debian: apt-get install tinyproxy)"
_NO_CHROMIUM = "need chromium, which is not installed (Debian: apt-get install chromium)"
_LONG = "are long runs (make chaos, or --long)"


# A busy machine takes longer for an example now and then, which says nothing about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long tests")


def pytest_configure(config: pytest.Config) -> None:
    # Other clients (requests, gRPC, urllib) ask a proxy of the environment for servers of this machine, too.
    if "localhost,127.0.0.1" not in os.environ.get("no_proxy", ""):
        others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"localhost,127.0.0.1,::1,{others}"
    config.addinivalue_line("markers", "nginx: needs a real nginx; skipped where there is none")
    config.addinivalue_line("markers", "tinyproxy: needs a real forward proxy; skipped where there is none")
    config.addinivalue_line("markers", "chromium: needs a real browser; skipped where there is none")
    config.addinivalue_line("markers", "long: takes minutes; runs only with --long")
    for name in ("it_postcommit", "it_validatesrunner", "sickbay_direct"):
        config.addinivalue_line(
            "markers", f"{name}: of Beam's own tests, which test_beam_base_test.py imports"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_nginx = nginx_binary() is not None
    has_tinyproxy = tinyproxy_binary() is not None
    has_chromium = find_binary("chromium") is not None
    runs_long = bool(config.getoption("--long"))
    needs = (
        ("nginx", has_nginx, _NO_NGINX),
        ("tinyproxy", has_tinyproxy, _NO_TINYPROXY),
        ("chromium", has_chromium, _NO_CHROMIUM),
        ("long", runs_long, _LONG),
    )
    for item in items:
        for marker, wanted, reason in needs:
            if item.get_closest_marker(marker) and not wanted:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # From the reports, as only they reach the process that prints when tests run in several processes.
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    if not reasons:
        return
    terminalreporter.section("skipped")
    for reason, count in reasons.items():
        terminalreporter.line(f"{count} test(s) skipped: {reason}")
