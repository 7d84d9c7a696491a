"""`unsync.drain()`: what is waited for, what is not, and who may wait."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import logging
import queue
import re
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE, ambient_loop_held, wait_until

import unsync as package
from unsync import Unfuture, _backend, _common, executors, unsync
from unsync.executors import ThreadExecutor

InThread = Callable[[Callable[[], object]], threading.Thread]

pytestmark = pytest.mark.usefixtures("fresh")


@unsync
def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


async def opened(event: threading.Event) -> None:
    while not event.is_set():  # noqa: ASYNC110  # which is a thread's
        await asyncio.sleep(0.001)


class Draining:
    """One drain in a thread of its own, past the point from which on others' calls do not count."""

    def __init__(self, in_thread: InThread) -> None:
        self.answers: list[bool] = []
        drains = package._drain._watcher._drains
        before = len(drains)
        self.thread = in_thread(lambda: self.answers.append(unsync.drain(PATIENCE)))
        wait_until(lambda: len(drains) > before and not drains[-1]._is_looking, "the drain")
        self.drain = drains[-1]

    def waits_for(self, *names: str) -> bool:
        """Whether calls of these functions come to be among what it waits for."""

        def found() -> bool:
            now = Counter(map(_backend.name_of_call, self.drain.pending()))
            return bool(self.answers) or Counter[str | None](names) <= now

        wait_until(found, f"to wait for {names}")
        return not self.answers

    def answer(self) -> bool:
        self.thread.join(PATIENCE)
        (answer,) = self.answers
        return answer


@pytest.fixture
def draining(in_thread: InThread) -> Callable[[], Draining]:
    return lambda: Draining(in_thread)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


# What counts.


def test_functions_that_wait_for_a_thread_or_run(make_pool: Callable[..., ThreadExecutor]) -> None:
    make_pool(2)
    done: list[int] = []
    for number in range(100):
        unsync(done.append)(number)
    assert unsync.drain() is True
    assert sorted(done) == list(range(100))


def test_coroutines() -> None:
    done: list[int] = []

    @unsync
    async def later(number: int) -> None:
        await asyncio.sleep(0.001 * number)
        done.append(number)

    for number in range(20):
        later(number)
    assert unsync.drain() is True
    assert sorted(done) == list(range(20))


def test_what_is_called_in_turn(draining: Callable[[], Draining], gate: threading.Event) -> None:
    go = threading.Event()

    @unsync
    def in_thread(depth: int) -> None:
        assert go.wait(PATIENCE)
        if depth:
            in_loop(depth - 1)
        else:
            wait_for(gate)

    @unsync
    async def in_loop(depth: int) -> None:
        await asyncio.sleep(0)
        in_thread(depth)

    in_thread(5)
    drain = draining()
    go.set()
    assert drain.waits_for("wait_for")
    gate.set()
    assert drain.answer()


def test_what_a_coroutine_calls_that_was_pending(
    draining: Callable[[], Draining], gate: threading.Event
) -> None:
    """It is suspended when the drain begins, and has ended when what it has called calls others."""
    parent_done = threading.Event()

    @unsync
    async def parent() -> None:
        await opened(parent_may_end)
        child()

    @unsync
    async def child() -> None:
        await opened(parent_done)
        wait_for(gate)

    parent_may_end = threading.Event()
    calling = parent()
    drain = draining()
    parent_may_end.set()
    calling.result(PATIENCE)
    parent_done.set()
    assert drain.waits_for("wait_for")
    gate.set()
    assert drain.answer()


def test_continuations_that_are_there(
    draining: Callable[[], Draining], gate: threading.Event
) -> None:
    go = threading.Event()
    first = wait_for(go)
    last = first.map(lambda _: wait_for(gate)).map(lambda _: "the end")
    drain = draining()
    go.set()
    first.result(PATIENCE)
    assert drain.waits_for("wait_for")
    gate.set()
    assert drain.answer()
    assert last.result(0) == "the end"


def test_what_continuations_call_that_are_there(
    draining: Callable[[], Draining], gate: threading.Event
) -> None:
    """And do not wait for; also where they were made in a context without any variable."""
    go = threading.Event()
    first = wait_for(go)

    def call(_: object) -> None:
        wait_for(gate)

    last = contextvars.Context().run(first.map, call)
    drain = draining()
    go.set()
    last.result(PATIENCE)
    assert drain.waits_for("wait_for")
    gate.set()
    assert drain.answer()


