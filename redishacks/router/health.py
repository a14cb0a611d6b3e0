"""What each node of a router says of itself, compared: `look`, `find` and `verify`.

    state = drive(look(nodes), observer(nodes))
    state.problems             # ("node c goes by version 3, not 4", …)
    print(moving(state.topology))

They only read. A client's own transport first sees that all nodes know what they are, and tells
those that do not; the one that `observer` returns tells them nothing. For `redishacks nodes`,
`redishacks reshard` and `redishacks doctor`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from redishacks._command import Command, Outcome, Steps, ask, ask_all
from redishacks._slots import hash_tag, key_slot
from redishacks._transport import SyncTransport, connect_nodes
from redishacks.errors import (
    RedisHacksError,
    ServerError,
    TopologyMismatchError,
    UnavailableError,
    UsageError,
)
from redishacks.router._nodes import Nodes
from redishacks.router.balance import Balance, NodeBalance
from redishacks.router.commands import Stored
from redishacks.router.placement import SlotTable
from redishacks.router.topology import CLOSING, SETTLED, Stamp, Topology

#: What is said to each node, and the keys that one exchange of `verify` looks at.
_WORDS, _SCAN = 4, 1_000
#: Keys that are named which are not where they belong.
_NAMED = 3
#: Nobody has a connection with this number.
_NOBODY = str(2**63 - 1)
#: What whoever moves keys must be permitted, in a form that does nothing.
_TRIALS = (
    ("CLIENT", "LIST"),
    ("CLIENT", "KILL", "ID", _NOBODY),
    ("CLIENT", "UNBLOCK", _NOBODY),
    ("CLIENT", "SETNAME", "rh-topology"),
)


class _Untold(Nodes):
    """Nodes that are told nothing, whatever they say."""

    def refresh(self, without: str = "") -> Steps[None]:
        """Leave them as they are."""
        self.stale = False
        return
        yield


def observer(nodes: Nodes) -> SyncTransport:
    """Return a transport to the same nodes that changes nothing there."""
    return connect_nodes(nodes.twin(_Untold))


class NodeState(NamedTuple):
    """What one node says."""

    balance: NodeBalance
    #: Where it is, without credentials; empty when nobody tells.
    address: str
    #: Whether the topology has it.
    used: bool
    #: None for a node without one, and for one that did not answer.
    stamp: Stamp | None
    #: What it says in INFO.
    info: Mapping[str, str]

    @property
    def name(self) -> str:
        """Its name."""
        return self.balance.name

    @property
    def error(self) -> RedisHacksError | None:
        """Why it did not answer."""
        return self.balance.error


class State(NamedTuple):
    """What all nodes say."""

    #: The newest that any has; None when no node has one.
    topology: Topology | None
    #: First those that the topology has, then those that were given besides.
    nodes: tuple[NodeState, ...]
    #: Whether somebody moves keys just now.
    mover: bool
    #: What the nodes say that does not go together, in words.
    wrong: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, and who does not answer, in words."""
        away = [node for node in self.nodes if not isinstance(node.error, UsageError | None)]
        return (*(f"node {node.name}: {node.error}" for node in away), *self.wrong)

    @property
    def balance(self) -> Balance:
        """How evenly the nodes are used that the topology has."""
        version = self.topology.version if self.topology is not None else 0
        return Balance(version, tuple(node.balance for node in self.nodes if node.used))


