"""When an Unfuture ends: who is told, in which order, and that all are, whatever is raised."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib.util
import itertools
import logging
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE, collect, running, wait_until

from unsync import ACCELERATED, Unfuture, unsync
from unsync.executors import ThreadExecutor

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


class Boom(Exception):
    pass


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    yield from running(asyncio.new_event_loop())


@pytest.fixture
def refusing_log() -> Iterator[None]:
    """No error may be logged, as in some test suites."""

    class Strict(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise AssertionError(record.getMessage())

    handler = Strict()
    logger = logging.getLogger("unsync")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def awaiting(loop: asyncio.AbstractEventLoop, unfuture: Unfuture[Any]) -> Any:
    """The future of a task of that loop that awaits it, and does so by now."""
    begun = threading.Event()

    async def wait() -> Any:
        asyncio.get_running_loop().call_soon(begun.set)
        return await unfuture

    future = asyncio.run_coroutine_threadsafe(wait(), loop)
    assert begun.wait(PATIENCE)
    return future


# In which order.


@pytest.mark.parametrize("finisher", ["a thread", "a worker", "the ambient loop"])
def test_who_waits_is_told_before_callbacks_are_called(
    finisher: str, loop: asyncio.AbstractEventLoop, in_thread: Any
) -> None:
    """Each waits for the same Unfuture, and the callback waits for each of them."""
    gate = threading.Event()
    opened: Unfuture[None] = Unfuture()
    told: list[str] = []

    def work() -> int:
        return int(gate.wait(PATIENCE))

    if finisher == "a thread":
        unfuture: Unfuture[int] = Unfuture()
    elif finisher == "a worker":
        unfuture = unsync(work)()
    else:

        async def wait() -> int:
            await opened
            return 1

        unfuture = unsync(wait)()
    everybody_told = threading.Event()

    def callback(_: object) -> None:
        if everybody_told.wait(PATIENCE):
            told.append("callback")

    unfuture.add_done_callback(callback)
    thread = in_thread(lambda: told.append(f"thread {unfuture.result(PATIENCE)}"))
    task = awaiting(loop, unfuture)
    mirrored = Unfuture(unfuture)
    follower = in_thread(lambda: told.append(f"follower {mirrored.result(PATIENCE)}"))
    view = unfuture.concurrent_future
    viewer = in_thread(lambda: told.append(f"view {view.result(PATIENCE)}"))
    if finisher == "a thread":
        finishing = in_thread(lambda: unfuture.set_result(1))
    gate.set()
    opened.set_result(None)
    for waiting in thread, follower, viewer:
        waiting.join(PATIENCE)
    assert task.result(PATIENCE) == 1
    assert sorted(told) == ["follower 1", "thread 1", "view 1"]
    everybody_told.set()
    wait_until(lambda: "callback" in told)
    if finisher == "a thread":
        finishing.join(PATIENCE)


def test_continuations_go_on_before_callbacks_are_called(in_thread: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[Any] = []
    unfuture.add_done_callback(lambda _: found.append(mapped.result(PATIENCE)))
    mapped: Unfuture[str] = unfuture.map(str)
    in_thread(lambda: unfuture.set_result(1)).join(PATIENCE)
    assert found == ["1"]


def test_callbacks_of_followers_come_after_all_who_wait() -> None:
    unfuture: Unfuture[int] = Unfuture()
    first, second = Unfuture(unfuture), Unfuture(unfuture)
    found: list[Any] = []
    first.add_done_callback(lambda _: found.append(("first", second.done())))
    second.add_done_callback(lambda _: found.append(("second", first.done())))
    unfuture.add_done_callback(lambda _: found.append(("source", first.done() and second.done())))
    unfuture.set_result(1)
    assert sorted(found) == [("first", True), ("second", True), ("source", True)]


def test_callbacks_are_called_in_their_order_whoever_waits_between_them() -> None:
    unfuture: Unfuture[int] = Unfuture()
    calls: list[int] = []
    for number in range(5):
        unfuture.add_done_callback(lambda _, number=number: calls.append(number))  # type: ignore[misc]
        unfuture.map(str)
    unfuture.set_result(1)
    assert calls == list(range(5))


def test_a_view_is_done_before_callbacks_are_called() -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[bool] = []
    unfuture.add_done_callback(lambda _: found.append(view.done()))
    view = unfuture.concurrent_future
    unfuture.set_result(1)
    assert found == [True]


def test_a_views_callbacks_come_after_whoever_waits(in_thread: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[int] = []
    gate = threading.Event()
    view = unfuture.concurrent_future
    view.add_done_callback(lambda _: found.append(1 + gate.wait(PATIENCE)))
    waiting = in_thread(lambda: found.append(unfuture.result(PATIENCE)))
    finishing = in_thread(lambda: unfuture.set_result(1))
    waiting.join(PATIENCE)
    assert found == [1]
    gate.set()
    finishing.join(PATIENCE)
    assert found == [1, 2]


# Within each other.

LINKS = 100_000
KINDS: dict[str, Callable[[Unfuture[Any]], Callable[[Unfuture[Any]], object]]] = {
    "cancel": lambda following: following.cancel,
    "set_value": lambda following: functools.partial(Unfuture.set_value, following),
    "set_result": lambda following: following.set_result,
}


def make_chain(kind: str) -> list[Unfuture[Any]]:
    chain: list[Unfuture[Any]] = [Unfuture() for _ in range(LINKS)]
    for unfuture, following in itertools.pairwise(chain):
        unfuture.add_done_callback(KINDS[kind](following))
    return chain


def finish_chain(kind: str, chain: list[Unfuture[Any]]) -> None:
    if kind == "cancel":
        chain[0].cancel()
    else:
        chain[0].set_result(None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_callbacks_is_as_long_as_one_likes(kind: str) -> None:
    chain = make_chain(kind)
    finish_chain(kind, chain)
    assert all(unfuture.done() for unfuture in chain)


@pytest.mark.alone  # how large stacks are is set for all threads
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_callbacks_needs_little_stack(kind: str) -> None:
    # Python 3.13 needs more stack to free what is nested so deeply, be it a list, so not in there.
    chain = make_chain(kind)
    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=finish_chain, args=(kind, chain))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join(PATIENCE)
    assert all(unfuture.done() for unfuture in chain)


def test_up_to_32_within_each_other_are_called_before_set_result_returns() -> None:
    links = 32
    chain: list[Unfuture[int]] = [Unfuture() for _ in range(links)]
    returned: list[int] = []

    def go_on(number: int, _: object) -> None:
        if number + 1 < links:
            chain[number + 1].set_result(1)
            assert all(unfuture.done() for unfuture in chain)
        returned.append(number)

    for number, unfuture in enumerate(chain):
        unfuture.add_done_callback(functools.partial(go_on, number))
    chain[0].set_result(1)
    assert returned == list(reversed(range(links)))


def test_those_that_are_too_deep_are_called_before_the_outermost_returns() -> None:
    links = 100
    chain: list[Unfuture[int]] = [Unfuture() for _ in range(links)]
    called: list[int] = []

    def go_on(number: int, _: object) -> None:
        called.append(number)
        if number + 1 < links:
            chain[number + 1].set_result(1)

    for number, unfuture in enumerate(chain):
        unfuture.add_done_callback(functools.partial(go_on, number))
    chain[0].set_result(1)
    assert called == list(range(links))


def test_who_waits_is_told_at_once_however_deep(in_thread: Any) -> None:
    """Only callbacks are put off: whoever waits for the last link is told before they are."""
    links = 50
    chain: list[Unfuture[int]] = [Unfuture() for _ in range(links)]
    told: list[int] = []

    def go_on(number: int, _: object) -> None:
        if number + 1 < links:
            chain[number + 1].set_result(number)
            told.append(chain[number + 1].map(abs).result(PATIENCE))

    for number, unfuture in enumerate(chain):
        unfuture.add_done_callback(functools.partial(go_on, number))
    in_thread(lambda: chain[0].set_result(1)).join(PATIENCE)
    assert sorted(told) == list(range(links - 1))


def test_a_callback_added_too_deep_to_a_finished_one_is_called_in_its_turn() -> None:
    called: list[int] = []

    def add(number: int, _: object = None) -> None:
        if number < 1000:
            Unfuture.from_value(1).add_done_callback(functools.partial(add, number + 1))
        called.append(number)

    add(0)
    assert sorted(called) == list(range(1001))


# Whatever is raised.


def raising(kind: type[BaseException]) -> Callable[[object], None]:
    def bad(_: object) -> None:
        raise kind

    return bad


def finish(unfuture: Unfuture[Any], by: str) -> None:
    if by == "set_result":
        unfuture.set_result(42)
    elif by == "set_exception":
        unfuture.set_exception(Boom())
        unfuture.exception()
    elif by == "cancel":
        unfuture.cancel()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("by", ["set_result", "set_exception", "cancel"])
def test_an_interrupt_goes_on_to_who_finished_it_when_all_were_told(
    by: str, kind: type[BaseException], in_thread: Any, loop: asyncio.AbstractEventLoop
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    waited_for: list[Any] = [unfuture]
    calls: list[object] = []
    unfuture.add_done_callback(calls.append)
    unfuture.add_done_callback(raising(kind))
    unfuture.add_done_callback(raising(kind))
    unfuture.add_done_callback(calls.append)
    mirrored = Unfuture(unfuture)
    mirrored.add_done_callback(calls.append)
    waiting = in_thread(lambda: concurrent.futures.wait(waited_for, PATIENCE))
    task = awaiting(loop, mirrored)
    with pytest.raises(kind):
        finish(unfuture, by)
    assert len(calls) == 3
    waiting.join(PATIENCE)
    concurrent.futures.wait([task], PATIENCE)
    assert task.done()
    if by == "set_exception":
        mirrored.exception()
        task.exception()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_on_to_who_adds_a_callback_to_a_finished_one(
    kind: type[BaseException],
) -> None:
    with pytest.raises(kind):
        Unfuture.from_value(1).add_done_callback(raising(kind))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_goes_on_to_who_cancels_a_continuation_and_its_source_is_cancelled(
    kind: type[BaseException],
) -> None:
    source: Unfuture[int] = Unfuture()
    target = source.map(abs)
    target.add_done_callback(raising(kind))
    with pytest.raises(kind):
        target.cancel()
    assert source.cancelled()
    assert target.cancelled()


def check_goes_on(executor: ThreadExecutor, kind: type[BaseException]) -> None:
    """Its only worker does, after a callback that raised."""
    gate = threading.Event()
    first = executor.submit(gate.wait, PATIENCE)
    first.add_done_callback(raising(kind))
    gate.set()
    assert first.result(PATIENCE)
    worker = executor.submit(threading.get_ident).result(PATIENCE)
    assert executor.submit(threading.get_ident).result(PATIENCE) == worker


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_in_a_worker_it_is_logged_and_the_worker_goes_on(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadExecutor(1) as executor:
        check_goes_on(executor, kind)
        # A function of the worker may finish another one.
        unfuture: Unfuture[int] = Unfuture()
        unfuture.add_done_callback(raising(kind))
        assert executor.submit(unfuture.set_result, 1).result(PATIENCE) is None
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert logged == [kind, kind]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_in_the_ambient_loop_it_is_logged_and_the_loop_goes_on(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    thread = unsync.thread
    opened: Unfuture[None] = Unfuture()

    @unsync
    async def work() -> None:
        await opened

    first = work()
    first.add_done_callback(raising(kind))
    opened.set_result(None)
    first.result(PATIENCE)
    unfuture: Unfuture[int] = Unfuture()
    unfuture.add_done_callback(raising(kind))

    @unsync
    async def finish_other() -> None:
        unfuture.set_result(1)

    assert finish_other().result(PATIENCE) is None
    assert unsync.thread is thread
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert logged == [kind, kind]


def test_in_the_thread_of_another_pool_it_is_logged_and_that_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        gate = threading.Event()
        unfuture = Unfuture(executor.submit(gate.wait, PATIENCE))
        unfuture.add_done_callback(raising(SystemExit))
        gate.set()
        assert unfuture.result(PATIENCE)
        worker = executor.submit(threading.get_ident).result(PATIENCE)
        assert executor.submit(threading.get_ident).result(PATIENCE) == worker
    wait_until(lambda: [r for r in caplog.records if r.exc_info and r.exc_info[0] is SystemExit])


@pytest.mark.usefixtures("refusing_log")
def test_who_waits_is_told_though_the_log_handler_raises(in_thread: Any) -> None:
    unfuture: Unfuture[int] = Unfuture()
    found: list[int] = []
    unfuture.add_done_callback(raising(Boom))
    unfuture.add_done_callback(lambda done: found.append(done.result()))
    waiting = in_thread(lambda: found.append(unfuture.result(PATIENCE)))
    mirrored = Unfuture(unfuture)
    mapped = mirrored.map(str)
    with pytest.raises(AssertionError, match="exception calling callback"):
        unfuture.set_result(1)
    waiting.join(PATIENCE)
    assert found == [1, 1]
    assert mapped.result(PATIENCE) == "1"


@pytest.mark.usefixtures("refusing_log")
def test_a_worker_goes_on_though_the_log_handler_raises() -> None:
    with ThreadExecutor(1) as executor:
        check_goes_on(executor, Boom)


ONE_ALLOCATION_FAILS = """
import asyncio
import gc

