"""Batches of a router: what each command comes to, in which order, and when nodes fail."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redishacks.errors import (
    MaybeAppliedError,
    PartlyAppliedError,
    RedisHacksError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.router import BatchError, client
from redishacks.testing import FaultProxy, Server
from tests.helpers import eventually
from tests.router_kit import (
    LENIENCE,
    Backend,
    Place,
    Routers,
    clustered,
    kind,
    nodes,
    shown,
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


def said(backend: Backend) -> dict[str, dict[str, int]]:
    """Return how often each server was told which command, since it was asked to forget."""
    counts = {}
    for name, server in backend.servers.items():
        with server.client() as client:
            stats = client.info("commandstats")
            client.config_resetstat()
        counts[name] = {
            word.removeprefix("cmdstat_"): found["calls"]
            for word, found in stats.items()
            if word.removeprefix("cmdstat_") in ("get", "set", "mget", "mset", "exists", "incrby")
        }
    return counts


# What is said


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("protocol", [2, 3])
def test_values_are_those_of_single_calls(
    backend: Backend, prefix: str, protocol: int, decode: bool
) -> None:
    """Each reply has the value and type that the call alone would have come to, and its node."""
    router = backend.router(protocol=protocol, decode_responses=decode)
    for key in backend.keys(prefix, each=2):
        tagged = f"{{{key}}}"
        router.hset(tagged + "h", mapping={"f": 1, "g": "é"})
        router.zadd(tagged + "z", {"m": 1.5})
        router.rpush(tagged + "l", "x")
        router.set(tagged + "s", "é")

        def calls(r: Any, tagged: str = tagged) -> list[Any]:
            return [
                r.get(tagged + "s"), r.get(tagged + "none"), r.hgetall(tagged + "h"),
                r.zrange(tagged + "z", 0, -1, withscores=True), r.lrange(tagged + "l", 0, -1),
                r.ttl(tagged + "s"), r.type(tagged + "z"), r.mget(tagged + "s", tagged + "none"),
                r.smembers(tagged + "none"), r.set(tagged + "s", "é", get=True),
                r.eval("return {KEYS[1], ARGV[1]}", 1, tagged + "s", 5),
                r.hget(tagged + "h", "g"), r.execute_command("OBJECT", "ENCODING", tagged + "l"),
            ]  # fmt: skip

        with router.map() as m:
            replies = calls(m)
        alone = calls(router)
        assert [reply.value for reply in replies] == alone
        assert [kind(reply.value) for reply in replies] == [kind(value) for value in alone]
        assert {reply.node for reply in replies} == {router.node_for(key)}
        assert {reply.error for reply in replies} == {None}
        assert not any(reply.maybe_applied for reply in replies)


def test_a_batch_over_all_nodes(backend: Backend, prefix: str) -> None:
    """Thousands of commands, of a few bytes and of a megabyte, each with its own reply."""
    router = backend.router()
    big = b"x" * 1_000_000
    with router.map() as m:
        written = [m.set(f"{prefix}:{n}", n) for n in range(3000)]
        written += [m.set(f"{prefix}:big", big), m.set(f"{prefix}:empty", "")]
        assert len(m) == 3002
    assert [reply.value for reply in written] == [True] * 3002
    with router.map() as m:
        read = [m.get(f"{prefix}:{n}") for n in range(3001)]
        large = m.get(f"{prefix}:big"), m.get(f"{prefix}:empty")
    assert [reply.value for reply in read] == [b"%d" % n for n in range(3000)] + [None]
    assert [reply.value for reply in large] == [big, b""]
    assert {reply.node for reply in read} == set(backend.servers)


def test_an_empty_batch(backend: Backend) -> None:
    """Nothing to say is no error."""
    with backend.router().map() as m:
        pass
    assert len(m) == 0


def test_nothing_is_sent_before_the_end(backend: Backend, prefix: str) -> None:
    """Inside the block a reply has no value and no error yet: to ask is a mistake."""
    router = backend.router()
    with router.map() as m:
        reply = m.set(prefix, 1)
        for look in ("value", "error", "maybe_applied"):
            with pytest.raises(UsageError, match="when its block is left"):
                getattr(reply, look)
        assert "not sent" in repr(reply)
        assert router.get(prefix) is None
    assert reply.value is True
    assert router.get(prefix) == b"1"
    assert repr(reply) == "<Reply True>"
    assert reply.node == router.node_for(prefix)
    for call in (m.get, m.incr):
        with pytest.raises(UsageError, match="sent already"):
            call(prefix)


class _Oops(Exception):
    """What only these tests raise."""


def test_a_body_that_raises(backend: Backend, prefix: str) -> None:
    """Its error comes out, nothing was sent, and the replies say so."""
    router = backend.router()
    replies: list[Any] = []

    def body() -> None:
        with router.map() as m:
            replies.extend([m.set(prefix, 1), m.get(prefix)])
            raise _Oops

    with pytest.raises(_Oops):
        body()
    assert router.get(prefix) is None
    for reply in replies:
        assert isinstance(reply.error, UsageError)
        assert not reply.maybe_applied
        assert reply.node == ""
        with pytest.raises(UsageError, match="nothing was sent"):
            assert reply.value


def test_an_error_is_one_of_many(backend: Backend, prefix: str) -> None:
    """One command's error leaves all others their values; `BatchError` has every reply."""
    router = backend.router()
    keys = backend.keys(prefix)
    router.rpush(keys[0], "list")

    def fill(m: Any) -> list[Any]:
        return [
            m.incr(keys[0]), m.incr(keys[1]), m.get(keys[0]), m.get(keys[2]),
            m.sunion(keys[0], keys[1]), m.execute_command("NOSUCH", keys[0]), m.incr(keys[2]),
        ]  # fmt: skip

    with router.map(on_error="return") as m:
        replies = fill(m)
    errors = [type(reply.error) for reply in replies]
    none = type(None)
    assert errors[:4] == [ServerError, none, ServerError, none]
    assert errors[6] is none
    assert all(issubclass(error, UsageError) for error in errors[4:6])
    assert (replies[1].value, replies[3].value, replies[6].value) == (1, None, 1)
    assert [reply.node for reply in replies if not isinstance(reply.error, UsageError)] == [
        router.node_for(key) for key in (keys[0], keys[1], keys[0], keys[2], keys[2])
    ]
    assert replies[5].node == ""
    with pytest.raises(ServerError, match="WRONGTYPE"):
        assert replies[0].value
    assert replies[0].error.code == "WRONGTYPE"
    assert "WRONGTYPE" in repr(replies[0])
    again: list[Any] = []

    def body() -> None:
        with router.map() as m:
            again.extend(fill(m))

    with pytest.raises(BatchError, match=r"4 of 7 commands failed; .*WRONGTYPE") as e:
        body()
    assert [reply.error and str(reply.error) for reply in e.value.replies] == [
        reply.error and str(reply.error) for reply in replies
    ]
    assert again[1].value == e.value.replies[1].value == 2


