"""Keys over many Redis nodes: `Router`, `AsyncRouter`, and batches that settle."""

from redishacks.router.client import AsyncRouter, Explanation, Router
from redishacks.router.replies import BatchError, Reply

__all__ = ["AsyncRouter", "BatchError", "Explanation", "Reply", "Router"]
