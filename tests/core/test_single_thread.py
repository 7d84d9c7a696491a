"""The executor with one thread: while a call waits, it runs those that this one made, no others."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextvars import Context, ContextVar, copy_context
from typing import Any

import pytest
from support.waiting import PATIENCE, InterruptedLoop, wait_until

from unsync import ACCELERATED, AmbientContextManager, Unfuture, _single_thread, unsync
from unsync._common import nested_in
from unsync.executors import SingleThreadExecutor, ThreadExecutor

CORE = "unsync._core" if ACCELERATED else "unsync._core_py"


@pytest.fixture(autouse=True)
def _looks_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits looks each second whether the wait can end. Nothing else must depend upon that."""
    monkeypatch.setattr(f"{CORE}.LOOK_AGAIN_SECONDS", 2 * PATIENCE)


@pytest.fixture
def _looks_often(_looks_rarely: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{CORE}.LOOK_AGAIN_SECONDS", 0.01)


@pytest.fixture
def one(fresh: None) -> Iterator[SingleThreadExecutor]:
    """Such an executor, in use for all functions."""
    with SingleThreadExecutor("one") as executor:
        unsync.thread_executor = executor
        yield executor
        executor.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def others() -> Iterator[ThreadExecutor]:
    """Threads besides that one."""
    with ThreadExecutor(2) as executor:
        yield executor


@unsync
async def in_loop(function: Callable[..., Unfuture[Any]], *args: Any) -> Any:
    """The coroutine that a function calls, and that calls a function in turn."""
    return await function(*args)


# Ways to wait for a call, each from one function in the thread to the next, through something else.


@unsync
def by_result(depth: int) -> int:
    return 0 if depth == 0 else 1 + in_loop(by_result, depth - 1).result()


@unsync
def directly(depth: int) -> int:
    return 0 if depth == 0 else 1 + directly(depth - 1).result()


@unsync
def with_a_timeout(depth: int) -> int:
    return 0 if depth == 0 else 1 + in_loop(with_a_timeout, depth - 1).result(PATIENCE)


@unsync
def by_exception(depth: int) -> int:
    call = in_loop(by_exception, depth - 1) if depth else Unfuture.from_value(-1)
    failure = call.exception()
    assert failure is None
    return 1 + call.result()


@unsync
def by_then(depth: int) -> int:
    if depth == 0:
        return 0
    return in_loop(asyncio.sleep, 0).then(lambda _: by_then(depth - 1)).result() + 1


@unsync
def by_map(depth: int) -> int:
    return (
        0 if depth == 0 else in_loop(asyncio.sleep, 0).map(lambda _: by_map(depth - 1)).result() + 1
    )


@unsync
def by_view(depth: int) -> int:
    return 0 if depth == 0 else in_loop(by_view, depth - 1).concurrent_future.result() + 1


@unsync
def by_wait(depth: int) -> int:
    if depth == 0:
        return 0
    done, _ = concurrent.futures.wait([in_loop(by_wait, depth - 1), by_wait(0)])
    return max(call.result() for call in done) + 1


@unsync
def by_the_first(depth: int) -> int:
    if depth == 0:
        return 0
    never: Unfuture[int] = Unfuture()
    calls = [in_loop(by_the_first, depth - 1), never]
    done, _ = concurrent.futures.wait(calls, PATIENCE, concurrent.futures.FIRST_COMPLETED)
    return done.pop().result() + 1


@unsync
def by_as_completed(depth: int) -> int:
    if depth == 0:
        return 0
    calls = [in_loop(by_as_completed, depth - 1), by_as_completed(0)]
    return max(call.result() for call in concurrent.futures.as_completed(calls)) + 1


@unsync
def by_views(depth: int) -> int:
    if depth == 0:
        return 0
    (call,) = concurrent.futures.as_completed([in_loop(by_views, depth - 1).concurrent_future])
    return call.result() + 1  # type: ignore[no-any-return]


@unsync
def by_calls(depth: int) -> int:
    if depth == 0:
        return 0
    return sum(call.result() for call in unsync.calls(by_calls, [depth - 1, 0])) + 1


@unsync
def by_unsync_map(depth: int) -> int:
    return 0 if depth == 0 else sum(unsync.map(by_unsync_map, [depth - 1, 0])) + 1


@unsync
def by_async_stream(depth: int) -> int:
    return 0 if depth == 0 else sum(streamed_in_loop(depth - 1)) + 1


@unsync
async def streamed_in_loop(depth: int) -> AsyncGenerator[int, None]:
    yield await by_async_stream(depth)


@unsync
def by_stream(depth: int) -> int:
    return 0 if depth == 0 else sum(streamed(depth - 1)) + 1


@unsync
def streamed(depth: int) -> Generator[int, None, None]:
    yield in_loop(by_stream, depth).result()


@unsync
def by_context_manager(depth: int) -> int:
    if depth == 0:
        return 0
    with entered(depth - 1) as found:
        return found + 1


@unsync
@contextlib.asynccontextmanager
async def entered(depth: int) -> AsyncGenerator[int, None]:
    found = await by_context_manager(depth)
    yield found
    await by_context_manager(0)


@unsync
def in_own_loop(depth: int) -> int:
    async def main() -> int:
        return await in_own_loop(depth - 1)

    return 0 if depth == 0 else asyncio.run(main()) + 1


@unsync
def through_both_loops(depth: int) -> int:
    async def main() -> int:
        return await in_loop(through_both_loops, depth - 1)  # type: ignore[no-any-return]

    return 0 if depth == 0 else asyncio.run(main()) + 1


@unsync
def by_gather(depth: int) -> int:
    async def main() -> int:
        return max(await asyncio.gather(by_gather(depth - 1), in_loop(by_gather, 0)))

    return 0 if depth == 0 else asyncio.run(main()) + 1


@unsync
def by_wrap_future(depth: int) -> int:
    async def main() -> int:
        view = in_loop(by_wrap_future, depth - 1).concurrent_future
        return await asyncio.wrap_future(view)  # type: ignore[no-any-return]

    return 0 if depth == 0 else asyncio.run(main()) + 1


@unsync
def by_blocking_in_own_loop(depth: int) -> int:
    async def main() -> int:
        gate: Unfuture[int] = Unfuture()
        waiting = asyncio.ensure_future(asyncio.shield(gate))
        await asyncio.sleep(0)
        found = in_loop(by_blocking_in_own_loop, depth - 1).result()  # while another task waits
        gate.set_result(0)
        return int(found) + await waiting

    return 0 if depth == 0 else asyncio.run(main()) + 1


WAYS = [
    by_result,
    directly,
    with_a_timeout,
    by_exception,
    by_then,
    by_map,
    by_view,
    by_wait,
    by_the_first,
    by_as_completed,
    by_views,
    by_calls,
    by_unsync_map,
    by_async_stream,
    by_stream,
    by_context_manager,
    in_own_loop,
    through_both_loops,
    by_gather,
    by_wrap_future,
    by_blocking_in_own_loop,
]


@pytest.mark.parametrize("function", WAYS, ids=lambda function: function.__name__)
def test_each_way_to_wait_runs_what_nests(
    one: SingleThreadExecutor, function: Callable[[int], Unfuture[int]]
) -> None:
    assert function(10).result(PATIENCE) == 10
    # Of threads there is still one, and it goes on.
    assert unsync(threading.get_ident)().result(PATIENCE) == next(iter(one._threads)).ident
    assert len(one._threads) == 1


def test_in_a_function_of_another_pool_in_between(
    one: SingleThreadExecutor, others: ThreadExecutor
) -> None:
    def down(depth: int) -> list[str]:
        name = threading.current_thread().name.rpartition("_")[0]
        return [name] if depth == 0 else [name, *others.submit(across, depth).result()]

    def across(depth: int) -> list[str]:
        return one.submit(down, depth - 1).result()

    assert one.submit(down, 5).result(PATIENCE) == ["one"] * 6


def test_two_such_executors_that_call_each_other(one: SingleThreadExecutor) -> None:
    with SingleThreadExecutor("two") as two:

        def ping(depth: int) -> list[str]:
            name = threading.current_thread().name
            return [name] if depth == 0 else [name, *in_loop(two.submit, pong, depth).result()]

        def pong(depth: int) -> list[str]:
            name = threading.current_thread().name
            return [name, *in_loop(one.submit, ping, depth - 1).result()]

        assert one.submit(ping, 4).result(PATIENCE) == ["one_0", "two_0"] * 4 + ["one_0"]


def test_the_functions_never_run_two_at_once_for_many_callers(one: SingleThreadExecutor) -> None:
    threads: set[int] = set()
    nested: list[tuple[int, int]] = []
    in_progress: list[tuple[int, int]] = []

    @unsync
    def work(caller: int, level: int) -> int:
        threads.add(threading.get_ident())
        if in_progress and in_progress[-1][0] != caller:
            nested.append((in_progress[-1][0], caller))
        in_progress.append((caller, level))
        found = 0 if level == 0 else in_loop(work, caller, level - 1).result() + 1
        assert in_progress.pop() == (caller, level)
        return int(found)

    def call(caller: int) -> None:
        for level in range(20):
            assert work(caller, level % 4).result(PATIENCE) == level % 4

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(threads) == 1
    assert not nested


# Which calls run within a wait.


class Log(list[str]):
    def note(self, what: str) -> str:
        self.append(what)
        return what


def test_an_unrelated_call_runs_after_the_one_that_waits(one: SingleThreadExecutor) -> None:
    log = Log()
    gate: Unfuture[None] = Unfuture()

    def waiting() -> None:
        log.note("begin")
        in_loop(unsync(log.note), "nested").result()
        in_loop(asyncio.wait_for, gate, PATIENCE).result()
        in_loop(unsync(log.note), "nested, too").result()
        log.note("end")

    call = one.submit(waiting)
    wait_until(lambda: "nested" in log)
    unrelated = one.submit(log.note, "unrelated")
    gate.set_result(None)
    call.result(PATIENCE)
    unrelated.result(PATIENCE)
    assert log == ["begin", "nested", "nested, too", "end", "unrelated"]


def test_what_its_caller_has_begun_runs_when_that_waits_not_when_it_does(
    one: SingleThreadExecutor,
) -> None:
    log = Log()

    def outer() -> None:
        beside = one.submit(log.note, "beside")
        one.submit(inner).result()  # before `beside`, which was made earlier, would be as good
        log.note("outer goes on")
        beside.result()

    def inner() -> None:
        log.note("inner begins")
        in_loop(asyncio.sleep, 0.02).result()
        log.note("inner ends")

    one.submit(outer).result(PATIENCE)
    assert log.index("inner ends") == log.index("inner begins") + 1
    assert sorted(log) == ["beside", "inner begins", "inner ends", "outer goes on"]


def test_what_nobody_waits_for_runs_when_its_caller_has_ended(one: SingleThreadExecutor) -> None:
    log = Log()

    def forgetful() -> None:
        one.submit(log.note, "forgotten")
        log.note("end")

    one.submit(forgetful).result(PATIENCE)
    one.submit(log.note, "next").result(PATIENCE)
    assert log == ["end", "forgotten", "next"]


def test_what_it_left_runs_within_the_wait_of_the_one_that_called_it(
    one: SingleThreadExecutor,
) -> None:
    log = Log()
    left: list[Unfuture[str]] = []

    def outer() -> None:
        one.submit(inner).result()
        left[0].result()
        log.note("outer ends")

    def inner() -> None:
        left.append(one.submit(log.note, "left"))

    one.submit(outer).result(PATIENCE)
    assert log == ["left", "outer ends"]


def test_a_coroutine_that_outlives_its_caller_calls_for_the_one_above(
    one: SingleThreadExecutor,
) -> None:
    begun, gate = Unfuture[None](), Unfuture[None]()

    @unsync
    async def late() -> int:
        begun.set_result(None)
        await gate
        return await unsync(lambda: 1)()

    def outer() -> int:
        (call,) = one.submit(inner).result()
        gate.set_result(None)
        return call.result()

    def inner() -> list[Unfuture[int]]:
        call = late()
        begun.result()
        return [call]

    assert one.submit(outer).result(PATIENCE) == 1


def test_a_call_that_comes_as_its_caller_ends_goes_to_the_one_above(
    one: SingleThreadExecutor, others: ThreadExecutor
) -> None:
    reached, ended = threading.Event(), threading.Event()

    class Late(deque[Any]):
        """The calls that the inner one may run: the first comes as that one ends."""

        def append(self, call: Any, /) -> None:
            reached.set()
            assert ended.wait(PATIENCE)
            super().append(call)

    def outer() -> int:
        (call,) = one.submit(inner).result()
        ended.set()
        return call.result()

    def inner() -> list[Unfuture[int]]:
        nested_in.get().queued = Late()
        call = others.submit(lambda: one.submit(lambda: 1).result())
        assert reached.wait(PATIENCE)
        return [call]

    assert one.submit(outer).result(PATIENCE) == 1


def test_a_coroutine_that_a_function_returned_calls_for_the_one_above(
    one: SingleThreadExecutor,
) -> None:
    async def rest() -> int:
        return await one.submit(lambda: 2)

    def outer() -> Any:
        return one.submit(rest).result()

    assert one.submit(outer).result(PATIENCE) == 2


def test_a_call_in_another_context_is_still_the_call_of_the_one_that_runs(
    one: SingleThreadExecutor,
) -> None:
    elsewhere = copy_context()

    def outer() -> int:
        return elsewhere.run(lambda: one.submit(lambda: 3).result())

    assert one.submit(outer).result(PATIENCE) == 3


def test_a_done_callback_may_wait_as_well(one: SingleThreadExecutor) -> None:
    found: list[int] = []

    def outer() -> None:
        call = one.submit(int)
        call.add_done_callback(lambda _: found.append(in_loop(one.submit, lambda: 1).result()))
        call.result()

    one.submit(outer).result(PATIENCE)
    call = one.submit(time.sleep, 0.01)
    call.add_done_callback(lambda _: found.append(one.submit(lambda: 2).result()))
    wait_until(lambda: found == [1, 2])


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="frees at once")
def test_a_finalizer_between_two_calls_may_wait(one: SingleThreadExecutor) -> None:
    found: list[object] = []

    class Waits:
        def __del__(self) -> None:
            found.append((threading.current_thread().name, one.submit(lambda: 1).result(PATIENCE)))

    held = threading.Event()
    first = one.submit(lambda: held.wait(PATIENCE) and Waits())
    second = one.submit(int)
    del first  # its worker is the last to hold what it gives
    held.set()
    assert second.result(PATIENCE) == 0

    def has_found() -> bool:
        # Without the GIL it ends when the thread that made it next runs Python code.
        one.submit(lambda: None).result(PATIENCE)
        return found == [("one_0", 1)]

    wait_until(has_found)


