"""Coalescing in the process: nothing lost, nothing doubled, and said when it cannot be sent."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from typing import Any

import pytest
import redis

from redishacks.counters import AsyncBufferedCounter, BufferedCounter
from redishacks.errors import (
    MaybeAppliedError,
    PartlyAppliedError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.testing import FaultProxy, valkey_server
from tests.helpers import Colour, eventually


def total(url: str, prefix: str, column: str = "amount", name: str = "hits") -> int:
    """Return the sum of all pending amounts."""
    with redis.Redis.from_url(url) as raw:
        pairs: Any = raw.zrange(f"{prefix}:c1:{{{name}/0}}:p:{column}", 0, -1, withscores=True)
        return int(sum(score for _, score in pairs))


def test_hits_are_merged_and_sent(colour: Colour, valkey: Any, prefix: str) -> None:
    """Hits arrive by themselves within the linger time, merged by id and rule."""
    hits = colour.counter(
        colour.client(valkey.url),
        "hits",
        prefix=prefix,
        linger=0.05,
        columns={"amount": "sum", "seen": "max", "low": "min"},
    )
    for i in range(10):
        hits.incr("/a")
        hits.incr("/a", 2, seen=i, low=-i)
        hits.incr("/é")
        hits.incr_many({"/a": {"amount": 1}, b"/a": {"amount": 1}})
    colour.sleep(0.1)
    eventually(lambda: colour.after(0.02, total, valkey.url, prefix) == 60)
    assert hits.pending("/a") == 50
    assert hits.pending("/a", "seen") == 9
    assert hits.pending("/a", "low") == -9
    hits.close()
    with pytest.raises(UsageError, match="closed"):
        hits.incr("/a")
    assert total(valkey.url, prefix) == 60


def test_close_and_with_send_at_once(valkey: Any, prefix: str) -> None:
    """What is buffered is in Redis when close(), send() or the end of a with has returned."""
    with BufferedCounter(valkey.url, "hits", prefix=prefix, linger=60) as hits:
        hits.incr("/a")
        hits.send()
        assert hits.pending("/a") == 1
        hits.incr("/a")
        assert hits.pending("/a") == 1
    assert hits.pending("/a") == 2

    async def main() -> None:
        async with AsyncBufferedCounter(valkey.url, "hits", prefix=prefix, linger=60) as counter:
            await counter.incr("/a")
        assert await counter.pending("/a") == 3

    asyncio.run(main())


def test_threads_lose_nothing(valkey: Any, prefix: str) -> None:
    """Eight threads at full speed with sends going on: every hit counts once."""
    with BufferedCounter(valkey.url, "hits", prefix=prefix, linger=0.001) as hits:

        def work(n: int) -> None:
            for i in range(20_000):
                hits.incr(f"/{i % 100}")
                if i % 10 == 0:
                    hits.incr(f"/{n}", 2)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert total(valkey.url, prefix) == 8 * 20_000 + 8 * 2_000 * 2


@pytest.mark.parametrize("amount", [None, 2])
def test_a_hit_during_close_is_sent(valkey: Any, prefix: str, amount: int | None) -> None:
    """A hit that another thread's close() overtakes is sent by the thread that counted it."""
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix, linger=60)
    hits.incr("/first")

    class Overtaken(deque[Any]):
        """A log in which somebody closes the counter just before a hit gets in."""

        def append(self, hit: Any) -> None:
            hits.close()
            super().append(hit)

    assert hits._coalescer is not None
    buffer = hits._coalescer.buffer
    buffer.others = Overtaken(buffer.others)
    buffer.ones = Overtaken(buffer.ones)
    hits.incr("/late", amount)
    assert hits.pending("/late") == (amount or 1)
    assert total(valkey.url, prefix) == 1 + (amount or 1)


def test_a_lost_reply_counts_once(colour: Colour, valkey: Any, prefix: str) -> None:
    """A send whose reply is lost, again and again, is repeated and counts once."""
    with FaultProxy(valkey) as proxy:
        hits = colour.counter(colour.client(proxy.url), "hits", prefix=prefix, linger=60)
        hits.incr("/warm")
        hits.send()
        for n in range(5):
            proxy.drop_reply()
            for _ in range(3):
                hits.incr("/a")
            colour.sleep(0)
            for _ in range(20):
                try:
                    hits.send()
                except Exception:
                    continue
                break
            assert total(valkey.url, prefix) == 1 + 3 * (n + 1)
        hits.close()
    assert total(valkey.url, prefix) == 16


