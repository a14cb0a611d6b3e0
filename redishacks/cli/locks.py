"""`redishacks locks`: who holds which lock, who waits for it, and to take one away."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import click
from rich.table import Table
from rich.text import Text

from redishacks import _keys
from redishacks._command import Command, Outcome, ask, ask_all
from redishacks._drive import drive
from redishacks._words import many
from redishacks.cli import show as shown_as
from redishacks.cli.ending import EXIT_CODES, Exit, exit_of, one_line, tell, worst
from redishacks.errors import RedisHacksError, UsageError
from redishacks.locks import Holder
from redishacks.locks._core import holders
from redishacks.locks.commands import (
    TOOL,
    Exclusive,
    Names,
    Shared,
    Waiter,
    parse_key,
    waiting,
)

T = TypeVar("T")

#: Seconds that an exchange may take.
_DEADLINE = 1.0
#: About how many keys Redis looks at in one exchange.
_PAGE = "1000"
#: How many of those in line are shown, and how many are in JSON.
_SHOWN, _TOLD = 10, 1000

#: Kinds of locks, and how the key ends that says who holds one.
_KINDS = {"lock": "lock", "semaphore": "permits", "rwlock": "rw"}

_GLOB = re.compile(r"([*?\[\]\\])")


class _Lock(NamedTuple):
    """One lock, as people know it."""

    name: str
    kind: str
    tag: str | None

    def __str__(self) -> str:
        tag = "" if self.tag is None else f", tag {shown_as.printable(self.tag)}"
        return f"{shown_as.printable(self.name)} ({self.kind}{tag})"

    def commands(self, prefix: str, most: int = 1) -> Exclusive | Shared:
        """Return what can be said about it; `most` is how many permits a semaphore has."""
        names = Names(prefix, self.name, self.tag)
        if self.kind == "lock":
            return Exclusive(names, fair=True)
        return Shared(names, _KINDS[self.kind], most=0 if self.kind == "rwlock" else most)


class _State(NamedTuple):
    """How it stands with a lock."""

    lock: _Lock
    #: Seconds since 1970, by the server's clock.
    now: float
    holders: list[Holder]
    waiting: int

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            **self.lock._asdict(),
            "holders": [holder._asdict() for holder in self.holders],
            "waiting": self.waiting,
        }

    def since(self, holder: Holder) -> str:
        """Say since when somebody holds it."""
        return shown_as.ago(max(0.0, round(self.now - holder.since, 3)))


class _At(NamedTuple):
    """Where to look: what the options say."""

    url: str
    prefix: str
    kind: str | None

    def ask(self, command: Command[T]) -> T:
        """Ask Redis."""
        from redishacks._transport import connect

        return drive(ask(command), connect(self.url), _DEADLINE)

    def look(self, locks: Sequence[_Lock]) -> list[tuple[_Lock, Outcome[_State]]]:
        """See how it stands with several, in one exchange."""
        from redishacks._transport import connect

        def command(lock: _Lock) -> Command[_State]:
            def parse(reply: list[Any]) -> _State:
                return _State(lock, reply[0] / 1e6, holders(reply), reply[1])

            return lock.commands(self.prefix).show()._replace(parse=parse)

        asked = ask_all([command(lock) for lock in locks])
        return list(zip(locks, drive(asked, connect(self.url), _DEADLINE), strict=True))

    def called(self, name: str, tag: str | None) -> list[_State]:
        """See how it stands with the locks of a name, of each kind."""
        kinds = _KINDS if self.kind is None else (self.kind,)
        locks = [_Lock(name, kind, tag) for kind in kinds]
        return [outcome.result() for _, outcome in self.look(locks)]

    def known(self, begin: str) -> Iterator[list[_Lock]]:
        """Find the locks whose names begin so: held ones, and some that are only remembered."""
        kinds = {rest: kind for kind, rest in _KINDS.items()}
        prefix = _keys.check_name(self.prefix, "prefix")
        pattern = _GLOB.sub(r"\\\1", f"{prefix}:{TOOL}:{{") + "*"
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            args = ("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE)
            cursor, keys = self.ask(Command(args, repeatable=True))
            fresh = set(keys) - seen
            found = [parsed for key in fresh if (parsed := parse_key(self.prefix, key))]
            seen |= fresh
            locks = [_Lock(name, kinds[rest], tag) for rest, name, tag in found]
            yield [
                lock
                for lock in locks
                if lock.name.startswith(begin) and self.kind in (None, lock.kind)
            ]
            if cursor == b"0":
                return


def _of_locks(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say where to look; it gets an `_At`."""

    def run(url: str, prefix: str, kind: str | None, **options: Any) -> None:
        command(_At(url, prefix, kind), **options)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line."),
        click.option("--kind", type=click.Choice(list(_KINDS)), help="Locks of this kind only."),
        click.option("--prefix", default="rh", show_default=True, help="The locks' prefix."),
        click.option("--redis", "url", metavar="URL", envvar="REDISHACKS_REDIS_URL", required=True,
                     show_envvar=True, help="Redis, as redis://, rediss:// or unix://; of a "
                     "cluster the node that has the lock."),
    ):  # fmt: skip
        run = option(run)
    return run