def test_continuations_that_come(draining: Callable[[], Draining], gate: threading.Event) -> None:
    """Of what counts, by whoever they are made."""
    go = threading.Event()

    @unsync
    async def source() -> None:
        await opened(go)

    first: Unfuture[None] = source()
    drain = draining()
    last = first.then(later(gate))
    go.set()
    first.result(PATIENCE)
    assert drain.waits_for("later.<locals>.continuation")
    gate.set()
    assert drain.answer()
    assert last.done()


def later(gate: threading.Event) -> Callable[[Unfuture[None]], Any]:
    async def continuation(_: Unfuture[None]) -> None:
        await opened(gate)

    return continuation


def test_all_continuations_are_found() -> None:
    source: Unfuture[int] = Unfuture()
    targets = [source.then(print), source.map(print), Unfuture(source)]
    for _ in range(20):
        targets.append(source.map(print))
        source.add_done_callback(print)
    found = _backend.waiting_upon(source)
    assert {*map(id, found)} == {*map(id, targets)}
    assert len(found) == len(targets)
    source.cancel()
    assert _backend.waiting_upon(source) == []


def test_continuations_of_what_is_just_ending() -> None:
    """The worker has made it done, and has not called what comes after it."""
    done: list[int] = []

    @unsync
    def nothing() -> None: ...

    for number in range(2000):
        nothing().map(lambda _, number=number: done.append(number))
        assert unsync.drain(PATIENCE)
        assert len(done) == number + 1


def test_a_continuation_for_which_the_loop_is_started(
    draining: Callable[[], Draining], gate: threading.Event
) -> None:
    """When the drain begins there is no loop, and the worker is past saying what comes next."""
    makes, go_on = threading.Event(), threading.Event()

    def make() -> asyncio.AbstractEventLoop:
        makes.set()
        assert go_on.wait(PATIENCE)
        loop = asyncio.new_event_loop()
        loop.call_soon(gate.wait, PATIENCE)  # before all else
        return loop

    unsync.loop_factory = make
    go = threading.Event()
    last = wait_for(go).map(str)
    go.set()
    assert makes.wait(PATIENCE)
    drain = draining()
    go_on.set()
    assert drain.waits_for("str")
    gate.set()
    assert drain.answer()
    assert last.result(0) == "None"


def test_what_is_called_and_moves_while_it_looks_around(
    monkeypatch: pytest.MonkeyPatch, in_thread: InThread, gate: threading.Event
) -> None:
    """From a queue that it has not looked into yet to one that it has."""
    one, other = ThreadExecutor(1), ThreadExecutor(1)
    go = threading.Event()
    answers: list[bool] = []

    def hand_on() -> None:
        assert go.wait(PATIENCE)
        one.submit(gate.wait, PATIENCE)

    class Moving:
        def pending(self) -> Any:
            go.set()
            root.result(PATIENCE)
            return other.jobs.pending()

    root = other.submit(hand_on)
    monkeypatch.setattr(executors, "open_queues", lambda: [one.jobs, Moving()])
    thread = in_thread(lambda: answers.append(unsync.drain(PATIENCE)))
    wait_until(lambda: answers or go.is_set())
    root.result(PATIENCE)
    wait_until(lambda: answers or not package._drain._watcher._drains[-1]._is_looking)
    assert not answers
    gate.set()
    thread.join(PATIENCE)
    assert answers == [True]
    for executor in one, other:
        executor.shutdown()


def test_what_a_task_of_a_coroutine_calls(
    draining: Callable[[], Draining], gate: threading.Event
) -> None:
    """Tasks that it makes after the drain has begun, and such that were there before."""
    begun, go = threading.Event(), threading.Event()

    async def call() -> None:
        await opened(go)
        wait_for(gate)

    @unsync
    async def parent() -> None:
        early = asyncio.create_task(call())
        await asyncio.sleep(0)
        begun.set()
        await opened(go)
        await asyncio.gather(early, call())

    parent()
    assert begun.wait(PATIENCE)
    drain = draining()
    go.set()
    assert drain.waits_for("wait_for", "wait_for")
    gate.set()
    assert drain.answer()


