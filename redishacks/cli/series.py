"""`redishacks series`: points of a time series drawn in the terminal, lists, sums, a live view.

Which kind a name is of, its partitions and its resolutions are read from its record in Redis.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import math
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from redishacks import _keys
from redishacks._drive import Transport, drive
from redishacks._words import many
from redishacks.cli import chart, show, when
from redishacks.cli.ending import EXIT_CODES, one_line
from redishacks.cli.kinds import Kind, Look, kind_of
from redishacks.errors import UnavailableError, UsageError
from redishacks.timeseries import Series, Total, _calendar
from redishacks.timeseries.record import Record, look_up
from redishacks.timeseries.resolution import DAY, HOUR, MINUTE

#: Seconds that an exchange may take.
_DEADLINE = 1.0
#: Rows of bars, when the window has as many.
_ROWS = 12
#: Points in a file, about, when no step is given.
_MOST = 1500
#: Series of a list that are summed up in one round trip.
_PAGE = 500

#: Steps that people think in, and how long they are.
_STEPS: dict[float | str, int] = {
    **{size: size for size in (1, 2, 5, 10, 15, 20, 30)},
    **{size * MINUTE: size * MINUTE for size in (1, 2, 5, 10, 15, 20, 30)},
    **{size * HOUR: size * HOUR for size in (1, 2, 3, 4, 6, 8, 12, 24)},
    "week": 7 * DAY,
    "month": 31 * DAY,
}


class _Opened(NamedTuple):
    """A series in use."""

    kind: Kind
    series: Any
    record: Record
    #: The server's time, in seconds since 1970.
    now: float

    def totals(self, keys: Sequence[str | bytes], start: float) -> Mapping[Any, Total]:
        """Return one number of each series until now; nothing for kinds that have none."""
        totals = self.kind.totals
        return {} if totals is None else totals(self.series, keys, start, None)


@dataclasses.dataclass
class _Of:
    """Where to look: what the options say."""

    url: str
    prefix: str
    name: str

    @functools.cached_property
    def transport(self) -> Transport:
        """What talks to Redis: all that is opened here shares it."""
        from redishacks._transport import connect

        return connect(self.url)

    def open(self) -> _Opened:
        """Open the series as its record says; raises `UsageError` when nobody has written."""
        record, now = drive(look_up(self.prefix, self.name), self.transport, _DEADLINE)
        if record is None:
            raise UsageError(
                f"no series {self.name!r} has been written (prefix {self.prefix!r}); "
                "is the name right?"
            )
        kind = kind_of(self.name, record)
        series = kind.opens(
            self.url, self.name, partitions=record.partitions, fields=record.fields,
            prefix=self.prefix, deadline=_DEADLINE,
        )  # fmt: skip
        return _Opened(kind, series, record, now)


class _Range(NamedTuple):
    """Which points: what the options say."""

    since: when.Moment
    until: when.Moment | None
    step: float | str | None
    tz: dt.tzinfo

    def bounds(self, now: float) -> tuple[float, float | None]:
        """Return where it begins and ends, in seconds since 1970; None is now."""
        start = self.since.at(now, self.tz)
        end = None if self.until is None else self.until.at(now, self.tz)
        if end is not None and end < start:
            first, last = when.shown(start, self.tz), when.shown(end, self.tz)
            raise UsageError(f"--since is {first}, after --until, {last}")
        return start, end

    def points(self, opened: _Opened, key: str | bytes, most: int) -> Series:
        """Read points, about so many when no step is given."""
        start, end = self.bounds(opened.now)
        last = opened.now if end is None else end
        step = self.step
        if step is None:
            step = _fitting(opened, start, last, most, self.tz)
        return opened.kind.points(opened.series, key, Look(start, end, step, self.tz))


def _fitting(opened: _Opened, start: float, end: float, most: int, tz: dt.tzinfo) -> float | str:
    """Return the shortest step that makes few enough points, of buckets that still exist."""
    rungs, now = opened.record.rungs, int(opened.now)
    shift = dt.datetime.fromtimestamp(start, tz).utcoffset() or dt.timedelta()
    offset = int(shift.total_seconds())
    room = max(1, most - 1)  # it may begin and end amid a step
    for expired in (False, True):
        for step, size in _STEPS.items():
            fit = [rung for rung in rungs if math.gcd(min(size, DAY), offset) % rung.step == 0]
            there = expired or any(rung.horizon(now) <= start - size for rung in fit)
            if (end - start) / size <= room and fit and there:
                return step
    if DAY % rungs[-1].step == 0:
        return "month"
    return rungs[-1].step * max(1, math.ceil((end - start) / room / rungs[-1].step))


def _of_a_series(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say where to look; it gets an `_Of`."""

    def run(url: str, prefix: str, name: str, **options: Any) -> Any:
        return command(_Of(url, prefix, name), **options)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--prefix", default="rh", show_default=True, help="The series' prefix."),
        click.option("--redis", "url", metavar="URL", envvar="REDISHACKS_REDIS_URL", required=True,
                     show_envvar=True, help="Redis, as redis://, rediss:// or unix://; a URL is "
                     "one server."),
        click.argument("name"),
    ):  # fmt: skip
        run = option(run)
    return run


