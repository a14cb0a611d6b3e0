"""A connection for one conversation: what blocks, and what must stay on one connection (WATCH).

It goes by the view that was known when it was taken. Where keys move, that one is waited for, or
ended; whoever talks over it then hears so.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

from hiredis import ReplyError

from redishacks._transport._async_link import Link as AsyncLink
from redishacks._transport._decide import REDIRECTED, Message, Talk
from redishacks._transport._loss import Lost, Overtaken, Refused, Unreachable
from redishacks._transport._routes import Routes, View
from redishacks._transport._socket import CLOSED, LATE
from redishacks._transport._wire import Address, Words, pack_words, show
from redishacks.errors import MaybeAppliedError, UnavailableError

_OVERTAKEN = "who has these keys is known better by now; nothing was done"


class Terms:
    """By what one conversation goes, and how it judges what came of a word."""

    def __init__(self, address: Address, routes: Routes | None, view: View | None) -> None:
        self.address = address
        self._routes, self._view = routes, view

    @property
    def settled(self) -> bool:
        """No key was moving when it began."""
        return self._view is None or self._view.settled

    def closed(self) -> Exception:
        """Return the error of a connection that was closed before anything was said."""
        return UnavailableError(f"{show(self.address)}: {CLOSED}; nothing was said over it")

    def talk(self, deadline: float) -> Talk[Any]:
        """Begin an exchange."""
        return Talk((), deadline, monotonic(), self.address, self._routes, self._view)

    def message(self, words: Sequence[Words]) -> Message:
        """Return what is said in one write."""
        data = b"".join(map(pack_words, words))
        version = self._view.version if self._view is not None else 0
        return Message(self.address, [], data, len(words), False, version)

    def lost(self, loss: Lost) -> Exception:
        """Return the error of an exchange that did not end."""
        if self._routes is not None:
            if loss.why is LATE and not loss.replies:
                self._routes.failed(self.address, silent=True)
            self._routes.doubt(self.address)
        if loss.written:
            return MaybeAppliedError(
                f"{show(self.address)}: sent, then {loss.why}; it took effect once or never"
            )
        return UnavailableError(f"{show(self.address)}: {loss.why}")

    def judged(self, talk: Talk[Any], told: Message, replies: Sequence[Any]) -> list[Any]:
        """Return the replies to what was asked; raises `Overtaken` for a node of other keys."""
        talk.answered(told, replies)
        found = list(replies[told.ahead :])
        for reply in found:
            if isinstance(reply, ReplyError):
                code, _, rest = str(reply).partition(" ")
                if code in REDIRECTED and self._routes is not None:
                    self._routes.redirected(code, rest, self.address)
                    raise Overtaken(_OVERTAKEN)
        return found


class Conversation:
    """Several exchanges over one connection, which nobody else uses meanwhile."""

    def __init__(self, node: Any, link: Any, terms: Terms) -> None:
        self._node, self._link, self._terms = node, link, terms
        self._whole = True

    @property
    def settled(self) -> bool:
        """No key was moving when it began."""
        return self._terms.settled

    @property
    def due(self) -> bool:
        """Whether its node is to be asked, with the next word, if it knows of a newer view."""
        return bool(monotonic() >= self._link.due)

    def ask(self, words: Sequence[Words], deadline: float) -> list[Any]:
        """Say some words; returns their replies, errors as values.

        Raises `UnavailableError` when none was said, `Overtaken` when who has the keys is known
        better by now, and `MaybeAppliedError` when nobody knows.
        """
        talk = self._terms.talk(deadline)
        told = talk.addressed(self._terms.message(words), self._link, monotonic())
        if told is None:
            raise Overtaken(_OVERTAKEN)
        self._whole = False
        if not self._link.alive():
            raise self._terms.closed()
        try:
            self._link.send(told.data, talk.end)
            replies = self._link.replies(told.replies, talk.end)
        except Lost as loss:
            raise self._terms.lost(loss) from None
        self._whole = True
        return self._terms.judged(talk, told, replies)

    def close(self, *, keep: bool = True) -> None:
        """Give the connection back, or end it where an exchange has not come to its end."""
        if self._whole and keep:
            self._node.give(self._link)
        else:
            self._node.drop(self._link)


class AsyncConversation:
    """`Conversation` for asyncio."""

    def __init__(self, node: Any, link: AsyncLink, terms: Terms) -> None:
        self._node, self._link, self._terms = node, link, terms
        self._whole = True

    @property
    def settled(self) -> bool:
        """No key was moving when it began."""
        return self._terms.settled

    @property
    def due(self) -> bool:
        """Whether its node is to be asked, with the next word, if it knows of a newer view."""
        return monotonic() >= self._link.due

    async def ask(self, words: Sequence[Words], deadline: float) -> list[Any]:
        """Say some words, as `Conversation.ask`."""
        talk = self._terms.talk(deadline)
        told = talk.addressed(self._terms.message(words), self._link, monotonic())
        if told is None:
            raise Overtaken(_OVERTAKEN)
        self._whole = False
        if not self._link.look():
            raise self._terms.closed()
        replies = await self._link.submit(told.data, told.replies, talk.end)
        if isinstance(replies, Lost):
            raise self._terms.lost(replies)
        self._whole = True
        return self._terms.judged(talk, told, replies)

    def close(self, *, keep: bool = True) -> None:
        """Give the connection back, or end it where an exchange has not come to its end."""
        self._node.give(self._link, whole=self._whole and keep)


def check_asked(routes: Routes | None, address: Address, patience: float) -> None:
    """Raise `UnavailableError` for a node that did not answer a moment ago."""
    if routes is not None and routes.troubled:
        why = routes.broken(address, patience)
        if why is not None:
            raise UnavailableError(f"{show(address)}: {why}")


def unsaid(
    routes: Routes | None, address: Address, error: Unreachable | Refused, end: float
) -> None:
    """Take note that there was no connection; raises `UnavailableError` unless it is tried again.

    A new connection is refused when its node knows of a newer view: that is read first.
    """
    if routes is not None:
        if isinstance(error, Unreachable):
            routes.failed(address, silent=False)
        routes.doubt(address)
    if routes is None or isinstance(error, Unreachable) or monotonic() >= end:
        raise UnavailableError(f"{show(address)}: {error}") from None
