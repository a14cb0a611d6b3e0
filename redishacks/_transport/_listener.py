"""Hearing what others publish: a connection of its own, which a thread or a task looks after.

It always speaks RESP3, in which messages cannot be taken for replies, and asks every few seconds
whether the server is still there. When it was lost it is made anew, and whoever listens is told
that messages may have been missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import select
import socket
import threading
from collections import deque
from time import monotonic
from typing import Any, Protocol

from hiredis import PushNotification, ReplyError

from redishacks._transport._async_link import Link as AsyncLink
from redishacks._transport._async_link import open_link
from redishacks._transport._decide import CONNECT_DEADLINE, error_text
from redishacks._transport._link import Link
from redishacks._transport._loss import Lost, Refused, Unreachable
from redishacks._transport._settings import Settings
from redishacks._transport._socket import CLOSED, LATE
from redishacks._transport._sync import Channel, Node
from redishacks._transport._wire import PING, pack_words
from redishacks.errors import RedisHacksError, ServerError, UnavailableError


class Audience(Protocol):
    """Who listens."""

    def hear(self, message: bytes) -> None:
        """Take a message; must not block."""

    def missed(self) -> None:
        """Hear that messages may have been missed; must not block."""

    def waiting(self) -> int:
        """Return how many wait for messages."""


#: Seconds between two questions whether the server is there, and for an answer.
_ASK_EVERY, _ANSWER_IN = 5.0, 2.0
#: Seconds between two tries to connect, at first and at most.
_PAUSES = (0.02, 1.0)
#: Seconds after which who waits for a subscription looks whether it was forgotten.
_AGAIN = 0.1
#: Seconds without anybody who listens until the connection is closed.
_IDLE = 30.0
#: Channels heard on a connection, or twice as many as there are waiters, if they are more.
_MOST_CHANNELS = 1000
#: A server that says so says it to everything, and not for long.
_NOT_NOW = frozenset({"LOADING", "MASTERDOWN", "BUSY"})

_log = logging.getLogger("redishacks")


class _Listener:
    """What both colours know: which channels are wanted, and which are heard."""

    def __init__(self, settings: Settings, audience: Audience) -> None:
        self._settings = dataclasses.replace(settings, protocol=3)
        self._audience = audience
        self._wanted: dict[bytes, bool] = {}
        self._on: set[bytes] = set()
        #: Those that were asked for on this connection, and neither refused nor taken away.
        self._known: set[bytes] = set()
        #: Why a channel was refused last, and the how manieth refusal that was.
        self._refused: dict[bytes, tuple[int, str]] = {}
        self._refusals = 0
        self._why = "no connection in time"
        #: When somebody was last seen to listen.
        self._busy_at = monotonic()

    def hears(self, channel: bytes) -> bool:
        """Return whether messages of a channel come in."""
        return channel in self._on

    def _idle(self) -> bool:
        if self._audience.waiting():
            self._busy_at = monotonic()
        return monotonic() > self._busy_at + _IDLE

    def _look_for_room(self) -> None:
        """Begin anew, with those that are wanted now, when most of the channels are no more."""
        if len(self._wanted) > max(_MOST_CHANNELS, 2 * self._audience.waiting()):
            self._wanted.clear()
            raise Lost("too many channels", written=False)

    def _answered(self, channel: bytes | None, reply: Any) -> None:
        """Take the answer to a subscription, or to a mere question."""
        if channel is None:
            return
        if isinstance(reply, ReplyError):
            self._wanted.pop(channel, None)
            self._known.discard(channel)
            self._refusals += 1
            self._refused[channel] = self._refusals, error_text(reply)
        else:
            self._on.add(channel)

    def _pushed(self, push: Any) -> None:
        if push[0] in (b"message", b"smessage"):
            self._audience.hear(push[2])
        elif push[0] == b"sunsubscribe":  # its slot has moved to another node
            self._wanted.pop(push[1], None)
            self._known.discard(push[1])
            self._on.discard(push[1])
            self._audience.missed()

    def _check(self, channel: bytes, since: int, end: float) -> None:
        """Raise when a channel is not to be heard: after so many refusals there was another."""
        count, text = self._refused.get(channel, (0, ""))
        if count > since:
            raise ServerError(text)
        if monotonic() >= end:
            raise UnavailableError(f"listening to messages: {self._why}")


def _look(reply: Any) -> None:
    """Raise `Lost` when the server answers nothing for now."""
    if isinstance(reply, ReplyError):
        text = error_text(reply)
        if text.split(" ", 1)[0] in _NOT_NOW:
            raise Lost(text, written=True)


def _subscription(channel: bytes, sharded: bool) -> bytes:
    """Pack a subscription and a question: when that is answered, the subscription is there."""
    packed: bytes = pack_words((b"SSUBSCRIBE" if sharded else b"SUBSCRIBE", channel)) + PING
    return packed


class Listener(_Listener):
    """Hears channels of one node in a thread, which begins with the first of them."""

    def __init__(self, settings: Settings, audience: Audience) -> None:
        super().__init__(settings, audience)
        #: For the transport, which closes its connections in a forked child.
        self.node = Node(self._settings)
        self._guard = threading.RLock()
        self._news = threading.Condition(self._guard)
        self._thread: threading.Thread | None = None
        self._bell = socket.socketpair()
        for end in self._bell:
            end.setblocking(False)

    def __del__(self) -> None:
        for end in getattr(self, "_bell", ()):
            end.close()

    def abandon(self) -> None:
        """In a forked child: let go of the connection, and wake who waited in the parent."""
        self.node.abandon()
        self._audience.missed()

    def subscribe(self, channel: bytes, sharded: bool, deadline: float) -> None:
        """Return when messages of a channel come in; who asks must be present.

        Raises `ServerError`, or `UnavailableError` when that could not be in time.
        """
        end = monotonic() + deadline
        with self._guard:
            since = self._refusals
            self._wanted[channel] = sharded
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="redishacks-wake", daemon=True
                )
                self._thread.start()
            self._ring()
            while channel not in self._on:
                self._check(channel, since, end)
                if channel not in self._wanted:  # all began anew
                    self._wanted[channel] = sharded
                    self._ring()
                self._news.wait(min(end - monotonic(), _AGAIN))

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            self._bell[1].send(b"!")

    def _rest(self, seconds: float) -> None:
        """Pause, unless somebody rings."""
        poll = select.poll()  # select() knows the first 1,024 descriptors only
        poll.register(self._bell[0], select.POLLIN)
        if poll.poll(seconds * 1000):
            self._bell[0].recv(4096)

    def _staying(self) -> bool:
        with self._guard:
            if self._idle():
                on, self._on = self._on, set()
                # Who comes now finds that nothing is heard, or was here before this look.
                if self._idle():
                    self._thread = None
                else:
                    self._on = on
        return self._thread is threading.current_thread()

    def _work(self) -> None:
        shortest, longest = _PAUSES
        pause = shortest
        while self._staying():
            try:
                link = self.node.connect(CONNECT_DEADLINE)
            except (Unreachable, Refused, RedisHacksError) as error:
                self._why = str(error)
                self._rest(pause)
                pause = min(2 * pause, longest)
                continue
            try:
                self._listen(link)
            except Lost as loss:
                self._why = loss.why
                if not self._on:
                    self._rest(pause)
                pause = shortest if self._on else min(2 * pause, longest)
            except Exception:
                _log.exception("hearing messages failed; it begins anew")
            finally:
                self._on.clear()
                self.node.drop(link)

    def _listen(self, link: Channel) -> None:
        assert isinstance(link, Link)
        poll = select.poll()
        poll.register(self._bell[0], select.POLLIN)
        poll.register(link.fileno(), select.POLLIN)
        #: What is asked and not answered: the channel to be heard, and until when.
        asked: deque[tuple[bytes | None, float]] = deque()
        self._known = known = set()
        refusal: Any = None
        next_ask = monotonic() + _ASK_EVERY
        gap = True
        while self._staying():
            self._look_for_room()
            now = monotonic()
            for channel, sharded in list(self._wanted.items()):
                if channel not in known:
                    known.add(channel)
                    asked.append((channel, now + _ANSWER_IN))
                    link.send(_subscription(channel, sharded), now + _ANSWER_IN)
            if not asked and now >= next_ask:
                asked.append((None, now + _ANSWER_IN))
                link.send(PING, now + _ANSWER_IN)
            if not asked and gap:
                gap = False
                self._audience.missed()
            until = asked[0][1] if asked else next_ask
            replies = self._messages(link, poll, until)
            if not replies and asked and monotonic() >= until:
                raise Lost(LATE, written=True)
            for reply in replies:
                if type(reply) is ReplyError:
                    _look(reply)
                    refusal = reply  # of the subscription; the answer to its question follows
                else:
                    with self._guard:
                        self._answered(asked.popleft()[0], refusal)
                        self._news.notify_all()
                    refusal = None
                    next_ask = monotonic() + _ASK_EVERY

    def _messages(self, link: Link, poll: select.poll, until: float) -> list[Any]:
        """Take messages until something else is to be done; return what else came in.

        Whoever a message wakes goes on when this thread lets go of the interpreter: at once.
        """
        bell = self._bell[0].fileno()
        while (rest := until - monotonic()) > 0:
            ready = poll.poll(rest * 1000)
            others = []
            if ready and (ready[0][0] != bell or len(ready) > 1):
                for reply in link.arrived():
                    if type(reply) is PushNotification:
                        self._pushed(reply)
                    else:
                        others.append(reply)
            if ready and ready[0][0] == bell:
                self._bell[0].recv(4096)
                return others
            if others:
                return others
        return []


class AsyncListener(_Listener):
    """`Listener` in a task of one event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, settings: Settings, audience: Audience
    ) -> None:
        super().__init__(settings, audience)
        self.links: set[AsyncLink] = set()
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._bell = asyncio.Event()
        self._news = asyncio.Condition()

    async def subscribe(self, channel: bytes, sharded: bool, deadline: float) -> None:
        """Return when messages of a channel come in, as `Listener.subscribe`."""
        end = monotonic() + deadline
        since = self._refusals
        self._wanted[channel] = sharded
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._work(), name="redishacks-wake")
        self._bell.set()
        async with self._news:
            while channel not in self._on:
                self._check(channel, since, end)
                if channel not in self._wanted:  # all began anew
                    self._wanted[channel] = sharded
                    self._bell.set()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(end - monotonic(), _AGAIN)):
                        await self._news.wait()

    def close(self) -> None:
        """Close the connection now."""
        if self._task is not None:
            self._task.cancel()
        for link in self.links:
            link.lose(CLOSED)

    def abandon(self) -> None:
        """Close file descriptors only, in a forked child or for a closed loop."""
        for link in self.links:
            link.abandon()

    async def _work(self) -> None:
        shortest, longest = _PAUSES
        pause = shortest
        while not self._idle():
            try:
                link = await open_link(self._loop, self._settings, CONNECT_DEADLINE, self.links)
            except (Unreachable, Refused, RedisHacksError) as error:
                self._why = str(error)
                self.links = {link for link in self.links if link.open}
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
                continue
            link.on_push = self._pushed
            link.on_loss = self._bell.set
            try:
                await self._listen(link)
            except Lost as loss:
                self._why = loss.why
                if not self._on:
                    await asyncio.sleep(pause)
                pause = shortest if self._on else min(2 * pause, longest)
            finally:
                self._on.clear()
                link.lose(CLOSED)
                self.links.discard(link)

    async def _listen(self, link: AsyncLink) -> None:
        self._known = known = set()
        gap = True
        while not self._idle():
            self._look_for_room()
            self._bell.clear()
            for channel, sharded in list(self._wanted.items()):
                if channel not in known:
                    known.add(channel)
                    await self._say(link, channel, sharded)
            if gap:
                gap = False
                self._audience.missed()
            try:
                async with asyncio.timeout(_ASK_EVERY):
                    await self._bell.wait()
            except TimeoutError:
                await self._say(link, None, False)
            if not link.open:
                raise Lost(CLOSED, written=True)

    async def _say(self, link: AsyncLink, channel: bytes | None, sharded: bool) -> None:
        words = PING if channel is None else _subscription(channel, sharded)
        reply = await link.submit(words, None, monotonic() + _ANSWER_IN)
        if isinstance(reply, Lost):
            raise reply
        _look(reply)
        async with self._news:
            self._answered(channel, reply)
            self._news.notify_all()
