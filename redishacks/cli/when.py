"""Durations and moments as people type them: 90s, 10m, 24h, 7d, 1w, and 2026-01-31T12:00."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any, NamedTuple

import click

from redishacks._units import instant
from redishacks.errors import UsageError

_SIZES = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")
_PERIODS = ("day", "week", "month")


def duration(text: str) -> float | None:
    """Return a duration in seconds, such as 1h30m; None when the text is none."""
    if not _WHOLE.fullmatch(text):
        return None
    return sum(float(number) * _SIZES[unit] for number, unit in _PART.findall(text))


class Moment(NamedTuple):
    """A moment: so many seconds ago, or at a stated time."""

    ago: float = 0.0
    stated: dt.datetime | None = None

    def at(self, now: float, tz: dt.tzinfo) -> float:
        """Return it in seconds since 1970; a time without an offset is of the time zone."""
        found = now - self.ago
        if self.stated is not None:
            stated = self.stated if self.stated.tzinfo else self.stated.replace(tzinfo=tz)
            found = instant(stated, "a moment")
        if found < 0:
            raise UsageError("there is nothing before 1970")
        return found


class MomentType(click.ParamType):  # type: ignore[type-arg]
    """Reads a moment."""

    name = "moment"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Moment:
        """Read a duration ago, or ISO 8601."""
        if isinstance(value, Moment):
            return value
        ago = duration(value)
        if ago is not None:
            return Moment(ago)
        if value == "now":
            return Moment()
        try:
            if value.isdigit():  # some of those are read as dates
                raise ValueError
            return Moment(stated=dt.datetime.fromisoformat(value))
        except ValueError:
            self.fail(
                f"{value!r} is neither ISO 8601, as 2026-01-31T12:00, nor so long ago, as 24h."
            )


class DurationType(click.ParamType):  # type: ignore[type-arg]
    """Reads a duration over zero; a number alone is seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it."""
        if isinstance(value, float):
            return value
        found = duration(f"{value}s" if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) else value)
        if not found or found >= 1e9:
            self.fail(f"{value!r} is no duration, such as 90s, 10m, 24h, 7d or 1w.")
        return found


class StepType(DurationType):
    """Reads the step of points: a duration, or a local day, week or month."""

    name = "step"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        return value if value in _PERIODS else super().convert(value, param, ctx)


def shown(seconds: float, tz: dt.tzinfo) -> str:
    """Return a moment as people of a time zone read it, to the second."""
    try:
        return f"{dt.datetime.fromtimestamp(seconds, tz):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError):
        raise UsageError(f"there is no date {seconds:g} s after 1970") from None
