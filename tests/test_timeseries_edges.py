"""Time series attacked: each test says what should be; what is marked fails for now."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any
from unittest import mock

import pytest

from redishacks.errors import RedisHacksError, UsageError
from redishacks.testing import Server
from redishacks.timeseries import (
    DistinctSeries,
    GaugeSeries,
    LatencySeries,
    TimeSeries,
    TopSeries,
)
from redishacks.timeseries.plan import plan
from redishacks.timeseries.resolution import DAY, HOUR, MINUTE, ladder
from tests.timeseries_kit import clocked, noon


@pytest.fixture
def url(valkey: Server) -> str:
    """The session's server."""
    return valkey.url


@pytest.fixture
def day() -> int:
    """When yesterday began, in UTC."""
    return int(time.time()) // DAY * DAY - DAY


def once(layout: Any, method: str, between: Callable[[], object]) -> None:
    """Do something just before a layout's command is said for the first time."""
    real = getattr(layout, method)

    def then(*args: Any, **options: Any) -> Any:
        setattr(layout, method, real)
        between()
        return real(*args, **options)

    setattr(layout, method, then)


# Resolutions that are added


def test_a_resolution_is_not_read_before_its_buckets_are_whole() -> None:
    """A sum that ends before a resolution's begin reads none of it."""
    old = ladder([(10, 2 * DAY), (MINUTE, 8 * DAY), (DAY, 400 * DAY)])
    made = ladder([(10, 2 * DAY), (MINUTE, 8 * DAY), (600, 30 * DAY), (DAY, 400 * DAY)])
    now = 20_000 * DAY + 14 * HOUR
    new = made[2]._replace(since=20_001 * DAY)
    tiles = plan([*old[:2], new, old[2]], now - 3 * DAY, now + 1, now).tiles
    assert [tile.start for tile in tiles if tile.start < tile.rung.since] == []


def test_nothing_vanishes_while_a_resolution_is_added(url: str, prefix: str, day: int) -> None:
    """What was counted before stays in all sums."""
    series = TimeSeries(
        url, "hits", prefix=prefix, resolutions=[(10, 2 * DAY), (MINUTE, 8 * DAY), (DAY, 400 * DAY)]
    )
    series.incr("a", 5, at=day)
    series.add_resolution((600, 30 * DAY))
    assert series.sum("a", day - 3 * DAY, day + HOUR) == 5


def test_two_who_add_resolutions_know_of_each_other(url: str, prefix: str) -> None:
    """Resolutions that do not divide each other never come together."""
    pairs = [(10, DAY), (HOUR, 30 * DAY)]
    one = TimeSeries(url, "hits", prefix=prefix, resolutions=pairs)
    other = TimeSeries(url, "hits", prefix=prefix)
    one.incr("a")
    other.incr("a")
    one.add_resolution((600, 10 * DAY))
    with pytest.raises(UsageError, match="does not divide"):
        other.add_resolution((900, 10 * DAY))


def test_two_who_add_the_same_resolution(url: str, prefix: str) -> None:
    """Who comes second gets to know since when the first one's is read."""
    pairs = [(10, DAY), (HOUR, 30 * DAY)]
    one = TimeSeries(url, "hits", prefix=prefix, resolutions=pairs)
    other = TimeSeries(url, "hits", prefix=prefix)
    one.incr("a")
    other.incr("a")
    now = time.time()
    since = one.add_resolution((600, 10 * DAY), since=now + 2 * HOUR)
    assert other.add_resolution((600, 10 * DAY), since=now + 5 * HOUR) == since


def test_all_resolutions_in_use_may_be_stated(url: str, prefix: str) -> None:
    """Who states the resolutions that a name has, the added one too, may use it."""
    pairs = [(MINUTE, 8 * DAY), (DAY, 400 * DAY)]
    series = TimeSeries(url, "hits", prefix=prefix, resolutions=pairs)
    series.incr("a")
    series.add_resolution((600, 30 * DAY))
    TimeSeries(url, "hits", prefix=prefix, resolutions=[*pairs, (600, 30 * DAY)]).incr("a")


