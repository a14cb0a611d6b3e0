"""Rate limits in front of real applications, on real servers, called by a real client."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import flask
import http_sf
import httpx
import pytest
import starlette.responses
import websockets.sync.client
from websockets.exceptions import InvalidStatus

from redishacks.errors import UsageError
from redishacks.ratelimit import AsyncRateLimiter, Ban, Decision, Limit, RateLimiter
from redishacks.testing import Server, valkey_server
from redishacks.web import ASGIRateLimit, WSGIRateLimit, by_address, by_header, by_user
from tests.helpers import eventually
from tests.web_apps import ASGI, WSGI, asgi_server, site, wsgi_server

pytestmark = pytest.mark.slow

PROBLEMS = "https://iana.org/assignments/http-problem-types#"


@pytest.fixture(params=[*WSGI, *ASGI])
def kind(request: pytest.FixtureRequest) -> str:
    """Run a behaviour in every kind of application."""
    return str(request.param)


@pytest.fixture(params=["flask", "fastapi"])
def either(request: pytest.FixtureRequest) -> str:
    """Run a behaviour in one kind of application of either interface."""
    return str(request.param)


@pytest.fixture
def url(valkey: Server) -> str:
    """The session's server."""
    return valkey.url


def fields(response: httpx.Response) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `RateLimit-Policy` and `RateLimit`, read by somebody else's parser."""
    found = []
    for name in ("ratelimit-policy", "ratelimit"):
        items: Any = http_sf.parse(response.headers[name].encode(), tltype="list")
        assert all(type(item) is str for item, _ in items)  # a String, not a Token
        assert all(type(value) is int for _, values in items for value in values.values())
        found.append(dict(items))
    return found[0], found[1]


# What a client sees


def test_what_a_client_sees(kind: str, url: str, prefix: str) -> None:
    """The limit passes with its figures in structured fields; then 429 with a problem."""
    with site(kind, url, prefix, Limit(3, 60, name="burst"), Limit(9, 3600)) as served:
        for remaining in (2, 1, 0):
            passed = served.get("/a")
            assert (passed.status_code, passed.text) == (200, "hello /a")
            policies, states = fields(passed)
            assert policies == {"burst": {"q": 3, "w": 60}, "9/3600s": {"q": 9, "w": 3600}}
            assert states["burst"]["r"] == remaining
            assert 0 < states["burst"]["t"] <= 63 < states["9/3600s"]["t"] <= 3721
            assert "retry-after" not in passed.headers
        refused = served.get("/a")
        exact = served.limiter.peek("127.0.0.1")
    assert refused.status_code == 429
    assert refused.reason_phrase == "Too Many Requests"
    policies, states = fields(refused)
    assert (states["burst"]["r"], states["9/3600s"]["r"]) == (0, 6)
    wait = int(refused.headers["retry-after"])
    assert exact.retry_after is not None
    assert math.ceil(exact.retry_after) <= wait <= exact.retry_after + 10
    assert states["burst"]["t"] == wait
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json() == {
        "type": PROBLEMS + "quota-exceeded",
        "title": "Too many requests",
        "status": 429,
        "violated-policies": ["burst"],
        "detail": f"Come again in {wait} seconds.",
    }


def test_what_is_no_get(kind: str, url: str, prefix: str) -> None:
    """OPTIONS is never limited; HEAD gets no body; a connection outlives a body that is refused."""
    with site(kind, url, prefix, Limit(1, 60), legacy=True) as served, served.client() as client:
        for _ in range(3):
            assert "ratelimit" not in client.options("/").headers
        assert client.get("/").status_code == 200
        head = client.head("/")
        assert (head.status_code, head.content) == (429, b"")
        assert client.post("/", content=b"x" * 300_000).status_code == 429
        last = client.get("/")
        assert (last.status_code, last.json()["status"]) == (429, 429)
        assert last.headers["x-ratelimit-limit"] == "1"
        assert last.headers["x-ratelimit-remaining"] == "0"
        assert 0 < int(last.headers["x-ratelimit-reset"]) <= 63


