"""`redishacks locks`: what it shows of locks of all kinds, what it takes away, and how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redishacks.cli import commands
from redishacks.locks import (
    AsyncLock,
    Held,
    Lock,
    LockLostError,
    MultiLock,
    RWLock,
    Semaphore,
)
from redishacks.locks.commands import FIRST_KEYS, Names, parse_key
from redishacks.testing import Cluster, FaultProxy, Server, valkey_server
from tests.helpers import eventually

#: The module; in the package its name is that of the command.
cli_locks = importlib.import_module("redishacks.cli.locks")

#: Long enough for any test.
LONG = 3600


@dataclasses.dataclass
class Shell:
    """Runs commands on one Redis, and has locks there."""

    url: str
    prefix: str

    def run(self, command: str, *args: str, url: str | None = None, **env: str) -> Result:
        """Run a command to its end; none ever prints a traceback or a password."""
        where = ["--redis", self.url if url is None else url, "--prefix", self.prefix]
        return ended(CliRunner().invoke(commands, ["locks", command, *where, *args], env=env))

    def shown(self, command: str, *args: str) -> str:
        """Return what a command shows that ends well."""
        done = self.run(command, *args)
        assert (done.exit_code, done.stderr) == (0, "")
        return done.stdout

    def objects(self, command: str, *args: str) -> list[dict[str, Any]]:
        """Return the JSON objects that a command prints, one per line."""
        return [json.loads(line) for line in self.shown(command, "--json", *args).splitlines()]

    def names(self, *args: str) -> list[str]:
        """Return the names that are listed."""
        return [each["name"] for each in self.objects("list", *args)]

    def waiting(self, name: str) -> int:
        """Return how many wait for the locks of a name."""
        return sum(each["waiting"] for each in self.objects("show", name))

    @property
    def options(self) -> dict[str, Any]:
        """What locks here are made with."""
        return {"prefix": self.prefix, "ttl": LONG, "deadline": 5}

    def lock(self, name: str = "crazy", **options: Any) -> Lock:
        """Return a lock."""
        return Lock(self.url, name, **self.options | options)

    def semaphore(self, amount: int, name: str = "crazy", **options: Any) -> Semaphore:
        """Return a semaphore."""
        return Semaphore(self.url, name, amount, **self.options | options)

    def rwlock(self, name: str = "crazy", **options: Any) -> RWLock:
        """Return a readers-writer lock."""
        return RWLock(self.url, name, **self.options | options)

    def stand(self, lock: Any, name: str = "crazy") -> Future[Held]:
        """Have a thread stand in line, last of all."""
        before = self.waiting(name)
        future = elsewhere(lock, wait=30)
        eventually(lambda: self.waiting(name) == before + 1)
        return future


def elsewhere(lock: Any, **options: Any) -> Future[Held]:
    """Acquire a lock in a thread of its own."""
    future: Future[Held] = Future()

    def acquire() -> None:
        try:
            future.set_result(lock.acquire(**options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=acquire, name="elsewhere", daemon=True).start()
    return future


def ended(done: Result) -> Result:
    """Return it: it ended by itself, without a traceback or a password."""
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    assert "geheim" not in done.output
    return done


@pytest.fixture
def shell(valkey: Server, prefix: str) -> Shell:
    """The session's server, with a prefix of one's own."""
    return Shell(valkey.url, prefix)


@pytest.fixture(params=["redishacks_valkey", "redishacks_redis"])
def either(request: pytest.FixtureRequest, prefix: str) -> Shell:
    """The same, and on the oldest Redis that is supported."""
    return Shell(request.getfixturevalue(request.param).url, prefix)


# list


def test_a_lock(either: Shell) -> None:
    """Of a lock that is held: who has it, since when, for how long, its fence, and who waits."""
    assert either.shown("list") == f"no lock is held (prefix {either.prefix})\n"
    assert either.objects("list") == []
    held = either.lock(label="nightly").acquire()
    waiter = either.stand(either.lock())
    (shown,) = either.objects("list")
    (holder,) = shown.pop("holders")
    assert shown == {"name": "crazy", "kind": "lock", "tag": None, "waiting": 1}
    assert LONG - 600 < holder.pop("remaining") <= LONG
    assert holder.pop("since") == held.fence / 1e6
    assert abs(held.fence / 1e6 - time.time()) < 600
    assert holder == {
        "host": socket.gethostname(), "pid": os.getpid(), "thread": "MainThread",
        "label": "nightly", "fence": held.fence,
    }  # fmt: skip
    head, line = either.shown("list").splitlines()
    assert head.split() == ["name", "kind", "held", "by", "for", "left", "fence", "waiting"]
    who = f"nightly, process {os.getpid()} on {socket.gethostname()}, MainThread"
    assert re.fullmatch(rf"crazy  lock  {who}  +[\d.]+ s  [56]\d(\.\d)? min  {held.fence}  1", line)
    held.release()
    waiter.result().release()
    assert either.names() == []


def test_locks_of_all_kinds(either: Shell) -> None:
    """Every kind is listed, with its tag if it has one; of each name there may be all."""
    made: list[tuple[str, str | None, Held]] = []
    for tag in (None, "bank"):
        made += [
            ("lock", tag, either.lock(tag=tag).acquire()),
            ("semaphore", tag, either.semaphore(3, tag=tag).acquire()),
            ("rwlock", tag, either.rwlock(tag=tag).read.acquire()),
        ]
    made.append(("rwlock", "other", either.rwlock(tag="other").write.acquire()))
    listed = {(each["kind"], each["tag"]): each["holders"] for each in either.objects("list")}
    assert {place: [one["fence"] for one in found] for place, found in listed.items()} == {
        (kind, tag): [held.fence] for kind, tag, held in made
    }
    assert len(either.shown("list").splitlines()) == 8
    assert "crazy  semaphore, tag bank  process " in either.shown("list")
    for kind in ("lock", "semaphore", "rwlock"):
        kinds = [each["kind"] for each in either.objects("list", "--kind", kind)]
        assert kinds == [kind] * (3 if kind == "rwlock" else 2)


def test_several_locks_at_once(shell: Shell) -> None:
    """Those of a `MultiLock` are listed one by one, in the order of their names."""
    with MultiLock(shell.url, ["c", "a", "b"], **shell.options):
        assert shell.names() == ["a", "b", "c"]


def test_several_holders_in_one_line(shell: Shell, valkey: Server) -> None:
    """Of several holders: how many, since the first, until the last; JSON has each of them."""
    semaphore = shell.semaphore(3)
    helds = [semaphore.acquire(ttl=ttl) for ttl in (60, 7 * 86_400, 120)]
    helds[1].fence -= 5 * LONG * 10**6
    with valkey.client() as client:
        about = f"{shell.prefix}:l1:{{crazy}}:permits-about"
        client.hset(about, helds[1].token, f"{helds[1].fence} 604800000000 h\t1\t\tt")
    (line,) = shell.shown("list").splitlines()[1:]
    assert re.fullmatch(rf"crazy  semaphore  3 holders  5[\d.]* h  7 d +{helds[2].fence}  0", line)
    (shown,) = shell.objects("list")
    assert {each["fence"] for each in shown["holders"]} == {held.fence for held in helds}
    assert [each["since"] for each in shown["holders"]] == [
        each["fence"] / 1e6 for each in shown["holders"]
    ]


def test_a_task(shell: Shell) -> None:
    """A task of asyncio is shown by its name."""

    async def main() -> None:
        asyncio.current_task().set_name("cleaner")  # type: ignore[union-attr]
        async with AsyncLock(shell.url, "crazy", **shell.options):
            (shown,) = await asyncio.to_thread(shell.objects, "list")
            assert shown["holders"][0]["thread"] == "cleaner"

    asyncio.run(main())


def test_one_just_handed_over(shell: Shell, valkey: Server) -> None:
    """Who was handed a lock, and has not said yet that it took it, is a holder without a name."""
    with valkey.client() as client:
        ends, fence = int(time.time() + LONG) * 10**6, 1_800_000_000_000_000
        client.set(f"{shell.prefix}:l1:{{crazy}}:lock", f"t1 {ends} {LONG}000000 {fence} 0 1 ")
    (line,) = shell.shown("list").splitlines()[1:]
    assert line.startswith("crazy  lock  the next in line, just now  ")
    assert "held by  the next in line, just now; for " in shell.shown("show", "crazy")
    (shown,) = shell.objects("list")
    assert (shown["holders"][0]["host"], shown["holders"][0]["fence"]) == ("", fence)


def test_what_is_only_remembered(shell: Shell, valkey: Server) -> None:
    """Locks that were released, or lost, are not listed, though their fences are remembered."""
    shell.lock("released").acquire().release()
    shell.lock("lost").acquire(ttl=0.001)
    shell.semaphore(2, "permits").acquire(ttl=0.001)
    shell.rwlock("config").write.acquire().release()
    with valkey.client() as client:
        assert client.exists(
            *(f"{shell.prefix}:l1:{{{name}}}:lock" for name in ("released", "lost"))
        )
    eventually(lambda: shell.names() == [])
    assert shell.shown("show", "lost").startswith("lost: nobody holds it")


ODD = ["a*c", "abc", "a?c", "a[bc", "a[b]c", "a\\c", "a{b}c", "a%c", "a:c:lock", "lock", "*", "{}"]


def test_names_that_begin_so(shell: Shell) -> None:
    """PREFIX is how names begin, and no pattern, whatever it holds."""
    helds = [shell.lock(name).acquire() for name in ODD]
    helds.append(shell.semaphore(2, "a*s", tag="abc").acquire())
    names = [*ODD, "a*s"]
    for name in names:
        for begin in {name, name[:1], name[:2], name + "x"}:
            wanted = sorted(each for each in names if each.startswith(begin))
            assert shell.names(begin) == wanted
    assert shell.names("") == sorted(names)
    said = shell.shown("list", "b*")
    assert said == f"no lock whose name begins with b* is held (prefix {shell.prefix})\n"


@pytest.mark.parametrize("odd", ["x*y", "x?y", "x[az]y", "x\\*y", "{x}y", "x:l1:{y"])
def test_prefixes_of_keys(shell: Shell, odd: str) -> None:
    """The prefix of the keys is no pattern either."""
    shell.lock("near", prefix=f"{shell.prefix}-xzy").acquire()
    shell.lock("nearer", prefix=f"{shell.prefix}-{odd}z").acquire()
    there = dataclasses.replace(shell, prefix=f"{shell.prefix}-{odd}")
    there.lock().acquire()
    assert there.names() == ["crazy"]
    assert len(there.objects("show", "crazy")) == 1


def test_what_is_no_lock(shell: Shell, valkey: Server) -> None:
    """Other keys that look alike are passed over."""
    shell.lock("good").acquire()
    with valkey.client() as client:
        state = client.get(f"{shell.prefix}:l1:{{good}}:lock")
        assert state is not None
        begin = f"{shell.prefix}:l1:".encode()
        for key in (
            b"{}:lock", b"{a%41}:lock", b"{a%zz}:lock", b"{a}b:lock", b"{a}:lock:x", b"{a}:lock\n",
            b"{a}:locks", b"{\xff}:lock", b"{a}::lock", b"{a}:b{}:lock", b"a:lock", b"{{a}:lock",
            b"{%s}:lock" % (b"x" * 257),
        ):  # fmt: skip
            client.set(begin + key, state, ex=60)
        client.set(f"{shell.prefix}:{{a}}:lock", state, ex=60)
        client.set(begin + b"{words}:lock", "hello", ex=60)
        client.set(begin + b"{empty}:lock", "", ex=60)
    assert shell.names() == ["good"]


def test_a_key_of_somebody_else(either: Shell) -> None:
    """Where a lock cannot be read, that is said, with exit code 1, and the others are listed."""
    either.lock("good").acquire()
    client = either.lock().redis()[0]
    client.rpush(f"{either.prefix}:l1:{{bad}}:lock", "x")
    client.expire(f"{either.prefix}:l1:{{bad}}:lock", 60)
    done = either.run("list")
    assert done.exit_code == 1
    assert "good  lock  process " in done.stdout
    assert done.stderr.startswith("redishacks: bad (lock): WRONGTYPE")
    assert len(done.stderr.splitlines()) == 1
    done = either.run("list", "--json")
    bad, good = (json.loads(line) for line in done.stdout.splitlines())
    assert (done.exit_code, good["name"]) == (1, "good")
    assert (bad["name"], bad["kind"], bad["exit_code"]) == ("bad", "lock", 1)
    assert "WRONGTYPE" in bad["error"]
    done = either.run("show", "bad")
    assert (done.exit_code, done.stdout) == (1, "")
    client.close()


def test_many_locks(prefix: str) -> None:
    """Thousands are found by SCAN, never by KEYS, and read a thousand at a time."""
    with valkey_server() as server, server.client() as client:
        shell = Shell(server.url, prefix)
        client.mset({f"other:{i:01000}": "x" for i in range(2_000)})
        with MultiLock(shell.url, [f"n{i:04}" for i in range(2_500)], **shell.options):
            shell.names("n0001")  # the script is known from now on
            client.config_resetstat()
            found = shell.names()
            stats, reads = client.info("commandstats"), client.info("stats")
        assert found == [f"n{i:04}" for i in range(2_500)]
        assert "cmdstat_keys" not in stats
        assert 4 <= stats["cmdstat_scan"]["calls"] <= 10
        assert stats["cmdstat_evalsha"]["calls"] == 2_500
        assert reads["total_reads_processed"] < 500
        assert reads["total_net_output_bytes"] < 1_500_000  # keys of others stay there


def test_a_key_that_comes_twice(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """SCAN may tell a key twice: it is listed once."""
    shell.lock().acquire()
    key = Names(shell.prefix, "crazy", None).key("lock")
    ask, pages = cli_locks._At.ask, [(b"7", [key, key]), (b"0", [key])]

    def page(at: Any, command: Any) -> Any:
        return pages.pop(0) if command.args[0] == "SCAN" else ask(at, command)

    monkeypatch.setattr(cli_locks._At, "ask", page)
    assert shell.names() == ["crazy"]
    assert pages == []


names = st.text(min_size=1, max_size=60)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names, names, st.none() | names, st.sampled_from(FIRST_KEYS))
def test_keys_read_back(prefix: str, name: str, tag: str | None, rest: str) -> None:
    """From a key one can tell the lock, whatever its names hold; other keys of it are none."""
    made = Names(prefix, name, tag)
    assert parse_key(prefix, made.key(rest)) == (rest, name, tag)
    assert parse_key(f"{prefix}x", made.key(rest)) is None
    for other in ("line", f"{rest}:line", f"{rest}:about", "wake:1"):
        assert parse_key(prefix, made.key(other)) is None


# Names of all sorts


@pytest.mark.parametrize(
    "name", [*ODD, "line\nbreak", "\x1b[31mred", "[red]x[/red]", "ü 字", "nul\x00", " ", "--json"]
)
def test_odd_names(shell: Shell, name: str) -> None:
    """Any lock can be looked at; on a terminal nothing in its name acts, in JSON it is itself."""
    shell.lock(name, tag=name).acquire()
    for args in (["list"], ["show", "--tag", name, "--", name]):
        shown = shell.shown(*args)
        assert len(shown.splitlines()) == 2 + (args[0] == "show")
        assert "\x1b" not in shown
        if name.isprintable():
            assert name in shown
    (listed,) = shell.objects("list")
    assert (listed["name"], listed["tag"]) == (name, name)
    (shown_,) = shell.objects("show", "--tag", name, "--", name)
    assert shown_["holders"][0]["fence"] == listed["holders"][0]["fence"]
    said = shell.shown("release", "--force", "--tag", name, "--", name)
    assert len(said.splitlines()) == 1
    assert "\x1b" not in said
    assert shell.names() == []
    assert len(shell.shown("show", "--tag", name, "--", name).splitlines()) == 1


def test_what_holders_say_of_themselves(shell: Shell, valkey: Server) -> None:
    """What stands in Redis about a holder is only shown, too."""
    with valkey.client() as client:
        state = f"t1 {int(time.time() + 60)}000000 60000000 5 0 0 \x1b[31mh\t7\t[red]l\nm[/red]\tt"
        client.set(f"{shell.prefix}:l1:{{crazy}}:lock", state)
    for args in (["list"], ["show", "crazy"], ["release", "crazy", "--force"]):
        shown = shell.shown(*args)
        assert r"[red]l\nm[/red], process 7 on \x1b[31mh, t" in shown
        assert "\x1b" not in shown


@pytest.mark.parametrize("name", ["", "x" * 257, "\udcff"], ids=["empty", "long", "no text"])
def test_names_that_cannot_be(shell: Shell, name: str) -> None:
    """What no lock could be called is exit code 2 and one line."""
    for args in (["show", name], ["release", "--force", name], ["show", "x", "--tag", name]):
        done = shell.run(*args)
        assert done.exit_code == 2
        assert "must be a string of 1 to 256 bytes" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    there = dataclasses.replace(shell, prefix=name)
    assert there.run("list").exit_code == 2


# show


def test_all_holders(shell: Shell) -> None:
    """Each holder on a line of its own, and how long the others have been waiting."""
    semaphore = shell.semaphore(2, label="web")
    helds = [semaphore.acquire(), semaphore.acquire(ttl=1800)]
    assert shell.shown("show", "crazy").splitlines()[3] == "  waiting  nobody"
    waiters = [shell.stand(semaphore) for _ in range(2)]
    title, first, second, waiting = shell.shown("show", "crazy").splitlines()
    assert title == "crazy (semaphore)"
    who = f"web, process {os.getpid()} on {socket.gethostname()}, MainThread"
    for held, line in zip(reversed(helds), (first, second), strict=True):
        assert re.fullmatch(
            rf"  held by  {who}; for [\d.]+ s, [\d.]+ min left, fence {held.fence}", line
        )
    assert re.fullmatch(r"  waiting  2, for [\d.]+ s, [\d.]+ s", waiting)
    (shown,) = shell.objects("show", "crazy")
    assert [each["fence"] for each in shown["holders"]] == [held.fence for held in reversed(helds)]
    since = [each["since"] for each in shown["line"]]
    assert helds[1].fence / 1e6 < since[0] <= since[1]
    assert abs(since[1] - time.time()) < 600
    for held in helds:
        held.release()
    for waiter in waiters:
        waiter.result().release()


def test_a_long_line(shell: Shell) -> None:
    """Of many who wait the first ten are shown, and how many there are."""
    held = shell.lock().acquire()
    waiters = [elsewhere(shell.lock(), wait=30) for _ in range(12)]
    eventually(lambda: shell.waiting("crazy") == 12)
    waiting = shell.shown("show", "crazy").splitlines()[2]
    assert re.fullmatch(r"  waiting  12, for ([\d.]+ s, ){10}and 2 more", waiting)
    (shown,) = shell.objects("show", "crazy")
    assert [each["alone"] for each in shown["line"]] == [True] * 12
    held.release()
    for waiter in waiters:
        waiter.add_done_callback(lambda done: done.result().release())
    eventually(lambda: all(waiter.done() for waiter in waiters))


@pytest.mark.parametrize("protocol", ["2", "3"])
def test_who_waits_to_read_or_write(shell: Shell, protocol: str) -> None:
    """In the line of a readers-writer lock writers are told from readers; they stand before."""
    rwlock = shell.rwlock()
    held = rwlock.write.acquire()
    reader, writer = shell.stand(rwlock.read), shell.stand(rwlock.write)
    there = dataclasses.replace(shell, url=f"{shell.url}?protocol={protocol}")
    lines = there.shown("show", "crazy").splitlines()
    assert lines[0] == "crazy (rwlock)"
    assert re.fullmatch(r"  waiting  2, for [\d.]+ s to write, [\d.]+ s to read", lines[2])
    (shown,) = there.objects("show", "crazy")
    first, second = shown["line"]
    assert (first["alone"], second["alone"]) == (True, False)
    assert held.fence / 1e6 < second["since"] < first["since"]
    assert abs(first["since"] - time.time()) < 600
    held.release()
    writer.result().release()
    reader.result().release()


def test_locks_of_one_name(shell: Shell) -> None:
    """All kinds that somebody holds or waits for are shown, or those of `--kind`."""
    shell.semaphore(2).acquire()
    shell.rwlock().read.acquire()
    assert [each["kind"] for each in shell.objects("show", "crazy")] == ["semaphore", "rwlock"]
    assert [each["kind"] for each in shell.objects("show", "crazy", "--kind", "rwlock")] == [
        "rwlock"
    ]
    assert shell.objects("show", "crazy", "--kind", "lock") == []


def test_a_line_for_what_nobody_holds(shell: Shell, valkey: Server) -> None:
    """Who waits is shown even while nobody holds the lock; it is not listed then."""
    with valkey.client() as client:
        client.zadd(f"{shell.prefix}:l1:{{crazy}}:line", {"t1 f-": time.time() * 1e6 - 5e6})
    lines = shell.shown("show", "crazy").splitlines()
    assert lines[:2] == ["crazy (lock)", "  held by  nobody"]
    assert re.fullmatch(r"  waiting  1, for [\d.]+ s", lines[2])
    assert shell.names() == []


def test_looking_changes_nothing(shell: Shell, valkey: Server) -> None:
    """To look makes no key and leaves all as it is."""
    held = shell.lock().acquire()
    with valkey.client() as client:
        keys = [f"{shell.prefix}:l1:{{crazy}}:{end}" for end in ("lock", "line", "permits", "rw")]
        before = [client.dump(key) for key in keys]
        for args in (["list"], ["show", "crazy"], ["show", "nobody"], ["release", "crazy"]):
            shell.run(*args)
        assert [client.dump(key) for key in keys] == before
        assert client.keys(f"{shell.prefix}:*nobody*") == []
    held.check()


def test_nobody(shell: Shell) -> None:
    """What nobody holds: that is said, with where was looked; in JSON it is no object."""
    shell.lock(tag="bank").acquire()
    for command in (["show"], ["release", "--force"]):
        assert shell.shown(*command, "crazy") == (
            f"crazy: nobody holds it (prefix {shell.prefix}, no tag)\n"
        )
        assert shell.shown(*command, "crazy", "--tag", "b", "--kind", "rwlock") == (
            f"crazy: nobody holds it (prefix {shell.prefix}, tag b, rwlock)\n"
        )
        assert shell.objects(*command, "crazy") == []
    assert len(shell.objects("show", "crazy", "--tag", "bank")) == 1


# release


def lost(held: Held) -> bool:
    """Return whether the holder finds it lost, at its end."""
    try:
        held.release()
    except LockLostError:
        return True
    return False


def test_without_force(shell: Shell) -> None:
    """A lock is not taken away by mistake: without `--force` it is exit code 2, and says why."""
    held = shell.lock().acquire()
    done = shell.run("release", "crazy")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "redishacks: crazy is not released: whoever holds it would not stop, and the next one "
        "would work at the same time; --force does it all the same\n"
    )
    held.extend()
    assert not lost(held)


def test_a_lock_taken_away(either: Shell) -> None:
    """With `--force` it is free at once, and who had it finds it lost."""
    held = either.lock(label="nightly").acquire()
    who = f"nightly, process {os.getpid()} on {socket.gethostname()}, MainThread"
    said = either.shown("release", "crazy", "--force")
    assert said == f"crazy (lock): taken away from {who}\n"
    other = elsewhere(either.lock()).result(10)
    assert other.fence > held.fence
    with pytest.raises(LockLostError):
        held.extend()
    assert lost(held)
    (shown,) = either.objects("release", "crazy", "--force")
    assert shown["released"] is True
    assert (shown["name"], shown["kind"], shown["tag"]) == ("crazy", "lock", None)
    assert shown["holders"][0]["fence"] == other.fence
    with pytest.raises(LockLostError), other:
        pass
    assert either.names() == []


def test_one_that_is_renewed(shell: Shell) -> None:
    """Who has the lock renewed hears of its loss while it works."""
    told: list[Held] = []
    held = shell.lock(ttl=0.5, renew=True, on_lost=told.append).acquire()
    shell.shown("release", "crazy", "--force")
    eventually(lambda: told == [held])
    assert held.lost


def test_the_next_in_line_gets_it(shell: Shell) -> None:
    """It goes to the next in line, as by any release."""
    held = shell.lock().acquire()
    first = shell.stand(shell.lock())
    second = shell.stand(shell.lock())
    shell.shown("release", "crazy", "--force")
    next_ = first.result(10)
    assert not second.done()
    next_.release()
    second.result(10).release()
    assert lost(held)


def test_all_permits(shell: Shell) -> None:
    """A semaphore's permits are taken from all, and given to as many who wait, not to more."""
    semaphore = shell.semaphore(3)
    helds = [semaphore.acquire() for _ in range(3)]
    waiters = [shell.stand(semaphore) for _ in range(5)]
    said = shell.shown("release", "crazy", "--force").splitlines()
    assert len(said) == 3
    assert all(line.startswith("crazy (semaphore): taken away from process ") for line in said)
    eventually(lambda: sum(waiter.done() for waiter in waiters) == 3)
    (shown,) = shell.objects("show", "crazy")
    assert (len(shown["holders"]), shown["waiting"]) == (3, 2)
    assert {each["thread"] for each in shown["holders"]} == {"elsewhere"}
    assert [lost(held) for held in helds] == [True] * 3
    assert [waiter.done() for waiter in waiters] == [True] * 3 + [False] * 2
    for waiter in waiters:
        assert not lost(waiter.result(10))


