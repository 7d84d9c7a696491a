"""What has served lets go of what it had, by its references alone: it is in no cycle."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest
from support.failures import Boom, failures, wait
from support.waiting import (
    PATIENCE,
    collect,
    wait_until,
    wait_until_gone,
    wait_until_suspended,
)

from unsync import AmbientContextManager, Unfuture, unsync
from unsync._views import _Teller
from unsync.executors import SingleThreadExecutor, ThreadExecutor


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What goes away now does so without the garbage collector: it is in no reference cycle."""
    if sys.implementation.name != "cpython":
        pytest.skip("reference counting")
    gc.disable()
    yield
    gc.enable()


def in_the_ambient_loop(function: Callable[[], object]) -> None:
    async def call() -> None:
        function()

    asyncio.run_coroutine_threadsafe(call(), unsync.loop).result(PATIENCE)


def raise_result(unfuture: Unfuture[Any]) -> None:
    try:
        unfuture.result(PATIENCE)
    finally:
        # The traceback holds this frame; a cycle through it would be the test's own.
        del unfuture


def raise_awaited_when_done(unfuture: Unfuture[Any]) -> None:
    # Without a loop, since asyncio.run() leaves a cycle of its own.
    wait_until(unfuture.done)
    try:
        wait(unfuture).send(None)
    finally:
        del unfuture


def raise_awaited_in_the_ambient_loop(unfuture: Unfuture[Any]) -> None:
    try:
        Unfuture(wait(unfuture)).result(PATIENCE)
    finally:
        del unfuture


@failures
@pytest.mark.parametrize(
    "look", [raise_result, raise_awaited_when_done, raise_awaited_in_the_ambient_loop]
)
@pytest.mark.usefixtures("no_collector")
def test_a_failure_leaves_no_reference_cycle(
    make: Callable[[], Unfuture[Any]], look: Callable[[Unfuture[Any]], None]
) -> None:
    unfuture = make()
    try:
        look(unfuture)
    except Boom as exc:
        error = weakref.ref(exc)
    reference = weakref.ref(unfuture)
    del unfuture
    wait_until_gone(reference, error)


@pytest.mark.parametrize("where", ["thread", "loop"])
@pytest.mark.usefixtures("no_collector")
def test_a_failure_leaves_no_reference_cycle_in_who_waited_for_it(where: str) -> None:
    unfuture: Unfuture[Any] = Unfuture()
    waiting = Unfuture(wait(unfuture))
    wait_until_suspended(wait.__qualname__)
    if where == "loop":
        in_the_ambient_loop(partial(unfuture.set_exception, Boom("bad")))
    else:
        unfuture.set_exception(Boom("bad"))
    try:
        raise_result(waiting)
    except Boom as exc:
        error = weakref.ref(exc)
    references = [weakref.ref(unfuture), weakref.ref(waiting)]
    del unfuture, waiting
    wait_until_gone(*references, error)


@pytest.mark.parametrize("look", [raise_result, raise_awaited_when_done])
@pytest.mark.usefixtures("no_collector")
def test_a_cancellation_leaves_no_reference_cycle(look: Callable[[Unfuture[Any]], None]) -> None:
    unfuture: Unfuture[Any] = Unfuture()
    unfuture.cancel()
    reference = weakref.ref(unfuture)
    try:
        look(unfuture)
    except asyncio.CancelledError as exc:
        error = weakref.ref(exc)
    del unfuture
    assert reference() is None
    assert error() is None


@pytest.mark.usefixtures("no_collector")
def test_it_can_be_referred_to_weakly() -> None:
    unfuture: Unfuture[int] = Unfuture()
    reference = weakref.ref(unfuture)
    assert reference() is unfuture
    del unfuture
    assert reference() is None


class Thing:
    """Can be referred to weakly."""


@pytest.mark.usefixtures("no_collector")
def test_what_a_concurrent_future_gives_is_in_no_reference_cycle() -> None:
    future: concurrent.futures.Future[Thing] = concurrent.futures.Future()
    unfuture = Unfuture(future)
    future.set_result(Thing())
    references = [weakref.ref(unfuture), weakref.ref(unfuture.result(PATIENCE))]
    del unfuture, future
    wait_until_gone(*references)


def looks_by_concurrent_wait(unfuture: Unfuture[Any]) -> weakref.ref[Any]:
    view = unfuture.concurrent_future
    assert not concurrent.futures.wait([view], timeout=0).done
    return weakref.ref(view)


