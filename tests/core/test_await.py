"""`await` in every running loop, and asyncio's own functions given Unfutures directly."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Generator
from contextvars import ContextVar
from typing import Any

import pytest
from support.loops import Main, bounded
from support.loops import in_own_loop as in_this_thread
from support.waiting import PATIENCE, wait_until

from unsync import Unfuture, unsync

Pending = tuple[Unfuture[Any], Callable[[], object]]

since_313 = pytest.mark.skipif(sys.version_info < (3, 13), reason="came with Python 3.13")


# Where a coroutine can run.


def in_another_thread(main: Main) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(in_this_thread, main).result(3 * PATIENCE)


def in_the_ambient_loop(main: Main) -> Any:
    return unsync(main)().result(PATIENCE)


def in_uvloop(main: Main) -> Any:
    uvloop = pytest.importorskip("uvloop")
    loop = uvloop.new_event_loop()
    try:
        return loop.run_until_complete(bounded(main()))
    finally:
        loop.close()


everywhere = pytest.mark.parametrize(
    "run", [in_this_thread, in_another_thread, in_the_ambient_loop, in_uvloop]
)


# What can be behind an Unfuture: each is pending until its second value is called, from any
# thread; then its result is 42.


def a_coroutine_call() -> Pending:
    gate = Unfuture[int]()

    @unsync
    async def wait() -> int:
        return await gate

    return wait(), lambda: gate.set_result(42)


def a_thread_function() -> Pending:
    gate = threading.Event()

    @unsync
    def wait() -> int:
        assert gate.wait(PATIENCE)
        return 42

    return wait(), gate.set


def one_set_by_hand() -> Pending:
    unfuture = Unfuture[int]()
    return unfuture, lambda: unfuture.set_result(42)


def a_wrapped_asyncio_future() -> Pending:
    future = unsync.loop.create_future()
    return Unfuture(future), lambda: unsync.loop.call_soon_threadsafe(future.set_result, 42)


def a_wrapped_concurrent_future() -> Pending:
    future = concurrent.futures.Future[int]()
    return Unfuture(future), lambda: future.set_result(42)


def a_wrapped_coroutine() -> Pending:
    gate = Unfuture[int]()

    async def wait() -> int:
        return await gate

    return Unfuture(wait()), lambda: gate.set_result(42)


def a_wrapped_unfuture() -> Pending:
    unfuture = Unfuture[int]()
    return Unfuture(unfuture), lambda: unfuture.set_result(42)


def a_continuation() -> Pending:
    source = Unfuture[int]()
    return source.map(lambda value: value * 2), lambda: source.set_result(21)


of_each_kind = pytest.mark.parametrize(
    "kind",
    [
        a_coroutine_call,
        a_thread_function,
        one_set_by_hand,
        a_wrapped_asyncio_future,
        a_wrapped_concurrent_future,
        a_wrapped_coroutine,
        a_wrapped_unfuture,
        a_continuation,
    ],
)


async def value_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def parked(awaitable: Awaitable[Any]) -> asyncio.Task[Any]:
    """A task that waits for it already."""
    task = asyncio.ensure_future(value_of(awaitable))
    await asyncio.sleep(0)
    return task


def call_in_thread(function: Callable[[], object]) -> None:
    """Calls it in a thread of its own; returns when that has ended."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def failed(error: BaseException) -> Unfuture[Any]:
    unfuture = Unfuture[Any]()
    unfuture.set_exception(error)
    return unfuture


# What a coroutine returns in each of these loops.

MAINS: list[Any] = []


def gives(expected: object, *marks: pytest.MarkDecorator) -> Callable[[Main], Main]:
    """Adds the coroutine function to those that `test_in_each_loop` runs."""

    def add(main: Main) -> Main:
        MAINS.append(pytest.param(main, expected, marks=marks, id=main.__name__))
        return main

    return add


# await


@everywhere
@of_each_kind
def test_await_of_a_pending_one(run: Callable[[Main], Any], kind: Callable[[], Pending]) -> None:
    async def main() -> Any:
        unfuture, finish = kind()
        task = await parked(unfuture)
        assert not task.done()
        call_in_thread(finish)
        return await task

    assert run(main) == 42


@everywhere
@of_each_kind
def test_await_of_a_finished_one_is_immediate(
    run: Callable[[Main], Any], kind: Callable[[], Pending]
) -> None:
    unfuture, finish = kind()
    finish()
    assert unfuture.result(PATIENCE) == 42
    turns = 0

    async def main() -> Any:
        def count() -> None:
            nonlocal turns
            turns += 1

        asyncio.get_running_loop().call_soon(count)
        return await unfuture, turns

    assert run(main) == (42, 0)


