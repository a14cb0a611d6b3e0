"""What a limiter does without asking: memory, leases, chores, the breaker, a share of a limit.

Most of it by a clock that is ours; what two threads, or a server that is away, have to do with it
by real ones.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from redishacks._breaker import Breaker
from redishacks._command import Ask, Command, Outcome
from redishacks.errors import UnavailableError, UsageError
from redishacks.ratelimit import AsyncRateLimiter, Ban, CostError, Decision, Limit, RateLimiter
from redishacks.ratelimit._chores import HEARTBEAT, Chores
from redishacks.ratelimit._fallback import LocalLimits
from redishacks.ratelimit._recall import Denied, Lease, Memory
from redishacks.ratelimit.commands import Layout, Question
from redishacks.ratelimit.decision import Charge, Verdict, decided
from redishacks.testing import Cluster, Server, valkey_server
from tests.helpers import Colour, eventually

NOWHERE = "redis://127.0.0.1:1"
LAYOUT = Layout("rh", "api", "key")
MINUTE = Limit(100, 60)


class Clock:
    """A clock that goes when it is told; in place of `time`, too."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    monotonic = time = __call__


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that limiters look at; transports have their own."""
    made = Clock()
    for module in ("_core", "_fallback", "_recall", "limiter"):
        monkeypatch.setattr(f"redishacks.ratelimit.{module}.monotonic", made)
    monkeypatch.setattr("redishacks.ratelimit._chores.time", made)
    return made


class Said:
    """What was said to Redis, and by which thread; to be given as `on_command`."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, str]] = []

    def __call__(self, name: str, node: str, seconds: float, error: Any) -> None:
        self.commands.append((name, threading.current_thread().name))

    def hits(self) -> int:
        """Return how often the test itself has asked."""
        main = threading.current_thread().name
        return sum(thread == main for _, thread in self.commands)


def question(key: Any = "u", *limits: Limit, ban: Ban | None = None, cost: int = 1) -> Question:
    """Return what is asked about a key."""
    return LAYOUT.question(key, limits or (MINUTE,), cost, ban)


def refusal(retry: float | None = 30.0, reset: float = 60.0) -> Decision:
    """Return a decision of Redis that refuses."""
    return decided(False, (Verdict(MINUTE, None, False, 0, retry, 1.0, reset),))


def denied(
    clock: Clock, retry: float | None = 30.0, cost: int = 1, longest: float = 1.0, key: Any = "u"
) -> Denied:
    """Return a refusal of now."""
    return Denied(question(key), refusal(retry), cost, clock.now, longest)


def lease(
    clock: Clock, size: int = 10, good: float = 2.0, remaining: int = 50, key: Any = "u"
) -> Lease:
    """Return a lease of now, with so many places remaining beside its tokens."""
    asked = question(key)
    verdict = Verdict(MINUTE, None, True, remaining, 0.0, 60.0, 61.0)
    decision = decided(True, (verdict,), charge=Charge(None, asked, [5_000_000, size]))
    return Lease(asked, decision, size, clock.now + good)


# Refusals that are repeated


def test_a_refusal_stands_until_its_end_less_a_thousandth(clock: Clock) -> None:
    """It is repeated as long as no two clocks could disagree, counted from the question."""
    entry = denied(clock, retry=10.0, longest=60.0)
    assert entry.until == pytest.approx(clock.now + 9.99)
    clock.now += 9.989
    assert entry.answer(1) is not None
    clock.now += 0.002
    assert entry.answer(1) is None


def test_a_refusal_stands_no_longer_than_it_may(clock: Clock) -> None:
    """At most `deny_max`, and as long when Redis would never allow it."""
    for retry in (30.0, None):
        entry = denied(clock, retry=retry, longest=1.0)
        assert entry.until == clock.now + 1.0
    assert denied(clock, retry=0.5).until == pytest.approx(clock.now + 0.4995)


def test_a_repeated_refusal_ages(clock: Clock) -> None:
    """Its times go down as time goes by; within a millisecond the same decision does."""
    entry = denied(clock, retry=10.0, longest=60.0)
    clock.now += 4
    first = entry.answer(1)
    assert first is not None
    assert (first.allowed, first.source, first.degraded) == (False, "deny", False)
    assert first.retry_after == pytest.approx(6.0)
    assert first.reset_after == pytest.approx(56.0)
    assert first.each[0].retry_after == pytest.approx(6.0)
    assert first.each[0].next_after == 0.0
    assert first.each[0].reset_after == pytest.approx(56.0)
    clock.now += 0.0009
    assert entry.answer(1) is first
    clock.now += 0.0002
    later = entry.answer(1)
    assert later is not None
    assert later.retry_after == pytest.approx(5.9989)


def test_a_decision_that_is_fresh_is_not_repeated_beyond_the_end(clock: Clock) -> None:
    """The millisecond in which a decision stays the same ends with the refusal."""
    entry = denied(clock, longest=1.0)
    clock.now += 0.9998
    assert entry.answer(1) is not None
    clock.now += 0.0003
    assert entry.answer(1) is None


def test_a_refusal_that_never_ends_has_no_time(clock: Clock) -> None:
    """None stays None."""
    entry = denied(clock, retry=None)
    clock.now += 0.5
    again = entry.answer(1)
    assert again is not None
    assert again.retry_after is None
    assert again.each[0].retry_after is None


def test_costs_that_a_refusal_answers_for(clock: Clock) -> None:
    """The refused cost and what is heavier, up to what could ever be allowed; nothing cheaper."""
    entry = denied(clock, cost=5)
    assert entry.answer(4) is None
    assert entry.answer(5) is not None
    assert entry.answer(100) is not None
    assert entry.answer(101) is None
    assert entry.total() == 2


def test_refusals_are_counted_once(clock: Clock) -> None:
    """Each is news once; the total stays."""
    entry = denied(clock)
    for _ in range(3):
        entry.answer(1)
    assert (entry.pending(), entry.total()) == (3, 3)
    assert entry.news() == 3
    assert (entry.pending(), entry.news(), entry.total()) == (0, 0, 3)
    entry.answer(1)
    assert (entry.pending(), entry.news(), entry.total()) == (1, 1, 4)


def test_a_refusal_counts_from_when_it_was_asked_for(
    clock: Clock, valkey: Any, prefix: str
) -> None:
    """The time on the way is the refused one's gain: a slow reply makes nobody wait longer."""

    def slow(*_: Any) -> None:
        clock.now += 0.4

    limiter = RateLimiter(
        valkey.url, "api", Limit(1, 60), prefix=prefix, deadline=5, on_command=slow
    )
    limiter.hit("u")
    asked = clock.now
    assert not limiter.hit("u").allowed
    assert clock.now == asked + 0.4
    assert limiter._memory.entries["u"].until == asked + 1.0


def test_each_refusal_is_asked_for_without_the_cache(
    colour: Colour, valkey: Any, prefix: str
) -> None:
    """With `deny_cache=False` Redis decides on every hit, and nothing is remembered."""
    limiter = colour.limiter(
        valkey.url, "api", Limit(1, 60), prefix=prefix, deadline=5, deny_cache=False
    )
    assert [limiter.hit("u").source for _ in range(5)] == ["redis"] * 5
    assert limiter.counts() == (4, 0, 0)


