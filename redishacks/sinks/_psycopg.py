"""How statements reach PostgreSQL: psycopg's connections and pools, sync and async, as steps.

The two colours of psycopg have the same methods, plain and `async`; the steps call them, the driver
awaits what has to be awaited. Everything that is set is set for one transaction only, and nothing
is prepared, so that PgBouncer may stand between in transaction mode.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from redishacks._command import Steps, call
from redishacks.errors import ServerError, UnavailableError, UsageError
from redishacks.sinks._verdicts import (
    BusyError,
    LackingError,
    RefusedError,
    Result,
    SlowError,
    UnforeseenError,
)

T = TypeVar("T")

#: For connections of our own, unless the DSN says otherwise: a network that swallows packets must
#: not hold a flusher for hours.
_DEFAULTS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "fallback_application_name": "redishacks",
}

SETTINGS = {
    "client_encoding": "'UTF8'",
    "synchronous_commit": (
        # remote_apply is stronger, all others are weaker.
        "CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' "
        "ELSE 'on' END"
    ),
    # Long enough for a chunk of another flusher, then this one does other chunks first.
    "lock_timeout": "'1s'",
    "statement_timeout": "'30s'",
    # A flusher that is stopped in here gives its locks back.
    "idle_in_transaction_session_timeout": "'5s'",
    # Compiling takes longer than any of these statements.
    "jit": "'off'",
}

#: An update follows the order of its rows, and takes its locks in it, only as a nested loop over
#: the key's index.
NESTED_LOOP = {
    f"enable_{name}": "'off'" for name in ("hashjoin", "mergejoin", "seqscan", "bitmapscan")
}


class Colour(NamedTuple):
    """The classes of sync or of async psycopg."""

    connection: Any
    cursor: Any
    lock: Callable[[], Any]


SYNC = Colour(psycopg.Connection, psycopg.Cursor, threading.Lock)
ASYNC = Colour(psycopg.AsyncConnection, psycopg.AsyncCursor, asyncio.Lock)


class PsycopgDatabase:
    """A DSN, a connection or a pool; one transaction at a time.

    A connection from a DSN is opened at first use, and anew when it broke, after a fork, and in
    another event loop.
    """

    def __init__(self, target: Any, colour: Colour, settings: dict[str, str]) -> None:
        self._colour = colour
        self._dsn: dict[str, Any] | None = None
        self._pool: Any = None
        self._conn: Any = None
        #: The process and the event loop we were last called in.
        self._arrived: tuple[int, asyncio.AbstractEventLoop | None] | None = None
        #: Connections of a parent process, never closed here: closing would end the parent's.
        self._inherited: list[Any] = []
        self._restore_autocommit = False
        self._lock = colour.lock()
        #: The thread whose transaction it is, and those that have begun to ask for the lock.
        self._holder: int | None = None
        self._asking: dict[int, Any] = {}
        if isinstance(target, str):
            self._dsn = _parsed(target)
        elif isinstance(target, colour.connection):
            self._conn = target
        elif _is_pool(target, colour is ASYNC):
            self._pool = target
        else:
            kind = "an async" if colour is ASYNC else "a sync"
            raise UsageError(
                f"PostgreSQL is given as a DSN, or as {kind} psycopg connection or pool, "
                f"not as {type(target).__name__}"
            )
        values = ", ".join(
            f"set_config('{name}', {value}, true)" for name, value in (SETTINGS | settings).items()
        )
        self._begin = (
            f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT {values}; "
            # What a deferred constraint refuses must be refused before COMMIT, row by row.
            "SET CONSTRAINTS ALL IMMEDIATE"
        )

    def transaction(self, body: Steps[T], *, write: bool = True) -> Steps[T]:
        """See `Database.transaction`; two round trips more than the body's."""
        del write  # one kind of transaction serves both
        yield from self._arrive()
        lock, me = self._lock, threading.get_ident()
        self._unlock(lock, me)
        self._asking[me] = lock
        yield from call(lock.acquire)
        try:
            self._holder = me
            yield from self._open()
            try:
                yield from self.run(self._begin)
                value = yield from body
                ended = yield from self.run("COMMIT")
                if ended.tag != "COMMIT":
                    raise ServerError(f"ERR COMMIT was answered with {ended.tag}")
                return value
            except BaseException:
                yield from self._roll_back()
                raise
            finally:
                yield from self._give_back()
        finally:
            self._holder = None
            lock.release()
            self._asking.pop(me, None)

    def _unlock(self, lock: Any, me: int) -> None:
        """Release a lock that this thread has got, and an exception has not let it note that.

        A signal handler may raise one just then.
        """
        if self._colour is SYNC and self._asking.pop(me, None) is lock:
            for _ in range(10):  # another one may have got it, and be about to note that
                if self._holder is not None or not lock.locked():
                    return
                time.sleep(0.01)
            lock.release()

    def run(self, sql: str, params: Sequence[Any] | None = None) -> Steps[Result]:
        """See `Database.run`; one round trip."""
        # A cursor made here, not by the connection: its factories are the user's.
        cursor = self._colour.cursor(self._conn, row_factory=tuple_row)
        execute = functools.partial(cursor.execute, prepare=False)
        try:
            yield from call(execute, sql, params)
            rows = (yield from call(cursor.fetchall)) if cursor.description else []
        except psycopg.Error as error:
            raise verdict(error) from error
        return Result(rows, cursor.rowcount, cursor.statusmessage or "")

    def close(self) -> Steps[None]:
        """Close a connection of our own."""
        yield from self._arrive()
        if self._dsn is not None and self._conn is not None:
            conn, self._conn = self._conn, None
            yield from call(conn.close)

    def __del__(self) -> None:
        # A sink that nobody holds any more takes its connection along, without a warning. Not
        # close(): an async connection's would have to be awaited.
        if self._dsn is None or self._conn is None or self._arrived is None:
            return
        if self._arrived[0] == os.getpid():
            self._conn.pgconn.finish()

    def _arrive(self) -> Steps[None]:
        """Part from a connection of our own that belongs to a parent process or another loop."""
        loop = asyncio.get_running_loop() if self._colour is ASYNC else None
        here, before = (os.getpid(), loop), self._arrived
        if here == before:
            return
        self._arrived = here
        self._lock = self._colour.lock()
        if self._dsn is None or self._conn is None:
            return
        conn, self._conn = self._conn, None
        if before is not None and before[0] == here[0]:
            yield from call(conn.close)
        else:
            self._inherited.append(conn)

    def _open(self) -> Steps[None]:
        try:
            if self._pool is not None:
                self._conn = yield from call(self._pool.getconn)
            elif self._dsn is not None and (self._conn is None or not self._is_idle()):
                # One of our own that an exception left in the middle of something goes.
                if self._conn is not None:
                    self._conn.pgconn.finish()
                connect = functools.partial(self._colour.connection.connect, **self._dsn)
                self._conn = yield from call(connect)
        except psycopg.Error as error:
            # No `from error`: what libpq says may quote the connection string.
            raise UnavailableError(self._without_password(_line(error))) from None
        try:
            self._check_idle()
            self._restore_autocommit = not self._conn.autocommit
            if self._restore_autocommit:
                yield from call(self._conn.set_autocommit, True)
        except BaseException:
            yield from self._give_back()
            raise

    def _is_idle(self) -> bool:
        inside = self._conn.info.transaction_status != TransactionStatus.IDLE
        return not inside and bool(self._conn.pgconn.pipeline_status == PipelineStatus.OFF)

    def _check_idle(self) -> None:
        self._restore_autocommit = False
        if self._conn.closed:
            raise UnavailableError("the PostgreSQL connection that the sink was given is closed")
        if not self._is_idle():
            raise UsageError(
                "the PostgreSQL connection is inside a transaction or a pipeline: what the sink "
                "writes there could still be rolled back after it was acknowledged"
            )

    def _roll_back(self) -> Steps[None]:
        conn = self._conn
        try:
            if not conn.closed and conn.info.transaction_status is not TransactionStatus.IDLE:
                yield from self.run("ROLLBACK")
        except Exception:
            yield from call(conn.close)  # the error that led here is the one to tell
        if not conn.closed and conn.info.transaction_status is not TransactionStatus.IDLE:
            yield from call(conn.close)

    def _give_back(self) -> Steps[None]:
        conn = self._conn
        if self._restore_autocommit and not conn.closed:
            yield from call(conn.set_autocommit, False)
        if self._pool is not None:
            self._conn = None
            yield from call(self._pool.putconn, conn)
        elif self._dsn is not None and conn.closed:
            self._conn = None

    def _without_password(self, message: str) -> str:
        password = (self._dsn or {}).get("password")
        return message.replace(str(password), "***") if password else message


