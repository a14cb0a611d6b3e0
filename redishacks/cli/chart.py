"""Points as vertical bars, for a terminal of any width: `chart(series, width, height, tz)`.

20 ┤   ▃█
10 ┤ ▂▅██▇
 0 ┼┬───┬──
    12:00
"""

from __future__ import annotations

import datetime as dt
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.text import Text

from redishacks.timeseries import Series

_UP = " ▁▂▃▄▅▆▇█"
_DOWN = " ▔▔▀▀▀▀██"
_UNKNOWN = "·"
#: Intervals that values are labelled at, or one more.
_TICKS = 4
#: With less room for bars the labels of values are left out.
_LEAST = 8
_DAY = 86_400
#: Seconds from one label of time to the next.
_SPACES = (
    1, 5, 10, 30, 60, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200,
    _DAY, 2 * _DAY, 7 * _DAY, 14 * _DAY, 28 * _DAY,
)  # fmt: skip
#: Months, when those are too near to each other.
_MONTHS = (1, 3, 6, 12, 60, 240)

_ASCII = str.maketrans("▁▂▃▄▅▆▇█▔▀·┤│┼┬─", "___#####'#.||++-")


class _Bar(NamedTuple):
    start: int
    end: int
    value: float | None


class _Scale(NamedTuple):
    """Values from `-down * tick` to `up * tick`, each tick in so many rows."""

    tick: float
    up: int
    down: int
    rows: int


def room(width: int) -> int:
    """Return about how many bars there is room for."""
    return max(_LEAST, width - 7)


def shared(series: Series, width: int) -> int:
    """Return how many points share a bar."""
    return -(-len(series) // room(width))


def plain(text: Text) -> Text:
    """Return a chart for terminals that know ASCII only."""
    text.plain = text.plain.translate(_ASCII)
    return text


def chart(series: Series, width: int, height: int, tz: dt.tzinfo) -> Text:
    """Draw points in lines of `width` characters at most: `height` rows and two for the time.

    Points that have no room of their own share bars, which show their mean; what is not known is a
    dot. The labels of time are those of the time zone.
    """
    bars = _bars(series, shared(series, width))
    scale = _scale([bar.value for bar in bars if bar.value is not None], series, max(2, height))
    labels = {
        row * scale.rows: _short(row * scale.tick) for row in range(-scale.down, scale.up + 1)
    }
    gutter = max(map(len, labels.values()))
    gutter = 0 if width < gutter + 2 + _LEAST else gutter
    space = width - (gutter + 2 if gutter else 0)
    bars = bars if len(bars) <= space else _bars(series, -(-len(series) // max(1, space)))
    cells = max(1, space // max(1, len(bars)))
    marks = _labelled(bars, cells, min(space, cells * len(bars)), tz)
    text = Text(no_wrap=True, overflow="crop")
    for row in range(scale.up * scale.rows, -scale.down * scale.rows - 1, -1):
        if gutter:
            label = labels.get(row, "")
            text.append(f"{label:>{gutter}} {'┤' if label and row else '│' if row else '┼'}", "dim")
        if row:
            text.append("".join(_cell(bar.value, row, scale, cells) for bar in bars), "cyan")
        else:
            line = ["─"] * (cells * len(bars))
            for at in marks:
                line[at] = "┬"
            text.append("".join(line), "dim")
        text.append("\n")
    under = ""
    for at, label in marks.items():
        under += " " * (at - len(under)) + label
    text.append(" " * (gutter + 2 if gutter else 0) + under, "dim")
    return text


def _bars(series: Series, size: int) -> list[_Bar]:
    """Return a bar for each so many points."""
    ends = [*series.times[1:], series.end]
    found = []
    for at in range(0, len(series), max(1, size)):
        known: list[Any] = [value for value in series.values[at : at + size] if value is not None]
        mean = float(sum(known) / len(known)) if known else None
        found.append(_Bar(series.times[at], ends[min(at + size, len(series)) - 1], mean))
    return found


def _scale(known: Sequence[float], series: Series, height: int) -> _Scale:
    low, high = min(0.0, *known, 0.0), max(0.0, *known, 0.0)
    whole = all(isinstance(value, int) for value in series.values if value is not None)
    tick = _nice((high - low) / _TICKS, whole)
    while (rows := math.ceil(high / tick) + math.ceil(-low / tick)) > height:
        tick = _nice(tick * 1.01, whole)
    up, down = math.ceil(high / tick), math.ceil(-low / tick)
    return _Scale(tick, up or int(not down), down, height // max(1, rows))


def _nice(least: float, whole: bool) -> float:
    """Return a round number that is no less; an integer when it has to be whole."""
    least = max(least, 1.0 if whole else 0.0) or 1.0
    size = 10.0 ** math.floor(math.log10(least))
    parts = (part * size for part in (1, 2, 2.5, 5, 10, 20))
    return next(part for part in parts if part >= least and not (whole and part % 1))


def _short(value: float) -> str:
    """Return a round number in a few characters."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 1e22 > abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _cell(value: float | None, row: int, scale: _Scale, cells: int) -> str:
    """Return a row of a bar; wide bars keep a distance."""
    first = 1 if scale.up else -1
    if value is None:
        drawn = _UNKNOWN if row == first else " "
        return drawn.ljust(cells)
    eighths = round(abs(value) / scale.tick * scale.rows * 8) or int(value != 0)
    filled = min(8, max(0, eighths - 8 * (abs(row) - 1))) if (value > 0) == (row > 0) else 0
    drawn = (_UP if row > 0 else _DOWN)[filled]
    return drawn * cells if cells < 3 else (drawn * (cells - 1) + " ")


def _labelled(bars: Sequence[_Bar], cells: int, space: int, tz: dt.tzinfo) -> dict[int, str]:
    """Return where labels of time stand, as near to each other as they can be read."""
    shortest = min((bar.end - bar.start for bar in bars), default=0)
    for months in (False, True):
        for size in _MONTHS if months else _SPACES:
            if size * (31 * _DAY if months else 1) < shortest:
                continue  # several would fall into one bar
            found: dict[int, str] = {}
            for at, bar in enumerate(bars):
                begins = _begins(bar.end - 1, size, months, tz)
                if begins != _begins(bar.start - 1, size, months, tz):
                    found[at * cells] = _label(begins, size, months)
            places = list(found.items())
            if all(len(text) + 2 <= to - at for (at, text), (to, _) in itertools.pairwise(places)):
                return {at: text for at, text in places if at + len(text) <= space}
    return {}


def _begins(moment: int, size: int, months: bool, tz: dt.tzinfo) -> dt.datetime:
    """Return when the local hour, day, … begins that a moment is in."""
    local = dt.datetime.fromtimestamp(moment, tz).replace(tzinfo=None)
    if months:
        number = (local.year * 12 + local.month - 1) // size * size
        return dt.datetime(number // 12, number % 12 + 1, 1)
    monday = dt.datetime(1969, 12, 29)
    return local - (local - monday) % dt.timedelta(seconds=size)


def _label(begins: dt.datetime, size: int, months: bool) -> str:
    if months:
        return f"{begins:%Y}" if size >= 12 else f"{begins:%b %Y}"
    if size >= _DAY or begins.time() == dt.time():
        return f"{begins.day} {begins:%b}"
    return f"{begins:%H:%M:%S}" if size < 60 else f"{begins:%H:%M}"
