"""What to do next: from an error reply or a lost connection to a verdict. No I/O, no clock.

A `Talk` holds one run of commands from first to last attempt. The two drivers, sync and asyncio,
carry its rounds to the servers and tell it what came back; every rule about repeating is here:

- A refusal that applied nothing (loading, moved slot, wrong role) is repeated until the deadline.
- What was never sent is repeated.
- What was sent and not answered is repeated only when the command says that this is harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import hiredis

from redishacks._command import Command, Outcome
from redishacks._transport._loss import Lost, Overtaken, Refused, Unreachable
from redishacks._transport._routes import COURTESY, PULL, WAIT, Routes, Standing, View
from redishacks._transport._settings import Settings
from redishacks._transport._socket import LATE
from redishacks._transport._wire import (
    ASKING,
    Address,
    handshake,
    name,
    pack,
    pack_words,
    show,
)
from redishacks.errors import MaybeAppliedError, ServerError, UnavailableError, UsageError

T = TypeVar("T")

#: Refused for now, nothing applied: the same words may be said again in a moment.
PASSING = frozenset({"LOADING", "MASTERDOWN", "TRYAGAIN", "CLUSTERDOWN", "BUSY"})
#: The connection leads to the wrong server or has the wrong user: say it again on a new one.
ESTRANGED = frozenset({"READONLY", "NOAUTH", "WRONGPASS"})
#: Another node of the cluster serves the slot.
REDIRECTED = frozenset({"MOVED", "ASK"})
#: Nothing applied, and more of the same will not help soon.
HOPELESS = frozenset({"OOM", "NOREPLICAS", "MISCONF"})

_REFUSALS = PASSING | ESTRANGED | REDIRECTED | HOPELESS

#: Seconds for making a connection, apart from a command's deadline. Name resolution is outside.
CONNECT_DEADLINE = 2.0

FIRST_PAUSE = 0.005
LONGEST_PAUSE = 0.1

# Before version 7 an error inside a script is wrapped, sometimes twice.
_WRAPPED = re.compile(r"^ERR Error running script .*?(?:@user_script:\s?\d+: )+-?(?=[A-Z]+ )", re.S)


def error_text(reply: BaseException) -> str:
    """Return the server's error, out of the wrapping that old servers put around a script's."""
    return _WRAPPED.sub("", str(reply), count=1)


def opened(replies: Iterable[Any], *, fresh_credentials: bool) -> None:
    """Judge the replies to a handshake; raises when the connection is of no use."""
    for reply in replies:
        if not isinstance(reply, hiredis.ReplyError):
            continue
        text = str(reply)
        code = text.split(" ", 1)[0]
        if code in {"WRONGPASS", "NOAUTH"} or "AUTH" in text.split(":", 1)[0]:
            # A credential provider may know a newer password in a moment.
            trouble = Refused if fresh_credentials else Unreachable
            raise trouble(f"authentication failed: {text}")
        if code in PASSING:
            raise Refused(text)
        if "max number of clients" in text:
            raise Unreachable(text)
        raise ServerError(text)


class Opening:
    """What a new connection says first, and what becomes of it."""

    def __init__(self, settings: Settings, credentials: Sequence[str]) -> None:
        self._greeting = greeting = settings.greeting
        self._fresh = settings.credential_provider is not None
        #: Of the view that the connection is told to go by.
        self.version = 0
        client_name = settings.client_name if greeting is None else None
        words = handshake(settings.protocol, credentials, client_name, settings.db)
        self._own = len(words)
        if greeting is not None:
            self.version, more = greeting.words()
            words += more
        self.count = len(words)
        self.data = b"".join(map(pack_words, words))

    def judge(self, replies: Sequence[Any], link: Standing, now: float) -> None:
        """Look at the replies; raises when the connection is of no use."""
        opened(replies[: self._own], fresh_credentials=self._fresh)
        if self._greeting is not None:
            self._greeting.check(self.version, replies[self._own :])
            link.version, link.due = self.version, now + COURTESY

    def lost(self, loss: Lost) -> Unreachable:
        """Return what to raise when it was cut off; raises what the server said before."""
        # A server that is full says so and closes.
        opened(loss.replies, fresh_credentials=False)
        return Unreachable(f"connecting: {loss.why}")


class Part(NamedTuple):
    """One command of a round: its place in the run, and how to say it."""

    place: int
    whole: bool
    asking: bool


class Message(NamedTuple):
    """What one node is told in one write."""

    node: Address
    parts: list[Part]
    data: bytes
    #: How many replies it will have.
    replies: int
    bulk: bool
    #: By which view it goes, and how many replies come first that are about that.
    version: int = 0
    ahead: int = 0


def _refusal(replies: Sequence[Any]) -> Any:
    """Return what stands for several replies: one that says that nothing was done, or all."""
    for reply in replies:
        if type(reply) is hiredis.ReplyError and str(reply).split(" ", 1)[0] in _REFUSALS:
            return reply
    return replies


class Talk(Generic[T]):
    """One run of commands, from the first attempt to an outcome for each."""

    def __init__(
        self,
        commands: Sequence[Command[T]],
        deadline: float,
        now: float,
        home: Address,
        routes: Routes | None = None,
        view: View | None = None,
    ) -> None:
        """Begin it; `view` is what it goes by, whatever is known by then."""
        self.deadline = deadline
        self.end = now + deadline
        #: Nodes whose connections should not be used again.
        self.estranged: set[Address] = set()
        self._commands = commands
        self._home = home
        self._routes = routes
        self._pinned = view
        #: Keys that are where `route` says, and by which version.
        self._pulled: set[tuple[int, bytes]] = set()
        self._open = list(range(len(commands)))
        self._outcomes: list[Outcome[T] | None] = [None] * len(commands)
        self._whole: set[int] = set()
        self._asking: dict[int, Address] = {}
        self._down: dict[int, tuple[Address, str]] = {}
        self._last: dict[int, str] = {}
        self._seen: set[str] = set()
        self._hurry = True
        self._pauses = 0
        self._grace = CONNECT_DEADLINE

    def results(self) -> list[Outcome[T]]:
        """Return the outcomes, once `rest` has said that all is settled."""
        return [outcome for outcome in self._outcomes if outcome is not None]

    def connected(self, seconds: float) -> None:
        """Add the time that connecting took: it has a deadline of its own."""
        seconds = min(seconds, self._grace)
        self._grace -= seconds
        self.end += seconds

    def refused(self, error: Exception) -> None:
        """End all with an error that has nothing to do with any node."""
        for index in self._open:
            self._settle(index, error)
        self._open = []

    def to_pull(self) -> tuple[View, list[bytes]] | None:
        """Return keys that must be moved to their new node before this round, and by which view."""
        view = self._view()
        if view is None or view.settled:
            return None
        keys = [
            key
            for index in self._open
            if self._commands[index].node is None
            and view.moving(self._commands[index].keys) is PULL
            for key in self._commands[index].keys
            if (view.version, key) not in self._pulled
        ]
        return (view, list(dict.fromkeys(keys))) if keys else None

    def pulled(self, view: View, keys: Sequence[bytes], error: Exception | None) -> None:
        """Take note that keys were moved, or what hindered it."""
        if error is None:
            self._pulled.update((view.version, key) for key in keys)
            return
        self._hurry = False
        for index in self._open:
            if not set(keys).isdisjoint(self._commands[index].keys):
                self._last[index] = str(error)

    def plan(self) -> list[Message]:
        """Return what to say in this round."""
        groups: dict[Address, list[Part]] = {}
        packed: dict[int, bytes] = {}
        view = self._view()
        broken: dict[Address, str | None] = {}
        for index in self._open:
            if view is not None and not view.settled and self._must_wait(index, view):
                continue
            part = Part(index, index in self._whole, index in self._asking)
            try:
                packed[index] = pack(self._commands[index], part.whole)
                node = self._route(index, view)
            except UsageError as error:
                self._settle(index, error)
                continue
            if node is None:
                continue
            if self._routes is not None and self._routes.troubled:
                if node not in broken:
                    broken[node] = self._routes.broken(node, self.deadline)
                if (why := broken[node]) is not None:
                    self._settle(index, UnavailableError(f"{self._where(index, node)}: {why}"))
                    continue
            groups.setdefault(node, []).append(part)
        return [
            Message(
                node,
                parts,
                b"".join(ASKING + packed[i] if asking else packed[i] for i, _, asking in parts),
                sum(self._commands[part.place].replies + part.asking for part in parts),
                any(self._commands[part.place].bulk for part in parts),
                view.version if view is not None else 0,
            )
            for node, parts in groups.items()
        ]

    def addressed(self, message: Message, link: Standing, now: float) -> Message | None:
        """Return a message as it is to be written to a connection, now and nothing before it.

        None when the connection goes by a newer view: by now there must be another plan.
        """
        if message.version == link.version and now < link.due:
            return message
        view = self._view()
        if (
            self._routes is None
            or view is None
            or view.version != message.version
            or message.version < link.version
        ):
            if self._pinned is not None:
                for part in message.parts:
                    self._settle(part.place, Overtaken("another plan is needed by now"))
            return None
        words = self._routes.told(view)
        link.version, link.due = view.version, now + COURTESY
        data = b"".join(map(pack_words, words)) + message.data
        return message._replace(data=data, replies=message.replies + len(words), ahead=len(words))

    def first(self, node: Address) -> Message:
        """Describe an attempt at a single command that was made without `plan`."""
        return Message(node, [Part(0, False, False)], b"", 1, False)

    def answered(self, message: Message, replies: Sequence[Any]) -> None:
        """Take the replies to a message, or the first of them."""
        at = message.ahead
        if self._routes is not None and replies:
            if self._routes.troubled:
                self._routes.fine(message.node)
            if at and len(replies) >= at:
                self._routes.heard(message.node, replies[:at])
        for part in message.parts:
            at += part.asking
            command = self._commands[part.place]
            count = command.replies
            if at + count > len(replies):
                return
            reply = replies[at]
            if count > 1 or command.apart:
                reply = replies[at : at + count]
                reply = reply if command.apart else _refusal(reply)
            self._answer(part.place, reply, message.node)
            at += count

    def lost(self, message: Message, loss: Lost) -> None:
        """Take note that a message was cut off: every command has its reply, or is repeated when
        that does no harm, or is in doubt.
        """
        self.answered(message, loss.replies)
        at = message.ahead
        for part in message.parts:
            at += part.asking + self._commands[part.place].replies
            if at > len(loss.replies):
                self._lose(part.place, loss, message.node)
        if self._routes is not None and loss.why is LATE and not loss.replies:
            self._routes.failed(message.node, silent=True)
        self._doubt(message.node)

    def unsaid(self, message: Message, error: Exception) -> None:
        """Take note that there was no connection for a message: nothing was sent."""
        if self._routes is not None and isinstance(error, Unreachable):
            self._routes.failed(message.node, silent=False)
        for index, _, _ in message.parts:
            self._asking.pop(index, None)
            if isinstance(error, Refused):
                self._last[index] = str(error)
                self._hurry = False
            elif isinstance(error, Unreachable):
                self._down[index] = (message.node, str(error))
            else:
                self._settle(index, error)
        self._doubt(message.node)

    def rest(self, now: float) -> float | None:
        """End a round: None when all is settled, else the pause before the next."""
        self._open = [index for index in self._open if self._outcomes[index] is None]
        if not self._open:
            return None
        pause = 0.0
        if not self._hurry:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._pauses)
            self._pauses += 1
        self._hurry = True
        if now + pause < self.end:
            return pause
        for index in self._open:
            what = name(self._commands[index])
            _, down = self._down.get(index, (None, "no connection in time"))
            why = self._last.get(index, down)
            self._settle(
                index, UnavailableError(f"{what}: not done within {self.deadline:g} s: {why}")
            )
        return None

    def _view(self) -> View | None:
        return self._pinned or (self._routes.view if self._routes is not None else None)

    def _must_wait(self, index: int, view: View) -> bool:
        command = self._commands[index]
        what = view.moving(command.keys) if command.node is None else None
        if what is WAIT:
            self._last[index] = "its keys are about to move to another node"
            self._hurry = False
            self._doubt()
        return what is WAIT or (
            what is PULL and any((view.version, key) not in self._pulled for key in command.keys)
        )

    def _route(self, index: int, view: View | None) -> Address | None:
        if index in self._asking:
            return self._asking[index]
        command = self._commands[index]
        down, why = self._down.get(index, (None, ""))
        if command.node is not None:
            node: Address = command.node
        elif self._routes is None:
            node = self._home
        elif view is not None:
            node = view.route(command.keys, down)
            if not command.keys and self._routes.troubled:
                node = self._routes.instead(node)
        else:
            down, why = node, _ = self._home, "no node tells who has which keys"
        if node == down:
            self._settle(index, UnavailableError(f"{self._where(index, node)}: {why}"))
            return None
        return node

    def _answer(self, index: int, reply: Any, node: Address) -> None:
        command = self._commands[index]
        self._asking.pop(index, None)
        self._down.pop(index, None)
        if not isinstance(reply, hiredis.ReplyError):
            try:
                self._outcomes[index] = Outcome(command.parse(reply))
            except Exception as error:
                self._outcomes[index] = Outcome(None, error)
            return
        text = error_text(reply)
        code, _, rest = text.partition(" ")
        self._last[index] = text
        if code == "NOSCRIPT" and command.script is not None and index not in self._whole:
            self._whole.add(index)
        elif code in REDIRECTED:
            target = self._routes.redirected(code, rest, node) if self._routes else None
            if target is None:
                where = self._where(index, node)
                self._settle(
                    index,
                    UsageError(
                        f"{where} is a node of a cluster: pass a redis.RedisCluster of its nodes"
                    ),
                )
                return
            self._again(code)
            if code == "ASK":
                self._asking[index] = target
        elif code in PASSING:
            self._hurry = False
            if code == "CLUSTERDOWN":
                self._doubt()
        elif code in ESTRANGED:
            self._again(code)
            self._doubt(node)
            self.estranged.add(node)
        elif code in HOPELESS:
            self._settle(index, UnavailableError(f"{self._where(index, node)}: {text}"))
        else:
            self._settle(index, ServerError(text))

    def _lose(self, index: int, loss: Lost, node: Address) -> None:
        self._asking.pop(index, None)
        self._last[index] = loss.why
        if loss.written and not self._commands[index].repeatable:
            where = self._where(index, node)
            self._settle(
                index,
                MaybeAppliedError(f"{where}: sent, then {loss.why}; it took effect once or never"),
            )
        else:
            self._again("lost")

    def _doubt(self, node: Address | None = None) -> None:
        if self._routes is not None:
            self._routes.doubt(node)

    def _again(self, trouble: str) -> None:
        # The first time at once; the same trouble twice is worth a pause.
        if trouble in self._seen:
            self._hurry = False
        self._seen.add(trouble)

    def _where(self, index: int, node: Address) -> str:
        return f"{name(self._commands[index])} on {show(node)}"

    def _settle(self, index: int, error: Exception) -> None:
        self._outcomes[index] = Outcome(None, error)
