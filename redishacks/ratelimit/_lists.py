"""Who is always allowed, and who never is: exact keys, and IP networks."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from redishacks import _keys
from redishacks.errors import UsageError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class KeyList:
    """Exact keys, and networks such as "10.0.0.0/8" that match keys which are addresses in them."""

    def __init__(self, entries: Iterable[str | int | bytes], name: str) -> None:
        if isinstance(entries, str | bytes) or not isinstance(entries, Iterable):
            raise UsageError(f"{name} is a list of keys and networks, not {entries!r}")
        self._exact: set[bytes] = set()
        self._networks: list[Network] = []
        for entry in entries:
            network = _network(entry)
            if network is None:
                self._exact.add(_keys.id_bytes(entry, name))
            else:
                self._networks.append(network)

    def __bool__(self) -> bool:
        return bool(self._exact or self._networks)

    def __contains__(self, raw: bytes) -> bool:
        if raw in self._exact:
            return True
        if not self._networks:
            return False
        try:
            address = ipaddress.ip_address(raw.decode())
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)


def _network(entry: object) -> Network | None:
    """Return a network, or an address as one: it may be written in more ways than one."""
    if not isinstance(entry, str):
        return None
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None