@gives(1)
async def await_of_one_that_is_set_in_the_same_loop() -> Any:
    unfuture = Unfuture[int]()
    task = await parked(unfuture)
    unfuture.set_result(1)
    assert not task.done()  # it is resumed by the loop, not inside set_result()
    return await task


@everywhere
def test_await_of_one_that_is_done_before_its_task_is_parked(run: Callable[[Main], Any]) -> None:
    unfuture = Unfuture[int]()

    class Late:
        def __await__(self) -> Generator[Any, None, int]:
            waiting = unfuture.__await__()
            parking = next(waiting)
            call_in_thread(lambda: unfuture.set_result(42))
            yield parking
            return (yield from waiting)

    async def main() -> int:
        return await Late()

    assert run(main) == 42


@everywhere
def test_the_same_one_can_be_awaited_again(run: Callable[[Main], Any]) -> None:
    async def main() -> Any:
        unfuture = Unfuture[list[int]]()
        task = await parked(unfuture)
        call_in_thread(lambda: unfuture.set_result([1]))
        return await task, await unfuture, await unfuture

    first, second, third = run(main)
    assert first is second is third


def test_many_awaiters_in_several_loops_at_once() -> None:
    pytest.importorskip("uvloop")
    unfuture = Unfuture[object]()
    value = object()
    waiting = [threading.Event() for _ in range(4)]

    def main(event: threading.Event) -> Main:
        async def wait() -> list[object]:
            tasks = [asyncio.ensure_future(value_of(unfuture)) for _ in range(50)]
            await asyncio.sleep(0)
            event.set()
            return await asyncio.gather(*tasks)

        return wait

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loops = [in_this_thread, in_this_thread, in_uvloop, in_the_ambient_loop]
        results = [pool.submit(run, main(event)) for run, event in zip(loops, waiting, strict=True)]
        for event in waiting:
            assert event.wait(PATIENCE)
        unfuture.set_result(value)
        for result in results:
            assert result.result(PATIENCE) == [value] * 50


@everywhere
def test_a_failure_is_raised_to_every_awaiter(run: Callable[[Main], Any]) -> None:
    error = LookupError("lost")

    async def main() -> Any:
        unfuture = Unfuture[None]()
        tasks = [await parked(unfuture) for _ in range(3)]
        call_in_thread(lambda: unfuture.set_exception(error))
        await asyncio.wait(tasks)
        return [task.exception() for task in tasks]

    assert run(main) == [error] * 3


@everywhere
def test_a_failure_shows_where_it_came_from_each_time(run: Callable[[Main], Any]) -> None:
    @unsync
    def breaks() -> None:
        raise LookupError("lost")

    @unsync
    async def breaks_later() -> None:
        await asyncio.sleep(0)
        breaks.__wrapped__()

    async def main() -> None:
        for unfuture in breaks(), breaks_later():
            seen = []
            for _ in range(3):
                with pytest.raises(LookupError) as caught:
                    await unfuture
                seen.append([frame.name for frame in traceback.extract_tb(caught.tb)])
            assert seen[0][-1] == "breaks"
            assert seen[0] == seen[1] == seen[2]  # it does not grow

    run(main)


@gives(None)
async def a_cancelled_one_raises_asyncios_own_error() -> None:
    unfuture = Unfuture[None]()
    task = await parked(unfuture)
    call_in_thread(lambda: unfuture.cancel("enough"))
    for awaitable in task, unfuture:
        with pytest.raises(asyncio.CancelledError) as caught:
            await awaitable
        assert type(caught.value) is asyncio.CancelledError
    assert caught.value.args == ("enough",)


def test_an_except_exception_does_not_swallow_a_cancellation() -> None:
    async def main() -> str:
        unfuture = Unfuture[None]()
        unfuture.cancel()
        try:
            await unfuture
        except Exception:
            return "swallowed"
        except asyncio.CancelledError:
            return "seen"
        return "nothing"

    assert in_this_thread(main) == "seen"


@gives(True)
async def cancelling_an_awaiter_cancels_what_it_awaits() -> bool:
    unfuture = Unfuture[None]()
    task = await parked(unfuture)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return unfuture.cancelled()


