"""The transport for threads and greenlets: a few own connections, most recently used first.

A connection is taken for one exchange and given back after its last reply; whatever interrupts an
exchange closes it. So no reply can reach another caller, be it a thread, a greenlet or a signal
handler that uses the client while an exchange is under way.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from threading import get_ident
from time import monotonic
from typing import Any, Protocol, TypeVar

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
from redishacks._transport._foreign import ForeignLink
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
from redishacks.errors import RedisHacksError, UsageError

T = TypeVar("T")

#: Idle for longer than this, a connection is closed when another one is given back.
CLOSE_AFTER = 60.0

#: Bytes to read at a time: of a reply that is probably short, and of any other.
_SHORT = 8192
_CHUNK = 65536
_DONTWAIT = socket.MSG_DONTWAIT


class Main:
    """Which thread runs Python's signal handlers."""

    ident = threading.main_thread().ident


class Channel(Protocol):
    """One connection. After any error it must be closed."""

    since: float

    def ask(self, data: bytes, deadline: float, end: float) -> Any:
        """Send one packed command and return its reply."""

    def send(self, data: bytes, end: float) -> None:
        """Send packed commands whole."""

    def replies(self, count: int, end: float) -> list[Any]:
        """Return the next replies, errors as values."""

    def alive(self) -> bool:
        """Look, without waiting, whether the server has closed it."""

    def close(self) -> None:
        """Close it; twice does no harm."""

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection."""


class Link:
    """A connection of our own: a socket and a parser."""

    __slots__ = ("__weakref__", "_hot", "_poll", "_reader", "_sock", "_timeout", "_tls", "since")

    def __init__(self, sock: socket.socket) -> None:
        self.since = 0.0
        # Closes it, without a warning, when the transport is no longer needed by anybody.
        weakref.finalize(self, sock.close).atexit = False
        self._sock = sock
        self._reader = new_reader()
        self._tls: Tls | None = None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._timeout = -1.0
        # Where sockets are patched (gevent), only poll() lets other greenlets run meanwhile.
        self._hot = socket.socket.__module__ == "socket"
        sock.settimeout(None if self._hot else 0.0)

    def ask(self, data: bytes, deadline: float, end: float) -> Any:
        """Send one packed command and return its reply.

        The wait is a single recv() with a timeout of the kernel's: a poll() before it would hand
        the interpreter's lock over twice, and with eight threads that lock is the bottleneck. The
        main thread polls all the same: a recv() that signals interrupt starts its timeout anew.
        """
        if not self._hot:
            self.send(data, end)
            return self.replies(1, end)[0]
        sock = self._sock
        try:
            sent = sock.send(data, _DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise Lost(reason(error), written=False) from None
        if sent != len(data):
            self._send_rest(memoryview(data)[sent:], end, sent > 0)
        try:
            if get_ident() == Main.ident:
                if not self._poll.poll(deadline * 1000):
                    raise Lost(LATE, written=True)
                chunk = sock.recv(_SHORT, _DONTWAIT)
            else:
                if deadline != self._timeout:
                    self._set_timeout(deadline)
                chunk = sock.recv(_SHORT)
        except BlockingIOError:
            raise Lost(LATE, written=True) from None
        except OSError as error:
            raise Lost(reason(error), written=True) from None
        if not chunk:
            raise Lost(CLOSED, written=True)
        reader = self._reader
        try:
            reader.feed(chunk)
            reply = reader.gets()
        except hiredis.ProtocolError:
            raise Lost(NO_RESP, written=True) from None
        if reply is MISSING or type(reply) is PushNotification:
            return self.replies(1, end)[0]
        return reply

    def send(self, data: bytes, end: float) -> None:
        """Send packed commands whole; reads replies meanwhile, so that nobody waits in a circle."""
        if self._tls is not None:
            data = self._tls.seal(data)
        self._send_rest(memoryview(data), end, False)

    def replies(self, count: int, end: float) -> list[Any]:
        """Return the next replies, errors as values; pushes of RESP3 are passed over."""
        found: list[Any] = []
        try:
            while True:
                reply = self._reader.gets()
                if reply is MISSING:
                    self._fill(end)
                elif type(reply) is not PushNotification:
                    found.append(reply)
                    if len(found) == count:
                        return found
        except hiredis.ProtocolError:
            raise Lost(NO_RESP, written=True, replies=found) from None
        except Lost as loss:
            raise Lost(loss.why, written=True, replies=found) from None

    def alive(self) -> bool:
        """Look whether the server has closed it; data that nobody asked for counts as closed."""
        try:
            data = self._sock.recv(_CHUNK, _DONTWAIT)
            # A TLS server may send session tickets at any time; they carry no plain text.
            return bool(data) and self._tls is not None and not self._tls.open(data)
        except BlockingIOError:
            return not self._reader.has_data()
        except OSError:
            return False

    def secure(self, context: ssl.SSLContext, host: str, end: float) -> None:
        """Begin TLS; raises `Unreachable` when the certificate is not to be trusted."""
        tls = Tls(context, host)
        try:
            out, done = tls.begin()
            self._send_rest(memoryview(out), end, False)
            while not done:
                self._wait(end)
                out, done = tls.begin(self._receive())
                self._send_rest(memoryview(out), end, False)
        except ssl.SSLError as error:
            raise Unreachable(f"TLS: {error.reason or error}") from None
        self._tls = tls
        self._hot = False

    def close(self) -> None:
        """Close the file descriptor, without shutdown(): a parent process may go on with it."""
        self._sock.close()

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection.

        The descriptor's number stays taken until the link is collected: the fork may have happened
        in a signal handler, and the exchange below it must not wait on somebody else's socket.
        """
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, self._sock.fileno(), inheritable=False)
        os.close(nothing)

    def __del__(self) -> None:
        # A transport that nobody holds any more takes its connections along, without a warning.
        self._sock.close()

    def _send_rest(self, data: memoryview, end: float, written: bool) -> None:
        while data:
            try:
                sent = self._sock.send(data, _DONTWAIT)
            except BlockingIOError:
                self._wait(end, select.POLLIN | select.POLLOUT, written)
                if self._poll.poll(0):
                    self._reader.feed(self._receive(written))
                continue
            except OSError as error:
                raise Lost(reason(error), written=written) from None
            data = data[sent:]
            written = True

    def _fill(self, end: float) -> None:
        self._wait(end)
        self._reader.feed(self._receive())

    def _receive(self, written: bool = True) -> bytes:
        try:
            chunk = self._sock.recv(_CHUNK, _DONTWAIT)
            if chunk:
                return chunk if self._tls is None else self._tls.open(chunk)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise Lost(reason(error), written=written) from None
        raise Lost(CLOSED, written=written)

    def _wait(self, end: float, events: int = select.POLLIN, written: bool = True) -> None:
        # What is there already is taken, however late it is looked for.
        left = max(0.0, end - monotonic())
        poll = self._poll
        if events != select.POLLIN:
            poll = select.poll()
            poll.register(self._sock, events)
        if not poll.poll(left * 1000):
            raise Lost(LATE, written=written)

    def _set_timeout(self, seconds: float) -> None:
        whole = int(seconds)
        value = struct.pack("ll", whole, max(1, int((seconds - whole) * 1e6)))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._timeout = seconds


