"""A router's nodes as a whole: what is said to all, scans, balance, ejection, nodes that fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest

from redishacks.errors import (
    MaybeAppliedError,
    RedisHacksError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.router import BatchError, Router
from redishacks.testing import FaultProxy, Server, valkey_server
from tests.helpers import eventually
from tests.router_kit import (
    LENIENCE,
    PATIENT,
    Backend,
    Face,
    Place,
    Routers,
    clustered,
    nodes,
    spread,
)

NODE_KEY = b"rh:r1:{router}:node"


@pytest.fixture
def colour(flavour: str) -> Iterator[Routers]:
    """Both colours, with one test body."""
    made = Routers(flavour)
    yield made
    made.close()


@pytest.fixture(scope="module", params=["nodes", "cluster"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Both back ends, with one test body."""
    if request.param == "cluster":
        yield clustered(request.getfixturevalue("cluster"))
        return
    with nodes("a", "b", "c") as made:
        yield made


@pytest.fixture
def backend(place: Place, colour: Routers) -> Backend:
    """Routers of both colours over both back ends."""
    return Backend(place, colour)


def fanout(router: Any, *args: Any, **options: Any) -> Any:
    """Return a fanout that looks as if it were not for asyncio."""
    made = router.fanout(*args, **options)
    return Face(made, router._runner) if isinstance(router, Face) else made


def sizes(servers: dict[str, Server]) -> dict[str, int]:
    """Return how many keys each has."""
    counts = {}
    for name, server in servers.items():
        with server.client() as client:
            counts[name] = client.dbsize()
    return counts


def failure(call: Callable[[], Any]) -> tuple[type[Exception] | None, float]:
    """Return as what a call failed, if it did, and after how many seconds."""
    began = time.monotonic()
    try:
        call()
    except RedisHacksError as error:
        return type(error), time.monotonic() - began
    return None, time.monotonic() - began


def works(call: Callable[[], Any]) -> bool:
    """Whether a call does not fail."""
    return failure(call)[0] is None


# Said to all


def test_fanout(backend: Backend, prefix: str) -> None:
    """Each node's value is what redis-py would return of it, by its name."""
    router = backend.router()
    keys = backend.keys(prefix, each=3)
    router.mset(dict.fromkeys(keys, 1))
    everyone = fanout(router)
    assert everyone.dbsize() == sizes(backend.servers)
    assert everyone.ping() == dict.fromkeys(backend.servers, True)
    for name, info in everyone.info("server").items():
        assert info["tcp_port"] == backend.servers[name].port
    assert list(everyone.config_get("maxmemory").values()) == [{"maxmemory": "0"}] * 3
    first = next(iter(backend.servers))
    assert fanout(router, [first]).dbsize() == {first: sizes(backend.servers)[first]}
    assert fanout(router, []).dbsize() == {}
    found = fanout(router).keys(f"{prefix}*")
    assert {name: len(some) for name, some in found.items()} == dict.fromkeys(backend.servers, 3)
    with pytest.raises(UsageError, match="no node nobody"):
        fanout(router, [first, "nobody"]).set(prefix, "x")
    text = fanout(backend.router(decode_responses=True)).echo("é")
    assert text == dict.fromkeys(backend.servers, "é")


def test_fanout_to_nodes_of_which_some_fail(backend: Backend, prefix: str) -> None:
    """The others have done it, and the error has the replies of all, each with its node."""
    router = backend.router()
    fanout(router, destroy=True).flushdb()
    (one, *_) = backend.keys(prefix)
    router.mset({f"{{{one}}}{n}": 1 for n in range(9)})
    broken = router.node_for(one)
    script = "return redis.call('DBSIZE') > 5 and redis.error_reply('ERR full') or 'well'"
    with pytest.raises(BatchError, match=r"1 of 3 commands failed; .*full") as failed:
        fanout(router).eval(script, 0)
    replies = failed.value.replies
    assert {reply.node for reply in replies} == set(backend.servers)
    for reply in replies:
        if reply.node == broken:
            assert isinstance(reply.error, ServerError)
        else:
            assert reply.value == b"well"


