"""What happens to servers while a numbered run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

from beam_triton.testing import LocalTriton
from tests.support.tally import Progress


def strikes(times: int, elements: int, strike: Callable[[], None]) -> Callable[[Progress], None]:
    """Strikes at even distances within a run; a run that is over too early would prove nothing."""

    def meanwhile(progress: Progress) -> None:
        for number in range(1, times + 1):
            reached = progress.reached(number * elements // (times + 1))
            assert reached, f"the run ended before strike {number}"
            strike()

    return meanwhile


def killed_and_restarted(server: LocalTriton, away_seconds: float = 0.5) -> Callable[[], None]:
    def strike() -> None:
        server.kill()
        time.sleep(away_seconds)
        server.start()

    return strike
