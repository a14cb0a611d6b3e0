"""`WSGIRateLimit`: rate limits in front of a WSGI application."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from redishacks.ratelimit import Decision, RateLimiter
from redishacks.ratelimit._core import AWAY
from redishacks.web._http import KeyFunction, Middleware, answer
from redishacks.web.keys import by_address

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment


class WSGIRateLimit(Middleware["WSGIApplication", RateLimiter]):
    """Asks a `RateLimiter` before a WSGI application is called: one round trip per request.

    `key` says by what requests are limited, by default the client's address (`by_address()`).
    `routes` has other limiters for parts of the site, or None for parts without a limit: a mapping
    of beginnings of paths, in whole segments, the longest that fits; or a function that returns the
    limiter of an environ. A request meets one limiter only.

    `legacy=True` adds the `X-RateLimit-*` fields. `on_limited(environ, decision)` is called for
    each refusal; it may return a WSGI application, such as a response object, that answers in place
    of the usual problem document.

    A refusal is answered with 429; with 503 when Redis is away and the limiter's `on_error` is
    "deny", "local" or "raise". Raises `UsageError` for an `AsyncRateLimiter`; when called, for a
    request without an address under the default key.
    """

    def __init__(
        self,
        app: WSGIApplication,
        limiter: RateLimiter,
        *,
        key: KeyFunction | None = None,
        routes: Mapping[str, RateLimiter | None]
        | Callable[[WSGIEnvironment], RateLimiter | None]
        | None = None,
        legacy: bool = False,
        on_limited: Callable[[WSGIEnvironment, Decision], WSGIApplication | None] | None = None,
    ) -> None:
        key = by_address() if key is None else key
        super().__init__(app, limiter, key, routes, legacy, on_limited, RateLimiter)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, or have the application do so."""
        question = self.question(environ)
        if question is None:
            return self.app(environ, start_response)
        limiter, key = question
        try:
            decision = limiter.hit(key)
        except AWAY as error:
            decision = self.away(error)
        start = _adding(self.fields(decision), start_response)
        if decision.allowed:
            return self.app(environ, start)
        refusal = self.refusal(environ, decision)
        if refusal is not None:
            return refusal(environ, start)
        status, reason, fields, body = answer(decision)
        start(f"{status} {reason}", list(fields.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _adding(fields: Mapping[str, str], start_response: StartResponse) -> StartResponse:
    """Return a `start_response` that adds fields."""

    def start(
        status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        return start_response(status, [*headers, *fields.items()], exc_info)

    return start
