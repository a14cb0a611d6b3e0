"""What the router's tests share: one body for both back ends, and for both colours.

A `Place` is the servers: independent nodes, or a cluster. A `Backend` makes routers of one colour
over them, which are `Face`s in either colour: methods that return, `map` as a plain `with`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import redis
import redis.asyncio

from redishacks._slots import key_slot
from redishacks.router import AsyncRouter, Router
from redishacks.testing import Cluster, Server, valkey_server
from tests.helpers import Colour, Facade

#: Seconds that a call may take where nothing is wrong, on a machine that is busy.
PATIENT = 20.0
#: Seconds beyond a deadline: ten times of what is promised.
LENIENCE = 3.0


class Face:
    """An `AsyncRouter`, or a client of redis-py's, that looks as if it were not for asyncio."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self.target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, "aclose" if name == "close" else name)
        if not callable(value):
            return value

        def call(*args: Any, **options: Any) -> Any:
            made = value(*args, **options)
            if inspect.isasyncgen(made):
                return iter(self._runner.run(_all_of(made)))
            return self._runner.run(_awaited(made)) if inspect.isawaitable(made) else made

        return call

    @contextmanager
    def map(self, **options: Any) -> Iterator[Any]:
        """Record commands, and say them in the loop."""
        made = self.target.map(**options)
        batch = self._runner.run(made.__aenter__())
        try:
            yield batch
        except BaseException as error:
            # False: it was not swallowed.
            self._runner.run(made.__aexit__(type(error), error, None))
            raise
        self._runner.run(made.__aexit__(None, None, None))


class Routers(Colour):
    """Makes routers of one colour, and whatever tools are to use them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._routers: list[Any] = []
        self._clients: list[Any] = []

    @property
    def module(self) -> Any:
        """redis-py, of this colour."""
        return redis.asyncio if self._runner else redis

    @property
    def runner(self) -> asyncio.Runner | None:
        """What runs a loop; None where there is none."""
        return self._runner

    def router(self, nodes: Any, **options: Any) -> Any:
        """Return a router of nodes."""
        kind: Any = AsyncRouter if self._runner else Router
        return self._kept(kind(nodes, **{"deadline": PATIENT} | options))

    def over(self, client: Any, **options: Any) -> Any:
        """Return a router over a cluster's client of this colour."""
        kind: Any = AsyncRouter if self._runner else Router
        router = kind.over(client, **{"deadline": PATIENT} | options)
        self._clients.append(client)
        return self._kept(router)

    def tool(self, module: Any, kind: str, *args: Any, **options: Any) -> Any:
        """Return a tool of this colour, by what it is called when it is not for asyncio."""
        if self._runner:
            return Facade(getattr(module, f"Async{kind}")(*args, **options), self._runner)
        return getattr(module, kind)(*args, **options)

    def listed(self, made: Any) -> list[Any]:
        """Return all that is iterated over."""
        return self._runner.run(_all_of(made)) if self._runner else list(made)

    def run(self, made: Any) -> Any:
        """Return what is awaited, or what is there already."""
        if self._runner and inspect.isawaitable(made):
            return self._runner.run(_awaited(made))
        return made

    def close(self) -> None:
        """Close all routers, and end the loop."""
        for router in self._routers:
            router.close()
        for client in self._clients:
            self.run(client.aclose()) if self._runner else client.close()
        self._routers.clear()
        super().close()

    def _kept(self, router: Any) -> Any:
        made = Face(router, self._runner) if self._runner else router
        self._routers.append(made)
        return made


class Place:
    """Independent nodes by name, or a cluster."""

    def __init__(self, servers: Mapping[str, Server], cluster: Cluster | None = None) -> None:
        self.servers = dict(servers)
        self.cluster = cluster

    def client(self, module: Any, **options: Any) -> Any:
        """Return a cluster's client of redis-py's."""
        first = next(iter(self.servers.values()))
        return module.RedisCluster(host=first.host, port=first.port, **options)

    def nodes(self, module: Any = None, **options: Any) -> dict[str, Any]:
        """Return names and URLs, or clients with options of redis-py's."""
        if not options:
            return {name: server.url for name, server in self.servers.items()}
        return {
            name: module.Redis(host=server.host, port=server.port, **options)
            for name, server in self.servers.items()
        }


class Backend:
    """Makes routers of one colour over one place."""

    def __init__(self, place: Place, colour: Routers) -> None:
        self.place = place
        self.colour = colour

    def router(self, *, deadline: float = PATIENT, **options: Any) -> Any:
        """Return a fresh router; options are those of redis-py's clients."""
        if self.place.cluster is None:
            nodes = self.place.nodes(self.colour.module, **options)
            return self.colour.router(nodes, deadline=deadline)
        client = self.place.client(self.colour.module, **options)
        return self.colour.over(client, deadline=deadline)

    @property
    def servers(self) -> dict[str, Server]:
        """Return the servers by what a router calls them."""
        return self.place.servers

    def client(self, **options: Any) -> Any:
        """Return a fresh router as tools take it."""
        router = self.router(**options)
        return router.target if isinstance(router, Face) else router

    def holders(self, pattern: str) -> set[str]:
        """Return the names of the servers that have a key like this."""
        found = set()
        for name, server in self.servers.items():
            with server.client() as client:
                if next(client.scan_iter(pattern, count=1000), None) is not None:
                    found.add(name)
        return found

    def keys(self, prefix: str, each: int = 1) -> list[str]:
        """Return keys of which every server has so many, in turn."""
        router = self.router()
        router.connect()
        return spread(router, prefix, list(self.servers), each)


@contextmanager
def nodes(*names: str) -> Iterator[Place]:
    """Run independent servers."""
    with ExitStack() as stack:
        yield Place({name: stack.enter_context(valkey_server()) for name in names})


def clustered(cluster: Cluster) -> Place:
    """Return a running cluster as a place, each node by its address."""
    return Place({f"{node.host}:{node.port}": node for node in cluster.nodes}, cluster)


def spread(router: Any, prefix: str, names: Sequence[str], each: int = 1) -> list[str]:
    """Return keys of which each of these nodes has so many, in turn, and all of other slots."""
    found: dict[str, list[str]] = {name: [] for name in names}
    slots: set[int] = set()
    number = 0
    while any(len(keys) < each for keys in found.values()):
        key = f"{prefix}:{number}"
        number += 1
        some = found.get(router.node_for(key))
        if some is not None and len(some) < each and key_slot(key.encode()) not in slots:
            slots.add(key_slot(key.encode()))
            some.append(key)
    return [key for keys in zip(*found.values(), strict=True) for key in keys]


def shown(call: Callable[[], Any]) -> tuple[str, Any]:
    """Return what a call came to: its value, or the text of a server's error."""
    try:
        return "value", call()
    except Exception as error:
        # redis-py leaves out the words that it has a class for.
        return "error", str(error).removeprefix("ERR ").removeprefix("NOSCRIPT ")


def kind(value: Any) -> Any:
    """Return the types of a value and all in it."""
    if isinstance(value, dict):
        return dict, [(kind(key), kind(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return type(value), list(map(kind, value))
    if isinstance(value, set):
        return set, set(map(type, value))
    return type(value)


async def _awaited(made: Any) -> Any:
    return await made


async def _all_of(made: Any) -> list[Any]:
    return [each async for each in made]
