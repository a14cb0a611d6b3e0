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
from typing import Any, Protocol, TypeVar, runtime_checkable

import redis
import redis.asyncio

from redishacks._command import Command
from redishacks._transport import _cluster, _settings
from redishacks._transport._async import AsyncTransport
from redishacks._transport._listener import AsyncListener, Listener
from redishacks._transport._loss import Overtaken, Refused
from redishacks._transport._observe import AsyncObserved, Hook, Observed
from redishacks._transport._own import AsyncConversation, Conversation
from redishacks._transport._registry import Either, registry
from redishacks._transport._routes import PULL, WAIT, Routes, Table, View
from redishacks._transport._settings import Settings
from redishacks._transport._sync import SyncTransport
from redishacks._transport._wire import Address, Form, Words, pack, pack_words
from redishacks.errors import UsageError

__all__ = [
    "PULL",
    "WAIT",
    "Address",
    "AsyncConversation",
    "AsyncListener",
    "AsyncObserved",
    "AsyncTransport",
    "Conversation",
    "Form",
    "Hook",
    "Listener",
    "Observed",
    "Overtaken",
    "Refused",
    "Routes",
    "Settings",
    "SyncTransport",
    "Table",
    "View",
    "Words",
    "connect",
    "connect_async",
    "connect_nodes",
    "connect_nodes_async",
    "pack_words",
    "packed",
    "read_settings",
]

T = TypeVar("T")


@runtime_checkable
class Router(Protocol):
    """A client of several nodes, which has a transport of its own."""

    @property
    def redishacks_transport(self) -> SyncTransport | AsyncTransport:
        """How commands reach the nodes."""


def connect(client: Any, on_command: Hook | None = None) -> SyncTransport | Observed:
    """Return the transport for a redis-py client or a `redis://`, `rediss://`, `unix://` URL.

    All tools on one client share it. `on_command(name, node, seconds, error)` is called after every
    command said through this very result. Raises `UsageError` for a client of `redis.asyncio` and
    for anything that is no client.
    """
    transport: SyncTransport
    if isinstance(client, Router):
        transport = _own(client, SyncTransport)
    else:
        transport = registry.get(
            client, SyncTransport, lambda: SyncTransport(*_read(client, asynchronous=False))
        )
    return transport if on_command is None else Observed(transport, on_command)


def connect_async(client: Any, on_command: Hook | None = None) -> AsyncTransport | AsyncObserved:
    """Return the transport for a `redis.asyncio` client or a URL; it serves every event loop."""
    transport: AsyncTransport
    if isinstance(client, Router):
        transport = _own(client, AsyncTransport)
    else:
        transport = registry.get(
            client, AsyncTransport, lambda: AsyncTransport(*_read(client, asynchronous=True))
        )
    return transport if on_command is None else AsyncObserved(transport, on_command)


def connect_nodes(routes: Routes) -> SyncTransport:
    """Return a transport for several nodes."""
    return registry.add(SyncTransport(_any(routes), routes))


def connect_nodes_async(routes: Routes) -> AsyncTransport:
    """The same for asyncio."""
    return registry.add(AsyncTransport(_any(routes), routes))


def _any(routes: Routes) -> Settings:
    return routes.settings(min(routes.nodes()), Settings())


def read_settings(client: Any, *, asynchronous: bool) -> Settings:
    """Return how to reach the one server of a client or URL; raises `UsageError` for others."""
    settings, routes = _read(client, asynchronous=asynchronous)
    if routes is not None:
        raise UsageError("a single server is needed, and this is a cluster")
    return settings


def packed(command: Command[T]) -> Command[T]:
    """Return a command that is encoded now, once and for all: not to be changed any more."""
    return command._replace(packed=pack(command))


def _own(router: Router, kind: type[Either]) -> Either:
    transport = router.redishacks_transport
    if not isinstance(transport, kind):
        _check_colour(router, kind is AsyncTransport, kind is not AsyncTransport)
    assert isinstance(transport, kind)
    return transport


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
