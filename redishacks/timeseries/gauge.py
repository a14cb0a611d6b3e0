"""`GaugeSeries`: the last, least, most and mean value of what goes up and down, per bucket of time.

    queue = GaugeSeries("redis://localhost:6379/0", "queue-length")
    queue.set("emails", 17)
    queue.set("emails", 12, at=measured_at)                  # late, or measured elsewhere
    queue.read("emails", start, end).max                     # Gauge: also last, min, mean, count
    queue.range("emails", start, end, step=600, of="mean")

Values are integers, or decimals of a fixed scale: `GaugeSeries(client, "prices", scale=2)` takes
and returns `Decimal` of two places; floats are refused, for sums of them depend on their order.
"Last" goes by when a value was true, not by when it was written, so late values do no harm; of two
that were true at the same microsecond it is the one written later.

The mean is that of the values that were set, each as heavy as the other, however long it was true:
set a gauge at regular times. Nothing is carried over: where none was set a point is None, not the
last value before. `merge` makes one gauge of two: the later "last", and the mean of all values.

Keys: see commands.py and series_set.lua. Buckets are packed, 360 to a string, 48 bytes for each
that was set: some twenty times a `TimeSeries`; a gauge that is set every 10 seconds has 2.1 MB
a year.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import struct
from collections.abc import Iterable, Mapping, Sequence
from decimal import Context, Decimal
from typing import Any, Literal, NamedTuple

from redishacks import _keys
from redishacks._command import Command, Steps
from redishacks._drive import AsyncTransport, Transport
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, Coalescer
from redishacks._units import EXACT, Instant, instant
from redishacks.errors import UsageError
from redishacks.timeseries import _calendar
from redishacks.timeseries._colours import AsyncSeries, SyncSeries
from redishacks.timeseries._core import C, Core, Draft, T
from redishacks.timeseries._kind import Amounts, Entries, Kind, mget
from redishacks.timeseries._packing import Bitmap
from redishacks.timeseries.points import Number, Series
from redishacks.timeseries.resolution import Rung

#: A series and a value, and when that was true; without a time it is now.
Item = tuple[Id, int | Decimal] | tuple[Id, int | Decimal, Instant | None]
#: What a point may show.
Of = Literal["last", "min", "max", "mean", "count"]

_OF = ("last", "min", "max", "mean", "count")
#: A time that is now, by the server's clock.
_NOW = -1
_HALF = 2**32
#: Values are exact, whatever precision the caller's own decimals have.
_ALL_DIGITS = Context(prec=40)


class Noted(NamedTuple):
    """What a bucket holds, in units of the scale; times in µs since 1970."""

    last: int
    when: int
    least: int
    most: int
    total: int
    many: int

    def and_then(self, other: Noted) -> Noted:
        """Return both as one; of two that are as late the other one is the last."""
        newest = other if self.when != _NOW and other.when >= self.when else self
        newest = other if other.when == _NOW else newest
        return Noted(
            newest.last,
            newest.when,
            min(self.least, other.least),
            max(self.most, other.most),
            self.total + other.total,
            self.many + other.many,
        )


_RECORD = struct.Struct(">6q")


class Gauges(Kind):
    """What a gauge was, packed."""

    name = "gauge"
    script_name = "series_set"

    def __init__(self, scale: int) -> None:
        self.scale = scale

    def fields(self) -> dict[str, str]:
        """Return the scale."""
        return {"scale": str(self.scale)}

    def size(self, rung: Rung) -> int:
        """Return the bytes of the bitmap."""
        return -(-rung.buckets // 8)

    def merged(self, first: Amounts, then: Amounts) -> Amounts:
        """Return what two notes come to."""
        return Noted(*first).and_then(Noted(*then))

    def later(self, amounts: Amounts, seconds: float) -> Amounts:
        """Return a note by a clock that is ahead."""
        noted = Noted(*amounts)
        return noted._replace(when=noted.when + int(seconds * 1e6))

    def words(self, place: int, member: bytes, amounts: Amounts) -> list[tuple[str | bytes, ...]]:
        """Return the place and what is noted, the sum in halves."""
        last, when, least, most, total, count = amounts
        return [
            (
                str(place),
                str(last),
                "" if when == _NOW else str(when),
                str(least),
                str(most),
                str(total // _HALF),
                str(total % _HALF),
                str(count),
            )
        ]

    def read(self, keys: Sequence[bytes]) -> list[Command[list[Any]]]:
        """Read them with one command."""
        return mget(keys)

    def bucket(self, raw: Any, rung: Rung) -> Notes:
        """Return a packed key."""
        return Notes(raw, rung.buckets)

    def entries(self, raw: Any, rung: Rung) -> Entries:
        """Return what its buckets hold."""
        noted = Notes(raw, rung.buckets).spread(0, rung.buckets)
        return {(place, b""): one for place, one in enumerate(noted) if one is not None}

    def rebuilt(self, entries: Entries, rung: Rung) -> list[str | bytes]:
        """Return a packed key."""
        if not entries:
            return []
        present, values = bytearray(self.size(rung)), bytearray()
        for (place, _), amounts in sorted(entries.items()):
            present[place // 8] |= 128 >> place % 8
            values += _RECORD.pack(*amounts)
        return [bytes((_RECORD.size,)) + present + values]

    def row(self, member: bytes, amounts: Amounts) -> dict[str, Any]:
        """Return what a bucket holds; times in seconds."""
        noted = Noted(*amounts)
        last, least, most, total = map(
            self.value, (noted.last, noted.least, noted.most, noted.total)
        )
        at = noted.when / 1e6
        return {
            "last": last, "at": at, "min": least, "max": most, "sum": total, "count": noted.many,
        }  # fmt: skip

    def entry(self, row: Mapping[str, Any]) -> tuple[bytes, Amounts]:
        """Return what a bucket holds."""
        last, least, most = (self.units(Decimal(row[name])) for name in ("last", "min", "max"))
        total = self._scaled(Decimal(row["sum"]))
        when = round(float(row["at"]) * 1e6)
        many = int(str(row["count"]))
        if total is None or not (0 <= when < EXACT and 0 < many < EXACT):
            raise ValueError("no gauge was set so often, or then, or to that")
        return b"", Noted(last, when, least, most, total, many)

    def units(self, value: Any) -> int:
        """Return a value in units of the scale; raises `UsageError`."""
        units = self._scaled(value)
        if units is None or not -EXACT < units < EXACT:
            raise UsageError(
                f"a gauge is an int, or a Decimal of at most {self.scale} places (as `scale` "
                f"says), below 2^53 in these units; not {value!r}"
            )
        return units

    def _scaled(self, value: Any) -> int | None:
        """Return a value in units of the scale; None for what is none, or far beyond 64 bits."""
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            return None
        if isinstance(value, Decimal):
            # The ratio of others would have as many digits as their exponent says.
            near = value.is_finite() and (not value or -16 < value.adjusted() < 20)
            if not near:
                return None
        top, bottom = value.as_integer_ratio()
        units, over = divmod(top * 10**self.scale, bottom)
        return None if over else units

    def value(self, units: int) -> Number:
        """Return a value as people know it."""
        return Decimal(units).scaleb(-self.scale, _ALL_DIGITS) if self.scale else units


class Notes(Bitmap):
    """A packed key of gauges that was read."""

    widths = (_RECORD.size,)

    def spread(self, first: int, last: int) -> list[Noted | None]:
        """Return what each bucket from `first` to before `last` holds."""
        found: list[Noted | None] = [None] * (last - first)
        noted = map(Noted._make, _RECORD.iter_unpack(self.held(first, last)))
        for place, one in zip(self.places(first, last), noted, strict=True):
            found[place - first] = one
        return found


@dataclasses.dataclass(frozen=True)
class Gauge:
    """What a gauge was in a range; all values are None where it was never set.

    `start`, `end`, `resolution` and `complete` are those of a `Total`.
    """

    last: Number | None
    #: When the last value was true, in seconds since 1970.
    at: float | None
    min: Number | None
    max: Number | None
    mean: Number | None
    #: How many values there were.
    count: int
    start: int
    end: int
    resolution: int
    complete: bool


class _Gauged(Core[T, C]):
    """What both colours of `GaugeSeries` share."""

    kind = Gauges(0)

    def __init__(self, client: Any, name: str, *, scale: int = 0, **options: Any) -> None:
        if isinstance(scale, bool) or not isinstance(scale, int) or not 0 <= scale <= 15:
            raise UsageError(f"scale is how many decimal places, 0 to 15, not {scale!r}")
        self._gauges = Gauges(scale)
        super().__init__(client, name, **options)

    def _kept(self) -> Kind:
        return self._gauges

    def _draft(self, item: Item) -> Draft:
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise UsageError(f"set_many() takes (series, value[, at]), not {item!r}")
        key, value, at = (*item, None)[:3]
        units = self._gauges.units(value)
        if at is not None:
            when = int(instant(at, "at") * 1e6)
        else:
            when = _NOW if self._coalescer is None else int(self.layout.noted() * 1e6)
        return Draft(_keys.id_bytes(key, "series"), Noted(units, when, units, units, units, 1), at)

    def _mean(self, noted: Noted) -> Number:
        return self._gauges.value(noted.total) / noted.many

    def _of(self, noted: Noted, of: str) -> Number:
        if of == "mean":
            return self._mean(noted)
        if of == "count":
            return noted.many
        return self._gauges.value({"last": noted.last, "min": noted.least, "max": noted.most}[of])

    def _reads(
        self, keys: Sequence[Id], start: Instant, end: Instant | None, strict: bool
    ) -> Steps[list[Gauge]]:
        raws = [_keys.id_bytes(key, "series") for key in keys]
        made, found = yield from self._buckets(raws, start, end, strict)
        covers = made.start, made.end, made.resolution, made.complete
        gauges = []
        for notes in found:
            parts: list[Noted | None] = []
            for tile, each in zip(made.tiles, notes, strict=True):
                parts += each.spread(tile.first, tile.last)
            noted = _folded(parts)
            if noted is None:
                gauges.append(Gauge(None, None, None, None, None, 0, *covers))
            else:
                last, least, most = map(self._gauges.value, (noted.last, noted.least, noted.most))
                mean = self._mean(noted)
                at = noted.when / 1e6
                gauges.append(Gauge(last, at, least, most, mean, noted.many, *covers))
        return gauges

    def _today(self, key: Id, tz: str | dt.tzinfo) -> Steps[Gauge]:
        return (
            yield from self._of_today(tz, lambda low, high: self._reads([key], low, high, False))
        )

    def _points(
        self,
        key: Id,
        start: Instant,
        end: Instant | None,
        step: _calendar.Step,
        tz: str | dt.tzinfo,
        of: str,
    ) -> Steps[Series]:
        if of not in _OF:
            raise UsageError(f"of is one of {', '.join(_OF)}, not {of!r}")
        made, found = yield from self._framed(key, start, end, step, tz)
        flat: list[Noted | None] = []
        for tile, notes in zip(made.tiles, found, strict=True):
            flat += notes.spread(tile.first, tile.last)
        points = made.fold(flat, _folded)
        return made.series([None if one is None else self._of(one, of) for one in points])


def _folded(parts: Iterable[Noted | None]) -> Noted | None:
    found: Noted | None = None
    for part in parts:
        if part is not None:
            found = part if found is None else found.and_then(part)
    return found


class GaugeSeries(_Gauged[Transport, Coalescer], SyncSeries):
    """What a value was per bucket of time, in several resolutions at once.

    Arguments are those of `TimeSeries`, defaults too. `scale` is how many decimal places values
    have: 0 for integers.
    """

    def set(self, key: Id, value: int | Decimal, *, at: Instant | None = None) -> None:
        """Note a value, which is true now or was at another moment.

        One round trip, none with `linger`. Raises as `TimeSeries.incr`.
        """
        self._count(self._draft((key, value, at)))

    def set_many(self, items: Iterable[Item]) -> None:
        """Note many values: `(series, value)` or `(series, value, at)`, as `incr_many`."""
        self._count_all(map(self._draft, items))

    def read(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Gauge:
        """Return the last, least, most and mean value from `start` to before `end`, or now.

        The range is widened as that of `TimeSeries.sum`. One round trip.
        """
        (gauge,) = self._ask(self._reads([key], start, end, strict))
        return gauge

    def reads(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Gauge]:
        """Return the same of many series. One round trip (per node of a cluster)."""
        return self._ask_each(keys, lambda some: self._reads(some, start, end, strict))

    def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Gauge:
        """Return the same since midnight in a time zone."""
        return self._ask(self._today(key, tz))

    def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC", of: Of = "last",
    ) -> Series:  # fmt: skip
        """Return points as `TimeSeries.range`; a point in which nothing was set is None."""
        return self._ask(self._points(key, start, end, step, tz, of))


class AsyncGaugeSeries(_Gauged[AsyncTransport, AsyncCoalescer], AsyncSeries):
    """`GaugeSeries` for asyncio, with the same arguments; `client` is from `redis.asyncio`."""

    async def set(self, key: Id, value: int | Decimal, *, at: Instant | None = None) -> None:
        """Note a value, as `GaugeSeries.set`."""
        await self._count(self._draft((key, value, at)))

    async def set_many(self, items: Iterable[Item]) -> None:
        """Note many values, as `GaugeSeries.set_many`."""
        await self._count_all(map(self._draft, items))

    async def read(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Gauge:
        """Return what a gauge was in a range, as `GaugeSeries.read`."""
        (gauge,) = await self._ask(self._reads([key], start, end, strict))
        return gauge

    async def reads(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Gauge]:
        """Return the same of many series, as `GaugeSeries.reads`."""
        return await self._ask_each(keys, lambda some: self._reads(some, start, end, strict))

    async def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Gauge:
        """Return the same since midnight in a time zone."""
        return await self._ask(self._today(key, tz))

    async def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC", of: Of = "last",
    ) -> Series:  # fmt: skip
        """Return points, as `GaugeSeries.range`."""
        return await self._ask(self._points(key, start, end, step, tz, of))
