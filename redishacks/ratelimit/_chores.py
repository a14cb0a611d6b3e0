"""What a limiter does off the path of requests, once a second: tell, give back, probe, count.

- the limits are announced, for the command line;
- refusals are told to Redis, for `top`; those from memory also where a ban counts them;
- tokens of leases that ran out unspent are given back;
- a node that did not answer is asked whether it is there again;
- with `on_error="local"`, a heartbeat tells the other processes of this one, and counts them.

A sender of `_linger` drives it, as it does a counter's buffer: from a thread or a task that the
first hit starts, at close and at exit, and anew in a forked child. What cannot be told is dropped:
these are notes, and no decision hangs on them.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Self

from redishacks._command import Command, Steps, ask_all
from redishacks.errors import RedisHacksError, UnavailableError
from redishacks.ratelimit._breaker import Breaker
from redishacks.ratelimit._recall import Memory
from redishacks.ratelimit.commands import Layout, Question
from redishacks.ratelimit.limit import Limit

#: Seconds between two heartbeats; without one for three of these a process is no longer counted.
HEARTBEAT = 5.0
#: Seconds between two announcements of the limits, which last for 25 hours.
_ANNOUNCE = 3600.0
#: Refusals by Redis that wait to be told; of more the oldest are forgotten.
_MOST_REFUSED = 10_000


class Chores:
    """What waits to be done; to a sender of `_linger` it is a buffer."""

    what = "notes of a rate limiter"

    def __init__(
        self, layout: Layout, memory: Memory, limits: Sequence[Limit], *, heartbeat: bool
    ) -> None:
        self._layout = layout
        self._limits = limits
        self._memory = memory
        self._heartbeat = heartbeat
        self.reset()

    def reset(self) -> None:
        """Begin with nothing, as another process: at first, and in a forked child."""
        self._memory.entries.clear()
        self._process = secrets.token_hex(8)
        self._next_beat = self._next_announcement = 0.0
        #: How many processes hit lately, as far as Redis has told; 0: it never has.
        self.processes = 0
        #: Questions that Redis refused.
        self.refused: deque[Question] = deque(maxlen=_MOST_REFUSED)
        self.breaker = Breaker()
        self.error: RedisHacksError | None = None
        self.forked = False
        self.room = 0
        #: Leases that are still good are given back, too.
        self.closing = False

    def after_fork(self) -> Self:
        """Begin anew in a forked child."""
        self.reset()
        return self

    def make_room(self) -> bool:
        """Return whether there is room for another note: always."""
        return True

    def held(self) -> int:
        """Return how much waits to be told or given back; 0 when the last try has failed."""
        if self.error is not None:
            return 0
        return len(self.refused) + self._memory.waiting()

    def full(self) -> UnavailableError:
        """Return the error for a note that finds no room."""
        return UnavailableError("there is no room for another note")

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
        now = time.monotonic()
        if now < self._next_announcement:
            return []
        self._next_announcement = now + _ANNOUNCE
        return [self._layout.announce(self._limits)]

    def _beat(self) -> list[Command[Any]]:
        now = time.monotonic()
        if not self._heartbeat or now < self._next_beat:
            return []
        self._next_beat = now + HEARTBEAT

        def parse(processes: int) -> None:
            self.processes = processes

        return [self._layout.alive(self._process, 3 * HEARTBEAT, parse)]

    def _told(self) -> list[Command[Any]]:
        refused: Counter[str] = Counter()
        commands: list[Command[Any]] = []
        for _ in range(len(self.refused)):
            refused[self.refused.popleft().label] += 1
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
