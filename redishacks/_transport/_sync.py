"""The transport for threads and greenlets: a few own connections, most recently used first.

A connection is taken for one exchange and given back after its last reply; whatever interrupts an
exchange closes it. So no reply can reach another caller, be it a thread, a greenlet or a signal
handler that uses the client while an exchange is under way.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from math import inf
from time import monotonic
from typing import Any, Protocol, TypeVar

from hiredis import ReplyError

from redishacks._command import Command, Outcome
from redishacks._drive import drive
from redishacks._transport import _sentinel
from redishacks._transport._decide import CONNECT_DEADLINE, FIRST_PAUSE, Message, Talk
from redishacks._transport._foreign import ForeignLink
from redishacks._transport._link import greet, open_link
from redishacks._transport._loss import Lost, Refused, Unreachable
from redishacks._transport._own import Conversation, Terms, check_asked, unsaid
from redishacks._transport._routes import Routes, View, settings_for
from redishacks._transport._settings import Settings
from redishacks._transport._socket import CLOSE_AFTER, LOOK_AFTER, PING_AFTER
from redishacks._transport._wire import PING, Address, pack, show
from redishacks.errors import RedisHacksError, UsageError

T = TypeVar("T")


class Channel(Protocol):
    """One connection. After any error it must be closed."""

    since: float
    version: int
    due: float

    def ask(self, data: bytes, end: float, alone: bool) -> Any:
        """Send one packed command and return its reply; `alone`: nobody else waits for one."""

    def send(self, data: bytes, end: float) -> None:
        """Send packed commands whole."""

    def replies(self, count: int, end: float) -> list[Any]:
        """Return the next replies, errors as values."""

    def alive(self) -> bool:
        """Look, without waiting, whether the server has closed it."""

    def close(self) -> None:
        """Close it; twice does no harm."""

    def abandon(self) -> None:
        """In a forked child: let go of the parent's connection."""


class Guest(Protocol):
    """Something with connections of its own."""

    def abandon(self) -> None:
        """In a forked child: close every connection."""


