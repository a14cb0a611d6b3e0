"""`LatencySeries`: how long things took, as histograms per bucket of time; quantiles of any range.

    latency = LatencySeries("redis://localhost:6379/0", "requests")
    latency.record("checkout", 0.0371)                       # seconds, or a timedelta
    latency.quantile("checkout", 0.99, start, end)           # in seconds, to 1 %
    latency.histogram("checkout", start, end).quantiles([0.5, 0.9, 0.99])
    latency.range("checkout", 0.99, start, end, step=600)    # that quantile of each point

Durations are counted in bins of whole microseconds: 64 for each doubling, so that the middle of one
is at most 0.8 % off; below 128 µs each has its own. No duration itself is kept, and histograms add
up: a quantile of a day is as exact as that of ten minutes, and that of many series is `(a +
b).quantile(0.99)`; never the mean of their quantiles. It is never interpolated, so of few durations
a high quantile is the longest of them. Their mean is that of the bins' middles.

Keys: see commands.py; a key has one histogram, packed as a `TimeSeries` is, by series_add.lua: some
340 bytes with three durations in it, 650 with thousands. Longer than 19 hours is refused.

The bins are those of HDR histograms: G. Tene, http://hdrhistogram.org.
"""

from __future__ import annotations

import bisect
import dataclasses
import datetime as dt
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from redishacks import _keys
from redishacks._command import Steps
from redishacks._drive import AsyncTransport, Transport
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, Coalescer
from redishacks._units import Instant
from redishacks.errors import UsageError
from redishacks.timeseries import _calendar
from redishacks.timeseries._colours import AsyncSeries, SyncSeries
from redishacks.timeseries._core import C, Core, Draft, T
from redishacks.timeseries._frame import joined
from redishacks.timeseries._kind import Amounts, Entries
from redishacks.timeseries._packing import Packed
from redishacks.timeseries.plan import Plan
from redishacks.timeseries.points import Series
from redishacks.timeseries.resolution import COARSE, Rung
from redishacks.timeseries.series import Sums

#: A series and a duration, and when that was; without a time it was now.
Item = tuple[Id, float | dt.timedelta] | tuple[Id, float | dt.timedelta, Instant | None]

#: Each doubling has 2**6 bins; below 2**7 µs each microsecond has its own.
_BITS = 6
#: The longest duration, in µs: 19 hours.
_MOST = 2**36 - 1


def bin_of(micros: int) -> int:
    """Return the bin of a duration."""
    shift = max(0, micros.bit_length() - _BITS - 1)
    return (shift << _BITS) + (micros >> shift)


def edges(number: int) -> tuple[int, int]:
    """Return the least duration of a bin, and the least of the next one, in µs."""
    shift = max(0, (number >> _BITS) - 1)
    low = (number - (shift << _BITS)) << shift
    return low, low + (1 << shift)


_BINS = bin_of(_MOST) + 1