def look(nodes: Nodes) -> Steps[State]:
    """Ask every node that was given; one round trip. Those that do not answer are in it."""
    names = nodes.names
    asked = [command for name in names for command in _questions(nodes, name)]
    outcomes = yield from ask_all(asked)
    heard = {
        name: outcomes[_WORDS * at : _WORDS * (at + 1)] for at, name in enumerate(names)
    }  # fmt: skip
    errors = {name: error for name, some in heard.items() if (error := _error(some)) is not None}
    stored: dict[str, Stored] = {
        name: some[0].result() for name, some in heard.items() if name not in errors
    }
    known = [each[1] for each in stored.values() if each is not None]
    topology = max(known, key=lambda each: each.version, default=None)
    used = topology.nodes if topology is not None else ()
    counts = slots_of(topology) if topology is not None else {}
    found = []
    for name in dict.fromkeys((*sorted(used), *sorted(names))):
        share = 0.0
        if name in used:
            share = counts.get(name, 0) / sum(counts.values()) if counts else 1 / len(used)
        error = errors.get(name) if name in names else UsageError(f"node {name} is not given here")
        address = nodes.shown(name) if name in names else ""
        if topology is not None and not address:
            address = topology.addresses.get(name, "")
        balance = NodeBalance(name, error, counts.get(name, 0), share, 0, 0, 0)
        info: Mapping[str, str] = {}
        if error is None:
            _, _, size, told = (outcome.result() for outcome in heard[name])
            info = told
            memory, ops = int(info["used_memory"]), int(info["instantaneous_ops_per_sec"])
            balance = balance._replace(keys=size, memory=memory, ops=ops)
        stamp = stored.get(name)
        found.append(NodeState(balance, address, name in used, stamp[0] if stamp else None, info))
    mover = any(heard[name][1].result() for name in names if name not in errors)
    wrong = tuple(_wrong(nodes, topology, found, mover=mover))
    return State(topology, tuple(found), mover, wrong)


def slots_of(topology: Topology) -> dict[str, int]:
    """Return how many slots each node serves; nothing when it is not slots that decide."""
    serving = serving_of(topology)
    return dict(Counter(serving.by_slot)) if isinstance(serving, SlotTable) else {}


def serving_of(topology: Topology) -> Any:
    """Return the placement by which keys are served: before they move that of old."""
    if topology.target is None or topology.state == CLOSING:
        return topology.placement
    return topology.target


def moving(topology: Topology) -> str:
    """Say what moves: `transit: 4,096 slots from a to d`."""
    if topology.state == SETTLED or topology.target is None:
        return SETTLED
    pairs: Counter[tuple[str, str]] = Counter()
    if isinstance(topology.placement, SlotTable) and isinstance(topology.target, SlotTable):
        before, after = topology.placement.by_slot, topology.target.by_slot
        pairs = Counter(pair for pair in zip(before, after, strict=True) if pair[0] != pair[1])
    what = [f"{count:,} slots from {old} to {new}" for (old, new), count in sorted(pairs.items())]
    kinds = f"from {topology.placement.kind} to {topology.target.kind}"
    return f"{topology.state}: {', '.join(what) or kinds}"


def _questions(nodes: Nodes, name: str) -> Iterator[Command[Any]]:
    at = nodes.open(name)
    yield nodes.layout.read(at)
    yield nodes.layout.mover(at)
    yield Command(("DBSIZE",), (), int, repeatable=True, node=at)
    yield Command(("INFO",), (), _fields, repeatable=True, node=at)


def _error(outcomes: Sequence[Outcome[Any]]) -> RedisHacksError | None:
    error = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    if error is not None and not isinstance(error, RedisHacksError):
        raise error
    return error


def _fields(reply: bytes | str) -> Mapping[str, str]:
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else reply
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


def _wrong(
    nodes: Nodes, topology: Topology | None, found: Sequence[NodeState], *, mover: bool
) -> Iterator[str]:
    if topology is None:
        if all(node.error is None for node in found):
            yield "no node has a topology: nobody has used them as a router's, by this prefix"
        return
    for node in found:
        if node.error is None:
            yield from _disagreements(topology, node)
    try:
        nodes.wanted.check(topology)
    except TopologyMismatchError as error:
        yield str(error)
    if topology.state != SETTLED and not mover:
        yield "keys are to move, and nobody moves them: go on by `redishacks reshard --resume`"


def _disagreements(topology: Topology, node: NodeState) -> Iterator[str]:
    stamp, name = node.stamp, node.name
    if stamp is None:
        if node.used:
            yield (
                f"node {name} has no stamp: it came back empty, and serves nothing until a client "
                "that reaches all nodes has told it again"
            )
        return
    if stamp.name != name:
        yield f"the address of node {name} leads to node {stamp.name}: were they swapped?"
    elif stamp.version < topology.version and node.used:
        yield f"node {name} goes by version {stamp.version}, and not by {topology.version}"
    elif stamp.version == topology.version and stamp.digest != topology.digest:
        yield f"node {name} has another topology of version {stamp.version} than others have"


# Keys


