"""The transport for asyncio: one multiplexed connection per event loop and lane.

What tasks send in the same tick goes out in one write, and replies come back in order. A command
that was cancelled or came late keeps its place in line; its reply is thrown away. Only when the
oldest unanswered command is late is the connection dropped.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Hashable, Sequence
from math import inf
from time import monotonic
from typing import Any, Protocol, TypeVar

from hiredis import ReplyError

from redishacks._command import Command, Outcome
from redishacks._drive import drive_async
from redishacks._transport._async_link import Link, open_link
from redishacks._transport._decide import CONNECT_DEADLINE, FIRST_PAUSE, Message, Talk
from redishacks._transport._foreign import ForeignNode
from redishacks._transport._loss import Lost, Refused, Unreachable
from redishacks._transport._own import AsyncConversation, Terms, check_asked, unsaid
from redishacks._transport._routes import Routes, View, settings_for
from redishacks._transport._settings import Settings
from redishacks._transport._socket import CLOSE_AFTER, CLOSED
from redishacks._transport._wire import PING, Address, pack, show
from redishacks.errors import RedisHacksError, UsageError

T = TypeVar("T")


class Lane:
    """One connection of a node in one loop: made when first needed, and again when it was lost."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: Settings) -> None:
        self._loop = loop
        self._settings = settings
        self._link: Link | None = None
        #: All that are open, those that only wait for their last replies too.
        self._links: set[Link] = set()
        self._making: asyncio.Task[Link | Exception] | None = None

    def ready(self, now: float) -> Link | None:
        """Return the connection if it can be written to at once."""
        link = self._link
        return link if link is not None and link.usable(now) else None

    async def borrow(self, talk: Talk[Any]) -> Link:
        """Return the connection, a new one if need be.

        Raises `Unreachable`, `Refused` or `ServerError`; nothing was sent then.
        """
        started = monotonic()
        link = self.ready(started)
        if link is not None:
            return link
        if self._making is None:
            self._making = self._loop.create_task(self._make(talk.end - started))
        made = await asyncio.shield(self._making)
        if isinstance(made, Exception):
            raise made
        talk.connected(monotonic() - started)
        return made

    def retire(self) -> None:
        """Use another connection from now on."""
        if self._link is not None:
            self._link.retire()
            self._link = None

    def close(self) -> None:
        """Close every connection now."""
        if self._making is not None:
            self._making.cancel()
        for link in self._links:
            link.lose(CLOSED)
        self._links.clear()

    def abandon(self) -> None:
        """Close file descriptors only, in a forked child or for a closed loop."""
        for link in self._links:
            link.abandon()
        self._links.clear()

    async def _make(self, patience: float) -> Link | Exception:
        end = monotonic() + patience
        try:
            if await self._awake(patience / 2):
                assert self._link is not None
                return self._link
            left = end - monotonic()
            link = await open_link(self._loop, self._settings, left, self._links)
            self._link = link
            return link
        except (Unreachable, Refused, RedisHacksError) as error:
            return error
        finally:
            self._making = None
            self._links = {link for link in self._links if link.open}

    async def _awake(self, patience: float) -> bool:
        # Idle for long: a firewall may have forgotten the connection without a word.
        link = self._link
        if link is None or not link.look():
            return False
        reply = await link.submit(PING, None, monotonic() + patience)
        if isinstance(reply, Lost):
            link.lose(reply.why)
            return False
        return True