def _parsed(dsn: str) -> dict[str, Any]:
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # libpq quotes the part that it does not understand: it may be the password.
        raise UsageError(
            "the DSN is no PostgreSQL connection string: postgresql://user:password@host/database, "
            "or host=… dbname=… user=…"
        ) from None
    return {**_DEFAULTS, **given, "autocommit": True, "prepare_threshold": None}


def _is_pool(target: Any, is_async: bool) -> bool:
    getconn = getattr(target, "getconn", None)
    return (
        callable(getconn)
        and callable(getattr(target, "putconn", None))
        and inspect.iscoroutinefunction(getconn) is is_async
    )


# What an error means


#: Classes of SQLSTATE that blame the data: cardinality, data exception, integrity constraint,
#: triggered data change, functions called by triggers, WITH CHECK OPTION, program limits, PL/pgSQL.
_DATA = {"21", "22", "23", "27", "38", "39", "44", "54", "P0"}
#: Serialization failure, deadlock, lock not available.
_BUSY = {"40001", "40P01", "55P03"}
#: Connection, resources, shutdown, system; a read-only server; a transaction that was timed out.
_AWAY = {"08", "53", "57", "58"}
_AWAY_STATES = {"25006", "25P03", "25P04", "40003"}
#: Where PostgreSQL refuses a row by row-level security, with the code of a missing grant and a
#: message that is translated. With a context, it is a row that a trigger writes elsewhere.
_POLICY = "ExecWithCheckOptions"


def verdict(error: psycopg.Error) -> Exception:
    """Translate an error into what has to be done about it."""
    state = error.sqlstate or error.diag.sqlstate or ""
    reason = _line(error)
    if not state:
        if isinstance(error, psycopg.DataError):
            return RefusedError(reason)
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return UnavailableError(reason)
        return ServerError(f"ERR {reason}")  # of the driver: no row has anything to do with it
    kind = state[:2]
    if state == "57014":
        return SlowError(reason)
    if state in _BUSY:
        return BusyError(reason)
    if kind in _AWAY or state in _AWAY_STATES:
        return UnavailableError(reason)
    if error.diag.source_function == _POLICY and not error.diag.context:
        return RefusedError(reason, state)
    if kind in ("42", "3F"):
        return LackingError(reason)
    if kind in _DATA or not _defined(state):
        return RefusedError(reason, state)
    return UnforeseenError(reason, state)


def _defined(state: str) -> bool:
    """Whether PostgreSQL knows this code; others are raised by triggers."""
    try:
        psycopg.errors.lookup(state)
    except KeyError:
        return False
    return True


def _line(error: psycopg.Error) -> str:
    """Return the first line of an error: the rest is advice, or every host that was tried."""
    text = error.diag.message_primary or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