class Node:
    """One server and the connections to it."""

    def __init__(self, settings: Settings, address: Address | None = None) -> None:
        #: As routes know it, which may be by a name.
        self.address = address or settings.address
        self._settings = settings
        self._idle: deque[Channel] = deque()
        #: All that are open, those in use too: a forked child must close them. Weak, for one in
        #: use is forgotten without a word where a signal handler raises before the exchange.
        self._open: set[weakref.ref[Channel]] = set()

    def take(self, now: float) -> Channel | None:
        """Return an idle connection that was used lately, or None."""
        idle = self._idle
        while True:
            try:
                link = idle.pop()
            except IndexError:
                return None
            age = now - link.since
            if age < LOOK_AFTER:
                return link
            if age > PING_AFTER:
                idle.append(link)
                return None
            if link.alive():
                return link
            self.drop(link)

    def alone(self) -> bool:
        """Return whether one connection is in use."""
        return len(self._open) - len(self._idle) == 1

    def give(self, link: Channel) -> None:
        """Take a connection back after a whole exchange."""
        now = link.since = monotonic()
        idle = self._idle
        idle.append(link)
        if len(idle) > 1 and now - idle[0].since > CLOSE_AFTER:
            self._trim(now)

    def drop(self, link: Channel) -> None:
        """Close a connection for good."""
        self._open.discard(weakref.ref(link))
        link.close()

    def lost(self, link: Channel) -> None:
        """Close a connection that failed, and the idle ones: a new one will tell in its handshake
        whether the server is there, when nothing has been applied yet.
        """
        self.drop(link)
        self.reset()

    def borrow(self, talk: Talk[Any]) -> Channel:
        """Return a connection, a new one if need be.

        Raises `Unreachable`, `Refused` or `ServerError`; nothing was sent then.
        """
        now = monotonic()
        if now >= talk.end:
            raise Refused("no time was left to send it")
        link = self.take(now) or self._awaken(now + (talk.end - now) / 2)
        if link is None:
            started = monotonic()
            link = self.connect(talk.end - started)
            talk.connected(monotonic() - started)
        return link

    def connect(self, patience: float) -> Channel:
        """Open a connection and say what must be said first."""
        process = os.getpid()
        try:
            link = self._connect(patience)
        except Unreachable:
            if os.getpid() == process:
                raise
        else:
            if os.getpid() == process:
                return link
            self.drop(link)
        # In the child of a signal handler's fork: the connection was the parent's.
        raise Refused("the process was forked while connecting")

    def reset(self) -> None:
        """Close the idle connections."""
        while True:
            try:
                self.drop(self._idle.pop())
            except IndexError:
                return

    def abandon(self) -> None:
        """In a forked child: close everything; the parent goes on undisturbed."""
        for known in list(self._open):
            link = known()
            if link is not None:
                link.abandon()
        self._open = set()
        self._idle = deque()

    def _know(self, link: Channel) -> None:
        self._open.add(weakref.ref(link, self._open.discard))

    def _connect(self, patience: float) -> Channel:
        end = monotonic() + CONNECT_DEADLINE
        settings = self._settings
        if settings.sentinel is not None:
            settings = settings.at(_sentinel.master(settings, CONNECT_DEADLINE))
        if settings.foreign is not None:
            foreign = ForeignLink(settings)
            self._know(foreign)
            foreign.connect()
            return foreign
        link = open_link(settings, end, self._know)
        try:
            greet(link, settings, min(end, monotonic() + patience * settings.round_trips))
        except BaseException:
            self.drop(link)
            raise
        return link

    def _awaken(self, end: float) -> Channel | None:
        # Idle for long: a firewall may have forgotten the connection without a word.
        try:
            link = self._idle.pop()
        except IndexError:
            return None
        try:
            if link.alive():
                link.send(PING, end)
                link.replies(1, end)
                return link
        except Lost:
            pass
        except BaseException:
            self.drop(link)
            raise
        self.drop(link)
        self.reset()  # the others have been idle for longer still
        return None

    def _trim(self, now: float) -> None:
        while True:
            try:
                link = self._idle.popleft()
            except IndexError:
                return
            if now - link.since <= CLOSE_AFTER:
                # Another thread may have emptied the line meanwhile; its place matters little.
                self._idle.appendleft(link)
                return
            self.drop(link)


