"""Moving keys between nodes while clients go on: the mover.

    closing   commands for keys that are to move wait; connections that go by an older version are
              ended, so that nobody can write to the old node any more, not even who was stopped
    transit   the new node serves them, and whoever needs a key pulls it over first; so does the
              mover with all of them, a scan of the old nodes after the other
    settled   nobody pulls any more; once no connection goes by an older version, what was noted of
              the move is dropped

Each is a version that is stored on all nodes. A mover that was killed leaves one of them, and the
next one goes on from there. There is one at a time: each of its words is good only as long as its
token is on the node that hears it.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from redishacks._clock import clock
from redishacks._command import Ask, Command, Outcome, Sleep, Steps, ask_all
from redishacks._slots import at_slots
from redishacks._transport import Address, Overtaken
from redishacks.errors import UnavailableError, UsageError
from redishacks.router._nodes import LOST, Known, Nodes, address
from redishacks.router.commands import Gift, Given
from redishacks.router.placement import Placement, SlotTable
from redishacks.router.topology import CLOSING, SETTLED, TRANSIT, Topology

T = TypeVar("T")

#: Seconds that a mover is one without saying anything; and after which it says so again.
_TTL, _RENEW = 10.0, 2.0
#: Seconds between two looks at the connections that are still to go.
_LOOK = 0.02
#: Seconds for whose wait was ended to go by the new version.
_WAKING = 0.3
#: Seconds' worth of keys of one script, where there is a rate; how many at most, and bytes after
#: which it looks at no more of them.
_MOMENT = 0.1
_BATCH, _MOST = 500, "8000000"
_SCAN = 1_000
#: Scans of a node: one, and another for each client that was killed in the middle of a pull.
_SCANS = 1_000


class Progress(NamedTuple):
    """How far a move has come."""

    state: str
    #: Keys that were seen on the nodes that lose some, and those of them that were moved.
    seen: int
    moved: int


class Move:
    """One mover's work, from its claim to its end."""

    def __init__(
        self,
        nodes: Nodes,
        *,
        drain: float = 0.5,
        rate: float | None = None,
        take_over: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> None:
        self._nodes = nodes
        self._layout = nodes.layout
        self._token = secrets.token_hex(8)
        self._drain, self._rate = drain, rate
        self._force = take_over
        self._on_progress = on_progress
        #: Who is spoken to.
        self._names = nodes.names
        #: By what this mover goes: others may have come further while it was stopped.
        self._known: Known | None = None
        self._said_at = 0.0
        self._seen = self._moved = 0

    def run(
        self,
        target: Placement | None,
        version: int | None = None,
        before: Placement | None = None,
    ) -> Steps[Progress]:
        """Move all to a placement, or end what another mover began (None).

        With a `version`, and what was `before`, nothing is begun unless that is what is stored.
        """
        for name in target.nodes if target is not None else ():
            if name not in self._names:
                raise UsageError(f"node {name} was not given to this router")
        try:
            yield from self._claim()
            yield from self._learn()
            topology = self._topology()
            if topology.state == SETTLED:
                if version not in (None, topology.version):
                    raise UsageError(
                        f"the plan is for version {version} of the topology, which is at "
                        f"{topology.version} by now: make another plan"
                    )
                if before is not None and before.describe() != topology.placement.describe():
                    raise UsageError("the plan is for other nodes than these: make another plan")
                if target is None:
                    yield from self._tidy_up()
                    return Progress(SETTLED, 0, 0)
                yield from self._publish(CLOSING, topology.placement, target)
            elif target is not None and target.describe() != (topology.target or target).describe():
                raise UsageError("another move is under way: end that one first")
            yield from self._carry_on()
        finally:
            # As far as it goes: whoever comes next need not wait for the end of the TTL then.
            yield from self._on_all(self._layout.claim, self._token, 0.0)
        return Progress(SETTLED, self._seen, self._moved)

    def eject(self, name: str) -> Steps[Topology]:
        """Give the keys of a node that is gone to the others: they are not there, nor is the node.

        All others must be there. Clients learn of it as of any change.
        """
        yield from self._learn(without=name)
        old = self._topology().placement
        if self._topology().state != SETTLED:
            raise UsageError("keys are moving: that must come to its end before a node is ejected")
        if name not in old.nodes:
            raise UsageError(f"there is no node {name}; there are {', '.join(old.nodes)}")
        if not isinstance(old, SlotTable):
            raise UsageError(
                f"a node of a {old.kind} placement cannot be ejected: reshard to slots"
            )
        if len(old.nodes) == 1:
            raise UsageError(f"{name} is the only node")
        self._names = [other for other in self._nodes.names if other != name]
        new = old.changed({other: old.weights[other] for other in old.nodes if other != name})
        try:
            yield from self._claim()
            yield from self._publish(SETTLED, new, None)
            yield from self._fence()
        finally:
            yield from self._on_all(self._layout.claim, self._token, 0.0)
        return self._topology()

    def dismiss(self, name: str) -> Steps[None]:
        """Tell a node that was ejected, if it hears it: clients that reach it learn so at once."""
        tell = self._layout.tell(self._nodes.open(name), self._topology())
        yield from ask_all([tell])

    def _carry_on(self) -> Steps[None]:
        topology = self._topology()
        assert topology.target is not None
        old, new = topology.placement, topology.target
        if topology.state == CLOSING:
            self._tell(CLOSING)
            yield from self._fence()
            # Of a mover that was killed at the end of the move before.
            yield from self._each(self._layout.end, topology.since, among=self._names)
            yield from self._publish(TRANSIT, old, new)
            yield from self._begin(topology.nodes)
        else:
            yield from self._resume(old, new)
        self._tell(TRANSIT)
        yield from self._sweep(old, new)
        yield from self._publish(SETTLED, new, None, tell=topology.nodes)
        yield from self._fence()
        yield from self._each(self._layout.end, self._topology().since, among=topology.nodes)

    def _resume(self, old: Placement, new: Placement) -> Steps[None]:
        """Go on in transit: a node that was restarted empty has lost what it had given or taken."""
        topology = self._topology()
        if all((yield from self._each(self._layout.begun, topology.since, among=topology.nodes))):
            return
        # Who was stopped in the middle of a pull must not be able to end it after that.
        yield from self._publish(TRANSIT, old, new)
        yield from self._fence()
        yield from self._begin(topology.nodes)

    def _begin(self, names: Sequence[str]) -> Steps[None]:
        """Let nodes give and take keys."""
        since = self._topology().since
        if not all((yield from self._each(self._layout.begin, since, self._token, among=names))):
            raise self._overtaken()

    def _tidy_up(self) -> Steps[None]:
        """Drop what a mover left that was killed when all had been moved."""
        since = self._topology().since
        if not any((yield from self._each(self._layout.begun, since, among=self._names))):
            raise UsageError("nothing is moving: there is nothing to go on with")
        yield from self._fence()
        yield from self._each(self._layout.end, since, among=self._names)

    # The sweep

    def _sweep(self, old: Placement, new: Placement) -> Steps[None]:
        """Move every key over, until a scan of all nodes was whole and nothing is aside."""
        for name in old.nodes:
            for _ in range(_SCANS):
                yield from self._carry(name, [], b"0", old, new)
                since = self._topology().since
                (aside,) = yield from self._each(self._layout.given, since, among=[name])
                if aside is None:
                    yield from self._lost()
                if not aside:
                    break
                # Somebody was in the middle of it, or was killed there.
                yield from self._carry(name, aside, None, old, new)
            else:
                raise UnavailableError(f"node {name}: keys are set aside all the time")

    def _carry(
        self,
        name: str,
        waiting: Sequence[bytes],
        cursor: bytes | None,
        old: Placement,
        new: Placement,
    ) -> Steps[None]:
        """Move keys of a node: those that are waiting, and what a scan finds from its cursor on.

        In each exchange some are found, those found before are given, those given before are taken,
        and those whose taking was answered are forgotten: the nodes work at the same time.
        """
        layout, since, token = self._layout, self._topology().since, self._token
        at, leaving = address(name), _leaving(name, old, new)
        some = _BATCH if self._rate is None else max(1, min(_BATCH, round(self._rate * _MOMENT)))
        given: list[Gift] = []
        taken: list[bytes] = []
        began, before = clock(), self._moved
        while waiting or given or taken or cursor is not None:
            asked, waiting = waiting[:some], waiting[some:]
            scans = [layout.scan(at, cursor, _SCAN)] if cursor is not None and not waiting else []
            forgets = [layout.forget(at, taken, since)] if taken else []
            gives = [layout.give(at, asked, since, token, _MOST)] if asked else []
            takes = [layout.take(node, gifts, since, token) for node, gifts in _sorted(given, new)]
            replies = iter((yield from self._say([*forgets, *scans, *gives, *takes])))
            for _ in forgets:
                next(replies)
                self._moved += len(taken)
            for _ in scans:
                cursor, keys = next(replies)
                cursor = cursor if cursor != b"0" else None
                # It has those too that are set aside just now.
                busy = {*asked, *(gift.key for gift in given)}
                waiting = [key for key in leaving(keys) if key not in busy]
                self._seen += len(keys)
            found = next(replies) if gives else Given([], 0)
            if found is None or not all(replies):
                yield from self._lost()
            waiting = [*asked[found.looked :], *waiting]
            taken, given = [gift.key for gift in given], found.gifts
            self._tell(TRANSIT)
            yield from self._renew()
            if self._rate:
                ahead = (self._moved - before) / self._rate - (clock() - began)
                if ahead > 0:
                    yield Sleep(min(ahead, _RENEW))

    # What all movers need

    def _claim(self) -> Steps[None]:
        """Become the mover: of all nodes, in the order of names, or of none."""
        how = "force" if self._force else ""
        for name in sorted(self._names):
            found = yield from ask_all(
                [self._layout.claim(self._nodes.open(name), self._token, _TTL, how)]
            )
            other = found[0].result()
            if other is not None:
                raise UsageError(
                    f"somebody else is moving keys ({other[0]} on node {name}); if that one is "
                    f"gone, it is over in {other[1]:.0f} s"
                )
        self._said_at = clock()

    def _renew(self, *, now: bool = False) -> Steps[None]:
        if now or clock() - self._said_at > _RENEW:
            # Not if it is nobody's: who was stopped for longer than that does not know who was the
            # mover meanwhile.
            others = yield from self._on_all(self._layout.claim, self._token, _TTL, "renew")
            if any(outcome.value is not None for outcome in others):
                raise self._overtaken()
            self._said_at = clock()

    def _lost(self) -> Steps[None]:
        """Raise why a node knows nothing of the move."""
        yield from self._renew(now=True)  # raises, if somebody else has ended it
        raise UnavailableError(LOST)

    def _publish(
        self,
        state: str,
        placement: Placement,
        target: Placement | None,
        tell: Iterable[str] = (),
    ) -> Steps[None]:
        """Store the next version on all nodes."""
        before = self._topology()
        version = before.version + 1
        since = version if before.state == CLOSING else before.since
        topology = Topology(version, {}, placement, state, target, since)
        # Of nodes that were removed nothing is said any more; of those that were moved, where to.
        addresses = {name: self._nodes.shown(name) for name in topology.nodes}
        topology = topology._replace(addresses=addresses)
        for name in sorted(set(tell) | set(topology.nodes)):
            (outcome,) = yield from ask_all(
                [self._layout.tell(self._nodes.open(name), topology, self._token)]
            )
            stored = outcome.result()
            if stored is None or stored[0] != topology.stamp(name):
                raise self._overtaken()
        self._known = self._nodes.adopt(topology)

    def _fence(self) -> Steps[None]:
        """Return when no connection to any node goes by an older version."""
        version = self._topology().version
        names = self._names
        end = clock() + self._drain
        #: Those whose wait was ended, and when: they have a moment to learn why.
        woken: dict[tuple[str, int], float] = {}
        while True:
            lists = yield from self._each(self._layout.clients, among=names)
            old = [
                (name, client)
                for name, clients in zip(names, lists, strict=True)
                for client in clients
                if client.version < version and client.db == self._nodes.db(name)
            ]
            if not old:
                return
            now = clock()
            if now >= end:
                commands = []
                for name, client in old:
                    if client.blocked and (name, client.id) not in woken:
                        woken[name, client.id] = now
                        commands.append(self._layout.wake(self._nodes.open(name), client))
                    elif now - woken.get((name, client.id), 0.0) > _WAKING:
                        commands.append(self._layout.kill(self._nodes.open(name), client))
                yield from ask_all(commands)
            yield from self._renew()
            yield Sleep(_LOOK)

    def _learn(self, without: str = "") -> Steps[None]:
        """Learn what is stored; `without` names a node that is not to be waited for."""
        yield from self._nodes.refresh(without)
        self._known = self._nodes.view

    def _topology(self) -> Topology:
        assert self._known is not None
        return self._known.topology

    def _overtaken(self) -> UsageError:
        return UsageError(
            "this mover was stopped for too long, or somebody else moves keys by now: it has "
            "stopped. If keys are still moving, go on with the move once more"
        )

    def _tell(self, state: str) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(state, self._seen, self._moved))

    def _each(self, make: Any, *args: Any, among: Iterable[str]) -> Steps[list[Any]]:
        """Say something to some nodes, over connections that no fence ends."""
        commands = [make(self._nodes.open(name), *args) for name in among]
        outcomes = yield from ask_all(commands)
        return [outcome.result() for outcome in outcomes]

    def _on_all(self, make: Any, *args: Any, **more: Any) -> Steps[list[Outcome[Any]]]:
        commands = [make(self._nodes.open(name), *args, **more) for name in self._names]
        return (yield from ask_all(commands))

    def _say(self, commands: Sequence[Command[Any]]) -> Steps[list[Any]]:
        """Say something to some nodes, as long as what this mover goes by is the newest."""
        outcomes: list[Outcome[Any]] = yield Ask(commands, self._known)
        if any(isinstance(outcome.error, Overtaken) for outcome in outcomes):
            raise self._overtaken()
        return [outcome.result() for outcome in outcomes]


def _leaving(
    name: str, old: Placement, new: Placement
) -> Callable[[Sequence[bytes]], Sequence[bytes]]:
    """Return what picks the keys that are to leave a node."""
    if isinstance(old, SlotTable) and isinstance(new, SlotTable):
        leaves = [was == name != will for was, will in zip(old.by_slot, new.by_slot, strict=True)]
        return lambda keys: list(itertools.compress(keys, at_slots(keys, leaves)))
    return lambda keys: [
        key for key in keys if old.node_for(key) == name and new.node_for(key) != name
    ]


def _sorted(gifts: Iterable[Gift], new: Placement) -> Iterable[tuple[Address, list[Gift]]]:
    """Return gifts by the node that is to take them."""
    groups: dict[Address, list[Gift]] = {}
    for gift in gifts:
        groups.setdefault(address(new.node_for(gift.key)), []).append(gift)
    return groups.items()
