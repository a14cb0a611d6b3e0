"""Buffered counters: counting, reading, flushing, and what they refuse."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from redishacks.counters import BufferedCounter, FlushJob
from redishacks.errors import PartlyAppliedError, ServerError, UnavailableError, UsageError
from redishacks.sinks import SQLiteSink
from redishacks.testing import valkey_server
from tests.helpers import Colour

NOW = dt.datetime(2026, 5, 17, 10, 5, 3, 123456, tzinfo=dt.UTC)


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def client(request: pytest.FixtureRequest, colour: Colour, valkey: Any) -> Iterator[Any]:
    """A client of either protocol."""
    made = colour.client(valkey.url, protocol=request.param)
    yield made
    if colour.name == "sync":
        made.close()


@pytest.fixture
def raw(valkey: Any) -> Iterator[redis.Redis]:
    """A plain client, to look at what is stored."""
    with redis.Redis.from_url(valkey.url) as made:
        yield made


@pytest.fixture
def sink(tmp_path: Any) -> Iterator[SQLiteSink]:
    """A table of pages in SQLite."""
    import sqlite3

    path = tmp_path / "test.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE pages (path TEXT PRIMARY KEY, hits INTEGER)")
    db.close()
    made = SQLiteSink(path, table="pages", key="path", columns={"amount": "hits"})
    made.create_ledger()
    yield made
    made.close()


def rows(sink: SQLiteSink, tmp_path: Any) -> dict[Any, Any]:
    """Return what SQL shows."""
    import sqlite3

    db = sqlite3.connect(tmp_path / "test.db")
    try:
        return dict(db.execute("SELECT path, hits FROM pages").fetchall())
    finally:
        db.close()


def test_counts_and_reads_back(colour: Colour, client: Any, prefix: str) -> None:
    """A hit is pending at once, sums add up, ids of any type are compared as bytes."""
    hits = colour.counter(client, "hits", prefix=prefix)
    hits.incr("/a")
    hits.incr("/a", 3)
    hits.incr(b"/a", -1)
    hits.incr(42)
    hits.incr("42", 2)
    hits.incr_many({"/b": 7, "/a": 1, b"/a": 1, "zero": 0})
    hits.incr("never", 0)
    assert hits.pending("/a") == 5
    assert hits.pending(42) == 3
    assert hits.pending("zero") == hits.pending("never") == 0
    assert hits.top(2) == [("/b", 7), ("/a", 5)]
    assert hits.top() == [("/b", 7), ("/a", 5), ("42", 3)]


def test_ids_may_hold_anything(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink, tmp_path: Any
) -> None:
    """NUL, newlines, braces, quotes and what is not UTF-8 survive the way to SQL."""
    ids: list[str | bytes] = ["a\0b", "x\ny\r\n", "{}", "{a}{b}", "'\"`;--", "%s %(x)s", "é" * 9]
    ids += [b"\xff\xfe", "x" * 2048, " ", "\\N", "NULL", "{1,2}", '{"a"}']
    hits = colour.counter(client, "odd {name}%", prefix=prefix)
    for id in ids:
        hits.incr(id)
    hits.incr_many(dict.fromkeys(ids, 2))
    assert dict(hits.top(100)) == dict.fromkeys(ids, 3)
    job = colour.job(hits, sink)
    assert [job.value(id) for id in ids] == [3] * len(ids)
    report = job.run()
    assert report.amount == 3 * len(ids)
    assert [job.value(id) for id in ids] == [3] * len(ids)
    in_sql = rows(sink, tmp_path)
    refused = [i for i in ids if i not in in_sql]
    assert report.dead == len(refused) == len(sink.dead())
    assert all(amount == 3 for amount in in_sql.values())


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("", "1 to 2048 bytes, and this one has 0"),
        ("x" * 3000, "this one has 3000"),
        ("é" * 1025, "this one has 2050"),
        ("\ud800", "not encodable"),
        (1.5, "not float"),
        (True, "not bool"),
        (None, "not NoneType"),
    ],
)
@pytest.mark.parametrize("linger", [None, 0.1])
def test_refuses_ids(
    colour: Colour, client: Any, prefix: str, id: Any, message: str, linger: float | None
) -> None:
    """An id that can never work is refused where it is given, also with linger."""
    hits = colour.counter(client, "hits", prefix=prefix, linger=linger)
    with pytest.raises(UsageError, match=message):
        hits.incr(id)
    with pytest.raises(UsageError, match=message):
        hits.incr_many({"good": 1, id: 1})
    hits.close()
    assert hits.pending("good") == 0


@pytest.mark.parametrize("amount", [1.0, "1", None, True, 2**53 + 1, -(2**53) - 1, NOW])
@pytest.mark.parametrize("linger", [None, 0.1])
def test_refuses_amounts(
    colour: Colour, client: Any, prefix: str, amount: Any, linger: float | None
) -> None:
    """A sum takes integers up to 2^53 only."""
    hits = colour.counter(client, "hits", prefix=prefix, linger=linger)
    with pytest.raises(UsageError):
        hits.incr("a", amount=amount, nonsense=1) if amount is None else hits.incr("a", amount)
    hits.close()


@pytest.mark.parametrize("many", [[("a", 1)], {"a"}, "ab", None, {"a": None}, {"b": 1, "a": 1.0}])
@pytest.mark.parametrize("linger", [None, 0.1])
def test_refuses_what_is_no_mapping_to_amounts(
    colour: Colour, client: Any, prefix: str, many: Any, linger: float | None
) -> None:
    """`incr_many` says what it accepts, and counts nothing of what it does not."""
    hits = colour.counter(client, "hits", prefix=prefix, linger=linger)
    with pytest.raises(
        UsageError, match="an amount is" if isinstance(many, dict) else "a mapping of"
    ):
        hits.incr_many(many)
    hits.close()
    assert hits.top() == []


def test_a_mapping_may_change_meanwhile(colour: Colour, client: Any, prefix: str) -> None:
    """`incr_many` counts the hits as they were when it was called."""

    class Id(str):
        """An id whose encoding changes the mapping, as another thread might."""

        def encode(self, *args: Any) -> bytes:
            many["new"] = 1
            return super().encode(*args)

    many: dict[str, int] = {"a": 1, Id("b"): 2}
    hits = colour.counter(client, "hits", prefix=prefix)
    hits.incr_many(many)
    assert hits.top() == [("b", 2), ("a", 1)]


def test_sums_are_exact_to_2_53(colour: Colour, client: Any, prefix: str) -> None:
    """What would pass 2^53 in either direction is refused whole, never rounded."""
    hits = colour.counter(client, "hits", prefix=prefix)
    hits.incr("up", 2**53 - 1)
    hits.incr("up")
    with pytest.raises(UsageError, match=r"2\^53"):
        hits.incr("up")
    hits.incr("down", -(2**53))
    with pytest.raises(UsageError, match=r"2\^53"):
        hits.incr("down", -1)
    with pytest.raises(UsageError, match="'up' would pass"):
        hits.incr_many({"other": 1, "up": 1})
    assert (hits.pending("up"), hits.pending("down"), hits.pending("other")) == (2**53, -(2**53), 0)


def test_columns_merge_by_their_rules(colour: Colour, client: Any, prefix: str) -> None:
    """Sums add, max and min never go back, and a column without amounts stays empty."""
    issues = colour.counter(
        client,
        "issues",
        prefix=prefix,
        columns={"times_seen": "sum", "last_seen": "max", "first_seen": "min"},
    )
    earlier = NOW - dt.timedelta(days=1)
    issues.incr(42, times_seen=1, last_seen=NOW, first_seen=NOW)
    issues.incr(42, times_seen=1, last_seen=earlier, first_seen=earlier)
    issues.incr(42)
    issues.incr(7, last_seen=5)
    issues.incr_many({7: {"last_seen": 4}, 8: {"times_seen": 2}, "8": {"first_seen": 3}})
    micros = 1779012303123456
    assert issues.pending(42) == 3
    assert issues.pending(42, "last_seen") == micros
    assert issues.pending(42, "first_seen") == micros - 86_400_000_000
    assert issues.pending(7, "last_seen") == 5
    assert issues.pending(8) == 2
    assert issues.pending(8, "first_seen") == 3
    with pytest.raises(UsageError, match="no column 'nope'"):
        issues.incr(1, nope=1)
    with pytest.raises(UsageError, match="time zone"):
        issues.incr(1, last_seen=NOW.replace(tzinfo=None))


def test_a_first_column_may_be_max(colour: Colour, client: Any, prefix: str, tmp_path: Any) -> None:
    """An id that has no amount in the first column reaches SQL all the same."""
    import sqlite3

    db = sqlite3.connect(tmp_path / "seen.db")
    db.execute("CREATE TABLE seen (id INTEGER PRIMARY KEY, last INTEGER, n INTEGER, low INTEGER)")
    seen = colour.counter(
        client, "seen", prefix=prefix, columns={"last": "max", "n": "sum", "low": "min"}
    )
    sink = SQLiteSink(
        tmp_path / "seen.db",
        table="seen",
        key="id",
        columns={"last": "last", "n": "n", "low": "low"},
    )
    sink.create_ledger()
    job = colour.job(seen, sink)
    with pytest.raises(UsageError, match="give an amount"):
        seen.incr(1)
    seen.incr(1, n=2)
    seen.incr(2, last=9)
    assert job.values(1) == {"last": None, "n": 2, "low": None}
    job.run()
    seen.incr(1, last=-5, low=4)
    seen.incr(1, low=-4)
    job.run()
    assert db.execute("SELECT * FROM seen ORDER BY id").fetchall() == [
        (1, -5, 2, -4),
        (2, 9, 0, None),
    ] or (
        db.execute("SELECT * FROM seen ORDER BY id").fetchall()
        == [(1, -5, 2, -4), (2, 9, None, None)]
    )
    assert job.values(1) == {"last": -5, "n": 2, "low": -4}
    sink.close()
    db.close()


def test_flush_moves_everything_once(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink, tmp_path: Any, raw: redis.Redis
) -> None:
    """A run empties the pending set into SQL; the next one has nothing to do; value stays."""
    hits = colour.counter(client, "hits", prefix=prefix)
    hits.incr_many({f"/{i}": i for i in range(1, 26)})
    job = colour.job(hits, sink, chunk=10)
    assert job.value("/7") == 7
    report = job.run()
    assert report._replace(seconds=0) == (1, 25, 325, 0, 0, 0, 0)
    assert rows(sink, tmp_path) == {f"/{i}": i for i in range(1, 26)}
    assert job.value("/7") == 7
    assert hits.top() == []
    hits.incr("/7")
    assert job.value("/7") == 8
    assert job.run().rows == 1
    assert rows(sink, tmp_path)["/7"] == 8
    assert job.run()._replace(seconds=0) == (0, 0, 0, 0, 0, 0, 0)
    found: Any = raw.keys(f"{prefix}:*")
    left = {key.rsplit(b":", 1)[1] for key in found}
    assert left == {b"meta", b"next"}


def test_partitions_spread_and_flush_collects(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink, tmp_path: Any, raw: redis.Redis
) -> None:
    """Eight partitions hold one counter; reading, top and flush see all of them."""
    hits = colour.counter(client, "hits", prefix=prefix, partitions=8)
    hits.incr_many({f"/{i}": i for i in range(1, 101)})
    hits.incr("/100")
    assert len(raw.keys(f"{prefix}:*:p:amount")) == 8
    assert hits.pending("/100") == 101
    assert hits.top(2) == [("/100", 101), ("/99", 99)]
    job = colour.job(hits, sink)
    assert job.value("/100") == 101
    assert job.status().pending_ids == 100
    assert job.status().pending_amount == {"amount": 5051}
    report = job.run()
    assert (report.batches, report.rows, report.amount) == (8, 100, 5051)
    assert sum(rows(sink, tmp_path).values()) == 5051
    assert job.value("/100") == 101


def test_everybody_must_mean_the_same(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink, raw: redis.Redis
) -> None:
    """Other partitions, another rule, another destination are refused, and leave no mark."""
    hits = colour.counter(client, "hits", prefix=prefix)
    hits.incr("/a")
    job = colour.job(hits, sink)
    job.run()
    keys = set(raw.keys(f"{prefix}:*"))
    with pytest.raises(UsageError, match="in use with partitions = 1, and this one says 4"):
        colour.counter(client, "hits", prefix=prefix, partitions=4).incr("/a")
    with pytest.raises(UsageError, match="in use with column amount = sum"):
        colour.counter(client, "hits", prefix=prefix, columns={"amount": "max"}).incr("/a", 1)
    other = SQLiteSink(sink_path(sink), table="others", key="path", columns={"amount": "hits"})
    with pytest.raises(UsageError, match="in use with destination"):
        colour.job(hits, other).value("/a")
    other.close()
    assert set(raw.keys(f"{prefix}:*")) == keys
    job.rebind()
    assert job.run().batches == 0


def sink_path(sink: SQLiteSink) -> str:
    """Return a path for a second sink."""
    return ":memory:"


def test_a_job_must_know_every_column(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink
) -> None:
    """A column added by newer producers is not left behind by an older job: it refuses."""
    newer = colour.counter(client, "hits", prefix=prefix, columns={"amount": "sum", "seen": "max"})
    newer.incr("/a", amount=1, seen=5)
    older = colour.counter(client, "hits", prefix=prefix)
    older.incr("/a")
    with pytest.raises(UsageError, match="'seen'"):
        colour.job(older, sink).run()
    assert newer.pending("/a") == 2


def test_incr_many_of_any_size(colour: Colour, client: Any, prefix: str) -> None:
    """Many ids go out in parts, and a part that is refused does not touch the others."""
    hits = colour.counter(client, "hits", prefix=prefix)
    many: dict[Any, int] = {f"/{i}": 1 for i in range(57_000)}
    hits.incr_many(many)
    assert hits.pending("/56999") == 1
    hits.incr("bad", 2**53)
    with pytest.raises(PartlyAppliedError, match="55000 of 57001 ids were added") as caught:
        hits.incr_many({**many, "bad": 1})
    assert len(caught.value.failed) == 2001
    assert "bad" in caught.value.failed
    assert hits.pending("/54999") == 2
    assert hits.pending("/55000") == 1
    assert hits.pending("bad") == 2**53
    with pytest.raises(UsageError, match="'twice' would pass"):
        hits.incr_many({"twice": 2**53, b"twice": 1})
    assert hits.pending("twice") == 0
    hits.incr_many({b"x" * 2000 + b"%d" % i: 1 for i in range(2_000)})  # 4 MB: parts by weight
    assert hits.pending(b"x" * 2000 + b"1999") == 1
    assert hits.incr_many({}) is None


def test_a_foreign_key_is_a_clear_error(
    colour: Colour, client: Any, prefix: str, raw: redis.Redis
) -> None:
    """Somebody else's value under our key is WRONGTYPE, and nothing is half done."""
    issues = colour.counter(client, "hits", prefix=prefix, columns={"amount": "sum", "seen": "max"})
    issues.incr("a", amount=1, seen=1)
    key = f"{prefix}:c1:{{hits/0}}:p:seen"
    raw.set(key, "mine")
    with pytest.raises(ServerError, match="WRONGTYPE"):
        issues.incr("a", amount=1, seen=2)
    assert issues.pending("a") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"columns": {}},
        {"columns": {"a b": "sum"}},
        {"columns": {"a": "avg"}},
        {"columns": "sum"},
        {"partitions": 0},
        {"partitions": True},
        {"deadline": 0},
        {"deadline": "1"},
        {"prefix": ""},
        {"linger": -1},
        {"linger": 1e6},
        {"linger": 1, "max_buffered": 0},
        {"linger": 1, "overflow": "drop"},
    ],
)
def test_refuses_settings(valkey: Any, wrong: dict[str, Any]) -> None:
    """Settings that can never work are refused in the constructor."""
    with pytest.raises(UsageError):
        BufferedCounter(valkey.url, "hits", **wrong)


