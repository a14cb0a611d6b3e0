"""What a series says to Redis: its keys and its commands. No I/O here.

The keys of the name `hits`, series `project:42`, in partition 0:

    rh:t1:{hits/0}:meta                        hash    kind, partitions, resolutions; no TTL, for it
                                                       says what all other keys mean
    rh:t1:{hits/0}:s:project:42:10:498611      one bucket of 10 s or several, see the kind's script;
                                                       TTL until the end of the last of them, and
                                                       the retention
    rh:t1:{hits/0}:f:<producer>                string  last send of a lingering producer; TTL 24 h
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from redishacks import _keys
from redishacks._clock import clock
from redishacks._command import Command, Steps, ask, ask_all, script
from redishacks._slots import partition
from redishacks._units import EXACT
from redishacks.errors import UsageError
from redishacks.timeseries._kind import Entries, Hit, Kind
from redishacks.timeseries.resolution import Ladder, Rung, ladder

#: The tool's letter and the version of its keys.
TOOL = "t1"
#: Seconds for which what the record in Redis says is relied on.
VIEW = 60
#: Hits of one script: each is in a key per resolution.
_PART = 500

T = TypeVar("T")


class Applied(NamedTuple):
    """What became of hits."""

    code: int
    #: The server's time, in µs.
    now: int
    #: Which key and which of its entries could not be added to, from 1.
    about: tuple[int, ...]


class Buckets(NamedTuple):
    """A key with one bucket, or several of one resolution."""

    level: int
    key: bytes
    pack: int


#: What is to be written, by key.
Folded = dict[Buckets, Entries]


class _BehindError(Exception):
    """Somebody else has written first."""


class Layout:
    """Keys and commands of one name; and its resolutions, once they are known."""

    def __init__(
        self, prefix: str, name: str, kind: Kind, partitions: int, wanted: Ladder | None
    ) -> None:
        if (
            isinstance(partitions, bool)
            or not isinstance(partitions, int)
            or not 1 <= partitions <= 1024
        ):
            raise UsageError(f"partitions must be an int from 1 to 1024, not {partitions!r}")
        self.partitions = partitions
        self.kind = kind
        #: What is in use: known from the first write or read on.
        self.rungs: Ladder = ()
        #: Seconds of the finest buckets, or 1 until that is known.
        self.step = 1
        self._ahead = time.time() - clock()
        #: How far the clock was off that hits went by before the server's was known.
        self.off = -self._ahead
        #: When that was read, in seconds of the server's clock.
        self._viewed = 0.0
        self._wanted = wanted
        self._prefix = _keys.check_name(prefix, "prefix")
        self._name = _keys.check_name(name, "a series' name")
        self.full_name = f"{self._prefix}:{self._name}"
        self._meta = self._key(0, "meta")

    def _key(self, p: int, *rest: str) -> bytes:
        return _keys.make(self._prefix, TOOL, f"{self._name}/{p}", *rest)

    def partition(self, key: bytes) -> int:
        """Return the partition of a series."""
        return partition(key, self.partitions)

    def head(self, key: bytes) -> bytes:
        """Return how the keys of a series begin."""
        return self._key(self.partition(key), "s", _keys.quote_bytes(key)) + b":"

    # The server's clock

    def now(self) -> float:
        """Return the server's time in seconds since 1970, as it was learned last."""
        return clock() + self._ahead

    def learn(self, micros: int) -> None:
        """Hear the server's time, in µs."""
        self._ahead = micros / 1e6 - clock()

    def begins(self, when: float) -> int:
        """Return a moment as all hits of its finest bucket share it."""
        return int(when // self.step) * self.step

    def time_of(self, key: bytes) -> Command[int]:
        """Read the time of the server that has a key, in µs."""
        return Command(("TIME",), (key,), _micros, repeatable=True)

    # What everybody agrees on

    @property
    def agreed(self) -> bool:
        """What is in use is known, and not for too long."""
        return bool(self.rungs) and self.now() < self._viewed + VIEW

    def agree(self) -> Steps[None]:
        """See, before anything is written, that everybody means the same keys.

        Whoever writes first decides on the resolutions; raises `UsageError` for who wants others.
        One round trip, once a minute, and one more for the first.
        """
        while not self.agreed and not (yield from self._known()):
            try:
                yield from ask(self.define(self._wanted or self._usual()))
            except _BehindError:
                continue  # somebody else was the first just now

    def look(self) -> Steps[Ladder]:
        """Return the resolutions for a read: those in use, else those that would be."""
        if self.agreed or (yield from self._known()):
            return self.rungs
        return self._wanted or self._usual()

    def _known(self) -> Steps[bool]:
        """Learn what is in use; False when nobody has written yet."""
        meta: Command[Any] = Command(
            ("HGETALL", self._meta), (self._meta,), _texts, repeatable=True
        )
        read, micros = yield from ask_all([meta, self.time_of(self._meta)])
        found = read.result()
        self.learn(micros.result())
        if not found:
            return False
        for field, value in self._fixed().items():
            if found.get(field) != value:
                raise self._disagreement(field, str(found.get(field)), value)
        stored = {rung.step: rung for rung in map(_rung, found.items()) if rung is not None}
        for given in self._wanted or ():
            rung = stored.get(given.step)
            if rung is None or given[:3] != rung[:3]:
                raise self._disagreement(
                    f"a resolution of {given.step} s",
                    f"{rung.retention} s" if rung else "none",
                    f"{given.retention} s",
                )
        if not self.rungs:
            self.off += self._ahead
        self.rungs = tuple(rung for _, rung in sorted(stored.items()))
        self.step = self.rungs[0].step
        self._viewed = self.now()
        return True

    def _usual(self) -> Ladder:
        return ladder(self.kind.usual, packed=self.kind.packed)

    def until(self) -> int:
        """Return until when, in µs, hits may be written that went by what is known now.

        Nobody relies on a new resolution before that has passed for all who do not know of it.
        """
        return int(self._viewed + 2 * VIEW) * 1_000_000

    def define(self, rungs: Ladder) -> Command[None]:
        """Note down what everybody agrees on, or fail because somebody else has."""
        fields = self._fixed()
        fields |= {f"r {r.step}": " ".join(map(str, r[1:])) for r in rungs}

        def parse(reply: list[bytes]) -> None:
            if reply:
                raise _BehindError

        words = tuple(text for field in fields.items() for text in field)
        return Command(words, (self._meta,), parse, script("define"), repeatable=True)

    def _fixed(self) -> dict[str, str]:
        return {
            "kind": self.kind.name,
            "partitions": str(self.partitions),
            **self.kind.fields(),
        }

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
        window: tuple[int, int] = (0, EXACT),
        fence: tuple[str, int] | None = None,
    ) -> Command[Applied]:
        """Add to buckets of one partition, in all resolutions; all of them, or none.

        `window` bounds the server's time, in µs, in which it may be done.
        """
        folded = self._folded(hits)
        last = len(self.rungs) - 1
        coarsest = sum(buckets.level == last for buckets in folded)
        return self.put(folded, coarsest, window, fence)

    def put(
        self,
        folded: Folded,
        coarsest: int = 0,
        window: tuple[int, int] = (0, EXACT),
        fence: tuple[str, int] | None = None,
    ) -> Command[Applied]:
        """Add to keys of one partition; the last `coarsest` of them must not have expired."""
        keys: list[bytes] = []
        words: list[str | bytes] = ["", str(window[0]), str(window[1]), "", str(coarsest)]
        entry = self.kind.words
        for (level, key, pack), entries in folded.items():
            rung = self.rungs[level]
            keys.append(self.at(key, rung, pack))
            told: list[tuple[str | bytes, ...]] = []
            for (place, member), amounts in entries.items():
                told += entry(place, member, amounts)
            words += (str(self.kind.size(rung)), str(rung.ends(pack)), str(len(told)))
            for some in told:
                words += some
        if fence is not None:
            producer, number = fence
            words[0] = str(number)
            p = self.partition(next(iter(folded)).key)
            keys.append(self._key(p, "f", producer))
        return Command(
            tuple(words), tuple(keys), _applied, self.kind.script, repeatable=fence is not None
        )

    def _folded(self, hits: Sequence[Hit]) -> Folded:
        """Return what hits come to in every resolution, the coarsest last."""
        found: Folded = {}
        merged = self.kind.merged
        for level, rung in enumerate(self.rungs):
            span, step = rung.span, rung.step
            for key, at, amounts, member in hits:
                pack, rest = divmod(at, span)
                entries = found.setdefault(Buckets(level, key, pack), {})
                entry = (rest // step, member)
                held = entries.get(entry)
                entries[entry] = amounts if held is None else merged(held, amounts)
        return found

    def blamed(self, hits: Sequence[Hit], applied: Applied) -> int:
        """Return which hit was refused, or is one of those that were together too much."""
        at, *rest = applied.about
        (level, key, pack), entries = list(self._folded(hits).items())[at - 1]
        rung = self.rungs[level]
        told = [
            entry for entry, amounts in entries.items() for _ in self.kind.words(*entry, amounts)
        ]
        blamed = {told[rest[0] - 1]} if rest else set(told)
        return next(
            number
            for number, hit in enumerate(hits)
            if hit.key == key
            and rung.pack(hit.time) == pack
            and (hit.time % rung.span // rung.step, hit.member) in blamed
        )

    # Reading

    def at(self, key: bytes, rung: Rung, pack: int) -> bytes:
        """Return the key with some buckets of a series."""
        return self.head(key) + b"%d:%d" % (rung.step, pack)

    def read(
        self, keys: Sequence[bytes], packs: Sequence[tuple[Rung, int]]
    ) -> list[Command[list[Any]]]:
        """Read keys of series of one partition: those of the first series, of the next, …"""
        ends = [b"%d:%d" % (rung.step, pack) for rung, pack in packs]
        return self.kind.read([head + end for head in map(self.head, keys) for end in ends])


def _applied(reply: list[int]) -> Applied:
    return Applied(reply[0], reply[1], tuple(reply[2:]))


def _micros(reply: list[bytes]) -> int:
    return int(reply[0]) * 1_000_000 + int(reply[1])


def _texts(reply: Any) -> dict[str, str]:
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {field.decode(): value.decode() for field, value in pairs}


def _rung(field: tuple[str, str]) -> Rung | None:
    name, value = field
    return Rung(int(name[2:]), *map(int, value.split())) if name.startswith("r ") else None
