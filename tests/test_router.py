"""The router's commands: what redis-py's come to, over independent nodes and over a cluster."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from redishacks import locks, ratelimit, timeseries
from redishacks.errors import (
    CrossNodeError,
    RedisHacksError,
    ServerError,
    TopologyMismatchError,
    UnavailableError,
    UsageError,
)
from redishacks.router import AsyncRouter, Router
from redishacks.router.placement import SlotTable
from redishacks.router.topology import Topology
from redishacks.testing import Cluster, FaultProxy, Server
from tests.helpers import MemorySink, eventually
from tests.router_kit import (
    PATIENT,
    Backend,
    Face,
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


# What redis-py's methods come to


def said(r: Any, k: str) -> dict[str, Callable[[], Any]]:
    """Return calls of every sort, to be made in this order; `k` is a hash tag of one's own."""
    day = dt.timedelta(days=1)
    s, n, h, l, z, t, x, g = (f"{{{k}}}{what}" for what in "snhlztxg")  # noqa: E741
    other = f"{{{k}}}other"
    return {
        # Strings
        "set": lambda: r.set(s, "é"),
        "get": lambda: r.get(s),
        "get none": lambda: r.get(other),
        "set bytes": lambda: r.set(s, "Hello"),
        "set ex": lambda: r.set(s, b"Hello", ex=day),
        "set nx": lambda: r.set(s, "no", nx=True),
        "set xx": lambda: r.set(other, "no", xx=True),
        "set get": lambda: r.set(s, "World", get=True, keepttl=True),
        "set get none": lambda: r.set(other, 1.5, get=True),
        "setex": lambda: r.setex(s, 100, 7),
        "setnx": lambda: r.setnx(s, 8),
        "append": lambda: r.append(s, "89"),
        "strlen": lambda: r.strlen(s),
        "getrange": lambda: r.getrange(s, 0, 1),
        "setrange": lambda: r.setrange(s, 1, "x"),
        "getset": lambda: r.getset(s, "y"),
        "getdel": lambda: r.getdel(other),
        "getex": lambda: r.getex(s, ex=100),
        "incr": lambda: r.incr(n),
        "incrby": lambda: r.incrby(n, 41),
        "decr": lambda: r.decr(n, 2),
        "incrbyfloat": lambda: r.incrbyfloat(n, 0.25),
        "incr of no integer": lambda: r.incr(s),
        "setbit": lambda: r.setbit(f"{n}b", 9, 1),
        "getbit": lambda: r.getbit(f"{n}b", 9),
        "bitcount": lambda: r.bitcount(f"{n}b"),
        "bitop": lambda: r.bitop("NOT", f"{n}c", f"{n}b"),
        "bitfield": lambda: r.bitfield_ro(f"{n}b", "u8", 2, [("i4", "#1")]),
        "mget": lambda: r.mget([s, other, n]),
        "mget of nothing": lambda: r.mget([]),
        "mset": lambda: r.mset({s: "1", other: "2"}),
        "msetnx": lambda: r.msetnx({s: "3"}),
        "lcs": lambda: r.lcs(s, other),
        "lcs idx": lambda: r.lcs(s, s, idx=True),
        # Keys
        "exists": lambda: r.exists(s, other, f"{k}none"),
        "touch": lambda: r.touch(s),
        "type": lambda: r.type(s),
        "type none": lambda: r.type(f"{s}none"),
        "expire": lambda: r.expire(s, 1000),
        "expire gt": lambda: r.expire(s, day, gt=True),
        "ttl": lambda: r.ttl(s) > 86_300,
        "ttl none": lambda: r.ttl(f"{s}none"),
        "expireat": lambda: r.expireat(s, 4_000_000_000),
        "expiretime": lambda: r.expiretime(s),
        "persist": lambda: r.persist(s),
        "rename": lambda: r.rename(s, f"{s}2"),
        "rename none": lambda: r.rename(s, f"{s}2"),
        "renamenx": lambda: r.renamenx(f"{s}2", s),
        "copy": lambda: r.copy(s, f"{s}2"),
        "object": lambda: r.object("ENCODING", s),
        "dump": lambda: r.dump(s),
        "restore": lambda: r.restore(f"{s}3", 0, r.dump(s) if isinstance(r.get(s), bytes) else ""),
        "delete": lambda: r.delete(s, other, f"{s}2", f"{s}none"),
        "unlink": lambda: r.unlink(f"{s}3"),
        # Hashes
        "hset": lambda: r.hset(h, mapping={"a": 1, "b": "é", "c": b"3"}),
        "hget": lambda: r.hget(h, "a"),
        "hget none": lambda: r.hget(h, "z"),
        "hmget": lambda: r.hmget(h, ["a", "z"]),
        "hgetall": lambda: r.hgetall(h),
        "hgetall none": lambda: r.hgetall(other),
        "hdel": lambda: r.hdel(h, "c"),
        "hexists": lambda: r.hexists(h, "c"),
        "hincrby": lambda: r.hincrby(h, "a", 5),
        "hincrbyfloat": lambda: r.hincrbyfloat(h, "a", 0.5),
        "hkeys": lambda: r.hkeys(h),
        "hvals": lambda: r.hvals(h),
        "hlen": lambda: r.hlen(h),
        "hscan": lambda: r.hscan(h),
        "hsetnx": lambda: r.hsetnx(h, "a", 1),
        "hstrlen": lambda: r.hstrlen(h, "b"),
        "hrandfield": lambda: r.hrandfield(h, 9, withvalues=True),
        "hset of no mapping": lambda: r.hset(n, "a", 1),
        # Lists
        "rpush": lambda: r.rpush(l, "a", "b", "c", "é"),
        "lpush": lambda: r.lpush(l, 0),
        "lrange": lambda: r.lrange(l, 0, -1),
        "llen": lambda: r.llen(l),
        "lindex": lambda: r.lindex(l, 1),
        "linsert": lambda: r.linsert(l, "BEFORE", "b", "x"),
        "lpos": lambda: r.lpos(l, "b"),
        "lset": lambda: r.lset(l, 0, "y"),
        "lset too far": lambda: r.lset(l, 99, "y"),
        "lrem": lambda: r.lrem(l, 1, "x"),
        "ltrim": lambda: r.ltrim(l, 0, 3),
        "lpop": lambda: r.lpop(l),
        "lpop several": lambda: r.lpop(l, 2),
        "rpop": lambda: r.rpop(l),
        "rpop none": lambda: r.rpop(l),
        "lmove": lambda: [r.rpush(l, 1, 2), r.lmove(l, f"{l}2", "LEFT", "RIGHT")],
        "lmpop": lambda: r.lmpop(2, l, f"{l}2", direction="LEFT"),
        "blpop": lambda: r.blpop([l, f"{l}2"], timeout=1),
        "brpop none": lambda: r.brpop(l, timeout=0.01),
        "sort": lambda: [r.rpush(l, 3, 1, 2), r.sort(l, desc=True), r.sort(l, alpha=True, num=1,
                                                                           start=0)],
        "sort store": lambda: r.sort(l, store=f"{l}3"),
        # Sets
        "sadd": lambda: r.sadd(t, "a", "é", 3),
        "smembers": lambda: r.smembers(t),
        "sismember": lambda: r.sismember(t, "a"),
        "smismember": lambda: r.smismember(t, ["a", "z"]),
        "scard": lambda: r.scard(t),
        "srem": lambda: r.srem(t, "a", "z"),
        "sunion": lambda: r.sunion(t, f"{t}none"),
        "sinter": lambda: r.sinter(t, f"{t}none"),
        "sintercard": lambda: r.sintercard(2, [t, t]),
        "sdiffstore": lambda: r.sdiffstore(f"{t}2", t, f"{t}none"),
        "smove": lambda: r.smove(t, f"{t}2", "3"),
        "sscan": lambda: r.sscan(t),
        "sscan_iter": lambda: list(r.sscan_iter(t)),
        "spop": lambda: r.spop(t),
        "spop none": lambda: r.spop(f"{t}none"),
        "srandmember": lambda: r.srandmember(t, 2),
        # Sorted sets
        "zadd": lambda: r.zadd(z, {"a": 1, "b": 2.5, "é": "inf"}),
        "zadd incr": lambda: r.zadd(z, {"a": 1}, incr=True),
        "zadd ch": lambda: r.zadd(z, {"a": 3}, ch=True, gt=True),
        "zscore": lambda: r.zscore(z, "b"),
        "zscore none": lambda: r.zscore(z, "z"),
        "zmscore": lambda: r.zmscore(z, ["a", "z"]),
        "zincrby": lambda: r.zincrby(z, 0.5, "a"),
        "zrange": lambda: r.zrange(z, 0, -1),
        "zrange withscores": lambda: r.zrange(z, 0, -1, withscores=True),
        "zrange int": lambda: r.zrange(z, 0, 1, withscores=True, score_cast_func=int),
        "zrevrange": lambda: r.zrevrange(z, 0, -1, withscores=True),
        "zrangebyscore": lambda: r.zrangebyscore(z, "(1", 5, withscores=True),
        "zrangebylex": lambda: r.zrangebylex(z, "-", "+"),
        "zrank": lambda: r.zrank(z, "b"),
        "zrank withscore": lambda: r.zrank(z, "b", withscore=True),
        "zcard": lambda: r.zcard(z),
        "zcount": lambda: r.zcount(z, 0, 3),
        "zunionstore": lambda: r.zunionstore(f"{z}2", {z: 2, f"{z}none": 1}, aggregate="MAX"),
        "zunion": lambda: r.zunion([z, f"{z}2"], withscores=True),
        "zinter": lambda: r.zinter([z, f"{z}2"], withscores=True),
        "zscan": lambda: r.zscan(z),
        "zpopmin": lambda: r.zpopmin(f"{z}2"),
        "bzpopmax": lambda: r.bzpopmax([f"{z}2"], timeout=1),
        "zmpop": lambda: r.zmpop(1, [z], min=True),
        "zrem": lambda: r.zrem(z, "a"),
        "zrandmember": lambda: r.zrandmember(z, 9, withscores=True),
        # Streams
        "xadd": lambda: [r.xadd(x, {"f": i, "é": "é"}, id=f"{i}-1") for i in (1, 2, 3)],
        "xlen": lambda: r.xlen(x),
        "xrange": lambda: r.xrange(x, count=1),
        "xrevrange": lambda: r.xrevrange(x, count=1),
        "xread": lambda: r.xread({x: "1-1"}, count=1),
        "xread none": lambda: r.xread({x: "9-1"}),
        "xgroup": lambda: r.xgroup_create(x, "group", id="0"),
        "xreadgroup": lambda: r.xreadgroup("group", "me", {x: ">"}, count=2),
        "xpending": lambda: r.xpending(x, "group"),
        "xpending none": lambda: r.xpending_range(x, "group", "-", "+", 9, "nobody"),
        "xack": lambda: r.xack(x, "group", "1-1"),
        "xinfo": lambda: {key: r.xinfo_stream(x)[key] for key in ("length", "first-entry")},
        "xinfo groups": lambda: r.xinfo_groups(x),
        "xtrim": lambda: r.xtrim(x, maxlen=1, approximate=False),
        "xdel": lambda: r.xdel(x, "3-1"),
        # Places, and how many there are
        "geoadd": lambda: r.geoadd(g, [13.361389, 38.115556, "Palermo", 15.087, 37.5, "Catania"]),
        "geodist": lambda: r.geodist(g, "Palermo", "Catania", unit="km"),
        "geopos": lambda: r.geopos(g, "Palermo", "None"),
        "geohash": lambda: r.geohash(g, "Palermo"),
        "geosearch": lambda: r.geosearch(g, member="Palermo", radius=500, unit="km", sort="ASC",
                                         withdist=True),
        "pfadd": lambda: r.pfadd(f"{g}p", "a", "b"),
        "pfcount": lambda: r.pfcount(f"{g}p"),
        "pfmerge": lambda: r.pfmerge(f"{g}q", f"{g}p"),
        # Scripts
        "eval": lambda: r.eval("return {KEYS[1], ARGV[1], 7, false}", 1, s, "é"),
        "eval error": lambda: r.eval("return redis.call('INCR', KEYS[1])", 1, l),
        "evalsha none": lambda: r.evalsha("0" * 40, 1, s),
        # Without keys, and mistakes
        "echo": lambda: r.echo("é"),
        "ping": lambda: r.ping(),
        "time": lambda: kind(r.time()),
        "wrong type": lambda: r.lpush(z, 1),
        "execute_command": lambda: r.execute_command("get", n),
        "words in one": lambda: r.execute_command("OBJECT ENCODING", n),
    }  # fmt: skip


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("protocol", [2, 3])
def test_what_commands_come_to(
    backend: Backend, valkey: Server, prefix: str, protocol: int, decode: bool
) -> None:
    """Some 150 calls of all types come to the same value of the same type as redis-py's own."""
    options = {"protocol": protocol, "decode_responses": decode}
    plain = backend.colour.client(valkey.url, **options)
    runner = backend.colour.runner
    reference = Face(plain, runner) if runner else plain
    router = backend.router(**options)
    different = {}
    theirs = said(reference, prefix)
    for what, ours in said(router, prefix).items():
        expected, found = shown(theirs[what]), shown(ours)
        if found != expected or kind(found) != kind(expected):
            different[what] = found, expected
    reference.close()
    assert different == {}