def test_job_refuses_what_does_not_fit(valkey: Any, sink: SQLiteSink, prefix: str) -> None:
    """A job takes a counter of its colour, a sink, and a chunk size that a server can bear."""
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix)
    with pytest.raises(UsageError, match="BufferedCounter"):
        FlushJob("hits", sink)  # type: ignore[arg-type]
    for chunk in (0, 1_000_000, True, "10"):
        with pytest.raises(UsageError, match="chunk"):
            FlushJob(hits, sink, chunk=chunk)  # type: ignore[arg-type]


def test_no_key_of_a_count_expires(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink, raw: redis.Redis
) -> None:
    """Only a producer's fence has a TTL; what must reach SQL, or says how, has none."""
    hits = colour.counter(client, "hits", prefix=prefix, linger=0.05)
    job = colour.job(hits, sink)
    for times in (1, 2):
        hits.incr("/a")
        hits.send()
        assert job.value("/a") == times
        if times == 1:
            job.run()
    ttls = {key: raw.ttl(key) for key in raw.keys(f"{prefix}:*")}
    assert len(ttls) == 5
    for key, ttl in ttls.items():
        if b":f:" in key:
            assert 86_000 < ttl <= 86_400
        else:
            assert ttl == -1, key
    hits.close()


def test_status_tells_where_a_counter_stands(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink
) -> None:
    """Pending ids and amounts, the age of the oldest hit, the last flush."""
    hits = colour.counter(client, "hits", prefix=prefix)
    job = colour.job(hits, sink)
    empty = job.status()
    assert (empty.pending_ids, empty.oldest, empty.last_flush, empty.batches) == (0, None, None, [])
    hits.incr_many({"/a": 5, "/b": -2})
    status = job.status()
    assert (status.pending_ids, status.pending_amount, status.dead) == (2, {"amount": 3}, 0)
    assert 0 <= status.oldest < 10
    job.run()
    status = job.status()
    assert (status.pending_ids, status.oldest) == (0, None)
    assert 0 <= status.last_flush < 10


