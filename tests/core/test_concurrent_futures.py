"""Unfutures in the hands of concurrent.futures: its functions, and its protocol for executors."""

from __future__ import annotations

import concurrent.futures
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, Future
from typing import Any

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import CancelledError, Unfuture, unsync


class Boom(Exception):
    pass


Either = Any  # Unfuture or Future: concurrent.futures is typed for its own class only

OUTCOMES = ["result", "failure", "cancellation"]


def finish(future: Either, outcome: str) -> None:
    if outcome == "result":
        future.set_result(42)
    elif outcome == "failure":
        future.set_exception(Boom())
        future.exception()
    else:
        future.cancel()
        if isinstance(future, Future):
            # It counts as done only once an executor has seen it.
            future.set_running_or_notify_cancel()


def finished(outcome: str) -> Unfuture[int]:
    unfuture: Unfuture[int] = Unfuture()
    finish(unfuture, outcome)
    return unfuture


def test_one_that_is_cancelled_between_two_waits_is_done() -> None:
    """Also beside one that is pending, where wait() enlists with both."""
    unfutures: list[Any] = [Unfuture[int](), Unfuture[int]()]
    cancelled, pending = unfutures
    assert concurrent.futures.wait(unfutures, 0).not_done == {*unfutures}
    cancelled.cancel()
    done, not_done = concurrent.futures.wait(unfutures, 0)
    assert (done, not_done) == ({cancelled}, {pending})
    pending.set_result(1)
    assert concurrent.futures.wait(unfutures, PATIENCE).not_done == set()


def is_waited_for(future: Either) -> bool:
    """Whether wait() or as_completed() has enlisted itself, and was not told to go on."""
    with future._condition:
        return [waiter.event.is_set() for waiter in future._waiters] == [False]


def wait_in_thread(
    in_thread: Any, futures: list[Either], **options: Any
) -> Callable[[], tuple[set[Either], set[Either]]]:
    """Has a thread wait() for them, returns when it does so; the answer gives what it got."""
    found: list[tuple[set[Either], set[Either]]] = []
    # Longer than the test waits for the answer: it must not be the timeout's.
    wait = functools.partial(concurrent.futures.wait, futures, 10 * PATIENCE, **options)
    thread = in_thread(lambda: found.append(wait()))
    pending = [future for future in futures if not future.done()]
    wait_until(lambda: all(map(is_waited_for, pending)), "wait()")

    def answer() -> tuple[set[Either], set[Either]]:
        thread.join(PATIENCE)
        assert not thread.is_alive()
        return found[0]

    return answer


# wait()


@pytest.mark.parametrize("return_when", [ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION])
def test_wait_returns_at_once_if_all_are_done(return_when: str) -> None:
    futures: list[Either] = [finished(outcome) for outcome in OUTCOMES]
    own: Future[int] = Future()
    own.set_result(1)
    futures.append(own)
    done, pending = concurrent.futures.wait(futures, PATIENCE, return_when)
    assert done == set(futures)
    assert pending == set()


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("kind", [Unfuture, Future])
def test_wait_for_all_returns_when_the_last_one_has_ended(
    outcome: str, kind: type[Either], in_thread: Any
) -> None:
    first, last, early = Unfuture[int](), kind(), finished(outcome)
    futures: list[Either] = [first, last, early]
    answer = wait_in_thread(in_thread, futures)
    finish(first, outcome)
    assert is_waited_for(last)
    finish(last, outcome)
    assert answer() == (set(futures), set())


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("kind", [Unfuture, Future])
def test_wait_for_the_first_returns_when_any_has_ended(
    outcome: str, kind: type[Either], in_thread: Any
) -> None:
    one, other = Unfuture[int](), kind()
    answer = wait_in_thread(in_thread, [one, other], return_when=FIRST_COMPLETED)
    finish(one, outcome)
    assert answer() == ({one}, {other})
    assert not is_waited_for(other)


def test_wait_for_the_first_failure_passes_over_results(in_thread: Any) -> None:
    good, bad, pending = Unfuture[int](), Unfuture[int](), Unfuture[int]()
    own: Future[int] = Future()
    answer = wait_in_thread(in_thread, [good, bad, pending, own], return_when=FIRST_EXCEPTION)
    finish(good, "result")
    finish(own, "result")
    assert is_waited_for(pending)
    finish(bad, "failure")
    assert answer() == ({good, bad, own}, {pending})


def test_wait_for_the_first_failure_returns_if_there_was_one() -> None:
    bad, pending = finished("failure"), Unfuture[int]()
    futures: list[Either] = [bad, pending]
    answer = concurrent.futures.wait(futures, PATIENCE, FIRST_EXCEPTION)
    assert answer == ({bad}, {pending})


