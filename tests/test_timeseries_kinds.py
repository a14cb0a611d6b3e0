"""Gauges, latencies, distinct and heaviest members, against what a plain list says."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redishacks.errors import ServerError, UsageError
from redishacks.testing import Cluster, Server
from redishacks.timeseries import (
    AsyncDistinctSeries,
    AsyncGaugeSeries,
    AsyncLatencySeries,
    AsyncTopSeries,
    DistinctSeries,
    GaugeSeries,
    Histogram,
    LatencySeries,
    TimeSeries,
    TopSeries,
    _sketch,
)
from redishacks.timeseries.latency import bin_of, edges
from redishacks.timeseries.resolution import DAY, HOUR, MINUTE
from tests.timeseries_kit import clocked

#: A hit, as the test notes it down: when, and what.
Noted = tuple[int, Any]
numbers = itertools.count()


@pytest.fixture(scope="module", params=["redishacks_valkey", "redishacks_redis"])
def server(request: pytest.FixtureRequest) -> Server:
    """A Valkey, and the oldest Redis that is supported."""
    found: Server = request.getfixturevalue(request.param)
    return found


# Any mix of writes, any range


class Story(NamedTuple):
    """How one kind is written and read, and what a list of hits says of the answer."""

    make: Callable[..., Any]
    what: st.SearchStrategy[Any]
    write: Callable[[Any, list[tuple[str, Any, int]]], None]
    read: Callable[[Any, str, int, int], Any]
    check: Callable[[Any, list[Noted]], None]


def check_gauge(found: Any, noted: list[Noted]) -> None:
    """See that a gauge is exactly that of these values; the last goes by their time."""
    values = [value for _, value in noted]
    assert found.count == len(values)
    if not values:
        assert (found.last, found.min, found.max, found.mean) == (None,) * 4
        return
    latest = max(at for at, _ in noted)
    assert found.last == [value for at, value in noted if at == latest][-1]
    assert found.at == latest
    assert (found.min, found.max) == (min(values), max(values))
    assert found.mean == sum(values) / len(values)


def check_histogram(found: Any, noted: list[Noted]) -> None:
    """See that a histogram counts these durations, each within 1 %."""
    durations = sorted(seconds for _, seconds in noted)
    assert found.count == len(durations)
    assert found.bins == Counter(bin_of(round(seconds * 1e6)) for seconds in durations)
    for q in (0, 0.01, 0.5, 0.9, 0.99, 1):
        answer = found.quantile(q)
        if not durations:
            assert answer is None
            continue
        exact = durations[max(0, math.ceil(q * len(durations)) - 1)]
        assert abs(answer - exact) <= 0.01 * exact + 1e-6


def check_distinct(found: Any, noted: list[Noted]) -> None:
    """See that a count is that of the distinct ones, to five times the stated error."""
    exact = len({member for _, member in noted})
    assert abs(found - exact) <= 5 * found.error * exact + 2


def check_top(found: Any, noted: list[Noted]) -> None:
    """See that counts are right within the error that is told, and the error within its bound."""
    exact: Counter[str] = Counter()
    for _, (member, amount) in noted:
        exact[member] += amount
    assert found.total == exact.total()
    assert found.error <= found.total / 6
    if len(exact) <= 10:
        assert found.error == 0
    shown: dict[Any, int] = dict(found)
    for member in exact:
        assert shown.get(member, 0) <= exact[member] <= shown.get(member, 0) + found.error
    assert set(shown) <= set(exact)
    assert [count for _, count in found] == sorted(shown.values(), reverse=True)


STORIES = {
    "gauge": Story(
        GaugeSeries,
        st.sampled_from([0, 1, -5, 300, 2**53 - 1, -(2**53) + 1]),
        lambda series, items: series.set_many(items),
        lambda series, *where: series.read(*where),
        check_gauge,
    ),
    "latency": Story(
        LatencySeries,
        st.one_of(st.sampled_from([0, 1e-6, 0.000_128, 65_000.0]), st.floats(1e-5, 20)),
        lambda series, items: series.record_many(items),
        lambda series, *where: series.histogram(*where),
        check_histogram,
    ),
    "distinct": Story(
        DistinctSeries,
        st.integers(0, 500).map(lambda number: f"m{number}"),
        lambda series, items: series.add_many(items),
        lambda series, *where: series.count(*where),
        check_distinct,
    ),
    "top": Story(
        lambda *args, **options: TopSeries(*args, keep=5, **options),
        st.tuples(st.integers(0, 20).map(lambda number: f"m{number}"), st.integers(1, 9)),
        lambda series, items: series.incr_many((key, *what, at) for key, what, at in items),
        lambda series, *where: series.top(*where, n=100),
        check_top,
    ),
}
#: Short retentions, so that traces get beyond them.
LADDERS = {
    True: [(10, 60), (MINUTE, HOUR), (HOUR, 30 * DAY)],
    False: [(MINUTE, 2 * MINUTE), (10 * MINUTE, HOUR), (HOUR, 10 * DAY)],
}
BACK = st.one_of(st.integers(0, 100), st.integers(0, 2 * HOUR), st.integers(0, 40 * DAY))


@pytest.mark.parametrize("kind", STORIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_answers_agree_with_a_list(redishacks_valkey: Server, kind: str, data: Any) -> None:
    """Late and back-dated hits, retentions and gaps: an answer is of what it says it covers."""
    story = STORIES[kind]
    pairs = data.draw(st.sampled_from([None, LADDERS[kind == "gauge"]]))
    series = clocked(story.make(redishacks_valkey.url, f"{kind}{next(numbers)}", resolutions=pairs))
    hits: dict[str, list[Noted]] = {"a": [], "b": []}
    for _ in range(data.draw(st.integers(2, 8))):
        series.clock += data.draw(st.sampled_from([0, 1, MINUTE, HOUR, DAY]))
        now = series.clock
        some = data.draw(
            st.lists(st.tuples(st.sampled_from("ab"), story.what, BACK), min_size=1, max_size=30)
        )
        items = [(key, what, now - back) for key, what, back in some]
        rungs = series.layout.rungs or ()
        kept = [
            item for item in items if not rungs or rungs[-1].ends(rungs[-1].pack(item[2])) > now
        ]
        try:
            story.write(series, kept)
        except UsageError:  # the first time nobody knows what is kept
            assert not rungs
            continue
        for key, what, at in kept:
            hits[key].append((at, what))
        for _ in range(2):
            key, start = data.draw(st.sampled_from("ab")), now - data.draw(BACK)
            end = start + data.draw(st.sampled_from([1, MINUTE, HOUR, DAY]))
            found = story.read(series, key, start, end)
            within = [hit for hit in hits[key] if found.start <= hit[0] < found.end]
            story.check(found, within)
            if found.complete:
                assert found.start <= start
                assert found.end >= min(end, now)
    with redishacks_valkey.client() as raw:
        for stored in raw.scan_iter(f"rh:t1:{{{series.name}/*:s:*"):
            assert raw.ttl(stored) > 0


@pytest.mark.parametrize("kind", STORIES)
def test_lingering_hits_are_the_same(server: Server, kind: str, prefix: str) -> None:
    """What lingers comes to what comes at once."""
    story, rng = STORIES[kind], random.Random(kind)
    now = int(time.time()) - HOUR
    things: dict[str, list[Any]] = {
        "gauge": [1, 7, -3],
        "latency": [0.01, 0.5],
        "distinct": ["x", "y", "z"],
        "top": [("x", 1), ("y", 3)],
    }
    items = [(rng.choice("ab"), rng.choice(things[kind]), now + i // 10) for i in range(300)]
    with story.make(server.url, kind, prefix=prefix, linger=60) as series:
        story.write(series, items[:150])
        series.send()
        story.write(series, items[150:])
    for key in "ab":
        found = story.read(series, key, now - 10, now + 60)
        story.check(found, [(at, what) for name, what, at in items if name == key])


# Each kind's own


def test_points_of_gauges(server: Server, prefix: str) -> None:
    """A point shows what was asked for; where nothing was set it is None."""
    series = GaugeSeries(server.url, "queue", prefix=prefix)
    now = int(time.time()) // HOUR * HOUR - HOUR
    for at, value in ((0, 4), (5, 6), (12, 1), (9, 2), (8, 100)):
        series.set("a", value, at=now + at)
    expected = {"last": [2, 1], "min": [2, 1], "max": [100, 1], "mean": [28, 1], "count": [4, 1]}
    for of, values in expected.items():
        points = series.range("a", now, now + 30, step=10, of=of)  # type: ignore[arg-type]
        assert list(points.values) == [*values, None]
        whole = series.range("a", now, now + 30, step=60, of=of)  # type: ignore[arg-type]
        assert len(whole) == 1
    with pytest.raises(UsageError, match="of is one of last, min, max, mean, count"):
        series.range("a", now, step=10, of="sum")  # type: ignore[arg-type]


def test_a_gauge_of_now_is_the_last(server: Server, prefix: str) -> None:
    """Without a time it is the server's; several at once come in their order."""
    for linger in (None, 60):
        with GaugeSeries(server.url, "queue", prefix=prefix, linger=linger) as series:
            series.set("a", 3, at=time.time() - 100)
            series.set("a", 4)
            series.set_many([("a", 5), ("a", 6)])
            series.set("a", 7, at=time.time() - 100)
        found = series.read("a", time.time() - 200)
        assert found.last == 6
        assert found.at is not None
        assert abs(found.at - time.time()) < 20


