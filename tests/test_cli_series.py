"""`redishacks series`: what it draws, prints and sums up of series in use, and how it ends."""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zoneinfo
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from redishacks.cli import chart, commands, when
from redishacks.errors import UsageError
from redishacks.testing import Cluster, Server, valkey_server
from redishacks.timeseries import (
    DistinctSeries,
    GaugeSeries,
    LatencySeries,
    Resolution,
    Series,
    TimeSeries,
    TopSeries,
)
from redishacks.timeseries.points import Number

#: The module; in the package its name is that of the command.
cli_series = importlib.import_module("redishacks.cli.series")

HOUR, DAY = 3600, 86_400
RECIFE = zoneinfo.ZoneInfo("America/Recife")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def yesterday() -> int:
    """Return when the day before today began, in UTC."""
    return int(time.time()) // DAY * DAY - DAY


def iso(moment: float) -> str:
    """Return a moment as people type it."""
    return f"{dt.datetime.fromtimestamp(moment, dt.UTC):%Y-%m-%dT%H:%M:%SZ}"


@dataclasses.dataclass
class Shell:
    """Runs commands on one Redis, and has series there."""

    url: str
    prefix: str

    def run(self, command: str, *args: str, url: str | None = None, **env: str) -> Result:
        """Run a command to its end; none ever prints a traceback or a password."""
        where = ["--redis", self.url if url is None else url, "--prefix", self.prefix]
        env = {"COLUMNS": "80", "LINES": "24", **env}
        return ended(CliRunner().invoke(commands, ["series", command, *where, *args], env=env))

    def shown(self, command: str, *args: str, **env: str) -> str:
        """Return what a command shows that ends well."""
        done = self.run(command, *args, **env)
        assert (done.exit_code, done.stderr) == (0, "")
        return done.stdout

    def objects(self, command: str, *args: str) -> list[dict[str, Any]]:
        """Return the JSON objects that a command prints, one per line."""
        return [json.loads(line) for line in self.shown(command, "--json", *args).splitlines()]

    def series(self, name: str = "hits", **options: Any) -> TimeSeries:
        """Return series of the application."""
        return TimeSeries(self.url, name, prefix=self.prefix, deadline=5, **options)

    def day(self, key: str = "a", *values: int, **options: Any) -> list[str]:
        """Count hits in the hours of yesterday, and return the options that ask for that day."""
        start = yesterday()
        items = [(key, value, start + HOUR * i) for i, value in enumerate(values)]
        self.series(**options).incr_many(items)
        return ["--since", iso(start), "--until", iso(start + DAY)]


def ended(done: Result) -> Result:
    """Return it: it ended by itself, without a traceback or a password."""
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    assert "geheim" not in done.output
    return done


def failed(done: Result, exit_code: int) -> str:
    """Return the one line on stderr of a command that could not."""
    assert (done.exit_code, done.stdout) == (exit_code, "")
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def shell(valkey: Server, prefix: str) -> Shell:
    """The session's server, with a prefix of one's own."""
    return Shell(valkey.url, prefix)


@pytest.fixture(params=["redishacks_valkey", "redishacks_redis"])
def either(request: pytest.FixtureRequest, prefix: str) -> Shell:
    """The same, and on the oldest Redis that is supported."""
    return Shell(request.getfixturevalue(request.param).url, prefix)


# Durations and moments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90), ("10m", 600), ("24h", DAY), ("7d", 7 * DAY), ("1w", 7 * DAY),
        ("1h30m", 5400), ("1.5h", 5400), ("2d12h30m5s", 2 * DAY + 45_005), ("600", 600),
        ("0.5", 0.5),
    ],
)  # fmt: skip
def test_a_duration(text: str, expected: float) -> None:
    """A number with its unit, or several; a number alone is seconds."""
    assert when.DurationType().convert(text, None, None) == expected
    assert when.StepType().convert(text, None, None) == expected
    if not text[-1].isdigit():
        assert when.MomentType().convert(text, None, None) == when.Moment(expected)


@pytest.mark.parametrize(
    "text",
    ["", "h", "-1h", "1x", "1 h", "h1", "1h 2m", "0", "0s", "nan", "inf", "1e3", "99999w", "٣h"],
)
def test_no_duration(text: str) -> None:
    """Anything else is refused: nothing, no unit, zero, and what has no end."""
    with pytest.raises(click.BadParameter, match="90s"):
        when.DurationType().convert(text, None, None)


def test_steps_with_a_name() -> None:
    """A step may also be a local day, week or month."""
    for name in ("day", "week", "month"):
        assert when.StepType().convert(name, None, None) == name
    with pytest.raises(click.BadParameter):
        when.StepType().convert("year", None, None)


def test_a_moment() -> None:
    """So long ago, or ISO 8601; without an offset it is of the zone, and a date is midnight."""
    for text, expected in {
        "24h": 1_800_000_000 - DAY,
        "now": 1_800_000_000,
        "2026-01-31T12:00Z": 1_769_860_800,
        "2026-01-31T12:00:30+01:00": 1_769_857_230,
        "2026-01-31 12:00": 1_769_871_600,
        "2026-01-31": 1_769_828_400,
    }.items():
        assert when.MomentType().convert(text, None, None).at(1_800_000_000.0, RECIFE) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "1769860800", "20260131", "2026-13-01", "12:00"])
def test_no_moment(text: str) -> None:
    """What may mean two things is none, such as a number alone."""
    with pytest.raises(click.BadParameter, match="ISO 8601"):
        when.MomentType().convert(text, None, None)


