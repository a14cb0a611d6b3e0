"""Units, converted once at the edge: durations to seconds, instants to microseconds."""

from __future__ import annotations

import datetime as dt
import math

from redishacks.errors import UsageError

Seconds = float | dt.timedelta

#: Beyond this a double (a sorted set's score, a Lua number) cannot hold every integer.
EXACT = 2**53

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)


def seconds(value: Seconds, name: str) -> float:
    """Return a duration in seconds; a `timedelta` or a positive number is accepted."""
    number = value.total_seconds() if isinstance(value, dt.timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < 1e9:
        raise UsageError(
            f"{name} must be a positive number of seconds or a timedelta, not {value!r}"
        )
    return float(number)


def patience(value: Seconds | None, name: str) -> float:
    """Return a time to wait in seconds: 0 is none, and None has no end."""
    if value is None:
        return math.inf
    none = value in (0, dt.timedelta()) and not isinstance(value, bool)
    return 0.0 if none else seconds(value, name)


def microseconds(moment: dt.datetime) -> int:
    """Return an aware datetime as integer microseconds since 1970, exactly."""
    if moment.tzinfo is None:
        raise UsageError(f"a datetime needs a time zone, and {moment!r} has none")
    return (moment - _EPOCH) // _MICROSECOND


def moment(micros: int) -> dt.datetime:
    """Return microseconds since 1970 as a datetime in UTC."""
    return _EPOCH + micros * _MICROSECOND


Instant = float | dt.datetime


def instant(value: Instant, name: str) -> float:
    """Return a moment in seconds since 1970; an aware `datetime` or a number is accepted."""
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise UsageError(
                f"{name}: {value!r} has no time zone; say which one is meant, for one "
                "value.replace(tzinfo=datetime.UTC)"
            )
        return (value - _EPOCH) / dt.timedelta(seconds=1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
        raise UsageError(f"{name} must be an aware datetime or seconds since 1970, not {value!r}")
    return value
