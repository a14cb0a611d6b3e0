"""The same series on every server, through every client: one story, told everywhere."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import redis

from redishacks._slots import key_slot, partition
from redishacks.errors import (
    MaybeAppliedError,
    RedisHacksError,
    RetentionError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.testing import Cluster, Server, serve, servers_available, valkey_sentinel
from redishacks.timeseries import (
    DistinctSeries,
    GaugeSeries,
    LatencySeries,
    TimeSeries,
    TopSeries,
)
from redishacks.timeseries.resolution import DAY, HOUR
from tests.helpers import eventually
from tests.timeseries_kit import Both, agree, noon, stored, tls_in_front
from tests.transport_kit import PEM

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def colour(flavour: str) -> Iterator[Both]:
    """Both colours, with one test body."""
    made = Both(flavour)
    yield made
    made.close()


def story(colour: Both, make: Callable[[], Any], prefix: str) -> None:
    """Use every method once; what one client counted, another one finds."""
    options: Any = {"prefix": prefix, "deadline": 5}
    hits = colour.series(make(), **options)
    now = int(time.time())
    assert hits.sum("a", now - HOUR) == 0
    hits.incr("a")
    hits.incr("a", 300, at=now - 20)
    hits.incr_many([("a", 70_000, now - 20), (b"\xff", -5, now - 3 * DAY), ("é", 2**40)])
    other = colour.series(make(), **options)
    assert other.sum("a", now - 60, now + 60) == 70_301
    # Values grow to eight bytes; a sum is below 0, and comes back to what fits in one.
    for amount in (2**33, -(2**45), 2**45 - 2**33 - 70_000 - 300):
        other.incr("a", amount, at=now - 20)
    names = ["a", b"\xff", "é", "none"]
    assert hits.sums(names, now - 5 * DAY) == {"a": 1, b"\xff": -5, "é": 2**40, "none": 0}
    points = hits.range(b"\xff", now - 4 * DAY, now, step=HOUR)
    assert Counter(points.values) == {0: len(points) - 1, -5: 1}
    assert hits.today("a", noon()) == 1
    plan = hits.explain("a", now - HOUR)
    assert plan.complete
    assert plan.bytes > 0
    with pytest.raises(RetentionError):
        hits.sum("a", now - 10 * DAY - 5, now - 5 * DAY, strict=True)
    with pytest.raises(UsageError, match="older than all"):
        hits.incr("a", at=now - 3000 * DAY)
    much: Any = [("full", 2**53 - 1, now)] * 500
    hits.incr_many(much)
    hits.incr_many(much)
    with pytest.raises(UsageError, match=r"would pass 2\^63"):
        hits.incr_many(much)
    lingering = colour.series(make(), linger=60, **options)
    for _ in range(30):
        lingering.incr("é")
        lingering.incr("late", 2, at=now - DAY)
    lingering.incr_many([("é", 1), (7, 9, now)])
    assert other.sum("é", now - 60, now + 60) == 2**40
    lingering.close()
    totals = other.sums(["é", "late", 7, "full"], now - 2 * DAY)
    assert totals == {"é": 2**40 + 31, "late": 60, 7: 9, "full": 1000 * (2**53 - 1)}
    colour.shut(hits, other, lingering)


def distincts(colour: Both, make: Callable[[], Any], prefix: str) -> None:
    """Note members, and count them over ranges and over series."""
    options: Any = {"kind": "DistinctSeries", "prefix": prefix, "deadline": 5}
    seen = colour.series(make(), "seen", **options)
    now = int(time.time())
    assert seen.count("a", now - HOUR) == 0
    for _ in range(2):
        seen.add("a", "x", b"\xff", "é", 7)
        seen.add_many([("b", "x"), ("b", "y", now - 3 * DAY), (b"\xff", "z", now - DAY)])
    lingering = colour.series(make(), "seen", linger=60, **options)
    lingering.add("a", "x", "late", at=now - DAY)
    lingering.close()
    names = ["a", "b", b"\xff", "none"]
    counts = seen.counts(names, now - 5 * DAY, now + 60)
    assert counts == {"a": 5, "b": 2, b"\xff": 1, "none": 0}
    assert counts["a"].error == 0.0081
    assert seen.union(names, now - 5 * DAY, now + 60) == 7  # in whatever slots they are
    assert seen.count("a", now - 60, now + 60) == 4
    assert seen.today("a", noon()) == 4
    points = seen.range("b", now - 5 * DAY, now + 60, step=HOUR)
    assert Counter(points.values) == {0: len(points) - 2, 1: 2}
    colour.shut(seen, lingering)


def tops(colour: Both, make: Callable[[], Any], prefix: str) -> None:
    """Add to members, more of them than are kept, and see the heaviest."""
    options: Any = {"kind": "TopSeries", "keep": 2, "prefix": prefix, "deadline": 5}
    pages = colour.series(make(), "pages", **options)
    now = int(time.time())
    assert not pages.top("a", now - HOUR)
    pages.incr("a", "x", 5, at=now)
    pages.incr_many([("a", b"\xff", 2, now), ("b", "y", 2**52, now - 3 * DAY), ("b", 7, 1, now)])
    lingering = colour.series(make(), "pages", linger=60, **options)
    lingering.incr("a", "x", 4, at=now - DAY)
    lingering.close()
    found = pages.top("a", now - 2 * DAY, now + 60, n=5)
    assert (list(found), found.total, found.error) == ([("x", 9), (b"\xff", 2)], 11, 0)
    both = pages.tops(["b", "none"], now - 5 * DAY, now + 60)
    assert [list(each) for each in both.values()] == [[("y", 2**52), ("7", 1)], []]
    # With more than twice as many as are kept, what is as heavy as the third or lighter goes.
    pages.incr_many([("c", f"m{n}", n, now) for n in range(1, 6)])
    found = pages.top("c", now - 60, now + 60)
    assert (list(found), found.total, found.error) == ([("m5", 2), ("m4", 1)], 15, 3)
    assert pages.today("a", noon()).total == 7
    colour.shut(pages, lingering)


def gauges(colour: Both, make: Callable[[], Any], prefix: str) -> None:
    """Set values as far from 0 as they may be; what is stored is exact, of either sign."""
    options: Any = {"kind": "GaugeSeries", "prefix": prefix, "deadline": 5}
    queue = colour.series(make(), "queue", **options)
    now, most = int(time.time()), 2**53 - 1
    assert queue.read("a", now - HOUR).last is None
    for value in (-1, most, -256, -most, -(2**40) - 1):  # each reads what is there and stores it
        queue.set("a", value, at=now)
    queue.set_many([("a", 9, now - 1 / 8), ("b", -3, now - 3 * DAY), ("b", -4)])
    found = queue.read("a", now, now + 10)
    assert (found.last, found.at, found.min, found.max) == (-(2**40) - 1, now, -most, most)
    lingering = colour.series(make(), "queue", linger=60, **options)
    lingering.set("b", 300, at=now - DAY)
    lingering.close()
    found = queue.reads(["b"], now - 5 * DAY, now + 60)["b"]
    assert (found.last, found.min, found.max, found.count) == (-4, -4, 300, 3)
    assert found.mean == 293 / 3
    assert (queue.today("b", noon()).last, queue.today("b", noon()).count) == (-4, 1)
    points = queue.range("b", now - 2 * DAY, now - HOUR, step=HOUR, of="max")
    assert Counter(points.values) == {None: len(points) - 1, 300: 1}
    prices = colour.series(make(), "prices", scale=2, **options)
    prices.set("a", Decimal("-3.14"))
    assert prices.read("a", now - 60, now + 60).min == Decimal("-3.14")
    colour.shut(queue, lingering, prices)


def latencies(colour: Both, make: Callable[[], Any], prefix: str) -> None:
    """Record durations and look at histograms of them."""
    options: Any = {"kind": "LatencySeries", "prefix": prefix, "deadline": 5}
    took = colour.series(make(), "took", **options)
    now = int(time.time())
    assert took.quantile("a", 0.5, now - HOUR) is None
    took.record("a", 0.25)
    took.record_many([("a", 0.5, now - 3 * DAY)] * 300)
    took.record_many([("a", 0.000_003, now - DAY), ("b", 60)])
    lingering = colour.series(make(), "took", linger=60, **options)
    lingering.record("b", 0, at=now - DAY)
    lingering.close()
    found = took.histogram("a", now - 5 * DAY, now + 60)
    assert (found.count, found.min) == (302, 0.000_003)
    assert took.quantile("a", 0.9, now - 5 * DAY, now + 60) == pytest.approx(0.5, rel=0.01)
    assert took.histograms(["b"], now - 5 * DAY, now + 60)["b"].max == pytest.approx(60, rel=0.01)
    assert took.today("b", noon()).count == 1
    points = took.range("a", 0.5, now - 2 * DAY, now - HOUR, step=HOUR)
    assert Counter(points.values) == {None: len(points) - 1, 0.000_003: 1}
    colour.shut(took, lingering)


#: What every kind of series is put through.
STORIES = {
    "sum": story, "distinct": distincts, "top": tops, "gauge": gauges, "latency": latencies,
}  # fmt: skip
every_kind = pytest.mark.parametrize("tell", STORIES.values(), ids=STORIES)
Tell = Callable[[Both, Callable[[], Any], str], None]


@pytest.mark.parametrize("binary", servers_available(), ids=lambda binary: binary.kind)
def test_on_every_server(colour: Both, binary: Any, prefix: str) -> None:
    """Valkey, the oldest Redis that is supported, and whatever Redis the machine has."""
    with serve(binary) as server:
        for tell in STORIES.values():
            tell(colour, lambda: colour.client(server.url), prefix)
        with server.client() as raw:
            series = TimeSeries(server.url, "hits", prefix=prefix, deadline=5)
            series.sum("a", 0)
            agree([each for each in stored(raw, series, prefix) if each.series in "a7"])


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": 2},
        {"protocol": 3},
        {"protocol": 2, "decode_responses": True},
        {"protocol": 3, "decode_responses": True, "encoding": "latin-1"},
    ],
    ids=str,
)
@every_kind
def test_however_the_client_reads(
    colour: Both, valkey: Server, prefix: str, options: dict[str, Any], tell: Tell
) -> None:
    """RESP2, RESP3 and decoding are the user's business: packed bytes come back as they are."""
    tell(colour, lambda: colour.client(valkey.url, **options), prefix)