def test_chains_of_calls_hold_no_more_than_the_last(one: SingleThreadExecutor) -> None:
    ends: Unfuture[int] = Unfuture()

    def link(left: int) -> None:
        if left:
            one.submit(link, left - 1)
            return
        call, length = nested_in.get(), 0
        while call is not None:
            call, length = call.above, length + 1
        ends.set_result(length)

    one.submit(link, 100)
    assert ends.result(PATIENCE) <= 2


# How a wait ends.


def test_a_timeout_that_passes_while_a_nested_call_runs(one: SingleThreadExecutor) -> None:
    log = Log()
    never: Unfuture[None] = Unfuture()
    queued, passed = threading.Event(), threading.Event()

    @unsync
    async def calls() -> None:
        call = unsync(nested)()
        queued.set()
        await call
        await never

    def nested() -> None:
        log.note("nested begins")
        assert passed.wait(PATIENCE)
        log.note("nested ends")

    def impatient() -> None:
        call = calls()
        assert queued.wait(PATIENCE)
        with pytest.raises(TimeoutError):
            call.result(0.05)
        log.note("timeout")

    call = one.submit(impatient)
    wait_until(lambda: log)
    time.sleep(0.1)
    passed.set()
    call.result(PATIENCE)
    assert log == ["nested begins", "nested ends", "timeout"]
    never.cancel()


