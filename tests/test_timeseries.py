"""Time series against a plain dictionary, at moments of our choice; and what is refused."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import math
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redishacks._command import Command, script
from redishacks._transport import connect
from redishacks.errors import (
    MaybeAppliedError,
    PartlyAppliedError,
    RetentionError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.testing import Cluster, FaultProxy, Server
from redishacks.timeseries import AsyncTimeSeries, Resolution, TimeSeries, _calendar
from redishacks.timeseries._packing import Packed, spread
from redishacks.timeseries.plan import plan
from redishacks.timeseries.resolution import COARSE, DAY, DEFAULT, HOUR, MINUTE, Rung, ladder
from tests.helpers import eventually
from tests.timeseries_kit import clocked

#: Some ladders: the usual one, one with short retentions, one that packs otherwise.
LADDERS = [
    ladder(DEFAULT),
    ladder([(10, 60), (MINUTE, HOUR), (HOUR, 30 * DAY)]),
    ladder([(1, 100), (7, 200), (7 * 720, 10_000), (7 * 7200, 10_000_000)]),
    ladder([(1, 100), (DAY, 30 * DAY)]),
]
#: Some of a key per bucket.
LOOSE = [
    ladder(COARSE, packed=False),
    ladder([(MINUTE, 2 * MINUTE), (10 * MINUTE, HOUR), (HOUR, 10 * DAY)], packed=False),
]
#: One whose coarser resolutions were added later.
GROWN = tuple(rung._replace(since=1_799_971_200 if rung.step >= HOUR else 0) for rung in LADDERS[0])


# The planner


def finest(rungs: Sequence[Rung], moment: int, now: int) -> int:
    """Return the step of the finest resolution that has a bucket for a moment; 0 for none."""
    for rung in rungs:
        begins = moment // rung.step * rung.step
        ends = (begins // rung.group + 1) * rung.group + rung.retention
        if ends > now and begins >= rung.since:
            return rung.step
    return 0


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([*LADDERS, *LOOSE, GROWN]),
    st.one_of(st.integers(1_700_000_000, 1_900_000_000), st.just(1_800_000_000)),
    st.integers(0, 2_000_000_000),
    st.integers(0, 400 * DAY),
    st.booleans(),
)
def test_a_plan_covers_the_range(
    rungs: tuple[Rung, ...], now: int, back: int, length: int, near: bool
) -> None:
    """Tiles follow each other without a gap, exist, and reach no farther than they must."""
    start = now - (back % (3 * DAY) if near else back % (2200 * DAY))
    end = start + (length % (2 * DAY) if near else length)
    made = plan(rungs, start, end, now)
    position = made.start
    for tile in made.tiles:
        assert tile.start == position
        position = tile.end
        assert 0 <= tile.first < tile.last <= tile.rung.buckets
        assert tile.rung.ends(tile.pack) > now, "it has expired"
        assert tile.start >= tile.rung.since, "it was not there yet"
    assert position == made.end
    last = min(end, (now // rungs[0].step + 1) * rungs[0].step)
    if last <= start:
        assert not made.tiles
        return
    step = finest(rungs, start, now)
    if step:
        assert made.start == start // step * step
    else:
        assert made.start >= start or not made.tiles
        assert not made.complete
    step = finest(rungs, last - 1, now)
    if step:
        assert made.end == -(-last // step) * step
    whole = made.start > start - rungs[0].step and made.end < last + rungs[0].step
    assert made.complete == (whole and made.start <= start)


def test_few_values_for_any_range() -> None:
    """60 up to a day, 110 up to 30 days, and 450 in 12 keys up to a year, wherever it begins."""
    rng = random.Random(1)
    now = 1_795_000_123
    forever = tuple(rung._replace(retention=4000 * DAY) for rung in LADDERS[0])
    for days, most in ((1, 60), (30, 110), (365, 450)):
        for _ in range(2_000):
            start = now - rng.randrange(1000 * DAY) - days * DAY
            made = plan(forever, start, start + rng.randrange(1, days * DAY + 1), now)
            assert made.values <= most
            assert made.keys <= 12


def test_a_plan_is_shown(series: TimeSeries) -> None:
    """What is read, line by line in the order of time."""
    at = int(time.time()) // HOUR * HOUR - 30 * HOUR
    series.incr("a", at=at)
    first, *lines = str(series.explain("a", at + 50, at + 3 * HOUR)).splitlines()
    assert re.fullmatch(r"\d+ values in \d+ keys, \d+ bytes", first)
    begins, ends = (
        f"{dt.datetime.fromtimestamp(when, dt.UTC):%Y-%m-%d %H:%M:%S}"
        for when in (at + 50, at + 3 * HOUR)
    )
    assert lines[0].startswith(begins)
    assert lines[0].endswith("    1 of 10 s")
    assert lines[-1].endswith(f"{ends}    2 of 3600 s")


# Packed keys


@pytest.fixture(scope="module", params=["redishacks_valkey", "redishacks_redis"])
def server(request: pytest.FixtureRequest) -> Server:
    """A Valkey, and the oldest Redis that is supported."""
    found: Server = request.getfixturevalue(request.param)
    return found


AMOUNTS = [
    st.integers(1, 3),
    st.integers(0, 300),
    st.integers(-5, 70_000),
    st.integers(2**31, 2**33),
    st.integers(-(2**53) + 1, 2**53 - 1),
]


#: No fence, any time, the clock of the server, one key.
_FRAME = ("", "0", str(2**53), "", "1", "60")


@settings(max_examples=150, deadline=None)
@given(
    buckets=st.sampled_from([1, 7, 8, 9, 360, 361]),
    kinds=st.lists(st.sampled_from(AMOUNTS), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_packed_key_is_a_dictionary(
    server: Server, buckets: int, kinds: list[Any], data: st.DataObject
) -> None:
    """Whatever is added where and in which order, one by one or together."""
    transport = connect(server.url)
    key = f"packed:{next(numbers)}".encode()
    expected: dict[int, int] = {}
    far = str(int(time.time()) + 1000)
    for kind in kinds:
        hits = data.draw(st.lists(st.tuples(st.integers(0, buckets - 1), kind), max_size=20))
        for size in (1, len(hits)):
            for start in range(0, len(hits), max(1, size)):
                some = hits[start : start + size]
                words = tuple(str(word) for hit in some for word in hit)
                args: tuple[str, ...] = (*_FRAME, str(-(-buckets // 8)), far)
                args += (str(len(some)), *words)
                command: Command[Any] = Command(args, (key,), script=script("series_add"))
                assert transport.call(command, 5.0)[0] == 1
                for place, amount in some:
                    expected[place] = expected.get(place, 0) + amount
    cleared = data.draw(st.lists(st.integers(0, buckets - 1), unique=True, max_size=20))
    for place in cleared:
        amount = -expected.get(place, 0)
        if abs(amount) < 2**53:
            args = (*_FRAME, str(-(-buckets // 8)), far, "1", str(place), f"{amount}!")
            command = Command(args, (key,), script=script("series_add"))
            assert transport.call(command, 5.0)[0] == 1
            expected.pop(place, None)
    stored: Command[bytes] = Command(("GET", key), (key,))
    packed = Packed(transport.call(stored, 5.0), buckets)
    assert list(spread([(packed, 0, buckets)])) == [expected.get(i, 0) for i in range(buckets)]
    first = data.draw(st.integers(0, buckets - 1))
    last = data.draw(st.integers(first + 1, buckets))
    some_values = [expected[i] for i in range(first, last) if i in expected]
    assert list(packed.values(first, last)) == some_values
    assert list(spread([(packed, first, last)])) == [expected.get(i, 0) for i in range(first, last)]
    assert packed.present(first, last) == "".join(
        str(int(i in expected)) for i in range(first, last)
    )


numbers = itertools.count()


@pytest.mark.parametrize("text", [b"\x03", b"\x01", b"\x01\x00", b"hello world", b"\x02\x80\x00"])
def test_a_key_that_is_no_packed_one(text: bytes) -> None:
    """What somebody else wrote there is an error, not a number."""
    with pytest.raises(ServerError, match="no packed series"):
        Packed(text, 9)


def test_all_or_nothing_at_the_limit(server: Server) -> None:
    """A sum that would pass 2^63 in a coarse bucket leaves the fine ones as they were."""
    name = f"limit{next(numbers)}"
    series = TimeSeries(server.url, name, resolutions=[(10, HOUR), (MINUTE, HOUR)])
    now = int(time.time()) // 60 * 60 - 60
    series.incr("a", 2**53 - 1, at=now)
    with server.client() as raw:
        (coarse,) = list(raw.scan_iter(f"rh:t1:{{{name}/0}}:s:a:60:*"))
        stored: Any = raw.get(coarse)
        raw.set(coarse, stored[:-8] + (2**63 - 5).to_bytes(8, "big"), keepttl=True)
    with pytest.raises(UsageError, match=r"would pass 2\^63; nothing was added"):
        series.incr("a", 7, at=now)
    assert series.range("a", now, now + 10, step=10).values == [2**53 - 1]
    series.incr("a", 4, at=now)
    assert series.sum("a", now, now + 60) == 2**63 - 1
    assert series.sum("a", now, now + 10) == 2**53 + 3


# The whole, by a clock of ours


#: Seconds from now of a hit or a range, and steps of the clock.
BACK = st.one_of(st.integers(0, 100), st.integers(0, 3 * DAY), st.integers(0, 2000 * DAY))
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["hit", "hit", "hit", "now", "many", "sum", "sum", "range"]),
        BACK,
        BACK,
        st.sampled_from([1, 2, -1, 300, 70_000, -(2**40)]),
        st.sampled_from([0, 0, 1, 10, HOUR, DAY, 2 * DAY, 40 * DAY]),
        st.sampled_from("ab"),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(rungs=st.sampled_from(LADDERS), events=EVENTS)
def test_sums_agree_with_a_dictionary(
    redishacks_valkey: Server, rungs: tuple[Rung, ...], events: Any
) -> None:
    """Late and back-dated hits, retentions and gaps: a total is the sum of what it says it covers,
    and reaches no farther than it must.
    """
    pairs = [(rung.step, rung.retention) for rung in rungs]
    series: Any = clocked(
        TimeSeries(redishacks_valkey.url, f"trace{next(numbers)}", resolutions=pairs)
    )
    hits: dict[str, Counter[int]] = {"a": Counter(), "b": Counter()}
    step = rungs[0].step

    def expected(key: str, start: int, end: int) -> int:
        return sum(amount for at, amount in hits[key].items() if start <= at < end)

    for what, back, length, amount, passes, key in events:
        series.clock += passes
        now = series.clock
        at = now - back
        if what == "now":
            series.incr(key, amount)
            hits[key][now] += amount
        elif what in ("hit", "many"):
            some = [(key, amount, at)] if what == "hit" else [(key, 1, at), ("b", amount, now)]
            if rungs[-1].ends(rungs[-1].pack(at)) <= now:
                with pytest.raises(UsageError, match="older than all that is kept"):
                    series.incr_many(some)
                continue
            series.incr_many(some)
            for name, each, moment in some:
                hits[name][moment] += each
        elif what == "sum":
            end = min(at + length, now + 5)
            total = series.sum(key, at, end)
            assert total == expected(key, total.start, total.end)
            if total.complete:
                assert at - step < total.start <= at
                assert total.end >= min(end, now)
        else:
            place = min(1, len(rungs) - 1)
            size = rungs[place].step
            points = series.range(key, max(at, now - 500 * size), now + 1, step=size)
            for begins, value in points:
                if value is not None:
                    assert value == expected(key, begins, begins + size)
                else:
                    assert begins < rungs[place].horizon(now) or begins > now
    with redishacks_valkey.client() as raw:
        for stored in raw.scan_iter(f"rh:t1:{{{series.name}/*:s:*"):
            assert raw.ttl(stored) > 0


# Now, by the server's clock


@pytest.fixture
def url(valkey: Server) -> str:
    """The session's server."""
    return valkey.url


