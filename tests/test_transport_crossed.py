"""No reply ever reaches another caller: threads, tasks, greenlets, forks, signals, event loops.

Every caller asks the server to say back a word that nobody else asks for, so that a crossed reply
is seen at once. What needs a process of its own runs in one, with warnings as errors.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import redis
import redis.asyncio

from redishacks._transport import connect, connect_async
from redishacks.errors import MaybeAppliedError, UnavailableError
from redishacks.testing import Cluster, FaultProxy, Server
from tests.transport_kit import echo, say, scripted

PRELUDE = """
import asyncio, os, signal, sys, threading, time
import redis, redis.asyncio
from redishacks._command import Command
from redishacks._transport import connect, connect_async
from redishacks.errors import MaybeAppliedError
url = sys.argv[1]

def check(transport, who, count):
    for n in range(count):
        word = f"{who}:{n}"
        assert transport.call(Command(("ECHO", word)), 10) == word.encode()
        words = [f"{who}:{n}:{i}" for i in range(3)]
        outcomes = transport.run([Command(("ECHO", word)) for word in words], 10)
        assert [o.result().decode() for o in outcomes] == words

async def check_async(transport, who, count):
    async def one(n):
        word = f"{who}:{n}"
        assert await transport.call(Command(("ECHO", word)), 10) == word.encode()
        words = [f"{who}:{n}:{i}" for i in range(3)]
        outcomes = await transport.run([Command(("ECHO", word)) for word in words], 10)
        assert [o.result().decode() for o in outcomes] == words
    for begin in range(0, count, 50):
        await asyncio.gather(*map(one, range(begin, begin + 50)))

def wait_for(child):
    assert os.waitpid(child, 0)[1] == 0
"""


def run_apart(body: str, url: str, *options: str) -> None:
    """Run a program with PRELUDE before it; it must end well and say nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", PRELUDE + dedent(body), url],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert (done.stderr, done.stdout, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("protocol", [2, 3])
def test_threads(valkey: Server, protocol: int) -> None:
    """Twelve threads on one transport, with single commands, runs and errors between them."""
    transport = connect(redis.Redis(port=valkey.port, protocol=protocol))

    def work(who: int) -> None:
        for n in range(200):
            word = f"{who}:{n}".encode()
            assert transport.call(echo(word), 10) == word
            words = [b"%s:%d" % (word, i) for i in range(n % 5)]
            assert [o.value for o in transport.run([echo(each) for each in words], 10)] == words

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))


def test_threads_with_faults(valkey: Server) -> None:
    """Threads whose connections are cut, stalled and late: an error, or the word asked for."""
    with FaultProxy(valkey) as proxy:
        transport = connect(redis.Redis(port=proxy.port))
        stop = threading.Event()
        right = []

        def work(who: int) -> None:
            n = 0
            while not stop.is_set():
                n += 1
                word = f"{who}:{n}".encode()
                try:
                    assert transport.call(echo(word), 0.05) == word
                except (MaybeAppliedError, UnavailableError):
                    continue
                right.append(word)

        with ThreadPoolExecutor(6) as pool:
            futures = [pool.submit(work, who) for who in range(6)]
            for _ in range(6):
                proxy.drop_reply(50, cut=False)
                time.sleep(0.05)
                proxy.stall_replies()
                time.sleep(0.1)
                proxy.heal()
                time.sleep(0.05)
                proxy.cut()
            stop.set()
            for future in futures:
                future.result()
        assert len(set(right)) == len(right) > 100
        transport.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_tasks_that_are_cancelled_or_late(valkey: Server, protocol: int) -> None:
    """Two thousand commands of which many are cancelled or late; the others get their own word."""
    transport = connect_async(redis.asyncio.Redis(port=valkey.port, protocol=protocol))
    dice = random.Random(protocol)
    pause = scripted("local t = redis.call('TIME')[1] for i = 1, 200000 do end return 'slow'")

    async def one(n: int) -> str:
        word = f"{n}".encode()
        try:
            if n % 7 == 0:
                words = [b"%s:%d" % (word, i) for i in range(4)]
                outcomes = await transport.run([echo(each) for each in words], 10)
                assert [o.result() for o in outcomes] == words
            elif n % 97 == 0:
                assert await transport.call(pause, 10) == b"slow"
            else:
                deadline = 0.0005 if n % 11 == 0 else 10
                assert await transport.call(echo(word), deadline) == word
        except (MaybeAppliedError, UnavailableError):
            return "late"
        return "right"

    async def main() -> list[Any]:
        tasks = []
        for n in range(2000):
            tasks.append(asyncio.create_task(one(n)))
            if dice.random() < 0.02:
                await asyncio.sleep(0)
            if dice.random() < 0.2:
                dice.choice(tasks).cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert [one for one in results if isinstance(one, AssertionError)] == []
    assert results.count("right") > 500
    assert sum(isinstance(one, asyncio.CancelledError) for one in results) > 20


