"""Every error that redishacks raises, by who has to act.

    RedisHacksError
    ├── UsageError (ValueError)     the call is wrong: change the code or the configuration
    │   ├── CrossNodeError          keys of one command live on different nodes
    │   ├── TopologyMismatchError   a router's nodes are not what this client says they are
    │   └── RetentionError          a range of a series that is kept no more, or not so fine
    ├── MaybeAppliedError           sent, but the reply was lost: the caller decides
    ├── PartlyAppliedError          a call in several parts: `failed` says what became of which id
    ├── UnavailableError            away or refusing for now: try again later
    ├── ServerError                 the server understood and said no; nothing was applied
    └── SchemaError                 the database lacks a table, column or grant

No message holds a password or a connection string.
"""

from __future__ import annotations

from collections.abc import Mapping


class RedisHacksError(Exception):
    """The root: catches whatever redishacks raises on its own account."""


class UsageError(RedisHacksError, ValueError):
    """An argument or a combination of arguments that can never work."""


class CrossNodeError(UsageError):
    """The keys of one command hash to different cluster slots; nothing was sent."""


class TopologyMismatchError(UsageError):
    """A router was constructed with other nodes than those in use, or weights; nothing was sent."""


class RetentionError(UsageError):
    """A range of a time series that is kept no more, or not as fine as was asked for."""


class MaybeAppliedError(RedisHacksError):
    """A write was sent and its reply lost: it took effect once, or not at all.

    Nothing was repeated. Only the caller can know whether one too few or one too many is worse.
    """


class PartlyAppliedError(RedisHacksError):
    """A call that goes out in several parts was applied in some of them only.

    `failed` maps every id that was not surely applied to its error; all others were applied.
    """

    def __init__(self, message: str, failed: Mapping[str | bytes, Exception]) -> None:
        super().__init__(message)
        self.failed = failed


class UnavailableError(RedisHacksError):
    """A server could not be asked, or refused for now. Doing it again is safe.

    A count was not taken; a flush that had written some chunks goes on where the ledger says.
    """


class ServerError(RedisHacksError):
    """An error reply, such as WRONGTYPE; the command changed nothing. `code` is its first word."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.split(" ", 1)[0]


class SchemaError(RedisHacksError):
    """The database lacks a table, a column or a grant; `ddl` is what would mend it."""

    def __init__(self, message: str, ddl: str = "") -> None:
        super().__init__(message)
        self.ddl = ddl
