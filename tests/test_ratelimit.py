"""`RateLimiter` on real servers: every method, in both colours."""

from __future__ import annotations

import asyncio
import pickle
import time
from typing import Any

import pytest

from redishacks.errors import UsageError
from redishacks.ratelimit import (
    AsyncRateLimiter,
    Ban,
    CostError,
    Limit,
    RateLimitedError,
    RateLimiter,
)
from redishacks.testing import Server
from tests.helpers import Colour, eventually

ALGORITHMS = ("window", "fixed", "gcra", "log")


@pytest.fixture
def url(valkey: Any) -> str:
    """The session's server."""
    return str(valkey.url)


# Hits


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_hit_says_all_there_is_to_know(
    colour: Colour, url: str, prefix: str, algorithm: str
) -> None:
    """Three pass, the fourth is refused; each decision has its figures, from one command."""
    limiter = colour.limiter(url, "api", Limit(3, 60, algorithm=algorithm), prefix=prefix)
    decisions = [limiter.hit("u1") for _ in range(4)]
    assert [d.allowed for d in decisions] == [True, True, True, False]
    assert [d.remaining for d in decisions] == [2, 1, 0, 0]
    assert all(d.limit == 3 and d.source == "redis" and not d.degraded for d in decisions)
    assert [d.retry_after for d in decisions[:3]] == [0.0] * 3
    refused = decisions[3]
    assert 0 < refused.retry_after <= refused.reset_after <= 62.1
    assert bool(decisions[0])
    assert not bool(refused)
    assert limiter.hit("u2").remaining == 2


def test_one_command_per_decision(quiet: Server, prefix: str) -> None:
    """A decision on three limits is one EVALSHA, refused or not."""
    limits = (Limit(2, 60), Limit(3, 600), Limit(9, 60, algorithm="gcra"))
    limiter = RateLimiter(quiet.url, "api", *limits, prefix=prefix, deny_cache=False)
    limiter.hit("u")
    with quiet.client() as client:
        before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        for _ in range(5):
            limiter.hit("u")
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 5


def test_several_limits_all_or_none(colour: Colour, url: str, prefix: str) -> None:
    """What one limit refuses is charged to no other; the decision names the one that refused."""
    limits = (Limit(2, 60), Limit(5, 600, algorithm="log"), Limit(9, 60, algorithm="gcra"))
    limiter = colour.limiter(url, "api", *limits, prefix=prefix, deny_cache=False)
    decisions = [limiter.hit("u") for _ in range(4)]
    assert [d.allowed for d in decisions] == [True, True, False, False]
    assert [v.remaining for v in decisions[3].each] == [0, 3, 7]
    assert [v.limit for v in decisions[3].refused_by] == [limits[0]]
    assert decisions[3].tightest.limit == limits[0]
    assert decisions[0].limit == 2


def test_parts_of_a_key(colour: Colour, url: str, prefix: str) -> None:
    """Each limit counts the part of its name; one without a name counts every part."""
    limits = (Limit(2, 60, name="user"), Limit(3, 60, name="ip"), Limit(100, 1))
    limiter = colour.limiter(url, "api", *limits, prefix=prefix, tag="name")
    assert [limiter.hit({"user": "u1", "ip": "a"}).allowed for _ in range(3)] == [1, 1, 0]
    assert limiter.hit({"user": "u2", "ip": "a"}).allowed
    refused = limiter.hit({"user": "u3", "ip": "a"})
    assert [v.part for v in refused.refused_by] == ["ip"]
    assert len(refused.each) == 4
    assert limiter.hit({"user": "u3", "ip": "b"}, {"user": 2, "ip": 1}).each[0].remaining == 0
    with pytest.raises(UsageError, match="limit 'ip' has no part of the key: the parts are user"):
        limiter.hit({"user": "u1"})