def test_a_late_command_leaves_the_others_alone(valkey: Server, prefix: str) -> None:
    """A command late behind a slow one is given up alone; when the oldest is late, all are."""
    transport = connect_async(redis.asyncio.Redis(port=valkey.port))
    slow = say("BLPOP", f"{prefix}:nothing", 0.3)

    async def main() -> None:
        mine = await transport.call(say("CLIENT", "ID"), 5)
        first = asyncio.create_task(transport.call(slow, 5))
        await asyncio.sleep(0)
        results: Any = await asyncio.gather(
            transport.call(echo("late"), 0.05),
            transport.call(echo("fine"), 5),
            return_exceptions=True,
        )
        assert isinstance(results[0], MaybeAppliedError)
        assert (results[1], await first) == (b"fine", None)
        assert await transport.call(say("CLIENT", "ID"), 5) == mine
        results = await asyncio.gather(
            transport.call(slow, 0.05),
            transport.call(echo("behind"), 5),
            transport.call(echo("again")._replace(repeatable=True), 5),
            return_exceptions=True,
        )
        assert [type(one) for one in results[:2]] == [MaybeAppliedError] * 2
        assert results[2] == b"again"
        assert await transport.call(say("CLIENT", "ID"), 5) != mine

    asyncio.run(main())


def test_bulk_commands_keep_out_of_the_way(valkey: Server, prefix: str) -> None:
    """A command marked as bulk has another connection: nobody waits behind it."""
    transport = connect_async(redis.asyncio.Redis(port=valkey.port))
    slow = say("BLPOP", f"{prefix}:nothing", 0.5)._replace(bulk=True)

    async def main() -> None:
        bulk = asyncio.create_task(transport.call(slow, 5))
        await asyncio.sleep(0.05)
        assert await transport.call(echo("quick"), 0.3) == b"quick"
        assert not bulk.done()
        assert await bulk is None

    asyncio.run(main())


def test_a_task_cancelled_before_its_write_says_nothing(valkey: Server, prefix: str) -> None:
    """Of commands cancelled in the tick in which they were made, only the first was written."""
    transport = connect_async(redis.asyncio.Redis(port=valkey.port))
    count = scripted("return redis.call('INCR', KEYS[1])", keys=[prefix])

    async def main() -> int:
        await transport.call(count, 5)
        tasks = [asyncio.create_task(transport.call(count, 5)) for _ in range(10)]
        await asyncio.sleep(0)  # every task has begun; the loop has not yet flushed
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return int(await transport.call(count, 5))

    assert asyncio.run(main()) == 3


def test_two_loops_in_turn_and_at_once(valkey: Server) -> None:
    """One transport serves event loops one after the other and several at the same time."""
    run_apart(
        """
        client = redis.asyncio.Redis.from_url(url)
        transport = connect_async(client)
        for turn in range(3):
            asyncio.run(check_async(transport, f"turn {turn}", 100))
        def work(who):
            for turn in range(3):
                asyncio.run(check_async(transport, f"{who} {turn}", 100))
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert transport._sites == {}
        """,
        valkey.url,
    )


def test_loops_that_end_badly_leave_nothing(valkey: Server) -> None:
    """A loop closed without ceremony, a transport dropped in mid-loop: no warning, no socket."""
    run_apart(
        """
        import gc
        def sockets():
            gc.collect()
            return sum("socket" in os.readlink(f"/proc/self/fd/{n}")
                       for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}"))
        before = sockets()
        transport = connect_async(url)
        for turn in range(3):
            loop = asyncio.new_event_loop()
            loop.run_until_complete(check_async(transport, f"turn {turn}", 50))
            loop.close()
        assert sockets() <= before + 1, (before, sockets())
        async def main():
            other = connect_async(redis.asyncio.Redis.from_url(url))
            await check_async(other, "other", 50)
            del other
            gc.collect()
            await asyncio.sleep(0.01)
            assert sockets() <= before + 5
            await check_async(transport, "main", 50)
        asyncio.run(main())
        loop = asyncio.new_event_loop()
        loop.run_until_complete(check_async(transport, "last", 50))
        loop.close()
        del transport, loop
        assert sockets() == before, (before, sockets())
        """,
        valkey.url,
    )


