"""`ConcurrencyLimiter`: never more than so many at once; places come back by themselves."""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import pytest
import redis

from redishacks._transport import connect
from redishacks.errors import UnavailableError, UsageError
from redishacks.ratelimit import (
    AsyncConcurrencyLimiter,
    AsyncSlot,
    ConcurrencyLimiter,
    Places,
    RateLimitedError,
    Slot,
)
from redishacks.ratelimit._places import slots_command
from redishacks.testing import Cluster, FaultProxy, Server, valkey_server
from tests.helpers import Colour, Facade, eventually
from tests.workers import pipe, start

pytestmark = pytest.mark.slow

START = 1_800_000_000_000_000
SECOND = 1_000_000


class Within:
    """An async context manager that looks sync, and so does what it gives."""

    def __init__(self, manager: Any, runner: asyncio.Runner) -> None:
        self._manager = manager
        self._runner = runner

    def __enter__(self) -> Any:
        return Facade(self._runner.run(self._manager.__aenter__()), self._runner)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.run(self._manager.__aexit__(kind, error, traceback))


class Limiter(Facade):
    """An async concurrency limiter that looks sync."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return Within(self.target(*args, **options), self._runner)

    def acquire(self, *args: Any, **options: Any) -> Any:
        """Get a place."""
        return Facade(self._runner.run(self.target.acquire(*args, **options)), self._runner)


class Colours(Colour):
    """Makes concurrency limiters of one colour."""

    def places(self, client: Any, name: str, amount: int | None, **options: Any) -> Any:
        """Return a concurrency limiter of this colour."""
        options.setdefault("deadline", 5)  # a busy machine may hold up anybody
        if self._runner:
            return Limiter(AsyncConcurrencyLimiter(client, name, amount, **options), self._runner)
        return ConcurrencyLimiter(client, name, amount, **options)


@pytest.fixture
def colour(flavour: str) -> Iterator[Colours]:
    """Both colours, with one test body."""
    made = Colours(flavour)
    yield made
    made.close()


@pytest.fixture
def url(valkey: Any) -> str:
    """The session's server."""
    return str(valkey.url)


# The script, at moments of our choice


class Row:
    """The places of one key, by a clock that is ours."""

    def __init__(self, url: str, prefix: str, most: int = 2) -> None:
        self.key = f"{prefix}:places".encode()
        self.most = most
        self.transport = connect(url)
        self.now = START

    def say(self, verb: str, token: str = "", lease: float = 30) -> Any:
        """Say something, now; the reply without its time."""
        micros = round(lease * SECOND)
        text = f"{micros}-{token}" if token else ""
        command = slots_command(self.key, verb, text, micros, self.most)
        command = command._replace(args=(*command.args, str(self.now)))
        reply = self.transport.call(command, 1.0)
        assert verb == "list" or reply[0] == self.now
        return reply if verb == "list" else reply[1:]

    def enter(self, token: str, lease: float = 30) -> bool:
        """Return whether it got in."""
        return bool(self.say("enter", token, lease)[0])

    def holders(self) -> list[str]:
        """Return who is in."""
        return [name.decode().split("-")[1] for name in self.say("list")[::2]]


@pytest.fixture
def row(url: str, prefix: str) -> Row:
    """Two places."""
    return Row(url, prefix)


def test_figures(row: Row) -> None:
    """Each reply says how many hold a place, when one is free at the latest, and when all are."""
    assert row.say("peek") == [0, 0, 0, 0, 0]
    assert row.say("enter", "a") == [1, 1, 0, 30 * SECOND, 30 * SECOND]
    row.now += 10 * SECOND
    assert row.say("enter", "b") == [1, 2, 20 * SECOND, 20 * SECOND, 30 * SECOND]
    refused = [0, 2, 20 * SECOND, 20 * SECOND, 30 * SECOND]
    assert row.say("enter", "c") == refused
    assert row.say("peek") == refused
    row.now += 20 * SECOND - 1
    assert not row.enter("c")
    row.now += 1
    assert row.say("peek") == [0, 1, 0, 10 * SECOND, 10 * SECOND]
    assert row.enter("c")
    assert row.holders() == ["b", "c"]


