"""Locks on sick networks: lost replies, delayed copies, cut wake-ups, cancels, forks, failovers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import itertools
import os
import random
import select
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio
from redis.exceptions import LockNotOwnedError

from redishacks._command import Command, script
from redishacks._slots import key_slot
from redishacks._transport import AsyncTransport, SyncTransport, _listener, connect
from redishacks.errors import ServerError, UnavailableError
from redishacks.locks import (
    AsyncLock,
    AsyncMultiLock,
    Lock,
    LockedError,
    LockLostError,
    MultiLock,
    _core,
)
from redishacks.testing import (
    Cluster,
    FaultProxy,
    SentinelSetup,
    Server,
    servers_available,
    valkey_cluster,
    valkey_sentinel,
    valkey_server,
)
from tests.helpers import eventually
from tests.transport_kit import PEM
from tests.workers import is_stopped

#: Longer than anything here takes on a busy machine, and much shorter than `LEASE`.
LONG = 20.0
#: A lock that nobody holds and that was not released stays for so long.
LEASE = 300.0


# Who does what


class World:
    """Locks of one colour; whatever is done with them is done by a thread or task of its own."""

    def __init__(self, flavour: str, prefix: str) -> None:
        self.flavour = flavour
        self.prefix = prefix
        self._locks: list[Any] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        if flavour == "async":
            up = threading.Event()
            self._thread = threading.Thread(target=lambda: asyncio.run(self._turn(up)))
            self._thread.start()
            assert up.wait(LONG)

    async def _turn(self, up: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        up.set()
        await self._end.wait()

    @property
    def module(self) -> Any:
        """redis-py, of this colour."""
        return redis.asyncio if self._loop else redis

    def lock(self, client: Any, name: str = "k", **options: Any) -> Any:
        """Return a lock of this colour, with a long lease."""
        kind: Any = AsyncLock if self._loop else Lock
        self._locks.append(kind(client, name, **{"prefix": self.prefix, "ttl": LEASE} | options))
        return self._locks[-1]

    def client(self, url: str, **options: Any) -> Any:
        """Return a client with connections of its own."""
        return self.module.Redis.from_url(url, **options)

    def begin(self, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        """Have something done, and do not wait for the end."""
        call = functools.partial(function, *args, **options)
        if self._loop is not None:
            return asyncio.run_coroutine_threadsafe(_awaited(call), self._loop)
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def do(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Have something done; return or raise what came of it."""
        return self.begin(function, *args, **options).result(LONG)

    def workers(self, name: str) -> list[Any]:
        """Return the threads, or tasks, of a name."""
        if self._loop is None:
            return [each for each in threading.enumerate() if each.name == name]
        loop = self._loop
        return [each for each in self.do(asyncio.all_tasks, loop) if each.get_name() == name]

    def close(self) -> None:
        """End the loop; nobody tries any longer to say what the test's own servers cannot hear."""
        for lock in self._locks:
            self.do(lambda lock=lock: lock._station().keeper.reset())
        if self._loop:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(LONG)


async def _awaited(call: Callable[[], Any]) -> Any:
    result = call()
    return await result if inspect.isawaitable(result) else result


class Look:
    """What there is of locks on a server."""

    def __init__(self, server: Server, prefix: str) -> None:
        self.raw = server.client(decode_responses=True)
        self._prefix = prefix

    def in_line(self, name: str = "k") -> list[str]:
        """Return who waits, by when they came."""
        return list(self.raw.zrange(f"{self._prefix}:l1:{{{name}}}:line", 0, -1))  # type: ignore[arg-type]

    def wait_for_line(self, count: int, name: str = "k") -> None:
        """Return when so many wait."""
        eventually(lambda: len(self.in_line(name)) == count, LONG)

    def hearing(self) -> int:
        """Count those who are told things: processes, and loops."""
        return len(self.raw.pubsub_channels(f"{self._prefix}:*"))

    def fence(self) -> int:
        """Return the fence of who holds the lock."""
        words = str(self.raw.get(f"{self._prefix}:l1:{{k}}:lock")).split(" ")
        return 0 if words[0] == "-" else int(words[3])

    def left(self) -> list[tuple[str, str]]:
        """Return what is held or waits; else there are only small keys that end by themselves."""
        found = []
        for key in self.raw.scan_iter(f"{self._prefix}:*", count=1000):
            assert self.raw.pttl(key) != -1
            value = str(self.raw.get(key)) if key.endswith(":lock") else "someone"
            if not value.startswith("- "):
                found.append((key, value))
        return found

    def nothing_left(self, within: float = LONG) -> None:
        """Return when nobody holds and nobody waits for anything."""
        eventually(lambda: not self.left(), within)

    def close(self) -> None:
        """Close the connection."""
        self.raw.close()


@pytest.fixture
def world(flavour: str, prefix: str) -> Iterator[World]:
    """Both colours, with one test body."""
    made = World(flavour, prefix)
    yield made
    made.close()


@pytest.fixture
def look(valkey: Server, prefix: str) -> Iterator[Look]:
    """What there is on the session's server."""
    made = Look(valkey, prefix)
    yield made
    made.close()


class Rival:
    """Somebody else who holds a lock."""

    def __init__(self, world: World, client: Any, name: str = "k", **options: Any) -> None:
        self._world = world
        self.held = world.do(world.lock(client, name, **options).acquire)

    def release(self) -> None:
        """Let go of it."""
        self._world.do(self.held.release)


# Replies and requests that get lost

FAULTS = ("drop_reply", "drop_request", "cut_after_request")


@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_cut_at_any_moment_goes_unnoticed(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, fault: str, contended: bool
) -> None:
    """Whatever exchange is cut, of whatever connection: the lock is acquired, extended, released.

    No error, no loss, and nothing is left behind.
    """
    for n in itertools.count(1):
        client = world.client(proxy.url)
        lock = world.lock(client, wait=LONG if contended else 0, deadline=5)
        world.do(lock.holders)
        rival = Rival(world, valkey.url) if contended else None
        getattr(proxy, fault)(n)
        turn = world.begin(lock.acquire)
        if rival is not None:
            look.wait_for_line(1)
            rival.release()
        held = turn.result(LONG)
        world.do(held.extend)
        assert held.held
        world.do(held.release)
        done = proxy.armed == 1
        proxy.heal()
        look.nothing_left()
        if done:  # it waits for an exchange that there is none of
            break
    assert n > (6 if contended else 3)


@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
def test_a_reply_that_never_comes(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, contended: bool
) -> None:
    """On a connection that stays open it costs the deadline: at worst it is said that Redis was
    not heard, and nothing is left behind.
    """
    for n in itertools.count(1):
        client = world.client(proxy.url)
        lock = world.lock(client, wait=LONG if contended else 0, deadline=0.15)
        world.do(lock.holders)
        rival = Rival(world, valkey.url) if contended else None
        proxy.drop_reply(n, of="EVALSHA", cut=False)
        turn = world.begin(lock.acquire)
        if rival is not None:
            eventually(lambda turn=turn: look.in_line() or turn.done())  # type: ignore[misc]
            rival.release()
        try:
            held = turn.result(LONG)
        except UnavailableError:
            pass
        else:
            with contextlib.suppress(UnavailableError):
                world.do(held.extend)
            held.check()
            world.do(held.release)
        done = proxy.armed == 1
        proxy.heal()
        look.nothing_left()
        if done:
            break
    assert n > (4 if contended else 3)


def test_redis_pys_own_lock_loses_to_itself(
    world: World, valkey: Server, proxy: FaultProxy, prefix: str
) -> None:
    """The reason for all this: refused by its own key, and a release that says it was lost."""
    client = world.module.Redis(port=proxy.port)
    raw = valkey.client()

    def lock(name: str) -> Any:
        return client.lock(f"{prefix}-{name}", timeout=LEASE, thread_local=False)

    try:
        known = lock("a")
        assert world.do(known.acquire, blocking=False)
        world.do(known.release)  # the server knows the script from now on
        proxy.drop_reply(of="SET")
        assert world.do(lock("b").acquire, blocking=False) is False
        assert raw.pttl(f"{prefix}-b") > LEASE * 900
        third = lock("c")
        assert world.do(third.acquire, blocking=False)
        proxy.drop_reply(of="EVALSHA")
        with pytest.raises(LockNotOwnedError):
            world.do(third.release)
        assert raw.get(f"{prefix}-c") is None
    finally:
        raw.close()
        world.do(client.aclose if world.flavour == "async" else client.close)


