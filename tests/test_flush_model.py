"""Claim, chunk, commit, acknowledge and read in every order Hypothesis thinks of."""

from __future__ import annotations

import secrets
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from redishacks import _drive
from redishacks.counters import BufferedCounter, FlushJob
from redishacks.errors import UnavailableError
from tests.helpers import MemorySink

IDS = ["a", "b", "c", "d", "e"]


def machine(url: str) -> type[RuleBasedStateMachine]:
    """Make the machine that uses this server."""

    class Flushing(RuleBasedStateMachine):
        """Hits, flushers that stop anywhere, and readers, one effect at a time."""

        def __init__(self) -> None:
            super().__init__()
            self.counter = BufferedCounter(url, "hits", prefix=f"rh-{secrets.token_hex(6)}")
            self.sink = MemorySink()
            self.truth = dict.fromkeys(IDS, 0)
            self.flushers: list[list[Any]] = []
            self.readers: list[list[Any]] = []

        def step(self, actor: list[Any], fault: str) -> Any:
            """Carry out an actor's next effect; return its result when it ends, else None."""
            steps, effect = actor[0], actor[1]
            try:
                if effect is None:
                    actor[1] = next(steps)
                    return None
                try:
                    if fault == "not sent":
                        raise UnavailableError("not sent")
                    result = _drive.perform(effect, self.counter.transport, 1.0)
                    if fault == "reply lost":
                        raise UnavailableError("reply lost")
                except UnavailableError as error:
                    actor[1] = steps.throw(error)
                else:
                    actor[1] = steps.send(result)
            except StopIteration as stop:
                return stop.value
            except UnavailableError:
                return "failed"
            return None

        @rule(id=st.sampled_from(IDS), amount=st.integers(1, 3))
        def hit(self, id: str, amount: int) -> None:
            """Count."""
            self.counter.incr(id, amount)
            self.truth[id] += amount

        @precondition(lambda self: len(self.flushers) < 4)
        @rule(chunk=st.integers(1, 3))
        def start_flusher(self, chunk: int) -> None:
            """One more cron job, with a chunk size of its own."""
            job = FlushJob(self.counter, self.sink, chunk=chunk)
            self.flushers.append([job.flush_steps(), None])

        @precondition(lambda self: self.flushers)
        @rule(
            which=st.integers(0, 3),
            times=st.integers(1, 8),
            fault=st.sampled_from(["", "", "", "", "", "", "not sent", "reply lost"]),
        )
        def advance_flusher(self, which: int, times: int, fault: str) -> None:
            """Some effects of one flusher, the last perhaps with a fault."""
            actor = self.flushers[which % len(self.flushers)]
            for i in range(times):
                if self.step(actor, fault if i == times - 1 else "") is not None:
                    self.flushers.remove(actor)
                    break

        @rule(chunk=st.integers(1, 3))
        def flush_at_once(self, chunk: int) -> None:
            """A whole run, between two steps of all others."""
            FlushJob(self.counter, self.sink, chunk=chunk).run()

        @precondition(lambda self: self.flushers)
        @rule(which=st.integers(0, 3))
        def kill_flusher(self, which: int) -> None:
            """A SIGKILL: it never comes back."""
            del self.flushers[which % len(self.flushers)]

        @precondition(lambda self: len(self.readers) < 3)
        @rule(id=st.sampled_from(IDS))
        def start_reader(self, id: str) -> None:
            """Somebody asks for a value."""
            job = FlushJob(self.counter, self.sink)
            self.readers.append([job.value_steps(id), None, id, self.truth[id]])

        @precondition(lambda self: self.readers)
        @rule(which=st.integers(0, 2), times=st.integers(1, 4))
        def advance_reader(self, which: int, times: int) -> None:
            """Some effects of one reader; its answer lies between then and now."""
            actor = self.readers[which % len(self.readers)]
            for _ in range(times):
                result = self.step(actor, "")
                if result is not None:
                    self.readers.remove(actor)
                    value = result["amount"] or 0
                    assert actor[3] <= value <= self.truth[actor[2]]
                    return

        def teardown(self) -> None:
            """Whatever happened, two more runs bring everything to SQL, once."""
            job = FlushJob(self.counter, self.sink)
            while self.flushers:  # zombies wake up first, and change nothing
                if self.step(self.flushers[0], "") is not None:
                    del self.flushers[0]
            job.run()
            assert job.run().batches == 0
            shown = {id.decode(): row["amount"] for id, row in self.sink.rows.items()}
            assert shown == {id: n for id, n in self.truth.items() if n}
            assert all(job.value(id) == n for id, n in self.truth.items())

    return Flushing


def test_model_agrees(valkey: Any) -> None:
    """In no order of steps, faults and deaths is a hit lost, doubled, or a value wrong."""
    run_state_machine_as_test(
        machine(valkey.url),
        settings=settings(
            max_examples=300,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
