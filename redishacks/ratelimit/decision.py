"""What a rate limiter answers: a `Decision`, with a `Verdict` of each limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redishacks.errors import RedisHacksError, UsageError
from redishacks.ratelimit.commands import Question
from redishacks.ratelimit.limit import Ban, Limit, Places

#: The largest integer of a structured field.
_LARGEST = 10**15 - 1


class Verdict(NamedTuple):
    """What one limit says; times in seconds from the moment of the decision."""

    limit: Limit | Ban | Places
    #: The part of the key it counts, of a mapping of keys.
    part: str | None
    allowed: bool
    remaining: int
    #: Until this limit would allow it, if nobody else hits: 0.0 now, None never.
    retry_after: float | None
    #: Until a place comes back; 0.0 when all are free.
    next_after: float
    #: Until all have come back.
    reset_after: float


class Decision(NamedTuple):
    """Whether to go on, and the figures of the limit that decides; true when allowed.

    Exact when `source` is "redis". Otherwise nobody was asked: "lease" spent a token taken before,
    "deny" knows of a refusal a moment ago, "local" stands in for a Redis that is away, "list" is on
    an allow or deny list, "none" needed no question (no limit, a limit of 0). Tokens that this
    process has leased count as left; `each` has Redis's figures of the moment they were taken.
    """

    allowed: bool
    #: Amount, and what is left of it; None: unlimited.
    limit: int | None
    remaining: int | None
    #: Seconds until the same hit would be allowed if nobody else hits: 0.0 now, None never.
    retry_after: float | None
    #: Seconds until nothing counts any more.
    reset_after: float
    each: tuple[Verdict, ...] = ()
    source: str = "redis"
    #: Redis was away: decided without it.
    degraded: bool = False
    #: What `refund` needs; lost when pickled.
    charge: Charge | None = None

    def __bool__(self) -> bool:
        return self.allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return Decision, tuple(self[:-1])

    @property
    def tightest(self) -> Verdict | None:
        """The limit that decides: the refusing one with the longest wait, else the fewest left."""
        return tightest(self.each)

    @property
    def refused_by(self) -> tuple[Verdict, ...]:
        """The limits that refuse; in shadow mode the decision is allowed all the same."""
        return tuple(verdict for verdict in self.each if not verdict.allowed)

    @property
    def policies(self) -> dict[str, Verdict]:
        """The limits by the names that HTTP fields give them; a ban is not told."""
        named: dict[str, Verdict] = {}
        for verdict in self.each:
            limit = verdict.limit
            if not isinstance(limit, Ban):
                named[unique(limit.name or str(limit), named)] = verdict
        return named

    def headers(self, *, legacy: bool = False) -> dict[str, str]:
        """Return HTTP fields: `RateLimit-Policy`, `RateLimit` and, when refused, `Retry-After`.

        Structured fields of integers, seconds rounded up, as
        draft-ietf-httpapi-ratelimit-headers-10 wants them; with `legacy` also `X-RateLimit-Limit`,
        `-Remaining` and `-Reset`.
        """
        policies, states = [], []
        tight = self.tightest
        # Tokens of a lease that are not spent yet; `each` says what Redis had left beside them.
        own = (self.remaining or 0) - tight.remaining if tight and self.source == "lease" else 0
        for name, verdict in self.policies.items():
            limit = verdict.limit
            quota = min(limit.amount or 0, _LARGEST)
            if isinstance(limit, Limit):
                over = f"w={max(1, math.ceil(limit.micros / 1e6))}"
            else:
                over = 'qu="concurrent-requests"'
            policies.append(f'"{name}";q={quota};{over}')
            # A refusal has one time to come again, and other limits must not name a later one.
            wait = verdict.next_after if self.allowed else verdict.retry_after
            told = wait is not None and (self.allowed or not verdict.allowed)
            after = f";t={math.ceil(wait or 0.0)}" if told else ""
            left = max(0, min(verdict.remaining + own, quota))
            states.append(f'"{name}";r={left}{after}')
        fields = {}
        if policies:
            fields["RateLimit-Policy"] = ", ".join(policies)
            fields["RateLimit"] = ", ".join(states)
        if legacy and self.limit is not None:
            fields["X-RateLimit-Limit"] = str(self.limit)
            fields["X-RateLimit-Remaining"] = str(min(self.remaining or 0, self.limit))
            fields["X-RateLimit-Reset"] = str(math.ceil(self.reset_after))
        if not self.allowed and self.retry_after is not None:
            fields["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return fields


class Charge:
    """What a decision took, and how much of it was given back."""

    __slots__ = ("_back", "limiter", "question", "reply")

    def __init__(self, limiter: object, question: Question, reply: Sequence[int]) -> None:
        self.limiter = limiter
        self.question = question
        self.reply = reply
        #: Given back so far; taken out by the one who gives more back, which no two can do.
        self._back = [0]

    def take(self, units: int | None) -> list[int]:
        """Return how much to give back to each limit, at most what it took; None: all the rest."""
        costs = self.question.costs
        if units is not None and (
            isinstance(units, bool) or not isinstance(units, int) or units < 1
        ):
            raise UsageError(f"refund takes a positive int, not {units!r}")
        try:
            before = self._back.pop()
        except IndexError:
            return [0 for _ in costs]
        after = max(costs) if units is None else min(max(costs), before + units)
        self._back.append(after)
        return [min(cost, after) - min(cost, before) for cost in costs]

    def put_back(self, units: int) -> None:
        """Take note that so much was not given back after all."""
        while True:
            try:
                self._back.append(max(0, self._back.pop() - units))
                return
            except IndexError:  # another thread has it for a moment
                continue

    def moments(self) -> list[int]:
        """Return when each limit was charged, in microseconds."""
        return [self.reply[0]] * len(self.question.fields)

    def ends(self) -> list[int]:
        """Return when nothing that each limit had counted by then counts any more."""
        return [self.reply[0] + self.reply[5 + 4 * i] for i in range(len(self.question.fields))]


class RateLimitedError(RedisHacksError):
    """A limit refused; `decision` says which one, and when to come again."""

    def __init__(self, decision: Decision, name: str = "", key: object = None) -> None:
        self.decision = decision
        self.name = name
        self.key = key
        tight = decision.tightest
        limit = f" of {tight.limit}" if tight is not None else ""
        verb = "is used up" if tight is not None else "lets nobody pass"
        wait = decision.retry_after
        again = "" if wait is None else f"; again in {wait:.3f} s"
        shown = "" if key is None else f" for {key!r}"
        super().__init__(f"rate limit {name}{limit}{shown} {verb}{again}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RateLimitedError, (self.decision, self.name, self.key)


def decided(
    allowed: bool,
    each: tuple[Verdict, ...],
    source: str = "redis",
    degraded: bool = False,
    charge: Charge | None = None,
) -> Decision:
    """Put a decision together: its figures are those of the limit that decides."""
    if not each:
        return Decision(allowed, None, None, 0.0, 0.0, each, source, degraded, charge)
    tight = each[0] if len(each) == 1 else tightest(each)
    assert tight is not None
    return Decision(
        allowed,
        tight.limit.amount,
        tight.remaining,
        0.0 if allowed else tight.retry_after,
        tight.reset_after if len(each) == 1 else max([verdict.reset_after for verdict in each]),
        each,
        source,
        degraded,
        charge,
    )


def with_more(decision: Decision, units: int) -> Decision:
    """Return a decision with so much more left: tokens that are charged, and yet to be spent."""
    return decision._replace(
        remaining=(decision.remaining or 0) + units,
        each=tuple(
            verdict
            if isinstance(verdict.limit, Ban)
            else verdict._replace(remaining=verdict.remaining + units)
            for verdict in decision.each
        ),
    )


def aged(decision: Decision, passed: float) -> Decision:
    """Return a decision as it stands some seconds later, when nobody has hit meanwhile."""

    def left(wait: float | None) -> float | None:
        return None if wait is None else max(0.0, wait - passed)

    return decision._replace(
        retry_after=left(decision.retry_after),
        reset_after=max(0.0, decision.reset_after - passed),
        each=tuple(
            verdict._replace(
                retry_after=left(verdict.retry_after),
                next_after=max(0.0, verdict.next_after - passed),
                reset_after=max(0.0, verdict.reset_after - passed),
            )
            for verdict in decision.each
        ),
    )


def tightest(each: Sequence[Verdict]) -> Verdict | None:
    """Return the verdict that decides, None without any."""

    def urgency(verdict: Verdict) -> tuple[bool, float, float]:
        wait = math.inf if verdict.retry_after is None else verdict.retry_after
        return verdict.allowed, -wait, verdict.remaining

    return min(each, key=urgency, default=None)


def unique(name: str, taken: Mapping[str, object]) -> str:
    """Return the name, with a number if it is taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found
