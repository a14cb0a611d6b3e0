"""Locks as context managers and decorators: `with lock:`, `@lock`, and the end of `with held:`."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from redishacks._units import Seconds
from redishacks.errors import RedisHacksError, UsageError
from redishacks.locks.holder import LockLostError

E = TypeVar("E")
F = TypeVar("F", bound=Callable[..., Any])


class _Unset:
    def __repr__(self) -> str:
        return "the lock's own"


#: For an argument that was not given, where None means something.
UNSET: Any = _Unset()


# What is held


class Releasing(ABC):
    """What is held until the end of a `with`."""

    @abstractmethod
    def release(self) -> None:
        """Give it back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.release()
        except RedisHacksError as trouble:
            _noted(error, trouble)


class AsyncReleasing(ABC):
    """What is held until the end of an `async with`."""

    @abstractmethod
    async def release(self) -> None:
        """Give it back."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.release()
        except RedisHacksError as trouble:
            _noted(error, trouble)


def _noted(error: BaseException | None, trouble: RedisHacksError) -> None:
    """Raise what went wrong, or attach it to the body's own exception, which always wins."""
    if error is None:
        raise trouble
    if not isinstance(error, LockLostError):
        error.add_note(str(trouble))


# What is acquired


class Entered:
    """What threads or tasks hold by `with lock`, whose exit gets no handle."""

    def __init__(self) -> None:
        self._holds: dict[Hashable, list[Any]] = {}

    def push(self, owner: Hashable, held: E) -> E:
        """Take note of a `with` that begins; return what it holds."""
        self._holds.setdefault(owner, []).append(held)
        return held

    def pop(self, owner: Hashable) -> Any:
        """Return what the `with` holds that ends: the last that began here, or else anywhere.

        A generator may be closed by another thread or task than the one that began it.
        """
        if owner not in self._holds:
            owner = next(reversed(self._holds))
        holds = self._holds[owner]
        held = holds.pop()
        if not holds:
            del self._holds[owner]
        return held


class _Decorating(ABC):
    #: What is held by `with`.
    entered: Entered

    def __call__(self, function: F) -> F:
        """Decorate a function: it holds the lock while it runs, and raises `LockedError` as
        `acquire` does.

        Raises `UsageError` for a function of the other colour, and for a generator, which would
        not run inside.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise UsageError(f"{function!r} is a generator: hold the lock with `with` inside of it")
        return cast("F", functools.wraps(function)(self._wrapped(function)))

    @abstractmethod
    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that holds the lock while it runs."""


R = TypeVar("R", bound=Releasing)
A = TypeVar("A", bound=AsyncReleasing)


class Entering(_Decorating, Generic[R]):
    """What is acquired by `with lock:` and `@lock`."""

    @abstractmethod
    def acquire(self, *, wait: Seconds | None = UNSET, ttl: Seconds | None = None) -> R:
        """Get it."""

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if _is_async(function):
            raise UsageError(f"{function!r} is async: use Async{type(self).__name__} for it")

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self.acquire():
                return function(*args, **kwargs)

        return locked

    def __enter__(self) -> R:
        return self.entered.push(threading.current_thread(), self.acquire())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.entered.pop(threading.current_thread()).__exit__(kind, error, trace)


class AsyncEntering(_Decorating, Generic[A]):
    """What is acquired by `async with lock:` and `@lock`."""

    @abstractmethod
    async def acquire(self, *, wait: Seconds | None = UNSET, ttl: Seconds | None = None) -> A:
        """Get it."""

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if not _is_async(function):
            name = type(self).__name__.removeprefix("Async")
            raise UsageError(f"{function!r} is not async: use {name} for it")

        async def locked(*args: Any, **kwargs: Any) -> Any:
            async with await self.acquire():
                return await function(*args, **kwargs)

        return locked

    async def __aenter__(self) -> A:
        return self.entered.push(this_task(), await self.acquire())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.entered.pop(this_task()).__aexit__(kind, error, trace)


def this_task() -> asyncio.Task[Any] | None:
    """Return the running task; None in a child that was forked inside of a loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _is_async(function: Callable[..., Any]) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - an object may have an async one
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
