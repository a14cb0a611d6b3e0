"""Locks over all processes: fair, quick, and honest about loss."""

from __future__ import annotations

from redishacks.locks.held import AsyncHeld, Held
from redishacks.locks.holder import Holder, LockedError, LockLostError, SelfDeadlockError
from redishacks.locks.lock import AsyncLock, Lock

__all__ = [
    "AsyncHeld",
    "AsyncLock",
    "Held",
    "Holder",
    "Lock",
    "LockLostError",
    "LockedError",
    "SelfDeadlockError",
]
