"""A SQLite database: one connection, one transaction at a time, errors by who can mend them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from redishacks._command import Steps, call
from redishacks.errors import SchemaError, ServerError, UnavailableError, UsageError
from redishacks.sinks._verdicts import (
    BusyError,
    LackingError,
    RefusedError,
    Result,
    UnforeseenError,
)

if TYPE_CHECKING:
    pass

T = TypeVar("T")

_BUSY_TIMEOUT = 1.0


class SQLiteDatabase:
    """A file or a connection; one transaction at a time.

    The file is opened at first use, and anew after a fork.
    """

    def __init__(self, target: object) -> None:
        self._sqlite3 = _sqlite3()
        self._path: str | None = None
        self._conn: Any = None
        self._pid = 0
        #: Connections of a parent process, which SQLite forbids to use, and even to close.
        self._inherited: list[Any] = []
        self._lock = threading.Lock()
        self._lock_of = os.getpid()
        #: Make the file if it is not there; else a mistyped path would leave an empty one behind.
        self.makes_file = False
        #: What a file that is not there would need.
        self.ddl_of_file = ""
        if isinstance(target, str | Path):
            self._path = str(target)
        elif isinstance(target, self._sqlite3.Connection):
            self._conn = target
        else:
            raise UsageError(
                f"SQLite is given as a path or a sqlite3.Connection, not as {type(target).__name__}"
            )

    def transaction(self, body: Steps[T], *, write: bool = True) -> Steps[T]:
        """See `Database.transaction`."""
        if self._lock_of != os.getpid():
            # Another thread of the parent may have held it at the fork.
            self._lock, self._lock_of = threading.Lock(), os.getpid()
        with self._lock:
            yield from call(self._open)
            synchronous, text = self._settle()
            try:
                yield from self.run("BEGIN IMMEDIATE" if write else "BEGIN")
                value = yield from body
                if not self.in_transaction:
                    raise rolled_back()
                yield from self.run("COMMIT")
                return value
            except BaseException:
                if self.in_transaction:
                    self._conn.execute("ROLLBACK")
                raise
            finally:
                self._unsettle(synchronous, text)

    def run(self, sql: str, params: Sequence[Any] | None = None) -> Steps[Result]:
        """See `Database.run`."""
        result: Result = yield from call(self.execute, sql, params or ())
        return result

    def execute(self, sql: str, params: Sequence[Any] = ()) -> Result:
        """Run one statement."""
        with self._translated():
            cursor = self._conn.cursor()
            cursor.row_factory = None  # the connection's is the user's
            cursor.execute(sql, _bound(sql, [params])[0])
            return Result(cursor.fetchall(), cursor.rowcount)

    def execute_many(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run one statement per row; return how many rows were written."""
        with self._translated():
            count: int = self._conn.executemany(sql, _bound(sql, rows)).rowcount
            return count

    @property
    def in_transaction(self) -> bool:
        """Whether the transaction lives: triggers may roll it back."""
        alive: bool = self._conn.in_transaction
        return alive

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._sqlite3.Error as error:
            raise verdict(self._sqlite3, error, self._path) from error

    def close(self) -> Steps[None]:
        """Close the file that was opened here."""
        if self._path is not None and self._conn is not None and self._pid == os.getpid():
            conn, self._conn = self._conn, None
            yield from call(conn.close)

    def _open(self) -> None:
        if self._path is not None and self._pid != os.getpid():
            if self._conn is not None:
                self._inherited.append(self._conn)
                self._conn = None
            self._pid = os.getpid()
        with self._translated():
            if self._conn is None:
                if self._is_missing() and not self.makes_file:
                    raise SchemaError(f"there is no SQLite file {self._path}", ddl=self.ddl_of_file)
                self._conn = self._sqlite3.connect(
                    self._path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
                )
                self._conn.execute("PRAGMA foreign_keys = ON")
            if self._conn.in_transaction and self._path is not None:
                # One of our own that an exception left in the middle.
                self._conn.execute("ROLLBACK")
            if self._conn.in_transaction:
                raise UsageError(
                    "the SQLite connection is inside a transaction (one made with autocommit=False "
                    "always is): what the sink writes there could still be rolled back after it "
                    "was acknowledged"
                )

    def _is_missing(self) -> bool:
        path = self._path
        return path not in (None, "", ":memory:") and not os.path.exists(str(path))

    def __del__(self) -> None:
        # A sink that nobody holds any more takes its connection along, without a warning.
        if self._path is not None and self._conn is not None and self._pid == os.getpid():
            self._conn.close()

    def _settle(self) -> tuple[int, Any]:
        """Make commits durable and texts str for one transaction; return what was set before."""
        synchronous = self.execute("PRAGMA synchronous").rows[0][0]
        if synchronous < 2:
            self.execute("PRAGMA synchronous = FULL")
        text, self._conn.text_factory = self._conn.text_factory, str
        return synchronous, text

    def _unsettle(self, synchronous: int, text: Any) -> None:
        self._conn.text_factory = text
        if synchronous < 2:
            self.execute(f"PRAGMA synchronous = {int(synchronous)}")


def _bound(sql: str, rows: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return rows as the module binds them: numbered parameters (?1) count as named ones."""
    if "= ?1" not in sql:
        return rows
    return [{str(number): value for number, value in enumerate(row, 1)} for row in rows]


def verdict(sqlite3: ModuleType, error: Exception, path: str | None) -> Exception:
    """Translate an error into what has to be done about it, by SQLite's result code."""
    reason = str(error)
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # Raised by the module itself.
        if "closed database" in reason:
            return UnavailableError("the SQLite connection that the sink was given is closed")
        if isinstance(error, sqlite3.DataError):
            return RefusedError(reason)
        return UsageError(reason) if "thread" in reason else ServerError(f"ERR {reason}")
    primary = code & 0xFF
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BusyError(reason)
    if primary in (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG):
        return RefusedError(reason)
    if primary in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_AUTH):
        lacking = ("no such", "has no column", "does not match any", "not authorized")
        if any(phrase in reason for phrase in lacking):
            return LackingError(reason)
        return RefusedError(reason) if "overflow" in reason else UnforeseenError(reason)
    # No waiting makes a database of these.
    if primary == sqlite3.SQLITE_NOTADB:
        return LackingError(f"{path or 'the file'} is not a SQLite database")
    if primary == sqlite3.SQLITE_CANTOPEN and path is not None:
        if os.path.isdir(path):
            return LackingError(f"{path} is a directory, not a SQLite database")
        if not os.path.isdir(directory := os.path.dirname(path) or "."):
            return LackingError(f"there is no directory {directory} for a SQLite file")
    # The file cannot be opened, read or written, the disk is full, …
    return UnavailableError(f"SQLite: {reason}")


def rolled_back() -> ServerError:
    return ServerError(
        "ERR a trigger or constraint says ROLLBACK, which undoes the whole transaction: let it "
        "say ABORT, which refuses the row"
    )


def _sqlite3() -> ModuleType:
    """Import the driver when a sink is made; some builds of Python lack it."""
    try:
        import sqlite3
    except ImportError as error:
        raise UsageError(f"this Python was built without sqlite3: {error}") from None
    return sqlite3
