"""The README does what it says: every example runs, the ACL is enough, the tables are there."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from redishacks.counters import BufferedCounter, FlushJob
from redishacks.locks import Lock, MultiLock, RWLock, Semaphore
from redishacks.ratelimit import Ban, ConcurrencyLimiter, Limit, RateLimiter
from redishacks.sinks import PostgresSink
from redishacks.testing import Server, valkey_server

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.fixture
def nodes() -> Iterator[list[Server]]:
    """Three servers."""
    with ExitStack() as stack:
        yield [stack.enter_context(valkey_server()) for _ in range(3)]


def test_every_python_example_runs(
    valkey: Any, pg_dsn: str, prefix: str, nodes: list[Server]
) -> None:
    """The examples run one after another, as a reader would type them."""
    with psycopg.connect(pg_dsn) as db:
        db.execute("CREATE TABLE pages (path text PRIMARY KEY, hits bigint)")
        db.execute("CREATE TABLE views (path text PRIMARY KEY, n bigint)")
        db.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int, fence bigint)")
        db.execute("INSERT INTO accounts VALUES (1, 0, 0)")
    PostgresSink(pg_dsn, table="pages", key="path", columns={"amount": "hits"}).create_ledger()
    names: dict[str, Any] = {"__name__": "readme"}
    with redis.Redis.from_url(valkey.url) as raw:
        raw.flushdb()
    for block in blocks("python"):
        code = block.replace("redis://localhost:6379", valkey.url)
        code = code.replace("postgresql://localhost/app", pg_dsn)
        for number, node in enumerate(nodes, 1):
            code = code.replace(f"redis://10.0.0.{number}", node.url)
        # An expression with a result in its comment is a promise.
        code = re.sub(r"^(\w.*?\))\s+# .*: (\S.*)$", r"assert \1 == \2, \1", code, flags=re.M)
        exec(compile(code, "README.md", "exec"), names)
    assert names["report"].rows == 3
    assert names["issues"].pending(42) == 1
    assert names["fast"].pending("/index.html") == 1000
    assert names["job"].value("/index.html") == 1004
    with psycopg.connect(pg_dsn) as db:
        assert db.execute("SELECT n FROM views").fetchall() == [(1,)]
        assert db.execute("SELECT balance FROM accounts WHERE fence > 0").fetchall() == [(-7,)]
    names["sink"].close()
    names["connection"].close()
    names["client"].close()
    names["hits"].transport.close()


def test_promised_results_are_checked() -> None:
    """The examples above do promise results, else the test before this one sees nothing."""
    found = re.findall(r"^(\w.*?\))\s+# .*: (\S.*)$", "\n".join(blocks("python")), re.M)
    assert len(found) >= 3


def test_the_acl_is_enough(valkey: Any, pg_dsn: str) -> None:
    """A user with the rights the README lists can count, read, flush and be looked at."""
    line = re.search(r"^user counters on (.*)$", README, re.M)
    assert line is not None
    with psycopg.connect(pg_dsn) as db:
        db.execute("CREATE TABLE pages (path text PRIMARY KEY, hits bigint)")
    with redis.Redis.from_url(valkey.url) as raw:
        raw.execute_command("ACL", "SETUSER", "counters", "reset", "on", *line[1].split())
        try:
            user = redis.Redis(port=valkey.port, username="counters", password="password")
            with BufferedCounter(user, "acl", linger=60) as hits:
                hits.incr("/a")
            hits = BufferedCounter(user, "acl")
            hits.incr_many({"/a": 1})
            assert (hits.pending("/a"), hits.top()) == (2, [("/a", 2)])
            sink = PostgresSink(pg_dsn, table="pages", key="path", columns={"amount": "hits"})
            sink.create_ledger()
            job = FlushJob(hits, sink)
            assert job.value("/a") == 2
            assert job.status().pending_ids == 1
            assert job.run().rows == 1
            job.rebind()
            sink.close()
            user.close()
        finally:
            raw.execute_command("ACL", "DELUSER", "counters")


def test_the_acl_for_limits_is_enough(valkey: Any, prefix: str) -> None:
    """A user with the rights the README lists can be limited in every way."""
    line = re.search(r"^user limits on (.*)$", README, re.M)
    assert line is not None
    with redis.Redis.from_url(valkey.url) as admin:
        admin.execute_command("ACL", "SETUSER", "limits", "reset", "on", *line[1].split())
        user = redis.Redis(port=valkey.port, username="limits", password="password")
        try:
            limits = [Limit(20, 60, algorithm=each) for each in ("window", "fixed", "gcra", "log")]
            limiter = RateLimiter(
                user, prefix, *limits, on_error="local", ban=Ban(3, 60), deny_cache=False
            )
            decision = limiter.hit("u")
            assert [limiter.hit("u", 20).allowed for _ in range(2)] == [False, False]
            assert limiter.refund(decision) == 1
            assert limiter.peek("u").remaining == 20
            limiter.close()
            assert limiter.top() == [("u", 2)]
            limiter.reset("u")
            window = RateLimiter(user, f"{prefix}-window", Limit(20, 60))
            assert window.hit("u").source == "redis"
            for key in admin.scan_iter("*-window/u*"):
                admin.persist(key)
            assert not window.hit("u", 20).allowed
            places = ConcurrencyLimiter(user, prefix, 1)
            with places() as slot:
                assert slot.renew()
                assert len(places.holders()) == 1
            places.reset()
            log: Any = admin.acl_log()
            assert not [entry for entry in log if entry["username"] == "limits"]
            user.close()
        finally:
            admin.execute_command("ACL", "DELUSER", "limits")


def test_the_acl_of_locks_is_enough(valkey: Any, prefix: str) -> None:
    """A user with the rights the README lists can acquire, wait, renew, prove and give back."""
    line = re.search(r"^user locks on (.*)$", README, re.M)
    assert line is not None
    with redis.Redis.from_url(valkey.url) as admin:
        admin.execute_command("ACL", "SETUSER", "locks", "reset", "on", *line[1].split())
        user = redis.Redis(port=valkey.port, username="locks", password="password")
        try:
            locks: list[Any] = [
                Lock(user, prefix, wait=5, ttl=0.3, renew=True),
                Semaphore(user, prefix, 1, wait=5, ttl=0.3, renew=True),
                RWLock(user, prefix, wait=5).write,
                MultiLock(user, [f"{prefix}-a", f"{prefix}-b"], wait=5),
            ]
            for lock in locks:
                held = lock.acquire()
                with ThreadPoolExecutor(1) as pool:
                    waiting = pool.submit(lock.acquire)
                    time.sleep(0.5)
                    held.extend(1)
                    held.release()
                    waiting.result().release()
            assert [lock.holders() for lock in locks[:3]] == [[], [], []]
            assert not any(lock.force_release() for lock in locks[:3])
            with locks[0] as held, held.transaction() as pipe:
                pipe.set(f"rh:{prefix}", 1)
            assert pipe.results == [True]
            log: Any = admin.acl_log()
            assert not [entry for entry in log if entry["username"] == "locks"], log
            user.close()
        finally:
            admin.execute_command("ACL", "DELUSER", "locks")


def test_the_cron_line_is_understood() -> None:
    """The options of the cron line are options of the command."""
    line = re.search(r"^\* \* \* \* \* redishacks flush (\S+) (.*)$", README, re.M)
    assert line is not None
    shown = subprocess.run(
        [sys.executable, "-m", "redishacks", "flush", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for option in re.findall(r"--\w+", line[2]):
        assert option in shown


@pytest.mark.parametrize("name", re.findall(r"^\| `(redishacks\.\w+)` \|", README, re.M))
def test_every_tool_of_the_table_is_there(name: str) -> None:
    """Each module of the table imports alone."""
    subprocess.run([sys.executable, "-W", "error", "-c", f"import {name}"], check=True)
