"""Series as text: rows that are written out and read in again, as JSON lines or CSV.

A row is what one bucket holds: series, step and time in seconds, and what the kind has; a histogram
has a row per bin, and what counts members one per member.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from redishacks import _keys
from redishacks._command import Steps, ask
from redishacks._keys import Id
from redishacks.errors import RedisHacksError, UsageError
from redishacks.timeseries._contents import Found, contents, packs
from redishacks.timeseries._kind import Entries
from redishacks.timeseries.commands import SKEW, Buckets, Folded, Layout

#: How series are written out: JSON, an object per line; or CSV with a line of names.
Format = Literal["jsonl", "csv"]
Row = Mapping[str, Any]

#: Rows that are read in at once.
_ROWS = 500
_ENDS = re.compile("[\x85\u2028\u2029]")
_INT64 = 2**63


def rows_of(layout: Layout, key: Id) -> Steps[list[Row]]:
    """Return all that is in a series."""
    raw = _keys.id_bytes(key, "series")
    yield from layout.look()
    found = yield from contents(layout, packs(layout), lambda *at: layout.at(raw, *at))
    series = _keys.quote_bytes(raw)
    return [
        {
            "series": series,
            "step": step,
            "time": begins,
            **layout.kind.row(member, amounts),
        }
        for step, entries in _whole(layout, found).items()
        for (begins, member), amounts in sorted(entries.items())
    ]


def _whole(layout: Layout, found: Iterable[Found]) -> dict[int, Entries]:
    """Return what buckets hold, by step: by when they begin and by member.

    Those that began before their resolution was added lack hits: they are made of finer ones, for
    who reads them in need not know since when they are whole.
    """
    held: dict[int, Entries] = {rung.step: {} for rung in layout.rungs}
    for one in found:
        for (place, member), amounts in one.entries.items():
            held[one.rung.step][one.begins(place), member] = amounts
    now, finer = int(layout.now()), None
    for rung in layout.rungs:
        if rung.since:
            some = {at: amounts for at, amounts in held[rung.step].items() if at[0] >= rung.since}
            if finer is not None:
                oldest = finer._replace(since=0).horizon(now)
                for (begins, member), amounts in held[finer.step].items():
                    if oldest <= begins < rung.since:
                        at = begins // rung.step * rung.step, member
                        layout.kind.fold(some, {at: amounts})
            held[rung.step] = some
        finer = rung
    return held


def add_all(layout: Layout, lines: Iterable[str], token: str | None) -> Steps[int]:
    """Read lines in; returns how many rows they have."""
    token, done, rows = token or secrets.token_hex(8), 0, read(lines)
    _keys.id_bytes(token, "a token")
    for number in itertools.count(1):
        try:
            part = list(itertools.islice(rows, _ROWS))
            if not part:
                return done
            yield from _add(layout, part, token, number)
        except RedisHacksError as error:
            error.add_note(
                f"{done} rows were read in, perhaps some more: read all of them in again with "
                f"token={token!r} within a day, and nothing is counted twice"
            )
            raise
        done += len(part)
    raise AssertionError


def _add(layout: Layout, rows: Sequence[Row], token: str, number: int) -> Steps[None]:
    """Add rows to their buckets, once for a token and a number; one command per partition."""
    yield from layout.agree()
    rungs, latest = {rung.step: rung for rung in layout.rungs}, layout.now() + SKEW
    parts: dict[int, Folded] = {}
    for row in rows:
        try:
            raw = _keys.id_bytes(_keys.unquote_bytes(str(row["series"]).encode()), "series")
            rung, time = rungs.get(int(row["step"])), int(row["time"])
            member, amounts = layout.kind.entry(row)
        except (LookupError, ValueError, TypeError, ArithmeticError, RedisHacksError) as error:
            raise UsageError(f"{dict(row)!r} is no row of such a series: {error}") from None
        if rung is None:
            steps = ", ".join(map(str, rungs))
            raise UsageError(
                f"series {layout.full_name} has buckets of {steps} s, not as {dict(row)!r}"
            )
        if time % rung.step or not 0 <= time <= latest:
            raise UsageError(f"{dict(row)!r}: not when a bucket begins, or in the future")
        if not all(-_INT64 <= amount < _INT64 for amount in amounts):
            raise UsageError(f"{dict(row)!r}: more than 64 bits")
        pack, rest = divmod(time, rung.span)
        folded = parts.setdefault(layout.partition(raw), {})
        into = folded.setdefault(Buckets(rung, raw, pack), {})
        layout.kind.fold(into, {(rest // rung.step, member): amounts})
    for folded in parts.values():
        applied = yield from ask(layout.put(folded, fence=(f"i{token}", number), all_expired=True))
        layout.learn(applied.now)
        if applied.code == -1:
            raise layout.late()
        if applied.code == -2:
            raise UsageError(f"series {layout.full_name}: {layout.kind.limit}")


class Writer:
    """Makes lines of rows."""

    def __init__(self, form: Format) -> None:
        if form not in ("jsonl", "csv"):
            raise UsageError(f"a format is 'jsonl' or 'csv', not {form!r}")
        self._csv = form == "csv"
        self._names: tuple[str, ...] | None = None

    def lines(self, rows: Iterable[Row]) -> Iterator[str]:
        """Return their lines, without ends."""
        for row in rows:
            if not self._csv:
                yield json.dumps(row, default=str)
                continue
            if self._names is None:
                self._names = tuple(row)
                yield _joined(self._names)
            yield _joined(row.values())


def _joined(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    # What str.splitlines() takes for the end of a line, too.
    return _ENDS.sub(lambda found: "".join(f"%{b:02X}" for b in found[0].encode()), text.getvalue())


def read(lines: Iterable[str]) -> Iterator[Row]:
    """Return the rows of lines, JSON or CSV; raises `UsageError`."""
    if isinstance(lines, str):
        raise UsageError("what is read in is lines, not one text: text.splitlines()")
    some = iter(lines)
    first = next((line for line in some if line.strip()), None)
    if first is None:
        return
    if not isinstance(first, str):
        raise UsageError(f"what is read in is lines of text, not {first!r}")
    if not first.lstrip().startswith("{"):
        table = csv.DictReader(itertools.chain([first], some))
        if not {"series", "step", "time"} <= set(table.fieldnames or ()):
            raise UsageError(f"neither JSON nor CSV that begins with the names: {first!r}")
        try:
            yield from table
        except csv.Error as error:
            raise UsageError(f"no CSV: {error}") from None
        return
    for line in itertools.chain([first], some):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{line!r} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise UsageError(f"{line!r} is no row of a series")
            yield row
