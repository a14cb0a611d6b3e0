"""`PostgresSink` and `AsyncPostgresSink`: counts into a PostgreSQL table, each exactly once.

    sink = PostgresSink("postgresql://…", table="pages", key="path", columns={"amount": "hits"})

One transaction per chunk, READ COMMITTED, `synchronous_commit` at least `on`: the ledger row, then
all rows in one statement and in key order, then COMMIT; five round trips. Only when a statement is
refused it is cut into parts under savepoints until the rows are found that cannot be applied.

Trade-offs: an upsert inserts a row even when only an update would follow, so the table's other
columns need defaults and NOT NULL columns are checked early; wide tables take `mode="update"`.
Sums need an integer or numeric column, which do not round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from redishacks._command import Steps
from redishacks._sink import Chunk, ChunkId, Reading, Rule
from redishacks.errors import UnavailableError, UsageError
from redishacks.sinks._conversation import (
    Conversation,
    Database,
    Dialect,
    Lacks,
    Letter,
    Written,
    merged,
)
from redishacks.sinks._facade import AsyncFacade, SyncFacade
from redishacks.sinks._postgres_sql import (
    Column,
    Shape,
    Statements,
    as_rows,
    cast_to,
    key_text,
    number_array,
    params,
    quoted,
    text_array,
)
from redishacks.sinks._target import BadIdError, Rows, Table, Target, identifier, make_target
from redishacks.sinks._verdicts import (
    SUSPICIOUS,
    LackingError,
    RefusedError,
    SlowError,
    UnforeseenError,
)

#: So many rows refused by suspicious errors, and none written: then some others are tried.
_SUSPECTS = 64

#: Two sessions that make the tables at once would fail on PostgreSQL's own catalogue.
_DDL_LOCK = 0x7265646973686163

_DIALECT = Dialect(
    placeholder="%s",
    words={
        "now": "clock_timestamp()",
        "now_micros": "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint",
        "at_micros": "(extract(epoch FROM at) * 1000000)::bigint",
        "week_ago": "clock_timestamp() - interval '7 days'",
        "skip_locked": "FOR UPDATE SKIP LOCKED",
        "held": "FOR KEY SHARE",
        "among_texts": "= ANY(%s::text[])",
        "among_numbers": "= ANY(%s::bigint[])",
    },
    array=lambda values: (
        text_array(values) if values and isinstance(values[0], str) else number_array(values)
    ),
)

_BURY = """
INSERT INTO {dead} (counter, batch, chunk, id, "column", amount, reason)
SELECT ?, ?, ?, decode(id, 'hex'), col, amount, reason
FROM unnest(?::text[], ?::text[], ?::bigint[], ?::text[]) AS u(id, col, amount, reason)
"""

_READ = """
SELECT pg_is_in_recovery(), {row},
    (SELECT json_agg(json_build_array("column", amount))::text FROM {dead}
     WHERE counter = ? AND id = ?),
    (SELECT json_agg(DISTINCT jsonb_build_array(batch, chunk))::text FROM {ledger}
     WHERE (batch, chunk) IN (SELECT * FROM unnest(?::text[], ?::integer[]))),
    (SELECT json_agg(DISTINCT batch)::text FROM {ledger} WHERE batch = ANY(?::text[])),
    (SELECT encode(digest, 'hex') FROM {ledger} WHERE batch = '' AND chunk = -1)
"""

# The catalogue

_LOOK = """
WITH it AS (SELECT to_regclass(?)::oid AS t, to_regclass(?)::oid AS l, to_regclass(?)::oid AS d)
SELECT pg_is_in_recovery(), {now_micros}, current_setting('server_version_num')::integer,
    current_user::text, t, l, d,
    ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
          WHERE NOT has_table_privilege(l, p)),
    ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
          WHERE NOT has_table_privilege(d, p)),
    EXISTS (SELECT FROM pg_index i WHERE i.indrelid = t AND i.indisunique AND i.indisvalid
            AND i.indpred IS NULL AND i.indexprs IS NULL AND (i.indimmediate OR NOT ?)
            AND ARRAY(SELECT attname::text COLLATE "C" FROM pg_attribute
                      WHERE attrelid = t AND attnum = ANY((i.indkey::int2[])[0:i.indnkeyatts - 1])
                      ORDER BY 1) = ?::text[]),
    EXISTS (SELECT FROM pg_trigger WHERE tgrelid = t AND NOT tgisinternal AND tgtype & 7 = 7)
