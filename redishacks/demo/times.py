"""The time series of the demonstration: hits, bytes, clients and pages by the log's own times.

    times = Times(redis, prefix, traffic)
    times.add(0, 1000)
    times.shown()                        # Shown: what is drawn in the end

They are written by the process that replays, which nobody kills, and each write is acknowledged: so
they have to equal a plain count. Logs may be old: all is kept for 30 years here.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, NamedTuple

from redishacks.demo.traffic import Traffic
from redishacks.timeseries import DistinctSeries, Series, TimeSeries, Top, TopSeries, Total

_HOUR, _DAY = 3600, 86_400
#: Seconds for which the demonstration keeps everything; the library's own defaults are shorter.
YEARS = 30
_KEPT = YEARS * 365 * _DAY
_FINE = [(10, _KEPT), (_HOUR, _KEPT)]
_COARSE = [(_HOUR, _KEPT), (_DAY, _KEPT)]
#: What is older than the last hit by more is left out: a range has 100,000 points at most.
SPAN_YEARS = 10
_SPAN = SPAN_YEARS * 365 * _DAY
#: Of a range longer than this days are drawn.
_LONG = 40 * _DAY
#: Seconds within which Redis answers: a busy machine shall not end the play.
_DEADLINE = 10.0


class Shown(NamedTuple):
    """What the series say in the end."""

    #: Per hour, or per day where the log is long.
    step: int
    hits: Series
    bytes: Series
    clients: Series
    total_hits: Total
    total_bytes: Total
    total_clients: Total
    #: The hour with most hits: hits and bytes per 10 s, and the pages.
    busiest: Series
    busiest_bytes: Series
    top: Top
    #: Hours whose hits or bytes are not those of a plain count; none, or something is broken.
    wrong_hours: list[int]


class Times:
    """The series, under a prefix of their own."""

    def __init__(self, redis: str, prefix: str, traffic: Traffic) -> None:
        options: dict[str, Any] = {"prefix": prefix, "deadline": _DEADLINE}
        self._sums = TimeSeries(redis, "traffic", resolutions=_FINE, **options)
        self._clients = DistinctSeries(redis, "clients", resolutions=_COARSE, **options)
        self._pages = TopSeries(redis, "pages", resolutions=_COARSE, **options)
        self._traffic = traffic
        self._until = int(time.time())
        last = max((at for at in traffic.times if at <= self._until), default=0)
        # A day is to spare: none may expire meanwhile.
        self._since = max(self._until - _KEPT + _DAY, last - _SPAN)
        #: How many hits are not in the series: they are too old, or in the future.
        self.left_out = 0

    def _kept(self, at: int) -> bool:
        return self._since < at <= self._until

    def add(self, first: int, last: int) -> None:
        """Count hits from the first to before the last; Redis has them then."""
        hits = [hit for hit in self._traffic.hits(first, last) if self._kept(hit.time)]
        self.left_out += last - first - len(hits)
        self._sums.incr_many([("hits", 1, hit.time) for hit in hits])
        self._sums.incr_many([("bytes", hit.size, hit.time) for hit in hits])
        self._clients.add_many([("site", hit.client, hit.time) for hit in hits])
        self._pages.incr_many([("site", hit.target, 1, hit.time) for hit in hits])

    def shown(self) -> Shown | None:
        """Read everything, and compare it with a plain count; None when all was left out."""
        hits: Counter[int] = Counter()
        sizes: Counter[int] = Counter()
        for at, size in zip(self._traffic.times, self._traffic.sizes, strict=True):
            if self._kept(at):
                hits[at // _HOUR * _HOUR] += 1
                sizes[at // _HOUR * _HOUR] += size
        if not hits:
            return None
        start, end = min(hits), max(hits) + _HOUR
        hourly = self._sums.range("hits", start, end, step=_HOUR)
        hourly_bytes = self._sums.range("bytes", start, end, step=_HOUR)
        wrong = {at for at, value in hourly if value != hits[at]}
        wrong |= {at for at, value in hourly_bytes if value != sizes[at]}
        step = _DAY if end - start > _LONG else _HOUR
        first = max(hits, key=lambda at: (hits[at], -at))
        return Shown(
            step,
            hourly if step == _HOUR else self._sums.range("hits", start, end, step=step),
            hourly_bytes if step == _HOUR else self._sums.range("bytes", start, end, step=step),
            self._clients.range("site", start, end, step=step),
            self._sums.sum("hits", start, end),
            self._sums.sum("bytes", start, end),
            self._clients.count("site", start, end),
            self._sums.range("hits", first, first + _HOUR, step=10),
            self._sums.range("bytes", first, first + _HOUR, step=10),
            self._pages.top("site", first, first + _HOUR, n=5),
            sorted(wrong),
        )
