"""Processes that take a lock again and again, and write down what they saw.

Each line of the log tells something new about one attempt, and is written at once: what a killed
process did until then is there. All stamps are of one clock of the machine.

While it holds the lock an attempt adds one to two counters, each with a read, a pause and a write:
one with plain commands, one with `held.transaction()`. A counter's value also names who wrote it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from redishacks.errors import MaybeAppliedError, UnavailableError
from redishacks.locks import AsyncLock, Lock, LockedError, LockLostError
from tests import workers

multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["tests.workers", "tests.lock_workers"]
)

#: The name of the lock, and of what it guards.
LOCK = "h"
COUNTERS = ("plain", "safe")


def clock() -> float:
    """Return seconds of the clock that leases are measured with."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# What is written down


class Write(NamedTuple):
    """An attempt's write to a counter."""

    old: str | None
    new: str
    #: "yes", "no", or "maybe" when the answer was lost, or the writer killed.
    done: str
    #: The handle said after the answer that the lock was held.
    held: bool = False


@dataclass
class Attempt:
    """What is known about one attempt to hold the lock."""

    pid: int
    thread: str
    number: int
    asked: float = 0.0
    #: Seconds that it was willing to wait.
    patience: float = 0.0
    #: When `acquire` came back, None when it never did.
    answered: float | None = None
    #: What it raised, "" when the lock was acquired.
    refused: str = ""
    token: str = ""
    fence: int = 0
    #: When the lease ended, as the handle knew it last.
    until: float = 0.0
    #: When the release was called, and when it came back.
    releasing: float | None = None
    released: float | None = None
    #: The handle said before the release that the lock was held.
    believed: bool = False
    #: The release said that the lock had been lost.
    lost: bool = False
    plain: Write | None = None
    safe: Write | None = None
    #: Where it stopped its own process: "before" its transaction, or "within".
    stops: str = ""

    @property
    def acquired(self) -> bool:
        """Whether it got the lock."""
        return self.answered is not None and not self.refused

    @property
    def who(self) -> str:
        """Names it, for messages."""
        return f"{self.pid}/{self.thread}#{self.number}"