def test_an_outcome_that_comes_with_the_nested_call_is_in_time(one: SingleThreadExecutor) -> None:
    outcome: Unfuture[int] = Unfuture()

    def nested() -> None:
        time.sleep(0.05)
        outcome.set_result(1)

    def patient() -> int:
        one.submit(nested)
        return outcome.result(0.01)

    assert one.submit(patient).result(PATIENCE) == 1


@pytest.mark.parametrize("timeout", [0, -1, 0.0])
def test_a_wait_of_no_time_runs_nothing(one: SingleThreadExecutor, timeout: float) -> None:
    log = Log()

    def impatient() -> None:
        call = one.submit(log.note, "nested")
        with pytest.raises(TimeoutError):
            call.result(timeout)
        done, _ = concurrent.futures.wait([call], timeout)
        assert not done
        log.note("end")
        call.result()

    one.submit(impatient).result(PATIENCE)
    assert log == ["end", "nested"]


def test_a_nested_call_that_fails(one: SingleThreadExecutor) -> None:
    def outer() -> str:
        with pytest.raises(OSError, match="no such thing"):
            in_loop(one.submit, inner).result()
        return str(one.submit(inner).exception())

    def inner() -> None:
        raise OSError("no such thing")

    assert one.submit(outer).result(PATIENCE) == "no such thing"


