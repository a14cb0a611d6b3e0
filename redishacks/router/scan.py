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
        self._match = None if match is None else core.dialect.encode(match)
        words: list[bytes] = []
        for name, value in ((b"COUNT", count), (b"TYPE", type_)):
            if value is not None:
                words += name, core.dialect.encode(value)
        self._words = tuple(words)
        #: What is left of this pass: nodes, and patterns of names.
        self._nodes: list[tuple[str, bytes | None]] = []
        self._cursor = b"0"
        self._version = -1
        #: How many passes must follow.
        self._more = 1

    def page(self) -> Steps[list[Any] | None]:
        """Return some more keys; None at the end. One round trip."""
        yield from self._core.learn()
        routes = self._core.routes
        if not self._nodes:
            view = routes.view
            version = view.version if view is not None else 0
            if not self._more and version == self._version:
                return None
            # A key that moves may be on neither node when that is looked at. So a pass in the
            # course of a move is followed by two more: whatever is aside at the end of the first
            # and the beginning of the third is so throughout the second, and seen there.
            settled = view is None or view.settled
            if settled:
                self._more = 0
            elif version == self._version:
                self._more -= 1
            else:
                self._more = 2
            self._version = version
            patterns = [self._match]
            if not settled and self._match is not None:
                patterns.append(routes.aside(self._match))
            self._nodes = [(name, pattern) for name in routes.every() for pattern in patterns]
        name, pattern = self._nodes[0]
        node = routes.every().get(name)
        if node is None:  # it was taken out meanwhile
            del self._nodes[0]
            self._cursor = b"0"
            return []
        matching = () if pattern is None else (b"MATCH", pattern)
        command: Command[Any] = Command(
            (b"SCAN", self._cursor, *matching, *self._words), (), repeatable=True, node=node
        )
        self._cursor, keys = yield from ask(command)
        if self._cursor == b"0":
            del self._nodes[0]
        decode = self._core.dialect.decode
        found = routes.visible(keys)
        return [decode(key) for key in found] if self._core.dialect.decodes else found
