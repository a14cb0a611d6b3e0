"""A clock that goes on while the machine sleeps, where there is one: leases do so, too."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

#: Seconds since some moment in the past.
clock: Callable[[], float] = (
    functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    if hasattr(time, "CLOCK_BOOTTIME")
    else time.monotonic
)