def looks_by_concurrent_result(unfuture: Unfuture[Any]) -> weakref.ref[Any]:
    view = unfuture.concurrent_future
    with pytest.raises(TimeoutError):
        view.result(0)
    return weakref.ref(view)


def looks_by_asyncio_wait(unfuture: Unfuture[Any]) -> weakref.ref[Any]:
    async def main() -> weakref.ref[Any]:
        view = unfuture.future
        finished, _ = await asyncio.wait([view], timeout=0)
        assert not finished
        return weakref.ref(view)

    return asyncio.run(main())


def looks_by_shield(unfuture: Unfuture[Any]) -> weakref.ref[Any]:
    async def main() -> weakref.ref[Any]:
        view = unfuture.future
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(view), 0)
        return weakref.ref(view)

    return asyncio.run(main())


@pytest.mark.parametrize(
    "look",
    [
        looks_by_concurrent_wait,
        looks_by_concurrent_result,
        looks_by_asyncio_wait,
        looks_by_shield,
    ],
)
def test_looking_at_a_pending_one_by_views_leaves_nothing(
    look: Callable[[Unfuture[Any]], weakref.ref[Any]],
) -> None:
    unfuture: Unfuture[Any] = Unfuture()
    references = [look(unfuture) for _ in range(3)]
    collect()  # a closed loop is in a cycle, and so is what pytest.raises() caught
    wait_until_gone(*references)
    assert [each for each in gc.get_objects() if type(each) is _Teller] == []
    unfuture.set_result(1)


@pytest.mark.usefixtures("no_collector")
def test_a_view_that_nobody_holds_goes_at_once_and_one_that_was_told_too() -> None:
    unfuture: Unfuture[Any] = Unfuture()
    views: list[Any] = [unfuture.concurrent_future, unfuture.concurrent_future]
    called: list[object] = []
    views[1].add_done_callback(called.append)
    references = [weakref.ref(view) for view in views]
    del views[0]
    wait_until_gone(references[0])
    unfuture.set_result(1)
    views.clear()
    assert len(called) == 1
    called.clear()
    reference = weakref.ref(unfuture)
    del unfuture
    wait_until_gone(reference, references[1])
    assert [each for each in gc.get_objects() if type(each) is _Teller] == []


def finished_by_hand(value: object) -> None:
    unfuture: Unfuture[object] = Unfuture()
    unfuture.set_result(value)


def finished_from_the_start(value: object) -> None:
    Unfuture.from_value(value)


def that_somebody_has_waited_for(value: object) -> None:
    unfuture: Unfuture[object] = Unfuture()
    told: list[object] = []
    unfuture.add_done_callback(told.append)
    unfuture.set_result(value)


def that_a_weak_reference_has_seen(value: object) -> None:
    unfuture = Unfuture.from_value(value)
    assert weakref.ref(unfuture)() is unfuture


def of_a_subclass(value: object) -> None:
    class Mine(Unfuture[object]):
        pass

    Mine.from_value(value)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="objects have no counts here")
@pytest.mark.parametrize(
    "make",
    [
        finished_by_hand,
        finished_from_the_start,
        that_somebody_has_waited_for,
        that_a_weak_reference_has_seen,
        of_a_subclass,
    ],
)
def test_what_has_served_lets_go_of_all_that_it_had(make: Callable[[object], None]) -> None:
    value = 10**40  # which refers to nothing, and is no constant
    make(value)
    collect()
    before = [sys.getrefcount(each) for each in (value, None)]
    for _ in range(1000):
        make(value)
    collect()
    after = [sys.getrefcount(each) for each in (value, None)]
    assert after[0] == before[0]
    assert abs(after[1] - before[1]) < 500  # others have it, too


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="objects have no counts here")
def test_a_call_that_has_served_lets_go_of_its_function_s_name() -> None:
    def give() -> int:
        return 1

    give.__qualname__ = name = "a name that is no constant".title()
    marked = unsync(give)
    marked().result(PATIENCE)
    before = sys.getrefcount(name)
    for _ in range(1000):
        marked().result(PATIENCE)
    assert sys.getrefcount(name) < before + 100  # the worker may not be done with the last ones


def test_who_is_referred_to_weakly_tells_of_its_end() -> None:
    unfuture = Unfuture.from_value(1)
    told: list[object] = []
    reference = weakref.ref(unfuture, told.append)
    del unfuture
    collect()
    assert told == [reference]
    assert reference() is None


