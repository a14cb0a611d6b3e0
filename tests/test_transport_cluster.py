"""The transport on a Redis Cluster: slots that move, nodes that go, keys that do not fit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from redishacks._command import Command, Outcome
from redishacks._slots import key_slot
from redishacks._transport import _cluster
from redishacks._transport._cluster import SlotMap
from redishacks.errors import CrossNodeError, MaybeAppliedError, ServerError, UnavailableError
from redishacks.testing import Cluster, valkey_cluster
from tests.transport_kit import LENIENCE, Colour, echo, eventually, get, incr, say, scripted, took

ADD = "return redis.call('INCRBY', KEYS[1], ARGV[1])"


@pytest.fixture
def colour(flavour: str) -> Iterator[Colour]:
    """Both colours in turn."""
    made = Colour(flavour)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three primaries."""
    with valkey_cluster() as made:
        yield made


def spread(prefix: str, count: int = 60) -> list[str]:
    """Keys of many slots on all nodes."""
    return [f"{prefix}:{n}" for n in range(count)]


def test_redis_pys_cluster_client_counts_twice(cluster: Cluster, prefix: str) -> None:
    """The reason: one INCR of RedisCluster's default becomes two or more, without an error."""
    client = cluster.client(socket_timeout=0.2)
    client.get(prefix)
    returned: list[Any] = []
    node = cluster.node_of(key_slot(prefix.encode()))
    with node.paused():
        thread = threading.Thread(target=lambda: returned.append(client.incr(prefix)))
        thread.start()
        time.sleep(0.5)
    thread.join()
    assert returned[0] >= 2
    client.close()


def test_a_hung_node_costs_the_deadline_and_counts_once(
    colour: Colour, cluster: Cluster, prefix: str
) -> None:
    """A hung node: in doubt after the deadline; others answer meanwhile, in the same run too."""
    line = colour.to_cluster(cluster)
    keys = spread(prefix)
    node = cluster.node_of(key_slot(keys[0].encode()))
    there = [k for k in keys if cluster.node_of(key_slot(k.encode())) is node]
    assert all(outcome.value == 1 for outcome in line.run([incr(key) for key in keys]))
    with node.paused():
        with took(at_least=0.5, at_most=0.6 + LENIENCE), pytest.raises(MaybeAppliedError):
            line.call(incr(keys[0]), 0.6)
        outcomes = dict(zip(keys, line.run([incr(key) for key in keys], 0.6), strict=True))
        for key, outcome in outcomes.items():
            if key in there:
                assert isinstance(outcome.error, MaybeAppliedError | UnavailableError)
            else:
                assert outcome.value == 2
    values = {key: int(line.call(get(key))) for key in there}
    assert values.pop(keys[0]) in (1, 2, 3)
    assert set(values.values()) <= {1, 2}


def test_a_hung_cluster_costs_the_deadline(colour: Colour, cluster: Cluster, prefix: str) -> None:
    """When every node hangs, each call costs the deadline: looking for a new map is within it."""
    line = colour.to_cluster(cluster)
    line.run([incr(key) for key in spread(prefix)])
    with ExitStack() as stack:
        for node in cluster.nodes:
            stack.enter_context(node.paused())
        for n in range(3):
            with took(at_most=1.0 + LENIENCE), pytest.raises((MaybeAppliedError, UnavailableError)):
                line.call(incr(f"{prefix}:{n}"), 1.0)
        with took(at_most=1.0 + LENIENCE):
            assert all(outcome.error for outcome in line.run([incr(k) for k in spread(prefix)], 1))
    assert line.call(incr(prefix)) == 1


