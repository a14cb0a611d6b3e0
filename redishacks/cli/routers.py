"""How a router is named on the command line: TARGET, --nodes or --redis.

A TARGET comes first, unless one of these options says where:

    redishacks nodes where myapp.redis:router user:1
    redishacks nodes where --nodes nodes.json user:1
    redishacks nodes where --redis redis://:secret@10.0.0.1 user:1

By a URL, the topology that this node has stored tells where the others are; they are reached with
the same user, password, database and TLS. What is typed is seen in `ps`; what is in a file is not.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from redishacks._command import Steps, ask
from redishacks._drive import drive
from redishacks.cli.ending import masked
from redishacks.cli.target import found_at
from redishacks.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from redishacks.router import Router
    from redishacks.router.health import State

T = TypeVar("T")

#: Seconds that an exchange may take.
DEADLINE = 2.0

_HELP = """\
TARGET is module:attribute, a Router or AsyncRouter, importable from here. Instead of it --nodes or
--redis say where the nodes are.
"""

_ADDRESS = re.compile(r"(?P<host>[^/].*):(?P<port>\d+)(/(?P<db>\d+))?")
_PATH = re.compile(r"(?P<path>/.*?)(/(?P<db>\d+))?")

_OPTIONS = [
    click.option(
        "--nodes", "file", metavar="FILE", type=click.Path(dir_okay=False),
        help='JSON: {"a": "redis://…", "b": {"url": "redis://…", "weight": 2}}.',
    ),
    click.option(
        "--redis", "url", metavar="URL",
        help="One node, as redis://, rediss:// or unix://; what it has stored tells where the "
        "others are, and they are reached with the same user, password and TLS.",
    ),
    click.option("--prefix", metavar="P", help="The router's prefix.  [default: rh]"),
]  # fmt: skip


@dataclasses.dataclass
class Where:
    """Which router is meant: what the options say."""

    file: str | None
    url: str | None
    prefix: str | None

    def split(self, words: Sequence[str]) -> tuple[str | None, Sequence[str]]:
        """Return the TARGET, if no option stands in its place, and what is left."""
        if self.file is not None or self.url is not None:
            return None, words
        if not words:
            raise click.UsageError(
                "say which router: a TARGET (module:attribute), --nodes, --redis"
            )
        return words[0], words[1:]

    def open(self, target: str | None) -> Router:
        """Return the router; asks one node when it is named by a URL."""
        if self.file is not None and self.url is not None:
            raise click.UsageError("give --nodes or --redis, not both")
        if target is not None:
            if self.file is not None or self.url is not None or self.prefix is not None:
                raise click.UsageError("give a TARGET, or --nodes or --redis, not both")
            return from_target(target)
        from redishacks.router import Router

        prefix = "rh" if self.prefix is None else self.prefix
        nodes = _stored(self.url, prefix) if self.url is not None else self.given()
        return Router(nodes, prefix=prefix, deadline=DEADLINE)

    def given(self) -> Mapping[str, Any]:
        """Return what the file says of the nodes; nothing without one."""
        return {} if self.file is None else _read(Path(self.file))

    def weights(self) -> dict[str, Any]:
        """Return the weights that the file says."""
        nodes = self.given().items()
        return {
            name: node["weight"]
            for name, node in nodes
            if isinstance(node, Mapping) and "weight" in node
        }

    def unweighted(self) -> Where:
        """Return the same, for those who would change the weights that are stored."""
        return self if self.file is None else _Unweighted(self.file, self.url, self.prefix)

    def again(self, target: str | None) -> str:
        """Return how the same is said on another command line, without a password."""
        words = [target] if target is not None else []
        for option, value in (("--nodes", self.file), ("--redis", self.url)):
            words += [option, masked(value)] if value is not None else []
        words += ["--prefix", self.prefix] if self.prefix is not None else []
        return shlex.join(words)


class _Unweighted(Where):
    def given(self) -> Mapping[str, Any]:
        return {
            name: {key: value for key, value in node.items() if key != "weight"}
            if isinstance(node, Mapping)
            else node
            for name, node in super().given().items()
        }

    def weights(self) -> dict[str, Any]:
        return Where(self.file, self.url, self.prefix).weights()


def of_a_router(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which router is meant; it gets a `Where`."""

    def run(file: str | None, url: str | None, prefix: str | None, **options: Any) -> Any:
        return command(Where(file, url, prefix), **options)

    run.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{_HELP}"
    run.__name__ = command.__name__
    run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    made: Callable[..., Any] = run
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


