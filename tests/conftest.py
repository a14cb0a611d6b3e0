"""What every test may use: short names for the servers, a key prefix of its own, both flavours."""

from __future__ import annotations

import hashlib
import itertools
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from redishacks.testing import (
    Cluster,
    FaultProxy,
    Postgres,
    Server,
    servers_available,
    valkey_server,
)
from tests.helpers import Colour


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let several runs share the tests; none knows beforehand which will be its own."""
    parser.addoption("--share", metavar="DIRECTORY", help="share the tests with runs that say so")


def pytest_configure() -> None:
    """Listen to Ctrl-C though a shell's `&` began us: the processes of tests inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With --share, run each test that no other run has taken.

    The second run goes backwards, and others begin in the middle.
    """
    directory = session.config.getoption("--share")
    if not directory or session.testsfailed or session.config.option.collectonly:
        return None

    def taken(name: str) -> bool:
        try:
            Path(directory, hashlib.sha256(name.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return True
        return False

    files = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    run = next(number for number in itertools.count() if not taken(f"run {number}"))
    if run == 1:
        files.reverse()
    elif run > 1:
        half = len(files) // 2
        files = files[half:] + files[:half]
    mine = (item for items in files for item in items if not taken(item.nodeid))
    # What a test shares with the next one of the same run is torn down later.
    item, following = next(mine, None), next(mine, None)
    while item is not None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item, following = following, next(mine, None)
    return True


def pytest_report_header() -> list[str]:
    """Say which server programs the tests run on."""
    return [f"server: {binary.kind} ({binary.path})" for binary in servers_available()]


@pytest.fixture(scope="session")
def valkey(redishacks_valkey: Server) -> Server:
    """The session's Valkey; a test that stops, kills or reconfigures one starts its own."""
    return redishacks_valkey


@pytest.fixture(scope="session")
def redis62(redishacks_redis: Server) -> Server:
    """The session's Redis 6.2, the oldest server that is supported."""
    return redishacks_redis


@pytest.fixture(scope="session")
def cluster(redishacks_cluster: Cluster) -> Cluster:
    """The session's cluster of three primaries."""
    return redishacks_cluster


@pytest.fixture(scope="module")
def quiet() -> Iterator[Server]:
    """A server of a file's tests that count what it is told."""
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres(redishacks_postgres: Postgres) -> Postgres:
    """The session's PostgreSQL."""
    return redishacks_postgres


@pytest.fixture
def pg_dsn(postgres: Postgres) -> Iterator[str]:
    """The DSN of a fresh database."""
    with postgres.database() as dsn:
        yield dsn


@pytest.fixture
def proxy(redishacks_proxy: FaultProxy) -> FaultProxy:
    """A proxy in front of the session's Valkey."""
    return redishacks_proxy


@pytest.fixture
def prefix() -> str:
    """A key prefix that no other test has."""
    return f"rh-{secrets.token_hex(4)}"


@pytest.fixture(params=["sync", "async"])
def flavour(request: pytest.FixtureRequest) -> str:
    """Run a behaviour once in sync and once in async code."""
    flavour: str = request.param
    return flavour


@pytest.fixture
def colour(flavour: str) -> Iterator[Colour]:
    """Both colours, with one test body."""
    made = Colour(flavour)
    yield made
    made.close()