def test_fewer_places_than_holders(row: Row) -> None:
    """When the number is lowered, holders stay, and a place is free when enough leases ended."""
    row.most = 4
    for token in "abcd":
        assert row.enter(token)
        row.now += SECOND
    row.most = 2
    assert row.say("peek")[2] == 28 * SECOND  # the third of them ends
    row.now += 28 * SECOND - 1
    assert not row.enter("e")
    row.now += 1
    assert row.enter("e")
    row.most = 0
    assert row.say("peek")[2] == -1
    assert not row.enter("f")


def test_entering_again_is_the_same_place(row: Row) -> None:
    """A token that has a place keeps it, though all are taken; leaving twice frees no other."""
    assert row.enter("a")
    assert row.enter("b")
    assert row.enter("a")
    assert row.holders() == ["a", "b"]
    assert row.say("leave", "a")[:2] == [1, 1]
    assert row.say("leave", "a")[:2] == [0, 1]


def test_renewals(row: Row) -> None:
    """A lease begins anew, unless it has ended: then it stays lost, though there is room."""
    assert row.enter("a")
    row.now += 29 * SECOND
    assert row.say("renew", "a") == [1, 1, 0, 30 * SECOND, 30 * SECOND]
    row.now += 30 * SECOND
    assert row.say("renew", "a")[0] == 0
    assert row.say("renew", "stranger")[0] == 0
    assert row.holders() == []


def test_a_late_copy_of_an_abandoned_acquisition_takes_no_place(row: Row) -> None:
    """Who was given up does not get in for the time of a lease, whichever command comes first."""
    row.say("abandon", "a")
    row.now += 30 * SECOND - 1
    assert not row.enter("a")
    row.now += 1
    assert row.enter("a")
    assert row.say("abandon", "a")[:2] == [1, 0]
    assert not row.enter("a")
    assert row.say("renew", "a")[0] == 0
    assert row.enter("b")
    assert row.enter("c")
    assert row.holders() == ["b", "c"]


def test_a_clock_that_goes_back_locks_nobody_out(row: Row) -> None:
    """After a step back a lease lasts no longer than it is long, each by its own length."""
    row.now += 3600 * SECOND
    assert row.enter("long", 60)
    assert row.enter("short", 10)
    row.now -= 3600 * SECOND
    assert not row.enter("c", 1)
    row.now += 10 * SECOND
    assert row.enter("c", 1)
    assert row.holders() == ["c", "long"]
    row.now += 50 * SECOND
    assert row.holders() == []


def test_every_state_has_a_ttl(row: Row, valkey: Any) -> None:
    """The key goes with the last lease, the longest one; one without TTL is mended."""

    def ttl() -> float:
        return int(client.pttl(row.key)) / 1000

    with valkey.client() as client:
        row.enter("a", 100)
        assert 99 < ttl() <= 100
        row.enter("b", 10)
        assert 99 < ttl() <= 100
        row.now += 50 * SECOND
        row.say("renew", "a", 100)
        assert 99 < ttl() <= 100
        row.say("leave", "a", 100)
        assert row.enter("c", 5)
        assert 4 < ttl() <= 5
        row.say("abandon", "d", 200)
        assert 199 < ttl() <= 200
        row.enter("e", 300)
        client.persist(row.key)
        assert not row.enter("f")
        assert 299 < ttl() <= 300


# Places


def test_places(colour: Colours, url: str, prefix: str) -> None:
    """So many at once and no more, each key for itself; a place that is left is free at once."""
    render = colour.places(url, "render", 2, prefix=prefix)
    with render("u") as slot:
        assert (slot.decision.limit, slot.decision.remaining) == (2, 1)
        assert slot.decision.source == "redis"
        assert not slot.lost
        assert 29 < slot.remaining <= 30
        with render("u"):
            with pytest.raises(RateLimitedError) as caught, render("u"):
                raise AssertionError
            decision: Any = caught.value.decision
            assert (decision.allowed, decision.limit, decision.remaining) == (False, 2, 0)
            assert 29 < decision.retry_after <= decision.reset_after <= 30
            assert str(caught.value).startswith("rate limit render of 2 at once for 'u' is used up")
            with render("v"), render():
                pass
            assert not render.peek("u").allowed
        assert render.peek("u").remaining == 1
    assert slot.remaining == 0.0
    assert slot.released
    assert not slot.lost
    assert render.counts() == (1, 0, 0)
    assert render.holders("u") == []


