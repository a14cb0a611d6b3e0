"""What sync and async concurrency limiters share: places, and what becomes of the answers."""

from __future__ import annotations

import itertools
import math
import os
import random
import secrets
from abc import ABC, abstractmethod
from time import monotonic
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar, cast

from redishacks import _keys
from redishacks._command import Command, Sleep, Steps, ask, script
from redishacks._drive import AsyncTransport, Transport
from redishacks._linger import TaskSender, ThreadSender
from redishacks._transport import Hook
from redishacks._units import EXACT, Seconds, patience, seconds
from redishacks.errors import MaybeAppliedError, RedisHacksError, UnavailableError, UsageError
from redishacks.ratelimit._core import AWAY, Counts
from redishacks.ratelimit._keeper import Keeper
from redishacks.ratelimit._recall import SKEW, reached
from redishacks.ratelimit.commands import Key, Layout
from redishacks.ratelimit.decision import Decision, RateLimitedError, Verdict, decided
from redishacks.ratelimit.limit import Places

#: Leases in seconds: a shorter one would end while its reply is on the way.
_SHORTEST, _LONGEST = 0.1, 366 * 86_400.0
#: Seconds until a waiter looks again: at first, and at most.
_PAUSES = (0.005, 0.1)
#: Seconds until a refusal without Redis is worth another try.
_RETRY = 1.0
_SCRIPT = "ratelimit_slots"

S = TypeVar("S", bound="Seat")
T = TypeVar("T", bound=Transport | AsyncTransport)


class Holder(NamedTuple):
    """Somebody who has a place."""

    token: str
    #: Seconds until its lease ends.
    remaining: float


# What is said


def slots_command(
    key: bytes, verb: str, token: str, lease: int, most: int, *, repeatable: bool = True
) -> Command[list[int]]:
    """Say something about the places of a key; a token makes saying it twice harmless."""
    args = (verb, token, str(lease), str(most))
    return Command(args, (key,), script=script(_SCRIPT), repeatable=repeatable)


def _holders(reply: list[Any]) -> list[Holder]:
    return [
        Holder(token.decode(), left / 1e6)
        for token, left in zip(reply[::2], reply[1::2], strict=True)
    ]


# Who holds a place


class Seat:
    """A place, and what is known about its lease."""

    def __init__(self, limiter: Concurrency[Any], row: bytes, most: int | None) -> None:
        self.token = f"{limiter.lease_micros}-{secrets.token_hex(8)}"
        #: Limit, places left, and how exact that is.
        self.decision = Decision(False, most, None, None, 0.0)
        self._core = limiter
        self._row = row
        self._most = most
        self._pid = os.getpid()
        self._asked = self._until = math.inf
        #: An acquisition may have been heard though nobody answered, or may yet be.
        self.in_doubt = False
        #: It was given back.
        self.released = False
        self._lost = False

    def __repr__(self) -> str:
        state = "lost" if self.lost else "released" if self.released else "held"
        return f"<{type(self).__name__} of {self._core.name}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise UsageError("a slot belongs to its process and cannot be pickled")

    @property
    def remaining(self) -> float:
        """Seconds until the lease ends, 0.0 when it is over; infinite when Redis was not asked."""
        return 0.0 if self.released or self.lost else max(0.0, self._until - monotonic())

    @property
    def lost(self) -> bool:
        """Whether the lease ended before the release: somebody else may have the place.

        Always true in a forked child, which does not own its parent's place.
        """
        if not self.released and monotonic() >= self._until:
            self._lost = True
        return self._lost or self._pid != os.getpid()

    # For the limiter

    def begin(self, decision: Decision, since: float | None = None) -> None:
        """Hold the place: since that moment, or for as long as one likes without Redis."""
        self.decision = decision
        if since is not None:
            self._lease_from(since)

    def due(self, now: float) -> bool:
        """Return whether a third of the lease is over."""
        return now >= self._asked + self._core.lease / 3

    def renewal(self) -> Command[list[int]]:
        """Return what begins the lease anew."""
        return self.command("renew")

    def renewed(self, reply: list[int], since: float) -> bool:
        """Take note of the answer to a renewal; return whether the place is still held."""
        if self.released:
            return True
        if reply[1] and not self.lost:
            self._lease_from(since)
            return True
        self._lost = True
        return False

    def command(self, verb: str, *, repeatable: bool = True) -> Command[list[int]]:
        """Return what to say about this place."""
        lease, most = self._core.lease_micros, self._most or 0
        return slots_command(self._row, verb, self.token, lease, most, repeatable=repeatable)

    def enter_steps(self) -> Steps[list[int]]:
        """Ask for the place; an answer that was lost is asked for again."""
        since = monotonic()
        try:
            reply = yield from ask(self.command("enter", repeatable=False))
        except MaybeAppliedError:
            self.in_doubt = True
            if monotonic() >= since + self._core.deadline:
                raise
            reply = yield from ask(self.command("enter"))
        except RedisHacksError:
            raise
        except BaseException:
            self.in_doubt = True
            raise
        return reply

    def renew_steps(self) -> Steps[bool]:
        if self.released or self.lost:
            return False
        if self._until == math.inf:
            return True
        since = monotonic()
        reply = yield from ask(self.renewal())
        return self.renewed(reply, since) and not self.released

    def release_steps(self) -> Steps[None]:
        """Leave, once; what nobody has heard is said again in the background."""
        if self.released or self._pid != os.getpid():
            return
        held = self._until < math.inf
        self._lost = self.lost
        self.released = True
        self._core.forget(self)
        if held or self.in_doubt:
            yield from self.leave_steps()

    def leave_steps(self) -> Steps[None]:
        command = self.leaving()
        if self._core.is_away(self):
            self._core.leave_later(self)
            return
        try:
            yield from ask(command)
        except GeneratorExit:
            raise  # nobody is there to go on: the place comes back by its lease
        except AWAY:
            self._core.leave_later(self)
        except BaseException:
            self._core.leave_later(self)
            raise

    def leaving(self) -> Command[list[int]]:
        """Return what gives the place back, for good when a copy of `enter` may be under way."""
        return self.command("abandon" if self.in_doubt else "leave")

    def _lease_from(self, since: float) -> None:
        # From when it was asked for: the server looked at its clock later.
        self._asked, self._until = since, since + self._core.lease * SKEW


