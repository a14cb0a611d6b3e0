"""The same rate limits on every server, through every client: one story, told everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio

from redishacks._slots import key_slot
from redishacks.errors import MaybeAppliedError, RedisHacksError, UnavailableError
from redishacks.ratelimit import (
    AsyncConcurrencyLimiter,
    Ban,
    ConcurrencyLimiter,
    Limit,
    RateLimitedError,
)
from redishacks.testing import Cluster, serve, servers_available, valkey_sentinel
from tests.helpers import Colour, Facade, eventually

ALGORITHMS = ("window", "fixed", "gcra", "log")


class Anywhere(Colour):
    """Makes clients, rate limiters and concurrency limiters of one colour."""

    @property
    def module(self) -> Any:
        """redis-py, of this colour."""
        return redis.asyncio if self._runner else redis

    def fake(self, **options: Any) -> Callable[[], Any]:
        """Return what makes clients of one fake server."""
        kind: Any = fakeredis.FakeAsyncRedis if self._runner else fakeredis.FakeRedis
        server = fakeredis.FakeServer()
        return lambda: kind(server=server, **options)

    def places(self, client: Any, name: str, amount: int, **options: Any) -> Any:
        """Return a concurrency limiter of this colour."""
        if self._runner:
            return Facade(AsyncConcurrencyLimiter(client, name, amount, **options), self._runner)
        return ConcurrencyLimiter(client, name, amount, **options)

    def slot(self, places: Any, key: str = "") -> Any:
        """Return a place that is held."""
        slot = places.acquire(key)
        return Facade(slot, self._runner) if self._runner else slot

    def shut(self, limiter: Any, client: Any) -> None:
        """Close the connections of a limiter, and those of its client."""
        if self._runner:
            self._runner.run(limiter.target.transport.aclose())
            self._runner.run(client.aclose())
        else:
            limiter.transport.close()
            client.close()


@pytest.fixture
def colour(flavour: str) -> Iterator[Anywhere]:
    """Both colours, with one test body."""
    made = Anywhere(flavour)
    yield made
    made.close()


def story(colour: Anywhere, make: Callable[[], Any], prefix: str) -> None:
    """Use every method once; what one client took, another one finds."""
    client = make()
    options: Any = {"prefix": prefix, "deadline": 5, "tag": "name"}
    for algorithm in ALGORITHMS:
        limit = Limit(4, 3600, algorithm=algorithm)
        limiter = colour.limiter(client, "api", limit, **options)
        first = limiter.hit("u", 3)
        assert (first.allowed, first.remaining, first.source) == (True, 1, "redis")
        refused = limiter.hit("u", 2)
        assert (refused.allowed, refused.remaining) == (False, 1)
        assert 0 < refused.retry_after <= 3800
        assert limiter.hit("u", 2).source == "deny"
        other = colour.limiter(make(), "api", limit, **options)
        assert other.peek("u").remaining == 1
        assert limiter.refund(first, 2) == 2
        assert other.hit("u", 2).allowed
        assert [d.allowed for d in limiter.hit_many(["u", "v", "u"])] == [True, True, False]
        limiter.reset("u")
        assert other.peek("u").remaining == 4
        assert limiter.wait("u", 4, timeout=0).allowed
        limiter.close()
        colour.shut(other, client)
    assert dict(limiter.top()) == {"u": 3 * len(ALGORITHMS)}
    mixed = [Limit(2, 3600, name="user"), Limit(9, 1800, algorithm="log", name="ip")]
    banning = colour.limiter(client, "mixed", *mixed, ban=Ban(2, 60), deny_cache=False, **options)
    key = {"user": "u1", "ip": "10.0.0.1"}
    decisions = [banning.hit(key) for _ in range(4)]
    assert [d.allowed for d in decisions] == [True, True, False, False]
    assert isinstance(decisions[-1].refused_by[-1].limit, Ban)
    leasing = colour.limiter(client, "leased", Limit(100, 3600), lease=10, **options)
    assert [leasing.hit("u").source for _ in range(11)] == ["redis", *["lease"] * 9, "redis"]
    colour.reserve(leasing, "w", 5, 2)
    leasing.close()
    assert leasing.peek("u").remaining == 89
    assert leasing.peek("w").remaining == 98
    places = colour.places(client, "render", 1, prefix=prefix, deadline=5)
    slot = colour.slot(places, "u")
    with pytest.raises(RateLimitedError):
        colour.slot(places, "u")
    assert slot.renew()
    assert [holder.token for holder in places.holders("u")] == [slot.token]
    slot.release()
    assert places.peek("u").allowed
    for limiter in (banning, leasing, places):
        colour.shut(limiter, client)


@pytest.mark.parametrize("binary", servers_available(), ids=lambda binary: binary.kind)
def test_on_every_server(colour: Anywhere, binary: Any, prefix: str) -> None:
    """Valkey, the oldest Redis that is supported, and whatever Redis the machine has."""
    with serve(binary) as server:
        story(colour, lambda: colour.client(server.url), prefix)


def test_on_a_cluster(colour: Anywhere, cluster: Cluster, prefix: str) -> None:
    """With all keys of a limiter in one slot, whatever is said goes to its node."""
    host, port = cluster.startup_nodes[0]
    story(colour, lambda: colour.module.RedisCluster(host=host, port=port), prefix)


def test_a_key_alone_goes_to_its_own_node(colour: Anywhere, cluster: Cluster, prefix: str) -> None:
    """Without a common slot every method works for one key, with its ban, wherever it lies."""
    host, port = cluster.startup_nodes[0]
    client = colour.module.RedisCluster(host=host, port=port)
    options: Any = {"prefix": prefix, "deadline": 5, "ban": Ban(100, 60)}
    limiter = colour.limiter(client, "api", Limit(10, 3600), lease=4, **options)
    keys = [f"u{n}" for n in range(12)]
    for key in keys:
        decision = limiter.hit(key)
        assert limiter.hit(key).source == "lease"
        assert limiter.refund(decision) == 1
        colour.reserve(limiter, key, 3, 1)
    limiter.close()
    assert [limiter.peek(key).remaining for key in keys] == [8] * len(keys)
    assert all(limiter.wait(key, 8, timeout=0).allowed for key in keys)
    assert not any(d.allowed for d in limiter.hit_many(keys))
    limiter.close()
    assert dict(limiter.top(100)) == dict.fromkeys(keys, 1)
    slots = [key_slot(f"{prefix}:r1:{{api/{key}}}:ban".encode()) for key in keys]
    assert len({cluster.node_of(slot) for slot in slots}) > 1
    colour.shut(limiter, client)


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": 2},
        {"protocol": 3},
        {"protocol": 2, "decode_responses": True},
        {"protocol": 3, "decode_responses": True, "encoding": "latin-1"},
    ],
    ids=str,
)
def test_however_the_client_reads(
    colour: Anywhere, valkey: Any, prefix: str, options: dict[str, Any]
) -> None:
    """RESP2, RESP3 and decoding are the user's business: the decisions are the same."""
    story(colour, lambda: colour.client(valkey.url, **options), prefix)


