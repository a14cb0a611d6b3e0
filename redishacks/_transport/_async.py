"""The transport for asyncio: one multiplexed connection per event loop and lane.

What tasks send in the same tick goes out in one write, and replies come back in order. A command
that was cancelled or came late keeps its place in line; its reply is thrown away. Only when the
oldest unanswered command is late is the connection dropped.

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
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from itertools import chain
from time import monotonic
from typing import Any, TypeVar

import hiredis
from hiredis import PushNotification, ReplyError, pack_command

from redishacks._command import Command, Outcome
from redishacks._transport import _cluster, _sentinel
from redishacks._transport._cluster import SlotMap
from redishacks._transport._decide import (
    CONNECT_DEADLINE,
    Lost,
    Message,
    Refused,
    Talk,
    Unreachable,
    opened,
)
from redishacks._transport._foreign import ForeignNode
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
from redishacks._transport._wire import (
    MISSING,
    PING,
    Address,
    handshake,
    new_reader,
    pack,
    show,
)
from redishacks.errors import RedisHacksError

T = TypeVar("T")

#: Bytes on one connection that are queued or not yet answered; more wait for room.
IN_FLIGHT = 4_000_000

_CHUNK = 262144


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
    """A connection that many tasks share. Its waiters get `Lost` as a value, never raised."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, tls: Tls | None = None
    ) -> None:
        self._fd = -1
        self.since = monotonic()
        self.open = True
        self._loop = loop
        self._tls = tls
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
        self._fd = sock.detach()
        loop.add_reader(self._fd, self._readable)

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
        self, data: bytes, count: int | None, end: float
    ) -> asyncio.Future[Any]:
        """The same, but wait for room first; raises `Lost` when there is none in time."""
        if self.full(len(data)):
            room: asyncio.Future[None] = self._loop.create_future()
            self._room.append((room, len(data)))
            try:
                async with asyncio.timeout(end - monotonic()):
                    await room
            except BaseException as error:
                self._room = deque(pair for pair in self._room if pair[0] is not room)
                if not room.cancelled():  # room was made in the same moment
                    self._free(len(data))
                if isinstance(error, TimeoutError):
                    raise Lost("too much is waiting for replies", written=False) from None
                raise
            if not self.open:
                raise Lost(CLOSED, written=False)
        else:
            self._in_flight += len(data)
        return self._enter(data, count, end)

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
        if self._fd >= 0:
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

    def abandon(self) -> None:
        """Close the file descriptor and nothing else: in a forked child, or after the loop."""
        self.open = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

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
        else:
            self._write((waiter,), data)
        return future

    def _flush(self) -> None:
        self._flushing = False
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


class Lane:
    """One connection of a node in one loop: made when first needed, and again when it was lost."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: Settings) -> None:
        self._loop = loop
        self._settings = settings
        self._link: Link | None = None
        #: All that are open, those that only wait for their last replies too.
        self._links: set[Link] = set()
        self._making: asyncio.Task[Link | Exception] | None = None

    def ready(self, now: float) -> Link | None:
        """Return the connection if it can be written to at once."""
        link = self._link
        return link if link is not None and link.usable(now) else None

    async def borrow(self, talk: Talk[Any]) -> Link:
        """Return the connection, a new one if need be.

        Raises `Unreachable`, `Refused` or `ServerError`; nothing was sent then.
        """
        started = monotonic()
        link = self.ready(started)
        if link is not None:
            return link
        if self._making is None:
            self._making = self._loop.create_task(self._make(talk.end - started))
        made = await asyncio.shield(self._making)
        if isinstance(made, Exception):
            raise made
        talk.connected(monotonic() - started)
        return made

    def retire(self) -> None:
        """Use another connection from now on."""
        if self._link is not None:
            self._link.retire()
            self._link = None

    def close(self) -> None:
        """Close every connection now."""
        if self._making is not None:
            self._making.cancel()
        for link in self._links:
            link.lose(CLOSED)
        self._links.clear()

    def abandon(self) -> None:
        """Close file descriptors only, in a forked child or for a closed loop."""
        for link in self._links:
            link.abandon()
        self._links.clear()

    async def _make(self, patience: float) -> Link | Exception:
        try:
            if await self._awake(patience / 2):
                assert self._link is not None
                return self._link
            link = await _open(self._loop, self._settings, patience, self._links)
            self._link = link
            return link
        except (Unreachable, Refused, RedisHacksError) as error:
            return error
        finally:
            self._making = None
            self._links = {link for link in self._links if link.open}

    async def _awake(self, patience: float) -> bool:
        # Idle for long: a firewall may have forgotten the connection without a word.
        link = self._link
        if link is None or not link.look():
            return False
        reply = await link.submit(PING, None, monotonic() + patience)
        if isinstance(reply, Lost):
            link.lose(reply.why)
            return False
        return True


class Node:
    """One server as one loop reaches it: a lane for all, and one for what is large or slow."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: Settings) -> None:
        self.address = settings.address
        self._shared = Lane(loop, settings)
        self._bulk = Lane(loop, settings)

    def ready(self, now: float) -> Link | None:
        """Return the shared connection if it can be written to at once."""
        return self._shared.ready(now)

    async def exchange(self, talk: Talk[Any], message: Message) -> Sequence[Any]:
        """Say a message; raises `Lost` once it may have been written."""
        lane = self._bulk if message.bulk else self._shared
        link = await lane.borrow(talk)
        if monotonic() >= talk.end:
            raise Lost("no time was left to send it", written=False)
        waiting = await link.submit_in_turn(message.data, message.replies, talk.end)
        replies = await waiting
        if isinstance(replies, Lost):
            raise replies
        return replies  # type: ignore[no-any-return]

    def retire(self) -> None:
        """Use other connections from now on."""
        self._shared.retire()
        self._bulk.retire()

    def close(self) -> None:
        """Close every connection now."""
        self._shared.close()
        self._bulk.close()

    def abandon(self) -> None:
        """Close file descriptors only, in a forked child or for a closed loop."""
        self._shared.abandon()
        self._bulk.abandon()


