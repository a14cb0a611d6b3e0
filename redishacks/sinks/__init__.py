"""SQL sinks: where a flush job writes, each chunk exactly once.

    sink = PostgresSink("postgresql://…", table="pages", key="path", columns={"amount": "hits"})
    sink.create_ledger()             # once, or put sink.ddl() into a migration
    FlushJob(counter, sink).run()

A chunk of counts and its row in the ledger table are written in one transaction, so a chunk that
comes again (a flusher died, a reply was lost) is known and changes nothing. What the database will
not take goes to the dead-letter table in the same transaction, with the reason, and can be applied
again later; it never blocks the rest. An error of disorder (a broken trigger, a missing function)
is raised instead where it refuses every row of a chunk; the batch then stays claimed.

`mode="upsert"` (default) inserts ids that have no row; the table's other columns then need
defaults. `mode="update"` touches existing rows only; ids without a row go to the dead letters, or
nowhere with `unknown="drop"`.

`PostgresSink` needs `redishacks[postgres]` and PostgreSQL 14 or newer, `SQLiteSink` only the
standard library. Any object with the methods of `Sink` (or `AsyncSink`) will do instead; `Chunk`,
`Applied`, `Begun` and the other values here are what passes between it and the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

from redishacks._sink import (
    Applied,
    AsyncSink,
    Begun,
    Chunk,
    ChunkId,
    DeadLetter,
    Reading,
    Retried,
    Rule,
    Sink,
    Status,
)
from redishacks.errors import UsageError
from redishacks.sinks._postgres import AsyncPostgresSink, PostgresSink
from redishacks.sinks._sqlite import SQLiteSink

__all__ = [
    "Applied",
    "AsyncPostgresSink",
    "AsyncSink",
    "Begun",
    "Chunk",
    "ChunkId",
    "DeadLetter",
    "PostgresSink",
    "Reading",
    "Retried",
    "Rule",
    "SQLiteSink",
    "Sink",
    "Status",
    "from_url",
]


def from_url(
    url: str,
    *,
    table: str | tuple[str, str],
    key: str | tuple[str, ...],
    columns: Mapping[str, str],
    mode: str = "upsert",
) -> PostgresSink | SQLiteSink:
    """Return the sink of a URL: `postgresql://…`, or `sqlite:///file.db` (`sqlite:////abs.db`).

    Nothing is connected yet. Raises `UsageError` for any other URL.
    """
    scheme, colon, rest = url.partition("://")
    if scheme in ("postgresql", "postgres") and colon:
        return PostgresSink(url, table=table, key=key, columns=columns, mode=mode)
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1 and "?" not in rest:
        return SQLiteSink(unquote(rest[1:]), table=table, key=key, columns=columns, mode=mode)
    # The URL may hold a password: it is not shown.
    raise UsageError("an SQL URL is postgresql://… or sqlite:///file.db, and this one is neither")
