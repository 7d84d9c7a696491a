"""A task that awaits an Unfuture and is cancelled hears of it, or what it awaits does.

asyncio cancels a task once: a cancel that is lost here is a timeout that never strikes. The moment
in which one can be lost is always the same: what is awaited has ended, and its awaiter cannot know.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE, collect, wait_until_gone

from unsync import CancelledError, Unfuture, unsync


class Boom(Exception):
    pass


async def cancelled_in_the_end(task: asyncio.Task[Any]) -> asyncio.CancelledError:
    """How the task was cancelled; anything else fails the test."""
    done, _ = await asyncio.wait([task], timeout=PATIENCE)
    assert done, "the task has lost its cancel, and never ended"
    try:
        result = task.result()
    except asyncio.CancelledError as cancelled:
        return cancelled
    raise AssertionError(f"the task went on with {result!r} though it was cancelled")


# The ways to await an Unfuture.


def itself(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return unfuture


def its_view(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return unfuture.future


def its_view_within_one(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return Unfuture(unfuture.future)


def its_concurrent_view(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return Unfuture(unfuture.concurrent_future)


def a_follower(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return Unfuture(Unfuture(unfuture))


def a_continuation(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return Unfuture.from_value(1).map(lambda _: unfuture)


def a_continuation_of_it(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return unfuture.then(lambda ended: ended.result())


def a_coroutine_of_the_ambient_loop(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    async def wait() -> Any:
        return await unfuture

    return Unfuture(wait())


def a_gather(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return asyncio.gather(unfuture)


def a_shield(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return asyncio.shield(unfuture)


def a_shield_within_one(unfuture: Unfuture[Any]) -> Awaitable[Any]:
    return Unfuture(asyncio.shield(unfuture))


WAYS: list[Callable[[Unfuture[Any]], Awaitable[Any]]] = [
    itself,
    its_view,
    its_view_within_one,
    its_concurrent_view,
    a_follower,
    a_continuation,
    a_continuation_of_it,
    a_coroutine_of_the_ambient_loop,
    a_gather,
    a_shield,
    a_shield_within_one,
]

ways = pytest.mark.parametrize("way", WAYS)
# The first failure among what it gathers is what gather() raises, whoever was cancelled meanwhile.
ways_for_failures = pytest.mark.parametrize("way", [way for way in WAYS if way is not a_gather])


# What may stand behind an Unfuture, in a loop that can be held with its last step already due.


class Ending:
    """Something that ends in a moment in which its loop can do nothing else."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.loop: asyncio.AbstractEventLoop = unsync.loop
        self.gate: asyncio.Future[None] = self.loop.create_future()
        self.heard: list[asyncio.CancelledError] = []
        self.suspended = threading.Event()
        # What is to happen as its last act.
        self.at_the_end: Callable[[], object] = lambda: None

    async def work(self) -> str:
        self.loop.call_soon(self.suspended.set)
        try:
            await self.gate
        except asyncio.CancelledError as cancelled:
            self.heard.append(cancelled)
            return "heard of it and went on"
        self.at_the_end()
        if self.failure is not None:
            raise self.failure
        return "ended"

    def of_a_call(self) -> Unfuture[str]:
        unfuture = unsync(self.work)()
        assert self.suspended.wait(PATIENCE)
        return unfuture

    def of_a_task(self) -> Unfuture[str]:
        async def make() -> asyncio.Task[str]:
            return self.loop.create_task(self.work())

        task = asyncio.run_coroutine_threadsafe(make(), self.loop).result(PATIENCE)
        assert self.suspended.wait(PATIENCE)
        return Unfuture(task)

    def of_a_continuation(self) -> Unfuture[str]:
        unfuture = Unfuture.from_value(1).then(lambda _: self.work())
        assert self.suspended.wait(PATIENCE)
        return unfuture

    def hold_with_the_end_due(self) -> Callable[[], None]:
        """From now on the loop is busy; what it gives lets it go on, first of all to the end."""
        held, release = threading.Event(), threading.Event()

        def let_go_and_block() -> None:
            self.gate.set_result(None)
            held.set()
            assert release.wait(PATIENCE)

        self.loop.call_soon_threadsafe(let_go_and_block)
        assert held.wait(PATIENCE)
        return release.set


