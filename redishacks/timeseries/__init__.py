"""Time series: counts per 10 seconds and longer, sums of any range in one round trip."""

from redishacks.errors import RetentionError
from redishacks.timeseries.plan import Plan
from redishacks.timeseries.points import Series, Total
from redishacks.timeseries.resolution import Resolution
from redishacks.timeseries.series import AsyncTimeSeries, TimeSeries

__all__ = [
    "AsyncTimeSeries",
    "Plan",
    "Resolution",
    "RetentionError",
    "Series",
    "TimeSeries",
    "Total",
]
