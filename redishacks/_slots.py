"""Slots of a Redis Cluster, and the partitions a tool spreads one hot name over.

CRC16 (XMODEM), as in the Redis Cluster specification; the standard library has it in C.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SLOTS = 16384


def key_slot(key: bytes) -> int:
    """Return the slot of a key: CRC16 of its hash tag, or of the whole key without one."""
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % SLOTS


def key_slots(keys: Sequence[bytes]) -> list[int]:
    """Return the slot of each key."""
    if b"{" in b"".join(keys):
        return list(map(key_slot, keys))
    return [crc_hqx(key, 0) % SLOTS for key in keys]


def at_slots(keys: Sequence[bytes], table: Sequence[T]) -> list[T]:
    """Return what a table has for the slot of each key."""
    if b"{" in b"".join(keys):
        return [table[key_slot(key)] for key in keys]
    return [table[crc_hqx(key, 0) % SLOTS] for key in keys]


def hash_tag(key: bytes) -> bytes:
    """Return what of a key decides its slot."""
    start = key.find(b"{")
    end = key.find(b"}", start + 1) if start >= 0 else -1
    return key[start + 1 : end] if end > start + 1 else key


def partition(raw: bytes, partitions: int) -> int:
    """Return which of a name's partitions an id belongs to."""
    return crc_hqx(raw, 0) % partitions if partitions > 1 else 0