def test_a_hit_that_nobody_can_read_is_refused(url: str, prefix: str) -> None:
    """A hit older than what is read of a new resolution is too old, as it was before."""
    series = TimeSeries(url, "hits", prefix=prefix, resolutions=[(10, HOUR), (MINUTE, 2 * HOUR)])
    series.incr("a")
    series.add_resolution((HOUR, 30 * DAY))
    with pytest.raises(UsageError, match="older than all that is kept"):
        series.incr("a", at=time.time() - DAY)


@pytest.mark.parametrize(
    ("kind", "write", "read"),
    [
        (TimeSeries, lambda it, n, at: it.incr("a", n, at=at), lambda it, *at: it.sum("a", *at)),
        (
            GaugeSeries,
            lambda it, n, at: it.set("a", n, at=at),
            lambda it, *at: it.read("a", *at).max,
        ),
        (
            DistinctSeries,
            lambda it, n, at: it.add_many(("a", i, at) for i in range(n)),
            lambda it, *at: it.count("a", *at),
        ),
        (
            LatencySeries,
            lambda it, n, at: it.record("a", n, at=at),
            lambda it, *at: it.histogram("a", *at).bins,
        ),
        (
            TopSeries,
            lambda it, n, at: it.incr("a", f"m{n}", n, at=at),
            lambda it, *at: list(it.top("a", *at)),
        ),
    ],
)
@pytest.mark.parametrize("added", [(MINUTE, DAY), (DAY, 30 * DAY)])
def test_an_export_is_whole_though_a_resolution_is_new(
    url: str, prefix: str, kind: Any, write: Any, read: Any, added: Any
) -> None:
    """Who reads it in does not know since when the buckets of a resolution are whole."""
    old = [(10, DAY), (HOUR, 20 * DAY)]
    if added[0] == DAY and not kind.kind.packed:
        pytest.skip("hours expire one by one, and a day is not added to them")
    one = clocked(kind(url, "one", prefix=prefix, resolutions=old))
    one.clock += 6 * HOUR + 600
    begins = one.clock - 600
    write(one, 5, begins - 3 * HOUR)
    write(one, 9, begins + 30)
    one.add_resolution(added)
    write(one, 3, begins + 600)
    one.clock += 600
    two = clocked(kind(url, "two", prefix=prefix, resolutions=[*old, added]))
    two.clock = one.clock
    two.import_(one.export())
    for start, end in (
        (begins, begins + 1200),
        (begins + 600, begins + 1200),
        (begins - 4 * HOUR, begins + 620),
    ):
        assert read(two, start, end) == read(one, start, end)
    one.clock = two.clock = one.clock + DAY
    day = begins - 6 * HOUR, begins + 18 * HOUR
    assert read(two, *day) == read(one, *day)


# Days


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        (TimeSeries, lambda series: series.incr("a")),
        (GaugeSeries, lambda series: series.set("a", 1)),
        (DistinctSeries, lambda series: series.add("a", "me")),
        (LatencySeries, lambda series: series.record("a", 0.5)),
        (TopSeries, lambda series: series.incr("a", "me")),
    ],
)
def test_today_after_a_night_in_which_the_clock_stood_still(
    url: str, prefix: str, kind: Any, write: Callable[[Any], None]
) -> None:
    """It is the server's day, and not that of what the process thinks the time is."""
    series = kind(url, "hits", prefix=prefix)
    write(series)
    series.layout._ahead -= DAY
    start = series.today("a", noon()).start
    assert start <= time.time() < start + DAY


# Deletes


def test_a_delete_keeps_many_members(url: str, prefix: str, day: int) -> None:
    """What is heavy outside a deleted range stays, however many members there are."""
    series = TopSeries(url, "pages", prefix=prefix)
    for hour in range(24):
        at = day + hour * HOUR + 700
        series.incr_many(("a", f"{hour} {i}", 1, at) for i in range(200))
    try:
        series.delete("a", day, day + 600)
    finally:
        assert series.top("a", day, day + DAY).total == 24 * 200


