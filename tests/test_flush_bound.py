"""A counter is bound to one ledger, and a batch that cannot be applied holds up only itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis

from redishacks._sink import Applied, Begun, Chunk, Reading, Status
from redishacks.counters import BufferedCounter, FlushJob, report
from redishacks.errors import SchemaError, ServerError, UnavailableError, UsageError
from redishacks.testing import Postgres
from tests.helpers import Colour, MemorySink
from tests.workers import Database, make_sink

IDS = {f"/{i}": i + 1 for i in range(7)}
CHUNK = 3


@pytest.fixture(scope="module")
def pg_dsns(postgres: Postgres) -> Iterator[tuple[str, str]]:
    """Two databases for all tests here, since making one takes its time."""
    with postgres.database() as one, postgres.database() as other:
        yield one, other


def emptied(dsn: str) -> Database:
    """Return a database as if it had just been made, whatever a test has left there."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return Database(dsn)


@pytest.fixture(params=["postgres", "sqlite"])
def databases(request: pytest.FixtureRequest, tmp_path: Any) -> tuple[Database, Database]:
    """Two databases that have everything alike but the ledger."""
    if request.param == "sqlite":
        return Database(str(tmp_path / "a.db")), Database(str(tmp_path / "b.db"))
    one, other = request.getfixturevalue("pg_dsns")
    return emptied(one), emptied(other)


@pytest.fixture
def database(databases: tuple[Database, Database]) -> Database:
    """One of them."""
    return databases[0]


@pytest.fixture
def raw(valkey: Any) -> Iterator[redis.Redis]:
    """A plain client, to look at what is stored."""
    with redis.Redis.from_url(valkey.url) as made:
        yield made


@pytest.fixture
def hits(colour: Colour, valkey: Any, prefix: str) -> Any:
    """A counter."""
    return colour.counter(valkey.url, "hits", prefix=prefix)


def die_after(sink: Any, chunks: int) -> None:
    """Let a flusher fall down dead when it has written so many chunks."""
    apply = sink._steps.apply
    left = itertools.repeat(None, chunks)

    def limited(chunk: Chunk) -> Any:
        if next(left, 1) is not None:
            sink._steps.apply = apply
            raise RuntimeError("dead")
        return apply(chunk)

    sink._steps.apply = limited


def leave_a_batch(job: Any, chunks: int = 0) -> None:
    """Claim what is pending and write so many chunks of it."""
    die_after(job.sink, chunks)
    with pytest.raises(RuntimeError, match="dead"):
        job.run()


# The ledger


def test_another_database_is_refused(
    colour: Colour, hits: Any, databases: tuple[Database, Database], prefix: str, raw: redis.Redis
) -> None:
    """A job for the same table elsewhere neither flushes nor reads, and leaves no mark."""
    one, other = databases
    ours, theirs = (colour.job(hits, colour.sink(database.url)) for database in databases)
    hits.incr_many(IDS)
    assert theirs.value("/6") == 7  # as long as nobody has flushed, both could be right
    ours.run()
    hits.incr("/6")
    before = {key: raw.dump(key) for key in raw.keys(f"{prefix}:*")}
    for call in (theirs.run, lambda: theirs.value("/6"), lambda: theirs.values("/6")):
        with pytest.raises(UsageError, match=r"hits is bound to another ledger .* rebind\(\)"):
            call()
    assert {key: raw.dump(key) for key in raw.keys(f"{prefix}:*")} == before
    assert other.shown() == {}
    assert ours.value("/6") == 8
    assert ours.run().rows == 1
    assert one.shown() == {**IDS, "/6": 8}


def test_a_batch_half_applied_is_not_applied_elsewhere(
    colour: Colour, hits: Any, databases: tuple[Database, Database]
) -> None:
    """What a dead flusher left is finished where its ledger is; then the counter may move."""
    one, other = databases
    ours, theirs = (colour.job(hits, colour.sink(d.url), chunk=CHUNK) for d in databases)
    hits.incr_many(IDS)
    leave_a_batch(ours, 1)
    assert len(one.shown()) == CHUNK
    with pytest.raises(UsageError, match="another ledger"):
        theirs.run()
    with pytest.raises(UsageError, match="batches in flight"):
        theirs.rebind()
    assert other.shown() == {}
    report = ours.run()
    assert (report.recovered, report.rows, report.duplicates_skipped) == (1, 4, 1)
    assert one.shown() == IDS
    theirs.rebind()
    hits.incr("/new")
    assert theirs.run().rows == 1
    assert other.shown() == {"/new": 1}
    with pytest.raises(UsageError, match="another ledger"):
        ours.run()


