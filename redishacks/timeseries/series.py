"""`TimeSeries`: counts per 10 seconds, minute, hour and day; sums of any range in one round trip.

    hits = TimeSeries("redis://localhost:6379/0", "hits")
    hits.incr("project:42")
    hits.incr("project:42", 5, at=time.time() - 3600)    # late
    hits.sum("project:42", start, end)                   # Total: exact to 10 seconds at its edges
    hits.today("project:42", tz="America/Recife")
    hits.range("project:42", start, end, step=3600)      # Series of (time, value)

A hit is counted in one bucket of every resolution, by one script. A sum reads the coarsest buckets
that fit, and finer ones at its edges; what has expired is not 0 but said: `Total.complete`, and
None in a `Series`. A bucket that was not written and has not expired is 0.

Keys: see commands.py. Some 360 buckets are packed into a string: a byte or two per bucket in use,
and 46 for the bitmap; so a write copies a string of a kilobyte, and a sum reads all of it for one
bucket. A key expires as a whole, its oldest buckets later than they must. The integers are of 64
bits: of anything that is not a whole number count a smaller unit, cents or microseconds.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redishacks import _keys
from redishacks._command import Command, Steps
from redishacks._drive import AsyncTransport, Transport
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, Coalescer
from redishacks._units import EXACT, Instant
from redishacks.errors import UsageError
from redishacks.timeseries import _calendar
from redishacks.timeseries._colours import AsyncSeries, SyncSeries
from redishacks.timeseries._core import C, Core, Draft, T
from redishacks.timeseries._kind import Amounts, Entries, Kind, mget
from redishacks.timeseries._packing import Packed, spread
from redishacks.timeseries.plan import Plan
from redishacks.timeseries.points import Series, Total
from redishacks.timeseries.resolution import Rung

#: A series and an amount, and when that was; without a time it was now.
Item = tuple[Id, int] | tuple[Id, int, Instant | None]


class Sums(Kind):
    """Integers of 64 bits that add up, packed."""

    name = "sum"
    script_name = "series_add"

    subtracts = True

    def size(self, rung: Rung) -> int:
        """Return the bytes of the bitmap."""
        return -(-rung.buckets // 8)

    def merged(self, first: Amounts, then: Amounts) -> Amounts:
        """Return the sum."""
        return (first[0] + then[0],)

    def words(self, place: int, member: bytes, amounts: Amounts) -> list[tuple[str | bytes, ...]]:
        """Return the place and the amount, in parts that Lua's numbers hold exactly."""
        amount, *clears = amounts
        told: list[tuple[str | bytes, ...]] = []
        while abs(amount) >= EXACT:
            part = EXACT - 1 if amount > 0 else 1 - EXACT
            told.append((str(place), str(part)))
            amount -= part
        told.append((str(place), f"{amount}!" if clears else str(amount)))
        return told

    def read(self, keys: Sequence[bytes]) -> list[Command[list[Any]]]:
        """Read them with one command."""
        return mget(keys)

    def bucket(self, raw: Any, rung: Rung) -> Packed:
        """Return a packed key."""
        return Packed(raw, rung.buckets)

    def entries(self, raw: Any, rung: Rung) -> Entries:
        """Return its values."""
        packed = Packed(raw, rung.buckets)
        places = packed.places(0, rung.buckets)
        values = packed.values(0, rung.buckets)
        return {(place, b""): (value,) for place, value in zip(places, values, strict=True)}

    def less(self, amounts: Amounts) -> Amounts:
        """Return the amount with the other sign, and that nothing stays where that is all."""
        return -amounts[0], 0

    def row(self, member: bytes, amounts: Amounts) -> dict[str, Any]:
        """Return the value."""
        return {"value": amounts[0]}

    def entry(self, row: Mapping[str, Any]) -> tuple[bytes, Amounts]:
        """Return the value."""
        return b"", (int(str(row["value"])),)


class _Counted(Core[T, C]):
    """What both colours of `TimeSeries` share."""

    kind = Sums()

    def _sums(
        self, keys: Sequence[Id], start: Instant, end: Instant | None, strict: bool
    ) -> Steps[list[Total]]:
        raws = [_keys.id_bytes(key, "series") for key in keys]
        made, found = yield from self._buckets(raws, start, end, strict)
        return [_total(made, packed) for packed in found]

    def _today(self, key: Id, tz: str | dt.tzinfo) -> Steps[Total]:
        return (
            yield from self._of_today(tz, lambda low, high: self._sums([key], low, high, False))
        )

    def _points(
        self,
        key: Id,
        start: Instant,
        end: Instant | None,
        step: _calendar.Step,
        tz: str | dt.tzinfo,
    ) -> Steps[Series]:
        made, found = yield from self._framed(key, start, end, step, tz)
        tiles = zip(found, made.tiles, strict=True)
        flat = spread([(packed, tile.first, tile.last) for packed, tile in tiles])
        values = made.fold(flat, _added)
        return made.series(values)


def _added(values: Sequence[int]) -> int:
    return sum(values)


