"""`ThreadExecutor`, the class of `unsync.thread_executor`, used directly."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures.thread import BrokenThreadPool
from types import FrameType
from typing import Any

import pytest
from support.waiting import PATIENCE, collect

from unsync import Unfuture, _common, unsync
from unsync.executors import ThreadExecutor

InThread = Callable[[Callable[[], object]], threading.Thread]


class Gate:
    """A job that says when it has begun, and runs until it is told to end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()
        self.ended = False

    def __call__(self) -> str:
        self.thread = threading.current_thread()
        self.begun.set()
        assert self.open.wait(PATIENCE)
        self.ended = True
        return "through"


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def one() -> Iterator[ThreadExecutor]:
    """An executor with one thread."""
    with ThreadExecutor(1) as executor:
        yield executor


def occupy(executor: ThreadExecutor, gate: Gate) -> Unfuture[str]:
    unfuture = executor.submit(gate)
    assert gate.begun.wait(PATIENCE)
    return unfuture


def test_it_is_the_class_of_the_default_executor() -> None:
    assert type(unsync.thread_executor) is ThreadExecutor
    assert issubclass(ThreadExecutor, concurrent.futures.ThreadPoolExecutor)


# submit and map.


def test_submit_returns_an_unfuture_of_what_the_function_returns(one: ThreadExecutor) -> None:
    unfuture = one.submit(divmod, 7, 2)
    assert type(unfuture) is Unfuture
    assert unfuture.result(PATIENCE) == (3, 1)


def test_submit_passes_every_keyword_argument_on(one: ThreadExecutor) -> None:
    names = {"self": 1, "fn": 2, "function": 3, "args": 4, "kwargs": 5}
    assert one.submit(dict, **names).result(PATIENCE) == names


def test_submit_needs_a_function(one: ThreadExecutor) -> None:
    with pytest.raises(TypeError):
        one.submit()  # type: ignore[call-arg]


def test_a_failure_is_the_unfutures(one: ThreadExecutor) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        one.submit(int, "x").result(PATIENCE)


def test_a_job_runs_in_another_thread_than_the_submitters(one: ThreadExecutor) -> None:
    assert one.submit(threading.get_ident).result(PATIENCE) != threading.get_ident()


def test_a_job_is_running_from_its_begin_to_its_end(one: ThreadExecutor, gate: Gate) -> None:
    unfuture = occupy(one, gate)
    waiting = one.submit(int)
    assert unfuture.running()
    assert not waiting.running()
    assert not unfuture.done()
    gate.open.set()
    assert unfuture.result(PATIENCE) == "through"
    assert waiting.result(PATIENCE) == 0
    assert not unfuture.running()


def test_a_queued_job_that_is_cancelled_does_not_run(one: ThreadExecutor, gate: Gate) -> None:
    blocker = occupy(one, gate)
    ran: list[int] = []
    first, second = one.submit(ran.append, 1), one.submit(ran.append, 2)
    assert first.cancel()
    assert not blocker.cancel()
    gate.open.set()
    second.result(PATIENCE)
    assert ran == [2]
    assert first.cancelled()
    assert blocker.result(PATIENCE) == "through"


def test_map_yields_results_in_the_order_of_the_arguments() -> None:
    with ThreadExecutor(3) as executor:
        assert list(executor.map(pow, range(20), [2] * 20)) == [n * n for n in range(20)]


def test_map_raises_what_a_call_raised(one: ThreadExecutor) -> None:
    results = one.map(int, ["1", "x", "3"])
    assert next(results) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        next(results)


def test_map_gives_up_after_its_timeout_and_cancels_what_has_not_begun(
    one: ThreadExecutor, gate: Gate
) -> None:
    ran: list[int] = []
    occupy(one, gate)
    with pytest.raises(concurrent.futures.TimeoutError):
        list(one.map(ran.append, [1, 2], timeout=0.01))
    gate.open.set()
    one.submit(int).result(PATIENCE)
    assert ran == []


def test_a_job_sees_the_submitters_context_and_keeps_its_changes_to_itself(
    one: ThreadExecutor,
) -> None:
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="none")

    def change() -> str:
        before = var.get()
        var.set("changed")
        return before

    def submit() -> None:
        var.set("mine")
        assert one.submit(change).result(PATIENCE) == "mine"
        assert one.submit(var.get).result(PATIENCE) == var.get() == "mine"

    assert one.submit(var.get).result(PATIENCE) == "none"
    contextvars.copy_context().run(submit)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_job_that_raises_a_base_exception_leaves_its_worker_alive(
    one: ThreadExecutor, kind: type[BaseException]
) -> None:
    def fail() -> None:
        raise kind("stop")

    ident = one.submit(threading.get_ident).result(PATIENCE)
    unfuture = one.submit(fail)
    assert type(unfuture.exception(PATIENCE)) is kind
    assert one.submit(threading.get_ident).result(PATIENCE) == ident


