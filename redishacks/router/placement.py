"""Which node has a key: 16,384 slots as in Redis Cluster, and a table from slot to node name.

    table = SlotTable.fresh({"a": 1, "b": 1, "c": 2})
    table.node_for(b"user:1")                        # "c"
    wider = table.changed({"a": 1, "b": 1, "c": 2, "d": 1})
    len(table.moved(wider))                          # 3277 slots: the share of d, and none besides

Names decide, never addresses. A table that was changed depends on what it was before, and so it is
stored; a fresh one follows from names and weights alone, so that clients which begin at the same
time agree. Slots are those of Redis Cluster, hash tags included: a later move to a real cluster
keeps every key's slot.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from array import array
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from redishacks._slots import SLOTS, key_slot
from redishacks.errors import UsageError

Weights = Mapping[str, float]

P = TypeVar("P", bound="Placement")


class Placement(Protocol):
    """Which node, by name, has a key."""

    @property
    def kind(self) -> str:
        """How it is called."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that may have keys, in the order that counts."""

    def node_for(self, key: bytes) -> str:
        """Return the node that has a key."""

    def describe(self) -> dict[str, Any]:
        """Return what decides where keys are, as JSON takes it."""


def check_name(name: object) -> str:
    """Return a node's name, or raise `UsageError`."""
    if isinstance(name, str) and "@" in name:  # probably a URL, perhaps with a password
        raise UsageError("a node's name is not its URL: it has no @")
    known = isinstance(name, str) and 0 < len(name) <= 64 and name.isascii() and name.isprintable()
    if isinstance(name, str) and known and not set(name) & set(" \"'{}%,"):
        return name
    raise UsageError(
        f"a node's name is 1 to 64 printable ASCII characters without spaces, quotes, braces, "
        f"commas and %, not {reprlib.repr(name)}"
    )


def check_weights(weights: Mapping[str, object]) -> dict[str, float]:
    """Return names and weights in the order of names, or raise `UsageError`."""
    if not weights:
        raise UsageError("no nodes: at least one is needed")
    found: dict[str, float] = {}
    for name in sorted(map(check_name, weights)):
        weight = weights[name]
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not 0 < weight < math.inf
        ):
            raise UsageError(f"node {name}: its weight is a number above 0, not {weight!r}")
        found[name] = weight
    if len(found) > SLOTS:
        raise UsageError(f"{len(found)} nodes: there are {SLOTS} slots")
    return found


class SlotTable:
    """16,384 slots and who has each."""

    kind = "slots"

    def __init__(self, weights: Weights, owners: Sequence[int]) -> None:
        #: Weights by name, in the order of names.
        self.weights = check_weights(weights)
        self.nodes = tuple(self.weights)
        if len(owners) != SLOTS or not all(0 <= owner < len(self.nodes) for owner in owners):
            raise UsageError(f"a table says for {SLOTS} slots which of its nodes has them")
        #: The place in `nodes` of each slot's owner.
        self.owners = array("H", owners)
        #: The name of each slot's owner.
        self.by_slot = [self.nodes[owner] for owner in owners]

    @classmethod
    def fresh(cls, weights: Weights) -> SlotTable:
        """Return the table of nodes that have no data yet: a run of slots each, by name."""
        weights = check_weights(weights)
        shares = _shares(weights, dict.fromkeys(weights, 0))
        runs = [itertools.repeat(at, shares[name]) for at, name in enumerate(weights)]
        return cls(weights, list(itertools.chain.from_iterable(runs)))

    def changed(self, weights: Weights) -> SlotTable:
        """Return the table for other nodes or weights that moves the fewest slots."""
        weights = check_weights(weights)
        held = {name: self.slots(name) for name in weights}
        shares = _shares(weights, {name: len(slots) for name, slots in held.items()})
        places = {name: at for at, name in enumerate(weights)}
        owners = [-1] * SLOTS
        for name, slots in held.items():
            for slot in slots[: shares[name]]:
                owners[slot] = places[name]
        wanting = itertools.chain.from_iterable(
            itertools.repeat(places[name], max(0, shares[name] - len(slots)))
            for name, slots in held.items()
        )
        return SlotTable(weights, [at if at >= 0 else next(wanting) for at in owners])

    def node_for(self, key: bytes) -> str:
        """Return the node that has a key."""
        return self.by_slot[key_slot(key)]

    def slots(self, name: str) -> list[int]:
        """Return the slots of a node, in order; none of one that is not there."""
        return [slot for slot, owner in enumerate(self.by_slot) if owner == name]

    def moved(self, other: SlotTable) -> list[int]:
        """Return the slots that another table gives to another node."""
        pairs = zip(self.by_slot, other.by_slot, strict=True)
        return [slot for slot, (old, new) in enumerate(pairs) if old != new]

    def describe(self) -> dict[str, Any]:
        """Return what decides where keys are, as JSON takes it: runs of slots, by node."""
        runs = [[at, len(list(run))] for at, run in itertools.groupby(self.owners)]
        return {"kind": self.kind, "weights": self.weights, "runs": runs}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> SlotTable:
        """Return the table that `describe` told of."""
        owners = [at for at, count in described["runs"] for _ in range(count)]
        return cls(described["weights"], owners)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlotTable) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash((self.nodes, self.owners.tobytes()))

    def __repr__(self) -> str:
        counts = {name: self.by_slot.count(name) for name in self.nodes}
        return f"<SlotTable {', '.join(f'{name}: {count}' for name, count in counts.items())}>"


def _shares(weights: Weights, held: Mapping[str, int]) -> dict[str, int]:
    """Return how many slots each node should have: its share, rounded so that the fewest move."""
    total = sum(map(Fraction, weights.values()))
    exact = {name: SLOTS * Fraction(weight) / total for name, weight in weights.items()}
    shares = {name: math.floor(share) for name, share in exact.items()}
    # One more for those that have it already; then for those that it was taken from the most.
    order = sorted(
        (name for name in weights if shares[name] < exact[name]),
        key=lambda name: (held[name] <= shares[name], shares[name] - exact[name], name),
    )
    for name in order[: SLOTS - sum(shares.values())]:
        shares[name] += 1
    return shares