def test_a_full_buffer_says_so(colour: Colour, prefix: str) -> None:
    """With Redis away a full buffer refuses the hit; what it accepted arrives later, once."""
    with valkey_server() as server:
        hits = colour.counter(
            colour.client(server.url),
            "hits",
            prefix=prefix,
            linger=0.02,
            max_buffered=50,
            deadline=0.3,
        )
        hits.incr("/0")
        hits.send()
        accepted = 1
        with server.paused():
            refusals: list[str] = []
            for i in range(200):
                try:
                    hits.incr(f"/{i}")
                    accepted += 1
                except UnavailableError as error:
                    refusals.append(str(error))
                    if len(refusals) == 5:
                        break
                colour.sleep(0)
            assert len(refusals) == 5
            assert "50 ids are buffered" in refusals[0]
            assert accepted <= 51
        eventually(lambda: colour.after(0.01, total, server.url, prefix) == accepted)
        hits.incr("/again")
        hits.close()
        assert total(server.url, prefix) == accepted + 1


def test_blocking_overflow_waits(prefix: str) -> None:
    """overflow="block" waits up to the deadline for room instead of raising at once."""
    with valkey_server() as server:
        hits = BufferedCounter(
            server.url,
            "hits",
            prefix=prefix,
            linger=0.01,
            max_buffered=10,
            overflow="block",
            deadline=5,
        )
        hits.incr("/0")
        hits.send()
        with server.paused():
            for i in range(10):
                hits.incr(f"/{i}")
            done = threading.Event()

            def more() -> None:
                hits.incr("/more")
                done.set()

            thread = threading.Thread(target=more)
            thread.start()
            assert not done.wait(0.2)
        thread.join(10)
        assert done.is_set()
        hits.close()
        assert total(server.url, prefix) == 12


