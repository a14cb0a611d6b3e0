"""Run the benchmarks named, or all; with `--readme` put the table into the README."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

from benchmarks.harness import machine, table
from redishacks.testing import valkey_server

NAMES = ("transport", "counters", "ratelimit", "locks", "timeseries", "router")
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def main() -> None:
    """Run them."""
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or NAMES
    with valkey_server() as server, server.client() as client:
        where = machine(client)
    print(where)
    rows = []
    for name in names:
        began, load = time.monotonic(), os.getloadavg()[0]
        rows += importlib.import_module(f"benchmarks.{name}").run()
        print(f"{name}: {time.monotonic() - began:.0f} s, load before {load:.1f}", flush=True)
    text = table(rows)
    print(text)
    if "--readme" in sys.argv:
        readme = Path(__file__).parents[1] / "README.md"
        head, rest = readme.read_text().split(BEGIN)
        tail = rest.split(END)[1]
        readme.write_text(f"{head}{BEGIN}\n{where}\n\n{text}\n{END}{tail}")


main()
