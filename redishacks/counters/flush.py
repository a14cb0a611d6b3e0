"""`FlushJob`: claim what is pending, write it to SQL chunk by chunk, acknowledge.

One conversation, `flush_steps`, for sync and async; every step of it may be the last one of a
process that dies, and every step may be done twice.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from redishacks import _keys
from redishacks._command import (
    Ask,
    Call,
    Command,
    Meanwhile,
    Outcome,
    Sleep,
    Steps,
    ask,
    ask_all,
    call,
)
from redishacks._drive import drive, drive_async
from redishacks._sink import AsyncSink, Begun, Chunk, ChunkId, Rule, Sink, Status
from redishacks.counters.buffered import AsyncBufferedCounter, BufferedCounter
from redishacks.counters.commands import PAGE, Batch, Held, Id, Layout, Page, State
from redishacks.counters.report import BatchStatus, CounterStatus, FlushReport, Progress
from redishacks.errors import (
    RedisHacksError,
    SchemaError,
    ServerError,
    UnavailableError,
    UsageError,
)

#: With so many batches of a partition that cannot be applied, more are claimed there only after a
#: pause: what stays pending is one set, whatever its size, and `value` reads every batch. For ever
#: would be too long: what is pending may well pass.
_STUCK = 16
_PAUSE = 600_000_000
#: How often `value` looks again when flushers claim and apply between its two reads.
_LOOKS = 100

_log = logging.getLogger("redishacks")


class _Job:
    """What both colours share: the conversations."""

    def __init__(
        self,
        layout: Layout,
        deadline: float,
        sink: Sink | AsyncSink,
        chunk: int,
        on_batch: Callable[[FlushReport], None] | None,
    ) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= 100_000:
            raise UsageError(f"chunk must be an int from 1 to 100,000 ids, not {chunk!r}")
        self.layout = layout
        self.sink = sink
        self._deadline = deadline
        self.chunk = chunk
        self.on_batch = on_batch
        self._stopping = False
        #: Whether partitions and columns are known to be the counter's.
        self._agreed = False
        #: The ledger that the run in progress is bound to.
        self._ledger = ""
        self._progress = Progress()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.layout.full_name} to {self.sink.destination()}>"

    def stop(self) -> None:
        """Let the run in progress finish the batch in hand and end; safe in a signal handler."""
        self._stopping = True

    def so_far(self) -> FlushReport:
        """Return the figures of the run in progress, or of the last one; safe in any thread."""
        return self._progress.report()

    # The run

    def flush_steps(self, time_budget: float | None = None) -> Steps[FlushReport]:
        """One run, as steps for a driver: any of them may be the last, or happen twice."""
        if time_budget is not None and (
            isinstance(time_budget, bool)
            or not isinstance(time_budget, int | float)
            or not 0 <= time_budget < math.inf
        ):
            raise UsageError(f"time_budget is a number of seconds from 0, not {time_budget!r}")
        progress = self._progress = Progress()
        # Nothing is claimed before SQL has answered.
        clock = yield from self._bind()
        states = yield from self._states()
        for state in states:  # bound anew since? An older batch does not say where it goes
            self.layout.check_bound(state, self.sink.destination(), self._ledger)
        todo = [(state.partition, batch) for state in states for batch in state.batches]
        claims = [(p, "") for p in range(self.layout.partitions)]
        stuck: Counter[int] = Counter()
        failed: list[RedisHacksError] = []
        for p, batch in [*todo, *claims]:
            if self._over(progress, time_budget):
                break
            try:
                if batch:
                    progress.recovered += 1
                    clock = yield from self._apply(p, batch, clock, progress, True)
                elif claimed := (yield from self._claim(p, stuck[p])):
                    clock = yield from self._apply(p, claimed, clock, progress, False)
            except (ServerError, SchemaError, UsageError) as error:
                # It stays claimed, and must not hold up the others.
                _log.info("a batch of %s is left for later: %s", self.layout.full_name, error)
                failed.append(error)
                stuck[p] += 1
            except UnavailableError as error:
                # A trigger of a single row may say so, too. Who is really away ends the run.
                failed.append(error)
                stuck[p] += 1
                try:
                    clock = yield from self._begin_again()
                    yield from self._states()
                except UnavailableError:
                    raise error from None
                _log.info("a batch of %s is left for later: %s", self.layout.full_name, error)
        else:
            if not failed:
                yield from self._prune()
        if failed:
            raise failed[0]
        return progress.report()

    def _over(self, progress: Progress, time_budget: float | None) -> bool:
        return self._stopping or (
            time_budget is not None and time.monotonic() - progress.began >= time_budget
        )

    def _bind(self) -> Steps[Any]:
        """Bind the counter to this job's destination and ledger; return the database's clock."""
        begun: Begun = yield from call(self.sink.begin, self.layout.columns.rules)
        # Every time: somebody may have bound the counter anew since the last run.
        yield from self.layout.agree(self.sink.destination(), begun.ledger)
        self._agreed, self._ledger = True, begun.ledger
        return begun.clock

    def _begin_again(self) -> Steps[Any]:
        """See that the ledger is still that of this run; return the database's clock."""
        begun: Begun = yield from call(self.sink.begin, self.layout.columns.rules)
        if begun.ledger != self._ledger:  # an error that ends the run: no batch may go on
            raise UnavailableError(
                f"the ledger of counter {self.layout.full_name} has been changed while a run was "
                "in progress; the next run tells what to do"
            )
        return begun.clock

    def _states(self) -> Steps[list[State]]:
        outcomes = yield from ask_all(self.layout.states())
        return [outcome.result() for outcome in outcomes]

    def _claim(self, p: int, stuck: int) -> Steps[str | None]:
        """Claim a partition; None when nothing was pending or others were quicker each time.

        With many of its batches stuck, None too until the newest one is old enough.
        """
        destination = self.sink.destination()
        for _ in range(10):
            state = yield from ask(self.layout.state(p))
            if not state.pending_ids:
                return None
            newest = max(state.batches.values(), default=0)
            if stuck >= _STUCK and state.now < newest + _PAUSE:
                return None
            size = yield from ask(
                self.layout.claim(p, state.next, self.chunk, destination, self._ledger)
            )
            if size >= 0:
                return state.next if size else None
        return None

    def _apply(
        self, p: int, batch_id: str, clock: Any, progress: Progress, recovered: bool
    ) -> Steps[Any]:
        """Bring a batch into the ledger and drop it; return the database's clock."""
        batch = yield from self._batch(p, batch_id)
        if batch is None:
            return clock
        # The counter may have been bound anew, and the batch claimed, since this run has agreed.
        self.layout.check_bound(batch, self.sink.destination(), self._ledger)
        yield from self._replicated(batch)
        remaining = list(range(batch.chunks))
        if recovered:
            # Another flusher may be at the same batch, from the front: keep out of its way. What
            # the ledger has is read again all the same: only its digest tells that it is the same.
            random.shuffle(remaining)
        since = time.monotonic()
        busy = 0
        ahead: tuple[int, list[Outcome[Page]]] | None = None
        while remaining:
            index = remaining.pop(0)
            if ahead is None or ahead[0] != index:
                ahead = index, (yield from ask_all(self._pages(batch, index)))
            chunk = yield from self._chunk_of(batch, index, ahead[1], clock)
            if chunk is None:  # another flusher has finished and dropped the batch
                return clock
            ahead = None
            if remaining:  # read the next chunk while the database is busy with this one
                following = remaining[0]
                verdict, pages = yield Meanwhile(
                    Call(self.sink.apply, (chunk,)), Ask(self._pages(batch, following))
                )
                ahead = following, pages
            else:
                verdict = yield from call(self.sink.apply, chunk)
            if verdict.status is Status.BUSY:
                remaining.append(index)
                busy += 1
                if busy >= len(remaining):  # a whole round of them
                    since, waited = time.monotonic(), time.monotonic() - since
                    progress.patience -= waited
                    if progress.patience < 0:
                        raise UnavailableError(
                            f"{len(remaining)} chunks of batch {batch.id} stay locked by other "
                            "transactions; the batch stays claimed and the next run applies it"
                        )
                    busy = 0
                    yield Sleep(random.uniform(0.01, 0.2))
                continue
            if verdict.status is Status.STALE:
                remaining.append(index)
                ahead = None
                clock = yield from self._begin_again()
                continue
            since, busy = time.monotonic(), 0
            progress.count(chunk, verdict)
        yield from ask(self.layout.ack(batch))
        progress.batches += 1
        _log.info("batch %s of %s: %d ids in SQL", batch.id, self.layout.full_name, batch.size)
        if self.on_batch is not None:
            self.on_batch(progress.report())
        return clock

    def _batch(self, p: int, batch_id: str) -> Steps[Batch | None]:
        """Read what a batch is; None when another flusher has dropped it."""
        batch = yield from ask(self.layout.batch(p, batch_id))
        if batch is not None:
            unknown = [name for name in batch.columns if name not in self.layout.columns.rules]
            if unknown:
                raise UsageError(
                    f"a batch of counter {self.layout.full_name} has columns this job does not "
                    f"know: {', '.join(unknown)}"
                )
        return batch

    def _replicated(self, batch: Batch) -> Steps[None]:
        """With replicas attached, see that one of them has the claim before SQL does."""
        try:
            role = yield from ask(self.layout.role(batch))
        except ServerError as error:
            if error.code == "NOPERM":
                raise
            return  # a stand-in for Redis that has no ROLE has no replicas either
        if not role:
            return
        outcomes = yield from ask_all(self.layout.wait(batch, int(self._deadline * 500)))
        if not outcomes[-1].result():
            raise UnavailableError(
                f"no replica has confirmed batch {batch.id} in time; it stays claimed and the next "
                "run applies it"
            )

    def _pages(self, batch: Batch, index: int) -> list[Command[Page]]:
        start = index * batch.chunk
        stop = min(start + batch.chunk, batch.size)
        return [
            self.layout.page(batch, at, min(at + PAGE, stop)) for at in range(start, stop, PAGE)
        ]

    def _chunk_of(
        self, batch: Batch, index: int, outcomes: list[Outcome[Page]], clock: Any
    ) -> Steps[Chunk | None]:
        """Make a chunk of its pages; None when the batch has been dropped meanwhile."""
        ids: list[bytes] = []
        first: list[int | None] = []
        for outcome in outcomes:
            page_ids, amounts = outcome.result()
            ids += page_ids
            first += amounts
        values = [first]
        for column in batch.columns[1:]:
            others: list[int | None] = []
            more: list[Command[list[int | None]]] = [
                self.layout.more(batch, column, ids[at : at + PAGE])
                for at in range(0, len(ids), PAGE)
            ]
            for amounts_of in (yield from ask_all(more)):
                others += amounts_of.result()
            values.append(others)
        # Dropped in between, a batch reads as short or as empty columns: look at it last.
        if (yield from ask(self.layout.batch(batch.partition, batch.id))) is None:
            return None
        if len(ids) != min(batch.chunk, batch.size - index * batch.chunk):
            raise ServerError(f"ERR batch {batch.id} has lost ids in Redis")
        rules = tuple(self.layout.columns.rules[name] for name in batch.columns)
        return Chunk(
            self.layout.full_name,
            batch.id,
            index,
            batch.columns,
            rules,
            ids,
            tuple(values),
            _digest(ids, values),
            clock,
            self._ledger,
        )

    def _prune(self) -> Steps[None]:
        # What SQL has first, then what Redis still has: a batch in the ledger has been claimed.
        known = yield from call(self.sink.unsettled, self.layout.full_name)
        live = {batch for state in (yield from self._states()) for batch in state.batches}
        yield from call(self.sink.prune, self.layout.full_name, frozenset(known - live))

    # Readers

    def value_steps(self, id: Id) -> Steps[dict[str, int | None]]:
        """Read one id's columns, as steps for a driver; flushes may go on between them."""
        raw = _keys.id_bytes(id)
        if not self._agreed:
            self._agreed = yield from self.layout.check()
        columns = self.layout.columns
        look = self.layout.state(self.layout.partition(raw), naming=False)
        for _ in range(_LOOKS):
            state = yield from ask(look)
            held: Held | None = yield from ask(self.layout.held(raw, state))
            if held is None:
                continue
            # Before SQL is asked: elsewhere it may not even have the table.
            self.layout.check_bound(state, self.sink.destination(), state.ledger or "")
            chunks = {ChunkId(b, c): amounts for b, (c, amounts) in held.claimed.items()}
            reading = yield from call(
                self.sink.read,
                self.layout.full_name,
                columns.rules,
                raw,
                list(chunks),
                [state.next] if state.next else [],
            )
            self.layout.check_bound(state, self.sink.destination(), reading.ledger)
            if state.next in reading.begun:
                continue  # what was read as pending is in SQL by now: counted twice
            if not state.next and (yield from ask(look)).next:
                continue  # claimed for the first time meanwhile: under a name we did not ask for
            total = [reading.row.get(name) for name in columns.names]
            columns.merge(total, [reading.dead.get(name) for name in columns.names])
            columns.merge(total, held.pending)
            for chunk, amounts in chunks.items():
                if chunk not in reading.applied:
                    columns.merge(total, amounts)
            return dict(zip(columns.names, total, strict=True))
        raise UnavailableError(f"value of {id!r}: flushes went by faster than it could be read")

    def _value(self, id: Id, column: str | None) -> Steps[int]:
        at = self.layout.columns.index(column)
        values = yield from self.value_steps(id)
        return list(values.values())[at] or 0

    def _status(self) -> Steps[CounterStatus]:
        known = yield from self.layout.check()
        states = yield from self._states()
        sums = {n: 0 for n, rule in self.layout.columns.rules.items() if rule is Rule.SUM}
        batches = []
        oldest: list[int] = []
        now = max(state.now for state in states)
        for state in states:
            if state.since is not None:
                oldest.append(state.since)
            for name in sums:
                for start in range(0, state.pending_ids, PAGE):
                    page = yield from ask(
                        self.layout.pending_page(state.partition, name, start, start + PAGE)
                    )
                    sums[name] += sum(filter(None, page[1]))
            for batch_id, claimed in state.batches.items():
                batch = yield from ask(self.layout.batch(state.partition, batch_id))
                if batch is not None:
                    oldest.append(batch.since)
                    age = (now - claimed) / 1e6
                    batches.append(BatchStatus(batch_id, batch.size, age, batch.chunks))
        flushed = [state.flushed for state in states if state.flushed is not None]
        dead = yield from call(self.sink.dead_count, self.layout.full_name)
        return CounterStatus(
            self.layout.full_name,
            sum(state.pending_ids for state in states),
            sums,
            (now - min(oldest)) / 1e6 if oldest else None,
            batches,
            (now - max(flushed)) / 1e6 if flushed else None,
            dead,
            known,
            (yield from self._is_elsewhere(states)),
        )

    def _is_elsewhere(self, states: list[State]) -> Steps[bool]:
        destination, ledger = self.sink.destination(), ""
        try:
            if any(state.ledger for state in states):
                # A begin() would give the ledger an identity: this looks on.
                reading = yield from call(
                    self.sink.read, self.layout.full_name, self.layout.columns.rules, b"", [], []
                )
                ledger = reading.ledger
            for state in states:
                self.layout.check_bound(state, destination, ledger)
        except SchemaError:
            return False  # it cannot be told; a run tells what is missing
        except UsageError:
            return True
        return False

    def _rebind(self, bury: bool) -> Steps[None]:
        states = yield from self._states()
        in_flight = {batch: state.partition for state in states for batch in state.batches}
        forgotten = bury or not in_flight
        begun = Begun(None, "")
        if bury:
            begun = yield from call(self.sink.begin, self.layout.columns.rules)
            for batch, p in in_flight.items():
                yield from self._disown(p, batch, begun)
        if forgotten:
            forget = self.layout.forget_destination(
                list(in_flight), self.sink.destination(), begun.ledger
            )
            outcomes = yield from ask_all(forget)
            forgotten = all(outcome.result() for outcome in outcomes)
            if not forgotten:  # a batch was claimed meanwhile: no partition may go elsewhere
                yield from self.layout.agree(states[0].destination, states[0].ledger)
        if not forgotten:
            raise UsageError(
                f"counter {self.layout.full_name} has batches in flight: flush them to the old "
                "destination first, whose ledger knows what of them it has; where that ledger is "
                "lost, rebind(bury=True) lets them become dead letters"
            )

    def _disown(self, p: int, batch_id: str, begun: Begun) -> Steps[None]:
        """Give the ledger other content for every chunk of a batch, and so let each be a conflict.

        Of a batch that another ledger knew, nobody here can tell which chunks were applied.
        """
        batch = yield from self._batch(p, batch_id)
        if batch is None:
            return
        rules = tuple(self.layout.columns.rules[name] for name in batch.columns)
        nothing: Any = tuple([] for _ in batch.columns)
        for index in range(batch.chunks):
            chunk = Chunk(
                self.layout.full_name, batch.id, index, batch.columns, rules, [], nothing,
                _digest([], []), *begun,
            )  # fmt: skip
            verdict = yield from call(self.sink.apply, chunk)
            if verdict.status in (Status.BUSY, Status.STALE):
                raise UnavailableError(
                    f"chunk {index} of batch {batch.id} is locked by another transaction; nothing "
                    "was rebound: try again later"
                )


