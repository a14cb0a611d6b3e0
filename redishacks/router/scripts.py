"""Lua scripts of users: called by their hash, sent whole once to a node that does not know them.

double = router.register_script("return redis.call('INCRBY', KEYS[1], ARGV[1] * 2)")
double(keys=["user:1"], args=[21])
with router.map() as m:
    reply = double(keys=["user:2"], args=[4], client=m)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from redishacks._command import Command, Script
from redishacks.errors import UsageError
from redishacks.router._core import Core


class RouterScript:
    """A script that goes where its keys are. It needs at least one."""

    def __init__(self, core: Core, source: str | bytes, say: Callable[[Command[Any]], Any]) -> None:
        raw = source.encode() if isinstance(source, str) else source
        digest = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
        self._script = Script(f"script {digest[:8]}", raw, digest.encode())
        self._core = core
        self._say = say
        #: As redis-py's.
        self.script, self.sha = source, digest

    def __call__(
        self, keys: Sequence[Any] = (), args: Sequence[Any] = (), client: Any = None
    ) -> Any:
        """Run it: its value, to be awaited on an `AsyncRouter`; a `Reply` with a batch as `client`.

        Raises `UsageError` without keys, and `CrossNodeError` when they are on several nodes.
        """
        if not keys:
            raise UsageError("a script without keys is for no node: fanout().eval(…)")
        encode = self._core.dialect.encode
        raws = tuple(map(encode, keys))
        parse = self._core.dialect.parse("EVALSHA", {})
        command = Command(tuple(map(encode, args)), raws, parse, self._script)
        return self._say(command) if client is None else client.execute_command(command)