@pytest.mark.skipif(sys.implementation.name == "pypy", reason="a collection there frees one")
def test_a_long_line_of_results_is_freed_without_recursion() -> None:
    unfuture: Unfuture[Any] = Unfuture.from_value(1)
    last = weakref.ref(unfuture)
    for _ in range(200_000):
        unfuture = Unfuture.from_value(unfuture)
    del unfuture
    collect()
    assert last() is None


def test_a_run_of_calls_keeps_neither_calls_nor_results() -> None:
    class Thing:
        pass

    @unsync
    async def make() -> Thing:
        return Thing()

    @unsync
    async def main() -> list[int]:
        refs: list[weakref.ref[Any]] = []
        alive = []
        for _ in range(400):
            unfuture = make()
            refs += weakref.ref(unfuture), weakref.ref(await unfuture)
            del unfuture
            if len(refs) % 100 == 0:
                collect()
                alive.append(sum(ref() is not None for ref in refs[-200:]))
        return alive

    assert max(main().result(PATIENCE)) < 10


# Calls of all kinds.


def arguments(*args: object, **kwargs: object) -> tuple[object, object]:
    return args, kwargs


async def async_arguments(*args: object, **kwargs: object) -> tuple[object, object]:
    return args, kwargs


@pytest.mark.parametrize("function", [arguments, async_arguments])
@pytest.mark.usefixtures("no_collector")
def test_a_marked_function_is_in_no_cycle(function: Callable[..., Any]) -> None:
    marked = unsync(function)
    gone = weakref.ref(marked)
    del marked
    assert gone() is None


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="objects have no counts here")
@pytest.mark.parametrize("kind", ["function", "coroutine", "own executor", "own executor of ours"])
def test_a_call_takes_and_gives_back_its_references(kind: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as theirs, ThreadExecutor(1) as ours:
        executors = {"own executor": theirs, "own executor of ours": ours}
        function = async_arguments if kind == "coroutine" else arguments
        marked = unsync(function, **({"executor": executors[kind]} if kind in executors else {}))
        value = object()
        name = f"name{id(value)}"

        def references() -> tuple[int, int]:
            return sys.getrefcount(value), sys.getrefcount(name)

        def call() -> None:
            calls = [marked(value), marked(value, value, word=value), marked(**{name: value})]
            for unfuture in calls:
                unfuture.result(PATIENCE)

        def given_back() -> bool:
            collect()
            # When the first was over, another thread may have held one for a moment more.
            return all(now <= then for now, then in zip(references(), before, strict=True))

        call()
        collect()
        before = references()
        for _ in range(100):
            call()
        wait_until(given_back)


@pytest.mark.parametrize("make", [SingleThreadExecutor, lambda: ThreadExecutor(1)])
@pytest.mark.usefixtures("no_collector")
def test_a_function_that_failed_keeps_nothing_alive(make: Callable[[], ThreadExecutor]) -> None:
    def refuse(argument: object) -> None:
        raise Boom

    with make() as executor:
        thing = Thing()
        call = executor.submit(refuse, thing)
        references = [weakref.ref(thing), weakref.ref(call), weakref.ref(call.exception(PATIENCE))]
        del call, thing
    wait_until_gone(*references)


class Manager:
    """An async context manager that fails where it is to."""

    def __init__(self, fails: str) -> None:
        self.fails = fails

    async def __aenter__(self) -> None:
        await asyncio.sleep(0)
        if self.fails == "entering":
            raise Boom

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.sleep(0)
        if self.fails == "leaving":
            raise Boom


def enter_and_fail(manager: Manager) -> None:
    with AmbientContextManager(manager):
        raise Boom


async def enter_in_a_loop_and_fail(manager: Manager) -> None:
    async with AmbientContextManager(manager):
        raise Boom


def enter_in_a_foreign_loop_and_fail(manager: Manager) -> None:
    loop = asyncio.new_event_loop()
    try:
        # Not run_until_complete(), which leaves a cycle of its own.
        task = loop.create_task(enter_in_a_loop_and_fail(manager))
        task.add_done_callback(lambda _: loop.stop())
        loop.run_forever()
        task.result()
    finally:
        del task
        loop.close()


@pytest.mark.parametrize("fails", ["entering", "the body", "leaving"])
@pytest.mark.parametrize("enter", [enter_and_fail, enter_in_a_foreign_loop_and_fail])
@pytest.mark.usefixtures("no_collector")
def test_a_failure_of_a_context_manager_leaves_no_reference_cycle(
    enter: Callable[[Manager], None], fails: str
) -> None:
    manager = Manager(fails)
    reference = weakref.ref(manager)
    failures = []
    try:
        enter(manager)
    except Boom as exc:
        failures = [weakref.ref(each) for each in (exc, exc.__context__) if each is not None]
    assert len(failures) == (2 if fails == "leaving" else 1)
    del manager
    wait_until_gone(reference, *failures)


def some_and_perhaps_a_failure(fails: bool) -> Iterator[int]:
    yield 1
    if fails:
        raise Boom


async def the_same_in_the_loop(fails: bool) -> AsyncIterator[int]:
    yield 1
    if fails:
        raise Boom


@pytest.mark.parametrize("body", [some_and_perhaps_a_failure, the_same_in_the_loop])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("no_collector")
def test_a_stream_that_has_ended_leaves_no_cycle(body: Callable[[bool], Any], fails: bool) -> None:
    stream = unsync(body)(fails)
    channel = weakref.ref(stream._channel)
    assert next(stream) == 1
    if fails:
        with pytest.raises(Boom):
            next(stream)
    assert list(stream) == []
    del stream
    wait_until_gone(channel)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chunks]:
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        yield Chunks(executor, monkeypatch)