def test_costs(colour: Colour, url: str, prefix: str) -> None:
    """A heavier hit takes more; one above the limit is an error, not a refusal for ever."""
    limiter = colour.limiter(url, "api", Limit(10, 60), prefix=prefix)
    assert limiter.hit("u", 3).remaining == 7
    refused = limiter.hit("u", 8)
    assert (refused.allowed, refused.remaining) == (False, 7)
    assert limiter.hit("u", 7).allowed
    with pytest.raises(CostError, match="a cost of 11 is above a limit of 10"):
        limiter.hit("u", 11)


@pytest.mark.parametrize("cost", [0, -1, 1.5, True, "1", None])
def test_bad_costs(url: str, prefix: str, cost: Any) -> None:
    """A cost is a positive int."""
    with pytest.raises(CostError, match="a cost is a positive int"):
        RateLimiter(url, "api", Limit(10, 60), prefix=prefix).hit("u", cost)


@pytest.mark.parametrize(
    "key",
    ["a{b}c", "nul\0", "line\nbreak", "%41", "/", "|x/y", "ü", b"\xff\xfe", 42, " ", "x" * 2048],
)
def test_odd_keys(colour: Colour, url: str, prefix: str, key: Any) -> None:
    """A key may hold anything; each counts for itself."""
    limiter = colour.limiter(url, "api", Limit(2, 60), prefix=prefix)
    assert limiter.hit(key).remaining == 1
    assert limiter.hit(key).remaining == 0
    assert not limiter.hit(key).allowed
    assert limiter.hit("other").remaining == 1


@pytest.mark.parametrize("key", ["", b"", "x" * 1_000_000, None, 1.5, True, ["a"], "\ud800", {}])
def test_bad_keys(url: str, prefix: str, key: Any) -> None:
    """What is no key is refused with a clear error."""
    with pytest.raises(UsageError, match="key"):
        RateLimiter(url, "api", Limit(2, 60), prefix=prefix).hit(key)


def test_keys_never_meet(url: str, prefix: str) -> None:
    """Limiters, parts and keys that look alike are told apart."""
    some = [
        RateLimiter(url, name, Limit(1, 60), prefix=prefix).hit(key)
        for name, key in (
            ("a", "b/c"), ("a/b", "c"), ("a|b", "c"), ("a", "|b/c"), ("a", {"b": "c"}),
            ("a", "b|c"), ("a%2Fb", "c"), ("a", {"b/c": "d"}), ("a", {"b": "c/d"}),
        )
    ]  # fmt: skip
    assert all(decision.allowed for decision in some)


@pytest.mark.parametrize(
    "text",
    ["", "20", "20/", "/minute", "twenty/minute", "20/fortnight", "20 minutes", "-1/s", 20, None],
)
def test_texts_that_are_no_limit(text: Any) -> None:
    """The error shows what is understood."""
    with pytest.raises(UsageError, match='is no limit: say "20/minute", "5/10s"'):
        Limit.parse(text)


@pytest.mark.parametrize(
    ("text", "amount", "per"),
    [
        ("20/minute", 20, 60), ("5/10s", 5, 10), ("100 per 2 hours", 100, 7200),
        ("1/day", 1, 86_400), ("1_000/h", 1000, 3600), ("3/500ms", 3, 0.5),
        ("7 / 1.5 minutes", 7, 90), ("1/week", 1, 604_800),
    ],
)  # fmt: skip
def test_texts_of_limits(text: str, amount: int, per: float) -> None:
    """Limits may be written as people say them."""
    assert Limit.parse(text) == Limit(amount, per)


def test_no_limit_and_none_at_all(colour: Colour, prefix: str) -> None:
    """Limit 0 refuses and None allows, without asking Redis."""
    nowhere = "redis://127.0.0.1:1"
    none = colour.limiter(nowhere, "api", Limit(0, 60), prefix=prefix).hit("u")
    assert (none.allowed, none.retry_after, none.limit) == (False, None, 0)
    free = colour.limiter(nowhere, "api", Limit(None, 60), prefix=prefix).hit("u")
    assert (free.allowed, free.limit, free.remaining) == (True, None, None)


