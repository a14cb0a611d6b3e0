"""Time series when writers die, replies get lost, servers fail and clocks jump."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from redishacks.errors import (
    MaybeAppliedError,
    PartlyAppliedError,
    RetentionError,
    UnavailableError,
    UsageError,
)
from redishacks.testing import (
    FaultProxy,
    Server,
    redis_server,
    servers_available,
    valkey_server,
)
from redishacks.timeseries import TimeSeries
from redishacks.timeseries._kind import Hit
from redishacks.timeseries.resolution import DAY, DEFAULT, HOUR, MINUTE, ladder
from tests import timeseries_writers as writers
from tests import workers
from tests.helpers import eventually
from tests.timeseries_kit import Both, agree, by_step, clocked, noon, stored
from tests.transport_kit import LENIENCE, took

RUNGS = ladder(DEFAULT)


@pytest.fixture
def colour(flavour: str) -> Iterator[Both]:
    """Both colours, with one test body."""
    made = Both(flavour)
    yield made
    made.close()


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server that these tests may pause and fill."""
    with valkey_server() as server:
        yield server


@pytest.fixture
def url(valkey: Server) -> str:
    """The session's server."""
    return valkey.url


@pytest.fixture
def look(valkey: Server, prefix: str) -> Iterator[Callable[..., Any]]:
    """What there is of a name on the session's server; whatever is wrong with a key raises."""
    with valkey.client() as raw:
        reader = TimeSeries(valkey.url, "hits", prefix=prefix, deadline=5)

        def looked() -> Any:
            reader.sum("a", 0)
            return stored(raw, reader, prefix)

        yield looked


def known(series: Any, *keys: str, back: float = 2000 * DAY) -> dict[Any, int]:
    """Return sums of some series over all that there is."""
    now = time.time()
    return {key: int(total) for key, total in series.sums(keys, now - back, now + 70).items()}


# Writers that are killed


class Killed:
    """Writers in processes of their own; now and then one is killed, and another begins."""

    def __init__(self, target: Any, url: str, prefix: str, directory: Path, seed: int) -> None:
        self.now = int(time.time())
        self.logs: list[Path] = []
        self._target, self._url, self._prefix = target, url, prefix
        self._directory = directory
        self._rng = random.Random(seed)

    def run(self, kills: int, meanwhile: Callable[[], object], at_once: int = 3) -> None:
        """Kill so many, at random moments, and look around all the while."""
        alive = [self._start() for _ in range(at_once)]
        for _ in range(kills):
            victim = alive.pop(self._rng.randrange(len(alive)))
            log = self.logs[int(victim.name)]
            eventually(functools.partial(_is_long, log))
            end = time.monotonic() + self._rng.random() * 0.05
            while time.monotonic() < end:
                meanwhile()
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            alive.append(self._start())
        for each in alive:
            os.kill(each.pid, signal.SIGKILL)
            each.join()

    def _start(self) -> Any:
        path = self._directory / f"w{len(self.logs)}"
        self.logs.append(path)
        process = workers.start(
            self._target, self._url, self._prefix, path.name, self.now, str(path)
        )
        process.name = str(len(self.logs) - 1)
        return process

    def notes(self) -> dict[str, list[Any]]:
        """Return what each of them noted."""
        found = {}
        for path in self.logs:
            # A kill may come in the middle of a line.
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            found[path.name] = [json.loads(line) for line in lines if line.endswith("\n")]
        return found


def _is_long(log: Path) -> bool:
    return log.exists() and log.stat().st_size > 2000