def test_a_stopped_run_leaves_the_rest_pending(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink
) -> None:
    """stop() and a time budget end a run between batches; nothing is begun after."""
    hits = colour.counter(client, "hits", prefix=prefix, partitions=4)
    hits.incr_many({f"/{i}": 1 for i in range(100)})
    job: Any = colour.job(hits, sink, on_batch=lambda report: job.stop())
    assert job.run().batches == 1
    assert job.run(time_budget=0.0).batches == 0
    assert 0 < job.status().pending_ids < 100
    while job.run().batches:
        pass
    assert job.status().pending_ids == 0


def test_a_full_server_is_drained(colour: Colour, prefix: str, sink: SQLiteSink) -> None:
    """With Redis at its memory limit hits are refused, and a flush, which frees memory, is not."""
    with valkey_server(maxmemory_policy="noeviction") as server:
        hits = colour.counter(colour.client(server.url), "hits", prefix=prefix)
        job = colour.job(hits, sink)
        hits.incr("/first")
        job.run()
        hits.incr_many({f"/{i}": 1 for i in range(1000)})
        with server.client() as raw:
            raw.config_set("maxmemory", 1)
            with pytest.raises(UnavailableError, match="OOM"):
                hits.incr("/refused")
            assert job.value("/7") == 1
            assert job.status().pending_ids == 1000
            assert job.run().rows == 1000
            raw.config_set("maxmemory", 0)
        assert job.value("/refused") == 0


