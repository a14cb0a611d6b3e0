"""Legacy placements put every key where the original did; what they accept, and what they tell.

`data/router_legacy.json` has what the originals themselves answered, each unmodified:

- `crc32-signed` and `nydus-ketama`: nydus 0.11.0 (commit 9b50584) on Python 2.7.18, through
  `BaseCluster` and its `PartitionRouter` and `ConsistentHashingRouter`; rb gave the same for the
  first of both.
- `rb-ketama`: rb 1.10.0 (commit 2982698) on Python 3.11.7, through `Cluster` and
  `ConsistentHashingRouter`; with weights, which those have not, through its `Ketama`.
- `twemproxy-*` and the hashes: twemproxy 0.5.0 (commit 60aaf85), all of its C files but the one
  with `main`, by gcc 12 on x86-64 with `-O2 -fsigned-char`, and again with `-funsigned-char`; a
  program read a configuration with `conf_create` and `server_pool_init`, and printed what
  `server_pool_idx` and the `hash_` functions answered.
- `redis-shard`: redis-shard 0.3.7 (commit 113fbeb) on Python 3.11.7 and, for `python2`, 2.7.18,
  through `RedisShardAPI.get_server_name`, with an empty stand-in for redis-py.
- `crc32`: no library has it; it is twemproxy's `hash_crc32a`, the CRC by a table, modulo n.

Keys stand in it as Latin-1. `sets` are nodes with their weights, in the order they were given;
`placements` are [kind, set, options, one digit for each key: the number of its node, or `-` where
the original refused the key]; `hashes` have
eight hexadecimal digits for each key but the first, which is empty; `digests` are [kind, n, with
weights, CRC of all answers] for n nodes and many keys; `single` are keys that hit a point, or where
points of two nodes fall together.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from redishacks.errors import UsageError
from redishacks.router.legacy import (
    HASHES,
    KINDS,
    Crc32,
    Legacy,
    NydusKetama,
    RbKetama,
    RedisShard,
    SignedCrc32,
    TwemproxyKetama,
    TwemproxyModula,
)

DATA = json.loads((Path(__file__).parent / "data" / "router_legacy.json").read_text())
KEYS = [key.encode("latin-1") for key in DATA["keys"]]
MANY = [b"%d:key" % i for i in range(2000)]
RINGS = [RbKetama, NydusKetama, TwemproxyKetama, RedisShard]
WEIGHTED = [RbKetama, NydusKetama, TwemproxyKetama, TwemproxyModula]
IDENTIFIED = [*WEIGHTED, RedisShard]
TWEMPROXY = [TwemproxyKetama, TwemproxyModula]


def made(kind: str, nodes: dict[str, int] | list[str], options: dict[str, Any]) -> Legacy:
    """Return a placement of nodes that are called by their place: "0", "1", …"""
    weights = nodes if isinstance(nodes, dict) else dict.fromkeys(nodes, 1)
    names = [str(i) for i in range(len(weights))]
    about: dict[str, Any] = {}
    if KINDS[kind] in IDENTIFIED:
        about["identities"] = dict(zip(names, weights, strict=True))
    if KINDS[kind] in WEIGHTED:
        about["weights"] = dict(zip(names, weights.values(), strict=True))
    return KINDS[kind](names, **about, **options)


def places(placement: Legacy, keys: list[bytes]) -> list[int]:
    """Return the numbers of the nodes that have keys."""
    return [int(placement.node_for(key)) for key in keys]


# What the originals answered


def named(rows: list[list[Any]], parts: int) -> list[Any]:
    """Return parameters whose ids are the first parts alone, not what is expected."""
    return [pytest.param(*row, id="-".join(map(str, row[:parts]))) for row in rows]


@pytest.mark.parametrize(
    ("kind", "nodes", "options", "expected"), named(DATA["placements"], parts=3)
)
def test_as_the_original(kind: str, nodes: str, options: dict[str, Any], expected: str) -> None:
    """Every key is where the original put it."""
    placement = made(kind, DATA["sets"][nodes], options)
    known = [(key, digit) for key, digit in zip(KEYS, expected, strict=True) if digit != "-"]
    assert len(known) > 50
    assert places(placement, [key for key, _ in known]) == [int(digit, 16) for _, digit in known]


@pytest.mark.parametrize(("kind", "count", "weighted", "expected"), named(DATA["digests"], parts=3))
def test_of_many_keys(kind: str, count: int, weighted: bool, expected: str) -> None:
    """So are many keys on 2 to 100 nodes, where the shares of rings are rounded as in C."""
    weights = {f"node-{i}": 1 + (i * i % 7 + i // 3) * weighted for i in range(count)}
    found = places(made(kind, weights, {}), MANY)
    assert f"{zlib.crc32(bytes(found)):08x}" == expected


@pytest.mark.parametrize(
    ("kind", "nodes", "options", "key", "expected"), named(DATA["single"], parts=1)
)
def test_points_of_a_ring(
    kind: str, nodes: list[str], options: dict[str, Any], key: str, expected: int
) -> None:
    """A key that hits a point, and one behind which points of two nodes fall together."""
    assert places(made(kind, nodes, options), [key.encode()]) == [expected]


@pytest.mark.parametrize("name", HASHES)
def test_hashes(name: str) -> None:
    """Hashes have the same 32 bits, with characters that have a sign and without."""
    assert set(HASHES) == set(DATA["hashes"])
    for signed in (True, False):
        table = DATA["hashes"] if signed else DATA["hashes"] | DATA["hashes of unsigned characters"]
        found = [f"{HASHES[name](key, signed):08x}" for key in KEYS[1:]]
        assert "".join(found) == table[name]


def test_the_vectors_tell_differences() -> None:
    """They have all kinds, hashes and signs, and no node is without keys where there are enough."""
    rows = DATA["placements"]
    assert {row[0] for row in rows} == set(KINDS)
    for kind in ("twemproxy-ketama", "twemproxy-modula"):
        mine = [row for row in rows if row[0] == kind]
        assert {row[2].get("hash", "fnv1a_64") for row in mine} == set(HASHES)
        assert len({row[3] for row in mine if row[1] == "n7"}) > len(HASHES)
    for kind, nodes, options, found in rows:
        if nodes.endswith(("n3", "n4")) and options.get("hash") is None:
            assert len(set(found) - {"-"}) == len(DATA["sets"][nodes]), (kind, nodes)


# The sign


def test_the_sign() -> None:
    """Without the sign half of the keys are elsewhere on 3 nodes, and none on 4."""
    keys = [b"user:%d:profile" % i for i in range(20_000)]
    for count, share in ((1, 0), (2, 0), (3, 0.5), (4, 0), (6, 0.5), (7, 0.5), (8, 0)):
        names = [str(i) for i in range(count)]
        signed, unsigned = places(SignedCrc32(names), keys), places(Crc32(names), keys)
        moved = [key for key, a, b in zip(keys, signed, unsigned, strict=True) if a != b]
        assert moved == [key for key in keys if share and zlib.crc32(key) >= 2**31]
        assert len(moved) / len(keys) == pytest.approx(share, abs=0.01)


# Rings


@pytest.mark.parametrize("ring", RINGS)
def test_a_node_more_moves_the_least(ring: type[Legacy]) -> None:
    """What moves goes to the new node, about its share, and comes back when it is taken away."""
    names = [f"node-{i}" for i in range(5)]
    before, after = ring(names[:4]), ring(names)
    moved = [key for key in MANY if before.node_for(key) != after.node_for(key)]
    assert {after.node_for(key) for key in moved} == {"node-4"}
    assert 0.15 < len(moved) / len(MANY) < 0.25
    assert len({before.node_for(key) for key in moved}) == 4


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights(kind: Any) -> None:
    """A node has its share of keys by weight; the same weights of all are as none."""
    names = ["a", "b", "c"]
    placement = kind(names, weights={"b": 2, "c": 5})
    counts = Counter(map(placement.node_for, MANY))
    for name, weight in (("a", 1), ("b", 2), ("c", 5)):
        assert counts[name] / len(MANY) == pytest.approx(weight / 8, rel=0.25)
    if kind is not TwemproxyModula:
        same = kind(names, weights=dict.fromkeys(names, 3))
        assert list(map(same.node_for, MANY)) == list(map(kind(names).node_for, MANY))


@pytest.mark.parametrize("kind", IDENTIFIED)
def test_identities_decide(kind: Any) -> None:
    """A node that is renamed keeps its keys when its identity is kept, and only then."""
    old = kind(["a", "b", "c"])
    new = kind(["x", "y", "z"], identities={"x": "a", "y": "b", "z": "c"})
    renamed = {"a": "x", "b": "y", "c": "z"}
    assert [renamed[old.node_for(key)] for key in MANY] == [new.node_for(key) for key in MANY]
    if kind in RINGS:
        other = kind(["x", "y", "z"])
        assert [other.node_for(key) for key in MANY] != [new.node_for(key) for key in MANY]


@pytest.mark.parametrize("kind", TWEMPROXY)
def test_twemproxy_sorts_its_servers(kind: Any) -> None:
    """The order in which servers are listed changes nothing: shorter names come first."""
    texts = {"first": "é"}
    placement = kind(["z", "bb", "a", "ccc", "first"], identities=texts)
    assert placement.nodes == ("a", "z", "bb", "first", "ccc")
    other = kind(["ccc", "first", "a", "z", "bb"], identities=texts)
    assert other == placement
    assert [other.node_for(key) for key in MANY] == [placement.node_for(key) for key in MANY]


@pytest.mark.parametrize("kind", [SignedCrc32, Crc32, RbKetama, RedisShard])
def test_others_keep_the_order(kind: type[Legacy]) -> None:
    """Nodes of the others stay in the order in which they are listed, also from a generator."""
    names = ["z", "bb", "a"]
    assert kind(iter(names)).nodes == ("z", "bb", "a")
    assert kind(names) != kind(sorted(names))


@pytest.mark.parametrize("kind", TWEMPROXY)
def test_hash_tags(kind: Any) -> None:
    """Keys with the same tag are on one node; without `hash_tag` they are not."""
    names = [str(i) for i in range(7)]
    keys = [b"%d:{user}" % i for i in range(50)]
    assert {kind(names, hash_tag="{}").node_for(key) for key in keys} == {
        kind(names).node_for(b"user")
    }
    assert len({kind(names).node_for(key) for key in keys}) > 3
    assert len({kind(names, hash_tag="<>").node_for(key) for key in keys}) > 3


# What is told


@pytest.mark.parametrize("kind", KINDS)
def test_describe_and_read(kind: str) -> None:
    """What is told goes through JSON, and what is read from it is the same in all."""
    rows = [row for row in DATA["placements"] if row[0] == kind]
    for _, nodes, options, _ in rows:
        placement = made(kind, DATA["sets"][nodes], options)
        told = placement.describe()
        assert told["kind"] == kind == placement.kind
        assert tuple(told["nodes"]) == placement.nodes
        again = KINDS[kind].read(json.loads(json.dumps(told)))
        assert type(again) is type(placement)
        assert again.describe() == told
        assert again == placement
        assert hash(again) == hash(placement)
        assert places(again, KEYS) == places(placement, KEYS)


def test_all_that_decides_is_told() -> None:
    """Placements that differ in one thing are not equal, and tell so."""
    names = ["a", "b"]
    others: list[Legacy] = [
        SignedCrc32(names),
        Crc32(names),
        Crc32(names[::-1]),
        Crc32([*names, "c"]),
        NydusKetama(names),
        RbKetama(names),
        RbKetama(names, weights={"a": 2}),
        RbKetama(names, identities={"a": "x"}),
        TwemproxyModula(names),
        TwemproxyKetama(names),
        TwemproxyKetama(names, weights={"a": 2}),
        TwemproxyKetama(names, identities={"a": "x"}),
        TwemproxyKetama(names, hash="md5"),
        TwemproxyKetama(names, hash_tag="{}"),
        TwemproxyKetama(names, signed_char=False),
        RedisShard(names),
        RedisShard(names, identities={"a": "x"}),
        RedisShard(names, hash="md5"),
        RedisShard(names, keys="bytes"),
    ]
    assert len({json.dumps(other.describe(), sort_keys=True) for other in others}) == len(others)
    for i, one in enumerate(others):
        assert [one == other for other in others] == [i == j for j in range(len(others))]
    assert Crc32(names) != names


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_told_is_ones_own(kind: str) -> None:
    """Whoever changes what was told does not change the placement."""
    placement = KINDS[kind](["a", "b", "c"])
    told, before = placement.describe(), [placement.node_for(key) for key in MANY]
    for value in told.values():
        if isinstance(value, dict | list):
            value.clear()
    assert placement == KINDS[kind](["a", "b", "c"])
    assert [placement.node_for(key) for key in MANY] == before


@pytest.mark.parametrize("kind", KINDS.values())
def test_reading_what_is_wrong(kind: type[Legacy]) -> None:
    """Another kind, a part that lacks or is unknown, and values that no placement has."""
    told = kind(["a", "b"]).describe()
    wrong: list[Any] = [None, [], "crc32", {}, {"kind": kind.kind}, told | {"kind": "slots"}]
    wrong += [{name: told[name] for name in told if name != left} for left in told]
    wrong += [told | {"more": 1}, told | {1: 2}]
    wrong += [told | {"nodes": nodes} for nodes in (None, [], "ab", ["a", "a"], ["a", 1], 7)]
    if "weights" in told:
        wrong += [told | {"weights": weights} for weights in ({"a": 0}, {"z": 1}, [1, 2], "ab")]
    if "identities" in told:
        wrong += [told | {"identities": texts} for texts in ({"a": 1}, {"z": "z"}, ["a"], "ab")]
    if "hash" in told:
        wrong += [told | {"hash": "sha256"}, told | {"hash": []}]
        wrong += [told | {name: 7} for name in told if name in ("hash_tag", "signed_char", "keys")]
    for one in wrong:
        with pytest.raises(UsageError):
            kind.read(one)
    assert kind.read(told) == kind(["a", "b"])


# What is accepted


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([], "no nodes: at least one"),
        ("abc", "a list of names is accepted, not 'abc'"),
        (b"abc", "a list of names"),
        (3, "a list of names is accepted, not 3"),
        (None, "a list of names"),
        (["a", "b", "a"], "two nodes are called 'a'"),
        (["a", ""], "1 to 64 printable ASCII characters .*, not ''"),
        (["a", b"b"], "1 to 64 printable .*, not b'b'"),
        ([1], "1 to 64 printable .*, not 1"),
        (["a b"], "1 to 64 printable"),
        (["é"], "1 to 64 printable"),
        (["a" * 65], "1 to 64 printable"),
        ([["a"]], "1 to 64 printable"),
    ],
    ids=repr,
)
def test_names(kind: type[Legacy], nodes: Any, said: str) -> None:
    """No nodes, one twice, and what is no name: the error says what is accepted."""
    with pytest.raises(UsageError, match=said):
        kind(nodes)


@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize(
    "weight",
    [0, -1, 1.5, 2.0, True, math.nan, math.inf, "2", None, Decimal(2), 1_000_001],
    ids=repr,
)
def test_weights_that_are_none(kind: Any, weight: Any) -> None:
    """A weight is a whole number from 1 to a million; the error says so, and of which node."""
    with pytest.raises(
        UsageError, match="node b: its weight is a whole number from 1 to 1,000,000"
    ):
        kind(["a", "b"], weights={"b": weight})
    assert kind(["a", "b"], weights={"b": 1_000_000}).weights == {"a": 1, "b": 1_000_000}


@pytest.mark.parametrize("kind", IDENTIFIED)
def test_options_of_nodes(kind: Any) -> None:
    """Weights and identities are mappings of nodes that are there; identities differ."""
    for what in ("weights", "identities") if kind in WEIGHTED else ("identities",):
        with pytest.raises(UsageError, match=f"{what}: there is no node 'c'"):
            kind(["a", "b"], **{what: {"c": 1}})
        for wrong in ([1, 2], "ab", 3):
            with pytest.raises(UsageError, match=f"{what}: a mapping by node is accepted"):
                kind(["a", "b"], **{what: wrong})
    for texts in ({"a": "x", "b": "x"}, {"a": "b"}):
        with pytest.raises(UsageError, match="the same identity"):
            kind(["a", "b"], identities=texts)
    for text in ("", 1, None, b"x", "x\0", "\ud800", "x" * 5000):
        with pytest.raises(UsageError, match="node b: its identity is a string of 1 to"):
            kind(["a", "b"], identities={"b": text})


def test_options_of_redis_shard() -> None:
    """Only hashes that it has, three kinds of keys, and names in ASCII."""
    wrong: Any
    for wrong in ("fnv1a_64", "", None, ["md5"]):
        with pytest.raises(UsageError, match="hash: one of crc32, md5, sha1, not "):
            RedisShard(["a"], hash=wrong)
    for wrong in ("str", "", None, bytes):
        with pytest.raises(UsageError, match="keys: one of text, bytes, python2, not "):
            RedisShard(["a"], keys=wrong)
    with pytest.raises(UsageError, match="node a: its identity is a string in ASCII"):
        RedisShard(["a"], identities={"a": "é"})


@pytest.mark.parametrize("kind", TWEMPROXY)
def test_options_of_twemproxy(kind: Any) -> None:
    """Only hashes that it has, tags of two characters, and a sign or none; long names are cut."""
    wrong: Any
    for wrong in ("sha1", "FNV1A_64", "", None, 1, ["md5"]):
        with pytest.raises(UsageError, match="hash: one of one_at_a_time, md5, "):
            kind(["a"], hash=wrong)
    for wrong in ("{", "{}}", "é}", None, b"{}", 2, ["{", "}"]):
        with pytest.raises(UsageError, match="hash_tag: two ASCII characters"):
            kind(["a"], hash_tag=wrong)
    for wrong in (1, None, "yes"):
        with pytest.raises(UsageError, match="signed_char: True or False"):
            kind(["a"], signed_char=wrong)
    kind(["a"], identities={"a": "x" * 255})
    with pytest.raises(UsageError, match="a string of 1 to 255 bytes"):
        kind(["a"], identities={"a": "x" * 256})


@pytest.mark.parametrize("kind", IDENTIFIED)
def test_identities_are_not_shown(kind: Any) -> None:
    """What rb hashed has the password in it: it is in no `repr` and no error."""
    secret = "<HostInfo password='hunter2'>"
    assert "hunter2" not in repr(kind(["a", "b"], identities={"a": secret}))
    for texts in ({"a": secret, "b": secret}, {"a": secret * 200}, {"a": secret + "\0"}):
        with pytest.raises(UsageError) as caught:
            kind(["a", "b"], identities=texts)
        assert "hunter2" not in str(caught.value)