def test_what_is_not_remembered(valkey: Any, prefix: str) -> None:
    """Refusals of mappings of keys, of limits per call, and in shadow mode are asked for again."""
    said = Said()
    options: Any = {"prefix": prefix, "deadline": 5, "on_command": said}
    limiter = RateLimiter(valkey.url, "api", Limit(1, 60, name="user"), **options)
    cases: list[Callable[[], Decision]] = [
        lambda: limiter.hit({"user": "u"}),
        lambda: limiter.hit("v", limits=Limit(1, 60)),
        lambda: limiter.hit("w", {"user": 1}),
    ]
    for hit in cases[:2]:
        assert [hit().source for _ in range(4)] == ["redis"] * 4
    # A refused cost by name is remembered as one of 1, and answers only for plain costs.
    assert [cases[2]().source for _ in range(4)] == ["redis"] * 4
    shadow = RateLimiter(valkey.url, "shadow", Limit(1, 60), shadow=True, **options)
    assert [shadow.hit("u").source for _ in range(4)] == ["redis"] * 4
    assert said.hits() == 16
    assert limiter.hit("v").source == "redis"  # the refusal of other limits is not that of these


def test_a_cost_that_can_never_be_is_an_error_all_the_same(valkey: Any, prefix: str) -> None:
    """Though the key is known to be refused; a cheaper hit is asked for, and may be refused too."""
    limiter = RateLimiter(valkey.url, "api", Limit(4, 60), prefix=prefix, deadline=5)
    limiter.hit("u", 3)
    assert limiter.hit("u", 3).source == "redis"
    assert limiter.hit("u", 3).source == "deny"
    assert limiter.hit("u", 2).source == "redis"
    assert limiter.hit("u", 2).source == "deny"
    with pytest.raises(CostError):
        limiter.hit("u", 5)
    assert limiter.hit("u", 1).allowed
    assert limiter.counts().refused == 4
    several = RateLimiter(
        valkey.url, "several", Limit(9, 60), Limit(4, 3600), prefix=prefix, deadline=5
    )
    several.hit("u", 4)
    assert [several.hit("u").source for _ in range(2)] == ["redis", "deny"]
    with pytest.raises(CostError):
        several.hit("u", 5)


# Memory


def test_ten_thousand_keys_are_remembered(valkey: Any, prefix: str) -> None:
    """Of one more key nothing is, and it is refused by Redis; the memory does not grow."""
    limiter = RateLimiter(
        valkey.url, "api", Limit(1, 600), prefix=prefix, deadline=30, deny_max=300
    )
    keys = [f"u{n}" for n in range(10_001)]
    assert all(decision.allowed for decision in limiter.hit_many(keys))
    for sources in ({"redis": 10_001}, {"deny": 10_000, "redis": 1}):
        decisions = limiter.hit_many(keys)
        assert not any(decision.allowed for decision in decisions)
        found = [decision.source for decision in decisions]
        assert {source: found.count(source) for source in set(found)} == sources
    assert len(limiter._memory.entries) == 10_000
    assert limiter.counts().refused == 20_002
    assert limiter.hit(keys[0]).source == "deny"
    assert limiter.hit(keys[-1]).source == "redis"


