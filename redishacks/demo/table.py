"""The table of the demonstration: made, read and dropped, with a ledger of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from redishacks._sink import Sink
from redishacks.errors import SchemaError, UnavailableError, UsageError
from redishacks.sinks import PostgresSink, SQLiteSink

_SQLITE = "sqlite:///"


class Table:
    """A table of pages and hits in a database given by URL.

    `name` must be made by us: it stands in SQL as it is.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self._names = (name, f"{name}_ledger", f"{name}_dead")
        self._url = url
        self._path = unquote(url.removeprefix(_SQLITE))
        kind: type[PostgresSink | SQLiteSink]
        if url.startswith(_SQLITE):
            kind, place = SQLiteSink, self._path
        elif url.startswith(("postgresql://", "postgres://")):
            kind, place = PostgresSink, url
        else:
            raise UsageError("--sql must be a URL: sqlite:///file.db or postgresql://…")
        self.sink: Sink = kind(
            place,
            table=name,
            key="path",
            columns={"amount": "hits"},
            ledger=self._names[1],
            dead=self._names[2],
        )

    def create(self) -> None:
        """Make the table; the ledger is the sink's to make."""
        with self._connection() as connection:
            connection.execute(
                f"CREATE TABLE {self.name} (path TEXT PRIMARY KEY, hits BIGINT NOT NULL)"
            )

    def rows(self) -> dict[str, int]:
        """Read it whole."""
        with self._connection() as connection:
            return dict(connection.execute(f"SELECT path, hits FROM {self.name}").fetchall())

    def drop(self) -> None:
        """Drop it, and its ledger."""
        self.sink.close()
        with self._connection() as connection:
            for name in self._names:
                connection.execute(f"DROP TABLE IF EXISTS {name}")

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """Open a connection, commit at the end; errors become ours."""
        if self._url.startswith(_SQLITE):
            import sqlite3

            try:
                connection = sqlite3.connect(self._path)
                try:
                    with connection:
                        yield connection
                finally:
                    connection.close()
            except sqlite3.Error as error:
                raise UnavailableError(f"SQLite: {error}") from None
        else:
            import psycopg

            try:
                with psycopg.connect(self._url) as connected:
                    yield connected
            except psycopg.Error as error:
                kind = SchemaError if (error.sqlstate or "").startswith("42") else UnavailableError
                # The lines below the first are advice, or every host that was tried.
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise kind(f"PostgreSQL: {said}") from None
