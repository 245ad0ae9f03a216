"""``make flink-demo``, run as the make target runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from engines.install import REPOSITORY

pytestmark = pytest.mark.timeout(600)

PROGRESS = re.compile(r"^ +\d+ s  .*?(\d+) of 898 digits scored$", re.MULTILINE)


def test_the_demo_prints_web_page_progress_and_result() -> None:
    """They come in this order, and the progress reaches the last digit."""
    command = [sys.executable, "-m", "engines.flink_demo"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        try:
            said, _ = demo.communicate(timeout=400)
        finally:
            if demo.poll() is None:
                # As Ctrl-C would: the demo then stops the cluster and the server before it ends.
                demo.send_signal(signal.SIGINT)
    assert demo.returncode == 0, said
    page = re.search(r"http://127\.0\.0\.1:\d+", said)
    progress = list(PROGRESS.finditer(said))
    result = re.search(r"^898 digits scored, 9\d\.\d% of them recognized", said, re.MULTILINE)
    assert page and progress and result, said
    assert page.start() < progress[0].start() < progress[-1].start() < result.start()
    assert progress[-1].group(1) == "898"
