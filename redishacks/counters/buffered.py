"""`BufferedCounter`: count in Redis now, let a flush job write to SQL later."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from redishacks import _keys
from redishacks._buffer import Buffer, Items, Refused
from redishacks._command import Command, Outcome, Steps, ask, ask_all
from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._linger import (
    AsyncCoalescer,
    AsyncLingering,
    Coalescer,
    Lingering,
    check_linger,
)
from redishacks._sink import Rule
from redishacks._transport import Hook, connect, connect_async
from redishacks._units import EXACT, Seconds, seconds
from redishacks.counters.commands import Amount, Columns, Id, Layout, new_id
from redishacks.errors import PartlyAppliedError, UsageError

#: Parts of one `incr_many` that go out in one exchange.
_PARTS_AT_ONCE = 16

T = TypeVar("T", bound=Transport | AsyncTransport)
C = TypeVar("C", bound=Coalescer | AsyncCoalescer)

#: Ids (`Id`; a mapping's key type is invariant, hence Any), each with an amount or one per column.
Amounts = Mapping[Any, Amount | Mapping[str, Amount]]


class _Batcher(Layout):
    """The layout, as the coalescing buffer needs it."""

    refusal = "the pending sum would pass 2^53"

    def hit(self, times: int) -> Sequence[int | None]:
        """Return the amounts of a plain hit that came so many times."""
        return (times, *(None for _ in self.columns.names[1:]))

    def merge(self, into: list[int | None], amounts: Sequence[int | None]) -> None:
        """Merge amounts into others."""
        self.columns.merge(into, amounts)


class _Counter(ABC, Generic[T, C]):
    """What both colours share: options, checked input turned into commands."""

    def __init__(
        self,
        client: Any,
        name: str,
        *,
        columns: Mapping[str, str | Rule] | None = None,
        partitions: int = 1,
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
        self.layout = _Batcher(prefix, name, Columns(columns), partitions)
        self.deadline = seconds(deadline, "deadline")
        self._plain = self.layout.columns.rules[self.layout.columns.names[0]] is Rule.SUM
        self._once = self.layout.hit(1)
        self._checked = False
        self.client = client
        self.transport: T = self._connect(client, on_command)
        self._coalescer: C | None = None
        if linger is not None:
            self._coalescer = self._coalesce(
                Buffer(self.layout, new_id, max_buffered, on_refused, on_maybe_applied),
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

    def _amounts(self, amount: Amount | None, given: dict[str, Amount]) -> list[int | None]:
        columns = self.layout.columns
        if amount is None and not given:
            if not self._plain:
                raise UsageError(f"give an amount for {columns.names[0]}, it is not a sum")
            amount = 1
        if amount is not None:
            given = {columns.names[0]: amount, **given}
        return columns.amounts(given)

    def _hit(self, id: Id, amount: Amount | None, given: dict[str, Amount]) -> Command[None] | None:
        raw = _keys.id_bytes(id)
        if amount is None and self._plain and not given:
            return self.layout.add_one(raw, self._once)
        amounts = self._amounts(amount, given)
        if amounts.count(None) == len(amounts):
            return None
        return self.layout.add_one(raw, amounts)

    def _items(self, hits: Amounts) -> Items:
        """Check many hits; ids that are the same as bytes become one."""
        columns = self.layout.columns
        plain = columns.signs == "+"
        if not isinstance(hits, Mapping):
            raise UsageError(
                'incr_many() takes a mapping of ids to amounts, such as {"/a": 2}, '
                f"not {type(hits).__name__}"
            )
        hits = dict(hits)  # another thread may change it meanwhile
        if plain and (usual := _in_bulk(hits)) is not None:
            return usual
        items: dict[bytes, list[int | None]] = {}
        for id, given in hits.items():
            raw = _keys.id_bytes(id)
            if plain and type(given) is int and -EXACT <= given <= EXACT:
                amounts: list[int | None] = [given or None]
            elif isinstance(given, Mapping):
                amounts = columns.amounts(given)
            else:
                amounts = columns.amounts({columns.names[0]: given})
            if raw in items:
                columns.merge(items[raw], amounts)
            elif amounts.count(None) < len(amounts):
                items[raw] = amounts
        return list(items.items())

    def _add_many(self, items: Items) -> Steps[None]:
        if not self.layout.agreed:
            yield from self.layout.agree()
        parts = list(self.layout.parts(items))
        failed: dict[str | bytes, Exception] = {}
        for start in range(0, len(parts), _PARTS_AT_ONCE):
            some = parts[start : start + _PARTS_AT_ONCE]
            outcomes: list[Outcome[int]] = yield from ask_all(
                [self.layout.add(p, part) for p, part in some]
            )
            for (_, part), outcome in zip(some, outcomes, strict=True):
                error = outcome.error
                if error is None and outcome.result() < 0:
                    raw = part[-outcome.result() - 1][0]
                    error = UsageError(
                        f"the pending sum of {_keys.id_shown(raw)!r} would pass 2^53; nothing of "
                        "its part was added"
                    )
                if error is not None:
                    failed.update((_keys.id_shown(raw), error) for raw, _ in part)
        if not failed:
            return
        errors = list({str(error): error for error in failed.values()}.values())
        if len(errors) == 1 and len(failed) == len(items):
            raise errors[0]
        raise PartlyAppliedError(
            f"{len(items) - len(failed)} of {len(items)} ids were added; {errors[0]}", failed
        )

    def _check(self) -> Steps[None]:
        if not self.layout.agreed and not self._checked:
            yield from self.layout.check()
            self._checked = True

    def _pending(self, id: Id, column: str | None) -> Steps[int]:
        command = self.layout.pending(_keys.id_bytes(id), column)
        yield from self._check()
        return (yield from ask(command)) or 0

    def _top(self, count: int, column: str | None) -> Steps[list[tuple[str | bytes, int]]]:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"top() takes a positive number of ids, not {count!r}")
        commands = self.layout.top(count, column)
        yield from self._check()
        found: list[tuple[bytes, int]] = []
        for outcome in (yield from ask_all(commands)):
            found += [(i, a) for i, a in zip(*outcome.result(), strict=True) if a is not None]
        found.sort(key=lambda item: (-item[1], item[0]))
        return [(_keys.id_shown(raw), amount) for raw, amount in found[:count]]


def _in_bulk(hits: Amounts) -> Items | None:
    """Check the usual hits, `{str: int}`, all at once; None: look at each by itself."""
    amounts: list[Any] = list(hits.values())
    if {*map(type, hits)} != {str} or {*map(type, amounts)} != {int}:
        return None
    try:
        raws = [id.encode() for id in hits]
    except UnicodeEncodeError:
        return None
    sizes = list(map(len, raws))
    fit = min(sizes) > 0 and max(sizes) <= _keys.MAX_ID
    if not fit or min(amounts) < -EXACT or max(amounts) > EXACT:
        return None
    return [(raw, (amount,)) for raw, amount in zip(raws, amounts, strict=True) if amount]


class BufferedCounter(Lingering, _Counter[Transport, Coalescer]):
    """Counts hits in Redis until a `FlushJob` has written them to SQL.

    `client` is a `redis.Redis`, a Sentinel master, a `redis.RedisCluster`, a fakeredis client or a
    URL. `columns` maps each column to its merge rule ("sum", "max", "min"); without it there is
    one, `amount`, a sum. `partitions` spreads a counter over so many slots of a cluster, and must
    be the same everywhere. `deadline` bounds every exchange with Redis, in seconds.

    With `linger`, hits are merged in this process and sent every so many seconds, when
    `max_buffered` ids are held, on `close()`, at the end of a `with`, and at interpreter exit.
    A SIGKILL then loses the hits of the last `linger` seconds, plus those of the time that sends
    had been failing; so does what else ends a process on the spot: a SIGTERM that nothing handles,
    `os._exit`, `multiprocessing.Pool.terminate` (and so the end of a `with Pool`). Nothing else
    loses or doubles one. A full buffer makes `incr` raise
    `UnavailableError` with the hit not counted, or wait up to `deadline` first when Redis is only
    slow or `overflow="block"`. A hit that Redis will never take (its sum would pass 2^53) is
    logged and passed to `on_refused`; one in doubt for 12 hours to `on_maybe_applied`.

    `on_command(name, node, seconds, error)` is called after every command, for tracing.

    Safe in threads, greenlets, signal handlers and after fork (a child begins with an empty
    buffer; the parent sends its own, with the hit that a handler's fork interrupted).
    """

    def _connect(self, client: Any, on_command: Hook | None) -> Transport:
        return connect(client, on_command)

    def _coalesce(self, buffer: Buffer, **options: Any) -> Coalescer:
        return Coalescer(buffer, self.transport, **options)

    def incr(self, id: Id, amount: Amount | None = None, **columns: Amount) -> None:
        """Add to an id: `incr("/a")`, `incr("/a", 3)`, `incr(42, times_seen=1, last_seen=now)`.

        `id` is a str, an int or bytes, up to 2,048 bytes; amounts are ints of either sign, in max
        and min columns also aware datetimes. All columns change in one atomic script.

        One round trip, none with `linger`. Raises `UsageError` for what can never be counted
        (beyond 2^53 too), `UnavailableError` when it was not counted, and `MaybeAppliedError` when
        the reply was lost (with `linger` only where a hit came while it was being closed, or in
        an exit handler after the last send, and could not be sent at once).
        """
        coalescer = self._coalescer
        if coalescer is None:
            command = self._hit(id, amount, columns)
            if command is not None:
                if not self.layout.agreed:
                    drive(self.layout.agree(), self.transport, self.deadline)
                self.transport.call(command, self.deadline)
            return
        if (
            amount is None
            and type(id) is str
            and not columns
            and self._plain
            and id.isascii()
            and 0 < len(id) <= _keys.MAX_ID
        ):
            buffer = coalescer.buffer
            ones = buffer.ones
            if len(ones) >= buffer.room:
                coalescer.make_room()
            ones.append(id)
            if coalescer.closed:
                coalescer.send_late()
        else:
            raw = _keys.id_bytes(id)
            amounts = self._amounts(amount, columns)
            if amounts.count(None) < len(amounts):
                coalescer.add(raw, amounts)

    def incr_many(self, hits: Amounts) -> None:
        """Add to many ids: `{"/a": 2, "/b": 1}` or `{42: {"times_seen": 1, "last_seen": now}}`.

        Goes out in parts of at most 2,500 ids and 1 MB, sixteen to a round trip; each part is
        atomic, and each id stands in one part. Ids that are the same as bytes are merged first.
        Raises as `incr` does when nothing was added, else `PartlyAppliedError`, which says what
        became of which id; with `linger` too, when the buffer fills midway.
        """
        items = self._items(hits)
        if self._coalescer is not None:
            self._coalescer.add_all(items)
        elif items:
            drive(self._add_many(items), self.transport, self.deadline)

    def pending(self, id: Id, column: str | None = None) -> int:
        """Return what is pending of an id: counted in Redis, not yet claimed by a flush.

        0 when nothing is. One round trip, and one to see the layout the first time.
        `FlushJob.value` is what SQL will show in the end.
        """
        return drive(self._pending(id, column), self.transport, self.deadline)

    def top(self, count: int = 10, column: str | None = None) -> list[tuple[str | bytes, int]]:
        """Return the ids with the largest pending amounts, hottest first. One round trip."""
        return drive(self._top(count, column), self.transport, self.deadline)


class AsyncBufferedCounter(AsyncLingering, _Counter[AsyncTransport, AsyncCoalescer]):
    """`BufferedCounter` for asyncio, with the same arguments; `client` is from `redis.asyncio`.

    With `linger`, hits are sent by a task of the running loop; `asyncio.run` lets it send the rest
    before the loop closes. Safe in many tasks and in event loops one after another, not in several
    threads at once.
    """

    def _connect(self, client: Any, on_command: Hook | None) -> AsyncTransport:
        return connect_async(client, on_command)

    def _coalesce(self, buffer: Buffer, **options: Any) -> AsyncCoalescer:
        return AsyncCoalescer(buffer, self.transport, **options)

    async def incr(self, id: Id, amount: Amount | None = None, **columns: Amount) -> None:
        """Add to an id, as `BufferedCounter.incr`."""
        if self._coalescer is None:
            command = self._hit(id, amount, columns)
            if command is not None:
                if not self.layout.agreed:
                    await drive_async(self.layout.agree(), self.transport, self.deadline)
                await self.transport.call(command, self.deadline)
            return
        raw = _keys.id_bytes(id)
        amounts = self._amounts(amount, columns)
        if amounts.count(None) < len(amounts):
            await self._coalescer.add(raw, amounts)

    async def incr_many(self, hits: Amounts) -> None:
        """Add to many ids, as `BufferedCounter.incr_many`."""
        items = self._items(hits)
        if self._coalescer is not None:
            await self._coalescer.add_all(items)
        elif items:
            await drive_async(self._add_many(items), self.transport, self.deadline)

    async def pending(self, id: Id, column: str | None = None) -> int:
        """Return what is pending of an id, as `BufferedCounter.pending`."""
        return await drive_async(self._pending(id, column), self.transport, self.deadline)

    async def top(
        self, count: int = 10, column: str | None = None
    ) -> list[tuple[str | bytes, int]]:
        """Return the ids with the largest pending amounts, hottest first. One round trip."""
        return await drive_async(self._top(count, column), self.transport, self.deadline)
