"""What is read: `Total`, an int that says what it covers, and `Series`, points at equal steps.

    points = hits.range("project:42", start, step=600)
    points.sparkline(40)
    points.to_csv("hits.csv")
    points.to_numpy()                # needs numpy
    points.to_pandas()               # needs pandas
    points.plot("hits.png")          # needs matplotlib: pip install redishacks[plot]

Those packages are imported when they are asked for, not before.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
from array import array
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias, overload

from redishacks.errors import UsageError
from redishacks.timeseries import _calendar

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

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

    def __getnewargs__(self) -> tuple[int, int, int, int, bool, float]:  # type: ignore[override]
        return int(self), self.start, self.end, self.resolution, self.complete, self.error

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
        self._values = values
        #: Step of the buckets that were read, in seconds.
        self.resolution = resolution
        #: False when a value is not known because its buckets have expired.
        self.complete = complete
        #: The first or the last point reaches beyond the range asked for, or beyond now.
        self.first_partial, self.last_partial = first_partial, last_partial

    @functools.cached_property
    def values(self) -> Sequence[Number | None]:
        """The value of each point."""
        # Until somebody asks they stay as they were read: that is most of what a range takes.
        return list(self._values) if isinstance(self._values, array) else self._values

    def __len__(self) -> int:
        return len(self._values)

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
        return zip(self.times, self._values, strict=True)

    def __repr__(self) -> str:
        return f"<Series of {len(self)} points {self.sparkline(40)}>"

    def sum(self) -> Number:
        """Return the sum of what is known."""
        known: list[Any] = [value for value in self.values if value]
        total: Number = sum(known)
        return total

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

    def to_csv(self, file: str | os.PathLike[str] | TextIO | None = None) -> str:
        """Return the points as CSV, and write that to `file`, a path or an open text file.

        The header is `time,value`; a time is when its point begins, in UTC, as
        2026-01-31T23:50:00Z; a value that is not known is empty. Lines end with a newline alone.
        """
        lines = ["time,value"]
        for time, value in self:
            when = f"{dt.datetime.fromtimestamp(time, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"
            lines.append(f"{when},{'' if value is None else _plain(value)}")
        text = "\n".join(lines) + "\n"
        if isinstance(file, str | os.PathLike):
            Path(file).write_text(text, encoding="utf-8", newline="\n")
        elif file is not None:
            file.write(text)
        return text

    def to_numpy(self) -> tuple[NDArray[np.datetime64], NDArray[np.int64] | NDArray[np.float64]]:
        """Return two arrays: when the points begin, in UTC as datetime64[s], and their values.

        The values are int64 when all are known, and integers; else float64, where NaN is not known
        and integers beyond 2^53 are rounded. Raises `UsageError` without numpy.
        """
        try:
            import numpy as np
        except ImportError:
            raise _missing("to_numpy()", "numpy", "numpy") from None
        values = np.array(self._values)
        if isinstance(self._values, array):
            values = values.astype(np.int64)
        elif values.dtype != np.int64:
            values = values.astype(np.float64)
        return _seconds(self.times).view("datetime64[s]"), values

    def to_pandas(self) -> pd.Series[Any]:
        """Return a pandas Series named "value", indexed by when the points begin, in UTC.

        Its values are those of `to_numpy`. Raises `UsageError` without pandas.
        """
        try:
            import pandas as pd
        except ImportError:
            raise _missing("to_pandas()", "pandas", "pandas") from None
        times, values = self.to_numpy()
        index = pd.DatetimeIndex(times, name="time").tz_localize("UTC")
        return pd.Series(values, index=index, name="value")

    def plot(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "",
        tz: str | dt.tzinfo = "UTC",
        size: tuple[float, float] = (9.6, 3.6),
        dpi: float = 100,
    ) -> None:
        """Draw the points to a file, PNG or SVG as its name ends.

        `tz` is the time zone of the axis, `size` width and height in inches. What is not known is
        left out. Raises `UsageError` without matplotlib (`pip install redishacks[plot]`). Draws
        with the process's matplotlib settings, changes none, and opens no window; any thread may.
        """
        ending = Path(path).suffix.lower().removeprefix(".")
        if ending not in ("png", "svg"):
            raise UsageError(f"a plot is a .png or a .svg, not {os.fspath(path)!r}")
        place = _calendar.zone(tz)
        try:
            from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
            from matplotlib.figure import Figure
        except ImportError:
            raise _missing("plot()", "matplotlib", "redishacks[plot]") from None
        edges = date2num(_seconds([*self.times, self.end]).view("datetime64[s]"))
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        axes = figure.add_subplot()
        _, values = self.to_numpy()
        axes.stairs(values, edges, color="C0", fill=True, alpha=0.4)
        axes.stairs(values, edges, color="C0")  # of a fill alone, thin points would not be seen
        if len(self):
            axes.set_xlim(edges[0], edges[-1])
        if not values[values == values].any():  # all is 0, or NaN, which is not itself
            axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, parse_math=False)
        ticks = AutoDateLocator(tz=place)
        axes.xaxis.set_major_locator(ticks)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(ticks, tz=place))
        figure.savefig(path, format=ending)


def _plain(value: Number) -> str:
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _seconds(times: Sequence[int]) -> NDArray[np.int64]:
    import numpy as np

    if isinstance(times, range):  # an array of those is made without a step of Python per point
        return np.arange(times.start, times.stop, times.step, dtype=np.int64)
    return np.array(times, dtype=np.int64)


def _missing(what: str, package: str, install: str) -> UsageError:
    return UsageError(f"{what} needs {package}, which is not installed: pip install {install}")


def _grouped(values: Sequence[Number | None], most: int) -> list[float | None]:
    size = max(1, -(-len(values) // max(1, most)))
    found: list[float | None] = []
    for start in range(0, len(values), size):
        known: list[Any] = [value for value in values[start : start + size] if value is not None]
        found.append(float(sum(known) / len(known)) if known else None)
    return found