@pytest.fixture
def series(url: str, prefix: str) -> Iterator[TimeSeries]:
    """A series of its own."""
    with TimeSeries(url, "hits", prefix=prefix) as made:
        yield made


def test_today(series: TimeSeries) -> None:
    """The talk's count_hits_today, for a local day."""
    for zone in ("UTC", "America/Recife", "Asia/Kathmandu", dt.UTC):
        before = series.today("p", zone)
        series.incr("p", 2)
        total = series.today("p", zone)
        assert total - before == 2
        local = dt.datetime.now(_calendar.zone(zone))
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0)
        assert total.start == midnight.timestamp()
        assert total.complete
        assert total.resolution == 10


def test_many_series_in_one_round_trip(series: TimeSeries, url: str, prefix: str) -> None:
    """`sums` asks once, whatever their number."""
    told: list[str] = []
    watched = TimeSeries(url, "hits", prefix=prefix, on_command=lambda name, *_: told.append(name))
    now = time.time()
    series.incr_many((f"k{n}", n + 1, now - 60) for n in range(100))
    watched.sum("k0", now - 100)
    told.clear()
    totals = watched.sums([f"k{n}" for n in range(100)] + ["none"], now - DAY / 2)
    assert told == ["MGET", "TIME"]
    assert totals == {f"k{n}": n + 1 for n in range(100)} | {"none": 0}