def test_limits_may_change(colour: Colour, url: str, prefix: str) -> None:
    """A limit per call, by the user's plan, keeps what was used, up and down, over any width."""
    limiter = colour.limiter(url, "api", Limit(2, 60), prefix=prefix, deny_cache=False)
    for _ in range(2):
        assert limiter.hit("u").allowed
    assert not limiter.hit("u").allowed
    assert limiter.hit("u", limits=Limit(5, 60)).remaining == 2
    assert limiter.hit("u", 70_000, limits=[Limit(100_000, 60)]).remaining == 100_000 - 70_003
    assert not limiter.hit("u", limits=Limit(70_003, 60)).allowed
    assert limiter.hit("u", limits=Limit(70_004, 60)).allowed


# Looking, giving back


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_peek_takes_nothing(colour: Colour, url: str, prefix: str, algorithm: str) -> None:
    """Looking says what a hit would, and leaves no trace."""
    limiter = colour.limiter(url, "api", Limit(2, 60, algorithm=algorithm), prefix=prefix)
    assert limiter.peek("u").remaining == 2
    limiter.hit("u")
    for _ in range(3):
        assert limiter.peek("u").remaining == 1
    assert not limiter.peek("u", 2).allowed
    limiter.hit("u")
    assert not limiter.peek("u").allowed


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_refund(colour: Colour, url: str, prefix: str, algorithm: str) -> None:
    """A decision gives back at most what it took, in parts or whole, and once."""
    limiter = colour.limiter(url, "api", Limit(10, 60, algorithm=algorithm), prefix=prefix)
    other = limiter.hit("u", 3)
    decision = limiter.hit("u", 5)
    # Of a gcra, what has drained meanwhile is not given back: here parts of a millisecond.
    less = {0, 1} if algorithm == "gcra" else {0}
    assert limiter.refund(decision, 2) == 2
    assert 4 - limiter.peek("u").remaining in less
    assert limiter.refund(decision, 9) == 3
    assert limiter.refund(decision) == 0
    assert 7 - limiter.peek("u").remaining in less
    assert limiter.refund(other) == 3
    assert 10 - limiter.peek("u").remaining in less
    assert limiter.refund(other) == 0


def test_a_refund_is_for_what_was_taken(colour: Colour, url: str, prefix: str) -> None:
    """Refused, pickled and foreign decisions have nothing to give back."""
    limiter = colour.limiter(url, "api", Limit(1, 60), prefix=prefix)
    decision = limiter.hit("u")
    copy = pickle.loads(pickle.dumps(decision))
    assert copy[:8] == decision[:8]
    foreign = colour.limiter(url, "other", Limit(1, 60), prefix=prefix).hit("u")
    for wrong in (limiter.hit("u"), copy, foreign):
        with pytest.raises(UsageError, match="only a decision that this limiter allowed"):
            limiter.refund(wrong)
    for n in (0, -1, 1.5, True):
        with pytest.raises(UsageError, match="positive int"):
            limiter.refund(decision, n)


def test_a_refund_opens_the_door(colour: Colour, url: str, prefix: str) -> None:
    """A refusal that is remembered is forgotten when this process gives something back."""
    limiter = colour.limiter(url, "api", Limit(1, 60), prefix=prefix)
    decision = limiter.hit("u")
    assert not limiter.hit("u").allowed
    assert limiter.hit("u").source == "deny"
    limiter.refund(decision)
    assert limiter.hit("u").allowed
    assert not limiter.hit("u").allowed
    limiter.reset("u")
    assert limiter.hit("u").allowed


@pytest.mark.parametrize(
    ("one", "other"), [("é", "é".encode()), (-7, "-7"), (b"0", 0), ("7", b"7")]
)
def test_a_key_is_the_same_however_it_is_spelled(
    colour: Colour, url: str, prefix: str, one: Any, other: Any
) -> None:
    """A reset in one spelling forgets a refusal that is remembered in another."""
    limiter = colour.limiter(url, "api", Limit(1, 60), prefix=prefix)
    for key, spelled in ((one, other), (other, one)):
        limiter.reset(key)
        assert limiter.hit(key).allowed
        assert not limiter.hit(key).allowed
        limiter.reset(spelled)
        assert limiter.hit(key).allowed


