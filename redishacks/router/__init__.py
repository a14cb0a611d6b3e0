"""Keys over many Redis nodes: `Router`, `AsyncRouter`, and batches that settle."""

from redishacks.router.client import AsyncRouter, Explanation, Router
from redishacks.router.placement import Placement, SlotTable
from redishacks.router.replies import BatchError, Reply
from redishacks.router.reshard import Plan
from redishacks.router.transaction import WatchError

__all__ = [
    "AsyncRouter",
    "BatchError",
    "Explanation",
    "Placement",
    "Plan",
    "Reply",
    "Router",
    "SlotTable",
    "WatchError",
]
