"""Which node a command goes to, where there are several: what `Talk` and the drivers rely on.

A `View` is what was known at one moment, and does not change: whoever plans by it says so on the
connection, and whoever has told a connection of a newer one does not use an older one on it. The
slots of a Redis Cluster, whose nodes redirect, need none of that: their version is always 0. Nodes
that know nothing of each other cannot redirect, and what moves keys between them must be able to
see (`CLIENT LIST`) by which table every connection goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from redishacks._command import Command, Steps
from redishacks._transport._settings import Settings
from redishacks._transport._wire import Address, Words

#: Seconds after which a connection is asked again whether there is a newer view.
COURTESY = 0.25

#: What becomes of keys that are moving: wait until it begins, or pull them to their new node first.
WAIT, PULL = "wait", "pull"


#: Nodes, and for each slot the place of its own among them.
Table = tuple[Sequence[Address], Sequence[int]]


class View(Protocol):
    """Which node has which key, by one version of what is known."""

    @property
    def version(self) -> int:
        """Told to every connection that it is gone by; 0 when that is not needed."""

    @property
    def settled(self) -> bool:
        """No key is moving."""

    @property
    def table(self) -> Table | None:
        """The node of each slot, for who sends many; None when they cannot be told so."""

    def route(self, keys: Sequence[bytes], avoid: Address | None = None) -> Address:
        """Return the node for a command; without keys any but the one to avoid.

        Raises `CrossNodeError` when it would be several.
        """

    def moving(self, keys: Sequence[bytes]) -> str | None:
        """Return what has to come before a command: `WAIT`, `PULL`, or None for nothing."""

    def pull(self, keys: Sequence[bytes]) -> Steps[None]:
        """Bring keys to the node that `route` names; raises what hinders it."""


class Routes(Protocol):
    """What is known of several nodes; it is read when it is doubted, and before its first use."""

    #: To be read again before its next use.
    stale: bool
    #: Channels of `SPUBLISH` belong to slots; else each node has its own.
    shards: bool

    @property
    def view(self) -> View | None:
        """What is known; None before it was first read."""

    def doubt(self, node: Address | None = None) -> None:
        """Have it read again before its next use; not from this node, if it can be helped."""

    def due(self, now: float) -> bool:
        """Whether it is time to read it again, for one of those that find it out of date."""

    def refresh(self) -> Steps[None]:
        """Read it, by commands for named nodes; errors of nodes are not raised, all else is."""

    def nodes(self) -> frozenset[Address]:
        """Return every node that may be asked for something."""

    def every(self) -> dict[str, Address]:
        """Return the nodes that have keys, by name."""

    def counts(self) -> dict[str, int]:
        """Return how many slots each has; nothing when it is not slots that decide."""

    def kept(self, words: Words) -> Command[Any] | None:
        """Return what must be said instead of something that would make a node forget itself."""

    def visible(self, keys: list[bytes]) -> list[bytes]:
        """Return keys of a node as its users know them: without those that are not theirs."""

    def aside(self, pattern: bytes) -> bytes:
        """Return what the names match while keys move that a pattern is for."""

    def settings(self, address: Address, usual: Settings) -> Settings:
        """Return how to reach a node."""

    def where(self, keys: Sequence[bytes]) -> str:
        """Name the node for these keys; empty when it could be any."""

    def redirected(self, code: str, rest: str, asked: Address) -> Address | None:
        """Take a node's word for another one; None when nodes should not say so."""

    @property
    def troubled(self) -> bool:
        """Whether any node did not answer lately."""

    def failed(self, node: Address, *, silent: bool) -> None:
        """Take note that a node cannot be reached, or was `silent` for longer than it may."""

    def fine(self, node: Address) -> None:
        """Take note that a node has answered."""

    def broken(self, node: Address, patience: float) -> str | None:
        """Return why a node is not asked for now; None for one that is.

        Also to try it again, for one caller in the time that it has `patience`.
        """

    def silent(self, node: Address) -> bool:
        """Whether a node did not answer when it was asked last."""

    def instead(self, node: Address) -> Address:
        """Return a node that has answered, for what any node may be asked; this one if it can."""

    def told(self, view: View) -> Sequence[Words]:
        """Return what a connection is told when a view is gone by on it, and every now and then."""

    def heard(self, address: Address, replies: Sequence[Any]) -> None:
        """Take the replies to that."""


class Standing(Protocol):
    """What a connection was told."""

    #: The version of the view that was gone by last.
    version: int
    #: When it is to be told again.
    due: float


def settings_for(routes: Routes | None, usual: Settings, command: Command[Any]) -> Settings:
    """Return how to reach the node of a command, for a connection of one's own."""
    view = routes.view if routes is not None else None
    if routes is None or view is None:
        return usual
    return routes.settings(command.node or view.route(command.keys), usual)
