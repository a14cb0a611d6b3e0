"""Buffered counters: count every hit in Redis, let cron write the sums to SQL, exactly once.

    hits = BufferedCounter("redis://localhost", "page_hits")
    hits.incr("/index.html")                      # one round trip; with linger=0.1 none

    sink = PostgresSink("postgresql://…", table="pages", key="path", columns={"amount": "hits"})
    FlushJob(hits, sink).run()                    # from cron; any number of these at once

How a hit reaches SQL. It is added to a sorted set of pending amounts. A flush renames the whole
set to a batch that never changes again, under a random id chosen before. It cuts the batch into
chunks by rank, and writes each chunk in one SQL transaction, together with a row (batch, chunk) in
a ledger table. When all its chunks are in the ledger, the batch is dropped. A flusher that dies
anywhere leaves a batch whose ledger says what remains to be done; two flushers at once, or one that
wakes up after a day, find the ledger row and change nothing. So a hit that Redis acknowledged
reaches SQL once, as long as Redis itself does not lose it (see `FlushJob` on failover).

Trade-offs. SQL is behind by the time between flushes; `FlushJob.value` adds what is on its way.
Counts are exact to 2^53, since a sorted set's scores are doubles. A pending id takes 65 to 95
bytes and its own length, per column. The keys are described in `redishacks.counters.commands`.
"""

from redishacks.counters.buffered import AsyncBufferedCounter, BufferedCounter
from redishacks.counters.flush import AsyncFlushJob, FlushJob
from redishacks.counters.report import CounterStatus, FlushReport

__all__ = [
    "AsyncBufferedCounter",
    "AsyncFlushJob",
    "BufferedCounter",
    "CounterStatus",
    "FlushJob",
    "FlushReport",
]
