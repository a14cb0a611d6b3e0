"""`Lock` and `AsyncLock` on real servers: what they promise to whoever holds and whoever waits."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import datetime as dt
import functools
import gc
import inspect
import itertools
import logging
import math
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import redis
import redis.asyncio

from redishacks._slots import key_slot
from redishacks.errors import RedisHacksError, ServerError, UnavailableError, UsageError
from redishacks.locks import (
    AsyncLock,
    Holder,
    Lock,
    LockedError,
    LockLostError,
    MultiLock,
    SelfDeadlockError,
    Semaphore,
    _keeper,
)
from redishacks.testing import FaultProxy, Server
from tests.helpers import eventually
from tests.workers import is_stopped, pipe, start

#: Longer than anything here takes on a busy machine.
LONG = 30.0

Events = list[tuple[str, str, float]]


# Who does what: threads or tasks, and other processes


class Person:
    """A thread, or a task, that does as it is told."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop | None) -> None:
        self.name = f"{name}_0"
        self._loop = loop
        if loop is None:
            self._pool = ThreadPoolExecutor(1, name)
        else:
            self._orders: asyncio.Queue[Any] = asyncio.Queue()
            loop.call_soon_threadsafe(self._hire)

    def begins(self, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        """Have it do something, and do not wait for the end."""
        call = functools.partial(function, *args, **options)
        if self._loop is None:
            return self._pool.submit(call)
        future: Future[Any] = Future()
        self._loop.call_soon_threadsafe(self._orders.put_nowait, (future, call))
        return future

    def does(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Have it do something; return or raise what came of it."""
        return self.begins(function, *args, **options).result(LONG)

    def leaves(self) -> None:
        """Be done."""
        if self._loop is None:
            self._pool.shutdown()

    def _hire(self) -> None:
        self._task = asyncio.ensure_future(self._work())
        self._task.set_name(self.name)

    async def _work(self) -> None:
        while True:
            future, call = await self._orders.get()
            try:
                result = call()
                future.set_result(await result if inspect.isawaitable(result) else result)
            except BaseException as error:
                future.set_exception(error)
                if self._task.cancelling():
                    return
            del future, call
            result = None  # whoever asked has it now, and nobody else


class World:
    """Locks of one colour, and people who use them at the same time."""

    def __init__(self, flavour: str, url: str, prefix: str) -> None:
        self.flavour = flavour
        self.url = url
        self.prefix = prefix
        self.raw = redis.Redis.from_url(url, decode_responses=True)
        self._people: list[Person] = []
        self._clients: list[Any] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        if flavour == "async":
            self._up = threading.Event()
            self._thread = threading.Thread(target=lambda: asyncio.run(self._turn()))
            self._thread.start()
            assert self._up.wait(LONG)

    async def _turn(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._up.set()
        await self._end.wait()
        for client in self._clients:
            await client.aclose()

    def person(self, name: str = "ann") -> Person:
        """Return somebody new."""
        self._people.append(Person(name, self._loop))
        return self._people[-1]

    def people(self, count: int) -> list[Person]:
        """Return several."""
        return [self.person(f"p{number}") for number in range(count)]

    def client(self, url: str = "", **options: Any) -> Any:
        """Return a redis-py client of this colour."""
        module: Any = redis.asyncio if self._loop else redis
        self._clients.append(module.Redis.from_url(url or self.url, **options))
        return self._clients[-1]

    def lock(self, name: str = "crazy", *, client: Any = None, **options: Any) -> Any:
        """Return a lock of this colour."""
        kind: Any = AsyncLock if self._loop else Lock
        return kind(client or self.url, name, **{"prefix": self.prefix} | options)

    def locked(self, name: str = "crazy") -> Holder | None:
        """Look who holds a lock."""
        return next(iter(Lock(self.url, name, prefix=self.prefix).holders()), None)

    def force(self, name: str = "crazy") -> bool:
        """Take a lock away from whoever holds it."""
        return Lock(self.url, name, prefix=self.prefix).force_release()

    def key(self, rest: str = "lock", name: str = "crazy") -> str:
        """Return a key of a lock."""
        return f"{self.prefix}:l1:{{{name}}}:{rest}"

    def waiting(self, count: int, name: str = "crazy") -> None:
        """Return when so many stand in line."""
        eventually(lambda: self.raw.zcard(self.key("line", name)) == count)

    @property
    def within(self) -> Callable[[Any, Callable[[Any], Any]], Any]:
        """Call a function in the `with` of something, on what that gives."""
        return _within_async if self._loop else _within

    def close(self) -> None:
        """Send everybody home."""
        for person in self._people:
            person.leaves()
        if self._loop:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(LONG)
        else:
            for client in self._clients:
                client.close()
        self.raw.close()


def _within(manager: Any, body: Callable[[Any], Any]) -> Any:
    with manager as held:
        return body(held)


async def _within_async(manager: Any, body: Callable[[Any], Any]) -> Any:
    async with manager as held:
        result = body(held)
        return await result if inspect.isawaitable(result) else result


class Remote:
    """Another process with a lock, and at most one acquisition of it."""

    def __init__(self) -> None:
        self._ours, theirs = pipe()
        self.process = start(serve, theirs)
        assert self.process.pid is not None
        self.pid = self.process.pid
        self._asked = 0

    def begins(self, order: str, *args: Any, **options: Any) -> None:
        """Have it do something, and do not wait for the end."""
        self._ours.send((order, args, options))
        self._asked += 1

    def result(self) -> Any:
        """Return what came of it: for an error, its name."""
        assert self._ours.poll(LONG)
        self._asked -= 1
        return self._ours.recv()

    def does(self, order: str, *args: Any, **options: Any) -> Any:
        """Have it do something; return what came of it."""
        self.begins(order, *args, **options)
        return self.result()

    def stops(self) -> None:
        """SIGSTOP it."""
        os.kill(self.pid, signal.SIGSTOP)
        self.stopped()

    def stopped(self) -> None:
        """Return when it is stopped."""
        eventually(lambda: is_stopped(self.pid))

    def goes_on(self) -> None:
        """SIGCONT it."""
        os.kill(self.pid, signal.SIGCONT)

    def idle(self) -> bool:
        """Return whether it may be used for something else."""
        return self._asked == 0 and self.process.is_alive() and not is_stopped(self.pid)

    def ends(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.process.join()


class Servant:
    """What a remote process does."""

    lock: Any
    held: Any
    within: Any

    async def use(self, flavour: str, url: str, **options: Any) -> None:
        """Have a lock."""
        self.lock = (AsyncLock if flavour == "async" else Lock)(url, "crazy", **options)
        self.within = _within_async if flavour == "async" else _within

    async def acquire(self, **options: Any) -> tuple[str, int]:
        """Acquire it."""
        self.held = await _value(self.lock.acquire(**options))
        return self.held.token, self.held.fence

    async def adopt(self, token: str) -> tuple[str, int]:
        """Adopt what another has acquired."""
        self.held = await _value(self.lock.adopt(token))
        return self.held.token, self.held.fence

    async def held_now(self) -> bool:
        """Say whether it is held, by the handle."""
        return bool(self.held.held)

    async def release(self) -> None:
        """Release it."""
        await _value(self.held.release())

    async def write(self, key: str, value: str, *, stopping: bool = False) -> Any:
        """Write a key in a transaction; with a stop of the process in the middle."""
        module: Any = redis.asyncio.client if self.within is _within_async else redis.client
        multi = module.Pipeline.multi

        def stop(pipeline: Any) -> None:
            module.Pipeline.multi = multi
            os.kill(os.getpid(), signal.SIGSTOP)
            multi(pipeline)

        if stopping:
            module.Pipeline.multi = stop
        pipe = await _value(self.within(self.held.transaction(), lambda pipe: pipe.set(key, value)))
        return pipe.results


async def _value(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def serve(pipe: Any) -> None:
    """Do in another process what comes through a pipe."""
    servant = Servant()
    with asyncio.Runner() as runner:
        while True:
            order, args, options = pipe.recv()
            try:
                answer: Any = runner.run(getattr(servant, order)(*args, **options))
            except RedisHacksError as error:
                answer = type(error).__name__
            pipe.send(answer)


def tried(attempt: Callable[[str], None], times: int = 4) -> None:
    """Do something until it goes well, with another lock each time.

    For what needs a thread to be there in time: a busy machine may hold up anybody for a while.
    """
    for number in range(times - 1):
        try:
            return attempt(f"crazy{number}")
        except (AssertionError, LockedError, LockLostError):
            continue
    return attempt("crazy")


def renewed(held: Any) -> None:
    """Return when a lease has begun anew."""
    last = held.remaining

    def longer() -> bool:
        nonlocal last
        before, last = last, held.remaining
        return bool(last > before)

    eventually(longer)


def in_child(function: Callable[[], Any]) -> None:
    """Call a function in a forked child; it must return."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status: list[int] = []

    def ended() -> bool:
        pid, code = os.waitpid(child, os.WNOHANG)
        status.append(code)
        return pid == child

    try:
        eventually(ended, LONG)
    except AssertionError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    assert os.waitstatus_to_exitcode(status[-1]) == 0


@pytest.fixture
def world(flavour: str, valkey: Server, prefix: str) -> Iterator[World]:
    """Both colours, with one test body."""
    made = World(flavour, valkey.url, prefix)
    yield made
    made.close()


@pytest.fixture
def ann(world: World) -> Person:
    """Somebody."""
    return world.person("ann")


@pytest.fixture
def bob(world: World) -> Person:
    """Somebody else."""
    return world.person("bob")


@pytest.fixture(scope="module")
def remotes() -> Iterator[list[Remote]]:
    """Keep processes that have nothing to do."""
    idle: list[Remote] = []
    yield idle
    for each in idle:
        each.ends()


@pytest.fixture
def remote(
    flavour: str, valkey: Server, prefix: str, remotes: list[Remote]
) -> Iterator[Callable[..., Remote]]:
    """Have other processes use locks of one colour."""
    used: list[Remote] = []

    def use(**options: Any) -> Remote:
        used.append(remotes.pop() if remotes else Remote())
        used[-1].does("use", flavour, valkey.url, prefix=prefix, **options)
        return used[-1]

    yield use
    for each in used:
        if each.idle():
            remotes.append(each)
        else:
            each.ends()


@pytest.fixture
def calm(flavour: str, quiet: Server, prefix: str) -> Iterator[World]:
    """Both colours on that server."""
    made = World(flavour, quiet.url, prefix)
    yield made
    made.close()


# Acquiring


def test_one_at_a_time(world: World, ann: Person, bob: Person) -> None:
    """Nobody else gets it before the release; the refusal says who has it, and for how long."""
    held = ann.does(world.lock(ttl=60, label="billing run").acquire)
    with pytest.raises(LockedError) as caught:
        bob.does(world.lock().acquire)
    error = caught.value
    assert not isinstance(error, SelfDeadlockError)
    holder = error.holder
    assert holder is not None
    assert holder[:4] == (socket.gethostname(), os.getpid(), ann.name, "billing run")
    assert holder.fence == held.fence
    assert abs(holder.since - time.time()) < 10
    assert (error.name, error.remaining) == ("crazy", holder.remaining)
    assert 50 < error.remaining <= 60
    for part in (holder.host, f"process {holder.pid}", holder.thread, holder.label, "crazy"):
        assert part in str(error)
    assert f"for {error.remaining:.3g} s at the most" in str(error)
    ann.does(held.release)
    assert world.locked() is None
    bob.does(world.lock().acquire)


def test_holders(world: World, ann: Person) -> None:
    """Whoever looks sees the holder, and nobody when it is free."""
    lock = world.lock(label="x")
    assert ann.does(lock.holders) == []
    held = ann.does(lock.acquire)
    (holder,) = ann.does(lock.holders)
    assert (holder.fence, holder.label, holder.pid) == (held.fence, "x", os.getpid())
    assert 5 < holder.remaining <= 10
    ann.does(held.release)
    assert ann.does(lock.holders) == []


def test_a_plain_holder_without_a_label(world: World, ann: Person, bob: Person) -> None:
    """Without a label the refusal names process, host and thread; the lease is ten seconds."""
    ann.does(world.lock().acquire)
    with pytest.raises(LockedError, match=r"held by process \d+ on \S+, ann_0; until ") as caught:
        bob.does(world.lock().acquire)
    assert 5 < caught.value.remaining <= 10


@pytest.mark.parametrize("wait", [dt.timedelta(milliseconds=150), 0.6])
def test_a_wait_ends_in_time(world: World, ann: Person, bob: Person, wait: Any) -> None:
    """Not before, and not much later; whoever gave up is not in line any more."""
    ann.does(world.lock(ttl=60).acquire)
    before = time.monotonic()
    with pytest.raises(LockedError) as caught:
        bob.does(world.lock(wait=wait).acquire)
    took = time.monotonic() - before
    expected = wait.total_seconds() if isinstance(wait, dt.timedelta) else wait
    assert expected <= took < expected + 2
    assert caught.value.holder is not None
    assert caught.value.holder.thread == ann.name
    assert not world.raw.exists(world.key("line"))


def test_the_wait_of_one_call(world: World, ann: Person, bob: Person) -> None:
    """An acquisition may wait for longer or for less than its lock says, and so may its lease."""
    impatient, patient = world.lock(), world.lock(wait=None, ttl=60)
    held = ann.does(impatient.acquire)
    for nowait in (0, 0.0):
        with pytest.raises(LockedError):
            bob.does(patient.acquire, wait=nowait)
    with pytest.raises(LockedError):
        bob.does(patient.acquire, wait=0.05)
    for wait in (LONG, None, dt.timedelta(seconds=LONG)):
        turn = bob.begins(impatient.acquire, wait=wait, ttl=dt.timedelta(seconds=3))
        world.waiting(1)
        ann.does(held.release)
        theirs = turn.result(LONG)
        assert theirs.ttl == 3
        assert 1 < theirs.remaining <= 3
        bob.does(theirs.release)
        held = ann.does(patient.acquire)
        assert held.ttl == 60
    assert patient.ttl == 60


def test_no_wait_as_a_timedelta(world: World, ann: Person, bob: Person) -> None:
    """A timedelta of zero is no wait, as 0 is."""
    ann.does(world.lock().acquire)
    with pytest.raises(LockedError):
        bob.does(world.lock(wait=dt.timedelta()).acquire)


def test_first_come_first_served(world: World) -> None:
    """Those who wait get it in the order in which they came, a newcomer last."""
    people = world.people(6)
    lock = world.lock(wait=LONG)
    order: list[int] = []

    def noted(number: int) -> Callable[[Any], None]:
        return lambda held: order.append(number)

    held = people[0].does(lock.acquire)
    turns = []
    for number, person in enumerate(people[1:], 1):
        turns.append(person.begins(world.within, lock, noted(number)))
        world.waiting(number)
    people[0].does(held.release)
    people[0].does(world.within, lock, noted(0))
    for turn in turns:
        turn.result(LONG)
    assert order == [1, 2, 3, 4, 5, 0]
    assert not world.raw.exists(world.key("line"))


@pytest.mark.parametrize("fair", [True, False])
def test_fairness(world: World, ann: Person, remote: Any, fair: bool) -> None:
    """A fair lock is handed over to who waits, awake or not; else it goes to who asks first."""
    lock = world.lock(fair=fair)
    held = ann.does(lock.acquire)
    waiter = remote(fair=fair)
    waiter.begins("acquire", wait=None)
    world.waiting(1)
    waiter.stops()
    ann.does(held.release)
    if fair:
        with pytest.raises(LockedError, match="was just handed over to somebody") as caught:
            ann.does(lock.acquire)
        assert caught.value.holder is None
        assert 0 < caught.value.remaining <= 0.2
    else:
        ann.does(ann.does(lock.acquire).release)
        assert world.locked() is None
    waiter.goes_on()
    assert waiter.result()[1] > held.fence
    assert waiter.does("release") is None


def test_a_release_wakes_who_waits(world: World, ann: Person, bob: Person) -> None:
    """The next one does not look every so often: it has the lock long before it would look."""
    lock = world.lock(wait=None, ttl=600)
    for _ in range(3):
        held = ann.does(lock.acquire)
        turn = bob.begins(lock.acquire)
        world.waiting(1)
        time.sleep(0.02)
        ann.does(held.release)
        before = time.monotonic()
        theirs = turn.result(LONG)
        assert time.monotonic() - before < 3
        bob.does(theirs.release)


def test_a_crashed_holder_is_overtaken_when_its_lease_ends(
    world: World, ann: Person, bob: Person
) -> None:
    """Not before, and at once then, though nobody released it and the waiter may wait for long."""
    late = []
    for attempt in range(5):  # a busy machine may hold up anybody for a while
        name = f"crazy{attempt}"
        before = time.monotonic()
        gone = ann.does(world.lock(name, ttl=0.3).acquire)
        theirs = bob.does(world.lock(name, ttl=60, wait=None).acquire)
        late.append(time.monotonic() - before - 0.3)
        assert late[-1] >= 0
        assert theirs.fence > gone.fence
        if late[-1] < 0.1:
            break
    assert min(late) < 0.2


def test_a_lease_cut_short_is_overtaken(world: World, ann: Person, bob: Person) -> None:
    """Who waits for a long lease hears that its holder has made it a short one."""
    held = ann.does(world.lock(ttl=60).acquire)
    turn = bob.begins(world.lock(ttl=60, wait=LONG).acquire)
    world.waiting(1)
    time.sleep(0.05)
    ann.does(held.extend, 0.1)
    try:
        turn.result(3)
    finally:
        world.force()


def test_a_killed_holder_is_overtaken(world: World, ann: Person, remote: Any) -> None:
    """A process that dies with the lock locks nobody out for longer than its lease."""
    holder = remote(ttl=0.5)
    before = time.monotonic()
    _, fence = holder.does("acquire")
    os.kill(holder.pid, signal.SIGKILL)
    held = ann.does(world.lock(wait=LONG).acquire)
    assert 0.5 <= time.monotonic() - before < 5
    assert held.fence > fence


def test_the_commands_of_each_way(world: World, ann: Person, bob: Person) -> None:
    """Two uncontended, one refused, three with a wait: one to get in line, one to confirm."""
    said: dict[str, list[str]] = {"ann": [], "bob": []}

    def lock(who: str, **options: Any) -> Any:
        return world.lock(on_command=lambda name, *_: said[who].append(name), **options)

    quick, slow = lock("ann"), lock("bob", wait=LONG)
    held = ann.does(quick.acquire)
    assert said["ann"] == ["lock_acquire"]
    with pytest.raises(LockedError):
        bob.does(slow.acquire, wait=0)
    assert said["bob"] == ["lock_acquire"]
    ann.does(held.release)
    assert said["ann"] == ["lock_acquire", "lock_release"]
    for turn in range(3):  # in the first wait of a process it begins to listen
        held = ann.does(quick.acquire)
        said["bob"].clear()
        theirs = bob.begins(slow.acquire)
        world.waiting(1)
        ann.does(held.release)
        bob.does(theirs.result(LONG).release)
        expected = ["lock_acquire", "lock_acquire", "lock_release"]
        assert said["bob"] == expected if turn else said["bob"][-3:] == expected


def test_what_the_server_is_told(calm: World) -> None:
    """An uncontended lock is two commands on the wire, a refused one a single one."""
    ann, bob = calm.people(2)
    lock = calm.lock()
    ann.does(ann.does(lock.acquire).release)

    def told() -> dict[str, int]:
        stats: Any = calm.raw.info("commandstats")
        inside_scripts = {"cmdstat_get", "cmdstat_set", "cmdstat_time", "cmdstat_info"}
        return {name: stats[name]["calls"] for name in stats if name not in inside_scripts}

    before = told()
    for _ in range(10):
        ann.does(ann.does(lock.acquire).release)
    assert told() == before | {"cmdstat_evalsha": before["cmdstat_evalsha"] + 20}
    ann.does(lock.acquire)
    for _ in range(10):
        with pytest.raises(LockedError):
            bob.does(lock.acquire)
    assert told() == before | {"cmdstat_evalsha": before["cmdstat_evalsha"] + 31}


# The handle


def test_a_handle(world: World, ann: Person) -> None:
    """It tells whether the lock is held and for how long, from this process's clock alone."""
    said: list[str] = []
    lock = world.lock(on_command=lambda name, *_: said.append(name))
    held = ann.does(lock.acquire)
    said.clear()
    first = held.remaining
    assert 5 < first <= 10
    time.sleep(0.02)
    assert held.remaining <= first - 0.02
    held.check()
    assert (held.held, held.lost, held.name, held.ttl) == (True, False, "crazy", 10)
    assert repr(held) == f"<{type(held).__name__} of crazy: held>"
    assert repr(lock) == f"<{type(lock).__name__} crazy>"
    assert said == []
    ann.does(held.release)
    assert (held.held, held.lost, held.remaining) == (False, False, 0.0)
    assert repr(held) == f"<{type(held).__name__} of crazy: released>"
    with pytest.raises(LockLostError, match="lock crazy is not held: it was released") as caught:
        held.check()
    assert caught.value.name == "crazy"
    assert said == ["lock_release"]


def test_fences_grow(world: World, ann: Person, remote: Any) -> None:
    """From holder to holder, over processes, releases, ended leases and a lost key."""
    lock = world.lock(wait=LONG)
    fences = [ann.does(lock.acquire, ttl=0.05).fence]
    held = ann.does(lock.acquire)
    assert world.locked() is not None
    fences.append(held.fence)
    ann.does(held.release)
    assert held.fence == fences[-1]
    other = remote()
    for _ in range(2):
        fences.append(other.does("acquire")[1])
        assert other.does("release") is None
    held = ann.does(lock.acquire)
    fences.append(held.fence)
    world.raw.delete(world.key())
    fences.append(world.person("bob").does(lock.acquire).fence)
    assert fences == sorted(set(fences))


def test_extending(world: World, ann: Person) -> None:
    """The lease is set to so long from now, longer or shorter; times are never added up."""

    def lease() -> float:
        holder = world.locked()
        assert holder is not None
        assert abs(holder.remaining - held.remaining) < 0.5
        return float(held.remaining)

    held = ann.does(world.lock(ttl=10).acquire)
    for _ in range(3):
        ann.does(held.extend, 30)
        assert 25 < lease() <= 30
    ann.does(held.extend, dt.timedelta(seconds=3))
    assert 1 < lease() <= 3
    held.check()
    before = held.fence
    ann.does(held.extend, 0.05)
    eventually(lambda: held.lost)
    with pytest.raises(LockLostError, match=r"its lease of 0\.05 s ended, or it was taken away"):
        ann.does(held.extend, 30)
    assert ann.does(world.lock(wait=LONG).acquire).fence > before


def test_extending_by_what_it_began_with(world: World, ann: Person) -> None:
    """Without a length the lease begins anew as long as it was."""
    held = ann.does(world.lock(ttl=1).acquire)
    time.sleep(0.2)
    assert held.remaining < 0.8
    ann.does(held.extend)
    assert 0.8 < held.remaining <= 1
    ann.does(held.release)
    with pytest.raises(LockLostError, match="it was released"):
        ann.does(held.extend)
    assert world.locked() is None


def test_releasing_again_does_no_harm(world: World, ann: Person, bob: Person) -> None:
    """Neither to the one who has released, nor to who has the lock by then."""
    held = ann.does(world.lock().acquire)
    for _ in range(3):
        ann.does(held.release)
    theirs = bob.does(world.lock().acquire)
    ann.does(held.release)
    bob.does(held.release)
    holder = world.locked()
    assert holder is not None
    assert holder.fence == theirs.fence
    bob.does(theirs.extend)


def test_released_by_another_thread_or_task(world: World, ann: Person, bob: Person) -> None:
    """A handle may be passed on; whoever acquired it may acquire again then."""
    lock = world.lock()
    for _ in range(2):
        held = ann.does(lock.acquire)
        with pytest.raises(SelfDeadlockError):
            ann.does(lock.acquire)
        bob.does(held.extend)
        bob.does(held.release)
        assert not held.held


def test_released_inside_the_block(world: World, ann: Person) -> None:
    """A release before the end of the `with` is as good as one at its end."""
    lock = world.lock()
    ann.does(world.within, lock, lambda held: held.release())
    assert world.locked() is None


def test_one_lock_for_many_at_once(world: World) -> None:
    """One object serves any number of threads or tasks; never are two inside."""
    lock = world.lock(wait=LONG)
    inside: list[int] = []
    most: list[int] = []
    handles: list[Any] = []

    def body(held: Any) -> None:
        inside.append(1)
        most.append(len(inside))
        handles.append(held)
        time.sleep(0.001)
        inside.pop()

    turns = [person.begins(world.within, lock, body) for person in world.people(8) for _ in "12345"]
    for turn in turns:
        turn.result(LONG)
    assert most == [1] * 40
    assert len({held.token for held in handles}) == 40
    fences = [held.fence for held in handles]
    assert fences == sorted(set(fences))


def test_one_lock_in_several_loops(valkey: Server, prefix: str) -> None:
    """One object serves loops at the same time and one after the other."""
    lock = AsyncLock(valkey.url, "crazy", prefix=prefix, wait=LONG)
    inside: list[int] = []

    async def work() -> int:
        for _ in range(10):
            async with lock:
                inside.append(1)
                await asyncio.sleep(0)
                assert len(inside) == 1
                inside.pop()
        return len(await lock.holders())

    with ThreadPoolExecutor(2) as pool:
        for turn in [pool.submit(asyncio.run, work()) for _ in range(4)]:
            turn.result(LONG)
    assert asyncio.run(work()) == 0


def test_nested_locks(world: World, ann: Person, bob: Person) -> None:
    """One holds several at once, and each is released at the end of its own block."""
    outer, inner = world.lock("outer"), world.lock("inner")

    def deeper(held: Any) -> Any:
        assert world.locked("outer") is not None
        return world.within(inner, lambda held: (world.locked("outer"), world.locked("inner")))

    found = ann.does(world.within, outer, deeper)
    assert [holder.thread for holder in found] == [ann.name] * 2
    assert world.locked("outer") is None
    assert world.locked("inner") is None
    held = [ann.does(lock.acquire) for lock in (outer, inner)]
    ann.does(held[0].release)
    with pytest.raises(LockedError):
        bob.does(inner.acquire)
    bob.does(outer.acquire)


def test_passing_it_on_to_another_process(world: World, ann: Person, remote: Any) -> None:
    """Who adopts the token holds the lock from then on, with the same fence and a new lease."""
    lock = world.lock(ttl=LONG)
    held = ann.does(lock.acquire)
    other = remote(ttl=60, label="heir")
    assert other.does("adopt", held.token) == (held.token, held.fence)
    holder = world.locked()
    assert holder is not None
    assert (holder.pid, holder.label) == (other.pid, "heir")
    assert 40 < holder.remaining <= 60
    assert other.does("write", world.key("x"), "by the heir") == [True]
    assert other.does("release") is None
    assert world.locked() is None
    assert other.does("adopt", held.token) == "LockLostError"
    assert other.does("adopt", "0") == "LockLostError"
    assert world.locked() is None
    newer = ann.does(world.person("bob").does(lock.acquire).release)
    assert newer is None
    assert other.does("adopt", held.token) == "LockLostError"


@pytest.mark.parametrize("token", ["", "two words", "-", "a\nb", None, 5, b"abc"])
def test_adopting_what_is_no_token(world: World, ann: Person, token: Any) -> None:
    """A token is what a handle says it is."""
    with pytest.raises(UsageError, match=r"a token is what `held\.token` of such a lock is"):
        ann.does(world.lock().adopt, token)


def test_handles_stay_in_their_process(world: World, ann: Person) -> None:
    """They are neither pickled nor copied: the error tells of tokens."""
    held = ann.does(world.lock().acquire)
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UsageError, match=r"cannot be pickled: .*adopt\(token\)"):
            spread(held)


# Blocks and decorators


def test_a_block(world: World, ann: Person, bob: Person) -> None:
    """The lock, or one acquisition of it, is held in its `with`, and free afterwards."""
    lock = world.lock()

    def body(held: Any) -> int:
        holder = world.locked()
        assert holder is not None
        assert (holder.thread, holder.fence) == (ann.name, held.fence)
        return int(held.fence)

    fences = [ann.does(world.within, lock, body) for _ in range(2)]
    fences.append(ann.does(world.within, ann.does(lock.acquire), body))
    assert fences == sorted(set(fences))
    assert world.locked() is None
    ann.does(lock.acquire)
    with pytest.raises(LockedError):
        bob.does(world.within, lock, body)


def test_a_decorator(world: World, ann: Person, bob: Person) -> None:
    """The function holds the lock while it runs, and is itself in every other way."""
    lock = world.lock()

    def nightly(amount: int, *, times: int = 2) -> int:
        """Do it."""
        assert world.locked() is not None
        if amount < 0:
            raise ValueError("nothing to do")
        return amount * times

    async def nightly_async(amount: int, *, times: int = 2) -> int:
        """Do it."""
        return nightly(amount, times=times)

    plain = nightly if world.flavour == "sync" else nightly_async
    locked = lock(plain)
    assert (locked.__name__, locked.__doc__) == (plain.__name__, "Do it.")
    assert locked.__wrapped__ is plain
    assert inspect.iscoroutinefunction(locked) == (world.flavour == "async")
    assert ann.does(locked, 4) == 8
    assert ann.does(locked, 4, times=3) == 12
    with pytest.raises(ValueError, match="nothing to do"):
        ann.does(locked, -1)
    assert world.locked() is None
    held = ann.does(lock.acquire)
    with pytest.raises(LockedError):
        bob.does(locked, 4)
    with pytest.raises(SelfDeadlockError):
        ann.does(locked, 4)
    ann.does(held.release)
    assert bob.does(locked, 4) == 8


def test_functions_that_a_decorator_refuses(world: World) -> None:
    """One of the other colour, which would run outside, and generators, at decoration."""

    def plain() -> None:
        pass

    async def coroutine() -> None:
        pass

    def generator() -> Iterator[None]:
        yield

    async def async_generator() -> AsyncIterator[None]:
        yield

    lock = world.lock()
    if world.flavour == "sync":
        other: Any = coroutine
        right: Any = plain
        wanted = "is async: use AsyncLock"
    else:
        other, right, wanted = plain, coroutine, "is not async: use Lock "
    lock(right)
    for function in (other, functools.partial(other)):
        with pytest.raises(UsageError, match=wanted):
            lock(function)
    for function in (generator, async_generator, functools.partial(generator)):
        with pytest.raises(UsageError, match="is a generator: hold the lock with `with` inside"):
            lock(function)


def test_errors_come_through_a_pool(world: World, ann: Person, bob: Person) -> None:
    """They can be pickled, as what a worker of a process pool raises has to be."""
    held = ann.does(world.lock().acquire)
    raised: list[Any] = []
    for person in (ann, bob):
        with pytest.raises(LockedError) as caught:
            person.does(world.lock().acquire)
        raised.append(caught.value)
    assert world.force()
    with pytest.raises(LockLostError) as lost:
        ann.does(held.release)
    raised.append(lost.value)
    for error in raised:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


# Errors in the body

BODY_ERRORS = [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]


@pytest.mark.parametrize("kind", BODY_ERRORS)
def test_an_error_in_the_body(world: World, ann: Person, kind: type[BaseException]) -> None:
    """Whatever it is, the lock is released, and it goes on its way as it was."""
    error = kind("its own words")

    def fail(held: Any) -> None:
        raise error

    for whole in (True, False):
        manager = world.lock() if whole else ann.does(world.lock().acquire)
        with pytest.raises(kind) as caught:
            ann.does(world.within, manager, fail)
        assert caught.value is error
        assert not hasattr(error, "__notes__")
        assert error.__cause__ is error.__context__ is None
        assert world.locked() is None


@pytest.mark.parametrize("kind", BODY_ERRORS)
def test_an_error_in_the_body_of_a_lost_lock(
    world: World, ann: Person, kind: type[BaseException]
) -> None:
    """The body's own error wins, and the loss is attached to it as a note."""
    error = kind("its own words")

    def fail(held: Any) -> None:
        assert world.force()
        raise error

    lock = world.lock()
    with pytest.raises(kind) as caught:
        ann.does(world.within, lock, fail)
    assert caught.value is error
    (note,) = error.__notes__
    assert note.startswith("lock crazy is not held: its lease of 10 s ended, or it was taken away")
    assert error.__cause__ is error.__context__ is None


def test_a_lost_lock_of_a_body_that_went_well(world: World, ann: Person) -> None:
    """The end of the block says so."""
    with pytest.raises(LockLostError, match="lock crazy is not held") as caught:
        ann.does(world.within, world.lock(), lambda held: world.force())
    assert caught.value.name == "crazy"
    assert caught.value.__context__ is None


def test_a_body_that_finds_out_itself(world: World, ann: Person) -> None:
    """A LockLostError of the body goes on its way, once and without a note."""
    raised = []

    def body(held: Any) -> Any:
        eventually(lambda: held.lost)
        try:
            held.check()
        except LockLostError as error:
            raised.append(error)
            raise

    with pytest.raises(LockLostError) as caught:
        ann.does(world.within, world.lock(ttl=0.05), body)
    assert [caught.value] == raised
    assert not hasattr(caught.value, "__notes__")


def test_a_generator_that_is_closed(valkey: Server, prefix: str) -> None:
    """The lock in a generator is released when that is closed or collected, and taken once more."""
    lock = Lock(valkey.url, "crazy", prefix=prefix)

    def items() -> Iterator[int]:
        with lock:
            yield from itertools.count()

    for _ in range(2):
        running = items()
        assert next(running) == 0
        assert len(lock.holders()) == 1
        running.close()  # type: ignore[attr-defined]
        assert lock.holders() == []
    running = items()
    next(running)
    del running
    gc.collect()
    assert lock.holders() == []


def test_a_block_that_ends_in_another_thread(valkey: Server, prefix: str) -> None:
    """A generator that is advanced in one thread and closed in another releases the lock."""
    lock = Lock(valkey.url, "crazy", prefix=prefix)

    def items() -> Iterator[int]:
        with lock:
            yield from itertools.count()

    running = items()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, running).result(LONG) == 0
    running.close()  # type: ignore[attr-defined]
    assert lock.holders() == []


