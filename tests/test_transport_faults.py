"""The transport when servers hang, die, come back or say no: nothing twice, nothing endless."""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from redishacks._transport import _async_link, _socket, _sync
from redishacks.errors import MaybeAppliedError, ServerError, UnavailableError, UsageError
from redishacks.testing import FaultProxy, Server, redis_server, valkey_server
from redishacks.testing.sentinel import SentinelSetup, valkey_sentinel
from tests.transport_kit import (
    LENIENCE,
    Colour,
    canned,
    echo,
    eventually,
    get,
    incr,
    say,
    scripted,
    took,
)


@pytest.fixture
def colour(flavour: str) -> Iterator[Colour]:
    """Both colours in turn."""
    made = Colour(flavour)
    yield made
    made.close()


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server that these tests may stop."""
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="module")
def sentinel() -> Iterator[SentinelSetup]:
    """A primary, a replica and a sentinel."""
    with valkey_sentinel() as setup:
        yield setup


def test_redis_py_counts_twice_without_an_error(own: Server, prefix: str) -> None:
    """The reason for all this: one INCR of redis-py's default client becomes two or more."""
    client = own.client(socket_timeout=0.2)
    client.ping()
    returned: list[Any] = []
    with own.paused():
        thread = threading.Thread(target=lambda: returned.append(client.incr(prefix)))
        thread.start()
        time.sleep(0.5)  # past the timeout, which is what sets the client repeating
    thread.join()
    assert returned[0] >= 2
    assert int(own.client().get(prefix) or 0) >= 2
    client.close()


def test_ours_counts_at_most_once(colour: Colour, own: Server, prefix: str) -> None:
    """A lost reply is said with MaybeAppliedError, and the write took effect once or never."""
    line = colour.to(own)
    script = scripted("return redis.call('INCRBY', KEYS[1], 1)", keys=[prefix])
    assert line.call(script) == 1
    for again in (1, 2):
        line.call(echo("warm"))
        with own.paused():
            with pytest.raises(MaybeAppliedError, match=r"a script on .* once or never"):
                line.call(script, 0.2)
            # On a new connection nothing was sent yet: that is no doubt, but a plain failure.
            with pytest.raises(UnavailableError):
                line.call(script, 0.2)
        assert line.call(get(prefix)) == b"%d" % (1 + again)


def test_a_run_counts_at_most_once(colour: Colour, own: Server, prefix: str) -> None:
    """In a run every write whose reply was lost is in doubt by itself; reads are repeated."""
    line = colour.to(own)
    line.call(echo("warm"))
    with own.paused():
        outcomes = line.run([incr(prefix), get(prefix), incr(prefix)], 0.2)
    kinds = [type(outcome.error) for outcome in outcomes]
    assert kinds == [MaybeAppliedError, UnavailableError, MaybeAppliedError]
    assert line.call(get(prefix)) == b"2"


def test_a_hung_server_costs_the_deadline(colour: Colour, own: Server) -> None:
    """On an idle connection as on a new one, a hung server costs the deadline and little more."""
    line = colour.to(own)
    line.call(echo("warm"))
    with own.paused():
        with took(at_least=0.6, at_most=0.6 + LENIENCE), pytest.raises(MaybeAppliedError):
            line.call(echo("x"), 0.6)
        with took(at_most=0.6 + LENIENCE), pytest.raises(UnavailableError):
            line.call(echo("x"), 0.6)
        with took(at_most=0.6 + LENIENCE):
            assert all(o.error for o in line.run([echo("x"), get("x")], 0.6))


def test_a_hung_server_costs_other_threads_the_deadline(own: Server) -> None:
    """Threads other than the main one wait in another way, for as long."""
    line = Colour("sync").to(own)
    seconds: list[float] = []

    def call() -> None:
        line.call(echo("warm"))
        ready.wait()
        started = time.monotonic()
        # Unavailable is a thread that found no idle connection, since another used its first one.
        with pytest.raises((MaybeAppliedError, UnavailableError)):
            line.call(echo("x"), 0.6)
        seconds.append(time.monotonic() - started)

    ready = threading.Barrier(5)
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: ready.n_waiting == 4)
    with own.paused():
        ready.wait()
        for thread in threads:
            thread.join()
    assert len(seconds) == 4
    assert all(0.59 < each < 0.6 + LENIENCE for each in seconds)


