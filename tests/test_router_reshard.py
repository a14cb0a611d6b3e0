"""Keys that move between nodes while clients go on: nothing lost, doubled, left behind, revived."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from redishacks._command import script
from redishacks.errors import (
    MaybeAppliedError,
    ServerError,
    TopologyMismatchError,
    UnavailableError,
    UsageError,
)
from redishacks.router import Router, _move, commands
from redishacks.router._move import Progress
from redishacks.router.commands import Gift
from redishacks.router.legacy import KINDS
from redishacks.router.placement import SlotTable
from redishacks.router.reshard import Plan
from redishacks.router.topology import Topology
from redishacks.testing import Server, redis_server, valkey_server
from tests import router_workers, workers
from tests.helpers import eventually
from tests.router_workers import CALLING, LASTING, PULLING, Ledger

THREE, FOUR = ("a", "b", "c"), ("a", "b", "c", "d")
#: Seconds that connections have to learn of a step, here.
DRAIN = 0.05
#: Seconds by which a TTL may be off: what a key's move takes, on a machine that is busy.
SLACK = 2.0
OWN = b"rh:r1:{router}:"


class Place:
    """Some nodes, and what is on them."""

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self.servers = dict(servers)
        self.urls = {name: server.url for name, server in servers.items()}
        self._raw = {name: server.client() for name, server in servers.items()}

    def raw(self, name: str) -> redis.Redis:
        """Return a client of one node."""
        return self._raw[name]

    def fresh(self, *names: str) -> Any:
        """Empty all nodes and return a router over some of them, by slots."""
        for name, server in self.servers.items():
            if not server.alive():
                server.restart()
            self._raw[name].flushall()
            for each in self._raw[name].client_list():
                if each["name"].startswith("rh-"):
                    self._raw[name].client_kill_filter(_id=each["id"])
        router = self.router(*names)
        router.connect()
        return router

    def router(self, *names: str, deadline: float = 20.0, **options: Any) -> Any:
        """Return another router."""
        urls = {name: self.urls[name] for name in names or self.urls}
        return Router(urls, deadline=deadline, **options)

    def keys(self) -> dict[str, set[bytes]]:
        """Return the names of all keys, by node."""
        return {name: set(raw.scan_iter(count=5000)) for name, raw in self._raw.items()}

    def close(self) -> None:
        """Close the clients."""
        for raw in self._raw.values():
            raw.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Four Valkey nodes."""
    with ExitStack() as stack:
        made = Place({name: stack.enter_context(valkey_server()) for name in FOUR})
        stack.callback(made.close)
        yield made


def begin(place: Place, nodes: Iterable[str] = THREE) -> Any:
    """Return a router that knows four nodes, whose keys are on some of them."""
    place.fresh(*nodes).close()
    router = place.router()
    router.connect()
    return router


def shift(router: Any, nodes: Iterable[str], **options: Any) -> Progress:
    """Move all to these nodes."""
    progress: Progress = router.reshard(router.plan(list(nodes)), **{"drain": DRAIN, **options})
    return progress


def moving(router: Any, nodes: Iterable[str] = FOUR, kind: str = "k") -> Iterator[str]:
    """Return names of keys that will move."""
    new = router.plan(list(nodes)).new
    for key in (f"{kind}{n}" for n in itertools.count()):
        if new.node_for(key.encode()) != router.node_for(key):
            yield key


def settled(place: Place) -> None:
    """Check that every key is where it belongs and nowhere else, and nothing of a move is left."""
    router = place.router()
    router.connect()
    for name, keys in place.keys().items():
        ours = {key for key in keys if key.startswith(OWN)}
        # What a plan was made with is gone in ten seconds.
        assert ours <= {OWN + b"node", OWN + b"trial"}, name
        strays = [key for key in keys - ours if router.node_for(key) != name]
        assert not strays, (name, strays[:5])


# Under fire


def check(router: Any, ledgers: list[Ledger]) -> None:
    """Check that what clients were told is what is there."""
    for ledger in ledgers:
        assert not ledger.wrong, ledger.wrong[:3]
        for key, possible in ledger.own.items():
            value = router.get(key)
            found = value.decode() if value is not None else None
            assert found in possible, (key, found, possible)
        for key, (first, last) in ledger.ends.items():
            if len(ledger.own[key]) > 1 or None in ledger.own[key]:
                continue
            ends = time.time() + router.pttl(key) / 1000
            assert first - SLACK < ends < last + SLACK, key
    for key in {key for ledger in ledgers for key in ledger.counts}:
        told = [ledger.counts.get(key, [0, 0]) for ledger in ledgers]
        sure, perhaps = (sum(column) for column in zip(*told, strict=True))
        found = int(router.hget(key, "f") if key[0] == "h" else router.get(key) or 0)
        assert sure <= found <= sure + perhaps, key
    for key in {key for ledger in ledgers for key in ledger.tokens}:
        each = [ledger.tokens.get(key, ([], [], [])) for ledger in ledgers]
        sure, perhaps = (list(itertools.chain(*(told[at] for told in each))) for at in (0, 1))
        found = elements(router, key)
        for ledger in ledgers:
            found += ledger.popped.get(key, [])
        missing = set(sure) - set(found)
        unheard = sum(ledger.unheard.get(key, 0) for ledger in ledgers)
        assert len(missing) <= unheard, key
        sure = [token for token in sure if token not in missing]
        assert len(found) == len(set(found)), f"{key} has something twice"
        assert set(sure) <= set(found) <= {*sure, *perhaps}, key


def elements(router: Any, key: str) -> list[str]:
    """Return what was put into a key of any type."""
    if key[0] in "lq":
        raw = router.lrange(key, 0, -1)
    elif key[0] == "s":
        raw = list(router.smembers(key))
    elif key[0] == "z":
        raw = router.zrange(key, 0, -1)
    else:
        raw = [fields[b"t"] for _, fields in router.xrange(key)]
    return [each.decode() for each in raw]


