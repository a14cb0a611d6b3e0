"""Web traffic to replay: the request targets of an access log, or made-up ones."""

from __future__ import annotations

import gzip
import io
import random
import re
import sys
import zlib
from collections.abc import Iterable
from itertools import accumulate
from typing import IO, NamedTuple, cast

from redishacks import _keys
from redishacks.errors import UsageError

#: Of the lines left out, how many are named.
_NAMED = 10

#: Made-up pages, and how fast their popularity falls: the r-th gets 1/r of the first one's hits.
_PAGES = 4_000

_GZIP = b"\x1f\x8b"

_QUOTED = r'"((?:[^"\\]|\\.)*)"'
#: Apache's and nginx' combined format; what follows the size may be missing, as in the common one.
_LINE = re.compile(rf"\S+ \S+ .+? \[[^\]]+\] {_QUOTED} \d{{3}} (?:\d+|-)(?:\s|$)")


class Skipped(NamedTuple):
    """A line that was left out."""

    line: int
    reason: str


class Traffic(NamedTuple):
    """What to replay: one target per hit, in order."""

    targets: list[str]
    #: How many lines were left out, and the first of them.
    skipped: int = 0
    first_skipped: tuple[Skipped, ...] = ()


def made_up(hits: int, seed: int) -> Traffic:
    """Make up hits on a few thousand pages, a few of them far more seen than the rest."""
    pages = [f"/page/{number}" for number in range(1, _PAGES + 1)]
    weights = list(accumulate(1 / rank for rank in range(1, _PAGES + 1)))
    return Traffic(random.Random(seed).choices(pages, cum_weights=weights, k=hits))


def read_log(path: str) -> Traffic:
    """Read an access log, plain or gzipped; `-` is standard input.

    Targets are kept as they stand, query and all. Raises `UsageError` when it cannot be read or
    holds no hit.
    """
    try:
        standard_input = path == "-"
        with (
            open(0 if standard_input else path, "rb", closefd=not standard_input) as file,
            _text(file) as lines,
        ):
            traffic = parse(lines)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"the log {path} cannot be read: {reason}") from None
    if not traffic.targets:
        raise UsageError(f"the log {path} holds no line in the combined log format")
    return traffic


def _text(file: io.BufferedReader) -> io.TextIOWrapper:
    zipped = file.peek(2)[:2] == _GZIP
    binary = cast(IO[bytes], gzip.GzipFile(fileobj=file) if zipped else file)
    # Stray bytes are shown as servers log them, \xff; only line feeds end a line.
    return io.TextIOWrapper(binary, "utf-8", errors="backslashreplace", newline="\n")


def parse(lines: Iterable[str]) -> Traffic:
    """Read lines of a log; a line that is none is left out and named."""
    targets: list[str] = []
    skipped: list[Skipped] = []
    count = 0
    for number, line in enumerate(lines, 1):
        target = _target(line)
        if isinstance(target, str):
            targets.append(sys.intern(target))
            continue
        count += 1
        if len(skipped) < _NAMED:
            skipped.append(Skipped(number, target.reason))
    return Traffic(targets, count, tuple(skipped))


class _No(NamedTuple):
    reason: str


def _target(line: str) -> str | _No:
    found = _LINE.match(line)
    if found is None:
        return _No("not in the combined log format")
    method, _, rest = found[1].partition(" ")
    target, _, protocol = rest.rpartition(" ")
    if not protocol.startswith("HTTP/"):
        target = rest
    if not method.isalpha() or not target or not target.isprintable():
        return _No("no request in it")
    if len(target.encode()) > _keys.MAX_ID:
        return _No(f"a target of over {_keys.MAX_ID:,} bytes")
    return target
