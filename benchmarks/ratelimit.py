"""Rate limits against limits, throttled-py, pyrate-limiter and the talk's code.

All use one server over its unix socket, each through the storage that its documentation shows, and
the same keys in turn. No limit is reached while decisions are timed, and our windows have all their
sub-buckets in use: as slow as they get.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import operator
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Literal

import limits
import limits.aio
import pyrate_limiter
import redis
import throttled

from benchmarks.harness import Figure, Row, limit_row, percentile, ratio_row, show, side_by_side
from benchmarks.transport import in_threads
from redishacks.ratelimit import AsyncRateLimiter, Limit, RateLimiter
from redishacks.testing import Server, valkey_server

KEYS = [f"user:{i:019d}" for i in range(100)]
AMOUNT = 1_000_000
HOUR = Limit(AMOUNT, 3600)
THREE = (Limit(AMOUNT, 1), Limit(AMOUNT, 60), HOUR)
HOURLY = limits.RateLimitItemPerHour(AMOUNT)
THREE_PEER = (limits.RateLimitItemPerSecond(AMOUNT), limits.RateLimitItemPerMinute(AMOUNT), HOURLY)

DEADLINE = 0.05
#: Patience of limiters whose answers are timed: a busy machine must not turn one into an error.
PATIENT = 5.0
WAITERS, PROCESSES, RATE = 50, 4, 50
#: Many short rounds: the speed of a shared machine changes within a second.
ROUNDS = 25

Hit = Callable[[str], object]
Work = Callable[[str], Awaitable[None]]


# Contenders


class PerKey(pyrate_limiter.BucketFactory):
    """A bucket for each key, made when it is first seen."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._buckets: dict[str, pyrate_limiter.AbstractBucket] = {}

    def wrap_item(self, name: str, weight: int = 1) -> pyrate_limiter.RateItem:
        """Stamp an item with the client's clock."""
        return pyrate_limiter.RateItem(name, time.time_ns() // 1_000_000, weight=weight)

    def get(self, item: pyrate_limiter.RateItem) -> pyrate_limiter.AbstractBucket:
        """Return the bucket of a key."""
        bucket = self._buckets.get(item.name)
        if bucket is None:
            rates = [pyrate_limiter.Rate(AMOUNT, pyrate_limiter.Duration.HOUR)]
            made: Any = pyrate_limiter.RedisBucket.init(rates, self._client, f"pyrate:{item.name}")
            self.schedule_leak(made)
            bucket = self._buckets[item.name] = made
        return bucket


def talk(client: redis.Redis) -> Hit:
    """Return the talk's code, with whole minutes."""

    def hit(key: str) -> bool:
        name = f"{key}:{int(time.time()) // 60}"
        pipe = client.pipeline()
        pipe.incr(name)
        pipe.expire(name, 60)
        return int(pipe.execute()[0]) <= AMOUNT

    return hit


def limits_hits(url: str) -> dict[str, Hit]:
    """Return hits of limits: bare, and with the numbers that headers need."""
    storage = limits.storage.RedisStorage(url.replace("unix://", "redis+unix://"))
    hits: dict[str, Hit] = {}
    for name, strategy in (
        ("limits fixed", limits.strategies.FixedWindowRateLimiter(storage)),
        ("limits sliding", limits.strategies.SlidingWindowCounterRateLimiter(storage)),
    ):

        def hit(key: str, strategy: limits.strategies.RateLimiter = strategy) -> bool:
            return strategy.hit(HOURLY, key)

        def stats(key: str, strategy: limits.strategies.RateLimiter = strategy) -> object:
            return strategy.hit(HOURLY, key), strategy.get_window_stats(HOURLY, key)

        hits[f"{name}, hit"] = hit
        hits[f"{name}, hit and stats"] = stats
    return hits


def limits_three(url: str) -> Hit:
    """Return three limits in a row, of the faster strategy."""
    storage = limits.storage.RedisStorage(url.replace("unix://", "redis+unix://"))
    strategy = limits.strategies.FixedWindowRateLimiter(storage)

    def hit(key: str) -> bool:
        return all(strategy.hit(item, key) for item in THREE_PEER)

    return hit


def limits_tasks(url: str, calls: int) -> dict[str, Work]:
    """Return what a task does with limits.aio: its default client if that is there, and redis-py's.

    coredis asks for versions of other packages that not every environment can have.
    """
    works: dict[str, Work] = {}
    address = url.replace("unix://", "async+redis+unix://")
    clients: tuple[Literal["redispy", "coredis"], ...] = ("redispy", "coredis")
    for client in clients:
        try:
            storage = limits.aio.storage.RedisStorage(address, implementation=client)
        except limits.errors.ConfigurationError:
            continue
        strategy = limits.aio.strategies.FixedWindowRateLimiter(storage)

        async def work(key: str, strategy: limits.aio.strategies.RateLimiter = strategy) -> None:
            for _ in range(calls):
                await strategy.hit(HOURLY, key)

        works[f"limits.aio fixed by {client}, hit"] = work
    return works


def throttled_hits(url: str) -> dict[str, Hit]:
    """Return hits of throttled-py."""
    store = throttled.store.RedisStore(server=url)
    quota = throttled.per_hour(AMOUNT)
    kinds = {
        "throttled-py fixed": throttled.RateLimiterType.FIXED_WINDOW,
        "throttled-py sliding": throttled.RateLimiterType.SLIDING_WINDOW,
        "throttled-py gcra": throttled.RateLimiterType.GCRA,
    }
    return {
        name: throttled.Throttled(using=kind.value, quota=quota, store=store).limit
        for name, kind in kinds.items()
    }


@contextlib.contextmanager
def pyrate_hit(client: redis.Redis) -> Iterator[Hit]:
    """Give the hit of pyrate-limiter; its thread ends with the `with`."""
    with pyrate_limiter.Limiter(PerKey(client)) as limiter:

        def hit(key: str) -> object:
            return limiter.try_acquire(key, blocking=False)

        yield hit


def rounds_of(hits: dict[str, Hit], threads: int, calls: int) -> dict[str, Callable[[], int]]:
    """Return contenders that hit so often in each of so many threads."""

    def contender(hit: Hit) -> Callable[[], int]:
        def work() -> None:
            for i in range(calls):
                hit(KEYS[i % len(KEYS)])

        def run() -> int:
            if threads == 1:
                work()
            else:
                in_threads(threads, work)
            return threads * calls

        return run

    return {name: contender(hit) for name, hit in hits.items()}


def fastest(figures: dict[str, Figure], names: Sequence[str]) -> str:
    """Return which of these was the fastest."""
    return max(names, key=lambda name: figures[name].rate)


def at_least(what: str, value: float, target: float, unit: str) -> Row:
    """Make a row of a figure that must reach a target."""
    shown = f"{value:,.0f}{unit}"
    return Row(what, shown, "", f"{target:,.0f}{unit}", shown, value >= target)


# Windows that are in full use


def fill(limiter: RateLimiter, key: str, units: int) -> bytes:
    """Charge units all over the sub-buckets of a window; return the Redis key that holds them."""
    limit = limiter.limits[0]
    question = limiter.layout.question(key, (limit,))
    now = limiter.transport.call(limiter.layout.decide(question, "peek"), PATIENT)[0]
    places = limit.buckets + 1
    each, more = divmod(units, places)
    # What is left over goes from the oldest to the newest, as evenly as it can.
    extra = {i * (places - 1) // max(1, more - 1) for i in range(more)}
    for place in range(places):
        if charge := each + (place in extra):
            at = now - (limit.buckets - place) * limit.bucket_micros
            hit = limiter.layout.decide(question, "hit", charge)
            limiter.transport.call(hit._replace(args=(*hit.args, str(at))), PATIENT)
    return question.keys[0]


def size_of(watch: redis.Redis, key: bytes) -> int:
    """Return the bytes of a key and its value."""
    size: Any = watch.memory_usage(key, samples=0)
    return int(size)


def on_the_wire(watch: redis.Redis, hit: Hit, times: int = 100) -> float:
    """Return how many commands come from clients for each hit; those of scripts are not counted."""
    hit(KEYS[0])
    listening: Any = watch
    with listening.monitor() as monitor:
        watch.echo("begin")
        for i in range(times):
            hit(KEYS[i % len(KEYS)])
        watch.echo("end")
        commands = map(operator.itemgetter("client_type", "command"), monitor.listen())
        for _, command in commands:
            if command == "ECHO begin":
                break
        seen = itertools.takewhile(lambda pair: pair[1] != "ECHO end", commands)
        count = len([kind for kind, _ in seen if kind != "lua"])
    return count / times


# Rows


def single(url: str) -> list[Row]:
    """One limit per decision, then three."""
    rows = []
    client = redis.Redis.from_url(url)
    limiter = RateLimiter(url, "one", HOUR, deadline=PATIENT)
    three = RateLimiter(url, "three", *THREE, deadline=PATIENT)
    for key in KEYS:
        fill(limiter, key, AMOUNT // 10)
    with pyrate_hit(client) as pyrate:
        stats = limits_hits(url)
        others = {"pyrate-limiter": pyrate, "the talk": talk(client), **throttled_hits(url)}
        hits = {"ours": limiter.hit, **stats, **others}
        figures = side_by_side(rounds_of(hits, threads=1, calls=300), rounds=ROUNDS)
        show(figures)
    what = "decision with all numbers, 1 thread"
    full = [name for name in stats if name.endswith("stats")]
    bare = [name for name in hits if name not in ("ours", "throttled-py fixed", *full)]
    for names, target in ((full, 2.5), (["throttled-py fixed"], 1.1), (bare, 1.3)):
        peer = fastest(figures, names)
        rows.append(ratio_row(f"{what}; {peer}", figures, "ours", peer, target))

    hits = {"ours": limiter.hit, **{name: stats[name] for name in full}}
    figures = side_by_side(rounds_of(hits, threads=8, calls=400), rounds=9)
    show(figures)
    peer = fastest(figures, full)
    rows.append(ratio_row(f"the same, 8 threads; {peer}", figures, "ours", peer, 6))

    for threads, calls, rounds, target in ((1, 300, ROUNDS, 3), (8, 400, 9, 6)):
        hits = {"ours": three.hit, "limits": limits_three(url)}
        figures = side_by_side(rounds_of(hits, threads, calls), rounds=rounds)
        what = f"three limits at once, {threads} thread" + "s" * (threads > 1)
        rows.append(
            ratio_row(f"{what}; limits fixed, three hits", figures, "ours", "limits", target)
        )
    return rows


def many_tasks(url: str) -> list[Row]:
    """A hundred asyncio tasks."""
    tasks, calls = 100, 10
    limiter = AsyncRateLimiter(url, "tasks", HOUR, deadline=PATIENT)

    async def ours(key: str) -> None:
        for _ in range(calls):
            await limiter.hit(key)

    works = {"ours": ours, **limits_tasks(url, calls)}
    with asyncio.Runner() as runner:

        async def gather(work: Work) -> None:
            await asyncio.gather(*(work(key) for key in KEYS[:tasks]))

        def contender(work: Work) -> Callable[[], int]:
            def run() -> int:
                runner.run(gather(work))
                return tasks * calls

            return run

        contenders = {name: contender(work) for name, work in works.items()}
        figures = side_by_side(contenders, rounds=ROUNDS)
        runner.run(limiter.aclose())
    show(figures)
    peer = fastest(figures, [name for name in works if name != "ours"])
    what = f"decision with all numbers, 100 asyncio tasks; {peer}"
    return [ratio_row(what, figures, "ours", peer, 4)]


def refused(url: str) -> list[Row]:
    """A key that was refused."""
    with contextlib.closing(RateLimiter(url, "refused", Limit(1, 3600), deadline=PATIENT)) as one:
        assert one.hit(KEYS[0])
        assert not one.hit(KEYS[0])
        figure = side_by_side({"ours": hot(one.hit, 200_000)})["ours"]
    return [at_least("a key already refused", figure.rate, 2_000_000, "/s")]


def leased(url: str) -> list[Row]:
    """A hot key with leases."""
    sizes: tuple[int | Literal["auto"], ...] = (50, 500, "auto")
    rows = []
    with contextlib.ExitStack() as stack:
        contenders = {}
        for size in sizes:
            limiter = RateLimiter(
                url, f"hot-{size}", Limit(10**9, 3600), lease=size, deadline=PATIENT
            )
            stack.enter_context(contextlib.closing(limiter))
            contenders[f"leases of {size}"] = hot(limiter.hit, 20_000)
        peer = hot(limits_hits(url)["limits fixed, hit"], 500)
        figures = side_by_side({**contenders, "limits": peer}, rounds=ROUNDS)
    for name in contenders:
        what = f"a hot key with {name}, one process; limits fixed, hit"
        rows.append(ratio_row(what, figures, name, "limits", 40))
    return rows


def hot(hit: Hit, calls: int) -> Callable[[], int]:
    """Return a contender that hits one key only."""

    def run() -> int:
        for _ in range(calls):
            hit(KEYS[0])
        return calls

    return run


def on_the_server(url: str) -> list[Row]:
    """Commands per decision, and bytes per key."""
    watch = redis.Redis.from_url(url)
    commands = on_the_wire(watch, RateLimiter(url, "wire", *THREE, deadline=PATIENT).hit)
    peers = limits_hits(url)
    theirs = min(on_the_wire(watch, hit) for name, hit in peers.items() if name.endswith("stats"))
    rows = [
        Row(
            "commands per decision of three limits; limits, hit and stats of one",
            f"{commands:g}",
            f"{theirs:g}",
            "1",
            f"{commands:g}",
            commands == 1,
        )
    ]
    sizes = []
    for amount in (20, 65_535, 65_536, 10**12):
        for per in (60, 366 * 86_400):
            limiter = RateLimiter(url, "api", Limit(amount, per), deadline=PATIENT)
            each = []
            for key in KEYS[:20]:
                limiter.reset(key)
                each.append(size_of(watch, fill(limiter, key, amount)))
                assert limiter.peek(key).remaining == 0, "the window is not full"
            # An allocator may now and then give more than was asked for.
            sizes.append(statistics.median(each))
            print(f"  {amount:,} per {per:,} s, all sub-buckets in use: {sizes[-1]:g} bytes")
    rows.append(limit_row("bytes per key of 24 bytes, any limit: most", max(sizes), 251, "B"))
    return rows


#: Waiters of one process, which ask at given moments; prints when each asked and was served.
_WAITERS = """
import json, sys, threading, time
from redishacks.ratelimit import Limit, RateLimiter

url, name, rate, *delays = sys.argv[1:]
limiter = RateLimiter(
    url, name, Limit(int(rate), 1, algorithm="gcra", burst=1), deadline=5.0
)
served = []
ready = threading.Barrier(len(delays) + 1)

def wait(delay):
    limiter.peek("warm")  # opens a connection: all hold one at once, since none has gone on yet
    ready.wait()
    begin.wait()
    time.sleep(max(0.0, start + delay - time.monotonic()))
    asked = time.monotonic()
    decision = limiter.wait("key")
    served.append((asked, time.monotonic(), decision.allowed))

begin = threading.Event()
threads = [threading.Thread(target=wait, args=(float(delay),)) for delay in delays]
for thread in threads:
    thread.start()
ready.wait()
print(flush=True)
start = float(sys.stdin.readline())
begin.set()
for thread in threads:
    thread.join()
print(json.dumps(served))
"""


def waiters(url: str, name: str) -> tuple[float, int]:
    """Let 50 wait; return seconds until the last was served, and how many overtook another."""
    # Far enough apart that who asked first is the first at the server, too.
    delays = [i * 0.004 for i in range(WAITERS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WAITERS, url, name, str(RATE)]
            + [str(delay) for delay in delays[first::PROCESSES]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    # The clock of `monotonic` is one for all processes of a machine.
    start = time.monotonic() + 0.1
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    served = sorted(waiter for output in outputs for waiter in json.loads(output))
    assert len(served) == WAITERS
    assert all(allowed for *_, allowed in served)
    ends = [end for _, end, _ in served]
    overtaken = sum(later < earlier for earlier, later in itertools.pairwise(ends))
    return max(ends) - served[0][0], overtaken


def in_line(url: str) -> list[Row]:
    """Fifty waiters over four processes, at 50 per second."""
    runs = [waiters(url, f"line-{i}") for i in range(5)]
    ideal = (WAITERS - 1) / RATE
    seconds = statistics.median(total for total, _ in runs)
    off = abs(seconds / ideal - 1) * 100
    overtaken = statistics.median(overtaken for _, overtaken in runs)
    print("  50 waiters:", ", ".join(f"{total:.4f} s ({n} overtaken)" for total, n in runs))
    return [
        Row(
            f"50 waiters over 4 processes at 50/s: off the ideal {ideal:.2f} s",
            f"{seconds:.4f} s",
            "",
            "2 %, in order",
            f"{off:.2f} %, {overtaken:g} overtaken",
            off <= 2 and overtaken == 0,
        )
    ]


def hung(server: Server) -> list[Row]:
    """A server that was stopped: the first decision of a limiter, and all that follow."""
    first, later = [], []
    for i in range(100):
        # A new one each time: it knows nothing of what the last one has found out.
        limiter = RateLimiter(
            server.unix_url, f"hung-{i}", HOUR, on_error="allow", deadline=DEADLINE
        )
        with contextlib.closing(limiter):
            for key in KEYS[:10]:
                limiter.hit(key)
            with server.paused():
                times = [timed(limiter, key) for key in KEYS[:10]]
        first.append(times[0])
        later += times[1:]
    limit = DEADLINE * 1000 + 5
    return [
        limit_row("hung Redis, first decision: 99th percentile", percentile(first, 0.99), limit,
                  "ms"),
        limit_row("hung Redis, the ones that follow: 99th percentile", percentile(later, 0.99), 1,
                  "ms"),
    ]  # fmt: skip


def timed(limiter: RateLimiter, key: str) -> float:
    """Return how many milliseconds a decision without Redis took."""
    began = time.perf_counter()
    decision = limiter.hit(key)
    took = (time.perf_counter() - began) * 1000
    assert decision.allowed
    assert decision.degraded
    return took


def run() -> list[Row]:
    """Run all of it."""
    with valkey_server() as server:
        url = server.unix_url
        rows = single(url) + many_tasks(url) + refused(url) + leased(url) + on_the_server(url)
        return rows + in_line(url) + hung(server)
