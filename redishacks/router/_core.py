"""What both colours of a router share: how a call becomes commands, and how a batch is settled."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hiredis import ReplyError

from redishacks._command import Arg, Ask, Command, Outcome, Steps, ask, ask_all, call
from redishacks._keys import id_shown
from redishacks._slots import at_slots, key_slot, key_slots
from redishacks._transport import AsyncTransport, Overtaken, SyncTransport, View
from redishacks.errors import (
    MaybeAppliedError,
    PartlyAppliedError,
    RedisHacksError,
    UnavailableError,
    UsageError,
)
from redishacks.router import _coalesce
from redishacks.router._coalesce import GET, MGET, OTHER, SET, SUMS, Call, Run
from redishacks.router._dialect import Dialect
from redishacks.router._keyspecs import KeySpecs
from redishacks.router.replies import PENDING, Results

#: Calls that are split over nodes: kind, and whether they write.
_SPLIT = {b"MGET": MGET, b"MSET": SET, **{kind.encode(): kind for kind in SUMS}}
#: What any node may be asked.
_ANYWHERE = {b"PING", b"ECHO", b"TIME", b"COMMAND", b"EVAL", b"EVAL_RO"}
#: What changes a connection for those who use it next; moves know it by its name.
_STATEFUL = frozenset(
    b"WATCH UNWATCH MULTI EXEC DISCARD SELECT AUTH HELLO RESET QUIT MONITOR SUBSCRIBE PSUBSCRIBE "
    b"SSUBSCRIBE UNSUBSCRIBE PUNSUBSCRIBE SUNSUBSCRIBE ASKING READONLY READWRITE SYNC PSYNC".split()
)
_CLIENT = frozenset(b"SETNAME REPLY TRACKING CACHING CAPA NO-EVICT NO-TOUCH".split())
_COMMAND: Command[Any] = Command(("COMMAND",), repeatable=True, bulk=True)

#: Seconds for learning who has which keys.
_LEARNING = 1.0

#: How a call of redis-py's is recorded: its words, and what makes its value of the reply.
Said = tuple[tuple[bytes, ...], Callable[[Any], Any]]


#: What redis-py says of a call besides its words, and has no part in reading the reply.
_KEYS_ALONE = {"keys"}


class Form(NamedTuple):
    """How a command is said whose only key is its first argument."""

    word: bytes
    #: How many words it has.
    least: int
    most: int
    parse: Callable[[Any], Any]
    reads: bool


class Core:
    """Calls of redis-py's, as commands for nodes."""

    def __init__(self, transport: SyncTransport | AsyncTransport, dialect: Dialect) -> None:
        assert transport.routes is not None
        self.transport = transport
        self.routes = transport.routes
        self.dialect = dialect
        self.specs: KeySpecs | None = None
        self._forms: dict[str, Form] = {}

    def learn(self) -> Steps[None]:
        """See that it is known who has which keys."""
        if self.routes.view is None:
            yield from call(self.transport.learn, _LEARNING)

    def say(self, args: Sequence[Any], options: Mapping[str, Any]) -> Said:
        """Return a call as it is said and heard; raises `UsageError`."""
        if type(args[0]) is Command:
            return tuple(map(self.dialect.encode, spelled(args[0]).args)), args[0].parse
        words = self.dialect.words(args)
        name = words[0].upper()
        if name in _STATEFUL or (
            name == b"CLIENT" and len(words) > 1 and words[1].upper() in _CLIENT
        ):
            shown = b" ".join(words[: 1 + (name == b"CLIENT")]).decode()
            raise UsageError(f"{shown} would change a connection that others use as well")
        return words, self.dialect.parse(args[0], options)

    def quick(self, args: Sequence[Any], options: Mapping[str, Any]) -> Command[Any] | None:
        """Return a call as one command, if that can be done in a moment: most have one key."""
        name = args[0]
        form = self._forms.get(name)
        if form is None:
            if self.specs is not None:
                self._learn_form(name)
            return None
        word, least, most, parse, reads = form
        if not least <= len(args) <= most or (options and options.keys() != _KEYS_ALONE):
            return None
        encode = self.dialect.encode
        key = encode(args[1])
        words = (word, key) if len(args) == 2 else (word, key, *map(encode, args[2:]))
        return Command(words, (key,), parse, None, reads)

    def _learn_form(self, name: str) -> None:
        """Take note of how a command is said that has one key, as its first argument."""
        assert self.specs is not None
        word = name.encode()
        bounds = self.specs.bounds(word)
        if bounds is not None and word not in _SPLIT and word.upper() not in _STATEFUL:
            parse = self.dialect.parse(name, {})
            reads = self.specs.is_read_only((word,) * bounds[0])
            self._forms[name] = Form(word, *bounds, parse, reads)

    def together(self, keys: Sequence[bytes]) -> None:
        """Raise `CrossNodeError` unless all keys are on one node."""
        if self.routes.view is not None:
            self.routes.view.route(keys)

    def run(self, said: Said) -> Steps[Any]:
        """Say a call, whatever it takes; returns its value or raises its error."""
        words, parse = said
        kind = _SPLIT.get(words[0].upper())
        if words == (b"MGET",):
            return []  # so does redis-py
        if kind is not None and len(words) > 1:
            return (yield from self._split(kind, words, parse))
        return (yield from ask((yield from self.command(said))))

    def call(self, said: Said) -> Steps[Call]:
        """Return a call as a part of a batch; raises `UsageError`."""
        words, parse = said
        if words[0] == b"GET" and len(words) == 2:
            return Call(GET, Command(words, words[1:], parse, None, True))
        if words[0] == b"SET" and len(words) == 3:
            return Call(SET, Command(words, words[1:2], parse), words[2])
        return Call(OTHER, (yield from self.command(said)))

    def _learn_specs(self) -> Steps[None]:
        """Ask what is a key in which command."""
        (outcome,) = yield from ask_all([_COMMAND])
        if isinstance(outcome.error, UnavailableError) and self.routes.view is not None:
            (outcome,) = yield from ask_all([_COMMAND])  # of a node that answers
        reply = outcome.result()
        if self.specs is None:  # many may have asked at once, and it takes a while to read
            self.specs = KeySpecs(reply)

    def command(self, said: Said) -> Steps[Command[Any]]:
        """Return a call as one command; asks a node which of its words are keys, if it must."""
        words, parse = said
        if self.specs is None:
            yield from self._learn_specs()
        specs = self.specs
        assert specs is not None
        keys = specs.keys(words)
        if keys is None:
            question = Command[Any]((b"COMMAND", b"GETKEYS", *words), repeatable=True)
            (outcome,) = yield from ask_all([question])
            if isinstance(outcome.error, UnavailableError):
                raise outcome.error
            keys = specs.learn(words, outcome.error or outcome.value or [])
        if not keys and words[0].upper() not in _ANYWHERE:
            name = words[0].decode(errors="replace")
            raise UsageError(
                f"{name}: no key says which node it is for; fanout() is for all, or for some"
            )
        return Command(words, tuple(keys), parse, None, specs.is_read_only(words))

    def _split(
        self, kind: str, words: tuple[bytes, ...], parse: Callable[[Any], Any]
    ) -> Steps[Any]:
        """Say a call for several keys to the nodes that have them."""
        keys, calls = words[1:], dict[int, Call]()
        values: Sequence[bytes] = ()
        if kind is SET:
            keys, values = words[1::2], words[2::2]
            if len(keys) != len(values):
                raise UsageError("MSET: each key needs a value")
        results = Results()
        results.begin(len(keys))
        if kind is SET:
            for place, (key, value) in enumerate(zip(keys, values, strict=True)):
                calls[place] = Call(SET, Command((b"SET", key, value), (key,)), value)
        elif kind is MGET:
            for place in (yield from self.settle_gets(keys, results)):
                key = keys[place]
                calls[place] = Call(MGET, Command((kind, key), (key,), _first, None, True))
        else:
            for place, key in enumerate(keys):
                reads = kind == "EXISTS"
                calls[place] = Call(kind, Command((kind, key), (key,), int, None, reads))
        yield from self.settle(calls, results)
        failed = {id_shown(keys[place]): error for place, error in results.errors.items()}
        if failed:
            doubts = [e for e in results.errors.values() if isinstance(e, MaybeAppliedError)]
            first = next(iter(doubts or results.errors.values()))
            if len(results.errors) == len(keys) or kind is MGET or kind == "EXISTS":
                raise first
            raise PartlyAppliedError(
                f"{words[0].decode()}: {len(failed)} of {len(keys)} keys are not surely done; the "
                f"first: {first}",
                failed,
            )
        if kind is SET:
            return parse(b"OK")
        return parse(results.values if kind is MGET else sum(results.values))

    # Batches

    def settle_gets(self, keys: Sequence[bytes], results: Results) -> Steps[Sequence[int]]:
        """Settle a batch of nothing but GETs, given as keys, in one exchange with each node.

        Returns the places of those that must be said in another way: all, when it cannot be so.
        """
        every = range(len(keys))
        view = self.routes.view
        if view is None or view.table is None or not view.settled or self.routes.stale:
            return every
        nodes, by_slot = view.table
        # Nodes of a cluster take several keys of one slot, and no others.
        merges = view.version > 0
        if not merges and 2 * len(set(key_slots(keys))) <= len(keys):
            return every
        owners = at_slots(keys, by_slot)
        groups: list[list[bytes]] = [[] for _ in nodes]
        for key, at in zip(keys, owners, strict=True):
            groups[at].append(key)
        asked = {at: some for at, some in enumerate(groups) if some}
        if merges:
            outcomes: list[Outcome[Any]] = yield Ask(
                [_coalesce.gets(some, nodes[at]) for at, some in asked.items()], view
            )
        else:
            outcomes = yield Ask([_coalesce.each_get(some) for some in asked.values()])
        found: list[Iterator[Any]] = [iter(())] * len(nodes)
        failed: dict[int, Exception | None] = {}
        for at, outcome in zip(asked, outcomes, strict=True):
            if outcome.error is None and outcome.value is not None:
                found[at] = iter(outcome.value)
            else:
                found[at] = itertools.repeat(None)
                failed[at] = None if isinstance(outcome.error, Overtaken) else outcome.error
        values = [next(found[at]) for at in owners]
        left = []
        if failed or (not merges and ReplyError in set(map(type, values))):
            for place, at in enumerate(owners):
                error = failed.get(at)
                if error is not None:
                    results.errors[place] = error
                elif at in failed or type(values[place]) is ReplyError:
                    values[place] = PENDING
                    left.append(place)
        if self.dialect.decodes:
            for place, value in enumerate(values):
                try:
                    values[place] = self.dialect.decode(value)
                except UnicodeDecodeError as problem:
                    results.errors[place] = problem
        results.values = values
        results.settled = not left
        return left

    def settle(self, calls: Mapping[int, Call], results: Results) -> Steps[None]:
        """Say calls of a batch, each by its place; when this returns, each has ended."""
        left = calls
        try:
            yield from self.learn()
            while left:
                left = yield from self._round(left, results)
        except RedisHacksError as error:
            # Not one of theirs: none was sent, or all that were have ended.
            for place in left:
                results.errors.setdefault(place, error)
        finally:
            results.end()

    def _round(self, calls: Mapping[int, Call], results: Results) -> Steps[dict[int, Call]]:
        """Say what is left of a batch; returns what was not sent, for who has it has changed."""
        view = self.routes.view
        if view is None or not view.settled or self.routes.stale:
            outcomes = yield from ask_all([each.command for each in calls.values()])
            for place, outcome in zip(calls, outcomes, strict=True):
                results.settle(place, outcome)
            return {}
        groups: defaultdict[Any, list[tuple[int, Call]]] = defaultdict(list)
        merges = view.version > 0
        for place, each in calls.items():
            try:
                node = view.route(each.command.keys)
            except UsageError as error:
                results.errors[place] = error
                continue
            # Nodes of a cluster take several keys of one slot only.
            keys = each.command.keys
            groups[node if merges or not keys else key_slot(keys[0])].append((place, each))
        plans = {group: _coalesce.stages(some) for group, some in groups.items()}
        again: dict[int, Call] = {}
        while plans:
            yield from self._stage(view, plans, calls, results, again)
        return dict(sorted(again.items()))

    def _stage(
        self,
        view: View,
        plans: dict[Any, list[list[Run]]],
        calls: Mapping[int, Call],
        results: Results,
        again: dict[int, Call],
    ) -> Steps[None]:
        """Say the next stage of each node's plan."""
        said = [(group, run) for group, plan in plans.items() for run in plan.pop(0)]
        outcomes = yield from self._ask(
            view, [(group, _coalesce.command(run)) for group, run in said]
        )
        singles: list[tuple[Any, int]] = []
        for (group, run), outcome in zip(said, outcomes, strict=True):
            if isinstance(outcome.error, Overtaken):
                again.update((place, calls[place]) for place in run.places)
            elif _coalesce.singly(run, outcome):
                singles += [(group, place) for place in run.places]
            else:
                self._spread(run, outcome, calls, results)
        if singles:
            outcomes = yield from self._ask(
                view, [(group, calls[place].command) for group, place in singles]
            )
            for (_, place), outcome in zip(singles, outcomes, strict=True):
                if isinstance(outcome.error, Overtaken):
                    again[place] = calls[place]
                else:
                    results.settle(place, outcome)
        for group, plan in list(plans.items()):
            if view.version and plan and self.routes.silent(group):
                # To be told more it would take time that others need.
                for place in (place for stage in plan for run in stage for place in run.places):
                    results.errors[place] = UnavailableError(
                        f"not sent: {self.routes.where(calls[place].command.keys)} did not answer "
                        "to what comes before it"
                    )
                plan.clear()
            if not plan:
                del plans[group]
        if again:  # what follows waits for it
            for plan in plans.values():
                for run in (run for stage in plan for run in stage):
                    again.update((place, calls[place]) for place in run.places)
            plans.clear()

    def _ask(
        self, view: View, said: Iterable[tuple[Any, Command[Any]]]
    ) -> Steps[list[Outcome[Any]]]:
        if view.version == 0:
            commands = [command for _, command in said]
            return (yield from ask_all(commands))
        commands = [command._replace(node=group) for group, command in said]
        outcomes: list[Outcome[Any]] = yield Ask(commands, view)
        return outcomes

    def _spread(
        self, run: Run, outcome: Outcome[Any], calls: Mapping[int, Call], results: Results
    ) -> None:
        if len(run.places) == 1:
            results.settle(run.places[0], outcome)
        elif outcome.error is not None:
            for place in run.places:
                results.errors[place] = outcome.error
        else:
            for place, value in zip(run.places, outcome.value or (), strict=True):
                parse = calls[place].command.parse
                try:
                    results.values[place] = parse([value] if run.kind is MGET else value)
                except Exception as error:
                    results.errors[place] = error


def spelled(command: Command[Any]) -> Command[Any]:
    """Return a script's command that says all of it: it works where nobody can try again."""
    if command.script is None:
        return command
    head: tuple[Arg, ...] = ("EVAL", command.script.source, str(len(command.keys)))
    return command._replace(args=(*head, *command.keys, *command.args), script=None)


def in_order(calls: dict[int, Call]) -> None:
    """Let scripts of a batch be said whole where something follows for one of their slots.

    Else a node that does not know them would do what follows first.
    """
    later: set[int] = set()
    whole: list[int] = []
    for place in reversed(calls):
        command = calls[place].command
        slots = set(map(key_slot, command.keys))
        if command.script is not None and not later.isdisjoint(slots):
            whole.append(place)
        later |= slots
    known: set[tuple[bytes, int]] = set()
    for place in reversed(whole):
        command = calls[place].command
        assert command.script is not None
        here = command.script.sha, key_slot(command.keys[0])
        if here not in known:
            known.add(here)
            calls[place] = calls[place]._replace(command=spelled(command))


def _first(reply: Sequence[Any]) -> Any:
    return reply[0]
