"""What a rate limiter says to Redis: its keys and its commands. No I/O here.

The keys of the limiter `api`, for the key `u1` and a limit of 20 per minute (each has a TTL, until
nothing in it counts any more):

    rh:r1:{api/u1}:w60000000.30     string   a window: counts of 31 buckets, packed
    rh:r1:{api|user/u1}:f60000000   string   a fixed window for the part "user" of a mapping of keys
    rh:r1:{api/u1}:ban              string   refusals, and until when it is banned
    rh:r1:{api}:refused:<hour>      zset     keys and how often they were refused; TTL 25 hours

With `tag="name"` the braces enclose the limiter's name only, so that keys of different parts share
a slot. The algorithm and the length stand in the key, the amount does not: it may change any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from zlib import crc32

from redishacks import _keys
from redishacks._command import Command, script
from redishacks._transport import packed
from redishacks.errors import UsageError
from redishacks.ratelimit.limit import Ban, CostError, Limit

Key = str | int | bytes
Verb = Literal["hit", "try", "charge", "turn", "peek", "note"]


class Rule(NamedTuple):
    """A limit, and the part of the key that it counts."""

    limit: Limit | Ban
    part: str | None


class Question(NamedTuple):
    """Which limits decide on a hit, side by side; and the command that asks them."""

    rules: tuple[Rule, ...]
    keys: tuple[bytes, ...]
    #: Algorithm, amount, a, b and cost of each.
    fields: tuple[tuple[str, ...], ...]
    costs: tuple[int, ...]
    #: Charge one unit, if all allow it.
    hit: Command[list[int]]
    #: Nobody needs to be asked: there is no limit, or one of 0.
    idle: bool
    #: How people know the key.
    label: bytes
    #: The key, unless it is a mapping.
    raw: bytes | None


class Layout:
    """Keys and commands of one limiter."""

    def __init__(self, prefix: str, name: str, tag: str) -> None:
        if tag not in ("key", "name"):
            raise UsageError(f'tag is "key" or "name", not {tag!r}')
        self._prefix = _keys.check_name(prefix, "prefix")
        # What follows the name is the key, whatever it holds: neither mark may stand before it.
        self._name = _marked(_keys.check_name(name, "a limiter's name"))
        self._by_key = tag == "key"
        self._script = script("ratelimit_decide")
        self._window = script("ratelimit_window")

    def key(self, part: str | None, raw: bytes, shape: str) -> bytes:
        """Return the Redis key of a limit's state."""
        place = f"/{_keys.quote_bytes(raw)}"
        if part is not None:
            place = f"|{_marked(_keys.quote(part))}{place}"
        if self._by_key:
            return _keys.make(self._prefix, "r1", self._name + place, shape)
        return _keys.make(self._prefix, "r1", self._name, place, shape)

    def refusals_key(self, hour: int) -> bytes:
        """Return the key that holds how often each key was refused in an hour since 1970."""
        return _keys.make(self._prefix, "r1", self._name, "refused", str(hour))

    def question(
        self,
        key: Key | Mapping[str, Key],
        limits: Sequence[Limit],
        cost: int | Mapping[str, int] = 1,
        ban: Ban | None = None,
    ) -> Question:
        """Put together who decides on a hit; limits without an amount have no say."""
        raws: dict[str | None, bytes]
        if isinstance(key, Mapping):
            if not key:
                raise UsageError("a mapping of keys needs at least one part")
            if not all(isinstance(part, str) for part in key):
                raise UsageError(f"parts of a key have names, which are str: {list(key)!r}")
            raws = {part: _keys.id_bytes(value, "key") for part, value in key.items()}
        else:
            raws = {None: _keys.id_bytes(key, "key")}
        if isinstance(cost, Mapping):
            _check_names(cost, limits)
        rules: list[Rule] = []
        keys: list[bytes] = []
        fields: list[tuple[str, ...]] = []
        costs: list[int] = []
        for limit in limits:
            for part in _parts(limit, raws):
                if limit.amount is None:
                    continue
                units = _cost(limit, cost)
                rules.append(Rule(limit, part))
                keys.append(self.key(part, raws[part], limit.shape))
                costs.append(units)
                algorithm, amount, a, b = limit.fields
                if limit.spread:
                    b = str(crc32(raws[part]) * limit.micros >> 32)
                fields.append((algorithm, amount, a, b, str(units)))
        if len(set(keys)) < len(keys):
            raise UsageError(
                "two limits of the same algorithm and length on one key would share their count: "
                "the lower one is enough"
            )
        if ban is not None and rules:
            for part, raw in raws.items():
                rules.append(Rule(ban, part))
                keys.append(self.key(part, raw, "ban"))
                costs.append(0)
                fields.append(ban.fields)
        idle = not rules or any(rule.limit.amount == 0 for rule in rules)
        question = Question(
            tuple(rules), tuple(keys), tuple(fields), tuple(costs), _NOTHING, idle, _label(raws),
            raws.get(None),
        )  # fmt: skip
        return question._replace(hit=packed(self.decide(question, "hit")))

    def decide(self, question: Question, verb: Verb, most: int = 1) -> Command[list[int]]:
        """Ask the limits. The reply: now, units charged, and four figures for each limit."""
        if verb in ("hit", "try") and all(each[0] == "w" for each in question.fields):
            fields = [field for each in question.fields for field in each[1:]]
            return Command((str(most), *fields), question.keys, script=self._window)
        fields = [field for each in question.fields for field in each]
        return Command((verb, str(most), *fields), question.keys, script=self._script)

    def charge(self, question: Question, cost: int) -> Command[list[int]]:
        """Charge so much, whatever room there is."""
        fields: list[str] = []
        for given in question.fields:
            fields += (*given[:4], given[4] if given[0] == "b" else str(cost))
        return Command(("charge", "1", *fields), question.keys, script=self._script)

    def refund(
        self,
        question: Question,
        costs: Sequence[int],
        at: Sequence[int],
        verb: Literal["refund", "cancel"] = "refund",
    ) -> Command[list[int]]:
        """Give back so much to each limit, of what was charged at these moments.

        `cancel` gives back a turn, unless there are later ones.
        """
        fields: list[str] = []
        for given, cost, moment in zip(question.fields, costs, at, strict=True):
            fields += (*given[:4], given[4] if given[0] == "b" else str(cost), str(moment))
        return Command((verb, "0", *fields), question.keys, script=self._script)

    def note(self, question: Question, refusals: int) -> list[Command[Any]]:
        """Tell the bans on a key of refusals that were made without asking Redis."""
        bans = [i for i, fields in enumerate(question.fields) if fields[0] == "b"]
        if not bans:
            return []
        fields = [field for i in bans for field in question.fields[i]]
        keys = tuple(question.keys[i] for i in bans)
        return [Command(("note", str(refusals), *fields), keys, script=self._script)]

    def tell(self, hour: int, refused: Mapping[bytes, int]) -> Command[Any]:
        """Add to how often each key was refused in an hour."""
        pairs = [text for label, times in refused.items() for text in (label, str(times))]
        args: tuple[bytes | str, ...] = (str(MOST_REMEMBERED), str(_REMEMBER), *pairs)
        return Command(args, (self.refusals_key(hour),), script=script("ratelimit_note"))

    def top(self, hour: int, count: int) -> Command[list[tuple[str | bytes, int]]]:
        """Read the keys refused most in an hour, with how often."""

        def parse(reply: list[Any]) -> list[tuple[str | bytes, int]]:
            flat = [item for pair in reply for item in pair] if _nested(reply) else reply
            return [
                (_keys.id_shown(key), int(float(times)))
                for key, times in zip(flat[::2], flat[1::2], strict=True)
            ]

        key = self.refusals_key(hour)
        args = ("ZRANGE", key, "0", str(count - 1), "REV", "WITHSCORES")
        return Command(args, (key,), parse, repeatable=True)

    def announce(
        self, limits: Iterable[Limit], now: int, parse: Callable[[Any], None]
    ) -> Command[Any]:
        """Say which limits there are, at this time in seconds since 1970."""
        pairs = [
            text
            for limit in limits
            for text in (f"{limit.shape} {limit.name or ''}", limit.to_json())
        ]
        key = _keys.make(self._prefix, "r1", self._name, "limits")
        args = (str(now), str(_REMEMBER), *pairs)
        return Command(args, (key,), parse, script("ratelimit_announce"), repeatable=True)

    def announced(self) -> Command[list[Limit]]:
        """Read which limits there are."""
        key = _keys.make(self._prefix, "r1", self._name, "limits")

        def parse(reply: list[bytes]) -> list[Limit]:
            return [Limit.from_json(text.partition(b" ")[2]) for text in reply]

        return Command(("HVALS", key), (key,), parse, repeatable=True)

    def alive(self, process: str, ttl: float, parse: Callable[[int], None]) -> Command[Any]:
        """Say that a process is there, and count those that were within `ttl` seconds."""
        key = _keys.make(self._prefix, "r1", self._name, "processes")
        args = (process, str(round(ttl * 1000)))
        return Command(args, (key,), parse, script("ratelimit_alive"), repeatable=True)

    def forget(self, question: Question) -> Command[int]:
        """Forget all that these limits have counted."""
        return Command(("UNLINK", *question.keys), question.keys, int, repeatable=True)