def test_a_moment_before_1970() -> None:
    """So early there is nothing."""
    for moment in (when.Moment(1e9), when.Moment(stated=dt.datetime(1969, 12, 31))):
        with pytest.raises(UsageError, match="1970"):
            moment.at(1e6, dt.UTC)


# Charts


def points(values: Sequence[Number | None], step: int = HOUR, start: int = 1_799_971_200) -> Series:
    """Return points at equal steps."""
    end = start + step * len(values)
    return Series(
        range(start, end, step), end, values, resolution=step, complete=True,
        first_partial=False, last_partial=False,
    )  # fmt: skip


def drawn(values: Sequence[Number | None], width: int, height: int, **options: Any) -> list[str]:
    """Return the lines of a chart."""
    return chart.chart(points(values, **options), width, height, dt.UTC).plain.split("\n")


def test_bars() -> None:
    """Eighths of a row per value; what is not known is a dot, and a zero nothing."""
    assert drawn([0, 1, 10, 20, 15, None, 2, 19], 13, 4) == [
        "20 ┤   █   ▆",
        "15 ┤   ██  █",
        "10 ┤  ███  █",
        " 5 ┤ ▂███·▃█",
        " 0 ┼┬───────",
        "    15 Jan",
    ]


def test_wide_bars() -> None:
    """Where there is room a bar has several characters, and a distance to the next."""
    assert drawn([2, 1, None], 16, 2) == [
        "2 ┤███         ",
        "1 ┤███ ███ ·   ",
        "0 ┼┬───────────",
        "   15 Jan",
    ]


def test_values_below_zero() -> None:
    """They hang from the axis."""
    assert drawn([-2, 1, -1], 16, 3) == [
        " 1 ┤    ███     ",
        " 0 ┼┬───────────",
        "-1 ┤███     ███ ",
        "-2 ┤███         ",
        "    15 Jan",
    ]
    assert drawn([-2, -1], 14, 4)[0].startswith(" 0 ┼")


def test_small_values_are_seen() -> None:
    """One hit beside a million is a bar, be it the lowest."""
    lines = drawn([1, 10**6, 0, -1, -(10**6)], 30, 8)
    bars = [line[line.index("┤" if "┤" in line else "│") + 1 :] for line in lines[:4]]
    assert bars[-1].startswith("▁▁▁")
    assert [line[-13:-9].strip() for line in lines[:4]] == [""] * 4


def test_bars_that_are_shared() -> None:
    """Points without room of their own share a bar, which is their mean."""
    assert drawn([0, 2, 4, 4, None, 8, None, None], 4, 8) == drawn(
        [1, 4, 8, None], 4, 8, step=2 * HOUR
    )


@pytest.mark.parametrize(
    ("most", "labels"),
    [
        (0, ["1", "0"]),
        (1, ["1", "0"]),
        (3, ["3", "2", "1", "0"]),
        (10, ["10", "5", "0"]),
        (10.0, ["10", "7.5", "5", "2.5", "0"]),
        (200, ["200", "150", "100", "50", "0"]),
        (1234, ["1.5k", "1k", "500", "0"]),
        (4_000_000, ["4M", "3M", "2M", "1M", "0"]),
        (0.3, ["0.3", "0.2", "0.1", "0"]),
        (Decimal("0.4"), ["0.4", "0.3", "0.2", "0.1", "0"]),
        (2**63, ["10E", "7.5E", "5E", "2.5E", "0"]),
    ],
)
def test_labels_of_values(most: Number, labels: list[str]) -> None:
    """Round numbers, no more than there is something for; integers have no fractions."""
    found = [line.split()[0] for line in drawn([most, 0], 40, 12)[:-1]]
    assert [label for label in found if label[0].isdigit()] == labels


@pytest.mark.parametrize(
    ("step", "count", "labels"),
    [
        (10, 30, ["15 Jan", "00:01", "00:02", "00:03", "00:04"]),
        (600, 60, ["15 Jan", "02:00", "04:00", "06:00", "08:00"]),
        (HOUR, 48, ["15 Jan", "12:00", "16 Jan", "12:00"]),
        (DAY, 60, ["25 Jan", "8 Feb", "22 Feb", "8 Mar"]),
        (7 * DAY, 52, ["Apr 2027", "Jul 2027", "Oct 2027"]),
    ],
)
def test_labels_of_time(step: int, count: int, labels: list[str]) -> None:
    """Round times, as many as can be read; a day's begin is its date."""
    *_, last = drawn([1] * count, 64, 4, step=step)
    found = re.split(r"  +", last.strip())
    assert found == labels
    axis = drawn([1] * count, 64, 4, step=step)[-2]
    assert [
        last.index(label, at) for at, label in zip(_places(axis), labels, strict=True)
    ] == _places(axis)


def _places(axis: str) -> list[int]:
    return [found.start() for found in re.finditer("┬", axis)]


def test_local_times() -> None:
    """Labels are those of the time zone, also where a day has 25 hours."""
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    start = int(dt.datetime(2026, 10, 24, 22, tzinfo=berlin).timestamp())
    text = chart.chart(points([1] * 12, HOUR, start), 100, 4, berlin).plain.split("\n")[-1]
    assert text.split("  ")[0].strip() == ""
    assert re.split(r"  +", text.strip()) == [
        "22:00", "23:00", "25 Oct", "01:00", "02:00", "03:00", "04:00", "05:00", "06:00", "07:00",
        "08:00",
    ]  # fmt: skip


