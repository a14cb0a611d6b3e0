"""What a flush job tells: of a run, and of where its counter stands."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

from redishacks._sink import Applied, Chunk, Rule, Status

#: How long a run waits, in all, for chunks that another transaction holds.
_PATIENCE = 30.0


class FlushReport(NamedTuple):
    """What one run did."""

    #: Batches finished and acknowledged.
    batches: int = 0
    #: Rows written in the target table.
    rows: int = 0
    #: Sum of the amounts of all sum columns in the chunks applied, dead letters included.
    amount: int = 0
    #: Batches found that an earlier or another run had claimed.
    recovered: int = 0
    #: Chunks that the ledger already had.
    duplicates_skipped: int = 0
    #: Amounts that went to the dead letters.
    dead: int = 0
    seconds: float = 0.0


class BatchStatus(NamedTuple):
    """A batch in flight."""

    id: str
    ids: int
    #: Seconds since its claim.
    age: float
    #: Into how many chunks, each one SQL transaction, it is cut.
    chunks: int


class CounterStatus(NamedTuple):
    """Where a counter stands; ages in seconds."""

    counter: str
    pending_ids: int
    #: Pending sum per sum column, read page by page: exact only while nobody counts.
    pending_amount: Mapping[str, int]
    #: Age of the oldest hit that is not in SQL, at most; None without any.
    oldest: float | None
    batches: list[BatchStatus]
    #: Since a batch was last acknowledged; None: never.
    last_flush: float | None
    dead: int
    #: Somebody has counted here; else the name may be mistyped.
    known: bool
    #: The counter is bound to another destination or ledger than the job's: a run is refused.
    elsewhere: bool


class Progress:
    """The figures of a run while it lasts."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        #: Seconds it may still wait.
        self.patience = _PATIENCE
        self.batches = self.rows = self.amount = self.recovered = self.duplicates = self.dead = 0

    def count(self, chunk: Chunk, verdict: Applied) -> None:
        """Take in what became of a chunk."""
        self.rows += verdict.rows
        self.dead += verdict.dead
        self.duplicates += verdict.status is Status.DUPLICATE
        if verdict.status is Status.APPLIED:
            for rule, values in zip(chunk.rules, chunk.values, strict=True):
                if rule is Rule.SUM:
                    self.amount += sum(filter(None, values))

    def report(self) -> FlushReport:
        """Return them as they stand."""
        return FlushReport(
            self.batches,
            self.rows,
            self.amount,
            self.recovered,
            self.duplicates,
            self.dead,
            time.monotonic() - self.began,
        )
