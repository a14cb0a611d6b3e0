"""Rate limits in front of a web application, WSGI or ASGI.

    limiter = RateLimiter("redis://…", "web", Limit(100, 60), on_error="allow")
    application = WSGIRateLimit(application, limiter)                         # Django
    app.wsgi_app = WSGIRateLimit(app.wsgi_app, limiter)                       # Flask
    app.add_middleware(ASGIRateLimit, limiter=AsyncRateLimiter(…))            # FastAPI, Starlette

    WSGIRateLimit(application, limiter, key=by_address(trusted=["10.0.0.0/8"]))  # behind proxies
    WSGIRateLimit(application, limiter, key=by_header("X-Api-Key"))
    WSGIRateLimit(application, limiter, routes={"/login": strict, "/static": None})

What is allowed passes with the fields `RateLimit` and `RateLimit-Policy`. What is refused gets 429,
or 503 when Redis is away, with `Retry-After` and an `application/problem+json` that names the
limits.

Trade-offs: the application is not asked first, so a key can only hold what stands in the request or
what an outer middleware has put there. Put whatever adds CORS fields outside of this one, else a
browser hides refusals from scripts. Preflight requests (OPTIONS) are not limited.
"""

from redishacks.web.asgi import ASGIRateLimit
from redishacks.web.keys import by_address, by_header, by_user
from redishacks.web.wsgi import WSGIRateLimit

__all__ = ["ASGIRateLimit", "WSGIRateLimit", "by_address", "by_header", "by_user"]
