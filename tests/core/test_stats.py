"""`unsync.stats()`: each call is counted where it ran, as it ended."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.waiting import PATIENCE, ambient_loop_held, wait_until, wait_until_suspended

from unsync import Unfuture, unsync
from unsync._backend import Counter
from unsync._stats import Stats, Work
from unsync.executors import ThreadExecutor

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("fresh")]


class Boom(Exception):
    pass


def minus(now: Work, before: Work) -> dict[str, int]:
    """What was counted, of what there was any."""
    counts = {name: getattr(now, name) - getattr(before, name) for name in Work._fields}
    return {name: count for name, count in counts.items() if count}


def check(where: str, before: Stats, **expected: int) -> None:
    """Waits until the counts are as expected: a thread counts a call after it told of its end."""
    found: dict[str, int] = {}

    def are_as_expected() -> bool:
        found.update(dict.fromkeys(Work._fields, 0))
        found.update(minus(getattr(unsync.stats(), where), getattr(before, where)))
        return {name: count for name, count in found.items() if count} == expected

    try:
        wait_until(are_as_expected)
    except AssertionError:
        raise AssertionError(f"{where}: {found}, not {expected}") from None


def settle(*calls: Unfuture[Any]) -> None:
    concurrent.futures.wait(calls, PATIENCE)  # type: ignore[type-var]
    for call in calls:
        assert call.cancelled() or call.exception() or call.done()


async def give(seconds: float = 0) -> int:
    if seconds:
        await asyncio.sleep(seconds)
    return 1


async def fail() -> None:
    raise Boom


def fail_in_thread() -> None:
    raise Boom


def test_coroutines() -> None:
    before = unsync.stats()
    settle(unsync(give)(), unsync(give)(0.001), unsync(fail)())
    endless = unsync(give)(PATIENCE)
    check("coroutines", before, started=4, finished=2, failed=1, pending=1)
    endless.cancel()
    check("coroutines", before, started=4, finished=2, failed=1, cancelled=1)


def test_a_coroutine_that_never_began() -> None:
    before = unsync.stats()
    with ambient_loop_held():
        call = unsync(give)()
        check("coroutines", before, pending=1)
        assert unsync.stats().loop_queue == 1
        call.cancel()
    check("coroutines", before, cancelled=1)
    assert unsync.stats().loop_queue == 0


def test_a_coroutine_that_is_awaited_in_the_ambient_loop() -> None:
    async def outer() -> int:
        return await unsync(give)() + await unsync(give)(0.001)

    before = unsync.stats()
    assert unsync(outer)().result(PATIENCE) == 2
    check("coroutines", before, started=3, finished=3)


def test_continuations() -> None:
    source = Unfuture.from_value(1)
    kinds: list[Callable[[Unfuture[int]], Any]] = [
        lambda source: source.result(),
        lambda source: source,
        lambda source: give(0.001),
    ]
    before = unsync.stats()
    settle(*map(source.then, kinds))
    check("coroutines", before, started=3, finished=3)
    settle(source.then(lambda _: fail_in_thread()), source.then(lambda _: fail()))
    check("coroutines", before, started=5, finished=3, failed=2)
    with ambient_loop_held():
        source.then(len).cancel()
    check("coroutines", before, started=5, finished=3, failed=2, cancelled=1)


def test_threads() -> None:
    unsync.thread_executor = executor = ThreadExecutor(1)
    gate = threading.Event()
    before = unsync.stats()
    running, queued, cancelled = unsync(gate.wait)(), unsync(int)(), unsync(int)()
    cancelled.cancel()
    wait_until(running.running)
    assert unsync.stats().thread_queue == 2
    assert unsync.stats().workers - unsync.stats().workers_idle >= 1
    gate.set()
    settle(running, queued, unsync(fail_in_thread)())
    check("threads", before, started=3, finished=2, failed=1, cancelled=1)
    executor.shutdown()
    check("threads", before, started=3, finished=2, failed=1, cancelled=1)


def test_jobs_that_a_shutdown_cancels() -> None:
    executor = ThreadExecutor(1)
    gate = threading.Event()
    before = unsync.stats()
    running, queued = executor.submit(gate.wait), executor.submit(int)
    wait_until(running.running)
    executor.shutdown(wait=False, cancel_futures=True)
    gate.set()
    settle(running, queued)
    check("threads", before, started=1, finished=1, cancelled=1)


def test_a_thread_that_waits() -> None:
    unsync.thread_executor = executor = ThreadExecutor(1)
    gate: Unfuture[int] = Unfuture()
    waiting = unsync(gate.result)()
    wait_until(lambda: unsync.stats().workers_waiting == 1)
    gate.set_result(1)
    assert waiting.result(PATIENCE) == 1
    wait_until(lambda: unsync.stats().workers_waiting == 0)
    executor.shutdown()


def test_counts_outlive_what_counted() -> None:
    before = unsync.stats()
    settle(unsync(give)(), unsync(int)())
    endless = unsync(give)(PATIENCE)
    wait_until_suspended(give.__qualname__)
    assert unsync.shutdown(PATIENCE)
    assert endless.cancelled()
    check("coroutines", before, started=2, finished=1, cancelled=1)
    for _ in range(3):
        ThreadExecutor(1).shutdown()
    check("threads", before, started=1, finished=1)
    settle(unsync(give)(), unsync(int)())
    check("coroutines", before, started=3, finished=2, cancelled=1)
    check("threads", before, started=2, finished=2)


def test_other_executors() -> None:
    before = unsync.stats()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        gate = threading.Event()
        running = unsync(gate.wait, executor=executor)()
        queued = unsync(int, executor=executor)()
        failed = unsync(fail_in_thread, executor=executor)()
        check("executors", before, started=3, pending=3)
        queued.cancel()
        gate.set()
        settle(running, queued, failed)
        check("executors", before, started=3, finished=1, failed=1, cancelled=1)


def test_processes() -> None:
    before = unsync.stats()
    settle(unsync(os.getpid, cpu_bound=True)(), unsync(int, cpu_bound=True)("no number"))
    check("processes", before, started=2, finished=1, failed=1)


def test_a_burst_saves_wakeups() -> None:
    unsync(give)().result(PATIENCE)
    with ambient_loop_held():
        before = unsync.stats()
        calls = [unsync(give)() for _ in range(100)]
        held = unsync.stats()
        assert held.loop_queue == 100
    settle(*calls)
    after = unsync.stats()
    assert after.wakeups + after.wakeups_saved - before.wakeups - before.wakeups_saved >= 100
    assert after.wakeups - before.wakeups < 20


def test_a_loop_that_is_held_up_lags() -> None:
    unsync(give)().result(PATIENCE)
    with ambient_loop_held():
        call = unsync(give)()
        time.sleep(0.02)
        assert unsync.stats().loop_lag >= 0.02
    call.result(PATIENCE)
    assert unsync.stats().loop_lag >= 0.02
    for _ in range(3):
        unsync(give)().result(PATIENCE)
    wait_until(lambda: unsync(give)().result(PATIENCE) and unsync.stats().loop_lag < 0.02)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_counts_anew(run_python: Callable[..., Any]) -> None:
    done = run_python(
        """
        import os
        import time
        from unsync import unsync

        @unsync
        async def give():
            return 1

        for _ in range(5):
            give().result(60), unsync(int)().result(60)
        pid = os.fork()
        give().result(60), unsync(int)().result(60)
        count = 1 if pid == 0 else 6
        until = time.monotonic() + 60
        while time.monotonic() < until:
            stats = unsync.stats()
            if stats.coroutines.finished == stats.threads.finished == count:
                break
        else:
            print(pid == 0, stats)
        if pid:
            assert os.waitpid(pid, 0) == (pid, 0)
        """,
        "-W",
        "ignore:This process:DeprecationWarning",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_counter_loses_nothing_when_many_threads_count() -> None:
    counter = Counter()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait(PATIENCE)
        for number in range(4000):
            counter.start()
            if number % 4:
                counter.end(number % 4 == 1, number % 4 == 2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert counter.work() == (16000, 4000, 4000, 4000, 4000)