def test_a_bucket_is_bounded_after_a_delete(
    url: str, prefix: str, valkey: Server, day: int
) -> None:
    """A bucket that is made anew keeps no more members than others."""
    series = TopSeries(url, "pages", prefix=prefix)
    for hour in range(12):
        at = day + hour * HOUR + 700
        series.incr_many(("a", f"{hour} {i}", 1, at) for i in range(200))
    series.delete("a", day, day + 600)
    with valkey.client() as raw:
        (key,) = raw.keys(f"{prefix}:t1:{{pages/0}}:s:a:{DAY}:*")
        assert raw.hlen(key) <= 201


def test_a_delete_while_the_series_is_merged(url: str, prefix: str, day: int) -> None:
    """A series whose buckets were taken away meanwhile does not come to less than nothing."""
    series = TimeSeries(url, "hits", prefix=prefix)
    other = TimeSeries(url, "hits", prefix=prefix)
    series.incr("a", 5, at=day)
    once(series.layout, "put", lambda: other.merge("a", "b"))
    series.delete("a", day, day + HOUR)
    assert series.sum("a", day, day + DAY) == 0


def test_a_delete_while_a_known_member_comes_again(url: str, prefix: str, day: int) -> None:
    """A member that comes back while its first hit is deleted is counted in all resolutions."""
    series = DistinctSeries(url, "visitors", prefix=prefix)
    other = DistinctSeries(url, "visitors", prefix=prefix)
    series.add("a", "x", at=day + 10)
    series.add("a", "y", at=day + 610)
    once(series.layout, "replace", lambda: other.add("a", "x", at=day + 620))
    series.delete("a", day, day + 600)
    assert series.count("a", day + 600, day + 1200) == 2
    assert series.count("a", day, day + HOUR) == 2


def test_a_delete_while_another_deletes_and_counts(url: str, prefix: str, day: int) -> None:
    """A bucket that has the same sum as before, of other members, has been written to."""
    series = TopSeries(url, "pages", prefix=prefix)
    other = TopSeries(url, "pages", prefix=prefix)
    series.incr("a", "x", 5, at=day + 10)
    series.incr("a", "y", 5, at=day + 610)

    def meanwhile() -> None:
        other.delete("a", day + 600, day + 1200)
        other.incr("a", "z", 5, at=day + 620)

    once(series.layout, "replace", meanwhile)
    series.delete("a", day, day + 600)
    assert series.top("a", day, day + HOUR).members == [("z", 5)]


@pytest.mark.slow
def test_a_long_series_of_latencies_is_deleted(url: str, prefix: str, day: int) -> None:
    """All of a series with the usual resolutions goes at once, be it half a year long."""
    series = LatencySeries(url, "requests", prefix=prefix)
    times = [day - i * 600 for i in range(31 * 144)] + [
        day - i * HOUR for i in range(31 * 24, 4800)
    ]
    series.record_many(("a", 0.01, at) for at in times)
    series.delete("a", day - 300 * DAY, day + DAY)
    assert series.histogram("a", day - 300 * DAY, day + DAY).count == 0


def test_a_delete_until_now(url: str, prefix: str, day: int) -> None:
    """No end is now, or an error, but never nothing."""
    series: Any = TimeSeries(url, "hits", prefix=prefix)
    series.incr("a", at=day)
    try:
        series.delete("a", day, None)
    except UsageError:
        return
    assert series.sum("a", day) == 0


# Merges


@pytest.mark.slow
def test_a_merge_of_many_fine_buckets(url: str, prefix: str, day: int) -> None:
    """However many buckets a day has, they are merged."""
    pairs = [(10, 3 * DAY), (DAY, 30 * DAY)]
    series = LatencySeries(url, "requests", prefix=prefix, resolutions=pairs)
    series.record_many(("a", 0.01, day + i * 10) for i in range(8640))
    try:
        series.merge("a", "b")
    finally:
        found = series.histograms(["a", "b"], day, day + DAY)
        assert found["a"].count + found["b"].count == 8640


@pytest.mark.slow
def test_a_merge_of_the_largest_summaries_counts_once(url: str, prefix: str, day: int) -> None:
    """A merge that fails changes nothing, and one that is repeated counts once."""
    series = TopSeries(url, "pages", prefix=prefix, keep=2000)
    for key in "ab":
        series.incr_many((key, f"{key}{i}", 1, day) for i in range(4000))
    for _ in range(3):
        try:
            series.merge("a", "b")
        except RedisHacksError:
            pass
    assert series.top("b", day, day + 600).total == 8000
    assert series.top("b", day, day + DAY).total == 8000


