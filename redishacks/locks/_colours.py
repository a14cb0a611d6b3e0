"""Both colours of a lock, of whatever kind: their methods over the steps of the core."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from redishacks._command import Command
from redishacks._drive import drive, drive_async
from redishacks._transport import (
    AsyncObserved,
    AsyncTransport,
    Hook,
    Observed,
    SyncTransport,
    connect,
    connect_async,
)
from redishacks._units import Seconds
from redishacks.locks._context import UNSET, AsyncEntering, Entering, this_task
from redishacks.locks._core import Core
from redishacks.locks._hold import Hold
from redishacks.locks._station import AsyncStation, Station, async_station, station
from redishacks.locks._transaction import async_node_client, node_client
from redishacks.locks.held import AsyncHeld, Held
from redishacks.locks.holder import Holder


class SyncCore(Entering[Held], Core[SyncTransport]):
    """A lock of any kind, for threads and greenlets."""

    def _connect(self, client: Any, on_command: Hook | None) -> SyncTransport | Observed:
        return connect(client, on_command)

    def _station(self) -> Station:
        return station(self._bare)

    def _owner(self) -> threading.Thread:
        return threading.current_thread()

    def _thread(self, owner: threading.Thread) -> str:
        return owner.name

    def redis(self) -> tuple[Any, bool]:
        """Return a redis-py client for the server of the lock, and whether it is to be closed."""
        return node_client(self._client, self.kind.key)

    def _post(self, hold: Hold, command: Command[int]) -> None:
        """Nothing goes behind what was sent: its connection is closed."""

    def acquire(self, *, wait: Seconds | None = UNSET, ttl: Seconds | None = None) -> Held:
        """Get the lock, or raise `LockedError`; `wait` and `ttl` replace the lock's own this time.

        With a wait it stands in line for so many seconds, or without end for None. One round trip,
        and one more for who had to wait. Raises `SelfDeadlockError` when this thread has the lock,
        and `UnavailableError` when Redis cannot be asked: what may have been taken is given back in
        the background.
        """
        held, end = self.attempt(Held, wait, ttl)
        if held.fence:
            return held
        first: Any = None
        if not held.ear:
            try:
                first = self.transport.call(self.question(held), self.deadline)
            except BaseException as error:
                first = error
            if self.took(held, first):
                return held
        return drive(self.acquire_steps(held, end, first), self.transport, self.deadline)

    def adopt(self, token: str) -> Held:
        """Return a handle for an acquisition of another process, by its `held.token`.

        Its lease begins anew. The one who gave the token away must use its own handle no more.
        Raises `LockLostError` when that acquisition does not hold the lock. One round trip.
        """
        return drive(self.adopt_steps(Held, token), self.transport, self.deadline)

    def holders(self) -> list[Holder]:
        """Return who holds the lock. One round trip."""
        return drive(self.show_steps(), self.transport, self.deadline)

    def force_release(self) -> bool:
        """Take the lock away from whoever holds it; return whether there was anybody.

        The holder will find it lost, and the next in line gets it. Raises `MaybeAppliedError` when
        the reply was lost. One round trip.
        """
        return drive(self.force_steps(), self.transport, self.deadline)


class AsyncCore(AsyncEntering[AsyncHeld], Core[AsyncTransport]):
    """A lock of any kind, for asyncio."""

    def _connect(self, client: Any, on_command: Hook | None) -> AsyncTransport | AsyncObserved:
        return connect_async(client, on_command)

    def _station(self) -> AsyncStation:
        return async_station(self._bare)

    def _owner(self) -> asyncio.Task[Any] | None:
        return this_task()

    def _thread(self, owner: asyncio.Task[Any] | None) -> str:
        return "" if owner is None else owner.get_name()

    def redis(self) -> tuple[Any, bool]:
        """Return a redis-py client for the server of the lock, and whether it is to be closed."""
        return async_node_client(self._client, self.kind.key)

    def _post(self, hold: Hold, command: Command[int]) -> None:
        future = self._bare.post(command, self.deadline)
        if future is not None:

            def heard(done: asyncio.Future[Any]) -> None:
                if not done.cancelled() and done.result() == 1:
                    hold.station.left(hold.token)

            future.add_done_callback(heard)

    async def acquire(
        self, *, wait: Seconds | None = UNSET, ttl: Seconds | None = None
    ) -> AsyncHeld:
        """Get the lock, or raise `LockedError`, as the sync one does; a cancelled acquisition
        leaves nothing behind.
        """
        held, end = self.attempt(AsyncHeld, wait, ttl)
        if held.fence:
            return held
        first: Any = None
        if not held.ear:
            try:
                first = await self.transport.call(self.question(held), self.deadline)
            except GeneratorExit:
                raise  # nobody is there to go on: the lease ends by itself
            except BaseException as error:
                first = error
            if self.took(held, first):
                return held
        steps = self.acquire_steps(held, end, first)
        return await drive_async(steps, self.transport, self.deadline)

    async def adopt(self, token: str) -> AsyncHeld:
        """Return a handle for an acquisition of another process, as the sync one does."""
        steps = self.adopt_steps(AsyncHeld, token)
        return await drive_async(steps, self.transport, self.deadline)

    async def holders(self) -> list[Holder]:
        """Return who holds the lock. One round trip."""
        return await drive_async(self.show_steps(), self.transport, self.deadline)

    async def force_release(self) -> bool:
        """Take the lock away from whoever holds it, as the sync one does."""
        return await drive_async(self.force_steps(), self.transport, self.deadline)