@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_trickling_server_costs_the_deadline(colour: Colour, own: Server, thread: str) -> None:
    """A server that sends byte by byte is late when the whole reply is late."""
    errors: list[Any] = []

    def call() -> None:
        with took(at_least=0.25, at_most=0.3 + LENIENCE), pytest.raises(MaybeAppliedError) as error:
            line.call(echo("x" * 200), 0.3)
        errors.append(error)

    with FaultProxy(own) as proxy:
        line = colour.to_port(proxy.port)
        line.call(echo("warm"))
        proxy.trickle(100)
        if thread == "main":
            call()
        else:
            other = threading.Thread(target=call)
            other.start()
            other.join()
        assert errors
        line.close()


def test_a_refused_server_costs_nothing(colour: Colour, prefix: str) -> None:
    """Nobody listening is known at once, on an idle connection too, and nothing is in doubt."""
    with valkey_server() as server:
        line = colour.to(server)
        line.call(echo("warm"))
        server.kill()
        time.sleep(0.02)
        for _ in range(2):
            with took(at_most=0.2), pytest.raises(UnavailableError, match="refused"):
                line.call(incr(prefix), 5)
        server.restart()
        assert line.call(incr(prefix)) == 1
        missing = f"unix://{server.directory}/missing.sock"
        with took(at_most=0.2), pytest.raises(UnavailableError, match="refused"):
            colour.connect(missing).call(incr(prefix))


def test_a_restart_goes_unnoticed(colour: Colour, prefix: str) -> None:
    """After a restart, or when the server closed idle connections, writes go on without doubt."""
    with valkey_server() as server:
        line = colour.to(server)
        assert [line.call(incr(prefix)) for _ in range(3)] == [1, 2, 3]
        server.restart()
        time.sleep(0.02)
        assert line.call(incr(prefix)) == 1
        admin = server.client()
        admin.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.02)
        assert [o.value for o in line.run([incr(prefix), incr(prefix)])] == [2, 3]
        admin.close()


