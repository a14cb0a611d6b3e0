"""`redishacks limits`: what it shows of limiters in use, and how it ends when it cannot."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from click.testing import CliRunner, Result

from redishacks.cli import commands
from redishacks.ratelimit import Ban, Limit, RateLimiter
from redishacks.testing import Server, valkey_server
from tests.helpers import eventually

WINDOW, FIXED = Limit(5, 3600), Limit(8, 86_400, algorithm="fixed")


@dataclasses.dataclass
class Shell:
    """Runs commands on one Redis, and makes limiters there."""

    url: str
    prefix: str

    def run(self, command: str, *args: str, url: str | None = None, **env: str) -> Result:
        """Run a command to its end; none ever prints a traceback or a password."""
        where = ["--redis", self.url if url is None else url, "--prefix", self.prefix]
        return ended(CliRunner().invoke(commands, ["limits", command, *where, *args], env=env))

    def shown(self, command: str, *args: str) -> str:
        """Return what a command shows that ends well."""
        done = self.run(command, *args)
        assert (done.exit_code, done.stderr) == (0, "")
        return done.stdout

    def objects(self, command: str, *args: str) -> list[dict[str, Any]]:
        """Return the JSON objects that a command prints, one per line."""
        return [json.loads(line) for line in self.shown(command, "--json", *args).splitlines()]

    def limiter(self, *limits: Limit, name: str = "api", **options: Any) -> RateLimiter:
        """Return a limiter of the application, which is known from now on."""
        limiter = RateLimiter(
            self.url, name, *limits, prefix=self.prefix, deadline=5, deny_cache=False, **options
        )
        limiter.close()
        return limiter


def ended(done: Result) -> Result:
    """Return it: it ended by itself, without a traceback or a password."""
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    assert "geheim" not in done.output
    return done


@pytest.fixture
def shell(valkey: Server, prefix: str) -> Shell:
    """The session's server, with a prefix of one's own."""
    return Shell(valkey.url, prefix)


# status


def test_the_limits_of_a_limiter(shell: Shell) -> None:
    """Without a key: the limits it has, and how many hits they refused in all."""
    limiter = shell.limiter(WINDOW, FIXED)
    assert shell.shown("status", "api").splitlines() == [
        "api",
        "  limit    5/3600s",
        "  limit    8/86400s",
        "  refused  0 hits in the last 24 hours",
    ]
    for key in ("u1", "u2"):
        for _ in range(7):
            limiter.hit(key)
    limiter.close()
    assert shell.objects("status", "api") == [
        {"name": "api", "limits": ["5/3600s", "8/86400s"], "refused": 4}
    ]
    assert "refused  4 hits" in shell.shown("status", "api")


def test_what_a_key_has_used(shell: Shell) -> None:
    """Per limit: how much of it, and when the next place and all of them come free."""
    limiter = shell.limiter(WINDOW, Limit(8, 3600, algorithm="gcra", burst=4))
    limiter.hit("u1", 3)
    lines = shell.shown("status", "api", "u1").splitlines()
    assert lines[0] == "api: u1"
    assert lines[1].startswith("  5/3600s  3 of 5 used, the next place frees in ")
    assert lines[2].startswith("  8/3600s  3 of 4 used, the next place frees in 7.5 min, all in 22")
    (shown,) = shell.objects("status", "api", "u1")
    peeked = limiter.peek("u1")
    assert (shown["name"], shown["key"]) == ("api", "u1")
    for verdict, each in zip(peeked.each, shown["limits"], strict=True):
        assert each["limit"] == str(verdict.limit)
        assert each["allowed"] is True
        assert each["remaining"] == verdict.remaining
        assert each["retry_after"] == 0.0
        assert verdict.next_after <= each["next_after"] < verdict.next_after + 10
        assert verdict.reset_after <= each["reset_after"] < verdict.reset_after + 10
    assert [each["remaining"] for each in shown["limits"]] == [2, 1]


def test_looking_takes_nothing(shell: Shell, valkey: Server) -> None:
    """A status is no hit, and makes no key; one of a key never used says so."""
    shell.limiter(WINDOW, FIXED)
    for _ in range(3):
        assert shell.shown("status", "api", "nobody").splitlines() == [
            "api: nobody",
            "  5/3600s   nothing used",
            "  8/86400s  nothing used",
        ]
    (shown,) = shell.objects("status", "api", "nobody")
    assert [each["remaining"] for each in shown["limits"]] == [5, 8]
    assert [each["reset_after"] for each in shown["limits"]] == [0.0, 0.0]
    with valkey.client() as client:
        assert client.keys(f"{shell.prefix}:*nobody*") == []


def test_a_key_that_is_refused(shell: Shell) -> None:
    """The limit that refuses says for how long; in JSON with what else a decision has."""
    limiter = shell.limiter(Limit(2, 3600))
    limiter.hit("u1", 2)
    assert "  2/3600s  2 of 2 used, the next place frees in " in shell.shown("status", "api", "u1")
    (shown,) = shell.objects("status", "api", "u1")
    (each,) = shown["limits"]
    assert each["allowed"] is False
    assert 3500 < each["retry_after"] <= 3721


def test_a_reservation_beyond_the_limit(shell: Shell) -> None:
    """More than everything may be used; never less than nothing is left."""
    limiter = shell.limiter(Limit(5, 3600))
    with limiter.reserve("u1", 1) as reservation:
        reservation.settle(9)
    assert "5 of 5 used" in shell.shown("status", "api", "u1")


def test_a_ban(shell: Shell) -> None:
    """A ban that others have made is shown, though the command line does not know its rules."""
    limiter = shell.limiter(Limit(1, 3600), ban=Ban(3, 600, lasting=300))
    for _ in range(4):
        limiter.hit("u1")
    lines = shell.shown("status", "api", "u1").splitlines()
    assert lines[1].startswith("  1/3600s")
    assert lines[2].endswith(("banned for 5 min", "banned for 4.99 min", "banned for 4.98 min"))
    assert len(lines) == 3
    (shown,) = shell.objects("status", "api", "u1")
    assert 290 < shown["limits"][1]["retry_after"] <= 300
    assert "ban" not in shell.shown("status", "api", "u2")
    shell.shown("reset", "api", "u1")
    assert limiter.hit("u1").allowed


def test_a_part_of_a_key(shell: Shell) -> None:
    """`--part` looks at one part of a mapping of keys; without it at a key that is none."""
    limiter = shell.limiter(Limit(5, 3600))
    limiter.hit({"user": "u1", "ip": "10.1.2.3"}, 2)
    limiter.hit("u1", 4)
    assert "2 of 5" in shell.shown("status", "api", "u1", "--part", "user")
    assert "2 of 5" in shell.shown("status", "--part", "ip", "api", "10.1.2.3")
    assert "4 of 5" in shell.shown("status", "api", "u1")
    assert "nothing used" in shell.shown("status", "api", "u1", "--part", "ip")
    shell.shown("reset", "api", "u1", "--part", "user")
    assert limiter.peek({"user": "u1"}).remaining == 5
    assert limiter.peek({"ip": "10.1.2.3"}).remaining == 3
    assert limiter.peek("u1").remaining == 1


def test_a_limit_of_a_part(shell: Shell) -> None:
    """Of limits for several parts those of the part in question are shown, and reset."""
    limiter = shell.limiter(Limit(5, 3600, name="user"), Limit(9, 60, name="ip"))
    limiter.hit({"user": "u1", "ip": "10.1.2.3"})
    shown = shell.shown("status", "api", "u1", "--part", "user")
    assert "1 of 5" in shown
    assert "of 9" not in shown
    shell.shown("reset", "api", "u1", "--part", "user")
    assert limiter.peek({"user": "u1", "ip": "10.1.2.3"}).each[0].remaining == 5


def test_limits_of_the_same_length(shell: Shell) -> None:
    """Two parts may have limits of one length: both are shown."""
    shell.limiter(Limit(5, 60, name="user"), Limit(9, 60, name="ip"))
    (shown,) = shell.objects("status", "api")
    assert sorted(shown["limits"]) == ["ip: 9/60s", "user: 5/60s"]


def test_a_limiter_without_a_limit(shell: Shell) -> None:
    """Where nothing limits a key, that is said."""
    shell.limiter(Limit(None, 60))
    assert shell.shown("status", "api", "u1").startswith("api: u1")


def test_a_limit_of_nothing(shell: Shell) -> None:
    """A limit of 0 refuses without a state: nothing of it is ever used."""
    shell.limiter(Limit(0, 60))
    assert "0/60s  nothing used" in shell.shown("status", "api", "u1")
    (shown,) = shell.objects("status", "api", "u1")
    assert (shown["limits"][0]["allowed"], shown["limits"][0]["retry_after"]) == (False, None)


def test_all_keys_in_one_slot(shell: Shell) -> None:
    """A limiter whose keys share a slot is found with its tag."""
    limiter = shell.limiter(Limit(5, 3600), tag="name")
    limiter.hit("u1")
    assert "1 of 5" in shell.shown("status", "--tag", "name", "api", "u1")
    shell.shown("reset", "--tag", "name", "api", "u1")
    assert limiter.peek("u1").remaining == 5


def test_where_redis_is_may_stand_in_the_environment(shell: Shell) -> None:
    """Passwords in a URL need not be typed."""
    shell.limiter(WINDOW)
    args = ["limits", "status", "--prefix", shell.prefix, "api"]
    done = ended(CliRunner().invoke(commands, args, env={"REDISHACKS_REDIS_URL": shell.url}))
    assert done.exit_code == 0
    assert "5/3600s" in done.stdout


# Keys of all sorts

ODD = ["a{b}c", "50%", "line\nbreak", "\x1b[31mred", "[red]x[/red]", "ü 字", "/", "a|b", " ", "{}"]


@pytest.mark.parametrize("key", ODD)
def test_odd_keys(shell: Shell, key: str) -> None:
    """Any key can be looked at; on a terminal nothing in it acts, in JSON it is what it is."""
    limiter = shell.limiter(Limit(5, 3600))
    limiter.hit(key, 2)
    shown = shell.shown("status", "api", key)
    assert "2 of 5" in shown
    assert len(shown.splitlines()) == 2
    assert "\x1b" not in shown
    if key.isprintable():
        assert shown.startswith(f"api: {key}\n")
    assert shell.objects("status", "api", key)[0]["key"] == key
    said = shell.shown("reset", "api", key)
    assert len(said.splitlines()) == 1
    assert "\x1b" not in said
    assert limiter.peek(key).remaining == 5


def test_a_key_that_looks_like_an_option(shell: Shell) -> None:
    """After `--` whatever stands there is a key."""
    limiter = shell.limiter(Limit(5, 3600))
    limiter.hit("--json")
    assert "1 of 5" in shell.shown("status", "api", "--", "--json")
    assert shell.run("status", "api", "-x").exit_code == 2


def test_odd_names(shell: Shell) -> None:
    """Names of limiters may hold anything, too."""
    for name in ("a/b", "a|b", "{x}", "50%", "[b]bold"):
        shell.limiter(Limit(5, 3600), name=name).hit("u1")
        assert shell.shown("status", name, "u1").startswith(f"{name}: u1\n")


@pytest.mark.parametrize("key", ["", "x" * 2049, "\udcff"], ids=["empty", "long", "no text"])
def test_keys_that_cannot_be(shell: Shell, key: str) -> None:
    """What no limiter would take is exit code 2 and one line."""
    shell.limiter(WINDOW)
    for command in ("status", "reset"):
        done = shell.run(command, "api", key)
        assert done.exit_code == 2
        assert done.stderr.startswith("redishacks: key")
        assert len(done.stderr.splitlines()) == 1


# top


def test_top(shell: Shell) -> None:
    """The keys refused most, the worst first."""
    limiter = shell.limiter(Limit(1, 3600))
    assert shell.shown("top", "api").splitlines() == ["api", "  refused  nobody"]
    assert shell.objects("top", "api") == []
    for key, times in (("a", 3), ("b", 1_205), ("c", 12)):
        limiter.hit_many([key] * (times + 1))
    limiter.close()
    assert shell.shown("top", "api").splitlines() == [
        "api",
        "  1,205  b",
        "  12     c",
        "  3      a",
    ]
    assert shell.objects("top", "api", "--count", "2") == [
        {"name": "api", "key": "b", "refused": 1205},
        {"name": "api", "key": "c", "refused": 12},
    ]
    for count in ("0", "1001", "x"):
        assert shell.run("top", "api", "--count", count).exit_code == 2


def test_top_shows_keys_that_do_nothing(shell: Shell) -> None:
    """Keys are others' text: markup and control characters of theirs are only shown."""
    limiter = shell.limiter(Limit(1, 3600))
    keys: list[Any] = [*ODD, b"\xff\xfe", {"user": "u\n1", "ip": "::1"}]
    for key in keys:
        limiter.hit_many([key, key])
    limiter.close()
    shown = shell.shown("top", "api", "--count", "100")
    assert len(shown.splitlines()) == len(ODD) + 3
    assert "\x1b" not in shown
    for text in ("[red]x[/red]", "ü 字", "user=u%0A1 ip=::1", r"\xff\xfe", r"line\nbreak"):
        assert f"  {text}\n" in shown
    assert len(shell.objects("top", "api", "--count", "100")) == len(ODD) + 2


