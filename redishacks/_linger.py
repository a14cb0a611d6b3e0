"""Coalescing in the process: merge hits in memory, send them every so often, each exactly once.

A hit is one append to a deque, which is atomic: safe in threads, signal handlers and finalizers,
with no lock that a handler could wait for. A sender drains the deques into dictionaries, cuts them
into parts, freezes them, and sends each part with a fence, (producer, sequence number), that the
script on the server checks: a part whose reply was lost is sent again as it was and counts once.

One part per partition is outstanding at a time; newer hits wait for the next. What a SIGKILL loses
is what was not sent: the hits of the last `linger` seconds plus the time that sends were failing.

`Buffer` holds hits and says what to send, without I/O. `Coalescer` sends from a thread,
`AsyncCoalescer` from a task.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from redishacks._command import Command, Steps, ask_all
from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._units import seconds
from redishacks.errors import MaybeAppliedError, RedisHacksError, UnavailableError, UsageError

Amounts = Sequence[int | None]
Items = list[tuple[bytes, Amounts]]

#: Hits that may stand in the log before they are merged.
LOG = 8192
#: A send in doubt is repeated this long; the fence on the server lives twice as long.
GIVE_UP = 12 * 3600.0
#: Nobody merges for so long: a lock held longer is one that an exception has leaked.
LEAKED = 5.0
#: Pause after a failed send, at least and at most.
PAUSES = (0.05, 1.0)

_log = logging.getLogger("redishacks")


class Batcher(Protocol):
    """What a tool tells the buffer about its hits."""

    def hit(self, times: int) -> Amounts:
        """Return the amounts of a plain hit that came so many times."""

    def merge(self, into: list[int | None], amounts: Amounts) -> None:
        """Merge amounts into others."""

    def parts(self, items: Iterable[tuple[bytes, Amounts]]) -> Iterable[tuple[int, Items]]:
        """Cut hits into (partition, part), each small enough for one script."""

    def add(self, p: int, items: Items, fence: tuple[str, int]) -> Command[int]:
        """Return the command that sends one part; it replies -n when the n-th id is refused."""

    def agree(self) -> Steps[None]:
        """Make sure, once before the first send, that everybody means the same keys."""


class Refused(NamedTuple):
    """A hit the server will never take, told to `on_refused`."""

    id: bytes
    amounts: Amounts
    reason: str


class _Part(NamedTuple):
    sequence: int
    items: Items
    first_sent: float


class Buffer:
    """Hits of one process that are not yet known to be in Redis.

    A plain hit is `ones.append(id)`, any other `others.append((id, amounts))`, both atomic; only
    an id in ASCII may stand in `ones`. Before either the caller asks whether it is `tight()`.
    """

    def __init__(
        self,
        batcher: Batcher,
        new_id: Callable[[], str],
        max_buffered: int,
        on_refused: Callable[[Refused], None] | None,
        on_maybe_applied: Callable[[Items], None] | None,
    ) -> None:
        if isinstance(max_buffered, bool) or not isinstance(max_buffered, int) or max_buffered < 1:
            raise UsageError(f"max_buffered must be a positive int, not {max_buffered!r}")
        self._batcher = batcher
        self._new_id = new_id
        self._max = max_buffered
        self._on_refused = on_refused
        self._on_maybe_applied = on_maybe_applied
        self.ones: deque[str] = deque()
        self.others: deque[tuple[bytes, Amounts]] = deque()
        self.reset()

    def reset(self) -> None:
        """Begin empty, as a new producer: at first, and in a forked child."""
        self.ones.clear()
        self.others.clear()
        self._merging = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._merged: dict[bytes, list[int | None]] = {}
        self._frozen: dict[int, deque[_Part]] = {}
        self._producer = self._new_id()
        self._sequences: dict[int, int] = {}
        self._defined = False
        #: Hits the log may hold; 0 makes the next hit ask for room.
        self.room = 0
        #: Why the last send failed.
        self.error: RedisHacksError | None = None

    def held(self) -> int:
        """Return how many ids are held at most, frozen ones included."""
        frozen = sum(len(part.items) for lane in list(self._frozen.values()) for part in list(lane))
        return self._unsent() + frozen

    def _unsent(self) -> int:
        return len(self.ones) + len(self.others) + len(self._counts) + len(self._merged)

    def tight(self) -> bool:
        """Return whether the next hit needs `make_room()` first."""
        return len(self.ones) + len(self.others) >= self.room

    def make_room(self) -> bool:
        """Merge the log; return False when the buffer is full."""
        self._merge()
        self.room = min(LOG, self._max - self.held() + len(self.ones) + len(self.others))
        return not self.tight()

    def _merge(self) -> None:
        # Never waited for: a signal handler may have interrupted its holder.
        if not self._merging.acquire(blocking=False):
            return
        try:
            # Bounded, or fast producers would keep it here for ever; counted in C. Only the holder
            # of the lock pops, so popleft() always finds something.
            ones, others = self.ones, self.others
            self._counts.update(itertools.islice(iter(ones.popleft, None), len(ones)))
            for raw, amounts in itertools.islice(iter(others.popleft, None), len(others)):
                into = self._merged.get(raw)
                if into is None:
                    self._merged[raw] = list(amounts)
                else:
                    self._batcher.merge(into, amounts)
        finally:
            self._merging.release()

    def _freeze(self) -> None:
        """Cut what is held into parts that stay as they are until answered.

        A partition that still has a part to be answered keeps its newer hits merged.
        """
        self._merge()
        if not self._merging.acquire(timeout=LEAKED):
            # A signal handler's exception came just after its holder had got it.
            self._merging = threading.Lock()
            self._merging.acquire()
        try:
            merged = {raw: list(amounts) for raw, amounts in self._merged.items()}
            for id, times in self._counts.items():
                into = merged.setdefault(id.encode(), [None] * len(self._batcher.hit(1)))
                self._batcher.merge(into, self._batcher.hit(times))
            frozen = {p: deque(lane) for p, lane in self._frozen.items()}
            waiting = set(frozen)
            kept: dict[bytes, list[int | None]] = {}
            sequences = dict(self._sequences)
            for p, items in self._batcher.parts(merged.items()):
                if p in waiting:
                    kept.update((raw, list(amounts)) for raw, amounts in items)
                    continue
                sequences[p] = sequences.get(p, 0) + 1
                frozen.setdefault(p, deque()).append(_Part(sequences[p], items, time.monotonic()))
            counts: Counter[str] = Counter()
            # One statement without a call in it: no signal handler runs in the middle.
            self._frozen, self._sequences, self._counts, self._merged = (
                frozen,
                sequences,
                counts,
                kept,
            )
        finally:
            self._merging.release()
        self.room = 0

    def send(self) -> Steps[None]:
        """Send what is held; on an error what was not answered stays frozen.

        Raises what a transport raises, and `UsageError` when the counter is laid out otherwise.
        """
        if not self.held():
            return
        if not self._defined:
            yield from self._batcher.agree()
            self._defined = True
        error = None
        if self._frozen:  # what an earlier send left comes first, as it was
            error = yield from self._send_frozen()
        self._freeze()
        error = (yield from self._send_frozen()) or error
        if error is not None:
            raise error
        self.error = None
        self.room = 0

    def _send_frozen(self) -> Steps[Exception | None]:
        """Send every partition's parts; one that fails does not hold up the others."""
        failed: dict[int, Exception] = {}
        while True:
            lanes = [(p, lane[0]) for p, lane in self._frozen.items() if p not in failed]
            if not lanes:
                return next(iter(failed.values()), None)
            outcomes = yield from ask_all(
                [
                    self._batcher.add(p, part.items, (self._producer, part.sequence))
                    for p, part in lanes
                ]
            )
            for (p, part), outcome in zip(lanes, outcomes, strict=True):
                if outcome.error is None:
                    self._answered(p, part, outcome.result())
                else:
                    failed[p] = outcome.error

    def _answered(self, p: int, part: _Part, reply: int) -> None:
        lane = self._frozen.get(p)
        if not lane or lane[0].sequence != part.sequence:
            return  # another loop's send was answered first
        items: Items = []
        if reply < 0:
            # Nothing of this part was applied, so its sequence number is still free.
            items = part.items[: -reply - 1] + part.items[-reply:]
        if items:
            lane[0] = part._replace(items=items)
        else:
            lane.popleft()
            if not lane:
                del self._frozen[p]
        if reply < 0:
            refused = Refused(*part.items[-reply - 1], "the pending sum would pass 2^53")
            _log.error("refused for good: id %r, amounts %r: %s", *refused)
            _tell(self._on_refused, refused)

    def failed(self, error: RedisHacksError) -> None:
        """Note a failed send; what has been in doubt for too long is given up and reported."""
        self.error = error
        self.room = 0
        for p, lane in list(self._frozen.items()):
            while lane and time.monotonic() - lane[0].first_sent > GIVE_UP:
                part = lane.popleft()
                _log.error(
                    "%d ids in doubt are given up after 12 hours: %s", len(part.items), error
                )
                _tell(self._on_maybe_applied, part.items)
            if not lane:
                del self._frozen[p]

    def full(self) -> UnavailableError:
        """Return the error for a hit that finds no room."""
        why = f"; the last send failed: {self.error}" if self.error else ""
        return UnavailableError(
            f"{self._max} ids are buffered and none could be sent, the hit was not counted{why}"
        )


