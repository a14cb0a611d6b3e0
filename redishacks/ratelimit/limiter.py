"""`RateLimiter`: allow so much per so long, over all processes, in one round trip.

    limiter = RateLimiter(client, "api", Limit(20, 60))
    if not limiter.hit(user).allowed:
        ...

Each hit is one script on one key per limit (`ratelimit_decide`), which charges all limits or none
and says every figure that an HTTP answer needs. The clock is the server's. A refused hit costs
nothing. A hit whose reply was lost is never said again.

Trade-offs: a refusal is repeated from memory for up to `deny_max` seconds, so that a reset or a
refund elsewhere is seen that late.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from redishacks._command import Steps
from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._linger import TaskSender, ThreadSender
from redishacks._transport import Hook, connect, connect_async
from redishacks._units import EXACT, Seconds
from redishacks.errors import UsageError
from redishacks.ratelimit._chores import Chores
from redishacks.ratelimit._core import (
    AWAY,
    AnyLimiter,
    Cost,
    Given,
    Keys,
    Limiter,
    Limits,
    made,
    top_steps,
)
from redishacks.ratelimit.decision import Decision, RateLimitedError


class RateLimiter(Limiter[Transport, ThreadSender[Chores]]):
    """Limits how often something happens, over all processes.

    `client` is a `redis.Redis`, a Sentinel master, a `redis.RedisCluster`, a fakeredis client or a
    URL; `name` tells this limiter's keys from others', `prefix` all of this library's. With several
    `limits` a hit passes when all allow it, else none is charged. A `key` is a str, an int or bytes
    of up to 2,048 bytes; with a mapping such as `{"user": "u1", "ip": "10.1.2.3"}` a limit counts
    the part of its `name`, one without a name each part. On a cluster the keys of one decision
    share a slot: one key does, and with `tag="name"` all keys of the limiter do.

    `deadline` bounds a question, in seconds. When Redis is away, `on_error` says what then:
    "raise" `UnavailableError` or, for a lost reply, `MaybeAppliedError`; "allow"; "deny"; or
    "local": count in this process, sharing each limit with the processes seen lately (a process
    that has never reached Redis takes `local_share` of it). After one failure nobody is asked
    again until a probe in the background, once a second, gets an answer.

    `deny_cache` repeats a refusal from memory until its `retry_after`, at most `deny_max` seconds:
    of a single key, and of the limiter's own limits.

    `lease` takes so many tokens of such a key in one round trip and spends them in this process,
    for hits that cost 1, of `window` and `fixed` limits; "auto" finds out how many, at most half
    of what is left and 10,000. They are charged when they are taken, so never more than the limit
    pass in all. Those that nobody spends are given back after some 5 seconds, at the end of their
    sub-bucket, on `close()` and at exit. A process that is killed strands what is left of its last
    lease of each key until that window has passed.

    `shadow=True` counts and decides but never refuses, also when Redis is away.
    `near=(0.8, callback)` calls `callback(key, decision)` when four fifths of a limit are used or
    leased. Keys, addresses and networks in `deny` are always refused, those in `allow` never. `ban`
    refuses everything for a while after too many refusals. `on_command(name, node, seconds, error)`
    is called after every command.
    """

    def _connect(self, client: Any, on_command: Hook | None) -> Transport:
        return connect(client, on_command)

    def _sender(self, chores: Chores, **options: Any) -> ThreadSender[Chores]:
        return ThreadSender(chores, self.transport, **options)

    def hit(self, key: Keys, cost: Cost = 1, *, limits: Limits = None) -> Decision:
        """Charge `cost` to every limit, if all allow it. One round trip; none when remembered.

        `cost` may name limits: `{"user": 1, "ip": 3}`. `limits` replaces the limiter's own for
        this hit. Raises `CostError` for a cost that could never be allowed; when Redis is away, as
        `on_error` says.
        """
        decision = self.recall(key, cost, limits)
        if decision is not None:
            return decision
        question = self.ask(key, cost, limits)
        if isinstance(question, Decision):
            return question
        lease = self.leased(key)
        if lease is not None:
            steps = self.heavy_steps(key, cost, limits, question, lease)
            return drive(steps, self.transport, self.deadline)
        since = monotonic()
        try:
            reply = self.transport.call(self.command(key, cost, limits, question), self.deadline)
        except AWAY as error:
            return self.without(question, error)
        return self.answered(key, cost, limits, question, reply, since)

    def peek(self, key: Keys, cost: Cost = 1, *, limits: Limits = None) -> Decision:
        """Say what a hit would say, and charge nothing. One round trip."""
        return drive(self.peek_steps(key, cost, limits), self.transport, self.deadline)

    def hit_many(
        self, keys: Sequence[Keys], cost: Cost = 1, *, limits: Limits = None
    ) -> list[Decision]:
        """Hit many keys, each by itself, in one round trip per node; decisions in their order."""
        return drive(self.many_steps(keys, cost, limits), self.transport, self.deadline)

    def wait(
        self, key: Keys, cost: Cost = 1, timeout: Seconds | None = None, *, limits: Limits = None
    ) -> Decision:
        """Sleep until a hit is allowed, then it has been charged; refuse at once if that is later.

        One `gcra` limit: a turn is taken in one round trip, so waiters of all processes are served
        in order and at the limit's full rate; one that is killed costs its own turn. Other limits:
        sleeps for `retry_after` and tries again, in no promised order.
        """
        return drive(self.wait_steps(key, cost, timeout, limits), self.transport, self.deadline)

    def refund(self, decision: Decision, n: int | None = None) -> int:
        """Give back what a decision took, `n` of its cost or the rest; return how much.

        At most what it took, and only while that still counts: of a `gcra` less what has drained
        since. One round trip; one whose reply is lost is not repeated. After a `reset` of the key
        an earlier decision gives back what others took.
        """
        return drive(self.refund_steps(decision, n), self.transport, self.deadline)

    def reset(self, key: Keys, *, limits: Limits = None) -> None:
        """Forget all that a key has used, and its bans. One round trip.

        Other processes remember a refusal for up to `deny_max`, and may still spend, or give back,
        tokens that they have leased.
        """
        drive(self.reset_steps(key, limits), self.transport, self.deadline)

    def top(self, count: int = 10) -> list[tuple[str | bytes, int]]:
        """Return the keys refused most in the last 24 hours, with how often. One round trip.

        The thousand keys refused most are remembered per hour; a process tells once a second.
        """
        return drive(top_steps(self.layout, count), self.transport, self.deadline)

    def reserve(self, key: Keys, estimate: int, *, limits: Limits = None) -> Reservation:
        """Charge an estimate for the time of a `with`, and settle the actual cost in it.

            with limiter.reserve("u1", 500) as reservation:
                reservation.settle(count_tokens(...))

        Raises `RateLimitedError` on entry. What was too much is given back at the end; what was too
        little is charged, even beyond the limit. An exception gives all of it back.
        """
        return Reservation(self, key, estimate, limits)

    def close(self) -> None:
        """Give back leased tokens and tell what is to be told; at exit this happens by itself."""
        with self._closing(), self._forgiving():
            self._background.send()

    def __call__(self, key: Keys, cost: Cost = 1, *, limits: Limits = None) -> Passage:
        """Return a context manager that hits on entry, and raises `RateLimitedError`."""
        return Passage(self, key, cost, limits)

    def _limited(self, function: Callable[..., Any], given: Given) -> Callable[..., Any]:
        async def in_a_thread(*args: Any, **kwargs: Any) -> Any:
            await asyncio.to_thread(Passage(self, *made(given, args, kwargs)).__enter__)
            return await function(*args, **kwargs)

        def limited(*args: Any, **kwargs: Any) -> Any:
            with Passage(self, *made(given, args, kwargs)):
                return function(*args, **kwargs)

        return in_a_thread if inspect.iscoroutinefunction(function) else limited


class AsyncRateLimiter(Limiter[AsyncTransport, TaskSender[Chores]]):
    """`RateLimiter` for asyncio: takes the `redis.asyncio` twins of its clients, or a URL."""

    def _connect(self, client: Any, on_command: Hook | None) -> AsyncTransport:
        return connect_async(client, on_command)

    def _sender(self, chores: Chores, **options: Any) -> TaskSender[Chores]:
        return TaskSender(chores, self.transport, **options)

    async def hit(self, key: Keys, cost: Cost = 1, *, limits: Limits = None) -> Decision:
        """Charge `cost` to every limit, if all allow it, as `RateLimiter.hit`."""
        decision = self.recall(key, cost, limits)
        if decision is not None:
            return decision
        question = self.ask(key, cost, limits)
        if isinstance(question, Decision):
            return question
        lease = self.leased(key)
        if lease is not None:
            steps = self.heavy_steps(key, cost, limits, question, lease)
            return await drive_async(steps, self.transport, self.deadline)
        since = monotonic()
        try:
            reply = await self.transport.call(
                self.command(key, cost, limits, question), self.deadline
            )
        except AWAY as error:
            return self.without(question, error)
        return self.answered(key, cost, limits, question, reply, since)

    async def peek(self, key: Keys, cost: Cost = 1, *, limits: Limits = None) -> Decision:
        """Say what a hit would say, and charge nothing. One round trip."""
        return await drive_async(self.peek_steps(key, cost, limits), self.transport, self.deadline)

    async def hit_many(
        self, keys: Sequence[Keys], cost: Cost = 1, *, limits: Limits = None
    ) -> list[Decision]:
        """Hit many keys, each by itself, in one round trip per node; decisions in their order."""
        return await drive_async(self.many_steps(keys, cost, limits), self.transport, self.deadline)

    async def wait(
        self,
        key: Keys,
        cost: Cost = 1,
        timeout: Seconds | None = None,  # noqa: ASYNC109 - a refusal, not a cancellation
        *,
        limits: Limits = None,
    ) -> Decision:
        """Sleep until a hit is allowed, as `RateLimiter.wait`; a cancelled turn may come back."""
        steps = self.wait_steps(key, cost, timeout, limits)
        return await drive_async(steps, self.transport, self.deadline)

    async def refund(self, decision: Decision, n: int | None = None) -> int:
        """Give back what a decision took, as `RateLimiter.refund`."""
        return await drive_async(self.refund_steps(decision, n), self.transport, self.deadline)

    async def reset(self, key: Keys, *, limits: Limits = None) -> None:
        """Forget all that a key has used, and its bans. One round trip."""
        await drive_async(self.reset_steps(key, limits), self.transport, self.deadline)

    async def top(self, count: int = 10) -> list[tuple[str | bytes, int]]:
        """Return the keys refused most in the last 24 hours, with how often. One round trip."""
        return await drive_async(top_steps(self.layout, count), self.transport, self.deadline)

    def reserve(self, key: Keys, estimate: int, *, limits: Limits = None) -> AsyncReservation:
        """Charge an estimate for the time of an `async with`, as `RateLimiter.reserve`."""
        return AsyncReservation(self, key, estimate, limits)

    async def aclose(self) -> None:
        """Give back leased tokens and tell what is to be told."""
        with self._closing(), self._forgiving():
            await self._background.send()

    def __call__(self, key: Keys, cost: Cost = 1, *, limits: Limits = None) -> AsyncPassage:
        """Return an async context manager that hits on entry, and raises `RateLimitedError`."""
        return AsyncPassage(self, key, cost, limits)

    def _limited(self, function: Callable[..., Any], given: Given) -> Callable[..., Any]:
        if not inspect.iscoroutinefunction(function):
            raise UsageError(f"{function!r} is not async: use RateLimiter for it")

        async def limited(*args: Any, **kwargs: Any) -> Any:
            async with AsyncPassage(self, *made(given, args, kwargs)):
                return await function(*args, **kwargs)

        return limited


# In and out


class Passage:
    """Hits on entry, and raises `RateLimitedError` when refused."""

    def __init__(self, limiter: RateLimiter, key: Keys, cost: Cost, limits: Limits) -> None:
        self._limiter = limiter
        self._hit = (key, cost, limits)

    def __enter__(self) -> Decision:
        key, cost, limits = self._hit
        return passed(self._limiter, key, self._limiter.hit(key, cost, limits=limits))

    def __exit__(self, *raised: object) -> None:
        """Nothing to do: a hit that passed stays charged."""


class AsyncPassage:
    """`Passage` for asyncio."""

    def __init__(self, limiter: AsyncRateLimiter, key: Keys, cost: Cost, limits: Limits) -> None:
        self._limiter = limiter
        self._hit = (key, cost, limits)

    async def __aenter__(self) -> Decision:
        key, cost, limits = self._hit
        return passed(self._limiter, key, await self._limiter.hit(key, cost, limits=limits))

    async def __aexit__(self, *raised: object) -> None:
        """Nothing to do: a hit that passed stays charged."""


class _Reservation:
    """What is charged in advance, and what it really was."""

    def __init__(self, limiter: AnyLimiter, key: Keys, estimate: int, limits: Limits) -> None:
        self._core = limiter
        self._key = key
        self._estimate = estimate
        self._limits = limits
        self._actual: int | None = None
        #: The decision on the estimate, once inside.
        self.decision: Decision | None = None

    def settle(self, actual: int) -> None:
        """Say what it cost in the end, 0 or more; charged or given back when the `with` ends."""
        whole = isinstance(actual, int) and not isinstance(actual, bool)
        if not whole or not 0 <= actual < EXACT:
            raise UsageError(f"an actual cost is an int from 0 to 2^53, not {actual!r}")
        self._actual = actual

    def _settled(self, failed: bool) -> Steps[None]:
        assert self.decision is not None
        actual = self._estimate if self._actual is None else self._actual
        if failed and self._actual is None:
            actual = 0
        more = actual - self._estimate
        yield from self._core.settle_steps(
            self._key, self._limits, self.decision, more, failed=failed
        )


class Reservation(_Reservation):
    """See `RateLimiter.reserve`."""

    def __init__(self, limiter: RateLimiter, key: Keys, estimate: int, limits: Limits) -> None:
        super().__init__(limiter, key, estimate, limits)
        self._limiter = limiter

    def __enter__(self) -> Reservation:
        decision = self._limiter.hit(self._key, self._estimate, limits=self._limits)
        self.decision = passed(self._limiter, self._key, decision)
        return self

    def __exit__(self, kind: object, *raised: object) -> None:
        steps = self._settled(kind is not None)
        drive(steps, self._limiter.transport, self._limiter.deadline)


class AsyncReservation(_Reservation):
    """See `RateLimiter.reserve`."""

    def __init__(self, limiter: AsyncRateLimiter, key: Keys, estimate: int, limits: Limits) -> None:
        super().__init__(limiter, key, estimate, limits)
        self._limiter = limiter

    async def __aenter__(self) -> AsyncReservation:
        decision = await self._limiter.hit(self._key, self._estimate, limits=self._limits)
        self.decision = passed(self._limiter, self._key, decision)
        return self

    async def __aexit__(self, kind: object, *raised: object) -> None:
        steps = self._settled(kind is not None)
        await drive_async(steps, self._limiter.transport, self._limiter.deadline)


def passed(limiter: AnyLimiter, key: Keys, decision: Decision) -> Decision:
    """Return a decision that allows; raise `RateLimitedError` for any other."""
    if not decision.allowed:
        raise RateLimitedError(decision, limiter.name, key)
    return decision
