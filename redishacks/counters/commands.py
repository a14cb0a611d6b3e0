"""What a counter says to Redis: its keys, its columns and its commands. No I/O here.

The keys of the counter `hits`, partition 0, column `amount` (none has a TTL but the fences: a
count must not expire before it is in SQL):

    rh:c1:{hits/0}:meta               hash     partitions, columns, where the flush goes
    rh:c1:{hits/0}:since              string   time of the oldest hit not yet claimed
    rh:c1:{hits/0}:p:amount           zset     pending amounts, id -> amount
    rh:c1:{hits/0}:next               string   the id that the next batch will have
    rh:c1:{hits/0}:batches            zset     batches in flight -> time of their claim
    rh:c1:{hits/0}:b:<batch>          hash     size, chunk, since, columns of a batch; where it goes
    rh:c1:{hits/0}:b:<batch>:amount   zset     its amounts; never changes
    rh:c1:{hits/0}:f:<producer>       string   last send of a lingering producer; TTL 24 hours
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from redishacks import _keys
from redishacks._command import Command, Steps, ask, ask_all, script
from redishacks._sink import Rule
from redishacks._slots import partition
from redishacks._units import EXACT, microseconds
from redishacks.errors import UsageError

Id = str | int | bytes
#: Ids and their amounts, side by side.
Page = tuple[list[bytes], list[int | None]]
#: An id and an amount per column.
Item = tuple[bytes, Sequence[int | None]]
Amount = int | dt.datetime

#: Largest part of one send: more would block the server for too long (2,500 new ids take 5 ms).
PART_IDS = 2_500
PART_BYTES = 1_000_000
#: Ids read at once from a claimed batch.
PAGE = 5_000

_SIGN = {Rule.SUM: "+", Rule.MAX: ">", Rule.MIN: "<"}


def new_id() -> str:
    """Return 128 random bits, as 32 hexadecimal digits."""
    return secrets.token_hex(16)


# Values


class State(NamedTuple):
    """One partition at one moment; times are microseconds since 1970 by the server's clock."""

    partition: int
    next: str
    #: When the oldest hit that is not yet claimed came, or None.
    since: int | None
    pending_ids: int
    #: When a batch was last acknowledged, or None.
    flushed: int | None
    destination: str | None
    #: Which ledger is there; None when the counter is not bound, or to a sink without one.
    ledger: str | None
    now: int
    #: Batches in flight and the time of their claim, oldest first.
    batches: dict[str, int]


