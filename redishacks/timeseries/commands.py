"""What a series says to Redis: its keys and its commands. No I/O here.

The keys of the name `hits`, series `project:42`, in partition 0:

    rh:t1:{hits/0}:meta                        hash    kind, partitions, resolutions; no TTL, for it
                                                       says what all other keys mean
    rh:t1:{hits/0}:s:project:42:10:498611      one bucket of 10 s or several, see the kind's script;
                                                       TTL until the end of the last of them, and
                                                       the retention
    rh:t1:{hits/0}:f:<producer>                string  last send of a lingering producer; TTL 24 h.
                                                       Also of a merge (m<batch>), an import
                                                       (i<token>) and of deletes (d<series>)
    rh:t1:{hits/0}:n:project:42                hash    a merge of it that is under way, and
    rh:t1:{hits/0}:m:project:42:<batch>:10:498611      buckets that are; TTLs of the longest
                                                       retention, and as they were
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from redishacks import _keys
from redishacks._clock import clock
from redishacks._command import Command, Steps, ask, ask_all, script
from redishacks._slots import partition
from redishacks._transport import packed
from redishacks.errors import ServerError, UnavailableError, UsageError
from redishacks.timeseries._kind import Amounts, Entries, Hit, Kind
from redishacks.timeseries.record import TOOL, Record, parse
from redishacks.timeseries.resolution import Ladder, Rung, ladder

#: Seconds for which what the record in Redis says is relied on.
VIEW = 60
#: A hit may be so many seconds ahead of the server's clock.
SKEW = 60
#: Seconds that a producer's fence lives.
_FENCE = 86_400
#: How many of those are kept: some 2 kB each.
_SAID = 1_000
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
    """A key with one bucket of a series, or several."""

    rung: Rung
    key: bytes
    pack: int


#: What is to be written, by key.
Folded = dict[Buckets, Entries]


class BehindError(Exception):
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
        self._ahead = self._guess = time.time() - clock()
        #: How far the clock was off that hits went by before the server's was known.
        self.off = -self._ahead
        #: When that was read, in seconds of the server's clock.
        self._viewed = 0.0
        #: What was said to add to the bucket of now; see `now_hit`.
        self._said: tuple[Any, dict[tuple[bytes, Amounts], Command[Applied]]] = (None, {})
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

    def noted(self) -> float:
        """Return the time that a hit is noted with: by one clock until resolutions are known."""
        return self.now() if self.rungs else clock() + self._guess

    def learn(self, micros: int) -> None:
        """Hear the server's time, in µs."""
        self._ahead = micros / 1e6 - clock()

    def begins(self, when: float) -> int:
        """Return a moment as all hits of its finest bucket share it."""
        return int(when // self.step) * self.step

    def time_of(self, key: bytes | None = None) -> Command[int]:
        """Read the time of the server that has a key, in µs."""
        key = key or self._meta
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
                yield from ask(self.define(self._wanted or self.rungs or self._usual()))
            except BehindError:
                continue  # somebody else was the first just now

    def refresh(self) -> Steps[None]:
        """Learn what is in use by now."""
        yield from self._known()

    def look(self) -> Steps[Ladder]:
        """Return the resolutions for a read: those in use, else those that would be."""
        if self.agreed or (yield from self._known()):
            return self.rungs
        return self._wanted or self.rungs or self._usual()

    def _known(self) -> Steps[bool]:
        """Learn what is in use; False when nobody has written yet."""
        meta: Command[Any] = Command(("HGETALL", self._meta), (self._meta,), parse, repeatable=True)
        read, micros = yield from ask_all([meta, self.time_of(self._meta)])
        found: Record | None = read.result()
        self.learn(micros.result())
        if found is None:
            return False
        for field, value in self._fixed().items():
            if found.fields.get(field) != value:
                raise self._disagreement(field, str(found.fields.get(field)), value)
        stored = {rung.step: rung for rung in found.rungs}
        for given in self._wanted or ():
            rung = stored.get(given.step)
            if rung is None or given[:2] != rung[:2]:
                raise self._disagreement(
                    f"a resolution of {given.step} s",
                    f"{rung.retention} s" if rung else "none",
                    f"{given.retention} s",
                )
        if not self.rungs:
            self.off += self._ahead
        self.rungs = found.rungs
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

    def late(self) -> UnavailableError:
        """Return the error for what is over each time that it is said."""
        return UnavailableError(
            f"series {self.full_name}: every answer came too late for its question"
        )

    def define(self, rungs: Ladder, after: int = 0) -> Command[None]:
        """Note down what everybody agrees on, or fail because somebody else has.

        With `after` they come to so many others: of two at the same time one fails.
        """
        fields = self._fixed()
        if after:
            fields[f"added {after}"] = str(rungs[0].step)
        fields |= {f"r {r.step}": " ".join(map(str, r[1:])) for r in rungs}

        def accept(reply: list[bytes]) -> None:
            if reply:
                raise BehindError

        words = tuple(text for field in fields.items() for text in field)
        return Command(words, (self._meta,), accept, script("define"), repeatable=True)

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

    def now_hit(self, hit: Hit) -> Command[Applied]:
        """Add to the bucket of now, which begins at the hit's time, as long as that is now.

        All hits of a bucket that are alike say the same: that is kept until the next one begins.
        """
        until = self.until()
        when, said = self._said
        if when != (hit.time, until, self.rungs):
            said = {}
            self._said = (hit.time, until, self.rungs), said
        about = hit.key, hit.amounts
        found = None if hit.member else said.get(about)
        if found is None:
            window = hit.time * 1_000_000, min((hit.time + self.step) * 1_000_000, until)
            found = packed(self.put(self.folded([hit]), window=window))
            if len(said) < _SAID and not hit.member:
                said[about] = found
        return found

    def put(
        self,
        folded: Folded,
        *,
        window: tuple[int, int] | None = None,
        fence: tuple[str, int] | None = None,
        keep: int = _FENCE,
        all_expired: bool = False,
    ) -> Command[Applied]:
        """Add to keys of one partition: to all of them, or none. What has expired is left out.

        `window` bounds the server's time, in µs, in which it may be done: by default until what is
        known of resolutions is too old. The fence lives for `keep` seconds. Unless `all_expired` is
        right too, what is too old for the coarsest resolution is refused.
        """
        earliest, latest = window or (0, self.until())
        last = self.rungs[-1]
        coarsest = 0 if all_expired else sum(buckets.rung == last for buckets in folded)
        keys: list[bytes] = []
        words: list[str | bytes] = ["", str(earliest), str(latest), "", str(coarsest), str(keep)]
        entry = self.kind.words
        heads: dict[bytes, bytes] = {}
        for (rung, key, pack), entries in folded.items():
            head = heads.get(key) or heads.setdefault(key, self.head(key))
            keys.append(b"%b%d:%d" % (head, rung.step, pack))
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
            keys.append(self._fence(p, producer))
        return Command(
            tuple(words), tuple(keys), _applied, self.kind.script, repeatable=fence is not None
        )

    def folded(self, hits: Sequence[Hit]) -> Folded:
        """Return what hits come to in every resolution, the coarsest last."""
        found: Folded = {}
        merged = self.kind.merged
        for rung in self.rungs:
            span, step = rung.span, rung.step
            for key, at, amounts, member in hits:
                pack, rest = divmod(at, span)
                entries = found.setdefault(Buckets(rung, key, pack), {})
                entry = (rest // step, member)
                held = entries.get(entry)
                entries[entry] = amounts if held is None else merged(held, amounts)
        return found

    def blamed(self, hits: Sequence[Hit], folded: Folded, applied: Applied) -> int:
        """Return which hit was refused, or is one of those that were together too much."""
        at, *rest = applied.about
        (rung, key, pack), entries = list(folded.items())[at - 1]
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

    def _fence(self, p: int, producer: str) -> bytes:
        return self._key(p, "f", producer)

    # Whole series

    @property
    def longest(self) -> int:
        """Seconds for which anything is kept."""
        return self.rungs[-1].retention + self.rungs[-1].group

    def fenced(self, key: bytes, producer: str) -> Command[int]:
        """Read the last number that a producer sent to a series' partition; 0 for none."""
        fence = self._fence(self.partition(key), producer)
        return Command(("GET", fence), (fence,), lambda reply: int(reply or 0), repeatable=True)

    def moved(self, key: bytes, batch: str, rung: Rung, pack: int) -> bytes:
        """Return where a key of a series is while it is merged into another."""
        rest = "m", _keys.quote_bytes(key), batch, str(rung.step), str(pack)
        return self._key(self.partition(key), *rest)

    def _note(self, key: bytes) -> bytes:
        return self._key(self.partition(key), "n", _keys.quote_bytes(key))

    def move(
        self, key: bytes, batch: str, target: bytes, packs: Sequence[tuple[Rung, int]]
    ) -> Command[tuple[str, bytes] | None]:
        """Take all buckets of a series away; says which batch is under way, and where it goes.

        None when what is known of resolutions is too old.
        """
        deletes = self._fence(self.partition(key), "d" + _keys.quote_bytes(key))
        keys = [self._note(key), deletes]
        for rung, pack in packs:
            keys += self.at(key, rung, pack), self.moved(key, batch, rung, pack)
        args = batch, target, str(self.longest), str(self.until())
        return Command(args, tuple(keys), _batch, script("series_move"), bulk=True)

    def drop(self, key: bytes, batch: str, packs: Sequence[tuple[Rung, int]]) -> Command[int]:
        """Drop what was taken away, and the note of it."""
        moved = [self.moved(key, batch, rung, pack) for rung, pack in packs]
        keys = (self._note(key), *moved)
        return Command((batch,), keys, int, script("series_drop"), repeatable=True, bulk=True)

    def fade(self, key: bytes, producer: str) -> Command[int]:
        """Let a fence live as long as others from now on."""
        fence = self._fence(self.partition(key), producer)
        return Command(("EXPIRE", fence, str(_FENCE)), (fence,), repeatable=True)

    def replace(
        self,
        replaced: Sequence[tuple[Buckets, str, Sequence[str | bytes]]],
        removed: Sequence[Buckets],
        unchanged: Sequence[tuple[Buckets, str]] = (),
    ) -> Command[bool]:
        """Put keys in the place of those of stated versions, and remove some; or do nothing.

        That is when there is another version, or what is known of resolutions is too old.
        """
        words: list[str | bytes] = [str(self.until())]
        for _, version in unchanged:
            words += (version, "0", "-1")
        for buckets, version, parts in replaced:
            expires = buckets.rung.ends(buckets.pack)
            words += (version, str(expires), str(len(parts)), *parts)
        every = (
            *(buckets for buckets, _ in unchanged),
            *(buckets for buckets, _, _ in replaced),
            *removed,
        )
        keys = tuple(self.at(key, rung, pack) for rung, key, pack in every)
        return Command(tuple(words), keys, bool, script("series_replace"), bulk=True)

    def nodes(self, where: Callable[[Command[Any]], str] | None = None) -> Steps[list[bytes]]:
        """Return a key on each node that has some of this name.

        `where` names the nodes of those that do not know it themselves.
        """
        metas = [self._key(p, "meta") for p in range(self.partitions)]
        if len(metas) == 1:
            return metas
        if where is not None:
            return list({where(Command((), (meta,))): meta for meta in metas}.values())
        asked: list[Command[Any]] = [
            Command(("CLUSTER", "MYID"), (meta,), repeatable=True) for meta in metas
        ]
        outcomes = yield from ask_all(asked)
        if any(
            isinstance(outcome.error, ServerError) and "NOPERM" not in str(outcome.error)
            for outcome in outcomes
        ):
            return metas[:1]  # it is no cluster
        return list(
            {outcome.result(): meta for outcome, meta in zip(outcomes, metas, strict=True)}.values()
        )

    def scan(self, node: bytes, cursor: bytes) -> Command[tuple[bytes, set[bytes]]]:
        """Read which series have buckets on a node, some at a time."""
        step = str(self.rungs[-1].step)
        if any(rung.since for rung in self.rungs):
            step = "*"  # older ones need not have the coarsest
        name = _keys.literal(f"{self._prefix}:{TOOL}:{{{self._name}/")
        args = ("SCAN", cursor, "MATCH", f"{name}*}}:s:*:{step}:*", "COUNT", "1000")
        begins = f"{self._prefix}:{TOOL}:{{{self._name}/".encode()

        def scanned(reply: tuple[bytes, list[bytes]]) -> tuple[bytes, set[bytes]]:
            cursor, keys = reply
            # Another name may go on where this one ends: a partition is a number.
            parts = (key.removeprefix(begins).partition(b"}:s:") for key in keys)
            names = (rest.rsplit(b":", 2)[0] for p, _, rest in parts if p.isdigit())
            return cursor, set(map(_keys.unquote_bytes, names))

        return Command(args, (node,), scanned, repeatable=True)

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


def _batch(reply: list[bytes] | None) -> tuple[str, bytes] | None:
    return (reply[0].decode(), reply[1]) if reply else None


def _applied(reply: list[int]) -> Applied:
    return Applied(reply[0], reply[1], tuple(reply[2:]))


def _micros(reply: list[bytes]) -> int:
    return int(reply[0]) * 1_000_000 + int(reply[1])