# Names


def test_keys_are_those_of_the_name(url: str, prefix: str) -> None:
    """Series of `hits/api` are none of `hits`."""
    series = TimeSeries(url, "hits", prefix=prefix)
    series.incr("a")
    TimeSeries(url, "hits/api", prefix=prefix).incr("b")
    assert list(series.keys()) == ["a"]


def test_a_pattern_that_is_no_text(url: str, prefix: str) -> None:
    """What is no UTF-8 is an error that says so."""
    series = TimeSeries(url, "hits", prefix=prefix)
    with pytest.raises(UsageError):
        list(series.keys("\udc80*"))


@pytest.mark.slow
def test_the_command_line_with_a_pattern_that_is_no_text(url: str, prefix: str) -> None:
    """Nobody gets to see a traceback."""
    TimeSeries(url, "hits", prefix=prefix).incr("a")
    words: list[Any] = [
        "series",
        "list",
        "hits",
        "--prefix",
        prefix,
        "--redis",
        url,
        "--match",
        b"\xff*",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "redishacks", *words], capture_output=True, check=False
    )
    assert b"Traceback" not in done.stderr


# Hits that linger


def test_a_lingering_hit_after_a_read_of_nothing(url: str, prefix: str) -> None:
    """A client whose clock is off counts a hit now, also when it read before anybody wrote."""
    now = time.time()
    with mock.patch("time.time", return_value=now - 2 * HOUR):
        series = TimeSeries(url, "hits", prefix=prefix, linger=30)
    assert series.sum("a", now - HOUR) == 0
    series.incr("a")
    series.close()
    reader = TimeSeries(url, "hits", prefix=prefix)
    assert reader.sum("a", now - 5 * MINUTE, now + MINUTE) == 1


# What is read in


def test_a_sketch_that_the_server_refuses(url: str, prefix: str, valkey: Server, day: int) -> None:
    """A row with a damaged sketch is refused, and leaves nothing behind."""
    series = DistinctSeries(url, "visitors", prefix=prefix)
    series.add_many(("a", i, day) for i in range(5000))
    row, *_, good = map(json.loads, series.export(["a"]))
    row["sketch"] = base64.b64encode(base64.b64decode(row["sketch"]) + b"\0").decode()
    with pytest.raises(RedisHacksError):
        series.import_([json.dumps(row)], token="t")
    with valkey.client() as raw:
        keys = [key for key in raw.scan_iter(f"{prefix}:*") if not key.endswith(b":meta")]
        assert [key for key in keys if raw.ttl(key) == -1] == []
    series.import_([json.dumps(good)], token="t")


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (TopSeries, {"step": 600, "member": "x", "count": -5, "lacks": 0}),
        (TopSeries, {"step": 600, "member": "x", "count": 5, "lacks": -7}),
        (GaugeSeries, {"step": 10, "last": 1, "at": 0, "min": 1, "max": 1, "sum": 1, "count": 0}),
        (
            GaugeSeries,
            {"step": 10, "last": 1, "at": 0, "min": 1, "max": 1, "sum": 1, "count": 2**63 - 1},
        ),
        (LatencySeries, {"step": 600, "seconds": 0.01, "count": -4}),
        (TimeSeries, {"step": 10, "value": 1.9}),
    ],
)
def test_rows_that_nobody_can_have_written(
    url: str, prefix: str, day: int, make: Any, row: dict[str, Any]
) -> None:
    """What no export says is refused: counts of less than one, halves of a hit."""
    series = make(url, "rows", prefix=prefix)
    with pytest.raises(UsageError):
        series.import_([json.dumps({"series": "a", "time": day, **row})])


def test_a_bucket_of_members_outlives_a_bad_row(url: str, prefix: str, day: int) -> None:
    """Whatever was read in, hits are counted afterwards."""
    series = TopSeries(url, "pages", prefix=prefix)
    row = {"series": "a", "step": 600, "time": day, "member": "x", "count": -5, "lacks": 0}
    try:
        series.import_([json.dumps(row)])
    except UsageError:
        pass
    series.incr("a", "x", at=day)


