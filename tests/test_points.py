"""What is done with points: lines of text, CSV, numpy, pandas, and plots as files."""

from __future__ import annotations

import copy
import datetime as dt
import html
import io
import pickle
import re
import subprocess
import sys
import threading
import time
import zoneinfo
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from matplotlib import image, rcParams

from redishacks.errors import UsageError
from redishacks.testing import Server
from redishacks.timeseries import Series, TimeSeries, Total
from redishacks.timeseries.points import Number

#: A moment at which a day begins, in UTC.
START = 1_799_971_200


def series(
    *values: Number | None, step: int = 10, times: Sequence[int] = (), end: int = 0
) -> Series:
    """Return points of these values, at equal steps unless told otherwise."""
    starts = times or range(START, START + step * len(values), step)
    return Series(
        starts, end or START + step * len(values), values, resolution=step, complete=True,
        first_partial=False, last_partial=False,
    )  # fmt: skip


# Lines of text


def test_a_sparkline() -> None:
    """A bar per value from 0 to the most; what is not known is a dot, not a zero."""
    assert series(0, 1, 2, 3, 4, None, 8).sparkline() == " ▁▂▃▄·█"
    assert series(-4, 0, 4).sparkline() == " ▄█"
    assert series(None, None).sparkline() == "··"
    assert series().sparkline() == ""


def test_a_sparkline_of_other_numbers() -> None:
    """Floats and decimals are drawn as integers are, also when several share a character."""
    for kind in (int, float, Decimal):
        values = [kind(value) for value in (0, 4, 8, 8, 16, 16)]
        assert series(*values).sparkline() == " ▂▄▄██"
        assert series(*values).sparkline(3) == "▁▄█"
        assert series(*values, None).sparkline(4) == "▁▄█·"
        assert series(*[kind(4)] * 3).sparkline(2) == "██", "a mean, not a sum"


def test_a_sparkline_is_no_wider() -> None:
    """It is as wide as it may be, or less."""
    for points in (1, 7, 40, 41, 1000):
        for width in (1, 2, 39, 40):
            assert 0 < len(series(*range(points)).sparkline(width)) <= width


def test_a_sum() -> None:
    """What is known is summed up, in its own kind of number."""
    for kind in (int, float, Decimal):
        total = series(kind(1), None, kind(2)).sum()
        assert total == 3
        assert type(total) is kind
    assert series(None).sum() == 0


def test_slices() -> None:
    """It is a sequence of (time, value): by index, slice, and from first to last."""
    points = series(5, None, 7, 8)
    assert points[0] == (START, 5)
    assert points[-1] == (START + 30, 8)
    assert points[1:3] == [(START + 10, None), (START + 20, 7)]
    assert points[::-2] == [(START + 30, 8), (START + 10, None)]
    assert list(points) == points[:] == list(zip(points.times, points.values, strict=True))
    assert (START + 20, 7) in points
    with pytest.raises(IndexError):
        points[4]


# CSV


def test_csv() -> None:
    """A header, then times in UTC and values; what is not known is empty, a zero is not."""
    assert series(5, 0, None, step=86_400).to_csv() == (
        "time,value\n2027-01-15T00:00:00Z,5\n2027-01-16T00:00:00Z,0\n2027-01-17T00:00:00Z,\n"
    )
    assert series().to_csv() == "time,value\n"


def test_csv_of_other_numbers() -> None:
    """Numbers are written in full, without an exponent for decimals; floats come back equal."""
    values = series(Decimal("1E+3"), Decimal("0.10"), 0.1 + 0.2, -(2**70)).to_csv().split()[1:]
    assert [line.partition(",")[2] for line in values] == [
        "1000", "0.10", "0.30000000000000004", str(-(2**70)),
    ]  # fmt: skip


def test_csv_into_a_file(tmp_path: Path) -> None:
    """It goes to a path, or to an open text file, byte by byte what is returned."""
    points = series(1, None, 3)
    for path in (tmp_path / "a.csv", str(tmp_path / "b.csv")):
        text = points.to_csv(path)
        assert Path(path).read_bytes() == text.encode()
    file = io.StringIO()
    assert points.to_csv(file) == file.getvalue() == points.to_csv()
    with pytest.raises(FileNotFoundError):
        points.to_csv(tmp_path / "none" / "c.csv")


def test_pandas_reads_the_csv() -> None:
    """What others read from it is what was there."""
    points = series(1, None, 3)
    read = pd.read_csv(io.StringIO(points.to_csv()), index_col="time", parse_dates=True)["value"]
    expected = points.to_pandas()
    assert list(read.index) == list(expected.index)
    assert read.equals(expected.set_axis(read.index))


# numpy


