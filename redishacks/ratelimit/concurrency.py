"""`ConcurrencyLimiter`: at most so many at once, over all processes.

    render = ConcurrencyLimiter(client, "render", 10, lease=30)
    with render("user:7") as slot:                 # RateLimitedError when ten are at it
        ...
    slot = render.acquire("user:7", wait=5)        # sleeps for up to 5 s until a place is free
    slot.release()

    @render.limit(key=lambda user: user.id)
    def draw(user): ...

Whoever gets a place holds it for a lease, by the server's clock, or until it is released: the place
of a process that died comes back when its lease ends. A lease that is shorter than the work is
renewed with `slot.renew()`, or by itself with `renew=True`. Entering and leaving are one round trip
each.

One key in Redis per key, with a TTL:

    rh:r1:{render/user:7}:slots    zset     token of each holder -> µs when its lease ends

Trade-offs: waiters look again every 5 to 100 ms, and are served in no promised order. A holder that
overstays its lease runs beside whoever got its place: it is told so by `slot.lost`, not stopped. A
`retry_after` is when a lease ends; a place that is released is free sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar, cast

from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._linger import TaskSender, ThreadSender
from redishacks._transport import Hook, connect, connect_async
from redishacks._units import Seconds
from redishacks.errors import UsageError
from redishacks.ratelimit._keeper import Keeper
from redishacks.ratelimit._places import Concurrency, Holder, Seat
from redishacks.ratelimit.commands import Key
from redishacks.ratelimit.decision import Decision

F = TypeVar("F", bound=Callable[..., Any])


# Places


class Slot(Seat):
    """A place that is held; a context manager that releases it."""

    def renew(self) -> bool:
        """Begin the lease anew; False when it was lost or released. One round trip.

        A lease that has ended stays lost, even if nobody took the place. Raises
        `UnavailableError` when Redis cannot be asked; the lease goes on until it ends.
        """
        return drive(self.renew_steps(), self._core.transport, self._core.deadline)

    def release(self) -> None:
        """Give the place back; again does no harm. One round trip.

        When Redis is away it is tried in the background. Does nothing in a forked child.
        """
        drive(self.release_steps(), self._core.transport, self._core.deadline)

    def __enter__(self) -> Slot:
        self._core.inside(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()


class AsyncSlot(Seat):
    """`Slot` for asyncio."""

    async def renew(self) -> bool:
        """Begin the lease anew; False when it was lost or released, as `Slot.renew`."""
        return await drive_async(self.renew_steps(), self._core.transport, self._core.deadline)

    async def release(self) -> None:
        """Give the place back, as `Slot.release`."""
        await drive_async(self.release_steps(), self._core.transport, self._core.deadline)

    async def __aenter__(self) -> AsyncSlot:
        self._core.inside(self)
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.release()


# Limiters


class ConcurrencyLimiter(Concurrency[Transport]):
    """Limits how many do something at once, over all processes.

    `client` is what `RateLimiter` takes; `name` tells these places from others'; `amount` is how
    many at once per key, 0 for nobody, None for no limit. Who has a place holds it for `lease`
    seconds (0.1 s to 366 days) or until the release. With `renew=True` the lease is renewed every
    third of its time in the background, for as long as the holder is inside a `with` or a
    decorated function.

    `deadline` bounds a question, in seconds. When Redis is away, `on_error` says what then: "raise"
    `UnavailableError`, "allow" or "deny"; after one failure nobody is asked again until a probe in
    the background gets an answer. An acquisition that was given up, by an error or a cancellation,
    gives its place back in the background, if it got one. `on_command(name, node, seconds, error)`
    is called after every command.
    """

    def _connect(self, client: Any, on_command: Hook | None) -> Transport:
        return connect(client, on_command)

    def _set_up(self) -> None:
        self._keeping = ThreadSender(Keeper(self.name), self.transport, **self._options())
        weakref.finalize(self, self._keeping.abandon)

    def acquire(
        self, key: Key = "", *, wait: Seconds | None = 0.0, amount: int | None = None
    ) -> Slot:
        """Get a place, or raise `RateLimitedError` when all are taken. One round trip.

        With `wait` sleeps until one is free, so many seconds at most, or with None for as long as
        it takes: one round trip each 5 to 100 ms. `amount` replaces the limiter's own this time.
        """
        steps = self.acquire_steps(Slot, key, wait, amount)
        return drive(steps, self.transport, self.deadline)

    def peek(self, key: Key = "", *, amount: int | None = None) -> Decision:
        """Say what `acquire` would find, and take nothing. One round trip."""
        return drive(self.peek_steps(key, amount), self.transport, self.deadline)

    def holders(self, key: Key = "") -> list[Holder]:
        """Return who holds a place, the first one whose lease ends first. One round trip."""
        return drive(self.holders_steps(key), self.transport, self.deadline)

    def reset(self, key: Key = "") -> None:
        """Take all places away; holders hear of it when they renew. One round trip."""
        drive(self.reset_steps(key), self.transport, self.deadline)

    @contextlib.contextmanager
    def __call__(
        self, key: Key = "", *, wait: Seconds | None = 0.0, amount: int | None = None
    ) -> Iterator[Slot]:
        """Return a context manager that holds a place, and raises as `acquire` does on entry."""
        with self.acquire(key, wait=wait, amount=amount) as slot:
            yield slot

    def limit(
        self, key: Key | Callable[..., Key] = "", *, wait: Seconds | None = 0.0
    ) -> Callable[[F], F]:
        """Return a decorator: a function holds a place while it runs.

        `key` may be a function of the call's arguments. Raises `UsageError` for an async function
        and for a generator, which would not run inside.
        """

        def decorate(function: F) -> F:
            _check_plain(function)
            if inspect.iscoroutinefunction(function):
                raise UsageError(f"{function!r} is async: use AsyncConcurrencyLimiter for it")

            @functools.wraps(function)
            def limited(*args: Any, **kwargs: Any) -> Any:
                with self(key(*args, **kwargs) if callable(key) else key, wait=wait):
                    return function(*args, **kwargs)

            return cast("F", limited)

        return decorate

    def _background(self) -> ThreadSender[Keeper]:
        return self._keeping


class AsyncConcurrencyLimiter(Concurrency[AsyncTransport]):
    """`ConcurrencyLimiter` for asyncio: takes `redis.asyncio` twins of its clients, or a URL."""

    def _connect(self, client: Any, on_command: Hook | None) -> AsyncTransport:
        return connect_async(client, on_command)

    def _set_up(self) -> None:
        #: By the id of the loop, which the pair keeps alive: a lease is renewed where it is held.
        self._keeping: dict[int, tuple[asyncio.AbstractEventLoop, TaskSender[Keeper]]] = {}
        weakref.finalize(self, _abandon, self._keeping)

    async def acquire(
        self, key: Key = "", *, wait: Seconds | None = 0.0, amount: int | None = None
    ) -> AsyncSlot:
        """Get a place, or raise `RateLimitedError`, as `ConcurrencyLimiter.acquire`."""
        steps = self.acquire_steps(AsyncSlot, key, wait, amount)
        return await drive_async(steps, self.transport, self.deadline)

    async def peek(self, key: Key = "", *, amount: int | None = None) -> Decision:
        """Say what `acquire` would find, and take nothing. One round trip."""
        return await drive_async(self.peek_steps(key, amount), self.transport, self.deadline)

    async def holders(self, key: Key = "") -> list[Holder]:
        """Return who holds a place, the first one whose lease ends first. One round trip."""
        return await drive_async(self.holders_steps(key), self.transport, self.deadline)

    async def reset(self, key: Key = "") -> None:
        """Take all places away; holders hear of it when they renew. One round trip."""
        await drive_async(self.reset_steps(key), self.transport, self.deadline)

    @contextlib.asynccontextmanager
    async def __call__(
        self, key: Key = "", *, wait: Seconds | None = 0.0, amount: int | None = None
    ) -> AsyncIterator[AsyncSlot]:
        """Return an async context manager that holds a place, and raises as `acquire` on entry."""
        async with await self.acquire(key, wait=wait, amount=amount) as slot:
            yield slot

    def limit(
        self, key: Key | Callable[..., Key] = "", *, wait: Seconds | None = 0.0
    ) -> Callable[[F], F]:
        """Return a decorator for async functions, as `ConcurrencyLimiter.limit`."""

        def decorate(function: F) -> F:
            _check_plain(function)
            if not inspect.iscoroutinefunction(function):
                raise UsageError(f"{function!r} is not async: use ConcurrencyLimiter for it")

            @functools.wraps(function)
            async def limited(*args: Any, **kwargs: Any) -> Any:
                async with self(key(*args, **kwargs) if callable(key) else key, wait=wait):
                    return await function(*args, **kwargs)

            return cast("F", limited)

        return decorate

    def _background(self) -> TaskSender[Keeper]:
        loop = asyncio.get_running_loop()
        pair = self._keeping.get(id(loop))
        if pair is None:
            items = list(self._keeping.items())
            _abandon({key: self._keeping.pop(key) for key, (had, _) in items if had.is_closed()})
            sender = TaskSender(Keeper(self.name), self.transport, **self._options())
            pair = self._keeping[id(loop)] = loop, sender
        return pair[1]


def _abandon(keeping: dict[int, tuple[asyncio.AbstractEventLoop, TaskSender[Keeper]]]) -> None:
    for _, sender in keeping.values():
        sender.abandon()


def _check_plain(function: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UsageError(f"{function!r} is a generator: hold a place with `with` inside of it")
