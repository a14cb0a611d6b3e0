"""What a change of nodes would move, before anything does: `Plan`.

    plan = router.plan({"a": 1, "b": 1, "c": 1, "d": 1})     # weights by name; or only names
    print(plan)                # slots, share of the keys, bytes; what must not be; what takes long
    router.reshard(plan)       # clients go on; see `redishacks.router._move` for how

or `plan.save("plan.json")` and, in a shell, `redishacks reshard plan.json …`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from redishacks._command import Command, Steps, ask_all
from redishacks._keys import id_shown
from redishacks.errors import ServerError, UsageError
from redishacks.router._nodes import Nodes
from redishacks.router.placement import Placement, SlotTable, check_weights
from redishacks.router.topology import SETTLED, read_placement

#: Keys that are looked at, of each node that loses some, to tell what it has.
_SAMPLE = 2_000
#: Bytes from which on a key is named, since nobody is served while it is written out and read in.
_BIG = 64 << 20
#: Bytes per second that a DUMP or a RESTORE comes to, roughly.
_SPEED = 200e6
#: Left-over keys that are named.
_NAMED = 3


class Plan(NamedTuple):
    """What would move."""

    #: Of the topology that it is for.
    version: int
    old: Placement
    new: Placement
    #: How many slots go from whom to whom; empty when it is not slots that decide.
    slots: Mapping[tuple[str, str], int]
    #: Share of all keys, how many those are, and bytes: by a sample of each node's keys.
    share: float
    keys: int
    size: int
    #: Keys so big that a node is silent for a moment: their names, and bytes.
    big: Sequence[tuple[str | bytes, int]]
    #: Why it must not be done as it is.
    refusals: Sequence[str]

    def __str__(self) -> str:
        lines = [
            f"from version {self.version}: {self.share:.1%} of all keys move, about {self.keys:,} "
            f"of {self.size / 1e6:,.1f} MB"
        ]
        lines += [f"  {old} to {new}: {count:,} slots" for (old, new), count in self.slots.items()]
        lines += [
            f"  {key!r} has {size / 1e6:,.0f} MB: about {2 * size / _SPEED:.1f} s of silence"
            for key, size in self.big
        ]
        lines += [f"  refused: {why}" for why in self.refusals]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write it to a file, which has no addresses and no passwords."""
        told = {
            **self._asdict(),
            "old": self.old.describe(),
            "new": self.new.describe(),
            "slots": [[*pair, count] for pair, count in self.slots.items()],
            "big": [[repr(key), size] for key, size in self.big],
        }
        Path(path).write_text(json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote; raises `UsageError` when it is something else."""
        try:
            told = json.loads(Path(path).read_text())
            return cls(
                told["version"],
                read_placement(told["old"]),
                read_placement(told["new"]),
                {(old, new): count for old, new, count in told["slots"]},
                told["share"],
                told["keys"],
                told["size"],
                [(key, size) for key, size in told["big"]],
                told["refusals"],
            )
        except (ValueError, KeyError, TypeError, UnicodeDecodeError):
            raise UsageError(f"{path} is no plan of a router") from None


def wanted(given: Any, old: Placement) -> Placement:
    """Return the placement for weights by name, or names; or one that was given as it is."""
    if hasattr(given, "describe"):
        placement: Placement = given
        return placement
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise UsageError(f"nodes are given as weights by name, or as names, not as {given!r}")
    weights = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, 1)
    for name, each in weights.items():
        if isinstance(each, Mapping):
            weights[name] = each.get("weight", 1)
    checked = check_weights(weights)
    return old.changed(checked) if isinstance(old, SlotTable) else SlotTable.fresh(checked)


def survey(nodes: Nodes, given: Any) -> Steps[Plan]:
    """Look at the nodes and say what a change would move; nothing is changed.

    A scan of the nodes that gain keys, for what does not belong there, and a sample of the others.
    """
    yield from nodes.refresh()
    view = nodes.view
    assert view is not None
    topology = view.topology
    if topology.state != SETTLED:
        raise UsageError("keys are moving already: that must come to its end first")
    old, new = topology.placement, wanted(given, topology.placement)
    unknown = [name for name in new.nodes if name not in nodes.names]
    if unknown:
        raise UsageError(f"node {unknown[0]} was not given to this router")
    total = moving = size = 0
    big: list[tuple[str | bytes, int]] = []
    for name in old.nodes:
        sample = yield from _sample(nodes, name, old, new)
        total += sample.total
        moving += sample.moving
        size += sample.size
        big += sample.big
    gaining = [name for name in new.nodes if _gains(name, old, new)]
    refusals = []
    for name in gaining:
        refusals += yield from _objections(nodes, name, old, size // max(1, len(gaining)))
    slots: dict[tuple[str, str], int] = {}
    if isinstance(old, SlotTable) and isinstance(new, SlotTable):
        for slot in old.moved(new):
            pair = old.by_slot[slot], new.by_slot[slot]
            slots[pair] = slots.get(pair, 0) + 1
    share = moving / total if total else sum(slots.values()) / 16384
    return Plan(topology.version, old, new, slots, share, moving, size, big, refusals)


class _Sample(NamedTuple):
    total: int
    moving: int
    size: int
    big: list[tuple[str | bytes, int]]


def _sample(nodes: Nodes, name: str, old: Placement, new: Placement) -> Steps[_Sample]:
    """Look at some keys of a node: how many there are, and what of them would move."""
    at = nodes.open(name)
    (count,) = yield from _say([Command(("DBSIZE",), node=at, repeatable=True)])
    looked, found = 0, []
    cursor = b"0"
    while looked < _SAMPLE:
        ((cursor, keys),) = yield from _say([nodes.layout.scan(at, cursor, 500)])
        looked += len(keys)
        found += [key for key in keys if old.node_for(key) == name and new.node_for(key) != name]
        if cursor == b"0":
            break
    sizes = yield from _say(
        [Command(("MEMORY", "USAGE", key), (), node=at, repeatable=True) for key in found]
    )
    scale = count / looked if looked and cursor != b"0" else 1
    known = [size or 0 for size in sizes]
    big = [(id_shown(key), size) for key, size in zip(found, known, strict=True) if size >= _BIG]
    total = round(looked * scale)
    return _Sample(total, round(len(found) * scale), round(sum(known) * scale), big)


def _gains(name: str, old: Placement, new: Placement) -> bool:
    if isinstance(old, SlotTable) and isinstance(new, SlotTable):
        return not set(new.slots(name)) <= set(old.slots(name))
    return True


def _objections(nodes: Nodes, name: str, old: Placement, size: int) -> Steps[list[str]]:
    """Return why a node must not get keys."""
    at, found = nodes.open(name), []
    left: list[bytes] = []
    cursor = b"0"
    while len(left) < _NAMED:
        ((cursor, keys),) = yield from _say([nodes.layout.scan(at, cursor, 1_000)])
        left += [key for key in keys if old.node_for(key) != name]
        if cursor == b"0":
            break
    if left:
        shown = ", ".join(repr(id_shown(key)) for key in left[:_NAMED])
        found.append(f"node {name} has keys that do not belong there, such as {shown}: FLUSHDB?")
    (info,) = yield from _say([Command(("INFO", "memory"), (), _info, repeatable=True, node=at)])
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    if limit and used + size > limit:
        found.append(
            f"node {name} has room for {max(0, limit - used) / 1e6:,.0f} MB (maxmemory), and gets "
            f"about {size / 1e6:,.0f} MB"
        )
    others = [other for other in old.nodes if other != name]
    for other in others:
        if not (yield from _understands(nodes, other, name)):
            why = f"node {name} cannot read what node {other} writes out: it is too old"
            found.append(why)
    return found


def _understands(nodes: Nodes, giver: str, taker: str) -> Steps[bool]:
    """Try whether a node restores what another one dumps."""
    key = nodes.layout.trial
    made = Command[Any](("SET", key, "", "PX", "10000"), (), node=nodes.open(giver))
    dump = Command[Any](("DUMP", key), (), node=nodes.open(giver))
    _, dumped = yield from _say([made, dump])
    words = ("RESTORE", key, "1000", dumped, "REPLACE")
    (outcome,) = yield from ask_all([Command[Any](words, (), node=nodes.open(taker))])
    if isinstance(outcome.error, ServerError):
        return False
    outcome.result()
    return True


def _info(reply: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in reply.decode().splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}


def _say(commands: Sequence[Command[Any]]) -> Steps[list[Any]]:
    outcomes = (yield from ask_all(commands)) if commands else []
    return [outcome.result() for outcome in outcomes]