# Several keys


def held(backend: Backend, keys: list[str]) -> dict[str, int]:
    """Return how many of these keys each server has."""
    counts = {}
    for name, server in backend.servers.items():
        with server.client() as client:
            counts[name] = sum(
                shown(lambda key=key: client.exists(key)) == ("value", 1)  # type: ignore[misc]
                for key in keys
            )
    return counts


def test_several_keys_over_all_nodes(backend: Backend, prefix: str) -> None:
    """MSET, MGET, EXISTS, TOUCH, DEL and UNLINK are split, and their replies put together."""
    router = backend.router()
    keys = backend.keys(prefix, each=5)
    half, rest = keys[::2], keys[1::2]
    assert router.mset({key: f"of {key}" for key in keys}) is True
    assert held(backend, keys) == dict.fromkeys(backend.servers, 5)
    assert router.mget(keys) == [f"of {key}".encode() for key in keys]
    assert router.mget(keys[0], "none", keys[0]) == [router.get(keys[0]), None, router.get(keys[0])]
    assert router.exists(*keys, "none", keys[0]) == len(keys) + 1
    assert router.touch(*keys, "none") == len(keys)
    assert router.delete(*half, "none", half[0]) == len(half)
    assert router.mget(keys) == [None if key in half else router.get(key) for key in keys]
    assert router.unlink(*keys) == len(rest)
    assert router.exists(*keys) == 0


