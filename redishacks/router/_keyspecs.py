"""Which words of a command are keys, as the server itself says: `KeySpecs`, made from `COMMAND`.

    specs = KeySpecs(reply_of_command)               # once per process; RESP2 or RESP3, as bytes
    keys = specs.keys([b"BITOP", b"AND", b"to", b"a", b"b"])       # [b"to", b"a", b"b"]
    if keys is None:                                 # only the server can tell
        keys = specs.learn(words, reply_of([b"COMMAND", b"GETKEYS", *words]))

No I/O here. Servers from Redis 7 on describe nearly every command with key specifications; what
these leave open (SORT, MIGRATE), and all commands of Redis 6.2 whose keys may move, the server has
to be asked about: one round trip. The answer is kept by the call's *shape*, so a similar call is
answered at once: name, number of words, and of each word what could decide where keys are. That is
whether it is empty, what it says if it may be an option (letters, digits, `_` and `-`), and its
count of keys if it begins like a number. So `EVAL … 1 user:7 x-9:y` is asked once, but a key that
is one plain word might be an option, and such calls are asked once per key. A module's own code may
look at anything: its answers are not kept.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from redishacks.errors import UsageError

#: Positions of keys; None when only the server can tell.
_Found: TypeAlias = Sequence[int] | None
_Find: TypeAlias = Callable[[Sequence[bytes]], _Found]
_FindFrom: TypeAlias = Callable[[Sequence[bytes], int], _Found]
_Begin: TypeAlias = Callable[[Sequence[bytes]], Iterable[int]]
_Shape: TypeAlias = tuple[Any, ...]


#: Longer calls are not kept, nor those with a longer word that must be kept as it is.
_MOST_WORDS = 256
_LONGEST_OPTION = 32
_LONGEST_EXACT = 64
_OPTION = re.compile(rb"[A-Za-z0-9_-]+")
#: What `atoi` of a server reads, and what is a number for all of it.
_NUMERIC = re.compile(rb"\s*([+-]?\d+)")
_INTEGER = re.compile(rb"0|-?[1-9][0-9]*")


class Policy(NamedTuple):
    """To which nodes of a cluster a command goes, and how replies make one, as the server tips."""

    #: Such as "all_shards", "all_nodes" or "multi_shard".
    request: str | None
    #: Such as "agg_sum", "one_succeeded" or "all_succeeded".
    response: str | None


class _Invalid(Exception):
    """The words do not fit a specification: the server finds no keys in such a call."""


class _Rule(NamedTuple):
    """What the server says about a command or a subcommand."""

    name: str
    #: How many words it has, at least and at most.
    least: int
    most: int
    flags: frozenset[str]
    policy: Policy | None
    find: _Find
    #: Words that are keys in every call, whatever they say.
    sure: frozenset[int]
    #: A call may do without keys.
    optional: bool
    #: Its answers depend on nothing but a call's shape.
    learns: bool
    #: The server says no more than first, last and step.
    legacy: bool
    subcommands: Mapping[bytes, _Rule]


class KeySpecs:
    """Finds the keys in calls of one server's commands.

    `reply` is that of `COMMAND`; `most_learned` is how many shapes of calls are kept, the most
    recently used ones. Threads may share it. Every method takes a call as the words that go on the
    wire, name first, case ignored; it raises `UsageError` for a command that the server does not
    know, and names the command, never its arguments. A command that was renamed in the server's
    configuration is in its reply under the old name, and so is not known.
    """

    def __init__(self, reply: Iterable[Any], *, most_learned: int = 1000) -> None:
        self._rules: dict[bytes, _Rule] = {}
        #: The commands that have one key, at word 1: how many words they have.
        self._one: dict[bytes, tuple[int, int]] = {}
        self._learned: dict[_Shape, tuple[int, ...]] = {}
        self._most_learned = most_learned
        self._lock = threading.Lock()
        try:
            for entry in reply:
                if entry is not None:
                    self._add(entry)
        except (TypeError, ValueError, LookupError, AttributeError):
            raise UsageError("this is not what COMMAND replies") from None
        if not self._rules:
            raise UsageError("COMMAND replied without any command")

    def keys(self, words: Sequence[bytes]) -> list[bytes] | None:
        """Return the keys of a call in the order of its words, or None: ask the server.

        None means `COMMAND GETKEYS` with these words, and `learn` with its reply. Channels of
        sharded pub/sub count as keys, since they too decide the node. A wrong number of words, or
        words in which the server would find no key where one must be, is `UsageError`.
        """
        if words and (bounds := self._one.get(words[0])) and bounds[0] <= len(words) <= bounds[1]:
            return [words[1]]
        rule = self._rule(words)
        try:
            found = rule.find(words)
        except _Invalid:
            found = ()
        else:
            if found is None:
                # Redis 7.0 cannot be asked about a call of one word.
                found = self._recall(rule, words) if len(words) > 1 else ()
                return None if found is None else [words[at] for at in found]
        if not found and not rule.optional:
            raise _no_keys(rule)
        return [words[at] for at in found]

    def bounds(self, name: bytes) -> tuple[int, int] | None:
        """Return how many words a command has whose one key is word 1, at least and at most.

        None for all others, and for a name that is written in both cases.
        """
        return self._one.get(name)

    def learn(self, words: Sequence[bytes], reply: Sequence[bytes] | Exception) -> list[bytes]:
        """Take what the server replied to `COMMAND GETKEYS` of these words; return the keys.

        `reply` is a list, or the error: Redis 6.2 has one for calls without keys (`EVAL … 0`),
        which is learned as well. Later servers mean by it that the call is wrong: `UsageError`. Any
        other error is raised as it is. Keys that are the same as another word are returned, but
        not kept: the reply does not tell which of the words they are.
        """
        rule = self._rule(words)
        if isinstance(reply, Exception):
            text = str(reply)
            if "Invalid arguments specified" not in text and "no key arguments" not in text:
                raise reply
            if not rule.legacy and not rule.optional:
                raise _no_keys(rule) from None
            reply = ()
        places: dict[bytes, list[int]] = {key: [] for key in reply}
        for at in range(1, len(words)):
            if words[at] in places:
                places[words[at]].append(at)
        if not all(places.values()):
            raise UsageError(f"{rule.name}: the reply has keys that are not in this call")
        if len(reply) != sum(map(len, places.values())):
            return sorted(reply, key=lambda key: places[key])
        found = tuple(sorted(at for some in places.values() for at in some))
        shape = _shape(rule, words)
        if shape is not None and rule.sure.issubset(found):
            with self._lock:
                self._learned.pop(shape, None)
                self._learned[shape] = found
                if len(self._learned) > self._most_learned:
                    del self._learned[next(iter(self._learned))]
        return [words[at] for at in found]

    def flags(self, words: Sequence[bytes]) -> frozenset[str]:
        """Return the command's flags, such as "readonly", "write", "blocking" or "noscript".

        Redis 6.2 does not flag what may block, but has a category of it: "blocking" is added.
        """
        return self._rule(words).flags

    def is_read_only(self, words: Sequence[bytes]) -> bool:
        """Return whether the command never writes."""
        return "readonly" in self._rule(words).flags

    def is_blocking(self, words: Sequence[bytes]) -> bool:
        """Return whether the command is one that may block; XREAD is, also without BLOCK."""
        return "blocking" in self._rule(words).flags

    def policy(self, words: Sequence[bytes]) -> Policy | None:
        """Return which nodes it is for and how replies are put together; None if nothing is said.

        Redis 6.2 says nothing.
        """
        return self._rule(words).policy

    def _add(self, entry: Sequence[Any]) -> None:
        rule = _rule(entry)
        key = rule.name.lower().encode()
        self._rules[key] = rule
        if not rule.subcommands and rule.find is _first_word:
            self._one[key] = self._one[key.upper()] = (max(rule.least, 2), rule.most)

    def _rule(self, words: Sequence[bytes]) -> _Rule:
        """Look a call up; raise for what the server does not know, or calls of a wrong length."""
        if not words or not isinstance(words[0], bytes):
            raise UsageError("a command is a sequence of bytes, its name first")
        rule = self._rules.get(words[0].lower())
        if rule is None:
            raise UsageError(f"{_shown(words[0])}: the server does not know this command")
        if rule.subcommands and len(words) > 1:
            container, rule = rule, rule.subcommands.get(words[1].lower())
            if rule is None:
                raise UsageError(f"{container.name}: the server does not know this subcommand")
        if not rule.least <= len(words) <= rule.most:
            raise UsageError(f"{rule.name}: wrong number of arguments, {len(words) - 1} were given")
        return rule

    def _recall(self, rule: _Rule, words: Sequence[bytes]) -> _Found:
        shape = _shape(rule, words)
        if shape is None:
            return None
        with self._lock:
            found = self._learned.pop(shape, None)
            if found is not None:
                self._learned[shape] = found
        return found


def _shape(rule: _Rule, words: Sequence[bytes]) -> _Shape | None:
    """Return all of a call that may decide where its keys are; None if that is too much."""
    many = len(words)
    if many > _MOST_WORDS or not rule.learns:
        return None
    shape: list[Any] = [words[0].lower()]
    for at in range(1, many):
        word = words[at]
        if at in rule.sure:
            shape.append(None)
        elif b"\0" in word:  # a server's comparisons of strings end there
            if len(word) > _LONGEST_EXACT:
                return None
            shape.append(word)
        elif number := _NUMERIC.match(word):
            if len(number[1]) <= 18:
                shape.append(_count(word, int(number[1]), many))
            elif len(word) <= _LONGEST_EXACT:
                shape.append(word)
            else:
                return None
        elif len(word) <= 2 or (len(word) <= _LONGEST_OPTION and _OPTION.fullmatch(word)):
            shape.append(word.lower())
        else:
            shape.append(None)
    return tuple(shape)


def _count(word: bytes, value: int, many: int) -> _Shape:
    """Return what a server may make of a number; counts that are out of reach are alike."""
    low = (value + 2**31) % 2**32 - 2**31  # some keep no more than these bits
    exact = _INTEGER.fullmatch(word) is not None
    return exact, min(max(value, -1), many), min(max(low, -1), many)


# Reading the reply of COMMAND


def _rule(entry: Sequence[Any]) -> _Rule:
    """Read what is said about one command."""
    name, arity, raw_flags, first, last, step = entry[:6]
    flags = _texts(raw_flags)
    categories = _texts(entry[6]) if len(entry) > 6 else frozenset()
    tips = _texts(entry[7]) if len(entry) > 7 else frozenset()
    legacy = len(entry) <= 8
    movable, module = "movablekeys" in flags, "module" in flags or "." in _text(name)
    sure: set[int] = set()
    optional = "no_mandatory_keys" in flags or module
    find: _Find
    if legacy:
        optional = True
        find = _ask if movable else _by_table(first, last, step)
        if find is _first_word:
            sure.add(1)
    else:
        specs = [_Spec.read(spec) for spec in entry[8]]
        # A module's command of fixed words is movable when code of the module finds its keys.
        asks = module and movable and all(spec.at_index and spec.by_range for spec in specs)
        find = _ask if asks else _by_specs(specs)
        # An option that is sought backwards may be found in any word: MIGRATE … KEYS.
        if not asks and not any(spec.backwards for spec in specs):
            sure.update(spec.key for spec in specs if spec.key)
        optional = optional or all(spec.channels for spec in specs)
    return _Rule(
        name=_text(name).upper().replace("|", " "),
        least=abs(arity),
        most=arity if arity > 0 else sys.maxsize,
        flags=flags | {"blocking"} if "@blocking" in categories else flags,
        policy=_policy(tips),
        find=find,
        sure=frozenset(sure),
        optional=optional,
        learns=not module,
        legacy=legacy,
        subcommands={
            _text(sub[0]).lower().partition("|")[2].encode(): _rule(sub)
            for sub in (entry[9] if len(entry) > 9 else ())
        },
    )


def _first_word(words: Sequence[bytes]) -> _Found:
    if len(words) < 2:
        raise _Invalid
    return (1,)


def _ask(words: Sequence[bytes]) -> _Found:
    return None


def _by_table(first: int, last: int, step: int) -> _Find:
    """Find keys by first, last and step, which is all that Redis 6.2 says."""
    if first == last == 1:
        return _first_word

    def find(words: Sequence[bytes]) -> _Found:
        end = last if last >= 0 else len(words) + last
        found = range(first, end + 1, step or 1) if first else ()
        return found if not found or found[-1] < len(words) else ()

    return find


def _by_specs(specs: Sequence[_Spec]) -> _Find:
    """Find the keys of all specifications together."""
    if len(specs) == 1 and specs[0].key == 1:
        return _first_word
    if not all(spec.known for spec in specs):
        return _ask
    if len(specs) == 1:
        begin, find = specs[0].begin, specs[0].find

        def find_one(words: Sequence[bytes]) -> _Found:
            for first in begin(words):
                return find(words, first)
            return ()

        return find_one
    indexes = sum(spec.at_index for spec in specs)

    def find_all(words: Sequence[bytes]) -> _Found:
        begins = [(spec, first) for spec in specs for first in spec.begin(words)]
        if len(begins) > indexes + 1:  # one of two options may be a key; or a server heeds the last
            return None
        every: set[int] = set()
        for spec, first in begins:
            found = spec.find(words, first)
            if found is None:
                return None
            every.update(found)
        return sorted(every)

    return find_all


class _Spec(NamedTuple):
    """One key specification."""

    #: Not `unknown`, and not `incomplete`: it tells all keys of its kind.
    known: bool
    #: It is for channels of sharded pub/sub.
    channels: bool
    #: Its keys begin at a certain word, not after an option.
    at_index: bool
    #: Its keys begin after an option that is sought from the end.
    backwards: bool
    #: Its keys are counted from there or from the end; no word says how many.
    by_range: bool
    #: The word that is a key in every call; 0 if there is none.
    key: int
    #: Returns where its keys may begin: after each of its options.
    begin: _Begin
    #: Returns where its keys are, given where they begin.
    find: _FindFrom

    @classmethod
    def read(cls, spec: Any) -> _Spec:
        """Read one; what a later server may say counts as `unknown`."""
        fields = _fields(spec)
        flags = _texts(fields["flags"])
        kind, how = _part(fields["begin_search"])
        finds, what = _part(fields["find_keys"])
        at_index, by_range = kind == "index", finds == "range"
        complete = "incomplete" not in flags
        begin: _Begin = _nowhere
        find: _FindFrom = _unsure
        if at_index:
            begin = _begin_at(how["index"])
        elif kind == "keyword":
            begin = _begin_after(_bytes(how["keyword"]).lower(), how["startfrom"])
        if by_range:
            find = _find_range(what["lastkey"], what["keystep"], what["limit"])
        elif finds == "keynum":
            find = _find_counted(what["keynumidx"], what["firstkey"], what["keystep"])
        one = at_index and by_range and what["lastkey"] == 0 and complete
        return cls(
            known=complete and begin is not _nowhere and find is not _unsure,
            channels="not_key" in flags,
            at_index=at_index,
            backwards=kind == "keyword" and how["startfrom"] < 0,
            by_range=by_range,
            key=how["index"] if one else 0,
            begin=begin,
            find=find,
        )


def _nowhere(words: Sequence[bytes]) -> Iterable[int]:
    return ()


def _unsure(words: Sequence[bytes], first: int) -> _Found:
    return None


def _begin_at(index: int) -> _Begin:
    return lambda words: (index,)


def _begin_after(keyword: bytes, start: int) -> _Begin:
    """Begin after an option, which is looked for backwards from the end if `start` is negative."""
    size, alike = len(keyword) + 1, (keyword, keyword + b"\0")

    def begin(words: Sequence[bytes]) -> Iterable[int]:
        many = len(words)
        places = range(start, many - 1) if start > 0 else range(many + start, 0, -1)
        return (at + 1 for at in places if words[at][:size].lower() in alike)

    return begin


def _find_range(last: int, step: int, limit: int) -> _FindFrom:
    """Find keys up to a word counted from the first, or from the end if it is negative."""

    def find(words: Sequence[bytes], first: int) -> _Found:
        many = len(words)
        if last >= 0:
            end = first + last
        elif limit > 1:
            end = first + (many - first) // limit + last
        else:
            end = many + last
        if not first <= end < many:
            raise _Invalid
        return range(first, end + 1, step)

    return find


def _find_counted(count_at: int, first_at: int, step: int) -> _FindFrom:
    """Find as many keys as a word says."""

    def find(words: Sequence[bytes], first: int) -> _Found:
        many = len(words)
        if first + count_at >= many:
            raise _Invalid
        word = words[first + count_at]
        if len(word) > 9 or not _INTEGER.fullmatch(word):
            return None  # some servers take `1x` for 1, and 4294967297
        count = int(word)
        first += first_at
        end = first + (count - 1) * step
        if count < 1 or end >= many:
            raise _Invalid
        return range(first, end + 1, step)

    return find


def _part(part: Any) -> tuple[str, dict[str, Any]]:
    """Return the type and the fields of one half of a specification."""
    fields = _fields(part)
    return _text(fields["type"]), _fields(fields["spec"])


def _fields(value: Any) -> dict[str, Any]:
    """Return a map, which RESP2 writes as a list of names and values in turn."""
    if isinstance(value, Mapping):
        return {_text(name): field for name, field in value.items()}
    names = iter(value)
    return {_text(name): field for name, field in zip(names, names, strict=True)}


def _policy(tips: Iterable[str]) -> Policy | None:
    said = dict(tip.split(":", 1) for tip in tips if ":" in tip)
    policy = Policy(said.get("request_policy"), said.get("response_policy"))
    return policy if any(policy) else None


def _texts(values: Iterable[Any]) -> frozenset[str]:
    return frozenset(map(_text, values))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _shown(name: bytes) -> str:
    """Return a name for a message: no more than one word of it, it may be a whole command."""
    words = name.split()
    return repr(words[0][:32].decode(errors="replace") if words else "")


def _no_keys(rule: _Rule) -> UsageError:
    return UsageError(f"{rule.name}: the server finds no keys in these arguments")