def test_a_block_that_ends_in_another_task(valkey: Server, prefix: str) -> None:
    """An async generator that nobody runs to its end is closed by a task of the loop's own."""

    async def main() -> None:
        lock = AsyncLock(valkey.url, "crazy", prefix=prefix)

        async def items() -> AsyncIterator[int]:
            async with lock:
                yield 0

        async for _ in items():
            break
        gc.collect()
        end = time.monotonic() + LONG
        while await lock.holders():
            assert time.monotonic() < end
            await asyncio.sleep(0.005)
        async with lock:  # by this very task
            pass

    failed: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        await asyncio.wait_for(main(), 2)

    asyncio.run(watched())
    assert failed == []


def test_a_cancelled_task(valkey: Server, prefix: str) -> None:
    """A cancellation in the body releases the lock, also one that comes while waiting inside."""

    async def main() -> None:
        lock = AsyncLock(valkey.url, "crazy", prefix=prefix)
        entered = asyncio.Event()

        async def work() -> None:
            async with lock:
                entered.set()
                await asyncio.sleep(LONG)

        task = asyncio.create_task(work())
        await entered.wait()
        assert len(await lock.holders()) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await lock.holders() == []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), lock:
                await asyncio.sleep(LONG)
        assert await lock.holders() == []

    asyncio.run(main())


