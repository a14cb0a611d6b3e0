"""Coalescing in the process: a `Buffer` of hits, sent every so often, at close and at exit.

`ThreadSender` sends from a thread, `TaskSender` from a task; `Coalescer` and `AsyncCoalescer` are
those that take hits. What a SIGKILL loses is what was not
sent: the hits of the last `linger` seconds plus the time that sends were failing. A forked child
begins empty, as a producer of its own. A hit that comes when there is nobody left to send it, after
the last send at exit, is sent by who counted it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar, TypeVarTuple

from redishacks._buffer import Amounts, Buffer, Items
from redishacks._command import Steps
from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._keys import id_shown
from redishacks._units import seconds
from redishacks.errors import (
    MaybeAppliedError,
    PartlyAppliedError,
    RedisHacksError,
    UnavailableError,
    UsageError,
)

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

#: Returns an id as readers get it.
Shown = Callable[[bytes], str | bytes]

#: Pause after a failed send, at least and at most.
PAUSES = (0.05, 1.0)

_log = logging.getLogger("redishacks")


class Outgoing(Protocol):
    """What a sender sends every so often: a `Buffer` of hits, or something with its ways."""

    #: How a log calls it.
    what: str
    room: int
    error: RedisHacksError | None
    forked: bool

    def held(self) -> int:
        """Return how much is yet to be sent."""

    def make_room(self) -> bool:
        """Return whether there is room for more."""

    def full(self) -> UnavailableError:
        """Return the error for what finds no room."""

    def send(self) -> Steps[None]:
        """Send what is held; raises when it could not."""

    def pause(self, linger: float) -> float | None:
        """Return seconds until the next send; None when none will be due until a new start."""

    def last(self) -> None:
        """Hear that what is sent next is the last: nothing may be kept for later."""

    def after_fork(self) -> Self:
        """Return what a forked child begins with."""


B = TypeVar("B", bound=Outgoing)


class _Sender(ABC, Generic[B]):
    """What both colours decide alike: when to send again, and whether a hit finds room."""

    def __init__(self, buffer: B, *, linger: float, deadline: float, overflow: str) -> None:
        if overflow not in ("raise", "block"):
            raise UsageError(f"overflow must be 'raise' or 'block', not {overflow!r}")
        self.buffer = buffer
        #: Nobody will send what comes now: who counted it has to.
        self.closed = False
        self._refusing = False
        self._linger = linger
        self._deadline = deadline
        self._block = overflow == "block"
        self._abandoned = False
        self._pause = linger
        _registry.know(self)

    def _begin(self) -> None:
        """See that hits are sent at exit, whoever still holds the counter then."""
        self._pause = self.buffer.pause(self._linger) or 0.0
        if _registry.hold(self):
            self.closed = True

    def _shut(self) -> None:
        """From now on a hit is sent by who counts it."""
        self.closed = True
        self.buffer.room = 0
        self.buffer.last()

    def _end(self) -> None:
        """Nobody counts here any more: forget it when nothing is left to be sent."""
        if not self.buffer.held():
            _registry.release(self)

    def after_fork(self) -> None:
        """Begin empty in a child: the parent sends what it buffered."""
        self.buffer = self.buffer.after_fork()

    @abstractmethod
    def exit(self) -> None:
        """Send the rest, in this thread: the interpreter is exiting."""

    def _judge(self, error: Exception | None) -> bool:
        """Take note of a send of the background; return whether to go on."""
        if error is None:
            pause = self.buffer.pause(self._linger)
            if self._abandoned or pause is None:
                self._end()
                return False
            self._pause = pause
            return True
        self._pause = min(max(2 * self._pause, PAUSES[0]), max(PAUSES[1], self._linger))
        _log.warning(
            "%s could not be sent, will try again: %s",
            self.buffer.what,
            error,
            # An error of ours says enough; any other is a callback's, or a fault.
            exc_info=None if isinstance(error, RedisHacksError) else error,
        )
        if self._abandoned and not self.buffer.held():  # nobody would miss what is lost
            self._end()
            return False
        return True

    def _check_open(self) -> None:
        if self._refusing:
            raise UsageError("it is closed and counts no more")

    def _has_room(self, buffer: B) -> bool:
        """Make room in the log; raises when the counter cannot be used at all."""
        if isinstance(buffer.error, UsageError):
            raise buffer.error
        # In the child of a fork that interrupted it the hit is the parent's.
        return buffer.forked or buffer.make_room()

    def _wait_longer(self, end: float) -> None:
        """Raise unless a full buffer is worth waiting for.

        A sender that is merely busy gets the time to make room.
        """
        failing = self.buffer.error is not None and not self._block
        if failing or time.monotonic() > end:
            raise self.buffer.full()


class ThreadSender(_Sender[B]):
    """Sends a buffer every `linger` seconds from one daemon thread, begun by the first hit.

    At interpreter exit the last send runs in the exiting thread. A forked child begins empty with
    a thread of its own.
    """

    def __init__(self, buffer: B, transport: Transport, **options: Any) -> None:
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

    def make_room(self) -> None:
        """Make sure of a sender and of room in the log, or raise `UnavailableError`."""
        self._check_open()
        buffer = self.buffer
        if not self.running():
            self.start()
        end = time.monotonic() + self._deadline
        while not self._has_room(buffer):
            self.nudge()
            self._wait_longer(end)
            time.sleep(0.001)

    def running(self) -> bool:
        """Return whether the thread is there."""
        return self._thread is not None

    def somewhere(self) -> bool:
        """Return the same: a thread serves everybody."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread."""
        thread = threading.Thread(target=self._work, name="redishacks-linger", daemon=True)
        self._thread = thread
        # After that: a child that is forked in between finds no thread and begins again.
        self._begin()
        if self.closed:
            return
        try:
            thread.start()
        except RuntimeError:  # the interpreter is exiting: exit() will send
            self._thread = None

    def nudge(self) -> None:
        """Have it send now, and ask anew when the next send is due."""
        with contextlib.suppress(RuntimeError):
            self._wake.release()

    def _work(self) -> None:
        going = True
        # Two first hits at once may have started two.
        while going and not self.closed and self._thread is threading.current_thread():
            self._wake.acquire(timeout=self._pause)
            try:
                self.send()
                going = self._judge(None)
            except Exception as error:
                going = self._judge(error)
        if not self._abandoned and not self.closed and self._thread is threading.current_thread():
            self._thread = None
            # Somebody may have found the thread running a moment ago.
            if self.buffer.pause(self._linger) is not None:
                self.start()

    def send(self) -> None:
        """Send all that is buffered now; raises when it could not, and keeps it."""
        buffer, sending = self.buffer, self._sending  # a fork replaces both
        # Bounded: a signal handler may send while its thread is in here.
        if not sending.acquire(timeout=2 * self._deadline):
            if buffer.forked:
                return
            raise UnavailableError("another send of this counter is under way; try again later")
        try:
            drive(buffer.send(), self._transport, self._deadline)
        finally:
            sending.release()

    def send_late(self) -> None:
        """Send a hit that was taken when nobody else would send it."""
        with _taken():
            self._finish()

    def close(self) -> None:
        """Send the rest and stop; raises when it could not be sent within the deadline.

        Called again, it tries again to send what could not be sent.
        """
        self._refusing = True
        self._finish()

    def exit(self) -> None:
        """Send the rest, in this thread: the interpreter is exiting."""
        self._finish()

    def _finish(self) -> None:
        self._shut()
        self.nudge()
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
        self.buffer.last()
        self._end()
        self.nudge()


