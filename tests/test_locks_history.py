"""A history of holds: real processes write down what they saw of a lock, and it is checked.

No two hold the lock at once unless the first had lost it by its own clock; fences only grow; every
wait ends in time, and the lock is not idle while somebody waits; a loss is told, and only a loss;
no addition to a counter guarded by the lock is lost, with `held.transaction()` under no fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import secrets
import signal
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import redis

from redishacks.errors import UnavailableError
from redishacks.locks import Held, Lock, LockLostError
from redishacks.testing import FaultProxy, Server, valkey_server
from tests.helpers import eventually
from tests.lock_workers import (
    LOCK,
    AsyncParty,
    Attempt,
    Log,
    Party,
    Plan,
    Write,
    clock,
    counter_key,
    lease,
    read_log,
    start,
)
from tests.workers import is_stopped

# The checker


@dataclass
class Terms:
    """What else is known about a run, and what is asked of it."""

    #: The values of the counters at the end.
    final: dict[str, str | None] = field(default_factory=dict)
    #: Processes that were killed.
    killed: set[int] = field(default_factory=set)
    #: Processes that were stopped: which, from when and until when.
    stopped: list[tuple[int, float, float]] = field(default_factory=list)
    #: When the server was killed and forgot everything, and when it was back.
    forgot: list[tuple[float, float]] = field(default_factory=list)
    #: Seconds by which a wait may be longer than was asked for.
    late: float = 3.0
    #: Seconds for which the lock may be idle while somebody waits.
    idle: float = 2.0

    def away(self, attempt: Attempt, begin: float, end: float) -> float:
        """Return for how many seconds between two moments the process was stopped."""
        return sum(
            max(0.0, min(end, until) - max(begin, since))
            for pid, since, until in self.stopped
            if pid == attempt.pid
        )


def complaints(history: list[Attempt], terms: Terms) -> list[str]:
    """Return all that is wrong with a history."""
    return [
        *overlaps(history, terms),
        *fences_going_back(history),
        *long_waits(history, terms),
        *idle_times(history, terms),
        *false_words(history, terms),
        *lost_updates(history, terms, "plain"),
        *lost_updates(history, terms, "safe"),
    ]


def end_of(hold: Attempt) -> float:
    """Return until when it held the lock, as far as it could know."""
    return hold.until if hold.releasing is None else min(hold.until, hold.releasing)


def holds_of(history: list[Attempt]) -> list[Attempt]:
    """Return those that held the lock for some time, in the order in which they began."""
    holds = [each for each in history if each.acquired and each.answered < end_of(each)]  # type: ignore[operator]
    return sorted(holds, key=lambda each: each.answered or 0.0)


def overlaps(history: list[Attempt], terms: Terms) -> Iterator[str]:
    """Find two that held it at once."""
    running: list[Attempt] = []
    for hold in holds_of(history):
        began = hold.answered or 0.0
        running = [each for each in running if end_of(each) > began]
        for other in running:
            forgotten = any(other.asked < up and began > down for down, up in terms.forgot)
            if not forgotten:
                both = min(end_of(other), end_of(hold)) - began
                yield f"overlap: {other.who} and {hold.who} held it at once for {both:.6f} s"
        running.append(hold)


def fences_going_back(history: list[Attempt]) -> Iterator[str]:
    """Find a fence that is no greater than an earlier holder's, and one that was given twice."""
    for one, other in itertools.pairwise(holds_of(history)):
        if other.fence <= one.fence:
            yield f"fence: {one.who} had {one.fence}, and {other.who} after it {other.fence}"
    for name in ("fence", "token"):
        values = Counter(getattr(each, name) for each in history if each.acquired)
        for value, times in values.items():
            if times > 1:
                yield f"{name}: {value} was given {times} times"


def long_waits(history: list[Attempt], terms: Terms) -> Iterator[str]:
    """Find a wait without end, one that was too long, and a refusal before its time."""
    for each in history:
        if each.answered is None:
            if each.pid not in terms.killed:
                yield f"wait: {each.who} was never answered"
            continue
        waited = each.answered - each.asked
        away = terms.away(each, each.asked, each.answered)
        if waited > each.patience + terms.late + away:
            yield f"wait: {each.who} waited {waited:.3f} s and asked for {each.patience:g} s"
        if each.refused == "LockedError" and waited < each.patience:
            yield f"wait: {each.who} was refused after {waited:.3f} of {each.patience:g} s"


