"""A thread executor whose queue is bounded: a call too many is refused, or waits."""

from __future__ import annotations

import asyncio
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import Unfuture, unsync
from unsync.executors import ThreadExecutor

Make = Callable[..., ThreadExecutor]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def make(gate: threading.Event) -> Iterator[Make]:
    made: list[ThreadExecutor] = []

    def new(*args: Any, **options: Any) -> ThreadExecutor:
        made.append(ThreadExecutor(*args, **options))
        return made[-1]

    yield new
    gate.set()
    for executor in made:
        executor.shutdown(wait=False, cancel_futures=True)
        assert executor.join(PATIENCE)


def fill(executor: ThreadExecutor, gate: threading.Event, calls: int) -> list[Unfuture[Any]]:
    return [executor.submit(gate.wait) for _ in range(calls)]


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_call_too_many_is_refused(make: Make, gate: threading.Event, room: int) -> None:
    executor = make(2, max_queued=room)
    calls = fill(executor, gate, 2 + room)
    for _ in range(3):
        with pytest.raises(queue.Full, match=rf"all 2 threads.*max_queued={room}\); call again"):
            executor.submit(gate.wait)
    gate.set()
    assert all(call.result(PATIENCE) for call in calls)
    assert executor.submit(int, "5").result(PATIENCE) == 5


def test_idle_threads_count_as_room(make: Make, gate: threading.Event) -> None:
    executor = make(8, max_queued=0)
    for _ in range(20):
        gate.clear()
        calls: list[Unfuture[bool]] = []

        def one_more(calls: list[Unfuture[bool]] = calls) -> bool:
            try:
                calls.append(executor.submit(gate.wait))
            except queue.Full:
                return False  # a worker is only about to be free
            return True

        for _ in range(8):
            wait_until(one_more)
        with pytest.raises(queue.Full):
            executor.submit(int)
        gate.set()
        assert all(call.result(PATIENCE) for call in calls)


def test_a_marked_function_hears_of_it(make: Make, gate: threading.Event) -> None:
    executor = make(1, max_queued=1)
    fill(executor, gate, 2)
    marked = unsync(executor=executor)(gate.wait)
    with pytest.raises(queue.Full):
        marked()


def test_cancelled_calls_make_room(make: Make, gate: threading.Event) -> None:
    executor = make(1, max_queued=3)
    _, *queued = fill(executor, gate, 4)
    with pytest.raises(queue.Full):
        executor.submit(int)
    assert queued[1].cancel()
    last = executor.submit(int, "7")
    with pytest.raises(queue.Full):
        executor.submit(int)
    gate.set()
    assert last.result(PATIENCE) == 7
    assert queued[0].result(PATIENCE)
    assert queued[2].result(PATIENCE)
    assert queued[1].cancelled()


@pytest.mark.parametrize("when_full", ["raise", "wait"])
def test_the_pools_own_functions_are_never_refused(
    make: Make, when_full: Literal["raise", "wait"]
) -> None:
    executor = make(1, max_queued=0, when_full=when_full)

    def sum_up(level: int) -> int:
        if level == 0:
            return 1
        return sum(call.result() for call in [executor.submit(sum_up, level - 1) for _ in "abc"])

    assert executor.submit(sum_up, 3).result(PATIENCE) == 27


def test_a_call_too_many_waits(make: Make, gate: threading.Event) -> None:
    executor = make(1, max_queued=1, when_full="wait")
    calls = fill(executor, gate, 2)
    more: list[Unfuture[Any]] = []
    threads = [threading.Thread(target=lambda: more.append(executor.submit(int))) for _ in "abc"]
    for thread in threads:
        thread.start()
    threads[0].join(0.05)
    assert not more
    gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(more) == 3
    assert [call.result(PATIENCE) for call in more] == [0, 0, 0]
    assert all(call.result(PATIENCE) for call in calls)


def test_many_callers_and_little_room(make: Make) -> None:
    executor = make(2, max_queued=1, when_full="wait")
    found: list[int] = []

    def call(start: int) -> None:
        calls = [executor.submit(int, number) for number in range(start, start + 200)]
        found.extend(call.result(PATIENCE) for call in calls)

    threads = [threading.Thread(target=call, args=[start]) for start in range(0, 1000, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(found) == list(range(1000))


def test_in_an_event_loop_nothing_waits(make: Make, gate: threading.Event) -> None:
    executor = make(1, max_queued=0, when_full="wait")
    fill(executor, gate, 1)

    async def main() -> None:
        with pytest.raises(queue.Full, match="in an event loop it does not wait"):
            executor.submit(int)

    asyncio.run(main())
    Unfuture(main()).result(PATIENCE)


def test_shutdown_sends_those_away_who_wait(make: Make, gate: threading.Event) -> None:
    executor = make(1, max_queued=0, when_full="wait")
    (call,) = fill(executor, gate, 1)
    failures: list[BaseException] = []

    def submit() -> None:
        try:
            executor.submit(int)
        except RuntimeError as exc:
            failures.append(exc)

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    executor.shutdown(wait=False)
    for thread in threads:
        thread.join(PATIENCE)
    assert ["after shutdown" in str(failure) for failure in failures] == [True] * 3
    gate.set()
    assert call.result(PATIENCE)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_the_wait_and_the_next_one_gets_in(make: Make, gate: threading.Event) -> None:
    executor = make(1, max_queued=0, when_full="wait")
    (call,) = fill(executor, gate, 1)
    main = threading.main_thread().ident
    assert main is not None
    other: list[Unfuture[int]] = []
    waits = threading.Thread(target=lambda: other.append(executor.submit(int)))
    timer = threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        executor.submit(int)
    waits.start()
    gate.set()
    waits.join(PATIENCE)
    assert other[0].result(PATIENCE) == 0
    assert call.result(PATIENCE)


def test_another_pools_worker_that_waits_is_made_up_for(make: Make, gate: threading.Event) -> None:
    full = make(1, max_queued=0, when_full="wait")
    (call,) = fill(full, gate, 1)
    other = make(1)
    waits = other.submit(full.submit, int)
    wait_until(waits.running)
    assert other.submit(int, "3").result(PATIENCE) == 3
    gate.set()
    assert waits.result(PATIENCE).result(PATIENCE) == 0
    assert call.result(PATIENCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queued": -1}, "max_queued must be at least 0, or None, not -1"),
        ({"when_full": "drop"}, "when_full must be 'raise' or 'wait', not 'drop'"),
    ],
)
def test_bad_options_are_value_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreadExecutor(1, **options)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_that_is_cancelled_lets_in_one_that_waits(
    make: Make, gate: threading.Event, when: str
) -> None:
    """Also if what runs waits for just that."""
    executor = make(1, max_queued=1, when_full="wait")
    running = executor.submit(gate.wait, PATIENCE)
    wait_until(running.running)
    queued = executor.submit(int)
    if when == "before":
        queued.cancel()
    entered: list[Unfuture[int]] = []

    def submit() -> None:
        entered.append(executor.submit(int, "7"))
        gate.set()

    waits = threading.Thread(target=submit)
    waits.start()
    if when == "after":
        # No thread of the pool is there to see to it, and nothing tells that it has come so far.
        time.sleep(0.05)
        queued.cancel()
    waits.join(PATIENCE)
    assert running.result(PATIENCE)
    assert entered[0].result(PATIENCE) == 7
