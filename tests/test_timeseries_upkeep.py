"""Whole series: listed, merged, deleted, written out, read in; resolutions that are added."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redishacks._command import Ask, Command, Steps
from redishacks.errors import RetentionError, UnavailableError, UsageError
from redishacks.testing import Cluster, FaultProxy, Server
from redishacks.timeseries import (
    AsyncTimeSeries,
    DistinctSeries,
    GaugeSeries,
    LatencySeries,
    TimeSeries,
    TopSeries,
    _merge,
)
from redishacks.timeseries.resolution import DAY, HOUR, MINUTE
from tests.timeseries_kit import clocked

numbers = itertools.count()
MAKE: dict[str, Callable[..., Any]] = {
    "sum": TimeSeries,
    "gauge": GaugeSeries,
    "latency": LatencySeries,
    "distinct": DistinctSeries,
    "top": TopSeries,
}
#: Short enough that traces get beyond them.
PACKED = [(10, HOUR), (MINUTE, HOUR), (HOUR, 2 * DAY), (DAY, 30 * DAY)]
LOOSE = [(10 * MINUTE, DAY), (HOUR, 2 * DAY), (DAY, 30 * DAY)]


@pytest.fixture(scope="module", params=["redishacks_valkey", "redishacks_redis"])
def server(request: pytest.FixtureRequest) -> Server:
    """A Valkey, and the oldest Redis that is supported."""
    found: Server = request.getfixturevalue(request.param)
    return found


def made(kind: str, client: Any, name: str | None = None, **options: Any) -> Any:
    """Return a series of a kind, with short retentions, which goes by a clock of its own."""
    pairs = PACKED if kind in ("sum", "gauge") else LOOSE
    name = name or f"up{next(numbers)}"
    return clocked(MAKE[kind](client, name, resolutions=pairs, **options))


def write(kind: str, series: Any, key: str, hits: list[tuple[int, int]]) -> None:
    """Write hits: when, and a number that each kind takes its own way."""
    for start in range(0, len(hits), 100):
        some = hits[start : start + 100]
        if kind == "sum":
            series.incr_many((key, number, at) for at, number in some)
        elif kind == "gauge":
            series.set_many((key, number, at) for at, number in some)
        elif kind == "latency":
            series.record_many((key, number / 1e6, at) for at, number in some)
        elif kind == "distinct":
            series.add_many((key, number, at) for at, number in some)
        else:
            series.incr_many((key, number, 1, at) for at, number in some)


def answer(kind: str, series: Any, key: str, start: int, end: int) -> Any:
    """Return all that a series says about a range."""
    if kind == "sum":
        return series.sum(key, start, end)
    if kind == "gauge":
        return series.read(key, start, end)
    if kind == "latency":
        return series.histogram(key, start, end)
    if kind == "distinct":
        return series.count(key, start, end)
    return series.top(key, start, end, n=1000)


def same(kind: str, url: str, series: Any, key: str, hits: list[tuple[int, int]]) -> None:
    """See that a series answers as a new one does with these hits alone, whatever is asked."""
    now = series.clock
    fresh = made(kind, url)
    fresh.clock = now
    write(kind, fresh, key, hits)
    for back, length in (
        (0, 1),
        (40, 30),
        (HOUR, HOUR),
        (7 * HOUR, 5000),
        (DAY, DAY),
        (9 * DAY, 9 * DAY),
    ):
        start = now - back
        ours = answer(kind, series, key, start, start + length)
        theirs = answer(kind, fresh, key, start, start + length)
        assert ours == theirs, (back, length)


# What comes of any mix


@pytest.mark.parametrize("kind", MAKE)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_series_goes_on_as_if_it_had_been_so(
    redishacks_valkey: Server, kind: str, data: Any
) -> None:
    """Merged, deleted in part, written out and read in elsewhere: all answers are those of a series
    that has had the remaining hits only.
    """
    url = redishacks_valkey.url
    series = made(kind, url)
    series.clock += data.draw(st.integers(0, DAY))
    now = series.clock
    # Within what the finest resolution keeps: all can be deleted exactly.
    near = HOUR if kind in ("sum", "gauge") else DAY
    hit = st.tuples(st.integers(0, near).map(lambda back: now - back), st.integers(1, 9))
    hits: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    fine = series.layout.step if series.layout.rungs else (10 if near == HOUR else 600)
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["write", "write", "merge", "delete", "copy"]))
        key = data.draw(st.sampled_from("ab"))
        if what == "write":
            some = data.draw(st.lists(hit, max_size=20))
            write(kind, series, key, some)
            hits[key] += some
        elif what == "merge":
            other = "b" if key == "a" else "a"
            series.merge(key, other)
            hits[other] += hits[key]
            hits[key] = []
        elif what == "delete":
            start = (now - data.draw(st.integers(0, near))) // fine * fine
            end = start + data.draw(st.integers(0, 400)) * fine
            series.delete(key, start, end)
            hits[key] = [(at, number) for at, number in hits[key] if not start <= at < end]
        else:
            copy = made(kind, url)
            copy.clock = now
            assert copy.import_(series.export()) >= 0
            series = copy
    for key in "ab":
        # Of two that are as late, the one written later is the last: merging may swap them.
        if kind == "gauge":
            latest: dict[int, int] = {}
            for at, _ in hits[key]:
                latest[at] = latest.get(at, 0) + 1
            if any(times > 1 for times in latest.values()):
                continue
        same(kind, url, series, key, hits[key])
    with redishacks_valkey.client() as raw:
        keys = list(raw.scan_iter(f"rh:t1:{{{series.name}/*"))
        assert all(raw.ttl(key) > 0 for key in keys if not key.endswith(b":meta"))
        assert not [key for key in keys if b"}:m:" in key or b"}:n:" in key]


# Merging


def stopped(steps: Steps[Any], series: Any, effects: int) -> bool:
    """Obey the first few effects of a conversation, as a process that is killed then; True if
    that was all.
    """
    try:
        effect = next(steps)
        for _ in range(effects):
            if isinstance(effect, Ask):
                effect = steps.send(series.transport.run(effect.commands, 5))
            else:
                assert isinstance(effect, Command)
                effect = steps.send(series.transport.call(effect, 5))
    except StopIteration:
        return True
    return False


@pytest.mark.parametrize("kind", MAKE)
def test_a_merge_that_is_stopped(server: Server, kind: str) -> None:
    """Wherever that is: done again it comes to its end, and each hit is there once."""
    for effects in itertools.count():
        series = made(kind, server.url)
        now = series.clock
        first = [(now - i * 7 * HOUR, i % 9 + 1) for i in range(12)]
        second = [(now - i * 5 * HOUR, i % 7 + 1) for i in range(12)]
        write(kind, series, "a", first)
        write(kind, series, "b", second)
        done = stopped(_merge.merge(series.layout, "a", "b"), series, effects)
        late = [(now - 3, 5)]
        write(kind, series, "a", late)  # not lost either
        series.merge("a", "b")
        same(kind, server.url, series, "b", [*second, *first, *late])
        same(kind, server.url, series, "a", [])
        if done:
            break
    assert effects > 5


def test_a_merge_that_another_goes_on_with(server: Server) -> None:
    """Two at once, one of which pauses anywhere: nothing is counted twice, or lost."""
    for effects in range(12):
        series = made("sum", server.url)
        now = series.clock
        write("sum", series, "a", [(now - i * DAY, 1) for i in range(5)])
        paused = _merge.merge(series.layout, "a", "b")
        state: dict[str, Any] = {"effect": next(paused)}

        def go(times: int, paused: Any = paused, state: Any = state, series: Any = series) -> bool:
            try:
                for _ in range(times):
                    effect = state["effect"]
                    asks = isinstance(effect, Ask)
                    reply = (
                        series.transport.run(effect.commands, 5)
                        if asks
                        else series.transport.call(effect, 5)
                    )
                    state["effect"] = paused.send(reply)
            except StopIteration:
                return True
            return False

        over = go(effects)
        series.merge("a", "b")
        write("sum", series, "a", [(now, 100)])
        begun = _merge.merge(series.layout, "a", "c")
        assert not stopped(begun, series, 2)  # a new one has begun, and was killed
        if not over:
            assert go(100)
        series.merge("a", "b")
        assert series.sum("b", now - 9 * DAY) + series.sum("c", now - 9 * DAY) == 105
        assert series.sum("a", now - 9 * DAY) == 0


def test_a_merge_that_would_overflow(server: Server) -> None:
    """It says so, keeps what is not merged, and comes to its end when there is room."""
    series = made("sum", server.url)
    now = series.clock
    most = 2**53 - 1
    for _ in range(3):
        for key in "ab":
            series.incr_many([(key, most, now)] * 300)
    with pytest.raises(UsageError, match="merge again when there is room"):
        series.merge("a", "b")
    assert series.sum("b", now - 60) == most * 900
    series.delete("b", (now - 60) // 10 * 10, now // 10 * 10 + 10)
    series.merge("a", "b")
    assert series.sum("b", now - 60) == most * 900
    with pytest.raises(UsageError, match="into itself"):
        series.merge("a", "a")


def test_a_merge_whose_replies_get_lost(proxy: FaultProxy) -> None:
    """Each part counts once."""
    for n in range(1, 6):
        series = made("sum", proxy.url)
        now = series.clock
        write("sum", series, "a", [(now - i * DAY, 1) for i in range(3)])
        proxy.drop_reply(n, of="EVALSHA")
        series.merge("a", "b")
        assert series.sum("b", now - 9 * DAY) == 3


# Deleting


def test_what_is_deleted_in_the_middle_of_coarse_buckets(server: Server) -> None:
    """Needs finer ones; where they have expired nothing is deleted."""
    for kind in MAKE:
        series = made(kind, server.url)
        now = series.clock
        old = now // DAY * DAY - 10 * DAY
        write(kind, series, "a", [(old + i * HOUR, 1) for i in range(48)])
        before = answer(kind, series, "a", old, old + 2 * DAY)
        fine = series.layout.step
        with pytest.raises(RetentionError, match="nothing was deleted"):
            series.delete("a", old + fine, old + DAY)
        with pytest.raises(RetentionError, match="nothing was deleted"):
            series.delete("a", old, old + DAY + HOUR)
        with pytest.raises(UsageError, match="multiples of"):
            series.delete("a", now - 1 - now % fine, now)
        assert answer(kind, series, "a", old, old + 2 * DAY) == before
        series.delete("a", old, old + DAY)
        same(kind, server.url, series, "a", [(old + i * HOUR, 1) for i in range(24, 48)])
        series.delete("a", 0, now + DAY // fine * fine)
        same(kind, server.url, series, "a", [])
        with server.client() as raw:
            assert not list(raw.scan_iter(f"rh:t1:{{{series.name}/0}}:s:*")), kind


def test_a_top_of_very_many_members_is_deleted_from(server: Server) -> None:
    """What is made anew of many buckets is no larger than others, and right within its error."""
    series = clocked(TopSeries(server.url, f"up{next(numbers)}", resolutions=LOOSE, keep=20))
    clock: Any = series
    day = clock.clock // DAY * DAY - DAY
    exact: dict[str, int] = {}
    for hour in range(24):
        for tenth in range(0, 6, 5):
            at = day + hour * HOUR + tenth * 600
            some = {f"m{hour}.{tenth}.{n}": 1 for n in range(40)} | {"heavy": 30}
            series.incr_many(("a", member, amount, at) for member, amount in some.items())
            if (hour, tenth) != (5, 0):
                for member, amount in some.items():
                    exact[member] = exact.get(member, 0) + amount
    series.delete("a", day + 5 * HOUR, day + 5 * HOUR + 600)
    top = series.top("a", day, day + DAY, n=100)
    assert top.total == sum(exact.values())
    assert 0 < top.error <= top.total / 21
    for member, amount in exact.items():
        found = dict(top).get(member, 0)
        assert found <= amount <= found + top.error
    assert top[0][0] == "heavy"
    with server.client() as raw:
        (key,) = list(raw.scan_iter(f"rh:t1:{{{series.name}/0}}:s:a:{DAY}:*"))
        assert raw.hlen(key) <= 41


@pytest.mark.parametrize("kind", MAKE)
def test_hits_during_a_delete(server: Server, kind: str, prefix: str) -> None:
    """Those outside of the range all stay, whatever is deleted meanwhile; resolutions agree."""
    url, now = server.url, int(time.time()) // DAY * DAY - DAY
    pairs = [(10 * MINUTE, 10 * DAY), (HOUR, 20 * DAY), (DAY, 30 * DAY)]
    options: dict[str, Any] = {"prefix": prefix, "resolutions": pairs, "deadline": 20}
    series = MAKE[kind](url, "busy", **options)
    write(kind, series, "a", [(now, 1)])
    over = threading.Event()
    written: list[tuple[int, int]] = [(now, 1)]

    def hits() -> None:
        mine, rng = MAKE[kind](url, "busy", **options), random.Random(1)
        while not over.is_set():
            at = now + rng.randrange(6) * 10 * MINUTE
            write(kind, mine, "a", [(at, number := rng.randrange(1, 9))])
            written.append((at, number))
            time.sleep(0.001)

    def deletes() -> None:
        mine = MAKE[kind](url, "busy", **options)
        for _ in range(10):
            mine.delete("a", now + 10 * MINUTE, now + 30 * MINUTE)

    writer = threading.Thread(target=hits)
    deleters = [threading.Thread(target=deletes) for _ in range(2)]
    for thread in (writer, *deleters):
        thread.start()
    for thread in deleters:
        thread.join()
    over.set()
    writer.join()
    series.delete("a", now + 10 * MINUTE, now + 30 * MINUTE)
    stay = [(at, number) for at, number in written if not 600 <= at - now < 1800]
    expected = MAKE[kind](url, "calm", **options)
    write(kind, expected, "a", stay)
    for start, end in (
        (now, now + 600),
        (now, now + HOUR),
        (now, now + DAY),
        (now + 600, now + 1800),
    ):
        if kind != "gauge":
            assert answer(kind, series, "a", start, end) == answer(kind, expected, "a", start, end)
        else:
            assert (
                answer(kind, series, "a", start, end).count
                == answer(kind, expected, "a", start, end).count
            )


# Written out, and read in


@pytest.mark.parametrize("format", ["jsonl", "csv"])
@pytest.mark.parametrize("kind", MAKE)
def test_what_is_written_out_is_read_in(server: Server, kind: str, format: str) -> None:
    """Of all kinds, into another name laid out otherwise; with a token it counts once."""
    options: dict[str, Any] = {"scale": 2} if kind == "gauge" else {}
    series = made(kind, server.url, **options)
    now = series.clock
    names = ["plain", 'sp ace,"quoted"', "50%", "ünï", "{braces}"]
    for n, name in enumerate(names):
        write(kind, series, name, [(now - i * HOUR, i + n + 1) for i in range(30)])
    lines = list(series.export(format=format))
    assert len(lines) > 100
    copy = made(kind, server.url, partitions=4, **options)
    copy.clock = now
    for _ in range(2):
        assert copy.import_(iter(lines), token="once") == len(lines) - (format == "csv")
    for name in names:
        for back in (1, HOUR, DAY, 5 * DAY):
            assert answer(kind, copy, name, now - back, now + 1) == answer(
                kind, series, name, now - back, now + 1
            )
    assert sorted(copy.keys()) == sorted(names)
    assert list(series.export(["none"], format=format)) == []
    if format == "jsonl":
        assert all(isinstance(json.loads(line), dict) for line in lines)


def test_rows_that_are_none(server: Server) -> None:
    """They are refused by what is wrong with them; how to go on is said."""
    series = made("sum", server.url)
    now = series.clock // DAY * DAY
    good = json.dumps({"series": "a", "step": 10, "time": now, "value": 5})
    for bad, message in (
        ("nonsense", "neither JSON nor CSV"),
        ("{]", "is no JSON"),
        ('{"series": "a"}', "is no row"),
        ("[1]", "neither JSON nor CSV"),
        (good.replace("10", "7", 1), "has buckets of 10, 60, 3600, 86400 s"),
        (good.replace(str(now), str(now + 5)), "not when a bucket begins"),
        (good.replace(str(now), str(now + 9 * DAY)), "or in the future"),
        (good.replace(": 5", ": 9223372036854775808"), "64 bits"),
        (good.replace(": 5", ': "x"'), "is no row"),
    ):
        with pytest.raises(UsageError, match=message):
            series.import_([bad])
    many = [good] * 1200 + ['{"series": 7}']
    with pytest.raises(UsageError) as raised:
        series.import_(many, token="again")
    assert "token='again'" in str(raised.value.__notes__)
    assert series.import_([*many[:1200]], token="again") == 1200
    assert series.sum("a", now, now + 10) == 6000
    with pytest.raises(UsageError, match="'jsonl' or 'csv'"):
        next(series.export(format="xml"))
    assert series.import_([]) == 0


def test_gauges_are_written_out_as_people_know_them(server: Server, prefix: str) -> None:
    """Decimals in CSV and JSON, not units."""
    series = GaugeSeries(server.url, "prices", prefix=prefix, scale=2)
    series.set("a", Decimal("1.25"))
    row = json.loads(next(iter(series.export())))
    assert (row["last"], row["sum"], row["count"]) == ("1.25", "1.25", 1)


def test_one_text_is_no_lines(server: Server, prefix: str) -> None:
    """A text or a name where many are meant is refused, not taken letter by letter."""
    series = TimeSeries(server.url, "hits", prefix=prefix)
    series.incr("project:42")
    text = "\n".join(series.export())
    with pytest.raises(UsageError, match="lines"):
        series.import_(text)
    with pytest.raises(UsageError, match="several series"):
        list(series.export("project:42"))
    assert series.import_(["", *text.splitlines(), ""]) == 5


# Listed


def test_all_series_are_listed(server: Server, cluster: Cluster, prefix: str) -> None:
    """Each once, on every node; by a pattern too."""
    names = {f"project:{n}" for n in range(200)} | {"other", "[x]*"}
    client = cluster.client()
    for where in (server.url, client):
        series = TimeSeries(where, "hits?*", prefix=prefix)
        assert list(series.keys()) == []
        series.incr_many([(name, 1) for name in names] + [(b"\xff\x00", 1)])
        TimeSeries(where, "hits", prefix=prefix).incr("not one of them")
        found = list(series.keys())
        assert set(found) == names | {b"\xff\x00"}
        assert len(found) == len(names) + 1
        assert sorted(series.keys("project:1?")) == [f"project:1{n}" for n in range(10)]
        assert list(series.keys("[[]x*")) == ["[x]*"]
    client.close()


# Resolutions that are added


def test_a_resolution_is_added_while_all_goes_on(server: Server) -> None:
    """Who does not know of it yet goes on, and learns of it; sums are never short."""
    url, name = server.url, f"grows{next(numbers)}"
    series: Any = clocked(TimeSeries(url, name, resolutions=[(10, HOUR), (HOUR, 2 * DAY)]))
    old: Any = clocked(TimeSeries(url, name, resolutions=[(10, HOUR), (HOUR, 2 * DAY)]))
    total = 0

    def hits(*some: Any) -> None:
        nonlocal total
        for one in some:
            one.incr("a", 1)
            total += 1
        now = series.clock
        for one in (series, old):
            assert one.sum("a", now - 100 * DAY, now + 1) == total

    hits(series, old)
    since = series.add_resolution((DAY, 30 * DAY))
    assert since >= series.clock + 120
    assert series.add_resolution((DAY, 30 * DAY)) == since
    assert since % DAY == 0
    assert [rung.step for rung in series.layout.rungs] == [10, HOUR, DAY]
    assert series.add_resolution((MINUTE, HOUR)) % HOUR == 0
    hits(old, series)
    for _ in range(30):
        series.clock = old.clock = series.clock + HOUR
        hits(series, old)
    assert [rung.step for rung in old.layout.rungs] == [10, MINUTE, HOUR, DAY]
    series.clock = old.clock = since + 2 * DAY
    made_of = series.explain("a", since, since + DAY)
    assert [tile.rung.step for tile in made_of.tiles] == [DAY]


def test_a_writer_that_slept_does_not_miss_a_new_resolution(server: Server) -> None:
    """What it knows is too old for the server: it looks again before it writes."""
    url, name = server.url, f"slept{next(numbers)}"
    series: Any = clocked(TimeSeries(url, name, resolutions=[(10, DAY), (HOUR, 2 * DAY)]))
    series.incr("a")
    asleep: Any = clocked(TimeSeries(url, name))
    asleep.incr("a")
    folded = None
    since = series.add_resolution((MINUTE, DAY))
    series.clock = since + 5
    from redishacks.timeseries._kind import Hit

    late = series.clock
    asleep.layout.now = lambda: asleep.clock  # its own clock stands still
    folded = asleep.layout.folded([Hit(b"a", late, (1,))])
    command = asleep.layout.put(folded)
    words = list(command.args)
    words[3] = f"{late}000000"
    applied = asleep.transport.call(command._replace(args=tuple(words)), 5)
    assert applied.code == -1
    assert series.sum("a", late - 60, late + 1) == 0


@pytest.mark.parametrize("kind", ["sum", "top"])
def test_what_is_merged_or_deleted_too_late_is_left(
    server: Server, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be resolutions by then that it knows nothing of."""
    series = MAKE[kind](server.url, f"slow{next(numbers)}")
    now = int(time.time())
    series.incr("a", *["m"] * (kind == "top"))
    before = sorted(series.export())
    layout = series.layout
    monkeypatch.setattr(layout, "until", lambda: now * 1_000_000)
    with pytest.raises(UnavailableError, match="others begin to merge"):
        series.merge("a", "b")
    with pytest.raises(UnavailableError, match="nothing was deleted"):
        series.delete("a", now // HOUR * HOUR, now // HOUR * HOUR + HOUR)
    assert sorted(series.export()) == before
    monkeypatch.undo()
    series.merge("a", "b")
    assert list(series.keys()) == ["b"]


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        ((7, DAY), "does not divide"),
        ((HOUR, 3 * DAY), "3600 s are there, and kept for 172800 s"),
        ((MINUTE, 9 * DAY), "coarser is kept for as long"),
        ((7 * DAY, 40 * DAY), "does not fit in"),
        ((MINUTE, 100), "coarser is kept for as long|does not fit in"),
    ],
)
def test_resolutions_that_do_not_fit_in(server: Server, resolution: Any, message: str) -> None:
    """They are refused, and nothing changes."""
    series = made("sum", server.url)
    name = series.name
    pairs = [(10, HOUR), (HOUR, 2 * DAY), (DAY, 5 * DAY)]
    series = TimeSeries(server.url, f"{name}x", resolutions=pairs)
    series.incr("a")
    with pytest.raises(UsageError, match=message):
        series.add_resolution(resolution)
    with pytest.raises(UsageError, match="since is"):
        series.add_resolution((MINUTE, HOUR), since=time.time())
    assert len(TimeSeries(server.url, f"{name}x", resolutions=pairs).explain("a", 0).tiles) >= 0
    assert [rung.step for rung in series.layout.rungs] == [10, HOUR, DAY]