def idle_times(history: list[Attempt], terms: Terms) -> Iterator[str]:
    """Find a time in which nobody held the lock though somebody waited for it."""
    free, gaps = -math.inf, []
    acquired = [each for each in history if each.acquired]
    for hold in sorted(acquired, key=lambda each: each.answered or 0.0):
        gaps.append((free, hold.answered or 0.0))
        over = hold.until if hold.released is None else min(hold.until, hold.released)
        free = max(free, over)
    gaps.append((free, math.inf))
    long = [(since, to) for since, to in gaps if to - since > terms.idle]
    for each in history:
        if each.answered is None or each.refused not in ("", "LockedError"):
            continue
        for since, to in long:
            since, to = max(since, each.asked), min(to, each.answered)
            idle = to - since - terms.away(each, since, to)
            if idle > terms.idle:
                yield f"idle: nobody held it for {idle:.3f} s while {each.who} waited"


def false_words(history: list[Attempt], terms: Terms) -> Iterator[str]:
    """Find a loss that was not told, and one that was none."""
    for each in history:
        if not each.acquired or each.released is None or each.releasing is None:
            continue
        forgotten = any(each.asked < up and each.released > down for down, up in terms.forgot)
        if each.lost and each.released < each.until and not forgotten:
            yield f"false loss: {each.who} had its lease for {each.until - each.released:.3f} s"
        if not each.lost and not each.believed:
            yield f"untold loss: {each.who} had lost it, and its release said nothing"
        # A release while the server is away is made good in the background, and says nothing.
        there = not any(each.releasing < up and each.released > down for down, up in terms.forgot)
        since = [down for down, up in terms.forgot if (each.answered or 0.0) < down]
        if since and there and each.releasing > since[0] and not each.lost:
            yield f"untold loss: the server forgot {each.who}, whose release said nothing"


def lost_updates(history: list[Attempt], terms: Terms, counter: str) -> Iterator[str]:
    """Find additions to a counter that another one wrote over.

    All that are right make a chain, each read by the next. With plain commands the addition of one
    that had lost the lock may write over others'; with a transaction none may.
    """
    made = [(each, write) for each in history if (write := getattr(each, counter)) is not None]
    final = terms.final.get(counter)
    seen = {write.old for _, write in made} | {final}
    known = {write.new for _, write in made} | {None}
    for value in seen - known:
        yield f"{counter}: nobody wrote {value}"
    over: dict[str | None, list[Attempt]] = defaultdict(list)
    for each, write in made:
        if write.done == "no" and write.new in seen:
            yield f"{counter}: {each.who} was told that its addition was not made, and it was"
        applied = write.new in seen or write.done == "yes"
        if applied and (counter == "safe" or (write.done == "yes" and write.held)):
            over[write.old].append(each)
    for old, writers in over.items():
        more = len(writers) - (1 + len(terms.forgot) if old is None else 1)
        if more > 0:
            names = ", ".join(each.who for each in writers)
            yield f"{counter}: lost update: {names} all added to {old}"
    if counter == "safe":
        read = {old for old in over if old is not None} | {final}
        gone = [each.who for each, write in made if write.done == "yes" and write.new not in read]
        if len(gone) > len(terms.forgot):
            yield f"{counter}: lost update: nothing was added to what {', '.join(gone)} wrote"
        order = sorted(
            ((int(write.new.split()[0]), each.fence) for each, write in made if write.done == "yes")
        )
        if not terms.forgot and any(b <= a for (_, a), (_, b) in itertools.pairwise(order)):
            yield f"{counter}: a write of an earlier fence came after one of a later"


# The checker is checked


def attempt(number: int, since: float, to: float, **news: Any) -> Attempt:
    """Return one that held the lock for a time, after it had waited for a second."""
    made = Attempt(
        pid=number, thread="t", number=1, asked=since - 1, patience=5, answered=since,
        token=f"t{number}", fence=number, until=since + 10, releasing=to, released=to + 0.001,
        believed=True,
        plain=Write(f"{number - 1} t{number - 1}", f"{number} t{number}", "yes", True),
        safe=Write(f"{number - 1} t{number - 1}", f"{number} t{number}", "yes", True),
    )  # fmt: skip
    return replace(made, **news)


