"""The SQL sinks: every chunk once, whatever the database, the ids and the network do."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gc
import hashlib
import inspect
import multiprocessing
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from redishacks._drive import perform
from redishacks._sink import Applied, Begun, Chunk, ChunkId, Retried, Rule, Status
from redishacks.errors import SchemaError, ServerError, UnavailableError, UsageError
from redishacks.sinks import AsyncPostgresSink, PostgresSink, SQLiteSink, _psycopg, from_url
from redishacks.sinks._postgres_sql import number_array, text_array
from redishacks.testing import FaultProxy, Postgres
from tests.helpers import Facade, eventually

_verdict = _psycopg.verdict

SUM = {"amount": Rule.SUM}
ISSUE = {"times_seen": Rule.SUM, "last_seen": Rule.MAX, "first_seen": Rule.MIN}
PAGES: Any = {"table": "pages", "key": "path", "columns": {"amount": "hits"}}


class World:
    """A fresh database of one kind, and sinks of one colour that write to it."""

    def __init__(self, kind: str, where: str, runner: asyncio.Runner) -> None:
        self.kind = kind
        self.where = where
        self.is_postgres = kind != "sqlite"
        self._runner = runner
        self._opened: list[Any] = []
        self._connection: Any = (
            psycopg.connect(where, autocommit=True)
            if self.is_postgres
            else sqlite3.connect(where, isolation_level=None)
        )
        self.clock: Any = None
        self.ledger = ""

    def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        """Run a statement on the side; `?` are parameters."""
        if self.is_postgres:
            statement = statement.replace("?", "%s")
        cursor = self._connection.execute(statement, *([params] if params else []))
        return cursor.fetchall() if cursor.description else []

    def sink(self, target: Any = None, rules: Mapping[str, Rule] = SUM, **options: Any) -> Any:
        """Return a sink, its ledger made and its target checked."""
        sink = self.bare_sink(target, **options)
        sink.create_ledger()
        self.clock, self.ledger = sink.begin(rules)
        return sink

    def bare_sink(self, target: Any = None, **options: Any) -> Any:
        """Return a sink that nobody has asked anything yet."""
        made = {"postgres": PostgresSink, "async": AsyncPostgresSink, "sqlite": SQLiteSink}
        kind: Any = made[self.kind]
        sink = kind(target or self.where, **(PAGES | options))
        if self.kind == "async":
            sink = Facade(sink, self._runner)
        self._opened.append(sink)
        return sink

    def run(self, result: Any) -> Any:
        """Await what is awaitable."""
        return self._runner.run(result) if inspect.iscoroutine(result) else result

    def pages(self, hits: str = "bigint NOT NULL DEFAULT 0") -> None:
        """Make the usual table."""
        self.sql(f"CREATE TABLE pages (path text PRIMARY KEY, hits {hits})")

    def chunk(
        self, rows: Mapping[bytes, Any], batch: str = "b1", index: int = 0,
        rules: Mapping[str, Rule] = SUM,
    ) -> Chunk:  # fmt: skip
        """Return a chunk of {id: amount or amounts}."""
        ids = list(rows)
        amounts = [row if isinstance(row, tuple) else (row,) for row in rows.values()]
        values = tuple([row[c] for row in amounts] for c in range(len(rules)))
        digest = hashlib.blake2b(repr((ids, values)).encode(), digest_size=16).digest()
        names, kinds = tuple(rules), tuple(rules.values())
        return Chunk(
            "hits", batch, index, names, kinds, ids, values, digest, self.clock, self.ledger
        )

    def rows(self, table: str = "pages") -> dict[Any, Any]:
        """Return the table as {first column: second column, or tuple of all others}."""
        found = self.sql(f"SELECT * FROM {table}")
        return {row[0]: row[1] if len(row) == 2 else row[1:] for row in found}

    def close(self) -> None:
        """Close all."""
        for sink in self._opened:
            sink.close()
        self._connection.close()


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """A loop for the async colour."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def session(postgres: Postgres) -> Iterator[psycopg.Connection[Any]]:
    """A connection to a database for all tests here, since making one takes its time."""
    with (
        postgres.database() as dsn,
        psycopg.connect(dsn, autocommit=True, application_name="keeper") as connection,
    ):
        yield connection


def cut_sessions(connection: psycopg.Connection[Any]) -> None:
    """End every session in a connection's database but those of the tests themselves."""
    connection.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND application_name <> 'keeper'"
    )


@pytest.fixture
def schema_dsn(session: psycopg.Connection[Any], postgres: Postgres) -> Iterator[str]:
    """The DSN of an empty schema."""
    name = f"s{secrets.token_hex(6)}"
    session.execute(f"CREATE SCHEMA {name}".encode())
    yield f"{postgres.dsn_of(session.info.dbname)}&options=-csearch_path%3D{name}"
    cut_sessions(session)  # a test that failed may have left locks behind
    session.execute(f"DROP SCHEMA {name} CASCADE".encode())


@pytest.fixture(params=["postgres", "async", "sqlite"])
def world(
    request: pytest.FixtureRequest, tmp_path: Path, runner: asyncio.Runner
) -> Iterator[World]:
    """Each database and colour in turn."""
    sqlite = request.param == "sqlite"
    where = str(tmp_path / "app.db") if sqlite else request.getfixturevalue("schema_dsn")
    world = World(request.param, where, runner)
    yield world
    world.close()


@pytest.fixture
def pg(flavour: str, schema_dsn: str, runner: asyncio.Runner) -> Iterator[World]:
    """PostgreSQL in both colours."""
    world = World("postgres" if flavour == "sync" else "async", schema_dsn, runner)
    yield world
    world.close()


@pytest.fixture
def plain(schema_dsn: str, runner: asyncio.Runner) -> Iterator[World]:
    """PostgreSQL, sync."""
    world = World("postgres", schema_dsn, runner)
    yield world
    world.close()


@pytest.fixture
def tasks(schema_dsn: str, runner: asyncio.Runner) -> Iterator[World]:
    """PostgreSQL, async."""
    world = World("async", schema_dsn, runner)
    yield world
    world.close()


@pytest.fixture
def lite(tmp_path: Path, runner: asyncio.Runner) -> Iterator[World]:
    """SQLite."""
    world = World("sqlite", str(tmp_path / "app.db"), runner)
    yield world
    world.close()


def letters(sink: Any) -> list[tuple[bytes, str, int, str]]:
    """Return all dead letters, without what differs between runs."""
    return [(d.id, d.column, d.amount, d.reason) for d in sink.dead(limit=100_000)]


# Once each


def test_an_upsert_inserts_and_adds(world: World) -> None:
    """New ids get a row, known ids get their amount added, negative ones too."""
    world.pages()
    sink = world.sink()
    assert sink.apply(world.chunk({b"/a": 3, b"/b": 1})) == Applied(Status.APPLIED, 2)
    assert sink.apply(world.chunk({b"/a": -1, b"/c": 5}, "b2")) == Applied(Status.APPLIED, 2)
    assert world.rows() == {"/a": 2, "/b": 1, "/c": 5}


def test_an_update_leaves_unknown_ids_to_the_dead_letters(world: World) -> None:
    """In update mode rows are only changed; amounts of ids without a row are kept as letters."""
    world.pages()
    world.sql("INSERT INTO pages VALUES ('/a', 10), ('/b', 20)")
    sink = world.sink(mode="update")
    chunk = world.chunk({b"/a": 1, b"/x": 2, b"/b": 3, b"/y": 4})
    assert sink.apply(chunk) == Applied(Status.APPLIED, 2, 2)
    assert world.rows() == {"/a": 11, "/b": 23}
    assert letters(sink) == [
        (b"/x", "amount", 2, "unknown id"),
        (b"/y", "amount", 4, "unknown id"),
    ]
    # The sink now expects unknown ids; a chunk without any is applied just the same.
    assert sink.apply(world.chunk({b"/a": 1}, "b2")) == Applied(Status.APPLIED, 1)
    assert sink.apply(world.chunk({b"/b": 1}, "b3")) == Applied(Status.APPLIED, 1)
    assert world.rows() == {"/a": 12, "/b": 24}


def test_unknown_ids_are_dropped_on_request(world: World) -> None:
    """unknown="drop" forgets ids without a row, but keeps those that were refused."""
    world.pages()
    world.sql("INSERT INTO pages VALUES ('/a', 10)")
    sink = world.sink(mode="update", unknown="drop")
    chunk = world.chunk({b"/a": 1, b"/x": 2, b"\xff": 3})
    assert sink.apply(chunk) == Applied(Status.APPLIED, 1, 1)
    assert world.rows() == {"/a": 11}
    assert letters(sink) == [(b"\xff", "amount", 3, "id is not valid UTF-8")]


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_a_replay_changes_nothing(world: World, mode: str) -> None:
    """A chunk that comes again is a duplicate, dead letters included."""
    world.pages()
    world.sql("INSERT INTO pages VALUES ('/a', 0)")
    sink = world.sink(mode=mode)
    chunk = world.chunk({b"/a": 3, b"\xff": 1})
    assert sink.apply(chunk).status is Status.APPLIED
    for _ in range(2):
        assert sink.apply(chunk) == Applied(Status.DUPLICATE)
    assert world.rows() == {"/a": 3}
    assert sink.dead_count("hits") == 1
    assert sink.applied("b1") == {0}


def test_other_content_under_a_known_id_is_kept_whole(world: World) -> None:
    """A chunk id met again with other content goes to the dead letters, once."""
    world.pages()
    sink = world.sink()
    sink.apply(world.chunk({b"/a": 3}))
    other = world.chunk({b"/a": 3, b"/b": 4})
    assert sink.apply(other) == Applied(Status.CONFLICT, 0, 2)
    assert sink.apply(other) == Applied(Status.DUPLICATE)
    assert sink.apply(world.chunk({b"/z": 1})) == Applied(Status.CONFLICT, 0, 1)
    assert sink.apply(world.chunk({b"/a": 3})) == Applied(Status.DUPLICATE)
    assert world.rows() == {"/a": 3}
    assert letters(sink) == [
        (b"/a", "amount", 3, "conflict"),
        (b"/b", "amount", 4, "conflict"),
        (b"/z", "amount", 1, "conflict"),
    ]


def test_a_chunk_read_over_a_day_ago_is_stale(world: World) -> None:
    """What was read from Redis over a day ago is not applied; a duplicate stays a duplicate."""
    world.pages()
    sink = world.sink()
    known = world.chunk({b"/a": 1})
    sink.apply(known)
    old = world.clock - dt.timedelta(days=1, seconds=1)
    assert sink.apply(world.chunk({b"/a": 1}, "b2")._replace(read_at=old)).status is Status.STALE
    assert sink.apply(known._replace(read_at=old)).status is Status.DUPLICATE
    other = world.chunk({b"/a": 2})._replace(read_at=old)
    assert sink.apply(other).status is Status.STALE
    assert world.rows() == {"/a": 1}
    assert sink.dead_count("hits") == 0
    recent = world.clock - dt.timedelta(hours=23)
    chunk = world.chunk({b"/a": 1}, "b2")._replace(read_at=recent)
    assert sink.apply(chunk).status is Status.APPLIED


@pytest.mark.slow
def test_a_locked_row_is_busy(world: World) -> None:
    """While another transaction holds a row the chunk is busy, nothing is written, and later is."""
    world.pages()
    sink = world.sink()
    sink.apply(world.chunk({b"/a": 1}))
    world.sql("BEGIN")
    world.sql("UPDATE pages SET hits = 100")
    began = time.monotonic()
    assert sink.apply(world.chunk({b"/a": 2, b"\xff": 1}, "b2")) == Applied(Status.BUSY)
    assert time.monotonic() - began < 10
    world.sql("ROLLBACK")
    assert sink.applied("b2") == set()
    assert sink.dead_count("hits") == 0
    assert sink.apply(world.chunk({b"/a": 2}, "b2")).status is Status.APPLIED
    assert world.rows() == {"/a": 3}


@pytest.mark.slow
def test_a_chunk_in_another_flushers_hands_is_busy(pg: World) -> None:
    """A chunk whose ledger row another transaction has written is busy until that one ends."""
    pg.pages()
    sink = pg.sink()
    pg.sql("BEGIN")
    pg.sql("INSERT INTO redishacks_ledger VALUES ('hits', 'b1', 0, '', 'x', 1)")
    assert sink.apply(pg.chunk({b"/a": 1})).status is Status.BUSY
    pg.sql("ROLLBACK")
    assert sink.apply(pg.chunk({b"/a": 1})).status is Status.APPLIED


