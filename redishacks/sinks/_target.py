"""What a sink writes to, checked once; and how an id becomes a key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redishacks.errors import UsageError

Table = str | tuple[str, str]

#: PostgreSQL cuts longer names in silence.
_LONGEST_NAME = 63

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def identifier(*names: str) -> str:
    """Quote a name, or a qualified one, for SQL; the only way a name gets into a statement."""
    return ".".join('"{}"'.format(name.replace('"', '""')) for name in names)


class BadIdError(Exception):
    """This id is no key of the table; the message says why."""


class Target(NamedTuple):
    """Table, key and columns of a sink, and what happens to ids without a row."""

    table: tuple[str, ...]
    key: tuple[str, ...]
    #: The counter's column -> the SQL column.
    columns: Mapping[str, str]
    mode: str
    unknown: str
    ledger: tuple[str, ...]
    dead: tuple[str, ...]

    def shown(self, kind: str) -> str:
        """Name the target for people and for `Sink.destination`."""
        key = ", ".join(map(_shown, self.key))
        columns = ", ".join(f"{_shown(a)}={_shown(b)}" for a, b in sorted(self.columns.items()))
        return f"{kind} {'.'.join(map(_shown, self.table))}({key}) {columns}"

    def check(self, columns: Sequence[str]) -> None:
        """Raise `UsageError` unless every column of a counter has a column in SQL."""
        unknown = [name for name in columns if name not in self.columns]
        if unknown:
            raise UsageError(
                f"columns= has no SQL column for the counter's {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(map(repr, self.columns))}"
            )

    def parts(self, id: bytes) -> tuple[bytes, ...]:
        """Return an id as one value per key column; raises `BadIdError`."""
        if len(self.key) == 1:
            return (id,)
        wanted = f"id is not a JSON array of {len(self.key)} scalars"
        try:
            # Numbers stay as they are written: the database reads them, not a float.
            found = json.loads(id, parse_int=str, parse_float=str, parse_constant=_refuse)
            if not isinstance(found, list) or len(found) != len(self.key):
                raise BadIdError(wanted)
            return tuple(_scalar(part) for part in found)
        except (ValueError, TypeError, RecursionError):
            raise BadIdError(wanted) from None


def _scalar(part: Any) -> bytes:
    if isinstance(part, bool):
        return b"true" if part else b"false"
    if not isinstance(part, str):
        raise TypeError
    return part.encode()


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def text_of(part: bytes) -> str:
    """Return a part of an id as text that SQL can hold; raises `BadIdError`."""
    try:
        text = part.decode()
    except UnicodeDecodeError:
        raise BadIdError("id is not valid UTF-8") from None
    if "\0" in text:
        raise BadIdError("id holds a NUL character")
    return text


def texts_of(ids: Sequence[bytes]) -> list[str] | None:
    """Return ids as texts that SQL can hold, all at once; None when there is a bad one."""
    joined = b"\0".join(ids)
    if not ids or joined.count(b"\0") != len(ids) - 1:
        return None
    try:
        return joined.decode().split("\0")
    except UnicodeDecodeError:
        return None


def make_target(
    table: Table,
    key: str | tuple[str, ...],
    columns: Mapping[str, str],
    mode: str,
    unknown: str,
    ledger: Table,
    dead: Table,
) -> Target:
    """Check what a sink's constructor was given; raises `UsageError`."""
    if not isinstance(columns, Mapping) or not columns:
        raise UsageError(
            "columns maps the counter's columns to SQL columns, such as "
            f'{{"amount": "hits"}}, not {columns!r}'
        )
    for name in columns:
        if not isinstance(name, str) or not name:
            raise UsageError(f"a column of the counter is a string, not {name!r}")
    keys = (key,) if isinstance(key, str) else key
    if not isinstance(keys, tuple) or not keys:
        raise UsageError(f"key is a column or a tuple of columns, not {key!r}")
    target = Target(
        _table(table, "table"),
        tuple(_name(column, "key") for column in keys),
        {name: _name(column, "columns") for name, column in columns.items()},
        mode,
        unknown,
        _table(ledger, "ledger"),
        _table(dead, "dead"),
    )
    used = [*target.key, *target.columns.values()]
    if len(set(used)) != len(used):
        raise UsageError(f"each SQL column may be named once, and these are {', '.join(used)}")
    if mode not in ("upsert", "update"):
        raise UsageError(f'mode is "upsert" or "update", not {mode!r}')
    if unknown not in ("dead", "drop"):
        raise UsageError(f'unknown is "dead" or "drop", not {unknown!r}')
    if unknown == "drop" and mode == "upsert":
        raise UsageError('unknown="drop" needs mode="update": an upsert knows no unknown ids')
    if len({target.table, target.ledger, target.dead}) != 3:
        raise UsageError("table, ledger and dead must be three different tables")
    return target


def _table(value: object, what: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple) or len(names) not in (1, 2):
        raise UsageError(f'{what} is "name" or ("schema", "name"), not {value!r}')
    return tuple(_name(name, what) for name in names)


def _name(value: object, what: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"{what}: an SQL name is a string that is not empty, not {value!r}")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{what}: SQL name {value!r} is not encodable as UTF-8") from None
    if length > _LONGEST_NAME:
        raise UsageError(f"{what}: an SQL name has at most {_LONGEST_NAME} bytes, not {length}")
    return value


def _shown(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else identifier(name)


class Rows(NamedTuple):
    """Rows to write, column by column; they may repeat a key."""

    #: Where each row stood in what the sink was given.
    at: Sequence[int]
    #: One sequence per key column.
    keys: tuple[Sequence[Any], ...]
    #: One sequence per counter column.
    values: tuple[Sequence[int | None], ...]

    def take(self, places: Sequence[int]) -> Rows:
        """Return the rows at these places, in their order."""
        return Rows(
            [self.at[i] for i in places],
            tuple([column[i] for i in places] for column in self.keys),
            tuple([column[i] for i in places] for column in self.values),
        )

    def split(self, ways: int = 8) -> list[Rows]:
        """Return up to eight parts.

        Where nearly every row is bad, eight ways cost 1.14 tries per row, two ways 2; where one
        row is bad, not many more.
        """
        size = -(-len(self.at) // ways)
        return [
            Rows(
                self.at[i : i + size],
                tuple(column[i : i + size] for column in self.keys),
                tuple(column[i : i + size] for column in self.values),
            )
            for i in range(0, len(self.at), size)
        ]