def history_of_three() -> list[Attempt]:
    """Return three holds without fault."""
    first = attempt(1, 1, 2)
    written = Write(None, "1 t1", "yes", True)
    return [replace(first, plain=written, safe=written), attempt(2, 3, 4), attempt(3, 4.5, 5)]


FINAL: dict[str, str | None] = {"plain": "3 t3", "safe": "3 t3"}


def test_a_history_without_fault_passes() -> None:
    """Three that held the lock one after the other, and one that waited in vain."""
    history = history_of_three()
    vain = Attempt(4, "t", 1, asked=1, patience=1, answered=2.1, refused="LockedError")
    assert complaints([*history, vain], Terms(final=FINAL)) == []
    assert complaints(list(reversed(history)), Terms(final=FINAL)) == []


@pytest.mark.parametrize(
    ("place", "news", "said"),
    [
        (0, {"releasing": 3.5, "released": 3.6}, "overlap: 1/t#1 and 2/t#1 held it at once"),
        (0, {"releasing": None, "released": None, "until": 3.1}, "overlap: 1/t#1 and 2/t#1"),
        (1, {"answered": 1.9}, "overlap: 1/t#1 and 2/t#1"),
        (0, {"releasing": 4.9, "released": 5}, "overlap: 1/t#1 and 3/t#1"),
        (1, {"fence": 4}, "fence: 2/t#1 had 4, and 3/t#1 after it 3"),
        (1, {"fence": 1}, "fence: 1/t#1 had 1, and 2/t#1 after it 1"),
        (1, {"fence": 3}, "fence: 3 was given 2 times"),
        (1, {"token": "t3"}, "token: t3 was given 2 times"),
        (1, {"answered": None}, "wait: 2/t#1 was never answered"),
        (1, {"asked": -9}, "wait: 2/t#1 waited 12.000 s and asked for 5 s"),
        (1, {"refused": "LockedError"}, "wait: 2/t#1 was refused after 1.000 of 5 s"),
        (2, {"answered": 9.5, "asked": 6, "until": 20, "releasing": 10}, "idle: nobody held it"),
        (1, {"lost": True}, "false loss: 2/t#1 had its lease"),
        (1, {"believed": False}, "untold loss: 2/t#1 had lost it"),
        (1, {"plain": Write("2 t2", "3 t9", "yes", True)}, "lost update: 2/t#1, 3/t#1 all added"),
        (1, {"plain": Write("5 t5", "6 t2", "yes", True)}, "plain: nobody wrote"),
        (1, {"safe": Write("2 t2", "3 t9", "yes", False)}, "safe: lost update: 2/t#1, 3/t#1"),
        (1, {"safe": Write(None, "1 t2", "yes", True)}, "safe: lost update: 1/t#1, 2/t#1 all"),
        (1, {"safe": Write("1 t1", "2 t2", "no", True)}, "was told that its addition was not made"),
        (2, {"safe": None}, "safe: lost update: nothing was added to what 2/t#1 wrote"),
        (2, {"fence": 1}, "safe: a write of an earlier fence came after one of a later"),
    ],
)
def test_a_fault_is_found(place: int, news: dict[str, Any], said: str) -> None:
    """Each sort of fault, in a history that has no other."""
    history = history_of_three()
    history[place] = replace(history[place], **news)
    found = complaints(history, Terms(final=FINAL))
    assert any(said in one for one in found), found


def stale(number: int, since: float, to: float, **news: Any) -> Attempt:
    """Return one that had lost the lock when it began, and did nothing."""
    news = {"until": 0, "believed": False, "lost": True, "plain": None, "safe": None, **news}
    return attempt(number, since, to, **news)


