"""Every step of a flush as its last one: nothing lost, nothing doubled, in both databases."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import threading
import time
from functools import partial
from typing import Any

import psycopg
import pytest
import redis

from redishacks.counters import BufferedCounter, FlushJob
from redishacks.errors import UnavailableError
from redishacks.sinks import _sqlite_database
from redishacks.testing import FaultProxy
from tests import workers
from tests.helpers import eventually
from tests.workers import Database

pytestmark = pytest.mark.slow

IDS = {f"/{i}": i + 1 for i in range(7)}
CHUNK = 3


@pytest.fixture(params=["postgres", "sqlite"])
def database(request: pytest.FixtureRequest, tmp_path: Any) -> Database:
    """Both databases, with one test body."""
    if request.param == "postgres":
        return Database(request.getfixturevalue("pg_dsn"))
    return Database(str(tmp_path / "test.db"))


class Case:
    """A counter with hits, a flusher that meets a fault, and the recovery."""

    def __init__(self, valkey: Any, database: Database) -> None:
        self.valkey = valkey
        self.database = database
        self.prefix = f"rh-{secrets.token_hex(6)}"
        self.truth = dict(IDS)
        database.empty()
        self.counter = BufferedCounter(valkey.url, "hits", prefix=self.prefix)
        self.counter.incr_many(IDS)
        self.mine, self.theirs = workers.pipe()
        self.process: Any = None

    def start(
        self, at: int, action: str, redis_url: str | None = None, sql_url: str | None = None
    ) -> None:
        """Start the flusher."""
        self.process = workers.start(
            workers.flush,
            redis_url or self.valkey.url,
            self.prefix,
            sql_url or self.database.url,
            CHUNK,
            at,
            action,
            self.theirs,
        )

    def more(self) -> None:
        """Hits that arrive meanwhile."""
        for id in ("/0", "/6", "/new"):
            self.counter.incr(id)
            self.truth[id] = self.truth.get(id, 0) + 1

    def recover(self) -> FlushJob:
        """The next cron job, twice; then everything is in SQL, once."""
        sink = workers.make_sink(self.database.url)
        job = FlushJob(self.counter, sink, chunk=5)
        assert job.value("/0") == self.truth["/0"]
        assert job.value("/6") == self.truth["/6"]
        job.run()
        assert job.run().batches == 0
        assert self.database.shown() == self.truth
        assert job.value("/6") == self.truth["/6"]
        assert sink.dead() == []
        sink.close()
        return job

    def end(self) -> None:
        """Let the flusher end, by force if it will not."""
        self.process.join(20)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            pytest.fail("the flusher hangs")
        self.process.close()


def steps_of_a_clean_run(valkey: Any, database: Database) -> int:
    """Count the steps of a flush that meets no fault."""
    case = Case(valkey, database)
    case.start(0, "")
    steps, report = case.mine.recv()
    case.end()
    assert report.rows == 7
    case.recover()
    return int(steps)


@pytest.mark.parametrize("action", ["kill", "raise", "lost"])
def test_a_fault_at_every_step(valkey: Any, database: Database, action: str) -> None:
    """Killed, failed, or left without an answer at any step: error 0 after recovery."""
    steps = steps_of_a_clean_run(valkey, database)
    assert steps > 20
    for at in range(1, steps + 1):
        case = Case(valkey, database)
        case.start(at, action)
        if action == "kill":
            case.process.join(20)
            assert case.process.exitcode == -signal.SIGKILL, at
        else:
            _, report = case.mine.recv()
            assert action == "lost" or "RuntimeError: a bug" in report, (at, report)
        case.end()
        case.more()
        case.recover()


def test_cut_connections_at_every_step(valkey: Any, postgres: Any, pg_dsn: str) -> None:
    """Both connections cut at any step: the run ends or goes on, and the next one mends it."""
    database = Database(pg_dsn)
    steps = steps_of_a_clean_run(valkey, database)
    with FaultProxy(valkey) as redis_proxy, FaultProxy(postgres) as sql_proxy:
        dsn = pg_dsn_through(pg_dsn, sql_proxy)
        for at in range(1, steps + 1):
            case = Case(valkey, database)
            case.start(at, "meet", redis_proxy.url, dsn)
            assert case.mine.recv() == "here"
            redis_proxy.cut()
            sql_proxy.cut()
            case.more()
            case.mine.send("go")
            case.mine.recv()
            case.end()
            case.recover()


def pg_dsn_through(dsn: str, proxy: FaultProxy) -> str:
    """Return the DSN of the same database through a proxy."""
    info = psycopg.conninfo.conninfo_to_dict(dsn)
    return f"postgresql://postgres@127.0.0.1:{proxy.port}/{info['dbname']}"


def test_a_zombie_changes_nothing(
    valkey: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any step, overtaken, and woken up again: no change, and nobody waited long.

    SQLite is different in one point: one stopped in mid-transaction holds the file's only lock, so
    that others say so and wait for the next run.
    """
    # A second for each of many locks would make a long test; the rule is the same.
    monkeypatch.setattr(_sqlite_database, "_BUSY_TIMEOUT", 0.1)
    steps = steps_of_a_clean_run(valkey, database)
    halted = 0
    for at in range(1, steps + 1):
        case = Case(valkey, database)
        case.start(at, "stop")
        try:
            eventually(partial(workers.is_stopped, case.process.pid))
            case.more()
            halted += not overtaken(case, database)
        finally:
            os.kill(case.process.pid, signal.SIGCONT)
        case.mine.recv()
        case.end()
        case.recover()
    assert halted == 0 or (database.is_sqlite and halted < steps / 2)


