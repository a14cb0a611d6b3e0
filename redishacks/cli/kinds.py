"""How each kind of series is shown: what opens it, its points, and one number of a range."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from redishacks.errors import UsageError
from redishacks.timeseries import (
    DistinctSeries,
    GaugeSeries,
    LatencySeries,
    Series,
    TimeSeries,
    Total,
)
from redishacks.timeseries.record import Record

#: Of durations the one is shown that so many are not longer than.
_QUANTILE = 0.99


class Look(NamedTuple):
    """Which points to read: seconds since 1970, None is now."""

    start: float
    end: float | None
    step: float | str
    tz: dt.tzinfo


class Kind(NamedTuple):
    """How a kind is shown."""

    #: Returns the series; is called with the client, the name, what the record says and options.
    opens: Callable[..., Any]
    points: Callable[[Any, str | bytes, Look], Series]
    #: What a point is, unless it is a sum.
    about: str = ""
    #: Returns one number of a range for each of many series; None where a kind has none.
    totals: Callable[[Any, Sequence[Any], float, float | None], Mapping[Any, Total]] | None = None


def _range(series: Any, key: str | bytes, look: Look) -> Series:
    found: Series = series.range(key, look.start, look.end, step=look.step, tz=look.tz)
    return found


def _quantiles(series: LatencySeries, key: str | bytes, look: Look) -> Series:
    return series.range(key, _QUANTILE, look.start, look.end, step=look.step, tz=look.tz)


def _gauge(*args: Any, fields: Mapping[str, str], **options: Any) -> GaugeSeries:
    return GaugeSeries(*args, scale=int(fields["scale"]), **options)


def _plain(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, fields, **options: kind(*args, **options)


_KINDS = {
    "sum": Kind(_plain(TimeSeries), _range, totals=TimeSeries.sums),
    "distinct": Kind(
        _plain(DistinctSeries), _range, "distinct members of each", DistinctSeries.counts
    ),
    "gauge": Kind(_gauge, _range, "the last value of each"),
    "latency": Kind(
        _plain(LatencySeries), _quantiles, f"seconds that {_QUANTILE:.0%} of each do not exceed"
    ),
}


def kind_of(name: str, record: Record) -> Kind:
    """Return how the series of a name are shown; raises `UsageError` when they are not."""
    if record.kind not in _KINDS:
        raise UsageError(f"{name!r} is of the kind {record.kind!r}; shown are: {', '.join(_KINDS)}")
    return _KINDS[record.kind]