# Copies that come late


@pytest.mark.parametrize("contended", [False, True], ids=["free", "contended"])
def test_what_is_held_up_and_delivered_later(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, contended: bool
) -> None:
    """Who gave up, and hears nothing, holds no lock when the network delivers all it kept."""
    lock = world.lock(proxy.url, deadline=0.2)
    world.do(lock.holders)
    rival = Rival(world, valkey.url) if contended else None
    proxy.stall()
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        world.do(lock.acquire, wait=0.5 if contended else 0)
    assert time.monotonic() - began < 3
    proxy.resume()
    if rival is not None:
        rival.release()
    look.nothing_left()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> float:
    """A delayed command is carried out for less long, so that a test need not wait."""
    monkeypatch.setattr(_core, "_GRACE", 0.3)
    return 0.3


class Recorder:
    """Notes down what a lock says, to say it again as a network would that delivers late."""

    def __init__(self, lock: Any) -> None:
        self.asked: list[Any] = []
        acquire = lock.kind.acquire

        def noted(*asked: Any) -> Any:
            self.asked.append(acquire(*asked))
            return self.asked[-1]

        lock.kind.acquire = noted


def in_vain(world: World, lock: Any, proxy: FaultProxy) -> None:
    """Ask for a lock, of which the server hears nothing."""
    world.do(lock.holders)
    for n in (1, 2):  # it may be said again
        proxy.drop_request(n, of="EVALSHA", cut=False)
    with pytest.raises(UnavailableError):
        world.do(lock.acquire)
    proxy.heal()


@pytest.mark.parametrize("when", ["soon", "too late"])
def test_a_copy_that_comes_after_giving_up(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, short_grace: float, when: str
) -> None:
    """It takes the lock for a moment at most, and none of it comes to pass once it is too late."""
    lock = world.lock(proxy.url, deadline=0.2)
    said = Recorder(lock)
    in_vain(world, lock, proxy)
    eventually(lambda: world.do(lambda: lock._station().keeper.waiting()) == 0, LONG)
    if when == "too late":
        time.sleep(0.2 + short_grace + 0.1)
    assert replayed(valkey, said.asked[0]) == -1 or when != "too late"
    look.nothing_left()


def test_a_copy_that_comes_after_a_refusal(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, short_grace: float
) -> None:
    """The copy of what was refused when said again takes no lock, or for a moment only."""
    lock = world.lock(proxy.url, deadline=0.5)
    said = Recorder(lock)
    world.do(lock.holders)
    rival = Rival(world, valkey.url)
    proxy.drop_request(of="EVALSHA")
    with pytest.raises(LockedError):
        world.do(lock.acquire)
    rival.release()
    replayed(valkey, said.asked[0])
    look.nothing_left()


def test_a_copy_that_comes_after_the_release(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, short_grace: float
) -> None:
    """The copy of an acquisition takes no lock that was given back, though others had it since."""
    lock = world.lock(proxy.url, deadline=0.5)
    said = Recorder(lock)
    world.do(lock.holders)
    proxy.drop_request(of="EVALSHA")
    held = world.do(lock.acquire)
    world.do(held.release)
    assert replayed(valkey, said.asked[0]) < 0
    Rival(world, valkey.url).release()
    replayed(valkey, said.asked[0])
    look.nothing_left(5)


def test_a_copy_that_comes_after_the_wait(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, short_grace: float
) -> None:
    """Who waits no more is not in line either, once the network has delivered all it kept."""
    lock = world.lock(proxy.url, deadline=0.2)
    said = Recorder(lock)
    world.do(lock.holders)
    rival = Rival(world, valkey.url)
    proxy.drop_request(2, of="EVALSHA", cut=False)
    with pytest.raises(LockedError):
        world.do(lock.acquire, wait=0.3)
    assert not proxy.armed
    replayed(valkey, said.asked[1])
    eventually(lambda: not look.in_line(), LONG)
    rival.release()
    look.nothing_left()


def replayed(server: Server, command: Any) -> int:
    """Ask something once more; return 1 when the lock is taken by that, 0 when not, or less."""
    reply = connect(server.url).call(command, 5.0)
    return 1 if isinstance(reply, int) else int(reply[0])


# Redis away


@pytest.fixture
def private() -> Iterator[Server]:
    """A server that this test may stop."""
    with valkey_server() as server:
        yield server


def test_a_server_that_hangs_costs_the_deadline(world: World, private: Server, prefix: str) -> None:
    """To acquire and to extend fails in time; a release returns, and is done in the background."""
    look = Look(private, prefix)
    lock = world.lock(private.url, deadline=0.2, wait=LONG)
    first, second = (world.do(world.lock(private.url, n, deadline=0.2).acquire) for n in "ab")
    with private.paused():
        for call in (lock.acquire, first.extend):
            began = time.monotonic()
            with pytest.raises(UnavailableError):
                world.do(call)
            assert time.monotonic() - began < 2
        began = time.monotonic()
        turns = [world.begin(held.release) for held in (first, second)]
        for turn in turns:
            turn.result(LONG)
        assert time.monotonic() - began < 3
        assert not first.held
    look.nothing_left()
    look.close()


def test_a_server_that_is_gone_costs_nothing(world: World, private: Server, prefix: str) -> None:
    """It is said at once; what was given back meanwhile is given back when it is there again."""
    look = Look(private, prefix)
    lock = world.lock(private.url, wait=LONG)
    held = world.do(world.lock(private.url, "a").acquire)
    look.raw.config_set("appendonly", "yes")
    eventually(lambda: look.raw.info("persistence")["aof_rewrite_in_progress"] == 0, LONG)
    look.raw.config_rewrite()
    private.kill()
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        world.do(lock.acquire)
    world.do(held.release)
    assert time.monotonic() - began < 0.9
    private.restart()
    look.nothing_left()
    look.close()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("Lock", "gone"),
        ("AsyncLock", "gone"),
        pytest.param("Lock", "hung", marks=pytest.mark.slow),
    ],
)
def test_a_process_ends_though_redis_is_away(private: Server, kind: str, how: str) -> None:
    """What could not be given back does not keep a process from ending."""
    code = """
        import asyncio, inspect, sys
        from redishacks import locks
        async def main():
            held = getattr(locks, sys.argv[2])(sys.argv[1], "k", deadline=0.3).acquire()
            held = await held if inspect.isawaitable(held) else held
            print(flush=True)
            sys.stdin.readline()
            done = held.release()
            if inspect.isawaitable(done):
                await done
        asyncio.run(main())
    """
    process = program(code, private.url, kind)
    try:
        said(process)
        private.kill() if how == "gone" else private.pause()
        process.communicate("\n", timeout=LONG)
        assert process.returncode == 0
    finally:
        end(process)


def program(code: str, *args: str) -> subprocess.Popen[str]:
    """Run a program of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def tell(process: subprocess.Popen[str], what: object) -> None:
    """Say a line to a program."""
    assert process.stdin is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> None:
    """Be done with a program, and with what it has forked."""
    if process.returncode is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line that a program says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_nothing_is_given_back_for_ever(world: World, private: Server, short_grace: float) -> None:
    """Once the lease of what is given back has ended, nobody tries any more."""
    lock = world.lock(private.url, ttl=0.2, deadline=0.2)
    held = world.do(lock.acquire)
    keeper = world.do(lambda: lock._station().keeper)
    private.kill()
    world.do(held.release)
    eventually(lambda: keeper.waiting() == 0, 6)


def test_a_server_that_stays_away_is_not_hammered(
    world: World,
    private: Server,
    short_grace: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is to be said once more, when no copy can be under way, waits between two tries."""
    with FaultProxy(private) as proxy:
        lock = world.lock(proxy.url, deadline=0.2)
        keeper = world.do(lambda: lock._station().keeper)
        in_vain(world, lock, proxy)
        eventually(lambda: keeper.waiting() == 0, LONG)
        proxy.cut()
        proxy.refuse()
        caplog.clear()
        time.sleep(0.2 + short_grace + 0.4)
        tries = [each for each in caplog.records if f":{proxy.port}: " in each.message]
        assert 1 <= len(tries) < 30
        proxy.accept()
        eventually(lambda: not keeper._leaving, LONG)


