"""Bytes on the wire: commands packed, replies parsed, the handshake of a new connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from redishacks._command import Arg, Command, Script, as_is
from redishacks.errors import UsageError

#: What `Reader.gets` gives when no whole reply is there; not False, which RESP3 knows as a value.
MISSING = object()

Words = tuple[Arg, ...]

#: Host and port; a unix socket's path and 0; a Sentinel's service name and -1.
Address = tuple[str, int]

#: hiredis' own, whose stub knows tuples of one word only.
pack_words: Callable[[Words], bytes] = hiredis.pack_command  # type: ignore[assignment]

ASKING = hiredis.pack_command((b"ASKING",))
PING = hiredis.pack_command((b"PING",))


def new_reader() -> hiredis.Reader:
    """Make a parser for one connection: bytes as they come, error replies as values."""
    return hiredis.Reader(notEnoughData=MISSING)


def pack(command: Command[Any], whole: bool = False) -> bytes:
    """Encode a command; `str` is UTF-8, and `whole` sends a script's source instead of its hash."""
    if command.packed is not None and not whole:
        return command.packed
    words: Words = command.args
    script = command.script
    if script is not None:
        head = (b"EVAL", script.source) if whole else (b"EVALSHA", script.sha)
        words = (*head, b"%d" % len(command.keys), *command.keys, *words)
    try:
        packed: bytes = pack_words(words)
    except (TypeError, UnicodeEncodeError):
        raise UsageError(f"{name(command)}: arguments must be bytes or str") from None
    return packed


class Form:
    """Calls of a script that differ in their first arguments: all else is encoded once."""

    __slots__ = ("_head", "_keys", "_rest", "_script", "_tail", "_words")

    def __init__(self, script: Script, keys: tuple[bytes, ...], *rest: str) -> None:
        self._script, self._keys, self._rest = script, keys, rest
        fixed = (b"EVALSHA", script.sha, b"%d" % len(keys), *keys)
        self._words = len(fixed) + len(rest)
        self._head = pack_words(fixed).decode("latin-1").removeprefix(f"*{len(fixed)}")
        self._tail = "".join(map(_bulk, rest))

    def fill(self, *words: str) -> Command[Any]:
        """Return a call with these arguments, encoded by now."""
        text = f"*{self._words + len(words)}{self._head}"
        for word in words:
            text += f"${len(word)}\r\n{word}\r\n"
        text += self._tail
        # Only then are characters as many as bytes; `pack` does all others.
        packed = text.encode() if text.isascii() else None
        return Command(words + self._rest, self._keys, as_is, self._script, False, False, packed)


def _bulk(word: str) -> str:
    return f"${len(word)}\r\n{word}\r\n"


def name(command: Command[Any]) -> str:
    """Name a command for messages; never its arguments, which may be secrets."""
    if command.script is not None:
        return command.script.name
    first = command.args[0]
    return first.decode("ascii", "replace") if isinstance(first, bytes) else str(first)


def handshake(
    protocol: int, credentials: Sequence[str], client_name: str | None, db: int
) -> list[Words]:
    """Return what a new connection says first; credentials are (), (password,) or (user, password).

    It says something in any case: what answers is no hung server, and nothing is in doubt yet.
    """
    opening: list[Words] = []
    if protocol == 3:
        user = ("default", *credentials)[-2:] if credentials else ()
        opening.append(("HELLO", "3", "AUTH", *user) if user else ("HELLO", "3"))
    elif credentials:
        opening.append(("AUTH", *credentials))
    if client_name:
        opening.append(("CLIENT", "SETNAME", client_name))
    if db:
        opening.append(("SELECT", str(db)))
    return opening or [("PING",)]


def parse_address(text: str, asked: Address) -> Address:
    """Read the `host:port` of a redirection; without a host it means the node that was asked."""
    host, _, port = text.rpartition(":")
    return host or asked[0], int(port)


def show(node: Address) -> str:
    """Write a node for messages."""
    host, port = node
    return f"{host}:{port}" if port > 0 else host
