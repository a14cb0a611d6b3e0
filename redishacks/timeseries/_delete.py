"""Deleting a range of a series from every resolution.

Buckets inside the range go. Coarser ones that the range begins or ends in lose what finer ones say
was in the range: sums and histograms are subtracted, by one script that writers need not wait for;
all else is made anew of the finer buckets that stay, unless somebody writes to it meanwhile: then
it is tried again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from redishacks import _keys
from redishacks._command import Steps, ask
from redishacks._keys import Id
from redishacks._units import Instant
from redishacks.errors import RetentionError, UnavailableError, UsageError
from redishacks.timeseries._contents import Found, contents, packs
from redishacks.timeseries._kind import Amounts, Entries
from redishacks.timeseries._range import range_of
from redishacks.timeseries.commands import SKEW, Buckets, Folded, Layout
from redishacks.timeseries.plan import plan
from redishacks.timeseries.resolution import Rung

#: Tries while others write: each takes a millisecond or two.
_TRIES = 200

#: A bucket, by its resolution and when it begins; and what is in some: amounts by member.
_Bucket = tuple[Rung, int]
_Held = Mapping[_Bucket, Mapping[bytes, Amounts]]


def delete(layout: Layout, key: Id, start: Instant, end: Instant) -> Steps[None]:
    """Delete what was counted from `start` to before `end`."""
    raw = _keys.id_bytes(key, "series")
    low, high = range_of(start, end)
    for _ in range(_TRIES):
        yield from layout.agree()
        now = int(layout.now())
        first = max(low, min(rung.horizon(now) for rung in layout.rungs))
        until = -(-(now + SKEW) // layout.step) * layout.step
        last = until if high is None else min(high, until)
        if last <= first:
            return
        if first % layout.step or last % layout.step:
            raise UsageError(
                f"what is deleted begins and ends at multiples of {layout.step} s, the finest "
                f"resolution, not at {start!r} and {end!r}"
            )
        way = _subtract if layout.kind.subtracts else _rebuild
        if (yield from way(layout, raw, _Cut(layout, first, last, now))):
            return
    raise UnavailableError(
        f"series {_keys.id_shown(raw)!r}: others write to it all the time; nothing was deleted"
    )


class _Cut:
    """A range, and the buckets that it holds, wholly or in part."""

    def __init__(self, layout: Layout, first: int, last: int, now: int) -> None:
        self.first, self.last = first, last
        self._layout, self._now = layout, now
        coarsest = layout.rungs[-1].step
        #: The keys of all buckets that it touches, and of the finer ones that those are made of.
        self.packs = packs(layout, first // coarsest * coarsest, -(-last // coarsest) * coarsest)

    def holds(self, begins: int, ends: int) -> bool:
        """Return whether all of a time is in the range."""
        return self.first <= begins and ends <= self.last

    def touches(self, begins: int, ends: int) -> bool:
        """Return whether some of a time is in the range."""
        return self.first < ends and begins < self.last

    def partly(self) -> list[_Bucket]:
        """Return the buckets that the range begins or ends in."""
        found: dict[_Bucket, None] = {}
        for rung in self._layout.rungs:
            for edge in (self.first, self.last):
                begins = edge // rung.step * rung.step
                if begins != edge and begins >= rung.horizon(self._now):
                    found[rung, begins] = None
        return list(found)

    def gone(self, rung: Rung, begins: int) -> list[_Bucket]:
        """Return the finer buckets of one that are in the range."""
        return self._finer(rung, max(self.first, begins), min(self.last, begins + rung.step))

    def left(self, rung: Rung, begins: int) -> list[_Bucket]:
        """Return the finer buckets of one that are not in the range."""
        ends = begins + rung.step
        return [
            *self._finer(rung, begins, max(self.first, begins)),
            *self._finer(rung, min(self.last, ends), ends),
        ]

    def _finer(self, than: Rung, from_: int, to: int) -> list[_Bucket]:
        finer = [rung for rung in self._layout.rungs if rung.step < than.step]
        # What begins within the next minute may have hits as well, and what is later has none.
        to = min(to, -(-(self._now + SKEW) // finer[0].step) * finer[0].step)
        if from_ >= to:
            return []
        made = plan(finer, from_, to, max(self._now, to - 1))
        if (made.start, made.end) != (from_, to):
            raise RetentionError(
                f"series {self._layout.full_name}: from {from_} to {to} nothing is there that is "
                f"finer than {than.step} s; nothing was deleted"
            )
        return [
            (tile.rung, begins)
            for tile in made.tiles
            for begins in range(tile.start, tile.end, tile.rung.step)
        ]


def _held(found: Iterable[Found]) -> _Held:
    held: defaultdict[_Bucket, dict[bytes, Amounts]] = defaultdict(dict)
    for one in found:
        for (place, member), amounts in one.entries.items():
            held[one.rung, one.begins(place)][member] = amounts
    return held


def _folded(layout: Layout, held: _Held, buckets: Iterable[_Bucket]) -> dict[bytes, Amounts]:
    """Return what some buckets come to together."""
    into: Entries = {}
    for bucket in buckets:
        layout.kind.fold(into, {(0, member): some for member, some in held.get(bucket, {}).items()})
    return {member: amounts for (_, member), amounts in into.items()}


def _subtract(layout: Layout, raw: bytes, cut: _Cut) -> Steps[bool]:
    """Take away what is in the range; False when somebody else did so at the same time."""
    fence = "d" + _keys.quote_bytes(raw)
    before = yield from ask(layout.fenced(raw, fence))
    found = yield from contents(layout, cut.packs, lambda *at: layout.at(raw, *at))
    held = _held(found)
    taken = {
        (rung, begins): members
        for (rung, begins), members in held.items()
        if cut.holds(begins, begins + rung.step)
    }
    taken |= {bucket: _folded(layout, held, cut.gone(*bucket)) for bucket in cut.partly()}
    folded: Folded = {}
    for (rung, begins), members in sorted(taken.items()):
        pack, rest = divmod(begins, rung.span)
        for member, amounts in members.items():
            into = folded.setdefault(Buckets(rung, raw, pack), {})
            into[rest // rung.step, member] = layout.kind.less(amounts)
    if not folded:
        return True
    applied = yield from ask(layout.put(folded, fence=(fence, before + 1), all_expired=True))
    layout.learn(applied.now)
    return bool(applied.code == 1)


def _rebuild(layout: Layout, raw: bytes, cut: _Cut) -> Steps[bool]:
    """Make what is partly in the range anew; False when somebody has written meanwhile."""
    left = {bucket: cut.left(*bucket) for bucket in cut.partly()}
    parts = {(rung, rung.pack(begins)) for rung, begins in left}
    sources = {(rung, rung.pack(begins)) for some in left.values() for rung, begins in some}
    inside = [pack for pack in cut.packs if cut.holds(*_span(*pack))]
    # Others that have some buckets in the range, but not all.
    parts |= {pack for pack in cut.packs if cut.touches(*_span(*pack))} - set(inside)
    # No more than that, or others write meanwhile; and the coarsest first, whose version then tells
    # of every hit that the finer ones may have or not.
    read = sorted(parts | sources, reverse=True)
    found = yield from contents(layout, read, lambda *at: layout.at(raw, *at))
    held = _held(found)
    there = {(one.rung, one.pack): one for one in found}
    replaced = []
    for rung, pack in sorted(parts):
        one = there.get((rung, pack))
        new: Entries = {}
        for place, begins in enumerate(range(*_span(rung, pack), rung.step)):
            bucket = rung, begins
            if bucket in left:
                members: Mapping[bytes, Amounts] = _folded(layout, held, left[bucket])
            else:
                members = {} if cut.holds(begins, begins + rung.step) else held.get(bucket, {})
            new.update({(place, member): amounts for member, amounts in members.items()})
        version = layout.kind.version(one.raw) if one else ""
        made = layout.kind.rebuilt(new, rung) if one else []
        replaced.append((Buckets(rung, raw, pack), version, made))
    removed = [Buckets(rung, raw, pack) for rung, pack in inside]
    # What they are made of stays as it was read: a member that is known changes finer ones alone.
    unchanged = [
        (
            Buckets(rung, raw, pack),
            layout.kind.version(there[rung, pack].raw) if (rung, pack) in there else "",
        )
        for rung, pack in sorted(sources - parts)
    ]
    return (yield from ask(layout.replace(replaced, removed, unchanged)))


def _span(rung: Rung, pack: int) -> tuple[int, int]:
    return pack * rung.span, (pack + 1) * rung.span
