"""A proxy that injects faults between a client and a Redis, Valkey or PostgreSQL server.

    with FaultProxy(server) as proxy:
        client = redis.Redis(port=proxy.port)
        proxy.drop_reply(of="LPUSH")   # applied by the server, its reply lost, the connection cut
        proxy.stall()                  # from now on: silence, connections stay open
        proxy.heal()

Two sorts of faults. *Lasting* ones hold for all connections until `heal`: `stall`, `stall_replies`,
`trickle`, `delay`, `refuse`. *Single* ones hit once: `drop_reply`, `drop_request`,
`cut_after_request` wait for the n-th request or reply from now on, over all connections; `cut` acts
at once. `armed` says how many still wait.

It understands where requests and replies end in RESP and in PostgreSQL's protocol, so counting is
right under pipelining too; for other protocols every chunk counts as one. Every method may be
called from any thread and has taken effect when it returns. One thread moves all bytes.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias
from urllib.parse import parse_qs, urlencode, urlsplit

from redishacks.errors import UsageError
from redishacks.testing._framing import Piece, RawWire, Wire, wire_for
from redishacks.testing._process import free_port, private_directory
from redishacks.testing.postgres import Postgres
from redishacks.testing.servers import Server

#: A running server, a URL of one (`redis://`, `unix://`, `postgresql://`), or a host and a port.
Target: TypeAlias = Server | Postgres | str | tuple[str, int]

_CHUNK = 65536
#: What is held back per direction before we stop reading.
_HELD = 64 * 1024 * 1024
_RESET = struct.pack("ii", 1, 0)


class FaultProxy:
    """A proxy in front of `target`, on a loopback port, or with `unix=True` on a unix socket.

    `connections`, `requests` and `replies` count what came so far; `port`, `path` and `url` say
    where it listens. With a unix socket `port` is 0.
    """

    def __init__(self, target: Target, *, unix: bool = False) -> None:
        self._target = _parse(target)
        self._unix = unix
        self.port = 0
        self.path: Path | None = None
        self.connections = 0
        self.requests = 0
        self.replies = 0
        self._links: set[_Link] = set()
        self._triggers: list[_Trigger] = []
        self._calls: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._faults = _Lasting()
        self._thread: threading.Thread | None = None
        self._closing = False

    # Where it listens.

    @property
    def url(self) -> str:
        """The target's URL, leading here: for redis-py, or for psycopg."""
        return self._target.leading_to(self.path if self.path is not None else self.port)

    @property
    def dsn(self) -> str:
        """The same, by PostgreSQL's word."""
        return self.url

    # Single faults.

    def drop_reply(self, n: int = 1, *, of: str = "", cut: bool = True) -> None:
        """Swallow the n-th reply from now on, then cut its connection unless `cut=False`.

        The server has applied what was asked; the client gets all replies before, not this one.
        `of` counts only replies to requests that begin with these whole words, in upper or lower
        case, as they are on the wire (redis-py's `incr` says INCRBY): `"ZADD board"`, `"EVALSHA"`,
        `"COMMIT"`, `"INSERT INTO ledger"`.
        """
        self._arm(_Trigger("reply", n, of, forward=False, cut=cut))

    def drop_request(self, n: int = 1, *, of: str = "", cut: bool = True) -> None:
        """Swallow the n-th request from now on, so that the server never sees it, then cut."""
        self._arm(_Trigger("request", n, of, forward=False, cut=cut))

    def cut_after_request(self, n: int = 1, *, of: str = "") -> None:
        """Forward the n-th request from now on to its last byte, then cut without a reply."""
        self._arm(_Trigger("request", n, of, forward=True, cut=True))

    def cut(self, *, reset: bool = False) -> None:
        """Close all connections now, in order or with a reset (RST); new ones are taken."""

        def act() -> None:
            for link in list(self._links):
                link.close(reset=reset)

        self._do(act)

    @property
    def armed(self) -> int:
        """How many single faults have not happened yet."""
        return len(self._triggers)

    # Lasting faults.

    def stall(self) -> None:
        """Take connections and read, but forward nothing in either direction."""
        self._set(silent=True)

    def stall_replies(self) -> None:
        """Forward requests and hold the replies."""
        self._set(mute=True)

    def resume(self) -> None:
        """End `stall` and `stall_replies`; what was held goes on its way."""
        self._set(silent=False, mute=False)

    def trickle(self, bytes_per_second: float) -> None:
        """Forward replies byte by byte at this rate."""
        if bytes_per_second <= 0:
            raise UsageError(f"bytes_per_second must be positive, not {bytes_per_second!r}")
        self._set(byte_pause=1 / bytes_per_second)

    def delay(self, seconds: float) -> None:
        """Forward everything this much later, in each direction."""
        if seconds < 0:
            raise UsageError(f"a delay cannot be negative: {seconds!r}")
        self._set(lag=seconds)

    def refuse(self) -> None:
        """Refuse new connections; the port stays ours, and open connections go on."""
        self._do(lambda: self._listen(accepting=False))

    def accept(self) -> None:
        """End `refuse`, on the same port."""
        self._do(lambda: self._listen(accepting=True))

    def heal(self) -> None:
        """End every lasting fault and disarm the single ones."""

        def act() -> None:
            self._faults = _Lasting()
            self._triggers.clear()
            self._listen(accepting=True)

        self._do(act)

    # Life.

    def __enter__(self) -> Self:
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, self._on_wake)
        if self._unix:
            self.path = private_directory() / self._target.socket_name
        else:
            self.port = free_port()
        self._accepting = True
        self._listener = self._bound()
        self._listener.listen(512)
        self._selector.register(self._listener, selectors.EVENT_READ, self._on_connection)
        self._thread = threading.Thread(target=self._run, name="redishacks-proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut everything and end; harmless when repeated."""
        if self._thread is None or not self._thread.is_alive():
            return

        def act() -> None:
            self._closing = True

        self._do(act)
        self._thread.join()
        self._wake.close()
        if self.path is not None:
            shutil.rmtree(self.path.parent, ignore_errors=True)

    # The thread: all below runs in it, except `_do` and its callers above.

    def _arm(self, trigger: _Trigger) -> None:
        if trigger.left < 1:
            raise UsageError(f"n counts from 1, not {trigger.left}")
        self._do(lambda: self._triggers.append(trigger))

    def _set(self, **changes: Any) -> None:
        def act() -> None:
            self._faults = replace(self._faults, **changes)

        self._do(act)

    def _do(self, act: Callable[[], None]) -> None:
        """Have the thread do something, and wait until it is done."""
        done: Future[None] = Future()
        self._calls.append((act, done))
        self._wake.send(b"\0")
        done.result(10)

    def _run(self) -> None:
        while not self._closing:
            for key, mask in self._selector.select(self._move()):
                key.data(mask)
        for link in list(self._links):
            link.close()
        self._selector.close()
        self._listener.close()
        self._woken.close()

    def _move(self) -> float | None:
        """Move what may move; return in how many seconds there is more, None for never."""
        now = time.monotonic()
        moments = [moment for link in list(self._links) if (moment := link.move(now)) is not None]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _on_wake(self, mask: int) -> None:
        self._woken.recv(_CHUNK)
        while self._calls:
            act, done = self._calls.popleft()
            try:
                act()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _on_connection(self, mask: int) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # the client went away again
            return
        self.connections += 1
        try:
            server = self._target.connect()
        except OSError:
            client.close()
            return
        self._links.add(_Link(self, client, server))

    def _listen(self, *, accepting: bool) -> None:
        if accepting == self._accepting:
            return
        self._accepting = accepting
        if accepting:
            self._listener.listen(512)
            self._selector.register(self._listener, selectors.EVENT_READ, self._on_connection)
        else:  # a bound socket that does not listen refuses, and keeps the port for us
            self._selector.unregister(self._listener)
            _shut(self._listener)
            self._listener.close()
            self._listener = self._bound()

    def _bound(self) -> socket.socket:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.path))
        else:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port))
        listener.setblocking(False)
        return listener

    # What its links use.

    def _watch(
        self, side: socket.socket, wanted: int, watched: int, act: Callable[[int], None]
    ) -> None:
        """Change which events of a socket are waited for."""
        if not watched:
            self._selector.register(side, wanted, act)
        elif not wanted:
            self._selector.unregister(side)
        else:
            self._selector.modify(side, wanted, act)

    def _forget(self, side: socket.socket) -> None:
        """Wait for nothing more from a socket."""
        self._selector.unregister(side)

    def _fired(self, where: str, piece: Piece) -> _Trigger | None:
        """Count a request or reply against the single faults; return the one it sets off."""
        hit = None
        for trigger in list(self._triggers):
            if trigger.where == where and trigger.matches(piece):
                trigger.left -= 1
                if not trigger.left:
                    self._triggers.remove(trigger)
                    hit = hit or trigger
        return hit


