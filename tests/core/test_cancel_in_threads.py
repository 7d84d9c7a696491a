"""A cancel from a loop crosses into the function that runs in a thread, and what it waits for.

The function cannot be stopped, but a wait of it can be ended: that in progress, or else the next
one. As in asgiref and anyio, so that the work for a client that has hung up ends, and not only the
task that answers it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import ACCELERATED, AmbientContextManager, CancelledError, Unfuture, unsync
from unsync.executors import ThreadExecutor

CORE = "unsync._core" if ACCELERATED else "unsync._core_py"


class Thread:
    """A function that runs in a thread of a pool, and notes how the one wait of it ended."""

    def __init__(self, wait: Callable[[], object], pool: ThreadExecutor | None = None) -> None:
        self.wait = wait
        self.pool = pool
        self.begun = threading.Event()
        # What it does before that wait, and what after, if that was ended by a cancel.
        self.before: Callable[[], object] = lambda: None
        self.after: Callable[[], object] = lambda: None
        self.outcome: object = None
        self.ended = threading.Event()

    def run(self) -> object:
        self.begun.set()
        try:
            self.before()
            self.outcome = self.wait()
            return self.outcome
        except BaseException as exc:
            self.outcome = exc
            if isinstance(exc, CancelledError):
                self.outcome = exc, self.after()
            raise
        finally:
            self.ended.set()

    def start(self) -> Unfuture[object]:
        return unsync(self.run)() if self.pool is None else self.pool.submit(self.run)

    def is_waiting(self) -> bool:
        assert self.pool is not None
        assert not self.ended.is_set(), f"it ended before, with {self.outcome!r}"
        return self.pool.jobs.counts()[4] > 0

    def wait_until_waiting(self) -> None:
        assert self.begun.wait(PATIENCE)
        wait_until(self.is_waiting, "that the function waits")

    def check_cancelled(self, message: str = "gone", after: object = None) -> None:
        assert self.ended.wait(PATIENCE)
        assert isinstance(self.outcome, tuple), f"the wait ended with {self.outcome!r}"
        cancelled, came = self.outcome
        assert isinstance(cancelled, asyncio.CancelledError)
        assert isinstance(cancelled, concurrent.futures.CancelledError)
        assert cancelled.args == (message,)
        assert came == after


class Query:
    """A coroutine that is waited for, and notes that it was cancelled."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.call: Unfuture[str] = unsync(self.work)()
        assert self.begun.wait(PATIENCE)

    async def work(self) -> str:
        self.begun.set()
        try:
            await asyncio.sleep(PATIENCE * 2)
        except BaseException as exc:
            self.error = exc
            raise
        finally:
            self.ended.set()
        return "not cancelled"

    def check_cancelled(self, message: str = "gone") -> None:
        assert self.ended.wait(PATIENCE)
        assert isinstance(self.error, asyncio.CancelledError)
        assert self.error.args == (message,)

    def check_goes_on(self) -> None:
        assert not self.call.done()
        assert not self.ended.is_set()

    def end(self) -> None:
        self.call.cancel()
        assert self.ended.wait(PATIENCE)


@pytest.fixture
def query(fresh: None) -> Iterator[Query]:
    query = Query()
    yield query
    query.end()


@pytest.fixture
def pool(fresh: None) -> Iterator[ThreadExecutor]:
    with ThreadExecutor(2) as executor:
        unsync.thread_executor = executor
        yield executor


# How a call comes to be cancelled, by whoever has it in a loop.


async def cancel_its_awaiter(call: Unfuture[Any]) -> None:
    async def await_it() -> None:
        await call

    task = asyncio.create_task(await_it())
    await asyncio.sleep(0)
    task.cancel("gone")
    with pytest.raises(asyncio.CancelledError, match="gone"):
        await task


async def cancel_it(call: Unfuture[Any]) -> None:
    assert call.cancel("gone")


async def cancel_its_view(call: Unfuture[Any]) -> None:
    view = call.future
    view.cancel("gone")
    with pytest.raises(asyncio.CancelledError, match="gone"):
        await view


