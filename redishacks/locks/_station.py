"""What locks have once per process and server (for asyncio: and loop): who keeps, and who wakes."""

from __future__ import annotations

import itertools
import secrets
from typing import Any, Generic, TypeVar, cast

from redishacks._command import Command
from redishacks._linger import TaskSender, ThreadSender
from redishacks._transport import AsyncTransport, SyncTransport
from redishacks._wake import AsyncWakeups, Wakeups
from redishacks.locks._keeper import Keeper, Kept

#: Seconds at most between two looks of the keeper, and for one exchange.
_LINGER, _DEADLINE = 1.0, 1.0
_NAME = "locks"

S = TypeVar("S", bound=ThreadSender[Keeper] | TaskSender[Keeper])
W = TypeVar("W", Wakeups, AsyncWakeups)


class _Station(Generic[S, W]):
    """Names acquisitions, has leases kept, and tells where waiters are woken."""

    def __init__(self, sender: S, wakeups: W) -> None:
        self.wakeups: W = wakeups
        #: Who does things in the background.
        self.keeper: Keeper = sender.buffer
        self._sender = sender
        self._numbers = itertools.count()

    def token(self) -> str:
        """Return a name for an acquisition that no other has, in any process."""
        return f"{self.wakeups.name}{next(self._numbers):x}"

    def keep(self, held: Kept, when: float) -> None:
        """Have somebody look at a lease at that time."""
        soonest = self.keeper.keep(held, when)
        self._see_to_it(soonest)

    def leave(self, token: str, command: Command[int], until: float, ttl: float) -> None:
        """Have an acquisition of so many seconds left, of which a copy may arrive until then."""
        self.keeper.leave(token, command, until, ttl)
        self._see_to_it(True)

    def left(self, token: str) -> None:
        """Hear that an acquisition was left after all."""
        self.keeper.left(token)

    def _see_to_it(self, now: bool) -> None:
        if not self._sender.running():
            self._sender.start()
        elif now:
            self._sender.nudge()


class Station(_Station[ThreadSender[Keeper], Wakeups]):
    """Of threads."""


class AsyncStation(_Station[TaskSender[Keeper], AsyncWakeups]):
    """Of the tasks of one loop."""

    def close(self) -> None:
        """End with the loop: what is to be said yet is said at exit."""
        self._sender.stop()

    def abandon(self) -> None:
        """In a forked child, or for a closed loop: there is nothing to be closed."""


_OPTIONS: dict[str, Any] = {"linger": _LINGER, "deadline": _DEADLINE, "overflow": "raise"}


AnyStation = Station | AsyncStation


def station(transport: SyncTransport) -> Station:
    """Return the station of a server, made on first use and again in a forked child."""
    found = transport.single.get(_NAME)
    if found is None:
        sender = ThreadSender(Keeper(), transport, **_OPTIONS)
        made = Station(sender, Wakeups(transport, secrets.token_hex(6)))
        found = transport.single.setdefault(_NAME, made)
    return cast("Station", found)


def async_station(transport: AsyncTransport) -> AsyncStation:
    """The same for the running loop."""
    single = transport.single
    found = single.get(_NAME)
    if found is None:
        sender = TaskSender(Keeper(), transport, **_OPTIONS)
        found = single[_NAME] = AsyncStation(sender, AsyncWakeups(transport, secrets.token_hex(6)))
        transport.adopt(found)
    return cast("AsyncStation", found)
