"""Conversations of a router: transactions, commands that wait, and scripts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pytest

from redishacks.errors import (
    CrossNodeError,
    MaybeAppliedError,
    RedisHacksError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.router import BatchError, Router, WatchError, _blocking
from redishacks.testing import FaultProxy, Server, valkey_cluster
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


@contextmanager
def transaction(router: Any, *keys: Any) -> Iterator[Any]:
    """Return a transaction that looks as if it were not for asyncio."""
    if not isinstance(router, Face):
        with router.transaction(*keys) as t:
            yield t
        return
    run = router._runner.run
    made = router.target.transaction(*keys)
    t = run(made.__aenter__())
    try:
        yield Face(t, router._runner)
    except BaseException as error:
        run(made.__aexit__(type(error), error, error.__traceback__))
        raise
    run(made.__aexit__(None, None, None))


def connections(server: Server) -> list[dict[str, str]]:
    """Return the connections of a server, without this one."""
    with server.client() as client:
        mine = client.client_id()
        return [each for each in client.client_list() if int(each["id"]) != mine]


def watching(backend: Backend) -> int:
    """Return how many keys are watched."""
    return sum(
        int(each["watch"]) for server in backend.servers.values() for each in connections(server)
    )


def blocked(server: Server) -> int:
    """Return how many connections wait."""
    return sum("b" in each["flags"] for each in connections(server))


class _Oops(Exception):
    """What only these tests raise."""


# Transactions


def test_a_transaction(backend: Backend, prefix: str) -> None:
    """All its commands are done together, and have the values that they would have alone."""
    router = backend.router()
    for key in backend.keys(prefix):
        with transaction(router) as t:
            replies = [
                t.incr(key), t.expire(key, 100), t.rpush(f"{{{key}}}l", "é", 1),
                t.lrange(f"{{{key}}}l", 0, -1), t.zadd(f"{{{key}}}z", {"a": 1.5}),
                t.zrange(f"{{{key}}}z", 0, -1, withscores=True), t.get(f"{{{key}}}none"),
                t.delete(f"{{{key}}}l", f"{{{key}}}z"), t.ping(),
            ]  # fmt: skip
            with pytest.raises(UsageError, match="when its block is left"):
                assert replies[0].value
            assert router.get(key) is None
        assert [reply.value for reply in replies] == [
            1, True, 2, ["é".encode(), b"1"], 1, [(b"a", 1.5)], None, 2, True,
        ]  # fmt: skip
        assert {reply.node for reply in replies} == {router.node_for(key)}
        assert 0 < router.ttl(key) <= 100
        with pytest.raises(UsageError, match="has ended"):
            t.incr(key)


@pytest.mark.parametrize("protocol", [2, 3])
def test_text_instead_of_bytes(backend: Backend, prefix: str, protocol: int) -> None:
    """With decode_responses values are text, said at once or together."""
    router = backend.router(decode_responses=True, protocol=protocol)
    router.hset(f"{{{prefix}}}h", mapping={"f": "é"})
    with transaction(router, prefix) as t:
        assert t.hgetall(f"{{{prefix}}}h") == {"f": "é"}
        assert t.get(prefix) is None
        t.multi()
        replies = [t.set(prefix, "ü"), t.get(prefix), t.hgetall(f"{{{prefix}}}h")]
    assert [reply.value for reply in replies] == [True, "ü", {"f": "é"}]


def test_a_watched_key(backend: Backend, prefix: str) -> None:
    """What is read is said at once; what is recorded is done when nobody changed the key."""
    router = backend.router()
    for key in backend.keys(prefix):
        router.set(key, 40)
        with transaction(router, key, f"{{{key}}}other") as t:
            number = int(t.get(key))
            assert t.incr(f"{{{key}}}third") == 1
            assert router.get(f"{{{key}}}third") == b"1"
            t.multi()
            reply = t.set(key, number + 2)
            with pytest.raises(UsageError, match="recorded already"):
                t.multi()
            assert router.get(key) == b"40"
        assert reply.value is True
        assert router.get(key) == b"42"
    assert watching(backend) == 0


def test_a_watched_key_is_changed(backend: Backend, prefix: str) -> None:
    """Then nothing is done, whoever changed it and whenever, and every reply says so."""
    router, other = backend.router(), backend.router()
    for key in backend.keys(prefix):
        for changes in (lambda key: other.set(key, "x"), lambda key: router.expire(key, 100)):
            router.set(key, 1)
            replies: list[Any] = []

            def body(key: str = key, change: Any = changes, replies: Any = replies) -> None:
                with transaction(router, f"{{{key}}}none", key) as t:
                    t.get(key)
                    change(key)
                    t.multi()
                    replies.extend([t.set(key, "lost"), t.incr(f"{{{key}}}n")])

            with pytest.raises(WatchError, match="nothing was done"):
                body()
            assert [type(reply.error) for reply in replies] == [WatchError] * 2
            assert router.get(key) != b"lost"
            assert router.exists(f"{{{key}}}n") == 0
        # The same connection, by now: nothing is watched any more.
        router.set(key, "y")
        with transaction(router, f"{{{key}}}none") as t:
            t.multi()
            t.set(key, "done")
        assert router.get(key) == b"done"


def test_commands_that_are_not_recorded(backend: Backend, prefix: str) -> None:
    """Whoever only looks at watched keys gets what is there, and no error."""
    router = backend.router()
    with transaction(router) as t:
        pass
    with transaction(router, prefix) as t:
        pass
    with transaction(router, prefix) as t:
        assert t.incr(prefix) == 1
        t.multi()
    with transaction(router, prefix) as t:
        assert t.get(prefix) == b"1"
        router.set(prefix, 2)
        assert t.get(prefix) == b"2"
    assert eventually(lambda: watching(backend) == 0)


@pytest.mark.parametrize("watches", [False, True])
def test_a_body_that_raises(backend: Backend, prefix: str, watches: bool) -> None:
    """Its error comes out, nothing was done, and the replies say so."""
    router = backend.router()
    replies: list[Any] = []

    def body() -> None:
        with transaction(router, *([prefix] if watches else [])) as t:
            if watches:
                t.multi()
            replies.append(t.set(prefix, 1))
            raise _Oops

    with pytest.raises(_Oops):
        body()
    assert router.get(prefix) is None
    assert isinstance(replies[0].error, UsageError)
    assert "nothing was sent" in str(replies[0].error)
    assert eventually(lambda: watching(backend) == 0)


def test_keys_of_a_transaction_are_on_one_node(backend: Backend, prefix: str) -> None:
    """Keys that are not are refused by name, and nothing is done."""
    router = backend.router()
    one, other = backend.keys(prefix)[:2]

    def watched() -> None:
        with transaction(router, one, other):
            raise AssertionError("begun")

    def recorded() -> None:
        with transaction(router) as t:
            t.set(one, 1)
            t.set(other, 1)

    def recorded_later() -> None:
        with transaction(router, one) as t:
            t.multi()
            t.set(one, 1)
            t.set(other, 1)

    def at_once() -> None:
        with transaction(router, one) as t:
            t.set(other, 1)

    for body in (watched, recorded, recorded_later, at_once):
        with pytest.raises(CrossNodeError, match=one):
            body()
    assert router.exists(one, other) == 0
    assert eventually(lambda: watching(backend) == 0)


@pytest.mark.parametrize("watches", [False, True])
def test_a_command_that_fails(backend: Backend, prefix: str, watches: bool) -> None:
    """The others are done, as a server has it, and `BatchError` has the replies of all."""
    router = backend.router()
    router.set(prefix, "text")

    def body() -> None:
        with transaction(router, *([prefix] if watches else [])) as t:
            if watches:
                with pytest.raises(ServerError, match="not an integer"):
                    t.incr(prefix)
                t.multi()
            t.rpush(f"{{{prefix}}}l", "x")
            t.incr(prefix)
            t.append(prefix, "!")

    with pytest.raises(BatchError, match=r"1 of 3 commands failed; .*not an integer") as failed:
        body()
    first, second, third = failed.value.replies
    assert (first.value, third.value) == (1, 5)
    assert isinstance(second.error, ServerError)
    assert router.get(prefix) == b"text!"


@pytest.mark.parametrize("watches", [False, True])
def test_what_no_server_knows(backend: Backend, prefix: str, watches: bool) -> None:
    """An unknown command, too few words or a command for no node: nothing is done at all."""
    router = backend.router()
    for wrong in (("NOSUCH", prefix), ("INCR",), ("DBSIZE",)):

        def body(wrong: Any = wrong) -> None:
            with transaction(router, *([prefix] if watches else [])) as t:
                if watches:
                    with pytest.raises(RedisHacksError):
                        t.execute_command(*wrong)
                    t.multi()
                t.set(prefix, 1)
                t.execute_command(*wrong)

        with pytest.raises(RedisHacksError):
            body()
    assert router.get(prefix) is None


def test_a_server_that_refuses(backend: Backend, prefix: str) -> None:
    """When it takes one of the commands not at all, none is done, and every reply says so."""
    router = backend.router()
    server = backend.servers[router_node(router, prefix)]
    replies: list[Any] = []

    def body() -> None:
        with transaction(router) as t:
            replies.extend([t.delete(prefix), t.set(prefix, "x")])

    router.set(prefix, "old")
    with server.client() as admin:
        admin.config_set("maxmemory", 1)
        try:
            with pytest.raises(RedisHacksError, match=r"OOM|maxmemory"):
                body()
        finally:
            admin.config_set("maxmemory", 0)
    assert [type(reply.error) for reply in replies] == [UnavailableError] * 2
    assert router.get(prefix) == b"old"


def router_node(router: Any, key: str) -> str:
    """Return the name of a key's node."""
    router.connect()
    name: str = router.node_for(key)
    return name