class TaskSender(_Sender[B]):
    """Sends a buffer every `linger` seconds from a task of the running loop.

    When the loop is closed by `asyncio.run` the cancelled task sends the rest first.
    """

    def __init__(self, buffer: B, transport: AsyncTransport, **options: Any) -> None:
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
        self._stopped = False

    def stop(self) -> None:
        """Stop at once, with no last send: the loop is about to be closed."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def make_room(self) -> None:
        """Make sure of a sender on this loop and of room, or raise `UnavailableError`."""
        self._check_open()
        buffer = self.buffer
        if not self.running():
            self.start()
        end = time.monotonic() + self._deadline
        while not self._has_room(buffer):
            self._wake.set()
            self._wait_longer(end)
            await asyncio.sleep(0.001)

    def running(self) -> bool:
        """Return whether the task is there, on this loop."""
        here = self.loop is asyncio.get_running_loop()
        return here and self._task is not None and not self._task.done()

    def somewhere(self) -> bool:
        """Return whether the task is there, on whatever loop."""
        task, loop = self._task, self.loop
        return task is not None and not task.done() and loop is not None and not loop.is_closed()

    def start(self) -> None:
        """Start the task on this loop."""
        loop = asyncio.get_running_loop()
        if self.loop is not loop:
            self._settle(loop)
        self._begin()
        if not self.closed:
            self._task = loop.create_task(self._work(), name="redishacks-linger")

    def nudge(self) -> None:
        """Have it send now, and ask anew when the next send is due."""
        self._wake.set()

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
                if not self._stopped:
                    await self.send()
            except RedisHacksError as error:
                _log.warning("buffered hits stay until the next loop, or exit: %s", error)
            raise
        finally:
            self.buffer.room = 0  # the next hit starts another

    async def send(self) -> None:
        """Send all that is buffered now; raises when it could not, and keeps it."""
        async with self._sending:
            await drive_async(self.buffer.send(), self._transport, self._deadline)

    async def aclose(self) -> None:
        """Send the rest and stop; raises when it could not be sent within the deadline."""
        self._refusing = True
        await self._finish()

    def exit(self) -> None:
        """Send the rest, in this thread: the interpreter is exiting."""
        self._shut()
        if self.buffer.held():
            with asyncio.Runner(loop_factory=_LastLoop) as runner:
                runner.run(self._finish())

    async def _finish(self) -> None:
        self._shut()
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

    def abandon(self) -> None:
        """Stop after the next good send, without waiting for it: the counter is garbage."""
        self._abandoned = True
        self.buffer.last()
        self._end()
        if self.loop is not None and not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._wake.set)


class Coalescer(ThreadSender[Buffer]):
    """Takes hits, and sends them from a thread."""

    def add(self, raw: bytes, amounts: Amounts) -> None:
        """Take one hit, or raise `UnavailableError` with the hit not taken."""
        buffer = self.buffer  # a hit under way at a fork is the parent's
        if buffer.tight():
            self.make_room()
        buffer.others.append((raw, amounts))
        if self.closed:
            self.send_late()

    def add_all(self, items: Items, shown: Shown = id_shown) -> None:
        """Take many hits; raises `PartlyAppliedError` when only the first few were taken."""
        taken = 0
        try:
            for raw, amounts in items:
                self.add(raw, amounts)
                taken += 1
        except RedisHacksError as error:
            _stopped(items, taken, error, shown)
            raise


class AsyncCoalescer(TaskSender[Buffer]):
    """Takes hits, and sends them from a task."""

    async def add(self, raw: bytes, amounts: Amounts) -> None:
        """Take one hit, or raise `UnavailableError` with the hit not taken."""
        buffer = self.buffer  # a hit under way at a fork is the parent's
        if buffer.tight() or self.loop is not asyncio.get_running_loop():
            await self.make_room()
        buffer.others.append((raw, amounts))
        if self.closed:
            with _taken():
                await self._finish()

    async def add_all(self, items: Items, shown: Shown = id_shown) -> None:
        """Take many hits; raises `PartlyAppliedError` when only the first few were taken."""
        taken = 0
        try:
            for raw, amounts in items:
                await self.add(raw, amounts)
                taken += 1
        except RedisHacksError as error:
            _stopped(items, taken, error, shown)
            raise


def _stopped(items: Items, taken: int, error: RedisHacksError, shown: Shown) -> None:
    """Say so when the buffer has taken the first few of many hits before this error."""
    if taken:
        raise PartlyAppliedError(
            f"{taken} of {len(items)} ids were counted; {error}",
            {shown(raw): error for raw, _ in items[taken:]},
        ) from error


class Lingering:
    """What may hold hits back for a while: how they are sent, and the end of a `with`."""

    _coalescer: Coalescer | None

    def send(self) -> None:
        """Send what lingers now, and wait for the answer; it stays buffered on an error."""
        if self._coalescer is not None:
            self._coalescer.send()

    def close(self) -> None:
        """Send what lingers and stop; raises when it could not be sent within the deadline."""
        if self._coalescer is not None:
            self._coalescer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class AsyncLingering:
    """`Lingering` for asyncio."""

    _coalescer: AsyncCoalescer | None

    async def send(self) -> None:
        """Send what lingers now, and wait for the answer; it stays buffered on an error."""
        if self._coalescer is not None:
            await self._coalescer.send()

    async def aclose(self) -> None:
        """Send what lingers and stop; raises when it could not be sent within the deadline."""
        if self._coalescer is not None:
            await self._coalescer.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.aclose()


class _LastLoop(asyncio.SelectorEventLoop):
    """Calls functions in its own thread, as no other can be started while the interpreter exits.

    It is the resolver of host names that asyncio calls in another one.
    """

    def run_in_executor(
        self, executor: Any, func: Callable[[*Args], Result], *args: *Args
    ) -> asyncio.Future[Result]:
        """Call it now."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