def test_wait_for_the_first_failure_returns_all_if_there_is_none(in_thread: Any) -> None:
    futures: list[Either] = [Unfuture(), Unfuture()]
    answer = wait_in_thread(in_thread, futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        finish(future, "result")
    assert answer() == (set(futures), set())


@pytest.mark.parametrize("return_when", [ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION])
@pytest.mark.parametrize("timeout", [0, 0.01])
def test_wait_gives_up_after_its_timeout(return_when: str, timeout: float) -> None:
    pending, running = Unfuture[int](), Unfuture[int]()
    running.set_running_or_notify_cancel()
    futures: list[Either] = [pending, running]
    assert concurrent.futures.wait(futures, timeout, return_when) == (set(), set(futures))
    assert not is_waited_for(pending)
    pending.set_result(1)
    done, left = concurrent.futures.wait(futures, timeout)
    assert (done, left) == ({pending}, {running})


def test_wait_takes_one_that_is_waited_for_in_other_ways_too(in_thread: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[int] = []
    called: list[Unfuture[int]] = []
    unfuture.add_done_callback(called.append)
    waiting = in_thread(lambda: found.append(unfuture.result(PATIENCE)))
    answer = wait_in_thread(in_thread, [unfuture])
    mapped = unfuture.map(str)
    unfuture.set_result(42)
    waiting.join(PATIENCE)
    assert answer() == ({unfuture}, set())
    assert found == [42]
    assert called == [unfuture]
    assert mapped.result(PATIENCE) == "42"


def test_wait_takes_those_of_functions_and_coroutines() -> None:
    @unsync
    def function(number: int) -> int:
        return number

    @unsync
    async def coroutine(number: int) -> int:
        return number

    futures: list[Either] = [call(n) for n in range(20) for call in (function, coroutine)]
    done, pending = concurrent.futures.wait(futures, PATIENCE)
    assert pending == set()
    assert sorted(future.result() for future in done) == sorted([*range(20), *range(20)])


def test_wait_hears_of_a_cancellation_that_travels(in_thread: Any) -> None:
    source: Unfuture[int] = Unfuture()
    end = source.map(abs).map(abs)
    answer = wait_in_thread(in_thread, [source, end])
    assert end.cancel()
    assert answer() == ({source, end}, set())


# as_completed()


def test_as_completed_gives_those_that_are_done_first() -> None:
    early, late = [finished(outcome) for outcome in OUTCOMES], Unfuture[int]()
    futures: list[Either] = [late, *early]
    found = []
    for future in concurrent.futures.as_completed(futures, PATIENCE):
        found.append(future)
        if len(found) == len(early):
            late.set_result(1)
    assert set(found[:-1]) == set(early)
    assert found[-1] is late


@pytest.mark.parametrize("kind", [Unfuture, Future])
def test_as_completed_gives_them_in_the_order_in_which_they_end(
    kind: type[Either], in_thread: Any
) -> None:
    futures: list[Either] = [Unfuture(), kind(), Unfuture(), kind()]
    found: queue.SimpleQueue[Either] = queue.SimpleQueue()

    def collect() -> None:
        for future in concurrent.futures.as_completed(futures, PATIENCE):
            found.put(future)

    in_thread(collect)
    wait_until(lambda: all(map(is_waited_for, futures)), "as_completed()")
    for which, outcome in ((2, "failure"), (0, "result"), (3, "cancellation"), (1, "result")):
        finish(futures[which], outcome)
        assert found.get(timeout=PATIENCE) is futures[which]


def test_as_completed_gives_up_after_its_timeout() -> None:
    done, pending = finished("result"), Unfuture[int]()
    futures: list[Either] = [done, pending]
    iterator = concurrent.futures.as_completed(futures, 0)
    assert next(iterator) is done
    with pytest.raises(concurrent.futures.TimeoutError):
        next(iterator)
    assert not is_waited_for(pending)


# Many at once.


def test_many_threads_wait_for_the_same_ones_while_they_end(in_thread: Any) -> None:
    count, threads = 100, 6
    unfutures: list[Either] = [Unfuture() for _ in range(count)]
    barrier = threading.Barrier(threads + 1)
    found: list[int] = []

    def wait(number: int) -> None:
        barrier.wait(PATIENCE)
        if number % 2:
            done, _ = concurrent.futures.wait(unfutures, PATIENCE)
            found.append(len(done))
        else:
            found.append(len(list(concurrent.futures.as_completed(unfutures, PATIENCE))))

    waiting = [in_thread(functools.partial(wait, number)) for number in range(threads)]
    barrier.wait(PATIENCE)
    for number, unfuture in enumerate(unfutures):
        finish(unfuture, OUTCOMES[number % 3])
    for thread in waiting:
        thread.join(PATIENCE)
    assert found == [count] * threads


def test_no_end_is_missed_however_close_it_comes_to_the_beginning_of_the_wait(
    in_thread: Any,
) -> None:
    rounds = 300
    unfutures: list[Either] = [Unfuture() for _ in range(rounds)]
    barrier = threading.Barrier(2)

    def finish_all() -> None:
        for number, unfuture in enumerate(unfutures):
            barrier.wait(PATIENCE)
            finish(unfuture, OUTCOMES[number % 3])

    in_thread(finish_all)
    for unfuture in unfutures:
        barrier.wait(PATIENCE)
        assert concurrent.futures.wait([unfuture], PATIENCE) == ({unfuture}, set())


# The protocol for executors.


def test_set_running_or_notify_cancel_marks_a_pending_one_running() -> None:
    unfuture: Unfuture[int] = Unfuture()
    assert unfuture.set_running_or_notify_cancel() is True
    assert unfuture.running()
    assert not unfuture.cancel()
    unfuture.set_result(1)
    assert not unfuture.running()


@pytest.mark.parametrize("looked_at", [False, True])
def test_set_running_or_notify_cancel_says_that_one_was_cancelled(looked_at: bool) -> None:
    unfuture = Unfuture[int]()
    unfuture.cancel("why")
    if looked_at:
        futures: list[Either] = [unfuture]
        concurrent.futures.wait(futures, PATIENCE)
    assert unfuture.set_running_or_notify_cancel() is False
    assert unfuture.cancelled()
    with pytest.raises(CancelledError, match="why"):
        unfuture.result()


@pytest.mark.parametrize("state", ["running", "result", "failure"])
def test_set_running_or_notify_cancel_refuses_any_other(state: str) -> None:
    unfuture: Unfuture[int] = Unfuture()
    if state == "running":
        unfuture.set_running_or_notify_cancel()
    else:
        finish(unfuture, state)
    with pytest.raises(RuntimeError, match="not pending") as caught:
        unfuture.set_running_or_notify_cancel()
    assert repr(unfuture) in str(caught.value)


class OwnExecutor(concurrent.futures.Executor):
    """The least that an executor needs, with Unfutures for futures; works when it is told to."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[Unfuture[Any], Callable[[], Any]]] = queue.SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        unfuture: Unfuture[Any] = Unfuture()
        self.jobs.put((unfuture, functools.partial(fn, *args, **kwargs)))
        return unfuture

    def work(self) -> None:
        unfuture, function = self.jobs.get(timeout=PATIENCE)
        if not unfuture.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as exc:
            unfuture.set_exception(exc)
        else:
            unfuture.set_result(result)


@pytest.fixture
def own_executor() -> Iterator[OwnExecutor]:
    executor = OwnExecutor()
    yield executor
    assert executor.jobs.empty()


def test_an_executor_may_give_unfutures(own_executor: OwnExecutor, in_thread: Any) -> None:
    unfuture = own_executor.submit(divmod, 7, 2)
    assert not unfuture.running()
    in_thread(own_executor.work)
    assert unfuture.result(PATIENCE) == (3, 1)


def test_a_failure_in_an_executor_that_gives_unfutures(
    own_executor: OwnExecutor, in_thread: Any
) -> None:
    unfuture = own_executor.submit(divmod, 7, 0)
    in_thread(own_executor.work)
    with pytest.raises(ZeroDivisionError):
        unfuture.result(PATIENCE)


def test_a_cancelled_job_of_an_executor_that_gives_unfutures_is_not_called(
    own_executor: OwnExecutor,
) -> None:
    calls: list[int] = []
    unfuture = own_executor.submit(calls.append, 1)
    assert unfuture.cancel()
    own_executor.work()
    assert calls == []
    assert unfuture.cancelled()


def test_a_running_job_of_an_executor_that_gives_unfutures_goes_on(
    own_executor: OwnExecutor,
) -> None:
    answers: list[bool] = []
    unfuture = own_executor.submit(lambda: answers.append(unfuture.cancel()))
    own_executor.work()
    assert answers == [False]
    assert unfuture.result(PATIENCE) is None


def test_a_marked_function_hands_out_the_unfuture_of_such_an_executor(
    own_executor: OwnExecutor,
) -> None:
    made: list[Unfuture[Any]] = []
    submit = own_executor.submit

    def note(*args: Any, **kwargs: Any) -> Any:
        made.append(submit(*args, **kwargs))
        return made[-1]

    own_executor.submit = note  # type: ignore[method-assign]
    unfuture = unsync(executor=own_executor)(abs)(-1)
    assert made == [unfuture]
    own_executor.work()
    assert unfuture.result(PATIENCE) == 1


def test_a_marked_function_makes_an_unfuture_of_what_any_executor_gives() -> None:
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        unfuture = unsync(executor=executor)(abs)(-1)
        assert type(unfuture) is Unfuture
        assert unfuture.result(PATIENCE) == 1
