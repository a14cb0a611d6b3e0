"""Locks as context managers and decorators: `with lock:`, `@lock`, and the end of `with held:`."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from types import FrameType, TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast

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
    def check(self) -> None:
        """Raise `LockLostError` unless it is held."""

    @abstractmethod
    def release(self) -> None:
        """Give it back."""

    def __enter__(self) -> Self:
        self.check()
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
    def check(self) -> None:
        """Raise `LockLostError` unless it is held."""

    @abstractmethod
    async def release(self) -> None:
        """Give it back."""

    async def __aenter__(self) -> Self:
        self.check()
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


class _Entry(NamedTuple):
    #: Of the frame that has the `with` in it, 0 when it cannot be told.
    frame: int
    owner: Hashable
    held: Any


class Entered:
    """What is held by `with lock`, whose exit gets no handle.

    A `with` begins and ends in one frame; that of a generator, though, in any thread or task.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def push(self, owner: Hashable, frame: int, held: E) -> E:
        """Take note of a `with` that begins; return what it holds."""
        self._entries.append(_Entry(frame, owner, held))
        return held

    def pop(self, owner: Hashable, frame: int) -> Any:
        """Return what the `with` holds that ends."""
        entries = self._entries[::-1]  # others come and go meanwhile
        here = [entry for entry in entries if entry.frame == frame]
        own = [entry for entry in entries if entry.owner == owner]
        own_here = [entry for entry in here if entry.owner == owner]
        entry = (own_here or here or own or entries)[0]
        self._entries.remove(entry)
        return entry.held


def _place(frame: FrameType) -> int:
    """Name the frame of a `with`; an `ExitStack` begins and ends in frames of its own."""
    return 0 if frame.f_globals.get("__name__") == "contextlib" else id(frame)


class _Decorating(ABC):
    #: What is held by `with`.
    entered: Entered

    def __call__(self, function: F) -> F:
        """Decorate a function: it holds the lock while it runs, and raises `LockedError` as
        `acquire` does.

        Raises `UsageError` for a function of the other colour, and for a generator, which would
        not run inside.
        """
        if not callable(function):
            raise UsageError(f"a lock decorates a function, not {function!r}")
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
        frame = _place(sys._getframe(1))
        return self.entered.push(threading.current_thread(), frame, self.acquire())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        frame = _place(sys._getframe(1))
        self.entered.pop(threading.current_thread(), frame).__exit__(kind, error, trace)


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
        frame = _place(sys._getframe(1))
        return self.entered.push(this_task(), frame, await self.acquire())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        frame = _place(sys._getframe(1))
        await self.entered.pop(this_task(), frame).__aexit__(kind, error, trace)


def this_task() -> asyncio.Task[Any] | None:
    """Return the running task; None in a child that was forked inside of a loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _is_async(function: Callable[..., Any]) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - an object may have an async one
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
