"""The transports of this process: one per client or URL, and what a fork does to them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from redishacks._transport._async import AsyncTransport
from redishacks._transport._link import Main
from redishacks._transport._sync import SyncTransport

Either = TypeVar("Either", SyncTransport, AsyncTransport)


class Registry:
    """Transports by client or URL; it keeps neither the client nor an unused transport alive."""

    def __init__(self) -> None:
        self._by_client: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._by_url: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
        self._all: weakref.WeakSet[SyncTransport | AsyncTransport] = weakref.WeakSet()
        # Re-entrant: a signal handler may connect while its thread is in here.
        self._lock = threading.RLock()
        self._watching_forks = False

    def get(self, client: Any, kind: type[Either], make: Callable[[], Either]) -> Either:
        """Return the transport of a client or URL, made on first use."""
        with self._lock:
            self._watch_forks()
            known: Any = self._by_url if isinstance(client, str) else self._by_client
            key = (client, kind) if isinstance(client, str) else client
            try:
                found = known.get(key)
            except TypeError:  # no client at all, which is what making says
                return make()
            if type(found) is kind:
                return found
            made = known[key] = make()
            self._all.add(made)
            return made

    def add(self, transport: Either) -> Either:
        """Close this one's connections in forked children too."""
        with self._lock:
            self._watch_forks()
            self._all.add(transport)
        return transport

    def _watch_forks(self) -> None:
        if not self._watching_forks:
            os.register_at_fork(after_in_child=self._forked)
            Main.find()
            self._watching_forks = True

    def _forked(self) -> None:
        # Another thread of the parent may have held the lock.
        self._lock = threading.RLock()
        Main.find()
        for transport in list(self._all):
            transport.abandon()


registry = Registry()