class Node:
    """One server and the connections to it."""

    def __init__(self, settings: Settings) -> None:
        self.address = settings.address
        self._settings = settings
        self._idle: deque[Channel] = deque()
        #: All that are open, those in use too: a forked child must close them.
        self._open: set[Channel] = set()

    def take(self, now: float) -> Channel | None:
        """Return an idle connection that was used lately, or None."""
        idle = self._idle
        while True:
            try:
                link = idle.pop()
            except IndexError:
                return None
            age = now - link.since
            if age < LOOK_AFTER:
                return link
            if age > PING_AFTER:
                idle.append(link)
                return None
            if link.alive():
                return link
            self.drop(link)

    def give(self, link: Channel) -> None:
        """Take a connection back after a whole exchange."""
        now = link.since = monotonic()
        idle = self._idle
        idle.append(link)
        if len(idle) > 1 and now - idle[0].since > CLOSE_AFTER:
            self._trim(now)

    def drop(self, link: Channel) -> None:
        """Close a connection for good."""
        self._open.discard(link)
        link.close()

    def lost(self, link: Channel) -> None:
        """Close a connection that failed, and the idle ones: a new one will tell in its handshake
        whether the server is there, when nothing has been applied yet.
        """
        self.drop(link)
        self.reset()

    def borrow(self, talk: Talk[Any]) -> Channel:
        """Return a connection, a new one if need be.

        Raises `Unreachable`, `Refused` or `ServerError`; nothing was sent then.
        """
        now = monotonic()
        if now >= talk.end:
            raise Refused("no time was left to send it")
        link = self.take(now) or self._awaken(now + (talk.end - now) / 2)
        if link is None:
            started = monotonic()
            link = self.connect(talk.end - started)
            talk.connected(monotonic() - started)
        return link

    def connect(self, patience: float) -> Channel:
        """Open a connection and say what must be said first."""
        end = monotonic() + CONNECT_DEADLINE
        settings = self._settings
        if settings.sentinel is not None:
            settings = settings.at(_sentinel.master(settings, CONNECT_DEADLINE))
        if settings.foreign is not None:
            foreign = ForeignLink(settings)
            self._open.add(foreign)
            return foreign
        link = Link(_dial((settings.host, settings.port), settings.keepalive_options, end))
        self._open.add(link)
        try:
            _greet(link, settings, min(end, monotonic() + patience * settings.round_trips))
        except BaseException:
            self.drop(link)
            raise
        return link

    def reset(self) -> None:
        """Close the idle connections."""
        while True:
            try:
                self.drop(self._idle.pop())
            except IndexError:
                return

    def abandon(self) -> None:
        """In a forked child: close everything; the parent goes on undisturbed."""
        for link in list(self._open):
            link.abandon()
        self._open = set()
        self._idle = deque()

    def _awaken(self, end: float) -> Channel | None:
        # Idle for long: a firewall may have forgotten the connection without a word.
        try:
            link = self._idle.pop()
        except IndexError:
            return None
        try:
            if link.alive():
                link.send(PING, end)
                link.replies(1, end)
                return link
        except Lost:
            pass
        except BaseException:
            self.drop(link)
            raise
        self.drop(link)
        self.reset()  # the others have been idle for longer still
        return None

    def _trim(self, now: float) -> None:
        while True:
            try:
                link = self._idle.popleft()
            except IndexError:
                return
            if now - link.since <= CLOSE_AFTER:
                # Another thread may have emptied the line meanwhile; its place matters little.
                self._idle.appendleft(link)
                return
            self.drop(link)


