"""A lock's scripts against a plain model, with injected time: who gets it, and who is told what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from redishacks._command import Command, script
from redishacks._slots import key_slot
from redishacks._transport import connect
from redishacks.errors import ServerError
from redishacks.locks.commands import MINE, Exclusive, Names, holders
from redishacks.locks.holder import Holder
from redishacks.testing import Server
from tests.helpers import eventually

START = 1_800_000_000_000_000
MS, SECOND, DAY = 1_000, 1_000_000, 86_400_000_000
CLAIM = 200 * MS
TTL = 10 * SECOND
#: Nobody subscribes to it.
DEAF = "pdead"
numbers = itertools.count()


class Who(NamedTuple):
    """One who asks for a lock."""

    token: str
    fair: bool = True
    #: How it is told, as `Wakeups.ear` gives it.
    ear: str = "-"

    @property
    def entry(self) -> str:
        """What stands for it in the line."""
        return f"{self.token} {'f' if self.fair else 'u'}{self.ear}"


# A real lock


class Ears:
    """A connection that messages come in on."""

    def __init__(self, client: Any) -> None:
        self._pubsub = client.pubsub()
        self._pubsub.subscribe("always")
        self._open: set[str] = set()

    def open(self, ears: set[str]) -> None:
        """Listen with these, and with no others."""
        for ear in ears - self._open:
            subscribe = self._pubsub.ssubscribe if ear[0] == "s" else self._pubsub.subscribe
            subscribe(ear[1:])
        for ear in self._open - ears:
            close = self._pubsub.sunsubscribe if ear[0] == "s" else self._pubsub.unsubscribe
            close(ear[1:])
        self._open = set(ears)
        self.heard()

    def heard(self) -> list[tuple[str, str]]:
        """Return what came in since the last time, sorted: ears and messages."""
        self._pubsub.ping()
        found = []
        while (reply := self._pubsub.parse_response())[0] != b"pong":
            if reply[0] in (b"message", b"smessage"):
                kind = "s" if reply[0] == b"smessage" else "p"
                found.append((kind + reply[1].decode(), reply[2].decode()))
        return sorted(found)

    def close(self) -> None:
        """Close the connection."""
        self._pubsub.close()


class Bench:
    """A server, and who listens there."""

    def __init__(self, server: Server) -> None:
        self.transport = connect(server.url)
        self.client: Any = redis.Redis.from_url(server.url, protocol=2, socket_timeout=30)
        self.ears = Ears(self.client)
        self.kinds = "ps" if server.kind == "valkey" else "p"
        for name in ("lock_acquire", "lock_release", "lock_extend", "lock_show"):
            self.client.script_load(script(name).source)

    def close(self) -> None:
        """Close what is open."""
        self.ears.close()
        self.client.close()
        self.transport.close()


@pytest.fixture(scope="module", params=["redishacks_valkey", "redishacks_redis"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A Valkey, and the oldest Redis that is supported."""
    made = Bench(request.getfixturevalue(request.param))
    yield made
    made.close()