def _tell(callback: Callable[[Any], None] | None, what: Any) -> None:
    """Call a user's callback; its errors are its own."""
    if callback is not None:
        try:
            callback(what)
        except Exception:
            _log.exception("a callback of a buffered counter failed")


class _Sender:
    """What both colours decide alike: when to send again, and whether a hit finds room."""

    def __init__(self, buffer: Buffer, *, linger: float, deadline: float, overflow: str) -> None:
        if overflow not in ("raise", "block"):
            raise UsageError(f"overflow must be 'raise' or 'block', not {overflow!r}")
        self.buffer = buffer
        #: No hit is taken any more; one that came in between has to be sent by who counted it.
        self.closed = False
        self._linger = linger
        self._deadline = deadline
        self._block = overflow == "block"
        self._abandoned = False
        self._pause = linger

    def _begin(self) -> None:
        """See that hits are sent at exit, whoever still holds the counter then."""
        _register(self)

    def _end(self) -> None:
        """Nobody counts here any more: forget it when nothing is left to be sent."""
        if not self.buffer.held():
            _live.discard(self)

    def after_fork(self) -> None:
        """Begin empty in a child: the parent sends what it buffered."""
        self.buffer.reset()

    def close(self) -> None:
        """Send the rest, at interpreter exit at the latest."""
        raise NotImplementedError

    def _judge(self, error: Exception | None) -> bool:
        """Take note of a send of the background; return whether to go on."""
        if error is None:
            self._pause = self._linger
            if self._abandoned:
                self._end()
            return not self._abandoned
        self._pause = min(max(2 * self._pause, PAUSES[0]), max(PAUSES[1], self._linger))
        _log.warning(
            "buffered hits could not be sent, will try again: %s",
            error,
            # An error of ours says enough; any other is a callback's, or a fault.
            exc_info=None if isinstance(error, RedisHacksError) else error,
        )
        return True

    def _has_room(self) -> bool:
        """Make room in the log; raises when the counter cannot be used at all."""
        if isinstance(self.buffer.error, UsageError):
            raise self.buffer.error
        return self.buffer.make_room()

    def _wait_longer(self, end: float) -> None:
        """Raise unless a full buffer is worth waiting for.

        A sender that is merely busy gets the time to make room.
        """
        failing = self.buffer.error is not None and not self._block
        if failing or time.monotonic() > end:
            raise self.buffer.full()


