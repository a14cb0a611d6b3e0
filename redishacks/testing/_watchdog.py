"""A tiny process that ends a server and removes its directory once their owner is gone.

Run as a script by `redishacks.testing._process`. Standard input is a pipe: each line is the
process id of the server that runs now, and its end means that the owner is gone, even when the
owner was killed with SIGKILL. A pipe knows this on every POSIX system and for every thread of the
owner; Linux's parent-death signal would fire when only the thread that started the server ends.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time

#: How long a server may take to obey before SIGKILL.
PATIENCE = 5.0


def watch(owner: int) -> int:
    """Return, when the owner is gone, the last process id it named, or 0."""
    pid = 0
    while True:
        if select.select([0], [], [], 0.5)[0]:
            lines = os.read(0, 4096)
            if not lines:
                return pid
            pid = int(lines.split()[-1])
        elif os.getppid() != owner:  # a forked child of the owner may hold the pipe open for longer
            return pid


def end(pid: int, gently: int) -> None:
    """Signal a process, also a stopped one, and kill it when it does not obey in time."""
    deadline = time.monotonic() + PATIENCE
    try:
        os.kill(pid, gently)
        os.kill(pid, signal.SIGCONT)
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main() -> None:
    """Arguments: process id of the owner, directory to remove, number of the signal to send."""
    owner, directory, gently = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    pid = watch(owner)
    if pid:
        end(pid, gently)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
