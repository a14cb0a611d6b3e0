"""`scan_iter` over all nodes: every key that is there throughout is returned at least once.

Keys that move while it goes on may be returned twice. What the router keeps for itself is left out.
"""

from __future__ import annotations

from typing import Any

from redishacks._command import Command, Steps, ask
from redishacks.router._core import Core


class Scan:
    """One pass over the nodes, and another one when keys have moved meanwhile."""

    def __init__(self, core: Core, match: Any, count: int | None, type_: str | None) -> None:
        self._core = core
        words: list[bytes] = []
        for name, value in ((b"MATCH", match), (b"COUNT", count), (b"TYPE", type_)):
            if value is not None:
                words += name, core.dialect.encode(value)
        self._words = tuple(words)
        self._nodes: list[str] = []
        self._cursor = b"0"
        self._version = -1
        self._passed = False

    def page(self) -> Steps[list[Any] | None]:
        """Return some more keys; None at the end. One round trip."""
        yield from self._core.learn()
        routes = self._core.routes
        if not self._nodes:
            view = routes.view
            version = view.version if view is not None else 0
            if self._passed and version == self._version:
                return None
            # A key that moved may have been on neither node when that was looked at. So a pass in
            # the course of a move is followed by one more; by then it is where it went.
            self._passed = view is None or view.settled or version == self._version
            self._version = version
            self._nodes = list(routes.every())
        name = self._nodes[0]
        node = routes.every().get(name)
        if node is None:  # it was taken out meanwhile
            del self._nodes[0]
            self._cursor = b"0"
            return []
        command: Command[Any] = Command(
            (b"SCAN", self._cursor, *self._words), (), repeatable=True, node=node
        )
        self._cursor, keys = yield from ask(command)
        if self._cursor == b"0":
            del self._nodes[0]
        decode = self._core.dialect.decode
        found = routes.visible(keys)
        return [decode(key) for key in found] if self._core.dialect.decodes else found