def test_a_deadlock_is_busy(pg: World) -> None:
    """The victim of a deadlock with a foreign transaction writes nothing and may try again."""
    pg.pages()
    sink = pg.sink()
    sink.apply(pg.chunk({b"/a": 1, b"/b": 1}))
    pg.sql(
        "CREATE FUNCTION clash() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END$$"
    )
    pg.sql("CREATE TRIGGER clash BEFORE UPDATE ON pages FOR EACH ROW EXECUTE FUNCTION clash()")
    assert sink.apply(pg.chunk({b"/a": 1, b"/c": 1}, "b2")).status is Status.BUSY
    pg.sql("DROP TRIGGER clash ON pages")
    assert pg.rows() == {"/a": 1, "/b": 1}
    assert sink.apply(pg.chunk({b"/a": 1, b"/c": 1}, "b2")).status is Status.APPLIED


# Ids and keys


ODD = [
    b"'", b'"', b"\\", b"{}", b"{a,b}", b",", b"NULL", b"null", b"\n\r\t", b" ", b"  x  ", b"%s",
    b"%", b"?", b"$1", b"--", b";DROP TABLE pages", b"\xc3\xa9", "𝄞".encode(), b"\x01\x7f",
    b"x" * 2048, b'\\"', b"a\\", b"\\N", b"0", b"-0",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_odd_ids_of_a_text_key(world: World, mode: str) -> None:
    """Any UTF-8 without NUL is a text key as it stands; the rest is kept as dead letters."""
    world.pages()
    if mode == "update":
        for id in ODD:
            world.sql("INSERT INTO pages VALUES (?, 0)", id.decode())
    sink = world.sink(mode=mode)
    bad = {b"\xff": -1, b"a\0b": -2, b"\0": -3, b"\xed\xa0\x80": -4}
    rows = {id: n for n, id in enumerate(ODD, 1)}
    assert sink.apply(world.chunk(bad | rows)) == Applied(Status.APPLIED, len(ODD), 4)
    assert world.rows() == {id.decode(): n for n, id in enumerate(ODD, 1)}
    assert [(id, amount) for id, _, amount, _ in letters(sink)] == list(bad.items())
    assert {reason for *_, reason in letters(sink)} == {
        "id is not valid UTF-8", "id holds a NUL character",
    }  # fmt: skip
    for id, n in rows.items():
        assert sink.read("hits", SUM, id, [], []).row == {"amount": n}
    assert sink.read("hits", SUM, b"a\0b", [], []).dead == {"amount": -2}


def test_any_bytes_of_a_binary_key(world: World) -> None:
    """A bytea or BLOB key takes every id as it is."""
    world.sql(
        f"CREATE TABLE pages (path {'bytea' if world.is_postgres else 'BLOB'} PRIMARY KEY, "
        "hits int)"
    )
    sink = world.sink()
    rows = {id: n for n, id in enumerate([*ODD, b"\xff", b"a\0b", b"\\x00", bytes(range(256))], 1)}
    assert sink.apply(world.chunk(rows)) == Applied(Status.APPLIED, len(rows))
    assert {bytes(k): v for k, v in world.rows().items()} == rows
    assert sink.read("hits", SUM, b"a\0b", [], []).row["amount"] == rows[b"a\0b"]


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_ids_that_are_one_key_add_up(world: World, mode: str) -> None:
    """`1`, `01`, ` 1` and `+1` are one integer: their sum reaches its row, also when unknown."""
    world.sql("CREATE TABLE pages (path bigint PRIMARY KEY, hits bigint NOT NULL DEFAULT 0)")
    world.sql("INSERT INTO pages VALUES (1, 100), (2, 200)")
    sink = world.sink(mode=mode)
    rows = {b"1": 1, b"2": 2, b"01": 10, b" 1": 100, b"+1": 1000, b"7": 5, b"07": 6}
    applied = sink.apply(world.chunk(rows))
    assert world.rows() == {1: 1211, 2: 202} | ({7: 11} if mode == "upsert" else {})
    dead = [] if mode == "upsert" else [(b"7", 5), (b"07", 6)]
    assert [(id, amount) for id, _, amount, _ in letters(sink)] == dead
    assert applied.dead == len(dead)
    assert sink.apply(world.chunk({b"2": 1}, "b2")).rows == 1
    assert sink.read("hits", SUM, b"0001", [], []).row == {"amount": 1211}


def test_ids_that_are_no_integer(world: World) -> None:
    """An id that an integer key cannot be goes to the dead letters, and has no row."""
    world.sql("CREATE TABLE pages (path bigint PRIMARY KEY, hits bigint)")
    sink = world.sink()
    bad = [b"x", b"1.5", b"", b"9223372036854775808", b"1e3", b"\xd9\xa1", b"a\0", b"\xff", b"1_0"]
    if world.is_postgres:
        bad.remove(b"1_0")  # an integer since version 16
    rows = dict.fromkeys(bad, 1) | {b"1": 2, b"-9223372036854775808": 3}
    assert sink.apply(world.chunk(rows)) == Applied(Status.APPLIED, 2, len(bad))
    assert world.rows() == {1: 2, -(2**63): 3}
    assert sorted(id for id, *_ in letters(sink)) == sorted(bad)
    for id in bad:
        reading = sink.read("hits", SUM, id, [], [])
        assert reading.row == {"amount": None}
        assert reading.dead == {"amount": 1}


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("uuid", b"00000000-0000-0000-0000-00000000000A", b"no uuid"),
        ("varchar(5)", b"12345", b"123456"),
        ("char(5)", b"123", b"123456"),
        ("mood", b"glad", b"hungry"),
        ("even", b"2", b"3"),
        ("smallint", b"32767", b"32768"),
        ("date", b"2024-02-29", b"2023-02-29"),
    ],
)
def test_ids_that_do_not_cast(pg: World, key: str, good: bytes, bad: bytes) -> None:
    """An id is cast to the key's type; one that does not fit is not cut to fit."""
    pg.sql("CREATE TYPE mood AS ENUM ('sad', 'glad')")
    pg.sql("CREATE DOMAIN even AS int CHECK (mod(value, 2) = 0)")
    pg.sql(f"CREATE TABLE pages (path {key} PRIMARY KEY, hits bigint)")
    sink = pg.sink()
    assert sink.apply(pg.chunk({good: 1, bad: 2})) == Applied(Status.APPLIED, 1, 1)
    assert list(pg.rows().values()) == [1]
    assert letters(sink)[0][:3] == (bad, "amount", 2)
    assert sink.read("hits", SUM, good, [], []).row == {"amount": 1}
    assert sink.read("hits", SUM, bad, [], []).row == {"amount": None}


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_keys_that_their_type_holds_equal(pg: World, mode: str) -> None:
    """Where the key's type ignores trailing blanks, so does the sink."""
    pg.sql("CREATE TABLE pages (path char(5) PRIMARY KEY, hits bigint)")
    pg.sql("INSERT INTO pages VALUES ('a', 0), ('b', 0)")
    sink = pg.sink(mode=mode)
    assert sink.apply(pg.chunk({b"a": 1, b"b": 2, b"a  ": 4})).rows == 2
    assert sorted(pg.rows().values()) == [2, 5]


def test_a_key_of_several_columns(world: World) -> None:
    """An id of a composite key is a JSON array with a scalar for each; others are kept."""
    world.sql("CREATE TABLE pages (site int, path text, hits bigint, PRIMARY KEY (site, path))")
    sink = world.sink(key=("site", "path"))
    good = {b'[1, "/a"]': 1, b'["2","/\\u00e9"]': 2, b'[1,"/a"]': 4, b"[3,7]": 8}
    bad = [
        b"1", b"[1]", b'[1,"/a",2]', b'{"a":1}', b'[1,null]', b'[1,["x"]]', b"[1,", b"\xff",
        b'["x","/a"]', b'[1,"\\u0000"]', b'[1,"\\ud800"]', b"[" * 2000, b"[1,NaN]",
    ]  # fmt: skip
    applied = sink.apply(world.chunk(good | dict.fromkeys(bad, 100)))
    assert applied.dead == len(bad)
    found = {(site, path): hits for site, path, hits in world.sql("SELECT * FROM pages")}
    assert found == {(1, "/a"): 5, (2, "/é"): 2, (3, "7"): 8}
    assert sorted(id for id, *_ in letters(sink)) == sorted(bad)
    assert sink.read("hits", SUM, b'[1, "/a"]', [], []).row == {"amount": 5}
    assert sink.read("hits", SUM, b"[1]", [], []).row == {"amount": None}


def test_names_are_never_sql(world: World) -> None:
    """Any name of a table or column is quoted, whatever it holds."""
    table, key, column = "a \"b'%s?{x};--", 'k"%', "group ?{}%(x)s"
    quoted = [name.replace('"', '""') for name in (table, key, column)]
    statement = 'CREATE TABLE "{}" ("{}" text PRIMARY KEY, "{}" bigint)'.format(*quoted)
    world._connection.execute(statement)
    options: Any = {"table": table, "key": key, "columns": {"amount": column}}
    names: Any = {"ledger": 'l"%s?{}', "dead": "d\"%s?{}'"}
    for mode in ("upsert", "update"):
        sink = world.sink(mode=mode, **options, **names)
        chunk = world.chunk({b"/a": 1, b"\xff": 2}, mode)
        assert sink.apply(chunk) == Applied(Status.APPLIED, 1, 1)
        assert sink.apply(chunk).status is Status.DUPLICATE
        assert sink.read("hits", SUM, b"/a", [ChunkId(mode, 0)], [mode]).begun == {mode}
        assert sink.retry("hits", SUM).applied == 0
        assert sink.unsettled("hits")
        assert sink.prune("hits", frozenset([mode])) == 0
        assert not sink.unsettled("hits")
    assert sink.read("hits", SUM, b"/a", [], []).row == {"amount": 2}
    assert sink.dead_count("hits") == 2


def test_tables_of_another_schema(world: World, tmp_path: Path) -> None:
    """`("schema", "table")` names a table outside the search path, or of an attached database."""
    app = f"app_{secrets.token_hex(6)}"
    if world.is_postgres:
        world.sql(f"CREATE SCHEMA {app}")
        target: Any = world.where
    else:
        connection = sqlite3.connect(world.where)
        connection.execute(f"ATTACH ? AS {app}", (str(tmp_path / "other.db"),))
        world.sql(f"ATTACH ? AS {app}", str(tmp_path / "other.db"))
        target = connection
    world.sql(f"CREATE TABLE {app}.pages (path text PRIMARY KEY, hits bigint)")
    sink = world.sink(target, table=(app, "pages"), ledger=(app, "l"), dead=(app, "d"))
    assert sink.apply(world.chunk({b"/a": 1, b"\xff": 2})) == Applied(Status.APPLIED, 1, 1)
    assert world.sql(f"SELECT hits FROM {app}.pages") == [(1,)]
    assert world.sql(f"SELECT count(*) FROM {app}.l WHERE chunk >= 0") == [(1,)]
    if not world.is_postgres:
        target.close()


