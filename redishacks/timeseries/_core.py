"""What series of all kinds and both colours share: input to commands, replies to buckets.

A kind's class makes a `Draft` of what it is told and has it counted; and it has the buckets of a
range read, which the planner chose, and makes its answer of them.
"""

from __future__ import annotations

import datetime as dt
import secrets
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from redishacks import _keys
from redishacks._buffer import Buffer, Items, Refused
from redishacks._clock import clock
from redishacks._command import Command, Steps, ask_all
from redishacks._drive import AsyncTransport, Transport
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, Coalescer, check_linger
from redishacks._transport import Hook
from redishacks._units import Instant, Seconds, instant, seconds
from redishacks.errors import (
    PartlyAppliedError,
    RedisHacksError,
    RetentionError,
    UsageError,
)
from redishacks.timeseries import _calendar
from redishacks.timeseries._frame import Frame, frame
from redishacks.timeseries._held import Batcher, Uncounted
from redishacks.timeseries._kind import Amounts, Hit, Kind
from redishacks.timeseries._range import range_of
from redishacks.timeseries.commands import SKEW, Applied, Folded
from redishacks.timeseries.plan import Plan, Tile, plan
from redishacks.timeseries.resolution import Resolution, Rung, ladder

T = TypeVar("T", bound=Transport | AsyncTransport)
C = TypeVar("C", bound=Coalescer | AsyncCoalescer)
R = TypeVar("R")

#: Partitions of a name on a cluster, unless told otherwise.
_CLUSTER_PARTITIONS = 64
#: Tries to ask for a moment that is passing, or by a clock that is not known yet.
TRIES = 5


class Draft(NamedTuple):
    """Something to be counted; without a time it is of now."""

    key: bytes
    amounts: Amounts
    at: Instant | None = None
    member: bytes = b""


class _Part(NamedTuple):
    """What one command writes."""

    drafts: list[Draft]
    hits: list[Hit]
    folded: Folded


def several(keys: Iterable[Id]) -> list[Id]:
    """Return series, each once; raises `UsageError` for a single one."""
    if isinstance(keys, str | bytes):
        raise UsageError(f"several series are a list of them, not {keys!r}")
    return list(dict.fromkeys(keys))


