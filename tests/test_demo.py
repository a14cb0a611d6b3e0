"""The demonstration: what it replays, what it shows, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from click.testing import CliRunner

from redishacks.cli import commands
from redishacks.demo import replay, table
from redishacks.demo.times import Times
from redishacks.demo.traffic import Hit, Skipped, made_up, parse, read_log
from redishacks.errors import UsageError
from redishacks.testing import Postgres, Server, postgres_server, valkey_server
from tests.helpers import eventually, shown_on_a_terminal

pytestmark = pytest.mark.slow

LINE = '1.2.3.4 - - [17/May/2015:10:05:03 +0000] "{}" 200 17 "-" "agent"\n'

#: A log of 10,000 lines that lies beside a clone of ours, but not in it.
SHARED = Path(__file__).parents[2] / "shared" / "data" / "access.log.gz"

DEMO = [sys.executable, "-m", "redishacks", "demo"]


def log_of(*requests: str) -> str:
    """Return a log with these requests."""
    return "".join(LINE.format(request) for request in requests)


def demo(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([*DEMO, *args], capture_output=True, text=True, timeout=120, **options)


def outcome(*args: str, **options: Any) -> dict[str, Any]:
    """Run the command, which must succeed, and return its JSON."""
    done = demo(*args, "--json", **options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for temporary files, with a path short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as directory:
        path = Path(directory)
        path.chmod(0o755)  # PostgreSQL may run as another user
        yield path


def left_over(place: Path) -> list[int]:
    """Return the processes that were started with this TMPDIR, or that work in it.

    Some servers overwrite their environment with a title.
    """
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (
                f"TMPDIR={place}\0".encode() in (entry / "environ").read_bytes()
                or str((entry / "cwd").readlink()).startswith(f"{place}/")
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# What is replayed


def test_targets_stand_as_in_the_log() -> None:
    """A hit is the request's target, query and all; the common format is read as well."""
    common = '::1 - bob [17/May/2015:10:05:03 +0000] "POST /b HTTP/2.0" 304 -\n'
    log = log_of("GET /a?b=1&c HTTP/1.1", "GET /old", r"GET /say\"hi\" HTTP/1.0") + common
    assert parse(log.splitlines(True)).targets == ["/a?b=1&c", "/old", r"/say\"hi\"", "/b"]


def test_clients_times_and_sizes_stand_as_in_the_log() -> None:
    """A hit has its client, its time whatever the zone, and its bytes; `-` is none."""
    when = "[31/Dec/2016:23:59:{} {}]"
    times = [("03", "+0000"), ("03", "-0530"), ("60", "+0100")]
    log = [f'::1 - - {when.format(*at)} "GET / HTTP/1.1" 200 {10**11}\n' for at in times]
    log.append(LINE.format("GET /b HTTP/1.1").replace(" 17 ", " - "))
    midnight = int(dt.datetime(2017, 1, 1, tzinfo=dt.UTC).timestamp())
    assert list(parse(log).hits(0, 4)) == [
        Hit("/", "::1", midnight - 57, 10**11),
        Hit("/", "::1", midnight - 57 + 19_800, 10**11),
        Hit("/", "::1", midnight - 1 - 3600, 10**11),
        Hit("/b", "1.2.3.4", 1_431_857_103, 0),
    ]


def test_hits_without_a_time_or_a_client_are_named() -> None:
    """A time that is none, and an endless client, are left out and named."""
    good = LINE.format("GET / HTTP/1.1")
    bad = [good.replace("17/May/2015", day) for day in ("17/Mai/2015", "31/Feb/2015", "2015-05-17")]
    traffic = parse([*bad, good.replace("1.2.3.4", "x" * 2049), good])
    assert len(traffic.targets) == len(traffic.times) == 1
    assert [line.reason[:20] for line in traffic.first_skipped] == [
        *["no time in it, such "] * 3,
        "a client of over 2,0",
    ]