@contextmanager
def used(place: Place, seed: int, clients: Iterable[tuple[str, int]]) -> Iterator[list[Ledger]]:
    """Have processes use the nodes; their ledgers are there at the end."""
    ledgers: list[Ledger] = []
    pipes, processes = [], []
    for number, (flavour, tasks) in enumerate(clients):
        ours, theirs = workers.pipe()
        processes.append(
            workers.start(router_workers.use, place.urls, flavour, seed + number, tasks, theirs)
        )
        pipes.append(ours)
    try:
        for pipe in pipes:
            assert pipe.poll(30)
            assert pipe.recv() == "ready"
        yield ledgers
        for pipe in pipes:
            assert not pipe.poll(), pipe.recv()
            pipe.send("stop")
        for pipe in pipes:
            assert pipe.poll(60)
            told = pipe.recv()
            assert isinstance(told, list), told
            ledgers += told
    finally:
        for process in processes:
            process.kill()
            process.join()


def under_fire(place: Place, rounds: int, seed: int) -> list[Ledger]:
    """Move keys forth and back while clients use them; check all at the end."""
    router = begin(place)
    still = {f"still{n}": f"value{n}" for n in range(2000)}
    router.mset(still)
    with used(place, seed, [("sync", 1), ("sync", 1), ("async", 8)]) as ledgers:
        for _ in range(rounds):
            shift(router, FOUR, drain=0.2)
            shift(router, THREE, drain=0.2)
        shift(router, FOUR, drain=0.2)
    check(router, ledgers)
    assert router.mget(list(still)) == [value.encode() for value in still.values()]
    settled(place)
    assert sum(ledger.done for ledger in ledgers) > 100 * rounds
    return ledgers


def test_nothing_is_lost_or_doubled_under_fire(place: Place) -> None:
    """Clients of all kinds write, move after move: what they were told is what is there."""
    under_fire(place, 2, 1)


@pytest.mark.slow
@pytest.mark.long
def test_nothing_is_lost_or_doubled_in_thirty_rounds(place: Place) -> None:
    """Thirty times forth and back, under fire."""
    ledgers = under_fire(place, 30, 2)
    print(
        f"done {sum(each.done for each in ledgers)}, "
        f"perhaps {sum(each.perhaps for each in ledgers)}, "
        f"never {sum(each.never for each in ledgers)}"
    )


# Clients that are stopped


class Stopped:
    """Clients that stop themselves, each at its step, and say how it ended once they go on."""

    def __init__(self, place: Place, keys: Mapping[tuple[str, str], str]) -> None:
        self.keys = dict(keys)
        self._pipes: dict[tuple[str, str], Any] = {}
        self._processes: dict[tuple[str, str], Any] = {}
        for (flavour, step), key in keys.items():
            ours, theirs = workers.pipe()
            self._pipes[flavour, step] = ours
            self._processes[flavour, step] = workers.start(
                router_workers.say, place.urls, flavour, step, key, theirs
            )
        for pipe in self._pipes.values():
            assert pipe.poll(30)
            assert pipe.recv() == "ready"

    def go(self) -> None:
        """Have them begin their call, and return when all have stopped."""
        for pipe in self._pipes.values():
            pipe.send("go")
        for which, process in self._processes.items():
            assert eventually(functools.partial(workers.is_stopped, process.pid)), which

    def go_on(self) -> dict[tuple[str, str], bool | None]:
        """Let them go on; returns how each call ended."""
        for process in self._processes.values():
            os.kill(process.pid, signal.SIGCONT)
        ended = {}
        for which, pipe in self._pipes.items():
            assert pipe.poll(60), which
            ended[which], _ = pipe.recv()
        return ended

    def close(self) -> None:
        """End them."""
        for process in self._processes.values():
            process.kill()
            process.join()