class Chunks:
    """An executor that remembers the chunks it was given; and what happens when it is."""

    def __init__(
        self, executor: concurrent.futures.Executor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.executor = executor
        self.submit = executor.submit
        self.made: list[weakref.ref[Any]] = []
        self.interrupt_at = 0
        monkeypatch.setattr(executor, "submit", self.remember)

    def remember(self, call: Any) -> concurrent.futures.Future[Any]:
        self.made.append(weakref.ref(call._function))
        if len(self.made) == self.interrupt_at:
            raise KeyboardInterrupt
        return self.submit(call)


@pytest.mark.parametrize("in_order", [True, False, None])
@pytest.mark.usefixtures("no_collector")
def test_a_chunk_that_has_served_is_in_no_cycle(in_order: bool | None, chunks: Chunks) -> None:
    gate = threading.Event()

    @unsync(executor=chunks.executor)
    def work(x: int) -> int:
        gate.wait(PATIENCE)
        return x

    if in_order is None:
        calls = unsync.calls(work, range(10), chunksize=4)
        gate.set()
        assert [call.result(PATIENCE) for call in calls] == [*range(10)]
    else:
        stream = unsync.map(work, range(10), chunksize=4, in_order=in_order)
        gate.set()
        assert sorted(stream) == [*range(10)]
        gate.clear()
        unsync.map(work, range(10), chunksize=4, in_order=in_order).close()
        gate.set()
    assert len(chunks.made) >= 3
    wait_until_gone(*chunks.made)


def test_chunks_that_an_interrupt_leaves_are_not_kept(chunks: Chunks) -> None:
    chunks.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        unsync.calls(unsync(int, executor=chunks.executor), range(6), chunksize=2)
    assert len(chunks.made) == 2
    wait_until_gone(*chunks.made)


def fail_with(x: int) -> None:
    raise Boom(x)


async def fail_later_with(x: int) -> None:
    await asyncio.sleep(0)
    raise Boom(x)


# Without the GIL, what a thread made may live until that thread runs again, or ends.


@pytest.mark.parametrize("kind", ["chunks", "threads", "coroutines"])
@pytest.mark.usefixtures("no_collector")
def test_failures_of_many_calls_leave_no_reference_cycle(kind: str) -> None:
    make = ThreadExecutor if kind == "threads" else concurrent.futures.ThreadPoolExecutor
    with make(2) as executor:
        if kind == "coroutines":
            calls = unsync.calls(unsync(fail_later_with), range(9))
        else:
            calls = unsync.calls(unsync(fail_with, executor=executor), range(9), chunksize=4)
        failures = [weakref.ref(call.exception(PATIENCE)) for call in calls]
    assert len(failures) == 9
    del calls
    wait_until_gone(*failures)


@pytest.mark.parametrize("kind", ["threads", "coroutines"])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.usefixtures("no_collector")
def test_a_failure_in_a_stream_of_results_leaves_no_reference_cycle(
    kind: str, in_order: bool
) -> None:
    with ThreadExecutor(2) as executor:
        work = (
            unsync(fail_with, executor=executor) if kind == "threads" else unsync(fail_later_with)
        )
        stream = unsync.map(work, range(9), in_order=in_order)
        try:
            next(stream)
        except Boom as exc:
            failure = weakref.ref(exc)
        del stream
    wait_until_gone(failure)