def test_a_total_says_what_it_covers(series: TimeSeries) -> None:
    """It is an int; strictly asked, what is no more there is an error."""
    now = int(time.time())
    series.incr("a", 5, at=now - 5 * DAY)
    total = series.sum("a", now - 5 * DAY - 30, now - 5 * DAY + 30)
    assert isinstance(total, int)
    assert not total.complete
    assert total.resolution == MINUTE
    assert (total.start % MINUTE, total.end % MINUTE) == (0, 0)
    with pytest.raises(RetentionError):
        series.sum("a", now - 5 * DAY - 30, now - 5 * DAY + 33, strict=True)
    assert series.sum("a", now - HOUR, strict=True) == 0


def test_lingering_hits(url: str, prefix: str) -> None:
    """They belong to the bucket in which they were counted, and are there after `close`."""
    now = time.time()
    with TimeSeries(url, "hits", prefix=prefix, linger=60) as series:
        for _ in range(1000):
            series.incr("a")
        series.incr("a", 5, at=now - HOUR)
        series.incr(b"\xff", 3)
        series.incr_many([("a", 2, now - HOUR), ("b", -1)])
        assert series.sum("a", now - 60) == 0
    assert series.sum("a", now - 60, now + 60) == 1000
    assert series.sum("a", now - HOUR - 20, now - HOUR + 20) == 7
    assert series.sums([b"\xff", "b"], now - 60) == {b"\xff": 3, "b": -1}