_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")


def _since(default: str) -> Callable[..., Any]:
    return click.option(
        "--since", type=when.MomentType(), metavar="WHEN", default=default, show_default=True,
        help="So long ago, as 90s, 10m, 24h, 7d or 1w, or ISO 8601, as 2026-01-31T12:00.",
    )  # fmt: skip


_UNTIL = click.option(
    "--until", type=when.MomentType(), metavar="WHEN", help="The same; by default now."
)
_STEP = click.option(
    "--step", type=when.StepType(), metavar="STEP",
    help="From point to point, as 10m, or day, week or month; by default what fits.",
)  # fmt: skip
_TZ = click.option(
    "--tz", metavar="ZONE", default="UTC", show_default=True,
    help="Time zone, as America/Recife: of the output, of days, and of times that name none.",
)  # fmt: skip


@click.group()
def series() -> None:
    """Draw time series, list them and sum them up."""


@series.command(epilog=EXIT_CODES)
@_of_a_series
@click.argument("key")
@_since("24h")
@_UNTIL
@_STEP
@_TZ
@click.option(
    "--png", "file", metavar="FILE", type=click.Path(dir_okay=False),
    help="Draw it to a file, .png or .svg; needs redishacks[plot].",
)  # fmt: skip
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV: time in UTC, value.")
@_JSON
def plot(
    of: _Of,
    key: str,
    since: when.Moment,
    until: when.Moment | None,
    step: float | str | None,
    tz: str,
    file: str | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Draw the series KEY of NAME in the terminal, or to a file; or print its points."""
    if (file is not None) + as_csv + as_json > 1:
        raise click.UsageError("--png, --csv and --json exclude each other")
    asked = _Range(since, until, step, _calendar.zone(tz))
    opened = of.open()
    if as_json or as_csv or file is not None:
        points = asked.points(opened, key, _MOST)
        if as_json:
            show.print_json(_as_json(of, key, points))
        elif as_csv:
            _print_csv(points)
        else:
            assert file is not None
            _picture(points, file, _title(of, key), asked.tz)
        return
    out = show.console()
    points = asked.points(opened, key, chart.room(_window(out).columns))
    out.print(_drawn(points, _title(of, key), asked.tz, out), no_wrap=True, overflow="ellipsis")
    out.print(_about(opened, points, asked.tz, out))


@series.command("sum", epilog=EXIT_CODES)
@_of_a_series
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
@_since("24h")
@_UNTIL
@click.option("--today", is_flag=True, help="Since midnight, of --tz.")
@_TZ
@_JSON
@click.pass_context
def sum_(
    ctx: click.Context,
    of: _Of,
    keys: tuple[str, ...],
    since: when.Moment,
    until: when.Moment | None,
    today: bool,
    tz: str,
    as_json: bool,
) -> None:
    """Show the sum of each series KEY of NAME, and what it covers."""
    given = ctx.get_parameter_source("since") is not click.core.ParameterSource.DEFAULT
    if today and (given or until is not None):
        raise click.UsageError("--today says since when and until when")
    asked = _Range(since, until, None, _calendar.zone(tz))
    opened = of.open()
    start, end = asked.bounds(opened.now)
    if today:
        start, end = _calendar.day(opened.now, asked.tz)
    if opened.kind.totals is None:
        raise UsageError(f"{of.name!r} is of the kind {opened.record.kind!r}, which has no sums")
    totals = opened.kind.totals(opened.series, keys, start, end)
    if as_json:
        for key, total in totals.items():
            show.print_json({"name": of.name, "key": key, **_total_as_json(total)})
        return
    out = show.console()
    covered = next(iter(totals.values()))
    show.facts(
        f"{show.printable(of.name)} {_covers(covered.start, covered.end, asked.tz)}",
        _right([(f"{total:,}", show.printable(str(key))) for key, total in totals.items()]),
        out,
    )
    if not covered.complete:
        lacks = f"not complete: a part has expired, or is exact to {covered.resolution} s only"
        out.print(Text(lacks, style="yellow"))


@series.command("list", epilog=EXIT_CODES)
@_of_a_series
@click.option("--match", metavar="GLOB", help="Only keys like this, as project:*.")
@_JSON
def list_(of: _Of, match: str | None, as_json: bool) -> None:
    """List the series of NAME, each with its sum of the last 24 hours and a line of bars.

    Looks through all keys of the database, a thousand at a time.
    """
    opened = of.open()
    asked = _Range(when.Moment(DAY), None, None, dt.UTC)
    keys = sorted(opened.series.keys(match), key=_keys.id_bytes)
    rows = []
    for at in range(0, len(keys), _PAGE):
        some = keys[at : at + _PAGE]
        totals = opened.totals(some, opened.now - DAY)
        for key in some:
            points = asked.points(opened, key, 26)
            if as_json:
                shown = {"key": key} if isinstance(key, str) else {"key_hex": key.hex()}
                about = _total_as_json(totals[key]) if key in totals else {}
                show.print_json({"name": of.name, **shown, **about, "points": list(points)})
            number = _one(totals.get(key), points)
            rows.append((number, points.sparkline(), show.printable(key)))
    if as_json:
        return
    out = show.console()
    if not rows:
        liked = "" if match is None else f" like {show.printable(match)}"
        out.print(Text(f"{show.printable(of.name)}: no series{liked} has anything that is kept"))
        return
    lines = _right([(total, f"{line}  {key}") for total, line, key in rows])
    title = f"{show.printable(of.name)}: {many(len(rows), 'series', 'series')}, last 24 hours"
    show.facts(title, [(total, _fit(line, out)) for total, line in lines], out)


@series.command(epilog=EXIT_CODES)
@_of_a_series
@click.argument("key")
@click.option(
    "--every", type=when.DurationType(), metavar="SECONDS", default="2", show_default=True,
    help="How often to look.",
)  # fmt: skip
@_since("1h")
@_STEP
@_TZ
def watch(
    of: _Of, key: str, every: float, since: when.Moment, step: float | str | None, tz: str
) -> None:
    """Draw the series KEY of NAME again and again, until Ctrl-C or SIGTERM.

    When the output is no terminal, each time is a line: when, the sum, and bars.
    """
    asked = _Range(since, None, step, _calendar.zone(tz))
    out = show.console()
    view = _Live if out.is_terminal else _Lines
    with _Stop() as stop, view(of, key, asked, out) as look:
        look(of.open())  # when that fails, it is said, and all ends
        while not stop.within(every):
            try:
                look(of.open())
            except UnavailableError as error:
                look.away(error)


class _Stop:
    """Whether somebody has asked us to end, which is obeyed between looks.

    What a signal handler raises may come where Python ignores it, as while an object is deleted.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *about: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.set()

    def within(self, seconds: float) -> bool:
        """Wait so long, or until asked; return whether we are."""
        return self._asked.wait(seconds)


class _Lines:
    """A line for each look."""

    def __init__(self, of: _Of, key: str, asked: _Range, out: Console) -> None:
        self.of = of
        self.key = key
        self.asked = asked
        self.out = out

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *about: object) -> None:
        """Nothing to end."""

    def __call__(self, opened: _Opened) -> None:
        """Show how it is now."""
        points = self.asked.points(opened, self.key, 60)
        total = opened.totals([self.key], self.asked.bounds(opened.now)[0]).get(self.key)
        now = when.shown(opened.now, self.asked.tz)
        line = f"{now}  {_one(total, points)}  {points.sparkline(60)}"
        self.out.print(Text(_fit(line, self.out)))

    def away(self, error: UnavailableError) -> None:
        """Say that Redis is away."""
        click.echo(f"redishacks: {one_line(error)}", err=True)


