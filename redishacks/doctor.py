"""What would hurt a counter or a router: looked up, judged and explained.

    for finding in examine(job):                     # or examine_router(router)
        print(finding.level, finding.what, finding.why, finding.do)

It only reads: Redis' INFO, two settings, the state of the counter and whether there are time series
beside it, and in SQL what a flush would look at before it claims; of a router's nodes also what
they have stored of it, and what our user may say. The judgements are functions of what was read,
without I/O. The command line's `redishacks doctor` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from redishacks._command import Command
from redishacks._drive import Transport, drive
from redishacks.counters import FlushJob
from redishacks.counters.commands import State
from redishacks.errors import (
    RedisHacksError,
    SchemaError,
    ServerError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from redishacks.router import Router
    from redishacks.router.health import State as Nodes

#: Seconds after which unflushed hits mean that nobody flushes; cron's pause is a minute.
LATE = 600.0

_OLDEST = (6, 2)

#: Keys of time series, and in how many thousands of keys we look for one.
_SERIES = "*:t1:{*}:s:*"
_PAGES = 10
#: Fields of a TopSeries' bucket at most: 200 members, one more before they are cut, and their sum.
_TOP_FIELDS = 202


#: By how much the fullest node may have more keys than its share, and from how many keys on that is
#: no chance.
_SKEW, _ENOUGH = 1.5, 1_000
#: Seconds that an exchange with a router's nodes may take.
_DEADLINE = 2.0

T = TypeVar("T")


class Level(StrEnum):
    """How bad a finding is."""

    FINE = "fine"
    #: Loses no hit that is on its way to SQL; worth knowing.
    WARNING = "warning"
    WRONG = "wrong"
    #: It could not be looked at.
    UNKNOWN = "unknown"


class Finding(NamedTuple):
    """One check: what was found, why it hurts, what to do."""

    check: str
    level: Level
    what: str
    why: str = ""
    do: str = ""


class ServerFacts(NamedTuple):
    """What a server says of itself."""

    info: Mapping[str, str]
    #: When it writes RDB snapshots; None when it does not tell.
    save: str | None
    #: Whether keys of time series were seen; None when it does not tell.
    series: bool | None = None
    #: How many fields a hash may have that is kept compact; None when it does not tell.
    hash_entries: int | None = None


def examine(job: FlushJob) -> list[Finding]:
    """Check a job's Redis servers, its counter, its client and its database.

    A check that cannot be made is a finding too (`Level.UNKNOWN`); errors are not raised.
    """
    findings = judge_client(retries_of(job.counter.client))
    states: list[State] = []
    try:
        findings += judge_layout(job)
        states = _states(job)
        for facts in _servers(job, states):
            findings += judge_server(facts)
        findings += judge_counter(states, job.sink.destination())
    except RedisHacksError as error:
        findings.append(_not_seen("redis", error))
    return findings + _database(job, states)


# Looking


def judge_layout(job: FlushJob) -> list[Finding]:
    """See whether everybody means the same keys, and whether anybody has counted at all."""
    try:
        known = drive(job.layout.check(), job.counter.transport, job.counter.deadline)
    except UsageError as error:
        return [
            Finding(
                "layout",
                Level.WRONG,
                str(error),
                "this job sees only a part of the counter, and its flushes are refused",
                "say the same partitions and columns everywhere",
            )
        ]
    if known:
        return [Finding("layout", Level.FINE, "partitions and columns are those of its producers")]
    return [
        Finding(
            "layout",
            Level.WARNING,
            f"nobody has counted in {job.layout.full_name} yet",
            "a counter under a mistyped name looks idle",
            "compare the name and the prefix with those of the producers",
        )
    ]


def _states(job: FlushJob) -> list[State]:
    outcomes = job.counter.transport.run(job.layout.states(), job.counter.deadline)
    return [outcome.result() for outcome in outcomes]


def _servers(job: FlushJob, states: Sequence[State]) -> list[ServerFacts]:
    """Ask every server that holds a partition, each once."""
    found: dict[str, ServerFacts] = {}
    for state in states:
        key = job.layout.state(state.partition).keys[:1]
        info = _say(job, Command(("INFO",), key, _info, repeatable=True, bulk=True))
        name = info.get("run_id", "")
        if name not in found:
            save = _configured(job, key, "save")
            # Its name has a ziplist in it before Redis 7, and both names work since.
            entries = _configured(job, key, "hash-max-*-entries")
            found[name] = ServerFacts(
                info, save, _has_series(job, key), None if entries is None else int(entries)
            )
    return list(found.values())


def _configured(job: FlushJob, key: tuple[bytes, ...], name: str) -> str | None:
    try:
        return _say(job, Command(("CONFIG", "GET", name), key, _setting, repeatable=True))
    except ServerError:  # no right to ask, as on many managed servers
        return None


def _has_series(job: FlushJob, key: tuple[bytes, ...]) -> bool | None:
    """Look for keys of time series on a server: in some thousands of keys, not in millions."""

    def page(reply: Any) -> tuple[bytes, bool]:
        return reply[0], bool(reply[1])

    cursor = b"0"
    try:
        for _ in range(_PAGES):
            words = ("SCAN", cursor, "MATCH", _SERIES, "COUNT", "1000")
            cursor, seen = _say(job, Command(words, key, page, repeatable=True, bulk=True))
            if seen or cursor == b"0":
                return seen
    except ServerError:
        return None
    return False


def _say(job: FlushJob, command: Command[T]) -> T:
    return job.counter.transport.call(command, job.counter.deadline)


def _info(reply: bytes | str) -> dict[str, str]:
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else reply
    fields = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value for name, _, value in fields}


def _setting(reply: Any) -> str | None:
    """Read CONFIG GET of one setting: a flat list in RESP2, a map in RESP3."""
    values = list(reply.values()) if isinstance(reply, dict) else reply[1::2]
    return values[0].decode() if values else None


def retries_of(client: Any) -> int:
    """Return how often a redis-py client repeats a command whose reply was lost."""
    asked = getattr(client, "get_connection_kwargs", dict)
    options: Mapping[str, Any] = asked()
    # A cluster client has a policy of its own, and keeps it out of its connections' options.
    retry = getattr(client, "retry", None) or options.get("retry")
    if retry is not None:
        return int(retry.get_retries())
    return 1 if options.get("retry_on_timeout") or options.get("retry_on_error") else 0


def _database(job: FlushJob, states: Sequence[State]) -> list[Finding]:
    try:
        begun = job.sink.begin(job.layout.columns.rules)
        dead = job.sink.dead_count(job.layout.full_name)
    except SchemaError as error:
        return [
            Finding(
                "database",
                Level.WRONG,
                str(error),
                "every flush ends with exit code 78, and hits pile up in Redis",
                error.ddl.strip(),
            )
        ]
    except RedisHacksError as error:
        return [_not_seen("database", error)]
    return [
        Finding("database", Level.FINE, "tables, columns and grants are there"),
        *judge_ledger(states, begun.ledger),
        *judge_dead(dead),
    ]


def _not_seen(check: str, error: RedisHacksError) -> Finding:
    away = isinstance(error, UnavailableError)
    return Finding(check, Level.UNKNOWN if away else Level.WRONG, str(error))


# Judging


def judge_client(retries: int) -> list[Finding]:
    """Judge the client that the counter was given."""
    if retries < 1:
        return [Finding("client", Level.FINE, "repeats nothing by itself")]
    return [
        Finding(
            "client",
            Level.WARNING,
            f"repeats a command up to {retries} times when its reply is lost, as redis-py does "
            "by default",
            "redishacks does not use these retries, but an INCR or ZINCRBY of your own through "
            "this client can count twice, with no error shown",
            "make it with retry=Retry(NoBackoff(), 0) where you write with it, or count with "
            "redishacks only",
        )
    ]


def judge_server(facts: ServerFacts) -> list[Finding]:
    """Judge a server's version, eviction and persistence, and whether it suits time series."""
    info = facts.info
    found = [_version(info), _eviction(info), _persistence(info, facts.save)]
    if facts.series:
        found += [_series_eviction(info), _series_memory(facts.hash_entries)]
    return found