@pytest.mark.parametrize("key", ["50%", "a{b}c", "line\nbreak"])
def test_what_top_shows_status_takes(shell: Shell, key: str) -> None:
    """A key of `top --json` can be handed to `status` and `reset` as it is."""
    limiter = shell.limiter(Limit(1, 3600))
    limiter.hit_many([key, key])
    limiter.close()
    (found,) = shell.objects("top", "api")
    assert "1 of 1" in shell.shown("status", "api", found["key"])


# reset


def test_reset(shell: Shell) -> None:
    """All that a key has used of all limits is forgotten, and nothing of other keys."""
    limiter = shell.limiter(WINDOW, FIXED)
    limiter.hit("u1", 4)
    limiter.hit("u2", 4)
    assert shell.shown("reset", "api", "u1") == "api: u1 is reset\n"
    assert [verdict.remaining for verdict in limiter.peek("u1").each] == [5, 8]
    assert [verdict.remaining for verdict in limiter.peek("u2").each] == [1, 4]
    assert shell.objects("reset", "api", "u2") == [{"name": "api", "key": "u2", "reset": True}]
    assert limiter.peek("u2").remaining == 5
    assert shell.shown("reset", "api", "nobody") == "api: nobody is reset\n"
    assert shell.run("reset", "api").exit_code == 2


