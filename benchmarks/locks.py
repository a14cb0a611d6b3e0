"""Locks against redis-py's Lock, python-redis-lock, pottery's Redlock and the talk's code.

All use one server, over its unix socket unless a row says otherwise, and are told to wait as their
documentation shows. Processes that contend are real, and the same ones for every contender; they
have connected before the clock starts, and stamp what they do by the clock that all processes of a
machine share. What they noted down is checked: no two of them may have had a lock at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import multiprocessing as mp
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import pottery
import redis
import redis_lock  # type: ignore[import-untyped]

from benchmarks.harness import (
    Figure,
    Row,
    limit_row,
    percentile,
    ratio_row,
    show,
    side_by_side,
)
from redishacks._command import Command, Script
from redishacks._transport import connect
from redishacks.locks import Held, Lock, LockedError
from redishacks.locks.commands import Names
from redishacks.testing import Server, valkey_server

#: Seconds of a lease, wherever it does not matter.
TTL = 10
#: Seconds after which something has gone wrong, rather than taken long.
PATIENCE = 60.0

#: How often contention is measured, each contender in turn.
RUNS = 5
#: What contenders send and no script of theirs calls: so many commands come from clients.
#: python-redis-lock's script calls GET once, which so counts the scripts. Ours has a PING besides,
#: every 5 s for each process that waits, however often it acquires.
SENT = {
    "ours": ("evalsha", "eval", "subscribe"),
    "redis-py": ("set", "evalsha"),
    "python-redis-lock": ("set", "blpop", "get"),
    "pottery": ("set", "evalsha"),
    "the talk": ("setnx", "expire", "del"),
}

HELD, SPREAD, KEPT = 10_000, 5.0, 10.7
WAIT, WAIT_AT_MOST = 8.0, 10.0
KILLED, DEATHS = 5, 9

#: Gets a lock, however long it takes, and returns what releases it.
Acquire = Callable[[], Callable[[], object]]


# Contenders


def ours(client: redis.Redis, name: str, wait: float = PATIENCE, **options: Any) -> Acquire:
    """Return ours."""
    lock = Lock(client, name, wait=wait, **{"ttl": TTL} | options)

    def acquire() -> Callable[[], object]:
        return lock.acquire().release

    return acquire


def redis_py(client: redis.Redis, name: str) -> Acquire:
    """Return redis-py's own."""
    lock = client.lock(name, timeout=TTL)

    def acquire() -> Callable[[], object]:
        assert lock.acquire()
        release: Callable[[], object] = lock.release
        return release

    return acquire


def python_redis_lock(client: redis.Redis, name: str) -> Acquire:
    """Return python-redis-lock's."""
    lock = redis_lock.Lock(client, name, expire=TTL)

    def acquire() -> Callable[[], object]:
        assert lock.acquire()
        release: Callable[[], object] = lock.release
        return release

    return acquire


def redlock(client: redis.Redis, name: str) -> Acquire:
    """Return pottery's, with a single server."""
    lock = pottery.Redlock(key=name, masters={client}, auto_release_time=TTL)

    def acquire() -> Callable[[], object]:
        assert lock.acquire()
        return lock.release

    return acquire


def talk(client: redis.Redis, name: str) -> Acquire:
    """Return the talk's code."""

    def acquire() -> Callable[[], object]:
        while not client.setnx(name, 1):
            time.sleep(0.01)
        client.expire(name, TTL)
        return functools.partial(client.delete, name)

    return acquire


#: By what they are called in the table; also the names of the locks.
CONTENDERS: dict[str, Callable[[redis.Redis, str], Acquire]] = {
    "ours": ours,
    "redis-py": redis_py,
    "python-redis-lock": python_redis_lock,
    "the talk": talk,
    "pottery": redlock,
}