def _digest(ids: list[bytes], values: list[list[int | None]]) -> bytes:
    """Tell chunks of different content apart. Its form is fixed: old ledger rows are compared."""
    return hashlib.blake2b(repr((ids, values)).encode(), digest_size=16).digest()


def _apply_of(sink: object) -> Any:
    """Return a sink's method, or raise `UsageError` for what is none."""
    if isinstance(sink, type) or not callable(getattr(sink, "apply", None)):
        raise UsageError(f"a job writes to a sink such as PostgresSink(...), not to {sink!r}")
    return sink.apply  # type: ignore[attr-defined]


class FlushJob(_Job):
    """Writes what a counter has pending to SQL, each hit exactly once.

    `sink` is a `PostgresSink`, a `SQLiteSink` or your own `redishacks.sinks.Sink`. `chunk` is the
    number of ids in one SQL transaction. `on_batch` is called with the figures so far after every
    batch. Any number of jobs may run at once, on any number of machines.

    A counter flushes to one destination, remembered in Redis at the first flush; a job with
    another table, key or columns raises `UsageError` (see `rebind`). So does one whose table is in
    another database, or whose ledger was emptied: only the ledger knows what has been applied.

    Where exactly-once ends: when Redis fails over to a copy that lacks the last writes, hits
    acknowledged in that gap are lost, and a batch whose claim is undone is claimed anew under
    another id. With replicas attached a flush therefore waits until one of them has the claim
    before it writes to SQL. A batch that comes back with other content is never skipped: its
    chunks go to the dead letters, for you to decide.
    """

    sink: Sink

    def __init__(
        self,
        counter: BufferedCounter,
        sink: Sink,
        *,
        chunk: int = 20_000,
        on_batch: Callable[[FlushReport], None] | None = None,
    ) -> None:
        if not isinstance(counter, BufferedCounter):
            raise UsageError(f"FlushJob takes a BufferedCounter, not {type(counter).__name__}")
        if inspect.iscoroutinefunction(_apply_of(sink)):
            raise UsageError(f"{type(sink).__name__} is for AsyncFlushJob")
        super().__init__(counter.layout, counter.deadline, sink, chunk, on_batch)
        self.counter = counter
        self._transport = counter.transport

    def run(self, *, time_budget: float | None = None) -> FlushReport:
        """Finish what earlier runs left, claim what is pending, write it, return the figures.

        With a time budget (seconds) no batch is begun after it. Raises `UnavailableError` when
        Redis or SQL is away (nothing is lost, the next run goes on), `SchemaError` when the
        database lacks something, `UsageError` when counter and job do not fit. A batch that cannot
        be applied stays claimed and the others go on; the first such error is raised at the end,
        and `so_far()` has the figures. With 16 such batches in a partition, more is claimed there
        every ten minutes only.

        Round trips to Redis: 3 for an idle run, 4 more for a batch, 2 for each of its chunks.
        """
        self._stopping = False
        return drive(self.flush_steps(time_budget), self._transport, self._deadline)

    def value(self, id: Id, column: str | None = None) -> int:
        """Return what SQL will show for an id once all is flushed; 0 for an unknown one.

        SQL + pending + claimed but not yet in the ledger, and dead letters still open. For
        positive amounts it never goes down and never counts twice while flushers run, between
        failovers of Redis; hits that still linger in a process are not in it. Ids that are one key
        in SQL (`1` and `01` of an integer key) are counted apart until flushed. Raises `UsageError`
        where the counter is bound to another destination or ledger; binds nothing itself. Two
        round trips to Redis and one statement; one more before the first flush, and more when a
        flush comes between.
        """
        return drive(self._value(id, column), self._transport, self._deadline)

    def values(self, id: Id) -> dict[str, int | None]:
        """Return `value` for every column; None where nothing was ever counted."""
        return drive(self.value_steps(id), self._transport, self._deadline)

    def status(self) -> CounterStatus:
        """Return where the counter stands. Reads all pending amounts, in pages."""
        return drive(self._status(), self._transport, self._deadline)

    def rebind(self, *, bury: bool = False) -> None:
        """Forget the destination and its ledger; the next run binds the counter to its own.

        Raises `UsageError` while batches are in flight: the old ledger knows which of their chunks
        have been applied. When it is lost nobody knows, and applying them again could count twice.
        With `bury=True` they become dead letters of this job's database instead, as conflicts, at
        the next run: compare them with the table, then let `redishacks dead --retry` apply them or
        delete them there. Until that run `value` lacks them. One transaction per chunk in flight.
        """
        drive(self._rebind(bury), self._transport, self._deadline)


