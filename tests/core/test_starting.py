"""While a thread starts: calls of finalizers and signal handlers, Ctrl-C, and that it fails."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import Unfuture, executors, unsync
from unsync.executors import ThreadExecutor

# What `threading` starts a thread with.
STARTS = (
    "_start_joinable_thread"
    if hasattr(threading, "_start_joinable_thread")
    else "_start_new_thread"
)


class Starts:
    """What happens when a thread is started: for each start that is planned, one after the other.

    A plan says whether the thread is started at all, and is given the chance to do something or to
    raise. Without a plan it is started.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[Callable[[], bool]] = []
        self.count = 0
        real = getattr(threading, STARTS)

        def start(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.plans and not self.plans.pop(0)():
                return None
            return real(*args, **kwargs)

        monkeypatch.setattr(threading, STARTS, start)

    def before(self, action: Callable[[], object]) -> None:
        def plan() -> bool:
            action()
            return True

        self.plans.append(plan)

    def fail(self, error: BaseException, count: int = 1) -> None:
        def plan() -> bool:
            raise error

        self.plans += [plan] * count


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(monkeypatch)


@pytest.fixture
def executor() -> Iterator[ThreadExecutor]:
    executor = ThreadExecutor(2)
    yield executor
    executor.shutdown(wait=False)
    assert executor.join(PATIENCE)


@pytest.fixture
def no_loop() -> Iterator[None]:
    before = unsync.loop_factory
    unsync.shutdown()
    yield
    unsync.shutdown()
    unsync.loop_factory = before


class InterruptedThread(threading.Thread):
    """Ctrl-C strikes before it is started, or in the wait until it has begun."""

    interrupts: ClassVar[list[str]] = []

    def start(self) -> None:
        when = self.interrupts.pop() if self.interrupts else None
        if when != "before":
            super().start()
        if when is not None:
            raise KeyboardInterrupt


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """When it strikes in the next starts."""
    monkeypatch.setattr(threading, "Thread", InterruptedThread)
    yield InterruptedThread.interrupts
    InterruptedThread.interrupts.clear()


@unsync
async def one() -> int:
    return 1


# In a pool.


def test_a_call_may_be_made_and_waited_for_while_a_worker_starts(
    executor: ThreadExecutor, starts: Starts
) -> None:
    """As a finalizer or a signal handler does."""
    found: list[int] = []
    starts.before(lambda: found.append(executor.submit(abs, -1).result(PATIENCE)))
    assert executor.submit(abs, -2).result(PATIENCE) == 2
    assert found == [1]


def test_a_stream_may_be_closed_while_a_worker_starts(starts: Starts) -> None:
    closed = threading.Event()

    class Page:  # holds its rows, and refers to itself
        def __init__(self) -> None:
            self.me = self
            self.rows = cast(Any, rows)()
            next(self.rows)

    with ThreadExecutor(4) as executor:

        @unsync(executor=executor)
        def rows() -> Iterator[int]:
            try:
                while True:
                    yield 1
            finally:
                closed.set()

        gate = threading.Event()
        Page()
        starts.before(gc.collect)
        calls: list[Unfuture[Any]] = [executor.submit(gate.wait, PATIENCE) for _ in range(2)]
        assert closed.wait(PATIENCE)
        gate.set()
        assert all(call.result(PATIENCE) for call in calls)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("with_worker", [False, True])
def test_a_ctrl_c_while_a_worker_starts_loses_no_call(
    executor: ThreadExecutor, interrupts: list[str], when: str, count: int, with_worker: bool
) -> None:
    gate = threading.Event()
    called = threading.Event()
    calls: list[Unfuture[Any]] = []
    if with_worker:
        calls.append(executor.submit(gate.wait, PATIENCE))
    interrupts += [when] * count
    with pytest.raises(KeyboardInterrupt):
        executor.submit(called.set)
    assert called.wait(PATIENCE)
    gate.set()
    interrupts.clear()
    calls.append(executor.submit(abs, -1))
    for call in calls:
        assert call.result(PATIENCE)
    executor.shutdown(wait=False)
    assert executor.join(PATIENCE)
    work, queued, workers, idle, waiting = executor.jobs.counts()
    assert work == (2 + with_worker, 2 + with_worker, 0, 0, 0)
    assert (queued, workers, idle, waiting) == (0, 0, 0, 0)


def test_a_start_that_is_interrupted_again_and_again_is_given_up(
    executor: ThreadExecutor, interrupts: list[str]
) -> None:
    interrupts += ["before"] * 100
    with pytest.raises(KeyboardInterrupt):
        executor.submit(abs, -1)
    assert executor.jobs.counts() == ((0, 0, 0, 0, 0), 0, 0, 0, 0)
    interrupts.clear()
    assert executor.submit(abs, -1).result(PATIENCE) == 1


def test_a_call_that_counted_on_a_start_that_failed_hears_of_it(
    executor: ThreadExecutor, starts: Starts
) -> None:
    others: list[Unfuture[int]] = []

    def fail() -> bool:
        # These find that workers are on their way.
        others.extend(executor.submit(abs, -1) for _ in range(2))
        raise RuntimeError("can't start new thread")

    def refuse() -> bool:
        raise RuntimeError("can't start new thread")

    starts.plans += [fail, refuse, refuse]
    with pytest.raises(RuntimeError, match="start new thread"):
        executor.submit(abs, -1)
    for other in others:
        with pytest.raises(RuntimeError, match="start new thread"):
            other.result(PATIENCE)
    assert executor.jobs.counts() == ((0, 0, 2, 0, 0), 0, 0, 0, 0)


def test_a_worker_that_waits_tries_again_when_no_thread_could_be_started(
    executor: ThreadExecutor, starts: Starts, in_thread: Any
) -> None:
    """A start that another thread tries meanwhile, and which fails, is no worker at work."""
    refused, waits, go_on = threading.Event(), threading.Event(), threading.Event()

    def refuse_slowly() -> bool:
        refused.set()
        assert go_on.wait(PATIENCE)
        raise RuntimeError("can't start new thread")

    def outer() -> int:
        assert begin.wait(PATIENCE)
        call = executor.submit(abs, -1)
        waits.set()
        return call.result(PATIENCE)

    begin = threading.Event()
    waiting = executor.submit(outer)
    calls: list[Unfuture[int]] = []

    def submit() -> None:
        starts.plans.append(refuse_slowly)
        calls.append(executor.submit(abs, -2))

    thread = in_thread(submit)
    assert refused.wait(PATIENCE)
    starts.fail(RuntimeError("can't start new thread"), 2)
    begin.set()
    assert waits.wait(PATIENCE)
    wait_until(lambda: executor.jobs.counts()[4] == 1, "the wait")
    go_on.set()
    thread.join(PATIENCE)
    assert waiting.result(PATIENCE) == 1
    assert [call.result(PATIENCE) for call in calls] == [2]


# The ambient loop's.


@pytest.mark.usefixtures("no_loop")
def test_two_first_calls_at_once_start_one_loop(starts: Starts, in_thread: Any) -> None:
    made: list[asyncio.AbstractEventLoop] = []

    def make() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        return made[-1]

    unsync.loop_factory = make
    barrier = threading.Barrier(4)
    found: list[Any] = []

    @unsync
    async def where() -> Any:
        return asyncio.get_running_loop(), threading.current_thread()

    def call() -> None:
        barrier.wait(PATIENCE)
        found.append(where().result(PATIENCE))

    for thread in [in_thread(call) for _ in range(4)]:
        thread.join(PATIENCE)
    assert found == [(made[0], unsync.thread)] * 4
    assert len(made) == 1


@pytest.mark.usefixtures("no_loop")
def test_a_signal_handlers_first_call_while_the_loops_thread_starts_is_made(starts: Starts) -> None:
    found: list[Any] = []
    starts.before(lambda: found.append((one().result(PATIENCE), unsync.loop, unsync.thread)))
    assert one().result(PATIENCE) == 1
    assert found == [(1, unsync.loop, unsync.thread)]
    assert [thread.name for thread in threading.enumerate()].count("unsync") == 1


@pytest.mark.usefixtures("no_loop")
def test_a_signal_handlers_first_call_while_the_loop_is_made_is_made() -> None:
    found: list[Any] = []
    made: list[asyncio.AbstractEventLoop] = []

    def make() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        loop = made[-1]
        if len(made) == 1:
            found.append((one().result(PATIENCE), unsync.loop, unsync.thread))
        return loop

    unsync.loop_factory = make
    assert one().result(PATIENCE) == 1
    assert found == [(1, unsync.loop, unsync.thread)]
    assert unsync.loop is made[1]
    assert made[0].is_closed()


@pytest.mark.usefixtures("no_loop")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_ctrl_c_while_the_loops_thread_starts_goes_on(
    interrupts: list[str], when: str, count: int
) -> None:
    interrupts += [when] * count
    with pytest.raises(KeyboardInterrupt):
        one()
    interrupts.clear()
    assert one().result(PATIENCE) == 1
    wait_until(lambda: [each.name for each in threading.enumerate()].count("unsync") == 1)
    assert unsync.shutdown(PATIENCE)


@pytest.mark.usefixtures("no_loop")
def test_a_loop_whose_thread_cannot_be_started_is_given_up(starts: Starts) -> None:
    starts.fail(RuntimeError("can't start new thread"), 100)
    with pytest.raises(RuntimeError, match="start new thread"):
        one()
    starts.plans.clear()
    assert one().result(PATIENCE) == 1


@pytest.mark.usefixtures("no_loop")
def test_a_loop_whose_threads_start_is_interrupted_again_and_again_is_given_up(
    interrupts: list[str],
) -> None:
    interrupts += ["before"] * 100
    with pytest.raises(KeyboardInterrupt):
        one()
    interrupts.clear()
    assert one().result(PATIENCE) == 1


@pytest.mark.usefixtures("no_loop")
def test_a_shutdown_while_the_loops_thread_starts_waits_for_nothing(starts: Starts) -> None:
    ended: list[bool] = []
    starts.before(lambda: ended.append(unsync.shutdown(PATIENCE)))
    call = one()
    with pytest.raises(asyncio.CancelledError):
        call.result(PATIENCE)
    assert ended == [True]
    assert one().result(PATIENCE) == 1


# While what is needed is made.


def by_default_factory(monkeypatch: pytest.MonkeyPatch, name: str, strike: Any) -> None:
    """Strikes as a finalizer or signal handler does that comes while it is made."""
    owner, attribute = {
        "loop": (asyncio, "new_event_loop"),
        "thread_executor": (executors, "ThreadExecutor"),
        "process_executor": (executors, "_make_process_pool"),
    }[name]
    real = getattr(owner, attribute)

    def make(*args: Any, **kwargs: Any) -> Any:
        strike()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, make)