def test_readers_and_writers(shell: Shell) -> None:
    """All readers lose it, and the writer who waits comes in; then all readers do."""
    rwlock = shell.rwlock()
    readers = [rwlock.read.acquire(), elsewhere(rwlock.read).result(10)]
    writer = shell.stand(rwlock.write)
    more = [shell.stand(rwlock.read) for _ in range(2)]
    assert len(shell.shown("release", "crazy", "--force").splitlines()) == 2
    writing = writer.result(10)
    assert [each.done() for each in more] == [False] * 2
    assert [lost(held) for held in readers] == [True] * 2
    assert len(shell.shown("release", "crazy", "--force").splitlines()) == 1
    reading = [each.result(10) for each in more]
    assert lost(writing)
    assert [lost(held) for held in reading] == [False] * 2


def test_all_kinds_or_one(shell: Shell) -> None:
    """Of several locks of one name all are taken away, or those of `--kind`, or of a tag."""
    lock, tagged = shell.lock().acquire(), shell.lock(tag="bank").acquire()
    permit, reading = shell.semaphore(2).acquire(), shell.rwlock().read.acquire()
    other = shell.lock("crazy2").acquire()
    (shown,) = shell.objects("release", "crazy", "--force", "--kind", "semaphore")
    assert shown["kind"] == "semaphore"
    shown_kinds = [each["kind"] for each in shell.objects("release", "crazy", "--force")]
    assert shown_kinds == ["lock", "rwlock"]
    assert [lost(held) for held in (lock, permit, reading)] == [True] * 3
    tagged.extend()
    assert len(shell.objects("release", "crazy", "--force", "--tag", "bank")) == 1
    assert (lost(tagged), lost(other)) == (True, False)


