"""How an event loop hears from other threads: in batches, fairly, and with nothing lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.waiting import PATIENCE, InterruptedLoop, collect, running, wait_until

from unsync import ACCELERATED, Unfuture, unsync

CORE = "unsync._core" if ACCELERATED else "unsync._core_py"

InThread = Callable[[Callable[[], object]], threading.Thread]

pytestmark = pytest.mark.alone  # they count what happens in the ambient loop


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often other threads woke it in asyncio's own way, the only one that it knows."""

    wakeups = 0

    def add_reader(self, *args: object) -> None:
        raise NotImplementedError

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        self.wakeups += 1
        return super().call_soon_threadsafe(*args, **kwargs)


class Belfry:
    """A loop that keeps the mailbox's bell, which counts by itself how often it was rung."""

    bell = -1

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        if getattr(callback, "__name__", "") == "_on_bell":
            self.bell = fd
        super().add_reader(fd, callback, *args)  # type: ignore[misc]

    @property
    def wakeups(self) -> int:
        try:
            rung = os.eventfd_read(self.bell)
        except BlockingIOError:
            return 0
        os.eventfd_write(self.bell, rung)
        return rung


class CountingBellLoop(Belfry, asyncio.SelectorEventLoop):
    """asyncio's own."""


def counting_uvloop() -> asyncio.AbstractEventLoop:
    uvloop = pytest.importorskip("uvloop")
    return type("CountingUvloop", (Belfry, uvloop.Loop), {})()


needs_eventfd = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd here")


