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
from redishacks._transport._cluster import SlotMap
from redishacks._transport._wire import ASKING, Address, name, pack, parse_address, show
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

#: Seconds for making a connection, apart from a command's deadline. Name resolution is outside.
CONNECT_DEADLINE = 2.0

FIRST_PAUSE = 0.005
LONGEST_PAUSE = 0.1

# Before version 7 an error inside a script is wrapped, sometimes twice.
_WRAPPED = re.compile(r"^ERR Error running script .*?(?:@user_script:\s?\d+: )+-?(?=[A-Z]+ )", re.S)


class Lost(Exception):
    """An exchange that did not end: what was written, and the replies until then."""

    def __init__(self, why: str, *, written: bool, replies: Sequence[Any] = ()) -> None:
        super().__init__(why)
        self.why = why
        self.written = written
        self.replies = replies


class Unreachable(Exception):
    """No connection could be made; nothing was sent."""


class Refused(Exception):
    """A new connection was refused for now; nothing was sent."""


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


class Talk(Generic[T]):
    """One run of commands, from the first attempt to an outcome for each."""

    def __init__(
        self,
        commands: Sequence[Command[T]],
        deadline: float,
        now: float,
        home: Address,
        slots: SlotMap | None = None,
    ) -> None:
        self.deadline = deadline
        self.end = now + deadline
        #: Nodes whose connections should not be used again.
        self.estranged: set[Address] = set()
        self._commands = commands
        self._home = home
        self._slots = slots
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

    def plan(self) -> list[Message]:
        """Return what to say in this round."""
        groups: dict[Address, list[Part]] = {}
        packed: dict[int, bytes] = {}
        for index in self._open:
            part = Part(index, index in self._whole, index in self._asking)
            try:
                packed[index] = pack(self._commands[index], part.whole)
                node = self._route(index)
            except UsageError as error:
                self._settle(index, error)
                continue
            if node is not None:
                groups.setdefault(node, []).append(part)
        return [
            Message(
                node,
                parts,
                b"".join(ASKING + packed[i] if asking else packed[i] for i, _, asking in parts),
                len(parts) + sum(part.asking for part in parts),
                any(self._commands[part.place].bulk for part in parts),
            )
            for node, parts in groups.items()
        ]

    def first(self, node: Address) -> Message:
        """Describe an attempt at a single command that was made without `plan`."""
        return Message(node, [Part(0, False, False)], b"", 1, False)

    def answered(self, message: Message, replies: Sequence[Any]) -> None:
        """Take the replies to a message, or the first of them."""
        at = 0
        for part in message.parts:
            at += part.asking
            if at >= len(replies):
                return
            self._answer(part.place, replies[at], message.node)
            at += 1

    def lost(self, message: Message, loss: Lost) -> None:
        """Take note that a message was cut off: every command has its reply, or is repeated when
        that does no harm, or is in doubt.
        """
        self.answered(message, loss.replies)
        at = 0
        for part in message.parts:
            at += part.asking + 1
            if at > len(loss.replies):
                self._lose(part.place, loss, message.node)
        self._doubt_slots(message.node)

    def unsaid(self, message: Message, error: Exception) -> None:
        """Take note that there was no connection for a message: nothing was sent."""
        for index, _, _ in message.parts:
            self._asking.pop(index, None)
            if isinstance(error, Refused):
                self._last[index] = str(error)
                self._hurry = False
            elif isinstance(error, Unreachable):
                self._down[index] = (message.node, str(error))
            else:
                self._settle(index, error)
        self._doubt_slots(message.node)

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
            why = self._last.get(index, "no connection in time")
            self._settle(
                index, UnavailableError(f"{what}: not done within {self.deadline:g} s: {why}")
            )
        return None

    def _route(self, index: int) -> Address | None:
        if index in self._asking:
            return self._asking[index]
        down, why = self._down.get(index, (None, ""))
        if self._slots is None:
            node = self._home
        elif self._slots.known:
            node = self._slots.route(self._commands[index].keys, down)
        else:
            down, why = node, _ = self._home, "no node of the cluster tells its slots"
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
        elif code in REDIRECTED and self._slots is None:
            where = self._where(index, node)
            self._settle(
                index,
                UsageError(
                    f"{where} is a node of a cluster: pass a redis.RedisCluster of its nodes"
                ),
            )
        elif code in REDIRECTED and self._slots is not None:
            self._again(code)
            slot, _, place = rest.partition(" ")
            target = self._slots.place(parse_address(place, node))
            if code == "ASK":
                self._asking[index] = target
            else:
                self._slots.moved(int(slot), target)
                self._doubt_slots()
        elif code in PASSING:
            self._hurry = False
            if code == "CLUSTERDOWN":
                self._doubt_slots()
        elif code in ESTRANGED:
            self._again(code)
            self._doubt_slots(node)
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

    def _doubt_slots(self, node: Address | None = None) -> None:
        if self._slots is not None:
            self._slots.doubt(node)

    def _again(self, trouble: str) -> None:
        # The first time at once; the same trouble twice is worth a pause.
        if trouble in self._seen:
            self._hurry = False
        self._seen.add(trouble)

    def _where(self, index: int, node: Address) -> str:
        return f"{name(self._commands[index])} on {show(node)}"

    def _settle(self, index: int, error: Exception) -> None:
        self._outcomes[index] = Outcome(None, error)