def test_one_given_back_meanwhile(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gave the lock back by itself, just before, has lost nothing; that is said."""
    called = cli_locks._At.called

    def then_released(at: Any, name: str, tag: str | None) -> Any:
        found = called(at, name, tag)
        held.release()
        return found

    monkeypatch.setattr(cli_locks._At, "called", then_released)
    held = shell.lock().acquire()
    said = shell.shown("release", "crazy", "--force")
    assert said.startswith("crazy (lock): was just given back by process ")
    held = shell.lock().acquire()
    (shown,) = shell.objects("release", "crazy", "--force")
    assert shown["released"] is False


def test_a_lost_reply(shell: Shell, proxy: FaultProxy) -> None:
    """When nobody knows whether it was taken away, the next one does not lose it, too."""
    shell.lock("warm").acquire()
    shell.shown("release", "warm", "--force")
    held = shell.lock().acquire()
    waiter = shell.stand(shell.lock())
    proxy.drop_reply(4, of="EVALSHA")  # after three that ask who has it
    done = shell.run("release", "crazy", "--force", url=proxy.url)
    assert proxy.armed == 0
    assert (done.exit_code, done.stdout) == (75, "")
    assert "it took effect once or never" in done.stderr
    assert lost(held)
    next_ = waiter.result(10)
    next_.extend()
    assert not lost(next_)


# How it ends

each_command = pytest.mark.parametrize(
    "command", ["list", "show crazy", "release crazy --force"], ids=lambda line: line.split()[0]
)


def failed(shell: Shell, command: str, **more: Any) -> Result:
    """Run a command that cannot: it shows nothing, and says a line on stderr."""
    done = shell.run(*command.split(), **more)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done


def test_help() -> None:
    """Every command says what it does, its options and the exit codes."""
    shown = CliRunner().invoke(commands, ["locks", "-h"]).stdout
    for word in ("list", "show", "release"):
        assert word in shown
        page = CliRunner().invoke(commands, ["locks", word, "--help"]).stdout
        options = ["--redis URL", "--prefix", "--kind [lock|semaphore|rwlock]", "--json"]
        options += ["[BEGIN]"] if word == "list" else ["--tag", "NAME"]
        options += ["--force"] if word == "release" else []
        for part in (*options, "REDISHACKS_REDIS_URL", "  0 ", "  2 ", "  75 "):
            assert part in page
    assert "locks" in CliRunner().invoke(commands, ["-h"]).stdout


def test_what_is_missing_or_unknown(shell: Shell) -> None:
    """Without a URL or a name, or with an unknown kind, it is exit code 2."""
    where = ["--redis", shell.url]
    for args in (
        ["list"],
        ["show", *where],
        ["release", *where, "--force"],
        ["list", *where, "--kind", "x"],
        ["list", *where, "a", "b"],
        ["nothing"],
    ):
        command = ["locks", *args]
        done = ended(CliRunner().invoke(commands, command, env={"REDISHACKS_REDIS_URL": None}))
        assert done.exit_code == 2, args


def test_where_redis_is_may_stand_in_the_environment(shell: Shell) -> None:
    """Passwords in a URL need not be typed."""
    shell.lock().acquire()
    args = ["locks", "list", "--prefix", shell.prefix]
    done = ended(CliRunner().invoke(commands, args, env={"REDISHACKS_REDIS_URL": shell.url}))
    assert done.exit_code == 0
    assert "crazy" in done.stdout


@each_command
def test_a_url_that_is_none(shell: Shell, command: str) -> None:
    """Another kind of URL is exit code 2, and nothing of it is shown."""
    done = failed(shell, command, url="http://:geheim@localhost/0")
    assert done.exit_code == 2
    assert "redis://" in done.stderr


@each_command
def test_redis_away(shell: Shell, command: str) -> None:
    """Nobody there is exit code 75."""
    done = failed(shell, command, url="redis://:geheim@127.0.0.1:1/0")
    assert done.exit_code == 75
    assert "127.0.0.1:1: connecting: connection refused" in done.stderr


def test_a_wrong_password(shell: Shell) -> None:
    """Credentials that are refused are exit code 75."""
    with valkey_server(requirepass="richtig") as server:
        for command in ("list", "show crazy", "release crazy --force"):
            done = failed(shell, command, url=f"redis://:geheim@127.0.0.1:{server.port}/0")
            assert done.exit_code == 75
            assert "authentication" in done.stderr.lower()


@pytest.fixture
def user(shell: Shell, valkey: Server) -> Iterator[Any]:
    """Make a user with these rights, and return its URL."""
    with valkey.client() as client:

        def make(*rights: str) -> str:
            client.execute_command("ACL", "SETUSER", shell.prefix, "on", ">geheim", *rights)
            return f"redis://{shell.prefix}:geheim@127.0.0.1:{valkey.port}/0"

        yield make
        client.execute_command("ACL", "DELUSER", shell.prefix)


@each_command
def test_no_rights(shell: Shell, user: Any, command: str) -> None:
    """A user who may not is exit code 78."""
    for name in ("crazy", "lazy"):
        shell.lock(name).acquire()
    for rights in (["+ping"], ["+ping", "+scan", "~*"]):
        done = failed(shell, command, url=user(*rights))
        assert done.exit_code == 78
        assert "NOPERM" in done.stderr


def test_least_rights(shell: Shell, user: Any) -> None:
    """To look a user needs to read, and nothing else."""
    for held in (shell.lock(), shell.semaphore(2), shell.rwlock().read):
        held.acquire()
    rights = "+ping +scan +eval +evalsha +time +get +hget +zcard +zrange +zrangebyscore"
    url = user(f"~{shell.prefix}:*", *rights.split())
    for args in (["list"], ["show", "crazy"]):
        done = shell.run(*args, "--json", url=url)
        assert (done.exit_code, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 3
    done = failed(shell, "release crazy --force", url=url)
    assert done.exit_code in (1, 78)
    assert len(shell.names()) == 3


def test_nodes_of_a_cluster(cluster: Cluster, prefix: str) -> None:
    """Each node lists its own locks; one that has not got a lock says so, with exit code 2."""
    client = cluster.client()
    names = [f"n{i}" for i in range(12)]
    for name in names:
        Lock(client, name, prefix=prefix, ttl=LONG).acquire()
    listed: dict[str, list[str]] = {}
    for node in cluster.nodes:
        shell = Shell(node.url, prefix)
        listed[node.url] = shell.names()
        other = next(name for name in names if name not in listed[node.url])
        for command in ("show", "release --force"):
            done = failed(shell, f"{command} {other}")
            assert done.exit_code == 2
            assert "is a node of a cluster" in done.stderr
        for name in listed[node.url]:
            assert shell.objects("release", name, "--force")[0]["released"] is True
    assert sorted(itertools.chain(*listed.values())) == sorted(names)
    client.close()


@pytest.mark.slow
def test_as_a_process(shell: Shell) -> None:
    """As people run it: with its exit code, and no thread that speaks."""
    held = shell.lock().acquire()

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "redishacks", "locks", *args, "--prefix", shell.prefix]
        return subprocess.run(
            command, env={**os.environ, "REDISHACKS_REDIS_URL": shell.url}, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip

    done = run("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"process {os.getpid()} on" in done.stdout
    assert run("release", "crazy").returncode == 2
    assert run("release", "crazy", "--force").returncode == 0
    assert lost(held)


@pytest.mark.slow
def test_a_stopped_redis(shell: Shell) -> None:
    """One that does not answer is given a second, and is exit code 75."""
    with valkey_server() as server:
        stopped = dataclasses.replace(shell, url=server.url)
        stopped.lock().acquire()
        with server.paused():
            for command in ("list", "release crazy --force"):
                began = time.monotonic()
                assert failed(stopped, command).exit_code == 75
                assert time.monotonic() - began < 10