def test_mget_of_other_types(backend: Backend, prefix: str) -> None:
    """What is no string is None to MGET, on whatever node, as a server has it."""
    router = backend.router()
    keys = backend.keys(prefix, each=2)
    router.mset(dict.fromkeys(keys[1:], "x"))
    router.rpush(keys[0], "list")
    assert router.mget([*keys, "none"]) == [None, *[b"x"] * (len(keys) - 1), None]


def test_mset_needs_pairs(backend: Backend, prefix: str) -> None:
    """A key without a value is refused, and nothing is written."""
    router = backend.router()
    keys = backend.keys(prefix)
    with pytest.raises(UsageError, match="each key needs a value"):
        router.execute_command("MSET", keys[0], 1, keys[1], 2, keys[2])
    assert router.exists(*keys) == 0


APART: dict[str, Callable[[Any, str, str], Any]] = {
    "bitop": lambda r, a, b: r.bitop("OR", a, b),
    "blmove": lambda r, a, b: r.blmove(a, b, 1),
    "blpop": lambda r, a, b: r.blpop([a, b], 1),
    "copy": lambda r, a, b: r.copy(a, b),
    "eval": lambda r, a, b: r.eval("return redis.call('SET', KEYS[1], 1)", 2, a, b),
    "evalsha": lambda r, a, b: r.evalsha("0" * 40, 2, a, b),
    "geosearchstore": lambda r, a, b: r.geosearchstore(a, b, member="x", radius=1),
    "lmove": lambda r, a, b: r.lmove(a, b),
    "lmpop": lambda r, a, b: r.lmpop(2, a, b, direction="LEFT"),
    "msetnx": lambda r, a, b: r.msetnx({a: 1, b: 2}),
    "pfcount": lambda r, a, b: r.pfcount(a, b),
    "pfmerge": lambda r, a, b: r.pfmerge(a, b),
    "rename": lambda r, a, b: r.rename(a, b),
    "sdiffstore": lambda r, a, b: r.sdiffstore(a, b),
    "smove": lambda r, a, b: r.smove(a, b, "x"),
    "sort store": lambda r, a, b: r.sort(a, store=b),
    "sunion": lambda r, a, b: r.sunion(a, b),
    "xread": lambda r, a, b: r.xread({a: 0, b: 0}),
    "zinterstore": lambda r, a, b: r.zinterstore(a, {a: 1, b: 1}),
    "zunion": lambda r, a, b: r.zunion([a, b]),
}


def test_what_cannot_be_split_is_refused(backend: Backend, prefix: str) -> None:
    """A command that needs its keys together names two that are not; nothing is sent."""
    router = backend.router()
    first, second, *_ = keys = backend.keys(prefix)
    for what, call in APART.items():
        with pytest.raises(CrossNodeError) as refused:
            call(router, first, second)
        shown = str(refused.value)
        assert repr(first.encode()) in shown, what
        assert repr(second.encode()) in shown, what
        with router.map(on_error="return") as m:
            reply = call(m, first, second)
        assert isinstance(reply.error, CrossNodeError), what
    assert router.exists(*keys) == 0


def test_scripts_run_where_their_keys_are(backend: Backend, prefix: str) -> None:
    """EVAL goes to the node of its keys, whichever that is; a hash tag keeps several together."""
    router = backend.router()
    keys = backend.keys(prefix)
    source = "return {redis.call('INCR', KEYS[1]), redis.call('RPUSH', KEYS[2], ARGV[1])}"
    for key in keys:
        for n in (1, 2):
            assert router.eval(source, 2, f"{{{key}}}n", f"{{{key}}}l", "x") == [n, n]
    counts = held(backend, [f"{{{key}}}{what}" for key in keys for what in "nl"])
    assert counts == dict.fromkeys(backend.servers, 2)


