"""`redishacks demo`: the demonstration, with progress, charts and a verdict."""

from __future__ import annotations

import contextlib
import datetime as dt
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from redishacks._words import many
from redishacks.cli import chart, show, when
from redishacks.cli.ending import EXIT_CODES, Exit, masked
from redishacks.demo.replay import Audience, Options, Outcome, play
from redishacks.demo.times import SPAN_YEARS, YEARS, Shown
from redishacks.demo.traffic import Traffic, made_up, read_log
from redishacks.timeseries import Series, Total

_HITS = 100_000
#: Rows of the chart, and the most bars of a line.
_ROWS = 6
_BARS = 60
_POINTS = ("hits", "bytes", "clients", "busiest", "busiest_bytes")


@click.command(epilog=EXIT_CODES)
@click.option(
    "--log",
    metavar="FILE",
    help="Replay this access log (combined format, plain or .gz; - is standard input) instead of "
    "made-up traffic. It is held in memory.",
)
@click.option("--hits", type=click.IntRange(min=1), help=f"How many to make up.  [{_HITS:,}]")
@click.option("--seed", type=int, help="What to make up.  [0]")
@click.option("--postgres", is_flag=True, help="Start a private PostgreSQL rather than SQLite.")
@click.option(
    "--redis", "redis_url", metavar="URL", help="Use this Redis, rather than a private one."
)
@click.option(
    "--sql", "sql_url", metavar="URL", help="Use this database: sqlite:/// or postgresql://."
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object.")
@click.pass_context
def demo(
    ctx: click.Context,
    log: str | None,
    hits: int | None,
    seed: int | None,
    postgres: bool,
    redis_url: str | None,
    sql_url: str | None,
    as_json: bool,
) -> None:
    """Count hits, kill a flusher half-way, compare with SQL.

    Web traffic is counted in Redis while other processes flush it to SQL. One of them is killed
    with SIGKILL when some chunks of its batch are in SQL and some are not; the next one goes on.
    In the end each page's count is compared.

    The hits, their bytes, clients and pages are also counted in time series, by the log's own
    times, and drawn; each hour is compared with a plain count. Exits with 1 when something differs.

    Servers started here are gone in the end. On servers of yours, keys and tables get random names
    and are removed in the end.
    """  # fmt: skip
    if log is not None and (hits is not None or seed is not None):
        raise click.UsageError("--hits and --seed make traffic up, --log replays it")
    if postgres and sql_url is not None:
        raise click.UsageError("--postgres starts a database, --sql names one")
    traffic = read_log(log) if log is not None else made_up(hits or _HITS, seed or 0)
    options = Options(redis_url, sql_url, postgres)
    with _audience(len(traffic.targets), _Ended()) as audience:
        outcome = play(options, traffic, audience)
    if as_json:
        show.print_json(_as_json(outcome, traffic))
    else:
        _print(outcome, traffic, show.console())
    ctx.exit(Exit.DONE if outcome.agree and outcome.series_agree else Exit.WRONG)


class _Ended:
    """Whether a signal has told us to end; the play is left at the next good moment, tidily."""

    def __init__(self) -> None:
        self._by: int | None = None
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._by = number

    def check(self) -> None:
        """Leave, with the shell's exit code for the signal."""
        if self._by is not None:
            sys.exit(128 + self._by)


class _Lines(Audience):
    """Tells what happens, line by line, on stderr."""

    def __init__(self, console: Console, ended: _Ended) -> None:
        self._console = console
        self._ended = ended

    def go_on(self) -> None:
        """Leave when told to."""
        self._ended.check()

    def tell(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(masked(text)))


class _Bar(_Lines):
    """Shows also how much was replayed."""

    def __init__(self, progress: Progress, total: int, ended: _Ended) -> None:
        super().__init__(progress.console, ended)
        self._progress = progress
        self._task = progress.add_task("replaying", total=total)

    def count(self, hits: int) -> None:
        """Move on."""
        self._progress.advance(self._task, hits)


@contextlib.contextmanager
def _audience(total: int, ended: _Ended) -> Iterator[Audience]:
    console = show.console(err=True)
    if not console.is_terminal:
        console.print(f"replaying {many(total, 'hit')}")
        yield _Lines(console, ended)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, total, ended)


def _as_json(outcome: Outcome, traffic: Traffic) -> dict[str, Any]:
    return {
        **outcome._asdict(),
        "agree": outcome.agree,
        "killed": outcome.killed._asdict(),
        "flushes": [report._asdict() for report in outcome.flushes],
        "series": outcome.series and _series_as_json(outcome.series),
        "series_agree": outcome.series_agree,
        "lines_skipped": traffic.skipped,
        "first_skipped": [line._asdict() for line in traffic.first_skipped],
    }


def _series_as_json(shown: Shown) -> dict[str, Any]:
    top = [{"page": page, "hits": hits} for page, hits in shown.top]
    return {
        **shown._asdict(),
        **{name: list(getattr(shown, name)) for name in _POINTS},
        "error_of_clients": shown.total_clients.error,
        "top": top, "error_of_top": shown.top.error,
    }  # fmt: skip


