"""How things look: on a terminal, in a log, as JSON. Ids are others' text: nothing in them acts."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from redishacks import _keys


class OutputError(OSError):
    """The output takes no more: nobody reads it, or the disk is full."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Tell errors of our own output from those of a user's sink."""
    try:
        yield
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from error


class _Console(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        with _writing():
            super().print(*objects, **options)


def console(*, err: bool = False) -> Console:
    """Return a console; into a file or a pipe lines are never broken."""
    made = _Console(stderr=err, highlight=False)
    return made if made.is_terminal else _Console(stderr=err, highlight=False, width=10_000)


def printable(id: str | bytes) -> str:
    """Return an id fit for a terminal: whatever is not printable is escaped."""
    text = id.decode(errors="backslashreplace") if isinstance(id, bytes) else id
    return text if text.isprintable() else repr(text)[1:-1]


def json_id(raw: bytes) -> dict[str, str]:
    """Return an id for JSON: as text, or in hexadecimal when it is not UTF-8."""
    id = _keys.id_shown(raw)
    return {"id": id} if isinstance(id, str) else {"id_hex": id.hex()}


def print_json(value: Any) -> None:
    """Print one JSON object as one line."""
    with _writing():
        click.echo(json.dumps(value, ensure_ascii=False, default=str))


def small(number: float) -> str:
    """Return a number of two digits without an exponent: 0.00005."""
    digits = 1 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{number:.{max(0, digits)}f}".rstrip("0").rstrip(".") if digits > 0 else f"{number:.0f}"


def ago(seconds: float | None, never: str = "never") -> str:
    """Return an age in words."""
    return never if seconds is None else f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """Return a duration in the unit that fits."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} d"


def facts(title: str, rows: Sequence[tuple[str, str]], on: Console) -> None:
    """Print a block: a title, and names with values below it."""
    on.print(Text(title, style="bold"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        on.print(Text(f"  {name:<{width}}  ", style="dim").append(value, style="not dim"))
