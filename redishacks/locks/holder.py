"""Who holds a lock, and the errors that tell of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from redishacks.errors import RedisHacksError


class Holder(NamedTuple):
    """Who holds a lock, as it described itself.

    `thread` is the name of its thread or task, `label` the lock's. It holds it `since` that moment
    (seconds since 1970, by the server's clock), and its lease ends in `remaining` seconds.
    """

    host: str
    pid: int
    thread: str
    label: str
    since: float
    remaining: float
    fence: int

    def __str__(self) -> str:
        if not self.host:
            return "the next in line, just now"
        who = f"{self.label}, " if self.label else ""
        return f"{who}process {self.pid} on {self.host}, {self.thread}"


class LockedError(RedisHacksError):
    """Somebody else holds the lock, and did all the time that was waited.

    `name` is the lock's, `holder` who has it (None when it was just handed over, and for several
    holders), `remaining` the seconds until its lease ends at the latest.
    """

    def __init__(self, message: str, name: str, holder: Holder | None, remaining: float) -> None:
        super().__init__(message)
        self.name = name
        self.holder = holder
        self.remaining = remaining

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.name, self.holder, self.remaining)


class SelfDeadlockError(LockedError):
    """This very thread or task holds the lock and asked for it again; nobody was asked."""


class LockLostError(RedisHacksError):
    """The lock was lost before its release: somebody else may have it, or have had it.

    `name` is the lock's. What was done meanwhile may have been done by two at once.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.name)


def parse_info(info: str, fence: int, remaining: float) -> Holder | None:
    """Read what a holder wrote about itself; None when it has not come to that."""
    parts = info.split("\t", 3)
    if len(parts) != 4 or not parts[1].isdigit():
        return None
    host, pid, label, thread = parts
    # A fence is the server's time in µs, unless its clock was set back.
    return Holder(host, int(pid), thread, label, fence / 1e6, remaining, fence)