async def cancel_a_continuation(call: Unfuture[Any]) -> None:
    assert call.map(str).cancel("gone")


async def cancel_a_follower(call: Unfuture[Any]) -> None:
    assert Unfuture(call).cancel("gone")


async def cancel_a_gather(call: Unfuture[Any]) -> None:
    gathered = asyncio.gather(call, asyncio.sleep(0))
    await asyncio.sleep(0)
    gathered.cancel("gone")
    with pytest.raises(asyncio.CancelledError):
        await gathered


CANCELS = [
    cancel_its_awaiter,
    cancel_it,
    cancel_its_view,
    cancel_a_continuation,
    cancel_a_follower,
    cancel_a_gather,
]
cancels = pytest.mark.parametrize("cancel", CANCELS)
Cancel = Callable[[Unfuture[Any]], Coroutine[Any, Any, None]]


def cancel_from_a_loop(call: Unfuture[Any], cancel: Cancel = cancel_it) -> None:
    asyncio.run(cancel(call))
    assert call.cancelled()


# The ways in which a thread waits; the first ones cancel what they wait for.


def by_result(call: Unfuture[Any]) -> object:
    return call.result()


def by_result_with_a_timeout(call: Unfuture[Any]) -> object:
    return call.result(PATIENCE)


def by_exception(call: Unfuture[Any]) -> object:
    return call.exception()


def by_its_view(call: Unfuture[Any]) -> object:
    return call.concurrent_future.result()


def by_a_view_of_a_view(call: Unfuture[Any]) -> object:
    return Unfuture(call.concurrent_future).exception()


def by_a_continuation(call: Unfuture[Any]) -> object:
    return call.map(str).result()


def by_another_function(call: Unfuture[Any]) -> object:
    begun = threading.Event()

    def wait() -> object:
        begun.set()
        return call.result()

    waiting = unsync(wait)()
    assert begun.wait(PATIENCE)  # what has not begun would never call it
    return waiting.result()


def by_a_coroutine(call: Unfuture[Any]) -> object:
    begun = threading.Event()

    async def wait() -> object:
        begun.set()
        return await call

    waiting = Unfuture(wait())
    assert begun.wait(PATIENCE)
    return waiting.result()


def by_wait(call: Unfuture[Any]) -> object:
    return concurrent.futures.wait([call])


def by_wait_with_a_timeout(call: Unfuture[Any]) -> object:
    ended = Unfuture.from_value(1)
    return concurrent.futures.wait([call, ended], timeout=PATIENCE)


def by_as_completed(call: Unfuture[Any]) -> object:
    return next(concurrent.futures.as_completed([call]))


def by_wait_for_its_view(call: Unfuture[Any]) -> object:
    return concurrent.futures.wait([call.concurrent_future])


CANCELLING: list[Callable[[Unfuture[Any]], object]] = [
    by_result,
    by_result_with_a_timeout,
    by_exception,
    by_its_view,
    by_a_view_of_a_view,
    by_a_continuation,
    by_another_function,
    by_a_coroutine,
]
RAISING: list[Callable[[Unfuture[Any]], object]] = [
    by_wait,
    by_wait_with_a_timeout,
    by_as_completed,
    by_wait_for_its_view,
]


@pytest.mark.parametrize("way", CANCELLING)
def test_a_wait_in_progress_is_ended_and_what_it_waits_for_cancelled(
    way: Callable[[Unfuture[Any]], object], query: Query, pool: ThreadExecutor
) -> None:
    thread = Thread(lambda: way(query.call), pool)
    call = thread.start()
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    thread.check_cancelled()
    query.check_cancelled()


@pytest.mark.parametrize("way", RAISING)
def test_other_waits_in_progress_are_ended_only(
    way: Callable[[Unfuture[Any]], object], query: Query, pool: ThreadExecutor
) -> None:
    thread = Thread(lambda: way(query.call), pool)
    call = thread.start()
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    thread.check_cancelled()
    query.check_goes_on()