def test_an_interrupted_wait(valkey: Server, prefix: str) -> None:
    """What a signal handler raises ends it, and nobody is in line any more."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    lock = Lock(valkey.url, "crazy", prefix=prefix, wait=None)
    with ThreadPoolExecutor(1) as other, redis.Redis.from_url(valkey.url) as raw:
        held = other.submit(lock.acquire).result(LONG)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                lock.acquire()
        finally:
            signal.signal(signal.SIGALRM, before)
        eventually(lambda: not raw.exists(f"{prefix}:l1:{{crazy}}:line"))
        held.release()
        assert lock.holders() == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_release_that_the_server_refuses(world: World, ann: Person, fails: bool) -> None:
    """The error of the server is raised, but never instead of the body's own."""
    error = ValueError("its own words")

    def spoil(held: Any) -> None:
        world.raw.delete(world.key())
        world.raw.rpush(world.key(), "no lock")
        if fails:
            raise error

    lock = world.lock()
    with pytest.raises(ValueError if fails else ServerError) as caught:
        ann.does(world.within, lock, spoil)
    if fails:
        assert caught.value is error
        assert "WRONGTYPE" in error.__notes__[0]
    else:
        assert "WRONGTYPE" in str(caught.value)


# Loss


def take_away(world: World, held: Any, how: str) -> None:
    """Have a lock lost, of which the holder is not told."""
    if how == "forced":
        assert world.force()
        assert not world.force()
    elif how == "deleted":
        world.raw.delete(world.key())
    else:
        world.raw.delete(world.key())
        with ThreadPoolExecutor(1) as other:
            assert other.submit(Lock(world.url, "crazy", prefix=world.prefix).acquire).result(LONG)