def test_a_job_that_was_left_behind_by_rebind_stops(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink, tmp_path: Any
) -> None:
    """After rebind() and a run elsewhere the old job flushes nothing any more."""
    import sqlite3

    db = sqlite3.connect(tmp_path / "test.db")
    db.execute("CREATE TABLE others (path TEXT PRIMARY KEY, hits INTEGER)")
    db.close()
    other = SQLiteSink(tmp_path / "test.db", table="others", key="path", columns={"amount": "hits"})
    hits = colour.counter(client, "hits", prefix=prefix)
    old, new = colour.job(hits, sink), colour.job(hits, other)
    hits.incr("/a")
    old.run()
    new.rebind()
    new.run()
    hits.incr("/a")
    with pytest.raises(UsageError, match="destination"):
        old.run()
    assert new.run().rows == 1
    assert rows(sink, tmp_path) == {"/a": 1}
    other.close()


def test_looking_leaves_no_trace(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink, raw: redis.Redis
) -> None:
    """status(), pending() and top() of a name nobody counts under make no key, and say so."""
    hits = colour.counter(client, "typo", prefix=prefix)
    status = colour.job(hits, sink).status()
    assert not status.known
    assert (hits.pending("/a"), hits.top()) == (0, [])
    assert raw.keys(f"{prefix}:*") == []
    hits.incr("/a")
    assert colour.job(hits, sink).status().known


