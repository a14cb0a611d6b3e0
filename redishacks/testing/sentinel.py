"""A primary, its replica and a sentinel that watches them: a failover on demand.

with valkey_sentinel() as sentinel:
    client = redis.Sentinel(sentinel.sentinels).master_for(sentinel.service)
    sentinel.failover()
    client.set("now", "on the other server")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from redishacks.testing._process import wait_until
from redishacks.testing.servers import Server, Setting, find_binary, quoted, valkey_server


@contextmanager
def valkey_sentinel(**config: Setting) -> Iterator[SentinelSetup]:
    """Run a primary, a replica and one sentinel, with a quorum of one and 500 ms of patience.

    `config` goes to the primary and the replica.
    """
    with ExitStack() as stack:
        primary = stack.enter_context(valkey_server(**config))
        there: dict[str, Setting] = {"replicaof": (primary.host, primary.port)}
        replica = stack.enter_context(valkey_server(**there | config))
        sentinel = Server(
            find_binary("valkey", "embedded"), {}, lines=_watching(primary), mode=["--sentinel"]
        )
        stack.callback(sentinel.close)
        sentinel.start()
        setup = SentinelSetup(sentinel, primary, replica)
        setup._hurry()
        setup._wait_for(primary)
        yield setup


class SentinelSetup:
    """What runs: `primary` and `replica` change places at each `failover`."""

    #: The name under which the sentinel knows the primary.
    service = "redishacks"

    def __init__(self, sentinel: Server, primary: Server, replica: Server) -> None:
        self.sentinel = sentinel
        self.primary = primary
        self.replica = replica

    @property
    def sentinels(self) -> list[tuple[str, int]]:
        """Host and port, as redis-py's `Sentinel` wants them."""
        return [(self.sentinel.host, self.sentinel.port)]

    def failover(self) -> None:
        """Make the replica the primary; return when the other one follows it. Takes some 2 s."""
        self._ask(self.sentinel, "SENTINEL", "FAILOVER", self.service)
        self._wait_for(self.replica)
        self.primary, self.replica = self.replica, self.primary

    def _hurry(self) -> None:
        """Have the sentinel look and tell every 100 ms; its own pace takes 10 s to a new order."""
        for period in ("INFO-PERIOD", "PUBLISH-PERIOD"):
            self._ask(self.sentinel, "SENTINEL", "DEBUG", period, "100")

    def _wait_for(self, primary: Server) -> None:
        """Wait until the sentinel names this server and could fail over to the other."""
        import redis

        other = self.primary if primary is self.replica else self.replica

        def settled() -> bool:
            try:
                return self._settled(primary, other)
            except redis.ConnectionError:  # a server that changes its role cuts its clients off
                return False

        wait_until(settled, f"failover to port {primary.port}")

    def _settled(self, primary: Server, other: Server) -> bool:
        named = self._ask(self.sentinel, "SENTINEL", "GET-PRIMARY-ADDR-BY-NAME", self.service)
        role, *details = self._ask(other, "ROLE")
        return (
            int(named[1]) == primary.port
            and self._ask(primary, "ROLE")[0] == b"master"
            and role == b"slave"
            and details[1:3] == [primary.port, b"connected"]
            and self._could_fail_over(other)
        )

    def _could_fail_over(self, replica: Server) -> bool:
        """Return whether the sentinel has heard from the replica that it is in step."""
        for fields in self._ask(self.sentinel, "SENTINEL", "REPLICAS", self.service):
            known = dict(zip(fields[::2], fields[1::2], strict=True))
            if int(known[b"port"]) == replica.port:
                return (known[b"flags"], known[b"master-link-status"]) == (b"slave", b"ok")
        return False

    def _ask(self, server: Server, *command: str) -> Any:
        client: Any = server.client(protocol=2)
        with closing(client):
            return client.execute_command(*command)


def _watching(primary: Server) -> list[str]:
    """Return a sentinel's own directives."""
    name = SentinelSetup.service
    lines = [
        f"sentinel monitor {name} {primary.host} {primary.port} 1",
        f"sentinel down-after-milliseconds {name} 500",
        f"sentinel failover-timeout {name} 2000",
    ]
    if primary.password:
        lines.append(f"sentinel auth-pass {name} {quoted(primary.password)}")
    return lines