class _Live(_Lines):
    """A chart that is drawn again for each look."""

    def __init__(self, of: _Of, key: str, asked: _Range, out: Console) -> None:
        super().__init__(of, key, asked, out)
        self._live = Live(console=out, auto_refresh=False, vertical_overflow="crop")
        self._drawn = Text()

    def __enter__(self) -> _Lines:
        self._live.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._live.stop()

    def __call__(self, opened: _Opened) -> None:
        points = self.asked.points(opened, self.key, chart.room(_window(self.out).columns))
        title = f"{_title(self.of, self.key)}  {when.shown(opened.now, self.asked.tz)}"
        self._drawn = _drawn(points, title, self.asked.tz, self.out)
        self._drawn.append("\n").append_text(_about(opened, points, self.asked.tz, self.out))
        self._live.update(self._drawn, refresh=True)

    def away(self, error: UnavailableError) -> None:
        """Say it below what was there."""
        below = Text(f"\n{one_line(error)}", style="bold red")
        self._live.update(self._drawn.copy().append_text(below), refresh=True)


# How things look


def _print_csv(points: Series) -> None:
    try:
        click.echo(points.to_csv(), nl=False)
    except OSError as error:
        raise show.OutputError(error.errno, error.strerror) from error


def _picture(points: Series, file: str, title: str, tz: dt.tzinfo) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its font lacks
        try:
            points.plot(file, title=title, tz=tz)
        except OSError as error:
            raise click.FileError(file, error.strerror) from error