def each_step(router: Any, steps: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return a moving key for each step and flavour."""
    names = moving(router)
    return {(flavour, step): next(names) for flavour in ("sync", "async") for step in steps}


def counted(router: Any, key: str, before: int, how: bool | None) -> None:
    """Check a count that was `before`, and perhaps one more."""
    found = int(router.get(key) or 0)
    possible = {True: {before + 1}, False: {before}, None: {before, before + 1}}[how]
    assert found in possible, (key, found, possible)


def stopped_before(place: Place, *, back: bool) -> None:
    """Stop clients in the middle of a call, move keys, let them go on, and check all."""
    router = begin(place)
    keys = each_step(router, CALLING)
    router.mset(dict.fromkeys(keys.values(), 5))
    stopped = Stopped(place, keys)
    try:
        stopped.go()
        shift(router, FOUR)
        ahead = {which: router.incrby(key, 100) for which, key in keys.items()}
        if back:
            shift(router, THREE)
        ended = stopped.go_on()
    finally:
        stopped.close()
    for which, key in keys.items():
        # Who had written by then was counted before the move.
        if which[1] == "written":
            assert ahead[which] == 106, which
            assert router.get(key) == b"106", which
        else:
            assert ahead[which] == 105, which
            counted(router, key, 105, ended[which])
    settled(place)


@pytest.mark.parametrize("back", [pytest.param(False, marks=pytest.mark.slow), True])
def test_who_was_stopped_before_a_move_writes_to_no_old_node(place: Place, back: bool) -> None:
    """Clients stop in the middle of a call, keys move, and they go on: once or never, and right."""
    stopped_before(place, back=back)


def test_without_the_fence_they_would_write_to_an_old_node(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mover that ends no connection does not pass the test before this one."""
    monkeypatch.setattr(_move.Move, "_fence", lambda move: iter(()))
    with pytest.raises(AssertionError, match=r"'k\d+', \d+, \{"):
        stopped_before(place, back=False)


def stopped_within(place: Place, then: str) -> None:
    """Stop clients while they pull a key, let them go on later, and check all."""
    router = begin(place)
    keys = each_step(router, (*PULLING, "planned", "addressed", "write"))
    router.mset(dict.fromkeys(keys.values(), 5))
    stopped = Stopped(place, keys)
    other = place.router()
    ended: dict[tuple[str, str], bool | None] = {}
    began = False
    before = 0 if then == "delete" else 105

    def change() -> None:
        for key in keys.values():
            if then == "delete":
                assert other.delete(key) == 1
            else:
                assert other.incrby(key, 100) == 105

    def on_progress(progress: Progress) -> None:
        nonlocal began
        if progress.state == "transit" and not began:
            began = True
            stopped.go()
            if then == "at-once":
                change()
                ended.update(stopped.go_on())

    try:
        shift(router, FOUR, on_progress=on_progress)
        if then != "at-once":
            change()
            if then == "and-back":
                shift(router, THREE)
            ended.update(stopped.go_on())
    finally:
        stopped.close()
    for which, key in keys.items():
        counted(router, key, before, ended[which])
    settled(place)


@pytest.mark.parametrize(
    "then",
    [
        "at-once",
        pytest.param("count", marks=pytest.mark.slow),
        pytest.param("delete", marks=pytest.mark.slow),
        "and-back",
    ],
)
def test_who_was_stopped_in_a_pull_brings_nothing_back(place: Place, then: str) -> None:
    """Clients stop while they pull a key that others change, and go on: nothing comes back."""
    stopped_within(place, then)


def test_without_a_note_of_what_was_taken_it_would_come_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that takes a key as often as it is given does not pass the test before this one."""
    note = b"call('SADD', KEYS[2], taken) == 1 and "
    real = script("router_take")
    assert real.source.count(note) == 1
    other = real._replace(source=real.source.replace(note, b""))
    monkeypatch.setattr(
        commands, "script", lambda name: other if name == "router_take" else script(name)
    )
    with pytest.raises(AssertionError, match=r"'k\d+', \d+, \{"):
        stopped_within(place, "at-once")


# Movers that are killed


def mover(place: Place, plan: Plan | None, directory: Path, **options: Any) -> tuple[Any, Any]:
    """Start a process that moves keys; returns it and a pipe."""
    path = None
    if plan is not None:
        path = str(directory / "plan.json")
        plan.save(path)
    ours, theirs = workers.pipe()
    options = {"drain": DRAIN, **options}
    return workers.start(router_workers.move, place.urls, path, options, theirs), ours


def load(router: Any, count: int = 300) -> dict[str, str]:
    """Put some keys there."""
    values = {f"k{n}": f"value{n}" for n in range(count)}
    router.mset(values)
    return values


def finish(router: Any, **options: Any) -> None:
    """Bring a move to its end, if it is not there."""
    try:
        router.reshard(None, **{"drain": DRAIN, "take_over": True, **options})
    except UsageError as error:
        assert "nothing is moving" in str(error)  # noqa: PT017


def killed_after(place: Place, at: int, directory: Path, deadline: float = 0.05) -> bool:
    """Kill a mover after so many exchanges, and go on; returns whether it lived to die."""
    router = begin(place)
    values = load(router)
    names = list(itertools.islice(moving(router, kind="n"), 4))
    router.mset(dict.fromkeys(names, 5))
    process, pipe = mover(place, router.plan(list(FOUR)), directory, at=at)
    process.join(60)
    if process.exitcode == 0:
        assert pipe.recv()[1] is None
        settled(place)
        return False
    # Meanwhile clients do what they can.
    hasty = place.router(deadline=deadline)
    counts = dict.fromkeys(names, 5)
    for name in names[:2]:
        try:
            counts[name] = hasty.incr(name)
        except UnavailableError:
            pass
    finish(router)
    assert router.mget(list(values)) == [value.encode() for value in values.values()]
    assert router.mget(list(counts)) == [b"%d" % count for count in counts.values()]
    if len(router.plan(list(FOUR)).slots):  # nothing had been stored of it
        shift(router, FOUR)
    assert {router.node_for(key) for key in values} == set(FOUR)
    settled(place)
    return True


def followed_by_one_that_is_killed(place: Place, at: int, directory: Path) -> bool:
    """Kill the mover that goes on when one was killed and a node was restarted empty.

    Returns whether it lived to die.
    """
    router = begin(place, ("a", "b"))
    values = load(router)
    plan = router.plan(list(FOUR))
    gone = {key for key in values if plan.new.node_for(key.encode()) == "d"}
    names = [
        key
        for key in values
        if plan.new.node_for(key.encode()) == "c" and router.node_for(key) == "a"
    ][:5]
    transit(router)
    # As by a client that was killed between a take and a forget; others wrote after that.
    layout, say, since = pulls(router)
    raws = [name.encode() for name in names]
    given = say("a", lambda node: layout.give(node, raws, since))
    say("c", lambda node: layout.take(node, given.gifts, since))
    for name in names:
        place.raw("c").append(name, "+")
    for key in sorted(gone)[:5]:  # these are on the node by then, and lost with it
        router.get(key)
        values.pop(key)
    place.servers["d"].kill()
    place.servers["d"].restart()
    assert eventually(lambda: place.router().get("k0"))
    process, pipe = mover(place, None, directory, at=at, take_over=True)
    process.join(60)
    died = process.exitcode != 0
    assert died or pipe.recv()[1] is None
    finish(router)
    for key, value in values.items():
        assert router.get(key) == (value + "+" * (key in names)).encode(), key
    settled(place)
    return bool(died)


@pytest.mark.parametrize("at", [9, 11, 12])
def test_a_second_mover_that_is_killed_too_leaves_nothing_undone(
    place: Place, tmp_path: Path, at: int
) -> None:
    """One mover after the other is killed, and a node comes back empty: the third ends the move."""
    assert followed_by_one_that_is_killed(place, at, tmp_path)


@pytest.mark.slow
@pytest.mark.long
def test_a_second_mover_that_is_killed_anywhere_leaves_nothing_undone(
    place: Place, tmp_path: Path
) -> None:
    """The same, wherever the second one is killed."""
    for at in itertools.count(1):
        if not followed_by_one_that_is_killed(place, at, tmp_path):
            break
    assert at > 20


@pytest.mark.slow
@pytest.mark.long
def test_a_mover_that_is_killed_anywhere_leaves_nothing_undone(
    place: Place, tmp_path: Path
) -> None:
    """However far a mover had come when it was killed: the next one ends the move."""
    for at in itertools.count(1):
        if not killed_after(place, at, tmp_path):
            break
    assert at > 20


@pytest.mark.parametrize("at", [6, 14, 20, 32])
def test_a_mover_that_is_killed_leaves_nothing_undone(
    place: Place, tmp_path: Path, at: int
) -> None:
    """A mover is killed at some steps of its work: the next one ends the move."""
    killed_after(place, at, tmp_path)


# What a move is made of


def closing(router: Any, nodes: Iterable[str]) -> None:
    """Begin a move and stop it at once."""
    transit(router, nodes, "closing")


def transit(router: Any, nodes: Iterable[str] = FOUR, state: str = "transit") -> None:
    """Begin a move and stop it where keys begin to move."""

    def on_progress(progress: Progress) -> None:
        if progress.state == state:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shift(router, nodes, on_progress=on_progress)


def pulls(router: Any) -> tuple[Any, Callable[[str, Any], Any], int]:
    """Return what builds the words of a pull, what says one to a node, and the move's number."""
    nodes: Any = router.redishacks_transport.routes
    transport = router.redishacks_transport
    transport.call(nodes.layout.read(nodes.open("a")), 5)
    router.exists("something")
    return (
        nodes.layout,
        lambda name, make: transport.call(make((name, -3)), 5),
        nodes.view.topology.since,
    )


def test_a_key_that_ends_while_it_moves_does_not_come_back(place: Place) -> None:
    """What ended after it was set aside is gone for all, also for who has a copy of it in hand."""
    router = begin(place)
    key = next(moving(router))
    router.set(key, "old", ex=LASTING)
    old = router.node_for(key)
    transit(router)
    layout, say, since = pulls(router)
    given = say(old, lambda node: layout.give(node, [key.encode()], since))
    assert [gift.key for gift in given.gifts] == [key.encode()]
    place.raw(old).pexpire(layout.aside_prefix + key.encode(), 1)
    eventually(lambda: not place.raw(old).exists(layout.aside_prefix + key.encode()))
    assert router.get(key) is None
    router.set(key, "new")
    say("d", lambda node: layout.take(node, given.gifts, since))
    assert router.get(key) == b"new"
    finish(router)
    assert router.get(key) == b"new"
    settled(place)


def test_a_key_that_a_node_cannot_take_is_not_lost(place: Place) -> None:
    """A node that refuses what it is given has not taken it: later it can."""
    router = begin(place)
    values = load(router)
    place.raw("d").acl_setuser("default", enabled=True, commands=["-restore"])
    try:
        plan = router.plan(list(FOUR))
        with pytest.raises(UsageError, match="cannot read"):
            router.reshard(plan)
        with pytest.raises(Exception, match="restore"):
            router.reshard(plan._replace(refusals=[]), drain=DRAIN)
    finally:
        place.raw("d").acl_setuser("default", enabled=True, commands=["+restore"])
    finish(router)
    assert router.mget(list(values)) == [value.encode() for value in values.values()]
    settled(place)


def test_a_key_whose_name_is_empty_moves(place: Place) -> None:
    """A key whose name is empty is a key as any other one."""
    router = begin(place)
    router.set("", "value")
    assert router.node_for("") == "a"
    shift(router, ["b", "c"])
    assert router.get("") == b"value"
    settled(place)


def test_a_batch_of_many_thousand_keys_that_move(place: Place) -> None:
    """A batch pulls as many keys as it has from a node, in the middle of a move."""
    router = begin(place, ["a"])
    some = dict.fromkeys(itertools.islice(moving(router, ("a", "b")), 8500), "value")
    router.mset(some)
    transit(router, ("a", "b"))
    with router.map(on_error="return") as m:
        found = [m.append(name, "s") for name in some]
    assert {reply.value for reply in found} == {6}
    finish(router)
    settled(place)


def test_routers_of_other_databases_do_not_disturb_each_other(place: Place) -> None:
    """A move waits for the connections of its own router, not for those of another one's."""
    router = begin(place)
    other: Any = Router({name: f"{url[:-1]}1" for name, url in place.urls.items()}, deadline=20)
    other.connect()
    perhaps = []
    over = threading.Event()

    def use() -> None:
        while not over.is_set():
            try:
                other.set("k", "value")
            except MaybeAppliedError as error:
                perhaps.append(error)

    def work() -> None:
        for nodes in (FOUR, THREE, FOUR):
            shift(router, nodes)

    user, mover = threading.Thread(target=use), threading.Thread(target=work)
    user.start()
    mover.start()
    mover.join(15)
    ended = not mover.is_alive()
    over.set()
    user.join()
    mover.join()
    assert ended
    assert not perhaps


def test_a_mover_sets_no_more_aside_at_once_than_it_can_carry_soon(place: Place) -> None:
    """However big keys are: only some megabytes at a time are on their way."""
    router = begin(place, ["a"])
    names = [f"k{n}" for n in range(12)]
    for name in names:
        router.set(name, os.urandom(3_000_000))
    routes: Any = router.redishacks_transport.routes
    layout, sizes = routes.layout, []
    real = layout.take

    def take(node: Any, gifts: Sequence[Gift], *more: Any) -> Any:
        sizes.append(sum(len(gift.dump) for gift in gifts))
        return real(node, gifts, *more)

    layout.take = take
    progress = shift(router, ["b"])
    assert progress.moved == len(names)
    assert 3_000_000 <= max(sizes) < 12_000_000
    assert [router.strlen(name) for name in names] == [3_000_000] * len(names)
    settled(place)


# Movers, and other movers


def test_a_second_mover_is_refused_while_one_is_at_work(place: Place, tmp_path: Path) -> None:
    """Who wants to move keys while somebody else does hears so, and the other one goes on."""
    router = begin(place)
    values = load(router)
    second = place.router()

    def on_progress(progress: Progress) -> None:
        with pytest.raises(UsageError, match="somebody else is moving keys"):
            second.reshard(None)

    shift(router, FOUR, on_progress=on_progress)
    assert router.mget(list(values)) == [value.encode() for value in values.values()]
    settled(place)


@pytest.mark.parametrize("node", THREE)
def test_a_second_mover_is_refused_though_a_node_has_forgotten_the_first(
    place: Place, node: str
) -> None:
    """A node that has lost who moves keys does not let another one become that."""
    router = begin(place)
    load(router)
    second = place.router()

    def on_progress(progress: Progress) -> None:
        place.raw(node).delete(OWN + b"mover")
        with pytest.raises(UsageError, match="somebody else is moving keys"):
            second.reshard(None)

    with pytest.raises(UsageError, match="go on with the move once more"):
        shift(router, FOUR, on_progress=on_progress)
    finish(router, take_over=False)
    settled(place)


def test_a_mover_that_dies_can_be_followed_when_its_time_is_over(
    place: Place, tmp_path: Path
) -> None:
    """A dead mover's time must be over before another one follows, unless that one takes over."""
    router = begin(place)
    values = load(router)
    process, _ = mover(place, router.plan(list(FOUR)), tmp_path, at=20)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UsageError, match=r"it is over in \d+ s"):
        router.reshard(None)
    router.reshard(None, take_over=True, drain=DRAIN)
    assert router.mget(list(values)) == [value.encode() for value in values.values()]
    settled(place)