def test_an_emptied_ledger_is_another_one(colour: Colour, hits: Any, database: Database) -> None:
    """Without its rows a ledger knows nothing: a run and a reading say so, rebind() goes on."""
    job = colour.job(hits, colour.sink(database.url))
    hits.incr_many(IDS)
    job.run()
    hits.incr("/6")
    database.run("DELETE FROM redishacks_ledger")
    for call in (lambda: job.value("/6"), job.run, lambda: job.value("/6")):
        with pytest.raises(UsageError, match="has been emptied since"):
            call()
    assert database.shown() == IDS
    job.rebind()
    assert job.value("/6") == 8
    assert job.run().rows == 1
    assert database.shown() == {**IDS, "/6": 8}


def test_a_lost_ledger_doubles_nothing(colour: Colour, hits: Any, database: Database) -> None:
    """Of a batch in flight nobody knows then what is applied: all of it waits as dead letters."""
    job = colour.job(hits, colour.sink(database.url), chunk=CHUNK)
    hits.incr_many(IDS)
    leave_a_batch(job, 1)
    applied = database.shown()
    assert len(applied) == CHUNK
    database.run("DELETE FROM redishacks_ledger")
    with pytest.raises(UsageError, match="another ledger"):
        job.run()
    with pytest.raises(UsageError, match=r"rebind\(bury=True\)"):
        job.rebind()
    hits.incr("/new")
    job.rebind(bury=True)
    report = job.run()
    assert (report.batches, report.recovered, report.rows, report.dead) == (2, 1, 1, 7)
    assert database.shown() == {**applied, "/new": 1}
    letters = database.run("SELECT id, amount, reason FROM redishacks_dead")
    assert {bytes(id).decode(): amount for id, amount, _ in letters} == IDS
    assert {reason for *_, reason in letters} == {"conflict"}
    assert job.run().batches == 0


def test_burying_spares_what_the_ledger_knows(
    colour: Colour, hits: Any, database: Database
) -> None:
    """Called where the ledger is not lost at all, it does not double, and buries only the rest."""
    job = colour.job(hits, colour.sink(database.url), chunk=CHUNK)
    hits.incr_many(IDS)
    leave_a_batch(job, 2)
    job.rebind(bury=True)
    report = job.run()
    assert (report.duplicates_skipped, report.rows, report.dead) == (2, 0, 1)
    letters = database.run("SELECT id, amount FROM redishacks_dead")
    buried = {bytes(id).decode(): amount for id, amount in letters}
    assert {**database.shown(), **buried} == IDS


def test_a_claim_beside_rebind_keeps_the_destination(
    colour: Colour, valkey: Any, databases: tuple[Database, Database], prefix: str
) -> None:
    """A batch claimed while rebind() looks: no partition is forgotten, the old job goes on."""
    hits = colour.counter(valkey.url, "hits", prefix=prefix, partitions=4)
    ours, theirs = (colour.job(hits, colour.sink(database.url)) for database in databases)
    ours.run()
    hits.incr_many({f"/{i}": 1 for i in range(40)})
    forget = hits.layout.forget_destination

    def late(*known: Any) -> Any:
        hits.layout.forget_destination = forget
        with BufferedCounter(valkey.url, "hits", prefix=prefix, partitions=4) as other:
            state: Any = other.transport.call(other.layout.state(1), 1.0)
            claim = other.layout.claim(1, state.next, 10, ours.sink.destination(), state.ledger)
            assert other.transport.call(claim, 1.0)
        return forget(*known)

    hits.layout.forget_destination = late
    with pytest.raises(UsageError, match="batches in flight"):
        theirs.rebind()
    with pytest.raises(UsageError, match="another ledger"):
        theirs.run()
    assert ours.run().rows == 40


def test_forgetting_sees_a_batch_claimed_meanwhile(valkey: Any, prefix: str) -> None:
    """A destination is not forgotten while a batch is in flight that nobody has buried."""
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix)
    job = Colour("sync").job(hits, MemorySink())
    hits.incr("/a")
    job.sink.apply = None
    with pytest.raises(TypeError):
        job.run()
    (batch,) = (batch.id for batch in job.status().batches)
    for known, done in (["other"], 0), ([], 0), (["other", batch], 1):
        (forget,) = job.layout.forget_destination(known, "memory", "")
        assert hits.transport.call(forget, 1.0) == done