@gives("second")
async def an_awaiter_that_survives_its_cancellation_can_await_again() -> Any:
    """The first wait must leave nothing behind that wakes the task out of its second."""
    gates = [Unfuture[str]() for _ in range(2)]
    shields = [asyncio.shield(gate) for gate in gates]

    async def stubborn() -> Any:
        try:
            await shields[0]
        except asyncio.CancelledError:
            return await shields[1]

    task = await parked(stubborn())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    call_in_thread(lambda: gates[0].set_result("first"))
    await asyncio.sleep(0)
    assert not task.done()
    call_in_thread(lambda: gates[1].set_result("second"))
    return await task


@everywhere
def test_an_awaiter_goes_on_in_its_own_context(run: Callable[[Main], Any]) -> None:
    name = ContextVar("name", default="nobody")

    async def waits(unfuture: Unfuture[None], own: str) -> str:
        name.set(own)
        await unfuture
        return name.get()

    async def main() -> Any:
        unfuture = Unfuture[None]()
        tasks = [await parked(waits(unfuture, own)) for own in ("Ann", "Bob")]
        await asyncio.sleep(0)
        call_in_thread(lambda: unfuture.set_result(None))
        return await asyncio.gather(*tasks)

    assert run(main) == ["Ann", "Bob"]


@everywhere
def test_a_stop_iteration_does_not_end_the_await_quietly(run: Callable[[Main], Any]) -> None:
    error = StopIteration("a value")

    async def main() -> None:
        unfuture = failed(error)
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await unfuture
        assert caught.value.__cause__ is error

    run(main)


def test_await_outside_any_loop_is_a_clear_error() -> None:
    coroutine = value_of(Unfuture())
    with pytest.raises(RuntimeError, match=r"no running event loop to wait in for <Unfuture pend"):
        coroutine.send(None)


def test_await_of_a_finished_one_needs_no_loop() -> None:
    coroutine = value_of(Unfuture.from_value(42))
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    assert ended.value.value == 42


def test_a_wait_that_is_resumed_too_early_is_an_error() -> None:
    async def main() -> None:
        waiting = Unfuture[None]().__await__()
        next(waiting)
        with pytest.raises(RuntimeError, match="await wasn't used with future"):
            next(waiting)

    in_this_thread(main)


@of_each_kind
def test_await_in_debug_mode(kind: Callable[[], Pending]) -> None:
    """There, asyncio refuses to be called from a wrong thread."""

    async def main() -> Any:
        unfuture, finish = kind()
        task = await parked(unfuture)
        call_in_thread(finish)
        return await task, await unfuture

    assert asyncio.run(bounded(main()), debug=True) == (42, 42)


@pytest.mark.parametrize("change", [lambda one: one.set_result(42), lambda one: one.cancel()])
def test_a_wrapped_future_is_touched_in_its_own_loop(
    change: Callable[[Unfuture[int]], object],
) -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()
        unfuture = Unfuture(future)
        task = await parked(future)
        call_in_thread(lambda: change(unfuture))
        await asyncio.wait([task])
        assert future.done()
        assert task.cancelled() or task.result() == 42

    asyncio.run(bounded(main()), debug=True)


def test_a_future_of_one_loop_is_awaited_in_another() -> None:
    async def main() -> Any:
        future = asyncio.get_running_loop().create_future()
        unfuture = Unfuture(future)
        there = unsync(value_of)(unfuture)
        future.get_loop().call_soon(future.set_result, 42)
        return await unfuture, await there

    assert in_this_thread(main) == (42, 42)


# What asyncio offers to do with futures.


@gives([42, 42, 1, 2])
async def gather() -> Any:
    unfutures, finishers = zip(a_coroutine_call(), a_thread_function(), strict=True)
    waiting = asyncio.gather(*unfutures, Unfuture.from_value(1), asyncio.sleep(0, 2))
    for finish in finishers:
        call_in_thread(finish)
    return await waiting


@everywhere
def test_gather_raises_the_first_failure(run: Callable[[Main], Any]) -> None:
    error = LookupError("lost")

    async def main() -> Any:
        pending, failing = Unfuture[int](), Unfuture[int]()
        waiting = asyncio.gather(pending, failing)
        call_in_thread(lambda: failing.set_exception(error))
        with pytest.raises(LookupError) as caught:
            await waiting
        assert not pending.done()
        return caught.value

    assert run(main) is error


