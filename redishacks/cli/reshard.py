"""`redishacks reshard`: moves keys between the nodes of a router while clients go on."""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from redishacks import _keys
from redishacks._drive import drive
from redishacks._words import many
from redishacks.cli import show
from redishacks.cli.ending import EXIT_CODES, Exit, tell
from redishacks.cli.nodes import print_plan
from redishacks.cli.routers import Where, in_use, of_a_router
from redishacks.errors import RedisHacksError, UsageError

if TYPE_CHECKING:
    from redishacks.router import Plan, Router
    from redishacks.router._move import Progress as Moved
    from redishacks.router.health import Verdict

#: Seconds for one exchange of the scan in the end.
_SCANNING = 30.0


class _Number(click.FloatRange):
    """A number that is not nan or infinite."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{found} is not a finite number.", param, ctx)
        return found


@click.command(epilog=EXIT_CODES)
@of_a_router
@click.argument("words", metavar="[PLAN.json] [TARGET]", nargs=-1)
@click.option(
    "--rate", type=_Number(min=0, min_open=True), metavar="N", help="Keys per second, at most."
)
@click.option(
    "--drain", metavar="SECONDS", type=_Number(min=0, min_open=True), default=0.5,
    show_default=True,
    help="How long connections may take to learn of each step, before they are ended.",
)  # fmt: skip
@click.option("--take-over", is_flag=True, help="Take it over from whoever moves keys.")
@click.option("--resume", is_flag=True, help="Without a plan: end what was begun and stopped.")
@click.option("--no-verify", is_flag=True, help="Do not scan all nodes' keys in the end.")
@click.pass_context
def reshard(
    ctx: click.Context,
    where: Where,
    words: tuple[str, ...],
    rate: float | None,
    drain: float,
    take_over: bool,
    resume: bool,
    no_verify: bool,
) -> None:
    """Move keys between nodes as a plan says, while clients go on.

    \b
        redishacks nodes plan --nodes nodes.json a b c d --save plan.json
        redishacks reshard plan.json --nodes nodes.json --rate 5000
        redishacks reshard --resume --nodes nodes.json

    In the end the keys of all nodes are scanned, to see that each is where it belongs; it exits
    with 1 when one is not. Ctrl-C and SIGTERM stop it between two steps, a second Ctrl-C at once;
    keys are right in any case, and --resume goes on. Progress is shown on stderr.
    """
    from redishacks.router import Plan

    target, path = _split(where, words, resume)
    try:
        plan = Plan.load(path) if path is not None else None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    router = where.unweighted().open(target)
    in_use(router)
    err = show.console(err=True)
    if plan is not None:
        print_plan(plan, err)
    stop = _Stop()
    watch = _Watch(stop, err, plan)
    try:
        with stop, watch.shown():
            done = router.reshard(
                plan, rate=rate, drain=drain, take_over=take_over, on_progress=watch
            )
    except (KeyboardInterrupt, RedisHacksError) as error:
        if isinstance(error, KeyboardInterrupt):
            click.echo(f"redishacks: stopped{watch.so_far()}", err=True)
            code = stop.exit_code
        else:
            code = tell(error)
        if not isinstance(error, UsageError) and (watch.begun or isinstance(error, Exception)):
            watch.say_how_to_go_on(where.again(target))
        ctx.exit(code)
    out = show.console()
    out.print(Text(f"done: {many(done.moved, 'key')} moved"))
    if not no_verify:
        ctx.exit(_verify(router, out, err))


def _split(where: Where, words: tuple[str, ...], resume: bool) -> tuple[str | None, str | None]:
    """Return TARGET and the plan's file; of two words, the file is the one that is there."""
    given = list(words)
    path = None
    if not resume:
        if not given:
            raise click.UsageError("give a plan (`redishacks nodes plan … --save`), or --resume")
        path = given.pop(1 if len(given) > 1 and not os.path.isfile(given[0]) else 0)
        if not os.path.isfile(path):
            raise click.UsageError(f"there is no file {path}")
    target, rest = where.split(given)
    if rest:
        why = "with --resume no plan" if resume else "one plan, and one TARGET, --nodes or --redis"
        raise click.UsageError(f"what is {' '.join(rest)}? It takes {why}")
    return target, path


