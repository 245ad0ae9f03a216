"""A real browser without a window, from the machine's own package, spoken to by its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

from tests.support.local_process import LocalProcess

_ANSWER_SECONDS = 30.0


class Chromium(LocalProcess):
    """A context manager that runs the browser; `open` gives a page of it."""

    name = "chromium"
    package = "chromium"

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A page that has loaded ``url``; a context manager, which closes it."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/json/new?about:blank", method="PUT")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            target = json.load(answer)
        page = Page(target["webSocketDebuggerUrl"])
        page.resize(width, height)
        page.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        page.load(url)
        return page

    def _arguments(self) -> list[str]:
        return [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={self._folder}",
            f"--remote-debugging-port={self.port}",
            "--remote-allow-origins=*",
        ]

    def error_log(self) -> str:
        return "chromium says nothing"


class Page:
    """One page of a browser.

    Attributes:
        requests: the URLs that it has asked for, its own first.
        complaints: errors and warnings of its console, and exceptions of its scripts.
    """

    def __init__(self, debugger_url: str) -> None:
        # A page of an hour's run is larger than the default of a megabyte.
        self._closing = ExitStack()
        self._socket = self._closing.enter_context(connect(debugger_url, max_size=None, proxy=None))
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._has_loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the DevTools protocol."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result

    def load(self, url: str) -> None:
        """Go there, and wait until everything of it is there."""
        self._has_loaded = False
        self.call("Page.navigate", url=url)
        while not self._has_loaded:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int, *, scale: float = 1.0) -> None:
        """Give the page's window another size, in pixels of the page."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(_ANSWER_SECONDS))
        details = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._has_loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(details["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(details["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(details["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.complaints.append(str(details["args"]))
        return message
