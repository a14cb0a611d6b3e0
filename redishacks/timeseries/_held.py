"""Hits that linger in the process: `Batcher` is the layout as the coalescing buffer needs it.

A hit's id there is "time:length:series member": hits of one bucket, series and member are merged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from redishacks import _keys
from redishacks._buffer import Items
from redishacks._clock import clock
from redishacks._command import Command
from redishacks.errors import UnavailableError
from redishacks.timeseries._kind import Amounts, Hit
from redishacks.timeseries.commands import SKEW, Applied, Layout


class Uncounted(NamedTuple):
    """Hits that lingered and were refused, or of which nobody knows whether they were counted."""

    key: str | bytes
    #: When that was, in seconds since 1970: their bucket's begin.
    time: int
    amounts: Amounts
    member: str | bytes
    reason: str


class Batcher(Layout):
    """Keys and commands of one name, for hits that are sent later."""

    @property
    def refusal(self) -> str:
        """Why a hit is refused for good."""
        return f"it is older than all that is kept, or in the future, or {self.kind.limit}"

    #: What hits are noted with, and until when, by the clock of this machine.
    _stamp, _stamp_ends = "", 0.0

    def stamp(self) -> str:
        """Return the bucket of now."""
        now = clock()
        if now >= self._stamp_ends:
            if self.rungs:
                time = self.now()
                begins = self.begins(time)
                self._stamp, ends = str(begins), now + begins + self.step - time
            else:
                self._stamp, ends = f"~{int(self.noted())}", now
            self._stamp_ends = ends
        return self._stamp

    def learn(self, micros: int) -> None:
        """Hear the server's time, in µs."""
        super().learn(micros)
        self._stamp_ends = 0.0

    def label(self, stamp: str, key: bytes, member: bytes) -> bytes:
        """Return a hit's id in the buffer."""
        return b"%b:%d:%b%b" % (stamp.encode(), len(key), key, member)

    def _parsed(self, label: bytes) -> tuple[bytes, bytes, bytes]:
        stamp, length, rest = label.split(b":", 2)
        return stamp, rest[: int(length)], rest[int(length) :]

    def shown(self, label: bytes) -> str | bytes:
        """Return the series of a hit in the buffer, as readers get it."""
        return _keys.id_shown(self._parsed(label)[1])

    def uncounted(
        self, label: bytes, amounts: Sequence[int | None], reason: str = "in doubt for too long"
    ) -> Uncounted:
        """Return a hit in the buffer as readers get it."""
        hit = self._hit(label, amounts)
        return Uncounted(
            _keys.id_shown(hit.key), hit.time, hit.amounts, _keys.id_shown(hit.member), reason
        )

    def _hit(self, label: bytes, amounts: Sequence[Any]) -> Hit:
        stamp, key, member = self._parsed(label)
        if stamp.startswith(b"~"):  # by a clock that was not the server's
            # A part of a second is the way to the server, and no reason to be in another bucket.
            off = round(self.off)
            when, noted = int(stamp[1:]) + off, self.kind.later(tuple(amounts), off)
            return Hit(key, when, noted, member)
        return Hit(key, int(stamp), tuple(amounts), member)

    def hit(self, times: int) -> Amounts:
        """Return the amounts of a plain hit that came so many times."""
        return (times,)

    def merge(self, into: list[int | None], amounts: Sequence[Any]) -> None:
        """Merge amounts into others."""
        first: Any = tuple(into)
        into[:] = amounts if first[0] is None else self.kind.merged(first, tuple(amounts))

    def parts(self, items: Iterable[tuple[bytes, Any]]) -> Iterable[tuple[int, Items]]:
        """Cut hits into (partition, part), each small enough for one script."""
        return self.cut(items, lambda item: self._parsed(item[0])[1])

    def add(self, p: int, items: Items, fence: tuple[str, int]) -> Command[int]:
        """Return the command that sends one part; it replies -n when the n-th hit is refused."""
        hits = [self._hit(*item) for item in items]
        for number, hit in enumerate(hits):
            if hit.time > self.now() + SKEW:
                # Noted before the server's time was known. Nothing is sent but the question.
                return self.time_of(hit.key)._replace(parse=functools.partial(_refused, number))
        folded = self.folded(hits)
        command = self.put(folded, fence=fence)

        def parse(reply: list[int]) -> int:
            applied: Applied = command.parse(reply)
            self.learn(applied.now)
            if applied.code == -1:
                raise UnavailableError("it came too late to be sure of the series' resolutions")
            return applied.code if applied.code >= 0 else -1 - self.blamed(hits, folded, applied)

        return Command(command.args, command.keys, parse, command.script, command.repeatable)


def _refused(number: int, reply: object) -> int:
    return -1 - number