NUMBERS = st.one_of(
    st.lists(st.none() | st.integers(0, 10), max_size=40),
    st.lists(st.none() | st.integers(-(2**70), 2**70), max_size=40),
    st.lists(st.none() | st.floats(-1e300, 1e300), max_size=40),
    st.lists(st.none() | st.decimals(-1000, 1000, places=3), max_size=40),
    st.integers(41, 2000).map(lambda n: list(range(n))),
)


@settings(max_examples=300, deadline=None)
@given(
    NUMBERS, st.integers(1, 90), st.integers(-3, 14), st.sampled_from([1, 10, 3600, DAY, 31 * DAY])
)
def test_any_chart_fits(values: list[Number | None], width: int, height: int, step: int) -> None:
    """Any values in any window: no line is wider, no more rows are drawn; the highest is seen."""
    lines = drawn(values, width, height, step=step)
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= max(2, height) + 2
    # Where labels are long, or the window is narrow, points share a column.
    columns = [len(line.partition("┼")[2]) for line in lines if "┼" in line]
    room = min(chart.room(width), width, *columns)
    shared = len(values) > room
    bars = "".join(lines[:-1])
    if not shared:
        assert any(bar in bars for bar in "▁▂▃▄▅▆▇█▔▀") == any(values)
        assert bars.count("·") == values.count(None)


def test_a_chart_in_ascii() -> None:
    """Terminals without such characters get others, line by line as long."""
    text = chart.chart(points([0, 5, None, -9, 7.5]), 40, 10, dt.UTC)
    before = text.plain
    after = chart.plain(text).plain
    assert after.isascii()
    assert not before.isascii()
    assert list(map(len, after.split("\n"))) == list(map(len, before.split("\n")))
    assert "#" in after


# plot


def test_a_day(either: Shell) -> None:
    """A chart with title, values, times, and below it the sum and what it covers."""
    day = either.day("a", *range(24))
    lines = either.shown("plot", "hits", "a", *day, "--step", "1h").splitlines()
    assert lines[0] == "hits: a"
    expected = chart.chart(points(range(24), HOUR, yesterday()), 80, 12, dt.UTC).plain
    assert lines[1:-1] == expected.split("\n")
    date = dt.datetime.fromtimestamp(yesterday(), dt.UTC)
    assert lines[-1] == (
        f"276 from {date:%Y-%m-%d %H:%M:%S} to {date + dt.timedelta(days=1):%Y-%m-%d %H:%M:%S} "
        "(UTC); 24 points"
    )


def test_colour_on_a_terminal_only(shell: Shell) -> None:
    """A terminal gets colours and lines that fit; a file neither."""
    day = shell.day("a" * 100, 1, 2, 3)
    plain = shell.shown("plot", "hits", "a" * 100, *day)
    assert "\x1b" not in plain
    assert "a" * 100 in plain
    for columns in (10, 25, 60, 200):
        shown = shell.shown(
            "plot", "hits", "a" * 100, *day, FORCE_COLOR="1", TERM="xterm-256color",
            COLUMNS=str(columns),
        )  # fmt: skip
        assert "\x1b[36m" in shown
        lines = _ANSI.sub("", shown).splitlines()
        assert max(map(cell_len, lines)) <= columns
        assert max(map(cell_len, lines)) > columns // 2
        assert lines[0] == f"hits: {'a' * 100}" if columns == 200 else lines[0].endswith("a…")


def test_the_width_of_a_file(shell: Shell) -> None:
    """Into a file a chart is 80 columns wide, or as COLUMNS says, with a step that fits."""
    day = shell.day("a", *[1] * 24)
    for columns, step in ((30, 2), (80, 1 / 3), (160, 1 / 6)):
        lines = shell.shown("plot", "hits", "a", *day, COLUMNS=str(columns)).splitlines()
        assert f"; {24 / step:.0f} points" in lines[-1]
        assert 0.6 * columns < max(map(len, lines[:-2])) <= columns


def test_the_height_of_the_window(shell: Shell) -> None:
    """All is seen at once in a low window."""
    day = shell.day("a", *range(24))
    for rows in (1, 5, 10, 12, 40):
        lines = shell.shown("plot", "hits", "a", *day, LINES=str(rows)).splitlines()
        assert len(lines) <= max(rows - 1, 6)
        assert len(lines) <= 16


def test_many_points_in_a_chart(shell: Shell) -> None:
    """When a step makes more points than there is room for, that is said."""
    day = shell.day("a", *[6] * 24)
    text = shell.shown("plot", "hits", "a", *day, "--step", "10m")
    assert "144 points, a bar is the mean of 2" in text
    assert "a bar is" not in shell.shown("plot", "hits", "a", *day, "--step", "1h")


def test_ascii(shell: Shell) -> None:
    """Where the output takes ASCII only, the chart is made of that."""
    day = shell.day("a", *range(24))
    runner = CliRunner(charset="ascii")
    where = ["--redis", shell.url, "--prefix", shell.prefix]
    for command in (["plot", "hits", "a", *day], ["list", "hits"]):
        done = ended(runner.invoke(commands, ["series", *command, *where]))
        assert done.exit_code == 0
        assert "#" in done.stdout
        assert done.stdout.isascii()