@pytest.mark.parametrize("decode", [False, True])
def test_registered_scripts(backend: Backend, valkey: Server, prefix: str, decode: bool) -> None:
    """A registered script is as redis-py's, on nodes that know it and on those that do not."""
    router = backend.router(decode_responses=decode)
    keys = backend.keys(prefix)
    source = "return {redis.call('INCRBY', KEYS[1], ARGV[1]), ARGV[2], KEYS[2], false}"
    script = router.register_script(source)
    with valkey.client(decode_responses=decode) as plain:
        theirs = plain.register_script(source)
        assert script.sha == theirs.sha
        for _ in range(2):
            for key in keys:
                args = [f"{{{key}}}n", f"{{{key}}}other"], [5, "é"]
                assert backend.colour.run(script(*args)) == theirs(*args)
            for server in backend.servers.values():
                with server.client() as admin:
                    admin.script_flush()
        with router.map(on_error="return") as m:
            replies = [
                script(keys=[f"{{{key}}}n", f"{{{key}}}other"], args=[1, "x"], client=m)
                for key in keys
            ]
            apart = script(keys=keys[:2], args=[1], client=m)
            wrong = script(keys=[f"{{{keys[0]}}}n", keys[0]], args=["x", 1], client=m)
        for key, reply in zip(keys, replies, strict=True):
            assert reply.value == theirs([f"{{{key}}}n", f"{{{key}}}other"], [1, "x"])
    assert isinstance(apart.error, CrossNodeError)
    assert isinstance(wrong.error, ServerError)
    with pytest.raises(CrossNodeError):
        backend.colour.run(script(keys=keys))
    with pytest.raises(UsageError, match="without keys"):
        backend.colour.run(script())


# Keys, and why they are where they are


def test_where_a_key_is(backend: Backend, cluster: Cluster, prefix: str) -> None:
    """Slot, node and reason of a key, whatever it is made of; they are where the servers say."""
    router = backend.router()
    if backend.colour.runner:
        with pytest.raises(UsageError, match="connect"):
            router.node_for("a")
    router.connect()
    nasty: list[Any] = ["", "{}", "{}a", "{{a}}", "a{b", "{a}{b}", "é{ü}", b"\xff{\0}\xff", 42, 1.5]
    with cluster.nodes[0].client() as asked:
        for key in [*nasty, *(f"{prefix}:{n}" for n in range(50))]:
            assert router.slot(key) == asked.cluster("KEYSLOT", key)
    why = router.explain(f"{prefix}{{tag}}x")
    assert (why.key, why.tag) == (f"{prefix}{{tag}}x".encode(), b"tag")
    assert why.slot == router.slot("tag")
    assert why.node == router.node_for("tag")
    assert "by its hash tag" in str(why)
    assert f"slot {router.slot(prefix)} as a whole" in str(router.explain(prefix))
    for key in backend.keys(prefix):
        router.set(key, 1)
        with backend.servers[router.node_for(key)].client() as client:
            assert client.get(key) == b"1"


def test_keys_are_what_redis_py_takes(backend: Backend, prefix: str) -> None:
    """str, bytes, int, float and memoryview name the same keys as on the wire; others do not."""
    router = backend.router()
    number = int(prefix[3:], 16)
    router.set(number, "int")
    assert router.get(str(number)) == router.get(b"%d" % number) == b"int"
    assert router.get(memoryview(b"%d" % number)) == b"int"
    router.set(number + 0.5, "float")
    assert router.get(f"{number}.5") == b"float"
    router.delete(number, number + 0.5)
    for wrong in (None, True, object(), ["a"], {"a": 1}, "\ud800"):
        with pytest.raises(UsageError):
            router.get(wrong)
        with pytest.raises(UsageError):
            router.set(prefix, wrong)
        with pytest.raises(UsageError):
            router.mset({prefix: 1, f"{prefix}2": wrong})
    assert router.exists(prefix, f"{prefix}2") == 0


def test_what_no_server_knows(backend: Backend, prefix: str) -> None:
    """An unknown command and a wrong number of words are refused here, without a word of theirs."""
    router = backend.router()
    for call in (("FOO", "secret"), ("GET",), ("GET", "secret", "b"), ("OBJECT", "secret", "b")):
        for _ in range(2):
            with pytest.raises(UsageError) as refused:
                router.execute_command(*call)
            assert "secret" not in str(refused.value)
    assert router.get(prefix) is None


# Life


def test_closed_and_used_again(backend: Backend, prefix: str) -> None:
    """Closing lets connections go; the next call makes new ones, and all is where it was."""
    router = backend.router()
    keys = backend.keys(prefix)
    for n in (1, 2, 3):
        assert [router.incr(key) for key in keys] == [n] * len(keys)
        router.close()


def test_threads_share_a_router(place: Place, prefix: str) -> None:
    """From a router that is shared and new, each of eight threads gets the replies that are its."""
    colour = Routers("sync")
    backend = Backend(place, colour)
    keys = backend.keys(prefix, each=3)
    router = backend.router()

    def work(n: int) -> list[int]:
        own = [f"{{{key}}}:{n}" for key in keys]
        seen = []
        for _ in range(30):
            router.mset(dict.fromkeys(own, n))
            seen += router.mget(own)
            seen.append(router.get(own[0]))
            router.incr(keys[0])
        return [int(value) for value in seen]

    with ThreadPoolExecutor(8) as pool:
        for n, seen in enumerate(pool.map(work, range(8))):
            assert seen == [n] * 30 * (len(keys) + 1)
    assert router.get(keys[0]) == b"240"
    colour.close()