@pytest.mark.parametrize("options", [{}, {"protocol": 3}, {"decode_responses": True}], ids=str)
@every_kind
def test_in_a_users_unit_test(
    colour: Both, prefix: str, options: dict[str, Any], tell: Tell
) -> None:
    """fakeredis with Lua stands in for a server; nothing of it is evidence of ours."""
    tell(colour, colour.fake(**options), prefix)


def test_urls_of_every_sort(colour: Both, valkey: Server, prefix: str) -> None:
    """A URL over TCP, a unix socket or TLS leads to the same series."""
    options: Any = {"prefix": prefix, "deadline": 5}
    with tls_in_front(valkey) as port:
        tls = f"rediss://localhost:{port}/0?ssl_ca_certs={PEM}&ssl_cert_reqs=required"
        urls = [valkey.url, valkey.unix_url, tls]
        made = [colour.series(url, **options) for url in urls]
        now = time.time()
        for amount, series in enumerate(made, 1):
            series.incr("a", amount)
        assert [series.sum("a", now - 60) for series in made] == [6, 6, 6]
        colour.shut(*made)


def test_databases_and_prefixes_are_apart(colour: Both, valkey: Server, prefix: str) -> None:
    """The same name in another database, or behind another prefix, is another series."""
    now = time.time()
    other_db = valkey.url.removesuffix("0") + "3"
    made = [
        colour.series(valkey.url, prefix=prefix, deadline=5),
        colour.series(other_db, prefix=prefix, deadline=5),
        colour.series(colour.client(valkey.url, db=3), prefix=f"{prefix}-other"),
        colour.series(valkey.url, "hits2", prefix=prefix, deadline=5),
    ]
    for amount, series in enumerate(made, 1):
        series.incr("a", amount)
    assert [series.sum("a", now - 60) for series in made] == [1, 2, 3, 4]
    colour.shut(*made)


