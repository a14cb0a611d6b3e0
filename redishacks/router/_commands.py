"""redis-py's commands for who records them or says them to many, and what those return."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from redis.commands import AsyncCoreCommands, CoreCommands

from redishacks.router.replies import Reply

if TYPE_CHECKING:

    class Recorded:
        """Each command returns a `Reply`."""

        def __getattr__(self, name: str) -> Callable[..., Reply]: ...

    class Mixed:
        """A command returns a value, or a `Reply`, or what is to be awaited."""

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    class Spread:
        """Each command returns values by the names of nodes."""

        def __getattr__(self, name: str) -> Callable[..., dict[str, Any]]: ...

    class AsyncSpread:
        """Each command returns values by the names of nodes, to be awaited."""

        def __getattr__(self, name: str) -> Callable[..., Awaitable[dict[str, Any]]]: ...

else:

    class _Commands:
        #: redis-py's commands expect one; nobody listens.
        _event_dispatcher = None

    class Recorded(_Commands, CoreCommands):
        """Each command returns a `Reply`."""

    class Spread(_Commands, CoreCommands):
        """Each command returns values by the names of nodes."""

    class AsyncSpread(_Commands, AsyncCoreCommands):
        """Each command returns values by the names of nodes, to be awaited."""

    Mixed = Recorded