# Cancels


class Chance:
    """Whether, when and how often a task is cancelled, and what it does meanwhile."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    async def moment(self) -> None:
        """Let a few turns of the loop pass, or some time."""
        if self._random.random() < 0.5:
            for _ in range(self._random.randrange(12)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._random.random() * 0.012)

    async def use(self, lock: AsyncLock) -> None:
        """Hold a lock for a moment, in one way or another."""
        way = self._random.randrange(4)
        if way == 0:
            async with lock:
                await self.moment()
        elif way == 1:
            held = await lock.acquire(wait=self._random.choice([0.002, 0.01, None]))
            try:
                await self.moment()
            finally:
                await held.release()
        elif way == 2:
            async with asyncio.timeout(self._random.random() * 0.01), lock:
                await self.moment()
        else:
            async with asyncio.timeout(self._random.random() * 0.01):
                held = await lock.acquire()
            async with held:
                await held.extend()

    async def cancel(self, task: asyncio.Task[None]) -> bool:
        """Cancel a task, perhaps twice; return whether it ended by that, or by its timeout."""
        await self.moment()
        task.cancel()
        if self._random.random() < 0.3:
            await self.moment()
            task.cancel()
        try:
            await task
        except (asyncio.CancelledError, TimeoutError):
            return True
        except (LockedError, UnavailableError):
            return False
        return False


@pytest.mark.parametrize("how", ["free", "contended", "cut"])
def test_a_cancel_at_any_point_leaves_nothing(
    valkey: Server, look: Look, proxy: FaultProxy, prefix: str, how: str
) -> None:
    """A thousand acquisitions, waits, holds and releases end early: shortly after all is free.

    Also where connections are cut meanwhile.
    """
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = Chance(seed)
    names = 40 if how == "free" else 3

    async def cut() -> None:
        while True:
            await asyncio.sleep(0.005)
            proxy.cut()

    async def main() -> None:
        cutting = [asyncio.create_task(cut())] if how == "cut" else []
        ended = 0
        while ended < 1000:
            client = redis.asyncio.Redis.from_url(proxy.url)  # connecting is cancelled, too
            locks = [
                AsyncLock(client, f"k{n % names}", prefix=prefix, ttl=LEASE, wait=None)
                for n in range(40)
            ]
            tasks = [asyncio.create_task(chance.use(lock)) for lock in locks]
            ended += sum(await asyncio.gather(*map(chance.cancel, tasks)))
            await asyncio.to_thread(look.nothing_left, 5)
            assert not locks[0]._station().wakeups.waiting()
        for task in cutting:
            task.cancel()

    asyncio.run(main())
    for n in range(names):
        Lock(valkey.url, f"k{n}", prefix=prefix).acquire().release()


_LOOP = """
    import asyncio, sys, time
    from redishacks.locks import AsyncLock
    url, prefix = sys.argv[1:]
    def lock(name):
        return AsyncLock(url, name, prefix=prefix, ttl=300, wait=None, deadline=0.5)
    async def hold(name):
        async with lock(name):
            await asyncio.sleep(60)
    async def main():
        holders = [asyncio.create_task(hold(f"h{n}")) for n in range(5)]
        while not all([await lock(f"h{n}").holders() for n in range(5)]):
            await asyncio.sleep(0.01)
        waiters = [asyncio.create_task(hold("h0")) for n in range(5)]
        await asyncio.sleep(0.2)
        print("waiting", flush=True)
        turns = int(sys.stdin.readline())
        asking = [asyncio.create_task(hold(f"n{n}")) for n in range(5)]
        for n in range(turns):
            await asyncio.sleep(0)
    asyncio.run(main())
    print("ended", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(("turns", "hung"), [(0, False), (2, False), (2, True)], ids=str)
def test_the_end_of_a_loop_leaves_nothing(
    look: Look, proxy: FaultProxy, prefix: str, turns: int, hung: bool
) -> None:
    """asyncio.run returns while tasks hold, wait and ask: all is free, and there is no complaint.

    Where the server hangs, what was to be given back is on its way.
    """
    process = program(_LOOP, proxy.url, prefix)
    try:
        assert said(process) == "waiting"
        if hung:
            proxy.stall()
        tell(process, turns)
        assert said(process) == "ended"
        proxy.resume()
        look.nothing_left(5)
        _, errors = process.communicate("\n", timeout=LONG)
        assert process.returncode == 0
        assert all(line.startswith(("lock ", "leases ")) for line in errors.splitlines()), errors
    finally:
        end(process)


# The wake-up connection


@pytest.fixture
def wire(valkey: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy that only wake-up connections pass."""
    with FaultProxy(valkey) as proxy:
        for kind in (SyncTransport, AsyncTransport):

            def settings_for(transport: Any, command: Any) -> Any:
                return transport._settings.at(("127.0.0.1", proxy.port))

            monkeypatch.setattr(kind, "settings_for", settings_for)
        yield proxy


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners ask often whether the server is there, and end soon when nobody waits."""
    for name, seconds in (("_ASK_EVERY", 0.2), ("_ANSWER_IN", 0.3), ("_IDLE", 0.3)):
        monkeypatch.setattr(_listener, name, seconds)


@pytest.mark.parametrize("trouble", ["cut", "reset", "away", "hung"])
def test_a_wake_up_connection_in_trouble(
    world: World, look: Look, valkey: Server, wire: FaultProxy, hasty: None, trouble: str
) -> None:
    """Who waits gets the lock although it could not be told, long before a lease ends."""
    client = world.client(valkey.url)
    rival = Rival(world, valkey.url)
    turns = [world.begin(world.lock(client, wait=LONG).acquire) for _ in range(3)]
    look.wait_for_line(3)
    connections = wire.connections
    if trouble == "hung":
        wire.stall()
        rival.release()
        eventually(lambda: wire.connections > connections, LONG)
        wire.resume()
    else:
        if trouble == "away":
            wire.refuse()
        wire.cut(reset=trouble == "reset")
        rival.release()
        wire.accept()
    assert sorted(served(world, turns)) == [0, 1, 2]
    look.nothing_left()


def served(world: World, turns: list[Future[Any]]) -> list[int]:
    """Return in which order some get the lock; each gives it back at once."""
    waiting = dict(enumerate(turns))

    def next_one() -> list[int]:
        return [n for n, turn in waiting.items() if turn.done()]

    order = []
    while waiting:
        (now,) = eventually(next_one, LONG)
        order.append(now)
        world.do(waiting.pop(now).result().release)
    return order


@pytest.mark.parametrize("keeps", [True, False], ids=["remembers", "forgets"])
def test_a_server_that_is_restarted_while_some_wait(
    world: World, prefix: str, keeps: bool, hasty: None
) -> None:
    """All get the lock in the end, by their tickets where the server has kept the line."""
    with valkey_server(appendonly=keeps, appendfsync="always") as server:
        look = Look(server, prefix)
        client = world.client(server.url, client_name=prefix)
        rival = Rival(world, client)
        turns = []
        for n in range(4):
            if n == 2:
                server.restart()
                eventually(lambda: wakers(server, prefix) == 1, LONG)
            turns.append(world.begin(world.lock(client, wait=LONG).acquire))
            if keeps or n < 2:
                look.wait_for_line(n + 1)
        if keeps:
            rival.release()
            assert served(world, turns) == [0, 1, 2, 3]
        else:
            with pytest.raises(LockLostError):
                rival.release()
            assert sorted(served(world, turns)) == [0, 1, 2, 3]
        look.nothing_left()
        look.close()


def test_a_place_in_line_outlives_the_line(
    world: World, look: Look, valkey: Server, prefix: str
) -> None:
    """Where the server has lost it, those who look again stand where they stood."""
    rival = Rival(world, valkey.url)
    turns = []
    for name in ("first", "second"):
        client = world.client(valkey.url, client_name=f"{prefix}-{name}")
        turns.append(world.begin(world.lock(client, wait=LONG).acquire))
        look.wait_for_line(len(turns))
    look.raw.delete(f"{prefix}:l1:{{k}}:line")
    for count, name in enumerate(("second", "first"), 1):
        for each in look.raw.client_list(_type="pubsub"):
            if each["name"] == f"{prefix}-{name}":
                look.raw.client_kill_filter(_id=each["id"])
        look.wait_for_line(count)
    rival.release()
    # In their order, unless one took too long to answer, which is then the last.
    assert sorted(served(world, turns)) == [0, 1]
    look.nothing_left()


def test_scripts_forgotten_between_any_two_commands(
    world: World, look: Look, valkey: Server
) -> None:
    """They are sent again, to acquire, to wait, to extend, to renew and to release."""

    def forget(*about: Any) -> None:
        look.raw.script_flush()

    forget()
    lock = world.lock(valkey.url, wait=LONG, on_command=forget)
    for _ in range(3):
        rival = Rival(world, valkey.url, on_command=forget)
        turn = world.begin(lock.acquire)
        look.wait_for_line(1)
        forget()
        rival.release()
        held = turn.result(LONG)
        world.do(held.extend)
        world.do(held.release)
    renewing = world.do(world.lock(valkey.url, "r", ttl=0.4, renew=True).acquire)
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        forget()
        renewing.check()
        time.sleep(0.001)
    world.do(renewing.release)
    look.nothing_left()


def wakers(server: Server, name: str) -> int:
    """Count the wake-up connections of a client."""
    with server.client() as raw:
        clients: Any = raw.client_list(_type="pubsub")
    return sum(client["name"] == name for client in clients)


def test_one_wake_up_connection_for_all(
    world: World, look: Look, valkey: Server, prefix: str, hasty: None
) -> None:
    """Fifty locks and fifty waiters on one more have one connection and one thread or task.

    They end when nobody waits, and are there again for who waits then.
    """
    before = set(world.workers("redishacks-wake"))
    client = world.client(valkey.url, client_name=prefix)
    locks = [world.lock(client, f"k{n}", wait=LONG) for n in range(50)]
    names = [lock.name for lock in locks] + ["one"] * 50
    locks += [world.lock(client, "one", wait=LONG) for _ in range(50)]
    for _ in range(2):
        rivals = [Rival(world, valkey.url, name) for name in dict.fromkeys(names)]
        turns = [world.begin(lock.acquire) for lock in locks]
        eventually(lambda: all(len(look.in_line(f"k{n}")) == 1 for n in range(50)), LONG)
        look.wait_for_line(50, "one")
        assert wakers(valkey, prefix) == 1
        assert len(set(world.workers("redishacks-wake")) - before) == 1
        for rival in rivals:
            rival.release()
        for turn in concurrent.futures.as_completed(turns, LONG):
            world.do(turn.result().release)
        eventually(lambda: wakers(valkey, prefix) == 0, LONG)
        eventually(lambda: not set(world.workers("redishacks-wake")) - before, LONG)
    look.nothing_left()


def test_who_may_not_listen_is_told_so(world: World, look: Look, valkey: Server) -> None:
    """However many come at once, each hears why it cannot wait, and is not in line."""
    raw: Any = look.raw
    raw.acl_setuser(
        "deaf",
        reset=True,
        enabled=True,
        passwords=["+secret"],
        keys=["*"],
        categories=["+@all"],
    )
    try:
        client = world.client(valkey.url, username="deaf", password="secret")
        rival = Rival(world, client)
        lock = world.lock(client, wait=LONG, deadline=5)
        began = time.monotonic()
        for _ in range(2):
            turns = [world.begin(lock.acquire) for _ in range(5)]
            for turn in turns:
                with pytest.raises(ServerError, match="NOPERM"):
                    turn.result(LONG)
        assert time.monotonic() - began < 4
        rival.release()
        look.nothing_left()
    finally:
        raw.execute_command("ACL", "DELUSER", "deaf")


# Waiters that are dead or stopped


class Crowd:
    """Processes that wait for a lock, each in so many threads."""

    _CODE = """
        import os, sys, threading, time
        from redishacks.locks import Lock
        url, prefix, name, processes, threads = sys.argv[1:]
        def wait():
            Lock(url, name, prefix=prefix, wait=None, ttl=300).acquire()
        children = []
        for _ in range(int(processes)):
            child = os.fork()
            if child == 0:
                for _ in range(int(threads)):
                    threading.Thread(target=wait).start()
                time.sleep(600)
            children.append(child)
        print(*children, flush=True)
        sys.stdin.readline()
    """

    def __init__(self, server: Server, prefix: str) -> None:
        self._server = server
        self._prefix = prefix
        self._programs: list[subprocess.Popen[str]] = []
        self.pids: list[int] = []

    def come(self, processes: int, threads: int, name: str = "k") -> None:
        """Have them stand in line."""
        url = f"{self._server.url}?client_name={self._prefix}-crowd"
        counts = (str(processes), str(threads))
        self._programs.append(program(self._CODE, url, self._prefix, name, *counts))
        self.pids = [int(pid) for pid in said(self._programs[-1]).split()]

    def die(self) -> None:
        """SIGKILL, and return when the server has noticed."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: wakers(self._server, f"{self._prefix}-crowd") == 0, LONG)
        self.pids = []

    def stop(self) -> None:
        """SIGSTOP: connected, and silent."""
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda pid=pid: is_stopped(pid))  # type: ignore[misc]

    def go(self) -> None:
        """End all of them."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for each in self._programs:
            end(each)


@pytest.fixture
def crowd(valkey: Server, prefix: str) -> Iterator[Crowd]:
    """Other processes that wait."""
    made = Crowd(valkey, prefix)
    yield made
    made.go()


def test_dead_waiters_cost_nothing(world: World, look: Look, valkey: Server, crowd: Crowd) -> None:
    """With five killed processes ahead of it a live one gets the lock at once."""
    took: list[float] = []
    while not took or (min(took) > 0.05 and len(took) < 5):  # the machine may be busy
        rival = Rival(world, valkey.url)
        crowd.come(5, 1)
        look.wait_for_line(5)
        turn = world.begin(world.lock(valkey.url, wait=LONG).acquire)
        look.wait_for_line(6)
        crowd.die()
        began = time.monotonic()
        rival.release()
        held = turn.result(LONG)
        took.append(time.monotonic() - began)
        world.do(held.release)
    assert min(took) < 0.05
    look.nothing_left()


@pytest.mark.parametrize("threads", [1, 12])
def test_a_stopped_waiter_costs_a_moment(
    world: World, look: Look, valkey: Server, crowd: Crowd, threads: int
) -> None:
    """The lock is kept for 200 ms for a process that is stopped, however often it is in line."""
    rival = Rival(world, valkey.url)
    crowd.come(1, threads)
    look.wait_for_line(threads)
    turn = world.begin(world.lock(valkey.url, wait=LONG).acquire)
    look.wait_for_line(threads + 1)
    crowd.stop()
    began = time.monotonic()
    rival.release()
    held = turn.result(LONG)
    took = time.monotonic() - began
    assert took > 0.19
    world.do(held.release)
    assert took < 2


def test_a_loss_of_others_is_none_of_ours(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, crowd: Crowd
) -> None:
    """Who repeats a release that was heard is not told of a loss, though the next one had one."""
    rival = Rival(world, valkey.url)
    lock = world.lock(proxy.url, deadline=LONG)
    turn = world.begin(lock.acquire, wait=LONG)
    look.wait_for_line(1)
    rival.release()
    held = turn.result(LONG)
    short = world.begin(world.lock(valkey.url, ttl=0.05, wait=LONG).acquire)
    look.wait_for_line(1)
    crowd.come(1, 1)
    look.wait_for_line(2)
    proxy.drop_reply(of="EVALSHA", cut=False)
    release = world.begin(held.release)
    fence = short.result(LONG).fence
    eventually(lambda: look.fence() > fence, LONG)
    assert not release.done()
    proxy.cut()
    release.result(LONG)
    assert Lock(valkey.url, "k", prefix=world.prefix).force_release()


def test_a_lease_shorter_than_the_one_before(world: World, look: Look, valkey: Server) -> None:
    """Whoever waits next overtakes it when it ends, not when that of the one before would have."""
    rival = Rival(world, valkey.url)
    short = world.begin(world.lock(valkey.url, ttl=0.3, wait=LONG).acquire)
    look.wait_for_line(1)
    turn = world.begin(world.lock(valkey.url, wait=LONG).acquire)
    look.wait_for_line(2)
    rival.release()
    short.result(LONG)
    world.do(turn.result(5).release)
    look.nothing_left()


# Sockets' timeouts


def test_a_wait_is_longer_than_a_timeout_of_the_client(
    world: World, look: Look, valkey: Server
) -> None:
    """redis-py's own timeouts are for its own connections."""
    client = world.client(valkey.url, socket_timeout=0.2, socket_connect_timeout=0.2)
    rival = Rival(world, client)
    lock = world.lock(client)
    began = time.monotonic()
    with pytest.raises(LockedError):
        world.do(lock.acquire, wait=0.6)
    assert 0.6 <= time.monotonic() - began < 5
    turn = world.begin(lock.acquire, wait=LONG)
    time.sleep(0.3)
    rival.release()
    world.do(turn.result(LONG).release)
    look.nothing_left()


# Clusters


class Nodes:
    """A cluster, and what there is of locks on it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        #: A client for others than those who are tested.
        self.other = cluster.client()

    def client(self, world: World, **options: Any) -> Any:
        """Return a client of the world's colour."""
        host, port = self.cluster.startup_nodes[0]
        return world.module.RedisCluster(host=host, port=port, **options)

    def slot(self, world: World, name: str) -> int:
        """Return the slot of a lock."""
        return key_slot(f"{world.prefix}:l1:{{{name}}}:lock".encode())

    def names(self, world: World) -> list[str]:
        """Return names of locks, one on each node."""
        found: dict[int, str] = {}
        for n in itertools.count():
            node = self.cluster.node_of(self.slot(world, f"k{n}"))
            found.setdefault(node.port, f"k{n}")
            if len(found) == len(self.cluster.nodes):
                return list(found.values())
        raise AssertionError

    def next_node(self, world: World, name: str) -> int:
        """Return the index of another node than the one that a lock is on."""
        owner = self.cluster.nodes.index(self.cluster.node_of(self.slot(world, name)))
        return (owner + 1) % len(self.cluster.nodes)

    def in_line(self, world: World, name: str) -> int:
        """Count who waits."""
        return int(self.other.zcard(f"{world.prefix}:l1:{{{name}}}:line"))

    def nothing_left(self, world: World, *names: str) -> None:
        """Return when nobody holds and nobody waits for these."""
        for name in names:
            key = f"{world.prefix}:l1:{{{name}}}:lock"
            eventually(lambda key=key: str(self.other.get(key))[2:4] == "- ", LONG)  # type: ignore[misc]
            eventually(lambda name=name: not self.in_line(world, name), LONG)  # type: ignore[misc]

    def close(self) -> None:
        """Close the connections."""
        self.other.close()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Three primaries, whose slots may be moved."""
    with valkey_cluster() as cluster:
        made = Nodes(cluster)
        yield made
        made.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_on_a_cluster(world: World, nodes: Nodes, protocol: int) -> None:
    """Locks on every node are taken, waited for and handed over; who waits is told in its slot."""
    client = nodes.client(world, protocol=protocol)
    names = nodes.names(world)
    for name in names:
        rival = Rival(world, client, name)
        lock = world.lock(client, name)
        with pytest.raises(LockedError):
            world.do(lock.acquire)
        turns = [world.begin(lock.acquire, wait=LONG) for _ in range(3)]
        eventually(lambda name=name: nodes.in_line(world, name) == 3, LONG)  # type: ignore[misc]
        with nodes.cluster.node_of(nodes.slot(world, name)).client() as raw:
            assert len(raw.pubsub_shardchannels()) >= 1
            assert raw.pubsub_channels() == []
        rival.release()
        assert sorted(served(world, turns)) == [0, 1, 2]
    nodes.nothing_left(world, *names)


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_a_slot_that_moves_while_some_wait(world: World, nodes: Nodes, known: bool) -> None:
    """They go with it, whether or not the new node's messages come in already."""
    client = nodes.client(world)
    rival = Rival(world, nodes.other if world.flavour == "sync" else client)
    target = nodes.next_node(world, "k")
    other = next(
        name
        for name in nodes.names(world)
        if nodes.cluster.node_of(nodes.slot(world, name)) is nodes.cluster.nodes[target]
    )
    if known:
        busy = Rival(world, client, other)
        waits = world.begin(world.lock(client, other, wait=LONG).acquire)
        eventually(lambda: nodes.in_line(world, other) == 1, LONG)
    turns = []
    for n in range(2):
        turns.append(world.begin(world.lock(client, wait=LONG).acquire))
        eventually(lambda n=n: nodes.in_line(world, "k") == n + 1, LONG)  # type: ignore[misc]
    nodes.cluster.move_slot(nodes.slot(world, "k"), target)
    rival.release()
    # In their order, unless one took too long to answer, which is then the last.
    assert sorted(served(world, turns)) == [0, 1]
    if known:
        busy.release()
        world.do(waits.result(LONG).release)
        nodes.nothing_left(world, other)
    nodes.nothing_left(world, "k")


def test_a_slot_that_moves_to_and_fro(world: World, nodes: Nodes) -> None:
    """Who waits on, or comes when it is back, is told there again."""
    client = nodes.client(world)
    home = nodes.cluster.nodes.index(nodes.cluster.node_of(nodes.slot(world, "k")))
    rival = Rival(world, client)
    turns = []
    for n, target in enumerate(((home + 1) % 3, home, (home + 1) % 3, home)):
        turns.append(world.begin(world.lock(client, wait=LONG).acquire))
        eventually(lambda n=n: nodes.in_line(world, "k") == n + 1, LONG)  # type: ignore[misc]
        nodes.cluster.move_slot(nodes.slot(world, "k"), target)
    rival.release()
    assert served(world, turns) == [0, 1, 2, 3]
    nodes.nothing_left(world, "k")


def test_a_slot_that_moves_before_one_listens(world: World, nodes: Nodes) -> None:
    """The old node does not let it listen any more; it goes to the new one."""
    moved: list[int] = []

    def move(command: str, *about: Any) -> None:
        if command == "lock_acquire" and not moved:
            moved.append(nodes.next_node(world, "k"))
            nodes.cluster.move_slot(nodes.slot(world, "k"), moved[0])

    with Lock(nodes.other, "k", prefix=world.prefix, ttl=LEASE):
        lock = world.lock(nodes.client(world), wait=LONG, on_command=move)
        turn = world.begin(lock.acquire)
        eventually(lambda: turn.done() or nodes.in_line(world, "k") == 1, LONG)
    world.do(turn.result(LONG).release)
    nodes.nothing_left(world, "k")


def test_a_release_between_two_nodes_is_not_missed(world: World, nodes: Nodes) -> None:
    """Whoever has come to the new node, and does not hear its messages yet, looks again."""
    client = nodes.client(world)
    target = nodes.next_node(world, "k")
    other = next(
        name
        for name in nodes.names(world)
        if nodes.cluster.node_of(nodes.slot(world, name)) is nodes.cluster.nodes[target]
    )
    busy = Rival(world, client, other)
    waits = world.begin(world.lock(client, other, wait=LONG).acquire)
    eventually(lambda: nodes.in_line(world, other) == 1, LONG)
    rival = Lock(nodes.other, "k", prefix=world.prefix, ttl=LEASE).acquire()
    moved = threading.Event()

    def let_go(command: str, node: str, *about: Any) -> None:
        if moved.is_set():
            rival.release()  # again does no harm

    turn = world.begin(world.lock(client, wait=LONG, on_command=let_go).acquire)
    eventually(lambda: nodes.in_line(world, "k") == 1, LONG)
    moved.set()
    nodes.cluster.move_slot(nodes.slot(world, "k"), target)
    world.do(turn.result(LONG).release)
    busy.release()
    world.do(waits.result(LONG).release)
    nodes.nothing_left(world, "k", other)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_slot_that_is_being_moved(world: World, nodes: Nodes, share: float) -> None:
    """Wherever the keys of a lock are just then: whoever waits goes on, no release is lost."""
    client = nodes.client(world)
    slot = nodes.slot(world, "k")
    rival = Rival(world, client, deadline=0.3)
    turn = world.begin(world.lock(client, wait=LONG, deadline=0.3).acquire)
    eventually(lambda: nodes.in_line(world, "k") == 1, LONG)
    target = nodes.next_node(world, "k")
    nodes.cluster.begin_migration(slot, target, share=share)
    try:
        rival.release()
    finally:
        nodes.cluster.move_slot(slot, target)
    world.do(turn.result(LONG).release)
    nodes.nothing_left(world, "k")


@pytest.fixture(scope="module")
def old_nodes() -> Iterator[tuple[Server, Server]]:
    """A cluster of two nodes of Redis 6.2, which has no channels that belong to a slot."""
    found = [binary for binary in servers_available() if binary.kind == "redis"]
    if not found:
        pytest.skip("no redis-server")
    with contextlib.ExitStack() as stack:
        made = []
        for first in (0, 8192):
            server = Server(found[0], {}, lines=["cluster-enabled yes"])
            stack.callback(server.close)
            server.start()
            made.append(server)
            with server.client() as raw:
                raw.execute_command("CLUSTER", "ADDSLOTS", *range(first, first + 8192))
        if not made[0].version.startswith("6."):
            pytest.skip(f"this is Redis {made[0].version}")
        with made[0].client() as one, made[1].client() as two:
            two.execute_command("CLUSTER", "SET-CONFIG-EPOCH", 2)
            one.execute_command("CLUSTER", "MEET", made[1].host, made[1].port)
            for raw in (one, two):
                eventually(
                    lambda raw=raw: (  # type: ignore[misc]
                        b"cluster_state:ok" in raw.execute_command("CLUSTER", "INFO")
                        and len(raw.execute_command("CLUSTER", "SLOTS")) == 2
                    ),
                    LONG,
                )
        yield made[0], made[1]


def test_on_an_old_cluster(world: World, old_nodes: tuple[Server, Server], prefix: str) -> None:
    """Who waits there is told through the node of the lock."""
    client = world.module.RedisCluster(host=old_nodes[0].host, port=old_nodes[0].port)
    for name in ("k0", "k1", "k2", "k3", "k4"):
        key = f"{prefix}:l1:{{{name}}}:lock".encode()
        with old_nodes[key_slot(key) >= 8192].client() as raw:
            rival = Rival(world, client, name)
            turns = [world.begin(world.lock(client, name, wait=LONG).acquire) for _ in range(3)]
            eventually(lambda raw=raw, name=name: raw.zcard(f"{prefix}:l1:{{{name}}}:line") == 3)  # type: ignore[misc]
            (channel,) = raw.pubsub_channels(f"{prefix}*")
            assert raw.pubsub_numsub(channel)[0][1] == 1
            rival.release()
            assert sorted(served(world, turns)) == [0, 1, 2]
            assert str(raw.get(key))[2:4] == "- "
    if world.flavour == "sync":
        client.close()


# Replicas


@pytest.fixture(scope="module")
def sentinel() -> Iterator[SentinelSetup]:
    """A primary, a replica and a sentinel."""
    with valkey_sentinel() as setup:
        yield setup


def in_step(setup: SentinelSetup) -> bool:
    """Return whether the replica has all that the primary has."""
    with setup.primary.client() as raw:
        offsets: Any = raw.info("replication")
        return bool(offsets["slave0"]["offset"] == offsets["master_repl_offset"])


@pytest.mark.slow
def test_a_failover_while_some_wait(sentinel: SentinelSetup, prefix: str) -> None:
    """They get the lock from the new master, in order, once it was given back there."""
    worlds = [World("sync", prefix), World("async", prefix)]
    clients = [
        world.module.sentinel.Sentinel(sentinel.sentinels).master_for(sentinel.service)
        for world in worlds
    ]
    rival = Rival(worlds[0], clients[0], deadline=2)
    before = Look(sentinel.primary, prefix)
    turns = []
    for n in range(4):
        world, client = worlds[n % 2], clients[n % 2]
        turns.append(world.begin(world.lock(client, wait=60).acquire))
        before.wait_for_line(n + 1)
    before.close()
    eventually(lambda: in_step(sentinel), LONG)
    sentinel.failover()
    look = Look(sentinel.primary, prefix)
    look.wait_for_line(4)
    eventually(lambda: look.hearing() == 2, LONG)
    rival.release()
    order = []
    for n, turn in enumerate(turns):
        held = turn.result(LONG)
        order.append(held.fence)
        worlds[n % 2].do(held.release)
    assert order == sorted(order)
    look.nothing_left()
    look.close()
    for world in worlds:
        world.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Server, Server]]:
    """A primary and its replica."""
    with (
        valkey_server() as primary,
        valkey_server(replicaof=(primary.host, primary.port)) as replica,
    ):
        with replica.client() as raw:
            eventually(lambda: raw.execute_command("ROLE")[3] == b"connected", LONG)
        yield primary, replica


