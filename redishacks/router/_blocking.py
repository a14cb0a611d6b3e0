"""Commands that wait for something, as BLPOP: said for a second at a time, as long as is wanted.

So a wait moves on with its key when that moves to another node, and a connection is never held for
long by a table that is out of date.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from redishacks._clock import clock
from redishacks._command import Command, Sleep, Steps, ask_all, call
from redishacks._transport import Overtaken
from redishacks.errors import ServerError, UsageError
from redishacks.router._core import Core, Said
from redishacks.router._dialect import value_of

#: Seconds of one word.
_SLICE = 1.0
#: Seconds before a wait is begun anew where keys are moving.
_PAUSE = 0.01
_PING = (b"PING",)
#: Which word says for how long, in seconds.
_LAST = {b"BLPOP", b"BRPOP", b"BZPOPMIN", b"BZPOPMAX", b"BRPOPLPUSH", b"BLMOVE"}
_FIRST = {b"BLMPOP", b"BZMPOP"}
#: Those that wait where an option says so, in milliseconds.
_OPTION = {b"XREAD", b"XREADGROUP"}


def wait(core: Core, said: Said, deadline: float) -> Steps[Any]:
    """Say a call that waits, until there is something or its time is over."""
    words, parse = said
    command = yield from core.command(said)
    what = _Wait((yield from _pinned(words, command.keys)))
    end = None if what.patience is None else clock() + what.patience
    while True:
        talk = yield from call(core.transport.converse, command.keys, deadline)
        try:
            if talk.due:
                # With the word that waits, what its node says of itself would be heard too late.
                yield from call(talk.ask, [_PING], deadline)
                if core.routes.stale:
                    yield Sleep(_PAUSE)
                    continue
            now, seconds = what.slice(None if end is None else end - clock())
            began = clock()
            (reply,) = yield from call(talk.ask, [now], seconds + deadline)
        except Overtaken:
            if end is not None and clock() >= end:
                raise
            yield Sleep(_PAUSE)  # a slot of a cluster that moves says so until it has moved
            continue
        finally:
            talk.close()
        if reply is None and clock() - began < seconds / 2:
            core.routes.doubt()  # whoever moves keys has ended the wait
        if reply is not None or (end is not None and clock() >= end):
            return value_of(reply, parse)


class _Wait:
    """A command that waits, and how long it still may."""

    def __init__(self, words: tuple[bytes, ...]) -> None:
        self._words = list(words)
        self._at = _place(words)
        self._unit = 1000 if words[0].upper() in _OPTION else 1
        text = words[self._at] if self._at is not None else b""
        try:
            given = float(text) / self._unit if self._at is not None else 0.0
        except ValueError:
            raise UsageError(f"{words[0].decode()}: a timeout is a number") from None
        if given < 0 or given != given:
            raise UsageError(f"{words[0].decode()}: a timeout is 0, for ever, or more")
        #: Seconds, None for ever.
        self.patience: float | None = given or None

    def slice(self, left: float | None) -> tuple[tuple[bytes, ...], float]:
        """Return the words for the next second, or for what is left; and how long that is."""
        seconds = _SLICE if left is None else min(_SLICE, max(left, 0.001))
        words = list(self._words)
        if self._at is not None:
            if self._unit == 1:
                words[self._at] = b"%.3f" % seconds
            else:
                words[self._at] = b"%d" % max(1, round(seconds * 1000))
        return tuple(words), seconds


def _pinned(words: tuple[bytes, ...], keys: Sequence[bytes]) -> Steps[tuple[bytes, ...]]:
    """Return a call that means the same a second later: for `$` the id that is the last now."""
    if words[0].upper() != b"XREAD" or b"$" not in words[-len(keys) :]:
        return words
    ids = list(words[-len(keys) :])
    for at, key in enumerate(keys):
        if ids[at] == b"$":
            question = Command[Any]((b"XINFO", b"STREAM", key), (key,), repeatable=True)
            (outcome,) = yield from ask_all([question])
            if isinstance(outcome.error, ServerError) and "no such key" in str(outcome.error):
                ids[at] = b"0-0"
                continue
            found = outcome.result()
            pairs = found.items() if isinstance(found, dict) else _pairs(found)
            fields = dict(pairs)
            ids[at] = fields[b"last-generated-id"]
    return (*words[: -len(keys)], *ids)


def waits(words: Sequence[bytes]) -> bool:
    """Return whether a call may wait."""
    return _place(words) is not None


def _place(words: Sequence[bytes]) -> int | None:
    name = words[0].upper()
    if name in _LAST:
        return len(words) - 1
    if name in _FIRST:
        return 1
    if name in _OPTION:
        at = 1
        while at < len(words) - 1:
            word = words[at].upper()
            if word == b"STREAMS":
                return None
            if word == b"BLOCK":
                return at + 1
            at += 3 if word == b"GROUP" else 1  # names, which may be any words
    return None


def _pairs(flat: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)