def test_what_destroys(backend: Backend, prefix: str) -> None:
    """Needs a word more; then keys are gone, and what the router keeps for itself stays."""
    router = backend.router()
    keys = backend.keys(prefix)
    router.mset(dict.fromkeys(keys, 1))
    for word in ("FLUSHDB", "flushall", "SHUTDOWN", "SWAPDB"):
        with pytest.raises(UsageError, match="destroy=True"):
            fanout(router).execute_command(word, 0, 1)
    assert router.exists(*keys) == 3
    own = backend.place.cluster is None
    if own:
        with pytest.raises(UsageError, match="FLUSHDB"):
            fanout(router, destroy=True).flushall()
        assert router.exists(*keys) == 3
    name = router.node_for(keys[0])
    assert set(fanout(router, [name], destroy=True).flushdb()) == {name}
    assert router.exists(*keys) == 2
    before = stamps(backend) if own else []
    assert fanout(router, destroy=True).flushdb() == dict.fromkeys(backend.servers, True)
    assert sizes(backend.servers) == dict.fromkeys(backend.servers, 1 if own else 0)
    if own:
        assert stamps(backend) == before
        assert all(before)
    assert router.set(keys[0], 1) is True
    assert backend.router().get(keys[0]) == b"1"


def stamps(backend: Backend) -> list[Any]:
    """Return what each node knows of the router."""
    found = []
    for server in backend.servers.values():
        with server.client() as client:
            found.append(client.hgetall(NODE_KEY))
    return found


def test_what_is_for_no_node(backend: Backend, prefix: str) -> None:
    """A command without a key is refused, alone and in a batch, and nothing is done."""
    router = backend.router()
    router.set(prefix, 1)
    calls: tuple[Callable[[Any], Any], ...] = (
        lambda r: r.dbsize(), lambda r: r.flushdb(), lambda r: r.flushall(), lambda r: r.keys("*"),
        lambda r: r.info(), lambda r: r.scan(), lambda r: r.config_set("maxmemory", 0),
        lambda r: r.randomkey(), lambda r: r.execute_command("SHUTDOWN"),
        lambda r: r.publish("x", "y"), lambda r: r.wait(0, 0), lambda r: r.script_flush(),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="no key says"):
            call(router)
        with router.map(on_error="return") as m:
            reply, well = call(m), m.get(prefix)
        assert isinstance(reply.error, UsageError)
        assert well.value == b"1"


# Balance


def test_balance(backend: Backend, prefix: str) -> None:
    """Keys, memory and shares are those of the servers themselves, and the skew follows."""
    router = backend.router()
    fanout(router, destroy=True).flushdb()
    own = 1 if backend.place.cluster is None else 0
    first, *_ = keys = backend.keys(prefix)
    router.mset({f"{{{first}}}{n}": 1 for n in range(60)} | {f"{keys[1]}": 1})
    found = router.balance()
    assert [node.name for node in found.nodes] == list(fanout(router).ping())
    assert {node.name: node.keys for node in found.nodes} == sizes(backend.servers)
    assert sum(node.slots for node in found.nodes) == 16384
    assert abs(sum(node.expected for node in found.nodes) - 1) < 1e-9
    for node in found.nodes:
        assert node.error is None
        assert abs(node.expected - node.slots / 16384) < 1e-9
        with backend.servers[node.name].client() as client:
            used = client.info("memory")["used_memory"]
        assert 0.5 < node.memory / used < 2
        assert node.ops >= 0
    most = next(node for node in found.nodes if node.name == router.node_for(first))
    total = 61 + 3 * own
    assert found.skew == pytest.approx((60 + own) / total / most.expected)
    assert f"skew {found.skew:.2f}" in str(found)
    assert most.name in str(found)


