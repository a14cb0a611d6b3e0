"""The shape of the package: twins stay alike, imports point down and stay light."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from redishacks._sink import AsyncSink, Sink
from redishacks.counters import AsyncBufferedCounter, AsyncFlushJob, BufferedCounter, FlushJob
from redishacks.locks import (
    AsyncHeld,
    AsyncLock,
    AsyncMultiHeld,
    AsyncMultiLock,
    AsyncRWLock,
    AsyncSemaphore,
    Held,
    Lock,
    MultiHeld,
    MultiLock,
    RWLock,
    Semaphore,
)
from redishacks.ratelimit import (
    AsyncConcurrencyLimiter,
    AsyncRateLimiter,
    ConcurrencyLimiter,
    RateLimiter,
)
from redishacks.sinks import AsyncPostgresSink, PostgresSink, SQLiteSink
from redishacks.timeseries import (
    AsyncDistinctSeries,
    AsyncGaugeSeries,
    AsyncLatencySeries,
    AsyncTimeSeries,
    AsyncTopSeries,
    DistinctSeries,
    GaugeSeries,
    LatencySeries,
    TimeSeries,
    TopSeries,
)

PACKAGE = Path(__file__).parents[1] / "redishacks"

#: What each layer may not import: those above it, and its neighbours.
LAYERS = [
    {"errors", "_keys", "_units", "_slots", "_words", "_clock"},
    {"_command", "_sink"},
    {"_buffer", "_breaker"},
    {"_drive", "_errands"},
    {"_transport"},
    {"_linger", "_wake"},
    {"counters", "sinks", "ratelimit", "locks", "timeseries", "router"},
    {"testing", "web"},
    {"doctor", "demo"},
    {"cli", "__main__"},
]
PAIRS = [
    (BufferedCounter, AsyncBufferedCounter),
    (FlushJob, AsyncFlushJob),
    (PostgresSink, AsyncPostgresSink),
    (PostgresSink, SQLiteSink),
    (Sink, AsyncSink),
    (RateLimiter, AsyncRateLimiter),
    (ConcurrencyLimiter, AsyncConcurrencyLimiter),
    (Lock, AsyncLock),
    (Held, AsyncHeld),
    (Semaphore, AsyncSemaphore),
    (RWLock, AsyncRWLock),
    (MultiLock, AsyncMultiLock),
    (MultiHeld, AsyncMultiHeld),
    (TimeSeries, AsyncTimeSeries),
    (DistinctSeries, AsyncDistinctSeries),
    (GaugeSeries, AsyncGaugeSeries),
    (LatencySeries, AsyncLatencySeries),
    (TopSeries, AsyncTopSeries),
]


def shape(kind: type) -> dict[str, list[tuple[str, Any]]]:
    """Return the public methods, with their parameters and defaults."""
    found = {}
    for name, value in inspect.getmembers(kind, inspect.isfunction):
        if name == "__init__" or not name.startswith("_"):
            name = name.removeprefix("a") if name == "aclose" else name
            parameters = list(inspect.signature(value).parameters.values())[1:]
            found[name] = [(p.name, p.default) for p in parameters if p.name != "target"]
    return found


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda kind: kind.__name__)
def test_twins_are_alike(one: type, other: type) -> None:
    """Twins have the same methods, parameters and defaults."""
    assert shape(one) == shape(other)


@pytest.mark.parametrize("kind", [AsyncBufferedCounter, AsyncFlushJob, AsyncPostgresSink])
def test_async_methods_are_coroutines(kind: type) -> None:
    """What does I/O in the sync twin is awaited in the async one."""
    does_no_io = {"__init__", "stop", "so_far", "flush_steps", "value_steps", "destination", "ddl"}
    for name, value in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_") and name not in does_no_io:
            assert inspect.iscoroutinefunction(value), name


def imports(path: Path) -> set[str]:
    """Return the parts of the package that a module imports when it is imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "redishacks":
                names = [f"redishacks.{a.name}" for a in node.names if a.name != "__version__"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("redishacks.")}
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_down(path: Path) -> None:
    """A module imports only from its own part of the package and from layers below."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        assert imports(path) == {"errors"}
        return
    level = next(i for i, layer in enumerate(LAYERS) if part in layer)
    allowed = set().union(*LAYERS[:level], {part})
    if level < 2:
        allowed |= LAYERS[level]
    assert imports(path) <= allowed


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("redishacks", "redis hiredis asyncio psycopg sqlite3 click rich"),
        ("redishacks.counters", "psycopg sqlite3 click rich redishacks.sinks pytest"),
        ("redishacks.sinks", "psycopg sqlite3 redis click rich redishacks.counters"),
        ("redishacks.testing.fixtures", "redis psycopg hiredis"),
    ],
)
def test_imports_are_light(module: str, unwanted: str) -> None:
    """Importing a tool brings no database driver, no terminal library and no other tool."""
    code = f"import sys, {module}; print(*(set(sys.modules) & set({unwanted.split()!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_importing_starts_nothing() -> None:
    """No thread, no connection and no process by an import alone."""
    code = (
        "import threading, redishacks.counters, redishacks.sinks, redishacks.testing, "
        "redishacks.doctor; print(threading.active_count())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1"]
