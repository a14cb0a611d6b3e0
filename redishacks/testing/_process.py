"""Processes that never outlive the one that started them, with a private directory each."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from redishacks.errors import UnavailableError

#: How long a server may take to come up, or to obey SIGTERM.
START_WITHIN = 20.0
STOP_WITHIN = 5.0

#: Below the range that systems give to outgoing connections: nobody takes the port of a server
#: that is down for a moment, and a client cannot connect to itself there.
_PORTS = range(10240, 32000)

_WATCHDOG = Path(__file__).with_name("_watchdog.py")

# The shell names itself to the watchdog through standard input, then becomes the server: there is
# no moment at which a server runs that the watchdog does not know.
_REGISTER_AND_EXEC = 'echo $$ >&0; exec "$@" </dev/null'


def package_directory(name: str) -> Path | None:
    """Return where an installed package lies, without importing it; None when it is missing."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def free_port() -> int:
    """Return a loopback TCP port that nobody listens on at this moment."""
    for port in random.SystemRandom().sample(_PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UnavailableError("no free loopback port was found")


def wait_until(condition: Callable[[], bool], what: str, within: float = START_WITHIN) -> None:
    """Poll until the condition holds; `UnavailableError` says what was waited for in vain."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise UnavailableError(f"waited {within:g} s in vain: {what}")
        time.sleep(0.005)


def private_directory() -> Path:
    """Make a directory whose path is short enough for a unix socket (some 100 bytes)."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="redishacks-", dir=parent if len(parent) < 50 else "/tmp"))


class Process:
    """One server process at a time, its directory, and the watchdog that outlives us.

    The server runs in its own session, so that a Ctrl-C on the terminal reaches us and not it.
    A forked child of the owner may use the server, but closing there does nothing.
    """

    def __init__(self, *, end_with: signal.Signals, user: int | None = None) -> None:
        self.directory = private_directory()
        self.log = self.directory / "log"
        self.log.touch()
        self.popen: subprocess.Popen[bytes] | None = None
        self._end_with = end_with
        self._user = user
        self._owner = os.getpid()
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WATCHDOG), str(self._owner), str(self.directory),
             str(int(end_with))],
            stdin=subprocess.PIPE, start_new_session=True, cwd="/",
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process id of the server that runs, or ran last."""
        return self.popen.pid if self.popen is not None else 0

    def start(self, command: Sequence[str | Path]) -> None:
        """Start the server; its output goes to `log`."""
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                ["/bin/sh", "-c", _REGISTER_AND_EXEC, "sh", *map(str, command)],
                stdin=self._watchdog.stdin, stdout=log, stderr=log, cwd=self.directory,
                start_new_session=True, user=self._user, group=self._user,
                extra_groups=None if self._user is None else [],
            )  # fmt: skip

    def alive(self) -> bool:
        """Return whether the server runs (or is stopped with SIGSTOP)."""
        return self.popen is not None and self.popen.poll() is None

    def stop(self, gently: signal.Signals) -> None:
        """End the server, also a stopped one; SIGKILL when it does not obey in 5 s."""
        if self.popen is None or not self.alive():
            return
        self.popen.send_signal(gently)
        self.popen.send_signal(signal.SIGCONT)
        try:
            self.popen.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def said(self, last: int = 1500) -> str:
        """Return the end of the server's log."""
        return self.log.read_text(errors="replace")[-last:].strip()

    def close(self) -> None:
        """End the server, then the watchdog, and remove the directory; harmless when repeated."""
        if os.getpid() != self._owner:
            return
        self.stop(self._end_with)
        self._watchdog.kill()
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.close()
        self._watchdog.wait()

        def removed() -> bool:  # what the server itself started may write for a moment longer
            shutil.rmtree(self.directory, ignore_errors=True)
            return not self.directory.exists()

        wait_until(removed, f"to remove {self.directory}", STOP_WITHIN)