def _print(outcome: Outcome, traffic: Traffic, out: Console) -> None:
    if outcome.series is not None:
        _print_series(outcome.series, out)
    if outcome.left_out:
        why = f"in the future, over {YEARS} years old, or over {SPAN_YEARS} before the last"
        out.print(f"not in the time series: {many(outcome.left_out, 'hit')}, {why}")
    show.facts("Ten most seen pages", [(f"{n:,}", show.printable(p)) for p, n in outcome.top], out)
    rows = [
        ("hits sent", f"{outcome.hits_sent:,} on {many(outcome.pages_sent, 'page')}"),
        ("hits in SQL", f"{outcome.hits_in_sql:,} in {many(outcome.rows_in_sql, 'row')}"),
        ("hits per second", f"{outcome.hits_per_second:,.0f}"),
        ("commands per hit", _cost(outcome)),
    ]
    show.facts("Outcome", rows, out)
    if outcome.agree:
        out.print(Text("Redis and SQL agree to the last hit.", style="bold green"))
    else:
        out.print(Text(_wrong(outcome), style="bold red"))
    if outcome.series is not None:
        _print_verdict(outcome.series, out)
    if traffic.skipped:
        out.print(f"left out: {many(traffic.skipped, 'line')}")
        for line in traffic.first_skipped:
            out.print(f"  line {line.line:,}: {line.reason}")
        if traffic.skipped > len(traffic.first_skipped):
            out.print(f"  and {traffic.skipped - len(traffic.first_skipped):,} more")


def _print_series(shown: Shown, out: Console) -> None:
    columns = out.width if out.is_terminal else shutil.get_terminal_size().columns
    per = "day" if shown.step > 3600 else "hour"
    covered = shown.total_hits
    out.print(Text(f"Hits per {per}, {_span(covered)}", style="bold"))
    drawn = chart.chart(shown.hits, columns, _ROWS, dt.UTC)
    out.print(chart.plain(drawn) if out.options.ascii_only else drawn)
    lines: list[tuple[str, Series, str]] = [
        (f"bytes per {per}", shown.bytes, f"{shown.total_bytes:,}"),
        (
            f"clients per {per}", shown.clients,
            f"{shown.total_clients:,} different ones, to {shown.total_clients.error:.2%}",
        ),
        ("hits per 10 s", shown.busiest, f"{shown.busiest.sum():,} in the busiest hour"),
        ("bytes per 10 s", shown.busiest_bytes, f"{shown.busiest_bytes.sum():,}"),
    ]  # fmt: skip
    bars = max(8, min(_BARS, columns - 60))
    rows = [(name, f"{_line(points, bars, out)}  {said}") for name, points, said in lines]
    show.facts(f"Time series by the times of the log, kept for {YEARS} years here", rows, out)
    exact = "exactly" if not shown.top.error else f"each up to {shown.top.error:,} too low"
    began = when.shown(shown.busiest.times[0], dt.UTC)
    pages = [(f"{n:,}", show.printable(page)) for page, n in shown.top]
    show.facts(f"Most seen in the busiest hour, from {began} ({exact})", pages, out)


def _line(points: Series, width: int, out: Console) -> str:
    line = points.sparkline(width)
    return chart.plain(Text(line)).plain if out.options.ascii_only else line


def _span(total: Total) -> str:
    return f"{when.shown(total.start, dt.UTC)} to {when.shown(total.end, dt.UTC)} (UTC)"


def _print_verdict(shown: Shown, out: Console) -> None:
    if not shown.wrong_hours:
        said = "Time series and a plain count agree, hits and bytes of every hour."
        out.print(Text(said, style="bold green"))
        return
    hours = ", ".join(when.shown(at, dt.UTC) for at in shown.wrong_hours[:5])
    wrong = f"the hits or bytes of {many(len(shown.wrong_hours), 'hour')}: {hours}"
    out.print(Text(f"Time series and a plain count do NOT agree on {wrong}", style="bold red"))


def _cost(outcome: Outcome) -> str:
    if outcome.calls_per_hit is None or outcome.commands_per_hit is None:
        return "not known: this Redis does not tell (INFO commandstats)"
    return (
        f"{show.small(outcome.calls_per_hit)} script calls; "
        f"{show.small(outcome.commands_per_hit)} with the commands inside them"
    )


def _wrong(outcome: Outcome) -> str:
    pages = ", ".join(show.printable(page) for page in outcome.wrong_pages[:5])
    return (
        f"Redis and SQL do NOT agree: sent {many(outcome.hits_sent, 'hit')}, "
        f"in SQL {outcome.hits_in_sql:,}; {many(outcome.dead, 'dead letter')}; "
        f"another count for {many(len(outcome.wrong_pages), 'page')}: {pages}"
    )
