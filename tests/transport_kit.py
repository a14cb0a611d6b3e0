"""What the transport's tests share: both colours behind one face, and servers that follow a script.

`localhost.pem` is a key and certificate for tests only: for `localhost`, from 2020 to 2120.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hiredis
import redis
import redis.asyncio

from redishacks._command import Arg, Command, Outcome, Script
from redishacks._transport import connect, connect_async
from redishacks.testing import Cluster, Server

PEM = Path(__file__).with_name("localhost.pem")

#: A test allows ten times of what is promised beyond a deadline (50 ms).
LENIENCE = 0.5


class Line:
    """A transport of either colour with sync methods."""

    def __init__(self, transport: Any, runner: asyncio.Runner | None) -> None:
        self.transport = transport
        self._runner = runner

    def call(self, command: Command[Any], deadline: float = 5.0) -> Any:
        """Say one command."""
        return self._result(self.transport.call(command, deadline))

    def run(self, commands: Sequence[Command[Any]], deadline: float = 5.0) -> list[Outcome[Any]]:
        """Say several."""
        found: list[Outcome[Any]] = self._result(self.transport.run(commands, deadline))
        return found

    def close(self) -> None:
        """Close the connections."""
        self._result(self.transport.aclose() if self._runner else self.transport.close())

    def _result(self, made: Any) -> Any:
        return self._runner.run(made) if self._runner else made


class Colour:
    """Clients and transports of one colour."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.runner = asyncio.Runner() if name == "async" else None
        self.module: Any = redis.asyncio if self.runner else redis

    def connect(self, client: Any, **options: Any) -> Line:
        """Return the transport of a client or URL."""
        return Line((connect_async if self.runner else connect)(client, **options), self.runner)

    def to(self, server: Server, **options: Any) -> Line:
        """Return the transport of a fresh client of a server."""
        settings = {"host": server.host, "port": server.port, "password": server.password}
        return self.connect(self.module.Redis(**settings | options))

    def to_port(self, port: int, **options: Any) -> Line:
        """Return the transport of a fresh client of a port."""
        return self.connect(self.module.Redis(port=port, **options))

    def to_cluster(self, cluster: Cluster, **options: Any) -> Line:
        """Return the transport of a fresh cluster client."""
        first = cluster.nodes[0]
        client = self.module.RedisCluster(host=first.host, port=first.port, **options)
        line = self.connect(client)
        line.client = client  # type: ignore[attr-defined]
        return line

    def close(self) -> None:
        """End the loop."""
        if self.runner:
            self.runner.close()


def written(words: Sequence[Arg | float]) -> tuple[Arg, ...]:
    """Numbers as text: commands hold nothing else."""
    return tuple(str(word) if isinstance(word, int | float) else word for word in words)


def say(*words: Arg | float, key: str | bytes | None = None) -> Command[Any]:
    """Any command; `key` is appended to its first word and decides the node."""
    if key is None:
        return Command(written(words))
    raw = key.encode() if isinstance(key, str) else key
    return Command(written((words[0], raw, *words[1:])), (raw,))


def incr(key: str | bytes) -> Command[Any]:
    """A write that counts twice when said twice."""
    return say("INCR", key=key)


def get(key: str | bytes) -> Command[Any]:
    """A read."""
    return say("GET", key=key)._replace(repeatable=True)


def echo(value: Arg | float) -> Command[Any]:
    """The server says it back: shows whose reply one got."""
    return say("ECHO", value)


def scripted(source: str, *args: Arg | float, keys: Sequence[str] = ()) -> Command[Any]:
    """A script with its keys and arguments."""
    raw = source.encode()
    sha = hashlib.sha1(raw).hexdigest().encode()
    return Command(
        written(args), tuple(key.encode() for key in keys), script=Script("a script", raw, sha)
    )


@contextmanager
def took(at_most: float, at_least: float = 0.0) -> Iterator[None]:
    """Check how long the body takes."""
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    assert at_least <= seconds <= at_most, f"{seconds:.3f} s"


def eventually(condition: Callable[[], Any], within: float = 20.0) -> Any:
    """Wait until a condition holds and return its value."""
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {within} s"
        time.sleep(0.005)
    return value


@contextmanager
def canned(answer: Callable[[list[Any]], bytes | None], *, tls: bool = False) -> Iterator[int]:
    """Run a server that answers every command by a function; None closes the connection.

    It reads no further until its answer has left, which some proxies do too. Yields the port.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def serve(side: socket.socket) -> None:
        reader = hiredis.Reader(notEnoughData=canned)
        try:
            if tls:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(PEM)
                side = context.wrap_socket(side, server_side=True)
                taken.append(side)
            while data := side.recv(65536):
                reader.feed(data)
                while (words := reader.gets()) is not canned:
                    reply = b"+PONG\r\n" if words == [b"PING"] else answer(words)
                    if reply is None:
                        return
                    side.sendall(reply)
        except OSError:
            pass
        finally:
            side.close()

    def accept() -> None:
        while True:
            try:
                side, _ = listener.accept()
            except OSError:
                return
            taken.append(side)
            threads.append(threading.Thread(target=serve, args=(side,)))
            threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        threads[0].join()
        for side in taken:
            try:
                side.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            side.close()
        for thread in threads:
            thread.join()


def bulk(value: bytes) -> bytes:
    """Write a reply."""
    return b"$%d\r\n%s\r\n" % (len(value), value)
