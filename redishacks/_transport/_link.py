"""One connection for threads and greenlets: a blocking socket, a parser, an exact deadline."""

from __future__ import annotations

# Else the first look-up of a name imports it, and a fork in that moment leaves the child without
# the lock of imports.
import encodings.idna  # noqa: F401
import os
import select
import socket
import ssl
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from math import inf
from threading import get_ident
from time import monotonic
from typing import Any

import hiredis
from hiredis import PushNotification

from redishacks._transport._decide import Opening
from redishacks._transport._loss import Lost, Unreachable
from redishacks._transport._settings import Settings
from redishacks._transport._socket import BACKLOG_PAUSE, CLOSED, LATE, NO_RESP, prepare, reason
from redishacks._transport._tls import Tls
from redishacks._transport._wire import MISSING, Address, new_reader

#: Bytes to read at a time: of a reply that is probably short, and of any other.
_SHORT = 8192
_CHUNK = 65536
_DONTWAIT = socket.MSG_DONTWAIT
#: Seconds to look for a reply before sleeping: from the same machine or rack it comes sooner than
#: the kernel puts a thread to sleep and wakes it, which is two thirds of such a call.
_MOMENT = 150e-6
#: Calls that sleep at once, after a look in vain.
_IN_VAIN = 16
#: A timeout of the kernel's for recv(): 1 ms, which it rounds up to a tick or two of its clock.
_SLICE = struct.pack("ll", 0, 1000)


class Main:
    """Which thread runs Python's signal handlers."""

    ident: int | None = None

    @classmethod
    def find(cls) -> None:
        """Find it, before the first call and again in a forked child."""
        cls.ident = threading.main_thread().ident


class Link:
    """A connection of our own: a socket, at first not connected, and a parser."""

    __slots__ = (
        "__weakref__",
        "_asleep",
        "_hot",
        "_poll",
        "_reader",
        "_sock",
        "_tls",
        "due",
        "since",
        "version",
    )

    def __init__(self, family: socket.AddressFamily) -> None:
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
        # Closes it, without a warning, when the transport is no longer needed by anybody.
        weakref.finalize(self, sock.close).atexit = False
        self.since = 0.0
        self.version, self.due = 0, inf
        self._reader = new_reader()
        self._tls: Tls | None = None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._asleep = 0
        # Where sockets are patched (gevent), only poll() lets other greenlets run meanwhile.
        self._hot = socket.socket.__module__ == "socket"

    def connect(self, place: Any, options: Mapping[int, int | bytes], end: float) -> None:
        """Reach a server; raises `OSError`."""
        sock = self._sock
        while True:
            sock.settimeout(max(end - monotonic(), 0.001))
            try:
                sock.connect(place)
                break
            except BlockingIOError:
                # A unix socket whose server has a full backlog says so at once instead of waiting.
                if monotonic() >= end:
                    raise TimeoutError from None
                time.sleep(BACKLOG_PAUSE)
        if sock.family != socket.AF_UNIX:
            prepare(sock, options)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SLICE)
        sock.settimeout(None if self._hot else 0.0)

    def ask(self, data: bytes, end: float, alone: bool) -> Any:
        """Send one packed command and return its reply.

        `alone`: no other thread waits for a reply, whom looking for ours would disturb.
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
            chunk = self._look() if alone else None
            if chunk is None:
                chunk = self._sleep(end)
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

    def _look(self) -> bytes | None:
        """Return a reply that comes at once."""
        if self._asleep:
            self._asleep -= 1
            return None
        recv = self._sock.recv
        until = monotonic() + _MOMENT
        while True:
            try:
                return recv(_SHORT, _DONTWAIT)
            except BlockingIOError:
                # By the clock: each recv() may hand the interpreter's lock to another thread.
                if monotonic() > until:
                    self._asleep = _IN_VAIN
                    return None

    def _sleep(self, end: float) -> bytes:
        """Wait for a reply, at first in a single recv() with a short timeout of the kernel's.

        A poll() before it would hand the interpreter's lock over twice, and with eight threads that
        lock is the bottleneck. But a recv() that a signal interrupts starts its timeout anew, and
        poll() does not. So the main thread, whom signals come to, always polls; any other does once
        a millisecond or a few have passed without a reply, and without a signal.
        """
        if get_ident() != Main.ident:
            try:
                return self._sock.recv(_SHORT)
            except BlockingIOError:
                pass
        self._wait(end)
        return self._sock.recv(_SHORT, _DONTWAIT)

    def send(self, data: bytes, end: float) -> None:
        """Send packed commands whole; reads replies meanwhile, so that nobody waits in a circle."""
        if self._tls is not None:
            data = self._tls.seal(data)
        self._send_rest(memoryview(data), end, False)

    def replies(self, count: int, end: float) -> list[Any]:
        """Return the next replies, errors as values; pushes of RESP3 are passed over."""
        found: list[Any] = []
        gets = self._reader.gets
        try:
            while True:
                reply = gets()
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

    def fileno(self) -> int:
        """Return what poll() takes."""
        return self._sock.fileno()

    def arrived(self) -> list[Any]:
        """Return all that has come, pushes of RESP3 too, without waiting; raises `Lost`."""
        found = []
        try:
            self._reader.feed(self._receive())
            while (reply := self._reader.gets()) is not MISSING:
                found.append(reply)
        except hiredis.ProtocolError:
            raise Lost(NO_RESP, written=True) from None
        return found

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
        number = self._sock.fileno()
        if number >= 0:
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, number, inheritable=False)
            os.close(nothing)

    def __del__(self) -> None:
        # While the interpreter exits, when the finalizer above does not run. There is no socket yet
        # when a signal handler raised in the constructor.
        if hasattr(self, "_sock"):
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


def open_link(settings: Settings, end: float, known: Callable[[Link], None]) -> Link:
    """Open a connection, which is not greeted yet; raises `Unreachable`.

    It is made `known` before it connects: a fork, in a signal handler, must find it from then on.
    """
    places = _places((settings.host, settings.port))
    why = ""
    for left, (family, place) in zip(range(len(places), 0, -1), places, strict=True):
        process = os.getpid()
        try:
            link = Link(family)
        except OSError as error:  # no more file descriptors
            raise Unreachable(f"connecting: {reason(error)}") from None
        try:
            known(link)
            if os.getpid() != process:
                raise Unreachable("connecting: the process was forked meanwhile")
            link.connect(
                place, settings.keepalive_options, monotonic() + (end - monotonic()) / left
            )
            return link
        except OSError as error:
            link.close()
            why = reason(error)
        except BaseException:
            link.close()
            raise
    raise Unreachable(f"connecting: {why}")


def greet(link: Link, settings: Settings, end: float) -> None:
    """Say what a new connection says first; raises `Unreachable`, `Refused` or `ServerError`."""
    try:
        if settings.tls is not None:
            link.secure(settings.tls_context(), settings.host, end)
    except Lost as loss:
        raise Unreachable(f"connecting: {loss.why}") from None
    opening = Opening(settings, settings.credentials())
    try:
        link.send(opening.data, end)
        replies = link.replies(opening.count, end)
    except Lost as loss:
        raise opening.lost(loss) from None
    opening.judge(replies, link, monotonic())


def _places(address: Address) -> list[tuple[socket.AddressFamily, Any]]:
    host, port = address
    if port == 0:
        return [(socket.AF_UNIX, host)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"host name {host!r}: {error.strerror}") from None
    return [(family, place) for family, _, _, _, place in found]
