"""Connections of classes that we do not know (fakeredis, a subclass of the user's own).

They are made from the client's connection class and arguments, with its retries off, and driven by
redis-py's documented methods. Slower than our own, with the same promises as far as they reach: an
error once a command was handed over counts as sent, and a child that a signal handler forks while
one connects, and that goes on, may disturb its parent's handshake.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from math import inf
from time import monotonic
from typing import Any, Protocol

import hiredis
import redis
import redis.exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from redishacks._transport._decide import CONNECT_DEADLINE, Message, Talk
from redishacks._transport._loss import Lost, Unreachable
from redishacks._transport._settings import Settings
from redishacks._transport._socket import CLOSED, LATE, LOOK_AFTER

#: What redis-py takes off an error reply's text when it makes an exception of it.
_CODES: Mapping[type[Exception], str] = {
    redis.exceptions.NoScriptError: "NOSCRIPT",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.MovedError: "MOVED",
    redis.exceptions.AskError: "ASK",
    redis.exceptions.TryAgainError: "TRYAGAIN",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.MasterDownError: "MASTERDOWN",
    redis.exceptions.AuthenticationError: "NOAUTH",
}

_BROKEN = (redis.ConnectionError, redis.TimeoutError, OSError)


class ForeignLink:
    """A connection of a class that we do not know."""

    def __init__(self, settings: Settings) -> None:
        self.since = monotonic()
        self.version, self.due = 0, inf
        self._connection = _instance(settings, Retry)

    def connect(self) -> None:
        """Connect and say what must be said first; raises `Unreachable`."""
        try:
            self._connection.connect()
        except (redis.RedisError, OSError) as error:
            self.close()
            raise _unreachable(error) from None

    def ask(self, data: bytes, end: float, alone: bool) -> Any:
        """Send one packed command and return its reply."""
        self.send(data, end)
        return self.replies(1, end)[0]

    def send(self, data: bytes, end: float) -> None:
        """Send packed commands whole."""
        try:
            self._connection.send_packed_command([data], check_health=False)
        except _BROKEN:
            raise Lost(CLOSED, written=True) from None

    def replies(self, count: int, end: float) -> list[Any]:
        """Return the next replies, errors as values."""
        found: list[Any] = []
        while len(found) < count:
            try:
                if not self._connection.can_read(timeout=max(0.0, end - monotonic())):
                    raise Lost(LATE, written=True, replies=found)
                found.append(self._connection.read_response(disable_decoding=True))
            except redis.RedisError as error:
                found.append(_reply(error, found))
            except OSError:
                raise Lost(CLOSED, written=True, replies=found) from None
        return found

    def alive(self) -> bool:
        """Look whether the server has closed it."""
        try:
            return not self._connection.can_read(timeout=0)
        except (redis.RedisError, OSError):
            return False

    def close(self) -> None:
        """Close it; redis-py's connections leave a parent process's socket alone."""
        self._connection.disconnect()

    abandon = close


class AsyncConnection(Protocol):
    """What we use of redis.asyncio's connections."""

    async def connect(self) -> None: ...
    def disconnect(self, nowait: bool = ...) -> Coroutine[Any, Any, None]: ...
    async def send_packed_command(self, command: bytes, check_health: bool = ...) -> None: ...
    async def read_response(self, disable_decoding: bool = ...) -> Any: ...


class ForeignNode:
    """One server as one loop reaches it through connections that we do not know."""

    def __init__(self, settings: Settings) -> None:
        self.address = settings.address
        self._settings = settings
        self._idle: deque[tuple[AsyncConnection, float]] = deque()
        self._closing: set[asyncio.Task[None]] = set()

    def ready(self, now: float) -> None:
        """There is no short way."""

    async def exchange(self, talk: Talk[Any], message: Message) -> None:
        """Say a message, and tell the talk what came of it."""
        connection = await self._borrow()
        try:
            talk.answered(message, await self._replies(connection, talk, message))
        except Lost as loss:
            talk.lost(message, loss)

    async def _replies(
        self, connection: AsyncConnection, talk: Talk[Any], message: Message
    ) -> Sequence[Any]:
        found: list[Any] = []
        try:
            async with asyncio.timeout(talk.end - monotonic()):
                await connection.send_packed_command(message.data, check_health=False)
                while len(found) < message.replies:
                    try:
                        found.append(await connection.read_response(disable_decoding=True))
                    except redis.RedisError as error:
                        found.append(_reply(error, found))
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise Lost(LATE, written=True, replies=found) from None
            if isinstance(error, _BROKEN):
                raise Lost(CLOSED, written=True, replies=found) from None
            raise
        self._idle.append((connection, monotonic()))
        return found

    def close(self) -> None:
        """Close the idle connections, in tasks of the running loop."""
        while self._idle:
            connection, _ = self._idle.pop()
            task = asyncio.get_running_loop().create_task(connection.disconnect(nowait=True))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    retire = close

    def abandon(self) -> None:
        """Forget them: they belong to a parent process or to a closed loop."""
        self._idle.clear()

    async def _borrow(self) -> AsyncConnection:
        while self._idle:
            connection, since = self._idle.pop()
            if monotonic() - since < LOOK_AFTER or not await _has_data(connection):
                return connection
            await connection.disconnect(nowait=True)
        made: AsyncConnection = _instance(self._settings, AsyncRetry)
        try:
            async with asyncio.timeout(CONNECT_DEADLINE):
                await made.connect()
        except (redis.RedisError, OSError) as error:
            raise _unreachable(error) from None
        return made


async def _has_data(connection: Any) -> bool:
    # Data, or the end of the stream: either way of no more use. redis-py 8 has the first name.
    look = getattr(connection, "can_read", None) or connection.can_read_destructive
    for _ in range(2):  # a loop that has not run meanwhile reads in its second turn
        await asyncio.sleep(0)
    try:
        return bool(await look())
    except (redis.RedisError, OSError):
        return True


def _instance(settings: Settings, retry: Any) -> Any:
    assert settings.foreign is not None
    kind, options = settings.foreign
    return kind(
        **{
            **options,
            "decode_responses": False,
            "health_check_interval": 0,
            "retry": retry(NoBackoff(), 0),
            "retry_on_error": [],
            "retry_on_timeout": False,
            "socket_connect_timeout": CONNECT_DEADLINE,
            "socket_timeout": CONNECT_DEADLINE,
        }
    )


def _reply(error: redis.RedisError, found: Sequence[Any]) -> hiredis.ReplyError:
    """Turn an exception back into the error reply that it was; raises `Lost` if it was none."""
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), None)
    text = str(error)
    if code is not None:
        return hiredis.ReplyError(text if text.startswith(code) else f"{code} {text}")
    if not isinstance(error, redis.ResponseError):
        raise Lost(CLOSED, written=True, replies=found) from None
    # redis-py strips "ERR" and leaves codes that it has no class for.
    first = text.split(" ", 1)[0]
    return hiredis.ReplyError(text if first.isupper() else f"ERR {text}")


def _unreachable(error: Exception) -> Unreachable:
    if isinstance(error, redis.exceptions.AuthenticationError):
        return Unreachable("authentication failed")
    return Unreachable(f"connecting: {type(error).__name__}")
