"""Semaphores, readers-writer locks and several locks at once: who gets them, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import fakeredis
import pytest
import redis
import redis.asyncio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redishacks import locks
from redishacks._command import Command, script
from redishacks.errors import RedisHacksError, UnavailableError, UsageError
from redishacks.locks import Lock, LockedError, LockLostError, SelfDeadlockError
from redishacks.locks.commands import MINE, Exclusive, Names, Shared
from redishacks.testing import Cluster, FaultProxy, Server
from tests.helpers import eventually
from tests.workers import is_stopped, pipe, start

START = 1_800_000_000_000_000
MS, SECOND, HOUR, DAY = 1_000, 1_000_000, 3_600_000_000, 86_400_000_000
CLAIM = 200 * MS
TTL = 10 * SECOND
#: Tickets of writers are so much earlier than those of readers.
EARLY = 2**52
#: ms that a key has at least when a command begins, whatever our clock says.
LIVES = 10_000
#: Nobody subscribes to it.
DEAF = "pdead"
#: Seconds that are longer than anything here takes on a busy machine.
LONG = 30.0
numbers = itertools.count()


# The scripts of what is shared, at moments of our choice


class Who(NamedTuple):
    """One who asks; the token begins with r or w."""

    token: str
    #: How it is told, as `Wakeups.ear` gives it.
    ear: str = "-"

    @property
    def entry(self) -> str:
        """What stands for it in the line."""
        return f"{self.token} f{self.ear}"


class Ears:
    """A connection that messages come in on."""

    def __init__(self, client: Any) -> None:
        self._pubsub = client.pubsub()
        self._pubsub.subscribe("always")
        self._open: set[str] = set()

    def open(self, ears: set[str]) -> None:
        """Listen with these, and with no others."""
        for ear in ears - self._open:
            self._pubsub.subscribe(ear[1:])
        for ear in self._open - ears:
            self._pubsub.unsubscribe(ear[1:])
        self._open = set(ears)
        self.heard()

    def heard(self) -> list[tuple[str, str]]:
        """Return what came in since the last time: ears and messages."""
        self._pubsub.ping()
        found = []
        while (reply := self._pubsub.parse_response())[0] != b"pong":
            if reply[0] == b"message":
                found.append(("p" + reply[1].decode(), reply[2].decode()))
        return found

    def close(self) -> None:
        """Close the connection."""
        self._pubsub.close()


class Bench:
    """A server, and who listens there."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self.client = redis.Redis.from_url(server.url, protocol=2, socket_timeout=LONG)
        self.ears = Ears(self.client)
        for name in ("share_acquire", "share_release", "lock_acquire_all"):
            self.client.script_load(script(name).source)

    def close(self) -> None:
        """Close what is open."""
        self.ears.close()
        self.client.close()


