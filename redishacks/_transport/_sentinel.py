"""Asking Sentinel where the primary is, with redis-py's own Sentinel and a deadline.

`Sentinel.discover_master` knows the rules (quorum of opinions, forced addresses). It is asked on a
copy whose clients do not repeat and do not wait long: with redis-py's defaults one hung sentinel
costs a minute.

These connections are redis-py's: a child that a signal handler forks in the middle of the question,
and that goes on, shares them with its parent. Either may miss the answer, and finds no primary.
"""

from __future__ import annotations

import copy
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from redishacks._transport._loss import Unreachable
from redishacks._transport._settings import Settings
from redishacks._transport._wire import Address


def master(settings: Settings, seconds: float) -> Address:
    """Return the primary's address; raises `Unreachable` within the given seconds."""
    manager = copy.copy(settings.sentinel)
    manager.sentinels = [
        redis.Redis(connection_pool=_impatient(one, redis.ConnectionPool, Retry, share))
        for one, share in _shares(manager, seconds)
    ]
    try:
        host, port = manager.discover_master(settings.service)
    except redis.RedisError:
        raise _unknown(settings) from None
    finally:
        for one in manager.sentinels:
            one.connection_pool.disconnect()
    return host, int(port)


async def master_async(settings: Settings, seconds: float) -> Address:
    """The same for asyncio."""
    manager = copy.copy(settings.sentinel)
    manager.sentinels = [
        redis.asyncio.Redis(
            connection_pool=_impatient(one, redis.asyncio.ConnectionPool, AsyncRetry, share)
        )
        for one, share in _shares(manager, seconds)
    ]
    try:
        host, port = await manager.discover_master(settings.service)
    except redis.RedisError:
        raise _unknown(settings) from None
    finally:
        for one in manager.sentinels:
            await one.connection_pool.disconnect()
    return host, int(port)


def _shares(manager: Any, seconds: float) -> list[tuple[Any, float]]:
    return [(one, seconds / len(manager.sentinels)) for one in manager.sentinels]


def _impatient(client: Any, kind: Any, retry: Any, seconds: float) -> Any:
    pool = client.connection_pool
    options = {
        **pool.connection_kwargs,
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "retry": retry(NoBackoff(), 0),
        "retry_on_timeout": False,
        "retry_on_error": [],
    }
    return kind(connection_class=pool.connection_class, **options)


def _unknown(settings: Settings) -> Unreachable:
    return Unreachable(f"no sentinel names a primary for {settings.service!r}")