FROM it
"""

_HEIRS = """
SELECT EXISTS (
    SELECT FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhparent
    WHERE i.inhparent = ? AND c.relkind = 'r'
)
"""

_COLUMNS = """
SELECT a.attname::text, format_type(a.atttypid, -1), format_type(a.atttypid, a.atttypmod),
    format_type(CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, -1),
    COALESCE(c.collisdeterministic, false),
    a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attgenerated = '',
    ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) p
          WHERE NOT has_column_privilege(a.attrelid, a.attnum, p))
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = ?::oid AND a.attnum > 0 AND NOT a.attisdropped
"""


class PostgresConversation(Conversation):
    """What is PostgreSQL's own in the conversation."""

    def __init__(self, target: Target, database: Database) -> None:
        super().__init__(target, database, _DIALECT)
        self._shape: Shape | None = None
        #: Whether the last chunk had ids that fold or are unknown: then the next one may well, and
        #: the exact statement comes first.
        self._exact = False

    def destination(self) -> str:
        """See `Sink.destination`."""
        return self.target.shown("postgresql")

    def table_name(self, table: tuple[str, ...]) -> str:
        """Quote a table's name for a statement with parameters."""
        return quoted(*table)

    # The ledger

    def ddl(self) -> str:
        """See `Sink.ddl`."""
        ledger, dead = self.target.ledger, self.target.dead
        return f"""\
CREATE TABLE IF NOT EXISTS {identifier(*ledger)} (
    counter text NOT NULL,
    batch text NOT NULL,
    chunk integer NOT NULL,
    copy bytea NOT NULL DEFAULT '',
    digest bytea NOT NULL,
    rows integer NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    gone_at timestamptz,
    PRIMARY KEY (batch, chunk, copy)
);
CREATE INDEX IF NOT EXISTS {_index_name(ledger)} ON {identifier(*ledger)} (counter, gone_at);
CREATE TABLE IF NOT EXISTS {identifier(*dead)} (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    counter text NOT NULL,
    batch text NOT NULL,
    chunk integer NOT NULL,
    id bytea NOT NULL,
    "column" text NOT NULL,
    amount bigint NOT NULL,
    reason text NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS {_index_name(dead)} ON {identifier(*dead)} (counter, number);
"""

    def create(self) -> Steps[None]:
        """Make both tables unless they exist."""
        yield from self.run("SELECT pg_advisory_xact_lock(?)", _DDL_LOCK)
        # IF NOT EXISTS asks for the right to create even where nothing is to be created.
        found = yield from self.run(
            "SELECT to_regclass(?) IS NULL OR to_regclass(?) IS NULL",
            identifier(*self.target.ledger),
            identifier(*self.target.dead),
        )
        if found.rows[0][0]:
            yield from self.database.run(self.ddl())

    def bury(self, chunk: Chunk, letters: Sequence[Letter]) -> Steps[None]:
        """Insert dead letters."""
        yield from self.run(
            _BURY,
            chunk.counter,
            chunk.batch,
            chunk.ordinal,
            text_array([letter.id.hex() for letter in letters]),
            text_array([letter.column for letter in letters]),
            number_array([letter.amount for letter in letters]),
            text_array([letter.reason for letter in letters]),
        )

    # The catalogue

    def look(self, rules: Mapping[str, Rule]) -> Steps[int]:
        """Read the catalogue and keep it; raise `SchemaError` for what is missing."""
        target = self.target
        upsert = target.mode == "upsert"
        found = yield from self.run(
            _LOOK,
            identifier(*target.table),
            identifier(*target.ledger),
            identifier(*target.dead),
            upsert,
            text_array(sorted(target.key, key=str.encode)),
        )
        standby, micros, version, user, table, ledger, dead, *rights, unique, filled = found.rows[0]
        if standby:
            raise UnavailableError("the PostgreSQL server is a hot standby, which cannot write")
        lacks = Lacks(identifier(user))
        for name, oid, missing in zip(
            (target.ledger, target.dead), (ledger, dead), rights, strict=True
        ):
            if oid is None:
                lacks.add(f"no table {'.'.join(name)}", self.ddl().rstrip())
            lacks.grants(", ".join(missing), name)
        columns: dict[str, Column] = {}
        if table is None:
            lacks.add(f"no table {'.'.join(target.table)}", self._table_ddl(rules))
        else:
            if (yield from self.run(_HEIRS, table)).rows[0][0]:
                raise UsageError(
                    f"other tables inherit from {'.'.join(target.table)}, and one id could be a "
                    "row in several of them: name a table without heirs, or a partitioned one"
                )
            rows = (yield from self.run(_COLUMNS, table)).rows
            columns = self._check_columns(rows, rules, filled, lacks)
            if not unique:
                keys = ", ".join(map(identifier, target.key))
                lacks.add(
                    f"no unique index on {', '.join(target.key)} of {'.'.join(target.table)}",
                    f"CREATE UNIQUE INDEX ON {identifier(*target.table)} ({keys});",
                )
        lacks.raise_any()
        self._shape = Shape(
            version,
            tuple(columns[name] for name in target.key),
            {name: columns[sql] for name, sql in target.columns.items()},
        )
        clock: int = micros
        return clock

    def _check_columns(
        self,
        rows: Sequence[tuple[Any, ...]],
        rules: Mapping[str, Rule],
        filled: bool,
        lacks: Lacks,
    ) -> dict[str, Column]:
        target = self.target
        upsert = target.mode == "upsert"
        alter = f"ALTER TABLE {identifier(*target.table)}"
        ours = {*target.key, *target.columns.values()}
        # Without its key this may be another table altogether, whose columns are no concern.
        inserts = upsert and not filled and {*target.key} <= {name for name, *_ in rows}
        columns: dict[str, Column] = {}
        shown: dict[str, str] = {}
        for name, type_, shown_type, base, bytewise, demanding, forbidden in rows:
            columns[name] = Column(name, type_, base, bytewise)
            shown[name] = shown_type
            if name in ours:
                needed = {"SELECT"} | ({"INSERT"} if upsert else set())
                if name not in target.key:
                    needed |= {"UPDATE"}
                rights = [f"{right} ({identifier(name)})" for right in forbidden if right in needed]
                lacks.grants(", ".join(rights), target.table)
            elif demanding and inserts:
                # A name may hold anything, also the end of a line, and so of the comment.
                quoted_name = " ".join(identifier(name).split())
                lacks.add(
                    f'column {name} is NOT NULL without a default: use mode="update", or give one',
                    f'-- give column {quoted_name} a default, or use mode="update"',
                )
        for name in target.key:
            if name not in columns:
                lacks.add(
                    f"no column {name} in {'.'.join(target.table)}",
                    f"{alter} ADD COLUMN {identifier(name)} text;",
                )
        for counted, name in target.columns.items():
            rule = rules.get(counted)
            if name not in columns:
                lacks.add(
                    f"no column {name} in {'.'.join(target.table)}",
                    f"{alter} ADD COLUMN {identifier(name)} {_column_type(rule)};",
                )
            # A negative scale rounds to tens.
            elif rule and (not columns[name].fits(rule) or ",-" in shown[name]):
                lacks.add(
                    f"column {name} is {shown[name]}, which cannot hold every {rule} exactly",
                    f"{alter} ALTER COLUMN {identifier(name)} TYPE bigint;",
                )
        return columns

    def _table_ddl(self, rules: Mapping[str, Rule]) -> str:
        lines = [f"    {identifier(name)} text NOT NULL," for name in self.target.key]
        lines += [
            f"    {identifier(name)} {_column_type(rules.get(counted))},"
            for counted, name in self.target.columns.items()
        ]
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
        """Write rows, sorting out those that the table will not take."""
        shape = yield from self._known(rules)
        statements = Statements(self.target, shape, rules)
        rows, refused = as_rows(self.target, shape, ids, values)
        pieces = [rows] if rows.at else []
        count = suspects = 0
        unknown: list[int] = []
        doubt: LackingError | UnforeseenError | None = None
        looked = sifted = False
        yield from self.run("SAVEPOINT redishacks")
        while pieces:
            piece = pieces.pop()
            try:
                written, missed = yield from self._attempt(statements, piece)
            except (RefusedError, SlowError, *SUSPICIOUS) as error:
                yield from self.run("ROLLBACK TO SAVEPOINT redishacks")
                if not looked:  # later, a part that is written could not be taken back
                    looked = True
                    yield from self.look(rules)
                    if self._shape != shape:  # the table has changed: these are not its types
                        return (yield from self.write(rules, ids, values))
                if not sifted and not isinstance(error, SlowError):
                    sifted = True
                    piece, bad = yield from self._sift(statements, shape, piece)
                    refused += bad
                    if bad:
                        pieces += [piece] if piece.at else []
                        continue
                if len(piece.at) > 1:
                    pieces += reversed(piece.split())
                    continue
                if isinstance(error, SlowError):
                    raise UnavailableError(f"a single row took too long: {error}") from error
                refused.append((piece.at[0], error.reason))
                if isinstance(error, RefusedError):
                    continue
                doubt = doubt or error
                suspects += 1
                if (
                    suspects == _SUSPECTS
                    and not (count or unknown)
                    and (yield from self._none_passes(statements, pieces))
                ):
                    refused += [(place, doubt.reason) for rest in pieces for place in rest.at]
                    break
            else:
                count += written
                unknown += missed
                if pieces:
                    # Left open, savepoints would nest deeper with every piece.
                    yield from self.database.run(
                        "RELEASE SAVEPOINT redishacks; SAVEPOINT redishacks"
                    )
        return Written(count, refused, unknown, doubt)

    def _none_passes(self, statements: Statements, pieces: Sequence[Rows]) -> Steps[bool]:
        """Try some rows spread over these pieces; return whether all were refused. Writes none."""
        places = [(piece, n) for piece in pieces for n in range(len(piece.at))]
        for piece, n in places[:: len(places) // _SUSPECTS + 1]:
            try:
                yield from self._attempt(statements, piece.take([n]))
                passed = True
            except (RefusedError, SlowError, *SUSPICIOUS):
                passed = False
            yield from self.run("ROLLBACK TO SAVEPOINT redishacks")
            if passed:
                return False
        return True

    def _attempt(self, statements: Statements, rows: Rows) -> Steps[tuple[int, list[int]]]:
        """Write these rows; return how many were written, and the places of unknown ids."""
        size = len(rows.at)
        values = params(rows)
        if not self._exact:
            try:
                found = yield from self.database.run(statements.plain(), values)
                if found.count == size:
                    return size, []
            except RefusedError as error:
                if error.state != "21000":
                    raise
            yield from self.run("ROLLBACK TO SAVEPOINT redishacks")
        found = yield from self.database.run(statements.exact(), values)
        if self.target.mode == "upsert":
            written, keys = found.rows[0]
            if written != keys:
                raise RefusedError("the row was not written: a trigger or a rule discards it")
            self._exact = written != size
            return written, []
        written, unknown = found.rows[0]
        self._exact = written != size
        return written, [rows.at[number - 1] for number in unknown]

    def _sift(
        self, statements: Statements, shape: Shape, rows: Rows
    ) -> Steps[tuple[Rows, list[tuple[int, str]]]]:
        """Part rows whose keys do not cast from the others, in one query however many they are.

        The others come back in key order, so that their parts, too, take their locks in order.
        """
        types = [key.type for key in shape.keys if not key.binary]
        if shape.version < 160_000 or not types:
            return rows, []
        arrays = [text_array(column) for column in rows.keys]
        try:
            found = yield from self.database.run(statements.sift(), [*arrays, *types])
        except (RefusedError, *SUSPICIOUS):
            # A type with an input function that cannot fail softly.
            yield from self.run("ROLLBACK TO SAVEPOINT redishacks")
            return rows, []
        good = [number - 1 for number, reason in found.rows if reason is None]
        bad = [(rows.at[n - 1], RefusedError(reason).reason) for n, reason in found.rows if reason]
        return rows.take(good), bad

    # Reading

    def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Steps[Reading]:
        """See `Sink.read`; one statement, hence one snapshot."""
        self.target.check(list(columns))

        def body(row: bool = True) -> Steps[Reading]:
            return self._read(counter, columns, id, chunks, batches, row)

        try:
            return (yield from self.settled(columns, body, write=False))
        except BadIdError:
            shape = self._shape
        # It can have no row, unless the table has changed since we looked.
        yield from self.settled(columns, lambda: self.look(columns), write=False)
        changed = self._shape != shape
        return (yield from self.settled(columns, lambda: body(changed), write=False))

    def _read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
        row: bool,
    ) -> Steps[Reading]:
        shape = yield from self._known(columns)
        sql, keys = self._row(shape, columns, id) if row else ("NULL", [])
        others = [
            counter,
            id,
            text_array([chunk.batch for chunk in chunks]),
            number_array([chunk.ordinal for chunk in chunks]),
            text_array(batches),
        ]
        # The row's part is finished SQL: it must not be filled again.
        before, after = self.sql(_READ.replace("{row}", "\0")).split("\0")
        try:
            found = yield from self.database.run(before + sql + after, [*keys, *others])
        except RefusedError as error:
            if row and error.state[:2] in ("22", "23"):
                raise BadIdError(error.reason) from error
            raise
        standby, *parts, ledger = found.rows[0]
        if standby:
            raise UnavailableError("the PostgreSQL server is a hot standby, whose rows are old")
        values, letters, applied, begun = (json.loads(part) if part else [] for part in parts)
        return Reading(
            # NaN and infinity come as strings.
            {n: v if isinstance(v, int) else None for n, v in zip(columns, values, strict=False)}
            if values
            else dict.fromkeys(columns),
            merged(columns, letters),
            frozenset(ChunkId(batch, chunk) for batch, chunk in applied),
            frozenset(begun),
            ledger or "",
        )

    def _row(self, shape: Shape, columns: Mapping[str, Rule], id: bytes) -> tuple[str, list[str]]:
        parts = self.target.parts(id)
        keys = [key_text(key, part) for key, part in zip(shape.keys, parts, strict=True)]
        values = ", ".join(
            shape.values[name].to_amount(f"t.{quoted(shape.values[name].name)}") for name in columns
        )
        where = " AND ".join(f"t.{quoted(key.name)} = {cast_to(key, '%s')}" for key in shape.keys)
        table = quoted(*self.target.table)
        return f"(SELECT json_build_array({values})::text FROM {table} AS t WHERE {where})", keys


