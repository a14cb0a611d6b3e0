"""The statements that write and read the target table in PostgreSQL, as text and parameters.

Everything user-given is a parameter or a quoted identifier. Keys and amounts travel as one text
literal per column, which the server cuts into rows: psycopg's own lists of 20,000 values, or a
statement per row, take several times as long.

Rows are written in key order, so that two transactions which write the same rows take their locks
in the same order and cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from redishacks._sink import Rule
from redishacks.sinks._target import BadIdError, Rows, Target, identifier, text_of, texts_of

_INTEGERS = ("smallint", "integer", "bigint", "numeric")

#: Microseconds since 1970 as a value of the type; and back, exactly. None for infinity.
_FROM_MICROS = {
    "timestamp with time zone": "('epoch'::timestamptz + {} * interval '1 microsecond')",
    "timestamp without time zone": "('epoch'::timestamp + {} * interval '1 microsecond')",
    "date": "('epoch'::timestamp + {} * interval '1 microsecond')::date",
}
_TO_MICROS = "CASE WHEN isfinite({0}) THEN (extract(epoch FROM {0}) * 1000000)::bigint END"


class Column(NamedTuple):
    """What the catalogue says of a column."""

    name: str
    #: The type without length or precision: a cast to varchar(9) would cut an id in silence.
    type: str
    #: The type under a domain.
    base: str
    #: Its values may be ordered by their bytes: equal ones have equal bytes.
    bytewise: bool

    @property
    def binary(self) -> bool:
        """Whether it holds bytes rather than text that is cast."""
        return self.base == "bytea"

    def fits(self, rule: Rule) -> bool:
        """Whether a counter's column of this rule can be kept in it, exactly."""
        return self.base in _INTEGERS or (rule is not Rule.SUM and self.base in _FROM_MICROS)

    def from_amount(self, amount: str) -> str:
        """Return an amount as a value of this column."""
        return _FROM_MICROS.get(self.base, "{}").format(amount)

    def to_amount(self, value: str) -> str:
        """Return a value of this column as an amount."""
        if self.base in _FROM_MICROS:
            return _TO_MICROS.format(value)
        return f"trunc({value})" if self.base == "numeric" else value


class Shape(NamedTuple):
    """The target's columns as the catalogue has them."""

    #: `server_version_num`.
    version: int
    keys: tuple[Column, ...]
    #: By the counter's column.
    values: Mapping[str, Column]


def quoted(*names: str) -> str:
    """Quote a name for a statement with parameters, where a % counts."""
    return identifier(*names).replace("%", "%%")


# Parameters


def text_array(texts: Sequence[str]) -> str:
    """Return a PostgreSQL array literal of texts without NUL, quickly."""
    if not texts:
        return "{}"
    joined = "\0".join(texts).replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","')
    return '{"' + joined + '"}'


def number_array(numbers: Sequence[int | None]) -> str:
    """Return a PostgreSQL array literal of integers and NULLs."""
    return "{" + str(list(numbers))[1:-1].replace("None", "NULL") + "}"


def params(rows: Rows) -> list[str]:
    """Return the parameters of `plain` and `exact`."""
    return [*map(text_array, rows.keys), *map(number_array, rows.values)]


def key_text(column: Column, part: bytes) -> str:
    """Return a part of an id as a text parameter; raises `BadIdError`."""
    return part.hex() if column.binary else text_of(part)


def as_rows(
    target: Target,
    shape: Shape,
    ids: Sequence[bytes],
    values: Sequence[Sequence[int | None]],
) -> tuple[Rows, list[tuple[int, str]]]:
    """Return the rows whose ids can be sent at all, and (place, reason) of the others."""
    if len(shape.keys) == 1 and not shape.keys[0].binary:
        texts = texts_of(ids)
        if texts is not None:
            return Rows(range(len(ids)), (texts,), tuple(values)), []
    at: list[int] = []
    keys: list[list[str]] = []
    bad: list[tuple[int, str]] = []
    for place, id in enumerate(ids):
        try:
            parts = target.parts(id)
            keys.append([key_text(c, p) for c, p in zip(shape.keys, parts, strict=True)])
        except BadIdError as error:
            bad.append((place, str(error)))
        else:
            at.append(place)
    columns = tuple(zip(*keys, strict=True)) if keys else tuple(() for _ in shape.keys)
    return Rows(at, columns, tuple([column[i] for i in at] for column in values)), bad


# Statements


