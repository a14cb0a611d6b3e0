"""What the transport takes, what it says and what it gives back."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio

from redishacks._command import Command, script
from redishacks._transport import Form, _async_link, _sync, connect, connect_async
from redishacks._transport._settings import from_pool
from redishacks._transport._wire import pack
from redishacks.errors import MaybeAppliedError, ServerError, UnavailableError, UsageError
from redishacks.testing import Server, valkey_server
from tests.transport_kit import PEM, Colour, bulk, canned, echo, get, incr, say, scripted, took

ADD = "return redis.call('INCRBY', KEYS[1], ARGV[1])"


@pytest.fixture
def colour(flavour: str) -> Iterator[Colour]:
    """Both colours in turn."""
    made = Colour(flavour)
    yield made
    made.close()


@pytest.mark.parametrize("protocol", [2, 3])
def test_every_command_ends_as_a_value_or_an_error(
    colour: Colour, valkey: Server, prefix: str, protocol: int
) -> None:
    """Commands of one run end in their order, each with its own value or error."""
    line = colour.to(valkey, protocol=protocol)
    wrong = say("LPUSH", "x", key=prefix)
    doubled = incr(prefix)._replace(parse=lambda reply: reply * 2)
    outcomes = line.run([doubled, wrong, scripted(ADD, 5, keys=[prefix]), echo("x")])
    assert [outcome.value for outcome in outcomes] == [2, None, 6, b"x"]
    assert isinstance(outcomes[1].error, ServerError)
    assert outcomes[1].error.code == "WRONGTYPE"
    assert line.call(doubled) == 14
    with pytest.raises(ServerError, match="WRONGTYPE"):
        line.call(wrong)
    assert line.run([]) == []


def test_a_parse_that_fails_is_that_commands_error(colour: Colour, valkey: Server) -> None:
    """An error in reading a reply is raised as it is, and the connection stays in step."""
    line = colour.to(valkey)
    broken = echo("one")._replace(parse=int)
    with pytest.raises(ValueError, match="one"):
        line.call(broken)
    assert line.call(echo("two")) == b"two"
    first, second = line.run([broken, echo("three")])
    assert isinstance(first.error, ValueError)
    assert second.value == b"three"


def test_bytes_come_out_whatever_the_client_decodes(colour: Colour, valkey: Server) -> None:
    """Text goes out as UTF-8 and replies are bytes, also for a client that decodes."""
    line = colour.to(valkey, decode_responses=True, encoding="latin-1")
    assert line.call(echo("é")) == "é".encode()
    assert line.call(echo(1.5)) == b"1.5"


def test_arguments_that_cannot_be_said_are_refused(colour: Colour, valkey: Server) -> None:
    """An argument of another type is a usage error, of that command alone."""
    line = colour.to(valkey)
    wrong: Any = echo(None)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(UsageError, match="ECHO: arguments must be"):
            line.call(wrong)
    first, second = line.run([wrong, echo("fine")])
    assert isinstance(first.error, UsageError)
    assert second.value == b"fine"


def test_settings_come_from_the_client(colour: Colour, valkey: Server, prefix: str) -> None:
    """Database, name and RESP version of our connections are the client's."""
    line = colour.to(valkey, db=3, client_name=prefix, protocol=2)
    info = line.call(say("CLIENT", "INFO")).decode()
    assert f"name={prefix} db=3 " in f"{info}".replace("  ", " ") or (
        f"name={prefix}" in info and "db=3" in info
    )
    assert "resp=2" in info
    assert "resp=3" in colour.to(valkey, protocol=3).call(say("CLIENT", "INFO")).decode()


def test_urls_are_read_as_redis_py_reads_them(colour: Colour, valkey: Server, prefix: str) -> None:
    """TCP and unix socket URLs lead to the same server; one URL has one transport."""
    tcp = colour.connect(valkey.url)
    unix = colour.connect(valkey.unix_url)
    assert [tcp.call(incr(prefix)), unix.call(incr(prefix))] == [1, 2]
    assert colour.connect(valkey.url).transport is tcp.transport


def test_tools_on_one_client_share_its_transport(colour: Colour, valkey: Server) -> None:
    """A client has one transport, which goes when the client goes."""
    client = colour.module.Redis(port=valkey.port)
    line = colour.connect(client)
    assert colour.connect(client).transport is line.transport
    assert line.call(echo("x")) == b"x"
    transport = weakref.ref(line.transport)
    alive = weakref.ref(client)
    del client
    gc.collect()
    assert alive() is None
    assert line.call(echo("y")) == b"y"
    del line
    gc.collect()
    assert transport() is None