def _column_type(rule: Rule | None) -> str:
    return "bigint NOT NULL DEFAULT 0" if rule is Rule.SUM else "bigint"


def _index_name(table: tuple[str, ...]) -> str:
    return identifier(f"{table[-1][:20]}_counter_idx")


def _psycopg() -> ModuleType:
    """Import the driver's part when a sink is made: redishacks works without psycopg."""
    try:
        from redishacks.sinks import _psycopg
    except ImportError as error:
        raise UsageError(
            f"PostgreSQL needs psycopg: pip install 'redishacks[postgres]' ({error})"
        ) from None
    return _psycopg


def _conversation(
    target: object,
    is_async: bool,
    table: Table,
    key: str | tuple[str, ...],
    columns: Mapping[str, str],
    mode: str,
    unknown: str,
    ledger: Table,
    dead: Table,
) -> PostgresConversation:
    checked = make_target(table, key, columns, mode, unknown, ledger, dead)
    driver = _psycopg()
    settings = driver.NESTED_LOOP if mode == "update" else {}
    colour = driver.ASYNC if is_async else driver.SYNC
    return PostgresConversation(checked, driver.PsycopgDatabase(target, colour, settings))


class PostgresSink(SyncFacade):
    """A `Sink` that writes to a PostgreSQL table.

    `target` is a DSN, a psycopg connection that is outside any transaction when the sink is
    called, or a `psycopg_pool.ConnectionPool`. `table` is `"name"` or `("schema", "name")`, `key`
    the column of the ids, or a tuple of columns (ids are then JSON arrays with one scalar per
    column); it needs a unique index. `columns` maps the counter's columns to SQL columns: integer
    or numeric, for max and min also timestamps and dates.

    `mode="update"` writes existing rows only; `unknown="drop"` then forgets ids without a row
    instead of keeping them as dead letters. `ledger` and `dead` name the two tables of
    `create_ledger()`.

    Raises `UsageError` for arguments that cannot work; connects at first use. One call at a time:
    calls from several threads wait for each other. A connection made from a DSN is closed by
    `close()`, or at the end of a `with`. `begin()` takes six round trips, `apply()` five, `read()`
    three.
    """

    def __init__(
        self,
        target: object,
        *,
        table: Table,
        key: str | tuple[str, ...],
        columns: Mapping[str, str],
        mode: str = "upsert",
        unknown: str = "dead",
        ledger: Table = "redishacks_ledger",
        dead: Table = "redishacks_dead",
    ) -> None:
        self._steps = _conversation(target, False, table, key, columns, mode, unknown, ledger, dead)


class AsyncPostgresSink(AsyncFacade):
    """`PostgresSink` for asyncio: a DSN, an `AsyncConnection` or an `AsyncConnectionPool`."""

    def __init__(
        self,
        target: object,
        *,
        table: Table,
        key: str | tuple[str, ...],
        columns: Mapping[str, str],
        mode: str = "upsert",
        unknown: str = "dead",
        ledger: Table = "redishacks_ledger",
        dead: Table = "redishacks_dead",
    ) -> None:
        self._steps = _conversation(target, True, table, key, columns, mode, unknown, ledger, dead)