@pytest.mark.parametrize(
    ("another", "terms"),
    [
        (stale(9, 1.2, 4.7), {}),
        (stale(9, 2.2, 4.7, until=2.9), {}),
        (stale(9, 2.2, 2.9, until=2.9, releasing=None, released=None), {"killed": {9}}),
        (stale(9, 1, 2, answered=None), {"killed": {9}}),
        (stale(9, 1, 2, asked=-9), {"stopped": [(9, -9, 0.5)]}),
        (stale(9, 1, 2, asked=-9, refused="UnavailableError"), {"late": 10}),
        (stale(9, 2.2, 4.7, plain=Write("2 t2", "3 t9", "yes", False)), {}),
        (stale(9, 2.2, 4.7, plain=Write("2 t2", "3 t9", "maybe", True)), {}),
        (stale(9, 2.2, 4.7, safe=Write("2 t2", "3 t9", "maybe", True)), {}),
        (stale(9, 2.2, 4.7, safe=Write("2 t2", "3 t9", "no", True)), {}),
        (stale(9, 2.2, 4.7, until=12), {"forgot": [(2.9, 2.99)]}),
    ],
)
def test_what_is_allowed_is_no_fault(another: Attempt, terms: Any) -> None:
    """A hold after its lease, a loss that was told, and what a fault excuses."""
    another = replace(another, fence=2 if another.answered == 2.2 else 9)
    history = [replace(each, fence=each.fence * 10) for each in history_of_three()]
    another.fence *= 6  # between the first and the second, or after all
    assert complaints([*history, another], Terms(final=FINAL, **terms)) == []


def test_forgetting_excuses_no_silence() -> None:
    """One whose lock the server forgot has to be told at its release."""
    first, *others = history_of_three()
    history = [replace(first, releasing=4, released=4.1), *others]
    (found,) = complaints(history, Terms(final=FINAL, forgot=[(2.3, 2.5)]))
    assert "untold loss: the server forgot 1/t#1" in found


# Runs


class Run:
    """Workers on one lock, and what is done to them."""

    def __init__(self, directory: Path, url: str, prefix: str, seed: int, **plan: Any) -> None:
        self.rng = random.Random(seed)
        self.terms = Terms()
        self.plan = Plan(url, prefix, str(directory / "log"), str(seed), **plan)
        self.workers: dict[int, Any] = {}
        self.log = Log(self.plan.log)
        self._made = 0
        self._numbers = itertools.count(1)
        self._stopping: dict[int, float] = {}

    def add(self, count: int = 1, **news: Any) -> None:
        """Start workers, every other one of them an async one."""
        for _ in range(count):
            self._made += 1
            colour = ("async", "sync")[self._made % 2]
            seed = f"{self.plan.seed}-{self._made}"
            worker = start(replace(self.plan, **{"colour": colour, "seed": seed, **news}))
            assert worker.pid is not None
            self.workers[worker.pid] = worker

    def begin(self) -> None:
        """Let all go as soon as they are up."""
        path = Path(self.plan.log)
        eventually(lambda: path.read_text().count("\n") == len(self.workers), within=30)
        self.plan.mark("go").touch()

    def history(self) -> list[Attempt]:
        """Return what was written down so far."""
        return read_log(Path(self.plan.log))

    def lock(self, url: str) -> Lock:
        """Return the lock, for the test itself."""
        return Lock(url, LOCK, prefix=self.plan.prefix, **self.plan.options)

    @contextmanager
    def holding(self, url: str) -> Iterator[None]:
        """Hold the lock; that is written down, too."""
        number = next(self._numbers)
        self.log.say("test", number, asked=clock(), patience=20)
        held = self.lock(url).acquire(wait=20)
        self.log.say(
            "test", number, answered=clock(), token=held.token, fence=held.fence, **lease(held)
        )
        yield
        self.log.say("test", number, releasing=clock(), believed=held.held)
        held.release()
        self.log.say("test", number, released=clock())

    def kill(self, pid: int) -> None:
        """SIGKILL a worker."""
        self.terms.killed.add(pid)
        worker = self.workers.pop(pid)
        worker.kill()
        worker.join()

    @contextmanager
    def stopped(self, *pids: int) -> Iterator[None]:
        """SIGSTOP workers for a while."""
        since = clock()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: all(map(stands, pids)))
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
                self.terms.stopped.append((pid, since, clock()))

    def care(self, after: float = 0.0) -> None:
        """Let those go on that stopped themselves so many seconds ago."""
        for pid in self.workers:
            if stands(pid):
                since = self._stopping.setdefault(pid, clock())
                if clock() >= since + after:
                    os.kill(pid, signal.SIGCONT)
                    eventually(lambda pid=pid: not stands(pid))  # type: ignore[misc]
                    del self._stopping[pid]
                    self.terms.stopped.append((pid, since - 0.1, clock()))

    def finish(self, server: Server) -> list[Attempt]:
        """Let all end, and return what they wrote down, which must be without fault."""
        self.plan.mark("end").touch()
        within = self.plan.patience + self.terms.late + 10
        end = time.monotonic() + within
        while time.monotonic() < end and any(w.exitcode is None for w in self.workers.values()):
            self.care()
            time.sleep(0.005)
        ends = {pid: worker.exitcode for pid, worker in self.workers.items()}
        assert set(ends.values()) <= {0, None}, f"a worker failed, see its traceback: {ends}"
        with server.client() as client:
            for counter in ("plain", "safe"):
                value: Any = client.get(counter_key(self.plan.prefix, counter))
                self.terms.final[counter] = None if value is None else value.decode()
        history = self.history()
        found = complaints(history, self.terms)
        assert found == [], "\n".join(found[:20])
        assert None not in ends.values(), f"a worker never ended: {ends}"
        return history

    def close(self) -> None:
        """End whoever is left."""
        for worker in self.workers.values():
            worker.kill()
            worker.join()
        self.log.close()