def test_a_replica_must_have_it(world: World, pair: tuple[Server, Server], prefix: str) -> None:
    """With a replica that answers it is acquired; without, it is refused and given back."""
    primary, replica = pair
    look = Look(primary, prefix)
    lock = world.lock(primary.url, replicas=1, deadline=1)
    held = world.do(lock.acquire)
    with replica.client() as raw:
        assert str(raw.get(f"{prefix}:l1:{{k}}:lock"))[2:].startswith(held.token)
    turn = world.begin(lock.acquire, wait=LONG)
    look.wait_for_line(1)
    world.do(held.release)
    world.do(turn.result(LONG).release)
    with pytest.raises(UnavailableError, match="replicas"):
        world.do(world.lock(primary.url, replicas=2, deadline=0.5).acquire)
    look.nothing_left(1)
    with replica.paused():
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="replicas"):
            world.do(lock.acquire)
        assert time.monotonic() - began < 3
        look.nothing_left(1)
    look.close()


@pytest.mark.parametrize("of", ["WAIT", "EVALSHA"])
@pytest.mark.parametrize("fault", FAULTS)
def test_replicas_and_lost_replies(
    world: World, pair: tuple[Server, Server], prefix: str, fault: str, of: str
) -> None:
    """Either it is acquired, or it is said that it was not, and given back."""
    look = Look(pair[0], prefix)
    with FaultProxy(pair[0]) as proxy:
        lock = world.lock(proxy.url, replicas=1)
        for n in itertools.count(1):
            world.do(lock.holders)
            getattr(proxy, fault)(n, of=of)
            with contextlib.suppress(UnavailableError):
                world.do(world.do(lock.acquire).release)
            done = proxy.armed == 1
            proxy.heal()
            look.nothing_left(10)
            if done:
                break
        assert n > 1
    look.close()