def test_the_wrong_colour_is_refused(valkey: Server) -> None:
    """A client of the other colour, or no client, gets an error that names what is needed."""
    sync, other = redis.Redis(port=valkey.port), redis.asyncio.Redis(port=valkey.port)
    with pytest.raises(UsageError, match=r"for asyncio: use the tool's Async class"):
        connect(other)
    with pytest.raises(UsageError, match=r"not for asyncio: .* redis.asyncio.Redis"):
        connect_async(sync)
    things: list[Any] = [None, 5, {}, "http://localhost", "redis://localhost:port/"]
    for thing in things:
        with pytest.raises(UsageError, match=r"client|URL"):
            connect(thing)


def test_no_secret_is_shown(colour: Colour) -> None:
    """Neither an error nor a repr shows the password."""
    with valkey_server(requirepass="right") as server:
        line = colour.to(server, password="s3cret")
        with pytest.raises(UnavailableError, match="authentication failed") as caught:
            line.call(echo("x"))
        assert "s3cret" not in str(caught.value)
        assert "s3cret" not in repr(vars(line.transport))
        assert colour.connect(server.url).call(echo("in")) == b"in"
        assert colour.to(server, username="default").call(echo("in")) == b"in"
    with pytest.raises(UsageError) as refused:
        connect("redis://:s3cret@localhost:port/")
    assert "s3cret" not in str(refused.value)


def test_scripts_go_by_their_hash(colour: Colour, prefix: str) -> None:
    """A script is sent whole once; a flushed script cache is not noticed."""
    with valkey_server() as server:
        line, admin = colour.to(server), server.client()
        command = scripted(ADD, 1, keys=[prefix])
        assert [line.call(command) for _ in range(3)] == [1, 2, 3]
        admin.script_flush()
        assert line.call(command) == 4
        admin.script_flush()
        assert [one.value for one in line.run([command, echo("x"), command])] == [5, b"x", 6]
        stats: dict[str, Any] = admin.info("commandstats")
        assert stats["cmdstat_eval"]["calls"] == 4
        admin.close()


def test_a_hook_sees_every_command(colour: Colour, valkey: Server, prefix: str) -> None:
    """`on_command` gets name, node, seconds and error; its own errors change nothing."""
    seen: list[tuple[str, str, float, BaseException | None]] = []

    def hook(*args: Any) -> None:
        seen.append(args)
        raise RuntimeError("an observer's own trouble")

    client = colour.module.Redis(port=valkey.port)
    line = colour.connect(client, on_command=hook)
    wrong = say("LPUSH", "x", key=prefix)
    line.call(incr(prefix))
    with pytest.raises(ServerError):
        line.call(wrong)
    line.run([scripted(ADD, 1, keys=[prefix]), wrong])
    line.close()
    names = [(name, node, getattr(error, "code", None)) for name, node, _, error in seen]
    there = f"localhost:{valkey.port}"
    assert names == [
        ("INCR", there, None),
        ("LPUSH", there, "WRONGTYPE"),
        ("a script", there, None),
        ("LPUSH", there, "WRONGTYPE"),
    ]
    assert all(0 < seconds < 5 for _, _, seconds, _ in seen)


def test_large_messages_do_not_wait_in_a_circle(colour: Colour) -> None:
    """A server that reads no further until its replies are taken gets them taken."""
    with canned(lambda words: bulk(words[1])) as port:
        line = colour.to_port(port, protocol=2)
        values = [bytes([n]) * 1_000_000 for n in range(20)]
        assert [one.result() for one in line.run([echo(value) for value in values])] == values
        assert line.call(echo(values[7])) == values[7]


def test_tls(colour: Colour) -> None:
    """A client with TLS gets TLS, checked against its own authority; others are not trusted."""
    with canned(lambda words: bulk(words[1]), tls=True) as port:
        options = {"port": port, "protocol": 2, "ssl": True}
        line = colour.connect(colour.module.Redis(**options, ssl_ca_certs=str(PEM)))
        values = [b"x" * size for size in (1, 100_000, 3_000_000)]
        assert [line.call(echo(value)) for value in values] == values
        assert [one.value for one in line.run([echo(value) for value in values])] == values
        time.sleep(0.02)  # idle for long enough to be looked at before it is used
        assert line.call(echo("again")) == b"again"
        line.close()
        with pytest.raises(UnavailableError, match="TLS"):
            colour.connect(colour.module.Redis(**options)).call(echo("x"))
        with pytest.raises(UnavailableError, match="TLS settings"):
            colour.connect(colour.module.Redis(**options, ssl_ca_certs="/nowhere")).call(echo("x"))
        url = f"rediss://127.0.0.1:{port}?protocol=2&ssl_ca_certs={PEM}"
        line = colour.connect(url)
        assert line.call(echo("url")) == b"url"


