"""How a command of a batch ended: a value, an error, or perhaps applied. None stays pending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from redishacks._command import Outcome
from redishacks.errors import MaybeAppliedError, RedisHacksError, UsageError

#: In the place of a value that is not known yet.
PENDING = object()


class Results:
    """What became of the commands of one batch; each `Reply` is a place in it."""

    def __init__(self) -> None:
        self.settled = False
        self.values: list[Any] = []
        self.errors: dict[int, Exception] = {}
        self._where: Callable[[int], str] = lambda place: ""

    def begin(self, count: int) -> None:
        """Expect so many."""
        self.values = [PENDING] * count

    def end(self) -> None:
        """Let nothing be pending: what is had been interrupted."""
        if self.settled:
            return
        for place, value in enumerate(self.values):
            if value is PENDING and place not in self.errors:
                self.errors[place] = MaybeAppliedError(
                    "the batch was interrupted: it took effect once or never"
                )
        self.settled = True

    def abandon(self) -> None:
        """Say that none was sent."""
        for place in range(len(self.values)):
            self.errors[place] = UsageError("the batch was given up: nothing was sent")
        self.settled = True

    def locate(self, where: Callable[[int], str]) -> None:
        """Say how the node of each is found."""
        self._where = where

    def node(self, place: int) -> str:
        """Return the node of one."""
        return self._where(place)

    def settle(self, place: int, outcome: Outcome[Any]) -> None:
        """Take note of how one ended."""
        if outcome.error is not None:
            self.errors[place] = outcome.error
        else:
            self.values[place] = outcome.value


class Reply:
    """What a command of a batch will have come to, once the block is left."""

    __slots__ = ("_place", "_results")

    _results: Results
    _place: int

    @classmethod
    def of(cls, results: Results, place: int) -> Reply:
        """Return the reply at a place."""
        # A constructor in Python would take as long again as all else that is done for a GET.
        reply = cls()
        reply._results = results
        reply._place = place
        return reply

    @property
    def value(self) -> Any:
        """The value that redis-py would return; raises the error if there was one."""
        results = self._results
        if results.settled and not results.errors:
            return results.values[self._place]
        error = self.error
        if error is not None:
            raise error
        return results.values[self._place]

    @property
    def error(self) -> Exception | None:
        """Why there is no value: `ServerError`, `UnavailableError`, `MaybeAppliedError`, …"""
        results = self._results
        if not results.settled:
            raise UsageError("a batch is sent when its block is left: there is no reply before")
        return results.errors.get(self._place) if results.errors else None

    @property
    def maybe_applied(self) -> bool:
        """It was sent and its reply lost: it took effect once, or not at all."""
        return isinstance(self.error, MaybeAppliedError)

    @property
    def node(self) -> str:
        """The name of the node that has its keys; empty for a command without any."""
        return self._results.node(self._place)

    def __repr__(self) -> str:
        if not self._results.settled:
            return "<Reply, not sent yet>"
        shown = repr(self.error) if self.error is not None else repr(self.value)
        return f"<Reply {shown}>"


class BatchError(RedisHacksError):
    """Some commands of a batch failed; `replies` has all of them, in order."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        failed = [reply for reply in replies if reply.error is not None]
        first = failed[0].error
        assert first is not None
        super().__init__(
            f"{len(failed)} of {len(replies)} commands failed; the first: "
            f"{type(first).__name__}: {first}"
        )
        self.replies = list(replies)
