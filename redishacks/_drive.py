"""Drivers: they obey `Steps`, in sync or in async code. The only loops over effects."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from redishacks._command import Ask, Call, Command, Effect, Meanwhile, Outcome, Sleep, Steps

T = TypeVar("T")


class Exchange(Protocol):
    """How steps say commands, sync; `deadline` is seconds for the whole exchange."""

    def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error."""

    def run(
        self, commands: Sequence[Command[T]], deadline: float, view: Any = None
    ) -> list[Outcome[T]]:
        """Say several, one write per node; every one ends as a value or an error, in order."""


class Transport(Exchange, Protocol):
    """How commands reach a server, sync."""

    def close(self) -> None:
        """Close idle connections; the next call opens new ones."""

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""


class AsyncExchange(Protocol):
    """How steps say commands, in asyncio."""

    async def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error."""

    async def run(
        self, commands: Sequence[Command[T]], deadline: float, view: Any = None
    ) -> list[Outcome[T]]:
        """Say several, one write per node; every one ends as a value or an error, in order."""


class AsyncTransport(AsyncExchange, Protocol):
    """How commands reach a server, in asyncio."""

    async def aclose(self) -> None:
        """Close this loop's connections; the next call opens new ones."""

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""


def perform(effect: Effect, transport: Exchange | None, deadline: float) -> Any:
    """Carry out one effect."""
    if type(effect) is Command:  # by far the most
        assert transport is not None
        return transport.call(effect, deadline)
    if isinstance(effect, Call):
        return effect.function(*effect.args)
    if isinstance(effect, Sleep):
        return time.sleep(effect.seconds)
    assert transport is not None
    if isinstance(effect, Ask):
        if effect.view is None:
            return transport.run(effect.commands, deadline)
        return transport.run(effect.commands, deadline, effect.view)
    if isinstance(effect, Meanwhile):
        with ThreadPoolExecutor(1, "redishacks-meanwhile") as pool:
            asked = pool.submit(transport.run, effect.ask.commands, deadline)
            called = effect.call.function(*effect.call.args)
        return called, asked.result()
    raise TypeError(effect)


async def perform_async(effect: Effect, transport: AsyncExchange | None, deadline: float) -> Any:
    """Carry out one effect; a sync function is called in a thread, since it may block."""
    if isinstance(effect, Call):
        if inspect.iscoroutinefunction(effect.function):
            return await effect.function(*effect.args)
        return await asyncio.to_thread(effect.function, *effect.args)
    if isinstance(effect, Sleep):
        return await asyncio.sleep(effect.seconds)
    assert transport is not None
    if isinstance(effect, Ask):
        if effect.view is None:
            return await transport.run(effect.commands, deadline)
        return await transport.run(effect.commands, deadline, effect.view)
    if isinstance(effect, Meanwhile):
        asked = asyncio.ensure_future(transport.run(effect.ask.commands, deadline))
        try:
            called = await perform_async(effect.call, transport, deadline)
        except BaseException:
            asked.cancel()
            raise
        return called, await asked
    return await transport.call(effect, deadline)


def drive(steps: Steps[T], transport: Exchange | None = None, deadline: float = 1.0) -> T:
    """Run steps to their end; an effect that fails is thrown into them."""
    move: Callable[[Any], Effect] = steps.send
    value: Any = None
    while True:
        try:
            effect = move(value)
            move, value = steps.send, perform(effect, transport, deadline)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException as error:
            # Also what a signal handler raised between two moves: the steps must clean up.
            if inspect.getgeneratorstate(steps) != inspect.GEN_SUSPENDED:
                raise
            move, value = steps.throw, error


async def drive_async(
    steps: Steps[T], transport: AsyncExchange | None = None, deadline: float = 1.0
) -> T:
    """Run steps to their end in a task; a cancellation is thrown into them too."""
    move: Callable[[Any], Effect] = steps.send
    value: Any = None
    while True:
        try:
            effect = move(value)
            move, value = steps.send, await perform_async(effect, transport, deadline)
        except StopIteration as stop:
            result: T = stop.value
            return result
        except BaseException as error:
            if inspect.getgeneratorstate(steps) != inspect.GEN_SUSPENDED:
                raise
            move, value = steps.throw, error