def test_a_claim_is_for_one_ledger(valkey: Any, prefix: str) -> None:
    """The claim itself looks at the ledger: somebody may have rebound the counter just before."""
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix)
    job = Colour("sync").job(hits, MemorySink())
    job.run()
    hits.incr("/a")
    state = hits.transport.call(hits.layout.state(0), 1.0)
    claim = hits.layout.claim(0, state.next, 10, "memory", "another")
    with pytest.raises(UsageError, match="destination any more"):
        hits.transport.call(claim, 1.0)
    assert hits.pending("/a") == 1
    assert job.run().rows == 1


def test_a_binding_without_a_ledger_is_completed(
    colour: Colour, hits: Any, databases: tuple[Database, Database], prefix: str, raw: redis.Redis
) -> None:
    """A counter that was bound by destination alone takes the ledger of the next run."""
    ours, theirs = (colour.job(hits, colour.sink(database.url)) for database in databases)
    ours.run()
    raw.hdel(f"{prefix}:c1:{{hits/0}}:meta", "ledger")
    assert ours.value("/a") == 0
    ours.run()
    with pytest.raises(UsageError, match="another ledger"):
        theirs.run()


class Sleeper(MemorySink):
    """A sink that finds every chunk stale, and another ledger when it is asked again."""

    def __init__(self) -> None:
        super().__init__()
        self.names = itertools.chain(["one"], itertools.repeat("other"))

    def begin(self, columns: Any) -> Begun:
        """Begin."""
        return Begun(0, next(self.names))

    def apply(self, chunk: Chunk) -> Applied:
        """Have slept for a day."""
        return Applied(Status.STALE)


def test_a_ledger_emptied_under_a_run_ends_it(colour: Colour, hits: Any) -> None:
    """A flusher that was stopped for a day looks again, and writes nothing to another ledger."""
    hits.incr("/a")
    job = colour.job(hits, Sleeper())
    with pytest.raises(UnavailableError, match="has been changed while a run"):
        job.run()
    assert len(job.status().batches) == 1


def test_a_ledger_emptied_between_two_chunks(colour: Colour, hits: Any, database: Database) -> None:
    """A run does not go on in a ledger that lost what it knew: another one may have begun there."""
    job = colour.job(hits, colour.sink(database.url), chunk=CHUNK)
    hits.incr_many(IDS)
    leave_a_batch(job, 2)
    before = database.shown()
    apply = job.sink._steps.apply

    def late(chunk: Chunk) -> Any:
        job.sink._steps.apply = apply
        database.run("DELETE FROM redishacks_ledger")
        with make_sink(database.url) as other:
            other.begin({})
        return apply(chunk)

    job.sink._steps.apply = late
    with pytest.raises(UnavailableError, match="has been changed while a run"):
        job.run()
    assert database.shown() == before
    with pytest.raises(UsageError, match="another ledger"):
        job.run()
    job.rebind(bury=True)
    assert job.run().dead == len(IDS)
    assert database.shown() == before


@pytest.mark.parametrize("marked", [False, True], ids=["old", "marked"])
@pytest.mark.parametrize("same", [False, True], ids=["databases", "tables"])
def test_a_run_leaves_the_batches_of_another_binding(
    colour: Colour, valkey: Any, databases: tuple[Database, Database], prefix: str,
    raw: redis.Redis, same: bool, marked: bool,
) -> None:  # fmt: skip
    """Bound anew while a run looks, and claimed: the run does not write that batch elsewhere."""
    one, other = (databases[0], databases[0]) if same else databases
    hits = colour.counter(valkey.url, "hits", prefix=prefix)
    ours = colour.job(hits, colour.sink(one.url))
    hits.incr("/old")
    ours.run()
    table = "others" if same else "pages"
    if same:
        one.run("CREATE TABLE others (path text PRIMARY KEY, hits bigint)")
    with (
        BufferedCounter(valkey.url, "hits", prefix=prefix) as counter,
        make_sink(other.url, table=table) as sink,
    ):
        theirs = FlushJob(counter, sink, chunk=CHUNK)
        states = hits.layout.states

        def late() -> Any:
            hits.layout.states = states
            counter.incr_many(IDS)
            theirs.rebind()
            leave_a_batch(theirs, 1)
            if not marked:  # as one that was claimed before batches said where they go
                for batch in theirs.status().batches:
                    raw.hdel(f"{prefix}:c1:{{hits/0}}:b:{batch.id}", "destination", "ledger")
            return states()

        hits.layout.states = late
        with pytest.raises(UsageError, match="others" if same else "another ledger"):
            ours.run()
        assert one.shown() == {"/old": 1}
        assert theirs.run().rows == len(IDS) - CHUNK
        assert dict(other.run(f"SELECT path, hits FROM {table}")) == IDS