@pytest.mark.parametrize("kind", ["url", "unix_url"])
def test_gevent(valkey: Server, kind: str) -> None:
    """Greenlets share a transport, and one that waits lets the others run."""
    run_apart(
        """
        from gevent import monkey
        monkey.patch_all()
        import gevent
        transport = connect(url)
        jobs = [gevent.spawn(check, transport, who, 40) for who in range(12)]
        gevent.joinall(jobs, raise_error=True)
        ticks = []
        def tick():
            while True:
                ticks.append(1)
                gevent.sleep(0.01)
        ticker = gevent.spawn(tick)
        transport.call(Command(("BLPOP", "nothing", 0.3)), 5)
        assert len(ticks) > 5, ticks
        try:
            transport.call(Command(("BLPOP", "nothing", 5)), 0.1)
        except MaybeAppliedError:
            ticker.kill()
        else:
            raise AssertionError("no deadline")
        """,
        getattr(valkey, kind),
        "-W",
        "ignore",
    )


def test_fork(valkey: Server) -> None:
    """Parent and children go on after a fork, and the parent on the very same connections."""
    run_apart(
        """
        transport = connect(url)
        stop = threading.Event()
        def work():
            n = 0
            while not stop.is_set():
                check(transport, f"thread {n}", 1)
                n += 1
        threads = [threading.Thread(target=work) for _ in range(3)]
        check(transport, "before", 1)
        mine = transport.call(Command(("CLIENT", "ID")), 5)
        for thread in threads: thread.start()
        children = []
        for n in range(4):
            child = os.fork()
            if child == 0:
                check(transport, f"child {n}", 100)
                os._exit(0)
            children.append(child)
            check(transport, "parent", 30)
        for child in children: wait_for(child)
        stop.set()
        for thread in threads: thread.join()
        check(transport, "after", 30)
        held = connect(redis.Redis.from_url(url, client_name="held"))
        first = held.call(Command(("CLIENT", "ID")), 5)
        child = os.fork()
        if child == 0:
            assert held.call(Command(("CLIENT", "ID")), 5) != first
            os._exit(0)
        wait_for(child)
        assert held.call(Command(("CLIENT", "ID")), 5) == first
        """,
        valkey.url,
        "-W",
        "ignore::DeprecationWarning",
    )


def test_fork_with_asyncio(valkey: Server) -> None:
    """A fork between two loops, or within one, leaves the parent's connection alone."""
    run_apart(
        """
        transport = connect_async(url)
        async def main():
            await check_async(transport, "before", 50)
            first = await transport.call(Command(("CLIENT", "ID")), 5)
            tasks = (check_async(transport, f"task {n}", 50) for n in range(4))
            flying = [asyncio.create_task(task) for task in tasks]
            await asyncio.sleep(0)
            child = os.fork()
            if child == 0:
                failed = 1
                def work():
                    nonlocal failed
                    asyncio.run(check_async(transport, "child", 100))
                    failed = 0
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                os._exit(failed)
            await asyncio.gather(*flying)
            await check_async(transport, "parent", 100)
            wait_for(child)
            assert await transport.call(Command(("CLIENT", "ID")), 5) == first
        asyncio.run(main())
        """,
        valkey.url,
        "-W",
        "ignore::DeprecationWarning",
    )


def test_signal_handlers(valkey: Server) -> None:
    """A handler that uses the client in the middle of exchanges gets its own replies."""
    run_apart(
        """
        transport = connect(url)
        calls = 0
        def handler(*_):
            global calls
            calls += 1
            check(transport, f"handler {calls}", 1)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.0113)
        end = time.monotonic() + 2
        n = 0
        while time.monotonic() < end:
            n += 1
            check(transport, f"main {n}", 1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert calls > 30, calls
        """,
        valkey.url,
    )


def test_fork_inside_a_signal_handler(valkey: Server) -> None:
    """A fork in the middle of an exchange: the parent gets the reply, the child cannot take it."""
    run_apart(
        """
        transport = connect(url)
        check(transport, "warm", 1)
        children = []
        def handler(*_):
            child = os.fork()
            if child == 0:
                check(transport, "in the child's handler", 3)
            children.append(child)
        signal.signal(signal.SIGALRM, handler)
        busy = "local n = 0 for i = 1, 60000000 do n = n + 1 end return ARGV[1]"
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        parent = os.getpid()
        try:
            reply = transport.call(Command(("EVAL", busy, 0, "mine")), 20)
        except MaybeAppliedError:
            reply = None
        assert children, "the script was done before the signal came"
        if os.getpid() != parent:
            assert reply is None, reply
            check(transport, "child", 30)
            os._exit(0)
        assert reply == b"mine", reply
        check(transport, "parent", 30)
        for child in children: wait_for(child)
        """,
        valkey.url,
    )


