"""What a router says to its nodes about themselves. No I/O here.

On every node:

    rh:r1:{router}:node              hash    version, stamp, topology; no TTL: it says who has which
                                             keys
    rh:r1:{router}:mover             string  token of who moves keys; TTL 10 s, renewed
    rh:r1:{router}:taken:<version>   set     names of keys that were taken in the move that began
                                             with a version; no TTL: dropped when it has ended
    rh:r1:{router}:given:<version>   set     names of keys that are aside; no TTL: the same
    rh:r1:{router}:aside:<key>       any     a key that is being moved away; TTL of the key
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from redishacks import _keys
from redishacks._command import Arg, Command, script
from redishacks._transport import Address
from redishacks.router.topology import Stamp, Topology

#: The tool's letter and the version of its keys.
TOOL = "r1"

#: A node's own stamp and topology; None for a node that nobody has used yet.
Stored = tuple[Stamp, Topology] | None


class Gift(NamedTuple):
    """What a node had of a key."""

    key: bytes
    dump: bytes
    #: Milliseconds to live, -1 for ever.
    pttl: int


class Given(NamedTuple):
    """What a node had of several keys, and how many of them it has looked at."""

    gifts: list[Gift]
    looked: int


class Layout:
    """Keys and commands of one router."""

    def __init__(self, prefix: str) -> None:
        self._prefix = _keys.check_name(prefix, "prefix")
        self._node = self._key("node")
        self._mover = self._key("mover")
        #: How the names begin of keys that are set aside.
        self.aside_prefix = self._key("aside") + b":"

    def _key(self, *rest: str) -> bytes:
        return _keys.make(self._prefix, TOOL, "router", *rest)

    def visible(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return keys as users know them: none of our own, and what is aside by its name."""
        own, aside = self._key(""), self.aside_prefix
        return [
            key.removeprefix(aside)
            for key in keys
            if not key.startswith(own) or key.startswith(aside)
        ]

    @property
    def trial(self) -> bytes:
        """A key to try with whether one node reads what another one writes out."""
        return self._key("trial")

    def _given(self, since: int) -> bytes:
        return self._key("given", str(since))

    def _taken(self, since: int) -> bytes:
        return self._key("taken", str(since))

    def _aside(self, key: bytes) -> bytes:
        return self.aside_prefix + key

    @property
    def stamp(self) -> tuple[bytes, ...]:
        """The words that read a node's stamp."""
        return b"HGET", self._node, b"stamp"

    def read(self, address: Address) -> Command[Stored]:
        """Read what a node has stored."""
        args = "HMGET", self._node, "stamp", "topology"
        return Command(args, (self._node,), _stored, repeatable=True, node=address)

    def tell(self, address: Address, topology: Topology, token: str = "") -> Command[Stored]:
        """Tell a node of a topology, unless it knows a newer one; says what it knows then.

        None when it was said with the token of a mover, and that is another one by now.
        """
        args = str(topology.version), str(topology.stamp(address[0])), topology.dump(), token
        keys = self._node, self._mover
        return _whole(Command(args, keys, _stored, script("router_stamp"), True, node=address))

    def flush(self) -> Command[Any]:
        """Drop all keys of a node but those by which it knows what it is."""
        return _whole(Command((), (self._node, self._mover), script=script("router_flush")))

    # Moving

    def claim(
        self, address: Address, token: str, ttl: float, how: str = ""
    ) -> Command[tuple[str, float] | None]:
        """Become the mover on a node, for `ttl` seconds or until it is said again; 0 to give it up.

        `how`: "force" to take it from another one, "renew" only if it is one's own by now. None, or
        who it is, and for how many seconds if that one does nothing; "" for nobody.
        """
        args = token, str(round(ttl * 1000)), how
        keys = (self._mover,)
        return _whole(Command(args, keys, _claimed, script("router_mover"), True, node=address))

    def mover(self, address: Address) -> Command[str | None]:
        """Return the token of who moves keys, as far as a node knows."""
        words = "GET", self._mover
        return Command(words, (self._mover,), _text, repeatable=True, node=address)

    def present(self, address: Address, key: bytes, *, aside: bool = False) -> Command[bool]:
        """Return whether a node has a key, or has set it aside."""
        key = self._aside(key) if aside else key
        return Command(("EXISTS", key), (key,), bool, repeatable=True, node=address)

    def begin(self, address: Address, since: int, token: str) -> Command[bool]:
        """Let a node give and take keys in a move; False when somebody else is the mover."""
        keys = self._mover, self._given(since), self._taken(since)
        command = Command((token,), keys, bool, script("router_begin"), True, node=address)
        return _whole(command)

    def begun(self, address: Address, since: int) -> Command[bool]:
        """Return whether a node still knows what was given and taken."""
        keys = self._given(since), self._taken(since)
        return Command(("EXISTS", *keys), keys, _both, repeatable=True, node=address)

    def given(self, address: Address, since: int) -> Command[list[bytes] | None]:
        """Return the names of what is aside on a node, and perhaps not taken; None when it has lost
        what it knew of that.
        """
        key = self._given(since)
        return Command(("SMEMBERS", key), (key,), _names, repeatable=True, node=address)

    def end(self, address: Address, since: int) -> Command[int]:
        """Let a node forget what was given and taken: nobody can do that again."""
        keys = self._given(since), self._taken(since)
        return Command(("UNLINK", *keys), keys, repeatable=True, node=address)

    def give(
        self, address: Address, keys: Sequence[bytes], since: int, token: str = "", most: str = ""
    ) -> Command[Given | None]:
        """Set keys aside on a node that had them, up to `most` bytes; says what they hold.

        None when the node has lost what it knew of the move; or when it was said with the token of
        a mover, and that is another one by now.
        """
        pairs = itertools.chain.from_iterable((key, self._aside(key)) for key in keys)

        def parse(reply: list[Any]) -> Given | None:
            if not reply:
                return None
            count = len(reply) // 2
            three = zip(keys[:count], reply[::2], reply[1::2], strict=True)
            gifts = [Gift(key, dump, pttl) for key, dump, pttl in three if dump is not None]
            return Given(gifts, count)

        command = Command[Any](
            (token, most),
            (self._mover, self._given(since), *pairs),
            parse,
            script("router_give"),
            True,
            node=address,
        )
        return _whole(command)

    def take(
        self, address: Address, gifts: Sequence[Gift], since: int, token: str = ""
    ) -> Command[bool]:
        """Make keys on a node, each at most once in a move; False when that may not be."""
        keys = self._mover, self._taken(since), *(gift.key for gift in gifts)
        args: list[Arg] = [token]
        for gift in gifts:
            args += gift.dump, str(gift.pttl)
        command = Command(tuple(args), keys, bool, script("router_take"), True, node=address)
        return _whole(command)

    def forget(self, address: Address, keys: Sequence[bytes], since: int) -> Command[int]:
        """Drop what was set aside: it was taken."""
        aside = self._given(since), *map(self._aside, keys)
        return _whole(Command(tuple(keys), aside, int, script("router_forget"), True, node=address))

    def scan(
        self, address: Address, cursor: bytes, count: int
    ) -> Command[tuple[bytes, list[bytes]]]:
        """Read some of a node's keys, with the names that those had which are set aside."""

        def parse(reply: tuple[bytes, list[bytes]]) -> tuple[bytes, list[bytes]]:
            cursor, keys = reply
            return cursor, self.visible(keys)

        args = "SCAN", cursor, "COUNT", str(count)
        return Command(args, (), parse, repeatable=True, node=address)

    def clients(self, address: Address) -> Command[list[Client]]:
        """List the connections of a node that go by some version."""
        return Command(("CLIENT", "LIST"), (), _clients, repeatable=True, node=address)

    def wake(self, address: Address, client: Client) -> Command[Any]:
        """End what a connection waits for, as if its time were over."""
        return Command(("CLIENT", "UNBLOCK", str(client.id)), (), repeatable=True, node=address)

    def kill(self, address: Address, client: Client) -> Command[Any]:
        """End a connection."""
        words = "CLIENT", "KILL", "ID", str(client.id)
        return Command(words, (), repeatable=True, node=address)


