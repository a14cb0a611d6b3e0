"""Which words of a command are keys: what `KeySpecs` says, against the servers' own answers."""

from __future__ import annotations

import random
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redishacks._command import Command
from redishacks._slots import key_slot
from redishacks._transport import connect
from redishacks.errors import ServerError, UsageError
from redishacks.router._keyspecs import KeySpecs, Policy
from redishacks.testing import Binary, Cluster, Server, serve, servers_available

Words = list[bytes]

#: How a test writes that a call is wrong, for us or for the server.
WRONG = "wrong"
NO_KEYS = "no key arguments"
NONE_FOUND = "Invalid arguments specified"

#: Words marked with @ are keys.
CALLS = """
GET @k
gEt @k
SET @k v EX 60 NX GET
SET @k get
SETRANGE @k 3 x
GETEX @k PERSIST
MGET @a @b @c
MGET @a @b @a
MSET @a 1 @b 2 @c 3
MSETNX @a 1
DEL @del @x
UNLINK @a
EXISTS @a @a
TOUCH @a @b
RENAME @a @b
RENAMENX @a @b
COPY @a @b DB 1 REPLACE
DUMP @k
RESTORE @k 0 payload REPLACE
WATCH @a @b
BITOP NOT @to @a
bitop and @to @a @b @c
BITFIELD @k GET u8 0 SET u8 0 1
BITFIELD_RO @k GET u8 0
BITCOUNT @k 0 -1
OBJECT ENCODING @k
object freq @encoding
OBJECT HELP
MEMORY USAGE @k SAMPLES 5
memory usage @usage
MEMORY DOCTOR
XADD @s NOMKSTREAM MAXLEN ~ 10 * f v
XGROUP CREATE @s g $ MKSTREAM
XGROUP DESTROY @create g
XGROUP HELP
XINFO STREAM @s FULL
XINFO HELP
XREAD STREAMS @a $
xread count 2 block 0 streams @a @b 0 0
XREAD STREAMS @STREAMS 0
XREAD STREAMS @STREAMS @COUNT 0 0
XREADGROUP GROUP g c COUNT 1 NOACK STREAMS @a @b > >
XREADGROUP GROUP streams STREAMS STREAMS @a >
XACK @s g 1-1
XCLAIM @s g c 0 1-1 JUSTID
XAUTOCLAIM @s g c 0 0
XPENDING @s g
EVAL "return 1" 0
EVAL "return 1" 0 a b
EVAL "return 1" 2 @a @b c
EVAL "return 1" 1 @1 2
EVAL "return 1" 3 @2 @0 @1
EVALSHA e0e1f9fabfc9d4800c877a703b823ac0578ff8db 1 @k 60 1700000000.5
EVALSHA 60e1f9fabfc9d4800c877a703b823ac0578ff8db 1 @k a
EVALSHA 6000000000009d4800c877a703b823ac0578ff8d 1 @k a
EVAL_RO "return 1" 1 @k
FCALL f 1 @k a
FCALL f 0
FCALL_RO f 2 @a @b
ZUNIONSTORE @to 2 @a @b WEIGHTS 1 2 AGGREGATE MAX
ZINTERSTORE @to 1 @WEIGHTS WEIGHTS 2
ZDIFFSTORE @1 2 @2 @3
ZUNION 2 @a @b WITHSCORES
ZINTER 1 @a
ZDIFF 2 @a @b
ZINTERCARD 2 @a @b LIMIT 1
ZRANGESTORE @to @from 0 -1
ZMPOP 2 @a @b MIN COUNT 3
BZMPOP 0 2 @a @b MAX
LMPOP 2 @a @b LEFT COUNT 2
BLMPOP 0.1 1 @LEFT LEFT
BLMPOP 1 1 @1 LEFT COUNT 1
SINTERCARD 2 @a @b LIMIT 0
SINTERSTORE @to @a @b
SUNION @a @b
SMOVE @a @b member
SORT @l
SORT @store
SORT @l BY w_* LIMIT 0 5 GET # GET o_* ASC ALPHA STORE @to
SORT @l STORE a store @b
SORT @l BY STORE STORE @to
SORT @l LIMIT STORE STORE STORE @to
SORT @l GET STORE GET to
SORT_RO @l BY x GET y
GEORADIUS @k 1 2 3 km
GEORADIUS @k 13.361389 38.115556 3 km WITHDIST COUNT 3 ASC STORE @to
GEORADIUS @k 1 2 3 km STOREDIST @to WITHDIST
GEORADIUS @k 1 2 3 km STORE @STOREDIST
GEORADIUS @k 1 2 3 km STORE @store
GEORADIUSBYMEMBER @k m 3 km STORE @to
GEORADIUSBYMEMBER @k STORE 3 km
GEORADIUSBYMEMBER @k STORE 3 km STORE @STORE
GEORADIUS_RO @k 1 2 3 km
GEOSEARCHSTORE @to @from FROMMEMBER m BYRADIUS 1 km STOREDIST
MIGRATE h 6379 @k 0 1000
MIGRATE 127.0.0.1 6379 @k 0 1000 COPY REPLACE
MIGRATE h 6379 @KEYS 0 1000 COPY REPLACE
MIGRATE h 6379 "" 0 1000 KEYS @a @b
MIGRATE h 6379 "" 0 1000 REPLACE AUTH secret keys @a @KEYS
BLPOP @a @b 0
BLMOVE @a @b LEFT RIGHT 0
BRPOPLPUSH @a @b 0
BZPOPMIN @a @b 0
PFCOUNT @a @b
PFMERGE @to @a
LCS @a @b LEN
STRALGO LCS KEYS @a @b IDX
STRALGO LCS STRINGS a b
MSETEX 2 @a 1 @b 2 EX 5
HSET @h f v
HEXPIRE @h 10 FIELDS 1 f
PUBLISH channel m
SUBSCRIBE a b
PING
ping hello
DBSIZE
SCAN 0 MATCH x
CONFIG GET maxmemory
config get get
CLIENT LIST
SCRIPT LOAD x
CLUSTER KEYSLOT k
COMMAND GETKEYS GET k
SELECT 1
MULTI
HELLO 3
SWAPDB 0 1
"""