@pytest.mark.parametrize(("one", "other"), [("flask", "flask"), ("fastapi", "django-asgi")])
def test_exactly_the_limit_passes(url: str, prefix: str, one: str, other: str) -> None:
    """Of 160 requests at the same time to two servers, exactly the limit of 40 pass."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                stack.enter_context(site(kind, url, prefix, Limit(40, 600))).client()
            )
            for kind in (one, other)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(16))
        answers = list(pool.map(lambda n: clients[n % 2].get("/").status_code, range(160)))
    assert sorted(answers) == [200] * 40 + [429] * 120


def test_bans_and_lists(either: str, url: str, prefix: str) -> None:
    """Who is banned has shown abnormal usage; who is on a list may come never, or always."""
    limiting = {
        "ban": Ban(2, 60, lasting=100),
        "deny_cache": False,
        "deny": ["10.6.6.6"],
        "allow": ["2001:db8::/32"],
    }
    key = by_address(trusted=1)
    with site(either, url, prefix, Limit(1, 60), limiting=limiting, key=key) as served:
        answers = [served.get() for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 429, 429, 429]
        assert answers[1].json()["type"] == PROBLEMS + "quota-exceeded"
        assert answers[3].json()["type"] == PROBLEMS + "abnormal-usage-detected"
        assert 90 < int(answers[3].headers["retry-after"]) <= 100
        assert "1/60s" in fields(answers[3])[0]
        denied = served.get(x_forwarded_for="10.6.6.6")
        assert denied.status_code == 429
        assert not {"retry-after", "ratelimit"} & set(denied.headers)
        friends = [served.get(x_forwarded_for="2001:db8::5") for _ in range(3)]
        assert [friend.status_code for friend in friends] == [200] * 3


# By what


def test_forwarded_for_is_not_believed(either: str, url: str, prefix: str) -> None:
    """Without trusted proxies nothing that a client writes into a field buys more."""
    with site(either, url, prefix, Limit(2, 60)) as served:
        answers = [served.get(x_forwarded_for=f"10.0.0.{n}").status_code for n in range(4)]
    assert answers == [200, 200, 429, 429]


@pytest.mark.parametrize("trusted", [2, ["127.0.0.0/8", "10.0.0.0/8"]])
def test_trusted_proxies(either: str, url: str, prefix: str, trusted: Any) -> None:
    """Past the trusted proxies stands the client; what it wrote itself stands further left."""
    with site(either, url, prefix, Limit(2, 60), key=by_address(trusted=trusted)) as served:

        def ask(client: str, spoofed: str) -> int:
            return served.get(x_forwarded_for=f"{spoofed}, {client}, 10.0.0.1").status_code

        assert [ask("9.9.9.9", f"8.8.8.{n}") for n in range(3)] == [200, 200, 429]
        assert ask("9.9.9.8", "9.9.9.9") == 200
        assert served.limiter.peek("9.9.9.9").remaining == 0


def test_several_fields_of_a_name(either: str, url: str, prefix: str) -> None:
    """A proxy may add a field of its own: they count as one, in their order."""
    key = by_address(trusted=1)
    with (
        site(either, url, prefix, Limit(2, 60), key=key) as served,
        served.client() as client,
    ):
        both = [("X-Forwarded-For", "8.8.8.8"), ("X-Forwarded-For", "9.9.9.9")]
        client.get("/", headers=both)
        assert served.limiter.peek("9.9.9.9").remaining == 1


def test_a_64_is_one_client(either: str, url: str, prefix: str) -> None:
    """All addresses of an IPv6 /64 share a limit; an IPv4-mapped one is the IPv4 address."""
    with site(either, url, prefix, Limit(2, 60), key=by_address(trusted=1)) as served:

        def ask(client: str) -> int:
            return served.get(x_forwarded_for=client).status_code

        assert [ask(f"2001:db8:0:1:{n}::{n}") for n in range(1, 4)] == [200, 200, 429]
        assert ask("2001:db8:0:2::1") == 200
        assert [ask("1.2.3.4"), ask("::ffff:1.2.3.4"), ask("::ffff:102:304")] == [200, 200, 429]


def request(peer: str | None, forwarded: str | None = None, **more: Any) -> list[dict[str, Any]]:
    """Return the same request as an environ and as a scope."""
    environ: dict[str, Any] = {"wsgi.version": (1, 0), "REMOTE_ADDR": peer or "", **more}
    scope: dict[str, Any] = {"type": "http", "headers": [], **more}
    scope["client"] = None if peer is None else (peer, 1)
    if forwarded is not None:
        environ["HTTP_X_FORWARDED_FOR"] = forwarded
        scope["headers"] = [(b"x-forwarded-for", forwarded.encode())]
    return [environ, scope]


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ((), "1.2.3.4", "5.6.7.8", "1.2.3.4"),
        ((), "2001:db8:1:2:3:4:5:6", None, "2001:db8:1:2::"),
        ((), "fe80::1%eth0", None, "fe80::"),
        ((), "::ffff:1.2.3.4", None, "1.2.3.4"),
        (0, "1.2.3.4", "5.6.7.8", "1.2.3.4"),
        (1, "10.0.0.1", "5.6.7.8", "5.6.7.8"),
        (1, "10.0.0.1", "6.6.6.6,5.6.7.8", "5.6.7.8"),
        (1, "10.0.0.1", None, "10.0.0.1"),
        (1, None, "5.6.7.8", "5.6.7.8"),
        (2, "10.0.0.1", "5.6.7.8", "5.6.7.8"),
        (2, "10.0.0.1", "6.6.6.6, 5.6.7.8 ,10.0.0.2", "5.6.7.8"),
        (2, "10.0.0.1", "5.6.7.8, unknown", "10.0.0.1"),
        (1, "10.0.0.1", "5.6.7.8:4711", "5.6.7.8"),
        (1, "10.0.0.1", "[2001:db8::1]:4711", "2001:db8::"),
        (1, "10.0.0.1", "[2001:db8::1]", "2001:db8::"),
        (1, "10.0.0.1", "_hidden", "10.0.0.1"),
        (1, "10.0.0.1", "", "10.0.0.1"),
        (1, "10.0.0.1", "5.6.7.8,", "10.0.0.1"),
        (["10.0.0.0/8"], "1.2.3.4", "5.6.7.8", "1.2.3.4"),
        (["10.0.0.0/8"], "10.0.0.1", "6.6.6.6, 5.6.7.8", "5.6.7.8"),
        (["10.0.0.0/8"], "::ffff:10.0.0.1", "5.6.7.8, ::ffff:10.0.0.2", "5.6.7.8"),
        (["10.0.0.0/8", "fd00::/8"], "fd00::1", "6.6.6.6, 5.6.7.8, 10.9.9.9", "5.6.7.8"),
        (["10.0.0.1"], "10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.2"),
        (["10.0.0.0/8"], "10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        (["10.0.0.0/8"], "10.0.0.1", "6.6.6.6, what, 10.0.0.2", "10.0.0.2"),
    ],
)
def test_whose_address_it_is(trusted: Any, peer: Any, forwarded: Any, client: str) -> None:
    """The client is the first one from the right that no trusted proxy is."""
    for each in request(peer, forwarded):
        assert by_address(trusted=trusted)(each) == client


@pytest.mark.parametrize("trusted", [(), ["10.0.0.0/8"], 1])
@pytest.mark.parametrize("peer", [None, "localhost", "testclient"])
def test_nobody_has_no_address(trusted: Any, peer: str | None) -> None:
    """All clients behind a unix socket would share one limit: an error says what to do."""
    for each in request(peer):
        with pytest.raises(UsageError, match=r"the client has no address.*trusted=1.*key="):
            by_address(trusted=trusted)(each)


@pytest.mark.parametrize("either", ["wsgi", "asgi"])
def test_a_unix_socket(either: str, url: str, prefix: str, tmp_path: Path) -> None:
    """Behind a unix socket the field that the proxy has set tells the client."""
    path = tmp_path / "site.sock"
    with ExitStack() as stack:
        if either == "wsgi":
            limiter = RateLimiter(url, "web", Limit(2, 60), prefix=prefix, deadline=5)
            stack.callback(limiter.close)
            limited = WSGIRateLimit(_hello, limiter, key=by_address(trusted=1))
            stack.enter_context(wsgi_server(limited, path))
        else:
            waiting = AsyncRateLimiter(url, "web", Limit(2, 60), prefix=prefix, deadline=5)
            key = by_address(trusted=1)
            stack.enter_context(asgi_server(ASGIRateLimit(_ahello, waiting, key=key), path))
        transport = httpx.HTTPTransport(uds=str(path))
        client = stack.enter_context(httpx.Client(transport=transport, base_url="http://site"))

        def ask(address: str) -> int:
            return client.get("/", headers={"X-Forwarded-For": address}).status_code

        assert [ask("1.1.1.1"), ask("1.1.1.1"), ask("1.1.1.1"), ask("1.1.1.2")] == [
            200, 200, 429, 200,
        ]  # fmt: skip


def test_by_header(either: str, url: str, prefix: str) -> None:
    """Each value has its limit and is a digest in Redis; without the field the address counts."""
    key = by_header("X-Api-Key")
    with site(either, url, prefix, Limit(2, 60), key=key) as served:
        for value in ("s3cret", "127.0.0.1", "x" * 5_000, "\xff"):
            with served.client() as client:
                raw = {b"x-api-key": value.encode("latin-1")}
                answers = [client.get("/", headers=raw).status_code for _ in range(3)]
            assert answers == [200, 200, 429]
            assert served.limiter.peek(key.of(value)).remaining == 0
        assert [served.get(x_api_key=""), served.get(), served.get()][2].status_code == 429
    assert "s3cret" not in key.of("s3cret")


def test_by_user_and_parts(either: str, url: str, prefix: str) -> None:
    """Users and addresses that look alike are apart; a mapping is limited in all its parts."""

    def user(request: Any) -> Any:
        if "wsgi.version" in request:
            return request.get("HTTP_X_USER")
        return dict(request["headers"]).get(b"x-user", b"").decode()

    with site(either, url, prefix, Limit(1, 60), key=by_user(user)) as served:
        answers = [served.get(x_user=name) for name in ("127.0.0.1", "u2", "u2")]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert served.get().status_code == 200
        assert served.limiter.peek("user:u2").remaining == 0

    address = by_address()

    def parts(request: Any) -> Any:
        who = user(request)
        return None if who == "root" else {"ip": address(request), "user": who}

    limits = Limit(3, 60, name="ip"), Limit(1, 60, name="user")
    limiting = {"tag": "name"}
    with site(either, url, prefix + "p", *limits, limiting=limiting, key=parts) as served:
        answers = [served.get(x_user=name) for name in ("u1", "u1", "u2", "u3", "u4", "root")]
    assert [answer.status_code for answer in answers] == [200, 429, 200, 200, 429, 200]
    violated = [answer.json()["violated-policies"] for answer in (answers[1], answers[4])]
    assert violated == [["user"], ["ip"]]
    assert "ratelimit" not in answers[5].headers


# Which limit


def test_routes(either: str, url: str, prefix: str) -> None:
    """The longest beginning in whole segments says which limit, or none; paths are decoded."""
    colour = RateLimiter if either == "flask" else AsyncRateLimiter
    named = {
        name: colour(url, name, Limit(100, 60, name=name), prefix=prefix, deadline=5)
        for name in ("login", "deep", "umlaut")
    }
    routes = {
        "/login": named["login"],
        "/login/deep/": named["deep"],
        "/static/": None,
        "/ä b": named["umlaut"],
    }
    expected = {
        "/": "all",
        "/login": "login",
        "/login/": "login",
        "/login/x": "login",
        "/login/deep": "deep",
        "/login/deep/x": "deep",
        "/login/deeper": "login",
        "/loginx": "all",
        "/log%69n": "login",
        "/static": None,
        "/static/x.css": None,
        "/%C3%A4%20b/c": "umlaut",
        "/%FF": "all",
    }
    with site(either, url, prefix, Limit(100, 60, name="all"), routes=routes) as served:
        for path, name in expected.items():
            answer = served.get(path)
            assert answer.status_code == 200
            assert ("ratelimit" in answer.headers) == (name is not None), path
            if name is not None:
                assert list(fields(answer)[0]) == [name], path


def test_routes_by_a_function(url: str, prefix: str) -> None:
    """A function of the request may choose the limiter, such as one for writers."""
    readers = RateLimiter(url, "r", Limit(5, 60), prefix=prefix)
    writers = RateLimiter(url, "w", Limit(1, 60), prefix=prefix)
    choose: dict[str, Any] = {"GET": readers, "POST": writers, "TRACE": None, "PUT": "no limiter"}
    limited = WSGIRateLimit(_hello, readers, routes=lambda e: choose[e["REQUEST_METHOD"]])
    told = [called(limited, REQUEST_METHOD=method)[0] for method in ("GET", "POST", "POST")]
    assert told == ["200 OK", "200 OK", "429 Too Many Requests"]
    assert "RateLimit" not in called(limited, REQUEST_METHOD="TRACE")[1]
    with pytest.raises(UsageError, match="WSGIRateLimit works with RateLimiter, not 'no limiter'"):
        called(limited, REQUEST_METHOD="PUT")


def test_a_mounted_application(url: str, prefix: str) -> None:
    """Routes are of the whole path, wherever the application is mounted."""
    limiter = RateLimiter(url, "web", Limit(1, 60), prefix=prefix)
    limited = WSGIRateLimit(_hello, limiter, routes={"/": None, "/shop/buy": limiter})
    assert "RateLimit" not in called(limited, SCRIPT_NAME="", PATH_INFO="/buy")[1]
    assert "RateLimit" in called(limited, SCRIPT_NAME="/shop", PATH_INFO="/buy")[1]


# Refusals


def test_an_answer_of_ones_own(either: str, url: str, prefix: str) -> None:
    """A refusal calls a function, which may answer by a response object; the fields are added."""
    told: list[tuple[str, Decision]] = []

    def on_limited(request: Any, decision: Decision) -> Any:
        told.append((request.get("PATH_INFO") or request["path"], decision))
        if len(told) == 1:
            return None
        if either == "flask":
            return flask.Response("slow down", 420)
        return starlette.responses.PlainTextResponse("slow down", 420)

    with site(either, url, prefix, Limit(1, 60), on_limited=on_limited) as served:
        answers = [served.get("/p") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 429, 420]
    assert answers[2].text == "slow down"
    assert int(answers[2].headers["retry-after"]) > 0
    assert fields(answers[2])[1]["1/60s"]["r"] == 0
    assert [(path, decision.allowed) for path, decision in told] == [("/p", False)] * 2


def test_a_user_with_a_very_long_name(url: str, prefix: str) -> None:
    """Who sends a name that no key can hold is limited like anybody."""
    limiter = RateLimiter(url, "web", Limit(1, 60), prefix=prefix)
    name = by_user(lambda request: request["user"])
    for user in ("é" * 5_000, "x" * 2_044, "\udcff" * 3_000):
        key = name({"user": user})
        assert key is not None
        assert [limiter.hit(key).allowed for _ in range(2)] == [True, False]
    assert name({"user": "u" * 5_000}) != name({"user": "u" * 5_001})
    assert name({"user": "short"}) == "user:short"


def test_refusals_without_redis_are_logged_now_and_then(
    caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    """A flood of requests is no flood of warnings."""
    limiter = RateLimiter("redis://127.0.0.1:1", "web", Limit(1, 60), prefix=prefix)
    app = WSGIRateLimit(_hello, limiter)
    for _ in range(50):
        status, _, _ = called(app, REMOTE_ADDR="10.0.0.1")
        assert status.startswith("503")
    told = [record for record in caplog.records if "rate limits are unknown" in record.message]
    assert len(told) == 1


@pytest.mark.parametrize("on_error", ["deny", "raise", "allow", "local"])
def test_without_redis(either: str, prefix: str, on_error: str) -> None:
    """Redis is away: 503 and come again soon, or let pass without figures; later all is as ever."""
    limiting = {"on_error": on_error, "deadline": 0.2, "local_share": 0.5, "deny_cache": False}
    with (
        valkey_server() as server,
        site(either, server.url, prefix, Limit(4, 60), limiting=limiting) as served,
    ):
        server.kill()
        answers = [served.get() for _ in range(5)]
        server.restart()
        back = eventually(lambda: _counted(served.get()), within=20)
    codes = [answer.status_code for answer in answers]
    if on_error == "local":
        assert codes[0] == 200
        assert codes[4] == 503
        assert fields(answers[0])[1]["4/60s"]["r"] < 4
    else:
        assert codes == [200 if on_error == "allow" else 503] * 5
        assert all("ratelimit" not in answer.headers for answer in answers)
    if on_error != "allow":
        assert answers[4].json()["type"] == PROBLEMS + "temporary-reduced-capacity"
        assert int(answers[4].headers["retry-after"]) >= 1
        assert answers[4].reason_phrase == "Service Unavailable"
    assert fields(back)[1]["4/60s"]["r"] == 3


def _counted(answer: httpx.Response) -> httpx.Response | None:
    """Return what was allowed by somebody who had counted."""
    return answer if answer.status_code == 200 and "ratelimit" in answer.headers else None


# WebSockets


def _websocket(address: str, **options: Any) -> Any:
    return websockets.sync.client.connect(
        address.replace("http://", "ws://") + "/echo", proxy=None, **options
    )


def test_a_websocket_is_limited_when_it_connects(url: str, prefix: str) -> None:
    """What passes works, for as long as it likes; what does not gets the usual answer."""
    with site("fastapi", url, prefix, Limit(2, 60)) as served:
        for remaining in (1, 0):
            with _websocket(served.url) as socket:
                socket.send("hello")
                assert socket.recv() == "you said hello"
                headers = socket.response.headers
                assert headers["x-own"] == "1"
                assert headers["RateLimit"].startswith(f'"2/60s";r={remaining};t=')
        with pytest.raises(InvalidStatus) as refused, _websocket(served.url):
            pass
        response = refused.value.response
        assert response.status_code == 429
        assert response.headers["Content-Type"] == "application/problem+json"
        assert int(response.headers["Retry-After"]) > 0
        assert b"quota-exceeded" in response.body
        assert served.get().status_code == 429


def test_a_websocket_on_a_plain_server(url: str, prefix: str) -> None:
    """A server that cannot answer by a response closes the connection before it was accepted."""
    told: list[Decision] = []

    def on_limited(scope: Any, decision: Decision) -> Any:
        told.append(decision)
        return starlette.responses.PlainTextResponse("never seen")

    async def main() -> list[Any]:
        limiter = AsyncRateLimiter(url, "web", Limit(0, 60), prefix=prefix)
        app = ASGIRateLimit(_ahello, limiter, on_limited=on_limited)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        for first in ("websocket.connect", "websocket.disconnect"):

            async def receive(kind: str = first) -> Any:
                return {"type": kind}

            scope = {"type": "websocket", "path": "/", "client": ("1.2.3.4", 1), "headers": []}
            await app(scope, receive, send)
        return sent

    assert asyncio.run(main()) == [{"type": "websocket.close", "code": 1008}]
    assert len(told) == 2


def test_a_websocket_is_closed_on_a_real_server(url: str, prefix: str) -> None:
    """Such a close is a 403 to the client."""
    limiter = AsyncRateLimiter(url, "web", Limit(0, 60), prefix=prefix)
    limited = ASGIRateLimit(_ahello, limiter)

    async def without_extensions(scope: Any, receive: Any, send: Any) -> None:
        await limited({**scope, "extensions": None}, receive, send)

    with (
        asgi_server(without_extensions) as address,
        pytest.raises(InvalidStatus) as refused,
        _websocket(address),
    ):
        pass
    assert refused.value.response.status_code == 403


# What passes is not touched


def _hello(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-Own", "1")])
    return [b"hello"]


async def _ahello(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        assert scope["type"] == "lifespan"
        raise NotImplementedError("no lifespan here")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": b"hello"})


def called(app: Any, **environ: Any) -> tuple[str, dict[str, str], bytes]:
    """Call a WSGI application; return status, fields and body."""
    environ.setdefault("REMOTE_ADDR", "1.2.3.4")
    setup_testing_defaults(environ)
    begun: list[Any] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        begun[:] = [status, headers]
        return lambda data: None

    body = app(environ, start_response)
    content = b"".join(body)
    if hasattr(body, "close"):
        body.close()
    return begun[0], dict(begun[1]), content


def test_the_standard_is_kept(url: str, prefix: str) -> None:
    """The standard library's checker finds no fault, before and behind the middleware."""
    limiter = RateLimiter(url, "web", Limit(1, 60), prefix=prefix, deadline=5)
    app = validator(WSGIRateLimit(validator(_hello), limiter))
    told = [
        called(app, REQUEST_METHOD=method, QUERY_STRING="") for method in ("GET", "GET", "HEAD")
    ]
    assert [status for status, _, _ in told] == ["200 OK", *["429 Too Many Requests"] * 2]
    assert told[0][1]["X-Own"] == "1"
    assert told[2][2] == b""


