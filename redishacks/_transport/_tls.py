"""TLS between a socket and its reader, without I/O: both colours move the bytes themselves."""

from __future__ import annotations

import ssl


class Tls:
    """One TLS session: bytes from the socket go in, plain text comes out, and the other way."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def begin(self, data: bytes = b"") -> tuple[bytes, bool]:
        """Go on with the handshake; returns what to send, and whether it is complete.

        Raises `ssl.SSLError`, for one when the certificate is not to be trusted.
        """
        self._incoming.write(data)
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            return self._outgoing.read(), False
        return self._outgoing.read(), True

    def seal(self, data: bytes) -> bytes:
        """Encrypt; returns what to send."""
        self._session.write(data)
        return self._outgoing.read()

    def open(self, data: bytes) -> bytes:
        """Decrypt what the socket gave; empty when no record is whole yet.

        Raises `ssl.SSLError` when the session has ended.
        """
        self._incoming.write(data)
        plain = []
        try:
            while piece := self._session.read(65536):
                plain.append(piece)
        except ssl.SSLWantReadError:
            pass
        else:
            if not plain:
                raise ssl.SSLEOFError("the server ended the TLS session")
        return b"".join(plain)
