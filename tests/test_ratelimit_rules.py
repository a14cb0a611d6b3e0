"""Every algorithm against a plain model, with injected time: bounds, figures, no wrong refusal."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

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

    def question(self, cost: int = 1, key: str = "k") -> Question:
        """Return the question for a hit."""
        return self.layout.question(key, self.limits, cost, self.ban)

    def ask(self, verb: Any, now: int, cost: int = 1, most: int = 1) -> list[int]:
        """Ask at a moment of our choice: now, units, and four figures per limit."""
        command = self.layout.decide(self.question(cost), verb, most)
        return self.transport.call(command._replace(args=(*command.args, str(now))), 5.0)


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