@given(texts=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_array_literals(session: psycopg.Connection[Any], texts: list[str]) -> None:
    """PostgreSQL reads from our array literals what was put into them."""
    assert session.execute("SELECT %s::text[]", [text_array(texts)]).fetchone() == (texts,)
    numbers = [None if len(text) == 1 else len(text) - 3 for text in texts]
    assert session.execute("SELECT %s::bigint[]", [number_array(numbers)]).fetchone() == (numbers,)


# Columns


def test_maxima_and_minima(world: World) -> None:
    """Max and min keep the outermost value, whichever of row and amount is NULL."""
    world.sql("CREATE TABLE issues (id bigint PRIMARY KEY, seen bigint, last bigint, first bigint)")
    world.sql("INSERT INTO issues VALUES (1, NULL, NULL, NULL), (2, 5, 50, 50), (3, 5, 50, 50)")
    columns = {"times_seen": "seen", "last_seen": "last", "first_seen": "first"}
    options = {"table": "issues", "key": "id", "columns": columns}
    for mode, rows in (
        (
            "upsert",
            {b"1": (1, 10, 10), b"2": (1, 60, 60), b"3": (None, None, None), b"4": (2, 9, 9)},
        ),
        (
            "update",
            {b"1": (1, 9, 9), b"2": (None, None, 1), b"3": (1, 40, 40), b"4": (0, None, 99)},
        ),
    ):
        sink = world.sink(rules=ISSUE, mode=mode, **options)
        chunk = world.chunk(rows, mode, rules=ISSUE)
        assert sink.apply(chunk) == Applied(Status.APPLIED, 4)
    assert world.rows("issues") == {1: (2, 10, 9), 2: (6, 60, 1), 3: (6, 50, 40), 4: (2, 9, 9)}
    reading = sink.read("hits", ISSUE, b"2", [], [])
    assert reading.row == {"times_seen": 6, "last_seen": 60, "first_seen": 1}


def test_only_some_columns_of_a_batch(world: World) -> None:
    """A batch from before a column was added has fewer columns: the others keep their values."""
    world.sql("CREATE TABLE issues (id bigint PRIMARY KEY, seen bigint DEFAULT 0, last bigint)")
    columns = {"times_seen": "seen", "last_seen": "last"}
    rules = {"times_seen": Rule.SUM, "last_seen": Rule.MAX}
    sink = world.sink(rules=rules, table="issues", key="id", columns=columns)
    sink.apply(world.chunk({b"1": (1, 7)}, rules=rules))
    sink.apply(world.chunk({b"1": 2, b"2": 3}, "b2", rules={"times_seen": Rule.SUM}))
    sink.apply(world.chunk({b"1": 9}, "b3", rules={"last_seen": Rule.MAX}))
    assert world.rows("issues") == {1: (3, 9), 2: (3, None)}


MOMENT = dt.datetime(2024, 3, 31, 1, 30, 0, 123457, tzinfo=dt.UTC)
MICROS = 1711848600123457


@pytest.mark.parametrize("mode", ["upsert", "update"])
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_moments_in_postgresql(pg: World, mode: str, zone: str) -> None:
    """Microseconds are exact in timestamp columns, whatever the session's time zone says."""
    pg.sql("CREATE TABLE issues (id int PRIMARY KEY, last timestamptz, first timestamp, day date)")
    pg.sql(
        "INSERT INTO issues VALUES (1, NULL, NULL, NULL), (2, 'infinity', '-infinity', 'infinity')"
    )
    rules = {"last": Rule.MAX, "first": Rule.MIN, "day": Rule.MAX}
    sink = pg.sink(rules=rules, mode=mode, table="issues", key="id", columns={n: n for n in rules})
    for batch, at in enumerate((MICROS, MICROS + 1, MICROS - 1)):
        sink.apply(pg.chunk({b"1": (at, at, at), b"2": (at, at, at)}, f"b{batch}", rules=rules))
    found = pg.sql("SELECT last, first, day FROM issues WHERE id = 1")[0]
    micro = dt.timedelta(microseconds=1)
    assert found == (MOMENT + micro, (MOMENT - micro).replace(tzinfo=None), MOMENT.date())
    reading = sink.read("hits", rules, b"1", [], [])
    midnight = MICROS - MICROS % 86_400_000_000
    assert reading.row == {"last": MICROS + 1, "first": MICROS - 1, "day": midnight}
    assert sink.read("hits", rules, b"2", [], []).row == dict.fromkeys(rules)


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_moments_in_sqlite(lite: World, mode: str) -> None:
    """A DATETIME column holds text in UTC; one written otherwise is left alone, the amount kept."""
    lite.sql("CREATE TABLE issues (id INTEGER PRIMARY KEY, last DATETIME, first TIMESTAMP)")
    lite.sql(
        "INSERT INTO issues VALUES (1, NULL, NULL), "
        "(2, '2024-03-31 01:30:00', '2024-03-31 01:30:01'), (3, '2024-03-31T01:30:00Z', NULL)"
    )
    rules = {"last": Rule.MAX, "first": Rule.MIN}
    sink = lite.sink(
        rules=rules, mode=mode, table="issues", key="id", columns={"last": "last", "first": "first"}
    )
    for batch, at in enumerate((MICROS, MICROS + 1, MICROS - 1)):
        chunk = lite.chunk({b"1": (at, at), b"2": (at, at)}, f"b{batch}", rules=rules)
        assert sink.apply(chunk) == Applied(Status.APPLIED, 2)
    texts = ("2024-03-31 01:30:00.123458", "2024-03-31 01:30:00.123456")
    assert lite.sql("SELECT last, first FROM issues WHERE id < 3") == [texts, texts]
    assert sink.read("hits", rules, b"1", [], []).row == {"last": MICROS + 1, "first": MICROS - 1}
    chunk = lite.chunk({b"3": (MICROS, None), b"1": (10**18, 0)}, "b9", rules=rules)
    assert sink.apply(chunk) == Applied(Status.APPLIED, 0, 3)
    assert lite.sql("SELECT last FROM issues WHERE id = 3") == [("2024-03-31T01:30:00Z",)]


@pytest.mark.parametrize(
    ("column", "start", "good", "bad"),
    [
        ("smallint", 32767, -1, 1),
        ("integer", 2**31 - 1, -1, 1),
        ("bigint", 2**63 - 1, -1, 1),
        ("numeric(3,0)", 999, -1, 1),
        ("small", 9, -1, 1),
    ],
)
@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_sums_out_of_a_columns_range(
    pg: World, column: str, start: int, good: int, bad: int, mode: str
) -> None:
    """A sum that leaves the column's range stays a dead letter, the other rows are written."""
    pg.sql("CREATE DOMAIN small AS int CHECK (value < 10)")
    pg.sql(f"CREATE TABLE pages (path text PRIMARY KEY, hits {column})")
    for path in ("/a", "/b", "/c"):
        pg.sql(f"INSERT INTO pages VALUES ('{path}', {start})")
    sink = pg.sink(mode=mode)
    chunk = pg.chunk({b"/a": good, b"/b": bad, b"/c": good})
    assert sink.apply(chunk) == Applied(Status.APPLIED, 2, 1)
    assert pg.rows() == {"/a": start + good, "/b": start, "/c": start + good}
    assert [(id, amount) for id, _, amount, _ in letters(sink)] == [(b"/b", bad)]


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_sums_past_64_bits_in_sqlite(lite: World, mode: str) -> None:
    """SQLite would go on in floating point: the sum stays a dead letter instead."""
    lite.pages()
    lite.sql("INSERT INTO pages VALUES ('/a', 9223372036854775807), ('/b', 1), ('/c', 'x')")
    lite.sql("INSERT INTO pages VALUES ('/d', -9223372036854775808), ('/e', 1.5)")
    sink = lite.sink(mode=mode)
    rows = {b"/a": 1, b"/b": 2**53, b"/c": 1, b"/d": -1, b"/e": 1}
    assert sink.apply(lite.chunk(rows)) == Applied(Status.APPLIED, 1, 4)
    assert lite.rows() == {"/a": 2**63 - 1, "/b": 2**53 + 1, "/c": "x", "/d": -(2**63), "/e": 1.5}
    assert [id for id, *_ in letters(sink)] == [b"/a", b"/c", b"/d", b"/e"]


def test_all_amounts_of_a_bad_row_are_kept(world: World) -> None:
    """One column out of range: the whole hit goes to the dead letters, a letter per amount."""
    world.sql("CREATE TABLE issues (id int PRIMARY KEY, seen int CHECK (seen < 100), last bigint)")
    rules = {"times_seen": Rule.SUM, "last_seen": Rule.MAX}
    columns = {"times_seen": "seen", "last_seen": "last"}
    sink = world.sink(rules=rules, table="issues", key="id", columns=columns)
    rows = {b"1": (1, 7), b"2": (100, 8), b"3": (100, None)}
    assert sink.apply(world.chunk(rows, rules=rules)) == Applied(Status.APPLIED, 1, 3)
    assert world.rows("issues") == {1: (1, 7)}
    assert [letter[:3] for letter in letters(sink)] == [
        (b"2", "times_seen", 100), (b"2", "last_seen", 8), (b"3", "times_seen", 100),
    ]  # fmt: skip
    assert sink.read("hits", rules, b"2", [], []).dead == {"times_seen": 100, "last_seen": 8}


# Refusals


def test_a_constraint_refuses_single_rows(world: World) -> None:
    """CHECK and foreign keys refuse rows, not chunks; the reason says which constraint it was."""
    world.sql("CREATE TABLE sites (id int PRIMARY KEY)")
    world.sql(
        "CREATE TABLE pages (path int PRIMARY KEY REFERENCES sites, "
        "hits int CONSTRAINT not_too_many CHECK (hits < 10))"
    )
    ids = range(1, 301)
    world.sql(f"INSERT INTO sites VALUES {', '.join(f'({i})' for i in ids if i % 50)}")
    sink = world.sink()
    rows = {b"%d" % i: 10 if i % 70 == 0 else 1 for i in random.sample(ids, len(ids))}
    applied = sink.apply(world.chunk(rows))
    bad = {i for i in ids if i % 50 == 0 or i % 70 == 0}
    assert applied == Applied(Status.APPLIED, 300 - len(bad), len(bad))
    assert set(world.rows()) == set(ids) - bad
    reasons = {int(id): reason.lower() for id, *_, reason in letters(sink)}
    assert set(reasons) == bad
    assert "foreign key" in reasons[50]
    assert "not_too_many" in reasons[70]


def test_a_deferred_constraint_refuses_before_commit(pg: World) -> None:
    """A constraint that is checked at COMMIT is checked earlier, and refuses its row only."""
    pg.sql("CREATE TABLE sites (id int PRIMARY KEY)")
    pg.sql("INSERT INTO sites VALUES (1)")
    pg.sql(
        "CREATE TABLE pages (path int PRIMARY KEY REFERENCES sites DEFERRABLE INITIALLY DEFERRED, "
        "hits int)"
    )
    sink = pg.sink()
    assert sink.apply(pg.chunk({b"1": 1, b"2": 1})) == Applied(Status.APPLIED, 1, 1)
    assert pg.rows() == {1: 1}


@pytest.mark.parametrize(
    "code",
    [
        "P0001", "45000", "U0815", "23514",
        # of disorder rather than of data:
        "42501", "42P01", "3F000", "0A000", "28000", "40002", "55000", "P0004", "XX000",
    ],
)  # fmt: skip
def test_a_trigger_refuses_single_rows(pg: World, code: str) -> None:
    """A trigger that raises refuses its row, whatever error code it invents."""
    pg.pages()
    pg.sql(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
        "IF NEW.path = '/no' THEN "
        f"RAISE EXCEPTION 'not %', repeat('x', 900) USING ERRCODE = '{code}'; END IF; "
        "RETURN NEW; END$$"
    )
    pg.sql("CREATE TRIGGER no BEFORE INSERT ON pages FOR EACH ROW EXECUTE FUNCTION no()")
    sink = pg.sink()
    rows = {b"/%d" % i: 1 for i in range(20)} | {b"/no": 1}
    assert sink.apply(pg.chunk(rows)) == Applied(Status.APPLIED, 20, 1)
    assert letters(sink) == [(b"/no", "amount", 1, ("not " + "x" * 900)[:500])]


def refusing(world: World, what: str, code: str) -> None:
    """Make a trigger that raises an error for the paths that a condition means."""
    world.sql(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
        f"IF {what} THEN RAISE EXCEPTION 'out of order' USING ERRCODE = '{code}'; END IF; "
        "RETURN NEW; END$$"
    )
    world.sql(
        "CREATE TRIGGER no BEFORE INSERT OR UPDATE ON pages FOR EACH ROW EXECUTE FUNCTION no()"
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["upsert", "update"])
@pytest.mark.parametrize(
    ("code", "kind"), [("42501", SchemaError), ("0A000", ServerError), ("XX000", ServerError)]
)
def test_a_broken_trigger_buries_nothing(
    pg: World, mode: str, code: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all rows are refused with an error of disorder, it is raised, and soon."""
    pg.pages()
    pg.sql("INSERT INTO pages SELECT '/' || i, 0 FROM generate_series(0, 4999) i")
    sink = pg.sink(mode=mode)
    refusing(pg, "true", code)
    chunk = pg.chunk({b"/%d" % i: 1 for i in range(5000)} | {b"\xff": 1})
    errors: list[psycopg.Error] = []

    def verdict(error: psycopg.Error) -> Exception:
        errors.append(error)
        return _verdict(error)

    monkeypatch.setattr(_psycopg, "verdict", verdict)
    with pytest.raises(kind, match="out of order"):
        sink.apply(chunk)
    assert 64 < len(errors) < 256
    assert sink.dead_count("hits") == 0
    assert sink.applied("b1") == set()
    pg.sql("DROP TRIGGER no ON pages")
    assert sink.apply(chunk) == Applied(Status.APPLIED, 5000, 1)


def test_a_missing_function_buries_nothing(pg: World) -> None:
    """A trigger that calls what is not there is the schema's fault; the message names it."""
    pg.pages()
    pg.sql(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN NEW.hits = no_such_function(NEW.hits); RETURN NEW; END$$"
    )
    pg.sql("CREATE TRIGGER no BEFORE INSERT ON pages FOR EACH ROW EXECUTE FUNCTION no()")
    sink = pg.sink()
    with pytest.raises(SchemaError, match="no_such_function"):
        sink.apply(pg.chunk({b"/a": 1, b"/b": 1}))
    assert sink.dead_count("hits") == 0


def test_bad_rows_that_stand_together_are_no_disorder(pg: World) -> None:
    """Hundreds refused one after the other, and others behind them that pass: these are written."""
    pg.pages()
    refusing(pg, "NEW.path LIKE '/a%'", "42501")
    sink = pg.sink()
    good = {b"/b%03d" % i: 2 for i in range(300)}
    chunk = pg.chunk({b"/a%03d" % i: 1 for i in range(200)} | good)
    assert sink.apply(chunk) == Applied(Status.APPLIED, 300, 200)
    assert pg.rows() == {id.decode(): amount for id, amount in good.items()}
    assert {(amount, reason) for _, _, amount, reason in letters(sink)} == {(1, "out of order")}


def test_a_retry_is_held_up_by_no_letter(pg: World) -> None:
    """What is refused for whatever reason at a retry stays, with the reason; others are applied."""
    pg.pages()
    sink = pg.sink(mode="update")
    sink.apply(pg.chunk({b"/%d" % i: 1 for i in range(1100)}))
    pg.sql("INSERT INTO pages SELECT '/' || i, 0 FROM generate_series(0, 1099) i")
    refusing(pg, "substr(NEW.path, 2)::int < 1000", "XX000")  # all of the first page
    assert sink.retry("hits", SUM) == Retried(100, 1000)
    assert {reason for *_, reason in letters(sink)} == {"out of order"}
    pg.sql("DROP TRIGGER no ON pages")
    assert sink.retry("hits", SUM) == Retried(1000, 0)
    assert set(pg.rows().values()) == {1}


def test_a_policy_refuses_single_rows(flavour: str, pg_dsn: str, runner: asyncio.Runner) -> None:
    """Row-level security that forbids one id: a dead letter with the reason, the rest written."""
    pg = World("postgres" if flavour == "sync" else "async", pg_dsn, runner)
    pg.pages()
    pg.sink()
    role = f"r{secrets.token_hex(6)}"
    pg.sql(f"CREATE ROLE {role} LOGIN")
    try:
        pg.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        pg.sql("ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
        pg.sql("CREATE POLICY most ON pages USING (path <> '/no')")
        sink = pg.sink(pg.where.replace("postgres@", f"{role}@"))
        rows = {b"/%d" % i: 1 for i in range(20)} | {b"/no": 7}
        for batch in ("b1", "b2"):  # a row to insert, then one to update
            assert sink.apply(pg.chunk(rows, batch)) == Applied(Status.APPLIED, 20, 1)
            assert letters(sink)[-1][:3] == (b"/no", "amount", 7)
            assert "row-level security" in letters(sink)[-1][3]
            if batch == "b1":
                pg.sql("INSERT INTO pages VALUES ('/no', 0)")
        # Alone, too: a policy means the row. A trigger's own trouble is the database's disorder.
        assert sink.apply(pg.chunk({b"/no": 7}, "b3")) == Applied(Status.APPLIED, 0, 1)
        assert pg.rows() == {f"/{i}": 2 for i in range(20)} | {"/no": 0}
        pg.sql("CREATE TABLE log (n int)")
        pg.sql(
            "CREATE FUNCTION log() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN INSERT INTO log VALUES (1); RETURN NEW; END$$"
        )
        pg.sql("CREATE TRIGGER log BEFORE INSERT ON pages FOR EACH ROW EXECUTE FUNCTION log()")
        for batch, message in (("b4", "permission denied"), ("b5", "row-level security")):
            with pytest.raises(SchemaError, match=message):
                sink.apply(pg.chunk({b"/0": 1}, batch))
            pg.sql(f"GRANT ALL ON log TO {role}")
            pg.sql("ALTER TABLE log ENABLE ROW LEVEL SECURITY")
        assert sink.dead_count("hits") == 3
    finally:
        pg.sql(f"DROP OWNED BY {role}")
        pg.sql(f"DROP ROLE {role}")
        pg.close()


@pytest.mark.parametrize("unknown", ["dead", "drop"])
def test_a_suspicious_row_among_unknown_ids(world: World, unknown: str) -> None:
    """Where other ids are merely unknown the table works: the row is a dead letter."""
    world.pages()
    world.sql("INSERT INTO pages VALUES ('{', 0)")
    sink = world.sink(mode="update", unknown=unknown)
    if world.is_postgres:
        refusing(world, "NEW.path = '{'", "42501")
    else:
        world.sql("CREATE TRIGGER t BEFORE UPDATE ON pages BEGIN SELECT json(NEW.path); END")
    applied = sink.apply(world.chunk({b"{": 1, b"/x": 2, b"/y": 3}))
    assert applied == Applied(Status.APPLIED, 0, 3 if unknown == "dead" else 1)
    assert letters(sink)[0][:3] == (b"{", "amount", 1)
    with pytest.raises((SchemaError, ServerError)):
        sink.apply(world.chunk({b"{": 4}, "b2"))


def test_many_suspicious_rows_among_unknown_ids(pg: World) -> None:
    """Some unknown ids far behind many rows that are refused tell that the table works, too."""
    pg.pages()
    pg.sql("INSERT INTO pages SELECT '/a' || i, 0 FROM generate_series(0, 199) i")
    sink = pg.sink(mode="update", unknown="drop")
    refusing(pg, "true", "42501")
    chunk = pg.chunk({b"/a%d" % i: 1 for i in range(200)} | {b"/b%d" % i: 1 for i in range(300)})
    assert sink.apply(chunk) == Applied(Status.APPLIED, 0, 200)


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_a_trigger_that_discards_rows_loses_nothing(pg: World, mode: str) -> None:
    """A trigger that skips a row in silence: its amount is a dead letter, not gone."""
    pg.pages()
    pg.sql("INSERT INTO pages SELECT '/' || i, 0 FROM generate_series(0, 19) i")
    pg.sql("INSERT INTO pages VALUES ('/no', 0)")
    pg.sql(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN IF NEW.path = '/no' THEN RETURN NULL; END IF; RETURN NEW; END$$"
    )
    pg.sql("CREATE TRIGGER no BEFORE UPDATE ON pages FOR EACH ROW EXECUTE FUNCTION no()")
    sink = pg.sink(mode=mode)
    rows = {b"/%d" % i: 1 for i in range(20)} | {b"/no": 1}
    assert sink.apply(pg.chunk(rows)) == Applied(Status.APPLIED, 20, 1)
    assert letters(sink)[0][:3] == (b"/no", "amount", 1)


def test_triggers_in_sqlite(lite: World) -> None:
    """ABORT and FAIL refuse a row, IGNORE leaves a letter, ROLLBACK stops with a clear error."""
    lite.pages()
    sink = lite.sink()
    for action in ("ABORT, 'no a'", "FAIL, 'no f'", "IGNORE", "ROLLBACK, 'no r'"):
        lite.sql(
            f"CREATE TRIGGER t_{action[:2]} BEFORE INSERT ON pages "
            f"WHEN NEW.path = '/{action.split(',')[0]}' BEGIN SELECT RAISE({action}); END"
        )
    rows = {b"/1": 1, b"/ABORT": 2, b"/FAIL": 3, b"/IGNORE": 4, b"/2": 5}
    assert sink.apply(lite.chunk(rows)) == Applied(Status.APPLIED, 2, 3)
    assert lite.rows() == {"/1": 1, "/2": 5}
    assert [(id, reason[:7]) for id, *_, reason in letters(sink)] == [
        (b"/ABORT", "no a"), (b"/FAIL", "no f"), (b"/IGNORE", "the row"),
    ]  # fmt: skip
    with pytest.raises(ServerError, match="ROLLBACK"):
        sink.apply(lite.chunk({b"/1": 1, b"/ROLLBACK": 1}, "b2"))
    assert lite.rows() == {"/1": 1, "/2": 5}
    assert sink.applied("b2") == set()


@pytest.mark.parametrize("mode", ["upsert", "update"])
def test_disorder_in_sqlite(lite: World, mode: str) -> None:
    """An unforeseen error is a row's fault where others pass, the database's where none does."""
    lite.pages()
    lite.sql("INSERT INTO pages VALUES ('{}', 0), ('{', 0), ('[]', 0), ('', 0)")
    sink = lite.sink(mode=mode)
    verb = mode.replace("upsert", "insert")
    lite.sql(f"CREATE TRIGGER t BEFORE {verb} ON pages BEGIN SELECT json(NEW.path); END")
    rows = {b"{}": 1, b"{": 2, b"[]": 3}
    assert sink.apply(lite.chunk(rows)) == Applied(Status.APPLIED, 2, 1)
    assert letters(sink) == [(b"{", "amount", 2, "malformed JSON")]
    with pytest.raises(ServerError, match="malformed JSON"):
        sink.apply(lite.chunk({b"{": 4, b"": 5}, "b2"))
    assert sink.retry("hits", SUM) == Retried(0, 1)
    lite.sql("DROP TRIGGER t")
    lite.sql("CREATE TABLE log (n)")
    lite.sql(f"CREATE TRIGGER t BEFORE {verb} ON pages BEGIN INSERT INTO log VALUES (1); END")
    lite.sql("DROP TABLE log")
    with pytest.raises(SchemaError, match=r"no such table: main\.log"):
        sink.apply(lite.chunk(rows, "b3"))
    assert sink.dead_count("hits") == 1
    assert sink.applied("b2") == sink.applied("b3") == set()
    assert lite.rows() == {"{}": 1, "{": 0, "[]": 3, "": 0}


def test_many_bad_rows_are_sorted_out_in_time(pg: World) -> None:
    """Thousands of ids that do not cast and hundreds of refusals end in one transaction."""
    pg.sql("CREATE TABLE pages (path int PRIMARY KEY, hits int CHECK (hits < 10))")
    sink = pg.sink()
    rows = {b"x%d" % i: 1 for i in range(5000)} | {b"%d" % i: 1 for i in range(5000)}
    rows |= {b"%d" % i: 10 for i in range(6000, 6200)}
    began = time.monotonic()
    assert sink.apply(pg.chunk(rows)) == Applied(Status.APPLIED, 5000, 5200)
    assert time.monotonic() - began < 30
    assert sink.dead_count("hits") == 5200


@pytest.mark.slow
def test_a_statement_that_takes_too_long(pg: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow chunk is cut up; a single row that stays too slow ends the run, nothing is lost."""
    monkeypatch.setitem(_psycopg.SETTINGS, "statement_timeout", "'300ms'")
    pg.pages()
    pg.sql(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
        "PERFORM pg_sleep(CASE NEW.path WHEN '/stuck' THEN 5 ELSE 0.05 END); RETURN NEW; END$$"
    )
    pg.sql("CREATE TRIGGER slow BEFORE INSERT ON pages FOR EACH ROW EXECUTE FUNCTION slow()")
    sink = pg.sink()
    rows = {b"/%d" % i: 1 for i in range(16)}
    assert sink.apply(pg.chunk(rows)) == Applied(Status.APPLIED, 16)
    with pytest.raises(UnavailableError, match="a single row"):
        sink.apply(pg.chunk({b"/a": 1, b"/stuck": 1}, "b2"))
    assert len(pg.rows()) == 16
    assert sink.applied("b2") == set()


# Reading


def test_a_reading_is_of_one_id(world: World) -> None:
    """It has the row, the id's open letters merged by rule, and what of the ledger was asked."""
    world.sql("CREATE TABLE issues (id text PRIMARY KEY, seen bigint, last bigint, first bigint)")
    columns = {"times_seen": "seen", "last_seen": "last", "first_seen": "first"}
    sink = world.sink(rules=ISSUE, table="issues", key="id", columns=columns)
    sink.apply(world.chunk({b"a": (1, 10, 10), b"b": (1, 1, 1)}, "b1", 0, rules=ISSUE))
    sink.apply(world.chunk({b"a": (2, 20, 5)}, "b1", 2, rules=ISSUE))
    sink.apply(world.chunk({b"a": (7, 70, 70)}, "b1", 2, rules=ISSUE))
    sink.apply(world.chunk({b"a": (8, 80, None), b"b": (1, 1, 1)}, "b1", 0, rules=ISSUE))
    chunks = [ChunkId("b1", 0), ChunkId("b1", 1), ChunkId("b1", 2), ChunkId("b2", 0)]
    reading = sink.read("hits", ISSUE, b"a", chunks, ["b1", "b2"])
    assert reading.row == {"times_seen": 3, "last_seen": 20, "first_seen": 5}
    assert reading.dead == {"times_seen": 15, "last_seen": 80, "first_seen": 70}
    assert reading.applied == {ChunkId("b1", 0), ChunkId("b1", 2)}
    assert reading.begun == {"b1"}
    other = sink.read("other", ISSUE, b"z", [], [])
    assert other.row == dict.fromkeys(ISSUE)
    assert (other.dead, other.applied, other.begun) == ({}, frozenset(), frozenset())
    only = sink.read("hits", {"last_seen": Rule.MAX}, b"a", [], [])
    assert (only.row, only.dead) == ({"last_seen": 20}, {"last_seen": 80})


@pytest.mark.slow
def test_a_reading_is_one_snapshot(pg: World) -> None:
    """While chunks, letters and retries commit, row + letters and the ledger always agree."""
    pg.pages(hits="bigint NOT NULL DEFAULT 0 CHECK (mod(hits, 4) <> 3)")
    sink = pg.sink()
    clock = pg.clock
    done = threading.Event()

    def write() -> None:
        with PostgresSink(pg.where, **PAGES) as writer:
            for i in range(100):
                writer.apply(pg.chunk({b"/a": 1}, f"b{i}")._replace(read_at=clock))
                if i % 3 == 0:
                    writer.retry("hits", SUM)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    chunks = [ChunkId(f"b{i}", 0) for i in range(100)]
    try:
        last = 0
        while not done.is_set():
            reading = sink.read("hits", SUM, b"/a", chunks, [])
            total = (reading.row["amount"] or 0) + reading.dead.get("amount", 0)
            assert total == len(reading.applied) >= last
            last = total
    finally:
        thread.join()


def test_a_reading_between_any_two_steps(plain: World) -> None:
    """At every step of an apply and of a retry a reader sees each amount exactly once."""
    plain.pages()
    plain.sql("INSERT INTO pages VALUES ('/a', 0)")
    sink, reader = plain.sink(mode="update"), plain.sink()
    sent = {b"/a": 1, b"/b": 2}
    chunk = plain.chunk(sent)

    def watch(steps: Any) -> int:
        """Drive steps; before each of them, read."""
        seen = 0
        with contextlib.suppress(StopIteration):
            effect = next(steps)
            while True:
                for id, amount in sent.items():
                    reading = reader.read("hits", SUM, id, [ChunkId("b1", 0)], [])
                    total = (reading.row["amount"] or 0) + reading.dead.get("amount", 0)
                    assert total == (amount if reading.applied else 0)
                seen += 1
                effect = steps.send(perform(effect, None, 1.0))
        return seen

    assert watch(sink._steps.apply(chunk)) > 5
    assert sink.dead_count("hits") == 1
    plain.sql("INSERT INTO pages VALUES ('/b', 0)")
    assert watch(sink._steps.retry("hits", SUM)) > 5
    assert plain.rows() == {"/a": 1, "/b": 2}


# Dead letters and the ledger


def test_a_letter_without_a_row_is_kept(world: World) -> None:
    """A retry forgets no letter: unknown="drop" is for ids that come new."""
    world.pages(hits="bigint NOT NULL DEFAULT 0 CHECK (hits < 5)")
    world.sql("INSERT INTO pages VALUES ('/a', 0)")
    sink = world.sink(mode="update", unknown="drop")
    assert sink.apply(world.chunk({b"/a": 7, b"/x": 2})) == Applied(Status.APPLIED, 0, 1)
    world.sql("DELETE FROM pages")
    assert sink.retry("hits", SUM) == Retried(0, 1)
    assert letters(sink) == [(b"/a", "amount", 7, "unknown id")]
    world.sql("INSERT INTO pages VALUES ('/a', -7)")
    assert sink.retry("hits", SUM) == Retried(1, 0)
    assert world.rows() == {"/a": 0}


def test_letters_are_applied_again(world: World) -> None:
    """A retry applies what passes now, keeps the rest with its new reason, each exactly once."""
    world.pages()
    sink = world.sink(mode="update")
    sink.apply(world.chunk({b"/a": 1, b"/b": 2}))
    sink.apply(world.chunk({b"/a": 4, b"\xff": 8}, "b2", 3))
    before = sink.dead("hits")
    assert [(d.batch, d.chunk) for d in before] == [("b1", 0), ("b1", 0), ("b2", 3), ("b2", 3)]
    assert all(abs(d.at - world.clock) < dt.timedelta(minutes=1) for d in before)
    assert sink.dead("hits", 2) == before[:2]
    assert sink.dead("other") == []
    world.sql("INSERT INTO pages VALUES ('/a', 100)")
    assert sink.retry("other", SUM) == Retried(0, 0)
    assert sink.retry("hits", SUM) == Retried(2, 2)
    assert world.rows() == {"/a": 105}
    assert [(d.id, d.amount) for d in sink.dead("hits")] == [(b"/b", 2), (b"\xff", 8)]
    assert sink.retry("hits", SUM) == Retried(0, 2)
    upserts = world.sink(mode="upsert")
    assert upserts.retry("hits", SUM) == Retried(1, 1)
    assert world.rows() == {"/a": 105, "/b": 2}
    assert letters(sink) == [(b"\xff", "amount", 8, "id is not valid UTF-8")]


def test_a_conflict_is_applied_on_request(world: World) -> None:
    """Letters of a conflict are applied by a retry too, those of several copies apart."""
    world.pages()
    sink = world.sink()
    for amount in (1, 10, 100):
        sink.apply(world.chunk({b"/a": amount}))
    assert sink.dead_count("hits") == 2
    assert sink.retry("hits", SUM) == Retried(2, 0)
    assert world.rows() == {"/a": 111}


def test_a_retry_of_many_pages(world: World) -> None:
    """More letters than one transaction takes; the amounts of a hit stay together."""
    world.sql(
        "CREATE TABLE issues (id int PRIMARY KEY, seen int NOT NULL DEFAULT 0, last bigint, "
        "CHECK (seen = 0 OR last IS NOT NULL))"
    )
    rules = {"times_seen": Rule.SUM, "last_seen": Rule.MAX}
    options = {"table": "issues", "key": "id"}
    columns = {"times_seen": "seen", "last_seen": "last"}
    sink = world.sink(rules=rules, mode="update", columns=columns, **options)
    rows = {b"%d" % i: (1, None if i == 0 else i) for i in range(1300)}
    assert sink.apply(world.chunk(rows, rules=rules)).dead == 2599
    world.sql(
        f"INSERT INTO issues VALUES {', '.join(f'({i}, 0, NULL)' for i in range(1300) if i % 3)}"
    )
    expected = {i: (1, i) for i in range(1300) if i % 3}
    assert sink.retry("hits", rules) == Retried(2 * len(expected), 2599 - 2 * len(expected))
    assert world.rows("issues") == expected
    # A column that the sink has no place for stays where it is.
    partial = world.sink(rules=SUM, mode="upsert", columns={"amount": "seen"}, **options)
    assert partial.retry("hits", SUM).applied == 0
    assert "times_seen" in letters(sink)[0][3]


def test_two_retries_at_once(pg: World) -> None:
    """Two retries at the same time share the letters between them."""
    pg.pages()
    sink = pg.sink(mode="update")
    for batch in range(4):
        sink.apply(pg.chunk({b"/%d" % i: 1 for i in range(1000)}, f"b{batch}"))

    def retry(_: int) -> Retried:
        with PostgresSink(pg.where, **PAGES) as mine:
            return mine.retry("hits", SUM)

    with ThreadPoolExecutor(3) as pool:
        done = []
        for future in [pool.submit(retry, i) for i in range(3)]:
            try:
                done.append(future.result())
            except UnavailableError:  # its rows were locked by another one
                continue
    while sink.dead_count("hits"):
        retry(0)
    assert set(pg.rows().values()) == {4}
    assert len(pg.rows()) == 1000


def test_the_ledger_forgets_a_week_after_redis(world: World) -> None:
    """Rows are deleted 7 days after their batch was marked as gone from Redis, never unmarked."""
    world.pages()
    sink = world.sink()
    for batch in ("b1", "b2", "b3"):
        sink.apply(world.chunk({b"/a": 1}, batch, 0))
        sink.apply(world.chunk({b"/a": 1}, batch, 1))
    assert sink.unsettled("hits") == {"b1", "b2", "b3"}
    assert sink.unsettled("other") == set()
    assert sink.prune("other", frozenset(["b1"])) == 0
    assert sink.prune("hits", frozenset()) == 0
    assert sink.prune("hits", frozenset(["b1", "b2", "no such batch"])) == 0
    assert sink.unsettled("hits") == {"b3"}
    back = "gone_at - interval '7 days 1 second'" if world.is_postgres else "gone_at - 604801000000"
    world.sql(f"UPDATE redishacks_ledger SET gone_at = {back} WHERE batch = 'b1'")
    world.sql("UPDATE redishacks_ledger SET applied_at = ? WHERE batch = 'b3'", (
        dt.datetime(2000, 1, 1, tzinfo=dt.UTC) if world.is_postgres else 0
    ))  # fmt: skip
    assert sink.prune("hits", frozenset(["b2"])) == 2
    assert sink.applied("b1") == set()
    assert sink.applied("b2") == sink.applied("b3") == {0, 1}


def test_the_ledger_is_made_once(world: World) -> None:
    """create_ledger() may run in many threads at once, and again; ddl() does the same."""
    world.pages()

    def create(_: int) -> None:
        kind: Any = PostgresSink if world.is_postgres else SQLiteSink
        with kind(world.where, **PAGES) as sink:
            sink.create_ledger()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(8)))
    for statement in world.bare_sink().ddl().split(";\n"):
        world.sql(statement)
    sink = world.sink()
    assert sink.apply(world.chunk({b"/a": 1})).status is Status.APPLIED


def test_a_ledger_has_one_identity(world: World) -> None:
    """It is drawn once, outlives create_ledger() and pruning, and no other ledger has it."""
    world.pages()
    sink = world.bare_sink()
    sink.create_ledger()
    assert sink.read("hits", SUM, b"/a", [], []).ledger == ""
    name = sink.begin(SUM).ledger
    assert len(bytes.fromhex(name)) == 16
    sink.create_ledger()
    assert world.sink().begin(SUM).ledger == sink.begin(SUM).ledger == name
    assert sink.read("hits", SUM, b"/a", [], []).ledger == name
    assert world.sink(ledger="other_ledger").begin(SUM).ledger != name
    # It is no chunk of any batch.
    assert sink.applied("") == sink.unsettled("") == set()
    sink.prune("", frozenset([""]))
    week = "clock_timestamp() - interval '8 days'" if world.is_postgres else "0"
    world.sql(f"UPDATE redishacks_ledger SET gone_at = {week}")
    assert sink.prune("", frozenset([""])) == sink.prune("hits", frozenset([""])) == 0
    assert sink.begin(SUM).ledger == name
    world.sql("DELETE FROM redishacks_ledger")
    assert sink.begin(SUM).ledger != name


def test_a_chunk_is_for_one_ledger(world: World) -> None:
    """In a ledger that was emptied, and then begun anew, a chunk of before is stale."""
    world.pages()
    sink = world.sink()
    known = world.chunk({b"/a": 1})
    assert sink.apply(known).status is Status.APPLIED
    world.sql("DELETE FROM redishacks_ledger WHERE chunk = -1")
    assert sink.apply(known).status is Status.DUPLICATE
    world.sql("DELETE FROM redishacks_ledger")
    assert sink.apply(known).status is Status.STALE
    sink.begin(SUM)
    assert sink.apply(known).status is Status.STALE
    assert world.rows() == {"/a": 1}
    assert sink.applied("b1") == set()


def test_a_ledger_is_emptied_beside_a_chunk(plain: World) -> None:
    """A chunk that waits for somebody who empties the ledger finds it emptied."""
    plain.pages()
    sink = plain.sink()
    known = plain.chunk({b"/a": 1})
    sink.apply(known)
    plain.sql("BEGIN")
    # The chunk's own row first: its uniqueness is not what the chunk must come to wait for.
    plain.sql("DELETE FROM redishacks_ledger")
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(sink.apply, known)
        eventually(lambda: verdict.done() or waiting(plain))
        plain.sql("COMMIT")
        assert verdict.result().status is Status.STALE
    assert plain.rows() == {"/a": 1}


def test_two_begins_draw_one_identity(world: World) -> None:
    """However many ask a new ledger for its identity at once, they get the same."""
    world.pages()
    world.bare_sink().create_ledger()

    def begin(_: int) -> str:
        kind: Any = PostgresSink if world.is_postgres else SQLiteSink
        with kind(world.where, **PAGES) as sink:
            return str(sink.begin(SUM).ledger)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(begin, range(8)))) == 1