def test_local_time(shell: Shell) -> None:
    """Times are read, and shown, in the time zone asked for."""
    shell.day("a", *[1] * 24)
    midnight = yesterday()
    date = dt.datetime.fromtimestamp(midnight, dt.UTC)
    args = ["--since", f"{date:%Y-%m-%dT00:00}", "--until", f"{date:%Y-%m-%dT12:00}"]
    (shown,) = shell.objects("plot", "hits", "a", *args, "--tz", "America/Recife", "--step", "1h")
    assert (shown["start"], shown["end"]) == (midnight + 3 * HOUR, midnight + 15 * HOUR)
    text = shell.shown("plot", "hits", "a", *args, "--tz", "America/Recife", "--step", "1h")
    assert f"12 from {date:%Y-%m-%d} 00:00:00 to {date:%Y-%m-%d} 12:00:00 (America/Recife)" in text
    assert text.splitlines()[-2].split()[-1] in ("10:00", "11:00")


def test_points_as_json(either: Shell) -> None:
    """One object: what was read, and points of time and value; what is not known is null."""
    day = either.day("a", 5, 0, 7)
    (shown,) = either.objects("plot", "hits", "a", *day, "--step", "6h")
    start = yesterday()
    assert shown == {
        "name": "hits", "key": "a", "start": start, "end": start + DAY, "resolution": HOUR,
        "complete": True,
        "points": [[start, 12], *[[start + 6 * HOUR * i, 0] for i in (1, 2, 3)]],
    }  # fmt: skip
    (shown,) = either.objects("plot", "hits", "a", "--since", "6000d", "--step", "week")
    assert shown["complete"] is False
    assert shown["points"][0][1] is None
    assert sum(value or 0 for _, value in shown["points"]) == 12


def test_points_as_csv(shell: Shell) -> None:
    """The CSV of the points, and nothing else."""
    day = shell.day("a", 5, 0, 7)
    start = yesterday()
    assert shell.shown("plot", "hits", "a", *day, "--csv", "--step", "12h") == (
        f"time,value\n{iso(start)},12\n{iso(start + DAY // 2)},0\n"
    )


def test_points_as_a_picture(shell: Shell, tmp_path: Path) -> None:
    """A PNG or an SVG as the name ends; nothing is printed, be the key in any letters."""
    day = shell.day("日本", 5, 0, 7)
    for name, begin in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        path = tmp_path / name
        assert shell.shown("plot", "hits", "日本", *day, "--png", str(path)) == ""
        assert path.read_bytes().startswith(begin)
    assert "hits: 日本" in path.read_text()
    line = failed(shell.run("plot", "hits", "日本", "--png", str(tmp_path / "a.pdf")), 2)
    assert ".png or a .svg" in line
    line = failed(shell.run("plot", "hits", "日本", "--png", str(tmp_path / "none" / "a.png")), 1)
    assert "a.png': No such file" in line


def test_one_form_at_a_time(shell: Shell) -> None:
    """A chart, a picture, CSV or JSON: not two of them."""
    shell.day("a", 1)
    for args in (["--csv", "--json"], ["--png", "a.png", "--csv"], ["--json", "--png", "a.png"]):
        done = shell.run("plot", "hits", "a", *args)
        assert done.exit_code == 2
        assert "exclude" in done.stderr
    assert not Path("a.png").exists()


def test_steps(shell: Shell) -> None:
    """Steps may be local days; one that the buckets do not allow is refused."""
    shell.day("a", *[1] * 24)
    start = yesterday()
    since = ["--since", iso(start - DAY), "--until", iso(start + DAY)]
    (shown,) = shell.objects("plot", "hits", "a", *since, "--step", "day", "--tz", "America/Recife")
    assert shown["points"] == [
        [start - 2 * DAY + 3 * HOUR, 0], [start - DAY + 3 * HOUR, 3], [start + 3 * HOUR, 21],
    ]  # fmt: skip
    line = failed(shell.run("plot", "hits", "a", "--step", "7"), 2)
    assert "multiples of 10 s" in line


RANGES = ["10m", "1h", "3h", "24h", "48h", "7d", "30d", "90d", "400d", "1000d", "1800d"]


@pytest.mark.parametrize("tz", ["UTC", "America/Recife", "Asia/Kolkata", "Asia/Kathmandu"])
@pytest.mark.parametrize(
    "resolutions",
    [None, [(60, 8 * DAY)], [(7, 20 * DAY)], [(10, 600), (DAY, 2000 * DAY)]],
    ids=str,
)
def test_the_step_that_fits(shell: Shell, resolutions: Any, tz: str) -> None:
    """Without a step any range is a chart that fits, of what still exists."""
    with shell.series(resolutions=resolutions) as hits:
        hits.incr("a", 3)
    opened = cli_series._Of(shell.url, shell.prefix, "hits").open()
    kept = max(rung.retention for rung in opened.record.rungs)
    for since in RANGES:
        asked = cli_series._Range(
            when.MomentType().convert(since, None, None), None, None, zoneinfo.ZoneInfo(tz)
        )
        for most in (12, 73):
            found = asked.points(opened, "a", most)
            assert len(found) <= max(most + 1, asked.since.ago / (28 * DAY) + 2)
            if tz == "UTC" or (resolutions is None and asked.since.ago < 7 * DAY):
                assert found.complete or asked.since.ago > kept - 70 * DAY, (since, most)
                assert found.sum() == 3 or not found.complete
                assert len(found) > most / 8 or since == "10m" or resolutions, (since, most)