# Cluster


def on_cluster(colour: Both, cluster: Cluster) -> Any:
    """Return a cluster client of this colour."""
    host, port = cluster.startup_nodes[0]
    return colour.module.RedisCluster(host=host, port=port)


@every_kind
def test_every_kind_on_a_cluster(colour: Both, cluster: Cluster, prefix: str, tell: Tell) -> None:
    """Every command of every kind stays in one slot, whatever is asked of many series."""
    tell(colour, lambda: on_cluster(colour, cluster), prefix)


def test_on_a_cluster(colour: Both, cluster: Cluster, prefix: str) -> None:
    """Series lie in slots of all nodes."""
    keys = [f"k{n}" for n in range(60)]
    series = colour.series(on_cluster(colour, cluster), prefix=prefix, deadline=5)
    now = time.time()
    series.incr_many((key, n) for n, key in enumerate(keys))
    assert series.sums(keys, now - 60) == {key: n for n, key in enumerate(keys)}
    for node in cluster.nodes:
        with node.client() as raw:
            assert any(True for _ in raw.scan_iter(f"{prefix}:t1:*:s:*"))
            stored(raw, getattr(series, "target", series), prefix)
    colour.shut(series)


def test_sums_of_many_series_go_by_node(cluster: Cluster, prefix: str) -> None:
    """One exchange for all nodes, in which each is asked for the groups that it has."""
    client = cluster.client()
    series = TimeSeries(client, "hits", prefix=prefix, deadline=5)
    keys = [f"k{n}" for n in range(200)]
    now = time.time()
    series.incr_many((key, 1) for key in keys)
    exchanges: list[int] = []
    run = series.transport.run

    def counting(commands: Any, deadline: float, view: Any = None) -> Any:
        exchanges.append(len(commands))
        return run(commands, deadline, view)

    series.transport.run = counting  # type: ignore[method-assign]
    groups = {partition(key.encode(), 64) for key in keys}
    slots = [key_slot(f"{prefix}:t1:{{hits/{p}}}:meta".encode()) for p in groups]
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(node.client()) for node in cluster.nodes]
        for raw in raws:
            raw.config_resetstat()
        totals = series.sums(keys, now - 60)
        asked = [raw.info("commandstats") for raw in raws]
    assert set(totals.values()) == {1}
    assert len(totals) == 200
    assert len(exchanges) == 1
    reads = [stats.get("cmdstat_mget", {"calls": 0})["calls"] for stats in asked]
    assert reads == [sum(cluster.node_of(slot) is node for slot in slots) for node in cluster.nodes]
    assert min(reads) > 5
    client.close()