def test_acquire_and_release(colour: Colours, url: str, prefix: str) -> None:
    """Places may be held without a block; releasing is done once and may be said again."""
    render = colour.places(url, "render", 2, prefix=prefix)
    first, second = render.acquire(), render.acquire()
    assert [holder.token for holder in render.holders()] == [first.token, second.token]
    assert all(29 < holder.remaining <= 30 for holder in render.holders())
    first.release()
    third = render.acquire()
    first.release()
    assert {holder.token for holder in render.holders()} == {second.token, third.token}
    assert not first.renew()
    assert "released" in repr(first.target if isinstance(first, Facade) else first)


def test_an_error_inside_gives_the_place_back(colour: Colours, url: str, prefix: str) -> None:
    """It goes on its way, and the place is free."""
    render = colour.places(url, "render", 1, prefix=prefix)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), render("u"):
            raise ZeroDivisionError


def test_one_command_in_and_one_out(quiet: Server, prefix: str) -> None:
    """Entering, leaving and looking are one EVALSHA each."""
    render = ConcurrencyLimiter(quiet.url, "render", 1, prefix=prefix)
    render.peek()
    with quiet.client() as client:
        before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        with render(), pytest.raises(RateLimitedError):
            render.acquire()
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 3


def test_the_number_may_change(colour: Colours, url: str, prefix: str) -> None:
    """At run time, for one call or from now on; 0 refuses and None allows without asking."""
    render = colour.places(url, "render", 1, prefix=prefix)
    slots = [render.acquire("u"), render.acquire("u", amount=2)]
    with pytest.raises(RateLimitedError):
        render.acquire("u", amount=2)
    core = render.target if isinstance(render, Facade) else render
    core.amount = 3
    slots.append(render.acquire("u"))
    core.amount = 1
    for slot in slots:
        assert not render.peek("u").allowed
        slot.release()
    assert render.peek("u").allowed
    nowhere = "redis://127.0.0.1:1"
    with pytest.raises(RateLimitedError) as caught:
        colour.places(nowhere, "render", 0, prefix=prefix).acquire("u", wait=None)
    assert caught.value.decision.retry_after is None
    free = colour.places(nowhere, "render", None, prefix=prefix)
    with free("u") as slot:
        assert slot.decision.limit is None
        assert slot.remaining == math.inf
        assert slot.renew()
        assert not slot.lost
    assert free.peek("u").allowed


def test_headers(url: str, prefix: str) -> None:
    """HTTP fields say that the limit counts what goes on at the same time."""
    render = ConcurrencyLimiter(url, "render", 2, prefix=prefix)
    with render() as slot, render():
        assert slot.decision.headers() == {
            "RateLimit-Policy": '"2 at once";q=2;qu="concurrent-requests"',
            "RateLimit": '"2 at once";r=1;t=30',
        }
        refused = render.peek()
        assert refused.headers()["Retry-After"] == "30"
        assert refused.tightest is not None
        assert refused.tightest.limit == Places(2)


def test_reset(colour: Colours, url: str, prefix: str) -> None:
    """All places are free at once; holders hear of it when they renew."""
    render = colour.places(url, "render", 1, prefix=prefix)
    slot = render.acquire("u")
    render.reset("u")
    with render("u"):
        assert not slot.renew()
        assert slot.lost
        slot.release()
        assert not render.peek("u").allowed


# Waiting


def test_waiting(colour: Colours, url: str, prefix: str) -> None:
    """A waiter gets the place when it is left; not longer than it wants to wait."""
    render = colour.places(url, "render", 1, prefix=prefix)
    holder = ConcurrencyLimiter(url, "render", 1, prefix=prefix).acquire("u")
    before = time.monotonic()
    with pytest.raises(RateLimitedError):
        render.acquire("u", wait=0.2)
    assert 0.2 <= time.monotonic() - before < 2
    timer = threading.Timer(0.2, holder.release)
    timer.start()
    before = time.monotonic()
    with render("u", wait=10):
        assert 0.15 < time.monotonic() - before < 3
    timer.join()


def test_waiting_for_a_lease_to_end(colour: Colours, url: str, prefix: str) -> None:
    """A place that nobody leaves is free when its lease ends; the one who had it hears of it."""
    render = colour.places(url, "render", 1, prefix=prefix, lease=0.3)
    slot = render.acquire("u")
    before = time.monotonic()
    with render("u", wait=None):
        assert 0.25 < time.monotonic() - before < 3
        assert slot.lost
        assert slot.remaining == 0
        assert not slot.renew()
        slot.release()
        assert slot.lost
        assert not render.peek("u").allowed