def test_a_range_of_which_some_is_left(shell: Shell) -> None:
    """When most of it has expired, the rest is still drawn with points that can be told apart."""
    with shell.series(resolutions=[(60, 8 * DAY)]) as hits:
        hits.incr("a", 3)
    (shown,) = shell.objects("plot", "hits", "a", "--since", "60d")
    assert shown["complete"] is False
    values = [value for _, value in shown["points"]]
    assert 1000 < len(values) < 1502
    assert values[0] is None
    assert sum(value for value in values if value) == 3
    lines = shell.shown("plot", "hits", "a", "--since", "60d").splitlines()
    assert lines[-2].endswith("points; · is not known")
    assert lines[-1] == "not complete: a part has expired"
    assert "not" not in shell.shown("plot", "hits", "a", "--since", "1h").splitlines()[-1]


# sum


def test_sums(either: Shell) -> None:
    """The sum of each key, and what it covers; a key never written has 0."""
    day = either.day("a", 1000, 234)
    either.day("b", -5)
    lines = either.shown("sum", "hits", "a", "b", "c", *day).splitlines()
    date = dt.datetime.fromtimestamp(yesterday(), dt.UTC)
    assert lines == [
        f"hits from {date:%Y-%m-%d %H:%M:%S} to {date + dt.timedelta(days=1):%Y-%m-%d %H:%M:%S} "
        "(UTC)",
        "  1,234  a",
        "     -5  b",
        "      0  c",
    ]
    start = yesterday()
    about = {"start": start, "end": start + DAY, "resolution": 10, "complete": True}
    assert either.objects("sum", "hits", "a", "b", *day) == [
        {"name": "hits", "key": "a", "sum": 1234, **about},
        {"name": "hits", "key": "b", "sum": -5, **about},
    ]


def test_a_sum_until_now(shell: Shell) -> None:
    """By default it is that of the last 24 hours, the present included."""
    shell.day("a", 5)
    with shell.series() as hits:
        hits.incr("a", 7)
        hits.incr("a", 9, at=time.time() - DAY - 60)
    (shown,) = shell.objects("sum", "hits", "a", "--since", "10m")
    assert shown["sum"] == 7
    assert shown["start"] % 10 == shown["end"] % 10 == 0
    assert 600 <= shown["end"] - shown["start"] <= 620
    (shown,) = shell.objects("sum", "hits", "a")
    assert DAY <= shown["end"] - shown["start"] <= DAY + 20


def test_today(shell: Shell) -> None:
    """That of the local day; it says itself since when."""
    with shell.series() as hits:
        hits.incr("a", 7)
        for tz in ("UTC", "America/Recife", "Pacific/Kiritimati"):
            (shown,) = shell.objects("sum", "hits", "a", "--today", "--tz", tz)
            total = hits.today("a", tz)
            assert (shown["sum"], shown["start"]) == (total, total.start)
    for args in (["--since", "1h"], ["--until", "1h"], ["--since", "24h"]):
        done = shell.run("sum", "hits", "a", "--today", *args)
        assert done.exit_code == 2
        assert "--today" in done.stderr


def test_a_sum_that_is_not_complete(shell: Shell) -> None:
    """That is said, with how exact it is; and where it begins."""
    shell.day("a", 5)
    args = ["--since", "2020-01-01T00:10", "--until", iso(yesterday() + DAY)]
    lines = shell.shown("sum", "hits", "a", *args).splitlines()
    assert "from 2020" not in lines[0]
    assert lines[1:] == [
        "  5  a", "not complete: a part has expired, or is exact to 86400 s only",
    ]  # fmt: skip
    (shown,) = shell.objects("sum", "hits", "a", *args)
    assert shown["complete"] is False
    assert "not complete" not in shell.shown("sum", "hits", "a")


# list


def test_a_list(either: Shell) -> None:
    """Every key that is kept, with its sum of the last 24 hours and bars, in their order."""
    now = time.time()
    with either.series(partitions=5) as hits:
        hits.incr_many([(f"p:{i}", 1000 * i, now - 60) for i in range(3)])
        hits.incr("old", 7, at=now - 300 * DAY)
        hits.incr(b"\xff{", 5)
        hits.incr("a:1:2%", 6)
    other = either.series("hits2")
    other.incr("other")
    lines = either.shown("list", "hits").splitlines()
    assert lines[0] == "hits: 6 series, last 24 hours"
    rows = [(line.split()[0], line.split()[-1]) for line in lines[1:]]
    assert rows == [
        ("6", "a:1:2%"), ("0", "old"), ("0", "p:0"), ("1,000", "p:1"), ("2,000", "p:2"),
        ("5", "\\xff{"),
    ]  # fmt: skip
    assert "█" in lines[1]
    assert "█" not in lines[2]
    assert [len(line) - len(name) for line, (_, name) in zip(lines[1:], rows, strict=True)] == (
        [len(lines[1]) - 6] * 6
    )
    found = either.objects("list", "hits")
    assert [(each.get("key"), each.get("key_hex"), each["sum"]) for each in found] == [
        ("a:1:2%", None, 6), ("old", None, 0), ("p:0", None, 0), ("p:1", None, 1000),
        ("p:2", None, 2000), (None, "ff7b", 5),
    ]  # fmt: skip
    assert [sum(value for _, value in each["points"]) for each in found] == [6, 0, 0, 1000, 2000, 5]
    assert {len(each["points"]) for each in found} == {25}