import _testcapi
from unsync import Unfuture

gc.disable()
# How many allocations a round makes, and some more.
ALLOCATIONS = 80


async def tell_all(fails_at):
    unfuture = Unfuture()
    follower = Unfuture(Unfuture(unfuture))
    told = asyncio.Event()
    unfuture.add_done_callback(lambda _: told.set())  # in this loop

    async def wait_for(awaitable):
        return await awaitable

    tasks = [asyncio.ensure_future(wait_for(each)) for each in (unfuture, follower, told.wait())]
    for _ in range(3):
        await asyncio.sleep(0)
    _testcapi.set_nomemory(fails_at, fails_at + 1)
    try:
        unfuture.set_result(1)
    except MemoryError:
        failed = True
    else:
        failed = False
    finally:
        _testcapi.remove_mem_hooks()
    if not unfuture.done():
        assert failed
        unfuture.set_result(1)
    assert follower.done()
    done, waiting = await asyncio.wait(tasks, timeout=60)
    assert not waiting, (fails_at, waiting)
    assert [task.result() for task in tasks] == [1, 1, True]


for fails_at in [100_000, *range(ALLOCATIONS)]:
    asyncio.run(tell_all(fails_at))
"""


@pytest.mark.skipif(
    # PyPy has a module of that name too, without what this takes of it.
    sys.implementation.name != "cpython" or importlib.util.find_spec("_testcapi") is None,
    reason="only CPython's module _testcapi makes allocations fail",
)
@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")) and not ACCELERATED,
    reason="without the GIL CPython itself crashed in it once, all of whose code is Python's",
)
def test_who_waits_is_told_though_an_allocation_fails(run_python: RunPython) -> None:
    """Each of those that are made meanwhile, one after the other."""
    done = run_python(ONE_ALLOCATION_FAILS)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("refusing_log")
def test_who_waits_is_told_though_an_unstarted_coroutine_fails_to_close() -> None:
    class Stubborn(Coroutine[Any, Any, Any]):
        def close(self) -> None:
            raise Boom

        def send(self, _: object) -> None: ...

        def throw(self, *_: object) -> None: ...

        def __await__(self) -> Any: ...

    async def hold() -> None:
        held.set()
        gate.wait(PATIENCE)

    held, gate = threading.Event(), threading.Event()
    holding = unsync(hold)()
    assert held.wait(PATIENCE)
    try:
        unfuture: Unfuture[Any] = Unfuture(Stubborn())
        called: list[object] = []
        unfuture.add_done_callback(called.append)
        with pytest.raises(AssertionError, match="waking"):
            unfuture.cancel()
        assert called == [unfuture]
    finally:
        gate.set()
    holding.result(PATIENCE)


class InterruptedLoop(asyncio.SelectorEventLoop):
    """Waking it raises a KeyboardInterrupt once, before it is woken, and again if so set."""

    interrupts = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        if self.interrupts and threading.current_thread() is threading.main_thread():
            self.interrupts -= 1
            raise KeyboardInterrupt
        return super().call_soon_threadsafe(*args, **kwargs)


@pytest.fixture
def interrupted() -> Iterator[InterruptedLoop]:
    yield from running(InterruptedLoop())


@pytest.mark.parametrize("way", ["await", "callback", "view"])
def test_a_ctrl_c_that_strikes_while_a_loop_is_woken_goes_on_and_the_loop_is_woken(
    way: str, interrupted: InterruptedLoop
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    told = threading.Event()

    async def wait() -> None:
        if way == "await":
            await unfuture
        elif way == "view":
            await unfuture.future
        else:
            event = asyncio.Event()
            unfuture.add_done_callback(lambda _: event.set())
            await event.wait()
        told.set()

    begun = threading.Event()
    future = asyncio.run_coroutine_threadsafe(wait(), interrupted)
    interrupted.call_soon_threadsafe(interrupted.call_soon, begun.set)
    assert begun.wait(PATIENCE)
    interrupted.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        unfuture.set_result(1)
    assert told.wait(PATIENCE)
    future.result(PATIENCE)


@pytest.mark.alone  # there is one ambient loop
def test_a_ctrl_c_that_strikes_while_a_call_is_left_goes_on_and_the_call_is_made() -> None:
    """Also where there is no bell, an eventfd."""
    before = unsync.loop_factory
    unsync.shutdown()
    loops: list[InterruptedLoop] = []

    def make() -> asyncio.AbstractEventLoop:
        loop = InterruptedLoop()
        loop.add_reader = None  # type: ignore[assignment,method-assign]
        loops.append(loop)
        return loop

    unsync.loop_factory = make
    try:
        called = threading.Event()

        @unsync
        async def call() -> None:
            called.set()

        unsync(asyncio.sleep)(0).result(PATIENCE)
        loops[0].interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            call()
        assert called.wait(PATIENCE)
    finally:
        unsync.shutdown()
        unsync.loop_factory = before


# In a circle.


@unsync
def begin(gate: threading.Event) -> None:
    assert gate.wait(PATIENCE)


@pytest.mark.parametrize("length", [2, 3, 10])
@pytest.mark.parametrize("by", ["then", "map"])
def test_continuations_in_a_circle_are_an_error(length: int, by: str) -> None:
    gate = threading.Event()
    circle: list[Unfuture[Any]] = []
    for number in range(length):

        def go_on(_: object, number: int = number) -> Unfuture[Any]:
            return circle[(number + 1) % length]

        source = begin(gate)
        circle.append(source.then(go_on) if by == "then" else source.map(go_on))
    gate.set()
    for unfuture in circle:
        with pytest.raises(TypeError, match="waits for"):
            unfuture.result(PATIENCE)
        assert not unfuture.cancel()


def test_a_continuation_that_returns_one_of_its_own_continuations_is_an_error() -> None:
    gate = threading.Event()
    first: Unfuture[Any] = begin(gate).then(lambda _: second)
    second: Unfuture[Any] = first.map(lambda value: value)
    gate.set()
    for unfuture in first, second:
        with pytest.raises(TypeError, match="waits for"):
            unfuture.result(PATIENCE)


# Each makes another one of an Unfuture, and says how that is returned.
CIRCLES: dict[str, tuple[Callable[[Unfuture[Any]], Any], Callable[[Unfuture[Any]], Any]]] = {
    "future": (lambda unfuture: unfuture, lambda other: other.future),
    "Unfuture(future)": (lambda unfuture: Unfuture(unfuture.future), lambda other: other),
    "map().future": (lambda unfuture: unfuture.map(len), lambda other: other.future),
    "Unfuture(concurrent_future)": (
        lambda unfuture: Unfuture(unfuture.concurrent_future),
        lambda other: other,
    ),
}


def go_in_a_circle(circle: str) -> None:
    gate = threading.Event()
    make, give = CIRCLES[circle]
    others: list[Unfuture[Any]] = []

    def go_on(_: object) -> Any:
        others.append(make(unfuture))
        return give(others[0])

    unfuture: Unfuture[Any] = begin(gate).then(go_on)
    gate.set()
    for each in unfuture, *others:
        with pytest.raises(TypeError, match="waits for"):
            each.result(PATIENCE)
    assert not unfuture.cancel()


@pytest.mark.parametrize("circle", CIRCLES)
def test_a_circle_through_a_view_is_an_error(circle: str, caplog: pytest.LogCaptureFixture) -> None:
    go_in_a_circle(circle)
    # Nor is there anything behind it whose failure nobody looked at.
    for _ in range(2):
        unsync(asyncio.sleep)(0).result(PATIENCE)
        collect()
    assert caplog.records == []


def test_what_shows_itself_is_an_error() -> None:
    unfuture: Unfuture[Any] = Unfuture()
    with pytest.raises(TypeError, match="waits for"):
        Unfuture.__init__(unfuture, unfuture.concurrent_future)
    assert unfuture.cancel()


def test_those_in_a_circle_can_be_cancelled_however_it_was_made() -> None:
    circle: list[Unfuture[Any]] = [Unfuture() for _ in range(3)]
    following: list[Unfuture[Any]] = [Unfuture() for _ in circle]
    for unfuture, other in zip(circle, following, strict=True):
        Unfuture.__init__(unfuture, other)
    Unfuture.__init__(following[0], circle[1])
    Unfuture.__init__(following[1], circle[2])
    Unfuture.__init__(following[2], circle[0])
    assert circle[0].cancel() in (True, False)
    with pytest.raises(TypeError, match="waits for"):
        circle[0].result(PATIENCE)
    for unfuture in circle[1:] + following:
        unfuture.exception(PATIENCE)
