"""Interleavings of an Unfuture's operations, explored by hypothesis against a simple model.

The model knows a state, an outcome and who has to be told. Each rule does one thing to the Unfuture
and to the model; whatever the order, the two must agree, and in the end everybody must have heard
of the outcome once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from support.waiting import PATIENCE, running, wait_until  # noqa: E402

from unsync import InvalidStateError, Unfuture  # noqa: E402

CANCELLED = "cancelled"


class Boom(Exception):
    """Compared by what it says."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Boom and other.args == self.args

    __hash__ = Exception.__hash__


def outcome_of(future: Any) -> object:
    if future.cancelled():
        return CANCELLED
    return future.exception() or future.result()


class Foreign:
    """A loop in a thread of its own, shared by all examples."""

    def __init__(self) -> None:
        self._running = running(asyncio.new_event_loop())
        self.loop = next(self._running)

    def close(self) -> None:
        for _ in self._running:
            pass

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE)


foreign: Foreign


@pytest.fixture(scope="module", autouse=True)
def _foreign_loop() -> Any:
    global foreign
    foreign = Foreign()
    yield
    foreign.close()


class Machine(RuleBasedStateMachine):
    """One Unfuture; `outcome` is None as long as it is pending or running."""

    def __init__(self) -> None:
        super().__init__()
        self.unfuture: Unfuture[Any] = Unfuture()
        self.is_running = False
        self.outcome: object = None
        # What each who waits has heard.
        self.heard: list[list[object]] = []
        self.threads: list[threading.Thread] = []
        self.tasks: list[concurrent.futures.Future[Any]] = []
        self.removable: list[tuple[Callable[[Any], None], list[object]]] = []
        self.wrapped: list[Any] = []

    def listener(self) -> list[object]:
        heard: list[object] = []
        self.heard.append(heard)
        return heard

    # What changes it.

    @rule(value=st.integers(1, 3))
    def set_result(self, value: int) -> None:
        self._finish(lambda: self.unfuture.set_result(value), value)

    @rule(value=st.integers(1, 3))
    def set_exception(self, value: int) -> None:
        self._finish(lambda: self.unfuture.set_exception(Boom(value)), Boom(value))

    @rule(value=st.integers(1, 3))
    def set_result_in_a_loop(self, value: int) -> None:
        self._finish(lambda: foreign.call(lambda: self.unfuture.set_result(value)), value)

    def _finish(self, finish: Callable[[], object], outcome: object) -> None:
        if self.outcome is None:
            finish()
            self.outcome = outcome
        else:
            with pytest.raises(InvalidStateError):
                finish()

    @rule()
    def set_running(self) -> None:
        if self.outcome is None and not self.is_running:
            assert self.unfuture.set_running_or_notify_cancel() is True
            self.is_running = True
        elif self.outcome == CANCELLED:
            assert self.unfuture.set_running_or_notify_cancel() is False
        else:
            with pytest.raises(RuntimeError, match="not pending"):
                self.unfuture.set_running_or_notify_cancel()

    @rule()
    def cancel(self) -> None:
        # As in concurrent.futures: what runs cannot be cancelled from a plain thread.
        if self.outcome is None and not self.is_running:
            self.outcome = CANCELLED
        assert self.unfuture.cancel() is (self.outcome == CANCELLED)

    @rule()
    def cancel_in_a_loop(self) -> None:
        # As in asyncio: whatever is not done can be.
        if self.outcome is None:
            self.outcome = CANCELLED
        assert foreign.call(self.unfuture.cancel) is (self.outcome == CANCELLED)

    @rule()
    def cancel_behind(self) -> None:
        """A source is cancelled with the one that goes on from it."""
        target = self.unfuture.then(lambda source: source.result())
        if self.outcome is None and not self.is_running:
            self.outcome = CANCELLED
            assert target.cancel()
        elif self.outcome is None:
            assert target.cancel()  # this one only: what it waits for runs

    # What waits for it.

    @rule()
    def add_callback(self) -> None:
        heard = self.listener()

        def callback(unfuture: Unfuture[Any]) -> None:
            heard.append(outcome_of(unfuture))

        self.unfuture.add_done_callback(callback)
        if self.outcome is None:
            self.removable.append((callback, heard))

    @precondition(lambda self: self.removable)
    @rule()
    def remove_callback(self) -> None:
        callback, heard = self.removable.pop()
        removed = self.unfuture.remove_done_callback(callback)
        assert removed == (self.outcome is None)
        if removed:
            self.heard = [other for other in self.heard if other is not heard]

    @rule()
    def wait_in_a_thread(self) -> None:
        heard = self.listener()

        def wait() -> None:
            try:
                heard.append(self.unfuture.result(PATIENCE))
            except Boom as exc:
                heard.append(exc)
            except concurrent.futures.CancelledError:
                heard.append(CANCELLED)

        self.threads.append(threading.Thread(target=wait, daemon=True))
        self.threads[-1].start()

    @rule()
    def wait_with_concurrent_futures(self) -> None:
        heard = self.listener()

        def wait() -> None:
            concurrent.futures.wait([self.unfuture], PATIENCE)  # type: ignore[type-var]
            heard.append(outcome_of(self.unfuture))

        self.threads.append(threading.Thread(target=wait, daemon=True))
        self.threads[-1].start()

    @rule(shielded=st.booleans())
    def await_in_a_loop(self, shielded: bool) -> None:
        heard = self.listener()

        async def wait() -> None:
            try:
                heard.append(await (asyncio.shield(self.unfuture) if shielded else self.unfuture))
            except Boom as exc:
                heard.append(exc)
            except asyncio.CancelledError:
                heard.append(CANCELLED)

        self.tasks.append(asyncio.run_coroutine_threadsafe(wait(), foreign.loop))

    @rule()
    def time_out(self) -> None:
        if self.outcome is None:
            with pytest.raises(concurrent.futures.TimeoutError):
                self.unfuture.result(0)
        else:
            assert self.unfuture.done()

    @rule(count=st.integers(1, 3))
    def chain(self, count: int) -> None:
        heard = self.listener()
        target = self.unfuture
        for _ in range(count):
            target = target.then(lambda source: source.result())
        target.add_done_callback(lambda target: heard.append(outcome_of(target)))

    @rule()
    def wrap(self) -> None:
        self.wrapped.append(Unfuture(self.unfuture))

    @rule()
    def view(self) -> None:
        self.wrapped.append(self.unfuture.concurrent_future)

    # What must hold between any two.

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.unfuture.done() is (self.outcome is not None)
        assert self.unfuture.cancelled() is (self.outcome == CANCELLED)
        assert self.unfuture.running() is (self.outcome is None and self.is_running)
        if self.outcome is not None:
            assert outcome_of(self.unfuture) == self.outcome

    def teardown(self) -> None:
        if self.outcome is None:
            self.unfuture.set_result(0)
            self.outcome = 0
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for task in self.tasks:
            task.result(PATIENCE)
        for future in self.wrapped:
            concurrent.futures.wait([future], PATIENCE)
            assert outcome_of(future) == self.outcome
        wait_until(lambda: all(self.heard), "everybody's hearing of it")
        assert self.heard == [[self.outcome]] * len(self.heard)


# A hundred interleavings; a thousand with `--hypothesis-profile full`.
Machine.TestCase.settings = settings(
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

TestUnfuture = Machine.TestCase