def test_one_router_in_several_loops(place: Place, prefix: str) -> None:
    """An `AsyncRouter` serves one loop after another, and many tasks in each."""
    first, second = Routers("async"), Routers("async")
    keys = Backend(place, first).keys(prefix)
    router = Backend(place, first).router().target

    async def work(n: int) -> None:
        counts = await asyncio.gather(*(router.incr(keys[0]) for _ in range(50)))
        assert sorted(counts) == list(range(n, n + 50))
        async with router.map() as m:
            replies = [m.incr(key) for key in keys[1:]]
        assert {reply.value for reply in replies} == {n // 50 + 1}
        await router.aclose()

    for n, colour in enumerate((first, second)):
        colour.run(work(50 * n + 1))
    first.close()
    second.close()


# What cannot be


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (None, "names and for each a node"),
        (5, "names and for each a node"),
        ("redis://:secret@h", "names and for each a node"),
        (["redis://:secret@h", "redis://:secret@i"], "names and for each a node"),
        (["ab"], "names and for each a node"),
        ([("a", "redis://:secret@h", 2)], "names and for each a node"),
        ({}, "no nodes"),
        ([], "no nodes"),
        ([("a", "redis://:secret@h"), ("a", "redis://:secret@i")], "node a is given twice"),
        ({"": "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({"x" * 65: "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({1: "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({None: "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({"a b": "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({"a\n": "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({"é": "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({"{a}": "redis://:secret@h"}, "a node's name is 1 to 64"),
        ({"redis://:secret@h": "a"}, "a node's name is not its URL"),
        ({"a": None}, "node a: a redis-py client or a URL is needed, not NoneType"),
        ({"a": b"redis://:secret@h"}, "node a: a redis-py client or a URL is needed, not bytes"),
        ({"a": 6379}, "node a: a redis-py client or a URL is needed, not int"),
        ({"a": ("h", 6379)}, "node a: a redis-py client or a URL is needed, not tuple"),
        ({"a": "redis://:secret@h:port"}, "node a: the Redis URL cannot be read: check its port"),
        ({"a": "redis://:secret@h:99999999"}, "node a: the Redis URL cannot be read"),
        ({"a": "redis://:secret@[::1"}, "node a: the Redis URL cannot be read"),
        ({"a": "http://:secret@h"}, "node a: a URL must begin with redis://"),
        ({"a": "secret@h"}, "node a: a URL must begin with redis://"),
        ({"a": {}}, "node a: its url is missing"),
        ({"a": {"weight": 2}}, "node a: its url is missing"),
        ({"a": {"url": "redis://:secret@h", "wait": 2}}, "node a: url and weight, not wait"),
        ({"a": {"url": "redis://:secret@h", 5: 2}}, "node a: url and weight, not 5"),
        ({"a": {"url": {"url": "redis://:secret@h"}}}, "a redis-py client or a URL is needed"),
        *(
            ({"a": {"url": "redis://:secret@h", "weight": weight}}, "a number above 0, not ")
            for weight in (0, -1, 0.0, float("nan"), float("inf"), True, "1", None, [2])
        ),
    ],
    ids=repr,
)
def test_nodes_that_cannot_be(flavour: str, nodes: Any, message: str) -> None:
    """What can never work is refused at once, by name, and no password is in any message."""
    kind = AsyncRouter if flavour == "async" else Router
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        kind(nodes)
    whole = "".join(traceback.format_exception(refused.value.with_traceback(None)))
    assert "secret" not in whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": 0}, "deadline"),
        ({"deadline": -1}, "deadline"),
        ({"deadline": "soon"}, "deadline"),
        ({"deadline": None}, "deadline"),
        ({"prefix": ""}, "prefix"),
        ({"prefix": 5}, "prefix"),
        ({"prefix": b"rh"}, "prefix"),
        ({"placement": "slots"}, "a placement is"),
        ({"placement": SlotTable}, "a placement is"),
        ({"placement": {"a": 1}}, "a placement is"),
        ({"placement": SlotTable.fresh({"a": 1, "x": 1})}, "has node x, which is not given"),
        ({"placement": SlotTable.fresh({"a": 1, "b": 2})}, "where weights are given"),
    ],
    ids=repr,
)
def test_options_that_cannot_be(flavour: str, options: Any, message: str) -> None:
    """A deadline, a prefix or a placement that can never work is refused at once."""
    kind = AsyncRouter if flavour == "async" else Router
    with pytest.raises(UsageError, match=message):
        kind({"a": "redis://h", "b": {"url": "redis://i", "weight": 2}}, **options)


def test_clients_of_the_other_colour() -> None:
    """A client of redis.asyncio belongs in an AsyncRouter, one of redis in a Router."""
    for mine, other in ((Routers("sync"), Routers("async")), (Routers("async"), Routers("sync"))):
        client = other.client("redis://:secret@h")
        with pytest.raises(UsageError, match="for asyncio") as refused:
            mine.router({"a": client})
        assert "secret" not in str(refused.value)
        other.run(client.aclose() if other.runner else client.close())
        mine.close()
        other.close()


def test_clusters_in_the_wrong_place(colour: Routers, cluster: Cluster) -> None:
    """A cluster is no node, and a single client or a router is no cluster."""
    client = clustered(cluster).client(colour.module)
    with pytest.raises(UsageError, match=r"node a: .*a cluster"):
        colour.router({"a": client})
    colour.over(client)
    router = colour.router({"a": "redis://:secret@h"})
    inner = router.target if colour.runner else router
    for wrong in (colour.client("redis://:secret@h"), "redis://:secret@h", inner, None, 5):
        with pytest.raises(UsageError) as refused:
            colour.over(wrong)
        assert "secret" not in str(refused.value)
    with pytest.raises(UsageError, match=r"not (Async)?Router"):
        colour.router({"a": inner})


# What all clients agree on

NODE_KEY = "rh:r1:{router}:node"


@pytest.fixture(scope="module")
def four() -> Iterator[dict[str, Server]]:
    """Four servers that stay."""
    with nodes("a", "b", "c", "d") as made:
        yield made.servers


@pytest.fixture
def empty(four: dict[str, Server]) -> dict[str, Server]:
    """The four, which nobody has used yet."""
    for server in four.values():
        with server.client() as client:
            client.flushall()
    return four


def urls(servers: dict[str, Server], names: str) -> dict[str, Any]:
    """Return names and URLs of some."""
    return {name: servers[name].url for name in names}


def sizes(servers: dict[str, Server]) -> dict[str, int]:
    """Return how many keys each has."""
    counts = {}
    for name, server in servers.items():
        with server.client() as client:
            counts[name] = client.dbsize()
    return counts


def answers(call: Callable[..., Any], *args: Any) -> Any:
    """Return what a call comes to, and nothing while that is an error."""
    try:
        return call(*args)
    except RedisHacksError:
        return None


def stamps(servers: dict[str, Server]) -> dict[str, str]:
    """Return what each says of itself, but for its name; of those that say something."""
    found = {}
    for name, server in servers.items():
        with server.client(decode_responses=True) as client:
            stamp = client.hget(NODE_KEY, "stamp")
        if stamp is not None:
            version, digest, its = stamp.split(" ")
            assert its == name
            found[name] = f"{version} {digest}"
    return found


def at_once(work: Callable[[int], Any], many: int = 8) -> list[Any]:
    """Call a function in so many threads at the same time; return what they came to."""
    barrier = threading.Barrier(many)

    def begin(n: int) -> Any:
        barrier.wait()
        return shown(lambda: work(n))

    with ThreadPoolExecutor(many) as pool:
        return list(pool.map(begin, range(many)))


def test_fresh_nodes_agree(flavour: str, empty: dict[str, Server]) -> None:
    """Of eight clients that begin at once, each by other addresses, all find the same table."""

    def begin(n: int) -> list[str]:
        colour = Routers(flavour)
        try:
            given = urls(empty, "abc")
            if n % 2:
                given = {name: given[name].replace("127.0.0.1", "localhost") for name in "cba"}
            router = colour.router(given)
            router.connect()
            assert router.incr(f"own:{n}") == 1
            return [router.node_for(f"{i}") for i in range(100)]
        finally:
            colour.close()

    ((word, table), *others) = at_once(begin)
    assert word == "value", table
    assert others == [(word, table)] * 7
    assert len(set(stamps(empty).values())) == 1
    assert set(stamps(empty)) == {"a", "b", "c"}


def test_fresh_nodes_and_clients_that_contradict(flavour: str, empty: dict[str, Server]) -> None:
    """Of clients that begin at once with two sets of weights, those of one set are refused."""

    def begin(n: int) -> str:
        colour = Routers(flavour)
        try:
            given = urls(empty, "abc")
            given["a"] = {"url": given["a"], "weight": 2 + n % 2}
            router = colour.router(given)
            try:
                router.incr("all")
            except TopologyMismatchError as error:
                return str(error)
            return "served"
        finally:
            colour.close()

    came = [value for _, value in at_once(begin)]
    winners = came.index("served") % 2
    assert came[winners::2] == ["served"] * 4
    assert all(f"node a with weight {2 + winners}" in text for text in came[1 - winners :: 2])
    assert len(set(stamps(empty).values())) == 1
    assert sum(sizes(empty).values()) == 4


@pytest.mark.slow
def test_processes_begin_on_fresh_nodes(empty: dict[str, Server]) -> None:
    """Processes that begin at once find the same table, and count together."""
    code = (
        "import sys\n"
        "from redishacks.router import Router\n"
        f"router = Router({urls(empty, 'abc')!r}, deadline=20)\n"
        "sys.stdin.readline()\n"
        "[router.incr(f'{i}') for i in range(50)]\n"
        "print([router.node_for(f'{i}') for i in range(50)])\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(8)
    ]
    told = []
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        told.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert len(set(told)) == 1
    with Router(urls(empty, "abc")).map() as m:
        counts = [m.get(f"{i}") for i in range(50)]
    assert [count.value for count in counts] == [b"8"] * 50


def contradictions(servers: dict[str, Server]) -> dict[str, tuple[Any, str]]:
    """Return what is not what `stored` has set up, and what of it is said."""
    given = urls(servers, "abc")
    weighted = {"url": given["b"], "weight": 2}
    return {
        "fewer": (urls(servers, "ab"), "it has node c, which is not given here"),
        "another": (urls(servers, "abd"), "it has node c, which is not given here"),
        "one": ({"b": weighted}, "it has node a, which is not given here; it has node c"),
        "weight": (given | {"b": given["b"], "a": {"url": given["a"], "weight": 5}},
                   "it has node a with weight 1, not 5"),
        "weights": (given | {"b": {"url": given["b"], "weight": 1}},
                    "it has node b with weight 2, not 1"),
        "swapped": (given | {"a": given["b"], "b": given["a"]}, "leads to node "),
        "in a ring": ({"a": given["b"], "b": given["c"], "c": given["a"]}, "leads to node "),
        "one for two": (given | {"c": given["a"]}, "the address of node c leads to node a"),
        "renamed": ({"x": given["a"], "b": given["b"], "c": given["c"]},
                    "the address of node x leads to node a"),
        "of another": (given | {"c": servers["d"].url}, "two topologies of version 1"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        "fewer",
        "another",
        "one",
        "weight",
        "weights",
        "swapped",
        "in a ring",
        "one for two",
        "renamed",
        "of another",
    ],
)
def test_who_contradicts_is_refused(colour: Routers, empty: dict[str, Server], what: str) -> None:
    """Other nodes, other weights or other addresses: refused before anything is written."""
    first = colour.router(urls(empty, "abc") | {"b": {"url": empty["b"].url, "weight": 2}})
    first.mset({f"{n}": n for n in range(30)})
    given, message = contradictions(empty)[what]
    if what == "of another":
        colour.router({"c": empty["d"].url}).set("other", 1)
    before = sizes(empty)
    wrong = colour.router(given)
    for call in (
        lambda: wrong.set("0", "wrong"),
        lambda: wrong.get("0"),
        lambda: wrong.mset({f"{n}": "wrong" for n in range(30)}),
        lambda: wrong.delete(*map(str, range(30))),
        lambda: wrong.ping(),
        wrong.connect,
    ):
        with pytest.raises(TopologyMismatchError, match=re.escape(message)):
            call()
    with wrong.map(on_error="return") as m:
        replies = m.incr("0"), m.get("1")
    assert {type(reply.error) for reply in replies} == {TopologyMismatchError}
    assert sizes(empty) == before
    assert first.mget([f"{n}" for n in range(30)]) == [b"%d" % n for n in range(30)]


def test_what_is_no_contradiction(colour: Routers, empty: dict[str, Server], prefix: str) -> None:
    """Addresses, passwords, order, weights not said and nodes not used yet move no key."""
    first = colour.router(urls(empty, "abc") | {"b": {"url": empty["b"].url, "weight": 2}})
    keys = [f"{prefix}:{n}" for n in range(50)]
    first.mset({key: key for key in keys})
    table = [first.node_for(key) for key in keys]
    assert table.count("b") > max(table.count("a"), table.count("c"))
    given = urls(empty, "abc")
    with (
        empty["a"].client() as admin,
        FaultProxy(empty["a"]) as elsewhere,
        FaultProxy(empty["c"], unix=True) as socket,
    ):
        admin.config_set("requirepass", "other")
        admin.auth("other")
        try:
            for other in (
                {"c": given["c"], "b": {"url": given["b"], "weight": 2.0}, "a": "pass"},
                given | {"a": "pass", "d": empty["d"].url},
                given | {"a": "pass", "c": socket.url},
                given | {"a": "pass", "b": given["b"].replace("127.0.0.1", "localhost")},
                {"a": f"redis://:other@127.0.0.1:{elsewhere.port}", "b": given["b"],
                 "c": colour.client(given["c"])},
            ):  # fmt: skip
                if other["a"] == "pass":
                    other["a"] = given["a"].replace("://", "://:other@")
                router = colour.router(other)
                assert router.mget(keys) == [key.encode() for key in keys]
                assert [router.node_for(key) for key in keys] == table
        finally:
            admin.config_set("requirepass", "")
    assert sizes(empty)["d"] == 0


def test_fresh_nodes_of_which_one_is_away(colour: Routers, empty: dict[str, Server]) -> None:
    """Nobody knows who has which keys before all were asked: unavailable, and nothing written."""
    with FaultProxy(empty["c"]) as proxy:
        proxy.refuse()
        router = colour.router(urls(empty, "ab") | {"c": proxy.url}, deadline=0.3)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="c cannot be reached"):
                router.set("a", 1)
        assert sum(sizes(empty).values()) == 0
        proxy.accept()
        assert eventually(lambda: shown(lambda: router.set("a", 1)) == ("value", True))


def test_a_known_node_is_away(colour: Routers, empty: dict[str, Server], prefix: str) -> None:
    """A client that begins while a node is away learns from the others, and serves their keys."""
    colour.router(urls(empty, "abc")).set(prefix, 1)
    with FaultProxy(empty["c"]) as proxy:
        proxy.refuse()
        router = colour.router(urls(empty, "ab") | {"c": proxy.url})
        router.connect()
        a, b, c = spread(router, prefix, "abc")
        assert router.incr(a) == router.incr(b) == 1
        with pytest.raises(UnavailableError, match=r"INCR(BY)? on c"):
            router.incr(c)
        assert [router.echo("x") for _ in range(20)] == [b"x"] * 20
        proxy.accept()
        assert eventually(partial(answers, router.incr, c)) == 1


def test_a_node_that_was_emptied(
    colour: Routers, empty: dict[str, Server], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told again by who notices, and serves again; not one call fails meanwhile."""
    router = colour.router(urls(empty, "abc"))
    router.connect()
    assert caplog.messages == []
    a, b, _ = spread(router, prefix, "abc")
    known = stamps(empty)
    router.mset({a: 1, b: 1})
    with empty["a"].client() as admin:
        admin.flushall()
    fresh = colour.router(urls(empty, "abc"))
    assert fresh.get(a) is None
    assert fresh.get(b) == b"1"
    assert stamps(empty) == known
    (warned,) = caplog.messages
    assert "node a had no stamp" in warned
    with empty["a"].client() as admin:
        admin.flushall()
    counts: list[int] = []

    def told() -> bool:
        counts.append(router.incr(a))
        with router.map() as m:
            again = m.get(a)
        return int(again.value) == counts[-1] and stamps(empty) == known

    eventually(told)
    assert counts == list(range(1, len(counts) + 1))
    assert router.get(b) == b"1"


def test_a_node_that_came_back_empty(colour: Routers, prefix: str) -> None:
    """Restarted without its data, it is told again; but by nobody while another one is away."""
    with nodes("a", "b", "c") as place:
        servers = place.servers
        router = colour.router(place.nodes(), deadline=0.5)
        router.connect()
        a, b, c = spread(router, prefix, "abc")
        router.mset({a: 1, b: 1, c: 1})
        known = stamps(servers)
        servers["a"].restart()
        assert eventually(lambda: shown(lambda: router.get(a)) == ("value", None))
        assert stamps(servers) == known
        servers["b"].kill()
        servers["a"].restart()
        late = colour.router(place.nodes(), deadline=0.5)
        for each in (router, late):
            with pytest.raises(UnavailableError):
                each.set(a, 2)
            with pytest.raises(UnavailableError):
                each.set(b, 2)
            assert eventually(partial(answers, each.get, c)) == b"1"
        with servers["a"].client() as client:
            assert client.dbsize() == 0
        servers["b"].restart()
        for key in (a, b):
            assert eventually(partial(answers, late.set, key, 3))
            # It may know the node as one that did not answer a moment ago.
            assert eventually(partial(answers, router.get, key)) == b"3"
        assert stamps(servers) == known


def test_a_newer_table_is_learned(colour: Routers, empty: dict[str, Server], prefix: str) -> None:
    """A client goes by a newer table without restart; a node that knows an older one is told."""
    given = urls(empty, "abc")
    router = colour.router(given)
    router.connect()
    a, *_ = keys = spread(router, prefix, "abc", 10)
    assert [router.explain(key).version for key in keys] == [1] * len(keys)
    old = SlotTable.fresh({"a": 1, "b": 1, "c": 1})
    newer = Topology(2, {}, old.changed({"b": 1, "c": 1}))
    for name in "ab":
        with empty[name].client() as client:
            client.hset(
                NODE_KEY,
                mapping={
                    "version": 2,
                    "stamp": str(newer.stamp(name)),
                    "topology": newer.dump(),
                },
            )

    def learned() -> bool:
        router.incr(a)
        return bool(router.explain(a).version == 2)

    eventually(learned)
    assert {router.node_for(key) for key in keys} == {"b", "c"}
    router.mset(dict.fromkeys(keys, 7))
    assert colour.router(given).mget(keys) == [b"7"] * len(keys)
    assert stamps(empty) == dict.fromkeys("abc", f"2 {newer.digest}")
    for name in "bc":
        with empty[name].client() as client:
            names = {each["name"] for each in client.client_list()}
        assert "rh-2" in names


def test_a_node_that_refuses_for_now(
    colour: Routers, empty: dict[str, Server], prefix: str
) -> None:
    """Of what a node refuses and has not done, the error names it; the others go on."""
    router = colour.router(urls(empty, "abc"), deadline=0.5)
    router.connect()
    a, b, _ = spread(router, prefix, "abc")
    router.mset({a: 1, b: 1})
    for _ in range(2):
        assert router.incr(a)
    with empty["a"].client() as admin:
        admin.config_set("maxmemory", 1)
        with pytest.raises(UnavailableError, match=r"SET on a: OOM"):
            router.set(a, 2)
        admin.config_set("maxmemory", 0)
        admin.replicaof("127.0.0.1", "1")
        try:
            for _ in range(2):
                with pytest.raises(UnavailableError, match="READONLY"):
                    router.set(a, 2)
                assert router.set(b, 2)
        finally:
            admin.replicaof("NO", "ONE")
        assert eventually(partial(answers, router.set, a, 3))
        assert admin.get(a) == b"3"


def test_two_databases_of_one_server(colour: Routers, empty: dict[str, Server]) -> None:
    """Databases of one server are nodes as well."""
    router = colour.router({"a": f"{empty['a'].url}/0", "b": f"{empty['a'].url}/1"})
    router.mset({f"{n}": n for n in range(30)})
    assert router.mget([f"{n}" for n in range(30)]) == [b"%d" % n for n in range(30)]
    with empty["a"].client(db=1) as second:
        assert second.dbsize() > 5
        second.flushall()


def test_passwords_are_in_no_message(colour: Routers, empty: dict[str, Server]) -> None:
    """Not of a node that is away, or refuses the password, or the user."""
    with empty["a"].client() as admin:
        admin.execute_command("ACL", "SETUSER", "poor", "on", ">secret", "~*", "+@read", "+@write")
        given = urls(empty, "bc")
        try:
            for url, expected, message in (
                (empty["a"].url.replace("://", "://poor:secret@"), ServerError, "NOPERM"),
                (empty["a"].url.replace("://", "://poor:secret2@"), UnavailableError, "WRONGPASS"),
                ("redis://:secret@127.0.0.1:1", UnavailableError, "node a cannot be reached"),
            ):
                router = colour.router(given | {"a": url}, deadline=0.5)
                with pytest.raises(expected, match=message) as failed:
                    router.set("a", 1)
                shown = "".join(traceback.format_exception(failed.value))
                assert "secret" not in shown.replace('"secret"', "")
                assert "secret" not in repr(router)
        finally:
            admin.acl_deluser("poor")


# Other tools take a router as their client


def test_counters(backend: Backend, prefix: str) -> None:
    """One hot counter is spread over all nodes, and a flush collects what each of them has."""
    colour = backend.colour
    hits = colour.counter(backend.client(), "hits", prefix=prefix, partitions=8)
    for n in range(100):
        hits.incr(f"/{n}", n)
    hits.incr_many({f"/{n}": 1 for n in range(200)})
    assert backend.holders(f"{prefix}:c1:*") == set(backend.servers)
    other = colour.counter(backend.client(), "hits", prefix=prefix, partitions=8, linger=30)
    other.incr("/99")
    other.close()
    assert hits.pending("/99") == 101
    assert other.top(1) == [("/99", 101)]
    sink = MemorySink()
    report = colour.job(other, sink, chunk=7).run()
    assert (report.amount, report.rows) == (sum(range(100)) + 201, 200)
    assert sum(row["amount"] for row in sink.rows.values()) == report.amount
    assert hits.pending("/99") == 0


def test_rate_limits(backend: Backend, prefix: str) -> None:
    """Each key's limit is kept on its node, and is the same for all clients."""
    limit = ratelimit.Limit(3, 3600)
    first, second = (
        backend.colour.limiter(backend.client(), "api", limit, prefix=prefix, deny_cache=False)
        for _ in range(2)
    )
    keys = [f"user:{n}" for n in range(40)]
    assert all(decision.allowed for decision in first.hit_many(keys))
    assert backend.holders(f"{prefix}:*") == set(backend.servers)
    for key in keys[:5]:
        assert [limiter.hit(key).remaining for limiter in (second, first)] == [1, 0]
        assert not second.hit(key).allowed
    assert second.peek(keys[9]).remaining == 2


def test_locks(backend: Backend, prefix: str) -> None:
    """A lock is held on its node, and whoever waits for it is woken up when it is given back."""
    colour = backend.colour
    names = [f"lock:{n}" for n in range(20)]
    options: Any = {"prefix": prefix, "ttl": 60}
    held = [
        colour.tool(locks, "Lock", backend.client(), name, **options).acquire() for name in names
    ]
    assert backend.holders(f"{prefix}:*") == set(backend.servers)
    for name in names:
        with pytest.raises(locks.LockedError):
            colour.tool(locks, "Lock", backend.client(), name, **options).acquire()
    for each in held:
        colour.run(each.release())


def hand_over(backend: Backend, prefix: str, name: str) -> None:
    """Let two hold a lock in turn, ten times each; nobody waits for a lease to end."""
    order: list[str] = []
    options: Any = {"prefix": prefix, "ttl": 60, "wait": 30}

    def work(who: str) -> None:
        lock = locks.Lock(backend.client(), name, **options)
        for _ in range(10):
            with lock:
                order.append(who)

    async def work_async(who: str) -> None:
        lock = locks.AsyncLock(backend.client(), name, **options)
        for _ in range(10):
            async with lock:
                order.append(who)
                await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(work_async("a"), work_async("b"))

    if backend.colour.runner:
        backend.colour.run(both())
    else:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, "ab"))
    assert sorted(order) == ["a"] * 10 + ["b"] * 10


def test_waiting_for_locks(backend: Backend, prefix: str) -> None:
    """Whoever waits is woken up by the node of the lock, whichever that is."""
    began = time.monotonic()
    for tag in backend.keys(prefix):
        hand_over(backend, prefix, tag)
    assert time.monotonic() - began < 30


def test_time_series(backend: Backend, prefix: str) -> None:
    """Series are spread over the nodes, and read and listed as one."""
    colour = backend.colour
    now = time.time()
    hits = colour.tool(timeseries, "TimeSeries", backend.client(), "hits", prefix=prefix,
                       partitions=8, deadline=PATIENT)  # fmt: skip
    names = [f"page:{n}" for n in range(60)]
    for n, name in enumerate(names):
        hits.incr(name, n)
    hits.incr_many([(name, 1, now) for name in names])
    assert backend.holders(f"{prefix}:t1:*") == set(backend.servers)
    other = colour.tool(timeseries, "TimeSeries", backend.client(), "hits", prefix=prefix,
                        partitions=8, deadline=PATIENT)  # fmt: skip
    sums = other.sums(names, now - 3600)
    assert {name: int(total) for name, total in sums.items()} == {
        name: n + 1 for n, name in enumerate(names)
    }
    target = other.target if colour.runner else other
    assert sorted(colour.listed(target.keys())) == sorted(names)