def test_a_buried_batch_goes_only_where_it_is_known(
    colour: Colour, valkey: Any, databases: tuple[Database, Database], prefix: str
) -> None:
    """A run that has seen a batch before it was buried elsewhere does not apply it."""
    one, other = databases
    hits = colour.counter(valkey.url, "hits", prefix=prefix)
    ours = colour.job(hits, colour.sink(one.url))
    hits.incr_many(IDS)
    leave_a_batch(ours)
    with (
        BufferedCounter(valkey.url, "hits", prefix=prefix) as counter,
        make_sink(other.url) as sink,
    ):
        theirs = FlushJob(counter, sink)
        batch = hits.layout.batch

        def late(*args: Any) -> Any:
            hits.layout.batch = batch
            theirs.rebind(bury=True)
            return batch(*args)

        hits.layout.batch = late
        with pytest.raises(UsageError, match="another ledger"):
            ours.run()
        assert one.shown() == {}
        with pytest.raises(UsageError, match="another ledger"):  # it has bound the counter
            ours.run()
        theirs.rebind(bury=True)
        assert theirs.run().dead == len(IDS)
    assert one.shown() == other.shown() == {}


# Readers


def test_a_reader_writes_nothing(
    colour: Colour, hits: Any, database: Database, prefix: str, raw: redis.Redis
) -> None:
    """A value before the first flush binds the counter to nothing; the right job's run does."""
    database.run("CREATE TABLE others (path text PRIMARY KEY, hits bigint)")
    reader, ours = (colour.job(hits, colour.sink(database.url, t)) for t in ("others", "pages"))
    assert reader.value("/a") == 0
    assert raw.keys(f"{prefix}:*") == []
    hits.incr("/a", 2)
    before = {key: raw.dump(key) for key in raw.keys(f"{prefix}:*")}
    assert reader.value("/a") == 2
    assert {key: raw.dump(key) for key in raw.keys(f"{prefix}:*")} == before
    ours.run()
    assert ours.value("/a") == 2
    with pytest.raises(UsageError, match=r"destination = \w+ pages.* says \w+ others"):
        reader.value("/a")


def test_a_reader_notices_another_table(colour: Colour, hits: Any, database: Database) -> None:
    """Bound anew to another table of the same database: a job of before says so, no old figure."""
    database.run("CREATE TABLE others (path text PRIMARY KEY, hits bigint)")
    before, after = (colour.job(hits, colour.sink(database.url, t)) for t in ("pages", "others"))
    hits.incr("/a", 5)
    before.run()
    assert before.value("/a") == 5
    assert (before.status().elsewhere, after.status().elsewhere) == (False, True)
    after.rebind()
    hits.incr("/a", 7)
    after.run()
    assert after.value("/a") == 7
    with pytest.raises(UsageError, match="others"):
        before.value("/a")
    assert (before.status().elsewhere, after.status().elsewhere) == (True, False)


def test_status_tells_of_another_ledger(
    colour: Colour, hits: Any, databases: tuple[Database, Database]
) -> None:
    """It looks on: the other ledger gets no identity by it, and what is missing is no error."""
    ours, theirs = (colour.job(hits, colour.sink(database.url)) for database in databases)
    assert not theirs.status().elsewhere
    ours.run()
    assert (ours.status().elsewhere, theirs.status().elsewhere) == (False, True)
    assert databases[1].run("SELECT * FROM redishacks_ledger") == []
    databases[1].run("DROP TABLE pages")
    assert not colour.job(hits, colour.sink(databases[1].url)).status().elsewhere


def test_a_first_flush_beside_a_reader(colour: Colour, valkey: Any, prefix: str) -> None:
    """What the reader saw as pending, in a batch that had no name yet, is not counted twice."""

    class Late(MemorySink):
        def read(self, *args: Any) -> Reading:
            with BufferedCounter(valkey.url, "hits", prefix=prefix) as counter:
                FlushJob(counter, self).run()
            return super().read(*args)

    hits = colour.counter(valkey.url, "hits", prefix=prefix)
    hits.incr("/a")
    assert colour.job(hits, Late()).value("/a") == 1