def test_a_cancel_while_replicas_are_asked(pair: tuple[Server, Server], prefix: str) -> None:
    """It is given back."""
    look = Look(pair[0], prefix)

    async def main() -> None:
        lock = AsyncLock(pair[0].url, "k", prefix=prefix, ttl=LEASE, replicas=1, deadline=5)
        await (await lock.acquire()).release()
        with pair[1].paused():
            task = asyncio.create_task(lock.acquire())
            await asyncio.to_thread(eventually, look.left, LONG)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(look.nothing_left, 5)

    asyncio.run(main())
    look.close()


# Clients of every sort


def story(world: World, make: Callable[[], Any]) -> None:
    """Take, refuse, wait, extend, hand over, force: what one client does, another one finds."""
    rival = Rival(world, make(), label="rival")
    lock = world.lock(make(), label="ours")
    with pytest.raises(LockedError) as caught:
        world.do(lock.acquire)
    assert caught.value.holder is not None
    assert (caught.value.holder.label, caught.value.holder.pid) == ("rival", os.getpid())
    with pytest.raises(LockedError):
        world.do(lock.acquire, wait=0.05)
    turns = [world.begin(lock.acquire, wait=LONG) for _ in range(2)]
    time.sleep(0.05)
    assert not any(turn.done() for turn in turns)
    rival.release()
    first = eventually(lambda: next((turn for turn in turns if turn.done()), None), LONG)
    held = first.result()
    assert held.fence > rival.held.fence
    world.do(held.extend, 7)
    (holder,) = world.do(lock.holders)
    assert (holder.label, holder.fence, round(holder.remaining)) == ("ours", held.fence, 7)
    world.do(held.release)
    turns.remove(first)
    second = turns[0].result(LONG)
    assert world.do(lock.force_release)
    with pytest.raises(LockLostError):
        world.do(second.release)
    assert world.do(lock.holders) == []


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": 2},
        {"protocol": 3, "decode_responses": True, "encoding": "latin-1"},
    ],
    ids=str,
)
def test_however_the_client_reads(world: World, valkey: Server, options: dict[str, Any]) -> None:
    """RESP2, RESP3 and decoding are the user's business."""
    story(world, lambda: world.client(valkey.url, **options))