def test_an_idle_night_goes_unnoticed(
    colour: Colour, valkey: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After long idling a connection must answer first; one that a firewall forgot is replaced."""
    for module in (_async_link, _sync):
        monkeypatch.setattr(module, "PING_AFTER", 0.02)
    with FaultProxy(valkey) as proxy:
        line = colour.to_port(proxy.port)
        assert line.call(incr(prefix)) == 1
        time.sleep(0.05)
        assert line.call(incr(prefix)) == 2
        time.sleep(0.05)
        proxy.drop_reply(of="PING", cut=False)  # nothing comes back, and nobody closes it
        with took(at_least=0.3, at_most=1.0 + LENIENCE):
            assert line.call(incr(prefix), 0.8) == 3
        assert proxy.armed == 0
        assert proxy.connections == 2
        line.close()


def test_lost_replies(colour: Colour, valkey: Server, prefix: str) -> None:
    """A reply lost after the write was applied: in doubt, unless repeating does no harm."""
    with FaultProxy(valkey) as proxy:
        line = colour.to_port(proxy.port)
        line.call(echo("warm"))
        proxy.drop_reply(of="INCR")
        with pytest.raises(MaybeAppliedError, match=r"INCR on .* connection was closed"):
            line.call(incr(prefix))
        assert line.call(get(prefix)) == b"1"
        proxy.drop_reply(of="GET")
        assert line.call(get(prefix)) == b"1"
        proxy.drop_reply(of="INCR")
        assert line.call(incr(prefix)._replace(repeatable=True)) == 3
        proxy.drop_reply(2, of="INCR")
        wrong = say("LPUSH", "x", key=prefix)
        outcomes = line.run([incr(prefix), wrong, incr(prefix), get(prefix), incr(prefix)])
        kinds = [type(outcome.error) for outcome in outcomes]
        lost = MaybeAppliedError
        assert kinds == [type(None), ServerError, lost, type(None), lost]
        assert outcomes[0].value == 4
        assert outcomes[3].value in (b"5", b"6")
        line.close()


def test_what_was_never_sent_is_sent(colour: Colour, valkey: Server, prefix: str) -> None:
    """A connection cut in the moment before the write: the command goes out on a new one."""
    with FaultProxy(valkey) as proxy:
        line = colour.to_port(proxy.port)
        for n in range(1, 20):
            assert line.call(incr(prefix)) == n
            proxy.cut(reset=True)
            time.sleep(0.01)
        line.close()


def test_scripts_interrupted_are_not_said_again(
    colour: Colour, valkey: Server, prefix: str
) -> None:
    """The whole script, sent because the server did not know its hash, is not repeated either."""
    with FaultProxy(valkey) as proxy:
        line = colour.to_port(proxy.port)
        line.call(echo("warm"))
        proxy.drop_reply(of="EVAL")
        source = f"return redis.call('INCR', KEYS[1]) -- {prefix}"
        with pytest.raises(MaybeAppliedError):
            line.call(scripted(source, keys=[prefix]))
        assert line.call(get(prefix)) == b"1"
        line.close()


class Rotating(redis.CredentialProvider):
    """Passwords that are asked for anew; each may be given more than once."""

    def __init__(self, *passwords: str) -> None:
        self.passwords = list(passwords)

    def get_credentials(self) -> tuple[str]:
        """Return the next one; the last stays."""
        return (self.passwords.pop(0) if len(self.passwords) > 1 else self.passwords[0],)

    async def get_credentials_async(self) -> tuple[str]:
        """The same for asyncio."""
        return self.get_credentials()


class Failing(redis.CredentialProvider):
    """A provider in trouble."""

    def get_credentials(self) -> tuple[str]:
        """Fail, with a secret in the message."""
        raise RuntimeError("s3cret")

    async def get_credentials_async(self) -> tuple[str]:
        """The same for asyncio."""
        return self.get_credentials()


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_rotated_password_goes_unnoticed(colour: Colour, prefix: str, protocol: int) -> None:
    """New connections ask the provider anew, again while it is behind; no call fails."""
    with valkey_server(requirepass="one") as server:
        provider = Rotating("one", "one", "one", "two")
        line = colour.to(server, password=None, credential_provider=provider, protocol=protocol)
        assert line.call(incr(prefix)) == 1
        admin = server.client(password="one")
        admin.config_set("requirepass", "two")
        admin.client_kill_filter(_type="normal", skipme=True)
        time.sleep(0.02)
        assert line.call(incr(prefix)) == 2  # the provider says "one" twice more
        assert provider.passwords == ["two"]
        # RESET takes the login away from the open connection, as an expired token would.
        assert line.call(say("RESET")) == b"RESET"
        assert line.call(incr(prefix)) == 3
        assert [o.value for o in line.run([say("RESET"), incr(prefix)])] == [b"RESET", 4]
        admin.close()
        with pytest.raises(UnavailableError, match="provider failed with RuntimeError") as error:
            colour.to(server, password=None, credential_provider=Failing()).call(incr(prefix))
        assert "s3cret" not in str(error.value)


REFUSALS = {
    "LOADING": "LOADING the dataset is being read",
    "BUSY": "BUSY a script is running",
    "MASTERDOWN": "MASTERDOWN link with the primary is down",
    "READONLY": "READONLY you cannot write against a read only replica",
    "TRYAGAIN": "TRYAGAIN several keys during a resharding",
    "CLUSTERDOWN": "CLUSTERDOWN the cluster is down",
}


@pytest.mark.parametrize("code", REFUSALS)
def test_passing_refusals_are_waited_out(colour: Colour, code: str) -> None:
    """What a server refuses for now, having applied nothing, is said again until the deadline."""
    refusal = b"-%s\r\n" % REFUSALS[code].encode()
    left: Iterator[int] = itertools.repeat(0)

    def answer(words: list[bytes]) -> bytes:
        return refusal if next(left) else b":7\r\n"

    with canned(answer) as port:
        line = colour.to_port(port, protocol=2)
        left = iter([1, 1, 1, *[0] * 100])
        assert line.call(incr("k")) == 7
        left = iter([0, 1, 1, 0, 1, 0, 0])
        assert [o.value for o in line.run([incr("a"), incr("b"), incr("c")])] == [7, 7, 7]
        left = itertools.repeat(1)
        said = rf"INCR: not done within 0.3 s: {code}"
        with took(0.3 + LENIENCE, 0.2), pytest.raises(UnavailableError, match=said):
            line.call(incr("k"), 0.3)


@pytest.mark.parametrize(
    ("said", "error", "match"),
    [
        ("OOM command not allowed", UnavailableError, "OOM"),
        ("NOREPLICAS Not enough good replicas", UnavailableError, "NOREPLICAS"),
        ("MISCONF errors writing to disk", UnavailableError, "MISCONF"),
        ("NOPERM this user has no permissions", ServerError, "NOPERM"),
        ("MOVED 7 127.0.0.1:1", UsageError, "pass a redis.RedisCluster"),
        ("ERR unknown command", ServerError, "ERR unknown"),
    ],
)
def test_other_refusals_come_at_once(
    colour: Colour, said: str, error: type[Exception], match: str
) -> None:
    """What waiting would not mend is an error at once; nothing was applied."""
    with canned(lambda words: b"-%s\r\n" % said.encode()) as port:
        line = colour.to_port(port, protocol=2)
        with took(at_most=1), pytest.raises(error, match=match):
            line.call(incr("k"))


def test_refusals_inside_a_script_have_their_own_code(
    colour: Colour, redis62: Server, prefix: str
) -> None:
    """Old servers wrap an error inside a script; its own code still decides."""
    push = scripted("return redis.call('LPUSH', KEYS[1], 'x')", keys=[prefix])
    line = colour.to(redis62)
    line.call(incr(prefix))
    with pytest.raises(ServerError) as caught:
        line.call(push)
    assert caught.value.code == "WRONGTYPE"
    with redis_server(maxmemory="100kb", maxmemory_policy="noeviction") as full:
        with pytest.raises(UnavailableError, match="OOM"):
            colour.to(full).call(push)
        full.client().replicaof("127.0.0.1", 1)
        with pytest.raises(UnavailableError, match=r"READONLY|MASTERDOWN"):
            colour.to(full).call(push, 0.2)


def test_a_full_server_is_named(colour: Colour) -> None:
    """A server with no connection left says so; nothing was applied."""
    with valkey_server(maxclients=1) as server:
        admin = server.client()
        admin.ping()
        with took(at_most=1), pytest.raises(UnavailableError, match="max number of clients"):
            colour.to(server, protocol=3).call(incr("k"))
        admin.close()


def test_a_busy_script_is_waited_out(colour: Colour, prefix: str) -> None:
    """While a script keeps the server busy, writes wait and then happen once."""
    with valkey_server(busy_reply_threshold=20) as server:
        line = colour.to(server)
        line.call(echo("warm"))
        admin = server.client(retry=Retry(NoBackoff(), 0))

        def hog() -> None:
            with pytest.raises(redis.ResponseError):
                admin.eval("while true do end", 0)

        thread = threading.Thread(target=hog)
        thread.start()
        killer = server.client(retry=Retry(NoBackoff(), 0))

        def busy() -> bool:
            try:
                killer.get("k")
            except redis.ResponseError:
                return True
            return False

        eventually(busy)
        timer = threading.Timer(0.2, killer.script_kill)
        timer.start()
        assert line.call(incr(prefix)) == 1
        timer.join()
        thread.join()
        admin.close()
        killer.close()


def test_sentinel(colour: Colour, sentinel: SentinelSetup, prefix: str) -> None:
    """Through Sentinel the primary is found, and found again after a failover."""
    master = colour.module.Sentinel(sentinel.sentinels).master_for(sentinel.service)
    line = colour.connect(master)
    assert line.call(incr(prefix)) == 1
    sentinel.failover()
    assert line.call(incr(prefix)) >= 1
    port = line.call(say("CONFIG", "GET", "port")._replace(parse=_pair))["port"]
    assert port == sentinel.primary.port


def test_sentinels_replicas_and_silence(
    colour: Colour, sentinel: SentinelSetup, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica is refused; a hung or absent sentinel costs no more than connecting may."""
    for module in (_async_link, _sync):
        monkeypatch.setattr(module, "CONNECT_DEADLINE", 0.3)
    manager = colour.module.Sentinel(sentinel.sentinels)
    with pytest.raises(ValueError, match="replica takes no writes"):
        colour.connect(manager.slave_for(sentinel.service))
    with took(at_most=1), pytest.raises(UnavailableError, match="no sentinel"):
        colour.connect(manager.master_for("unknown")).call(incr(prefix))
    with sentinel.sentinel.paused(), took(at_most=1.5), pytest.raises(UnavailableError):
        colour.connect(manager.master_for(sentinel.service)).call(incr(prefix))


def _pair(reply: Any) -> dict[str, int]:
    words = list(itertools.chain(*reply.items())) if isinstance(reply, dict) else reply
    return {words[0].decode(): int(words[1])}


def test_the_kernels_own_timeouts_are_not_restarted(own: Server) -> None:
    """Signals that arrive faster than the deadline do not keep a hung call waiting."""
    line = Colour("sync").to(own)
    line.call(echo("warm"))
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with own.paused(), took(at_most=0.3 + LENIENCE), pytest.raises(MaybeAppliedError):
            line.call(echo("x"), 0.3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_signals_that_threads_take(own: Server) -> None:
    """Where the main thread blocks signals, they interrupt others: the deadline holds there too."""
    line = Colour("sync").to(own)
    line.call(echo("warm"))
    seconds: list[float] = []

    def call() -> None:
        started = time.monotonic()
        with pytest.raises(MaybeAppliedError):
            line.call(echo("x"), 0.3)
        seconds.append(time.monotonic() - started)

    old = signal.signal(signal.SIGALRM, lambda *_: None)
    thread = threading.Thread(target=call)
    with own.paused():
        thread.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try:
            thread.join(3)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            signal.signal(signal.SIGALRM, old)
            thread.join()
    assert 0.29 < seconds[0] < 0.3 + LENIENCE


def test_a_slow_write_is_part_of_the_deadline(colour: Colour, own: Server, prefix: str) -> None:
    """A command that the server takes slowly leaves less time for its reply."""
    line = colour.to(own)
    line.call(echo("warm"))
    # More than the sockets hold: most of it is taken when the server goes on, which then blocks.
    large = say("BLPOP", prefix * 1_000_000, 60)
    with own.paused():
        timer = threading.Timer(1.2, own.resume)
        timer.start()
        with took(at_least=1.4, at_most=1.5 + LENIENCE), pytest.raises(MaybeAppliedError):
            line.call(large, 1.5)
        timer.join()


def test_interrupted_exchanges_close_their_connection(own: Server) -> None:
    """An exception out of a signal handler, in mid-exchange, leaves no reply behind."""

    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    line = Colour("sync").to(own)
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for exchange in (
            lambda: line.call(echo("old"), 5),
            lambda: line.run([echo("old"), echo("older")], 5),
        ):
            assert line.call(echo("warm")) == b"warm"
            resumed = threading.Timer(0.3, own.resume)
            with own.paused():
                resumed.start()
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(Interrupt):
                    exchange()
                # At once, before the old reply has come: it would be the next on that connection.
                assert line.call(echo("new")) == b"new"
            resumed.join()
    finally:
        signal.signal(signal.SIGALRM, old)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """See that no garbage of other tests is collected, and traced, in the middle of this one."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_interrupted_calls_leave_no_connection(own: Server) -> None:
    """A handler that raises at any moment of a call: what was in use is closed and forgotten."""

    class Interrupt(BaseException):
        pass

    def interrupted(at: int, work: Callable[[], Any]) -> bool:
        left = at

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal left
            code = frame.f_code
            if "/_transport/" not in code.co_filename or code.co_name == "__del__":
                return None
            frame.f_trace_opcodes = True
            left -= event == "opcode"
            if left <= 0:
                raise Interrupt
            return trace

        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True  # Python 3.12 heeds it only before settrace()
        sys.settrace(trace)
        try:
            work()
        except Interrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    line = Colour("sync").to(own)
    node = line.transport._only

    def connect_and_call() -> None:
        line.close()
        line.call(echo("x"))

    for work in (
        lambda: line.call(echo("x")),
        lambda: line.run([echo("x")]),
        connect_and_call,
    ):
        moments = 0
        while interrupted(moments + 1, work):
            moments += 1
            assert line.call(echo(moments)) == b"%d" % moments
            assert len(node._open) == len(node._idle)
        assert moments > 100
    line.close()
    assert len(node._open) == 0


def test_late_replies_reach_nobody(colour: Colour, own: Server) -> None:
    """After a timeout the late reply is not taken for the next one."""
    for n in range(3):
        line = colour.to(own)
        line.call(echo("warm"))
        with own.paused(), pytest.raises(MaybeAppliedError):
            line.call(echo("late"), 0.05)
        assert line.call(echo(n)) == b"%d" % n


def test_a_server_that_speaks_no_resp(colour: Colour) -> None:
    """Bytes that are no replies end the exchange; the write is in doubt."""
    with canned(lambda words: b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        line = colour.to_port(port, protocol=2)
        with took(at_most=1), pytest.raises(MaybeAppliedError, match="not RESP"):
            line.call(incr("k"))


def test_looking_costs_nothing_while_in_use() -> None:
    """The times after which a connection is looked at, pinged and closed are as documented."""
    assert (_socket.LOOK_AFTER, _socket.PING_AFTER, _socket.CLOSE_AFTER) == (0.005, 30.0, 60.0)