def test_lingering_hits_of_other_moments(url: str, prefix: str) -> None:
    """Those of one bucket are merged, and those of others are not."""
    now = int(time.time()) // 100 * 100 - 200
    with TimeSeries(url, "hits", prefix=prefix, linger=60) as series:
        for _ in range(2):  # before the resolutions are known, and after
            for at in range(now, now + 100):
                series.incr("a", at, at=at)
            series.send()
    points = series.range("a", now, now + 100, step=10)
    assert points.values == [2 * sum(range(at, at + 10)) for at in range(now, now + 100, 10)]


def test_a_series_name_that_is_too_long(url: str, prefix: str) -> None:
    """It is refused at once, lingering or not."""
    for linger in (None, 60):
        with TimeSeries(url, "hits", prefix=prefix, linger=linger) as series:
            series.incr("a" * 2048)
            with pytest.raises(UsageError, match="2048"):
                series.incr("a" * 2049)


def test_lingering_hits_far_in_the_future(url: str, prefix: str) -> None:
    """They are refused by the call that brings them; with many, none of them is counted."""
    now = time.time()
    with TimeSeries(url, "hits", prefix=prefix, linger=60) as series:
        series.incr("a")
        series.send()
        with pytest.raises(UsageError, match="future"):
            series.incr("a", at=now + HOUR)
        with pytest.raises(UsageError, match="future"):
            series.incr_many([("a", 5), ("b", 1, now + HOUR)])
    assert series.sum("a", now - 60, now + 60) == 1


def test_amounts_that_are_together_more_than_a_double_holds(url: str, prefix: str) -> None:
    """They are added exactly, though Lua's numbers end at 2^53."""
    now, most = time.time(), 2**53 - 1
    for key, linger in (("a", None), ("b", 60)):
        with TimeSeries(url, "hits", prefix=prefix, linger=linger) as series:
            series.incr_many([(key, most, now - 60 - 10 * i) for i in range(4)])
            series.incr_many(
                [(key, -most, now - DAY), (key, -most, now - DAY), (key, 3, now - DAY)]
            )
        assert series.sum(key, now - HOUR, now) == 4 * most
        assert series.sum(key, now - 30 * HOUR, now) == 2 * most + 3


