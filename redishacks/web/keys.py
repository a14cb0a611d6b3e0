"""By what requests are limited: the client's address, a field of the request, or a user.

    by_address()                                     # the other end of the connection
    by_address(trusted=1)                            # the one that the nearest proxy has seen
    by_address(trusted=["10.0.0.0/8", "fd00::/8"])   # the one that the last proxy in them has seen
    by_header("X-Api-Key")                           # who sends none counts by address
    by_user(lambda environ: environ.get("REMOTE_USER"))

Each of them makes a function of a request (a WSGI environ or an ASGI scope) that returns a key. Any
other function will do as well; None means that a request is not limited, and a mapping has limits
count its parts:

    address, api_key = by_address(trusted=1), by_header("X-Api-Key")
    key=lambda request: {"ip": address(request), "key": api_key(request)}
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Iterable
from typing import Any

from redishacks._keys import MAX_ID
from redishacks.errors import UsageError
from redishacks.ratelimit._core import Keys
from redishacks.web._http import KeyFunction, header, peer

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: A household or a machine has as many IPv6 addresses as it likes, in one /64.
_IPV6_HOST_BITS = 64


class ByAddress:
    """See `by_address`."""

    def __init__(self, trusted: int | Iterable[str]) -> None:
        one = isinstance(trusted, bool | str | bytes) or not isinstance(trusted, int | Iterable)
        if one or (isinstance(trusted, int) and trusted < 0):
            raise UsageError(
                "trusted is how many proxies are in front, or a list of their networks, "
                f"not {trusted!r}"
            )
        self._hops = trusted if isinstance(trusted, int) else 0
        self._networks = [] if isinstance(trusted, int) else [_network(text) for text in trusted]

    def __call__(self, request: Any) -> str:
        """Return the client's address, the first of its /64 for IPv6."""
        near = peer(request)
        address = None if near is None else _address(near)
        address = self._behind(address, header(request, "X-Forwarded-For") or "")
        if address is None:
            raise UsageError(
                f"the client has no address: the server calls it {near!r}. Behind a unix socket "
                "say how many proxies are in front, by_address(trusted=1), and have them send "
                "X-Forwarded-For; or limit by something else, with key="
            )
        if isinstance(address, ipaddress.IPv6Address):
            address = ipaddress.IPv6Address(int(address) >> _IPV6_HOST_BITS << _IPV6_HOST_BITS)
        return str(address)

    def _behind(self, address: Address | None, forwarded: str) -> Address | None:
        """Walk from the connection's other end towards the client, as far as each can be trusted.

        Each proxy appends whom it has seen: what stands further left was said by that one.
        """
        for passed, entry in enumerate(reversed(forwarded.split(","))):
            if passed >= self._hops and not self._trusts(address):
                break
            nearer_to_client = _address(entry)
            if nearer_to_client is None:
                break
            address = nearer_to_client
        return address

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


class ByHeader:
    """See `by_header`."""

    def __init__(self, name: str, otherwise: KeyFunction) -> None:
        if not isinstance(name, str) or not name.isascii() or not name:
            raise UsageError(f"a header's name is ASCII text, not {name!r}")
        self._name = name.lower()
        self._otherwise = otherwise

    def of(self, value: str) -> str:
        """Return the key that a value counts for, as lists and `limits status` need it."""
        digest = hashlib.sha256(value.encode("latin-1", "replace")).hexdigest()
        return f"{self._name}:{digest[:32]}"

    def __call__(self, request: Any) -> Keys | None:
        """Return the key of a request."""
        value = header(request, self._name)
        return self.of(value) if value else self._otherwise(request)


def by_address(trusted: int | Iterable[str] = ()) -> ByAddress:
    """Limit by the client's address, IPv6 by its /64.

    Without proxies that is the other end of the connection. `trusted` says which proxies are ours:
    how many, or their networks. Then `X-Forwarded-For` is read from the right, past those proxies
    only; what a client writes into it has no effect. Networks are safer when clients can reach a
    proxy, or the server, in more ways than one. Where the server itself takes the address from that
    field (uvicorn's `--proxy-headers`), or removes it (waitress, unless told whom to trust), tell
    the server whom to trust instead.

    An IPv4 address in IPv6 clothes is the IPv4 address. A key is an address, of IPv6 the first one
    of the /64, so that networks in a limiter's `allow` and `deny` match it.

    The function raises `UsageError` for a request that has no address.
    """
    return ByAddress(trusted)


def by_header(name: str, *, otherwise: KeyFunction | None = None) -> ByHeader:
    """Limit by a field of the request, such as `X-Api-Key`.

    The value may be a secret or very long, so the key is a digest of it; `.of(value)` says which.
    A request without the field is limited by `otherwise`, by default `by_address()`.

    A client that may send any value has a fresh limit for each: limit by what an outer middleware
    or a proxy has checked.
    """
    return ByHeader(name, by_address() if otherwise is None else otherwise)


def by_user(
    find: Callable[[Any], str | int | None], *, otherwise: KeyFunction | None = None
) -> KeyFunction:
    """Limit by the user that `find(request)` returns.

    For nobody (None or "") by `otherwise`, by default `by_address()`. Users and addresses that look
    the same are limited apart. A name too long for a key is limited by its digest.
    """
    anybody = by_address() if otherwise is None else otherwise

    def key(request: Any) -> Keys | None:
        user = find(request)
        if user is None or user == "":
            return anybody(request)
        name = f"user:{user}"
        raw = name.encode("utf-8", "surrogateescape")
        return name if len(raw) <= MAX_ID else f"user:{hashlib.sha256(raw).hexdigest()}"

    return key


def _address(text: str) -> Address | None:
    """Read an address as proxies write it: with a port, in brackets, with a zone; None: it is none.

    An IPv4-mapped IPv6 address is the IPv4 one.
    """
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _network(text: object) -> Network:
    try:
        if isinstance(text, str):
            return ipaddress.ip_network(text, strict=False)
    except ValueError:
        pass
    raise UsageError(f'a trusted network is text such as "10.0.0.0/8" or "::1", not {text!r}')