def test_a_refused_head_sends_no_body(url: str, prefix: str) -> None:
    """Servers drop the body of such a response, and some complain about it: there is none."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nobody reads the request")

    async def main() -> None:
        limited = ASGIRateLimit(_ahello, AsyncRateLimiter(url, "web", Limit(0, 60), prefix=prefix))
        for method in ("GET", "HEAD"):
            scope = {"type": "http", "method": method, "path": "/", "client": ("1.2.3.4", 1)}
            await limited(scope, receive, send)

    asyncio.run(main())
    get, body, head, nothing = sent
    assert get == head
    assert dict(get["headers"])[b"content-length"] == b"%d" % len(body["body"])
    assert nothing == {"type": "http.response.body", "body": b""}


class Rows:
    """A response's body that tells when it is closed."""

    def __init__(self, rows: Iterator[bytes]) -> None:
        self.closed = False
        self._rows = rows

    def __iter__(self) -> Iterator[bytes]:
        return self._rows

    def close(self) -> None:
        """Be closed."""
        self.closed = True


def test_a_wsgi_body_passes_untouched(url: str, prefix: str) -> None:
    """The application's own iterable goes to the server, which streams and closes it."""
    go_on = threading.Event()

    def rows() -> Iterator[bytes]:
        yield b"first"
        assert go_on.wait(30)
        yield b"second"

    body = Rows(rows())

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        write(b"written;")
        return body

    limiter = RateLimiter(url, "web", Limit(9, 60), prefix=prefix, deadline=5)
    limited = WSGIRateLimit(app, limiter)
    environ = {"REMOTE_ADDR": "1.2.3.4"}
    setup_testing_defaults(environ)
    assert limited(environ, lambda *args: lambda data: None) is body
    with wsgi_server(limited) as address, httpx.stream("GET", address, timeout=30) as answer:
        assert "ratelimit" in answer.headers
        read = answer.iter_raw()
        assert next(read).startswith(b"written;")
        go_on.set()
        assert b"".join(read).endswith(b"second")
    assert body.closed
    limiter.close()


