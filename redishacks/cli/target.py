"""Where the jobs of a command come from: `module:attribute`, or flags that describe one job."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from redishacks.cli.ending import one_line
from redishacks.counters import BufferedCounter, FlushJob
from redishacks.errors import UsageError
from redishacks.sinks import from_url

_HELP = """\
TARGET is module:attribute, a FlushJob or a list of them, importable from here. Instead of it the
flags --redis, --counter, --sql, --table, --key and --column describe one job; a URL is one server;
for a cluster use a TARGET.
"""

_FLAGS = [
    click.option(
        "--redis", "redis_url", metavar="URL", envvar="REDISHACKS_REDIS_URL", show_envvar=True,
        help="Redis, as redis://, rediss:// or unix://; a URL is one server; for a cluster use a "
        "TARGET.",
    ),
    click.option("--counter", metavar="NAME", help="Name of the counter, with one sum."),
    click.option(
        "--sql", "sql_url", metavar="URL", envvar="REDISHACKS_SQL_URL", show_envvar=True,
        help="sqlite:///file.db or postgresql://…; in the environment it is not seen in `ps`.",
    ),
    click.option("--table", metavar="T", help="Table, or schema.table."),
    click.option("--key", metavar="COL", help="Column that holds the ids."),
    click.option("--column", metavar="C", help="Column that the counts are added to."),
    click.option(
        "--mode", type=click.Choice(["upsert", "update"]),
        help="Insert missing rows (the default), or only change those that exist.",
    ),
]  # fmt: skip


_OR_ROUTERS = """\
TARGET is module:attribute, a FlushJob, a Router or AsyncRouter, or a list of them, importable from
here. Instead of it the flags --redis, --counter, --sql, --table, --key and --column describe one
job; a URL is one server; for a cluster use a TARGET.
"""


def with_jobs(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command TARGET and the flags; it is called with the list of jobs."""
    return _with(command, _from_module, _HELP)


def with_jobs_or_routers(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a command that takes routers as well, among the jobs."""
    return _with(command, lambda target: _from_module(target, routers=True), _OR_ROUTERS)


def _with(
    command: Callable[..., Any], found: Callable[[str], list[Any]], help: str
) -> Callable[..., Any]:
    @functools.wraps(command)
    @click.pass_context
    def wrapped(ctx: click.Context, /, *, target: str | None, **options: Any) -> Any:
        flags = {
            name: options.pop(name)
            for name in ("redis_url", "counter", "sql_url", "table", "key", "column", "mode")
        }
        if target is None:
            jobs = [_from_flags(**flags)]
        else:
            typed = [
                name
                for name in flags
                if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
            ]
            if typed:
                raise click.UsageError("give a TARGET or the flags that describe a job, not both")
            jobs = found(target)
        return command(jobs=jobs, **options)

    for option in reversed(_FLAGS):
        wrapped = option(wrapped)
    wrapped.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{help}"
    return click.argument("target", required=False)(wrapped)


def _from_flags(
    redis_url: str | None,
    counter: str | None,
    sql_url: str | None,
    table: str | None,
    key: str | None,
    column: str | None,
    mode: str | None,
) -> FlushJob:
    if not (redis_url and counter and sql_url and table and key and column):
        given = {
            "--redis": redis_url, "--counter": counter, "--sql": sql_url,
            "--table": table, "--key": key, "--column": column,
        }  # fmt: skip
        missing = ", ".join(flag for flag, value in given.items() if not value)
        raise click.UsageError(
            f"give a TARGET (module:attribute), or all flags of a job; missing: {missing}"
        )
    schema, dot, name = table.rpartition(".")
    sink = from_url(
        sql_url,
        table=(schema, name) if dot else table,
        key=key,
        columns={"amount": column},
        mode=mode or "upsert",
    )
    return FlushJob(BufferedCounter(redis_url, counter), sink)


def found_at(target: str, such_as: str) -> Any:
    """Return what a TARGET names; raises `UsageError` for what is not there."""
    if "://" in target:
        raise UsageError(f"TARGET must be module:attribute, such as {such_as}, and this is a URL")
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"TARGET must be module:attribute, such as {such_as}: {target}")
    found: Any = _imported(module_name)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UsageError(f"TARGET {target}: {module_name} has no {attribute}") from None
    return found


def _from_module(target: str, *, routers: bool = False) -> list[Any]:
    found = found_at(target, "myapp.counters:jobs")
    jobs = list(found) if isinstance(found, list | tuple) else [found]
    for at, job in enumerate(jobs):
        if isinstance(job, FlushJob):
            continue
        if routers and hasattr(job, "redishacks_transport"):
            from redishacks.cli.routers import as_router

            jobs[at] = as_router(job, f"TARGET {target}")
            continue
        kinds = "a FlushJob, a Router" if routers else "a FlushJob"
        raise UsageError(
            f"TARGET {target} must be {kinds} or a list of them, and holds a {type(job).__name__}"
        )
    if not jobs:
        raise UsageError(f"TARGET {target} is an empty list")
    return jobs


def _imported(name: str) -> Any:
    # As with `python -m`: what lies in the current directory can be imported.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"TARGET: there is no module {error.name} here") from None
        at = _blamed(error)
        raise UsageError(
            f"TARGET: importing {name} failed in {at.filename}, line {at.lineno}: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _blamed(error: Exception) -> traceback.FrameSummary:
    """Return the last line that is not ours: we refuse what is wrong in the one that called us."""
    ours = Path(__file__).resolve().parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    return next(
        frame for frame in reversed(frames) if ours not in Path(frame.filename).resolve().parents
    )