def test_a_list_of_some(shell: Shell) -> None:
    """Those that match; when there is none, that is said."""
    with shell.series() as hits:
        hits.incr_many([("project:1", 1), ("project:2", 1), ("page:1", 1)])

    def keys(match: str) -> list[str]:
        return [each["key"] for each in shell.objects("list", "hits", "--match", match)]

    assert keys("project:*") == ["project:1", "project:2"]
    assert keys("*:[13]") == ["page:1", "project:1"]
    assert keys("p?ge:1") == ["page:1"]
    assert keys("project") == []
    assert shell.shown("list", "hits", "--match", "x*") == (
        "hits: no series like x* has anything that is kept\n"
    )


def test_names_like_patterns(shell: Shell) -> None:
    """Of a name or a prefix with characters of patterns, others are not listed."""
    for name in ("h*", "hits", "h[i]ts", "h"):
        with shell.series(name) as hits:
            hits.incr(f"of {name}")
    for name in ("h*", "hits", "h[i]ts", "h"):
        assert [each["key"] for each in shell.objects("list", name)] == [f"of {name}"]


def test_many_series(shell: Shell) -> None:
    """More than are summed up at once, and than Redis looks at at once, are all listed."""
    with shell.series(resolutions=[(3600, 48 * HOUR)]) as hits:
        hits.incr_many((f"k{i:04}", i) for i in range(1201))
    found = shell.objects("list", "hits")
    assert [(each["key"], each["sum"]) for each in found] == [(f"k{i:04}", i) for i in range(1201)]


