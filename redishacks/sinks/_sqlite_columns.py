"""Columns of a SQLite table, by what the catalogue says: values they hold, SQL that merges them."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redishacks import _units
from redishacks._sink import Rule
from redishacks.sinks._target import BadIdError, identifier, text_of


class Column(NamedTuple):
    """A column and what its declared type makes of values."""

    name: str
    declared: str

    @property
    def affinity(self) -> str:
        """Return the affinity by SQLite's rules of names."""
        declared = self.declared.upper()
        for part, affinity in (
            ("INT", "INTEGER"), ("CHAR", "TEXT"), ("CLOB", "TEXT"), ("TEXT", "TEXT"),
            ("BLOB", "BLOB"), ("REAL", "REAL"), ("FLOA", "REAL"), ("DOUB", "REAL"),
        ):  # fmt: skip
            if part in declared:
                return affinity
        return "NUMERIC" if declared and declared != "ANY" else "NONE"

    @property
    def is_time(self) -> bool:
        """Whether it holds moments as text."""
        return self.declared.upper().startswith(("DATETIME", "TIMESTAMP"))

    def fits(self, rule: Rule) -> bool:
        """Whether a counter's column of this rule can be kept in it, exactly."""
        if self.is_time:
            return rule is not Rule.SUM
        return self.affinity in ("INTEGER", "NUMERIC", "NONE")

    def key(self, part: bytes) -> int | str | bytes:
        """Return a part of an id as this key column holds it; raises `BadIdError`."""
        if self.affinity == "BLOB":
            return part
        if self.affinity in ("INTEGER", "NUMERIC"):
            if not _INTEGER.fullmatch(part) or not -(2**63) <= (number := int(part)) < 2**63:
                raise BadIdError(f"id is not an integer of 64 bits, as {self.declared} keys are")
            return number
        return text_of(part)

    def amounts(
        self, rule: Rule, amounts: Sequence[int | None], bad: dict[int, str]
    ) -> Sequence[Any]:
        """Return amounts as this column holds them; note in `bad` those that it cannot hold."""
        if rule is Rule.SUM:
            return [amount or 0 for amount in amounts]
        if not self.is_time:
            return amounts
        moments: list[str | None] = []
        for place, amount in enumerate(amounts):
            moments.append(None)
            if amount is not None:
                try:
                    moments[-1] = _units.moment(amount).isoformat(" ", "microseconds")[:26]
                except OverflowError:
                    bad[place] = f"{amount} is no moment of the years 1 to 9999"
        return moments

    def reading(self, value: Any) -> int | None:
        """Return a value of this column as an amount; None where it is none."""
        if self.is_time and isinstance(value, str):
            try:
                found = dt.datetime.fromisoformat(value)
            except ValueError:
                return None
            return _units.microseconds(found.replace(tzinfo=found.tzinfo or dt.UTC))
        return value if isinstance(value, int) else None

    def change(self, rule: Rule, new: str) -> tuple[str, str]:
        """Return the assignment that merges a new value, and what must hold for it to be right."""
        name = identifier(self.name)
        if rule is Rule.SUM:
            total = f"COALESCE({name}, 0) + {new}"
            # Past 64 bits SQLite goes on in floating point, without a word.
            return (
                f"{name} = {total}",
                f"typeof({name}) IN ('integer', 'null') AND typeof({total}) = 'integer'",
            )
        # SQLite's max() of a NULL is NULL.
        change = f"{name} = {rule.value}(COALESCE({name}, {new}), COALESCE({new}, {name}))"
        if self.is_time:
            # Texts compare as moments only where they are written alike.
            return change, f"({name} IS NULL OR {name} GLOB '{_TIME}' OR {name} GLOB '{_TIME}.*')"
        return change, f"typeof({name}) IN ('integer', 'null')"


_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,19}\s*")
_DIGITS = "[0-9][0-9]"
_TIME = f"{_DIGITS}{_DIGITS}-{_DIGITS}-{_DIGITS} {_DIGITS}:{_DIGITS}:{_DIGITS}"


class Shape(NamedTuple):
    """The target's columns."""

    keys: tuple[Column, ...]
    #: By the counter's column.
    values: Mapping[str, Column]
