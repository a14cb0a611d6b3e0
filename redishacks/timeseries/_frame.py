"""The points of a range: where they begin, and which buckets of one resolution they are made of."""

from __future__ import annotations

import bisect
import datetime as dt
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from redishacks.errors import UsageError
from redishacks.timeseries import _calendar
from redishacks.timeseries.plan import Tile, run_of
from redishacks.timeseries.points import Number, Series
from redishacks.timeseries.resolution import Ladder, Rung

T = TypeVar("T")
V = TypeVar("V")


class Frame(NamedTuple):
    """Points, and the buckets to read for them."""

    #: When each point begins, and last when the last one ends.
    marks: Sequence[int]
    rung: Rung
    tiles: Sequence[Tile]
    #: The range asked for, and when that was.
    start: int
    end: int
    now: int

    @property
    def _ahead(self) -> int:
        """How many points begin in the future."""
        points = len(self.marks) - 1
        return points - min(points, bisect.bisect_right(self.marks, self.now))

    @property
    def _lost(self) -> int:
        """How many points begin before what is there."""
        horizon = self.rung.horizon(self.now)
        return min(bisect.bisect_left(self.marks, horizon), len(self.marks) - 1 - self._ahead)

    def fold(self, buckets: Sequence[T], fold: Callable[[Sequence[T]], V]) -> Sequence[T | V]:
        """Return a value for each point of which all is there, of what was read for each bucket."""
        step, lost = self.rung.step, self._lost
        known = len(self.marks) - 1 - self._ahead - lost
        if not known:
            return ()
        begins = self.tiles[0].start
        at = (self.marks[lost] - begins) // step
        if isinstance(self.marks, range) and self.marks.step == step:
            return buckets[at : at + known]
        edges = [(mark - begins) // step for mark in self.marks[lost : lost + known + 1]]
        return [fold(buckets[first:last]) for first, last in itertools.pairwise(edges)]

    def series(self, values: Sequence[Number | None]) -> Series:
        """Return points with these values, as `fold` returns them."""
        lost, ahead = self._lost, self._ahead
        if lost or ahead:
            values = [*itertools.repeat(None, lost), *values, *itertools.repeat(None, ahead)]
        return Series(
            self.marks[:-1],
            self.marks[-1],
            values,
            resolution=self.rung.step,
            complete=not lost,
            first_partial=self.marks[0] < self.start,
            last_partial=self.marks[-1] > min(self.end, self.now),
        )


def joined(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return what the buckets of a point have, one after the other."""
    return [*itertools.chain.from_iterable(parts)]


def frame(
    rungs: Ladder, start: int, end: int | None, step: _calendar.Step, tz: dt.tzinfo, now: int
) -> Frame:
    """Return the points of a range, by default until now, and what to read for them."""
    last = now + 1 if end is None else end
    marks = _calendar.edges(start, max(last, start + 1), step, tz)
    rung = _fitting(rungs, marks, now)
    tiles = tuple(run_of(rung, marks[0], min(marks[-1], now + 1), now))
    return Frame(marks, rung, tiles, start, last, now)


def _fitting(rungs: Ladder, marks: Sequence[int], now: int) -> Rung:
    """Return the coarsest resolution whose buckets fit; one that reaches back far enough."""
    common = _calendar.common(marks)
    fit = [rung for rung in rungs if common % rung.step == 0]
    if not fit:
        raise UsageError(f"points begin at multiples of {rungs[0].step} s, the finest resolution")
    whole = [rung for rung in fit if rung.horizon(now) <= marks[0]]
    return whole[-1] if whole else min(fit, key=lambda rung: rung.horizon(now))