def test_transactions_in_a_batch(backend: Backend, prefix: str) -> None:
    """They go out with all else; their order among it is kept."""
    router = backend.router()
    keys = backend.keys(prefix)
    with router.map() as m:
        for key in keys:
            m.set(key, 1)
        replies = []
        for key in keys:
            with m.transaction() as t:
                replies += [t.incr(key), t.get(key)]
        after = [m.get(key) for key in keys]
        with m.transaction():
            pass
    assert [reply.value for reply in replies] == [2, b"2"] * len(keys)
    assert [reply.node for reply in replies[::2]] == [router.node_for(key) for key in keys]
    assert [reply.value for reply in after] == [b"2"] * len(keys)

    def watched() -> None:
        with router.map() as m, m.transaction(keys[0]):
            raise AssertionError("begun")

    with pytest.raises(UsageError, match="cannot be watched"):
        watched()


def test_a_transaction_in_a_batch_fails(backend: Backend, prefix: str) -> None:
    """One with keys apart is not done, one with a wrong command is; all else goes on."""
    router = backend.router()
    one, two, three = backend.keys(prefix)
    router.set(one, "text")
    kept: list[Any] = []

    def body(**options: Any) -> None:
        kept.clear()
        with router.map(**options) as m:
            with m.transaction() as t:
                kept.extend([t.append(one, "!"), t.incr(one)])
            with m.transaction() as t:
                kept.extend([t.incr(two), t.incr(three)])
            kept.append(m.incr(three))

    with pytest.raises(BatchError, match="3 of 5 commands failed") as failed:
        body()
    assert [type(reply.error) for reply in failed.value.replies] == [
        type(None), ServerError, CrossNodeError, CrossNodeError, type(None),
    ]  # fmt: skip
    assert (kept[0].value, kept[4].value) == (5, 1)
    body(on_error="return")
    assert (kept[0].value, kept[4].value) == (6, 2)
    assert router.exists(two) == 0

    def alone() -> None:
        with router.map() as m, m.transaction() as t:
            kept.extend([t.incr(one), t.incr(one)])

    kept.clear()
    with pytest.raises(BatchError, match="2 of 2"):
        alone()