def test_a_full_memory_takes_what_it_knows(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room a known key's entry is replaced, and a new key's lease is to be returned."""
    monkeypatch.setattr("redishacks.ratelimit._recall._MOST", 2)
    memory = Memory()
    for key in ("a", "b", "c"):
        memory.put(key, denied(clock, key=key))
    assert set(memory.entries) == {"a", "b"}
    newer = denied(clock, key="a")
    memory.put("a", newer)
    assert memory.entries["a"] is newer
    memory.put("d", lease(clock, 10, key="d"))
    assert set(memory.entries) == {"a", "b"}
    assert memory.waiting(everything=True) == 9
    ((given, tokens),) = memory.sweep()
    assert (given.question.raw, tokens) == (b"d", 9)


def test_what_is_replaced_is_still_told(clock: Clock) -> None:
    """Refusals of an entry that gave way to another one are news, and stay counted."""
    memory = Memory()
    for cost in (5, 4, 3):
        entry = denied(clock, cost=cost)
        memory.put("u", entry)
        entry.answer(cost)
        entry.answer(cost)
    assert memory.entries["u"].answer(3) is not None
    assert memory.waiting() == 7
    assert memory.repeated() == 7
    assert [times for _, times in memory.news()] == [2, 2, 3]
    assert memory.news() == []
    assert memory.waiting() == 0
    memory.sweep()
    assert memory.repeated() == 7
    clock.now += 1
    memory.sweep()
    assert memory.repeated() == 7
    assert memory.entries == {}
    memory.reset()
    assert memory.repeated() == 0


def test_what_is_over_is_forgotten(clock: Clock) -> None:
    """A sweep takes what no longer holds, at the very moment, and nothing else."""
    memory = Memory()
    memory.put("short", denied(clock, longest=1.0))
    memory.put("long", denied(clock, longest=2.0))
    memory.put("lease", lease(clock, 10, good=1.0))
    clock.now += 0.999
    assert memory.sweep() == []
    assert set(memory.entries) == {"short", "long", "lease"}
    clock.now += 0.001
    ((_, tokens),) = memory.sweep()
    assert tokens == 9
    assert set(memory.entries) == {"long"}
    memory.put("lease", lease(clock, 10, good=1.0))
    memory.put("spent", lease(clock, 1, good=1.0))
    ((_, tokens),) = memory.sweep(everything=True)
    assert tokens == 9
    assert set(memory.entries) == {"long"}  # a refusal still holds when the limiter is closed


def test_what_waits_is_what_may_not_wait(clock: Clock) -> None:
    """Refusals at once, leases when they have ended; everything when the limiter is closed."""
    memory = Memory()
    memory.put("u", lease(clock, 10, good=2.0))
    memory.put("v", denied(clock, key="v"))
    memory.entries["v"].answer(1)
    assert (memory.waiting(), memory.waiting(everything=True)) == (1, 10)
    clock.now += 1.999
    assert memory.waiting() == 1
    clock.now += 0.001
    assert (memory.waiting(), memory.waiting(everything=True)) == (10, 10)


def test_a_child_remembers_nothing(clock: Clock) -> None:
    """Neither what holds nor what was replaced: all of that is its parent's to tell."""
    memory = Memory()
    for _ in range(2):
        memory.put("u", lease(clock, 10))
        memory.put("v", denied(clock, key="v"))
        memory.entries["v"].answer(1)
    memory.reset()
    assert (memory.waiting(everything=True), memory.repeated(), memory.entries) == (0, 0, {})
    assert (memory.news(), memory.sweep(everything=True)) == ([], [])


def test_a_lease_that_nobody_spends_from_is_given_back(clock: Clock) -> None:
    """After five sweeps without a hit, though it is good for longer."""
    memory = Memory()
    entry = lease(clock, 10, good=1_000.0)
    memory.put("u", entry)
    for _ in range(3):
        for _ in range(5):
            assert memory.sweep() == []
        assert entry.answer(1) is not None
    for _ in range(5):
        assert memory.sweep() == []
    assert memory.sweep() == [(entry, 6)]
    assert memory.entries == {}


def test_refusals_are_forgotten_when_the_limits_change(clock: Clock) -> None:
    """Leases are not: their tokens are charged."""
    memory = Memory()
    memory.put("u", denied(clock))
    memory.entries["u"].answer(1)
    memory.put("v", lease(clock, 10, key="v"))
    memory.forget_denials()
    assert set(memory.entries) == {"v"}
    assert [times for _, times in memory.news()] == [1]
    assert memory.repeated() == 1


def test_a_lease_that_is_replaced_is_given_back(clock: Clock) -> None:
    """Once, and only what nobody spent."""
    memory = Memory()
    old, spent = lease(clock, 10), lease(clock, 3)
    memory.put("u", old)
    memory.put("u", spent)
    memory.put("u", lease(clock, 20))
    for _ in range(4):
        old.answer(1)
    for _ in range(3):
        spent.answer(1)
    assert memory.waiting(everything=True) == 5 + 0 + 19
    assert memory.sweep() == [(old, 5)]
    assert old.answer(1) is None
    assert memory.sweep() == []
    assert memory.waiting(everything=True) == 19


def test_a_key_is_forgotten_however_it_is_spelled(clock: Clock) -> None:
    """As str, bytes or int; other keys are not, nor are leases unless that is said."""
    memory = Memory()
    spellings: list[Any] = ["42", b"42", 42]
    for key in [*spellings, "43", "u"]:
        memory.put(key, denied(clock, key=key))
        memory.entries[key].answer(1)
    memory.forget(question(42))
    assert set(memory.entries) == {"43", "u"}
    assert len(memory.news()) == 5  # what was forgotten is told, too
    tokens = lease(clock, 10)
    memory.put("v", tokens)
    memory.forget(question("v"))
    assert "v" in memory.entries
    memory.forget(question("v"), leases=True)
    assert "v" not in memory.entries
    assert (tokens.answer(1), memory.sweep()) == (None, [])


def test_two_threads_that_remember_at_once_lose_nothing(clock: Clock) -> None:
    """When one comes between another's look and its write, tokens of both are known."""
    others: list[threading.Thread] = []

    class Interrupted(dict[object, Any]):
        """Lets another thread in, for a while, when a key has been looked up for the first time."""

        def get(self, key: object, default: Any = None) -> Any:
            found = super().get(key, default)
            if not others:
                others.append(threading.Thread(target=memory.put, args=(key, lease(clock, 20))))
                others[0].start()
                others[0].join(0.2)
            return found

    memory = Memory()
    memory.put("u", lease(clock, 10))
    memory.entries = Interrupted(memory.entries)
    memory.put("u", lease(clock, 30))
    others[0].join()
    assert memory.waiting(everything=True) == 9 + 19 + 29
    assert sum(tokens for _, tokens in memory.sweep(everything=True)) == 9 + 19 + 29


def test_a_sweep_takes_what_it_has_seen(clock: Clock) -> None:
    """A lease taken while the memory is swept is kept, and refusals are counted once."""
    others: list[threading.Thread] = []

    class Interrupted(dict[object, Any]):
        """Lets another thread in, for a while, when all has been looked at for the first time."""

        def items(self) -> Any:
            found = list(super().items())
            if not others:
                others.append(threading.Thread(target=memory.put, args=("u", newer)))
                others[0].start()
                others[0].join(0.2)
            return found

    memory = Memory()
    old, newer = denied(clock), lease(clock, 30)
    memory.put("u", old)
    old.answer(1)
    clock.now += 1
    memory.entries = Interrupted(memory.entries)
    memory.sweep()
    others[0].join()
    assert memory.entries == {"u": newer}
    memory.sweep()
    assert memory.repeated() == 1


# Leases


def test_a_lease_is_spent_token_by_token(clock: Clock) -> None:
    """One token went to the hit that asked; each of the others is a decision of its own."""
    entry = lease(clock, 4, remaining=50)
    found = [entry.answer(1) for _ in range(4)]
    assert found[-1] is None
    decisions = [decision for decision in found if decision is not None]
    assert [decision.remaining for decision in decisions] == [52, 51, 50]
    for decision in decisions:
        assert (decision.allowed, decision.source, decision.degraded) == (True, "lease", False)
        assert (decision.limit, decision.retry_after, decision.reset_after) == (100, 0.0, 61.0)
        assert decision.each[0].limit == MINUTE
    charges = [decision.charge for decision in decisions]
    assert all(charge is not None and charge.take(None) == [1] for charge in charges)


def test_a_lease_answers_for_a_cost_of_one_only(clock: Clock) -> None:
    """A heavier hit is asked for, and spends no token."""
    entry = lease(clock, 3)
    assert entry.answer(2) is None
    assert entry.answer(1) is not None
    assert entry.answer(1) is not None
    assert entry.answer(1) is None


def test_a_lease_ends_in_time(clock: Clock) -> None:
    """At the very moment; what is left then waits to be given back."""
    entry = lease(clock, 10, good=2.0)
    clock.now += 1.999
    assert entry.answer(1) is not None
    clock.now += 0.001
    assert entry.answer(1) is None
    assert entry.pending() == 8
    assert entry.drain() == 8
    assert (entry.drain(), entry.pending()) == (0, 0)
    assert (entry.news(), entry.total()) == (0, 0)


def test_what_a_lease_gives_back(clock: Clock) -> None:
    """The cost of so many tokens of every limit, from when they were charged."""
    asked = question("u", Limit(100, 60), Limit(50, 3600))
    charge = Charge(None, asked, [7_000_000, 10])
    verdicts = tuple(
        Verdict(limit, None, True, 40, 0.0, 60.0, 61.0) for limit in (MINUTE, Limit(50, 3600))
    )
    entry = Lease(asked, decided(True, verdicts, charge=charge), 10, clock.now + 2)
    assert entry.give_back(9) == ([9, 9], [7_000_000, 7_000_000])


@pytest.mark.parametrize(
    ("size", "spent", "remaining", "wanted"),
    [
        (1, 0, 1000, 2),  # nothing but the first, which is all there was
        (10, 9, 1000, 20),  # all spent in time: twice as many
        (10, 8, 1000, 9),  # else as many as were
        (10, 0, 1000, 1),
        (10, 9, 30, 15),  # at most half of what is left
        (10, 9, 31, 15),
        (10, 9, 1, 1),  # and never less than one
        (10, 9, 0, 1),
        (8_000, 7_999, 10**9, 10_000),  # nor more than ten thousand
    ],
)
def test_the_size_of_the_next_lease(
    clock: Clock, size: int, spent: int, remaining: int, wanted: int
) -> None:
    """It follows what the last one has shown to be needed."""
    entry = lease(clock, size, remaining=remaining)
    for _ in range(spent):
        assert entry.answer(1) is not None
    assert entry.next_size() == wanted


def test_a_token_is_spent_once(clock: Clock) -> None:
    """Threads that share a lease never get the same token, and get all of them."""
    entry = lease(clock, 20_001, remaining=0)
    found: list[list[int | None]] = [[] for _ in range(4)]

    def spend(mine: list[int | None]) -> None:
        while (decision := entry.answer(1)) is not None:
            mine.append(decision.remaining)

    threads = [threading.Thread(target=spend, args=(mine,)) for mine in found]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(left for mine in found for left in mine if left is not None) == [*range(20_000)]


def test_threads_that_share_a_lease_pass_as_many_as_were_charged(valkey: Any, prefix: str) -> None:
    """What passed and what was charged agree to the last one, with leases of many sizes."""
    size: Any
    for name, size in (("auto", "auto"), ("seven", 7)):
        limiter = RateLimiter(
            valkey.url, name, Limit(100_000, 600), prefix=prefix, deadline=5, lease=size
        )
        passed: list[bool] = []

        def hammer(limiter: RateLimiter = limiter, passed: list[bool] = passed) -> None:
            passed.extend(limiter.hit("u").allowed for _ in range(500))

        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        limiter.close()
        assert (len(passed), all(passed)) == (2_000, True)
        assert limiter.peek("u").remaining == 98_000


def leased(limiter: RateLimiter, key: Any = "u") -> Lease:
    """Return the lease of a key."""
    entry = limiter._memory.entries[key]
    assert isinstance(entry, Lease)
    return entry


@pytest.mark.parametrize(
    "limit",
    [
        Limit(1000, 600),
        Limit(1000, 600, precision=60),
        Limit(1000, 3600, algorithm="fixed"),
        Limit(1000, 3600, algorithm="fixed", spread=True),
    ],
    ids=["window", "coarse window", "fixed", "spread"],
)
def test_a_lease_lasts_as_long_as_its_bucket(
    clock: Clock, valkey: Any, prefix: str, limit: Limit
) -> None:
    """Until the sub-bucket or window ends that was charged, from when the question was sent."""
    on_the_way = 0.0

    def slow(*_: Any) -> None:
        clock.now += on_the_way

    limiter = RateLimiter(
        valkey.url, "api", limit, prefix=prefix, deadline=5, lease=10, on_command=slow
    )
    for key in ("u", "v", "w"):
        on_the_way = 7.0
        sent = clock.now
        decision = limiter.hit(key)
        # The charge is all there is: it stops counting when its bucket does.
        full = 0.0 if limit.algorithm == "fixed" else limit.bucket_micros * limit.buckets / 1e6
        left = decision.reset_after - full
        assert 0 < left <= (limit.bucket_micros / 1e6 if full else 3600)
        assert leased(limiter, key).until == pytest.approx(sent + left * 0.999, abs=1e-5)


def test_a_lease_of_several_limits_lasts_as_long_as_the_first_bucket(
    clock: Clock, valkey: Any, prefix: str
) -> None:
    """A token must count in the right bucket of each."""
    limits = (Limit(1000, 600), Limit(5000, 86_400, algorithm="fixed"), Limit(2000, 30))
    limiter = RateLimiter(valkey.url, "api", *limits, prefix=prefix, deadline=5, lease=10)
    decision = limiter.hit("u")
    lefts = [decision.each[0].reset_after - 600, decision.each[1].reset_after]
    lefts.append(decision.each[2].reset_after - 30)
    assert leased(limiter).until == pytest.approx(clock.now + min(lefts) * 0.999, abs=1e-5)


@pytest.mark.parametrize("algorithm", ["gcra", "log"])
def test_what_has_no_buckets_is_not_leased(valkey: Any, prefix: str, algorithm: str) -> None:
    """That is said at once; such a limit of a single hit is asked for each time."""
    odd = Limit(50, 60, algorithm=algorithm)
    for limits in ((odd,), (Limit(50, 60), odd)):
        for size in ("auto", 10):
            with pytest.raises(
                UsageError, match=f"lease is for window and fixed, not for {algorithm}"
            ):
                RateLimiter(NOWHERE, "api", *limits, lease=size)
    limiter = RateLimiter(valkey.url, "api", Limit(50, 60), prefix=prefix, deadline=5, lease=10)
    assert [limiter.hit("u", limits=odd).source for _ in range(5)] == ["redis"] * 5
    assert limiter.peek("u", limits=odd).remaining == 45


def test_hits_that_are_not_leased(valkey: Any, prefix: str) -> None:
    """Heavier ones, those of a mapping of keys, and those with limits of their own."""
    limit = Limit(100, 3600, name="user")
    limiter = RateLimiter(valkey.url, "api", limit, prefix=prefix, deadline=5, lease=10)
    for _ in range(2):
        assert limiter.hit("u", 3).source == "redis"
        assert limiter.hit({"user": "u"}).source == "redis"
        assert limiter.hit("v", limits=Limit(100, 3600)).source == "redis"
        assert limiter.hit("w", {"user": 1}).source == "redis"
    assert limiter._memory.entries == {}
    limiter.close()
    assert limiter.peek("u").remaining == 94
    assert limiter.peek({"user": "u"}).remaining == 98
    assert limiter.peek("v").remaining == 98
    assert limiter.peek("w").remaining == 98
    assert limiter._memory.entries == {}


def test_a_lease_is_no_larger_than_the_room(colour: Colour, valkey: Any, prefix: str) -> None:
    """What the limit has left is leased, every token of it is spent, and then it refuses."""
    limiter = colour.limiter(
        valkey.url, "api", Limit(15, 3600), prefix=prefix, deadline=5, lease=10
    )
    decisions = [limiter.hit("u") for _ in range(17)]
    assert [decision.allowed for decision in decisions] == [True] * 15 + [False] * 2
    sources = ["redis", *["lease"] * 9, "redis", *["lease"] * 4, "redis", "deny"]
    assert [decision.source for decision in decisions] == sources
    assert [decision.remaining for decision in decisions[-2:]] == [0, 0]


def test_what_is_left_while_a_lease_is_spent(colour: Colour, valkey: Any, prefix: str) -> None:
    """Tokens taken in advance are left until they are spent: each hit takes one."""
    limiter = colour.limiter(
        valkey.url, "api", Limit(15, 3600), prefix=prefix, deadline=5, lease=10
    )
    assert [limiter.hit("u").remaining for _ in range(15)] == [*range(14, -1, -1)]


def test_leases_grow_with_the_demand(clock: Clock, valkey: Any, prefix: str) -> None:
    """One, two, four and so on; after an idle time as many as were needed, then from one again."""
    said = Said()
    limiter = RateLimiter(
        valkey.url, "api", Limit(10_000, 6000), prefix=prefix, deadline=5, lease="auto",
        on_command=said,
    )  # fmt: skip
    sources = [limiter.hit("u").source for _ in range(31)]
    asked = [at for at, source in enumerate(sources) if source == "redis"]
    assert asked == [0, 1, 3, 7, 15]
    assert said.hits() == 5
    limiter.hit("u")
    assert leased(limiter).size == 32
    clock.now = leased(limiter).until  # one of them was spent, apart from the first
    limiter.hit("u")
    assert leased(limiter).size == 1
    limiter._memory.sweep(everything=True)
    limiter.hit("u")
    assert leased(limiter).size == 1


def test_refunds_of_leased_hits(colour: Colour, valkey: Any, prefix: str) -> None:
    """Each gives back its own token, once."""
    limiter = colour.limiter(
        valkey.url, "api", Limit(100, 3600), prefix=prefix, deadline=5, lease=10
    )
    decisions = [limiter.hit("u") for _ in range(10)]
    assert [limiter.refund(decision) for decision in decisions[:4]] == [1] * 4
    assert limiter.refund(decisions[0]) == 0
    limiter.close()
    assert limiter.peek("u").remaining == 94


def test_tokens_of_a_replaced_lease_come_back(
    clock: Clock, colour: Colour, valkey: Any, prefix: str
) -> None:
    """When a lease has ended and another one is taken, what was left of it is given back."""
    limiter = colour.limiter(
        valkey.url, "api", Limit(100, 3600), prefix=prefix, deadline=5, lease=10
    )
    limiter.hit("u")
    clock.now += 3600
    assert limiter.hit("u").source == "redis"
    limiter.close()
    assert limiter.peek("u").remaining == 98


def test_after_closing(colour: Colour, valkey: Any, prefix: str) -> None:
    """A closed limiter still decides; what it leases then is given back by the next close."""
    limiter = colour.limiter(
        valkey.url, "api", Limit(100, 3600), prefix=prefix, deadline=5, lease=10
    )
    for _ in range(2):
        assert limiter.hit("u").allowed
        limiter.close()
    assert limiter.peek("u").remaining == 98
    limiter.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RateLimiter", "AsyncRateLimiter"])
def test_an_exit_gives_leases_back_at_once(valkey: Any, prefix: str, kind: str) -> None:
    """A process that ends by itself without a close leaves no token behind, and does not wait."""
    code = """
        import asyncio, inspect, sys
        from redishacks import ratelimit
        kind = getattr(ratelimit, sys.argv[3])
        limit = ratelimit.Limit(100, 86_400, algorithm="fixed")
        limiter = kind(sys.argv[1], "api", limit, prefix=sys.argv[2], deadline=5, lease=10)
        async def main():
            decision = limiter.hit("u")
            return await decision if inspect.isawaitable(decision) else decision
        assert asyncio.run(main()).allowed
    """
    command = [sys.executable, "-c", textwrap.dedent(code), valkey.url, prefix, kind]
    subprocess.run(command, check=True, timeout=10)
    limit = Limit(100, 86_400, algorithm="fixed")
    limiter = RateLimiter(valkey.url, "api", limit, prefix=prefix, deadline=5)
    assert limiter.peek("u").remaining == 99


def test_a_forked_child_gives_nothing_back_of_its_parents(
    clock: Clock, valkey: Any, prefix: str
) -> None:
    """Tokens of a replaced lease come back once: the limit is not to be exceeded by a fork."""
    limit = Limit(100, 86_400, algorithm="fixed")
    limiter = RateLimiter(valkey.url, "api", limit, prefix=prefix, deadline=5, lease=20)
    limiter.hit("u")
    clock.now += 86_400
    limiter.hit("u")
    other = RateLimiter(valkey.url, "api", limit, prefix=prefix, deadline=5)
    assert other.hit("u", 60).allowed
    child = os.fork()
    if child == 0:
        limiter.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    limiter.close()
    assert other.peek("u").remaining == 38  # 60 hits there, 2 here


# Chores


class Round:
    """Chores, done by hand: what they say, and what they are told."""

    def __init__(self, *, heartbeat: bool = False, limits: tuple[Limit, ...] = (MINUTE,)) -> None:
        self.memory = Memory()
        self.chores = Chores(LAYOUT, self.memory, limits, heartbeat=heartbeat)

    def said(self, **errors: Exception) -> list[Command[Any]]:
        """Do them once, each command answered by 3, or by the error of its script's name."""
        steps = self.chores.send()
        try:
            effect = next(steps)
        except StopIteration:
            return []
        assert isinstance(effect, Ask)
        outcomes: list[Outcome[Any]] = []
        for command in effect.commands:
            error = errors.get(name(command))
            outcomes.append(Outcome(None, error) if error else Outcome(command.parse(3)))
        with pytest.raises(UnavailableError if errors else StopIteration):
            steps.send(outcomes)
        return list(effect.commands)

    def names(self, **errors: Exception) -> list[str]:
        """Do the same, and return the names of what was said."""
        return [name(command) for command in self.said(**errors)]


def words(command: Command[Any]) -> list[str]:
    """Return what a command says, as text."""
    return [word.decode() if isinstance(word, bytes) else word for word in command.args]


def name(command: Command[Any]) -> str:
    """Return the name of a command, or that of its script and its verb."""
    if command.script is None:
        return str(command.args[0])
    short = command.script.name.removeprefix("ratelimit_")
    return str(command.args[0]) if short == "decide" else short


def test_limits_are_announced_once_an_hour(clock: Clock) -> None:
    """At first, and again when an hour is over."""
    limits = (Limit(5, 60), Limit(9, 3600, algorithm="gcra"))
    round_ = Round(limits=limits)
    (command,) = round_.said()
    assert command.keys == (b"rh:r1:{api}:limits",)
    assert command.args[:2] == ("1000", "90000")
    assert [Limit.from_json(text) for text in command.args[3::2]] == [*limits]
    assert len(set(command.args[2::2])) == 2
    assert round_.names() == []
    clock.now += 3599.9
    assert round_.names() == []
    clock.now += 0.2
    assert round_.names() == ["announce"]


def test_limits_that_come_later_are_announced(clock: Clock) -> None:
    """At once, also while others are being announced; those that are known are not."""
    round_ = Round()
    assert round_.names() == ["announce"]
    late, later = Limit(7, 70), Limit(8, 80)
    round_.chores.announce([MINUTE])
    assert round_.names() == []
    round_.chores.announce([MINUTE, late])
    steps = round_.chores.send()
    effect = next(steps)
    assert isinstance(effect, Ask)
    round_.chores.announce([later])
    (command,) = effect.commands
    with pytest.raises(StopIteration):
        steps.send([Outcome(command.parse(1))])
    (command,) = round_.said()
    assert [Limit.from_json(text) for text in command.args[3::2]] == [MINUTE, late, later]
    assert round_.names() == []


def test_limits_without_number_are_not_all_announced(clock: Clock) -> None:
    """Limits made up per call are announced up to a hundred."""
    round_ = Round()
    for amount in range(200):
        round_.chores.announce([Limit(amount, 70)])
    (command,) = round_.said()
    assert len(command.args[3::2]) == 100
    round_.chores.announce([Limit(1_000, 70)])
    assert round_.names() == []


def test_an_announcement_that_failed_is_made_again(clock: Clock) -> None:
    """A limiter that began while Redis was away is known soon after, not an hour later."""
    round_ = Round()
    assert round_.names(announce=UnavailableError("away")) == ["announce"]
    clock.now += 10
    assert round_.names() == ["announce"]


def test_heartbeats(clock: Clock) -> None:
    """Every five seconds, if wanted; each tells how many processes there are."""
    assert Round().names() == ["announce"]
    round_ = Round(heartbeat=True)
    assert round_.chores.processes == 0
    _, beat = round_.said()
    assert name(beat) == "alive"
    assert beat.keys == (b"rh:r1:{api}:processes",)
    assert beat.args[1] == "15000"
    assert round_.chores.processes == 3
    round_.chores.processes = 8
    clock.now += 4.9
    assert round_.names() == []
    clock.now += 0.2
    (again,) = round_.said()
    assert again.args == beat.args
    assert round_.chores.processes == 3  # some have gone
    clock.now += HEARTBEAT
    assert round_.names(alive=UnavailableError("away")) == ["alive"]
    assert round_.chores.processes == 3  # what was known last


def test_processes_are_counted_as_long_as_they_live(valkey: Any, prefix: str) -> None:
    """One is counted until 15 seconds after its last heartbeat, and the key does not stay."""
    layout = Layout(prefix, "api", "key")
    transport = RateLimiter(valkey.url, "x", MINUTE, prefix=prefix).transport
    counted: list[int] = []

    def beat(process: str, now: float) -> int:
        command = layout.alive(process, 3 * HEARTBEAT, counted.append)
        transport.call(command._replace(args=(*command.args, str(round(now * 1e6)))), 5)
        return counted[-1]

    assert beat("a", 100.0) == 1
    assert beat("b", 101.0) == 2
    assert beat("b", 101.5) == 2
    assert beat("c", 114.9) == 3
    assert beat("c", 115.0) == 2
    assert beat("c", 116.4) == 2
    assert beat("c", 116.5) == 1
    with valkey.client() as client:
        (key,) = client.keys(f"{prefix}:*processes")
        assert 0 < client.pttl(key) <= 15_000


def test_refusals_are_told_once(clock: Clock) -> None:
    """Those by Redis and those from memory together, by key, under the hour."""
    clock.now = 7_200.0 + 3_599.0
    round_ = Round()
    round_.said()
    for key, times in (("a", 3), ("b", 1)):
        for _ in range(times):
            round_.chores.refused.append(question(key))
    entry = denied(clock, key="a")
    round_.memory.put("a", entry)
    entry.answer(1)
    entry.answer(1)
    assert round_.chores.held() == 6
    (command,) = round_.said()
    assert name(command) == "note"
    assert command.keys == (b"rh:r1:{api}:refused:2",)
    assert words(command) == ["1000", "90000", "a", "5", "b", "1"]
    assert round_.chores.held() == 0
    assert round_.said() == []
    clock.now += 1
    entry = denied(clock, key="a")
    round_.memory.put("a", entry)
    entry.answer(1)
    (command,) = round_.said()
    assert command.keys == (b"rh:r1:{api}:refused:3",)
    assert words(command)[2:] == ["a", "1"]


def test_bans_hear_of_refusals_from_memory_only(clock: Clock) -> None:
    """Those by Redis it has counted itself."""
    round_ = Round()
    round_.said()
    asked = question("u", ban=Ban(10, 60))
    round_.chores.refused.append(asked)
    entry = Denied(asked, refusal(), 1, clock.now, 1.0)
    round_.memory.put("u", entry)
    for _ in range(4):
        entry.answer(1)
    note, tell = round_.said()
    assert note.args[:2] == ("note", "4")
    assert note.keys == (b"rh:r1:{api/u}:ban",)
    assert words(tell)[2:] == ["u", "5"]


def test_refusals_that_wait_are_bounded(clock: Clock) -> None:
    """Of more than ten thousand the oldest are forgotten."""
    round_ = Round()
    old, new = question("old"), question("new")
    round_.chores.refused.extend([old] * 5 + [new] * 10_000)
    assert round_.chores.held() == 10_000
    assert words(round_.said()[-1])[2:] == ["new", "10000"]


def test_leases_are_given_back_when_they_have_ended(clock: Clock) -> None:
    """Not before, unless the limiter is closing."""
    round_ = Round()
    round_.said()
    round_.memory.put("u", lease(clock, 10, good=2.0))
    round_.memory.put("v", lease(clock, 5, good=3.0, key="v"))
    assert round_.names() == []
    assert round_.chores.held() == 0
    clock.now += 2.0
    assert round_.chores.held() == 9
    (command,) = round_.said()
    assert command.args[:2] == ("refund", "0")
    assert command.args[-2:] == ("9", "5000000")
    assert command.keys == question("u").keys
    assert round_.chores.held() == 0
    round_.chores.last()
    assert round_.chores.held() == 4
    (command,) = round_.said()
    assert command.args[-2:] == ("4", "5000000")
    assert round_.chores.held() == 0


def test_nothing_is_held_that_cannot_be_told(clock: Clock) -> None:
    """After a failure an exit does not wait; the next round begins anew."""
    round_ = Round()
    away = UnavailableError("away")
    round_.chores.refused.append(question())
    assert round_.names(note=away) == ["announce", "note"]
    assert round_.chores.error is away
    round_.chores.refused.append(question())
    assert round_.chores.held() == 0
    assert round_.names() == ["note"]
    assert round_.chores.error is None
    round_.chores.refused.append(question())
    assert round_.chores.held() == 1


def test_probes(clock: Clock) -> None:
    """Each node that did not answer is asked in every round, until it does."""
    round_ = Round()
    round_.said()
    breaker = round_.chores.breaker
    breaker.open("one", LAYOUT.decide(question("u"), "peek"))
    breaker.open("two", Command(("PING",)))
    round_.chores.refused.append(question())
    assert round_.names(PING=UnavailableError("away")) == ["note", "peek", "PING"]
    breaker.check("one")
    with pytest.raises(UnavailableError):
        breaker.check("two")
    assert round_.names(PING=UnavailableError("away")) == ["PING"]
    assert round_.names() == ["PING"]
    assert not breaker
    assert round_.names() == []


def test_a_child_begins_anew(clock: Clock) -> None:
    """As a process of its own, with nothing that its parent will tell, and no node in disgrace."""
    round_ = Round(heartbeat=True)
    _, before = round_.said()
    chores = round_.chores
    chores.refused.append(question())
    round_.memory.put("u", lease(clock, 10))
    chores.breaker.open("one", Command(("PING",)))
    chores.error = UnavailableError("away")
    assert chores.after_fork() is chores
    assert (chores.processes, chores.held()) == (0, 0)
    assert chores.error is None
    assert not chores.breaker
    announced, beat = round_.said()
    assert (name(announced), name(beat)) == ("announce", "alive")
    assert beat.args[0] != before.args[0]


def test_notes_go_out_once_a_second(valkey: Any, prefix: str) -> None:
    """However many there are, and not on the path of hits."""
    said = Said()
    limiter = RateLimiter(
        valkey.url, "api", Limit(1, 600), prefix=prefix, deadline=5, on_command=said
    )
    began = time.monotonic()
    while time.monotonic() < began + 2.5:
        limiter.hit("u")
        time.sleep(0.005)
    notes = [thread for _, thread in said.commands if thread == "redishacks-linger"]
    # Two commands at the first round, one at each other.
    assert 2 <= len(notes) <= time.monotonic() - began + 2
    assert len(said.commands) == said.hits() + len(notes)


# The breaker


def test_a_breaker_knows_its_nodes() -> None:
    """It is open for those that did not answer, and for no other."""
    breaker = Breaker()
    assert not breaker
    breaker.check("one")
    breaker.open("one", Command(("PING",)))
    breaker.open("one", Command(("ECHO", "x")))
    breaker.open("two", Command(("PING",)))
    assert breaker
    breaker.check("three")
    with pytest.raises(UnavailableError, match="did not answer a moment ago"):
        breaker.check("one")
    assert {node: probe.args[0] for node, probe in breaker.probes().items()} == {
        "one": "PING",
        "two": "PING",
    }
    breaker.settle(["one", "two"], [Outcome(1), Outcome(None, UnavailableError("away"))])
    breaker.check("one")
    with pytest.raises(UnavailableError):
        breaker.check("two")
    breaker.settle(["two", "gone"], [Outcome(1), Outcome(1)])
    assert not breaker


@pytest.fixture
def private() -> Iterator[Server]:
    """A server that this test may stop."""
    with valkey_server() as server:
        yield server


def test_a_probe_a_second_off_the_path(private: Server) -> None:
    """A hung Redis is asked once by a hit, then by the background alone, at its own pace."""
    said = Said()
    limiter = RateLimiter(
        private.url, "api", Limit(1000, 600), on_error="allow", deadline=0.1, on_command=said
    )
    limiter.hit("u")
    with private.paused():
        before, began = said.hits(), time.monotonic()
        while time.monotonic() < began + 2.5:
            decision = limiter.hit("u")
            assert (decision.allowed, decision.source, decision.degraded) == (True, "none", True)
            time.sleep(0.001)
        assert said.hits() == before + 1
        probes = [thread for _, thread in said.commands if thread == "redishacks-linger"]
        assert 1 <= len(probes) <= 2 * (time.monotonic() - began) + 2
    began = time.monotonic()
    eventually(lambda: not limiter.hit("u").degraded)
    assert time.monotonic() - began < 10
    assert limiter.hit("u").source == "redis"
    assert not limiter._chores.breaker


def test_what_is_not_asked_while_the_breaker_is_open(colour: Colour) -> None:
    """Every method decides at once, as `on_error` says, and none of them asks."""
    said = Said()
    limiter = colour.limiter(
        NOWHERE, "api", Limit(10, 600), on_error="deny", on_command=said, deadline=5
    )
    assert not limiter.hit("u").allowed
    asked = said.hits()
    for decision in (
        limiter.hit("u"),
        limiter.peek("u"),
        *limiter.hit_many(["u", "v"]),
        limiter.wait("u", timeout=0),
    ):
        assert (decision.allowed, decision.degraded, decision.source) == (False, True, "none")
        assert (decision.limit, decision.remaining, decision.retry_after) == (10, 0, 1.0)
    assert said.hits() == asked
    assert limiter.counts().degraded == 6


@pytest.mark.parametrize("on_error", ["deny", "local"])
def test_a_look_is_not_counted(colour: Colour, on_error: str) -> None:
    """Only hits are refused, though nobody answers a look."""
    limiter = colour.limiter(NOWHERE, "api", Limit(1, 600), on_error=on_error, deadline=5)
    limiter.hit("u")
    before = limiter.counts().refused
    limiter.peek("u")
    assert limiter.counts().refused == before


def test_a_breaker_for_each_node(cluster: Cluster, prefix: str) -> None:
    """When one node of a cluster is in disgrace, keys of the others are asked for."""
    client = cluster.client()
    limiter = RateLimiter(client, "api", MINUTE, prefix=prefix, deadline=5, on_error="allow")
    keys = [f"u{n}" for n in range(12)]
    assert not any(decision.degraded for decision in limiter.hit_many(keys))
    nodes = {
        key: limiter.transport.where(limiter.layout.question(key, [MINUTE]).hit) for key in keys
    }
    assert len(set(nodes.values())) == 3
    away = nodes[keys[0]]
    limiter._background.start = lambda: None  # type: ignore[method-assign]
    limiter._chores.breaker.open(away, Command(("PING",), (b"x",)))
    expected = [nodes[key] == away for key in keys]
    assert [limiter.hit(key).degraded for key in keys] == expected
    assert [decision.degraded for decision in limiter.hit_many(keys)] == expected
    client.close()


@pytest.mark.slow
def test_a_breaker_closes_on_another_loop(private: Server) -> None:
    """A loop that ended while Redis was away leaves nobody locked out on the next one."""
    limiter = AsyncRateLimiter(private.url, "api", Limit(1000, 600), on_error="allow", deadline=0.1)

    async def hit() -> bool:
        return (await limiter.hit("u")).degraded

    async def recovered() -> bool:
        end = time.monotonic() + 5
        while await hit():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.02)
        return True

    with private.paused():
        assert asyncio.run(hit())
    assert asyncio.run(recovered())