def from_target(target: str) -> Router:
    """Return the router that a TARGET names; one for asyncio is made anew, for the same nodes."""
    return as_router(found_at(target, "myapp.redis:router"), f"TARGET {target}")


def as_router(found: Any, what: str) -> Router:
    """Return a router, or raise `UsageError` when it is none."""
    from redishacks.router import AsyncRouter, Router

    if isinstance(found, AsyncRouter):
        if found.redishacks_transport.sharded:
            raise UsageError(f"{what} is an AsyncRouter over a cluster: a Router is needed")
        return found.twin()
    if not isinstance(found, Router):
        kind = type(found).__name__
        raise UsageError(f"{what} must be a Router or an AsyncRouter, and is a {kind}")
    return found


def look_at(router: Router) -> State:
    """Return what a router's nodes say; nothing is changed."""
    from redishacks.router.health import look

    return ask_nodes(router, look(router._nodes()))


def ask_nodes(router: Router, steps: Steps[T]) -> T:
    """Have a router's nodes say something, and tell them nothing."""
    from redishacks.router.health import observer

    transport = observer(router._nodes())
    try:
        return drive(steps, transport, DEADLINE)
    finally:
        transport.close()


def in_use(router: Router) -> State:
    """Return what a router's nodes say; raises when nobody has used them yet."""
    state = look_at(router)
    if state.topology is None:
        away = any(node.error is not None for node in state.nodes)
        raise (UnavailableError if away else UsageError)(state.problems[0])
    return state


def title_of(router: Router) -> str:
    """Return how a router is called, which has no name."""
    if router.redishacks_transport.sharded:
        return "router over a cluster"
    return f"router of {', '.join(sorted(router._nodes().names))}"


# A file


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text") from None
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f'{path} must hold an object, as {{"a": "redis://10.0.0.1"}}')
    for name, node in found.items():
        url = node.get("url") if isinstance(node, dict) else node
        if not isinstance(url, str):
            raise UsageError(f'{path}: node {name}: a URL, or {{"url": …, "weight": …}}, is needed')
    return found


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(f"{name} is given twice")
        found[name] = value
    return found


# One node


def _stored(url: str, prefix: str) -> dict[str, Any]:
    """Return the nodes of the topology that one of them has stored, as clients of redis-py."""
    from redishacks._transport import connect
    from redishacks.router.commands import Layout

    command = Layout(prefix).read(("", 0))._replace(node=None)
    stored = drive(ask(command), connect(url), DEADLINE)
    if stored is None:
        raise UsageError(
            f"this node has no topology: nobody has used it as a router's, by the prefix {prefix!r}"
        )
    stamp, topology = stored
    nodes: dict[str, Any] = {}
    for name in topology.nodes:
        if name != stamp.name and name not in topology.addresses:
            raise UsageError(f"where node {name} is, is not stored: use --nodes or a TARGET")
        nodes[name] = url if name == stamp.name else _at(url, name, topology.addresses[name])
    return nodes or {stamp.name: url}


def _at(url: str, name: str, address: str) -> Any:
    """Return a client for another address that is otherwise as a URL says."""
    import redis

    pool = redis.ConnectionPool.from_url(url)
    options = {
        key: value
        for key, value in pool.connection_kwargs.items()
        if key not in ("host", "port", "path", "db")
    }
    kind: Any = pool.connection_class
    if found := _ADDRESS.fullmatch(address):
        if kind is redis.UnixDomainSocketConnection:
            kind = redis.Connection
        options.update(host=found["host"], port=int(found["port"]))
    elif found := _PATH.fullmatch(address):
        kind = redis.UnixDomainSocketConnection
        options["path"] = found["path"]
    else:
        raise UsageError(
            f"node {name} is at {address}, which is no host and port: use --nodes or a TARGET"
        )
    options["db"] = int(found["db"] or 0)
    return redis.Redis(connection_pool=redis.ConnectionPool(kind, **options))