def test_a_reset_ends_leases(colour: Colour, url: str, prefix: str) -> None:
    """Tokens that were taken before a reset are not spent after it, beside the whole limit."""
    limiter = colour.limiter(url, "api", Limit(20, 60), prefix=prefix, lease=10)
    assert limiter.hit("u").allowed
    limiter.reset("u")
    assert sum(limiter.hit("u").allowed for _ in range(40)) == 20


def test_a_reservation_is_settled(colour: Colour, url: str, prefix: str) -> None:
    """Too much is given back, too little is charged even beyond the limit, an error gives all."""
    limiter = colour.limiter(url, "api", Limit(10, 60), prefix=prefix)
    colour.reserve(limiter, "u", 6, 2)
    assert limiter.peek("u").remaining == 8
    with pytest.raises(ZeroDivisionError):
        colour.reserve(limiter, "u", 6, None, error=ZeroDivisionError())
    assert limiter.peek("u").remaining == 8
    colour.reserve(limiter, "u", 3, None)
    assert limiter.peek("u").remaining == 5
    colour.reserve(limiter, "u", 5, 9)
    refused = limiter.peek("u")
    assert (refused.allowed, refused.remaining) == (False, 0)
    with pytest.raises(RateLimitedError):
        colour.reserve(limiter, "u", 1, None)


def test_many_at_once(colour: Colour, url: str, prefix: str) -> None:
    """Many keys are decided each by itself, in one exchange."""
    limiter = colour.limiter(url, "api", Limit(2, 60), prefix=prefix)
    keys = ["a", "b", "a", "a", {"user": "a"}]
    decisions = limiter.hit_many(keys)
    assert [d.allowed for d in decisions] == [True, True, True, False, True]
    assert [d.source for d in limiter.hit_many(["a", "b"])] == ["deny", "redis"]
    assert limiter.hit_many([]) == []


# Faces


def test_the_error_says_what_is_used_up(url: str, prefix: str) -> None:
    """A context manager and a decorator raise, with the decision; the body does not run."""
    limiter = RateLimiter(url, "api", Limit(2, 60), prefix=prefix)
    calls = []

    @limiter.limit(key=lambda user, **_: f"user:{user}")
    def view(user: str, **_: Any) -> str:
        """Say hello."""
        calls.append(user)
        return f"hello {user}"

    assert view("u1") == "hello u1"
    assert view.__doc__ == "Say hello."
    with limiter("user:u1") as decision:
        assert decision.remaining == 0
    with pytest.raises(RateLimitedError, match=r"rate limit api of 2/60s for 'user:u1' is used up"):
        view("u1")
    with pytest.raises(RateLimitedError) as caught, limiter("user:u1"):
        pass
    assert not caught.value.decision.allowed
    assert calls == ["u1"]
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


@pytest.mark.parametrize("kind", [RateLimiter, AsyncRateLimiter])
def test_async_functions(url: str, prefix: str, kind: Any) -> None:
    """Both colours limit async functions."""

    async def main() -> None:
        limiter = kind(url, "api", Limit(1, 60), prefix=prefix)

        @limiter.limit(key="same", cost=lambda: 1)  # type: ignore[untyped-decorator]
        async def view() -> int:
            return 7

        assert await view() == 7
        with pytest.raises(RateLimitedError):
            await view()
        if kind is AsyncRateLimiter:
            async with limiter("other") as decision:
                assert decision.allowed
            with pytest.raises(RateLimitedError):
                async with limiter("other"):
                    raise AssertionError
            with pytest.raises(UsageError, match="is not async"):
                limiter.limit(key="k")(len)
            await limiter.aclose()

    asyncio.run(main())


# From memory