def test_what_cannot_be_encoded(backend: Backend, prefix: str) -> None:
    """Is refused where it is said, and the body goes on if it likes."""
    router = backend.router()
    with router.map() as m:
        for wrong in (None, True, object(), "\ud800"):
            with pytest.raises(UsageError):
                m.get(wrong)
            with pytest.raises(UsageError):
                m.set(prefix, wrong)
        number = m.get(7.5), m.get(memoryview(prefix.encode())), m.incr(prefix)
    assert [reply.value for reply in number] == [None, None, 1]


def test_options_of_a_batch(backend: Backend) -> None:
    """Only two words for errors, and a deadline above 0."""
    router = backend.router()
    for wrong in ({"on_error": "ignore"}, {"on_error": None}, {"deadline": 0}, {"deadline": "x"}):

        def body(wrong: Any = wrong) -> None:
            with router.map(**wrong):
                raise AssertionError("begun")

        with pytest.raises(UsageError):
            body()


def test_batches_within_batches(backend: Backend, prefix: str) -> None:
    """Two that are open at the same time know nothing of each other."""
    router = backend.router()
    with router.map() as outer:
        first = outer.incr(prefix)
        with router.map() as inner:
            second = inner.incr(prefix)
        assert second.value == 1
    assert first.value == 2


def test_the_order_of_one_key(backend: Backend, prefix: str) -> None:
    """Commands for one key are done in their order, merged or not, whatever is in between."""
    router = backend.router()
    keys = backend.keys(prefix, each=2)
    with router.map(on_error="return") as m:
        replies = {
            key: [
                m.get(key), m.set(key, 1), m.get(key), m.set(key, 5), m.set(key, 6), m.incr(key),
                m.get(key), m.get(key), m.delete(key), m.get(key), m.set(key, 1, nx=True),
                m.set(key, 2, nx=True), m.get(key), m.append(key, "0"), m.get(key),
                m.mget(key, key), m.delete(key), m.rpush(key, "x"), m.get(key), m.set(key, "y"),
                m.get(key),
            ]
            for key in keys
        }  # fmt: skip
    expected = [
        None, True, b"1", True, True, 7, b"7", b"7", 1, None, True, None, b"1", 2, b"10",
        [b"10", b"10"], 1, 1, "WRONGTYPE", True, b"y",
    ]  # fmt: skip
    for found in replies.values():
        assert [getattr(reply.error, "code", None) or reply.value for reply in found] == expected