@pytest.mark.parametrize("protocol", [2, 3])
def test_commands_go_where_their_keys_live(
    colour: Colour, cluster: Cluster, prefix: str, protocol: int
) -> None:
    """Calls, scripts and runs over all nodes; outcomes keep the order of their commands."""
    line = colour.to_cluster(cluster, protocol=protocol)
    keys = spread(prefix)
    assert [line.call(incr(key)) for key in keys] == [1] * len(keys)
    scripts = [scripted(ADD, n, keys=[key]) for n, key in enumerate(keys)]
    assert [o.result() for o in line.run(scripts)] == [n + 1 for n in range(len(keys))]
    assert [o.result() for o in line.run([echo(n) for n in range(9)])] == [
        b"%d" % n for n in range(9)
    ]
    with pytest.raises(ServerError, match="WRONGTYPE"):
        line.call(say("LPUSH", 1, key=keys[0]))


def test_keys_of_different_slots_are_refused(colour: Colour, cluster: Cluster, prefix: str) -> None:
    """Nothing is sent of a command whose keys do not share a slot; the rest of a run is."""
    line = colour.to_cluster(cluster)
    pair = (f"{prefix}:a".encode(), f"{prefix}:b".encode())
    wrong: Command[Any] = Command(("MSET", pair[0], "1", pair[1], "2"), pair)
    for _ in range(2):
        with pytest.raises(CrossNodeError, match="share a slot"):
            line.call(wrong)
    first, second = line.run([wrong, incr(prefix)])
    assert isinstance(first.error, CrossNodeError)
    assert second.value == 1
    tagged = (f"{{{prefix}}}a".encode(), f"{{{prefix}}}b".encode())
    assert line.call(Command(("MSET", tagged[0], "1", tagged[1], "2"), tagged)) == b"OK"


def test_a_moved_slot_goes_unnoticed(colour: Colour, cluster: Cluster, prefix: str) -> None:
    """While a slot is being moved, and after it was, its keys are found: ASK, then MOVED."""
    line = colour.to_cluster(cluster)
    slot = key_slot(prefix.encode())
    keys = [f"{{{prefix}}}{n}" for n in range(6)]
    assert [o.value for o in line.run([incr(key) for key in keys])] == [1] * 6
    source = cluster.nodes.index(cluster.node_of(slot))
    target = (source + 1) % 3
    cluster.begin_migration(slot, target)
    assert [line.call(incr(key)) for key in keys] == [2] * 6
    assert [o.result() for o in line.run([incr(key) for key in keys])] == [3] * 6
    assert line.call(scripted(ADD, 1, keys=[keys[0]])) == 4
    both = tuple(key.encode() for key in keys)
    half_moved: Command[Any] = Command(("MGET", *both), both, repeatable=True)
    with pytest.raises(UnavailableError, match="TRYAGAIN"):
        line.call(half_moved, 0.2)
    timer = threading.Timer(0.2, cluster.move_slot, (slot, target))
    timer.start()
    assert line.call(half_moved) == [b"4", *[b"3"] * 5]
    timer.join()
    assert [line.call(incr(key)) for key in keys] == [5, *[4] * 5]
    cluster.move_slot(slot, source)
    assert [o.result() for o in line.run([incr(key) for key in keys])] == [6, *[5] * 5]


def test_a_move_under_load_loses_and_doubles_nothing(
    colour: Colour, cluster: Cluster, prefix: str
) -> None:
    """Writes that go on while their slot moves to and fro count once each."""
    line = colour.to_cluster(cluster)
    slot = key_slot(prefix.encode())
    done = threading.Event()

    def move() -> None:
        try:
            home = cluster.nodes.index(cluster.node_of(slot))
            for step in (1, 2, 0):
                cluster.move_slot(slot, (home + step) % 3)
        finally:
            done.set()

    thread = threading.Thread(target=move)
    thread.start()
    count = 0
    while not done.is_set():
        count += 1
        assert line.call(incr(prefix)) == count
        count += 3
        assert [o.result() for o in line.run([incr(prefix)] * 3)] == [count - 2, count - 1, count]
    thread.join()
    assert line.call(get(prefix)) == b"%d" % count