class Site:
    """What a transport has in one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        sites: dict[int, Site],
        *,
        cluster: bool,
    ) -> None:
        self.loop = loop
        self._settings = settings
        self._sites = sites
        self._nodes: dict[Address, Node | ForeignNode] = {}
        self.only = None if cluster else self.node(settings.address)
        # asyncio.run() ends a loop's async generators before it closes the loop: our cue.
        self._guard = self._until_shutdown()
        try:
            self._guard.__anext__().__await__().send(None)
        except StopIteration:
            pass

    def node(self, address: Address) -> Node | ForeignNode:
        """Return a server by its address."""
        node = self._nodes.get(address)
        if node is None:
            settings = self._settings
            if address != settings.address:
                settings = settings.at(address)
            node = ForeignNode(settings) if settings.foreign else Node(self.loop, settings)
            self._nodes[address] = node
        return node

    def keep(self, addresses: frozenset[Address]) -> None:
        """Leave the nodes that are no longer part of the cluster."""
        for address in self._nodes.keys() - addresses:
            self._nodes.pop(address).retire()

    def retire(self) -> None:
        """Close connections once what is in flight has been answered."""
        for node in self._nodes.values():
            node.retire()

    def close(self) -> None:
        """Close everything now."""
        for node in self._nodes.values():
            node.close()
        self._sites.pop(id(self.loop), None)

    def abandon(self) -> None:
        """Close file descriptors only, in a forked child or for a closed loop."""
        for node in self._nodes.values():
            node.abandon()

    async def _until_shutdown(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.close()
            await asyncio.sleep(0)  # lets foreign connections say goodbye


class AsyncTransport:
    """Commands to one server, or to the nodes of a cluster, from any event loop."""

    def __init__(self, settings: Settings, slots: SlotMap | None = None) -> None:
        self._settings = settings
        self._slots = slots
        #: By the id of the loop, which the site keeps alive.
        self._sites: dict[int, Site] = {}

    def __del__(self) -> None:
        for site in list(self._sites.values()):
            try:
                site.loop.call_soon_threadsafe(site.close)
            except RuntimeError:
                site.abandon()

    async def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error.

        The usual way is short: one exchange on the shared connection. Anything else is a `Talk`.
        """
        now = monotonic()
        site = self._sites.get(id(asyncio.get_running_loop())) or self._new_site()
        node = site.only or self._usual(site, command)
        link = None if node is None or command.bulk else node.ready(now)
        if node is None or link is None:
            return (await self._converse(site, self._talk((command,), deadline, now)))[0].result()
        data = pack(command)
        if link.full(len(data)):
            return (await self._converse(site, self._talk((command,), deadline, now)))[0].result()
        reply = await link.submit(data, None, now + deadline)
        kind = type(reply)
        if kind is not ReplyError and kind is not Lost:
            return command.parse(reply)
        talk = self._talk((command,), deadline, now)
        if kind is Lost:
            talk.lost(talk.first(node.address), reply)
        else:
            talk.answered(talk.first(node.address), (reply,))
        return (await self._converse(site, talk, begun=True))[0].result()

    async def run(self, commands: Sequence[Command[T]], deadline: float) -> list[Outcome[T]]:
        """Say several, one write per node; every one ends as a value or an error, in order."""
        site = self._sites.get(id(asyncio.get_running_loop())) or self._new_site()
        return await self._converse(site, self._talk(commands, deadline, monotonic()))

    async def aclose(self) -> None:
        """Close this loop's connections; the next call opens new ones."""
        site = self._sites.get(id(asyncio.get_running_loop()))
        if site is not None:
            site.retire()

    def abandon(self) -> None:
        """In a forked child: close every connection; the parent goes on undisturbed."""
        for site in self._sites.values():
            site.abandon()
        self._sites.clear()

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""
        if self._slots is None:
            return show(self._settings.address)
        return self._slots.where(command.keys)

    def _new_site(self) -> Site:
        # A loop closed without shutting down its async generators left its connections here.
        for key, site in list(self._sites.items()):
            if site.loop.is_closed():
                site.abandon()
                del self._sites[key]
        loop = asyncio.get_running_loop()
        site = Site(loop, self._settings, self._sites, cluster=self._slots is not None)
        self._sites[id(loop)] = site
        return site

    def _talk(self, commands: Sequence[Command[T]], deadline: float, now: float) -> Talk[T]:
        return Talk(commands, deadline, now, self._settings.address, self._slots)

    def _usual(self, site: Site, command: Command[Any]) -> Node | ForeignNode | None:
        slots = self._slots
        if slots is None or slots.stale:
            return None
        return site.node(slots.route(command.keys))

    async def _converse(
        self, site: Site, talk: Talk[T], *, begun: bool = False
    ) -> list[Outcome[T]]:
        while True:
            if not begun:
                if self._slots is not None and self._slots.stale:
                    await self._refresh(site, self._slots, talk)
                if monotonic() < talk.end:
                    await self._round(site, talk)
            begun = False
            pause = talk.rest(monotonic())
            for address in talk.estranged:
                site.node(address).retire()
            talk.estranged.clear()
            if pause is None:
                return talk.results()
            if pause:
                await asyncio.sleep(pause)

    async def _round(self, site: Site, talk: Talk[Any]) -> None:
        """Say all that is open, to all nodes at the same time."""
        plan = talk.plan()
        if len(plan) == 1:
            await self._say(site, talk, plan[0])
        else:
            await asyncio.gather(*(self._say(site, talk, message) for message in plan))

    async def _say(self, site: Site, talk: Talk[Any], message: Message) -> None:
        try:
            replies = await site.node(message.node).exchange(talk, message)
        except Lost as loss:
            talk.lost(message, loss)
        except (Unreachable, Refused, RedisHacksError) as error:
            talk.unsaid(message, error)
        else:
            talk.answered(message, replies)

    async def _refresh(self, site: Site, slots: SlotMap, talk: Talk[Any]) -> None:
        """Read the slot map from the first node that gives it."""
        started = now = monotonic()
        if not slots.due(now) and slots.known:
            return
        # The first map is part of connecting; a later one must not cost more than the command may.
        give_up = talk.end if slots.known else now + CONNECT_DEADLINE
        for address in slots.candidates():
            limit = min(talk.deadline, give_up - now)
            question = Talk((_cluster.QUESTION,), limit, now, address)
            await self._round(site, question)
            question.rest(float("inf"))
            reply = question.results()[0].value
            now = monotonic()
            if reply is not None:
                slots.load(reply, address)
                site.keep(slots.nodes())
                talk.connected(now - started)
                return
            if now >= give_up:
                return