def test_gauges_of_a_scale(server: Server, prefix: str) -> None:
    """Decimals are exact; who says another scale is refused, and so are floats."""
    series = GaugeSeries(server.url, "prices", prefix=prefix, scale=2)
    for value in (Decimal("0.01"), Decimal("-3.5"), 2, Decimal("1E+2")):
        series.set("a", value)
    found = series.read("a", time.time() - 60)
    assert (found.last, found.min, found.max) == (100, Decimal("-3.50"), 100)
    assert found.mean == Decimal("98.51") / 4
    assert isinstance(found.last, Decimal)
    tiny = Decimal("1.0000000000000000000000000000000001")
    for wrong in (0.5, Decimal("0.001"), tiny, Decimal("NaN"), Decimal("Inf"), True, 2**53, "1"):
        with pytest.raises(UsageError, match="a Decimal of at most 2 places"):
            series.set("a", wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="in use with scale: 2"):
        GaugeSeries(server.url, "prices", prefix=prefix).set("a", 1)
    with pytest.raises(UsageError, match="scale is how many"):
        GaugeSeries(server.url, "prices", prefix=prefix, scale=16)


def test_the_sum_of_a_gauge_is_exact(server: Server, prefix: str) -> None:
    """Beyond 2^53 too; what would pass 2^63 is refused, and nothing is noted."""
    series = GaugeSeries(server.url, "big", prefix=prefix)
    now, most = time.time() - HOUR, 2**53 - 1
    for _ in range(3):
        series.set_many([("a", most, now)] * 300)
    assert series.read("a", now - 60, now + 60).mean == most
    with pytest.raises(UsageError, match="would pass 2\\^63"):
        series.set_many([("a", most, now), ("b", 1, now)] * 200)
    assert series.read("a", now - 60, now + 60).count == 900
    assert series.read("b", now - 60, now + 60).count == 0