#: Of which servers say different things: Redis 7.0 names a key that it does not write to.
DOUBTFUL_CALLS = """
GEORADIUS k 1 2 3 km STORE a STORE b
GEORADIUS k 1 2 3 km STORE a STOREDIST b
GEORADIUS k 1 2 3 km STOREDIST a STORE b
GEORADIUSBYMEMBER k m 3 km STORE a store b
GEORADIUS k 1 2 3 km STORE STOREDIST ASC
MIGRATE h 6379 "" 0 1000 AUTH KEYS KEYS a
MIGRATE h 6379 "" 0 1000 AUTH2 KEYS KEYS KEYS a
MIGRATE h 6379 "" 0 1000 KEYS
SORT l STORE
XREADGROUP COUNT 1 GROUP g STREAMS STREAMS k >
ZDIFF 1.5 a
ZUNION 1x a
EVAL return 4294967297 a
"""

#: Calls that are wrong: the server finds no keys either, or does not know them.
WRONG_CALLS = """
GET
GET a b
SET a
BITOP AND
NOSUCH a
ZUNIONSTORE to 0 a
ZUNIONSTORE to 3 a b
ZUNIONSTORE to x a b
ZUNIONSTORE to -1 a b
ZUNION 9999999999 a
LMPOP 5 a LEFT
XREAD COUNT 1 BLOCK
XREAD COUNT 1 STREAMS
XREADGROUP GROUP STREAMS c COUNT 1 k 0
MSETEX 3 a 1 b 2
OBJECT ENCODING
OBJECT NOSUCH k
XGROUP CREATE
EVAL x
MIGRATE h 6379 k 0 1000 KEYS a
"""


def call(line: str) -> Words:
    """Read a line of text as a call, without marks."""
    return [word.removeprefix("@").encode() for word in shlex.split(line)]


def marked(line: str) -> Words:
    """Return the words of a line that are marked as keys."""
    return [word[1:].encode() for word in shlex.split(line) if word.startswith("@")]


def command(words: Sequence[bytes]) -> Command[Any]:
    """Make what a transport takes; asking for keys may be repeated."""
    return Command(tuple(words), repeatable=True)