@cancels
def test_however_it_is_cancelled(cancel: Cancel, query: Query, pool: ThreadExecutor) -> None:
    thread = Thread(query.call.result, pool)
    call = thread.start()
    thread.wait_until_waiting()
    cancel_from_a_loop(call, cancel)
    thread.ended.wait(PATIENCE)
    # A gather() that is cancelled keeps the message to itself, before Python 3.13.
    message = getattr(thread.outcome, "args", ("gone",))
    assert isinstance(thread.outcome, tuple), message
    assert query.ended.wait(PATIENCE)
    assert isinstance(query.error, asyncio.CancelledError)


@pytest.mark.parametrize("way", [*CANCELLING, *RAISING])
def test_one_that_does_not_wait_hears_of_it_in_its_next_wait(
    way: Callable[[Unfuture[Any]], object], query: Query, pool: ThreadExecutor
) -> None:
    gate = threading.Event()
    thread = Thread(lambda: way(query.call), pool)
    thread.before = lambda: gate.wait(PATIENCE)
    call = thread.start()
    assert thread.begun.wait(PATIENCE)
    cancel_from_a_loop(call)
    gate.set()
    thread.check_cancelled()
    if way in RAISING:
        query.check_goes_on()
    else:
        query.check_cancelled()


def test_the_timeout_of_an_awaiter_ends_the_wait(query: Query, pool: ThreadExecutor) -> None:
    async def main() -> None:
        async with asyncio.timeout(None) as deadline:
            call = thread.start()
            await asyncio.to_thread(thread.wait_until_waiting)
            deadline.reschedule(asyncio.get_running_loop().time())
            await call

    thread = Thread(query.call.result, pool)
    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert thread.ended.wait(PATIENCE)
    assert isinstance(thread.outcome, tuple)
    assert query.ended.wait(PATIENCE)


def test_the_failure_of_a_task_group_ends_the_wait_of_its_other_tasks(
    query: Query, pool: ThreadExecutor
) -> None:
    async def view() -> None:
        await thread.start()

    async def fail() -> None:
        await asyncio.to_thread(thread.wait_until_waiting)
        raise ArithmeticError

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(view())
            group.create_task(fail())

    thread = Thread(query.call.result, pool)
    with pytest.raises(ExceptionGroup):
        unsync(main)().result(PATIENCE)
    assert thread.ended.wait(PATIENCE)
    assert query.ended.wait(PATIENCE)


# Once.


def test_its_cleanup_may_wait_again(query: Query, pool: ThreadExecutor) -> None:
    @unsync
    async def rolled_back() -> str:
        await asyncio.sleep(0.01)
        return "rolled back"

    thread = Thread(query.call.result, pool)
    thread.after = lambda: (
        rolled_back().result(),
        unsync(str.upper)("x").result(),
        len(concurrent.futures.wait([query.call]).done),
    )
    call = thread.start()
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    thread.check_cancelled(after=("rolled back", "X", 1))


def test_cancelling_what_is_cancelled_is_not_heard_again(
    query: Query, pool: ThreadExecutor
) -> None:
    gate = threading.Event()

    @unsync
    def let_through() -> str:
        assert gate.wait(PATIENCE)
        return "cleaned up"

    thread = Thread(query.call.result, pool)
    thread.after = lambda: let_through().result()
    call = thread.start()
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    query.check_cancelled()
    cancel_from_a_loop(call)
    gate.set()
    thread.check_cancelled(after="cleaned up")


def test_the_next_job_of_the_thread_hears_nothing_of_it(pool: ThreadExecutor) -> None:
    with ThreadExecutor(1) as one:
        gate = threading.Event()
        thread = Thread(lambda: gate.wait(PATIENCE), one)
        call = thread.start()
        assert thread.begun.wait(PATIENCE)
        cancel_from_a_loop(call)
        following = one.submit(lambda: unsync(str.upper)("x").result())
        gate.set()
        assert following.result(PATIENCE) == "X"
        assert thread.outcome is True