@pytest.mark.slow
def test_an_identity_in_the_making_is_waited_for(pg: World) -> None:
    """A begin() beside one that has not committed yet draws no identity of its own."""
    pg.pages()
    sink = pg.bare_sink()
    sink.create_ledger()
    pg.sql("BEGIN")
    pg.sql("INSERT INTO redishacks_ledger VALUES ('', '', -1, '', '\\x0102', 0)")
    with pytest.raises(UnavailableError, match="busy"):
        sink.begin(SUM)
    pg.sql("COMMIT")
    assert sink.begin(SUM).ledger == "0102"


# What is missing


def mend(world: World, error: SchemaError) -> None:
    """Run the DDL of an error."""
    for statement in error.ddl.split(";\n"):
        world.sql(statement.removesuffix(";"))


@pytest.mark.parametrize(
    ("table", "missing"),
    [
        ("", "no table pages"),
        ("CREATE TABLE pages (path text PRIMARY KEY)", "no column hits"),
        ("CREATE TABLE pages (path text, hits bigint)", "no unique index on path"),
        ("CREATE TABLE pages (hits bigint)", "no column path"),
    ],
)
def test_a_missing_table_or_column_is_named(world: World, table: str, missing: str) -> None:
    """begin() says all that is missing, and the DDL in the error mends it."""
    if table:
        world.sql(table)
    sink = world.bare_sink()
    with pytest.raises(SchemaError, match="no table redishacks_ledger") as caught:
        sink.begin(SUM)
    assert missing in str(caught.value)
    mend(world, caught.value)
    world.clock, world.ledger = sink.begin(SUM)
    assert sink.apply(world.chunk({b"/a": 1})).status is Status.APPLIED