def bare(client: redis.Redis, name: str) -> Acquire:
    """Return the least that can be said to Redis, over our transport: no lock to be used."""
    source = b"""
        if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
    """
    script = Script("bench", source, hashlib.sha1(source).hexdigest().encode())
    transport, key, numbers = connect(client), name.encode(), itertools.count()

    def acquire() -> Callable[[], object]:
        token = f"{next(numbers):016x}"
        take: Command[bytes] = Command(("SET", key, token, "NX", "PX", "10000"), (key,))
        assert transport.call(take, 1.0) == b"OK"

        def release() -> None:
            give: Command[int] = Command((token,), (key,), script=script)
            assert transport.call(give, 1.0) == 1

        return release

    return acquire


def patient(url: str) -> redis.Redis:
    """Return a client whose waits are not cut short by redis-py's default timeout."""
    return redis.Redis.from_url(url, socket_timeout=PATIENCE)


# One process


def uncontended(server: Server) -> list[Row]:
    """Acquire and release, over and over."""
    rows = []
    sockets = {"a unix socket": server.unix_url, "TCP": server.url}
    for socket, url in sockets.items():
        client = patient(url)
        acquires = {name: make(client, name) for name, make in CONTENDERS.items()}
        acquires["ours"] = ours(client, "ours", wait=0)
        acquires["ours, prepared to wait"] = ours(client, "patient")
        acquires["bare"] = bare(client, "bare")
        contenders = {
            name: again_and_again(acquire, 10 if name == "pottery" else 1000)
            for name, acquire in acquires.items()
        }
        print(f" acquire + release over {socket}")
        figures = side_by_side(contenders, rounds=11)
        show(figures)
        what = f"acquire + release over {socket}, 1 thread"
        row = ratio_row(f"{what}; redis-py", figures, "ours", "redis-py", 1.4)
        peers = ", ".join(f"{name} {figures[name].rate:,.0f}/s" for name in list(CONTENDERS)[1:])
        rows.append(row._replace(against=peers))
        rows.append(longer_row(f"{what}: its time; a bare SET and a script", figures, "bare", 1.25))
    return rows


def again_and_again(acquire: Acquire, times: int) -> Callable[[], int]:
    """Return a contender that acquires and releases so often."""

    def run() -> int:
        for _ in range(times):
            acquire()()
        return times

    return run


def longer_row(what: str, figures: Mapping[str, Figure], peer: str, most: float) -> Row:
    """Make a row of the time that ours takes, as a multiple of a peer's."""
    a, b = figures["ours"], figures[peer]
    ratio = statistics.median(y / x for x, y in zip(a.rates, b.rates, strict=True))
    mine, theirs = (f"{1e6 / figure.rate:.1f} µs" for figure in (a, b))
    return Row(what, mine, theirs, f"≤ {most:g}×", f"{ratio:.2f}×", ratio <= most)


def refused(server: Server, times: int = 100) -> list[Row]:
    """A lock that somebody else has, asked for without waiting."""
    watch = server.client()
    told: list[str] = []
    url = server.unix_url
    # Another thread has it: its own thread would not even ask.
    thread = threading.Thread(target=ours(patient(url), "refused"))
    thread.start()
    thread.join()
    lock = Lock(url, "refused", on_command=lambda name, *_: told.append(name))
    before = calls(watch)
    for _ in range(times):
        with contextlib.suppress(LockedError):
            lock.acquire()
            raise AssertionError("two have it")
    heard = sent(calls(watch), before, "ours") / times
    said = len(told) / times
    what = "round trips of a refusal without waiting: told to on_command, heard by the server"
    shown = f"{said:g}, {heard:g}"
    return [Row(what, shown, "", "1", shown, said == heard == 1)]


def calls(watch: redis.Redis) -> dict[str, int]:
    """Return how often the server was told each command, by clients or scripts."""
    stats: Any = watch.info("commandstats")
    return {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}


def sent(after: Mapping[str, int], before: Mapping[str, int], contender: str) -> int:
    """Return how many commands clients have sent meanwhile."""
    return sum(after.get(name, 0) - before.get(name, 0) for name in SENT[contender])


