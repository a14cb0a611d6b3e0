"""Processes that use a router, or move its keys, and that stop or die at a chosen step.

ledger = Ledger()                   # of one client: what it was told, and what must be there then
process = workers.start(use, urls, "async", 7, pipe)
workers.start(say, urls, "sync", "take", b"INCR", "key", pipe)      # stops itself before a take
workers.start(move, urls, path, {"at": 12}, pipe)                    # dies after 12 exchanges
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from redishacks import _drive
from redishacks._command import Ask, Command
from redishacks._transport import _async_link, _link
from redishacks._transport._decide import Opening, Talk
from redishacks.errors import MaybeAppliedError, UnavailableError
from redishacks.router import AsyncRouter, Router, _move
from redishacks.router.commands import Layout
from redishacks.router.reshard import Plan
from redishacks.router.transaction import WatchError

Urls = Mapping[str, Any]

#: Seconds for a call: nothing is late, only cut off or refused.
DEADLINE = 60.0
#: Seconds to live of keys that are to be there at the end, with what is left of that.
LASTING = 300
#: How many keys of each type all clients share, and how many of their own each one has.
SHARED, OWN = 12, 8

_PAIR = "redis.call('INCR', KEYS[1]) return redis.call('INCR', KEYS[2])"


class Ledger:
    """What one client was told of its writes."""

    def __init__(self) -> None:
        #: By key: how often it was counted, and how often perhaps.
        self.counts: dict[str, list[int]] = {}
        #: By key: what was put there, what perhaps, and what was not.
        self.tokens: dict[str, tuple[list[str], list[str], list[str]]] = {}
        #: By key: what was taken out of it, and how often that was perhaps done and not heard.
        self.popped: dict[str, list[str]] = {}
        self.unheard: dict[str, int] = {}
        #: What keys of its own may hold; None for nothing.
        self.own: dict[str, set[str | None]] = {}
        #: Between which times a key of its own ends.
        self.ends: dict[str, tuple[float, float]] = {}
        #: What should not have been.
        self.wrong: list[str] = []
        self.done = self.perhaps = self.never = 0

    def heard(self, how: bool | None) -> None:
        """Take note of how a call ended: done, not done, or perhaps."""
        self.done += how is True
        self.never += how is False
        self.perhaps += how is None

    def count(self, key: str, how: bool | None) -> None:
        """Take note of a count."""
        counts = self.counts.setdefault(key, [0, 0])
        counts[0] += how is True
        counts[1] += how is None

    def token(self, key: str, token: str, how: bool | None) -> None:
        """Take note of something that was put somewhere once."""
        which = {True: 0, None: 1, False: 2}[how]
        self.tokens.setdefault(key, ([], [], []))[which].append(token)


class Blocking:
    """A `Router` that looks as if it were for asyncio."""

    def __init__(self, urls: Urls, **options: Any) -> None:
        self.router = Router(urls, **options)

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **more: Any) -> Any:
            return getattr(self.router, name)(*args, **more)

        return call

    async def batch(self, record: Callable[[Any], Any]) -> Any:
        """Say what a function records."""
        with self.router.map(on_error="return") as m:
            return record(m)

    async def add_one(self, key: str) -> None:
        """Count by WATCH."""
        made: Any = self.router.transaction(key)
        with made as t:
            value = int(t.get(key) or 0)
            t.multi()
            t.set(key, value + 1)


class Tasks:
    """An `AsyncRouter` with the same methods."""

    def __init__(self, urls: Urls, **options: Any) -> None:
        self.router = AsyncRouter(urls, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)

    async def batch(self, record: Callable[[Any], Any]) -> Any:
        """Say what a function records."""
        async with self.router.map(on_error="return") as m:
            return record(m)

    async def add_one(self, key: str) -> None:
        """Count by WATCH."""
        made: Any = self.router.transaction(key)
        async with made as t:
            value = int(await t.get(key) or 0)
            t.multi()
            t.set(key, value + 1)


FACES: Mapping[str, Callable[..., Any]] = {"sync": Blocking, "async": Tasks}


async def _try(ledger: Ledger, said: Awaitable[Any]) -> tuple[bool | None, Any]:
    """Return whether a call was done, None for perhaps, and what it said."""
    how: bool | None = True
    value = None
    try:
        value = await said
    except MaybeAppliedError:
        how = None
    except UnavailableError:
        how = False
    ledger.heard(how)
    return how, value


class Client:
    """One thread of work, with keys of its own besides those that all share."""

    def __init__(self, face: Any, me: str, seed: int) -> None:
        self.ledger = Ledger()
        self._face, self._me = face, me
        self._rng = random.Random(f"{seed} {me}")
        self._serial = 0
        #: An own key is not used again when nobody knows what it holds.
        self._generation = 0

    async def work(self, stop: Callable[[], bool]) -> None:
        """Say one thing after the other until told to stop."""
        kinds = [
            self._count, self._push, self._own, self._own, self._pair, self._batch,
            self._fleeting, self._lasting, self._pop, self._watch,
        ]  # fmt: skip
        while not stop():
            await self._rng.choice(kinds)()

    async def _count(self) -> None:
        face, at = self._face, self._rng.randrange(SHARED)
        if self._rng.random() < 0.5:
            key, said = f"n{at}", face.incr(f"n{at}")
        else:
            key, said = f"h{at}", face.hincrby(f"h{at}", "f", 1)
        how, _ = await _try(self.ledger, said)
        self.ledger.count(key, how)

    async def _push(self) -> None:
        face, at = self._face, self._rng.randrange(SHARED)
        token = self._token()
        kind = self._rng.choice("lszx")
        key = f"{kind}{at}"
        if kind == "l":
            said = face.lpush(key, token)
        elif kind == "s":
            said = face.sadd(key, token)
        elif kind == "z":
            said = face.zadd(key, {token: self._serial})
        else:
            said = face.xadd(key, {"t": token})
        how, _ = await _try(self.ledger, said)
        self.ledger.token(key, token, how)

    async def _pair(self) -> None:
        tag = f"{{p{self._rng.randrange(SHARED)}}}"
        said = self._face.eval(_PAIR, 2, f"{tag}:a", f"{tag}:b")
        how, _ = await _try(self.ledger, said)
        for each in "ab":
            self.ledger.count(f"{tag}:{each}", how)

    async def _pop(self) -> None:
        """Put something in a queue, and wait for something from it, perhaps in vain."""
        face, key = self._face, f"q{self._rng.randrange(SHARED)}"
        if self._rng.random() < 0.6:
            token = self._token()
            how, _ = await _try(self.ledger, face.rpush(key, token))
            self.ledger.token(key, token, how)
            return
        how, found = await _try(self.ledger, face.blpop([key], timeout=0.01))
        if how is None:
            self.ledger.unheard[key] = self.ledger.unheard.get(key, 0) + 1
        elif found is not None:
            self.ledger.popped.setdefault(key, []).append(found[1].decode())

    async def _watch(self) -> None:
        """Count by reading and writing, which is done only if nobody else did meanwhile."""
        key = f"w{self._rng.randrange(SHARED)}"
        try:
            how, _ = await _try(self.ledger, self._face.add_one(key))
        except WatchError:
            return
        self.ledger.count(key, how)

    async def _own(self) -> None:
        key = self._key("o")
        possible = self.ledger.own.setdefault(key, {None})
        kind = self._rng.randrange(3)
        if kind == 0:
            how, value = await _try(self.ledger, self._face.get(key))
            if how and (value.decode() if value is not None else None) not in possible:
                self.ledger.wrong.append(f"{key}: {value!r} is there, not {possible}")
            return
        token = self._token() if kind == 1 else None
        said = self._face.set(key, token) if token else self._face.delete(key)
        how, value = await _try(self.ledger, said)
        if token is None and how and bool(value) == (possible == {None}):
            self.ledger.wrong.append(f"{key}: DEL said {value}, and there was {possible}")
        self._wrote(key, token, how)

    async def _batch(self) -> None:
        counted = [f"n{self._rng.randrange(SHARED)}" for _ in range(6)]
        own = {self._key("o"): self._token() for _ in range(4)}
        read = [key for key in self.ledger.own if key not in own][-3:]

        def record(m: Any) -> tuple[list[Any], list[Any], list[Any]]:
            return (
                [m.incr(key) for key in counted],
                [m.set(key, token) for key, token in own.items()],
                [m.get(key) for key in read],
            )

        incrs, sets, gets = await self._face.batch(record)
        for key, reply in zip(counted, incrs, strict=True):
            self.ledger.count(key, self._ended(reply))
        for (key, token), reply in zip(own.items(), sets, strict=True):
            self._wrote(key, token, self._ended(reply))
        for key, reply in zip(read, gets, strict=True):
            if self._ended(reply):
                value = reply.value.decode() if reply.value is not None else None
                if value not in self.ledger.own[key]:
                    self.ledger.wrong.append(f"{key}: {value!r}, not {self.ledger.own[key]}")

    async def _fleeting(self) -> None:
        """Have a key end, and make another one of its name: the old one must not come back."""
        key = self._key("f")
        how, _ = await _try(self.ledger, self._face.set(key, "old", px=self._rng.randint(1, 15)))
        self._wrote(key, "old", how, also=None)
        value: Any = b"old"
        while how and value == b"old":
            how, value = await _try(self.ledger, self._face.get(key))
        if not how:
            self._generation += 1
            return
        token = self._token()
        how, made = await _try(self.ledger, self._face.set(key, token, nx=True))
        if how and not made:
            self.ledger.wrong.append(f"{key}: it had ended, and is there")
        self._wrote(key, token, how, also=None if how is None else token)
        if how:
            how, value = await _try(self.ledger, self._face.get(key))
            if how and value != token.encode():
                self.ledger.wrong.append(f"{key}: {value!r} is there, not {token}")
            how, _ = await _try(self.ledger, self._face.delete(key))
            self._wrote(key, None, how)

    async def _lasting(self) -> None:
        key = self._key("e")
        token, began = self._token(), time.time()
        how, _ = await _try(self.ledger, self._face.set(key, token, ex=LASTING))
        if how:
            self.ledger.ends[key] = (began + LASTING, time.time() + LASTING)
        elif how is None:
            self.ledger.ends.pop(key, None)
        self._wrote(key, token, how)

    def _ended(self, reply: Any) -> bool | None:
        how: bool | None = True
        if isinstance(reply.error, MaybeAppliedError):
            how = None
        elif isinstance(reply.error, UnavailableError):
            how = False
        elif reply.error is not None:
            raise reply.error
        self.ledger.heard(how)
        return how

    def _wrote(self, key: str, value: str | None, how: bool | None, **more: str | None) -> None:
        """Take note of what an own key holds by now."""
        before = self.ledger.own.get(key, {None})
        if how is True:
            self.ledger.own[key] = {value, *more.values()}
        elif how is None:
            self.ledger.own[key] = {*before, value, *more.values()}
            self._generation += 1

    def _key(self, kind: str) -> str:
        return f"{kind}{self._me}-{self._generation}-{self._rng.randrange(OWN)}"

    def _token(self) -> str:
        self._serial += 1
        return f"{self._me}-{self._serial}"


def use(urls: Urls, flavour: str, seed: int, tasks: int, pipe: Any) -> None:
    """Use a router until told to stop; send the ledgers."""

    async def main() -> None:
        face = FACES[flavour](urls, deadline=DEADLINE)
        clients = [Client(face, f"{flavour[0]}{seed}{task}", seed) for task in range(tasks)]
        pipe.send("ready")
        try:
            await asyncio.gather(*(client.work(pipe.poll) for client in clients))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            raise
        pipe.send([client.ledger for client in clients])

    asyncio.run(main())


# One call of a client that stops itself


def _stop_once(owner: Any, name: str, *, after: bool, fits: Callable[..., bool]) -> None:
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapped(*args: Any, **more: Any) -> Any:
        if not fits(*args, **more):
            return real(*args, **more)
        if not after:
            stop()
        result = real(*args, **more)
        if after:
            stop()
        return result

    def stop() -> None:
        setattr(owner, name, real)
        os.kill(os.getpid(), signal.SIGSTOP)

    setattr(owner, name, wrapped)


def _is_asked(pieces: tuple[bytes, ...]) -> Callable[..., bool]:
    def fits(link: Any, data: bytes, *rest: Any) -> bool:
        return any(piece in data for piece in pieces)

    return fits


#: Where a client can stop: what is wrapped, whether after it, and which calls are meant. Those of
#: a call in peace, and those of one that pulls its key.
CALLING = ("greet", "greeted", "planned", "addressed", "write", "written")
PULLING = ("give", "take", "forget", "pulled")
#: Those that a call comes past when its connection is to be asked whether there is a newer view.
LONG_WAY = ("planned", "addressed")


def stop_at(step: str, flavour: str, mark: bytes) -> None:
    """Have this process stop itself once, at a step of the next call that has a mark in it."""

    def always(*args: Any, **more: Any) -> bool:
        return True

    def fenced(opening: Any, *args: Any) -> bool:
        return opening._greeting is not None

    def settings_fenced(opening: Any, settings: Any, *args: Any) -> bool:
        return settings.greeting is not None

    def has_mark(talk: Any, *args: Any) -> bool:
        return any(mark in command.keys for command in talk._commands)

    def ours(layout: Any, *args: Any, **more: Any) -> bool:
        return True

    written = _is_asked((b"\r\n" + mark + b"\r\n",))
    if step in PULLING[:3]:
        _stop_once(Layout, step, after=False, fits=ours)
    elif step == "pulled":
        _stop_once(Talk, "pulled", after=True, fits=always)
    elif step == "greet":
        _stop_once(Opening, "__init__", after=False, fits=settings_fenced)
    elif step == "greeted":
        _stop_once(Opening, "judge", after=True, fits=fenced)
    elif step == "planned":
        _stop_once(Talk, "plan", after=True, fits=has_mark)
    elif step == "addressed":
        _stop_once(Talk, "addressed", after=True, fits=has_mark)
    else:
        after = step == "written"
        if flavour == "sync":
            _stop_once(_link.Link, "send", after=after, fits=written)
            _stop_once(_link.Link, "ask", after=after, fits=written)
        else:
            _stop_once(_async_link.Link, "_enter", after=after, fits=written)


def say(urls: Urls, flavour: str, step: str, key: str, pipe: Any) -> None:
    """Count once, and stop at a step of that; tell how it ended."""

    async def main() -> None:
        face = FACES[flavour](urls, deadline=DEADLINE)
        if step.startswith("greet"):
            await face.connect()
        else:
            if step in LONG_WAY:
                decide: Any = sys.modules[Talk.__module__]
                decide.COURTESY = -1.0
            await face.get(key)
        pipe.send("ready")
        pipe.recv()
        stop_at(step, flavour, key.encode())
        how, value = await _try(Ledger(), face.incr(key))
        pipe.send((how, value))

    asyncio.run(main())


# A mover that dies


def move(urls: Urls, path: str | None, options: Mapping[str, Any], pipe: Any) -> None:
    """Move keys by a plan in a file, or go on; tell how many exchanges it took.

    Options: `at` and `action`, to die (`kill`) or to `stop` after so many; `ttl` of the mover;
    others are those of `reshard`.
    """
    more = dict(options)
    at, action = more.pop("at", None), more.pop("action", "kill")
    _move._TTL = more.pop("ttl", _move._TTL)
    counted = 0
    real = _drive.perform

    def perform(effect: Any, transport: Any, deadline: float) -> Any:
        nonlocal counted
        result = real(effect, transport, deadline)
        if isinstance(effect, Ask | Command):
            counted += 1
            if counted == at:
                os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        return result

    router = Router(urls, deadline=DEADLINE)
    plan = Plan.load(path) if path is not None else None
    router.connect()
    _drive.perform = perform
    try:
        router.reshard(plan, **more)
        pipe.send((counted, None))
    except Exception as error:
        pipe.send((counted, f"{type(error).__name__}: {error}"))
