"""The conversation that every SQL sink has with its database, as steps for both colours.

    ledger   one row per chunk that was applied, written first in the chunk's own transaction
    dead     one row per amount that the table would not take

Under one chunk id the ledger has the row of the content that came first (`copy` empty) and one for
every other content met later (`copy` is its digest), which went to the dead letters whole. `rows`
is how many ids a chunk had.

One more row, of no counter and no batch, is the ledger's identity: its digest is a random number,
drawn when it is first asked for. A table of the same name elsewhere has another one, and so has a
ledger that was emptied; one that was dumped and restored is the same.

What differs between databases (how rows are written, what the catalogue looks like, types and
clocks) is in the subclasses.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from redishacks import _units
from redishacks._command import Steps
from redishacks._sink import (
    Applied,
    Begun,
    Chunk,
    ChunkId,
    DeadLetter,
    Reading,
    Retried,
    Rule,
    Status,
)
from redishacks.errors import SchemaError, UnavailableError
from redishacks.sinks._target import Target, identifier
from redishacks.sinks._verdicts import (
    BusyError,
    LackingError,
    RefusedError,
    Result,
    SlowError,
    UnforeseenError,
    raised,
)

T = TypeVar("T")

UNKNOWN_ID = "unknown id"
CONFLICT = "conflict"

#: Dead letters that are applied again in one transaction.
_PAGE = 1000

_DAY = 86_400_000_000

# {…} are filled by the dialect; ? is a parameter. The clock is read inside the statement: a
# flusher that was stopped for a day must not be believed when it was stopped just before. The
# ledger's identity is held until COMMIT: who empties the ledger comes before the chunk or after it.
_ENTER = f"""
INSERT INTO {{ledger}} (counter, batch, chunk, copy, digest, rows, applied_at)
SELECT ?, ?, ?, ?, ?, ?, {{now}}
FROM (SELECT 1 FROM {{ledger}} WHERE batch = '' AND chunk = -1 AND digest = ? {{held}}) AS identity
WHERE {{now_micros}} < ? + {_DAY} ON CONFLICT DO NOTHING
"""
_DIGEST = "SELECT digest FROM {ledger} WHERE batch = ? AND chunk = ? AND copy = ?"
_IDENTITY = "SELECT digest FROM {ledger} WHERE batch = '' AND chunk = -1"
_IDENTIFY = """
INSERT INTO {ledger} (counter, batch, chunk, digest, rows, applied_at)
VALUES ('', '', -1, ?, 0, {now}) ON CONFLICT DO NOTHING
"""
_APPLIED = "SELECT DISTINCT chunk FROM {ledger} WHERE batch = ? AND chunk >= 0"
_UNSETTLED = """
SELECT DISTINCT batch FROM {ledger} WHERE counter = ? AND gone_at IS NULL AND chunk >= 0
"""
_MARK = """
UPDATE {ledger} SET gone_at = {now} WHERE counter = ? AND gone_at IS NULL AND batch {among_texts}
"""
_PRUNE = "DELETE FROM {ledger} WHERE counter = ? AND gone_at < {week_ago} AND chunk >= 0"
_LETTERS = """
SELECT number, counter, batch, chunk, id, "column", amount, reason, {at_micros} FROM {dead}
"""
_COUNT_DEAD = "SELECT count(*) FROM {dead} WHERE counter = ?"
_LAST_DEAD = "SELECT max(number) FROM {dead} WHERE counter = ?"
_PAGE_OF_DEAD = f"""
SELECT number, batch, chunk, id, "column", amount FROM {{dead}}
WHERE counter = ? AND number > ? AND number <= ? ORDER BY number LIMIT {_PAGE} {{skip_locked}}
"""
_UNBURY = "DELETE FROM {dead} WHERE number {among_numbers}"
_REASON = "UPDATE {dead} SET reason = ? WHERE number {among_numbers}"


class Database(Protocol):
    """How statements reach the database; errors come as those of `_verdicts`."""

    def transaction(self, body: Steps[T], *, write: bool = True) -> Steps[T]:
        """Run steps in one transaction; return after COMMIT was seen, roll back on any error."""

    def run(self, sql: str, params: Sequence[Any] | None = None) -> Steps[Result]:
        """Run a statement; without parameters several, with `;` between."""

    def close(self) -> Steps[None]:
        """Close what was opened here."""


class Dialect(NamedTuple):
    """How a database says what the statements above leave open."""

    placeholder: str
    #: What fills the braces; names of tables are added.
    words: Mapping[str, str]
    #: A list as the parameter of `{among_…}`.
    array: Callable[[Sequence[Any]], Any]


class Letter(NamedTuple):
    """A dead letter to be."""

    id: bytes
    column: str
    amount: int
    reason: str


class Written(NamedTuple):
    """What became of rows."""

    #: How many are in the table.
    rows: int
    #: (place, reason) of those that the table would not take.
    refused: list[tuple[int, str]]
    #: Places of those that have no row to update.
    unknown: list[int]
    #: The first error among the refused that is suspicious. When all were refused, it may well be
    #: the database that is in disorder, and not the rows that are bad.
    doubt: LackingError | UnforeseenError | None = None


class Unit(NamedTuple):
    """The dead letters of one hit row, applied again together."""

    id: bytes
    #: column -> (number of the letter, amount)
    letters: dict[str, tuple[int, int]]


class Conversation(ABC):
    """Every method of `Sink`, as steps."""

    def __init__(self, target: Target, database: Database, dialect: Dialect) -> None:
        self.target = target
        self.database = database
        self._dialect = dialect

    # What each database does in its own way

    @abstractmethod
    def destination(self) -> str:
        """See `Sink.destination`."""

    @abstractmethod
    def ddl(self) -> str:
        """See `Sink.ddl`."""

    @abstractmethod
    def table_name(self, table: tuple[str, ...]) -> str:
        """Quote a table's name for a statement with parameters."""

    @abstractmethod
    def create(self) -> Steps[None]:
        """Make both tables unless they exist."""

    @abstractmethod
    def look(self, rules: Mapping[str, Rule]) -> Steps[int]:
        """Read the catalogue and keep it; raise `SchemaError` for what is missing.

        Returns the database's clock in microseconds.
        """

    @abstractmethod
    def write(
        self,
        rules: Mapping[str, Rule],
        ids: Sequence[bytes],
        values: Sequence[Sequence[int | None]],
    ) -> Steps[Written]:
        """Write rows, sorting out those that the table will not take."""

    @abstractmethod
    def bury(self, chunk: Chunk, letters: Sequence[Letter]) -> Steps[None]:
        """Insert dead letters."""

    @abstractmethod
    def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Steps[Reading]:
        """See `Sink.read`."""

    # What all do alike

    def create_ledger(self) -> Steps[None]:
        """See `Sink.create_ledger`."""
        return self.settled({}, self._create)

    def _create(self) -> Steps[None]:
        try:
            yield from self.create()
        except LackingError as error:
            raise SchemaError(f"the ledger cannot be made: {error}", self.ddl()) from error

    def begin(self, columns: Mapping[str, Rule]) -> Steps[Begun]:
        """See `Sink.begin`."""
        self.target.check(list(columns))
        return (yield from self.settled({}, lambda: self._begin(columns)))

    def _begin(self, columns: Mapping[str, Rule]) -> Steps[Begun]:
        clock = _units.moment((yield from self.look(columns)))
        ledger = yield from self.identity()
        if not ledger:
            # Of two at once, one waits here for the other.
            yield from self.run(_IDENTIFY, secrets.token_bytes(16))
            ledger = yield from self.identity()
        if not ledger:
            raise BusyError("somebody empties the ledger")
        return Begun(clock, ledger)

    def identity(self) -> Steps[str]:
        """Return which ledger this is; "" when it has not been asked for before."""
        found = yield from self.run(_IDENTITY)
        return bytes(found.rows[0][0]).hex() if found.rows else ""

    def apply(self, chunk: Chunk) -> Steps[Applied]:
        """See `Sink.apply`."""
        self.target.check(chunk.columns)
        rules = dict(zip(chunk.columns, chunk.rules, strict=True))
        try:
            return (yield from self._settled(rules, lambda: self._apply(chunk, rules)))
        except BusyError:
            return Applied(Status.BUSY)

    def _apply(self, chunk: Chunk, rules: Mapping[str, Rule]) -> Steps[Applied]:
        status = yield from self._enter(chunk, b"")
        if status is Status.CONFLICT:
            # Other content than what was applied under this id: Redis went back in time. Whether
            # it counts twice or not at all is for people to decide.
            status = yield from self._enter(chunk, chunk.digest)
            if status is not Status.APPLIED:
                return Applied(status)
            refused = [(place, CONFLICT) for place in range(len(chunk.ids))]
            buried = yield from self._bury(chunk, refused)
            return Applied(Status.CONFLICT, 0, buried)
        if status is not Status.APPLIED:
            return Applied(status)
        written = yield from self.write(rules, chunk.ids, chunk.values)
        if written.doubt is not None and not (written.rows or written.unknown):
            # A trigger that is broken must not turn a whole table into dead letters.
            raise raised(written.doubt) from written.doubt
        refused = written.refused
        if self.target.unknown == "dead":
            refused = [*refused, *((place, UNKNOWN_ID) for place in written.unknown)]
        buried = yield from self._bury(chunk, refused)
        return Applied(Status.APPLIED, written.rows, buried)

    def _enter(self, chunk: Chunk, copy: bytes) -> Steps[Status]:
        """Write the ledger row; say what stands there when it is taken."""
        read_at = _units.microseconds(chunk.read_at)
        entered = yield from self.run(
            _ENTER, chunk.counter, chunk.batch, chunk.ordinal, copy, chunk.digest, len(chunk.ids),
            bytes.fromhex(chunk.ledger), read_at,
        )  # fmt: skip
        if entered.count:
            return Status.APPLIED
        found = yield from self.run(_DIGEST, chunk.batch, chunk.ordinal, copy)
        if not found.rows:
            return Status.STALE
        return Status.DUPLICATE if found.rows[0][0] == chunk.digest else Status.CONFLICT

    def _bury(self, chunk: Chunk, refused: Sequence[tuple[int, str]]) -> Steps[int]:
        """Bury whole rows: the amounts of one row are one hit."""
        letters = [
            Letter(chunk.ids[place], column, amount, reason)
            for place, reason in sorted(refused)
            for column, amounts in zip(chunk.columns, chunk.values, strict=True)
            if (amount := amounts[place]) is not None
        ]
        if letters:
            yield from self.bury(chunk, letters)
        return len(letters)

    def applied(self, batch: str) -> Steps[frozenset[int]]:
        """See `Sink.applied`."""
        found = yield from self.settled({}, lambda: self.run(_APPLIED, batch), write=False)
        return frozenset(chunk for (chunk,) in found.rows)

    def unsettled(self, counter: str) -> Steps[frozenset[str]]:
        """See `Sink.unsettled`."""
        found = yield from self.settled({}, lambda: self.run(_UNSETTLED, counter), write=False)
        return frozenset(batch for (batch,) in found.rows)

    def prune(self, counter: str, gone: frozenset[str]) -> Steps[int]:
        """See `Sink.prune`."""
        return (yield from self.settled({}, lambda: self._prune(counter, gone)))

    def _prune(self, counter: str, gone: frozenset[str]) -> Steps[int]:
        if gone:
            yield from self.run(_MARK, counter, self._dialect.array(sorted(gone)))
        return (yield from self.run(_PRUNE, counter)).count

    def dead(self, counter: str | None, limit: int) -> Steps[list[DeadLetter]]:
        """See `Sink.dead`."""
        where = "" if counter is None else "WHERE counter = ?"
        params = [limit] if counter is None else [counter, limit]
        sql = f"{_LETTERS} {where} ORDER BY number LIMIT ?"
        found = yield from self.settled({}, lambda: self.run(sql, *params), write=False)
        return [DeadLetter._make((*letter, _units.moment(at))) for *letter, at in found.rows]

    def dead_count(self, counter: str) -> Steps[int]:
        """See `Sink.dead_count`."""
        found = yield from self.settled({}, lambda: self.run(_COUNT_DEAD, counter), write=False)
        count: int = found.rows[0][0]
        return count

    def retry(self, counter: str, columns: Mapping[str, Rule]) -> Steps[Retried]:
        """See `Sink.retry`."""
        last = yield from self.settled({}, lambda: self.run(_LAST_DEAD, counter), write=False)
        end = last.rows[0][0] or 0
        place = applied = refused = 0
        while place < end:

            def page(after: int = place) -> Steps[tuple[int, Retried]]:
                return self._retry_page(counter, columns, after, end)

            place, done = yield from self.settled(columns, page)
            applied += done.applied
            refused += done.refused
        return Retried(applied, refused)

    def _retry_page(
        self, counter: str, columns: Mapping[str, Rule], after: int, end: int
    ) -> Steps[tuple[int, Retried]]:
        """Apply a page of letters; return where the next one begins.

        A letter is deleted in the transaction that applies it, so that a reader sees its amount
        once at every moment.
        """
        found = yield from self.run(_PAGE_OF_DEAD, counter, after, end)
        if not found.rows:
            return end, Retried(0, 0)
        units, place = _units_of(found.rows)
        names = [name for name in columns if name in self.target.columns]
        taken = [unit for unit in units if all(name in names for name in unit.letters)]
        reasons: dict[str, list[int]] = {}
        for unit in units:
            strange = [name for name in unit.letters if name not in names]
            if strange:
                reason = f"no SQL column for column {', '.join(strange)}"
                reasons.setdefault(reason, []).extend(n for n, _ in unit.letters.values())
        values = [[unit.letters.get(name, (0, None))[1] for unit in taken] for name in names]
        rules = {name: columns[name] for name in names}
        written = yield from self.write(rules, [unit.id for unit in taken], values)
        kept = set()
        # Unknown ids stay, whatever is done with new ones: these were kept on purpose.
        for at, reason in [*written.refused, *((at, UNKNOWN_ID) for at in written.unknown)]:
            kept.add(at)
            reasons.setdefault(reason, []).extend(n for n, _ in taken[at].letters.values())
        done = [
            number
            for at, unit in enumerate(taken)
            if at not in kept
            for number, _ in unit.letters.values()
        ]
        yield from self.run(_UNBURY, self._dialect.array(done))
        for reason, numbers in reasons.items():
            yield from self.run(_REASON, reason, self._dialect.array(numbers))
        return place, Retried(len(done), sum(map(len, reasons.values())))

    def close(self) -> Steps[None]:
        """See `Sink.close`."""
        return self.database.close()

    # Ground

    def run(self, template: str, *params: Any) -> Steps[Result]:
        """Run a statement of this module's kind."""
        return self.database.run(self.sql(template), params)

    def sql(self, template: str) -> str:
        """Fill a template's braces and write its parameters as the driver wants them."""
        names = {
            "ledger": self.table_name(self.target.ledger),
            "dead": self.table_name(self.target.dead),
        }
        template = template.replace("?", self._dialect.placeholder)
        return template.format_map({**self._dialect.words, **names})

    def settled(
        self, rules: Mapping[str, Rule], body: Callable[[], Steps[T]], *, write: bool = True
    ) -> Steps[T]:
        """Run steps in a transaction; nobody asks this one again while it is busy."""
        try:
            return (yield from self._settled(rules, body, write=write))
        except BusyError as error:
            raise UnavailableError(f"busy: {error}; try again later") from error

    def _settled(
        self, rules: Mapping[str, Rule], body: Callable[[], Steps[T]], *, write: bool = True
    ) -> Steps[T]:
        try:
            try:
                return (yield from self.database.transaction(body(), write=write))
            except LackingError:
                # The catalogue knows better what is missing. Where it finds nothing, what we kept
                # of it may have been out of date.
                pass
            yield from self.database.transaction(self.look(rules), write=False)
            return (yield from self.database.transaction(body(), write=write))
        except SlowError as error:
            raise UnavailableError(f"the database did not answer in time: {error}") from error
        except (LackingError, RefusedError, UnforeseenError) as error:
            raise raised(error) from error