@pytest.fixture
def moving(cluster: Cluster, prefix: str) -> Iterator[int]:
    """The only slot of the series named as the prefix; it is at home again after the test."""
    slot = key_slot(f"{prefix}:t1:{{{prefix}/0}}:meta".encode())
    home = cluster.nodes.index(cluster.node_of(slot))
    yield slot
    cluster.move_slot(slot, home)


def test_while_a_slot_moves(colour: Both, cluster: Cluster, prefix: str, moving: int) -> None:
    """Half moved or moved, each hit is counted once or refused; keys keep their ends."""
    client = on_cluster(colour, cluster)
    series = colour.series(client, prefix, prefix=prefix, partitions=1, deadline=0.3)
    now = int(time.time())
    for amount in (1, 2, 4):
        series.incr("a", amount, at=now)
    there = (cluster.nodes.index(cluster.node_of(moving)) + 1) % 3
    cluster.begin_migration(moving, there)
    with pytest.raises(UnavailableError, match="TRYAGAIN"):
        series.incr("a", 8, at=now)
    with pytest.raises(UnavailableError, match="TRYAGAIN"):
        series.sum("a", now - 2 * DAY)
    cluster.move_slot(moving, there)
    series.incr("a", 16, at=now)
    assert series.sum("a", now - 60, now + 60) == 23
    with cluster.node_of(moving).client() as raw:
        found = stored(raw, getattr(series, "target", series), prefix, prefix)
    assert len(found) == 5
    assert sum(agree(found).values()) == 23
    colour.shut(series)