def test_over_a_unix_socket(world: World, valkey: Server) -> None:
    """Who waits is told there, too."""
    story(world, lambda: valkey.unix_url)
    story(world, lambda: world.client(valkey.unix_url))


@pytest.mark.parametrize("options", [{}, {"protocol": 3, "decode_responses": True}], ids=str)
def test_in_a_users_unit_test(world: World, options: dict[str, Any]) -> None:
    """fakeredis with Lua stands in for a server; who waits looks again and again."""
    kind: Any = fakeredis.FakeAsyncRedis if world.flavour == "async" else fakeredis.FakeRedis
    server = fakeredis.FakeServer()
    story(world, lambda: kind(server=server, **options))


@pytest.fixture
def tls_port(valkey: Server) -> Iterator[int]:
    """A port where TLS leads to the session's Valkey."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    taken: list[socket.socket] = []

    def relay(plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain:
            client = context.wrap_socket(plain, server_side=True)
            taken.append(client)
            with client, socket.create_connection((valkey.host, valkey.port)) as server:
                while True:
                    more = client.pending() > 0
                    ready = select.select([client, server], [], [], 0 if more else None)[0]
                    for side in {client, *ready} if more else ready:
                        data = side.recv(65536)
                        if not data:
                            return
                        (server if side is client else client).sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=relay, args=(listener.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=accept)]
        threads[0].start()
        yield listener.getsockname()[1]
        for side in (listener, *taken):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(side, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(LONG)


def test_through_tls(world: World, tls_port: int) -> None:
    """The wake-up connection speaks TLS as the others do."""
    options = {"ssl_ca_certs": str(PEM), "ssl_cert_reqs": "required"}
    story(world, lambda: world.client(f"rediss://localhost:{tls_port}/0", **options))


# Forks


_FORKING = """
    import os, signal, sys, time
    from redishacks.errors import RedisHacksError
    from redishacks.locks import Lock
    url, prefix, when = sys.argv[1:]
    lock = Lock(url, "k", prefix=prefix, ttl=300, wait=None if when == "waiting" else 0)
    reading, writing = os.pipe()
    child = -1
    def fork(*about):
        global child
        child = os.fork()
        if child == 0:
            if when == "asking":
                os.read(reading, 1)  # what goes on below is done much later
            return
        print("forked", flush=True)
    signal.signal(signal.SIGUSR1, fork)
    lock.holders()
    print("ready", flush=True)
    sys.stdin.readline()
    held = lock.acquire()
    os.write(1, f"{child} {held.token} {held.fence}\\n".encode())
    held.check()
    held.release()
    if child:
        if when == "asking":
            sys.stdin.readline()
            os.write(writing, b"!")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"child {code}\\n".encode())
    os._exit(0)