@pytest.mark.parametrize("how", ["forced", "deleted", "taken"])
def test_a_lock_that_is_taken_away(world: World, ann: Person, how: str) -> None:
    """Whoever has lost it hears so from the server; on_lost is called once, and nobody is hurt."""
    lost: list[Any] = []
    events: Events = []
    lock = world.lock(on_lost=lost.append, on_event=lambda *event: events.append(event))

    def state() -> Any:
        return world.raw.get(world.key())

    for tell in ("extend", "release"):
        held = ann.does(lock.acquire)
        take_away(world, held, how)
        before = state()
        held.check()  # nobody has told it yet
        with pytest.raises(LockLostError, match="lock crazy is not held: its lease of 10 s ended"):
            ann.does(getattr(held, tell))
        assert (held.held, held.lost, held.remaining) == (False, True, 0.0)
        with pytest.raises(LockLostError):
            held.check()
        if tell == "extend":
            assert repr(held) == f"<{type(held).__name__} of crazy: lost>"
            with pytest.raises(LockLostError):
                ann.does(held.release)
        ann.does(held.release)
        assert lost == [held]
        assert state() == before
        assert [name for event, name, _ in events if event == "lost"] == ["crazy"]
        lost.clear()
        events.clear()
        world.force()


def test_a_lease_that_ends(world: World, ann: Person, bob: Person) -> None:
    """The handle knows by its clock; on_lost is called then, in the background, and only once."""
    lost: list[Any] = []
    told_at: list[float] = []

    def hear(held: Any) -> None:
        lost.append(held)
        told_at.append(time.monotonic())

    began = time.monotonic()
    held = ann.does(world.lock(ttl=0.2, on_lost=hear).acquire)
    theirs = bob.does(world.lock(wait=LONG).acquire)
    eventually(lambda: lost)
    assert 0.19 < told_at[0] - began < 3
    assert lost == [held]
    assert (held.held, held.lost, held.remaining) == (False, True, 0.0)
    for _ in range(2):
        with pytest.raises(LockLostError, match=r"its lease of 0\.2 s ended"):
            held.check()
    with pytest.raises(LockLostError):
        ann.does(held.release)
    ann.does(held.release)
    holder = world.locked()
    assert holder is not None
    assert holder.fence == theirs.fence
    time.sleep(0.3)
    assert lost == [held]


def test_no_loss_without_a_loss(world: World, ann: Person) -> None:
    """After a release, or an extension, the end of the first lease is nobody's loss."""
    lost: list[Any] = []
    lock = world.lock(ttl=0.4, on_lost=lost.append)
    ann.does(ann.does(lock.acquire).release)
    held = ann.does(lock.acquire)
    for _ in range(3):
        ann.does(held.extend, 60)
    time.sleep(0.5)
    held.check()
    assert lost == []
    assert world.force()
    with pytest.raises(LockLostError):
        ann.does(held.release)
    assert lost == [held]


def test_a_renewal_that_finds_it_lost(world: World, ann: Person, bob: Person) -> None:
    """A holder whose lock was taken away hears of it while it works, and takes it from nobody."""
    lost: list[Any] = []
    held = ann.does(world.lock(ttl=1.4, renew=True, on_lost=lost.append).acquire)
    assert world.force()
    held.check()
    theirs = bob.does(world.lock(ttl=60).acquire)
    eventually(lambda: lost, 1.2)
    assert lost == [held]
    assert held.lost
    with pytest.raises(LockLostError):
        ann.does(held.release)
    assert lost == [held]
    bob.does(theirs.extend)
    bob.does(theirs.release)


def test_the_end_of_max_hold(world: World, ann: Person, bob: Person) -> None:
    """Renewal stops there; that is a loss, told once, and the next one gets the lock."""

    def attempt(name: str) -> None:
        lost: list[float] = []
        before = time.monotonic()
        lock = world.lock(
            name, ttl=0.2, renew=True, max_hold=0.5,
            on_lost=lambda held: lost.append(time.monotonic()),
        )  # fmt: skip
        held = ann.does(lock.acquire)
        theirs = bob.does(world.lock(name, wait=LONG, ttl=LONG).acquire)
        assert 0.45 < time.monotonic() - before < 4
        eventually(lambda: lost)
        assert 0.45 < lost[0] - before < 4
        assert held.lost
        with pytest.raises(LockLostError):
            ann.does(held.release)
        theirs.check()
        assert len(lost) == 1

    tried(attempt)


def test_an_extension_goes_no_further_than_max_hold(world: World, ann: Person) -> None:
    """The cap is a cap."""
    held = ann.does(world.lock(ttl=0.5, renew=True, max_hold=5).acquire)
    ann.does(held.extend, 60)
    assert 0.5 < held.remaining <= 5
    holder = world.locked()
    assert holder is not None
    assert holder.remaining <= 5


def test_the_lost_lock_may_be_taken_again(world: World, ann: Person) -> None:
    """By the same thread or task, which has two handles then, of which one is good."""
    lock = world.lock()
    held = ann.does(lock.acquire, ttl=0.05)
    eventually(lambda: held.lost)
    again = ann.does(lock.acquire, wait=LONG)
    with pytest.raises(LockLostError):
        ann.does(held.release)
    again.check()
    with pytest.raises(SelfDeadlockError):
        ann.does(lock.acquire)
    ann.does(again.release)
    assert world.locked() is None


# Hooks


