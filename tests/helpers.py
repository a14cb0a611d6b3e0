"""What several test modules share: one test body for both colours, and a fault-taking flusher."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis
import redis.asyncio

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
from redishacks.counters import AsyncBufferedCounter, AsyncFlushJob, BufferedCounter, FlushJob
from redishacks.counters.commands import merged
from redishacks.ratelimit import AsyncRateLimiter, Limit, RateLimiter
from redishacks.sinks import AsyncPostgresSink
from tests.workers import make_sink


class Facade:
    """An async object that looks sync: coroutine methods run on the runner's loop."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self.target = target
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.target, "aclose" if name == "close" else name)
        if not inspect.iscoroutinefunction(value):
            return value
        return lambda *args, **kwargs: self._runner.run(value(*args, **kwargs))


class Colour:
    """Makes counters and jobs of one colour, all with sync-looking methods."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._runner = asyncio.Runner() if name == "async" else None
        self._opened: list[Any] = []

    def client(self, url: str, **options: Any) -> Any:
        """Return a redis-py client of this colour."""
        module: Any = redis.asyncio if self._runner else redis
        return module.Redis.from_url(url, **options)

    def counter(self, client: Any, name: str, **options: Any) -> Any:
        """Return a counter of this colour."""
        if self._runner:
            return Facade(AsyncBufferedCounter(client, name, **options), self._runner)
        return BufferedCounter(client, name, **options)

    def limiter(self, client: Any, name: str, *limits: Limit, **options: Any) -> Any:
        """Return a rate limiter of this colour."""
        if self._runner:
            return Facade(AsyncRateLimiter(client, name, *limits, **options), self._runner)
        return RateLimiter(client, name, *limits, **options)

    def reserve(
        self,
        limiter: Any,
        key: str,
        estimate: int,
        actual: int | None,
        inside: Callable[[], object] = bool,
        error: Any = None,
    ) -> None:
        """Reserve, call a function, settle what is given, and raise what is given."""

        def settle(reservation: Any) -> None:
            inside()
            if actual is not None:
                reservation.settle(actual)
            if error is not None:
                raise error

        async def main() -> None:
            async with limiter.target.reserve(key, estimate) as reservation:
                settle(reservation)

        if self._runner:
            self._runner.run(main())
            return
        with limiter.reserve(key, estimate) as reservation:
            settle(reservation)

    def sink(self, url: str, table: str = "pages") -> Any:
        """Return a sink of pages, open until `close`."""
        sink: Any
        if self._runner and url.startswith("postgresql"):
            columns = {"amount": "hits"}
            sink = AsyncPostgresSink(url, table=table, key="path", columns=columns)
            self._opened.append(Facade(sink, self._runner))
        else:
            sink = make_sink(url, table=table)
            self._opened.append(sink)
        return sink

    def job(self, counter: Any, sink: Any, **options: Any) -> Any:
        """Return a flush job of this colour."""
        if self._runner:
            return Facade(AsyncFlushJob(counter.target, sink, **options), self._runner)
        return FlushJob(counter, sink, **options)

    def sleep(self, seconds: float) -> None:
        """Let time pass, for tasks too."""
        if self._runner:
            self._runner.run(asyncio.sleep(seconds))
        else:
            time.sleep(seconds)

    def after(self, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Let time pass, then call a function."""
        self.sleep(seconds)
        return function(*args)

    def close(self) -> None:
        """Close the sinks and end the loop."""
        for sink in self._opened:
            sink.close()
        if self._runner:
            self._runner.close()


def eventually(condition: Callable[[], Any], within: float = 10.0) -> Any:
    """Wait until a condition holds and return its value; fail after `within` seconds."""
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {within} s"
        time.sleep(0.005)
    return value


def shown_on_a_terminal(command: Sequence[str], **options: Any) -> bytes:
    """Run a command, which must succeed, and return what it writes on stderr, a terminal."""
    ours, theirs = os.openpty()
    try:
        process = subprocess.Popen(command, stderr=theirs, **options)
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65536):
                shown += data
        except OSError:  # what reading a terminal gives when the other end is closed
            pass
        assert process.wait(60) == 0
    finally:
        os.close(ours)
    return shown


class MemorySink:
    """A sink in memory, plain enough to be the oracle of the model test."""

    def __init__(self) -> None:
        self.rows: dict[bytes, dict[str, int]] = {}
        self.ledger: dict[ChunkId, bytes] = {}
        self.gone: set[str] = set()

    def destination(self) -> str:
        """Name it."""
        return "memory"

    def ddl(self) -> str:
        """Nothing to make."""
        return ""

    def create_ledger(self) -> None:
        """Nothing to make."""

    def begin(self, columns: Mapping[str, Rule]) -> Begun:
        """Be there."""
        return Begun(0, "")

    def apply(self, chunk: Chunk) -> Applied:
        """Apply a chunk and its ledger row at one blow."""
        key = ChunkId(chunk.batch, chunk.ordinal)
        if key in self.ledger:
            same = self.ledger[key] == chunk.digest
            return Applied(Status.DUPLICATE if same else Status.CONFLICT)
        self.ledger[key] = chunk.digest
        for name, rule, values in zip(chunk.columns, chunk.rules, chunk.values, strict=True):
            for id, value in zip(chunk.ids, values, strict=True):
                row = self.rows.setdefault(id, {})
                if value is not None:
                    old = row.get(name)
                    row[name] = value if old is None else merged(rule, old, value)
        return Applied(Status.APPLIED, len(chunk.ids))

    def applied(self, batch: str) -> frozenset[int]:
        """Look into the ledger."""
        return frozenset(key.ordinal for key in self.ledger if key.batch == batch)

    def read(
        self,
        counter: str,
        columns: Mapping[str, Rule],
        id: bytes,
        chunks: Sequence[ChunkId],
        batches: Sequence[str],
    ) -> Reading:
        """Read a row and the ledger."""
        return Reading(
            dict(self.rows.get(id, {})),
            {},
            frozenset(chunk for chunk in chunks if chunk in self.ledger),
            frozenset(batch for batch in batches if self.applied(batch)),
        )

    def unsettled(self, counter: str) -> frozenset[str]:
        """Return the batches not marked."""
        return frozenset(key.batch for key in self.ledger) - self.gone

    def prune(self, counter: str, gone: frozenset[str]) -> int:
        """Mark batches."""
        self.gone |= gone
        return 0

    def dead(self, counter: str | None = None, limit: int = 100) -> list[DeadLetter]:
        """Nothing dies here."""
        return []

    def dead_count(self, counter: str) -> int:
        """Nothing dies here."""
        return 0

    def retry(self, counter: str, columns: Mapping[str, Rule]) -> Retried:
        """Nothing dies here."""
        return Retried(0, 0)

    def close(self) -> None:
        """Nothing to close."""
