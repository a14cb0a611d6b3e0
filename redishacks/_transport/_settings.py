"""What a connection needs, read from a redis-py client or a URL."""

from __future__ import annotations

import dataclasses
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.connection
import redis.sentinel

from redishacks._transport._loss import Unreachable
from redishacks._transport._wire import Address, Words
from redishacks.errors import UsageError

#: redis-py 8 speaks RESP3 unless told otherwise, older ones RESP2.
DEFAULT_PROTOCOL = 3 if int(redis.__version__.split(".")[0]) >= 8 else 2

_KEEPALIVE = {
    getattr(socket, option): value
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, option)
}

_CERT_REQS = {
    None: ssl.CERT_NONE,
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}


class Greeting(Protocol):
    """What else a new connection says, and hears before it is used."""

    def words(self) -> tuple[int, Sequence[Words]]:
        """Return the version of the view that it tells, and how."""

    def check(self, version: int, replies: Sequence[Any]) -> None:
        """Look at the replies; raises `Refused`, or another error when the node is of no use."""


@dataclasses.dataclass(frozen=True, repr=False)
class Settings:
    """How to reach one server and what to tell it first. Its repr holds no secret."""

    host: str = "localhost"
    #: 0 for a unix socket, whose path is then in `host`.
    port: int = 6379
    db: int = 0
    username: str | None = None
    password: str | None = None
    #: redis-py's CredentialProvider, asked at every connect.
    credential_provider: Any = None
    protocol: int = DEFAULT_PROTOCOL
    client_name: str | None = None
    #: redis-py's `ssl_*` options by their names, or None for a plain connection.
    tls: Mapping[str, Any] | None = None
    keepalive_options: Mapping[int, int | bytes] = dataclasses.field(
        default_factory=_KEEPALIVE.copy
    )
    #: redis-py's Sentinel, asked for the address of `service` at every connect.
    sentinel: Any = None
    service: str | None = None
    #: Set for connection classes that are not redis-py's own: (class, keyword arguments).
    foreign: tuple[Any, Mapping[str, Any]] | None = None
    greeting: Greeting | None = None

    def __repr__(self) -> str:
        return f"<Settings {self.service or self.host}:{self.port}>"

    @property
    def address(self) -> Address:
        """Name the server, for messages and as a key."""
        return (self.service, -1) if self.service else (self.host, self.port)

    @property
    def round_trips(self) -> int:
        """How often a new connection waits for the server before its first command.

        A server that accepts and then is silent costs the command's deadline for each.
        """
        return 1 if self.tls is None else 3

    def at(self, address: Address) -> Settings:
        """Return the same settings for another server."""
        host, port = address
        return dataclasses.replace(self, host=host, port=port, sentinel=None, service=None)

    def credentials(self) -> Sequence[str]:
        """Return (), (password,) or (user, password), fresh from the provider if there is one."""
        if self.credential_provider is None:
            return self._fixed_credentials()
        try:
            found: Sequence[str] = self.credential_provider.get_credentials()
        except Exception as error:
            raise _no_credentials(error) from error
        return found

    async def credentials_async(self) -> Sequence[str]:
        """The same for asyncio."""
        if self.credential_provider is None:
            return self._fixed_credentials()
        try:
            found: Sequence[str] = await self.credential_provider.get_credentials_async()
        except Exception as error:
            raise _no_credentials(error) from error
        return found

    def _fixed_credentials(self) -> Sequence[str]:
        if self.username:
            return (self.username, self.password or "")
        return (self.password,) if self.password else ()

    def tls_context(self) -> ssl.SSLContext:
        """Build the context anew, so that renewed certificate files count at the next connect."""
        try:
            return _tls_context(self.tls or {})
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise Unreachable(f"the client's TLS settings: {why}") from error