@pytest.mark.parametrize(
    ("on_error", "allowed", "source"),
    [("allow", True, "none"), ("deny", False, "none"), ("local", True, "local")],
)
def test_decisions_without_redis(colour: Colour, on_error: str, allowed: bool, source: str) -> None:
    """They say so, and are counted."""
    limits = (Limit(10, 600), Limit(None, 60), Limit(50, 3600, name="long"))
    limiter = colour.limiter(
        NOWHERE, "api", *limits, on_error=on_error, ban=Ban(5, 60), local_share=1
    )
    for count in range(1, 4):
        decision = limiter.hit("u")
        assert (decision.allowed, decision.source) == (allowed, source)
        assert decision.degraded
        assert [verdict.limit for verdict in decision.each] == [limits[0], limits[2]]
        assert [verdict.allowed for verdict in decision.each] == [allowed, allowed]
        assert limiter.counts() == (0 if allowed else count, 0, count)
        assert decision.charge is None
    assert (decision.retry_after == 0.0) == allowed


# A share of a limit


def hits(local: LocalLimits, asked: Question, share: float, times: int) -> int:
    """Return how many of so many hits pass."""
    return sum(local.decide(asked, share, 1).allowed for _ in range(times))


@pytest.mark.parametrize(("share", "passed"), [(1, 100), (0.25, 25), (1 / 3, 33), (0.1, 10)])
def test_a_share(clock: Clock, share: float, passed: int) -> None:
    """So much of the limit and no more; it comes back after the limit's length."""
    local = LocalLimits()
    asked = question()
    assert hits(local, asked, share, 150) == passed
    refused = local.decide(asked, share, 1)
    assert (refused.limit, refused.remaining, refused.degraded) == (100, 0, True)
    assert refused.retry_after is not None
    assert 60 <= refused.retry_after <= 62
    clock.now += refused.retry_after - 0.001
    assert not local.decide(asked, share, 1).allowed
    clock.now += 0.002
    assert hits(local, asked, share, 150) == passed