def work(
    redis_url: str, prefix: str, most: int, workers: int, turns: int, asynchronous: bool, pipe: Any
) -> None:
    """Take turns at a place; tell the most that were seen at once, and how many turns."""
    client = redis.Redis.from_url(redis_url)
    seen: list[int] = []

    def inside() -> None:
        seen.append(int(client.incr(f"{prefix}-gauge")))

    def outside() -> None:
        client.decr(f"{prefix}-gauge")

    def threads() -> None:
        render = ConcurrencyLimiter(redis_url, "render", most, prefix=prefix, deadline=5)

        def turn(_: int) -> None:
            with render("u", wait=60):
                inside()
                time.sleep(0.001)
                outside()

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(turn, range(workers * turns)))

    async def tasks() -> None:
        render = AsyncConcurrencyLimiter(redis_url, "render", most, prefix=prefix, deadline=5)

        async def worker() -> None:
            for _ in range(turns):
                async with render("u", wait=60):
                    inside()
                    await asyncio.sleep(0.001)
                    outside()

        await asyncio.gather(*(worker() for _ in range(workers)))

    if asynchronous:
        asyncio.run(tasks())
    else:
        threads()
    pipe.send((max(seen), len(seen)))


def test_never_more_than_so_many(flavour: str, url: str, prefix: str) -> None:
    """16 threads or tasks in each of 4 processes: never more at once, and all are served."""
    pipes = [pipe() for _ in range(4)]
    started = [
        start(work, url, prefix, 5, 16, 3, flavour == "async", theirs) for _, theirs in pipes
    ]
    told = []
    for ours, _ in pipes:
        assert ours.poll(120)
        told.append(ours.recv())
    for process in started:
        process.join(30)
    assert max(most for most, _ in told) == 5
    assert [turns for _, turns in told] == [16 * 3] * 4
    assert ConcurrencyLimiter(url, "render", 5, prefix=prefix).holders("u") == []


# Leases


def hold(redis_url: str, prefix: str, lease: float, pipe: Any) -> None:
    """Hold a place for ever, renewing its lease."""
    render = ConcurrencyLimiter(redis_url, "render", 1, prefix=prefix, lease=lease, renew=True)
    with render("u") as slot:
        while True:
            pipe.send(slot.lost)
            pipe.recv()


def test_a_killed_holder_comes_back_after_its_lease(url: str, prefix: str) -> None:
    """It is held for as long as its process renews it, and free one lease after a SIGKILL."""
    ours, theirs = pipe()
    process = start(hold, url, prefix, 1.0, theirs)
    assert ours.poll(60)
    assert ours.recv() is False
    render = ConcurrencyLimiter(url, "render", 1, prefix=prefix, lease=1.0)
    with pytest.raises(RateLimitedError):
        render.acquire("u", wait=2.5)
    ours.send("still there?")
    assert ours.poll(10)
    assert ours.recv() is False
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    killed = time.monotonic()
    render.acquire("u", wait=10).release()
    assert 0.3 < time.monotonic() - killed < 5
    process.join(10)


def test_leases_are_renewed(colour: Colours, url: str, prefix: str) -> None:
    """Inside a block a lease goes on for as long as the work; without `renew` it ends."""
    render = colour.places(url, "render", 3, prefix=prefix, lease=0.4, renew=True)
    with render("u") as slot:
        bare = render.acquire("u")
        for _ in range(5):
            colour.sleep(0.2)
            assert not slot.lost
        assert [holder.token for holder in render.holders("u")] == [slot.token]
        assert bare.lost
    assert render.holders("u") == []
    with render("u") as slot:
        assert slot.renew()