def test_a_full_buffer_says_which_series_were_not_counted(proxy: FaultProxy, prefix: str) -> None:
    """Of many that came at once the first few may have been taken."""
    with TimeSeries(proxy.url, "hits", prefix=prefix, linger=60, max_buffered=2) as series:
        proxy.stall()
        now = time.time()
        with pytest.raises(PartlyAppliedError) as raised:
            series.incr_many([(f"k{n}", 1, now) for n in range(5)])
        assert set(raised.value.failed) == {"k2", "k3", "k4"}
        proxy.resume()
    assert series.sums([f"k{n}" for n in range(5)], now - 60) == {
        "k0": 1, "k1": 1, "k2": 0, "k3": 0, "k4": 0,
    }  # fmt: skip


@pytest.mark.parametrize("off", [-HOUR, HOUR])
def test_a_clock_that_is_wrong(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    """Hits that linger from before the server was heard are put where its clock says."""
    now, real = time.time(), time.time
    monkeypatch.setattr("redishacks.timeseries.commands.time.time", lambda: real() + off)
    with TimeSeries(url, "hits", prefix=prefix, linger=60) as series:
        series.incr("a")
        series.incr_many([("a", 2)])
        series.send()
        series.incr("a", 4)
    plain = TimeSeries(url, "hits", prefix=prefix)
    plain.incr("a", 8)
    monkeypatch.undo()
    assert TimeSeries(url, "hits", prefix=prefix).sum("a", now - 30, now + 30) == 15


@pytest.mark.parametrize(("off", "at"), [(-0.4, 1000), (0.4, 1000), (-3600.2, -2600)])
def test_the_way_to_a_server_is_no_wrong_clock(series: TimeSeries, off: float, at: int) -> None:
    """A part of a second puts no hit into the bucket before, or after."""
    series.layout.off = off
    assert series.layout.uncounted(b"~1000:1:a", (1,)).time == at


def test_points_that_are_yet_to_come(series: TimeSeries) -> None:
    """They have no value; the one that is running is partial."""
    series.incr("a", 3)
    now = int(time.time())
    points = series.range("a", now - 60, now + 3 * HOUR, step=10)
    assert len(points) > 1000
    for begins, value in points:
        if begins > now + 20:
            assert value is None
        elif begins <= now:
            assert value in (0, 3)
    assert points.sum() == 3
    assert points.last_partial
    assert points.complete


def test_a_lost_reply(proxy: FaultProxy, prefix: str) -> None:
    """Without linger the caller is told, and nothing is repeated; with it a repeat counts once."""
    now = time.time()
    plain = TimeSeries(proxy.url, "hits", prefix=prefix)
    plain.incr("a")
    proxy.drop_reply(of="EVALSHA")
    with pytest.raises(MaybeAppliedError):
        plain.incr("a")
    assert plain.sum("a", now - 60) == 2
    lingering = TimeSeries(proxy.url, "hits", prefix=prefix, linger=60)
    for n in range(6):
        lingering.incr("b")
        getattr(proxy, ("drop_reply", "drop_request")[n % 2])(of="EVALSHA")
        eventually(lambda: _sent(lingering))
    lingering.close()
    assert lingering.sum("b", now - 60) == 6


def _sent(series: TimeSeries) -> bool:
    try:
        series.send()
    except (MaybeAppliedError, UnavailableError):
        return False
    return True


def test_writers_at_the_same_time(url: str, prefix: str) -> None:
    """Of threads that add to the same buckets while values grow wider nothing is lost."""
    now = int(time.time())
    expected: Counter[int] = Counter()
    guard = threading.Lock()

    def add(seed: int) -> None:
        rng = random.Random(seed)
        series = TimeSeries(url, "hits", prefix=prefix)
        for _ in range(60):
            at, amount = now - rng.randrange(200), rng.choice([1, 200, 60_000, 2**32, -7])
            series.incr("a", amount, at=at)
            with guard:
                expected[at // 10 * 10] += amount

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    series = TimeSeries(url, "hits", prefix=prefix)
    for begins, value in series.range("a", now - 300, now, step=10):
        assert value == expected[begins]
    assert series.sum("a", now - 2 * HOUR) == sum(expected.values())


def test_on_a_cluster(cluster: Cluster, prefix: str) -> None:
    """Series are spread over partitions, and read from all of them at once."""
    client = cluster.client()
    series = TimeSeries(client, "hits", prefix=prefix)
    now = time.time()
    series.incr_many([(f"k{n}", 1, now) for n in range(50)])
    assert set(series.sums([f"k{n}" for n in range(50)], now - 20).values()) == {1}
    client.close()


def test_asyncio(url: str, prefix: str) -> None:
    """The same in a loop, lingering or not."""

    async def run() -> None:
        now = time.time()
        plain = AsyncTimeSeries(url, "hits", prefix=prefix)
        await plain.incr("a", 2)
        await plain.incr_many([("a", 1), ("b", 5, now - HOUR)])
        async with AsyncTimeSeries(url, "hits", prefix=prefix, linger=60) as lingering:
            await lingering.incr("a")
            await lingering.incr_many([("a", 1, now)])
        assert await plain.sum("a", now - 60) == 5
        assert await plain.sums(["a", "b"], now - 2 * HOUR) == {"a": 5, "b": 5}
        assert (await plain.today("a")) in (4, 5)
        points = await plain.range("b", now - 2 * HOUR, now, step=HOUR)
        assert points.sum() == 5
        assert (await plain.explain("a", now - HOUR)).bytes > 0

    asyncio.run(run())


# What everybody agrees on


def test_whoever_writes_first_decides(url: str, prefix: str) -> None:
    """Others take what is there, and are refused when they ask for something else."""
    first = TimeSeries(url, "hits", prefix=prefix, resolutions=[(5, HOUR), (30, DAY)])
    first.incr("a")
    anybody = TimeSeries(url, "hits", prefix=prefix)
    anybody.incr("a")
    assert [rung.step for rung in anybody.layout.rungs] == [5, 30]
    TimeSeries(url, "hits", prefix=prefix, resolutions=[(5, HOUR)]).incr("a")
    for wrong in ([(5, DAY)], [(5, HOUR), (30, 2 * DAY)], [(5, HOUR), (30, DAY), (60, DAY)]):
        other = TimeSeries(url, "hits", prefix=prefix, resolutions=wrong)
        with pytest.raises(UsageError, match="is in use with a resolution of"):
            other.incr("a")
        with pytest.raises(UsageError, match="is in use with a resolution of"):
            other.sum("a", time.time() - 10)
    many = TimeSeries(url, "hits", prefix=prefix, partitions=2)
    with pytest.raises(UsageError, match="partitions: 1, and this one says 2"):
        many.incr("a")


# Time zones


def test_days_of_a_zone() -> None:
    """Days have 23 and 25 hours where they do, and begin at one where midnight is left out."""
    berlin = _calendar.zone("Europe/Berlin")
    start = int(dt.datetime(2026, 3, 27, tzinfo=berlin).timestamp())
    marks = list(_calendar.edges(start, start + 4 * DAY, "day", berlin))
    assert [(b - a) // HOUR for a, b in itertools.pairwise(marks)][:4] == [24, 24, 23, 24]
    hours = list(_calendar.edges(start, start + 4 * DAY, 12 * HOUR, berlin))
    local = {dt.datetime.fromtimestamp(mark, berlin).hour for mark in hours}
    assert local <= {0, 12, 13}
    sao_paulo = _calendar.zone("America/Sao_Paulo")
    leap = int(dt.datetime(2018, 11, 4, 12, tzinfo=sao_paulo).timestamp())
    begins, ends = _calendar.day(leap, sao_paulo)
    assert dt.datetime.fromtimestamp(begins, sao_paulo).hour == 1
    assert ends - begins == 23 * HOUR


def test_steps_of_seconds_in_a_zone() -> None:
    """They begin anew at midnight, so a day of 25 hours ends with a rest; or they go by UTC."""
    berlin = _calendar.zone("Europe/Berlin")
    start = int(dt.datetime(2026, 10, 25, tzinfo=berlin).timestamp())
    days = _calendar.edges(start, start + 49 * HOUR, DAY, berlin)
    assert [mark - start for mark in days] == [0, DAY, 25 * HOUR, 49 * HOUR]
    assert all(
        mark % (2 * DAY) == 0 for mark in _calendar.edges(start, start + DAY, 2 * DAY, berlin)
    )


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        ["UTC", "Europe/Berlin", "America/Recife", "Asia/Kathmandu", "Australia/Sydney"]
    ),
    st.integers(1_500_000_000, 1_900_000_000),
    st.integers(1, 200 * DAY),
    st.sampled_from(["day", "week", "month", HOUR, 6 * HOUR, DAY, 7 * DAY, 600]),
)
def test_points_cover_a_range(tz: str, start: int, length: int, step: Any) -> None:
    """They follow each other, the first reaches back to the start and the last to the end."""
    length = min(length, 5 * DAY) if step == 600 else length
    marks = list(_calendar.edges(start, start + length, step, _calendar.zone(tz)))
    assert marks == sorted(set(marks))
    assert marks[0] <= start < marks[1]
    assert marks[-2] < start + length <= marks[-1]
    if isinstance(step, str):
        for mark in marks:
            local = dt.datetime.fromtimestamp(mark, _calendar.zone(tz))
            assert local.hour in (0, 1)
            assert step != "week" or local.weekday() == 0
            assert step != "month" or local.day == 1


# Bad input


@pytest.mark.parametrize(
    ("resolutions", "message"),
    [
        ([], "1 to 12 resolutions"),
        ([(10, 5)], "kept for longer"),
        ([(10, HOUR), (25, HOUR)], "does not divide"),
        ([(10, HOUR), (10, HOUR)], "does not divide"),
        ([(10, DAY), (MINUTE, HOUR)], "coarser is kept for as long"),
        ([(0.5, HOUR)], "whole number of seconds"),
        ([(math.nan, HOUR)], "positive number"),
        ([(10,)], "pairs of seconds"),
        (5, "pairs of seconds"),
    ],
)
def test_wrong_resolutions(url: str, resolutions: Any, message: str) -> None:
    """They are refused where the series is made."""
    with pytest.raises(UsageError, match=message):
        TimeSeries(url, "hits", resolutions=resolutions)


NAIVE = dt.datetime(2026, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, now: s.sum("a", now, now - 20), "begins before it ends"),
        (lambda s, now: s.sum("a", math.nan), "seconds since 1970"),
        (lambda s, now: s.sum("a", NAIVE), "has no time zone"),
        (lambda s, now: s.incr("a", at=NAIVE), "has no time zone"),
        (lambda s, now: s.incr("a", at=now + HOUR), "is in the future"),
        (lambda s, now: s.incr("a", at=now - 3000 * DAY), "older than all"),
        (lambda s, now: s.incr("a", 2**53), r"below 2\^53"),
        (lambda s, now: s.incr("a", 1.5), r"below 2\^53"),
        (lambda s, now: s.incr("a", True), r"below 2\^53"),
        (lambda s, now: s.incr(""), "1 to 2048 bytes"),
        (lambda s, now: s.incr(None), "a str, an int or bytes"),
        (lambda s, now: s.incr_many(["ab", "c"]), r"takes \(series, amount\)"),
        (lambda s, now: s.range("a", now - 60, step=7), "multiples of 10 s"),
        (lambda s, now: s.range("a", now - 60, step="year"), "'day', 'week' or 'month'"),
        (lambda s, now: s.range("a", now - 60, step=0), "positive number"),
        (lambda s, now: s.range("a", 0, step=10), "more than 100,000 points"),
        (lambda s, now: s.today("a", "Mars/Olympus"), "no time zone 'Mars/Olympus'"),
    ],
)
def test_wrong_arguments(series: TimeSeries, call: Any, message: str) -> None:
    """Each is a clear error, and changes nothing."""
    now = int(time.time())
    with pytest.raises(UsageError, match=message):
        call(series, now)
    assert series.sum("a", now - HOUR) == 0


def test_series_of_any_name(series: TimeSeries) -> None:
    """Whatever is in a name, each is a series of its own."""
    names: list[Any] = ["a:b", "a", "{a}", "\0", "a:10:5", b"\xff", 42, "é" * 1024]
    now = time.time()
    for amount, name in enumerate(names, 1):
        series.incr(name, amount)
    assert series.sums(names, now - 60) == {name: amount for amount, name in enumerate(names, 1)}


def test_a_resolution_may_be_a_timedelta(url: str, prefix: str) -> None:
    """Seconds or timedeltas, in any order."""
    hour = dt.timedelta(hours=1)
    made = TimeSeries(url, "hits", prefix=prefix, resolutions=[Resolution(hour, DAY), (60, hour)])
    made.incr("a")
    assert [(rung.step, rung.retention) for rung in made.layout.rungs] == [(60, 3600), (3600, DAY)]