KILLS = [6, pytest.param(40, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_writers_leave_all_or_nothing(
    url: str, prefix: str, look: Any, tmp_path: Path, kills: int
) -> None:
    """Late, negative, growing and overflowing hits of several writers, killed at any moment.

    At every instant an hour is the sum of its 10-second buckets, and every key expires when it
    should; in the end each hit that was told to be counted is there once in every resolution.
    """
    now = int(time.time())
    for count in (500, 500, 23):
        TimeSeries(url, "hits", prefix=prefix, deadline=5).incr_many(
            [("full", writers.HUGE, now)] * count
        )
    killed = Killed(writers.write, url, prefix, tmp_path, seed=kills)
    killed.now = now

    def alike() -> None:
        recent = [each for each in look() if each.pack * each.rung.span > now - 60 * DAY]
        of_days = [each for each in recent if not each.series.startswith("a")]
        agree(of_days)  # all of them are of today

    killed.run(kills, alike)
    steps = by_step(look())
    expected: dict[int, Counter[tuple[str, int]]] = {rung.step: Counter() for rung in RUNGS}
    outcomes: Counter[str] = Counter()

    def add(key: str, amount: int, at: int) -> None:
        for rung in RUNGS:
            if rung.ends(rung.pack(at)) > now:
                expected[rung.step][key, at // rung.step * rung.step] += amount

    add("full", 1023 * writers.HUGE, now)
    for me, notes in killed.notes().items():
        calls = [each for each in notes if isinstance(each, dict)]
        answers = [each for each in notes if isinstance(each, str)]
        assert len(calls) - len(answers) in (0, 1)
        outcomes.update(answers)
        done = [call for call, answer in zip(calls, answers, strict=False) if answer == "counted"]
        there = sum(v for (key, _), v in steps[DAY].items() if key == me)
        if there == len(done) + 1:  # its last call was applied, though it was not told so
            done.append(calls[-1])
            outcomes["untold"] += 1
        assert there == len(done), f"{me}: {answers.count('counted')} were told to be counted"
        for call in done:
            for hit in call["hits"]:
                add(*hit)
    for step, buckets in expected.items():
        assert steps[step] == buckets, f"buckets of {step} s"
    assert outcomes["counted"] > 100
    assert outcomes["refused"] > 0


@pytest.mark.parametrize("kills", KILLS)
def test_killed_writers_that_linger(
    url: str, prefix: str, look: Any, tmp_path: Path, kills: int
) -> None:
    """What was sent is whole, in every resolution; what is lost are the last hits and no others."""
    killed = Killed(writers.linger, url, prefix, tmp_path, seed=kills)
    killed.run(kills, lambda: agree(look()))
    finest = agree(look())
    lost = 0
    for me, notes in killed.notes().items():
        buckets = {at: amount for (key, at), amount in finest.items() if key == me}
        taken = sum(isinstance(each, dict) for each in notes)
        sent = max([0, *(i for i, each in enumerate(notes) if each == "sent")])
        surely = sum(isinstance(each, dict) for each in notes[:sent])
        arrived = sum(buckets.values())
        assert surely <= arrived <= taken
        first = Counter((killed.now - n % 7 * 10) // 10 * 10 for n in range(arrived))
        assert buckets == first
        lost += taken - arrived
    assert finest
    assert lost <= 60 * len(killed.logs)


def test_hits_leave_by_themselves(url: str, prefix: str) -> None:
    """What lingers is sent within that time, though nobody sends or closes; then a kill loses it
    no more.
    """
    code = """
        import sys, time
        from redishacks.timeseries import TimeSeries
        hits = TimeSeries(sys.argv[1], "hits", prefix=sys.argv[2], linger=0.05)
        for _ in range(1000):
            hits.incr("a")
        hits.incr("b", 7, at=time.time() - 86400)
        time.sleep(60)
    """
    series = TimeSeries(url, "hits", prefix=prefix)
    command = [sys.executable, "-c", textwrap.dedent(code), url, prefix]
    with subprocess.Popen(command) as process:
        try:
            eventually(lambda: known(series, "a", "b") == {"a": 1000, "b": 7}, 20)
        finally:
            process.kill()
    assert known(series, "a", "b") == {"a": 1000, "b": 7}


ENDINGS = {
    "end": "",
    "exit": "raise SystemExit(3)",
    "error": "1 / 0",
    "interrupt": "signal.raise_signal(signal.SIGINT)",
    "terminated": "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); "
    "signal.raise_signal(signal.SIGTERM)",
    "closed": "hits.close(); asyncio.run(other.aclose()); os._exit(0)",
    "handler": "signal.signal(signal.SIGTERM, lambda *_: (hits.close(), "
    "asyncio.run(other.aclose()), os._exit(0))); signal.raise_signal(signal.SIGTERM)",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_an_end_in_good_order_loses_nothing(url: str, prefix: str, look: Any, ending: str) -> None:
    """Hits of both colours that linger are sent, whichever way the process ends."""
    code = f"""
        import asyncio, os, signal, sys, time
        from redishacks.timeseries import AsyncTimeSeries, TimeSeries
        url, prefix = sys.argv[1:]
        hits = TimeSeries(url, "hits", prefix=prefix, linger=600)
        other = AsyncTimeSeries(url, "hits", prefix=prefix, linger=600)
        for n in range(50):
            hits.incr("sync")
            hits.incr("old", 2, at=time.time() - 3 * 86400)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(other.incr("async", 3))
        loop.close()
        {ending}
    """
    command = [sys.executable, "-c", textwrap.dedent(code), url, prefix]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5)
    assert known(series, "sync", "old", "async") == {"sync": 50, "old": 100, "async": 3}, (
        done.stderr
    )
    look()


def test_a_fork_with_hits_in_the_buffer_counts_them_once(url: str, prefix: str) -> None:
    """They are the parent's; what a child counts is sent by the child, into the same buckets."""
    code = """
        import os, sys
        from redishacks.timeseries import TimeSeries
        hits = TimeSeries(sys.argv[1], "hits", prefix=sys.argv[2], linger=600)
        for known in (False, True):  # before the resolutions are known, and after
            for _ in range(100):
                hits.incr("before")
                hits.incr("before", 1000)
            if os.fork() == 0:
                for _ in range(10):
                    hits.incr("child")
                hits.close()
                os._exit(0)
            hits.incr("after")
            assert os.wait()[1] == 0
            hits.send()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), url, prefix]
    subprocess.run(command, check=True, timeout=60)
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5)
    found = known(series, "before", "child", "after")
    assert found == {"before": 200 * 1001, "child": 20, "after": 2}


# What gets lost on the way


@pytest.mark.parametrize("fault", ["drop_reply", "drop_request", "cut_after_request"])
def test_whatever_exchange_is_cut(
    colour: Both, proxy: FaultProxy, valkey: Server, prefix: str, fault: str
) -> None:
    """A write is counted once, or in doubt and counted once or never, in all resolutions alike.

    What only reads is asked again, and nobody notices.
    """
    now = int(time.time())
    doubts = 0
    with valkey.client() as raw:
        for n in itertools.count(1):
            series = colour.series(proxy.url, f"n{n}", prefix=prefix, deadline=5)
            getattr(proxy, fault)(n)
            surely, perhaps = 0, []
            for amount in (1, 10, 100):
                try:
                    series.incr_many([("a", amount, now), ("a", amount, now - DAY)])
                except MaybeAppliedError:
                    perhaps.append(amount)
                except UnavailableError:
                    pass
                else:
                    surely += amount
                assert series.sum("a", now - HOUR, now + 1) <= 111
            doubts += len(perhaps)
            found = series.sum("a", now - HOUR, now + 60)
            assert found - surely in {0, *perhaps}
            assert series.range("a", now - 2 * DAY, now + 60, step=HOUR).sum() == 2 * found
            whole = stored(raw, getattr(series, "target", series), prefix, f"n{n}")
            assert sum(agree(whole).values()) == 2 * found
            done = proxy.armed == 1
            proxy.heal()
            colour.shut(series)
            if done:
                break
    assert n > 8
    assert doubts > 0 or fault == "drop_request"


def test_a_call_in_parts_of_which_one_is_lost(proxy: FaultProxy, prefix: str, look: Any) -> None:
    """It says which hits are in doubt; all others are counted."""
    series = TimeSeries(proxy.url, "hits", prefix=prefix, partitions=4, deadline=5)
    look_there = TimeSeries(proxy.url, "hits", prefix=prefix, partitions=4, deadline=5)
    now = int(time.time())
    series.incr("first", at=now)
    keys = [f"k{n}" for n in range(40)]
    proxy.drop_reply(2, of="EVALSHA")
    with pytest.raises(PartlyAppliedError) as raised:
        series.incr_many((key, 1, now) for key in keys)
    failed = raised.value.failed
    assert 0 < len(failed) < 40
    assert all(isinstance(each, MaybeAppliedError) for each in failed.values())
    totals = look_there.sums(keys, now - 60, now + 60)
    assert all(totals[key] == 1 for key in keys if key not in failed)
    assert all(totals[key] in (0, 1) for key in failed)


def test_a_send_that_comes_again_counts_once(url: str, prefix: str, look: Any) -> None:
    """However often and however late the server gets it."""
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5)
    now = int(time.time())
    series.incr("a", 1, at=now)
    layout, producer = series.layout, "p" * 32
    first, second = (
        layout.put(
            layout.folded([Hit(b"a", now, (amount,)), Hit(b"b", now - DAY, (1,))]),
            fence=(producer, number),
        )
        for number, amount in ((1, 10), (2, 100))
    )
    codes = [
        series.transport.call(command, 5.0).code
        for command in (first, first, second, first, second)
    ]
    assert codes == [1, 0, 1, 0, 0]
    other = layout.put(layout.folded([Hit(b"a", now, (1000,))]), fence=("q" * 32, 1))
    assert series.transport.call(other, 5.0).code == 1
    assert known(series, "a", "b") == {"a": 1111, "b": 2}
    agree(look())


@pytest.mark.parametrize("lingers", [None, 600])
def test_flushed_scripts_are_not_noticed(
    colour: Both, valkey: Server, prefix: str, lingers: Any
) -> None:
    """Between two calls, and all the while, both with many scripts on the way."""
    now = int(time.time())
    options: Any = {"prefix": prefix, "partitions": 8, "deadline": 20, "linger": lingers}
    series = colour.series(valkey.url, **options)
    over = threading.Event()
    with valkey.client() as raw:

        def flush() -> None:
            while not over.is_set():
                raw.script_flush()

        thread = threading.Thread(target=flush)
        for n in range(60):
            if n == 10:
                thread.start()
            elif n < 10:
                raw.script_flush()
            series.incr("a", at=now)
            series.incr_many([(f"k{i}", 1, now - DAY) for i in range(16)])
            if lingers:
                series.send()
        over.set()
        thread.join()
    series.close()
    reader = TimeSeries(valkey.url, "hits", prefix=prefix, partitions=8, deadline=5)
    assert known(reader, "a", *(f"k{i}" for i in range(16))) == {
        "a": 60,
        **{f"k{i}": 60 for i in range(16)},
    }
    colour.shut(series)


# A server that is away


def _reached(counted: list[int], goals: list[int]) -> bool:
    return all(each > goal for each, goal in zip(counted, goals, strict=True))


@pytest.mark.parametrize("lingers", [False, True])
def test_a_server_that_is_killed_and_comes_back(prefix: str, lingers: bool) -> None:
    """With what it wrote to disk nothing that was told to be counted is lost or counted twice."""
    with valkey_server(appendonly="yes", appendfsync="always") as server:
        now = int(time.time())
        counted = [0] * 3
        in_doubt = [0] * 3
        over = threading.Event()
        linger = 0.005 if lingers else None
        made = [
            TimeSeries(server.url, "hits", prefix=prefix, linger=linger, deadline=20)
            for _ in range(3)
        ]

        def write(n: int) -> None:
            while not over.is_set():
                try:
                    made[n].incr(f"k{n}", 1, at=now - counted[n] % 7 * 10)
                    counted[n] += 1
                except MaybeAppliedError:
                    in_doubt[n] += 1
                except UnavailableError:
                    time.sleep(0.005)
                time.sleep(0.0005)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            goals = [each + 30 for each in counted]
            eventually(functools.partial(_reached, counted, goals), 20)
            server.kill()
            server.restart()
        over.set()
        for thread in threads:
            thread.join()
        for series in made:
            series.close()
        found = known(TimeSeries(server.url, "hits", prefix=prefix, deadline=5), "k0", "k1", "k2")
        for n, total in enumerate(found.values()):
            assert counted[n] <= total <= counted[n] + in_doubt[n]
        with server.client() as raw:
            assert sum(agree(stored(raw, made[0], prefix)).values()) == sum(found.values())


def test_a_server_that_came_back_empty(prefix: str) -> None:
    """Without a disk it has forgotten all: writers go on from nothing, lingering or not."""
    with valkey_server() as server:
        series = TimeSeries(server.url, "hits", prefix=prefix, deadline=5)
        lingering = TimeSeries(server.url, "hits", prefix=prefix, deadline=5, linger=600)
        series.incr("a", 5)
        lingering.incr("a", 7)
        lingering.send()
        server.restart()
        assert known(series, "a") == {"a": 0}
        series.incr("a", 1)
        lingering.incr("a", 2)
        lingering.close()
        assert known(TimeSeries(server.url, "hits", prefix=prefix, deadline=5), "a") == {"a": 3}


@pytest.mark.parametrize("named", [True, False])
def test_a_server_that_came_back_empty_is_told_the_resolutions(
    prefix: str, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """A minute later at most, those that its writers go by, so that readers find what is there."""
    rungs = [(5, HOUR), (30, DAY)]
    with valkey_server() as server:
        first = TimeSeries(server.url, "hits", prefix=prefix, resolutions=rungs, deadline=5)
        first.incr("a", 5)
        series = TimeSeries(
            server.url, "hits", prefix=prefix, resolutions=rungs if named else None, deadline=5,
            on_command=lambda *_: None,
        )  # fmt: skip
        series.incr("a", 5)
        server.restart()
        Elsewhen(series, monkeypatch).off = 70
        assert series.sum("a", time.time() - HOUR) == 0
        series.incr("a", 1)
        anybody = TimeSeries(server.url, "hits", prefix=prefix, deadline=5)
        anybody.sum("a", 0)
        assert [rung.step for rung in anybody.layout.rungs] == [5, 30]


def test_a_server_that_is_down(colour: Both, own: Server, prefix: str) -> None:
    """It is said at once that nothing was counted, and that is true."""
    with FaultProxy(own) as proxy:
        series = colour.series(proxy.url, prefix=prefix, deadline=5)
        fresh = colour.series(proxy.url, prefix=prefix, deadline=5)
        series.incr("a")
        proxy.refuse()
        proxy.cut()
        now = time.time()
        calls: list[Callable[[], Any]] = [
            lambda: series.sum("a", now - DAY),  # it finds that its connection is cut
            lambda: series.incr("a"),
            lambda: series.incr("a", at=now - DAY),
            lambda: series.incr_many([("a", 1), ("b", 1)]),
            lambda: fresh.incr("a"),
            lambda: fresh.incr_many([("a", 1, now)]),
            lambda: fresh.sums(["a", "b"], now - DAY),
            lambda: series.today("a"),
            lambda: fresh.range("a", now - DAY, step=HOUR),
            lambda: fresh.explain("a", now - DAY),
        ]
        for call in calls:
            with took(at_most=1.0), pytest.raises(UnavailableError, match="refused"):
                call()
        proxy.accept()
        assert series.sums(["a", "b"], now - 2 * DAY) == {"a": 1, "b": 0}
        colour.shut(series, fresh)


def test_a_server_that_hangs(colour: Both, own: Server, prefix: str) -> None:
    """Each call costs the deadline; a hit that it got before is in doubt, and counted whole."""
    series = colour.series(own.url, prefix=prefix, deadline=0.3)
    fresh = colour.series(own.url, prefix=prefix, deadline=0.3)
    series.incr("a")
    now = time.time()
    with own.paused():
        with took(at_most=0.3 + LENIENCE), pytest.raises(MaybeAppliedError):
            series.incr("a", 10)
        calls: list[Callable[[], Any]] = [
            lambda: series.incr("a", 100),
            lambda: series.sum("a", now - DAY),
            lambda: fresh.incr("a", 1000),
            lambda: fresh.range("a", now - DAY, step=HOUR),
        ]
        for call in calls:
            with took(at_most=0.3 + LENIENCE), pytest.raises(UnavailableError):
                call()
    with own.client() as raw:
        whole = stored(raw, getattr(series, "target", series), prefix)
    assert sum(agree(whole).values()) in (1, 11)
    colour.shut(series, fresh)


def test_hits_linger_until_the_server_is_back(colour: Both, own: Server, prefix: str) -> None:
    """While it hangs they stay in the buffer, in the bucket in which they were counted."""
    series = colour.series(own.url, prefix=prefix, linger=600, deadline=0.3)
    now = int(time.time())
    series.incr("a", 1, at=now - 20)
    series.send()
    with own.paused():
        series.incr("a", 10, at=now - 20)
        series.incr("a", 100, at=now)
        for _ in range(2):
            with pytest.raises((MaybeAppliedError, UnavailableError)):
                series.send()
    series.close()
    assert series.sum("a", now - 20, now - 19) == 11
    assert series.sum("a", now - 60, now + 60) == 111
    colour.shut(series)


@pytest.mark.parametrize("make", [valkey_server, redis_server], ids=["valkey", "redis"])
def test_a_full_server(prefix: str, make: Any) -> None:
    """It refuses a hit with a clear error and in all resolutions, and is read as before."""
    kind = "redis" if make is redis_server else "valkey"
    if not any(binary.kind == kind for binary in servers_available()):
        pytest.skip(f"no {kind} here")
    with make(maxmemory_policy="noeviction") as server, server.client() as raw:
        series = TimeSeries(server.url, "hits", prefix=prefix, deadline=5)
        now = int(time.time())
        series.incr("k0", at=now)
        raw.config_set("maxmemory", raw.info("memory")["used_memory"] + 200_000)
        counted, full = 1, None
        while full is None and counted < 2000:
            try:
                series.incr_many([(f"k{counted}", n + 1, now - 600 * n) for n in range(40)])
                counted += 1
            except UnavailableError as error:
                full = error
        assert "OOM" in str(full)
        raw.config_set("maxmemory", 1)
        lingering = TimeSeries(server.url, "hits", prefix=prefix, linger=600, deadline=0.2)
        lingering.incr("k0")
        calls: list[Callable[[], Any]] = [
            lambda: series.incr("k0", at=now),
            lambda: series.incr("new", at=now - DAY),
            lingering.send,
        ]
        for call in calls:
            with pytest.raises(UnavailableError, match="OOM"):
                call()
        assert counted > 10
        finest = agree(stored(raw, series, prefix))
        assert sum(finest.values()) == 1 + (counted - 1) * sum(range(1, 41))
        assert series.sum("k0", now - 60, now + 60) == 1
        raw.config_set("maxmemory", 0)
        lingering.close()
        assert series.sum("k0", now - 60, now + 60) == 2


# Time passes

#: All is kept for so long, 31 years, that the clock may be set to years that are long over.
FOREVER = [(rung.step, 999_999_999) for rung in DEFAULT]


@pytest.mark.parametrize("place", range(len(RUNGS)), ids=[f"{rung.step}s" for rung in RUNGS])
def test_the_edge_of_each_retention(valkey: Server, prefix: str, place: int) -> None:
    """One second before the end of a packed key its buckets are read and written, then no more.

    A late hit is in the coarser ones, and refused by name when there are none.
    """
    rung, coarser = RUNGS[place], RUNGS[place + 1 :]
    series: Any = clocked(TimeSeries(valkey.url, "hits", prefix=prefix, deadline=5))
    at = series.clock
    series.incr("a", 7, at=at)
    ends = rung.ends(rung.pack(at))

    def there() -> dict[int, int]:
        with valkey.client() as raw:
            steps = by_step(stored(raw, series, prefix))
        return {step: sum(buckets.values()) for step, buckets in steps.items()}

    series.clock = ends - 1
    assert series.range("a", at, at + 1, step=rung.step).values == [7]
    total = series.sum("a", at, at + 1)
    assert (total, total.resolution) == (7, rung.step)
    assert (total.start, total.end) == (at // rung.step * rung.step, total.start + rung.step)
    series.incr("a", 10, at=at)
    assert series.sum("a", at, at + 1) == 17
    assert there() == {r.step: 7 if r.ends(r.pack(at)) < ends else 17 for r in RUNGS}

    series.clock = ends
    points = series.range("a", at, at + 1, step=rung.step)
    assert points.values == [None]
    assert not points.complete
    with pytest.raises(RetentionError):
        series.sum("a", at, at + 1, strict=True)
    if coarser:
        total = series.sum("a", at, at + 1)
        assert (total, total.resolution, total.complete) == (17, coarser[0].step, False)
        series.incr_many([("a", 100, at), ("b", 1, ends)])
        assert series.sum("a", at, at + 1) == 117
        assert there()[rung.step] == 17 + 1
        assert all(there()[r.step] == 117 + 1 for r in coarser)
    else:
        total = series.sum("a", at, at + 1)
        assert (total, total.complete) == (0, False)
        before = there()
        for items in ([("a", 1, at)], [("b", 1, ends), ("a", 1, at)]):
            with pytest.raises(UsageError, match=f"'a': {at} is older than all that is kept"):
                series.incr_many(items)
        assert there() == before


@pytest.mark.parametrize(
    "make",
    [valkey_server, pytest.param(redis_server, marks=pytest.mark.slow)],
    ids=["valkey", "redis"],
)
def test_late_hits_while_their_bucket_expires(prefix: str, make: Any) -> None:
    """Each is counted in the coarser ones, before that moment and after; the fine key is gone."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(make())
        raw = stack.enter_context(server.client())
        now = int(time.time())
        edge = now // 360 * 360  # 360 buckets of a second end here
        rungs = [(1, now - edge + 2), (6, DAY)]
        options: Any = {"prefix": prefix, "resolutions": rungs, "deadline": 5}
        made = [TimeSeries(server.url, "hits", **options) for _ in range(2)]
        over = threading.Event()
        counted = [0, 0]

        def hammer(n: int) -> None:
            while not over.is_set():
                made[n].incr_many([("a", 1, edge - 1), ("a", 1, edge - 2), ("b", 1, edge - 1)])
                counted[n] += 3

        def looked() -> bool:
            """See that all agree; return whether the fine buckets are gone."""
            steps = by_step(stored(raw, reader, prefix))
            if 1 in steps:
                assert sum(steps[1].values()) == sum(steps[6].values())
            return 1 not in steps

        threads = [threading.Thread(target=hammer, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(over.set)
        eventually(lambda: min(counted) > 0)
        reader = made[0]
        eventually(looked)
        goals = list(counted)
        eventually(functools.partial(_reached, counted, goals))
        over.set()
        for thread in threads:
            thread.join()
        assert looked()
        assert sum(counted) == sum(known(reader, "a", "b", back=HOUR).values())
        total = reader.sum("a", edge - 1, edge)
        assert (total.resolution, total.complete) == (6, False)


@pytest.mark.slow
def test_memory_comes_back() -> None:
    """After their retention nothing is left of many series but `:meta`."""
    with valkey_server() as server, server.client() as raw:
        now = int(time.time())
        edge = now // 360 * 360
        series = TimeSeries(server.url, "hits", resolutions=[(1, now - edge + 4)], deadline=5)
        series.incr("first", at=edge - 1)
        eventually(lambda: raw.dbsize() == 2)
        before = raw.info("memory")["used_memory"]
        series.incr_many((f"k{n}", n, edge - 1 - n % 360) for n in range(3000))
        during = raw.info("memory")["used_memory"]
        assert raw.dbsize() == 3002
        eventually(lambda: raw.dbsize() == 1, 30)
        assert raw.keys() == [b"rh:t1:{hits/0}:meta"]
        assert eventually(
            lambda: raw.info("memory")["used_memory"] < before + 0.05 * (during - before)
        )


ZONES = [
    ("Europe/Berlin", (2027, 3, 28), 23),
    ("Europe/Berlin", (2027, 10, 31), 25),
    ("America/New_York", (2027, 3, 14), 23),
    ("America/New_York", (2027, 11, 7), 25),
    ("Australia/Lord_Howe", (2027, 4, 4), 24.5),
    ("Australia/Lord_Howe", (2027, 10, 3), 23.5),
    ("America/Recife", (2027, 10, 17), 24),
    ("America/Sao_Paulo", (2018, 11, 4), 23),  # it begins at one
    ("Asia/Kathmandu", (2027, 12, 31), 24),
    ("Pacific/Apia", (2011, 12, 29), 24),
    ("Pacific/Apia", (2011, 12, 31), 24),  # the day after the 29th
    ("UTC", (2028, 2, 29), 24),
    ("UTC", (2026, 12, 31), 24),
]


class Week:
    """Hits every ten minutes around a day, and which local date each of them has."""

    def __init__(self, url: str, prefix: str, zone: str, date: tuple[int, int, int]) -> None:
        self.tz = zoneinfo.ZoneInfo(zone)
        self.date = dt.date(*date)
        self.noon = int(dt.datetime(*date, 12, tzinfo=self.tz).timestamp())
        self.hits = {self.noon + 600 * i + 17: i + 1000 for i in range(-3 * 144, 3 * 144)}
        series: Any = TimeSeries(url, "hits", prefix=prefix, resolutions=FOREVER, deadline=5)
        self.series: Any = clocked(series)
        self.series.clock = self.noon + 3 * DAY
        self.series.incr_many(("a", amount, at) for at, amount in self.hits.items())
        self.dates: Counter[dt.date] = Counter()
        for at, amount in self.hits.items():
            self.dates[self.date_of(at)] += amount

    def date_of(self, moment: int) -> dt.date:
        """Return the local date."""
        return dt.datetime.fromtimestamp(moment, self.tz).date()

    def between(self, start: int, end: int) -> int:
        """Return what was hit from one moment to before another."""
        return sum(amount for at, amount in self.hits.items() if start <= at < end)

    def day(self) -> tuple[int, int]:
        """Return when the local day begins and ends, by looking at every minute."""
        minutes = range(self.noon - 2 * DAY, self.noon + 2 * DAY, 60)
        mine = [at for at in minutes if self.date_of(at) == self.date]
        return mine[0], mine[-1] + 60


@pytest.mark.parametrize(("zone", "date", "hours"), ZONES, ids=str)
def test_today_wherever_and_whenever(
    url: str, prefix: str, zone: str, date: tuple[int, int, int], hours: float
) -> None:
    """From the local midnight until now, on days of 23, 24 and 25 hours, and between."""
    week = Week(url, prefix, zone, date)
    begins, ends = week.day()
    assert ends - begins == hours * HOUR
    moments = [begins, begins + 20, begins + 3 * HOUR, week.noon, ends - 600, ends - 1]
    for week.series.clock in moments:
        total = week.series.today("a", zone)
        now = week.series.clock // 10 * 10 + 10
        assert total == week.between(begins, now)
        assert (total.start, total.end) == (begins, now)
        assert total.complete
    assert total == week.dates[week.date]
    week.series.clock = ends
    assert week.series.today("a", week.tz) == 0
    assert week.series.today("a", zone).start == ends


@pytest.mark.parametrize(
    ("zone", "date"),
    [(zone, date) for zone, date, _ in ZONES],
    ids=str,
)
def test_points_of_local_days(url: str, prefix: str, zone: str, date: tuple[int, int, int]) -> None:
    """Each is the sum of the hits that have its date; no date comes twice, and none is left out."""
    week = Week(url, prefix, zone, date)
    start, end = week.noon - 2 * DAY, week.noon + 2 * DAY
    points = week.series.range("a", start, end, step="day", tz=zone)
    found = [(week.date_of(begins), value) for begins, value in points]
    expected = {week.date_of(at): 0 for at in range(start, end, HOUR)}
    assert found == [(day, week.dates[day]) for day in expected]
    assert all(week.date_of(begins - 1) < week.date_of(begins) for begins, _ in points)


@pytest.mark.parametrize(("zone", "date"), [each[:2] for each in ZONES], ids=str)
@pytest.mark.parametrize("step", [HOUR, 6 * HOUR])
def test_points_of_local_hours(
    url: str, prefix: str, zone: str, date: tuple[int, int, int], step: int
) -> None:
    """They follow each other without a gap, begin anew at each midnight, and hold their hits."""
    week = Week(url, prefix, zone, date)
    points = week.series.range("a", week.noon - 2 * DAY, week.noon + 2 * DAY, step=step, tz=zone)
    for (begins, value), ends in zip(points, [*points.times[1:], points.end], strict=True):
        assert 0 < ends - begins <= step
        assert value == week.between(begins, ends)
    assert set(week.day()) <= set(points.times)


def test_months_and_leap_days(url: str, prefix: str) -> None:
    """Months of 28 to 31 days, over the end of a year and in a leap year."""
    tz = zoneinfo.ZoneInfo("Europe/Berlin")
    series: Any = clocked(TimeSeries(url, "hits", prefix=prefix, resolutions=FOREVER, deadline=5))
    series.clock = int(dt.datetime(2028, 4, 1, tzinfo=tz).timestamp())
    first = dt.datetime(2026, 11, 15, 12, tzinfo=tz)
    expected: Counter[tuple[int, int]] = Counter()
    items = []
    for n in range(500):
        at = (first + dt.timedelta(days=n)).replace(hour=[0, 23][n % 2])  # by the local clock
        expected[at.year, at.month] += n
        items.append(("a", n, at))
    series.incr_many(items)
    points = series.range("a", first, items[-1][2], step="month", tz="Europe/Berlin")
    found = {}
    for begins, value in points:
        local = dt.datetime.fromtimestamp(begins, tz)
        assert (local.day, local.hour) == (1, 0)
        found[local.year, local.month] = value
    assert found == expected
    ends = [*points.times[1:], points.end]
    days = [round((end - begins) / DAY) for begins, end in zip(points.times, ends, strict=True)]
    assert days == [30, 31, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 29, 31]
    leap = dt.datetime(2028, 2, 29, tzinfo=tz)
    weeks = series.range("a", leap, leap + dt.timedelta(days=2), step="week", tz=tz)
    assert [dt.datetime.fromtimestamp(at, tz).isocalendar()[:2] for at in weeks.times] == [
        (2028, 9)
    ]


def test_an_hour_that_comes_twice(url: str, prefix: str) -> None:
    """Datetimes of the first and of the second three o'clock are different moments."""
    week = Week(url, prefix, "Europe/Berlin", (2027, 10, 31))
    first, second = (dt.datetime(2027, 10, 31, 2, 30, tzinfo=week.tz, fold=fold) for fold in (0, 1))
    assert second.timestamp() - first.timestamp() == HOUR
    total = week.series.sum("a", first, second)
    assert total == week.between(int(first.timestamp()), int(second.timestamp()))
    assert (total.start, total.end) == (first.timestamp(), second.timestamp())
    assert total > 0


# Clocks that are wrong


def _sent(series: Any) -> bool:
    try:
        series.send()
    except UnavailableError:
        return False
    return True


class Elsewhen:
    """A server whose clock is off by so many seconds, as far as a series can see."""

    def __init__(self, series: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.off = 0
        #: And by so many more after each thing it is told.
        self.drift = 0
        transport = series.transport
        call, run = transport.call, transport.run
        monkeypatch.setattr(transport, "call", lambda c, deadline: call(self._then(c), deadline))
        monkeypatch.setattr(
            transport, "run", lambda some, deadline: run([self._then(c) for c in some], deadline)
        )

    def now(self) -> int:
        """Return the time there."""
        return int(time.time()) + self.off

    def _then(self, command: Any) -> Any:
        self.off += self.drift
        off = self.off
        if command.args == ("TIME",):
            return command._replace(
                parse=lambda reply: command.parse([b"%d" % (int(reply[0]) + off), reply[1]])
            )
        if command.script is not None and command.script.name == "series_add":
            words = list(command.args)
            words[3] = str((time.time_ns() // 1000) + off * 1_000_000)
            return command._replace(args=tuple(words), packed=None)
        return command


@pytest.mark.parametrize("jump", [-6 * HOUR, -30, 30, 6 * HOUR])
def test_a_server_whose_clock_jumps(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """Hits are of its time, before and after; what is read is what is there by its time."""
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5, on_command=lambda *_: None)
    server = Elsewhen(series, monkeypatch)
    series.incr("a", 1)
    series.sum("a", time.time() - HOUR)
    server.off = jump
    series.incr("a", 10)
    assert series.sum("a", server.now() - 15, server.now() + 10) == 10
    points = series.range("a", server.now() - 20, server.now() + 60, step=10)
    assert points.sum() == 10
    assert points.values[-1] is None
    noon_there = dt.timezone(dt.timedelta(hours=12 - server.now() // HOUR % 24))
    assert series.today("a", noon_there) >= 10
    server.off = 0
    series.incr("a", 100)
    server.off = max(0, jump)
    series.incr("b")
    assert series.sum("a", server.now() - 12 * HOUR, server.now() + 10) == 111


JUMPS = [-6 * HOUR, -30, 30, 6 * HOUR]


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("what", ["sum", "range"])
def test_a_reader_of_a_server_whose_clock_jumps(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, jump: int, what: str
) -> None:
    """Who only reads finds what others have counted since, by the new time."""
    reader, writer = (
        TimeSeries(url, "hits", prefix=prefix, deadline=5, on_command=lambda *_: None)
        for _ in range(2)
    )
    servers = [Elsewhen(each, monkeypatch) for each in (reader, writer)]
    writer.incr("a", 1)
    reader.sum("a", time.time() - 60)
    for server in servers:
        server.off = jump
    writer.incr("a", 10)
    now = servers[0].now()
    if what == "sum":
        assert reader.sum("a", now - 10, now + 10) == 10
    else:
        assert reader.range("a", now - 10, now + 10, step=10).sum() == 10


@pytest.mark.parametrize("jump", [-6 * HOUR, -30, 30, 10 * MINUTE, 6 * HOUR])
def test_lingering_hits_for_a_server_whose_clock_jumps(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """They arrive, in the buckets of the time that was heard last; also when that is long ago."""
    series = TimeSeries(
        url, "hits", prefix=prefix, deadline=5, linger=600, on_command=lambda *_: None
    )
    server = Elsewhen(series, monkeypatch)
    now = int(time.time())
    series.incr("a", 1)
    series.send()
    series.incr("a", 10)
    series.incr_many([("b", 5), ("b", 7, now - DAY)])
    server.off = jump
    eventually(functools.partial(_sent, series))
    series.incr("a", 100)
    series.close()
    assert series.sum("a", server.now() - 15, server.now() + 10) == 100
    server.off = max(0, jump)
    assert series.sum("a", now - 7 * HOUR, server.now() + 10) == 111
    assert series.sum("b", now - 2 * DAY, server.now() + 10) == 12


def test_a_bucket_that_expires_on_the_way(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the plan and the read its key has come to its end: coarser ones are read instead."""
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5, on_command=lambda *_: None)
    server = Elsewhen(series, monkeypatch)
    at = int(time.time()) - HOUR
    series.incr("a", 7, at=at)
    server.off = RUNGS[0].ends(RUNGS[0].pack(at)) - 1 - int(time.time())
    assert series.sum("a", at, at + 1) == 7  # the time is known now
    server.off += 1
    total = series.sum("a", at, at + 1)
    assert (total, total.resolution, total.complete) == (7, MINUTE, False)


@pytest.mark.parametrize("jump", [-6 * HOUR, 6 * HOUR])
def test_many_hits_for_a_server_whose_clock_jumps(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """Those without a time of their own are of its time, as a single one is."""
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5, on_command=lambda *_: None)
    server = Elsewhen(series, monkeypatch)
    series.incr("a", 1)
    server.off = jump
    series.incr_many([("a", 10), ("b", 1)])
    assert series.sum("a", server.now() - 15, server.now() + 10) == 10


def test_a_server_whose_clock_never_stays(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up soon, with nothing counted."""
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5, on_command=lambda *_: None)
    server = Elsewhen(series, monkeypatch)
    series.incr("a", 1)
    server.drift = HOUR
    with pytest.raises(UnavailableError, match="came too late"):
        series.incr("a", 10)
    for call in (series.sum, series.explain, functools.partial(series.range, step=HOUR)):
        with pytest.raises(UnavailableError, match="came too late"):
            call("a", time.time() - HOUR)
    assert known(TimeSeries(url, "hits", prefix=prefix, deadline=5), "a") == {"a": 1}


@pytest.mark.parametrize("off", [-5 * HOUR, 5 * HOUR])
@pytest.mark.parametrize("how", ["incr", "incr_many", "linger"])
def test_a_client_whose_clock_is_hours_off(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, off: int, how: str
) -> None:
    """Whatever it counts first is put where the server's clock says."""
    real = time.time
    monkeypatch.setattr("redishacks.timeseries.commands.time.time", lambda: real() + off)
    linger = 600 if how == "linger" else None
    with TimeSeries(url, "hits", prefix=prefix, linger=linger, deadline=5) as series:
        if how == "incr":
            series.incr("a")
        else:
            series.incr_many([("a", 1)])
    monkeypatch.undo()
    now = time.time()
    assert TimeSeries(url, "hits", prefix=prefix, deadline=5).sum("a", now - 60, now + 60) == 1


@pytest.mark.parametrize("off", [-5 * HOUR, 5 * HOUR])
def test_a_reader_whose_clock_is_hours_off(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    """The first thing it asks is answered by the server's clock, as all that follows."""
    now = time.time()
    TimeSeries(url, "hits", prefix=prefix, deadline=5).incr("a", 3)
    real = time.time
    monkeypatch.setattr("redishacks.timeseries.commands.time.time", lambda: real() + off)
    ways: list[Callable[[TimeSeries], int]] = [
        lambda s: s.sum("a", now - 60),
        lambda s: s.sums(["a"], now - 60)["a"],
        lambda s: s.today("a", noon()),
        lambda s: int(s.range("a", now - 60, step=10).sum()),
        lambda s: 3 * s.explain("a", now - 60).complete,
    ]
    for way in ways:
        fresh = TimeSeries(url, "hits", prefix=prefix, deadline=5)
        assert [way(fresh), way(fresh)] == [3, 3]


def test_a_clock_that_is_set_while_a_series_is_in_use(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process takes for the time of day is of no interest once the server was heard."""
    now = time.time()
    lingering = TimeSeries(url, "hits", prefix=prefix, linger=600, deadline=5)
    plain = TimeSeries(url, "hits", prefix=prefix, deadline=5)
    for series in (lingering, plain):
        series.incr("a")
        series.send()
    real = time.time
    for off in (-5 * HOUR, 5 * HOUR):
        monkeypatch.setattr(
            "redishacks.timeseries.commands.time.time", lambda off=off: real() + off
        )
        for series in (lingering, plain):
            series.incr("a")
            series.incr_many([("a", 1)])
            series.send()
    monkeypatch.undo()
    lingering.close()
    assert known(plain, "a", back=now - real() + 60) == {"a": 10}


# Bad input

NAIVE = dt.datetime(2026, 1, 1)
LAST = dt.datetime.max.replace(tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, now: s.sum("a", math.inf), "start must be an aware datetime or seconds"),
        (lambda s, now: s.sum("a", -math.inf), "start must be an aware datetime or seconds"),
        (lambda s, now: s.sum("a", now, math.nan), "end must be an aware datetime or seconds"),
        (lambda s, now: s.sum("a", now, math.inf), "end must be an aware datetime or seconds"),
        (lambda s, now: s.sum("a", -1), "start must be"),
        (lambda s, now: s.sum("a", "2026-01-01"), "start must be"),
        (lambda s, now: s.sum("a", dt.date(2026, 1, 1)), "start must be"),
        (lambda s, now: s.sum("a", True), "start must be"),
        (lambda s, now: s.sum("a", now, NAIVE), r"end: .* say which one .*datetime\.UTC"),
        (lambda s, now: s.sums(["a"], NAIVE), r"start: .* say which one .*datetime\.UTC"),
        (lambda s, now: s.range("a", NAIVE, step=HOUR), "start: .* has no time zone"),
        (lambda s, now: s.explain("a", NAIVE), "start: .* has no time zone"),
        (lambda s, now: s.range("a", now, now - 20, step=10), "begins before it ends"),
        (lambda s, now: s.sums(["a"], now, now - 20), "begins before it ends"),
        (lambda s, now: s.explain("a", now, now - 20), "begins before it ends"),
        (lambda s, now: s.range("a", now - 60, step=math.nan), "step must be a positive"),
        (lambda s, now: s.range("a", now - 60, step=math.inf), "step must be a positive"),
        (lambda s, now: s.range("a", now - 60, step=-10), "step must be a positive"),
        (lambda s, now: s.range("a", now - 60, step=0.5), "whole seconds"),
        (lambda s, now: s.range("a", now - 60, step=True), "step must be a positive"),
        (lambda s, now: s.range("a", now - 60, step=None), "step must be a positive"),
        (lambda s, now: s.range("a", now - 60, LAST, step=10), "more than 100,000 points"),
        (lambda s, now: s.range("a", 0, LAST, step="day"), "more than 100,000 points"),
        (lambda s, now: s.range("a", now - 60, step=10, tz="../etc"), "no time zone"),
        (lambda s, now: s.today("a", ""), "no time zone ''"),
        (lambda s, now: s.today("a", 5), "no time zone 5"),
        (lambda s, now: s.incr("a", at=math.nan), "at must be"),
        (lambda s, now: s.incr("a", at=math.inf), "at must be"),
        (lambda s, now: s.incr("a", at=-1), "at must be"),
        (lambda s, now: s.incr("a", at=True), "at must be"),
        (lambda s, now: s.incr("a", at=LAST), "'a': .* is in the future"),
        (lambda s, now: s.incr("a", math.nan), r"below 2\^53 of either sign, not nan"),
        (lambda s, now: s.incr("a", math.inf), r"below 2\^53 of either sign, not inf"),
        (lambda s, now: s.incr("a", -(2**53)), r"below 2\^53"),
        (lambda s, now: s.incr("a", "1"), r"below 2\^53"),
        (lambda s, now: s.incr_many([("a", 1), ("b", 1, NAIVE)]), "has no time zone"),
        (lambda s, now: s.incr_many([("a", 1), ("b", 1.0)]), r"below 2\^53"),
        (lambda s, now: s.incr_many([("a", 1), ("b", 1, now + HOUR)]), "'b': .* in the future"),
        (lambda s, now: s.incr_many({"ab": 1}), r"takes \(series, amount\)"),
        (lambda s, now: s.incr_many([("a", 1, now, 5)]), r"takes \(series, amount\)"),
        (lambda s, now: s.sums(["a", None], now - 60), "series: a str, an int or bytes"),
        (lambda s, now: s.sum("a" * 2049, now), "2048"),
        (lambda s, now: s.sum("a", now + 0.9, now + 0.1), "begins before it ends"),
        (lambda s, now: s.range("a", 0, LAST, step="month"), "beyond the year 9999"),
        (
            lambda s, now: s.range("a", LAST - dt.timedelta(2), LAST, step=HOUR, tz="Asia/Tokyo"),
            "beyond the year 9999",
        ),
        (lambda s, now: s.sums("ab", now - 60), "several series are a list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("linger", [None, 600], ids=["now", "linger"])
def test_what_makes_no_sense(
    url: str, prefix: str, call: Any, message: str, linger: float | None
) -> None:
    """Each is a clear error at once, lingering or not, and changes nothing."""
    now = int(time.time())
    series = TimeSeries(url, "hits", prefix=prefix, linger=linger, deadline=5)
    with contextlib.ExitStack() as stack:
        stack.callback(series.close)
        raised = stack.enter_context(pytest.raises(UsageError, match=message))
        call(series, now)
    assert type(raised.value) is UsageError
    assert known(series, "a", "b") == {"a": 0, "b": 0}


def test_lingering_hits_by_a_clock_that_is_ahead(url: str, prefix: str) -> None:
    """What was given a time is refused when the server's shows that it is in the future."""
    told: list[Any] = []
    now = time.time()
    with TimeSeries(
        url, "hits", prefix=prefix, linger=600, on_refused=told.append, deadline=5
    ) as series:
        layout: Any = series.layout
        layout._guess = layout._ahead = layout._guess + 7200
        layout.off = -layout._guess
        series.incr("a", 3, at=now + 7200)
        series.incr("a", 4, at=now)
        series.incr("a", 5)
    assert [(each.key, *each.amounts) for each in told] == [("a", 3)]
    assert series.sum("a", now - 60, now + 60) == 9
    with TimeSeries(url, "hits", prefix=prefix, linger=600) as series:
        series.sum("a", now)
        with pytest.raises(UsageError, match="'a': 5 is older than all that is kept"):
            series.incr("a", at=5)


def test_hits_that_are_too_old(url: str, prefix: str) -> None:
    """They are refused by name with all that came with them; those that lingered, alone."""
    now = int(time.time())
    long_ago = dt.datetime(1969, 1, 1, tzinfo=dt.UTC)
    told: list[Any] = []
    plain = TimeSeries(url, "hits", prefix=prefix, deadline=5)
    with pytest.raises(UsageError, match="'a': -31536000 is older than all that is kept"):
        plain.incr("a", at=long_ago)
    with pytest.raises(UsageError, match="'b': 5 is older than all that is kept"):
        plain.incr_many([("a", 1, now), ("b", 1, 5), ("c", 1, now)])
    assert known(plain, "a", "b", "c") == {"a": 0, "b": 0, "c": 0}
    with TimeSeries(
        url, "hits", prefix=prefix, linger=600, on_refused=told.append, deadline=5
    ) as lingering:
        lingering.incr_many([("a", 1, now), ("b", 2, 5), ("c", 1, now)])
        lingering.incr("b", 3, at=long_ago)
    assert known(plain, "a", "b", "c") == {"a": 1, "b": 0, "c": 1}
    assert sorted((each.key, *each.amounts) for each in told) == [("b", 2), ("b", 3)]


@pytest.mark.parametrize(
    ("resolutions", "message"),
    [
        ([(math.inf, HOUR)], "step must be a positive number"),
        ([(-10, HOUR)], "step must be a positive number"),
        ([(True, HOUR)], "step must be a positive number"),
        ([("10", HOUR)], "step must be a positive number"),
        ([(10, math.nan)], "retention must be a positive number"),
        ([(10, math.inf)], "retention must be a positive number"),
        ([(10, 0)], "retention must be a positive number"),
        ([(10, 90.5)], "a retention is a whole number of seconds"),
        ([(10, 101 * 366 * DAY)], "retention"),
        ([(2**i, 9999) for i in range(13)], "1 to 12 resolutions, not 13"),
        ([(7, DAY), (10, DAY)], "7 s does not divide the next one, 10 s"),
        ([(10, DAY), (MINUTE, DAY), (90, DAY)], "60 s does not divide the next one, 90 s"),
        ([(10, 2 * DAY), (MINUTE, DAY)], "10 s for 172800 s, but 60 s for 86400 s"),
        ([(MINUTE, DAY), (10, 2 * DAY)], "10 s for 172800 s, but 60 s for 86400 s"),
        ([(HOUR, MINUTE)], "buckets of 3600 s must be kept for longer than 60 s"),
        ([(10, DAY, 5)], "pairs of seconds"),
        ({10: DAY}, "pairs of seconds"),
    ],
)
def test_resolutions_that_make_no_sense(url: str, resolutions: Any, message: str) -> None:
    """They are refused where the series is made, with what is wrong with them."""
    with pytest.raises(UsageError, match=message):
        TimeSeries(url, "hits", resolutions=resolutions)


def test_ranges_far_away(url: str, prefix: str) -> None:
    """In the future there is nothing yet, and long ago nothing any more; both are no error."""
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5)
    series.incr("a", 3)
    now = int(time.time())
    ahead = series.sum("a", now + DAY, LAST, strict=True)
    assert (ahead, ahead.complete) == (0, True)
    assert series.sum("a", now - 60, LAST, strict=True) == 3
    old = series.sum("a", dt.datetime.min.replace(tzinfo=dt.UTC), now - 4000 * DAY)
    assert (old, old.complete) == (0, False)
    assert set(series.range("a", now + DAY, now + 2 * DAY, step=HOUR).values) == {None}
    gone = series.range("a", now - 4000 * DAY, now - 3990 * DAY, step=DAY)
    assert set(gone.values) == {None}
    assert not gone.complete


def test_sums_of_no_series(url: str, prefix: str) -> None:
    """There are none."""
    series = TimeSeries(url, "hits", prefix=prefix, deadline=5)
    assert series.sums([], time.time() - 60) == {}
