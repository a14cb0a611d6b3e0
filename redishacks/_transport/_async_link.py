"""One multiplexed connection of one event loop.

The loop is asked for nothing but `add_reader` and `add_writer`: a file descriptor of our own can be
closed in a forked child, or after its loop was closed, without a word to that loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from math import inf
from time import monotonic
from typing import Any

import hiredis
from hiredis import PushNotification

from redishacks._transport import _sentinel
from redishacks._transport._decide import CONNECT_DEADLINE, Message, Opening, Talk
from redishacks._transport._loss import Lost, Unreachable
from redishacks._transport._settings import Settings
from redishacks._transport._socket import (
    BACKLOG_PAUSE,
    CLOSED,
    LATE,
    LOOK_AFTER,
    NO_RESP,
    PING_AFTER,
    prepare,
    reason,
)
from redishacks._transport._tls import Tls
from redishacks._transport._wire import MISSING, Address, new_reader

#: Bytes on one connection that are queued or not yet answered; more wait for room.
IN_FLIGHT = 4_000_000

_CHUNK = 262144
#: So many commands are sent at once, not in the loop's next turn: the server works on them while
#: the tasks that were woken together go on to queue theirs.
_EAGER = 16


class Waiter:
    """Someone waiting for replies: one alone, or a list of several."""

    __slots__ = ("count", "data", "end", "future", "replies", "size")

    def __init__(
        self, future: asyncio.Future[Any], data: bytes, count: int | None, end: float
    ) -> None:
        self.future = future
        self.data = data
        self.size = len(data)
        self.count = count
        self.end = end
        self.replies: list[Any] = []

    def settle(self, result: Any) -> None:
        """Hand over a reply, a list of them or a `Lost`, unless nobody waits any more."""
        if not self.future.done():
            self.future.set_result(result)


class Link:
    """A connection that many tasks share. Its waiters get `Lost` as a value, never raised.

    It is there before it has a socket, so that a fork while it connects finds that socket.
    """

    _fd = -1
    #: Until it has a file descriptor of its own.
    _sock: socket.socket | None = None
    #: Called with what the server says unasked (a push of RESP3).
    on_push: Callable[[Any], None] | None = None
    #: Called when it is lost.
    on_loss: Callable[[], None] | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.since = monotonic()
        self.version, self.due = 0, inf
        self.open = True
        self._loop = loop
        self._tls: Tls | None = None
        self._reader = new_reader()
        #: Written and not answered, oldest first.
        self._line: deque[Waiter] = deque()
        #: Not yet written.
        self._queue: list[Waiter] = []
        self._flushing = False
        #: The rest of a write for which the kernel had no room.
        self._rest = b""
        self._in_flight = 0
        self._room: deque[tuple[asyncio.Future[None], int]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._retired = False

    def new_socket(self, family: socket.AddressFamily) -> socket.socket:
        """Make a socket to connect with; raises `Unreachable` when the link was closed."""
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
        self._check_open()
        sock.setblocking(False)
        return sock

    def begin(self, sock: socket.socket, tls: Tls | None) -> None:
        """Use a socket, which is connected; raises `Unreachable` when the link was closed."""
        self._tls = tls
        self._fd = sock.detach()
        self._check_open()
        self._loop.add_reader(self._fd, self._readable)

    def __del__(self) -> None:
        self.abandon()

    def usable(self, now: float) -> bool:
        """Whether a command may be written at once; looks for a closed end after an idle time."""
        if not self._line and now - self.since > LOOK_AFTER:
            return now - self.since <= PING_AFTER and self.look()
        return self.open

    def look(self) -> bool:
        """Whether the server has left it open; sees what the loop had no turn yet to read."""
        if self.open:
            self._readable(looking=True)
        return self.open

    def full(self, size: int) -> bool:
        """Whether a command of this size must wait for room."""
        return bool(self._room) or 0 < self._in_flight > IN_FLIGHT - size

    def submit(self, data: bytes, count: int | None, end: float) -> asyncio.Future[Any]:
        """Queue packed commands; the future gets one reply (count None) or a list of them."""
        self._in_flight += len(data)
        return self._enter(data, count, end)

    async def submit_in_turn(
        self, talk: Talk[Any], message: Message
    ) -> tuple[Message, asyncio.Future[Any]] | None:
        """The same, but wait for room first; raises `Lost` when there is none in time.

        Returns the message as it was written, and None when there must be another plan by now.
        """
        size, end = len(message.data), talk.end
        if self.full(size):
            room: asyncio.Future[None] = self._loop.create_future()
            self._room.append((room, size))
            try:
                async with asyncio.timeout(end - monotonic()):
                    await room
            except BaseException as error:
                self._room = deque(pair for pair in self._room if pair[0] is not room)
                if not room.cancelled():  # room was made in the same moment
                    self._free(size)
                if isinstance(error, TimeoutError):
                    raise Lost("too much is waiting for replies", written=False) from None
                raise
            if not self.open:
                raise Lost(CLOSED, written=False)
        else:
            self._in_flight += size
        told = talk.addressed(message, self, monotonic())
        if told is None:
            self._free(size)
            return None
        self._in_flight += len(told.data) - size
        return told, self._enter(told.data, told.replies, end)

    def retire(self) -> None:
        """Close it once what is in flight has been answered."""
        self._retired = True
        if not self._line and not self._queue:
            self.lose(CLOSED)

    def lose(self, why: str) -> None:
        """Close it; everybody who waits learns whether their command was written."""
        if not self.open:
            return
        self.open = False
        if self._fd < 0:
            return  # it is still connecting: the socket is in use until that has been cancelled
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self.abandon()
        if self._timer is not None:
            self._timer.cancel()
        for waiter in self._line:
            waiter.settle(Lost(why, written=True, replies=waiter.replies))
        for waiter in self._queue:
            waiter.settle(Lost(why, written=False))
        self._line.clear()
        self._queue.clear()
        for room, _ in self._room:
            if not room.done():
                room.set_result(None)
        self._room.clear()
        if self.on_loss is not None:
            self.on_loss()

    def abandon(self) -> None:
        """Close the file descriptor and nothing else: in a forked child, or after the loop."""
        self.open = False
        if self._sock is not None:
            self._sock.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_open(self) -> None:
        if not self.open:
            raise Unreachable(f"connecting: {CLOSED}")

    def _enter(self, data: bytes, count: int | None, end: float) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        waiter = Waiter(future, data, count, end)
        if self._timer is None or end < self._timer_at:
            self._set_timer(end)
        if self._line or self._queue or self._rest:
            self._queue.append(waiter)
            if not self._flushing:
                self._flushing = True
                self._loop.call_soon(self._flush)
            elif len(self._queue) >= _EAGER:
                self._write_queue()
        else:
            self._write((waiter,), data)
        return future

    def _flush(self) -> None:
        self._flushing = False
        self._write_queue()

    def _write_queue(self) -> None:
        if not self.open or self._rest:
            return
        live = []
        for waiter in self._queue:
            if waiter.future.done():
                self._free(waiter.size)  # cancelled or late before it was written: never sent
            else:
                live.append(waiter)
        self._queue.clear()
        if live:
            self._write(live, b"".join([waiter.data for waiter in live]))

    def _write(self, waiters: Iterable[Waiter], data: bytes) -> None:
        if self._tls is not None:
            data = self._tls.seal(data)
        try:
            sent = os.write(self._fd, data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            why = reason(error)
            for waiter in waiters:
                waiter.settle(Lost(why, written=False))
            self.lose(why)
            return
        self._line.extend(waiters)
        if sent < len(data):
            self._rest = data[sent:]
            self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        try:
            sent = os.write(self._fd, self._rest)
        except BlockingIOError:
            return
        except OSError as error:
            self.lose(reason(error))
            return
        self._rest = self._rest[sent:]
        if not self._rest:
            self._loop.remove_writer(self._fd)
            self._flush()

    def _readable(self, *, looking: bool = False) -> None:
        try:
            data = os.read(self._fd, _CHUNK)
            if not data:
                self.lose(CLOSED)
                return
            if self._tls is not None:
                data = self._tls.open(data)
        except BlockingIOError:
            return
        except ssl.SSLError:
            self.lose(CLOSED)
            return
        except OSError as error:
            self.lose(reason(error))
            return
        if not looking:
            self.since = monotonic()
        reader = self._reader
        line = self._line
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not MISSING:
                if type(reply) is PushNotification:
                    if self.on_push is not None:
                        self.on_push(reply)
                    continue
                if not line:
                    self.lose("a reply came that nobody waited for")
                    return
                waiter = line[0]
                if waiter.count is None:
                    future = waiter.future
                    if not future.done():
                        future.set_result(reply)
                else:
                    waiter.replies.append(reply)
                    if len(waiter.replies) < waiter.count:
                        continue
                    waiter.settle(waiter.replies)
                line.popleft()
                self._in_flight -= waiter.size
        except hiredis.ProtocolError:
            self.lose(NO_RESP)
            return
        if self._room:
            self._free(0)
        if self._retired and not line and not self._queue:
            self.lose(CLOSED)

    def _free(self, size: int) -> None:
        self._in_flight -= size
        while self._room:
            room, wanted = self._room[0]
            if 0 < self._in_flight > IN_FLIGHT - wanted:
                return
            self._room.popleft()
            if not room.done():
                self._in_flight += wanted
                room.set_result(None)

    def _set_timer(self, end: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = end
        self._timer = self._loop.call_later(max(0.0, end - monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = monotonic()
        if self._line and self._line[0].end <= now:
            self.lose(LATE)
            return
        for waiter in self._line:
            if waiter.end <= now:
                waiter.settle(Lost(LATE, written=True, replies=waiter.replies))
        for waiter in self._queue:
            if waiter.end <= now:
                waiter.settle(Lost(LATE, written=False))
        left = [each.end for each in chain(self._line, self._queue) if each.end > now]
        if left:
            self._set_timer(min(left))


async def open_link(
    loop: asyncio.AbstractEventLoop, settings: Settings, patience: float, links: set[Link]
) -> Link:
    """Open a connection and say what must be said first."""
    end = monotonic() + CONNECT_DEADLINE
    if settings.sentinel is not None:
        settings = settings.at(await _sentinel.master_async(settings, CONNECT_DEADLINE))
    link = Link(loop)
    links.add(link)
    try:
        sock = await _dial(loop, link, settings, end)
        end = min(end, monotonic() + patience * settings.round_trips)
        tls = None
        if settings.tls is not None:
            async with asyncio.timeout(end - monotonic()):
                tls = await _secure(loop, sock, settings.tls_context(), settings.host)
        credentials = await settings.credentials_async()
        opening = Opening(settings, credentials)
        link.begin(sock, tls)
        replies = await link.submit(opening.data, opening.count, end)
        if isinstance(replies, Lost):
            raise opening.lost(replies)
        opening.judge(replies, link, monotonic())
        return link
    except BaseException as error:
        link.lose(CLOSED)
        link.abandon()
        if isinstance(error, TimeoutError):
            raise Unreachable(f"connecting: {LATE}") from None
        if isinstance(error, OSError):
            raise Unreachable(f"connecting: {reason(error)}") from None
        raise


async def _secure(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, context: ssl.SSLContext, host: str
) -> Tls:
    tls = Tls(context, host)
    try:
        out, done = tls.begin()
        await loop.sock_sendall(sock, out)
        while not done:
            data = await loop.sock_recv(sock, _CHUNK)
            if not data:
                raise Unreachable(f"TLS: {CLOSED}")
            out, done = tls.begin(data)
            await loop.sock_sendall(sock, out)
    except ssl.SSLError as error:
        raise Unreachable(f"TLS: {error.reason or error}") from None
    return tls


async def _dial(
    loop: asyncio.AbstractEventLoop, link: Link, settings: Settings, end: float
) -> socket.socket:
    places = await _places(loop, (settings.host, settings.port))
    why = ""
    for left, (family, place) in zip(range(len(places), 0, -1), places, strict=True):
        sock = link.new_socket(family)
        try:
            async with asyncio.timeout((end - monotonic()) / left):
                await _connect(loop, sock, place)
            if family != socket.AF_UNIX:
                prepare(sock, settings.keepalive_options)
            return sock
        except OSError as error:
            sock.close()
            why = reason(error)
    raise Unreachable(f"connecting: {why}")


async def _connect(loop: asyncio.AbstractEventLoop, sock: socket.socket, place: Any) -> None:
    if sock.family != socket.AF_UNIX:
        await loop.sock_connect(sock, place)
        return
    while True:
        try:
            sock.connect(place)
            return
        except BlockingIOError:
            # A unix socket whose server has a full backlog says so at once instead of waiting.
            await asyncio.sleep(BACKLOG_PAUSE)


async def _places(
    loop: asyncio.AbstractEventLoop, address: Address
) -> list[tuple[socket.AddressFamily, Any]]:
    host, port = address
    if port == 0:
        return [(socket.AF_UNIX, host)]
    try:
        # Without the resolver's thread: none can be started while the interpreter exits.
        version = ipaddress.ip_address(host).version
        return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]
    except ValueError:
        pass
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"host name {host!r}: {error.strerror}") from None
    return [(family, place) for family, _, _, _, place in found]
