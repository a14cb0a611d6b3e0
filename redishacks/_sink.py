"""What passes between a flush job and a database: chunks one way, verdicts the other."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol


class Rule(StrEnum):
    """How two amounts of one column merge into one."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


class ChunkId(NamedTuple):
    """One chunk's row in the ledger."""

    batch: str
    #: Its place in the batch, from 0.
    ordinal: int


class Chunk(NamedTuple):
    """A slice of a claimed batch that never changes: applied whole, in one transaction.

    `values[c][r]` is the amount of column `columns[c]` for `ids[r]`, or None where that id has no
    amount in that column. Ids are raw bytes and distinct as bytes; the database's own equality may
    still fold several into one row. Values of max and min columns are integers; in a column of a
    date or time type they mean microseconds since 1970.
    """

    counter: str
    batch: str
    #: Its place in the batch, from 0.
    ordinal: int
    columns: tuple[str, ...]
    rules: tuple[Rule, ...]
    ids: Sequence[bytes]
    values: tuple[Sequence[int | None], ...]
    #: Of ids and values: tells a replay from other content under the same chunk id.
    digest: bytes
    #: The database's clock, as `Sink.begin` gave it, before the batch was read from Redis.
    read_at: Any
    #: The only ledger it may be entered into, as `Sink.begin` gave it.
    ledger: str


class Begun(NamedTuple):
    """What a database says before anything is claimed for it."""

    #: Its clock, whatever that is; it comes back as `Chunk.read_at`.
    clock: Any
    #: Which ledger it has. A counter is bound to it at its first flush: what another ledger knows
    #: of the counter's batches, this one does not. It stays as long as the ledger's rows do, and an
    #: emptied ledger is another one. A sink that keeps no ledger says "".
    ledger: str


class Status(StrEnum):
    """What became of a chunk; all but BUSY and STALE were seen committed."""

    APPLIED = "applied"
    #: The ledger had it, with the same content: nothing changed.
    DUPLICATE = "duplicate"
    #: The ledger had it with other content: all of it went to the dead letters.
    CONFLICT = "conflict"
    #: Another transaction holds it or its rows: try again after other chunks.
    BUSY = "busy"
    #: Read from Redis over a day ago, or the ledger is not the one it is for: begin again.
    STALE = "stale"


class Applied(NamedTuple):
    """The verdict on one chunk."""

    status: Status
    #: Rows written in the target table.
    rows: int = 0
    #: Amounts that went to the dead letters.
    dead: int = 0


class Reading(NamedTuple):
    """What the database shows for one id, from one snapshot."""

    #: The row's value per counter column; None for a missing row or a NULL.
    row: Mapping[str, int | None]
    #: Open dead letters of the id, merged per counter column; columns without any are absent.
    dead: Mapping[str, int]
    #: Which of the chunks asked about are in the ledger.
    applied: frozenset[ChunkId]
    #: Which of the batches asked about have any chunk in the ledger.
    begun: frozenset[str]
    #: Which ledger that is, as in `Begun`; "" when it has no name yet.
    ledger: str = ""


class DeadLetter(NamedTuple):
    """One amount that the database would not take."""

    number: int
    counter: str
    batch: str
    chunk: int
    id: bytes
    column: str
    amount: int
    reason: str
    at: dt.datetime


class Retried(NamedTuple):
    """What `Sink.retry` did: letters applied and removed, letters that were refused again."""

    applied: int
    refused: int


class Sink(Protocol):
    """Where a flush job writes. Every method may raise `UnavailableError` (try later) or
    `SchemaError` (a table, column or grant is missing). Calling
    again is then safe: nothing was changed, or the ledger has it.

    The job calls one method at a time.
    """

    def destination(self) -> str:
        """Name the target (kind, table, key, columns) without secrets: one counter, one target."""

    def ddl(self) -> str:
        """Return the SQL that makes the ledger and the dead-letter table, for migrations."""

    def create_ledger(self) -> None:
        """Make both tables unless they exist."""

    def begin(self, columns: Mapping[str, Rule]) -> Begun:
        """Connect, check that tables, columns and grants are there; say clock and ledger."""

    def apply(self, chunk: Chunk) -> Applied:
        """Write a chunk and its ledger row in one transaction; return after COMMIT was seen.

        A chunk may be without ids (see `FlushJob.rebind`): then only its ledger row is written.
        """

    def applied(self, batch: str) -> frozenset[int]:
        """Return which chunks of a batch are in the ledger; for those who look on."""

    def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Reading:
        """Read one id's row, dead letters and ledger entries in one snapshot of the primary."""

    def unsettled(self, counter: str) -> frozenset[str]:
        """Return the batches in the ledger that are not marked as gone from Redis."""

    def prune(self, counter: str, gone: frozenset[str]) -> int:
        """Mark these batches as gone; delete rows marked over 7 days ago; return how many."""

    def dead(self, counter: str | None = None, limit: int = 100) -> list[DeadLetter]:
        """Return open dead letters, oldest first, of one counter or of all."""

    def dead_count(self, counter: str) -> int:
        """Return how many open dead letters a counter has."""

    def retry(self, counter: str, columns: Mapping[str, Rule]) -> Retried:
        """Apply a counter's open dead letters again, each exactly once."""

    def close(self) -> None:
        """Close what the sink opened itself."""


class AsyncSink(Protocol):
    """`Sink` for asyncio; `destination` and `ddl`, which do no I/O, stay as they are."""

    def destination(self) -> str:
        """Name the target without secrets."""

    def ddl(self) -> str:
        """Return the SQL that makes the ledger and the dead-letter table."""

    async def create_ledger(self) -> None:
        """Make both tables unless they exist."""

    async def begin(self, columns: Mapping[str, Rule]) -> Begun:
        """Connect and check; say clock and ledger."""

    async def apply(self, chunk: Chunk) -> Applied:
        """Write a chunk and its ledger row in one transaction."""

    async def applied(self, batch: str) -> frozenset[int]:
        """Return which chunks of a batch are in the ledger."""

    async def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Reading:
        """Read one id's row, dead letters and ledger entries in one snapshot."""

    async def unsettled(self, counter: str) -> frozenset[str]:
        """Return the batches in the ledger that are not marked as gone from Redis."""

    async def prune(self, counter: str, gone: frozenset[str]) -> int:
        """Mark batches as gone, delete rows marked over 7 days ago."""

    async def dead(self, counter: str | None = None, limit: int = 100) -> list[DeadLetter]:
        """Return open dead letters, oldest first."""

    async def dead_count(self, counter: str) -> int:
        """Return how many open dead letters a counter has."""

    async def retry(self, counter: str, columns: Mapping[str, Rule]) -> Retried:
        """Apply a counter's open dead letters again."""

    async def aclose(self) -> None:
        """Close what the sink opened itself."""
