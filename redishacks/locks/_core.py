"""What locks of all kinds and both colours share: how one is acquired, waited for and released."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypedDict, TypeVar, cast

from redishacks._clock import clock
from redishacks._command import Call, Command, Sleep, Steps, ask, ask_all
from redishacks._slots import key_slot
from redishacks._transport import AsyncTransport, Hook, SyncTransport
from redishacks._units import Seconds, patience, seconds
from redishacks._wake import DEAF
from redishacks.errors import (
    MaybeAppliedError,
    RedisHacksError,
    ServerError,
    UnavailableError,
    UsageError,
)
from redishacks.locks._context import UNSET, Entered
from redishacks.locks._here import here
from redishacks.locks._hold import Hold, extend_all_steps
from redishacks.locks._keeper import Renewal
from redishacks.locks._station import AnyStation
from redishacks.locks.commands import MINE, Kind, Names, answer, holders, micros
from redishacks.locks.holder import (
    Holder,
    LockedError,
    SelfDeadlockError,
    parse_info,
)

#: Leases in seconds.
_SHORTEST, _LONGEST = 0.001, 366 * 86_400.0
#: Renewal needs time for a round trip or two.
_SHORTEST_RENEWED = 0.1
#: Seconds after which a lease is renewed no more, unless told otherwise.
_MAX_HOLD = 3600.0
#: Seconds after the deadline in which a command may still be carried out: connecting has its own.
_GRACE = 2.5
#: Seconds by which waiters look one after the other, so that the first gets there first.
_APART = 0.004
#: A waiter that nobody can tell, or whose connection is being made, looks every so many seconds.
_LOOK = 0.05
#: Seconds after which a waiter looks in any case, or its ttl if that is longer.
_LOOK_AGAIN = 1.0
#: Pauses of a waiter while Redis is away, at first and at most.
_PAUSES = (0.02, 1.0)

#: What a transport raises when a server is not there, or did not answer in time.
AWAY = (UnavailableError, MaybeAppliedError)

#: "waited", "held" or "lost" and how many seconds; "contended" when somebody else has it.
OnEvent = Callable[[str, str, float], object]

E = TypeVar("E")
H = TypeVar("H", bound="Hold")
T = TypeVar("T", bound=SyncTransport | AsyncTransport)

_log = logging.getLogger("redishacks")


class Options(TypedDict, total=False):
    """What locks of all kinds may be told, as `Lock` says."""

    wait: Seconds | None
    ttl: Seconds
    renew: bool
    max_hold: Seconds | None
    reentrant: bool
    replicas: int
    on_lost: Callable[[Any], object] | None
    on_event: OnEvent | None
    label: str
    deadline: Seconds
    on_command: Hook | None


class Core(ABC, Generic[T]):
    """A lock of any kind."""

    #: A thread or task that has it would wait for itself if it asked again.
    _alone = True

    def __init__(
        self,
        client: Any,
        names: Names,
        kind: Kind,
        *,
        wait: Seconds | None = 0.0,
        ttl: Seconds = 10.0,
        renew: bool = False,
        max_hold: Seconds | None = None,
        reentrant: bool = False,
        replicas: int = 0,
        on_lost: Callable[[Any], object] | None = None,
        on_event: OnEvent | None = None,
        label: str = "",
        deadline: Seconds = 1.0,
        on_command: Hook | None = None,
    ) -> None:
        self.name = names.name
        for flag, what in ((renew, "renew"), (reentrant, "reentrant")):
            if not isinstance(flag, bool):
                raise UsageError(f"{what} is True or False, not {flag!r}")
        self.kind = kind
        self._names = names
        self.renew = renew
        self.ttl = self.lease(ttl)
        self.wait = patience(wait, "wait")
        if max_hold is not None and not renew:
            raise UsageError("max_hold bounds the renewal of a lease: give renew=True, too")
        most = _MAX_HOLD if max_hold is None else seconds(max_hold, "max_hold")
        self._most = most if renew else math.inf
        if isinstance(replicas, bool) or not isinstance(replicas, int) or not 0 <= replicas < 1000:
            raise UsageError(f"replicas is how many must have the lock, 0 to 999, not {replicas!r}")
        self._replicas = replicas
        self._reentrant = reentrant
        self._on_lost = _plain(on_lost, "on_lost")
        self._on_event = _plain(on_event, "on_event")
        self._label = _label(label)
        self.deadline = seconds(deadline, "deadline")
        #: What the server's clock shows when a command may last be carried out, less our own now.
        self._ahead = 0.0
        #: Seconds after which nothing that was asked for is carried out any more.
        self.late = self.deadline + _GRACE
        self.learn(int(time.time() * 1e6), clock())
        self._client = client
        self.transport = self._connect(client, _plain(on_command, "on_command"))
        bare = self.transport.bare
        self._bare: T = bare
        self.renewal = Renewal(kind.extend, key_slot(kind.key) if bare.clustered else 0, kind.key)
        self._where: Command[Any] = Command((), (kind.key,))
        self._here = f"{bare.server} {kind.key!r}"
        self.entered = Entered()

    @abstractmethod
    def _connect(self, client: Any, on_command: Hook | None) -> Any:
        """Return the transport of this colour."""

    @abstractmethod
    def _station(self) -> AnyStation:
        """Return what locks of this server share, in this process and loop."""

    @abstractmethod
    def _owner(self) -> Any:
        """Return the running thread or task."""

    @abstractmethod
    def _thread(self, owner: Any) -> str:
        """Name a thread or task."""

    @abstractmethod
    def _post(self, hold: Hold, command: Command[int]) -> None:
        """Send a release behind what was sent before, if that can be done without waiting."""

    @abstractmethod
    def redis(self) -> tuple[Any, bool]:
        """Return a redis-py client for the server of the lock, and whether it is to be closed."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # For handles

    def forget(self, hold: Hold) -> None:
        """Take note of a release."""
        here.remove((self._here, hold.owner), hold)

    def tell_held(self, hold: Hold) -> None:
        """Tell whoever wants to know for how long a lock was held."""
        if self._on_event is not None:
            self._tell("held", clock() - hold.began)

    def lost(self, hold: Hold) -> None:
        """Tell whoever wants to know that a lock was lost."""
        here.remove((self._here, hold.owner), hold)
        self._tell("lost", clock() - hold.began)
        if self._on_lost is not None:
            try:
                self._on_lost(hold)
            except Exception:
                _log.exception("the on_lost callback of a lock failed")

    def _waited(self, hold: Hold, seconds: float) -> None:
        try:
            self._tell("waited", seconds)
        except BaseException:  # nobody has a handle yet
            if hold.end():
                self.give_up(hold)
            raise

    def _tell(self, event: str, seconds: float) -> None:
        if self._on_event is not None:
            try:
                self._on_event(event, self.name, seconds)
            except Exception:
                _log.exception("the on_event hook of a lock failed")

    # Acquiring

    def attempt(self, kind: type[H], wait: Any, ttl: Seconds | None) -> tuple[H, float]:
        """Return an acquisition to begin with, and until when to wait.

        It is held already, with a fence, when this thread or task has the lock. Who may wait and
        can be told at once stands in line from the beginning: one command less. All others ask
        without a line first, which is mostly all.
        """
        longest = self.patience(wait)
        hold = self.fresh(kind, ttl)
        if longest and not hold.fence:
            wakeups = hold.station.wakeups
            hold.bell = wakeups.enter(hold.token)
            hold.ear = wakeups.ear(self._where, self._names.channels(wakeups.name)) or ""
        return hold, clock() + longest if longest else 0.0

    def fresh(self, kind: type[H], ttl: Seconds | None) -> H:
        """Return an acquisition to begin with, or the one that this thread or task has.

        Raises `SelfDeadlockError`.
        """
        length = self.ttl if ttl is None else self.lease(ttl)
        owner = self._owner()
        mine = here.find((self._here, owner)) if self._alone else None
        if mine is not None:
            return self._nested(cast("H", mine))
        return kind(self, self._station(), owner, length)

    def question(self, hold: Hold) -> Command[list[Any]]:
        """Return how to ask for it without a line, and note when that was."""
        return self.asking(hold, hold.begin_asking())

    def took(self, hold: Hold, first: Any) -> bool:
        """Return whether the lock was got at the first try."""
        now = clock()
        if type(first) is not int or self._replicas or hold.inherited or hold.stale(now):
            return False
        self.begin(hold, first)
        self.learn(first, now)
        if hold.bell is not None:
            hold.station.wakeups.leave(hold.token)
            self._waited(hold, clock() - hold.began)
        return True

    def acquire_steps(self, hold: H, end: float, first: Any = None) -> Steps[H]:
        """Get the lock, now or within the wait; `first` is what came of the first try.

        Raises `LockedError`.
        """
        began = hold.asked or clock()
        while True:
            try:
                yield from self._take(hold, end, first)
                break
            except _Forked:
                # The acquisition is the parent's: this process has one of its own.
                hold = type(hold)(self, self._station(), hold.owner, hold.ttl)
                first = None
        self.settle(hold)
        if self._on_event is not None and end > began:
            self._waited(hold, clock() - began)
        return hold

    def lease(self, ttl: Seconds) -> float:
        """Return the seconds of a lease."""
        length = _lease(ttl)
        if self.renew and length < _SHORTEST_RENEWED:
            raise UsageError(f"renew=True needs a ttl of 0.1 s or more, not {ttl!r}")
        return length

    def patience(self, wait: Any) -> float:
        """Return how many seconds to wait."""
        return self.wait if wait is UNSET else patience(wait, "wait")

    def begin(self, hold: Hold, fence: int) -> None:
        """Take note that it is held since it was asked for."""
        hold.begin(fence, self._most)
        self.settle(hold)

    def learn(self, theirs: int, now: float) -> None:
        """Take note of the server's time, in µs, at that moment."""
        self._ahead = theirs / 1e6 - now + self.late

    def adopt_steps(self, kind: type[H], token: str) -> Steps[H]:
        """Hold what another process has acquired; raises `LockLostError`."""
        if not isinstance(token, str) or not (token.isalnum() and token.startswith(self.kind.mark)):
            raise UsageError(f"a token is what `held.token` of such a lock is, not {token!r}")
        owner = self._owner()
        hold = kind(self, self._station(), owner, self.ttl)
        hold.token = token
        state = -1
        while state == -1:  # too late
            command = self.asking(hold, hold.begin_asking(), MINE)
            state, now, *more = answer((yield from ask(command._replace(repeatable=True))))
            self.learn(now, clock())
        if state != 1:
            raise hold.loss()
        self.begin(hold, more[0])
        return hold

    def settle(self, hold: Hold) -> None:
        """Take note that this thread or task holds it from now on."""
        here.add((self._here, hold.owner), hold)
        self.watch(hold)

    def _nested(self, mine: H) -> H:
        # Who shares a lock cannot have it alone without giving it back first.
        more = mine.mark == "r" and self.kind.mark == "w"
        if more or not self._reentrant:
            way = "release it first" if more else "reentrant=True allows that"
            raise SelfDeadlockError(
                f"lock {self.name} is held by this very thread or task: {way}",
                self.name, None, mine.remaining,
            )  # fmt: skip
        mine.depth += 1
        return mine

    def _take(self, hold: Hold, end: float, first: Any) -> Steps[None]:
        """Ask until the lock is taken, or the wait is over."""
        try:
            yield from self._ask_and_wait(hold, end, first)
            if self._replicas:
                yield from self._replicate(hold)
        except GeneratorExit:
            raise  # nobody is there to go on: the lease ends by itself
        except BaseException as error:
            unsent = isinstance(error, UnavailableError) and not (hold.doubt or hold.ear)
            if (hold.fence or not unsent) and not hold.released and not hold.inherited:
                self.give_up(hold)
            raise
        finally:
            if hold.bell is not None:
                hold.station.wakeups.leave(hold.token)

    def _ask_and_wait(self, hold: Hold, end: float, first: Any) -> Steps[None]:
        ticket, contended = "0" if hold.ear else "", False
        again = False
        while True:
            state, _, *more = yield from self._asked(hold, ticket, end, first, contended)
            first = None
            if hold.inherited:
                raise _Forked
            if state == 1:
                if hold.stale(clock()) and not again:  # the answer took long: the lease begins anew
                    again = True
                    continue
                hold.begin(more[0], self._most)
                return
            if state == -2:
                raise UnavailableError(f"lock {self.name}: taken away before its reply came")
            left, place, known, fence, info = more
            if hold.asked >= end and ticket:
                yield from self._leave_line(hold)
            if not contended:
                contended = True
                self._tell("contended", 0.0)
            if hold.asked >= end:
                self.refuse(hold, left, fence, info)
            if not ticket:
                if hold.bell is None:
                    hold.bell = hold.station.wakeups.enter(hold.token)
                try:
                    hold.ear, ticket = (yield from self._listen(hold)), "0"
                except _MovedError:
                    if clock() >= end:
                        raise
                continue
            ticket = known.decode()
            wakeups = hold.station.wakeups
            if wakeups.ear(self._where, self._names.channels(wakeups.name)) is None:
                with contextlib.suppress(UnavailableError):  # else it looks by itself
                    if (yield from self._listen(hold)) != DEAF:
                        continue  # what was said until now it may have missed
            yield from self._sleep(hold, left / 1e6, place, end)
            if hold.inherited:
                raise _Forked

    def _listen(self, hold: Hold) -> Steps[str]:
        """See that this one can be told; return how."""
        wakeups = hold.station.wakeups
        channels = self._names.channels(wakeups.name)
        try:
            return (yield from wakeups.listen_steps(self._where, channels, self.deadline))
        except ServerError as error:
            if error.code in ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"):
                raise _MovedError(f"lock {self.name}: its slot moves: {error}") from error
            raise

    def _asked(
        self, hold: Hold, ticket: str, end: float, first: Any, waits: bool
    ) -> Steps[tuple[Any, ...]]:
        """Ask, again when the reply was lost; who `waits` by now, for as long as Redis is away."""
        began = clock()
        pause, longest = 0.0, _PAUSES[1]
        while True:
            try:
                if first is None:
                    reply = yield self.asking(hold, hold.begin_asking(), ticket)
                elif isinstance(first, BaseException):
                    raise first
                else:
                    reply = first
            except AWAY as error:
                if hold.inherited:
                    raise _Forked from error
                first = None
                maybe = isinstance(error, MaybeAppliedError)
                hold.doubt = hold.doubt or maybe
                now = clock()
                # Who asks for the first time is told at once that nobody is there.
                longest_away = max(hold.ttl, self.deadline) if waits else self.deadline
                over = now >= began + longest_away or (waits and now >= end)
                if over or not (waits or maybe):
                    raise UnavailableError(f"lock {self.name}: not acquired: {error}") from error
                yield Sleep(min(pause, end - now) if waits else pause)
                pause = min(2 * pause or _PAUSES[0], longest)
                continue
            read = answer(reply)
            self.learn(read[1], clock())
            if read[0] != -1:
                return read
            first = None
            if clock() >= began + self.deadline + _GRACE:
                raise UnavailableError(f"lock {self.name}: not acquired: every try came too late")

    def _sleep(self, hold: Hold, left: float, place: int, end: float) -> Steps[None]:
        """Sleep until it may be this one's turn, or the wait is over."""
        wakeups = hold.station.wakeups
        heard = wakeups.ear(self._where, self._names.channels(wakeups.name)) is not None
        # Those in front look first; the first four alone, for they may all be gone.
        nap = left + 0.001 + min(place, 4) * _APART
        nap = min(nap, max(hold.ttl, _LOOK_AGAIN) if heard else _LOOK)
        look = min(clock() + nap, end)
        while (rest := look - clock()) > 0:
            told = yield from _wait_for(hold.bell, rest)
            if told == 0:
                return
            if told is not None:  # somebody has so many µs to take it
                look = min(look, clock() + told / 1e6 + _APART)

    def refuse(self, hold: Hold, left: int, fence: int, info: bytes) -> NoReturn:
        """Raise `LockedError` about who has it."""
        if hold.doubt:  # an earlier copy may be under way
            self.give_up(hold)
        hold.released = True
        holder = parse_info(info.decode("utf-8", "replace"), fence, left / 1e6)
        state = self.kind.taken() if holder is None else f"is held by {holder}"
        raise LockedError(
            f"lock {self.name} {state}; until a release, or for {left / 1e6:.3g} s at the most",
            self.name, holder, left / 1e6,
        )  # fmt: skip

    def give_up(self, hold: Hold) -> None:
        """Leave an acquisition of which a command may have arrived, or arrive yet."""
        command = self.kind.release(hold.token, 0, hold.ear)._replace(repeatable=True)
        try:
            until = clock() + self.deadline + _GRACE
            hold.station.leave(hold.token, command, until, hold.ttl)
            self._post(hold, command)
        except Exception:
            _log.exception("giving up lock %s failed; it ends with its lease", self.name)

    def _leave_line(self, hold: Hold) -> Steps[None]:
        fence = 0 if hold.doubt else -1  # no copy of its acquire is under way
        command = self.kind.release(hold.token, fence, hold.ear)._replace(repeatable=True)
        try:
            yield from ask(command)
        except AWAY:
            self.give_up(hold)
        hold.released = True

    def _replicate(self, hold: Hold) -> Steps[None]:
        """Wait until enough replicas have the lock; else give it back."""
        written: list[Any] = []
        write: Any = self.asking(hold, clock(), MINE)
        write = write._replace(parse=written.append)
        half = str(max(1, round(self.deadline * 500)))
        # WAIT counts the writes of its own connection only: in vain before the write has gone well.
        count: Command[Any] = Command(
            ("WAIT", str(self._replicas), half), (self.kind.key,),
            lambda reply: reply if written else 0, bulk=True,
        )  # fmt: skip
        outcomes = yield from ask_all([write, count])
        try:
            have = outcomes[1].result()
        except RedisHacksError as error:
            raise UnavailableError(
                f"lock {self.name}: replicas were not heard of: {error}"
            ) from error
        if have < self._replicas:
            yield from self._leave_line(hold)
            raise UnavailableError(
                f"lock {self.name}: only {have} of {self._replicas} replicas have it in time"
            )

    def watch(self, hold: Hold) -> None:
        """See that somebody looks after a lease, if it is renewed or its end is to be told."""
        if hold.renews or self._on_lost is not None:
            when = hold.due()
            if when is not None:
                hold.station.keep(hold, when)

    def asking(
        self, hold: Hold, now: float, ticket: str = "", ttl: float | None = None
    ) -> Command[list[Any]]:
        """Return what asks for it at that moment."""
        ear = hold.ear if ticket else ""
        return self.kind.acquire(
            hold.token, micros(ttl or hold.ttl), self.not_after(now), self.info(hold), ticket, ear
        )

    def not_after(self, now: float) -> str:
        """Return until when what is asked for at that moment is done, by the server's clock."""
        return str(int((now + self._ahead) * 1e6))

    def info(self, hold: Hold) -> str:
        """Return what others are told about who asks."""
        thread = self._thread(hold.owner)
        if not thread.isascii():
            thread = thread.encode("utf-8", "replace").decode()
        return f"{hold.process}{self._label}\t{thread}"

    # Holding

    def extend_steps(self, hold: Hold, ttl: Seconds | None) -> Steps[None]:
        """Begin a lease anew; raises `LockLostError`."""
        yield from extend_all_steps((hold,), ttl)

    def release_steps(self, hold: Hold, first: Any) -> Steps[None]:
        """Go on with a release; `first` is what came of saying it, a code or an error.

        Raises `LockLostError` when it had been lost.
        """
        lost = hold.was_lost
        try:
            if isinstance(first, BaseException):
                raise first
            lost = first != 1 or lost
        except MaybeAppliedError:
            lost = (yield from self.release_again(hold)) or lost
        except UnavailableError as error:
            self.release_later(hold, error)
        except BaseException:
            self.give_up(hold)
            raise
        if hold.doubt:  # a first copy of its acquire may be under way
            self.give_up(hold)
        if lost:
            hold.tell_lost()
            raise hold.loss()

    def giving_back(self, hold: Hold) -> Command[int]:
        """Return what gives it back."""
        return self.kind.release(hold.token, hold.fence, "")

    def release_again(self, hold: Hold) -> Steps[bool]:
        """Say again that it is given back, after a lost reply; return whether it had been lost."""
        try:
            code = yield self.giving_back(hold)._replace(repeatable=True)
        except UnavailableError as error:
            self.release_later(hold, error)
            return False
        except GeneratorExit:
            raise
        except BaseException:
            self.give_up(hold)
            raise
        # 2: it was released before, by the copy whose reply was lost.
        return bool(code == 0)

    def release_later(self, hold: Hold, error: Exception) -> None:
        """Have it given back in the background: nobody was there to hear of it."""
        self.give_up(hold)
        _log.warning("lock %s: released in the background: %s", self.name, error)

    def show_steps(self) -> Steps[list[Holder]]:
        """Say who holds it."""
        reply = yield from ask(self.kind.show())
        return holders(reply)

    def force_steps(self) -> Steps[bool]:
        """Take it away from whoever holds it; only once: a repeat might take it from the next."""
        code = yield from ask(self.kind.release("", 0, ""))
        return bool(code == 1)


class _MovedError(UnavailableError):
    """A slot moved between two commands."""


class _Forked(Exception):
    """This process was forked while its parent acquired a lock."""


def _wait_for(bell: Any, seconds: float) -> Steps[Any]:
    return (yield Call(bell.wait, (seconds,)))


def _lease(ttl: Seconds) -> float:
    length = seconds(ttl, "ttl")
    if not _SHORTEST <= length <= _LONGEST:
        raise UsageError(f"a ttl is from 1 ms to 366 days, not {ttl!r}")
    return length


def _plain(hook: E, what: str) -> E:
    if hook is not None and (not callable(hook) or inspect.iscoroutinefunction(hook)):
        raise UsageError(f"{what} is a function, not async, and not {hook!r}")
    return hook


def _label(label: Any) -> str:
    if not isinstance(label, str) or len(label) > 256 or not label.isprintable():
        raise UsageError(f"a label is printable text of at most 256 characters, not {label!r}")
    return label
