"""`Semaphore`: so many at once, over all processes.

    workers = Semaphore(client, "workers", 5, wait=10)
    with workers as permit:                        # LockedError when all five are taken for 10 s
        permit.remaining, permit.fence

Works as `Lock` does, line, leases, renewal and all: whoever came first gets the permit that is
given back. Permits of a process that died come back when their leases end.

Keys in Redis, all with a TTL:

    rh:l1:{workers}:permits          zset    who holds a permit -> µs when its lease ends
    rh:l1:{workers}:permits-line     zset    who waits, by when they came
    rh:l1:{workers}:permits-about    hash    about the holders; then, for two days, the last fence

Trade-offs: `amount` is what each process says it is, so let all say the same. One thread may take
several permits, so nothing tells it when it waits for its own. What is told about holders, not the
permits, is forgotten when one is renewed for two days and nobody else comes or goes.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, Unpack

from redishacks._transport import AsyncTransport, SyncTransport
from redishacks._units import EXACT
from redishacks.errors import UsageError
from redishacks.locks._colours import AsyncCore, SyncCore
from redishacks.locks._core import Core, Options
from redishacks.locks.commands import Names, Shared

T = TypeVar("T", bound=SyncTransport | AsyncTransport)


class _Semaphore(Core[T], Generic[T]):
    _alone = False

    def __init__(
        self,
        client: Any,
        name: str,
        amount: int,
        *,
        prefix: str = "rh",
        tag: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount < EXACT:
            raise UsageError(f"a semaphore has 1 permit or more, not {amount!r}")
        if options.pop("reentrant", False):
            raise UsageError("a semaphore is not reentrant: each acquisition takes a permit")
        #: How many at once.
        self.amount = amount
        names = Names(prefix, name, tag)
        super().__init__(client, names, Shared(names, "permits", most=amount), **options)


class Semaphore(_Semaphore[SyncTransport], SyncCore):
    """At most `amount` at once; other arguments are those of `Lock`, but for `fair` and
    `reentrant`.
    """


class AsyncSemaphore(_Semaphore[AsyncTransport], AsyncCore):
    """`Semaphore` for asyncio: takes `redis.asyncio` twins of its clients, or a URL."""