#: Keys of which refusals are remembered, per hour, and for how many seconds.
MOST_REMEMBERED = 1_000
_REMEMBER = 25 * 3600

_NOTHING: Command[list[int]] = Command(())


def _marked(text: str) -> str:
    return text.replace("/", "%2F").replace("|", "%7C")


def _label(raws: Mapping[str | None, bytes]) -> bytes:
    """Return how people know a key: as it is, or each part with its name."""
    if None in raws:
        return raws[None]
    return " ".join(f"{part}={_keys.quote_bytes(raw)}" for part, raw in raws.items()).encode()


def _nested(reply: list[Any]) -> bool:
    """Return whether members and scores come in pairs, as in RESP3."""
    return bool(reply) and isinstance(reply[0], list)


def _parts(limit: Limit, raws: Mapping[str | None, bytes]) -> Sequence[str | None]:
    """Return the parts that a limit counts: the one of its name, or all when it has none."""
    if None in raws or limit.name is None:
        return list(raws)
    if limit.name not in raws:
        shown = ", ".join(map(str, raws))
        raise UsageError(f"limit {limit.name!r} has no part of the key: the parts are {shown}")
    return [limit.name]


def _check_names(cost: Mapping[str, int], limits: Sequence[Limit]) -> None:
    """Refuse costs of limits that are not there."""
    names = {limit.name for limit in limits}
    strange = [name for name in cost if name not in names]
    if strange:
        shown = ", ".join(sorted(filter(None, names))) or "none has one"
        raise CostError(f"a cost names a limit, and there is none named {strange[0]!r}: {shown}")


def _cost(limit: Limit, cost: int | Mapping[str, int]) -> int:
    """Return what a hit costs of a limit."""
    units = cost.get(limit.name or "", 1) if isinstance(cost, Mapping) else cost
    if isinstance(units, bool) or not isinstance(units, int) or units < 1:
        raise CostError(f"a cost is a positive int, not {units!r}")
    if units > limit.most > 0:
        at_once = "a burst" if limit.algorithm == "gcra" else "a limit"
        raise CostError(f"a cost of {units} is above {at_once} of {limit.most}: never allowed")
    return units