def test_bins_are_exact_to_one_percent() -> None:
    """Each duration is in a bin whose middle is at most 0.8 % off, and bins follow each other."""
    end = 0
    for number in range(bin_of(2**36 - 1) + 1):
        low, beyond = edges(number)
        assert low == end
        end = beyond
        assert bin_of(low) == bin_of(beyond - 1) == number
        assert (low + beyond - 1) / 2 - low <= 0.0079 * low
    assert end == 2**36


def test_quantiles_are_of_nearest_rank() -> None:
    """A share that is a whole number of things is that number, whatever floats make of it."""
    found = Histogram(dict.fromkeys(range(1, 101), 1), 0, 0, 0, True)
    for q in range(1, 101):
        assert found.quantile(q / 100) == pytest.approx(q / 1e6)
    assert found.quantile(0) == pytest.approx(1e-6)
    for wrong in (-0.1, 1.1, math.nan, True, "0.5"):
        with pytest.raises(UsageError, match="a share from 0 to 1"):
            found.quantile(wrong)  # type: ignore[arg-type]


def test_histograms_add_up(server: Server, prefix: str) -> None:
    """Those of several series are that of all."""
    series = LatencySeries(server.url, "took", prefix=prefix)
    now = time.time()
    series.record_many([("a", 0.1), ("a", dt.timedelta(milliseconds=200)), ("b", 3)])
    both = series.histograms(["a", "b", "none"], now - HOUR)
    whole = both["a"] + both["b"] + both["none"]
    assert whole.count == 3
    assert whole.max == pytest.approx(3, rel=0.01)
    assert whole.mean == pytest.approx(1.1, rel=0.01)
    assert (both["none"].mean, both["none"].max, both["none"].quantile(0.5)) == (None, None, None)
    for wrong in (-1, 70_000, math.nan, math.inf, True, "1"):
        with pytest.raises(UsageError, match="a duration is seconds or a timedelta"):
            series.record("a", wrong)  # type: ignore[arg-type]
    assert whole.count == sum(series.today(key, dt.UTC).count for key in "ab") or _near_midnight()


def _near_midnight() -> bool:
    return time.time() % DAY < 60


