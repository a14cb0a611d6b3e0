"""`redishacks nodes`: how a router's nodes are, where keys are, what a change would move."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from redishacks import _keys
from redishacks._words import many
from redishacks.cli import show
from redishacks.cli.ending import EXIT_CODES, Exit, exit_of, one_line, worst
from redishacks.cli.routers import Where, ask_nodes, in_use, look_at, of_a_router
from redishacks.errors import UsageError

if TYPE_CHECKING:
    from redishacks.router import Plan, Router
    from redishacks.router.balance import Balance
    from redishacks.router.health import NodeState, Place, State

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")

_HEAD = ("node", "alive", "slots", "share", "keys", "of all", "memory", "ops/s", "version", "at")


@click.group()
def nodes() -> None:
    """See how the nodes of a router are and where keys are, plan changes, take a node out."""


# status


@nodes.command(epilog=EXIT_CODES)
@of_a_router
@click.argument("words", metavar="[TARGET]", nargs=-1)
@_JSON
@click.pass_context
def status(ctx: click.Context, where: Where, words: tuple[str, ...], as_json: bool) -> None:
    """Show what each node has, and whether all agree on who has which keys.

    \b
        redishacks nodes status --redis redis://10.0.0.1

    Per node: whether it answers, its slots and their share of all, its keys and theirs, memory,
    commands per second, and the version of the topology that it goes by. The skew is by how much
    the fullest node has more keys than its share. Exits with 1 when a node is away or something is
    wrong. Changes nothing.
    """
    target, rest = where.split(words)
    _no_more(rest)
    router = where.open(target)
    if not _of_nodes(router):
        ctx.exit(_cluster_status(router.balance(), as_json))
    state = look_at(router)
    if as_json:
        show.print_json(_state_as_json(state))
    else:
        _print_state(state, show.console())
    ctx.exit(Exit.WRONG if state.problems else Exit.DONE)


def _of_nodes(router: Router) -> bool:
    return not router.redishacks_transport.sharded


def _no_more(rest: Sequence[str]) -> None:
    if rest:
        raise click.UsageError(f"what is {' '.join(rest)}? With --nodes or --redis, no TARGET")


def _print_state(state: State, out: Console) -> None:
    from redishacks.router.health import moving

    topology = state.topology
    if topology is not None:
        who = ", somebody moves keys" if state.mover else ""
        out.print(Text(f"topology {topology.version}, {moving(topology)}{who}", style="bold"))
    total = sum(node.balance.keys for node in state.nodes if node.used) or 1
    _print_table([_HEAD, *(_cells(node, total, state) for node in state.nodes)], out)
    if topology is not None:
        out.print(Text(f"skew {state.balance.skew:.2f}"))
    for problem in state.problems:
        out.print(Text(f"wrong: {one_line(Exception(problem))}", style="bold red"))


def _cells(node: NodeState, total: int, state: State) -> tuple[str, ...]:
    balance = node.balance
    stamp = "-" if node.stamp is None else str(node.stamp.version)
    if not node.used and state.topology is not None:
        stamp = "not used" if node.stamp is None else f"taken out ({stamp})"
    figures = ("", "", "", "")
    if node.error is None:
        of_all = f"{balance.keys / total:.1%}" if node.used else ""
        figures = f"{balance.keys:,}", of_all, _megabytes(balance.memory), f"{balance.ops:,}"
    return (
        balance.name, "yes" if node.error is None else "no", f"{balance.slots:,}",
        f"{balance.expected:.1%}", *figures, stamp, show.printable(node.address),
    )  # fmt: skip


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _print_table(rows: Sequence[tuple[str, ...]], out: Console) -> None:
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for at, row in enumerate(rows):
        cells = [set_cell_size(*cell) for cell in zip(row, widths, strict=True)]
        line = "  ".join(cells).rstrip()
        out.print(Text(line, style="" if at else "bold"), soft_wrap=True)


def _state_as_json(state: State) -> dict[str, Any]:
    topology = state.topology
    balance = state.balance
    return {
        "version": balance.version,
        "state": topology and topology.state,
        "target": topology and topology.target and topology.target.describe(),
        "mover": state.mover,
        "skew": balance.skew,
        "problems": [one_line(Exception(problem)) for problem in state.problems],
        "nodes": [
            {
                **node.balance._asdict(),
                "error": None if node.error is None else one_line(node.error),
                "alive": node.error is None,
                "used": node.used,
                "version": node.stamp and node.stamp.version,
                "address": node.address,
            }
            for node in state.nodes
        ],
    }


def _cluster_status(balance: Balance, as_json: bool) -> Exit:
    """Show how a cluster is, which agrees by itself on who has which keys."""
    away = [node for node in balance.nodes if node.error is not None]
    if as_json:
        told = [
            {
                **node._asdict(),
                "error": None if node.error is None else one_line(node.error),
                "alive": node.error is None,
            }
            for node in balance.nodes
        ]
        show.print_json({"skew": balance.skew, "nodes": told})
    else:
        show.console().print(Text(str(balance)))
    return Exit.WRONG if away else Exit.DONE


# where


@nodes.command("where", epilog=EXIT_CODES)
@of_a_router
@click.argument("words", metavar="[TARGET] KEY...", nargs=-1)
@_JSON
@click.pass_context
def where_(ctx: click.Context, where: Where, words: tuple[str, ...], as_json: bool) -> None:
    """Show which node has each KEY, why, and whether it is there.

    \b
        redishacks nodes where --nodes nodes.json user:1 'cart:{42}'

    While keys move, it is also said where the key is just now. Exits with 75 when that node does
    not answer. Changes nothing.
    """
    target, rest = where.split(words)
    if not rest:
        raise click.UsageError("say at least one KEY")
    router = where.open(target)
    keys = [os.fsencode(word) for word in rest]
    exits = []
    for place in _places(router, keys):
        if place.error is not None:
            exits.append(exit_of(place.error))
        if as_json:
            show.print_json(_place_as_json(place))
        else:
            show.facts(_shown(place.key), _place_rows(place), show.console())
    ctx.exit(worst(exits))


def _places(router: Router, keys: Sequence[bytes]) -> list[Place]:
    from redishacks.router.health import Place, find

    if _of_nodes(router):
        return ask_nodes(router, find(router._nodes(), keys))
    found = []
    for key in keys:
        why = router.explain(key)
        now = why.node if router.execute_command("EXISTS", key) else None
        found.append(Place(key, why.tag, why.slot, why.node, why.node, now, None))
    return found


def _shown(key: bytes) -> str:
    return show.printable(_keys.id_shown(key))


def _place_rows(place: Place) -> list[tuple[str, str]]:
    rows = []
    if place.slot is not None:
        rows.append(("slot", f"{place.slot:,}"))
        rows.append(
            ("by", f"its tag {_shown(place.tag)}" if place.tag != place.key else "all of it")
        )
    address = show.printable(place.address)
    rows.append(("node", f"{place.node}, at {address}" if address else place.node))
    if place.error is not None:
        rows.append(("there", f"not known: {one_line(place.error)}"))
    elif place.old is None:
        rows.append(("there", "yes" if place.now is not None else "no"))
    else:
        rows.append(("moves", f"from {place.old} to {place.node}"))
        now = {None: "nowhere", "aside": f"on its way, aside on {place.old}"}
        rows.append(("now", now.get(place.now, f"on {place.now}")))
    return rows


def _place_as_json(place: Place) -> dict[str, Any]:
    shown = _keys.id_shown(place.key)
    tag = _keys.id_shown(place.tag)
    known = place.error is None
    return {
        **({"key": shown} if isinstance(shown, str) else {"key_hex": shown.hex()}),
        **({"tag": tag} if isinstance(tag, str) else {"tag_hex": tag.hex()}),
        "slot": place.slot,
        "node": place.node,
        "address": place.address,
        "exists": place.now is not None if known else None,
        "moves_from": place.old,
        "now": place.now,
        "error": None if place.error is None else one_line(place.error),
    }


# plan


@nodes.command(epilog=EXIT_CODES)
@of_a_router
@click.argument("words", metavar="[TARGET] [NAME[:WEIGHT]]...", nargs=-1)
@click.option(
    "--save", metavar="FILE", type=click.Path(dir_okay=False), help="Write it for `reshard`."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
@click.pass_context
def plan(
    ctx: click.Context, where: Where, words: tuple[str, ...], save: str | None, as_json: bool
) -> None:
    """Show what would move if these were the nodes.

    \b
        redishacks nodes plan --nodes nodes.json a b c:2 d --save plan.json
        redishacks reshard plan.json --nodes nodes.json

    A NAME without a weight has that of the file, else the one that it has now, else 1. Without
    names, the nodes are all that were given. A node that is not named will have no keys. Exits with
    1 when something is against it, and says what. Changes nothing.
    """
    target, rest = where.split(words)
    router = where.unweighted().open(target)
    made = router.plan(_weights(where, router, rest))
    if save is not None:
        try:
            made.save(save)
        except OSError as error:
            raise click.FileError(save, error.strerror) from error
    if as_json:
        show.print_json(_plan_as_json(made))
    else:
        print_plan(made, show.console())
    if save is not None:
        click.echo(f"written to {save}; do it by `redishacks reshard {save} …`", err=True)
    ctx.exit(Exit.WRONG if made.refusals else Exit.DONE)


def _weights(where: Where, router: Router, words: Sequence[str]) -> dict[str, float]:
    """Return the weights that are wanted, by name."""
    routes = router._nodes()
    topology = in_use(router).topology
    assert topology is not None
    stored = getattr(topology.target or topology.placement, "weights", {})
    usual = {**dict.fromkeys(routes.names, 1), **stored, **where.weights()}
    if not words:
        return {name: usual[name] for name in sorted(routes.names)}
    found: dict[str, float] = {}
    for word in words:
        name, colon, weight = word, "", ""
        if word not in routes.names and ":" in word:
            name, colon, weight = word.rpartition(":")
        if name in found:
            raise UsageError(f"node {name} is named twice")
        if name not in routes.names:
            raise UsageError(
                f"where node {show.printable(name)} is, nobody has said: of a new node, --nodes or "
                "a TARGET tells"
            )
        try:
            found[name] = _number(weight) if colon else usual[name]
        except ValueError:
            raise UsageError(f"{show.printable(word)}: a weight is a number, as {name}:2") from None
    return found


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def print_plan(made: Plan, out: Console) -> None:
    """Print what would move; what is against it stands last."""
    for line in str(made).splitlines():
        against = line.startswith("  refused: ")
        out.print(Text(show.printable(line), style="bold red" if against else ""), soft_wrap=True)


def _plan_as_json(made: Plan) -> dict[str, Any]:
    return {
        "version": made.version,
        "share": made.share,
        "keys": made.keys,
        "bytes": made.size,
        "slots": [
            {"from": old, "to": new, "slots": count} for (old, new), count in made.slots.items()
        ],
        "big": [{"key": show.printable(str(key)), "bytes": size} for key, size in made.big],
        "refusals": list(made.refusals),
    }


# eject


@nodes.command(epilog=EXIT_CODES)
@of_a_router
@click.argument("words", metavar="[TARGET] NAME", nargs=-1)
@click.option("--yes", is_flag=True, help="Do it without asking.")
@click.option("--take-over", is_flag=True, help="Take it over from whoever moves keys.")
def eject(where: Where, words: tuple[str, ...], yes: bool, take_over: bool) -> None:
    """Take the node NAME out, for all clients at once.

    \b
        redishacks nodes eject --nodes nodes.json c

    For a node that is gone: the others serve its slots, which are empty then. What it has comes
    back by nothing but a plan: first FLUSHDB there, then `nodes plan` and `reshard`, as for a new
    one. To take out a node that answers, without a loss, leave it out of a plan.
    """
    target, rest = where.split(words)
    if len(rest) != 1:
        raise click.UsageError("say the NAME of one node")
    (name,) = rest
    router = where.unweighted().open(target)
    routes = router._nodes()
    state = in_use(router)
    node = next((each for each in state.nodes if each.name == name and each.used), None)
    if node is not None and not yes:
        what = (
            "does not answer" if node.error is not None
            else f"answers, and has {many(node.balance.keys, 'key')} that would be out of reach"
        )  # fmt: skip
        click.confirm(
            f"Node {name} {what}. Its {many(node.balance.slots, 'slot')} go to the others, empty. "
            "Take it out?",
            abort=True, err=True,
        )  # fmt: skip
    router.eject(name, take_over=take_over)
    assert routes.view is not None
    version = routes.view.topology.version
    left = ", ".join(routes.view.topology.nodes)
    show.console().print(
        Text(f"{name} is out, by version {version}: {left} serve its slots. It comes back only "
             "after FLUSHDB there, by `redishacks nodes plan` and `redishacks reshard`")
    )  # fmt: skip
