"""`Lock`: one at a time, over all processes.

    with Lock(client, "crazy"):                              # LockedError when somebody has it
        ...
    with Lock(client, "crazy", wait=5, ttl=10) as held:      # stands in line for up to 5 s
        held.remaining, held.fence
        held.check()                                         # LockLostError when it was lost
        held.extend(30)

    @Lock(client, "nightly", renew=True, max_hold=3600)
    def nightly(): ...

Whoever gets the lock has it for `ttl` seconds, by the server's clock, or until the release: a
process that died locks nobody out for longer. Each acquisition is a handle of its own, so one
`Lock` serves many threads, tasks and processes. Acquiring and releasing are one round trip each;
one who waits sends one command more, and is woken when the lock is handed over, in the order of
arrival.

Keys in Redis, both with a TTL:

    rh:l1:{crazy}:lock     string    who has it and until when; then, for a day, the last fence
    rh:l1:{crazy}:line     zset      who waits, by when they came

Trade-offs: a single Redis keeps two from holding the lock at once while it remembers and while
clocks run alike; a failover can forget, and a process may be stopped for longer than its lease. So
what must never be written by two asks for proof: `held.transaction()` for what is in Redis, and
`held.fence` for what is in SQL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from redishacks._transport import AsyncTransport, Hook, SyncTransport
from redishacks._units import Seconds
from redishacks.locks._colours import AsyncCore, SyncCore
from redishacks.locks._core import Core, OnEvent
from redishacks.locks.commands import Exclusive, Names

T = TypeVar("T", bound=SyncTransport | AsyncTransport)


class _Lock(Core[T], Generic[T]):
    def __init__(
        self,
        client: Any,
        name: str,
        *,
        wait: Seconds | None = 0.0,
        ttl: Seconds = 10.0,
        renew: bool = False,
        max_hold: Seconds | None = None,
        fair: bool = True,
        reentrant: bool = False,
        replicas: int = 0,
        on_lost: Callable[[Any], object] | None = None,
        on_event: OnEvent | None = None,
        label: str = "",
        prefix: str = "rh",
        tag: str | None = None,
        deadline: Seconds = 1.0,
        on_command: Hook | None = None,
    ) -> None:
        names = Names(prefix, name, tag)
        super().__init__(
            client, names, Exclusive(names, fair=fair),
            wait=wait, ttl=ttl, renew=renew, max_hold=max_hold, reentrant=reentrant,
            replicas=replicas, on_lost=on_lost, on_event=on_event, label=label,
            deadline=deadline, on_command=on_command,
        )  # fmt: skip


class Lock(_Lock[SyncTransport], SyncCore):
    """One at a time, over all processes.

    `client` is a `redis.Redis`, a Sentinel master, a `redis.RedisCluster` or a URL; `name`, of 256
    bytes at most, tells this lock from others'.

    - `wait`: seconds to stand in line; 0 raises `LockedError` at once, None waits without end.
    - `ttl`: seconds of the lease, from 1 ms to 366 days.
    - `renew`: begin the lease anew in the background whenever half of it is over, until the release
      or for `max_hold` seconds (an hour unless said otherwise), while the handle is not garbage.
    - `fair=False`: a free lock goes to whoever asks first, not to the first in line: more
      throughput, but some may wait for long.
    - `reentrant`: let a thread (or task) that holds it acquire it again; its last release counts.
    - `replicas`: how many replicas must have heard of the lock before it counts as acquired; else
      `UnavailableError`. One round trip more.
    - `on_lost(held)` is called in the background when a lock was lost, or its `max_hold` is over;
      renewals wait for it to end.
    - `on_event(event, name, seconds)`: "waited" for how long, "held" for how long, "lost" after how
      long ("held" follows when it is released), "contended" when somebody else had it (0 s).
    - `label` is shown to whoever finds the lock held.
    - `tag` replaces the name as the hash tag of the keys, `prefix` begins them.
    - `deadline` bounds every exchange with Redis, in seconds. `on_command(name, node, seconds,
      error)` is called after every command.
    """


class AsyncLock(_Lock[AsyncTransport], AsyncCore):
    """`Lock` for asyncio: takes `redis.asyncio` twins of its clients, or a URL."""