def overtaken(case: Case, database: Database) -> bool:
    """Flush past a stopped flusher; return False when SQLite says that it is locked."""
    sink = workers.make_sink(database.url)
    job = FlushJob(case.counter, sink, chunk=5)
    began = time.monotonic()
    try:
        while database.shown() != case.truth:
            with contextlib.suppress(UnavailableError):
                job.run()
                continue
            if database.is_sqlite:
                return False
            assert time.monotonic() - began < 30
        return True
    finally:
        sink.close()


def test_every_batch_replayed_changes_nothing(valkey: Any, database: Database) -> None:
    """A batch that comes back from an older copy of Redis is recognised chunk by chunk."""
    case = Case(valkey, database)
    with redis.Redis.from_url(valkey.url) as raw:
        sink = workers.make_sink(database.url)
        original = sink.apply
        sink.apply = _raise_keyboard_interrupt
        job = FlushJob(case.counter, sink, chunk=CHUNK)
        with pytest.raises(KeyboardInterrupt):
            job.run()
        sink.apply = original
        copy = {key: (raw.dump(key), raw.type(key)) for key in raw.keys(f"{case.prefix}:*")}
        job.run()
        for _ in range(2):
            for key, (dump, _) in copy.items():
                raw.restore(key, 0, dump, replace=True)
            report = job.run()
            assert report.duplicates_skipped >= 1
            assert report.rows == 0
        sink.close()
    case.recover()


def _raise_keyboard_interrupt(chunk: Any) -> Any:
    raise KeyboardInterrupt


def test_a_batch_met_again_with_other_content_is_a_dead_letter(
    valkey: Any, database: Database
) -> None:
    """The same chunk id with other amounts is neither skipped nor applied: it is set aside."""
    case = Case(valkey, database)
    sink = workers.make_sink(database.url)
    job = FlushJob(case.counter, sink, chunk=100)
    with redis.Redis.from_url(valkey.url) as raw:
        key = f"{case.prefix}:c1:{{hits/0}}"
        case.counter.transport.call(job.layout.state(0), 1.0)  # names the next batch
        batch = raw.get(f"{key}:next").decode()
        assert job.run().rows == 7
        # A copy from before the claim became the server: the same next, with other hits.
        case.counter.incr_many({"/0": 10, "/other": 5})
        case.counter.transport.call(job.layout.state(0), 1.0)  # names the next batch
        raw.set(f"{key}:next", batch)
        report = job.run()
    assert (report.rows, report.dead) == (0, 2)
    assert {letter.reason for letter in sink.dead()} == {"conflict"}
    assert database.shown() == IDS
    assert job.value("/0") == IDS["/0"] + 10
    assert sink.retry(job.layout.full_name, job.layout.columns.rules).applied == 2
    assert database.shown() == {**IDS, "/0": IDS["/0"] + 10, "/other": 5}
    assert job.value("/0") == IDS["/0"] + 10
    sink.close()