def stopped_mover(place: Place, directory: Path, at: int) -> tuple[bool, str | None]:
    """Stop a mover after so many exchanges; others move keys forth, back and half forth again.

    Returns whether it was stopped at all, and the error of the one that was.
    """
    router = begin(place)
    names = list(itertools.islice(moving(router), 40))
    router.mset(dict.fromkeys(names, 5))
    process, pipe = mover(place, router.plan(list(FOUR)), directory, at=at, action="stop")
    try:
        eventually(lambda: pipe.poll() or workers.is_stopped(process.pid), 30)
        if pipe.poll():
            return False, None
        for name in FOUR:  # as if its time were over
            place.raw(name).delete(OWN + b"mover")
        finish(router, take_over=False)
        if router.plan(list(FOUR)).slots:
            shift(router, FOUR)
        for name in names:
            router.incr(name)
        shift(router, THREE)
        transit(router)
        # As if by a client that was killed there.
        layout, say, since = pulls(router)
        for name in names[:20]:
            old = router.redishacks_transport.routes.view.topology.placement.node_for(name.encode())
            say(old, lambda node, name=name: layout.give(node, [name.encode()], since))
        os.kill(process.pid, signal.SIGCONT)
        process.join(30)
        assert pipe.poll(), "it has not ended"
        _, error = pipe.recv()
        finish(router)
    finally:
        process.kill()
        process.join()
    assert router.mget(names) == [b"6"] * len(names)
    settled(place)
    return True, error