class Histograms(Sums):
    """Histograms: packed keys whose places are bins, one per bucket of time."""

    name = "latency"
    usual = COARSE
    packed = False

    def size(self, rung: Rung) -> int:
        """Return the bytes of the bitmap."""
        return -(-_BINS // 8)

    def words(self, place: int, member: bytes, amounts: Amounts) -> list[tuple[str | bytes, ...]]:
        """Return the bin and the count."""
        return super().words(int(member), b"", amounts)

    def bucket(self, raw: Any, rung: Rung) -> Packed:
        """Return a packed key."""
        return Packed(raw, _BINS)

    def entries(self, raw: Any, rung: Rung) -> Entries:
        """Return its counts."""
        return {
            (0, b"%d" % number): (count,) for number, count in _bins([Packed(raw, _BINS)]).items()
        }

    def row(self, member: bytes, amounts: Amounts) -> dict[str, Any]:
        """Return the middle of the bin, and the count."""
        return {"seconds": _middle(int(member)), "count": amounts[0]}

    def entry(self, row: Mapping[str, Any]) -> tuple[bytes, Amounts]:
        """Return bin and count."""
        return _bin(float(row["seconds"])), (_some(row["count"]),)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many things took how long; `+` adds those of another series or range.

    `start`, `end`, `resolution` and `complete` are those of a `Total`.
    """

    #: Counts by bin.
    bins: Mapping[int, int]
    start: int
    end: int
    resolution: int
    complete: bool

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.bins.values())

    def quantile(self, q: float) -> float | None:
        """Return the duration in seconds that a share of `q` is not longer than; None for none.

        It is that of a thing that was recorded, to 0.8 %, never interpolated.
        """
        return self.quantiles([q])[0]

    def quantiles(self, qs: Iterable[float]) -> list[float | None]:
        """Return several of them."""
        some = list(qs)
        for q in some:
            check_quantile(q)
        total = self.count
        if not total:
            return [None] * len(some)
        found: list[float | None] = []
        bins = sorted(self.bins.items())
        reached = list(itertools.accumulate(count for _, count in bins))
        for q in some:
            rank = max(1, math.ceil(Fraction(str(q)) * total))  # 0.07 of 100 is 7
            number, _ = bins[bisect.bisect_left(reached, rank)]
            found.append(_middle(number))
        return found

    @property
    def min(self) -> float | None:
        """The shortest, in seconds."""
        return _middle(min(self.bins)) if self.bins else None

    @property
    def max(self) -> float | None:
        """The longest, in seconds."""
        return _middle(max(self.bins)) if self.bins else None

    @property
    def mean(self) -> float | None:
        """The mean, in seconds."""
        if not self.bins:
            return None
        return sum(_middle(number) * count for number, count in self.bins.items()) / self.count

    def __add__(self, other: Histogram) -> Histogram:
        if not isinstance(other, Histogram):
            return NotImplemented
        return Histogram(
            Counter(self.bins) + Counter(other.bins),
            min(self.start, other.start),
            max(self.end, other.end),
            max(self.resolution, other.resolution),
            self.complete and other.complete,
        )


def _some(text: Any) -> int:
    count = int(str(text))
    if count < 1:
        raise ValueError("a count is positive")
    return count


def _middle(number: int) -> float:
    low, beyond = edges(number)
    return (low + beyond - 1) / 2e6


def check_quantile(q: float) -> None:
    """Raise `UsageError` for what is no share."""
    if isinstance(q, bool) or not isinstance(q, int | float) or not 0 <= q <= 1:
        raise UsageError(f"a quantile is a share from 0 to 1, not {q!r}")


class _Recorded(Core[T, C]):
    """What both colours of `LatencySeries` share."""

    kind = Histograms()

    def _histograms(
        self, keys: Sequence[Id], start: Instant, end: Instant | None, strict: bool
    ) -> Steps[list[Histogram]]:
        raws = [_keys.id_bytes(key, "series") for key in keys]
        made, found = yield from self._buckets(raws, start, end, strict)
        return [_histogram(made, packed) for packed in found]

    def _today(self, key: Id, tz: str | dt.tzinfo) -> Steps[Histogram]:
        return (
            yield from self._of_today(
                tz, lambda low, high: self._histograms([key], low, high, False)
            )
        )

    def _points(
        self,
        key: Id,
        q: float,
        start: Instant,
        end: Instant | None,
        step: _calendar.Step,
        tz: str | dt.tzinfo,
    ) -> Steps[Series]:
        check_quantile(q)
        made, found = yield from self._framed(key, start, end, step, tz)
        points = made.fold([[packed] for packed in found], joined)
        marks = (made.start, made.end, made.rung.step, True)
        return made.series([Histogram(_bins(some), *marks).quantile(q) for some in points])


def _bins(some: Iterable[Packed]) -> Counter[int]:
    found: Counter[int] = Counter()
    for packed in some:
        for number, count in zip(packed.places(0, _BINS), packed.values(0, _BINS), strict=True):
            found[number] += count
    return +found


def _histogram(made: Plan, packed: Iterable[Packed]) -> Histogram:
    return Histogram(_bins(packed), made.start, made.end, made.resolution, made.complete)


def _draft(item: Item) -> Draft:
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise UsageError(f"record_many() takes (series, seconds[, at]), not {item!r}")
    key, took, at = (*item, None)[:3]
    return Draft(_keys.id_bytes(key, "series"), (1,), at, _bin(took))


def _bin(took: float | dt.timedelta) -> bytes:
    number = took.total_seconds() if isinstance(took, dt.timedelta) else took
    fits = isinstance(number, int | float) and not isinstance(number, bool)
    if not fits or not 0 <= number <= _MOST / 1e6:
        raise UsageError(
            f"a duration is seconds or a timedelta, from 0 to {_MOST // 3_600_000_000} hours, "
            f"not {took!r}"
        )
    return b"%d" % bin_of(min(_MOST, round(number * 1e6)))


class LatencySeries(_Recorded[Transport, Coalescer], SyncSeries):
    """Histograms of durations per bucket of time, in several resolutions at once.

    Arguments are those of `TimeSeries`. By default buckets of 10 min are kept for 32 days, of 1 h
    for 400 and of 1 d for 1,830 days; each takes some 330 bytes, and one or two more per bin in
    use.
    """

    def record(self, key: Id, seconds: float | dt.timedelta, *, at: Instant | None = None) -> None:
        """Count a duration, in seconds or as a timedelta; at most 19 hours.

        One round trip, none with `linger`. Raises as `TimeSeries.incr`.
        """
        self._count(_draft((key, seconds, at)))

    def record_many(self, items: Iterable[Item]) -> None:
        """Count many: `(series, seconds)` or `(series, seconds, at)`, as `incr_many`."""
        self._count_all(map(_draft, items))

    def histogram(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Histogram:
        """Return all durations from `start` to before `end`, or now, as a histogram.

        The range is widened as that of `TimeSeries.sum`. One round trip.
        """
        (found,) = self._ask(self._histograms([key], start, end, strict))
        return found

    def histograms(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Histogram]:
        """Return those of many series. One round trip (per node of a cluster)."""
        return self._ask_each(keys, lambda some: self._histograms(some, start, end, strict))

    def quantile(
        self, key: Id, q: float, start: Instant, end: Instant | None = None, *,
        strict: bool = False,
    ) -> float | None:  # fmt: skip
        """Return the duration in seconds that a share of `q` is not longer than; None for none.

        It is that of a thing that was recorded, to 0.8 %. One round trip.
        """
        check_quantile(q)
        return self.histogram(key, start, end, strict=strict).quantile(q)

    def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Histogram:
        """Return the histogram since midnight in a time zone."""
        return self._ask(self._today(key, tz))

    def range(
        self, key: Id, q: float, start: Instant, end: Instant | None = None, *,
        step: _calendar.Step, tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return a quantile as points, as `TimeSeries.range`; one without durations is None."""
        return self._ask(self._points(key, q, start, end, step, tz))


class AsyncLatencySeries(_Recorded[AsyncTransport, AsyncCoalescer], AsyncSeries):
    """`LatencySeries` for asyncio, with the same arguments; `client` is from `redis.asyncio`."""

    async def record(
        self, key: Id, seconds: float | dt.timedelta, *, at: Instant | None = None
    ) -> None:
        """Count a duration, as `LatencySeries.record`."""
        await self._count(_draft((key, seconds, at)))

    async def record_many(self, items: Iterable[Item]) -> None:
        """Count many, as `LatencySeries.record_many`."""
        await self._count_all(map(_draft, items))

    async def histogram(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Histogram:
        """Return all durations of a range, as `LatencySeries.histogram`."""
        (found,) = await self._ask(self._histograms([key], start, end, strict))
        return found

    async def histograms(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Histogram]:
        """Return those of many series, as `LatencySeries.histograms`."""
        return await self._ask_each(keys, lambda some: self._histograms(some, start, end, strict))

    async def quantile(
        self, key: Id, q: float, start: Instant, end: Instant | None = None, *,
        strict: bool = False,
    ) -> float | None:  # fmt: skip
        """Return a quantile of a range, as `LatencySeries.quantile`."""
        check_quantile(q)
        return (await self.histogram(key, start, end, strict=strict)).quantile(q)

    async def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Histogram:
        """Return the histogram since midnight in a time zone."""
        return await self._ask(self._today(key, tz))

    async def range(
        self, key: Id, q: float, start: Instant, end: Instant | None = None, *,
        step: _calendar.Step, tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return a quantile as points, as `LatencySeries.range`."""
        return await self._ask(self._points(key, q, start, end, step, tz))
