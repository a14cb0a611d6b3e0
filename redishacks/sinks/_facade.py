"""The methods of a SQL sink in both colours: each drives the same steps of its conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from redishacks._drive import drive, drive_async
from redishacks._sink import (
    Applied,
    Begun,
    Chunk,
    ChunkId,
    DeadLetter,
    Reading,
    Retried,
    Rule,
)
from redishacks.sinks._conversation import Conversation


class SyncFacade:
    """`Sink` over a conversation; a class of its own for each database adds the constructor."""

    _steps: Conversation

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.destination()}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def destination(self) -> str:
        """Return `database table(key) counted=column`: no host, no path, no secrets."""
        return self._steps.destination()

    def ddl(self) -> str:
        """Return the SQL that makes the ledger and the dead-letter table, for migrations."""
        return self._steps.ddl()

    def create_ledger(self) -> None:
        """Make both tables unless they exist; safe to call from many processes at once."""
        drive(self._steps.create_ledger())

    def begin(self, columns: Mapping[str, Rule]) -> Begun:
        """Check tables, columns, types, the unique index and grants; say clock and ledger.

        `SchemaError.ddl` is what would mend all that is missing. A ledger without an identity is
        given one.
        """
        return drive(self._steps.begin(columns))

    def apply(self, chunk: Chunk) -> Applied:
        """Write a chunk and its ledger row in one transaction.

        Rows that are refused become dead letters in it. Where not one row can be written, nor is
        an id unknown, and an error looks as if the database were in disorder (a trigger that is
        broken, a missing grant), it is raised, as `SchemaError` or `ServerError`, and nothing is
        changed.
        """
        return drive(self._steps.apply(chunk))

    def applied(self, batch: str) -> frozenset[int]:
        """Return which chunks of a batch are in the ledger."""
        return drive(self._steps.applied(batch))

    def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Reading:
        """Read one id's row, dead letters and ledger entries in one snapshot."""
        return drive(self._steps.read(counter, columns, id, chunks, batches))

    def unsettled(self, counter: str) -> frozenset[str]:
        """Return the batches in the ledger that are not marked as gone from Redis."""
        return drive(self._steps.unsettled(counter))

    def prune(self, counter: str, gone: frozenset[str]) -> int:
        """Mark batches as gone; delete rows marked over 7 days ago; return how many."""
        return drive(self._steps.prune(counter, gone))

    def dead(self, counter: str | None = None, limit: int = 100) -> list[DeadLetter]:
        """Return open dead letters, oldest first, of one counter or of all."""
        return drive(self._steps.dead(counter, limit))

    def dead_count(self, counter: str) -> int:
        """Return how many open dead letters a counter has."""
        return drive(self._steps.dead_count(counter))

    def retry(self, counter: str, columns: Mapping[str, Rule]) -> Retried:
        """Apply a counter's open dead letters again, a thousand in one transaction.

        Each is deleted in the transaction that applies it; one that is refused again stays, with
        the new reason, as one of an unknown id does even with `unknown="drop"`. Letters that
        another session retries are left to it.
        """
        return drive(self._steps.retry(counter, columns))

    def close(self) -> None:
        """Close what the sink opened itself; what it was given stays the caller's."""
        drive(self._steps.close())


class AsyncFacade:
    """`AsyncSink` over a conversation, method by method as `SyncFacade`."""

    _steps: Conversation

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.destination()}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.aclose()

    def destination(self) -> str:
        """Name the target, as the sync sink does."""
        return self._steps.destination()

    def ddl(self) -> str:
        """Return the SQL that makes both tables, for migrations."""
        return self._steps.ddl()

    async def create_ledger(self) -> None:
        """Make both tables unless they exist."""
        await drive_async(self._steps.create_ledger())

    async def begin(self, columns: Mapping[str, Rule]) -> Begun:
        """Check the target; say clock and ledger."""
        return await drive_async(self._steps.begin(columns))

    async def apply(self, chunk: Chunk) -> Applied:
        """Write a chunk and its ledger row in one transaction."""
        return await drive_async(self._steps.apply(chunk))

    async def applied(self, batch: str) -> frozenset[int]:
        """Return which chunks of a batch are in the ledger."""
        return await drive_async(self._steps.applied(batch))

    async def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Reading:
        """Read one id's row, dead letters and ledger entries in one snapshot."""
        return await drive_async(self._steps.read(counter, columns, id, chunks, batches))

    async def unsettled(self, counter: str) -> frozenset[str]:
        """Return the batches in the ledger that are not marked as gone from Redis."""
        return await drive_async(self._steps.unsettled(counter))

    async def prune(self, counter: str, gone: frozenset[str]) -> int:
        """Mark batches as gone, delete rows marked over 7 days ago."""
        return await drive_async(self._steps.prune(counter, gone))

    async def dead(self, counter: str | None = None, limit: int = 100) -> list[DeadLetter]:
        """Return open dead letters, oldest first, of one counter or of all."""
        return await drive_async(self._steps.dead(counter, limit))

    async def dead_count(self, counter: str) -> int:
        """Return how many open dead letters a counter has."""
        return await drive_async(self._steps.dead_count(counter))

    async def retry(self, counter: str, columns: Mapping[str, Rule]) -> Retried:
        """Apply a counter's open dead letters again, each exactly once."""
        return await drive_async(self._steps.retry(counter, columns))

    async def aclose(self) -> None:
        """Close what the sink opened itself."""
        await drive_async(self._steps.close())
