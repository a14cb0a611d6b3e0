"""`RWLock`: many readers at once, or one writer.

    config = RWLock(client, "config", wait=5)
    with config.read:
        ...
    with config.write as held:
        held.fence

Both sides work as `Lock` does. Writers are preferred: once one waits, new readers stand in line
behind it; when it is done, other writers go first, then all readers that wait come in together.

Keys in Redis, all with a TTL:

    rh:l1:{config}:rw          zset    who holds it -> µs when its lease ends
    rh:l1:{config}:rw-line     zset    who waits, writers first, then by when they came
    rh:l1:{config}:rw-about    hash    about the holders; then, for two days, the last fence

Trade-offs: writers who come one after the other keep readers out. Who reads and then wants to write
has to give the reading back first, and to look again at what it read.
"""

from __future__ import annotations

from typing import Any, Unpack

from redishacks.locks._colours import AsyncCore, SyncCore
from redishacks.locks._core import Options
from redishacks.locks.commands import Names, Shared


class Side(SyncCore):
    """Reading or writing: acquired, released and used in `with` as a `Lock` is."""


class AsyncSide(AsyncCore):
    """`Side` for asyncio."""


class RWLock:
    """Many readers or one writer: `read` and `write` are used as a `Lock` is.

    All arguments are those of `Lock` but for `fair`, and go for both sides.
    """

    def __init__(
        self,
        client: Any,
        name: str,
        *,
        prefix: str = "rh",
        tag: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        names = Names(prefix, name, tag)
        self.name = names.name
        #: Many hold it at once.
        self.read = Side(client, names, Shared(names, "rw", most=0), **options)
        #: One holds it, and nobody reads meanwhile.
        self.write = Side(client, names, Shared(names, "rw", most=0, alone=True), **options)

    def __repr__(self) -> str:
        return f"<RWLock {self.name}>"


class AsyncRWLock:
    """`RWLock` for asyncio: takes `redis.asyncio` twins of its clients, or a URL."""

    def __init__(
        self,
        client: Any,
        name: str,
        *,
        prefix: str = "rh",
        tag: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        names = Names(prefix, name, tag)
        self.name = names.name
        #: Many hold it at once.
        self.read = AsyncSide(client, names, Shared(names, "rw", most=0), **options)
        #: One holds it, and nobody reads meanwhile.
        self.write = AsyncSide(client, names, Shared(names, "rw", most=0, alone=True), **options)

    def __repr__(self) -> str:
        return f"<AsyncRWLock {self.name}>"
