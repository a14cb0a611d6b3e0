"""Processes that count in series, and note what they were told, until they are killed.

Notes are lines of JSON, each in the file before the next step: `{"n": …, "hits": […]}` before a
call, `"counted"` or `"refused"` after it, `"sent"` after a send.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from redishacks.errors import UsageError
from redishacks.timeseries import TimeSeries

DAY = 86_400
#: One of them does not fit where two others are: sums near 2^63.
HUGE = 2**53 - 1
#: The amounts of one kind after the other need more bytes.
AMOUNTS = [[1, 2], [1, 200], [300, 60_000], [1, 2**31], [2**33, 2**40], [-7, 5], [-(2**45), 2**45]]
#: How long ago: what some resolutions have no more, but none of them by a hair.
AGES = [0, 0, 0, 40, 3000, DAY, 3 * DAY, 10 * DAY, 40 * DAY, 500 * DAY]


def note(file: int, what: Any) -> None:
    """Write a line that outlives us."""
    os.write(file, json.dumps(what).encode() + b"\n")


def write(url: str, prefix: str, me: str, now: int, path: str) -> None:
    """Count for ever: in buckets that others count in too, and in one series of our own.

    A call that is applied leaves 1 more in that, in the same script.
    """
    rng = random.Random(me)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    series = TimeSeries(url, "hits", prefix=prefix, deadline=20)
    for n in range(10**9):
        some = AMOUNTS[n % 100 // 15]
        hits = [
            (f"a{n // 100}", rng.choice(some), now - rng.choice(AGES))
            for _ in range(rng.randrange(4))
        ]
        if rng.random() < 0.2:
            hits.append(("full", rng.choice([HUGE, HUGE, -HUGE]), now))
        hits.append((me, 1, now))
        note(file, {"n": n, "hits": hits})
        try:
            series.incr_many(hits)
        except UsageError:  # nothing else can be wrong with it but that "full" is
            note(file, "refused")
        else:
            note(file, "counted")


def linger(url: str, prefix: str, me: str, now: int, path: str) -> None:
    """Count for ever while lingering; now and then send, and note that it was done."""
    rng = random.Random(me)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    series = TimeSeries(url, "hits", prefix=prefix, deadline=20, linger=0.002)
    for n in range(10**9):
        note(file, {"n": n})
        series.incr(me, at=now - n % 7 * 10)
        series.incr(f"a{n // 100}", rng.choice(AMOUNTS[n % 100 // 15]), at=now)
        if n % 20 == 19:
            series.send()
            note(file, "sent")
        time.sleep(0.0002)
