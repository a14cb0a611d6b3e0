"""How a command reaches a server: one thin layer, sync and asyncio.

    transport = connect(redis.Redis())            # a URL, Sentinel's master or RedisCluster, too
    transport.call(command, deadline=1.0)         # its result, or its error raised
    transport.run([first, second], deadline=1.0)  # an Outcome for each, in order

What it promises, whatever happens to servers, connections and processes:

- Nothing is said twice unless that is harmless: a refusal that changed nothing, what was never
  sent, or a command that says of itself that it is repeatable. A write whose reply was lost raises
  `MaybeAppliedError`; `UnavailableError` means that nothing was applied.
- A call ends by its deadline. Making a connection has one of its own, 2 seconds; looking up a host
  name is outside of both.
- It uses connections of its own, made from the client's settings, none of the client's pool. A
  server that was restarted, an idle night, a new password or a moved slot go unnoticed.
- Threads, greenlets, event loops, signal handlers and forked children may all use one transport; no
  reply ever reaches another caller.

Replies are what the protocol of the client gives: RESP2 or RESP3, as bytes. On a cluster, the keys
of one command share a slot, and a command without keys goes to any primary.

The modules, from the ground up: `_wire` packs and parses; `_cluster` maps slots; `_decide` holds
every rule about what to do next; `_settings`, `_sentinel`, `_tls` and `_socket` say how to connect;
`_link`, `_async_link` and `_foreign` are connections; `_sync` and `_async` use them; `_listener`
hears what is published; `_observe` tells a hook; `_registry` holds one transport per client.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import redis
import redis.asyncio

from redishacks._command import Command
from redishacks._transport import _cluster, _settings
from redishacks._transport._async import AsyncTransport
from redishacks._transport._listener import AsyncListener, Listener
from redishacks._transport._observe import AsyncObserved, Hook, Observed
from redishacks._transport._registry import registry
from redishacks._transport._routes import Routes
from redishacks._transport._settings import Settings
from redishacks._transport._sync import SyncTransport
from redishacks._transport._wire import Form, pack
from redishacks.errors import UsageError

__all__ = [
    "AsyncListener",
    "AsyncObserved",
    "AsyncTransport",
    "Form",
    "Hook",
    "Listener",
    "Observed",
    "Settings",
    "SyncTransport",
    "connect",
    "connect_async",
    "packed",
]

T = TypeVar("T")


def connect(client: Any, on_command: Hook | None = None) -> SyncTransport | Observed:
    """Return the transport for a redis-py client or a `redis://`, `rediss://`, `unix://` URL.

    All tools on one client share it. `on_command(name, node, seconds, error)` is called after every
    command said through this very result. Raises `UsageError` for a client of `redis.asyncio` and
    for anything that is no client.
    """
    transport = registry.get(
        client, SyncTransport, lambda: SyncTransport(*_read(client, asynchronous=False))
    )
    return transport if on_command is None else Observed(transport, on_command)


def connect_async(client: Any, on_command: Hook | None = None) -> AsyncTransport | AsyncObserved:
    """Return the transport for a `redis.asyncio` client or a URL; it serves every event loop."""
    transport = registry.get(
        client, AsyncTransport, lambda: AsyncTransport(*_read(client, asynchronous=True))
    )
    return transport if on_command is None else AsyncObserved(transport, on_command)


def packed(command: Command[T]) -> Command[T]:
    """Return a command that is encoded now, once and for all: not to be changed any more."""
    return command._replace(packed=pack(command))


def _read(client: Any, *, asynchronous: bool) -> tuple[Settings, Routes | None]:
    if isinstance(client, str):
        return _settings.from_url(client), None
    if isinstance(client, redis.RedisCluster | redis.asyncio.RedisCluster):
        is_async = isinstance(client, redis.asyncio.RedisCluster)
        _check_colour(client, asynchronous, is_async)
        return _cluster.from_cluster(client)
    pool = getattr(client, "connection_pool", None)
    kind = getattr(pool, "connection_class", None)
    if kind is None:
        raise UsageError(f"a redis-py client or a URL is needed, not {type(client).__name__}")
    _check_colour(client, asynchronous, inspect.iscoroutinefunction(kind.connect))
    return _settings.from_pool(pool), None


def _check_colour(client: Any, wanted: bool, found: bool) -> None:
    if wanted == found:
        return
    shown = f"{type(client).__module__}.{type(client).__name__}"
    raise UsageError(
        f"{shown} is for asyncio: use the tool's Async class, or pass a redis.Redis"
        if found
        else f"{shown} is not for asyncio: use the tool's sync class, or pass a redis.asyncio.Redis"
    )
