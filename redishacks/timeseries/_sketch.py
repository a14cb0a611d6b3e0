"""HyperLogLogs as the server stores them, united here: for sets that are in several slots.

PFCOUNT and PFMERGE work within one slot only. The format (`HYLL`, dense and sparse) is that of
https://github.com/redis/redis/blob/unstable/src/hyperloglog.c and has not changed since 2.8.9; the
estimate is that of PFCOUNT: O. Ertl, "New cardinality estimation algorithms for HyperLogLog
sketches", 2017.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from redishacks.errors import ServerError

_REGISTERS = 16_384
#: A register counts to 51: a hash has 64 bits, of which 14 choose the register.
_BITS = 50
_HEAD = 16
_DENSE = _HEAD + _REGISTERS * 6 // 8


def registers(raw: bytes | None) -> bytes:
    """Return the 16,384 registers of a HyperLogLog, a byte each; raises `ServerError`."""
    if raw is None:
        return bytes(_REGISTERS)
    if raw[:4] != b"HYLL" or len(raw) < _HEAD or raw[4] > 1 or (raw[4] == 0 and len(raw) != _DENSE):
        raise ServerError("ERR this key is no HyperLogLog")
    found = _dense(raw) if raw[4] == 0 else _sparse(raw)
    if len(found) != _REGISTERS:
        raise ServerError("ERR this HyperLogLog is damaged")
    return found


def _dense(raw: bytes) -> bytes:
    """Read registers of 6 bits, the lowest first."""
    found = bytearray()
    for at in range(_HEAD, len(raw) - 2, 3):
        word = raw[at] | raw[at + 1] << 8 | raw[at + 2] << 16
        found += bytes((word & 63, word >> 6 & 63, word >> 12 & 63, word >> 18))
    return bytes(found)


def _sparse(raw: bytes) -> bytes:
    """Read runs: of zeros (00xxxxxx, 01xxxxxx yyyyyyyy), of one value (1vvvvvxx)."""
    found = bytearray()
    codes = iter(raw[_HEAD:])
    for code in codes:
        if code & 0x80:
            found += bytes(((code >> 2 & 31) + 1,)) * ((code & 3) + 1)
        elif code & 0x40:
            found += bytes(((code & 63) << 8 | next(codes, 0)) + 1)
        else:
            found += bytes(code + 1)
    return bytes(found)


def stored(some: bytes) -> bytes:
    """Return registers as the server stores them: dense, and with no number noted down."""
    packed = bytearray()
    for at in range(0, _REGISTERS, 4):
        a, b, c, d = some[at : at + 4]
        packed += (a | b << 6 | c << 12 | d << 18).to_bytes(3, "little")
    # The highest bit of the noted number says that it is not known.
    return b"HYLL" + bytes(11) + b"\x80" + packed


def united(some: Iterable[bytes]) -> bytes:
    """Return the registers of the union."""
    found = bytes(_REGISTERS)
    for one in some:
        found = bytes(map(max, found, one))
    return found


def estimate(some: bytes) -> int:
    """Return about how many distinct members have gone in."""
    counts = Counter(some)
    z = _REGISTERS * _tau(1 - counts[_BITS + 1] / _REGISTERS)
    for value in range(_BITS, 0, -1):
        z = 0.5 * (z + counts[value])
    z += _REGISTERS * _sigma(counts[0] / _REGISTERS)
    # Half up, as C rounds.
    return math.floor(_REGISTERS * _REGISTERS / (2 * math.log(2)) / z + 0.5)


def _sigma(x: float) -> float:
    if x == 1:
        return math.inf
    y, z, before = 1.0, x, -1.0
    while z != before:
        x *= x
        before = z
        z += x * y
        y += y
    return z


def _tau(x: float) -> float:
    if x in (0, 1):
        return 0.0
    y, z, before = 1.0, 1 - x, -1.0
    while z != before:
        x = math.sqrt(x)
        before = z
        y *= 0.5
        z -= (1 - x) ** 2 * y
    return z / 3