@everywhere
def test_gather_returns_exceptions(run: Callable[[Main], Any]) -> None:
    error = LookupError("lost")

    async def main() -> Any:
        cancelled = Unfuture[int]()
        cancelled.cancel()
        return await asyncio.gather(
            Unfuture.from_value(1), failed(error), cancelled, return_exceptions=True
        )

    one, exception, cancellation = run(main)
    assert (one, exception) == (1, error)
    assert type(cancellation) is asyncio.CancelledError


@gives([True] * 3)
async def cancelling_gather_cancels_its_unfutures() -> Any:
    unfutures = [Unfuture[int]() for _ in range(3)]
    waiting = asyncio.gather(*unfutures)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    return [unfuture.cancelled() for unfuture in unfutures]


@everywhere
@pytest.mark.parametrize(
    ("return_when", "ends_with"),
    [
        (asyncio.FIRST_COMPLETED, {0}),
        (asyncio.FIRST_EXCEPTION, {0, 1}),
        (asyncio.ALL_COMPLETED, {0, 1, 2}),
    ],
)
def test_wait_returns_the_very_unfutures(
    run: Callable[[Main], Any], return_when: str, ends_with: set[int]
) -> None:
    error = LookupError("lost")

    async def main() -> None:
        unfutures = [Unfuture[int]() for _ in range(3)]
        waiting = asyncio.ensure_future(asyncio.wait(unfutures, return_when=return_when))
        for number, finish in enumerate(
            (
                lambda: unfutures[0].set_result(1),
                lambda: unfutures[1].set_exception(error),
                lambda: unfutures[2].set_result(3),
            )
        ):
            # More than enough turns to hear of the one before.
            for _ in range(5):
                await asyncio.sleep(0)
            if waiting.done():
                break
            assert number <= max(ends_with)
            call_in_thread(finish)
        done, pending = await waiting
        assert done == {unfutures[number] for number in ends_with}
        assert done | pending == set(unfutures)
        assert not unfutures[1].done() or unfutures[1].exception() is error

    run(main)


@gives(None)
async def wait_gives_up_after_its_timeout() -> None:
    ready, never = Unfuture.from_value(1), Unfuture[int]()
    assert await asyncio.wait([ready, never], timeout=0.01) == ({ready}, {never})
    assert not never.done()


@gives((42, 42))
async def wait_for() -> Any:
    unfuture, finish = a_thread_function()
    waiting = asyncio.ensure_future(asyncio.wait_for(unfuture, PATIENCE))
    await asyncio.sleep(0)
    call_in_thread(finish)
    return await waiting, await asyncio.wait_for(unfuture, 0)


@everywhere
@pytest.mark.parametrize("timeout", [0, 0.01])
def test_wait_for_cancels_what_is_late(run: Callable[[Main], Any], timeout: float) -> None:
    async def main() -> bool:
        unfuture = Unfuture[int]()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(unfuture, timeout)
        return unfuture.cancelled()

    assert run(main)


@everywhere
def test_wait_for_cancels_the_coroutine_behind(run: Callable[[Main], Any]) -> None:
    entered, seen = Unfuture[None](), threading.Event()

    @unsync
    async def late() -> None:
        entered.set_result(None)
        try:
            await Unfuture()
        except asyncio.CancelledError:
            seen.set()
            raise

    async def main() -> bool:
        unfuture = late()
        await entered
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(unfuture, 0.01)
        return unfuture.cancelled()

    assert run(main)
    assert seen.is_set()


@everywhere
def test_wait_for_does_not_wait_for_a_function_that_cannot_be_stopped(
    run: Callable[[Main], Any],
) -> None:
    begun, leave = threading.Event(), threading.Event()

    @unsync
    def late() -> None:
        begun.set()
        assert leave.wait(PATIENCE)

    async def main() -> bool:
        unfuture = late()
        assert begun.wait(PATIENCE)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(unfuture, 0.01)
        return unfuture.cancelled()

    try:
        assert run(main)
    finally:
        leave.set()


@gives(1)
async def shield() -> Any:
    unfuture = Unfuture[int]()
    task = await parked(asyncio.shield(unfuture))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not unfuture.done()
    again = asyncio.shield(unfuture)
    call_in_thread(lambda: unfuture.set_result(1))
    return await again


@gives([2, 0, 1])
async def as_completed() -> list[int]:
    unfutures = [Unfuture[int]() for _ in range(3)]
    results = []
    for number, first in zip((2, 0, 1), asyncio.as_completed(unfutures), strict=True):
        call_in_thread(lambda number=number: unfutures[number].set_result(number))
        results.append(await first)
    return results