def test_looking_with_another_layout_is_refused(
    colour: Colour, client: Any, prefix: str, sink: SQLiteSink
) -> None:
    """Nobody is shown a part of a counter as if it were all of it."""
    colour.counter(client, "hits", prefix=prefix, partitions=4).incr("/a")
    part = colour.counter(client, "hits", prefix=prefix)
    for look in (lambda: part.pending("/a"), part.top, colour.job(part, sink).status):
        with pytest.raises(UsageError, match="partitions = 4"):
            look()


@pytest.mark.parametrize("sink", [None, "postgresql://x", SQLiteSink])
def test_a_job_needs_a_sink(valkey: Any, sink: Any) -> None:
    """What is no sink is refused where it is given."""
    with pytest.raises(UsageError, match="sink"):
        FlushJob(BufferedCounter(valkey.url, "hits"), sink)


@pytest.mark.parametrize("budget", [-1, "1", float("nan"), True])
def test_a_time_budget_is_a_number(valkey: Any, sink: SQLiteSink, prefix: str, budget: Any) -> None:
    """A budget that is none is refused before anything is claimed."""
    with pytest.raises(UsageError, match="time_budget"):
        FlushJob(BufferedCounter(valkey.url, "hits", prefix=prefix), sink).run(time_budget=budget)
