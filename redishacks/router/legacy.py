"""Where old libraries put keys: data they spread is found, and can then be moved to slots.

    old = SignedCrc32(["redis-0", "redis-1", "redis-2"])         # nydus and rb: crc32 % n
    old.node_for(b"user:1")                                      # "redis-2"

    addresses = {"a": "10.0.0.1:6379", "b": "10.0.0.2:6379"}     # what the old library hashed
    TwemproxyKetama(addresses, identities=addresses, hash_tag="{}")

| kind | class | where keys are in |
|---|---|---|
| `crc32-signed` | `SignedCrc32` | nydus' and rb's `PartitionRouter` |
| `crc32` | `Crc32` | ports of those that forgot the sign |
| `rb-ketama` | `RbKetama` | rb's `ConsistentHashingRouter` |
| `nydus-ketama` | `NydusKetama` | nydus' `ConsistentHashingRouter` |
| `twemproxy-ketama` | `TwemproxyKetama` | twemproxy, `distribution: ketama` |
| `twemproxy-modula` | `TwemproxyModula` | twemproxy, `distribution: modula` |
| `redis-shard` | `RedisShard` | redis-shard |

All are for data that is there already. A node more moves most keys of `crc32` and modula, rings are
uneven by a tenth, and without `identities` a node that is renamed takes other keys: whoever begins
anew takes slots. nydus and rb hash whole keys: keys that share a `{tag}` are on different nodes, so
that scripts with several keys are refused; twemproxy keeps them together with `hash_tag="{}"`.
None follows what the originals did while a node was away: nydus' ring and twemproxy
(`auto_eject_hosts`) then wrote to the nodes that were left, and such keys lie where they were put.
"""

from __future__ import annotations

import reprlib
import struct
from binascii import crc_hqx
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import md5, sha1
from itertools import accumulate
from typing import Any, ClassVar, Literal, Self, TypeVar
from zlib import crc32

from redishacks.errors import UsageError
from redishacks.router.placement import check_name

T = TypeVar("T")

#: The largest weight that is accepted.
MOST_WEIGHT = 1_000_000

_MASK = 0xFFFF_FFFF
_WORDS = struct.Struct("<4I")
_BLOCK = struct.Struct("<3I")
_WORD = struct.Struct("<I")
_HALVES = struct.Struct("<2H")
_SINGLE = struct.Struct("f")


class Legacy:
    """What all these placements share; they are equal when they describe themselves alike."""

    #: How it is called by users, and in the stored topology.
    kind = ""
    #: What `describe` tells besides the kind, as parameters of the class.
    _told: tuple[str, ...] = ("nodes",)

    def __init__(self, nodes: Iterable[str]) -> None:
        #: Every node, in the order that counts.
        self.nodes = _names(nodes)

    def node_for(self, key: bytes) -> str:
        """Return the name of the node that has a key; costs no round trip."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return all that decides where keys are, as JSON takes it."""
        return {"kind": self.kind, "nodes": list(self.nodes)}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Self:
        """Return the placement that `describe` told of; `UsageError` when it told of none."""
        if not isinstance(described, Mapping) or described.get("kind") != cls.kind:
            raise UsageError(f"this describes no placement of the kind {cls.kind!r}")
        wanted, found = {"kind", *cls._told}, set(described)
        if wanted != found:
            listed = ", ".join(sorted(map(str, wanted ^ found)))
            raise UsageError(f"a placement {cls.kind!r} is not described by that: {listed}")
        return cls(**{name: described[name] for name in cls._told})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Legacy) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash((self.kind, self.nodes))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(self.nodes)}>"


class Crc32(Legacy):
    """`crc32(key) % n`, with the CRC as Python 3 has it.

    It is what ports of nydus or rb to Python 3 came to that forgot that Python 2 had a sign: with n
    nodes that are not 1, 2, 4, 8, … half of the keys are on another node than with `SignedCrc32`.
    `nodes` are listed by their number.
    """

    kind = "crc32"

    def node_for(self, key: bytes) -> str:
        """Return the name of the node that has a key; costs no round trip."""
        return self.nodes[crc32(key) % len(self.nodes)]


class SignedCrc32(Legacy):
    """`crc32(key) % n`, with the CRC as Python 2 had it: a number from -2**31 to 2**31 - 1.

    `nodes` are listed by their number. nydus and rb number them alike: in `hosts={0: …, 1: …}` it
    is the key, whatever the order of the entries; of a list (nydus) it is the place in it. nydus
    failed for numbers that it did not have; rb refuses gaps: n nodes have the numbers 0 to n - 1.
    """

    kind = "crc32-signed"

    def node_for(self, key: bytes) -> str:
        """Return the name of the node that has a key; costs no round trip."""
        return self.nodes[((crc32(key) ^ 0x8000_0000) - 0x8000_0000) % len(self.nodes)]