# Watching


class _Stop:
    """Whether somebody has asked us to end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self._by: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def __exit__(self, *about: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self._by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._by = number

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._by is not None

    @property
    def exit_code(self) -> int:
        """The shell's for the signal."""
        return 128 + self._by if self._by is not None else Exit.INTERRUPTED


class _Watch:
    """Shows how far a move has come, and ends it when that was asked for."""

    def __init__(self, stop: _Stop, err: Console, plan: Plan | None) -> None:
        self.begun = False
        self._stop, self._err = stop, err
        self._total = plan.keys if plan is not None else None
        self._bar: Progress | None = None
        self._last: Moved | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show a bar on a terminal, and else a line for each state."""
        if not self._err.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self._err, transient=True) as self._bar:
            self._bar.add_task("", total=self._total, done="")
            yield

    def __call__(self, moved: Moved) -> None:
        """Take note of progress; leaves when told to, once keys are served again."""
        from redishacks.router.topology import TRANSIT

        self.begun = True
        before = self._last.state if self._last is not None else None
        self._last = moved
        if self._bar is not None:
            (task,) = self._bar.task_ids
            # The total is an estimate: a bar does not go beyond its end.
            total = max(self._total, moved.moved) if self._total is not None else None
            self._bar.update(
                task, description=moved.state, completed=moved.moved, total=total,
                done=f"{many(moved.moved, 'key')} moved",
            )  # fmt: skip
        elif moved.state != before:
            self._err.print(Text(moved.state))
        if self._stop.asked and moved.state == TRANSIT:
            raise KeyboardInterrupt

    def say_how_to_go_on(self, again: str) -> None:
        """Say what becomes of clients meanwhile, and how it is brought to its end."""
        from redishacks.router.topology import CLOSING

        what = "clients go on, and keys that are to move do so when they are asked for"
        if self._last is None:
            what = (
                "if it has begun (`redishacks nodes status` tells), it must be brought to its end"
            )
        elif self._last.state == CLOSING:
            what = "commands for keys that are to move wait, and fail, until it goes on"
        click.echo(f"{what}; go on by\n  redishacks reshard --resume {again}", err=True)

    def so_far(self) -> str:
        """Say what was done."""
        if self._last is None:
            return ""
        return f" in {self._last.state}: {many(self._last.moved, 'key')} moved"


# Looking again


def _verify(router: Router, out: Console, err: Console) -> Exit:
    from redishacks.router.health import verify

    with contextlib.ExitStack() as stack:
        on_progress = None
        if err.is_terminal:
            columns = (TextColumn("looking at all keys: {task.completed:,.0f}"),)
            bar = stack.enter_context(Progress(*columns, console=err, transient=True))
            task = bar.add_task("", total=None)

            def on_progress(looked: int) -> None:
                bar.update(task, completed=looked)

        steps = verify(router._nodes(), on_progress)
        found = drive(steps, router.redishacks_transport, _SCANNING)
    for verdict in found:
        out.print(Text(_told(verdict), style="bold red" if verdict.wrong else ""))
    return Exit.WRONG if any(verdict.wrong for verdict in found) else Exit.DONE


def _told(verdict: Verdict) -> str:
    if not verdict.wrong:
        return f"node {verdict.node}: {many(verdict.keys, 'key')}, each where it belongs"
    named = ", ".join(show.printable(_keys.id_shown(key)) for key in verdict.named)
    return (
        f"node {verdict.node}: {verdict.wrong:,} of {many(verdict.keys, 'key')} belong elsewhere, "
        f"such as {named}"
    )