def test_a_refusal_is_repeated_from_memory(colour: Colour, valkey: Any, prefix: str) -> None:
    """Until it no longer holds nobody asks Redis, and the figures go on; cheaper hits do ask."""
    told: list[str] = []
    limiter = colour.limiter(
        valkey.url, "api", Limit(4, 60), prefix=prefix,
        on_command=lambda name, *_: told.append(name),
    )  # fmt: skip
    limiter.hit("u", 3)
    first = limiter.hit("u", 2)
    asked = [name for name in told if "note" not in name]  # what is noted in the background
    assert len(asked) == 2
    later = [limiter.hit("u", 2) for _ in range(50)]
    assert [name for name in told if "note" not in name] == asked
    assert not any(d.allowed for d in later)
    assert {d.source for d in later} == {"deny"}
    assert first.retry_after > later[-1].retry_after > 0
    assert limiter.hit("u", 1).allowed
    assert limiter.counts().refused == 51
    assert limiter.hit("u", 2, limits=Limit(9, 60)).allowed


def test_memory_lasts_no_longer_than_promised(url: str, prefix: str) -> None:
    """What is raised or reset elsewhere is seen within `deny_max`."""
    limiter = RateLimiter(url, "api", Limit(1, 60), prefix=prefix, deny_max=0.05)
    limiter.hit("u")
    assert not limiter.hit("u").allowed
    RateLimiter(url, "api", Limit(1, 60), prefix=prefix).reset("u")
    began = time.monotonic()
    eventually(lambda: limiter.hit("u").allowed)
    assert time.monotonic() - began < 5


def test_memory_never_outlasts_redis(url: str, prefix: str) -> None:
    """A hit is allowed as soon as Redis would, remembered or not."""
    limiter = RateLimiter(url, "api", Limit(1, 0.2, algorithm="gcra"), prefix=prefix)
    limiter.hit("u")
    refused = limiter.hit("u")
    assert refused.retry_after is not None
    time.sleep(refused.retry_after)
    assert limiter.hit("u").allowed


def test_refusals_from_memory_reach_the_statistics(colour: Colour, url: str, prefix: str) -> None:
    """What Redis has refused, and what memory has, is told once a second and at close."""
    limiter = colour.limiter(url, "api", Limit(1, 60), prefix=prefix)
    for key, times in (("a", 5), ("b", 3)):
        for _ in range(times):
            limiter.hit(key)
    limiter.close()
    assert limiter.top(10) == [("a", 4), ("b", 2)]
    limiter.close()
    assert limiter.top(1) == [("a", 4)]


# Bans, lists, shadow, near


def test_too_many_refusals_are_a_ban(colour: Colour, url: str, prefix: str) -> None:
    """After so many refusals everything is refused; the figures are those of the ban."""
    ban = Ban(3, 60, lasting=30, longest=100)
    limiter = colour.limiter(url, "api", Limit(2, 0.05), prefix=prefix, ban=ban, deny_cache=False)
    limiter.hit("u", 2)
    for _ in range(3):
        refused = limiter.hit("u", 2)
        colour.sleep(0.001)
    assert 25 < refused.retry_after <= 30
    assert refused.refused_by[-1].limit == ban
    assert "RateLimit" in refused.headers()
    colour.sleep(0.1)
    assert not limiter.hit("u").allowed
    assert limiter.hit("v").allowed
    limiter.reset("u")
    assert limiter.hit("u").allowed


def test_refusals_from_memory_count_for_a_ban(url: str, prefix: str) -> None:
    """A client that hammers at a refusal is banned, though Redis is not asked each time."""
    limiter = RateLimiter(url, "api", Limit(1, 60), prefix=prefix, ban=Ban(100, 60, lasting=600))
    limiter.hit("u")
    for _ in range(120):
        limiter.hit("u")
    limiter.close()
    decision = RateLimiter(url, "api", Limit(1, 60), prefix=prefix, ban=Ban(100, 60)).peek("u")
    assert decision.retry_after is not None
    assert decision.retry_after > 500