def test_a_lost_lease_is_told(
    colour: Colours, url: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A holder whose place was taken away hears of it while it works, and disturbs nobody."""
    render = colour.places(url, "render", 1, prefix=prefix, lease=0.6, renew=True)
    with caplog.at_level(logging.WARNING, "redishacks"), render("u") as slot:
        render.reset("u")
        with render("u"):
            end = time.monotonic() + 10
            while not slot.lost:
                assert time.monotonic() < end
                colour.sleep(0.02)
            slot.release()
            assert not render.peek("u").allowed
    assert "concurrency limiter render: a lease ended before it was renewed" in caplog.text


def test_renewals_while_redis_is_away(proxy: FaultProxy, colour: Colours, prefix: str) -> None:
    """A short absence costs nobody the place; one that outlasts the lease is told."""
    options: Any = {"prefix": prefix, "deadline": 0.05}
    render = colour.places(proxy.url, "render", 1, lease=3.0, renew=True, **options)
    with render("u") as slot:
        proxy.stall()
        colour.sleep(1.5)
        assert not slot.lost
        with pytest.raises(UnavailableError):
            slot.renew()
        proxy.heal()
        proxy.cut()
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            colour.sleep(0.2)
            assert not slot.lost
    assert render.holders("u") == []


def test_loops_in_two_threads_renew_each_for_themselves(url: str, prefix: str) -> None:
    """One limiter in two event loops: each keeps its own leases, and one that ended harms none."""
    render = AsyncConcurrencyLimiter(url, "render", 2, prefix=prefix, lease=0.5, renew=True)

    entered = threading.Event()

    async def main(seconds: float) -> bool:
        async with render("u") as slot:
            entered.set()
            await asyncio.sleep(seconds)
            return slot.lost

    with ThreadPoolExecutor(1) as pool:
        longer = pool.submit(asyncio.run, main(1.5))
        assert entered.wait(10)
        assert not asyncio.run(main(0.3))
        assert not longer.result()
    for _ in range(3):
        asyncio.run(main(0))
    assert len(render._keeping) == 1  # those of closed loops are forgotten


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: forks beside threads
def test_a_forked_child_owns_no_place(url: str, prefix: str) -> None:
    """Leaving the block in a child does not free its parent's place; the child can take its own."""
    render = ConcurrencyLimiter(url, "render", 2, prefix=prefix, renew=True)
    with render("u") as slot:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                gone = slot.lost and slot.remaining == 0 and not slot.renew()
                slot.release()
                with render("u") as own:
                    code = 0 if gone and not own.lost and not render.peek("u").allowed else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [holder.token for holder in render.holders("u")] == [slot.token]
        assert not slot.lost
    assert render.holders("u") == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_inside_a_loop_owns_no_place(url: str, prefix: str) -> None:
    """Leaving the block says nothing in a child, which has no loop of its own to say it on."""

    async def main() -> None:
        render = AsyncConcurrencyLimiter(url, "render", 1, prefix=prefix, renew=True)
        async with render("u") as slot:
            child = os.fork()
            if child == 0:
                try:
                    await slot.release()
                finally:
                    os._exit(0 if slot.lost and not slot.released else 1)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert [holder.token for holder in await render.holders("u")] == [slot.token]

    asyncio.run(main())


def test_a_limiter_that_is_garbage_ends_its_thread(url: str, prefix: str) -> None:
    """Nothing stays behind when nobody holds a place any more."""
    render = ConcurrencyLimiter(url, "render", 1, prefix=prefix, lease=0.2, renew=True)
    with render():
        thread = render._keeping._thread
        assert thread is not None
        assert thread.is_alive()
    del render
    gc.collect()
    eventually(lambda: not thread.is_alive())


# Faults


def test_a_lost_reply_costs_no_place(proxy: FaultProxy, colour: Colours, prefix: str) -> None:
    """An acquisition whose answer is lost is asked again, and finds its own place."""
    render = colour.places(proxy.url, "render", 1, prefix=prefix, deadline=2)
    render.peek("u")
    for drop in (proxy.drop_reply, proxy.drop_request):
        drop(of="EVALSHA")
        with render("u") as slot:
            assert proxy.armed == 0
            assert [holder.token for holder in render.holders("u")] == [slot.token]
            with pytest.raises(RateLimitedError):
                render.acquire("u")
            assert slot.renew()
            drop(of="EVALSHA")
        assert render.holders("u") == []


def test_a_stopped_redis(colour: Colours, prefix: str) -> None:
    """It costs the deadline once; what it hears when it goes on takes nobody's place."""
    options: Any = {"prefix": prefix, "deadline": 0.05}
    with valkey_server() as server:
        render = colour.places(server.url, "render", 1, **options)
        allowing = colour.places(server.url, "render", 1, on_error="allow", **options)
        denying = colour.places(server.url, "render", 1, on_error="deny", **options)
        for limiter in (render, allowing, denying):
            limiter.peek("u")
        held = [render.acquire(f"held{n}") for n in range(20)]
        with server.paused():
            before = time.monotonic()
            with pytest.raises(UnavailableError):
                render.acquire("u")
            assert time.monotonic() - before < 0.5
            before = time.monotonic()
            for _ in range(100):
                with pytest.raises(UnavailableError, match="is not asked until it does again"):
                    render.acquire("u")
            assert time.monotonic() - before < 0.5
            for _ in range(2):
                with allowing("u") as slot:
                    assert slot.decision.allowed
                    assert slot.decision.degraded
                    assert slot.remaining == math.inf
                    assert slot.renew()
                    assert not slot.lost
                with pytest.raises(RateLimitedError) as caught:
                    denying.acquire("u")
                assert caught.value.decision.degraded
            assert allowing.counts() == (0, 0, 2)
            assert denying.counts() == (2, 0, 2)
            before = time.monotonic()
            for slot in held:
                slot.release()
            assert time.monotonic() - before < 0.5

        def free() -> bool:
            colour.sleep(0.01)
            return not any(render.holders(key) for key in ("u", "held0", "held19"))

        def back() -> bool:
            colour.sleep(0.01)
            try:
                render.acquire("u").release()
            except UnavailableError:
                return False
            return True

        assert eventually(free)
        assert eventually(back)
        with server.client() as client:
            assert all(0 < client.pttl(key) <= 30_000 for key in client.scan_iter())


def test_an_acquisition_given_up_in_doubt_is_left(
    proxy: FaultProxy, url: str, colour: Colours, prefix: str
) -> None:
    """When the way is cut after a place was taken, it is left as soon as there is a way again."""
    render = colour.places(proxy.url, "render", 1, prefix=prefix, deadline=0.2)
    render.peek("u")
    proxy.refuse()
    proxy.cut_after_request(of="EVALSHA")
    with pytest.raises(UnavailableError):
        render.acquire("u")
    there = ConcurrencyLimiter(url, "render", 1, prefix=prefix)
    colour.sleep(2)
    assert len(there.holders("u")) == 1
    proxy.accept()
    eventually(lambda: colour.after(0.01, lambda: not there.holders("u")))


def test_a_cancelled_acquisition_gives_its_place_back(proxy: FaultProxy, prefix: str) -> None:
    """Whether the answer was under way, or the task was asleep or inside."""

    async def main() -> None:
        render = AsyncConcurrencyLimiter(proxy.url, "render", 1, prefix=prefix, deadline=5)
        await render.peek("u")
        proxy.delay(0.1)
        for pause in (0.0, 0.05, 0.15, 0.2, 0.25):
            task = asyncio.create_task(render.acquire("u"))
            await asyncio.sleep(pause)
            task.cancel()
            try:
                await (await task).release()
            except asyncio.CancelledError:
                pass
            assert await render.holders("u") == [], pause
        proxy.heal()

        async def inside() -> None:
            async with render("u"):
                entered.set()
                await asyncio.sleep(60)

        entered = asyncio.Event()
        holder = asyncio.create_task(inside())
        await entered.wait()
        waiter = asyncio.create_task(render.acquire("u", wait=60))
        await asyncio.sleep(0.05)
        waiter.cancel()
        holder.cancel()
        await asyncio.wait([holder, waiter])
        assert await render.holders("u") == []

    asyncio.run(main())


def test_a_second_cancellation_and_the_end_of_the_loop(proxy: FaultProxy, prefix: str) -> None:
    """Whoever is cancelled while giving back leaves that to the background."""

    async def main() -> None:
        render = AsyncConcurrencyLimiter(proxy.url, "render", 1, prefix=prefix, deadline=5)
        slot = await render.acquire("u")
        proxy.delay(0.1)
        before = asyncio.create_task(render.peek("u"))
        await asyncio.sleep(0.01)
        release = asyncio.create_task(slot.release())  # in line, not yet written
        await asyncio.sleep(0)
        release.cancel()
        await asyncio.wait([release, before])
        assert release.cancelled()
        proxy.heal()

    asyncio.run(main())
    render = ConcurrencyLimiter(proxy.url, "render", 1, prefix=prefix, deadline=5)
    eventually(lambda: render.holders("u") == [])


def test_an_interrupt_gives_the_place_back(proxy: FaultProxy, prefix: str) -> None:
    """A signal handler that raises in the middle of an acquisition leaves nothing taken."""

    class Interrupt(Exception):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    render = ConcurrencyLimiter(proxy.url, "render", 1, prefix=prefix, deadline=5)
    render.peek("u")
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        proxy.delay(0.1)
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        with pytest.raises(Interrupt):
            render.acquire("u")
    finally:
        signal.signal(signal.SIGALRM, old)
    assert render.holders("u") == []


# Anywhere


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols(colour: Colours, valkey: Any, prefix: str, protocol: int) -> None:
    """Replies read alike under RESP2 and RESP3, whether the client decodes or not."""
    client = colour.client(valkey.url, protocol=protocol, decode_responses=True)
    render = colour.places(client, "render", 1, prefix=prefix)
    with render("u") as slot:
        assert [holder.token for holder in render.holders("u")] == [slot.token]
        assert slot.renew()
        assert not render.peek("u").allowed
    assert render.peek("u").allowed


def test_redis_62(colour: Colours, redis62: Any, prefix: str) -> None:
    """The oldest server knows every command that the script uses."""
    render = colour.places(redis62.url, "render", 1, prefix=prefix)
    with render("u") as slot:
        assert slot.renew()
        with pytest.raises(RateLimitedError):
            render.acquire("u")
    assert render.holders("u") == []
    old = Row(redis62.url, prefix)
    old.now += 3600 * SECOND
    assert old.enter("a")
    assert old.enter("b")
    old.now -= 3600 * SECOND
    assert not old.enter("c")
    assert old.say("peek")[2] == 30 * SECOND
    old.say("abandon", "d")
    assert not old.enter("d")


@pytest.mark.parametrize("kind", [ConcurrencyLimiter, AsyncConcurrencyLimiter])
def test_on_a_cluster(cluster: Cluster, prefix: str, kind: Any) -> None:
    """Keys spread over the nodes, and each has its places."""
    keys = [f"u{n}" for n in range(12)]

    async def main() -> None:
        made = redis.asyncio.RedisCluster.from_url(cluster.url)
        render = AsyncConcurrencyLimiter(made, "render", 1, prefix=prefix, deadline=5)
        slots = [await render.acquire(key) for key in keys]
        for key, slot in zip(keys, slots, strict=True):
            with pytest.raises(RateLimitedError):
                await render.acquire(key)
            await slot.release()
            assert await render.holders(key) == []
        await made.aclose()

    if kind is AsyncConcurrencyLimiter:
        asyncio.run(main())
        return
    made = cluster.client()
    render = ConcurrencyLimiter(made, "render", 1, prefix=prefix, deadline=5)
    slots = [render.acquire(key) for key in keys]
    for key, slot in zip(keys, slots, strict=True):
        with pytest.raises(RateLimitedError):
            render.acquire(key)
        slot.release()
        assert render.holders(key) == []
    made.close()


# Faces


def test_decorators(url: str, prefix: str) -> None:
    """A function holds a place while it runs; the key may be made of its arguments."""
    render = ConcurrencyLimiter(url, "render", 1, prefix=prefix)
    arender = AsyncConcurrencyLimiter(url, "render", 1, prefix=prefix)

    @render.limit(key=lambda user, **_: f"user:{user}")
    def draw(user: str, then: Callable[[], Any] = lambda: None) -> int:
        """Draw."""
        then()
        return len(render.holders(f"user:{user}"))

    assert draw("u") == 1
    assert draw.__doc__ == "Draw."
    with pytest.raises(RateLimitedError):
        draw("u", then=lambda: draw("u"))
    assert draw("u", then=lambda: draw("v")) == 1

    async def main() -> None:
        @arender.limit("user:u", wait=5)
        async def adraw() -> int:
            await asyncio.sleep(0.01)
            return len(await arender.holders("user:u"))

        assert await asyncio.gather(*(adraw() for _ in range(4))) == [1] * 4
        with pytest.raises(RateLimitedError):
            async with arender("user:u"), arender("user:u"):
                raise AssertionError

    asyncio.run(main())
    assert render.holders("user:u") == []


def test_functions_that_would_not_run_inside(url: str, prefix: str) -> None:
    """Async functions for the sync limiter, sync ones for the async one, and generators."""
    render = ConcurrencyLimiter(url, "render", 1, prefix=prefix)
    arender = AsyncConcurrencyLimiter(url, "render", 1, prefix=prefix)

    async def coroutine() -> None: ...

    def generator() -> Iterator[None]:
        yield

    async def agenerator() -> Any:
        yield

    with pytest.raises(UsageError, match="is async: use AsyncConcurrencyLimiter"):
        render.limit()(coroutine)
    with pytest.raises(UsageError, match="is not async: use ConcurrencyLimiter"):
        arender.limit()(len)
    for limiter in (render, arender):
        for function in (generator, agenerator):
            with pytest.raises(UsageError, match="is a generator: hold a place with `with`"):
                limiter.limit()(function)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"amount": -1}, "how many at once is an int from 0 to 2\\^53 or None, not -1"),
        ({"amount": 1.5}, "not 1.5"),
        ({"amount": True}, "not True"),
        ({"amount": "10"}, "not '10'"),
        ({"amount": 2**53}, "how many at once"),
        ({"lease": 0}, "lease must be a positive number"),
        ({"lease": 0.01}, "a lease is from 0.1 s to 366 days, not 0.01"),
        ({"lease": math.nan}, "lease must be a positive number"),
        ({"lease": 400 * 86_400}, "a lease is from 0.1 s to 366 days"),
        ({"deadline": 0}, "deadline must be a positive number"),
        ({"on_error": "local"}, "on_error is raise, allow or deny, not 'local'"),
        ({"name": ""}, "name must be a string"),
        ({"prefix": 3}, "prefix must be a string"),
        ({"client": 3}, "a redis-py client or a URL is needed"),
    ],
)
@pytest.mark.parametrize("kind", [ConcurrencyLimiter, AsyncConcurrencyLimiter])
def test_bad_options(url: str, kind: Any, options: dict[str, Any], shown: str) -> None:
    """What is wrong, and what is accepted."""
    given = {"client": url, "name": "render", "amount": 1, **options}
    with pytest.raises(UsageError, match=shown):
        kind(given.pop("client"), given.pop("name"), given.pop("amount"), **given)


