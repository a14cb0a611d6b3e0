"""What is held: one acquisition of a lock, and what is known about its lease in this process."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from redishacks._clock import clock
from redishacks._command import Command, Outcome, Steps, ask_all
from redishacks._units import Seconds
from redishacks.errors import RedisHacksError, UsageError
from redishacks.locks._keeper import Renewal
from redishacks.locks._station import AnyStation
from redishacks.locks.commands import MINE, answer, micros
from redishacks.locks.holder import LockLostError

if TYPE_CHECKING:
    from redishacks.locks._core import Core

#: A lease counts as ended a little early: the clocks of two machines do not run alike.
_SKEW = 0.999
#: Renewals of locks that came at about the same time go out together.
_TOGETHER = 30


class Hold:
    """One acquisition of a lock: what is known about it in this process."""

    #: A number that grows from holder to holder; 0 until it is held.
    fence = 0
    #: When the running lease was asked for, when the first one was, and when it ends at the latest.
    asked = began = _until = 0.0
    #: When it is renewed no more.
    _end = math.inf
    #: What wakes a waiter.
    bell: Any = None
    #: How a waiter is told; "" for one that is not in line.
    ear = ""
    #: How many times over it is held, by reentrance.
    depth = 1
    #: A command may have arrived whose reply was lost.
    doubt = False
    #: It was given back, by this process.
    released = False
    _lost = _told = False
    #: Seconds of the lease that the keeper asked for last.
    _wanted = 0.0
    #: When the last answer came that began a lease.
    _answered_at = 0.0
    #: Until when the shorter lease of an extension in doubt may yet begin, and its seconds.
    _doubtful = (0.0, 0.0)
    #: When the keeper looks at it next.
    kept_until = math.inf

    def __init__(self, core: Core[Any], station: AnyStation, owner: Hashable, ttl: float) -> None:
        #: Names this acquisition; `Lock.adopt` takes it in another process.
        self.token = core.kind.mark + station.token()
        #: Seconds of its lease.
        self.ttl = ttl
        self.core = core
        self.station = station
        self.owner = owner
        self._keeper = keeper = station.keeper
        #: Another one in a forked child: what is held there is the parent's.
        self.process = keeper.process
        self.renews = core.renew

    def __repr__(self) -> str:
        state = "released" if self.released else "lost" if self.lost else "held"
        return f"<{type(self).__name__} of {self.name}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "an acquisition belongs to its process and cannot be pickled: "
            "pass its token on, and adopt(token) there"
        )

    @property
    def name(self) -> str:
        """The lock's name."""
        return str(self.core.name)

    @property
    def mark(self) -> str:
        """The lock's kind: "r" for one that is shared, "w" for one of those that has it alone."""
        return self.core.kind.mark

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy of what its parent holds."""
        return self.process is not self._keeper.process

    @property
    def remaining(self) -> float:
        """Seconds until the lease ends, by this process's clock; 0.0 when it is not held."""
        return 0.0 if self.released or self.lost else max(0.0, self._until - clock())

    @property
    def lost(self) -> bool:
        """Whether the lease ended, or was taken away, before the release; always so in a forked
        child.
        """
        if not self.released and not self._lost and clock() >= self._until:
            self._lost = True
        return self._lost or self.process is not self._keeper.process

    @property
    def held(self) -> bool:
        """Whether it is held, as far as this process knows. No round trip."""
        return not self.released and not self.lost

    def check(self) -> None:
        """Raise `LockLostError` unless it is held, as far as this process knows. No round trip."""
        if not self.held:
            raise self.loss()

    def _redis(self) -> tuple[Any, bool]:
        if self.mark:
            raise UsageError("a transaction needs a Lock or a MultiLock: one that is held alone")
        return self.core.redis()

    def loss(self) -> LockLostError:
        """Return what to raise about a lock that is not held any more."""
        if self.inherited:
            why = "it belongs to the process that this one was forked from"
        elif self.released and not self._lost:
            why = "it was released"
        elif clock() >= self._end:
            why = f"its max_hold of {self._end - self.began:g} s is over"
        else:
            why = f"its lease of {self.ttl:g} s ended, or it was taken away, before the release"
        return LockLostError(f"lock {self.name} is not held: {why}", self.name)

    # For the keeper

    @property
    def key(self) -> bytes:
        """The lock."""
        return self.core.kind.key

    @property
    def renewal(self) -> Renewal:
        """What begins the lease anew."""
        return self.core.renewal

    def over(self, now: float) -> bool:
        """Return whether the lease has ended without a release."""
        return not self.released and not self._told and (self._lost or now >= self._until)

    def due(self) -> float | None:
        """Return when to look at it next; None when never again."""
        if self.released or self._told:
            return None
        until = self._until
        if self.renews and until < self._end:
            grid = self.ttl / _TOGETHER
            when = math.ceil((self.asked + until) / 2 / grid) * grid
            return when if when < until else until
        return until

    def wants(self, now: float) -> str | None:
        """Return how many µs a new lease should last, None when it is not time."""
        if not self.renews or self.released or self._lost:
            return None
        if not (self.asked + self._until) / 2 <= now < self._until < self._end:
            return None  # it is not half over
        rest = (self._end - now) / _SKEW
        self._wanted = wanted = self.ttl if self.ttl < rest else rest
        return micros(wanted)

    def renewed(self, since: float, now: float) -> float | None:
        """Hear that the lease it wanted was asked for at that moment, and began; `due` again."""
        self._lasts(since, self._wanted, now)
        return self.due()

    def lease(self, ttl: Seconds) -> float:
        """Return the seconds of a lease; raises `UsageError`."""
        return float(self.core.lease(ttl))

    def extension(self, length: float | None, now: float) -> tuple[float, Command[list[Any]]]:
        """Return what begins a lease anew, and its seconds; by default those it has."""
        wanted = min(self.ttl if length is None else length, self._end - now)
        command = self.core.asking(self, now, MINE, wanted)
        return wanted, command._replace(repeatable=True)

    def answered(self, reply: Any, since: float, wanted: float) -> bool:
        """Take the answer to an extension; return whether it was too late and is asked for again.

        Raises `LockLostError`.
        """
        state, now, *_ = answer(reply)
        self.core.learn(now, clock())
        if state == -1:
            return True
        if state == 1:
            self.ttl = wanted
            self._lasts(since, wanted, clock())
            self.watched()
        else:
            self.ended()
        self.check()
        return False

    def _lasts(self, since: float, length: float, now: float) -> None:
        until = since + length * _SKEW
        if since <= self._answered_at:  # the server may have heard the other question later
            until = min(until, self._until)
        if since < self._doubtful[0]:
            until = min(until, since + self._doubtful[1] * _SKEW)
        self.asked, self._until = since, min(until, self._end)
        self._answered_at = now

    def keep_on(self, on: bool) -> None:
        """Have the lease begun anew in the background, or no more."""
        self.renews = on
        self.watched()

    def watched(self) -> None:
        """See that somebody looks after the lease, if anybody has to."""
        self.core.watch(self)

    def missed(self, since: float) -> None:
        """Hear that nobody knows what became of the lease that was asked for at that moment."""
        self.unsure(since, self._wanted)

    def unsure(self, since: float, length: float) -> None:
        """Count on no more than is sure: the old lease, or that one if it is shorter."""
        self._until = min(self._until, max(since + length * _SKEW, self.asked))

    def in_doubt(self, since: float, length: float) -> None:
        """Hear the same of an extension, which may even come late."""
        self.unsure(since, length)
        self._doubtful = since + self.core.late, length
        self.watched()

    def ended(self) -> None:
        """Hear that the lease has ended."""
        if self.released or self.inherited:
            return  # a renewal that came after the release says nothing
        self.tell_lost()

    # For the lock

    def begin_asking(self) -> float:
        """Take note of when it is asked for: the server looks at its clock later."""
        self.asked = now = clock()
        return now

    def begin(self, fence: int, longest: float) -> None:
        """Hold it since it was asked for, for so many seconds at most."""
        self.fence = fence
        self.began = since = self.asked
        self._until = since + self.ttl * _SKEW
        if longest < math.inf:
            self._end = since + longest
            self._until = min(self._until, self._end)

    def stale(self, now: float) -> bool:
        """Return whether its lease would be over by then, had it begun when it was asked for."""
        return now >= self.asked + self.ttl * _SKEW

    def end(self) -> bool:
        """Take note of a release; return whether the server is to be told of it."""
        if self.released or self.process is not self._keeper.process:
            return False
        self.depth -= 1
        if self.depth:
            return False
        self._lost = self._lost or clock() >= self._until
        self.released = True
        self.core.forget(self)
        return True

    @property
    def was_lost(self) -> bool:
        """Whether it was lost before its release."""
        return self._lost

    def tell_lost(self) -> None:
        """Tell whoever wants to know, once."""
        self._lost = True
        if not self._told:
            self._told = True
            self.core.lost(self)


def extend_all_steps(holds: Sequence[Hold], ttl: Seconds | None) -> Steps[None]:
    """Begin leases anew, in one exchange; raises `LockLostError`."""
    length = None if ttl is None else holds[0].lease(ttl)
    late = True
    while late:
        for hold in holds:
            hold.check()
        since = clock()
        asked = [hold.extension(length, since) for hold in holds]
        heard: list[Outcome[Any]] = []
        try:
            heard = yield from ask_all([command for _, command in asked])
        finally:
            for place, (hold, (wanted, _)) in enumerate(zip(holds, asked, strict=True)):
                if place >= len(heard) or heard[place].error is not None:
                    hold.in_doubt(since, wanted)
        late, errors = False, []
        for hold, (wanted, _), outcome in zip(holds, asked, heard, strict=True):
            try:
                late = hold.answered(outcome.result(), since, wanted) or late
            except RedisHacksError as error:
                errors.append(error)
        if errors:
            raise errors[0]
