"""A flusher as a process of its own, so that it can be killed: `python -m redishacks.demo.flusher`.

It reads an `Order` as JSON from standard input, where no password shows, runs one flush, and prints
its report, or its error, as JSON.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple, cast

from redishacks import errors
from redishacks._sink import Applied, Chunk, Sink
from redishacks.counters import BufferedCounter, FlushJob, FlushReport
from redishacks.demo.table import Table

#: The counter of the demonstration; its prefix is random.
COUNTER = "page_hits"

#: Seconds for which a flusher stands still when told to, unless it is killed before.
_STANDSTILL = 120.0


class Order(NamedTuple):
    """What a flusher is told."""

    redis: str
    prefix: str
    sql: str
    table: str
    chunk: int = 20_000
    #: Stand still after so many chunks.
    halt_after: int | None = None


class _Halting:
    """A sink that stands still when some chunks of a batch are written and some are not."""

    def __init__(self, sink: Sink, after: int) -> None:
        self._sink = sink
        self._left = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    def apply(self, chunk: Chunk) -> Applied:
        """Write a chunk, or stand still."""
        if self._left == 0:
            time.sleep(_STANDSTILL)
        self._left -= 1
        return self._sink.apply(chunk)


class Flusher:
    """A flusher's process, seen from the one that started it."""

    def __init__(self, order: Order) -> None:
        # A session of its own: a Ctrl-C on the terminal reaches us, who decide what ends.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "redishacks.demo.flusher"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._said = self._process.stdout
        with self._process.stdin as pipe:
            pipe.write(json.dumps(order).encode())
        self.pid = self._process.pid

    def running(self) -> bool:
        """Return whether it still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: return when it is gone; harmless when it has ended."""
        self._process.kill()
        self._process.wait()
        self._said.close()

    def killed(self) -> bool:
        """Return whether SIGKILL is what ended it."""
        return self._process.returncode == -signal.SIGKILL

    def report(self) -> FlushReport:
        """Wait for its end and return what it did; raises its error."""
        printed = self._said.read()
        self._process.wait()
        if not printed:
            raise errors.RedisHacksError(
                f"flusher {self.pid} ended with {self._process.returncode} and without a report"
            )
        said = json.loads(printed)
        if "error" not in said:
            return FlushReport(**said)
        kind = getattr(errors, said["kind"], errors.RedisHacksError)
        raise kind(said["error"])


def main() -> None:
    """Run the flush that standard input orders."""
    order = Order(*json.load(sys.stdin))
    try:
        sink: Sink = Table(order.sql, order.table).sink
        if order.halt_after is not None:
            sink = cast(Sink, _Halting(sink, order.halt_after))
        counter = BufferedCounter(order.redis, COUNTER, prefix=order.prefix)
        said = FlushJob(counter, sink, chunk=order.chunk).run()._asdict()
    except errors.RedisHacksError as error:
        said = {"kind": type(error).__name__, "error": str(error)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