@gives(None, since_313)
async def as_completed_iterated_asynchronously_yields_the_very_unfutures() -> None:
    unfutures = [Unfuture[int]() for _ in range(3)]
    order = [2, 0, 1]
    call_in_thread(lambda: unfutures[2].set_result(2))
    seen = []
    async for first in asyncio.as_completed(unfutures):
        seen.append(first)
        if len(seen) < 3:
            unfutures[order[len(seen)]].set_result(None)
    assert seen == [unfutures[number] for number in order]


@gives(True)
async def a_timeout_block_cancels_what_is_awaited_in_it() -> bool:
    unfuture = Unfuture[int]()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await unfuture
    async with asyncio.timeout(PATIENCE):
        assert await Unfuture.from_value(1) == 1
    return unfuture.cancelled()


@gives([42, 42])
async def a_task_group_waits_for_them() -> Any:
    unfutures, finishers = zip(a_coroutine_call(), a_thread_function(), strict=True)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(value_of(unfuture)) for unfuture in unfutures]
        await asyncio.sleep(0)
        for finish in finishers:
            call_in_thread(finish)
    return [task.result() for task in tasks]


@everywhere
def test_a_failure_in_a_task_group_cancels_what_the_others_await(
    run: Callable[[Main], Any],
) -> None:
    error = LookupError("lost")

    async def main() -> Any:
        pending, failing = Unfuture[int](), Unfuture[int]()

        async def group_of_two() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(value_of(pending))
                group.create_task(value_of(failing))
                await asyncio.sleep(0)
                call_in_thread(lambda: failing.set_exception(error))

        with pytest.raises(Exception, match="unhandled errors") as caught:
            await group_of_two()
        assert caught.value.exceptions == (error,)
        return pending.cancelled()

    assert run(main)


@gives(None)
async def asyncio_takes_it_for_a_future() -> None:
    unfuture = Unfuture[int]()
    assert asyncio.isfuture(unfuture)
    assert asyncio.ensure_future(unfuture) is unfuture
    assert asyncio.wrap_future(unfuture) is unfuture
    assert unfuture.get_loop() is asyncio.get_running_loop()


@gives(42)
async def a_coroutine_sent_to_the_ambient_loop_can_await_one() -> Any:
    unfuture, finish = one_set_by_hand()
    there = asyncio.run_coroutine_threadsafe(value_of(unfuture), unsync.loop)
    call_in_thread(finish)
    return await asyncio.wrap_future(there)


@gives(42)
async def a_coroutine_sent_to_a_foreign_loop_can_await_one() -> Any:
    unfuture, finish = a_coroutine_call()
    here = asyncio.get_running_loop()
    sent: list[concurrent.futures.Future[Any]] = []
    call_in_thread(lambda: sent.append(asyncio.run_coroutine_threadsafe(value_of(unfuture), here)))
    finish()
    return await asyncio.wrap_future(sent[0])


def test_run_until_complete_takes_a_coroutine_that_awaits_one() -> None:
    unfuture, finish = a_thread_function()
    loop = asyncio.new_event_loop()
    try:
        # asyncio.run() and this want to know a future's loop, and an Unfuture has none: it says so.
        with pytest.raises(RuntimeError, match="inside a coroutine"):
            loop.run_until_complete(unfuture)
        finish()
        assert loop.run_until_complete(bounded(unfuture)) == 42
    finally:
        loop.close()


@everywhere
@pytest.mark.parametrize(("main", "expected"), MAINS)
def test_in_each_loop(run: Callable[[Main], Any], main: Main, expected: object) -> None:
    assert run(main) == expected


# The coroutine behind a call.


def test_it_runs_as_a_real_task_of_the_ambient_loop() -> None:
    gate = Unfuture[None]()
    started = threading.Event()

    @unsync
    async def ask() -> Any:
        started.set()
        await gate
        return asyncio.current_task(), asyncio.get_running_loop(), threading.current_thread()

    unfuture = ask()
    assert started.wait(PATIENCE)
    wait_until(lambda: any(t.get_name() == ask.__qualname__ for t in all_ambient_tasks()))
    gate.set_result(None)
    task, loop, thread = unfuture.result(PATIENCE)
    assert isinstance(task, asyncio.Task)
    assert task.get_coro().__qualname__ == task.get_name() == ask.__qualname__
    assert (loop, thread) == (unsync.loop, unsync.thread)
    assert task not in all_ambient_tasks()