def test_what_is_done_can_be_asked_for_and_the_next_wait_hears(
    query: Query, pool: ThreadExecutor
) -> None:
    gate = threading.Event()
    ended = Unfuture.from_value("there")

    def ask() -> object:
        assert ended.result() == "there"
        assert not concurrent.futures.wait([ended]).not_done
        return query.call.result()

    thread = Thread(ask, pool)
    thread.before = lambda: gate.wait(PATIENCE)
    call = thread.start()
    assert thread.begun.wait(PATIENCE)
    cancel_from_a_loop(call)
    gate.set()
    thread.check_cancelled()


# Who may, and what is left alone.


def test_a_plain_thread_cannot_cancel_a_function_that_runs(
    query: Query, pool: ThreadExecutor
) -> None:
    gate: Unfuture[str] = Unfuture()
    thread = Thread(gate.result, pool)
    call = thread.start()
    thread.wait_until_waiting()
    assert call.cancel() is False
    assert not call.cancelled()
    gate.set_result("came")
    assert call.result(PATIENCE) == "came"


def test_a_loop_that_the_function_runs_is_left_alone(query: Query, pool: ThreadExecutor) -> None:
    inside: Unfuture[str] = Unfuture()

    def own_loop() -> object:
        async def main() -> str:
            return await inside

        assert asyncio.run(main()) == "came"
        return query.call.result()

    thread = Thread(own_loop, pool)
    call = thread.start()
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    inside.set_result("came")
    thread.check_cancelled()
    query.check_cancelled()


def test_what_blocks_in_a_loop_of_its_own_is_left_alone(query: Query, pool: ThreadExecutor) -> None:
    inside: Unfuture[str] = Unfuture()

    def own_loop() -> object:
        async def main() -> tuple[str, int]:
            result = inside.result()
            return result, len(concurrent.futures.wait([inside]).done)

        assert asyncio.run(main()) == ("came", 1)
        return query.call.result()

    thread = Thread(own_loop, pool)
    call = thread.start()
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    inside.set_result("came")
    thread.check_cancelled()


def test_a_wait_beside_tasks_of_a_loop_that_was_left_is_ended(
    query: Query, pool: ThreadExecutor
) -> None:
    never: Unfuture[None] = Unfuture()
    loop = asyncio.new_event_loop()
    parked = threading.Event()

    async def park() -> None:
        parked.set()
        await never

    def leave_a_loop() -> object:
        task = loop.create_task(park())
        loop.run_until_complete(asyncio.sleep(0.001))
        assert not task.done()
        second.set()
        return query.call.result()

    second = threading.Event()
    thread = Thread(leave_a_loop, pool)
    call = thread.start()
    assert second.wait(PATIENCE)
    cancel_from_a_loop(call)
    thread.check_cancelled()
    never.set_result(None)
    loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop)))
    loop.close()