@pytest.mark.parametrize("rule", [Rule.SUM, Rule.MAX])
def test_columns_that_would_round_are_refused(world: World, rule: Rule) -> None:
    """A column that cannot hold every amount exactly is refused before anything is written."""
    kinds = ["real", "double precision", "text"]
    if world.is_postgres:
        kinds += ["numeric(3,-2)", "money"]
    if rule is Rule.SUM:
        kinds += ["timestamp"]
    for kind in kinds:
        world.sql("DROP TABLE IF EXISTS pages")
        world.pages(hits=kind)
        with pytest.raises(SchemaError, match="exactly"):
            world.sink(rules={"amount": rule})


def test_other_columns_need_defaults_for_an_upsert(world: World) -> None:
    """An upsert into a table with a NOT NULL column of no default is refused; an update works."""
    world.sql("CREATE TABLE pages (path text PRIMARY KEY, hits int, title text NOT NULL)")
    with pytest.raises(SchemaError, match="title is NOT NULL without a default"):
        world.sink()
    world.sql("INSERT INTO pages VALUES ('/a', 0, 'A')")
    sink = world.sink(mode="update")
    assert sink.apply(world.chunk({b"/a": 1})).rows == 1


def test_the_ddl_for_other_columns_is_sql(pg: World) -> None:
    """What no DDL can mend is a comment in it; a table without our key is not looked through."""
    pg.sql('CREATE TABLE pages (path text PRIMARY KEY, "ti\ntle" text NOT NULL)')
    sink = pg.bare_sink()
    with pytest.raises(SchemaError, match="NOT NULL without a default") as caught:
        sink.begin(SUM)
    assert '-- give column "ti tle" a default, or use mode="update"\n' in caught.value.ddl
    pg.sql(caught.value.ddl)
    with pytest.raises(SchemaError) as caught:
        sink.begin(SUM)
    assert "no " not in str(caught.value)  # all the rest is mended
    pg.sql("ALTER TABLE pages RENAME path TO address")
    with pytest.raises(SchemaError, match="no column path") as caught:
        sink.begin(SUM)
    assert "NOT NULL" not in str(caught.value)