def test_a_refused_hit_does_not_block_the_rest(
    colour: Colour, valkey: Any, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A sum that would pass 2^53 is reported; all others of its part arrive."""
    told: list[Any] = []
    hits = colour.counter(
        colour.client(valkey.url), "hits", prefix=prefix, linger=60, on_refused=told.append
    )
    hits.incr("full", 2**53)
    hits.send()
    hits.incr_many({f"/{i}": 1 for i in range(5)})
    hits.incr("full", 5)
    hits.incr_many({f"/{i}": 1 for i in range(5, 10)})
    hits.close()
    assert [(r.id, r.amounts) for r in told] == [(b"full", [5])]
    assert "2^53" in caplog.text
    assert total(valkey.url, prefix) == 2**53 + 10


def test_a_counter_laid_out_otherwise_is_refused(valkey: Any, prefix: str) -> None:
    """A lingering counter that disagrees with the stored layout tells its callers."""
    BufferedCounter(valkey.url, "hits", prefix=prefix).incr("/a")
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix, linger=0.01, partitions=2)
    hits.incr("/a")

    def told() -> bool:
        try:
            hits.incr("/a")
        except UsageError as error:
            return "in use with partitions = 1" in str(error)
        return False

    eventually(told)
    with pytest.raises(UsageError):
        hits.close()
    hits._coalescer.after_fork()  # type: ignore[union-attr]


def test_garbage_is_sent(valkey: Any, prefix: str) -> None:
    """A counter that nobody holds any more sends what it has, and its thread ends."""
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix, linger=0.05)
    hits.incr("/a")
    before = threading.active_count()
    del hits
    gc.collect()
    eventually(lambda: total(valkey.url, prefix) == 1)
    eventually(lambda: threading.active_count() < before)


def test_loops_one_after_another(valkey: Any, prefix: str) -> None:
    """Hits of a loop that ended are sent by it, or by the next one, without an aclose()."""
    counter = AsyncBufferedCounter(valkey.url, "hits", prefix=prefix, linger=30)

    async def main() -> None:
        await asyncio.gather(*(counter.incr(f"/{i}") for i in range(50)))

    for n in range(3):
        asyncio.run(main())
        assert total(valkey.url, prefix) == 50 * (n + 1)


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program that uses the library."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "ending",
    ["pass", "raise SystemExit(3)", "1 / 0", "import signal; signal.raise_signal(signal.SIGINT)"],
)
def test_the_rest_is_sent_at_interpreter_exit(valkey: Any, prefix: str, ending: str) -> None:
    """Whichever way a process ends in good order, its hits arrive, sync and async."""
    done = run(
        f"""
        import asyncio, sys
        from redishacks.counters import AsyncBufferedCounter, BufferedCounter
        hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
        hits.incr("/a")
        other = AsyncBufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(other.incr("/a"))
        loop.close()
        {ending}
        """,
        valkey.url,
        prefix,
    )
    assert total(valkey.url, prefix) == 2, done.stderr


def test_multiprocessing_children_send(valkey: Any, prefix: str) -> None:
    """Children of multiprocessing, forked or spawned, send before they end."""
    done = run(
        """
        import multiprocessing as mp, sys, os
        from redishacks.counters import BufferedCounter
        hits = None
        def child(url, prefix):
            global hits
            if hits is None:
                hits = BufferedCounter(url, "hits", prefix=prefix, linger=60)
            hits.incr("/child")
        if __name__ == "__main__":
            hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
            hits.incr("/parent")
            ctx = mp.get_context("fork")
            for _ in range(3):
                process = ctx.Process(target=child, args=sys.argv[1:])
                process.start()
                process.join()
        """,
        valkey.url,
        prefix,
    )
    assert done.returncode == 0, done.stderr
    assert total(valkey.url, prefix) == 4


def test_a_forked_child_starts_empty(valkey: Any, prefix: str) -> None:
    """Parent and child each send their own hits, and the parent's are not sent twice."""
    done = run(
        """
        import os, sys
        from redishacks.counters import BufferedCounter
        hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=0.02)
        for i in range(1000):
            hits.incr(f"/{i}")
        children = []
        for n in range(5):
            hits.incr("/before")
            pid = os.fork()
            if pid == 0:
                for i in range(100):
                    hits.incr("/child")
                hits.close()
                os._exit(0)
            children.append(pid)
            hits.incr("/after")
        hits.close()
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
        """,
        valkey.url,
        prefix,
    )
    assert done.returncode == 0, done.stderr
    with BufferedCounter(valkey.url, "hits", prefix=prefix) as hits:
        assert hits.pending("/child") == 500
        assert hits.pending("/before") == hits.pending("/after") == 5
        assert total(valkey.url, prefix) == 1510


def test_signal_handlers_may_count(valkey: Any, prefix: str) -> None:
    """A handler that counts in the middle of counting and sending: nothing lost, no deadlock."""
    done = run(
        """
        import signal, sys, time
        from redishacks.counters import BufferedCounter
        hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=0.001)
        handled = 0
        def handler(*_):
            global handled
            handled += 1
            hits.incr("/signal")
            hits.incr("/signal", 1)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        end = time.monotonic() + 2
        counted = 0
        while time.monotonic() < end:
            for i in range(100):
                hits.incr("/main")
            counted += 100
            if counted % 5000 == 0:
                hits.send()
        signal.setitimer(signal.ITIMER_REAL, 0)
        hits.close()
        print(counted, handled)
        """,
        valkey.url,
        prefix,
    )
    assert done.returncode == 0, done.stderr
    counted, handled = map(int, done.stdout.split())
    assert handled > 100
    with BufferedCounter(valkey.url, "hits", prefix=prefix) as hits:
        assert hits.pending("/main") == counted
        assert hits.pending("/signal") == 2 * handled


def test_sigkill_loses_only_what_was_not_sent(valkey: Any, prefix: str) -> None:
    """After a SIGKILL Redis holds every hit that was older than the linger time."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from redishacks.counters import BufferedCounter\n"
            "hits = BufferedCounter(sys.argv[1], 'hits', prefix=sys.argv[2], linger=0.05)\n"
            "n = 0\n"
            "while True:\n"
            "    hits.incr('/a'); n += 1; print(n, time.monotonic(), flush=True)\n"
            "    time.sleep(0.001)\n",
            valkey.url,
            prefix,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: total(valkey.url, prefix) > 20)
    finally:
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        out, _ = process.communicate()
    printed = [line.split() for line in out.splitlines() if line.count(" ") == 1]
    long_before = (
        max(int(n) for n, at in printed if float(at) < killed - 1.0)
        if any(float(at) < killed - 1.0 for _, at in printed)
        else 0
    )
    assert long_before <= total(valkey.url, prefix) <= len(out.splitlines()) + 1


def test_memory_is_bounded_in_a_burst(valkey: Any, prefix: str) -> None:
    """A burst of more ids than the buffer holds is waited for while Redis answers, not refused."""
    with BufferedCounter(valkey.url, "hits", prefix=prefix, linger=10, max_buffered=1_000) as hits:
        for i in range(20_000):
            hits.incr(f"/{i}")
            if i % 1000 == 0:
                assert hits._coalescer is not None
                assert hits._coalescer.buffer.held() <= 1_000
    assert total(valkey.url, prefix) == 20_000
    assert os.getpid() > 0


def test_greenlets_count_and_send(valkey: Any, prefix: str) -> None:
    """Under gevent's patches hits are counted by greenlets and sent by one of its own."""
    done = run(
        """
        from gevent import monkey
        monkey.patch_all()
        import gevent, sys, time
        from redishacks.counters import BufferedCounter
        hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=0.02)
        direct = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2])
        def work(n):
            for i in range(50):
                hits.incr(f"/{i}")
                direct.incr(f"/{i}")
                gevent.sleep(0)
        gevent.joinall([gevent.spawn(work, n) for n in range(20)], raise_error=True)
        end = time.monotonic() + 10
        while direct.pending("/7") < 40:
            assert time.monotonic() < end
            gevent.sleep(0.01)
        hits.close()
        """,
        valkey.url,
        prefix,
    )
    assert done.returncode == 0, done.stderr
    assert total(valkey.url, prefix) == 2000


def test_a_callback_that_raises_stops_nobody(colour: Colour, valkey: Any, prefix: str) -> None:
    """An error in `on_refused` is logged, and the sender goes on in either colour."""

    def refuse(refused: Any) -> None:
        raise RuntimeError("the callback's own")

    hits = colour.counter(
        colour.client(valkey.url), "hits", prefix=prefix, linger=0.02, on_refused=refuse
    )
    hits.incr("full", 2**53)
    hits.send()
    hits.incr("full", 1)
    colour.sleep(0.2)
    hits.incr("/a")
    eventually(lambda: colour.after(0.02, hits.pending, "/a") == 1)
    hits.close()


def test_one_partition_that_refuses_does_not_hold_up_the_others(valkey: Any, prefix: str) -> None:
    """With one partition out of order the hits of all others keep arriving."""
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix, partitions=4, linger=0.02)
    with redis.Redis.from_url(valkey.url) as raw:
        for i in range(40):
            hits.incr(f"/{i}")
        hits.send()
        sick = f"{prefix}:c1:{{hits/0}}:p:amount"
        raw.rename(sick, "aside")
        raw.set(sick, "not a set")
        for _ in range(3):
            for i in range(40):
                hits.incr(f"/{i}")
            with pytest.raises(ServerError, match="WRONGTYPE"):
                hits.send()
        for p in (1, 2, 3):
            key = f"{prefix}:c1:{{hits/{p}}}:p:amount"
            pairs: Any = raw.zrange(key, 0, -1, withscores=True)
            assert {score for _, score in pairs} == {4}
        raw.rename("aside", sick)
    hits.close()
    assert sum(amount for _, amount in hits.top(100)) == 160