# watch


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What happens between looks: functions are called in turn, then it ends."""
    turns: list[Any] = []

    def within(stop: Any, seconds: float) -> bool:
        assert seconds == 2
        if turns:
            turns.pop(0)()
            return False
        return True

    monkeypatch.setattr(cli_series._Stop, "within", within)
    yield turns
    assert turns == []


def test_watched_by_no_terminal(shell: Shell, sleeps: list[Any]) -> None:
    """A line per look, with the time and the sum, until it is ended."""
    hits = shell.series()
    hits.incr("a", 5)
    sleeps += [lambda: hits.incr("a", 2000), lambda: hits.incr("a", -5)]
    lines = shell.shown("watch", "hits", "a").splitlines()
    assert [re.split("  +", line)[1] for line in lines] == ["5", "2,005", "2,000"]
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  [\d,]+  [ ·▁▂▃▄▅▆▇█]+", line)


def test_watched_on_a_terminal(shell: Shell, sleeps: list[Any]) -> None:
    """One chart that is drawn again in its place, no wider and no higher than the window."""
    hits = shell.series()
    hits.incr("a", 5)
    sleeps += [lambda: hits.incr("a", 2000)]
    shown = shell.shown(
        "watch", "hits", "a", "--since", "10m", FORCE_COLOR="1", TERM="xterm-256color",
        COLUMNS="50", LINES="12",
    )  # fmt: skip
    first, *more = shown.split("hits: a")[1:]
    assert "2k" not in first
    assert "2k" in more[0]
    lines = _ANSI.sub("", first.rpartition("\r")[0]).splitlines()
    assert max(map(cell_len, lines)) <= 50
    assert len(lines) <= 12
    assert first.count("\x1b[1A") == len(lines) - 1, "the next one begins in another line"


def test_redis_goes_away_while_watched(shell: Shell, sleeps: list[Any]) -> None:
    """That is said, and looked again; when it is back it goes on."""
    with valkey_server() as server:
        there = dataclasses.replace(shell, url=server.url)

        def back() -> None:
            server.restart()
            there.series().incr("a", 8)

        for options in ({}, {"FORCE_COLOR": "1", "TERM": "xterm-256color", "LINES": "24"}):
            there.series().incr("a", 5)
            sleeps += [server.kill, back]
            done = there.run("watch", "hits", "a", **options)
            assert done.exit_code == 0
            if options:
                assert done.stdout.count("hits: a") >= 3
                assert f"127.0.0.1:{server.port}" in done.stdout
            else:
                assert f"127.0.0.1:{server.port}" in done.stderr
                assert [line.split()[2] for line in done.stdout.splitlines()] == ["5", "8"]
            server.client().flushall()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_ctrl_c(shell: Shell, number: signal.Signals) -> None:
    """As a process it shows each line at once, and ends by Ctrl-C or SIGTERM with 0."""
    shell.series().incr("a", 5)
    command = [sys.executable, "-m", "redishacks", "series", "watch", "hits", "a"]
    with subprocess.Popen(
        [*command, "--every", "0.01", "--prefix", shell.prefix], text=True,
        env={**os.environ, "REDISHACKS_REDIS_URL": shell.url},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(20)]
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert all("  5  " in line for line in lines)
    assert (process.returncode, err) == (0, "")


def test_one_connection(shell: Shell) -> None:
    """All that is asked while watching goes over one connection."""
    with valkey_server() as server, server.client() as client:
        there = dataclasses.replace(shell, url=server.url)
        there.series().incr("a", 5)

        def received() -> int:
            return int(client.info("stats")["total_connections_received"])

        of = cli_series._Of(server.url, shell.prefix, "hits")
        before = received()
        for _ in range(5):
            assert of.open().series.sum("a", time.time() - 60) == 5
        assert received() - before <= 1


# Other kinds


def test_distinct_members(shell: Shell, sleeps: list[Any]) -> None:
    """Points and sums are how many there were; over a range they are not the sum of the points."""
    start = yesterday()
    with DistinctSeries(shell.url, "seen", prefix=shell.prefix, deadline=5) as seen:
        for hour in (1, 5):
            seen.add("a", "x", "y", at=start + hour * HOUR)
        seen.add("a", "z")
    day = ["--since", iso(start), "--until", iso(start + DAY)]
    (shown,) = shell.objects("plot", "seen", "a", *day, "--step", "4h")
    assert [value for _, value in shown["points"]] == [2, 2, 0, 0, 0, 0]
    text = shell.shown("plot", "seen", "a", *day)
    assert "distinct members of each from " in text.splitlines()[-1]
    assert shell.objects("sum", "seen", "a", *day)[0]["sum"] == 2
    assert shell.objects("list", "seen")[0]["sum"] in (1, 3)
    assert re.split("  +", shell.shown("watch", "seen", "a", "--since", "3d"))[1] == "3"


def test_gauges(shell: Shell, sleeps: list[Any]) -> None:
    """Points are the last values, of any scale; there are no sums, which is said."""
    start = yesterday()
    with GaugeSeries(shell.url, "load", scale=2, prefix=shell.prefix, deadline=5) as load:
        load.set("a", Decimal("7.50"), at=start + HOUR)
        load.set("a", Decimal("-1.25"), at=start + 5 * HOUR)
    day = ["--since", iso(start), "--until", iso(start + DAY)]
    assert shell.shown("plot", "load", "a", *day, "--step", "8h", "--csv").splitlines()[1:] == [
        f"{iso(start)},-1.25", f"{iso(start + 8 * HOUR)},", f"{iso(start + 16 * HOUR)},",
    ]  # fmt: skip
    lines = shell.shown("plot", "load", "a", *day, "--step", "4h").splitlines()
    assert "the last value of each from " in lines[-1]
    assert "· is not known" in lines[-1]
    assert any(line.startswith("-") for line in lines)
    assert "has no sums" in failed(shell.run("sum", "load", "a"), 2)
    (shown,) = shell.objects("list", "load")
    assert "sum" not in shown
    assert re.split("  +", shell.shown("watch", "load", "a", "--since", "3d"))[1] == "-1.25"
    assert re.split("  +", shell.shown("watch", "load", "b", "--since", "3d"))[1] == "-"
    assert shell.shown("list", "load").split()[-1] == "a"


def test_latencies(shell: Shell) -> None:
    """Points are what 99 % of the durations do not exceed, in seconds."""
    start = yesterday()
    with LatencySeries(shell.url, "took", prefix=shell.prefix, deadline=5) as took:
        took.record_many([("a", 0.1, start + HOUR)] * 980 + [("a", 0.5, start + HOUR)] * 20)
    day = ["--since", iso(start), "--until", iso(start + DAY)]
    (shown,) = shell.objects("plot", "took", "a", *day, "--step", "12h")
    (_, first), (_, second) = shown["points"]
    assert first == pytest.approx(0.5, rel=0.01)
    assert second is None
    assert "seconds that 99% of each do not exceed" in shell.shown("plot", "took", "a", *day)
    assert "has no sums" in failed(shell.run("sum", "took", "a"), 2)


def test_a_kind_without_points(shell: Shell) -> None:
    """The heaviest members cannot be drawn: exit code 2."""
    with TopSeries(shell.url, "pages", prefix=shell.prefix, deadline=5) as pages:
        pages.incr("a", "/")
    for command in ("plot", "sum", "watch"):
        assert "of the kind 'top'" in failed(shell.run(command, "pages", "a"), 2)


# How it ends

each_command = pytest.mark.parametrize(
    "command", ["plot hits a", "sum hits a b", "list hits", "watch hits a"],
    ids=lambda line: line.split()[0],
)  # fmt: skip


@pytest.mark.parametrize("args", ["plot", "plot --csv", "plot --json", "watch"])
def test_a_full_disk(shell: Shell, args: str) -> None:
    """Output that cannot be written is exit code 1, and a line that says so."""
    shell.series().incr("a", 5)
    command, *options = args.split()
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "redishacks", "series", command, "hits", "a", *options,
             "--redis", shell.url, "--prefix", shell.prefix],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "redishacks: cannot write the output: No space left on device\n"


def test_the_examples_of_the_readme(shell: Shell, sleeps: list[Any]) -> None:
    """Its command lines are understood, each command is among them."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    lines = re.findall(r"^redishacks series (.*)$", readme, re.M)
    shell.series("page views").incr_many([("project:42", 7), ("project:1", 1)])
    for line in lines:
        assert shell.shown(*shlex.split(line, comments=True))
    assert {line.split()[0] for line in lines} == {"plot", "list", "sum", "watch"}


def test_help() -> None:
    """Every command says what it does, its options and the exit codes."""
    shown = CliRunner().invoke(commands, ["series", "-h"]).stdout
    for word, more in {
        "plot": ["--step", "--png", "--csv", "--json", "--until", "--tz"],
        "sum": ["--today", "--json", "--until", "--tz"],
        "list": ["--match", "--json"],
        "watch": ["--every", "--step", "--tz"],
    }.items():
        assert word in shown
        page = CliRunner().invoke(commands, ["series", word, "--help"]).stdout
        for part in ("--redis URL", "--prefix", "REDISHACKS_REDIS_URL", "  0 ", "  75 ", *more):
            assert part in page
    assert "series" in CliRunner().invoke(commands, ["-h"]).stdout