def test_points_of_latencies(server: Server, prefix: str) -> None:
    """Each is a quantile of its own; one without durations is None."""
    series = LatencySeries(server.url, "took", prefix=prefix)
    now = int(time.time()) // HOUR * HOUR - 2 * HOUR
    series.record_many([("a", 1.0, now), ("a", 9.0, now + MINUTE), ("a", 2.0, now + HOUR)])
    for step, expected in ((600, [9.0, *[None] * 5, 2.0]), (HOUR, [9.0, 2.0])):
        points = series.range("a", 1, now, now + HOUR + 1, step=step)
        assert [None if value is None else round(value, 1) for value in points.values] == expected


@pytest.mark.parametrize("many", [0, 1, 10, 300, 3_000, 60_000])
def test_a_union_here_is_that_of_the_server(server: Server, prefix: str, many: int) -> None:
    """HyperLogLogs that are united in the process come to what PFCOUNT says, sparse or dense."""
    with server.client() as raw:
        keys = [f"{prefix}:{i}" for i in range(3)]
        for i, key in enumerate(keys):
            for start in range(0, many, 1000):
                raw.pfadd(key, *(f"{(start + j) * (i + 1)}" for j in range(1000)))
        stored = [raw.get(key) for key in keys]
        here = _sketch.united(map(_sketch.registers, stored))
        assert _sketch.estimate(here) == raw.pfcount(*keys)
        raw.delete(*keys)


@pytest.mark.parametrize(
    "raw", [b"", b"HYLL", b"x" * 20, b"HYLL\2" + bytes(20), b"HYLL" + bytes(99)]
)
def test_what_is_no_sketch(raw: bytes) -> None:
    """It is refused, not counted."""
    with pytest.raises(ServerError):
        _sketch.registers(raw)


def test_unions_over_partitions(cluster: Cluster, server: Server, prefix: str) -> None:
    """On a cluster series are in several slots: their union is the same."""
    client = cluster.client()
    spread = DistinctSeries(client, "seen", prefix=prefix)
    whole = DistinctSeries(server.url, "seen", prefix=prefix)
    now = time.time()
    for series in (spread, whole):
        series.add_many(
            (key, f"{key if i % 2 else 'all'}{i}") for key in "abcdef" for i in range(200)
        )
    assert spread.union(list("abcdef"), now - 60) == whole.union(list("abcdef"), now - 60)
    assert abs(spread.union(list("abcdef"), now - 60) - 700) < 30
    assert spread.counts(list("ab"), now - 60) == whole.counts(list("ab"), now - 60)
    assert spread.range("a", now, step=600).sum() == whole.range("a", now, step=600).sum()
    client.close()


def test_points_of_distinct_members(server: Server, prefix: str) -> None:
    """Who is there in several buckets of a point is counted once."""
    series = DistinctSeries(server.url, "seen", prefix=prefix)
    now = int(time.time()) // DAY * DAY - DAY
    series.add("a", "x", "y", at=now)
    series.add("a", "x", at=now + 600)
    series.add("a", "x", "z", at=now + HOUR)
    assert list(series.range("a", now, now + 2 * HOUR, step=600).values[:7]) == [
        2,
        1,
        0,
        0,
        0,
        0,
        2,
    ]
    assert list(series.range("a", now, now + 2 * HOUR, step=HOUR).values) == [2, 2]
    assert list(series.range("a", now, now + 2 * HOUR, step=2 * HOUR).values) == [3]
    assert list(series.range("b", now, now + 2 * HOUR, step=HOUR).values) == [0, 0]


def test_who_is_heavy_is_found(server: Server, prefix: str) -> None:
    """However many light ones there are between; memory does not grow with them."""
    series = TopSeries(server.url, "pages", prefix=prefix, keep=20)
    rng, at = random.Random(5), int(time.time()) // DAY * DAY - DAY
    exact: Counter[str] = Counter()
    for _ in range(10):
        items = []
        for _ in range(500):
            weighty = rng.random() < 0.5
            member = f"heavy{rng.randrange(5)}" if weighty else f"light{rng.randrange(10_000)}"
            exact[member] += 1
            items.append(("site", member, 1, at))
        series.incr_many(items)
    top = series.top("site", at, at + HOUR, n=5)
    assert {str(name) for name, _ in top} == {f"heavy{i}" for i in range(5)}
    assert 0 < top.error <= top.total / 21
    for heavy, count in top:
        assert count <= exact[str(heavy)] <= count + top.error
    with server.client() as raw:
        for key in raw.scan_iter(f"{prefix}:t1:{{pages/0}}:s:*"):
            assert raw.hlen(key) <= 41
            assert raw.object("encoding", key) in (b"listpack", b"ziplist")
            assert raw.ttl(key) > 0


