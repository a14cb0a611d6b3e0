"""Buffered counters against the talk's code, redis-py and the bare SQL statement."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import redis

from benchmarks.harness import Figure, Row, limit_row, ratio_row, side_by_side
from benchmarks.transport import in_threads
from redishacks.counters import BufferedCounter, FlushJob
from redishacks.sinks import PostgresSink
from redishacks.testing import postgres_server, valkey_server

IDS = [f"/page/{i}" for i in range(1000)]
MANY = 100_000
CHUNK = 20_000


def counting(url: str) -> list[Row]:
    """Hits per second: with linger, without, and many at once."""
    rows = []
    watch = redis.Redis.from_url(url)
    peer = redis.Redis.from_url(url)

    def talk() -> int:
        for id in IDS * 2:
            peer.zincrby("talk", 1, id)
        return 2 * len(IDS)

    def linger() -> int:
        counter = BufferedCounter(url, "linger", linger=0.1)
        incr = counter.incr
        for _ in range(1000):
            for id in IDS:
                incr(id)
        counter.close()
        return 1000 * len(IDS)

    figures = side_by_side({"ours": linger, "talk": talk}, watch=watch)
    held: Any = watch.zrange("rh:c1:{linger/0}:p:amount", 0, -1, withscores=True)
    assert sum(score for _, score in held) == 8 * 1000 * len(IDS), "hits are missing"
    rows.append(
        ratio_row("incr with linger, 1,000 ids, until closed", figures, "ours", "talk", 150)
    )
    print(f"  commands per hit: {figures['ours'].commands:.6f}")

    counter = BufferedCounter(url, "direct")

    def each(count: Callable[[str], Any]) -> None:
        for id in IDS:
            count(id)

    def direct() -> int:
        in_threads(8, lambda: each(counter.incr))
        return 8 * len(IDS)

    def zincrby() -> int:
        in_threads(8, lambda: each(lambda id: peer.zincrby("direct", 1, id)))
        return 8 * len(IDS)

    figures = side_by_side({"ours": direct, "redis-py": zincrby}, watch=watch)
    rows.append(ratio_row("incr, 8 threads", figures, "ours", "redis-py", 3))
    print(f"  commands per hit: {figures['ours'].commands:.3f}")

    hits = dict.fromkeys(IDS, 1)

    def many() -> int:
        for _ in range(10):
            counter.incr_many(hits)
        return 10 * len(IDS)

    def pipeline() -> int:
        for _ in range(10):
            pipe = peer.pipeline()
            for id in IDS:
                pipe.zincrby("many", 1, id)
            pipe.execute()
        return 10 * len(IDS)

    figures = side_by_side({"ours": many, "redis-py": pipeline})
    rows.append(ratio_row("incr_many of 1,000 ids", figures, "ours", "redis-py", 2.5))
    return rows


def flushing(url: str, dsn: str) -> list[Row]:
    """100,000 ids to PostgreSQL, end to end."""
    rows = []
    ids = [f"/page/{i:07d}" for i in range(MANY)]
    db = psycopg.connect(dsn, autocommit=True)
    db.execute("CREATE TABLE pages (path text PRIMARY KEY, hits bigint NOT NULL DEFAULT 0)")
    db.execute("INSERT INTO pages SELECT unnest(%s::text[]), 0", [ids])
    db.execute("VACUUM ANALYZE pages")
    for mode in ("upsert", "update"):
        sink = PostgresSink(
            dsn,
            table="pages",
            key="path",
            columns={"amount": "hits"},
            mode=mode,
        )
        sink.create_ledger()
        counter = BufferedCounter(url, f"flush-{mode}")
        job = FlushJob(counter, sink, chunk=CHUNK)
        runs = {
            "ours": _end_to_end(counter, job, ids),
            "bare": _bare(db, mode, ids),
            "talk": _talk(url, db, ids[:5_000]),
        }
        figures = _timed(runs, rounds=11)
        rows.append(ratio_row(f"flush of 100,000 ids, {mode}, rows", figures, "ours", "talk", 10))
        rows.append(
            ratio_row(f"flush of 100,000 ids, {mode}, bare SQL", figures, "ours", "bare", 0.75)
        )
        sink.close()
    db.close()
    return rows


def _timed(contenders: dict[str, Callable[[], tuple[int, float]]], rounds: int) -> Any:
    """Like `side_by_side`, for contenders that time themselves, since they have to prepare."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            rows, seconds = run()
            if turn:
                rates[name].append(rows / seconds)
    return {
        name: Figure(name, statistics.median(values), rates=values)
        for name, values in rates.items()
    }