def _both(count: int) -> bool:
    return count == 2


def _names(members: Iterable[bytes]) -> list[bytes] | None:
    members = set(members)
    return [member[1:] for member in members if member] if b"" in members else None


class Client(NamedTuple):
    """A connection that goes by some version."""

    id: int
    version: int
    blocked: bool
    db: int


def _whole(command: Command[Any]) -> Command[Any]:
    """Return a command that carries its script: in the middle of others there is no second try."""
    assert command.script is not None
    head: tuple[Arg, ...] = ("EVAL", command.script.source, str(len(command.keys)))
    return command._replace(args=(*head, *command.keys, *command.args), script=None)


def _claimed(reply: list[Any]) -> tuple[str, float] | None:
    return None if reply[0] else (reply[1].decode(), max(0, reply[2]) / 1000)


def _text(reply: bytes | None) -> str | None:
    return None if reply is None else reply.decode(errors="replace")


def _clients(reply: bytes) -> list[Client]:
    found = []
    for line in reply.decode("utf-8", "replace").splitlines():
        fields = dict(field.partition("=")[::2] for field in line.split(" "))
        version = fields.get("name", "").removeprefix("rh-")
        if version.isdigit() and fields["name"] != version:
            blocked = "b" in fields.get("flags", "")
            found.append(Client(int(fields["id"]), int(version), blocked, int(fields["db"])))
    return found


def _stored(reply: list[bytes | None]) -> Stored:
    if not reply:
        return None
    stamp, topology = reply
    if stamp is None or topology is None:
        return None
    return Stamp.parse(stamp), Topology.load(topology)
