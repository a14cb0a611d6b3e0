"""`TimeSeries`: counts per 10 seconds, minute, hour and day; sums of any range in one round trip.

    hits = TimeSeries("redis://localhost:6379/0", "hits")
    hits.incr("project:42")
    hits.sum("project:42", start, end)                   # exact to 10 seconds at its edges
    hits.today("project:42", tz="America/Recife")
    hits.range("project:42", start, end, step=3600)

A hit is counted in one bucket of every resolution, by one script. A sum reads the coarsest buckets
that fit, and finer ones at its edges. Buckets are packed, some 360 to a key; a key expires as a
whole. Keys: see commands.py.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

from redishacks import _keys
from redishacks._buffer import Buffer
from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, AsyncLingering, Coalescer, Lingering
from redishacks._transport import Hook, connect, connect_async
from redishacks._units import Instant
from redishacks.timeseries import _calendar
from redishacks.timeseries._core import Core, Item, shown
from redishacks.timeseries.plan import Plan
from redishacks.timeseries.points import Series, Total


class TimeSeries(Lingering, Core[Transport, Coalescer]):
    """Counts per bucket of time, in several resolutions at once; sums of any range.

    `client` is a `redis.Redis`, a Sentinel master, a `redis.RedisCluster` or a URL; `name` is that
    of many series, which need not be declared.

    - `resolutions`: pairs of seconds, (step, retention); by default 10 s for 2 days, 1 min for 8,
      10 min for 32, 1 h for 400 and 1 d for 1,830 days. Whoever writes first decides.
    - `partitions` spreads a name over so many slots of a cluster: 64 there, 1 elsewhere.
    - `linger`, `max_buffered`, `overflow`, `on_refused`, `on_maybe_applied`, `deadline` and
      `on_command` are those of `BufferedCounter`.
    """

    def _connect(self, client: Any, on_command: Hook | None) -> Transport:
        return connect(client, on_command)

    def _coalesce(self, buffer: Buffer, **options: Any) -> Coalescer:
        return Coalescer(buffer, self.transport, **options)

    def incr(self, key: Id, amount: int = 1, *, at: Instant | None = None) -> None:
        """Add to the bucket of now, by the server's clock, or of another moment.

        `at` is an aware datetime or seconds since 1970: within the longest retention, and at most
        a minute in the future. What is too old for fine buckets is in the coarser ones only. One
        round trip, none with `linger`. Raises `UsageError` for what can never be counted,
        `UnavailableError` when it was not counted, and `MaybeAppliedError` when the reply was lost.
        """
        coalescer = self._coalescer
        if coalescer is None:
            drive(self._incr(key, amount, at), self.transport, self.deadline)
        elif (
            at is None
            and type(amount) is int
            and amount == 1
            and type(key) is str
            and key.isascii()
            and 0 < len(key) <= _keys.MAX_ID
        ):
            ones = coalescer.buffer.ones
            if len(ones) >= coalescer.buffer.room:
                coalescer.make_room()
            ones.append(f"{self.layout.stamp()}:{key}")
            if coalescer.closed:
                coalescer.send_late()
        else:
            coalescer.add(*self._lingering(key, amount, at))

    def incr_many(self, items: Iterable[Item]) -> None:
        """Add many amounts: `(series, amount)`, or `(series, amount, at)` for other moments.

        One round trip for 500 of them in one partition; each part is atomic. Raises as `incr`, or
        `PartlyAppliedError`, which says what became of which series.
        """
        if self._coalescer is not None:
            self._coalescer.add_all(self._items(items), shown)
        elif hits := self._hits(items):
            drive(self._add(hits), self.transport, self.deadline)

    def sum(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Total:
        """Return the sum from `start` to before `end`, by default until now.

        The range is widened to the finest buckets that still exist at its edges; the `Total` says
        what it covers. With `strict` that raises `RetentionError` where it is not the range asked
        for, to the finest resolution. One round trip.
        """
        (total,) = drive(self._sums([key], start, end, strict), self.transport, self.deadline)
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
        some = list(dict.fromkeys(keys))
        totals = drive(self._sums(some, start, end, strict), self.transport, self.deadline)
        return dict(zip(some, totals, strict=True))

    def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Total:
        """Return the sum since midnight in a time zone, such as "America/Recife"."""
        return drive(self._today(key, tz), self.transport, self.deadline)

    def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return points that begin at multiples of `step`: seconds, "day", "week" or "month".

        In the time zone `tz` days have 23 and 25 hours where they do. A point without hits is 0;
        it is None where the buckets have expired, and in the future. One round trip.
        """
        steps = self._points(key, start, end, step, tz)
        return drive(steps, self.transport, self.deadline)

    def explain(self, key: Id, start: Instant, end: Instant | None = None) -> Plan:
        """Return what `sum` reads: which buckets of which resolution, and how many bytes."""
        return drive(self._explain(key, start, end), self.transport, self.deadline)


class AsyncTimeSeries(AsyncLingering, Core[AsyncTransport, AsyncCoalescer]):
    """`TimeSeries` for asyncio, with the same arguments; `client` is from `redis.asyncio`."""

    def _connect(self, client: Any, on_command: Hook | None) -> AsyncTransport:
        return connect_async(client, on_command)

    def _coalesce(self, buffer: Buffer, **options: Any) -> AsyncCoalescer:
        return AsyncCoalescer(buffer, self.transport, **options)

    async def incr(self, key: Id, amount: int = 1, *, at: Instant | None = None) -> None:
        """Add to the bucket of now or of another moment, as `TimeSeries.incr`."""
        if self._coalescer is None:
            await drive_async(self._incr(key, amount, at), self.transport, self.deadline)
        else:
            await self._coalescer.add(*self._lingering(key, amount, at))

    async def incr_many(self, items: Iterable[Item]) -> None:
        """Add many amounts, as `TimeSeries.incr_many`."""
        if self._coalescer is not None:
            await self._coalescer.add_all(self._items(items), shown)
        elif hits := self._hits(items):
            await drive_async(self._add(hits), self.transport, self.deadline)

    async def sum(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Total:
        """Return the sum from `start` to before `end`, as `TimeSeries.sum`."""
        steps = self._sums([key], start, end, strict)
        (total,) = await drive_async(steps, self.transport, self.deadline)
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
        some = list(dict.fromkeys(keys))
        steps = self._sums(some, start, end, strict)
        totals = await drive_async(steps, self.transport, self.deadline)
        return dict(zip(some, totals, strict=True))

    async def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Total:
        """Return the sum since midnight in a time zone, as `TimeSeries.today`."""
        return await drive_async(self._today(key, tz), self.transport, self.deadline)

    async def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return points that begin at multiples of `step`, as `TimeSeries.range`."""
        steps = self._points(key, start, end, step, tz)
        return await drive_async(steps, self.transport, self.deadline)

    async def explain(self, key: Id, start: Instant, end: Instant | None = None) -> Plan:
        """Return what `sum` reads, as `TimeSeries.explain`."""
        return await drive_async(self._explain(key, start, end), self.transport, self.deadline)