def test_a_job_may_submit_another_one(one: ThreadExecutor) -> None:
    assert one.submit(lambda: one.submit(int, "3")).result(PATIENCE).result(PATIENCE) == 3


# asyncio.


def test_a_loop_can_run_functions_in_it(one: ThreadExecutor) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        return await asyncio.wait_for(loop.run_in_executor(one, int, "5"), PATIENCE)

    assert asyncio.run(main()) == 5


def test_asyncio_can_wrap_its_futures(one: ThreadExecutor) -> None:
    async def main() -> int:
        return await asyncio.wait_for(asyncio.wrap_future(one.submit(int, "5")), PATIENCE)

    assert asyncio.run(main()) == 5


def test_it_can_be_a_loops_default_executor() -> None:
    async def main() -> str:
        asyncio.get_running_loop().set_default_executor(ThreadExecutor(1, "default"))
        return await asyncio.wait_for(asyncio.to_thread(lambda: current_name()), PATIENCE)

    assert asyncio.run(main()).startswith("default")


# Threads.


def current_name() -> str:
    return threading.current_thread().name


def test_jobs_run_in_the_order_they_came_on_one_thread(one: ThreadExecutor, gate: Gate) -> None:
    occupy(one, gate)
    ran: list[tuple[int, int]] = []
    unfutures = [
        one.submit(lambda n: ran.append((n, threading.get_ident())), n) for n in range(100)
    ]
    gate.open.set()
    for unfuture in unfutures:
        unfuture.result(PATIENCE)
    assert [n for n, _ in ran] == list(range(100))
    assert len({ident for _, ident in ran}) == 1


def test_there_are_as_many_threads_as_jobs_up_to_max_workers() -> None:
    with ThreadExecutor(3) as executor:
        barrier = threading.Barrier(4)
        names: list[str] = []

        def meet() -> None:
            names.append(current_name())
            barrier.wait(PATIENCE)

        unfutures = [executor.submit(meet) for _ in range(6)]
        barrier.wait(PATIENCE)  # the first three can only meet in three threads
        assert len(set(names[:3])) == 3
        barrier.wait(PATIENCE)
        for unfuture in unfutures:
            unfuture.result(PATIENCE)
        assert len(set(names)) == 3


def test_an_idle_thread_is_used_again() -> None:
    """A pool whose threads were not would need a new one for each job."""
    with ThreadExecutor(60) as executor:
        threads = {executor.submit(threading.current_thread).result(PATIENCE) for _ in range(60)}
        assert len(threads) < 60


@pytest.mark.alone
def test_no_thread_is_started_before_the_first_job() -> None:
    before = threading.active_count()
    with ThreadExecutor(4):
        assert threading.active_count() == before


def test_threads_are_daemons_and_bear_the_prefix() -> None:
    with ThreadExecutor(1, thread_name_prefix="mill") as executor:
        thread = executor.submit(threading.current_thread).result(PATIENCE)
    assert thread.name.startswith("mill")
    assert thread.daemon


def test_executors_without_a_prefix_name_their_threads_apart() -> None:
    with ThreadExecutor(1) as one, ThreadExecutor(1) as other:
        names = {executor.submit(current_name).result(PATIENCE) for executor in (one, other)}
    assert len(names) == 2


def test_its_parents_default_decides_how_many_threads() -> None:
    with ThreadExecutor() as executor, concurrent.futures.ThreadPoolExecutor() as parent:
        assert executor._max_workers == parent._max_workers >= (os.cpu_count() or 1)


@pytest.mark.parametrize("number", [0, -1])
def test_fewer_than_one_worker_is_a_value_error(number: int) -> None:
    with pytest.raises(ValueError, match="max_workers"):
        ThreadExecutor(number)


def test_many_threads_may_submit_at_once(in_thread: InThread) -> None:
    barrier = threading.Barrier(8)
    done: list[int] = []

    def submit() -> None:
        barrier.wait(PATIENCE)
        for unfuture in [executor.submit(int, "1") for _ in range(200)]:
            done.append(unfuture.result(PATIENCE))  # noqa: PERF401

    with ThreadExecutor(4) as executor:
        threads = [in_thread(submit) for _ in range(8)]
        for thread in threads:
            thread.join(PATIENCE)
    assert done == [1] * 1600


@pytest.mark.parametrize("started", [1, 3, 8])
def test_jobs_that_come_at_once_run_at_once(started: int) -> None:
    """However many workers there are already, idle or not yet started."""

    def meet(barrier: threading.Barrier) -> None:
        barrier.wait(PATIENCE)

    def burst(executor: ThreadExecutor, size: int) -> None:
        barrier = threading.Barrier(size)
        for unfuture in [executor.submit(meet, barrier) for _ in range(size)]:
            unfuture.result(PATIENCE)

    with ThreadExecutor(8) as executor:
        burst(executor, started)
        for size in (*range(started, 9), *range(8, 0, -1), *[8] * 50):
            burst(executor, size)


