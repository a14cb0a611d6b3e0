"""Processes that flush and count, and meet a fault at a chosen step.

They are children of multiprocessing's fork server, which has imported everything: one starts in a
few milliseconds, and really dies of a SIGKILL.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool  # noqa: F401  (imported here, it need not be in every worker)

from redishacks import _drive
from redishacks._command import Ask, Call, Command
from redishacks.counters import BufferedCounter, FlushJob
from redishacks.errors import (
    MaybeAppliedError,
    PartlyAppliedError,
    RedisHacksError,
    UnavailableError,
)
from redishacks.sinks import PostgresSink, SQLiteSink, _psycopg

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.workers"])


def start(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start a worker."""
    process = _CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def pipe() -> Any:
    """Return both ends of a pipe to a worker."""
    return _CONTEXT.Pipe()


def make_sink(url: str, mode: str = "upsert", table: str = "pages") -> Any:
    """Return a sink of pages for a PostgreSQL URL, or for the path of a SQLite file."""
    kind: Any = PostgresSink if url.startswith("postgresql") else SQLiteSink
    return kind(url, table=table, key="path", columns={"amount": "hits"}, mode=mode)


class Database:
    """A table of pages somewhere, to look into and to empty."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.run("CREATE TABLE pages (path text PRIMARY KEY, hits bigint)")
        sink = make_sink(url)
        sink.create_ledger()
        sink.close()

    @property
    def is_sqlite(self) -> bool:
        """Return which of the two it is."""
        return not self.url.startswith("postgresql")

    def run(self, *statements: str) -> list[Any]:
        """Run statements; return the rows of the last."""
        if not self.is_sqlite:
            with psycopg.connect(self.url, autocommit=True) as db:
                for statement in filter(str.strip, statements):
                    cursor = db.execute(statement)
                return cursor.fetchall() if cursor.description else []
        file = sqlite3.connect(self.url, timeout=10)
        try:
            for statement in filter(str.strip, statements):
                rows = file.execute(statement).fetchall()
            file.commit()
            return rows
        finally:
            file.close()

    def shown(self) -> dict[str, int]:
        """Return what the table shows."""
        return dict(self.run("SELECT path, hits FROM pages"))

    def empty(self) -> None:
        """Begin anew, with a ledger whose identity is not drawn yet."""
        tables = ("pages", "redishacks_dead", "redishacks_ledger")
        self.run(*(f"DELETE FROM {table}" for table in tables))


def flush(
    redis_url: str,
    prefix: str,
    sql_url: str,
    chunk: int,
    at: int,
    action: str,
    pipe: Any,
    mode: str = "upsert",
) -> None:
    """Run one flush; before its step number `at` do `action`; tell how many steps there were.

    Steps are all effects: commands to Redis, calls of the sink, and each statement in it.
    """
    # Five seconds for each of many zombies would make a long test; the rule is the same.
    _psycopg.SETTINGS["idle_in_transaction_session_timeout"] = "'500ms'"
    counted = 0
    real = _drive.perform

    def perform(effect: Any, transport: Any, deadline: float) -> Any:
        nonlocal counted
        counted += 1
        mine = counted
        if mine == at:
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif action == "raise":
                raise RuntimeError("a bug")
            elif action == "meet":
                pipe.send("here")
                pipe.recv()
        result = real(effect, transport, deadline)
        # A lock's answer cannot be lost; nobody would release it.
        if mine == at and action == "lost" and not is_lock(effect):
            raise lost(effect)
        return result

    _drive.perform = perform
    counter = BufferedCounter(redis_url, "hits", prefix=prefix)
    sink = make_sink(sql_url, mode)
    try:
        report: Any = FlushJob(counter, sink, chunk=chunk).run()
    except Exception as error:
        report = f"{type(error).__name__}: {error}"
    pipe.send((counted, report))


def is_lock(effect: Any) -> bool:
    """Return whether an effect takes a lock of this process."""
    return isinstance(effect, Call) and getattr(effect.function, "__name__", "") == "acquire"


def lost(effect: Any) -> Exception:
    """Return the error that says of an effect that its answer was lost."""
    if isinstance(effect, Command | Ask):
        return UnavailableError("the reply was lost")
    assert isinstance(effect, Call)
    if "psycopg" in (getattr(effect.function, "__module__", None) or ""):
        return psycopg.OperationalError("the connection was lost")
    return UnavailableError("the answer was lost")


def flush_for_ever(redis_url: str, prefix: str, sql_url: str, seed: int, table: str) -> None:
    """Flush again and again until killed; what is away comes back."""
    rng = random.Random(seed)
    counter = BufferedCounter(redis_url, "hits", prefix=prefix, deadline=0.5)
    sink = make_sink(sql_url, table=table)
    while True:
        try:
            FlushJob(counter, sink, chunk=rng.choice([3, 10, 50])).run()
        except RedisHacksError:
            time.sleep(0.01)


def produce(redis_url: str, prefix: str, seed: int, linger: float | None, pipe: Any) -> None:
    """Count until told to stop; tell what was acknowledged and what is in doubt."""
    rng = random.Random(seed)
    counter = BufferedCounter(redis_url, "hits", prefix=prefix, linger=linger, deadline=0.3)
    acked = in_doubt = 0
    while not pipe.poll():
        amount = rng.randint(1, 3)
        try:
            if rng.random() < 0.2:
                ids: Any = {f"/{rng.randrange(60)}": amount for _ in range(5)}
                total = amount * len(ids)
                counter.incr_many(ids)
            else:
                total = amount
                counter.incr(f"/{rng.randrange(60)}", amount)
            acked += total
        except MaybeAppliedError:
            in_doubt += total
        except UnavailableError:
            pass
        except PartlyAppliedError as error:
            raise AssertionError("such small calls have one part") from error
        time.sleep(rng.random() * 0.002)
    while True:  # a lingering one must get everything there
        try:
            counter.close()
            break
        except RedisHacksError:
            time.sleep(0.01)
    pipe.send((acked, in_doubt))


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
