"""Numbers in sentences."""

from __future__ import annotations


def many(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 hit`, `2,000 hits`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