def test_a_nested_call_that_is_cancelled_before_it_begins(one: SingleThreadExecutor) -> None:
    log = Log()

    def outer() -> None:
        call = one.submit(log.note, "cancelled")
        assert call.cancel()
        in_loop(one.submit, log.note, "nested").result()

    one.submit(outer).result(PATIENCE)
    assert log == ["nested"]
    wait_until(lambda: one.jobs.counts()[0] == (2, 2, 0, 1, 0))


def test_a_cancel_of_the_one_that_waits_comes_when_the_nested_call_has_ended(
    one: SingleThreadExecutor,
) -> None:
    log = Log()
    begun, gate = threading.Event(), threading.Event()

    def outer() -> None:
        try:
            in_loop(one.submit, inner).result()
        except asyncio.CancelledError:
            log.note("cancelled")
            raise

    def inner() -> None:
        begun.set()
        assert gate.wait(PATIENCE)
        log.note("nested ends")

    async def main() -> None:
        call = one.submit(outer)
        await asyncio.to_thread(begun.wait, PATIENCE)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.set()

    asyncio.run(main())
    one.submit(int).result(PATIENCE)
    # It had its result when the nested one ended, or the cancel came first.
    assert log in (["nested ends", "cancelled"], ["nested ends"])


def test_a_cancel_ends_the_wait_of_a_nested_call(one: SingleThreadExecutor) -> None:
    log = Log()
    never, begun = Unfuture[None](), Unfuture[None]()
    nested: list[Unfuture[None]] = []

    def outer() -> None:
        nested.append(one.submit(inner))
        with pytest.raises(asyncio.CancelledError):
            nested[0].result()
        log.note("outer goes on")

    def inner() -> None:
        log.note("inner waits")
        begun.set_result(None)
        try:
            never.result()
        except asyncio.CancelledError:
            log.note("inner is cancelled")
            raise

    async def main() -> None:
        call = one.submit(outer)
        await begun
        nested[0].cancel()
        await call

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert log == ["inner waits", "inner is cancelled", "outer goes on"]
    assert never.cancelled()