@pytest.mark.parametrize("key", [b"", "x" * 1_000_000, None, 1.5, True, ["a"], "\ud800", {}])
def test_bad_keys(colour: Colours, url: str, prefix: str, key: Any) -> None:
    """What is no key is refused with a clear error, by every method."""
    render = colour.places(url, "render", 1, prefix=prefix)
    for method in (render.acquire, render.peek, render.holders, render.reset):
        with pytest.raises(UsageError, match="key"):
            method(key)


@pytest.mark.parametrize(
    "key", ["", "a{b}c", "nul\0", "line\nbreak", "%41", "/", "ü", b"\xff\xfe", 42, "x" * 2048]
)
def test_odd_keys(colour: Colours, url: str, prefix: str, key: Any) -> None:
    """A key may hold anything; each has its own places."""
    render = colour.places(url, "render", 1, prefix=prefix)
    with render("other"), render(key), pytest.raises(RateLimitedError):
        render.acquire(key)


@pytest.mark.parametrize("wait", [-1, math.nan, "1", True])
def test_bad_waits(colour: Colours, url: str, prefix: str, wait: Any) -> None:
    """A wait is 0, a positive time or None."""
    with pytest.raises(UsageError, match="wait must be a positive number of seconds"):
        colour.places(url, "render", 1, prefix=prefix).acquire(wait=wait)


def test_slots_stay_where_they_are(url: str, prefix: str) -> None:
    """A slot cannot be pickled into another process."""
    render = ConcurrencyLimiter(url, "render", 1, prefix=prefix)
    with render() as slot, pytest.raises(UsageError, match="belongs to its process"):
        pickle.dumps(slot)


@pytest.mark.parametrize(
    ("one", "other"), [(ConcurrencyLimiter, AsyncConcurrencyLimiter), (Slot, AsyncSlot)]
)
def test_twins_are_alike(one: Any, other: Any) -> None:
    """Both colours have the same methods, parameters and defaults."""

    def shape(kind: Any) -> dict[str, list[tuple[str, Any]]]:
        return {
            name: [(p.name, p.default) for p in inspect.signature(value).parameters.values()]
            for name, value in inspect.getmembers(kind, inspect.isfunction)
            if name in ("__init__", "__call__") or not name.startswith("_")
        }

    assert shape(one) == shape(other)