def test_numpy_when_all_is_known() -> None:
    """Integers stay integers, to the largest there are; times are seconds in UTC."""
    times, values = series(1, 0, -(2**63), 2**63 - 1).to_numpy()
    assert (times.dtype, values.dtype) == (np.dtype("datetime64[s]"), np.dtype("int64"))
    assert values.tolist() == [1, 0, -(2**63), 2**63 - 1]
    assert times[0] == np.datetime64("2027-01-15T00:00:00")
    assert times.astype(int).tolist() == [START, START + 10, START + 20, START + 30]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, None, 3], [1.0, None, 3.0]),
        ([None, None], [None, None]),
        ([1.5, None], [1.5, None]),
        ([1.5, 2.5], [1.5, 2.5]),
        ([Decimal("1.5"), None, Decimal(2)], [1.5, None, 2.0]),
        ([Decimal("1.5")], [1.5]),
        ([2**63], [2.0**63]),
        ([2**70, -1], [2.0**70, -1.0]),
    ],
)
def test_numpy_otherwise(given: Sequence[Number | None], expected: Sequence[float | None]) -> None:
    """With what is not known, or is no such integer, the values are floats; NaN is not known."""
    times, values = series(*given).to_numpy()
    assert values.dtype == np.float64
    assert len(times) == len(given)
    assert [None if np.isnan(value) else value for value in values] == expected


def test_numpy_of_days_that_are_not_equal() -> None:
    """Points of local days and months stand where they begin."""
    times, values = series(1, 2, times=[START, START + 90_000], end=START + 172_800).to_numpy()
    assert times.astype(int).tolist() == [START, START + 90_000]
    assert values.tolist() == [1, 2]


def test_arrays_are_ones_own() -> None:
    """Whoever changes an array does not change the series."""
    points = series(1, 2, 3)
    for _ in range(2):
        times, values = points.to_numpy()
        assert (values.tolist(), times.astype(int)[0]) == ([1, 2, 3], START)
        values += 1
        times += np.timedelta64(1, "s")


# pandas


def test_pandas() -> None:
    """A series of that name, by the time in UTC, with the values of numpy."""
    found = series(1, None, 3, step=3600).to_pandas()
    assert found.name == "value"
    assert isinstance(found.index, pd.DatetimeIndex)
    assert (found.index.name, str(found.index.tz)) == ("time", "UTC")
    assert found.index[2] == pd.Timestamp("2027-01-15T02:00:00Z")
    assert found.isna().tolist() == [False, True, False]
    assert found.resample("D").sum().tolist() == [4.0]
    assert series(1, 2).to_pandas().dtype == np.int64


# Plots


def drawn(path: Path) -> Any:
    """Return which pixels of a plot are coloured: those of bars, for all else is grey."""
    return np.ptp(image.imread(path)[:, :, :3], axis=2) > 0.1


def inside(bars: Any) -> Any:
    """Return which columns have something, from the first that has to the last."""
    columns = bars.any(axis=0)
    return columns[columns.argmax() : len(columns) - columns[::-1].argmax()]


def test_a_png(tmp_path: Path) -> None:
    """A picture of the size asked for, in which the higher values take more room."""
    path = tmp_path / "hits.png"
    series(1, 1, 8, 8).plot(path, size=(6, 3), dpi=50)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    bars = drawn(path)
    assert bars.shape == (150, 300)
    middle = bars.shape[1] // 2
    low, high = bars[:, 40 : middle - 20].sum(), bars[:, middle + 20 : -20].sum()
    assert high > 4 * low > 0


def test_a_gap_is_seen(tmp_path: Path) -> None:
    """What is not known is left out: no line goes across it; where all is known, there is none."""
    gap, full = tmp_path / "gap.png", tmp_path / "full.png"
    series(5, 5, 5, None, None, None, 5, 5, 5).plot(gap)
    series(5, 5, 5, 0, 0, 0, 5, 5, 5).plot(full)
    assert 0.3 < (~inside(drawn(gap))).mean() < 0.36
    assert inside(drawn(full)).all()


@pytest.mark.parametrize(
    "values",
    [[], [None], [None] * 9, [0], [0] * 9, [7], [-3, None, 2], [2**70, 1], [Decimal("0.1"), None]],
    ids=str,
)
def test_any_values_are_drawn(tmp_path: Path, values: list[Number | None]) -> None:
    """Nothing known, nothing but zeros, one point, negative and huge numbers: no warning."""
    for ending in ("png", "svg"):
        path = tmp_path / f"hits.{ending}"
        series(*values).plot(path)
        assert path.stat().st_size > 1000


def words(path: Path) -> set[str]:
    """Return the texts of a drawing, which has them as shapes, with comments that say them."""
    text = path.read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    return {html.unescape(word) for word in re.findall("<!-- (.*) -->", text)}


