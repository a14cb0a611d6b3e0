"""What a tool says to Redis, as values: no I/O here.

A tool builds a `Command`; a transport says it and applies `parse` to the reply. A conversation of
several moves is `Steps`: a generator that yields effects and is resumed with their results, or has
their errors thrown in. Drivers (`redishacks._drive`) obey it, in sync or async code.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Generator, Sequence
from importlib import resources
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

#: No numbers: the packer runs signal handlers while it formats one, and crashes if one raises.
Arg: TypeAlias = bytes | str

_INCLUDE = re.compile(rb"^--@ include (\w+)$", re.MULTILINE)


class Script(NamedTuple):
    """A Lua script: called by its hash, sent whole only when a server does not know it."""

    name: str
    source: bytes
    sha: bytes


@functools.cache
def script(name: str) -> Script:
    """Load `lua/<name>.lua`; its header says the call form, the keys and the reply.

    A line `--@ include other` stands for all that is in `lua/other.lua`.
    """
    source = _source(name)
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


def _source(name: str) -> bytes:
    file = resources.files("redishacks").joinpath("lua", f"{name}.lua")
    return _INCLUDE.sub(lambda found: _source(found[1].decode()), file.read_bytes())


def as_is(reply: Any) -> Any:
    """Return the reply unchanged."""
    return reply


class Command(NamedTuple, Generic[T]):
    """One thing to say to Redis, and how to read the answer."""

    #: What goes on the wire: name and arguments; for a script, its ARGV.
    args: tuple[Arg, ...]
    #: The keys it touches, which decide the node; for a script also its KEYS.
    keys: tuple[bytes, ...] = ()
    #: Turns the raw reply into the result.
    parse: Callable[[Any], T] = as_is
    script: Script | None = None
    #: Saying it twice has the effect of saying it once (a read, or a write with a token).
    repeatable: bool = False
    #: The reply may be large or slow: keep it off the connection that others wait on.
    bulk: bool = False
    #: What goes on the wire, when it is said so often that encoding it once pays.
    packed: bytes | None = None
    #: The node that it goes to whatever its keys: its address, as the transport knows it.
    node: tuple[str, int] | None = None
    #: So many replies, of which `parse` gets a list: words said at once, packed by now, that are a
    #: transaction or repeatable. A refusal among the replies is a refusal of all.
    replies: int = 1
    #: Of several replies: they have nothing to do with each other, and `parse` gets refusals too.
    apart: bool = False


class Outcome(NamedTuple, Generic[T]):
    """How one command of several ended: a value, or an error."""

    value: T | None
    error: Exception | None = None

    def result(self) -> T:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Ask(NamedTuple):
    """Effect: say these commands; resumed with one `Outcome` each, in order."""

    commands: Sequence[Command[Any]]
    #: What nodes they name go by (a view of the transport); None to go by what is known then.
    view: Any = None


class Sleep(NamedTuple):
    """Effect: wait this many seconds."""

    seconds: float


class Call(NamedTuple):
    """Effect: call a function; an async driver awaits what an async function returns."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


class Meanwhile(NamedTuple):
    """Effect: call a function, and say commands while it runs; resumed with both results.

    When the call fails its error is raised, and what became of the commands is not told.
    """

    call: Call
    ask: Ask


Effect: TypeAlias = Command[Any] | Ask | Sleep | Call | Meanwhile
Steps: TypeAlias = Generator[Effect, Any, T]


def ask(command: Command[T]) -> Steps[T]:
    """Say one command; its error is raised here."""
    result: T = yield command
    return result


def ask_all(commands: Sequence[Command[T]]) -> Steps[list[Outcome[T]]]:
    """Say several commands in one exchange per node; errors stay in their outcomes."""
    outcomes: list[Outcome[T]] = yield Ask(commands)
    return outcomes


def call(function: Callable[..., Any], *args: Any) -> Steps[Any]:
    """Call a function that may block or be async."""
    return (yield Call(function, args))