# Many processes


class Load(NamedTuple):
    """What each of so many processes does, in seconds."""

    processes: int
    hold: float
    #: Half as long to one and a half times as long as this, between a release and the next request.
    think: float
    #: Until it begins to count, and then as long as it counts.
    warm: float
    counted: float


class Hold(NamedTuple):
    """A lock that a process has held, by the clock of all."""

    who: int
    asked: float
    got: float
    #: When it called the release, not when that returned.
    released: float


class Contest(NamedTuple):
    """How a contender fared in one run, in milliseconds where it is about time."""

    #: From each release to the next holder, if somebody waited and it was not the same again.
    hand_overs: list[float]
    longest_wait: float
    #: How evenly acquisitions were spread over processes: 1 when evenly.
    jain: float
    #: Acquisitions per second.
    rate: float
    #: Commands that clients have sent for each acquisition: as the server and as they counted.
    commands: float
    told: float


def contend(pipe: Connection, who: int, url: str) -> None:
    """Be one of many processes."""
    client = patient(url)
    told: list[str] = []
    acquires = {name: make(client, name) for name, make in CONTENDERS.items()}
    acquires["ours, counted"] = ours(client, "ours", on_command=lambda name, *_: told.append(name))
    while True:
        name, seed, load = pipe.recv()
        acquire, rng = acquires[name], random.Random(f"{seed} {who}")
        client.ping()
        Lock(client, f"warm {who}").acquire().release()
        told.clear()
        pipe.send("ready")
        start: float = pipe.recv()
        holds = list(take_turns(acquire, who, rng, load, start))
        pipe.send((holds, len(told)))


def take_turns(
    acquire: Acquire, who: int, rng: random.Random, load: Load, start: float
) -> Iterator[Hold]:
    """Hold the lock again and again, and say when."""
    end = start + load.warm + load.counted
    pause(start + rng.uniform(0, load.think) - time.monotonic())
    while (asked := time.monotonic()) < end:
        release = acquire()
        got = time.monotonic()
        time.sleep(load.hold)
        released = time.monotonic()
        release()
        yield Hold(who, asked, got, released)
        pause(load.think * rng.uniform(0.5, 1.5))


def pause(seconds: float) -> None:
    """Sleep, if there is time to."""
    if seconds > 0:
        time.sleep(seconds)


class Crowd:
    """So many processes that wait to be told what to do."""

    def __init__(self, server: Server, processes: int) -> None:
        self._watch = server.client()
        self._workers = [started(contend, who, server.unix_url) for who in range(processes)]

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *raised: object) -> None:
        for process, _ in self._workers:
            process.kill()
        for process, _ in self._workers:
            process.join()

    def contests(
        self, names: Iterable[str], load: Load, runs: int = RUNS
    ) -> dict[str, list[Contest]]:
        """Have each contender run so often, in turns; return what came of it."""
        order = list(names)
        found: dict[str, list[Contest]] = {name: [] for name in order}
        for run in range(runs):
            random.Random(run).shuffle(order)
            for name in order:
                found[name].append(self._contest(name, run, load))
        return found

    def _contest(self, name: str, run: int, load: Load) -> Contest:
        pipes = [pipe for _, pipe in self._workers[: load.processes]]
        for pipe in pipes:
            pipe.send((name, run, load))
        for pipe in pipes:
            heard(pipe)
        before = calls(self._watch)
        start = time.monotonic() + 0.05
        for pipe in pipes:
            pipe.send(start)
        notes = [heard(pipe) for pipe in pipes]
        commands = sent(calls(self._watch), before, name.partition(",")[0])
        holds = [hold for each, _ in notes for hold in each]
        told = sum(each for _, each in notes)
        return judged(holds, load, start + load.warm, commands / len(holds), told / len(holds))