def test_missing_grants_are_named(flavour: str, pg_dsn: str, runner: asyncio.Runner) -> None:
    """begin() asks for exactly the grants that are missing, and the GRANTs in the error suffice."""
    pg = World("postgres" if flavour == "sync" else "async", pg_dsn, runner)
    pg.pages()
    pg.sink()
    role = f"r{secrets.token_hex(6)}"
    pg.sql(f"CREATE ROLE {role} LOGIN")
    try:
        mine = pg.where.replace("postgres@", f"{role}@")
        for mode in ("update", "upsert"):
            sink = pg.bare_sink(mine, mode=mode)
            with pytest.raises(SchemaError, match="no right to") as caught:
                sink.begin(SUM)
            assert ("INSERT (" in caught.value.ddl) == (mode == "upsert")
            mend(pg, caught.value)
            pg.clock, pg.ledger = sink.begin(SUM)
            chunk = pg.chunk({b"/a": 1, b"\xff": 1}, mode)
            assert sink.apply(chunk).status is Status.APPLIED
            sink.retry("hits", SUM)
            sink.prune("hits", frozenset([mode]))
            sink.read("hits", SUM, b"/a", [], [])
            sink.create_ledger()
        nowhere = pg.bare_sink(mine, ledger="other_ledger")
        with pytest.raises(SchemaError, match="permission denied"):
            nowhere.create_ledger()
    finally:
        pg.sql(f"DROP OWNED BY {role}")
        pg.sql(f"DROP ROLE {role}")
        pg.close()


def test_a_slow_table_that_changes_under_a_sink(pg: World) -> None:
    """A statement that is canceled, another type than before, a row refused: all others once."""
    pg.pages()
    sink = pg.sink()
    sink.apply(pg.chunk({b"/0": 1}))
    pg.sql("ALTER TABLE pages ALTER hits TYPE integer")
    too_many = "IF current_setting('x.n')::int > 2 THEN RAISE USING ERRCODE = '57014'; END IF"
    for name, what in (
        ("first", "PERFORM set_config('x.n', '0', true)"),
        (
            "each",
            "PERFORM set_config('x.n', (current_setting('x.n')::int + 1)::text, true);" + too_many,
        ),
    ):
        pg.sql(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN {what}; RETURN NEW; END$$"
        )
    pg.sql("CREATE TRIGGER a BEFORE INSERT ON pages FOR STATEMENT EXECUTE FUNCTION first()")
    pg.sql("CREATE TRIGGER b BEFORE INSERT ON pages FOR EACH ROW EXECUTE FUNCTION each()")
    rows = {b"/a": 1, b"/b": 1, b"/c": 1, b"/d": 1, b"/e": 2**40, b"/f": 1}
    assert sink.apply(pg.chunk(rows, "b2")) == Applied(Status.APPLIED, 5, 1)
    assert pg.rows() == dict.fromkeys(["/0", "/a", "/b", "/c", "/d", "/f"], 1)


def test_a_table_that_changes_under_a_sink(world: World) -> None:
    """A sink notices a changed table: another type is used, a missing column is named."""
    world.sql("CREATE TABLE pages (path int PRIMARY KEY, hits int)")
    sink = world.sink()
    sink.apply(world.chunk({b"1": 1}))
    world.sql("DROP TABLE pages")
    world.sql("CREATE TABLE pages (path text PRIMARY KEY, hits bigint)")
    reader = world.bare_sink()
    if world.is_postgres:
        assert sink.apply(world.chunk({b"/a": 2**40}, "b2")).rows == 1
        assert reader.read("hits", SUM, b"/a", [], []).row == {"amount": 2**40}
        world.sql("ALTER TABLE pages ALTER path TYPE bytea USING path::bytea")
        assert reader.read("hits", SUM, b"\xff", [], []).row == {"amount": None}
        world.sql("ALTER TABLE pages ALTER path TYPE text USING convert_from(path, 'UTF8')")
        assert reader.read("hits", SUM, b"/a", [], []).row == {"amount": 2**40}
    world.sql("ALTER TABLE pages RENAME hits TO views")
    with pytest.raises(SchemaError, match="no column hits") as caught:
        sink.apply(world.chunk({b"1": 1}, "b3"))
    mend(world, caught.value)
    assert sink.apply(world.chunk({b"1": 1}, "b3")).rows == 1
    world.sql("ALTER TABLE redishacks_ledger RENAME TO gone")
    asks: list[Callable[[], Any]] = [
        lambda: sink.applied("b1"),
        lambda: sink.prune("hits", frozenset(["b1"])),
        lambda: sink.read("hits", SUM, b"1", [], []),
        lambda: sink.apply(world.chunk({b"1": 1}, "b4")),
    ]
    for ask in asks:
        with pytest.raises(SchemaError, match="redishacks_ledger") as caught:
            ask()
        assert "CREATE TABLE IF NOT EXISTS" in caught.value.ddl


# Connections


def test_a_connection_in_a_transaction_is_refused(world: World) -> None:
    """Inside an open transaction nothing would be durable: the sink says so, changing nothing."""
    world.pages()
    connection: Any
    if world.kind == "async":
        connection = world.run(psycopg.AsyncConnection.connect(world.where))
    else:
        connection = (psycopg if world.is_postgres else sqlite3).connect(world.where)
    sink = world.sink(connection)
    world.run(connection.execute("INSERT INTO pages VALUES ('/x', 1)"))
    with pytest.raises(UsageError, match="inside a transaction"):
        sink.apply(world.chunk({b"/a": 1}))
    world.run(connection.rollback())
    assert world.rows() == {}
    assert sink.apply(world.chunk({b"/a": 1})).status is Status.APPLIED
    assert world.rows() == {"/a": 1}
    world.run(connection.close())
    with pytest.raises(UnavailableError, match="closed"):
        sink.apply(world.chunk({b"/a": 1}, "b2"))


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_connection_keeps_its_settings(pg: World, autocommit: bool) -> None:
    """A connection's autocommit, row factory, isolation and read-only settings stay its own."""
    pg.pages()
    kind: Any = psycopg.AsyncConnection if pg.kind == "async" else psycopg.Connection
    connection = pg.run(kind.connect(pg.where, autocommit=autocommit, row_factory=dict_row))
    pg.run(connection.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE))
    sink = pg.sink(connection)
    chunk = pg.chunk({b"/a": 1, b"\xff": 1})
    assert sink.apply(chunk) == Applied(Status.APPLIED, 1, 1)
    assert sink.read("hits", SUM, b"/a", [], []).row == {"amount": 1}
    assert connection.autocommit is autocommit
    cursor = pg.run(connection.execute("SHOW lock_timeout"))
    assert pg.run(cursor.fetchone()) == {"lock_timeout": "0"}
    if not autocommit:
        cursor = pg.run(connection.execute("SHOW transaction_isolation"))
        assert pg.run(cursor.fetchone()) == {"transaction_isolation": "serializable"}
        pg.run(connection.rollback())
    cursor = pg.run(connection.execute("SELECT count(*) AS n FROM pg_prepared_statements"))
    assert pg.run(cursor.fetchone()) == {"n": 0}
    pg.run(connection.close())


def test_a_pool(pg: World) -> None:
    """A pool's connections are given back after every call, broken ones too."""
    pg.pages()

    async def opened() -> Any:
        pool = psycopg_pool.AsyncConnectionPool(pg.where, min_size=1, max_size=1, open=False)
        await pool.open(wait=True)
        return pool

    if pg.kind == "async":
        pool = pg.run(opened())
    else:
        pool = psycopg_pool.ConnectionPool(pg.where, min_size=1, max_size=1, open=True)
    sink = pg.sink(pool)
    assert sink.apply(pg.chunk({b"/a": 1})).status is Status.APPLIED
    with pytest.raises(SchemaError):
        pg.bare_sink(pool, table="nowhere").begin(SUM)
    cut_sessions(pg._connection)

    def again() -> bool:
        try:
            return bool(sink.apply(pg.chunk({b"/a": 1}, "b2")))
        except UnavailableError:
            return False

    eventually(again)
    assert pg.rows() == {"/a": 2}
    pg.run(pool.close())
    with pytest.raises(UnavailableError):
        sink.applied("b2")


