"""Functions of a pool that wait for work of the same pool: a spare thread takes their place."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import ACCELERATED, Unfuture, unsync
from unsync._common import waits_for_ever
from unsync.executors import ThreadExecutor

CORE = "unsync._core" if ACCELERATED else "unsync._core_py"


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits while no other is at work looks whether it will be woken: each second."""
    monkeypatch.setattr(f"{CORE}.LOOK_AGAIN_SECONDS", 0.01)


@unsync
def down(depth: int) -> int:
    """From thread to thread."""
    return 0 if depth == 0 else down(depth - 1).result() + 1


@unsync
def hop(depth: int) -> int:
    """From a thread to a coroutine, which goes on in a thread."""
    return 0 if depth == 0 else hop_in_loop(depth - 1).result() + 1


@unsync
async def hop_in_loop(depth: int) -> int:
    return await hop(depth) + 1


@unsync
def in_own_loop(depth: int) -> int:
    """From a thread to an event loop of its own, which awaits the next thread."""

    async def main() -> int:
        return await in_own_loop(depth - 1)

    return 0 if depth == 0 else asyncio.run(main()) + 1


@unsync
def by_wait(depth: int) -> int:
    if depth == 0:
        return 0
    done, _ = concurrent.futures.wait([by_wait(depth - 1)])  # type: ignore[type-var]
    return done.pop().result() + 1  # type: ignore[no-any-return]


@unsync
def by_as_completed(depth: int) -> int:
    if depth == 0:
        return 0
    (call,) = concurrent.futures.as_completed([by_as_completed(depth - 1)])  # type: ignore[type-var]
    return call.result() + 1  # type: ignore[no-any-return]


@unsync
def by_exception(depth: int) -> int:
    if depth == 0:
        return 0
    call = by_exception(depth - 1)
    failure = call.exception()
    if failure is not None:
        raise failure
    return call.result() + 1


@unsync
def by_then(depth: int) -> int:
    return 0 if depth == 0 else by_then(depth - 1).map(lambda found: found + 1).result()


@unsync
def by_stream(depth: int) -> int:
    return 0 if depth == 0 else sum(found + 1 for found in streamed(depth - 1))


