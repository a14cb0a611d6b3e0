"""Series of both colours: how what all kinds share is driven, in sync code and in a loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from redishacks._buffer import Buffer
from redishacks._command import Steps
from redishacks._drive import AsyncTransport, Transport, drive, drive_async
from redishacks._keys import Id
from redishacks._linger import AsyncCoalescer, AsyncLingering, Coalescer, Lingering
from redishacks._transport import Hook, connect, connect_async
from redishacks._units import Instant
from redishacks.timeseries._core import Core, Draft
from redishacks.timeseries.plan import Plan

R = TypeVar("R")


class SyncSeries(Lingering, Core[Transport, Coalescer]):
    """What series of all kinds have in common.

    `client` is a `redis.Redis`, a Sentinel master, a `redis.RedisCluster` or a URL; `name` is that
    of many series, which need not be declared.

    - `resolutions`: pairs of seconds, (step, retention). Whoever writes first decides.
    - `partitions` spreads a name over so many slots of a cluster: 64 there, 1 elsewhere.
    - `linger`, `max_buffered`, `overflow`, `deadline` and `on_command` are those of
      `BufferedCounter`; `on_refused` gets an `Uncounted`, `on_maybe_applied` a list of them.
    """

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

    def explain(self, key: Id, start: Instant, end: Instant | None = None) -> Plan:
        """Return what is read for a range: which buckets of which resolution, how many bytes."""
        return self._ask(self._explain(key, start, end))


class AsyncSeries(AsyncLingering, Core[AsyncTransport, AsyncCoalescer]):
    """`SyncSeries` for asyncio, with the same arguments; `client` is from `redis.asyncio`."""

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

    async def explain(self, key: Id, start: Instant, end: Instant | None = None) -> Plan:
        """Return what is read for a range, as `SyncSeries.explain`."""
        return await self._ask(self._explain(key, start, end))
