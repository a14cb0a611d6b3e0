"""All that is in a series: which keys it may have, and what is in those that are there."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from redishacks import _keys
from redishacks._command import Command, Steps, ask, ask_all
from redishacks.timeseries._kind import Entries
from redishacks.timeseries.commands import SKEW, Layout
from redishacks.timeseries.resolution import Rung

#: Keys that are read at once.
_READ = 1000


class Found(NamedTuple):
    """A key that is there, and what is in it."""

    rung: Rung
    pack: int
    raw: Any
    entries: Entries

    def begins(self, place: int) -> int:
        """Return when one of its buckets begins."""
        return self.pack * self.rung.span + place * self.rung.step


def packs(layout: Layout, low: int = 0, high: int | None = None) -> list[tuple[Rung, int]]:
    """Return all keys that a series may have for a range, by resolution and number."""
    now = int(layout.now())
    last = now + SKEW if high is None else min(high - 1, now + SKEW)
    return [
        (rung, pack)
        for rung in layout.rungs
        for pack in range(
            rung.pack(max(low, (now - rung.retention) // rung.group * rung.group)),
            rung.pack(last) + 1,
        )
    ]


def contents(
    layout: Layout, some: Sequence[tuple[Rung, int]], key_of: Callable[[Rung, int], bytes]
) -> Steps[list[Found]]:
    """Read keys, a page after the other; those that are not there are left out."""
    found = []
    for start in range(0, len(some), _READ):
        page = some[start : start + _READ]
        commands = layout.kind.read([key_of(*pack) for pack in page])
        raws = [raw for one in (yield from ask_all(commands)) for raw in one.result()]
        for (rung, pack), raw in zip(page, raws, strict=True):
            if raw:
                found.append(Found(rung, pack, raw, layout.kind.entries(raw, rung)))
    return found


class Scan:
    """Which series there are, page by page; each once."""

    def __init__(
        self,
        layout: Layout,
        match: str | None,
        where: Callable[[Command[Any]], str] | None = None,
    ) -> None:
        self._layout = layout
        self._where = where
        pattern = _keys.id_bytes(match or "*", "a pattern").decode()
        self._match = re.compile(fnmatch.translate(pattern))
        self._nodes: list[bytes] | None = None
        self._cursor = b"0"
        self._seen: set[bytes] = set()

    def page(self) -> Steps[list[str | bytes] | None]:
        """Return some more; None at the end."""
        layout = self._layout
        if self._nodes is None:
            rungs = yield from layout.look()
            self._nodes = []
            if rungs is layout.rungs:
                self._nodes = yield from layout.nodes(self._where)
        if not self._nodes:
            return None
        self._cursor, found = yield from ask(layout.scan(self._nodes[-1], self._cursor))
        if self._cursor == b"0":
            self._nodes.pop()
        new = set(found) - self._seen
        self._seen |= new
        return [
            _keys.id_shown(name)
            for name in sorted(new)
            if self._match.match(name.decode(errors="surrogateescape"))
        ]
