"""A hook around every command, for tracing: we bypass what others hang into redis-py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, TypeVar

from redishacks._command import Command, Outcome
from redishacks._transport._async import AsyncTransport
from redishacks._transport._routes import View
from redishacks._transport._sync import SyncTransport
from redishacks._transport._wire import name

T = TypeVar("T")

#: Called after each command with its name, node, seconds and error (None when it went well).
Hook = Callable[[str, str, float, BaseException | None], object]

_log = logging.getLogger("redishacks")


class Observed:
    """A transport that tells a hook about every command; those of one `run` share its time."""

    def __init__(self, transport: SyncTransport, hook: Hook) -> None:
        self._transport = transport
        self._hook = hook

    def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error."""
        started = monotonic()
        try:
            result = self._transport.call(command, deadline)
        except BaseException as error:
            _tell(self._hook, self._transport, command, monotonic() - started, error)
            raise
        _tell(self._hook, self._transport, command, monotonic() - started, None)
        return result

    def run(
        self, commands: Sequence[Command[T]], deadline: float, view: View | None = None
    ) -> list[Outcome[T]]:
        """Say several; every one ends as a value or an error, in order."""
        started = monotonic()
        outcomes = self._transport.run(commands, deadline, view)
        seconds = monotonic() - started
        for command, outcome in zip(commands, outcomes, strict=True):
            _tell(self._hook, self._transport, command, seconds, outcome.error)
        return outcomes

    def close(self) -> None:
        """Close idle connections; the next call opens new ones."""
        self._transport.close()

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""
        return self._transport.where(command)

    @property
    def bare(self) -> SyncTransport:
        """The transport without the hook."""
        return self._transport


class AsyncObserved:
    """The same for asyncio."""

    def __init__(self, transport: AsyncTransport, hook: Hook) -> None:
        self._transport = transport
        self._hook = hook

    async def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error."""
        started = monotonic()
        try:
            result = await self._transport.call(command, deadline)
        except BaseException as error:
            _tell(self._hook, self._transport, command, monotonic() - started, error)
            raise
        _tell(self._hook, self._transport, command, monotonic() - started, None)
        return result

    async def run(
        self, commands: Sequence[Command[T]], deadline: float, view: View | None = None
    ) -> list[Outcome[T]]:
        """Say several; every one ends as a value or an error, in order."""
        started = monotonic()
        outcomes = await self._transport.run(commands, deadline, view)
        seconds = monotonic() - started
        for command, outcome in zip(commands, outcomes, strict=True):
            _tell(self._hook, self._transport, command, seconds, outcome.error)
        return outcomes

    async def aclose(self) -> None:
        """Close this loop's connections; the next call opens new ones."""
        await self._transport.aclose()

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""
        return self._transport.where(command)

    @property
    def bare(self) -> AsyncTransport:
        """The transport without the hook."""
        return self._transport


def _tell(
    hook: Hook,
    transport: SyncTransport | AsyncTransport,
    command: Command[Any],
    seconds: float,
    error: BaseException | None,
) -> None:
    try:
        hook(name(command), transport.where(command), seconds, error)
    except Exception:
        # An observer's own error must not change what the caller hears about the command.
        _log.exception("the on_command hook failed")