def test_tls_against_a_server_that_speaks_none(colour: Colour, valkey: Server) -> None:
    """TLS with a plain server ends with an error within the deadline."""
    with took(at_most=3), pytest.raises(UnavailableError):
        colour.to(valkey, ssl=True).call(echo("x"), 0.2)


def test_pushes_are_no_replies(colour: Colour, valkey: Server, prefix: str) -> None:
    """Invalidations that the server pushes between replies are passed over."""
    line, other = colour.to(valkey, protocol=3), valkey.client()
    assert line.run([say("CLIENT", "TRACKING", "ON"), get(prefix)])[1].error is None
    for n in range(50):
        other.set(prefix, n)  # pushed at once, or with the next reply
        assert [one.value for one in line.run([echo(n), get(prefix)])] == [b"%d" % n] * 2
        other.set(prefix, n)
        assert line.call(get(prefix)) == b"%d" % n
    other.close()


def test_a_push_in_the_same_bytes_is_no_reply(colour: Colour) -> None:
    """Pushes before and after a reply, in one packet with it, are passed over."""
    push = b">2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n"
    with canned(lambda words: push + bulk(words[1]) + push) as port:
        line = colour.to_port(port, protocol=2)
        for n in range(5):
            assert line.call(echo(n)) == b"%d" % n
            assert [one.value for one in line.run([echo(n), echo("x")])] == [b"%d" % n, b"x"]


def test_fakeredis(colour: Colour, prefix: str) -> None:
    """A fake client works, with its own server, and gives bytes, errors and scripts."""
    kind = fakeredis.FakeAsyncRedis if colour.runner else fakeredis.FakeRedis
    client = kind(server=fakeredis.FakeServer(), decode_responses=True)
    line = colour.connect(client)
    command = scripted(ADD, 2, keys=[prefix])
    assert [line.call(command), line.call(command), line.call(get(prefix))] == [2, 4, b"4"]
    outcomes = line.run([say("LPUSH", "x", key=prefix), command, echo("é")])
    assert isinstance(outcomes[0].error, ServerError)
    assert outcomes[0].error.code == "WRONGTYPE"
    assert [one.value for one in outcomes[1:]] == [6, "é".encode()]
    time.sleep(0.02)
    assert line.call(get(prefix)) == b"6"


class OwnConnection(redis.Connection):
    """A connection class of a user's own."""


class OwnAsyncConnection(redis.asyncio.Connection):
    """The same for asyncio."""


@pytest.mark.parametrize("protocol", [2, 3])
def test_connection_classes_of_the_users_own(colour: Colour, prefix: str, protocol: int) -> None:
    """Unknown connection classes keep the promises: no repetition, a deadline, no old socket."""
    with valkey_server(requirepass="secret") as server:
        made = (OwnAsyncConnection if colour.runner else OwnConnection, server.port)
        pool = colour.module.ConnectionPool(
            connection_class=made[0], port=made[1], password="secret", protocol=protocol
        )
        line = colour.connect(colour.module.Redis(connection_pool=pool))
        command = scripted(ADD, 2, keys=[prefix])
        assert [line.call(command), line.call(command), line.call(get(prefix))] == [2, 4, b"4"]
        with server.paused(), took(at_most=0.2 + 0.5), pytest.raises(MaybeAppliedError):
            line.call(incr(prefix), 0.2)
        assert line.call(echo("on")) == b"on"
        assert line.call(get(prefix)) == b"5"
        server.restart()
        time.sleep(0.02)
        assert line.call(incr(prefix)) == 1
        server.kill()
        time.sleep(0.02)
        with took(at_most=0.5), pytest.raises(UnavailableError):
            line.call(incr(prefix))


def test_names_are_looked_up(colour: Colour, valkey: Server) -> None:
    """Every address of a host name is tried; an unknown name is an error that names it."""
    # "localhost" is often ::1 first, where nobody listens.
    assert colour.to(valkey, host="localhost").call(echo("x")) == b"x"
    with pytest.raises(UnavailableError, match=r"nowhere\.invalid"):
        colour.to(valkey, host="nowhere.invalid").call(echo("x"))


def test_closing_lets_go_and_goes_on(colour: Colour, prefix: str) -> None:
    """After `close` no connection is open; the next call opens one."""
    with valkey_server() as server:
        line, admin = colour.to(server, client_name=prefix), server.client()
        assert line.call(echo("x")) == b"x"
        line.close()
        clients: Any = admin.client_list()
        assert [one for one in clients if one["name"] == prefix] == []
        assert line.call(echo("y")) == b"y"
        admin.close()