def test_lists(colour: Colour, prefix: str) -> None:
    """Keys and networks that are always allowed, or never, cost no question."""
    limiter = colour.limiter(
        "redis://127.0.0.1:1", "api", Limit(1, 60), prefix=prefix,
        allow=["root", "10.0.0.0/8", "2001:db8::/32"], deny=["evil", 7, "10.6.6.0/24"],
    )  # fmt: skip
    key: Any
    for key in ("root", "10.1.2.3", "::ffff:10.1.2.3", "2001:db8::1", b"root"):
        decision = limiter.hit(key)
        assert (decision.allowed, decision.source) == (True, "list"), key
    for key in ("evil", 7, "7", "10.6.6.6", {"user": "root", "ip": "10.6.6.6"}):
        assert not limiter.hit(key).allowed, key
    with pytest.raises(UsageError, match="is a list"):
        RateLimiter("redis://127.0.0.1:1", "api", Limit(1, 60), allow="root")


def test_shadow_mode_never_refuses(colour: Colour, url: str, prefix: str) -> None:
    """It decides and counts, and lets all pass."""
    limiter = colour.limiter(url, "api", Limit(2, 60), prefix=prefix, shadow=True)
    decisions = [limiter.hit("u") for _ in range(5)]
    assert all(d.allowed for d in decisions)
    assert [bool(d.refused_by) for d in decisions] == [False, False, True, True, True]
    assert limiter.counts() == (0, 3, 0)


def test_the_near_hook(colour: Colour, url: str, prefix: str) -> None:
    """It is called from a fraction of the limit on; its errors are its own."""
    seen: list[tuple[Any, int]] = []

    def warn(key: Any, decision: Any) -> None:
        seen.append((key, decision.remaining))
        raise ZeroDivisionError

    limiter = colour.limiter(url, "api", Limit(5, 60), prefix=prefix, near=(0.8, warn))
    for _ in range(6):
        limiter.hit("u")
    assert seen == [("u", 1), ("u", 0), ("u", 0)]
    for wrong in (0.8, (2, warn), (0.8, None), ("x", warn)):
        with pytest.raises(UsageError, match="near is"):
            RateLimiter(url, "api", Limit(5, 60), near=wrong)  # type: ignore[arg-type]


# What users may do besides


def own(limiter: Any) -> Any:
    """Return the limiter itself, whatever its colour."""
    return getattr(limiter, "target", limiter)


def test_limits_may_be_set(colour: Colour, url: str, prefix: str) -> None:
    """Other limits hold from the next hit on, for keys that were seen and refused as well."""
    limiter = colour.limiter(url, "api", Limit(2, 60), prefix=prefix)
    assert [limiter.hit("u").allowed for _ in range(4)] == [True, True, False, False]
    own(limiter).limits = Limit(5, 60)
    assert limiter.hit("u").remaining == 2
    own(limiter).limits = [Limit(5, 60), Limit(1, 3600)]
    assert [limiter.hit("u").allowed for _ in range(2)] == [True, False]
    with pytest.raises(UsageError, match="a limit is a Limit"):
        own(limiter).limits = 5


def test_limits_of_a_decorated_function(url: str, prefix: str) -> None:
    """Key, cost and limits may be made from the arguments of a call."""
    limiter = RateLimiter(url, "api", Limit(1, 60), prefix=prefix)
    plans = {"free": Limit(1, 3600), "paid": Limit(3, 3600)}

    @limiter.limit(
        key=lambda user, plan: user,
        cost=lambda user, plan: 1,
        limits=lambda user, plan: plans[plan],
    )
    def view(user: str, plan: str) -> str:
        return f"{user} {plan}"

    assert [view("u1", "paid") for _ in range(3)] == ["u1 paid"] * 3
    for user, plan in (("u1", "paid"), ("u1", "free")):
        with pytest.raises(RateLimitedError):
            view(user, plan)
    assert view("u2", "free") == "u2 free"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda limiter: limiter.hit("u", True), "a cost is"),
        (lambda limiter: limiter.hit("u", 1.0), "a cost is"),
        (lambda limiter: limiter.hit("u", {"users": 5}), "none named 'users'"),
        (lambda limiter: limiter.hit({1: "x"}), "parts of a key have names"),
        (lambda limiter: limiter.hit("u", limits=5), "a limit is a Limit"),
        (lambda limiter: limiter.hit("u", 10**30), "never allowed"),
        (lambda limiter: limiter.reserve("u", 1).settle(2**53), "an actual cost is"),
    ],
)
def test_what_a_hit_does_not_take(url: str, prefix: str, make: Any, error: str) -> None:
    """It is refused by name, also for a key that was hit before."""
    limiter = RateLimiter(url, "api", Limit(10, 60), prefix=prefix)
    limiter.hit("u")
    with pytest.raises(UsageError, match=error):
        make(limiter)
    assert limiter.peek("u").remaining == 9


