"""What a tool does in the background, off the path of requests; to a sender of `_linger` a buffer.

The sender drives it as it does a counter's buffer: every so often, from a thread or a task that the
first request starts, at close and at exit, and anew in a forked child.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from redishacks._breaker import Breaker
from redishacks._command import Steps
from redishacks.errors import RedisHacksError, UnavailableError


class Errands(ABC):
    """Things to do now and then. None of them ever waits for room."""

    #: How a log calls them.
    what: str

    def __init__(self) -> None:
        self.room = 0
        self.forked = False
        self.reset()

    def reset(self) -> None:
        """Begin with nothing, as another process: at first, and in a forked child."""
        self.breaker = Breaker()
        #: Nothing may be kept for later.
        self.closing = False
        #: Why the last try has failed.
        self.error: RedisHacksError | None = None

    def after_fork(self) -> Self:
        """Begin anew in a forked child."""
        self.reset()
        return self

    def pause(self, linger: float) -> float | None:
        """Return seconds until the next send; None when none will be due until a new start."""
        return linger

    def last(self) -> None:
        """Hear that nothing may be kept for later."""
        self.closing = True

    def make_room(self) -> bool:
        """Return whether there is room for more: always."""
        return True

    def full(self) -> UnavailableError:
        """Return the error for what finds no room."""
        return UnavailableError(f"there is no room for more {self.what}")

    def held(self) -> int:
        """Return how much waits to be said; nothing when the last try has failed."""
        return 0 if self.error is not None else self.waiting()

    @abstractmethod
    def waiting(self) -> int:
        """Return how much waits to be said."""

    @abstractmethod
    def send(self) -> Steps[None]:
        """Do all that is to be done now, in one exchange; raises when a node is away."""
