"""Rate limits over all processes: windows with a proven bound, one round trip per decision."""

from redishacks.ratelimit._places import Holder
from redishacks.ratelimit.concurrency import (
    AsyncConcurrencyLimiter,
    AsyncSlot,
    ConcurrencyLimiter,
    Slot,
)
from redishacks.ratelimit.decision import Decision, RateLimitedError, Verdict
from redishacks.ratelimit.limit import Ban, CostError, Limit, Places
from redishacks.ratelimit.limiter import AsyncRateLimiter, RateLimiter

__all__ = [
    "AsyncConcurrencyLimiter",
    "AsyncRateLimiter",
    "AsyncSlot",
    "Ban",
    "ConcurrencyLimiter",
    "CostError",
    "Decision",
    "Holder",
    "Limit",
    "Places",
    "RateLimitedError",
    "RateLimiter",
    "Slot",
    "Verdict",
]
