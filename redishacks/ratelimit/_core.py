"""What sync and async rate limiters share: questions to ask, and what becomes of the answers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import math
import time
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

from redishacks import _keys
from redishacks._command import Command, Outcome, Sleep, Steps, ask, ask_all
from redishacks._drive import AsyncTransport, Transport
from redishacks._linger import TaskSender, ThreadSender
from redishacks._transport import Hook
from redishacks._units import Seconds, patience, seconds
from redishacks.errors import MaybeAppliedError, UnavailableError, UsageError
from redishacks.ratelimit._chores import Chores
from redishacks.ratelimit._lists import KeyList
from redishacks.ratelimit._recall import SKEW, Denied, Lease, Memory, reached
from redishacks.ratelimit.commands import MOST_REMEMBERED, Key, Layout, Question
from redishacks.ratelimit.decision import Charge, Decision, Verdict, aged, decided, with_more
from redishacks.ratelimit.limit import Ban, Limit

#: What may be limited: one key, or one for each part.
Keys = Key | Mapping[str, Key]
Cost = int | Mapping[str, int]
Limits = Limit | Sequence[Limit] | None
Near = tuple[float, Callable[[Keys, Decision], object]]
#: Key, cost and limits, or functions of a call's arguments that return them.
Given = tuple[
    Keys | Callable[..., Keys], Cost | Callable[..., Cost], Limits | Callable[..., Limits]
]

T = TypeVar("T", bound=Transport | AsyncTransport)
F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
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
        self._limits = _limits(limits)
        self.layout = Layout(prefix, name, tag)
        self.deadline = seconds(deadline, "deadline")
        if on_error not in ("raise", "allow", "deny", "local"):
            raise UsageError(f"on_error is raise, allow, deny or local, not {on_error!r}")
        if not isinstance(local_share, int | float) or not 0 < local_share <= 1:
            raise UsageError(f"local_share is above 0 and at most 1, not {local_share!r}")
        self._on_error = on_error
        self._local_share = local_share
        self._deny_max = seconds(deny_max, "deny_max") if deny_cache else None
        self._lease = _size(lease)
        self._check_leasable()
        self._shadow = shadow
        self._near = _near(near)
        self._allow = KeyList(allow, "allow")
        self._deny = KeyList(deny, "deny")
        self._listed = bool(self._allow or self._deny)
        if not isinstance(ban, Ban | None):
            raise UsageError(f"ban is a Ban, such as Ban(100, 60), not {ban!r}")
        self._ban = ban
        self._ready: dict[object, Question] = {}
        self._memory = Memory()
        self._chores = Chores(
            self.layout, self._memory, self._limits, heartbeat=on_error == "local"
        )
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

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits; they may be set at any time, and what was used stays used."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limit | Sequence[Limit]) -> None:
        self._limits = _limits(limits)
        self._check_leasable()
        self._ready = {}
        self._memory.forget_denials()
        self._chores.announce(self._limits)

    def _check_leasable(self) -> None:
        strange = [limit for limit in self._limits if limit.algorithm in ("gcra", "log")]
        if self._lease is not None and strange:
            raise UsageError(f"lease is for window and fixed, not for {strange[0].algorithm}")

    def limit(
        self,
        key: Keys | Callable[..., Keys],
        cost: Cost | Callable[..., Cost] = 1,
        *,
        limits: Limits | Callable[..., Limits] = None,
    ) -> Callable[[F], F]:
        """Return a decorator that hits before each call, and raises `RateLimitedError`.

        `key`, `cost` and `limits` may be functions of the call's arguments. A `RateLimiter` hits
        for an async function in a thread; `AsyncRateLimiter` does without, and takes no other.
        """

        def decorate(function: F) -> F:
            limited = self._limited(function, (key, cost, limits))
            return cast("F", functools.wraps(function)(limited))

        return decorate

    @abstractmethod
    def _limited(self, function: Callable[..., Any], given: Given) -> Callable[..., Any]:
        """Return a function that hits first."""

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

    def ask(self, key: Keys, cost: Cost, limits: Limits, units: int = 1) -> Question | Decision:
        """Return the question to ask, or the decision when there is nothing to ask.

        With 0 units it is only a look, and no refusal.
        """
        if self._listed and (listed := self._by_list(key)) is not None:
            return self._judged(listed, units)
        usual = limits is None and type(cost) is int and cost == 1 and type(key) in _SIMPLE
        question = self._ready.get(key) if usual else None
        if question is None:
            question = self._question(key, cost, limits)
            if usual:
                if len(self._ready) >= _READY:
                    self._ready.clear()
                self._ready[key] = question
        if question.idle:
            return self._judged(_unasked(question), units)
        if not self._background.somewhere():
            self._background.start()
        if self._chores.breaker:
            try:
                self._chores.breaker.check(self._where(question))
            except UnavailableError as error:
                return self.without(question, error, units)
        return question

    def _question(self, key: Keys, cost: Cost, limits: Limits) -> Question:
        chosen = self._limits
        if limits is not None:
            chosen = _limits(limits)
            self._chores.announce(chosen)
        return self.layout.question(key, chosen, cost, self._ban)

    def command(
        self, key: Keys, cost: Cost, limits: Limits, question: Question
    ) -> Command[list[int]]:
        """Return what to say for a hit, which may take tokens in advance."""
        if self._lease is None or not self._leasable(key, cost, limits):
            return question.hit
        size = self._lease
        if size == _AUTO:
            entry = self._memory.entries.get(key)
            size = entry.next_size() if isinstance(entry, Lease) else 1
        return question.hit if size == 1 else self.layout.decide(question, "hit", size)

    def leased(self, key: Keys) -> Lease | None:
        """Return the lease of a key, if there is one with tokens that are good."""
        if self._lease is None or type(key) not in _SIMPLE:
            return None
        entry = self._memory.entries.get(key)
        good = isinstance(entry, Lease) and entry.pending() and not entry.due()
        return entry if isinstance(entry, Lease) and good else None

    def _leasable(self, key: Keys, cost: Cost, limits: Limits) -> bool:
        return limits is None and type(cost) is int and cost == 1 and type(key) in _SIMPLE

    def _where(self, question: Question) -> str:
        return str(self.transport.where(question.hit))

    def _by_list(self, key: Keys) -> Decision | None:
        values = key.values() if isinstance(key, Mapping) else (key,)
        raws = [_keys.id_bytes(value, "key") for value in values]
        if any(raw in self._deny for raw in raws):
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
            if self._near is not None:
                self._approach(key, decision)
            if self._lease is not None and self._leasable(key, cost, limits):
                left = min(_bucket_left(fields, reply[0]) for fields in question.fields)
                # Since the question was sent: that was before the server looked at its clock.
                until = since + left / 1e6 * SKEW
                self._memory.put(key, Lease(question, decision, reply[1], until))
            # What was taken in advance is still there for this process.
            return decision if reply[1] == 1 else with_more(decision, reply[1] - 1)
        decision = decided(False, each)
        self._chores.refused.append(question)
        repeated = limits is None and type(key) in _SIMPLE and not self._shadow
        if repeated and self._deny_max is not None:
            units = cost if isinstance(cost, int) else 1
            self._memory.put(key, Denied(question, decision, units, since, self._deny_max))
        if self._near is not None:
            self._approach(key, decision)
        return self._judged(decision)

    def _judged(self, decision: Decision, units: int = 1) -> Decision:
        """Count a refusal, unless it is only a look; in shadow mode let it pass."""
        if decision.allowed:
            return decision
        if units:
            next(self._shadowed if self._shadow else self._refused)
        return decision._replace(allowed=True) if self._shadow else decision

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
        if self._on_error == "raise" and not self._shadow:
            raise error
        next(self._degraded)
        if self._on_error == "local":
            share = 1 / self._chores.processes if self._chores.processes else self._local_share
            return self._judged(self._chores.local.decide(question, share, units), units)
        allowed = self._on_error == "allow"
        each = tuple(
            Verdict(limit, part, allowed, 0, 0.0 if allowed else 1.0, 0.0, 0.0)
            for limit, part in question.rules
            if isinstance(limit, Limit)
        )
        return self._judged(decided(allowed, each, "none", degraded=True), units)

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Give back tokens that are still good, too."""
        self._chores.closing = True
        try:
            yield
        finally:
            self._chores.closing = False

    def _forgiving(self) -> contextlib.AbstractContextManager[None]:
        """Let it pass that Redis is away, unless that is to be raised."""
        away = () if self._on_error == "raise" else AWAY
        return contextlib.suppress(*away)

    # Conversations

    def _say(self, question: Question, command: Command[R]) -> Steps[R]:
        """Ask about a key, unless its node did not answer a moment ago."""
        where = self._where(question)
        self._chores.breaker.check(where)
        try:
            return (yield from ask(command))
        except AWAY:
            self._chores.breaker.open(where, self.layout.decide(question, "peek"))
            raise

    def refund_steps(self, decision: Decision, units: int | None) -> Steps[int]:
        charge = decision.charge
        if charge is None or charge.limiter is not self:
            raise UsageError(
                "only a decision that this limiter allowed, in this process, can be refunded"
            )
        costs = charge.take(units)
        if any(costs):
            command = self.layout.refund(charge.question, costs, charge.moments())
            try:
                yield from self._say(charge.question, command)
            except UnavailableError:
                charge.put_back(max(costs))
                raise
            self._memory.forget(charge.question)
        return max(costs)

    def reset_steps(self, key: Keys, limits: Limits) -> Steps[None]:
        question = self._question(key, 1, limits)
        self._memory.forget(question, leases=True)
        if question.keys:
            yield from self._say(question, self.layout.forget(question))
        self._memory.forget(question, leases=True)

    def many_steps(self, keys: Sequence[Keys], cost: Cost, limits: Limits) -> Steps[list[Decision]]:
        keys = list(keys)
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

    def heavy_steps(
        self, key: Keys, cost: Cost, limits: Limits, question: Question, lease: Lease
    ) -> Steps[Decision]:
        """Hit for more than a token: what is leased is given back first, in the same exchange."""
        back = self.layout.refund(lease.question, *lease.give_back(lease.drain()))
        since = monotonic()
        outcomes = yield from ask_all([back, question.hit])
        error = outcomes[1].error
        if isinstance(error, AWAY):
            return self.without(question, error)
        return self.answered(key, cost, limits, question, outcomes[1].result(), since)

    def wait_steps(
        self, key: Keys, cost: Cost, timeout: Seconds | None, limits: Limits
    ) -> Steps[Decision]:
        """Hit when it is this one's turn, or not at all when that is beyond the timeout."""
        end = monotonic() + min(patience(timeout, "timeout"), _FOR_EVER)
        remembered = self.recall(key, cost, limits)
        if remembered is not None and remembered.allowed:
            return remembered
        question = self.ask(key, cost, limits)
        while not isinstance(question, Decision):
            since = monotonic()
            turn = _has_turns(question)
            most = max(0, int((end - since) * 1e6)) if turn else 1
            try:
                reply = yield from self._say(
                    question, self.layout.decide(question, "turn" if turn else "try", most)
                )
            except AWAY as error:
                decision = self.without(question, error)
                if decision.allowed or not _worth_waiting(decision, end):
                    return decision
            else:
                if reply[1]:
                    passed = [*reply[:3], 0, *reply[4:]]  # a turn is due after reply[3] µs
                    decision = self.answered(key, cost, limits, question, passed, since)
                    return (yield from self._own_turn(question, decision, reply[3] / 1e6))
                decision = decided(False, verdicts(question, reply))
                if self._shadow or not _worth_waiting(decision, end):
                    # Only now is it a refusal: the caller gives up.
                    if self._ban is not None:
                        self._chores.given_up.append(question)
                    return self.answered(key, cost, limits, question, reply, since)
            yield Sleep(decision.retry_after or 0.0)
        return question

    def _own_turn(self, question: Question, decision: Decision, due: float) -> Steps[Decision]:
        """Sleep until a turn that is taken; one that is not waited for is given back."""
        assert decision.charge is not None
        try:
            if due:
                yield Sleep(due)
        except GeneratorExit:
            raise  # nobody is there to go on: it costs its own turn
        except BaseException:
            costs, ends = decision.charge.take(None), decision.charge.ends()
            with contextlib.suppress(*AWAY):
                yield from self._say(question, self.layout.refund(question, costs, ends, "cancel"))
            raise
        return aged(decision, due)

    def peek_steps(self, key: Keys, cost: Cost, limits: Limits) -> Steps[Decision]:
        """Say what a hit would say."""
        question = self.ask(key, cost, limits, units=0)
        if isinstance(question, Decision):
            return question
        try:
            reply = yield from self._say(question, self.layout.decide(question, "peek"))
        except AWAY as error:
            return self.without(question, error, units=0)
        each = verdicts(question, reply)
        allowed = self._shadow or all(verdict.allowed for verdict in each)
        lease = self.leased(key)
        if lease is None or limits is not None:
            return decided(allowed, each)
        # A hit would spend a token, or have them all given back first.
        own = lease.pending()
        return with_more(decided(allowed or _most(cost) <= own, each), own)

    def settle_steps(
        self, key: Keys, limits: Limits, decision: Decision, more: int, *, failed: bool
    ) -> Steps[None]:
        """Charge so much more than a decision did, whatever room there is, or give it back.

        Where Redis is away `on_error` decides, as for a hit; after an error in the body, nothing
        hides that.
        """
        try:
            if more > 0:
                question = self._question(key, 1, limits)
                if question.keys and not question.idle:
                    yield from self._say(question, self.layout.charge(question, more))
            elif more < 0 and decision.charge is not None:
                yield from self.refund_steps(decision, -more)
        except AWAY:
            if self._on_error == "raise" and not failed:
                raise
            next(self._degraded)


