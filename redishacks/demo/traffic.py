"""Web traffic to replay: the hits of an access log, or made-up ones."""

from __future__ import annotations

import datetime as dt
import gzip
import io
import math
import random
import re
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import IO, NamedTuple, cast

from redishacks import _keys
from redishacks.errors import UsageError

#: Of the lines left out, how many are named.
_NAMED = 10

#: Made-up pages, and how fast their popularity falls: the r-th gets 1/r of the first one's hits.
_PAGES = 4_000
#: Made-up clients, and the day they come on.
_CLIENTS = 5_000
_DAY = int(dt.datetime(2025, 1, 1, tzinfo=dt.UTC).timestamp())

_GZIP = b"\x1f\x8b"

_QUOTED = r'"((?:[^"\\]|\\.)*)"'
#: Apache's and nginx' combined format; what follows the size may be missing, as in the common one.
_LINE = re.compile(rf"(\S+) \S+ .+? \[([^\]]+)\] {_QUOTED} \d{{3}} (\d{{1,12}}|-)(?:\s|$)")
_TIME = re.compile(r"(\d\d)/([A-Z][a-z]{2})/(\d{4}):(\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)")
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


class Skipped(NamedTuple):
    """A line that was left out."""

    line: int
    reason: str


class Hit(NamedTuple):
    """A request that was answered."""

    target: str
    client: str
    #: Seconds since 1970.
    time: int
    #: Bytes of the answer.
    size: int


class Traffic(NamedTuple):
    """What to replay: the targets, clients, times and sizes of hits, in the order of the log."""

    targets: list[str]
    clients: list[str]
    times: Sequence[int]
    sizes: Sequence[int]
    #: How many lines were left out, and the first of them.
    skipped: int = 0
    first_skipped: tuple[Skipped, ...] = ()

    def hits(self, first: int, last: int) -> Iterator[Hit]:
        """Iterate over hits from the first to before the last."""
        columns = (self.targets, self.clients, self.times, self.sizes)
        return map(Hit, *(column[first:last] for column in columns))


def made_up(hits: int, seed: int) -> Traffic:
    """Make up a day's hits on a few thousand pages, a few of them far more seen than the rest."""
    chance = random.Random(seed)
    pages = [f"/page/{number}" for number in range(1, _PAGES + 1)]
    weights = list(accumulate(1 / rank for rank in range(1, _PAGES + 1)))
    clients = [f"10.0.{number >> 8}.{number & 255}" for number in range(_CLIENTS)]
    # By night there is a quarter of the traffic of midday.
    tide = list(accumulate(5 - 3 * math.cos(math.tau * minute / 1440) for minute in range(1440)))
    targets = chance.choices(pages, cum_weights=weights, k=hits)
    minutes = chance.choices(range(1440), cum_weights=tide, k=hits)
    seconds = chance.choices(range(60), k=hits)
    times = sorted(
        _DAY + 60 * minute + second for minute, second in zip(minutes, seconds, strict=True)
    )
    sizes = chance.choices(range(500, 50_000), k=hits)
    return Traffic(targets, chance.choices(clients, k=hits), array("q", times), array("q", sizes))


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
    clients: list[str] = []
    times, sizes = array("q"), array("q")
    skipped: list[Skipped] = []
    count = 0
    for number, line in enumerate(lines, 1):
        hit = _hit(line)
        if isinstance(hit, Hit):
            targets.append(sys.intern(hit.target))
            clients.append(sys.intern(hit.client))
            times.append(hit.time)
            sizes.append(hit.size)
            continue
        count += 1
        if len(skipped) < _NAMED:
            skipped.append(Skipped(number, hit.reason))
    return Traffic(targets, clients, times, sizes, count, tuple(skipped))


class _No(NamedTuple):
    reason: str


def _hit(line: str) -> Hit | _No:
    found = _LINE.match(line)
    if found is None:
        return _No("not in the combined log format")
    client, time, request, size = found.groups()
    method, _, rest = request.partition(" ")
    target, _, protocol = rest.rpartition(" ")
    if not protocol.startswith("HTTP/"):
        target = rest
    if not method.isalpha() or not target or not target.isprintable():
        return _No("no request in it")
    for what, text in (("target", target), ("client", client)):
        if len(text.encode()) > _keys.MAX_ID:
            return _No(f"a {what} of over {_keys.MAX_ID:,} bytes")
    at = _seconds(time)
    if at is None:
        return _No("no time in it, such as 31/Jan/2026:23:59:00 +0000")
    return Hit(target, client, at, 0 if size == "-" else int(size))


def _seconds(text: str) -> int | None:
    """Return a log's time in seconds since 1970; None for what is none."""
    found = _TIME.fullmatch(text)
    if found is None or found[2] not in _MONTHS:
        return None
    day, _, year, hour, minute, second, sign, hours, minutes = found.groups()
    ahead = (int(hours) * 60 + int(minutes)) * (-60 if sign == "-" else 60)
    try:
        local = dt.datetime(
            int(year), _MONTHS.index(found[2]) + 1, int(day), int(hour), int(minute),
            int(second) - (second == "60"), tzinfo=dt.UTC,  # a leap second has no other name
        )  # fmt: skip
    except ValueError:
        return None
    return int(local.timestamp()) - ahead
