"""The transport against redis-py's own client, and what a sick server costs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
import redis.asyncio

from benchmarks.harness import Row, limit_row, ratio_row, side_by_side
from redishacks._command import Command, Script
from redishacks._transport import connect, connect_async
from redishacks.errors import RedisHacksError
from redishacks.testing import valkey_cluster, valkey_server

SOURCE = b"return redis.call('INCRBY', KEYS[1], ARGV[1])"
DEADLINE = 0.2


def _command() -> Command[Any]:
    script = Script("bench", SOURCE, hashlib.sha1(SOURCE).hexdigest().encode())
    return Command(("1",), (b"bench",), int, script)


def in_threads(threads: int, work: Callable[[], None]) -> None:
    """Run work in so many threads at once."""
    started = [threading.Thread(target=work) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def sync_contenders(url: str, threads: int, calls: int) -> dict[str, Callable[[], int]]:
    """Return ours and redis-py's, each with so many threads."""
    peer = redis.Redis.from_url(url)
    sha = peer.script_load(SOURCE.decode())
    transport = connect(redis.Redis.from_url(url))
    command = _command()

    def ours() -> None:
        call = transport.call
        for _ in range(calls):
            call(command, 1.0)

    def theirs() -> None:
        for _ in range(calls):
            peer.evalsha(sha, 1, "bench", 1)

    def runner(work: Callable[[], None]) -> Callable[[], int]:
        def run() -> int:
            if threads == 1:
                work()
            else:
                in_threads(threads, work)
            return threads * calls

        return run

    return {"ours": runner(ours), "redis-py": runner(theirs)}


def async_contenders(
    url: str, tasks: int, calls: int, runner: asyncio.Runner
) -> dict[str, Callable[[], int]]:
    """Return ours and redis-py's, each with so many tasks."""
    transport = connect_async(redis.asyncio.Redis.from_url(url))
    peer = redis.asyncio.Redis.from_url(url)
    sha = hashlib.sha1(SOURCE).hexdigest()

    async def load() -> None:
        await peer.script_load(SOURCE.decode())

    runner.run(load())
    command = _command()

    async def ours() -> None:
        for _ in range(calls):
            await transport.call(command, 1.0)

    async def theirs() -> None:
        for _ in range(calls):
            await peer.evalsha(sha, 1, "bench", 1)

    async def gather(work: Any) -> None:
        await asyncio.gather(*(work() for _ in range(tasks)))

    def runs(work: Any) -> Callable[[], int]:
        def run() -> int:
            runner.run(gather(work))
            return tasks * calls

        return run

    return {"ours": runs(ours), "redis-py": runs(theirs)}


def overshoot(call: Callable[[], Any]) -> float:
    """Return how many milliseconds beyond the deadline a call took, which must fail."""
    began = time.perf_counter()
    with contextlib.suppress(RedisHacksError):
        call()
    return (time.perf_counter() - began - DEADLINE) * 1000


def hung() -> list[Row]:
    """A server that was stopped: sync, async, cluster; and one that refuses."""
    rows = []
    command = _command()
    with valkey_server() as server:
        transport = connect(server.url)
        transport.call(command, 1.0)
        with server.paused():
            values = [overshoot(lambda: transport.call(command, DEADLINE)) for _ in range(5)]
            peer = patience(redis.Redis.from_url(server.url))
        rows.append(
            limit_row("hung server, sync: beyond the deadline", max(values), 50, "ms", peer)
        )
        with asyncio.Runner() as runner:
            atransport = connect_async(server.url)
            runner.run(atransport.call(command, 1.0))
            with server.paused():
                values = [
                    overshoot(lambda: runner.run(atransport.call(command, DEADLINE)))
                    for _ in range(5)
                ]
            runner.run(atransport.aclose())
        rows.append(limit_row("hung server, async: beyond the deadline", max(values), 50, "ms"))
    with valkey_cluster() as cluster:
        transport = connect(cluster.client())
        transport.call(command, 1.0)
        with contextlib.ExitStack() as stack:
            for node in cluster.nodes:
                stack.enter_context(node.paused())
            values = [overshoot(lambda: transport.call(command, DEADLINE)) for _ in range(5)]
        rows.append(limit_row("hung cluster: beyond the deadline", max(values), 50, "ms"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    times = []
    for _ in range(5):
        refused = connect(redis.Redis(port=port))
        began = time.perf_counter()
        with contextlib.suppress(RedisHacksError):
            refused.call(command, DEADLINE)
        times.append((time.perf_counter() - began) * 1000)
    rows.append(limit_row("refused connection", statistics.median(times), 20, "ms"))
    return rows


def patience(client: redis.Redis, limit: float = 12.0) -> str:
    """Say how long redis-py's defaults keep a caller waiting, up to a limit."""
    done = threading.Event()

    def call() -> None:
        with contextlib.suppress(redis.RedisError):
            client.incr("bench")
        done.set()

    began = time.perf_counter()
    threading.Thread(target=call, daemon=True).start()
    if done.wait(limit):
        return f"redis-py: {time.perf_counter() - began:.1f} s"
    return f"redis-py: over {limit:.0f} s"


def run() -> list[Row]:
    """Run all of it."""
    rows = []
    with valkey_server() as server:
        for threads, calls, target in ((1, 5000, 1.3), (8, 1000, 3.5)):
            # A unix socket: on loopback TCP the kernel's wake-ups take most of the time.
            figures = side_by_side(sync_contenders(server.unix_url, threads, calls))
            what = f"one EVALSHA over a unix socket, {threads} thread" + "s" * (threads > 1)
            rows.append(ratio_row(what, figures, "ours", "redis-py", target))
        with asyncio.Runner() as runner:
            for tasks, calls, target in ((1, 4000, 1.0), (100, 100, 6.0)):
                figures = side_by_side(async_contenders(server.unix_url, tasks, calls, runner))
                what = f"one EVALSHA over a unix socket, {tasks} asyncio task" + "s" * (tasks > 1)
                rows.append(ratio_row(what, figures, "ours", "redis-py", target))
    return rows + hung()