class Coalescer(_Sender):
    """Sends a buffer every `linger` seconds from one daemon thread, begun by the first hit.

    At interpreter exit the last send runs in the exiting thread. A forked child begins empty with
    a thread of its own.
    """

    def __init__(self, buffer: Buffer, transport: Transport, **options: Any) -> None:
        super().__init__(buffer, **options)
        self._transport = transport
        self._reset()

    def _reset(self) -> None:
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None
        # Held while nobody needs waking: releasing it is safe anywhere, unlike Event.set().
        self._wake = threading.Lock()
        self._wake.acquire()

    def after_fork(self) -> None:
        """Begin empty in a child: the parent sends what it buffered."""
        super().after_fork()
        self._reset()

    def add(self, raw: bytes, amounts: Amounts) -> None:
        """Take one hit, or raise `UnavailableError` with the hit not taken."""
        if self.buffer.tight():
            self.make_room()
        self.buffer.others.append((raw, amounts))
        if self.closed:  # meanwhile: nobody else would send it
            self.close()

    def make_room(self) -> None:
        """Make sure of a sender and of room in the log, or raise `UnavailableError`."""
        if self.closed:
            raise UsageError("it is closed and counts no more")
        if self._thread is None:
            self._start()
        end = time.monotonic() + self._deadline
        while not self._has_room():
            self._nudge()
            self._wait_longer(end)
            time.sleep(0.001)

    def _start(self) -> None:
        self._begin()
        thread = threading.Thread(target=self._work, name="redishacks-linger", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # the interpreter is exiting: close() will send
            self._thread = None

    def _nudge(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._wake.release()

    def _work(self) -> None:
        wake = self._wake
        going = True
        while going and not self.closed and self._wake is wake:
            wake.acquire(timeout=self._pause)
            try:
                self.send()
                going = self._judge(None)
            except Exception as error:
                going = self._judge(error)

    def send(self) -> None:
        """Send all that is buffered now; raises when it could not, and keeps it."""
        # Bounded: a signal handler may send while its thread is in here.
        if not self._sending.acquire(timeout=2 * self._deadline):
            raise UnavailableError("another send of this counter is under way; try again later")
        try:
            drive(self.buffer.send(), self._transport, self._deadline)
        except RedisHacksError as error:
            self.buffer.failed(error)
            raise
        finally:
            self._sending.release()

    def close(self) -> None:
        """Send the rest and stop; raises when it could not be sent within the deadline.

        Called again, it tries again to send what could not be sent.
        """
        self.closed = True
        self.buffer.room = 0
        self._nudge()
        end = time.monotonic() + self._deadline
        while self.buffer.held():
            try:
                self.send()
            except (UnavailableError, MaybeAppliedError):
                if time.monotonic() > end:
                    raise
                time.sleep(PAUSES[0])
        self._end()

    def abandon(self) -> None:
        """Stop after the next good send, without waiting for it: the counter is garbage."""
        self._abandoned = True
        self._end()
        self._nudge()


class AsyncCoalescer(_Sender):
    """Sends a buffer every `linger` seconds from a task of the running loop.

    When the loop is closed by `asyncio.run` the cancelled task sends the rest first.
    """

    def __init__(self, buffer: Buffer, transport: AsyncTransport, **options: Any) -> None:
        super().__init__(buffer, **options)
        self._transport = transport
        self._settle(None)

    def after_fork(self) -> None:
        """Begin empty in a child: the parent sends what it buffered."""
        super().after_fork()
        self._settle(None)

    def _settle(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Belong to this loop from now on."""
        self.loop = loop
        self._task: asyncio.Task[None] | None = None
        self._sending = asyncio.Lock()
        self._wake = asyncio.Event()

    async def add(self, raw: bytes, amounts: Amounts) -> None:
        """Take one hit, or raise `UnavailableError` with the hit not taken."""
        if self.buffer.tight() or self.loop is not asyncio.get_running_loop():
            await self.make_room()
        self.buffer.others.append((raw, amounts))
        if self.closed:  # while waiting for room: nobody else would send it
            await self.aclose()

    async def make_room(self) -> None:
        """Make sure of a sender on this loop and of room, or raise `UnavailableError`."""
        if self.closed:
            raise UsageError("it is closed and counts no more")
        loop = asyncio.get_running_loop()
        if self.loop is not loop:
            self._settle(loop)
        if self._task is None or self._task.done():
            self._begin()
            self._task = loop.create_task(self._work(), name="redishacks-linger")
        end = time.monotonic() + self._deadline
        while not self._has_room():
            self._wake.set()
            self._wait_longer(end)
            await asyncio.sleep(0.001)

    async def _work(self) -> None:
        going = True
        try:
            while going and not self.closed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._pause)
                self._wake.clear()
                try:
                    await self.send()
                    going = self._judge(None)
                except Exception as error:
                    going = self._judge(error)
        except asyncio.CancelledError:
            try:
                await self.send()
            except RedisHacksError as error:
                _log.warning("buffered hits stay until the next loop, or exit: %s", error)
            raise
        finally:
            self.buffer.room = 0  # the next hit starts another

    async def send(self) -> None:
        """Send all that is buffered now; raises when it could not, and keeps it."""
        async with self._sending:
            try:
                await drive_async(self.buffer.send(), self._transport, self._deadline)
            except RedisHacksError as error:
                self.buffer.failed(error)
                raise

    async def aclose(self) -> None:
        """Send the rest and stop; raises when it could not be sent within the deadline."""
        self.closed = True
        self.buffer.room = 0
        if self.loop is not asyncio.get_running_loop():
            self._settle(asyncio.get_running_loop())
        self._wake.set()
        end = time.monotonic() + self._deadline
        while self.buffer.held():
            try:
                await self.send()
            except (UnavailableError, MaybeAppliedError):
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(PAUSES[0])
        self._end()

    def close(self) -> None:
        """Send the rest at interpreter exit, on a loop of its own."""
        if self.buffer.held():
            asyncio.run(self.aclose())

    def abandon(self) -> None:
        """Stop after the next good send, without waiting for it: the counter is garbage."""
        self._abandoned = True
        self._end()
        if self.loop is not None and not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._wake.set)


def check_linger(linger: Any) -> float:
    """Return `linger` in seconds."""
    value = seconds(linger, "linger")
    if value > 3600:
        raise UsageError(f"linger must be at most an hour, not {linger!r}")
    return value


# The registry: who must send at exit and begin empty in a forked child. It holds them, since a
# counter may be garbage before its last hits are sent.

_live: set[_Sender] = set()


def _register(sender: _Sender) -> None:
    if not _live:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        if "multiprocessing.util" in sys.modules:
            # Children of multiprocessing end by os._exit(), which skips atexit.
            from multiprocessing.util import Finalize

            Finalize(None, _close_all, exitpriority=10)
    _live.add(sender)


def _close_all() -> None:
    for sender in list(_live):
        try:
            sender.close()
        except Exception as error:
            _log.error("hits were lost at exit, %d ids: %s", sender.buffer.held(), error)


def _after_fork() -> None:
    for sender in list(_live):
        sender.after_fork()
    # What the child counts registers anew, with its own way of ending.
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