class Told:
    """A server, and what it says of its commands."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.transport = connect(server.client(protocol=2))
        self.reply: list[Any] = self.transport.call(command([b"COMMAND"]), 10.0)
        self.specs = KeySpecs(self.reply)
        self.legacy = len(self.reply[0]) < 9

    def ask(self, calls: Sequence[Words]) -> list[Any]:
        """Return the replies to COMMAND GETKEYS: lists, or errors."""
        replies: list[Any] = []
        for start in range(0, len(calls), 2000):
            asked = [command([b"COMMAND", b"GETKEYS", *w]) for w in calls[start : start + 2000]]
            for outcome in self.transport.run(asked, 30.0):
                assert outcome.error is None or isinstance(outcome.error, ServerError)
                replies.append(outcome.value if outcome.error is None else outcome.error)
        return replies

    def theirs(self, reply: Any) -> Any:
        """Say what a reply means; Redis 6.2 has one error for no keys, and for wrong ones.

        Redis 7.0 says nothing of calls of one word: None.
        """
        if not isinstance(reply, Exception):
            return sorted(reply)
        if "command|getkeys" in str(reply):
            return None
        if NO_KEYS in str(reply) or (self.legacy and NONE_FOUND in str(reply)):
            return []
        return WRONG

    def ours(self, specs: KeySpecs, words: Words, reply: Any) -> tuple[Any, bool]:
        """Say what `specs` finds, and whether it had to be told this reply."""
        told = False
        try:
            keys = specs.keys(words)
            if keys is None:
                told = True
                keys = specs.learn(words, reply)
        except (UsageError, ServerError):
            return WRONG, told
        return sorted(keys), told

    def compare(self, calls: Sequence[Words], specs: KeySpecs | None = None) -> int:
        """Check that all calls have the keys that the server says; return how often it was asked.

        Whoever was told finds the same, whether from memory or not at all.
        """
        asked = 0
        for words, reply in zip(calls, self.ask(calls), strict=True):
            used = specs or self.specs
            found, told = self.ours(used, words, reply)
            theirs = self.theirs(reply)
            assert found == theirs or (theirs is None and len(words) == 1), words
            if told and found != WRONG:
                asked += 1
                again = used.keys(words)
                assert again is None or sorted(again) == found, words
        return asked

    def entries(self) -> Iterator[tuple[Words, list[Any]]]:
        """Yield every command and subcommand: its name, and what the server says of it."""
        for entry in self.reply:
            yield [entry[0]], entry
            for sub in entry[9] if len(entry) > 9 else ():
                yield sub[0].split(b"|"), sub

    def knows(self, name: bytes) -> bool:
        """Return whether the server has this command."""
        return any(entry[0] == name.lower() for entry in self.reply)


def found(specs: KeySpecs, words: Words) -> Any:
    """Return the keys, None, or that the call is wrong."""
    try:
        return specs.keys(words)
    except UsageError:
        return WRONG


def label(binary: Binary) -> str:
    """Name a program."""
    return binary.kind


@pytest.fixture(scope="module", params=servers_available(), ids=label)
def told(request: pytest.FixtureRequest) -> Iterator[Told]:
    """Every server program that was found."""
    with serve(request.param) as server:
        yield Told(server)


@pytest.fixture(scope="module")
def new(valkey: Server) -> Told:
    """A server with key specifications."""
    return Told(valkey)


@pytest.fixture(scope="module")
def old(redis62: Server) -> Told:
    """A server without, if the `redis-server` found is that old."""
    told = Told(redis62)
    if not told.legacy:
        pytest.skip("no Redis 6.2")
    return told


# Against the server


def test_calls_by_hand(told: Told) -> None:
    """Keys are found as a reader of the documentation marks them, and as the server says."""
    lines = [line for line in CALLS.strip().splitlines() if told.knows(call(line)[0])]
    assert len(lines) > 80
    calls = [call(line) for line in lines]
    told.compare(calls)
    for line, words, reply in zip(lines, calls, told.ask(calls), strict=True):
        keys = told.specs.keys(words)
        if keys is None:
            keys = told.specs.learn(words, reply)
        assert keys == marked(line), line


def test_doubtful_calls_by_hand(told: Told) -> None:
    """Where a reader cannot be sure, keys are those that this very server says."""
    told.compare([call(line) for line in DOUBTFUL_CALLS.strip().splitlines()])


def test_wrong_calls_by_hand(told: Told) -> None:
    """What the server refuses is refused; Redis 6.2 cannot tell some of it from having no keys."""
    for line in WRONG_CALLS.strip().splitlines():
        words = call(line)
        [reply] = told.ask([words])
        found, _ = told.ours(told.specs, words, reply)
        assert found == told.theirs(reply) or len(words) == 1, line
        if not told.legacy:
            assert found == WRONG, line


def fields(value: list[Any]) -> dict[bytes, Any]:
    """Return a map in RESP2 as one."""
    return dict(zip(value[::2], value[1::2], strict=True))


def keyword_of(spec: Any) -> tuple[bytes, int] | None:
    """Return the option word of a key specification in RESP2, and from where it may stand."""
    how = fields(fields(fields(spec)[b"begin_search"])[b"spec"])
    return (how[b"keyword"], how[b"startfrom"]) if b"keyword" in how else None


def made_calls(name: Words, entry: list[Any], chance: random.Random) -> Iterator[Words]:
    """Yield calls of a command: of every length around its arity, with counts and its options."""
    arity, specs = entry[1], entry[8] if len(entry) > 8 else []
    options = [option for spec in specs if (option := keyword_of(spec))]
    lengths = [arity] if arity > 0 else range(-arity, -arity + 6)
    for length in lengths:
        for _ in range(6):
            words = [chance.choice([bytes.upper, bytes.lower])(word) for word in name]
            kinds = chance.choice([(0, 1), (0, 1, 2), (0, 0, 3), (0, 1, 2, 3)])
            for at in range(len(words), length):
                kind = chance.choice(kinds)
                fitting = [option for option, start in options if 0 < start <= at]
                if kind == 1:
                    words.append(chance.choice([b"0", b"1", b"2", b"3", b"01", b"2x", b"-1"]))
                elif kind == 2 and fitting:
                    word = chance.choice(fitting)
                    words.append(chance.choice([word, word.lower(), word + b"\0", word + b"x"]))
                elif kind == 3:
                    words.append(b"")
                else:
                    words.append(b"w:%d" % at)
            yield words


def test_every_command(told: Told) -> None:
    """Of every command and subcommand, calls of all kinds have the keys that the server says."""
    chance = random.Random(6)
    calls: list[Words] = []
    has_keys: list[bool] = []
    channels = 0
    for name, entry in told.entries():
        if any(b"not_key" in fields(spec)[b"flags"] for specs in entry[8:9] for spec in specs):
            channels += 1  # COMMAND GETKEYS denies them: they have a test of their own
            continue
        made = list(made_calls(name, entry, chance))
        calls += made
        has_keys += [bool(entry[3]) or b"movablekeys" in entry[2]] * len(made)
    assert len(calls) > 3000
    assert len({words[0].lower() for words in calls}) == len(told.reply) - channels
    asked = told.compare(calls, KeySpecs(told.reply))
    assert asked < sum(has_keys) * (0.4 if told.legacy else 0.1), "the specifications suffice"


def test_a_wrong_number_of_words(told: Told) -> None:
    """Too few or too many words are an error that names the command, as they are on the server."""
    seen = 0
    for name, entry in told.entries():
        wanted = abs(entry[1])
        lengths = {len(name), wanted - 1} | ({wanted + 1, wanted + 7} if entry[1] > 0 else set())
        for length in lengths:
            allowed = length == wanted or (length > wanted and entry[1] < 0)
            if length < len(name) or allowed or (entry[9:] and entry[9] and length > 1):
                continue
            words = [*name, *[b"word"] * (length - len(name))]
            with pytest.raises(UsageError, match="wrong number of arguments") as raised:
                told.specs.keys(words)
            assert str(raised.value).startswith(b" ".join(name).upper().decode())
            with pytest.raises(ServerError, match=r"wrong number of arguments|unknown subcommand"):
                told.transport.call(command(words), 5.0)
            seen += 1
    assert seen > 300


# Options and counts anywhere: what people may call a key

odd_words = st.one_of(
    st.sampled_from(
        [
            b"a", b"user:1", b"{t}:x", b"1", b"2", b"3", b"0", b"-1", b"2x", b" 2", b"+1", b"01",
            b"4294967297", b"1.5", b"", b"STORE", b"store", b"STORE\0x", b"KEYS", b"keys",
            b"STREAMS", b"streams", b"BY", b"GET", b"LIMIT", b"COUNT", b"BLOCK", b"AUTH",
            b"WEIGHTS", b"LEFT", b"GROUP", b"STOREDIST", b"\xffKEYS", b"KEYSx", "ключ".encode(),
        ]
    ),
    st.binary(max_size=12),
)  # fmt: skip
some = st.lists(odd_words, max_size=5)
counts = st.one_of(st.integers(0, 6).map(lambda n: b"%d" % n), odd_words)


def counted(*head: Any) -> st.SearchStrategy[Words]:
    """Return calls with a count of keys, which often fits, and words after them."""

    def fill(parts: tuple[Any, ...]) -> Words:
        *before, keys, fits, count, rest = parts
        return [*before, b"%d" % len(keys) if fits else count, *keys, *rest]

    fixed = [st.just(word) if isinstance(word, bytes) else word for word in head]
    return st.tuples(*fixed, some, st.booleans(), counts, some).map(fill)


def listed(*parts: Any) -> st.SearchStrategy[Words]:
    """Return calls of these words, and words of these strategies."""
    strategies = [st.just([part]) if isinstance(part, bytes) else part for part in parts]
    return st.tuples(*strategies).map(lambda lists: [word for some in lists for word in some])


one = odd_words.map(lambda word: [word])
sort_options = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([b"BY", b"get", b"STORE", b"store"]), odd_words),
        st.tuples(st.just(b"LIMIT"), odd_words, odd_words),
        st.tuples(st.sampled_from([b"ASC", b"alpha"])),
    ),
    max_size=4,
).map(lambda options: [word for option in options for word in option])
geo_options = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([b"STORE", b"storedist"]), odd_words),
        st.tuples(st.sampled_from([b"ASC", b"WITHDIST"])),
    ),
    max_size=3,
).map(lambda options: [word for option in options for word in option])
migrate_options = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([b"COPY", b"replace"])),
        st.tuples(st.just(b"AUTH"), odd_words),
        st.tuples(st.just(b"AUTH2"), odd_words, odd_words),
    ),
    max_size=2,
).map(lambda options: [word for option in options for word in option])
maybe_keys = st.booleans().flatmap(lambda there: listed(b"KEYS", some) if there else some)
KINDS = {
    "EVAL": counted(b"EVAL", st.sampled_from([b"return 1", b"return", b"1", b""])),
    "EVALSHA": counted(b"evalsha", st.sampled_from([b"e" * 40, b"1" * 40, b"2e" * 20])),
    "ZUNIONSTORE": counted(b"ZUNIONSTORE", odd_words),
    "ZINTER": counted(b"zinter"),
    "LMPOP": counted(b"LMPOP"),
    "BLMPOP": counted(b"BLMPOP", odd_words),
    "MSETEX": counted(b"MSETEX"),
    "XREAD": listed(b"XREAD", some, b"STREAMS", some),
    "XREADGROUP": listed(b"XREADGROUP", b"GROUP", one, one, some, b"streams", some),
    "SORT": listed(b"SORT", one, sort_options),
    "SORT_RO": listed(b"sort_ro", one, sort_options),
    "GEORADIUSBYMEMBER": listed(b"GEORADIUSBYMEMBER", one, one, one, b"km", geo_options),
    "MIGRATE": listed(b"MIGRATE", b"host", b"1", one, b"0", b"9", migrate_options, maybe_keys),
    "BITOP": listed(b"BITOP", some),
    "MEMORY": listed(b"MEMORY", st.sampled_from([[b"USAGE"], [b"usage"], [b"nosuch"]]), some),
    "STRALGO": listed(b"STRALGO", st.sampled_from([[b"LCS"], [b"lcs", b"KEYS"]]), some),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_calls_of_all_sorts(told: Told, name: str) -> None:
    """Whatever the words are, options, counts or bytes, keys are those that the server says."""
    if not told.knows(name.encode()):
        pytest.skip("the server has no such command")

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(KINDS[name], min_size=1, max_size=30))
    def check(calls: list[Words]) -> None:
        told.compare(calls, KeySpecs(told.reply))

    check()


# What the server was asked once


def similar_calls(name: str, chance: random.Random, many: int) -> list[Words]:
    """Return calls of a command that often share a shape, and have keys elsewhere at times."""
    opaque = [b"user:1", b"user:2", b"{t}:x", b"{t}:y z", b"caf\xc3\xa9", b"a.b", b"c/d"]
    others = [
        b"1", b"2", b"3", b"40", b"500", b"-1", b"-7", b"02", b"2x", b"2:x", b"1:y", b"0.5", b"7.5",
        b"900:z", b"", b"STORE", b"store", b"Store\0x", b"KEYS", b"keys\0", b"STREAMS", b"streams",
        b"by", b"GET", b"LIMIT", b"COUNT", b"AUTH", b"STOREDIST", b"plain", b"4294967297",
        b"8589934594", b"99999999999999999999", b"1700000000000",
    ]  # fmt: skip
    heads: dict[str, Words] = {
        "MIGRATE": [b"h:1", b"2", b"", b"0", b"9"], "MEMORY": [b"usage"],
        "STRALGO": [b"lcs", b"keys"], "XREAD": [b"STREAMS"],
        "XREADGROUP": [b"GROUP", b"g:1", b"c:1", b"STREAMS"],
        "GEORADIUS": [b"k:1", b"1", b"2", b"3", b"km"], "EVAL": [b"return 1"],
        "GEORADIUSBYMEMBER": [b"k:1", b"m:1", b"3", b"km"], "EVALSHA": [b"e" * 40],
    }  # fmt: skip
    counts = [b"1", b"2", b"2", b"3", b"02", b"2x", b"2:x", b"9", b"30", b"0", b"-1", b"4294967298"]
    options: dict[str, Words] = {
        "MIGRATE": [b"KEYS", b"COPY"], "SORT": [b"STORE", b"GET"], "GEORADIUS": [b"STORE"],
        "GEORADIUSBYMEMBER": [b"STOREDIST"], "XREAD": [b"COUNT"],
        "XREADGROUP": [b"COUNT"], "MEMORY": [], "STRALGO": [b"KEYS"],
    }  # fmt: skip
    found = []
    for number in range(many):
        if number % 250 == 0:
            few = chance.sample(opaque, 5) + chance.sample(others, 3) + options.get(name, [])
        length = chance.randint(1, 5)
        again = chance.random() < 0.2
        rest = chance.choices(few, k=length) if again else chance.sample(few, length)
        head = list(heads.get(name, []))
        if head and chance.random() < 0.2:  # the unit is no place for an option
            at = chance.randrange(len(head))
            head[at] = head[at] if head[at] == b"km" else chance.choice(few)
        words = [name.encode(), *head, *rest]
        if name not in options and chance.random() < 0.7:  # most of those have a count
            at = 2 if name.startswith(("EVAL", "FCALL", "B")) or name.endswith("STORE") else 1
            words[at : at + 1] = [chance.choice(counts)]
        found.append(words)
    return found


def movable(told: Told) -> list[str]:
    """Return the commands whose keys move, in the order of their names."""
    return sorted(
        words[0].decode().upper()
        for words, entry in told.entries()
        if len(words) == 1 and b"movablekeys" in entry[2]
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_was_learned_stays_true(told: Told, seed: int) -> None:
    """Calls alike in shape have keys at the same places: no answer from memory is ever wrong."""
    chance = random.Random(seed)
    many = asked = 0
    least = {words[-1].decode().upper(): abs(entry[1]) for words, entry in told.entries()}
    for name in movable(told):
        specs = KeySpecs(told.reply)
        calls = similar_calls(name, chance, 1500)
        calls = [words for words in calls if len(words) >= least[name]]
        many += len(calls)
        asked += told.compare(calls, specs)
    assert asked < many * 0.7, "most calls are of a shape that was seen"


def test_learning(old: Told) -> None:
    """A call is asked for once; other keys, arguments and counts out of reach are no new shape."""
    specs = KeySpecs(old.reply)
    words = [b"EVAL", b"return 1", b"1", b"user:1", b"2026-11-22T01:02", b"1700000000"]
    assert specs.keys(words) is None
    assert specs.learn(words, [b"user:1"]) == [b"user:1"]
    assert specs.keys(words) == [b"user:1"]
    same = [b"eval", b"return 2", b"1", b"{user}:2", b"2025-11-22", b"15"]
    assert specs.keys(same) == [b"{user}:2"]
    for other in (
        [b"EVAL", b"return 1", b"2", b"user:1", b"2026-11-22T01:02", b"1700000000"],
        [b"EVAL", b"return 1", b"01", b"user:1", b"2026-11-22T01:02", b"1700000000"],
        [b"EVAL", b"return 1", b"4294967297", b"user:1", b"2026-11-22T01:02", b"1700000000"],
        [b"EVALSHA", b"return 1", b"1", b"user:1", b"2026-11-22T01:02", b"1700000000"],
        [b"EVAL", b"return 1", b"1", b"user:1", b"2026-11-22T01:02"],
        [b"EVAL", b"return 1", b"1", b"user:1", b"2026-11-22T01:02", b"STORE"],
        [b"EVAL", b"return 1", b"1", b"user:1", b"2026-11-22T01:02", b""],
    ):
        assert specs.keys(other) is None, other


def test_a_key_in_every_call_is_no_option(new: Told) -> None:
    """Where a word is always a key, another key is no new shape, be it a plain word or a number."""
    specs = KeySpecs(new.reply)
    assert specs.learn([b"SORT", b"mylist", b"STORE", b"to:1"], [b"mylist", b"to:1"])
    for key in (b"hislist", b"STORE", b"7", b"nul\0"):
        assert specs.keys([b"SORT", key, b"STORE", b"to:2"]) == [key, b"to:2"]
    assert specs.keys([b"SORT", b"mylist", b"mylist", b"to:1"]) is None


def test_learning_that_there_are_none(old: Told) -> None:
    """Redis 6.2 has an error for calls without keys, which is learned like keys are."""
    specs = KeySpecs(old.reply)
    words = [b"EVAL", b"return 1", b"0", b"an argument"]
    [reply] = old.ask([words])
    assert NONE_FOUND in str(reply)
    assert specs.learn(words, reply) == []
    assert specs.keys([b"EVAL", b"return 2", b"0", b"another one"]) == []


def test_an_error_that_says_nothing(told: Told) -> None:
    """Any other error of the server is raised, and nothing is learned of it."""
    specs = KeySpecs(told.reply)
    words = [b"SORT", b"list:1", b"STORE", b"to:1"]
    for text in ("NOPERM this user has no permissions", "LOADING Redis is loading the dataset"):
        with pytest.raises(ServerError, match=text.split()[0]):
            specs.learn(words, ServerError(text))
        assert specs.keys(words) is None


def test_the_same_word_twice(told: Told) -> None:
    """When a key says the same as another word, its place is not known: the server is asked."""
    specs = KeySpecs(told.reply)
    words = [b"SORT", b"same:1", b"BY", b"same:1", b"STORE", b"to:1"]
    [reply] = told.ask([words])
    assert specs.keys(words) is None
    assert specs.learn(words, reply) == [b"same:1", b"to:1"]
    assert specs.keys(words) is None
    words = [b"SORT", b"same:1", b"STORE", b"same:1"]
    [reply] = told.ask([words])
    assert specs.learn(words, reply) == [b"same:1", b"same:1"]
    assert specs.keys([b"SORT", b"list:1", b"STORE", b"to:1"]) == [b"list:1", b"to:1"]


def test_keys_of_another_call(told: Told) -> None:
    """A reply with keys that the call does not have is a mistake, and nothing is learned of it."""
    specs = KeySpecs(told.reply)
    words = [b"SORT", b"list:1", b"STORE", b"to:1"]
    with pytest.raises(UsageError, match="SORT: the reply has keys"):
        specs.learn(words, [b"list:2"])
    assert specs.keys(words) is None


def test_the_most_recent_shapes_are_kept(told: Told) -> None:
    """No more shapes are kept than was said; those used last stay."""
    specs = KeySpecs(told.reply, most_learned=10)

    def sort(number: int) -> Words:
        return [b"SORT", b"list:1", *[b"ASC"] * number]

    for number in range(10):
        specs.learn(sort(number), [b"list:1"])
    assert all(specs.keys(sort(number)) for number in range(10))
    assert specs.keys(sort(0)) == [b"list:1"], "used again"
    specs.learn(sort(10), [b"list:1"])
    kept = [number for number in range(11) if specs.keys(sort(number))]
    assert kept == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_large_calls_are_not_kept(told: Told) -> None:
    """What would take much memory is asked for each time: hundreds of words, or long odd ones."""
    specs = KeySpecs(told.reply)
    for words in (
        [b"SORT", b"list:1", *[b"ALPHA"] * 300],
        [b"SORT", b"list:1", b"BY", b"x\0" * 100],
        [b"SORT", b"list:1", b"BY", b"1" * 100],
    ):
        assert specs.learn(words, [b"list:1"]) == [b"list:1"]
        assert specs.keys(words) is None
    words = [b"SORT", b"list:1", b"BY", b"w:" * 100_000]
    specs.learn(words, [b"list:1"])
    assert specs.keys(words) == [b"list:1"], "what cannot be an option is not kept at all"


class Handing(dict[Any, Any]):
    """A dict that lets other threads run before it says what it took out."""

    def pop(self, *args: Any) -> Any:
        """Take a value out."""
        value = super().pop(*args)
        time.sleep(0)
        return value


def test_threads_share_it(told: Told) -> None:
    """Threads that learn and ask at the same time get the right keys; no more shapes are kept."""
    specs = KeySpecs(told.reply, most_learned=5)
    specs._learned = Handing()
    wrong: list[Any] = []

    def sort(length: int, list_: bytes) -> Words:
        return [b"SORT", list_, *[b"ASC"] * length, b"STORE", b"to:1"]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(800):
                words = sort(chance.randint(0, 6), b"list:%d" % seed)
                keys = specs.keys(words) or specs.learn(words, [words[1], b"to:1"])
                if keys != [words[1], b"to:1"]:
                    wrong.append(words)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len([length for length in range(7) if specs.keys(sort(length, b"list:1"))]) == 5


# Channels, modules, and what is no reply of COMMAND


def test_channels_of_shards_count_as_keys(cluster: Cluster) -> None:
    """A sharded channel decides the node: the one to which a cluster's own redirection leads."""
    told = Told(cluster.nodes[0])
    for words in (
        [b"SPUBLISH", b"news", b"m"],
        [b"spublish", b"{a}news", b"m"],
        [b"SSUBSCRIBE", b"{b}1", b"{b}2"],
        [b"SSUBSCRIBE", b"news"],
        [b"GET", b"hello"],
        [b"EVAL", b"return 1", b"2", b"{z}1", b"{z}2"],
    ):
        keys = told.specs.keys(words)
        assert keys
        [slot] = {key_slot(key) for key in keys}
        wrong = next(node for node in cluster.nodes if node is not cluster.node_of(slot))
        client: Any = wrong.client()
        with pytest.raises(redis.exceptions.MovedError) as raised:
            client.execute_command(*words)
        assert raised.value.slot_id == slot
        client.close()
    assert told.specs.keys([b"SUNSUBSCRIBE"]) == []
    assert told.specs.keys([b"SUNSUBSCRIBE", b"a", b"b"]) == [b"a", b"b"]