@unsync
def streamed(depth: int) -> Generator[int, None, None]:
    yield by_stream(depth).result()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("function", "times"),
    [
        (down, 1),
        (hop, 2),
        (in_own_loop, 1),
        (by_wait, 1),
        (by_as_completed, 1),
        (by_exception, 1),
        (by_then, 1),
        (by_stream, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_hundred_deep(
    make_pool: Callable[..., ThreadExecutor],
    function: Callable[[int], Unfuture[int]],
    times: int,
    threads: int,
) -> None:
    make_pool(threads)
    assert function(100).result(PATIENCE) == 100 * times


def test_many_that_wait_for_many(make_pool: Callable[..., ThreadExecutor]) -> None:
    make_pool(2)

    @unsync
    def sum_up(level: int) -> int:
        if level == 0:
            return 1
        calls = [sum_up(level - 1) for _ in range(4)]
        return sum(call.result() for call in calls)

    assert sum_up(4).result(PATIENCE) == 4**4


def test_who_waits_for_what_another_job_sets_lets_that_job_begin(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    make_pool(2)
    gate: Unfuture[int] = Unfuture()
    waiting = [unsync(gate.result)() for _ in range(5)]
    wait_until(lambda: any(call.running() for call in waiting))
    unsync(gate.set_result)(3).result(PATIENCE)
    assert [call.result(PATIENCE) for call in waiting] == [3] * 5


def test_no_more_run_than_max_workers_while_none_waits(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    make_pool(3)
    lock = threading.Lock()
    running = most = 0

    @unsync
    def busy(step: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1

    # Afterwards there are spare threads.
    assert down(20).result(PATIENCE) == 20
    for call in [busy(step) for step in range(100)]:
        call.result(PATIENCE)
    assert 1 < most <= 3


def test_spare_threads_end_but_for_as_many_as_max_workers(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    executor = make_pool(2)
    before = threading.active_count()
    assert down(50).result(PATIENCE) == 50
    # Two at work, or idle, and two in reserve.
    wait_until(lambda: threading.active_count() <= before + 4, "the end of the spare threads")
    wait_until(lambda: len(executor._threads) <= 4)
    assert down(50).result(PATIENCE) == 50


def test_shutdown_waits_for_those_that_wait(make_pool: Callable[..., ThreadExecutor]) -> None:
    executor = make_pool(1)
    gate: Unfuture[int] = Unfuture()
    calls = [unsync(gate.result)() for _ in range(3)]
    wait_until(lambda: all(call.running() for call in calls))
    executor.shutdown(wait=False)
    gate.set_result(1)
    assert [call.result(PATIENCE) for call in calls] == [1, 1, 1]
    assert executor.join(PATIENCE)


def test_a_timeout_ends_the_wait_and_the_spares_go_on(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    make_pool(1)
    never: Unfuture[int] = Unfuture()

    @unsync
    def impatient() -> str:
        try:
            never.result(0.01)
        except TimeoutError:
            return "gave up"
        return "found"

    assert [call.result(PATIENCE) for call in [impatient() for _ in range(20)]] == ["gave up"] * 20
    assert down(10).result(PATIENCE) == 10


# Past the bound.


@pytest.mark.parametrize("spares", [0, 1, 7])
@pytest.mark.parametrize("function", [down, hop, by_exception, by_then], ids=lambda f: f.__name__)
def test_past_the_bound_waiting_is_an_error_that_says_so(
    make_pool: Callable[..., ThreadExecutor], function: Callable[[int], Unfuture[int]], spares: int
) -> None:
    make_pool(2, spare_workers=spares)
    with pytest.raises(RuntimeError, match=f"all {2 + spares} threads of the pool wait.*spare_wo"):
        function(2 + spares).result(PATIENCE)
    # It goes on as if nothing had been.
    assert down(1 + spares).result(PATIENCE) == 1 + spares


def test_up_to_the_bound_there_is_no_error(make_pool: Callable[..., ThreadExecutor]) -> None:
    make_pool(2, spare_workers=8)
    assert down(9).result(PATIENCE) == 9
    with pytest.raises(RuntimeError, match="all 10 threads"):
        down(10).result(PATIENCE)


def test_a_gather_in_between_is_seen_through(make_pool: Callable[..., ThreadExecutor]) -> None:
    make_pool(1, spare_workers=2)

    @unsync
    def split(depth: int) -> int:
        return 1 if depth == 0 else both(depth - 1).result()

    @unsync
    async def both(depth: int) -> int:
        return sum(await asyncio.gather(split(depth), split(depth)))

    with pytest.raises(RuntimeError, match="all 3 threads"):
        split(5).result(PATIENCE)


def test_what_comes_to_hang_upon_the_pool_later_is_found_too(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    make_pool(1, spare_workers=0)

    @unsync
    async def after_a_while() -> int:
        await asyncio.sleep(0.05)
        return await down(0)

    with pytest.raises(RuntimeError, match="all 1 threads"):
        unsync(lambda: after_a_while().result())().result(PATIENCE)


def test_waiting_for_what_needs_no_thread_is_no_error_past_the_bound(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    make_pool(2, spare_workers=3)

    @unsync
    async def slow(value: int) -> int:
        await asyncio.sleep(0.02)
        return value

    @unsync
    def ask(value: int) -> int:
        return slow(value).result()

    assert [call.result(PATIENCE) for call in [ask(n) for n in range(50)]] == list(range(50))


def test_a_pool_that_waits_for_somebody_outside_is_patient(
    make_pool: Callable[..., ThreadExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pool(1, spare_workers=1)
    looks: list[bool] = []

    def look(*args: Any) -> bool:
        looks.append(waits_for_ever(*args))
        return looks[-1]

    monkeypatch.setattr(f"{CORE}.waits_for_ever", look)
    gate: Unfuture[int] = Unfuture()
    calls = [unsync(gate.result)() for _ in range(4)]
    wait_until(lambda: sum(call.running() for call in calls) == 2)
    wait_until(lambda: len(looks) > 3, "a few looks")
    gate.set_result(1)
    assert [call.result(PATIENCE) for call in calls] == [1, 1, 1, 1]
    assert not any(looks)


def test_a_spare_thread_that_cannot_be_started_is_the_cause_of_the_error(
    make_pool: Callable[..., ThreadExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    failure = RuntimeError("can't start new thread")

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("pool"):
            raise failure
        start(thread)

    make_pool(1, thread_name_prefix="pool")
    unsync(lambda: None)().result(PATIENCE)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="all 1 threads of the pool wait") as caught:
        down(1).result(PATIENCE)
    assert caught.value.__cause__ is failure
    monkeypatch.undo()
    assert down(9).result(PATIENCE) == 9


def test_a_spare_thread_that_cannot_be_started_is_tried_again(
    make_pool: Callable[..., ThreadExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("pool"):
            raise RuntimeError("can't start new thread")
        start(thread)

    make_pool(1, thread_name_prefix="pool")
    gate: Unfuture[int] = Unfuture()
    waiting = unsync(gate.result)()
    wait_until(waiting.running)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    opening = unsync(gate.set_result)(3)
    monkeypatch.undo()
    assert waiting.result(PATIENCE) == 3
    opening.result(PATIENCE)


@pytest.mark.parametrize("number", [-1, -256])
def test_less_than_no_spares_is_a_value_error(number: int) -> None:
    with pytest.raises(ValueError, match="spare_workers must be at least 0, not -"):
        ThreadExecutor(1, spare_workers=number)


# Reports of asgiref, in our terms: a synchronous view calls a coroutine, which calls a function
# that wants a thread, while all threads are taken by such views.


def test_sync_views_that_await_sync_code(make_pool: Callable[..., ThreadExecutor]) -> None:
    make_pool(4)

    @unsync
    def view(number: int) -> int:  # 348: more requests at once than threads
        return middleware(number).result()

    @unsync
    async def middleware(number: int) -> int:
        return await database(number)

    @unsync
    def database(number: int) -> int:
        time.sleep(0.001)
        return number

    async def serve() -> list[int]:
        return await asyncio.gather(*(view(n) for n in range(64)))

    assert asyncio.run(asyncio.wait_for(serve(), PATIENCE)) == list(range(64))


def test_a_coroutine_that_waits_for_a_thread_while_a_thread_waits_for_it(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    make_pool(1)  # 249, 275: everything wants the same one thread

    @unsync
    def outer() -> str:
        return asyncio.run(middle())

    async def middle() -> str:
        return await inner() + await asyncio.wrap_future(inner())  # type: ignore[arg-type]

    @unsync
    def inner() -> str:
        return innermost().result()

    @unsync
    async def innermost() -> str:
        return await unsync(lambda: "a")()

    assert outer().result(PATIENCE) == "aa"


def test_cancelled_requests_leave_no_thread_waiting(
    make_pool: Callable[..., ThreadExecutor],
) -> None:
    make_pool(2)  # 492: the client goes away, and what it had begun waits for ever
    never: list[Unfuture[int]] = []

    @unsync
    def view() -> int:
        never.append(Unfuture())
        return handler(never[-1]).result()

    @unsync
    async def handler(awaited: Unfuture[int]) -> int:
        return await awaited

    async def main() -> None:
        for _ in range(10):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(view(), 0.02)

    asyncio.run(main())
    assert down(5).result(PATIENCE) == 5
    for awaited in never:
        awaited.cancel()


# Threads that die.


def kill(thread_id: int) -> None:
    """Raises SystemExit in that thread, as debuggers and job runners do."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread_id), ctypes.py_object(SystemExit)
    )


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="CPython's C API")
# It may strike in the callback of a weak reference, where Python only mentions it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_thread_that_is_killed_is_made_up_for(
    make_pool: Callable[..., ThreadExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    make_pool(1)
    caplog.set_level(logging.CRITICAL + 1, logger="unsync")
    for _ in range(20):
        kill(unsync(threading.get_ident)().result(PATIENCE))
        # The one it struck in may fail of it; no other is concerned.
        struck = unsync(os.getpid)()
        assert isinstance(struck.exception(PATIENCE), (SystemExit, type(None)))
        assert unsync(os.getpid)().exception(PATIENCE) in (None, struck.exception())
        assert unsync(os.getpid)().result(PATIENCE) == os.getpid()


def test_an_initializer_that_fails_in_a_spare_thread_breaks_the_pool(
    make_pool: Callable[..., ThreadExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="unsync")
    numbers = iter(range(10))

    def only_once() -> None:
        if next(numbers):
            raise OSError("no more connections")

    make_pool(1, initializer=only_once)
    with pytest.raises(concurrent.futures.BrokenExecutor):
        down(3).result(PATIENCE)