@pytest.mark.parametrize("at", [10, 24, 28])
def test_a_mover_that_was_stopped_does_no_harm_when_it_goes_on(
    place: Place, tmp_path: Path, at: int
) -> None:
    """A mover that wakes up when others have moved all, twice, stops with an error."""
    there, error = stopped_mover(place, tmp_path, at)
    assert there
    assert error is not None
    assert "somebody else" in error


@pytest.mark.slow
@pytest.mark.long
def test_a_mover_that_was_stopped_anywhere_does_no_harm(place: Place, tmp_path: Path) -> None:
    """Wherever a mover was stopped: it does no harm when it goes on."""
    for at in itertools.count(1):
        if not stopped_mover(place, tmp_path, at)[0]:
            break
    assert at > 20


# Nodes that fail


def interrupted(router: Any, state: str, then: Callable[[], object]) -> Exception | None:
    """Move keys, and do something when a state is reached; returns how the mover ended."""
    done = False

    def on_progress(progress: Progress) -> None:
        nonlocal done
        if progress.state == state and not done:
            done = True
            then()

    try:
        shift(router, FOUR, on_progress=on_progress)
    except (UnavailableError, UsageError) as error:
        return error
    finally:
        assert done
    return None


@pytest.mark.parametrize("state", ["closing", "transit"])
@pytest.mark.parametrize("node", ["a", "d"])
def test_a_node_that_is_restarted_empty_loses_only_its_own(
    place: Place, node: str, state: str
) -> None:
    """A node comes back empty in the middle of a move: the others' keys are there at its end."""
    router = begin(place)
    values = load(router)
    there = {key: router.node_for(key) for key in values}
    router.reshard(router.plan(list(FOUR)), drain=DRAIN)
    after = {key: router.node_for(key) for key in values}
    shift(router, THREE)
    transiting = node == "d" and state == "transit"
    pulled = [key for key in values if after[key] == "d"][:5] if transiting else []

    def restart() -> None:
        for key in pulled:  # clients have them on the new node by then
            router.append(key, "+")
        place.servers[node].kill()
        place.servers[node].restart()

    error = interrupted(router, state, restart)
    if error is not None:
        eventually(lambda: brought_to_its_end(router))
    found = dict(zip(values, router.mget(list(values)), strict=True))
    for key, value in values.items():
        kept = key not in pulled and (node == "d" or there[key] != "a")
        if kept:
            assert found[key] == value.encode(), key
        else:
            assert found[key] is None, key
    names = list(itertools.islice(moving(router, THREE), 5))
    router.mset(dict.fromkeys(names, "new"))
    shift(router, THREE)
    assert router.mget(names) == [b"new"] * 5
    settled(place)


def brought_to_its_end(router: Any, **options: Any) -> bool:
    """Go on with a move; returns whether that came to its end."""
    try:
        finish(router, **options)
    except UnavailableError:
        return False
    return True


def test_who_has_a_copy_of_what_a_restarted_node_lost_cannot_bring_it_back(place: Place) -> None:
    """Once a node has come back empty, nobody ends a pull that began before: it would undo more."""
    router = begin(place)
    key = next(moving(router))
    router.set(key, "old")
    old = router.node_for(key)
    transit(router)
    layout, say, since = pulls(router)
    given = say(old, lambda node: layout.give(node, [key.encode()], since))
    place.servers[old].kill()
    place.servers[old].restart()
    hasty = place.router(deadline=0.3)
    with pytest.raises(UnavailableError, match="go on with the move"):
        eventually(lambda: hasty.get(key) or True)
    taker = place.router()
    taker.connect()
    view = taker.redishacks_transport.routes.view
    words = layout.take(("d", -2), given.gifts, since)
    errors: list[Any] = []

    def on_progress(progress: Progress) -> None:
        if not errors:
            assert router.set(key, "new", get=True) is None
            (outcome,) = taker.redishacks_transport.run([words], 5, view)
            errors.append(outcome.error)

    eventually(lambda: brought_to_its_end(router, on_progress=on_progress))
    assert isinstance(errors[0], UnavailableError)
    assert router.get(key) == b"new"
    settled(place)