_TAG = click.option("--tag", help="The lock's tag, when it has one.")


@click.group()
def locks() -> None:
    """See who holds which lock and who waits for it, and take one away."""


@locks.command("list", epilog=EXIT_CODES)
@_of_locks
@click.argument("begin", metavar="[PREFIX]", default="")
@click.pass_context
def list_(ctx: click.Context, at: _At, begin: str, as_json: bool) -> None:
    """List the locks that are held; with PREFIX those whose names begin so.

    Of a lock with several holders it shows since when the first of them has it, when the last lease
    ends, and the highest fence; --json has them all. Looks through all keys of the database, a
    thousand at a time.
    """
    found: list[_State] = []
    exits = []
    for locks in at.known(begin):
        for lock, outcome in at.look(locks):
            try:
                state = outcome.result()
            except RedisHacksError as error:
                if exit_of(error) is not Exit.WRONG:
                    raise
                exits.append(tell(error, str(lock)))
                if as_json:
                    reason = {"error": one_line(error), "exit_code": exits[-1]}
                    shown_as.print_json({**lock._asdict(), **reason})
            else:
                if state.holders:
                    found.append(state)
    found.sort(key=lambda state: (state.lock.name, state.lock.kind, state.lock.tag or ""))
    if as_json:
        for state in found:
            shown_as.print_json(state.as_json())
    elif found:
        _print_table(found)
    else:
        named = f" whose name begins with {shown_as.printable(begin)}" if begin else ""
        _print(f"no lock{named} is held (prefix {shown_as.printable(at.prefix)})")
    ctx.exit(worst(exits))


@locks.command(epilog=EXIT_CODES)
@_of_locks
@click.argument("name")
@_TAG
def show(at: _At, name: str, tag: str | None, as_json: bool) -> None:
    """Show who holds the lock NAME, and who waits for it.

    Locks of several kinds may have this name: all are shown that somebody holds or waits for. Who
    died while waiting counts until its turn comes.
    """
    used = [state for state in at.called(name, tag) if state.holders or state.waiting]
    for state in used:
        commands = state.lock.commands(at.prefix)
        line = at.ask(waiting(commands, _TOLD)) if state.waiting else []
        if as_json:
            waiters = [
                {"since": waiter.since, "alone": waiter.alone or state.lock.kind == "lock"}
                for waiter in line
            ]
            shown_as.print_json({**state.as_json(), "waiters": waiters})
            continue
        rows = [(f"held by", _in_words(state, holder)) for holder in state.holders]
        rows = rows or [("held by", "nobody")]
        rows.append(("waiting", _line_in_words(state, line)))
        shown_as.facts(str(state.lock), rows, shown_as.console())
    if not used and not as_json:
        _print_nobody(at, name, tag)


@locks.command(epilog=EXIT_CODES)
@_of_locks
@click.argument("name")
@_TAG
@click.option("--force", is_flag=True, help="Do it, whoever works under the lock.")
def release(at: _At, name: str, tag: str | None, force: bool, as_json: bool) -> None:
    """Take the lock NAME away from all who hold it, of whatever kind it is.

    Needs --force, for it stops nobody: who held the lock learns that it was lost when it extends,
    renews or releases it, or in a transaction, and goes on until then, while the next in line gets
    the lock at once.
    """
    if not force:
        raise UsageError(
            f"{shown_as.printable(name)} was not released: whoever holds it would not stop, and "
            "the next one would work at the same time. See `locks show`; --force does it"
        )
    held = [state for state in at.called(name, tag) if state.holders]
    for state in held:
        # As many may come in as had it: that was allowed.
        commands = state.lock.commands(at.prefix, most=len(state.holders))
        released = at.ask(commands.release("", 0, "")) == 1
        if as_json:
            shown_as.print_json({**state.as_json(), "released": released})
            continue
        for holder in state.holders:
            what = "taken away from" if released else "just given back by"
            _print(f"{state.lock}: {what} {_who(holder)}")
    if not held and not as_json:
        _print_nobody(at, name, tag)


def _print(line: str) -> None:
    shown_as.console().print(Text(line))


def _print_nobody(at: _At, name: str, tag: str | None) -> None:
    kind = "" if at.kind is None else f" ({at.kind})"
    where = f"prefix {at.prefix}, {'no tag' if tag is None else f'tag {tag}'}"
    _print(
        f"{shown_as.printable(name)}{kind}: nobody holds it ({shown_as.printable(where)})"
    )


def _print_table(found: Sequence[_State]) -> None:
    table = Table("name", "kind", "held by", "since", "left", "fence", "waiting", box=None)
    for state in found:
        first, *others = state.holders
        for holder in state.holders:
            pass
        cells = (
            shown_as.printable(state.lock.name),
        )
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    shown_as.console().print(table)