def by_own_factory(monkeypatch: pytest.MonkeyPatch, name: str, strike: Any) -> None:
    def make() -> Any:
        strike()
        return asyncio.new_event_loop() if name == "loop" else ThreadExecutor(1)

    setattr(unsync, "loop_factory" if name == "loop" else name, make)


@pytest.mark.usefixtures("fresh", "no_loop")
@pytest.mark.parametrize("name", ["loop", "thread_executor", "process_executor"])
@pytest.mark.parametrize("way", [by_default_factory, by_own_factory])
def test_one_that_waits_while_it_makes_something_keeps_nobody_else_from_making_it(
    monkeypatch: pytest.MonkeyPatch, executor: ThreadExecutor, name: str, way: Any
) -> None:
    asked: list[object] = []
    ask_elsewhere = unsync(lambda: getattr(unsync, name), executor=executor)

    def strike() -> None:
        if not asked:
            asked.append(None)
            asked[0] = ask_elsewhere().result(PATIENCE)

    way(monkeypatch, name, strike)
    # The first that was there counts, for everybody.
    assert getattr(unsync, name) is asked[0]
    assert ask_elsewhere().result(PATIENCE) is asked[0]
    if way is by_own_factory and name != "loop":
        asked[0].shutdown()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_loop")
def test_a_factory_that_gives_one_loop_to_two_threads(executor: ThreadExecutor) -> None:
    """It waits for the second of them, which is first; the loop is not closed as one too many."""
    loop = asyncio.new_event_loop()
    calls: list[Unfuture[int]] = []
    call_elsewhere = unsync(lambda: one().result(PATIENCE), executor=executor)

    def factory() -> asyncio.AbstractEventLoop:
        if not calls:
            calls.append(call_elsewhere())
            assert calls[0].result(PATIENCE) == 1
        return loop

    unsync.loop_factory = factory
    assert one().result(PATIENCE) == 1
    assert unsync.loop is loop