def _units_of(rows: Sequence[tuple[Any, ...]]) -> tuple[list[Unit], int]:
    """Put letters of one row together again; return them and where the next page begins."""
    units: list[Unit] = []
    open_units: dict[tuple[str, int, bytes], Unit] = {}
    for number, batch, chunk, id, column, amount in rows:
        unit = open_units.get((batch, chunk, id))
        # The same chunk may have died twice, with different contents.
        if unit is None or column in unit.letters:
            unit = open_units[batch, chunk, id] = Unit(id, {})
            units.append(unit)
        unit.letters[column] = (number, amount)
    last = rows[-1][0]
    if len(rows) == _PAGE and len(units) > 1:
        # The end of the page may cut the last unit in two: leave it to the next page.
        cut = units.pop()
        last = min(number for number, _ in cut.letters.values()) - 1
    return units, last


def merged(columns: Mapping[str, Rule], letters: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Merge the amounts of dead letters per column."""
    amounts: dict[str, list[int]] = {}
    for column, amount in letters:
        amounts.setdefault(column, []).append(amount)
    merge: dict[Rule, Callable[[list[int]], int]] = {Rule.SUM: sum, Rule.MAX: max, Rule.MIN: min}
    return {name: merge[rule](amounts[name]) for name, rule in columns.items() if name in amounts}


class Lacks:
    """What a database lacks, and the DDL for it."""

    def __init__(self, user: str = "") -> None:
        self._user = user
        self._messages: list[str] = []
        self._ddl: list[str] = []

    def add(self, message: str, ddl: str) -> None:
        """Note one thing that is missing."""
        self._messages.append(message)
        self._ddl.append(ddl)

    def grants(self, rights: str, table: tuple[str, ...]) -> None:
        """Note missing privileges on a table."""
        if rights:
            self.add(
                f"no right to {rights} on {'.'.join(table)}",
                f"GRANT {rights} ON {identifier(*table)} TO {self._user};",
            )

    def raise_any(self) -> None:
        """Raise `SchemaError` when anything was noted."""
        if self._messages:
            raise SchemaError("; ".join(self._messages), "\n".join(dict.fromkeys(self._ddl)))