@pytest.mark.parametrize("ending", ["run", "loop", "cancelled"])
def test_hits_of_a_forgotten_async_counter_arrive(valkey: Any, prefix: str, ending: str) -> None:
    """A local counter, a loop that ends at once, a sender that never got to run: all is sent."""
    done = run(
        """
        import asyncio, sys
        from redishacks.counters import AsyncBufferedCounter
        async def main():
            hits = AsyncBufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
            await hits.incr("/a")
            if sys.argv[3] == "cancelled":
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
        if sys.argv[3] == "run":
            asyncio.run(main())
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(main())
            loop.close()
        """,
        valkey.url,
        prefix,
        ending,
    )
    assert total(valkey.url, prefix) == 1, done.stderr


def test_a_handler_that_closes_does_not_hang(valkey: Any, prefix: str) -> None:
    """close() in a signal handler that interrupted a send comes back; nothing is lost."""
    done = run(
        """
        import signal, sys, time
        from redishacks.counters import BufferedCounter
        from redishacks.errors import UnavailableError
        hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60, deadline=0.2)
        refused = 0
        def handler(*_):
            global refused
            try:
                hits.send()
            except UnavailableError:
                refused += 1
        signal.signal(signal.SIGALRM, handler)
        hits.incr("/a")
        hits._coalescer._sending.acquire()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        end = time.monotonic() + 20
        while not refused and time.monotonic() < end:
            time.sleep(0.01)
        hits._coalescer._sending.release()
        assert refused == 1
        """,
        valkey.url,
        prefix,
    )
    assert done.returncode == 0, done.stderr
    assert total(valkey.url, prefix) == 1


