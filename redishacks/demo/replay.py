"""The play: hits are counted, flushed by several processes, one of which is killed, and compared.

They are counted in time series too, by this process alone.

outcome = play(Options(), read_log("access.log"), Audience())
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from redishacks._command import Command
from redishacks._words import many
from redishacks.counters import BufferedCounter, FlushJob, FlushReport
from redishacks.demo.flusher import COUNTER, Flusher, Order
from redishacks.demo.table import Table
from redishacks.demo.times import Shown, Times
from redishacks.demo.traffic import Traffic
from redishacks.errors import RedisHacksError, ServerError, UnavailableError
from redishacks.testing import postgres_server, valkey_server

#: Seconds between sends; a producer that dies loses the hits of this time.
_LINGER = 0.1
#: Hits between two looks at what else is to be done.
_SLICE = 1_000
#: While a flusher runs, hits come in so many portions, this far apart.
_PORTIONS = 40
_PAUSE = 0.02

#: The flusher that will be killed takes at most so many ids at once, to have a middle.
_SMALL_CHUNK = 50
#: Seconds within which it must get there.
_PATIENCE = 60.0


class Options(NamedTuple):
    """What to play on: private servers, where no URL is given."""

    redis: str | None = None
    sql: str | None = None
    postgres: bool = False


class Killed(NamedTuple):
    """The flusher that was killed, and what was seen before and after."""

    pid: int
    batch: str
    #: Chunks of its batch that were in SQL, of how many.
    written: int
    chunks: int


class Outcome(NamedTuple):
    """How it came out."""

    hits_sent: int
    pages_sent: int
    hits_in_sql: int
    rows_in_sql: int
    #: Pages whose count in SQL is not what was sent; none, or something is broken.
    wrong_pages: list[str]
    dead: int
    #: Of counting alone: no flusher ran meanwhile, and Redis held every hit at the end.
    hits_per_second: float
    #: By Redis' own INFO commandstats, per hit: scripts called, and all commands with those that
    #: the scripts ran. None where Redis does not tell.
    calls_per_hit: float | None
    commands_per_hit: float | None
    top: list[tuple[str, int]]
    killed: Killed
    flushes: list[FlushReport]
    #: The time series, and of how many hits they could not be; None for of all.
    series: Shown | None
    left_out: int

    @property
    def agree(self) -> bool:
        """Whether SQL has every hit exactly once."""
        return not self.wrong_pages and self.hits_sent == self.hits_in_sql

    @property
    def series_agree(self) -> bool:
        """Whether the time series have every hit, and every byte, in its hour."""
        return self.series is None or not self.series.wrong_hours


class Audience:
    """Who watches; this one sees nothing."""

    def tell(self, text: str) -> None:
        """Something has happened."""

    def count(self, hits: int) -> None:
        """So many hits more were replayed."""

    def go_on(self) -> None:
        """Called at least ten times a second, except while a server starts: raise to end the play.

        Raising elsewhere, as from a signal handler, could hit a half-made object.
        """


def play(options: Options, traffic: Traffic, audience: Audience) -> Outcome:
    """Replay the traffic; return when every hit is in SQL and everything is cleaned up.

    Servers it started are gone then, and so are its keys and tables on servers that were given;
    also when it is left by an exception. Raises what counters and sinks raise.
    """
    with ExitStack() as stack:
        if options.redis is None:
            server = stack.enter_context(valkey_server())
            redis = server.unix_url
            audience.tell(f"started Valkey {server.version}")
            audience.go_on()
        else:
            redis = options.redis
        if options.sql is not None:
            sql = options.sql
        elif options.postgres:
            postgres = stack.enter_context(postgres_server())
            sql = postgres.dsn
            audience.tell(f"started PostgreSQL {postgres.version}")
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="redishacks-"))
            sql = f"sqlite:///{Path(directory, 'demo.db')}"
            audience.tell("made a SQLite database in a temporary file")
        # Random, so that nothing on a server that others use is touched.
        name = f"redishacks_demo_{secrets.token_hex(5)}"
        table = Table(sql, name)
        counter = BufferedCounter(redis, COUNTER, prefix=name, linger=_LINGER)
        stack.callback(table.sink.close)
        audience.go_on()
        # Cleaned up is only where something was done: a server that is away says so once.
        counter.transport.call(Command(("PING",), repeatable=True), counter.deadline)
        table.create()
        if options.sql is not None:
            stack.callback(_quietly, lambda: _drop(table, audience), audience)
        if options.redis is not None:
            stack.callback(_quietly, lambda: _remove_keys(counter, name, audience), audience)
        stack.callback(_quietly, counter.close, audience)
        table.sink.create_ledger()
        order = Order(redis, name, sql, name)
        return _Play(counter, Times(redis, name, traffic), table, order, audience).run(traffic)


class _Play:
    def __init__(
        self,
        counter: BufferedCounter,
        times: Times,
        table: Table,
        order: Order,
        audience: Audience,
    ) -> None:
        self._counter = counter
        self._times = times
        #: How many hits the counter has been told of, and the time series.
        self._counted = self._entered = 0
        self._table = table
        self._job = FlushJob(counter, table.sink)
        self._order = order
        self._audience = audience
        self._flushes: list[FlushReport] = []

    def run(self, traffic: Traffic) -> Outcome:
        """Play it."""
        hits = traffic.targets
        total = len(hits)
        # Something is measured and something is left to kill a flusher over, however short the log.
        first = -(-total * 2 // 5)
        second = max(first, total * 3 // 5)
        third = max(second + 1, total * 4 // 5)
        fourth = (third + total) // 2

        rate, calls, commands = self._measured(hits[:first])
        if total > 1:
            self._flush_during(hits[first:second])
        self._count(hits[second:third])
        killed = self._kill_during(hits[third:fourth])
        self._flush_during(hits[fourth:])
        self._flush_during([])
        self._counter.close()
        while self._entered < total:
            self._enter()

        rows = self._table.rows()
        sent = Counter(hits)
        return Outcome(
            hits_sent=total,
            pages_sent=len(sent),
            hits_in_sql=sum(rows.values()),
            rows_in_sql=len(rows),
            wrong_pages=sorted(p for p in sent.keys() | rows.keys() if sent[p] != rows.get(p, 0)),
            dead=self._job.sink.dead_count(self._job.layout.full_name),
            hits_per_second=rate,
            calls_per_hit=calls,
            commands_per_hit=commands,
            top=sorted(rows.items(), key=lambda row: (-row[1], row[0]))[:10],
            killed=killed,
            flushes=self._flushes,
            series=self._times.shown(),
            left_out=self._times.left_out,
        )

    # Counting

    def _add(self, hits: Sequence[str]) -> None:
        incr = self._counter.incr
        for target in hits:
            incr(target)
        self._counted += len(hits)
        self._audience.go_on()

    def _enter(self) -> None:
        """Count some hits in the time series too, of those that the counter has."""
        last = min(self._entered + _SLICE, self._counted)
        self._times.add(self._entered, last)
        self._audience.count(last - self._entered)
        self._audience.go_on()
        self._entered = last

    def _add_slowly(self, hits: Sequence[str]) -> None:
        for some in _cut(hits, -(-len(hits) // _PORTIONS)):
            self._add(some)
            self._wait()

    def _wait(self) -> None:
        """Let a little time pass, of some use to the time series."""
        until = time.monotonic() + _PAUSE
        self._enter()
        time.sleep(max(0.0, until - time.monotonic()))
        self._audience.go_on()

    def _count(self, hits: Sequence[str]) -> None:
        """Count hits as fast as it goes; Redis has them in the end."""
        for some in _cut(hits, _SLICE):
            self._add(some)
        self._counter.send()

    def _measured(self, hits: Sequence[str]) -> tuple[float, float | None, float | None]:
        """Count hits; return hits per second, script calls per hit, commands per hit."""
        before = self._commandstats()
        began = time.perf_counter()
        self._count(hits)
        seconds = time.perf_counter() - began
        after = self._commandstats()
        rate = len(hits) / seconds
        if before is None or after is None:
            return rate, None, None
        calls = after - before
        scripts = sum(calls[name] for name in ("eval", "evalsha"))
        self._audience.tell(
            f"counted {many(len(hits), 'hit')} at {rate:,.0f} per second, "
            f"with {many(scripts, 'script call')}"
        )
        return rate, scripts / len(hits), calls.total() / len(hits)

    def _commandstats(self) -> Counter[str] | None:
        """Return how often Redis has run each command; None when it does not tell."""
        command = Command(("INFO", "commandstats"), (), _calls, repeatable=True, bulk=True)
        try:
            return self._counter.transport.call(command, self._counter.deadline)
        except ServerError:
            return None

    # Flushing

    def _flush_during(self, hits: Sequence[str]) -> None:
        """Let another process flush while hits are counted."""
        flusher = Flusher(self._order)
        try:
            self._add_slowly(hits)
            while flusher.running():
                self._wait()
            report = flusher.report()
        finally:
            flusher.kill()
        self._counter.send()
        self._flushes.append(report)
        finished = "finished the batch of the killed one: " if report.recovered else ""
        self._audience.tell(
            f"flusher {flusher.pid} {finished}wrote {many(report.amount, 'hit')} "
            f"to {many(report.rows, 'row')} in {report.seconds:.2f} s"
        )

    def _kill_during(self, hits: Sequence[str]) -> Killed:
        """Let another process flush, and SIGKILL it when a part of its batch is in SQL."""
        ids = self._job.status().pending_ids
        chunk = max(1, min(_SMALL_CHUNK, ids // 2))
        halt_after = ids // chunk // 2
        flusher = Flusher(self._order._replace(chunk=chunk, halt_after=halt_after))
        try:
            self._add_slowly(hits)
            patience = time.monotonic() + _PATIENCE
            while (seen := self._in_the_middle(flusher.pid)) is None or seen.written < halt_after:
                if not flusher.running():
                    flusher.report()  # raises what it died of
                    raise RedisHacksError(f"flusher {flusher.pid} ended before it could be killed")
                if time.monotonic() > patience:
                    raise UnavailableError(f"flusher {flusher.pid} did not get to work in time")
                self._wait()
        finally:
            flusher.kill()
        self._counter.send()
        left = self._in_the_middle(flusher.pid)
        if left is None or not flusher.killed():
            raise RedisHacksError(f"flusher {flusher.pid} was not killed in the middle of a batch")
        self._audience.tell(
            f"flusher {flusher.pid} was killed with SIGKILL in the middle of a flush: "
            f"{left.written:,} of the {many(left.chunks, 'chunk')} of its batch in SQL"
        )
        return left

    def _in_the_middle(self, pid: int) -> Killed | None:
        """Look in Redis for a claimed batch, and in the ledger for what of it is in SQL."""
        for batch in self._job.status().batches:
            written = len(self._job.sink.applied(batch.id))
            if written < batch.chunks:
                return Killed(pid, batch.id, written, batch.chunks)
        return None


def _cut(hits: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Cut into parts of a size."""
    return (hits[start : start + size] for start in range(0, len(hits), size or 1))


