"""`redishacks limits`: what a key has used of its rate limits, and which keys are refused most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import click

from redishacks._words import many
from redishacks.cli import show
from redishacks.cli.ending import EXIT_CODES
from redishacks.errors import UsageError
from redishacks.ratelimit import Ban, Limit, RateLimiter, Verdict
from redishacks.ratelimit.commands import Layout

#: It never takes effect by itself: it lets `peek` and `reset` see the bans that others have made.
_NO_BAN = Ban(2**53 - 1, 1)


class _Of(NamedTuple):
    """Where to look: what the options say."""

    url: str
    prefix: str
    tag: str
    name: str

    def limiter(self) -> RateLimiter:
        """Return a limiter with the limits that the application has announced."""
        from redishacks._transport import connect

        layout = Layout(self.prefix, self.name, self.tag)
        limits = connect(self.url).call(layout.announced(), 1.0)
        if not limits:
            raise UsageError(
                f"no rate limiter {self.name!r} has been used in the last 25 hours "
                f"(prefix {self.prefix!r}); is the name right?"
            )
        return RateLimiter(
            self.url, self.name, *limits, prefix=self.prefix, tag=self.tag, deadline=1.0,
            ban=_NO_BAN,
        )  # fmt: skip


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


_PART = click.option("--part", help="The part of a mapping of keys that KEY is, such as user.")


@click.group()
def limits() -> None:
    """See what a key has used of its rate limits, and which keys are refused most."""


@limits.command(epilog=EXIT_CODES)
@_of_a_limiter
@click.argument("key", required=False)
@_PART
def status(of: _Of, key: str | None, part: str | None, as_json: bool) -> None:
    """Show the limits of the limiter NAME; with KEY what that has used, and when it frees."""
    limiter = of.limiter()
    if key is None:
        shown = [str(limit) for limit in limiter.limits]
        refused = sum(times for _, times in limiter.top(1_000))
        if as_json:
            show.print_json({"name": of.name, "limits": shown, "refused": refused})
            return
        rows = [("limit", limit) for limit in shown]
        rows.append(("refused", f"{many(refused, 'hit')} in the last 24 hours"))
        show.facts(of.name, rows, show.console())
        return
    decision = limiter.peek(key if part is None else {part: key})
    if as_json:
        show.print_json({"name": of.name, "key": key, "limits": list(map(_as_json, decision.each))})
        return
    rows = [(str(verdict.limit), _in_words(verdict)) for verdict in decision.each]
    show.facts(f"{of.name}: {show.printable(key)}", rows, show.console())


@limits.command(epilog=EXIT_CODES)
@_of_a_limiter
@click.argument("key")
@_PART
def reset(of: _Of, key: str, part: str | None, as_json: bool) -> None:
    """Forget all that KEY has used, and its bans.

    A process that has refused KEY a moment ago may repeat that for up to a second.
    """
    of.limiter().reset(key if part is None else {part: key})
    if as_json:
        show.print_json({"name": of.name, "key": key, "reset": True})
    else:
        show.console().print(f"{of.name}: {show.printable(key)} is reset", markup=False)


@limits.command(epilog=EXIT_CODES)
@_of_a_limiter
@click.option("--count", type=click.IntRange(1, 1000), default=10, show_default=True)
def top(of: _Of, count: int, as_json: bool) -> None:
    """Show the keys that were refused most in the last 24 hours."""
    found = of.limiter().top(count)
    if as_json:
        for key, times in found:
            show.print_json({"name": of.name, "key": key, "refused": times})
        return
    rows = [(f"{times:,}", show.printable(key)) for key, times in found]
    show.facts(of.name, rows or [("refused", "nobody")], show.console())


def _as_json(verdict: Verdict) -> dict[str, Any]:
    fields = verdict._asdict()
    return {**fields, "limit": str(verdict.limit)}


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
