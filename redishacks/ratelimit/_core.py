"""What sync and async rate limiters share: questions to ask, and what becomes of the answers."""

from __future__ import annotations

import itertools
import logging
import math
import time
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from redishacks import _keys
from redishacks._command import Command, Outcome, Sleep, Steps, ask, ask_all
from redishacks._drive import AsyncTransport, Transport
from redishacks._linger import TaskSender, ThreadSender
from redishacks._transport import Hook
from redishacks._units import Seconds, seconds
from redishacks.errors import MaybeAppliedError, UnavailableError, UsageError
from redishacks.ratelimit._chores import Chores
from redishacks.ratelimit._fallback import LocalLimits
from redishacks.ratelimit._lists import KeyList
from redishacks.ratelimit._recall import SKEW, Denied, Lease, Memory, reached
from redishacks.ratelimit.commands import MOST_REMEMBERED, Key, Layout, Question
from redishacks.ratelimit.decision import Charge, Decision, Verdict, decided
from redishacks.ratelimit.limit import Ban, Limit

#: What may be limited: one key, or one for each part.
Keys = Key | Mapping[str, Key]
Cost = int | Mapping[str, int]
Limits = Limit | Sequence[Limit] | None
Near = tuple[float, Callable[[Keys, Decision], object]]

T = TypeVar("T", bound=Transport | AsyncTransport)
S = TypeVar("S", bound=ThreadSender[Chores] | TaskSender[Chores])

#: Seconds between two rounds of chores.
_PERIOD = 1.0
#: Questions that are kept ready.
_READY = 2_000
#: Lease as much as the last one has shown to be needed.
_AUTO = 0
#: Keys of these types may be remembered by.
_SIMPLE = {str, int, bytes}
_FOR_EVER = 366 * 86_400.0
AWAY = (UnavailableError, MaybeAppliedError)

_log = logging.getLogger("redishacks")


class Counts(NamedTuple):
    """What a limiter has decided in this process."""

    #: Refused, those from memory included.
    refused: int
    #: Would have been refused, but for shadow mode.
    shadowed: int
    #: Decided without Redis, because it did not answer.
    degraded: int