def judged(holds: list[Hold], load: Load, since: float, commands: float, told: float) -> Contest:
    """Return what the notes of all processes come to."""
    holds = sorted(holds, key=lambda hold: hold.got)
    until = since + load.counted
    hand_overs = []
    for i, (one, next_one) in enumerate(itertools.pairwise(holds)):
        assert next_one.got >= one.released, "two had it at once"
        if since <= one.released < until and one.who != next_one.who:
            waiting = (other.asked < one.released for other in holds[i + 1 :])
            if any(waiting):
                hand_overs.append((next_one.got - one.released) * 1000)
    counted = [hold for hold in holds if since <= hold.asked < until]
    turns = [0] * load.processes
    for hold in counted:
        turns[hold.who] += 1
    return Contest(
        hand_overs,
        max(hold.got - hold.asked for hold in counted) * 1000,
        sum(turns) ** 2 / (len(turns) * sum(n * n for n in turns)),
        len(counted) / load.counted,
        commands,
        told,
    )


_CONTEXT = mp.get_context("forkserver")
# A process then starts in a few milliseconds.
_CONTEXT.set_forkserver_preload(["benchmarks.locks"])


def started(target: Callable[..., None], *args: Any) -> tuple[ForkServerProcess, Connection]:
    """Start a process, and return what it says."""
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=target, args=(there, *args), daemon=True)
    process.start()
    there.close()
    return process, here


def heard(pipe: Connection) -> Any:
    """Return what a process says next."""
    assert pipe.poll(PATIENCE), "a process says nothing"
    return pipe.recv()


def middle(values: Iterable[float]) -> float:
    """Return the median, which a noisy run cannot move far."""
    return statistics.median(values)


def hand_overs(crowd: Crowd) -> list[Row]:
    """A lock that is wanted nearly all the time, by 16 processes and by 64."""
    rows = []
    everybody = list(CONTENDERS)
    for load, names in (
        (Load(16, hold=0.01, think=0.16, warm=0.2, counted=1.3), everybody),
        # pottery's threads, of which each try starts two, are too much for a machine by now.
        (Load(64, hold=0.01, think=0.55, warm=0.5, counted=2.5), everybody[:-1]),
    ):
        runs = crowd.contests(names, load)
        what = f"hand-over to another of {load.processes} processes"
        print(f" {what}: median / 99th percentile, longest wait")
        for name, each in runs.items():
            print(
                f"  {name}: {middle(statistics.median(run.hand_overs) for run in each):.2f} / "
                f"{middle(percentile(run.hand_overs, 0.99) for run in each):.2f} ms, "
                f"{middle(run.longest_wait for run in each):,.0f} ms; "
                f"{middle(run.rate for run in each):.0f} acquisitions/s, "
                f"{middle(run.commands for run in each):.1f} commands for each, "
                f"{sum(len(run.hand_overs) for run in each)} hand-overs"
            )
        for share, label in ((0.5, "median"), (0.99, "99th percentile")):
            figures = {
                name: [percentile(run.hand_overs, share) for run in each]
                for name, each in runs.items()
            }
            limit = 2.0 if load.processes == 64 and share > 0.5 else None
            rows.append(best_row(f"{what}: {label}", figures, limit))
    return rows


def best_row(what: str, figures: Mapping[str, Sequence[float]], limit: float | None) -> Row:
    """Make a row of milliseconds that must be fewer than every peer's, and not above a limit."""
    medians = {name: middle(values) for name, values in figures.items()}
    mine = medians.pop("ours")
    peer = min(medians, key=medians.__getitem__)
    ratio = middle(b / a for a, b in zip(figures["ours"], figures[peer], strict=True))
    target = "the least" if limit is None else f"the least, and ≤ {limit:g} ms"
    return Row(
        what,
        f"{mine:.2f} ms",
        ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items()),
        target,
        f"{mine:.2f} ms; {peer} {ratio:.1f}×",
        mine < medians[peer] and (limit is None or mine <= limit),
    )


