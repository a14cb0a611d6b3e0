"""`SQLiteSink`: counts into a SQLite table, each exactly once.

    sink = SQLiteSink("app.db", table="pages", key="path", columns={"amount": "hits"})

One transaction per chunk (`BEGIN IMMEDIATE`, `synchronous=FULL`; the journal mode is the file's own
affair): the ledger row, then one upsert or update per row. SQLite has one writer at a time, so
nothing deadlocks; while another one writes, a chunk is busy after a second.

Trade-offs: SQLite checks few types by itself, so the sink does. An id must be an integer for an
INTEGER key; a sum that leaves 64 bits, which SQLite would round, goes to the dead letters; so does
what would be merged with a value of another kind. In a column declared DATETIME or TIMESTAMP,
microseconds become `YYYY-MM-DD HH:MM:SS.ffffff` in UTC, elsewhere they stay integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redishacks._command import Steps, call
from redishacks._sink import Chunk, ChunkId, Reading, Rule
from redishacks.sinks._conversation import (
    Conversation,
    Dialect,
    Lacks,
    Letter,
    Written,
    merged,
)
from redishacks.sinks._facade import SyncFacade
from redishacks.sinks._sqlite_columns import Column, Shape
from redishacks.sinks._sqlite_database import SQLiteDatabase, rolled_back
from redishacks.sinks._target import (
    BadIdError,
    Rows,
    Table,
    Target,
    identifier,
    make_target,
    texts_of,
)
from redishacks.sinks._verdicts import (
    SUSPICIOUS,
    LackingError,
    RefusedError,
    UnforeseenError,
)

if TYPE_CHECKING:
    import sqlite3

#: Microseconds since 1970; julianday() is good to a tenth of a millisecond.
_NOW = "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)"


_DIALECT = Dialect(
    placeholder="?",
    words={
        "now": _NOW,
        "now_micros": _NOW,
        "at_micros": "at",
        "week_ago": f"{_NOW} - {7 * 86_400_000_000}",
        "skip_locked": "",
        "held": "",
        "among_texts": "IN (SELECT value FROM json_each(?))",
        "among_numbers": "IN (SELECT value FROM json_each(?))",
    },
    array=json.dumps,
)

_BURY = f"""
INSERT INTO {{dead}} (counter, batch, chunk, id, "column", amount, reason, at)
VALUES (?, ?, ?, ?, ?, ?, ?, {_NOW})
"""
_LETTERS_OF = 'SELECT "column", amount FROM {dead} WHERE counter = ? AND id = ?'
_ENTERED = """
SELECT batch, chunk FROM {ledger} WHERE batch IN (SELECT value FROM json_each(?))
"""

_NOT_WRITTEN = (
    "the row's value is of another kind, or would pass 64 bits; or a trigger discards the row"
)


class SQLiteConversation(Conversation):
    """What is SQLite's own in the conversation."""

    database: SQLiteDatabase

    def __init__(self, target: Target, database: SQLiteDatabase) -> None:
        super().__init__(target, database, _DIALECT)
        database.ddl_of_file = self.ddl() + self._table_ddl()
        self._shape: Shape | None = None

    def destination(self) -> str:
        """See `Sink.destination`."""
        return self.target.shown("sqlite")

    def table_name(self, table: tuple[str, ...]) -> str:
        """Quote a table's name."""
        return identifier(*table)

    def ddl(self) -> str:
        """See `Sink.ddl`."""
        return ";\n".join(self._ddl()) + ";\n"

    def _ddl(self) -> list[str]:
        ledger, dead = self.target.ledger, self.target.dead
        return [
            f"""\
CREATE TABLE IF NOT EXISTS {identifier(*ledger)} (
    counter TEXT NOT NULL,
    batch TEXT NOT NULL,
    chunk INTEGER NOT NULL,
    copy BLOB NOT NULL DEFAULT x'',
    digest BLOB NOT NULL,
    rows INTEGER NOT NULL,
    applied_at INTEGER NOT NULL,
    gone_at INTEGER,
    PRIMARY KEY (batch, chunk, copy)
) WITHOUT ROWID""",
            f"""\
CREATE TABLE IF NOT EXISTS {identifier(*dead)} (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    counter TEXT NOT NULL,
    batch TEXT NOT NULL,
    chunk INTEGER NOT NULL,
    id BLOB NOT NULL,
    "column" TEXT NOT NULL,
    amount INTEGER NOT NULL,
    reason TEXT NOT NULL,
    at INTEGER NOT NULL
)""",
        ]

    def create(self) -> Steps[None]:
        """Make both tables unless they exist."""
        for statement in self._ddl():
            yield from self.database.run(statement)

    def bury(self, chunk: Chunk, letters: Sequence[Letter]) -> Steps[None]:
        """Insert dead letters."""
        head = (chunk.counter, chunk.batch, chunk.ordinal)
        yield from call(
            self.database.execute_many, self.sql(_BURY), [(*head, *letter) for letter in letters]
        )

    # The catalogue

    def look(self, rules: Mapping[str, Rule]) -> Steps[int]:
        """Read the catalogue and keep it; raise `SchemaError` for what is missing."""
        target = self.target
        lacks = Lacks()
        for name in (target.ledger, target.dead):
            if not (yield from self._columns_of(name)):
                lacks.add(f"no table {'.'.join(name)}", self.ddl().rstrip())
        rows = yield from self._columns_of(target.table)
        columns = {name: Column(name, declared) for name, declared, *_ in rows}
        shown = ".".join(target.table)
        if not rows:
            lacks.add(f"no table {shown}", self._table_ddl())
        else:
            self._check_columns(columns, rows, rules, lacks)
            if not (yield from self._unique(rows)):
                keys = ", ".join(map(identifier, target.key))
                index = identifier(*target.table[:-1], f"{target.table[-1]}_{target.key[0]}")
                lacks.add(
                    f"no unique index on {', '.join(target.key)} of {shown}",
                    f"CREATE UNIQUE INDEX {index} ON {identifier(target.table[-1])} ({keys});",
                )
        lacks.raise_any()
        self._shape = Shape(
            tuple(columns[name] for name in target.key),
            {name: columns[sql] for name, sql in target.columns.items()},
        )
        clock: int = (yield from self.run("SELECT {now}")).rows[0][0]
        return clock

    def _columns_of(self, table: tuple[str, ...]) -> Steps[Sequence[tuple[Any, ...]]]:
        """Return (name, declared type, not null, default, place in the primary key, hidden)."""
        of = "?, ?" if len(table) == 2 else "?"
        sql = f'SELECT name, type, "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo({of})'
        return (yield from self.run(sql, *reversed(table))).rows

    def _unique(self, rows: Sequence[tuple[Any, ...]]) -> Steps[bool]:
        key = set(self.target.key)
        primary = {name: declared for name, declared, _, _, place, _ in rows if place}
        if set(primary) == key and [t.upper() for t in primary.values()] == ["INTEGER"]:
            return True  # an alias of the rowid, which has no index
        schema = self.target.table[:-1]
        of = "?, ?" if schema else "?"
        indexes = yield from self.run(
            f'SELECT name FROM pragma_index_list({of}) WHERE "unique" AND NOT partial',
            self.target.table[-1],
            *schema,
        )
        for (index,) in indexes.rows:
            sql = f"SELECT name FROM pragma_index_info({of})"
            found = yield from self.run(sql, index, *schema)
            if {name for (name,) in found.rows} == key and len(found.rows) == len(key):
                return True
        return False

    def _check_columns(
        self,
        columns: Mapping[str, Column],
        rows: Sequence[tuple[Any, ...]],
        rules: Mapping[str, Rule],
        lacks: Lacks,
    ) -> None:
        target = self.target
        shown = ".".join(target.table)
        alter = f"ALTER TABLE {identifier(*target.table)}"
        ours = {*target.key, *target.columns.values()}
        for name, _declared, not_null, default, place, hidden in rows:
            if name not in ours and target.mode == "upsert" and not hidden:
                if not_null and default is None and not place:
                    lacks.add(
                        f'column {name} is NOT NULL without a default: use mode="update"',
                        f"-- SQLite gives a default only to a new table: {identifier(name)}",
                    )
            elif name in ours and hidden:
                lacks.add(f"column {name} of {shown} is generated", "-- name another column")
        for name in target.key:
            if name not in columns:
                lacks.add(f"no column {name} in {shown}", f"{alter} ADD {identifier(name)} TEXT;")
            elif columns[name].affinity == "REAL" or columns[name].is_time:
                lacks.add(
                    f"key {name} is {columns[name].declared}, and a key is INTEGER, TEXT or BLOB",
                    "-- name another key",
                )
        for counted, name in target.columns.items():
            rule = rules.get(counted)
            if name not in columns:
                default = " NOT NULL DEFAULT 0" if rule is Rule.SUM else ""
                lacks.add(
                    f"no column {name} in {shown}",
                    f"{alter} ADD {identifier(name)} INTEGER{default};",
                )
            elif rule and not columns[name].fits(rule):
                lacks.add(
                    f"column {name} is {columns[name].declared}, which cannot hold every {rule} "
                    "exactly",
                    f"{alter} ADD {identifier(name + '_count')} INTEGER;",
                )

    def _table_ddl(self) -> str:
        lines = [f"    {identifier(name)} TEXT NOT NULL," for name in self.target.key]
        lines += [f"    {identifier(name)} INTEGER," for name in self.target.columns.values()]
        keys = ", ".join(map(identifier, self.target.key))
        body = "\n".join(lines)
        table = identifier(*self.target.table)
        return f"CREATE TABLE {table} (\n{body}\n    PRIMARY KEY ({keys})\n);"

    def _known(self, rules: Mapping[str, Rule]) -> Steps[Shape]:
        if self._shape is None:
            yield from self.look(rules)
        assert self._shape is not None
        return self._shape

    # Writing

    def write(
        self,
        rules: Mapping[str, Rule],
        ids: Sequence[bytes],
        values: Sequence[Sequence[int | None]],
    ) -> Steps[Written]:
        """Write rows, sorting out those that the table will not take.

        Each row is a statement of its own, so keys that are equal in SQL simply add up.
        """
        shape = yield from self._known(rules)
        rows, refused = self._as_rows(shape, rules, ids, values)
        sql = self._statement(shape, rules)
        flat = list(zip(*rows.keys, *rows.values, strict=True))
        if not flat:
            return Written(0, refused, [])
        yield from self.run("SAVEPOINT redishacks")
        try:
            count = yield from call(self.database.execute_many, sql, flat)
        except (RefusedError, *SUSPICIOUS):
            count = -1
        if count == len(flat):
            yield from self.run("RELEASE redishacks")
            return Written(count, refused, [])
        if not self.database.in_transaction:
            raise rolled_back()
        yield from self.run("ROLLBACK TO redishacks")
        yield from self.look(rules)
        if self._shape != shape:  # the table has changed: this is not its statement
            return (yield from self.write(rules, ids, values))
        tried = yield from call(self._one_by_one, shape, sql, flat)
        refused += [(rows.at[place], reason) for place, reason in tried.refused]
        unknown = [rows.at[place] for place in tried.unknown]
        return Written(tried.rows, refused, unknown, tried.doubt)

    def _one_by_one(self, shape: Shape, sql: str, rows: Sequence[tuple[Any, ...]]) -> Written:
        """Write rows one by one; there is no journey to each, so all are tried."""
        execute = self.database.execute
        refused: list[tuple[int, str]] = []
        unknown: list[int] = []
        doubt: LackingError | UnforeseenError | None = None
        for place, row in enumerate(rows):
            execute("SAVEPOINT one")
            try:
                if execute(sql, row).count != 1:
                    # A trigger may have written elsewhere before it let the row fall.
                    execute("ROLLBACK TO one")
                    if self._is_unknown(shape, row):
                        unknown.append(place)
                    else:
                        refused.append((place, _NOT_WRITTEN))
            except (RefusedError, *SUSPICIOUS) as error:
                if not self.database.in_transaction:
                    raise rolled_back() from error
                execute("ROLLBACK TO one")
                refused.append((place, error.reason))
                if not isinstance(error, RefusedError):
                    doubt = doubt or error
            execute("RELEASE one")
        return Written(len(rows) - len(refused) - len(unknown), refused, unknown, doubt)

    def _is_unknown(self, shape: Shape, row: tuple[Any, ...]) -> bool:
        """Whether a statement wrote no row as there is none; nobody else writes meanwhile."""
        if self.target.mode == "upsert":
            return False
        sql = f"SELECT 1 FROM {identifier(*self.target.table)} WHERE {self._where(shape)}"
        return not self.database.execute(sql, row[: len(shape.keys)]).rows

    def _as_rows(
        self,
        shape: Shape,
        rules: Mapping[str, Rule],
        ids: Sequence[bytes],
        values: Sequence[Sequence[int | None]],
    ) -> tuple[Rows, list[tuple[int, str]]]:
        """Return keys and amounts as the columns hold them, in key order, and the bad ones."""
        bad: dict[int, str] = {}
        keys = self._keys(shape, ids, bad)
        columns = [
            shape.values[name].amounts(rule, amounts, bad)
            for (name, rule), amounts in zip(rules.items(), values, strict=True)
        ]
        good = [place for place in range(len(ids)) if place not in bad] if bad else range(len(ids))
        order = sorted(good, key=keys.__getitem__)
        rows = Rows(
            order,
            tuple(zip(*(keys[place] for place in order), strict=True)),
            tuple([column[place] for place in order] for column in columns),
        )
        return rows, list(bad.items())

    def _keys(
        self, shape: Shape, ids: Sequence[bytes], bad: dict[int, str]
    ) -> list[tuple[Any, ...]]:
        if len(shape.keys) == 1 and shape.keys[0].affinity in ("TEXT", "NONE"):
            texts = texts_of(ids)
            if texts is not None:
                return [(text,) for text in texts]
        keys: list[tuple[Any, ...]] = []
        for place, id in enumerate(ids):
            try:
                parts = self.target.parts(id)
                keys.append(
                    tuple([key.key(part) for key, part in zip(shape.keys, parts, strict=True)])
                )
            except BadIdError as error:
                bad[place] = str(error)
                keys.append(())
        return keys

    def _statement(self, shape: Shape, rules: Mapping[str, Rule]) -> str:
        columns = [shape.values[name] for name in rules]
        table = identifier(*self.target.table)
        first = len(shape.keys) + 1
        if self.target.mode == "update":
            news = [f"?{first + i}" for i in range(len(columns))]
        else:
            news = [f"excluded.{identifier(column.name)}" for column in columns]
        merges = [
            column.change(rule, new)
            for column, rule, new in zip(columns, rules.values(), news, strict=True)
        ]
        changes = ", ".join(change for change, _ in merges)
        guard = " AND ".join(f"({condition})" for _, condition in merges)
        if self.target.mode == "update":
            return f"UPDATE {table} SET {changes} WHERE {self._where(shape)} AND {guard}"
        keys = ", ".join(identifier(key.name) for key in shape.keys)
        names = ", ".join(identifier(column.name) for column in columns)
        places = ", ".join("?" * (first - 1 + len(columns)))
        return (
            f"INSERT INTO {table} ({keys}, {names}) VALUES ({places}) "
            f"ON CONFLICT ({keys}) DO UPDATE SET {changes} WHERE {guard}"
        )

    def _where(self, shape: Shape) -> str:
        return " AND ".join(f"{identifier(key.name)} = ?{i}" for i, key in enumerate(shape.keys, 1))

    # Reading

    def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Steps[Reading]:
        """See `Sink.read`; one read transaction, hence one snapshot."""
        self.target.check(list(columns))
        body = lambda: self._read(counter, columns, id, chunks, batches)  # noqa: E731
        return (yield from self.settled(columns, body, write=False))

    def _read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Steps[Reading]:
        shape = yield from self._known(columns)
        row: dict[str, int | None] = dict.fromkeys(columns)
        try:
            parts = self.target.parts(id)
            keys = [key.key(part) for key, part in zip(shape.keys, parts, strict=True)]
        except BadIdError:
            pass  # it can have no row
        else:
            kept = [shape.values[name] for name in columns]
            # The + takes the declared type away, which the connection may convert by.
            values = ", ".join(f"+{identifier(column.name)}" for column in kept)
            table = identifier(*self.target.table)
            found = yield from self.database.run(
                f"SELECT {values} FROM {table} WHERE {self._where(shape)}", keys
            )
            for cells in found.rows:
                row = {
                    name: column.reading(cell)
                    for name, column, cell in zip(columns, kept, cells, strict=True)
                }
        letters = yield from self.run(_LETTERS_OF, counter, id)
        asked = json.dumps(sorted({*batches, *(chunk.batch for chunk in chunks)}))
        entered = {ChunkId(*found) for found in (yield from self.run(_ENTERED, asked)).rows}
        return Reading(
            row,
            merged(columns, letters.rows),
            frozenset(entered.intersection(chunks)),
            frozenset(chunk.batch for chunk in entered).intersection(batches),
            (yield from self.identity()),
        )


