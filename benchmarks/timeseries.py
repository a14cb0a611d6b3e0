"""Time series against the talk's code, raw GETs, and the least that can be read.

The talk has a key for each project and 10 seconds; it reads a day with a pipeline of 8,640 GETs,
drops what is empty and sums the rest. Raw GETs are the same commands packed by hiredis, without a
client between. All use one server over its unix socket, and the same hits: some part of all
10-second buckets of two days has 1 to 200. What is read is compared with these, before and after
it is timed. Bytes are counted on a server that holds nothing else.

A sum takes little more than a round trip, and that of a virtual machine takes 15 µs or 60, as the
server happens to run on the client's core or on another: ratios have both in them. The processor
time of a hit, which does not depend on it, is printed.

RedisTimeSeries cannot run here. By its documentation it takes 16 bytes for a sample that is not
compressed, and at least a chunk of 4,096 bytes for each series and resolution; users report 40
bytes for each of 12 samples. Whisper takes 12 bytes for each bucket, empty or not.
"""

from __future__ import annotations

import gc
import itertools
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import hiredis
import numpy as np
import redis

from benchmarks.harness import Figure, Row, ratio_row, side_by_side
from redishacks.testing import Server, valkey_server
from redishacks.timeseries import Series, TimeSeries

T = TypeVar("T")

STEP, HOUR, DAY = 10, 3600, 86_400
#: Which part of all buckets has hits.
FILLS = (0.01, 0.1, 1.0)
#: Of whoever is measured: a busy machine must not turn a slow answer into an error.
PATIENT = 30.0
ROUNDS = 11
#: Seconds that the talk's keys live.
KEPT = 2 * DAY
PROJECTS = [f"project:{i}" for i in range(20)]
#: Amounts by when their 10 seconds begin.
Amounts = Mapping[int, int]


class Span(NamedTuple):
    """From when to when is read, in seconds since 1970."""

    start: int
    end: int

    @property
    def buckets(self) -> range:
        """Return when each 10 seconds of it begin."""
        return range(self.start, self.end, STEP)

    def sum(self, amounts: Amounts) -> int:
        """Return the sum of amounts."""
        return sum(amounts.get(when, 0) for when in self.buckets)


def spans(now: int) -> dict[str, Span]:
    """Return a whole day, and one that begins and ends in the middle of everything."""
    midnight = now // DAY * DAY
    # At such edges no coarser bucket fits: 12:34:50 to 12:34:40 of the next day.
    end = (now - 34 * 60 - 40) // HOUR * HOUR + 34 * 60 + 40
    return {"aligned": Span(midnight - DAY, midnight), "arbitrary": Span(end - DAY + STEP, end)}


def some(rng: random.Random, buckets: range, fill: float) -> dict[int, int]:
    """Return amounts for a part of all buckets."""
    held = sorted(rng.sample(buckets, round(len(buckets) * fill)))
    return {when: rng.randint(1, 200) for when in held}


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut items into parts of so many."""
    left = iter(items)
    while part := list(itertools.islice(left, size)):
        yield part


# Contenders


def talk_key(project: str, when: int) -> str:
    """Return the talk's key, with whole numbers."""
    return f"hits:{project}:{when // STEP}"


