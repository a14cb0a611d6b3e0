"""What a process may answer by itself: refusals of a moment ago, and tokens taken in advance.

A refusal stands until its `retry_after` has passed, seen from when the question was sent and with
a thousandth to spare for clocks; at most `deny_max` seconds, since a reset, a refund or a raised
limit elsewhere is not heard of. The tokens of a lease were charged in one sub-bucket of a window,
and are good until that sub-bucket ends: spent later, they would count in the wrong place.
"""

from __future__ import annotations

import itertools
import operator
import re
import threading
from collections import deque
from time import monotonic

from redishacks import _keys
from redishacks.ratelimit.commands import Question
from redishacks.ratelimit.decision import Charge, Decision, aged

#: Clocks of two machines differ by less than a thousandth.
SKEW = 0.999
#: A refusal that is repeated says the same figures for so long, in seconds.
_FRESH = 0.001
#: Keys that are remembered.
_MOST = 10_000
#: An int as it is written to Redis.
_WHOLE = re.compile(r"0|-?[1-9][0-9]*")
#: Sweeps, one a second, after which a lease is given back that nobody spends from.
_IDLE = 5
_new = tuple.__new__
#: Tokens of a lease, when its size is found out.
_LARGEST = 10_000


class Denied:
    """A refusal, repeated until it no longer holds."""

    __slots__ = (
        "_cost", "_decision", "_first", "_fresh", "_most", "_since", "_tally", "_told",
        "question", "until",
    )  # fmt: skip

    def __init__(
        self, question: Question, decision: Decision, cost: int, since: float, longest: float
    ) -> None:
        wait = longest if decision.retry_after is None else decision.retry_after * SKEW
        self.question = question
        self.until = since + min(wait, longest)
        self._first = self._decision = decision._replace(source="deny")
        self._cost = cost
        #: Above this it would be an error.
        self._most = min(rule.limit.most for rule in question.rules)
        self._since = self._fresh = since
        self._tally = itertools.count()
        self._told = 0

    def answer(self, cost: int) -> Decision | None:
        """Refuse once more; None: Redis has to be asked, since a cheaper hit may pass."""
        now = monotonic()
        if now >= self._fresh:
            if now >= self.until:
                return None
            self._fresh = min(now + _FRESH, self.until)
            self._decision = aged(self._first, now - self._since)
        if not self._cost <= cost <= self._most:
            return None
        next(self._tally)
        return self._decision

    def total(self) -> int:
        """Return how often it was repeated."""
        return reached(self._tally)

    def due(self) -> bool:
        """Return whether what waits may not wait any longer."""
        return True

    def pending(self) -> int:
        """Return how many refusals nobody has been told of."""
        return reached(self._tally) - self._told

    def news(self) -> int:
        """Return the same, and take them for told."""
        count = reached(self._tally)
        news, self._told = count - self._told, count
        return news