def test_a_dsn_connects_again(pg: World) -> None:
    """A session that the server ended costs one UnavailableError, then a new one is opened."""
    pg.pages()
    sink = pg.sink()
    for batch in ("b1", "b2"):
        cut_sessions(pg._connection)
        with pytest.raises(UnavailableError):
            sink.apply(pg.chunk({b"/a": 1}, batch))
        assert sink.apply(pg.chunk({b"/a": 1}, batch)).status is Status.APPLIED
    assert pg.rows() == {"/a": 2}


def test_a_lost_answer_to_commit(pg: World) -> None:
    """COMMIT done but its answer lost: the replay finds the ledger row, the amount counts once."""
    pg.pages()
    with FaultProxy(pg.where) as proxy:
        sink = pg.sink(proxy.dsn)
        proxy.drop_reply(of="COMMIT")
        with pytest.raises(UnavailableError):
            sink.apply(pg.chunk({b"/a": 1}))
        eventually(lambda: pg.rows() == {"/a": 1})
        assert sink.apply(pg.chunk({b"/a": 1})) == Applied(Status.DUPLICATE)
        proxy.drop_request(of="COMMIT")
        with pytest.raises(UnavailableError):
            sink.apply(pg.chunk({b"/a": 1}, "b2"))
        assert eventually(lambda: sink.apply(pg.chunk({b"/a": 1}, "b2")).status) is Status.APPLIED
        assert pg.rows() == {"/a": 2}
        sink.close()


def test_a_stopped_flusher_gives_its_locks_back(
    plain: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stands still in mid-transaction is cut off, overtaken, and changes nothing later."""
    assert "idle_in_transaction_session_timeout" in _psycopg.SETTINGS
    monkeypatch.setitem(_psycopg.SETTINGS, "idle_in_transaction_session_timeout", "'200ms'")
    plain.pages()
    zombie = plain.sink()
    steps = zombie._steps.apply(plain.chunk({b"/a": 1}))
    effect = next(steps)
    while "SAVEPOINT redishacks" not in effect.args:  # the ledger row is written
        effect = steps.send(perform(effect, None, 1.0))
    other = plain.sink()
    eventually(lambda: other.apply(plain.chunk({b"/a": 1})).status is Status.APPLIED)
    with pytest.raises(UnavailableError):
        carry_on(steps, effect)
    assert zombie.apply(plain.chunk({b"/a": 1})) == Applied(Status.DUPLICATE)
    assert plain.rows() == {"/a": 1}


def carry_on(steps: Any, effect: Any) -> None:
    """Drive steps that have begun to their end."""
    with contextlib.suppress(StopIteration):
        while True:
            try:
                result = perform(effect, None, 1.0)
            except Exception as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(result)


@pytest.mark.parametrize("at", range(16))
def test_an_interruption_at_every_step(plain: World, at: int) -> None:
    """A KeyboardInterrupt in place of any step leaves nothing half done, and the sink usable."""
    plain.pages()
    sink = plain.sink()
    chunk = plain.chunk({b"/a": 1, b"\xff": 1})
    steps = sink._steps.apply(chunk)
    effect = next(steps)
    with contextlib.suppress(StopIteration):
        for _ in range(at):
            effect = steps.send(perform(effect, None, 1.0))
        with pytest.raises(KeyboardInterrupt):
            carry_on(steps, steps.throw(KeyboardInterrupt()))
        assert plain.rows() == {}
    assert sink.apply(chunk).status in (Status.APPLIED, Status.DUPLICATE)
    assert plain.rows() == {"/a": 1}
    assert sink.dead_count("hits") == 1


def test_a_cancelled_task(tasks: World, runner: asyncio.Runner) -> None:
    """A task cancelled while it waits for a lock rolls back, and the sink goes on."""
    tasks.pages()
    sink = tasks.sink()
    sink.apply(tasks.chunk({b"/a": 1}))
    tasks.sql("BEGIN")
    tasks.sql("UPDATE pages SET hits = 5")

    async def cancel() -> None:
        task = asyncio.ensure_future(sink.target.apply(tasks.chunk({b"/a": 1}, "b2")))
        await asyncio.to_thread(eventually, lambda: waiting(tasks))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    runner.run(cancel())
    tasks.sql("ROLLBACK")
    assert sink.apply(tasks.chunk({b"/a": 1}, "b2")).status is Status.APPLIED
    assert tasks.rows() == {"/a": 2}


def waiting(world: World) -> bool:
    """Whether some session waits for a lock."""
    return bool(world.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))


def test_two_event_loops_in_turn(tasks: World, runner: asyncio.Runner) -> None:
    """A sink of a DSN works in one event loop after another."""
    tasks.pages()
    sink = tasks.sink().target
    for batch in ("b1", "b2"):
        with asyncio.Runner() as other:
            other.run(sink.apply(tasks.chunk({b"/a": 1}, batch)))
            other.run(sink.aclose())
    assert runner.run(sink.applied("b1")) == {0}
    assert tasks.rows() == {"/a": 2}


def test_a_fork_gets_its_own_connection(world: World) -> None:
    """Parent and child both go on with a sink that was used before the fork."""
    if world.kind == "async":
        pytest.skip("an event loop does not survive a fork")
    world.pages()
    sink = world.sink()
    sink.apply(world.chunk({b"/a": 1}))
    connection = sink._steps.database._conn

    def in_child() -> None:
        sink.apply(world.chunk({b"/a": 10}, "child"))
        assert sink._steps.database._conn is not connection

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert sink.apply(world.chunk({b"/a": 100}, "parent")).status is Status.APPLIED
    assert world.rows() == {"/a": 111}
    assert sink._steps.database._conn is connection


def test_threads_share_a_sink(world: World) -> None:
    """Calls of several threads wait for each other, and never meet in one transaction."""
    if world.kind == "async":
        pytest.skip("an async sink belongs to one thread")
    world.pages()
    sink = world.sink()

    def work(n: int) -> None:
        for i in range(20):
            assert sink.apply(world.chunk({b"/a": 1}, f"b{n}", i)).status is Status.APPLIED
            sink.read("hits", SUM, b"/a", [], [])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert world.rows() == {"/a": 80}


def test_tasks_share_a_sink(tasks: World, runner: asyncio.Runner) -> None:
    """Tasks that use one sink at the same time wait for each other."""
    tasks.pages()
    sink = tasks.sink().target

    async def all_at_once() -> None:
        chunks = [tasks.chunk({b"/a": 1}, f"b{i}") for i in range(10)]
        await asyncio.gather(*(sink.apply(chunk) for chunk in chunks))

    runner.run(all_at_once())
    assert tasks.rows() == {"/a": 10}


def test_commits_are_durable(pg: World) -> None:
    """synchronous_commit is raised to `on`, a stronger setting is left alone."""
    pg.pages()
    pg.sql("CREATE TABLE seen (setting text)")
    pg.sql(
        "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
        "INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END$$"
    )
    pg.sql("CREATE TRIGGER look AFTER INSERT ON pages FOR EACH ROW EXECUTE FUNCTION look()")
    kind: Any = psycopg.AsyncConnection if pg.kind == "async" else psycopg.Connection
    connection = pg.run(kind.connect(pg.where, autocommit=True))
    sink = pg.sink(connection)
    for setting in ("off", "local", "remote_write", "on", "remote_apply"):
        pg.run(connection.execute(f"SET synchronous_commit = {setting}"))
        sink.apply(pg.chunk({setting.encode(): 1}, setting))
    pg.run(connection.close())
    assert [row[0] for row in pg.sql("SELECT * FROM seen")] == ["on"] * 4 + ["remote_apply"]


def test_commits_are_durable_in_sqlite(lite: World) -> None:
    """synchronous is FULL during a transaction, on a connection of the user's too."""
    lite.pages()
    connection = sqlite3.connect(lite.where)
    connection.execute("PRAGMA synchronous = OFF")
    connection.text_factory = bytes
    connection.row_factory = sqlite3.Row
    said: list[str] = []
    sink = lite.sink(connection)
    connection.set_trace_callback(said.append)
    sink.apply(lite.chunk({b"/a": 1}))
    assert said.index("PRAGMA synchronous = FULL") < said.index("BEGIN IMMEDIATE")
    connection.set_trace_callback(None)
    assert tuple(connection.execute("PRAGMA synchronous").fetchone()) == (0,)
    assert sink.dead("hits") == []
    assert connection.text_factory is bytes
    connection.close()


# Together


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["upsert", "update"])
@pytest.mark.parametrize("key", ["bigint", "text"])
def test_no_deadlocks(plain: World, mode: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushers of two counters, chunk sizes 100 and 15,000, same rows: no deadlock, no id lost."""
    plain.sql(f"CREATE TABLE pages (path {key} PRIMARY KEY, hits bigint NOT NULL DEFAULT 0)")
    ids = [b"%d" % i for i in range(20_000)]
    if mode == "update":
        plain.sql(
            "INSERT INTO pages SELECT i, 0 FROM generate_series(0, 19999) i ORDER BY random()"
        )
        plain.sql("CREATE INDEX ON pages (hits)")  # an index that a bad plan might walk instead
    plain.sink(mode=mode)
    # Sooner than the sink's own lock_timeout, which would hide a deadlock.
    impatient = plain.where + "%20-cdeadlock_timeout%3D50ms"
    states: list[str | None] = []

    def verdict(error: psycopg.Error) -> Exception:
        states.append(error.sqlstate)
        return _verdict(error)

    monkeypatch.setattr(_psycopg, "verdict", verdict)

    def flush(n: int) -> int:
        rng = random.Random(n)
        size = 100 if n % 2 else 15_000
        sent = 0
        with PostgresSink(impatient, **PAGES, mode=mode) as sink:
            for i in range(40 if n % 2 else 3):
                rows = dict.fromkeys(rng.sample(ids, size), 1)
                chunk = plain.chunk(rows, f"b{n}", i)._replace(counter=f"c{n % 4 // 2}")
                patience = time.monotonic() + 60
                while (applied := sink.apply(chunk)).status is Status.BUSY:
                    assert time.monotonic() < patience
                assert applied == Applied(Status.APPLIED, size)
                sent += size
        return sent

    with ThreadPoolExecutor(8) as pool:
        sent = sum(pool.map(flush, range(8)))
    assert "40P01" not in states
    assert plain.sql("SELECT sum(hits) FROM pages") == [(sent,)]


def test_rows_that_come_and_go_lose_nothing(plain: World) -> None:
    """While rows are inserted, every amount is either in its row or a dead letter."""
    plain.pages()
    sink = plain.sink(mode="update")
    stop = threading.Event()

    def insert() -> None:
        with psycopg.connect(plain.where, autocommit=True) as connection:
            for i in random.sample(range(2000), 2000):
                if stop.is_set():
                    return
                connection.execute("INSERT INTO pages VALUES (%s, 0)", [f"/{i}"])

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        for batch in range(20):
            rows = {b"/%d" % i: 1 for i in range(2000)}
            assert sink.apply(plain.chunk(rows, f"b{batch}")).status is Status.APPLIED
    finally:
        stop.set()
        thread.join()
    applied = plain.sql("SELECT COALESCE(sum(hits), 0) FROM pages")[0][0]
    buried = plain.sql("SELECT COALESCE(sum(amount), 0) FROM redishacks_dead")[0][0]
    assert applied + buried == 20 * 2000


# The call itself


@pytest.mark.parametrize("kind", [PostgresSink, AsyncPostgresSink, SQLiteSink])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": ""}, "table"),
        ({"table": ("a", "b", "c")}, "table"),
        ({"table": "x\0"}, "table"),
        ({"table": "x" * 64}, "63 bytes"),
        ({"table": "\ud800"}, "UTF-8"),
        ({"key": ()}, "key"),
        ({"key": ["path"]}, "key"),
        ({"key": ("path", "path")}, "once"),
        ({"columns": {}}, "columns"),
        ({"columns": "hits"}, "columns"),
        ({"columns": {"amount": "path"}}, "once"),
        ({"columns": {"": "hits"}}, "column"),
        ({"columns": {"amount": 7}}, "columns"),
        ({"mode": "merge"}, "mode"),
        ({"unknown": "ignore"}, "unknown"),
        ({"unknown": "drop"}, 'mode="update"'),
        ({"ledger": "pages"}, "different"),
        ({"ledger": "redishacks_dead"}, "different"),
    ],
)
def test_arguments_are_checked(kind: Any, options: dict[str, Any], message: str) -> None:
    """An argument that can never work is refused by the constructor, with what is accepted."""
    with pytest.raises(UsageError, match=message):
        kind("postgresql://u:secret@h/d", **(PAGES | options))


def test_targets_are_checked(schema_dsn: str) -> None:
    """A connection of the wrong colour, a pool of the wrong colour and other things are refused."""
    for kind, colour in ((PostgresSink, "sync"), (AsyncPostgresSink, "async")):
        for target in (None, 7, b"postgresql://", sqlite3.connect):
            with pytest.raises(UsageError, match=colour):
                kind(target, **PAGES)
    with psycopg.connect(schema_dsn) as connection, pytest.raises(UsageError):
        AsyncPostgresSink(connection, **PAGES)
    pool = psycopg_pool.ConnectionPool(schema_dsn, open=False)
    with pytest.raises(UsageError):
        AsyncPostgresSink(pool, **PAGES)
    with pytest.raises(UsageError, match="path"):
        SQLiteSink(7, **PAGES)  # type: ignore[arg-type]


def test_unknown_columns_of_a_counter(world: World) -> None:
    """A counter's column that the sink has no SQL column for is refused by name."""
    world.pages()
    sink = world.sink()
    rules = {"views": Rule.SUM}
    with pytest.raises(UsageError, match="'views'"):
        sink.begin(rules)
    with pytest.raises(UsageError, match="'views'"):
        sink.apply(world.chunk({b"/a": 1}, rules=rules))
    with pytest.raises(UsageError, match="'views'"):
        sink.read("hits", rules, b"/a", [], [])


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://u:{SECRET}@127.0.0.1:1/d",
        f"postgresql://u:{SECRET}@no.such.host.invalid/d",
        f"host=127.0.0.1 port=1 user=u password={SECRET}",
        f"postgresql://u:{SECRET}@127.0.0.1:{SECRET}/d",
        f"postgresql://u:{SECRET}@127.0.0.1/d?no_such_option=1",
        f"postgresql://u:x%{SECRET}@127.0.0.1/d",
        f"host=127.0.0.1 {SECRET}",
    ],
)
@pytest.mark.parametrize("kind", [PostgresSink, AsyncPostgresSink])
def test_secrets_are_never_shown(kind: Any, dsn: str, runner: asyncio.Runner) -> None:
    """No error, its causes included, no repr and no destination holds what a DSN holds."""
    shown: list[str] = []

    def connect() -> None:
        sink = kind(dsn, **PAGES)
        shown.extend([repr(sink), sink.destination()])
        result = sink.begin(SUM)
        if inspect.iscoroutine(result):
            runner.run(result)

    with pytest.raises((UsageError, UnavailableError)) as caught:
        connect()
    assert "\n" not in str(caught.value)
    cause: BaseException | None = caught.value
    while cause is not None:
        shown.append(f"{cause} {cause!r}")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    assert not any(SECRET in text for text in shown)


