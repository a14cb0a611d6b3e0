"""`DistinctSeries`: how many different members there were, in any range and over several series.

    visitors = DistinctSeries("redis://localhost:6379/0", "visitors")
    visitors.add("page:1", "user:7", "user:8")
    visitors.count("page:1", start, end)                     # Total, with its standard error
    visitors.union(["page:1", "page:2"], start, end)         # each visitor once
    visitors.range("page:1", start, end, step="day").values  # not to be summed up: who comes daily
                                                             # is in each of them

Every bucket is a HyperLogLog, which the server unites: at most 12 KB however many members, and
their number to 0.81 % (standard error) whatever the range; no member itself is kept, so nobody can
be listed or taken out again. A few members take some 100 bytes, a hundred 600, thousands 12 KB:
hence buckets of 10 minutes at the finest. A year of a busy series has 170 MB; own `resolutions=`
without those of 10 minutes and an hour make it 5. `delete` makes buckets that are partly in its
range anew of finer ones, dense, 12 KB each.

Keys: see commands.py; a key has one bucket, a string that PFADD has made. Where series are in
several slots of a cluster the strings are fetched and united here (_sketch.py).

Flajolet, Fusy, Gandouet, Meunier, "HyperLogLog: the analysis of a near-optimal cardinality
estimation algorithm", 2007.
"""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redishacks import _keys
from redishacks._command import Command, Steps
from redishacks._drive import AsyncTransport, Transport
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, Coalescer
from redishacks._units import Instant
from redishacks.errors import UsageError
from redishacks.timeseries import _calendar, _sketch
from redishacks.timeseries._colours import AsyncSeries, SyncSeries
from redishacks.timeseries._core import TRIES, C, Core, Draft, T, several
from redishacks.timeseries._frame import frame, joined
from redishacks.timeseries._kind import Amounts, Entries, Kind, mget
from redishacks.timeseries._range import range_of
from redishacks.timeseries.plan import Tile
from redishacks.timeseries.points import Series, Total
from redishacks.timeseries.resolution import COARSE, Rung

#: A series and a member, and when that was; without a time it was now.
Item = tuple[Id, Id] | tuple[Id, Id, Instant | None]

#: What a hit's member is: one, or a whole sketch.
_MEMBER, _WHOLE = 0, 1
#: The standard error of a HyperLogLog of 16,384 registers.
ERROR = 0.0081


class Sketch:
    """A HyperLogLog as it was read."""

    def __init__(self, raw: bytes | None) -> None:
        self.raw = raw

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return len(self.raw or b"")


class Distincts(Kind):
    """HyperLogLogs, one per bucket of time."""

    name = "distinct"
    script_name = "series_distinct"
    usual = COARSE
    packed = False

    def size(self, rung: Rung) -> int:
        """Return nothing that the script needs."""
        return 0

    def merged(self, first: Amounts, then: Amounts) -> Amounts:
        """Return either: a member is there once."""
        return first

    def words(self, place: int, member: bytes, amounts: Amounts) -> list[tuple[str | bytes, ...]]:
        """Return the member, or a whole sketch that others are in."""
        return [(member, str(amounts[0]))]

    def read(self, keys: Sequence[bytes]) -> list[Command[list[Any]]]:
        """Read them as they are."""
        return mget(keys)

    def bucket(self, raw: Any, rung: Rung) -> Sketch:
        """Return it as it is."""
        return Sketch(raw)

    def entries(self, raw: Any, rung: Rung) -> Entries:
        """Return the whole sketch."""
        return {(0, raw): (_WHOLE,)} if raw else {}

    def rebuilt(self, entries: Entries, rung: Rung) -> list[str | bytes]:
        """Return the union of sketches."""
        if not entries:
            return []
        return [_sketch.stored(_sketch.united(_sketch.registers(raw) for _, raw in entries))]

    def row(self, member: bytes, amounts: Amounts) -> dict[str, Any]:
        """Return the sketch as text."""
        return {"sketch": base64.b64encode(member).decode()}

    def entry(self, row: Mapping[str, Any]) -> tuple[bytes, Amounts]:
        """Return the sketch."""
        raw = base64.b64decode(row["sketch"], validate=True)
        _sketch.registers(raw)
        return raw, (_WHOLE,)


