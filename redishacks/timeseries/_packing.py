"""Packed keys: many buckets in one string, as the scripts write them.

    byte 1         bytes per value: 1, 2 or 4 for numbers without a sign, 8 for any int64
    (buckets+7)/8  which buckets have a value: a bit each, the first bucket's is the highest
    the rest       those values in the order of time, the highest byte first

So a bucket without hits costs a bit, and one that came to 0 is told apart from it.
"""

from __future__ import annotations

import itertools
import struct
import sys
from array import array
from collections.abc import Container, Iterable, Sequence
from typing import ClassVar

from redishacks.errors import ServerError

_CODES = {1: "B", 2: "H", 4: "I", 8: "q"}


class Bitmap:
    """A packed key that was read; `None` for one that is not there."""

    __slots__ = ("_bits", "_data", "_present", "_start", "_width", "buckets")
    #: The bytes a value may have.
    widths: ClassVar[Container[int]]

    def __init__(self, data: bytes | None, buckets: int) -> None:
        #: How many buckets it has, with a value or without.
        self.buckets = buckets
        size = -(-buckets // 8)
        self._data = data or b""
        self._start = 1 + size
        self._bits = 8 * size
        self._width = data[0] if data else 0
        self._present = int.from_bytes(data[1 : 1 + size], "big") if data else 0
        held = len(self._data) - self._start
        if data and (
            self._width not in self.widths or held != self._present.bit_count() * self._width
        ):
            raise ServerError("ERR this key is no packed series")

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return len(self._data)

    def _rank(self, bucket: int) -> int:
        """Return how many buckets before it have a value."""
        return (self._present >> (self._bits - bucket)).bit_count()

    def held(self, first: int, last: int) -> bytes:
        """Return the values of the buckets from `first` to before `last`, as bytes."""
        width = self._width
        start = self._start + self._rank(first) * width
        return self._data[start : self._start + self._rank(last) * width]

    def present(self, first: int, last: int) -> str:
        """Return for each bucket from `first` to before `last` a 1, or a 0 if it has no value."""
        mask = (self._present >> (self._bits - last)) & ((1 << (last - first)) - 1)
        return f"{mask:0{last - first}b}"

    def places(self, first: int, last: int) -> Iterable[int]:
        """Return which buckets from `first` to before `last` have a value."""
        if not self._present:
            return ()
        return itertools.compress(range(first, last), map("1".__eq__, self.present(first, last)))


class Packed(Bitmap):
    """A packed key of numbers."""

    __slots__ = ()
    widths = _CODES

    def values(self, first: int, last: int) -> Sequence[int]:
        """Return the values of the buckets from `first` to before `last` that have one."""
        if not self._present:
            return ()
        held, width = self.held(first, last), self._width
        return held if width == 1 else struct.unpack(f">{len(held) // width}{_CODES[width]}", held)

    @property
    def width(self) -> int:
        """How many bytes a value has."""
        return self._width or 1

    def spread(self, first: int, last: int, size: int) -> bytes | bytearray:
        """Return a value for each bucket from `first` to before `last`; 0 where there is none.

        They have `size` bytes each, at least as many as here, the highest first.
        """
        buckets, code = last - first, _CODES[size]
        values = self.values(first, last)
        if not values:
            return bytes(buckets * size)
        if len(values) == buckets:
            same = size == self._width
            return self.held(first, last) if same else struct.pack(f">{buckets}{code}", *values)
        places = self.present(first, last)
        if len(values) * (24 if size == 1 else 4) < buckets:
            return _set(values, places, size)
        # Packed again, with zeros between: less than a step of Python for each of so many values.
        form = places.replace("1", code).replace("0", "x" if size == 1 else f"{size}x")
        return struct.Struct(f">{form}").pack(*values)


def _set(values: Sequence[int], places: str, size: int) -> bytearray:
    """Return bytes in which values stand where a place is 1."""
    found, place = bytearray(len(places) * size), -1
    put = struct.Struct(f">{_CODES[size]}").pack_into
    for value in values:
        place = places.find("1", place + 1)
        put(found, place * size, value)
    return found


def spread(parts: Sequence[tuple[Packed, int, int]]) -> array[int]:
    """Return a value for each bucket of packed keys, from `first` to before `last` of each."""
    size = max((packed.width for packed, _, _ in parts), default=1)
    found = array(_CODES[size])
    found.frombytes(b"".join([packed.spread(first, last, size) for packed, first, last in parts]))
    if sys.byteorder == "little":
        found.byteswap()
    return found
