"""`Held` and `AsyncHeld`: one acquisition of a lock, of whatever kind."""

from __future__ import annotations

from redishacks._drive import drive, drive_async
from redishacks._units import Seconds
from redishacks.locks._context import AsyncReleasing, Releasing
from redishacks.locks._hold import Hold
from redishacks.locks._transaction import AsyncTransaction, Transaction


class Held(Hold, Releasing):
    """A lock that is held; a context manager that releases it.

    - `fence` grows from holder to holder; `token` names this acquisition, for `adopt`.
    - `remaining`: seconds of the lease, of `ttl`, that are left; `held`, `lost`, `check()`: whether
      it is held still. These are told by this process's clock, and cost no round trip.
    """

    def extend(self, ttl: Seconds | None = None) -> None:
        """Begin the lease anew: it ends so many seconds from now, by default as many as last time.

        Raises `LockLostError` when the lock was lost, and `UnavailableError` when Redis cannot be
        asked; the lease then goes on until it ends, or the shorter one that may have begun. One
        round trip.
        """
        drive(self.core.extend_steps(self, ttl), self.core.transport, self.core.deadline)

    def release(self) -> None:
        """Give the lock back, to the next in line if there is one; again does no harm.

        Raises `LockLostError` when it had been lost before. When Redis is away it is tried in the
        background until it was heard, or the lease has ended anyway. Does nothing in a forked
        child. One round trip.
        """
        if not self.end():
            return
        core = self.core
        try:
            code = core.transport.call(core.giving_back(self), core.deadline)
        except BaseException as error:
            code = error
        try:
            if code != 1 or self._lost or self.doubt:
                drive(core.release_steps(self, code), core.transport, core.deadline)
        finally:
            core.tell_held(self)

    def transaction(self) -> Transaction:
        """Return a context manager that takes commands of a redis-py pipeline.

            with held.transaction() as pipe:
                pipe.set("balance", 7)
            pipe.results

        They are carried out at the end of the `with`, together, and only if the lock is still held
        then; else `LockLostError` is raised, and `MaybeAppliedError` when the last reply was lost.
        Where one fails, for one because a key is of another type, the others are carried out
        nevertheless, as Redis has it, and `ServerError` is raised. After an exception in the body
        nothing is done. Runs on the client that the lock was made with, with its timeouts; on a
        cluster keys need the lock's tag, else `CrossNodeError`. Three round trips.
        """
        client, own = self._redis()
        return Transaction((self,), client, own=own)


class AsyncHeld(Hold, AsyncReleasing):
    """`Held` for asyncio."""

    async def extend(self, ttl: Seconds | None = None) -> None:
        """Begin the lease anew, as `Held.extend`."""
        core = self.core
        await drive_async(core.extend_steps(self, ttl), core.transport, core.deadline)

    async def release(self) -> None:
        """Give the lock back, as `Held.release`."""
        if not self.end():
            return
        core = self.core
        try:
            code = await core.transport.call(core.giving_back(self), core.deadline)
        except GeneratorExit:
            raise  # nobody is there to go on: the lease ends by itself
        except BaseException as error:
            code = error
        try:
            if code != 1 or self._lost or self.doubt:
                await drive_async(core.release_steps(self, code), core.transport, core.deadline)
        finally:
            core.tell_held(self)

    def transaction(self) -> AsyncTransaction:
        """Return an async context manager that takes commands, as `Held.transaction`."""
        client, own = self._redis()
        return AsyncTransaction((self,), client, own=own)