def saturated(crowd: Crowd) -> list[Row]:
    """A lock that everybody wants again as soon as it was released."""
    load = Load(16, hold=0.002, think=0.0, warm=0.2, counted=1.5)
    runs = crowd.contests(["ours", "redis-py"], load)
    [counted] = crowd.contests(["ours, counted"], load, runs=1)["ours, counted"]
    mine, theirs = runs["ours"], runs["redis-py"]
    print(" saturated, 16 processes")
    for name, each in runs.items():
        for run in each:
            print(
                f"  {name}: longest wait {run.longest_wait:,.0f} ms, {turns(run, load):.2f} ideal "
                f"turns; Jain {run.jain:.3f}; {run.rate:.0f} acquisitions/s, "
                f"hand-over {statistics.median(run.hand_overs):.2f} ms, "
                f"{run.commands:.3f} commands for each"
            )
    print(f"  ours, as on_command counts: {counted.told:.3f} commands for each acquisition")
    what = f"saturated, 16 processes, {load.counted:g} s"
    wait = middle(turns(run, load) for run in mine)
    fair = middle(run.jain for run in mine)
    # As shown: once in a while a waiter looks again, because the machine was busy.
    cost = round(max(middle(run.commands for run in mine), counted.told), 2)
    return [
        Row(
            f"{what}: longest wait, in turns of all others",
            f"{middle(run.longest_wait for run in mine):,.0f} ms",
            f"redis-py {middle(run.longest_wait for run in theirs):,.0f} ms",
            "≤ 3",
            f"{wait:.2f}",
            wait <= 3,
        ),
        Row(
            f"{what}: Jain's index of fairness",
            f"{fair:.3f}",
            f"redis-py {middle(run.jain for run in theirs):.3f}",
            "≥ 0.99",
            f"{fair:.3f}",
            fair >= 0.99,
        ),
        Row(
            f"{what}: commands for each acquisition",
            f"{cost:.2f}",
            f"redis-py {middle(run.commands for run in theirs):.2f}",
            "≤ 3",
            f"{cost:.2f}",
            cost <= 3,
        ),
    ]


def turns(run: Contest, load: Load) -> float:
    """Return the longest wait in ideal turns: each other process has the lock once before."""
    turn = load.hold * 1000 + statistics.median(run.hand_overs)
    return run.longest_wait / ((load.processes - 1) * turn)


# Leases, long waits, dead waiters


def keep(pipe: Connection, url: str) -> None:
    """Hold many locks, and tell what that costs once all are taken."""
    threads = threading.active_count()
    client = patient(url)
    locks = [Lock(client, f"kept:{i}", ttl=10, renew=True) for i in range(HELD)]
    # Evenly over the time after which a lease is renewed, as by many users: else any figure
    # would depend on how many bursts of renewals it has seen.
    held: list[Held] = []
    began = time.monotonic()
    for i, lock in enumerate(locks, 1):
        held.append(lock.acquire())
        pause(began + SPREAD * i / HELD - time.monotonic())
    began, spent = time.monotonic(), time.process_time()
    time.sleep(KEPT)
    spent, took = time.process_time() - spent, time.monotonic() - began
    threads = threading.active_count() - threads
    alive = sum(each.held for each in held), sum(len(lock.holders()) for lock in locks)
    pipe.send((threads, spent / took, alive))


def renewed(server: Server) -> list[Row]:
    """Ten thousand locks with renewal."""
    watch = server.client()
    process, pipe = started(keep, server.unix_url)
    threads, share, alive = heard(pipe)
    process.kill()
    process.join()
    assert alive == (HELD, HELD), f"held by its own account and by the server's: {alive}"
    what = f"{HELD:,} locks held with renewal, ttl 10"
    watch.flushall()
    percent = f"{share * 100:.2f} %"
    return [
        Row(f"{what}: threads", f"{threads}", "", "1", f"{threads}", threads == 1),
        Row(f"{what}: of a core", percent, "", "≤ 1 %", percent, share <= 0.01),
    ]