def test_urls_of_every_sort(colour: Anywhere, valkey: Any, prefix: str) -> None:
    """A URL over TCP or a unix socket, of the same database."""
    limiters = [
        colour.limiter(url, "api", Limit(3, 3600), prefix=prefix, deadline=5)
        for url in (valkey.url, valkey.unix_url)
    ]
    assert [limiter.hit("u").remaining for limiter in limiters] == [2, 1]


# fakeredis


@pytest.mark.parametrize("options", [{}, {"protocol": 3}, {"decode_responses": True}], ids=str)
def test_in_a_users_unit_test(colour: Anywhere, prefix: str, options: dict[str, Any]) -> None:
    """fakeredis with Lua stands in for a server; nothing of it is evidence of ours."""
    story(colour, colour.fake(**options), prefix)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_time_passes_in_a_users_unit_test(colour: Anywhere, prefix: str, algorithm: str) -> None:
    """A fake server's clock is the machine's: a place comes back when the decision says."""
    limit = Limit(2, 0.3, algorithm=algorithm)
    limiter = colour.limiter(colour.fake()(), "api", limit, prefix=prefix, deadline=5)
    assert limiter.hit("u", 2).allowed
    refused = limiter.hit("u")
    if not refused.allowed:  # else a fixed window has just ended
        assert refused.retry_after <= 0.31
        colour.sleep(refused.retry_after)
        assert limiter.hit("u").allowed


@pytest.mark.parametrize("options", [{}, {"protocol": 3}, {"decode_responses": True}], ids=str)
def test_places_in_a_users_unit_test(
    colour: Anywhere, prefix: str, options: dict[str, Any]
) -> None:
    """A concurrency limiter works on fakeredis: places, leases, renewals, a wait."""
    make = colour.fake(**options)
    client = make()
    short: Any = {"prefix": prefix, "lease": 0.2, "deadline": 5}
    places = colour.places(client, "render", 2, **short)
    slots = [colour.slot(places), colour.slot(places)]
    with pytest.raises(RateLimitedError) as caught:
        colour.slot(colour.places(make(), "render", 2, **short))
    assert caught.value.decision.retry_after is not None
    assert 0 < caught.value.decision.retry_after <= 0.2
    slots[0].release()
    assert places.peek().remaining == 1
    assert slots[1].renew()
    end = time.monotonic() + 10
    while places.holders() and time.monotonic() < end:
        colour.sleep(0.01)
    assert not slots[1].renew()
    assert slots[1].lost
    third = colour.slot(places)
    assert places.peek().remaining == 1
    places.reset()
    assert not third.renew()
    colour.shut(places, client)


