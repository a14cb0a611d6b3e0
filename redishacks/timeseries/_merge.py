"""Merging a series into another one, so that everything is counted once, whatever happens.

The buckets of the source are renamed, all at once, and a note is made of that. Then they are added
to the target, a day after the other (a bucket of the coarsest resolution), each with a number that
the target's fence notes down. At last they are dropped. Whoever comes to it again, after a crash or
at the same time, finds the note and goes on.
"""

from __future__ import annotations

import secrets

from redishacks import _keys
from redishacks._command import Steps, ask
from redishacks._keys import Id
from redishacks.errors import MaybeAppliedError, UnavailableError, UsageError
from redishacks.timeseries._contents import contents, packs
from redishacks.timeseries.commands import Buckets, Folded, Layout

_TRIES = 20


def merge(layout: Layout, source: Id, target: Id) -> Steps[None]:
    """Add all that is in a series to another, and leave nothing of it."""
    from_, to = _keys.id_bytes(source, "series"), _keys.id_bytes(target, "series")
    if from_ == to:
        raise UsageError(f"a series is merged into another one, not {source!r} into itself")
    for _ in range(_TRIES):
        yield from layout.agree()
        ours = secrets.token_hex(8)
        try:
            moved = yield from ask(layout.move(from_, ours, to, packs(layout)))
        except MaybeAppliedError:
            continue  # if it was, it is what is under way now
        if moved is None:
            continue  # it came so late that there may be other resolutions
        batch, where = moved
        yield from _finish(layout, from_, batch, where)
        if batch == ours:  # else that was what somebody had begun before
            return
    raise UnavailableError(
        f"series {_keys.id_shown(from_)!r}: others begin to merge it all the time; nothing is lost"
    )


def _finish(layout: Layout, source: bytes, batch: str, target: bytes) -> Steps[None]:
    """Add what was taken away from a series to another, and drop it."""
    some = packs(layout)
    found = yield from contents(layout, some, lambda *at: layout.moved(source, batch, *at))
    windows: dict[int, Folded] = {}
    coarsest = layout.rungs[-1].step
    for one in found:
        for (place, member), amounts in one.entries.items():
            folded = windows.setdefault(one.begins(place) // coarsest, {})
            buckets = folded.setdefault(Buckets(one.rung, target, one.pack), {})
            buckets[place, member] = amounts
    for number, folded in sorted(windows.items()):
        yield from layout.agree()
        fence = (f"m{batch}", number)
        applied = yield from ask(
            layout.put(folded, fence=fence, keep=layout.longest, all_expired=True)
        )
        layout.learn(applied.now)
        if applied.code == -1:
            raise layout.late()
        if applied.code == -2:
            raise UsageError(
                f"series {_keys.id_shown(target)!r}: {layout.kind.limit}; what of "
                f"{_keys.id_shown(source)!r} is not merged yet is kept: merge again when there is "
                "room"
            )
    yield from ask(layout.drop(source, batch, some))
    # Whoever does the same at this moment must still find it.
    yield from ask(layout.fade(target, f"m{batch}"))