async def _open(
    loop: asyncio.AbstractEventLoop, settings: Settings, patience: float, links: set[Link]
) -> Link:
    """Open a connection and say what must be said first."""
    end = monotonic() + CONNECT_DEADLINE
    if settings.sentinel is not None:
        settings = settings.at(await _sentinel.master_async(settings, CONNECT_DEADLINE))
    sock = await _dial(loop, (settings.host, settings.port), settings.keepalive_options, end)
    end = min(end, monotonic() + patience * settings.round_trips)
    link = None
    try:
        tls = None
        if settings.tls is not None:
            async with asyncio.timeout(end - monotonic()):
                tls = await _secure(loop, sock, settings.tls_context(), settings.host)
        credentials = await settings.credentials_async()
        opening = handshake(settings.protocol, credentials, settings.client_name, settings.db)
        link = Link(loop, sock, tls)
        links.add(link)
        data = b"".join(map(pack_command, opening))
        replies = await link.submit(data, len(opening), end)
        if isinstance(replies, Lost):
            # A server that is full says so and closes.
            opened(replies.replies, fresh_credentials=False)
            raise Unreachable(f"connecting: {replies.why}")
        opened(replies, fresh_credentials=settings.credential_provider is not None)
        return link
    except BaseException as error:
        sock.close()
        if link is not None:
            link.lose(CLOSED)
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
    loop: asyncio.AbstractEventLoop,
    address: Address,
    options: Mapping[int, int | bytes],
    end: float,
) -> socket.socket:
    places = await _places(loop, address)
    why = ""
    for left, (family, place) in zip(range(len(places), 0, -1), places, strict=True):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout((end - monotonic()) / left):
                await _connect(loop, sock, place)
            if family != socket.AF_UNIX:
                prepare(sock, options)
            return sock
        except OSError as error:
            sock.close()
            why = reason(error)
        except BaseException:
            sock.close()
            raise
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