def test_a_place_of_a_share_comes_back_at_its_moment(clock: Clock) -> None:
    """A hit counts until the end of its step, and not a moment longer."""
    local, asked = LocalLimits(), question("u", Limit(1, 60))
    clock.now = 1_000.0
    assert local.decide(asked, 1.0, 1).retry_after == 0.0
    assert local.decide(asked, 1.0, 0).retry_after == 60.0
    clock.now = 1_059.999
    assert not local.decide(asked, 1.0, 1).allowed
    clock.now = 1_060.0
    assert local.decide(asked, 1.0, 0).remaining == 1
    assert local.decide(asked, 1.0, 1).allowed


def test_a_share_may_shrink(clock: Clock) -> None:
    """When more processes are seen, what was spent stays spent, and less than nothing is left."""
    local, asked = LocalLimits(), question()
    assert hits(local, asked, 1.0, 50) == 50
    shrunk = local.decide(asked, 0.25, 1)
    assert (shrunk.allowed, shrunk.remaining) == (False, 0)
    assert local.decide(asked, 1.0, 0).remaining == 50


def test_no_window_has_more_than_the_share(clock: Clock) -> None:
    """Whenever the hits come; and a place comes back at most a thirtieth of the length late."""
    local, asked = LocalLimits(), question()
    passed: list[float] = []
    for step in itertools.islice(itertools.cycle([0.0, 0.3, 0.0, 1.7, 0.05, 4.0]), 1_500):
        clock.now += step
        if local.decide(asked, 0.1, 1).allowed:
            passed.append(clock.now)
    for first, eleventh in zip(passed, passed[10:], strict=False):
        assert 60 <= eleventh - first < 60 + 2 + 6
    assert len(passed) > 200


