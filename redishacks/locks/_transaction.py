"""`held.transaction()`: commands that Redis carries out only while the lock is held.

Commands are noted down first. At the end of the `with` they go through a redis-py pipeline: `WATCH`
the lock, see that its token is ours, `MULTI`, the commands, `EXEC`. Whatever happens to the lock in
between, be it that it ends, makes `EXEC` do nothing. So does a renewal: the lock is ours still, and
the commands are tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import redis
import redis.asyncio
from redis.commands import CoreCommands
from redis.exceptions import ClusterCrossSlotError, MovedError, RedisError, WatchError
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import TimeoutError as Late

from redishacks.errors import (
    CrossNodeError,
    MaybeAppliedError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.locks._hold import Hold

#: What a pipeline has besides commands.
_NO_COMMANDS = frozenset({"reset", "unwatch", "watch"})


class _Noted:
    """Commands noted down, and what became of them."""

    def __init__(self, holds: Sequence[Hold], client: Any, *, own: bool) -> None:
        #: The replies, once the `with` has ended.
        self.results: list[Any] = []
        self._holds = holds
        self._keys = [hold.key for hold in holds]
        self._client = client
        #: The client is to be closed in the end.
        self._own = own
        self._scratch = client.pipeline()
        self._calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._entered = self._ended = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        command = getattr(self._scratch, name)
        if name in _NO_COMMANDS or not (name == "execute_command" or hasattr(CoreCommands, name)):
            raise UsageError(f"a transaction takes commands of redis-py's pipeline, not {name}")

        def note(*args: Any, **options: Any) -> Any:
            if not self._entered or self._ended:
                raise UsageError("a transaction takes commands inside of its `with`")
            before = len(self._scratch)
            command(*args, **options)  # so that wrong arguments are told here
            if len(self._scratch) == before:
                raise UsageError(f"a transaction takes single commands, and {name} is none")
            self._calls.append((name, args, options))
            return self

        return note

    def _begin(self) -> None:
        if self._entered:
            raise UsageError("a transaction is for one `with`: make another one")
        self._check()
        self._entered = True

    def _check(self) -> None:
        for hold in self._holds:
            hold.check()

    def _queue(self, pipe: Any, states: Sequence[str | bytes | None]) -> None:
        """Queue the commands, if all is still ours."""
        for hold, state in zip(self._holds, states, strict=True):
            held_by = state.encode() if isinstance(state, str) else state or b""
            if not held_by.startswith(hold.token.encode() + b" "):
                hold.ended()
        self._check()
        pipe.multi()
        for name, args, options in self._calls:
            getattr(pipe, name)(*args, **options)

    def _judge(self, error: RedisError, executing: bool) -> None:
        """Return when the commands are to be tried again; else raise."""
        what = f"a transaction of lock {self._holds[0].name}"
        if executing and isinstance(error, WatchError):
            # redis-py raises the same when the connection broke while it waited for EXEC.
            if not isinstance(error.__context__, Broken | Late):
                return
            raise MaybeAppliedError(
                f"{what}: its reply was lost; it took effect once or never"
            ) from error
        if isinstance(error, Broken | Late | WatchError):
            raise UnavailableError(f"{what}: Redis did not answer; nothing was done") from error
        if isinstance(error, MovedError | ClusterCrossSlotError):
            raise CrossNodeError(
                f"{what}: a key of a command is not in the lock's slot; nothing was done"
            ) from error
        raise ServerError(f"{what}: {error}") from error


class Transaction(_Noted):
    """Takes the commands of a redis-py pipeline, and carries them out at the end of the `with`."""

    def __enter__(self) -> Transaction:
        self._begin()
        return self

    def __exit__(self, kind: object, *raised: object) -> None:
        self._ended = True
        try:
            if kind is None and self._calls:
                self._execute()
        finally:
            if self._own:
                self._client.close()

    def _execute(self) -> None:
        while True:
            executing = False
            with self._client.pipeline(transaction=True) as pipe:
                try:
                    pipe.watch(*self._keys)
                    self._queue(pipe, pipe.mget(self._keys))
                    executing = True
                    self.results = pipe.execute()
                    return
                except RedisError as error:
                    self._judge(error, executing)


class AsyncTransaction(_Noted):
    """`Transaction` for asyncio; commands are noted down without `await`."""

    async def __aenter__(self) -> AsyncTransaction:
        self._begin()
        return self

    async def __aexit__(self, kind: object, *raised: object) -> None:
        self._ended = True
        try:
            if kind is None and self._calls:
                await self._execute()
        finally:
            if self._own:
                await self._client.aclose(close_connection_pool=True)

    async def _execute(self) -> None:
        while True:
            executing = False
            async with self._client.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(*self._keys)
                    self._queue(pipe, await pipe.mget(self._keys))
                    executing = True
                    self.results = await pipe.execute()
                    return
                except RedisError as error:
                    self._judge(error, executing)


def node_client(client: Any, key: bytes) -> tuple[Any, bool]:
    """Return a redis-py client for the server that has a key, and whether it is to be closed."""
    if isinstance(client, str):
        return redis.Redis.from_url(client), True
    if isinstance(client, redis.RedisCluster):
        cluster: Any = client
        return cluster.get_redis_connection(cluster.get_node_from_key(key)), False
    return client, False


def async_node_client(client: Any, key: bytes) -> tuple[Any, bool]:
    """Return a redis-py client of asyncio for the server that has a key."""
    if isinstance(client, str):
        return redis.asyncio.Redis.from_url(client), True
    if isinstance(client, redis.asyncio.RedisCluster):
        cluster: Any = client
        node = cluster.get_node_from_key(key)
        pool = redis.asyncio.ConnectionPool(
            connection_class=node.connection_class, **node.connection_kwargs
        )
        return redis.asyncio.Redis(connection_pool=pool), True
    return client, False
