"""Series of both colours: how what all kinds share is driven, in sync code and in a loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

from redishacks._buffer import Buffer
from redishacks._command import Steps
from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, AsyncLingering, Coalescer, Lingering
from redishacks._transport import Hook, connect, connect_async
from redishacks._units import Instant, Seconds
from redishacks.timeseries._contents import Scan
from redishacks.timeseries._core import Core, Draft, several
from redishacks.timeseries._delete import delete
from redishacks.timeseries._grow import add_resolution
from redishacks.timeseries._merge import merge
from redishacks.timeseries._transfer import Format, Writer, add_all, rows_of
from redishacks.timeseries.plan import Plan
from redishacks.timeseries.resolution import Resolution

R = TypeVar("R")


class SyncSeries(Lingering, Core[Transport, Coalescer]):
    """What series of all kinds have in common; their arguments are those of `TimeSeries`."""

    def _connect(self, client: Any, on_command: Hook | None) -> Transport:
        return connect(client, on_command)

    def _coalesce(self, buffer: Buffer, **options: Any) -> Coalescer:
        return Coalescer(buffer, self.transport, **options)

    def _count(self, draft: Draft) -> None:
        if self._coalescer is None:
            drive(self._one(draft), self.transport, self.deadline)
        else:
            self._coalescer.add(*self._held(draft))

    def _count_all(self, drafts: Iterable[Draft]) -> None:
        some = list(drafts)
        if self._coalescer is not None:
            self._coalescer.add_all([self._held(draft) for draft in some], self.layout.shown)
        elif some:
            drive(self._many(some), self.transport, self.deadline)

    def _ask(self, steps: Steps[R]) -> R:
        return drive(steps, self.transport, self.deadline)

    def _ask_each(
        self, keys: Iterable[Id], steps: Callable[[list[Id]], Steps[list[R]]]
    ) -> dict[Id, R]:
        """Return what steps tell of several series."""
        some = several(keys)
        return dict(zip(some, self._ask(steps(some)), strict=True))

    def explain(self, key: Id, start: Instant, end: Instant | None = None) -> Plan:
        """Return what is read for a range: which buckets of which resolution, how many bytes."""
        return self._ask(self._explain(key, start, end))

    def keys(self, match: str | None = None) -> Iterator[str | bytes]:
        """Iterate over the series that have something, in no order; `match` is a glob pattern.

        Scans the keys of every node, a thousand per round trip; those that come and go meanwhile
        may be there or not.
        """
        scan = Scan(self.layout, match, self._where())
        while (page := self._ask(scan.page())) is not None:
            yield from page

    def merge(self, source: Id, target: Id) -> None:
        """Add all of a series to another one, and leave nothing of it.

        Until it is done, what is on its way is in neither. Stopped at any point, it comes to its
        end with the next `merge` of the source, and nothing is lost or counted twice. Some round
        trips, and one for each day of data.
        """
        self._ask(merge(self.layout, source, target))

    def delete(self, key: Id, start: Instant, end: Instant) -> None:
        """Delete what was counted from `start` to before `end`, in every resolution.

        Both are multiples of the finest resolution. Raises `RetentionError`, and deletes nothing,
        where one is in the middle of a bucket of which nothing finer is there any more. A few round
        trips.
        """
        self._ask(delete(self.layout, key, start, end))

    def export(
        self, keys: Iterable[Id] | None = None, *, format: Format = "jsonl"
    ) -> Iterator[str]:
        """Write series out, all by default: iterates over lines of JSON or CSV, without ends.

        A line has a series, a bucket's step and its time in seconds, and what is in it; names are
        percent-encoded where they are no plain text. A round trip for a thousand keys.
        """
        writer = Writer(format)
        for key in self.keys() if keys is None else several(keys):
            yield from writer.lines(self._ask(rows_of(self.layout, key)))

    def import_(self, lines: Iterable[str], *, token: str | None = None) -> int:
        """Add what `export` has written to what is there; returns how many rows it was.

        What has expired is left out. Where fine rows had expired when they were written out, and
        would still be kept here, a sum of a part of a coarser bucket is 0. With a `token` of your
        own it can be repeated after an error, for a day, and counts once. One round trip for 500
        rows.
        """
        return self._ask(add_all(self.layout, lines, token))

    def add_resolution(
        self, resolution: Resolution | tuple[Seconds, Seconds], *, since: Instant | None = None
    ) -> int:
        """Add a resolution to those in use; returns since when it is read, in seconds since 1970.

        That is some minutes later at the earliest, when all who write know of it, and where a
        bucket of the next coarser resolution begins. Nobody need be restarted. Raises `UsageError`
        where it does not fit in with the others: nothing coarser than the coarsest can be added
        where that expires in buckets of its own, as all but sums and gauges do.
        """
        return self._ask(add_resolution(self.layout, resolution, since))


class AsyncSeries(AsyncLingering, Core[AsyncTransport, AsyncCoalescer]):
    """`SyncSeries` for asyncio."""

    def _connect(self, client: Any, on_command: Hook | None) -> AsyncTransport:
        return connect_async(client, on_command)

    def _coalesce(self, buffer: Buffer, **options: Any) -> AsyncCoalescer:
        return AsyncCoalescer(buffer, self.transport, **options)

    async def _count(self, draft: Draft) -> None:
        if self._coalescer is None:
            await drive_async(self._one(draft), self.transport, self.deadline)
        else:
            await self._coalescer.add(*self._held(draft))

    async def _count_all(self, drafts: Iterable[Draft]) -> None:
        some = list(drafts)
        if self._coalescer is not None:
            await self._coalescer.add_all([self._held(draft) for draft in some], self.layout.shown)
        elif some:
            await drive_async(self._many(some), self.transport, self.deadline)

    async def _ask(self, steps: Steps[R]) -> R:
        return await drive_async(steps, self.transport, self.deadline)

    async def _ask_each(
        self, keys: Iterable[Id], steps: Callable[[list[Id]], Steps[list[R]]]
    ) -> dict[Id, R]:
        """Return what steps tell of several series."""
        some = several(keys)
        return dict(zip(some, await self._ask(steps(some)), strict=True))

    async def explain(self, key: Id, start: Instant, end: Instant | None = None) -> Plan:
        """Return what is read for a range, as `TimeSeries.explain`."""
        return await self._ask(self._explain(key, start, end))

    async def keys(self, match: str | None = None) -> AsyncIterator[str | bytes]:
        """Iterate over the series that have something, as `TimeSeries.keys`."""
        scan = Scan(self.layout, match, self._where())
        while (page := await self._ask(scan.page())) is not None:
            for key in page:
                yield key

    async def merge(self, source: Id, target: Id) -> None:
        """Add all of a series to another one, as `TimeSeries.merge`."""
        await self._ask(merge(self.layout, source, target))

    async def delete(self, key: Id, start: Instant, end: Instant) -> None:
        """Delete what was counted in a range, as `TimeSeries.delete`."""
        await self._ask(delete(self.layout, key, start, end))

    async def export(
        self, keys: Iterable[Id] | None = None, *, format: Format = "jsonl"
    ) -> AsyncIterator[str]:
        """Write series out, as `TimeSeries.export`."""
        writer = Writer(format)
        some = [key async for key in self.keys()] if keys is None else several(keys)
        for key in some:
            for line in writer.lines(await self._ask(rows_of(self.layout, key))):
                yield line

    async def import_(self, lines: Iterable[str], *, token: str | None = None) -> int:
        """Add what `export` has written to what is there, as `TimeSeries.import_`."""
        return await self._ask(add_all(self.layout, lines, token))

    async def add_resolution(
        self, resolution: Resolution | tuple[Seconds, Seconds], *, since: Instant | None = None
    ) -> int:
        """Add a resolution to those in use, as `TimeSeries.add_resolution`."""
        return await self._ask(add_resolution(self.layout, resolution, since))
