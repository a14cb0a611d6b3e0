"""Where requests and replies begin and end on a wire: RESP, PostgreSQL, or unknown bytes.

A wire is fed the bytes of both directions and cuts them into pieces, so that a fault can hit "the
second reply" or "the reply of COMMIT" whatever the sizes in which bytes arrive. It changes nothing:
the pieces joined are the bytes.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar, NamedTuple, Protocol


class Piece(NamedTuple):
    """Some whole bytes of one request or reply."""

    data: bytes
    #: It ends a request or a reply.
    last: bool = True
    #: What is asked or answered: `INCR hits`, `COMMIT`; complete in the piece that is the last.
    of: str = ""
    #: Part of no request or reply, such as a RESP3 push: it always passes.
    unasked: bool = False


class Wire(Protocol):
    """One connection's two directions."""

    def requests(self, data: bytes) -> list[Piece]:
        """Cut what the client sent."""

    def replies(self, data: bytes) -> list[Piece]:
        """Cut what the server sent."""


def wire_for(first: bytes) -> Wire:
    """Choose by the first bytes that a client sends."""
    if first.startswith(b"*"):
        return RespWire()
    if first.startswith(b"\x00"):
        return PostgresWire()
    return RawWire()


class RawWire:
    """Every chunk is a request or a reply by itself."""

    def requests(self, data: bytes) -> list[Piece]:
        """Return the chunk."""
        return [Piece(data)]

    def replies(self, data: bytes) -> list[Piece]:
        """Return the chunk."""
        return [Piece(data)]


class RespWire:
    """Redis: requests are arrays of bulk strings; each has one reply, in order.

    Commands with no reply or several (CLIENT REPLY, SUBSCRIBE, MONITOR) put `of` out of step.
    """

    def __init__(self) -> None:
        self._requests = RespFrames()
        self._replies = RespFrames()
        self._asked: deque[str] = deque()

    def requests(self, data: bytes) -> list[Piece]:
        """Return whole commands."""
        pieces = [Piece(frame, of=_command_text(frame)) for frame in self._requests.feed(data)]
        self._asked.extend(piece.of for piece in pieces)
        return pieces

    def replies(self, data: bytes) -> list[Piece]:
        """Return whole replies and pushes."""
        return [
            Piece(frame, unasked=True)
            if frame.startswith(b">")
            else Piece(frame, of=self._asked.popleft() if self._asked else "")
            for frame in self._replies.feed(data)
        ]


class RespFrames:
    """Cuts a RESP2 or RESP3 stream into top-level values, without decoding them."""

    _LENGTH = frozenset(b"$=!")
    _COUNT: ClassVar = {ord("*"): 1, ord("~"): 1, ord(">"): 1, ord("%"): 2, ord("|"): 2}

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._missing = 1

    def feed(self, data: bytes) -> list[bytes]:
        """Return the values completed by these bytes."""
        self._buffer += data
        frames = []
        while (end := self._scan()) is not None:
            frames.append(bytes(self._buffer[:end]))
            del self._buffer[:end]
            self._scanned, self._missing = 0, 1
        return frames

    def _scan(self) -> int | None:
        """Return where the first value ends, or None when it is not all there."""
        while self._missing:
            line_end = self._buffer.find(b"\r\n", self._scanned)
            if line_end < 0:
                return None
            kind = self._buffer[self._scanned]
            end = line_end + 2
            if kind in self._LENGTH:
                length = int(self._buffer[self._scanned + 1 : line_end])
                end += length + 2 if length >= 0 else 0
                if end > len(self._buffer):
                    return None
            elif kind in self._COUNT:
                count = int(self._buffer[self._scanned + 1 : line_end])
                self._missing += max(count, 0) * self._COUNT[kind]
            if kind != ord("|"):  # an attribute precedes a value and is none
                self._missing -= 1
            self._scanned = end
        return self._scanned


def _command_text(frame: bytes) -> str:
    """Return a command as text: the words of an array of bulk strings, shortened."""
    words: list[bytes] = []
    position = frame.find(b"\r\n") + 2
    while position < len(frame) and len(words) < 8:
        line_end = frame.find(b"\r\n", position)
        length = int(frame[position + 1 : line_end])
        words.append(frame[line_end + 2 : line_end + 2 + length][:100])
        position = line_end + length + 4
    return b" ".join(words).decode(errors="replace")


class PostgresWire:
    """PostgreSQL, protocol 3: a request ends with Query or Sync, its reply with ReadyForQuery.

    What is `of`: the statements of the request, one a line, also when they were prepared before.
    The first reply of a connection is that to its start.
    """

    _SSL, _CANCEL, _GSS = 80877103, 80877102, 80877104
    #: COPY's data and end, Flush, Terminate: they pass by themselves, with what came before.
    _AT_ONCE = (b"d", b"c", b"f", b"H", b"X")

    def __init__(self) -> None:
        self._from_client = bytearray()
        self._from_server = bytearray()
        self._started = False
        self._one_byte_answers = 0
        self._prepared: dict[bytes, str] = {}
        self._statements: list[str] = []
        self._asked: deque[str] = deque()

    def requests(self, data: bytes) -> list[Piece]:
        """Return whole messages."""
        self._from_client += data
        pieces = []
        while not self._started and (message := _take(self._from_client, 0)):
            pieces.append(self._opening(message))
        while self._started and (message := _take(self._from_client, 1)):
            pieces.append(self._message(message))
        return pieces

    def replies(self, data: bytes) -> list[Piece]:
        """Return whole messages."""
        self._from_server += data
        pieces = []
        while self._one_byte_answers and self._from_server:
            self._one_byte_answers -= 1
            pieces.append(Piece(bytes(self._from_server[:1]), unasked=True))
            del self._from_server[:1]
        while message := _take(self._from_server, 1):
            asked = self._asked[0] if self._asked else ""
            last = message.startswith(b"Z")
            if last and self._asked:
                self._asked.popleft()
            pieces.append(Piece(message, last, asked))
        return pieces

    def _opening(self, message: bytes) -> Piece:
        code = int.from_bytes(message[4:8], "big")
        if code in (self._SSL, self._GSS):
            self._one_byte_answers += 1
            return Piece(message, unasked=True)
        self._started = True
        if code == self._CANCEL:
            return Piece(message, unasked=True)
        self._asked.append("START")
        return Piece(message, of="START")

    def _message(self, message: bytes) -> Piece:
        kind, body = message[:1], message[5:]
        if kind == b"Q":
            self._statements.append(body.rstrip(b"\0").decode(errors="replace"))
        elif kind == b"P":
            name, text = body.split(b"\0", 2)[:2]
            self._prepared[name] = text.decode(errors="replace")
        elif kind == b"B":
            name = body.split(b"\0", 2)[1]
            self._statements.append(self._prepared.get(name, ""))
        if kind not in (b"Q", b"S"):
            return Piece(message, last=False, unasked=kind in self._AT_ONCE)
        asked = "\n".join(self._statements)
        self._statements.clear()
        self._asked.append(asked)
        return Piece(message, of=asked)


def _take(buffer: bytearray, kind: int) -> bytes:
    """Remove and return the first message: `kind` bytes, then its length, which counts itself."""
    if len(buffer) < kind + 4:
        return b""
    size = kind + int.from_bytes(buffer[kind : kind + 4], "big")
    if len(buffer) < size:
        return b""
    message = bytes(buffer[:size])
    del buffer[:size]
    return message
