"""What WSGI and ASGI share: what a request says, which limiter it meets, what a refusal answers."""

from __future__ import annotations

import inspect
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from redishacks.errors import UsageError
from redishacks.ratelimit import Ban, Decision
from redishacks.ratelimit._core import AnyLimiter, Keys

#: A WSGI environ or an ASGI scope.
Request = Mapping[str, Any]
#: Which key a request counts for; None: it is not limited.
KeyFunction = Callable[[Any], Keys | None]

App = TypeVar("App", bound=Callable[..., Any])
Either = TypeVar("Either", bound=AnyLimiter)

#: Seconds after which to come again then; the limiter probes as often.
_AWAY_FOR = 1.0

_PROBLEMS = "https://iana.org/assignments/http-problem-types#"

_log = logging.getLogger("redishacks")


# Requests


def header(request: Request, name: str) -> str | None:
    """Return a field of a request, several of a name joined by commas; None without any."""
    if _is_wsgi(request):
        value: str | None = request.get("HTTP_" + name.upper().replace("-", "_"))
        return value
    wanted = name.lower().encode("latin-1")
    found = [value for field, value in request.get("headers", ()) if field == wanted]
    return b",".join(found).decode("latin-1") if found else None


def peer(request: Request) -> str | None:
    """Return what the server calls the other end of the connection; None for a unix socket."""
    if _is_wsgi(request):
        return request.get("REMOTE_ADDR") or None
    client = request.get("client")
    return client[0] if client else None


def path(request: Request) -> str:
    """Return the whole path, decoded, wherever the application is mounted."""
    if not _is_wsgi(request):
        return str(request["path"])
    # PEP 3333 has the path's bytes as if they were latin-1.
    raw: str = request.get("SCRIPT_NAME", "") + request.get("PATH_INFO", "")
    return raw.encode("latin-1", "replace").decode("utf-8", "replace")


def method(request: Request) -> str | None:
    """Return the request's method; a WebSocket has none."""
    found: str | None = request.get("REQUEST_METHOD" if _is_wsgi(request) else "method")
    return found


def _is_wsgi(request: Request) -> bool:
    return "wsgi.version" in request


# Whom to ask


class Middleware(Generic[App, Either]):
    """An application, and who limits which of its requests by which key."""

    def __init__(
        self,
        app: App,
        limiter: Either,
        key: KeyFunction,
        routes: Mapping[str, Either | None] | Callable[[Any], Either | None] | None,
        legacy: bool,
        on_limited: Callable[[Any, Decision], App | None] | None,
        colour: type[Either],
    ) -> None:
        self.app = app
        self._colour = colour
        self._limiter = self._checked(limiter)
        _check_function(key, "key")
        if on_limited is not None:
            _check_function(on_limited, "on_limited")
        self._key = key
        self._route: Callable[[Any], Either | None] | None = None
        self._prefixes: list[tuple[str, Either | None]] = []
        self._told = -math.inf
        if isinstance(routes, Mapping):
            self._prefixes = self._sorted(routes)
        elif routes is not None:
            _check_function(routes, "routes")
            self._route = routes
        self._legacy = legacy
        self._on_limited = on_limited

    def question(self, request: Request) -> tuple[Either, Keys] | None:
        """Return whom to ask by which key; None for what is not limited."""
        if method(request) == "OPTIONS":
            return None
        limiter = self._limiter_of(request)
        if limiter is None:
            return None
        key = self._key(request)
        return None if key is None else (limiter, key)

    def fields(self, decision: Decision) -> dict[str, str]:
        """Return the fields that a decision adds to the response."""
        fields = decision.headers(legacy=self._legacy)
        if decision.degraded and decision.source == "none":
            # Nobody has counted: there is no such thing as what remains.
            return {name: text for name, text in fields.items() if name not in _COUNTED}
        return fields

    def refusal(self, request: Request, decision: Decision) -> App | None:
        """Return the application that answers a refusal; None: the usual answer."""
        return None if self._on_limited is None else self._on_limited(request, decision)

    def away(self, error: Exception) -> Decision:
        """Return the decision when a limiter could only raise that Redis is away."""
        now = time.monotonic()
        if now >= self._told + _AWAY_FOR:
            self._told = now
            _log.warning("requests are refused since their rate limits are unknown: %s", error)
        return Decision(False, None, None, _AWAY_FOR, _AWAY_FOR, source="none", degraded=True)

    def _limiter_of(self, request: Request) -> Either | None:
        if self._route is not None:
            limiter = self._route(request)
            return None if limiter is None else self._checked(limiter)
        if self._prefixes:
            whole = path(request)
            for prefix, found in self._prefixes:
                if whole == prefix or whole.startswith(prefix + "/"):
                    return found
        return self._limiter

    def _sorted(self, routes: Mapping[str, Either | None]) -> list[tuple[str, Either | None]]:
        """Return prefixes of whole segments, the longest first."""
        found: dict[str, Either | None] = {}
        for prefix, limiter in routes.items():
            if not isinstance(prefix, str) or not prefix.startswith("/"):
                raise UsageError(f'a route is the beginning of a path such as "/a", not {prefix!r}')
            if prefix.rstrip("/") in found:
                raise UsageError(f"two routes for {prefix.rstrip('/') or '/'}: with and without /")
            found[prefix.rstrip("/")] = None if limiter is None else self._checked(limiter)
        return sorted(found.items(), key=lambda route: len(route[0]), reverse=True)

    def _checked(self, limiter: Either) -> Either:
        if not isinstance(limiter, self._colour):
            raise UsageError(
                f"{type(self).__name__} works with {self._colour.__name__}, not {limiter!r}"
            )
        return limiter


#: Fields that tell what was counted.
_COUNTED = {"RateLimit", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}


def _check_function(function: object, name: str) -> None:
    if not callable(function):
        raise UsageError(f"{name} is a function of the request, not {function!r}")
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"{name} is a plain function, not async: {function!r}")


# Refusals


class Answer(NamedTuple):
    """The usual answer to what is refused."""

    status: int
    reason: str
    fields: dict[str, str]
    body: bytes


def answer(decision: Decision) -> Answer:
    """Return a problem of RFC 9457, of a type of draft-ietf-httpapi-ratelimit-headers-10."""
    refused = [name for name, verdict in decision.policies.items() if not verdict.allowed]
    if decision.degraded:
        status, reason, kind = 503, "Service Unavailable", "temporary-reduced-capacity"
        title = "Fewer requests than usual are served for a while"
    elif any(isinstance(verdict.limit, Ban) for verdict in decision.refused_by):
        status, reason, kind = 429, "Too Many Requests", "abnormal-usage-detected"
        title = "Too many requests had to be refused"
    else:
        status, reason, kind = 429, "Too Many Requests", "quota-exceeded"
        title = "Too many requests"
    problem: dict[str, object] = {
        "type": _PROBLEMS + kind,
        "title": title,
        "status": status,
        "violated-policies": refused,
    }
    if decision.retry_after is not None:
        wait = max(1, math.ceil(decision.retry_after))
        problem["detail"] = f"Come again in {wait} second{'s' if wait > 1 else ''}."
    body = json.dumps(problem).encode()
    fields = {"Content-Type": "application/problem+json", "Content-Length": str(len(body))}
    return Answer(status, reason, fields, body)
