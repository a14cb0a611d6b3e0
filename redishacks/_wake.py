"""Waking who waits: one connection per process and server that messages come in on.

    bell = wakeups.enter(token)                                      # a message "token µs" rings it
    ear = yield from wakeups.listen_steps(command, channels, 1.0)    # messages come in now
    micros = yield from call(bell.wait, 3.0)                         # None: nothing came in 3 s
    wakeups.leave(token)

A waiter is told something by a token of its own. Whenever messages may have been missed all bells
ring. On a cluster a channel is heard on the node of its slot: by `SSUBSCRIBE`, or on servers that
lack it (before Redis 7) by `SUBSCRIBE`, whose receivers that node counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, Generic, NamedTuple, TypeVar

from redishacks._command import Command, Steps, call
from redishacks._transport import (
    AsyncListener,
    AsyncTransport,
    Listener,
    Settings,
    SyncTransport,
)
from redishacks.errors import ServerError


class Channels(NamedTuple):
    """Where a waiter may be told: a channel for the whole process, and one in the key's slot."""

    process: bytes
    slot: bytes


class Bell:
    """Wakes a thread."""

    def __init__(self) -> None:
        self._rung: deque[int] = deque()
        # Held while it has not rung: releasing it is safe anywhere, unlike Event.set().
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self, micros: int) -> None:
        """Wake the waiter, and tell it in how many µs to look; 0: now."""
        self._rung.append(micros)
        with contextlib.suppress(RuntimeError):
            self._lock.release()

    def wait(self, seconds: float) -> int | None:
        """Return what it was rung for, the most urgent first; None when it did not ring in time."""
        if not self._rung:
            self._lock.acquire(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))
        return _heard(self._rung)


class AsyncBell:
    """Wakes a task."""

    def __init__(self) -> None:
        self._rung: deque[int] = deque()
        self._event = asyncio.Event()

    def ring(self, micros: int) -> None:
        """Wake the waiter, and tell it in how many µs to look; 0: now."""
        self._rung.append(micros)
        self._event.set()

    async def wait(self, seconds: float) -> int | None:
        """Return what it was rung for, as `Bell.wait`."""
        if not self._rung:
            self._event.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._event.wait()
        return _heard(self._rung)


def _heard(rung: deque[int]) -> int | None:
    least = None
    while rung:
        micros = rung.popleft()
        least = micros if least is None else min(least, micros)
    return least


B = TypeVar("B", Bell, AsyncBell)
L = TypeVar("L", Listener, AsyncListener)
T = TypeVar("T", SyncTransport, AsyncTransport)

#: An ear that nothing is heard with: a waiter has to look by itself.
DEAF = "-"


class _Wakeups(ABC, Generic[T, B, L]):
    """What both colours know: who waits, and where messages come in."""

    def __init__(self, transport: T, name: str) -> None:
        #: Tells this process from others, in the names of channels.
        self.name = name
        self._transport: T = transport
        #: One whose waiter is garbage rings no more.
        self._bells: weakref.WeakValueDictionary[bytes, B] = weakref.WeakValueDictionary()
        self._listeners: dict[str, L] = {}
        #: Servers before Redis 7 have no channels that belong to a slot.
        self._sharded = transport.sharded

    def enter(self, token: str) -> B:
        """Return a bell that messages for this token ring."""
        bell = self._bells[token.encode()] = self._bell()
        return bell

    def ear(self, command: Command[Any], channels: Channels) -> str | None:
        """Return how messages come in from the node of a command, None when they do not yet.

        It is a letter and a channel: "p" for PUBLISH, "s" for SPUBLISH, `DEAF` for neither.
        """
        channel = channels.slot if self._sharded else channels.process
        listener = self._listeners.get(self._transport.where(command))
        if listener is None or not listener.hears(channel):
            return None
        return ("s" if self._sharded else "p") + channel.decode()

    def listen_steps(
        self, command: Command[Any], channels: Channels, deadline: float
    ) -> Steps[str]:
        """See that messages come in, and return how; who asks must have entered.

        Raises `UnavailableError` when that could not be in time, and `ServerError`, for one when
        the user may not subscribe.
        """
        settings = self._transport.settings_for(command)
        if settings is None:
            return DEAF
        node = self._transport.where(command)
        listener = self._listeners.get(node) or self._listeners.setdefault(
            node, self._listener(settings)
        )
        while (ear := self.ear(command, channels)) is None:
            sharded = self._sharded
            channel = channels.slot if sharded else channels.process
            try:
                yield from call(listener.subscribe, channel, sharded, deadline)
            except ServerError as error:
                if not sharded or "unknown command" not in str(error):
                    raise
                self._sharded = False
        return ear

    @abstractmethod
    def _bell(self) -> B:
        """Make a bell."""

    @abstractmethod
    def _listener(self, settings: Settings) -> L:
        """Make who hears what is published on a node."""

    def leave(self, token: str) -> None:
        """Wait no more."""
        self._bells.pop(token.encode(), None)

    # For listeners

    def hear(self, message: bytes) -> None:
        """Ring the bell that a message is for."""
        token, _, micros = message.partition(b" ")
        bell = self._bells.get(token)
        if bell is not None and micros.isdigit():
            bell.ring(int(micros))

    def missed(self) -> None:
        """Ring all bells."""
        for ref in self._bells.valuerefs():
            bell = ref()
            if bell is not None:
                bell.ring(0)

    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._bells)


class Wakeups(_Wakeups[SyncTransport, Bell, Listener]):
    """Bells of threads."""

    def _bell(self) -> Bell:
        return Bell()

    def _listener(self, settings: Settings) -> Listener:
        listener = Listener(settings, self)
        self._transport.adopt(listener)
        return listener


class AsyncWakeups(_Wakeups[AsyncTransport, AsyncBell, AsyncListener]):
    """Bells of the tasks of one event loop."""

    def _bell(self) -> AsyncBell:
        return AsyncBell()

    def _listener(self, settings: Settings) -> AsyncListener:
        listener = AsyncListener(asyncio.get_running_loop(), settings, self)
        self._transport.adopt(listener)
        return listener
