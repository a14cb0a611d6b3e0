"""What one kind of series does its own way: how hits merge, and how a bucket holds them.

All kinds share the keys, the clock and the planner (commands.py, plan.py); a `Kind` says the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from redishacks._command import Command, Script, script
from redishacks.timeseries.resolution import DEFAULT, Resolution, Rung

#: What was counted, as integers: an amount, or all that a gauge notes.
Amounts = tuple[int, ...]
#: What is in a bucket: by place in its key and by member, where it has some.
Entries = dict[tuple[int, bytes], Amounts]


class Hit(NamedTuple):
    """Something for the bucket of one moment."""

    key: bytes
    #: Seconds since 1970.
    time: int
    amounts: Amounts
    #: The member of a set, or the bin of a histogram; empty for kinds without.
    member: bytes = b""


class Kind(ABC):
    """How one kind of series is kept."""

    #: As the record in Redis has it.
    name: ClassVar[str]
    #: The script that adds to buckets, and the resolutions unless told otherwise.
    script_name: ClassVar[str]
    usual: ClassVar[Sequence[Resolution]] = DEFAULT
    #: A key holds several buckets; else each has its own.
    packed: ClassVar[bool] = True
    #: Why a hit is refused that comes on top of others.
    limit: ClassVar[str] = "the sum would pass 2^63"

    @property
    def script(self) -> Script:
        """The script that adds to buckets."""
        return script(self.script_name)

    def fields(self) -> dict[str, str]:
        """Return what the record in Redis says besides, and everybody must agree on."""
        return {}

    @abstractmethod
    def size(self, rung: Rung) -> int:
        """Return what the script is told of a key of this resolution."""

    @abstractmethod
    def merged(self, first: Amounts, then: Amounts) -> Amounts:
        """Return two amounts as one."""

    def later(self, amounts: Amounts, seconds: float) -> Amounts:
        """Return amounts as they are when the clock they went by is so far behind."""
        return amounts

    @abstractmethod
    def words(self, place: int, member: bytes, amounts: Amounts) -> list[tuple[str | bytes, ...]]:
        """Return what the script is told of a hit: entries of its words."""

    @abstractmethod
    def read(self, keys: Sequence[bytes]) -> list[Command[list[Any]]]:
        """Return what reads keys of one slot; the results, one after the other, are theirs."""

    @abstractmethod
    def bucket(self, raw: Any, rung: Rung) -> Any:
        """Return what was read as this kind has it, of a key or of None for one not there."""

    def fold(self, into: Entries, entries: Mapping[tuple[int, bytes], Amounts]) -> None:
        """Add entries to others."""
        for entry, amounts in entries.items():
            held = into.get(entry)
            into[entry] = amounts if held is None else self.merged(held, amounts)


def mget(keys: Sequence[bytes]) -> list[Command[list[Any]]]:
    """Read strings."""
    return [Command(("MGET", *keys), tuple(keys), repeatable=True)]