# Scans


def test_scanning_all_nodes(backend: Backend, prefix: str) -> None:
    """Every key is returned once, and nothing of what the router keeps for itself."""
    router = backend.router()
    fanout(router, destroy=True).flushdb()
    wanted = {f"{prefix}:{n}".encode() for n in range(1500)}
    with router.map() as m:
        for key in wanted:
            m.set(key, 1)
        m.rpush(f"{prefix}:list", 1)
    wanted.add(f"{prefix}:list".encode())
    listed = backend.colour.listed

    def scanned(r: Any = router, **options: Any) -> list[Any]:
        target = r.target if isinstance(r, Face) else r
        return listed(target.scan_iter(**options))

    assert sorted(scanned()) == sorted(wanted)
    assert sorted(scanned(count=7)) == sorted(wanted)
    some = [key for key in wanted if key.startswith(f"{prefix}:1".encode())]
    assert sorted(scanned(match=f"{prefix}:1*")) == sorted(some)
    assert scanned(_type="list") == [f"{prefix}:list".encode()]
    assert scanned(match="rh:r1:*") == scanned(match="none*") == []
    text = scanned(backend.router(decode_responses=True), match=f"{prefix}:list")
    assert text == [f"{prefix}:list"]


@pytest.fixture
def three() -> Iterator[Place]:
    """Three nodes, of which two are used."""
    with nodes("a", "b", "c") as made:
        given = made.nodes()
        with closing(Router({name: given[name] for name in "ab"})) as router:
            router.connect()
        yield made


@pytest.mark.parametrize(
    "runs", [2, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.long])], ids=["some", "many"]
)
def test_scanning_while_keys_move(colour: Routers, three: Place, prefix: str, runs: int) -> None:
    """Keys that are there all the time are all returned, though nodes come and go meanwhile."""
    wanted = {f"{prefix}:{n}".encode() for n in range(3000)}
    router = colour.router(three.nodes())
    target = router.target if isinstance(router, Face) else router
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        with mover.map() as m:
            for key in wanted:
                m.set(key, 1)
        for run in range(runs):
            plan = mover.plan(["a", "b"] if run % 2 else ["a", "b", "c"])
            begun = threading.Event()
            failed: list[Exception] = []

            def told(progress: Any, begun: Any = begun) -> None:
                begun.set()

            def move(plan: Any = plan, told: Any = told, failed: Any = failed) -> None:
                try:
                    mover.reshard(plan, on_progress=told, drain=0.05, rate=30_000)
                except Exception as error:
                    failed.append(error)

            thread = threading.Thread(target=move)
            thread.start()
            assert begun.wait(PATIENT)
            found = []
            while thread.is_alive():
                found.append(colour.listed(target.scan_iter(match=f"{prefix}:*", count=100)))
            thread.join()
            assert failed == []
            assert found
            for keys in found:
                assert set(keys) == wanted


def test_scanning_what_is_set_aside(colour: Routers, three: Place, prefix: str) -> None:
    """A key that is on its way is returned by its name, also when names are to match."""
    router = colour.router(three.nodes())
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        plan = mover.plan(["a"])
        key = of(mover, prefix, "b")
        mover.set(key, 1)
        halted(mover, plan)
        with three.servers["b"].client() as client:
            client.rename(key, b"rh:r1:{router}:aside:" + key.encode())
        target = router.target if isinstance(router, Face) else router
        for options in ({}, {"match": f"{prefix}*"}, {"match": "*", "_type": "string"}):
            assert set(colour.listed(target.scan_iter(**options))) == {key.encode()}
        assert colour.listed(target.scan_iter(match="none*")) == []
        mover.reshard(None)
        assert mover.get(key) == b"1"


class _Stop(Exception):
    """What only these tests raise."""