def test_a_transaction_in_a_batch_is_given_up(backend: Backend, prefix: str) -> None:
    """When its body raises it is not part of the batch; when the batch's does, nothing is sent."""
    router = backend.router()
    kept: list[Any] = []

    def inner(m: Any) -> None:
        with m.transaction() as t:
            kept.append(t.set(prefix, "lost"))
            raise _Oops

    with router.map() as m:
        with pytest.raises(_Oops):
            inner(m)
        other = m.set(f"{prefix}2", 1)
    assert other.value is True

    def outer() -> None:
        with router.map() as m:
            with m.transaction() as t:
                kept.append(t.set(prefix, "lost"))
            raise _Oops

    with pytest.raises(_Oops):
        outer()
    assert [type(reply.error) for reply in kept] == [UsageError] * 2
    assert router.get(prefix) is None


def counted(backend: Backend, key: str, many: int, each: int) -> None:
    """Let many add to a number by WATCH, each so often; whoever is too late begins again."""
    if backend.colour.runner is None:

        def work(router: Any) -> None:
            done = 0
            while done < each:
                try:
                    with router.transaction(key) as t:
                        number = int(t.get(key) or 0)
                        t.multi()
                        t.set(key, number + 1)
                    done += 1
                except WatchError:
                    pass

        router = backend.router()
        threads = [threading.Thread(target=work, args=(router,)) for _ in range(many)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return

    async def task(router: Any) -> None:
        done = 0
        while done < each:
            try:
                async with router.transaction(key) as t:
                    number = int(await t.get(key) or 0)
                    t.multi()
                    t.set(key, number + 1)
                done += 1
            except WatchError:
                pass

    async def main() -> None:
        router = backend.router().target
        await asyncio.gather(*(task(router) for _ in range(many)))

    backend.colour.run(main())


def test_no_update_is_lost(backend: Backend, prefix: str) -> None:
    """Of many threads or tasks that read, add and write, each one's addition is in the sum."""
    counted(backend, prefix, 8, 10)
    assert backend.router().get(prefix) == b"80"
    assert watching(backend) == 0


def test_connections_are_used_again(backend: Backend, prefix: str) -> None:
    """Hundreds of transactions and waits, of all endings, leave a handful of connections."""
    router = backend.router()
    name = router_node(router, prefix)
    other = backend.router()
    before = len(connections(backend.servers[name]))

    def changed() -> None:
        with transaction(router, prefix) as t:
            other.incr(prefix)
            t.multi()
            t.incr(prefix)

    def raised() -> None:
        with transaction(router, prefix) as t:
            t.incr(prefix)
            raise _Oops

    for _ in range(12):
        with pytest.raises(WatchError):
            changed()
        with pytest.raises(_Oops):
            raised()
        with transaction(router, prefix) as t:
            t.get(prefix)
        with transaction(router, prefix) as t:
            t.multi()
            t.incr(prefix)
        assert router.blpop(f"{{{prefix}}}none", timeout=0.001) is None
    assert eventually(lambda: len(connections(backend.servers[name])) <= before + 4)
    assert watching(backend) == 0


def test_words_that_would_change_a_shared_connection(backend: Backend, prefix: str) -> None:
    """WATCH, MULTI, SELECT, SUBSCRIBE, CLIENT SETNAME and the like are refused, wherever said."""
    router = backend.router()
    fanout = router.fanout()
    if backend.colour.runner is not None:
        fanout = Face(fanout, backend.colour.runner)
    words = [
        ("WATCH", prefix), ("UNWATCH",), ("MULTI",), ("EXEC",), ("DISCARD",), ("SELECT", 1),
        ("SUBSCRIBE", "x"), ("SSUBSCRIBE", prefix), ("PSUBSCRIBE", "x"), ("MONITOR",),
        ("CLIENT", "SETNAME", "x"), ("CLIENT REPLY", "OFF"), ("client", "tracking", "on"),
        ("HELLO", 3), ("RESET",), ("QUIT",), ("AUTH", "x"),
    ]  # fmt: skip
    for each in words:
        for say in (router.execute_command, fanout.execute_command):
            with pytest.raises(UsageError):
                say(*each)
        with router.map() as m, pytest.raises(UsageError):
            m.execute_command(*each)
        with transaction(router, prefix) as t, pytest.raises(UsageError):
            t.execute_command(*each)
    assert router.set(prefix, 1) is True
    assert router.get(prefix) == b"1"


# Connections that are lost, nodes that do not answer


@pytest.fixture
def behind(colour: Routers) -> Iterator[tuple[Any, FaultProxy, Server]]:
    """A router with a short deadline, whose node `b` is behind a proxy."""
    with nodes("a", "b") as made, FaultProxy(made.servers["b"]) as proxy:
        given = {"a": made.servers["a"].url, "b": proxy.url}
        router = colour.router(given, deadline=0.5)
        router.connect()
        yield router, proxy, made.servers["b"]


def of_b(router: Any, prefix: str) -> str:
    """Return a key of node `b`."""
    (key,) = spread(router, prefix, ["b"])
    return key


@pytest.mark.parametrize("watches", [False, True])
def test_the_reply_to_exec_is_lost(
    behind: tuple[Any, FaultProxy, Server], prefix: str, watches: bool
) -> None:
    """Then nobody knows: it is said so, for each reply, and nothing is said twice."""
    router, proxy, server = behind
    key = of_b(router, prefix)
    router.set(key, 0)
    replies: list[Any] = []

    def body() -> None:
        with transaction(router, *([key] if watches else [])) as t:
            if watches:
                t.multi()
            replies.extend([t.incr(key), t.incr(key)])

    proxy.drop_reply(of="EXEC")
    with pytest.raises(MaybeAppliedError):
        body()
    assert proxy.armed == 0
    assert [reply.maybe_applied for reply in replies] == [True, True]
    with server.client() as client:
        assert client.get(key) == b"2"
    proxy.drop_request(of="EXEC")
    with pytest.raises((MaybeAppliedError, UnavailableError)):
        body()
    assert proxy.armed == 0
    with server.client() as client:
        assert client.get(key) == b"2"
    body()
    assert router.get(key) == b"4"


def test_a_connection_is_lost_before_exec(
    behind: tuple[Any, FaultProxy, Server], prefix: str
) -> None:
    """What was not sent was not done, and that is said; in the middle of a body or at its end."""
    router, proxy, server = behind
    key = of_b(router, prefix)

    def at_the_end() -> None:
        with transaction(router, key) as t:
            t.get(key)
            t.multi()
            t.set(key, "x")
            proxy.cut()
            assert eventually(lambda: not own(server))

    def own(server: Server) -> bool:
        return any(int(each["watch"]) for each in connections(server))

    def in_the_middle() -> None:
        with transaction(router, key) as t:
            proxy.cut()
            assert eventually(lambda: not own(server))
            t.set(key, "x")

    for body in (at_the_end, in_the_middle):
        with pytest.raises(UnavailableError):
            body()
        with server.client() as client:
            assert client.get(key) is None
    assert router.get(key) is None


@pytest.mark.parametrize("when", ["before", "body", "exec", "at once"])
def test_a_node_hangs_in_a_transaction(
    behind: tuple[Any, FaultProxy, Server], prefix: str, when: str
) -> None:
    """It costs a deadline, wherever it is; others go on, and it is back when it answers again."""
    router, proxy, _ = behind
    key = of_b(router, prefix)
    (well,) = spread(router, prefix, ["a"])
    router.set(key, 1)

    def body() -> None:
        if when == "before":
            proxy.stall()
        with transaction(router, key) as t:
            if when == "body":
                proxy.stall()
            assert t.get(key) == b"1"
            t.multi()
            t.set(key, "x")
            if when == "exec":
                proxy.stall()

    def at_once() -> None:
        proxy.stall()
        with transaction(router) as t:
            t.set(key, "x")

    began = time.monotonic()
    with pytest.raises((UnavailableError, MaybeAppliedError)):
        at_once() if when == "at once" else body()
    assert time.monotonic() - began < 2 * 0.5 + LENIENCE
    with transaction(router, well) as t:
        t.multi()
        t.set(well, 1)
    proxy.cut()
    proxy.heal()

    def back() -> bool:
        try:
            with transaction(router, key) as t:
                return bool(t.get(key) == b"1")
        except RedisHacksError:
            return False

    assert eventually(back)


def test_a_hung_node_is_known_to_conversations(
    behind: tuple[Any, FaultProxy, Server], prefix: str
) -> None:
    """After a few deadlines a transaction or a wait on it fails at once, as any command does."""
    router, proxy, _ = behind
    key = of_b(router, prefix)
    router.set(key, 1)
    proxy.stall()

    def begin() -> None:
        with transaction(router, key):
            raise AssertionError("begun")

    def quickest(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(8):
            began = time.monotonic()
            with pytest.raises((UnavailableError, MaybeAppliedError)):
                call()
            seconds.append(time.monotonic() - began)
        return min(seconds)

    assert quickest(begin) < 0.05
    assert quickest(lambda: router.blpop(key, timeout=0.01)) < 0.05


# Commands that wait


class Wait(NamedTuple):
    """A command that waits: how it is said, how it is ended, and what that comes to."""

    name: str
    #: With a router, a key and seconds; 0 is for ever.
    say: Callable[[Any, str, float], Any]
    end: Callable[[Any, str], Any]
    comes_to: Callable[[str], Any]
    before: Callable[[Any, str], Any] = lambda r, key: None


def stream(r: Any, key: str) -> None:
    """Have a group of readers of a stream, which has something that is not to be read."""
    r.xadd(key, {"f": "old"}, id="1-1")
    r.xgroup_create(key, "BLOCK", id="$")


WAITS = [
    Wait("BLPOP", lambda r, key, s: r.blpop([f"{{{key}}}2", key], timeout=s),
         lambda r, key: r.rpush(key, "x", "y"), lambda key: (key.encode(), b"x")),
    Wait("BRPOP", lambda r, key, s: r.brpop([key], timeout=s),
         lambda r, key: r.rpush(key, "x", "y"), lambda key: (key.encode(), b"y")),
    Wait("BLMOVE", lambda r, key, s: r.blmove(key, f"{{{key}}}to", s),
         lambda r, key: r.rpush(key, "x"), lambda key: b"x"),
    Wait("BRPOPLPUSH", lambda r, key, s: r.brpoplpush(key, f"{{{key}}}to", s),
         lambda r, key: r.rpush(key, "x"), lambda key: b"x"),
    Wait("BZPOPMIN", lambda r, key, s: r.bzpopmin(key, s),
         lambda r, key: r.zadd(key, {"a": 1, "b": 2}), lambda key: (key.encode(), b"a", 1.0)),
    Wait("BZPOPMAX", lambda r, key, s: r.bzpopmax(key, s),
         lambda r, key: r.zadd(key, {"a": 1, "b": 2}), lambda key: (key.encode(), b"b", 2.0)),
    Wait("BLMPOP", lambda r, key, s: r.blmpop(s, 2, key, f"{{{key}}}2", direction="LEFT", count=2),
         lambda r, key: r.rpush(key, "x", "y", "z"), lambda key: [key.encode(), [b"x", b"y"]]),
    Wait("BZMPOP", lambda r, key, s: r.bzmpop(s, 1, [key], min=True),
         lambda r, key: r.zadd(key, {"a": 1}), lambda key: [key.encode(), [[b"a", b"1"]]]),
    Wait("XREAD", lambda r, key, s: r.xread({key: "$"}, block=round(s * 1000)),
         lambda r, key: r.xadd(key, {"f": "v"}, id="2-1"),
         lambda key: [[key.encode(), [(b"2-1", {b"f": b"v"})]]], stream),
    Wait("XREAD none", lambda r, key, s: r.xread({key: "$"}, block=round(s * 1000), count=1),
         lambda r, key: r.xadd(key, {"f": "v"}, id="2-1"),
         lambda key: [[key.encode(), [(b"2-1", {b"f": b"v"})]]]),
    Wait("XREADGROUP",
         lambda r, key, s: r.xreadgroup("BLOCK", "STREAMS", {key: ">"}, block=round(s * 1000)),
         lambda r, key: r.xadd(key, {"f": "v"}, id="2-1"),
         lambda key: [[key.encode(), [(b"2-1", {b"f": b"v"})]]], stream),
]  # fmt: skip


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every wait be made of many words."""
    monkeypatch.setattr(_blocking, "_SLICE", 0.03)


@pytest.fixture(params=WAITS, ids=lambda wait: wait.name)
def wait(request: pytest.FixtureRequest) -> Wait:
    """One sort of commands that wait."""
    made: Wait = request.param
    return made


def ended_by(server: Server, call: Callable[[Any], Any], after: int = 3) -> threading.Thread:
    """Call a function with a client once somebody waits there, and was seen to so often."""

    def work() -> None:
        with server.client() as client:
            seen = set()

            def begun() -> bool:
                for each in client.client_list():
                    if "b" in each["flags"]:
                        seen.add(each["tot-cmds"])
                return len(seen) >= after

            eventually(begun)
            call(client)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("wait", WAITS[:8], ids=lambda wait: wait.name)
def test_a_wait_for_what_is_there(backend: Backend, prefix: str, wait: Wait) -> None:
    """It is returned at once, and is the value that redis-py would return."""
    router = backend.router()
    for key in backend.keys(prefix):
        wait.end(router, key)
        assert wait.say(router, key, 5) == wait.comes_to(key)


@pytest.mark.usefixtures("short")
def test_a_wait_in_vain(backend: Backend, prefix: str, wait: Wait) -> None:
    """It ends when its time is over, no sooner and not much later."""
    router = backend.router()
    for key in backend.keys(prefix)[:1]:
        wait.before(router, key)
        began = time.monotonic()
        assert not wait.say(router, key, 0.1)
        assert 0.09 < time.monotonic() - began < 0.1 + LENIENCE


@pytest.mark.usefixtures("short")
def test_a_wait_that_is_ended(backend: Backend, prefix: str, wait: Wait) -> None:
    """For ever or longer than anybody would: it ends as soon as there is something, once."""
    router = backend.router()
    key = backend.keys(prefix)[0]
    server = backend.servers[router_node(router, key)]
    for seconds in (0, 60):
        router.delete(key)
        wait.before(router, key)
        thread = ended_by(server, lambda client: wait.end(client, key))
        try:
            found = wait.say(router, key, seconds)
        finally:
            thread.join()
        assert found == wait.comes_to(key)
    assert blocked(server) == 0


def test_a_wait_of_its_usual_length(backend: Backend, prefix: str) -> None:
    """A wait is woken up in the middle of a word, not when that is over."""
    router = backend.router()
    server = backend.servers[router_node(router, prefix)]
    thread = ended_by(server, lambda client: client.rpush(prefix, "x"), after=1)
    began = time.monotonic()
    assert router.blpop(prefix) == (prefix.encode(), b"x")
    assert time.monotonic() - began < 0.9
    thread.join()


@pytest.mark.usefixtures("short")
def test_what_comes_between_two_words(
    backend: Backend, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`$` is the end of the stream when the wait began: what came while nobody looked is read."""
    router = backend.router()
    server = backend.servers[router_node(router, prefix)]
    original, said = _blocking._Wait.slice, []

    def slice(wait: Any, left: float | None) -> Any:
        said.append(left)
        if len(said) == 3:
            with server.client() as client:
                client.xadd(prefix, {"n": 1}, id="2-1")
                client.xadd(prefix, {"n": 2}, id="2-2")
        return original(wait, left)

    monkeypatch.setattr(_blocking._Wait, "slice", slice)
    router.xadd(prefix, {"n": 0}, id="1-1")
    ((_, entries),) = router.xread({prefix: "$"}, block=5000)
    assert [id for id, _ in entries] == [b"2-1", b"2-2"]
    assert len(said) == 3


def test_timeouts_that_cannot_be(backend: Backend, prefix: str) -> None:
    """A timeout that is negative or no number is refused, and keys apart are as well."""
    router = backend.router()
    one, other = backend.keys(prefix)[:2]
    for wrong in (-1, "x", "nan"):
        with pytest.raises(UsageError, match="timeout"):
            router.blpop(one, timeout=wrong)
        with pytest.raises(UsageError, match="timeout"):
            router.execute_command("XREAD", "BLOCK", wrong, "STREAMS", one, "$")
    with pytest.raises(CrossNodeError, match=one):
        router.blpop([one, other], timeout=1)
    router.set(one, "text")
    with pytest.raises(ServerError, match="WRONGTYPE"):
        router.blpop(one, timeout=1)
    with pytest.raises(UsageError):
        router.execute_command("BLPOP")


def test_waits_in_a_batch(backend: Backend, prefix: str) -> None:
    """A batch does not wait: it would keep all others from their replies."""
    router = backend.router()
    with router.map(on_error="return") as m:
        replies = [m.blpop(prefix, timeout=0), m.xread({prefix: "$"}, block=0)]
        well = m.set(f"{prefix}2", 1)
    assert [type(reply.error) for reply in replies] == [UsageError] * 2
    assert well.value is True
    with transaction(router) as t:
        reply = t.blpop(prefix, timeout=0)  # a server does not wait within MULTI
    assert reply.value is None


def waiters(
    backend: Backend, key: str, many: int, enough: Callable[[list[Any]], bool]
) -> list[Any]:
    """Let many pop, for a moment at a time, until that is enough; return what they got."""
    found: list[Any] = []
    router = backend.router()
    if backend.colour.runner is None:

        def work() -> None:
            while not enough(found):
                got = router.blpop(key, timeout=0.05)
                if got is not None:
                    found.append(got[1])

        threads = [threading.Thread(target=work) for _ in range(many)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    async def task() -> None:
        while not enough(found):
            got = await router.target.blpop(key, timeout=0.05)
            if got is not None:
                found.append(got[1])

    async def main() -> None:
        await asyncio.gather(*(task() for _ in range(many)))

    backend.colour.run(main())
    return found


def test_each_element_is_popped_once(
    backend: Backend, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many waiters whose words end all the time lose nothing, and get nothing twice."""
    monkeypatch.setattr(_blocking, "_SLICE", 0.002)
    total = 300

    def push() -> None:
        sync = Routers("sync")
        router = Backend(backend.place, sync).router()
        for n in range(total):
            router.rpush(prefix, n)
        sync.close()

    thread = threading.Thread(target=push)
    thread.start()
    end = time.monotonic() + PATIENT
    found = waiters(backend, prefix, 4, lambda found: len(found) >= total or time.monotonic() > end)
    thread.join()
    assert sorted(map(int, found)) == list(range(total))


def test_a_task_that_waits_is_cancelled(place: Place, prefix: str) -> None:
    """Its connection is ended, what comes later is there for others, and the router goes on."""
    colour = Routers("async")
    try:
        backend = Backend(place, colour)
        router = backend.router().target
        server = backend.servers[router_node(backend.router(), prefix)]

        async def main() -> None:
            await router.ping()
            for _ in range(20):
                tasks = [asyncio.create_task(router.blpop(prefix)) for _ in range(3)]
                await asyncio.to_thread(eventually, lambda: blocked(server) == 3)
                for task in tasks:
                    task.cancel()
                for task in tasks:
                    with pytest.raises(asyncio.CancelledError):
                        await task
                assert await router.rpush(prefix, "x") == 1
                assert await router.lpop(prefix) == b"x"
            await asyncio.to_thread(eventually, lambda: blocked(server) == 0)
            assert len(connections(server)) < 12

        colour.run(main())
    finally:
        colour.close()


def test_a_wait_whose_node_is_gone(behind: tuple[Any, FaultProxy, Server], prefix: str) -> None:
    """It ends with an error, not for ever; when it is back, so is waiting."""
    router, proxy, server = behind
    key = of_b(router, prefix)
    for fault, seconds in ((proxy.cut, 0.5), (proxy.stall, 2.5)):
        begun = threading.Event()

        def break_it(client: Any, fault: Any = fault, begun: Any = begun) -> None:
            fault()
            begun.set()

        thread = ended_by(server, break_it, after=1)
        began = time.monotonic()
        with pytest.raises((MaybeAppliedError, UnavailableError)):
            router.blpop(key)
        assert time.monotonic() - began < seconds + 2 * LENIENCE
        thread.join()
        proxy.cut()
        proxy.heal()
        assert eventually(lambda: answers(router.rpush, key, "x"))
        assert router.blpop(key) == (key.encode(), b"x")
        assert eventually(lambda: blocked(server) == 0)


def answers(call: Callable[..., Any], *args: Any) -> Any:
    """Return what a call comes to, and nothing while that is an error."""
    try:
        return call(*args)
    except RedisHacksError:
        return None


# While keys move


@pytest.fixture
def three() -> Iterator[Place]:
    """Three nodes, of which two are used."""
    with nodes("a", "b", "c") as made:
        given = made.nodes()
        with closing(Router({name: given[name] for name in "ab"})) as router:
            router.connect()
        yield made


def to_move(router: Router, plan: Any, prefix: str) -> str:
    """Return a key that is to move."""
    numbers = (f"{prefix}:{n}" for n in range(1000))
    return next(key for key in numbers if plan.new.node_for(key.encode()) != router.node_for(key))


def halted(mover: Router, plan: Any, state: str) -> None:
    """Begin a move and stop in the middle of it."""

    def stop(progress: Any) -> None:
        if progress.state == state:
            raise _Oops

    with pytest.raises(_Oops):
        mover.reshard(plan, on_progress=stop, drain=0.05)


@pytest.mark.parametrize("slice", [1.0, 0.05])
def test_a_wait_whose_key_moves(
    colour: Routers, three: Place, prefix: str, slice: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on on the new node, and what is pushed there ends it."""
    monkeypatch.setattr(_blocking, "_SLICE", slice)
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        plan = mover.plan(list("abc"))
        key = to_move(mover, plan, prefix)
        old = mover.node_for(key)
        waiting = colour.router(three.nodes())
        waiting.connect()
        failed: list[Any] = []

        def move(client: Any) -> None:
            try:
                mover.reshard(plan)
                mover.rpush(key, "x")
            except Exception as error:
                failed.append(error)

        thread = ended_by(three.servers[old], move, after=1)
        found = waiting.blpop(key, timeout=30)
        thread.join()
        assert failed == []
        assert found == (key.encode(), b"x")
        assert mover.node_for(key) == "c" != old
        assert waiting.llen(key) == 0


def test_a_transaction_while_keys_move(colour: Routers, three: Place, prefix: str) -> None:
    """All keys that it names are where it is said, watched or not: nothing is lost by the move."""
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        plan = mover.plan(list("abc"))
        key = to_move(mover, plan, prefix)
        names = [f"{{{key}}}{n}" for n in range(6)]
        mover.mset(dict.fromkeys([key, *names], 10))
        router = colour.router(three.nodes())
        router.connect()
        halted(mover, plan, "transit")
        with transaction(router, key) as t:
            assert t.incr(names[0]) == 11
            assert t.get(names[1]) == b"10"
            t.multi()
            replies = [t.incr(key), t.incr(names[2]), t.mget(names[3], names[0])]
        assert [reply.value for reply in replies] == [11, 11, [b"10", b"11"]]
        with transaction(router) as t:
            reply = t.incr(names[4])
        assert reply.value == 11
        with router.map() as m, m.transaction() as t:
            reply = t.incr(names[5])
        assert reply.value == 11
        mover.reshard(None)
        assert mover.mget([key, *names]) == [b"11", b"11", b"10", b"11", b"10", b"11", b"11"]
        assert router.node_for(key) == "c"


def test_a_transaction_that_a_move_overtakes(colour: Routers, three: Place, prefix: str) -> None:
    """It was begun on the old node and is not done there any more: that is said, none is lost."""
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        plan = mover.plan(list("abc"))
        key = to_move(mover, plan, prefix)
        mover.set(key, 1)
        router = colour.router(three.nodes())

        def body() -> None:
            with transaction(router, key) as t:
                assert t.get(key) == b"1"
                mover.reshard(plan, drain=0.05)
                t.multi()
                t.set(key, "lost")

        with pytest.raises(UnavailableError):
            body()
        assert mover.get(key) == router.get(key) == b"1"
        with transaction(router, key) as t:
            t.multi()
            t.incr(key)
        assert mover.get(key) == b"2"


def test_waits_while_keys_are_in_transit(
    colour: Routers, three: Place, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is waited for is pulled to the new node first, also a stream with its group."""
    monkeypatch.setattr(_blocking, "_SLICE", 0.05)
    with closing(Router(three.nodes(), deadline=PATIENT)) as mover:
        plan = mover.plan(list("abc"))
        key = to_move(mover, plan, prefix)
        mover.rpush(f"{{{key}}}l", "x", "y")
        stream(mover, f"{{{key}}}x")
        mover.xadd(f"{{{key}}}x", {"f": "v"}, id="2-1")
        router = colour.router(three.nodes())
        router.connect()
        halted(mover, plan, "transit")
        assert router.blpop(f"{{{key}}}l", timeout=1) == (f"{{{key}}}l".encode(), b"x")
        got = router.xreadgroup("BLOCK", "me", {f"{{{key}}}x": ">"}, block=1000)
        assert got == [[f"{{{key}}}x".encode(), [(b"2-1", {b"f": b"v"})]]]
        assert router.blpop(f"{{{key}}}none", timeout=0.1) is None
        mover.reshard(None)
        assert mover.lrange(f"{{{key}}}l", 0, -1) == [b"y"]
        assert mover.xpending(f"{{{key}}}x", "BLOCK")["pending"] == 1


def test_a_slot_of_a_cluster_moves(colour: Routers, prefix: str) -> None:
    """Whoever waits or watches while it does is not kept for ever, and is served after it."""
    with valkey_cluster() as cluster:
        router = Backend(clustered(cluster), colour).router(deadline=0.5)
        router.connect()
        key = f"{{{prefix}}}"
        slot = router.slot(key)
        source = cluster.node_of(slot)
        target = next(n for n, node in enumerate(cluster.nodes) if node is not source)
        cluster.begin_migration(slot, target)

        def body() -> None:
            with transaction(router, f"{key}none"):
                raise AssertionError("begun")

        began = time.monotonic()
        with pytest.raises(UnavailableError):
            body()
        try:
            assert router.blpop(f"{key}none", timeout=0.2) is None
        except UnavailableError:
            pass
        assert time.monotonic() - began < 3 * 0.5 + LENIENCE


# Scripts

COUNT = "return {redis.call('INCRBY', KEYS[1], ARGV[1]), KEYS[#KEYS], ARGV[#ARGV]}"


def times(backend: Backend, word: str) -> int:
    """Return how often the servers were told a word."""
    total = 0
    for server in backend.servers.values():
        with server.client() as client:
            total += client.info("commandstats").get(f"cmdstat_{word}", {"calls": 0})["calls"]
    return total


def test_scripts(backend: Backend, prefix: str) -> None:
    """Each goes to the node of its keys, by its hash, and whole to nodes that do not know it."""
    router = backend.router()
    script = router.register_script(COUNT + f" -- {prefix}")
    run = backend.colour.run
    keys = backend.keys(prefix)
    before = times(backend, "eval")
    for n in range(1, 4):
        for key in keys:
            tagged = f"{{{key}}}"
            found = run(script(keys=[tagged, f"{tagged}2"], args=[2, "é"]))
            assert found == [2 * n, f"{tagged}2".encode(), "é".encode()]
    assert times(backend, "eval") - before == len(keys)
    for server in backend.servers.values():
        with server.client() as client:
            assert client.script_exists(script.sha) == [True]
            client.script_flush()
    assert [run(script(keys=[f"{{{key}}}"], args=[1]))[0] for key in keys] == [7] * len(keys)
    assert times(backend, "eval") - before == 2 * len(keys)
    for server in backend.servers.values():
        with server.client() as client:
            client.script_flush()
    with router.map() as m:
        replies = [script(keys=[f"{{{key}}}"], args=[n], client=m) for n in (1, 2) for key in keys]
        others = [m.get(f"{{{key}}}") for key in keys]
    assert [reply.value[0] for reply in replies] == [8, 8, 8, 10, 10, 10]
    assert [reply.value for reply in others] == [b"10"] * 3
    assert [reply.node for reply in replies[:3]] == [router.node_for(key) for key in keys]


def test_scripts_that_cannot_be(backend: Backend, prefix: str) -> None:
    """Without keys it is for no node, with keys apart for none either; its errors are its own."""
    router = backend.router()
    script = router.register_script(COUNT.encode())
    run = backend.colour.run
    one, other = backend.keys(prefix)[:2]
    with pytest.raises(UsageError, match="without keys"):
        run(script(args=[1]))
    with pytest.raises(CrossNodeError, match=one):
        run(script(keys=[one, other], args=[1]))
    with pytest.raises(ServerError, match="not an integer"):
        run(script(keys=[one], args=["x"]))
    with pytest.raises(UsageError, match="bytes, str, int or float"):
        run(script(keys=[one], args=[None]))
    with router.map(on_error="return") as m:
        with pytest.raises(UsageError, match="without keys"):
            script(client=m)
        replies = [
            script(keys=[one, other], args=[1], client=m),
            script(keys=[one], args=["x"], client=m),
            script(keys=[one], args=[3], client=m),
        ]
    assert [type(reply.error) for reply in replies] == [CrossNodeError, ServerError, type(None)]
    assert replies[2].value[0] == 3
    assert router.exists(one, other) == 1
    broken = router.register_script("nonsense")
    with pytest.raises(ServerError, match="compil"):
        run(broken(keys=[one]))


def test_scripts_in_a_transaction(backend: Backend, prefix: str) -> None:
    """Recorded or said at once, known to the server or not, it is done once."""
    router = backend.router()
    script = router.register_script(COUNT + f" -- transaction {prefix}")
    with transaction(router) as t:
        reply = script(keys=[prefix], args=[1], client=t)
    assert reply.value[0] == 1
    with transaction(router, f"{{{prefix}}}other") as t:
        assert script(keys=[prefix], args=[1], client=t)[0] == 2
        t.multi()
        reply = script(keys=[prefix], args=[1], client=t)
    assert reply.value[0] == 3
    with router.map() as m, m.transaction() as t:
        reply = script(keys=[prefix], args=[1], client=t)
    assert reply.value[0] == 4


def test_text_of_scripts(backend: Backend, prefix: str) -> None:
    """With decode_responses what a script returns is text."""
    router = backend.router(decode_responses=True)
    script = router.register_script("return {KEYS[1], ARGV[1], 7, false}")
    assert backend.colour.run(script(keys=[prefix], args=["é"])) == [prefix, "é", 7, None]