def test_lines_that_are_no_log_lines_are_named() -> None:
    """Junk, requests without a target and endless targets are left out, counted and named."""
    junk = ["\n", "hello\n", LINE.format("-"), LINE.format(r"\x16\x03\x01"), LINE.format("GET ")]
    long = LINE.format(f"GET /{'x' * 2048} HTTP/1.1")
    traffic = parse([LINE.format("GET / HTTP/1.1"), *junk, long, *["x\n"] * 20])
    assert (traffic.targets, traffic.skipped, len(traffic.first_skipped)) == (["/"], 26, 10)
    assert traffic.first_skipped[0] == Skipped(2, "not in the combined log format")
    assert traffic.first_skipped[2] == Skipped(4, "no request in it")
    assert traffic.first_skipped[5] == Skipped(7, "a target of over 2,048 bytes")


def test_stray_bytes_are_escaped(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are counted as servers log them, and form feeds end no line."""
    log = tmp_path / "log"
    log.write_bytes(b"\x0c\n" + LINE.format("GET /~ HTTP/1.1").encode().replace(b"~", b"\xff"))
    assert read_log(str(log)).targets == ["/\\xff"]


def test_a_log_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    """A missing file, a cut gzip file and a file without hits are said in one line."""
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(log_of("GET / HTTP/1.1").encode() * 100)[:-20])
    junk = tmp_path / "junk"
    junk.write_text("no\nlog\n")
    for path in (tmp_path / "missing", tmp_path, cut, junk):
        with pytest.raises(UsageError, match=f"the log {path}"):
            read_log(str(path))


def test_made_up_traffic_is_repeatable_and_uneven() -> None:
    """The same seed makes the same hits, a few pages far ahead of the others."""
    traffic = made_up(10_000, 7)
    assert traffic == made_up(10_000, 7) != made_up(10_000, 8)
    assert traffic.targets.count("/page/1") > 10 * traffic.targets.count("/page/100") > 0
    assert {len(column) for column in traffic[:4]} == {10_000}
    assert max(traffic.times) - min(traffic.times) < 86_400
    assert list(traffic.times) == sorted(traffic.times)


# What is shown


def test_made_up_traffic_agrees(tmp_path: Path) -> None:
    """A flusher dies in the middle of its batch, the next one finishes it, all hits are there."""
    found = outcome("--hits", "30000", "--seed", "3")
    assert found["agree"]
    assert found["hits_sent"] == found["hits_in_sql"] == 30_000
    assert found["pages_sent"] == found["rows_in_sql"]
    assert 0 < found["killed"]["written"] < found["killed"]["chunks"]
    assert [report["recovered"] for report in found["flushes"]] == [0, 1, 0]
    assert sum(report["batches"] for report in found["flushes"]) >= 3
    assert found["hits_per_second"] > 1000
    assert 0 < found["calls_per_hit"] < found["commands_per_hit"] < 1.5
    assert found["series_agree"]
    assert (found["series"]["total_hits"], found["left_out"]) == (30_000, 0)
    same_as_counted(found["series"], list(made_up(30_000, 3).hits(0, 30_000)))
    assert found["series"]["error_of_top"] > 0


def counted(log: Path) -> list[Hit]:
    """Read a log without the code that is tested."""
    found = []
    for line in gzip.decompress(log.read_bytes()).decode(errors="replace").splitlines():
        said = re.search(r'\[(.+?)\] "\w+ (.+?)(?: HTTP/[0-9.]+)?" \d+ (\S+)', line)
        assert said is not None, line
        at = dt.datetime.strptime(said[1], "%d/%b/%Y:%H:%M:%S %z")
        size = 0 if said[3] == "-" else int(said[3])
        found.append(Hit(said[2], line.split()[0], int(at.timestamp()), size))
    return found


def same_as_counted(series: dict[str, Any], hits: list[Hit]) -> None:
    """Compare what the series have with a plain count, hour by hour."""
    number: Counter[int] = Counter(hit.time // 3600 * 3600 for hit in hits)
    sizes: Counter[int] = Counter()
    clients = defaultdict(set)
    for hit in hits:
        sizes[hit.time // 3600 * 3600] += hit.size
        clients[hit.time // 3600 * 3600].add(hit.client)
    hours = list(range(min(number), max(number) + 1, 3600))
    assert series["step"] == 3600
    assert series["hits"] == [[at, number[at]] for at in hours]
    assert series["bytes"] == [[at, sizes[at]] for at in hours]
    assert (series["total_hits"], series["total_bytes"]) == (len(hits), sum(sizes.values()))
    assert [at for at, _ in series["clients"]] == hours
    for at, value in [*series["clients"], (None, series["total_clients"])]:
        true = len(clients[at]) if at else len({hit.client for hit in hits})
        assert abs(value - true) <= 4 * series["error_of_clients"] * true + 1
    # The busiest hour: its points of 10 s, and its pages.
    begins = series["busiest"][0][0]
    assert number[begins] == max(number.values())
    within = [hit for hit in hits if begins <= hit.time < begins + 3600]
    fine = Counter(hit.time // 10 * 10 for hit in within)
    assert series["busiest"] == [[at, fine[at]] for at in range(begins, begins + 3600, 10)]
    fine = Counter()
    for hit in within:
        fine[hit.time // 10 * 10] += hit.size
    assert series["busiest_bytes"] == [[at, fine[at]] for at, _ in series["busiest"]]
    pages = Counter(hit.target for hit in within)
    lacks = series["error_of_top"]
    assert len(series["top"]) == min(5, len(pages))
    for page in series["top"]:
        assert pages[page["page"]] - lacks <= page["hits"] <= pages[page["page"]]
    if not lacks:
        heaviest = sorted(pages.values(), reverse=True)[:5]
        assert [page["hits"] for page in series["top"]] == heaviest


def test_the_series_of_a_log_equal_a_plain_count(tmp_path: Path) -> None:
    """Hits and bytes of each hour are those of the log, whose lines may be in any order."""
    log, chance = tmp_path / "access.log.gz", random.Random(5)
    lines = []
    for _ in range(2000):
        at = dt.datetime(2015, 5, 17, 22, tzinfo=dt.UTC)
        at += dt.timedelta(seconds=chance.randrange(40_000))
        size, page = chance.randrange(10**7), int(chance.paretovariate(1))
        client = f"10.0.0.{chance.randrange(200)}"
        lines.append(
            f'{client} - - [{at:%d/%b/%Y:%H:%M:%S} +0000] "GET /{page} HTTP/1.1" 200 {size}\n'
        )
    log.write_bytes(gzip.compress("".join(lines).encode()))
    found = outcome("--log", str(log))
    assert found["series_agree"]
    assert found["series"]["error_of_top"] == 0
    same_as_counted(found["series"], counted(log))


@pytest.mark.skipif(not SHARED.exists(), reason="the log of 10,000 lines is not here")
def test_the_series_of_a_real_log_equal_a_plain_count() -> None:
    """So it is with a log of four days, of which each hour's pages are exact."""
    found = outcome("--log", str(SHARED))
    assert found["series_agree"]
    assert found["series"]["total_hits"] == found["hits_sent"] == 10_000
    assert found["series"]["error_of_top"] == 0
    same_as_counted(found["series"], counted(SHARED))


def test_hits_that_no_series_can_hold(tmp_path: Path) -> None:
    """Hits of the future and of long ago reach SQL; the series are without them, and say so."""
    good, log = LINE.format("GET / HTTP/1.1"), tmp_path / "log"
    years = (1975, 2099)
    odd = "".join(good.replace("2015", str(year)) for year in years)
    log.write_text(good * 3 + odd)
    done = demo("--log", str(log))
    assert done.returncode == 0, done.stderr
    assert "\nnot in the time series: 2 hits, in the future, over 30 years old, " in done.stdout
    assert "5 in 1 row" in done.stdout
    found = outcome("--log", str(log))
    assert (found["series"]["total_hits"], found["left_out"]) == (3, 2)
    log.write_text(odd)
    done = demo("--log", str(log))
    assert done.returncode == 0, done.stderr
    assert "not in the time series: 2 hits, " in done.stdout
    assert "Hits per" not in done.stdout
    assert "Time series" not in done.stdout
    log.write_text(good.replace("2015", "2002") + good.replace("2015", "2006") + good)
    found = outcome("--log", str(log))
    assert (found["hits_in_sql"], found["series"]["total_hits"], found["left_out"]) == (3, 2, 1)


def test_what_is_drawn(tmp_path: Path) -> None:
    """A chart of hits, lines of bytes, clients and the busiest hour, and its pages; in plain
    letters where the terminal has no others; of a long log per day."""
    log, good = tmp_path / "log", LINE.format("GET /a HTTP/1.1")
    later = good.replace("10:05", "13:05").replace("1.2.3.4", "::1")
    log.write_text(good * 2 + later * 6)
    done = demo("--log", str(log), env={**os.environ, "COLUMNS": "70"})
    drawn = done.stdout.partition("Most seen in")[0].splitlines()
    assert drawn[0] == "Hits per hour, 2015-05-17 10:00:00 to 2015-05-17 14:00:00 (UTC)"
    assert drawn[1].startswith("6 ┤")
    assert max(map(len, drawn)) <= 70
    assert drawn[-5:] == [
        "Time series by the times of the log, kept for 30 years here",
        "  bytes per hour    ▃  █  136",
        "  clients per hour  █  █  2 different ones, to 0.81%",
        "  hits per 10 s     █           6 in the busiest hour",
        "  bytes per 10 s    █           102",
    ]
    assert "from 2015-05-17 13:00:00 (exactly)\n  6  /a\n" in done.stdout
    agree = "Time series and a plain count agree, hits and bytes of every hour.\n"
    assert agree in done.stdout
    plain = demo("--log", str(log), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert plain.stdout.isascii()
    assert "  bytes per hour    _  #  136\n" in plain.stdout
    assert plain.stdout.splitlines()[1].startswith("6 |")
    assert agree in plain.stdout
    log.write_text(good + good.replace("May", "Aug"))
    found = outcome("--log", str(log))["series"]
    assert found["step"] == 86_400
    assert len(found["hits"]) == len(found["clients"]) == 93
    assert found["total_hits"] == sum(value for _, value in found["hits"]) == 2


def test_a_log_with_junk_in_it(tmp_path: Path) -> None:
    """Text on pipes: the verdict, the costs, the top pages, and the lines left out."""
    log = tmp_path / "access.log.gz"
    requests = ["GET /b HTTP/1.1", "GET /a?x=1 HTTP/1.1"] * 30
    requests += ["GET /a?x=1 HTTP/1.1"] * 10 + ["GET /\x1b[0m HTTP/1.1"]
    text = log_of(*requests) + "junk\n" + log_of("GET /c HTTP/1.1")
    log.write_bytes(gzip.compress(text.encode()))
    done = demo("--log", str(log))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("replaying 71 hits\n")
    assert "killed with SIGKILL in the middle of a flush: 1 of the 2 chunks" in done.stderr
    assert "Redis and SQL agree to the last hit." in done.stdout
    assert "71 on 3 pages" in done.stdout
    assert "71 in 3 rows" in done.stdout
    assert done.stdout.index("40  /a?x=1") < done.stdout.index("30  /b")
    assert "left out: 2 lines\n  line 71: no request in it\n" in done.stdout
    assert "  line 72: not in the combined log format\n" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("hits", [1, 2])
def test_the_smallest_logs(hits: int) -> None:
    """Even one single hit, from standard input, is claimed by a flusher that is killed."""
    log = log_of(*(f"GET /{n} HTTP/1.1" for n in range(hits)))
    found = outcome("--log", "-", input=log)
    assert found["hits_in_sql"] == found["rows_in_sql"] == hits
    assert found["killed"]["written"] < found["killed"]["chunks"]
    assert sum(report["recovered"] for report in found["flushes"]) == 1
    if hits == 1:
        said = demo("--log", "-", input=log)
        for words in ("replaying 1 hit\n", "0 of the 1 chunk of", "wrote 1 hit to 1 row in "):
            assert words in said.stderr
        assert "1 on 1 page\n" in said.stdout
        assert "1 in 1 row\n" in said.stdout


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal a bar shows how much was replayed, and is gone in the end."""
    log = tmp_path / "log"
    log.write_text(log_of("GET / HTTP/1.1") * 5)
    shown = shown_on_a_terminal(
        [*DEMO, "--log", str(log)],
        stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    assert b"replaying" in shown
    assert b"5/5" in shown


def invoked(*args: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and what it said."""
    kept = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        done = CliRunner().invoke(commands, ["demo", *args])
    finally:
        for one, handler in kept.items():
            signal.signal(one, handler)
    return done.exit_code, done.output


def test_a_wrong_count_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """When SQL and the hits sent differ, it says so and exits with 1."""
    rows = table.Table.rows
    monkeypatch.setattr(table.Table, "rows", lambda self: {**rows(self), "/page/1": 1000})
    code, said = invoked("--hits", "30")
    assert code == 1
    assert "do NOT agree: sent 30 hits, in SQL " in said
    assert "; 0 dead letters; another count for 1 page: /page/1" in said


@pytest.mark.parametrize("column", ["times", "sizes"])
def test_wrong_series_are_an_error(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a series and a plain count differ in one hour, it names that and exits with 1."""
    add = Times.add

    def wrong(self: Times, first: int, last: int) -> None:
        right = self._traffic
        values = [at - 3600 * (n == 17) for n, at in enumerate(getattr(right, column))]
        if column == "times":
            right = right._replace(sizes=[0] * len(values))  # the bytes have nothing to tell
            self._traffic = right._replace(times=values)
        else:
            self._traffic = right._replace(sizes=values)
        add(self, first, last)
        self._traffic = right

    monkeypatch.setattr(Times, "add", wrong)
    code, said = invoked("--hits", "30")
    assert code == 1
    hours = "2 hours: 2025-01-01 " if column == "times" else "1 hour: 2025-01-01 "
    assert f"plain count do NOT agree on the hits or bytes of {hours}" in said
    assert "Redis and SQL agree to the last hit." in said


def test_series_that_lag_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the series have not heard of when the last flush ends they hear in the end."""
    monkeypatch.setattr(replay, "_SLICE", 4)
    code, said = invoked("--hits", "3000", "--json")
    assert code == 0, said
    (found,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert found["series"]["total_hits"] == 3000


@pytest.mark.parametrize(
    "args",
    [
        ("--log", "x", "--hits", "1"),
        ("--postgres", "--sql", "sqlite:///x"),
        ("--hits", "0"),
        ("--sql", "mysql://root:geheim@db/x"),
        ("--log", "/nowhere"),
    ],
)
def test_usage(args: tuple[str, ...]) -> None:
    """What can never work exits with 2, without a traceback and without a password."""
    done = demo(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "geheim" not in done.stderr


# Servers of the user's own, and ends


def test_postgres(place: Path) -> None:
    """With --postgres it is a private PostgreSQL that counts, and it is gone in the end."""
    environment = {**os.environ, "TMPDIR": str(place)}
    found = outcome("--postgres", "--hits", "100", env=environment)
    assert found["agree"]
    assert found["hits_in_sql"] == 100
    assert eventually(lambda: not left_over(place))
    assert list(place.iterdir()) == []


def test_own_servers_are_left_as_they_were(postgres: Postgres, pg_dsn: str) -> None:
    """On given servers only keys and tables of random names are made, and they are removed."""
    with (
        valkey_server() as server,  # no key of another test expires there
        redis.Redis.from_url(server.url) as client,
        psycopg.connect(pg_dsn) as db,
    ):
        client.set("theirs", 1)
        done = demo("--hits", "30", "--redis", server.url, "--sql", pg_dsn)
        assert done.returncode == 0, done.stderr
        assert "dropped the table redishacks_demo_" in done.stderr
        assert "keys of redishacks_demo_" in done.stderr
        assert client.keys() == [b"theirs"]
        tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        assert db.execute(tables).fetchall() == []


def test_an_own_sqlite_file_is_left_as_it_was(tmp_path: Path) -> None:
    """A given SQLite file keeps its own tables, and no other."""
    path = tmp_path / "own file.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE own (x)")
    found = outcome("--hits", "30", "--sql", f"sqlite:///{str(path).replace(' ', '%20')}")
    assert found["agree"]
    tables = "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    assert db.execute(tables).fetchall() == [("own",)]
    db.close()


def test_a_server_that_is_away(tmp_path: Path) -> None:
    """It exits with 75, one line and no password."""
    for args in (
        ("--redis", "redis://:geheim@127.0.0.1:1/0"),
        ("--sql", "postgresql://postgres:geheim@127.0.0.1:1/x"),
    ):
        done = demo("--hits", "10", *args)
        assert done.returncode == 75, done.stderr
        assert "Traceback" not in done.stderr
        assert "geheim" not in done.stderr
        assert "clean up" not in done.stderr
        assert "removed" not in done.stderr
        (told,) = (line for line in done.stderr.splitlines() if "127.0.0.1" in line)
        assert told.startswith("redishacks: ")


def test_a_database_that_goes_away(valkey: Server) -> None:
    """What cannot be cleaned up any more is said in one line, the rest is cleaned up."""
    with postgres_server() as postgres:
        process = subprocess.Popen(
            [*DEMO, "--redis", valkey.url, "--sql", postgres.tcp_dsn],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        said = [process.stderr.readline(), process.stderr.readline()]
        postgres.kill()
        said += process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 75, said
    assert "removed" in said[-3]
    assert said[-2].startswith("could not clean up: PostgreSQL: connection")
    assert said[-1].startswith("redishacks: ")


@pytest.mark.parametrize(
    ("number", "code", "wait"),
    [
        (signal.SIGINT, 130, "started Valkey"),
        (signal.SIGTERM, 143, "counted"),
        (signal.SIGINT, 130, "wrote"),
    ],
)
def test_interrupted(number: signal.Signals, code: int, wait: str, place: Path) -> None:
    """After Ctrl-C or SIGTERM, at any time, no server, flusher or file is left."""
    process = subprocess.Popen(
        DEMO,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if wait in line:
            break
    before = left_over(place)
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code, said + rest
    assert "Traceback" not in rest
    assert len(before) >= 3, said  # itself, the server and its watchdog
    assert eventually(lambda: not left_over(place))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "busy"), [(("--postgres",), b"initdb"), ((), b"redishacks.demo.flusher")]
)
def test_ctrl_c_on_a_terminal(args: tuple[str, ...], busy: bytes, place: Path) -> None:
    """A terminal's Ctrl-C reaches the whole group: what has just been started takes no notice."""
    process = subprocess.Popen(
        [*DEMO, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(place)}, start_new_session=True,
    )  # fmt: skip

    def works() -> bool:
        for pid in left_over(place):
            with contextlib.suppress(OSError):
                if busy in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False

    eventually(works, 30)
    time.sleep(0.1)  # most likely a flusher imports its modules now; true at any time
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "initdb" not in said
    assert eventually(lambda: not left_over(place))
