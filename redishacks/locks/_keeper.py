"""What locks do in the background: begin leases anew, tell of lost ones, leave what is in doubt.

One for all locks of a process on one server (for asyncio: and one loop):

- leases are begun anew when half of their time is over, many in one command;
- a holder is told when its lease has ended, by this process's clock;
- an acquisition that was given up is released until an answer was heard: its command may have been
  applied, or be under way.
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import socket
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from redishacks._clock import clock
from redishacks._command import Command, Outcome, Script, Steps, ask_all
from redishacks._errands import Errands
from redishacks.errors import RedisHacksError, UnavailableError

#: Leases that one command begins anew.
_BATCH = 200
#: Seconds that it stays at work when nothing is left to be done.
_LINGER = 10.0
#: Seconds until a failed renewal is tried again; or a tenth of the lease, if that is less.
_AGAIN = 0.25
#: Seconds between two tries to leave, at first and at most.
_PAUSES = (0.05, 1.0)
#: Acquisitions that wait to be left; of more the oldest end with their leases only.
_MOST_LEAVING = 10_000

T = TypeVar("T")

_log = logging.getLogger("redishacks")


class Kept(Protocol):
    """A lease to look after."""

    token: str
    #: Seconds of its lease.
    ttl: float
    #: When it is looked at next, inf for never.
    kept_until: float

    @property
    def renewal(self) -> Renewal:
        """What begins the lease anew."""

    def over(self, now: float) -> bool:
        """Return whether the lease has ended without a release."""

    def due(self) -> float | None:
        """Return when to look at it next; None when never again."""

    def wants(self, now: float) -> str | None:
        """Return how many µs a new lease should last, None when it is not time."""

    def renewed(self, since: float, now: float) -> float | None:
        """Hear that the lease it wanted was asked for at that moment, and began; `due` again."""

    def missed(self, since: float) -> None:
        """Hear that nobody knows what became of it."""

    def ended(self) -> None:
        """Hear that the lease has ended."""


class Renewal(NamedTuple):
    """What begins leases of a lock anew."""

    script: Script
    #: Leases of one slot may be begun anew by one command.
    slot: int
    key: bytes


class _Leaving(NamedTuple):
    command: Command[int]
    #: Until then a copy of the acquisition may arrive.
    until: float
    #: Then its lease has ended in any case.
    over: float


class Keeper(Errands):
    """What is to be done about leases, and when."""

    what = "leases of locks"

    def reset(self) -> None:
        """Begin with nothing: at first, and in a forked child, which holds no lock."""
        super().reset()
        #: About this process, as holders are described; another object in a forked child.
        self.process = f"{socket.gethostname()}\t{os.getpid()}\t"
        self._guard = threading.RLock()  # a signal handler may take a lock, too
        self._times: list[float] = []
        self._by_time: dict[float, list[weakref.ref[Kept]]] = {}
        self._leaving: dict[str, _Leaving] = {}
        self._unheard: set[str] = set()
        self._next_try = 0.0
        self._backoff = _PAUSES[0]
        self._busy_at = clock()

    def keep(self, held: Kept, when: float) -> bool:
        """Look at a lease at that time; return whether that is sooner than anything else."""
        self._keep((held,), when)
        first = self._times[:1]  # the keeper may have looked at it already
        return not first or first[0] >= when

    def _keep(self, holds: Sequence[Kept], when: float) -> None:
        with self._guard:
            refs = self._by_time.setdefault(when, [])
            if not refs:
                heapq.heappush(self._times, when)
            for held in holds:
                if when < held.kept_until:  # else it is looked at sooner
                    held.kept_until = when
                    refs.append(weakref.ref(held))

    def leave(self, token: str, command: Command[int], until: float, ttl: float) -> None:
        """Say this until somebody has heard it, and once more after that moment.

        A `ttl` later there is nothing left to be released.
        """
        while len(self._leaving) >= _MOST_LEAVING:
            self.left(next(iter(self._leaving)))
        self._unheard.add(token)
        self._leaving[token] = _Leaving(command, until, until + ttl)

    def left(self, token: str) -> None:
        """Hear that it has been left for good."""
        self._leaving.pop(token, None)
        self._unheard.discard(token)

    def waiting(self) -> int:
        """Return how many acquisitions nobody has heard to be given up."""
        return len(self._unheard)

    def pause(self, linger: float) -> float | None:
        """Return seconds until something is to be done."""
        now = clock()
        times = [self._times[0]] if self._times else []
        if self._leaving:
            soonest = min((each.until for each in list(self._leaving.values())), default=now)
            times.append(self._next_try if self._unheard else max(soonest, self._next_try))
        if times:
            self._busy_at = now
            return max(0.0, min(min(times) - now, linger))
        return linger if now < self._busy_at + _LINGER else None

    def send(self) -> Steps[None]:
        """Do all that is to be done now, in one exchange; what fails is tried again."""
        self.error = None
        now = clock()
        batches = [] if self.closing else self._renewals(now)
        for token in [token for token, each in list(self._leaving.items()) if now >= each.over]:
            self.left(token)
        leaving = {
            token: each
            for token, each in list(self._leaving.items())
            if (now >= self._next_try or self.closing)
            and (token in self._unheard or now >= each.until)
        }
        commands: list[Command[Any]] = [command for command, _ in batches]
        commands += [each.command for each in leaving.values()]
        if not commands:
            return
        outcomes = yield from ask_all(commands)
        for (_, batch), outcome in zip(batches, outcomes, strict=False):
            self._settle(batch, now, outcome)
        for (token, each), outcome in zip(leaving.items(), outcomes[len(batches) :], strict=True):
            if isinstance(outcome.error, UnavailableError):
                continue
            self._unheard.discard(token)
            if outcome.value == 1 or now >= each.until or outcome.error is not None:
                self.left(token)
        failed = [each.error for each in outcomes if isinstance(each.error, RedisHacksError)]
        if not failed:
            self._next_try, self._backoff = 0.0, _PAUSES[0]
            return
        self.error = failed[0]
        first = self._backoff == _PAUSES[0]  # of an outage
        _log.log(
            logging.WARNING if first else logging.DEBUG,
            "%s: renewing or releasing failed: %s", self.what, failed[0],
        )  # fmt: skip
        self._next_try = clock() + self._backoff
        self._backoff = min(2 * self._backoff, _PAUSES[1])

    def _renewals(self, now: float) -> list[tuple[Command[list[int]], list[Kept]]]:
        """Look at all that are due; return what begins leases anew."""
        wanted: dict[tuple[Script, int], list[tuple[Kept, bytes, str]]] = defaultdict(list)
        for held in self._due(now):
            lease = held.wants(now)
            if lease is None:
                self._again(held, now)
            else:
                script, slot, key = held.renewal
                wanted[script, slot].append((held, key, lease))
        return [
            (_renewal(script, batch), [held for held, _, _ in batch])
            for (script, _), group in wanted.items()
            for batch in _in_batches(group)
        ]

    def _due(self, now: float) -> Iterable[Kept]:
        while self._times and self._times[0] <= now:
            with self._guard:
                when = heapq.heappop(self._times)
                refs = self._by_time.pop(when, [])
            for ref in refs:
                held = ref()
                if held is not None and held.kept_until == when:  # else there is a newer entry
                    held.kept_until = math.inf
                    yield held

    def _again(self, held: Kept, now: float, not_before: float = 0.0) -> None:
        if held.over(now):
            held.ended()
            return
        when = held.due()
        if when is not None:
            self.keep(held, max(when, not_before))

    def _settle(self, batch: list[Kept], since: float, outcome: Outcome[list[int]]) -> None:
        """Take note of what became of the renewal of these leases."""
        if outcome.error is not None:
            now = clock()
            for held in batch:
                held.missed(since)
                self._again(held, now, now + min(_AGAIN, held.ttl / 10))
            return
        for place in outcome.result():
            batch[place - 1].ended()
        now, next_times = clock(), defaultdict(list)
        for held in batch:
            when = held.renewed(since, now)
            if when is not None:
                next_times[when].append(held)
        for when, holds in next_times.items():
            self._keep(holds, when)


def _renewal(script: Script, batch: Sequence[tuple[Kept, bytes, str]]) -> Command[list[int]]:
    keys = tuple([key for _, key, _ in batch])
    args = tuple([word for held, _, lease in batch for word in (held.token, lease)])
    return Command(args, keys, script=script, repeatable=True)


def _in_batches(group: list[T]) -> Iterable[list[T]]:
    return (group[at : at + _BATCH] for at in range(0, len(group), _BATCH))
