"""How a command ends: every foreseeable error is a line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from redishacks.cli import show
from redishacks.counters import FlushJob
from redishacks.errors import (
    MaybeAppliedError,
    RedisHacksError,
    SchemaError,
    ServerError,
    UnavailableError,
    UsageError,
)

J = TypeVar("J")


class Exit(enum.IntEnum):
    """Exit codes; 75 and 78 are those of sysexits.h."""

    DONE = 0
    WRONG = 1
    USAGE = 2
    TRY_LATER = 75
    CONFIGURATION = 78
    INTERRUPTED = 130


EXIT_CODES = """\
\b
Exit codes:
  0    done
  1    something is wrong, and the output says what
  2    usage: an option, the TARGET, or a job that does not fit its counter
  75   try later: Redis or the database is away, or refuses our credentials; nothing is lost
  78   the database lacks a table, a column or a grant; the message shows the DDL
  130  interrupted by Ctrl-C; 143 by SIGTERM (demo, reshard; a flush finishes its batch and is done)
With several jobs the worst of these counts: 2, 78, 1, 75, 0.
"""

_BY_WEIGHT = [Exit.DONE, Exit.TRY_LATER, Exit.WRONG, Exit.CONFIGURATION, Exit.USAGE]

_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^\s@]*@|(password=)('[^']*'|[^\s&]*)", re.IGNORECASE)


def masked(text: str) -> str:
    """Return text without passwords: of URLs and of `password=…`; for what others have worded."""
    return _PASSWORD.sub(lambda found: f"{found[1]}***@" if found[1] else f"{found[2]}***", text)


def exit_of(error: RedisHacksError) -> Exit:
    """Return the exit code that an error means."""
    if isinstance(error, SchemaError) or (
        isinstance(error, ServerError) and error.code == "NOPERM"
    ):
        return Exit.CONFIGURATION
    if isinstance(error, UnavailableError | MaybeAppliedError):
        return Exit.TRY_LATER
    return Exit.USAGE if isinstance(error, UsageError) else Exit.WRONG


def one_line(error: Exception) -> str:
    """Return an error's message as one line, without secrets."""
    return masked(" ".join(str(error).split()))


def tell(error: RedisHacksError, about: str = "") -> Exit:
    """Say an error on stderr, with the DDL where that mends it; return its exit code."""
    click.echo(f"redishacks: {f'{about}: ' if about else ''}{one_line(error)}", err=True)
    if isinstance(error, SchemaError) and error.ddl:
        click.echo(f"\n{error.ddl.strip()}\n", err=True)
    return exit_of(error)


def worst(exits: Iterable[Exit]) -> Exit:
    """Return the exit code that needs most attention."""
    return max(exits, key=_BY_WEIGHT.index, default=Exit.DONE)


def for_each(jobs: Sequence[J], action: Callable[[J], Exit], as_json: bool) -> Exit:
    """Do the same with every job, whatever becomes of the others; return the worst exit code.

    With JSON, an error also takes the place of the object that the action would have printed.
    """
    exits = []
    for job in jobs:
        try:
            exits.append(action(job))
        except RedisHacksError as error:
            name = job.layout.full_name if isinstance(job, FlushJob) else "router"
            exits.append(tell(error, name))
            if as_json:
                reason = {"counter": name, "error": one_line(error), "exit_code": exits[-1]}
                show.print_json(reason)
        except show.OutputError:
            raise  # nobody reads, or the disk is full: the next job could not be shown either
        except Exception:  # of a sink or a callback of the user's own
            click.echo(masked(traceback.format_exc()), err=True)
            exits.append(Exit.WRONG)
    return worst(exits)


class Commands(click.Group):
    """The group of all commands, which ends each of them by the same rules."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; when the output cannot be written, that is a line on stderr.

        A reader that has gone, as `head` does, is no error to tell: click ends quietly then.
        """
        try:
            return super().main(*args, **kwargs)
        except show.OutputError as error:
            with contextlib.suppress(OSError):
                click.echo(f"redishacks: cannot write the output: {error.strerror}", err=True)
            _forget_output()
            sys.exit(Exit.WRONG)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except RedisHacksError as error:
            ctx.exit(tell(error))
        except KeyboardInterrupt:
            ctx.exit(Exit.INTERRUPTED)


def _forget_output() -> None:
    """Let what is still buffered go nowhere: Python would fail on it again when it exits."""
    with open(os.devnull, "wb") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