def _end_to_end(
    counter: BufferedCounter, job: FlushJob, ids: list[str]
) -> Callable[[], tuple[int, float]]:
    def run() -> tuple[int, float]:
        counter.incr_many(dict.fromkeys(ids, 1))
        began = time.perf_counter()
        report = job.run()
        assert report.rows == len(ids)
        return report.rows, time.perf_counter() - began

    return run


_BARE = {
    "upsert": (
        "INSERT INTO pages (path, hits) SELECT * FROM unnest(%s::text[], %s::bigint[]) ORDER BY 1 "
        "ON CONFLICT (path) DO UPDATE SET hits = pages.hits + excluded.hits"
    ),
    "update": (
        "UPDATE pages SET hits = pages.hits + s.n FROM "
        "(SELECT * FROM unnest(%s::text[], %s::bigint[]) AS u (path, n) ORDER BY 1) s "
        "WHERE pages.path = s.path"
    ),
}


def _bare(
    db: psycopg.Connection[Any], mode: str, ids: list[str]
) -> Callable[[], tuple[int, float]]:
    chunks = []
    for at in range(0, len(ids), CHUNK):
        part = ids[at : at + CHUNK]
        chunks.append(("{" + ",".join(part) + "}", "{" + ",".join("1" for _ in part) + "}"))

    def run() -> tuple[int, float]:
        began = time.perf_counter()
        for chunk in chunks:
            with db.transaction():
                if mode == "update":
                    for setting in ("hashjoin", "mergejoin", "seqscan", "bitmapscan"):
                        db.execute(f"SET LOCAL enable_{setting} = off")
                db.execute(_BARE[mode], chunk)
        return len(ids), time.perf_counter() - began

    return run


def _talk(url: str, db: psycopg.Connection[Any], ids: list[str]) -> Callable[[], tuple[int, float]]:
    """Make the talk's flush: read the sorted set, an UPDATE for each member."""
    client = redis.Redis.from_url(url)
    client.zadd("talk:pending", dict.fromkeys(ids, 1))

    def run() -> tuple[int, float]:
        began = time.perf_counter()
        pending: Any = client.zrange("talk:pending", 0, -1, withscores=True)
        with db.transaction():
            for id, count in pending:
                params = {"id": id.decode(), "count": int(count)}
                db.execute("UPDATE pages SET hits = hits + %(count)s WHERE path = %(id)s", params)
        return len(ids), time.perf_counter() - began

    return run


#: A flush of a million ids, in a process of its own; prints what it took.
_MILLION = """
import json, sys, time
from redishacks.counters import BufferedCounter, FlushJob
from redishacks.sinks import PostgresSink

url, dsn = sys.argv[1:]
longest = 0.0
real = PostgresSink.apply

def apply(self, chunk):
    global longest
    began = time.perf_counter()
    result = real(self, chunk)
    longest = max(longest, time.perf_counter() - began)
    return result

PostgresSink.apply = apply
sink = PostgresSink(dsn, table="million", key="path", columns={"amount": "hits"})
sink.create_ledger()
report = FlushJob(BufferedCounter(url, "million"), sink).run()
# Not ru_maxrss: that begins with the parent's at the fork.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) / 1024
print(json.dumps([report.rows, report.seconds, longest, peak]))
"""


def million(url: str, dsn: str) -> list[Row]:
    """A million ids: memory of the flusher, longest transaction, slowest Redis command."""
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("CREATE TABLE million (path text PRIMARY KEY, hits bigint)")
    counter = BufferedCounter(url, "million")
    client = redis.Redis.from_url(url)
    client.config_set("slowlog-log-slower-than", 1000)
    client.config_set("slowlog-max-len", 10_000)
    for at in range(0, 1_000_000, 100_000):
        counter.incr_many({f"/page/{i:07d}": 1 for i in range(at, at + 100_000)})
    client.slowlog_reset()
    done = subprocess.run(
        [sys.executable, "-c", _MILLION, url, dsn], capture_output=True, text=True, check=True
    )
    rows, seconds, longest, peak = json.loads(done.stdout)
    assert rows == 1_000_000
    slow: Any = client.slowlog_get(10_000)
    slowest = max((entry["duration"] for entry in slow), default=1000) / 1000
    print(f"  a million ids in {seconds:.1f} s")
    return [
        limit_row("flush of 1,000,000 ids: peak memory of the flusher", peak, 100, "MB"),
        limit_row("flush of 1,000,000 ids: longest transaction", longest, 0.5, "s"),
        limit_row("flush of 1,000,000 ids: slowest Redis command", slowest, 15, "ms"),
    ]


def run() -> list[Row]:
    """Run all of it."""
    assert threading.active_count() < 10
    with valkey_server() as server, postgres_server() as postgres:
        rows = counting(server.url)
        rows += flushing(server.url, postgres.dsn)
        rows += million(server.url, postgres.dsn)
    return rows