@dataclass(frozen=True)
class _Lasting:
    """What holds for all connections until it is healed."""

    silent: bool = False
    mute: bool = False
    #: Seconds between two bytes of a reply; 0 for no limit.
    byte_pause: float = 0.0
    lag: float = 0.0


class _Trigger:
    """A single fault: what the n-th request or reply of a sort sets off."""

    def __init__(self, where: str, n: int, of: str, *, forward: bool, cut: bool) -> None:
        self.where = where
        self.left = n
        self.forward = forward
        self.cut = cut
        self._of = re.compile(rf"\s*{re.escape(of)}(?![^\s;(])", re.IGNORECASE) if of else None

    def matches(self, piece: Piece) -> bool:
        """Return whether any statement of the request begins with the words asked for."""
        return self._of is None or any(map(self._of.match, piece.of.splitlines()))


class _Flow:
    """One direction of a connection: what was read and is not yet written."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        #: When each piece came; empty bytes are the end of the stream.
        self.held: deque[tuple[float, bytes]] = deque()
        #: What is due and goes out as fast as the sink takes it.
        self.out = bytearray()
        self.size = 0
        self.reading = True
        self.ending = False
        self.ended = False
        self._next_byte = 0.0

    def put(self, data: bytes) -> None:
        """Take a piece to be written in its time; empty bytes end the stream."""
        self.held.append((time.monotonic(), data))
        self.size += len(data)

    def move(self, now: float, lag: float, byte_pause: float) -> float | None:
        """Write what is due; return when more will be, None when only an event can tell."""
        while self.held and self.held[0][0] + lag <= now:
            data = self.held.popleft()[1]
            self.out += data
            self.ending |= not data
        if self.out and byte_pause:
            if now >= self._next_byte:
                self._send(1)
                self._next_byte = max(now, self._next_byte + byte_pause)
            return self._next_byte if self.out else now
        if self.out:
            self._send(len(self.out))
        if self.ending and not self.out and not self.ended:
            self.ended = True
            self.sink.shutdown(socket.SHUT_WR)
        return self.held[0][0] + lag if self.held else None

    def _send(self, count: int) -> None:
        try:
            sent = self.sink.send(self.out[: min(count, _CHUNK)])
        except BlockingIOError:
            return
        del self.out[:sent]
        self.size -= sent


class _Link:
    """One connection: the client's side, the server's side, and what flows between them."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._requests = _Flow(client, server)
        self._replies = _Flow(server, client)
        self._wire: Wire | None = None
        #: Pieces of a request that is not complete: a fault hits all of it or nothing.
        self._partial: list[bytes] = []
        self._in_reply = False
        self._swallowing: _Trigger | None = None
        for side in (client, server):
            side.setblocking(False)
            if side.family != socket.AF_UNIX:
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watched = {client: 0, server: 0}
        self._watch()

    def close(self, *, reset: bool = False) -> None:
        """Close both sides now; what is held is lost."""
        for side, watched in self._watched.items():
            if watched:
                self._proxy._forget(side)
            if reset:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            else:
                _shut(side)
            side.close()
        self._watched.clear()
        self._proxy._links.discard(self)

    def move(self, now: float) -> float | None:
        """Write what the lasting faults let through; return when there will be more."""
        faults = self._proxy._faults
        moments = []
        try:
            if not faults.silent:
                moments.append(self._requests.move(now, faults.lag, 0.0))
            if not faults.silent and not faults.mute:
                moments.append(self._replies.move(now, faults.lag, faults.byte_pause))
        except OSError:
            self.close(reset=True)
            return None
        if self._requests.ended and self._replies.ended:
            self.close()
            return None
        self._watch()
        return min((moment for moment in moments if moment is not None), default=None)

    def _watch(self) -> None:
        """Ask for exactly the events that can make progress."""
        proxy, faults = self._proxy, self._proxy._faults
        for flow, back in ((self._requests, self._replies), (self._replies, self._requests)):
            stuck = faults.silent or (flow is self._requests and (faults.mute or faults.byte_pause))
            wanted = 0
            if flow.reading and flow.size < _HELD:
                wanted |= selectors.EVENT_READ
            if back.out and not stuck:
                wanted |= selectors.EVENT_WRITE
            if wanted != self._watched[flow.source]:
                proxy._watch(flow.source, wanted, self._watched[flow.source], self._on_event(flow))
                self._watched[flow.source] = wanted

    def _on_event(self, flow: _Flow) -> Callable[[int], None]:
        def act(mask: int) -> None:
            if mask & selectors.EVENT_READ and flow.reading and self._watched:
                self._read(flow)

        return act

    def _read(self, flow: _Flow) -> None:
        try:
            data = flow.source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self.close(reset=True)
            return
        try:
            if not data:
                flow.reading = False
                flow.put(b"")
            elif flow is self._requests:
                self._on_requests(data)
            else:
                self._on_replies(data)
        except ValueError:  # bytes that break the protocol
            self.close(reset=True)

    def _on_requests(self, data: bytes) -> None:
        self._wire = self._wire or wire_for(data)
        for piece in self._wire.requests(data):
            self._partial.append(piece.data)
            if not piece.last and not piece.unasked:
                continue
            trigger = None
            if not piece.unasked:
                self._proxy.requests += 1
                trigger = self._proxy._fired("request", piece)
            if trigger is None or trigger.forward:
                self._requests.put(b"".join(self._partial))
            self._partial.clear()
            if trigger is not None and trigger.cut:
                self._end()
                return

    def _on_replies(self, data: bytes) -> None:
        if self._wire is None:  # the server speaks first: bytes we cannot read
            self._wire = RawWire()
        for piece in self._wire.replies(data):
            if piece.unasked:
                self._replies.put(piece.data)
                continue
            if not self._in_reply:
                self._swallowing = self._proxy._fired("reply", piece)
            self._in_reply = not piece.last
            self._proxy.replies += piece.last
            if self._swallowing is None:
                self._replies.put(piece.data)
            elif piece.last and self._swallowing.cut:
                self._end()
                return

    def _end(self) -> None:
        """Read no more; close both sides when all that came before is out."""
        for flow in (self._requests, self._replies):
            flow.reading = False
            flow.put(b"")