behind = pytest.mark.parametrize(
    "make", [Ending.of_a_call, Ending.of_a_task, Ending.of_a_continuation]
)


async def wait_for(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def settle() -> None:
    """Until what was begun waits: in this loop, and in the ambient one."""
    for _ in range(5):
        await asyncio.sleep(0)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), unsync.loop))


# From another loop.


async def cancel_at_the_end(
    ending: Ending, unfuture: Unfuture[Any], way: Callable[[Unfuture[Any]], Awaitable[Any]]
) -> None:
    task = asyncio.ensure_future(wait_for(way(unfuture)))
    await settle()
    let_go = ending.hold_with_the_end_due()
    assert task.cancel("why")
    for _ in range(3):
        await asyncio.sleep(0)
    let_go()
    cancelled = await cancelled_in_the_end(task)
    assert way is a_gather or cancelled.args == ("why",)  # asyncio's gather() makes its own


@behind
@ways
def test_a_cancel_that_comes_as_the_result_does_is_raised_in_another_loop(
    way: Callable[[Unfuture[Any]], Awaitable[Any]], make: Callable[[Ending], Unfuture[str]]
) -> None:
    ending = Ending()
    unfuture = make(ending)
    asyncio.run(cancel_at_the_end(ending, unfuture, way))
    assert ending.heard == []
    # The coroutine ended with a result, which is there for everybody else.
    assert unfuture.result(PATIENCE) == "ended"


