"""A batch as each node is told of it: runs of GET as one MGET, and of plain SET as one MSET.

What several commands come to must be what each would have come to. So a run ends at any other
command for its node. An MGET gives nil where GET fails with WRONGTYPE: in the same write EXISTS
counts its keys, and when those are not as many as the values, all are read singly. An MSET that was
refused is said again singly. Both come before anything later that touches one of the run's keys is
sent: that is in the node's next stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from redishacks._command import Command, Outcome, as_is
from redishacks._transport import Address
from redishacks.errors import ServerError

#: Commands of a batch that may be said together, and those that may not.
GET, SET, OTHER = "GET", "SET", "other"
#: Parts of one call, which takes several keys: values in order, none for what is no string; sums.
MGET, SUMS = "MGET", ("DEL", "UNLINK", "EXISTS", "TOUCH")
#: What comes before a key in a command, and before one that is read by a GET of its own, by length:
#: twice as fast as to pack them one by one.
_HEADS = [b"$%d\r\n" % length for length in range(256)]
_GETS = [b"*2\r\n$3\r\nGET\r\n" + head for head in _HEADS]
_READS = GET, MGET, "EXISTS"


class Call(NamedTuple):
    """A command of a batch."""

    kind: str
    command: Command[Any]
    #: Of a plain SET.
    value: bytes = b""


class Run(NamedTuple):
    """What is said to a node as one command, for one or several of the batch."""

    kind: str
    #: Places in the batch.
    places: list[int]
    keys: list[bytes]
    values: list[bytes]
    #: Its command, when it is one.
    single: Command[Any]


def stages(calls: Sequence[tuple[int, Call]]) -> list[list[Run]]:
    """Cut what goes to one node, in order, into stages of runs."""
    stage: list[Run] = []
    found = [stage]
    #: Keys of merged runs of this stage.
    read: set[bytes] = set()
    written: set[bytes] = set()
    run: Run | None = None
    for place, call in calls:
        kind, keys = call.kind, call.command.keys
        if run is not None and (kind is not run.kind or kind is OTHER):
            if len(run.places) > 1:
                (read if run.kind in _READS else written).update(run.keys)
            run = None
        if (read or written) and (
            not keys
            or not written.isdisjoint(keys)
            or (kind not in _READS and not read.isdisjoint(keys))
        ):
            stage, run = [], None
            found.append(stage)
            read.clear()
            written.clear()
        if run is None:
            run = Run(kind, [place], list(keys), [call.value], call.command)
            stage.append(run)
        else:
            run.places.append(place)
            run.keys.append(keys[0])
            run.values.append(call.value)
    return found


def command(run: Run) -> Command[Any]:
    """Return what a run is said as; its value is a list when it is several commands."""
    kind, keys = run.kind, tuple(run.keys)
    if len(run.places) == 1:
        return run.single
    if kind is GET:
        return gets(keys)
    if kind is MGET:
        return Command(("MGET", *keys), keys, repeatable=True)
    if kind is SET:
        pairs = itertools.chain.from_iterable(zip(run.keys, run.values, strict=True))
        return Command(("MSET", *pairs), keys, lambda reply: [reply] * len(keys))
    # How many of them it was is of no interest: they are parts of one call.
    return Command(
        (kind, *keys),
        keys,
        lambda reply: [reply] + [0] * (len(keys) - 1),
        repeatable=kind in _READS,
    )


def gets(keys: Sequence[bytes], node: Address | None = None) -> Command[list[bytes | None] | None]:
    """Return several GETs as one command; its value is None when they must be said singly."""
    count, tail = len(keys) + 1, _packed(keys, _HEADS)
    data = b"*%d\r\n$4\r\nMGET\r\n%b*%d\r\n$6\r\nEXISTS\r\n%b" % (count, tail, count, tail)
    return Command(("MGET",), tuple(keys), _values, None, True, False, data, node, 2)


def each_get(keys: Sequence[bytes]) -> Command[list[Any]]:
    """Return GETs that are said at once, to the node of the first; errors are among the values."""
    data = _packed(keys, _GETS)
    return Command(
        ("GET",), (keys[0],), as_is, None, True, packed=data, replies=len(keys), apart=True
    )


def _packed(keys: Sequence[bytes], heads: Sequence[bytes]) -> bytes:
    """Return keys as they are written, each after the head for its length."""
    try:
        return b"\r\n".join([heads[len(key)] + key for key in keys]) + b"\r\n"
    except IndexError:  # longer than most
        sized = ((heads[0].replace(b"$0", b"$%d" % len(key)), key) for key in keys)
        return b"".join([b"%b%b\r\n" % pair for pair in sized])


def _values(replies: Sequence[Any]) -> list[bytes | None] | None:
    """Return the values of an MGET, or None when each key has to be asked for."""
    values, there = replies
    if type(values) is not list:
        return None  # not permitted, perhaps for one of the keys
    return values if len(values) - values.count(None) == there else None


def singly(run: Run, outcome: Outcome[Any]) -> bool:
    """Return whether nothing is known of the commands of a run, which each must be said again."""
    if len(run.places) == 1:
        return False
    if run.kind is GET:
        return outcome.error is None and outcome.value is None
    return run.kind is SET and isinstance(outcome.error, ServerError)