# Batches that cannot be applied


def test_a_batch_that_lost_ids_holds_up_nobody(
    colour: Colour, hits: Any, database: Database, prefix: str, raw: redis.Redis
) -> None:
    """It stays claimed and is told of at the end; batches beside it and later hits go through."""
    job = colour.job(hits, colour.sink(database.url))
    hits.incr_many(IDS)
    leave_a_batch(job)
    (key,) = raw.keys(f"{prefix}:*:b:*:amount")
    raw.zrem(key, "/3")
    hits.incr("/next")
    leave_a_batch(job)
    hits.incr("/last", 5)
    for rows in (2, 0):
        with pytest.raises(ServerError, match="has lost ids"):
            job.run()
        assert (job.so_far().rows, job.so_far().batches) == (rows, rows)
    assert database.shown() == {"/next": 1, "/last": 5}
    assert len(job.status().batches) == 1


def refuse(database: Database, what: str, code: str) -> None:
    """Make a trigger that raises an error for some paths."""
    if database.is_sqlite:
        database.run(
            "CREATE TRIGGER refusal BEFORE INSERT ON pages "
            f"WHEN NEW.path LIKE '{what}' BEGIN SELECT json(NEW.path); END"
        )
        return
    database.run(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
        f"IF NEW.path LIKE '{what}' THEN RAISE 'out of order' USING ERRCODE = '{code}'; END IF; "
        "RETURN NEW; END$$",
        "CREATE TRIGGER refusal BEFORE INSERT ON pages FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


def mend(database: Database) -> None:
    """Take the trigger away."""
    database.run("DROP TRIGGER refusal" + ("" if database.is_sqlite else " ON pages"))


@pytest.mark.parametrize(("code", "kind"), [("XX000", ServerError), ("42501", SchemaError)])
def test_a_partition_that_cannot_be_written_holds_up_nobody(
    colour: Colour, valkey: Any, database: Database, prefix: str, code: str, kind: type[Exception]
) -> None:
    """Where every row is refused nothing is buried: the batch waits, other partitions flush."""
    if database.is_sqlite:
        kind = ServerError
    hits = colour.counter(valkey.url, "hits", prefix=prefix, partitions=4)
    refuse(database, "/bad%", code)
    good = {f"/{i}": 1 for i in range(40) if hits.layout.partition(b"/%d" % i) != 1}
    bad = {f"/bad{i}": 1 for i in range(40) if hits.layout.partition(b"/bad%d" % i) == 1}
    hits.incr_many(good | bad)
    job = colour.job(hits, colour.sink(database.url))
    for rows in (len(good), 0):
        with pytest.raises(kind, match="malformed JSON" if database.is_sqlite else "out of order"):
            job.run()
        report = job.so_far()
        assert (report.rows, report.dead) == (rows, 0)
        (batch,) = job.status().batches
        assert batch.ids == len(bad)
    assert database.shown() == good
    mend(database)
    assert job.run().rows == len(bad)
    assert database.shown() == good | bad


def test_one_bad_row_holds_up_nobody(colour: Colour, hits: Any, database: Database) -> None:
    """Where others pass, a row that is refused for whatever reason is a dead letter."""
    refuse(database, "/bad%", "55000")
    hits.incr_many({**IDS, "/bad": 9})
    job = colour.job(hits, colour.sink(database.url))
    report = job.run()
    assert (report.rows, report.dead, report.batches) == (7, 1, 1)
    assert database.shown() == IDS
    assert job.value("/bad") == 9


@pytest.mark.slow
def test_batches_that_cannot_be_applied_do_not_pile_up(
    colour: Colour, hits: Any, database: Database
) -> None:
    """When many batches of a partition are stuck no more are claimed; all goes on when mended."""
    refuse(database, "%", "XX000")
    job = colour.job(hits, colour.sink(database.url))
    for n in range(20):
        hits.incr("/a")
        with pytest.raises(ServerError):
            job.run()
        assert len(job.status().batches) == min(n + 1, 16)
    assert hits.pending("/a") == 4
    assert job.value("/a") == 20
    mend(database)
    job.run()
    assert database.shown() == {"/a": 20}


@pytest.mark.slow
def test_stuck_batches_do_not_hold_up_others_for_ever(
    colour: Colour, hits: Any, database: Database, prefix: str, raw: redis.Redis
) -> None:
    """Ten minutes after the last claim there is another one, and what can be written is."""
    refuse(database, "/bad", "XX000")
    job = colour.job(hits, colour.sink(database.url))
    for _ in range(17):
        hits.incr("/bad")
        with pytest.raises(ServerError):
            job.run()
    hits.incr("/good", 5)
    batches = f"{prefix}:c1:{{hits/0}}:batches"
    claimed: Any = raw.zrange(batches, 0, -1, withscores=True)
    for seconds, shown in (500, {}), (101, {"/good": 5}):
        claimed = [(batch, at - seconds * 1_000_000) for batch, at in claimed]
        raw.zadd(batches, dict(claimed))
        with pytest.raises(ServerError):
            job.run()
        assert database.shown() == shown
    assert hits.pending("/good") == 0
    assert job.status().dead == 1  # what was pending of /bad, beside one that passed
    assert len(job.status().batches) == 16
    assert job.value("/bad") == 17


@pytest.mark.slow
@pytest.mark.parametrize("code", ["08001", "57014", "58000", "53400", "55P03", "40001"])
def test_a_row_that_sounds_like_a_server_away(
    colour: Colour, hits: Any, pg_dsns: tuple[str, str], monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """As the connection is alive, only its batch waits; the run ends with the error anyhow."""
    monkeypatch.setattr(report, "_PATIENCE", 0.1)
    database = emptied(pg_dsns[0])
    refuse(database, "/bad", code)
    job = colour.job(hits, colour.sink(database.url))
    hits.incr_many({"/bad": 1, "/beside": 1})
    for name in ("/first", "/second"):
        with pytest.raises(UnavailableError):
            job.run()
        hits.incr(name)
    with pytest.raises(UnavailableError):
        job.run()
    assert database.shown() == {"/first": 1, "/second": 1}
    assert len(job.status().batches) == 1
    mend(database)
    assert job.run().rows == 2


class Ailing(MemorySink):
    """A sink that says of every chunk that it is away, or busy, and may really be away then."""

    def __init__(self, status: Status | None, is_away: bool) -> None:
        super().__init__()
        self.status, self.is_away, self.applied_to = status, is_away, 0

    def begin(self, columns: Any) -> Begun:
        """Begin, unless the server has gone."""
        if self.is_away and self.applied_to:
            raise UnavailableError("nobody there")
        return super().begin(columns)

    def apply(self, chunk: Chunk) -> Applied:
        """Be ill."""
        self.applied_to += 1
        if self.status is None:
            raise UnavailableError("away")
        return Applied(self.status)


@pytest.mark.parametrize("is_away", [False, True])
@pytest.mark.parametrize("status", [None, Status.BUSY])
def test_a_server_that_is_away_ends_the_run(
    colour: Colour, valkey: Any, prefix: str, monkeypatch: pytest.MonkeyPatch,
    status: Status | None, is_away: bool,
) -> None:  # fmt: skip
    """When it does not answer at all no other batch is tried, and nothing more is claimed."""
    monkeypatch.setattr(report, "_PATIENCE", -1.0)
    hits = colour.counter(valkey.url, "hits", prefix=prefix, partitions=4)
    hits.incr_many({f"/{i}": 1 for i in range(40)})
    sink = Ailing(status, is_away)
    job = colour.job(hits, sink)
    with pytest.raises(UnavailableError, match="away" if status is None else "stay locked"):
        job.run()
    assert sink.applied_to == len(job.status().batches) == (1 if is_away else 4)


def test_a_run_waits_once_for_all_locks(
    colour: Colour, valkey: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is for the whole run: the batches behind one that used it up are tried once."""
    monkeypatch.setattr(report, "_PATIENCE", 0.5)
    hits = colour.counter(valkey.url, "hits", prefix=prefix, partitions=16)
    hits.incr_many({f"/{i}": 1 for i in range(400)})
    sink = Ailing(Status.BUSY, False)
    seen: list[str] = []
    apply = sink.apply
    sink.apply = lambda chunk: (seen.append(chunk.batch), apply(chunk))[1]  # type: ignore
    job = colour.job(hits, sink)
    with pytest.raises(UnavailableError, match="stay locked"):
        job.run()
    tries = [len(list(group)) for _, group in itertools.groupby(seen)]
    assert len(tries) == 16
    assert tries[0] > 1
    assert tries[1:] == [1] * 15