def test_events(world: World, ann: Person, bob: Person) -> None:
    """Each way tells what happened, of which lock, and how long it took."""
    events: Events = []

    def tell(*event: Any) -> None:
        events.append(event)

    def names() -> list[str]:
        assert {name for _, name, _ in events} <= {"crazy"}
        return [event for event, _, _ in events]

    lock = world.lock(on_event=tell)
    held = bob.does(lock.acquire)
    time.sleep(0.02)
    bob.does(held.release)
    assert names() == ["held"]
    assert 0.02 <= events[0][2] < 3
    events.clear()
    held = ann.does(world.lock().acquire)
    with pytest.raises(LockedError):
        bob.does(lock.acquire)
    assert names() == ["contended"]
    events.clear()
    with pytest.raises(LockedError):
        bob.does(lock.acquire, wait=0.05)
    assert names() == ["contended"]
    events.clear()
    ann.does(held.release)
    bob.does(bob.does(lock.acquire, wait=1).release)
    assert names() == ["waited", "held"]


def test_each_wait_is_told(world: World, ann: Person, bob: Person) -> None:
    """Whoever has to wait is told so at the beginning and at the end, the tenth time too."""
    events: Events = []
    lock = world.lock(wait=LONG, on_event=lambda *event: events.append(event))
    for _ in range(3):
        held = ann.does(world.lock().acquire)
        turn = bob.begins(lock.acquire)
        world.waiting(1)
        time.sleep(0.02)
        ann.does(held.release)
        bob.does(turn.result(LONG).release)
        assert [event for event, _, _ in events] == ["contended", "waited", "held"]
        assert 0.02 <= events[1][2] < LONG
        events.clear()