class Place(NamedTuple):
    """Where a key is."""

    key: bytes
    #: What decides: the hash tag, or the whole key without one.
    tag: bytes
    #: None when it is not slots that decide.
    slot: int | None
    #: The node that serves it, and where that is.
    node: str
    address: str
    #: Where it is now, while it may move: a node, or "aside" on the old one; None for nowhere.
    now: str | None
    #: The node that had it, when it is moving or is about to; then `node` is to have it.
    old: str | None
    #: Why that is not known.
    error: RedisHacksError | None = None


def find(nodes: Nodes, keys: Sequence[bytes]) -> Steps[list[Place]]:
    """Say where keys are; two round trips, three when they move."""
    state = yield from look(nodes)
    topology = state.topology
    if topology is None:
        away = any(node.error is not None for node in state.nodes)
        raise (UnavailableError if away else UsageError)(state.problems[0])
    known = {node.name: node for node in state.nodes}
    places = []
    for key in keys:
        name = old = topology.placement.node_for(key)
        if topology.target is not None:
            name = topology.target.node_for(key)
        slot = key_slot(key) if isinstance(serving_of(topology), SlotTable) else None
        tag = hash_tag(key) if slot is not None else key
        error = known[name].error or known[old].error
        place = Place(key, tag, slot, name, known[name].address, None, None, error)
        if old != name:
            place = place._replace(old=old)
        if error is None:
            try:
                place = place._replace(now=(yield from _now(nodes, place)))
            except RedisHacksError as error:
                place = place._replace(error=error)
        places.append(place)
    return places


def _now(nodes: Nodes, place: Place) -> Steps[str | None]:
    """Look for a key, first where it was: it cannot pass by unseen then."""
    for name in (place.old, place.node):
        if name is None:
            continue
        at = nodes.open(name)
        commands = [nodes.layout.present(at, place.key)]
        if name == place.old:
            commands.append(nodes.layout.present(at, place.key, aside=True))
        outcomes = yield from ask_all(commands)
        there = [outcome.result() for outcome in outcomes]
        if any(there):
            return name if there[0] else "aside"
    return None


class Verdict(NamedTuple):
    """What a scan of a node has found."""

    node: str
    keys: int
    #: How many of them belong elsewhere, and some of those.
    wrong: int
    named: tuple[bytes, ...]


def verify(
    nodes: Nodes, on_progress: Callable[[int], object] | None = None
) -> Steps[list[Verdict]]:
    """Scan the keys of all nodes, also of those that were taken out, for any that are elsewhere.

    `on_progress` is called with how many keys were looked at. Raises what a node in use raises.
    """
    yield from nodes.refresh()
    assert nodes.view is not None
    topology = nodes.view.topology
    found = []
    looked = 0
    for name in nodes.names:
        if name not in topology.nodes and not (yield from _knows(nodes, name)):
            continue
        cursor, keys, wrong = b"0", 0, list[bytes]()
        count = 0
        while True:
            page = yield from ask(nodes.layout.scan(nodes.open(name), cursor, _SCAN))
            cursor, some = page
            keys += len(some)
            misplaced = [key for key in some if serving_of(topology).node_for(key) != name]
            count += len(misplaced)
            wrong += misplaced[: _NAMED - len(wrong)]
            looked += len(some)
            if on_progress is not None:
                on_progress(looked)
            if cursor == b"0":
                break
        found.append(Verdict(name, keys, count, tuple(wrong)))
    return found


def _knows(nodes: Nodes, name: str) -> Steps[bool]:
    """Return whether a node that is not in use was one of this router's."""
    (outcome,) = yield from ask_all([nodes.layout.read(nodes.open(name))])
    return outcome.error is None and outcome.value is not None


# What is permitted


def forbidden(nodes: Nodes, name: str) -> Steps[list[str]]:
    """Return what we may not say to a node that whoever moves keys has to; one round trip."""
    at = nodes.open(name)
    outcomes = yield from ask_all(
        [Command[Any](words, (), repeatable=True, node=at) for words in _TRIALS]
    )
    found = []
    for words, outcome in zip(_TRIALS, outcomes, strict=True):
        if isinstance(outcome.error, ServerError) and outcome.error.code == "NOPERM":
            found.append(" ".join(words[:2]))
        else:
            outcome.result()
    return found