class Node:
    """One server as one loop reaches it: a lane for all, and one for what is large or slow."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, settings: Settings, address: Address
    ) -> None:
        #: As routes know it, which may be by a name.
        self.address = address
        self._shared = Lane(loop, settings)
        self._bulk = Lane(loop, settings)
        self._loop, self._settings = loop, settings
        #: Connections of conversations, those in use too; and those that are not.
        self._own: set[Link] = set()
        self._spare: list[Link] = []

    async def take(self, patience: float) -> Link:
        """Return a connection that nobody else uses; raises `Unreachable` or `Refused`."""
        while self._spare:
            link = self._spare.pop()
            if link.usable(monotonic()) and link.look():
                return link
            link.lose(CLOSED)
        self._own = {link for link in self._own if link.open}
        return await open_link(self._loop, self._settings, patience, self._own)

    def give(self, link: Link, *, whole: bool) -> None:
        """Take a connection back, which is ended unless all that was asked was answered."""
        if whole and link.open:
            self._spare.append(link)
            while monotonic() - self._spare[0].since > CLOSE_AFTER:
                self._spare.pop(0).lose(CLOSED)
        else:
            link.lose(CLOSED)

    def ready(self, now: float) -> Link | None:
        """Return the shared connection if it can be written to at once."""
        return self._shared.ready(now)

    async def exchange(self, talk: Talk[Any], message: Message) -> None:
        """Say a message, and tell the talk what came of it; raises `Lost` before it was written."""
        lane = self._bulk if message.bulk else self._shared
        link = await lane.borrow(talk)
        if monotonic() >= talk.end:
            raise Lost("no time was left to send it", written=False)
        submitted = await link.submit_in_turn(talk, message)
        if submitted is None:
            return
        told, waiting = submitted
        replies = await waiting
        if isinstance(replies, Lost):
            talk.lost(told, replies)
        else:
            talk.answered(told, replies)

    def retire(self) -> None:
        """Use other connections from now on."""
        self._shared.retire()
        self._bulk.retire()
        while self._spare:
            self._spare.pop().lose(CLOSED)

    def close(self) -> None:
        """Close every connection now."""
        self._shared.close()
        self._bulk.close()
        for link in self._own:
            link.lose(CLOSED)

    def abandon(self) -> None:
        """Close file descriptors only, in a forked child or for a closed loop."""
        self._shared.abandon()
        self._bulk.abandon()
        for link in self._own:
            link.abandon()


class Guest(Protocol):
    """Something with connections of its own in a loop."""

    def close(self) -> None:
        """Close every connection now."""

    def abandon(self) -> None:
        """Close file descriptors only."""


class Site:
    """What a transport has in one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        sites: dict[int, Site],
        routes: Routes | None,
    ) -> None:
        self.loop = loop
        self._settings = settings
        self._sites = sites
        self._routes = routes
        self._nodes: dict[Address, Node | ForeignNode] = {}
        #: Those too that have left the cluster, while an exchange with them is under way.
        self._known: weakref.WeakSet[Node | ForeignNode] = weakref.WeakSet()
        self.guests: weakref.WeakSet[Guest] = weakref.WeakSet()
        #: What tools have once per server and loop, by their own names.
        self.single: dict[str, Any] = {}
        self.only = None if routes is not None else self.node(settings.address)
        # asyncio.run() ends a loop's async generators before it closes the loop: our cue.
        self._guard = self._until_shutdown()
        try:
            self._guard.__anext__().__await__().send(None)
        except StopIteration:
            pass

    def node(self, address: Address) -> Node | ForeignNode:
        """Return a server by its address."""
        node = self._nodes.get(address)
        if node is None:
            settings = self._settings
            if self._routes is not None:
                settings = self._routes.settings(address, settings)
            node = ForeignNode(settings) if settings.foreign else Node(self.loop, settings, address)
            self._nodes[address] = node
            self._known.add(node)
        return node

    def keep(self, addresses: frozenset[Address]) -> None:
        """Leave the nodes that are no longer part of the cluster."""
        for address in self._nodes.keys() - addresses:
            self._nodes.pop(address).retire()

    def retire(self) -> None:
        """Close connections once what is in flight has been answered."""
        for node in self._nodes.values():
            node.retire()

    def close(self) -> None:
        """Close everything now."""
        for one in (*self._nodes.values(), *self.guests):
            one.close()
        self._sites.pop(id(self.loop), None)

    def abandon(self) -> None:
        """Close file descriptors only, in a forked child or for a closed loop."""
        for one in (*self._known, *self.guests):
            one.abandon()

    async def _until_shutdown(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self.close()
            for _ in range(5):  # lets foreign connections say goodbye, and tasks end
                await asyncio.sleep(0)


class AsyncTransport:
    """Commands to one server, or to the nodes of a cluster, from any event loop."""

    def __init__(self, settings: Settings, routes: Routes | None = None) -> None:
        self._settings = settings
        self._routes = routes
        #: By the id of the loop, which the site keeps alive.
        self._sites: dict[int, Site] = {}

    def __del__(self) -> None:
        for site in list(self._sites.values()):
            try:
                site.loop.call_soon_threadsafe(site.close)
            except RuntimeError:
                site.abandon()

    async def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error.

        The usual way is short: one exchange on the shared connection. Anything else is a `Talk`.
        """
        now = monotonic()
        site = self._sites.get(id(asyncio.get_running_loop())) or self._new_site()
        node, version = (site.only, 0) if site.only is not None else self._usual(site, command)
        link = None if node is None or command.bulk or command.replies != 1 else node.ready(now)
        if node is None or link is None or link.version != version or now >= link.due:
            return (await self._converse(site, self._talk((command,), deadline, now)))[0].result()
        data = pack(command)
        if link.full(len(data)):
            return (await self._converse(site, self._talk((command,), deadline, now)))[0].result()
        reply = await link.submit(data, None, now + deadline)
        kind = type(reply)
        if kind is not ReplyError and kind is not Lost:
            return command.parse(reply)
        talk = self._talk((command,), deadline, now)
        if kind is Lost:
            talk.lost(talk.first(node.address), reply)
        else:
            talk.answered(talk.first(node.address), (reply,))
        return (await self._converse(site, talk, begun=True))[0].result()

    async def run(
        self, commands: Sequence[Command[T]], deadline: float, view: View | None = None
    ) -> list[Outcome[T]]:
        """Say several, one write per node; every one ends as a value or an error, in order.

        With a `view`, those that name a node are sent only as long as that is what is known.
        """
        talk = self._talk(commands, deadline, monotonic(), view)
        return await self._converse(self._site(), talk)

    async def learn(self, deadline: float) -> None:
        """See that it is known who has which keys; raises what hinders it."""
        if self._routes is not None and (self._routes.view is None or self._routes.stale):
            talk: Talk[None] = self._talk((), deadline, monotonic())
            await self._prepare(self._site(), self._routes, talk)

    async def converse(self, keys: Sequence[bytes], deadline: float) -> AsyncConversation:
        """Return a connection of one's own for some keys, as `SyncTransport.converse`."""
        end = monotonic() + deadline
        site = self._site()
        question: Command[Any] = Command(("EXISTS", *keys), tuple(keys), repeatable=True)
        while True:
            await self.learn(end - monotonic())
            view = self._routes.view if self._routes is not None else None
            if self._routes is not None and (view is None or not view.settled):
                await self.call(question, end - monotonic())
                if self._routes.view is not view:
                    continue
            node = site.only or site.node(view.route(keys))  # type: ignore[union-attr]
            if isinstance(node, ForeignNode):
                raise UsageError("this client's class of connections cannot be used for that")
            check_asked(self._routes, node.address, deadline)
            try:
                link = await node.take(max(0.0, end - monotonic()))
            except (Unreachable, Refused) as error:
                unsaid(self._routes, node.address, error, end)
                await asyncio.sleep(FIRST_PAUSE)
                continue
            if self._routes is None or self._routes.view is view:
                return AsyncConversation(node, link, Terms(node.address, self._routes, view))
            node.give(link, whole=True)

    @property
    def routes(self) -> Routes | None:
        """What is known of several nodes; None for one server."""
        return self._routes

    async def aclose(self) -> None:
        """Close this loop's connections; the next call opens new ones."""
        site = self._sites.get(id(asyncio.get_running_loop()))
        if site is not None:
            site.retire()

    def abandon(self) -> None:
        """In a forked child: close every connection; the parent goes on undisturbed."""
        for site in self._sites.values():
            site.abandon()
        self._sites.clear()

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""
        if self._routes is None:
            return show(self._settings.address)
        return self._routes.where(command.keys)

    @property
    def bare(self) -> AsyncTransport:
        """Itself: no hook is between."""
        return self

    @property
    def server(self) -> Hashable:
        """Name the server and its database: the same for every client of them."""
        return (self._settings.address, self._settings.db)

    @property
    def clustered(self) -> bool:
        """Whether keys of one command must share a slot."""
        return self._routes is not None

    @property
    def sharded(self) -> bool:
        """Whether channels belong to slots."""
        return self._routes is not None and self._routes.shards

    @property
    def single(self) -> dict[str, Any]:
        """What tools have once per server and loop, by their own names."""
        return self._site().single

    def settings_for(self, command: Command[Any]) -> Settings | None:
        """Return how to reach the node that a command goes to, for a connection of one's own.

        None for a connection class that we do not know.
        """
        if self._settings.foreign is not None:
            return None
        return settings_for(self._routes, self._settings, command)

    def adopt(self, guest: Guest) -> None:
        """Close its connections with those of this loop."""
        self._site().guests.add(guest)

    def post(self, command: Command[Any], deadline: float) -> asyncio.Future[Any] | None:
        """Send a command behind those that were sent before, without waiting.

        Its raw reply is in the future; None: there is no connection, or no room on it. A script is
        sent whole, since nobody is there to do that later.
        """
        site = self._site()
        node, version = (site.only, 0) if site.only is not None else self._usual(site, command)
        link = None if node is None else node.ready(monotonic())
        data = pack(command, whole=True)
        if link is None or link.full(len(data)) or link.version != version:
            return None
        return link.submit(data, None, monotonic() + deadline)

    def _site(self) -> Site:
        return self._sites.get(id(asyncio.get_running_loop())) or self._new_site()

    def _new_site(self) -> Site:
        # A loop closed without shutting down its async generators left its connections here.
        for key, site in list(self._sites.items()):
            if site.loop.is_closed():
                site.abandon()
                del self._sites[key]
        loop = asyncio.get_running_loop()
        site = Site(loop, self._settings, self._sites, self._routes)
        self._sites[id(loop)] = site
        return site

    def _talk(
        self,
        commands: Sequence[Command[T]],
        deadline: float,
        now: float,
        view: View | None = None,
    ) -> Talk[T]:
        return Talk(commands, deadline, now, self._settings.address, self._routes, view)

    def _usual(self, site: Site, command: Command[Any]) -> tuple[Node | ForeignNode | None, int]:
        """Return the node of a command and by which version it is that."""
        routes = self._routes
        if routes is None or routes.stale or routes.troubled or command.node is not None:
            return None, 0
        view = routes.view
        if view is None or not view.settled:
            return None, 0
        return site.node(view.route(command.keys)), view.version

    async def _converse(
        self, site: Site, talk: Talk[T], *, begun: bool = False
    ) -> list[Outcome[T]]:
        while True:
            if not begun:
                if self._routes is not None:
                    try:
                        await self._prepare(site, self._routes, talk)
                    except RedisHacksError as error:
                        talk.refused(error)
                if monotonic() < talk.end:
                    await self._round(site, talk)
            begun = False
            pause = talk.rest(monotonic())
            for address in talk.estranged:
                site.node(address).retire()
            talk.estranged.clear()
            if pause is None:
                return talk.results()
            if pause:
                await asyncio.sleep(pause)

    async def _round(self, site: Site, talk: Talk[Any]) -> None:
        """Say all that is open, to all nodes at the same time."""
        plan = talk.plan()
        if len(plan) == 1:
            await self._say(site, talk, plan[0])
        else:
            await asyncio.gather(*(self._say(site, talk, message) for message in plan))

    async def _say(self, site: Site, talk: Talk[Any], message: Message) -> None:
        try:
            await site.node(message.node).exchange(talk, message)
        except Lost as loss:
            talk.lost(message, loss)
        except (Unreachable, Refused, RedisHacksError) as error:
            talk.unsaid(message, error)

    async def _prepare(self, site: Site, routes: Routes, talk: Talk[Any]) -> None:
        """See that it is known who has which keys, and that those are there."""
        now = monotonic()
        if routes.stale and (routes.due(now) or routes.view is None):
            # Reading it first is part of connecting; later it must not cost more than a command.
            first = routes.view is None
            give_up = now + CONNECT_DEADLINE if first else talk.end
            await drive_async(routes.refresh(), _Within(self, site, talk, give_up))
            if not routes.stale:
                site.keep(routes.nodes())
                talk.connected(monotonic() - now)
        pending = talk.to_pull()
        if pending is not None:
            view, keys = pending
            try:
                await drive_async(view.pull(keys), _Within(self, site, talk, talk.end, view))
            except RedisHacksError as error:
                talk.pulled(view, keys, error)
            else:
                talk.pulled(view, keys, None)

    async def once(
        self, site: Site, commands: Sequence[Command[T]], limit: float, view: View | None
    ) -> list[Outcome[T]]:
        """Say commands once, in the middle of a talk, by what is known or by a view."""
        inner = Talk(commands, limit, monotonic(), self._settings.address, self._routes, view)
        await self._round(site, inner)
        inner.rest(inf)
        return inner.results()


class _Within:
    """How steps say what they must in the middle of a talk."""

    def __init__(
        self,
        transport: AsyncTransport,
        site: Site,
        talk: Talk[Any],
        give_up: float,
        view: View | None = None,
    ) -> None:
        self._transport, self._site = transport, site
        self._talk, self._give_up, self._view = talk, give_up, view

    async def call(self, command: Command[T], deadline: float) -> T:
        """Say one once, in the time that is left."""
        return (await self.run((command,), deadline))[0].result()

    async def run(
        self, commands: Sequence[Command[T]], deadline: float, view: View | None = None
    ) -> list[Outcome[T]]:
        """Say several once, in the time that is left."""
        limit = min(self._talk.deadline, self._give_up - monotonic())
        return await self._transport.once(self._site, commands, limit, view or self._view)