def entry(name: str, arity: int, flags: Sequence[str], *specs: Any) -> list[Any]:
    """Return what a server says of a command, in RESP3."""
    at = (1, -1, 1) if specs else (0, 0, 0)
    return [name.encode(), arity, {f.encode() for f in flags}, *at, set(), [], list(specs), []]


def spec(begin: Any, find: Any, *flags: str) -> dict[bytes, Any]:
    """Return a key specification, in RESP3."""
    return {
        b"flags": {flag.encode() for flag in flags},
        b"begin_search": {b"type": begin[0], b"spec": begin[1]},
        b"find_keys": {b"type": find[0], b"spec": find[1]},
    }


RANGE = (b"range", {b"lastkey": -1, b"keystep": 1, b"limit": 0})
ONE = (b"range", {b"lastkey": 0, b"keystep": 1, b"limit": 0})
COUNTED = (b"keynum", {b"keynumidx": 0, b"firstkey": 1, b"keystep": 1})
FIRST = (b"index", {b"index": 1})


def test_a_module_that_finds_its_keys_itself() -> None:
    """The server is asked for every call: nobody knows what code of a module looks at."""
    specs = KeySpecs(
        [
            entry("a.b", -2, ["module", "movablekeys"], spec(FIRST, RANGE, "variable_flags")),
            entry("a.c", -2, ["module", "movablekeys"]),
            entry("a.d", -1, ["module"], spec(FIRST, RANGE)),
            [b"a.e", -2, [b"movablekeys"], 1, 1, 1, []],
        ]
    )
    for name in (b"a.b", b"A.C", b"a.e"):
        assert specs.keys([name, b"x:1", b"y:1"]) is None
        assert specs.learn([name, b"x:1", b"y:1"], [b"y:1"]) == [b"y:1"]
        assert specs.keys([name, b"x:1", b"y:1"]) is None
    assert specs.keys([b"a.d", b"x", b"y"]) == [b"x", b"y"]
    assert specs.keys([b"a.d"]) == []
    assert KeySpecs([[b"a.g", -1, [], 1, 1, 1, []]]).keys([b"a.g"]) == []
    assert KeySpecs([entry("a.f", -1, ["module", "movablekeys"])]).keys([b"a.f"]) == []


