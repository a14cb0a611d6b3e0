"""Measuring contenders side by side.

A contender does a known number of operations per round. Rounds of all contenders alternate, in ever
another order, so that a noisy moment hits everybody; the figures are medians over rounds, and
ratios are medians of the ratios of each round.
"""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import redis

#: Commands that contenders send and no script of ours calls.
SENT = ("evalsha", "eval", "multi", "exec")


class Figure(NamedTuple):
    """What a contender did: medians over rounds."""

    name: str
    #: Operations per second.
    rate: float
    #: Commands the server saw and round trips made per operation; None where it was not counted.
    commands: float | None = None
    #: Operations per second of every round, in order.
    rates: Sequence[float] = ()


class Row(NamedTuple):
    """One line of the table: what was measured, the figures, the target and whether it was met."""

    what: str
    ours: str
    against: str
    target: str
    measured: str
    met: bool


def side_by_side(
    contenders: Mapping[str, Callable[[], int]],
    *,
    rounds: int = 7,
    watch: redis.Redis | None = None,
) -> dict[str, Figure]:
    """Run every contender `rounds` times in turn; each returns how many operations it did.

    With `watch`, a client of the server they use, commands per operation are counted as well.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    commands: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()  # warm up: connections, scripts, caches
    order, shuffle = list(contenders), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # who comes after one that is always busy gets less of a machine
        for name in order:
            before = processed(watch)
            began = time.perf_counter()
            operations = contenders[name]()
            rates[name].append(operations / (time.perf_counter() - began))
            if watch is not None:
                commands[name].append((processed(watch) - before) / operations)
    return {
        name: Figure(
            name,
            statistics.median(rates[name]),
            statistics.median(commands[name]) if watch is not None else None,
            rates[name],
        )
        for name in contenders
    }


def processed(client: redis.Redis | None) -> int:
    """Return how many commands clients have sent; those that scripts call are not among them."""
    if client is None:
        return 0
    stats: Any = client.info("commandstats")
    calls = {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in SENT}
    return int(sum(calls.values()))


def ratio_row(
    what: str, figures: Mapping[str, Figure], ours: str, peer: str, target: float, unit: str = "/s"
) -> Row:
    """Make a row of a ratio of rates."""
    a, b = figures[ours], figures[peer]
    # Within a round both had the same machine; its speed may change from one to the next.
    ratio = statistics.median(x / y for x, y in zip(a.rates, b.rates, strict=True))
    return Row(
        what,
        f"{a.rate:,.0f}{unit}",
        f"{b.rate:,.0f}{unit}",
        f"{target:g}×",
        f"{ratio:.2f}×",
        ratio >= target,
    )


def limit_row(what: str, value: float, limit: float, unit: str, peer: str = "") -> Row:
    """Make a row of a figure that must stay below a limit."""
    shown = f"{value:,.1f} {unit}"
    return Row(what, shown, peer, f"< {limit:g} {unit}", shown, value < limit)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of all does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def show(figures: Mapping[str, Figure]) -> None:
    """Print what each contender did."""
    for figure in sorted(figures.values(), key=lambda figure: -figure.rate):
        print(f"  {figure.name}: {figure.rate:,.0f}/s")


def machine(server: redis.Redis | None = None) -> str:
    """Describe where the figures come from."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    parts = [
        f"{os.cpu_count()} cores {models[0] if models else platform.machine()}",
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in ("redis", "hiredis", "psycopg")),
    ]
    if server is not None:
        info: Any = server.info("server")
        name = info.get("server_name", "redis")
        parts.append(f"{name} {info.get('valkey_version', info['redis_version'])}")
    return ", ".join(parts)


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| what | redishacks | peer | target | measured |", "|---|---|---|---|---|"]
    for row in rows:
        mark = "" if row.met else " (missed)"
        lines.append(
            f"| {row.what} | {row.ours} | {row.against} | {row.target} | {row.measured}{mark} |"
        )
    return "\n".join(lines)