def test_idle_connections_are_closed_in_the_end(
    valkey: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that a burst left behind are closed when they have not been used for long."""
    transport = connect(redis.Redis(port=valkey.port, client_name=prefix))
    admin = valkey.client()

    def ours() -> int:
        clients: Any = admin.client_list()
        return sum(one["name"] == prefix for one in clients)

    slow = say("BLPOP", f"{prefix}:nothing", 0.1)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: transport.call(slow, 5), range(6)))
    assert ours() == 6
    monkeypatch.setattr(_sync, "CLOSE_AFTER", 0.05)
    time.sleep(0.1)
    transport.call(echo("x"), 1)
    assert ours() == 1
    admin.close()


def test_commands_wait_for_room(valkey: Server, prefix: str) -> None:
    """Bytes in flight are bounded: what finds no room in time was never sent."""
    value = "x" * 1_000_000
    client = redis.asyncio.Redis(port=valkey.port)
    transport = connect_async(client)

    async def main() -> None:
        await transport.call(echo("warm"), 1)
        with valkey.paused():
            calls = [transport.call(say("APPEND", f"{prefix}:{n}", value), 0.3) for n in range(9)]
            results = await asyncio.gather(*calls, return_exceptions=True)
        kinds = [type(result) for result in results]
        assert kinds[:3] == [MaybeAppliedError] * 3
        assert kinds[-4:] == [UnavailableError] * 4
        await asyncio.gather(
            *(transport.call(say("APPEND", f"{prefix}:{n}", value), 5) for n in range(20))
        )
        sizes = [await transport.call(say("STRLEN", f"{prefix}:{n}"), 1) for n in range(20)]
        assert sizes[-11:] == [1_000_000] * 11
        assert sizes[5:9] == [1_000_000] * 4

    asyncio.run(main())


def test_a_cancelled_wait_for_room_takes_none(valkey: Server) -> None:
    """Whoever gives up waiting for room leaves the line, and the rest go on."""
    transport = connect_async(redis.asyncio.Redis(port=valkey.port))
    value = "x" * 3_000_000

    async def main() -> None:
        await transport.call(echo("warm"), 1)
        for _ in range(5):
            tasks = [asyncio.create_task(transport.call(echo(value), 5)) for _ in range(6)]
            await asyncio.sleep(0)
            for task in tasks[2:5]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(one, asyncio.CancelledError) for one in done] == (
                [False] * 2 + [True] * 3 + [False]
            )

    asyncio.run(main())


def test_a_full_backlog_costs_the_connect_deadline(
    colour: Colour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody accepts, over TCP or a unix socket, connecting ends by its own deadline."""
    for module in (_async_link, _sync):
        monkeypatch.setattr(module, "CONNECT_DEADLINE", 0.3)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        unix.bind(path)
        unix.listen(0)
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(0)
        waiting = []
        for family, where in ((socket.AF_UNIX, path), (socket.AF_INET, tcp.getsockname())):
            for _ in range(4):
                one = socket.socket(family)
                one.setblocking(False)
                one.connect_ex(where)
                waiting.append(one)
        for url in (f"unix://{path}", f"redis://127.0.0.1:{tcp.getsockname()[1]}"):
            with took(at_least=0.25, at_most=0.3 + 0.5), pytest.raises(UnavailableError):
                colour.connect(url).call(echo("x"), 0.1)
        for one in waiting:
            one.close()


def test_a_context_as_the_client_would_make_it() -> None:
    """The TLS options of redis-py have their documented effect."""
    client = redis.Redis(
        ssl=True,
        ssl_ca_certs=str(PEM),
        ssl_certfile=str(PEM),
        ssl_keyfile=str(PEM),
        ssl_check_hostname=False,
        ssl_min_version=ssl.TLSVersion.TLSv1_3,
        ssl_cert_reqs="optional",
    )
    context = from_pool(client.connection_pool).tls_context()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_OPTIONAL, False)
    trusting = redis.Redis(ssl=True, ssl_cert_reqs="none")
    context = from_pool(trusting.connection_pool).tls_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)


@pytest.mark.parametrize("words", [(), ("",), ("a", "b\r\nc"), ("é", ""), ("\0", "日本" * 99)])
@pytest.mark.parametrize("rest", [(), ("0", ""), ("ü",)])
def test_a_form_is_encoded_as_any_other_command(
    words: tuple[str, ...], rest: tuple[str, ...]
) -> None:
    """What is filled in says the same as a command that is encoded as a whole."""
    called, keys = script("lock_show"), (b"a", "ö".encode())
    filled = Form(called, keys, *rest).fill(*words)
    plain: Command[Any] = Command((*words, *rest), keys, script=called)
    assert pack(filled) == pack(plain)
    assert pack(filled, whole=True) == pack(plain, whole=True)
    assert filled._replace(packed=None) == plain