def _total(made: Plan, packed: Sequence[Packed]) -> Total:
    value = 0
    for tile, each in zip(made.tiles, packed, strict=True):
        value += sum(each.values(tile.first, tile.last))
    return Total(value, made.start, made.end, made.resolution, made.complete)


class TimeSeries(_Counted[Transport, Coalescer], SyncSeries):
    """Counts per bucket of time, in several resolutions at once; sums of any range.

    `client` is a `redis.Redis`, a Sentinel master, a `redis.RedisCluster` or a URL; `name` is that
    of many series, which need not be declared.

    - `resolutions`: pairs of seconds, (step, retention); by default 10 s for 2 days, 1 min for 8,
      10 min for 32, 1 h for 400 and 1 d for 1,830 days. Whoever writes first decides.
    - `partitions` spreads a name over so many slots of a cluster: 64 there, 1 elsewhere.
    - `linger`, `max_buffered`, `overflow`, `deadline` and `on_command` are those of
      `BufferedCounter`; `on_refused` gets an `Uncounted`, `on_maybe_applied` a list of them.
    """

    def incr(self, key: Id, amount: int = 1, *, at: Instant | None = None) -> None:
        """Add to the bucket of now, by the server's clock, or of another moment.

        `at` is an aware datetime or seconds since 1970: within the longest retention, and at most
        a minute in the future. What is too old for fine buckets is in the coarser ones only. One
        round trip, none with `linger`. Raises `UsageError` for what can never be counted,
        `UnavailableError` when it was not counted, and `MaybeAppliedError` when the reply was lost.
        """
        coalescer = self._coalescer
        if (
            coalescer is not None
            and at is None
            and type(amount) is int
            and amount == 1
            and type(key) is str
            and key.isascii()
            and 0 < len(key) <= _keys.MAX_ID
        ):
            ones = coalescer.buffer.ones
            if len(ones) >= coalescer.buffer.room:
                coalescer.make_room()
            ones.append(f"{self.layout.stamp()}:{len(key)}:{key}")
            if coalescer.closed:
                coalescer.send_late()
        else:
            self._count(_draft((key, amount, at)))

    def incr_many(self, items: Iterable[Item]) -> None:
        """Add many amounts: `(series, amount)`, or `(series, amount, at)` for other moments.

        One round trip for 500 of them in one partition; each part is atomic. Raises as `incr`, or
        `PartlyAppliedError`, which says what became of which series.
        """
        self._count_all(map(_draft, items))

    def sum(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Total:
        """Return the sum from `start` to before `end`, by default until now.

        The range is widened to the finest buckets that still exist at its edges; the `Total` says
        what it covers. With `strict` that raises `RetentionError` where it is not the range asked
        for, to the finest resolution. One round trip.
        """
        (total,) = self._ask(self._sums([key], start, end, strict))
        return total

    def sums(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Total]:
        """Return the sums of many series, as `sum`. One round trip (per node of a cluster)."""
        return self._ask_each(keys, lambda some: self._sums(some, start, end, strict))

    def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Total:
        """Return the sum since midnight in a time zone, as "America/Recife". One round trip."""
        return self._ask(self._today(key, tz))

    def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return points that begin at multiples of `step`: seconds, "day", "week" or "month".

        In the time zone `tz` days have 23 and 25 hours where they do. Seconds that divide a day
        begin anew at each midnight there, so that the last point of a day may be shorter; others
        go by UTC. A point without hits is 0; it is None where the buckets have expired, and in the
        future. One round trip.
        """
        return self._ask(self._points(key, start, end, step, tz))


class AsyncTimeSeries(_Counted[AsyncTransport, AsyncCoalescer], AsyncSeries):
    """`TimeSeries` for asyncio, with the same arguments; `client` is from `redis.asyncio`."""

    async def incr(self, key: Id, amount: int = 1, *, at: Instant | None = None) -> None:
        """Add to the bucket of now or of another moment, as `TimeSeries.incr`."""
        await self._count(_draft((key, amount, at)))

    async def incr_many(self, items: Iterable[Item]) -> None:
        """Add many amounts, as `TimeSeries.incr_many`."""
        await self._count_all(map(_draft, items))

    async def sum(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Total:
        """Return the sum from `start` to before `end`, as `TimeSeries.sum`."""
        (total,) = await self._ask(self._sums([key], start, end, strict))
        return total

    async def sums(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Total]:
        """Return the sums of many series, as `TimeSeries.sums`."""
        return await self._ask_each(keys, lambda some: self._sums(some, start, end, strict))

    async def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Total:
        """Return the sum since midnight in a time zone, as `TimeSeries.today`."""
        return await self._ask(self._today(key, tz))

    async def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return points that begin at multiples of `step`, as `TimeSeries.range`."""
        return await self._ask(self._points(key, start, end, step, tz))


def _draft(item: Item) -> Draft:
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise UsageError(
            f"incr_many() takes (series, amount) or (series, amount, at), not {item!r}"
        )
    key, amount, at = (*item, None)[:3]
    if isinstance(amount, bool) or not isinstance(amount, int) or not -EXACT < amount < EXACT:
        raise UsageError(f"an amount is an int below 2^53 of either sign, not {amount!r}")
    return Draft(_keys.id_bytes(key, "series"), (amount,), at)