@pytest.fixture
def seed() -> int:
    """A seed, printed when the test fails."""
    seed = int(os.environ.get("REDISHACKS_SEED") or secrets.randbelow(2**32))
    print("REDISHACKS_SEED =", seed)
    return seed


@pytest.fixture
def running(tmp_path: Path, prefix: str, seed: int) -> Iterator[Callable[..., Run]]:
    """Make a run; its workers are gone after the test."""
    runs: list[Run] = []

    def make(url: str, **plan: Any) -> Run:
        runs.append(Run(tmp_path, url, prefix, seed, **plan))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


Make = Callable[..., Run]


def stands(pid: int) -> bool:
    """Return whether a process is there and stopped."""
    try:
        return is_stopped(pid)
    except OSError:
        return False


def line_key(prefix: str) -> str:
    """Return the key of the line for the lock."""
    return f"{prefix}:l1:{{{LOCK}}}:line"


def free(run: Run, url: str) -> bool:
    """Return whether nobody holds the lock and nobody waits for it."""
    with redis.Redis.from_url(url) as client:
        waiting: Any = client.zcard(line_key(run.plan.prefix))
    return waiting == 0 and run.lock(url).holders() == []


def held_by(history: list[Attempt]) -> dict[int, int]:
    """Return how often each process held the lock."""
    return dict(Counter(each.pid for each in history if each.acquired))


def run_as(
    kind: type[Party], plan: Plan, body: Callable[[Party], Coroutine[Any, Any, None]]
) -> None:
    """Run a coroutine with a party, which is closed in the end."""

    async def main() -> None:
        async with contextlib.aclosing(kind(plan)) as party:
            await body(party)

    asyncio.run(main())


def overtaken(history: list[Attempt]) -> float:
    """Return the share of holders that had come well after the one who held it next."""
    holds = holds_of(history)
    pairs = list(itertools.pairwise(holds))
    return sum(after.asked < before.asked - 0.02 for before, after in pairs) / len(pairs)