def test_a_coroutine_that_waits_for_its_turn(in_thread: InThread, gate: threading.Event) -> None:
    answers: list[bool] = []

    @unsync
    async def behind() -> None:
        wait_for(gate)

    with ambient_loop_held():
        waiting = behind()
        thread = in_thread(lambda: answers.append(unsync.drain(PATIENCE)))
        wait_until(lambda: package._drain._watcher._drains, "the drain")
    waiting.result(PATIENCE)
    (drain,) = package._drain._watcher._drains
    wait_until(
        lambda: answers or [*map(_backend.name_of_call, drain.pending())] == ["wait_for"],
    )
    assert not answers
    gate.set()
    thread.join(PATIENCE)
    assert answers == [True]


def test_a_function_that_was_cancelled_and_still_runs(
    draining: Callable[[], Draining], gate: threading.Event
) -> None:
    """That of a coroutine which has awaited it: what it returns is wanted by nobody any more."""
    begun, go = threading.Event(), threading.Event()

    @unsync
    def function() -> None:
        begun.set()
        assert go.wait(PATIENCE)
        wait_for(gate)

    running: Unfuture[None] = function()
    assert begun.wait(PATIENCE)
    assert running._complete(2, None)  # as a loop that was given up does
    drain = draining()
    assert drain.waits_for(running_name(running))
    go.set()
    assert drain.waits_for("wait_for")
    gate.set()
    assert drain.answer()