def test_runs_are_merged(backend: Backend, prefix: str) -> None:
    """Many GETs of one node are one MGET, and many SETs one MSET; with other options they are not.

    Over a cluster that is so for keys of one slot.
    """
    router = backend.router()
    tags = backend.keys(prefix)
    keys = [f"{{{tag}}}{n}" for tag in tags for n in range(50)]
    said(backend)
    with router.map() as m:
        written = [m.set(key, n) for n, key in enumerate(keys)]
    assert [reply.value for reply in written] == [True] * 150
    assert set(map(str, said(backend).values())) == {"{'mset': 1}"}
    with router.map() as m:
        read = [m.get(key) for key in keys]
    assert [reply.value for reply in read] == [b"%d" % n for n in range(150)]
    told = said(backend).values()
    assert all(counts.get("mget", 0) == 1 for counts in told if "get" not in counts)
    with router.map() as m:
        mixed = [m.get(key) for key in keys] + [m.incr(tags[0])]
    assert [reply.value for reply in mixed] == [*(b"%d" % n for n in range(150)), 1]
    assert [counts["mget"] for counts in said(backend).values()] == [1] * 3
    with router.map() as m:
        for key in keys:
            m.set(key, "x", ex=100)
            m.set(key, "y", keepttl=True)
    assert [counts["set"] for counts in said(backend).values()] == [100] * 3
    assert router.mget(keys) == [b"y"] * 150
    assert all(90 < router.ttl(key) <= 100 for key in keys)


def test_merged_gets_of_other_types(backend: Backend, prefix: str) -> None:
    """Among merged GETs one of a list is an error, one of nothing is None, others are values."""
    router = backend.router()
    for tag in backend.keys(prefix):
        keys = [f"{{{tag}}}{n}" for n in range(9)]
        router.mset({key: key for key in keys[::2]})
        router.rpush(keys[1], "x")
        for more in ([], ["incr"]):
            with router.map(on_error="return") as m:
                replies = [m.get(key) for key in [*keys, keys[1], keys[0]]]
                if more:
                    m.incr(f"{{{tag}}}count")
            codes = [getattr(reply.error, "code", None) for reply in replies]
            assert codes == [None, "WRONGTYPE", *[None] * 7, "WRONGTYPE", None]
            assert [replies[n].value for n in (0, 2, 4, 6, 8, 10)] == [
                f"{{{tag}}}{n}".encode() for n in (0, 2, 4, 6, 8, 0)
            ]
            assert [replies[n].value for n in (3, 5, 7)] == [None] * 3


def test_what_is_said_again_comes_before_what_follows(backend: Backend, prefix: str) -> None:
    """Merged reads that must be said singly tell what was there before later writes of the batch.

    So with every sort of write, of any of their keys.
    """
    router = backend.router()
    writes: list[Callable[[Any, str], Any]] = [
        lambda m, key: [m.set(key, "new"), m.set(key, "newer")],
        lambda m, key: m.set(key, "new", ex=100),
        lambda m, key: m.append(key, "!"),
        lambda m, key: m.delete(f"{key}none", key),
        lambda m, key: m.eval("redis.call('SET', KEYS[2], 'e')", 2, f"{key}none", key),
    ]
    for tag in backend.keys(prefix):
        keys = [f"{{{tag}}}{n}" for n in range(4)]
        for write in writes:
            router.delete(*keys)
            router.rpush(keys[0], "list")
            router.mset(dict.fromkeys(keys[1:], "old"))
            with router.map(on_error="return") as m:
                first = [m.get(key) for key in keys]
                write(m, keys[2])
                second = [m.get(key) for key in keys]
            assert [ended(reply) for reply in first] == ["WRONGTYPE", b"old", b"old", b"old"]
            now = router.get(keys[2])
            assert now != b"old"
            assert [ended(reply) for reply in second] == ["WRONGTYPE", b"old", now, b"old"]


