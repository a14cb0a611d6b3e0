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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from redishacks._command import Command, Steps
from redishacks.errors import RedisHacksError, UsageError
from redishacks.router._blocking import waits
from redishacks.router._coalesce import OTHER, Call
from redishacks.router._commands import Recorded
from redishacks.router._core import Core, Said, in_order
from redishacks.router.replies import BatchError, Reply, Results
from redishacks.router.transaction import Queue


class Batch(Recorded):
    """Records the commands of redis-py, each of which returns a `Reply`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        #: A key alone stands for a plain GET: by far the most.
        self._said: list[Said | bytes | Queue | Command[Any]] = []
        self._results = Results()
        #: Transactions by their places.
        self._queues: dict[int, Queue] = {}

    def execute_command(self, *args: Any, **options: Any) -> Reply:
        """Record a command; raises `UsageError` for what cannot be encoded."""
        if self._results.settled:
            raise UsageError("this batch was sent already: begin another one")
        said = self._said
        reply = Reply.of(self._results, len(said))
        # A command that was made already: a script.
        said.append(args[0] if type(args[0]) is Command else self._core.say(args, options))
        return reply

    @contextmanager
    def transaction(self, *keys: Any) -> Iterator[Queue]:
        """Record commands that go out as one MULTI and EXEC, on the node of their keys."""
        if keys:
            raise UsageError("keys cannot be watched in a batch: use router.transaction(…)")
        queue = Queue(self._core)
        try:
            yield queue
        except BaseException:
            queue.forget()
            raise
        if len(queue):
            self._queues[len(self._said)] = queue
            self._said.append(queue)

    def get(self, name: Any) -> Reply:
        """Record a GET; raises `UsageError` for what cannot be encoded."""
        kind = type(name)
        if kind is not bytes:
            # Spelled out, since most batches are thousands of these.
            plain = kind is str and name.isascii()
            name = name.encode() if plain else self._core.dialect.encode(name)
        results = self._results
        if results.settled:
            return self.execute_command("GET", name)
        said = self._said
        reply = Reply()
        reply._results = results
        reply._place = len(said)
        said.append(name)
        return reply

    def send(self, *, raises: bool) -> Steps[None]:
        """Say all and settle every reply; if it `raises`, it is a `BatchError` when some failed."""
        core, results, said = self._core, self._results, self._said
        calls: dict[int, Call] = {}
        results.begin(len(said))
        results.locate(lambda place: self._node(place, calls))
        try:
            left: Sequence[int] = range(len(said))
            if set(map(type, said)) == {bytes}:
                left = yield from core.settle_gets(cast(list[bytes], said), results)
            for place in left:
                one = said[place]
                try:
                    if isinstance(one, Command):
                        calls[place] = Call(OTHER, one)
                    elif isinstance(one, Queue):
                        calls[place] = Call(OTHER, (yield from one.as_command()))
                    else:
                        said_so = core.say(("GET", one), {}) if isinstance(one, bytes) else one
                        made = yield from core.call(said_so)
                        if waits(said_so[0]):
                            yield from self._refuse(made.command)
                        calls[place] = made
                except RedisHacksError as error:
                    results.errors[place] = error
            in_order(calls)
            yield from core.settle(calls, results)
        finally:
            results.end()
            for place, queue in self._queues.items():
                if place in results.errors:
                    queue.fail(results.errors[place])
        if raises and (results.errors or any(queue.failed for queue in self._queues.values())):
            raise BatchError(
                [
                    reply
                    for place in range(len(said))
                    for reply in (
                        self._queues[place].replies
                        if place in self._queues
                        else [Reply.of(results, place)]
                    )
                ]
            )

    def _node(self, place: int, calls: Mapping[int, Call]) -> str:
        one = self._said[place]
        if isinstance(one, bytes):
            return self._core.routes.where((one,))
        return self._core.routes.where(calls[place].command.keys) if place in calls else ""

    def _refuse(self, command: Command[Any]) -> Steps[None]:
        yield from self._core.learn()
        self._core.together(command.keys)
        name = bytes(command.args[0]).decode()  # type: ignore[arg-type]
        raise UsageError(f"{name} waits, and a batch would wait with it: say it alone")

    def forget(self) -> None:
        """Send nothing."""
        self._results.begin(len(self._said))
        self._results.abandon()
        for queue in self._queues.values():
            queue.forget()

    def __len__(self) -> int:
        return len(self._said)