class _Seen(Core[T, C]):
    """What both colours of `DistinctSeries` share."""

    kind = Distincts()

    def _counts(
        self,
        sets: Sequence[Sequence[Id]],
        start: Instant,
        end: Instant | None,
        strict: bool = False,
    ) -> Steps[list[Total]]:
        """Count the distinct members of sets of series."""
        some = [[_keys.id_bytes(key, "series") for key in keys] for keys in sets]
        low, high = range_of(start, end)
        for _ in range(TRIES):
            made, now = yield from self._plan(low, high)
            counts = yield from self._counted([(raws, made.tiles) for raws in some], now)
            if counts is not None:
                self._exact(made, low, strict)
                covers = made.start, made.end, made.resolution, made.complete
                return [Total(count, *covers, error=ERROR) for count in counts]
        raise self.layout.late()

    def _counted(
        self, unions: Sequence[tuple[Sequence[bytes], Sequence[Tile]]], now: int
    ) -> Steps[list[int] | None]:
        """Count unions of buckets of series; None if the plan was not for the server's time."""
        layout = self.layout
        groups: list[list[Command[Any]]] = []
        for raws, tiles in unions:
            slots: dict[int, list[bytes]] = {}
            for raw in raws:
                keys = [layout.at(raw, tile.rung, tile.pack) for tile in tiles]
                slots.setdefault(layout.partition(raw), []).extend(keys)
            if not tiles:
                groups.append([])
            elif len(slots) == 1:  # the server can unite them
                (keys,) = slots.values()
                groups.append([_count(keys)])
            else:
                groups.append([command for keys in slots.values() for command in mget(keys)])
        every = list({(tile.rung, tile.pack): 0 for _, tiles in unions for tile in tiles})
        answers = yield from self._exchange([group for group in groups if group], every, now)
        if answers is None:
            return None
        given = iter(answers)
        return [_number(next(given)) if group else 0 for group in groups]

    def _today(self, key: Id, tz: str | dt.tzinfo) -> Steps[Total]:
        return (yield from self._of_today(tz, lambda low, high: self._counts([[key]], low, high)))

    def _points(
        self,
        key: Id,
        start: Instant,
        end: Instant | None,
        step: _calendar.Step,
        tz: str | dt.tzinfo,
    ) -> Steps[Series]:
        raw, place = _keys.id_bytes(key, "series"), _calendar.zone(tz)
        low, high = range_of(start, end)
        for _ in range(TRIES):
            rungs = yield from self.layout.look()
            now = int(self.layout.now())
            made = frame(rungs, low, high, step, place, now)
            points = made.fold([[tile] for tile in made.tiles], joined)
            counts = yield from self._counted([([raw], tiles) for tiles in points], now)
            if counts is not None:
                return made.series(counts)
        raise self.layout.late()


def _count(keys: Sequence[bytes]) -> Command[Any]:
    # Some servers take it for a write, for it may note its result in the key: it can be repeated.
    return Command(("PFCOUNT", *keys), tuple(keys), repeatable=True, bulk=True)


def _number(answers: Sequence[Any]) -> int:
    """Return how many distinct members there were, by one PFCOUNT or several MGETs."""
    if isinstance(answers[0], int):
        return answers[0]
    raws = [raw for answer in answers for raw in answer if raw is not None]
    return _sketch.estimate(_sketch.united(map(_sketch.registers, raws))) if raws else 0