def test_what_is_said_of_a_share(clock: Clock) -> None:
    """What is left of it, when the next place comes back, and when all have."""
    local, asked = LocalLimits(), question()
    first = local.decide(asked, 0.1, 1)
    assert (first.allowed, first.remaining, first.source) == (True, 9, "local")
    clock.now += 30
    second = local.decide(asked, 0.1, 1)
    assert (second.remaining, second.retry_after) == (8, 0.0)
    seen = local.decide(asked, 0.1, 0)
    assert (seen.allowed, seen.remaining) == (True, 8)
    assert 30 <= seen.each[0].next_after <= 32
    assert 60 <= seen.each[0].reset_after <= 62
    assert local.decide(question("v"), 0.1, 0).each[0].reset_after == 0.0
    clock.now += 32
    assert local.decide(asked, 0.1, 0).remaining == 9


def test_less_than_one(clock: Clock) -> None:
    """A share of half a hit is one hit in two lengths."""
    local, asked = LocalLimits(), question("u", Limit(2, 60))
    first = local.decide(asked, 0.25, 1)
    assert (first.allowed, first.remaining) == (True, 0)
    refused = local.decide(asked, 0.25, 1)
    assert not refused.allowed
    assert refused.retry_after is not None
    assert 120 <= refused.retry_after <= 124
    clock.now += 119.9
    assert not local.decide(asked, 0.25, 1).allowed
    clock.now += 4.2
    assert local.decide(asked, 0.25, 1).allowed