def test_writers_while_a_slot_moves(cluster: Cluster, prefix: str, moving: int) -> None:
    """Of hits that go on all the while none is lost or doubled, lingering or not."""
    made: list[Any] = []
    for linger in (None, 0.01):
        client = cluster.client()
        options: Any = {"prefix": prefix, "partitions": 1, "linger": linger, "deadline": 5}
        made.append(TimeSeries(client, prefix, **options))
    now = int(time.time())
    counted, in_doubt = [0, 0], [0, 0]
    over = threading.Event()

    def write(n: int) -> None:
        while not over.is_set():
            try:
                made[n].incr(f"k{n}", at=now)
                counted[n] += 1
            except MaybeAppliedError:
                in_doubt[n] += 1
            except UnavailableError:
                pass
            time.sleep(0.0005)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    home = cluster.nodes.index(cluster.node_of(moving))
    for step in (1, 0):
        goal = min(counted) + 20
        eventually(functools.partial(_reached, counted, goal))
        cluster.move_slot(moving, (home + step) % 3)
    over.set()
    for thread in threads:
        thread.join()
    for series in made:
        series.close()
    for n in range(2):
        found = made[0].sum(f"k{n}", now - 60, now + 60)
        assert counted[n] <= found <= counted[n] + in_doubt[n]
    with cluster.node_of(moving).client() as raw:
        agree(stored(raw, made[0], prefix, prefix))
    for series in made:
        series.client.close()


def _reached(counted: list[int], goal: int) -> bool:
    return min(counted) > goal


# Sentinel


@pytest.mark.slow
def test_through_sentinel(colour: Both, prefix: str) -> None:
    """The master that Sentinel names; after a failover the next one, in the same process."""
    with valkey_sentinel() as setup:
        sentinel = colour.module.sentinel.Sentinel(setup.sentinels)
        options: Any = {"prefix": prefix, "deadline": 2}
        hits = colour.series(sentinel.master_for(setup.service), **options)
        lingering = colour.series(sentinel.master_for(setup.service), linger=60, **options)
        now = int(time.time())
        hits.incr_many([("a", 3, now), ("a", 4, now - 3 * DAY)])
        lingering.incr("b", 1, at=now)
        lingering.send()
        eventually(lambda: _replicated(setup))
        old = setup.primary.port
        lingering.incr("b", 10, at=now)
        setup.failover()
        assert setup.primary.port != old
        lingering.incr("b", 100, at=now)
        counted, in_doubt = 7, 0
        end = time.monotonic() + 20
        while True:
            try:
                hits.incr("a", 1, at=now)
            except MaybeAppliedError:
                in_doubt += 1
            except UnavailableError:
                pass
            else:
                counted += 1
                break
            assert time.monotonic() < end
            colour.sleep(0.05)
        assert counted <= hits.sum("a", now - 5 * DAY, now + 60) <= counted + in_doubt
        lingering.close()
        assert hits.sum("b", now - 60, now + 60) == 111
        with setup.primary.client() as raw:
            there = TimeSeries(setup.primary.url, "hits", prefix=prefix, deadline=5)
            there.sum("a", now)
            found = stored(raw, there, prefix)
        assert {each.series for each in found} == {"a", "b"}
        colour.shut(hits)