class Log:
    """A file that many processes write lines to."""

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(self, thread: str, number: int, **news: Any) -> None:
        """Write a line down."""
        line = json.dumps({"pid": os.getpid(), "thread": thread, "number": number, **news})
        os.write(self._file, b"\n" + line.encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_log(path: Path) -> list[Attempt]:
    """Put the lines of each attempt together."""
    found: dict[tuple[int, str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        if not line.endswith("}"):  # somebody is writing it now, or was killed meanwhile
            continue
        news = json.loads(line)
        for counter in news.keys() & set(COUNTERS):
            news[counter] = Write(*news[counter])
        found.setdefault((news["pid"], news["thread"], news["number"]), {}).update(news)
    return [Attempt(**fields) for fields in found.values() if fields["number"]]


# Who writes


def counter_key(prefix: str, counter: str) -> str:
    """Return the key of a counter, in the lock's slot."""
    return f"{prefix}:{{{LOCK}}}:{counter}"


@dataclass(frozen=True)
class Plan:
    """What a worker is to do."""

    url: str
    prefix: str
    #: The log. Work begins when there is a file ".go" next to it, and ends with a file ".end".
    log: str = ""
    seed: str = ""
    colour: str = "sync"
    #: For the lock.
    options: dict[str, Any] = field(default_factory=dict)
    #: Threads or tasks.
    crowd: int = 2
    patience: float = 5.0
    #: Seconds between read and write, at least and at most.
    hold: tuple[float, float] = (0.002, 0.008)
    #: How often it stops itself while it holds the lock, and extends its lease.
    stops: float = 0.0
    extends: float = 0.2

    def mark(self, what: str) -> Path:
        """Return a file that says whether to begin, or to end."""
        return Path(f"{self.log}.{what}")


def start(plan: Plan) -> ForkServerProcess:
    """Start a worker."""
    return workers.start(work, asdict(plan))


def work(settings: dict[str, Any]) -> None:
    """Take the lock again and again."""
    plan = Plan(**settings)
    log = Log(plan.log)
    log.say("main", 0)
    while not plan.mark("go").exists():
        time.sleep(0.002)
    if plan.colour == "async":
        asyncio.run(_tasks(plan, log))
        return
    party = Party(plan)
    with ThreadPoolExecutor(plan.crowd) as pool:
        turns = [pool.submit(plainly, take_turns(party, plan, log, n)) for n in range(plan.crowd)]
        for turn in turns:
            turn.result()


async def _tasks(plan: Plan, log: Log) -> None:
    party = AsyncParty(plan)
    async with asyncio.TaskGroup() as group:
        for n in range(plan.crowd):
            group.create_task(take_turns(party, plan, log, n))


def plainly(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits for a loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("a sync worker awaited something")


#: This attempt is to stop the process between its transaction's last look and EXEC.
_stops_there: contextvars.ContextVar[bool] = contextvars.ContextVar("stops", default=False)


def _stop_here() -> None:
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _stopping(client: Any) -> Any:
    """Have a client's pipelines stop the process before EXEC, where an attempt wants that."""
    make = client.pipeline

    def pipeline(*args: Any, **options: Any) -> Any:
        pipe = make(*args, **options)
        execute = pipe.execute

        def stop_and_execute(*args: Any, **options: Any) -> Any:
            if _stops_there.get():
                _stops_there.set(False)
                _stop_here()
            return execute(*args, **options)

        pipe.execute = stop_and_execute
        return pipe

    client.pipeline = pipeline
    return client


class Party:
    """One lock and its counters, for threads; its methods can be awaited like the other's."""

    kind: Any = Lock

    def __init__(self, plan: Plan) -> None:
        self.client: Any = _stopping(self.connect(plan.url))
        self.lock: Any = self.kind(self.client, LOCK, prefix=plan.prefix, **plan.options)
        self.keys = [counter_key(plan.prefix, name) for name in COUNTERS]

    def connect(self, url: str) -> Any:
        """Return a client that says nothing twice."""
        return redis.Redis.from_url(url, socket_timeout=1, retry=Retry(NoBackoff(), 0))

    async def acquire(self, wait: float) -> Any:
        """Take the lock."""
        return self.lock.acquire(wait=wait)

    async def release(self, held: Any) -> None:
        """Give it back."""
        held.release()

    async def extend(self, held: Any) -> None:
        """Begin its lease anew."""
        held.extend()

    async def read(self) -> Any:
        """Read both counters."""
        return self.client.mget(self.keys)

    async def write(self, new: str) -> None:
        """Write the first with a plain command."""
        self.client.set(self.keys[0], new)

    async def write_safely(self, held: Any, new: str) -> None:
        """Write the second only while the lock is held."""
        with held.transaction() as pipe:
            pipe.set(self.keys[1], new)

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)  # noqa: ASYNC251

    async def aclose(self) -> None:
        """Close the client."""
        self.client.close()


class AsyncParty(Party):
    """The same for tasks."""

    kind = AsyncLock

    def connect(self, url: str) -> Any:
        """Return a client that says nothing twice."""
        retry = AsyncRetry(NoBackoff(), 0)
        return redis.asyncio.Redis.from_url(url, socket_timeout=1, retry=retry)

    async def acquire(self, wait: float) -> Any:
        """Take the lock."""
        return await self.lock.acquire(wait=wait)

    async def release(self, held: Any) -> None:
        """Give it back."""
        await held.release()

    async def extend(self, held: Any) -> None:
        """Begin its lease anew."""
        await held.extend()

    async def read(self) -> Any:
        """Read both counters."""
        return await self.client.mget(self.keys)

    async def write(self, new: str) -> None:
        """Write the first with a plain command."""
        await self.client.set(self.keys[0], new)

    async def write_safely(self, held: Any, new: str) -> None:
        """Write the second only while the lock is held."""
        async with held.transaction() as pipe:
            pipe.set(self.keys[1], new)

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        """Close the client."""
        await self.client.aclose()


async def take_turns(party: Party, plan: Plan, log: Log, n: int) -> None:
    """Take the lock again and again, as one thread or task."""
    rng = random.Random(f"{plan.seed}-{n}")
    number = 0
    while not plan.mark("end").exists():
        number += 1

        def say(number: int = number, **news: Any) -> None:
            log.say(f"{plan.colour}{n}", number, **news)

        say(asked=clock(), patience=plan.patience)
        try:
            held = await party.acquire(plan.patience)
        except (LockedError, UnavailableError) as error:
            say(answered=clock(), refused=type(error).__name__)
            await party.sleep(0.01)
            continue
        say(answered=clock(), token=held.token, fence=held.fence, **lease(held))
        await add_one(party, plan, held, rng, say)
        say(releasing=clock(), believed=held.held, **lease(held))
        lost = False
        try:
            await party.release(held)
        except LockLostError:
            lost = True
        say(released=clock(), lost=lost)


def lease(held: Any) -> dict[str, Any]:
    """Say when the lease ends, not later than the handle knows it; nothing when it has ended."""
    now = clock()
    left = held.remaining
    return {"until": now + left} if left else {}


async def add_one(
    party: Party, plan: Plan, held: Any, rng: random.Random, say: Callable[..., None]
) -> None:
    """Add one to both counters, with a pause between read and write."""
    stops = rng.choice(["before", "within"]) if rng.random() < plan.stops else ""
    try:
        olds = [old if old is None else old.decode() for old in await party.read()]
    except RedisError:
        return
    await party.sleep(rng.uniform(*plan.hold))
    say(stops=stops, **lease(held))
    if stops == "before":
        _stop_here()
    if rng.random() < plan.extends:
        with contextlib.suppress(LockLostError, UnavailableError):
            await party.extend(held)
        say(**lease(held))
    plain, safe = (f"{int((old or '0').split()[0]) + 1} {held.token}" for old in olds)
    done = "yes"
    say(plain=Write(olds[0], plain, "maybe"))
    try:
        await party.write(plain)
    except RedisError:
        done = "maybe"
    say(plain=Write(olds[0], plain, done, held.held))
    done = "yes"
    say(safe=Write(olds[1], safe, "maybe"))
    _stops_there.set(stops == "within")
    try:
        await party.write_safely(held, safe)
    except (LockLostError, UnavailableError):
        done = "no"
    except MaybeAppliedError:
        done = "maybe"
    say(safe=Write(olds[1], safe, done, held.held))