def test_an_asgi_body_passes_untouched(url: str, prefix: str) -> None:
    """Messages of the application go out as they come, and its own are not changed."""
    go_on = threading.Event()
    start: Any = {"type": "http.response.start", "status": 201}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start)
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        assert await asyncio.to_thread(go_on.wait, 30)
        await send({"type": "http.response.body", "body": b"second"})

    limiter = AsyncRateLimiter(url, "web", Limit(9, 60), prefix=prefix, deadline=5)
    with (
        asgi_server(_lifeless(ASGIRateLimit(app, limiter))) as address,
        httpx.stream("GET", address, timeout=30) as answer,
    ):
        assert answer.status_code == 201
        assert "ratelimit" in answer.headers
        read = answer.iter_raw()
        assert next(read) == b"first"
        go_on.set()
        assert b"".join(read) == b"second"
    assert start == {"type": "http.response.start", "status": 201}


def _lifeless(app: Any) -> Any:
    """Return an application that knows no lifespan."""

    async def http_only(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await app(scope, receive, send)

    return http_only


def test_errors_of_the_application_pass(either: str, url: str, prefix: str) -> None:
    """What the application raises is for the server, or for what stands around it."""
    with site(either, url, prefix, Limit(2, 60)) as served:
        assert served.get("/boom").status_code == 500
        assert served.limiter.peek("127.0.0.1").remaining == 1

    def late(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        try:
            raise RuntimeError("late")
        except RuntimeError as error:
            start_response("500 Oh", [], (RuntimeError, error, None))
        raise KeyError("own")

    limiter = RateLimiter(url, "late", Limit(2, 60), prefix=prefix, deadline=5)
    begun: list[Any] = []
    environ = {"REMOTE_ADDR": "1.2.3.4"}
    setup_testing_defaults(environ)
    remember: Any = lambda *args: begun.append(args)  # noqa: E731
    with pytest.raises(KeyError, match="own"):
        WSGIRateLimit(late, limiter)(environ, remember)
    assert begun[0][2] is None
    assert begun[1][0] == "500 Oh"
    assert begun[1][2][0] is RuntimeError
    assert all("RateLimit" in dict(args[1]) for args in begun)


def test_lifespan_passes(url: str, prefix: str) -> None:
    """What is neither request nor WebSocket goes to the application as it is."""
    seen: list[Any] = []

    async def app(*args: Any) -> None:
        seen.append(args)

    async def main() -> None:
        limited = ASGIRateLimit(app, AsyncRateLimiter(url, "web", Limit(0, 60), prefix=prefix))
        await limited({"type": "lifespan"}, "receive", "send")  # type: ignore[arg-type]

    asyncio.run(main())
    assert seen == [({"type": "lifespan"}, "receive", "send")]


# Mistakes


def test_the_wrong_colour(url: str) -> None:
    """A limiter of the other colour is told when the application is made."""
    sync, waiting = RateLimiter(url, "web", Limit(1, 1)), AsyncRateLimiter(url, "web", Limit(1, 1))
    loose: Any = WSGIRateLimit
    with pytest.raises(UsageError, match="WSGIRateLimit works with RateLimiter, not <AsyncRate"):
        loose(_hello, waiting)
    with pytest.raises(UsageError, match="WSGIRateLimit works with RateLimiter, not <AsyncRate"):
        loose(_hello, sync, routes={"/a": waiting})
    loose = ASGIRateLimit
    with pytest.raises(UsageError, match="ASGIRateLimit works with AsyncRateLimiter, not <RateLim"):
        loose(_ahello, sync)
    with pytest.raises(UsageError, match="works with AsyncRateLimiter, not None"):
        loose(_ahello, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "ip"}, "key is a function of the request, not 'ip'"),
        ({"key": _ahello}, "key is a plain function, not async"),
        ({"on_limited": 429}, "on_limited is a function"),
        ({"routes": "/login"}, "routes is a function of the request, not '/login'"),
        ({"routes": {"login": None}}, "the beginning of a path such as \"/a\", not 'login'"),
        ({"routes": {"/a": None, "/a/": None}}, "two routes for /a"),
    ],
)
def test_bad_options(url: str, options: dict[str, Any], message: str) -> None:
    """Options that cannot work are told when the application is made."""
    loose: Any = WSGIRateLimit
    with pytest.raises(UsageError, match=message):
        loose(_hello, RateLimiter(url, "web", Limit(1, 1)), **options)


@pytest.mark.parametrize(
    "trusted", ["10.0.0.0/8", -1, True, None, 1.5, b"x", ["10.0.0.0/99"], ["x"], [1]]
)
def test_bad_proxies(trusted: Any) -> None:
    """Proxies are a number, or a list of networks."""
    with pytest.raises(UsageError, match=r"trusted (is how many|network is text)"):
        by_address(trusted=trusted)


@pytest.mark.parametrize("name", ["", "ä", None])
def test_bad_header_names(name: Any) -> None:
    """A field's name is ASCII text."""
    with pytest.raises(UsageError, match="a header's name is ASCII text"):
        by_header(name)