def _draft(item: Item) -> Draft:
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise UsageError(f"add_many() takes (series, member[, at]), not {item!r}")
    key, member, at = (*item, None)[:3]
    return Draft(_keys.id_bytes(key, "series"), (_MEMBER,), at, _keys.id_bytes(member, "member"))


class DistinctSeries(_Seen[Transport, Coalescer], SyncSeries):
    """How many different members there were per bucket of time, in several resolutions at once.

    Arguments are those of `TimeSeries`. By default buckets of 10 min are kept for 32 days, of 1 h
    for 400 and of 1 d for 1,830 days.
    """

    def add(self, key: Id, *members: Id, at: Instant | None = None) -> None:
        """Note that members were there now, or at another moment.

        One round trip, none with `linger`. Raises as `TimeSeries.incr`.
        """
        self._count_all(_draft((key, member, at)) for member in members)

    def add_many(self, items: Iterable[Item]) -> None:
        """Note many: `(series, member)` or `(series, member, at)`, as `incr_many`."""
        self._count_all(map(_draft, items))

    def count(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Total:
        """Return how many distinct members there were from `start` to before `end`, or now.

        To 0.81 % (standard error). The range is widened as that of `TimeSeries.sum`. One round
        trip: the server unites the buckets.
        """
        (total,) = self._ask(self._counts([[key]], start, end, strict))
        return total

    def counts(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Total]:
        """Return those of many series, each by itself. One round trip (per node of a cluster)."""
        return self._ask_each(
            keys, lambda some: self._counts([[key] for key in some], start, end, strict)
        )

    def union(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> Total:
        """Return how many distinct members there were in any of many series.

        One round trip (per node of a cluster); where series are in several partitions their
        buckets are fetched, up to 12 KB each, and united here.
        """
        (total,) = self._ask(self._counts([several(keys)], start, end, strict))
        return total

    def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Total:
        """Return how many there were since midnight in a time zone."""
        return self._ask(self._today(key, tz))

    def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return points as `TimeSeries.range`: the distinct members of each."""
        return self._ask(self._points(key, start, end, step, tz))


class AsyncDistinctSeries(_Seen[AsyncTransport, AsyncCoalescer], AsyncSeries):
    """`DistinctSeries` for asyncio, with the same arguments; `client` is from `redis.asyncio`."""

    async def add(self, key: Id, *members: Id, at: Instant | None = None) -> None:
        """Note that members were there, as `DistinctSeries.add`."""
        await self._count_all(_draft((key, member, at)) for member in members)

    async def add_many(self, items: Iterable[Item]) -> None:
        """Note many, as `DistinctSeries.add_many`."""
        await self._count_all(map(_draft, items))

    async def count(
        self, key: Id, start: Instant, end: Instant | None = None, *, strict: bool = False
    ) -> Total:
        """Return how many distinct members there were, as `DistinctSeries.count`."""
        (total,) = await self._ask(self._counts([[key]], start, end, strict))
        return total

    async def counts(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> dict[Id, Total]:
        """Return those of many series, each by itself, as `DistinctSeries.counts`."""
        return await self._ask_each(
            keys, lambda some: self._counts([[key] for key in some], start, end, strict)
        )

    async def union(
        self,
        keys: Iterable[Id],
        start: Instant,
        end: Instant | None = None,
        *,
        strict: bool = False,
    ) -> Total:
        """Return how many there were in any of many series, as `DistinctSeries.union`."""
        (total,) = await self._ask(self._counts([several(keys)], start, end, strict))
        return total

    async def today(self, key: Id, tz: str | dt.tzinfo = "UTC") -> Total:
        """Return how many there were since midnight in a time zone."""
        return await self._ask(self._today(key, tz))

    async def range(
        self, key: Id, start: Instant, end: Instant | None = None, *, step: _calendar.Step,
        tz: str | dt.tzinfo = "UTC",
    ) -> Series:  # fmt: skip
        """Return points, as `DistinctSeries.range`."""
        return await self._ask(self._points(key, start, end, step, tz))
