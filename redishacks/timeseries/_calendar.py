"""Where points begin: at multiples of a step, or with the days, weeks and months of a time zone."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import zoneinfo
from collections.abc import Iterator, Sequence

from redishacks._units import Seconds, seconds
from redishacks.errors import UsageError

#: More points than that are no answer to anything.
MOST_POINTS = 100_000
_DAY = 86_400
_PERIODS = ("day", "week", "month")

Step = Seconds | str


def zone(tz: str | dt.tzinfo) -> dt.tzinfo:
    """Return a time zone by its name, such as "America/Recife"; raises `UsageError`."""
    if isinstance(tz, dt.tzinfo):
        return tz
    try:
        return dt.UTC if tz == "UTC" else zoneinfo.ZoneInfo(tz)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        raise UsageError(
            f"no time zone {tz!r}: a name of the IANA's is needed, such as 'Europe/Berlin'"
        ) from None


def day(now: float, tz: dt.tzinfo) -> tuple[int, int]:
    """Return when a local day begins and ends, in seconds since 1970."""
    date = dt.datetime.fromtimestamp(now, tz).date()
    return _begins(date, tz), _begins(date + dt.timedelta(days=1), tz)


def edges(start: int, end: int, step: Step, tz: dt.tzinfo) -> Sequence[int]:
    """Return when the points begin that cover a range, and when the last of them ends."""
    try:
        return _edges(start, end, step, tz)
    except UsageError:
        raise
    except (OverflowError, ValueError):
        raise UsageError("points need a calendar, and there is none beyond the year 9999") from None


def _edges(start: int, end: int, step: Step, tz: dt.tzinfo) -> Sequence[int]:
    if isinstance(step, str):
        if step not in _PERIODS:
            raise UsageError(f"a step is seconds, 'day', 'week' or 'month', not {step!r}")
        return _bounded(_periods(start, end, step, tz))
    length = seconds(step, "step")
    if length != int(length):
        raise UsageError(f"a step is whole seconds, not {step!r}")
    size = int(length)
    if (end - start) // size > MOST_POINTS:
        raise _too_many()
    if tz is dt.UTC or _DAY % size:
        return _even(start, end, size, 0)
    shifts = {_shift(moment, tz) for moment in range(start, end + _DAY, _DAY)}
    if len({shift % size for shift in shifts}) == 1:
        return _even(start, end, size, shifts.pop())
    return _bounded(_of_days(start, end, size, tz))


def common(marks: Sequence[int]) -> int:
    """Return the longest step of which all are multiples."""
    if isinstance(marks, range):
        return math.gcd(marks.start, marks.step)
    return math.gcd(*marks)


def _even(start: int, end: int, size: int, shift: int) -> range:
    first = (start + shift) // size * size - shift
    return range(first, first + (-(-(end - first) // size) + 1) * size, size)


def _shift(moment: int, tz: dt.tzinfo) -> int:
    shift = dt.datetime.fromtimestamp(moment, tz).utcoffset()
    return 0 if shift is None else int(shift.total_seconds())


def _periods(start: int, end: int, period: str, tz: dt.tzinfo) -> Iterator[int]:
    date = dt.datetime.fromtimestamp(start, tz).date()
    if period == "week":
        date -= dt.timedelta(days=date.weekday())
    elif period == "month":
        date = date.replace(day=1)
    last = None
    while (begins := _begins(date, tz)) < end:
        if begins != last:  # else that day was left out
            yield begins
        last = begins
        if period == "month":
            date = (date + dt.timedelta(days=31)).replace(day=1)
        else:
            date += dt.timedelta(days=7 if period == "week" else 1)
    yield begins


def _of_days(start: int, end: int, size: int, tz: dt.tzinfo) -> Iterator[int]:
    """Yield multiples of a step since each midnight: a day may be an hour longer or shorter."""
    midnights = list(_periods(start, end, "day", tz))
    last = midnights[-1]
    for midnight, following in itertools.pairwise(midnights):
        for begins in range(midnight, following, size):
            if begins >= end:
                last = begins
                break
            if min(begins + size, following) > start:
                yield begins
    yield last


def _begins(date: dt.date, tz: dt.tzinfo) -> int:
    """Return when a day begins: at midnight, or when the clock has jumped over it."""
    return int(dt.datetime.combine(date, dt.time(), tz).timestamp())


def _bounded(marks: Iterator[int]) -> list[int]:
    found = []
    for mark in marks:
        found.append(mark)
        if len(found) > MOST_POINTS:
            raise _too_many()
    return found


def _too_many() -> UsageError:
    return UsageError(f"that is more than {MOST_POINTS:,} points: ask for a longer step")