def halted(mover: Router, plan: Any) -> None:
    """Begin a move and stop before any key was moved."""

    def stop(progress: Any) -> None:
        if progress.state == "transit":
            raise _Stop

    with pytest.raises(_Stop):
        mover.reshard(plan, on_progress=stop, drain=0.05)


def test_scanning_a_node_that_is_taken_out(colour: Routers, three: Place, prefix: str) -> None:
    """When it goes in the middle of its scan, all that it had is found where it is now."""
    router = colour.router({name: three.nodes()[name] for name in "ab"})
    target = router.target if isinstance(router, Face) else router
    wanted = {f"{prefix}:{n}".encode() for n in range(600)}
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        with mover.map() as m:
            for key in wanted:
                m.set(key, 1)
        router.connect()
        halted(mover, mover.plan(["a"]))
        assert router.get(f"{prefix}:0") == b"1"  # by now it knows that keys are moving
        pages = target.scan_iter(count=20)
        found: list[Any] = []

        async def one() -> Any:
            return await anext(pages, None)

        def following() -> Any:
            return next(pages, None) if colour.runner is None else colour.run(one())

        with three.servers["b"].client() as client:
            before = set(client.scan_iter(count=1000))
        # Some of them only, of what has not been pulled by now.
        while len(before & set(found)) < 25:
            found.append(following())
        mover.reshard(None)
        moved = next(iter(before))
        assert eventually(lambda: router.get(moved) == b"1" and router.node_for(moved) == "a")
        while (key := following()) is not None:
            found.append(key)
        assert set(found) == wanted


# Ejection


@pytest.fixture
def four() -> Iterator[Place]:
    """Four nodes, of which three are used."""
    with nodes("a", "b", "c", "d") as made:
        yield made


def of(router: Any, prefix: str, name: str) -> str:
    """Return a key of a node."""
    router.connect()
    (key,) = spread(router, prefix, [name])
    return key


@pytest.mark.parametrize("way", ["killed", "hung"])
def test_a_node_is_ejected(colour: Routers, four: Place, prefix: str, way: str) -> None:
    """Others learn it without restart, though they ask for nothing but its keys, and go on."""
    given = {name: four.nodes()[name] for name in "abc"}
    admin, other, idle = (colour.router(given, deadline=0.5) for _ in range(3))
    gone = of(admin, prefix, "c")
    keys = {name: of(admin, prefix, name) for name in "ab"}
    for router in (admin, other, idle):
        router.set(gone, "old")
    for name, key in keys.items():
        admin.set(key, name)
    server = four.servers["c"]
    server.kill() if way == "killed" else server.pause()
    try:
        assert failure(lambda: other.get(gone))[0] is UnavailableError
        began = time.monotonic()
        admin.eject("c")
        assert time.monotonic() - began < 10
        assert admin.get(gone) is None
        assert admin.node_for(gone) != "c"
        # `other` and `idle` ask for this key alone.
        assert eventually(lambda: works(lambda: other.get(gone)))
        assert other.get(gone) is None
        assert eventually(lambda: works(lambda: idle.set(gone, "new")))
        assert admin.get(gone) == other.get(gone) == b"new"
        for name, key in keys.items():
            assert other.get(key) == name.encode()
        with pytest.raises(UsageError, match="no node c"):
            admin.eject("c")
    finally:
        server.restart() if way == "killed" else server.resume()