def test_children_forked_before_the_first_hit_are_producers_of_their_own(
    valkey: Any, prefix: str
) -> None:
    """A counter made before the fork, as a preloading web server does, loses nobody's hits."""
    done = run(
        """
        import asyncio, os, sys
        from redishacks.counters import AsyncBufferedCounter, BufferedCounter
        hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
        others = AsyncBufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
        async def count():
            await others.incr("/async")
            await others.aclose()
        def work(generations):
            if generations and os.fork() == 0:
                work(generations - 1)
            hits.incr("/sync")
            hits.close()
            asyncio.run(count())
            if generations < 3:
                os._exit(0)
        work(3)
        """,
        valkey.url,
        prefix,
    )
    assert done.returncode == 0, done.stderr
    eventually(lambda: total(valkey.url, prefix) == 8)


def test_two_first_hits_at_once_leave_one_sender(valkey: Any, prefix: str) -> None:
    """Of two threads that both find no sender, and both start one, one sender goes on."""
    hits = BufferedCounter(valkey.url, "hits", prefix=prefix, linger=0.01)
    before = threading.active_count()
    hits._coalescer.start()  # type: ignore[union-attr]
    hits._coalescer.start()  # type: ignore[union-attr]
    eventually(lambda: threading.active_count() == before + 1)
    hits.incr("/a")
    eventually(lambda: total(valkey.url, prefix) == 1)
    hits.close()


@pytest.mark.parametrize("what", ["send", "first", "full"])
def test_a_handler_that_forks_doubles_nothing(valkey: Any, prefix: str, what: str) -> None:
    """Forked at any line of a send or of a hit, parent and child go on with hits of their own."""
    done = run(
        """
        import atexit, os, sys
        from redishacks.counters import BufferedCounter
        url, prefix, what = sys.argv[1:]
        parent = os.getpid()
        files = ("_buffer.py", "_linger.py")

        def at_line(n, function):
            # As a signal handler that comes just before the n-th line that is new.
            seen, kid = set(), None
            def tracer(frame, event, arg):
                nonlocal kid
                if not frame.f_code.co_filename.endswith(files):
                    return None
                seen.add((frame.f_code, frame.f_lineno))
                if kid is None and len(seen) == n:
                    kid = os.fork()
                return tracer
            sys.settrace(tracer)
            try:
                function()
            finally:
                sys.settrace(None)
            return kid

        for n in range(1, 1000):
            hits = BufferedCounter(
                url, "hits", prefix=prefix, linger=60, partitions=2, max_buffered=7
            )
            if what != "first":
                for i in range(7):
                    hits.incr(f"/{i}", None if what == "full" or i % 2 else 2)
            kid = at_line(n, hits.send if what == "send" else lambda: hits.incr("/0"))
            if kid == 0:
                hits.incr("/kid")
                atexit._run_exitfuncs()
                os._exit(0)
            hits.close()
            if kid is None:
                break
            assert os.waitpid(kid, 0)[1] == 0, n
        print(n)
        """,
        valkey.url,
        prefix,
        what,
    )
    assert done.returncode == 0, done.stderr
    rounds = int(done.stdout)
    assert 10 < rounds < 999
    with BufferedCounter(valkey.url, "hits", prefix=prefix, partitions=2) as hits:
        got = dict(hits.top(100))
    assert got.pop("/kid") == rounds - 1
    assert sum(got.values()) == rounds * {"send": 11, "first": 1, "full": 8}[what]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("earlier", [False, True])
