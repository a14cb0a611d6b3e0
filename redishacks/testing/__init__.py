"""Private servers and a fault-injecting proxy, for tests of redishacks and of what you build on it.

    with valkey_server() as server, FaultProxy(server) as proxy:
        client = redis.Redis(port=proxy.port)
        proxy.drop_reply()             # the server counts, the client never hears of it
        client.incr("hits")

- `valkey_server`, `redis_server`, `serve`: one server; `servers_available` for a test matrix.
- `valkey_cluster`: real cluster nodes, slots that move; `valkey_sentinel`: a failover on demand.
- `postgres_server`: a real PostgreSQL, with a fresh database per test.
- `FaultProxy`: sits between a client and a server, and loses, holds, delays or cuts what passes.

Each is a context manager; pytest users get fixtures too (`redishacks.testing.fixtures`). Nothing
they start outlives the process, not even when it is killed.
"""

from redishacks.testing.cluster import Cluster, valkey_cluster
from redishacks.testing.postgres import Postgres, postgres_server
from redishacks.testing.proxy import FaultProxy
from redishacks.testing.sentinel import SentinelSetup, valkey_sentinel
from redishacks.testing.servers import (
    Binary,
    Server,
    redis_server,
    serve,
    servers_available,
    valkey_server,
)

__all__ = [
    "Binary",
    "Cluster",
    "FaultProxy",
    "Postgres",
    "SentinelSetup",
    "Server",
    "postgres_server",
    "redis_server",
    "serve",
    "servers_available",
    "valkey_cluster",
    "valkey_sentinel",
    "valkey_server",
]
