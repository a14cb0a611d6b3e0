"""`transaction()`: MULTI and EXEC on the node of some keys, with WATCH or without.

    with router.transaction() as t:                  # all or nothing, one exchange
        visits = t.incr("{user:1}:visits")
        t.expire("{user:1}:visits", 3600)
    visits.value

    with router.transaction("{user:1}:balance") as t:    # what is named is watched
        balance = int(t.get("{user:1}:balance") or 0)    # said at once, until multi()
        t.multi()
        t.set("{user:1}:balance", balance - 10)

raises `WatchError` when a watched key was changed meanwhile: nothing was done, begin again. In a
batch, `m.transaction()` is the first form: its commands go out together with all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hiredis import ReplyError

from redishacks._clock import clock
from redishacks._command import Command, Outcome, Sleep, Steps, ask, call
from redishacks._drive import drive, drive_async
from redishacks._transport import Overtaken, Words, pack_words
from redishacks.errors import RedisHacksError, ServerError, UsageError
from redishacks.router._commands import Mixed, Recorded
from redishacks.router._core import Core, Said
from redishacks.router._dialect import value_of
from redishacks.router.replies import BatchError, Reply, Results

_MULTI, _EXEC = (b"MULTI",), (b"EXEC",)
#: Seconds before a conversation is begun anew where keys are moving.
PAUSE = 0.01


class WatchError(RedisHacksError):
    """A watched key was changed: nothing of the transaction was done. Begin it again."""


class _Queue:
    """Records the commands of a transaction, and settles what became of them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._said: list[Said] = []
        self._results = Results()

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Record a command; raises `UsageError` for what cannot be encoded."""
        self._check_open()
        reply = Reply.of(self._results, len(self._said))
        self._said.append(self._core.say(args, options))
        return reply

    def __len__(self) -> int:
        return len(self._said)

    # For those who send it

    def words(self) -> list[Words]:
        """Return all that is said."""
        return [_MULTI, *(words for words, _ in self._said), _EXEC]

    def as_command(self) -> Steps[Command[None]]:
        """Return the transaction as one command; raises `UsageError`."""
        keys: list[bytes] = []
        for said in self._said:
            keys += (yield from self._core.command(said)).keys
        data = b"".join(map(pack_words, self.words()))
        count = len(self._said) + 2
        unique = tuple(dict.fromkeys(keys))
        self._results.locate(lambda place: self._core.routes.where(unique))
        return Command(("EXEC",), unique, self.hear, packed=data, replies=count)

    def hear(self, replies: Sequence[Any]) -> None:
        """Settle all; raises `WatchError`, and `ServerError` when nothing was done."""
        results, last = self._results, replies[-1]
        if isinstance(last, ReplyError):
            first = next(each for each in replies if isinstance(each, ReplyError))
            raise ServerError(str(first))
        if last is None:
            raise WatchError("a watched key was changed: nothing was done")
        results.begin(len(self._said))
        for place, (reply, (_, parse)) in enumerate(zip(last, self._said, strict=True)):
            if isinstance(reply, ReplyError):
                results.settle(place, Outcome(None, ServerError(str(reply))))
            else:
                results.settle(place, Outcome(parse(reply)))
        results.end()

    @property
    def replies(self) -> list[Reply]:
        """The replies of all commands."""
        return [Reply.of(self._results, place) for place in range(len(self._said))]

    @property
    def failed(self) -> bool:
        """Whether any of them has ended with an error."""
        return bool(self._results.errors)

    def forget(self) -> None:
        """Let nothing be pending: what was not settled was not sent."""
        if not self._results.settled:
            self._results.begin(len(self._said))
            self._results.abandon()

    def fail(self, error: Exception) -> None:
        """Let all have ended with an error."""
        self._results.begin(len(self._said))
        for place in range(len(self._said)):
            self._results.errors[place] = error
        self._results.end()

    def check(self) -> None:
        """Raise `BatchError` when some failed."""
        if self.failed:
            raise BatchError(self.replies)

    def _check_open(self) -> None:
        if self._results.settled:
            raise UsageError("this transaction has ended: begin another one")


class Queue(_Queue, Recorded):
    """Records the commands of a transaction, each of which returns a `Reply`."""


class _Transaction(_Queue, Mixed):
    """What both colours of a transaction share."""

    def __init__(
        self, core: Core, watched: Sequence[bytes], conversation: Any, deadline: float
    ) -> None:
        super().__init__(core)
        self._watched = watched
        self._conversation = conversation
        self._deadline = deadline
        self._queues = conversation is None
        self._done = False

    def multi(self) -> None:
        """Record commands from now on, to be said together when the block is left."""
        if self._queues:
            raise UsageError("commands are recorded already")
        self._queues = True

    def commit(self) -> Steps[None]:
        """Say what was recorded; raises `WatchError` and `BatchError`."""
        if not len(self):
            return
        try:
            command = yield from self.as_command()
            if self._conversation is None:
                yield from ask(command)
            else:
                yield from self._here(command.keys)
                replies = yield from call(self._conversation.ask, self.words(), self._deadline)
                self._done = True
                self.hear(replies)
        except Exception as error:
            self.fail(error)
            raise
        except BaseException:
            self._results.begin(len(self))
            self._results.end()
            raise
        self.check()

    def leave(self) -> None:
        """Give the connection back, or end it: else it would go on watching."""
        self.forget()
        if self._conversation is not None:
            self._conversation.close(keep=self._done)

    def _now(self, args: Sequence[Any], options: Mapping[str, Any]) -> Steps[Any]:
        """Say a command at once, which must be for the node of what is watched."""
        self._check_open()
        said = self._core.say(args, options)
        command = yield from self._core.command(said)
        yield from self._here(command.keys)
        (reply,) = yield from call(self._conversation.ask, [said[0]], self._deadline)
        return value_of(reply, said[1])

    def _here(self, keys: Sequence[bytes]) -> Steps[None]:
        """See that keys are on the node of what is watched; raises `CrossNodeError`."""
        self._core.together((*self._watched, *keys))
        if not self._conversation.settled:
            # Keys that are not watched may still be on the node that they are moving away from.
            yield from ask(Command(("EXISTS", *keys), tuple(keys), repeatable=True))


class Transaction(_Transaction):
    """A transaction that may watch keys: then commands are said at once until `multi()`."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Say a command, or record it."""
        if self._queues:
            return super().execute_command(*args, **options)
        exchange: Any = self._core.transport
        return drive(self._now(args, options), exchange, self._deadline)


class AsyncTransaction(_Transaction):
    """`Transaction` for asyncio: what is said at once is awaited, what is recorded is not."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Say a command, to be awaited, or record it."""
        if self._queues:
            return super().execute_command(*args, **options)
        exchange: Any = self._core.transport
        return drive_async(self._now(args, options), exchange, self._deadline)


def watch(core: Core, keys: Sequence[bytes], deadline: float) -> Steps[Any]:
    """Return a connection that watches keys; None when there are none."""
    if not keys:
        return None
    end = clock() + deadline
    while True:
        talk = yield from call(core.transport.converse, keys, deadline)
        try:
            (reply,) = yield from call(talk.ask, [(b"WATCH", *keys)], deadline)
            value_of(reply, bool)
            return talk
        except Overtaken:
            talk.close(keep=False)
            if clock() >= end:
                raise
            yield Sleep(PAUSE)  # a slot of a cluster that moves says so until it has moved
        except BaseException:
            talk.close(keep=False)
            raise