def test_a_gauge_is_read_after_a_bad_row(url: str, prefix: str, day: int) -> None:
    """Whatever was read in, a gauge can be read afterwards."""
    series = GaugeSeries(url, "queue", prefix=prefix)
    row = {"step": 10, "time": day, "last": 1, "at": day, "min": 1, "max": 1, "sum": 1, "count": 0}
    try:
        series.import_([json.dumps({"series": "a", **row})])
    except UsageError:
        pass
    series.read("a", day, day + 10)


def test_csv_cut_into_lines(url: str, prefix: str, day: int) -> None:
    """A text of CSV is read in by its lines, as the error for a text recommends."""
    series = TimeSeries(url, "hits", prefix=prefix)
    series.incr("a\u2028b", at=day)
    text = "\n".join(series.export(format="csv"))
    TimeSeries(url, "copy", prefix=prefix).import_(text.splitlines())


@pytest.mark.parametrize(
    "lines", [["series,step,time,value", "a\rb,10,0,1"], [b'{"series": 1}']], ids=["cr", "bytes"]
)
def test_lines_that_are_none(url: str, prefix: str, lines: Any) -> None:
    """What is neither CSV nor JSON is an error that says so."""
    with pytest.raises(UsageError):
        TimeSeries(url, "hits", prefix=prefix).import_(lines)


def test_a_token_that_is_no_text(url: str, prefix: str, day: int) -> None:
    """A token that no key can hold is an error that says so."""
    row = {"series": "a", "step": 10, "time": day, "value": 1}
    with pytest.raises(UsageError):
        TimeSeries(url, "hits", prefix=prefix).import_([json.dumps(row)], token="\udc80")


# Gauges, durations, patterns


def test_a_gauge_is_exact_whatever_precision_decimals_have(url: str, prefix: str, day: int) -> None:
    """The caller's context rounds what the caller calculates, and nothing that is stored."""
    prices = GaugeSeries(url, "prices", prefix=prefix, scale=2)
    prices.set("a", Decimal("1234567.89"), at=day)
    with localcontext() as context:
        context.prec = 4
        assert prices.read("a", day, day + DAY).last == Decimal("1234567.89")
        rows = list(prices.export())
        prices.delete("a", day, day + DAY)
        prices.import_(rows)
    assert prices.read("a", day, day + DAY).max == Decimal("1234567.89")


@pytest.mark.parametrize("text", ["1e99999999", "-1e99999999", "1e-99999999", "NaN", "Infinity"])
def test_a_gauge_that_is_out_of_all_bounds(url: str, prefix: str, day: int, text: str) -> None:
    """It is refused at once, and not after a hundred million digits; so is such a sum in a row."""
    prices = GaugeSeries(url, "prices", prefix=prefix, scale=2)
    with pytest.raises(UsageError, match="a gauge is an int, or a Decimal"):
        prices.set("a", Decimal(text))
    row = {"series": "a", "step": DAY, "time": day, "at": day, "count": 1}
    with pytest.raises(UsageError, match="no row of such a series"):
        prices.import_([json.dumps({**row, "last": "1", "min": "1", "max": "1", "sum": text})])
    prices.set("a", Decimal("0e99999"), at=day)
    assert prices.read("a", day, day + DAY).last == 0


def test_a_duration_beyond_all_bounds(url: str, prefix: str) -> None:
    """It is refused as any other that is too long."""
    with pytest.raises(UsageError, match="from 0 to 19 hours"):
        LatencySeries(url, "took", prefix=prefix).record("a", 10**400)


def test_patterns_go_by_characters(url: str, prefix: str) -> None:
    """As a name has them, not by their bytes."""
    series = TimeSeries(url, "hits", prefix=prefix)
    series.incr_many([(key, 1) for key in ("ä1", "ü1", "x1", b"\xff1")])
    assert sorted(series.keys("[äö]*")) == ["ä1"]
    assert set(series.keys("?1")) == {"ä1", "ü1", "x1", b"\xff1"}