class SyncTransport:
    """Commands to one server, or to the nodes of a cluster."""

    def __init__(self, settings: Settings, slots: SlotMap | None = None) -> None:
        self._settings = settings
        self._slots = slots
        self._nodes: dict[Address, Node] = {}
        self._only = None if slots is not None else self._node(settings.address)

    def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error.

        The usual way is short: one exchange on an idle connection. Anything else is a `Talk`.
        """
        now = monotonic()
        node = self._only or self._usual(command)
        link = node.take(now) if node is not None else None
        if node is None or link is None:
            return self._converse(self._talk((command,), deadline, now))[0].result()
        try:
            reply = link.ask(pack(command), deadline, now + deadline)
        except Lost as loss:
            node.lost(link)
            talk = self._talk((command,), deadline, now)
            talk.lost(talk.first(node.address), loss)
        except UsageError:
            node.give(link)
            raise
        except BaseException:
            node.drop(link)
            raise
        else:
            node.give(link)
            if type(reply) is not ReplyError:
                return command.parse(reply)
            talk = self._talk((command,), deadline, now)
            talk.answered(talk.first(node.address), (reply,))
        return self._converse(talk, begun=True)[0].result()

    def run(self, commands: Sequence[Command[T]], deadline: float) -> list[Outcome[T]]:
        """Say several, one write per node; every one ends as a value or an error, in order."""
        return self._converse(self._talk(commands, deadline, monotonic()))

    def close(self) -> None:
        """Close idle connections; the next call opens new ones."""
        for node in list(self._nodes.values()):
            node.reset()

    def abandon(self) -> None:
        """In a forked child: close every connection, those in use too."""
        for node in list(self._nodes.values()):
            node.abandon()

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""
        if self._slots is None:
            return show(self._settings.address)
        return self._slots.where(command.keys)

    def _talk(self, commands: Sequence[Command[T]], deadline: float, now: float) -> Talk[T]:
        return Talk(commands, deadline, now, self._settings.address, self._slots)

    def _usual(self, command: Command[Any]) -> Node | None:
        slots = self._slots
        if slots is None or slots.stale:
            return None
        return self._node(slots.route(command.keys))

    def _node(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            settings = self._settings
            if address != settings.address:
                settings = settings.at(address)
            node = self._nodes.setdefault(address, Node(settings))
        return node

    def _converse(self, talk: Talk[T], *, begun: bool = False) -> list[Outcome[T]]:
        while True:
            if not begun:
                if self._slots is not None and self._slots.stale:
                    self._refresh(self._slots, talk)
                if monotonic() < talk.end:
                    self._round(talk)
            begun = False
            pause = talk.rest(monotonic())
            for address in talk.estranged:
                self._node(address).reset()
            talk.estranged.clear()
            if pause is None:
                return talk.results()
            if pause:
                time.sleep(pause)

    def _round(self, talk: Talk[Any]) -> None:
        """Say all that is open: write to every node, then read from every node."""
        under_way: deque[tuple[Node, Channel, Message]] = deque()
        later: list[tuple[Node, Message]] = []
        try:
            for message in talk.plan():
                node = self._node(message.node)
                link = node.take(monotonic())
                if link is None:
                    later.append((node, message))
                else:
                    _send(talk, node, link, message, under_way)
            # Connecting may take all the time there is: by now the other nodes are at work.
            for node, message in later:
                try:
                    link = node.borrow(talk)
                except (Unreachable, Refused, RedisHacksError) as error:
                    talk.unsaid(message, error)
                else:
                    _send(talk, node, link, message, under_way)
            while under_way:
                node, link, message = under_way[0]
                try:
                    replies = link.replies(message.replies, talk.end)
                except Lost as loss:
                    node.lost(link)
                    talk.lost(message, loss)
                else:
                    node.give(link)
                    talk.answered(message, replies)
                under_way.popleft()
        except BaseException:
            for node, link, _ in under_way:
                node.drop(link)
            raise

    def _refresh(self, slots: SlotMap, talk: Talk[Any]) -> None:
        """Read the slot map from the first node that gives it."""
        started = now = monotonic()
        if not slots.due(now) and slots.known:
            return
        # The first map is part of connecting; a later one must not cost more than the command may.
        give_up = talk.end if slots.known else now + CONNECT_DEADLINE
        for address in slots.candidates():
            limit = min(talk.deadline, give_up - now)
            question = Talk((_cluster.QUESTION,), limit, now, address)
            self._round(question)
            question.rest(float("inf"))
            reply = question.results()[0].value
            now = monotonic()
            if reply is not None:
                slots.load(reply, address)
                self._prune(slots)
                talk.connected(now - started)
                return
            if now >= give_up:
                return

    def _prune(self, slots: SlotMap) -> None:
        for address in self._nodes.keys() - slots.nodes():
            self._nodes.pop(address).reset()


def _send(
    talk: Talk[Any],
    node: Node,
    link: Channel,
    message: Message,
    under_way: deque[tuple[Node, Channel, Message]],
) -> None:
    under_way.append((node, link, message))
    try:
        link.send(message.data, talk.end)
    except Lost as loss:
        under_way.pop()
        node.lost(link)
        talk.lost(message, loss)


def _greet(link: Link, settings: Settings, end: float) -> None:
    try:
        if settings.tls is not None:
            link.secure(settings.tls_context(), settings.host, end)
        opening = handshake(
            settings.protocol, settings.credentials(), settings.client_name, settings.db
        )
        link.send(b"".join(map(pack_command, opening)), end)
        replies = link.replies(len(opening), end)
        opened(replies, fresh_credentials=settings.credential_provider is not None)
    except Lost as loss:
        # A server that is full says so and closes.
        opened(loss.replies, fresh_credentials=False)
        raise Unreachable(f"connecting: {loss.why}") from None


def _dial(address: Address, options: Mapping[int, int | bytes], end: float) -> socket.socket:
    places = _places(address)
    why = ""
    for left, (family, place) in zip(range(len(places), 0, -1), places, strict=True):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            _connect(sock, place, monotonic() + (end - monotonic()) / left)
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


def _connect(sock: socket.socket, place: Any, end: float) -> None:
    while True:
        sock.settimeout(max(end - monotonic(), 0.001))
        try:
            sock.connect(place)
            return
        except BlockingIOError:
            # A unix socket whose server has a full backlog says so at once instead of waiting.
            if monotonic() >= end:
                raise TimeoutError from None
            time.sleep(BACKLOG_PAUSE)


def _places(address: Address) -> list[tuple[socket.AddressFamily, Any]]:
    host, port = address
    if port == 0:
        return [(socket.AF_UNIX, host)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"host name {host!r}: {error.strerror}") from None
    return [(family, place) for family, _, _, _, place in found]
