"""A real Valkey cluster on loopback, whose slots can be moved, or left half moved.

    with valkey_cluster() as cluster:
        client = cluster.client()
        cluster.move_slot(42, 2)            # with its keys; clients are told MOVED
        cluster.begin_migration(43, 0)      # half of its keys: clients are told ASK for the rest

Starting takes some 2.5 s: a node serves nothing in its first two seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from redishacks._slots import SLOTS
from redishacks.errors import UsageError
from redishacks.testing._process import wait_until
from redishacks.testing.servers import Server, Setting, valkey_server

if TYPE_CHECKING:
    import redis


@contextmanager
def valkey_cluster(
    primaries: int = 3, replicas: int = 0, **config: Setting
) -> Iterator[Cluster]:
    """Run a cluster of so many primaries with so many replicas each, slots spread evenly.

    `config` goes to every node; `cluster_node_timeout` (milliseconds, here 2000) is how long a node
    may be silent before it counts as failed.
    """
    if primaries < 1 or replicas < 0:
        raise UsageError(f"a cluster needs a primary: {primaries} and {replicas} replicas were given")
    settings: dict[str, Setting] = {"cluster_enabled": True, "cluster_node_timeout": 2000}
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(valkey_server(**settings | config))
            for _ in range(primaries * (1 + replicas))
        ]
        cluster = Cluster(nodes)
        cluster.join(primaries)
        yield cluster


class Cluster:
    """A running cluster: `nodes` holds the primaries in the order of their slots, then replicas."""

    def __init__(self, nodes: Sequence[Server]) -> None:
        self.nodes = list(nodes)
        self._admin = [node.client(decode_responses=True, socket_timeout=10) for node in nodes]

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
        settings = {"host": first.host, "port": first.port, "password": first.password}
        return redis.RedisCluster(**settings | options)

    def node_of(self, slot: int) -> Server:
        """Return the node that owns a slot now."""
        return self.nodes[self._owner(slot)]

    def move_slot(self, slot: int, target: int) -> None:
        """Move a slot and its keys to `nodes[target]`; also ends a migration that was begun."""
        self.begin_migration(slot, target, share=1.0)
        name = self._id(target)
        source = self._owner(slot)
        for index in [target, source, *range(len(self.nodes))]:  # the new owner first
            if self._is_primary(index):
                self._say(index, "CLUSTER", "SETSLOT", slot, "NODE", name)
        wait_until(
            lambda: all(self._owner(slot, index) == target for index in range(len(self.nodes))),
            f"all nodes to see slot {slot} moved",
        )

    def begin_migration(self, slot: int, target: int, *, share: float = 0.5) -> None:
        """Open a slot's migration to `nodes[target]`, and move this share of its keys, rounded up.

        Until `move_slot` ends it, the owner answers ASK for keys that it has no more.
        """
        source = self._owner(slot)
        if not self._is_primary(target):
            raise UsageError(f"node {target} is a replica")
        if source == target:
            return
        self._say(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        self._say(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(target))
        count = self._say(source, "CLUSTER", "COUNTKEYSINSLOT", slot)
        keys = sorted(self._say(source, "CLUSTER", "GETKEYSINSLOT", slot, count, NEVER_DECODE=True))
        moving = keys[: -int(-len(keys) * share // 1)]
        there = self.nodes[target]
        password = ["AUTH", there.password] if there.password else []
        if moving:
            self._say(
                source, "MIGRATE", there.host, there.port, "", 0, 10000, *password, "KEYS", *moving
            )

    def join(self, primaries: int) -> None:
        """Give the first nodes the slots, make all meet, and wait until each says it is well."""
        count = len(self.nodes)
        for index in range(count):
            self._say(index, "CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            if index < primaries:
                first, after = (SLOTS * part // primaries for part in (index, index + 1))
                self._say(index, "CLUSTER", "ADDSLOTSRANGE", first, after - 1)
            node = self.nodes[index]
            self._say(0, "CLUSTER", "MEET", node.host, node.port, node.bus_port)
        wait_until(lambda: all(len(self._known(i)) == count for i in range(count)), "nodes to meet")
        for index in range(primaries, count):
            self._say(index, "CLUSTER", "REPLICATE", self._id(index % primaries))
        wait_until(lambda: all(map(self._well, range(count))), "cluster_state:ok on every node")
        replicas = count - primaries
        wait_until(
            lambda: all(self._known(i).count("slave") == replicas for i in range(count))
            and all(self._linked(i) for i in range(primaries, count)),
            "replicas to be in step",
        )

    def _say(self, node: int, *command: Any, **options: Any) -> Any:
        return self._admin[node].execute_command(*command, **options)

    def _id(self, node: int) -> str:
        return str(self._say(node, "CLUSTER", "MYID"))

    def _known(self, node: int) -> list[str]:
        """Return the roles of the nodes that a node knows, those still shaking hands left out."""
        found: dict[str, dict[str, str]] = self._say(node, "CLUSTER", "NODES")
        flags = [set(other["flags"].split(",")) for other in found.values()]
        return [
            "slave" if "slave" in flag else "master" for flag in flags if "handshake" not in flag
        ]

    def _well(self, node: int) -> bool:
        return bool(self._say(node, "CLUSTER", "INFO")["cluster_state"] == "ok")

    def _linked(self, node: int) -> bool:
        return self._say(node, "INFO", "replication").get("master_link_status") == "up"

    def _is_primary(self, node: int) -> bool:
        return bool(self._say(node, "ROLE")[0] == "master")

    def _owner(self, slot: int, seen_by: int = 0) -> int:
        """Return which node owns a slot in the eyes of another."""
        for first, last, owner, *_ in self._admin[seen_by].execute_command("CLUSTER", "SLOTS"):
            pass
        raise UsageError(f"slot {slot} has no owner")