def test_a_user_who_may_not_say_what_is_merged(backend: Backend, prefix: str) -> None:
    """Who may GET and SET, but not MGET and MSET, has the same replies in the same order."""
    rights = "reset", "on", ">p", "~*", "&*", "+@all", "-mget", "-mset"
    with ExitStack() as stack:
        for server in backend.servers.values():
            admin = stack.enter_context(server.client())
            admin.execute_command("ACL", "SETUSER", prefix, *rights)
            stack.callback(admin.execute_command, "ACL", "DELUSER", prefix)
        router = backend.router(username=prefix, password="p")
        for tag in backend.keys(prefix):
            keys = [f"{{{tag}}}{n}" for n in range(4)]
            with router.map() as m:
                for key in keys:
                    m.set(key, 1)
                counts = [m.incr(key) for key in keys]
                for key in keys:
                    m.set(key, 5)
                read = [m.get(key) for key in keys]
                more = [m.incrby(key, 2) for key in keys]
                again = [m.get(key) for key in keys]
            assert [reply.value for reply in counts] == [2] * 4
            assert [reply.value for reply in read] == [b"5"] * 4
            assert [reply.value for reply in more] == [7] * 4
            assert [reply.value for reply in again] == [b"7"] * 4
            with router.map() as m:
                gets = [m.get(key) for key in [*keys, f"{{{tag}}}none"]]
            assert [reply.value for reply in gets] == [*[b"7"] * 4, None]


# Faults: four nodes, each behind a proxy

DEADLINE = 0.8


class Fault(NamedTuple):
    """What befalls a node, before the batch is sent."""

    name: str
    begin: Callable[[FaultProxy], None]


def refused(proxy: FaultProxy) -> None:
    """Nobody listens, and connections are cut."""
    proxy.refuse()
    proxy.cut()


FAULTS = [
    Fault("refused", refused),
    Fault("hung", FaultProxy.stall),
    Fault("mute", FaultProxy.stall_replies),
    Fault("reply lost", lambda proxy: proxy.drop_reply(2, of="INCRBY")),
    Fault("request lost", lambda proxy: proxy.drop_request(2, of="INCRBY")),
    Fault("cut midway", lambda proxy: proxy.cut_after_request(2, of="INCRBY")),
    Fault("slow", lambda proxy: proxy.trickle(100)),
]


class Behind:
    """Servers by name, each behind a proxy."""

    def __init__(self, servers: dict[str, Server], proxies: dict[str, FaultProxy]) -> None:
        self.servers, self.proxies = servers, proxies

    def heal(self) -> None:
        """End all faults; what was held back is lost."""
        for proxy in self.proxies.values():
            proxy.cut()
            proxy.heal()

    def nodes(self) -> dict[str, str]:
        """Return names and URLs of the proxies."""
        return {name: proxy.url for name, proxy in self.proxies.items()}

    def raw(self, keys: dict[str, list[str]]) -> dict[str, list[Any]]:
        """Return what the servers themselves have."""
        found = {}
        for name, some in keys.items():
            with self.servers[name].client() as client:
                found[name] = client.mget(some)
        return found


@pytest.fixture(scope="module")
def four_proxies() -> Iterator[Behind]:
    """Four servers that stay, and their proxies."""
    with nodes(*"abcd") as place, ExitStack() as stack:
        proxies = {
            name: stack.enter_context(FaultProxy(server)) for name, server in place.servers.items()
        }
        yield Behind(place.servers, proxies)


@pytest.fixture
def behind(four_proxies: Behind) -> Iterator[Behind]:
    """Four servers behind healthy proxies."""
    four_proxies.heal()
    yield four_proxies
    four_proxies.heal()


class Expected(NamedTuple):
    """A reply, and what it should be where nothing is wrong."""

    reply: Any
    #: A value, or the code of an error.
    result: Any


def batch_over(
    m: Any, keys: dict[str, list[str]]
) -> tuple[dict[str, list[Expected]], dict[str, list[Expected]]]:
    """Say to every node what reads and what writes, with wrong types; return it by node."""
    reads: dict[str, list[Expected]] = {name: [] for name in keys}
    counts: dict[str, list[Expected]] = {name: [] for name in keys}
    for n in range(8):
        for name, some in keys.items():
            key, prefix = some[n], f"{{{some[n]}}}"
            counts[name].append(Expected(m.incr(key), 1))
            reads[name] += [
                Expected(m.get(f"{prefix}given"), b"given"),
                Expected(m.get(f"{prefix}none"), None),
                Expected(m.set(f"{prefix}set", "x"), True),
                Expected(m.incr(f"{prefix}list"), "WRONGTYPE"),
            ]
    return reads, counts