"""


def test_a_fork_while_one_waits(valkey: Server, look: Look, prefix: str) -> None:
    """A signal handler forks a process that goes on: each of the two gets the lock for itself."""
    world = World("sync", prefix)
    rival = Rival(world, valkey.url)
    process = program(_FORKING, valkey.url, prefix, "waiting")
    try:
        assert said(process) == "ready"
        tell(process, "go")
        look.wait_for_line(1)
        time.sleep(0.1)  # it has its answer, and sleeps
        process.send_signal(signal.SIGUSR1)
        assert said(process) == "forked"
        look.wait_for_line(2)
        rival.release()
        one, two = said(process).split(), said(process).split()
        assert {one[0] == "0", two[0] == "0"} == {True, False}
        assert one[1] != two[1]
        assert int(one[2]) < int(two[2])
        assert said(process) == "child 0"
        look.nothing_left()
    finally:
        end(process)


def test_a_fork_while_one_asks(valkey: Server, look: Look, proxy: FaultProxy, prefix: str) -> None:
    """What the parent asked for is not asked for again by the child, who gets a lock of its own."""
    world = World("sync", prefix)
    process = program(_FORKING, proxy.url, prefix, "asking")
    try:
        assert said(process) == "ready"
        proxy.stall_replies()
        tell(process, "go")
        eventually(look.left, LONG)
        process.send_signal(signal.SIGUSR1)
        assert said(process) == "forked"
        proxy.resume()
        parent = said(process).split()
        assert parent[0] != "0"
        look.nothing_left()
        rival = Rival(world, valkey.url)
        rival.release()
        tell(process, "go")
        child = said(process).split()
        assert child[0] == "0"
        assert child[1] != parent[1]
        assert int(parent[2]) < rival.held.fence < int(child[2])
        assert said(process) == "child 0"
        look.nothing_left()
    finally:
        end(process)


_PRELOADED = """
    import os, sys, threading, time
    from redishacks.locks import Lock
    lock = Lock(sys.argv[1], "k", prefix=sys.argv[2], ttl=300, wait=None)
    def use():
        for _ in range(10):
            with lock as held:
                held.check()
                time.sleep(0.001)
    def some():
        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        return threads
    def over(threads):
        for thread in threads:
            thread.join()
    ours = some()
    time.sleep(0.02)  # they wait and are woken while children come to be
    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            over(some())
            os._exit(0)
    over(ours)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


def test_one_lock_for_a_parent_and_its_children(valkey: Server, look: Look, prefix: str) -> None:
    """A lock that was made, and is in use, before the fork serves all processes in turn."""
    process = program(_PRELOADED, valkey.url, prefix)
    try:
        out, errors = process.communicate(timeout=60)
        assert out.strip() == "[0, 0, 0]", errors
        look.nothing_left()
    finally:
        end(process)


# Extensions that nobody has heard of


@pytest.mark.parametrize("again", [False, True], ids=["once", "extended again"])
def test_a_shorter_lease_that_nobody_heard_of(
    world: World, valkey: Server, proxy: FaultProxy, again: bool
) -> None:
    """The holder counts on no more than the shorter one, whatever it asks for next; so no two
    believe that they have the lock.
    """
    lock = world.lock(proxy.url, deadline=0.3)
    held = world.do(lock.acquire)
    proxy.drop_reply(of="EVALSHA", cut=False)
    proxy.drop_reply(2, of="EVALSHA", cut=False)
    with pytest.raises(UnavailableError):
        world.do(held.extend, 1.5)
    proxy.heal()
    assert held.remaining <= 1.5
    if again:
        world.do(held.extend, LEASE)
        assert held.remaining <= 1.5
    other = world.lock(valkey.url)
    eventually(lambda: held.lost)
    if not again:
        world.do(world.do(other.acquire, wait=LONG).release)