def test_a_function_that_a_killed_worker_was_about_to_begin(
    make_pool: Callable[..., ThreadExecutor],
    draining: Callable[[], Draining],
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It fails of that, with the compiled core, or else another worker begins it."""
    caplog.set_level(logging.CRITICAL + 1, logger="unsync")
    make_pool(1)
    go = threading.Event()
    wait_for(go)
    second = wait_for(gate)
    drain = draining()
    watcher = package._drain._watcher
    is_through = watcher.is_through

    def killed(job: Unfuture[Any]) -> None:
        """In the worker, which has taken the second one: struck as by PyThreadState_SetAsyncExc."""
        monkeypatch.setattr(watcher, "is_through", is_through)
        is_through(job)
        raise SystemExit

    def ends(_: Unfuture[Any]) -> None:
        second.add_done_callback(has_ended)  # after those that are there

    def has_ended(_: Unfuture[Any]) -> None:
        """The worker is not through with it before the drain waits for just that."""
        wait_until(lambda: drain.drain._moved._waiters)

    second.add_done_callback(ends)
    monkeypatch.setattr(watcher, "is_through", killed)
    gate.set()
    go.set()
    assert drain.answer()
    assert isinstance(second.exception(0), (SystemExit, type(None)))


def running_name(unfuture: Unfuture[Any]) -> str:
    return _backend.name_of_call(unfuture) or ""


@pytest.mark.parametrize("in_chunks", [True, False])
def test_what_other_executors_have_to_do(in_chunks: bool) -> None:
    done: list[int] = []
    gate = threading.Event()

    def note(number: int) -> None:
        assert gate.wait(PATIENCE)
        done.append(number)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        marked = unsync(note, executor=executor)
        if in_chunks:
            calls = unsync.calls(marked, range(20), chunksize=5)
        else:
            calls = [marked(number) for number in range(20)]
        calls[-1].map(done.append)
        threading.Timer(0.01, gate.set).start()
        assert unsync.drain(PATIENCE)
    assert done == [*range(20), None]


def test_what_functions_hand_to_other_executors(draining: Callable[[], Draining]) -> None:
    done: list[int] = []
    begun, go, gate = (threading.Event() for _ in range(3))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:

        @unsync(executor=executor)
        def elsewhere(number: int) -> None:
            assert gate.wait(PATIENCE)
            done.append(number)

        @unsync
        def hand_on() -> None:
            begun.set()
            assert go.wait(PATIENCE)
            elsewhere(1)
            unsync.calls(elsewhere, [2, 3])

        hand_on()
        assert begun.wait(PATIENCE)
        drain = draining()
        go.set()
        gate.set()
        assert drain.answer()
    assert done == [1, 2, 3]


class Forgetful(concurrent.futures.Executor):
    """Which never does what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return concurrent.futures.Future()


@pytest.mark.parametrize("in_chunks", [True, False])
def test_not_for_what_an_executor_has_forgotten(in_chunks: bool) -> None:
    marked = unsync(print, executor=Forgetful())
    calls = unsync.calls(marked, range(20), chunksize=5) if in_chunks else [marked(1)]
    assert unsync.drain(0.01) is False
    del calls
    assert unsync.drain(PATIENCE) is True


def test_streams_that_functions_read() -> None:
    @unsync
    async def numbers() -> AsyncIterator[int]:
        for number in range(1000):
            yield number

    found: list[int] = []
    unsync(lambda: found.append(sum(numbers())))()
    assert unsync.drain(PATIENCE)
    assert found == [499500]


def test_nothing_is_pending() -> None:
    assert unsync.drain() is True
    assert unsync.drain(0) is True
    assert "unsync" not in {thread.name for thread in threading.enumerate()}, "it began a loop"


def test_calls_that_are_refused_are_not_waited_for(
    make_pool: Callable[..., ThreadExecutor], draining: Callable[[], Draining]
) -> None:
    pool = ThreadExecutor(1, max_queued=0)
    begun, go, gate = (threading.Event() for _ in range(3))
    refusals: list[Exception] = []

    @unsync
    def call_what_is_full() -> None:
        begun.set()
        assert go.wait(PATIENCE)
        try:
            pool.submit(print)
        except queue.Full as exc:
            refusals.append(exc)
        closed.shutdown()
        try:
            closed.submit(print)
        except RuntimeError as exc:
            refusals.append(exc)

    closed = ThreadExecutor(1)
    occupied = pool.submit(gate.wait, PATIENCE)
    call_what_is_full()
    assert begun.wait(PATIENCE)
    drain = draining()
    go.set()
    wait_until(lambda: len(refusals) == 2)
    gate.set()
    occupied.result(PATIENCE)
    pool.shutdown()
    assert drain.answer()


# What does not.


def test_calls_that_others_make_meanwhile(
    draining: Callable[[], Draining], gate: threading.Event
) -> None:
    counts, done = threading.Event(), threading.Event()
    wait_for(counts)
    drain = draining()
    others = [wait_for(gate), unsync(asyncio.sleep)(3600), wait_for(gate).map(print)]  # type: ignore[call-overload]
    counts.set()
    assert drain.answer()
    assert not any(each.done() for each in others)
    others[1].cancel()
    done.set()


def test_a_heartbeat_outlasts_the_timeout() -> None:
    beats: list[int] = []

    @unsync
    async def heartbeat() -> None:
        while True:
            beats.append(len(beats))
            await asyncio.sleep(0.001)

    beating = heartbeat()
    assert unsync.drain(0.01) is False
    assert unsync.drain(timeout=0) is False
    so_far = len(beats)
    wait_until(lambda: len(beats) > so_far, "another beat: nothing was cancelled")
    assert beating.cancel()


def test_a_stream_and_a_context_manager_that_wait_for_their_users() -> None:
    @unsync
    async def numbers() -> AsyncIterator[int]:
        while True:
            yield 1

    @unsync
    def in_threads() -> Iterator[int]:
        while True:
            yield 1

    @unsync
    @contextlib.asynccontextmanager
    async def resource() -> AsyncIterator[str]:
        yield "resource"

    with numbers() as one, in_threads() as other, resource() as name:
        assert (next(one), next(other), name) == (1, 1, "resource")
        assert unsync.drain(PATIENCE)


def test_an_unfuture_that_is_set_by_hand() -> None:
    by_hand: Unfuture[int] = Unfuture()
    by_hand.map(print)
    assert unsync.drain(PATIENCE)


# Who waits, and for how long.


def test_several_at_once(draining: Callable[[], Draining], gate: threading.Event) -> None:
    first, second = threading.Event(), threading.Event()
    wait_for(first)
    one = draining()
    wait_for(second)
    other = draining()
    first.set()
    assert one.answer()
    assert not other.answers
    second.set()
    assert other.answer()
    assert package._drain._watcher._drains == []


def test_it_is_over_when_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    waiting = wait_for(gate)

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(package._drain, "_wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unsync.drain()
    assert package._drain._watcher._drains == []
    gate.set()
    waiting.result(PATIENCE)


def test_what_looks_for_calls_that_wait_for_ever_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Apart(weakref.WeakSet[Unfuture[Any]]):
        def add(self, call: Unfuture[Any]) -> None:
            super().add(call)
            added.set()

    def look(*_: object) -> bool:
        # The loop may come to it before who makes the call says that it is apart.
        assert added.wait(PATIENCE)
        names.extend(map(_backend.name_of_call, _common.apart))
        return True

    added = threading.Event()
    names: list[str | None] = []
    monkeypatch.setattr(_common, "apart", Apart())
    monkeypatch.setattr(_common, "_waits_for_ever", look)
    monkeypatch.setattr(_common, "LOOK_AGAIN_SECONDS", PATIENCE)
    assert _common.waits_for_ever(Unfuture, {}, [])
    assert names == ["waits_for_ever.<locals>.look"]


def test_not_in_the_ambient_thread() -> None:
    @unsync
    async def drain() -> None:
        with pytest.raises(
            RuntimeError, match=r"unsync.drain\(\) cannot be called in unsync.thread"
        ):
            unsync.drain()

    drain().result(PATIENCE)


def test_not_in_a_thread_of_a_pool() -> None:
    @unsync
    def drain() -> None:
        with pytest.raises(RuntimeError, match="a thread of a pool"):
            unsync.drain()

    drain().result(PATIENCE)


@pytest.mark.parametrize("chunksize", [None, 2])
def test_not_in_a_call_that_another_executor_makes(chunksize: int | None) -> None:
    class Other(concurrent.futures.Executor):
        """One whose threads nobody knows."""

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            return pool.submit(*args, **kwargs)

    def drain(_: object) -> None:
        with pytest.raises(RuntimeError, match="a thread of a pool"):
            unsync.drain()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for executor in (pool, Other()):
            marked = unsync(drain, executor=executor)
            marked(0).result(PATIENCE)
            for call in unsync.calls(marked, range(3), chunksize=chunksize):
                call.result(PATIENCE)


def test_not_where_an_event_loop_runs() -> None:
    done: list[int] = []

    async def main() -> bool:
        with pytest.raises(RuntimeError, match=r"await asyncio.to_thread\(unsync.drain, 2.5\)"):
            unsync.drain(2.5)
        unsync(done.append)(1)
        return await asyncio.to_thread(unsync.drain, PATIENCE)

    assert asyncio.run(main()) is True
    assert done == [1]


@pytest.mark.parametrize("method", [unsync.drain, unsync.shutdown, Unfuture().result])
@pytest.mark.parametrize(
    ("timeout", "error", "words"),
    [
        (float("nan"), ValueError, "a timeout is a number of seconds, not nan"),
        (10**400, ValueError, "a timeout is a number of seconds, and None is for ever"),
        ("1", TypeError, "a timeout is a number of seconds, not '1'"),
    ],
)
def test_a_timeout_that_is_no_number(
    method: Callable[[Any], object], timeout: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^{words}$"):
        method(timeout)


# A shutdown that drains.


@pytest.mark.parametrize("timeout", [None, PATIENCE, float("inf")])
def test_a_shutdown_that_drains_loses_nothing(
    timeout: float | None, make_pool: Callable[..., ThreadExecutor]
) -> None:
    done: list[int] = []

    @unsync
    async def record(number: int) -> None:
        await asyncio.sleep(0)
        unsync(done.append)(number)

    for number in range(50):
        record(number)
    assert unsync.shutdown(timeout, drain=True) is True
    assert sorted(done) == list(range(50))


def test_what_outlasts_a_shutdown_that_drains_is_cancelled_and_cleans_up() -> None:
    cleaned: list[Any] = []
    begun = threading.Event()

    @unsync
    async def hour() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            cleaned.append(1)

    call = hour()
    assert begun.wait(PATIENCE)
    assert unsync.shutdown(timeout=0.01, drain=True) is False
    assert call.cancelled()
    assert cleaned == [1]


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ((5,), "await asyncio.to_thread(unsync.shutdown, 5, drain=True)"),
        ((), "await asyncio.to_thread(unsync.shutdown, drain=True)"),
    ],
)
def test_a_shutdown_that_drains_not_where_an_event_loop_runs(
    arguments: tuple[float, ...], advice: str
) -> None:
    async def main() -> None:
        words = rf"^unsync\.shutdown\(\) would block .*`{re.escape(advice)}`$"
        with pytest.raises(RuntimeError, match=words):
            unsync.shutdown(*arguments, drain=True)

    asyncio.run(main())


def test_a_shutdown_that_drains_not_in_a_thread_of_a_pool() -> None:
    @unsync
    def shut_down() -> None:
        with pytest.raises(RuntimeError, match=r"^unsync\.shutdown\(\) .* a thread of a pool"):
            unsync.shutdown(1, drain=True)

    shut_down().result(PATIENCE)