@pytest.fixture(scope="module", params=["redishacks_valkey", "redishacks_redis"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A Valkey, and the oldest Redis that is supported."""
    made = Bench(request.getfixturevalue(request.param))
    yield made
    made.close()


class Known(NamedTuple):
    """What is stored about a holder."""

    fence: int
    length: int
    info: str


class State(NamedTuple):
    """All that is stored about a shared lock."""

    #: Who holds it until when; with a negative time, who is refused until then.
    holders: dict[str, int]
    line: dict[Who, int]
    about: dict[str, Known]
    fence: int

    def running(self, now: int) -> list[str]:
        """Return who holds it at that moment."""
        return [token for token, end in self.holders.items() if end > now]

    def queue(self) -> list[Who]:
        """Return who is in line, the first first."""
        return sorted(self.line, key=lambda who: (self.line[who], who.entry))


class Real:
    """A shared lock whose clock is ours: keys end by it, too."""

    def __init__(self, bench: Bench, most: int) -> None:
        names = Names("kinds", f"lock{next(numbers)}", None)
        self.bench, self.most = bench, most
        self.kind = Shared(names, "any", most=most)
        self.keys = [key.decode() for key in self.kind._keys]
        self.state = State({}, {}, {}, 0)
        #: ms until each key ends, None for one that is not there.
        self.ttls: list[int | None] = [None] * 3

    def do(self, command: Command[Any], now: int, ttls: Sequence[int | None]) -> Any:
        """Carry a command out at that moment, when the keys have so many ms to live."""
        assert command.script is not None
        with self.bench.client.pipeline(transaction=True) as pipe:  # in which time stands still
            for key, ttl in zip(self.keys, ttls, strict=True):
                if ttl is None:
                    pipe.delete(key)
                else:
                    pipe.pexpire(key, max(ttl, LIVES))
            keys = [key.decode() for key in command.keys]
            sha = command.script.sha.decode()
            pipe.evalsha(sha, len(keys), *keys, *command.args, str(now))
            pipe.zrange(self.keys[0], 0, -1, withscores=True)
            pipe.zrange(self.keys[1], 0, -1, withscores=True)
            pipe.hgetall(self.keys[2])
            for key in self.keys:
                pipe.pttl(key)
            for key in self.keys:
                pipe.persist(key)
            reply, holders, line, about, *rest = pipe.execute()[3:]
        self.ttls = [None if ttl == -2 else ttl for ttl in rest[:3]]
        fence = int(about.pop(b"fence", 0))
        found = {}
        for token, text in about.items():
            parts = text.decode().split(" ", 2)
            found[token.decode()] = Known(int(parts[0]), int(parts[1]), parts[2])
        self.state = State(
            {token.decode(): int(score) for token, score in holders},
            {Who(*entry.decode().split(" f")): int(score) for entry, score in line},
            found,
            fence,
        )
        if isinstance(reply, list):
            return [part.decode() if isinstance(part, bytes) else part for part in reply]
        return reply

    def acquire(self, who: Who, ticket: str, ttl: int, not_after: int, info: str) -> Command[Any]:
        """Ask for it."""
        ear = who.ear if ticket else ""
        return self.kind.acquire(who.token, str(ttl), str(not_after), info, ticket, ear)

    def release(self, who: Who | None, fence: int, leave: bool) -> Command[Any]:
        """Give it back; of nobody: whoever has it."""
        if who is None:
            return self.kind.release("", 0, "")
        return self.kind.release(who.token, fence, who.ear if leave else "")


class Model:
    """What the scripts promise. All times are µs."""

    def __init__(self, most: int) -> None:
        self.most = most
        #: Where somebody listens, and what came in there.
        self.ears: set[str] = set()
        self.told: list[tuple[str, str]] = []
        self.state = State({}, {}, {}, 0)
        #: Processes that did not take what they were handed, as far as the running script knows.
        self.gone: set[str] = set()
        #: When each key ends, in ms; None for one that is not there.
        self.ends: list[int | None] = [None] * 3

    def ttls(self, now: int) -> list[int | None]:
        """Let keys end; return how many ms the others have to live."""
        for place, end in enumerate(self.ends):
            if end is not None and end < now // MS:
                self.ends[place] = None
                if place == 2:
                    self.state = self.state._replace(about={}, fence=0)
                else:
                    self.state[place].clear()  # type: ignore[union-attr]
        return [None if end is None else max(1, end - now // MS) for end in self.ends]

    def room(self, token: str, now: int) -> bool:
        """Return whether there is room for one more."""
        held = self.state.running(now)
        if not held or token[0] == "w":
            return not held
        return held[0][0] == "r" and (self.most == 0 or len(held) < self.most)

    def sweep(self) -> None:
        """Forget about holders whose key has ended, and their leases with it."""
        if not self.state.holders:
            self.state.about.clear()

    def settle(self, now: int) -> None:
        """End what has ended, and what lasts longer than it may after the clock was set back."""
        holders, _, about, _ = self.state
        self.gone.clear()
        for token, end in list(holders.items()):
            if end < 0 and -end <= now:
                del holders[token]
            elif 0 <= end <= now:
                known = about.pop(token, None)
                holders[token] = -(now + HOUR)
                if known is not None and not known.info:  # it was never confirmed
                    del holders[token]
                    self.gone.add(token[1:13])
        running = {token: holders[token] for token in self.state.running(now)}
        longest = max(running, key=lambda token: (running[token], token), default="")
        if longest in about and running[longest] - now > about[longest].length:
            for token, end in running.items():
                if token in about:
                    holders[token] = min(end, now + about[token].length)

    def give(self, token: str, length: int, now: int, info: str) -> int:
        """Have somebody hold it."""
        known = self.state.about.get(token)
        if known is None:
            self.state = self.state._replace(fence=max(now, self.state.fence + 1))
        fence = self.state.fence if known is None else known.fence
        self.state.about[token] = Known(fence, length, info)
        self.state.holders[token] = now + length
        return fence

    def tell(self, who: Who, micros: int) -> bool:
        """Tell somebody; return whether it may be there."""
        if who.ear in self.ears:
            self.told.append((who.ear, f"{who.token} {micros}"))
        return who.ear == "-" or who.ear in self.ears

    def admit(self, own: str, now: int) -> bool:
        """Hand it over to all for whom there is room, in turn; return whether `own` is one."""
        given: list[Who] = []
        mine = False
        self.gone.discard(own[1:13])
        for who in self.state.queue():
            free = self.room(who.token, now)
            if not free:
                if not own or not self.room(own, now):
                    break
                last = max(self.state.holders[token] for token in self.state.running(now))
                if self.tell(who, last - now):
                    break
            self.drop(who)
            if free and who.token == own:
                self.give(own, CLAIM, now, "")
                mine = True
            elif free and self.tell(who, 0) and who.token[1:13] not in self.gone:
                self.give(who.token, CLAIM, now, "")
                given.append(who)
        if given:
            self.warn(CLAIM, given[0].ear if len(given) == 1 else "")
        elif self.state.line and not own:
            first = self.state.queue()[0]
            rest = self.left(first.token, now)
            if rest <= CLAIM:
                self.tell(first, rest)
        return mine

    def left(self, token: str, now: int) -> int:
        """Return how long it has to wait at the longest."""
        ends = sorted(self.state.holders[other] - now for other in self.state.running(now))
        return ends[-1 if token[0] == "w" else 0]

    def warn(self, micros: int, ear: str) -> None:
        """Have two look again then, of other processes: the first and the last there is."""
        told, other = "", None
        for way in (1, -1):
            for who in self.state.queue()[::way][:8]:
                if who.ear == told:
                    break
                if who.ear != ear:
                    if self.tell(who, micros):
                        told = who.ear
                        break
                    self.drop(who)
                else:
                    other = other or who
        if other and not told:
            self.tell(other, micros)

    def drop(self, who: Who) -> None:
        """Have somebody leave the line; with the last one its key goes."""
        del self.state.line[who]
        if not self.state.line:
            self.ends[1] = None

    def keep(self, now: int) -> None:
        """See that what is there ends some time."""
        ends = [abs(end) for end in self.state.holders.values()]
        left = max(ends, default=now) - now
        self.ends[0] = now // MS + max(1, math.ceil(left / MS)) if ends else None
        if self.state.fence:
            self.ends[2] = now // MS + max(2 * DAY, 2 * left) // MS

    def acquire(
        self, who: Who, now: int, ticket: str, ttl: int, not_after: int, info: str
    ) -> list[Any]:
        """Ask for it."""
        holders, line, about, _ = self.state
        own = holders.get(who.token, 0)
        if now > not_after:
            return [-1, now]
        if own < 0 or (ticket == MINE and not own):
            return [-2, now]
        taken = own > 0
        known = about.get(who.token)
        if taken and ticket != MINE and known is not None and own - now <= known.length:
            ttl = max(ttl, own - now)  # a late copy cuts nothing short
        if now + ttl < own:
            self.warn(ttl, "")
        if not taken:
            self.sweep()
            self.settle(now)
            if ticket:
                if ticket == "0":
                    early = EARLY if who.token[0] == "w" else 0
                    same = [t for other, t in line.items() if other.token[0] == who.token[0]]
                    ticket = str(max([now - early, *(each + 1 for each in same)]))
                line.setdefault(who, int(ticket))
            taken = self.admit(who.token, now)
            taken = taken or (not ticket and not line and self.room(who.token, now))
        if taken:
            fence = self.give(who.token, ttl, now, info)
            self.keep(now)
            return [1, now, fence]
        held, left = self.state.running(now), self.left(who.token, now)
        known = about[held[0]] if len(held) == 1 else Known(0, 0, "")
        place = -1
        if ticket:
            line.setdefault(who, int(ticket))  # it is there, and cannot be told
        self.keep(now)
        if ticket:
            place = self.state.queue().index(who)
            keep = math.ceil(left / MS) + 60_000 + now // MS
            self.ends[1] = max(keep, self.ends[1] or 0)
        return [0, now, left, place, ticket, known.fence, known.info]

    def release(self, who: Who | None, now: int, fence: int, leave: bool) -> int:
        """Give it back, or leave the line; of nobody: take it away."""
        holders, line, about, _ = self.state
        done = 2
        self.sweep()
        if who is None:
            held = [token for token, end in holders.items() if end > 0]
            done = int(bool(held))
            for token in held:
                holders[token] = -(now + HOUR)
                about.pop(token, None)
        else:
            own = holders.get(who.token, 0)
            done = 1 if own > 0 else 0 if own < 0 else 2
            if fence == 0:
                holders[who.token] = -(now + HOUR)
            elif own > 0:
                del holders[who.token]
            about.pop(who.token, None)
            if leave and who in line:
                self.drop(who)
        self.settle(now)
        self.admit("", now)
        self.keep(now)
        return done


class Witness:
    """What must be true whatever a model says; it sees replies, and what is stored."""

    def __init__(self, most: int) -> None:
        self.most = most
        #: µs that passed: a clock that is set back takes none of them back.
        self.real = 0
        #: Who was told to have it: until when it counts on that.
        self.counts: dict[str, int] = {}
        self.newest = 0
        #: Who gave up in doubt: until when a copy of what it said takes nothing.
        self.gone: dict[str, int] = {}

    def fits(self, tokens: Sequence[str]) -> bool:
        """Return whether all of them may hold it at once."""
        if any(token[0] == "w" for token in tokens):
            return len(tokens) == 1
        return self.most == 0 or len(tokens) <= self.most

    def look(
        self, before: State, after: State, now: int, ears: set[str], asking: tuple[Who, str] | None
    ) -> None:
        """See who has it now, and how it came to that."""
        held = after.running(now)
        assert self.fits(held)
        there = [who for who in after.line if who.ear == "-" or who.ear in ears]
        came = [token for token in held if before.holders.get(token, 0) <= 0]
        for token in sorted(came, key=lambda token: after.about[token].fence):
            known = after.about[token]
            assert known.fence > self.newest, "fences grow"
            self.newest = known.fence
            assert self.gone.get(token, 0) <= self.real, "a late copy takes nothing"
            own = asking is not None and asking[0].token == token
            waited = [who for who in before.line if who.token == token]
            assert own or any(who.ear == "-" or who.ear in ears for who in waited), "it is there"
            turns = [before.line[who] for who in waited]
            if not turns and own and asking is not None and asking[1].lstrip("-").isdigit():
                turns = [after.line.get(asking[0], int(asking[1]))]
            if turns and turns != [0]:
                assert all(after.line[who] > turns[0] for who in there), "in turn"
            else:  # it came just now
                assert not [who for who in there if who.token[0] == "w" or token[0] == "r"]
        if after == before or (asking is not None and before.holders.get(asking[0].token, 0)):
            return
        longest = max(held, key=lambda token: after.holders[token], default="")
        if longest:
            assert after.holders[longest] - now <= after.about[longest].length
        if after.line:
            assert not self.fits([*held, after.queue()[0].token]), "there is room for it"
        elif not after.holders:
            assert not after.about

    def asked(self, who: Who, ttl: int, reply: list[Any]) -> None:
        """See a reply to an acquisition."""
        if reply[0] != 1:
            return
        self.counts[who.token] = self.real + ttl
        counting = [token for token, end in self.counts.items() if end > self.real]
        assert self.fits(counting), "too many have it at once"

    def gave(self, who: Who | None, fence: int) -> None:
        """See a release."""
        if who is None:
            self.counts.clear()
            return
        self.counts.pop(who.token, None)
        if fence == 0:
            self.gone[who.token] = self.real + HOUR


WHAT = ["now", "now", "wait", "wait", "wait", "again", "again", "mine", "late"]
WHAT += ["give", "give", "give", "leave", "quit", "unknown", "force", "listen"]
#: µs between two events, or to the end of the next lease; the clock is set back, too.
STEPS: list[int | str] = [0, 1, 50 * MS] * 6 + ["edge", "edge", "before"] * 2
STEPS += [CLAIM, CLAIM, TTL, HOUR, DAY, -1, -150 * MS, -5 * SECOND, -HOUR]
PEOPLE = st.lists(
    st.builds(
        Who,
        st.sampled_from("rrw"),
        st.sampled_from(["-", "pA", "pA", "pB", "pC", DEAF]),
    ),
    min_size=7,
    max_size=7,
)
#: What happens, by whom (7 and more: somebody who has it), after how long, with which lease.
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(WHAT),
        st.integers(0, 11),
        st.sampled_from(STEPS),
        st.sampled_from([MS, 100 * MS] + [TTL] * 5 + [2 * HOUR, DAY + 1, 366 * DAY]),
        st.sampled_from(["host\t1\tlabel\tthread", "1 2 3", "\n%d %s", "é "]),
    ),
    min_size=4,
    max_size=50,
)
#: Two processes are given it, and somebody of the second is next.
OF_TWO = [Who("r", ear) for ear in ("-", "-", "pA", "pB", "pB", "pA", "pA")]

#: One that was handed it does not take it, and after it comes another of its process.
SLIPS: Any = [("quit", 2, 0, TTL, ""), ("quit", 3, 0, TTL, ""), ("force", 0, 0, TTL, "")]
SLIPS += [("again", 5, CLAIM, TTL, "x"), ("again", 4, 1, TTL, "x"), ("give", 5, 1, TTL, "")]


@example(most=1, people=[Who("r")] * 7, crowd=7, events=SLIPS)
@example(most=2, people=OF_TWO, crowd=7, events=[("force", 0, 0, TTL, "")])
@settings(max_examples=100, deadline=None)
@given(most=st.sampled_from([0, 0, 1, 2, 3]), people=PEOPLE, crowd=st.integers(0, 7), events=EVENTS)
def test_a_trace_agrees_with_the_model(
    bench: Bench, most: int, people: list[Who], crowd: int, events: Any
) -> None:
    """Each reply, what is stored and for how long, and who is told are as the model says."""
    events = [("wait", number, 1, TTL, "first") for number in range(crowd)] + events
    people = [
        Who(f"{kind}process-{number % 3:04}{number}", ear)
        for number, (kind, ear) in enumerate(people)
    ]
    real, model, witness = Real(bench, most), Model(most), Witness(most)
    model.ears = {"pA", "pB", "pC"}
    bench.ears.open(model.ears)
    tickets: dict[Who, str] = {}
    fences: dict[Who, int] = {}
    now, back = START, 0
    for what, number, step, ttl, info in events:
        running = sorted(model.state.running(now))
        if isinstance(step, str):
            edge = min((model.state.holders[token] for token in running), default=now)
            step = max(0, edge - now - (step == "before"))
        if step < 0:
            back -= step
            step *= back < 12 * HOUR  # fences grow while clocks agree within a day
        now += step
        witness.real += max(0, step)
        who = people[number % 7]
        if number >= 7 and running:
            who = next(who for who in people if who.token == running[number % len(running)])
        if what == "listen":
            model.ears ^= {who.ear} - {"-", DEAF}
            bench.ears.open(model.ears)
            continue
        ttls, before = model.ttls(now), real.state
        if ttls[0] is None:
            before = before._replace(holders={})
        if ttls[1] is None:
            before = before._replace(line={})
        if what in ("now", "wait", "again", "mine", "late"):
            ticket = {"wait": "0", "again": tickets.get(who, "0"), "mine": MINE}.get(what, "")
            ask = (ticket, ttl, now - (what == "late"), info)
            reply = real.do(real.acquire(who, *ask), now, ttls)
            witness.look(before, real.state, now, model.ears, (who, ticket))
            witness.asked(who, ttl, reply)
            assert reply == model.acquire(who, now, *ask)
            if reply[0] == 1:
                fences[who] = reply[2]
            elif reply[0] == 0:
                assert 0 < reply[2] <= 366 * DAY
                if ticket:
                    tickets.setdefault(who, reply[4])
        else:
            # Whoever leaves the line with no copy of its acquire under way says so.
            fence = {"give": fences.get(who, 0), "quit": -1}.get(what, 0)
            by = None if what == "force" else who
            leave = what in ("leave", "quit") or who in before.line
            done = real.do(real.release(by, fence, leave), now, ttls)
            witness.gave(by, fence)
            witness.look(before, real.state, now, model.ears, None)
            assert done == model.release(by, now, fence, leave)
        assert real.state == model.state
        assert bench.ears.heard() == model.told
        model.told.clear()
        for ttl_now, expected in zip(real.ttls, model.ttls(now), strict=True):
            assert (ttl_now is None) == (expected is None)
            if ttl_now is not None and expected is not None:
                assert abs(max(ttl_now, LIVES) - max(expected, LIVES)) < 1_000


# The script that takes several locks, at a moment of our choice


class Lease(NamedTuple):
    """What is stored about one of them: who has it until when, or who released it last."""

    token: str
    #: µs from now; None when nobody has it.
    left: int | None
    fence: int
    lost: int
    #: Somebody may be in line: fair ones, and who is told only.
    line: tuple[tuple[bool, str], ...]

    def stored(self, now: int) -> str:
        """Return what the key of the lock has."""
        crowd = int(bool(self.line))
        if self.left is None:
            return f"- {self.fence} {self.lost} {crowd} {self.token}"
        return f"{self.token} {now + self.left} {TTL} {self.fence} {self.lost} {crowd} host\tinfo"


LEASES = st.none() | st.builds(
    Lease,
    st.sampled_from(["own", "other", "other"]),
    st.sampled_from([None, None, TTL, 1, 0, -1, -DAY]),
    st.sampled_from([START - SECOND, START - 1, START + SECOND]),
    st.just(7),
    st.lists(st.tuples(st.booleans(), st.sampled_from(["-", "pA", "pB", DEAF])), max_size=3).map(
        tuple
    ),
)


def first_there(lease: Lease) -> tuple[int, bool] | None:
    """Return who is the first in line that is there, and whether it waits in turn."""
    for place, (fair, ear) in enumerate(lease.line):
        if ear != DEAF:
            return place, fair
    return None


@settings(max_examples=80, deadline=None)
@given(leases=st.lists(LEASES, min_size=1, max_size=4), fair=st.booleans(), late=st.booleans())
def test_all_or_none(bench: Bench, leases: list[Lease | None], fair: bool, late: bool) -> None:
    """All are taken when each is free, or this one's; else none is, and the first that is not is
    told, unless that goes to whoever is first in its line."""
    client: Any = bench.client
    now = START
    bench.ears.open({"pA", "pB"})
    kinds = [Exclusive(Names("kinds", f"l{next(numbers)}", None), fair=fair) for _ in leases]
    tokens = [f"t{place}" for place in range(len(leases))]
    for kind, token, lease in zip(kinds, tokens, leases, strict=True):
        if lease is not None:
            lease = lease._replace(token=token if lease.token == "own" else "other")
            client.set(kind.key, lease.stored(now), px=DAY // MS)
            for place, (in_turn, ear) in enumerate(lease.line):
                entry = f"w{place} {'f' if in_turn else 'u'}{ear}"
                client.zadd(kind._keys[1], {entry: now - 99 + place})
    before = [client.get(kind.key) for kind in kinds]
    command = kinds[0].acquire_all(kinds[1:], tokens, str(TTL), str(now - late), "me")
    assert command.script is not None
    reply = client.evalsha(
        command.script.sha.decode(), len(command.keys), *command.keys, *command.args, str(now)
    )
    after = [client.get(kind.key) for kind in kinds]
    if late:
        assert reply == [-1, now]
        assert after == before
        return
    for place, lease in enumerate(leases):
        own = lease is not None and lease.token == "own"
        if lease is None or (own and lease.left is not None):
            continue
        if own:
            assert reply == [-2, now]
            assert after == before
            return
        if lease.left is not None and lease.left > 0:
            assert reply == [0, now, place + 1, lease.left, lease.fence, b"host\tinfo"]
            assert after == before
            return
        first = first_there(lease)
        if fair and first is not None and first[1]:
            fence = max(now, lease.fence + 1)
            giver = lease.token.encode() if lease.left is None else b""
            assert reply == [0, now, place + 1, CLAIM, fence, giver]
            heir = f"w{first[0]} {now + CLAIM} {CLAIM} {fence} "
            assert after[place].startswith(heir.encode())
            assert after[:place] + after[place + 1 :] == before[:place] + before[place + 1 :]
            return
    fences = []
    for lease, token, stored in zip(leases, tokens, after, strict=True):
        own = lease is not None and lease.token == "own"
        fence = now if lease is None else lease.fence if own else max(now, lease.fence + 1)
        fences.append(fence)
        lost = 0 if lease is None else 7
        if lease is not None and not own and lease.left is not None:
            lost = lease.fence
        assert stored.startswith(f"{token} {now + TTL} {TTL} {fence} {lost} ".encode())
        assert stored.endswith(b" me")
        if lease is not None and lease.line and not (fair and not own and not first_there(lease)):
            assert stored.split()[5] == b"1", "who waits is not forgotten"
    assert reply == [1, now, *fences]
    assert all(client.pttl(kind.key) > DAY // MS for kind in kinds)


# Who does what: threads or tasks, and other processes


class Person:
    """A thread, or a task, that does as it is told."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        if loop is None:
            self._pool = ThreadPoolExecutor(1)
        else:
            self._orders: asyncio.Queue[Any] = asyncio.Queue()
            loop.call_soon_threadsafe(self._hire)

    def begins(self, function: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        """Have it do something, and do not wait for the end."""
        call = functools.partial(function, *args, **options)
        if self._loop is None:
            return self._pool.submit(call)
        future: Future[Any] = Future()
        self._loop.call_soon_threadsafe(self._orders.put_nowait, (future, call))
        return future

    def does(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Have it do something; return or raise what came of it."""
        return self.begins(function, *args, **options).result(LONG)

    def leaves(self) -> None:
        """Be done."""
        if self._loop is None:
            self._pool.shutdown()

    def _hire(self) -> None:
        self._task = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        while True:
            future, call = await self._orders.get()
            try:
                result = call()
                future.set_result(await result if inspect.isawaitable(result) else result)
            except BaseException as error:
                future.set_exception(error)
                if isinstance(error, asyncio.CancelledError):
                    raise  # the world ends
            future, call, result = None, None, None


class World:
    """Locks of one colour, and people who use them at the same time."""

    def __init__(self, flavour: str, url: str, prefix: str) -> None:
        self.flavour, self.url, self.prefix = flavour, url, prefix
        self.raw: Any = redis.Redis.from_url(url, decode_responses=True)
        self._people: list[Person] = []
        self._remotes: list[Remote] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        if flavour == "async":
            self._up = threading.Event()
            self._thread = threading.Thread(target=lambda: asyncio.run(self._turn()))
            self._thread.start()
            assert self._up.wait(LONG)

    async def _turn(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._up.set()
        await self._end.wait()

    def people(self, count: int) -> list[Person]:
        """Return so many new ones."""
        found = [Person(self._loop) for _ in range(count)]
        self._people += found
        return found

    def remote(self, kind: str, *args: Any, **options: Any) -> Remote:
        """Return another process that acquires a lock."""
        self._remotes.append(Remote(self.url, self.prefix, kind, *args, **options))
        return self._remotes[-1]

    def make(self, kind: str, what: Any, *args: Any, client: Any = None, **options: Any) -> Any:
        """Return a lock of some kind, of this colour."""
        made = getattr(locks, kind if self._loop is None else f"Async{kind}")
        return made(client or self.url, what, *args, **{"prefix": self.prefix} | options)

    def sides(self, **options: Any) -> tuple[Any, Any]:
        """Return both sides of a readers-writer lock."""
        lock = self.make("RWLock", "config", **options)
        return lock.read, lock.write

    def keys(self, name: str, *rests: str) -> list[str]:
        """Return keys of a lock."""
        return [f"{self.prefix}:l1:{{{name}}}:{rest}" for rest in rests]

    def waiting(self, count: int, line: str = "config}:rw-line") -> None:
        """Return when so many stand in line."""
        key = f"{self.prefix}:l1:{{{line}"
        eventually(lambda: self.raw.zcard(key) == count)

    def there(self) -> set[str]:
        """Return what is in Redis, without the prefix; each key has a TTL."""
        keys = list(self.raw.scan_iter(f"{self.prefix}:*", 1000))
        assert all(self.raw.pttl(key) > 0 or not self.raw.exists(key) for key in keys)
        return {key.removeprefix(f"{self.prefix}:l1:") for key in keys}

    @property
    def within(self) -> Callable[[Any, Callable[[Any], Any]], Any]:
        """Call a function in the `with` of something, on what that gives."""
        return _within_async if self._loop else _within

    def close(self) -> None:
        """Send everybody home."""
        for remote in self._remotes:
            remote.dies()  # before anybody joins it, who may be stopped
        for person in self._people:
            person.leaves()
        if self._loop:
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(LONG)
        self.raw.close()


def _within(manager: Any, body: Callable[[Any], Any]) -> Any:
    with manager as held:
        return body(held)


async def _within_async(manager: Any, body: Callable[[Any], Any]) -> Any:
    async with manager as held:
        result = body(held)
        return await result if inspect.isawaitable(result) else result


@pytest.fixture
def world(flavour: str, valkey: Server, prefix: str) -> Iterator[World]:
    """Both colours, with one test body."""
    made = World(flavour, valkey.url, prefix)
    yield made
    made.close()


class Remote:
    """Another process, which acquires a lock and holds it until told to release it."""

    def __init__(self, url: str, prefix: str, kind: str, *args: Any, **options: Any) -> None:
        self._ours, theirs = pipe()
        self.process = start(remotely, url, prefix, kind, args, options, theirs)
        assert self.process.pid is not None
        self.pid = self.process.pid
        assert self.hears() == "here"

    def hears(self) -> Any:
        """Return what it says next."""
        assert self._ours.poll(LONG)
        return self._ours.recv()

    def releases(self) -> Any:
        """Have it release the lock; return what came of it."""
        self._ours.send("release")
        return self.hears()

    def dies(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.join(LONG)

    def stops(self) -> None:
        """SIGSTOP it."""
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: is_stopped(self.pid))

    def goes_on(self) -> None:
        """SIGCONT it."""
        os.kill(self.pid, signal.SIGCONT)


def remotely(
    url: str, prefix: str, kind: str, args: Any, options: dict[str, Any], pipe: Any
) -> None:
    """Acquire and release a lock, and say what came of it."""
    side = options.pop("side", "")
    lock: Any = getattr(locks, kind)(url, *args, prefix=prefix, **options)
    lock = getattr(lock, side) if side else lock
    pipe.send("here")
    try:
        held = lock.acquire()
        pipe.send("held")
        pipe.recv()
        held.release()
        pipe.send("released")
    except RedisHacksError as error:
        pipe.send(type(error).__name__)


def fails(error: type[BaseException], person: Person, call: Any, *args: Any, **options: Any) -> Any:
    """Have somebody do what must fail in this way; return the error."""
    with pytest.raises(error) as caught:
        person.does(call, *args, **options)
    assert type(caught.value) is error
    return caught.value


async def soon(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(LONG):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def done(futures: Sequence[Future[Any]]) -> list[int]:
    """Return which of them have come to an end."""
    return [place for place, future in enumerate(futures) if future.done()]


# Semaphore


def test_so_many_at_once(world: World) -> None:
    """Not one more; a refusal says so and for how long; what is given back can be had at once."""
    workers = world.make("Semaphore", "workers", 2, label="nightly")
    ann, bob, eve = world.people(3)
    first, second = ann.does(workers.acquire), bob.does(workers.acquire)
    assert workers.amount == 2
    assert 0 < first.fence < second.fence
    assert 8 < second.remaining <= 10
    refusal = fails(LockedError, eve, workers.acquire)
    assert str(refusal).startswith("lock workers has all its 2 in use; until ")
    assert (refusal.name, refusal.holder) == ("workers", None)
    assert 5 < refusal.remaining <= 10
    shown = eve.does(workers.holders)
    assert [(holder.fence, holder.label, holder.pid) for holder in shown] == [
        (held.fence, "nightly", os.getpid()) for held in (first, second)
    ]
    assert all(8 < holder.remaining <= 10 for holder in shown)
    assert len({holder.thread for holder in shown}) == 2
    bob.does(first.release)  # whoever has the handle may
    third = eve.does(workers.acquire)
    assert third.fence > second.fence
    for held in (second, third):
        held.check()
        ann.does(held.release)
        fails(LockLostError, ann, held.extend)
    assert ann.does(workers.holders) == []
    assert world.there() == {"{workers}:permits-about"}
    about = world.keys("workers", "permits-about")[0]
    assert world.raw.hkeys(about) == ["fence"]
    assert world.raw.memory_usage(about) < 400
    assert DAY // MS < world.raw.pttl(about) <= 2 * DAY // MS


def test_a_refusal_of_the_only_permit_names_its_holder(world: World) -> None:
    """Of one permit it is known who has it."""
    workers = world.make("Semaphore", "workers", 1, label="nightly")
    ann, bob = world.people(2)
    ann.does(workers.acquire)
    refusal = fails(LockedError, bob, workers.acquire)
    assert refusal.holder.label == "nightly"
    assert refusal.holder.pid == os.getpid()


def test_one_may_take_several_permits(world: World) -> None:
    """Nothing is taken for a deadlock: one thread or task may have all of them, nested too."""
    workers = world.make("Semaphore", "workers", 3)
    (ann,) = world.people(1)

    def nested(held: Any) -> Any:
        return world.within(workers, lambda other: held.token != other.token)

    assert ann.does(world.within, workers, nested)
    held = [ann.does(workers.acquire) for _ in range(3)]
    fails(LockedError, ann, workers.acquire)
    fails(LockedError, ann, workers.acquire, wait=0.05)
    for each in held:
        ann.does(each.release)
    assert ann.does(workers.holders) == []


def test_permits_are_had_in_turn(world: World) -> None:
    """Whoever came first gets the permit that is given back; one that is new does not barge."""
    workers = world.make("Semaphore", "workers", 2)
    people = world.people(7)
    held = [person.does(workers.acquire) for person in people[:2]]
    waits = []
    for number, person in enumerate(people[2:6], 1):
        waits.append(person.begins(workers.acquire, wait=LONG))
        world.waiting(number, "workers}:permits-line")
    for place, wait in enumerate(waits):
        assert done(waits) == list(range(place))
        fails(LockedError, people[6], workers.acquire)
        people[0].does(held.pop(0).release)
        held.append(wait.result(LONG))
    assert world.raw.zcard(world.keys("workers", "permits-line")[0]) == 0


def test_two_permits_at_once_wake_two(world: World) -> None:
    """Each of several that are given back goes to one of the line."""
    workers = world.make("Semaphore", "workers", 3)
    people = world.people(6)
    held = [person.does(workers.acquire) for person in people[:3]]
    waits = [person.begins(workers.acquire, wait=LONG) for person in people[3:]]
    world.waiting(3, "workers}:permits-line")
    before = time.monotonic()
    assert people[0].does(workers.force_release)
    fences = {wait.result(LONG).fence for wait in waits}
    assert time.monotonic() - before < 5
    assert min(fences) > held[2].fence
    assert len(fences) == 3


def crowd(url: str, prefix: str, kind: str, args: Any, flavour: str, turns: int, pipe: Any) -> None:
    """Take turns at a lock; tell the most that were seen at once, and whether all was well.

    Of a readers-writer lock every third turn writes.
    """
    client = redis.Redis.from_url(url)
    lock: Any = getattr(locks, f"Async{kind}" if flavour == "async" else kind)(
        url, *args, prefix=prefix, wait=LONG, deadline=5
    )
    seen = []

    def side(turn: int) -> tuple[Any, str]:
        if kind == "Semaphore":
            return lock, "many"
        return (lock.write, "one") if turn % 3 == 0 else (lock.read, "many")

    def inside(gauge: str) -> None:
        """Nobody is here beside a writer."""
        with client.pipeline(transaction=True) as both:
            both.incr(f"{prefix}-{gauge}")
            both.mget(f"{prefix}-one", f"{prefix}-many")
            one, many = (int(value or 0) for value in both.execute()[1])
        seen.append(many if one == 0 or (one, many) == (1, 0) else math.inf)

    def outside(gauge: str) -> None:
        client.decr(f"{prefix}-{gauge}")

    def thread(number: int) -> None:
        for turn in range(number, number + turns):
            way, gauge = side(turn)
            with way:
                inside(gauge)
                time.sleep(0.001)
                outside(gauge)

    async def task(number: int) -> None:
        for turn in range(number, number + turns):
            way, gauge = side(turn)
            async with way:
                inside(gauge)
                await asyncio.sleep(0.001)
                outside(gauge)

    async def tasks() -> None:
        await asyncio.gather(*map(task, range(6)))

    if flavour == "async":
        asyncio.run(tasks())
    else:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(thread, range(6)))
    client.close()
    pipe.send((max(seen), len(seen)))


@pytest.mark.parametrize(("kind", "args"), [("Semaphore", ("workers", 3)), ("RWLock", ("config",))])
def test_never_too_many(valkey: Server, prefix: str, kind: str, args: Any) -> None:
    """Six threads in one process and six tasks in another: never too many at once, and all are
    served; nothing is left in the end."""
    pipes = [pipe() for _ in range(2)]
    started = [
        start(crowd, valkey.url, prefix, kind, args, flavour, 6, theirs)
        for flavour, (_, theirs) in zip(["sync", "async"], pipes, strict=True)
    ]
    told = []
    for ours, _ in pipes:
        assert ours.poll(2 * LONG)
        told.append(ours.recv())
    for process in started:
        process.join(LONG)
    assert [turns for _, turns in told] == [36] * 2
    most = max(most for most, _ in told)
    assert most == 3 if kind == "Semaphore" else 2 <= most < math.inf
    with valkey.client(decode_responses=True) as client:
        keys = list(client.scan_iter(f"{prefix}:*", 1000))
        assert [key.split("-")[-1] for key in keys] == ["about"]
        assert client.hkeys(keys[0]) == ["fence"]


@pytest.mark.parametrize("flavour", ["sync"])
def test_a_killed_holder_gives_its_permit_back(world: World) -> None:
    """When its lease ends, whoever waits has it."""
    workers = world.make("Semaphore", "workers", 1)
    killed = world.remote("Semaphore", "workers", 1, ttl=0.5)
    assert killed.hears() == "held"
    (ann,) = world.people(1)
    wait = ann.begins(workers.acquire, wait=LONG)
    world.waiting(1, "workers}:permits-line")
    killed.dies()
    before = time.monotonic()
    held = wait.result(LONG)
    assert time.monotonic() - before < 8
    ann.does(held.release)
    assert world.raw.hkeys(world.keys("workers", "permits-about")[0]) == ["fence"]


def begins_anew(held: Any) -> None:
    """Return when a lease has begun anew."""
    last = held.remaining

    def longer() -> bool:
        nonlocal last
        before, last = last, held.remaining
        return bool(last > before)

    eventually(longer)


def test_leases_of_permits(world: World) -> None:
    """A renewed one begins anew; another is lost at its end, which is told."""
    told: list[Any] = []
    workers = world.make("Semaphore", "workers", 2)
    ann, bob = world.people(2)
    renewed = ann.does(world.make("Semaphore", "workers", 2, ttl=1, renew=True).acquire)
    lost = bob.does(world.make("Semaphore", "workers", 2, ttl=0.2, on_lost=told.append).acquire)
    eventually(lambda: told == [lost])
    assert lost.remaining == 0.0
    with pytest.raises(LockLostError, match=r"lock workers is not held: its lease of 0\.2 s ended"):
        lost.check()
    third = ann.does(workers.acquire, wait=LONG)
    fails(LockLostError, bob, lost.release)
    begins_anew(renewed)
    assert [holder.fence for holder in ann.does(workers.holders)] == [renewed.fence, third.fence]
    ann.does(renewed.release)
    assert [holder.fence for holder in ann.does(workers.holders)] == [third.fence]


@pytest.mark.parametrize("kind", ["Semaphore", "RWLock"])
def test_a_lease_that_was_extended_lasts_as_long_as_it_says(world: World, kind: str) -> None:
    """Nobody else gets it before, however many ask; and `extend` without a ttl keeps that one."""
    lock = world.make(kind, *{"Semaphore": ("workers", 1)}.get(kind, ("config",)), ttl=0.5)
    ways = [lock] if kind == "Semaphore" else [lock.write, lock.read]
    ann, bob = world.people(2)
    held = ann.does(ways[0].acquire)
    ann.does(held.extend, 20)
    assert 15 < held.remaining <= 20
    for way in ways:
        refusal = fails(LockedError, bob, way.acquire, wait=0.05)
        assert refusal.remaining > 10
    time.sleep(0.5)
    assert 10 < ann.does(ways[0].holders)[0].remaining <= 20
    ann.does(held.extend)
    assert 15 < held.remaining <= 20
    fails(LockedError, bob, ways[0].acquire)
    ann.does(held.extend, 0.1)
    bob.does(ways[0].acquire, wait=LONG)
    fails(LockLostError, ann, held.release)


def test_what_is_known_about_a_long_lease_lives_as_long(world: World) -> None:
    """Others who come and go for a moment do not shorten it."""
    workers = world.make("Semaphore", "workers", 2)
    ann, bob = world.people(2)
    day = 86_400
    held = ann.does(workers.acquire, ttl=30 * day)
    about = world.keys("workers", "permits-about")[0]
    bob.does(bob.does(workers.acquire).release)
    assert world.raw.ttl(about) > 29 * day
    ann.does(held.extend, 60 * day)
    assert world.raw.ttl(about) > 59 * day
    ann.does(held.release)
    bob.does(bob.does(workers.acquire).release)
    assert world.raw.ttl(about) <= 2 * day


def test_a_renewal_brings_nothing_back(world: World) -> None:
    """What was taken away stays so, and its holder is told by the next renewal."""
    ann, bob = world.people(2)
    held = ann.does(world.make("Semaphore", "workers", 1, ttl=1, renew=True).acquire)
    workers = world.make("Semaphore", "workers", 1)
    assert bob.does(workers.force_release)
    other = bob.does(workers.acquire)
    eventually(lambda: held.lost)
    assert [holder.fence for holder in bob.does(workers.holders)] == [other.fence]
    fails(LockLostError, ann, held.release)


def test_permits_taken_away(world: World) -> None:
    """`force_release` takes all: holders find them lost, and harm nobody who came after."""
    workers = world.make("Semaphore", "workers", 2)
    ann, bob, eve = world.people(3)
    assert not eve.does(workers.force_release)
    held = [ann.does(workers.acquire), bob.does(workers.acquire)]
    assert eve.does(workers.force_release)
    assert eve.does(workers.holders) == []
    after = [eve.does(workers.acquire) for _ in range(2)]
    fails(LockLostError, ann, held[0].extend)
    for person, each in zip((ann, bob), held, strict=True):
        fails(LockLostError, person, each.release)
    assert len(eve.does(workers.holders)) == 2
    for each in after:
        eve.does(each.release)


def test_crashes_leave_nothing_for_good(world: World) -> None:
    """What is known about holders goes with them, when nobody saw their leases end too."""
    workers = world.make("Semaphore", "workers", 1)
    (ann,) = world.people(1)
    holders, about = world.keys("workers", "permits", "permits-about")
    for _ in range(3):
        ann.does(workers.acquire, ttl=0.01)
        eventually(lambda: not world.raw.exists(holders))
    ann.does(ann.does(workers.acquire).release)
    assert world.raw.hkeys(about) == ["fence"]


def test_waits_that_ended_leave_nothing(world: World) -> None:
    """Who waited in vain is not remembered: there may be many of them."""
    workers = world.make("Semaphore", "workers", 1)
    ann, bob = world.people(2)
    held = ann.does(workers.acquire)
    for _ in range(5):
        fails(LockedError, bob, workers.acquire, wait=0.002)
    assert world.raw.zrange(world.keys("workers", "permits")[0], 0, -1) == [held.token]
    assert world.there() == {"{workers}:permits", "{workers}:permits-about"}


def test_a_stopped_waiter_loses_its_turn_and_no_more(world: World) -> None:
    """What is handed over to it goes to the next soon; when it goes on, it waits again."""
    workers = world.make("Semaphore", "workers", 2)
    ann, bob, eve = world.people(3)
    held = ann.does(workers.acquire)
    eve.does(workers.acquire)
    stopped = world.remote("Semaphore", "workers", 2, wait=None)
    line = "workers}:permits-line"
    world.waiting(1, line)
    stopped.stops()
    wait = bob.begins(workers.acquire, wait=LONG)
    world.waiting(2, line)
    before = time.monotonic()
    ann.does(held.release)
    held = wait.result(LONG)
    assert 0.15 < time.monotonic() - before < 5
    stopped.goes_on()
    world.waiting(1, line)
    bob.does(held.release)
    assert stopped.hears() == "held"
    assert stopped.releases() == "released"


@pytest.mark.parametrize("flavour", ["sync"])
def test_two_stopped_waiters_cost_one_claim(world: World) -> None:
    """When both permits went to who does not take them, both are had by those who come next."""
    workers = world.make("Semaphore", "workers", 2)
    people = world.people(4)
    for person in people[:2]:
        person.does(workers.acquire)
    line = "workers}:permits-line"
    stopped = []
    for number in range(2):
        stopped.append(world.remote("Semaphore", "workers", 2, wait=None))
        world.waiting(number + 1, line)
        stopped[-1].stops()
    waits = [person.begins(workers.acquire, wait=LONG) for person in people[2:]]
    world.waiting(4, line)
    before = time.monotonic()
    assert people[0].does(workers.force_release)
    for wait in waits:
        wait.result(LONG)
    assert time.monotonic() - before < 5  # not until a lease of 10 s ends
    for each in stopped:
        each.dies()


@pytest.mark.parametrize("amount", [0, -1, True, 1.0, "5", None, 2**53])
def test_amounts(valkey: Server, amount: Any) -> None:
    """A semaphore has a whole number of permits, one or more."""
    for kind in (locks.Semaphore, locks.AsyncSemaphore):
        with pytest.raises(UsageError, match="a semaphore has 1 permit or more, not "):
            kind(valkey.url, "workers", amount)


def test_what_a_semaphore_is_not(world: World) -> None:
    """It is not reentrant, and no ground for a transaction; functions of its colour only."""
    with pytest.raises(UsageError, match="a semaphore is not reentrant"):
        world.make("Semaphore", "workers", 1, reentrant=True)
    (ann,) = world.people(1)
    workers = world.make("Semaphore", "workers", 1)
    held = ann.does(workers.acquire)
    with pytest.raises(UsageError, match="a transaction needs a Lock or a MultiLock"):
        held.transaction()

    def plain() -> str:
        return "plain"

    async def later() -> str:
        return "later"

    ann.does(held.release)
    good, bad = (plain, later) if world.flavour == "sync" else (later, plain)
    assert ann.does(workers(good)) in ("plain", "later")
    assert ann.does(workers.holders) == []
    with pytest.raises(UsageError, match="Semaphore"):
        workers(bad)


# RWLock


def test_many_readers_or_one_writer(world: World) -> None:
    """Readers share it; a writer has it alone; a refusal says who has it, or how it is."""
    read, write = world.sides(label="nightly")
    ann, bob, eve = world.people(3)
    reading = [ann.does(read.acquire), bob.does(read.acquire)]
    refusal = fails(LockedError, eve, write.acquire)
    assert str(refusal).startswith("lock config is held by several; until ")
    assert refusal.holder is None
    fails(LockedError, eve, write.acquire, wait=0.05)
    assert len(eve.does(write.holders)) == 2
    for person, held in zip((ann, bob), reading, strict=True):
        person.does(held.release)
    writing = eve.does(write.acquire)
    assert writing.fence > max(held.fence for held in reading)
    for way in (read, write):
        refusal = fails(LockedError, ann, way.acquire)
        assert "held by nightly, process " in str(refusal)
        assert refusal.holder.fence == writing.fence
    eve.does(writing.release)
    held = ann.does(read.acquire)
    assert held.fence > writing.fence
    with pytest.raises(UsageError, match="a transaction needs a Lock or a MultiLock"):
        held.transaction()
    ann.does(held.release)
    assert world.there() == {"{config}:rw-about"}
    assert world.raw.hkeys(world.keys("config", "rw-about")[0]) == ["fence"]


def test_a_waiting_writer_keeps_new_readers_out(world: World) -> None:
    """It is not starved: whoever comes after it and reads stands behind it."""
    read, write = world.sides()
    ann, bob, eve, joe = world.people(4)
    first = ann.does(read.acquire)
    writer = bob.begins(write.acquire, wait=LONG)
    world.waiting(1)
    fails(LockedError, eve, read.acquire)
    fails(LockedError, eve, read.acquire, wait=0.05)
    reader = joe.begins(read.acquire, wait=LONG)
    world.waiting(2)
    ann.does(first.release)
    writing = writer.result(LONG)
    assert not reader.done()
    bob.does(writing.release)
    assert reader.result(LONG).fence > writing.fence


def test_after_a_writer_come_writers_then_all_readers(world: World) -> None:
    """Writers in the order in which they came, then everybody who reads at once."""
    read, write = world.sides()
    people = world.people(7)
    held = people[0].does(write.acquire)
    writers: list[Future[Any]] = []
    readers: list[Future[Any]] = []
    for number, person in enumerate(people[1:], 1):
        side, waits = (read, readers) if number % 2 else (write, writers)
        waits.append(person.begins(side.acquire, wait=LONG))
        world.waiting(number)
    for place, writer in enumerate(writers):
        assert done(writers) == list(range(place))
        people[0].does(held.release)
        held = writer.result(LONG)
        assert done(readers) == []
    people[0].does(held.release)
    fences = [reader.result(LONG).fence for reader in readers]
    assert fences == sorted(fences)
    assert len(people[0].does(read.holders)) == 3


def test_a_writer_that_waited_in_vain_lets_readers_in(world: World) -> None:
    """At once, while others still read: those who stand behind it, and new ones."""
    read, write = world.sides()
    ann, bob, eve, joe = world.people(4)
    ann.does(read.acquire)
    writer = bob.begins(write.acquire, wait=0.4)
    world.waiting(1)
    reader = eve.begins(read.acquire, wait=LONG)
    world.waiting(2)
    assert isinstance(writer.exception(LONG), LockedError)
    before = time.monotonic()
    reader.result(LONG)
    joe.does(read.acquire)
    assert time.monotonic() - before < 3
    assert world.raw.zcard(world.keys("config", "rw-line")[0]) == 0


def test_a_cancelled_writer_lets_readers_in(valkey: Server, prefix: str) -> None:
    """At once, as one whose wait is over; nothing of it is left."""

    async def main() -> None:
        lock = locks.AsyncRWLock(valkey.url, "config", prefix=prefix)
        line = f"{prefix}:l1:{{config}}:rw-line"
        reading = await lock.read.acquire()
        with valkey.client() as client:

            async def waiting(count: int) -> None:
                await soon(lambda: client.zcard(line) == count)

            for cancelled in (lock.write, lock.read):
                writer = asyncio.create_task(lock.write.acquire(wait=None))
                await waiting(1)
                reader = asyncio.create_task(lock.read.acquire(wait=None))
                await waiting(2)
                (writer if cancelled is lock.write else reader).cancel()
                if cancelled is lock.write:
                    held = await asyncio.wait_for(reader, LONG)
                    await held.release()
                else:
                    await waiting(1)
                    await reading.release()
                    await (await asyncio.wait_for(writer, LONG)).release()
            held = await lock.write.acquire(wait=LONG)
            await held.release()
            assert await lock.read.holders() == []
            assert client.exists(line) == 0

    asyncio.run(main())


@pytest.mark.parametrize("flavour", ["sync"])
@pytest.mark.parametrize("new", [True, False])
def test_a_killed_writer_keeps_nobody_out(world: World, new: bool) -> None:
    """While others go on reading: a new reader comes in at once, and with it all who stood behind
    the writer; without one they look for themselves when a second, or their ttl, is over."""
    read, _ = world.sides(ttl=LONG if new else 0.5)
    ann, bob, eve, joe = world.people(4)
    ann.does(read.acquire, ttl=LONG)
    writer = world.remote("RWLock", "config", side="write", wait=None)
    world.waiting(1)
    readers = [bob.begins(read.acquire, wait=LONG), eve.begins(read.acquire, wait=LONG)]
    world.waiting(3)
    line = world.keys("config", "rw-line")[0]
    channel = world.raw.zrange(line, 0, 0)[0].split(" fp")[1]
    writer.dies()
    eventually(lambda: world.raw.pubsub_numsub(channel)[0][1] == 0)
    before = time.monotonic()
    if new:
        joe.does(read.acquire)
    for reader in readers:
        reader.result(LONG)
    assert time.monotonic() - before < 8
    assert world.raw.zcard(line) == 0


def test_a_stopped_writer_costs_its_claim(world: World) -> None:
    """When it does not take what is handed over to it, all readers come in together."""
    read = world.sides()[0]
    people = world.people(5)
    held = people[0].does(read.acquire)
    writer = world.remote("RWLock", "config", side="write", wait=None)
    world.waiting(1)
    writer.stops()
    readers = []
    for number, person in enumerate(people[1:], 2):
        readers.append(person.begins(read.acquire, wait=LONG))
        world.waiting(number)
    before = time.monotonic()
    people[0].does(held.release)
    reading = [reader.result(LONG) for reader in readers]
    assert 0.15 < time.monotonic() - before < 5  # not until a lease of 10 s ends
    writer.goes_on()
    for each in reading:
        people[0].does(each.release)
    assert writer.hears() == "held"
    assert writer.releases() == "released"


@pytest.mark.parametrize("flavour", ["sync"])
def test_a_stopped_reader_costs_its_claim(world: World) -> None:
    """A writer that stands behind several readers gets it, though one of them does not go on."""
    read, write = world.sides()
    ann, bob, eve = world.people(3)
    held = ann.does(write.acquire)
    reader = world.remote("RWLock", "config", side="read", wait=None)
    world.waiting(1)
    reader.stops()
    other = bob.begins(read.acquire, wait=LONG)
    world.waiting(2)
    # All come in together; the writer asks then.
    ann.does(held.release)
    reading = other.result(LONG)
    writer = eve.begins(write.acquire, wait=LONG)
    world.waiting(1)
    before = time.monotonic()
    bob.does(reading.release)
    writer.result(LONG)
    assert time.monotonic() - before < 5
    reader.dies()


def test_the_end_of_a_writers_lease_lets_readers_in(world: World) -> None:
    """A writer that died, or overran, is overtaken by all who wait; it is told of its loss."""
    read, write = world.sides(ttl=0.3)
    ann, bob, eve = world.people(3)
    writing = ann.does(write.acquire)
    readers = [person.begins(read.acquire, wait=LONG, ttl=LONG) for person in (bob, eve)]
    before = time.monotonic()
    for reader in readers:
        reader.result(LONG)
    assert time.monotonic() - before < 3
    fails(LockLostError, ann, writing.release)
    assert len(ann.does(read.holders)) == 2


def test_nobody_waits_for_itself(world: World) -> None:
    """Asking again for what one's own thread or task has is refused without asking Redis, on
    whichever side; others are told nothing of the kind."""
    said: list[str] = []
    read, write = world.sides(wait=LONG, on_command=lambda name, *rest: said.append(name))
    ann, bob = world.people(2)
    for first in (read, write):
        held = ann.does(first.acquire)
        said.clear()
        for second in (read, write):
            refusal = fails(SelfDeadlockError, ann, second.acquire)
            assert "lock config is held by this very thread or task: " in str(refusal)
            assert 5 < refusal.remaining <= 10
        assert said == []
        fails(LockedError, bob, write.acquire, wait=0)
        ann.does(held.release)
    ann.does(ann.does(write.acquire).release)


def test_reading_again_when_asked_for(world: World) -> None:
    """With reentrant=True reading may be nested, writing too; from reading to writing is refused,
    as it would wait for itself."""
    read, write = world.sides(reentrant=True)
    ann, bob = world.people(2)
    for side in (read, write):
        outer = ann.does(side.acquire)
        inner = ann.does(side.acquire)
        assert inner is outer
        ann.does(inner.release)
        assert outer.held
        fails(LockedError, bob, write.acquire)
        if side is read:
            refusal = fails(SelfDeadlockError, ann, write.acquire)
            assert "release it first" in str(refusal)
        else:
            ann.does(ann.does(read.acquire).release)  # who writes may read
            fails(LockedError, bob, read.acquire)
        ann.does(outer.release)
        assert not outer.held
    bob.does(bob.does(write.acquire).release)


def test_both_sides_in_a_with(world: World) -> None:
    """Both are used as locks are: in a block, as decorators, and taken away by force."""
    read, write = world.sides()
    ann, bob = world.people(2)
    assert ann.does(world.within, read, lambda held: held.held)
    assert ann.does(world.within, write, lambda held: held.fence) > 0

    def plain() -> str:
        return "done"

    async def later() -> str:
        return "done"

    assert ann.does(write(plain if world.flavour == "sync" else later)) == "done"
    held = ann.does(read.acquire)
    assert bob.does(write.force_release)
    writing = bob.does(write.acquire)
    fails(LockLostError, ann, held.release)
    writing.check()


def test_a_side_adopts_what_is_its_own(world: World) -> None:
    """What was acquired by reading is no writing, whoever goes on with it."""
    read, write = world.sides()
    ann, bob = world.people(2)
    held = ann.does(read.acquire)
    with pytest.raises((LockLostError, UsageError)):
        bob.does(write.adopt, held.token)
    adopted = bob.does(read.adopt, held.token)
    assert adopted.fence == held.fence
    bob.does(adopted.release)
    writing = bob.does(write.acquire)
    with pytest.raises((LockLostError, UsageError)):
        ann.does(read.adopt, writing.token)


# MultiLock


def pair(world: World, *names: str, **options: Any) -> tuple[Any, list[Any]]:
    """Return several locks as one, and each of them."""
    several = world.make("MultiLock", list(names), **options)
    return several, [world.make("Lock", name) for name in sorted(set(names))]


def test_all_locks_or_none(world: World) -> None:
    """They are taken by one command, in the order of their names and each once; a refusal says
    which is held and by whom, and then nothing was taken."""
    said: list[str] = []
    several, (a, b, c) = pair(
        world, "c", "a", "b", "a", on_command=lambda name, *rest: said.append(name), label="x"
    )
    ann, bob = world.people(2)
    held = ann.does(several.acquire)
    assert said == ["lock_acquire_all"]
    assert list(held.fences) == ["a", "b", "c"]
    assert min(held.fences.values()) > 0
    assert [part.name for part in held.parts] == ["a", "b", "c"]
    assert 8 < held.remaining <= 10
    held.check()
    refusal = fails(LockedError, bob, b.acquire)
    assert (refusal.holder.fence, refusal.holder.label) == (held.fences["b"], "x")
    ann.does(held.release)
    assert said[1:] == ["lock_release"] * 3
    assert not held.held
    fails(LockLostError, ann, held.extend)
    other = bob.does(b.acquire)
    assert other.fence > held.fences["b"]
    said.clear()
    refusal = fails(LockedError, ann, several.acquire)
    assert said == ["lock_acquire_all"]
    assert str(refusal).startswith("lock b is held by process ")
    assert (refusal.name, refusal.holder.fence) == ("b", other.fence)
    for free in (a, c):
        bob.does(bob.does(free.acquire).release)
    bob.does(other.release)
    assert ann.does(world.within, several, lambda held: held.held)
    assert world.there() == {f"{{{name}}}:lock" for name in "abc"}


def test_locks_and_several_exclude_each_other(world: World) -> None:
    """A lock is the same whether it is taken alone or with others, for those who wait too."""
    several, (a, b) = pair(world, "a", "b")
    ann, bob = world.people(2)
    alone = ann.does(b.acquire)
    fails(LockedError, bob, several.acquire)
    waits = bob.begins(several.acquire, wait=LONG)
    world.waiting(1, "b}:line")
    fails(LockedError, ann, a.acquire)  # what it has it keeps meanwhile
    ann.does(alone.release)
    held = waits.result(LONG)
    assert held.fences["b"] > alone.fence
    waits = ann.begins(b.acquire, wait=LONG)
    world.waiting(1, "b}:line")
    bob.does(held.release)
    assert waits.result(LONG).fence > held.fences["b"]


@pytest.mark.parametrize("rounds", [12])
def test_no_deadlock_whatever_the_order_of_names(world: World, rounds: int) -> None:
    """Several people take overlapping locks again and again, named in any order; all are served,
    and no lock is ever held twice."""
    people = world.people(6)
    inside: list[str] = []
    every = "abcd"

    def turn(several: Any, names: str) -> Any:
        if world.flavour == "sync":
            with several:
                enter(names)
                time.sleep(0.0005)
                leave(names)
            return None
        return later(several, names)

    async def later(several: Any, names: str) -> None:
        async with several:
            enter(names)
            await asyncio.sleep(0.0005)
            leave(names)

    def enter(names: str) -> None:
        assert not set(inside) & set(names)
        inside.extend(names)

    def leave(names: str) -> None:
        for name in names:
            inside.remove(name)

    turns = []
    rng = random.Random(7)
    for _ in range(rounds):
        for person in people:
            names = "".join(rng.sample(every, rng.randint(2, 4)))
            several = world.make("MultiLock", list(names), wait=LONG)
            turns.append(person.begins(turn, several, names))
    for each in turns:
        each.result(LONG)
    assert world.there() == {f"{{{name}}}:lock" for name in every}


def test_what_it_has_it_keeps_while_it_waits(world: World) -> None:
    """However long that takes: leases are renewed until it has all, and begin anew then."""
    several, (a, b) = pair(world, "a", "b", ttl=0.5)
    ann, bob, eve = world.people(3)
    alone = ann.does(b.acquire)
    waits = bob.begins(several.acquire, wait=LONG)
    world.waiting(1, "b}:line")
    (first,) = eve.does(a.holders)
    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        (now,) = eve.does(a.holders)
        assert now.fence == first.fence
        time.sleep(0.02)
    ann.does(alone.release)
    held = waits.result(LONG)
    assert held.fences["a"] == first.fence
    eve.does(a.acquire, wait=LONG)  # from then on nobody renews them
    fails(LockLostError, bob, held.release)


def test_a_wait_for_several_that_is_over_leaves_nothing(world: World) -> None:
    """What it had is free at once, and it stands in no line."""
    several, (a, b, c) = pair(world, "a", "b", "c")
    ann, bob = world.people(2)
    alone = ann.does(b.acquire)
    before = time.monotonic()
    refusal = fails(LockedError, bob, several.acquire, wait=0.3)
    assert 0.25 < time.monotonic() - before < 3
    assert (refusal.name, refusal.holder.fence) == ("b", alone.fence)
    for free in (a, c):
        bob.does(bob.does(free.acquire).release)
    ann.does(alone.release)
    assert world.there() == {f"{{{name}}}:lock" for name in "abc"}
    bob.does(bob.does(several.acquire).release)


def test_cancelled_while_it_waits_for_several(valkey: Server, prefix: str) -> None:
    """Nothing is held, and nobody stands in line; an end of the wait from outside does the same."""

    async def main() -> None:
        several = locks.AsyncMultiLock(valkey.url, ["a", "b", "c"], prefix=prefix)
        alone = await locks.AsyncLock(valkey.url, "b", prefix=prefix).acquire()
        with valkey.client() as client:
            line = f"{prefix}:l1:{{b}}:line"
            for number in range(6):
                task = asyncio.create_task(several.acquire(wait=None))
                if number % 2 == 0:
                    await soon(lambda: client.exists(line))
                await asyncio.sleep(0.001 * number)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                for name in "ac":
                    lock = locks.AsyncLock(valkey.url, name, prefix=prefix)
                    await (await lock.acquire(wait=5)).release()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.create_task(several.acquire(wait=None)), 0.1)
            await alone.release()
            await (await several.acquire(wait=5)).release()
            assert not client.exists(line)

    asyncio.run(main())


def test_one_of_several_is_lost(world: World) -> None:
    """`check`, `extend` and `release` say so; the others are given back, and who took the lost one
    is not disturbed."""
    several, (a, b) = pair(world, "a", "b")
    ann, bob = world.people(2)
    for told in (False, True):
        held = ann.does(several.acquire)
        assert bob.does(b.force_release)
        taken = bob.does(b.acquire)
        if told:
            assert fails(LockLostError, ann, held.extend).name == "b"
            assert held.remaining == 0.0
            with pytest.raises(LockLostError, match="lock b is not held"):
                held.check()
        assert fails(LockLostError, ann, held.release).name == "b"
        bob.does(bob.does(a.acquire).release)
        taken.check()
        bob.does(taken.extend)
        bob.does(taken.release)


def test_one_is_lost_while_it_waits_for_another(world: World) -> None:
    """That is told, and then nothing is held."""
    several, (a, b) = pair(world, "a", "b")
    ann, bob = world.people(2)
    alone = ann.does(b.acquire)
    waits = bob.begins(several.acquire, wait=LONG)
    world.waiting(1, "b}:line")
    assert ann.does(a.force_release)
    taken = ann.does(a.acquire)
    ann.does(alone.release)
    assert isinstance(waits.exception(LONG), LockLostError)
    taken.check()
    ann.does(taken.extend)
    ann.does(ann.does(b.acquire, wait=5).release)


def test_leases_of_several(world: World) -> None:
    """They begin anew together, by hand or in the background."""
    several, (a, b) = pair(world, "a", "b", ttl=0.4)
    ann, bob = world.people(2)
    held = ann.does(several.acquire, ttl=LONG)
    assert held.remaining > 20
    ann.does(held.extend, 60)
    assert held.remaining > 50
    assert all(bob.does(lock.holders)[0].remaining > 50 for lock in (a, b))
    ann.does(held.release)
    held = ann.does(pair(world, "a", "b", ttl=1, renew=True)[0].acquire)
    for part in held.parts:
        begins_anew(part)
    for lock in (a, b):
        assert fails(LockedError, bob, lock.acquire).remaining > 0.3
    held.check()
    ann.does(held.release)


def test_transactions_of_several(world: World) -> None:
    """Commands are carried out only while all of them are held."""
    module: Any = redis if world.flavour == "sync" else redis.asyncio
    client = module.Redis.from_url(world.url)
    several, (_, b) = pair(world, "a", "b", client=client)
    ann, bob = world.people(2)
    held = ann.does(several.acquire)
    key = f"{world.prefix}-balance"
    ann.does(world.within, held.transaction(), lambda pipe: pipe.set(key, "1").incr(key) and None)
    assert world.raw.get(key) == "2"
    bob.does(b.force_release)
    with pytest.raises(LockLostError):
        ann.does(world.within, held.transaction(), lambda pipe: pipe.set(key, "3") and None)
    assert world.raw.get(key) == "2"
    fails(LockLostError, ann, held.release)
    ann.does(client.close if world.flavour == "sync" else client.aclose)


def test_several_are_not_asked_for_twice(world: World) -> None:
    """One's own thread or task that has one of them would wait for itself: it is told so, without
    asking Redis."""
    said: list[str] = []
    several, (_, b) = pair(world, "a", "b", on_command=lambda name, *rest: said.append(name))
    ann, bob = world.people(2)
    alone = ann.does(b.acquire)
    assert fails(SelfDeadlockError, ann, several.acquire, wait=None).name == "b"
    assert said == []
    ann.does(alone.release)
    held = ann.does(several.acquire)
    assert fails(SelfDeadlockError, ann, several.acquire).name == "a"
    assert fails(SelfDeadlockError, ann, b.acquire).name == "b"
    fails(LockedError, bob, several.acquire)
    ann.does(held.release)


@pytest.mark.parametrize(
    ("names", "options", "shown"),
    [
        ("abc", {}, "a MultiLock takes a list of one name or more, not 'abc'"),
        ([], {}, "a MultiLock takes a list of one name or more"),
        (["a", ""], {}, "name"),
        (["a", 1], {}, "name"),
        (["a"], {"reentrant": True}, "a MultiLock is not reentrant"),
        (["a"], {"replicas": 1}, "does not wait for replicas"),
        (["a"], {"ttl": 0}, "ttl"),
        (["a"], {"wait": math.nan}, "wait"),
    ],
)
def test_several_of_what(valkey: Server, names: Any, options: Any, shown: str) -> None:
    """What cannot be meant is refused when it is made."""
    for kind in (locks.MultiLock, locks.AsyncMultiLock):
        with pytest.raises(UsageError, match=shown):
            kind(valkey.url, names, **options)


def test_several_on_a_cluster(cluster: Cluster, prefix: str) -> None:
    """They need a tag in common; with it all is as on one server, for a lock with that tag too."""
    client: Any = cluster.client()
    names = ["a", "b", "c"]
    with pytest.raises(UsageError, match="on a cluster a MultiLock needs a tag"):
        locks.MultiLock(client, names, prefix=prefix)
    several = locks.MultiLock(client, names, prefix=prefix, tag="account")
    alone = Lock(client, "b", prefix=prefix, tag="account")
    key = f"{prefix}:{{account}}:x"
    with several as held:
        with held.transaction() as pipe:
            pipe.set(key, "1")
        held.extend(20)
        with ThreadPoolExecutor(1) as other:
            with pytest.raises(LockedError):
                other.submit(alone.acquire).result(LONG)
            waits = other.submit(alone.acquire, wait=LONG)
            line = f"{prefix}:l1:{{account}}:b:line"
            eventually(lambda: client.exists(line))
            held.release()
            fence = waits.result(LONG).fence
            assert fence > held.fences["b"]
            other.submit(alone.force_release).result(LONG)
    assert client.get(key) == b"1"

    async def main() -> None:
        first = cluster.nodes[0]
        made: Any = redis.asyncio.RedisCluster
        async with made(host=first.host, port=first.port) as client:
            with pytest.raises(UsageError, match="on a cluster a MultiLock needs a tag"):
                locks.AsyncMultiLock(client, names, prefix=prefix)
            several = locks.AsyncMultiLock(client, names, prefix=prefix, tag="account", wait=LONG)

            async def turn() -> dict[str, int]:
                async with several as held:
                    held.check()
                    async with held.transaction() as pipe:
                        pipe.incr(key)
                    return held.fences

            turns = await asyncio.gather(*(turn() for _ in range(5)))
            assert len({fences["c"] for fences in turns}) == 5
            for kind in (locks.AsyncSemaphore(client, "s", 2, prefix=prefix),
                         locks.AsyncRWLock(client, "s", prefix=prefix).write):  # fmt: skip

                async def hold(kind: Any = kind) -> None:
                    async with await kind.acquire(wait=LONG) as held:
                        await asyncio.sleep(0.001)
                        held.check()

                await asyncio.gather(*(hold() for _ in range(6)))
                assert await kind.holders() == []

    asyncio.run(main())
    assert client.get(key) == b"6"
    client.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: forks beside threads
@pytest.mark.parametrize("kind", ["Semaphore", "RWLock", "MultiLock"])
def test_a_forked_child_holds_nothing(valkey: Server, prefix: str, kind: str) -> None:
    """What it inherits says it is not held; it can neither give it back nor extend it."""
    makes: dict[str, Callable[[], Any]] = {
        "Semaphore": lambda: locks.Semaphore(valkey.url, "x", 1, prefix=prefix),
        "RWLock": lambda: locks.RWLock(valkey.url, "x", prefix=prefix).write,
        "MultiLock": lambda: locks.MultiLock(valkey.url, ["x", "y"], prefix=prefix),
    }
    lock = makes[kind]()
    with lock as held:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert not held.held
                with contextlib.suppress(LockLostError):
                    held.check()
                    os._exit(2)
                with contextlib.suppress(LockLostError):
                    held.extend(60)
                    os._exit(3)
                held.release()
                lock.__exit__(None, None, None)
                try:
                    lock.acquire(wait=0.01)
                except LockedError as refusal:
                    code = 4 if isinstance(refusal, SelfDeadlockError) else 0
            finally:
                os._exit(code)
        ended = eventually(lambda: [each for each in [os.waitpid(child, os.WNOHANG)] if each[0]])
        assert os.waitstatus_to_exitcode(ended[0][1]) == 0
        held.check()
        held.extend()
    with lock:
        pass


# Replies that are lost


def faulty(world: World, proxy: FaultProxy, deadline: float = 5) -> dict[str, Any]:
    """Return locks of each kind, behind a proxy; all scripts are known to the server."""
    options: Any = {"client": proxy.url, "deadline": deadline}
    made = {
        "Semaphore": world.make("Semaphore", "x", 1, **options),
        "RWLock": world.make("RWLock", "x", **options).write,
        "MultiLock": world.make("MultiLock", ["x", "y", "z"], **options),
    }
    (ann,) = world.people(1)
    for lock in made.values():
        ann.does(tried(ann, lock).release)
    return made


def tried(person: Person, lock: Any) -> Any:
    """Acquire a lock, though the machine may hold everything up for longer than its deadline."""
    for _ in range(20):
        with contextlib.suppress(UnavailableError):
            return person.does(lock.acquire, wait=5)
    return person.does(lock.acquire)


FAULTS = ["drop_reply", "drop_request", "cut_after_request"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["Semaphore", "RWLock", "MultiLock"])
def test_a_lost_reply_is_no_loss(world: World, proxy: FaultProxy, kind: str, fault: str) -> None:
    """Of each command in turn, whether it was applied or not: nobody is told that it is locked or
    lost, and in the end it is free at once."""
    lock = faulty(world, proxy)[kind]
    ann, bob = world.people(2)
    getattr(proxy, fault)(of="EVALSHA")
    held = ann.does(lock.acquire)
    assert proxy.armed == 0
    held.check()
    fails(LockedError, bob, lock.acquire)
    getattr(proxy, fault)(of="EVALSHA")
    ann.does(held.extend, 20)
    assert proxy.armed == 0
    for number in range(len(getattr(held, "parts", "1"))):
        getattr(proxy, fault)(number + 1, of="EVALSHA")
        ann.does(held.release)
        proxy.heal()
        assert not held.lost if kind != "MultiLock" else not any(p.lost for p in held.parts)
        held = bob.does(lock.acquire)
    bob.does(held.release)


@pytest.mark.parametrize("kind", ["Semaphore", "RWLock", "MultiLock"])
def test_a_lost_reply_while_it_waits(world: World, proxy: FaultProxy, kind: str) -> None:
    """Whichever command's it is, whoever waits gets it in the end, and stands in no line then."""
    lock = faulty(world, proxy)[kind]
    ann, bob = world.people(2)
    lines = world.keys("x", "line", "permits-line", "rw-line")
    for number in (1, 2, 3):
        held = ann.does(lock.acquire)
        proxy.drop_reply(number, of="EVALSHA")
        waits = bob.begins(lock.acquire, wait=LONG)
        eventually(lambda: any(map(world.raw.zcard, lines)))
        ann.does(held.release)
        bob.does(waits.result(LONG).release)
        proxy.heal()
    assert not [key for key in world.there() if key.endswith("line")]
    bob.does(bob.does(lock.acquire).release)


@pytest.mark.parametrize("kind", ["Semaphore", "RWLock", "MultiLock"])
def test_redis_does_not_answer(world: World, proxy: FaultProxy, kind: str) -> None:
    """Who asked is told so in time; what was applied meanwhile is taken back soon."""
    lock, hasty = faulty(world, proxy)[kind], faulty(world, proxy, deadline=0.2)[kind]
    ann, bob = world.people(2)
    proxy.stall_replies()
    before = time.monotonic()
    fails(UnavailableError, ann, hasty.acquire)
    assert time.monotonic() - before < 4
    proxy.heal()
    bob.does(bob.does(lock.acquire, wait=8).release)
    held = tried(ann, hasty)
    proxy.stall()
    ann.does(held.release)  # it goes on in the background
    proxy.heal()
    bob.does(bob.does(lock.acquire, wait=8).release)


@pytest.mark.parametrize("kind", ["Semaphore", "RWLock", "MultiLock"])
def test_cancelled_anywhere(valkey: Server, prefix: str, kind: str) -> None:
    """Many tasks are cancelled while they ask, wait, hold or release: nothing is held or in line
    shortly after."""
    url, rng = valkey.url, random.Random(3)

    async def main() -> None:
        made: list[Any] = [locks.AsyncSemaphore(url, "x", 1, prefix=prefix)]
        if kind == "RWLock":
            lock = locks.AsyncRWLock(url, "x", prefix=prefix)
            made = [lock.read, lock.write]
        elif kind == "MultiLock":
            made = [
                locks.AsyncMultiLock(url, [*names], prefix=prefix) for names in ("xyz", "yz", "zx")
            ]

        async def turn(lock: Any) -> None:
            async with await lock.acquire(wait=None):
                await asyncio.sleep(rng.random() * 0.002)

        tasks = set()
        for _ in range(120):
            tasks.add(asyncio.create_task(turn(rng.choice(made))))
            await asyncio.sleep(rng.random() * 0.001)
            if len(tasks) > 6:
                task = rng.choice(sorted(tasks, key=id))
                tasks.discard(task)
                task.cancel()
        await asyncio.wait(tasks, timeout=LONG)
        assert not [task for task in tasks if not task.done()]
        for lock in made:
            held = await lock.acquire(wait=5)
            await held.release()
        with valkey.client(decode_responses=True) as client:
            about = f"{prefix}:l1:{{x}}:{'rw' if kind == 'RWLock' else 'permits'}-about"
            await soon(lambda: client.hkeys(about) == ["fence"] * (kind != "MultiLock"))
            await soon(lambda: not list(client.scan_iter(f"{prefix}:*line", 1000)))

    asyncio.run(main())


def test_clients_that_cannot_be_told(prefix: str) -> None:
    """With fakeredis those who wait look for themselves."""
    client: Any = fakeredis.FakeRedis()
    sides = locks.RWLock(client, "config", prefix=prefix, wait=LONG)
    with ThreadPoolExecutor(1) as other:
        for lock in (
            locks.Semaphore(client, "workers", 1, prefix=prefix, wait=LONG),
            sides.read,
            sides.write,
            locks.MultiLock(client, ["a", "b"], prefix=prefix, wait=LONG),
        ):
            with sides.write if lock is sides.read else lock:
                waits: Future[Any] = other.submit(lock.acquire)
                time.sleep(0.02)
                assert not waits.done()
            other.submit(waits.result(LONG).release).result(LONG)


def test_a_copy_that_comes_after_the_release(world: World, proxy: FaultProxy) -> None:
    """A permit is not taken for nobody when the first of two commands to take it comes last."""
    workers = faulty(world, proxy)["Semaphore"]
    ann, bob = world.people(2)
    proxy.drop_request(of="EVALSHA")
    held = ann.does(workers.acquire)
    ann.does(held.release)
    late = str(2**52)
    copy = workers.kind.acquire(held.token, str(10 * SECOND), late, "late")
    sha, keys = copy.script.sha.decode(), copy.keys
    world.raw.evalsha(sha, len(keys), *(key.decode() for key in keys), *copy.args)
    bob.does(bob.does(workers.acquire, wait=5).release)