def test_a_cancel_of_the_outer_one_reaches_its_wait_though_a_nested_one_waits(
    one: SingleThreadExecutor,
) -> None:
    log = Log()
    never, begun, gate = Unfuture[None](), Unfuture[None](), Unfuture[None]()

    def outer() -> None:
        one.submit(inner)
        try:
            never.result()
        except asyncio.CancelledError:
            log.note("outer is cancelled")
            raise

    def inner() -> None:
        log.note("inner waits")
        begun.set_result(None)
        gate.result()
        log.note("inner ends")

    async def main() -> None:
        call = one.submit(outer)
        await begun
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gate.set_result(None)
        await one.submit(int)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert log == ["inner waits", "inner ends", "outer is cancelled"]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="CPython's C API")
def test_what_is_raised_in_the_thread_ends_the_call_that_is_on_top(
    one: SingleThreadExecutor,
) -> None:
    class Struck(BaseException):
        pass

    begun = threading.Event()

    def outer() -> str:
        call = one.submit(inner)
        return type(call.exception()).__name__

    def inner() -> None:
        begun.set()
        while True:
            time.sleep(0.001)

    call = one.submit(outer)
    assert begun.wait(PATIENCE)
    (thread,) = one._threads
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(Struck)
    )
    assert call.result(PATIENCE) == "Struck"
    assert directly(5).result(PATIENCE) == 5


def test_recursion_without_an_end_is_an_error_not_a_hang(one: SingleThreadExecutor) -> None:
    @unsync
    def for_ever() -> int:
        return for_ever().result() + 1

    with pytest.raises(RecursionError):
        for_ever().result(PATIENCE)
    assert directly(5).result(PATIENCE) == 5


# What can never come.


@pytest.mark.usefixtures("_looks_often")
def test_waiting_for_a_call_of_others_that_is_behind_is_an_error(
    one: SingleThreadExecutor,
) -> None:
    behind: list[Unfuture[int]] = []
    queued = threading.Event()

    def waits() -> int:
        assert queued.wait(PATIENCE)
        return behind[0].result()

    call = one.submit(waits)
    behind.append(one.submit(lambda: 1))
    queued.set()
    with pytest.raises(RuntimeError, match="would be waited for for ever"):
        call.result(PATIENCE)
    assert behind[0].result(PATIENCE) == 1