class Real:
    """A lock whose clock is ours; after each command it is looked at."""

    def __init__(self, bench: Bench) -> None:
        names = Names("rules", f"lock{next(numbers)}", None)
        self.bench, self.client = bench, bench.client
        self.fair, self.unfair = Exclusive(names, fair=True), Exclusive(names, fair=False)
        self.keys = self.lock, self.line = self.fair.show().keys
        self._looks: list[Command[Any]] = [
            Command(("GET", self.lock), (self.lock,)),
            Command(("ZRANGE", self.line, "0", "-1", "WITHSCORES"), (self.line,)),
            Command(("PTTL", self.lock), (self.lock,)),
            Command(("PTTL", self.line), (self.line,)),
        ]
        #: As stored; who is in line, and their tickets; ms until the keys end.
        self.stored: str | None = None
        self.waiting: list[tuple[str, int]] = []
        self.ttls = (-2, -2)

    def do(self, command: Command[Any], now: int | None = None) -> Any:
        """Carry a command out, at a moment of our choice or now, and look."""
        args = command.args if now is None else (*command.args, str(now))
        command = command._replace(args=args, repeatable=False, packed=None)
        outcomes = self.bench.transport.run([command, *self._looks], 30.0)
        reply = outcomes[0].result()
        looks: list[Any] = [outcome.value for outcome in outcomes[1:]]
        stored, line, *ttls = looks
        self.stored = None if stored is None else stored.decode()
        if line and not isinstance(line[0], list):  # RESP2
            line = list(zip(line[::2], line[1::2], strict=True))
        self.waiting = [(entry.decode(), int(score)) for entry, score in line or ()]
        self.ttls = (ttls[0], ttls[1])
        return reply

    def lease(self) -> list[str]:
        """Return what is stored of a lease: token, ends, length, fence, lost, crowd, info."""
        return str(self.client.get(self.lock).decode()).split(" ", 6)

    def acquire(
        self, who: Who, now: int | None = START, ticket: str = "", *,
        ttl: int = TTL, not_after: int | None = None, info: str = "",
    ) -> Any:  # fmt: skip
        """Ask for it."""
        if not_after is None:
            not_after = 2**52 if now is None else now
        ear = who.ear if ticket else ""
        kind = self.fair if who.fair else self.unfair
        asked = kind.acquire(who.token, str(ttl), str(not_after), info, ticket, ear)
        reply = self.do(asked, now)
        if isinstance(reply, int):  # short for the usual
            return [1, reply, reply]
        return [part.decode() if isinstance(part, bytes) else part for part in reply]

    def release(
        self, who: Who | None, fence: int = 0, now: int | None = START, *, leave: bool = False
    ) -> int:
        """Give it back; of nobody: whoever has it."""
        kind = self.unfair if who is not None and not who.fair else self.fair
        token, ear = ("", "") if who is None else (who.token, who.ear if leave else "")
        reply: int = self.do(kind.release(token, fence, ear), now)
        return reply

    def extend(self, *asked: tuple[Real, Who, int]) -> list[int]:
        """Begin leases anew."""
        args = tuple(word for _, who, ttl in asked for word in (who.token, str(ttl)))
        keys = tuple(lock.lock for lock, _, _ in asked)
        reply: list[int] = self.do(Command(args, keys, script=script("lock_extend")))
        return reply

    def show(self) -> list[Any]:
        """Ask who has it."""
        reply: list[Any] = self.do(self.fair.show())
        return reply

    def put(self, lease: str, *ears: str) -> None:
        """Have it as it might be stored."""
        self.client.set(self.lock, lease, px=DAY // MS)
        for number, ear in enumerate(ears):
            self.client.zadd(self.line, {Who(f"w{number}", ear=ear).entry: START - 99 + number})

    def all(self) -> tuple[Any, ...]:
        """Return all that is there, and what was told since the last time."""
        dumps = [self.client.dump(key) for key in self.keys]
        return *dumps, self.bench.ears.heard()


@pytest.fixture
def lock(bench: Bench) -> Real:
    """A fresh lock; nobody listens."""
    bench.ears.open(set())
    return Real(bench)


# The model


class Lease(NamedTuple):
    """Somebody has the lock, or had it and nobody came after."""

    token: str
    ends: int
    length: int
    info: str


class Oracle:
    """What the scripts promise. All times are µs."""

    def __init__(self) -> None:
        #: Where somebody listens, and what came in there.
        self.ears: set[str] = set()
        self.told: list[tuple[str, str]] = []
        self.lease: Lease | None = None
        #: Of whom it was given back by, while nobody has it.
        self.released: str | None = None
        #: The newest, and the newest of those whose holder did not give it back.
        self.fence = self.lost = 0
        self.line: dict[Who, int] = {}
        #: Somebody may be in line.
        self.crowd = False

    def stored(self) -> str | None:
        """Return what the key of the lock has."""
        crowd = int(self.crowd)
        if self.lease is not None:
            token, ends, length, info = self.lease
            return f"{token} {ends} {length} {self.fence} {self.lost} {crowd} {info}"
        if self.released is not None:
            return f"- {self.fence} {self.lost} {crowd} {self.released}"
        return None

    def queue(self) -> list[Who]:
        """Return who is in line, the first first."""
        return sorted(self.line, key=lambda who: (self.line[who], who.entry))

    def tell(self, who: Who, micros: int) -> bool:
        """Tell somebody; return whether it may be there."""
        if who.ear in self.ears:
            self.told.append((who.ear, f"{who.token} {micros}"))
        return who.ear == "-" or who.ear in self.ears

    def first(self, asking: str = "", gone: str | None = None) -> Who | None:
        """Find the first in line who is there; it stays in line when the lock is not given to it.

        Who asks is there, and needs not be told; all of a process that is gone are told only.
        """
        for who in self.queue():
            there = who.token == asking or (self.tell(who, 0) and who.token[:12] != gone)
            if not there or who.fair or who.token == asking:
                del self.line[who]
            if there:
                return who
        return None

    def warn(self, micros: int, first: Who | None) -> None:
        """Have the next one and the last look again so much later.

        They are of another process than the first, and not both of the same.
        """
        told = other = None
        for step in (1, -1):
            for who in self.queue()[::step][:8]:
                if who.ear == told:
                    break
                if first is None or who.ear != first.ear:
                    if self.tell(who, micros):
                        told = who.ear
                        break
                    del self.line[who]
                elif who != first:
                    other = other or who
        if other and not told:
            self.tell(other, micros)

    def hand_over(self, who: Who, now: int, giver: str = "") -> None:
        """Give the lock to somebody who has a moment to take it."""
        self.lease, self.released = Lease(who.token, now + CLAIM, CLAIM, giver), None
        self.crowd = True

    def acquire(
        self, who: Who, now: int, ticket: str, ttl: int, not_after: int, info: str
    ) -> list[Any]:
        """Ask for it."""
        lease = self.lease
        if now > not_after:
            return [-1, now]
        if self.released == who.token:
            return [-2, now]
        if lease is not None and lease.token == who.token:
            if ticket != MINE and lease.ends - now <= lease.length:
                ttl = max(ttl, lease.ends - now)  # a late copy cuts nothing short
            self.lease = taken = Lease(who.token, now + ttl, ttl, info)
            if self.crowd and taken.ends < lease.ends:
                self.warn(ttl, None)
            return [1, now, self.fence]
        if ticket == MINE or (lease is not None and lease.info == who.token):
            return [-2, now]
        taken = Lease(who.token, now + ttl, ttl, info)
        if lease is None or lease.ends <= now:
            if lease is not None:
                self.lost = self.fence
            self.fence = max(now, self.fence + 1)
            first, gone = None, None
            note = (self.released or "") if lease is None else lease.info
            if "\t" in note:
                note = ""
            elif lease is not None and lease.token[:12] != who.token[:12]:
                gone = lease.token[:12]  # it did not take what it was handed
            if who.fair and self.crowd:
                first = self.first(who.token, gone)
                self.crowd = first is not None
            if first is None or first.token == who.token or not first.fair:
                self.lease, self.released = taken, None
                if ticket:
                    self.line.pop(who, None)
                return [1, now, self.fence]
            self.hand_over(first, now, note)
            self.warn(CLAIM, first)
        elif lease.ends > now + lease.length:
            self.lease = lease._replace(ends=now + lease.length)
        lease = self.lease
        assert lease is not None
        left, place = lease.ends - now, -1
        if ticket:
            if ticket == "0":
                ticket = str(max(now, max(self.line.values(), default=0) + 1))
            if not self.crowd:
                self.lease, self.crowd = lease._replace(length=left), True
            self.line.setdefault(who, int(ticket))
            place = self.queue().index(who)
        return [0, now, left, place, ticket, self.fence, lease.info]

    def release(self, who: Who | None, now: int, fence: int, leave: bool) -> int:
        """Give it back, or leave the line; of nobody: take it away."""
        lease = self.lease
        if lease is not None and (who is None or lease.token == who.token):
            if who is None:
                self.lost = self.fence
            standing = self.queue()[0] if self.line else None
            self.warn(CLAIM, standing)
            first = self.first()
            if first != standing:
                self.warn(CLAIM, first)
            if first is not None and first.fair:
                self.fence = max(now, self.fence + 1)
                self.hand_over(first, now, lease.token)
            else:
                self.lease, self.released, self.crowd = None, lease.token, first is not None
            return 1
        if who is None:
            return 0
        if leave:
            was_first = self.queue()[:1] == [who]
            self.line.pop(who, None)
            if was_first:
                self.warn(max(0, lease.ends - now) if lease else 0, None)
        known = self.stored() is not None
        if lease is None and fence == 0:
            self.released = who.token
        if not known or fence == self.lost:
            return 0
        return 2 if fence > self.lost else 3


class Witness:
    """What must be true whatever a model says: it sees what is asked, replied and stored."""

    def __init__(self, real: Real, ears: set[str]) -> None:
        self._real, self._ears = real, ears
        #: µs that passed: a clock that is set back takes none of them back.
        self.time = 0
        #: Who was told to have it: until when it counts on that.
        self._counts: dict[str, int] = {}
        self._newest: tuple[int, str] = (0, "")
        self._given_back: set[int] = set()
        self._lost: set[int] = set()
        #: The token that was given back last, until somebody gets the lock by asking.
        self._last = ""
        #: The process that it was handed to, and that has not taken it yet.
        self._claimed: str | None = None
        self._held: tuple[str, int] | None = None
        self._line: list[tuple[str, str]] = []

    def acquired(self, who: Who, ttl: int, reply: list[Any]) -> None:
        """See an acquisition."""
        last = self._last
        self._look(who, own=False)
        if reply[0] != 1:
            return
        assert who.token != last, "a released one is granted again"
        self._last = ""
        assert reply[2] > self._newest[0] or (reply[2], who.token) == self._newest
        self._newest = reply[2], who.token
        others = [end for token, end in self._counts.items() if token != who.token]
        assert all(end <= self.time for end in others), "two have it at once"
        self._counts[who.token] = self.time + ttl

    def gave_back(self, who: Who | None, fence: int, reply: int) -> None:
        """See a release."""
        own = self._held is not None and who is not None and who.token == self._held[0]
        self._look(None, own=own)
        if reply == 1 and who is None:
            self._counts.clear()
            self._last = ""
        elif reply == 1 and who is not None:
            self._counts.pop(who.token, None)
            self._last = who.token
        elif reply == 2:
            assert fence in self._given_back
        elif fence:
            assert fence not in self._given_back or fence < max(self._lost)
        elif who is not None and self._held is None:
            self._last = who.token

    def _look(self, asking: Who | None, *, own: bool) -> None:
        """See who has the lock now, and how it came to that."""
        words = (self._real.stored or "-").split(" ", 6)
        held = None if words[0] == "-" else (words[0], int(words[3]))
        before, self._held = self._held, held
        if held != before:
            if before is not None:
                (self._given_back if own else self._lost).add(before[1])
            if held is not None:
                assert held[1] > max(self._given_back | self._lost, default=0)
                self._came_to(held[0], asking)
        claimed = held is not None and "\t" not in words[6]
        self._claimed = words[0][:12] if claimed else None
        line = [entry.split(" ", 1) for entry, _ in self._real.waiting]
        assert not line or words[5 if held else 3] == "1", "who releases it must look"
        self._line = [(token, how) for token, how in line]

    def _came_to(self, holder: str, asking: Who | None) -> None:
        """See that nobody who is there was passed over, unless by one who barges."""
        takes = asking is not None and asking.token == holder
        if takes and asking is not None and not asking.fair:
            return
        for token, how in self._line:
            if asking is not None and asking.token[:12] != token[:12] == self._claimed:
                continue  # its process did not take what it was handed
            there = how[1:] == "-" or how[1:] in self._ears
            if token == holder:
                assert takes or there, "a dead one got it"
                return
            if there:
                assert takes, "it was handed over, but not to the first"
                assert how[0] == "u", "a newcomer overtook"
                return
        assert takes, "it was handed to somebody who is not in line"


class Trace:
    """A real lock, a model of it, and a witness, side by side."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.real, self.oracle = bench, Real(bench), Oracle()
        self.ears = self.oracle.ears
        self.ears |= {"pA", "pB", "pC", "pD"}
        if "s" in bench.kinds:
            self.ears |= {"sA", "sD"}
        bench.ears.open(self.ears)
        self.witness = Witness(self.real, self.ears)
        self.now = START
        self.tickets: dict[Who, str] = {}
        self.fences: dict[Who, list[int]] = {}

    def step(self, step: int | str) -> None:
        """Let time pass, or go back."""
        if isinstance(step, str):
            lease = self.oracle.lease
            edge = self.now if lease is None else lease.ends - (step == "before")
            step = max(0, edge - self.now)
        self.now += step
        self.witness.time += max(0, step)

    def switch(self, ear: str) -> None:
        """Have somebody listen who did not, or the other way round."""
        self.ears ^= {ear} - {"-", DEAF}
        self.bench.ears.open(self.ears)

    def ask(self, who: Who, what: str, ttl: int, info: str) -> None:
        """Acquire it."""
        old = self.tickets.get(who, "0")
        if what == "now" and who in self.oracle.line:
            what = "again"  # whoever is in line says so
        ticket = {"wait": "0", "again": old, "confirm": old, "mine": MINE}.get(what, "")
        not_after = self.now - (what == "late")
        reply = self.real.acquire(who, self.now, ticket, ttl=ttl, not_after=not_after, info=info)
        self.witness.acquired(who, ttl, reply)
        assert reply == self.oracle.acquire(who, self.now, ticket, ttl, not_after, info)
        if reply[0] == 1:
            self.fences.setdefault(who, []).append(reply[2])
        elif reply[0] == 0:
            assert 0 < reply[2] <= 366 * DAY
            if ticket:
                self.tickets.setdefault(who, reply[4])
                assert self.real.ttls[1] > reply[2] // MS + 50_000, "a sleeper outlasts the line"
        self.compare()

    def give(self, who: Who | None, what: str) -> None:
        """Release it."""
        known = self.fences.get(who, [0]) if who is not None else [0]
        fence = {"old": known[0], "leave": 0, "unknown": 0}.get(what, known[-1])
        leave = what == "leave" or who in self.oracle.line  # whoever is in line says so
        reply = self.real.release(who, fence, self.now, leave=leave)
        self.witness.gave_back(who, fence, reply)
        assert reply == self.oracle.release(who, self.now, fence, leave)
        self.compare()

    def compare(self) -> None:
        """See that all is stored and told as the model says, and nothing for ever."""
        real, oracle = self.real, self.oracle
        assert real.stored == oracle.stored()
        assert real.waiting == [(who.entry, oracle.line[who]) for who in oracle.queue()]
        assert self.bench.ears.heard() == sorted(oracle.told)
        oracle.told.clear()
        assert (real.ttls[0] > 0) == (real.stored is not None)
        assert (real.ttls[1] > 0) == bool(real.waiting)
        if real.stored is not None:
            length = 0 if oracle.lease is None else oracle.lease.length
            assert real.ttls[0] > (length + DAY) // MS - 60_000, "the fence outlives the lease"


EARS = ["-", "pA", "pA", "pB", "pC", "sA", "sD", DEAF]
PEOPLE = st.lists(
    st.tuples(st.sampled_from([True, True, True, False]), st.sampled_from(EARS)),
    min_size=6,
    max_size=6,
)
#: The first are done by whoever has the lock.
WHAT = ["done", "done", "done", "done", "confirm", "confirm", "twice", "again", "again"]
WHAT += ["wait", "wait", "wait", "wait", "wait", "wait", "now", "now", "mine", "late"]
WHAT += ["give", "old", "leave", "leave", "unknown", "force", "switch"]
#: µs between two events, or to the end of the lease; the clock is set back, too.
STEPS: list[int | str] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 30 * MS, 30 * MS, CLAIM, TTL, DAY]
STEPS += ["edge", "edge", "before", -1, -150 * MS, -5 * SECOND, -DAY]
#: What happens, by whom, after how long, with which lease, as who.
EVENTS = st.tuples(
    st.sampled_from(WHAT),
    st.integers(0, 5),
    st.sampled_from(STEPS),
    st.sampled_from([TTL, TTL, TTL, MS, 100 * MS, DAY + 1, 366 * DAY]),
    st.sampled_from(["", "host\t1\tlabel\tthread", "- 1 2 3 x", "a 1 2 3 4 5\n%d %s", "é "]),
)
#: Lists of lists are the longer ones.
TRACES = st.lists(st.lists(EVENTS, max_size=20), max_size=20)


@settings(max_examples=200, deadline=None)
@given(line=PEOPLE, events=TRACES.map(lambda parts: list(itertools.chain(*parts))))
def test_a_trace_agrees_with_the_model(bench: Bench, line: Any, events: Any) -> None:
    """Each reply, what is stored, who is in line and who is told are as the model says."""
    trace = Trace(bench)
    crowd = [
        Who(f"process-{n % 2:04}{n}", fair, ear if ear[0] in "-" + bench.kinds else "pD")
        for n, (fair, ear) in enumerate(line)
    ]
    for what, number, step, ttl, info in events:
        holder = [
            who for who in crowd if trace.oracle.lease and trace.oracle.lease.token == who.token
        ]
        who = crowd[number]
        if holder and what in ("done", "confirm", "twice"):
            (who,) = holder
        trace.step(step)
        if what == "switch":
            trace.switch(who.ear)
        elif what in ("now", "wait", "again", "confirm", "mine", "late"):
            trace.ask(who, what, ttl, info)
        else:
            trace.give(None if what == "force" else who, what)
            if what == "twice":
                trace.give(who, what)


# One promise at a time


def people(*ears: str, fair: bool = True) -> list[Who]:
    """Return some who wait, and how they are told."""
    return [Who(f"w{n}", fair, ear) for n, ear in enumerate(ears)]


def held_with_a_line(lock: Real, line: list[Who]) -> int:
    """Have somebody hold the lock, and these in line; return the fence."""
    _, _, fence = lock.acquire(HOLDER)
    for place, who in enumerate(line):
        assert lock.acquire(who, ticket="0")[3] == place
    return int(fence)


HOLDER, OTHER = Who("holder"), Who("other")


@pytest.mark.parametrize("ticket", ["", "0", "7", MINE])
@pytest.mark.parametrize("fair", [True, False])
def test_nothing_is_done_too_late(lock: Real, ticket: str, fair: bool) -> None:
    """After its `not_after` an acquisition leaves everything as it is."""
    lock.bench.ears.open({"pA"})
    held = f"holder {START + 9} 9 7 6 1 info"
    over = f"holder {START - 9} 9 7 6 1 info"
    for before in ("", "- 7 6 0 other", "- 7 6 1 other", held, over):
        if before:
            lock.put(before, DEAF, "pA", "-")
        there = lock.all()
        for who in (HOLDER, OTHER, Who("new", fair, "pA")):
            assert lock.acquire(who, ticket=ticket, not_after=START - 1) == [-1, START]
        assert lock.all() == there


def test_the_holder_may_ask_again(lock: Real) -> None:
    """The same token gets the same fence and a new lease, even a late one if nobody came."""
    _, _, fence = lock.acquire(HOLDER)
    assert lock.acquire(HOLDER, START + 1, "0", ttl=SECOND) == [1, START + 1, fence]
    assert lock.acquire(OTHER, START + 1)[2] == TTL - 1, "a copy cuts nothing short"
    assert lock.acquire(HOLDER, START + 1, MINE, ttl=SECOND) == [1, START + 1, fence]
    assert lock.acquire(OTHER, START + 1)[2] == SECOND
    assert lock.acquire(HOLDER, START + TTL, MINE) == [1, START + TTL, fence]
    now = START + 2 * TTL
    assert lock.acquire(OTHER, now - 1)[:3] == [0, now - 1, 1]
    taken, _, newer = lock.acquire(OTHER, now)
    assert taken == 1
    assert newer > fence
    assert lock.acquire(HOLDER, now, MINE) == [-2, now]
    assert lock.acquire(HOLDER, now)[0] == 0


def test_first_come_first_served(lock: Real) -> None:
    """The lock goes from one to the next in the order of arrival, though the clock went back."""
    line = people("-", "pA", "sA" if "s" in lock.bench.kinds else "pB", "pA", "-", "pA")
    lock.bench.ears.open({"pA", "pB", "sA"} if "s" in lock.bench.kinds else {"pA", "pB"})
    newest = lock.acquire(HOLDER)[2]
    for who in line:
        lock.acquire(who, START - int(who.token[1:]) * SECOND, "0")
    previous, now = HOLDER, START
    for place, who in enumerate(line):
        assert lock.release(previous, newest, now) == 1
        assert lock.acquire(Who("new"), now)[0] == 0, "who comes now does not overtake"
        assert lock.acquire(Who("barges", fair=False), now)[0] == 0, "a claim is a lease"
        assert lock.acquire(line[-1], now)[0] == (1 if who == line[-1] else 0)
        taken, _, fence = lock.acquire(who, now, str(START + place))
        assert (taken, fence > newest) == (1, True)
        previous, newest, now = who, fence, now + MS
    assert lock.waiting == []
    assert lock.release(previous, newest, now) == 1
    assert lock.ttls[1] == -2, "of the line nothing is left"


def test_an_old_ticket_keeps_its_place(lock: Real) -> None:
    """Whoever is not found in line any more gets in where it was, and never twice."""
    line = people("-", "-", "-")
    held_with_a_line(lock, line)
    ticket = dict(lock.waiting)[line[0].entry]
    lock.client.zrem(lock.line, line[0].entry)
    assert lock.acquire(line[0], START + 5, str(ticket))[3:5] == [0, str(ticket)]
    assert lock.acquire(line[0], START + 5, "0")[3] == 0
    assert [entry for entry, _ in lock.waiting] == [who.entry for who in line]


@pytest.mark.parametrize("released", [True, False])
def test_the_dead_are_passed_over(lock: Real, released: bool) -> None:
    """Those whom nobody can tell leave the line at once: the first one alive gets the lock."""
    lock.bench.ears.open({"pA"})
    line = people(DEAF, DEAF, DEAF, "pA", DEAF, "-")
    fence = held_with_a_line(lock, line)
    now = START + TTL
    if released:
        assert lock.release(HOLDER, fence, now) == 1
    else:
        assert lock.acquire(OTHER, now)[:3] == [0, now, CLAIM]
    assert lock.stored is not None
    assert lock.stored.startswith(f"w3 {now + CLAIM} ")
    assert [entry for entry, _ in lock.waiting] == [line[5].entry]
    heard = lock.bench.ears.heard()
    assert heard[0] == ("pA", "w3 0")
    assert heard[1:] in ([], [("pA", f"w3 {CLAIM}")])


def test_who_asks_is_there(lock: Real) -> None:
    """The first in line gets the lock when it asks after the end of a lease, and is not told."""
    lock.bench.ears.open({"pA"})
    line = people("pA", DEAF, "pA")
    held_with_a_line(lock, line)
    now = START + TTL
    assert lock.acquire(line[0], now, "0")[0] == 1
    assert lock.bench.ears.heard() == []
    assert [entry for entry, _ in lock.waiting] == [who.entry for who in line[1:]]
    assert lock.acquire(line[1], now + TTL, "0")[0] == 1, "nobody can tell it, and here it is"


def test_when_all_are_dead_the_lock_is_free(lock: Real) -> None:
    """A line of the dead holds nobody up, nor does it stay."""
    fence = held_with_a_line(lock, people(*[DEAF] * 20))
    assert lock.release(HOLDER, fence) == 1
    assert lock.waiting == []
    assert lock.acquire(OTHER)[0] == 1
    held_over = held_with_a_line(Real(lock.bench), [])
    assert held_over == START


def test_who_does_not_take_it_loses_it_after_a_moment(lock: Real) -> None:
    """One who listens and does nothing has 200 ms, then it is the next one's turn."""
    lock.bench.ears.open({"pA", "pB"})
    line = people("pA", "pB", "-")
    fence = held_with_a_line(lock, line)
    lock.release(HOLDER, fence)
    assert lock.acquire(line[2], START + CLAIM - 1, "0")[:3] == [0, START + CLAIM - 1, 1]
    now = START + CLAIM
    assert lock.acquire(line[2], now, "0")[2:4] == [CLAIM, 0], "it is handed to the second"
    taken, _, newer = lock.acquire(line[1], now + 1, "0")
    assert (taken, newer > fence + 1) == (1, True)
    assert lock.acquire(line[0], now + 1, "0")[0] == 0, "the first wakes up"
    assert lock.release(line[0], 0, now + 1, leave=True) == 3
    assert lock.acquire(line[0], now + 1, MINE) == [-2, now + 1]


def test_the_one_it_was_handed_to_is_told_and_so_are_two_others(lock: Real) -> None:
    """The first is told to look now, the next and the last to look after the claim.

    They are of other processes: whoever is stopped takes nothing, and tells nobody.
    """
    ears = lock.bench.ears
    ears.open({"pA", "pB", "pC"})
    line = people("pA", "pA", DEAF, "pB", "pB", "pC", "pA", DEAF)
    fence = held_with_a_line(lock, line)
    assert lock.release(HOLDER, fence) == 1
    assert ears.heard() == [("pA", "w0 0"), ("pB", f"w3 {CLAIM}"), ("pC", f"w5 {CLAIM}")]
    now = START + CLAIM
    lock.acquire(OTHER, now)
    assert ears.heard() == [("pA", "w1 0"), ("pB", f"w3 {CLAIM}"), ("pC", f"w5 {CLAIM}")]
    lock.release(line[1], 0, now)
    assert ears.heard() == [("pA", f"w6 {CLAIM}"), ("pB", "w3 0"), ("pC", f"w5 {CLAIM}")]


def test_when_the_first_leaves_the_second_is_told_how_long_it_lasts(lock: Real) -> None:
    """The others sleep longer than the first, and somebody must look when the lease ends."""
    ears = lock.bench.ears
    ears.open({"pA"})
    line = people("-", DEAF, "pA", "pA")
    fence = held_with_a_line(lock, line)
    assert lock.release(line[3], 0, leave=True) == 0
    assert ears.heard() == []
    assert lock.release(line[0], 0, START + SECOND, leave=True) == 0
    assert ears.heard() == [("pA", f"w2 {TTL - SECOND}")]
    assert [entry for entry, _ in lock.waiting] == [line[2].entry]
    assert lock.release(line[0], 0, START + SECOND, leave=True) == 0
    assert ears.heard() == []
    assert lock.release(HOLDER, fence, START + SECOND) == 1


def test_a_lease_that_is_cut_short_is_told(lock: Real) -> None:
    """Those in line sleep until the end that they know; of a sooner one two of them are told."""
    ears = lock.bench.ears
    ears.open({"pA", "pB"})
    held_with_a_line(lock, people(DEAF, "pA", "pB"))
    lock.acquire(HOLDER, START + 1, ttl=TTL)
    assert ears.heard() == []
    lock.acquire(HOLDER, START + 1, MINE, ttl=SECOND)
    assert ears.heard() == [("pA", f"w1 {SECOND}"), ("pB", f"w2 {SECOND}")]
    lock.acquire(HOLDER, START + 1, "0", ttl=SECOND - 1)
    assert ears.heard() == [], "a copy of the question cuts nothing short"
    lock.acquire(HOLDER, START + 1, MINE, ttl=SECOND - 1)
    assert ears.heard() == [("pA", f"w1 {SECOND - 1}"), ("pB", f"w2 {SECOND - 1}")]
    assert [entry[:2] for entry, _ in lock.waiting] == ["w1", "w2"]


def test_who_does_not_insist_on_its_turn_is_told_only(lock: Real) -> None:
    """Without fairness the lock is free after a release, for whoever comes first."""
    lock.bench.ears.open({"pA", "pB"})
    line = [*people("pA", fair=False), Who("w1", ear="pB")]
    fence = held_with_a_line(lock, line)
    assert lock.release(HOLDER, fence) == 1
    assert lock.bench.ears.heard() == [("pA", "w0 0"), ("pB", f"w1 {CLAIM}")]
    assert lock.stored == f"- {fence} 0 1 holder"
    assert [entry for entry, _ in lock.waiting] == [who.entry for who in line]
    assert lock.acquire(OTHER)[0] == 1
    assert lock.acquire(line[0], START + TTL, "0")[0] == 1, "it barges"
    assert [entry for entry, _ in lock.waiting] == [line[1].entry]


def test_lost_and_released_before_are_told_apart(lock: Real) -> None:
    """Of a release that is repeated, and of one that comes too late, each is told what it was."""
    lock.bench.ears.open({"pA"})
    assert lock.release(HOLDER, 5) == 0, "nobody knows of it"
    _, _, first = lock.acquire(HOLDER)
    assert lock.release(HOLDER, first) == 1
    assert lock.release(HOLDER, first) == 2
    _, _, second = lock.acquire(OTHER)
    assert lock.release(HOLDER, first) == 2, "while somebody else has it"
    now = START + TTL
    _, _, third = lock.acquire(Who("third"), now)
    assert lock.release(OTHER, second, now) == 0, "its lease ended, and somebody took the lock"
    assert lock.release(Who("third"), third, now) == 1
    assert lock.release(OTHER, second, now) == 0
    assert lock.release(Who("third"), third, now) == 2
    _, _, fourth = lock.acquire(HOLDER, now)
    assert lock.release(HOLDER, fourth, now + TTL) == 1, "its lease ended, but nobody came"
    _, _, fifth = lock.acquire(OTHER, now)
    lock.acquire(Who("waits", ear="pA"), now, "0")
    assert lock.release(OTHER, fifth, now) == 1
    assert lock.release(OTHER, fifth, now) == 2, "it was handed over"
    assert lock.acquire(Who("new"), now + CLAIM)[0] == 1, "who it was handed to did not take it"
    assert lock.release(Who("waits"), fifth + 1, now + CLAIM) == 0


def test_what_was_taken_away_is_lost(lock: Real) -> None:
    """By force a lock goes to the next in line; its holder finds it lost."""
    lock.bench.ears.open({"pA"})
    assert lock.release(None) == 0, "there is nobody"
    fence = held_with_a_line(lock, people("pA"))
    assert lock.release(None) == 1
    assert lock.bench.ears.heard() == [("pA", "w0 0")]
    assert lock.release(HOLDER, fence) == 0
    assert lock.extend((lock, HOLDER, TTL)) == [1]
    _, _, newer = lock.acquire(Who("w0"))
    assert lock.release(None) == 1
    assert lock.release(Who("w0"), newer) == 0
    assert lock.acquire(Who("w0")) == [-2, START]
    assert lock.release(None) == 0


@pytest.mark.parametrize("ticket", ["", "0", "5", MINE])
def test_a_copy_that_comes_after_the_release_gets_nothing(lock: Real, ticket: str) -> None:
    """A token that was given back is not granted again: nobody would give it back."""
    _, _, fence = lock.acquire(HOLDER)
    assert lock.release(HOLDER, fence) == 1
    assert lock.acquire(HOLDER, ticket=ticket) == [-2, START]
    assert lock.acquire(Who(HOLDER.token, fair=False), ticket=ticket) == [-2, START]
    assert lock.release(OTHER, 0) == 0, "this one gives up, and its command is under way"
    assert lock.acquire(OTHER, ticket=ticket) == [-2, START]
    assert lock.stored == f"- {fence} 0 0 other"
    assert lock.waiting == []


def test_a_copy_that_comes_after_giving_up_a_new_lock_gets_nothing(lock: Real) -> None:
    """Nor is one granted that was given up before anybody ever had the lock."""
    lock.bench.ears.open({"pA"})
    assert lock.release(Who("w0", ear="pA"), leave=True) == 0
    assert lock.acquire(Who("w0", ear="pA"), ticket="0") == [-2, START]
    assert lock.release(HOLDER) == 0
    assert lock.acquire(HOLDER) == [-2, START]
    assert lock.acquire(OTHER)[0] == 1


def test_a_copy_that_comes_after_a_hand_over_gets_nothing(lock: Real) -> None:
    """Nor when it was handed to somebody who did not take it."""
    lock.bench.ears.open({"pA"})
    fence = held_with_a_line(lock, people("pA"))
    assert lock.release(HOLDER, fence) == 1
    assert lock.acquire(HOLDER, START + CLAIM - 1)[0] != 1
    assert lock.acquire(HOLDER, START + CLAIM)[0] != 1


@pytest.mark.parametrize("back", [1, SECOND, 3600 * SECOND, 400 * DAY])
@pytest.mark.parametrize("claimed", [True, False])
def test_a_clock_that_goes_back_locks_nobody_out(lock: Real, back: int, claimed: bool) -> None:
    """From the first who asks then, a lease is no longer than it is; fences grow all the same."""
    lock.bench.ears.open({"pA"})
    fence, length, now = held_with_a_line(lock, people("pA")), TTL, START - back
    if claimed:
        assert lock.release(HOLDER, fence) == 1
        fence, length = fence + 1, CLAIM
    _, _, left, _, _, same, _ = lock.acquire(OTHER, now)
    assert same == fence
    assert left == min(length, length + back)
    assert lock.acquire(OTHER, now + left - 1)[2] == 1
    if not claimed:
        lock.acquire(OTHER, now + left)
        assert lock.acquire(Who("w0", ear="pA"), now + left)[0] == 1
    else:
        assert lock.acquire(OTHER, now + left)[0] == 1
    assert lock.stored is not None
    assert int(lock.stored.split(" ")[3]) > fence


def test_nor_does_it_lock_out_who_wants_several_at_once(lock: Real) -> None:
    """Whoever takes several locks or none waits no longer for a lease than it is long, either."""
    lock.acquire(HOLDER)
    now = START - 3600 * SECOND
    command = lock.fair.acquire_all([], ["many"], str(TTL), str(2**52), "")
    state, _, which, left, *_ = lock.do(command, now)
    assert (state, which) == (0, 1)
    assert left <= TTL
    assert lock.do(command, now + TTL)[0] == 1


def test_fences_grow_whatever_happens(lock: Real) -> None:
    """Over releases, ends of leases, a clock that goes back, and a server that forgot all."""
    newest, now = 0, START
    for number, step in enumerate((0, 1, -DAY, TTL, -1, SECOND, -400 * DAY)):
        now += step
        taken, _, fence = lock.acquire(Who(f"t{number}"), now)
        assert (taken, fence > newest) == (1, True)
        newest = fence
        if number % 2:
            assert lock.release(Who(f"t{number}"), fence, now) == 1
        else:
            now += TTL
    lock.client.delete(lock.lock)
    assert lock.acquire(OTHER, newest + 1)[2] > newest


def test_a_line_that_outlived_its_lock_is_found_again(lock: Real) -> None:
    """When the lock's key is gone, those in line are known from the first who looks."""
    lock.bench.ears.open({"pA"})
    line = people("pA")
    held_with_a_line(lock, line)
    lock.client.delete(lock.lock)
    _, _, fence = lock.acquire(OTHER, START + 1)
    assert lock.acquire(line[0], START + 1, str(START))[3] == 0
    assert lock.release(OTHER, fence, START + 1) == 1
    assert lock.acquire(line[0], START + 1)[0] == 1


def test_a_line_lasts_as_long_as_anybody_sleeps(lock: Real) -> None:
    """A look while a lease is short does not end the line of those who sleep through a long one."""
    lock.acquire(HOLDER, ttl=3600 * SECOND)
    lock.acquire(OTHER, ticket="0")
    assert lock.ttls[1] > 3600_000
    lock.acquire(HOLDER, ttl=SECOND)
    lock.acquire(Who("next"), ticket="0")
    assert lock.ttls[1] > 3600_000


# By the server's own clock


def test_the_servers_clock(lock: Real) -> None:
    """Without a time of ours the server's counts: for leases, for fences, for what is too late."""
    seconds, micros = lock.client.time()
    now = seconds * SECOND + micros
    assert lock.acquire(HOLDER, None, not_after=now - 1)[0] == -1
    taken, time, fence = lock.acquire(HOLDER, None, ttl=MS)
    assert taken == 1
    assert now <= fence == time < now + 60 * SECOND
    assert eventually(lambda: lock.acquire(OTHER, None)[0] == 1)
    _, later, left, _, ticket, _, _ = lock.acquire(HOLDER, None, "0")
    assert TTL - 9 * SECOND < left <= TTL
    assert fence + MS < int(ticket) == later
    assert lock.release(OTHER, 0, None) == 1
    assert lock.acquire(HOLDER, None, ticket)[0] == 1


def test_who_holds_it(lock: Real) -> None:
    """Shown are how many wait, and of a lease that has not ended what is left, fence and info."""
    assert lock.show()[1:] == [0]
    info = "host\t1\tlabel\tthread 1 2 3"
    _, now, fence = lock.acquire(HOLDER, None, info=info)
    lock.acquire(OTHER, None, "0")
    shown = lock.show()
    assert shown[0] >= now
    assert shown[1] == 1
    assert 0 < shown[2] <= TTL
    assert shown[3:] == [fence, info.encode()]
    (holder,) = holders(shown)
    assert holder[:4] == ("host", 1, "thread 1 2 3", "label")
    assert lock.release(HOLDER, fence, now + 60 * SECOND) == 1
    (unknown,) = holders(lock.show())
    assert (unknown[:4], unknown.fence) == (("", 0, "", ""), now + 60 * SECOND), "handed over"
    assert lock.release(OTHER, 0, None) == 1
    assert lock.show()[1:] == [0]
    assert lock.acquire(Who("brief"), None, ttl=MS)[0] == 1
    assert eventually(lambda: len(lock.show()) == 2)


def test_leases_begin_anew(lock: Real) -> None:
    """They last from now on, be it shorter; the rest stays; whoever has it not is told so."""
    others = [Real(lock.bench) for _ in range(5)]
    alike = Who(HOLDER.token + "2")
    for each, who in zip(others, [HOLDER, alike, HOLDER, HOLDER, HOLDER], strict=True):
        each.acquire(who, None, info="some info")
    free, _, over, waited, longer = others
    free.release(HOLDER, 0, None)
    over.acquire(HOLDER, START // 2)  # long ago, but nobody came
    waited.acquire(OTHER, None, "0")
    before = [each.lease() for each in others]
    asked = [lock, *others]
    ttls = [TTL, TTL, TTL, SECOND, 3600 * SECOND, 366 * DAY]
    gone = lock.extend(*((each, HOLDER, ttl) for each, ttl in zip(asked, ttls, strict=True)))
    assert gone == [1, 2, 3]
    assert lock.stored is None
    seconds, micros = lock.client.time()
    now = seconds * SECOND + micros
    for each, ttl in ((over, SECOND), (waited, 3600 * SECOND), (longer, 366 * DAY)):
        token, ends, length, *rest = each.lease()
        assert (token, int(length)) == ("holder", ttl)
        assert now - 9 * SECOND < int(ends) - ttl <= now
        assert rest == before[others.index(each)][3:]
        assert each.client.pttl(each.lock) > (ttl + DAY) // MS - 60_000
    assert [each.lease() for each in others[:2]] == before[:2]


def test_a_lease_that_grew_is_that_long(lock: Real) -> None:
    """Others wait for the new end, and a clock that goes back counts with the new length."""
    lock.acquire(HOLDER, None)
    assert lock.extend((lock, HOLDER, 3600 * SECOND)) == []
    assert 3590 * SECOND < lock.acquire(OTHER, None)[2] <= 3600 * SECOND
    assert lock.acquire(OTHER, START // 2)[2] == 3600 * SECOND


# What is not ours

DOINGS: dict[str, Any] = {
    "now": lambda lock: lock.acquire(OTHER),
    "wait": lambda lock: lock.acquire(OTHER, ticket="0"),
    "mine": lambda lock: lock.acquire(OTHER, ticket=MINE),
    "barge": lambda lock: lock.acquire(Who("other", fair=False), ticket="0"),
    "release": lambda lock: lock.release(OTHER, 5),
    "leave": lambda lock: lock.release(Who("w1", ear="pA"), leave=True),
    "force": lambda lock: lock.release(None),
    "extend": lambda lock: lock.extend((lock, OTHER, TTL)),
    "show": lambda lock: lock.show(),
}
FOREIGN = ["", "garbage", "-", "- ", "- x 0 0 t", "-1", "42", "w1 1 2", "other", " "]


def stays(lock: Real, doing: str, *, only_after_errors: bool = False) -> None:
    """See that the lock's key stays as it is, and after an error everything."""
    lock.bench.ears.open({"pA"})
    before = lock.all()
    try:
        DOINGS[doing](lock)
    except ServerError:
        assert lock.all() == before, "an error, and yet something was done"
    else:
        assert only_after_errors or lock.all()[0] == before[0]


@pytest.mark.parametrize("doing", DOINGS)
def test_a_string_that_is_no_lock_stays(lock: Real, doing: str) -> None:
    """Somebody else's value under the lock's key is left alone, and with it the line."""
    for value in FOREIGN:
        lock.put(value, "pA", "pA", DEAF)
        stays(lock, doing)


@pytest.mark.parametrize("doing", DOINGS)
def test_a_list_that_is_no_lock_stays(lock: Real, doing: str) -> None:
    """So is a value of another type."""
    lock.put("", "pA", "pA", DEAF)
    lock.client.delete(lock.lock)
    lock.client.lpush(lock.lock, "x")
    stays(lock, doing)


@pytest.mark.parametrize("doing", DOINGS)
def test_a_line_of_another_type_stays(lock: Real, doing: str) -> None:
    """When the line is not ours, an error leaves the lock as it was."""
    lock.client.lpush(lock.line, "x")
    lease = f"{OTHER.token} {{}} {3 * TTL} 7 0 {{}} x"
    for value in ("", "- 7 0 {1} x", lease, lease.replace(OTHER.token, "somebody")):
        for end, crowd in itertools.product((START + 2 * TTL, START + 1, START), "01"):
            lock.client.delete(lock.lock)
            if value:
                lock.client.set(lock.lock, value.format(end, crowd), px=DAY // MS)
            stays(lock, doing, only_after_errors=True)


@pytest.mark.parametrize("text", ["hello", "- hello", "a 1 2 3", "", "-", "- 7 x"])
def test_text_that_is_no_lock_is_said_to_be_none(lock: Real, text: str) -> None:
    """Where somebody else's text stands it stays, and the error says what is wrong."""
    lock.client.set(lock.lock, text)
    several = lock.fair.acquire_all([], ["many"], str(TTL), str(2**52), "")
    for ask in (
        lambda: lock.acquire(HOLDER),
        lambda: lock.acquire(HOLDER, ticket="0"),
        lambda: lock.acquire(HOLDER, ticket=MINE),
        lambda: lock.do(several, START),
        lambda: lock.release(HOLDER, START),
        lambda: lock.release(None),
    ):
        with pytest.raises(ServerError, match="this key is no lock"):
            ask()
        assert lock.client.get(lock.lock) == text.encode()
        assert not lock.client.exists(lock.line)


def test_one_that_is_not_ours_ends_no_lease_of_others(lock: Real) -> None:
    """Of many leases that begin anew at once, all do that can, or none."""
    foreign, last = Real(lock.bench), Real(lock.bench)
    foreign.client.lpush(foreign.lock, "x")
    for each in (lock, last):
        each.acquire(HOLDER, START)
    before = [lock.lease(), last.lease()]
    try:
        gone = lock.extend((lock, HOLDER, TTL), (foreign, HOLDER, TTL), (last, HOLDER, TTL))
    except ServerError:
        assert [lock.lease(), last.lease()] == before, "an error, and yet something was done"
    else:
        assert gone == [2]
        assert lock.lease()[1] != before[0][1]
        assert last.lease()[1] != before[1][1]


# Without a server


def test_commands() -> None:
    """Arguments are in the order that the scripts' headers say."""
    names = Names("p", "n", None)
    fair, unfair = Exclusive(names, fair=True), Exclusive(names, fair=False)
    keys = (b"p:l1:{n}:lock", b"p:l1:{n}:line")
    asking: tuple[str, ...] = ("tok", "10", "99", "me")
    assert fair.acquire(*asking).args == ("tok", "10", "99", "", "", "me", "0")
    assert unfair.acquire(*asking).args == ("tok", "10", "99", "", "", "me", "1")
    asking += ("0", "pchannel with blanks")
    assert fair.acquire(*asking).args[3:5] == ("0", "tok fpchannel with blanks")
    assert unfair.acquire(*asking).args[3:5] == ("0", "tok upchannel with blanks")
    for lock, mode in ((fair, "f"), (unfair, "u")):
        assert lock.release("tok", 7, "").args == ("tok", "7", "")
        assert lock.release("tok", 0, "pc").args == ("tok", "0", f"tok {mode}pc")
        commands: list[Command[Any]] = [lock.acquire(*asking), lock.release("", 0, ""), lock.show()]
        assert [command.keys for command in commands] == [keys] * 3
        assert all(command.script is not None for command in commands)
        assert lock.key == keys[0]
    assert fair.show().args == ()


@pytest.mark.parametrize(("name", "tag"), [("n", None), ("a{b}%", None), ("é", "t"), ("x", "{y}")])
def test_a_locks_keys_and_channel_share_a_slot(name: str, tag: str | None) -> None:
    """A script's keys are on one node, and so are those who are told from there."""
    names = Names("p", name, tag)
    slots = {key_slot(key) for key in Exclusive(names, fair=True).show().keys}
    assert slots == {key_slot(names.channels("process").slot)}
    assert names.channels("process").process == b"p:l1:wake:process"
    others = [Names("p", name, other).key("lock") for other in (None, "t", "u")]
    assert len({*others, Names("p", name + "2", "t").key("lock")}) == 4


def test_who_holds_it_is_read() -> None:
    """Whatever a holder wrote about itself, it is shown what can be read."""
    assert holders([5, 0]) == []
    read = holders([5, 0, 1_500_000, 2_000_000, b"h\t12\tlabel\tname\twith tabs"])
    assert read == [Holder("h", 12, "name\twith tabs", "label", 2.0, 1.5, 2_000_000)]
    for info in (b"", b"\xff", b"h\tx\tl\tt", b"h\t1\tl"):
        assert holders([5, 3, 10**6, 7 * 10**6, info]) == [
            Holder("", 0, "", "", 7.0, 1.0, 7 * 10**6)
        ]