def ready(colour: Routers, behind: Behind, prefix: str) -> tuple[dict[str, list[str]], Any]:
    """Fill keys, and return them by node with a router that knows the nodes."""
    direct = colour.router({name: server.url for name, server in behind.servers.items()})
    direct.connect()
    keys: dict[str, list[str]] = {name: [] for name in behind.servers}
    for key in spread(direct, prefix, list(behind.servers), 8):
        keys[direct.node_for(key)].append(key)
        direct.set(f"{{{key}}}given", "given")
        direct.rpush(f"{{{key}}}list", "x")
    router = colour.router(behind.nodes(), deadline=DEADLINE)
    return keys, router


def ended(reply: Any) -> Any:
    """Return a value, or the code of a server's error, or the class of another one."""
    error = reply.error
    if error is None:
        return reply.value
    return error.code if isinstance(error, ServerError) else type(error)


def survive(
    colour: Routers, behind: Behind, prefix: str, faults: dict[str, Fault], *, warm: bool
) -> None:
    """Say a batch while some nodes fail, and look at every reply and every key."""
    keys, router = ready(colour, behind, prefix)
    if warm:
        for some in keys.values():
            router.get(some[0])
            router.incr(f"{{{some[0]}}}warm")
    for name, fault in faults.items():
        fault.begin(behind.proxies[name])
    began = time.monotonic()
    with router.map(on_error="return") as m:
        reads, counts = batch_over(m, keys)
    seconds = time.monotonic() - began
    # Making connections and learning who has which keys has a time of its own.
    assert seconds < (DEADLINE if warm else 3 * DEADLINE) + LENIENCE
    for name in keys.keys() - faults.keys():
        for each in reads[name] + counts[name]:
            assert ended(each.reply) == each.result, (name, each.reply)
    for name in faults:
        for each in reads[name] + counts[name]:
            result = ended(each.reply)
            assert result in (each.result, UnavailableError, MaybeAppliedError), each.reply
    behind.heal()
    found = behind.raw(keys)
    for name in keys:
        for each, value in zip(counts[name], found[name], strict=True):
            result, applied = ended(each.reply), int(value or 0)
            if result is UnavailableError:
                assert applied == 0
            elif result is MaybeAppliedError:
                assert each.reply.maybe_applied
                assert applied in (0, 1)
            else:
                assert applied == 1
    for name, some in keys.items():

        def back(name: str = name, key: str = some[0]) -> bool:
            try:
                return int(router.incr(f"{{{key}}}back")) > 0
            except RedisHacksError:
                return False

        assert eventually(back), name


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_one_node_of_four_fails(
    colour: Routers, behind: Behind, prefix: str, fault: Fault, warm: bool
) -> None:
    """All results of the others are there, none is pending, and nothing was counted twice."""
    survive(colour, behind, prefix, {"b": fault}, warm=warm)


PAIRS = list(itertools.combinations_with_replacement(FAULTS, 2))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}, {pair[1].name}")
def test_two_nodes_of_four_fail(
    colour: Routers, behind: Behind, prefix: str, pair: Sequence[Fault]
) -> None:
    """The same when two fail in different ways."""
    survive(colour, behind, prefix, dict(zip("ad", pair, strict=True)), warm=True)


def test_all_nodes_fail(colour: Routers, behind: Behind, prefix: str) -> None:
    """When every node hangs, every reply is an error by the deadline."""
    survive(colour, behind, prefix, dict.fromkeys("abcd", FAULTS[1]), warm=True)


@pytest.mark.parametrize("fault", FAULTS[:3], ids=lambda fault: fault.name)
def test_nothing_but_gets(colour: Routers, behind: Behind, prefix: str, fault: Fault) -> None:
    """A batch of GETs alone loses those of the node that fails, and of no other."""
    keys, router = ready(colour, behind, prefix)
    router.connect()
    for some in keys.values():
        router.get(some[0])
    fault.begin(behind.proxies["c"])
    began = time.monotonic()
    with router.map(on_error="return") as m:
        replies = {name: [m.get(f"{{{key}}}given") for key in some] for name, some in keys.items()}
    assert time.monotonic() - began < DEADLINE + LENIENCE
    for name, found in replies.items():
        expected = UnavailableError if name == "c" else b"given"
        assert [ended(reply) for reply in found] == [expected] * 8, name