_PLAIN = {redis.Connection, redis.asyncio.Connection}
_TLS = {redis.SSLConnection, redis.asyncio.SSLConnection}
_UNIX = {redis.UnixDomainSocketConnection, redis.asyncio.UnixDomainSocketConnection}
_SENTINEL = {
    redis.sentinel.SentinelManagedConnection,
    redis.asyncio.sentinel.SentinelManagedConnection,
}
_SENTINEL_TLS = {
    redis.sentinel.SentinelManagedSSLConnection,
    redis.asyncio.sentinel.SentinelManagedSSLConnection,
}


def _tls_context(options: Mapping[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    needs = options.get("ssl_cert_reqs", "required")
    needs = _CERT_REQS[needs] if needs is None or isinstance(needs, str) else needs
    checked = needs != ssl.CERT_NONE and options.get("ssl_check_hostname", True)
    context.check_hostname = bool(checked)
    context.verify_mode = needs
    for flag in options.get("ssl_include_verify_flags") or ():
        context.verify_flags |= flag
    for flag in options.get("ssl_exclude_verify_flags") or ():
        context.verify_flags &= ~flag
    if options.get("ssl_certfile"):
        context.load_cert_chain(
            options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password")
        )
    trusted = {
        "cafile": options.get("ssl_ca_certs"),
        "capath": options.get("ssl_ca_path"),
        "cadata": options.get("ssl_ca_data"),
    }
    if any(trusted.values()):
        context.load_verify_locations(**trusted)
    if options.get("ssl_min_version") is not None:
        context.minimum_version = options["ssl_min_version"]
    if options.get("ssl_ciphers"):
        context.set_ciphers(options["ssl_ciphers"])
    return context


def _no_credentials(error: Exception) -> Unreachable:
    # Its text might hold a secret; the cause is chained.
    return Unreachable(f"the credential provider failed with {type(error).__name__}")


def from_options(kind: type[Any], options: Mapping[str, Any]) -> Settings:
    """Read a redis-py connection class and its keyword arguments."""
    known = kind in _PLAIN | _TLS | _UNIX | _SENTINEL | _SENTINEL_TLS
    # OCSP checks and a connect function work on redis-py's own connection only.
    special = any(
        options.get(option)
        for option in ("redis_connect_func", "ssl_validate_ocsp", "ssl_validate_ocsp_stapled")
    )
    unix = kind in _UNIX
    keepalive = options.get("socket_keepalive_options")
    return Settings(
        host=options.get("path", "") if unix else options.get("host") or "localhost",
        port=0 if unix else int(options.get("port") or 6379),
        db=int(options.get("db") or 0),
        username=options.get("username"),
        password=options.get("password"),
        credential_provider=options.get("credential_provider"),
        protocol=int(options.get("protocol") or DEFAULT_PROTOCOL),
        client_name=options.get("client_name"),
        tls=(
            {key: value for key, value in options.items() if key.startswith("ssl_")}
            if kind in _TLS | _SENTINEL_TLS
            else None
        ),
        keepalive_options=dict(keepalive if isinstance(keepalive, Mapping) else _KEEPALIVE),
        foreign=None if known and not special else (kind, options),
    )


def from_pool(pool: Any) -> Settings:
    """Read a redis-py connection pool."""
    kind, options = pool.connection_class, dict(pool.connection_kwargs)
    sentinel_pool = isinstance(
        pool, redis.sentinel.SentinelConnectionPool | redis.asyncio.sentinel.SentinelConnectionPool
    )
    if not sentinel_pool:
        return from_options(kind, options)
    if not pool.is_master:
        raise UsageError("a Sentinel replica takes no writes: pass sentinel.master_for(…)")
    settings = from_options(kind, options)
    return dataclasses.replace(
        settings,
        sentinel=pool.sentinel_manager,
        service=pool.service_name,
    )


def from_url(url: str) -> Settings:
    """Read `redis://`, `rediss://` or `unix://` as redis-py does."""
    try:
        return from_pool(redis.ConnectionPool.from_url(url))
    except ValueError as error:
        # redis-py's message names the schemes and options, never the password.
        if "scheme" in str(error):
            raise UsageError("a URL must begin with redis://, rediss:// or unix://") from None
        raise UsageError("the Redis URL cannot be read: check its port and options") from None
