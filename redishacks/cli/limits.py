"""`redishacks limits`: what a key has used of its rate limits, and which keys are refused most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import click

from redishacks._command import Steps, ask
from redishacks._drive import drive
from redishacks._words import many
from redishacks.cli import show
from redishacks.cli.ending import EXIT_CODES
from redishacks.errors import UsageError
from redishacks.ratelimit import Ban, Limit, Verdict
from redishacks.ratelimit._core import top_steps, verdicts
from redishacks.ratelimit.commands import MOST_REMEMBERED, Layout, Question

T = TypeVar("T")

#: Seconds that an exchange may take.
_DEADLINE = 1.0

#: It never takes effect by itself: it lets us see, and end, the bans that others have made.
_NO_BAN = Ban(2**53 - 1, 1, longest=366 * 86_400)


class _Of(NamedTuple):
    """Where to look: what the options say."""

    url: str
    prefix: str
    tag: str
    name: str

    @property
    def layout(self) -> Layout:
        """The limiter's keys and commands."""
        return Layout(self.prefix, self.name, self.tag)

    def run(self, steps: Steps[T]) -> T:
        """Talk to Redis."""
        from redishacks._transport import connect

        return drive(steps, connect(self.url), _DEADLINE)

    def limits(self) -> list[Limit]:
        """Return the limits that the application has announced."""
        limits = self.run(ask(self.layout.announced()))
        if not limits:
            raise UsageError(
                f"no rate limiter {self.name!r} has been used in the last 25 hours "
                f"(prefix {self.prefix!r}); is the name right?"
            )
        return limits

    def questions(self, key: str, part: str | None) -> list[Question]:
        """Return what to ask about a key: of a part of keys, or as it is and of each named part."""
        limits = self.limits()
        names = {limit.name: None for limit in limits if limit.name is not None}
        if part is not None:
            names = {part: None}
        questions = [self.layout.question(key, limits, 1, _NO_BAN)] if part is None else []
        for name in names:
            chosen = [limit for limit in limits if limit.name in (None, name)]
            questions.append(self.layout.question({name: key}, chosen, 1, _NO_BAN))
        return questions

    def verdicts(self, key: str, part: str | None) -> list[Verdict]:
        """Return what the limits say of a key: those that count it, or all when none does."""
        found: list[Verdict] = []
        for question in self.questions(key, part):
            reply = self.run(ask(self.layout.decide(question, "peek")))
            found += verdicts(question, reply)
        # A limit with a name may count plain keys, too; it rarely does.
        used = [each for each in found if each.reset_after]
        return used or [
            each
            for each in found
            if part is not None or (isinstance(each.limit, Limit) and each.part == each.limit.name)
        ]


def _of_a_limiter(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say where to look; it gets an `_Of`."""

    def run(url: str, prefix: str, tag: str, name: str, **options: Any) -> None:
        command(_Of(url, prefix, tag, name), **options)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line."),
        click.option("--tag", type=click.Choice(["key", "name"]), default="key", show_default=True,
                     help="The limiter's tag."),
        click.option("--prefix", default="rh", show_default=True, help="The limiter's prefix."),
        click.option("--redis", "url", metavar="URL", envvar="REDISHACKS_REDIS_URL", required=True,
                     show_envvar=True, help="Redis, as redis://, rediss:// or unix://."),
        click.argument("name"),
    ):  # fmt: skip
        run = option(run)
    return run


_PART = click.option(
    "--part", help="The part of a mapping of keys that KEY is, such as user; by default any."
)


@click.group()
def limits() -> None:
    """See what a key has used of its rate limits, and which keys are refused most."""


@limits.command(epilog=EXIT_CODES)
@_of_a_limiter
@click.argument("key", required=False)
@_PART
def status(of: _Of, key: str | None, part: str | None, as_json: bool) -> None:
    """Show the limits of the limiter NAME; with KEY what that has used, and when it frees."""
    if key is None:
        shown = [_named(limit) for limit in of.limits()]
        refused = sum(times for _, times in of.run(top_steps(of.layout, MOST_REMEMBERED)))
        if as_json:
            show.print_json({"name": of.name, "limits": shown, "refused": refused})
            return
        rows = [("limit", limit) for limit in shown]
        rows.append(("refused", f"{many(refused, 'hit')} in the last 24 hours"))
        show.facts(of.name, rows, show.console())
        return
    found = of.verdicts(key, part)
    if as_json:
        show.print_json({"name": of.name, "key": key, "limits": list(map(_as_json, found))})
        return
    rows = [(_shown(verdict), _in_words(verdict)) for verdict in found]
    show.facts(f"{of.name}: {show.printable(key)}", rows or [("limit", "none")], show.console())


@limits.command(epilog=EXIT_CODES)
@_of_a_limiter
@click.argument("key")
@_PART
def reset(of: _Of, key: str, part: str | None, as_json: bool) -> None:
    """Forget all that KEY has used, and its bans.

    A process that has refused KEY a moment ago may repeat that for up to a second.
    """
    for question in of.questions(key, part):
        of.run(ask(of.layout.forget(question)))
    if as_json:
        show.print_json({"name": of.name, "key": key, "reset": True})
    else:
        show.console().print(f"{of.name}: {show.printable(key)} is reset", markup=False)


@limits.command(epilog=EXIT_CODES)
@_of_a_limiter
@click.option("--count", type=click.IntRange(1, 1000), default=10, show_default=True)
def top(of: _Of, count: int, as_json: bool) -> None:
    """Show the keys that were refused most in the last 24 hours."""
    of.limits()
    found = of.run(top_steps(of.layout, count))
    if as_json:
        for key, times in found:
            shown = {"key": key} if isinstance(key, str) else {"key_hex": key.hex()}
            show.print_json({"name": of.name, **shown, "refused": times})
        return
    rows = [(f"{times:,}", show.printable(key)) for key, times in found]
    show.facts(of.name, rows or [("refused", "nobody")], show.console())


def _named(limit: Limit) -> str:
    return str(limit) if limit.name is None else f"{limit.name}: {limit}"


def _shown(verdict: Verdict) -> str:
    limit = verdict.limit if isinstance(verdict.limit, Limit) else "ban"
    return f"{limit}" if verdict.part is None else f"{verdict.part}: {limit}"


def _as_json(verdict: Verdict) -> dict[str, Any]:
    limit = verdict.limit if isinstance(verdict.limit, Limit) else "ban"
    return {**verdict._asdict(), "limit": str(limit)}


def _in_words(verdict: Verdict) -> str:
    if not isinstance(verdict.limit, Limit):
        return f"banned for {show.duration(verdict.reset_after)}"
    used = verdict.limit.most - verdict.remaining
    if not verdict.reset_after:
        return "nothing used"
    return (
        f"{used:,} of {verdict.limit.most:,} used, the next place frees in "
        f"{show.duration(verdict.next_after)}, all in {show.duration(verdict.reset_after)}"
    )