def test_costs_of_a_share(clock: Clock) -> None:
    """A heavy hit passes when nothing else counts, and counts for longer in proportion."""
    local = LocalLimits()
    light, heavy = question(), question(cost=30)
    assert local.decide(heavy, 0.1, 1).allowed
    refused = local.decide(light, 0.1, 1)
    assert refused.retry_after is not None
    assert 180 <= refused.retry_after <= 186
    assert refused.remaining == 0
    clock.now += 190
    assert local.decide(light, 0.1, 1).allowed
    assert not local.decide(heavy, 0.1, 1).allowed
    assert local.decide(question(cost=9), 0.1, 1).allowed
    assert not local.decide(light, 0.1, 1).allowed


def test_which_places_a_heavy_hit_waits_for(clock: Clock) -> None:
    """For as many as it needs, and not for those that it need not."""
    local = LocalLimits()
    for _ in range(4):
        assert local.decide(question(cost=2), 0.1, 1).allowed
        clock.now += 10
    waits = [local.decide(question(cost=cost), 0.1, 0).retry_after for cost in (2, 3, 4, 5, 9, 10)]
    ends = [0, 20, 20, 30, 50, 50]
    for wait, end in zip(waits, ends, strict=True):
        assert wait is not None
        assert end <= wait <= end + 2 * (end > 0)


