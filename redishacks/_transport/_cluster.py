"""Which node of a Redis Cluster serves which slot: a map as a value, without I/O.

The map comes from `CLUSTER SLOTS`, one slot at a time from MOVED replies, and is asked for again
when a node cannot be reached or the cluster says that it is in trouble.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import redis

from redishacks._command import Command, Steps, ask_all
from redishacks._slots import SLOTS, key_slot
from redishacks._transport._routes import Table
from redishacks._transport._settings import Settings, from_options
from redishacks._transport._wire import Address, Words, parse_address, show
from redishacks.errors import CrossNodeError, UsageError

Remap = Callable[[Address], Address]

#: Asks a node for the map.
QUESTION: Command[Any] = Command((b"CLUSTER", b"SLOTS"), repeatable=True)

#: Seconds between two readings of the map, however many threads find it out of date.
PATIENCE = 0.1


class SlotMap:
    """The primaries of a cluster by slot: both `Routes` and its `View`, for its nodes redirect."""

    #: Connections need not be told of it.
    version = 0
    #: Channels of SPUBLISH do as well.
    shards = True
    #: A node that does not answer is replaced by the cluster.
    troubled = False
    #: What keys that move need is for the nodes to say.
    settled = True

    def __init__(self, startup: Sequence[Address], remap: Remap | None = None) -> None:
        self._startup = tuple(startup)
        self._remap = remap
        self._by_slot: list[Address | None] = [None] * SLOTS
        self._primaries: tuple[Address, ...] = ()
        self._others: tuple[Address, ...] = ()
        self._read_at = float("-inf")
        self._suspect: Address | None = None
        self._table: Table | None = None
        #: The map should be read before it is used; so at first.
        self.stale = True

    @property
    def view(self) -> SlotMap | None:
        """Itself, once any map has been read."""
        return self if self._primaries else None

    @property
    def table(self) -> Table | None:
        """The node of each slot; None when some are served by nobody."""
        if self._table is None:
            by_slot = [node for node in self._by_slot if node is not None]
            if len(by_slot) == SLOTS:
                places = {node: at for at, node in enumerate(dict.fromkeys(by_slot))}
                self._table = list(places), [places[node] for node in by_slot]
        return self._table

    def doubt(self, node: Address | None = None) -> None:
        """Have the map read again before its next use; not from this node, if it can be helped."""
        self.stale = True
        self._suspect = node

    def route(self, keys: Sequence[bytes], avoid: Address | None = None) -> Address:
        """Return the node for a command; without keys any primary but the one to avoid.

        Raises `CrossNodeError` when the keys are of different slots.
        """
        if not keys:
            others = [node for node in self._primaries if node != avoid]
            return random.choice(others or self._primaries)
        slot = key_slot(keys[0])
        for key in keys[1:]:
            if key_slot(key) != slot:
                raise CrossNodeError(
                    f"keys of one command must share a slot: {keys[0]!r} and {key!r} do not"
                )
        # A slot that nobody serves: any primary says CLUSTERDOWN, which is then waited out.
        return self._by_slot[slot] or random.choice(self._primaries)

    def where(self, keys: Sequence[bytes]) -> str:
        """Name the node for these keys; empty when it could be any."""
        node = self._by_slot[key_slot(keys[0])] if keys else None
        return show(node) if node else ""

    def due(self, now: float) -> bool:
        """Whether it is time to read the map again; true for one caller in every `PATIENCE`."""
        if now - self._read_at < PATIENCE:
            return False
        self._read_at = now
        return True

    def refresh(self) -> Steps[None]:
        """Read the map from the first node that gives it."""
        for address in self._candidates():
            (outcome,) = yield from ask_all([QUESTION._replace(node=address)])
            if outcome.error is None:
                self.load(outcome.value, address)
                return

    def failed(self, node: Address, *, silent: bool) -> None:
        """A cluster makes another node primary."""

    def fine(self, node: Address) -> None:
        """Nothing was noted."""

    def broken(self, node: Address, patience: float) -> None:
        """Every node is asked."""

    def silent(self, node: Address) -> bool:
        """A cluster makes another node primary."""
        return False

    def instead(self, node: Address) -> Address:
        """Return the same one."""
        return node

    def moving(self, keys: Sequence[bytes]) -> None:
        """Nothing is to be done before a command."""

    def pull(self, keys: Sequence[bytes]) -> Steps[None]:
        """Never asked for."""
        raise NotImplementedError

    def told(self, view: object) -> Sequence[Words]:
        """Return nothing: connections need not be told."""
        return ()

    def heard(self, address: Address, replies: Sequence[Any]) -> None:
        """Take replies to nothing."""

    def every(self) -> dict[str, Address]:
        """Return the primaries, by host and port."""
        return {show(node): node for node in self._primaries}

    def counts(self) -> dict[str, int]:
        """Return how many slots each has."""
        return Counter(show(node) for node in self._by_slot if node is not None)

    def kept(self, words: Words) -> None:
        """Nothing would make a node forget itself."""

    def visible(self, keys: list[bytes]) -> list[bytes]:
        """Return all of them."""
        return keys

    def aside(self, pattern: bytes) -> bytes:
        """Never asked for."""
        raise NotImplementedError

    def settings(self, address: Address, usual: Settings) -> Settings:
        """Return how to reach a node: as any other one."""
        return usual if address == usual.address else usual.at(address)

    def redirected(self, code: str, rest: str, asked: Address) -> Address:
        """Take a node's word for who serves a slot, now (ASK) or from now on (MOVED)."""
        slot, _, place = rest.partition(" ")
        target = self.place(parse_address(place, asked))
        if code == "MOVED":
            self.moved(int(slot), target)
            self.doubt()
        return target

    def _candidates(self) -> list[Address]:
        # Known primaries, replicas, then the startup nodes.
        primaries = random.sample(self._primaries, len(self._primaries))
        found = dict.fromkeys((*primaries, *self._others, *self._startup))
        return sorted(found, key=lambda node: node == self._suspect)

    def moved(self, slot: int, to: Address) -> None:
        """Note one slot's new node, in the words of `place`."""
        self._by_slot[slot], self._table = to, None
        if to not in self._primaries:
            self._primaries = (*self._primaries, to)

    def place(self, address: Address) -> Address:
        """Translate an address that the cluster gave to one that can be reached from here."""
        return self._remap(address) if self._remap else address

    def load(self, reply: Any, asked: Address) -> None:
        """Take over the reply to `CLUSTER SLOTS`; a node without a host is the one asked."""
        by_slot: list[Address | None] = [None] * SLOTS
        primaries: dict[Address, None] = {}
        others: dict[Address, None] = {}
        for first, last, primary, *replicas in reply:
            node = self._read(primary, asked)
            if node is None:
                continue
            by_slot[first : last + 1] = [node] * (last + 1 - first)
            primaries[node] = None
            for replica in replicas:
                other = self._read(replica, asked)
                if other is not None:
                    others[other] = None
        if primaries:
            self._by_slot, self._table = by_slot, None
            self._primaries, self._others = tuple(primaries), tuple(others)
            self._suspect = None
            self.stale = False

    def nodes(self) -> frozenset[Address]:
        """Return every node that the map names."""
        return frozenset((*self._primaries, *self._others, *self._startup))

    def _read(self, entry: Any, asked: Address) -> Address | None:
        host = entry[0].decode() if entry[0] else ""
        if host == "?":  # the node does not know its own host name
            return None
        return self.place((host or asked[0], int(entry[1])))


def from_cluster(client: Any) -> tuple[Settings, SlotMap]:
    """Read a RedisCluster: the settings of its nodes, and the map that they will fill."""
    options = dict(client.get_connection_kwargs())
    # The client's own function, which prepares its connections for reads from replicas.
    options.pop("redis_connect_func", None)
    if getattr(client, "user_on_connect_func", None) is not None:
        raise UsageError("a RedisCluster with a redis_connect_func is not supported")
    kind = options.get("connection_class") or (
        redis.SSLConnection if options.get("ssl") else redis.Connection
    )
    settings = from_options(kind, options)
    if settings.foreign is not None:
        raise UsageError(f"a RedisCluster of {kind.__name__} is not supported")
    manager = client.nodes_manager
    nodes = [(node.host, int(node.port)) for node in client.get_nodes()]
    nodes += [(node.host, int(node.port)) for node in manager.startup_nodes.values()]
    startup = tuple(dict.fromkeys(nodes))
    return settings.at(startup[0]), SlotMap(startup, manager.address_remap)
