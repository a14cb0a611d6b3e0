"""The same counter on every server, through every client: one story, told everywhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio

from redishacks._slots import key_slot
from redishacks.counters import AsyncBufferedCounter, BufferedCounter, FlushJob
from redishacks.errors import UnavailableError
from redishacks.testing import serve, servers_available, valkey_sentinel, valkey_server
from tests.helpers import Colour, MemorySink, eventually


def story(colour: Colour, make: Callable[[], Any], prefix: str, partitions: int = 1) -> None:
    """Count, read, flush, linger, and find every hit in the sink."""
    columns = {"amount": "sum", "last": "max", "first": "min"}
    options: Any = {"prefix": prefix, "partitions": partitions, "columns": columns}
    client = make()
    hits = colour.counter(client, "hits", **options)
    sink = MemorySink()
    job = colour.job(hits, sink, chunk=7)
    for i in range(30):
        hits.incr(f"/{i}", i, last=i)
    hits.incr_many({f"/{i}": {"amount": 1, "first": -i} for i in range(40)})
    assert hits.pending("/29") == 30
    assert hits.top(1) == [("/29", 30)]
    assert job.values("/29") == {"amount": 30, "last": 29, "first": -29}
    report = job.run()
    assert report.amount == sum(range(30)) + 40
    assert report.rows == 40
    lingering = colour.counter(client, "hits", linger=30, **options)
    for i in range(40):
        lingering.incr(f"/{i}", last=1000)
        lingering.incr(f"/{i}")
    lingering.close()
    assert job.values("/29") == {"amount": 31, "last": 1000, "first": -29}
    assert job.status().pending_ids == 40
    job.run()
    assert sink.rows[b"/29"] == {"amount": 31, "last": 1000, "first": -29}
    assert sum(row["amount"] for row in sink.rows.values()) == sum(range(30)) + 80
    assert job.status().pending_ids == 0
    if colour.name == "sync":
        client.close()
    else:
        hits._runner.run(hits.target.transport.aclose())
        hits._runner.run(client.aclose())


@pytest.mark.parametrize("binary", servers_available(), ids=lambda binary: binary.kind)
def test_on_every_server(colour: Colour, binary: Any, prefix: str) -> None:
    """Valkey, the oldest Redis that is supported, and whatever Redis the machine has."""
    with serve(binary) as server:
        story(colour, lambda: colour.client(server.url), prefix)


def test_on_a_cluster(colour: Colour, cluster: Any, prefix: str) -> None:
    """Eight partitions lie in slots of several nodes; every command stays in one slot."""
    host, port = cluster.startup_nodes[0]
    module: Any = redis.asyncio if colour.name == "async" else redis
    story(colour, lambda: module.RedisCluster(host=host, port=port), prefix, partitions=8)
    slots = {key_slot(f"{prefix}:c1:{{hits/{p}}}:meta".encode()) for p in range(8)}
    assert len({cluster.node_of(slot) for slot in slots}) > 1


@pytest.mark.slow
def test_through_sentinel(colour: Colour, prefix: str) -> None:
    """The master that Sentinel names; after a failover the next one, in the same process."""
    with valkey_sentinel() as setup:
        module: Any = redis.asyncio.sentinel if colour.name == "async" else redis.sentinel
        sentinel = module.Sentinel(setup.sentinels)
        client = sentinel.master_for(setup.service)
        hits = colour.counter(client, "hits", prefix=prefix)
        sink = MemorySink()
        job = colour.job(hits, sink)
        hits.incr("/a", 3)
        assert job.run().rows == 1  # a replica is attached: the claim was confirmed first
        assert setup.primary.client().info("commandstats").get("cmdstat_wait")
        hits.incr("/a", 4)
        eventually(lambda: _replicated(setup))
        setup.failover()

        def counted() -> bool:
            try:
                hits.incr("/a", 5)
            except UnavailableError:
                return False
            return True

        eventually(counted)
        job.run()
        assert sink.rows[b"/a"] == {"amount": 12}
        assert job.value("/a") == 12


def _replicated(setup: Any) -> bool:
    with setup.primary.client() as client:
        offsets: Any = client.info("replication")
        return bool(offsets["slave0"]["offset"] == offsets["master_repl_offset"])


def test_no_replica_answers(prefix: str) -> None:
    """With a replica attached that does not confirm the claim, SQL is not touched."""
    with (
        valkey_server() as primary,
        valkey_server(replicaof=f"127.0.0.1 {primary.port}") as replica,
    ):
        with primary.client() as client:
            eventually(lambda: client.role()[2])
        hits = BufferedCounter(primary.url, "hits", prefix=prefix)
        hits.incr("/a")
        sink = MemorySink()
        job = FlushJob(hits, sink)
        with replica.paused(), pytest.raises(UnavailableError, match="no replica"):
            job.run()
        assert sink.rows == {}
        assert job.value("/a") == 1

        def confirmed() -> bool:
            with contextlib.suppress(UnavailableError):
                report = job.run()
                assert (report.recovered, report.rows) == (1, 1)
                return True
            return False

        eventually(confirmed)
        assert sink.rows == {b"/a": {"amount": 1}}


def test_in_a_users_unit_test(colour: Colour, prefix: str) -> None:
    """fakeredis with Lua stands in for a server; nothing of it is evidence of ours."""
    kind: Any = fakeredis.FakeAsyncRedis if colour.name == "async" else fakeredis.FakeRedis
    server = fakeredis.FakeServer()
    story(colour, lambda: kind(server=server), prefix)


@pytest.mark.parametrize("decode", [False, True])
def test_a_decoding_client_changes_nothing(
    colour: Colour, valkey: Any, prefix: str, decode: bool
) -> None:
    """decode_responses is the user's business: ids come back the same."""
    client = colour.client(valkey.url, decode_responses=decode)
    hits = colour.counter(client, "hits", prefix=prefix)
    hits.incr(b"\xff")
    hits.incr("é")
    assert dict(hits.top()) == {b"\xff": 1, "é": 1}


def test_urls_of_every_sort(valkey: Any, prefix: str) -> None:
    """A URL over TCP or a unix socket, sync and async."""
    for url in (valkey.url, valkey.unix_url):
        BufferedCounter(url, "hits", prefix=prefix).incr("/a")

        async def count(url: str = url) -> None:
            counter = AsyncBufferedCounter(url, "hits", prefix=prefix)
            await counter.incr("/a")
            await counter.transport.aclose()

        asyncio.run(count())
    assert BufferedCounter(valkey.url, "hits", prefix=prefix).pending("/a") == 4
