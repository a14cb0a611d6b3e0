"""A router's nodes as the transport sees them: `Nodes` is its `Routes`, `Known` the `View`.

Every connection is greeted with two words that are answered before anything else is written: the
version that this client goes by becomes the connection's name, so that whoever moves keys can see
it in `CLIENT LIST`; then the node's stamp is read. In this order, or one could come between.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from hiredis import ReplyError

from redishacks._clock import clock
from redishacks._command import Command, Steps, ask, ask_all
from redishacks._slots import key_slot
from redishacks._transport import PULL, WAIT, Address, Refused, Settings, Table, View, Words
from redishacks.errors import (
    CrossNodeError,
    ServerError,
    TopologyMismatchError,
    UnavailableError,
    UsageError,
)
from redishacks.router.commands import Layout, Stored
from redishacks.router.placement import Placement, SlotTable
from redishacks.router.topology import CLOSING, SETTLED, Stamp, Topology, Wanted

T = TypeVar("T")

_log = logging.getLogger("redishacks")

#: What stands in the place of a port: connections that are fenced, and those that are not, over
#: which nothing is said but what nodes are told of themselves.
_FENCED, _OPEN = -2, -3
#: Seconds between two readings of the topology, however many threads find it out of date.
_PATIENCE = 0.1
#: A node that was silent so often in a row is not asked for the first of these seconds, doubled
#: with each failure up to the second; nor is one that cannot be reached.
_SILENCES = 3
_PAUSES = 0.25, 4.0


#: What hinders a move when a node was restarted empty.
LOST = "a node has lost what it knew of the move: go on with the move once more"


def address(name: str) -> Address:
    """Return a node's address, as the transport knows it."""
    return name, _FENCED


class Known:
    """What is known at one moment; it never changes."""

    def __init__(self, topology: Topology, layout: Layout) -> None:
        self.topology = topology
        self._layout = layout
        self.version = topology.version
        self.settled = topology.state == SETTLED
        #: Who serves keys now: before they move the old node, and the new one from then on.
        self.serving: Placement = topology.placement
        if topology.target is not None and topology.state != CLOSING:
            self.serving = topology.target
        #: The node of each slot; None when it is not slots that decide.
        self.table: Table | None = None
        if isinstance(self.serving, SlotTable):
            self.table = list(map(address, self.serving.nodes)), list(self.serving.owners)

    def route(self, keys: Sequence[bytes], avoid: Address | None = None) -> Address:
        """Return the node for a command; without keys any but the one to avoid.

        Raises `CrossNodeError` when it would be several.
        """
        if not keys:
            every = [address(name) for name in self.topology.nodes]
            return random.choice([node for node in every if node != avoid] or every)
        if self.table is None:
            return self._together(keys)
        slot = key_slot(keys[0])
        for key in keys[1:]:
            if key_slot(key) != slot:
                raise CrossNodeError(
                    f"keys of one command must share a slot: {keys[0]!r} and {key!r} do not"
                )
        nodes, owners = self.table
        return nodes[owners[slot]]

    def _together(self, keys: Sequence[bytes]) -> Address:
        name = self.serving.node_for(keys[0])
        for key in keys[1:]:
            if self.serving.node_for(key) != name:
                raise CrossNodeError(
                    f"keys of one command must be on one node: {keys[0]!r} and {key!r} are not"
                )
        return address(name)

    def moving(self, keys: Sequence[bytes]) -> str | None:
        """Return what has to come before a command: `WAIT`, `PULL`, or None for nothing."""
        old, new = self.topology.placement, self.topology.target
        if new is None or all(old.node_for(key) == new.node_for(key) for key in keys):
            return None
        return WAIT if self.topology.state == CLOSING else PULL

    def pull(self, keys: Sequence[bytes]) -> Steps[None]:
        """Bring keys to the node that `route` names; raises what hinders it.

        Two round trips and a half for keys that are there, one for those that are not any more.
        """
        layout, since = self._layout, self.topology.since
        placement = self.topology.placement
        moving = (key for key in keys if placement.node_for(key) != self.serving.node_for(key))
        old = _grouped(moving, placement)
        given = yield from _all([layout.give(node, some, since) for node, some in old.items()])
        if None in given:
            raise UnavailableError(LOST)
        gifts = {gift.key: gift for some in given if some for gift in some.gifts}
        new = _grouped(gifts, self.serving)
        takes = [
            layout.take(node, [gifts[key] for key in some], since) for node, some in new.items()
        ]
        if not all((yield from _all(takes))):
            raise UnavailableError(LOST)
        yield from _all(
            [
                layout.forget(node, some, since)
                for node, some in _grouped(gifts, self.topology.placement).items()
            ]
        )