class AsyncFlushJob(_Job):
    """`FlushJob` for asyncio. A sync sink is called in a thread."""

    def __init__(
        self,
        counter: AsyncBufferedCounter,
        sink: Sink | AsyncSink,
        *,
        chunk: int = 20_000,
        on_batch: Callable[[FlushReport], None] | None = None,
    ) -> None:
        if not isinstance(counter, AsyncBufferedCounter):
            raise UsageError(
                f"AsyncFlushJob takes an AsyncBufferedCounter, not {type(counter).__name__}"
            )
        _apply_of(sink)
        super().__init__(counter.layout, counter.deadline, sink, chunk, on_batch)
        self.counter = counter
        self._transport = counter.transport

    async def run(self, *, time_budget: float | None = None) -> FlushReport:
        """Flush, as `FlushJob.run`."""
        self._stopping = False
        return await drive_async(self.flush_steps(time_budget), self._transport, self._deadline)

    async def value(self, id: Id, column: str | None = None) -> int:
        """Return what SQL will show for an id, as `FlushJob.value`."""
        return await drive_async(self._value(id, column), self._transport, self._deadline)

    async def values(self, id: Id) -> dict[str, int | None]:
        """Return `value` for every column, as `FlushJob.values`."""
        return await drive_async(self.value_steps(id), self._transport, self._deadline)

    async def status(self) -> CounterStatus:
        """Return where the counter stands, as `FlushJob.status`."""
        return await drive_async(self._status(), self._transport, self._deadline)

    async def rebind(self, *, bury: bool = False) -> None:
        """Forget the destination, as `FlushJob.rebind`."""
        await drive_async(self._rebind(bury), self._transport, self._deadline)
