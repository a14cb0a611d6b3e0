"""Which buckets to read for a range: `plan` tiles it with the coarsest that fit.

    plan(rungs, start, end, now)     # seconds since 1970 -> Plan: tiles, and what they cover

The inside of a range is covered by the coarsest buckets, its edges by finer ones. Where the finer
ones have expired the range is widened to the finest that still exist.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from redishacks.timeseries.resolution import Rung, finest_from


class Tile(NamedTuple):
    """Buckets of one packed key: those from `first` to before `last`, counted within the key."""

    rung: Rung
    pack: int
    first: int
    last: int

    @property
    def start(self) -> int:
        """When its first bucket begins, in seconds since 1970."""
        return self.pack * self.rung.span + self.first * self.rung.step

    @property
    def end(self) -> int:
        """When its last bucket ends."""
        return self.pack * self.rung.span + self.last * self.rung.step


class Plan(NamedTuple):
    """What a sum over a range reads."""

    #: What they cover, in seconds since 1970: the range asked for, widened to whole buckets and cut
    #: to what is there.
    start: int
    end: int
    #: In the order of time, without gaps.
    tiles: tuple[Tile, ...]
    #: The step of the coarsest edge: how exact the range is.
    resolution: int
    #: Nothing of the range has expired, and its edges are as fine as the series is.
    complete: bool
    #: Bytes of the packed keys, when they were read.
    bytes: int = 0

    @property
    def keys(self) -> int:
        """How many packed keys are read."""
        return len({(tile.rung.step, tile.pack) for tile in self.tiles})

    @property
    def values(self) -> int:
        """How many buckets are summed up."""
        return sum(tile.last - tile.first for tile in self.tiles)

    def __str__(self) -> str:
        lines = [f"{self.values} values in {self.keys} keys, {self.bytes:,} bytes"]
        for tile in self.tiles:
            start, end = (
                f"{dt.datetime.fromtimestamp(t, dt.UTC):%Y-%m-%d %H:%M:%S}"
                for t in (tile.start, tile.end)
            )
            lines.append(f"{start} to {end}  {tile.last - tile.first:3} of {tile.rung.step} s")
        return "\n".join(lines)


def plan(rungs: Sequence[Rung], start: int, end: int, now: int) -> Plan:
    """Tile the range from `start` to before `end`; what is in the future is left out."""
    finest = rungs[0]
    end = min(end, _up(now + 1, finest.step))
    oldest = min(rung.horizon(now) for rung in rungs)
    from_, complete = max(start, oldest), start >= oldest
    if end <= from_:
        at = min(from_, end)
        return Plan(at, at, (), finest.step, complete or end <= start)
    left, right = finest_from(rungs, from_, now), finest_from(rungs, end - 1, now)
    assert left is not None
    assert right is not None
    low, high = from_ // left.step * left.step, _up(end, right.step)
    fine = finest.step
    tight = from_ - low < fine and high - end < fine
    return Plan(
        low,
        high,
        tuple(_cut(_runs(rungs, low, high, now))),
        max(left.step, right.step),
        complete and tight,
    )


def run_of(rung: Rung, start: int, end: int, now: int) -> Iterator[Tile]:
    """Tile a range with buckets of one resolution, as far as they are there."""
    first = max(start, rung.horizon(now)) // rung.step * rung.step
    last = _up(end, rung.step)
    return _cut([(rung, first, last)] if first < last else [])


def _runs(rungs: Sequence[Rung], low: int, high: int, now: int) -> list[tuple[Rung, int, int]]:
    """Return runs of buckets that cover from `low` to before `high`, the coarsest inside."""
    before: list[tuple[Rung, int, int]] = []
    after: list[tuple[Rung, int, int]] = []
    left = right = -1  # where what is covered already begins and ends
    for rung in reversed(rungs):
        step = rung.step
        first, last = _up(max(low, rung.horizon(now)), step), high // step * step
        if left < 0:
            if first < last:
                before.append((rung, first, last))
                left, right = first, last
            continue
        if first < left:
            before.append((rung, first, left))
            left = first
        if right < last and rung.horizon(now) <= right:
            after.append((rung, right, last))
            right = last
    before.reverse()
    return before + after


def _cut(runs: Iterable[tuple[Rung, int, int]]) -> Iterator[Tile]:
    """Cut runs at the ends of packed keys."""
    for rung, first, last in runs:
        step, span = rung.step, rung.span
        pack, begins = divmod(first, span)
        ends = last - pack * span
        while ends > span:
            yield Tile(rung, pack, begins // step, rung.buckets)
            pack, begins, ends = pack + 1, 0, ends - span
        yield Tile(rung, pack, begins // step, ends // step)


def _up(time: int, step: int) -> int:
    return -(-time // step) * step
