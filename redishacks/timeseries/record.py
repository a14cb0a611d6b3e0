"""What a name is in use with, as noted in Redis by whoever wrote first.

    record, now = drive(look_up("rh", "hits"), transport)

For those who do not know it beforehand, as the command line: the kind of the series, partitions and
resolutions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from redishacks import _keys
from redishacks._command import Command, Steps, ask_all
from redishacks.timeseries.resolution import Ladder, Rung

#: The tool's letter and the version of its keys.
TOOL = "t1"


class Record(NamedTuple):
    """What everybody agrees on who writes or reads a name."""

    kind: str
    partitions: int
    rungs: Ladder
    #: All that is noted, by its name there.
    fields: dict[str, str]


def look_up(prefix: str, name: str) -> Steps[tuple[Record | None, float]]:
    """Return a name's record, None if nobody has written, and the server's time in seconds.

    One round trip.
    """
    quoted = _keys.check_name(name, "a series' name")
    meta = _keys.make(_keys.check_name(prefix, "prefix"), TOOL, f"{quoted}/0", "meta")
    record, now = yield from ask_all(
        [
            Command(("HGETALL", meta), (meta,), parse, repeatable=True),
            Command[Any](("TIME",), (meta,), repeatable=True),
        ]
    )
    seconds, micros = map(int, now.result())
    return record.result(), seconds + micros / 1e6


def parse(reply: Any) -> Record | None:
    """Return a record as HGETALL replies it; None if there is none."""
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    fields = {field.decode(): value.decode() for field, value in pairs}
    if not fields:
        return None
    rungs = [
        Rung(int(field[2:]), *map(int, value.split()))
        for field, value in fields.items()
        if field.startswith("r ")
    ]
    return Record(fields["kind"], int(fields["partitions"]), tuple(sorted(rungs)), fields)