def test_amounts_of_members_are_exact(server: Server, prefix: str) -> None:
    """To 2^53 for all members of a bucket; more is refused, and nothing is added."""
    series, now = TopSeries(server.url, "pages", prefix=prefix), time.time()
    series.incr("a", "x", 2**53 - 10)
    with pytest.raises(UsageError, match="all members would pass 2\\^53"):
        series.incr_many([("a", "y", 5), ("a", "z", 5)])
    series.incr("a", b"\xff", 9)
    top = series.top("a", now - HOUR)
    assert list(top) == [("x", 2**53 - 10), (b"\xff", 9)]
    assert (top.total, top.error, top[0], top[:1]) == (2**53 - 1, 0, top.members[0], [top[0]])
    for wrong in (0, -1, 2**53, 1.5, True):
        with pytest.raises(UsageError, match="a positive int"):
            series.incr("a", "x", wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="n is how many"):
        series.top("a", now, n=0)
    with pytest.raises(UsageError, match="keep is how many"):
        TopSeries(server.url, "pages", keep=0)
    with pytest.raises(UsageError, match="in use with keep: 100"):
        TopSeries(server.url, "pages", prefix=prefix, keep=5).incr("a", "x")


@pytest.mark.parametrize("kind", STORIES)
def test_a_name_is_of_one_kind(server: Server, kind: str, prefix: str) -> None:
    """Whoever takes it for another is refused, and nothing is written."""
    TimeSeries(server.url, "hits", prefix=prefix).incr("a")
    story = STORIES[kind]
    now = int(time.time())
    what = {"gauge": 1, "latency": 1.0, "distinct": "x", "top": ("x", 1)}[kind]
    with pytest.raises(UsageError, match="in use with kind: sum"):
        story.write(story.make(server.url, "hits", prefix=prefix), [("a", what, now)])


@pytest.mark.parametrize("kind", STORIES)
def test_wrong_items(server: Server, kind: str, prefix: str) -> None:
    """What is no item is said to be none, with the form that is wanted."""
    series = STORIES[kind].make(server.url, "wrong", prefix=prefix)
    many = {
        "gauge": "set_many",
        "latency": "record_many",
        "distinct": "add_many",
        "top": "incr_many",
    }[kind]
    for wrong in ("a", ("a",), ("a", 1, 2, 3, 4)):
        with pytest.raises(UsageError, match=many):
            getattr(series, many)([wrong])


def test_all_kinds_in_a_loop(server: Server, prefix: str) -> None:
    """The async twins do the same."""

    async def run() -> None:
        url, now = server.url, time.time()
        gauge = AsyncGaugeSeries(url, "gauge", prefix=prefix)
        await gauge.set("a", 5)
        await gauge.set_many([("a", 7), ("b", 1)])
        assert (await gauge.read("a", now - HOUR)).max == 7
        both = await gauge.reads(["a", "b"], now - HOUR)
        assert {key: one.last for key, one in both.items()} == {"a": 7, "b": 1}
        assert (await gauge.range("a", now, step=DAY, of="count")).sum() == 2
        assert (await gauge.explain("a", now)).bytes > 0
        took = AsyncLatencySeries(url, "took", prefix=prefix)
        await took.record("a", 0.5)
        await took.record_many([("a", 1.5), ("b", 2)])
        assert (await took.histogram("a", now - HOUR)).count == 2
        assert await took.quantile("a", 0.5, now - HOUR) == pytest.approx(0.5, rel=0.01)
        assert len(await took.histograms(list("ab"), now - HOUR)) == 2
        assert len(await took.range("a", 0.5, now, step=600)) >= 1
        seen = AsyncDistinctSeries(url, "seen", prefix=prefix)
        await seen.add("a", "x", "y")
        await seen.add_many([("a", "x"), ("b", "x")])
        assert await seen.count("a", now - HOUR) == 2
        assert await seen.counts(list("ab"), now - HOUR) == {"a": 2, "b": 1}
        assert await seen.union(list("ab"), now - HOUR) == 2
        assert (await seen.range("a", now, step=DAY)).sum() == 2
        async with AsyncTopSeries(url, "pages", prefix=prefix, linger=60) as pages:
            await pages.incr("a", "x", 5)
            await pages.incr_many([("a", "y", 7)])
        assert list(await pages.top("a", now - HOUR)) == [("y", 7), ("x", 5)]
        assert list(await pages.tops(["a"], now - HOUR, n=1)) == ["a"]
        for today in (gauge.today("a"), took.today("a"), seen.today("a"), pages.today("a")):
            assert (await today).end > now

    asyncio.run(run())