def test_what_a_restarted_node_had_taken_is_not_taken_again(place: Place) -> None:
    """A new node that has come back empty takes nothing before the move was begun anew."""
    router = begin(place)
    key = next(moving(router))
    router.set(key, "old")
    old = router.node_for(key)
    transit(router)
    layout, say, since = pulls(router)
    given = say(old, lambda node: layout.give(node, [key.encode()], since))
    router.set(key, "newer")
    place.servers["d"].kill()
    place.servers["d"].restart()
    assert not say("d", lambda node: layout.take(node, given.gifts, since))
    eventually(lambda: brought_to_its_end(router))
    assert router.get(key) is None
    settled(place)


def test_what_a_scan_does_not_see_moves_too(place: Place) -> None:
    """A key that was set aside while the mover scanned, and was not seen, is not left behind."""
    router = begin(place)
    key = next(moving(router))
    router.set(key, "value")
    old = router.node_for(key)
    transit(router)
    layout, say, since = pulls(router)
    say(old, lambda node: layout.give(node, [key.encode()], since))
    real = layout.scan

    def scan(*args: Any) -> Any:
        command = real(*args)

        def parse(reply: Any) -> Any:
            cursor, keys = command.parse(reply)
            return cursor, [each for each in keys if each != key.encode()]

        return command._replace(parse=parse)

    layout.scan = scan
    finish(router)
    assert router.get(key) == b"value"
    settled(place)


@pytest.mark.parametrize("then", ["go-on", "next-move"])
def test_a_mover_that_is_killed_at_the_very_end_leaves_nothing(place: Place, then: str) -> None:
    """Once all has moved only notes are left: who goes on drops them, and so does the next move."""
    router = begin(place)
    load(router)
    layout = pulls(router)[0]
    real = layout.end
    ended = []

    def end(*args: Any) -> Any:
        ended.append(args)
        if len(ended) > len(THREE) + 1:  # the first are of the move before
            raise KeyboardInterrupt
        return real(*args)

    layout.end = end
    with pytest.raises(KeyboardInterrupt):
        shift(router, FOUR)
    layout.end = real
    assert place.raw("d").exists(OWN + b"taken:3")
    if then == "go-on":
        assert router.reshard(None, drain=DRAIN).state == "settled"
        with pytest.raises(UsageError, match="nothing is moving"):
            router.reshard(None)
    else:
        shift(router, THREE)
    settled(place)


@pytest.mark.parametrize("state", ["closing", "transit"])
def test_a_mover_stops_when_a_node_is_away_and_goes_on_later(place: Place, state: str) -> None:
    """Where a node cannot be reached the mover says so; when it is back, the move goes on."""
    router = begin(place)
    values = load(router)
    # It keeps what it has.
    for name in FOUR:
        place.raw(name).config_set("save", "3600 1")
    try:

        def away() -> None:
            place.raw("d").save()
            place.servers["d"].kill()

        error = interrupted(router, state, away)
        assert isinstance(error, UnavailableError)
        place.servers["d"].restart()
        eventually(lambda: brought_to_its_end(router))
        assert router.mget(list(values)) == [value.encode() for value in values.values()]
        settled(place)
    finally:
        for name in FOUR:
            place.raw(name).config_set("save", "")
            (place.servers[name].directory / "dump.rdb").unlink(missing_ok=True)


# What keys may hold

#: How a key of each type is made, by a client of redis-py's.
TYPES: Mapping[str, Callable[[Any, Any], object]] = {
    "string": lambda client, key: client.set(key, b"\x00\xff\r\n$5"),
    "number": lambda client, key: client.incrby(key, 2**60),
    "list": lambda client, key: client.rpush(key, *range(300)),
    "set": lambda client, key: client.sadd(key, *(f"member{n}" for n in range(600))),
    "numbers": lambda client, key: client.sadd(key, *range(100)),
    "hash": lambda client, key: client.hset(key, mapping={f"f{n}": n for n in range(600)}),
    "zset": lambda client, key: client.zadd(key, {f"m{n}": n / 7 for n in range(300)}),
    "stream": lambda client, key: stream(client, key),
    "hll": lambda client, key: client.pfadd(key, *range(1000)),
    "bitmap": lambda client, key: client.setbit(key, 100_000, 1),
    "geo": lambda client, key: client.geoadd(key, (13.4, 52.5, "here", 2.3, 48.9, "there")),
    "big": lambda client, key: client.set(key, os.urandom(1 << 16) * 64),
    "long": lambda client, key: client.rpush(key, *(b"%d" % n * 200 for n in range(5000))),
}
#: Names that keys may have.
NAMES = (
    b"",
    b"{}",
    b"{tag}:1",
    b"{tag}:2",
    b"{",
    b"a{b}{c}",
    b"\x00\xff\x80\r\n",
    b" ",
    "häh".encode(),
    b"x" * 3000,
    b"rh:c1:{hits:0}:live",
    b"rh:r1:{router}",
    b"rh:r1:{routers}:node",
    b"rh:r1:{router}x:aside:k",
    b"rh:r1:router:mover",
    b"aside:k",
    b"=",
)


def stream(client: Any, key: Any) -> None:
    """Make a stream with groups, consumers and entries that are pending."""
    for n in range(50):
        client.xadd(key, {"n": n}, id=f"{n + 1}-0")
    client.xdel(key, "7-0")
    client.xgroup_create(key, "readers", "0")
    client.xreadgroup("readers", "one", {key: ">"}, count=20)
    client.xack(key, "readers", "1-0", "2-0")
    client.xgroup_create(key, "others", "30-0")


