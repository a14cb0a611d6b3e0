"""Every algorithm against a plain model, with injected time: bounds, figures, no wrong refusal."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from redishacks._command import Command, script
from redishacks._transport import connect
from redishacks.ratelimit import Ban, Limit
from redishacks.ratelimit.commands import Layout, Question

START = 1_800_000_000_000_000
prefixes = (f"rules{n}" for n in itertools.count())


class Server:
    """A limiter whose clock is ours."""

    def __init__(self, url: str, *limits: Limit, ban: Ban | None = None) -> None:
        self.layout = Layout(next(prefixes), "api", "key")
        self.limits = limits
        self.ban = ban
        self.transport = connect(url)
        self.client = redis.Redis.from_url(url)

    def question(self, cost: int = 1, key: str = "k") -> Question:
        """Return the question for a hit."""
        return self.layout.question(key, self.limits, cost, self.ban)

    def ask(self, verb: Any, now: int, cost: int = 1, most: int = 1) -> list[int]:
        """Ask at a moment of our choice: now, units, and four figures per limit.

        States stay: the server, whose own clock stands still in a transaction, would forget them.
        """
        command = self.layout.decide(self.question(cost), verb, most)
        assert command.script is not None
        with self.client.pipeline(transaction=True) as pipe:
            arguments = (*command.keys, *command.args, str(now))
            pipe.eval(command.script.source.decode(), len(command.keys), *arguments)
            for key in command.keys:
                pipe.pexpire(key, 1_000_000_000)
            reply: list[int] = pipe.execute()[0]
        return reply


class Model:
    """What an algorithm promises, kept as a plain list of what was admitted."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.amount = limit.amount or 0
        self.admitted: list[tuple[int, int]] = []
        self.empty = Fraction(0)  # gcra: when no debt is left
        fields = limit.fields
        self.a, self.b = int(fields[2]), int(fields[3])

    def used(self, now: int) -> int | Fraction:
        """Return what counts at a moment."""
        if self.limit.algorithm == "window":
            first = now // self.a - self.b
            return sum(cost for time, cost in self.admitted if time // self.a >= first)
        if self.limit.algorithm == "fixed":
            return sum(cost for time, cost in self.admitted if time // self.a == now // self.a)
        if self.limit.algorithm == "log":
            return sum(cost for time, cost in self.admitted if time + self.a > now)
        return max(Fraction(0), self.empty - now) * self.b / self.a

    def allows(self, now: int, cost: int) -> bool:
        """Return whether a hit is to pass."""
        return self.used(now) + cost <= self.limit.most

    def admit(self, now: int, cost: int) -> None:
        """Take note of a hit; a log counts it from the next tick on."""
        if self.limit.algorithm == "gcra":
            self.empty = max(self.empty, Fraction(now)) + Fraction(cost * self.a, self.b)
        if self.limit.algorithm == "log":
            now = self.tick(now)
        self.admitted.append((now, cost))

    def tick(self, now: int) -> int:
        """Return a moment rounded up to the log's ticks, which begin at its first hit."""
        live = [time for time, _ in self.admitted if time + self.a > now]
        if not live:
            self.base = now
            return now
        return max(live[-1], self.base + -(-(now - self.base) // self.b) * self.b)

    def most_in(self, length: int) -> int:
        """Return the most that was admitted in any time of this length, ends excluded."""
        times = [time for time, _ in self.admitted]
        return max(
            (
                sum(cost for time, cost in self.admitted if begin <= time < begin + length)
                for begin in times
            ),
            default=0,
        )


LIMITS = st.one_of(
    st.builds(
        Limit,
        st.integers(1, 12),
        st.sampled_from([0.001, 0.05, 1, 7, 60]),
        precision=st.sampled_from([None]),
    ),
    st.builds(
        Limit, st.integers(1, 12), st.sampled_from([0.05, 1, 60]), algorithm=st.just("fixed")
    ),
    st.builds(Limit, st.integers(1, 12), st.sampled_from([0.05, 1, 60]), algorithm=st.just("log")),
    st.builds(
        Limit,
        st.integers(1, 12),
        st.sampled_from([0.05, 1, 60]),
        algorithm=st.just("gcra"),
        strict=st.booleans(),
    ),
    st.builds(
        Limit,
        st.integers(5, 12),
        st.sampled_from([0.05, 1, 60]),
        algorithm=st.just("gcra"),
        burst=st.integers(1, 5),
        strict=st.booleans(),
    ),
)
#: Thousandths of the limit's length between two hits, and costs.
TRACES = st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 4)), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(limit=LIMITS, trace=TRACES)
def test_a_trace_agrees_with_the_model(redishacks_valkey: Any, limit: Limit, trace: Any) -> None:
    """Each decision, what remains and when to come again are those of the model."""
    server, model = Server(redishacks_valkey.url, limit), Model(limit)
    now = START
    for step, cost in trace:
        now += step * limit.micros // 1000
        cost = min(cost, limit.most)
        expected = model.allows(now, cost)
        _, units, remaining, retry, following, reset = server.ask("hit", now, cost)
        assert (units == 1) == expected == (retry == 0)
        if expected:
            model.admit(now, cost)
        else:
            assert model.allows(now + retry, cost), "it is not allowed after retry_after"
            assert not model.allows(now + retry - 1, cost), "it would have been allowed earlier"
            assert server.ask("peek", now + retry - 1, cost)[3] > 0
            assert server.ask("peek", now + retry, cost)[3] == 0
        used = model.used(now)
        assert remaining == max(0, math.floor(limit.most - used))
        if used:
            assert model.used(now + reset) == 0
            assert model.used(now + reset - 1) > 0
            before = math.floor(limit.most - model.used(now + following - 1))
            assert math.floor(limit.most - model.used(now + following)) > remaining
            assert before <= remaining
        else:
            assert following == reset == 0
    bound = {
        "window": limit.most,
        "log": limit.most,
        "fixed": 2 * limit.most,
        "gcra": limit.amount if limit.strict else limit.most + (limit.amount or 0),
    }[limit.algorithm]
    assert bound is not None
    assert model.most_in(limit.micros) <= bound


@settings(max_examples=150, deadline=None)
@given(
    limits=st.lists(LIMITS, min_size=2, max_size=3, unique_by=lambda limit: limit.shape),
    trace=TRACES,
)
def test_several_limits_charge_all_or_none(
    redishacks_valkey: Any, limits: list[Limit], trace: Any
) -> None:
    """Each of them keeps to its own model, of what all have allowed."""
    server, models = Server(redishacks_valkey.url, *limits), [Model(limit) for limit in limits]
    now = START
    for step, cost in trace:
        now += step * limits[0].micros // 1000
        cost = min(cost, *(limit.most for limit in limits))
        expected = all(model.allows(now, cost) for model in models)
        _, units, *figures = server.ask("hit", now, cost)
        assert (units == 1) == expected
        for model, remaining, retry in zip(models, figures[::4], figures[1::4], strict=True):
            assert expected or (retry == 0) == model.allows(now, cost)
            if expected:
                model.admit(now, cost)
            assert remaining == max(0, math.floor(model.limit.most - model.used(now)))


WINDOWS = st.lists(
    st.tuples(
        st.sampled_from([1, 5, 20, 70_000, 10**10]),
        st.sampled_from([60, 600, 3600]),
        st.sampled_from([None, 0.1]),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda window: window[1:],
)
#: What happens, thousandths of a minute later, with a cost, units at most, and limits times this.
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["hit", "hit", "hit", "refund", "persist"]),
        st.sampled_from([-500, 0, 0, 1, 30, 100, 900, 1_100, 60_000]),
        st.integers(1, 6),
        st.integers(1, 9),
        st.sampled_from([1, 1, 1, 10, 4_000]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(windows=WINDOWS, events=EVENTS)
def test_the_short_way_is_the_long_one(redishacks_valkey: Any, windows: Any, events: Any) -> None:
    """Hits of windows have a script of their own: same replies, same states, same expiries."""
    layouts = [Layout(next(prefixes), "api", "key") for _ in range(2)]
    transport = connect(redishacks_valkey.url)
    now = charged = START
    for what, step, cost, most, factor in events:
        now += step * 60_000
        limits = [
            Limit(amount * factor, per, precision=precision and precision * per)
            for amount, per, precision in windows
        ]
        cost = min(cost, *(limit.most for limit in limits))
        seen = []
        for short, layout in zip((True, False), layouts, strict=True):
            question = layout.question("k", limits, cost)
            if what == "refund":
                command = layout.refund(question, question.costs, [charged] * len(limits))
            else:
                command = layout.decide(question, "hit", most)
                assert command.script == script("ratelimit_window")
                if not short:
                    args = ("hit", str(most), *itertools.chain(*question.fields))
                    command = command._replace(args=args, script=script("ratelimit_decide"))
            command = command._replace(args=(*command.args, str(now)))
            words = [(word, key) for word in ("GET", "PTTL") for key in question.keys]
            if what == "persist":
                words = [("PERSIST", key) for key in question.keys] + words
            others: list[Command[Any]] = [Command((word, key), (key,)) for word, key in words]
            at = len(others) - 2 * len(limits)
            outcomes = transport.run([*others[:at], command, *others[at:]], 5.0)
            seen.append([outcome.result() for outcome in outcomes])
        places = len(limits)
        if any(-2 < left < 500 and left != -1 for left in seen[0][-places:] + seen[1][-places:]):
            return  # the server's own clock ends a state that has so little left
        assert seen[0][:-places] == seen[1][:-places]
        assert seen[0][-places:] == pytest.approx(seen[1][-places:], abs=2_000)
        if what != "refund" and seen[0][-2 * places - 1][1]:
            charged = now


# The edge of a window, clocks that go back, large amounts


@pytest.mark.parametrize("algorithm", ["window", "log", "gcra"])
def test_a_full_limit_before_an_edge_and_a_drip_after_it(
    redishacks_valkey: Any, algorithm: str
) -> None:
    """The adversary of two-bucket windows: not one more than the limit passes in any window."""
    limit = Limit(20, 60, algorithm=algorithm, strict=algorithm == "gcra")
    server = Server(redishacks_valkey.url, limit)
    edge = START - START % limit.micros + limit.micros
    passed: list[int] = []
    moments = [edge - 1] * 25 + [edge + i * limit.micros // 97 for i in range(200)]
    for now in moments:
        passed += [now] * server.ask("hit", now)[1]
    assert len(passed) > 2 * limit.most
    for begin in passed:
        assert sum(begin <= time < begin + limit.micros for time in passed) <= 20


@pytest.mark.parametrize("algorithm", ["window", "fixed", "gcra", "log"])
@pytest.mark.parametrize("back", [1, 3_600_000_000, 86_400_000_000])
def test_a_clock_that_goes_back_locks_nobody_out(
    redishacks_valkey: Any, algorithm: str, back: int
) -> None:
    """After a step of the server's clock what was used counts from then on: for one length."""
    limit = Limit(5, 60, algorithm=algorithm)
    server = Server(redishacks_valkey.url, limit)
    for _ in range(5):
        assert server.ask("hit", START)[1] == 1
    now = START - back
    _, units, remaining, retry, following, reset = server.ask("hit", now)
    assert (units, remaining) == (0, 0), "a step gives nothing away"
    slack = limit.bucket_micros + 2_000
    assert 0 < retry <= following <= reset <= limit.micros + slack
    assert server.ask("hit", now + retry)[1] == 1
    assert server.ask("peek", now + retry + limit.micros + slack)[2] == 5


def test_a_ban_does_not_outlast_a_clock_that_goes_back(redishacks_valkey: Any) -> None:
    """A ban lasts no longer than the longest one, whatever the clock does."""
    server = Server(redishacks_valkey.url, Limit(1, 60), ban=Ban(2, 60, lasting=30, longest=40))
    for _ in range(3):
        server.ask("hit", START)
    assert server.ask("peek", START)[7] == 30_000_000
    assert server.ask("peek", START - 86_400_000_000)[7] == 40_000_000


def test_bans_grow(redishacks_valkey: Any) -> None:
    """Each ban lasts twice as long as the one before, up to the longest."""
    ban = Ban(2, 600, lasting=10, longest=35)
    server = Server(redishacks_valkey.url, Limit(1, 86_400), ban=ban)
    now = START
    assert server.ask("hit", now)[1] == 1
    lasted = []
    for _ in range(4):
        for _ in range(2):
            assert server.ask("hit", now)[1] == 0
        retry = server.ask("peek", now)[7]
        lasted.append(retry / 1e6)
        assert server.ask("hit", now + retry - 1)[7] == 1, "a hit while banned is none"
        now += retry
    assert lasted == [10, 20, 35, 35]


def test_a_try_is_no_refusal(redishacks_valkey: Any) -> None:
    """Who will come again is not on the way to a ban."""
    server = Server(redishacks_valkey.url, Limit(1, 60), ban=Ban(2, 60))
    assert server.ask("try", START)[1] == 1
    for _ in range(5):
        assert server.ask("try", START)[1] == 0
    assert server.ask("peek", START)[7] == 0


@pytest.mark.parametrize(
    ("amount", "per", "options"),
    [
        (10 * 2**30, 3600, {}),
        (40_000_001, 60, {}),
        (10**9, 60, {"strict": True}),
        (10**12, 86_400, {}),
        (999_999_937, 366 * 86_400, {}),
        (7, 366 * 86_400, {"burst": 3}),
    ],
)
def test_a_gcra_keeps_its_pace_whatever_the_amount(
    redishacks_valkey: Any, amount: int, per: float, options: Any
) -> None:
    """The whole limit comes back in its length, to a thousandth, and never sooner."""
    limit = Limit(amount, per, algorithm="gcra", **options)
    server = Server(redishacks_valkey.url, limit)
    question = server.question()
    _, _, a, b, *_ = question.fields[0]
    units = amount - limit.most + 1 if limit.strict else amount
    exact = Fraction(limit.micros, units)
    assert exact <= Fraction(int(a), int(b)) <= exact * Fraction(1001, 1000)
    _, charged, remaining, _, _, reset = server.ask("hit", START, cost=limit.most)
    assert (charged, remaining) == (1, 0)
    full = limit.micros * limit.most / units
    assert full <= reset <= full * 1.001 + 1
    assert server.ask("peek", START + reset)[2] == limit.most


@pytest.mark.parametrize("algorithm", ["window", "fixed", "gcra", "log"])
def test_what_is_settled_beyond_all_measure(redishacks_valkey: Any, algorithm: str) -> None:
    """A charge without bounds uses the limit up, and breaks nothing."""
    limit = Limit(10, 60, algorithm=algorithm)
    server = Server(redishacks_valkey.url, limit)
    for huge in (2**53 - 1, 2**53 - 1):
        command = server.layout.charge(server.question(), huge)
        args = (*command.args, str(START))
        reply = server.transport.call(command._replace(args=args), 5.0)
        assert reply[2] == 0
    with redishacks_valkey.client() as watch:
        (key,) = server.question().keys
        assert watch.strlen(key) <= 250
        assert watch.pttl(key) > 0
    assert server.ask("hit", START)[1] == 0
    if algorithm != "gcra":  # whose debt is paid by and by
        assert server.ask("hit", START + 2 * limit.micros)[1] == 1


@settings(max_examples=100, deadline=None)
@given(
    trace=st.lists(
        st.tuples(st.integers(0, 400), st.integers(1, 4), st.integers(0, 5)), max_size=40
    )
)
def test_refunds_in_any_order_mint_nothing(redishacks_valkey: Any, trace: Any) -> None:
    """Of a strict gcra, no window has more hits than the limit that were not given back."""
    limit = Limit(8, 60, algorithm="gcra", strict=True)
    server = Server(redishacks_valkey.url, limit)
    kept: list[tuple[int, int]] = []
    now = START
    for step, cost, back in trace:
        now += step * limit.micros // 1000
        if back < len(kept) and back < 3:  # give back one of the first, whatever came after it
            charged, taken = kept.pop(back)
            command = server.layout.refund(server.question(taken), [taken], [charged])
            server.transport.call(command._replace(args=(*command.args, str(now))), 5.0)
        elif server.ask("hit", now, cost)[1]:
            kept.append((now, cost))
        for begin, _ in kept:
            assert (
                sum(cost for time, cost in kept if begin <= time < begin + limit.micros)
                <= limit.most * 2
            )
            assert sum(cost for time, cost in kept if begin <= time < begin + limit.micros) <= 8
