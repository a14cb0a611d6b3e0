"""A breaker: a server that did not answer is not asked again until a probe finds it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redishacks._command import Command, Outcome
from redishacks.errors import UnavailableError


class Breaker:
    """Nodes that did not answer, each with a harmless command to ask it now and then."""

    def __init__(self) -> None:
        self._probes: dict[str, Command[Any]] = {}

    def __bool__(self) -> bool:
        """Whether there is any node that did not answer."""
        return bool(self._probes)

    def is_open(self, node: str) -> bool:
        """Return whether the node did not answer a moment ago."""
        return node in self._probes

    def check(self, node: str) -> None:
        """Raise `UnavailableError` when the node did not answer a moment ago."""
        if self.is_open(node):
            raise UnavailableError(
                "Redis did not answer a moment ago, and is not asked until it does again"
            )

    def open(self, node: str, probe: Command[Any]) -> None:
        """Take note that a node did not answer."""
        self._probes.setdefault(node, probe)

    def probes(self) -> dict[str, Command[Any]]:
        """Return what to ask of whom, to find out."""
        return dict(self._probes)

    def settle(self, nodes: Sequence[str], outcomes: Sequence[Outcome[Any]]) -> None:
        """Take note of what became of the probes of these nodes."""
        for node, outcome in zip(nodes, outcomes, strict=True):
            if outcome.error is None:
                self._probes.pop(node, None)
