"""The Unfuture itself: how it is made, set, waited for, looked at, pickled and shown."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import copy
import functools
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import pytest
from support.failures import Boom, fail, failures, wait
from support.under_test import CORE, WITH_GIL
from support.waiting import (
    PATIENCE,
    ambient_loop_held,
    collect,
    running,
    wait_until,
    wait_until_suspended,
)

import unsync as package
from unsync import CancelledError, InvalidStateError, Unfuture, unsync
from unsync.executors import ThreadExecutor

T = TypeVar("T")

OUTCOMES = ["result", "failure", "cancellation"]


class Named(Unfuture[Any]):
    """A subclass with a constructor and state of its own."""

    def __init__(self, name: str = "unnamed") -> None:
        super().__init__()
        self.name = name


class Plain(Unfuture[Any]):
    """A subclass that adds nothing."""


def in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns when a coroutine of that loop calls it."""

    async def call() -> T:
        return function(*args)

    return asyncio.run_coroutine_threadsafe(call(), loop).result(PATIENCE)


def finish(future: Any, outcome: str) -> None:
    """Finishes a future of any of the three kinds."""
    if outcome == "result":
        future.set_result(42)
    elif outcome == "failure":
        future.set_exception(Boom("bad"))
    else:
        future.cancel()


def check(unfuture: Unfuture[Any], outcome: str) -> None:
    if outcome == "result":
        assert unfuture.result(PATIENCE) == 42
    elif outcome == "failure":
        with pytest.raises(Boom, match="bad"):
            unfuture.result(PATIENCE)
    else:
        with pytest.raises(CancelledError):
            unfuture.result(PATIENCE)
    assert unfuture.done()
    assert unfuture.cancelled() == (outcome == "cancellation")


def finished(outcome: str) -> Unfuture[Any]:
    unfuture: Unfuture[Any] = Unfuture()
    finish(unfuture, outcome)
    if outcome == "failure":
        unfuture.exception()
    return unfuture


