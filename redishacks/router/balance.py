"""How evenly keys, memory and work are spread over the nodes: `balance()`.

balance = router.balance()
print(balance)
balance.skew               # 1.02: the fullest node has 2 % more than its share
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from redishacks._command import Command, Steps, ask_all
from redishacks.errors import RedisHacksError
from redishacks.router._core import Core


class NodeBalance(NamedTuple):
    """What one node has."""

    name: str
    #: Why it did not answer; then all that follows but `expected` is 0.
    error: RedisHacksError | None
    #: Slots, and the share of all that they are; for a placement without slots the mean.
    slots: int
    expected: float
    keys: int
    #: Bytes in use.
    memory: int
    #: Commands per second, as the server averages them.
    ops: int


class Balance(NamedTuple):
    """What all nodes have."""

    version: int
    nodes: tuple[NodeBalance, ...]

    @property
    def skew(self) -> float:
        """By how much the fullest node has more keys than its share: 1 is even."""
        total = sum(node.keys for node in self.nodes)
        shares = [
            node.keys / total / node.expected for node in self.nodes if node.expected and total
        ]
        return max(shares, default=1.0)

    def __str__(self) -> str:
        total = sum(node.keys for node in self.nodes) or 1
        lines = [
            f"{'node':<16}{'slots':>7}{'share':>8}{'keys':>12}{'of all':>8}{'MB':>10}{'ops/s':>8}"
        ]
        for node in self.nodes:
            if node.error is not None:
                lines.append(f"{node.name:<16}{node.slots:>7}{node.expected:>8.1%}  {node.error}")
                continue
            lines.append(
                f"{node.name:<16}{node.slots:>7}{node.expected:>8.1%}{node.keys:>12,}"
                f"{node.keys / total:>8.1%}{node.memory / 1e6:>10.1f}{node.ops:>8,}"
            )
        return "\n".join([*lines, f"skew {self.skew:.2f}"])


def measure(core: Core) -> Steps[Balance]:
    """Ask all nodes; one round trip. A node that does not answer is in it with its error."""
    yield from core.learn()
    every, view = core.routes.every(), core.routes.view
    names = list(every)
    counts = core.routes.counts()
    commands: list[Command[Any]] = []
    for name in names:
        for words in (("DBSIZE",), ("INFO", "memory"), ("INFO", "stats")):
            parse = int if len(words) == 1 else _fields
            commands.append(Command(words, (), parse, repeatable=True, node=every[name]))
    outcomes = yield from ask_all(commands)
    found = []
    for at, name in enumerate(names):
        size, memory, stats = outcomes[3 * at : 3 * at + 3]
        error = next((one.error for one in (size, memory, stats) if one.error is not None), None)
        slots = counts.get(name, 0)
        share = slots / sum(counts.values()) if counts else 1 / len(names)
        if error is not None:
            if not isinstance(error, RedisHacksError):
                raise error
            found.append(NodeBalance(name, error, slots, share, 0, 0, 0))
            continue
        used = int(memory.result()["used_memory"])
        ops = int(stats.result()["instantaneous_ops_per_sec"])
        found.append(NodeBalance(name, None, slots, share, size.result(), used, ops))
    return Balance(view.version if view is not None else 0, tuple(found))


def _fields(reply: bytes) -> Mapping[str, str]:
    pairs = (line.partition(":") for line in reply.decode().splitlines() if ":" in line)
    return {name: value for name, _, value in pairs}
