"""A real Valkey cluster on loopback, whose slots can be moved, or left half moved.

    with valkey_cluster() as cluster:
        client = cluster.client()
        cluster.move_slot(42, 2)            # with its keys; clients are told MOVED
        cluster.begin_migration(43, 0)      # half of its keys: clients are told ASK for the rest

Starting takes some 2.5 s: a node serves nothing in its first two seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from redishacks._slots import SLOTS
from redishacks.errors import UsageError
from redishacks.testing._process import wait_until
from redishacks.testing.servers import Server, Setting, valkey_server

if TYPE_CHECKING:
    import redis


@contextmanager
def valkey_cluster(primaries: int = 3, replicas: int = 0, **config: Setting) -> Iterator[Cluster]:
    """Run a cluster of so many primaries with so many replicas each, slots spread evenly.

    `config` goes to every node; `cluster_node_timeout` (milliseconds, here 2000) is how long a node
    may be silent before it counts as failed.
    """
    if primaries < 1 or replicas < 0:
        raise UsageError(
            f"a cluster needs a primary: {primaries} and {replicas} replicas were given"
        )
    settings: dict[str, Setting] = {"cluster_enabled": True, "cluster_node_timeout": 2000}
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(valkey_server(**settings | config))
            for _ in range(primaries * (1 + replicas))
        ]
        cluster = Cluster(nodes)
        stack.callback(cluster.close)
        cluster._join(primaries)
        yield cluster


class Cluster:
    """A running cluster: `nodes` holds the primaries in the order of their slots, then replicas."""

    def __init__(self, nodes: Sequence[Server]) -> None:
        self.nodes = list(nodes)
        self._admin: list[Any] = [node.client(socket_timeout=10) for node in nodes]

    @property
    def url(self) -> str:
        """The first node's URL."""
        return self.nodes[0].url

    @property
    def startup_nodes(self) -> list[tuple[str, int]]:
        """Host and port of every node."""
        return [(node.host, node.port) for node in self.nodes]

    def client(self, **options: Any) -> redis.RedisCluster:
        """Return a redis-py cluster client, with redis-py's own defaults."""
        import redis

        first = self.nodes[0]
        settings: dict[str, Any] = {
            "host": first.host, "port": first.port, "password": first.password,
        }  # fmt: skip
        return redis.RedisCluster(**settings | options)

    def node_of(self, slot: int) -> Server:
        """Return the node that owns a slot now."""
        return self.nodes[self._owner(slot)]

    def begin_migration(self, slot: int, target: int, *, share: float = 0.5) -> None:
        """Open a slot's migration to `nodes[target]`, and move this share of its keys, rounded up.

        Until `move_slot` ends it, the owner answers ASK for keys that it does not hold (any more).
        """
        source = self._owner(slot)
        if source == target:
            return
        self._say(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        self._say(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(target))
        count = self._say(source, "CLUSTER", "COUNTKEYSINSLOT", slot)
        keys = sorted(self._say(source, "CLUSTER", "GETKEYSINSLOT", slot, count))
        moving = keys[: math.ceil(len(keys) * share)]
        there = self.nodes[target]
        password = ["AUTH", there.password] if there.password else []
        if moving:
            self._say(source, "MIGRATE", there.host, there.port, "", 0, 10_000, *password,
                      "KEYS", *moving)  # fmt: skip

    def move_slot(self, slot: int, target: int) -> None:
        """Move a slot and its keys to `nodes[target]`, or end a migration that was begun.

        Returns when every node knows.
        """
        self.begin_migration(slot, target, share=1.0)
        everybody = range(len(self.nodes))
        for index in sorted(everybody, key=lambda index: index != target):  # the new owner first
            if self._say(index, "ROLE")[0] == b"master":
                self._say(index, "CLUSTER", "SETSLOT", slot, "NODE", self._id(target))
        wait_until(
            lambda: all(self._owner(slot, seen_by=index) == target for index in everybody),
            f"all nodes to know that slot {slot} moved",
        )
        # The next owner gives itself an epoch above all that it knows. One it has not heard of
        # would beat it: the slot would go back, and its keys would be dropped.
        wait_until(
            lambda: all(self._epochs(index) == self._epochs(0) for index in everybody),
            "all nodes to know the new owner's epoch",
        )

    def _join(self, primaries: int) -> None:
        """Make one cluster of fresh nodes: the first ones get the slots, the others replicate."""
        count = len(self.nodes)
        for index, node in enumerate(self.nodes):
            self._say(index, "CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            if index < primaries:
                first, after = (SLOTS * part // primaries for part in (index, index + 1))
                self._say(index, "CLUSTER", "ADDSLOTSRANGE", first, after - 1)
            if index:
                self._say(0, "CLUSTER", "MEET", node.host, node.port, node.bus_port)
        self._wait_for_all(
            lambda index: len(self._roles(index)) == count, "every node to know the others"
        )
        for index in range(primaries, count):
            self._say(index, "CLUSTER", "REPLICATE", self._id(index % primaries))
        self._wait_for_all(
            lambda index: (
                b"cluster_state:ok" in self._say(index, "CLUSTER", "INFO")
                and self._roles(index).count("slave") == count - primaries
                and (index < primaries or self._say(index, "ROLE")[3] == b"connected")
            ),
            "every node to be well and every replica in step",
        )

    def close(self) -> None:
        """Close our own connections to the nodes."""
        for client in self._admin:
            client.close()

    def _say(self, node: int, *command: Any) -> Any:
        return self._admin[node].execute_command(*command)

    def _wait_for_all(self, condition: Callable[[int], bool], what: str) -> None:
        wait_until(lambda: all(map(condition, range(len(self.nodes)))), what)

    def _id(self, node: int) -> str:
        name: bytes = self._say(node, "CLUSTER", "MYID")
        return name.decode()

    def _roles(self, node: int) -> list[str]:
        """Return the roles of all nodes that a node knows; those it just meets are left out."""
        lines = self._say(node, "CLUSTER", "NODES").decode().splitlines()
        flags = [line.split()[2].split(",") for line in lines]
        return [
            "slave" if "slave" in flag else "master" for flag in flags if "handshake" not in flag
        ]

    def _epochs(self, node: int) -> dict[str, str]:
        """Return the configuration epoch of each node that a node knows, by id."""
        lines = self._say(node, "CLUSTER", "NODES").decode().splitlines()
        return {words[0]: words[6] for words in map(str.split, lines)}

    def _owner(self, slot: int, seen_by: int = 0) -> int:
        """Return which node owns a slot, in the eyes of one of them."""
        for first, last, owner, *_ in self._say(seen_by, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return [node.port for node in self.nodes].index(owner[1])
        raise UsageError(f"no node owns slot {slot}; slots go from 0 to {SLOTS - 1}")
