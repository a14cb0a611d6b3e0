"""Which thread or task of this process holds which lock, so that none waits for itself."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redishacks.locks._hold import Hold

#: A lock of a server, and a thread or task.
Place = tuple[str, Hashable]

_FEW = 64


class Here:
    """What is held, by lock and by thread or task; it keeps no acquisition alive."""

    def __init__(self) -> None:
        self._holds: dict[Place, weakref.ref[Hold]] = {}
        #: With so many of them it is looked which are garbage: as often as their number doubles.
        self._many = _FEW

    def find(self, place: Place) -> Hold | None:
        """Return what a thread or task holds."""
        ref = self._holds.get(place)
        hold = None if ref is None else ref()
        return hold if hold is not None and hold.held else None

    def add(self, place: Place, hold: Hold) -> None:
        """Take note of an acquisition, until it is garbage at the latest."""
        self._holds[place] = weakref.ref(hold)
        if len(self._holds) > self._many:
            for other, ref in list(self._holds.items()):
                if ref() is None and self._holds.get(other) is ref:
                    self._holds.pop(other, None)
            self._many = max(_FEW, 2 * len(self._holds))

    def remove(self, place: Place, hold: Hold) -> None:
        """Forget an acquisition, if it is still the one."""
        ref = self._holds.get(place)
        if ref is not None and ref() is hold:
            self._holds.pop(place, None)


here = Here()