class SyncTransport:
    """Commands to one server, or to the nodes of a cluster."""

    def __init__(self, settings: Settings, routes: Routes | None = None) -> None:
        self._settings = settings
        self._routes = routes
        self._nodes: dict[Address, Node] = {}
        #: Those too that have left the cluster, while an exchange with them is under way.
        self._known: weakref.WeakSet[Guest] = weakref.WeakSet()
        self._only = None if routes is not None else self._node(settings.address)
        #: What tools have once per server and process, by their own names.
        self.single: dict[str, Any] = {}

    @property
    def bare(self) -> SyncTransport:
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

    def settings_for(self, command: Command[Any]) -> Settings | None:
        """Return how to reach the node that a command goes to, for a connection of one's own.

        None for a connection class that we do not know.
        """
        if self._settings.foreign is not None:
            return None
        return settings_for(self._routes, self._settings, command)

    def adopt(self, guest: Guest) -> None:
        """Close its connections too in a forked child."""
        self._known.add(guest)

    def call(self, command: Command[T], deadline: float) -> T:
        """Say one command, return its result or raise its error.

        The usual way is short: one exchange on an idle connection. Anything else is a `Talk`.
        """
        now = monotonic()
        node, version = (self._only, 0) if self._only is not None else self._usual(command)
        link = node.take(now) if node is not None and command.replies == 1 else None
        if node is None or link is None:
            return self._converse(self._talk((command,), deadline, now))[0].result()
        if link.version != version or now >= link.due:
            node.give(link)
            return self._converse(self._talk((command,), deadline, now))[0].result()
        try:
            reply = link.ask(pack(command), now + deadline, node.alone())
        except Lost as loss:
            node.lost(link)
            talk = self._talk((command,), deadline, now)
            talk.lost(talk.first(node.address), loss)
        except UsageError:
            node.give(link)
            raise
        except BaseException:
            node.drop(link)
            raise
        else:
            node.give(link)
            if type(reply) is not ReplyError:
                return command.parse(reply)
            talk = self._talk((command,), deadline, now)
            talk.answered(talk.first(node.address), (reply,))
        return self._converse(talk, begun=True)[0].result()

    def run(
        self, commands: Sequence[Command[T]], deadline: float, view: View | None = None
    ) -> list[Outcome[T]]:
        """Say several, one write per node; every one ends as a value or an error, in order.

        With a `view`, those that name a node are sent only as long as that is what is known.
        """
        return self._converse(self._talk(commands, deadline, monotonic(), view))

    def learn(self, deadline: float) -> None:
        """See that it is known who has which keys; raises what hinders it."""
        if self._routes is not None and (self._routes.view is None or self._routes.stale):
            self._prepare(self._routes, self._talk((), deadline, monotonic()))

    def converse(self, keys: Sequence[bytes], deadline: float) -> Conversation:
        """Return a connection of one's own to the node of some keys, which are there.

        Raises `UnavailableError`, and what learning who has them raises.
        """
        end = monotonic() + deadline
        question: Command[Any] = Command(("EXISTS", *keys), tuple(keys), repeatable=True)
        while True:
            self.learn(end - monotonic())
            view = self._routes.view if self._routes is not None else None
            if self._routes is not None and (view is None or not view.settled):
                self.call(question, end - monotonic())
                if self._routes.view is not view:
                    continue
            node = self._only or self._node(view.route(keys))  # type: ignore[union-attr]
            check_asked(self._routes, node.address, deadline)
            try:
                link = node.take(monotonic()) or node.connect(max(0.0, end - monotonic()))
            except (Unreachable, Refused) as error:
                unsaid(self._routes, node.address, error, end)
                time.sleep(FIRST_PAUSE)
                continue
            if not link.alive():  # however lately it was used: what is said waits for long
                node.drop(link)
            elif self._routes is None or self._routes.view is view:
                return Conversation(node, link, Terms(node.address, self._routes, view))
            else:
                node.give(link)

    @property
    def routes(self) -> Routes | None:
        """What is known of several nodes; None for one server."""
        return self._routes

    def close(self) -> None:
        """Close idle connections; the next call opens new ones."""
        for node in list(self._nodes.values()):
            node.reset()

    def abandon(self) -> None:
        """In a forked child: close every connection, those in use too."""
        for node in list(self._known):
            node.abandon()
        self.single.clear()

    def where(self, command: Command[Any]) -> str:
        """Name the node that a command goes to."""
        if self._routes is None:
            return show(self._settings.address)
        return self._routes.where(command.keys)

    def _talk(
        self,
        commands: Sequence[Command[T]],
        deadline: float,
        now: float,
        view: View | None = None,
    ) -> Talk[T]:
        return Talk(commands, deadline, now, self._settings.address, self._routes, view)

    def _usual(self, command: Command[Any]) -> tuple[Node | None, int]:
        """Return the node of a command and by which version it is that."""
        routes = self._routes
        if routes is None or routes.stale or routes.troubled or command.node is not None:
            return None, 0
        view = routes.view
        if view is None or not view.settled:
            return None, 0
        return self._node(view.route(command.keys)), view.version

    def _node(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            settings = self._settings
            if self._routes is not None:
                settings = self._routes.settings(address, settings)
            node = self._nodes.setdefault(address, Node(settings, address))
            self._known.add(node)
        return node

    def _converse(self, talk: Talk[T], *, begun: bool = False) -> list[Outcome[T]]:
        while True:
            if not begun:
                if self._routes is not None:
                    try:
                        self._prepare(self._routes, talk)
                    except RedisHacksError as error:
                        talk.refused(error)
                if monotonic() < talk.end:
                    self._round(talk)
            begun = False
            pause = talk.rest(monotonic())
            for address in talk.estranged:
                self._node(address).reset()
            talk.estranged.clear()
            if pause is None:
                return talk.results()
            if pause:
                time.sleep(pause)

    def _round(self, talk: Talk[Any]) -> None:
        """Say all that is open: write to every node, then read from every node."""
        under_way: deque[tuple[Node, Channel, Message]] = deque()
        later: list[tuple[Node, Message]] = []
        try:
            for message in talk.plan():
                node = self._node(message.node)
                link = node.take(monotonic())
                if link is None:
                    later.append((node, message))
                else:
                    _send(talk, node, link, message, under_way)
            # Connecting may take all the time there is: by now the other nodes are at work.
            for node, message in later:
                began = monotonic()
                try:
                    link = node.borrow(talk)
                except (Unreachable, Refused, RedisHacksError) as error:
                    talk.unsaid(message, error)
                    talk.connected(monotonic() - began)  # the next node has its time too
                else:
                    _send(talk, node, link, message, under_way)
            while under_way:
                node, link, message = under_way[0]
                try:
                    replies = link.replies(message.replies, talk.end)
                except Lost as loss:
                    under_way.popleft()
                    node.lost(link)
                    talk.lost(message, loss)
                else:
                    # First: what is idle again may be somebody else's, and is not ours to close.
                    under_way.popleft()
                    node.give(link)
                    talk.answered(message, replies)
        except BaseException:
            for node, link, _ in under_way:
                node.drop(link)
            raise

    def _prepare(self, routes: Routes, talk: Talk[Any]) -> None:
        """See that it is known who has which keys, and that those are there."""
        now = monotonic()
        if routes.stale and (routes.due(now) or routes.view is None):
            # Reading it first is part of connecting; later it must not cost more than a command.
            first = routes.view is None
            give_up = now + CONNECT_DEADLINE if first else talk.end
            drive(routes.refresh(), _Within(self, talk, give_up))
            if not routes.stale:
                self._keep(routes.nodes())
                talk.connected(monotonic() - now)
        pending = talk.to_pull()
        if pending is not None:
            view, keys = pending
            try:
                drive(view.pull(keys), _Within(self, talk, talk.end, view))
            except RedisHacksError as error:
                talk.pulled(view, keys, error)
            else:
                talk.pulled(view, keys, None)

    def once(
        self, commands: Sequence[Command[T]], limit: float, view: View | None
    ) -> list[Outcome[T]]:
        """Say commands once, in the middle of a talk, by what is known or by a view."""
        inner = Talk(commands, limit, monotonic(), self._settings.address, self._routes, view)
        self._round(inner)
        inner.rest(inf)
        return inner.results()

    def _keep(self, addresses: frozenset[Address]) -> None:
        for address in self._nodes.keys() - addresses:
            self._nodes.pop(address).reset()


class _Within:
    """How steps say what they must in the middle of a talk."""

    def __init__(
        self, transport: SyncTransport, talk: Talk[Any], give_up: float, view: View | None = None
    ) -> None:
        self._transport = transport
        self._talk, self._give_up, self._view = talk, give_up, view

    def call(self, command: Command[T], deadline: float) -> T:
        """Say one once, in the time that is left."""
        return self.run((command,), deadline)[0].result()

    def run(
        self, commands: Sequence[Command[T]], deadline: float, view: View | None = None
    ) -> list[Outcome[T]]:
        """Say several once, in the time that is left."""
        limit = min(self._talk.deadline, self._give_up - monotonic())
        return self._transport.once(commands, limit, view or self._view)


def _send(
    talk: Talk[Any],
    node: Node,
    link: Channel,
    message: Message,
    under_way: deque[tuple[Node, Channel, Message]],
) -> None:
    told = talk.addressed(message, link, monotonic())
    if told is None:
        node.give(link)
        return
    under_way.append((node, link, told))
    try:
        link.send(told.data, talk.end)
    except Lost as loss:
        under_way.pop()
        node.lost(link)
        talk.lost(told, loss)