def _grouped(keys: Iterable[bytes], placement: Placement) -> dict[Address, list[bytes]]:
    groups: dict[Address, list[bytes]] = {}
    for key in keys:
        groups.setdefault(address(placement.node_for(key)), []).append(key)
    return groups


def _all(commands: Sequence[Command[T]]) -> Steps[list[T]]:
    """Say commands, if there are any; raises the first error."""
    outcomes = (yield from ask_all(commands)) if commands else []
    return [outcome.result() for outcome in outcomes]


class Greeting:
    """What a connection to a node is told and asked before it is used."""

    def __init__(self, nodes: Nodes, name: str) -> None:
        self._nodes, self._name = nodes, name

    def words(self) -> tuple[int, Sequence[Words]]:
        """Return the version that this client goes by, and how that is told."""
        view = self._nodes.view
        assert view is not None
        return view.version, self._nodes.told(view)

    def check(self, version: int, replies: Sequence[Any]) -> None:
        """Look at the replies; raises `Refused` when the topology must be read again first."""
        self._nodes.check(self._name, version, replies)


class Nodes:
    """The nodes of a router, and what is known of who has which keys."""

    #: Each node has its own channels.
    shards = False

    def __init__(self, settings: Mapping[str, Settings], wanted: Wanted, layout: Layout) -> None:
        self.wanted = wanted
        self.layout = layout
        self.view: Known | None = None
        self.stale = True
        self._settings = {
            (name, kind): dataclasses.replace(
                each, greeting=Greeting(self, name) if kind == _FENCED else None,
                client_name="rh-topology",
            )
            for name, each in settings.items()
            for kind in (_FENCED, _OPEN)
        }  # fmt: skip
        self._read_at = float("-inf")
        #: Nodes that do not answer: how often in a row, until when they are not asked, and for how
        #: long after the next failure.
        self._trouble: dict[str, tuple[int, float, float]] = {}
        #: Who said that there is something newer.
        self._hint: str | None = None
        self._why = "no node was asked yet"

    def twin(self, kind: type[Nodes] | None = None) -> Nodes:
        """Return the same nodes, of which nothing is known yet: for another transport."""
        settings = {
            name: dataclasses.replace(each, greeting=None)
            for (name, kind), each in self._settings.items()
            if kind == _OPEN
        }
        return (kind or Nodes)(settings, self.wanted, self.layout)

    # For the transport

    def doubt(self, node: Address | None = None) -> None:
        """Have the topology read again; that a node cannot be reached is no reason to."""
        if node is None:
            self.stale = True

    def due(self, now: float) -> bool:
        """Whether it is time to read it again; true for one caller in every `_PATIENCE`."""
        if now - self._read_at < _PATIENCE:
            return False
        self._read_at = now
        return True

    def nodes(self) -> frozenset[Address]:
        """Return every node, each for both of its kinds of connections."""
        return frozenset(self._settings)

    def settings(self, address: Address, usual: Settings) -> Settings:
        """Return how to reach a node."""
        return self._settings[address]

    def every(self) -> dict[str, Address]:
        """Return the nodes that have keys, by name."""
        assert self.view is not None
        return {name: address(name) for name in self.view.topology.nodes}

    def counts(self) -> dict[str, int]:
        """Return how many slots each has; nothing when it is not slots that decide."""
        assert self.view is not None
        serving = self.view.serving
        return dict(Counter(serving.by_slot)) if isinstance(serving, SlotTable) else {}

    def kept(self, words: Words) -> Command[Any] | None:
        """Return what is said instead of FLUSHDB: the stamp stays. Raises for FLUSHALL."""
        name = words[0].upper()
        if name in (b"FLUSHALL", "FLUSHALL"):
            raise UsageError("FLUSHALL would drop what the nodes know of the router: use FLUSHDB")
        return self.layout.flush() if name in (b"FLUSHDB", "FLUSHDB") else None

    def visible(self, keys: list[bytes]) -> list[bytes]:
        """Return keys of a node as its users know them: without those that are the router's own."""
        return self.layout.visible(keys)

    def aside(self, pattern: bytes) -> bytes:
        """Return what the names match while keys move that a pattern is for."""
        return re.sub(rb"([\\*?\[\]])", rb"\\\1", self.layout.aside_prefix) + pattern

    def where(self, keys: Sequence[bytes]) -> str:
        """Name the node for these keys; empty when it could be any."""
        view = self.view
        return view.serving.node_for(keys[0]) if keys and view is not None else ""

    def redirected(self, code: str, rest: str, asked: Address) -> None:
        """Nodes of a router do not redirect."""

    @property
    def troubled(self) -> bool:
        """Whether any node did not answer lately."""
        return bool(self._trouble)

    def failed(self, node: Address, *, silent: bool) -> None:
        """Take note that a node cannot be reached, or was `silent` for longer than it may."""
        count, _, pause = self._trouble.get(node[0], (0, 0.0, _PAUSES[0]))
        count += 1
        if silent and count < _SILENCES:
            self._trouble[node[0]] = count, 0.0, pause
        else:
            self._trouble[node[0]] = count, clock() + pause, min(2 * pause, _PAUSES[1])
            # It may have been ejected: the others know.
            self.stale = True

    def fine(self, node: Address) -> None:
        """Take note that a node has answered."""
        self._trouble.pop(node[0], None)

    def broken(self, node: Address, patience: float) -> str | None:
        """Return why a node is not asked for now; None for one that is.

        Also to try it again, for one caller in the time that it has `patience`.
        """
        found = self._trouble.get(node[0])
        if found is None or (found[0] < _SILENCES and not found[1]):
            return None
        count, until, pause = found
        now = clock()
        if now < until:
            return "it did not answer a moment ago, and is not asked until it is tried again"
        # This call tries it; others go on without it meanwhile.
        self._trouble[node[0]] = count, now + min(max(pause, patience), _PAUSES[1]), pause
        return None

    def silent(self, node: Address) -> bool:
        """Whether a node did not answer when it was asked last."""
        return node[0] in self._trouble

    def instead(self, node: Address) -> Address:
        """Return a node that has answered, for what any node may be asked; this one if it can."""
        well = [each for name, each in self.every().items() if name not in self._trouble]
        return node if node in well or not well else random.choice(well)

    def told(self, view: View) -> Sequence[Words]:
        """Return what a connection is told: the version, as its name. And what it is asked."""
        return (b"CLIENT", b"SETNAME", b"rh-%d" % view.version), self.layout.stamp

    def heard(self, address: Address, replies: Sequence[Any]) -> None:
        """Look whether a node knows a newer topology, after something was said to it."""
        view = self.view
        try:
            if view is not None:
                self.check(address[0], view.version, replies)
        except (Refused, TopologyMismatchError, ServerError):
            self.stale = True

    def check(self, name: str, version: int, replies: Sequence[Any]) -> None:
        """Look at what a node said of itself; raises when it is not to be used as it is."""
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise ServerError(f"{reply} (a router's connections need CLIENT SETNAME and HGET)")
        if replies[-1] is None:
            self.stale = True
            raise Refused(f"node {name} has come back without its stamp")
        stamp = Stamp.parse(replies[-1])
        self._named(name, stamp)
        if stamp.version != version:
            self.stale = True
            self._hint = name if stamp.version > version else None
            raise Refused(f"node {name} goes by version {stamp.version}, not {version}")
        view = self.view
        if view is not None and view.version == version and stamp.digest != view.topology.digest:
            raise self._two(version)

    # What is stored

    def refresh(self, without: str = "") -> Steps[None]:
        """Learn the newest topology; the first client of nodes that nobody has used makes it.

        One round trip. A node that has lost it is told again, once all others say what is newest.
        `without` names one that is not to be waited for.
        """
        hint, self._hint = self._hint, None
        names = self.names
        asked = [name for name in names if name != without]
        found = yield from self._read([hint] if hint in asked else asked)
        newest = self._newest(found)
        if newest is None or (self.view is not None and newest.version <= self.view.version):
            if hint:
                found = yield from self._read(asked)
                newest = self._newest(found)
            missing = [name for name in names if name not in found]
            newest = yield from self._mend(found, newest, missing)
        if newest is None:
            return
        if self.view is None and 2 * len(found) < len(names):
            raise UnavailableError(
                f"{len(names) - len(found)} of {len(names)} nodes cannot be reached: those that "
                f"are left might have been ejected. {self._why}"
            )
        self.wanted.check(newest)
        if self.view is None or newest.version >= self.view.version:
            self.view = Known(newest, self.layout)
        self.stale = False

    def adopt(self, topology: Topology) -> Known:
        """Go by a topology that was told to the nodes just now."""
        self.view = known = Known(topology, self.layout)
        self.stale = False
        return known

    def open(self, name: str) -> Address:
        """Return a node's address over connections that are not fenced."""
        return name, _OPEN

    def db(self, name: str) -> int:
        """Return the number of a node's database: others are other routers'."""
        return self._settings[name, _OPEN].db

    @property
    def names(self) -> list[str]:
        """Every node that was given."""
        return [name for name, kind in self._settings if kind == _OPEN]

    def _read(self, names: Sequence[str]) -> Steps[dict[str, Stored]]:
        """Return what nodes have stored; those that do not answer are left out."""
        outcomes = yield from ask_all([self.layout.read((name, _OPEN)) for name in names])
        found: dict[str, Stored] = {}
        for name, outcome in zip(names, outcomes, strict=True):
            if outcome.error is None:
                found[name] = outcome.value
                if outcome.value is not None:
                    self._named(name, outcome.value[0])
            elif isinstance(outcome.error, UnavailableError):
                self._why = str(outcome.error)
            else:
                raise outcome.error
        return found

    def _newest(self, found: Mapping[str, Stored]) -> Topology | None:
        stored = [one for one in found.values() if one is not None]
        if not stored:
            return None
        newest = max((topology for _, topology in stored), key=lambda each: each.version)
        if len({stamp.digest for stamp, _ in stored if stamp.version == newest.version}) > 1:
            raise self._two(newest.version)
        return newest

    def _mend(
        self, found: Mapping[str, Stored], newest: Topology | None, missing: Sequence[str]
    ) -> Steps[Topology | None]:
        """Tell nodes what they do not know, if all others were asked."""
        fresh = undecided = newest is None
        if newest is None:
            if missing:
                raise UnavailableError(
                    f"node {missing[0]} cannot be reached, and nobody else tells who has which "
                    f"keys: {self._why}"
                )
            placement = self.wanted.fresh()
            newest = Topology(1, {name: self.shown(name) for name in found}, placement)
        behind = [
            name
            for name in sorted(newest.nodes)
            if name in found and _version(found[name]) < newest.version
        ]
        if behind and any(name in missing for name in newest.nodes):
            return newest  # they serve nothing until then
        for name in behind:
            had = _version(found[name])
            # One version behind, or new in a move: that is being told just now.
            lost = had < newest.version - 1 if had else newest.state == SETTLED
            if lost and not fresh:
                _log.warning(
                    "node %s had %s, and is told of version %d of the topology: its keys are those "
                    "that it has come back with",
                    name,
                    f"version {had}" if had else "no stamp",
                    newest.version,
                )
            stored = yield from ask(self.layout.tell((name, _OPEN), newest))
            assert stored is not None
            if undecided:
                # The first node decides between those that begin at the same time.
                newest = stored[1]
                undecided = False
            self._named(name, stored[0])
            if stored[0].version == newest.version and stored[0].digest != newest.digest:
                raise self._two(newest.version)
        return newest

    def shown(self, name: str) -> str:
        """Return where a node is, without credentials."""
        each = self._settings[name, _OPEN]
        host, port = each.address
        place = f"{host}:{port}" if port > 0 else host
        return f"{place}/{each.db}" if each.db else place

    def _named(self, name: str, stamp: Stamp) -> None:
        if stamp.name != name:
            raise TopologyMismatchError(
                f"the address of node {name} leads to node {stamp.name}: were they swapped?"
            )

    def _two(self, version: int) -> TopologyMismatchError:
        return TopologyMismatchError(
            f"there are two topologies of version {version}: clients with other nodes or weights "
            "began at the same time, or nodes of another router are among these"
        )


def _version(stored: Stored) -> int:
    return stored[0].version if stored is not None else 0
