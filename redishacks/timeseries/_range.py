"""A range of time as callers say it: whole seconds since 1970."""

from __future__ import annotations

import math

from redishacks._units import Instant, instant
from redishacks.errors import UsageError


def range_of(start: Instant, end: Instant | None) -> tuple[int, int | None]:
    """Return a range in whole seconds since 1970, widened to them; no end is now."""
    first = instant(start, "start")
    last = None if end is None else instant(end, "end")
    if last is None:
        return int(first), None
    if last < first:
        raise UsageError(f"a range begins before it ends, not {start!r} to {end!r}")
    return int(first), int(first) if last == first else math.ceil(last)
