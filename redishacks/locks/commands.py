"""What locks say to Redis: keys and commands, as values."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from redishacks import _keys
from redishacks._command import Command, Script, script
from redishacks._transport import Form
from redishacks._wake import Channels
from redishacks.errors import UsageError
from redishacks.locks.holder import Holder, parse_info

#: The tool's letter and the version of its keys.
TOOL = "l1"
#: A ticket of who does not want a lock unless it has it.
MINE = "!"
#: How the keys end that say who holds a lock, of each kind.
FIRST_KEYS = ("lock", "permits", "rw")
#: Who wants a lock alone stands before those who would share it, by so many µs.
_ALONE_FIRST = 2**52

_FIRST_KEY = re.compile(rf"\{{([^{{}}]+)\}}:(?:(.+):)?({'|'.join(FIRST_KEYS)})\Z")
_QUOTED = re.compile("%([0-9A-F]{2})")


class Names:
    """How the keys of a lock begin."""

    def __init__(self, prefix: str, name: str, tag: str | None) -> None:
        self.prefix = _keys.check_name(prefix, "prefix")
        quoted = _keys.check_name(name, "name of a lock")
        self.name = name
        #: With a tag of its own the name stands behind it.
        self._rest = () if tag is None else (quoted,)
        self._tag = quoted if tag is None else _keys.check_name(tag, "tag")

    def key(self, rest: str) -> bytes:
        """Return a key of the lock."""
        return _keys.make(self.prefix, TOOL, self._tag, *self._rest, rest)

    def channels(self, process: str) -> Channels:
        """Return where waiters of a process are told about the lock."""
        everywhere = f"{self.prefix}:{TOOL}:wake:{process}"
        return Channels(everywhere.encode(), self.key(f"wake:{process}"))


class Kind(Protocol):
    """One lock of any kind, as commands."""

    #: Decides the node, and tells locks of one process apart.
    key: bytes
    #: Begins leases anew: `key ... token ttl ...`.
    extend: Script
    #: What its tokens begin with.
    mark: str

    def acquire(
        self, token: str, ttl: str, not_after: str, info: str, ticket: str = "", ear: str = ""
    ) -> Command[list[Any]]:
        """Take it, or stand in line; with the same token this may be said again.

        `ttl` is µs; nothing is done later than `not_after`, µs since 1970 by the server's clock;
        `info` is about who asks. The ticket is "" for who does not wait, "0" at first, then the one
        that was got; `MINE` for what is held already. `ear` is how who waits is told, as
        `Wakeups.ear` gives it.

        Replies [1, now, fence] when it is taken; else [0, now, µs until a lease ends, place in
        line, ticket, fence, info], or [-1, now] when it was too late, [-2, now] when the token was
        released before.
        """

    def release(self, token: str, fence: int, ear: str) -> Command[int]:
        """Give it back, or leave the line.

        Replies 1 when it was held, 2 when it had been released before, 0 when it was lost; 3 when
        a later one has been lost since, so that nobody knows.
        """

    def show(self) -> Command[list[Any]]:
        """Say who holds it: [now, waiters, then µs left, fence and info of each holder]."""

    def taken(self) -> str:
        """Say in words that somebody, who is not known, has it."""


class Exclusive:
    """A lock that one holds at a time."""

    mark = ""

    def __init__(self, names: Names, *, fair: bool) -> None:
        self.key = names.key("lock")
        self._keys = (self.key, names.key("line"))
        if not isinstance(fair, bool):
            raise UsageError(f"fair is True or False, not {fair!r}")
        self._mode = "f" if fair else "u"
        self._barge = "0" if fair else "1"
        self._acquire = Form(script("lock_acquire"), self._keys, self._barge)
        self._release = Form(script("lock_release"), self._keys)
        self.extend = script("lock_extend")

    def acquire(
        self, token: str, ttl: str, not_after: str, info: str, ticket: str = "", ear: str = ""
    ) -> Command[list[Any]]:
        """Take it, or stand in line."""
        entry = f"{token} {self._mode}{ear}" if ear else ""
        return self._acquire.fill(token, ttl, not_after, ticket, entry, info)

    def acquire_all(
        self,
        others: Sequence[Exclusive],
        tokens: Sequence[str],
        ttl: str,
        not_after: str,
        info: str,
    ) -> Command[list[Any]]:
        """Take this lock and others, all or none.

        Replies [1, now, fence, ...], or when lock i, from 1, is not free [0, now, i, µs until a
        lease ends, fence, info]; [-1, now] and [-2, now] as `acquire`.
        """
        keys = tuple(key for lock in (self, *others) for key in lock._keys)
        args = (ttl, not_after, info, self._barge, *tokens)
        return Command(args, keys, script=script("lock_acquire_all"))

    def release(self, token: str, fence: int, ear: str) -> Command[int]:
        """Give it back, or leave the line; an empty token is whoever holds it."""
        entry = f"{token} {self._mode}{ear}" if ear else ""
        return self._release.fill(token, str(fence), entry)

    def show(self) -> Command[list[Any]]:
        """Say who holds it."""
        return Command((), self._keys, script=script("lock_show"), repeatable=True)

    def taken(self) -> str:
        """Say in words that somebody, who is not known, has it."""
        return "was just handed over to somebody"


class Shared:
    """A lock that several hold at a time: `most` of them, 0 for any number; or one alone."""

    def __init__(self, names: Names, rest: str, *, most: int, alone: bool = False) -> None:
        self.key = names.key(rest)
        self.mark = "w" if alone else "r"
        self._keys = (self.key, names.key(f"{rest}-line"), names.key(f"{rest}-about"))
        self._most = str(most)
        self._acquire = Form(script("share_acquire"), self._keys, self._most)
        self._release = Form(script("share_release"), self._keys, self._most)
        self.extend = script("share_extend")

    def acquire(
        self, token: str, ttl: str, not_after: str, info: str, ticket: str = "", ear: str = ""
    ) -> Command[list[Any]]:
        """Take it, or stand in line."""
        entry = f"{token} f{ear}" if ear else ""
        return self._acquire.fill(token, ttl, not_after, ticket, entry, info)

    def release(self, token: str, fence: int, ear: str) -> Command[int]:
        """Give it back, or leave the line; an empty token is everybody who holds it."""
        entry = f"{token} f{ear}" if ear else ""
        return self._release.fill(token, str(fence), entry)

    def show(self) -> Command[list[Any]]:
        """Say who holds it."""
        return Command((), self._keys, script=script("share_show"), repeatable=True)

    def taken(self) -> str:
        """Say in words that somebody, who is not known, has it."""
        return "is held by several" if self._most == "0" else f"has all its {self._most} in use"


def answer(reply: Any) -> tuple[Any, ...]:
    """Read the reply to `Kind.acquire`; mostly the fence is the server's time, and all it says."""
    return (1, reply, reply) if type(reply) is int else tuple(reply)