@pytest.fixture
def foreign() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that is not the ambient one, running in a thread of its own."""
    yield from running(asyncio.new_event_loop())


@pytest.fixture(params=["ambient", "foreign"])
def loop(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoop:
    if request.param == "ambient":
        return unsync.loop
    found = request.getfixturevalue("foreign")
    assert isinstance(found, asyncio.AbstractEventLoop)
    return found


@pytest.fixture
def reports() -> Iterator[Callable[[], list[tuple[str, BaseException]]]]:
    """What the ambient loop's exception handler was told: (message, exception) each.

    Only these two are kept: the context holds the Unfuture.
    """
    loop = unsync.loop
    collect()
    in_loop(loop, lambda: None)  # what an earlier test left is reported before
    before = loop.get_exception_handler()
    found: list[tuple[str, BaseException]] = []

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        found.append((context["message"], context["exception"]))

    def now() -> list[tuple[str, BaseException]]:
        if sys.implementation.name != "cpython":
            collect()
        in_loop(loop, lambda: None)  # behind whatever was on its way to the handler
        return found

    loop.set_exception_handler(handle)
    yield now
    loop.set_exception_handler(before)


# How it is made.


def test_made_from_nothing_it_is_pending() -> None:
    unfuture: Unfuture[int] = Unfuture()
    assert not unfuture.done()
    assert not unfuture.running()
    assert not unfuture.cancelled()
    with pytest.raises(TimeoutError):
        unfuture.result(0)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_made_from_a_pending_asyncio_future(loop: asyncio.AbstractEventLoop, outcome: str) -> None:
    future = in_loop(loop, loop.create_future)
    unfuture: Unfuture[int] = Unfuture(future)
    assert not unfuture.done()
    in_loop(loop, finish, future, outcome)
    check(unfuture, outcome)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_made_from_a_finished_asyncio_future(loop: asyncio.AbstractEventLoop, outcome: str) -> None:
    future = in_loop(loop, loop.create_future)
    in_loop(loop, finish, future, outcome)
    unfuture: Unfuture[int] = Unfuture(future)
    if WITH_GIL or sys.version_info >= (3, 14):
        assert unfuture.done()
    else:  # asyncio's futures take no lock there, so that it must be looked at in its loop
        wait_until(unfuture.done)
    check(unfuture, outcome)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_made_in_the_loop_of_an_asyncio_future(
    loop: asyncio.AbstractEventLoop, outcome: str
) -> None:
    future = in_loop(loop, loop.create_future)
    unfuture = in_loop(loop, Unfuture, future)
    in_loop(loop, finish, future, outcome)
    check(unfuture, outcome)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_made_from_a_finished_asyncio_future_of_a_closed_loop(outcome: str) -> None:
    closed = asyncio.new_event_loop()
    future = closed.create_future()
    finish(future, outcome)
    closed.close()
    check(Unfuture(future), outcome)


def test_made_from_a_pending_asyncio_future_of_a_closed_loop_is_refused() -> None:
    closed = asyncio.new_event_loop()
    future = closed.create_future()
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        Unfuture(future)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_made_from_a_task(loop: asyncio.AbstractEventLoop, outcome: str) -> None:
    async def work(gate: asyncio.Future[Any]) -> object:
        return await gate

    gate = in_loop(loop, loop.create_future)
    task = in_loop(loop, loop.create_task, work(gate))
    unfuture: Unfuture[int] = Unfuture(task)
    assert not unfuture.done()
    in_loop(loop, finish, gate, outcome)
    check(unfuture, outcome)


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        *((state, outcome) for state in ("pending", "finished") for outcome in OUTCOMES),
        # A running one cannot be cancelled.
        ("running", "result"),
        ("running", "failure"),
    ],
)
def test_made_from_a_concurrent_future(state: str, outcome: str) -> None:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    if state == "running":
        future.set_running_or_notify_cancel()
    if state == "finished":
        finish(future, outcome)
    unfuture: Unfuture[int] = Unfuture(future)
    assert unfuture.done() == (state == "finished")
    assert unfuture.running() == (state == "running")
    if state != "finished":
        finish(future, outcome)
    check(unfuture, outcome)


def test_made_from_a_coroutine_it_runs_in_the_ambient_loop() -> None:
    async def where() -> threading.Thread:
        return threading.current_thread()

    assert Unfuture(where()).result(PATIENCE) is unsync.thread


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("early", [False, True])
def test_made_from_another_unfuture(early: bool, outcome: str) -> None:
    source: Unfuture[int] = Unfuture()
    if early:
        finish(source, outcome)
    unfuture = Unfuture(source)
    assert unfuture is not source
    if not early:
        assert not unfuture.done()
        finish(source, outcome)
    check(unfuture, outcome)


def test_it_runs_while_the_unfuture_that_it_was_made_from_runs() -> None:
    source: Unfuture[int] = Unfuture()
    unfuture = Unfuture(source)
    assert not unfuture.running()
    source.set_running_or_notify_cancel()
    assert unfuture.running()
    source.set_result(1)
    assert not unfuture.running()


def test_a_long_line_of_unfutures_each_made_from_the_last(run_python: Any) -> None:
    # In a process of its own: a recursion without end would take the tests with it.
    done = run_python(
        """
        from unsync import ACCELERATED, Unfuture
        first = last = Unfuture()
        for _ in range(100_000 if ACCELERATED else 10_000):
            last = Unfuture(last)
        print(last.running(), len(repr(last)) < 1000)
        first.set_running_or_notify_cancel()
        print(last.running())
        first.set_result(42)
        print(last.result(60))
        """
    )
    assert done.stdout.split() == ["False", "True", "True", "42"], done.stderr


async def _async_generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    "other",
    [42, "text", [], object(), len, _async_generator, _async_generator(), asyncio.Future],
    ids=lambda other: type(other).__name__,
)
def test_anything_else_is_a_type_error_that_names_it_and_the_way_for_values(other: Any) -> None:
    with pytest.raises(TypeError, match="from_value") as caught:
        Unfuture(other)
    assert repr(other) in str(caught.value)


VALUES = [None, 0, (), (1, 2), ("one",), Boom("not raised"), StopIteration(3), asyncio.Event]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_any_value_comes_back_as_it_is(value: object) -> None:
    async def look(unfuture: Unfuture[object]) -> object:
        return await unfuture

    unfuture = Unfuture.from_value(value)
    assert unfuture.done()
    assert unfuture.result() is value
    assert unfuture.exception() is None
    assert asyncio.run(look(unfuture)) is value

    @unsync
    def function() -> object:
        return value

    assert function().result(PATIENCE) is value
    assert Unfuture(look(unfuture)).result(PATIENCE) is value


def test_from_value_does_not_follow_a_future() -> None:
    pending: Unfuture[int] = Unfuture()
    assert Unfuture.from_value(pending).result() is pending


def test_from_value_of_a_subclass_makes_one_of_it() -> None:
    unfuture = Named.from_value(3)
    assert type(unfuture) is Named
    assert unfuture.name == "unnamed"
    assert unfuture.result() == 3


def test_it_is_subscriptable_with_a_type() -> None:
    assert Unfuture[int]().set_result(1) is None  # type: ignore[func-returns-value]
    assert Unfuture[int].from_value(2).result() == 2


def test_a_subclass_has_its_own_constructor_and_attributes() -> None:
    unfuture = Named("ours")
    unfuture.extra = [1]  # type: ignore[attr-defined]
    assert isinstance(unfuture, Unfuture)
    assert unfuture.name == "ours"
    unfuture.set_result("value")
    assert unfuture.result() == "value"
    assert unfuture.map(str.upper).result(PATIENCE) == "VALUE"


# Its state, and setting it.


def test_the_states_of_one_that_is_set_by_hand() -> None:
    def state(unfuture: Unfuture[Any]) -> tuple[bool, bool, bool]:
        return unfuture.done(), unfuture.running(), unfuture.cancelled()

    unfuture: Unfuture[int] = Unfuture()
    assert state(unfuture) == (False, False, False)
    assert unfuture.set_running_or_notify_cancel()
    assert state(unfuture) == (False, True, False)
    unfuture.set_result(1)
    assert state(unfuture) == (True, False, False)
    assert state(finished("failure")) == (True, False, False)
    assert state(finished("cancellation")) == (True, False, True)


def test_running_says_whether_the_function_has_begun() -> None:
    began, gate = threading.Event(), threading.Event()

    @unsync(executor=ThreadExecutor(max_workers=1))
    def work() -> None:
        began.set()
        assert gate.wait(PATIENCE)

    first, second = work(), work()
    assert began.wait(PATIENCE)
    assert first.running()
    assert not second.running()
    gate.set()
    second.result(PATIENCE)
    assert not first.running()
    assert not second.running()


def test_running_says_whether_the_coroutine_has_begun() -> None:
    blocked, gate = threading.Event(), threading.Event()
    began = threading.Event()

    def block() -> None:
        blocked.set()
        assert gate.wait(PATIENCE)

    @unsync
    async def work(until: Unfuture[None]) -> None:
        began.set()
        await until

    unsync.loop.call_soon_threadsafe(block)
    assert blocked.wait(PATIENCE)
    until: Unfuture[None] = Unfuture()
    unfuture = work(until)
    assert not unfuture.running()
    gate.set()
    assert began.wait(PATIENCE)
    assert unfuture.running()
    until.set_result(None)
    unfuture.result(PATIENCE)
    assert not unfuture.running()


@pytest.mark.parametrize("setter", ["set_result", "set_value"])
def test_both_setters_set_the_result(setter: str) -> None:
    unfuture: Unfuture[int] = Unfuture()
    getattr(unfuture, setter)(42)
    assert unfuture.result() == 42
    assert unfuture.exception() is None


def test_set_exception_takes_an_instance() -> None:
    error = Boom("bad")
    unfuture: Unfuture[int] = Unfuture()
    unfuture.set_exception(error)
    assert unfuture.exception() is error
    with pytest.raises(Boom) as caught:
        unfuture.result()
    assert caught.value is error


def test_set_exception_takes_a_class() -> None:
    unfuture: Unfuture[int] = Unfuture()
    unfuture.set_exception(Boom)
    assert type(unfuture.exception()) is Boom


@pytest.mark.parametrize("wrong", [None, 42, "text", int, object()], ids=lambda w: str(type(w)))
def test_set_exception_refuses_what_is_no_exception(wrong: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    with pytest.raises(TypeError, match="exception") as caught:
        unfuture.set_exception(wrong)
    assert repr(wrong) in str(caught.value)
    assert not unfuture.done()


@pytest.mark.parametrize("first", OUTCOMES)
@pytest.mark.parametrize("kind", [asyncio.InvalidStateError, concurrent.futures.InvalidStateError])
@pytest.mark.parametrize(
    "again",
    [
        lambda unfuture: unfuture.set_result(2),
        lambda unfuture: unfuture.set_value(2),
        lambda unfuture: unfuture.set_exception(Boom("late")),
    ],
    ids=["set_result", "set_value", "set_exception"],
)
def test_setting_twice_is_an_error_of_both_worlds(
    again: Callable[[Unfuture[Any]], None], kind: type[Exception], first: str
) -> None:
    unfuture = finished(first)
    with pytest.raises(kind) as caught:
        again(unfuture)
    assert type(caught.value) is InvalidStateError
    assert repr(unfuture) in str(caught.value)
    check(unfuture, first)


def test_a_done_one_refuses_what_is_no_exception_as_it_refuses_everything() -> None:
    with pytest.raises(InvalidStateError):
        Unfuture.from_value(1).set_exception(None)


def test_of_many_threads_that_set_it_one_wins_and_all_see_its_value(in_thread: Any) -> None:
    threads, rounds = 8, 40
    unfutures: list[Unfuture[int]] = [Unfuture() for _ in range(rounds)]
    barrier = threading.Barrier(threads)
    winners: list[list[int]] = [[] for _ in range(rounds)]
    seen: list[list[int]] = [[] for _ in range(rounds)]

    def contend(number: int) -> None:
        for which, unfuture in enumerate(unfutures):
            barrier.wait(PATIENCE)
            try:
                unfuture.set_result(number)
            except InvalidStateError:
                pass
            else:
                winners[which].append(number)
            seen[which].append(unfuture.result(PATIENCE))

    contenders = [in_thread(functools.partial(contend, number)) for number in range(threads)]
    for contender in contenders:
        contender.join(PATIENCE)
    for who, values in zip(winners, seen, strict=True):
        assert len(who) == 1
        assert values == who * threads


# Waiting for it.


@pytest.mark.parametrize("look", [Unfuture.result, Unfuture.exception])
@pytest.mark.parametrize("timeout", [None, PATIENCE, 10**12, 1e300])
def test_it_waits_for_the_outcome(
    look: Callable[..., object], timeout: float | None, in_thread: Any
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    entered = threading.Event()
    found: list[object] = []

    def wait() -> None:
        entered.set()
        found.append(look(unfuture, timeout))

    thread = in_thread(wait)
    assert entered.wait(PATIENCE)
    unfuture.set_result(42)
    thread.join(PATIENCE)
    assert found == [42 if look is Unfuture.result else None]


def test_many_threads_that_wait_all_wake(in_thread: Any) -> None:
    count, rounds = 10, 20
    unfutures: list[Unfuture[int]] = [Unfuture() for _ in range(rounds)]
    barrier = threading.Barrier(count + 1)
    found: list[int] = []

    def wait() -> None:
        for unfuture in unfutures:
            barrier.wait(PATIENCE)
            found.append(unfuture.result(PATIENCE))

    threads = [in_thread(wait) for _ in range(count)]
    for unfuture in unfutures:
        barrier.wait(PATIENCE)
        unfuture.set_result(42)
    for thread in threads:
        thread.join(PATIENCE)
    assert found == [42] * count * rounds


def test_a_waiter_that_gave_up_hinders_no_other(in_thread: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[int] = []
    called: list[Unfuture[int]] = []
    waiting = in_thread(lambda: found.append(unfuture.result(PATIENCE)))
    unfuture.add_done_callback(called.append)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            unfuture.result(0.001)
    unfuture.set_result(42)
    waiting.join(PATIENCE)
    assert found == [42]
    assert called == [unfuture]


@pytest.mark.parametrize("look", [Unfuture.result, Unfuture.exception])
@pytest.mark.parametrize("timeout", [0, -1, 0.001])
def test_a_timeout_is_an_error_that_shows_the_unfuture(
    look: Callable[..., object], timeout: float
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    with pytest.raises(TimeoutError) as caught:
        look(unfuture, timeout)
    assert repr(unfuture) in str(caught.value)
    assert not unfuture.done()


@pytest.mark.parametrize("timeout", [0, -1, None])
def test_no_timeout_matters_once_it_is_done(timeout: float | None) -> None:
    assert Unfuture.from_value(1).result(timeout) == 1
    assert Unfuture.from_value(1).result(timeout=timeout) == 1
    assert Unfuture.from_value(1).exception(timeout=timeout) is None


@pytest.mark.parametrize("look", [Unfuture.result, Unfuture.exception])
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_in_the_ambient_thread_it_refuses_to_wait(
    look: Callable[..., object], timeout: float | None
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    with pytest.raises(asyncio.InvalidStateError, match="await"):
        in_loop(unsync.loop, look, unfuture, timeout)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_in_the_ambient_thread_it_gives_the_outcome_once_there_is_one(outcome: str) -> None:
    unfuture = finished(outcome)

    def look() -> object:
        if outcome == "cancellation":
            with pytest.raises(asyncio.CancelledError):
                unfuture.exception()
            with pytest.raises(asyncio.CancelledError):
                unfuture.result()
            return None
        if outcome == "failure":
            assert isinstance(unfuture.exception(), Boom)
            with pytest.raises(Boom):
                unfuture.result()
            return None
        assert unfuture.exception() is None
        return unfuture.result()

    assert in_loop(unsync.loop, look) == (42 if outcome == "result" else None)


def test_in_a_foreign_loop_it_blocks_as_in_any_thread(
    foreign: asyncio.AbstractEventLoop, in_thread: Any
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    with pytest.raises(TimeoutError):
        in_loop(foreign, unfuture.result, 0.001)
    waiting = in_thread(lambda: in_loop(foreign, unfuture.result, PATIENCE))
    unfuture.set_result(42)
    waiting.join(PATIENCE)
    assert in_loop(foreign, unfuture.result, PATIENCE) == 42


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("call", ["result()", "result(600)", "exception()"])
def test_ctrl_c_interrupts_the_wait(call: str, run_python: Any) -> None:
    """A handler that returns leaves the wait as it was, one that raises ends it.

    By the third signal the program has been in its wait: the second was handled there.
    """
    done = run_python(
        f"""
        import os, signal, threading
        from unsync import Unfuture

        unfuture = Unfuture()
        handled = threading.Semaphore(0)
        calls = []

        def interrupt(number, frame):
            calls.append(number)
            handled.release()
            if len(calls) == 3:
                signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, interrupt)

        def press():
            # Again and again: Python loses a signal that comes just before the wait begins.
            while len(calls) < 3:
                os.kill(os.getpid(), signal.SIGINT)
                handled.acquire(timeout=0.1)

        pressing = threading.Thread(target=press, daemon=True)
        try:
            pressing.start()
            unfuture.{call}
        except KeyboardInterrupt:
            print("interrupted", len(calls), unfuture.done())
        pressing.join()
        threading.Thread(target=unfuture.set_result, args=(7,)).start()
        print(unfuture.result(60))
        """
    )
    assert done.stdout.split() == ["interrupted", "3", "False", "7"], done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("call", ["result(60)", "exception(60)", "result()"])
def test_a_ctrl_c_comes_before_the_failure_that_ends_the_wait(run_python: Any, call: str) -> None:
    """Such as that of a pool whose worker died of the same Ctrl-C."""
    done = run_python(
        f"""
        import signal, threading, time
        from unsync import Unfuture

        unfuture = Unfuture()

        def fail():
            time.sleep(0.1)  # the main thread waits by now, or else sees the signal earlier
            signal.raise_signal(signal.SIGINT)  # which does not wake the main thread
            unfuture.set_exception(OSError("broken"))

        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=fail).start()
        try:
            try:
                unfuture.{call}
            except BaseException as exc:
                print(type(exc).__name__)
        except KeyboardInterrupt:
            print("too late")
        """
    )
    assert done.stdout == "KeyboardInterrupt\n", done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_signal_handler_may_finish_what_the_main_thread_waits_for(run_python: Any) -> None:
    done = run_python(
        """
        import os, signal, threading
        from unsync import Unfuture

        unfuture = Unfuture()
        finished = threading.Event()

        def finish(number, frame):
            if not unfuture.done():
                unfuture.set_result(7)
            finished.set()

        signal.signal(signal.SIGINT, finish)

        def press():
            while not finished.is_set():
                os.kill(os.getpid(), signal.SIGINT)
                finished.wait(0.1)

        pressing = threading.Thread(target=press)
        pressing.start()
        print(unfuture.result(60))
        pressing.join()
        """
    )
    assert done.stdout.split() == ["7"], done.stderr


def test_get_loop_is_the_running_loop(loop: asyncio.AbstractEventLoop) -> None:
    unfuture: Unfuture[int] = Unfuture()
    assert in_loop(loop, unfuture.get_loop) is loop


@pytest.mark.usefixtures("fresh")
def test_a_view_outside_of_loops_starts_the_ambient_loop() -> None:
    unfuture: Unfuture[int] = Unfuture()
    loop = unfuture.future.get_loop()
    wait_until(loop.is_running)  # its thread has started, and is about to run it
    assert loop is unsync.loop


# What it wraps.


def test_setting_it_sets_the_asyncio_future_that_it_wraps(loop: asyncio.AbstractEventLoop) -> None:
    async def wait(future: asyncio.Future[int]) -> int:
        return await future

    future = in_loop(loop, loop.create_future)
    Unfuture(future).set_result(42)
    assert asyncio.run_coroutine_threadsafe(wait(future), loop).result(PATIENCE) == 42


@pytest.mark.parametrize("error", [Boom("bad"), StopIteration(3)], ids=repr)
def test_failing_it_fails_the_asyncio_future_that_it_wraps(
    loop: asyncio.AbstractEventLoop, error: Exception
) -> None:
    async def wait(future: asyncio.Future[int]) -> BaseException:
        try:
            await asyncio.wait_for(future, PATIENCE)
        except Exception as exc:
            return exc
        raise AssertionError("no failure")

    future = in_loop(loop, loop.create_future)
    unfuture: Unfuture[int] = Unfuture(future)
    unfuture.set_exception(error)
    assert unfuture.exception() is error
    seen = asyncio.run_coroutine_threadsafe(wait(future), loop).result(2 * PATIENCE)
    # asyncio cannot raise a StopIteration: there it is the cause.
    assert error in (seen, seen.__cause__)


@pytest.mark.parametrize("outcome", ["result", "failure"])
@pytest.mark.parametrize("running", [False, True])
def test_setting_it_sets_the_concurrent_future_that_it_wraps(outcome: str, running: bool) -> None:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    if running:
        future.set_running_or_notify_cancel()
    unfuture: Unfuture[int] = Unfuture(future)
    finish(unfuture, outcome)
    assert future.exception(PATIENCE) is unfuture.exception()
    if outcome == "result":
        assert future.result(PATIENCE) == 42


def test_setting_it_leaves_the_task_that_it_wraps_alone(loop: asyncio.AbstractEventLoop) -> None:
    gate = in_loop(loop, loop.create_future)

    async def work() -> int:
        return int(await gate)

    task = in_loop(loop, loop.create_task, work())
    unfuture: Unfuture[int] = Unfuture(task)
    unfuture.set_result(1)
    in_loop(loop, gate.set_result, 2)
    wait_until(task.done, "the task's end")
    assert task.result() == 2
    assert unfuture.result() == 1


@pytest.mark.parametrize("outcome", ["result", "failure", "cancellation"])
def test_in_its_own_loop_the_wrapped_asyncio_future_follows_at_once(
    loop: asyncio.AbstractEventLoop, outcome: str
) -> None:
    def set_here() -> bool:
        future = loop.create_future()
        unfuture: Unfuture[int] = Unfuture(future)
        finish(unfuture, outcome)
        if outcome == "failure":
            unfuture.exception()
        return future.done()

    assert in_loop(loop, set_here)


def test_a_wrapped_concurrent_future_that_has_an_outcome_keeps_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    # Comes before the callback that tells the Unfuture of the outcome.
    future.add_done_callback(lambda _: unfuture.set_result(2))
    unfuture: Unfuture[int] = Unfuture(future)
    future.set_result(1)
    assert future.result() == 1
    assert unfuture.result() == 2
    assert caplog.records == []


def test_a_wrapped_asyncio_future_that_has_an_outcome_keeps_it(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    def set_both() -> None:
        # The thread's outcome comes first, and finds the loop busy.
        setting = threading.Thread(target=unfuture.set_result, args=(2,))
        setting.start()
        setting.join(PATIENCE)
        future.set_result(1)

    future = in_loop(loop, loop.create_future)
    unfuture: Unfuture[int] = Unfuture(future)
    in_loop(loop, set_both)
    in_loop(loop, lambda: None)
    assert future.result() == 1
    assert unfuture.result() == 2
    assert caplog.records == []


# Pickling.


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_finished_one_pickles_with_its_result(protocol: int) -> None:
    loaded = pickle.loads(pickle.dumps(Unfuture.from_value({"a": [1]}), protocol))
    assert type(loaded) is Unfuture
    assert loaded.result() == {"a": [1]}


def test_a_failed_one_pickles_with_its_exception() -> None:
    loaded = pickle.loads(pickle.dumps(finished("failure")))
    with pytest.raises(Boom, match="bad"):
        loaded.result()


def test_a_cancelled_one_pickles_with_its_message() -> None:
    unfuture: Unfuture[int] = Unfuture()
    unfuture.cancel("why")
    loaded = pickle.loads(pickle.dumps(unfuture))
    assert loaded.cancelled()
    with pytest.raises(CancelledError, match="why"):
        loaded.result()


def test_one_of_a_subclass_pickles_as_such_with_its_attributes() -> None:
    unfuture = Named("ours")
    unfuture.set_result(42)
    loaded = pickle.loads(pickle.dumps(unfuture))
    assert type(loaded) is Named
    assert loaded.result() == 42
    assert loaded.name == "ours"


def test_a_copy_of_a_finished_one_is_finished() -> None:
    unfuture = Unfuture.from_value([1])
    twin, deep = copy.copy(unfuture), copy.deepcopy(unfuture)
    assert twin is not unfuture
    assert twin.result() is unfuture.result()
    assert deep.result() == [1]
    assert deep.result() is not unfuture.result()


@pytest.mark.parametrize("running", [False, True])
def test_one_that_is_not_done_refuses_to_be_pickled_and_says_why(running: bool) -> None:
    unfuture: Unfuture[int] = Unfuture()
    if running:
        unfuture.set_running_or_notify_cancel()
    with pytest.raises(TypeError, match="no outcome yet") as caught:
        pickle.dumps(unfuture)
    assert repr(unfuture) in str(caught.value)


def test_a_pickle_of_one_core_loads_on_the_other(run_python: Any) -> None:
    data = pickle.dumps([Unfuture.from_value(42), finished("cancellation")])
    other = "" if CORE == "pure" else "1"
    done = run_python(
        f"""
        import pickle
        import unsync
        result, cancelled = pickle.loads({data!r})
        assert type(result) is type(cancelled) is unsync.Unfuture
        print(result.result(), cancelled.cancelled(), unsync.ACCELERATED)
        """,
        env={"UNSYNC_NO_EXTENSIONS": other},
    )
    assert done.stdout.split()[:2] == ["42", "True"], done.stderr
    if CORE == "compiled":
        assert done.stdout.split()[2] == "False"


# How it is shown.


class Unnameable:
    """Callable, and fails when asked for anything that functions have."""

    def __getattr__(self, name: str) -> Any:
        raise Boom(name)

    def __call__(self, *_: object) -> None:
        pass


def own_result() -> Unfuture[Any]:
    unfuture: Unfuture[Any] = Unfuture()
    unfuture.set_result([unfuture])
    return unfuture


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Unfuture(), "<Unfuture pending>"),
        (lambda: Unfuture.from_value([1]), "<Unfuture finished result=[1]>"),
        (lambda: finished("failure"), "<Unfuture finished exception=Boom('bad')>"),
        (lambda: finished("cancellation"), "<Unfuture cancelled>"),
        (lambda: Named(), "<Named pending>"),
        (lambda: Unfuture(Unfuture()), "<Unfuture pending unfuture=<Unfuture pending>>"),
        (lambda: Unfuture().map(len), "<Unfuture pending function=len>"),
        (lambda: Unfuture().then(partial(len)), "<Unfuture pending function=len>"),
        (lambda: Unfuture().then(Unnameable()), "<Unfuture pending function=Unnameable>"),
        (own_result, "<Unfuture finished result=[<Unfuture ...>]>"),
    ],
)
def test_repr_shows_the_state_and_the_outcome(
    make: Callable[[], Unfuture[Any]], words: str
) -> None:
    assert repr(make()) == words


def test_repr_of_a_running_one() -> None:
    unfuture: Unfuture[int] = Unfuture()
    unfuture.set_running_or_notify_cancel()
    assert repr(unfuture) == "<Unfuture running>"


def test_repr_of_a_cancelled_one_does_not_tell_who_knows_of_it() -> None:
    unfuture = finished("cancellation")
    assert not unfuture.set_running_or_notify_cancel()
    assert repr(unfuture) == "<Unfuture cancelled>"


async def nothing() -> None:
    pass


async def failing() -> None:
    raise Boom("bad")


async def for_ever() -> None:
    await asyncio.Event().wait()


def test_repr_of_a_coroutine_call() -> None:
    with ambient_loop_held():
        call = Unfuture(nothing())
        assert repr(call) == "<Unfuture pending function=nothing>"
    call.result(PATIENCE)
    assert repr(call) == "<Unfuture finished function=nothing result=None>"
    broken = Unfuture(failing())
    broken.exception(PATIENCE)
    assert repr(broken) == "<Unfuture finished function=failing exception=Boom('bad')>"
    suspended = Unfuture(for_ever())
    wait_until_suspended("for_ever")
    assert repr(suspended) == "<Unfuture running function=for_ever>"
    suspended.cancel()
    concurrent.futures.wait([suspended.concurrent_future], PATIENCE)
    assert repr(suspended) == "<Unfuture cancelled function=for_ever>"


def test_repr_of_a_function_call() -> None:
    gate = threading.Event()

    def wait(succeed: bool) -> int:
        assert gate.wait(PATIENCE)
        if not succeed:
            raise Boom("bad")
        return 3

    name = wait.__qualname__
    one_at_a_time = ThreadExecutor(max_workers=1)
    first = one_at_a_time.submit(wait, True)
    second = one_at_a_time.submit(wait, False)
    third = one_at_a_time.submit(wait, False)
    wait_until(first.running, "the start")
    assert repr(first) == f"<Unfuture running function={name}>"
    assert repr(second) == f"<Unfuture pending function={name}>"
    third.cancel()
    assert repr(third) == f"<Unfuture cancelled function={name}>"
    gate.set()
    second.exception(PATIENCE)
    assert repr(first) == f"<Unfuture finished function={name} result=3>"
    assert repr(second) == f"<Unfuture finished function={name} exception=Boom('bad')>"


def test_repr_of_a_continuation() -> None:
    def double(value: int) -> int:
        return 2 * value

    async def later(source: Unfuture[int]) -> int:
        return source.result()

    source: Unfuture[int] = Unfuture()
    doubled, waited = source.map(double), source.then(later)
    assert repr(doubled) == f"<Unfuture pending function={double.__qualname__}>"
    source.set_result(4)
    doubled.result(PATIENCE), waited.result(PATIENCE)
    assert repr(doubled) == f"<Unfuture finished function={double.__qualname__} result=8>"
    assert repr(waited) == f"<Unfuture finished function={later.__qualname__} result=4>"


def test_repr_of_a_call_in_another_executor() -> None:
    gate = threading.Event()

    def wait() -> bool:
        return gate.wait(PATIENCE)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        call = unsync(executor=executor)(wait)()
        wait_until(call.running, "the start")
        assert repr(call) == f"<Unfuture running function={wait.__qualname__}>"
        gate.set()
        assert call.result(PATIENCE)
    assert repr(call) == f"<Unfuture finished function={wait.__qualname__} result=True>"


@pytest.mark.parametrize(("name", "shown"), [("sum", "sum"), ("", "Named"), (5, "Named")])
def test_repr_of_a_call_of_an_object_with_a_name(name: object, shown: str) -> None:
    class Named:
        __name__: object

        def __call__(self) -> int:
            return 4

    Named.__qualname__ = "Named"
    named = Named()
    named.__name__ = name
    call = unsync(named)()
    assert call.result(PATIENCE) == 4
    assert repr(call) == f"<Unfuture finished function={shown} result=4>"


def test_repr_of_one_made_from_a_future(loop: asyncio.AbstractEventLoop) -> None:
    wrapped: concurrent.futures.Future[int] = concurrent.futures.Future()
    assert repr(Unfuture(wrapped)) == f"<Unfuture pending future={wrapped!r}>"
    future: asyncio.Future[int] = in_loop(loop, loop.create_future)
    assert repr(Unfuture(future)) == "<Unfuture pending future=<Future>>"
    unfuture = Unfuture(in_loop(loop, loop.create_task, for_ever()))
    assert repr(unfuture) == "<Unfuture pending future=<Task for_ever>>"
    unfuture.cancel()
    wait_until(unfuture.cancelled)


@pytest.mark.alone
@pytest.mark.usefixtures("fresh")
def test_repr_never_asks_a_task_which_belongs_to_its_loop() -> None:
    # Asyncio's tasks show their callbacks, which the loop's thread may take away meanwhile.
    class Private(asyncio.Task[Any]):
        def __repr__(self) -> str:
            asked.append(threading.current_thread())
            return super().__repr__()

    def factory(
        loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        return Private(coro, loop=loop, **options)

    asked: list[threading.Thread] = []
    in_loop(unsync.loop, unsync.loop.set_task_factory, factory)  # `fresh` ends the loop
    suspended = Unfuture(for_ever())
    wrapping = Unfuture(wait_until_suspended("for_ever")[0])
    assert "for_ever" in repr(suspended)
    assert "for_ever" in repr(wrapping)
    with pytest.raises(TimeoutError, match="for_ever"):
        suspended.result(0)
    suspended.cancel()
    assert asked == []


def test_repr_of_a_long_result_is_short() -> None:
    assert len(repr(Unfuture.from_value("x" * 10_000))) < 300


def test_repr_survives_a_result_that_has_none() -> None:
    class Unprintable:
        def __repr__(self) -> str:
            raise Boom

    assert "unprintable Unprintable: Boom" in repr(Unfuture.from_value(Unprintable()))


# Failures.


@failures
def test_a_failure_that_nobody_looked_at_is_reported_once(
    make: Callable[[], Unfuture[Any]], reports: Callable[[], list[tuple[str, BaseException]]]
) -> None:
    unfuture = make()
    wait_until(unfuture.done)
    assert reports() == []
    del unfuture
    wait_until(lambda: reports() or collect() or reports(), "the report")
    ((message, error),) = reports()
    assert message == "Unfuture exception was never retrieved"
    assert isinstance(error, Boom)


async def _look_by_awaiting(unfuture: Unfuture[Any]) -> None:
    with pytest.raises(Boom):
        await unfuture


def _look_by_result(unfuture: Unfuture[Any]) -> None:
    with pytest.raises(Boom):
        unfuture.result()


def _look_behind_then(unfuture: Unfuture[Any]) -> None:
    with pytest.raises(Boom):
        unfuture.then(len).map(len).result(PATIENCE)


def _look_behind_another(unfuture: Unfuture[Any]) -> None:
    assert isinstance(Unfuture(unfuture).exception(), Boom)


@failures
@pytest.mark.parametrize(
    "look",
    [
        Unfuture.cancel,
        _look_by_result,
        Unfuture.exception,
        lambda unfuture: asyncio.run(_look_by_awaiting(unfuture)),
        _look_behind_then,
        _look_behind_another,
    ],
    ids=["cancel", "result", "exception", "await", "then", "another"],
)
def test_a_failure_that_somebody_looked_at_is_not_reported(
    make: Callable[[], Unfuture[Any]],
    look: Callable[[Unfuture[Any]], object],
    reports: Callable[[], list[tuple[str, BaseException]]],
) -> None:
    unfuture = make()
    wait_until(unfuture.done)
    look(unfuture)
    reference = weakref.ref(unfuture)
    del unfuture
    # Where there is a reference cycle, it is that of another test.
    wait_until(lambda: reports() or reference() is None or collect(), "the Unfuture's end")
    assert reports() == []


def test_an_asyncio_future_that_is_wrapped_is_not_reported_itself(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    future = in_loop(loop, loop.create_future)
    unfuture: Unfuture[Any] = Unfuture(future)
    in_loop(loop, finish, future, "failure")
    assert isinstance(unfuture.exception(PATIENCE), Boom)
    pushed = in_loop(loop, loop.create_future)
    unfuture = Unfuture(pushed)
    unfuture.set_exception(Boom("bad"))
    assert isinstance(unfuture.exception(PATIENCE), Boom)
    del future, unfuture
    in_loop(loop, lambda: None)
    assert pushed.done()
    del pushed
    collect()
    in_loop(loop, lambda: None)
    assert caplog.records == []


def _length(traceback: TracebackType | None) -> int:
    length = 0
    while traceback is not None:
        length += 1
        traceback = traceback.tb_next
    return length


@failures
def test_raising_it_again_does_not_make_the_traceback_longer(
    make: Callable[[], Unfuture[Any]],
) -> None:
    def by_awaiting() -> None:
        wait(unfuture).send(None)

    def by_result() -> None:
        unfuture.result()

    unfuture = make()
    wait_until(unfuture.done)
    for look in (by_awaiting, by_result):
        lengths = []
        for _ in range(5):
            with pytest.raises(Boom) as caught:
                look()
            lengths.append(_length(caught.tb))
        assert len(set(lengths)) == 1, lengths


def test_the_traceback_shows_where_the_function_failed() -> None:
    with pytest.raises(Boom) as caught:
        unsync(fail)().result(PATIENCE)
    assert caught.traceback[-1].name == "fail"


@pytest.mark.parametrize("value", [None, 3, (1, 2)])
def test_a_stop_iteration_is_raised_to_threads_and_is_a_cause_in_coroutines(value: object) -> None:
    @unsync
    def stop() -> None:
        raise StopIteration(value)

    unfuture = stop()
    with pytest.raises(StopIteration) as caught:
        unfuture.result(PATIENCE)
    assert caught.value.value == value
    assert unfuture.exception() is caught.value
    with pytest.raises(RuntimeError, match="StopIteration") as wrapped:
        asyncio.run(wait(unfuture))
    assert wrapped.value.__cause__ is caught.value


def test_the_public_errors_are_those_of_both_worlds() -> None:
    assert issubclass(package.CancelledError, asyncio.CancelledError)
    assert issubclass(package.CancelledError, concurrent.futures.CancelledError)
    assert issubclass(package.InvalidStateError, asyncio.InvalidStateError)
    assert issubclass(package.InvalidStateError, concurrent.futures.InvalidStateError)


# In which context a failure is reported that nobody looked at.

caller = contextvars.ContextVar("caller", default="nobody")


@unsync
def function_fails(*_: object) -> None:
    raise Boom


@unsync
async def fails_at_once() -> None:
    raise Boom


@unsync
async def fails_later() -> None:
    await asyncio.sleep(0)
    raise Boom


def continuation_fails() -> Unfuture[None]:
    def fail(_: object) -> None:
        raise Boom

    return Unfuture.from_value(1).map(fail)


def on_another_executor() -> Unfuture[None]:
    def fail() -> None:
        raise Boom

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return Unfuture(executor.submit(fail))


def in_a_chunk() -> Unfuture[None]:
    first, second = unsync.calls(function_fails, range(2), chunksize=2)
    assert isinstance(first.exception(PATIENCE), Boom)
    return second


@pytest.mark.parametrize(
    "make",
    [
        function_fails,
        fails_at_once,
        fails_later,
        continuation_fails,
        in_a_chunk,
        on_another_executor,
    ],
)
@pytest.mark.alone  # there is one handler of the ambient loop
def test_a_failure_that_nobody_looked_at_is_reported_in_the_context_of_the_call(
    make: Callable[[], Unfuture[None]],
) -> None:
    """Notebooks go by a context variable: the report stands under the cell that made the call."""
    heard: list[str] = []

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        assert isinstance(context["exception"], Boom)
        heard.append(caller.get())

    def call() -> Unfuture[None]:
        caller.set("the cell")
        return make()

    loop = unsync.loop
    before = loop.get_exception_handler()
    loop.set_exception_handler(handle)
    try:
        calls = [contextvars.copy_context().run(call)]
        wait_until(calls[0].done)
        calls.clear()
        wait_until(lambda: heard or collect() or heard, "the report")
    finally:
        loop.set_exception_handler(before)
    assert heard == ["the cell"]