@pytest.fixture
def asyncio_log() -> Iterator[logging.Logger]:
    """asyncio's logger, which tells everything while the test runs."""
    log = logging.getLogger("asyncio")
    level, handlers = log.level, [*log.handlers]
    log.setLevel(logging.DEBUG)
    yield log
    log.setLevel(level)
    log.handlers[:] = handlers


class Shipping(logging.Handler):
    """Calls for each record, and may wait for the call."""

    def __init__(self, waits: bool) -> None:
        super().__init__()
        self.waits = waits
        self.shipped: list[str] = []
        self.calls: list[Unfuture[None]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.calls.append(self.ship(record.getMessage()))
        if self.waits:
            self.calls[-1].result(PATIENCE)

    @unsync
    async def ship(self, text: str) -> None:
        self.shipped.append(text)


@pytest.mark.usefixtures("no_loop")
@pytest.mark.parametrize("waits", [False, True])
def test_a_log_handler_may_call_for_what_asyncio_logs_while_the_loop_is_made(
    asyncio_log: logging.Logger, waits: bool
) -> None:
    handler = Shipping(waits)
    asyncio_log.addHandler(handler)
    for _ in range(2):
        assert one().result(PATIENCE) == 1
        assert len(handler.calls) == 1
        assert handler.calls.pop().result(PATIENCE) is None
        assert handler.shipped.pop().startswith("Using ")
        assert not handler.shipped
        assert unsync.shutdown(PATIENCE)
    # What others make is logged as before.
    asyncio.new_event_loop().close()
    assert handler.calls.pop().result(PATIENCE) is None


@pytest.mark.usefixtures("no_loop")
def test_a_signal_handler_may_wait_while_a_loop_is_made_for_a_log_handler(
    asyncio_log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = Shipping(waits=True)
    asyncio_log.addHandler(handler)
    real = asyncio.new_event_loop
    found: list[int] = []
    made: list[asyncio.AbstractEventLoop] = []

    def make() -> asyncio.AbstractEventLoop:
        if len(found) < 3:
            found.append(0)
            found[found.index(0)] = one().result(PATIENCE)
        made.append(real())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", make)
    assert one().result(PATIENCE) == 1
    assert found == [1, 1, 1]
    assert [loop for loop in made if not loop.is_closed()] == [unsync.loop]
    for call in handler.calls:
        assert call.result(PATIENCE) is None


@pytest.mark.usefixtures("no_loop")
def test_a_factory_that_calls_each_time_is_an_error_that_says_so() -> None:
    def make() -> asyncio.AbstractEventLoop:
        one()
        return asyncio.new_event_loop()

    unsync.loop_factory = make
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"unsync\.loop_factory makes a call .* without end"):
            one()
    unsync.loop_factory = None
    assert one().result(PATIENCE) == 1


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("setting", ["thread_executor", "process_executor", None])
def test_a_callable_that_needs_what_it_gives_each_time_is_an_error_that_says_so(
    setting: str | None,
) -> None:
    def give() -> ThreadExecutor:
        needs_it()
        return ThreadExecutor(1)

    mark: Any = unsync
    if setting is None:
        needs_it = mark(int, executor=give)
    else:
        setattr(unsync, setting, give)
        needs_it = mark(int, cpu_bound=setting == "process_executor")
    with pytest.raises(RuntimeError, match=r"makes a call .* without end"):
        needs_it()
