"""A range of time as callers say it: whole seconds since 1970."""

from __future__ import annotations

from redishacks._units import Instant, instant
from redishacks.errors import UsageError


def range_of(start: Instant, end: Instant | None) -> tuple[int, int | None]:
    """Return a range in whole seconds since 1970, widened to them; no end is now."""
    low = int(instant(start, "start"))
    if end is None:
        return low, None
    high = -int(-instant(end, "end") // 1)
    if high < low:
        raise UsageError(f"a range begins before it ends, not {start!r} to {end!r}")
    return low, high
