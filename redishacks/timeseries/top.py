"""`TopSeries`: the heaviest members of any range, in bounded memory.

    pages = TopSeries("redis://localhost:6379/0", "pages")
    pages.incr("site:1", "/index.html")
    pages.incr("site:1", "/big.iso", 4_700_000)             # weights: bytes, cents, seconds
    found = pages.top("site:1", start, end, n=10)           # Top: (member, count), heaviest first
    found.total, found.error

A bucket counts all members while they are few: up to 200. With more it keeps the heaviest 100 (or
`keep`): Misra and Gries' summary. A count is then too low by `Top.error` at most, which is never
more than the sum of all amounts divided by 101; so whoever is heavier than that is there. Summaries
add up with their errors, so that holds for any range. The order of two members whose counts differ
by less than the error is not known.

A larger `keep` makes errors smaller, buckets larger, and the write that prunes one longer;
everybody who writes must say the same. Amounts are positive, for what was cut off cannot be taken
back, and what a `delete` leaves is as exact as the finer buckets it is made of. There is no
`range`: ask for the `top` of each.

Keys: see commands.py; a key has one bucket, a hash: a field per member, and one with the sum of all
amounts and the error (series_top.lua).

Misra, Gries, "Finding repeated elements", 1982; Agarwal and others, "Mergeable summaries", 2012.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import heapq
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from redishacks import _keys
from redishacks._command import Command, Steps
from redishacks._drive import AsyncTransport, Transport
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, Coalescer
from redishacks._units import EXACT, Instant
from redishacks.errors import ServerError, UsageError
from redishacks.timeseries._colours import AsyncSeries, SyncSeries
from redishacks.timeseries._core import C, Core, Draft, T
from redishacks.timeseries._kind import Amounts, Entries, Kind
from redishacks.timeseries.resolution import COARSE, Rung

#: A series, a member and an amount, and when that was; without a time it was now.
Item = tuple[Id, Id, int] | tuple[Id, Id, int, Instant | None]

#: Members that a bucket keeps when there are more than twice as many.
KEEP = 100
_MOST_KEPT = 2_000


class Summary:
    """A bucket as it was read: counts by member, the sum of all, and what a count may lack."""

    def __init__(self, raw: Any) -> None:
        fields = raw.items() if isinstance(raw, dict) else zip(raw[::2], raw[1::2], strict=True)
        found = dict(fields)
        self.size = sum(map(len, found)) + sum(map(len, found.values()))
        head = found.pop(b"", b"0 0 0")
        try:
            self.head = head.decode()
            self.total, self.lacks, _ = map(int, head.split())
            self.counts = {member: int(count) for member, count in found.items()}
        except ValueError:
            raise ServerError("ERR this key is no summary of members") from None


class Tops(Kind):
    """Summaries of the heaviest members, one per bucket of time."""

    name = "top"
    script_name = "series_top"
    usual = COARSE
    packed = False
    limit = "the amounts of all members would pass 2^53"

    def __init__(self, keep: int) -> None:
        self._keep = keep

    def fields(self) -> dict[str, str]:
        """Return how many members are kept."""
        return {"keep": str(self._keep)}

    def size(self, rung: Rung) -> int:
        """Return how many members are kept."""
        return self._keep

    def merged(self, first: Amounts, then: Amounts) -> Amounts:
        """Return the sums of amounts, and of what they may lack."""
        return first[0] + then[0], first[1] + then[1]

    def words(self, place: int, member: bytes, amounts: Amounts) -> list[tuple[str | bytes, ...]]:
        """Return the member, the amount and what it may lack."""
        amount, lacks = amounts
        return [(member, str(amount), str(lacks))]

    def read(self, keys: Sequence[bytes]) -> list[Command[list[Any]]]:
        """Read each."""
        return [
            Command(("HGETALL", key), (key,), _only, repeatable=True, bulk=True) for key in keys
        ]

    def bucket(self, raw: Any, rung: Rung) -> Summary:
        """Return a summary."""
        return Summary(raw)

    def entries(self, raw: Any, rung: Rung) -> Entries:
        """Return its counts, and with no member what is besides."""
        if not raw:
            return {}
        summary = Summary(raw)
        found: Entries = {(0, member): (count, 0) for member, count in summary.counts.items()}
        found[0, b""] = summary.total - sum(summary.counts.values()), summary.lacks
        return found

    def version(self, raw: Any) -> str:
        """Return the field that every hit changes."""
        return Summary(raw).head if raw else ""

    def rebuilt(self, entries: Entries, rung: Rung) -> list[str | bytes]:
        """Return the fields of a summary."""
        if not entries:
            return []
        total = sum(amount for amount, _ in entries.values())
        lacks = sum(lack for _, lack in entries.values())
        counts = {member: amount for (_, member), (amount, _) in entries.items() if member}
        if len(counts) > 2 * self._keep:  # as the script does
            cut = sorted(counts.values(), reverse=True)[self._keep]
            counts = {member: count - cut for member, count in counts.items() if count > cut}
            lacks += cut
        fields: list[str | bytes] = ["", f"{total} {lacks} {secrets.randbelow(EXACT)}"]
        for member, count in counts.items():
            fields += (member, str(count))
        return fields

    def row(self, member: bytes, amounts: Amounts) -> dict[str, Any]:
        """Return member and count; with no member what others had, and what counts may lack."""
        return {"member": _keys.quote_bytes(member), "count": amounts[0], "lacks": amounts[1]}

    def entry(self, row: Mapping[str, Any]) -> tuple[bytes, Amounts]:
        """Return member and count."""
        member = _keys.unquote_bytes(str(row["member"]).encode())
        count, lacks = int(str(row["count"])), int(str(row["lacks"]))
        if count < bool(member) or lacks < 0:
            raise ValueError("counts are positive")
        return member, (count, lacks)


def _only(reply: Any) -> list[Any]:
    return [reply]


@dataclasses.dataclass(frozen=True)
class Top(Sequence[tuple[str | bytes, int]]):
    """The heaviest members of a range, as (member, count), the heaviest first.

    `start`, `end`, `resolution` and `complete` are those of a `Total`.
    """

    members: Sequence[tuple[str | bytes, int]]
    #: The sum of all amounts, those of members that are not shown too.
    total: int
    #: A count may be too low by so much, and a member that is missing may have so much; 0 is exact.
    error: int
    start: int
    end: int
    resolution: int
    complete: bool

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> tuple[str | bytes, int]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str | bytes, int]]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[str | bytes, int] | Sequence[tuple[str | bytes, int]]:
        return self.members[index]

    def __iter__(self) -> Iterator[tuple[str | bytes, int]]:
        return iter(self.members)


class _Ranked(Core[T, C]):
    """What both colours of `TopSeries` share."""

    kind = Tops(KEEP)

    def __init__(self, client: Any, name: str, *, keep: int = KEEP, **options: Any) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= _MOST_KEPT:
            raise UsageError(f"keep is how many members, 1 to {_MOST_KEPT:,}, not {keep!r}")
        self._keep = keep
        super().__init__(client, name, **options)

    def _kept(self) -> Kind:
        return Tops(self._keep)

    def _tops(
        self, keys: Sequence[Id], start: Instant, end: Instant | None, n: int, strict: bool
    ) -> Steps[list[Top]]:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise UsageError(f"n is how many members to return, not {n!r}")
        raws = [_keys.id_bytes(key, "series") for key in keys]
        made, found = yield from self._buckets(raws, start, end, strict)
        covers = made.start, made.end, made.resolution, made.complete
        tops = []
        for summaries in found:
            counts: Counter[bytes] = Counter()
            for summary in summaries:
                counts.update(summary.counts)
            heaviest = heapq.nsmallest(n, counts.items(), key=lambda item: (-item[1], item[0]))
            members = [(_keys.id_shown(member), count) for member, count in heaviest]
            total = sum(summary.total for summary in summaries)
            error = sum(summary.lacks for summary in summaries)
            tops.append(Top(members, total, error, *covers))
        return tops

    def _today(self, key: Id, n: int, tz: str | dt.tzinfo) -> Steps[Top]:
        return (
            yield from self._of_today(tz, lambda low, high: self._tops([key], low, high, n, False))
        )


def _draft(item: Item) -> Draft:
    if not isinstance(item, tuple | list) or len(item) not in (3, 4):
        raise UsageError(f"incr_many() takes (series, member, amount[, at]), not {item!r}")
    key, member, amount, at = (*item, None)[:4]
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount < EXACT:
        raise UsageError(f"an amount is a positive int below 2^53, not {amount!r}")
    raw = _keys.id_bytes(key, "series")
    return Draft(raw, (amount, 0), at, _keys.id_bytes(member, "member"))


class TopSeries(_Ranked[Transport, Coalescer], SyncSeries):
    """The heaviest members per bucket of time, in several resolutions at once.

    Arguments are those of `TimeSeries`. By default buckets of 10 min are kept for 32 days, of 1 h
    for 400 and of 1 d for 1,830 days. `keep` is how many members a bucket keeps when there are more
    than twice as many.
    """

    def incr(self, key: Id, member: Id, amount: int = 1, *, at: Instant | None = None) -> None:
        """Add to a member, now or at another moment; amounts are positive.

        One round trip, none with `linger`. Raises as `TimeSeries.incr`.
        """
        self._count(_draft((key, member, amount, at)))

    def incr_many(self, items: Iterable[Item]) -> None:
        """Add many: `(series, member, amount)` or `(series, member, amount, at)`."""
        self._count_all(map(_draft, items))

    def top(
        self, key: Id, start: Instant, end: Instant | None = None, *, n: int = 10,
        strict: bool = False,
    ) -> Top:  # fmt: skip
        """Return the `n` heaviest members from `start` to before `end`, or now.

        The range is widened as that of `TimeSeries.sum`. One round trip.
        """
        (top,) = self._ask(self._tops([key], start, end, n, strict))
        return top

    def tops(
        self, keys: Iterable[Id], start: Instant, end: Instant | None = None, *, n: int = 10,
        strict: bool = False,
    ) -> dict[Id, Top]:  # fmt: skip
        """Return those of many series. One round trip (per node of a cluster)."""
        return self._ask_each(keys, lambda some: self._tops(some, start, end, n, strict))

    def today(self, key: Id, tz: str | dt.tzinfo = "UTC", *, n: int = 10) -> Top:
        """Return the heaviest members since midnight in a time zone."""
        return self._ask(self._today(key, n, tz))


class AsyncTopSeries(_Ranked[AsyncTransport, AsyncCoalescer], AsyncSeries):
    """`TopSeries` for asyncio, with the same arguments; `client` is from `redis.asyncio`."""

    async def incr(
        self, key: Id, member: Id, amount: int = 1, *, at: Instant | None = None
    ) -> None:
        """Add to a member, as `TopSeries.incr`."""
        await self._count(_draft((key, member, amount, at)))

    async def incr_many(self, items: Iterable[Item]) -> None:
        """Add many, as `TopSeries.incr_many`."""
        await self._count_all(map(_draft, items))

    async def top(
        self, key: Id, start: Instant, end: Instant | None = None, *, n: int = 10,
        strict: bool = False,
    ) -> Top:  # fmt: skip
        """Return the heaviest members of a range, as `TopSeries.top`."""
        (top,) = await self._ask(self._tops([key], start, end, n, strict))
        return top

    async def tops(
        self, keys: Iterable[Id], start: Instant, end: Instant | None = None, *, n: int = 10,
        strict: bool = False,
    ) -> dict[Id, Top]:  # fmt: skip
        """Return those of many series, as `TopSeries.tops`."""
        return await self._ask_each(keys, lambda some: self._tops(some, start, end, n, strict))

    async def today(self, key: Id, tz: str | dt.tzinfo = "UTC", *, n: int = 10) -> Top:
        """Return the heaviest members since midnight in a time zone."""
        return await self._ask(self._today(key, n, tz))