def test_an_svg(tmp_path: Path) -> None:
    """The same as shapes: with the title as it was given, and an axis that begins at 0."""
    path = tmp_path / "hits.SVG"
    for values in ((5, 7, 6), (0, 0), (None,)):
        series(*values).plot(str(path), title=r"hits: $5 & <b> \frac$")
        found = words(path)
        assert r"hits: $5 & <b> \frac$" in found
        assert found & {"0", "0.0"}
        assert not any(word.startswith("\N{MINUS SIGN}") for word in found)
    series(-5, 7).plot(path)
    assert "\N{MINUS SIGN}4" in words(path)


def test_the_time_zone_of_the_axis(tmp_path: Path) -> None:
    """Times are those of the zone asked for, by name or as an object; by default of UTC."""
    path = tmp_path / "hits.svg"
    points = series(*range(9), step=3600)
    points.plot(path)
    assert "02:00" in words(path)
    assert "22:00" not in words(path)
    for tz in (
        "America/Recife",
        zoneinfo.ZoneInfo("America/Recife"),
        dt.timezone(-dt.timedelta(hours=3)),
    ):
        points.plot(path, tz=tz)
        assert "22:00" in words(path)
    with pytest.raises(UsageError, match="time zone"):
        points.plot(path, tz="Mars/Olympus")


@pytest.mark.parametrize("name", ["hits", "hits.pdf", "png", ".png", "hits.png.txt"])
def test_other_files(tmp_path: Path, name: str) -> None:
    """Only a name that says which of both it is to be; nothing is written else."""
    with pytest.raises(UsageError, match=r"\.png or a \.svg"):
        series(1, 2).plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_plots_leave_matplotlib_alone(tmp_path: Path) -> None:
    """No setting is changed, and several threads draw at once."""
    before = dict(rcParams)
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    threads = [threading.Thread(target=series(1, 2, 3).plot, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in paths}) == 1
    assert dict(rcParams) == before


# What need not be installed


def run(code: str) -> str:
    """Run code in a process of its own, and return what it prints."""
    head = (
        "from redishacks.timeseries import Series\n"
        "points = Series(range(0, 30, 10), 30, [1, 2, 3], resolution=10, complete=True,\n"
        "                first_partial=False, last_partial=False)\n"
    )
    command = [sys.executable, "-W", "error", "-c", head + code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_nothing_is_imported_unasked(tmp_path: Path) -> None:
    """The packages come with the methods that need them, and no window system with a plot."""
    code = (
        "import sys\n"
        "points.to_csv(), points.sparkline()\n"
        "print(*{'numpy', 'pandas', 'matplotlib'} & set(sys.modules))\n"
        f"points.plot({str(tmp_path / 'a.png')!r})\n"
        "print(*{'pandas', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    assert run(code).split() == []


@pytest.mark.parametrize(
    ("method", "package", "install"),
    [
        ("to_numpy()", "numpy", "pip install numpy"),
        ("to_pandas()", "pandas", "pip install pandas"),
        ("plot('hits.png')", "matplotlib", "pip install redishacks[plot]"),
    ],
)
def test_what_is_not_installed(method: str, package: str, install: str) -> None:
    """A method says which package it needs, and how to install it."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from redishacks.errors import UsageError\n"
        f"try: points.{method}\n"
        "except UsageError as error: print(error)"
    )
    name = method.partition("(")[0]
    assert run(code) == f"{name}() needs {package}, which is not installed: {install}\n"


# From a server


def test_points_of_a_series(valkey: Server, prefix: str) -> None:
    """Of points that were read: hits, zeros, and NaN where the buckets have expired."""
    resolutions = [(10, 600), (60, 600)]
    with TimeSeries(valkey.url, "hits", prefix=prefix, resolutions=resolutions, deadline=5) as hits:
        hits.incr("a", 7)
        now = int(time.time())
        points = hits.range("a", now - 10 * 86_400, step=600)
    times, values = points.to_numpy()
    assert len(times) == len(values) == len(points)
    assert np.isnan(values[0])
    assert np.nansum(values) == 7
    assert np.nanmin(values) == 0
    assert np.diff(times).astype(int).tolist() == [600] * (len(points) - 1)
    assert points.to_pandas().isna().sum() == points.values.count(None)


@pytest.mark.slow
def test_a_day_to_numpy_is_quick() -> None:
    """A day of 10-second points takes no step of Python each: far less than reading takes."""
    points = series(*[i % 200 for i in range(8640)])
    points.to_numpy()

    def once() -> float:
        began = time.perf_counter()
        points.to_numpy()
        return time.perf_counter() - began

    assert min(once() for _ in range(50)) < 0.001


def test_totals_are_copied_and_pickled() -> None:
    """A total goes to another process with all that it says."""
    total = Total(5, 10, 20, 10, False, 0.01)
    for other in (copy.copy(total), copy.deepcopy(total), pickle.loads(pickle.dumps(total))):
        assert vars(other) == vars(total)
        assert other == total
