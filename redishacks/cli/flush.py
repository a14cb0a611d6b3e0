"""`redishacks flush`: the cron job."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.live import Live
from rich.text import Text

from redishacks._drive import drive
from redishacks._words import many
from redishacks.cli import show
from redishacks.cli.ending import EXIT_CODES, Exit, for_each
from redishacks.cli.target import with_jobs
from redishacks.counters import FlushJob, FlushReport

#: How many of the hottest ids a dry run shows.
_HOTTEST = 10


class _Seconds(click.FloatRange):
    """Seconds, over zero; float() also reads nan and inf, which are no time to wait."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{seconds} is not a finite number of seconds.", param, ctx)
        return seconds


_SECONDS = _Seconds(min=0, min_open=True)


@click.command(epilog=EXIT_CODES)
@with_jobs
@click.option("--once", is_flag=True, help="Run once: the default.")
@click.option(
    "--every",
    type=_SECONDS,
    metavar="SECONDS",
    help="Run again and again; a run that takes longer skips what it overran.",
)
@click.option(
    "--for",
    "duration",
    type=_SECONDS,
    metavar="SECONDS",
    help="With --every: begin no run after so long; without it, until SIGTERM.",
)
@click.option(
    "--time-budget",
    type=_SECONDS,
    metavar="SECONDS",
    help="Begin no batch after so long; each run has its own budget.",
)
@click.option("--chunk", type=click.IntRange(1, 100_000), help="Ids per SQL transaction.")
@click.option("--dry-run", is_flag=True, help="Show what would be written; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per job and run.")
@click.pass_context
def flush(
    ctx: click.Context,
    jobs: list[FlushJob],
    once: bool,
    every: float | None,
    duration: float | None,
    time_budget: float | None,
    chunk: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write what counters have pending to SQL, each hit exactly once.

    Any number of these may run at once, and be killed at any moment. SIGTERM and Ctrl-C finish the
    batch in hand, then stop; a second Ctrl-C stops at once. From cron, every ten seconds:

    \b
        * * * * * redishacks flush myapp.counters:jobs --every 10 --for 60

    Each batch is one line on stderr; with several jobs, a failing one does not stop the others.
    With --every, what is away in one run is tried again in the next one, and the exit code tells
    how the last run ended.
    """
    if every is None and duration is not None:
        raise click.UsageError("--for needs --every")
    if once and every is not None:
        raise click.UsageError("--once and --every exclude each other")
    if dry_run and every is not None:
        raise click.UsageError("--dry-run looks once, without --every")
    if chunk is not None:
        for job in jobs:
            job.chunk = chunk
    if dry_run:
        ctx.exit(_dry_run(jobs, as_json))
    stop = _Stop(jobs)
    ctx.exit(_rounds(_Run(jobs, time_budget, as_json, stop), every, duration))


# When


class _Stop:
    """Whether somebody has asked us to end; obeyed between batches."""

    def __init__(self, jobs: Sequence[FlushJob]) -> None:
        self.asked = False
        self._jobs = jobs
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        for job in self._jobs:
            job.stop()

    def sleep(self, seconds: float) -> None:
        """Sleep, until asked to end."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


def next_start(elapsed: float, every: float, duration: float | None) -> float | None:
    """Return when the next run starts, in seconds since the first; None when there is none."""
    start = (math.floor(elapsed / every) + 1) * every
    return None if duration is not None and start >= duration else start


def _rounds(run: _Run, every: float | None, duration: float | None) -> Exit:
    began = time.monotonic()
    while True:
        ended = run.all()
        if every is None or run.stop.asked:
            return ended
        elapsed = time.monotonic() - began
        start = next_start(elapsed, every, duration)
        if start is None:
            return ended
        run.stop.sleep(start - elapsed)
        if run.stop.asked:
            return ended


# What


class _Run:
    """One run of every job, told as lines, as JSON, or by a spinner on a terminal."""

    def __init__(
        self, jobs: Sequence[FlushJob], time_budget: float | None, as_json: bool, stop: _Stop
    ) -> None:
        self.stop = stop
        self._jobs = jobs
        self._budget = time_budget
        self._as_json = as_json
        self._err = show.console(err=True)
        self._began = 0.0

    def all(self) -> Exit:
        """Run every job once; one that fails does not stop the others."""
        self._began = time.monotonic()
        return for_each(self._jobs, self._one, self._as_json)

    def _left(self) -> float | None:
        return None if self._budget is None else self._budget + self._began - time.monotonic()

    def _one(self, job: FlushJob) -> Exit:
        left = self._left()
        if self.stop.asked or (left is not None and left <= 0):
            return Exit.DONE
        with self._watched(job):
            report = job.run(time_budget=left)
        if self._as_json:
            show.print_json({"counter": job.layout.full_name, **report._asdict()})
        elif self._err.is_terminal:
            self._err.print(Text(f"{job.layout.full_name}: {_told(report)}"))
        return Exit.DONE

    @contextlib.contextmanager
    def _watched(self, job: FlushJob) -> Iterator[None]:
        """Show progress while a job runs: live on a terminal, else a line per batch."""
        theirs, before = job.on_batch, FlushReport()

        def on_batch(report: FlushReport) -> None:
            nonlocal before
            if not self._err.is_terminal:
                now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
                click.echo(
                    f"{now} {job.layout.full_name}: {_told(_since(before, report))}", err=True
                )
            before = report
            if theirs is not None:
                theirs(report)
            if self.stop.asked:  # the signal may have come just before the run began
                job.stop()

        job.on_batch = on_batch
        try:
            if self._err.is_terminal:
                with Live(
                    console=self._err,
                    transient=True,
                    get_renderable=lambda: Text(f"{job.layout.full_name}: {_told(job.so_far())}"),
                ):
                    yield
            else:
                yield
        finally:
            job.on_batch = theirs


def _since(before: FlushReport, report: FlushReport) -> FlushReport:
    differences: Any = (new - old for old, new in zip(before, report, strict=True))
    return FlushReport(*differences)


def _told(report: FlushReport) -> str:
    """Return a report as words; what is rare is said only when it happened."""
    words = [
        many(report.batches, "batch", "batches"),
        many(report.rows, "row"),
        f"amount {report.amount:,}",
    ]
    if report.recovered:
        words.append(f"{report.recovered:,} recovered")
    if report.duplicates_skipped:
        words.append(f"{many(report.duplicates_skipped, 'chunk')} had been written before")
    if report.dead:
        words.append(f"{many(report.dead, 'dead letter')} (see `redishacks dead`)")
    return f"{', '.join(words)} in {report.seconds:.2f} s"


def _dry_run(jobs: Sequence[FlushJob], as_json: bool) -> Exit:
    out = show.console()

    def look(job: FlushJob) -> Exit:
        begun = job.sink.begin(job.layout.columns.rules)  # what a run would stumble over
        agreed = job.layout.check(job.sink.destination(), begun.ledger)
        drive(agreed, job.counter.transport, job.counter.deadline)
        status = job.status()
        hottest = job.counter.top(_HOTTEST)
        written = {batch.id: sorted(job.sink.applied(batch.id)) for batch in status.batches}
        if as_json:
            show.print_json(
                {
                    "counter": status.counter,
                    "destination": job.sink.destination(),
                    "pending_ids": status.pending_ids,
                    "pending_amount": status.pending_amount,
                    "hottest": [
                        {**show.json_id(id if isinstance(id, bytes) else id.encode()), "amount": n}
                        for id, n in hottest
                    ],
                    "batches": [
                        {**batch._asdict(), "chunks_written": written[batch.id]}
                        for batch in status.batches
                    ],
                }
            )
            return Exit.DONE
        rows = [
            ("goes to", job.sink.destination()),
            ("pending", many(status.pending_ids, "id")),
            *((f"sum of {name}", f"{total:,}") for name, total in status.pending_amount.items()),
            *(
                (f"batch {batch.id[:8]}",
                 f"{many(batch.ids, 'id')}, claimed {show.ago(batch.age)}, "
                 f"{len(written[batch.id]):,} of {many(batch.chunks, 'chunk')} written")
                for batch in status.batches
            ),
            *(("hottest", f"{amount:,}  {show.printable(id)}") for id, amount in hottest),
        ]  # fmt: skip
        show.facts(status.counter, rows, out)
        return Exit.DONE

    return for_each(jobs, look, as_json)