def test_it_is_heard_while_the_thread_looks_whether_all_wait_for_ever(
    query: Query, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{CORE}.LOOK_AGAIN_SECONDS", 0.001)
    with ThreadExecutor(1, spare_workers=0) as one:
        for _ in range(20):
            own = Query()
            thread = Thread(own.call.result, one)
            call = thread.start()
            queued = one.submit(int)  # which gives it something to look at
            thread.wait_until_waiting()
            cancel_from_a_loop(call)
            thread.check_cancelled()
            own.check_cancelled()
            assert queued.result(PATIENCE) == 0


# Streams.


def test_a_stream_only_raises_and_loses_nothing(pool: ThreadExecutor) -> None:
    gate: Unfuture[None] = Unfuture()

    @unsync
    def numbers() -> Generator[int, None, None]:
        yield 1
        gate.result()
        yield 2
        yield 3

    def take() -> object:
        taken.append(next(stream))
        return next(stream)

    def clean_up() -> list[int]:
        gate.set_result(None)
        return [*stream]

    stream = numbers()
    taken: list[int] = []
    with ThreadExecutor(1) as one:
        thread = Thread(take, one)
        thread.after = clean_up
        call = thread.start()
        thread.wait_until_waiting()
        cancel_from_a_loop(call)
        thread.check_cancelled(after=[2, 3])
    assert taken == [1]


def test_a_fan_out_only_raises_and_loses_nothing(pool: ThreadExecutor) -> None:
    gate = threading.Event()

    @unsync
    def double(x: int) -> int:
        assert gate.wait(PATIENCE)
        return 2 * x

    def clean_up() -> list[int]:
        gate.set()
        return [*stream]

    stream = unsync.map(double, range(4), chunksize=2)
    with ThreadExecutor(1) as one:
        thread = Thread(lambda: next(stream), one)
        thread.after = clean_up
        call = thread.start()
        thread.wait_until_waiting()
        cancel_from_a_loop(call)
        thread.check_cancelled(after=[0, 2, 4, 6])


def test_closing_a_stream_can_be_waited_for_again(pool: ThreadExecutor) -> None:
    gate: Unfuture[None] = Unfuture()

    @unsync
    async def numbers() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            closing.set()
            await gate
            closed.append(True)

    def close() -> None:
        next(stream)
        stream.close()

    def clean_up() -> None:
        gate.set_result(None)
        stream.close()

    stream = numbers()
    closing = threading.Event()
    closed: list[bool] = []
    with ThreadExecutor(1) as one:
        thread = Thread(close, one)
        thread.after = clean_up
        call = thread.start()
        assert closing.wait(PATIENCE)
        thread.wait_until_waiting()
        cancel_from_a_loop(call)
        thread.check_cancelled()
    assert closed == [True]


# Context managers, and the door of a full pool.


def test_who_is_cancelled_while_entering_has_entered_nothing(pool: ThreadExecutor) -> None:
    entering = threading.Event()
    steps: list[str] = []

    @asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        entering.set()
        try:
            await asyncio.sleep(PATIENCE * 2)
        except asyncio.CancelledError:
            steps.append("cancelled")
            raise
        yield

    def enter() -> None:
        with AmbientContextManager(manager()):
            steps.append("entered")

    thread = Thread(enter, pool)
    call = thread.start()
    assert entering.wait(PATIENCE)
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    thread.check_cancelled()
    assert steps == ["cancelled"]


def test_who_is_cancelled_in_the_body_or_while_leaving_has_left(pool: ThreadExecutor) -> None:
    gate: Unfuture[None] = Unfuture()
    leaving = threading.Event()
    steps: list[str] = []

    @asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        try:
            yield
        finally:
            leaving.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(PATIENCE * 2)
            await gate
            steps.append("left")

    def enter() -> None:
        with AmbientContextManager(manager()):
            steps.append("entered")

    thread = Thread(enter, pool)
    thread.after = lambda: steps.append("cancelled")
    call = thread.start()
    assert leaving.wait(PATIENCE)
    thread.wait_until_waiting()
    cancel_from_a_loop(call)
    gate.set_result(None)
    thread.check_cancelled()
    assert steps == ["entered", "left", "cancelled"]


def test_who_waits_for_room_in_another_pool_is_turned_away(pool: ThreadExecutor) -> None:
    gate = threading.Event()
    called: list[int] = []
    with ThreadExecutor(1, max_queued=0, when_full="wait") as small:
        busy = small.submit(gate.wait, PATIENCE)
        thread = Thread(lambda: small.submit(called.append, 1), pool)
        call = thread.start()
        thread.wait_until_waiting()
        cancel_from_a_loop(call)
        thread.check_cancelled()
        gate.set()
        assert busy.result(PATIENCE)
        small.submit(called.append, 2).result(PATIENCE)  # the door is open
    assert called == [2]


# Chunks of calls, which go to any executor but our own class.


class AnotherExecutor(ThreadExecutor):
    pass


@pytest.fixture
def chunks(fresh: None) -> Iterator[None]:
    with AnotherExecutor(1) as executor:
        unsync.thread_executor = executor
        yield


def test_of_a_chunk_only_the_call_that_was_cancelled_hears(chunks: None) -> None:
    queries = [Query() for _ in range(3)]
    begun = [threading.Event() for _ in queries]
    ended: queue.SimpleQueue[tuple[int, BaseException]] = queue.SimpleQueue()

    @unsync
    def wait_for(number: int) -> str:
        begun[number].set()
        try:
            return queries[number].call.result()
        except BaseException as exc:
            ended.put((number, exc))
            raise

    calls = unsync.calls(wait_for, range(3), chunksize=3)
    for number in (0, 1):
        assert begun[number].wait(PATIENCE)
        assert not begun[number + 1].is_set()
        cancel_from_a_loop(calls[number])
        left, cancelled = ended.get(timeout=PATIENCE)
        assert left == number
        assert isinstance(cancelled, CancelledError)
        queries[number].check_cancelled()
    assert begun[2].wait(PATIENCE)
    queries[2].check_goes_on()
    queries[2].end()
    with pytest.raises(CancelledError):
        calls[2].result(PATIENCE)


def test_of_a_chunk_the_next_call_does_not_hear_what_the_one_before_missed(chunks: None) -> None:
    gate = threading.Event()
    begun = threading.Event()

    @unsync
    def work(number: int) -> object:
        if number == 0:
            begun.set()
            return gate.wait(PATIENCE)
        return unsync(str.upper)("x").result()

    calls = unsync.calls(work, range(2), chunksize=2)
    assert begun.wait(PATIENCE)
    cancel_from_a_loop(calls[0])
    gate.set()
    assert calls[1].result(PATIENCE) == "X"


# Shields, as asgiref and anyio test them.


@pytest.mark.parametrize("where", ["in the ambient loop", "in another loop"])
@pytest.mark.parametrize("kind", ["coroutine", "function", "by hand"])
def test_an_unfuture_of_a_shield_shields(kind: str, where: str, pool: ThreadExecutor) -> None:
    gate: Unfuture[str] = Unfuture()

    async def wait() -> str:
        return await gate

    async def main() -> None:
        shielded = Unfuture(asyncio.shield(inner))
        await cancel_its_awaiter(shielded)
        assert shielded.cancelled()
        assert not inner.done()
        shielded = Unfuture(asyncio.shield(inner))
        assert shielded.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shielded
        assert not inner.done()
        shielded = Unfuture(asyncio.shield(inner))
        gate.set_result("came")
        assert await shielded == "came"

    inner: Unfuture[str]
    if kind == "coroutine":
        inner = unsync(wait)()
    elif kind == "function":
        inner = unsync(gate.result)()
    else:
        inner = gate
    if where == "in another loop":
        asyncio.run(main())
    else:
        unsync(main)().result(PATIENCE)
    assert inner.result(PATIENCE) == "came"


def test_a_function_that_waits_for_a_shield_is_ended_and_what_is_behind_it_goes_on(
    query: Query, pool: ThreadExecutor
) -> None:
    async def main() -> None:
        shielded = Unfuture(asyncio.shield(query.call))
        thread.wait = shielded.result
        call = thread.start()
        await asyncio.to_thread(thread.wait_until_waiting)
        await cancel_its_awaiter(call)
        await asyncio.to_thread(thread.check_cancelled)

    thread = Thread(int, pool)
    asyncio.run(main())
    query.check_goes_on()


class Layers:
    """What answers a request: functions and coroutines in turn, and a task that is shielded."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.gate: Unfuture[None] = Unfuture()
        self.done: list[str] = []
        self.finished = threading.Event()

    async def task(self) -> str:
        self.started.set()
        await self.gate
        self.done.append("task")
        return "saved"

    async def view(self) -> str:
        task = asyncio.create_task(self.task())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self.done.append("view was cancelled")
            self.gate.set_result(None)
            result = await task
            self.done.append("view")
            self.finished.set()
            return result

    def view_of_a_thread(self) -> str:
        """Its task is a function that waits in its turn."""

        async def view() -> str:
            call = unsync(lambda: unsync(self.task)().result())()
            try:
                return await asyncio.shield(call)
            except asyncio.CancelledError:
                self.done.append("view was cancelled")
                self.gate.set_result(None)
                result = await call
                self.done.append("view")
                self.finished.set()
                return result

        return unsync(view)().result()

    def in_thread(self, below: Callable[[], Any]) -> Callable[[], Any]:
        """A function that waits for a coroutine."""
        return lambda: unsync(below)().result()

    def in_loop(self, below: Callable[[], Any]) -> Callable[[], Any]:
        """A coroutine that awaits a function."""

        async def middleware() -> Any:
            return await unsync(below)()

        return middleware

    def all_in_the_loop(self) -> Callable[[], Any]:
        async def middleware() -> str:
            return await self.view()

        return middleware


def layers_in_a_thread(layers: Layers) -> Callable[[], Any]:
    return layers.in_thread(layers.view)


def layers_in_the_loop(layers: Layers) -> Callable[[], Any]:
    return layers.all_in_the_loop()


def layers_in_both(layers: Layers) -> Callable[[], Any]:
    below = layers.in_thread(layers.view)
    for _ in range(2):
        below = layers.in_thread(layers.in_loop(below))
    return below


def layers_in_both_above_a_function(layers: Layers) -> Callable[[], Any]:
    below: Callable[[], Any] = layers.view_of_a_thread
    for _ in range(2):
        below = layers.in_thread(layers.in_loop(below))
    return below


@pytest.mark.parametrize(
    "stack",
    [
        layers_in_a_thread,
        layers_in_the_loop,
        layers_in_both,
        layers_in_both_above_a_function,
    ],
)
@pytest.mark.parametrize("where", ["ambient", "another"])
def test_a_request_that_is_cancelled_ends_its_view_and_not_what_that_shields(
    stack: Callable[[Layers], Callable[[], Any]], where: str, pool: ThreadExecutor
) -> None:
    layers = Layers()

    async def server() -> None:
        async def handle() -> None:
            await unsync(stack(layers))()

        request = asyncio.create_task(handle())
        await asyncio.to_thread(layers.started.wait, PATIENCE)
        request.cancel()
        if stack is layers_in_the_loop:
            # Nothing but coroutines: the view saw it and chose to return.
            await request
        else:
            with pytest.raises(asyncio.CancelledError):
                await request

    if where == "ambient":
        unsync(server)().result(PATIENCE)
    else:
        asyncio.run(server())
    assert layers.finished.wait(PATIENCE)
    assert layers.done == ["view was cancelled", "task", "view"]


def test_a_coroutine_that_cancels_the_request_it_works_for_is_cancelled(
    pool: ThreadExecutor,
) -> None:
    """From a thread function that the request awaits, it cancels the scope around that."""
    heard = threading.Event()

    async def time_bomb() -> None:
        loop.call_soon_threadsafe(scope.reschedule, 0.0)
        try:
            await asyncio.sleep(PATIENCE * 2)
        except asyncio.CancelledError:
            heard.set()
            raise

    async def main() -> None:
        nonlocal loop, scope
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as scope:
            await unsync(lambda: unsync(time_bomb)().result())()

    loop: asyncio.AbstractEventLoop
    scope: asyncio.Timeout
    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert heard.wait(PATIENCE)


# Cancels that come at any moment.


def test_each_function_hears_of_its_cancel_once_however_they_meet(fresh: None) -> None:
    """In the first wait or in the next one, which is endless; and in no other after that."""
    begun: queue.SimpleQueue[int] = queue.SimpleQueue()
    heard: queue.SimpleQueue[int] = queue.SimpleQueue()

    @unsync
    async def step(seconds: float) -> None:
        await asyncio.sleep(seconds)

    def work(number: int) -> None:
        begun.put(number)
        times = 0
        for seconds in (number % 7 * 0.0002, PATIENCE * 2, 0.0):
            if times == 0 or seconds < PATIENCE:
                try:
                    step(seconds).result()
                except CancelledError:
                    times += 1
        heard.put(times)

    async def handle(number: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(number % 5 * 0.0003):
                await unsync(work)(number)

    async def main() -> None:
        for first in range(0, 200, 20):
            await asyncio.gather(*map(handle, range(first, first + 20)))

    with ThreadExecutor(20) as executor:
        unsync.thread_executor = executor
        asyncio.run(main())
    assert heard.qsize() == begun.qsize()
    assert {heard.get() for _ in range(heard.qsize())} <= {1}
