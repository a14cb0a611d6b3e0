"""The command line: a thin face of `redishacks.counters`, `redishacks.doctor`, `redishacks.demo`.

    redishacks flush myapp.counters:jobs --every 10 --for 60
    redishacks status myapp.counters:jobs

`ending` says how a command ends (exit codes), `target` where its jobs come from, `show` how things
look; the other modules are the commands. No rule about counters is decided here.
"""

from __future__ import annotations

import click

from redishacks import __version__
from redishacks.cli.demo import demo
from redishacks.cli.ending import EXIT_CODES, Commands
from redishacks.cli.flush import flush
from redishacks.cli.limits import limits
from redishacks.cli.locks import locks
from redishacks.cli.look import dead, doctor, status
from redishacks.cli.nodes import nodes
from redishacks.cli.reshard import reshard
from redishacks.cli.series import series

__all__ = ["commands"]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(__version__)
def commands() -> None:
    """Redis tricks that keep a big site up: right under faults, fast."""


for command in (demo, flush, status, doctor, dead, limits, locks, series, nodes, reshard):
    commands.add_command(command)