def held(client: Any, key: Any) -> Any:
    """Return all that a key holds, whatever its type."""
    kind = client.type(key)
    if kind == b"string":
        return client.get(key)
    if kind == b"list":
        return client.lrange(key, 0, -1)
    if kind == b"set":
        return client.smembers(key)
    if kind == b"hash":
        return client.hgetall(key)
    if kind == b"zset":
        return client.zrange(key, 0, -1, withscores=True)
    if kind == b"stream":
        groups = [
            {name: value for name, value in group.items() if name not in ("lag", "entries-read")}
            for group in client.xinfo_groups(key)
        ]
        pending = client.xpending_range(key, "readers", "-", "+", 100)
        waiting = [(each["message_id"], each["consumer"]) for each in pending]
        info = client.xinfo_stream(key)
        return client.xrange(key), groups, waiting, info["last-generated-id"]
    return kind


def make_all(router: Any) -> dict[Any, tuple[Any, float]]:
    """Make keys of all types and names, some with a TTL; returns what they hold, and their end."""
    made: dict[Any, tuple[Any, float]] = {}
    for kind, make in TYPES.items():
        for number in range(6):
            key = f"{kind}:{number}"
            make(router, key)
            if number % 2:
                router.expire(key, LASTING)
            made[key] = held(router, key), time.time() + LASTING if number % 2 else 0.0
    for name in NAMES:
        router.set(name, name)
        made[name] = name, 0.0
    return made


def check_all(router: Any, made: Mapping[Any, tuple[Any, float]]) -> None:
    """Check that keys hold what they did, and end when they should."""
    for key, (value, ends) in made.items():
        assert held(router, key) == value, key
        pttl = router.pttl(key)
        if ends:
            assert abs(time.time() + pttl / 1000 - ends) < SLACK, key
        else:
            assert pttl == -1, key


@pytest.mark.parametrize("by", ["mover", "client"])
def test_keys_of_all_types_and_names_move(place: Place, by: str) -> None:
    """Whatever keys hold and are called: they hold it after a move, with what is left to live."""
    router = begin(place, ["a"])
    made = make_all(router)
    for nodes in (("b",), ("b", "c", "d")):
        if by == "client":
            transit(router, nodes)
            check_all(router, made)
            finish(router)
        else:
            shift(router, nodes)
            check_all(router, made)
        settled(place)


def test_fields_of_a_hash_end_when_they_should(place: Place) -> None:
    """A hash's fields with a TTL have it after a move, where servers know such fields."""
    router = begin(place, ["a"])
    try:
        router.execute_command("HSET", "h", "f", "1", "g", "2")
        (done,) = router.execute_command("HEXPIRE", "h", str(LASTING), "FIELDS", "1", "f")
    except ServerError:
        pytest.skip("this server's fields have no TTL")
    assert done == 1
    shift(router, ["b"])
    left, none = router.execute_command("HPTTL", "h", "FIELDS", "2", "f", "g")
    assert (LASTING - SLACK) * 1000 < left <= LASTING * 1000
    assert none == -1


@pytest.fixture(scope="module")
def mixed() -> Iterator[Place]:
    """A Redis 6.2 and a Valkey node."""
    with ExitStack() as stack:
        servers = {
            "old": stack.enter_context(redis_server()),
            "new": stack.enter_context(valkey_server()),
        }
        made = Place(servers)
        stack.callback(made.close)
        yield made


def test_keys_move_to_a_newer_kind_of_server(mixed: Place) -> None:
    """All types move from a Redis 6.2 to Valkey."""
    mixed.fresh("old").close()
    router = mixed.router()
    made = make_all(router)
    shift(router, ["new"])
    check_all(router, made)
    settled(mixed)


def test_no_keys_move_to_a_server_that_cannot_read_them(mixed: Place) -> None:
    """A plan whose target does not understand what the source writes out is refused."""
    mixed.fresh("new").close()
    router = mixed.router()
    router.set("k", "value")
    plan = router.plan(["old"])
    assert any("node old cannot read what node new writes out" in why for why in plan.refusals)
    with pytest.raises(UsageError, match="the plan is refused: node old cannot read"):
        router.reshard(plan)
    assert router.get("k") == b"value"
    settled(mixed)


# Plans


def test_a_plan_says_what_will_move(place: Place, tmp_path: Path) -> None:
    """Slots, share, keys and bytes of a plan are those that move then; it outlives a file."""
    router = begin(place)
    load(router, 1000)
    plan = router.plan(list(FOUR))
    new = plan.new
    names = [key.encode() for key in load(router, 1000)]
    will = [key for key in names if new.node_for(key) != plan.old.node_for(key)]
    assert plan.slots == {("a", "d"): 1366, ("b", "d"): 1365, ("c", "d"): 1365}
    assert sum(plan.slots.values()) == 4096
    # The nodes' own keys are counted too: one each.
    assert plan.keys == len(will)
    assert plan.share == pytest.approx(len(will) / 1000, abs=0.01)
    assert 40 * plan.keys < plan.size < 200 * plan.keys
    assert not plan.refusals
    assert not plan.big
    assert "of all keys move, about" in str(plan)
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert all(url not in path.read_text() for url in place.urls.values())
    progress = router.reshard(loaded, drain=DRAIN)
    assert progress.moved == len(will)
    settled(place)


def test_what_is_stored_says_where_all_nodes_are(place: Place) -> None:
    """After a move the nodes know the addresses of those that have keys by now, and no others."""
    router = begin(place)
    for nodes in (FOUR, ("b", "d")):
        shift(router, nodes)
        text: Any = place.raw("d").hget(OWN + b"node", "topology")
        assert Topology.load(text).addresses == {
            name: f"127.0.0.1:{place.servers[name].port}" for name in nodes
        }


def test_a_plan_that_is_out_of_date_is_refused(place: Place) -> None:
    """A plan is for one version of the topology."""
    router = begin(place)
    values = load(router)
    plan = router.plan(list(FOUR))
    shift(router, ("a", "b"))
    with pytest.raises(UsageError, match=r"the plan is for version 1 .* make another plan"):
        router.reshard(plan)
    assert router.mget(list(values)) == [value.encode() for value in values.values()]
    settled(place)