def test_a_reset_is_seen_within_a_second(shell: Shell) -> None:
    """A process that has refused the key remembers that as long as it says, and no longer."""
    limiter = shell.limiter(Limit(1, 3600))
    remembering = RateLimiter(shell.url, "api", Limit(1, 3600), prefix=shell.prefix, deadline=5)
    limiter.hit("u1")
    assert not remembering.hit("u1").allowed
    shell.shown("reset", "api", "u1")
    began = time.monotonic()
    eventually(lambda: remembering.hit("u1").allowed)
    assert time.monotonic() - began < 5


# How it ends


def test_help() -> None:
    """Every command says what it does, its options and the exit codes."""
    shown = CliRunner().invoke(commands, ["limits", "-h"]).stdout
    for word in ("status", "reset", "top"):
        assert word in shown
        page = CliRunner().invoke(commands, ["limits", word, "--help"]).stdout
        for part in (
            "--redis URL",
            "--prefix",
            "--tag [key|name]",
            "--json",
            "  0 ",
            "  2 ",
            "  75 ",
        ):
            assert part in page
        assert "REDISHACKS_REDIS_URL" in page


each_command = pytest.mark.parametrize(
    "command", [("status",), ("status", "u1"), ("reset", "u1"), ("top",)], ids=" ".join
)