@pytest.mark.parametrize("fault", FAULTS[:3], ids=lambda fault: fault.name)
def test_what_must_be_said_again(
    colour: Routers,
    behind: Behind,
    prefix: str,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that fails takes no time from what others must be asked twice, or in two steps."""
    monkeypatch.setattr(client, "_GRACE", 5.0)  # for machines that are busy
    keys, router = ready(colour, behind, prefix)
    router.connect()
    for some in keys.values():
        router.incr(f"{{{some[0]}}}warm")
    fault.begin(behind.proxies["c"])
    with router.map(on_error="return") as m:
        replies = {
            name: [
                *(m.get(f"{{{key}}}given") for key in some),
                m.get(f"{{{some[0]}}}list"),
                *(m.set(f"{{{key}}}given", "other") for key in some),
                *(m.get(f"{{{key}}}given") for key in some),
                m.append(f"{{{some[0]}}}given", "!"),
                m.get(f"{{{some[0]}}}given"),
            ]
            for name, some in keys.items()
        }
    for name in "abd":
        assert [ended(reply) for reply in replies[name]] == [
            *[b"given"] * 8, "WRONGTYPE", *[True] * 8, *[b"other"] * 8, 6, b"other!",
        ], name  # fmt: skip
    assert {ended(reply) for reply in replies["c"]} <= {UnavailableError, MaybeAppliedError}


def test_the_first_batch_of_a_router(
    colour: Routers, behind: Behind, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What must be learned once is learned from a node that answers, whichever is asked first."""
    monkeypatch.setattr(client, "_GRACE", 5.0)  # for machines that are busy
    keys, _ = ready(colour, behind, prefix)
    router = colour.router(behind.nodes(), deadline=DEADLINE)
    with router.map() as m:
        for some in keys.values():
            m.get(some[0])
    for name in "ac":
        monkeypatch.setattr(random, "choice", partial(picked, name))
        behind.proxies[name].stall()
        with router.map(on_error="return") as m:
            replies = {other: m.incr(some[0]) for other, some in keys.items()}
        assert all(reply.error is None for other, reply in replies.items() if other != name)
        behind.heal()
        router = colour.router(behind.nodes(), deadline=DEADLINE)
        with router.map() as m:
            for some in keys.values():
                m.get(some[0])


def picked(name: str, some: Sequence[Any]) -> Any:
    """Choose a node if it is there, and otherwise any."""
    return next((one for one in some if one[0] == name), some[0])


def test_a_hung_node_is_not_told_more(colour: Routers, behind: Behind, prefix: str) -> None:
    """However many steps a batch has, a hung node takes no more than its deadline, and once."""
    keys, router = ready(colour, behind, prefix)
    router.connect()
    for some in keys.values():
        router.incr(f"{{{some[0]}}}warm")
    hung = behind.proxies["c"]
    hung.stall()
    connections = hung.connections
    began = time.monotonic()
    with router.map(on_error="return", deadline=0.1) as m:
        replies = []
        for n in range(40):
            replies += [m.get(key) for key in keys["c"][:2]]
            replies.append(m.set(keys["c"][0], n))
    assert time.monotonic() - began < 0.1 + LENIENCE
    assert hung.connections == connections
    assert {ended(reply) for reply in replies} <= {UnavailableError, MaybeAppliedError}


def test_the_deadline_of_a_batch(colour: Routers, behind: Behind, prefix: str) -> None:
    """A batch ends by its own deadline, however many commands a hung node has."""
    keys, router = ready(colour, behind, prefix)
    slow = colour.router(behind.nodes(), deadline=20)
    slow.connect()
    for some in keys.values():
        slow.incr(f"{{{some[0]}}}warm")
    behind.proxies["a"].stall()
    for many in (1, 50, 1000):
        began = time.monotonic()
        with slow.map(deadline=0.5, on_error="return") as m:
            replies = [m.incr(f"{{{keys['a'][0]}}}{n}") for n in range(many)]
            well = m.incr(keys["b"][0])
        assert time.monotonic() - began < 0.5 + LENIENCE
        assert all(isinstance(reply.error, RedisHacksError) for reply in replies)
        assert well.error is None
    assert router


def test_a_server_is_killed_midway(colour: Routers, prefix: str) -> None:
    """What a killed node had answered is there, and the rest is an error, not a wait."""
    with nodes(*"abc") as place:
        router = colour.router(place.nodes(), deadline=5)
        router.connect()
        a, b, c = spread(router, prefix, "abc")
        with router.map() as m:
            m.incr(a), m.incr(b), m.incr(c)
        servers = place.servers
        with servers["b"].client() as admin:
            admin.config_set("lua-time-limit", 0)
        began = time.monotonic()
        kill = "for i = 1, 1e12 do end"
        threading.Timer(0.2, servers["b"].kill).start()
        with router.map(on_error="return") as m:
            first, busy, last = m.incr(b), m.eval(kill, 1, b), m.incr(b)
            others = m.incr(a), m.incr(c)
        assert time.monotonic() - began < 4
        assert [reply.value for reply in others] == [2, 2]
        assert first.error is None or first.maybe_applied
        assert busy.maybe_applied
        assert last.maybe_applied


def test_a_task_is_cancelled(behind: Behind, prefix: str) -> None:
    """Whoever gives up a batch that is under way learns which of its commands are in doubt."""
    colour = Routers("async")
    keys, router = ready(colour, behind, prefix)
    router.connect()
    for some in keys.values():
        router.incr(f"{{{some[0]}}}warm")
    behind.proxies["a"].stall_replies()
    replies: list[Any] = []

    async def batch() -> None:
        async with router.target.map(deadline=20) as m:
            replies.extend([m.incr(keys["a"][0]), m.get(keys["b"][0])])

    async def main() -> None:
        task = asyncio.create_task(batch())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    colour.run(main())
    assert isinstance(replies[0].error, MaybeAppliedError)
    assert replies[1].error is None or isinstance(replies[1].error, MaybeAppliedError)
    behind.heal()
    colour.close()


# Calls that are split over nodes


@pytest.mark.parametrize("fault", FAULTS[:3], ids=lambda fault: fault.name)
def test_a_part_of_a_call_fails(colour: Routers, behind: Behind, prefix: str, fault: Fault) -> None:
    """What writes tells which keys are not surely done; what reads has no value at all."""
    keys, router = ready(colour, behind, prefix)
    every = [key for some in keys.values() for key in some]
    router.mset(dict.fromkeys(every, "old"))
    fault.begin(behind.proxies["b"])
    writes: list[Callable[[], Any]] = [
        lambda: router.mset(dict.fromkeys(every, "new")),
        lambda: router.touch(*every),
        lambda: router.delete(*every),
        lambda: router.unlink(*every),
    ]
    for call in writes:
        with pytest.raises(PartlyAppliedError) as partly:
            call()
        assert partly.value.failed.keys() == set(keys["b"])
        kinds = set(map(type, partly.value.failed.values()))
        assert kinds <= {UnavailableError, MaybeAppliedError}
    for call in (lambda: router.mget(every), lambda: router.exists(*every)):
        with pytest.raises(UnavailableError):
            call()
    found = behind.raw(keys)
    assert [found[name] for name in "acd"] == [[None] * 8] * 3
    for call in (lambda: router.delete(*keys["b"]), lambda: router.mset({keys["b"][0]: 1})):
        with pytest.raises((UnavailableError, MaybeAppliedError)):
            call()


def test_all_parts_of_a_call_fail(colour: Routers, behind: Behind, prefix: str) -> None:
    """When one part is in doubt and all others failed, the call is in doubt."""
    keys, router = ready(colour, behind, prefix)
    a, b = keys["a"][0], keys["b"][0]
    router.mset({a: "old", b: "old"})
    refused(behind.proxies["a"])
    with pytest.raises(UnavailableError):
        router.get(a)
    behind.proxies["b"].drop_reply(of="SET")
    with pytest.raises(MaybeAppliedError):
        router.mset({a: "new", b: "new"})
    assert behind.raw({"a": [a], "b": [b]}) == {"a": [b"old"], "b": [b"new"]}


# Whatever is said, in whatever order


class Word(NamedTuple):
    """A command of a batch: how it is said, and of which of the tags and keys."""

    say: Callable[[Any, Sequence[str]], Any]
    shown: str
    tag: int

    def __repr__(self) -> str:
        return f"{self.shown} of tag {self.tag}"


VALUES = st.sampled_from(["", "1", "x", b"\xff", 7, "9223372036854775807", "x" * 100])
#: Of the keys of a tag; few, so that they are said again and again.
PLACES = st.integers(0, 2)


def words(shown: str, say: Callable[..., Any], *given: st.SearchStrategy[Any]) -> Any:
    """Return what makes calls of one sort: `say(r, keys, …)`."""

    def made(tag: int, args: tuple[Any, ...]) -> Word:
        return Word(lambda r, keys: say(r, keys, *args), f"{shown}{args}", tag)

    return st.builds(made, st.sampled_from([0, 0, 0, 0, 1, 2]), st.tuples(*given))


OPTIONS = st.sampled_from(
    [{"nx": True}, {"xx": True}, {"ex": 100}, {"px": 99_000, "nx": True}, {"get": True},
     {"keepttl": True}, {"ex": 100, "get": True}]
)  # fmt: skip
WORDS = st.one_of(
    *[words("GET", lambda r, keys, n: r.get(keys[n]), PLACES)] * 8,
    *[words("SET", lambda r, keys, n, value: r.set(keys[n], value), PLACES, VALUES)] * 3,
    words("SET", lambda r, keys, n, value, more: r.set(keys[n], value, **more), PLACES, VALUES,
         OPTIONS),
    words("INCR", lambda r, keys, n: r.incr(keys[n]), PLACES),
    *[words("LPUSH", lambda r, keys, n, value: r.lpush(keys[n], value), PLACES, VALUES)] * 2,
    words("DEL", lambda r, keys, n: r.delete(keys[n]), PLACES),
    words("DEL", lambda r, keys, n, m: r.delete(keys[n], keys[m]), PLACES, PLACES),
    words("EXPIRE", lambda r, keys, n: r.expire(keys[n], 1000), PLACES),
    words("PERSIST", lambda r, keys, n: r.persist(keys[n]), PLACES),
    words("MGET", lambda r, keys, some: r.mget(*(keys[n] for n in some)),
         st.lists(PLACES, min_size=1, max_size=4)),
    words("APPEND", lambda r, keys, n, value: r.append(keys[n], value), PLACES, VALUES),
    words("GETDEL", lambda r, keys, n: r.getdel(keys[n]), PLACES),
    words("RENAME", lambda r, keys, n, m: r.rename(keys[n], keys[m]), PLACES, PLACES),
    words("EVAL", lambda r, keys, n, m: r.eval(
        "redis.call('SET', KEYS[1], 'e'); return redis.call('GET', KEYS[2])", 2, keys[n], keys[m]
    ), PLACES, PLACES),
    words("LRANGE", lambda r, keys, n: r.lrange(keys[n], 0, -1), PLACES),
    words("no such", lambda r, keys, n: r.execute_command("INCR", keys[n], "x"), PLACES),
)  # fmt: skip


def state(client: Any, keys: Sequence[str]) -> list[Any]:
    """Return types, contents and times to live."""
    found = []
    for key in keys:
        kind, ttl = client.type(key), client.ttl(key)
        value = client.lrange(key, 0, -1) if kind == b"list" else client.get(key)
        found.append((kind, value, -1 if ttl < 0 else round(ttl, -1)))
    return found


def came_to(call: Callable[[], Any]) -> tuple[str, Any]:
    """Return a value, or the first word of an error, which for one of words is ours."""
    what, found = shown(call)
    return what, "wrong number of arguments" if "wrong number of arg" in str(found) else found


@pytest.fixture
def tags(backend: Backend, prefix: str) -> list[str]:
    """Return tags of which each node has one."""
    return backend.keys(prefix)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(WORDS, min_size=5, max_size=40), min_size=1, max_size=2))
def test_a_batch_is_as_said_one_at_a_time(
    backend: Backend, tags: list[str], valkey: Server, batches: list[list[Word]]
) -> None:
    """The same replies, errors and final state as the commands one by one on a single server."""
    keys = [[f"{{{tag}}}{n}" for n in range(3)] for tag in tags]
    every = [key for some in keys for key in some]
    router = shared(backend)
    with valkey.client() as plain:
        for each in (router, plain):
            each.delete(*every)
            for some in keys:
                each.set(some[0], "x")
                each.rpush(some[1], "x")
        for batch in batches:
            with router.map(on_error="return") as m:
                replies = [each.say(m, keys[each.tag]) for each in batch]
            for word, reply in zip(batch, replies, strict=True):
                expected = came_to(partial(word.say, plain, keys[word.tag]))
                found = came_to(partial(getattr, reply, "value"))
                assert found == expected, word
                assert kind(found) == kind(expected), word
            assert state(router, every) == state(plain, every)


def shared(backend: Backend) -> Any:
    """Return one router for all examples of a test."""
    if not hasattr(backend, "one"):
        backend.one = backend.router()  # type: ignore[attr-defined]
    return backend.one  # type: ignore[attr-defined]
