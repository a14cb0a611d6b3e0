"""`MultiLock`: several locks at once, all or none.

    with MultiLock(client, ["account:1", "account:2"], wait=5) as held:
        held.fences["account:1"]
        held.check()

They are the locks that `Lock` knows by these names. When all are free they are taken in one round
trip. Else, with a wait, it stands in line for one after the other, in the order of their names, so
that no two wait for each other; what it has it keeps meanwhile.

On a cluster all must live on one node: give them a `tag` in common, which a `Lock` of one of them
then needs as well.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar, Unpack, cast

from redishacks._clock import clock
from redishacks._command import Outcome, Steps, ask_all
from redishacks._drive import drive, drive_async
from redishacks._units import Seconds
from redishacks.errors import MaybeAppliedError, UnavailableError, UsageError
from redishacks.locks._context import (
    UNSET,
    AsyncEntering,
    AsyncReleasing,
    Entered,
    Entering,
    Releasing,
)
from redishacks.locks._core import Options
from redishacks.locks._hold import Hold, extend_all_steps
from redishacks.locks._transaction import AsyncTransaction, Transaction
from redishacks.locks.commands import Exclusive, micros
from redishacks.locks.held import AsyncHeld, Held
from redishacks.locks.holder import LockedError, LockLostError
from redishacks.locks.lock import AsyncLock, Lock

H = TypeVar("H", Held, AsyncHeld)
L = TypeVar("L", Lock, AsyncLock)


# What is held


class _Several(Generic[H]):
    """Several locks that are held."""

    def __init__(self, parts: Sequence[H]) -> None:
        #: A handle for each lock, in the order of their names.
        self.parts: tuple[H, ...] = tuple(parts)
        self._core = parts[0].core

    def __repr__(self) -> str:
        names = ", ".join(part.name for part in self.parts)
        return f"<{type(self).__name__} of {names}: {'held' if self.held else 'not held'}>"

    @property
    def remaining(self) -> float:
        """Seconds until the first lease ends; 0.0 when any is not held."""
        return min(part.remaining for part in self.parts)

    @property
    def held(self) -> bool:
        """Whether all are held, as far as this process knows. No round trip."""
        return all(part.held for part in self.parts)

    @property
    def lost(self) -> bool:
        """Whether any was lost before its release; always so in a forked child."""
        return any(part.lost for part in self.parts)

    @property
    def fences(self) -> dict[str, int]:
        """The fence of each lock, by its name."""
        return {part.name: part.fence for part in self.parts}

    def check(self) -> None:
        """Raise `LockLostError` unless all are held, as far as this process knows."""
        for part in self.parts:
            part.check()


def release_all_steps(parts: Sequence[Hold]) -> Steps[None]:
    """Give all back in one exchange; raises `LockLostError` when any had been lost."""
    ending = [part for part in parts if part.end()]
    if not ending:
        return
    try:
        outcomes = yield from ask_all([part.core.giving_back(part) for part in ending])
    except GeneratorExit:
        raise  # nobody is there to go on: the leases end by themselves
    except BaseException:
        for part in ending:
            part.core.give_up(part)
        raise
    losses = []
    for part, outcome in zip(ending, outcomes, strict=True):
        lost = yield from _lost(part, outcome)
        if part.doubt:  # a first copy of its acquire may be under way
            part.core.give_up(part)
        if lost:
            part.tell_lost()
            losses.append(part.loss())
    for part in ending:
        part.core.tell_held(part)
    if losses:
        raise losses[0]


def _lost(part: Hold, outcome: Outcome[int]) -> Steps[bool]:
    core = part.core
    if isinstance(outcome.error, MaybeAppliedError):
        return (yield from core.release_again(part)) or part.was_lost
    if isinstance(outcome.error, UnavailableError):
        core.release_later(part, outcome.error)
        return part.was_lost
    return outcome.result() != 1 or part.was_lost


class MultiHeld(_Several[Held], Releasing):
    """Several locks that are held; a context manager that releases them."""

    def extend(self, ttl: Seconds | None = None) -> None:
        """Begin all leases anew, as `Held.extend`. One round trip."""
        drive(extend_all_steps(self.parts, ttl), self._core.transport, self._core.deadline)

    def release(self) -> None:
        """Give all back, as `Held.release`. One round trip."""
        drive(release_all_steps(self.parts), self._core.transport, self._core.deadline)

    def transaction(self) -> Transaction:
        """Return what carries out commands only while all are held, as `Held.transaction`."""
        client, own = self._core.redis()
        return Transaction(self.parts, client, own=own)


class AsyncMultiHeld(_Several[AsyncHeld], AsyncReleasing):
    """`MultiHeld` for asyncio."""

    async def extend(self, ttl: Seconds | None = None) -> None:
        """Begin all leases anew, as `Held.extend`."""
        core = self._core
        await drive_async(extend_all_steps(self.parts, ttl), core.transport, core.deadline)

    async def release(self) -> None:
        """Give all back, as `Held.release`."""
        await drive_async(release_all_steps(self.parts), self._core.transport, self._core.deadline)

    def transaction(self) -> AsyncTransaction:
        """Return what carries out commands only while all are held, as `Held.transaction`."""
        client, own = self._core.redis()
        return AsyncTransaction(self.parts, client, own=own)


# What is acquired


class _Multi(Generic[L]):
    """What both colours share."""

    _kind: type[L]

    def __init__(
        self,
        client: Any,
        names: Iterable[str],
        *,
        fair: bool = True,
        prefix: str = "rh",
        tag: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        listed = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else []
        if not listed or not all(isinstance(name, str) for name in listed):
            raise UsageError(f"a MultiLock takes a list of one name or more, not {names!r}")
        if options.get("reentrant") or options.get("replicas"):
            raise UsageError("a MultiLock is not reentrant, and does not wait for replicas")
        #: One for each name, in their order.
        self.locks: list[L] = [
            self._kind(client, name, fair=fair, prefix=prefix, tag=tag, **options)
            for name in sorted(set(listed))
        ]
        if len({lock.renewal.slot for lock in self.locks}) > 1:
            raise UsageError("on a cluster a MultiLock needs a tag, which puts all on one node")
        self.entered = Entered()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(lock.name for lock in self.locks)}>"

    def acquire_steps(self, kind: type[H], wait: Any, ttl: Seconds | None) -> Steps[list[H]]:
        """Get all locks, now or within the wait; raises `LockedError`."""
        end = clock() + self.locks[0].patience(wait)
        holds = [lock.fresh(kind, ttl) for lock in self.locks]
        refused = yield from self._all_at_once(holds)
        if refused is None:
            return holds
        at, reply = refused
        if clock() >= end:
            self.locks[at].refuse(holds[at], *reply)
        got: list[H] = []
        try:
            for lock in self.locks:
                left = None if end == math.inf else max(0.0, end - clock())
                hold, until = lock.attempt(kind, left, ttl)
                got.append((yield from lock.acquire_steps(hold, until)))
                got[-1].keep_on(True)
            for hold in got:
                hold.keep_on(self.locks[0].renew)
            yield from extend_all_steps(got, ttl)
        except LockedError:
            with contextlib.suppress(LockLostError):
                yield from release_all_steps(got)
            raise
        except GeneratorExit:
            raise  # nobody is there to go on: the leases end by themselves
        except BaseException:
            for lock, hold in zip(self.locks, got, strict=False):
                if hold.end():
                    lock.give_up(hold)
            raise
        return got

    def _all_at_once(self, holds: Sequence[Hold]) -> Steps[tuple[int, list[Any]] | None]:
        """Take all that are free, if all are; else return which is not, and what is known of it."""
        first = self.locks[0]
        kind, *others = [cast("Exclusive", lock.kind) for lock in self.locks]
        tokens = [hold.token for hold in holds]
        doubt = False
        try:
            while True:
                now = max([hold.begin_asking() for hold in holds])
                command = kind.acquire_all(
                    others, tokens, micros(holds[0].ttl), first.not_after(now), first.info(holds[0])
                )
                try:
                    reply = yield command._replace(repeatable=doubt)
                except MaybeAppliedError:
                    doubt = True
                    continue
                first.learn(reply[1], clock())
                if reply[0] != -1:
                    break
        except GeneratorExit:
            raise  # nobody is there to go on: the leases end by themselves
        except BaseException:
            self._give_up(holds)
            raise
        if reply[0] == 1:
            for lock, hold, fence in zip(self.locks, holds, reply[2:], strict=True):
                hold.doubt = doubt
                lock.begin(hold, fence)
            return None
        if doubt or reply[0] == -2:  # an earlier copy may be under way
            self._give_up(holds)
        if reply[0] == -2:
            raise UnavailableError("locks were taken away before their reply arrived")
        _, _, at, *about = reply
        return at - 1, about

    def _give_up(self, holds: Sequence[Hold]) -> None:
        for lock, hold in zip(self.locks, holds, strict=True):
            lock.give_up(hold)


class MultiLock(_Multi[Lock], Entering[MultiHeld]):
    """Several locks at once, all or none.

    `names` are those of the locks. All other arguments are those of `Lock`, but for `reentrant` and
    `replicas`; `on_lost` gets the handle of the one that was lost. What it has got it keeps while
    it waits for the next. On a cluster it needs a `tag`, and so do others that use the locks.
    """

    _kind = Lock

    def acquire(self, *, wait: Seconds | None = UNSET, ttl: Seconds | None = None) -> MultiHeld:
        """Get all locks, or raise `LockedError` with one that somebody has, as `Lock.acquire`."""
        lock = self.locks[0]
        return MultiHeld(drive(self.acquire_steps(Held, wait, ttl), lock.transport, lock.deadline))


class AsyncMultiLock(_Multi[AsyncLock], AsyncEntering[AsyncMultiHeld]):
    """`MultiLock` for asyncio: takes `redis.asyncio` twins of its clients, or a URL."""

    _kind = AsyncLock

    async def acquire(
        self, *, wait: Seconds | None = UNSET, ttl: Seconds | None = None
    ) -> AsyncMultiHeld:
        """Get all locks, or raise `LockedError` with one that somebody has, as `Lock.acquire`."""
        lock, steps = self.locks[0], self.acquire_steps(AsyncHeld, wait, ttl)
        return AsyncMultiHeld(await drive_async(steps, lock.transport, lock.deadline))
