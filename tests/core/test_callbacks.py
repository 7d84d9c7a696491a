"""Done-callbacks: where they run, in which order, and what a bad one may spoil."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from support.waiting import PATIENCE, collect, running, wait_until

from unsync import Unfuture, unsync

T = TypeVar("T")

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Boom(Exception):
    pass


class Grave(BaseException):
    """Not an Exception, and none that asyncio treats specially."""


def in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns when a coroutine of that loop calls it."""

    async def call() -> T:
        return function(*args)

    return asyncio.run_coroutine_threadsafe(call(), loop).result(PATIENCE)


def new_uvloop() -> asyncio.AbstractEventLoop:
    uvloop = pytest.importorskip("uvloop")
    loop = uvloop.new_event_loop()
    assert isinstance(loop, asyncio.AbstractEventLoop)
    return loop


@pytest.fixture(params=["ambient", "foreign", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    if request.param == "ambient":
        yield unsync.loop
    else:
        yield from running(new_uvloop() if request.param == "uvloop" else asyncio.new_event_loop())


class Notes:
    """A callback that notes its calls: the Unfuture, the thread, and the context variable."""

    def __init__(self) -> None:
        self.calls: list[tuple[Unfuture[Any], int, str]] = []
        self.called = threading.Event()

    def __call__(self, unfuture: Unfuture[Any]) -> None:
        self.calls.append((unfuture, threading.get_ident(), variable.get()))
        self.called.set()

    def the_call(self) -> tuple[Unfuture[Any], int, str]:
        assert self.called.wait(PATIENCE)
        (call,) = self.calls
        return call


def finish(unfuture: Unfuture[Any], outcome: str) -> None:
    if outcome == "result":
        unfuture.set_result(42)
    elif outcome == "failure":
        unfuture.set_exception(Boom())
        unfuture.exception()
    else:
        unfuture.cancel()


# Where they run.


@pytest.mark.parametrize("outcome", ["result", "failure", "cancellation"])
def test_added_in_a_plain_thread_it_is_called_by_the_thread_that_finishes(
    outcome: str, in_thread: Any
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    assert unfuture.add_done_callback(notes) is None  # type: ignore[func-returns-value]
    assert notes.calls == []
    thread = in_thread(lambda: finish(unfuture, outcome))
    thread.join(PATIENCE)
    who, where, _ = notes.the_call()
    assert who is unfuture
    assert where == thread.ident


def test_added_in_a_plain_thread_it_is_called_in_the_worker_of_a_thread_function() -> None:
    gate = threading.Event()

    @unsync
    def work() -> int:
        assert gate.wait(PATIENCE)
        return threading.get_ident()

    unfuture = work()
    notes = Notes()
    unfuture.add_done_callback(notes)
    gate.set()
    assert notes.the_call()[1] == unfuture.result(PATIENCE)


@pytest.mark.parametrize("outcome", ["result", "failure", "cancellation"])
def test_added_in_a_plain_thread_to_a_finished_one_it_is_called_at_once(outcome: str) -> None:
    unfuture: Unfuture[int] = Unfuture()
    finish(unfuture, outcome)
    notes = Notes()
    unfuture.add_done_callback(notes)
    assert [call[:2] for call in notes.calls] == [(unfuture, threading.get_ident())]


def test_added_in_a_loop_it_is_called_in_that_loops_thread(loop: asyncio.AbstractEventLoop) -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    in_loop(loop, unfuture.add_done_callback, notes)
    unfuture.set_result(42)
    who, where, _ = notes.the_call()
    assert who is unfuture
    assert where == in_loop(loop, threading.get_ident)


def test_added_in_a_loop_it_runs_in_the_loop(loop: asyncio.AbstractEventLoop) -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[asyncio.AbstractEventLoop] = []
    called = threading.Event()

    def callback(_: Unfuture[int]) -> None:
        found.append(asyncio.get_running_loop())
        called.set()

    in_loop(loop, unfuture.add_done_callback, callback)
    unfuture.set_result(42)
    assert called.wait(PATIENCE)
    assert found == [loop]


@pytest.mark.parametrize("early", [False, True])
def test_in_its_loop_it_is_called_soon_but_not_at_once(
    loop: asyncio.AbstractEventLoop, early: bool
) -> None:
    notes = Notes()

    def finish_here() -> int:
        unfuture: Unfuture[int] = Unfuture()
        if early:
            unfuture.set_result(42)
        unfuture.add_done_callback(notes)
        if not early:
            unfuture.set_result(42)
        return len(notes.calls)

    assert in_loop(loop, finish_here) == 0
    assert notes.the_call()[1] == in_loop(loop, threading.get_ident)


def test_one_added_in_each_kind_of_place_runs_in_its_own(
    loop: asyncio.AbstractEventLoop, in_thread: Any
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    here, there, ambient = Notes(), Notes(), Notes()
    unfuture.add_done_callback(here)
    in_loop(loop, unfuture.add_done_callback, there)
    in_loop(unsync.loop, unfuture.add_done_callback, ambient)
    thread = in_thread(lambda: unfuture.set_result(1))
    assert here.the_call()[1] == thread.ident
    assert there.the_call()[1] == in_loop(loop, threading.get_ident)
    assert ambient.the_call()[1] == unsync.thread.ident


# In which context.


def test_in_a_loop_it_sees_the_context_in_which_it_was_added(
    loop: asyncio.AbstractEventLoop,
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()

    def add() -> None:
        variable.set("added")
        unfuture.add_done_callback(notes)
        variable.set("later")

    in_loop(loop, add)
    unfuture.set_result(1)
    assert notes.the_call()[2] == "added"


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("where", ["thread", "loop"])
def test_it_is_called_in_the_context_that_was_given(
    where: str, early: bool, loop: asyncio.AbstractEventLoop
) -> None:
    context = contextvars.copy_context()
    context.run(variable.set, "given")
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()

    def callback(unfuture: Unfuture[int]) -> None:
        notes(unfuture)
        variable.set("by the callback")

    add = functools.partial(unfuture.add_done_callback, callback, context=context)
    if early:
        unfuture.set_result(1)
    if where == "loop":
        in_loop(loop, add)
    else:
        add()
    if not early:
        unfuture.set_result(1)
    assert notes.the_call()[2] == "given"
    # The very context, not a copy.
    wait_until(lambda: context[variable] == "by the callback")


def test_in_a_plain_thread_it_is_called_in_the_context_of_who_finishes() -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    unfuture.add_done_callback(notes)

    def finish_here() -> None:
        variable.set("finishing")
        unfuture.set_result(1)

    contextvars.copy_context().run(finish_here)
    assert notes.the_call()[2] == "finishing"


# Which, and in what order.


@pytest.mark.parametrize("wrong", [None, 42, "text"])
def test_what_cannot_be_called_is_refused(wrong: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    with pytest.raises(TypeError, match="callable") as caught:
        unfuture.add_done_callback(wrong)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("where", ["thread", "loop"])
def test_they_are_called_in_the_order_in_which_they_were_added(
    where: str, loop: asyncio.AbstractEventLoop
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    calls: list[int] = []
    count = 50

    def add() -> None:
        for number in range(count):
            unfuture.add_done_callback(lambda _, number=number: calls.append(number))

    if where == "loop":
        in_loop(loop, add)
    else:
        add()
    unfuture.set_result(1)
    wait_until(lambda: len(calls) >= count)
    assert calls == list(range(count))


def test_one_added_twice_is_called_twice() -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    unfuture.add_done_callback(notes)
    unfuture.add_done_callback(notes)
    unfuture.set_result(1)
    assert len(notes.calls) == 2


def test_each_is_called_once_though_many_threads_finish_it(in_thread: Any) -> None:
    rounds, threads = 50, 4
    unfutures: list[Unfuture[int]] = [Unfuture() for _ in range(rounds)]
    notes = [Notes() for _ in range(rounds)]
    barrier = threading.Barrier(threads)

    def contend() -> None:
        for unfuture, note in zip(unfutures, notes, strict=True):
            barrier.wait(PATIENCE)
            unfuture.add_done_callback(note)
            unfuture.cancel()

    for thread in [in_thread(contend) for _ in range(threads)]:
        thread.join(PATIENCE)
    assert [len(note.calls) for note in notes] == [threads] * rounds


# Removing them.


@pytest.mark.parametrize("where", ["thread", "loop"])
def test_removing_takes_out_all_that_are_equal_and_counts_them(
    where: str, loop: asyncio.AbstractEventLoop
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    calls: list[str] = []
    gone, kept = Notes(), Notes()

    def add() -> None:
        for callback in (kept, gone, gone, kept, gone):
            unfuture.add_done_callback(callback)
        # Two bound methods are equal, never identical.
        unfuture.add_done_callback(gone.__call__)

    if where == "loop":
        in_loop(loop, add)
    else:
        add()
    assert unfuture.remove_done_callback(gone) == 3
    assert unfuture.remove_done_callback(gone) == 0
    assert unfuture.remove_done_callback(gone.__call__) == 1
    assert unfuture.remove_done_callback(calls.append) == 0  # type: ignore[arg-type]
    unfuture.set_result(1)
    wait_until(lambda: len(kept.calls) == 2)
    if where == "loop":
        in_loop(loop, lambda: None)
    assert gone.calls == []


def test_removing_many_that_are_equal_compares_each_once() -> None:
    compared: list[object] = []

    class Equal:
        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return isinstance(other, Equal)

        __hash__ = None  # type: ignore[assignment]

        def __call__(self, _: object) -> None: ...

    unfuture: Unfuture[int] = Unfuture()
    count = 1000
    for _ in range(count):
        unfuture.add_done_callback(Equal())
        unfuture.add_done_callback(id)
    assert unfuture.remove_done_callback(Equal()) == count
    assert len(compared) <= 2 * count


def test_after_the_end_there_is_nothing_to_remove() -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    unfuture.add_done_callback(notes)
    unfuture.set_result(1)
    assert unfuture.remove_done_callback(notes) == 0
    assert len(notes.calls) == 1


def test_removing_leaves_other_waiters_alone(in_thread: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    found: list[int] = []
    first = unfuture.map(str)
    waiting = in_thread(lambda: found.append(unfuture.result(PATIENCE)))
    unfuture.add_done_callback(notes)
    last = unfuture.map(abs)
    assert unfuture.remove_done_callback(notes) == 1
    unfuture.set_result(-1)
    waiting.join(PATIENCE)
    assert found == [-1]
    assert first.result(PATIENCE) == "-1"
    assert last.result(PATIENCE) == 1
    assert notes.calls == []


# Bad ones.


def logged(caplog: pytest.LogCaptureFixture, kind: type[BaseException]) -> int:
    """How many log entries carry such an error."""
    return sum(
        record.exc_info is not None and record.exc_info[0] is kind for record in caplog.records
    )


@pytest.mark.parametrize("kind", [Boom, Grave])
@pytest.mark.parametrize("early", [False, True])
def test_one_that_raises_in_a_thread_is_logged_and_stops_no_other(
    kind: type[BaseException], early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(_: Unfuture[int]) -> None:
        raise kind

    unfuture: Unfuture[int] = Unfuture()
    before, after = Notes(), Notes()
    if early:
        unfuture.set_result(42)
    for callback in (before, bad, after):
        unfuture.add_done_callback(callback)
    mapped = unfuture.map(str)
    if not early:
        unfuture.set_result(42)
    assert len(before.calls) == len(after.calls) == 1
    assert mapped.result(PATIENCE) == "42"
    assert unfuture.result() == 42
    assert logged(caplog, kind) == 1
    assert "bad" in caplog.text


@pytest.mark.parametrize("kind", [Boom, Grave])
def test_one_that_raises_in_a_loop_is_logged_and_stops_no_other(
    kind: type[BaseException], loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(_: Unfuture[int]) -> None:
        raise kind

    unfuture: Unfuture[int] = Unfuture()
    before, after = Notes(), Notes()
    for callback in (before, bad, after):
        in_loop(loop, unfuture.add_done_callback, callback)
    unfuture.set_result(42)
    before.the_call()
    after.the_call()
    wait_until(lambda: logged(caplog, kind) == 1, "the log entry")
    wait_until(lambda: "bad" in caplog.text, "its text")


@pytest.mark.alone  # it sets the loop's debug mode
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_a_marked_coroutine_function_can_be_a_callback(where: str, debug: bool) -> None:
    """asyncio's debug mode refuses coroutine functions, since nobody would run what they give."""
    called: list[int] = []
    all_called: Unfuture[None] = Unfuture()

    @unsync
    async def note(unfuture: Unfuture[int]) -> None:
        called.append(await unfuture)
        if len(called) == 3:
            all_called.set_result(None)

    class Host:
        @unsync
        async def note(self, unfuture: Unfuture[int]) -> None:
            await note(unfuture)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = loop.get_debug()
        loop.set_debug(debug)
        try:
            unfuture: Unfuture[int] = Unfuture()
            unfuture.add_done_callback(note)
            unfuture.add_done_callback(Host().note)
            unfuture.set_result(1)
            unfuture.add_done_callback(note)
            await asyncio.wait_for(all_called, PATIENCE)
        finally:
            loop.set_debug(before)

    if where == "ambient":
        Unfuture(main()).result(2 * PATIENCE)
    else:
        asyncio.run(main())
    assert called == [1, 1, 1]


def test_a_plain_coroutine_function_cannot_be_a_callback_in_debug_mode(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def plain(_: object) -> None: ...

    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        Unfuture.from_value(1).add_done_callback(plain)

    asyncio.run(main())
    assert "coroutines cannot be used" in caplog.text


@pytest.mark.alone  # it sets the loop's exception handler and debug mode
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("finisher", ["thread", "loop"])
def test_the_loops_exception_handler_hears_of_one_that_raises(
    finisher: str, debug: bool, loop: asyncio.AbstractEventLoop
) -> None:
    """As from asyncio's own futures: with the same entries, and in the same context."""
    heard: list[tuple[dict[str, Any], str]] = []
    context = contextvars.copy_context()
    context.run(variable.set, "of the callback")

    def handle(_: object, entries: dict[str, Any]) -> None:
        heard.append((entries, variable.get()))

    def bad(_: Any) -> None:
        raise Boom

    def add(future: Any) -> None:
        future.add_done_callback(bad, context=context)

    unfuture: Unfuture[int] = Unfuture()
    before = loop.get_exception_handler()
    loop.set_exception_handler(handle)
    loop.set_debug(debug)
    try:
        own: asyncio.Future[int] = in_loop(loop, loop.create_future)
        in_loop(loop, add, own)
        in_loop(loop, own.set_result, 42)
        in_loop(loop, add, unfuture)
        if finisher == "loop":
            in_loop(loop, unfuture.set_result, 42)
        else:
            unfuture.set_result(42)
        wait_until(lambda: len(heard) == 2)
    finally:
        loop.set_debug(False)
        loop.set_exception_handler(before)
    (theirs, their_variable), (ours, our_variable) = heard
    assert set(ours) == set(theirs)
    assert isinstance(ours["exception"], Boom)
    assert ours["message"].startswith("Exception in callback ")
    for told in ours["message"], repr(ours["handle"]):
        assert "bad" in told or "call_in_ambient_loop" in told
    assert our_variable == their_variable


def test_one_whose_context_is_in_use_is_reported_and_stops_no_other(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    context = contextvars.copy_context()
    before, never, after = Notes(), Notes(), Notes()
    in_loop(loop, unfuture.add_done_callback, before)
    in_loop(loop, lambda: unfuture.add_done_callback(never, context=context))
    in_loop(loop, unfuture.add_done_callback, after)

    def use() -> None:
        unfuture.set_result(42)
        after.the_call()
        wait_until(lambda: logged(caplog, RuntimeError) == 1, "the log entry")

    context.run(use)
    assert len(before.calls) == 1
    assert not never.calls


def test_a_loop_in_debug_mode_times_each_callback(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(_: object) -> None:
        time.sleep(0.02)

    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    before = loop.slow_callback_duration
    loop.slow_callback_duration = 0.01
    loop.set_debug(True)
    try:
        for callback in slow, notes:
            in_loop(loop, unfuture.add_done_callback, callback)
        with caplog.at_level("WARNING"):
            unfuture.set_result(42)
            notes.the_call()
            in_loop(loop, int)  # the loop times a callback when that is over: this is behind it
    finally:
        loop.set_debug(False)
        loop.slow_callback_duration = before
    assert "slow" in caplog.text or "call_in_ambient_loop" in caplog.text


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_one_that_would_end_the_ambient_loop_is_logged_and_does_not(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def bad(_: Unfuture[int]) -> None:
        raise kind

    thread = unsync.thread
    unfuture: Unfuture[int] = Unfuture()
    before, after = Notes(), Notes()
    for callback in (before, bad, after):
        in_loop(unsync.loop, unfuture.add_done_callback, callback)
    unfuture.set_result(42)
    before.the_call()
    after.the_call()
    wait_until(lambda: logged(caplog, kind) == 1, "the log entry")
    assert unsync.thread is thread
    assert Unfuture.from_value(2).map(abs).result(PATIENCE) == 2


def test_one_that_adds_another_has_it_called_at_once() -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes, last = Notes(), Notes()
    unfuture.add_done_callback(lambda unfuture: unfuture.add_done_callback(notes))
    unfuture.add_done_callback(last)
    unfuture.set_result(1)
    assert len(notes.calls) == len(last.calls) == 1


def test_one_that_adds_another_in_a_loop_has_it_called_there(
    loop: asyncio.AbstractEventLoop,
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    notes = Notes()
    in_loop(
        loop,
        unfuture.add_done_callback,
        lambda unfuture: unfuture.add_done_callback(notes),
    )
    unfuture.set_result(1)
    assert notes.the_call()[1] == in_loop(loop, threading.get_ident)


@pytest.mark.parametrize("where", ["thread", "loop"])
def test_one_may_look_at_the_outcome(where: str, loop: asyncio.AbstractEventLoop) -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[int] = []
    if where == "loop":
        in_loop(loop, unfuture.add_done_callback, lambda done: found.append(done.result()))
    else:
        unfuture.add_done_callback(lambda done: found.append(done.result()))
    unfuture.set_result(42)
    wait_until(lambda: found)
    assert found == [42]


@pytest.mark.parametrize("where", ["thread", "loop"])
def test_one_may_drop_the_last_reference(where: str, loop: asyncio.AbstractEventLoop) -> None:
    holder: list[Unfuture[int]] = [Unfuture()]
    notes = Notes()

    def drop(_: Unfuture[int]) -> None:
        holder.clear()
        collect()

    def add() -> None:
        holder[0].add_done_callback(drop)
        holder[0].add_done_callback(notes)

    if where == "loop":
        in_loop(loop, add)
    else:
        add()
    holder[0].set_result(42)
    who, _, _ = notes.the_call()
    wait_until(lambda: not holder)
    assert who.result() == 42


# A loop that is gone.


@pytest.mark.parametrize("make", [asyncio.new_event_loop, new_uvloop])
def test_one_whose_loop_was_closed_loses_no_other_waiter(
    make: Callable[[], asyncio.AbstractEventLoop],
    in_thread: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def add(*callbacks: Notes) -> None:
        for callback in callbacks:
            unfuture.add_done_callback(callback)

    async def wait() -> int:
        return await unfuture

    unfuture: Unfuture[int] = Unfuture()
    lost, lost_too, plain, ambient = Notes(), Notes(), Notes(), Notes()
    found: list[int] = []
    closed = make()
    closed.run_until_complete(add(lost))
    unfuture.add_done_callback(plain)
    waiting = in_thread(lambda: found.append(unfuture.result(PATIENCE)))
    awaiting = Unfuture(wait())
    in_loop(unsync.loop, unfuture.add_done_callback, ambient)
    mapped = unfuture.map(str)
    closed.run_until_complete(add(lost_too))
    closed.close()
    unfuture.set_result(42)
    waiting.join(PATIENCE)
    assert found == [42]
    assert awaiting.result(PATIENCE) == 42
    assert mapped.result(PATIENCE) == "42"
    assert len(plain.calls) == 1
    ambient.the_call()
    assert lost.calls == lost_too.calls == []
    assert caplog.records == []
