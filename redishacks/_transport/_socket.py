"""What both colours do to a socket, and say about its errors."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping

#: Idle for longer than this, a connection is looked at before it is used …
LOOK_AFTER = 0.005
#: … and for longer than this it must answer a PING first.
PING_AFTER = 30.0
#: Idle for longer than this, it is closed when another one is given back.
CLOSE_AFTER = 60.0

LATE = "no reply within the deadline"
CLOSED = "the connection was closed"
NO_RESP = "the reply was not RESP"

#: Seconds between two tries to enter a unix socket's full backlog.
BACKLOG_PAUSE = 0.005


def prepare(sock: socket.socket, keepalive: Mapping[int, int | bytes]) -> None:
    """Set what a TCP connection needs: no delay, and keepalive for peers that vanish."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in keepalive.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def reason(error: OSError) -> str:
    """Say an operating system's error in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    code = error.errno
    if code in {errno.ECONNREFUSED, errno.ENOENT}:
        return "connection refused"
    if code in {errno.ECONNRESET, errno.EPIPE}:
        return CLOSED
    return os.strerror(code) if code else str(error)
