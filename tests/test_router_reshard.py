"""Keys that move between nodes while clients go on: nothing lost, doubled, left behind, revived."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from redishacks.errors import MaybeAppliedError, UnavailableError, UsageError
from redishacks.router import Router
from redishacks.router._move import Progress
from redishacks.router.commands import Layout
from redishacks.router.reshard import Plan
from redishacks.testing import Server, valkey_server
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

    def fresh(self, *names: str) -> Router:
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

    def router(self, *names: str, deadline: float = 20.0, **options: Any) -> Router:
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


def begin(place: Place, nodes: Iterable[str] = THREE) -> Router:
    """Return a router that knows four nodes, whose keys are on some of them."""
    place.fresh(*nodes).close()
    router = place.router()
    router.connect()
    return router


def shift(router: Router, nodes: Iterable[str], **options: Any) -> Progress:
    """Move all to these nodes."""
    return router.reshard(router.plan(list(nodes)), **{"drain": DRAIN, **options})


def moving(router: Router, nodes: Iterable[str] = FOUR, kind: str = "k") -> Iterator[str]:
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


def check(router: Router, ledgers: list[Ledger]) -> None:
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
        sure, perhaps, never = ([], [], [])
        for ledger in ledgers:
            for all_, one in zip(
                (sure, perhaps, never), ledger.tokens.get(key, ([], [], [])), strict=True
            ):
                all_ += one
        found = elements(router, key)
        assert len(found) == len(set(found)), f"{key} has something twice"
        assert set(sure) <= set(found) <= {*sure, *perhaps}, key


def elements(router: Router, key: str) -> list[str]:
    """Return what was put into a key of any type."""
    if key[0] == "l":
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
            assert eventually(lambda process=process: workers.is_stopped(process.pid)), which

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


def each_step(router: Router, steps: Iterable[str]) -> dict[tuple[str, str], str]:
    """Return a moving key for each step and flavour."""
    names = moving(router)
    return {(flavour, step): next(names) for flavour in ("sync", "async") for step in steps}


def counted(router: Router, key: str, before: int, how: bool | None) -> None:
    """Check a count that was `before`, and perhaps one more."""
    found = int(router.get(key) or 0)
    possible = {True: {before + 1}, False: {before}, None: {before, before + 1}}[how]
    assert found in possible, (key, found, possible)


@pytest.mark.parametrize("back", [False, True], ids=["there", "and-back"])
def test_who_was_stopped_before_a_move_writes_to_no_old_node(place: Place, back: bool) -> None:
    """Clients stop in the middle of a call, keys move, and they go on: once or never, and right."""
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


@pytest.mark.parametrize("then", ["count", "delete", "and-back"])
def test_who_was_stopped_in_a_pull_brings_nothing_back(place: Place, then: str) -> None:
    """Clients stop while they pull a key, and go on when the move is over: nothing comes back."""
    router = begin(place)
    keys = each_step(router, (*PULLING, "planned", "addressed", "write"))
    router.mset(dict.fromkeys(keys.values(), 5))
    stopped = Stopped(place, keys)
    began = False

    def on_progress(progress: Progress) -> None:
        nonlocal began
        if progress.state == "transit" and not began:
            began = True
            stopped.go()

    try:
        shift(router, FOUR, on_progress=on_progress)
        assert began
        before = 105
        for key in keys.values():
            if then == "delete":
                router.delete(key)
                before = 0
            else:
                assert router.incrby(key, 100) == 105
        if then == "and-back":
            shift(router, THREE)
        ended = stopped.go_on()
    finally:
        stopped.close()
    for which, key in keys.items():
        counted(router, key, before, ended[which])
    settled(place)


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


def load(router: Router, count: int = 300) -> dict[str, str]:
    """Put some keys there."""
    values = {f"k{n}": f"value{n}" for n in range(count)}
    router.mset(values)
    return values


def finish(router: Router, **options: Any) -> None:
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


@pytest.mark.slow
def test_a_mover_that_is_killed_anywhere_leaves_nothing_undone(
    place: Place, tmp_path: Path
) -> None:
    """However far a mover had come when it was killed: the next one ends the move."""
    for at in itertools.count(1):
        if not killed_after(place, at, tmp_path):
            break
    assert at > 20


@pytest.mark.parametrize("at", [6, 14, 20, 26, 32])
def test_a_mover_that_is_killed_leaves_nothing_undone(
    place: Place, tmp_path: Path, at: int
) -> None:
    """A mover is killed at some steps of its work: the next one ends the move."""
    killed_after(place, at, tmp_path)


# What a move is made of


def transit(router: Router, nodes: Iterable[str] = FOUR) -> None:
    """Begin a move and stop it where keys begin to move."""

    def on_progress(progress: Progress) -> None:
        if progress.state == "transit":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shift(router, nodes, on_progress=on_progress)


def pulls(router: Router) -> tuple[Layout, Callable[[str, Any], Any], int]:
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
    gifts = say(old, lambda node: layout.give(node, [key.encode()], since))
    assert [gift.key for gift in gifts] == [key.encode()]
    place.raw(old).pexpire(layout.aside_prefix + key.encode(), 1)
    eventually(lambda: not place.raw(old).exists(layout.aside_prefix + key.encode()))
    assert router.get(key) is None
    router.set(key, "new")
    say("d", lambda node: layout.take(node, gifts, since))
    assert router.get(key) == b"new"
    finish(router)
    assert router.get(key) == b"new"
    settled(place)


def test_a_key_that_a_node_cannot_take_is_not_lost(place: Place) -> None:
    """A node that refuses what it is given has not taken it: later it can."""
    router = begin(place)
    values = load(router)
    place.raw("d").execute_command("ACL", "SETUSER", "default", "-restore")
    try:
        plan = router.plan(list(FOUR))
        with pytest.raises(UsageError, match="cannot read"):
            router.reshard(plan)
        with pytest.raises(Exception, match="restore"):
            router.reshard(plan._replace(refusals=[]), drain=DRAIN)
    finally:
        place.raw("d").execute_command("ACL", "SETUSER", "default", "+restore")
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
    other = Router({name: f"{url[:-1]}1" for name, url in place.urls.items()}, deadline=20)
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


@pytest.mark.parametrize("at", [10, 16, 20, 24, 26, 28])
def test_a_mover_that_was_stopped_does_no_harm_when_it_goes_on(
    place: Place, tmp_path: Path, at: int
) -> None:
    """A mover that wakes up when others have moved all, twice, stops with an error."""
    there, error = stopped_mover(place, tmp_path, at)
    assert there
    assert error is not None
    assert "somebody else" in error


@pytest.mark.slow
def test_a_mover_that_was_stopped_anywhere_does_no_harm(place: Place, tmp_path: Path) -> None:
    """Wherever a mover was stopped: it does no harm when it goes on."""
    for at in itertools.count(1):
        if not stopped_mover(place, tmp_path, at)[0]:
            break
    assert at > 20