@behind
@ways_for_failures
def test_a_cancel_that_comes_as_a_failure_does_is_raised_in_another_loop(
    way: Callable[[Unfuture[Any]], Awaitable[Any]],
    make: Callable[[Ending], Unfuture[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ending = Ending(Boom())
    unfuture = make(ending)
    asyncio.run(cancel_at_the_end(ending, unfuture, way))
    with pytest.raises(Boom):
        unfuture.result(PATIENCE)
    del unfuture, ending
    collect()
    if way not in {a_shield, a_shield_within_one}:  # which reports what it shielded, from 3.14 on
        assert caplog.records == []


def test_a_failure_that_nobody_wants_any_more_is_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As with whoever cancels what has failed already."""

    async def from_elsewhere(way: Callable[[Unfuture[Any]], Awaitable[Any]]) -> None:
        ending = Ending(Boom())
        await cancel_at_the_end(ending, ending.of_a_call(), way)

    async def in_the_same_loop(way: Callable[[Unfuture[Any]], Awaitable[Any]]) -> None:
        ending = Ending(Boom())
        task = asyncio.ensure_future(wait_for(way(unsync(ending.work)())))
        for _ in range(3):
            await asyncio.sleep(0)
        ending.at_the_end = lambda: asyncio.get_running_loop().call_soon(task.cancel)
        ending.gate.set_result(None)
        await cancelled_in_the_end(task)

    for way in (itself, its_view, a_follower):
        asyncio.run(from_elsewhere(way))
        Unfuture(in_the_same_loop(way)).result(PATIENCE)
    collect()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), unsync.loop).result(PATIENCE)
    assert caplog.records == []


def cancel_it(unfuture: Unfuture[Any]) -> Callable[[], object]:
    return unfuture.cancel


def cancel_its_continuation(unfuture: Unfuture[Any]) -> Callable[[], object]:
    return unfuture.then(lambda ended: ended.result()).cancel


def cancel_its_follower(unfuture: Unfuture[Any]) -> Callable[[], object]:
    return Unfuture(unfuture).cancel


def cancel_the_function_that_waits_for_it(unfuture: Unfuture[Any]) -> Callable[[], object]:
    waits, ended = threading.Event(), threading.Event()

    @unsync
    def wait() -> Any:
        waits.set()
        try:
            return unfuture.result()
        finally:
            ended.set()

    async def cancel() -> None:
        waiting.cancel()

    def cancel_and_wait() -> None:
        asyncio.run(cancel())
        assert ended.wait(PATIENCE)

    waiting = wait()
    assert waits.wait(PATIENCE)
    return cancel_and_wait


@behind
@pytest.mark.parametrize(
    "prepare",
    [
        cancel_it,
        cancel_its_continuation,
        cancel_its_follower,
        cancel_the_function_that_waits_for_it,
    ],
)
@pytest.mark.parametrize("has_told", [False, True])
def test_a_failure_that_comes_as_it_is_cancelled_is_not_reported(
    make: Callable[[Ending], Unfuture[str]],
    prepare: Callable[[Unfuture[Any]], Callable[[], object]],
    has_told: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From another thread, whose request finds that the coroutine has ended.

    :param has_told: whether the Unfuture has the failure already when the request comes.
    """
    ending = Ending(Boom())
    unfuture = make(ending)
    cancel = prepare(unfuture)
    if has_told:
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            assert release.wait(PATIENCE)

        # After the last step, in the loop's same turn; the news of it comes in the next.
        ending.at_the_end = lambda: ending.loop.call_soon(hold)
        ending.loop.call_soon_threadsafe(ending.gate.set_result, None)
        assert held.wait(PATIENCE)
        cancel()
        release.set()
    else:
        go_on = ending.hold_with_the_end_due()
        cancel()
        go_on()
    reference = weakref.ref(unfuture)
    del cancel, unfuture
    wait_until_gone(reference)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), unsync.loop).result(PATIENCE)
    assert caplog.records == []


@behind
@pytest.mark.parametrize(
    "way",
    # A continuation of it is another call, and never begins; a shield keeps the cancel to itself.
    [
        way
        for way in WAYS
        if way not in {a_continuation_of_it, a_gather, a_shield, a_shield_within_one}
    ],
)
def test_a_coroutine_that_sees_the_cancel_and_returns_keeps_its_result_in_another_loop(
    way: Callable[[Unfuture[Any]], Awaitable[Any]], make: Callable[[Ending], Unfuture[str]]
) -> None:
    async def main() -> str:
        task = asyncio.ensure_future(wait_for(way(unfuture)))
        await settle()
        assert task.cancel("why")
        result: str = await asyncio.wait_for(task, PATIENCE)
        return result

    ending = Ending()
    unfuture = make(ending)
    assert asyncio.run(main()) == "heard of it and went on"
    assert [cancelled.args for cancelled in ending.heard] == [("why",)]


@pytest.mark.parametrize("way", [itself, its_view, a_follower, its_concurrent_view])
def test_a_second_cancel_is_not_covered_by_the_first(
    way: Callable[[Unfuture[Any]], Awaitable[Any]],
) -> None:
    """The coroutine has seen the first one, and ends before it can see the second."""
    ending = Ending()
    heard = threading.Event()

    async def work() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            heard.set()
        return await ending.work()

    async def main() -> None:
        unfuture = Unfuture(work())
        task = asyncio.ensure_future(wait_for(way(unfuture)))
        await settle()
        assert task.cancel("first")
        assert heard.wait(PATIENCE)
        assert ending.suspended.wait(PATIENCE)
        let_go = ending.hold_with_the_end_due()
        assert task.cancel("second")
        let_go()
        assert (await cancelled_in_the_end(task)).args == ("second",)

    asyncio.run(main())


def test_each_awaiter_has_an_answer_of_its_own() -> None:
    """The one that was cancelled too late raises; the result is there for the one that was not."""

    async def main() -> str:
        ending = Ending()
        unfuture = ending.of_a_call()
        cancelled = asyncio.ensure_future(wait_for(unfuture))
        other = asyncio.ensure_future(wait_for(unfuture))
        await settle()
        let_go = ending.hold_with_the_end_due()
        cancelled.cancel()
        let_go()
        await cancelled_in_the_end(cancelled)
        return await asyncio.wait_for(other, PATIENCE)

    assert asyncio.run(main()) == "ended"


def test_two_awaiters_in_two_loops_are_both_told(in_thread: Any) -> None:
    ending = Ending()
    unfuture = ending.of_a_call()
    waiting, go_on = threading.Barrier(3), threading.Event()
    told: list[str] = []

    async def main() -> None:
        task = asyncio.ensure_future(wait_for(unfuture))
        await settle()
        waiting.wait(PATIENCE)
        assert go_on.wait(PATIENCE)
        task.cancel("why")
        waiting.wait(PATIENCE)
        told.extend((await cancelled_in_the_end(task)).args)

    threads = [in_thread(lambda: asyncio.run(main())) for _ in range(2)]
    waiting.wait(PATIENCE)
    let_go = ending.hold_with_the_end_due()
    go_on.set()
    waiting.wait(PATIENCE)
    let_go()
    for thread in threads:
        thread.join(PATIENCE)
    assert told == ["why", "why"]


@pytest.mark.parametrize("ends_with", ["result", "failure"])
@pytest.mark.parametrize("way", [itself, its_view, a_follower, its_concurrent_view])
def test_a_cancel_that_comes_while_the_only_step_is_made_is_raised(
    way: Callable[[Unfuture[Any]], Awaitable[Any]], ends_with: str
) -> None:
    began, gate = threading.Event(), threading.Event()

    @unsync
    async def work() -> str:
        began.set()
        assert gate.wait(PATIENCE)
        if ends_with == "failure":
            raise Boom
        return "ended"

    async def main() -> Unfuture[str]:
        unfuture = work()
        assert began.wait(PATIENCE)
        tasks = [asyncio.ensure_future(wait_for(way(unfuture))) for _ in range(2)]
        for _ in range(3):
            await asyncio.sleep(0)
        for task in tasks:
            assert task.cancel("why")
        gate.set()
        for task in tasks:
            assert (await cancelled_in_the_end(task)).args == ("why",)
        return unfuture

    unfuture = asyncio.run(main())
    with pytest.raises(Boom if ends_with == "failure" else CancelledError):
        unfuture.result(PATIENCE)


def test_a_cancel_that_comes_while_the_first_step_is_made_is_seen_by_the_coroutine() -> None:
    began, gate = threading.Event(), threading.Event()

    @unsync
    async def work() -> str:
        began.set()
        assert gate.wait(PATIENCE)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "heard of it and went on"
        raise AssertionError("nobody sets it")

    async def main() -> None:
        unfuture = work()
        assert began.wait(PATIENCE)
        tasks = [asyncio.ensure_future(wait_for(unfuture)) for _ in range(2)]
        for _ in range(3):
            await asyncio.sleep(0)
        for task in tasks:
            assert task.cancel()
        gate.set()
        for task in tasks:
            assert await asyncio.wait_for(task, PATIENCE) == "heard of it and went on"

    asyncio.run(main())


@pytest.mark.parametrize("way", [itself, a_follower])
def test_a_future_of_another_loop_that_ends_as_it_is_cancelled(
    way: Callable[[Unfuture[Any]], Awaitable[Any]],
) -> None:
    """It is done before the request comes; nobody may tell its result to who was cancelled."""

    async def main() -> None:
        ending = Ending()
        ending.gate.add_done_callback(lambda _: None)
        task = asyncio.ensure_future(wait_for(way(Unfuture(ending.gate))))
        await settle()
        let_go = ending.hold_with_the_end_due()
        task.cancel("why")
        let_go()
        assert (await cancelled_in_the_end(task)).args == ("why",)

    asyncio.run(main())


# In the loop's own thread.


@behind
@ways
def test_a_cancel_that_comes_as_the_last_act_is_raised_in_the_same_loop(
    way: Callable[[Unfuture[Any]], Awaitable[Any]], make: Callable[[Ending], Unfuture[str]]
) -> None:
    ending = Ending()
    unfuture = make(ending)

    async def main() -> None:
        task = asyncio.ensure_future(wait_for(way(unfuture)))
        for _ in range(3):
            await asyncio.sleep(0)
        # It is called before anybody can be told how the coroutine ended.
        ending.at_the_end = lambda: asyncio.get_running_loop().call_soon(task.cancel, "why")
        ending.gate.set_result(None)
        cancelled = await cancelled_in_the_end(task)
        assert way is a_gather or cancelled.args == ("why",)

    Unfuture(main()).result(PATIENCE)
    assert ending.heard == []


@behind
@pytest.mark.parametrize("way", [itself, its_view, a_follower, a_gather])
def test_in_the_loops_own_thread_the_answer_is_the_tasks(
    way: Callable[[Unfuture[Any]], Awaitable[Any]], make: Callable[[Ending], Unfuture[str]]
) -> None:
    ending = Ending()
    unfuture = make(ending)
    answers: list[bool] = []

    async def main() -> None:
        awaited: Any = way(unfuture)
        await asyncio.sleep(0)
        ending.at_the_end = lambda: asyncio.get_running_loop().call_soon(
            lambda: answers.append(awaited.cancel())
        )
        ending.gate.set_result(None)
        await asyncio.wait([awaited], timeout=PATIENCE)

    Unfuture(main()).result(PATIENCE)
    assert answers == [False]
    assert unfuture.result(PATIENCE) == "ended"


def test_a_coroutine_that_sees_the_cancel_and_returns_keeps_its_result_in_the_same_loop() -> None:
    ending = Ending()
    unfuture = ending.of_a_call()

    async def main() -> str:
        task = asyncio.ensure_future(wait_for(unfuture))
        await asyncio.sleep(0)
        task.cancel()
        return await asyncio.wait_for(task, PATIENCE)

    assert Unfuture(main()).result(PATIENCE) == "heard of it and went on"
    assert len(ending.heard) == 1


# Without knowing the moment.


@unsync
async def poll() -> str:
    await asyncio.sleep(0)
    return "not ready"


async def wait_until_ready(asked: Callable[[], None], ask: Callable[[], Awaitable[Any]]) -> None:
    while "not ready" in await ask():  # a list of one, if gathered
        asked()


async def cancel_often(rounds: int, ask: Callable[[], Awaitable[Any]]) -> None:
    for number in range(rounds):
        polls = 0
        enough = asyncio.Event()

        def asked(number: int = number, enough: asyncio.Event = enough) -> None:
            nonlocal polls
            polls += 1
            if polls > number % 5:
                enough.set()

        task = asyncio.ensure_future(wait_until_ready(asked, ask))
        await asyncio.wait_for(enough.wait(), PATIENCE)
        for _ in range(number % 4):
            await asyncio.sleep(0)
        task.cancel()
        await cancelled_in_the_end(task)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("way", [itself, its_view, a_follower, a_continuation, a_gather])
@pytest.mark.usefixtures("restless")
def test_no_cancel_is_lost_whenever_it_comes(
    way: Callable[[Unfuture[Any]], Awaitable[Any]],
) -> None:
    work: Coroutine[Any, Any, None] = cancel_often(150, lambda: way(poll()))
    asyncio.run(work)


@pytest.mark.usefixtures("restless")
def test_no_cancel_is_lost_whenever_it_comes_in_the_same_loop() -> None:
    Unfuture(cancel_often(300, poll)).result(PATIENCE)


def test_a_timeout_strikes_whenever_it_comes() -> None:
    async def one(seconds: float) -> None:
        async with asyncio.timeout(seconds):
            await wait_until_ready(lambda: None, poll)

    async def main() -> None:
        for number in range(50):
            task = asyncio.ensure_future(one(0.001 + number % 7 * 0.0003))
            done, _ = await asyncio.wait([task], timeout=PATIENCE)
            assert done, "the timeout has not struck"
            assert isinstance(task.exception(), TimeoutError)

    asyncio.run(main())


def test_a_task_group_ends_with_its_failed_child() -> None:
    async def fail() -> None:
        await poll()
        raise Boom

    async def group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait_until_ready(lambda: None, poll))
            group.create_task(fail())

    async def main() -> None:
        for _ in range(50):
            failures: Any = (await asyncio.gather(group(), return_exceptions=True))[0]
            assert [type(each) for each in failures.exceptions] == [Boom]

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