@pytest.mark.slow
def test_a_replica_is_not_written_to(colour: Both, prefix: str) -> None:
    """A client of a replica reads, and is told that it cannot count."""
    with valkey_sentinel() as setup:
        now = time.time()
        writer = colour.series(setup.primary.url, prefix=prefix, deadline=5)
        reader = colour.series(setup.replica.url, prefix=prefix, deadline=0.3)
        writer.incr("a", 3)
        eventually(lambda: _replicated(setup))
        assert reader.sum("a", now - 60) == 3
        with pytest.raises(RedisHacksError, match=r"(?i)read.?only"):
            reader.incr("a")
        assert writer.sum("a", now - 60) == 3
        colour.shut(writer, reader)


def _replicated(setup: Any) -> bool:
    with setup.primary.client() as client:
        offsets: Any = client.info("replication")
        return bool(offsets["slave0"]["offset"] == offsets["master_repl_offset"])


# Rights


@pytest.fixture(params=["redishacks_valkey", "redishacks_redis"])
def limited(request: pytest.FixtureRequest, prefix: str) -> Iterator[redis.Redis]:
    """A user with the rights the README lists, whom nothing is refused."""
    server: Server = request.getfixturevalue(request.param)
    line = re.search(r"^user series on (.*)$", README, re.M)
    assert line is not None
    with server.client() as admin:
        admin.execute_command("ACL", "SETUSER", prefix, "reset", "on", *line[1].split())
        user = redis.Redis(port=server.port, username=prefix, password="password")
        try:
            admin.script_flush()
            yield user
            log: Any = admin.acl_log()
            assert not [entry for entry in log if entry["username"] == prefix], log
            user.close()
        finally:
            admin.execute_command("ACL", "DELUSER", prefix)
            admin.delete(*admin.scan_iter(f"rh:t1:{{{prefix}*"))


def kept(user: Any, name: str) -> dict[str, tuple[Any, Callable[[str, int], Any]]]:
    """Return a series of each kind, and what writes to it."""
    hits, seen = TimeSeries(user, f"{name}-h"), DistinctSeries(user, f"{name}-d")
    pages = TopSeries(user, f"{name}-t", keep=1)
    queue, took = GaugeSeries(user, f"{name}-g"), LatencySeries(user, f"{name}-l")
    return {
        "sum": (hits, lambda key, at: hits.incr(key, 300, at=at)),
        "distinct": (seen, lambda key, at: seen.add(key, "x", "y", at=at)),
        "top": (pages, lambda key, at: pages.incr_many((key, m, m, at) for m in (1, 2, 3))),
        "gauge": (queue, lambda key, at: queue.set(key, -5, at=at)),
        "latency": (took, lambda key, at: took.record(key, 0.25, at=at)),
    }


@pytest.mark.parametrize("kind", STORIES)
def test_the_acl_of_series_is_enough(limited: redis.Redis, prefix: str, kind: str) -> None:
    """A user with the rights the README lists can count, read and do all upkeep."""
    series, write = kept(limited, prefix)[kind]
    day = int(time.time()) // DAY * DAY
    for key in "aab":
        for at in (day, day - DAY, day - DAY + 3 * HOUR):
            write(key, at)
    assert series.explain("a", day).complete
    assert sorted(series.keys()) == ["a", "b"]
    rows = list(series.export())
    series.merge("a", "b")
    assert list(series.keys()) == ["b"]
    # The one is partly in the range at every resolution, the other is wholly.
    series.delete("b", day - DAY, day - DAY + 2 * HOUR)
    series.delete("b", day - DAY, day + DAY)
    assert list(series.keys()) == []
    assert series.import_(rows) == len(rows)
    assert sorted(series.keys()) == ["a", "b"]
    assert series.add_resolution((1200, 40 * DAY)) > day


