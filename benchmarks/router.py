"""The router against redis-py's pipelines and cluster client, threads, rb, and bare sockets.

Four nodes and a cluster of three, on loopback, all of the same machine: what one of them does in
its own time elsewhere takes time from the others here. The limit is bare sockets without a library:
keys are encoded and sorted by node, each node is told one MGET (over a cluster: packed GETs),
all are written before the first is read, values come back in the order of the keys. It knows
neither hash tags nor wrong types, deadlines or lost connections.

rb runs on redis-py 4.6, the last that it can be constructed with, in a process of its own. Without
an index of packages it is left out.

A move of keys is timed from its first give to its last forget, and so without the fences, in which
clients learn of it. The limit for that is DUMP, RESTORE and UNLINK in pipelines on bare sockets.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import gc
import itertools
import multiprocessing as mp
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, cast

import hiredis

from benchmarks.harness import Figure, Row, percentile, ratio_row, show, side_by_side
from redishacks._command import Command, script
from redishacks._slots import key_slot
from redishacks._transport import connect
from redishacks.router import AsyncRouter, Router, SlotTable
from redishacks.testing import Cluster, Server, valkey_cluster, valkey_server

#: Of whoever is measured: a busy machine must not turn a slow answer into an error.
PATIENT = 30.0
#: Keys of a batch, and batches of a round.
KEYS, TURNS = 1_000, 5
ROUNDS = 15
VALUE = b"x" * 100
#: Of the map with a hung node, in seconds; how many of its commands are for that node.
DEADLINE, HUNG = 0.2, 50
#: Keys of which a quarter moves, keys of one pipeline, and moves there and back.
MANY, PIECE, MOVES = 100_000, 500, 3

NUMBERS = itertools.count()


def keys_of(count: int) -> list[str]:
    """Return new keys."""
    return [f"user:{number}" for number in itertools.islice(NUMBERS, count)]


def ratio(figures: Mapping[str, Figure], slow: str, fast: str) -> float:
    """Return how much longer one takes than another, as the median over rounds."""
    a, b = figures[slow].rates, figures[fast].rates
    return statistics.median(y / x for x, y in zip(a, b, strict=True))


def most_row(what: str, figures: Mapping[str, Figure], ours: str, peer: str, most: float) -> Row:
    """Make a row of how many times as long as a peer ours may take."""
    value = ratio(figures, ours, peer)
    a, b = (f"{1e6 / figures[who].rate:.2f} µs" for who in (ours, peer))
    return Row(what, a, b, f"≤ {most:g}×", f"{value:.2f}×", value <= most)


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Spare what is measured that the collector looks through all that is loaded, by chance."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Slots


def slots() -> list[Row]:
    """The slot of a key, and how evenly slots are spread."""
    plain = [key.encode() for key in keys_of(KEYS)]
    tagged = [b"{%s}:profile" % key for key in plain]
    crc = binascii.crc_hqx

    def bare() -> int:
        for key in plain:
            crc(key, 0)
        return KEYS

    def of(keys: Sequence[Any], slot: Callable[[Any], int]) -> Callable[[], int]:
        def run() -> int:
            for key in keys:
                slot(key)
            return KEYS

        return run

    router: Any = Router({"a": "redis://nowhere"})
    with frozen():
        figures = side_by_side(
            {
                "crc_hqx": bare,
                "ours": of(plain, router.slot),
                "with a hash tag": of(tagged, router.slot),
                "inside": of(plain, key_slot),
            },
            rounds=4 * ROUNDS,
        )
    print(" slot of a key")
    show(figures)
    micros = {name: [1e6 / rate for rate in figure.rates] for name, figure in figures.items()}
    pairs = zip(micros["ours"], micros["crc_hqx"], strict=True)
    more = statistics.median(a - b for a, b in pairs)
    whole, by_tag, peer = (
        f"{statistics.median(micros[who]):.2f} µs" for who in ("ours", "with a hash tag", "crc_hqx")
    )
    row = Row(
        "slot of a key; crc_hqx itself",
        f"{whole}, with a hash tag {by_tag}",
        peer,
        "≤ 0.3 µs more",
        f"{more:.2f} µs more",
        more <= 0.3,
    )
    return [row, balance()]


def balance() -> Row:
    """How many slots the fullest node has, for fresh tables and for ones that have grown."""
    worst, where = 0.0, ""
    grown = SlotTable.fresh({"node00": 1})
    for count in range(1, 33):
        names = {f"node{i:02}": 1 for i in range(count)}
        grown = grown.changed(names)
        for kind, one in (("fresh", SlotTable.fresh(names)), ("grown", grown)):
            value = max(map(one.by_slot.count, names)) * count / len(one.by_slot)
            if value > worst:
                worst, where = value, f"{count} nodes, {kind}"
    shown = f"{worst:.4f}×"
    return Row("slots of the fullest of 1 to 32 nodes; their mean", shown, "", "≤ 1.01×",
               f"{shown} ({where})", worst <= 1.01)  # fmt: skip


# Batches


class Bare:
    """Sockets to some nodes, who has which slot, and nothing besides."""

    def __init__(self, servers: Mapping[Any, Server], by_slot: Sequence[Any]) -> None:
        self.by_slot = by_slot
        self.sockets = {}
        for name, server in servers.items():
            self.sockets[name] = made = socket.create_connection((server.host, server.port))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.settimeout(PATIENT)

    def groups(self, keys: Sequence[str]) -> tuple[list[Any], dict[Any, list[bytes]]]:
        """Return the node of each key, and the keys of each node."""
        crc, by_slot = binascii.crc_hqx, self.by_slot
        groups: dict[Any, list[bytes]] = {name: [] for name in self.sockets}
        owners = []
        for key in keys:
            raw = key.encode()
            owner = by_slot[crc(raw, 0) & 16383]
            owners.append(owner)
            groups[owner].append(raw)
        return owners, groups

    def mget(self, keys: Sequence[str]) -> list[bytes]:
        """Read keys, by one MGET for each node."""
        pack: Any = hiredis.pack_command
        owners, groups = self.groups(keys)
        for name, some in groups.items():
            self.sockets[name].sendall(pack((b"MGET", *some)))
        found = {name: iter(read(self.sockets[name], 1)[0]) for name in groups}
        return [next(found[owner]) for owner in owners]

    def gets(self, keys: Sequence[str]) -> list[bytes]:
        """Read keys, by GETs packed for each node."""
        pack: Any = hiredis.pack_command
        owners, groups = self.groups(keys)
        for name, some in groups.items():
            self.sockets[name].sendall(b"".join([pack((b"GET", key)) for key in some]))
        found = {name: iter(read(self.sockets[name], len(some))) for name, some in groups.items()}
        return [next(found[owner]) for owner in owners]

    def close(self) -> None:
        """Close the sockets."""
        for each in self.sockets.values():
            each.close()


def read(link: socket.socket, count: int) -> list[Any]:
    """Return so many replies."""
    reader = hiredis.Reader()
    found: list[Any] = []
    while len(found) < count:
        reader.feed(link.recv(262_144))
        while (reply := reader.gets()) is not False:
            found.append(reply)
    return found


class Pipelines:
    """redis-py's pipeline for each node, whose keys are sorted as ours are."""

    def __init__(self, servers: Mapping[str, Server], by_slot: Sequence[str]) -> None:
        self.clients = {name: server.client() for name, server in servers.items()}
        self.by_slot = by_slot
        self.pool = ThreadPoolExecutor(len(servers))

    def _sorted(self, keys: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
        groups: dict[str, list[str]] = {name: [] for name in self.clients}
        owners = []
        for key in keys:
            owner = self.by_slot[key_slot(key.encode())]
            owners.append(owner)
            groups[owner].append(key)
        return owners, groups

    def _read(self, name: str, keys: Sequence[str]) -> Iterator[Any]:
        pipe = self.clients[name].pipeline(transaction=False)
        for key in keys:
            pipe.get(key)
        return iter(pipe.execute())

    def in_turn(self, keys: Sequence[str]) -> list[bytes]:
        """Read from one node after the other."""
        owners, groups = self._sorted(keys)
        found = {name: self._read(name, some) for name, some in groups.items()}
        return [next(found[owner]) for owner in owners]

    def threads(self, keys: Sequence[str]) -> list[bytes]:
        """Read from all nodes, by a thread each."""
        owners, groups = self._sorted(keys)
        found = dict(zip(groups, self.pool.map(self._read, groups, groups.values()), strict=True))
        return [next(found[owner]) for owner in owners]

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()
        for client in self.clients.values():
            client.close()


_RB = """
import sys, rb
ports, count = [int(port) for port in sys.argv[2:]], int(sys.argv[1])
hosts = {at: {"port": port} for at, port in enumerate(ports)}
cluster = rb.Cluster(hosts, router_cls=rb.PartitionRouter)
keys = ["rb:%d" % i for i in range(count)]

def batch():
    with cluster.map() as client:
        found = [client.get(key) for key in keys]
    return [each.value for each in found]

with cluster.map() as client:
    for key in keys:
        client.set(key, "x" * 100)
assert batch() == [b"x" * 100] * count
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        batch()
    print("done", flush=True)
"""


@contextlib.contextmanager
def rb(servers: Mapping[str, Server]) -> Iterator[Callable[[], int] | None]:
    """Return a contender: rb in a process of its own; None when it cannot be had."""
    with tempfile.TemporaryDirectory() as directory:
        got = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check",
             "--target", directory, "rb", "redis==4.6.0", "hiredis"],
            capture_output=True, check=False,
        )  # fmt: skip
        if got.returncode != 0:
            print(" rb is left out: it could not be installed")
            yield None
            return
        # What is on the path comes before what is installed.
        process = subprocess.Popen(
            [sys.executable, "-c", _RB, str(KEYS), *(str(each.port) for each in servers.values())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": directory},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        told, said = process.stdin, process.stdout
        assert said.readline() == "ready\n"

        def run() -> int:
            told.write(f"{TURNS}\n")
            told.flush()
            assert said.readline() == "done\n"
            return TURNS

        yield run
        told.close()
        process.wait(PATIENT)


def batches(work: Callable[[Sequence[str]], list[Any]], keys: Sequence[str]) -> Callable[[], int]:
    """Return a contender that reads the keys again and again."""
    assert work(keys) == [VALUE] * len(keys)

    def run() -> int:
        for _ in range(TURNS):
            work(keys)
        return TURNS

    return run


def mapped(router: Any, keys: Sequence[str]) -> list[Any]:
    """Read keys by our batch."""
    with router.map() as m:
        found = [m.get(key) for key in keys]
    return [each.value for each in found]


def maps(servers: Mapping[str, Server]) -> list[Row]:
    """A batch over four nodes."""
    router: Any = Router({name: server.url for name, server in servers.items()}, deadline=PATIENT)
    keys = keys_of(KEYS)
    router.mset(dict.fromkeys(keys, VALUE))
    by_slot = [router.node_for(tag) for tag in tags()]
    bare, pipes = Bare(servers, by_slot), Pipelines(servers, by_slot)
    with rb(servers) as of_rb, contextlib.closing(bare), contextlib.closing(pipes):
        contenders = {
            "ours": batches(lambda keys: mapped(router, keys), keys),
            "bare sockets": batches(bare.mget, keys),
            "redis-py in turn": batches(pipes.in_turn, keys),
            "threads": batches(pipes.threads, keys),
            "mget": batches(router.mget, keys),
        }
        if of_rb is not None:
            contenders["rb"] = of_rb
        with frozen():
            figures = side_by_side(contenders, rounds=ROUNDS)
    router.close()
    print(f" {KEYS} GETs over {len(servers)} nodes")
    show(figures)
    what = f"map of {KEYS:,} GETs, {len(servers)} nodes"
    row = ratio_row(f"{what}; redis-py in turn", figures, "ours", "redis-py in turn", 4)
    others = [
        f"{name} {figures[name].rate:,.0f}/s" for name in ("threads", "rb") if name in figures
    ]
    return [
        row._replace(against="; ".join([row.against, *others])),
        most_row(f"{what}; bare sockets", figures, "ours", "bare sockets", 1.5),
    ]


def tags() -> list[str]:
    """Return a hash tag of each slot, in order."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < 16384:
        found.setdefault(key_slot(b"%d" % number), str(number))
        number += 1
    return [found[slot] for slot in range(16384)]


def cluster_maps(cluster: Cluster) -> list[Row]:
    """The same over a cluster."""
    client: Any = cluster.client()
    router: Any = Router.over(client, deadline=PATIENT)
    keys = keys_of(KEYS)
    router.mset(dict.fromkeys(keys, VALUE))
    by_slot = [router.node_for(tag) for tag in tags()]
    bare = Bare({f"{node.host}:{node.port}": node for node in cluster.nodes}, by_slot)

    def pipeline(keys: Sequence[str]) -> list[Any]:
        pipe = client.pipeline()
        for key in keys:
            pipe.get(key)
        found: list[Any] = pipe.execute()
        return found

    with contextlib.closing(bare), frozen():
        figures = side_by_side(
            {
                "ours": batches(lambda keys: mapped(router, keys), keys),
                "bare sockets": batches(bare.gets, keys),
                "mget_nonatomic": batches(client.mget_nonatomic, keys),
                "pipeline": batches(pipeline, keys),
                "mget": batches(router.mget, keys),
            },
            rounds=ROUNDS,
        )
    router.close()
    print(f" {KEYS} GETs over a cluster")
    show(figures)
    what = f"map of {KEYS:,} GETs, cluster of 3"
    limit = f"; bare sockets {figures['bare sockets'].rate:,.0f}/s"
    rows = [
        ratio_row(f"{what}; mget_nonatomic", figures, "ours", "mget_nonatomic", 5),
        ratio_row(f"{what}; cluster pipeline", figures, "ours", "pipeline", 3),
    ]
    return [row._replace(against=row.against + limit) for row in rows]


def tasks(servers: Mapping[str, Server]) -> None:
    """Print what a batch of `AsyncRouter` takes."""

    async def measure() -> list[float]:
        router: Any = AsyncRouter({name: server.url for name, server in servers.items()})
        keys, found = keys_of(KEYS), []
        await router.mset(dict.fromkeys(keys, VALUE))
        for _ in range(ROUNDS):
            began = time.perf_counter()
            async with router.map() as m:
                replies = [m.get(key) for key in keys]
            assert len([each.value for each in replies]) == KEYS
            found.append(time.perf_counter() - began)
        await router.aclose()
        return found

    print(f"  AsyncRouter: {1 / statistics.median(asyncio.run(measure())):,.0f}/s")


# One command


def single(servers: Mapping[str, Server]) -> list[Row]:
    """One command, routed and not."""
    router: Any = Router({name: server.url for name, server in servers.items()}, deadline=PATIENT)
    (key,) = keys_of(1)
    router.set(key, VALUE)
    routed, plain = router.redishacks_transport, connect(servers[router.node_for(key)].url)
    peer = servers[router.node_for(key)].client()
    command = Command[Any]((b"GET", key.encode()), (key.encode(),), repeatable=True)
    assert routed.call(command, PATIENT) == plain.call(command, PATIENT) == VALUE

    def of(work: Callable[[], Any]) -> Callable[[], int]:
        def run() -> int:
            for _ in range(200):
                work()
            return 200

        return run

    with frozen():
        figures = side_by_side(
            {
                "router.get": of(lambda: router.get(key)),
                "routed transport": of(lambda: routed.call(command, PATIENT)),
                "transport": of(lambda: plain.call(command, PATIENT)),
                "redis-py": of(lambda: peer.get(key)),
            },
            rounds=4 * ROUNDS,
        )
    router.close()
    print(" one command")
    show(figures)
    row = most_row(
        "router.get; our transport to that node", figures, "router.get", "transport", 1.1
    )
    return [
        row._replace(against=f"{row.against}; redis-py {1e6 / figures['redis-py'].rate:.2f} µs")
    ]


# A node that hangs


def hung(servers: Mapping[str, Server], cluster: Cluster) -> list[Row]:
    """A batch, of which 50 commands are for a node that does not answer."""
    took = []
    for _ in range(5):
        # A new one each time: it knows nothing of what the last one has found out.
        router: Any = Router(
            {name: server.url for name, server in servers.items()}, deadline=DEADLINE
        )
        keys = keys_of(KEYS)
        router.mset(dict.fromkeys(keys, VALUE))
        of = {name: [key for key in keys if router.node_for(key) == name] for name in servers}
        name = random.choice(list(servers))
        said = of.pop(name)[:HUNG] + [key for some in of.values() for key in some]
        with servers[name].paused():
            for _ in range(3):
                began = time.perf_counter()
                with router.map(on_error="return") as m:
                    found = [m.get(key) for key in said]
                took.append((time.perf_counter() - began) * 1000)
                assert sum(each.error is not None for each in found) == HUNG
        router.close()
    limit = DEADLINE * 1000 + 50
    print(" a hung node:", ", ".join(f"{each:.0f} ms" for each in took))
    theirs = redis_py_hung(cluster)
    worst = f"{max(took):.0f} ms"
    return [
        Row(
            f"map with a hung node of 4, {HUNG} commands on it, deadline {DEADLINE:g} s; redis-py",
            worst,
            f"{theirs:.2f} s for each command on it, timeout 0.1 s",
            f"≤ {limit:.0f} ms",
            worst,
            max(took) <= limit,
        )
    ]


def redis_py_hung(cluster: Cluster) -> float:
    """Return how long a cluster pipeline of redis-py's takes for a command on a hung node."""
    client: Any = cluster.client(socket_timeout=0.1)
    keys = keys_of(KEYS)
    node = cluster.nodes[1]
    on_it = next(key for key in keys if client.get_node_from_key(key).port == node.port)
    others = [key for key in keys if client.get_node_from_key(key).port != node.port]
    said = [on_it, *others[:50]]
    for paused in (False, True):  # its connections are warm
        pipe = client.pipeline()
        for key in said:
            pipe.get(key)
        with node.paused() if paused else contextlib.nullcontext():
            began = time.perf_counter()
            pipe.execute(raise_on_error=False)
            took = time.perf_counter() - began
    client.close()
    return took


# Moving keys


class Watched:
    """A transport that notes when keys were first given and last forgotten."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.first = self.last = 0.0

    def __getattr__(self, name: str) -> Any:
        """Return what is only passed on."""
        return getattr(self._transport, name)

    def run(self, commands: Sequence[Command[Any]], *args: Any) -> Any:
        """Say several commands."""
        began = time.perf_counter()
        outcomes = self._transport.run(commands, *args)
        said = {each.args[1] for each in commands if len(each.args) > 1}
        if script("router_give").source in said and not self.first:
            self.first = began
        if script("router_forget").source in said:
            self.last = time.perf_counter()
        return outcomes


class Moved(NamedTuple):
    """One move."""

    keys: int
    #: Seconds from the first give to the last forget, and of all.
    seconds: float
    whole: float
    #: Of readers, if there were any: 99th percentiles before and meanwhile, and the longest.
    before: float = 0.0
    meanwhile: float = 0.0
    longest: float = 0.0


def moved(router: Any, nodes: Sequence[str]) -> Moved:
    """Move keys until these nodes have all of them."""
    plan = router.plan(nodes)
    transport = router._transport
    router._transport = watched = Watched(transport)
    began = time.perf_counter()
    try:
        progress = router.reshard(plan)
    finally:
        router._transport = transport
    whole = time.perf_counter() - began
    return Moved(progress.moved, watched.last - watched.first, whole)


def reader(urls: Mapping[str, str], keys: Sequence[str], link: Connection) -> None:
    """Read keys by chance until told to stop; tells when each began, and how long it took."""
    router: Any = Router(urls, deadline=PATIENT)
    rng = random.Random(0)
    assert router.get(keys[0]) == VALUE
    link.send("ready")
    noted = []
    while not link.poll(0):
        for _ in range(100):
            key = rng.choice(keys)
            began = time.monotonic()
            assert router.get(key) == VALUE
            noted.append((began, time.monotonic() - began))
    link.send(noted)


def moves(servers: Mapping[str, Server]) -> list[Row]:
    """Moving keys to a node that is added, and back."""
    urls = {name: server.url for name, server in servers.items()}
    every = list(servers)
    three = every[:-1]
    router: Any = Router({name: urls[name] for name in three}, deadline=PATIENT)
    keys = keys_of(MANY)
    for start in range(0, MANY, 10_000):
        router.mset(dict.fromkeys(keys[start : start + 10_000], VALUE))
    router.close()
    router = Router(urls, deadline=PATIENT)
    bare = Bare({"from": servers[every[0]], "to": servers[every[-1]]}, [])
    idle, back, limits = [], [], []
    with contextlib.closing(bare):
        for _ in range(MOVES):
            limits.append(bare_move(bare, keys_of(10_000)))
            idle.append(moved(router, every))
            back.append(moved(router, three))
    watched = []
    for _ in range(2):
        watched.append(moved_while_read(router, urls, keys, every))
        moved(router, three)
    assert router.mget(keys[:1000]) == [VALUE] * 1000
    assert sum([cast(Any, server.client()).dbsize() for server in servers.values()]) >= MANY
    router.close()
    for what, some in (("3 to 4", idle), ("4 to 3", back), ("3 to 4, read meanwhile", watched)):
        shown = ", ".join(
            f"{each.keys / each.seconds:,.0f}/s ({each.whole:.2f} s)" for each in some
        )
        print(f" moves, {what}: {shown}")
    rate = statistics.median(each.keys / each.seconds for each in idle)
    limit = statistics.median(limits)
    worst = statistics.median(each.meanwhile / each.before for each in watched)
    before, meanwhile = (
        statistics.median(getattr(each, name) for each in watched) * 1e6
        for name in ("before", "meanwhile")
    )
    longest = max(each.longest for each in watched) * 1000
    return [
        Row(
            f"reshard 3 to 4, {MANY:,} keys of 100 bytes; bare DUMP, RESTORE, UNLINK",
            f"{rate:,.0f} keys/s",
            f"{limit:,.0f} keys/s",
            "40,000 keys/s",
            f"{rate:,.0f} keys/s",
            rate >= 40_000,
        ),
        Row(
            "a reader's 99th percentile meanwhile; before",
            f"{meanwhile:.0f} µs, at most {longest:.0f} ms",
            f"{before:.0f} µs",
            "≤ 5×",
            f"{worst:.1f}×",
            worst <= 5,
        ),
    ]


def bare_move(bare: Bare, keys: Sequence[str]) -> float:
    """Return how many keys per second bare sockets move; they are made for it, and dropped."""
    pack: Any = hiredis.pack_command
    old, new = bare.sockets["from"], bare.sockets["to"]

    def say(link: socket.socket, words: Sequence[tuple[Any, ...]]) -> list[Any]:
        link.sendall(b"".join(map(pack, words)))
        return read(link, len(words))

    say(old, [("SET", key, VALUE) for key in keys])
    began = time.perf_counter()
    for start in range(0, len(keys), PIECE):
        some = keys[start : start + PIECE]
        dumps = say(old, [word for key in some for word in (("DUMP", key), ("PTTL", key))])[::2]
        say(new, [("RESTORE", key, "0", dump) for key, dump in zip(some, dumps, strict=True)])
        say(old, [("UNLINK", *some)])
    took = time.perf_counter() - began
    say(new, [("UNLINK", *keys)])
    return len(keys) / took


def moved_while_read(
    router: Any, urls: Mapping[str, str], keys: Sequence[str], nodes: Sequence[str]
) -> Moved:
    """Move keys while another process reads them."""
    context = mp.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=reader, args=(dict(urls), list(keys[:20_000]), theirs))
    process.start()
    assert ours.recv() == "ready"
    time.sleep(1.0)
    began = time.monotonic()
    move = moved(router, nodes)
    ended = time.monotonic()
    ours.send("stop")
    noted = ours.recv()
    process.join(PATIENT)
    before = [took for at, took in noted if at < began]
    meanwhile = [took for at, took in noted if began <= at < ended]
    return move._replace(
        before=percentile(before, 0.99),
        meanwhile=percentile(meanwhile, 0.99),
        longest=max(meanwhile),
    )


def run() -> list[Row]:
    """Run all of it."""
    rows = slots()
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(valkey_server()) for name in "abcd"}
        cluster = stack.enter_context(valkey_cluster())
        rows += maps(servers)
        tasks(servers)
        rows += cluster_maps(cluster) + single(servers) + hung(servers, cluster)
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(valkey_server()) for name in "abcd"}
        return rows + moves(servers)