def all_ambient_tasks() -> set[asyncio.Task[Any]]:
    async def ask() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks()

    return unsync(ask)().result(PATIENCE)


def test_it_is_a_task_before_its_first_suspension_too() -> None:
    @unsync
    async def ask() -> Any:
        return asyncio.current_task()

    assert ask().result(PATIENCE).get_name() == ask.__qualname__


def test_a_call_in_the_ambient_loop_begins_after_the_caller_goes_on() -> None:
    order = []

    @unsync
    async def inner() -> None:
        order.append("inner")

    @unsync
    async def outer() -> None:
        unfuture = inner()
        order.append("outer")
        await unfuture

    outer().result(PATIENCE)
    assert order == ["outer", "inner"]


@pytest.mark.parametrize("run", [in_this_thread, in_the_ambient_loop])
def test_calls_begin_in_the_order_they_were_made(run: Callable[[Main], Any]) -> None:
    order = []

    @unsync
    async def call(number: int) -> None:
        order.append(number)

    async def main() -> None:
        await asyncio.gather(*[call(number) for number in range(100)])

    run(main)
    assert order == list(range(100))


def test_awaiters_in_one_loop_go_on_in_the_order_they_came() -> None:
    order = []

    async def main() -> None:
        unfuture = Unfuture[None]()

        async def wait(number: int) -> None:
            await unfuture
            order.append(number)

        tasks = [await parked(wait(number)) for number in range(20)]
        await asyncio.sleep(0)
        call_in_thread(lambda: unfuture.set_result(None))
        await asyncio.gather(*tasks)

    in_this_thread(main)
    assert order == list(range(20))


@pytest.mark.parametrize("suspended_before", [True, False])
def test_a_coroutine_that_awaits_itself_gets_an_error(suspended_before: bool) -> None:
    """As a task of asyncio's does: it would wait for ever."""
    itself: list[Unfuture[None]] = []

    @unsync
    async def wait() -> None:
        if suspended_before:
            await asyncio.sleep(0)
        await itself[0]

    @unsync
    async def main() -> None:
        itself.append(wait())
        try:
            with pytest.raises(RuntimeError, match="cannot await its own outcome"):
                await asyncio.wait_for(asyncio.shield(itself[0]), PATIENCE)
        finally:
            itself.pop().cancel()

    main().result(2 * PATIENCE)


# Driven by hand, as some libraries drive what they wrap.


def driven(main: Callable[[], Any]) -> Any:
    """What `main()` returns in a running loop."""

    async def call() -> Any:
        return main()

    return asyncio.run(call())


def test_the_iterator_of_an_await_takes_send() -> None:
    def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        iterator: Any = unfuture.__await__()
        parked = iterator.send(None)
        assert asyncio.isfuture(parked)
        unfuture.set_result(42)
        with pytest.raises(StopIteration) as caught:
            iterator.send(None)
        assert caught.value.value == 42
        iterator.close()
        with pytest.raises(StopIteration) as caught:
            iterator.send(None)
        assert caught.value.value is None

    driven(main)


@pytest.mark.parametrize("arguments", [(KeyError("why"),), (KeyError,)])
def test_the_iterator_of_an_await_takes_throw(arguments: tuple[Any, ...]) -> None:
    def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        iterator: Any = unfuture.__await__()
        iterator.send(None)
        with pytest.raises(KeyError):
            iterator.throw(*arguments)
        with pytest.raises(StopIteration):
            iterator.send(None)
        assert not unfuture.done()

    driven(main)


@pytest.mark.filterwarnings("ignore:the .type, value, traceback. form:DeprecationWarning")
def test_the_old_form_of_throw_and_what_is_no_exception() -> None:
    iterator: Any = Unfuture[int]().__await__()
    traceback = None
    try:
        raise LookupError
    except LookupError as exc:
        traceback = exc.__traceback__
    with pytest.raises(KeyError, match="why") as caught:
        iterator.throw(KeyError, "why", traceback)
    assert traceback in {entry._rawentry for entry in caught.traceback}
    with pytest.raises(KeyError, match="because"):
        iterator.throw(KeyError, KeyError("because"))
    with pytest.raises(KeyError) as caught:
        iterator.throw(KeyError, (1, 2))
    assert caught.value.args == (1, 2)
    for wrong in [(list,), (KeyError("a"), KeyError("b")), (3, None, None)]:
        with pytest.raises(TypeError, match="throw"):
            iterator.throw(*wrong)
    with pytest.raises(TypeError):
        iterator.throw(KeyError, None, 32)