class Limiter(ABC, Generic[T, S]):
    """What both colours share: options, questions, and what becomes of the answers."""

    def __init__(
        self,
        client: Any,
        name: str,
        *limits: Limit,
        prefix: str = "rh",
        tag: str = "key",
        deadline: Seconds = 0.05,
        on_error: str = "raise",
        local_share: float = 0.1,
        lease: int | Literal["auto"] | None = None,
        deny_cache: bool = True,
        deny_max: Seconds = 1.0,
        shadow: bool = False,
        near: Near | None = None,
        allow: Iterable[Key] = (),
        deny: Iterable[Key] = (),
        ban: Ban | None = None,
        on_command: Hook | None = None,
    ) -> None:
        self.name = name
        self.limits = _limits(limits)
        self.layout = Layout(prefix, name, tag)
        self.deadline = seconds(deadline, "deadline")
        if on_error not in ("raise", "allow", "deny", "local"):
            raise UsageError(f"on_error is raise, allow, deny or local, not {on_error!r}")
        if not isinstance(local_share, int | float) or not 0 < local_share <= 1:
            raise UsageError(f"local_share is above 0 and at most 1, not {local_share!r}")
        self._on_error = on_error
        self._local_share = local_share
        self._local = LocalLimits()
        self._deny_max = seconds(deny_max, "deny_max") if deny_cache else None
        self._lease = _size(lease)
        self._shadow = shadow
        self._near = _near(near)
        self._allow = KeyList(allow, "allow")
        self._deny = KeyList(deny, "deny")
        self._listed = bool(self._allow or self._deny)
        self._ban = ban
        self._ready: dict[object, Question] = {}
        self._memory = Memory()
        self._chores = Chores(self.layout, self._memory, self.limits, heartbeat=on_error == "local")
        self._refused, self._shadowed, self._degraded = (itertools.count() for _ in range(3))
        self.transport: T = self._connect(client, on_command)
        self._background: S = self._sender(
            self._chores, linger=_PERIOD, deadline=self.deadline, overflow="raise"
        )
        weakref.finalize(self, self._background.abandon)

    @abstractmethod
    def _connect(self, client: Any, on_command: Hook | None) -> T:
        """Return the transport of this colour."""

    @abstractmethod
    def _sender(self, chores: Chores, **options: Any) -> S:
        """Return what does the chores."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {', '.join(map(str, self.limits))}>"

    def counts(self) -> Counts:
        """Return how often this process refused, would have, or decided without Redis."""
        refused, shadowed, degraded = map(reached, (self._refused, self._shadowed, self._degraded))
        return Counts(refused + self._memory.repeated(), shadowed, degraded)

    # Before a question

    def recall(self, key: Keys, cost: Cost, limits: Limits) -> Decision | None:
        """Answer from memory, or not at all."""
        if type(key) not in _SIMPLE:
            return None
        entry = self._memory.entries.get(key)
        if entry is None or limits is not None or type(cost) is not int:
            return None
        return entry.answer(cost)

    def ask(self, key: Keys, cost: Cost, limits: Limits) -> Question | Decision:
        """Return the question to ask, or the decision when there is nothing to ask."""
        if self._listed and (listed := self._by_list(key)) is not None:
            return listed
        usual = limits is None and cost == 1 and type(key) in _SIMPLE
        question = self._ready.get(key) if usual else None
        if question is None:
            chosen = self.limits if limits is None else _limits(limits)
            question = self.layout.question(key, chosen, cost, self._ban)
            if usual:
                if len(self._ready) >= _READY:
                    self._ready.clear()
                self._ready[key] = question
        if question.idle:
            return _unasked(question)
        if self._chores.breaker:
            try:
                self._chores.breaker.check(self._where(question))
            except UnavailableError as error:
                return self.without(question, error)
        if not self._background.somewhere():
            self._background.start()
        return question

    def command(
        self, key: Keys, cost: Cost, limits: Limits, question: Question
    ) -> Command[list[int]]:
        """Return what to say for a hit, which may take tokens in advance."""
        if self._lease is None or not self._leasable(key, cost, limits, question):
            return question.hit
        size = self._lease
        if size == _AUTO:
            entry = self._memory.entries.get(key)
            size = entry.next_size() if isinstance(entry, Lease) else 1
        return question.hit if size == 1 else self.layout.decide(question, "hit", size)

    def _leasable(self, key: Keys, cost: Cost, limits: Limits, question: Question) -> bool:
        return (
            limits is None
            and cost == 1
            and type(key) in _SIMPLE
            and all(fields[0] in "wfb" for fields in question.fields)
        )

    def _where(self, question: Question) -> str:
        return str(self.transport.where(question.hit))

    def _by_list(self, key: Keys) -> Decision | None:
        values = key.values() if isinstance(key, Mapping) else (key,)
        raws = [_keys.id_bytes(value, "key") for value in values]
        if any(raw in self._deny for raw in raws):
            next(self._refused)
            return Decision(False, None, None, None, 0.0, source="list")
        if any(raw in self._allow for raw in raws):
            return Decision(True, None, None, 0.0, 0.0, source="list")
        return None

    # After it

    def answered(
        self,
        key: Keys,
        cost: Cost,
        limits: Limits,
        question: Question,
        reply: list[int],
        since: float,
    ) -> Decision:
        """Turn a reply into a decision."""
        each = verdicts(question, reply)
        if reply[1]:
            decision = decided(True, each, charge=Charge(self, question, reply))
            if self._lease is not None and self._leasable(key, cost, limits, question):
                left = min(_bucket_left(fields, reply[0]) for fields in question.fields)
                # Since the question was sent: that was before the server looked at its clock.
                until = since + left / 1e6 * SKEW
                self._memory.put(key, Lease(question, decision, reply[1], until))
        else:
            decision = decided(False, each)
            if self._shadow:
                next(self._shadowed)
                decision = decision._replace(allowed=True)
            else:
                next(self._refused)
                if self._deny_max is not None and limits is None and type(key) in _SIMPLE:
                    units = cost if isinstance(cost, int) else 1
                    denied = Denied(question, decision, units, since, self._deny_max)
                    self._memory.put(key, denied)
                self._chores.refused.append(question)
        if self._near is not None:
            self._approach(key, decision)
        return decision

    def _approach(self, key: Keys, decision: Decision) -> None:
        """Call the near hook when a limit is nearly used up."""
        assert self._near is not None
        fraction, callback = self._near
        for limit, _, _, remaining, *_ in decision.each:
            if isinstance(limit, Limit) and limit.most - remaining >= fraction * limit.most:
                try:
                    callback(key, decision)
                except Exception:
                    _log.exception("the near hook of a rate limiter failed")
                return

    def without(self, question: Question, error: Exception, units: int = 1) -> Decision:
        """Decide without Redis, as `on_error` says."""
        self._chores.breaker.open(self._where(question), self.layout.decide(question, "peek"))
        if self._on_error == "raise":
            raise error
        next(self._degraded)
        if self._on_error == "local":
            share = 1 / self._chores.processes if self._chores.processes else self._local_share
            return self._local.decide(question, share, units)
        allowed = self._on_error == "allow"
        each = tuple(
            Verdict(limit, part, allowed, 0, 0.0 if allowed else 1.0, 0.0, 0.0)
            for limit, part in question.rules
            if isinstance(limit, Limit)
        )
        return decided(allowed, each, "none", degraded=True)

    # Conversations

    def refund_steps(self, decision: Decision, units: int | None) -> Steps[int]:
        charge = decision.charge
        if charge is None or charge.limiter is not self:
            raise UsageError(
                "only a decision that this limiter allowed, in this process, can be refunded"
            )
        costs = charge.take(units)
        if any(costs):
            yield from ask(self.layout.refund(charge.question, costs, charge.moments()))
            self._memory.forget(charge.question)
        return max(costs)

    def reset_steps(self, key: Keys, limits: Limits) -> Steps[None]:
        chosen = self.limits if limits is None else _limits(limits)
        question = self.layout.question(key, chosen, 1, self._ban)
        self._memory.forget(question, leases=True)
        if question.keys:
            yield from ask(self.layout.forget(question))
        self._memory.forget(question, leases=True)

    def top_steps(self, count: int) -> Steps[list[tuple[str, int]]]:
        """Read the keys refused most in the last 24 hours."""
        hour = int(time.time() // 3600)
        hours = [self.layout.top(hour - ago, MOST_REMEMBERED) for ago in range(24)]
        refused: Counter[str] = Counter()
        for outcome in (yield from ask_all(hours)):
            refused.update(dict(outcome.result()))
        return refused.most_common(count)

    def many_steps(self, keys: Sequence[Keys], cost: Cost, limits: Limits) -> Steps[list[Decision]]:
        decisions: list[Decision | None] = []
        asked: list[tuple[int, Question]] = []
        for at, key in enumerate(keys):
            found: Decision | Question | None = self.recall(key, cost, limits)
            if found is None:
                found = self.ask(key, cost, limits)
            if isinstance(found, Decision):
                decisions.append(found)
            else:
                decisions.append(None)
                asked.append((at, found))
        since = monotonic()
        outcomes: list[Outcome[list[int]]] = []
        if asked:
            outcomes = yield from ask_all([question.hit for _, question in asked])
        for (at, question), outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome.error, AWAY):
                decisions[at] = self.without(question, outcome.error)
            else:
                reply = outcome.result()
                decisions[at] = self.answered(keys[at], cost, limits, question, reply, since)
        return cast("list[Decision]", decisions)

    def wait_steps(
        self, key: Keys, cost: Cost, timeout: Seconds | None, limits: Limits
    ) -> Steps[Decision]:
        """Hit when it is this one's turn, or not at all when that is beyond the timeout."""
        patience = _FOR_EVER if timeout is None else _patience(timeout)
        end = monotonic() + patience
        question = self.ask(key, cost, limits)
        while not isinstance(question, Decision):
            since = monotonic()
            turn = _has_turns(question)
            left = max(0.0, end - since)
            command = (
                self.layout.decide(question, "turn", int(left * 1e6)) if turn else question.hit
            )
            try:
                reply = yield from ask(command)
            except AWAY as error:
                decision = self.without(question, error)
            else:
                decision = self.answered(key, cost, limits, question, reply, since)
                if turn and decision.allowed:
                    return (yield from self._own_turn(question, reply, decision))
            if decision.allowed or decision.retry_after is None:
                return decision
            if monotonic() + decision.retry_after > end:
                return decision
            yield Sleep(decision.retry_after)
        return question

    def _own_turn(
        self, question: Question, reply: list[int], decision: Decision
    ) -> Steps[Decision]:
        """Sleep until a turn that is taken; one that is not waited for is given back."""
        due = reply[3]
        try:
            if due:
                yield Sleep(due / 1e6)
        except BaseException:
            assert decision.charge is not None
            costs, moments = decision.charge.take(None), decision.charge.moments()
            yield from ask(self.layout.refund(question, costs, moments, "cancel"))
            raise
        return decision

    def peek_steps(self, key: Keys, cost: Cost, limits: Limits) -> Steps[Decision]:
        """Say what a hit would say."""
        question = self.ask(key, cost, limits)
        if isinstance(question, Decision):
            return question
        try:
            reply = yield from ask(self.layout.decide(question, "peek"))
        except AWAY as error:
            return self.without(question, error, units=0)
        each = verdicts(question, reply)
        return decided(all(verdict.allowed for verdict in each), each)

    def charge_steps(self, key: Keys, cost: int, limits: Limits) -> Steps[None]:
        """Charge a cost, whatever room there is."""
        question = self.layout.question(key, self.limits if limits is None else _limits(limits), 1)
        if question.keys and not question.idle:
            yield from ask(self.layout.charge(question, cost))