def test_a_lost_node_is_replaced(colour: Colour, prefix: str) -> None:
    """A dead primary is refused at once; when its replica took over, calls go there."""
    with valkey_cluster(replicas=1, cluster_node_timeout=500) as cluster:
        line = colour.to_cluster(cluster)
        slot = key_slot(prefix.encode())
        assert line.call(incr(prefix)) == 1
        cluster.node_of(slot).kill()
        time.sleep(0.02)
        with took(at_most=1), pytest.raises(UnavailableError):
            line.call(incr(prefix), 5)

        def back() -> bool:
            try:
                return int(line.call(incr(prefix), 0.5)) == 2
            except UnavailableError:
                return False

        eventually(back)
        for key in spread(prefix):
            assert line.call(incr(key)) == 1


def test_a_cluster_that_is_gone(colour: Colour) -> None:
    """With no node left every command says so, at once."""
    with valkey_cluster(primaries=1) as cluster:
        line = colour.to_cluster(cluster)
        assert line.call(incr("k")) == 1
        fresh = colour.to_cluster(cluster)
    time.sleep(0.02)
    for one in (line, fresh):
        with took(at_most=1), pytest.raises(UnavailableError):
            one.call(incr("k"))
        with took(at_most=1):
            assert isinstance(one.run([incr("k")])[0].error, UnavailableError)


def asked_in_vain(slots: SlotMap) -> list[Any]:
    """Return whom it asks for the map when nobody answers."""
    steps, asked = slots.refresh(), []
    effect: Any = next(steps)
    while True:
        asked.append(effect.commands[0].node)
        try:
            effect = steps.send([Outcome(None, UnavailableError("away"))])
        except StopIteration:
            return asked


def test_the_slot_map() -> None:
    """The reply of CLUSTER SLOTS, with missing hosts, unknown names and remapped addresses."""
    slots = SlotMap([("start", 1)], lambda node: (node[0], node[1] + 1000))
    assert slots.view is None
    assert asked_in_vain(slots) == [("start", 1)]
    reply = [
        [0, 99, [b"a", 1, b"id"], [b"replica", 2, b"id"]],
        [100, 16382, [b"", 3, b"id"]],
        [16383, 16383, [b"?", 4, b"id"]],
    ]
    slots.load(reply, ("asked", 9))
    assert slots.view is slots
    assert slots.nodes() == {("a", 1001), ("asked", 1003), ("replica", 1002), ("start", 1)}
    by_slot = {key_slot(b"%d" % n): b"%d" % n for n in range(200_000)}
    assert slots.route([by_slot[99]]) == ("a", 1001)
    assert slots.route([by_slot[100]]) == ("asked", 1003)
    assert slots.route([by_slot[16383]]) in {("a", 1001), ("asked", 1003)}
    assert not slots.stale
    slots.doubt(("a", 1001))
    assert slots.stale
    assert asked_in_vain(slots)[-1] == ("a", 1001)
    slots.moved(99, ("b", 5))
    assert slots.route([by_slot[99], b"{%s}x" % by_slot[99]]) == ("b", 5)
    assert slots.where([by_slot[99]]) == "b:5"
    assert {slots.route([], avoid=("a", 1001)) for _ in range(50)} == {("asked", 1003), ("b", 5)}
    slots.load([], ("asked", 9))  # a node that knows nothing is not believed
    assert slots.view is slots
    assert slots.due(0.0)
    assert not slots.due(_cluster.PATIENCE / 2)
    assert slots.due(_cluster.PATIENCE * 2)


def test_a_clusters_connect_function_is_refused(cluster: Cluster) -> None:
    """What cannot be honoured is refused rather than ignored."""
    client = cluster.client(redis_connect_func=lambda connection: connection.on_connect())
    with pytest.raises(ValueError, match="redis_connect_func"):
        Colour("sync").connect(client)
    client.close()
    assert isinstance(client, redis.RedisCluster)