def jain(counts: list[int]) -> float:
    """Return Jain's index of fairness: 1 when all have the same."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))


def test_plain_contention(running: Make, valkey: Server) -> None:
    """Processes of both colours with two threads or tasks each take turns, nobody for long last."""
    run = running(valkey.url)
    run.add(6)
    run.begin()
    time.sleep(2)
    history = run.finish(valkey)
    counts = held_by(history)
    assert len(counts) == 6
    assert sum(counts.values()) > 20
    assert not any(each.lost or each.refused for each in history)
    assert jain(list(counts.values())) >= 0.9, counts
    assert overtaken(history) < 0.08
    waits = [each.answered - each.asked for each in history if each.answered]
    assert max(waits) < 10 * statistics.mean(waits) + 1
    assert free(run, valkey.url)


@pytest.mark.slow
def test_dropped_replies_and_cut_connections(
    running: Make, valkey: Server, proxy: FaultProxy
) -> None:
    """Whatever is lost on the way, nobody holds the lock for nothing and no loss is invented."""
    run = running(proxy.url)
    run.terms.idle = 3.5
    run.add(6)
    run.begin()
    rng = run.rng
    end = clock() + 2.5
    while clock() < end:
        if proxy.armed < 3:
            fault = rng.choice([proxy.drop_reply, proxy.drop_request, proxy.cut_after_request])
            fault(rng.randint(1, 8), of=rng.choice(["", "EVALSHA", "EVALSHA", "SET", "EXEC"]))
        if rng.random() < 0.1:
            proxy.cut(reset=rng.random() < 0.5)
        if rng.random() < 0.1:
            proxy.stall()
            time.sleep(rng.uniform(0, 0.2))
            proxy.resume()
        time.sleep(rng.uniform(0.01, 0.05))
    proxy.heal()
    history = run.finish(valkey)
    assert sum(held_by(history).values()) > 20
    assert not any(each.lost for each in history)
    assert {each.refused for each in history} <= {"", "UnavailableError"}
    eventually(lambda: free(run, valkey.url), within=8)


@pytest.mark.slow
def test_killed_holders_and_waiters(running: Make, valkey: Server) -> None:
    """A killed holder's lease ends, a killed waiter is passed over; the others go on."""
    run = running(valkey.url, options={"ttl": 0.4})
    lock = run.lock(valkey.url)
    run.add(6)
    run.begin()

    def killed() -> tuple[int, int]:
        history = [each for each in run.history() if each.pid in run.terms.killed]
        holders = sum(each.acquired and each.released is None for each in history)
        return holders, sum(each.answered is None for each in history)

    end = clock() + 20
    while min(killed()) < 5 and clock() < end:
        time.sleep(run.rng.uniform(0.05, 0.3))
        holders = [holder.pid for holder in lock.holders() if holder.pid in run.workers]
        pids = holders if holders and run.rng.random() < 0.6 else list(run.workers)
        run.kill(run.rng.choice(pids))
        run.add()
    run.finish(valkey)
    assert min(killed()) >= 5


@pytest.mark.slow
def test_dead_and_stopped_waiters_cost_no_lease(running: Make, valkey: Server) -> None:
    """With three of six processes in line killed and one stopped, the next gets the lock soon."""
    run = running(valkey.url, options={"ttl": 30}, patience=15.0)
    run.terms.idle = 1.5
    run.add(6)
    run.begin()
    with contextlib.ExitStack() as stack:
        with run.holding(valkey.url):
            with redis.Redis.from_url(valkey.url) as client:
                eventually(lambda: client.zcard(line_key(run.plan.prefix)) >= 10)
            *dead, stopped = run.rng.sample(list(run.workers), 4)
            for pid in dead:
                run.kill(pid)
            stack.enter_context(run.stopped(stopped))
        time.sleep(2.2)
    history = run.finish(valkey)
    assert sum(held_by(history).values()) > 10


@pytest.mark.slow
def test_stopped_holders(running: Make, valkey: Server) -> None:
    """One that was stopped for longer than its lease finds it lost, and its transaction does
    nothing: it may have been stopped before it, or within, just before EXEC.
    """
    run = running(valkey.url, options={"ttl": 0.3}, hold=(0.002, 0.01))
    run.add(2)
    run.add(4, stops=0.4)
    run.begin()

    def refused() -> Counter[str]:
        return Counter(
            f"{each.thread[:-1]} {each.stops}"
            for each in run.history()
            if each.lost and each.stops and each.safe is not None and each.safe.done == "no"
        )

    wanted = [f"{colour} {where}" for colour in ("sync", "async") for where in ("before", "within")]
    end = clock() + 20
    while not all(refused()[each] for each in wanted) and clock() < end:
        run.care(after=0.6)
        time.sleep(0.01)
    run.finish(valkey)
    assert all(refused()[each] for each in wanted), refused()


