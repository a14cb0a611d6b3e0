"""What a database may answer to a statement, the same for every driver.

Beside these a statement may end in `UnavailableError` (away, or refusing everybody) or
`ServerError` (an error that nobody foresaw).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