def test_an_ejected_node_that_comes_back(colour: Routers, four: Place, prefix: str) -> None:
    """It is not used, whatever it has; only after FLUSHDB may keys be planned for it."""
    given = {name: four.nodes()[name] for name in "abc"}
    admin = colour.router(given, deadline=2)
    gone = of(admin, prefix, "c")
    admin.set(gone, "old")
    server = four.servers["c"]
    with server.paused():
        admin.eject("c")
        admin.set(gone, "new")
    for router in (admin, colour.router(given), colour.router(four.nodes())):
        router.connect()
        assert router.get(gone) == b"new"
        assert router.node_for(gone) != "c"
        assert set(fanout(router).ping()) == {"a", "b"}
    plan = admin.plan(["a", "b", "c"])
    assert "FLUSHDB" in " ".join(plan.refusals)
    with pytest.raises(UsageError, match="refused"):
        admin.reshard(plan)
    with server.client() as client:
        client.flushdb()
    plan = admin.plan(["a", "b", "c"])
    assert plan.refusals == []
    admin.reshard(plan, drain=0.05)
    assert admin.get(gone) == b"new"
    assert set(fanout(admin).ping()) == {"a", "b", "c"}
    fresh = colour.router(given)
    assert fresh.get(gone) == b"new"


def test_who_slept_while_a_node_was_ejected(colour: Routers, four: Place, prefix: str) -> None:
    """A client that asked nobody meanwhile does not go on with what the ejected node has."""
    given = {name: four.nodes()[name] for name in "abc"}
    admin, sleeper = (colour.router(given, deadline=2) for _ in range(2))
    gone = of(admin, prefix, "c")
    sleeper.set(gone, "old")
    with four.servers["c"].paused():
        admin.eject("c")
        admin.set(gone, "new")
    assert eventually(lambda: sleeper.get(gone) == b"new", within=5)
    assert sleeper.node_for(gone) != "c"


def test_ejecting_a_node_that_is_there(colour: Routers, four: Place, prefix: str) -> None:
    """Clients that reach it, and use nothing else, leave it as well."""
    given = {name: four.nodes()[name] for name in "abc"}
    admin, other = (colour.router(given, deadline=2) for _ in range(2))
    gone = of(admin, prefix, "c")
    other.set(gone, "old")
    admin.eject("c")
    admin.set(gone, "new")
    assert eventually(lambda: other.get(gone) == b"new", within=5)


def test_what_cannot_be_ejected(colour: Routers, three: Place, prefix: str) -> None:
    """A node that is none, the last one, and any while keys move."""
    router = colour.router(three.nodes())
    router.connect()
    for wrong in ("nobody", "c"):
        with pytest.raises(UsageError, match="no node"):
            router.eject(wrong)
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        halted(mover, mover.plan(["a", "b", "c"]))
        with pytest.raises(UsageError, match="moving"):
            router.eject("a")
        mover.reshard(None)
    router.eject("c")
    router.eject("b")
    with pytest.raises(UsageError, match="only node"):
        router.eject("a")
    assert router.set(prefix, 1) is True


def test_ejecting_from_a_cluster(colour: Routers, place: Place) -> None:
    """A cluster does that by itself."""
    if place.cluster is None:
        return
    router = Backend(place, colour).router()
    calls: list[Callable[[], Any]] = [lambda: router.eject("x"), lambda: router.plan(["x"])]
    for call in calls:
        with pytest.raises(UsageError, match="cluster"):
            call()


# Nodes that do not answer


@pytest.fixture
def behind(colour: Routers) -> Iterator[tuple[Any, FaultProxy, dict[str, str]]]:
    """A router with a short deadline, whose node `b` is behind a proxy, and a key of each node."""
    with nodes("a", "b", "c") as made, FaultProxy(made.servers["b"]) as proxy:
        router = colour.router(made.nodes() | {"b": proxy.url}, deadline=0.3)
        keys = {name: of(router, "key", name) for name in "abc"}
        for name, key in keys.items():
            router.set(key, name)
        yield router, proxy, keys