def test_hits_of_exit_handlers_arrive(valkey: Any, prefix: str, when: str, earlier: bool) -> None:
    """A handler that counts at exit, run before or after the last send, loses nothing."""
    done = run(
        """
        import asyncio, atexit, sys
        from redishacks.counters import AsyncBufferedCounter, BufferedCounter
        def last():
            for _ in range(3):
                hits.incr("/last")
                hits.incr_many({"/last": 1, "/more": 1})
                asyncio.run(others.incr("/last"))
            late = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
            late.incr("/last")
        if sys.argv[3] == "after":
            atexit.register(last)
        hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
        others = AsyncBufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
        if sys.argv[3] == "before":
            atexit.register(last)
        if sys.argv[4] == "True":
            hits.incr("/first")
            asyncio.run(others.incr("/first"))
        """,
        valkey.url,
        prefix,
        when,
        str(earlier),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert total(valkey.url, prefix) == 13 + 2 * earlier


def test_a_late_hit_that_cannot_be_sent_says_so(colour: Colour, prefix: str) -> None:
    """Where nobody is left to send it, a hit that is kept raises what forbids repeating it."""
    with valkey_server() as server:
        hits = colour.counter(
            colour.client(server.url), "hits", prefix=prefix, linger=60, deadline=0.1
        )
        coalescer = (hits if colour.name == "sync" else hits.target)._coalescer
        coalescer.closed = True  # as it is once the interpreter is exiting
        with server.paused(), pytest.raises(MaybeAppliedError, match="too late"):
            hits.incr("/a", 2)
        hits.close()
        assert total(server.url, prefix) == 2


def test_an_async_counter_finds_its_host_at_exit(valkey: Any, prefix: str) -> None:
    """The last send reaches a server by name, when no thread can be started for the resolver."""
    done = run(
        """
        import asyncio, sys
        from redishacks.counters import AsyncBufferedCounter
        hits = AsyncBufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(hits.incr("/a"))
        loop.close()
        """,
        valkey.url.replace("127.0.0.1", "localhost"),
        prefix,
    )
    assert total(valkey.url, prefix) == 1, done.stderr


def test_counters_of_a_day_leave_nothing_behind(valkey: Any, prefix: str) -> None:
    """A counter per request adds no finalizer to multiprocessing's, nor to what atexit runs."""
    done = run(
        """
        import atexit, sys
        from multiprocessing import util
        from redishacks.counters import BufferedCounter
        seen = set()
        for _ in range(5):
            with BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60) as hits:
                hits.incr("/a")
            seen.add((len(util._finalizer_registry), atexit._ncallbacks()))
        assert len(seen) == 1, seen
        """,
        valkey.url,
        prefix,
    )
    assert done.returncode == 0, done.stderr
    assert total(valkey.url, prefix) == 5


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_that_counted_while_importing_sends(
    valkey: Any, prefix: str, tmp_path: Any, method: str
) -> None:
    """A counter used while a child imports its main module sends when the child ends."""
    script = tmp_path / "spawns.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing as mp, sys
            from redishacks.counters import BufferedCounter
            hits = BufferedCounter(sys.argv[1], "hits", prefix=sys.argv[2], linger=60)
            hits.incr("/import")
            def child():
                hits.incr("/child")
            if __name__ == "__main__":
                process = mp.get_context(sys.argv[3]).Process(target=child)
                process.start()
                process.join()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script), valkey.url, prefix, method],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert total(valkey.url, prefix) == 3


def test_many_hits_that_fill_the_buffer_say_which_were_taken(colour: Colour, prefix: str) -> None:
    """Of `incr_many` into a buffer that fills midway every id is taken, or named as not taken."""
    with valkey_server() as server:
        hits = colour.counter(
            colour.client(server.url),
            "hits",
            prefix=prefix,
            linger=0.02,
            max_buffered=10,
            deadline=0.3,
        )
        many = {f"/{i}": 1 for i in range(40)}
        with server.paused():
            with pytest.raises(PartlyAppliedError, match=r"of 40 ids .* 10 ids are buffered") as e:
                hits.incr_many(many)
            with pytest.raises(UnavailableError, match="10 ids are buffered"):
                hits.incr_many(many)
        assert 0 < len(e.value.failed) < 40

        left: Any = dict.fromkeys(e.value.failed, 1)

        def repeated() -> bool:
            nonlocal left
            try:
                hits.incr_many(left)
            except PartlyAppliedError as error:
                left = dict.fromkeys(error.failed, 1)
            except UnavailableError:
                pass
            else:
                return True
            return False

        eventually(repeated)
        hits.close()
        with BufferedCounter(server.url, "hits", prefix=prefix) as look:
            assert dict(look.top(100)) == many
