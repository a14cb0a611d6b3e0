"""What a rate limiter does off the path of requests, once a second: tell, give back, probe, count.

- the limits are announced, for the command line;
- refusals are told to Redis, for `top`; those from memory also where a ban counts them;
- tokens of leases that ran out, or that nobody has spent for a while, are given back;
- a node that did not answer is asked whether it is there again;
- with `on_error="local"`, a heartbeat tells the other processes of this one, and counts them.

What cannot be told is dropped: these are notes, and no decision hangs on them.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from redishacks._command import Command, Steps, ask_all
from redishacks._errands import Errands
from redishacks.errors import RedisHacksError
from redishacks.ratelimit._fallback import LocalLimits
from redishacks.ratelimit._recall import Memory
from redishacks.ratelimit.commands import Layout, Question
from redishacks.ratelimit.limit import Limit

#: Seconds between two heartbeats; without one for three of these a process is no longer counted.
HEARTBEAT = 5.0
#: Seconds between two announcements of the limits, which last for 25 hours.
_ANNOUNCE = 3600.0
#: Limits that are announced; plans that are made up per user might be without number.
_MOST_ANNOUNCED = 100
#: Refusals by Redis that wait to be told; of more the oldest are forgotten.
_MOST_REFUSED = 10_000


class Chores(Errands):
    """What waits to be done, and what this process knows by itself."""

    what = "notes of a rate limiter"

    def __init__(
        self, layout: Layout, memory: Memory, limits: Sequence[Limit], *, heartbeat: bool
    ) -> None:
        self._layout = layout
        self._limits = dict.fromkeys(limits)
        self._memory = memory
        self._heartbeat = heartbeat
        super().__init__()

    def reset(self) -> None:
        """Begin with nothing, as another process: at first, and in a forked child."""
        super().reset()
        self._memory.reset()
        self._process = secrets.token_hex(8)
        self._next_beat = self._next_announcement = 0.0
        #: How many processes hit lately, as far as Redis has told; 0: it never has.
        self.processes = 0
        #: Questions that Redis refused.
        self.refused: deque[Question] = deque(maxlen=_MOST_REFUSED)
        #: Questions whose callers gave up waiting: bans have not heard of them.
        self.given_up: deque[Question] = deque(maxlen=_MOST_REFUSED)
        #: Stands in for Redis; its lock may be held by a thread that a fork does not copy.
        self.local = LocalLimits()

    def announce(self, limits: Sequence[Limit]) -> None:
        """See that these limits are known to the command line, too."""
        for limit in limits:
            if limit not in self._limits and len(self._limits) < _MOST_ANNOUNCED:
                self._limits[limit] = None
                self._next_announcement = 0.0

    def waiting(self) -> int:
        """Return how much waits to be told or given back."""
        return len(self.refused) + self._memory.waiting(everything=self.closing)

    def send(self) -> Steps[None]:
        """Do all that is to be done now, in one exchange; raises when a node is away."""
        self.error = None
        commands: list[Command[Any]] = [
            *self._announced(),
            *self._beat(),
            *self._told(),
            *self._given_back(),
        ]
        probes = self.breaker.probes()
        commands += probes.values()
        if not commands:
            return
        outcomes = yield from ask_all(commands)
        self.breaker.settle(list(probes), outcomes[len(outcomes) - len(probes) :])
        for outcome in outcomes:
            if isinstance(outcome.error, RedisHacksError):
                self.error = outcome.error
                raise outcome.error

    def _announced(self) -> list[Command[Any]]:
        if time.monotonic() < self._next_announcement:
            return []
        limits = list(self._limits)

        def parse(_: Any) -> None:
            if len(limits) == len(self._limits):
                self._next_announcement = time.monotonic() + _ANNOUNCE

        return [self._layout.announce(limits, int(time.time()), parse)]

    def _beat(self) -> list[Command[Any]]:
        now = time.monotonic()
        if not self._heartbeat or now < self._next_beat:
            return []
        self._next_beat = now + HEARTBEAT

        def parse(processes: int) -> None:
            self.processes = processes

        return [self._layout.alive(self._process, 3 * HEARTBEAT, parse)]

    def _told(self) -> list[Command[Any]]:
        refused: Counter[bytes] = Counter()
        commands: list[Command[Any]] = []
        for _ in range(len(self.refused)):
            refused[self.refused.popleft().label] += 1
        for _ in range(len(self.given_up)):
            commands += self._layout.note(self.given_up.popleft(), 1)
        for question, times in self._memory.news():
            refused[question.label] += times
            commands += self._layout.note(question, times)
        if refused:
            commands.append(self._layout.tell(int(time.time() // 3600), refused))
        return commands

    def _given_back(self) -> list[Command[Any]]:
        return [
            self._layout.refund(lease.question, *lease.give_back(tokens))
            for lease, tokens in self._memory.sweep(everything=self.closing)
        ]