@contextlib.contextmanager
def _taken() -> Iterator[None]:
    """A hit that stays buffered must not be counted again by a caller who is told to try again."""
    try:
        yield
    except UnavailableError as error:
        raise MaybeAppliedError(f"the hit came too late for anybody to send it: {error}") from error


def check_linger(linger: Any) -> float:
    """Return `linger` in seconds."""
    value = seconds(linger, "linger")
    if value > 3600:
        raise UsageError(f"linger must be at most an hour, not {linger!r}")
    return value


class _Registry:
    """Who begins empty in a forked child, and who sends at exit."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[_Sender[Any]] = weakref.WeakSet()
        # Held, since a counter may be garbage before its last hits are sent.
        self._held: set[_Sender[Any]] = set()
        self._exiting = False
        self._watching = False
        self._watching_process = False

    def know(self, sender: _Sender[Any]) -> None:
        """Tell it about a fork."""
        self._known.add(sender)
        if not self._watching:
            self._watching = True
            os.register_at_fork(after_in_child=self._after_fork)
            # Not at the first hit: that may come while exit handlers run, too late to add one.
            atexit.register(self._exit)

    def hold(self, sender: _Sender[Any]) -> bool:
        """Let it send at exit; return whether exit has come before."""
        self._held.add(sender)
        if not self._watching_process and "multiprocessing.util" in sys.modules:
            from multiprocessing.util import register_after_fork

            # A child forgets its finalizers when it begins, after a spawned one has imported.
            register_after_fork(self, _Registry._watch_process)
            self._watch_process()
        return self._exiting

    def release(self, sender: _Sender[Any]) -> None:
        """Forget it: nothing is left to be sent."""
        self._held.discard(sender)

    def _watch_process(self) -> None:
        # Children of multiprocessing end by os._exit(), which skips atexit.
        from multiprocessing.util import Finalize

        Finalize(None, self._exit, exitpriority=10)
        self._watching_process = True

    def _exit(self) -> None:
        # First: a sender that is not held yet will see it.
        self._exiting = True
        for sender in list(self._held):
            try:
                sender.exit()
            except Exception as error:
                buffer = sender.buffer
                _log.error("%s were lost at exit, %d: %s", buffer.what, buffer.held(), error)

    def _after_fork(self) -> None:
        for sender in list(self._known):
            sender.after_fork()
        # What the child counts is held anew, with its own way of ending.
        self._held.clear()
        self._watching_process = False


_registry = _Registry()