# In a loop


def test_whole_series_in_a_loop(server: Server, prefix: str) -> None:
    """The async twins do the same."""

    async def run() -> None:
        series = AsyncTimeSeries(server.url, "hits", prefix=prefix)
        now = int(time.time())
        await series.incr_many([("a", 1), ("b", 2, now - HOUR), ("c", 4)])
        names = series.keys()
        assert sorted([str(name) async for name in names]) == ["a", "b", "c"]
        await series.merge("a", "b")
        lines = [line async for line in series.export(["b"])]
        await series.delete("c", (now - 60) // 10 * 10, (now + 20) // 10 * 10)
        assert await series.sums(list("abc"), now - DAY) == {"a": 0, "b": 3, "c": 0}
        copy = AsyncTimeSeries(server.url, "copy", prefix=prefix)
        assert await copy.import_(lines) == len(lines)
        assert await copy.sum("b", now - DAY) == 3
        assert await series.add_resolution((30, 3 * DAY)) > now
        assert len([line async for line in series.export()]) >= len(lines)

    asyncio.run(run())


def test_without_a_server(tmp_path: Any) -> None:
    """All of it says that there is none."""
    series = TimeSeries(f"unix://{tmp_path}/none", "hits", deadline=0.2)
    calls: list[Callable[[], Any]] = [
        lambda: list(series.keys()),
        lambda: list(series.export()),
        lambda: series.import_(['{"series": "a", "step": 10, "time": 10, "value": 1}']),
        lambda: series.merge("a", "b"),
        lambda: series.delete("a", 0, 10),
        lambda: series.add_resolution((30, 3 * DAY)),
    ]
    for call in calls:
        with pytest.raises(UnavailableError):
            call()