def _window(on: Console) -> os.terminal_size:
    """Return the size of the window; for a file 80 columns, or what COLUMNS says."""
    return os.terminal_size(on.size) if on.is_terminal else shutil.get_terminal_size()


def _title(of: _Of, key: str) -> str:
    return f"{show.printable(of.name)}: {show.printable(key)}"


def _drawn(points: Series, title: str, tz: dt.tzinfo, on: Console) -> Text:
    """Return a chart below its title, no line wider than the window."""
    width, height = _window(on)
    text = Text(no_wrap=True, overflow="ellipsis").append(f"{title}\n", "bold")
    text.append_text(chart.chart(points, width, min(_ROWS, height - 6), tz))
    return chart.plain(text) if on.options.ascii_only else text


def _about(opened: _Opened, points: Series, tz: dt.tzinfo, on: Console) -> Text:
    """Return what is said below a chart."""
    what = opened.kind.about or f"{points.sum():,}"
    words = [f"{what} {_covers(points.times[0], points.end, tz)}"]
    size = chart.shared(points, _window(on).columns)
    words.append(
        many(len(points), "point") + (f", a bar is the mean of {size}" if size > 1 else "")
    )
    if None in points.values:
        words.append(_fit("· is not known", on))
    text = Text("; ".join(words), "dim")
    if not points.complete:
        text.append("\nnot complete: a part has expired", "yellow")
    return text


def _fit(line: str, on: Console) -> str:
    """Return a line with bars in it as the terminal can show it."""
    return chart.plain(Text(line)).plain if on.options.ascii_only else line


def _one(total: Total | None, points: Series) -> str:
    """Return one number: the total, or the last that is known."""
    known = (value for value in reversed(points.values) if value is not None)
    number = next(known, None) if total is None else int(total)
    return "-" if number is None else f"{number:,}"


def _covers(start: int, end: int, tz: dt.tzinfo) -> str:
    return f"from {when.shown(start, tz)} to {when.shown(end, tz)} ({tz})"


def _right(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Put numbers below each other."""
    width = max(len(number) for number, _ in rows)
    return [(number.rjust(width), what) for number, what in rows]


def _as_json(of: _Of, key: str, points: Series) -> dict[str, Any]:
    return {
        "name": of.name, "key": key, "start": points.times[0], "end": points.end,
        "resolution": points.resolution, "complete": points.complete, "points": list(points),
    }  # fmt: skip


def _total_as_json(total: Total) -> dict[str, Any]:
    return {
        "sum": int(total), "start": total.start, "end": total.end,
        "resolution": total.resolution, "complete": total.complete,
    }  # fmt: skip