def test_jobs_that_a_loop_submits_in_one_turn_run_at_once() -> None:
    """Though not all of the idle workers are woken by the loop's own thread."""

    async def burst(executor: ThreadExecutor, size: int) -> None:
        barrier = threading.Barrier(size)
        jobs = [executor.submit(barrier.wait, PATIENCE) for _ in range(size)]
        await asyncio.gather(*jobs)

    async def main(executor: ThreadExecutor) -> None:
        for size in (*range(1, 9), *range(8, 0, -1), *[8] * 50):
            await burst(executor, size)

    with ThreadExecutor(8) as executor:
        asyncio.run(main(executor))


# Initializers.


def test_an_initializer_is_called_in_each_thread_before_its_first_job() -> None:
    local = threading.local()
    barrier = threading.Barrier(2)

    def prepare(one: int, other: int) -> None:
        local.count = getattr(local, "count", 0) + one + other

    def job() -> int:
        barrier.wait(PATIENCE)
        return local.count

    with ThreadExecutor(2, initializer=prepare, initargs=(1, 10)) as executor:
        unfutures = [executor.submit(job) for _ in range(6)]
        assert [unfuture.result(PATIENCE) for unfuture in unfutures] == [11] * 6


def test_an_initializer_must_be_callable() -> None:
    with pytest.raises(TypeError, match="initializer"):
        ThreadExecutor(initializer=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_failing_initializer_breaks_the_pool_for_everybody(
    gate: Gate, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        gate()
        raise kind("not today")

    with ThreadExecutor(1, initializer=fail) as executor:
        unfutures = [executor.submit(int) for _ in range(3)]
        gate.open.set()
        for unfuture in unfutures:
            assert type(unfuture.exception(PATIENCE)) is BrokenThreadPool
        with pytest.raises(BrokenThreadPool, match="initializer"):
            executor.submit(int)
    (record,) = caplog.records
    assert record.levelno == logging.CRITICAL
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], kind)


# The end.


def test_after_shutdown_submit_is_a_runtime_error() -> None:
    executor = ThreadExecutor(1)
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(int, ["1"])


def test_shutdown_waits_for_all_that_was_accepted(gate: Gate, in_thread: InThread) -> None:
    executor = ThreadExecutor(1)
    blocker, queued = occupy(executor, gate), executor.submit(int, "2")
    at_return: list[tuple[bool, bool]] = []

    def end() -> None:
        executor.shutdown(wait=True)
        at_return.append((queued.done(), gate.thread.is_alive()))

    ending = in_thread(end)
    ending.join(0.1)  # one that does not wait has returned by then
    gate.open.set()
    ending.join(PATIENCE)
    assert at_return == [(True, False)]
    assert (blocker.result(PATIENCE), queued.result(PATIENCE)) == ("through", 2)


def test_shutdown_without_waiting_leaves_what_was_accepted_to_its_threads(gate: Gate) -> None:
    executor = ThreadExecutor(1)
    blocker, queued = occupy(executor, gate), executor.submit(threading.current_thread)
    executor.shutdown(wait=False)
    assert not blocker.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)
    gate.open.set()
    assert blocker.result(PATIENCE) == "through"
    thread = queued.result(PATIENCE)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_shutdown_can_cancel_what_has_not_begun(gate: Gate) -> None:
    executor = ThreadExecutor(1)
    blocker = occupy(executor, gate)
    queued = [executor.submit(int) for _ in range(3)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert [unfuture.cancelled() for unfuture in queued] == [True] * 3
    with pytest.raises(concurrent.futures.CancelledError):
        queued[0].result(PATIENCE)
    gate.open.set()
    assert blocker.result(PATIENCE) == "through"
    executor.shutdown()


def test_shutdown_can_be_called_in_a_thread_of_its_own() -> None:
    executor = ThreadExecutor(1)
    assert executor.submit(executor.shutdown).result(PATIENCE) is None
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)


def test_a_with_block_waits_at_its_end(gate: Gate) -> None:
    with ThreadExecutor(2) as executor:
        unfuture = occupy(executor, gate)
        executor.submit(gate.open.set)
    assert gate.ended
    assert unfuture.done()


