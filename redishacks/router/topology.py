"""What all clients of a router agree on: nodes by name, who has which keys, and what is moving.

It is stored whole on every node, with a stamp (version, digest, name of the node) that is cheap to
compare; a higher version replaces a lower one. What a client was constructed with gives addresses
and credentials, and must not contradict it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from redishacks.errors import ServerError, TopologyMismatchError
from redishacks.router.legacy import KINDS
from redishacks.router.placement import Placement, SlotTable, Weights

#: Nothing moves; what is to move waits; what is to move goes over when it is asked for.
SETTLED, CLOSING, TRANSIT = "settled", "closing", "transit"

_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Placement]] = {
    "slots": SlotTable.read,
    **{kind: each.read for kind, each in KINDS.items()},
}


class Stamp(NamedTuple):
    """What a node says of itself."""

    version: int
    digest: str
    name: str

    def __str__(self) -> str:
        return f"{self.version} {self.digest} {self.name}"

    @classmethod
    def parse(cls, text: bytes) -> Stamp:
        """Read what a node has stored; raises `ServerError` when that is something else."""
        words = text.decode("ascii", "replace").split(" ")
        if len(words) != 3 or not words[0].isdigit():
            raise ServerError("ERR what should be the stamp of a router's node is something else")
        return cls(int(words[0]), words[1], words[2])


class Topology(NamedTuple):
    """Who has which keys, by one version."""

    version: int
    #: Where the nodes are, without credentials: for people, and for tools that know one of them.
    addresses: Mapping[str, str]
    placement: Placement
    state: str = SETTLED
    #: Who is to have which keys, when some are moving.
    target: Placement | None = None
    #: The version with which the last move's transit began: names what was given and taken in it.
    since: int = 0

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that has keys, or will have."""
        both = self.placement.nodes + (self.target.nodes if self.target is not None else ())
        return tuple(dict.fromkeys(both))

    @property
    def digest(self) -> str:
        """Tells topologies of the same version apart."""
        return hashlib.sha1(self.dump().encode(), usedforsecurity=False).hexdigest()[:16]

    def stamp(self, name: str) -> Stamp:
        """Return the stamp of a node."""
        return Stamp(self.version, self.digest, name)

    def dump(self) -> str:
        """Write it as it is stored."""
        told = {
            "version": self.version,
            "addresses": dict(self.addresses),
            "placement": self.placement.describe(),
            "state": self.state,
            "target": self.target.describe() if self.target is not None else None,
            "since": self.since,
        }
        return json.dumps(told, sort_keys=True, separators=(",", ":"))

    @classmethod
    def load(cls, text: bytes) -> Topology:
        """Read what `dump` wrote; raises `ServerError` when it is something else."""
        try:
            told = json.loads(text)
            target = told["target"]
            return cls(
                int(told["version"]),
                told["addresses"],
                read_placement(told["placement"]),
                told["state"],
                read_placement(target) if target is not None else None,
                int(told["since"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"ERR what should be a router's topology is something else: {error!r}"
            ) from None


class Wanted(NamedTuple):
    """What a client was constructed with."""

    names: Sequence[str]
    #: Those that were said; others are 1 for nodes that nobody has used yet.
    weights: Weights
    #: None when nothing was said.
    placement: Placement | None

    def fresh(self) -> Placement:
        """Return who has which keys on nodes that nobody has used yet."""
        if self.placement is not None:
            return self.placement
        return SlotTable.fresh({name: self.weights.get(name, 1) for name in self.names})

    def check(self, topology: Topology) -> None:
        """Raise `TopologyMismatchError` when this contradicts what is stored."""
        wrong = [
            f"it has node {name}, which is not given here"
            for name in topology.nodes
            if name not in self.names
        ]
        final = topology.target or topology.placement
        if isinstance(final, SlotTable):
            wrong += [
                f"it has node {name} with weight {final.weights[name]:g}, not {weight:g}"
                for name, weight in sorted(self.weights.items())
                if name in final.weights and final.weights[name] != weight
            ]
        if self.placement is not None and self.placement.describe() != final.describe():
            wrong.append(f"its placement is {final.kind}, and not what is given here")
        if wrong:
            raise TopologyMismatchError(
                f"the nodes have a topology of version {topology.version}, and "
                + "; ".join(wrong)
                + ". What is stored decides: give all of its nodes, and reshard to change it"
            )


def read_placement(described: Mapping[str, Any]) -> Placement:
    """Return the placement that was described."""
    return _KINDS[described["kind"]](described)