@pytest.mark.slow
def test_flushed_scripts(running: Make, redis62: Server) -> None:
    """Nobody notices that the server forgets its scripts twenty times a second, on Redis 6.2."""
    run = running(redis62.url)
    run.add(4)
    run.begin()
    end = clock() + 2
    with redis62.client() as client:
        while clock() < end:
            client.script_flush()
            time.sleep(0.05)
    history = run.finish(redis62)
    assert sum(held_by(history).values()) > 20
    assert not any(each.lost or each.refused for each in history)
    assert free(run, redis62.url)


def restart(run: Run, server: Server) -> tuple[float, float]:
    """Kill the server after a while and start it again; return when it was away."""
    time.sleep(run.rng.uniform(0.3, 0.6))
    down = clock()
    server.kill()
    time.sleep(run.rng.uniform(0, 0.1))
    server.restart()
    return down, clock()


@contextmanager
def slow_to_load() -> Iterator[Server]:
    """Run a server that has every write on its disk, and says LOADING for a while at its start."""
    with valkey_server(appendonly="yes", appendfsync="always", key_load_delay=100) as server:
        with server.client() as client, client.pipeline(transaction=False) as pipe:
            for n in range(4_096):  # after every 1,024 it looks who is there
                pipe.set(f"other{n}", n)
            pipe.execute()
        yield server


@pytest.mark.slow
def test_a_restarted_server_that_remembers(running: Make) -> None:
    """With every write on its disk a server that was killed loses no lock and no waiter, also when
    it takes a while to load what it remembers.
    """
    with slow_to_load() as server:
        run = running(server.url)
        run.terms.idle = 3.5
        run.add(6)
        run.begin()
        for _ in range(2):
            restart(run, server)
        history = run.finish(server)
        assert sum(held_by(history).values()) > 10
        assert not any(each.lost for each in history)
        eventually(lambda: free(run, server.url), within=8)


@pytest.mark.slow
def test_a_lease_begins_when_the_server_was_ready(prefix: str) -> None:
    """A lease that is shorter than the server took to load is there as a whole."""
    with slow_to_load() as server:
        lock = Lock(server.url, LOCK, prefix=prefix, ttl=0.2, deadline=5)
        lock.acquire().release()
        server.kill()
        thread = threading.Thread(target=server.restart)
        thread.start()

        def acquired() -> Held | None:
            try:
                return lock.acquire()
            except UnavailableError:  # nobody listens yet
                return None

        try:
            held = eventually(acquired)
            assert held.remaining > 0
        finally:
            thread.join()
        held.release()


@pytest.mark.slow
def test_a_restarted_server_that_forgets(running: Make) -> None:
    """Two may hold the lock then, one since before and one since after. The first is told at its
    release, its transaction and its extension do nothing, and fences go on growing.
    """
    with valkey_server() as server:
        run = running(server.url, hold=(0.3, 1.2), extends=0.7)
        run.terms.idle = 3.5
        run.add(2)
        run.add(2, options={"ttl": 0.5, "renew": True}, extends=0.0)
        run.begin()

        def together() -> int:
            holds = [each for each in run.history() if each.acquired and each.released]
            return sum(
                old.answered < down and up < new.answered < old.releasing  # type: ignore[operator]
                for old, new in itertools.permutations(holds, 2)
                for down, up in run.terms.forgot
            )

        end = clock() + 25
        while together() < 2 and clock() < end:
            run.terms.forgot.append(restart(run, server))
        time.sleep(1)
        run.finish(server)
        assert together() >= 2
        eventually(lambda: free(run, server.url), within=8)


@pytest.mark.slow
@pytest.mark.parametrize("renew", [False, True])
def test_short_leases(running: Make, valkey: Server, proxy: FaultProxy, renew: bool) -> None:
    """Who works for longer than its lease loses the lock, and is told; with renewal it keeps it.

    Some do not care about fairness, and one is far away.
    """
    proxy.delay(0.0 if renew else 0.06)
    options = {"ttl": 0.25, "renew": renew}
    run = running(valkey.url, options=options, hold=(0, 0.4), extends=0)
    run.add(2)
    run.add(1, options={**options, "fair": False})
    run.add(1, url=proxy.url)
    run.begin()

    def outlasted(lost: bool) -> int:
        return sum(
            each.lost is lost
            for each in run.history()
            if each.released and each.releasing - each.answered > 0.3  # type: ignore[operator]
        )

    end = clock() + 20
    while outlasted(lost=not renew) < 4 and clock() < end:
        time.sleep(0.02)
    run.finish(valkey)
    assert outlasted(lost=not renew) >= 4


