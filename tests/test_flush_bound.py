"""A counter is bound to one ledger, and a batch that cannot be applied holds up only itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from redishacks._sink import Applied, Begun, Chunk, Status
from redishacks.counters import BufferedCounter
from redishacks.errors import SchemaError, ServerError, UnavailableError, UsageError
from tests.helpers import Colour, MemorySink
from tests.workers import Database

IDS = {f"/{i}": i + 1 for i in range(7)}
CHUNK = 3


@pytest.fixture
def colour(flavour: str) -> Iterator[Colour]:
    """Both colours, with one test body."""
    made = Colour(flavour)
    yield made
    made.close()


@pytest.fixture(params=["postgres", "sqlite"])
def databases(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[tuple[Database, Database]]:
    """Two databases that have everything alike but the ledger."""
    if request.param == "sqlite":
        yield Database(str(tmp_path / "a.db")), Database(str(tmp_path / "b.db"))
        return
    postgres = request.getfixturevalue("postgres")
    with postgres.database() as one, postgres.database() as other:
        yield Database(one), Database(other)


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

    def late(known: Any) -> Any:
        hits.layout.forget_destination = forget
        with BufferedCounter(valkey.url, "hits", prefix=prefix, partitions=4) as other:
            state: Any = other.transport.call(other.layout.state(1), 1.0)
            claim = other.layout.claim(1, state.next, 10, ours.sink.destination(), state.ledger)
            assert other.transport.call(claim, 1.0)
        return forget(known)

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
        (forget,) = job.layout.forget_destination(known)
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
        self.names = iter(["one", "other"])

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