def failed(shell: Shell, command: tuple[str, ...], name: str = "api", **more: Any) -> Result:
    """Run a command that cannot: it shows nothing, and says a line on stderr."""
    done = shell.run(command[0], name, *command[1:], **more)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done


@each_command
def test_an_unknown_name(shell: Shell, command: tuple[str, ...]) -> None:
    """A limiter that nobody has used is exit code 2, and says what was looked for."""
    shell.limiter(WINDOW)
    done = failed(shell, command, "apo")
    assert done.exit_code == 2
    assert done.stderr == (
        "redishacks: no rate limiter 'apo' has been used in the last 25 hours "
        f"(prefix '{shell.prefix}'); is the name right?\n"
    )
    other = dataclasses.replace(shell, prefix=f"{shell.prefix}-other")
    assert failed(other, command).exit_code == 2


@each_command
def test_a_url_that_is_none(shell: Shell, command: tuple[str, ...]) -> None:
    """Another kind of URL is exit code 2, and nothing of it is shown."""
    done = failed(shell, command, url="http://:geheim@localhost/0")
    assert done.exit_code == 2
    assert "redis://" in done.stderr


@each_command
def test_redis_away(shell: Shell, command: tuple[str, ...]) -> None:
    """Nobody there is exit code 75."""
    done = failed(shell, command, url="redis://:geheim@127.0.0.1:1/0")
    assert done.exit_code == 75
    assert "127.0.0.1:1: connecting: connection refused" in done.stderr