class Core(ABC, Generic[T, C]):
    """What all share: options, how hits are written, and how buckets are read."""

    #: What this class keeps, and how.
    kind: ClassVar[Kind]

    def __init__(
        self,
        client: Any,
        name: str,
        *,
        resolutions: Iterable[Resolution | tuple[Seconds, Seconds]] | None = None,
        partitions: int | None = None,
        prefix: str = "rh",
        deadline: Seconds = 1.0,
        linger: Seconds | None = None,
        max_buffered: int = 100_000,
        overflow: Literal["raise", "block"] = "raise",
        on_refused: Callable[[Uncounted], None] | None = None,
        on_maybe_applied: Callable[[list[Uncounted]], None] | None = None,
        on_command: Hook | None = None,
    ) -> None:
        self.name = name
        self.deadline = seconds(deadline, "deadline")
        self.client = client
        self.transport: T = self._connect(client, on_command)
        connected: Any = self.transport
        connected = connected.bare
        if partitions is None:
            partitions = _CLUSTER_PARTITIONS if connected.clustered else 1
        kind = self._kept()
        given = None if resolutions is None else ladder(resolutions, packed=kind.packed)
        self.layout = layout = Batcher(prefix, name, kind, partitions, given)
        self._coalescer: C | None = None
        if linger is not None:

            def refused(hit: Refused) -> None:
                if on_refused is not None:
                    on_refused(layout.uncounted(hit.id, hit.amounts, hit.reason))

            def maybe_applied(items: Items) -> None:
                if on_maybe_applied is not None:
                    on_maybe_applied([layout.uncounted(*item) for item in items])

            buffer = Buffer(
                layout, lambda: secrets.token_hex(16), max_buffered, refused, maybe_applied
            )
            self._coalescer = self._coalesce(
                buffer, linger=check_linger(linger), deadline=self.deadline, overflow=overflow
            )
            self._finalizer = weakref.finalize(self, self._coalescer.abandon)
            self._finalizer.atexit = False

    def _kept(self) -> Kind:
        """Return how this series is kept."""
        return self.kind

    @abstractmethod
    def _connect(self, client: Any, on_command: Hook | None) -> T:
        """Return the transport of this colour."""

    @abstractmethod
    def _coalesce(self, buffer: Buffer, **options: Any) -> C:
        """Return what sends the buffer."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.layout.full_name}>"

    # Writing

    def _one(self, draft: Draft) -> Steps[None]:
        """Count one thing."""
        key, amounts, at, member = draft
        if at is not None:
            yield from self._many([draft])
            return
        layout = self.layout
        for _ in range(TRIES):
            if not layout.agreed:
                yield from layout.agree()
            hit = Hit(key, layout.begins(layout.now()), amounts, member)
            applied = yield layout.now_hit(hit)
            layout.learn(applied.now)
            if applied.code >= 0:
                return
            if applied.code != -1:
                self._check([hit], layout.folded([hit]), applied)
        raise self.layout.late()

    def _many(self, drafts: Sequence[Draft]) -> Steps[None]:
        """Count many things, in parts; raises as `incr_many` says."""
        layout, failed, parts = self.layout, dict[str | bytes, Exception](), 0
        for _ in range(TRIES):
            if not layout.agreed:
                yield from layout.agree()
            cut = self._cut(drafts)
            parts, again = parts or len(cut), []
            for (some, hits, folded), outcome in zip(
                cut, (yield from ask_all([self._within(*part) for part in cut])), strict=True
            ):
                try:
                    applied = outcome.result()
                    layout.learn(applied.now)
                    if applied.code == -1 and _passing(some, applied):
                        again += some
                    elif applied.code < 0:
                        self._check(hits, folded, applied)
                except RedisHacksError as error:
                    failed.update((_keys.id_shown(hit.key), error) for hit in hits)
            if not again:
                break
            drafts = again
        else:
            failed.update((_keys.id_shown(draft.key), layout.late()) for draft in drafts)
        errors = list({str(error): error for error in failed.values()}.values())
        if len(errors) == parts == 1:
            raise errors[0]
        if errors:
            raise PartlyAppliedError(f"not all hits were added; {errors[0]}", failed)

    def _cut(self, drafts: Sequence[Draft]) -> list[_Part]:
        """Cut what is to be counted into parts; what has no time is of now."""
        layout = self.layout
        now = layout.now()
        begins, oldest = layout.begins(now), min(rung.horizon(int(now)) for rung in layout.rungs)
        for draft in drafts:
            if draft.at is not None and instant(draft.at, "at") < oldest:
                raise _too_old(draft.key, draft.at)
        hits = [
            (
                draft,
                Hit(
                    draft.key,
                    begins if draft.at is None else int(instant(draft.at, "at")),
                    draft.amounts,
                    draft.member,
                ),
            )
            for draft in drafts
        ]
        found = []
        for _, part in layout.cut(hits, lambda pair: pair[1].key):
            some = [hit for _, hit in part]
            found.append(_Part([draft for draft, _ in part], some, layout.folded(some)))
        return found

    def _within(self, drafts: Sequence[Draft], hits: Sequence[Hit], folded: Folded) -> Any:
        """Return what adds a part, as long as its time is right."""
        earliest, latest = max(hit.time for hit in hits) - SKEW, self.layout.until()
        for draft, hit in zip(drafts, hits, strict=True):
            if draft.at is None:
                earliest = max(earliest, hit.time)
                latest = min(latest, (hit.time + self.layout.step) * 1_000_000)
                break
        return self.layout.put(folded, window=(earliest * 1_000_000, latest))

    def _check(self, hits: Sequence[Hit], folded: Folded, applied: Applied) -> None:
        """Raise the error of hits that were refused."""
        if applied.code == -1:
            latest = max(hits, key=lambda hit: hit.time)
            ahead = latest.time - applied.now // 1_000_000
            if ahead <= SKEW:
                raise self.layout.late()
            raise UsageError(
                f"series {_shown(latest)}: {latest.time} is in the future, by the server's clock "
                f"{ahead} s; at most {SKEW} s are accepted"
            )
        hit = hits[self.layout.blamed(hits, folded, applied)]
        if applied.code == -2:
            raise UsageError(f"series {_shown(hit)}: {self.layout.kind.limit}; nothing was added")
        raise _too_old(hit.key, hit.time)

    def _held(self, draft: Draft) -> tuple[bytes, Amounts]:
        """Return what the buffer takes for something to be counted."""
        key, amounts, at, member = draft
        layout = self.layout
        if at is None:
            return layout.label(layout.stamp(), key, member), amounts
        when = instant(at, "at")
        if when > layout.now() + SKEW:
            raise UsageError(
                f"series {_keys.id_shown(key)!r}: {at!r} is in the future; at most {SKEW} s are "
                "accepted"
            )
        if layout.rungs and when < min(rung.horizon(int(layout.now())) for rung in layout.rungs):
            raise _too_old(key, at)
        return layout.label(str(layout.begins(when)), key, member), amounts

    # Reading

    def _buckets(
        self, raws: Sequence[bytes], start: Instant, end: Instant | None, strict: bool = False
    ) -> Steps[tuple[Plan, list[list[Any]]]]:
        """Read what the planner chooses for a range: for each series a bucket or a key per tile."""
        low, high = range_of(start, end)
        for _ in range(TRIES):
            made, now = yield from self._plan(low, high)
            found = yield from self._read(raws, made.tiles, now)
            if found is not None:
                self._exact(made, low, strict)
                return made, found
        raise self.layout.late()

    def _plan(self, low: int, high: int | None) -> Steps[tuple[Plan, int]]:
        """Plan a range, for the time by which that is right."""
        rungs = yield from self.layout.look()
        now = int(self.layout.now())
        return plan(rungs, low, now + 1 if high is None else high, now), now

    def _exact(self, made: Plan, low: int, strict: bool) -> None:
        if strict and not made.complete:
            raise RetentionError(
                f"series {self.layout.full_name}: of the range from {low} only {made.start} to "
                f"{made.end} is there, to {made.resolution} s"
            )

    def _read(
        self, raws: Sequence[bytes], tiles: Sequence[Tile], now: int
    ) -> Steps[list[list[Any]] | None]:
        """Read keys of series, for each tile; None if the plan was not for the server's time."""
        # Tiles of a key may stand apart: it is read once.
        at: dict[tuple[int, int], int] = {}
        packs: list[tuple[Rung, int]] = []
        places = []
        for rung, pack, _, _ in tiles:
            place = at.setdefault((rung.step, pack), len(packs))
            if place == len(packs):
                packs.append((rung, pack))
            places.append(place)
        groups: dict[int, list[int]] = {}
        for number, raw in enumerate(raws):
            groups.setdefault(self.layout.partition(raw), []).append(number)
        answers = yield from self._exchange(
            [
                self.layout.read([raws[number] for number in numbers], packs)
                for numbers in groups.values()
            ],
            packs,
            now,
        )
        if answers is None:
            return None
        found: list[list[Any]] = [[] for _ in raws]
        if not packs:
            return found
        bucket, size = self.layout.kind.bucket, len(packs)
        for numbers, parts in zip(groups.values(), answers, strict=True):
            flat = parts[0] if len(parts) == 1 else [one for part in parts for one in part]
            for place, number in enumerate(numbers):
                some = flat[place * size : (place + 1) * size]
                read = [bucket(raw, rung) for raw, (rung, _) in zip(some, packs, strict=True)]
                found[number] = [read[i] for i in places]
        return found

    def _exchange(
        self,
        groups: Sequence[Sequence[Command[Any]]],
        packs: Sequence[tuple[Rung, int]],
        now: int,
    ) -> Steps[list[list[Any]] | None]:
        """Ask for what is in some keys of series, each group in one slot.

        None when the time for which that was planned was not the server's: it is known now.
        """
        began = clock()
        commands: list[Command[Any]] = []
        some = groups if packs else ()
        for group in some:
            commands += group
            commands.append(self.layout.time_of(group[0].keys[0]))
        # Where nothing is to be read now something may be at the server's time.
        outcomes = iter((yield from ask_all(commands or [self.layout.time_of()])))
        found, then = [], 0
        for group in some:
            found.append([next(outcomes).result() for _ in group])
            then = max(then, next(outcomes).result())
        for last in outcomes:
            then = last.result()
        self.layout.learn(then)
        then //= 1_000_000
        if any(rung.ends(pack) <= then for rung, pack in packs):
            return None
        return found if abs(then - now) <= clock() - began + 1 else None

    def _where(self) -> Callable[[Command[Any]], str] | None:
        """Return what names the nodes of a router; those of a cluster know their names."""
        connected: Any = self.transport
        bare = connected.bare
        return bare.where if bare.clustered and not bare.sharded else None

    def _explain(self, key: Id, start: Instant, end: Instant | None) -> Steps[Plan]:
        raw = _keys.id_bytes(key, "series")
        made, (found,) = yield from self._buckets([raw], start, end)
        return made._replace(bytes=sum({id(bucket): bucket.size for bucket in found}.values()))

    def _of_today(
        self, tz: str | dt.tzinfo, read: Callable[[int, int], Steps[list[R]]]
    ) -> Steps[R]:
        """Read one series from when today begins in a time zone until it ends.

        The read tells the server's time anew: when it is another day there, it is done again.
        """
        place = _calendar.zone(tz)
        if not self.layout.rungs:
            yield from self.layout.look()  # and learn the time
        for _ in range(TRIES):
            start, end = _calendar.day(self.layout.now(), place)
            (found,) = yield from read(start, end)
            if start <= self.layout.now() < end:
                return found
        raise self.layout.late()

    def _framed(
        self,
        key: Id,
        start: Instant,
        end: Instant | None,
        step: _calendar.Step,
        tz: str | dt.tzinfo,
    ) -> Steps[tuple[Frame, list[Any]]]:
        """Read the buckets that points are made of."""
        raw, place = _keys.id_bytes(key, "series"), _calendar.zone(tz)
        low, high = range_of(start, end)
        for _ in range(TRIES):
            rungs = yield from self.layout.look()
            now = int(self.layout.now())
            made = frame(rungs, low, high, step, place, now)
            found = yield from self._read([raw], made.tiles, now)
            if found is not None:
                return made, found[0]
        raise self.layout.late()


def _passing(drafts: Sequence[Draft], applied: Applied) -> bool:
    """Return whether it was the time of those of now that was over, or not yet there."""
    latest = max((instant(draft.at, "at") for draft in drafts if draft.at is not None), default=0)
    return any(draft.at is None for draft in drafts) and latest * 1e6 <= applied.now + SKEW * 1e6


def _too_old(key: bytes, at: Instant) -> UsageError:
    when = int(instant(at, "at"))
    return UsageError(f"series {_keys.id_shown(key)!r}: {when} is older than all that is kept")


def _shown(hit: Hit) -> str:
    return repr(_keys.id_shown(hit.key))