def wait_long(pipe: Connection, name: str, host: str, port: int) -> None:
    """Wait for a lock that is held, and tell for how long."""
    client = redis.Redis(host, port)  # with its default timeout, which is shorter than the wait
    client.ping()
    waits: dict[str, Callable[[], object]] = {
        "ours": Lock(client, name, wait=WAIT).acquire,
        "redis-py": lambda: client.lock(name, timeout=TTL, blocking_timeout=WAIT).acquire(),
        "python-redis-lock": functools.partial(
            redis_lock.Lock(client, name, expire=TTL).acquire, timeout=WAIT
        ),
    }
    began = time.monotonic()
    ended = "it had it"
    try:
        if not waits[name]():
            ended = "not acquired"
    except (LockedError, redis.RedisError) as error:
        ended = type(error).__name__
    pipe.send((time.monotonic() - began, ended))


def long_waits(server: Server) -> list[Row]:
    """A wait that is longer than redis-py's default timeout of a socket."""
    names = ("ours", "redis-py", "python-redis-lock")
    client = server.client()
    # Longer than anybody waits.
    Lock(client, "ours", ttl=PATIENCE).acquire()
    assert client.lock("redis-py", timeout=PATIENCE).acquire()
    assert redis_lock.Lock(client, "python-redis-lock", expire=int(PATIENCE)).acquire()
    workers = {name: started(wait_long, name, server.host, server.port) for name in names}
    end = time.monotonic() + WAIT_AT_MOST
    shown = {}
    off = float("inf")
    for name, (process, pipe) in workers.items():
        if pipe.poll(max(0.0, end - time.monotonic())):
            seconds, ended = pipe.recv()
            shown[name] = f"{seconds:.3f} s, {ended}"
            if name == "ours" and ended == "LockedError":
                off = abs(seconds - WAIT) * 1000
        else:
            shown[name] = f"over {WAIT_AT_MOST:g} s"
        process.kill()
        process.join()
    client.flushall()
    return [
        Row(
            f"a wait of {WAIT:g} s with redis-py's default timeout: how far off",
            shown.pop("ours"),
            "; ".join(f"{name}: {text}" for name, text in shown.items()),
            "≤ 50 ms",
            f"{off:.1f} ms",
            off <= 50,
        )
    ]


def wait_once(pipe: Connection, name: str, url: str) -> None:
    """Wait for a lock, and tell when it came."""
    held = Lock(url, name, wait=PATIENCE).acquire()
    pipe.send(time.monotonic())
    pipe.recv()
    held.release()


def killed_waiters(server: Server) -> list[Row]:
    """Waiters that were killed in line, ahead of a live one."""
    watch = server.client()
    times = []
    for run in range(DEATHS):
        name = f"killed {run}"
        line = Names("rh", name, None).key("line")
        held = Lock(server.unix_url, name, ttl=PATIENCE).acquire()
        waiters = []
        for place in range(KILLED + 1):
            waiters.append(started(wait_once, name, server.unix_url))
            until(lambda line=line, place=place: watch.zcard(line) == place + 1)  # type: ignore[misc]
        process, pipe = waiters.pop()
        for doomed, _ in waiters:
            doomed.kill()
        for doomed, _ in waiters:
            doomed.join()
        assert watch.zcard(line) == KILLED + 1, "they have left the line"
        released = time.monotonic()
        held.release()
        times.append((heard(pipe) - released) * 1000)
        pipe.send("enough")
        process.join()
    print(" after killed waiters:", ", ".join(f"{each:.2f} ms" for each in times))
    what = f"{KILLED} killed waiters ahead of a live one: from release to its holding"
    return [limit_row(what, middle(times), 5, "ms")]


def until(condition: Callable[[], object]) -> None:
    """Return when it is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def run() -> list[Row]:
    """Run all of it."""
    with valkey_server() as server:
        rows = uncontended(server) + refused(server)
        with Crowd(server, 64) as crowd:
            rows += hand_overs(crowd) + saturated(crowd)
        return rows + renewed(server) + long_waits(server) + killed_waiters(server)
