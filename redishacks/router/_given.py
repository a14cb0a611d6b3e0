"""What a router is made of: nodes by name, as users give them, or a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import redis

from redishacks._transport import Settings, read_settings
from redishacks.errors import UsageError
from redishacks.router._dialect import Dialect
from redishacks.router._nodes import Nodes
from redishacks.router.commands import Layout
from redishacks.router.placement import Placement, check_name, check_weights
from redishacks.router.topology import Wanted

#: What a node may be given as: a URL, a client of redis-py, or {"url": …, "weight": …}.
Node = Any


def dialect_of(cluster: Any) -> Dialect:
    """Return how a cluster's client writes words and reads replies."""
    options = cluster.get_connection_kwargs()
    known = ("protocol", "decode_responses", "encoding", "encoding_errors")
    given = {name: options[name] for name in known if options.get(name) is not None}
    return Dialect(redis.Redis(**given))


def read(
    nodes: Mapping[str, Node] | Iterable[tuple[str, Node]],
    placement: Placement | None,
    prefix: str,
    *,
    asynchronous: bool,
) -> tuple[Nodes, Dialect]:
    """Return nodes as the transport sees them; raises `UsageError` for what can never work."""
    pairs = _pairs(nodes)
    settings: dict[str, Settings] = {}
    weights: dict[str, Any] = {}
    dialects: list[Dialect] = []
    for name, given in pairs:
        if check_name(name) in settings:
            raise UsageError(f"node {name} is given twice")
        client = given
        if isinstance(given, Mapping):
            if unknown := given.keys() - {"url", "weight"}:
                shown = ", ".join(sorted(map(str, unknown)))
                raise UsageError(f"node {name}: url and weight, not {shown}")
            if "url" not in given:
                raise UsageError(f"node {name}: its url is missing")
            client = given["url"]
            if "weight" in given:
                weights[name] = given["weight"]
        try:
            settings[name] = read_settings(client, asynchronous=asynchronous)
        except UsageError as error:
            raise UsageError(f"node {name}: {error}") from None
        if settings[name].foreign is not None:
            raise UsageError(
                f"node {name}: connections of a class of your own, or of fakeredis, cannot be told "
                "by which topology they go; redishacks.testing has servers for tests"
            )
        dialects.append(Dialect(client))
    check_weights({name: weights.get(name, 1) for name in settings})
    if (
        len({dialect.decodes for dialect in dialects}) > 1
        or len({each.protocol for each in settings.values()}) > 1
    ):
        raise UsageError("all nodes must have the same protocol and decode_responses")
    if placement is not None:
        _check_placement(placement, settings)
        if weights:
            raise UsageError("with a placement of your own, that is where weights are given")
    wanted = Wanted(tuple(sorted(settings)), weights, placement)
    return Nodes(settings, wanted, Layout(prefix)), dialects[0]


def _pairs(nodes: Any) -> list[tuple[Any, Node]]:
    if isinstance(nodes, Mapping):
        return list(nodes.items())
    if not isinstance(nodes, str | bytes) and isinstance(nodes, Iterable):
        pairs = list(nodes)
        if all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            return [(name, given) for name, given in pairs]
    raise UsageError('a router takes names and for each a node: {"a": "redis://…"}, or pairs')


def _check_placement(placement: Placement, settings: Mapping[str, Settings]) -> None:
    if isinstance(placement, type) or not hasattr(placement, "node_for"):
        raise UsageError("a placement is SlotTable.fresh({…}), or one of redishacks.router.legacy")
    if missing := sorted(set(placement.nodes) - settings.keys()):
        raise UsageError(f"the placement has node {missing[0]}, which is not given")
