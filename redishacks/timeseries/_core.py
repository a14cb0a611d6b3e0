"""What series of both colours share: checked input turned into commands, replies into values."""

from __future__ import annotations

import bisect
import datetime as dt
import secrets
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Literal, TypeVar

from redishacks import _keys
from redishacks._buffer import Buffer, Items, Refused
from redishacks._clock import clock
from redishacks._command import Command, Steps, ask_all
from redishacks._drive import AsyncTransport, Transport
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, Coalescer, check_linger
from redishacks._transport import Hook
from redishacks._units import EXACT, Instant, Seconds, instant, seconds
from redishacks.errors import (
    PartlyAppliedError,
    RedisHacksError,
    RetentionError,
    UnavailableError,
    UsageError,
)
from redishacks.timeseries import _calendar
from redishacks.timeseries._packing import Packed
from redishacks.timeseries.commands import Applied, Hit, Layout
from redishacks.timeseries.plan import Plan, Tile, plan, run_of
from redishacks.timeseries.points import Series, Total
from redishacks.timeseries.resolution import Ladder, Resolution, Rung, ladder

T = TypeVar("T", bound=Transport | AsyncTransport)
C = TypeVar("C", bound=Coalescer | AsyncCoalescer)

#: A hit may be so many seconds ahead of the server's clock.
SKEW = 60.0
#: Partitions of a name on a cluster, unless told otherwise.
_CLUSTER_PARTITIONS = 64
#: Tries to ask for a moment that is passing, or by a clock that is not known yet.
_TRIES = 5

#: A series and an amount, and when that was; without a time it was now.
Item = tuple[Id, int] | tuple[Id, int, Instant | None]


class _Batcher(Layout):
    """The layout, as the coalescing buffer needs it: a hit's id is "time:series"."""

    refusal = "it is older than all that is kept, or its sum would pass 2^63"

    def hit(self, times: int) -> tuple[int]:
        """Return the amounts of a plain hit that came so many times."""
        return (times,)

    def merge(self, into: list[int | None], amounts: Sequence[int | None]) -> None:
        """Merge amounts into others."""
        into[0] = (into[0] or 0) + (amounts[0] or 0)

    def parts(self, items: Iterable[tuple[bytes, Any]]) -> Iterable[tuple[int, Items]]:
        """Cut hits into (partition, part), each small enough for one script."""
        return self.cut(items, lambda item: item[0].partition(b":")[2])

    def add(self, p: int, items: Items, fence: tuple[str, int]) -> Command[int]:
        """Return the command that sends one part; it replies -n when the n-th hit is refused."""
        hits = []
        for raw, (amount, *_) in items:
            when, _, key = raw.partition(b":")
            hits.append(Hit(key, self.stamped(when), amount or 0))
        command = self.write(hits, fence=fence)

        def parse(reply: list[int]) -> int:
            applied = command.parse(reply)
            self.learn(applied.now)
            return applied.code if applied.code >= 0 else -1 - self.blamed(hits, applied)

        return Command(command.args, command.keys, parse, command.script, command.repeatable)


