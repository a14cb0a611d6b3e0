"""`ASGIRateLimit`: rate limits in front of an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from redishacks.ratelimit import AsyncRateLimiter, Decision
from redishacks.ratelimit._core import AWAY
from redishacks.web._http import KeyFunction, Middleware, answer
from redishacks.web.keys import by_address

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApplication = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The messages that begin a response, and carry its fields.
_STARTS = {"http.response.start", "websocket.accept", "websocket.http.response.start"}
#: The extension of servers that can refuse a WebSocket with any response.
_DENIAL = "websocket.http.response"
#: A WebSocket's close code for what a policy forbids.
_POLICY = 1008


class ASGIRateLimit(Middleware[ASGIApplication, AsyncRateLimiter]):
    """Asks an `AsyncRateLimiter` before an ASGI application is called: one round trip per request.

    `key`, `routes`, `legacy` and `on_limited` are those of `WSGIRateLimit`, with scopes for
    environs and ASGI applications for WSGI ones; all of them are plain functions.

    A WebSocket is limited when it connects: a refused one is answered like a request where the
    server can do that, else closed with 1008 before it was accepted, and what `on_limited` returns
    is not used. Raises `UsageError` for a `RateLimiter`; when called, for a request without an
    address under the default key.
    """

    def __init__(
        self,
        app: ASGIApplication,
        limiter: AsyncRateLimiter,
        *,
        key: KeyFunction | None = None,
        routes: Mapping[str, AsyncRateLimiter | None]
        | Callable[[Scope], AsyncRateLimiter | None]
        | None = None,
        legacy: bool = False,
        on_limited: Callable[[Scope, Decision], ASGIApplication | None] | None = None,
    ) -> None:
        key = by_address() if key is None else key
        super().__init__(app, limiter, key, routes, legacy, on_limited, AsyncRateLimiter)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have the application do so."""
        question = self.question(scope) if scope["type"] in ("http", "websocket") else None
        if question is None:
            return await self.app(scope, receive, send)
        limiter, key = question
        try:
            decision = await limiter.hit(key)
        except AWAY as error:
            decision = self.away(error)
        adding = _adding(self.fields(decision), send)
        if decision.allowed:
            return await self.app(scope, receive, adding)
        refusal = self.refusal(scope, decision)
        is_http = scope["type"] == "http"
        if not is_http and _DENIAL not in (scope.get("extensions") or {}):
            return await _close(receive, send)
        if refusal is not None:
            return await refusal(scope, receive, adding)
        status, _, fields, body = answer(decision)
        kind = "http.response" if is_http else _DENIAL
        start = {"type": f"{kind}.start", "status": status, "headers": _encoded(fields)}
        await adding(start)
        sent = b"" if scope.get("method") == "HEAD" else body
        return await send({"type": f"{kind}.body", "body": sent})


def _adding(fields: Mapping[str, str], send: Send) -> Send:
    """Return a `send` that adds fields to the beginning of a response."""
    added = _encoded(fields)

    async def adding(message: Message) -> None:
        if message["type"] in _STARTS:
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return adding


async def _close(receive: Receive, send: Send) -> None:
    """Refuse a WebSocket without a response of our own."""
    message = await receive()
    if message["type"] == "websocket.connect":
        await send({"type": "websocket.close", "code": _POLICY})


def _encoded(fields: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower().encode("latin-1"), text.encode("latin-1")) for name, text in fields.items()
    ]