@each_command
def test_a_name_that_nobody_has_written(shell: Shell, valkey: Server, command: str) -> None:
    """Such a name is exit code 2, and is not made by looking."""
    shell.series("hits2").incr("a")
    line = failed(shell.run(*command.split()), 2)
    assert f"no series 'hits' has been written (prefix '{shell.prefix}')" in line
    with valkey.client() as client:
        assert client.keys(f"{shell.prefix}:t1:{{hits/*") == []


@each_command
def test_another_kind(shell: Shell, valkey: Server, command: str) -> None:
    """A kind of series that is not known here is exit code 2, and said."""
    shell.series().incr("a")
    with valkey.client() as client:
        client.hset(f"{shell.prefix}:t1:{{hits/0}}:meta", "kind", "odd")
    assert "of the kind 'odd'" in failed(shell.run(*command.split()), 2)


def test_partitions_and_resolutions_are_known(shell: Shell) -> None:
    """They need not be given, whatever they are."""
    start = yesterday()
    with shell.series(partitions=7, resolutions=[Resolution(900, 30 * DAY)]) as hits:
        hits.incr_many([(f"k{i}", i, start + HOUR) for i in range(20)])
    day = ["--since", iso(start), "--until", iso(start + DAY)]
    keys = [f"k{i}" for i in range(20)]
    assert [each["sum"] for each in shell.objects("sum", "hits", *keys, *day)] == list(range(20))
    for i in (1, 19):
        (shown,) = shell.objects("plot", "hits", f"k{i}", *day)
        assert sum(value for _, value in shown["points"]) == i
    assert len(shell.objects("list", "hits")) == 20


def test_a_range_that_ends_before_it_begins(shell: Shell) -> None:
    """That is exit code 2, and says which moments were meant."""
    shell.series().incr("a")
    for command in ("plot", "sum"):
        args = ["--since", "2026-01-02", "--until", "2026-01-01"]
        line = failed(shell.run(command, "hits", "a", *args), 2)
        assert "--since is 2026-01-02 00:00:00, after --until, 2026-01-01 00:00:00" in line


def test_what_is_missing_or_wrong(shell: Shell) -> None:
    """Without a URL, name or key, or with an option that cannot be read, it is exit code 2."""
    shell.series().incr("a")
    assert (
        CliRunner()
        .invoke(commands, ["series", "list", "hits"], env={"REDISHACKS_REDIS_URL": None})
        .exit_code
        == 2
    )
    for args in (
        ["plot", "hits"], ["sum", "hits"], ["list"], ["watch", "hits"],
        ["plot", "hits", "a", "--since", "5"], ["plot", "hits", "a", "--step", "year"],
        ["plot", "hits", "a", "--tz", "Mars"], ["sum", "hits", "a", "--until", "x"],
        ["watch", "hits", "a", "--every", "0"], ["sum", "hits", ""],
    ):  # fmt: skip
        assert shell.run(*args).exit_code == 2, args


@each_command
def test_redis_away(shell: Shell, command: str) -> None:
    """Nobody there is exit code 75."""
    done = shell.run(*command.split(), url="redis://:geheim@127.0.0.1:1/0")
    assert "connection refused" in failed(done, 75)


@each_command
def test_a_url_that_is_none(shell: Shell, command: str) -> None:
    """Another kind of URL is exit code 2, and nothing of it is shown."""
    assert "redis://" in failed(shell.run(*command.split(), url="http://:geheim@localhost/0"), 2)


@each_command
def test_no_rights(shell: Shell, valkey: Server, command: str) -> None:
    """A user who may not is exit code 78; who may read may look."""
    shell.series().incr("a")
    with valkey.client() as client:
        try:
            for rights, exit_code in (("+ping", 78), ("+ping +scan +hgetall +time +mget", 0)):
                client.execute_command(
                    "ACL", "SETUSER", shell.prefix, "reset", "on", ">geheim", f"~{shell.prefix}:*",
                    *rights.split(),
                )  # fmt: skip
                if exit_code == 0 and command.startswith("watch"):
                    continue
                url = f"redis://{shell.prefix}:geheim@127.0.0.1:{valkey.port}/0"
                done = shell.run(*command.split(), url=url)
                assert done.exit_code == exit_code, done.output
        finally:
            client.execute_command("ACL", "DELUSER", shell.prefix)


def test_looking_changes_nothing(shell: Shell, valkey: Server) -> None:
    """To look makes no key and leaves all as it is."""
    shell.day("a", 1, 2)
    with valkey.client() as client:
        keys = sorted(client.scan_iter(f"{shell.prefix}:*"))
        before = [client.dump(key) for key in keys]
        for args in (
            ["plot", "hits", "a"],
            ["plot", "hits", "b"],
            ["sum", "hits", "b"],
            ["list", "hits"],
        ):
            shell.shown(*args)
        assert sorted(client.scan_iter(f"{shell.prefix}:*")) == keys
        assert [client.dump(key) for key in keys] == before


def test_a_node_of_a_cluster(cluster: Cluster, prefix: str) -> None:
    """A URL is one server: a node that lacks the series says so, with exit code 2."""
    client = cluster.client()
    with TimeSeries(client, "hits", prefix=prefix, deadline=5) as hits:
        hits.incr("a")
    client.close()
    ends = [Shell(node.url, prefix).run("sum", "hits", "a") for node in cluster.nodes]
    assert any(done.exit_code == 2 for done in ends)
    for done in ends:
        assert done.exit_code == 0 or "is a node of a cluster" in failed(done, 2)
