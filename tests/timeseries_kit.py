"""What the tests of time series share: a clock of ours, both colours, and a look at the keys."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import re
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import fakeredis
import redis
import redis.asyncio

from redishacks import timeseries
from redishacks._command import Command
from redishacks.testing import Server
from redishacks.timeseries._packing import Packed, spread
from redishacks.timeseries.resolution import DAY, Rung
from tests.helpers import Colour, Facade
from tests.transport_kit import PEM

S = TypeVar("S")


def clocked(series: S) -> S:
    """Make a series go by `series.clock`, as if its server did; never behind its real one."""
    made: Any = series
    layout = made.layout
    made.clock = int(time.time()) // DAY * DAY + 2 * DAY
    put = layout.put

    def put_then(*args: Any, **more: Any) -> Any:
        command = put(*args, **more)
        words = list(command.args)
        words[3] = f"{made.clock}000000"
        return command._replace(args=tuple(words))

    def time_then(key: bytes = b"any") -> Any:
        micros = made.clock * 1_000_000
        return Command(("PING",), (key,), lambda _: micros, repeatable=True)

    layout.now = lambda: made.clock
    layout.learn = lambda micros: None
    layout.put = put_then
    layout.time_of = time_then
    return series


class Both(Colour):
    """Makes clients and series of one colour."""

    @property
    def module(self) -> Any:
        """redis-py, of this colour."""
        return redis.asyncio if self._runner else redis

    def fake(self, **options: Any) -> Any:
        """Return what makes clients of one fake server."""
        kind: Any = fakeredis.FakeAsyncRedis if self._runner else fakeredis.FakeRedis
        server = fakeredis.FakeServer()
        return lambda: kind(server=server, **options)

    def series(
        self, client: Any, name: str = "hits", *, kind: str = "TimeSeries", **options: Any
    ) -> Any:
        """Return a series of this colour."""
        if self._runner:
            made: Any = getattr(timeseries, f"Async{kind}")
            return Facade(made(client, name, **options), self._runner)
        made = getattr(timeseries, kind)
        return made(client, name, **options)

    def shut(self, *series: Any) -> None:
        """Close the connections of series, and those of their clients."""
        for each in series:
            if self._runner is None:
                each.transport.close()
                if not isinstance(each.client, str):
                    each.client.close()
                continue
            self._runner.run(each.target.transport.aclose())
            if not isinstance(each.target.client, str):
                self._runner.run(each.target.client.aclose())


class Stored(NamedTuple):
    """A packed key as it is on the server."""

    series: str
    rung: Rung
    pack: int
    #: Amounts by when their buckets begin.
    buckets: dict[int, int]


#: Everything of a name, in one instant.
_LOOK = """
    local time, found = redis.call('TIME'), {}
    for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
      local text = redis.call('TYPE', key).ok == 'string' and redis.call('GET', key)
      found[#found + 1] = {key, text, redis.call('PTTL', key)}
    end
    return {time[1], time[2], found}
"""


def stored(raw: Any, series: Any, prefix: str, name: str = "hits") -> list[Stored]:
    """Read all packed keys of a name in one instant; each expires when it should.

    Every other key has a TTL, but for `:meta`.
    """
    rungs = {rung.step: rung for rung in series.layout.rungs}
    seconds, micros, keys = raw.eval(_LOOK, 0, f"{prefix}:t1:{{{name}/*")
    now = int(seconds) * 1000 + int(micros) // 1000
    found = []
    for key, value, ttl in keys:
        said = re.fullmatch(rb".*}:s:(.*):(\d+):(-?\d+)", key, re.S)
        if said is None:
            assert (ttl == -1) == key.endswith(b":meta"), (key, ttl)
            continue
        rung, pack = rungs[int(said[2])], int(said[3])
        # The end of its last bucket and its retention, whenever it was written.
        assert ttl != -1, key
        if rung.ends(pack) * 1000 <= now:
            continue
        assert abs(ttl - (rung.ends(pack) * 1000 - now)) <= 100, (key, ttl)
        packed = Packed(value, rung.buckets)
        there = packed.present(0, rung.buckets)
        values = spread([(packed, 0, rung.buckets)])
        begins = pack * rung.span
        buckets = {
            begins + i * rung.step: values[i] for i in range(rung.buckets) if there[i] == "1"
        }
        found.append(Stored(said[1].decode(), rung, pack, buckets))
    return found


def by_step(found: list[Stored]) -> dict[int, dict[tuple[str, int], int]]:
    """Return amounts by series and bucket, for each resolution."""
    steps: dict[int, dict[tuple[str, int], int]] = {}
    for each in found:
        buckets = steps.setdefault(each.rung.step, {})
        for begins, amount in each.buckets.items():
            buckets[each.series, begins] = amount
    return steps


def agree(found: list[Stored]) -> dict[tuple[str, int], int]:
    """See that each bucket is the sum of the finest ones in it; return those."""
    steps = by_step(found)
    finest = steps.get(min(steps, default=0), {})
    for step, buckets in steps.items():
        sums: dict[tuple[str, int], int] = {}
        for (series, begins), amount in finest.items():
            at = series, begins // step * step
            sums[at] = sums.get(at, 0) + amount
        assert sums == buckets, f"buckets of {step} s"
    return finest


def noon() -> dt.tzinfo:
    """Return a time zone in which it is about noon: its day does not end in a test."""
    return dt.timezone(dt.timedelta(hours=12 - time.gmtime().tm_hour))


@contextlib.contextmanager
def tls_in_front(server: Server) -> Iterator[int]:
    """Run a port where TLS leads to a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    up: list[int] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(server.host, server.port)
        copies = [
            asyncio.create_task(copy(reader, ours)),
            asyncio.create_task(copy(theirs, writer)),
        ]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for task in copies:
            task.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
        for each in (ours, writer):
            each.transport.abort()  # at once: the loop may be about to end
        await asyncio.sleep(0)

    async def main() -> None:
        listening = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        up.append(listening.sockets[0].getsockname()[1])
        ready.set()
        await over.wait()
        listening.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(20)
        yield up[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