@pytest.mark.usefixtures("_looks_often")
def test_waiting_for_what_hangs_upon_a_call_of_others_is_an_error(
    one: SingleThreadExecutor,
) -> None:
    behind: list[Unfuture[int]] = []
    queued = threading.Event()

    @unsync
    async def both() -> list[int]:
        return await asyncio.gather(behind[0].then(lambda done: done.result()), unsync(int)())

    def waits() -> list[int]:
        assert queued.wait(PATIENCE)
        return both().result()

    call = one.submit(waits)
    behind.append(one.submit(lambda: 1))
    queued.set()
    with pytest.raises(RuntimeError, match="hangs upon a call whose turn in this thread"):
        call.result(PATIENCE)
    assert behind[0].result(PATIENCE) == 1


@pytest.mark.usefixtures("_looks_often")
def test_waiting_for_the_caller_is_an_error(one: SingleThreadExecutor) -> None:
    calls: list[Unfuture[int]] = []
    known = threading.Event()

    def outer() -> int:
        assert known.wait(PATIENCE)
        return in_loop(one.submit, inner).result() + 1  # type: ignore[no-any-return]

    def inner() -> int:
        with pytest.raises(RuntimeError, match="would be waited for for ever"):
            calls[0].result()
        return 1

    calls.append(one.submit(outer))
    known.set()
    assert calls[0].result(PATIENCE) == 2


@pytest.mark.usefixtures("_looks_often")
def test_with_a_timeout_it_is_none(one: SingleThreadExecutor) -> None:
    behind: list[Unfuture[int]] = []
    queued = threading.Event()

    def waits() -> None:
        assert queued.wait(PATIENCE)
        with pytest.raises(TimeoutError):
            behind[0].result(0.05)

    call = one.submit(waits)
    behind.append(one.submit(lambda: 1))
    queued.set()
    call.result(PATIENCE)


@pytest.mark.usefixtures("_looks_often")
def test_waiting_for_somebody_outside_is_none(one: SingleThreadExecutor) -> None:
    gate: Unfuture[int] = Unfuture()
    begun = threading.Event()

    def waits() -> int:
        begun.set()
        return in_loop(asyncio.wait_for, gate, PATIENCE).result()  # type: ignore[no-any-return]

    call = one.submit(waits)
    behind = one.submit(int)
    assert begun.wait(PATIENCE)
    time.sleep(0.1)
    assert not call.done()
    gate.set_result(1)
    assert (call.result(PATIENCE), behind.result(PATIENCE)) == (1, 0)


# What a call finds.


def test_each_call_sees_the_context_of_its_caller(one: SingleThreadExecutor) -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")
    context = copy_context()
    context.run(name.set, "test")

    @unsync
    async def between() -> str:
        name.set("coroutine")
        return await one.submit(inner)

    def inner() -> str:
        seen = name.get()
        name.set("inner")
        return seen

    def outer() -> tuple[str, str, str]:
        seen = name.get()
        name.set("outer")
        return seen, between().result(), name.get()

    assert context.run(one.submit, outer).result(PATIENCE) == ("test", "coroutine", "outer")
    assert nested_in.get() is None


def test_a_function_that_runs_between_the_steps_of_a_loop_finds_none_running(
    one: SingleThreadExecutor,
) -> None:
    async def main() -> object:
        before = asyncio.get_running_loop()
        found = await one.submit(inner)
        assert asyncio.get_running_loop() is before
        return found

    def inner() -> object:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return asyncio.run(asyncio.sleep(0, "its own loop"))

    assert one.submit(lambda: asyncio.run(main())).result(PATIENCE) == "its own loop"


async def parked(call: Unfuture[Any]) -> asyncio.Task[Any]:
    """A task of this loop that awaits it, when all that this brings about has been seen to."""

    async def wait() -> Any:
        return await call

    task = asyncio.ensure_future(wait())
    for _ in range(10):
        await asyncio.sleep(0)
    return task


def test_a_loop_of_its_own_is_woken_after_others_have_been_waited_in(
    one: SingleThreadExecutor,
) -> None:
    gate = Unfuture[None]()

    @unsync
    async def steps() -> list[int]:
        await gate
        return [await in_own_loop(1), await by_result(1), await in_own_loop(0)]

    async def main() -> list[int]:
        waiting = await parked(steps())
        # Another wait comes and goes in between, in which the thread is woken in another way.
        in_loop(asyncio.sleep, 0).result()
        gate.set_result(None)
        return await waiting

    assert one.submit(lambda: asyncio.run(main())).result(PATIENCE) == [1, 1, 0]
    # That is so for a wait outside of loops, too.
    assert one.submit(lambda: steps().result()).result(PATIENCE) == [1, 1, 0]