async def _never_awaited(key: object, decision: object) -> None:
    """A hook that nobody could await."""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ban": 5}, "ban is a Ban"),
        ({"near": (0.8, _never_awaited)}, "not async"),
        ({"allow": None}, "allow is a list"),
        ({"deny": 5}, "deny is a list"),
        ({"deny": "10.0.0.1"}, "deny is a list"),
        ({"lease": 1}, "lease is"),
    ],
)
def test_options_that_cannot_be(url: str, options: Any, error: str) -> None:
    """They are refused when the limiter is made."""
    with pytest.raises(UsageError, match=error):
        RateLimiter(url, "api", Limit(10, 60), **options)


@pytest.mark.parametrize("algorithm", ["gcra", "log"])
def test_leases_are_not_for_every_algorithm(url: str, algorithm: str) -> None:
    """What has no sub-buckets cannot be leased, and says so."""
    with pytest.raises(UsageError, match=f"not for {algorithm}"):
        RateLimiter(url, "api", Limit(10, 60, algorithm=algorithm), lease=5)


def test_a_gcra_that_cannot_be_counted() -> None:
    """A debt that would not be exact is refused; a limit of 0 is a limit."""
    with pytest.raises(UsageError, match="a gcra cannot count a burst"):
        Limit(2**52, 60, algorithm="gcra")
    with pytest.raises(UsageError, match="a gcra cannot count a burst"):
        Limit(1, 366 * 86_400, algorithm="gcra", burst=1_000)
    assert Limit(0, 60, algorithm="gcra", strict=True).most == 1
    assert str(Limit(5, 366 * 86_400)) == "5/31622400s"
    assert str(Limit(5, 0.25)) == "5/0.25s"


def test_many_keys_of_any_kind_of_collection(colour: Colour, url: str, prefix: str) -> None:
    """A generator does as well."""
    limiter = colour.limiter(url, "api", Limit(3, 60), prefix=prefix)
    decisions = limiter.hit_many(f"u{n % 2}" for n in range(4))
    assert [d.remaining for d in decisions] == [2, 2, 1, 1]


def test_addresses_in_lists(url: str, prefix: str) -> None:
    """An address is the same however it is written."""
    deny = ["10.0.0.5", "2001:DB8::1", "10.1.0.0/16"]
    limiter = RateLimiter(url, "api", Limit(3, 60), prefix=prefix, deny=deny)
    for key in ("10.0.0.5", "::ffff:10.0.0.5", "2001:db8::1", "2001:db8:0::1", "10.1.2.3"):
        assert not limiter.hit(key).allowed, key
    with pytest.raises(RateLimitedError, match="lets nobody pass"), limiter("10.0.0.5"):
        raise AssertionError
    assert limiter.hit("10.0.0.50").allowed
    assert limiter.counts().refused == 6


# Headers


