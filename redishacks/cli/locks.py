"""`redishacks locks`: who holds which lock, who waits for it, and to take one away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import click
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from redishacks import _keys
from redishacks._command import Command, Outcome, ask, ask_all
from redishacks._drive import drive
from redishacks._words import many
from redishacks.cli import show
from redishacks.cli.ending import EXIT_CODES, Exit, exit_of, one_line, tell, worst
from redishacks.errors import RedisHacksError, UsageError
from redishacks.locks import Holder
from redishacks.locks.commands import (
    TOOL,
    Exclusive,
    Names,
    Shared,
    Waiter,
    holders,
    parse_key,
    waiting,
)

T = TypeVar("T")

#: Seconds that an exchange may take.
_DEADLINE = 1.0
#: About how many keys Redis looks at in one exchange.
_PAGE = "1000"
#: How many of those in line are shown, and how many in JSON.
_SHOWN, _TOLD = 10, 1000

#: Kinds of locks, and how the key ends that says who holds one.
_KINDS = {"lock": "lock", "semaphore": "permits", "rwlock": "rw"}

_HEAD = ("name", "kind", "held by", "for", "left", "fence", "waiting")


class _Lock(NamedTuple):
    """One lock, as people know it."""

    name: str
    kind: str
    tag: str | None

    def __str__(self) -> str:
        tag = "" if self.tag is None else f", tag {show.printable(self.tag)}"
        return f"{show.printable(self.name)} ({self.kind}{tag})"

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


def _state(lock: _Lock, reply: list[Any]) -> _State:
    return _State(lock, reply[0] / 1e6, holders(reply), reply[1])


class _At(NamedTuple):
    """Where to look: what the options say."""

    url: str
    prefix: str
    kind: str | None

    def ask(self, command: Command[T]) -> T:
        """Ask Redis."""
        from redishacks._transport import connect

        return drive(ask(command), connect(self.url), _DEADLINE)

    def look(self, locks: Sequence[_Lock]) -> list[tuple[_Lock, Outcome[list[Any]]]]:
        """See how it stands with several, in one exchange."""
        from redishacks._transport import connect

        asked = ask_all([lock.commands(self.prefix).show() for lock in locks])
        return list(zip(locks, drive(asked, connect(self.url), _DEADLINE), strict=True))

    def called(self, name: str, tag: str | None) -> list[_State]:
        """See how it stands with the locks of a name, of each kind."""
        kinds = _KINDS if self.kind is None else (self.kind,)
        locks = [_Lock(name, kind, tag) for kind in kinds]
        return [_state(lock, outcome.result()) for lock, outcome in self.look(locks)]

    def known(self, begin: str) -> Iterator[list[_Lock]]:
        """Find the locks whose names begin so: held ones, and some that are only remembered."""
        kinds = {rest: kind for kind, rest in _KINDS.items()}
        prefix = _keys.check_name(self.prefix, "prefix")
        pattern = _keys.literal(f"{prefix}:{TOOL}:{{") + "*"
        seen: set[bytes] = set()
        cursor = b"0"
        while True:
            args = ("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE)
            page: tuple[bytes, list[bytes]] = self.ask(Command(args, repeatable=True))
            cursor, keys = page
            locks = []
            for key in set(keys) - seen:
                rest, name, tag = parse_key(self.prefix, key) or ("", "", None)
                if rest and name.startswith(begin) and self.kind in (None, kinds[rest]):
                    locks.append(_Lock(name, kinds[rest], tag))
            seen.update(keys)
            yield locks
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
                     show_envvar=True, help="Redis, as redis://, rediss:// or unix://; a URL is "
                     "one server, so of a cluster the node that has the lock."),
    ):  # fmt: skip
        run = option(run)
    return run


_TAG = click.option("--tag", help="The lock's tag, when it has one.")


@click.group()
def locks() -> None:
    """See who holds which lock and who waits for it, and take one away."""


@locks.command("list", epilog=EXIT_CODES)
@_of_locks
@click.argument("begin", metavar="[BEGIN]", default="")
@click.pass_context
def list_(ctx: click.Context, at: _At, begin: str, as_json: bool) -> None:
    """List the locks that are held; with BEGIN those whose names begin so.

    It shows who has it and for how long, how much is left of the lease, the fence, and how many
    wait. Of several holders: since the first, until the last, and the highest fence; --json has
    each of them. Looks through all keys of the database, a thousand at a time.
    """
    found: list[_State] = []
    exits = []
    for locks in at.known(begin):
        for lock, outcome in at.look(locks):
            try:
                state = _state(lock, outcome.result())
            except RedisHacksError as error:
                if exit_of(error) is not Exit.WRONG:
                    raise
                exits.append(tell(error, str(lock)))
                if as_json:
                    reason = {"error": one_line(error), "exit_code": exits[-1]}
                    show.print_json({**lock._asdict(), **reason})
            else:
                if state.holders:
                    found.append(state)
    found.sort(key=lambda state: (state.lock.name, state.lock.kind, state.lock.tag or ""))
    if as_json:
        for state in found:
            show.print_json(state.as_json())
    elif found:
        _print_table(found)
    else:
        named = f" whose name begins with {show.printable(begin)}" if begin else ""
        _print(f"no lock{named} is held (prefix {show.printable(at.prefix)})")
    ctx.exit(worst(exits))


@locks.command("show", epilog=EXIT_CODES)
@_of_locks
@click.argument("name")
@_TAG
def show_(at: _At, name: str, tag: str | None, as_json: bool) -> None:
    """Show who holds the lock NAME, and who waits for it.

    Locks of several kinds may have this name: all are shown that somebody holds or waits for. One
    who died while waiting counts until its turn comes.
    """
    used = [state for state in at.called(name, tag) if state.holders or state.waiting]
    for state in used:
        line = at.ask(waiting(state.lock.commands(at.prefix), _TOLD))
        if as_json:
            show.print_json({**state.as_json(), "line": [waiter._asdict() for waiter in line]})
            continue
        rows = [("held by", _in_words(state, holder)) for holder in state.holders]
        rows = rows or [("held by", "nobody")]
        rows.append(("waiting", _waiting(state, line)))
        show.facts(str(state.lock), rows, show.console())
    if not used and not as_json:
        _print_nobody(at, name, tag)


@locks.command(epilog=EXIT_CODES)
@_of_locks
@click.argument("name")
@_TAG
@click.option("--force", is_flag=True, help="Do it, whoever works under the lock.")
def release(at: _At, name: str, tag: str | None, force: bool, as_json: bool) -> None:
    """Take the lock NAME away from all who hold it.

    Needs --force, for it stops nobody: the next in line gets the lock at once, and who had it works
    on until it extends, renews or releases it, or ends a transaction, and learns that it is lost.

    Locks of several kinds may have this name: all are taken away, or those of --kind.
    """
    if not force:
        raise UsageError(
            f"{show.printable(name)} is not released: whoever holds it would not stop, and the "
            "next one would work at the same time; --force does it all the same"
        )
    held = [state for state in at.called(name, tag) if state.holders]
    for state in held:
        # As many may come in as had it: so many were let in before.
        commands = state.lock.commands(at.prefix, most=len(state.holders))
        released = at.ask(commands.release("", 0, "")) == 1
        if as_json:
            show.print_json({**state.as_json(), "released": released})
            continue
        what = "taken away from" if released else "was just given back by"
        for holder in state.holders:
            _print(f"{state.lock}: {what} {_who(holder)}")
    if not held and not as_json:
        _print_nobody(at, name, tag)


def _print(line: str) -> None:
    show.console().print(Text(line))


def _print_nobody(at: _At, name: str, tag: str | None) -> None:
    where = f"prefix {at.prefix}, {'no tag' if tag is None else f'tag {tag}'}"
    where += "" if at.kind is None else f", {at.kind}"
    _print(f"{show.printable(name)}: nobody holds it ({show.printable(where)})")


def _print_table(found: Sequence[_State]) -> None:
    rows = [_HEAD, *map(_cells, found)]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(set_cell_size(*cell) for cell in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    # rich's own table takes a second for a thousand rows
    show.console().print(Text(lines[0], style="bold"), soft_wrap=True)
    show.console().print(Text("\n".join(lines[1:])), soft_wrap=True)


def _cells(state: _State) -> tuple[str, ...]:
    first = min(state.holders, key=lambda holder: holder.since)
    last = max(state.holders, key=lambda holder: holder.remaining)
    tag = "" if state.lock.tag is None else f", tag {show.printable(state.lock.tag)}"
    return (
        show.printable(state.lock.name), f"{state.lock.kind}{tag}",
        _who(first) if len(state.holders) == 1 else many(len(state.holders), "holder"),
        _duration(state.now - first.since), _duration(last.remaining),
        str(max(holder.fence for holder in state.holders)), f"{state.waiting:,}",
    )  # fmt: skip


def _who(holder: Holder) -> str:
    """Say who holds it; one to whom it was handed over has not said yet who it is."""
    return show.printable(str(holder))


def _duration(seconds: float) -> str:
    return show.duration(max(0.0, round(seconds, 3)))


def _in_words(state: _State, holder: Holder) -> str:
    return (
        f"{_who(holder)}; for {_duration(state.now - holder.since)}, "
        f"{_duration(holder.remaining)} left, fence {holder.fence}"
    )


def _waiting(state: _State, line: Sequence[Waiter]) -> str:
    if not line:
        return "nobody"
    shown = []
    for waiter in line[:_SHOWN]:
        purpose = "" if state.lock.kind != "rwlock" else " to write" if waiter.alone else " to read"
        shown.append(f"{_duration(state.now - waiter.since)}{purpose}")
    more = state.waiting - len(shown)
    shown += [f"and {more:,} more"] if more > 0 else []
    return f"{state.waiting:,}, for {', '.join(shown)}"