@contextmanager
def held(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """The loop is busy, in one callback, until the block ends."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        leave.wait(PATIENCE)

    loop.call_soon_threadsafe(hold)
    assert entered.wait(PATIENCE)
    try:
        yield
    finally:
        leave.set()


@pytest.fixture
def foreign() -> Iterator[CountingLoop]:
    """A loop that is none of unsync's, running in a thread of its own."""
    yield from running(CountingLoop())


def gathered_in(loop: asyncio.AbstractEventLoop, waiting: list[Unfuture[Any]]) -> Unfuture[Any]:
    """The results, gathered in that loop, where all are waited for when this returns."""
    parked = threading.Event()

    async def gather() -> list[Any]:
        async def wait(unfuture: Unfuture[Any]) -> Any:
            return await unfuture

        tasks = [asyncio.ensure_future(wait(unfuture)) for unfuture in waiting]
        await asyncio.sleep(0)
        parked.set()
        return await asyncio.gather(*tasks)

    results = Unfuture(asyncio.run_coroutine_threadsafe(gather(), loop))
    assert parked.wait(PATIENCE)
    return results


@unsync
async def give(value: int) -> int:
    return value


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that does not come for a long time is woken once all the same."""
    monkeypatch.setattr(f"{CORE}.WAKE_AGAIN_SECONDS", 1e6)


# One wakeup per burst.


@pytest.mark.usefixtures("fresh", "patient")
@pytest.mark.parametrize(
    "kind",
    [
        CountingLoop,
        pytest.param(CountingBellLoop, marks=needs_eventfd),
        pytest.param(counting_uvloop, marks=needs_eventfd),
    ],
)
def test_a_burst_of_calls_wakes_the_busy_loop_once(
    kind: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    unsync.loop_factory = kind
    loop: Any = unsync.loop
    for _ in range(2):  # and the next burst wakes it again
        with held(loop):
            before = loop.wakeups
            calls = [give(number) for number in range(1000)]
            assert loop.wakeups - before == 1
        assert [call.result(PATIENCE) for call in calls] == list(range(1000))


@pytest.mark.usefixtures("patient")
def test_a_burst_of_outcomes_wakes_a_busy_foreign_loop_once(foreign: CountingLoop) -> None:
    for _ in range(2):
        unfutures = [Unfuture[int]() for _ in range(1000)]
        results = gathered_in(foreign, unfutures)
        with held(foreign):
            before = foreign.wakeups
            for number, unfuture in enumerate(unfutures):
                unfuture.set_result(number)
            assert foreign.wakeups - before == 1
        assert results.result(PATIENCE) == list(range(1000))


@pytest.mark.usefixtures("patient")
def test_awaiters_callbacks_and_calls_share_the_wakeup(foreign: CountingLoop) -> None:
    """A foreign loop has one box for all that waits in it, whatever it waits for."""
    called = threading.Event()
    unfutures = [Unfuture[int]() for _ in range(2)]
    results = gathered_in(foreign, unfutures)
    added = threading.Event()

    def add() -> None:
        unfutures[1].add_done_callback(lambda _: called.set())
        added.set()

    foreign.call_soon_threadsafe(add)
    assert added.wait(PATIENCE)
    with held(foreign):
        before = foreign.wakeups
        for unfuture in unfutures:
            unfuture.set_result(1)
        assert foreign.wakeups - before == 1
    assert results.result(PATIENCE) == [1, 1]
    assert called.wait(PATIENCE)


@pytest.mark.usefixtures("fresh")
def test_calls_in_the_loops_own_thread_wake_nobody() -> None:
    unsync.loop_factory = CountingLoop
    loop = unsync.loop

    @unsync
    async def main() -> int:
        await asyncio.sleep(0)  # from here on the box is empty, and nobody looks into it
        before = loop.wakeups
        await asyncio.gather(*[give(number) for number in range(100)])
        return loop.wakeups - before

    assert main().result(PATIENCE) == 0


# Fairness.


def test_a_burst_does_not_starve_the_loop() -> None:
    loop = unsync.loop
    turns: Counter[str] = Counter()

    def turn(kind: str, again: Callable[..., object]) -> None:
        turns[kind] += 1
        if not calls[-1].done():
            again(turn, kind, again)

    with held(loop):
        calls = [give(number) for number in range(50_000)]
        for kind, again in ("call_soon", loop.call_soon), ("timer", partial(loop.call_later, 0)):
            loop.call_soon_threadsafe(turn, kind, again)
    assert [call.result(PATIENCE) for call in calls] == list(range(50_000))
    # A drain without an end would let each have its first turn, and then its last.
    assert turns["call_soon"] > 3
    assert turns["timer"] > 3


@pytest.mark.usefixtures("patient")  # without a bell, each wakeup is a drain of its own
@pytest.mark.parametrize(
    ("step", "at_a_time"),
    [
        pytest.param(0.000021, 128, id="short steps, two milliseconds"),
        pytest.param(0.00009, 112, id="longer steps, ten milliseconds"),
        pytest.param(0.001, 16, id="long steps, ten milliseconds at the next look at the clock"),
    ],
)
def test_a_turn_of_the_loop_begins_calls_for_so_long(
    monkeypatch: pytest.MonkeyPatch, step: float, at_a_time: int
) -> None:
    now = 0.0
    begun = 0
    between_turns: list[int] = []
    ended = threading.Event()

    @unsync
    async def begin() -> None:
        nonlocal now, begun
        now += step
        begun += 1

    def turn() -> None:
        between_turns.append(begun - sum(between_turns))
        if begun < len(calls):
            loop.call_soon(turn)
        else:
            ended.set()

    loop = unsync.loop
    with held(loop):
        calls = [begin() for _ in range(2 * at_a_time)]
        loop.call_soon_threadsafe(turn)
        monkeypatch.setattr(f"{CORE}.monotonic", lambda: now)
    assert ended.wait(PATIENCE)
    assert [number for number in between_turns if number] == [at_a_time] * 2


def test_calls_that_make_calls_do_not_starve_the_loop() -> None:
    """The box is never empty here: each call puts the next one in."""
    stop = False

    @unsync
    async def endless() -> None:
        if not stop:
            endless()

    def end() -> None:
        nonlocal stop
        stop = True
        ended.set()

    ended = threading.Event()
    endless()
    try:
        unsync.loop.call_soon_threadsafe(end)
        assert ended.wait(PATIENCE)
    finally:
        stop = True


# Nothing is lost.


def test_what_is_posted_while_the_box_is_emptied_is_picked_up() -> None:
    ended = threading.Event()

    @unsync
    async def countdown(number: int) -> None:
        if number:
            countdown(number - 1)
        else:
            ended.set()

    with held(unsync.loop):
        for _ in range(10):
            give(1)
        countdown(1000)
    assert ended.wait(PATIENCE)


def test_single_posts_find_the_loop_going_to_sleep_and_wake_it() -> None:
    for number in range(500):
        assert give(number).result(PATIENCE) == number


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_resumed_task_that_raises_an_exit_does_not_lose_the_others(
    kind: type[BaseException],
) -> None:
    thread = unsync.thread
    gate = Unfuture[int]()
    parked: list[int] = []

    @unsync
    async def wait(number: int) -> int:
        parked.append(number)
        await gate
        if number % 2:
            raise kind("leaving")
        return number

    waiting = [wait(number) for number in range(9)]
    give(1).result(PATIENCE)
    give(1).result(PATIENCE)
    assert len(parked) == 9
    with held(unsync.loop):
        gate.set_result(1)  # all nine are in the box at once
    for number, unfuture in enumerate(waiting):
        if number % 2:
            with pytest.raises(kind, match="leaving"):
                unfuture.result(PATIENCE)
        else:
            assert unfuture.result(PATIENCE) == number
    assert unsync.thread is thread


def test_a_first_step_that_raises_an_exit_does_not_lose_the_others() -> None:
    @unsync
    async def leave() -> None:
        raise KeyboardInterrupt("leaving")

    with held(unsync.loop):
        first, leaving, last = give(1), leave(), give(2)
    with pytest.raises(KeyboardInterrupt, match="leaving"):
        leaving.result(PATIENCE)
    assert (first.result(PATIENCE), last.result(PATIENCE)) == (1, 2)


def test_an_exit_in_a_foreign_loop_does_not_lose_the_others() -> None:
    loop = asyncio.new_event_loop()
    gate = Unfuture[int]()

    async def wait(number: int) -> int:
        await gate
        if number == 1:
            raise KeyboardInterrupt("leaving")
        return number

    tasks = [loop.create_task(wait(number)) for number in range(3)]
    loop.run_until_complete(asyncio.sleep(0))
    gate.set_result(1)
    with pytest.raises(KeyboardInterrupt, match="leaving"):
        loop.run_until_complete(asyncio.wait_for(tasks[2], PATIENCE))
    assert loop.run_until_complete(asyncio.wait_for(tasks[2], PATIENCE)) == 2
    assert isinstance(tasks[1].exception(), KeyboardInterrupt)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def test_a_waiter_that_cannot_be_told_does_not_lose_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A loop that refuses to be woken, though it is not closed, is that loop's trouble only."""

    class Refusing(asyncio.SelectorEventLoop):
        refuses = False

        def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
            if self.refuses:
                raise RuntimeError("not now")
            return super().call_soon_threadsafe(*args, **kwargs)

    unfuture = Unfuture[int]()
    loop = Refusing()
    calls: list[str] = []

    async def add() -> None:
        unfuture.add_done_callback(lambda _: calls.append("in its loop"))

    unfuture.add_done_callback(lambda _: calls.append("before"))
    loop.run_until_complete(add())
    unfuture.add_done_callback(lambda _: calls.append("after"))
    loop.refuses = True
    unfuture.set_result(1)
    loop.close()
    assert calls == ["before", "after"]
    assert "not now" in caplog.text


@pytest.mark.usefixtures("fresh")
def test_a_wakeup_that_fails_does_not_make_the_loop_deaf() -> None:
    """Ctrl-C may come at any moment: then, too."""

    class Interrupted(InterruptedLoop, CountingLoop):
        pass

    unsync.loop_factory = Interrupted
    loop: Any = unsync.loop
    with held(loop):
        loop.interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            give(1)
    assert give(2).result(PATIENCE / 4) == 2


@pytest.mark.usefixtures("fresh", "patient")
def test_after_wakeups_that_all_fail_whoever_comes_next_wakes_the_loop() -> None:
    """It was tried again at once, in vain, and nobody else is coming."""

    class Refusing(CountingLoop):
        refuses = False

        def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
            if self.refuses:
                raise KeyboardInterrupt
            return super().call_soon_threadsafe(*args, **kwargs)

    unsync.loop_factory = Refusing
    loop: Any = unsync.loop
    came: list[int] = []

    @unsync
    async def come(number: int) -> None:
        came.append(number)

    loop.refuses = True
    with pytest.raises(KeyboardInterrupt):
        come(1)
    loop.refuses = False
    # In another thread: what interrupts this one before it has rung may ring in its place.
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        other.submit(lambda: come(2).result(PATIENCE)).result()
    assert came == [1, 2]


@pytest.mark.usefixtures("fresh")
def test_an_interrupt_at_the_beginning_of_a_drain_loses_nothing() -> None:
    """A loop's own function may be interrupted as well."""

    class Interrupted(asyncio.SelectorEventLoop):
        interrupts = 0

        def get_debug(self) -> bool:
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            return super().get_debug()

    unsync.loop_factory = Interrupted
    loop: Any = unsync.loop
    with held(loop):
        calls = [give(number) for number in range(3)]
        loop.interrupts = 1
    assert [call.result(PATIENCE) for call in calls] == [0, 1, 2]


# A wakeup that is lost.


class LossyLoop(asyncio.SelectorEventLoop):
    """Does not hear of some of the wakeups that other threads give it, as on a faulty platform."""

    loses: Callable[[], bool] = staticmethod(lambda: False)
    has_readers = True

    def _write_to_self(self) -> None:
        if not self.loses():
            super()._write_to_self()

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        if getattr(callback, "__name__", "") != "_on_bell":
            super().add_reader(fd, callback, *args)
        elif not self.has_readers:
            raise NotImplementedError
        else:
            super().add_reader(fd, self._hear, fd, callback)

    def _hear(self, bell: int, on_bell: Callable[[], None]) -> None:
        if self.loses():
            os.eventfd_read(bell)
        else:
            on_bell()


class LossyLoopWithoutBell(LossyLoop):
    has_readers = False


LOSSY = [pytest.param(LossyLoop, marks=needs_eventfd), LossyLoopWithoutBell]


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait look after few milliseconds whether a wakeup was lost."""
    for module in CORE, "unsync._common", "unsync._ambient":
        monkeypatch.setattr(f"{module}.LOOK_AGAIN_SECONDS", 0.002)
    monkeypatch.setattr(f"{CORE}.WAKE_AGAIN_SECONDS", 0.001)


def loses(count: int) -> Callable[[], bool]:
    """So many are lost, and no more."""
    lost: list[None] = []

    def lose() -> bool:
        if len(lost) == count:
            return False
        lost.append(None)
        return True

    return lose


@pytest.mark.usefixtures("fresh", "looks_often")
@pytest.mark.parametrize("kind", LOSSY)
def test_wakeups_that_are_lost_at_random_lose_nothing(
    kind: type[LossyLoop], in_thread: InThread
) -> None:
    unsync.loop_factory = kind
    loop: Any = unsync.loop
    chance = random.Random(25)
    loop.loses = lambda: chance.random() < 0.5
    results: list[list[int]] = []

    @unsync
    def double(number: int) -> int:
        return 2 * number

    @unsync
    async def through_a_thread(number: int) -> int:
        return await double(number)

    def one_by_one() -> None:
        results.append([give(number).result() for number in range(50)])

    def in_bursts() -> None:
        calls = [give(number).map(give) for number in range(50)]
        results.append([call.result(PATIENCE) for call in calls])

    def in_a_worker() -> None:
        ask = unsync(lambda number: give(number).result())
        results.append([ask(number).result() for number in range(50)])

    def awaited() -> None:
        results.append([through_a_thread(number).result() // 2 for number in range(50)])

    threads = [in_thread(work) for work in (one_by_one, in_bursts, in_a_worker, awaited)]
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert results == [[*range(50)]] * 4
    assert unsync.shutdown()


@pytest.mark.usefixtures("fresh", "looks_often")
@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize(
    "wait",
    [
        Unfuture.result,
        Unfuture.exception,
        lambda call: call.result(PATIENCE),
        lambda call: unsync(call.result)().result(),
        lambda call: call.concurrent_future.result(),
        lambda call: concurrent.futures.wait([call]),
        lambda call: concurrent.futures.wait([call], PATIENCE),
        lambda call: [*concurrent.futures.as_completed([call])],
    ],
    ids=["result", "exception", "timeout", "worker", "view", "wait", "wait-timeout", "completed"],
)
def test_a_thread_that_waits_makes_up_for_a_lost_wakeup(
    kind: type[LossyLoop], wait: Callable[[Unfuture[int]], object]
) -> None:
    unsync.loop_factory = kind
    loop: Any = unsync.loop
    give(1).result(PATIENCE)
    loop.loses = loses(2)
    call = give(2)
    wait(call)
    loop.loses = loses(0)
    assert call.done()
    assert call.result(0) == 2


@pytest.mark.usefixtures("fresh", "looks_often")
def test_a_shutdown_whose_wakeup_is_lost_ends() -> None:
    for timeout in None, PATIENCE:
        unsync.loop_factory = LossyLoop
        loop: Any = unsync.loop
        give(1).result(PATIENCE)
        loop.loses = loses(2)
        assert unsync.shutdown(timeout)


def test_who_leaves_more_for_a_loop_looks_whether_it_comes(
    foreign: CountingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the 2nd, 4th, 8th thing and so on, if it was woken more than 100 ms ago."""
    now = 1.0
    unfutures = [Unfuture[int]() for _ in range(64)]
    results = gathered_in(foreign, unfutures)
    woken: list[int] = []
    with held(foreign):
        monkeypatch.setattr(f"{CORE}.monotonic", lambda: now)
        foreign.wakeups = 0
        for number, unfuture in enumerate(unfutures, 1):
            if number in (2, 5, 9, 17):  # by the 2nd, half the time has passed; by the 8th, all
                now += 0.06
            before = foreign.wakeups
            unfuture.set_result(number)
            if foreign.wakeups > before:
                woken.append(number)
    assert woken == [1, 8, 32]
    assert results.result(PATIENCE) == [*range(1, 65)]


@pytest.mark.usefixtures("fresh")
def test_the_lag_is_counted_from_the_first_wakeup(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1.0
    unsync.loop_factory = CountingLoop
    loop: Any = unsync.loop
    with held(loop):
        monkeypatch.setattr(f"{CORE}.monotonic", lambda: now)
        before = loop.wakeups
        calls = [give(1)]
        now += 0.2
        calls.append(give(2))
        assert loop.wakeups - before == 2
        now += 0.3
        assert unsync.stats().loop_lag == pytest.approx(0.5)
    assert [call.result(PATIENCE) for call in calls] == [1, 2]
    assert unsync.stats().loop_lag == pytest.approx(0.5)


# A closed loop's items are abandoned.


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
        collect()
    assert [str(warning.message) for warning in seen] == []


@pytest.mark.usefixtures("fresh")
def test_what_waits_behind_a_blocked_loop_is_cancelled_at_shutdown() -> None:
    begun: list[int] = []

    @unsync
    async def begin(number: int) -> None:
        begun.append(number)

    loop, thread = unsync.loop, unsync.thread
    with no_warnings():
        with held(loop):
            calls = [begin(number) for number in range(100)]
            continued = Unfuture.from_value(1).map(begun.append)
            assert not unsync.shutdown(timeout=0)
            for unfuture in (*calls, continued):
                assert unfuture.cancelled()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        calls.clear()
    assert begun == []


@pytest.mark.usefixtures("fresh")
def test_shutdown_leaves_no_call_without_an_outcome() -> None:
    with no_warnings():
        with held(unsync.loop):
            calls = [give(number) for number in range(20_000)]
            ending = threading.Thread(target=unsync.shutdown, args=(PATIENCE,))
            ending.start()
        ending.join(2 * PATIENCE)
        assert not ending.is_alive()
        assert all(call.done() for call in calls)
        calls.clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("kept", [True, False])
def test_a_call_that_comes_too_late_for_the_loop_is_cancelled(kept: bool) -> None:
    loops = [unsync.loop] if kept else []
    begun: list[int] = []

    async def begin() -> None:
        begun.append(1)

    def shut_down_in_between() -> Any:
        assert unsync.shutdown(PATIENCE)
        collect()
        return begin()

    # It says that it is a coroutine function, as compiled ones do.
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(shut_down_in_between)
    else:
        shut_down_in_between._is_coroutine = asyncio.coroutines._is_coroutine
    with no_warnings():
        assert unsync(shut_down_in_between)().cancelled()
    assert begun == []
    assert all(loop.is_closed() for loop in loops)
    assert give(1).result(PATIENCE) == 1


def add_callback(unfuture: Unfuture[int], seen: list[object]) -> None:
    unfuture.add_done_callback(seen.append)


def add_awaiter(unfuture: Unfuture[int], seen: list[object]) -> None:
    async def wait() -> None:
        seen.append(await unfuture)

    task = asyncio.ensure_future(wait())
    unfuture.add_done_callback(lambda _: task)  # asyncio itself would forget it


@pytest.mark.parametrize("add", [add_callback, add_awaiter])
@pytest.mark.parametrize("closed_before", [True, False])
def test_what_waits_in_a_closed_loop_is_dropped_without_noise(
    add: Callable[[Unfuture[int], list[object]], None],
    closed_before: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "unsync")
    seen: list[object] = []
    unfuture = Unfuture[int]()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # of a task that is destroyed while it waits

    async def main() -> None:
        add(unfuture, seen)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    loop.run_until_complete(main())
    if closed_before:
        loop.close()
        unfuture.set_result(1)
        assert "loop is closed" in caplog.text
        assert "loop of a task that awaited it is closed" in caplog.text or add is add_callback
    else:
        unfuture.set_result(1)  # the loop was told, but never gets to look
        loop.close()
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert seen == []
    assert unfuture.result(0) == 1


# The bell.


def open_descriptors() -> int:
    collect()
    return len(os.listdir("/proc/self/fd"))


class NoReaders(asyncio.SelectorEventLoop):
    """As asyncio's Proactor loop is."""

    error: type[Exception] = NotImplementedError

    def add_reader(self, *args: object) -> None:
        raise self.error

    def remove_reader(self, *args: object) -> bool:
        raise self.error


def uvloops_own() -> asyncio.AbstractEventLoop:
    return pytest.importorskip("uvloop").new_event_loop()


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of descriptors here")
@pytest.mark.parametrize("factory", [None, uvloops_own, NoReaders])
def test_starts_and_ends_leak_no_descriptor(
    factory: Callable[[], asyncio.AbstractEventLoop] | None,
) -> None:
    unsync.loop_factory = factory
    seen = []
    for _ in range(20):
        assert give(1).result(PATIENCE) == 1
        assert unsync.shutdown(PATIENCE)
        seen.append(open_descriptors())
    assert len(set(seen[1:])) == 1


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of descriptors here")
def test_starts_that_fail_leak_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            give(1)
    assert open_descriptors() == before
    assert give(1).result(PATIENCE) == 1


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("error", [NotImplementedError, PermissionError, ValueError])
def test_a_loop_that_takes_no_reader_hears_of_everything(error: type[Exception]) -> None:
    unsync.loop_factory = type("Loop", (NoReaders,), {"error": error})
    gate = Unfuture[int]()

    @unsync
    async def wait() -> int:
        return await gate + await give(1)

    @unsync
    async def wait_for_ever() -> None:
        await Unfuture()

    for _ in range(2):  # and after a shutdown as well
        for number in range(50):
            assert give(number).result(PATIENCE) == number
        calls = [give(number) for number in range(1000)]
        assert [call.result(PATIENCE) for call in calls] == list(range(1000))
        assert Unfuture.from_value(1).map(str).result(PATIENCE) == "1"
        waiting, endless = wait(), wait_for_ever()
        give(1).result(PATIENCE)
        if not gate.done():
            gate.set_result(1)
        assert waiting.result(PATIENCE) == 2
        assert unsync.shutdown(PATIENCE)
        assert endless.cancelled()


@needs_eventfd
@pytest.mark.usefixtures("fresh", "patient")
@pytest.mark.parametrize("kind", [CountingBellLoop, counting_uvloop])
def test_the_bell_is_still_when_the_calls_begin(
    kind: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A loop with a bell that goes on ringing would never sleep."""
    unsync.loop_factory = kind
    loop: Any = unsync.loop

    @unsync
    async def listen() -> Any:
        return loop.wakeups

    assert [listen().result(PATIENCE) for _ in range(10)] == [0] * 10
    with held(loop):
        calls = [listen() for _ in range(10)]
        assert loop.wakeups == 1
    assert [call.result(PATIENCE) for call in calls] == [0] * 10


@pytest.mark.usefixtures("fresh")
def test_uvloop_hears_of_everything() -> None:
    unsync.loop_factory = uvloops_own

    @unsync
    def work(number: int) -> int:
        return number

    @unsync
    async def main() -> list[int]:
        one_by_one = [await give(number) + await work(number) for number in range(50)]
        return one_by_one + await asyncio.gather(*[give(n) for n in range(500)], *map(work, (1, 2)))

    for _ in range(2):  # and after a shutdown as well
        for number in range(100):
            assert give(number).result(PATIENCE) == number
        calls = [give(number) for number in range(5000)]
        assert [call.result(PATIENCE) for call in calls] == list(range(5000))
        assert main().result(PATIENCE) == [*range(0, 100, 2), *range(500), 1, 2]
        assert work(1).map(give).result(PATIENCE) == 1
        assert unsync.shutdown(PATIENCE)


class Trespassed:
    """Files that take the numbers of descriptors just closed, and that nobody should write to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> list[int]:
        self._files = [
            os.open(self._folder / f"{number}", os.O_RDWR | os.O_CREAT, 0o600)
            for number in range(16)
        ]
        return self._files

    def __exit__(self, *_: object) -> None:
        sizes = [os.fstat(file).st_size for file in self._files]
        for file in self._files:
            os.close(file)
        assert sizes == [0] * len(sizes)


@needs_eventfd
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("kind", [CountingBellLoop, counting_uvloop])
def test_a_bell_that_is_gone_is_not_rung(
    kind: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    unsync.loop_factory = kind
    loop: Any = unsync.loop  # kept: its mailbox has no other way to know that it is closed
    gate = Unfuture[int]()

    @unsync
    async def add() -> None:
        gate.add_done_callback(lambda _: None)

    async def never() -> None:
        raise AssertionError("it has begun")

    add().result(PATIENCE)
    trespassed = Trespassed(tmp_path)

    def shut_down_in_between() -> Any:
        assert unsync.shutdown(PATIENCE)
        assert loop.bell in trespassed.__enter__()
        return never()

    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(shut_down_in_between)
    else:
        shut_down_in_between._is_coroutine = asyncio.coroutines._is_coroutine
    assert unsync(shut_down_in_between)().cancelled()
    gate.set_result(1)
    trespassed.__exit__()


@pytest.mark.usefixtures("fresh")
@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are numbered otherwise")
def test_calls_that_race_with_shutdowns_end_and_write_to_no_file(
    in_thread: InThread, tmp_path: Path
) -> None:
    stop = threading.Event()
    counts: list[Counter[str]] = []  # one of each thread's own
    ended: list[int] = []

    def right() -> int:
        return sum(outcomes["right"] for outcomes in counts)

    def outcome(unfuture: Unfuture[int], expected: int) -> str:
        try:
            return "right" if unfuture.result(PATIENCE) == expected else "wrong"
        except concurrent.futures.CancelledError:
            return "cancelled"
        except BaseException as exc:
            return repr(exc)

    def call_one_by_one() -> None:
        number = 0
        counts.append(outcomes := Counter())
        while not stop.is_set():
            number += 1
            outcomes[outcome(give(number), number)] += 1
        ended.append(number)

    def call_in_bursts() -> None:
        total = 0
        counts.append(outcomes := Counter())
        while not stop.is_set():
            calls = [give(number).map(give) for number in range(50)]
            outcomes.update(map(outcome, calls, range(50)))
            total += 50
        ended.append(total)

    threads = [in_thread(call) for call in (call_one_by_one, call_in_bursts) * 2]
    try:
        for _ in range(40):
            before = right()
            wait_until(lambda before=before: right() > before + 20 or stop.is_set())
            assert unsync.shutdown(PATIENCE)
            with Trespassed(tmp_path):
                wait_until(lambda before=before: right() > before + 40 or stop.is_set())
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert len(ended) == 4
    outcomes = sum(counts, Counter[str]())
    assert set(outcomes) <= {"right", "cancelled"}
    assert sum(outcomes.values()) == sum(ended)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("factory", ["None", "uvloop.new_event_loop"])
def test_a_childs_calls_and_its_parents_do_not_wake_each_other(
    factory: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A fork shares the descriptors: the bell, and the loop's own list of its readers."""
    if "uvloop" in factory:
        pytest.importorskip("uvloop")
    program = f"""
        import os, signal, threading
        from unsync import Unfuture, unsync
        if "uvloop" in "{factory}":
            import uvloop
        unsync.loop_factory = {factory}

        @unsync
        async def give(value):
            return value

        @unsync
        async def wait():
            return await gate

        def use():
            for number in range(100):
                assert give(number).result(60) == number
            calls = [give(number).map(give) for number in range(100)]
            assert [call.result(60) for call in calls] == list(range(100))

        def hold():
            entered.set()
            leave.wait(60)

        gate, entered, leave = Unfuture(), threading.Event(), threading.Event()
        waiting = wait()
        use()
        unsync.loop.call_soon_threadsafe(hold)
        entered.wait(60)
        calls = [give(number) for number in range(100)]  # the bell has been rung
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            status = 1
            try:
                gate.set_result("the child's")
                for _ in range(3):
                    use()
                    assert unsync.shutdown(60)
                status = 0
            finally:
                os._exit(status)
        print(os.waitpid(pid, 0)[1])
        leave.set()
        print([call.result(60) for call in calls] == list(range(100)))
        use()
        print(waiting.done())
        gate.set_result("the parent's")
        print(waiting.result(60), unsync.shutdown(60))
    """
    done = run_python(program, "-W", "ignore:This process:DeprecationWarning")
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["0", "True", "False", "the parent's True"]
