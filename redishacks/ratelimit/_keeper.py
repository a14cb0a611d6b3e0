"""What a concurrency limiter does in the background: renew leases, leave places, probe.

- leases of those who are inside a `with` are renewed every third of their time;
- a place is left whose release got through to nobody, and one of an acquisition that was given up:
  its command may have arrived, or arrive yet;
- a node that did not answer is asked whether it is there again.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any, Protocol

from redishacks._command import Command, Steps, ask_all
from redishacks._errands import Errands
from redishacks.errors import RedisHacksError, UnavailableError

#: Places that wait to be left; of more the oldest come back by the end of their leases only.
_MOST_LEAVING = 10_000

_log = logging.getLogger("redishacks")


class Held(Protocol):
    """A place whose lease is to be renewed."""

    token: str
    released: bool

    @property
    def lost(self) -> bool:
        """Whether it is too late."""

    def due(self, now: float) -> bool:
        """Return whether it is time."""

    def renewal(self) -> Command[list[int]]:
        """Return what to say."""

    def renewed(self, reply: list[int], since: float) -> bool:
        """Take note of the answer to what was said then; return whether the place is still held."""


class Keeper(Errands):
    """What is to be kept or left."""

    def __init__(self, name: str) -> None:
        self.what = f"leases of concurrency limiter {name}"
        self._name = name
        super().__init__()

    def reset(self) -> None:
        """Begin with nothing: at first, and in a forked child, which holds no place."""
        super().reset()
        self._held: dict[str, Held] = {}
        self._leaving: dict[str, Command[Any]] = {}

    def keep(self, slot: Held) -> None:
        """Renew its lease from now on."""
        self._held[slot.token] = slot

    def forget(self, slot: Held) -> None:
        """Renew its lease no more."""
        self._held.pop(slot.token, None)

    def leave(self, token: str, command: Command[Any]) -> None:
        """Say this until somebody has heard it."""
        if len(self._leaving) >= _MOST_LEAVING:
            self._leaving.pop(next(iter(self._leaving)), None)
        self._leaving[token] = command

    def waiting(self) -> int:
        """Return how many places wait to be left."""
        return len(self._leaving)

    def send(self) -> Steps[None]:
        """Do all that is to be done now, in one exchange; raises when a node is away."""
        self.error = None
        since = monotonic()
        for slot in list(self._held.values()):
            if slot.released:
                self.forget(slot)
            elif slot.lost:
                self._lost(slot)
        due = [slot for slot in list(self._held.values()) if slot.due(since)]
        leaving, probes = dict(self._leaving), self.breaker.probes()
        commands = [slot.renewal() for slot in due]
        commands += [*leaving.values(), *probes.values()]
        if not commands:
            return
        outcomes = yield from ask_all(commands)
        first, second = len(due), len(due) + len(leaving)
        for slot, outcome in zip(due, outcomes[:first], strict=True):
            if outcome.error is None and not slot.renewed(outcome.result(), since):
                self._lost(slot)
        for token, outcome in zip(leaving, outcomes[first:second], strict=True):
            if not isinstance(outcome.error, UnavailableError):  # else nobody has heard it
                self._leaving.pop(token, None)
        self.breaker.settle(list(probes), outcomes[second:])
        for outcome in outcomes:
            if isinstance(outcome.error, RedisHacksError):
                self.error = outcome.error
                raise outcome.error

    def _lost(self, slot: Held) -> None:
        if self._held.pop(slot.token, None) is not None:
            _log.warning("concurrency limiter %s: a lease ended before it was renewed", self._name)