def _calls(reply: bytes | str) -> Counter[str]:
    """Read INFO commandstats; looking itself is left out."""
    text = reply.decode() if isinstance(reply, bytes) else reply
    found: Counter[str] = Counter()
    for line in text.splitlines():
        name, colon, fields = line.partition(":calls=")
        if colon and name != "cmdstat_info":
            found[name.removeprefix("cmdstat_")] = int(fields.split(",")[0])
    return found


# Cleaning up


def _quietly(action: Callable[[], None], audience: Audience) -> None:
    """Clean up; when that fails there is nothing better to do than to say so."""
    try:
        action()
    except RedisHacksError as error:
        audience.tell(f"could not clean up: {error}")


def _drop(table: Table, audience: Audience) -> None:
    table.drop()
    audience.tell(f"dropped the table {table.name} and its ledger")


def _remove_keys(counter: BufferedCounter, prefix: str, audience: Audience) -> None:
    """Remove every key under a prefix; it is random, so they are all ours."""

    def parse(reply: list[Any]) -> tuple[bytes, list[bytes]]:
        return reply[0], reply[1]

    transport, deadline = counter.transport, counter.deadline
    cursor, removed = b"0", 0
    while True:
        words = ("SCAN", cursor, "MATCH", f"{prefix}:*", "COUNT", "1000")
        cursor, keys = transport.call(Command(words, (), parse, repeatable=True), deadline)
        for key in keys:
            removed += transport.call(Command(("UNLINK", key), (key,), int), deadline)
        if cursor == b"0":
            break
    audience.tell(f"removed {many(removed, 'key')} of {prefix} from Redis")