def test_a_ctrl_c_as_a_loop_of_its_own_is_rung_leaves_it_to_be_rung_again(
    one: SingleThreadExecutor,
) -> None:
    log = Log()
    loop = InterruptedLoop()
    gate = Unfuture[None]()
    within: Unfuture[Context] = Unfuture()

    async def main() -> None:
        waiting = await parked(gate)
        within.set_result(copy_context())
        await waiting

    def outer() -> None:
        with contextlib.closing(loop):
            loop.run_until_complete(main())

    call = one.submit(outer)
    context = within.result(PATIENCE)
    try:
        loop.interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            context.run(one.submit, log.note, "first")
        context.run(one.submit, log.note, "second").result(PATIENCE)
        assert log == ["first", "second"]
    finally:
        gate.set_result(None)
    call.result(PATIENCE)


def test_what_comes_at_the_end_of_a_blocking_wait_is_run_by_the_loop_around_it(
    one: SingleThreadExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log()
    outcome = Unfuture[None]()
    left: Unfuture[str] = Unfuture()
    looks = threading.Event()
    run_one = _single_thread._Nesting.run_one

    def look(nesting: _single_thread._Nesting, jobs: Any) -> bool:
        looks.set()
        return run_one(nesting, jobs)

    monkeypatch.setattr(_single_thread._Nesting, "run_one", look)

    @unsync
    async def call_when_it_blocks() -> None:
        await asyncio.to_thread(looks.wait, PATIENCE)
        await one.submit(leave)

    def leave() -> None:
        one.submit(log.note, "left").add_done_callback(lambda call: left.set_result(call.result()))
        outcome.set_result(None)

    async def main() -> None:
        waiting = await parked(left)
        looks.clear()
        call_when_it_blocks()
        outcome.result()
        assert not log
        await waiting

    one.submit(lambda: asyncio.run(main())).result(PATIENCE)
    assert log == ["left"]


def test_a_loop_that_a_nested_call_has_left_waits_no_more(one: SingleThreadExecutor) -> None:
    never = Unfuture[None]()

    def outer() -> None:
        one.submit(inner).result()
        assert one.jobs.counts()[4] == 0

    def inner() -> None:
        loop = asyncio.new_event_loop()
        left.append((loop, loop.create_task(wait())))
        loop.run_until_complete(asyncio.sleep(0))

    async def wait() -> None:
        await never

    left: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = []
    one.submit(outer).result(PATIENCE)
    ((loop, task),) = left
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()


def test_a_loop_of_its_own_goes_on_between_nested_calls(one: SingleThreadExecutor) -> None:
    log = Log()

    async def ticks() -> None:
        while True:
            log.note("tick")
            await asyncio.sleep(0)

    async def main() -> None:
        ticking = asyncio.ensure_future(ticks())
        await asyncio.gather(*(one.submit(log.note, "nested") for _ in range(5)))
        ticking.cancel()

    one.submit(lambda: asyncio.run(main())).result(PATIENCE)
    between = "".join(what[0] for what in log).strip("t")
    assert between.count("n") == 5
    assert "nn" not in between


def test_it_is_known_by_the_function_s_name(one: SingleThreadExecutor) -> None:
    held = threading.Event()

    def load() -> bool:
        return held.wait(PATIENCE)

    call, queued = one.submit(load), one.submit(load)
    assert "load" in repr(queued)
    held.set()
    assert call.result(PATIENCE)
    assert queued.result(PATIENCE)
    assert "load" in repr(call)


def test_what_was_counted(one: SingleThreadExecutor) -> None:
    before = unsync.stats()
    seen: list[tuple[int, int]] = []

    @unsync
    def count(level: int) -> None:
        stats = unsync.stats()
        seen.append((stats.workers - before.workers, stats.workers_waiting))
        if level:
            in_loop(count, level - 1).result()

    count(2).result(PATIENCE)
    assert seen == [(1, 0), (1, 1), (1, 1)]
    wait_until(lambda: unsync.stats().threads.finished - before.threads.finished == 3)
    after = unsync.stats()
    assert after.threads.started - before.threads.started == 3
    assert after.threads.pending == before.threads.pending


def test_those_that_wait_and_the_one_that_runs_are_pending(one: SingleThreadExecutor) -> None:
    def outer() -> int:
        assert len(one.jobs.pending()[1]) == 1
        return in_loop(one.submit, inner).result()  # type: ignore[no-any-return]

    def inner() -> int:
        return len(one.jobs.pending()[1])

    assert one.submit(outer).result(PATIENCE) == 2


def test_a_drain_waits_for_what_nests(one: SingleThreadExecutor) -> None:
    log = Log()
    gate: Unfuture[None] = Unfuture()
    begun = threading.Event()

    @unsync
    async def between() -> None:
        await gate
        await one.submit(log.note, "nested")

    def outer() -> None:
        call = between()
        begun.set()
        call.result()
        one.submit(log.note, "left")

    one.submit(outer)
    assert begun.wait(PATIENCE)
    assert not unsync.drain(0)
    opens = threading.Timer(0.01, gate.set_result, (None,))
    opens.start()
    assert unsync.drain(PATIENCE)
    opens.join()
    assert log == ["nested", "left"]


# The executor itself.


def test_shutdown_waits_for_what_nests(one: SingleThreadExecutor) -> None:
    gate: Unfuture[int] = Unfuture()
    begun = threading.Event()

    def outer() -> int:
        call = one.submit(gate.result)
        begun.set()
        return call.result() + 1

    call = one.submit(outer)
    assert begun.wait(PATIENCE)
    one.shutdown(wait=False)
    gate.set_result(1)
    assert call.result(PATIENCE) == 2
    assert one.join(PATIENCE)
    with pytest.raises(RuntimeError, match="after shutdown"):
        one.submit(int)


def test_shutdown_that_cancels_ends_a_wait_for_what_has_not_begun(
    one: SingleThreadExecutor,
) -> None:
    def outer() -> None:
        call = one.submit(int)
        one.shutdown(cancel_futures=True)
        with pytest.raises(concurrent.futures.CancelledError):
            call.result()

    one.submit(outer).result(PATIENCE)
    assert one.join(PATIENCE)


def test_a_call_after_shutdown_is_refused_also_where_it_would_nest(
    one: SingleThreadExecutor,
) -> None:
    def outer() -> None:
        one.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            in_loop(one.submit, int).result()

    one.submit(outer).result(PATIENCE)


def test_the_initializer_runs_in_the_thread_and_breaks_the_executor_if_it_fails(
    fresh: None, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    with SingleThreadExecutor("init", lambda x: seen.append(threading.get_ident() + x), (0,)) as ok:
        assert ok.submit(threading.get_ident).result(PATIENCE) == seen[0]
    caplog.set_level(logging.CRITICAL + 1, logger="unsync")
    with (
        SingleThreadExecutor(initializer=lambda: 1 // 0) as broken,
        pytest.raises(concurrent.futures.BrokenExecutor),
    ):
        broken.submit(int).result(PATIENCE)


def test_an_initializer_must_be_callable() -> None:
    with pytest.raises(TypeError, match="initializer"):
        SingleThreadExecutor(initializer=3)  # type: ignore[arg-type]


def test_a_subclass_sees_each_call(fresh: None) -> None:
    class Counting(SingleThreadExecutor):
        count = 0

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Unfuture[Any]:
            self.count += 1
            return super().submit(fn, *args, **kwargs)

    with Counting() as executor:

        @unsync(executor=executor)
        def down(depth: int) -> int:
            return 0 if depth == 0 else in_loop(down, depth - 1).result() + 1

        assert down(3).result(PATIENCE) == 3
        assert executor.count == 4


def test_given_by_a_callable(fresh: None) -> None:
    made: list[SingleThreadExecutor] = []

    def make() -> SingleThreadExecutor:
        made.append(SingleThreadExecutor())
        return made[-1]

    @unsync(executor=make)
    def down(depth: int) -> int:
        return 0 if depth == 0 else in_loop(down, depth - 1).result() + 1

    assert down(3).result(PATIENCE) == 3
    assert [call.result(PATIENCE) for call in unsync.calls(down, range(3))] == [0, 1, 2]
    made[0].shutdown()


def test_run_in_executor_and_a_default_executor(one: SingleThreadExecutor) -> None:
    def outer() -> int:
        async def main() -> int:
            return await asyncio.get_running_loop().run_in_executor(one, inner)

        return asyncio.run(main())

    def inner() -> int:
        return in_loop(one.submit, lambda: 1).result()  # type: ignore[no-any-return]

    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(one, outer)

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == 1


def test_a_context_manager_of_others_in_the_thread(one: SingleThreadExecutor) -> None:
    log = Log()

    class Transaction:
        async def __aenter__(self) -> None:
            await one.submit(log.note, "begin")

        async def __aexit__(self, *_: object) -> None:
            await one.submit(log.note, "commit")

    def outer() -> None:
        with AmbientContextManager(Transaction()):
            log.note("body")

    one.submit(outer).result(PATIENCE)
    assert log == ["begin", "body", "commit"]