AnyLimiter = Limiter[Any, Any]


# Values


def made(given: Given, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Keys, Cost, Limits]:
    """Return key, cost and limits, or what functions make of a call's arguments."""
    key, cost, limits = (each(*args, **kwargs) if callable(each) else each for each in given)
    return cast("tuple[Keys, Cost, Limits]", (key, cost, limits))


def _limits(given: Limit | Sequence[Limit]) -> tuple[Limit, ...]:
    if not isinstance(given, Limit | Sequence):
        raise UsageError(f"a limit is a Limit, or a list of them, not {given!r}")
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
        and not inspect.iscoroutinefunction(near[1])
    ):
        raise UsageError(
            f"near is (fraction, callback), such as (0.8, warn), the callback not async: {near!r}"
        )
    return near


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


def _most(cost: Cost) -> int:
    return max(cost.values(), default=1) if isinstance(cost, Mapping) else cost


def _worth_waiting(decision: Decision, end: float) -> bool:
    """Return whether a place comes back in time."""
    wait = decision.retry_after
    return wait is not None and monotonic() + wait <= end


def _has_turns(question: Question) -> bool:
    """Return whether waiters may take turns: a single gcra tells each of them when."""
    asked = [fields for fields in question.fields if fields[0] != "b"]
    return len(asked) == 1 and asked[0][0] == "g"


def top_steps(layout: Layout, count: int) -> Steps[list[tuple[str | bytes, int]]]:
    """Read the keys refused most in the last 24 hours."""
    hour = int(time.time() // 3600)
    hours = [layout.top(hour - ago, MOST_REMEMBERED) for ago in range(24)]
    refused: Counter[str | bytes] = Counter()
    for outcome in (yield from ask_all(hours)):
        refused.update(dict(outcome.result()))
    return refused.most_common(count)


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