def test_specifications_of_a_later_server() -> None:
    """The server is asked where a specification is unknown or incomplete; a keyword may be last."""
    keyword = (b"keyword", {b"keyword": b"KEYS", b"startfrom": -2})
    specs = KeySpecs(
        [
            entry("one", -2, [], spec((b"magic", {b"index": 1}), RANGE)),
            entry("two", -2, [], spec(FIRST, (b"magic", {}))),
            entry("three", -2, [], spec(FIRST, RANGE, "incomplete")),
            entry("four", -2, [], spec(keyword, RANGE)),
            entry("five", -2, [], spec(FIRST, ONE), spec((b"unknown", {}), (b"unknown", {}))),
            entry("six", -1, [], spec((b"index", {b"index": 3}), COUNTED)),
            entry("get", 2, [], spec(FIRST, ONE, "incomplete")),
        ]
    )
    for name in (b"one", b"two", b"three", b"get"):
        assert specs.keys([name, b"a"]) is None
        assert specs.learn([name, b"a"], [b"a"]) == [b"a"]
        assert specs.keys([name, b"a"]) == [b"a"]
    assert specs.learn([b"five", b"a:1", b"b:1"], [b"b:1"]) == [b"b:1"]
    assert specs.keys([b"five", b"a:2", b"b:2"]) is None, "without what is always a key"
    assert specs.learn([b"five", b"a:1", b"b:1"], [b"a:1"]) == [b"a:1"]
    assert specs.keys([b"five", b"a:2", b"b:2"]) == [b"a:2"]
    assert specs.keys([b"four", b"keys", b"KEYS", b"a"]) == [b"a"]
    assert specs.keys([b"four", b"keys", b"a", b"b"]) == [b"a", b"b"]
    with pytest.raises(UsageError, match="FOUR: the server finds no keys"):
        specs.keys([b"four", b"a", b"KEYS"])
    assert specs.keys([b"six", b"a", b"b", b"1", b"c"]) == [b"c"]
    with pytest.raises(UsageError, match="SIX: the server finds no keys"):
        specs.keys([b"six", b"a"])