def holders(reply: list[Any]) -> list[Holder]:
    """Read who holds a lock from the reply to `Kind.show`."""
    found = []
    for left, fence, info in zip(reply[2::3], reply[3::3], reply[4::3], strict=True):
        holder = parse_info(info.decode("utf-8", "replace"), fence, left / 1e6)
        found.append(holder or Holder("", 0, "", "", fence / 1e6, left / 1e6, fence))
    return found


@functools.lru_cache(1024)
def micros(length: float) -> str:
    """Return seconds of a lease as µs in words, a millisecond at least."""
    return str(max(1000, round(length * 1e6)))


class Waiter(NamedTuple):
    """Who stands in line."""

    #: Seconds since 1970 when it began to wait, by the server's clock.
    since: float
    #: It shares the lock with nobody, though others might.
    alone: bool


def waiting(kind: Exclusive | Shared, most: int) -> Command[list[Waiter]]:
    """Read who stands in line, the first `most`; one that died stands there until its turn."""

    def parse(reply: list[Any]) -> list[Waiter]:
        pairs = reply  # as RESP3 has them
        if reply and not isinstance(reply[0], list):
            pairs = list(zip(reply[::2], reply[1::2], strict=True))
        found = []
        for entry, score in pairs:
            ticket = int(float(score))
            since = ticket + _ALONE_FIRST if ticket < 0 else ticket
            found.append(Waiter(since / 1e6, single or entry.startswith(b"w")))
        return found

    single, line = isinstance(kind, Exclusive), kind._keys[1]
    args = ("ZRANGE", line, "0", str(most - 1), "WITHSCORES")
    return Command(args, (line,), parse, repeatable=True)


def parse_key(prefix: str, key: bytes) -> tuple[str, str, str | None] | None:
    """Return which of `FIRST_KEYS` a key is, and its lock's name and tag; None when it is none."""
    found = _FIRST_KEY.search(key.decode(errors="replace"))
    if found is None:
        return None
    first, second, rest = found.groups()
    name = _unquoted(second or first)
    tag = None if second is None else _unquoted(first)
    try:
        same = Names(prefix, name, tag).key(rest) == key
    except UsageError:
        return None
    return (rest, name, tag) if same else None


def _unquoted(text: str) -> str:
    return _QUOTED.sub(lambda found: chr(int(found[1], 16)), text)