def test_shutdown_waits_for_a_thread_that_is_just_being_started(
    monkeypatch: pytest.MonkeyPatch, in_thread: InThread
) -> None:
    executor = ThreadExecutor(1, "late")
    starting, go_on = threading.Event(), threading.Event()
    real_start = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("late"):
            starting.set()
            assert go_on.wait(PATIENCE)
        real_start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    ran: list[int] = []
    ran_at_return: list[list[int]] = []
    in_thread(lambda: executor.submit(ran.append, 1))
    assert starting.wait(PATIENCE)

    def end() -> None:
        executor.shutdown(wait=True)
        ran_at_return.append(list(ran))

    ending = in_thread(end)
    ending.join(0.1)  # one that does not wait has returned by then
    go_on.set()
    ending.join(PATIENCE)
    assert ran_at_return == [[1]]


def test_an_executor_that_nobody_keeps_ends_its_threads() -> None:
    executor = ThreadExecutor(2)
    thread = executor.submit(threading.current_thread).result(PATIENCE)
    dropped = weakref.ref(executor)
    del executor
    collect()
    assert dropped() is None
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_jobs_of_an_executor_that_nobody_keeps_still_run(gate: Gate) -> None:
    executor = ThreadExecutor(1)
    blocker, queued = occupy(executor, gate), executor.submit(threading.current_thread)
    del executor
    collect()
    gate.open.set()
    assert blocker.result(PATIENCE) == "through"
    queued.result(PATIENCE).join(PATIENCE)


# When no thread can be started.


class NoThreads:
    """Has the next `failures` threads that are started fail to start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures = 1
        self.meanwhile: Callable[[], object] = lambda: None
        self._real_start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self.start(thread))

    def start(self, thread: threading.Thread) -> None:
        if self.failures:
            self.failures -= 1
            self.meanwhile()
            raise RuntimeError("can't start new thread")
        self._real_start(thread)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> NoThreads:
    return NoThreads(monkeypatch)


def test_a_failing_thread_start_surfaces_at_the_call_and_leaves_the_pool_usable(
    one: ThreadExecutor, no_threads: NoThreads
) -> None:
    ran: list[str] = []
    no_threads.failures = 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            one.submit(ran.append, "refused")
    one.submit(ran.append, "accepted").result(PATIENCE)
    assert ran == ["accepted"]


def test_a_failing_thread_start_does_not_matter_while_another_thread_works(
    gate: Gate, no_threads: NoThreads
) -> None:
    no_threads.failures = 0
    with ThreadExecutor(2) as executor:
        occupy(executor, gate)
        no_threads.failures = 1
        unfuture = executor.submit(int, "4")
        gate.open.set()
        assert unfuture.result(PATIENCE) == 4
        assert no_threads.failures == 0


def test_a_job_that_came_behind_a_failing_thread_start_is_not_stranded(
    one: ThreadExecutor,
    no_threads: NoThreads,
    in_thread: Callable[[Callable[[], object]], threading.Thread],
) -> None:
    behind: list[Unfuture[int]] = []
    come, came = threading.Event(), threading.Event()

    def come_behind() -> None:
        assert come.wait(PATIENCE)
        behind.append(one.submit(int, "4"))
        came.set()

    no_threads.failures = 0
    in_thread(come_behind)
    no_threads.failures = 1

    def meanwhile() -> None:
        come.set()
        assert came.wait(PATIENCE)

    no_threads.meanwhile = meanwhile
    with pytest.raises(RuntimeError, match="can't start new thread"):
        one.submit(int, "3")
    (unfuture,) = behind
    concurrent.futures.wait([unfuture], timeout=PATIENCE)
    stranded = not unfuture.done()
    one.submit(int).result(PATIENCE)  # brings a thread, for this test's own end
    assert not stranded
    assert isinstance(unfuture.exception(PATIENCE), RuntimeError | None)


def test_a_call_of_a_marked_function_hears_of_a_failing_thread_start(
    one: ThreadExecutor, no_threads: NoThreads
) -> None:
    marked: Any = unsync(int, executor=one)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        marked("1")
    assert marked("2").result(PATIENCE) == 2


@pytest.mark.alone  # without the GIL, a trace function slows all threads
@pytest.mark.parametrize("at", range(1, 7))
def test_a_finalizer_may_end_a_pool_between_any_steps_of_a_wait_for_that_end(
    at: int, in_thread: Callable[[Callable[[], object]], threading.Thread]
) -> None:
    """`weakref.finalize` closes the queue of a pool, in a thread that may be asking for its end."""
    latch = _common.Latch()
    lines: list[int] = []
    found: list[bool] = []

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code is not _common.Latch.wait.__code__:
            return None
        if event == "line":
            lines.append(frame.f_lineno)
            if len(lines) == at:
                latch.set()
        return trace

    def wait() -> None:
        sys.settrace(trace)
        try:
            found.append(latch.wait(PATIENCE))
        finally:
            sys.settrace(None)

    in_thread(wait).join(PATIENCE)
    assert found == [True]
    assert len(lines) >= at
