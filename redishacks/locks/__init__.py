"""Locks over all processes: fair, quick, and honest about loss."""

from __future__ import annotations

from redishacks.locks.held import AsyncHeld, Held
from redishacks.locks.holder import Holder, LockedError, LockLostError, SelfDeadlockError
from redishacks.locks.lock import AsyncLock, Lock
from redishacks.locks.multi import AsyncMultiHeld, AsyncMultiLock, MultiHeld, MultiLock
from redishacks.locks.rwlock import AsyncRWLock, RWLock
from redishacks.locks.semaphore import AsyncSemaphore, Semaphore

__all__ = [
    "AsyncHeld",
    "AsyncLock",
    "AsyncMultiHeld",
    "AsyncMultiLock",
    "AsyncRWLock",
    "AsyncSemaphore",
    "Held",
    "Holder",
    "Lock",
    "LockLostError",
    "LockedError",
    "MultiHeld",
    "MultiLock",
    "RWLock",
    "SelfDeadlockError",
    "Semaphore",
]
