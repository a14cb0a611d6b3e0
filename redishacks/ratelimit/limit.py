"""`Limit`: so much per so long, and how it is counted.

Limit(20, 60)                                 # 20 in any 60 seconds
Limit.parse("20/minute")                      # the same
Limit(100, 1, algorithm="gcra", burst=10)     # a steady 100 per second, 10 at once
Limit(None, 60), Limit(0, 60)                 # no limit; nothing at all

algorithm   most that is admitted in any time of that length
window      the limit; a place comes back at most `precision` seconds late
fixed       twice the limit, around an edge of the clock
gcra        the limit plus `burst`; the limit with `strict=True`
log         the limit; a place comes back at most a millisecond late
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property

from redishacks._units import EXACT, Seconds, seconds
from redishacks.errors import UsageError

ALGORITHMS = ("window", "fixed", "gcra", "log")

#: Buckets of a window, and the most of them that fit 250 bytes: (amounts below, buckets).
BUCKETS = 30
_MOST_BUCKETS = ((2**16, 60), (2**32, 32), (EXACT, 18))
#: Each hit in a log takes 4 bytes, and every hit writes the whole log.
LONGEST_LOG = 10_000
_SHORTEST, _LONGEST = 0.001, 366 * 86_400.0

#: Microseconds of each unit of time that a limit's text may name.
_UNITS = {
    "ms": 1_000, "millisecond": 1_000, "s": 1_000_000, "sec": 1_000_000, "second": 1_000_000,
    "m": 60_000_000, "min": 60_000_000, "minute": 60_000_000, "h": 3_600_000_000,
    "hour": 3_600_000_000, "d": 86_400_000_000, "day": 86_400_000_000, "week": 604_800_000_000,
}  # fmt: skip
_TEXT = re.compile(
    r"\s*([0-9](?:_?[0-9]){0,30})\s*(?:/|per\b)\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)?\s*([a-z]+)\s*",
    re.IGNORECASE,
)
#: What may stand in a structured field's string without being escaped.
_NAME = re.compile(r"[ !#-\[\]-~]{1,64}")


class CostError(UsageError):
    """The cost of a hit is above a limit: it could never be allowed."""


@dataclass(frozen=True)
class Limit:
    """At most `amount` per `per` seconds, counted by `algorithm`.

    `amount` None is no limit, 0 refuses everything. `per` is from a millisecond to 366 days.

    `window` counts in sub-buckets, the oldest one whole: never more than `amount` in any time of
    `per` seconds. A place comes back up to `precision` seconds late, by default a 30th of `per`, or
    an 18th where the amount is 2^32 or more (raised beyond that, it begins anew).
    `fixed` counts per window of the server's clock, all keys' windows together or, with `spread`,
    each at an offset of its own, so that not all of them begin at once. `gcra` lets hits pass
    evenly, `burst` (by default `amount`) at once; `strict=True` slows the rate, and halves the
    burst by default, so that no time of `per` seconds has more than `amount`. `log` remembers
    every hit, at most 10,000.

    `name` is what headers call it; with a mapping of keys, the part that it limits.

    Raises `UsageError`.
    """

    amount: int | None
    per: Seconds
    _: KW_ONLY
    algorithm: str = "window"
    burst: int | None = None
    strict: bool = False
    precision: Seconds | None = None
    spread: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        if self.amount is not None:
            _check_count(self.amount, "a limit's amount", least=0)
        period = seconds(self.per, "a limit's length")
        if not _SHORTEST <= period <= _LONGEST:
            raise UsageError(f"a limit's length is from 0.001 s to 366 days, not {self.per!r}")
        if self.algorithm not in ALGORITHMS:
            raise UsageError(
                f"a limit's algorithm is one of {', '.join(ALGORITHMS)}, not {self.algorithm!r}"
            )
        for option, algorithm in (
            ("burst", "gcra"), ("strict", "gcra"), ("precision", "window"), ("spread", "fixed"),
        ):  # fmt: skip
            if getattr(self, option) not in (None, False) and self.algorithm != algorithm:
                raise UsageError(f"{option} is an option of {algorithm}, not of {self.algorithm}")
        if self.name is not None and not (
            isinstance(self.name, str) and _NAME.fullmatch(self.name)
        ):
            raise UsageError(
                "a limit's name is 1 to 64 printable ASCII characters without quotes and "
                f"backslashes, not {self.name!r}"
            )
        if self.burst is not None:
            _check_count(self.burst, "burst", least=1)
            if self.strict and self.amount is not None and self.burst > self.amount:
                raise UsageError(
                    f"burst {self.burst} is above the limit of {self.amount}, and strict"
                )
        if self.algorithm == "log" and (self.amount or 0) > LONGEST_LOG:
            raise UsageError(
                f"a log remembers at most {LONGEST_LOG:,} hits, not {self.amount}: use a window"
            )
        if self.algorithm == "gcra" and self.amount and self._pace == (0, 0):
            raise UsageError(
                f"a gcra cannot count a burst of {self.most:,} at {self}: its debt would be more "
                "than it can hold"
            )
        if self.algorithm == "window":
            most = next(most for below, most in _MOST_BUCKETS if (self.amount or 0) < below)
            if self.buckets > most or self.bucket_micros < 1:
                raise UsageError(
                    f"precision: a window of {period:g} s for this amount has at most {most} "
                    f"sub-buckets, so at least {period / most:g} s, not {self.precision!r}"
                )

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Return the limit that a text such as "20/minute", "5 per 10 s" or "1000/day" names."""
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        unit = found[3].lower() if found else ""
        if unit not in _UNITS:
            unit = unit.removesuffix("s")
        if found is None or unit not in _UNITS:
            raise UsageError(
                f'{text!r} is no limit: say "20/minute", "5/10s", "100 per 2 hours", "1000/day"; '
                "units are ms, s, min, h, d and week, or in words"
            )
        micros = float(found[2] or 1) * _UNITS[unit]
        return cls(int(found[1].replace("_", "")), micros / 1e6)

    def __str__(self) -> str:
        amount = "unlimited" if self.amount is None else str(self.amount)
        period = seconds(self.per, "per")
        return f"{amount}/{int(period) if period == int(period) else period}s"

    def to_json(self) -> str:
        """Return it as text that `from_json` reads."""
        precision = None if self.precision is None else seconds(self.precision, "precision")
        return json.dumps({**asdict(self), "per": self.micros / 1e6, "precision": precision})

    @classmethod
    def from_json(cls, text: str | bytes) -> Limit:
        """Read what `to_json` has written; raises `UsageError` for anything else."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{text!r} is no limit that this version knows: {error}") from None

    # What commands need

    @cached_property
    def micros(self) -> int:
        """Its length in microseconds."""
        return round(seconds(self.per, "a limit's length") * 1e6)

    @cached_property
    def buckets(self) -> int:
        """Sub-buckets of a window."""
        if self.precision is None:
            large = (self.amount or 0) >= _MOST_BUCKETS[1][0]
            return min(BUCKETS, _MOST_BUCKETS[2][1]) if large else BUCKETS
        return max(1, math.ceil(self.micros / (seconds(self.precision, "precision") * 1e6)))

    @cached_property
    def bucket_micros(self) -> int:
        """Width of a sub-bucket in microseconds."""
        return -(-self.micros // self.buckets)

    @cached_property
    def most(self) -> int:
        """The highest cost that can ever be allowed."""
        assert self.amount is not None
        if self.algorithm != "gcra":
            return self.amount
        if self.burst is not None:
            return self.burst
        return max(1, self.amount // 2) if self.strict else self.amount

    @cached_property
    def shape(self) -> str:
        """What stands in the key: limits of different shapes count apart."""
        letter = self.algorithm[0]
        if self.algorithm == "window":
            return f"{letter}{self.micros}.{self.buckets}"
        return f"{letter}{'s' if self.spread else ''}{self.micros}"

    @cached_property
    def fields(self) -> tuple[str, str, str, str]:
        """Algorithm, amount, a and b, as `ratelimit_decide` wants them; b of `spread` varies."""
        amount, micros = self.amount or 0, self.micros
        if self.algorithm == "window":
            return "w", str(amount), str(self.bucket_micros), str(self.buckets)
        if self.algorithm == "fixed":
            return "f", str(amount), str(micros), "0"
        if self.algorithm == "log":
            return "l", str(amount), str(micros), str(max(1_000, -(-micros // 2**31)))
        a, b = self._pace
        return "g", str(self.most), str(a), str(b)

    @cached_property
    def _pace(self) -> tuple[int, int]:
        """Microseconds per unit of a gcra, as a fraction; (0, 0) when it cannot be kept exactly."""
        micros, units = self.micros, self.amount or 1
        if self.strict:
            units = units - self.most + 1
        shared = math.gcd(micros, units)
        a, b = micros // shared, units // shared
        # A debt of the whole burst must stay exact, with room for turns beyond it.
        largest = EXACT // 8 // max(1, self.most)
        if a > largest:
            b = largest * units // micros
            a = -(-micros * b // units)  # rounded up, by less than a part in `largest`
        return (a, b) if b and largest >= 1_000 else (0, 0)


@dataclass(frozen=True)
class Ban:
    """A limit on refusals: so many within a time, and everything is refused for a while.

    The first ban lasts `lasting` seconds, each further one twice as long, up to `longest`. What
    was learnt is forgotten `longest` seconds after the end of a ban.
    """

    amount: int
    within: Seconds
    _: KW_ONLY
    lasting: Seconds = 60.0
    longest: Seconds = 3600.0

    def __post_init__(self) -> None:
        _check_count(self.amount, "a ban's number of refusals", least=1)
        for name in ("within", "lasting", "longest"):
            if not _SHORTEST <= seconds(getattr(self, name), f"a ban's {name}") <= _LONGEST:
                raise UsageError(f"a ban's {name} is from 0.001 s to 366 days")

    def __str__(self) -> str:
        return f"ban after {self.amount} refusals in {seconds(self.within, 'within'):g}s"

    @property
    def most(self) -> float:
        """The highest cost that can be allowed: any."""
        return math.inf

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Algorithm, amount, a, b and cost, as `ratelimit_decide` wants them."""
        times = (self.within, self.lasting, self.longest)
        within, lasting, longest = (str(round(seconds(time, "ban") * 1e6)) for time in times)
        return "b", str(self.amount), within, lasting, longest


@dataclass(frozen=True)
class Places:
    """At most `amount` at once; what a `ConcurrencyLimiter` decides by."""

    amount: int
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.amount} at once"


def _check_count(value: object, what: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < EXACT:
        raise UsageError(f"{what} is an int from {least} to 2^53, not {value!r}")
