"""Threads, foreign loops and the ambient one all at once: every outcome arrives exactly once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from support.loops import Main, bounded, in_own_loop
from support.waiting import PATIENCE, wait_until

from unsync import Unfuture, unsync

THREADS = 4


@pytest.fixture(autouse=True)
def _hurry() -> Iterator[None]:
    """Threads take turns so often that they meet in the narrowest places."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Calls each in a thread of its own, all beginning together; their results."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait(PATIENCE)
        return function()

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(run, function) for function in functions]
        return [future.result(3 * PATIENCE) for future in futures]


def in_ambient_loop(main: Main) -> Any:
    return Unfuture(main()).result(2 * PATIENCE)


class Broken(Exception):
    pass


# Ways in: each makes an Unfuture that will have `value`, or fail with Broken(value).


def outcome(value: int) -> int:
    if value % 5 == 0:
        raise Broken(value)
    return value


@unsync
async def coroutine_call(value: int) -> int:
    return outcome(value)


@unsync
async def suspended_call(value: int) -> int:
    await asyncio.sleep(0)
    return outcome(value)


@unsync
def thread_function(value: int) -> int:
    return outcome(value)


@unsync
def set_later(unfuture: Unfuture[int] | concurrent.futures.Future[int], value: int) -> None:
    try:
        unfuture.set_result(outcome(value))
    except Broken as exc:
        unfuture.set_exception(exc)


def set_from_outside(value: int) -> Unfuture[int]:
    unfuture = Unfuture[int]()
    set_later(unfuture, value)
    return unfuture


def wrapped_future(value: int) -> Unfuture[int]:
    future = concurrent.futures.Future[int]()
    unfuture = Unfuture(future)
    set_later(future, value)
    return unfuture


def wrapped_coroutine(value: int) -> Unfuture[int]:
    return Unfuture(suspended_call.__wrapped__(value))


def continued(value: int) -> Unfuture[int]:
    return thread_function(value).then(lambda source: coroutine_call(source.result()))


WAYS_IN = [
    coroutine_call,
    suspended_call,
    thread_function,
    set_from_outside,
    wrapped_future,
    wrapped_coroutine,
    continued,
]