@each_command
def test_a_wrong_password(shell: Shell, command: tuple[str, ...]) -> None:
    """Credentials that are refused are exit code 75."""
    with valkey_server(requirepass="richtig") as server:
        done = failed(shell, command, url=f"redis://:geheim@127.0.0.1:{server.port}/0")
        assert done.exit_code == 75
        assert "authentication" in done.stderr.lower()


@each_command
def test_a_key_of_somebody_else(shell: Shell, valkey: Server, command: tuple[str, ...]) -> None:
    """A key of another type where the limits should be is exit code 1."""
    with valkey.client() as client:
        client.set(f"{shell.prefix}:r1:{{api}}:limits", "x", ex=60)
    done = failed(shell, command)
    assert done.exit_code == 1
    assert "WRONGTYPE" in done.stderr


@each_command
def test_no_rights(shell: Shell, valkey: Server, command: tuple[str, ...]) -> None:
    """A user who may not read is exit code 78."""
    shell.limiter(WINDOW)
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", shell.prefix, "on", ">geheim", "+ping")
        try:
            url = f"redis://{shell.prefix}:geheim@127.0.0.1:{valkey.port}/0"
            done = failed(shell, command, url=url)
        finally:
            client.execute_command("ACL", "DELUSER", shell.prefix)
    assert done.exit_code == 78
    assert "NOPERM" in done.stderr


def test_what_is_missing_or_unknown(shell: Shell) -> None:
    """Without a URL or a name, or with an unknown tag, it is exit code 2."""
    for args in (
        ("limits", "status", "api"),
        ("limits", "status", "--redis", shell.url),
        ("limits", "status", "--redis", shell.url, "--tag", "x", "api"),
        ("limits", "status", "--redis", shell.url, "api", "u1", "u2"),
        ("limits", "nothing"),
    ):
        done = ended(CliRunner().invoke(commands, args, env={"REDISHACKS_REDIS_URL": None}))
        assert done.exit_code == 2, args


def test_limits_of_a_newer_version(shell: Shell, valkey: Server) -> None:
    """An announcement that this version cannot read is an error in one line."""
    shell.limiter(WINDOW)
    with valkey.client() as client:
        text = f"{time.time():.0f} " + json.dumps({"amount": 3, "per": 9, "colour": "blue"})
        client.hset(f"{shell.prefix}:r1:{{api}}:limits", "w9", text)
    assert shell.run("status", "api").exit_code in (0, 1, 2)


@pytest.mark.slow
def test_as_a_process(shell: Shell) -> None:
    """As cron and scripts run it: quick to end, with its exit code, and no thread that speaks."""
    shell.limiter(WINDOW).hit("u1", 2)

    def run(*args: str, url: str = shell.url) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "redishacks", "limits", *args]
        where = {"REDISHACKS_REDIS_URL": url}
        options = ["--prefix", shell.prefix]
        return subprocess.run(
            [*command, *options], env={**os.environ, **where}, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip

    done = run("status", "api", "u1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 5" in done.stdout
    assert run("reset", "api", "u1").returncode == 0
    assert run("top", "api", "--json").stdout == ""
    assert run("top", "nobody").returncode == 2
    with valkey_server() as server:
        url = f"redis://:geheim@127.0.0.1:{server.port}/0"
        server.kill()
        done = run("top", "api", url=url)
        assert done.returncode == 75
        assert "geheim" not in done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [("status",), ("reset", "u1"), ("top",)])
def test_a_stopped_redis(shell: Shell, command: tuple[str, ...]) -> None:
    """One that does not answer is given a second, and is exit code 75."""
    with valkey_server() as server:
        stopped = dataclasses.replace(shell, url=server.url)
        stopped.limiter(WINDOW)
        with server.paused():
            began = time.monotonic()
            done = stopped.run(command[0], "api", *command[1:])
            assert done.exit_code == 75
            assert time.monotonic() - began < 10


def test_looking_shortens_no_ban(shell: Shell) -> None:
    """However long a ban may last, it lasts as long after somebody has looked at it."""
    limiter = shell.limiter(Limit(1, 60), ban=Ban(1, 60, lasting=86_400, longest=86_400))
    limiter.hit("u1")
    limiter.hit("u1")
    assert "banned for 24 h" in shell.shown("status", "api", "u1")
    banned = limiter.peek("u1").retry_after
    assert banned is not None
    assert banned > 86_000