def _shut(side: socket.socket) -> None:
    """End a socket also where a forked child holds a copy of it."""
    try:
        side.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more


class _Address(NamedTuple):
    """Where a target listens, and how its URL reads with the address replaced."""

    where: str | tuple[str, int]
    scheme: str = ""
    user: str = ""
    database: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def connect(self) -> socket.socket:
        """Open a connection to the target."""
        if isinstance(self.where, tuple):
            return socket.create_connection(self.where, timeout=2)
        side = socket.socket(socket.AF_UNIX)
        side.settimeout(2)
        try:
            side.connect(self.where)
        except OSError:
            side.close()
            raise
        return side

    @property
    def socket_name(self) -> str:
        """The file name that a client expects of a unix socket."""
        return ".s.PGSQL.5432" if self.scheme == "postgresql" else "proxy.sock"

    def leading_to(self, there: int | Path) -> str:
        """Return the target's URL with another address: a port, or a unix socket's path."""
        options = dict(self.options)
        if self.scheme == "postgresql":
            host = f"127.0.0.1:{there}" if isinstance(there, int) else ""
            if isinstance(there, Path):
                options |= {"host": str(there.parent), "port": "5432"}
            path = f"{host}/{self.database}"
        elif isinstance(there, int):
            path = f"127.0.0.1:{there}/{self.database or 0}"
        else:
            options["db"] = self.database or "0"
            path = str(there)
        scheme = "unix" if isinstance(there, Path) and self.scheme == "redis" else self.scheme
        query = f"?{urlencode(options)}" if options else ""
        return f"{scheme}://{self.user}{path}{query}"