def test_a_recovered_batch_with_other_content_is_a_dead_letter(
    valkey: Any, database: Database
) -> None:
    """Nor is it skipped when the flusher that claimed it died, and another one finds it."""
    case = Case(valkey, database)
    sink = workers.make_sink(database.url)
    job = FlushJob(case.counter, sink, chunk=100)
    with redis.Redis.from_url(valkey.url) as raw:
        next_key = f"{case.prefix}:c1:{{hits/0}}:next"
        case.counter.transport.call(job.layout.state(0), 1.0)  # names the next batch
        batch = raw.get(next_key).decode()
        assert job.run().rows == 7
        case.counter.incr("/other", 5)
        case.counter.transport.call(job.layout.state(0), 1.0)  # names the next batch
        raw.set(next_key, batch)
    original, sink.apply = sink.apply, _raise_keyboard_interrupt
    with pytest.raises(KeyboardInterrupt):
        job.run()
    sink.apply = original
    report = job.run()
    assert (report.recovered, report.rows, report.dead) == (1, 0, 1)
    assert [(letter.id, letter.amount) for letter in sink.dead()] == [(b"/other", 5)]
    sink.close()


@pytest.fixture
def seed() -> int:
    """A seed, printed when the test fails."""
    number = int(os.environ.get("REDISHACKS_SEED") or secrets.randbits(32))
    print(f"\nREDISHACKS_SEED={number}")
    return number


@pytest.mark.parametrize("all_linger", [True, False])
def test_random_kills_and_faults(
    valkey: Any, postgres: Any, pg_dsn: str, seed: int, all_linger: bool
) -> None:
    """Producers, flushers, kills and network faults in any order: every hit is accounted for."""
    rng = random.Random(seed)
    database = Database(pg_dsn)
    prefix = f"rh-{secrets.token_hex(6)}"
    with FaultProxy(valkey) as redis_proxy, FaultProxy(postgres) as sql_proxy:
        dsn = pg_dsn_through(pg_dsn, sql_proxy)
        producers = []
        for n in range(4):
            mine, theirs = workers.pipe()
            linger = 0.01 if all_linger or n % 2 else None
            process = workers.start(
                workers.produce, redis_proxy.url, prefix, seed + n, linger, theirs
            )
            producers.append((process, mine))
        stop = threading.Event()

        def faults() -> None:
            while not stop.wait(rng.random() * 0.1):
                proxy = rng.choice([redis_proxy, redis_proxy, sql_proxy])
                if rng.random() < 0.7:
                    proxy.drop_reply()
                else:
                    proxy.cut()

        trouble = threading.Thread(target=faults, daemon=True)
        trouble.start()
        kills = 0
        flushers: list[Any] = []
        seen: dict[str, int] = {}
        sink = workers.make_sink(pg_dsn)
        counter = BufferedCounter(valkey.url, "hits", prefix=prefix)
        watcher = FlushJob(counter, sink)
        read = sink.read

        def slow_read(*args: Any) -> Any:
            if rng.random() < 0.1:  # time for a whole flush between the two reads of a value
                time.sleep(rng.random() * 0.03)
            return read(*args)

        sink.read = slow_read
        sent = 0
        while kills < 220:
            while len(flushers) < 3:
                args = (redis_proxy.url, prefix, dsn, rng.randrange(1 << 30), "pages")
                flushers.append(workers.start(workers.flush_for_ever, *args))
            moment = time.monotonic() + rng.random() * 0.06
            while time.monotonic() < moment:
                counter.incr("/watched")
                sent += 1
                assert watcher.value("/watched") == sent
            victim = flushers.pop(rng.randrange(len(flushers)))
            os.kill(victim.pid, signal.SIGKILL)
            victim.join(10)
            victim.close()
            kills += 1
            id = f"/{rng.randrange(60)}"
            value = watcher.value(id)
            assert value >= seen.get(id, 0), "a value went down"
            seen[id] = value
        stop.set()
        trouble.join()
        for proxy in (redis_proxy, sql_proxy):
            proxy.heal()
        for flusher in flushers:
            os.kill(flusher.pid, signal.SIGKILL)
            flusher.join(10)
            flusher.close()
        for _, mine in producers:
            mine.send("stop")
        results = [mine.recv() for _, mine in producers]
        for process, _ in producers:
            process.join(10)
            process.close()
    acked = sent + sum(result[0] for result in results)
    in_doubt = sum(result[1] for result in results)
    while watcher.run().batches:
        pass
    total = sum(database.shown().values()) + sum(letter.amount for letter in sink.dead())
    values = sum(watcher.value(f"/{i}") for i in range(60)) + watcher.value("/watched")
    sink.close()
    print(f"kills {kills}, acknowledged {acked}, in doubt {in_doubt}, in SQL {total}")
    assert acked > 1000
    assert acked <= total <= acked + in_doubt
    assert values == total
    if all_linger:
        assert in_doubt == 0