class Talk:
    """The talk's code, through redis-py."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url, socket_timeout=PATIENT)

    def fill(self, project: str, amounts: Amounts) -> None:
        """Write amounts."""
        for part in batches(amounts.items(), 5_000):
            pipe = self.client.pipeline(transaction=False)
            for when, amount in part:
                key = talk_key(project, when)
                pipe.incrby(key, amount)
                pipe.expire(key, KEPT)
            pipe.execute()

    def hit(self, project: str, *, transaction: bool) -> None:
        """Count one hit of now."""
        key = talk_key(project, int(time.time()))
        pipe = self.client.pipeline(transaction=transaction)
        pipe.incr(key)
        pipe.expire(key, KEPT)
        pipe.execute()

    def values(self, project: str, span: Span) -> list[bytes | None]:
        """Read a range."""
        pipe = self.client.pipeline(transaction=False)
        for when in span.buckets:
            pipe.get(talk_key(project, when))
        values: list[bytes | None] = pipe.execute()
        return values

    def sum(self, project: str, span: Span) -> int:
        """Sum up a range."""
        return sum(int(value) for value in self.values(project, span) if value)


class Raw:
    """A socket, and nothing between it and hiredis."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENT)
        self._socket.connect(str(server.unix_path))
        self._reader = hiredis.Reader()

    def ask(self, packed: bytes, replies: int) -> list[Any]:
        """Send commands, return what comes back."""
        self._socket.sendall(packed)
        found: list[Any] = []
        reader, recv = self._reader, self._socket.recv
        while len(found) < replies:
            reader.feed(recv(262_144))
            while (reply := reader.gets()) is not False:
                found.append(reply)
        return found

    def sum(self, project: str, span: Span) -> int:
        """Sum up a range of the talk's keys."""
        pack: Any = hiredis.pack_command
        head = f"hits:{project}:"
        epochs = range(span.start // STEP, span.end // STEP)
        packed = b"".join([pack(("GET", f"{head}{epoch}")) for epoch in epochs])
        return sum(map(int, filter(None, self.ask(packed, len(epochs)))))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def arrays(series: Series) -> tuple[Any, Any]:
    """Return times and values for numpy."""
    made: Any = series
    if TO_NUMPY:
        times, values = made.to_numpy()
        return times, values
    return np.asarray(series.times), np.asarray(series.values)


TO_NUMPY = hasattr(Series, "to_numpy")
NUMPY = "to numpy" if TO_NUMPY else "its values to numpy"


def repeated(work: Callable[[], object], times: int) -> Callable[[], int]:
    """Return a contender that does it so often."""

    def run() -> int:
        for _ in range(times):
            work()
        return times

    return run


# Rows


def shown(rate: float) -> str:
    """Return what one of so many per second takes."""
    micros = 1e6 / rate
    return f"{micros:.0f} µs" if micros < 1000 else f"{micros / 1000:.1f} ms"


def ratio(figures: Mapping[str, Figure], ours: str, peer: str) -> float:
    """Return how much faster ours was, as the median over rounds."""
    a, b = figures[ours].rates, figures[peer].rates
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def faster_row(
    what: str, figures: Mapping[str, Figure], pairs: Mapping[str, tuple[str, str]], target: float
) -> Row:
    """Make a row of several pairs (ours, peer), of which each must reach the target."""
    ratios = {name: ratio(figures, *pair) for name, pair in pairs.items()}

    def each(side: int) -> str:
        names = {pair[side]: name for name, pair in pairs.items()}
        return ", ".join(f"{name} {shown(figures[who].rate)}" for who, name in names.items())

    return Row(
        what,
        each(0),
        each(1),
        f"{target:g}×",
        ", ".join(f"{name} {value:,.0f}×" for name, value in ratios.items()),
        min(ratios.values()) >= target,
    )


def most_row(what: str, ours: str, peer: str, value: float, most: float, unit: str) -> Row:
    """Make a row of a figure that must not be above a limit."""
    return Row(what, ours, peer, f"≤ {most:g}{unit}", f"{value:.2f}{unit}", value <= most)


def days(server: Server, now: int) -> list[Row]:
    """Sums and points of a day, at each fill."""
    rows = []
    url = server.unix_url
    hits = TimeSeries(url, "days", deadline=PATIENT)
    talk, raw = Talk(url), Raw(server)
    kinds = spans(now)
    written = range(min(span.start for span in kinds.values()), now // STEP * STEP, STEP)
    for fill in FILLS:
        project = f"{fill:.0%}"
        amounts = some(random.Random(project), written, fill)
        hits.incr_many([(project, amount, when) for when, amount in amounts.items()])
        talk.fill(project, amounts)
        reads: dict[str, Callable[[], Any]] = {}
        for kind, span in kinds.items():
            for name, read in day_reads(hits, talk, raw, project, span).items():
                reads[f"{name}, {kind}"] = read
        check(reads, kinds, amounts)
        gc.collect()
        gc.freeze()  # else the collector looks through all that a benchmark has loaded, by chance
        figures = side_by_side(
            {
                name: repeated(read, 1 if name.startswith(("talk", "raw")) else 20)
                for name, read in reads.items()
            },
            rounds=ROUNDS,
        )
        gc.unfreeze()
        check(reads, kinds, amounts)
        rows += day_rows(f"fill {fill:.0%}", list(kinds), figures)
        print(f" a day, fill {fill:.0%}")
        for figure in figures.values():
            print(f"  {figure.name}: {shown(figure.rate)}")
    raw.close()
    return rows


def day_reads(
    hits: TimeSeries, talk: Talk, raw: Raw, project: str, span: Span
) -> dict[str, Callable[[], Any]]:
    """Return what reads a day, and how."""

    def points() -> Series:
        return hits.range(project, span.start, span.end, step=STEP)

    return {
        "sum": lambda: hits.sum(project, span.start, span.end, strict=True),
        "points": points,
        "numpy": lambda: arrays(points()),
        "list": lambda: list(points()),
        "talk": lambda: talk.sum(project, span),
        "raw": lambda: raw.sum(project, span),
    }


def check(
    reads: Mapping[str, Callable[[], Any]], kinds: Mapping[str, Span], amounts: Amounts
) -> None:
    """Compare all answers with what was written, point by point where there are points."""
    for kind, span in kinds.items():
        expected = span.sum(amounts)
        points = [(when, amounts.get(when, 0)) for when in span.buckets]
        assert len(points) >= DAY // STEP - 1
        for name in ("sum", "talk", "raw"):
            assert reads[f"{name}, {kind}"]() == expected, f"{name} sums up something else"
        for name in ("points", "list"):
            assert list(reads[f"{name}, {kind}"]()) == points, f"{name} are others"
        times, values = reads[f"numpy, {kind}"]()
        seconds = times.astype("int64").tolist()
        assert list(zip(seconds, values.tolist(), strict=True)) == points, "arrays are others"


def day_rows(fill: str, kinds: Sequence[str], figures: Mapping[str, Figure]) -> list[Row]:
    """Make the rows of one fill."""

    def pairs(ours: str, peer: str) -> dict[str, tuple[str, str]]:
        return {kind: (f"{ours}, {kind}", f"{peer}, {kind}") for kind in kinds}

    points = f"8,640 points of a day, {fill}"
    return [
        faster_row(f"sum of a day, {fill}; the talk", figures, pairs("sum", "talk"), 100),
        faster_row(f"sum of a day, {fill}; raw GETs", figures, pairs("sum", "raw"), 20),
        faster_row(f"{points}, as a Series; the talk", figures, pairs("points", "talk"), 100),
        faster_row(f"{points}, {NUMPY}; the talk", figures, pairs("numpy", "talk"), 100),
        faster_row(f"{points}, as a list; the talk", figures, pairs("list", "talk"), 40),
    ]


def year(server: Server, now: int) -> list[Row]:
    """A sum over a year that begins and ends in the middle of everything."""
    hits = TimeSeries(server.unix_url, "year", deadline=PATIENT)
    rng = random.Random("year")
    end = spans(now)["arbitrary"].end
    first = end // HOUR * HOUR - 366 * DAY
    # As much in an hour as if each of its 10 seconds had something.
    amounts = {when: rng.randint(1, 200 * 360) for when in range(first, end - 2 * DAY, HOUR)}
    amounts |= some(rng, range(end // HOUR * HOUR - 2 * DAY + HOUR, end, STEP), 1.0)
    hits.incr_many([("a", amount, when) for when, amount in amounts.items()])
    start = end - 365 * DAY + 1234
    plan = hits.explain("a", start, end)

    def read() -> int:
        return hits.sum("a", start, end)

    def check_it() -> None:
        total = hits.sum("a", start, end)
        assert total == sum(n for when, n in amounts.items() if total.start <= when < total.end)
        assert (total.start, total.end) == (start // HOUR * HOUR, end)

    client, raw = redis.Redis.from_url(server.unix_url), Raw(server)
    client.set("as many bytes", random.Random(0).randbytes(plan.bytes))
    packed = b"*2\r\n$3\r\nGET\r\n$13\r\nas many bytes\r\n"

    def one() -> bytes:
        (reply,) = raw.ask(packed, 1)
        return bytes(reply)

    assert len(one()) == plan.bytes
    check_it()
    trips = Exchanges.of(hits, read)
    reads = {
        "ours": read,
        "one raw GET": one,
        "redis-py": lambda: client.get("as many bytes"),
    }
    figures = side_by_side(
        {name: repeated(read, 100) for name, read in reads.items()}, rounds=2 * ROUNDS + 1
    )
    check_it()
    raw.close()
    print(f" a year: {plan.keys} keys, {plan.values} values, {plan.bytes:,} bytes")
    for figure in figures.values():
        print(f"  {figure.name}: {shown(figure.rate)}")
    ours, peer = figures["ours"], figures["one raw GET"]
    counts = f"{trips:g}, {plan.keys} keys"
    return [
        Row(
            "sum of a year: round trips, and keys",
            counts,
            "",
            "1, ≤ 12 keys",
            counts,
            trips == 1 and plan.keys <= 12,
        ),
        most_row("sum of a year", shown(ours.rate), "", 1e3 / ours.rate, 0.3, " ms"),
        most_row(
            f"sum of a year: its time; a raw GET of as many bytes ({plan.bytes:,})",
            shown(ours.rate),
            f"{shown(peer.rate)}; by redis-py {shown(figures['redis-py'].rate)}",
            1 / ratio(figures, "ours", "one raw GET"),
            3,
            "×",
        ),
    ]


class Exchanges:
    """A transport that counts how often it is asked: each time is one round trip to one server."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        """Return what is only passed on."""
        return getattr(self._transport, name)

    def call(self, *args: Any) -> Any:
        """Say one command."""
        self._count += 1
        return self._transport.call(*args)

    def run(self, *args: Any) -> Any:
        """Say several at once."""
        self._count += 1
        return self._transport.run(*args)

    @classmethod
    def of(cls, hits: TimeSeries, read: Callable[[], object], times: int = 50) -> float:
        """Return how many round trips a read makes."""
        plain = hits.transport
        hits.transport = counting = cls(plain)
        for _ in range(times):
            read()
        hits.transport = plain
        return counting._count / times


def many(server: Server, now: int, series: int = 100) -> list[Row]:
    """The sums of a hundred series over a day."""
    hits = TimeSeries(server.unix_url, "many", deadline=PATIENT)
    start, end = spans(now)["arbitrary"]
    names = [f"project:{i}" for i in range(series)]
    expected: dict[Any, int] = {}
    for name in names:
        amounts = some(random.Random(name), range(start, end, STEP), 1.0)
        hits.incr_many([(name, amount, when) for when, amount in amounts.items()])
        expected[name] = sum(amounts.values())

    def read() -> dict[Any, Any]:
        return dict(hits.sums(names, start, end, strict=True))

    assert read() == expected
    trips = Exchanges.of(hits, read)
    figure = side_by_side({"ours": repeated(read, 10)}, rounds=2 * ROUNDS + 1)["ours"]
    assert read() == expected
    what = f"sums of {series} series over an arbitrary day, fill 100%"
    counted = f"{trips:g}"
    return [
        Row(f"{what}: round trips", counted, "", "1", counted, trips == 1),
        most_row(what, shown(figure.rate), "", 1e3 / figure.rate, 3, " ms"),
    ]


def writes(server: Server, now: int) -> list[Row]:
    """Hits of now, one by one."""
    url = server.unix_url
    hits, talk = TimeSeries(url, "writes", deadline=PATIENT), Talk(url)
    # Keys that are as large as they get.
    written = range(now // HOUR * HOUR - 6 * HOUR, now // STEP * STEP, STEP)
    for name in PROJECTS:
        amounts = some(random.Random(name), written, 1.0)
        hits.incr_many([(name, amount, when) for when, amount in amounts.items()])
    before = hits.sums(PROJECTS, written.start)
    began = int(time.time()) // STEP * STEP
    turns = dict.fromkeys(("ours", "talk", "talk, MULTI"), 0)

    def contender(who: str, hit: Callable[[str], object]) -> Callable[[], int]:
        def run() -> int:
            for project in PROJECTS * 10:
                hit(project)
            turns[who] += 10
            return 10 * len(PROJECTS)

        return run

    contenders = {
        "ours": contender("ours", hits.incr),
        "talk": contender("talk", lambda name: talk.hit(name, transaction=False)),
        "talk, MULTI": contender("talk, MULTI", lambda name: talk.hit(name, transaction=True)),
    }
    figures = side_by_side(contenders, rounds=ROUNDS)
    print(" a hit, and its processor time")
    with server.client() as watch:
        for name, work in contenders.items():
            there, here = processor_time(watch, work)
            rate = figures[name].rate
            print(f"  {name}: {shown(rate)}; {here:.0f} µs here, {there:.0f} µs in the server")
    after = hits.sums(PROJECTS, written.start)
    assert all(after[name] - before[name] == turns["ours"] for name in PROJECTS), "hits are missing"
    span = Span(began, int(time.time()) + STEP)
    assert all(talk.sum(name, span) == turns["talk"] + turns["talk, MULTI"] for name in PROJECTS), (
        "the talk's hits are missing"
    )
    what = "a hit, 5 resolutions, 1 thread; the talk's INCR and EXPIRE"
    row = ratio_row(what, figures, "ours", "talk", 1)
    return [row._replace(against=f"{row.against}; with MULTI {figures['talk, MULTI'].rate:,.0f}/s")]


def processor_time(
    watch: redis.Redis, work: Callable[[], int], times: int = 5
) -> tuple[float, ...]:
    """Return the processor time of an operation in µs, the server's and ours."""

    def now() -> tuple[float, float]:
        info: Any = watch.info("cpu")
        return info["used_cpu_user"] + info["used_cpu_sys"], time.process_time()

    before = now()
    operations = sum(work() for _ in range(times))
    return tuple((b - a) / operations * 1e6 for a, b in zip(before, now(), strict=True))


def lingering(server: Server, series: int = 100, each: int = 5_000) -> list[Row]:
    """Hits with linger, until the last one is sent."""
    names = [f"project:{i}" for i in range(series)]
    began = int(time.time()) // STEP * STEP
    turns = 0

    def run() -> int:
        nonlocal turns
        hits = TimeSeries(server.unix_url, "linger", linger=0.1, deadline=PATIENT)
        incr = hits.incr
        for _ in range(each):
            for name in names:
                incr(name)
        hits.close()
        turns += 1
        return each * series

    figure = side_by_side({"ours": run}, rounds=9)["ours"]
    totals = TimeSeries(server.unix_url, "linger").sums(names, began)
    assert all(total == turns * each for total in totals.values()), "hits are missing"
    rate = f"{figure.rate:,.0f}/s"
    what = f"hits with linger, {series} series, 1 thread, until closed"
    return [Row(what, rate, "", "1,000,000/s", rate, figure.rate >= 1_000_000)]


# Bytes


def memory(now: int) -> list[Row]:
    """Bytes of a day for each bucket that has hits."""
    rows = []
    limits = {0.01: 90, 0.1: 14, 1.0: 5}
    day = spans(now)["aligned"]
    with valkey_server() as server:
        watch = server.client()
        for fill, most in limits.items():
            amounts = {
                f"project:{i}": some(random.Random(i), day.buckets, fill)
                for i in range(10 if fill == 1 else 50)
            }
            held = sum(map(len, amounts.values()))
            ours, theirs = (
                [total / held for total in filled(watch, fill_with, server.unix_url, amounts, day)]
                for fill_with in (fill_ours, fill_talk)
            )
            shown_ours, shown_theirs = (
                f"{used:.1f} B ({keys:.1f} B by MEMORY USAGE)" for used, keys in (ours, theirs)
            )
            what = f"bytes per bucket with hits, 5 resolutions of a day, fill {fill:.0%}"
            rows.append(
                most_row(f"{what}; the talk's one", shown_ours, shown_theirs, max(ours), most, " B")
            )
    return rows


def filled(
    watch: redis.Redis,
    fill: Callable[[str, Mapping[str, Amounts], Span], None],
    url: str,
    amounts: Mapping[str, Amounts],
    day: Span,
) -> tuple[int, int]:
    """Fill an empty server; return by how much memory has grown, and what its keys say."""
    fill(url, {"warm": {day.start: 1}}, day)  # what is there once: scripts, what a name agrees on
    watch.delete(*watch.scan_iter("*warm*", count=1_000))
    before = settled(watch)
    fill(url, amounts, day)
    grown = settled(watch) - before
    keys = 0
    for some_keys in batches(watch.scan_iter(count=1_000), 1_000):
        pipe = watch.pipeline(transaction=False)
        for key in some_keys:
            if not key.endswith(b"meta"):
                pipe.memory_usage(key, samples=0)
        keys += sum(pipe.execute())
    watch.flushall()
    return grown, keys


def fill_ours(url: str, amounts: Mapping[str, Amounts], day: Span) -> None:
    """Write as ours, and read it again."""
    with TimeSeries(url, "hits", deadline=PATIENT) as hits:
        for name, each in amounts.items():
            hits.incr_many([(name, amount, when) for when, amount in each.items()])
        totals = hits.sums(amounts, day.start, day.end)
        assert totals == {name: sum(each.values()) for name, each in amounts.items()}


def fill_talk(url: str, amounts: Mapping[str, Amounts], day: Span) -> None:
    """Write as the talk, and read some of it again."""
    talk = Talk(url)
    for name, each in amounts.items():
        talk.fill(name, each)
    name, each = next(iter(amounts.items()))
    assert talk.sum(name, day) == sum(each.values())
    talk.client.close()


def settled(watch: redis.Redis) -> int:
    """Return bytes in use, once tables are rehashed and buffers of clients given back."""
    seen = [0, 1]
    while len(set(seen[-3:])) > 1:
        time.sleep(0.05)
        info: Any = watch.info("memory")
        seen.append(int(info["used_memory"] - info["mem_clients_normal"]))
    return seen[-1]


def run() -> list[Row]:
    """Run all of it."""
    now = int(time.time())
    with valkey_server() as server:
        rows = days(server, now) + year(server, now)
        rows += many(server, now) + writes(server, now) + lingering(server)
    return rows + memory(now)
