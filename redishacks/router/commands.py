"""What a router says to its nodes about themselves. No I/O here.

On every node:

    rh:r1:{router}:node     hash   version, stamp, topology; no TTL, for it says who has which keys
"""

from __future__ import annotations

from typing import Any

from redishacks import _keys
from redishacks._command import Arg, Command, script
from redishacks.router.topology import Stamp, Topology

#: The tool's letter and the version of its keys.
TOOL = "r1"

#: A node's own stamp and topology; None for a node that nobody has used yet.
Stored = tuple[Stamp, Topology] | None


class Layout:
    """Keys and commands of one router."""

    def __init__(self, prefix: str) -> None:
        self._node = _keys.make(_keys.check_name(prefix, "prefix"), TOOL, "router", "node")

    @property
    def own(self) -> tuple[bytes, ...]:
        """The keys of each node that are the router's own."""
        return (self._node,)

    @property
    def stamp(self) -> tuple[bytes, ...]:
        """The words that read a node's stamp."""
        return b"HGET", self._node, b"stamp"

    def read(self, address: tuple[str, int]) -> Command[Stored]:
        """Read what a node has stored."""
        args = "HMGET", self._node, "stamp", "topology"
        return Command(args, (self._node,), _stored, repeatable=True, node=address)

    def tell(self, address: tuple[str, int], name: str, topology: Topology) -> Command[Stored]:
        """Tell a node of a topology, unless it knows a newer one; says what it knows then."""
        args = str(topology.version), str(topology.stamp(name)), topology.dump()
        return _whole(
            Command(
                args, (self._node,), _stored, script("router_stamp"), repeatable=True, node=address
            )
        )


def _whole(command: Command[Any]) -> Command[Any]:
    """Return a command that carries its script: in the middle of others there is no second try."""
    assert command.script is not None
    head: tuple[Arg, ...] = ("EVAL", command.script.source, str(len(command.keys)))
    return command._replace(args=(*head, *command.keys, *command.args), script=None)


def _stored(reply: list[bytes | None]) -> Stored:
    stamp, topology = reply
    if stamp is None or topology is None:
        return None
    return Stamp.parse(stamp), Topology.load(topology)
