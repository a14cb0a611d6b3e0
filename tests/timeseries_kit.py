"""What the tests of time series share: a clock of ours."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from redishacks._command import Command
from redishacks.timeseries.resolution import DAY

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

    def time_then(key: bytes) -> Any:
        micros = made.clock * 1_000_000
        return Command(("PING",), (key,), lambda _: micros, repeatable=True)

    layout.now = lambda: made.clock
    layout.learn = lambda micros: None
    layout.put = put_then
    layout.time_of = time_then
    return series