class Lease:
    """Tokens that are charged already: each is spent by one hit, until the time is up."""

    __slots__ = (
        "_charge", "_each", "_idle", "_left", "_limit", "_limiter", "_remaining", "_reply",
        "_reset_after", "_tokens", "question", "size", "until",
    )  # fmt: skip

    def __init__(self, question: Question, decision: Decision, size: int, until: float) -> None:
        assert decision.charge is not None
        self.question = question
        #: Tokens at the beginning; one of them went to the hit that asked.
        self.size = size
        self.until = until
        self._charge = decision.charge
        self._limiter = decision.charge.limiter
        self._reply = decision.charge.reply
        self._limit = decision.limit
        self._remaining = decision.remaining or 0
        self._reset_after = decision.reset_after
        self._each = decision.each
        # Taken one by one, by whatever thread.
        self._tokens = iter(range(size - 2, -1, -1))
        #: Tokens at the last sweep, and for how many sweeps there were as many.
        self._left, self._idle = size, 0

    def answer(self, cost: int) -> Decision | None:
        """Spend a token; None: Redis has to be asked."""
        if cost != 1 or monotonic() >= self.until:
            return None
        left = next(self._tokens, None)
        if left is None:
            return None
        charge = Charge(self._limiter, self.question, self._reply)
        # As Decision(...), without its detour through Python.
        return _new(
            Decision,
            (
                True, self._limit, self._remaining + left, 0.0, self._reset_after, self._each,
                "lease", False, charge,
            ),
        )  # fmt: skip

    def next_size(self) -> int:
        """Return how many tokens to take next, now that these do not answer any more.

        Twice as many when all were spent in time, else as many as were; at most half of what the
        limit has left.
        """
        left = self.pending()
        wanted = self.size - left if left else 2 * self.size
        return max(1, min(wanted, self._remaining // 2, _LARGEST))

    def drain(self) -> int:
        """Take all that is left, for good; return how much."""
        return sum(1 for _ in self._tokens)

    def pending(self) -> int:
        """Return how much waits to be given back."""
        return operator.length_hint(self._tokens)

    def due(self) -> bool:
        """Return whether what waits may not wait any longer."""
        return monotonic() >= self.until

    def idles(self) -> bool:
        """Return whether nobody has spent a token for some sweeps."""
        left = self.pending()
        self._idle = self._idle + 1 if left == self._left else 0
        self._left = left
        return self._idle >= _IDLE

    def news(self) -> int:
        """Return how many refusals nobody has been told of: none."""
        return 0

    def total(self) -> int:
        """Return how often it refused: never."""
        return 0

    def give_back(self, tokens: int) -> tuple[list[int], list[int]]:
        """Return costs and moments of a refund of so many tokens."""
        return [cost * tokens for cost in self.question.costs], self._charge.moments()


class Memory:
    """What is remembered, by key."""

    def __init__(self) -> None:
        self.entries: dict[object, Denied | Lease] = {}
        #: What was replaced before all of it was told or spent.
        self._replaced: deque[Denied | Lease] = deque()
        self.reset()

    def put(self, key: object, entry: Denied | Lease) -> None:
        """Remember a refusal or a lease; without room a refusal is not, and a lease is returned."""
        with self._changing:
            old = self.entries.get(key)
            if old is not None:
                self._replaced.append(old)
            elif len(self.entries) >= _MOST:
                if isinstance(entry, Lease):
                    self._replaced.append(entry)
                return
            self.entries[key] = entry

    def reset(self) -> None:
        """Forget everything, as another process; tokens are not given back."""
        self.entries.clear()
        self._replaced.clear()
        #: Refusals repeated by entries that are gone.
        self._past = 0
        # Re-entrant: a signal handler may hit while its thread is in here.
        self._changing = threading.RLock()

    def waiting(self, *, everything: bool = False) -> int:
        """Return how much waits to be told or given back; with `everything` good tokens, too."""
        entries = [*self._replaced, *self.entries.values()]
        return sum(entry.pending() for entry in entries if everything or entry.due())

    def news(self) -> list[tuple[Question, int]]:
        """Return how often each question was refused that nobody has been told of."""
        entries = [*self._replaced, *self.entries.values()]
        return [(entry.question, times) for entry in entries if (times := entry.news())]

    def sweep(self, *, everything: bool = False) -> list[tuple[Lease, int]]:
        """Forget what no longer holds; return leases with the tokens to be given back."""
        now = monotonic()
        with self._changing:
            gone = [self._replaced.popleft() for _ in range(len(self._replaced))]
            for key, entry in list(self.entries.items()):
                if entry.until <= now or (
                    isinstance(entry, Lease) and (everything or entry.idles())
                ):
                    self._drop(key, entry)
                    gone.append(entry)
            self._past += sum(entry.total() for entry in gone)
        leases = [entry for entry in gone if isinstance(entry, Lease)]
        return [(lease, left) for lease in leases if (left := lease.drain())]

    def _drop(self, key: object, entry: Denied | Lease) -> None:
        """Forget an entry, and no other that has taken its place."""
        if self.entries.get(key) is entry:
            del self.entries[key]

    def repeated(self) -> int:
        """Return how many refusals were answered from memory."""
        with self._changing:
            entries = [*self._replaced, *self.entries.values()]
            return self._past + sum(entry.total() for entry in entries)

    def forget_denials(self) -> None:
        """Forget all refusals: the limits are others now."""
        with self._changing:
            for key, entry in list(self.entries.items()):
                if isinstance(entry, Denied):
                    self._drop(key, entry)
                    self._replaced.append(entry)

    def forget(self, question: Question, *, leases: bool = False) -> None:
        """Forget what a key was refused; with `leases` its tokens, too, which are not given back.

        The key may have been spelled as a str, as bytes or as an int.
        """
        with self._changing:
            for key in _spellings(question.raw):
                entry = self.entries.get(key)
                if isinstance(entry, Denied):
                    self._drop(key, entry)
                    self._replaced.append(entry)
                elif entry is not None and leases:
                    self._drop(key, entry)
                    entry.drain()


def _spellings(raw: bytes | None) -> list[str | bytes | int]:
    """Return what a user may have written for a key; nothing for a mapping of keys."""
    if raw is None:
        return []
    found: list[str | bytes | int] = [raw]
    shown = _keys.id_shown(raw)
    if isinstance(shown, str):
        found.append(shown)
        if _WHOLE.fullmatch(shown):
            found.append(int(shown))
    return found


def reached(count: itertools.count[int]) -> int:
    """Return how far a count has got, which threads share without a lock."""
    return int(repr(count)[6:-1])