AnyLimiter = Limiter[Any, Any]


# Values


def _limits(given: Limit | Sequence[Limit]) -> tuple[Limit, ...]:
    limits = (given,) if isinstance(given, Limit) else tuple(given)
    strange = [limit for limit in limits if not isinstance(limit, Limit)]
    if strange or not limits:
        raise UsageError(f"a rate limiter takes one Limit or more, not {strange or limits!r}")
    return limits


def _near(near: Near | None) -> Near | None:
    if near is not None and not (
        isinstance(near, tuple)
        and len(near) == 2
        and isinstance(near[0], int | float)
        and 0 < near[0] <= 1
        and callable(near[1])
    ):
        raise UsageError(f"near is (fraction, callback), such as (0.8, warn), not {near!r}")
    return near


def _patience(timeout: Seconds) -> float:
    return 0.0 if timeout == 0 else seconds(timeout, "timeout")


def _bucket_left(fields: Sequence[str], now: int) -> float:
    """Return µs until the sub-bucket or the window ends in which a hit was charged."""
    letter, _, a, b, *_ = fields
    if letter == "b":
        return math.inf
    start = int(b) if letter == "f" else 0
    return int(a) - (now - start) % int(a)


def _size(lease: object) -> int | None:
    """Return how many tokens to take at once: _AUTO to find out; None for no leases."""
    if lease is None or lease == "auto":
        return None if lease is None else _AUTO
    if isinstance(lease, bool) or not isinstance(lease, int) or lease < 2:
        raise UsageError(f'lease is "auto", an int from 2 or None, not {lease!r}')
    return lease


def _has_turns(question: Question) -> bool:
    """Return whether waiters may take turns: a single gcra tells each of them when."""
    asked = [fields for fields in question.fields if fields[0] != "b"]
    return len(asked) == 1 and asked[0][0] == "g"


def verdicts(question: Question, reply: Sequence[int]) -> tuple[Verdict, ...]:
    """Read the figures of a reply; a ban that is not on has nothing to say."""
    each = []
    at = 2
    for limit, part in question.rules:
        remaining, retry, next_, reset = reply[at : at + 4]
        at += 4
        if retry == 0 and type(limit) is Ban:
            continue
        wait = None if retry < 0 else retry / 1e6
        each.append(Verdict(limit, part, retry == 0, remaining, wait, next_ / 1e6, reset / 1e6))
    return tuple(each)


def _unasked(question: Question) -> Decision:
    """Decide where there is no limit, or one of 0."""
    each = tuple(
        Verdict(limit, part, limit.amount != 0, limit.amount or 0, 0.0 if limit.amount else None,
                0.0, 0.0)
        for limit, part in question.rules
        if isinstance(limit, Limit)
    )  # fmt: skip
    return decided(not each, each, "none")