#: `fork_at(n)` forks before the n-th bytecode of our transport, as a signal handler could. The
#: parent waits there until the child, which goes on, has ended.
FORK_AT = """
parent = os.getpid()
def fork_at(n, in_child):
    left = n
    def trace(frame, event, arg):
        nonlocal left
        if "/_transport/" not in frame.f_code.co_filename or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)
                child = os.fork()
                if child:
                    children.append(os.waitpid(child, 0)[1])
                else:
                    in_child()
        return trace
    children = []
    sys._getframe().f_trace_opcodes = True  # Python 3.12 heeds it only before settrace()
    sys.settrace(trace)
    return children

def info(reply):
    pairs = (pair.split("=", 1) for pair in reply.decode().split())
    return {key: value for key, value in pairs}

INFO = Command(("CLIENT", "INFO"), repeatable=True)
"""


def test_fork_while_connecting(valkey: Server) -> None:
    """A fork at any moment of a call: the child says not a word on the parent's connection."""
    run_apart(
        FORK_AT
        + dedent("""
        transport = connect(url)
        n = forks = 0
        while forks * 3 == n:
            n += 3
            transport.close()
            children = fork_at(n, lambda: None)
            try:
                mine = info(transport.call(INFO, 10))
            finally:
                sys.settrace(None)
            if os.getpid() != parent:
                check(transport, "child", 1)
                os._exit(0)
            assert children in ([0], []), (n, children)
            forks += len(children)
            assert mine["tot-cmds"] == "1", (n, mine)  # what was said before: its first PING
            again = info(transport.call(INFO, 10))
            assert (again["id"], again["tot-cmds"]) == (mine["id"], "2"), (n, again)
        assert forks > 100, forks
        """),
        valkey.url,
    )


def test_fork_while_connecting_with_asyncio(valkey: Server) -> None:
    """The same in a loop, with which the child goes on for a moment, though it should not."""
    run_apart(
        FORK_AT
        + dedent("""
        transport = connect_async(url)
        def go_on():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # asyncio complains in the child
            signal.setitimer(signal.ITIMER_REAL, 0.003)
        async def main():
            n = forks = 0
            while forks * 7 == n:
                n += 7
                await transport.aclose()
                children = fork_at(n, go_on)
                try:
                    mine = info(await transport.call(INFO, 10))
                finally:
                    sys.settrace(None)
                    if os.getpid() != parent:
                        os._exit(0)
                forks += len(children)
                assert mine["tot-cmds"] == "1", (n, mine)
                again = info(await transport.call(INFO, 10))
                assert (again["id"], again["tot-cmds"]) == (mine["id"], "2"), (n, again)
            assert forks > 50, forks
        asyncio.run(main())
        """),
        valkey.unix_url,
    )


def test_fork_after_a_node_has_left(cluster: Cluster) -> None:
    """Connections in use to a node that is no longer part of the cluster are the parent's too."""
    run_apart(
        """
        transport = connect(redis.RedisCluster.from_url(url))
        transport.call(Command(("GET", "k"), (b"k",)), 10)
        node = next(node for node in transport._nodes.values() if node._idle)
        link = node.take(time.monotonic())
        transport._nodes.clear()
        child = os.fork()
        if child == 0:
            place = os.readlink(f"/proc/self/fd/{link._sock.fileno()}")
            os._exit(place != os.devnull)
        wait_for(child)
        """,
        cluster.nodes[0].url,
    )


def test_fork_in_a_thread(valkey: Server) -> None:
    """Where a thread forks before any client is there, the child knows its main thread."""
    run_apart(
        """
        from redishacks._transport._link import Main
        def child():
            signal.signal(signal.SIGALRM, lambda *_: None)
            transport = connect(url)
            check(transport, "child", 1)
            assert Main.ident == threading.get_ident()
            threading.Timer(10, os._exit, (1,)).start()
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            try:
                transport.call(Command(("BLPOP", "nothing", 60)), 0.3)
            except MaybeAppliedError:
                os._exit(0)
        children = []
        def fork():
            children.append(os.fork())
            if children == [0]:
                try:
                    child()
                finally:
                    os._exit(1)
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        wait_for(children[0])
        """,
        valkey.url,
        "-W",
        "ignore::DeprecationWarning",
    )


def test_forgotten_clients_say_nothing_at_exit(valkey: Server) -> None:
    """A program that never closes anything ends without a warning, in both colours."""
    run_apart(
        """
        transport = connect(url)
        check(transport, "sync", 3)
        thread = threading.Thread(target=check, args=(transport, "thread", 3))
        thread.start()
        thread.join()
        other = connect_async(url)
        asyncio.run(check_async(other, "async", 50))
        """,
        valkey.url,
    )


def test_use_at_exit(valkey: Server) -> None:
    """A last call at interpreter exit works, in both colours: no thread is started for it."""
    run_apart(
        """
        import atexit
        transport, other = connect(url), connect_async(url)
        def last():
            check(transport, "last", 1)
            asyncio.run(check_async(other, "last", 50))
        atexit.register(last)
        check(transport, "first", 1)
        """,
        valkey.url,
    )