def taken_over(server: Server, prefix: str) -> Held:
    """Have a server forget who holds the lock, and take it."""
    with server.client() as client:
        client.delete(f"{prefix}:l1:{{{LOCK}}}:lock")
    return Lock(server.url, LOCK, prefix=prefix).acquire()


@pytest.mark.parametrize("kind", [Party, AsyncParty])
@pytest.mark.parametrize("what", ["extend", "write_safely", "release"])
def test_a_holder_that_the_server_forgot(
    valkey: Server, proxy: FaultProxy, prefix: str, kind: type[Party], what: str
) -> None:
    """It can do nothing to the lock of the next holder, and is told, also when its first word about
    that was lost on the way.
    """

    async def main(party: Party) -> None:
        held = await party.acquire(0)
        other = taken_over(valkey, prefix)
        if what.startswith("doubtful"):
            proxy.drop_request(of="EVALSHA")
        more = ["1"] if what == "write_safely" else []
        with pytest.raises(LockLostError):
            await getattr(party, what.split()[-1])(held, *more)
        assert proxy.armed == 0
        assert await party.read() == [None, None]
        other.release()

    run_as(kind, Plan(proxy.url, prefix), main)


@pytest.mark.parametrize("kind", [Party, AsyncParty])
def test_a_renewal_takes_nothing_back(
    valkey: Server, proxy: FaultProxy, prefix: str, kind: type[Party]
) -> None:
    """A holder that the server forgot renews no other's lease, and knows that it was lost."""

    async def main(party: Party) -> None:
        held = await party.acquire(0)
        other = taken_over(valkey, prefix)
        for _ in range(1000):
            if held.lost:
                break
            await asyncio.sleep(0.01)
        assert held.lost
        with pytest.raises(LockLostError):
            await party.release(held)
        other.release()

    run_as(kind, Plan(proxy.url, prefix, options={"ttl": 0.4, "renew": True}), main)


def test_a_lost_answer_is_no_loss(valkey: Server, proxy: FaultProxy, prefix: str) -> None:
    """Who gave the lock back has not lost it, whatever became of the next holder until it could say
    so again.
    """
    others: list[Held] = []

    def between(name: str, node: str, seconds: float, error: BaseException | None) -> None:
        if error is not None and not others:
            direct = Lock(valkey.url, LOCK, prefix=prefix)
            others.append(direct.acquire(ttl=0.01))
            eventually(lambda: others[0].lost)
            others.append(Lock(valkey.url, LOCK, prefix=prefix).acquire())

    lock = Lock(proxy.url, LOCK, prefix=prefix, on_command=between)
    lock.acquire().release()
    held = lock.acquire()
    proxy.drop_reply(of="EVALSHA")
    held.release()
    assert [other.held for other in others] == [False, True]
    others[1].release()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Party, AsyncParty])
def test_a_lease_begins_when_it_was_got(
    valkey: Server, proxy: FaultProxy, prefix: str, kind: type[Party]
) -> None:
    """Who waited for a server that was away for longer than a lease has the whole of its lease."""
    other = Lock(valkey.url, LOCK, prefix=prefix, ttl=30).acquire()

    async def wait(party: Party) -> None:
        held = await party.acquire(10)
        assert held.remaining > 0
        await party.release(held)

    def away() -> None:
        with valkey.client() as client:
            eventually(lambda: client.zcard(line_key(prefix)) == 1)
        proxy.refuse()
        proxy.cut()
        time.sleep(0.1)
        other.release()
        time.sleep(1.3)  # it looks after a second, and goes on asking
        proxy.accept()

    thread = threading.Thread(target=away)
    thread.start()
    try:
        run_as(kind, Plan(proxy.url, prefix, options={"ttl": 0.3, "deadline": 5}), wait)
    finally:
        thread.join()