class Statements:
    """The statements for one target and one set of counter columns.

    In their text k0, k1, … are the key's columns, v0, v1, … the counter's, o the row's number.
    """

    def __init__(self, target: Target, shape: Shape, rules: Mapping[str, Rule]) -> None:
        self._upsert = target.mode == "upsert"
        self._table = quoted(*target.table)
        self._keys = shape.keys
        self._columns = [shape.values[name] for name in rules]
        self._rules = list(rules.values())
        self._k = [f"k{i}" for i in range(len(self._keys))]
        self._v = [f"v{i}" for i in range(len(self._columns))]

    def plain(self) -> str:
        """Write rows of distinct keys; the count of rows written tells whether all went well.

        Two ids that are one key in SQL are an error (21000) in an upsert, and one row too few in
        an update.
        """
        amounts = [self._amount(rule, v) for rule, v in zip(self._rules, self._v, strict=True)]
        rows = f"SELECT {self._listed(amounts)} FROM {self._source()} ORDER BY {self._order()}"
        return self._insert(rows) if self._upsert else self._update(f"({rows})")

    def exact(self) -> str:
        """Write rows of any keys, those that are equal in SQL as one.

        One statement, hence one snapshot: a row that another transaction inserts meanwhile is
        either written or reported. Its single row: rows written, then rows to write (upsert) or
        the numbers of rows without a row in the table (update).
        """
        amounts = [self._merged(rule, v) for rule, v in zip(self._rules, self._v, strict=True)]
        keys = ", ".join(self._k)
        grouped = f"GROUP BY {keys} ORDER BY {self._order()}"
        if self._upsert:
            return (
                f"WITH s AS MATERIALIZED (SELECT {self._listed(amounts)} FROM {self._source()} "
                f"{grouped}), w AS ({self._insert(f'SELECT {keys}, {self._vs()} FROM s')} "
                "RETURNING 1) SELECT (SELECT count(*) FROM w), (SELECT count(*) FROM s)"
            )
        # NOT IN is answered by a hash table of its own, whatever the planner's join settings.
        return (
            f"WITH s AS MATERIALIZED (SELECT {self._listed(amounts)}, array_agg(o) AS os, "
            f"min(o) AS first FROM {self._source()} {grouped}), "
            f"w AS ({self._update('s')} RETURNING s.first) "
            "SELECT (SELECT count(*) FROM w), "
            "ARRAY(SELECT unnest(os) FROM s WHERE first NOT IN (SELECT first FROM w))"
        )

    def sift(self) -> str:
        """Tell which keys do not cast and why, and the key order of the others.

        Its rows are (number, reason or None); its parameters the keys' arrays, then the types of
        those that are cast (`castable`). PostgreSQL 16 or newer.
        """
        arrays = ", ".join(["%s::text[]"] * len(self._keys))
        names = ", ".join(self._k)
        cast = [k for key, k in zip(self._keys, self._k, strict=True) if not key.binary]
        tried = ", ".join(f"pg_input_error_info(u.{k}, %s) AS e_{k}" for k in cast)
        reason = ", ".join(f"e_{k}.message" for k in cast)
        # CASE: nothing is cast that does not cast.
        order = ", ".join(
            f"CASE WHEN reason IS NULL THEN {cast_to(key, k)} END"
            for key, k in zip(self._keys, self._k, strict=True)
        )
        return (
            f"WITH x AS MATERIALIZED (SELECT {names}, o, COALESCE({reason}) AS reason "
            f"FROM unnest({arrays}) WITH ORDINALITY AS u({names}, o), {tried}) "
            f"SELECT o, reason FROM x ORDER BY {order}"
        )

    def _source(self) -> str:
        """Return the parameters as rows of typed keys, with an order number."""
        casts = [
            f"{cast_to(key, f'u.{k}')} AS {k}" for key, k in zip(self._keys, self._k, strict=True)
        ]
        arrays = ["%s::text[]"] * len(self._k) + ["%s::bigint[]"] * len(self._v)
        return (
            f"(SELECT {', '.join(casts)}, {self._vs()}, o FROM unnest({', '.join(arrays)}) "
            f"WITH ORDINALITY AS u({', '.join(self._k)}, {self._vs()}, o)) AS u"
        )

    def _vs(self) -> str:
        return ", ".join(self._v)

    def _listed(self, amounts: Sequence[str]) -> str:
        named = [f"{amount} AS {v}" for amount, v in zip(amounts, self._v, strict=True)]
        return ", ".join([*self._k, *named])

    def _order(self) -> str:
        # Any order will do that every flusher shares; that of bytes is the quickest for texts.
        return ", ".join(
            f'{k} COLLATE "C"' if key.bytewise else k
            for key, k in zip(self._keys, self._k, strict=True)
        )

    def _amount(self, rule: Rule, value: str) -> str:
        return f"COALESCE({value}, 0)" if rule is Rule.SUM else value

    def _merged(self, rule: Rule, value: str) -> str:
        # sum() of bigint is numeric, which no sum overflows; the column decides.
        return f"COALESCE(sum({value}), 0)" if rule is Rule.SUM else f"{rule.value}({value})"

    def _insert(self, rows: str) -> str:
        keys = ", ".join(quoted(key.name) for key in self._keys)
        columns = ", ".join(quoted(column.name) for column in self._columns)
        values = ", ".join(c.from_amount(v) for c, v in zip(self._columns, self._v, strict=True))
        changes = ", ".join(
            self._change(rule, column, f"excluded.{quoted(column.name)}")
            for rule, column in zip(self._rules, self._columns, strict=True)
        )
        return (
            f"INSERT INTO {self._table} AS t ({keys}, {columns}) "
            f"SELECT {', '.join(self._k)}, {values} FROM ({rows}) AS r "
            f"ON CONFLICT ({keys}) DO UPDATE SET {changes}"
        )

    def _update(self, rows: str) -> str:
        changes = ", ".join(
            self._change(rule, column, column.from_amount(f"s.{v}"))
            for rule, column, v in zip(self._rules, self._columns, self._v, strict=True)
        )
        same = " AND ".join(
            f"t.{quoted(key.name)} = s.{k}" for key, k in zip(self._keys, self._k, strict=True)
        )
        rows = rows if rows == "s" else f"{rows} AS s"
        return f"UPDATE {self._table} AS t SET {changes} FROM {rows} WHERE {same}"

    def _change(self, rule: Rule, column: Column, new: str) -> str:
        name = quoted(column.name)
        if rule is Rule.SUM:
            return f"{name} = COALESCE(t.{name}, 0) + {new}"
        # Both ignore NULL.
        return f"{name} = {'GREATEST' if rule is Rule.MAX else 'LEAST'}(t.{name}, {new})"


def cast_to(column: Column, value: str) -> str:
    """Return a text parameter as a value of a key column's type."""
    if column.binary:
        value = f"decode({value}, 'hex')"
    # The type's name comes from the catalogue, quoted where it needs to be.
    return f"CAST({value} AS {column.type.replace('%', '%%')})"