def test_the_acl_of_series_is_enough_for_reading(limited: redis.Redis, prefix: str) -> None:
    """Such a user can look at series of every kind in every way."""
    now = int(time.time())
    made = kept(limited, prefix)
    for _, write in made.values():
        for at in (now, now - DAY):
            write("a", at)
    hits, seen, pages, queue, took = (series for series, _ in made.values())
    start, end = now - 2 * DAY, now + 60
    assert hits.sum("a", start, end) == 600
    assert hits.sums(["a", "b"], start, end) == {"a": 600, "b": 0}
    assert seen.count("a", start, end) == seen.union(["a", "b"], start, end) == 2
    assert pages.top("a", start, end).total == 12
    assert queue.read("a", start, end).count == 2
    assert took.histogram("a", start, end).count == 2
    assert hits.range("a", start, step=DAY).sum() == 600
    assert seen.range("a", start, step=DAY).sum() == 4
    assert queue.range("a", start, step=DAY, of="count").sum() == 2
    assert len(took.range("a", 0.5, start, step=DAY)) >= 3
    with TimeSeries(limited, hits.name, linger=60) as lingering:
        lingering.incr("a")
    assert hits.sum("a", start, end) == 601


def test_the_acl_of_series_on_a_cluster(cluster: Cluster, prefix: str) -> None:
    """The same rights do on a cluster: no node is left out of what is listed."""
    line = re.search(r"^user series on (.*)$", README, re.M)
    assert line is not None
    rights = [*line[1].split(), "+command"]  # which redis-py's own client of a cluster asks for
    with contextlib.ExitStack() as stack:
        for node in cluster.nodes:
            admin = stack.enter_context(node.client())
            admin.execute_command("ACL", "SETUSER", prefix, "reset", "on", *rights)
            stack.callback(admin.execute_command, "ACL", "DELUSER", prefix)
        host, port = cluster.startup_nodes[0]
        user = redis.RedisCluster(host=host, port=port, username=prefix, password="password")
        keys = {f"k{n}" for n in range(20)}
        for series, write in kept(user, prefix).values():
            for key in keys:
                write(key, int(time.time()))
            assert set(series.keys()) == keys
        user.close()


def test_rights_that_are_missing(valkey: Server, prefix: str) -> None:
    """Who may only read is told so by the first write, and nothing is counted."""
    now = time.time()
    TimeSeries(valkey.url, "hits", prefix=prefix, deadline=5).incr("a", 2)
    with valkey.client() as admin:
        rights = ["on", ">password", "~*", "+mget", "+hgetall", "+time", "+ping", "+hello"]
        admin.execute_command("ACL", "SETUSER", prefix, "reset", *rights)
        user = redis.Redis(port=valkey.port, username=prefix, password="password")
        try:
            reader = TimeSeries(user, "hits", prefix=prefix, deadline=5)
            assert reader.sum("a", now - 60) == 2
            with pytest.raises(ServerError, match="NOPERM"):
                reader.incr("a")
            assert reader.sum("a", now - 60) == 2
            user.close()
        finally:
            admin.execute_command("ACL", "DELUSER", prefix)


def test_a_node_that_may_not_be_asked(cluster: Cluster, prefix: str) -> None:
    """Without the right to ask nodes which they are `keys` raises; it leaves none out."""
    with contextlib.ExitStack() as stack:
        for node in cluster.nodes:
            admin = stack.enter_context(node.client())
            words = "reset", "on", ">p", "~*", "+@all", "-cluster|myid"
            admin.execute_command("ACL", "SETUSER", prefix, *words)
            stack.callback(admin.execute_command, "ACL", "DELUSER", prefix)
        host, port = cluster.startup_nodes[0]
        user = redis.RedisCluster(host=host, port=port, username=prefix, password="p")
        series = TimeSeries(user, "hits", prefix=prefix, deadline=5)
        series.incr_many([(f"k{n}", 1) for n in range(40)])
        with pytest.raises(ServerError, match="NOPERM"):
            list(series.keys())
        user.close()
