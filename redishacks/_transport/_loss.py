"""How reaching a server can fail: the drivers raise these, and `Talk` says what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redishacks.errors import UnavailableError


class Lost(Exception):
    """An exchange that did not end: what was written, and the replies until then."""

    def __init__(self, why: str, *, written: bool, replies: Sequence[Any] = ()) -> None:
        super().__init__(why)
        self.why = why
        self.written = written
        self.replies = replies


class Unreachable(Exception):
    """No connection could be made; nothing was sent."""


class Refused(Exception):
    """A new connection was refused for now; nothing was sent."""


class Overtaken(UnavailableError):
    """Who has which keys is known better by now; nothing was sent."""
