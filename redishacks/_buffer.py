"""Hits of one process that are not yet in Redis: merged in memory, cut into parts, sent once each.

A hit is one append to a deque, which is atomic: safe in threads, signal handlers and finalizers,
with no lock that a handler could wait for. A send drains the deques into dictionaries, cuts them
into parts, freezes them, and says each part with a fence, (producer, sequence number), that the
script on the server checks: a part whose reply was lost is sent again as it was and counts once.

One part per partition is outstanding at a time; newer hits wait for the next. A forked child gets
another buffer: even code that a signal handler's fork interrupted cannot mix up what is whose. No
I/O here.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from redishacks._command import Command, Steps, ask_all
from redishacks.errors import RedisHacksError, UnavailableError, UsageError

Amounts = Sequence[int | None]
Items = list[tuple[bytes, Amounts]]

#: Hits that may stand in the log before they are merged.
LOG = 8192
#: A send in doubt is repeated this long; the fence on the server lives twice as long.
GIVE_UP = 12 * 3600.0
#: Nobody merges for so long: a lock held longer is one that an exception has leaked.
LEAKED = 5.0

_log = logging.getLogger("redishacks")


class Batcher(Protocol):
    """What a tool tells the buffer about its hits."""

    @property
    def refusal(self) -> str:
        """Why a hit is refused for good."""

    @property
    def agreed(self) -> bool:
        """Everybody means the same keys: we have said so, and that still holds."""

    def hit(self, times: int) -> Amounts:
        """Return the amounts of a plain hit that came so many times."""

    def merge(self, into: list[int | None], amounts: Amounts) -> None:
        """Merge amounts into others."""

    def parts(self, items: Iterable[tuple[bytes, Amounts]]) -> Iterable[tuple[int, Items]]:
        """Cut hits into (partition, part), each small enough for one script."""

    def add(self, p: int, items: Items, fence: tuple[str, int]) -> Command[int]:
        """Return the command that sends one part; it replies -n when the n-th id is refused."""

    def agree(self) -> Steps[None]:
        """Make sure, before something is sent, that everybody means the same keys."""


class Refused(NamedTuple):
    """A hit the server will never take, told to `on_refused`."""

    id: bytes
    amounts: Amounts
    reason: str


class _Part(NamedTuple):
    sequence: int
    items: Items
    first_sent: float


class Buffer:
    """Hits of one process that are not yet known to be in Redis.

    A plain hit is `ones.append(id)`, any other `others.append((id, amounts))`, both atomic; only
    an id in ASCII may stand in `ones`. Before either the caller asks whether it is `tight()`.
    """

    what = "buffered hits"

    def __init__(
        self,
        batcher: Batcher,
        new_id: Callable[[], str],
        max_buffered: int,
        on_refused: Callable[[Refused], None] | None,
        on_maybe_applied: Callable[[Items], None] | None,
    ) -> None:
        if isinstance(max_buffered, bool) or not isinstance(max_buffered, int) or max_buffered < 1:
            raise UsageError(f"max_buffered must be a positive int, not {max_buffered!r}")
        self._batcher = batcher
        self._new_id = new_id
        self._max = max_buffered
        self._on_refused = on_refused
        self._on_maybe_applied = on_maybe_applied
        self.ones: deque[str] = deque()
        self.others: deque[tuple[bytes, Amounts]] = deque()
        self._merging = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._merged: dict[bytes, list[int | None]] = {}
        self._frozen: dict[int, deque[_Part]] = {}
        self._producer = new_id()
        self._sequences: dict[int, int] = {}
        #: The copy that a forked child has of its parent's buffer: the parent sends it.
        self.forked = False
        #: Hits the log may hold; 0 makes the next hit ask for room.
        self.room = 0
        #: Why the last send failed.
        self.error: RedisHacksError | None = None

    def after_fork(self) -> Buffer:
        """Return what a forked child begins with: an empty buffer, a producer of its own."""
        self.forked = True
        return Buffer(
            self._batcher, self._new_id, self._max, self._on_refused, self._on_maybe_applied
        )

    def held(self) -> int:
        """Return how many ids are held at most, frozen ones included."""
        frozen = sum(len(part.items) for lane in list(self._frozen.values()) for part in list(lane))
        return self._unsent() + frozen

    def _unsent(self) -> int:
        return len(self.ones) + len(self.others) + len(self._counts) + len(self._merged)

    def tight(self) -> bool:
        """Return whether the next hit needs `make_room()` first."""
        return len(self.ones) + len(self.others) >= self.room

    def pause(self, linger: float) -> float:
        """Return seconds until the next send."""
        return linger

    def last(self) -> None:
        """Hear that what is sent next is the last: nothing is ever kept for later."""

    def make_room(self) -> bool:
        """Merge the log; return False when the buffer is full."""
        self._merge()
        self.room = min(LOG, self._max - self.held() + len(self.ones) + len(self.others))
        return not self.tight()

    def _merge(self) -> None:
        # Never waited for: a signal handler may have interrupted its holder.
        merging = self._merging
        if not merging.acquire(blocking=False):
            return
        try:
            # Bounded, or fast producers would keep it here for ever; counted in C. Only the holder
            # of the lock pops, so popleft() always finds something.
            ones, others = self.ones, self.others
            self._counts.update(itertools.islice(iter(ones.popleft, None), len(ones)))
            for raw, amounts in itertools.islice(iter(others.popleft, None), len(others)):
                into = self._merged.get(raw)
                if into is None:
                    self._merged[raw] = list(amounts)
                else:
                    self._batcher.merge(into, amounts)
        finally:
            merging.release()

    def _freeze(self) -> None:
        """Cut what is held into parts that stay as they are until answered.

        A partition that still has a part to be answered keeps its newer hits merged.
        """
        self._merge()
        if not self._merging.acquire(timeout=LEAKED):
            # A signal handler's exception came just after its holder had got it.
            self._merging = threading.Lock()
            self._merging.acquire()
        try:
            merged = {raw: list(amounts) for raw, amounts in self._merged.items()}
            for id, times in self._counts.items():
                into = merged.setdefault(id.encode(), [None] * len(self._batcher.hit(1)))
                self._batcher.merge(into, self._batcher.hit(times))
            frozen = {p: deque(lane) for p, lane in self._frozen.items()}
            waiting = set(frozen)
            kept: dict[bytes, list[int | None]] = {}
            sequences = dict(self._sequences)
            for p, items in self._batcher.parts(merged.items()):
                if p in waiting:
                    kept.update((raw, list(amounts)) for raw, amounts in items)
                    continue
                sequences[p] = sequences.get(p, 0) + 1
                frozen.setdefault(p, deque()).append(_Part(sequences[p], items, time.monotonic()))
            counts: Counter[str] = Counter()
            # One statement without a call in it: no signal handler runs in the middle.
            self._frozen, self._sequences, self._counts, self._merged = (
                frozen,
                sequences,
                counts,
                kept,
            )
        finally:
            self._merging.release()
        self.room = 0

    def send(self) -> Steps[None]:
        """Send what is held; on an error what was not answered stays frozen.

        Raises what a transport raises, and `UsageError` when the counter is laid out otherwise. In
        the child of a fork it sends nothing more and raises nothing.
        """
        try:
            yield from self._send()
        except RedisHacksError as error:
            if not self.forked:
                self._failed(error)
                raise

    def _send(self) -> Steps[None]:
        if self.forked or not self.held():
            return
        if not self._batcher.agreed:
            yield from self._batcher.agree()
        error = None
        if self._frozen:  # what an earlier send left comes first, as it was
            error = yield from self._send_frozen()
        self._freeze()
        error = (yield from self._send_frozen()) or error
        if error is not None:
            raise error
        self.error = None
        self.room = 0

    def _send_frozen(self) -> Steps[Exception | None]:
        """Send every partition's parts; one that fails does not hold up the others."""
        failed: dict[int, Exception] = {}
        while True:
            lanes = [(p, lane[0]) for p, lane in self._frozen.items() if p not in failed]
            # Asked here: what a child that is forked from now on sends too is frozen and fenced.
            if not lanes or self.forked:
                return next(iter(failed.values()), None)
            outcomes = yield from ask_all(
                [
                    self._batcher.add(p, part.items, (self._producer, part.sequence))
                    for p, part in lanes
                ]
            )
            if self.forked:
                return None
            for (p, part), outcome in zip(lanes, outcomes, strict=True):
                if outcome.error is None:
                    self._answered(p, part, outcome.result())
                else:
                    failed[p] = outcome.error

    def _answered(self, p: int, part: _Part, reply: int) -> None:
        lane = self._frozen.get(p)
        if not lane or lane[0].sequence != part.sequence:
            return  # another loop's send was answered first
        items: Items = []
        if reply < 0:
            # Nothing of this part was applied, so its sequence number is still free.
            items = part.items[: -reply - 1] + part.items[-reply:]
        if items:
            lane[0] = part._replace(items=items)
        else:
            lane.popleft()
            if not lane:
                del self._frozen[p]
        if reply < 0:
            refused = Refused(*part.items[-reply - 1], self._batcher.refusal)
            _log.error("refused for good: id %r, amounts %r: %s", *refused)
            _tell(self._on_refused, refused)

    def _failed(self, error: RedisHacksError) -> None:
        """Note a failed send; what has been in doubt for too long is given up and reported."""
        self.error = error
        self.room = 0
        for p, lane in list(self._frozen.items()):
            while lane and time.monotonic() - lane[0].first_sent > GIVE_UP:
                part = lane.popleft()
                _log.error(
                    "%d ids in doubt are given up after 12 hours: %s", len(part.items), error
                )
                _tell(self._on_maybe_applied, part.items)
            if not lane:
                del self._frozen[p]

    def full(self) -> UnavailableError:
        """Return the error for a hit that finds no room."""
        why = f"; the last send failed: {self.error}" if self.error else ""
        return UnavailableError(
            f"{self._max} ids are buffered and none could be sent, the hit was not counted{why}"
        )


def _tell(callback: Callable[[Any], None] | None, what: Any) -> None:
    """Call a user's callback; its errors are its own."""
    if callback is not None:
        try:
            callback(what)
        except Exception:
            _log.exception("a callback of a buffered counter failed")