def _version(info: Mapping[str, str]) -> Finding:
    version = info.get("redis_version", "0")
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {version}"
    if _numbers(version) >= _OLDEST:
        return Finding("version", Level.FINE, name)
    return Finding(
        "version",
        Level.WRONG,
        f"{name} is older than 6.2",
        "it lacks commands that a flush needs, such as ZMSCORE",
        "move to Redis 6.2 or later, or to Valkey",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _eviction(info: Mapping[str, str]) -> Finding:
    policy = info.get("maxmemory_policy", "noeviction")
    limited = info.get("maxmemory", "0") != "0"
    if not (limited and policy.startswith("allkeys-")):
        # Keys with counts have no TTL, which the volatile policies leave alone.
        return Finding("eviction", Level.FINE, f"{policy} drops no pending key")
    return Finding(
        "eviction",
        Level.WRONG,
        f"maxmemory-policy is {policy}, with a memory limit",
        "when memory is short, Redis drops pending hits as if they were cached copies",
        "CONFIG SET maxmemory-policy noeviction (or volatile-lru, which spares keys without a "
        "TTL), or keep counters on a server of their own",
    )


def _series_eviction(info: Mapping[str, str]) -> Finding:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy == "noeviction" or info.get("maxmemory", "0") == "0":
        return Finding("series eviction", Level.FINE, f"{policy} drops no bucket of a time series")
    return Finding(
        "series eviction",
        Level.WARNING,
        f"maxmemory-policy is {policy}, with a memory limit, and there are time series",
        "when memory is short, Redis drops buckets before their retention is over: sums are then "
        "too low, and cannot tell",
        "CONFIG SET maxmemory-policy noeviction, or keep time series on a server of their own",
    )


def _series_memory(hash_entries: int | None) -> Finding:
    check = "series memory"
    if hash_entries is None:
        return Finding(check, Level.FINE, "the server does not tell how it keeps hashes")
    if hash_entries >= _TOP_FIELDS:
        what = f"hashes are kept compact up to {hash_entries:,} fields, enough for a TopSeries"
        return Finding(check, Level.FINE, what)
    return Finding(
        check,
        Level.WARNING,
        f"hashes are kept compact up to {hash_entries:,} fields only, and there are time series",
        "a bucket of a TopSeries has up to 201 fields, and takes about three times the memory; "
        "other kinds of series are strings, which this does not touch",
        "CONFIG SET hash-max-listpack-entries 512 (hash-max-ziplist-entries before Redis 7); 512 "
        "is Redis' own default",
    )


def _persistence(info: Mapping[str, str], save: str | None) -> Finding:
    aof = info.get("aof_enabled") == "1"
    failing = [
        name
        for name in ("aof_last_write_status", "rdb_last_bgsave_status")
        if info.get(name, "ok") != "ok" and (aof or name.startswith("rdb"))
    ]
    if failing:
        return Finding(
            "persistence",
            Level.WRONG,
            f"the last write to disk failed ({', '.join(failing)})",
            "a restart of Redis loses the hits that are not yet in SQL",
            "see Redis' own log; a full disk is the usual cause",
        )
    if aof or save:
        return Finding("persistence", Level.FINE, "AOF is on" if aof else f"RDB: save {save}")
    if save is None:
        return Finding("persistence", Level.FINE, "AOF is off; the server does not tell about RDB")
    return Finding(
        "persistence",
        Level.WRONG,
        "nothing is written to disk: AOF is off and `save` is empty",
        "a restart of Redis loses all hits that are not yet in SQL",
        "CONFIG SET appendonly yes (loses a second at most), or set `save`",
    )


def judge_counter(states: Sequence[State], destination: str) -> list[Finding]:
    """Judge where a counter stands."""
    now = max(state.now for state in states)
    waiting = _age(now, (state.since for state in states))
    claimed = _age(now, (at for state in states for at in state.batches.values()))
    return [
        _late(
            "pending",
            waiting,
            "hits wait",
            "is cron running? A line such as\n"
            "* * * * * redishacks flush myapp.counters:jobs --every 10 --for 60",
        ),
        _late(
            "batches",
            claimed,
            "a claimed batch waits",
            "run `redishacks flush` by hand: it finishes it, or says why it cannot",
        ),
        *(
            Finding(
                "destination",
                Level.WRONG,
                f"the counter flushes to {state.destination}, and this job to {destination}",
                "a flush by this job is refused, since the other one's ledger knows what is done",
                "correct the job, or call its rebind() once the batches in flight are done",
            )
            for state in states[:1]
            if state.destination not in (None, destination)
        ),
    ]


def judge_ledger(states: Sequence[State], ledger: str) -> list[Finding]:
    """Judge whether a job's ledger is the one that the counter is bound to."""
    if all(state.ledger in (None, ledger) for state in states):
        return []
    return [
        Finding(
            "ledger",
            Level.WRONG,
            "the counter is bound to another ledger than the one this job writes to: that of "
            "another database, or the rows of this one have been deleted since",
            "a flush by this job is refused: it could apply again what has been applied",
            "correct the job's database, or put the ledger's rows back; when neither will do, "
            "call the job's rebind(), and rebind(bury=True) when it says that batches are in "
            "flight",
        )
    ]


def _age(now: int, moments: Iterable[int | None]) -> float | None:
    known = [moment for moment in moments if moment is not None]
    return (now - min(known)) / 1e6 if known else None


def _late(check: str, age: float | None, what: str, do: str) -> Finding:
    if age is None or age <= LATE:
        return Finding(check, Level.FINE, f"nothing waits longer than {LATE / 60:.0f} minutes")
    return Finding(
        check,
        Level.WRONG,
        f"{what} to be written since {age / 60:.0f} minutes",
        "SQL shows old figures, and Redis' memory grows",
        do,
    )


def judge_dead(count: int) -> list[Finding]:
    """Judge the dead letters."""
    if not count:
        return [Finding("dead letters", Level.FINE, "none")]
    return [
        Finding(
            "dead letters",
            Level.WRONG,
            f"{count:,} amounts were refused by the database and wait for you",
            "they are missing in the table",
            "`redishacks dead` lists them with the reasons; `--retry` applies them again",
        )
    ]


# Routers


def examine_router(router: Router) -> list[Finding]:
    """Check a router's nodes, and whether they agree.

    A check that cannot be made is a finding too (`Level.UNKNOWN`); errors are not raised.
    """
    from redishacks.router.health import observer

    try:
        if router.redishacks_transport.sharded:
            balance = router.balance()
            away = [_not_seen(f"node {n.name}", n.error) for n in balance.nodes if n.error]
            return away + judge_skew(balance.skew, sum(node.keys for node in balance.nodes))
        transport = observer(router._nodes())
        try:
            return _nodes(router, transport)
        finally:
            transport.close()
    except RedisHacksError as error:
        return [_not_seen("nodes", error)]


def _nodes(router: Router, transport: Transport) -> list[Finding]:
    from redishacks.router.health import forbidden, look

    nodes = router._nodes()
    state = drive(look(nodes), transport, _DEADLINE)
    findings = [
        _not_seen(f"node {node.name}", node.error)
        for node in state.nodes
        if node.error is not None and node.name in nodes.names
    ]
    findings += judge_topology(state)
    alive = [node for node in state.nodes if node.error is None]
    infos = {node.name: node.info for node in alive}
    saves = {name: _saves(transport, nodes.open(name)) for name in infos}
    findings += _merged({name: _version(info) for name, info in infos.items()})
    findings += judge_versions(infos)
    findings += _merged({name: judge_node_eviction(info) for name, info in infos.items()})
    findings += _merged(
        {name: judge_node_persistence(info, saves[name]) for name, info in infos.items()}
    )
    findings += _merged(
        {name: judge_rights(drive(forbidden(nodes, name), transport, _DEADLINE)) for name in infos}
    )
    keys = sum(node.keys for node in state.balance.nodes)
    return findings + judge_skew(state.balance.skew, keys)


def _saves(transport: Transport, node: tuple[str, int]) -> str | None:
    command = Command(("CONFIG", "GET", "save"), (), _setting, repeatable=True, node=node)
    try:
        return transport.call(command, _DEADLINE)
    except ServerError:
        return None


def _merged(found: Mapping[str, Finding]) -> list[Finding]:
    """Say once what is the same of several nodes."""
    names: dict[Finding, list[str]] = {}
    for name, finding in found.items():
        names.setdefault(finding, []).append(name)
    return [
        finding._replace(what=f"node{'s' * (len(some) > 1)} {', '.join(some)}: {finding.what}")
        for finding, some in names.items()
    ]


def judge_topology(state: Nodes) -> list[Finding]:
    """Judge whether a router's nodes agree on who has which keys, and whether keys are moving."""
    from redishacks.router.health import moving

    check = "topology"
    found = [
        Finding(
            check,
            Level.WRONG,
            what,
            "clients refuse, or wait for, nodes that do not say the same",
            "see `redishacks nodes status`",
        )
        for what in state.wrong
    ]
    if found or state.topology is None:
        return found
    what = f"version {state.topology.version}, {moving(state.topology)}"
    if not state.mover:
        return [Finding(check, Level.FINE, what)]
    return [
        Finding(
            check,
            Level.WARNING,
            what,
            "each key that is asked for is moved first, which takes two more round trips",
            "wait for `redishacks reshard` to come to its end",
        )
    ]


def judge_versions(infos: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Judge whether all nodes are of one version."""
    versions = {name: _version(info).what.removesuffix(" is older than 6.2")
                for name, info in infos.items()}  # fmt: skip
    if len(set(versions.values())) <= 1:
        return [Finding("versions", Level.FINE, "all nodes have the same")]
    return [
        Finding(
            "versions",
            Level.WARNING,
            ", ".join(f"node {name} is {version}" for name, version in versions.items()),
            "what a newer server writes out an older one cannot read: keys then move only one way, "
            "and not back",
            "bring all nodes to the newest of these",
        )
    ]


def judge_node_eviction(info: Mapping[str, str]) -> Finding:
    """Judge whether a router's node may drop what it knows of the router."""
    policy = info.get("maxmemory_policy", "noeviction")
    if not policy.startswith("allkeys-"):
        return Finding("eviction", Level.FINE, f"{policy} drops no stamp")
    limited = info.get("maxmemory", "0") != "0"
    return Finding(
        "eviction",
        Level.WRONG if limited else Level.WARNING,
        f"maxmemory-policy is {policy}, {'with a' if limited else 'as yet without a'} memory limit",
        "when memory is short, Redis drops also the stamp by which the node knows what it is, and "
        "the node serves nothing until it was told again",
        "CONFIG SET maxmemory-policy volatile-lru, which spares keys without a TTL, or noeviction",
    )


def judge_node_persistence(info: Mapping[str, str], save: str | None) -> Finding:
    """Judge whether a router's node comes back with its keys."""
    found = _persistence(info, save)
    if found.level is Level.FINE:
        return found
    failing = "failed" in found.what
    return found._replace(
        level=Level.WRONG if failing else Level.WARNING,
        why="a node that is restarted comes back empty: its keys are lost",
        do=found.do if failing else f"{found.do}; for a cache it may be what you want",
    )


def judge_rights(forbidden: Sequence[str]) -> Finding:
    """Judge whether our user may say what moving keys takes."""
    if not forbidden:
        return Finding("rights", Level.FINE, "our user may see and end connections")
    rights = " ".join(f"+{words.lower().replace(' ', '|')}" for words in forbidden)
    return Finding(
        "rights",
        Level.WRONG,
        f"our user may not say {', '.join(forbidden)}",
        "whoever moves keys must see and end the connections that go by what was before: "
        "`reshard` and `eject` fail without",
        f"ACL SETUSER … {rights}",
    )


def judge_skew(skew: float, keys: int) -> list[Finding]:
    """Judge how evenly the keys are spread."""
    check = "skew"
    if keys < _ENOUGH:
        return [Finding(check, Level.FINE, f"{keys:,} keys are too few to tell")]
    what = f"the fullest node has {skew:.2f} times its share of the keys"
    if skew <= _SKEW:
        return [Finding(check, Level.FINE, what)]
    return [
        Finding(
            check,
            Level.WARNING,
            what,
            "it is full, and busy, before the others are; often one hash tag has many keys",
            "see `redishacks nodes status`; spread the keys over more tags, or change the weights",
        )
    ]