# Sentinel


def test_through_sentinel(colour: Anywhere, prefix: str) -> None:
    """The master that Sentinel names; after a failover the next one, with all that was used."""
    with valkey_sentinel() as setup:
        sentinel = colour.module.sentinel.Sentinel(setup.sentinels)
        client = sentinel.master_for(setup.service)
        limits = (Limit(10, 3600), Limit(10, 3600, algorithm="gcra"))
        limiter = colour.limiter(client, "api", *limits, prefix=prefix, deadline=2)
        lenient = colour.limiter(
            client, "api", *limits, prefix=prefix, deadline=0.2, on_error="allow"
        )
        places = colour.places(client, "render", 1, prefix=prefix, lease=600, deadline=2)
        slot = colour.slot(places)
        before = limiter.hit("u", 4)
        assert before.remaining == 6
        eventually(lambda: _replicated(setup))
        old = setup.primary.port
        setup.failover()
        assert setup.primary.port != old
        degraded = lenient.hit("v")  # never an error; perhaps the old connection is found cut
        assert degraded.allowed

        def hit(key: str, cost: int = 1) -> Any:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                try:
                    return limiter.hit(key, cost)
                except (UnavailableError, MaybeAppliedError):
                    colour.sleep(0.05)
            raise AssertionError("not within 20 s")

        hit("other")
        after = limiter.peek("u")
        assert after.source == "redis"
        # Read-only for a moment, it may have refused; a hit is never repeated blindly.
        assert [verdict.remaining for verdict in after.each] == [6, 6]
        assert limiter.hit("u", 6).allowed
        assert not limiter.hit("u").allowed
        with setup.primary.client() as new:
            assert any(b"{api/u}" in key for key in new.keys(f"{prefix}:*"))
        assert limiter.refund(before) == 4
        assert limiter.peek("u").remaining == 4
        end = time.monotonic() + 20
        while lenient.hit("w").degraded and time.monotonic() < end:
            colour.sleep(0.05)
        assert not lenient.hit("w").degraded
        # A place that was held is held on the new master, until it is released there.
        assert not places.peek().allowed
        assert slot.renew()
        slot.release()
        assert places.peek().allowed


def test_during_a_failover(colour: Anywhere, prefix: str) -> None:
    """Every decision in the middle of it is made, by Redis or as `on_error` says, in time."""
    with valkey_sentinel() as setup:
        sentinel = colour.module.sentinel.Sentinel(setup.sentinels)
        client = sentinel.master_for(setup.service)
        limiter = colour.limiter(
            client, "api", Limit(1000, 3600), prefix=prefix, deadline=0.2, on_error="local",
            local_share=0.5,
        )  # fmt: skip
        assert limiter.hit("u").source == "redis"
        eventually(lambda: _replicated(setup))
        setup.primary.kill()
        sources = []
        end = time.monotonic() + 30
        while time.monotonic() < end:
            began = time.monotonic()
            decision = limiter.hit("u")
            assert time.monotonic() - began < 3
            assert decision.allowed
            assert decision.degraded == (decision.source == "local")
            sources.append(decision.source)
            if len(sources) > 1 and sources[-1] == "redis" and "local" in sources:
                break
            colour.sleep(0.02)
        assert sources[0] == "local"
        assert sources[-1] == "redis"
        by_redis = 1 + sources.count("redis")
        used = 1000 - limiter.peek("u").remaining
        # One whose reply was lost may have counted too.
        assert by_redis <= used <= by_redis + 1
        assert limiter.counts().degraded == sources.count("local")


def test_a_replica_is_not_asked(colour: Anywhere, prefix: str) -> None:
    """A client of a replica gets a clear error, not decisions that nobody else sees."""
    with valkey_sentinel() as setup:
        limiter = colour.limiter(
            setup.replica.url, "api", Limit(10, 3600), prefix=prefix, deadline=2
        )
        with pytest.raises(RedisHacksError, match=r"(?i)read.?only"):
            limiter.hit("u")


def _replicated(setup: Any) -> bool:
    with setup.primary.client() as client:
        offsets: Any = client.info("replication")
        return bool(offsets["slave0"]["offset"] == offsets["master_repl_offset"])
