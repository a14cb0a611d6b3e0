"""`fanout()`: a command for each of several nodes, and what each said.

    router.fanout().dbsize()                         # {"a": 33489, "b": 33554, "c": 33462}
    router.fanout(["a"]).info("memory")
    router.fanout(destroy=True).flushdb()            # the router's own keys stay

They are asked at the same time. What redis-py would return for one node is the value for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redishacks._command import Command, Steps, ask_all
from redishacks._drive import AsyncExchange, Exchange, drive, drive_async
from redishacks.errors import UsageError
from redishacks.router._commands import AsyncSpread, Spread
from redishacks.router._core import Core
from redishacks.router.replies import BatchError, Reply, Results

#: What is not done to all nodes by mistake.
_DESTROYS = {b"FLUSHDB", b"FLUSHALL", b"SHUTDOWN", b"SWAPDB", b"DEBUG", b"REPLICAOF", b"SLAVEOF"}
#: What would change a connection that others use: its name says by which version it goes.
_CHANGES = {
    *(b"SELECT", b"RESET", b"HELLO", b"AUTH", b"QUIT", b"READONLY", b"READWRITE", b"ASKING"),
    *(b"MULTI", b"EXEC", b"DISCARD", b"WATCH", b"UNWATCH", b"MONITOR", b"SYNC", b"PSYNC"),
    *(b"SUBSCRIBE", b"PSUBSCRIBE", b"SSUBSCRIBE"),
}
_CLIENT_CHANGES = {b"SETNAME", b"REPLY", b"TRACKING", b"CACHING", b"NO-EVICT", b"NO-TOUCH"}


class _Fanout:
    """What both colours say."""

    def __init__(
        self, core: Core, names: Sequence[str] | None, *, destroy: bool, deadline: float
    ) -> None:
        self._core = core
        self._names = names
        self._destroy = destroy
        self._deadline = deadline

    def _say(self, args: Sequence[Any], options: Mapping[str, Any]) -> Steps[dict[str, Any]]:
        words, parse = self._core.say(args, options)
        word, option = words[0].upper(), words[1].upper() if len(words) > 1 else b""
        if word in _CHANGES or (word == b"CLIENT" and option in _CLIENT_CHANGES):
            raise UsageError(
                f"{words[0].decode()} would change a connection that others use: take a client of "
                "your own for that"
            )
        if words[0].upper() in _DESTROYS and not self._destroy:
            raise UsageError(
                f"{words[0].decode()} for several nodes: say fanout(destroy=True) if that is meant"
            )
        yield from self._core.learn()
        every = self._core.routes.every()
        names = list(every) if self._names is None else list(self._names)
        for name in names:
            if name not in every:
                raise UsageError(f"there is no node {name}; there are {', '.join(every)}")
        results = Results()
        results.begin(len(names))
        results.locate(names.__getitem__)
        command: Command[Any] = self._core.routes.kept(words) or Command(words)
        commands = [command._replace(parse=parse, node=every[name]) for name in names]
        try:
            outcomes = yield from ask_all(commands)
            for place, outcome in enumerate(outcomes):
                results.settle(place, outcome)
        finally:
            results.end()
        if results.errors:
            raise BatchError([Reply.of(results, place) for place in range(len(names))])
        return dict(zip(names, results.values, strict=True))


class Fanout(_Fanout, Spread):
    """redis-py's commands, each said to several nodes; returns values by the names of nodes.

    Raises `BatchError` when some fail: its replies, each with its `node`, are those of all.
    """

    def __init__(self, core: Core, exchange: Exchange, *args: Any, **more: Any) -> None:
        super().__init__(core, *args, **more)
        self._exchange = exchange

    def execute_command(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Say a command to each node."""
        return drive(self._say(args, options), self._exchange, self._deadline)


class AsyncFanout(_Fanout, AsyncSpread):
    """`Fanout` for asyncio."""

    def __init__(self, core: Core, exchange: AsyncExchange, *args: Any, **more: Any) -> None:
        super().__init__(core, *args, **more)
        self._exchange = exchange

    async def execute_command(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Say a command to each node."""
        return await drive_async(self._say(args, options), self._exchange, self._deadline)
