"""What a series says to Redis: its keys and its commands. No I/O here.

The keys of the name `hits`, series `project:42`, in partition 0:

    rh:t1:{hits/0}:meta                        hash    partitions and resolutions; no TTL
    rh:t1:{hits/0}:s:project:42:10:498611      string  a packed key: 360 buckets of 10 s, see
                                                       series_add.lua; TTL until the end of its
                                                       last bucket, and the retention
    rh:t1:{hits/0}:f:<producer>                string  last send of a lingering producer; TTL 24 h
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from redishacks import _keys
from redishacks._clock import clock
from redishacks._command import Command, Steps, ask, ask_all, script
from redishacks._slots import partition
from redishacks._units import EXACT
from redishacks.errors import UsageError
from redishacks.timeseries.resolution import DEFAULT, Ladder, Rung, ladder

#: The tool's letter and the version of its keys.
TOOL = "t1"
_ALWAYS = ("0", str(EXACT))
#: Hits of one script: each is in a key per resolution.
_PART = 500
_DAY = 86_400


T = TypeVar("T")


class Hit(NamedTuple):
    """An amount for the bucket of one moment."""

    key: bytes
    #: Seconds since 1970.
    time: int
    amount: int


class Applied(NamedTuple):
    """What became of hits."""

    code: int
    #: The server's time, in µs.
    now: int
    #: Which key and which of its places could not be added to, from 1.
    about: tuple[int, ...]


#: By level, series and packed key: amounts by place.
_Places = dict[tuple[int, bytes, int], dict[int, int]]


class _BehindError(Exception):
    """Somebody else has written first."""


class Layout:
    """Keys and commands of one name; and its resolutions, once they are known."""

    def __init__(
        self, prefix: str, name: str, kind: str, partitions: int, wanted: Ladder | None
    ) -> None:
        if (
            isinstance(partitions, bool)
            or not isinstance(partitions, int)
            or not 1 <= partitions <= 1024
        ):
            raise UsageError(f"partitions must be an int from 1 to 1024, not {partitions!r}")
        self.partitions = partitions
        #: What is in use: known from the first write or read on.
        self.rungs: Ladder = ()
        #: Seconds of the finest buckets, or 1 until that is known.
        self.step = 1
        self._ahead = time.time() - clock()
        #: How far the clock was off that hits went by before the server's was known.
        self._off = -self._ahead
        self._wanted = wanted
        self._kind = kind
        self._prefix = _keys.check_name(prefix, "prefix")
        self._name = _keys.check_name(name, "a series' name")
        self.full_name = f"{self._prefix}:{self._name}"
        self._meta = self._key(0, "meta")
        self._add = script("series_add")

    def _key(self, p: int, *rest: str) -> bytes:
        return _keys.make(self._prefix, TOOL, f"{self._name}/{p}", *rest)

    def partition(self, key: bytes) -> int:
        """Return the partition of a series."""
        return partition(key, self.partitions)

    def head(self, key: bytes) -> bytes:
        """Return how the packed keys of a series begin."""
        return self._key(self.partition(key), "s", _keys.quote_bytes(key)) + b":"

    # The server's clock

    def now(self) -> float:
        """Return the server's time in seconds since 1970, as it was learned last."""
        return clock() + self._ahead

    def learn(self, micros: int) -> None:
        """Hear the server's time, in µs."""
        self._ahead = micros / 1e6 - clock()

    def stamp(self) -> str:
        """Return the bucket of now, as hits have it that are sent later."""
        return str(self.bucket(self.now())) if self.rungs else f"~{int(self.now())}"

    def bucket(self, when: float) -> int:
        """Return a moment as all hits of its finest bucket share it."""
        return int(when // self.step) * self.step

    def stamped(self, stamp: bytes) -> int:
        """Return the moment of a stamp, by the server's clock."""
        return int(int(stamp[1:]) + self._off) if stamp.startswith(b"~") else int(stamp)

    # What everybody agrees on

    def agree(self) -> Steps[None]:
        """See, before anything is written, that everybody means the same keys.

        Whoever writes first decides on the resolutions; raises `UsageError` for who wants others.
        One round trip, and one more for the first.
        """
        while not (yield from self._look()):
            try:
                yield from ask(self._define(self._wanted or ladder(DEFAULT)))
            except _BehindError:
                continue  # somebody else was the first just now

    def look(self) -> Steps[Ladder]:
        """Return the resolutions for a read: those in use, else those that would be."""
        if (yield from self._look()):
            return self.rungs
        return self._wanted or ladder(DEFAULT)

    def _look(self) -> Steps[bool]:
        meta: Command[Any] = Command(
            ("HGETALL", self._meta), (self._meta,), _texts, repeatable=True
        )
        read, micros = yield from ask_all([meta, _time(self._meta)])
        found = read.result()
        self.learn(micros.result())
        if not found:
            return False
        for field, value in self._fixed().items():
            if found.get(field) != value:
                raise self._disagreement(field, str(found.get(field)), value)
        stored = tuple(sorted(_rung(*item) for item in found.items() if item[0].startswith("r ")))
        if self._wanted is not None:
            wanted = {rung.step: rung for rung in self._wanted}
            for rung in stored:
                given = wanted.pop(rung.step, None)
                if given is None or given[:3] != rung[:3]:
                    raise self._disagreement(
                        f"a resolution of {rung.step} s",
                        f"{rung.retention} s",
                        f"{given.retention} s" if given else "none",
                    )
            for rung in wanted.values():
                field = f"a resolution of {rung.step} s"
                raise self._disagreement(field, "none", f"{rung.retention} s")
        if not self.rungs:
            self._off += self._ahead
        self.rungs, self.step = stored, stored[0].step
        return True

    def _define(self, rungs: Ladder) -> Command[None]:
        fields = self._fixed()
        fields |= {f"r {r.step}": f"{r.retention} {r.buckets} {r.since}" for r in rungs}

        def parse(reply: list[bytes]) -> None:
            if reply:
                raise _BehindError

        words = tuple(text for field in fields.items() for text in field)
        return Command(words, (self._meta,), parse, script("define"), repeatable=True)

    def _fixed(self) -> dict[str, str]:
        return {"kind": self._kind, "partitions": str(self.partitions)}

    def _disagreement(self, field: str, stored: str, given: str) -> UsageError:
        return UsageError(
            f"series {self.full_name} is in use with {field}: {stored}, and this one says {given}"
        )

    # Writing

    def cut(self, items: Iterable[T], key: Callable[[T], bytes]) -> Iterator[tuple[int, list[T]]]:
        """Cut what is to be written into (partition, part), each small enough for one script."""
        groups: dict[int, list[T]] = {}
        for item in items:
            groups.setdefault(self.partition(key(item)), []).append(item)
        for p, group in groups.items():
            for start in range(0, len(group), _PART):
                yield p, group[start : start + _PART]

    def write(
        self,
        hits: Sequence[Hit],
        window: tuple[str, str] = _ALWAYS,
        fence: tuple[str, int] | None = None,
    ) -> Command[Applied]:
        """Add to buckets of one partition, in all resolutions; all of them, or none.

        `window` bounds the server's time, in µs, in which it may be done.
        """
        rungs = self.rungs
        keys: list[bytes] = []
        words: list[str] = []
        coarsest = 0
        for (level, key, pack), amounts in self._places(hits).items():
            rung = rungs[level]
            coarsest += level == len(rungs) - 1
            keys.append(self.head(key) + b"%d:%d" % (rung.step, pack))
            entries = _entries(amounts)
            words += (str(-(-rung.buckets // 8)), str(rung.ends(pack)), str(len(entries)))
            for place, amount in entries:
                words += (str(place), str(amount))
        sequence = ""
        if fence is not None:
            producer, number = fence
            sequence = str(number)
            keys.append(self._key(self.partition(hits[0].key), "f", producer))
        args = (sequence, *window, "", str(coarsest), *words)
        return Command(args, tuple(keys), _applied, self._add, repeatable=fence is not None)

    def _places(self, hits: Sequence[Hit]) -> _Places:
        """Return the amounts for the places of packed keys, the coarsest resolution last."""
        found: _Places = {}
        for level, rung in enumerate(self.rungs):
            span, step = rung.span, rung.step
            for key, at, amount in hits:
                pack, rest = divmod(at, span)
                amounts = found.setdefault((level, key, pack), {})
                place = rest // step
                amounts[place] = amounts.get(place, 0) + amount
        return found

    def blamed(self, hits: Sequence[Hit], applied: Applied) -> int:
        """Return which hit was refused, or is one of those that were together too much."""
        at, *rest = applied.about
        (level, key, pack), amounts = list(self._places(hits).items())[at - 1]
        places = {_entries(amounts)[rest[0] - 1][0]} if rest else set(amounts)
        rung = self.rungs[level]
        return next(
            number
            for number, hit in enumerate(hits)
            if hit.key == key
            and rung.pack(hit.time) == pack
            and hit.time % rung.span // rung.step in places
        )

    # Reading

    def read(self, heads: Sequence[bytes], packs: Sequence[tuple[Rung, int]]) -> list[Command[Any]]:
        """Read packed keys of series of one partition, and the time by which they were there."""
        ends = [b"%d:%d" % (rung.step, pack) for rung, pack in packs]
        keys = tuple([head + end for head in heads for end in ends])
        read: Command[Any] = Command(("MGET", *keys), keys, repeatable=True)
        return [read, _time(keys[0])]


def _entries(amounts: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return places and their amounts, in parts that Lua's numbers hold exactly."""
    found = []
    for place, amount in amounts.items():
        while abs(amount) >= EXACT:
            part = EXACT - 1 if amount > 0 else 1 - EXACT
            found.append((place, part))
            amount -= part
        found.append((place, amount))
    return found


def _applied(reply: list[int]) -> Applied:
    return Applied(reply[0], reply[1], tuple(reply[2:]))


def _time(key: bytes) -> Command[int]:
    """Read the time of the server that has a key, in µs."""
    return Command(("TIME",), (key,), _micros, repeatable=True)


def _micros(reply: list[bytes]) -> int:
    return int(reply[0]) * 1_000_000 + int(reply[1])


def _texts(reply: Any) -> dict[str, str]:
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {field.decode(): value.decode() for field, value in pairs}


def _rung(field: str, value: str) -> Rung:
    return Rung(int(field[2:]), *map(int, value.split()))
