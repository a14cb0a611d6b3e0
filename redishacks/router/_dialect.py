"""How redis-py's client writes words and reads replies, so that a router's are the same.

Only documented attributes are used: the pool's encoder and the client's `response_callbacks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis
from hiredis import ReplyError
from redis.client import EMPTY_RESPONSE, NEVER_DECODE

from redishacks.errors import ServerError, UsageError

_OURS = {EMPTY_RESPONSE, NEVER_DECODE, "keys"}


class Dialect:
    """What one redis-py client says and hears."""

    def __init__(self, client: Any) -> None:
        if isinstance(client, str):
            client = redis.Redis.from_url(client)
        self._encoder = client.connection_pool.get_encoder()
        self._callbacks: Mapping[str, Callable[..., Any]] = client.response_callbacks
        self.decodes = bool(self._encoder.decode_responses)

    def encode(self, value: Any) -> bytes:
        """Encode one word; raises `UsageError` for what redis-py does not take."""
        if type(value) is str:
            try:
                return value.encode()
            except UnicodeEncodeError:
                raise UsageError(f"{value!r} is not encodable as UTF-8") from None
        if type(value) is bytes:
            return value
        try:
            encoded: bytes | memoryview | bytearray = self._encoder.encode(value)
        except redis.DataError:
            raise UsageError(
                f"bytes, str, int or float is accepted, not {type(value).__name__}"
            ) from None
        return bytes(encoded)

    def words(self, args: Sequence[Any]) -> tuple[bytes, ...]:
        """Encode a call; its name may be several words ("CLIENT LIST")."""
        encode = self.encode
        if " " in args[0]:
            return (*args[0].encode().split(), *map(encode, args[1:]))
        return tuple(map(encode, args))

    def parse(self, name: str, options: Mapping[str, Any]) -> Callable[[Any], Any]:
        """Return what makes redis-py's value of a raw reply."""
        callback = self._callbacks.get(name)
        decode = self.decodes and NEVER_DECODE not in options
        rest = {key: value for key, value in options.items() if key not in _OURS}
        if callback is None:
            return self.decode if decode else _as_is
        if not decode:
            return (lambda reply: callback(reply, **rest)) if rest else callback
        return lambda reply: callback(self.decode(reply), **rest)

    def decode(self, reply: Any) -> Any:
        """Make text of bytes, wherever they are in a reply."""
        if type(reply) is bytes:
            return self._encoder.decode(reply)
        if type(reply) is list:
            return [self.decode(each) for each in reply]
        if type(reply) is dict:
            return {self.decode(key): self.decode(value) for key, value in reply.items()}
        if type(reply) is set:
            return {self.decode(each) for each in reply}
        return reply


def _as_is(reply: Any) -> Any:
    return reply


def value_of(reply: Any, parse: Callable[[Any], Any]) -> Any:
    """Return what redis-py makes of a raw reply; raises `ServerError` for an error."""
    if isinstance(reply, ReplyError):
        raise ServerError(str(reply))
    return parse(reply)