def test_hooks_that_fail(
    world: World, ann: Person, bob: Person, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a hook is logged, and changes nothing for anybody."""

    def fail(*_: Any) -> None:
        raise RuntimeError("the hook's own fault")

    hooks: dict[str, Any] = {"on_lost": fail, "on_event": fail, "on_command": fail}
    lost: list[Any] = []
    with caplog.at_level(logging.ERROR, "redishacks"):
        lock = world.lock(wait=LONG, **hooks)
        held = ann.does(lock.acquire)
        with pytest.raises(LockedError):
            bob.does(lock.acquire, wait=0)
        turn = bob.begins(lock.acquire)
        world.waiting(1)
        ann.does(held.release)
        bob.does(turn.result(LONG).release)
        held = ann.does(lock.acquire, ttl=0.1)  # on_lost fails in the background
        eventually(lambda: "the on_lost callback of a lock failed" in caplog.text)
        other = bob.does(world.lock("other", ttl=0.1, on_lost=lost.append).acquire)
        eventually(lambda: lost == [other])
        with pytest.raises(LockLostError):
            ann.does(held.release)
    for hook in ("on_lost callback", "on_event hook", "on_command hook"):
        assert f"the {hook}" in caplog.text


@pytest.mark.parametrize("hook", ["on_lost", "on_event"])
def test_hooks_are_plain_functions(flavour: str, hook: str) -> None:
    """An async function, which nobody would await, is refused; so is what cannot be called."""

    async def listen(*_: Any) -> None:
        pass

    kind: Any = AsyncLock if flavour == "async" else Lock
    wrong: list[Any] = [listen, 5]
    for function in wrong:
        with pytest.raises(UsageError, match=f"{hook} "):
            kind("redis://127.0.0.1:1", "crazy", **{hook: function})


@pytest.mark.parametrize("tell", ["extend", "release", "transaction"])
def test_an_on_lost_that_fails_in_the_foreground(world: World, ann: Person, tell: str) -> None:
    """The loss is raised, not the error of the callback."""

    def fail(held: Any) -> None:
        raise RuntimeError("the hook's own fault")

    held = ann.does(world.lock(on_lost=fail).acquire)
    assert world.force()
    if tell == "transaction":
        act = functools.partial(world.within, held.transaction(), lambda pipe: pipe.set("x", 1))
    else:
        act = getattr(held, tell)
    with pytest.raises(LockLostError):
        ann.does(act)


def test_an_on_lost_that_fails_and_a_body_that_did(world: World, ann: Person) -> None:
    """The body's own error wins over that of a callback, too."""

    def fail(held: Any) -> None:
        raise RuntimeError("the hook's own fault")

    def body(held: Any) -> None:
        assert world.force()
        raise ValueError("its own words")

    lock = world.lock(on_lost=fail)
    with pytest.raises(ValueError, match="its own words"):
        ann.does(world.within, lock, body)


# Renewal


def linger_threads() -> set[threading.Thread]:
    """Return the threads that look after leases, of whatever server."""
    return {each for each in threading.enumerate() if each.name == "redishacks-linger"}


def test_renewal(world: World, ann: Person, bob: Person) -> None:
    """The lock is held for some times its lease, and free at the release."""

    def attempt(name: str) -> None:
        lock = world.lock(name)
        began = time.monotonic()
        held = ann.does(world.lock(name, ttl=0.4, renew=True).acquire)
        while time.monotonic() < began + 0.8:
            held.check()
            assert 0 < held.remaining <= 0.4
            with pytest.raises(LockedError):
                bob.does(lock.acquire)
            time.sleep(0.05)
        ann.does(held.release)
        assert world.locked(name) is None

    tried(attempt)


def test_one_for_all(calm: World) -> None:
    """Three hundred leases are renewed by one thread or task, in a few commands."""
    threads = linger_threads()
    (ann,) = calm.people(1)

    def stats() -> tuple[int, int]:
        said: Any = calm.raw.info("commandstats")
        return said["cmdstat_evalsha"]["calls"], said["cmdstat_set"]["calls"]

    client = calm.client()
    locks = [calm.lock(f"n{number}", client=client, ttl=1.6, renew=True) for number in range(300)]
    held = [ann.does(lock.acquire) for lock in locks]
    calls, sets = stats()
    eventually(lambda: stats()[1] >= sets + 300)
    assert stats()[0] - calls <= 30
    assert all(each.held for each in held)
    assert len(linger_threads() - threads) == (1 if calm.flavour == "sync" else 0)
    if calm.flavour == "async":

        async def tasks() -> int:
            return sum(task.get_name() == "redishacks-linger" for task in asyncio.all_tasks())

        assert ann.does(tasks) == 1
    for each in held:
        ann.does(each.release)


def test_a_release_ends_the_renewal(calm: World) -> None:
    """After it the server hears nothing more."""
    (ann,) = calm.people(1)

    def calls() -> int:
        said: Any = calm.raw.info("commandstats")
        return int(said["cmdstat_evalsha"]["calls"])

    held = [ann.does(calm.lock(name, ttl=0.7, renew=True).acquire) for name in "abc"]
    before = calls()
    eventually(lambda: calls() > before)
    for each in held:
        ann.does(each.release)
    before = calls()
    time.sleep(0.4)
    assert calls() == before


def test_garbage_is_not_renewed(world: World, ann: Person) -> None:
    """A handle that nobody has any more holds its lock for the rest of its lease only."""

    def attempt(name: str) -> None:
        lock = world.lock(name, ttl=0.6, renew=True)
        held = ann.does(lock.acquire)
        renewed(held)
        assert world.locked(name) is not None
        del held
        gc.collect()
        before = time.monotonic()
        eventually(lambda: world.locked(name) is None)
        assert time.monotonic() - before < 4
        ann.does(ann.does(lock.acquire).release)  # it does not wait for itself either

    tried(attempt)


def test_extensions_make_no_more_renewals(calm: World) -> None:
    """However often a lease is extended by hand, it is renewed once each time."""
    (ann,) = calm.people(1)
    held = ann.does(calm.lock(ttl=1.4, renew=True).acquire)
    for _ in range(50):
        ann.does(held.extend)

    def sets() -> int:
        said: Any = calm.raw.info("commandstats")
        return int(said["cmdstat_set"]["calls"])

    before = sets()
    eventually(lambda: sets() > before)
    time.sleep(0.2)
    assert sets() <= before + 2
    ann.does(held.release)


def honest(held: Any, lock: Lock) -> None:
    """Check that a lock is held, for as long as its handle says."""
    held.check()
    said = held.remaining
    holders = lock.holders()
    assert holders
    assert said <= holders[0].remaining + 0.2


def test_an_extension_beside_a_renewal(
    valkey: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal decided before an extension and heard after it loses no lock, and tells no lie."""
    real = _keeper._renewal
    crossed: list[bool] = []

    def renewal(*args: Any) -> Any:
        command = real(*args)
        if not crossed:
            holding[-1].extend(6)
            crossed.append(True)
        return command

    def attempt(name: str) -> None:
        crossed.clear()
        lock = Lock(valkey.url, name, prefix=prefix, ttl=0.6, renew=True)
        with lock as held:
            holding.append(held)
            eventually(lambda: crossed)
            end = time.monotonic() + 0.8
            while time.monotonic() < end:
                honest(held, lock)
                time.sleep(0.05)

    holding: list[Any] = []
    monkeypatch.setattr(_keeper, "_renewal", renewal)
    tried(attempt)


def test_a_renewal_beside_an_extension(valkey: Server, prefix: str) -> None:
    """Whichever the server heard last, the handle never says more than what that has."""

    def attempt(name: str) -> None:
        slow: list[bool] = []

        def answered(*_: Any) -> None:  # the server has heard of it, the handle not yet
            end = time.monotonic() + 0.5
            while slow and time.monotonic() < end and look.holders()[0].remaining > 2:
                time.sleep(0.01)

        look = Lock(valkey.url, name, prefix=prefix)
        lock = Lock(valkey.url, name, prefix=prefix, ttl=0.6, renew=True, on_command=answered)
        with lock as held:
            slow.append(True)
            held.extend(6)
            slow.clear()
            end = time.monotonic() + 0.8
            while time.monotonic() < end:
                honest(held, look)
                time.sleep(0.05)

    tried(attempt)


def test_renewal_goes_on_after_a_failure(flavour: str, valkey: Server, prefix: str) -> None:
    """A Redis that is away for a part of the lease costs nobody the lock."""
    with FaultProxy(valkey) as proxy:
        world = World(flavour, proxy.url, prefix)

        def attempt(name: str) -> None:
            ann = world.person()
            lost: list[Any] = []
            held = ann.does(world.lock(name, ttl=1, renew=True, on_lost=lost.append).acquire)
            proxy.refuse()
            proxy.cut()
            try:
                eventually(lambda: held.remaining < 0.35)
            finally:
                proxy.heal()
            renewed(held)
            assert lost == []
            ann.does(held.release)

        try:
            tried(attempt)
        finally:
            world.close()


# The same thread or task again


def test_waiting_for_oneself(world: World, ann: Person, bob: Person) -> None:
    """It is told at once and without a question, for any client of the server and any wait."""
    said: list[str] = []
    lock = world.lock(wait=None, on_command=lambda name, *_: said.append(name))
    held = ann.does(lock.acquire)
    said.clear()
    twin = world.lock(
        client=world.client(), wait=None, on_command=lambda name, *_: said.append(name)
    )
    for each in (lock, twin):
        for wait in (0, 5, None):
            with pytest.raises(
                SelfDeadlockError, match="lock crazy is held by this very"
            ) as caught:
                ann.does(each.acquire, wait=wait)
            assert caught.value.name == "crazy"
            assert caught.value.holder is None
            assert 5 < caught.value.remaining <= 10
            assert isinstance(caught.value, LockedError)
    assert said == []
    with pytest.raises(LockedError) as other:
        bob.does(twin.acquire, wait=0)
    assert not isinstance(other.value, SelfDeadlockError)
    elsewhere = world.lock(client=world.client(world.url[:-1] + "1"))
    ann.does(ann.does(elsewhere.acquire).release)
    ann.does(ann.does(world.lock(prefix=f"{world.prefix}2").acquire).release)
    ann.does(held.release)
    ann.does(ann.does(twin.acquire).release)


def test_reentrance(world: World, ann: Person, bob: Person) -> None:
    """Who asked for it gets its own acquisition again; only the last release counts."""
    said: list[str] = []
    lock = world.lock(reentrant=True, on_command=lambda name, *_: said.append(name))
    outer = ann.does(lock.acquire)
    inner = ann.does(lock.acquire)
    assert inner is outer
    assert said == ["lock_acquire"]
    ann.does(inner.release)
    outer.check()
    with pytest.raises(LockedError):
        bob.does(lock.acquire)
    ann.does(world.within, lock, lambda held: held.check())
    outer.check()
    ann.does(outer.release)
    assert said[-1] == "lock_release"
    assert world.locked() is None
    ann.does(outer.release)
    bob.does(lock.acquire)


def test_reentrant_blocks_and_functions(world: World, ann: Person) -> None:
    """Blocks in blocks, and a function that calls itself, hold it until the outermost ends."""
    lock = world.lock(reentrant=True)

    def down(depth: int) -> int:
        assert world.locked() is not None
        return 0 if depth == 0 else 1 + locked(depth - 1)

    async def down_async(depth: int) -> int:
        assert world.locked() is not None
        return 0 if depth == 0 else 1 + await locked(depth - 1)

    locked: Any = lock(down_async if world.flavour == "async" else down)
    assert ann.does(locked, 5) == 5
    assert world.locked() is None

    def twice(held: Any) -> Any:
        return world.within(lock, lambda inner: inner.fence == held.fence)

    assert ann.does(world.within, lock, twice)
    assert world.locked() is None


def test_a_reentrant_lock_that_was_lost(world: World, ann: Person) -> None:
    """A deeper block gets a new one then, and the outer one is told."""
    lock = world.lock(reentrant=True)

    def outer(held: Any) -> Any:
        assert world.force()
        with_loss = pytest.raises(LockLostError)

        async def again() -> bool:
            with with_loss:
                await held.extend()
            return bool(await world.within(lock, lambda inner: inner.fence > held.fence))

        if world.flavour == "async":
            return again()
        with with_loss:
            held.extend()
        assert world.within(lock, lambda inner: inner.fence > held.fence)
        return True

    with pytest.raises(LockLostError):
        ann.does(world.within, lock, outer)
    assert world.locked() is None


# Forks

forks = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: beside threads


@forks
def test_a_forked_child_holds_nothing(valkey: Server, prefix: str) -> None:
    """It neither releases nor renews nor extends what its parent has, and is told so."""
    lost: list[Any] = []
    lock = Lock(valkey.url, "crazy", prefix=prefix, ttl=60, renew=True, on_lost=lost.append)
    with lock as held:

        def child() -> None:
            assert (held.held, held.lost, held.remaining) == (False, True, 0.0)
            for act in (held.check, held.extend, lambda: held.transaction().__enter__()):
                with pytest.raises(LockLostError, match="process that this one was forked from"):
                    act()
            held.release()
            lock.__exit__(None, None, None)
            assert lost == []
            (holder,) = lock.holders()
            assert holder.pid == os.getppid()
            with pytest.raises(LockedError) as caught:
                lock.acquire()
            assert not isinstance(caught.value, SelfDeadlockError)

        in_child(child)
        held.check()
        (holder,) = lock.holders()
        assert holder.fence == held.fence
    assert lock.holders() == []
    assert lost == []


@forks
def test_a_forked_child_does_not_renew(valkey: Server, prefix: str) -> None:
    """When the parent renews no more, the lease ends, whatever the child goes on doing."""

    def attempt(name: str) -> None:
        lock = Lock(valkey.url, name, prefix=prefix, ttl=0.6, renew=True)
        own = Lock(valkey.url, f"{name}-own", prefix=prefix, ttl=0.6, renew=True)
        held = lock.acquire()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:  # it has a lock of its own, and a thread that renews that
            try:
                with own:
                    os.write(writing, b"!")
                    time.sleep(LONG)
            finally:
                os._exit(0)
        try:
            assert os.read(reading, 1) == b"!"
            renewed(held)
            del held
            gc.collect()
            eventually(lambda: lock.holders() == [])
            assert [holder.pid for holder in own.holders()] == [child]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            os.close(writing)

    tried(attempt)


@forks
def test_a_forked_child_waits_for_its_parent(valkey: Server, prefix: str) -> None:
    """With the very object that its parent uses, and gets the lock after it."""
    lock = Lock(valkey.url, "crazy", prefix=prefix, wait=LONG)
    with redis.Redis.from_url(valkey.url) as raw, ThreadPoolExecutor(1) as pool:
        held = lock.acquire()

        def child() -> None:
            with lock as own:
                assert own.fence > held.fence
                (holder,) = lock.holders()
                assert holder.pid == os.getpid()

        turn = pool.submit(in_child, child)
        eventually(lambda: raw.zcard(f"{prefix}:l1:{{crazy}}:line") == 1)
        held.release()
        turn.result(LONG)
        assert lock.holders() == []


@forks
def test_children_with_one_object(valkey: Server, prefix: str) -> None:
    """Processes that inherited one lock take turns with it."""
    lock = Lock(valkey.url, "crazy", prefix=prefix, wait=LONG)
    lock.acquire().release()
    key = f"{prefix}:count"

    def child() -> None:
        with redis.Redis.from_url(valkey.url) as raw:
            for _ in range(20):
                with lock:
                    count = int(raw.get(key) or 0)
                    time.sleep(0.0005)
                    raw.set(key, count + 1)

    with ThreadPoolExecutor(3) as pool, redis.Redis.from_url(valkey.url) as raw:
        for turn in [pool.submit(in_child, child) for _ in range(3)]:
            turn.result(LONG)
        assert raw.get(key) == b"60"


@forks
def test_a_child_forked_inside_a_loop(valkey: Server, prefix: str) -> None:
    """It holds nothing either, and releases nothing at the end of the block."""

    async def main() -> None:
        lock = AsyncLock(valkey.url, "crazy", prefix=prefix, renew=True)
        async with lock as held:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    with pytest.raises(LockLostError):
                        held.check()
                    await held.release()
                    await lock.__aexit__(None, None, None)
                    code = 0 if held.lost else 2
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            held.check()
            (holder,) = await lock.holders()
            assert holder.fence == held.fence
        assert await lock.holders() == []

    asyncio.run(main())


# Transactions


def interfere(
    monkeypatch: pytest.MonkeyPatch, world: World, act: Callable[[], object], times: int
) -> list[int]:
    """Do something so many times between the look at the lock and `EXEC`; return the count."""
    module: Any = redis.asyncio.client if world.flavour == "async" else redis.client
    multi = module.Pipeline.multi
    done: list[int] = []

    def meddling(pipeline: Any) -> None:
        if len(done) < times:
            done.append(1)
            act()
        multi(pipeline)

    monkeypatch.setattr(module.Pipeline, "multi", meddling)
    return done


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 2}, None])
def test_a_transaction(world: World, ann: Person, options: dict[str, Any] | None) -> None:
    """Its commands are carried out together, at the end; replies come as the client gives them."""
    client = world.url if options is None else world.client(**options)
    key = world.key("x")
    held = ann.does(world.lock(client=client).acquire)
    for _ in range(2):
        seen: list[Any] = []

        def body(pipe: Any, seen: list[Any] = seen) -> Any:
            assert pipe.set(key, "a").append(key, "b") is pipe
            pipe.get(key)
            seen.append((world.raw.get(key), pipe.results))
            return pipe

        pipe = ann.does(world.within, held.transaction(), body)
        assert seen == [(None, [])]
        assert pipe.results == [
            True,
            2,
            "ab" if options and "decode_responses" in options else b"ab",
        ]
        assert world.raw.get(key) == "ab"
        world.raw.delete(key)
    ann.does(world.within, held.transaction(), lambda pipe: None)
    held.check()


def test_a_body_that_fails_writes_nothing(world: World, ann: Person) -> None:
    """Its error goes on its way, and no command was carried out."""
    key = world.key("x")
    held = ann.does(world.lock().acquire)

    def body(pipe: Any) -> None:
        pipe.set(key, "a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ann.does(world.within, held.transaction(), body)
    assert not world.raw.exists(key)
    held.check()


@pytest.mark.parametrize("how", ["forced", "deleted", "taken"])
def test_a_transaction_without_the_lock(
    world: World, ann: Person, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, whether it was lost before, or between the look and the writing."""
    key = world.key("x")
    for when in ("before", "inside"):
        held = ann.does(world.lock().acquire)
        if when == "before":
            take_away(world, held, how)
            done = [1]
        else:
            done = interfere(monkeypatch, world, functools.partial(take_away, world, held, how), 1)
        with pytest.raises(LockLostError):
            ann.does(world.within, held.transaction(), lambda pipe: pipe.set(key, "a"))
        assert done == [1]
        assert held.lost
        assert not world.raw.exists(key)
        world.force()


def test_a_transaction_of_an_ended_lease(world: World, ann: Person) -> None:
    """What the clock knows is not asked: neither at the beginning nor at the end."""
    key = world.key("x")
    lock = world.lock(ttl=0.2)
    held = ann.does(lock.acquire)

    def late(pipe: Any) -> None:
        pipe.set(key, "a")
        eventually(lambda: held.lost)

    for body in (late, lambda pipe: pipe.set(key, "a")):
        with pytest.raises(LockLostError):
            ann.does(world.within, held.transaction(), body)
    released = ann.does(world.lock("other").acquire)
    ann.does(released.release)
    with pytest.raises(LockLostError, match="it was released"):
        ann.does(world.within, released.transaction(), lambda pipe: pipe.set(key, "a"))
    assert not world.raw.exists(key)


def test_a_transaction_while_the_lease_is_renewed(
    world: World, ann: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else touches the lock, while it is still held its commands go through just once."""
    key = world.key("x")
    held = ann.does(world.lock(wait=LONG).acquire)
    heir = Lock(world.url, "crazy", prefix=world.prefix).adopt(held.token)
    done = interfere(monkeypatch, world, heir.extend, 4)
    pipe = ann.does(world.within, held.transaction(), lambda pipe: pipe.incr(key))
    assert pipe.results == [1]
    assert done == [1] * 4
    monkeypatch.undo()
    turn = bob.begins(world.lock(wait=LONG).acquire)  # to get in line is to write the lock, too
    world.waiting(1)
    assert ann.does(world.within, held.transaction(), lambda pipe: pipe.incr(key)).results == [2]
    ann.does(held.release)
    turn.result(LONG)


def test_many_transactions_under_fast_renewal(world: World, ann: Person) -> None:
    """A hundred of them beside a renewal every 33 ms: each counts once."""
    key = world.key("x")
    held = ann.does(world.lock(ttl=0.1, renew=True, client=world.client()).acquire)
    done = 0
    while done < 100:
        try:
            ann.does(world.within, held.transaction(), lambda pipe: pipe.incr(key))
        except LockLostError:  # a busy machine may miss a lease that short
            held = ann.does(world.lock(ttl=0.1, renew=True, wait=LONG).acquire)
            continue
        done += 1
    assert world.raw.get(key) == "100"


def test_what_a_transaction_takes(world: World, ann: Person) -> None:
    """Commands, and nothing else of a pipeline; wrong arguments are told where they are."""
    key = world.key("x")
    held = ann.does(world.lock().acquire)
    others = ("execute", "watch", "multi", "reset", "command_stack", "_execute_transaction")
    for name in (*others, "immediate_execute_command", "pubsub"):
        with pytest.raises(UsageError, match="takes commands of redis-py's pipeline, not "):
            ann.does(world.within, held.transaction(), lambda pipe, name=name: getattr(pipe, name))
    with pytest.raises(AttributeError):
        ann.does(world.within, held.transaction(), lambda pipe: pipe.no_such_command)
    with pytest.raises(TypeError):
        ann.does(world.within, held.transaction(), lambda pipe: pipe.set(key))
    world.raw.rpush(key, "a list")
    with pytest.raises(ServerError, match="a transaction of lock"):
        ann.does(world.within, held.transaction(), lambda pipe: pipe.incr(key))
    held.check()
    outside = held.transaction()
    with pytest.raises(UsageError, match="inside of its `with`"):
        outside.incr(key)
    ann.does(world.within, outside, lambda pipe: pipe.rpush(key, "once"))
    with pytest.raises(UsageError, match="inside of its `with`"):
        outside.incr(key)
    with pytest.raises(UsageError, match="for one `with`"):
        ann.does(world.within, outside, lambda pipe: pipe.rpush(key, "twice"))
    assert world.raw.lrange(key, 0, -1) == ["a list", "once"]


@pytest.mark.parametrize("way", ["client", "url"])
def test_transactions_leak_no_connection(calm: World, way: str) -> None:
    """However many there are, and however they end, the server sees no more connections."""
    (ann,) = calm.people(1)
    key = calm.key("x")
    lock = calm.lock(client=calm.client() if way == "client" else None)

    def fail(pipe: Any) -> None:
        pipe.incr(key)
        raise ZeroDivisionError

    def connections() -> int:
        told: Any = calm.raw.info("clients")
        return int(told["connected_clients"])

    def work() -> None:
        held = ann.does(lock.acquire)
        ann.does(world_within, held.transaction(), lambda pipe: pipe.incr(key))
        with pytest.raises(ZeroDivisionError):
            ann.does(world_within, held.transaction(), fail)
        calm.force()
        with pytest.raises(LockLostError):
            ann.does(world_within, held.transaction(), lambda pipe: pipe.incr(key))

    world_within = calm.within
    work()
    before = connections()
    for _ in range(10):
        work()
    eventually(lambda: connections() <= before)


@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_stopped_holder_writes_nothing(
    world: World, ann: Person, remote: Any, where: str
) -> None:
    """A process stopped past its lease writes nothing when it goes on, wherever it was stopped."""
    key = world.key("x")
    holder = remote(ttl=0.6)
    assert holder.does("acquire")
    if where == "inside":
        holder.begins("write", key, "too late", stopping=True)
        holder.stopped()
    else:
        holder.stops()
        holder.begins("write", key, "too late")
    held = ann.does(world.lock(wait=LONG).acquire)
    assert ann.does(world.within, held.transaction(), lambda pipe: pipe.set(key, "ours"))
    holder.goes_on()
    assert holder.result() == "LockLostError"
    assert world.raw.get(key) == "ours"
    assert holder.does("write", key, "again") == "LockLostError"
    assert holder.does("held_now") is False
    assert world.raw.get(key) == "ours"
    held.check()


def test_fences_in_sql(world: World, ann: Person, bob: Person, pg_dsn: str) -> None:
    """With its fence in the statement a stale holder's write changes nothing; the holder's do."""
    statement = """
        UPDATE accounts SET balance = %(b)s, fence = %(f)s WHERE id = 1 AND fence <= %(f)s
    """
    lock = world.lock(wait=LONG)
    with psycopg.connect(pg_dsn, autocommit=True) as db:
        db.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance int, fence bigint)")
        db.execute("INSERT INTO accounts VALUES (1, 0, 0)")

        def write(held: Any, balance: int) -> int:
            return db.execute(statement, {"b": balance, "f": held.fence}).rowcount

        stale = ann.does(lock.acquire, ttl=0.1)
        assert [write(stale, 1), write(stale, 2)] == [1, 1]
        held = bob.does(lock.acquire)
        assert [write(held, 3), write(stale, 4), write(held, 5), write(stale, 6)] == [1, 0, 1, 0]
        assert db.execute("SELECT balance, fence FROM accounts").fetchone() == (5, held.fence)


# Keys


def test_every_key_has_a_ttl(world: World, ann: Person, bob: Person) -> None:
    """Free, held, waited for, handed over, taken away or extended: no key of a lock is for ever."""

    def ttls() -> dict[str, int]:
        keys: Any = world.raw.scan_iter(f"{world.prefix}:*")
        found = {key: int(world.raw.pttl(key)) for key in keys}
        assert all(0 < ttl <= 3 * 86_400_000 for ttl in found.values()), found
        return found

    both = {world.key("lock"), world.key("line")}
    lock = world.lock(ttl=LONG)
    held = ann.does(lock.acquire)
    assert set(ttls()) == {world.key()}
    turn = bob.begins(lock.acquire, wait=LONG)
    world.waiting(1)
    assert set(ttls()) == both
    ann.does(held.extend, 60)
    assert set(ttls()) == both
    ann.does(held.release)
    assert set(ttls()) == {world.key()}
    held = turn.result(LONG)
    assert set(ttls()) == {world.key()}
    bob.does(held.release)
    assert 86_000_000 < ttls().pop(world.key()) <= 86_400_000
    ann.does(lock.acquire)
    assert world.force()
    assert set(ttls()) == {world.key()}


def test_what_an_idle_lock_leaves(world: World, ann: Person, bob: Person) -> None:
    """A fence of less than 150 bytes, however many waited, and even with a long label."""
    lock = world.lock(label="x" * 256, ttl=LONG)
    held = ann.does(lock.acquire)
    turn = bob.begins(lock.acquire, wait=LONG)
    with pytest.raises(LockedError):
        world.person("cem").does(lock.acquire, wait=0.05)
    ann.does(held.release)
    bob.does(turn.result(LONG).release)
    (key,) = world.raw.scan_iter(f"{world.prefix}:*")
    assert key == world.key()
    assert 0 < (world.raw.memory_usage(key) or 0) < 150


@pytest.mark.parametrize(
    "name",
    ["a{b}c", "{}", "{", "nul\0inside", "%41", "line\nbreak", " ", "ü" * 128, "x" * 256, "a:lock"],
)
def test_odd_names(world: World, ann: Person, bob: Person, name: str) -> None:
    """A name may hold anything; its keys share one slot, and it is a lock of its own."""
    lock = world.lock(name)
    held = ann.does(lock.acquire)
    turn = bob.begins(lock.acquire, wait=LONG)
    eventually(lambda: len(list(world.raw.scan_iter(f"{world.prefix}:*"))) == 2)
    keys = list(world.raw.scan_iter(f"{world.prefix}:*"))
    assert len({key_slot(key.encode()) for key in keys}) == 1
    assert world.locked(name) is not None
    assert world.locked("A") is None
    ann.does(ann.does(world.lock("A").acquire).release)
    ann.does(held.release)
    bob.does(turn.result(LONG).release)


def test_prefix_and_tag(world: World, ann: Person) -> None:
    """They begin the keys and group them: locks of one tag share a slot, and are still two."""
    tagged = [world.lock(name, tag="shop") for name in ("a", "b")]
    plain = world.lock("a")
    held = [ann.does(lock.acquire) for lock in (*tagged, plain)]
    keys = sorted(world.raw.scan_iter(f"{world.prefix}:*"))
    begin = f"{world.prefix}:l1:"
    assert keys == [f"{begin}{{a}}:lock", f"{begin}{{shop}}:a:lock", f"{begin}{{shop}}:b:lock"]
    for each in held:
        ann.does(each.release)
    assert Lock(world.url, "a").kind.key == b"rh:l1:{a}:lock"


@pytest.mark.parametrize("thread", ["tab\tbreak\nnul\0", "", "ü\udc80", "x" * 300, "- a b 0 1"])
def test_odd_names_of_threads(world: World, thread: str) -> None:
    """Whatever a thread or task is called, its lock works."""
    ann, bob = world.people(2)

    def rename() -> None:
        if world.flavour == "sync":
            threading.current_thread().name = thread
        else:
            task = asyncio.current_task()
            assert task is not None
            task.set_name(thread)

    ann.does(rename)
    lock = world.lock()
    held = ann.does(lock.acquire)
    with pytest.raises(LockedError) as caught:
        bob.does(lock.acquire)
    assert caught.value.holder is not None
    assert caught.value.holder.pid == os.getpid()
    ann.does(held.extend)
    ann.does(held.release)
    assert world.locked() is None


# Wrong use

NAN = math.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"ttl": ttl}, "ttl must be a positive number of seconds or a timedelta, not ")
            for ttl in (0, -1, NAN, math.inf, True, "10", None, b"1", dt.timedelta(), 1e12)
        ),
        *(
            ({"ttl": ttl}, "a ttl is from 1 ms to 366 days, not ")
            for ttl in (0.0009, 1e-9, dt.timedelta(microseconds=999), 367 * 86_400)
        ),
        *(
            ({"wait": wait}, "^wait must be ")
            for wait in (-1, -0.5, NAN, math.inf, -math.inf, True, False, "5", dt.timedelta(-1))
        ),
        ({"renew": True, "ttl": 0.05}, r"renew=True needs a ttl of 0\.1 s or more, not 0\.05"),
        ({"max_hold": 60}, "max_hold bounds the renewal of a lease: give renew=True, too"),
        ({"max_hold": 0, "renew": True}, "max_hold must be a positive number"),
        ({"max_hold": NAN, "renew": True}, "max_hold must be a positive number"),
        *(
            ({"replicas": replicas}, "replicas is how many must have the lock, 0 to 999, not ")
            for replicas in (-1, 1.5, True, "1", None)
        ),
        *(
            ({"label": label}, "a label is printable text of at most 256 characters, not ")
            for label in ("a\tb", "a\nb", "a\0b", "\x7f", "x" * 257, b"x", None, 5)
        ),
        *(({"deadline": deadline}, "deadline must be") for deadline in (0, -1, NAN, True, "1")),
        *(({"prefix": prefix}, "prefix must be a string of 1 to 256 bytes") for prefix in ("", 5)),
        *(({"tag": tag}, "tag must be a string of 1 to 256 bytes") for tag in ("", 5, "x" * 257)),
    ],
)
def test_wrong_options(flavour: str, options: dict[str, Any], message: str) -> None:
    """They are refused where the lock is made, with what is accepted."""
    with pytest.raises(UsageError, match=message):
        (AsyncLock if flavour == "async" else Lock)("redis://127.0.0.1:1", "crazy", **options)


@pytest.mark.parametrize("name", ["", None, 5, b"bytes", "x" * 257, "x" * 1_000_000, "ü" * 129])
def test_wrong_names(flavour: str, name: Any) -> None:
    """A name is text of at most 256 bytes; the error is no longer than it has to be."""
    kind: Any = AsyncLock if flavour == "async" else Lock
    with pytest.raises(UsageError, match="name of a lock must be a string of 1 to 256") as caught:
        kind("redis://127.0.0.1:1", name)
    assert len(str(caught.value)) < 1000


def test_a_name_that_is_no_text(flavour: str) -> None:
    """Half a surrogate pair cannot be sent: a UsageError says so."""
    kind: Any = AsyncLock if flavour == "async" else Lock
    with pytest.raises(UsageError):
        kind("redis://127.0.0.1:1", "a\ud800b")


def test_wrong_arguments_of_calls(world: World, ann: Person, bob: Person) -> None:
    """The same rules for one acquisition and one extension; nothing is taken or changed."""
    lock = world.lock()
    wrong: list[dict[str, Any]] = [
        {"ttl": ttl} for ttl in (0, -1, 0.0001, NAN, math.inf, True, "1")
    ]
    wrong += [{"wait": wait} for wait in (-1, NAN, math.inf, True, "1")]
    for options in wrong:
        with pytest.raises(UsageError):
            ann.does(lock.acquire, **options)
    assert world.locked() is None
    held = ann.does(lock.acquire)
    for ttl in (0, -1, 0.0001, NAN, math.inf, True, "1"):
        with pytest.raises(UsageError):
            ann.does(held.extend, ttl)
    assert 5 < held.remaining <= 10
    holder = world.locked()
    assert holder is not None
    assert 5 < holder.remaining <= 10


def test_wrong_arguments_of_a_call_inside(world: World, ann: Person) -> None:
    """What was refused did not acquire a reentrant lock once more: one release frees it."""
    lock = world.lock(reentrant=True)
    held = ann.does(lock.acquire)
    for options in ({"wait": -1}, {"ttl": -1}):
        with pytest.raises(UsageError):
            ann.does(lock.acquire, **options)
    ann.does(held.release)
    assert world.locked() is None


def test_a_lease_too_short_to_be_renewed(world: World, ann: Person) -> None:
    """It is refused in a call as it is in the constructor."""
    lock = world.lock(ttl=10, renew=True)
    with pytest.raises(UsageError, match=r"0\.1 s or more"):
        ann.does(lock.acquire, ttl=0.01)
    held = ann.does(lock.acquire)
    with pytest.raises(UsageError, match=r"0\.1 s or more"):
        ann.does(held.extend, 0.01)
    held.check()


def test_wrong_clients() -> None:
    """A client of the other colour, or none at all, is refused; no message has a password in it."""
    url = "redis://user:s3cret@127.0.0.1:1/0"
    wrong: list[tuple[Any, Any, str]] = [
        (Lock, redis.asyncio.Redis.from_url(url), "is for asyncio: use the tool's Async class"),
        (AsyncLock, redis.Redis.from_url(url), "is not for asyncio: use the tool's sync class"),
    ]
    for kind in (Lock, AsyncLock):
        wrong += [(kind, client, "a redis-py client or a URL is needed") for client in (None, 5)]
        wrong.append((kind, "http://user:s3cret@127.0.0.1", "must begin with redis://"))
        wrong.append((kind, "redis://user:s3cret@127.0.0.1:port", "cannot be read"))
    for kind, client, message in wrong:
        with pytest.raises(UsageError, match=message) as caught:
            kind(client, "crazy")
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    for kind in (Lock, AsyncLock):
        assert "s3cret" not in repr(kind(url, "crazy"))


# The oldest server


def test_redis_6_2(flavour: str, redis62: Server, prefix: str) -> None:
    """All of it works there: refusals, waits, renewal, transactions."""
    world = World(flavour, redis62.url, prefix)
    try:
        ann, bob = world.people(2)
        lock = world.lock(wait=LONG, ttl=1, renew=True)
        held = ann.does(lock.acquire)
        turn = bob.begins(lock.acquire)
        world.waiting(1)
        with pytest.raises(LockedError):
            world.person("cem").does(lock.acquire, wait=0)
        renewed(held)
        key = world.key("x")
        pipe = ann.does(world.within, held.transaction(), lambda pipe: pipe.incr(key))
        assert pipe.results == [1]
        ann.does(held.release)
        theirs = turn.result(LONG)
        assert theirs.fence > held.fence
        assert world.force()
        with pytest.raises(LockLostError):
            bob.does(theirs.release)
    finally:
        world.close()


# What is said, and what is refused


@pytest.mark.parametrize("before", [False, True], ids=["new", "has waited"])
def test_a_hung_server_is_told_of_soon(
    flavour: str, valkey: Server, proxy: FaultProxy, prefix: str, before: bool
) -> None:
    """To whoever would wait, too, whatever the process did before."""
    world = World(flavour, proxy.url, prefix)
    try:
        world.raw.close()
        ann, bob = world.people(2)
        if before:  # its wake-up connection is there
            held = bob.does(world.lock().acquire)
            turn = ann.begins(world.lock(wait=LONG).acquire)
            world.waiting(1)
            bob.does(held.release)
            ann.does(turn.result(LONG).release)
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            ann.does(world.lock().acquire, wait=LONG)
        assert time.monotonic() - began < LONG / 4
    finally:
        proxy.resume()
        world.close()


def test_names_are_told_as_they_were_given(world: World, ann: Person, bob: Person) -> None:
    """However they are written in keys."""
    for name in ("50%", "{x}", "a\nb", "é"):
        lock = world.lock(name)
        held = ann.does(lock.acquire)
        assert held.name == lock.name == name
        with pytest.raises(LockedError) as caught:
            bob.does(lock.acquire)
        assert caught.value.name == name
        ann.does(held.release)


def test_what_was_released_is_not_entered(world: World, ann: Person) -> None:
    """A `with` of a handle that holds nothing says so before its body runs."""
    held = ann.does(world.lock().acquire)
    ann.does(held.release)
    with pytest.raises(LockLostError, match="it was released"):
        ann.does(world.within, held, lambda _: pytest.fail("the body ran"))


def test_max_hold_is_named_when_it_is_over(world: World, ann: Person) -> None:
    """And no renewal is asked for again and again shortly before."""
    told: list[str] = []
    lock = world.lock(
        ttl=0.4, renew=True, max_hold=0.7, on_command=lambda name, *_: told.append(name)
    )
    held = ann.does(lock.acquire)
    eventually(lambda: held.lost)
    with pytest.raises(LockLostError, match=r"its max_hold of 0\.7 s is over"):
        held.check()
    with pytest.raises(LockLostError):
        ann.does(held.release)
    assert told.count("lock_extend") <= 4


def test_a_generator_that_another_thread_ends(valkey: Server, prefix: str) -> None:
    """A `with lock` in it gives back its own acquisition, and nobody else's."""
    permits = Semaphore(valkey.url, "permits", 5, prefix=prefix)

    def generator() -> Iterator[None]:
        with permits:
            yield

    def ends(some: Iterator[None]) -> None:
        with pytest.raises(StopIteration):
            next(some)

    first = generator()
    next(first)
    with permits as mine:
        with ThreadPoolExecutor(1) as pool:
            other = generator()
            pool.submit(next, other).result(LONG)
            pool.submit(ends, first).result(LONG)
            assert len(permits.holders()) == 2
            mine.check()
            ends(other)
        assert len(permits.holders()) == 1
        mine.check()
    assert not permits.holders()


def test_stacks_of_contexts(valkey: Server, prefix: str) -> None:
    """An `ExitStack` gives back what it has, in its own thread."""
    permits = Semaphore(valkey.url, "permits", 5, prefix=prefix)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        ours = stack.enter_context(permits)
        theirs = contextlib.ExitStack()
        pool.submit(theirs.enter_context, permits).result(LONG)
        with permits as third:
            pool.submit(theirs.close).result(LONG)
            ours.check()
            third.check()
            assert len(permits.holders()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renew": "no"}, "renew is True or False"),
        ({"reentrant": "yes"}, "reentrant is True or False"),
        ({"fair": None}, "fair is True or False"),
        ({"on_command": 5}, "on_command is a function"),
        ({"replicas": 10**30}, "replicas is how many"),
    ],
)
def test_options_of_another_type(valkey: Server, options: dict[str, Any], message: str) -> None:
    """They are refused where the lock is made."""
    with pytest.raises(UsageError, match=message):
        Lock(valkey.url, "k", **options)


def test_what_is_decorated_is_a_function(valkey: Server) -> None:
    """Anything else is refused at once."""
    not_callable: Any = 5
    with pytest.raises(UsageError, match="decorates a function"):
        Lock(valkey.url, "k")(not_callable)


def test_several_by_a_generator(valkey: Server, prefix: str) -> None:
    """Names may come from anything that has some."""
    with MultiLock(valkey.url, (name for name in "ba"), prefix=prefix) as held:
        assert sorted(held.fences) == ["a", "b"]
        assert not held.lost
    for wrong in ("ab", [], iter(()), 5, [5]):
        with pytest.raises(UsageError, match="a list of one name or more"):
            MultiLock(valkey.url, wrong)  # type: ignore[arg-type]
