"""A rate limiter by itself, when Redis cannot be asked: it keeps to a share of each limit."""

from __future__ import annotations

import math
import threading
from collections import deque
from time import monotonic

from redishacks.ratelimit.commands import Question
from redishacks.ratelimit.decision import Decision, Verdict, decided
from redishacks.ratelimit.limit import Ban, Limit

#: Keys that are limited locally. When there are more, those that count nothing are forgotten, once
#: a second; at twice as many the one that came first is.
_MOST_KEYS = 10_000
_SWEEP = 1.0
#: In so many steps a hit's time is rounded up.
_STEPS = 30


class LocalLimits:
    """A share of each limit, counted in this process alone.

    A hit counts for the limit's length. One that is more than the whole share is allowed when
    nothing else counts, and counts for longer in proportion: where the share of a limit is half a
    hit, that is one hit in two lengths.
    """

    def __init__(self) -> None:
        # Re-entrant: a signal handler may hit while its thread is in here.
        self._lock = threading.RLock()
        #: By the key in Redis: when each hit stops counting, and its cost.
        self._spent: dict[bytes, deque[tuple[float, int]]] = {}
        self._swept = 0.0

    def decide(self, question: Question, share: float, units: int) -> Decision:
        """Charge a hit (units 1) or look (0) at a share of every limit; all allow it or none."""
        with self._lock:
            now = monotonic()
            verdicts = [
                self._verdict(n, question, share, now)
                for n, rule in enumerate(question.rules)
                if not isinstance(rule.limit, Ban)
            ]
            allowed = all(verdict.allowed for verdict in verdicts)
            if allowed and units:
                for n, rule in enumerate(question.rules):
                    if not isinstance(rule.limit, Ban):
                        self._charge(n, question, share, now)
                verdicts = [
                    verdict._replace(remaining=max(0, verdict.remaining - cost))
                    for verdict, cost in zip(verdicts, question.costs, strict=False)
                ]
        return decided(allowed, tuple(verdicts), "local", degraded=True)

    def _verdict(self, n: int, question: Question, share: float, now: float) -> Verdict:
        limit, part = question.rules[n]
        cost, room = question.costs[n], share * (limit.amount or 0)
        spent = self._live(question.keys[n], now)
        entries = list(spent)
        total = sum(each for _, each in entries)
        wait, left = 0.0, total
        for end, each in entries:
            if left + cost <= room:
                break
            left -= each
            wait = end - now
        first, last = (entries[0][0] - now, entries[-1][0] - now) if entries else (0.0, 0.0)
        remaining = max(0, int(room) - total)
        return Verdict(limit, part, wait == 0.0, remaining, wait, first, last)

    def _charge(self, n: int, question: Question, share: float, now: float) -> None:
        limit = question.rules[n].limit
        assert isinstance(limit, Limit)
        cost, room = question.costs[n], share * (limit.amount or 0)
        if len(self._spent) >= _MOST_KEYS:
            self._sweep(now)
        length = limit.micros / 1e6 * max(1.0, cost / room)
        spent = self._spent.setdefault(question.keys[n], deque())
        # Rounded up to one of some dozens: a million hits take no more entries, and none too few.
        step = length / _STEPS
        end = math.ceil((now + length) / step) * step
        if spent and spent[-1][0] >= end:
            end, before = spent.pop()
            cost += before
        spent.append((end, cost))

    def _sweep(self, now: float) -> None:
        if now - self._swept >= _SWEEP:
            self._swept = now
            for key in list(self._spent):
                if not self._live(key, now):
                    self._spent.pop(key, None)
        while len(self._spent) >= 2 * _MOST_KEYS:
            self._spent.pop(next(iter(self._spent)), None)

    def _live(self, key: bytes, now: float) -> deque[tuple[float, int]]:
        spent = self._spent.get(key, deque())
        while spent and spent[0][0] <= now:
            spent.popleft()
        return spent