class Ledger:
    """Counts what arrived; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.arrived: Counter[tuple[str, int]] = Counter()

    def enter(self, value: int, unfuture: Any) -> None:
        """For a finished future of any kind."""
        error = unfuture.exception()
        if error is None:
            self._add(("result", unfuture.result()))
        else:
            assert type(error) is Broken
            self._add(("failure", error.args[0]))
        assert self.arrived[expected(value)]

    def _add(self, entry: tuple[str, int]) -> None:
        with self._lock:
            self.arrived[entry] += 1


def expected(value: int) -> tuple[str, int]:
    return ("failure" if value % 5 == 0 else "result"), value


# Ways out: each sees that the outcome is entered, once.


def by_result(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    if value % 5:
        assert unfuture.result(PATIENCE) == value
    else:
        with pytest.raises(Broken):
            unfuture.result(PATIENCE)
    ledger.enter(value, unfuture)


def by_impatience(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    for timeout in (0, 1e-6, 1e-5, 1e-4):
        with contextlib.suppress(concurrent.futures.TimeoutError):
            unfuture.exception(timeout)
    by_result(ledger, value, unfuture)


def by_callback(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    unfuture.add_done_callback(lambda done: ledger.enter(value, done))


def by_a_removed_and_a_kept_callback(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    seen: list[object] = []
    unfuture.add_done_callback(seen.append)
    unfuture.add_done_callback(lambda done: ledger.enter(value, done))
    if unfuture.remove_done_callback(seen.append):
        assert seen == []
    else:
        # It was taken by the thread that finishes the Unfuture, and is called soon if not yet.
        wait_until(lambda: seen == [unfuture])


def by_wait(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    done, pending = concurrent.futures.wait([unfuture], PATIENCE)
    assert (done, pending) == ({unfuture}, set())
    ledger.enter(value, unfuture)


def by_as_completed(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    for done in concurrent.futures.as_completed([unfuture, Unfuture.from_value(1)], PATIENCE):
        if done is unfuture:
            ledger.enter(value, done)


def by_then(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    by_result(ledger, value, unfuture.then(lambda source: source))


def by_map(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    by_callback(ledger, value, unfuture.map(lambda result: result))


def by_an_ambient_awaiter(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    @unsync
    async def wait() -> int:
        return await unfuture

    by_result(ledger, value, wait())


def by_nobody(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    """The outcome must not be disturbed by one who gives up waiting."""
    if not unfuture.done():
        concurrent.futures.wait([unfuture], 0)
    by_callback(ledger, value, unfuture)


WAYS_OUT = [
    by_result,
    by_impatience,
    by_callback,
    by_a_removed_and_a_kept_callback,
    by_wait,
    by_as_completed,
    by_then,
    by_map,
    by_an_ambient_awaiter,
    by_nobody,
]


async def by_await(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    try:
        assert await unfuture == value
    except Broken:
        assert value % 5 == 0
    ledger.enter(value, unfuture)


async def by_several_awaiters(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    first, second = await asyncio.gather(unfuture, unfuture.map(abs), return_exceptions=True)
    assert first == second
    await by_await(ledger, value, unfuture)


async def by_asyncio_wait(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    done, _ = await asyncio.wait([unfuture], timeout=PATIENCE)
    assert done == {unfuture}
    ledger.enter(value, unfuture)


async def by_asyncio_as_completed(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    for first in asyncio.as_completed([unfuture], timeout=PATIENCE):
        await asyncio.gather(first, return_exceptions=True)
    ledger.enter(value, unfuture)


async def by_callback_in_its_loop(ledger: Ledger, value: int, unfuture: Unfuture[int]) -> None:
    thread = threading.current_thread()
    called = asyncio.Event()

    def enter(done: Unfuture[int]) -> None:
        assert threading.current_thread() is thread
        ledger.enter(value, done)
        called.set()

    unfuture.add_done_callback(enter)
    await called.wait()


async def by_a_cancelled_and_a_kept_awaiter(
    ledger: Ledger, value: int, unfuture: Unfuture[int]
) -> None:
    shielded = asyncio.ensure_future(asyncio.wait_for(asyncio.shield(unfuture), PATIENCE))
    await asyncio.sleep(0)
    shielded.cancel()
    await by_await(ledger, value, unfuture)
    await asyncio.wait([shielded])
    if not shielded.cancelled():
        shielded.exception()


ASYNC_WAYS_OUT = [
    by_await,
    by_several_awaiters,
    by_asyncio_wait,
    by_asyncio_as_completed,
    by_callback_in_its_loop,
    by_a_cancelled_and_a_kept_awaiter,
]


def operations(numbers: range, ways_out: list[Any]) -> Iterator[tuple[int, Any, Any]]:
    """Every way in meets every way out: their numbers have no common divisor but 1."""
    for number in numbers:
        yield number, WAYS_IN[number % len(WAYS_IN)], ways_out[number % len(ways_out)]


def test_every_outcome_arrives_exactly_once() -> None:
    each = 1000
    ledger = Ledger()

    def in_thread(numbers: range) -> None:
        waiting = []
        for number, way_in, way_out in operations(numbers, WAYS_OUT):
            waiting.append((number, way_in(number), way_out))
            if len(waiting) == 10:
                for value, unfuture, leave in waiting:
                    leave(ledger, value, unfuture)
                waiting.clear()

    async def in_loop(numbers: range) -> None:
        waiting = []
        for number, way_in, way_out in operations(numbers, ASYNC_WAYS_OUT):
            waiting.append(way_out(ledger, number, way_in(number)))
            if len(waiting) == 10:
                await asyncio.gather(*waiting)
                waiting.clear()

    kinds = [
        in_thread,
        in_thread,
        lambda numbers: in_own_loop(lambda: in_loop(numbers)),
        lambda numbers: in_own_loop(lambda: in_loop(numbers)),
        lambda numbers: in_ambient_loop(lambda: in_loop(numbers)),
    ]
    at_once(
        *(
            partial(kind, range(place * each, (place + 1) * each))
            for place, kind in enumerate(kinds)
        )
    )
    every_one = {expected(number): 1 for number in range(each * len(kinds))}
    wait_until(lambda: len(ledger.arrived) == len(every_one))
    unsync(threading.get_ident)().result(PATIENCE)
    assert ledger.arrived == every_one


def test_many_loops_await_the_same_ones() -> None:
    count, stride = 500, 25
    unfutures = [Unfuture[int]() for _ in range(count)]
    arrived = [threading.Semaphore(0) for _ in range(0, count, stride)]

    async def one_by_one() -> list[int]:
        results = []
        for number, unfuture in enumerate(unfutures):
            if number % stride == 0:
                arrived[number // stride].release()
            results.append(await unfuture)
        return results

    async def all_at_once() -> list[int]:
        waiting = asyncio.gather(*unfutures)
        for place in arrived:
            place.release()
        return await waiting

    def in_thread() -> list[int]:
        results = []
        for number, unfuture in enumerate(unfutures):
            if number % stride == 0:
                arrived[number // stride].release()
            results.append(unfuture.result(PATIENCE))
        return results

    def finish() -> None:
        for number, unfuture in enumerate(unfutures):
            if number % stride == 0:
                # All are about to wait for this one; on the next ones they meet as it comes.
                for _ in range(5):
                    assert arrived[number // stride].acquire(timeout=PATIENCE)
            unfuture.set_result(number)

    *results, nothing = at_once(
        lambda: in_own_loop(one_by_one),
        lambda: in_own_loop(all_at_once),
        lambda: in_ambient_loop(one_by_one),
        lambda: in_ambient_loop(all_at_once),
        in_thread,
        finish,
    )
    assert nothing is None
    assert results == [list(range(count))] * 5


def test_one_of_those_who_finish_it_wins_and_all_see_the_same() -> None:
    unfutures = [Unfuture[str]() for _ in range(500)]
    told: list[list[Unfuture[str]]] = [[] for _ in unfutures]
    for unfuture, calls in zip(unfutures, told, strict=True):
        unfuture.add_done_callback(calls.append)

    def set_one(unfuture: Unfuture[str], name: str) -> bool:
        try:
            unfuture.set_result(name)
        except concurrent.futures.InvalidStateError:
            return False
        return True

    def finish(name: str) -> list[bool]:
        return [set_one(unfuture, name) for unfuture in unfutures]

    def cancel() -> list[bool]:
        return [unfuture.cancel() for unfuture in unfutures]

    def view(unfuture: Unfuture[str]) -> str:
        try:
            return unfuture.result(PATIENCE)
        except concurrent.futures.CancelledError:
            return "cancelled"

    async def main() -> list[str]:
        seen = []
        for unfuture in unfutures:
            await asyncio.wait([unfuture])
            seen.append("cancelled" if unfuture.cancelled() else await unfuture)
        return seen

    first, second, cancelled, in_thread, in_loop, in_ambient = at_once(
        lambda: finish("first"),
        lambda: finish("second"),
        cancel,
        lambda: [view(unfuture) for unfuture in unfutures],
        lambda: in_own_loop(main),
        lambda: in_ambient_loop(main),
    )
    winners = [
        [name for name, won in zip(("first", "second", "cancelled"), three, strict=True) if won]
        for three in zip(first, second, cancelled, strict=True)
    ]
    assert [len(names) for names in winners] == [1] * len(unfutures)
    assert in_thread == in_loop == in_ambient == [name for (name,) in winners]
    wait_until(lambda: all(told))
    assert told == [[unfuture] for unfuture in unfutures]


def test_those_who_give_up_waiting_take_nobody_else_with_them() -> None:
    unfuture = Unfuture[int]()
    called: list[str] = []
    callbacks = [lambda _, name=name: called.append(name) for name in "abcdef"]
    for callback in callbacks:
        with pytest.raises(concurrent.futures.TimeoutError):
            unfuture.result(0.001)
        unfuture.add_done_callback(callback)
    for callback in callbacks[0], callbacks[2], callbacks[5]:
        assert unfuture.remove_done_callback(callback) == 1
    unfuture.set_result(1)
    assert called == ["b", "d", "e"]


def test_cancelling_races_with_the_end_of_the_work() -> None:
    def race(make: Callable[[int], Unfuture[int]]) -> None:
        for number in range(1, 500, 5):
            unfuture = make(number)
            cancelling = unfuture.cancel()
            try:
                assert unfuture.result(PATIENCE) == number
            except concurrent.futures.CancelledError:
                assert cancelling
                assert unfuture.cancelled()
            else:
                assert not unfuture.cancelled()
                # A coroutine may have been asked to end, and have ended otherwise.
                assert not cancelling or make is not thread_function

    at_once(*(partial(race, make) for make in (coroutine_call, suspended_call, thread_function)))


def test_several_threads_call_into_the_ambient_loop() -> None:
    each = 2000
    begun: list[list[int]] = [[] for _ in range(THREADS)]

    @unsync
    async def call(place: int, number: int) -> int:
        begun[place].append(number)
        return number

    def produce(place: int) -> int:
        calls = [call(place, number) for number in range(each)]
        return sum(unfuture.result(PATIENCE) == number for number, unfuture in enumerate(calls))

    assert at_once(*(partial(produce, place) for place in range(THREADS))) == [each] * THREADS
    assert begun == [list(range(each))] * THREADS  # each thread's calls in their order


def test_threads_that_wait_for_each_call() -> None:
    """Every post may find the loop about to sleep, or about to look once more."""

    def produce() -> int:
        return sum(suspended_call(1).result(PATIENCE) for _ in range(300))

    assert at_once(*[produce] * THREADS) == [300] * THREADS


# Loops that come and go.


def test_a_loop_closed_with_waiters_in_it_takes_nobody_else_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    unfuture = Unfuture[int]()
    here, there, called = [], [], []
    closed = asyncio.new_event_loop()
    closed.set_exception_handler(lambda *_: None)  # of a task that is destroyed while it waits

    async def wait(seen: list[int]) -> int:
        seen.append(await unfuture)
        return seen[0]

    async def wait_in_closed_loop() -> asyncio.Task[int]:
        unfuture.add_done_callback(there.append)
        task = asyncio.ensure_future(wait(there))
        await asyncio.sleep(0)
        return task

    unfuture.add_done_callback(called.append)
    first = unsync(wait)(here)
    continued = unfuture.map(lambda value: value + 1)
    task = closed.run_until_complete(wait_in_closed_loop())
    closed.close()
    unfuture.add_done_callback(called.append)
    last = unsync(wait)([])
    unfuture.set_result(1)
    assert (first.result(PATIENCE), continued.result(PATIENCE), last.result(PATIENCE)) == (1, 2, 1)
    assert called == [unfuture] * 2
    assert asyncio.run(bounded(wait([]))) == 1
    assert (there, task.done()) == ([], False)
    assert caplog.records == []


def test_loops_that_are_closed_while_others_finish_what_is_awaited_in_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(50):
        unfutures = [Unfuture[int]() for _ in range(20)]
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)

        async def main(unfutures: list[Unfuture[int]] = unfutures) -> list[Any]:
            tasks = [asyncio.shield(unfuture) for unfuture in unfutures]
            for unfuture in unfutures:
                unfuture.add_done_callback(lambda _: None)
            await asyncio.sleep(0)
            return tasks

        def finish(unfutures: list[Unfuture[int]] = unfutures) -> None:
            for unfuture in unfutures:
                unfuture.set_result(1)

        loop.run_until_complete(main())
        at_once(finish, loop.close)
        assert [unfuture.result(0) for unfuture in unfutures] == [1] * 20
    assert caplog.records == []


def test_a_loop_goes_on_in_another_thread() -> None:
    gates = [Unfuture[int]() for _ in range(3)]
    loop = asyncio.new_event_loop()

    async def wait(unfuture: Unfuture[int]) -> tuple[int, threading.Thread]:
        return await unfuture, threading.current_thread()

    def run(task: asyncio.Future[Any]) -> Any:
        return loop.run_until_complete(bounded(task))

    tasks = [loop.create_task(wait(gate)) for gate in gates]
    try:
        (_,) = at_once(lambda: loop.run_until_complete(asyncio.sleep(0)))
        gates[0].set_result(0)  # while the loop does not run
        first, first_thread = at_once(lambda: run(tasks[0]))[0]
        gates[1].set_result(1)
        second, second_thread = at_once(lambda: run(tasks[1]))[0]
        third, third_thread = at_once(lambda: run(tasks[2]), lambda: gates[2].set_result(2))[0]
    finally:
        loop.close()
    assert (first, second, third) == (0, 1, 2)
    assert len({first_thread, second_thread, third_thread}) == 3


def test_one_thread_runs_several_loops_in_turn() -> None:
    """What is known of the thread's last loop must not be taken for this one's."""
    unfuture = Unfuture[int]()
    loops = [asyncio.new_event_loop() for _ in range(3)]
    try:
        tasks = []
        for loop in loops * 2:

            async def wait() -> int:
                return await unfuture

            tasks.append(loop.create_task(wait()))
            loop.run_until_complete(asyncio.sleep(0))
        at_once(lambda: unfuture.set_result(1))
        for loop, task in zip(loops * 2, tasks, strict=True):
            assert loop.run_until_complete(bounded(task)) == 1
    finally:
        for loop in loops:
            loop.close()


def test_a_loop_that_takes_no_attributes_can_await() -> None:
    class Strict(asyncio.SelectorEventLoop):
        def __setattr__(self, name: str, value: object) -> None:
            if "unsync" in name:
                raise AttributeError(name)
            super().__setattr__(name, value)

    loop = Strict()

    async def main() -> list[int]:
        return await asyncio.gather(*[suspended_call(1) for _ in range(10)], thread_function(2))

    try:
        assert loop.run_until_complete(bounded(main())) == [1] * 10 + [2]
    finally:
        loop.close()
