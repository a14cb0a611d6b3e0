"""Adding a resolution to a name that is in use, while it is written to and read."""

from __future__ import annotations

from redishacks._command import Steps, ask
from redishacks._units import Instant, Seconds, instant
from redishacks.errors import UsageError
from redishacks.timeseries.commands import VIEW, BehindError, Layout
from redishacks.timeseries.resolution import Resolution, ladder

_TRIES = 10


def add_resolution(
    layout: Layout, resolution: Resolution | tuple[Seconds, Seconds], since: Instant | None
) -> Steps[int]:
    """Note down a resolution; returns since when its buckets are whole."""
    for _ in range(_TRIES):
        yield from layout.agree()
        try:
            return (yield from _add(layout, resolution, since))
        except BehindError:
            continue  # somebody else has added one just now
    raise layout.late()


def _add(
    layout: Layout, resolution: Resolution | tuple[Seconds, Seconds], since: Instant | None
) -> Steps[int]:
    yield from layout.refresh()  # somebody else may have added one just now
    old = {rung.step: rung for rung in layout.rungs}
    (asked,) = ladder([resolution])
    if (there := old.get(asked.step)) is not None:
        if there.retention < asked.retention:
            raise UsageError(f"{there.step} s are there, and kept for {there.retention} s")
        return there.since
    pairs = [(rung.step, rung.retention) for rung in layout.rungs]
    made = ladder([*pairs, resolution], packed=layout.kind.packed)
    (at,) = [at for at, rung in enumerate(made) if rung.step not in old]
    new = made[at]
    for rung in made:
        was = old.get(rung.step, rung)
        # What is finer must expire in whole buckets of the new one.
        loose = made.index(rung) == at - 1 and was.group % new.step
        if was.retention != rung.retention or loose:
            raise UsageError(
                f"{new.step} s for {new.retention} s does not fit in with {was.step} s, which are "
                f"kept for {was.retention} s and expire {was.group} s at a time"
            )
    # Until then some who write may not know of it.
    earliest = int(layout.now()) + 3 * VIEW
    wanted = earliest if since is None else int(instant(since, "since"))
    if wanted < earliest:
        raise UsageError(f"since is {earliest} at the earliest: then all who write know of it")
    coarser = made[at + 1].step if at + 1 < len(made) else new.step
    new = new._replace(since=-(-wanted // coarser) * coarser)
    yield from ask(layout.define((new,), after=len(old)))
    yield from layout.refresh()
    return new.since
