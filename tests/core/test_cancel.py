"""Cancelling: how it travels, what it cannot stop, and what it looks like at each end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import queue
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from support.waiting import PATIENCE, ambient_loop_held, collect, wait_until, wait_until_suspended

from unsync import ACCELERATED, CancelledError, Unfuture, unsync
from unsync.executors import ThreadExecutor

T = TypeVar("T")

# A recursion as deep would end in Python, or crash in C.
LINKS = 100_000 if ACCELERATED else 10_000


class Boom(Exception):
    pass


async def call(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


def in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns when a coroutine of that loop calls it."""
    return asyncio.run_coroutine_threadsafe(call(function, *args), loop).result(PATIENCE)


def run(coroutine: Coroutine[Any, Any, T], where: str) -> T:
    """What the coroutine returns in the ambient loop or in a foreign one."""
    if where == "ambient":
        return Unfuture(coroutine).result(PATIENCE)
    return asyncio.run(coroutine)


class Endless:
    """A coroutine that waits for ever, and notes how it ends."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.ended = threading.Event()
        self.error: BaseException | None = None

    async def run(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except BaseException as exc:
            self.error = exc
            raise
        finally:
            self.ended.set()

    def start(self) -> Unfuture[None]:
        unfuture = Unfuture(self.run())
        assert self.began.wait(PATIENCE)
        in_loop(unsync.loop, lambda: None)  # a turn of the loop later it is suspended
        return unfuture

    def check_cancelled(self) -> None:
        assert self.ended.wait(PATIENCE)
        assert type(self.error) is asyncio.CancelledError


class Function:
    """A function that runs until it is released."""

    def __init__(self, result: object = "done") -> None:
        self.began = threading.Event()
        self.gate = threading.Event()
        self.calls = 0
        self.result = result

    def __call__(self) -> object:
        self.calls += 1
        self.began.set()
        assert self.gate.wait(PATIENCE)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def one_worker() -> Iterator[ThreadExecutor]:
    with ThreadExecutor(max_workers=1) as executor:
        yield executor


@pytest.fixture
def busy(one_worker: ThreadExecutor) -> Iterator[Function]:
    """What the one worker is busy with, so that further jobs wait."""
    function = Function()
    one_worker.submit(function)
    assert function.began.wait(PATIENCE)
    yield function
    function.gate.set()


def check_cancelled(unfuture: Unfuture[Any], message: str | None = None) -> None:
    """Waits for its cancellation with that message."""
    with pytest.raises(CancelledError) as caught:
        unfuture.result(PATIENCE)
    assert caught.value.args == (() if message is None else (message,))
    assert unfuture.cancelled()
    assert unfuture.done()
    assert not unfuture.running()


# Coroutines.


def test_a_coroutine_that_has_not_begun_never_does() -> None:
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)

    with ambient_loop_held():
        unfuture = Unfuture(work())
        assert unfuture.cancel()
        assert unfuture.cancelled()
    in_loop(unsync.loop, lambda: None)
    check_cancelled(unfuture)
    collect()  # "never awaited" would be a warning, and so an error
    assert calls == []


def test_a_coroutine_that_is_suspended_sees_cancelled_error() -> None:
    coroutine = Endless()
    unfuture = coroutine.start()
    assert unfuture.cancel()
    check_cancelled(unfuture)
    coroutine.check_cancelled()


def test_a_coroutine_may_clean_up_before_it_ends() -> None:
    cleaned = threading.Event()
    began = threading.Event()

    @unsync
    async def work() -> None:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    unfuture = work()
    assert began.wait(PATIENCE)
    unfuture.cancel()
    check_cancelled(unfuture)
    assert cleaned.is_set()


@pytest.mark.parametrize("where", ["thread", "loop"])
@pytest.mark.parametrize("end", ["value", "failure"])
def test_a_coroutine_that_ignores_its_cancellation_decides_the_outcome(
    end: str, where: str
) -> None:
    began = threading.Event()

    @unsync
    async def work() -> str:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if end == "failure":
                raise Boom from None
        return "went on"

    unfuture = work()
    assert began.wait(PATIENCE)
    wait_until_suspended(work.__qualname__)
    assert unfuture.cancel() if where == "thread" else in_loop(unsync.loop, unfuture.cancel)
    if end == "failure":
        with pytest.raises(Boom):
            unfuture.result(PATIENCE)
    else:
        assert unfuture.result(PATIENCE) == "went on"
    assert not unfuture.cancelled()


@pytest.mark.parametrize("waits", [False, True])
def test_a_coroutine_that_cancels_itself_in_its_first_step_is_cancelled(waits: bool) -> None:
    async def work() -> str:
        answers.append(own[0].cancel("myself"))
        if waits:
            await asyncio.Event().wait()
        return "went on"

    own: list[Unfuture[str]] = []
    answers: list[bool] = []
    with ambient_loop_held():
        own.append(Unfuture(work()))
    check_cancelled(own[0], "myself")
    assert answers == [True]


def test_a_coroutine_that_is_cancelled_from_elsewhere_in_its_first_step_is_cancelled() -> None:
    began, gate = threading.Event(), threading.Event()

    @unsync
    async def work() -> None:
        began.set()
        assert gate.wait(PATIENCE)
        await asyncio.Event().wait()

    unfuture = work()
    assert began.wait(PATIENCE)
    assert unfuture.cancel("elsewhere")
    assert not unfuture.done()
    gate.set()
    check_cancelled(unfuture, "elsewhere")


def test_a_coroutine_that_raises_cancelled_error_is_cancelled() -> None:
    @unsync
    async def work() -> None:
        raise asyncio.CancelledError("enough")

    check_cancelled(work(), "enough")


def test_a_task_that_is_cancelled_inside_the_loop_cancels_its_unfuture() -> None:
    tasks: list[asyncio.Task[Any]] = []
    began = threading.Event()

    @unsync
    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        began.set()
        await asyncio.Event().wait()

    unfuture = work()
    assert began.wait(PATIENCE)
    unsync.loop.call_soon_threadsafe(tasks[0].cancel)
    check_cancelled(unfuture)


# Functions.


def test_a_queued_job_is_never_called(one_worker: ThreadExecutor, busy: Function) -> None:
    queued = Function()
    unfuture = one_worker.submit(queued)
    assert not unfuture.running()
    assert unfuture.cancel("why")
    check_cancelled(unfuture, "why")
    following = one_worker.submit(int)
    busy.gate.set()
    assert following.result(PATIENCE) == 0
    assert queued.calls == 0


def test_a_queued_job_of_a_stdlib_executor_is_never_called() -> None:
    first, queued = Function(), Function()
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        running = unsync(executor=executor)(first)()
        assert first.began.wait(PATIENCE)
        unfuture = unsync(executor=executor)(queued)()
        assert not running.cancel()
        assert unfuture.cancel()
        check_cancelled(unfuture)
        first.gate.set()
        assert running.result(PATIENCE) == "done"
    assert queued.calls == 0


def test_a_running_function_cannot_be_cancelled_from_a_plain_thread(
    one_worker: ThreadExecutor,
) -> None:
    function = Function()
    unfuture = one_worker.submit(function)
    assert function.began.wait(PATIENCE)
    assert not unfuture.cancel()
    assert not unfuture.cancelled()
    assert unfuture.running()
    function.gate.set()
    assert unfuture.result(PATIENCE) == "done"


@pytest.mark.parametrize("result", ["late", Boom("late")], ids=["result", "failure"])
@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_in_a_loop_a_running_function_is_let_go_and_its_outcome_dropped(
    where: str, result: object, caplog: pytest.LogCaptureFixture
) -> None:
    function = Function(result)
    with ThreadExecutor(max_workers=1) as executor:
        unfuture = executor.submit(function)
        assert function.began.wait(PATIENCE)
        if where == "ambient":
            assert in_loop(unsync.loop, unfuture.cancel, "why")
        else:
            assert asyncio.run(call(unfuture.cancel, "why"))
        assert not function.gate.is_set()
        check_cancelled(unfuture, "why")
        function.gate.set()
    check_cancelled(unfuture, "why")
    del unfuture
    collect()
    in_loop(unsync.loop, lambda: None)
    assert caplog.records == []


# One that is awaited.


def pending() -> Unfuture[Any]:
    return Unfuture()


def wrapping_a_concurrent_future() -> Unfuture[Any]:
    return Unfuture(concurrent.futures.Future())


def wrapping_an_asyncio_future() -> Unfuture[Any]:
    return Unfuture(in_loop(unsync.loop, unsync.loop.create_future))


def suspended_coroutine() -> Unfuture[Any]:
    return Endless().start()


def following_another() -> Unfuture[Any]:
    return Unfuture(Unfuture())


def continuing_another() -> Unfuture[Any]:
    return Unfuture.from_value(1).then(lambda _: Endless().run())


awaitables = pytest.mark.parametrize(
    "make",
    [
        pending,
        wrapping_a_concurrent_future,
        wrapping_an_asyncio_future,
        suspended_coroutine,
        following_another,
        continuing_another,
    ],
)


async def cancel_awaiter(awaitable: Awaitable[Any]) -> None:
    """Awaits in a task of its own, and cancels that once the wait has begun."""

    async def wait() -> None:
        await awaitable

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    task.cancel("why")
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.shield(task), PATIENCE)


@pytest.mark.parametrize("make", [suspended_coroutine, wrapping_an_asyncio_future, Endless])
def test_a_cancel_while_a_continuations_function_runs_reaches_what_it_returns(
    make: Callable[[], Any],
) -> None:
    begun, gate = threading.Event(), threading.Event()
    made = make()

    def make_the_next(_: object) -> Any:
        begun.set()
        assert gate.wait(PATIENCE)
        return made.run() if isinstance(made, Endless) else made

    unfuture = Unfuture.from_value(1).then(make_the_next)
    assert begun.wait(PATIENCE)

    async def cancel() -> bool:
        return unfuture.cancel("why")

    try:
        assert asyncio.run(cancel())
    finally:
        gate.set()
    check_cancelled(unfuture, "why")
    if isinstance(made, Endless):
        in_loop(unsync.loop, lambda: None)
        assert not made.began.is_set()
    else:
        check_cancelled(made, "why")


@awaitables
@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_a_cancelled_awaiter_cancels_what_it_awaits(
    make: Callable[[], Unfuture[Any]], where: str
) -> None:
    unfuture = make()
    work = cancel_awaiter(unfuture)
    run(work, where)
    with pytest.raises(CancelledError):
        unfuture.result(PATIENCE)
    assert unfuture.cancelled()


@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_a_cancelled_awaiter_cancels_the_coroutine_that_it_awaits(where: str) -> None:
    coroutine = Endless()
    work = cancel_awaiter(coroutine.start())
    run(work, where)
    coroutine.check_cancelled()
    assert coroutine.error is not None
    assert coroutine.error.args == ("why",)


def test_a_cancelled_awaiter_cancels_the_queued_job_that_it_awaits(
    one_worker: ThreadExecutor, busy: Function
) -> None:
    queued = Function()
    unfuture = one_worker.submit(queued)
    asyncio.run(cancel_awaiter(unfuture))
    check_cancelled(unfuture, "why")
    busy.gate.set()
    assert one_worker.submit(int).result(PATIENCE) == 0
    assert queued.calls == 0


def test_a_cancelled_awaiter_in_the_ambient_loop_cancels_through_unsynced_coroutines() -> None:
    innermost = Endless()

    @unsync
    async def inner() -> None:
        await Unfuture(innermost.run())

    @unsync
    async def outer() -> None:
        await inner()

    unfuture = outer()
    assert innermost.began.wait(PATIENCE)
    wait_until_suspended(outer.__qualname__)
    unfuture.cancel()
    check_cancelled(unfuture)
    innermost.check_cancelled()


def test_all_other_awaiters_of_a_cancelled_one_are_cancelled_too() -> None:
    async def wait() -> None:
        await unfuture

    unfuture: Unfuture[None] = Unfuture()
    others = [Unfuture(wait()) for _ in range(3)]
    wait_until_suspended(wait.__qualname__, len(others))
    asyncio.run(cancel_awaiter(unfuture))
    for other in others:
        check_cancelled(other, "why")


@awaitables
def test_a_cancelled_gather_cancels_all_that_it_waits_for(
    make: Callable[[], Unfuture[Any]],
) -> None:
    unfutures = [make(), make()]

    async def work() -> None:
        await cancel_awaiter(asyncio.gather(*unfutures))

    asyncio.run(work())
    for unfuture in unfutures:
        with pytest.raises(CancelledError):
            unfuture.result(PATIENCE)


async def by_wait_for(unfuture: Unfuture[Any]) -> None:
    await asyncio.wait_for(unfuture, 0.01)


async def by_timeout(unfuture: Unfuture[Any]) -> None:
    async with asyncio.timeout(0.01):
        await unfuture


timeouts = pytest.mark.parametrize("limit", [by_wait_for, by_timeout])


@timeouts
@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_a_timeout_around_a_running_function_does_not_wait_for_it(
    limit: Callable[[Unfuture[Any]], Any], where: str, one_worker: ThreadExecutor
) -> None:
    function = Function()
    unfuture = one_worker.submit(function)
    assert function.began.wait(PATIENCE)
    with pytest.raises(asyncio.TimeoutError):
        run(limit(unfuture), where)
    # Only now: so nobody waited for it.
    function.gate.set()
    assert unfuture.cancelled()


@timeouts
@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_a_timeout_around_a_coroutine_cancels_it(
    limit: Callable[[Unfuture[Any]], Any], where: str
) -> None:
    coroutine = Endless()
    unfuture = coroutine.start()
    with pytest.raises(asyncio.TimeoutError):
        run(limit(unfuture), where)
    coroutine.check_cancelled()
    with pytest.raises(CancelledError):
        unfuture.result(PATIENCE)


# What it wraps or continues.


@pytest.mark.parametrize("loop_of", ["ambient", "foreign"])
@pytest.mark.parametrize("kind", ["future", "task"])
def test_cancelling_it_cancels_the_asyncio_future_that_it_wraps(kind: str, loop_of: str) -> None:
    loop = unsync.loop if loop_of == "ambient" else asyncio.new_event_loop()
    coroutine = Endless()
    found: list[Any] = []

    async def work() -> None:
        future = loop.create_future() if kind == "future" else loop.create_task(coroutine.run())
        found.extend([future, Unfuture(future)])
        await asyncio.sleep(0)
        canceller = threading.Thread(target=found[1].cancel, args=("why",))
        canceller.start()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(future), PATIENCE)
        canceller.join(PATIENCE)

    if loop_of == "ambient":
        Unfuture(work()).result(PATIENCE)
    else:
        loop.run_until_complete(work())
        loop.close()
    future, unfuture = found
    assert future.cancelled()
    check_cancelled(unfuture, "why")
    if kind == "task":
        coroutine.check_cancelled()


def test_cancelling_the_wrapped_asyncio_future_cancels_it_with_the_message() -> None:
    future = in_loop(unsync.loop, unsync.loop.create_future)
    unfuture: Unfuture[None] = Unfuture(future)
    in_loop(unsync.loop, future.cancel, "why")
    check_cancelled(unfuture, "why")


def test_cancelling_it_cancels_the_concurrent_future_that_it_wraps() -> None:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    unfuture = Unfuture(future)
    assert unfuture.cancel()
    assert future.cancelled()
    check_cancelled(unfuture)


def test_cancelling_the_wrapped_concurrent_future_cancels_it() -> None:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    unfuture = Unfuture(future)
    assert future.cancel()
    check_cancelled(unfuture)


def test_a_running_concurrent_future_that_it_wraps_is_let_go_in_a_loop_only() -> None:
    future: concurrent.futures.Future[int] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    unfuture = Unfuture(future)
    assert not unfuture.cancel()
    assert not unfuture.done()
    assert asyncio.run(call(unfuture.cancel))
    check_cancelled(unfuture)
    future.set_result(1)
    check_cancelled(unfuture)


def test_one_that_wraps_a_future_of_a_closed_loop_can_still_be_cancelled() -> None:
    closed = asyncio.new_event_loop()
    future = closed.create_future()

    async def wrap() -> Unfuture[None]:
        return Unfuture(future)

    unfuture = closed.run_until_complete(wrap())
    closed.close()
    assert unfuture.cancel("why")
    check_cancelled(unfuture, "why")


def test_cancelling_it_cancels_the_unfuture_that_it_was_made_from() -> None:
    source: Unfuture[None] = Unfuture()
    last = Unfuture(Unfuture(source))
    assert last.cancel("why")
    check_cancelled(source, "why")
    check_cancelled(last, "why")


def test_cancelling_the_source_of_a_chain_skips_its_continuations() -> None:
    calls: list[object] = []
    source: Unfuture[int] = Unfuture()
    end = source.then(calls.append).map(calls.append)
    assert source.cancel("why")
    check_cancelled(end, "why")
    assert calls == []


@pytest.mark.parametrize("continue_", [Unfuture.then, Unfuture.map])
def test_cancelling_the_end_of_a_chain_cancels_its_source(
    continue_: Callable[..., Unfuture[Any]],
) -> None:
    calls: list[object] = []
    coroutine = Endless()
    source: Unfuture[Any] = coroutine.start()
    middle = continue_(source, calls.append)
    end = continue_(middle, calls.append)
    assert end.cancel("why")
    check_cancelled(source, "why")
    check_cancelled(middle, "why")
    check_cancelled(end, "why")
    coroutine.check_cancelled()
    assert calls == []


def test_a_continuation_that_has_not_begun_never_does() -> None:
    calls: list[object] = []
    with ambient_loop_held():
        unfuture = Unfuture.from_value(1).then(calls.append)
        assert unfuture.cancel()
    in_loop(unsync.loop, lambda: None)
    check_cancelled(unfuture)
    assert calls == []


@pytest.mark.parametrize("returns", ["coroutine", "unfuture", "asyncio future", "chain"])
def test_cancelling_a_continuation_reaches_the_work_that_it_returned(returns: str) -> None:
    coroutine = Endless()

    def continuation(_: object) -> Any:
        if returns == "coroutine":
            return coroutine.run()
        if returns == "asyncio future":
            return asyncio.ensure_future(coroutine.run())
        inner = Unfuture(coroutine.run())
        return inner if returns == "unfuture" else inner.then(id).then(id)

    end = Unfuture.from_value(1).then(continuation).map(id)
    assert coroutine.began.wait(PATIENCE)
    assert end.cancel()
    check_cancelled(end)
    coroutine.check_cancelled()


def test_a_continuation_that_raises_cancelled_error_is_cancelled() -> None:
    def continuation(_: object) -> None:
        raise asyncio.CancelledError("enough")

    check_cancelled(Unfuture.from_value(1).then(continuation).map(id), "enough")


def test_a_long_chain_is_cancelled_from_its_end() -> None:
    source: Unfuture[Any] = Unfuture()
    end = source
    for _ in range(LINKS):
        end = end.map(id)
    assert end.cancel()
    assert source.cancelled()
    check_cancelled(end)


def test_a_long_chain_is_cancelled_from_its_source() -> None:
    source: Unfuture[Any] = Unfuture()
    end = source
    for _ in range(LINKS):
        end = end.map(id)
    assert source.cancel()
    check_cancelled(end)


# When it is too late.


@pytest.mark.parametrize("where", ["thread", "loop"])
@pytest.mark.parametrize("outcome", ["result", "failure", "cancellation"])
def test_after_the_end_cancelling_changes_nothing(outcome: str, where: str) -> None:
    unfuture: Unfuture[int] = Unfuture()
    if outcome == "result":
        unfuture.set_result(42)
    elif outcome == "failure":
        unfuture.set_exception(Boom())
    else:
        unfuture.cancel("first")
    answer = unfuture.cancel() if where == "thread" else asyncio.run(call(unfuture.cancel))
    assert answer == (outcome == "cancellation")
    if outcome == "result":
        assert unfuture.result() == 42
    elif outcome == "failure":
        assert isinstance(unfuture.exception(), Boom)
    else:
        check_cancelled(unfuture, "first")


def test_a_cancelled_one_cannot_be_set() -> None:
    unfuture: Unfuture[int] = Unfuture()
    unfuture.cancel()
    with pytest.raises(asyncio.InvalidStateError):
        unfuture.set_result(1)
    check_cancelled(unfuture)


# What it looks like.


@pytest.mark.parametrize("look", [Unfuture.result, Unfuture.exception])
@pytest.mark.parametrize("kind", [asyncio.CancelledError, concurrent.futures.CancelledError])
def test_a_thread_gets_the_error_of_both_worlds(
    look: Callable[..., object], kind: type[BaseException]
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    unfuture.cancel("why")
    with pytest.raises(kind, match="why") as caught:
        look(unfuture)
    assert type(caught.value) is CancelledError


async def look_by_await(unfuture: Unfuture[Any]) -> None:
    await unfuture


async def look_by_result(unfuture: Unfuture[Any]) -> None:
    unfuture.result()


async def look_by_exception(unfuture: Unfuture[Any]) -> None:
    unfuture.exception()


@pytest.mark.parametrize("look", [look_by_await, look_by_result, look_by_exception])
@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_except_exception_in_a_coroutine_never_swallows_a_cancellation(
    where: str, look: Callable[[Unfuture[Any]], Any]
) -> None:
    async def work() -> str:
        try:
            await look(unfuture)
        except Exception:
            return "swallowed"
        except asyncio.CancelledError as exc:
            return f"{type(exc).__module__}: {exc}"
        return "nothing"

    unfuture: Unfuture[int] = Unfuture()
    unfuture.cancel("why")
    assert run(work(), where) == "asyncio.exceptions: why"


@pytest.mark.parametrize("where", ["ambient", "foreign"])
def test_an_awaiter_that_waits_gets_asyncios_own_error(where: str, in_thread: Any) -> None:
    async def work() -> BaseException:
        try:
            await unfuture
        except BaseException as exc:
            return exc
        raise AssertionError("no cancellation")

    async def cancel_meanwhile() -> BaseException:
        waiting = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        in_thread(lambda: unfuture.cancel("why"))
        return await asyncio.wait_for(waiting, PATIENCE)

    unfuture: Unfuture[int] = Unfuture()
    error = run(cancel_meanwhile(), where)
    assert type(error) is asyncio.CancelledError
    assert error.args == ("why",)


# Races.


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def contend(
    in_thread: Any, unfutures: list[Unfuture[Any]], release: Callable[[], object]
) -> list[bool]:
    """Cancels each from many threads as they begin; whether anybody was told that it worked."""
    threads = 4
    barrier = threading.Barrier(threads + 1)
    answers = [[False] * len(unfutures) for _ in range(threads)]

    def cancel_all(number: int) -> None:
        barrier.wait(PATIENCE)
        numbers = range(len(unfutures))
        # Some run ahead of the work, some come to meet it.
        for which in numbers if number % 2 else reversed(numbers):
            answers[number][which] = unfutures[which].cancel()

    cancelling = [in_thread(functools.partial(cancel_all, number)) for number in range(threads)]
    barrier.wait(PATIENCE)
    release()
    for thread in cancelling:
        thread.join(PATIENCE)
    return [any(column) for column in zip(*answers, strict=True)]


@pytest.mark.parametrize("_round", range(8))
@pytest.mark.usefixtures("restless")
def test_jobs_are_either_run_or_cancelled_though_many_threads_cancel_them(
    in_thread: Any, _round: int
) -> None:
    count, workers = 200, 3
    ran: list[int] = []
    ended: list[Unfuture[None]] = []
    gate = threading.Event()
    with ThreadExecutor(max_workers=workers) as executor:
        for _ in range(workers):
            executor.submit(gate.wait, PATIENCE)
        unfutures = [executor.submit(ran.append, number) for number in range(count)]
        for unfuture in unfutures:
            unfuture.add_done_callback(ended.append)
        told = contend(in_thread, unfutures, gate.set)
    for number, unfuture in enumerate(unfutures):
        assert unfuture.done()
        assert unfuture.cancelled() == told[number] == (number not in ran)
    assert len(ended) == len(set(ended)) == count
    assert len(ran) == len(set(ran))


@pytest.mark.parametrize("_round", range(8))
@pytest.mark.usefixtures("restless")
def test_coroutines_end_once_and_run_unless_cancelled_though_many_threads_cancel_them(
    in_thread: Any, _round: int
) -> None:
    count = 200
    ran: list[int] = []
    ended: list[Unfuture[None]] = []

    @unsync
    async def work(number: int) -> None:
        ran.append(number)

    with ambient_loop_held() as release:
        unfutures = [work(number) for number in range(count)]
        for unfuture in unfutures:
            unfuture.add_done_callback(ended.append)
        told = contend(in_thread, unfutures, release)
    for number, unfuture in enumerate(unfutures):
        wait_until(unfuture.done)
        # One that is told to cancel in its only step has run, and is cancelled all the same.
        assert told[number] if unfuture.cancelled() else number in ran
    wait_until(lambda: len(ended) >= count)
    assert len(ended) == len(set(ended)) == count
    assert len(ran) == len(set(ran))


@pytest.mark.usefixtures("restless")
def test_setting_and_cancelling_at_once_ends_in_one_of_the_two(in_thread: Any) -> None:
    rounds = 100
    unfutures: list[Unfuture[int]] = [Unfuture() for _ in range(rounds)]
    barrier = threading.Barrier(2)
    was_set: list[bool] = []
    was_cancelled: list[bool] = []

    def set_them() -> None:
        for unfuture in unfutures:
            barrier.wait(PATIENCE)
            try:
                unfuture.set_result(42)
            except asyncio.InvalidStateError:
                was_set.append(False)
            else:
                was_set.append(True)

    def cancel_them() -> None:
        for unfuture in unfutures:
            barrier.wait(PATIENCE)
            was_cancelled.append(unfuture.cancel())

    for thread in (in_thread(set_them), in_thread(cancel_them)):
        thread.join(PATIENCE)
    for unfuture, by_setting, by_cancelling in zip(unfutures, was_set, was_cancelled, strict=True):
        assert by_setting != by_cancelling
        assert unfuture.cancelled() == by_cancelling


# A cancel scope of anyio cancels a task in each turn of its loop until the task has left it.


class Cleaning:
    """What needs some turns of its loop to clean up, which a second cancel would end."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.cleaned_up = False

    async def run(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self.clean_up()

    @contextlib.asynccontextmanager
    async def manage(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.clean_up()

    async def clean_up(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        self.cleaned_up = True


@unsync
def waits(event: threading.Event) -> bool:
    return event.wait(PATIENCE)


@unsync
def next_of(numbers: queue.SimpleQueue[int]) -> int:
    return numbers.get(timeout=PATIENCE)


async def cancel_again_and_again(task: asyncio.Task[Any], words: str) -> None:
    await asyncio.sleep(0)  # in which it makes its first step, if it has not
    while not task.done():
        task.cancel(f"{words} cancel scope 7f3a5c0")
        await asyncio.sleep(0)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def await_it(unfuture: Unfuture[None]) -> None:
    await unfuture


async def await_view(unfuture: Unfuture[None]) -> None:
    await unfuture.future


async def await_gathered(unfuture: Unfuture[None]) -> None:
    await asyncio.gather(unfuture)


@pytest.mark.parametrize("where", ["ambient", "foreign"])
@pytest.mark.parametrize("words", ["Cancelled via", "Cancelled by"])
@pytest.mark.parametrize("way", [await_it, await_view, await_gathered])
def test_a_scope_cancels_what_is_awaited_once(
    where: str, words: str, way: Callable[[Unfuture[None]], Coroutine[Any, Any, None]]
) -> None:
    work = Cleaning()

    async def main() -> None:
        task = asyncio.ensure_future(way(unsync(work.run)()))
        assert await waits(work.began)
        await cancel_again_and_again(task, words)
        assert task.cancelled()
        assert work.cleaned_up

    run(main(), where)


def test_a_scope_that_cancels_a_body_lets_the_manager_clean_up() -> None:
    work = Cleaning()
    inside = threading.Event()

    async def body() -> None:
        async with unsync(work.manage)():
            inside.set()
            await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.ensure_future(body())
        assert await waits(inside)
        await cancel_again_and_again(task, "Cancelled via")
        assert task.cancelled()
        assert work.cleaned_up

    asyncio.run(main())


def test_a_scope_that_cancels_the_entering_lets_it_clean_up() -> None:
    work = Cleaning()

    @unsync
    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        await work.run()
        yield

    async def enter() -> None:
        async with manager():
            pytest.fail("it is not entered")

    async def main() -> None:
        task = asyncio.ensure_future(enter())
        assert await waits(work.began)
        await cancel_again_and_again(task, "Cancelled via")
        assert task.cancelled()
        assert work.cleaned_up

    asyncio.run(main())


@pytest.mark.parametrize("message", [None, "no scope"])
def test_other_cancels_are_passed_on_each_time(message: str | None) -> None:
    """As in asyncio."""
    begun, heard = threading.Event(), queue.SimpleQueue[int]()

    @unsync
    async def stubborn() -> None:
        begun.set()
        for number in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            heard.put(number)

    async def main() -> None:
        task = asyncio.ensure_future(await_it(stubborn()))
        assert await waits(begun)
        await asyncio.sleep(0)
        for number in range(3):
            task.cancel(message)
            assert await next_of(heard) == number
        await task

    asyncio.run(main())