class Batch(NamedTuple):
    """A claimed batch: its chunks are `chunk` ids each, in the order of its first column."""

    partition: int
    id: str
    size: int
    chunk: int
    since: int
    columns: tuple[str, ...]
    #: What the counter was bound to at its claim; None when it was claimed before that was noted.
    destination: str | None
    ledger: str | None

    @property
    def chunks(self) -> int:
        """Return the number of its chunks."""
        return -(-self.size // self.chunk)


class Held(NamedTuple):
    """What Redis holds of one id: pending amounts, and per batch in flight (chunk, amounts)."""

    pending: list[int | None]
    claimed: dict[str, tuple[int, list[int | None]]]


class Columns:
    """The columns of a counter, each with its merge rule, in a fixed order."""

    def __init__(self, spec: Mapping[str, str | Rule] | None) -> None:
        given = {"amount": Rule.SUM} if spec is None else spec
        if not isinstance(given, Mapping) or not given:
            raise UsageError('columns must be a mapping such as {"hits": "sum", "seen": "max"}')
        rules: dict[str, Rule] = {}
        for name, rule in given.items():
            if not isinstance(name, str) or not name.isidentifier() or len(name) > 64:
                raise UsageError(f"a column's name must be a short identifier, not {name!r}")
            try:
                rules[name] = Rule(rule)
            except ValueError:
                raise UsageError(
                    f"column {name}: the rule must be 'sum', 'max' or 'min', not {rule!r}"
                ) from None
        self.rules: Mapping[str, Rule] = rules
        self.names = tuple(rules)
        self.signs = "".join(_SIGN[rule] for rule in rules.values())
        self._at = {name: i for i, name in enumerate(rules)}

    def __len__(self) -> int:
        return len(self.names)

    def index(self, column: str | None) -> int:
        """Return the place of a column; None means the first."""
        if column is None:
            return 0
        if column not in self._at:
            raise UsageError(f"no column {column!r}; there are {', '.join(self.names)}")
        return self._at[column]

    def amounts(self, given: Mapping[str, Amount]) -> list[int | None]:
        """Check the amounts of one hit; a sum of 0 is nothing to send."""
        values: list[int | None] = [None] * len(self.names)
        for name, amount in given.items():
            at = self.index(name)
            rule = self.rules[name]
            if isinstance(amount, dt.datetime) and rule is not Rule.SUM:
                value = microseconds(amount)
            elif isinstance(amount, int) and not isinstance(amount, bool):
                value = int(amount)
            else:
                also = "" if rule is Rule.SUM else " or an aware datetime"
                raise UsageError(f"column {name}: an amount is an int{also}, not {amount!r}")
            if not -EXACT <= value <= EXACT:
                raise UsageError(f"column {name}: {value} is beyond 2^53, where counts get rounded")
            if value or rule is not Rule.SUM:
                values[at] = value
        return values

    def merge(self, into: list[int | None], amounts: Sequence[int | None]) -> None:
        """Merge amounts into others by each column's rule."""
        for at, (rule, amount) in enumerate(zip(self.rules.values(), amounts, strict=True)):
            old = into[at]
            if amount is not None:
                into[at] = amount if old is None else merged(rule, old, amount)


def merged(rule: Rule, a: int, b: int) -> int:
    """Return two amounts merged into one."""
    if rule is Rule.SUM:
        return a + b
    return max(a, b) if rule is Rule.MAX else min(a, b)


# Commands


class Layout:
    """Keys and commands of one counter."""

    def __init__(self, prefix: str, name: str, columns: Columns, partitions: int) -> None:
        if (
            isinstance(partitions, bool)
            or not isinstance(partitions, int)
            or not (1 <= partitions <= 1024)
        ):
            raise UsageError(f"partitions must be an int from 1 to 1024, not {partitions!r}")
        self.columns = columns
        self.partitions = partitions
        #: Everybody means the same keys: we have said so.
        self.agreed = False
        self._prefix = _keys.check_name(prefix, "prefix")
        self._name = _keys.check_name(name, "a counter's name")
        #: How the ledger knows this counter.
        self.full_name = f"{self._prefix}:{self._name}"
        self._pending = [
            tuple(self._key(p, "p", column) for column in columns.names) for p in range(partitions)
        ]
        self._since = [self._key(p, "since") for p in range(partitions)]
        self._add_keys = [
            (since, *pending) for since, pending in zip(self._since, self._pending, strict=True)
        ]
        self._incr = script("counter_incr")
        self._add = script("counter_add")

    def _key(self, partition: int, *rest: str) -> bytes:
        return _keys.make(self._prefix, "c1", f"{self._name}/{partition}", *rest)

    def _batch_keys(self, partition: int, batch: str, columns: Iterable[str]) -> list[bytes]:
        return [
            self._key(partition, "b", batch),
            *(self._key(partition, "b", batch, column) for column in columns),
        ]

    def partition(self, raw: bytes) -> int:
        """Return the partition of an id."""
        return partition(raw, self.partitions)

    def agree(self, destination: str | None = None, ledger: str | None = None) -> Steps[None]:
        """Agree with everybody else on partitions and columns; for a flush, on where it goes too.

        One command per partition; a disagreement raises `UsageError` and changes nothing.
        """
        given = self._given(destination, ledger)
        args = [text for field in given.items() for text in field]

        def parse(reply: list[bytes]) -> None:
            if reply:
                raise self._disagreement(given, reply[0].decode(), reply[1].decode())

        first, *others = [
            Command(
                tuple(args),
                (self._key(p, "meta"),),
                parse,
                script("define"),
                repeatable=True,
            )
            for p in range(self.partitions)
        ]
        # The first partition decides; the others must not be marked when it disagrees.
        yield from ask(first)
        if others:
            for outcome in (yield from ask_all(others)):
                outcome.result()
        self.agreed = True

    def check(self, destination: str | None = None, ledger: str | None = None) -> Steps[bool]:
        """Return whether anybody has counted here; `UsageError` where `agree` would disagree.

        Changes nothing; one command.
        """
        given = self._given(destination, ledger)
        key = self._key(0, "meta")
        stored = yield from ask(Command(("HMGET", key, *given), (key,), _texts, repeatable=True))
        for field, value in zip(given, stored, strict=True):
            if value not in (None, given[field]):
                raise self._disagreement(given, field, value)
        return stored[0] is not None

    def _given(self, destination: str | None, ledger: str | None) -> dict[str, str]:
        fields = {"partitions": str(self.partitions), "index": self.columns.names[0]}
        fields |= {f"column {name}": rule.value for name, rule in self.columns.rules.items()}
        bound = {"destination": destination, "ledger": ledger}
        return fields | {name: value for name, value in bound.items() if value is not None}

    def _disagreement(self, given: Mapping[str, str], field: str, stored: str) -> UsageError:
        if field == "ledger":
            return self._other_ledger()
        return UsageError(
            f"counter {self.full_name} is in use with {field} = {stored}, "
            f"and this one says {given[field]}"
        )

    def check_bound(self, found: State | Batch, destination: str, ledger: str) -> None:
        """Raise `UsageError` when a partition or a batch goes elsewhere than to this ledger."""
        if found.destination not in (None, destination):
            given = {"destination": destination}
            raise self._disagreement(given, "destination", str(found.destination))
        if found.ledger not in (None, ledger):
            raise self._other_ledger()

    def _other_ledger(self) -> UsageError:
        return UsageError(
            f"counter {self.full_name} is bound to another ledger than this job's: earlier jobs "
            "wrote to another database, or the ledger table has been emptied since. Let one "
            "database have one counter; if this is to be the counter's ledger from now on, call "
            "the job's rebind()"
        )

    def forget_destination(
        self, known: Sequence[str], destination: str, ledger: str
    ) -> list[Command[int]]:
        """Let the next flush decide anew where the counter goes.

        Batches in flight that are `known` to a ledger already go there, and nowhere else. 0: there
        are others in flight, and nothing was changed.
        """
        return [
            Command(
                (destination, ledger, *known),
                (
                    self._key(p, "meta"),
                    self._key(p, "batches"),
                    *(self._key(p, "b", batch) for batch in known),
                ),
                int,
                script("counter_forget"),
                repeatable=True,
            )
            for p in range(self.partitions)
        ]

    def add_one(self, raw: bytes, amounts: Sequence[int | None]) -> Command[None]:
        """Add the amounts of one hit."""
        keys = self._add_keys[partition(raw, self.partitions)]
        if self.columns.signs == "+":
            return Command((raw, str(amounts[0] or 0)), keys, self._applied, self._incr)
        values = ["" if a is None else str(a) for a in amounts]
        return Command(("", self.columns.signs, raw, *values), keys, self._applied, self._add)

    def _applied(self, reply: int) -> None:
        if reply < 0:
            raise UsageError(
                f"counter {self.full_name}: the pending sum would pass 2^53; nothing was added"
            )

    def parts(self, items: Iterable[Item]) -> Iterable[tuple[int, list[Item]]]:
        """Cut hits into (partition, part) small enough for one script each."""
        groups: dict[int, list[Item]] = {}
        if self.partitions == 1:
            groups[0] = list(items)
        else:
            for item in items:
                groups.setdefault(partition(item[0], self.partitions), []).append(item)
        for p, group in groups.items():
            for start in range(0, len(group), PART_IDS):
                yield from ((p, part) for part in _light(group[start : start + PART_IDS]))

    def add(
        self,
        p: int,
        items: Sequence[Item],
        fence: tuple[str, int] | None = None,
    ) -> Command[int]:
        """Add one part, all or nothing; each id once. The reply says -n: the n-th is too big.

        With a fence, (producer, sequence), saying it again changes nothing.
        """
        args: list[bytes | str] = ["" if fence is None else str(fence[1]), self.columns.signs]
        args += [raw for raw, _ in items]
        for c in range(len(self.columns)):
            args += ["" if amounts[c] is None else str(amounts[c]) for _, amounts in items]
        keys = self._add_keys[p]
        if fence is not None:
            keys = (*keys, self._key(p, "f", fence[0]))
        return Command(tuple(args), keys, int, self._add, repeatable=fence is not None)

    def pending(self, raw: bytes, column: str | None) -> Command[int | None]:
        """Read the pending amount of one id."""
        key = self._pending[self.partition(raw)][self.columns.index(column)]
        return Command(("ZSCORE", key, raw), (key,), _amount, repeatable=True)

    def top(self, count: int, column: str | None) -> list[Command[Page]]:
        """Read the ids with the largest pending amounts of every partition."""
        at = self.columns.index(column)
        return [
            Command(
                ("ZRANGE", keys[at], "0", str(count - 1), "REV", "WITHSCORES"),
                (keys[at],),
                _page,
                repeatable=True,
                bulk=True,
            )
            for keys in self._pending
        ]

    def pending_page(self, p: int, column: str, start: int, stop: int) -> Command[Page]:
        """Read pending ids and amounts of a column, ranks start to stop - 1."""
        key = self._pending[p][self.columns.index(column)]
        return Command(
            ("ZRANGE", key, str(start), str(stop - 1), "WITHSCORES"),
            (key,),
            _page,
            repeatable=True,
            bulk=True,
        )

    def states(self) -> list[Command[State]]:
        """Look at every partition; changes nothing."""
        return [self.state(p, naming=False) for p in range(self.partitions)]

    def state(self, p: int, *, naming: bool = True) -> Command[State]:
        """Look at one partition, and see that its next batch has a name unless `naming=False`."""
        keys = (
            self._key(p, "meta"),
            self._since[p],
            self._key(p, "next"),
            self._key(p, "batches"),
            self._pending[p][0],
        )

        def parse(reply: list[Any]) -> State:
            next_id, since, size, flushed, destination, ledger, now, *batches = reply
            return State(
                p,
                next_id.decode(),
                int(since) if since else None,
                size,
                int(flushed) if flushed else None,
                destination.decode() or None,
                ledger.decode() or None,
                int(now),
                {b.decode(): int(c) for b, c in zip(batches[::2], batches[1::2], strict=True)},
            )

        return Command(
            (new_id() if naming else "",), keys, parse, script("counter_state"), repeatable=True
        )

    def claim(
        self, p: int, expected: str, chunk: int, destination: str, ledger: str
    ) -> Command[int]:
        """Claim what is pending in a partition as batch `expected`; -1: look again."""
        names = self.columns.names
        batch, *claimed = self._batch_keys(p, expected, names)
        keys = (
            self._key(p, "meta"),
            self._since[p],
            self._key(p, "next"),
            self._key(p, "batches"),
            batch,
            *self._pending[p],
            *claimed,
        )

        def parse(reply: int | bytes) -> int:
            if isinstance(reply, bytes):
                raise UsageError(
                    f"counter {self.full_name} has a column {reply.decode()!r} that this job does "
                    f"not know; it knows {', '.join(names)}"
                )
            if reply == -2:
                raise UsageError(
                    f"counter {self.full_name} does not flush to this job's destination any more: "
                    f"{destination}"
                )
            return reply

        # Guarded by `expected`: said again, it finds another next and changes nothing.
        return Command(
            (expected, new_id(), str(chunk), destination, ledger, *names),
            keys,
            parse,
            script("counter_claim"),
            repeatable=True,
        )

    def batch(self, p: int, batch: str) -> Command[Batch | None]:
        """Read what a claimed batch is; None when it has been acknowledged."""
        key = self._key(p, "b", batch)

        def parse(reply: list[Any]) -> Batch | None:
            if reply[0] is None:
                return None
            size, chunk, since, columns, *bound = reply
            names = tuple(columns.decode().split("\n"))
            return Batch(p, batch, int(size), int(chunk), int(since), names, *_texts(bound))

        fields = ("size", "chunk", "since", "columns", "destination", "ledger")
        return Command(("HMGET", key, *fields), (key,), parse, repeatable=True)

    def page(self, batch: Batch, start: int, stop: int) -> Command[Page]:
        """Read ids and amounts of the first column, ranks start to stop - 1."""
        key = self._key(batch.partition, "b", batch.id, batch.columns[0])
        return Command(
            ("ZRANGE", key, str(start), str(stop - 1), "WITHSCORES"),
            (key,),
            _page,
            repeatable=True,
            bulk=True,
        )

    def more(self, batch: Batch, column: str, ids: Sequence[bytes]) -> Command[list[int | None]]:
        """Read the amounts that ids have in another column of a batch."""
        key = self._key(batch.partition, "b", batch.id, column)
        return Command(("ZMSCORE", key, *ids), (key,), _amounts, repeatable=True, bulk=True)

    def role(self, batch: Batch) -> Command[int]:
        """Count the replicas attached to the server that holds a batch."""
        key = self._key(batch.partition, "b", batch.id)
        return Command(("ROLE",), (key,), _role, repeatable=True, bulk=True)

    def wait(self, batch: Batch, milliseconds: int) -> list[Command[int]]:
        """Wait until a replica has the batch; the last reply counts those that have.

        WAIT looks at the writes of its own connection, so both must go out in one exchange.
        """
        key = self._key(batch.partition, "b", batch.id)
        return [
            Command((), (key,), int, script("counter_confirm"), repeatable=True, bulk=True),
            Command(("WAIT", "1", str(milliseconds)), (key,), int, repeatable=True, bulk=True),
        ]

    def ack(self, batch: Batch) -> Command[int]:
        """Drop a batch that is in SQL; 0 when another flusher has done so."""
        keys = (
            self._key(batch.partition, "meta"),
            self._key(batch.partition, "batches"),
            *self._batch_keys(batch.partition, batch.id, batch.columns),
        )
        return Command((batch.id,), keys, int, script("counter_ack"), repeatable=True)

    def held(self, raw: bytes, state: State) -> Command[Held | None]:
        """Read all that Redis holds of an id; None when the batches are not those of `state`."""
        p, names = state.partition, self.columns.names
        keys = [self._key(p, "next"), self._key(p, "batches"), *self._pending[p]]
        for batch in state.batches:
            keys += self._batch_keys(p, batch, names)
        width = len(names)

        def parse(reply: list[Any]) -> Held | None:
            if not reply:
                return None
            claimed = {}
            for i, batch in enumerate(state.batches):
                chunk, *scores = reply[width + i * (width + 1) : width + (i + 1) * (width + 1)]
                if chunk is not None:
                    claimed[batch] = (int(chunk), _amounts(scores))
            return Held(_amounts(reply[:width]), claimed)

        return Command(
            (raw, str(width), state.next, *state.batches),
            tuple(keys),
            parse,
            script("counter_value"),
            repeatable=True,
        )


def _light(part: list[Item]) -> list[list[Item]]:
    """Halve a part until each is light enough."""
    if len(part) * _keys.MAX_ID <= PART_BYTES or sum([len(raw) for raw, _ in part]) <= PART_BYTES:
        return [part]
    half = len(part) // 2
    return _light(part[:half]) + _light(part[half:])


def _texts(reply: list[bytes | None]) -> list[str | None]:
    return [None if text is None else text.decode() for text in reply]


def _amount(score: bytes | float | None) -> int | None:
    """Read a score: bytes in RESP2, a float in RESP3; infinite is the neutral amount."""
    if score is None:
        return None
    number = float(score)
    return None if number in (float("inf"), float("-inf")) else int(number)


def _amounts(scores: Sequence[bytes | float | None]) -> list[int | None]:
    try:
        return list(map(int, scores))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return [_amount(score) for score in scores]


def _page(reply: list[Any]) -> Page:
    """Read members with scores: flat in RESP2, pairs in RESP3."""
    if reply and isinstance(reply[0], list):
        return [member for member, _ in reply], _amounts([score for _, score in reply])
    return reply[::2], _amounts(reply[1::2])


def _role(reply: list[Any]) -> int:
    """Return the number of replicas attached."""
    return len(reply[2]) if reply[0] == b"master" else 0