def _parse(target: Target) -> _Address:
    if isinstance(target, tuple):
        return _Address(target, "redis")
    url = urlsplit(target if isinstance(target, str) else _url_of(target))
    user = f"{url.netloc.rpartition('@')[0]}@" if "@" in url.netloc else ""
    options = {name: values[-1] for name, values in parse_qs(url.query).items()}
    where: str | tuple[str, int]
    if url.scheme == "redis":
        where = (url.hostname or "localhost", url.port or 6379)
        database = url.path.strip("/")
    elif url.scheme == "unix":
        where = url.path
        database = options.pop("db", "")
    elif url.scheme in ("postgresql", "postgres"):
        host = options.pop("host", None) or url.hostname or "localhost"
        port = int(options.pop("port", 0)) or url.port or 5432
        where = os.path.join(host, f".s.PGSQL.{port}") if host.startswith("/") else (host, port)
        database = url.path.strip("/")
    else:
        raise UsageError(
            "a proxy's target is a server of redishacks.testing, a (host, port), or a URL that "
            f"begins with redis://, unix:// or postgresql://, not {url.scheme or 'nothing'}://"
        )
    scheme = "postgresql" if url.scheme.startswith("postgres") else "redis"
    return _Address(where, scheme, user, database, tuple(options.items()))


def _url_of(server: Server | Postgres) -> str:
    return server.url if isinstance(server, Server) else server.dsn