class SQLiteSink(SyncFacade):
    """A `Sink` that writes to a SQLite table.

    `target` is the path of a file, or a `sqlite3.Connection` that is outside any transaction when
    the sink is called. The other arguments are those of `PostgresSink`; `("schema", "name")` names
    a table of an attached database. Key columns are INTEGER, TEXT or BLOB, counted columns INTEGER,
    for max and min also DATETIME or TIMESTAMP.

    Raises `UsageError` for arguments that cannot work; opens the file at first use. One call at a
    time: calls from several threads wait for each other. `AsyncFlushJob` calls it in a thread.
    """

    def __init__(
        self,
        target: str | Path | sqlite3.Connection,
        *,
        table: Table,
        key: str | tuple[str, ...],
        columns: Mapping[str, str],
        mode: str = "upsert",
        unknown: str = "dead",
        ledger: Table = "redishacks_ledger",
        dead: Table = "redishacks_dead",
    ) -> None:
        checked = make_target(table, key, columns, mode, unknown, ledger, dead)
        self._database = SQLiteDatabase(target)
        self._steps = SQLiteConversation(checked, self._database)

    def create_ledger(self) -> None:
        """Make both tables, and the file, unless they exist; many processes may at once."""
        self._database.makes_file = True
        super().create_ledger()