def test_all_limits_or_none(clock: Clock) -> None:
    """What one share refuses is charged to no other; bans have no say."""
    limits = (Limit(2, 60), Limit(10, 60, algorithm="log"))
    local, asked = LocalLimits(), question("u", *limits, ban=Ban(1, 60))
    decisions = [local.decide(asked, 1.0, 1) for _ in range(4)]
    assert [decision.allowed for decision in decisions] == [True, True, False, False]
    assert [verdict.remaining for verdict in decisions[-1].each] == [0, 8]
    assert [verdict.allowed for verdict in decisions[-1].each] == [False, True]
    assert [verdict.remaining for verdict in decisions[0].each] == [1, 9]


def test_many_hits_take_little_room(clock: Clock) -> None:
    """However many there are within a length, some dozens of entries."""
    local, asked = LocalLimits(), question("u", Limit(10**9, 60))
    for _ in range(3_000):
        assert local.decide(asked, 1.0, 1).allowed
        clock.now += 0.1
    assert len(local._spent[asked.keys[0]]) <= 32
    assert 595 <= 10**9 - local.decide(asked, 1.0, 0).each[0].remaining <= 625


def test_keys_that_count_nothing_are_forgotten(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When there are many, and no others."""
    monkeypatch.setattr("redishacks.ratelimit._fallback._MOST_KEYS", 10)
    local = LocalLimits()
    for n in range(9):
        local.decide(question(f"old{n}", Limit(1, 60)), 1.0, 1)
    clock.now += 40
    local.decide(question("young", Limit(1, 60)), 1.0, 1)
    clock.now += 30
    assert len(local._spent) == 10
    local.decide(question("new", Limit(1, 60)), 1.0, 1)
    assert len(local._spent) == 2
    assert not local.decide(question("young", Limit(1, 60)), 1.0, 1).allowed


def test_keys_that_count_are_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """At twice as many the one that came first is forgotten, though it counts."""
    monkeypatch.setattr("redishacks.ratelimit._fallback._MOST_KEYS", 10)
    local = LocalLimits()
    asked = [question(f"u{n}", Limit(1, 60)) for n in range(50)]
    for one in asked[:20]:
        assert local.decide(one, 1.0, 1).allowed
    assert not any(local.decide(one, 1.0, 0).allowed for one in asked[:20])
    for one in asked[20:]:
        assert local.decide(one, 1.0, 1).allowed
        assert len(local._spent) == 20
    assert [local.decide(one, 1.0, 0).allowed for one in asked] == [True] * 30 + [False] * 20


@pytest.mark.parametrize("keys", [2_000, 10_200])
def test_many_keys_are_not_looked_at_each_time(clock: Clock, keys: int) -> None:
    """A million users while Redis is away cost no more each than a few do."""
    local = LocalLimits()
    looks = 0
    live = local._live

    def counted(key: bytes, now: float) -> Any:
        nonlocal looks
        looks += 1
        return live(key, now)

    local._live = counted  # type: ignore[method-assign]
    for n in range(keys):
        local.decide(question(f"u{n}", Limit(5, 3600)), 1.0, 1)
    assert looks < 10 * keys
    assert local.decide(question("u0", Limit(5, 3600)), 1.0, 0).remaining == 4


def ended(child: int) -> tuple[int, int] | None:
    """Return a process that has ended, and its status."""
    found = os.waitpid(child, os.WNOHANG)
    return found if found != (0, 0) else None


def test_a_forked_child_shares_no_lock() -> None:
    """A fork in the middle of another thread's decision does not stop the child for ever."""
    limiter = RateLimiter(NOWHERE, "api", MINUTE, on_error="local")
    limiter.hit("u")
    inside, done = threading.Event(), threading.Event()

    def decide() -> None:
        with limiter._chores.local._lock:
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=decide)
    thread.start()
    inside.wait(30)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if limiter.hit("u").source == "local" else 2
        finally:
            os._exit(status)
    try:
        assert eventually(lambda: ended(child), within=3) == (child, 0)
    except AssertionError:
        os.kill(child, 9)
        os.waitpid(child, 0)
        raise
    finally:
        done.set()
        thread.join()


def test_a_look_that_finds_nobody_takes_nothing(colour: Colour) -> None:
    """The one that finds Redis away is no hit."""
    limiter = colour.limiter(NOWHERE, "api", Limit(50, 600), on_error="local", local_share=0.1)
    assert limiter.peek("u").remaining == 5
    assert limiter.hit("u").remaining == 4


def test_a_look_takes_nothing_of_a_share(colour: Colour) -> None:
    """Whether it is the first that finds Redis away, or comes after others have."""
    limiter = colour.limiter(NOWHERE, "api", Limit(50, 600), on_error="local", local_share=0.1)
    assert [limiter.peek("u").remaining for _ in range(4)] == [5] * 4
    assert limiter.hit("u").remaining == 4


def test_a_process_that_never_saw_redis_takes_its_share(colour: Colour) -> None:
    """`local_share` of the limit, whatever the processes are."""
    for share, passed in ((0.1, 5), (0.5, 25), (1, 50)):
        limiter = colour.limiter(
            NOWHERE, "api", Limit(50, 600), on_error="local", local_share=share
        )
        decisions = [limiter.hit("u") for _ in range(60)]
        assert sum(decision.allowed for decision in decisions) == passed
        assert {decision.source for decision in decisions} == {"local"}
        assert limiter.counts().degraded == 60
        assert limiter.peek("u").remaining == 0


@pytest.mark.parametrize(("others", "passed"), [(0, 24), (1, 12), (2, 8), (23, 1), (47, 1)])
def test_a_share_is_that_of_the_processes_seen(private: Server, others: int, passed: int) -> None:
    """As soon as Redis has told how many there are; below one hit it is one, for longer."""
    limiter = RateLimiter(private.url, "api", Limit(24, 600), on_error="local", deadline=5)
    layout = limiter.layout
    for n in range(others):
        limiter.transport.call(layout.alive(f"other{n}", 3 * HEARTBEAT, lambda _: None), 5)
    limiter._background.send()
    assert limiter._chores.processes == 1 + others
    private.kill()
    decisions = [limiter.hit("u") for _ in range(30)]
    assert sum(decision.allowed for decision in decisions) == passed
    wait = decisions[-1].retry_after
    assert wait is not None
    length = 1200 if others == 47 else 600
    assert 0.99 * length <= wait <= 1.04 * length


def test_no_heartbeat_without_local(valkey: Any, prefix: str) -> None:
    """Who will not count in the process does not tell of it."""
    for on_error in ("raise", "allow", "deny", "local"):
        limiter = RateLimiter(
            valkey.url, on_error, MINUTE, prefix=prefix, deadline=5, on_error=on_error
        )
        limiter.close()
        with valkey.client() as client:
            there = client.exists(f"{prefix}:r1:{{{on_error}}}:processes")
        assert there == (on_error == "local")


# In shadow mode


def test_a_shadow_does_not_wait_beyond_the_timeout(valkey: Any, prefix: str) -> None:
    """A waiter whose turn lies beyond the timeout would be refused: it goes on at once."""
    limit = Limit(1, 2, algorithm="gcra")
    limiter = RateLimiter(valkey.url, "api", limit, prefix=prefix, deadline=5, shadow=True)
    limiter.hit("u")
    began = time.monotonic()
    assert limiter.wait("u", timeout=0).allowed
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("on_error", ["deny", "local"])
def test_a_shadow_never_refuses(on_error: str) -> None:
    """Nor does it when Redis is away: it counts what would have been."""
    limiter = RateLimiter(NOWHERE, "api", Limit(1, 60), on_error=on_error, shadow=True)
    assert all(limiter.hit("u").allowed for _ in range(3))
    assert limiter.counts().shadowed > 0
