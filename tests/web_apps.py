"""Web applications behind rate limits, and the servers that serve them on a free port."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import django  # type: ignore[import-untyped]
import fastapi
import flask
import httpx
import uvicorn
import waitress  # type: ignore[import-untyped]
from django.conf import settings  # type: ignore[import-untyped]
from django.core.asgi import get_asgi_application  # type: ignore[import-untyped]
from django.core.wsgi import get_wsgi_application  # type: ignore[import-untyped]
from django.http import HttpResponse  # type: ignore[import-untyped]
from django.urls import path as django_path  # type: ignore[import-untyped]
from waitress import wasyncore

from redishacks.ratelimit import AsyncRateLimiter, Limit, RateLimiter
from redishacks.web import ASGIRateLimit, WSGIRateLimit
from tests.helpers import eventually

WSGI = ("flask", "django")
ASGI = ("django-asgi", "fastapi")


class Site(NamedTuple):
    """A site that is being served."""

    url: str
    #: The limiter's twin, for questions about its keys.
    limiter: RateLimiter

    def client(self, **options: Any) -> httpx.Client:
        """Return a client of this site alone."""
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def get(self, path: str = "/", **headers: str) -> httpx.Response:
        """Get a page over a connection of its own; underscores in field names mean hyphens."""
        with self.client() as client:
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            return client.get(path, headers=fields)


# Applications


def flask_app() -> flask.Flask:
    """Make a Flask application."""
    app = flask.Flask("site", static_folder=None)

    @app.route("/", methods=["GET", "POST"], defaults={"rest": ""})
    @app.route("/<path:rest>")
    def page(rest: str) -> str:
        if rest == "boom":
            raise RuntimeError("the application's own")
        return f"hello /{rest}"

    return app


def _django_page(request: Any, rest: str = "") -> Any:
    if rest == "boom":
        raise RuntimeError("the application's own")
    return HttpResponse(f"hello /{rest}")


urlpatterns = [django_path("", _django_page), django_path("<path:rest>", _django_page)]


def _django(make: Callable[[], Any]) -> Any:
    if not settings.configured:
        settings.configure(
            ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None
        )
        django.setup()
    return make()


def fastapi_app(limiter: AsyncRateLimiter | None = None) -> fastapi.FastAPI:
    """Make a FastAPI application, which closes the limiter at its end."""

    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        app.state.began = True
        yield
        if limiter is not None:
            await limiter.aclose()

    app = fastapi.FastAPI(lifespan=lifespan)

    @app.api_route("/", methods=["GET", "HEAD", "POST"])
    @app.get("/{rest:path}")
    async def page(rest: str = "") -> fastapi.Response:
        if rest == "boom":
            raise RuntimeError("the application's own")
        assert app.state.began
        return fastapi.Response(f"hello /{rest}")

    @app.websocket("/echo")
    async def echo(socket: fastapi.WebSocket) -> None:
        await socket.accept(headers=[(b"x-own", b"1")])
        await socket.send_text("you said " + await socket.receive_text())
        await socket.close()

    return app


@contextmanager
def site(
    kind: str, url: str, prefix: str, *limits: Limit, limiting: Any = None, **options: Any
) -> Iterator[Site]:
    """Serve an application of this kind behind a rate limit.

    `limiting` holds options of the limiter, `options` are the middleware's.
    """
    given: dict[str, Any] = {"prefix": prefix, "deadline": 5, **(limiting or {})}
    twin = RateLimiter(url, "web", *limits, **given)
    made: Any
    if kind in WSGI:
        limiter = RateLimiter(url, "web", *limits, **given)
        made = flask_app() if kind == "flask" else _django(get_wsgi_application)
        if kind == "flask":
            made.wsgi_app = WSGIRateLimit(made.wsgi_app, limiter, **options)
        else:
            made = WSGIRateLimit(made, limiter, **options)
        with wsgi_server(made) as address:
            yield Site(address, twin)
        limiter.close()
    else:
        waiting = AsyncRateLimiter(url, "web", *limits, **given)
        if kind == "fastapi":
            made = fastapi_app(waiting)
            made.add_middleware(ASGIRateLimit, limiter=waiting, **options)
        else:
            made = ASGIRateLimit(_django(get_asgi_application), waiting, **options)
        with asgi_server(made) as address:
            yield Site(address, twin)
    twin.close()


# Servers


@contextmanager
def wsgi_server(app: Any, unix_socket: Path | None = None) -> Iterator[str]:
    """Serve a WSGI application with waitress, in threads; the URL, without one for a socket."""
    where: dict[str, Any] = {"host": "127.0.0.1", "port": 0}
    if unix_socket is not None:
        where = {"unix_socket": str(unix_socket)}
    watched: dict[int, Any] = {}
    # By default it takes X-Forwarded-For away, spoofed or not.
    options = {"threads": 8, "clear_untrusted_proxy_headers": False}
    server = waitress.create_server(app, map=watched, **options, **where)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield "http://site" if unix_socket else f"http://127.0.0.1:{server.effective_port}"
    finally:
        # In the server's own thread: its loop ends when it watches nothing any more. Not by
        # pull_trigger(), which may write when a worker's pull has had the trigger closed already.
        with server.trigger.lock:
            server.trigger.thunks.append(lambda: wasyncore.close_all(watched, ignore_all=True))
            os.write(server.trigger.trigger, b"x")
        thread.join(30)
        server.task_dispatcher.shutdown()
        assert not thread.is_alive()


@contextmanager
def asgi_server(app: Any, unix_socket: Path | None = None) -> Iterator[str]:
    """Serve an ASGI application with uvicorn, in a thread; the URL, without one for a socket."""
    family = socket.AF_UNIX if unix_socket else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.bind(str(unix_socket) if unix_socket else ("127.0.0.1", 0))
        config = uvicorn.Config(
            app, log_config=None, proxy_headers=False, ws="websockets-sansio", loop="asyncio"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            eventually(lambda: server.started, within=30)
            port = None if unix_socket else listening.getsockname()[1]
            yield "http://site" if unix_socket else f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
