"""`redishacks status`, `doctor` and `dead`: how things stand."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

from redishacks import _keys
from redishacks._words import many
from redishacks.cli import show
from redishacks.cli.ending import EXIT_CODES, Exit, for_each, masked
from redishacks.cli.routers import title_of
from redishacks.cli.target import with_jobs, with_jobs_or_routers
from redishacks.counters import CounterStatus, FlushJob
from redishacks.doctor import Finding, Level, examine, examine_router

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")


# status

_ELSEWHERE = "bound to another destination or ledger: a flush by this job is refused (see doctor)"


@click.command(epilog=EXIT_CODES)
@with_jobs
@_as_json
@click.pass_context
def status(ctx: click.Context, jobs: list[FlushJob], as_json: bool) -> None:
    """Show what is pending, in flight and dead, per counter.

    "Oldest" is the age of the oldest hit that is not in SQL. Changes nothing.
    """
    out = show.console()

    def look(job: FlushJob) -> Exit:
        found = job.status()
        if as_json:
            batches = [batch._asdict() for batch in found.batches]
            show.print_json({**found._asdict(), "batches": batches})
        else:
            show.facts(found.counter, _status_rows(found), out)
        return Exit.DONE

    ctx.exit(for_each(jobs, look, as_json))


def _status_rows(found: CounterStatus) -> list[tuple[str, str]]:
    return [
        *([] if found.known else [("note", "nobody has counted here yet; is the name right?")]),
        *([("note", _ELSEWHERE)] if found.elsewhere else []),
        ("pending", many(found.pending_ids, "id")),
        *((f"sum of {name}", f"{total:,}") for name, total in found.pending_amount.items()),
        ("oldest", show.ago(found.oldest, "nothing waits")),
        ("in flight", many(len(found.batches), "batch", "batches") if found.batches else "none"),
        *(
            (f"batch {batch.id[:8]}", f"{many(batch.ids, 'id')}, claimed {show.ago(batch.age)}")
            for batch in found.batches
        ),
        ("last flush", show.ago(found.last_flush)),
        ("dead letters", f"{found.dead:,}"),
    ]


# doctor

_SIGNS = {
    Level.FINE: ("ok     ", "green"),
    Level.WARNING: ("warning", "yellow"),
    Level.WRONG: ("WRONG  ", "bold red"),
    Level.UNKNOWN: ("unknown", "magenta"),
}


@click.command(epilog=EXIT_CODES)
@with_jobs_or_routers
@_as_json
@click.pass_context
def doctor(ctx: click.Context, jobs: list[Any], as_json: bool) -> None:
    """Check what would hurt, and say why and what to do.

    Looked at: eviction, persistence and version of Redis, hits and batches that wait for over ten
    minutes, dead letters, tables and grants in SQL, and a client that repeats commands; where there
    are time series, whether Redis may evict them or keeps them at a waste. Of a router's nodes:
    eviction, persistence, versions, what our user may say, whether all agree on who has which keys,
    and how evenly those are spread. Exits with 1 when something is wrong (a warning is not), with
    75 when it could not look. Changes nothing.

    \b
        redishacks doctor myapp.redis:router
    """
    out = show.console()

    def look(job: Any) -> Exit:
        if isinstance(job, FlushJob):
            kind, name, findings = "counter", job.layout.full_name, examine(job)
        else:
            kind, name, findings = "router", title_of(job), examine_router(job)
        if as_json:
            shown = [{k: masked(v) for k, v in f._asdict().items()} for f in findings]
            show.print_json({kind: name, "findings": shown})
        else:
            out.print(Text(name, style="bold"))
            for finding in findings:
                out.print(_paragraph(finding))
        levels = {finding.level for finding in findings}
        if Level.WRONG in levels:
            return Exit.WRONG
        return Exit.TRY_LATER if Level.UNKNOWN in levels else Exit.DONE

    ctx.exit(for_each(jobs, look, as_json))


def _paragraph(finding: Finding) -> Text:
    sign, style = _SIGNS[finding.level]
    text = Text("  ").append(sign, style=style)
    text.append(f"  {finding.check}: {masked(finding.what)}")
    for label, value in (("why:", finding.why), ("do:", finding.do)):
        for number, line in enumerate(value.splitlines()):
            text.append(f"\n           {'' if number else label:4} {line}")
    return text


# dead


@click.command(epilog=EXIT_CODES)
@with_jobs
@click.option("--retry", is_flag=True, help="Apply them again, each exactly once.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True)
@_as_json
@click.pass_context
def dead(ctx: click.Context, jobs: list[FlushJob], retry: bool, limit: int, as_json: bool) -> None:
    """List amounts that were refused, or apply them again.

    These are the dead letters: what the database would not take, with its reasons. With --retry it
    exits with 1 when some were refused again; they stay listed.
    """
    out = show.console()

    def apply_again(job: FlushJob) -> Exit:
        name = job.layout.full_name
        done = job.sink.retry(name, job.layout.columns.rules)
        if as_json:
            show.print_json({"counter": name, **done._asdict()})
        else:
            out.print(Text(f"{name}: {done.applied:,} applied, {done.refused:,} refused again"))
        return Exit.WRONG if done.refused else Exit.DONE

    def show_them(job: FlushJob) -> Exit:
        name = job.layout.full_name
        letters = job.sink.dead(name, limit)
        if as_json:
            for letter in letters:
                fields = letter._asdict()
                id = show.json_id(fields.pop("id"))
                show.print_json({**fields, **id})
            return Exit.DONE
        table = Table("number", "at", "id", "column", "amount", "reason", box=None)
        for letter in letters:
            cells = (
                str(letter.number), f"{letter.at:%Y-%m-%d %H:%M:%S}",
                show.printable(_keys.id_shown(letter.id)), letter.column,
                str(letter.amount), show.printable(letter.reason),
            )  # fmt: skip
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
        total = job.sink.dead_count(name)
        out.print(Text(f"{name}: {many(total, 'dead letter')}", style="bold"))
        if letters:
            out.print(table)
        if total > len(letters):
            out.print(Text(f"the oldest {len(letters):,} are shown (--limit)"))
        return Exit.DONE

    ctx.exit(for_each(jobs, apply_again if retry else show_them, as_json))