def test_headers_stay_within_what_fields_can_say(url: str, prefix: str) -> None:
    """Integers of 15 digits at most; a quota is no less than what is left of it."""
    limiter = RateLimiter(url, "api", Limit(2 * 10**15, 60), prefix=prefix)
    fields = limiter.hit("u").headers()
    assert fields["RateLimit-Policy"].split(";")[1] == "q=999999999999999"
    assert fields["RateLimit"].split(";")[1] == "r=999999999999999"
    burst = Limit(10, 1, algorithm="gcra", burst=50)
    fields = RateLimiter(url, "burst", burst, prefix=prefix).hit("u").headers(legacy=True)
    assert "q=10;" in fields["RateLimit-Policy"]
    assert "r=10;" in fields["RateLimit"]
    assert (fields["X-RateLimit-Limit"], fields["X-RateLimit-Remaining"]) == ("10", "10")


def test_a_refusal_names_one_time_to_come_again(url: str, prefix: str) -> None:
    """No limit names a time that is later than `Retry-After`, unless it refuses as well."""
    limiter = RateLimiter(url, "api", Limit(1, 2), Limit(500, 3600), prefix=prefix)
    limiter.hit("u")
    fields = limiter.hit("u").headers()
    short, long = fields["RateLimit"].split(", ")
    assert int(short.partition(";t=")[2]) <= int(fields["Retry-After"]) <= 3
    assert ";t=" not in long


def test_headers_of_leased_hits(url: str, prefix: str) -> None:
    """What is left goes down hit by hit, in every field."""
    limits = Limit(100, 600), Limit(1_000, 3600)
    limiter = RateLimiter(url, "api", *limits, prefix=prefix, lease=10)
    for n in range(1, 15):
        decision = limiter.hit("u")
        assert decision.source == ("lease" if n % 10 != 1 else "redis")
        fields = decision.headers(legacy=True)
        assert fields["X-RateLimit-Remaining"] == str(100 - n)
        assert [part.split(";")[1] for part in fields["RateLimit"].split(", ")] == [
            f"r={100 - n}",
            f"r={1_000 - n}",
        ]
    limiter.close()


def test_a_heavier_hit_gives_a_lease_back_first(colour: Colour, url: str, prefix: str) -> None:
    """Tokens that this process holds are no reason to refuse it."""
    limiter = colour.limiter(url, "api", Limit(100, 600), prefix=prefix, lease=100)
    assert limiter.hit("u").remaining == 99
    assert limiter.peek("u", 50).allowed
    assert limiter.hit("u", 50).remaining == 49
    assert limiter.hit("u", 50).allowed is False
    assert sum(limiter.hit("u").allowed for _ in range(80)) == 49


# Waiting


def test_a_wait_that_ends_well_was_no_refusal(colour: Colour, url: str, prefix: str) -> None:
    """Who waits for a place is not on the way to a ban, nor counted as refused."""
    limiter = colour.limiter(url, "api", Limit(1, 0.3), prefix=prefix, ban=Ban(2, 60), deadline=5)
    assert all(limiter.wait("u", timeout=30).allowed for _ in range(5))
    assert limiter.counts().refused == 0
    assert not limiter.wait("u", timeout=0).allowed
    assert limiter.counts().refused == 1


def test_who_gives_up_waiting_was_refused(colour: Colour, url: str, prefix: str) -> None:
    """Bans hear of it."""
    limiter = colour.limiter(
        url, "api", Limit(1, 600), prefix=prefix, ban=Ban(2, 60), deny_cache=False
    )
    limiter.hit("u")
    assert [limiter.wait("u", timeout=0).allowed for _ in range(2)] == [False, False]
    limiter.close()
    assert any(isinstance(verdict.limit, Ban) for verdict in limiter.peek("u").each)


def test_what_a_turn_says_when_it_comes(colour: Colour, url: str, prefix: str) -> None:
    """The figures are those of the moment when it passes, not of when it was taken."""
    limit = Limit(2, 1, algorithm="gcra", burst=1)
    limiter = colour.limiter(url, "api", limit, prefix=prefix, deadline=5)
    limiter.hit("u")
    decision = limiter.wait("u", timeout=30)
    assert decision.allowed
    assert decision.refused_by == ()
    assert 0 <= decision.reset_after <= 0.51
    assert decision.each[0].retry_after == 0
