"""Time series: counts, members, gauges and latencies per bucket of time; any range at once."""

from redishacks.errors import RetentionError
from redishacks.timeseries._held import Uncounted
from redishacks.timeseries.distinct import AsyncDistinctSeries, DistinctSeries
from redishacks.timeseries.gauge import AsyncGaugeSeries, Gauge, GaugeSeries
from redishacks.timeseries.latency import AsyncLatencySeries, Histogram, LatencySeries
from redishacks.timeseries.plan import Plan
from redishacks.timeseries.points import Series, Total
from redishacks.timeseries.resolution import Resolution
from redishacks.timeseries.series import AsyncTimeSeries, TimeSeries
from redishacks.timeseries.top import AsyncTopSeries, Top, TopSeries

__all__ = [
    "AsyncDistinctSeries",
    "AsyncGaugeSeries",
    "AsyncLatencySeries",
    "AsyncTimeSeries",
    "AsyncTopSeries",
    "DistinctSeries",
    "Gauge",
    "GaugeSeries",
    "Histogram",
    "LatencySeries",
    "Plan",
    "Resolution",
    "RetentionError",
    "Series",
    "TimeSeries",
    "Top",
    "TopSeries",
    "Total",
    "Uncounted",
]