def test_destinations() -> None:
    """A destination names table, key and columns in a fixed order, and nothing else."""
    columns = {"b": "y", "a": "x z"}
    sink = PostgresSink("host=h password=p", table=("s", "t"), key=("k", "l"), columns=columns)
    assert sink.destination() == 'postgresql s.t(k, l) a="x z", b=y'
    assert repr(sink) == '<PostgresSink postgresql s.t(k, l) a="x z", b=y>'
    assert SQLiteSink("x.db", **PAGES).destination() == "sqlite pages(path) amount=hits"


def test_sinks_from_urls(tmp_path: Path) -> None:
    """A URL's scheme decides; what it does not understand it does not repeat."""
    options: Any = PAGES
    assert isinstance(from_url("postgresql://u@h/d", **options), PostgresSink)
    assert isinstance(from_url("postgres://u@h/d", **options), PostgresSink)
    path = tmp_path / "a b.db"
    sqlite3.connect(path).close()
    with from_url(f"sqlite:///{str(path).replace(' ', '%20')}", **options) as sink:
        sink.create_ledger()
    assert path.stat().st_size
    for bad in (
        "mysql://u:s3cr3t@h",
        "s3cr3t",
        "sqlite://s3cr3t",
        "sqlite:///",
        "sqlite:///a?s3cr3t",
    ):
        with pytest.raises(UsageError, match="neither") as caught:
            from_url(bad, **options)
        assert SECRET not in str(caught.value)


def test_twins_have_the_same_methods() -> None:
    """Sync and async sinks have the same methods, parameters and defaults."""

    def surface(kind: type) -> dict[str, list[tuple[str, Any]]]:
        return {
            name.replace("aclose", "close"): [
                (p.name, p.default) for p in inspect.signature(value).parameters.values()
            ]
            for name, value in inspect.getmembers(kind, callable)
            if not (name.startswith("_") and name != "__init__")
        }

    assert surface(PostgresSink) == surface(AsyncPostgresSink) == surface(SQLiteSink)


def test_drivers_are_imported_when_needed() -> None:
    """Importing the sinks needs no driver; making one without its driver names the extra."""
    code = """
import sys
import redishacks.sinks as sinks
assert "psycopg" not in sys.modules and "sqlite3" not in sys.modules
sys.modules["psycopg"] = None
options = dict(table="t", key="k", columns={"amount": "n"})
sinks.SQLiteSink("x.db", **options)
try:
    sinks.PostgresSink("postgresql://h/d", **options)
except sinks.UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "redishacks[postgres]" in done.stdout


def test_a_mistyped_path_makes_no_file(tmp_path: Path) -> None:
    """Only create_ledger() makes a SQLite file; anything else says that there is none."""
    path = tmp_path / "typo.db"
    with SQLiteSink(path, **PAGES) as sink:
        with pytest.raises(SchemaError, match="no SQLite file") as caught:
            sink.begin(SUM)
        assert not path.exists()
        sink.create_ledger()
        assert path.exists()
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.executescript(caught.value.ddl)
    with SQLiteSink(tmp_path / "other.db", **PAGES) as sink:
        sink.begin(SUM)


def test_what_is_no_sqlite_database(tmp_path: Path) -> None:
    """Junk, a directory and a path into nowhere are errors to mend, not to wait out."""
    junk = tmp_path / "junk.db"
    junk.write_text("no database at all " * 100)
    for path, message in (
        (junk, f"{junk} is not a SQLite database"),
        (tmp_path, f"{tmp_path} is a directory"),
        (tmp_path / "no" / "a.db", f"there is no directory {tmp_path / 'no'}"),
    ):
        with SQLiteSink(path, **PAGES) as sink, pytest.raises(SchemaError, match=message):
            sink.create_ledger()
    with (
        SQLiteSink(junk, **PAGES) as sink,
        pytest.raises(SchemaError, match="is not a SQLite database"),
    ):
        sink.begin(SUM)
    with contextlib.closing(sqlite3.connect(junk)) as db:
        sink = SQLiteSink(db, **PAGES)
        with pytest.raises(SchemaError, match="the file is not a SQLite database"):
            sink.begin(SUM)


def test_a_sink_that_is_dropped_closes_without_a_warning(pg_dsn: str, tmp_path: Path) -> None:
    """Nobody has to close a sink: its connection goes with it, sync and async."""
    for sink in (
        PostgresSink(pg_dsn, table="t", key="k", columns={"amount": "n"}),
        SQLiteSink(tmp_path / "a.db", table="t", key="k", columns={"amount": "n"}),
    ):
        sink.create_ledger()
        del sink

    async def main() -> None:
        sink = AsyncPostgresSink(pg_dsn, table="t", key="k", columns={"amount": "n"})
        await sink.create_ledger()

    asyncio.run(main())
    gc.collect()


def chunk_of(id: bytes, amount: int, begun: Begun, batch: str = "b1") -> Chunk:
    """Return a chunk of one hit."""
    digest = hashlib.blake2b(repr((id, amount)).encode(), digest_size=16).digest()
    return Chunk("hits", batch, 0, ("amount",), (Rule.SUM,), [id], ([amount],), digest, *begun)


def test_a_trigger_that_ignores_a_row_leaves_nothing_behind(tmp_path: Path) -> None:
    """What a trigger wrote before RAISE(IGNORE) goes with the row, at a retry too."""
    path = tmp_path / "ignore.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE pages (path TEXT PRIMARY KEY, hits INTEGER)")
        db.execute("CREATE TABLE log (n INTEGER)")
        db.execute(
            "CREATE TRIGGER t BEFORE INSERT ON pages BEGIN "
            "INSERT INTO log VALUES (1); SELECT RAISE(IGNORE); END"
        )
        db.commit()
        sink = SQLiteSink(path, table="pages", key="path", columns={"amount": "hits"})
        sink.create_ledger()
        assert sink.apply(chunk_of(b"/a", 5, sink.begin(SUM))).dead == 1
        assert sink.retry("hits", SUM) == Retried(0, 1)
        assert db.execute("SELECT count(*) FROM log").fetchone() == (0,)
        sink.close()


def test_an_exception_of_a_signal_handler_breaks_no_sink(
    pg_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any point, again and again, a sink of our own goes on working."""
    # It may also land where Python can only report it, in a finalizer or a callback of the
    # collector; and then in pytest's own report of that.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    path = tmp_path / "interrupted.db"
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE pages (path TEXT PRIMARY KEY, hits INTEGER)")
    with psycopg.connect(pg_dsn) as db:
        db.execute("CREATE TABLE pages (path text PRIMARY KEY, hits bigint)")

    def interrupt(*_: object) -> None:
        raise InterruptedError("by a handler")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for kind, target in ((PostgresSink, pg_dsn), (SQLiteSink, str(path))):
            sink: Any = kind(target, table="pages", key="path", columns={"amount": "hits"})
            sink.create_ledger()
            pause = random.Random(1)
            for n in range(60):
                with contextlib.suppress(InterruptedError, UnavailableError, ServerError):
                    signal.setitimer(signal.ITIMER_REAL, pause.uniform(0.0001, 0.004))
                    begun = sink.begin(SUM)
                    sink.apply(chunk_of(b"/a", 1, begun, batch=f"b{n}"))
                    time.sleep(0.01)
                with contextlib.suppress(InterruptedError):  # an error may have come before it
                    signal.setitimer(signal.ITIMER_REAL, 0)
            begun = sink.begin(SUM)
            assert sink.apply(chunk_of(b"/b", 7, begun, batch="last")).status == Status.APPLIED
            sink.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.collect()  # connections that were interrupted while they were opened


@pytest.mark.parametrize("when", ["got", "given"])
def test_an_exception_at_the_lock_leaves_it_free(pg_dsn: str, when: str) -> None:
    """Be it when a transaction has just got it, or is about to give it back."""

    class Interrupting:
        """A lock at which a handler raises, once."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self.left = 1
            self.locked = self._lock.locked

        def acquire(self) -> None:
            self._lock.acquire()
            self._interrupt("got")

        def release(self) -> None:
            self._interrupt("given")
            self._lock.release()

        def _interrupt(self, here: str) -> None:
            if here == when and self.left:
                self.left -= 1
                raise InterruptedError("by a handler")

    with psycopg.connect(pg_dsn) as db:
        db.execute("CREATE TABLE pages (path text PRIMARY KEY, hits bigint)")
    with PostgresSink(pg_dsn, table="pages", key="path", columns={"amount": "hits"}) as sink:
        sink.create_ledger()
        database: Any = sink._steps.database
        database._lock = Interrupting()
        with pytest.raises(InterruptedError):
            sink.begin(SUM)
        begun = sink.begin(SUM)
        assert sink.apply(chunk_of(b"/b", 7, begun, batch="last")).status == Status.APPLIED


def test_a_table_with_heirs_is_refused(pg_dsn: str) -> None:
    """With INHERITS one id can be two rows, and the count of rows would hide an unknown one."""
    with psycopg.connect(pg_dsn) as db:
        db.execute("CREATE TABLE pages (path text PRIMARY KEY, hits bigint)")
        db.execute("CREATE TABLE old_pages () INHERITS (pages)")
    with PostgresSink(pg_dsn, table="pages", key="path", columns={"amount": "hits"}) as sink:
        sink.create_ledger()
        with pytest.raises(UsageError, match="inherit"):
            sink.begin(SUM)