@pytest.mark.parametrize(
    "reply", [[], [b"get"], [[b"get"]], [[b"get", 2, [], 1, 1, 1, [], [], [[b"x"]], []]], 7, None]
)
def test_no_reply_of_command(reply: Any) -> None:
    """What is no reply of COMMAND is refused when it is given."""
    with pytest.raises(UsageError, match="COMMAND"):
        KeySpecs(reply)


def test_both_protocols_say_the_same(told: Told) -> None:
    """Replies of RESP2 and RESP3 make the same of every command."""
    client = told.server.client(protocol=3)
    reply = connect(client).call(command([b"COMMAND"]), 10.0)
    assert told.legacy or reply != told.reply
    specs, others = KeySpecs(reply), KeySpecs(told.reply)
    chance = random.Random(7)
    for name, entry in told.entries():
        for words in made_calls(name, entry, chance):
            keys = found(specs, words)
            assert keys == found(others, words)
            if keys != WRONG:
                assert specs.flags(words) == others.flags(words)
                assert specs.policy(words) == others.policy(words)
    client.close()


# Flags and policies


def test_flags(told: Told) -> None:
    """What reads only, writes or may block is told by the server's flags, in any case."""
    for line, reads, writes, blocks in (
        ("GET k", True, False, False),
        ("set k v", False, True, False),
        ("BLPOP k 0", False, True, True),
        ("Xread STREAMS k 0", True, False, True),
        ("EVAL x 0", False, False, False),
        ("PING", False, False, False),
        ("BZPOPMIN k 0", False, True, True),
    ):
        words = call(line)
        assert told.specs.is_read_only(words) is reads, line
        assert ("write" in told.specs.flags(words)) is writes, line
        assert told.specs.is_blocking(words) is blocks, line
    assert "noscript" in told.specs.flags([b"EVAL", b"x", b"0"])


