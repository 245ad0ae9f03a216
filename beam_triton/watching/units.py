"""Numbers as people read them."""

from __future__ import annotations


def number(value: float) -> str:
    """A count or a mean: 1,234, and one decimal below ten where it is no whole number."""
    if abs(value) >= 9.95 or abs(value - round(value)) < 0.05:
        return f"{value:,.0f}"
    return f"{value:.1f}"


def duration(seconds: float) -> str:
    """A latency, in three digits: 850 µs, 12.3 ms, 1.2 s."""
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def clock(seconds: float) -> str:
    """The length of a run: 0:07, 12:34, 1:02:03."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def span(seconds: float) -> str:
    """The same in words: 7.2 s, 12 min 34 s, 1 h 2 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s"


def size(nbytes: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= factor:
            return (
                f"{nbytes / factor:,.3g} {unit}"
                if nbytes < 1e3 * factor
                else f"{nbytes / factor:,.0f} {unit}"
            )
    return f"{nbytes:.0f} B"
