"""`map()`: many commands in one exchange, written to all nodes and then read from all.

    with router.map(deadline=0.2) as m:
        hits = [m.get(key) for key in keys]
        m.incr("visits")
    [hit.value for hit in hits]

Nothing is sent before the block is left, and nothing at all when its body raises. Then every
command ends as a value or an error, whatever became of the others; order is kept per node. Runs of
GET to one node go out as one MGET, runs of plain SET as one MSET.
"""

from __future__ import annotations

from typing import Any

from redis.commands import CoreCommands

from redishacks._command import Steps
from redishacks.errors import RedisHacksError, UsageError
from redishacks.router._coalesce import Call
from redishacks.router._core import Core, Said
from redishacks.router.replies import BatchError, Reply, Results


class Batch(CoreCommands):
    """Records the commands of redis-py, each of which returns a `Reply`."""

    #: redis-py's commands expect one; nobody listens.
    _event_dispatcher: Any = None

    def __init__(self, core: Core) -> None:
        self._core = core
        self._said: list[Said] = []
        self._replies: list[Reply] = []
        self._results = Results()

    def execute_command(self, *args: Any, **options: Any) -> Reply:
        """Record a command; raises `UsageError` for what cannot be encoded."""
        if self._results.settled:
            raise UsageError("this batch was sent already: begin another one")
        self._said.append(self._core.say(args, options))
        reply = Reply(self._results, len(self._replies))
        self._replies.append(reply)
        return reply

    def send(self, *, raises: bool) -> Steps[None]:
        """Say all and settle every reply; if it `raises`, it is a `BatchError` when some failed."""
        core, results = self._core, self._results
        calls: dict[int, Call] = {}
        for place, said in enumerate(self._said):
            try:
                calls[place] = yield from core.call(said)
            except RedisHacksError as error:
                results.errors[place] = error
        yield from core.settle(calls, results, len(self._said))
        if raises and results.errors:
            raise BatchError(self._replies)

    def forget(self) -> None:
        """Send nothing."""
        self._results.begin(len(self._said))
        self._results.abandon()

    def __len__(self) -> int:
        return len(self._replies)
