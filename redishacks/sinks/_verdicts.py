"""What a database may answer to a statement, the same for every driver.

Beside these a statement may end in `UnavailableError`: away, or refusing everybody.

`LackingError` and `UnforeseenError` are suspicious (`SUSPICIOUS`): a policy or a trigger may mean
one row by them, or the database may be in disorder. Only trying other rows tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redishacks.errors import RedisHacksError, SchemaError, ServerError

#: The longest reason kept with a dead letter.
_LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Result:
    """What a statement returned: its rows, how many rows it wrote, its command tag."""

    rows: Sequence[tuple[Any, ...]]
    count: int
    tag: str = ""


class RefusedError(Exception):
    """The data are at fault: a smaller part of them may pass. `state` is the SQLSTATE, if any."""

    def __init__(self, reason: str, state: str = "") -> None:
        self.reason = reason[:_LONGEST_REASON]
        self.state = state
        super().__init__(self.reason)


class SlowError(Exception):
    """The statement was canceled; a smaller one may pass."""


class BusyError(Exception):
    """Another transaction is in the way."""


class LackingError(Exception):
    """A table, a column or a grant is missing, or of another type than it was."""

    def __init__(self, reason: str) -> None:
        self.reason = reason[:_LONGEST_REASON]
        super().__init__(reason)


class UnforeseenError(Exception):
    """An error of a code that blames neither the data nor the server."""

    def __init__(self, reason: str, state: str = "") -> None:
        self.reason = reason[:_LONGEST_REASON]
        self.state = state
        super().__init__(reason)


SUSPICIOUS = (LackingError, UnforeseenError)


def raised(error: LackingError | UnforeseenError | RefusedError) -> RedisHacksError:
    """Return what the caller of a sink gets to see when nothing else could be done about it."""
    if isinstance(error, LackingError):
        return SchemaError(str(error))
    return ServerError(f"{error.state or 'ERR'} {error}")