def test_a_shorter_lease_of_several(world: World, proxy: FaultProxy) -> None:
    """An error about one lock keeps none of the others from counting right."""
    kind: Any = AsyncMultiLock if world.flavour == "async" else MultiLock
    several = kind(proxy.url, ["a", "b", "c"], prefix=world.prefix, ttl=LEASE)
    held = world.do(several.acquire)
    world.do(several.locks[1].force_release)
    with pytest.raises(LockLostError):
        world.do(held.extend, 0.2)
    assert held.lost
    assert held.parts[0].remaining <= 0.2
    assert held.parts[2].remaining <= 0.2
    with pytest.raises(LockLostError):
        world.do(held.release)


def test_an_extension_that_is_cancelled(prefix: str, valkey: Server, proxy: FaultProxy) -> None:
    """A cancellation leaves the holder with what is sure."""

    async def run() -> None:
        lock = AsyncLock(proxy.url, "k", prefix=prefix, ttl=LEASE)
        held = await lock.acquire()
        proxy.stall()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await held.extend(0.5)
        assert held.remaining <= 0.5
        proxy.resume()
        eventually(lambda: held.lost)
        with pytest.raises(LockLostError):
            await held.release()

    asyncio.run(run())


def test_late_copies_cut_no_lease_short(
    world: World, look: Look, valkey: Server, proxy: FaultProxy
) -> None:
    """Neither one of the question nor one of a renewal, though the lease was extended since."""
    lock = world.lock(proxy.url, ttl=1)
    said = Recorder(lock)
    held = world.do(lock.acquire)
    world.do(held.extend, LEASE)
    assert replayed(valkey, said.asked[0]) == 1
    assert look.raw.pttl(f"{world.prefix}:l1:{{k}}:lock") > 0
    (holder,) = world.do(lock.holders)
    assert holder.remaining > LEASE - LONG
    renewal: Command[Any] = Command(
        (held.token, "1000000"), (held.key,), script=script("lock_extend")
    )
    assert connect(valkey.url).call(renewal, 5.0) == []
    (holder,) = world.do(lock.holders)
    assert holder.remaining > LEASE - LONG
    world.do(held.release)


def test_a_late_copy_of_several(
    world: World, look: Look, valkey: Server, proxy: FaultProxy, short_grace: float
) -> None:
    """Locks that were taken together, after a first try in doubt, are left by it in the end."""
    kind: Any = AsyncMultiLock if world.flavour == "async" else MultiLock
    several = kind(proxy.url, ["a", "b"], prefix=world.prefix, ttl=LEASE, deadline=0.3)
    said: list[Any] = []
    first = several.locks[0].kind
    acquire_all = first.acquire_all

    def noted(*args: Any) -> Any:
        said.append(acquire_all(*args))
        return said[-1]

    first.acquire_all = noted
    world.do(several.locks[0].holders)
    proxy.drop_request(of="EVALSHA", cut=False)
    world.do(world.do(several.acquire).release)
    for name in ("a", "b"):
        Rival(world, valkey.url, name).release()
    assert len(said) == 2
    replayed(valkey, said[0])
    look.nothing_left()


# Descriptors, signals and hooks


def test_the_listener_pauses_while_nobody_lets_it_in(
    world: World, valkey: Server, proxy: FaultProxy
) -> None:
    """While new connections are refused it costs no processor time, and it recovers."""
    lock = world.lock(proxy.url)
    world.do(lock.holders)
    rival = Rival(world, valkey.url)
    proxy.refuse()
    with pytest.raises((UnavailableError, LockedError)):
        world.do(lock.acquire, wait=1.2)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.5
    proxy.accept()
    turn = world.begin(lock.acquire, wait=LONG)
    eventually(lambda: turn.done() or wakers_of(valkey, world.prefix), LONG)
    rival.release()
    world.do(turn.result(LONG).release)


def wakers_of(server: Server, prefix: str) -> int:
    """Count the channels that somebody hears."""
    with server.client() as raw:
        return len(raw.pubsub_channels(f"{prefix}:*"))


@pytest.mark.parametrize("trouble", ["many", "none"])
def test_descriptors(valkey: Server, proxy: FaultProxy, prefix: str, trouble: str) -> None:
    """With thousands of them open, or after a time with none left, waiters are woken again when
    the connection for that could not be made at first.
    """
    code = """
        import os, resource, sys, threading
        from redishacks.errors import UnavailableError
        from redishacks.locks import Lock, LockedError
        url, direct, prefix, trouble = sys.argv[1:]
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        def room(files):
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
        room(min(3000, most))
        lock = Lock(url, "k", prefix=prefix, ttl=60)
        with lock:
            pass
        rival = []
        holder = Lock(direct, "k", prefix=prefix, ttl=60)
        thread = threading.Thread(target=lambda: rival.append(holder.acquire()))
        thread.start()
        thread.join()
        files = []
        if trouble == "none":
            room(len(os.listdir("/proc/self/fd")) + 4)
            try:
                while True:
                    files.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            os.close(files.pop()), os.close(files.pop())
        else:
            files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            lock.acquire(wait=0.5)
        except (UnavailableError, LockedError) as error:
            print("refused", flush=True)
        if trouble == "none":
            for file in files:
                os.close(file)
            room(min(3000, most))
        sys.stdin.readline()
        threading.Timer(0.5, rival[0].release).start()
        lock.acquire(wait=15).release()
        print("woken", flush=True)
    """
    running = program(code, proxy.url, valkey.url, prefix, trouble)
    try:
        assert said(running) == "ready"
        if trouble == "many":
            proxy.refuse()
        tell(running, "try")
        assert said(running) == "refused"
        proxy.accept()
        tell(running, "again")
        assert said(running) == "woken"
    finally:
        end(running)


def test_a_signal_handler_that_takes_a_lock(valkey: Server, prefix: str) -> None:
    """It may come at any moment, also while the main thread takes or renews one."""
    code = """
        import random, signal, sys, time
        from redishacks.locks import Lock
        url, prefix = sys.argv[1:]
        one = Lock(url, "one", prefix=prefix, ttl=5, renew=True)
        other = Lock(url, "other", prefix=prefix, ttl=5, renew=True)
        busy = handled = 0
        def handle(*_):
            global busy, handled
            if not busy:
                busy = 1
                with other:
                    handled += 1
                busy = 0
        with one, other:
            pass
        signal.signal(signal.SIGALRM, handle)
        end = time.monotonic() + 3
        while time.monotonic() < end:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 4e-4))
            with one:
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("done", handled)
    """
    done = program(code, valkey.url, prefix)
    shown, errors = done.communicate(timeout=60)
    assert shown.startswith("done"), errors
    assert int(shown.split()[1]) > 10


@pytest.mark.parametrize("event", ["waited", "held"])
def test_an_interrupt_in_a_hook(world: World, look: Look, valkey: Server, event: str) -> None:
    """Whatever a hook raises, a lock that nobody has a handle of is given back."""

    def hook(name: str, *_: Any) -> None:
        if name == event:
            raise Interrupt

    lock = world.lock(valkey.url, wait=LONG, on_event=hook)
    rival = Rival(world, valkey.url)
    turn = world.begin(lock.acquire)
    look.wait_for_line(1)
    rival.release()
    if event == "waited":
        with pytest.raises(Interrupt):
            turn.result(LONG)
    else:
        with pytest.raises(Interrupt):
            world.do(turn.result(LONG).release)
    look.nothing_left(5)


class Interrupt(BaseException):
    """Like Ctrl-C, though not for the loop."""


def test_channels_of_names_that_are_waited_for_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch, nodes: Nodes
) -> None:
    """On a cluster a process goes on hearing of few names that nobody waits for any more."""
    monkeypatch.setattr(_listener, "_MOST_CHANNELS", 3)
    client = nodes.client(world)

    def heard() -> int:
        found = 0
        for node in nodes.cluster.nodes:
            with node.client() as raw:
                found += len(raw.pubsub_shardchannels(f"{world.prefix}:*"))
        return found

    for n in range(20):
        name = f"many{n}"
        rival = Rival(world, client, name)
        turn = world.begin(world.lock(client, name).acquire, wait=LONG)
        eventually(lambda name=name: nodes.in_line(world, name) == 1, LONG)  # type: ignore[misc]
        rival.release()
        world.do(turn.result(LONG).release)
    assert 1 <= heard() <= 4 * len(nodes.cluster.nodes)