def test_flags_of_subcommands(new: Told) -> None:
    """A subcommand has flags of its own."""
    assert new.specs.is_read_only([b"xinfo", b"stream", b"s"])
    assert not new.specs.is_read_only([b"XGROUP", b"CREATE", b"s", b"g", b"0"])
    assert "admin" in new.specs.flags([b"CONFIG", b"Get", b"x"])


def test_policies(told: Told) -> None:
    """Tips say to which nodes a command goes and how replies are put together, if there are any."""
    specs = told.specs
    assert specs.policy([b"GET", b"k"]) is None
    assert specs.policy([b"SCRIPT", b"EXISTS", b"x"]) == (
        None if told.legacy else Policy("all_shards", "agg_logical_and")
    )
    assert specs.policy([b"dbsize"]) == (None if told.legacy else Policy("all_shards", "agg_sum"))
    assert specs.policy([b"MGET", b"k"]) == (None if told.legacy else Policy("multi_shard", None))


# Errors


def test_errors_name_the_command_only(told: Told) -> None:
    """An unknown command, subcommand or form is an error that never shows an argument."""
    for words in (
        [b"NOSUCH", b"secret"],
        [b"NOSUCH secret"],
        [b"NOSUCH\nsecret", b"secret"],
        [b"GET", b"secret", b"secret"],
        [b"CONFIG", b"secret", b"secret"],
        [b"XGROUP", b"secret"],
        [b"XINFO", b"secret", b"secret"],
        [b"ZUNIONSTORE", b"secret", b"0", b"secret"],
    ):
        if told.legacy and words[0] in (b"XGROUP", b"XINFO", b"CONFIG", b"ZUNIONSTORE"):
            continue  # it does not say what subcommands there are
        with pytest.raises(UsageError) as raised:
            told.specs.keys(words)
        assert "secret" not in str(raised.value)
        assert words[0].split()[0].decode() in str(raised.value)


def test_no_words() -> None:
    """No words at all, and words that are no bytes, are refused."""
    specs = KeySpecs([[b"get", 2, [b"readonly"], 1, 1, 1]])
    assert specs.keys([b"GeT", b"k"]) == [b"k"]
    words: Any
    for words in ([], ["GET", "k"], "GET k", [b""], [1]):
        with pytest.raises(UsageError, match=r"sequence of bytes|does not know"):
            specs.keys(words)
