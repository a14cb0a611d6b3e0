"""`Router` and `AsyncRouter`: redis-py's commands, each sent to the node that has its keys.

    router = Router({"a": "redis://10.0.0.1", "b": {"url": "redis://10.0.0.2", "weight": 2}})
    router.set("user:1", "x", ex=60)
    with router.map(deadline=0.2) as m:
        hits = [m.get(key) for key in keys]
    router.node_for("user:1"); router.explain("user:1")

Or over a real cluster: `Router.over(redis.RedisCluster(…))`, with the same methods.

Keys on each node: see `redishacks.router.commands`. Trade-offs: nodes are independent, so a node
that is gone takes its keys with it until it is back; who needs failover takes a cluster.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from time import monotonic
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from redis.commands import AsyncCoreCommands, CoreCommands

from redishacks._command import Command, Outcome, Steps
from redishacks._drive import drive, drive_async
from redishacks._slots import hash_tag, key_slot
from redishacks._transport import (
    AsyncTransport,
    SyncTransport,
    connect,
    connect_async,
    connect_nodes,
    connect_nodes_async,
)
from redishacks._units import Seconds, seconds
from redishacks.errors import UsageError
from redishacks.router._blocking import wait, waits
from redishacks.router._core import Core
from redishacks.router._dialect import Dialect
from redishacks.router._given import Node, dialect_of, read
from redishacks.router._move import Move, Progress
from redishacks.router._nodes import Nodes
from redishacks.router.balance import Balance, measure
from redishacks.router.batch import Batch
from redishacks.router.fanout import AsyncFanout, Fanout
from redishacks.router.placement import Placement
from redishacks.router.reshard import Plan, survey
from redishacks.router.scan import Scan
from redishacks.router.scripts import RouterScript
from redishacks.router.transaction import AsyncTransaction, Transaction, watch

T = TypeVar("T")
X = TypeVar("X", SyncTransport, AsyncTransport)

#: Seconds for a survey of all nodes, and for one exchange of a move.
_SURVEY, _MOVING = 600.0, 30.0
#: Seconds for a word to a node that was ejected, which is probably gone.
_LAST_WORD = 0.5
#: Seconds that a call may take longer when its nodes must be asked again, and one took all.
_GRACE = 0.05


class Explanation(NamedTuple):
    """Why a key is where it is."""

    key: bytes
    #: What decides: the hash tag, or the whole key without one.
    tag: bytes
    slot: int
    #: The name of its node.
    node: str
    #: Of what all clients agree on; 0 over a cluster.
    version: int

    def __str__(self) -> str:
        by = "by its hash tag" if self.tag != self.key else "as a whole"
        return f"{self.key!r}: slot {self.slot} {by}, on {self.node}"


class _Base(Generic[X]):
    """What both colours know without asking anybody."""

    #: redis-py's commands expect one; nobody listens.
    _event_dispatcher: Any = None

    def _begin(self, transport: X, dialect: Dialect, deadline: Seconds) -> None:
        self._transport: X = transport
        self._core = Core(transport, dialect)
        self._deadline = seconds(deadline, "deadline")

    @property
    def redishacks_transport(self) -> X:
        """How commands reach the nodes: what every tool takes a router for."""
        return self._transport

    def register_script(self, script: str | bytes) -> RouterScript:
        """Return a script to be called with keys: see `redishacks.router.scripts`."""
        return RouterScript(
            self._core, script, lambda command: self._transport.call(command, self._deadline)
        )

    def slot(self, key: Any) -> int:
        """Return the slot of a key: what `CLUSTER KEYSLOT` says."""
        return key_slot(key if type(key) is bytes else self._core.dialect.encode(key))

    def node_for(self, key: Any) -> str:
        """Return the name of the node that has a key; over a cluster its host and port."""
        self._loaded()
        return self._core.routes.where((self._core.dialect.encode(key),))

    def explain(self, key: Any) -> Explanation:
        """Return why a key is where it is."""
        self._loaded()
        raw = self._core.dialect.encode(key)
        view = self._core.routes.view
        return Explanation(
            raw,
            hash_tag(raw),
            key_slot(raw),
            self._core.routes.where((raw,)),
            view.version if view is not None else 0,
        )

    def _loaded(self) -> None:
        raise NotImplementedError

    def _nodes(self) -> Nodes:
        nodes = self._core.routes
        if not isinstance(nodes, Nodes):
            raise UsageError("a cluster moves its slots by itself")
        return nodes

    def _mover(
        self,
        plan: Plan | None,
        rate: float | None,
        drain: Seconds,
        take_over: bool,
        on_progress: Callable[[Progress], object] | None,
    ) -> Steps[Progress]:
        if rate is not None and not rate > 0:
            raise UsageError(f"rate is a number of keys per second above 0, not {rate!r}")
        if plan is not None and plan.refusals:
            raise UsageError(f"the plan is refused: {plan.refusals[0]}")
        move = Move(
            self._nodes(),
            drain=seconds(drain, "drain"),
            rate=rate,
            take_over=take_over,
            on_progress=on_progress,
        )
        if plan is None:
            return move.run(None)
        return move.run(plan.new, plan.version, plan.old)


class Router(_Base[SyncTransport], CoreCommands):  # type: ignore[misc]
    """redis-py's commands over several nodes; threads, greenlets and forked children may share it.

    - `nodes`: names, and for each a URL, a `redis.Redis`, or `{"url": …, "weight": …}` with either.
      Names decide which keys a node has; its address and password may change at any time. What is
      stored on the nodes decides: nodes that it does not use yet may be given, never fewer.
    - `placement`: how keys are spread over nodes that nobody has used yet, by default over slots as
      a Redis Cluster does.
    - `deadline`: seconds for a call.
    - `prefix` of the keys in which the nodes keep what all clients agree on.

    Raises `UsageError` for what can never work. Nothing is asked before the first call, which
    raises `TopologyMismatchError` when this contradicts what is stored.
    """

    #: By this redis-py's types tell what its commands return.
    _is_async_client: Literal[False] = False

    def __init__(
        self,
        nodes: Mapping[str, Node] | Iterable[tuple[str, Node]],
        *,
        placement: Placement | None = None,
        deadline: Seconds = 1.0,
        prefix: str = "rh",
    ) -> None:
        routes, dialect = read(nodes, placement, prefix, asynchronous=False)
        self._begin(connect_nodes(routes), dialect, deadline)

    @classmethod
    def over(cls, cluster: Any, *, deadline: Seconds = 1.0) -> Router:
        """Return a router over a `redis.RedisCluster`: its nodes say who has which keys."""
        router = cls.__new__(cls)
        transport = connect(cluster).bare
        if not transport.sharded:
            raise UsageError("Router.over takes a redis.RedisCluster")
        router._begin(transport, dialect_of(cluster), deadline)
        return router

    def connect(self) -> None:
        """Learn who has which keys; the first call does so by itself."""
        self._transport.learn(self._deadline)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Say a command to the node that has its keys; all methods of redis-py come here."""
        core = self._core
        command = core.quick(args, options)
        if command is not None:
            return self._transport.call(command, self._deadline)
        said = core.say(args, options)
        if waits(said[0]):
            return drive(wait(core, said, self._deadline), self._transport, self._deadline)
        return self._drive(core.run(said), self._deadline)

    def scan_iter(
        self, match: Any = None, count: int | None = None, _type: str | None = None, **more: Any
    ) -> Iterator[Any]:
        """Return all keys of all nodes, some at a time: see `redishacks.router.scan`."""
        scan = Scan(self._core, match, count, _type)
        while (keys := self._drive(scan.page(), self._deadline)) is not None:
            yield from keys

    @contextmanager
    def map(self, *, deadline: Seconds | None = None, on_error: str = "raise") -> Iterator[Batch]:
        """Record commands, and say all when the block is left: see `redishacks.router.batch`.

        `deadline` is for the whole batch. When some failed, `BatchError` has all replies; with
        `on_error="return"` nothing is raised, and each reply tells.
        """
        raises = _raises(on_error)
        wait = self._deadline if deadline is None else seconds(deadline, "deadline")
        batch = Batch(self._core)
        try:
            yield batch
        except BaseException:
            batch.forget()
            raise
        self._drive(batch.send(raises=raises), wait)

    def fanout(self, nodes: Sequence[str] | None = None, *, destroy: bool = False) -> Fanout:
        """Return redis-py's commands for each of several nodes: see `redishacks.router.fanout`.

        By default for all; `destroy` lets FLUSHDB and the like through.
        """
        return Fanout(self._core, self._transport, nodes, destroy=destroy, deadline=self._deadline)

    def balance(self) -> Balance:
        """Return how evenly keys, memory and work are spread: see `redishacks.router.balance`."""
        return self._drive(measure(self._core), self._deadline)

    def plan(self, nodes: Any) -> Plan:
        """Return what a change of nodes or weights would move: see `redishacks.router.reshard`.

        `nodes`: weights by name, or names; all were given to this router. Nothing is changed.
        """
        return self._drive(survey(self._nodes(), nodes), _SURVEY)

    def reshard(
        self,
        plan: Plan | None,
        *,
        rate: float | None = None,
        drain: Seconds = 0.5,
        take_over: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> Progress:
        """Move keys as a plan says, while clients go on; None ends what was begun and stopped.

        `rate` is in keys per second. Connections have `drain` seconds to learn of each step, then
        they are ended. Raises `UsageError` when somebody else moves keys, and for a plan that is
        refused or out of date. Whatever stops it, even a kill: begin again, and it goes on.
        """
        mover = self._mover(plan, rate, drain, take_over, on_progress)
        return drive(mover, self._transport, _MOVING)

    def eject(self, name: str, *, take_over: bool = False) -> None:
        """Take a node that is gone out for all clients: the others serve its slots, empty.

        It comes back like a new one: after FLUSHDB there, by `plan` and `reshard`. A client that
        reaches it, and none of the others, goes on with it until it reaches one of them.
        """
        move = Move(self._nodes(), take_over=take_over)
        drive(move.eject(name), self._transport, _MOVING)
        drive(move.dismiss(name), self._transport, _LAST_WORD)

    @contextmanager
    def transaction(self, *keys: Any) -> Iterator[Transaction]:
        """Say commands as one MULTI and EXEC when the block is left; `keys` are watched.

        See `redishacks.router.transaction`. All keys are on one node. Raises `WatchError` when a
        watched key was changed, and `BatchError` when commands failed after others were done.
        """
        watched = [self._core.dialect.encode(key) for key in keys]
        talk = self._drive(watch(self._core, watched, self._deadline), self._deadline)
        queue = Transaction(self._core, watched, talk, self._deadline)
        try:
            yield queue
            self._drive(queue.commit(), self._deadline)
        finally:
            queue.leave()

    def close(self) -> None:
        """Close idle connections; the next call opens new ones."""
        self._transport.close()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _drive(self, steps: Steps[T], deadline: float) -> T:
        return drive(steps, _Until(self._transport, self._core, deadline))

    def _loaded(self) -> None:
        if self._core.routes.view is None:
            self.connect()


class AsyncRouter(_Base[AsyncTransport], AsyncCoreCommands):  # type: ignore[misc]
    """`Router` for asyncio; before `node_for` and `explain` comes `await router.connect()`."""

    #: By this redis-py's types tell what its commands return.
    _is_async_client: Literal[True] = True

    def __init__(
        self,
        nodes: Mapping[str, Node] | Iterable[tuple[str, Node]],
        *,
        placement: Placement | None = None,
        deadline: Seconds = 1.0,
        prefix: str = "rh",
    ) -> None:
        routes, dialect = read(nodes, placement, prefix, asynchronous=True)
        self._begin(connect_nodes_async(routes), dialect, deadline)

    @classmethod
    def over(cls, cluster: Any, *, deadline: Seconds = 1.0) -> AsyncRouter:
        """Return a router over a `redis.asyncio.RedisCluster`."""
        router = cls.__new__(cls)
        transport = connect_async(cluster).bare
        if not transport.sharded:
            raise UsageError("AsyncRouter.over takes a redis.asyncio.RedisCluster")
        router._begin(transport, dialect_of(cluster), deadline)
        return router

    async def connect(self) -> None:
        """Learn who has which keys; the first call does so by itself."""
        await self._transport.learn(self._deadline)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Say a command to the node that has its keys; all methods of redis-py come here."""
        core = self._core
        command = core.quick(args, options)
        if command is not None:
            return await self._transport.call(command, self._deadline)
        said = core.say(args, options)
        if waits(said[0]):
            return await drive_async(
                wait(core, said, self._deadline), self._transport, self._deadline
            )
        return await self._drive(core.run(said), self._deadline)

    async def scan_iter(  # type: ignore[override]
        self, match: Any = None, count: int | None = None, _type: str | None = None, **more: Any
    ) -> AsyncIterator[Any]:
        """Return all keys of all nodes, some at a time: see `redishacks.router.scan`."""
        scan = Scan(self._core, match, count, _type)
        while (keys := await self._drive(scan.page(), self._deadline)) is not None:
            for key in keys:
                yield key

    @asynccontextmanager
    async def map(
        self, *, deadline: Seconds | None = None, on_error: str = "raise"
    ) -> AsyncIterator[Batch]:
        """Record commands, and say all of them when the block is left, as `Router.map`."""
        raises = _raises(on_error)
        wait = self._deadline if deadline is None else seconds(deadline, "deadline")
        batch = Batch(self._core)
        try:
            yield batch
        except BaseException:
            batch.forget()
            raise
        await self._drive(batch.send(raises=raises), wait)

    def fanout(self, nodes: Sequence[str] | None = None, *, destroy: bool = False) -> AsyncFanout:
        """Return redis-py's commands for each of several nodes: see `redishacks.router.fanout`.

        By default for all; `destroy` lets FLUSHDB and the like through.
        """
        return AsyncFanout(
            self._core, self._transport, nodes, destroy=destroy, deadline=self._deadline
        )

    async def balance(self) -> Balance:
        """Return how evenly keys, memory and work are spread: see `redishacks.router.balance`."""
        return await self._drive(measure(self._core), self._deadline)

    async def plan(self, nodes: Any) -> Plan:
        """Return what a change of nodes or weights would move, as `Router.plan`."""
        return await self._drive(survey(self._nodes(), nodes), _SURVEY)

    async def reshard(
        self,
        plan: Plan | None,
        *,
        rate: float | None = None,
        drain: Seconds = 0.5,
        take_over: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> Progress:
        """Move keys as a plan says, while clients go on, as `Router.reshard`."""
        mover = self._mover(plan, rate, drain, take_over, on_progress)
        return await drive_async(mover, self._transport, _MOVING)

    async def eject(self, name: str, *, take_over: bool = False) -> None:
        """Take a node that is gone out for all clients: the others serve its slots, empty.

        It comes back like a new one: after FLUSHDB there, by `plan` and `reshard`. A client that
        reaches it, and none of the others, goes on with it until it reaches one of them.
        """
        move = Move(self._nodes(), take_over=take_over)
        await drive_async(move.eject(name), self._transport, _MOVING)
        await drive_async(move.dismiss(name), self._transport, _LAST_WORD)

    @asynccontextmanager
    async def transaction(self, *keys: Any) -> AsyncIterator[AsyncTransaction]:
        """Say commands as one MULTI and EXEC when the block is left; `keys` are watched.

        See `redishacks.router.transaction`. All keys are on one node. Raises `WatchError` when a
        watched key was changed, and `BatchError` when commands failed after others were done.
        """
        watched = [self._core.dialect.encode(key) for key in keys]
        talk = await self._drive(watch(self._core, watched, self._deadline), self._deadline)
        queue = AsyncTransaction(self._core, watched, talk, self._deadline)
        try:
            yield queue
            await self._drive(queue.commit(), self._deadline)
        finally:
            queue.leave()

    def twin(self) -> Router:
        """Return a `Router` for the same nodes: a tool that is not for asyncio takes it."""
        routes = self._nodes().twin()
        router = Router.__new__(Router)
        router._begin(connect_nodes(routes), self._core.dialect, self._deadline)
        return router

    async def aclose(self) -> None:
        """Close this loop's connections; the next call opens new ones."""
        await self._transport.aclose()

    async def __aenter__(self) -> AsyncRouter:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _drive(self, steps: Steps[T], deadline: float) -> T:
        return await drive_async(steps, _AsyncUntil(self._transport, self._core, deadline))

    def _loaded(self) -> None:
        if self._core.routes.view is None:
            raise UsageError("nothing is known of the nodes yet: await router.connect() first")


class _Clock:
    """The time of several exchanges."""

    def __init__(self, core: Core, deadline: float) -> None:
        self._core, self._deadline = core, deadline
        self._end = monotonic() + deadline
        self._begun = False
        self._knew = self._known()

    def _known(self) -> tuple[bool, bool]:
        return self._core.routes.view is not None, self._core.specs is not None

    def left(self) -> float:
        """Return how many seconds the next exchange has."""
        if self._knew != (knows := self._known()):
            # What went before was learning who has which keys, or what is a key; that is done once
            # in the life of a router, and has a time of its own.
            self._knew, self._begun = knows, False
            self._end = monotonic() + self._deadline
        if self._begun:
            # For nodes that did answer, after one that took all the time there was.
            return max(_GRACE, self._end - monotonic())
        self._begun = True
        return max(0.0, self._end - monotonic())


class _Until:
    """Several exchanges that end at one time."""

    def __init__(self, transport: SyncTransport, core: Core, deadline: float) -> None:
        self._transport, self._clock = transport, _Clock(core, deadline)

    def call(self, command: Command[T], deadline: float) -> T:
        """Say one command in what is left of the time."""
        return self._transport.call(command, self._clock.left())

    def run(
        self, commands: Sequence[Command[T]], deadline: float, view: Any = None
    ) -> list[Outcome[T]]:
        """Say several in what is left of the time."""
        return self._transport.run(commands, self._clock.left(), view)


class _AsyncUntil:
    """The same for asyncio."""

    def __init__(self, transport: AsyncTransport, core: Core, deadline: float) -> None:
        self._transport, self._clock = transport, _Clock(core, deadline)

    async def call(self, command: Command[T], deadline: float) -> T:
        """Say one command in what is left of the time."""
        return await self._transport.call(command, self._clock.left())

    async def run(
        self, commands: Sequence[Command[T]], deadline: float, view: Any = None
    ) -> list[Outcome[T]]:
        """Say several in what is left of the time."""
        return await self._transport.run(commands, self._clock.left(), view)


def _raises(on_error: str) -> bool:
    if on_error not in ("raise", "return"):
        raise UsageError(f'on_error is "raise" or "return", not {on_error!r}')
    return on_error == "raise"