class Core(ABC, Generic[T, C]):
    """What both colours share: options, checked input turned into commands, replies read."""

    def __init__(
        self,
        client: Any,
        name: str,
        *,
        resolutions: Iterable[Resolution | tuple[Seconds, Seconds]] | None = None,
        partitions: int | None = None,
        prefix: str = "rh",
        deadline: Seconds = 1.0,
        linger: Seconds | None = None,
        max_buffered: int = 100_000,
        overflow: Literal["raise", "block"] = "raise",
        on_refused: Callable[[Refused], None] | None = None,
        on_maybe_applied: Callable[[Items], None] | None = None,
        on_command: Hook | None = None,
    ) -> None:
        self.name = name
        self.deadline = seconds(deadline, "deadline")
        self.client = client
        self.transport: T = self._connect(client, on_command)
        connected: Any = self.transport
        connected = connected.bare
        if partitions is None:
            partitions = _CLUSTER_PARTITIONS if connected.clustered else 1
        given = None if resolutions is None else ladder(resolutions)
        self.layout = _Batcher(prefix, name, "sum", partitions, given)
        self._coalescer: C | None = None
        if linger is not None:
            self._coalescer = self._coalesce(
                Buffer(
                    self.layout,
                    lambda: secrets.token_hex(16),
                    max_buffered,
                    on_refused,
                    on_maybe_applied,
                ),
                linger=check_linger(linger),
                deadline=self.deadline,
                overflow=overflow,
            )
            self._finalizer = weakref.finalize(self, self._coalescer.abandon)
            self._finalizer.atexit = False

    @abstractmethod
    def _connect(self, client: Any, on_command: Hook | None) -> T:
        """Return the transport of this colour."""

    @abstractmethod
    def _coalesce(self, buffer: Buffer, **options: Any) -> C:
        """Return what sends the buffer."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.layout.full_name}>"

    # Writing

    def _incr(self, key: Id, amount: int, at: Instant | None) -> Steps[None]:
        raw, amount = _keys.id_bytes(key, "series"), _amount(amount)
        if at is not None:
            yield from self._add([Hit(raw, int(instant(at, "at")), amount)])
            return
        if not self.layout.rungs:
            yield from self.layout.agree()
        step = self.layout.rungs[0].step
        for _ in range(_TRIES):
            begins = int(self.layout.now() // step) * step
            window = (f"{begins}000000", f"{begins + step}000000")
            applied = yield self.layout.write([Hit(raw, begins, amount)], window)
            self.layout.learn(applied.now)
            if applied.code != -1:
                self._check([Hit(raw, begins, amount)], applied)
                return
        raise self._late()

    def _add(self, hits: Sequence[Hit]) -> Steps[None]:
        """Add hits of stated times, in parts; raises as `incr_many` says."""
        if not self.layout.rungs:
            yield from self.layout.agree()
        parts = [part for _, part in self.layout.cut(hits, lambda hit: hit.key)]
        outcomes = yield from ask_all([self.layout.write(part, _until(part)) for part in parts])
        failed: dict[str | bytes, Exception] = {}
        for part, outcome in zip(parts, outcomes, strict=True):
            try:
                applied = outcome.result()
                self.layout.learn(applied.now)
                self._check(part, applied)
            except RedisHacksError as error:
                failed.update((_keys.id_shown(hit.key), error) for hit in part)
        if not failed:
            return
        errors = list({str(error): error for error in failed.values()}.values())
        if len(errors) == len(parts) == 1:
            raise errors[0]
        raise PartlyAppliedError(f"not all hits were added; {errors[0]}", failed)

    def _check(self, hits: Sequence[Hit], applied: Applied) -> None:
        """Raise `UsageError` when hits were refused."""
        if applied.code >= 0:
            return
        if applied.code == -1:
            latest = max(hits, key=lambda hit: hit.time)
            raise UsageError(
                f"series {_shown(latest)}: {latest.time} is in the future, by the server's clock "
                f"{latest.time - applied.now // 1_000_000} s; at most {SKEW:g} s are accepted"
            )
        hit = hits[self.layout.blamed(hits, applied)]
        if applied.code == -2:
            raise UsageError(f"series {_shown(hit)}: the sum would pass 2^63; nothing was added")
        raise UsageError(f"series {_shown(hit)}: {hit.time} is older than all that is kept")

    def _hits(self, items: Iterable[Item]) -> list[Hit]:
        """Check many hits; those without a time are of now."""
        now = self.layout.now()
        hits = []
        for key, amount, at in map(_item, items):
            when = now if at is None else instant(at, "at")
            hits.append(Hit(_keys.id_bytes(key, "series"), int(when), _amount(amount)))
        return hits

    def _lingering(self, key: Id, amount: int, at: Instant | None) -> tuple[bytes, tuple[int]]:
        """Return the id and the amount of a hit in the buffer."""
        raw, layout = _keys.id_bytes(key, "series"), self.layout
        if at is None:
            return b"%b:%b" % (layout.stamp().encode(), raw), (_amount(amount),)
        when = instant(at, "at")
        if when > layout.now() + SKEW:
            raise UsageError(
                f"series {_keys.id_shown(raw)!r}: {at!r} is in the future; at most {SKEW:g} s are "
                "accepted"
            )
        return b"%d:%b" % (layout.bucket(when), raw), (_amount(amount),)

    def _items(self, items: Iterable[Item]) -> Items:
        """Check many hits for the buffer."""
        return [self._lingering(*_item(item)) for item in items]

    # Reading

    def _sums(
        self, keys: Sequence[Id], start: Instant, end: Instant | None, strict: bool
    ) -> Steps[list[Total]]:
        raws = [_keys.id_bytes(key, "series") for key in keys]
        low, high = self._range(start, end)
        made, found = yield from self._planned(raws, low, high)
        if strict and not made.complete:
            raise RetentionError(
                f"series {self.layout.full_name}: of the range from {low} only {made.start} to "
                f"{made.end} is there, to {made.resolution} s"
            )
        return [_total(made, packed) for packed in found]

    def _planned(
        self, raws: Sequence[bytes], low: int, high: int | None
    ) -> Steps[tuple[Plan, list[list[Packed]]]]:
        """Plan a range and read it, once more if the plan is not that of the server's time."""
        rungs = self.layout.rungs or (yield from self.layout.look())
        for _ in range(_TRIES):
            now = int(self.layout.now())
            made = plan(rungs, low, now + 1 if high is None else high, now)
            found = yield from self._read(raws, made.tiles, now)
            if found is not None:
                return made, found
        raise self._late()

    def _range(self, start: Instant, end: Instant | None) -> tuple[int, int | None]:
        low = int(instant(start, "start"))
        if end is None:
            return low, None
        high = -int(-instant(end, "end") // 1)
        if high < low:
            raise UsageError(f"a range begins before it ends, not {start!r} to {end!r}")
        return low, high

    def _read(
        self, raws: Sequence[bytes], tiles: Sequence[Tile], now: int
    ) -> Steps[list[list[Packed]] | None]:
        """Read packed keys of series, for each tile.

        None when the time for which that was planned was not the server's: it is known now.
        """
        if not tiles:
            return [[] for _ in raws]
        began = clock()
        packs = {(tile.rung, tile.pack): 0 for tile in tiles}
        at = {pack: number for number, pack in enumerate(packs)}
        places = [at[tile.rung, tile.pack] for tile in tiles]
        groups: dict[int, list[int]] = {}
        for number, raw in enumerate(raws):
            groups.setdefault(self.layout.partition(raw), []).append(number)
        commands: list[Command[Any]] = []
        for numbers in groups.values():
            heads = [self.layout.head(raws[number]) for number in numbers]
            commands += self.layout.read(heads, list(packs))
        outcomes = [outcome.result() for outcome in (yield from ask_all(commands))]
        found: list[list[Packed]] = [[] for _ in raws]
        for numbers, strings in zip(groups.values(), outcomes[::2], strict=True):
            for place, number in enumerate(numbers):
                some = strings[place * len(packs) : (place + 1) * len(packs)]
                packed = [
                    Packed(data, rung.buckets) for data, (rung, _) in zip(some, packs, strict=True)
                ]
                found[number] = [packed[i] for i in places]
        then = max(outcomes[1::2])
        self.layout.learn(then)
        then //= 1_000_000
        if min(tile.rung.ends(tile.pack) for tile in tiles) <= then:
            return None
        return found if abs(then - now) <= clock() - began + 1 else None

    def _explain(self, key: Id, start: Instant, end: Instant | None) -> Steps[Plan]:
        raw = _keys.id_bytes(key, "series")
        made, (found,) = yield from self._planned([raw], *self._range(start, end))
        return made._replace(bytes=sum({id(packed): packed.size for packed in found}.values()))

    def _today(self, key: Id, tz: str | dt.tzinfo) -> Steps[Total]:
        place = _calendar.zone(tz)
        if not self.layout.rungs:
            yield from self.layout.look()  # and learn the time
        start, end = _calendar.day(self.layout.now(), place)
        (total,) = yield from self._sums([key], start, end, False)
        return total

    def _points(
        self,
        key: Id,
        start: Instant,
        end: Instant | None,
        step: _calendar.Step,
        tz: str | dt.tzinfo,
    ) -> Steps[Series]:
        raw, place = _keys.id_bytes(key, "series"), _calendar.zone(tz)
        low, high = self._range(start, end)
        rungs = self.layout.rungs or (yield from self.layout.look())
        for _ in range(_TRIES):
            now = int(self.layout.now())
            last = now + 1 if high is None else high
            marks = _calendar.edges(low, max(last, low + 1), step, place)
            rung = _fitting(rungs, marks, now)
            tiles = list(run_of(rung, marks[0], min(marks[-1], now + 1), now))
            found = yield from self._read([raw], tiles, now)
            if found is not None:
                return _series(marks, rung, tiles, found[0], (low, last), now)
        raise self._late()

    def _late(self) -> UnavailableError:
        return UnavailableError(
            f"series {self.layout.full_name}: every answer came too late for its question"
        )


def _fitting(rungs: Ladder, marks: Sequence[int], now: int) -> Rung:
    """Return the coarsest resolution whose buckets fit; one that reaches back far enough."""
    common = _calendar.common(marks)
    fit = [rung for rung in rungs if common % rung.step == 0]
    if not fit:
        raise UsageError(f"points begin at multiples of {rungs[0].step} s, the finest resolution")
    whole = [rung for rung in fit if rung.horizon(now) <= marks[0]]
    return whole[-1] if whole else min(fit, key=lambda rung: rung.horizon(now))


def _series(
    marks: Sequence[int], rung: Rung, tiles: Sequence[Tile], packed: Sequence[Packed],
    asked: tuple[int, int], now: int,
) -> Series:  # fmt: skip
    """Make points of what was read."""
    flat: list[int] = []
    for tile, each in zip(tiles, packed, strict=True):
        flat += each.spread(tile.first, tile.last)
    step, horizon = rung.step, rung.horizon(now)
    begins = tiles[0].start if tiles else marks[-1]
    points = len(marks) - 1
    # Those that begin in the future, or before what is there.
    ahead = points - min(points, bisect.bisect_right(marks, now))
    lost = min(bisect.bisect_left(marks, horizon), points - ahead)
    values: list[int | None] = [None] * lost
    known = range(lost, points - ahead)
    if isinstance(marks, range) and marks.step == step:
        at = (marks[lost] - begins) // step
        values += flat[at : at + len(known)]
    else:
        for i in known:
            at, to = (marks[i] - begins) // step, (marks[i + 1] - begins) // step
            values.append(sum(flat[at:to]))
    values += [None] * ahead
    first, last = asked
    return Series(
        marks[:-1], marks[-1], values, resolution=step, complete=not lost,
        first_partial=marks[0] < first, last_partial=marks[-1] > min(last, now),
    )  # fmt: skip


def _total(made: Plan, packed: Sequence[Packed]) -> Total:
    value = 0
    for tile, each in zip(made.tiles, packed, strict=True):
        value += sum(each.values(tile.first, tile.last))
    return Total(value, made.start, made.end, made.resolution, made.complete)


def _until(hits: Sequence[Hit]) -> tuple[str, str]:
    """Return from when on hits may be written, and no end: none is far in the future."""
    return f"{max(hit.time for hit in hits) - int(SKEW)}000000", str(EXACT)


def _item(item: Item) -> tuple[Id, int, Instant | None]:
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise UsageError(
            f"incr_many() takes (series, amount) or (series, amount, at), not {item!r}"
        )
    key, amount, at = (*item, None)[:3]
    return key, amount, at


def _amount(amount: int) -> int:
    if isinstance(amount, bool) or not isinstance(amount, int) or not -EXACT < amount < EXACT:
        raise UsageError(f"an amount is an int below 2^53 of either sign, not {amount!r}")
    return amount


def _shown(hit: Hit) -> str:
    return repr(_keys.id_shown(hit.key))


def shown(raw: bytes) -> str | bytes:
    """Return the series of a hit in the buffer, as readers get it."""
    return _keys.id_shown(raw.partition(b":")[2])