def test_a_hung_node(behind: tuple[Any, FaultProxy, dict[str, str]]) -> None:
    """It costs its deadline a few times and then nothing; the others' keys are served meanwhile."""
    router, proxy, keys = behind
    where = {key: router.node_for(key) for key in keys.values()}
    proxy.stall()
    found = []
    for _ in range(60):
        found.append(failure(lambda: router.get(keys["b"])))
        for name in "ac":
            assert router.get(keys[name]) == name.encode()
        assert router.mget(keys["a"], keys["c"]) == [b"a", b"c"]
    assert {kind for kind, _ in found} == {UnavailableError}
    assert all(seconds < 0.3 + LENIENCE for _, seconds in found)
    slow = [seconds for _, seconds in found if seconds > 0.1]
    assert len(slow) <= 8
    assert sorted(seconds for _, seconds in found)[30] < 0.01
    assert {key: router.node_for(key) for key in keys.values()} == where
    balance = {node.name: node for node in router.balance().nodes}
    assert isinstance(balance["b"].error, RedisHacksError)
    assert balance["a"].error is balance["c"].error is None
    assert str(balance["b"].error) in str(router.balance()) or "b " in str(router.balance())
    proxy.cut()
    proxy.heal()
    assert eventually(lambda: works(lambda: router.get(keys["b"])))
    assert router.get(keys["b"]) == b"b"


def test_a_hung_node_is_probed_by_one(
    behind: tuple[Any, FaultProxy, dict[str, str]], colour: Routers
) -> None:
    """Of many callers at once one tries it, for as long as it has; all others fail at once."""
    router, proxy, keys = behind
    proxy.stall()
    for _ in range(4):
        failure(lambda: router.get(keys["b"]))
    seconds: list[float] = []
    end = time.monotonic() + 2.5

    def rounds() -> None:
        while time.monotonic() < end:
            seconds.append(failure(lambda: router.get(keys["b"]))[1])
            time.sleep(0.002)

    async def tasks() -> None:
        async def one() -> None:
            while time.monotonic() < end:
                began = time.monotonic()
                with pytest.raises(RedisHacksError):
                    await router.target.get(keys["b"])
                seconds.append(time.monotonic() - began)
                await asyncio.sleep(0.002)

        await asyncio.gather(*(one() for _ in range(6)))

    if colour.runner is None:
        with ThreadPoolExecutor(6) as pool:
            for work in [pool.submit(rounds) for _ in range(6)]:
                work.result()
    else:
        colour.run(tasks())
    # A try after 0.25, 0.5, 1 and 2 seconds, and what each of them takes.
    assert 1 <= sum(each > 0.2 for each in seconds) <= 5
    assert len(seconds) > 100


def test_a_refused_node(behind: tuple[Any, FaultProxy, dict[str, str]]) -> None:
    """It fails at once, as does every node that nobody listens at; back, it serves in seconds."""
    router, proxy, keys = behind
    proxy.refuse()
    proxy.cut()
    found = [failure(lambda: router.get(keys["b"])) for _ in range(20)]
    assert {kind for kind, _ in found} == {UnavailableError}
    assert max(seconds for _, seconds in found) < LENIENCE
    kind, _ = failure(lambda: router.incr(f"{{{keys['b']}}}n"))
    assert kind is UnavailableError
    with pytest.raises(BatchError) as failed:
        fanout(router).ping()
    assert {reply.node for reply in failed.value.replies if reply.error} == {"b"}
    proxy.accept()
    assert eventually(lambda: works(lambda: router.get(keys["b"])))


def test_a_node_is_restarted(colour: Routers, prefix: str) -> None:
    """With its data it serves again by itself, and counts go on where they were."""
    with ExitStack() as stack:
        made = {
            name: stack.enter_context(valkey_server(appendonly="yes", appendfsync="always"))
            for name in "ab"
        }
        router = colour.router({name: each.url for name, each in made.items()}, deadline=0.5)
        key = of(router, prefix, "b")
        well = of(router, prefix, "a")
        assert router.incr(key) == 1
        made["b"].kill()
        assert failure(lambda: router.incr(key))[0] in (UnavailableError, MaybeAppliedError)
        assert router.incr(well) == 1
        made["b"].restart()
        assert eventually(lambda: works(lambda: router.get(key)))
        assert router.incr(key) == 2