# Who gives them out


class Concurrency(ABC, Generic[T]):
    """What both colours share."""

    def __init__(
        self,
        client: Any,
        name: str,
        amount: int | None,
        *,
        lease: Seconds = 30.0,
        renew: bool = False,
        prefix: str = "rh",
        deadline: Seconds = 0.05,
        on_error: str = "raise",
        on_command: Hook | None = None,
    ) -> None:
        self.name = name
        self.amount = amount
        self.lease = seconds(lease, "lease")
        if not _SHORTEST <= self.lease <= _LONGEST:
            raise UsageError(f"a lease is from 0.1 s to 366 days, not {lease!r}")
        self.lease_micros = round(self.lease * 1e6)
        self.deadline = seconds(deadline, "deadline")
        if on_error not in ("raise", "allow", "deny"):
            raise UsageError(f"on_error is raise, allow or deny, not {on_error!r}")
        self._layout = Layout(prefix, name, "key")
        self._renew = renew
        self._on_error = on_error
        self._refused, self._degraded = itertools.count(), itertools.count()
        self.transport: T = self._connect(client, on_command)
        self._set_up()

    @abstractmethod
    def _connect(self, client: Any, on_command: Hook | None) -> T:
        """Return the transport of this colour."""

    @abstractmethod
    def _set_up(self) -> None:
        """Make what keeps leases in the background."""

    @abstractmethod
    def _background(self) -> ThreadSender[Keeper] | TaskSender[Keeper]:
        """Return the sender of this place, whose buffer is its keeper."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self._amount} at once>"

    @property
    def amount(self) -> int | None:
        """How many at once, None for no limit; may be set at any time, and holders stay."""
        return self._amount

    @amount.setter
    def amount(self, amount: int | None) -> None:
        self._amount = _checked(amount)

    def counts(self) -> Counts:
        """Return how often this process refused, or decided without Redis."""
        return Counts(reached(self._refused), 0, reached(self._degraded))

    def _options(self) -> dict[str, Any]:
        """Return how often the keeper is at work, and how long it may wait for an answer."""
        period = min(1.0, self.lease / 12)
        return {"linger": period, "deadline": max(period, self.deadline), "overflow": "raise"}

    def _begin(self) -> Keeper:
        """See that the keeper is at work."""
        background = self._background()
        if not background.running():
            background.start()
        return background.buffer

    # For slots

    def inside(self, slot: Seat) -> None:
        """Renew the lease while its holder is inside, if that is wanted."""
        if self._renew and slot.remaining < math.inf:
            self._begin().keep(slot)

    def forget(self, slot: Seat) -> None:
        """Renew it no more."""
        if self._renew:
            self._background().buffer.forget(slot)

    def is_away(self, slot: Seat) -> bool:
        """Return whether the node did not answer a moment ago."""
        breaker = self._background().buffer.breaker
        return bool(breaker) and breaker.is_open(self._where(slot))

    def leave_later(self, slot: Seat) -> None:
        """Give a place back in the background."""
        self._begin().leave(slot.token, slot.leaving())
        slot.in_doubt = False

    # Conversations

    def acquire_steps(
        self, kind: type[S], key: Key, wait: Seconds | None, amount: int | None
    ) -> Steps[S]:
        """Get a place, now or within the wait; raises `RateLimitedError`."""
        row = self._row(key)
        most = self._amount if amount is None else _checked(amount)
        end = monotonic() + patience(wait, "wait")
        pause, longest = _PAUSES
        while True:
            # Each time with a token of its own: the last one may have been given up in doubt.
            slot = kind(self, row, most)
            decision = yield from self._enter(slot)
            if decision.allowed:
                return slot
            left = end - monotonic()
            if decision.retry_after is None or left <= 0:
                next(self._refused)
                raise RateLimitedError(decision, self.name, None if key == "" else key)
            # Nobody tells of a release. Waiters that came together do not stay together.
            nap = pause * random.uniform(0.5, 1.0)
            yield Sleep(min(nap, left, decision.retry_after))
            pause = min(2 * pause, longest)

    def _enter(self, slot: Seat) -> Steps[Decision]:
        """Ask for a place, if there is something to ask."""
        most = slot.decision.limit
        if not most:
            decision = _unasked(most)
            slot.begin(decision)
            return decision
        breaker = self._background().buffer.breaker
        since = monotonic()
        try:
            breaker.check(self._where(slot))
            reply = yield from slot.enter_steps()
        except AWAY as error:
            return self._without(slot, error)
        except GeneratorExit:
            raise  # nobody is there to go on: the place comes back by its lease
        except BaseException:
            yield from slot.release_steps()
            raise
        decision = _decision(most, reply, bool(reply[1]))
        if decision.allowed:
            slot.begin(decision, since)
        elif slot.in_doubt:
            yield from slot.release_steps()
        return decision

    def _where(self, slot: Seat) -> str:
        return str(self.transport.where(slot.command("peek")))

    def _without(self, slot: Seat, error: Exception) -> Decision:
        """Decide without Redis, as `on_error` says."""
        self._begin().breaker.open(self._where(slot), slot.command("peek"))
        if slot.in_doubt:
            self.leave_later(slot)
        if self._on_error == "raise":
            if isinstance(error, UnavailableError):
                raise error
            raise UnavailableError(f"no place was taken: {error}") from error
        next(self._degraded)
        most, allowed = slot.decision.limit, self._on_error == "allow"
        decision = _degraded(most, allowed)
        slot.begin(decision)
        return decision

    def peek_steps(self, key: Key, amount: int | None) -> Steps[Decision]:
        """Say what an acquisition would say."""
        most = self._amount if amount is None else _checked(amount)
        slot = Seat(self, self._row(key), most)
        if not most:
            return _unasked(most)
        try:
            self._background().buffer.breaker.check(self._where(slot))
            reply = yield from ask(slot.command("peek"))
        except AWAY as error:
            return self._without(slot, error)
        return _decision(most, reply, reply[3] == 0)

    def holders_steps(self, key: Key) -> Steps[list[Holder]]:
        row = self._row(key)
        args = ("list", "", str(self.lease_micros), "0")
        command = Command(args, (row,), _holders, script(_SCRIPT), repeatable=True, bulk=True)
        return (yield from ask(command))

    def reset_steps(self, key: Key) -> Steps[None]:
        row = self._row(key)
        yield from ask(Command(("UNLINK", row), (row,), int, repeatable=True))

    def _row(self, key: Key) -> bytes:
        """Return the Redis key of a key's places; the empty key is like any other here."""
        raw = b"" if key == "" else _keys.id_bytes(key, "key")
        return self._layout.key(None, raw, "slots")


# Values


def _checked(amount: Any) -> int | None:
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    if amount is not None and not (whole and 0 <= amount < EXACT):
        raise UsageError(f"how many at once is an int from 0 to 2^53 or None, not {amount!r}")
    return cast("int | None", amount)


def _decision(most: int, reply: list[int], allowed: bool) -> Decision:
    _, _, holders, retry, next_, reset = reply
    wait = 0.0 if allowed else retry / 1e6
    left = max(0, most - holders)
    each = Verdict(Places(most), None, allowed, left, wait, next_ / 1e6, reset / 1e6)
    return decided(allowed, (each,))


def _unasked(most: int | None) -> Decision:
    """Decide where there is no limit, or one of 0."""
    if most is None:
        return decided(True, (), "none")
    return decided(False, (Verdict(Places(0), None, False, 0, None, 0.0, 0.0),), "none")


def _degraded(most: int | None, allowed: bool) -> Decision:
    wait = 0.0 if allowed else _RETRY
    each = Verdict(Places(most or 0), None, allowed, 0, wait, 0.0, 0.0)
    return decided(allowed, (each,), "none", degraded=True)