def test_what_is_no_plan_is_refused(place: Place, tmp_path: Path) -> None:
    """Files that are no plans, nodes that nobody knows, and rates that are none: errors at once."""
    router = begin(place)
    path = tmp_path / "plan.json"
    for text in ("", "{}", "[1]", '{"version": 1}', "\x00"):
        path.write_text(text)
        with pytest.raises(UsageError, match="is no plan of a router"):
            Plan.load(path)
    with pytest.raises(UsageError, match="node e was not given to this router"):
        router.plan(["a", "e"])
    with pytest.raises(UsageError, match="its weight is a number above 0"):
        router.plan({"a": 0})
    with pytest.raises(UsageError, match="no nodes"):
        router.plan([])
    with pytest.raises(UsageError, match="nodes are given as weights by name"):
        router.plan("abc")
    with pytest.raises(UsageError, match="rate is a number"):
        router.reshard(router.plan(list(FOUR)), rate=0)
    with pytest.raises(UsageError, match="nothing is moving"):
        router.reshard(None)
    settled(place)


def test_keys_that_do_not_belong_on_a_target_are_named(place: Place) -> None:
    """A node that is to get keys, and has some by itself, is refused: they might be mixed up."""
    router = begin(place)
    place.raw("d").set("stranger", "value")
    plan = router.plan(list(FOUR))
    assert plan.refusals == [
        "node d has keys that do not belong there, such as 'stranger': FLUSHDB?"
    ]
    with pytest.raises(UsageError, match="stranger"):
        router.reshard(plan)
    assert place.raw("d").get("stranger") == b"value"


def test_a_target_without_room_is_refused(place: Place) -> None:
    """A node whose maxmemory is too small for what it would get is refused, with both numbers."""
    router = begin(place)
    names = list(itertools.islice(moving(router), 4))
    router.mset(dict.fromkeys(names, "x" * 4_000_000))
    place.raw("d").config_set("maxmemory", 12_000_000)
    try:
        plan = router.plan(list(FOUR))
        assert len(plan.refusals) == 1
        assert "node d has room for" in plan.refusals[0]
        assert "(maxmemory), and gets about 1" in plan.refusals[0]
    finally:
        place.raw("d").config_set("maxmemory", 0)
    shift(router, FOUR)
    settled(place)


def test_keys_that_do_not_fit_wait_until_there_is_room(place: Place) -> None:
    """A node that is full in the middle of a move: nothing is lost, and it goes on later."""
    router = begin(place)
    names = list(itertools.islice(moving(router), 6))
    router.mset(dict.fromkeys(names, "x" * 2_000_000))
    plan = router.plan(list(FOUR))
    place.raw("d").config_set("maxmemory", 6_000_000)
    try:
        with pytest.raises(UnavailableError, match="OOM"):
            router.reshard(plan, drain=DRAIN)
    finally:
        place.raw("d").config_set("maxmemory", 0)
    finish(router)
    assert [len(value) for value in router.mget(names)] == [2_000_000] * 6
    settled(place)


def test_nothing_else_is_planned_while_keys_move(place: Place) -> None:
    """While keys move there is no other plan, and no other move; this one can be gone on with."""
    router = begin(place)
    values = load(router)
    plan = router.plan(list(FOUR))
    other = router.plan(["a", "b"])
    transit(router)
    with pytest.raises(UsageError, match="keys are moving already"):
        router.plan(["a"])
    with pytest.raises(UsageError, match="another move is under way"):
        router.reshard(other)
    router.reshard(plan, drain=DRAIN)
    assert router.mget(list(values)) == [value.encode() for value in values.values()]
    settled(place)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_keys_move_from_a_legacy_placement_to_slots(place: Place, kind: str) -> None:
    """Nodes that were spread over by another program go over to slots, while clients go on."""
    for name in FOUR:
        place.raw(name).flushall()
    legacy: Any = KINDS[kind](THREE)
    first = place.router(*THREE, placement=legacy)
    values = load(first)
    assert len({first.node_for(key) for key in values}) > 1
    assert all(place.raw(legacy.node_for(key.encode())).exists(key) for key in values)
    router = place.router()
    plan = router.plan(list(FOUR))
    assert plan.slots == {}
    assert plan.share > 0.5
    transit(router)
    for key in list(values)[:20]:
        values[key] += "+"
        assert router.append(key, "+") == len(values[key])
    finish(router)
    assert router.mget(list(values)) == [value.encode() for value in values.values()]
    assert isinstance(router.plan(list(FOUR)).old, SlotTable)
    with pytest.raises(TopologyMismatchError, match="node d, which is not given here"):
        place.router(*THREE, placement=legacy).get("k0")
    settled(place)


# Connections


@pytest.mark.parametrize(
    "words",
    [["CLIENT", "SETNAME", "x"], ["client", "reply", "off"], ["RESET"], ["SELECT", "1"], ["MULTI"]],
    ids=" ".join,
)
def test_nobody_changes_a_connection_that_a_mover_must_see(place: Place, words: list[str]) -> None:
    """What would rename or change a shared connection is refused: no fence could find it then."""
    router = begin(place)
    router.set("k", "value")
    with pytest.raises(UsageError, match="would change a connection"):
        router.fanout().execute_command(*words)
    with pytest.raises(UsageError):
        router.execute_command(*words)
    shift(router, FOUR)
    assert router.get("k") == b"value"


# Conversations


def test_there_is_no_conversation_about_keys_that_are_about_to_move(place: Place) -> None:
    """Who was slow between one move and the next waits for that too, as any other call does."""
    router = begin(place)
    key = next(moving(router))
    router.set(key, 5)
    transit(router)
    client = place.router()
    assert client.get(key) == b"5"
    transport = client.redishacks_transport
    routes: Any = transport.routes
    real = transport.call
    states: list[str] = []

    def call(command: Any, deadline: float) -> Any:
        reply = real(command, deadline)
        if not states:
            finish(router)
            closing(router, THREE)
            eventually(
                lambda: real(command._replace(keys=()), 5) is not None and routes.view.version > 4
            )
            states.append(routes.view.topology.state)
        return reply

    transport.call = call
    with pytest.raises(UnavailableError):
        transport.converse([key.encode()], 1)
    assert states == ["closing"]
    finish(router)
    settled(place)