class Identified(Legacy):
    """Nodes with a text by which the original knew them.

    `identities` say it by name; of those that are left out it is the name itself.
    """

    _told: tuple[str, ...] = ("nodes", "identities")
    #: The longest text, in bytes.
    _longest = 4096

    def __init__(
        self, nodes: Iterable[str], *, identities: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(nodes)
        texts = _about(self.nodes, identities, "identities")
        #: By name the text that the original hashed.
        self.identities = {name: self._identity(name, texts.get(name, name)) for name in self.nodes}
        if len(set(self.identities.values())) < len(self.nodes):
            raise UsageError("two nodes have the same identity: each needs one of its own")

    def describe(self) -> dict[str, Any]:
        """Return all that decides where keys are, as JSON takes it, the identities included."""
        return super().describe() | {"identities": dict(self.identities)}

    def _identity(self, name: str, text: object) -> str:
        if isinstance(text, str) and 0 < _size(text) <= self._longest:
            return text
        # The text is not shown: rb's has the password in it.
        raise UsageError(
            f"node {name}: its identity is a string of 1 to {self._longest} bytes of UTF-8"
        )


class Weighted(Identified):
    """Nodes that have weights as well; `weights` say them by name, and of others it is 1."""

    _told = (*Identified._told, "weights")

    def __init__(
        self,
        nodes: Iterable[str],
        *,
        identities: Mapping[str, str] | None = None,
        weights: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(nodes, identities=identities)
        given = _about(self.nodes, weights, "weights")
        #: By name a whole number.
        self.weights = {name: _weight(name, given.get(name, 1)) for name in self.nodes}
        self._build()

    def _build(self) -> None:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return all that decides where keys are, as JSON takes it, the identities included."""
        return super().describe() | {"weights": dict(self.weights)}


class RbKetama(Weighted):
    """rb's ring of MD5 points: 160 of each node, or its share of that by weight.

    rb hashed the `repr` of the whole configuration of a host, so that is its identity: print
    `repr(cluster.hosts[i])` in the application that used rb, in the Python it used, and give it as
    `identities={name: text}`. Everything in it counts, the password too if there is one: then
    whoever reads the topology that is stored on the nodes can read it. `nodes` are listed by their
    number, which decides where points of two nodes fall together. rb's router has no weights; they
    are there for those who used its `Ketama` by itself.
    """

    kind = "rb-ketama"

    def _build(self) -> None:
        total = sum(self.weights.values())
        owners: dict[int, str] = {}
        for name, text in self.identities.items():
            for i in range(40 * len(self.nodes) * self.weights[name] // total):
                owners.update(dict.fromkeys(_md5_words(f"{text}-{i}-salt".encode()), name))
        self._points, self._owners = _ring(owners)

    def node_for(self, key: bytes) -> str:
        """Return the name of the node that has a key; costs no round trip."""
        return self._owners[bisect_right(self._points, _md5_words(key)[0])]


class NydusKetama(RbKetama):
    """nydus' ring, which rb took over: here a node's identity is `cluster.hosts[i].identifier`.

    That is the `identifier` of its settings, or `redis://<host>:<port>/<db>`. Where points of two
    nodes fall together nydus took what came last in a set of Python 2; here it is the node that is
    listed later. Of rings of seven nodes one in eight thousand has such a pair, for one key in a
    thousand.
    """

    kind = "nydus-ketama"


class Twemproxy(Weighted):
    """A pool of twemproxy (nutcracker).

    A node's identity is its name in the pool's `servers`: of `10.0.0.1:6379:1 alpha` it is `alpha`;
    without a name it is `10.0.0.1:6379`, but the host alone if the port is 11211, and of a Unix
    socket the path with a colon after it. Its weight is the number before the name. Servers may be
    listed in any order: twemproxy sorts them by name, the shorter first, and so does this (as of
    twemproxy 0.4.0; the order of earlier ones is the same when all names are equally long).

    `hash` and `hash_tag` are those of the pool; `hash_tag` is two characters, or none. Some hashes
    take bytes above 127 as a C compiler does: as negative numbers on x86, which is `signed_char`;
    say False if twemproxy ran on ARM. It makes no difference to keys in ASCII.
    """

    _told = (*Weighted._told, "hash", "hash_tag", "signed_char")
    _longest = 255

    def __init__(
        self,
        nodes: Iterable[str],
        *,
        identities: Mapping[str, str] | None = None,
        weights: Mapping[str, int] | None = None,
        hash: str = "fnv1a_64",
        hash_tag: str = "",
        signed_char: bool = True,
    ) -> None:
        super().__init__(nodes, identities=identities, weights=weights)
        if not isinstance(hash_tag, str) or len(hash_tag) not in (0, 2) or not hash_tag.isascii():
            shown = reprlib.repr(hash_tag)
            raise UsageError(f"hash_tag: two ASCII characters, such as '{{}}', or '', not {shown}")
        if not isinstance(signed_char, bool):
            raise UsageError(f"signed_char: True or False, not {reprlib.repr(signed_char)}")
        self.hash = _one_of(hash, HASHES, "hash")
        self.hash_tag, self.signed_char = hash_tag, signed_char
        self._function = HASHES[hash]
        self._tag = [character.encode() for character in hash_tag]

    def _build(self) -> None:
        texts = {name: text.encode() for name, text in self.identities.items()}
        self.nodes = tuple(sorted(self.nodes, key=lambda name: (len(texts[name]), texts[name])))

    def describe(self) -> dict[str, Any]:
        """Return all that decides where keys are, as JSON takes it."""
        about = {"hash": self.hash, "hash_tag": self.hash_tag, "signed_char": self.signed_char}
        return super().describe() | about

    def _hashed(self, key: bytes) -> int:
        if self._tag:
            start = key.find(self._tag[0])
            if start >= 0:
                end = key.find(self._tag[1], start + 1)
                if end > start + 1:
                    key = key[start + 1 : end]
        return self._function(key, self.signed_char) if key else 0


class TwemproxyKetama(Twemproxy):
    """`distribution: ketama`: a ring of MD5 points, 160 of each node, or its share by weight."""

    kind = "twemproxy-ketama"

    def _build(self) -> None:
        super()._build()
        total = sum(self.weights.values())
        owners: dict[int, str] = {}
        for name in self.nodes:
            for i in range(_quarter(self.weights[name], total, len(self.nodes))):
                for point in _md5_words(f"{self.identities[name]}-{i}".encode()):
                    owners.setdefault(point, name)
        self._points, self._owners = _ring(owners)

    def node_for(self, key: bytes) -> str:
        """Return the name of the node that has a key; costs no round trip."""
        return self._owners[bisect_left(self._points, self._hashed(key))]


class TwemproxyModula(Twemproxy):
    """`distribution: modula`: the hash modulo the sum of weights; each node has a run of them."""

    kind = "twemproxy-modula"

    def _build(self) -> None:
        super()._build()
        self._ends = list(accumulate(self.weights[name] for name in self.nodes))

    def node_for(self, key: bytes) -> str:
        """Return the name of the node that has a key; costs no round trip."""
        return self.nodes[bisect_right(self._ends, self._hashed(key) % self._ends[-1])]


class RedisShard(Identified):
    """redis-shard 0.3.7: a ring of 128 points of each node; behind the last comes the last again.

    A node's identity is the `name` of its server. `nodes` are listed as its `servers` were: that
    decides where points of two nodes fall together. `hash` is its `hash_method`: crc32, md5, sha1.

    `keys` says what the application passed. `text`, in Python 3: a key's tag is all between the
    last `{` and the last `}` of its first line, empty or not, and letters such as ä were hashed as
    Latin-1, although Redis got them as UTF-8. `bytes`, in Python 3: there are no tags. `python2`:
    tags as in text, and bytes are hashed as they are.
    """

    kind = "redis-shard"
    _told = (*Identified._told, "hash", "keys")
    _hashes: ClassVar[Mapping[str, Callable[[bytes], int]]] = {
        "crc32": crc32,
        "md5": lambda text: int.from_bytes(md5(text, usedforsecurity=False).digest()),
        "sha1": lambda text: int.from_bytes(sha1(text, usedforsecurity=False).digest()),
    }

    def __init__(
        self,
        nodes: Iterable[str],
        *,
        identities: Mapping[str, str] | None = None,
        hash: str = "crc32",
        keys: Literal["text", "bytes", "python2"] = "text",
    ) -> None:
        super().__init__(nodes, identities=identities)
        self.hash = _one_of(hash, self._hashes, "hash")
        self.keys = _one_of(keys, ("text", "bytes", "python2"), "keys")
        self._function = self._hashes[hash]
        owners: dict[int, str] = {}
        for name, text in self.identities.items():
            owners |= {self._function(f"{text}:{i}".encode()): name for i in range(128)}
        self._points, self._owners = _ring(owners)
        self._owners[-1] = self._owners[-2]

    def node_for(self, key: bytes) -> str:
        """Return the name of the node that has a key; costs no round trip."""
        if self.keys != "bytes":
            line = key.partition(b"\n")[0]
            end = line.rfind(b"}")
            start = line.rfind(b"{", 0, max(end, 0))
            if start >= 0:
                key = key[start + 1 : end]
            if self.keys == "text" and not key.isascii():
                key = _latin_1(key)
        return self._owners[bisect_right(self._points, self._function(key))]

    def describe(self) -> dict[str, Any]:
        """Return all that decides where keys are, as JSON takes it."""
        return super().describe() | {"hash": self.hash, "keys": self.keys}

    def _identity(self, name: str, text: object) -> str:
        text = super()._identity(name, text)
        if text.isascii():
            return text
        raise UsageError(f"node {name}: its identity is a string in ASCII")


#: Every placement here, by kind.
KINDS: Mapping[str, type[Legacy]] = {
    placement.kind: placement
    for placement in (
        SignedCrc32,
        Crc32,
        RbKetama,
        NydusKetama,
        TwemproxyKetama,
        TwemproxyModula,
        RedisShard,
    )
}


# Rings


def _md5_words(text: bytes) -> tuple[int, ...]:
    return _WORDS.unpack(md5(text, usedforsecurity=False).digest())


def _ring(owners: Mapping[int, str]) -> tuple[list[int], list[str]]:
    """Return the points in order, and the owner of each; behind the last comes the first."""
    points = sorted(owners)
    return points, [owners[point] for point in [*points, points[0]]]


def _quarter(weight: int, total: int, nodes: int) -> int:
    """Return a quarter of the points of a node, rounded as C's floats are."""
    share = _single(_single(weight) / _single(total))
    return int(_single(_single(_single(share * 160) / 4) * nodes))


def _latin_1(text: bytes) -> bytes:
    try:
        return text.decode().encode("latin-1")
    except UnicodeError:  # such a key could not be passed
        return text


def _single(number: float) -> float:
    found: float = _SINGLE.unpack(_SINGLE.pack(number))[0]
    return found


# Hashes of 32 bits, of keys that are not empty


def _characters(key: bytes, signed: bool) -> Sequence[int]:
    return memoryview(key).cast("b") if signed and not key.isascii() else key


def _fnv1(start: int, prime: int) -> Callable[[bytes, bool], int]:
    def hashed(key: bytes, signed: bool) -> int:
        value = start
        for character in _characters(key, signed):
            value = value * prime & _MASK ^ character
        return value & _MASK

    return hashed


def _fnv1a(start: int, prime: int) -> Callable[[bytes, bool], int]:
    def hashed(key: bytes, signed: bool) -> int:
        value = start
        for character in _characters(key, signed):
            value = (value ^ character) * prime & _MASK
        return value

    return hashed


def _one_at_a_time(key: bytes, signed: bool) -> int:
    value = 0
    for character in _characters(key, signed):
        value = (value + character) * 1025 & _MASK
        value ^= value >> 6
    value = value * 9 & _MASK
    value ^= value >> 11
    return value * 32769 & _MASK


def _md5(key: bytes, signed: bool) -> int:
    return _md5_words(key)[0]


def _crc16(key: bytes, signed: bool) -> int:
    # The register is 32 bits wide: on top are the high bytes of the two steps before.
    before, earlier = crc_hqx(key[:-1], 0) >> 8, crc_hqx(key[:-2], 0) >> 8
    return earlier << 24 | before << 16 | crc_hqx(key, 0)


def _crc32(key: bytes, signed: bool) -> int:
    return crc32(key) >> 16 & 0x7FFF


def _crc32a(key: bytes, signed: bool) -> int:
    return crc32(key)


def _hsieh(key: bytes, signed: bool) -> int:
    value = 0
    whole = len(key) & ~3
    for low, high in _HALVES.iter_unpack(key[:whole]):
        value = value + low & _MASK
        value = (value << 16 & _MASK) ^ (high << 11) ^ value
        value = value + (value >> 11) & _MASK
    rest = key[whole:]
    if len(rest) == 1:
        value = value + rest[0] & _MASK
        value ^= value << 10 & _MASK
        value = value + (value >> 1) & _MASK
    elif rest:
        value = value + int.from_bytes(rest[:2], "little") & _MASK
        if len(rest) == 2:
            value ^= value << 11 & _MASK
            value = value + (value >> 17) & _MASK
        else:
            value ^= value << 16 & _MASK
            value ^= _characters(rest, signed)[2] << 18 & _MASK
            value = value + (value >> 11) & _MASK
    for left, right in ((3, 5), (4, 17), (25, 6)):
        value ^= value << left & _MASK
        value = value + (value >> right) & _MASK
    return value


def _murmur(key: bytes, signed: bool) -> int:
    prime = 0x5BD1_E995
    value = 0xDEAD_BEEF * len(key) & _MASK ^ len(key)
    whole = len(key) & ~3
    for (word,) in _WORD.iter_unpack(key[:whole]):
        word = word * prime & _MASK
        value = (value * prime & _MASK) ^ ((word ^ word >> 24) * prime & _MASK)
    if whole < len(key):
        value = (value ^ int.from_bytes(key[whole:], "little")) * prime & _MASK
    value = (value ^ value >> 13) * prime & _MASK
    return value ^ value >> 15


def _jenkins(key: bytes, signed: bool) -> int:
    a = b = c = 0xDEAD_BEEF + len(key) + 13 & _MASK
    for at in range(0, len(key), 12):
        first, second, third = _three_words(key[at : at + 12])
        a, b, c = a + first & _MASK, b + second & _MASK, c + third & _MASK
        if at + 12 < len(key):
            for turn in (4, 6, 8, 16, 19, 4):
                mixed = (a - c & _MASK) ^ _turned(c, turn)
                a, b, c = b, c + b & _MASK, mixed
    for turn in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, (c ^ b) - _turned(b, turn) & _MASK, a
    return b


def _three_words(block: bytes) -> tuple[int, int, int]:
    return _BLOCK.unpack(block.ljust(12, b"\0"))


def _turned(value: int, bits: int) -> int:
    return (value << bits | value >> 32 - bits) & _MASK


#: What twemproxy calls its hashes: of a key, and whether C's characters have a sign.
HASHES: Mapping[str, Callable[[bytes, bool], int]] = {
    "one_at_a_time": _one_at_a_time,
    "md5": _md5,
    "crc16": _crc16,
    "crc32": _crc32,
    "crc32a": _crc32a,
    "fnv1_64": _fnv1(0x8422_2325, 0x1B3),
    "fnv1a_64": _fnv1a(0x8422_2325, 0x1B3),
    "fnv1_32": _fnv1(0x811C_9DC5, 0x0100_0193),
    "fnv1a_32": _fnv1a(0x811C_9DC5, 0x0100_0193),
    "hsieh": _hsieh,
    "murmur": _murmur,
    "jenkins": _jenkins,
}


# What is accepted


def _names(nodes: Iterable[str]) -> tuple[str, ...]:
    if isinstance(nodes, str | bytes) or not isinstance(nodes, Iterable):
        raise UsageError(f"nodes: a list of names is accepted, not {reprlib.repr(nodes)}")
    found = tuple(map(check_name, nodes))
    if not found:
        raise UsageError("no nodes: at least one is needed")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise UsageError(f"two nodes are called {twice!r}: each needs a name of its own")
    return found


def _size(text: str) -> int:
    """Return how many bytes a text has; 0 if it cannot be encoded, or has a NUL."""
    try:
        return 0 if "\0" in text else len(text.encode())
    except UnicodeEncodeError:
        return 0


def _about(nodes: Sequence[str], given: Mapping[str, T] | None, what: str) -> Mapping[str, T]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"{what}: a mapping by node is accepted, not {type(given).__name__}")
    others = [name for name in given if name not in nodes]
    if others:
        raise UsageError(f"{what}: there is no node {reprlib.repr(others[0])}")
    return given


def _one_of(value: object, known: Collection[str], what: str) -> str:
    if isinstance(value, str) and value in known:
        return value
    raise UsageError(f"{what}: one of {', '.join(known)}, not {reprlib.repr(value)}")


def _weight(name: str, weight: object) -> int:
    if isinstance(weight, int) and not isinstance(weight, bool) and 0 < weight <= MOST_WEIGHT:
        return weight
    raise UsageError(
        f"node {name}: its weight is a whole number from 1 to {MOST_WEIGHT:,}, not "
        f"{reprlib.repr(weight)}"
    )
