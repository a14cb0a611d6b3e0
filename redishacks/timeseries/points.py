"""What is read: `Total`, an int that says what it covers, and `Series`, points at equal steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import TypeAlias, overload

#: What a point may be; `Decimal` for gauges of a fixed scale.
Number: TypeAlias = int | float | Decimal

#: Bars of a sparkline, from nothing to the most.
_BARS = " ▁▂▃▄▅▆▇█"


class Total(int):
    """A sum over a range, which says what was summed up; times are seconds since 1970."""

    #: What it covers: the range asked for, widened to whole buckets and cut to what is there.
    start: int
    end: int
    #: Seconds to which the edges are exact.
    resolution: int
    #: False when a part of the range has expired, or its fine buckets have.
    complete: bool
    #: Relative standard error of an estimate; 0 of a sum.
    error: float

    def __new__(
        cls, value: int, start: int, end: int, resolution: int, complete: bool, error: float = 0.0
    ) -> Total:
        """Make one."""
        made = super().__new__(cls, value)
        made.error = error
        made.start, made.end, made.resolution, made.complete = start, end, resolution, complete
        return made

    def __repr__(self) -> str:
        about = "" if self.complete else ", not complete"
        return f"<Total {int(self)} from {self.start} to {self.end}{about}>"

    __str__ = int.__repr__


class Series(Sequence[tuple[int, Number | None]]):
    """Points (time, value) in the order of time; a value is None where nothing is known."""

    def __init__(
        self, times: Sequence[int], end: int, values: Sequence[Number | None], *, resolution: int,
        complete: bool, first_partial: bool, last_partial: bool,
    ) -> None:  # fmt: skip
        #: When each point begins, in seconds since 1970; the last one ends at `end`.
        self.times = times
        self.end = end
        self.values = values
        #: Step of the buckets that were read, in seconds.
        self.resolution = resolution
        #: False when a value is not known because its buckets have expired.
        self.complete = complete
        #: The first or the last point reaches beyond the range asked for, or beyond now.
        self.first_partial, self.last_partial = first_partial, last_partial

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> tuple[int, Number | None]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, Number | None]]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[int, Number | None] | list[tuple[int, Number | None]]:
        if isinstance(index, slice):
            return list(zip(self.times[index], self.values[index], strict=True))
        return self.times[index], self.values[index]

    def __iter__(self) -> Iterator[tuple[int, Number | None]]:
        return zip(self.times, self.values, strict=True)

    def __repr__(self) -> str:
        return f"<Series of {len(self)} points {self.sparkline(40)}>"

    def sum(self) -> Number:
        """Return the sum of what is known."""
        return sum(value for value in self.values if value)

    def sparkline(self, width: int | None = None) -> str:
        """Draw the values in one line, of `width` characters at most; "·" is not known."""
        groups = _grouped(self.values, width or len(self.values))
        known = [value for value in groups if value is not None]
        low, high = min(0, *known, 0), max(0, *known, 0)
        steps = len(_BARS) - 1
        return "".join(
            "·" if value is None else _BARS[round((value - low) / (high - low or 1) * steps)]
            for value in groups
        )


def _grouped(values: Sequence[Number | None], most: int) -> list[float | None]:
    size = max(1, -(-len(values) // max(1, most)))
    found: list[float | None] = []
    for start in range(0, len(values), size):
        known = [float(value) for value in values[start : start + size] if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found
