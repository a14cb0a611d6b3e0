"""How fine series are kept, and for how long: `Resolution`, and the ladder that a name has.

    Resolution(10, dt.timedelta(days=2))         # 10-second buckets, each for two days at least

A hit is counted in one bucket of every resolution. Several buckets of a resolution stand in one
packed key, which expires at once, and so do all that are in a coarser bucket: a retention is
rounded up to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from redishacks._units import Seconds, seconds
from redishacks.errors import UsageError

#: Buckets of a packed key, or somewhat more: a key costs as much as a hundred values, and is read
#: whole.
_BUCKETS = 360
_MOST_BUCKETS = 1440
_LONGEST = 999_999_999
_MOST = 12

MINUTE, HOUR, DAY = 60, 3600, 86_400


class Resolution(NamedTuple):
    """Buckets of `step` seconds, each kept for `retention` seconds after its end, or longer."""

    step: Seconds
    retention: Seconds


#: What a series has unless told otherwise.
DEFAULT = (
    Resolution(10, 2 * DAY),
    Resolution(MINUTE, 8 * DAY),
    Resolution(10 * MINUTE, 32 * DAY),
    Resolution(HOUR, 400 * DAY),
    Resolution(DAY, 1830 * DAY),
)
#: The same for what takes hundreds of bytes a bucket.
COARSE = DEFAULT[2:]


class Rung(NamedTuple):
    """One resolution of a name; all times are whole seconds since 1970."""

    step: int
    retention: int
    #: How many buckets a packed key has.
    buckets: int
    #: So many seconds expire together: a packed key, or the keys of a coarser bucket.
    group: int
    #: No bucket before it is whole: the resolution was added then.
    since: int = 0

    @property
    def span(self) -> int:
        """Return how many seconds a packed key is for."""
        return self.step * self.buckets

    def pack(self, time: int) -> int:
        """Return the number of the packed key that a moment belongs to."""
        return time // self.span

    def ends(self, pack: int) -> int:
        """Return when a packed key expires."""
        return -(-(pack + 1) * self.span // self.group) * self.group + self.retention

    def horizon(self, now: int) -> int:
        """Return when the oldest bucket begins that is still whole."""
        return max((now - self.retention) // self.group * self.group, self.since)


#: The resolutions of a name, the finest first.
Ladder = tuple[Rung, ...]


def ladder(
    resolutions: Iterable[Resolution | tuple[Seconds, Seconds]], *, packed: bool = True
) -> Ladder:
    """Check resolutions, and say how they are packed, if at all; raises `UsageError`.

    Each step must divide the next, so that a coarse bucket is the sum of finer ones, and what is
    coarser must be kept for as long at least.
    """
    try:
        given = [(step, retention) for step, retention in resolutions]
    except (TypeError, ValueError):
        raise UsageError(
            "resolutions are pairs of seconds, (step, retention), such as (10, 172800)"
        ) from None
    pairs = [
        (_whole(step, "a resolution's step"), _whole(retention, "a retention"))
        for step, retention in given
    ]
    pairs.sort()
    if not 0 < len(pairs) <= _MOST:
        raise UsageError(f"a series has 1 to {_MOST} resolutions, not {len(pairs)}")
    for (step, kept), (coarser, longer) in itertools.pairwise(pairs):
        if coarser % step or coarser == step:
            raise UsageError(f"a step of {step} s does not divide the next one, {coarser} s")
        if longer < kept:
            raise UsageError(
                f"what is coarser is kept for as long at least: {step} s for {kept} s, "
                f"but {coarser} s for {longer} s"
            )
    for step, kept in pairs:
        if kept < step:
            raise UsageError(f"buckets of {step} s must be kept for longer than {kept} s")
    steps = [step for step, _ in pairs]
    coarser_steps = [*steps[1:], steps[-1]]
    rungs: list[Rung] = []
    for (step, kept), coarser in zip(pairs, coarser_steps, strict=True):
        if rungs:  # it outlives what is finer, with all that expires together
            kept = max(kept, rungs[-1].retention + rungs[-1].group)
        buckets = _packed(coarser // step) if packed else 1
        span = step * buckets
        # Where finer buckets end a coarser one begins, or a range could not be tiled.
        group = span if span % coarser == 0 else coarser
        rungs.append(Rung(step, kept, buckets, group))
    return tuple(rungs)


def _packed(ratio: int) -> int:
    """Return how many buckets to pack: whole coarser ones, unless they are too many."""
    return _BUCKETS if ratio > _MOST_BUCKETS else -(-_BUCKETS // ratio) * ratio


def _whole(value: Seconds, what: str) -> int:
    number = seconds(value, what)
    if number != int(number) or not 0 < number <= _LONGEST:
        raise UsageError(f"{what} is a whole number of seconds up to 31 years, not {value!r}")
    return int(number)


def finest_from(rungs: Sequence[Rung], time: int, now: int) -> Rung | None:
    """Return the finest resolution that still has the bucket of a moment; None if none has."""
    for rung in rungs:
        if time // rung.step * rung.step >= rung.horizon(now):
            return rung
    return None
