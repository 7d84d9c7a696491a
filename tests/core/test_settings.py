"""The settings on the class `unsync`, and `unsync.shutdown`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import pydoc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import Any
from unittest import mock

import pytest
from support.waiting import PATIENCE, collect, wait_until

from unsync import Unfuture, unsync
from unsync.executors import ThreadExecutor

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    # A pool that forks while threads run: what it is warned of is other tests' subject.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

InThread = Callable[[Callable[[], object]], threading.Thread]
RunPython = Callable[..., subprocess.CompletedProcess[str]]


@unsync
async def add_async(one: int, other: int) -> int:
    await asyncio.sleep(0)
    return one + other


@unsync
def add(one: int, other: int) -> int:
    return one + other


@unsync(cpu_bound=True)
def get_pid() -> int:
    return os.getpid()


@unsync(cpu_bound=True)
def sleep_in_process(path: str) -> None:
    with open(path, "w"):
        pass
    time.sleep(1000)


@unsync
async def thread_of_a_coroutine() -> threading.Thread:
    return threading.current_thread()


@unsync
def thread_of_a_function() -> threading.Thread:
    return threading.current_thread()


@unsync
async def loop_of_a_coroutine() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def ambient_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("unsync")]


def assert_that_no_thread_is_left() -> None:
    if sys.implementation.name != "cpython":
        # The threads of executors that other tests have left end when these are collected.
        wait_until(lambda: collect() or not ambient_threads())
    assert ambient_threads() == []


class Inline(Executor):
    """Runs what it is given at once, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.count += 1
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.closed = True


# unsync.loop and unsync.thread.


def test_importing_and_marking_start_nothing(run_python: RunPython) -> None:
    run = run_python("""
        import threading
        from unsync import Unfuture, unsync

        @unsync
        async def coroutine(): ...

        @unsync
        def function(): ...

        @unsync(cpu_bound=True)
        def in_process(): ...

        Unfuture().then(print)
        assert unsync.loop_factory is None
        print([thread.name for thread in threading.enumerate()])
    """)
    assert (run.stdout, run.stderr) == ("['MainThread']\n", "")


def test_loop_and_thread_start_when_they_are_asked_for() -> None:
    assert_that_no_thread_is_left()
    loop = unsync.loop
    assert isinstance(loop, asyncio.AbstractEventLoop)
    wait_until(loop.is_running)
    assert ambient_threads() == [unsync.thread]
    assert unsync.thread.daemon
    assert unsync.loop is loop


def test_loop_and_thread_start_with_the_first_call() -> None:
    assert_that_no_thread_is_left()
    unfuture = add_async(1, 2)
    assert ambient_threads() == [unsync.thread]
    assert unfuture.result(PATIENCE) == 3
    assert loop_of_a_coroutine().result(PATIENCE) is unsync.loop
    assert thread_of_a_coroutine().result(PATIENCE) is unsync.thread


def test_a_regular_function_needs_no_loop() -> None:
    assert_that_no_thread_is_left()
    assert add(1, 2).result(PATIENCE) == 3
    assert [thread.name for thread in ambient_threads()] == ["unsync-worker_0"]


def test_many_threads_that_are_first_at_once_start_one_loop(in_thread: InThread) -> None:
    barrier = threading.Barrier(8)
    loops: list[asyncio.AbstractEventLoop] = []

    def first() -> None:
        barrier.wait(PATIENCE)
        loops.append(loop_of_a_coroutine().result(PATIENCE))

    threads = [in_thread(first) for _ in range(8)]
    for thread in threads:
        thread.join(PATIENCE)
    assert loops == [unsync.loop] * 8


@pytest.mark.parametrize("name", ["loop", "thread"])
def test_loop_and_thread_cannot_be_set(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(unsync, name, None)


def test_a_failing_thread_start_surfaces_at_the_call_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    def factory() -> asyncio.AbstractEventLoop:
        loops.append(asyncio.new_event_loop())
        return loops[-1]

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    unsync.loop_factory = factory
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            add_async(1, 2)
    assert loops[0].is_closed()
    assert add_async(1, 2).result(PATIENCE) == 3


# unsync.thread_executor and unsync.process_executor.


def test_the_default_thread_executor_is_a_thread_pool_executor() -> None:
    executor = unsync.thread_executor
    assert isinstance(executor, ThreadPoolExecutor)
    assert unsync.thread_executor is executor
    assert executor.submit(add.__wrapped__, 1, 2).result(PATIENCE) == 3


def test_the_default_process_executor_is_made_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[ProcessPoolExecutor] = []
    real = ProcessPoolExecutor.__init__

    def init(self: ProcessPoolExecutor, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(ProcessPoolExecutor, "__init__", init)
    unsync(cpu_bound=True)(len)
    assert add(1, 2).result(PATIENCE) == 3
    assert made == []
    executor = unsync.process_executor
    assert isinstance(executor, ProcessPoolExecutor)
    assert unsync.process_executor is executor
    assert made == [executor]


@pytest.mark.parametrize("assigned_first", [True, False])
def test_any_executor_can_run_the_regular_functions(assigned_first: bool) -> None:
    if not assigned_first:
        add(0, 0).result(PATIENCE)
    executor = Inline()
    unsync.thread_executor = executor
    assert unsync.thread_executor is executor
    assert add(1, 2).result(PATIENCE) == 3
    assert thread_of_a_function().result(PATIENCE) is threading.current_thread()
    assert executor.count == 2


@pytest.mark.parametrize("name", ["thread_executor", "process_executor"])
@pytest.mark.parametrize("by", ["mock", "monkeypatch"])
def test_a_test_may_patch_a_setting_which_brings_its_default_back(name: str, by: str) -> None:
    marked = add if name == "thread_executor" else get_pid
    arguments = (1, 2) if name == "thread_executor" else ()
    executor = Inline()
    if by == "mock":
        with mock.patch.object(unsync, name, executor):
            marked(*arguments).result(PATIENCE)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(unsync, name, executor)
            marked(*arguments).result(PATIENCE)
    assert executor.count == 1
    assert getattr(unsync, name) is not executor
    marked(*arguments).result(PATIENCE)
    assert executor.count == 1


@pytest.mark.parametrize("name", ["thread_executor", "process_executor"])
@pytest.mark.parametrize("by", ["mock", "monkeypatch", "deleting"])
@pytest.mark.parametrize("given", [False, True])
def test_a_setting_that_is_patched_comes_back_as_it_was_assigned(
    name: str, by: str, given: bool
) -> None:
    """One that is given by a callable, too, and is not asked for again."""
    marked = add if name == "thread_executor" else get_pid
    arguments = (1, 2) if name == "thread_executor" else ()
    made: list[Inline] = []

    def make() -> Inline:
        made.append(Inline())
        return made[-1]

    setattr(unsync, name, make if given else make())
    marked(*arguments).result(PATIENCE)
    other = Inline()
    if by == "mock":
        with mock.patch.object(unsync, name, other):
            marked(*arguments).result(PATIENCE)
            with mock.patch.object(unsync, name, Inline()):
                marked(*arguments).result(PATIENCE)
            assert getattr(unsync, name) is other
            marked(*arguments).result(PATIENCE)
    else:
        with pytest.MonkeyPatch.context() as patch:
            if by == "deleting":
                patch.delattr(unsync, name)
                assert getattr(unsync, name) is not made[0]
            patch.setattr(unsync, name, other)
            marked(*arguments).result(PATIENCE)
            marked(*arguments).result(PATIENCE)
    assert other.count == 2
    assert getattr(unsync, name) is made[0]
    marked(*arguments).result(PATIENCE)
    assert (len(made), made[0].count) == (1, 2)


def test_a_number_that_is_patched_comes_back_as_it_was_assigned() -> None:
    unsync.exit_timeout = 3
    try:
        with mock.patch.object(unsync, "exit_timeout", 5):
            assert unsync.exit_timeout == 5
        assert unsync.exit_timeout == 3
    finally:
        del unsync.exit_timeout
    assert unsync.exit_timeout is None


@pytest.mark.parametrize(
    ("timeout", "error", "words"),
    [
        ("2", TypeError, "must be a number of seconds, or None, not '2'"),
        (-1, ValueError, "must be at least 0, not -1"),
        (float("nan"), ValueError, "not nan"),
    ],
)
def test_an_exit_timeout_that_is_none(timeout: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        unsync.exit_timeout = timeout
    assert unsync.exit_timeout is None


def test_the_attributes_of_the_class_are_its_own_and_what_was_assigned() -> None:
    before = vars(unsync)
    settings = {"exit_timeout", "loop_factory", "process_executor", "thread_executor"}
    assert not before.keys() & settings
    assert "shutdown" not in before
    unsync.loop_factory = CustomLoop
    assert dict(vars(unsync)) == {**before, "loop_factory": CustomLoop}

    class Sub(unsync):  # type: ignore[misc, valid-type]
        pass

    assert "loop_factory" not in vars(Sub)


def test_deleting_the_loop_factory_brings_the_default_back() -> None:
    unsync.loop_factory = CustomLoop
    del unsync.loop_factory
    assert unsync.loop_factory is None
    assert type(unsync.loop) is not CustomLoop


@pytest.mark.parametrize("name", ["loop", "thread"])
def test_what_the_first_call_starts_cannot_be_set(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"unsync\.{name} is what .*unsync\.loop_factory"):
        setattr(unsync, name, None)


def test_a_setting_that_is_misspelt_is_an_error_that_names_the_near_one() -> None:
    settings: Any = unsync
    with pytest.raises(AttributeError, match="'thread_exector'; did you mean 'thread_executor'\\?"):
        settings.thread_exector = Inline()
    with pytest.raises(AttributeError, match=r"no setting 'xyz'$"):
        settings.xyz = 1
    assert not hasattr(unsync, "xyz")

    class Mine(settings):  # type: ignore[misc]
        pass

    Mine.xyz = 1


def test_what_there_is_to_call_and_to_set_is_listed() -> None:
    assert {*dir(unsync)} >= {
        *("calls", "loop", "loop_factory", "map", "process_executor", "shutdown", "stats"),
        *("thread", "thread_executor"),
    }
    assert "process_executor" in pydoc.render_doc(unsync)


@pytest.mark.parametrize("by", ["shutdown", "with", "asyncio.run"])
def test_the_default_thread_executor_is_replaced_after_somebody_shut_it_down(by: str) -> None:
    assert add(1, 2).result(PATIENCE) == 3
    shut_down = unsync.thread_executor

    async def use_as_default() -> int:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(shut_down)  # type: ignore[arg-type]
        return await loop.run_in_executor(None, add.__wrapped__, 3, 4)

    if by == "with":
        with shut_down:
            pass
    elif by == "shutdown":
        shut_down.shutdown()
    else:
        assert asyncio.run(use_as_default()) == 7
    with pytest.raises(RuntimeError, match="after shutdown"):
        shut_down.submit(len, "")
    assert add(2, 3).result(PATIENCE) == 5
    assert list(unsync.map(add, range(3), range(3))) == [0, 2, 4]
    assert unsync.thread_executor is not shut_down
    assert unsync.thread_executor.submit(len, "x").result(PATIENCE) == 1


def test_one_that_was_assigned_is_not_replaced_after_its_end() -> None:
    with ThreadExecutor(1) as executor:
        unsync.thread_executor = executor
    with pytest.raises(RuntimeError, match="after shutdown"):
        add(1, 2)
    assert unsync.thread_executor is executor


def test_none_restores_the_default_thread_executor() -> None:
    unsync.thread_executor = Inline()
    unsync.thread_executor = None
    assert type(unsync.thread_executor).__name__ == "ThreadExecutor"
    assert thread_of_a_function().result(PATIENCE).name.startswith("unsync-worker")


@pytest.mark.parametrize("used_before", [True, False])
def test_any_executor_can_run_the_cpu_bound_functions(used_before: bool) -> None:
    if used_before:
        assert get_pid().result(PATIENCE) != os.getpid()
    executor = Inline()
    unsync.process_executor = executor
    assert unsync.process_executor is executor
    assert get_pid().result(PATIENCE) == os.getpid()
    assert executor.count == 1


def test_none_restores_the_default_process_executor() -> None:
    unsync.process_executor = Inline()
    unsync.process_executor = None
    assert isinstance(unsync.process_executor, ProcessPoolExecutor)
    assert get_pid().result(PATIENCE) != os.getpid()


def test_a_process_pool_of_the_users_runs_the_cpu_bound_functions() -> None:
    with ProcessPoolExecutor(1) as executor:
        unsync.process_executor = executor
        pid = get_pid().result(PATIENCE)
        assert list(executor._processes) == [pid]
        assert pid != os.getpid()


@pytest.mark.parametrize("name", ["thread_executor", "process_executor"])
@pytest.mark.parametrize("thing", [5, [ThreadPoolExecutor], "threads"])
def test_what_is_no_executor_is_refused_and_changes_nothing(name: str, thing: object) -> None:
    executor = Inline()
    setattr(unsync, name, executor)
    with pytest.raises(TypeError, match=rf"unsync\.{name}") as info:
        setattr(unsync, name, thing)
    assert repr(thing) in str(info.value)
    assert getattr(unsync, name) is executor


# unsync.loop_factory.


class CustomLoop(asyncio.SelectorEventLoop):
    pass


def test_a_loop_factory_makes_the_ambient_loop() -> None:
    unsync.loop_factory = CustomLoop
    assert unsync.loop_factory is CustomLoop
    assert type(loop_of_a_coroutine().result(PATIENCE)) is CustomLoop
    assert add_async(1, 2).result(PATIENCE) == 3


def test_a_uvloop_can_be_the_ambient_loop() -> None:
    uvloop = pytest.importorskip("uvloop")
    unsync.loop_factory = uvloop.new_event_loop
    assert isinstance(unsync.loop, uvloop.Loop)
    assert add_async(1, 2).result(PATIENCE) == 3
    assert add(1, 2).then(lambda unfuture: add_async(unfuture.result(), 3)).result(PATIENCE) == 6

    async def elsewhere() -> int:
        return await add_async(3, 4)

    assert asyncio.run(elsewhere()) == 7
    assert unsync.shutdown(PATIENCE)
    assert add_async(5, 6).result(PATIENCE) == 11


def test_without_a_factory_asyncio_makes_the_ambient_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asyncio, "new_event_loop", CustomLoop)
    unsync.loop_factory = asyncio.SelectorEventLoop
    unsync.loop_factory = None
    assert type(unsync.loop) is CustomLoop


def test_an_installed_event_loop_policy_counts(run_python: RunPython) -> None:
    run = run_python(
        """
        import asyncio
        from unsync import unsync

        class Loop(asyncio.SelectorEventLoop):
            pass

        class Policy(asyncio.DefaultEventLoopPolicy):
            def new_event_loop(self):
                return Loop()

        asyncio.set_event_loop_policy(Policy())

        @unsync
        async def kind():
            return type(asyncio.get_running_loop()).__name__

        print(kind().result(60))
        """,
        "-W",
        "ignore::DeprecationWarning",  # policies go away, with a warning from Python 3.14 on
    )
    assert (run.stdout, run.stderr) == ("Loop\n", "")


def fail_to_make_a_loop() -> asyncio.AbstractEventLoop:
    raise OSError("too many open files")


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        (fail_to_make_a_loop, OSError, "too many open files"),
        (lambda: 5, TypeError, r"unsync\.loop_factory must make an event loop, not 5"),
        (lambda: None, TypeError, r"unsync\.loop_factory must make an event loop, not None"),
    ],
    ids=["raises", "number", "none"],
)
def test_a_bad_loop_factory_surfaces_at_the_call_and_the_next_call_works(
    factory: Any, error: type[Exception], words: str
) -> None:
    unsync.loop_factory = factory
    for call in (
        lambda: add_async(1, 2),
        lambda: unsync.loop,
        lambda: unsync.thread,
    ):
        with pytest.raises(error, match=words):
            call()
    continued = Unfuture.from_value(1).then(lambda unfuture: 2)
    with pytest.raises(error, match=words):
        continued.result(PATIENCE)
    assert_that_no_thread_is_left()
    unsync.loop_factory = None
    assert add_async(1, 2).result(PATIENCE) == 3


def test_a_loop_factory_that_fails_once_is_asked_again() -> None:
    failures = iter([OSError("too many open files")])

    def factory() -> asyncio.AbstractEventLoop:
        for failure in failures:
            raise failure
        return CustomLoop()

    unsync.loop_factory = factory
    with pytest.raises(OSError, match="too many open files"):
        add_async(1, 2)
    assert add_async(1, 2).result(PATIENCE) == 3


@pytest.mark.parametrize("thing", [5, "uvloop", CustomLoop.__name__])
def test_a_loop_factory_must_be_callable(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"unsync\.loop_factory") as info:
        unsync.loop_factory = thing
    assert repr(thing) in str(info.value)
    assert unsync.loop_factory is None


@pytest.mark.parametrize("factory", [CustomLoop, None])
def test_a_loop_factory_cannot_be_set_after_the_loop_has_started(factory: Any) -> None:
    loop = unsync.loop
    with pytest.raises(RuntimeError, match=r"unsync\.loop_factory.*shutdown"):
        unsync.loop_factory = factory
    assert unsync.loop is loop
    assert unsync.shutdown(PATIENCE)
    unsync.loop_factory = factory
    assert (type(unsync.loop) is CustomLoop) == (factory is CustomLoop)


# unsync.shutdown.


class Gate:
    """Lets a function or coroutine tell that it has begun, and wait to be let go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()
        self.open = threading.Event()
        self.ended = threading.Event()

    @unsync
    def function(self) -> str:
        self.begun.set()
        assert self.open.wait(PATIENCE)
        self.ended.set()
        return "through"

    @unsync
    async def blocking_coroutine(self, steps: int) -> None:
        for _ in range(steps):
            await asyncio.sleep(0)
        self.begun.set()
        assert self.open.wait(PATIENCE)
        self.ended.set()

    @unsync
    async def coroutine(self) -> None:
        """Cleans up, for as long as the gate is shut, when it is cancelled."""
        self.begun.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            self.cancelled.set()
            while not self.open.is_set():  # noqa: ASYNC110  # any thread may open it
                await asyncio.sleep(0.001)
            self.ended.set()
            raise


@pytest.fixture
def gate(fresh: None) -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@unsync
async def sleep_for_ever(semaphore: threading.Semaphore) -> None:
    semaphore.release()
    await asyncio.sleep(1000)


def test_shutdown_with_nothing_to_end_is_true() -> None:
    assert unsync.shutdown() is True
    assert unsync.shutdown(timeout=0) is True
    assert_that_no_thread_is_left()


def test_after_shutdown_everything_has_ended() -> None:
    loop, thread, worker = unsync.loop, unsync.thread, thread_of_a_function().result(PATIENCE)
    pool = unsync.process_executor
    assert get_pid().result(PATIENCE) != os.getpid()
    processes = list(pool._processes.values())
    assert unsync.shutdown(timeout=PATIENCE) is True
    assert not thread.is_alive()
    assert not worker.is_alive()
    assert loop.is_closed()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    assert_that_no_thread_is_left()


def test_the_next_call_after_shutdown_starts_afresh() -> None:
    for _ in range(3):
        before = unsync.loop, unsync.thread, unsync.thread_executor
        assert add_async(1, 2).result(PATIENCE) == 3
        assert unsync.shutdown(timeout=PATIENCE)
        assert add_async(1, 2).result(PATIENCE) == 3
        assert add(1, 2).result(PATIENCE) == 3
        after = unsync.loop, unsync.thread, unsync.thread_executor
        assert all(new is not old for new, old in zip(after, before, strict=True))
        assert loop_of_a_coroutine().result(PATIENCE) is unsync.loop


def test_cpu_bound_functions_work_after_shutdown() -> None:
    first = unsync.process_executor
    assert get_pid().result(PATIENCE) != os.getpid()
    assert unsync.shutdown(timeout=PATIENCE)
    assert get_pid().result(PATIENCE) != os.getpid()
    assert unsync.process_executor is not first


def test_shutdown_twice_is_true_twice() -> None:
    add_async(1, 2).result(PATIENCE)
    add(1, 2).result(PATIENCE)
    assert unsync.shutdown() is True
    assert unsync.shutdown() is True


def test_coroutines_see_that_they_are_cancelled_and_are_waited_for(
    gate: Gate, in_thread: InThread
) -> None:
    unfuture = gate.coroutine()
    assert gate.begun.wait(PATIENCE)
    answers: list[bool] = []
    ending = in_thread(lambda: answers.append(unsync.shutdown()))
    assert gate.cancelled.wait(PATIENCE)
    assert not unfuture.done()
    assert answers == []
    gate.open.set()
    ending.join(PATIENCE)
    assert answers == [True]
    assert gate.ended.is_set()
    assert unfuture.cancelled()


def test_a_coroutine_that_started_in_no_loop_turn_yet_is_cancelled() -> None:
    @unsync
    async def blocking() -> Unfuture[int]:
        unfuture = add_async(1, 2)
        unsync.loop.stop()
        return unfuture

    unfuture = blocking().result(PATIENCE)
    assert unsync.shutdown(timeout=PATIENCE)
    assert unfuture.done()


def test_what_a_cancelled_coroutine_returns_is_its_result() -> None:
    begun = threading.Event()

    @unsync
    async def stubborn() -> str:
        begun.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            return "saved"
        return "slept"

    unfuture = stubborn()
    assert begun.wait(PATIENCE)
    assert unsync.shutdown(timeout=PATIENCE) is True
    assert unfuture.result(PATIENCE) == "saved"


def test_a_coroutine_may_use_threads_to_clean_up() -> None:
    begun = threading.Event()

    @unsync
    async def careful() -> int:
        begun.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            return await add(1, 2)
        return 0

    unfuture = careful()
    assert begun.wait(PATIENCE)
    assert unsync.shutdown(timeout=PATIENCE) is True
    assert unfuture.result(PATIENCE) == 3
    assert_that_no_thread_is_left()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_raised_on_cancelling_cuts_off_no_other_coroutine(
    gate: Gate, kind: type[BaseException]
) -> None:
    begun = threading.Event()

    @unsync
    async def interrupted() -> None:
        begun.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            raise kind("now") from None

    @unsync
    async def open_later() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            gate.open.set()

    unfutures = interrupted(), gate.coroutine(), open_later()
    assert begun.wait(PATIENCE)
    assert gate.begun.wait(PATIENCE)
    assert unsync.shutdown(timeout=PATIENCE) is True
    assert gate.ended.is_set()
    assert type(unfutures[0].exception(PATIENCE)) is kind
    assert unfutures[1].cancelled()


def test_async_generators_are_closed() -> None:
    closed = threading.Event()

    async def numbers() -> Any:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            closed.set()

    generator = numbers()

    @unsync
    async def first() -> int:
        return await generator.__anext__()

    assert first().result(PATIENCE) == 1
    assert unsync.shutdown(timeout=PATIENCE) is True
    assert closed.is_set()


def test_a_coroutine_that_is_called_at_the_very_end_is_cancelled_like_the_others(
    gate: Gate,
) -> None:
    unfutures: list[Unfuture[None]] = []

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            unfutures.append(gate.coroutine())
            for _ in range(5):
                await asyncio.sleep(0)

    generator = numbers()

    @unsync
    async def first() -> int:
        return await generator.__anext__()

    gate.open.set()
    assert first().result(PATIENCE) == 1
    assert unsync.shutdown(timeout=PATIENCE) is True
    (unfuture,) = unfutures
    assert unfuture.cancelled()
    assert gate.begun.is_set() == gate.cancelled.is_set() == gate.ended.is_set()


def test_running_functions_are_waited_for_and_queued_ones_are_cancelled(
    gate: Gate, in_thread: InThread
) -> None:
    executor = unsync.thread_executor
    assert isinstance(executor, ThreadPoolExecutor)
    gates = [Gate() for _ in range(executor._max_workers)]
    running = [gate.function() for gate in gates]
    for each in gates:
        assert each.begun.wait(PATIENCE)
    queued = [add(1, 2) for _ in range(3)]
    answers: list[tuple[bool, bool]] = []
    ending = in_thread(
        lambda: answers.append(
            (unsync.shutdown(), all(unfuture.done() for unfuture in running)),
        )
    )
    wait_until(lambda: all(unfuture.done() for unfuture in queued), "the cancelling")
    assert [unfuture.cancelled() for unfuture in queued] == [True] * 3
    assert answers == []
    for each in gates:
        each.open.set()
    ending.join(PATIENCE)
    assert answers == [(True, True)]
    assert {unfuture.result(PATIENCE) for unfuture in running} == {"through"}


def test_shutdown_gives_up_a_function_that_does_not_end(gate: Gate) -> None:
    worker = thread_of_a_function().result(PATIENCE)
    unfuture = gate.function()
    assert gate.begun.wait(PATIENCE)
    assert unsync.shutdown(timeout=0.05) is False
    assert not unfuture.done()
    assert thread_of_a_function().result(PATIENCE) is not worker
    gate.open.set()
    assert unfuture.result(PATIENCE) == "through"
    wait_until(lambda: not worker.is_alive(), "the end of the thread that was left behind")


def test_shutdown_gives_up_a_coroutine_that_ignores_its_cancellation(gate: Gate) -> None:
    unfuture = gate.coroutine()
    assert gate.begun.wait(PATIENCE)
    assert unsync.shutdown(timeout=0.05) is False
    assert gate.cancelled.wait(PATIENCE)
    assert not gate.ended.is_set()
    assert unfuture.cancelled()
    assert_that_no_thread_is_left()
    assert add_async(1, 2).result(PATIENCE) == 3


@pytest.mark.parametrize("steps", [0, 1])
def test_shutdown_gives_up_a_coroutine_that_blocks_the_loop(gate: Gate, steps: int) -> None:
    thread = unsync.thread
    unfuture = gate.blocking_coroutine(steps)
    assert gate.begun.wait(PATIENCE)
    behind = add_async(1, 2)
    assert unsync.shutdown(timeout=0) is False
    for each in (unfuture, behind):
        with pytest.raises(concurrent.futures.CancelledError):
            each.result(PATIENCE / 2)
    assert not gate.ended.is_set()
    assert add_async(1, 2).result(PATIENCE) == 3
    assert unsync.thread is not thread
    gate.open.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert gate.ended.is_set()


def test_shutdown_terminates_a_process_that_does_not_end(tmp_path: Any) -> None:
    begun = tmp_path / "begun"
    unfuture = sleep_in_process(str(begun))
    wait_until(begun.exists, "the begin in the process")
    pool = unsync.process_executor
    processes = list(pool._processes.values())
    assert unsync.shutdown(timeout=0.1) is False
    assert type(unfuture.exception(PATIENCE)) is BrokenProcessPool
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode is not None
    assert get_pid().result(PATIENCE) != os.getpid()


def test_nobody_who_waits_for_a_coroutine_hangs(in_thread: InThread) -> None:
    semaphore = threading.Semaphore(0)
    unfuture = sleep_for_ever(semaphore)
    assert semaphore.acquire(timeout=PATIENCE)
    outcomes: dict[str, object] = {}
    waiting = threading.Barrier(4)

    def block() -> None:
        waiting.wait(PATIENCE)
        try:
            unfuture.result(PATIENCE)
        except BaseException as exc:
            outcomes["result"] = type(exc)

    def wait() -> None:
        waiting.wait(PATIENCE)
        outcomes["wait"] = concurrent.futures.wait([unfuture], timeout=PATIENCE).done

    async def awaiting() -> None:
        waiting.wait(PATIENCE)
        try:
            await asyncio.wait_for(asyncio.shield(unfuture), PATIENCE)
        except asyncio.CancelledError as exc:
            outcomes["await"] = type(exc)

    threads = [in_thread(block), in_thread(wait), in_thread(lambda: asyncio.run(awaiting()))]
    continued = unfuture.then(lambda _: 1)
    waiting.wait(PATIENCE)
    assert unsync.shutdown(timeout=PATIENCE) is True
    for thread in threads:
        thread.join(PATIENCE)
    assert isinstance(outcomes["result"], type)
    assert issubclass(outcomes["result"], concurrent.futures.CancelledError)
    assert outcomes["wait"] == {unfuture}
    assert outcomes["await"] is asyncio.CancelledError
    assert continued.cancelled()


def test_nobody_who_waits_for_a_queued_function_hangs(gate: Gate, in_thread: InThread) -> None:
    """The executor is one with a single thread, which is busy; the loop awaits what is queued."""
    executor = unsync.thread_executor
    assert isinstance(executor, ThreadPoolExecutor)
    gates = [Gate() for _ in range(executor._max_workers)]
    for each in gates:
        each.function()
    for each in gates:
        assert each.begun.wait(PATIENCE)
    queued = add(1, 2)
    outcomes: list[type[BaseException]] = []
    waiting = threading.Barrier(3)

    def block() -> None:
        waiting.wait(PATIENCE)
        error: type[BaseException] = concurrent.futures.CancelledError
        with pytest.raises(error):
            queued.result(PATIENCE)
        outcomes.append(error)

    async def awaiting() -> None:
        waiting.wait(PATIENCE)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(queued), PATIENCE)
        outcomes.append(asyncio.CancelledError)

    threads = [in_thread(block), in_thread(lambda: asyncio.run(awaiting()))]
    waiting.wait(PATIENCE)
    assert unsync.shutdown(timeout=0.1) is False
    for thread in threads:
        thread.join(PATIENCE)
    assert len(outcomes) == 2
    for each in gates:
        each.open.set()
        assert each.ended.wait(PATIENCE)


def test_shutdown_leaves_no_loop_running_that_a_last_continuation_started(
    gate: Gate, in_thread: InThread
) -> None:
    continued = gate.function().then(lambda unfuture: unfuture.result())
    assert gate.begun.wait(PATIENCE)
    thread = unsync.thread
    answers: list[bool] = []
    ending = in_thread(lambda: answers.append(unsync.shutdown(timeout=PATIENCE)))
    thread.join(PATIENCE)
    gate.open.set()
    ending.join(PATIENCE)
    assert answers == [True]
    assert_that_no_thread_is_left()
    assert continued.done()


def test_shutdown_in_the_ambient_thread_is_a_runtime_error() -> None:
    @unsync
    async def end() -> bool:
        return unsync.shutdown()

    loop = unsync.loop
    with pytest.raises(RuntimeError, match=r"unsync\.thread"):
        end().result(PATIENCE)
    with pytest.raises(RuntimeError, match=r"unsync\.thread"):
        Unfuture.from_value(1).then(lambda _: unsync.shutdown()).result(PATIENCE)
    assert unsync.loop is loop
    assert add_async(1, 2).result(PATIENCE) == 3


def test_shutdown_in_a_thread_function_does_not_wait_for_itself() -> None:
    thread = unsync.thread
    unsync(lambda: unsync.shutdown())().result(PATIENCE)
    assert not thread.is_alive()
    assert add(1, 2).result(PATIENCE) == 3


def test_shutdown_leaves_assigned_executors_to_their_owners() -> None:
    threads, processes = Inline(), Inline()
    unsync.thread_executor = threads
    unsync.process_executor = processes
    assert add(1, 2).result(PATIENCE) == 3
    assert unsync.shutdown(timeout=PATIENCE) is True
    assert not threads.closed
    assert not processes.closed
    assert unsync.thread_executor is threads
    assert unsync.process_executor is processes
    assert add(1, 2).result(PATIENCE) == 3


def test_shutdown_works_in_spite_of_a_broken_task_factory(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    unfuture = gate.coroutine()
    assert gate.begun.wait(PATIENCE)

    def factory(*args: object, **options: object) -> asyncio.Task[Any]:
        raise OSError("no task today")

    unsync.loop.call_soon_threadsafe(unsync.loop.set_task_factory, factory)
    gate.open.set()
    assert unsync.shutdown(timeout=PATIENCE) is True
    assert unfuture.cancelled()
    assert gate.ended.is_set()
    assert caplog.records == []


def test_concurrent_shutdowns_both_wait_for_a_coroutine_that_cleans_up(
    gate: Gate, in_thread: InThread, caplog: pytest.LogCaptureFixture
) -> None:
    unfuture = gate.coroutine()
    assert gate.begun.wait(PATIENCE)
    answers: list[tuple[bool, bool]] = []

    def end() -> None:
        answers.append((unsync.shutdown(timeout=PATIENCE), gate.ended.is_set()))

    first = in_thread(end)
    assert gate.cancelled.wait(PATIENCE)
    second = in_thread(end)
    second.join(0.1)  # one that does not wait has returned by then
    gate.open.set()
    for thread in (first, second):
        thread.join(PATIENCE)
    assert answers == [(True, True)] * 2
    assert unfuture.cancelled()
    assert caplog.records == []


def test_concurrent_shutdowns_both_wait_for_a_running_function(
    gate: Gate, in_thread: InThread
) -> None:
    gate.function()
    assert gate.begun.wait(PATIENCE)
    thread = unsync.thread
    answers: list[tuple[bool, bool]] = []

    def end() -> None:
        answers.append((unsync.shutdown(timeout=PATIENCE), gate.ended.is_set()))

    threads = [in_thread(end)]
    thread.join(PATIENCE)  # the first one has come to the threads
    threads.append(in_thread(end))
    threads[-1].join(0.1)  # one that does not wait has returned by then
    assert unsync.shutdown(timeout=0.05) is False
    gate.open.set()
    for each in threads:
        each.join(PATIENCE)
    assert answers == [(True, True)] * 2


def test_a_running_function_may_call_shutdown_during_another_one(
    gate: Gate, in_thread: InThread
) -> None:
    ended = threading.Event()

    @unsync
    def function() -> None:
        gate.begun.set()
        assert gate.open.wait(PATIENCE)
        unsync.shutdown(timeout=PATIENCE)
        ended.set()

    function()
    assert gate.begun.wait(PATIENCE)
    thread = unsync.thread
    ending = in_thread(unsync.shutdown)
    thread.join(PATIENCE)  # the other one has come to the threads
    gate.open.set()
    assert ended.wait(PATIENCE / 2), "each waits for the other"
    ending.join(PATIENCE)
    assert not ending.is_alive()


def test_calls_during_a_shutdown_end_one_way_or_the_other(in_thread: InThread) -> None:
    """Some run, some are cancelled, some start the next loop: nobody hangs."""
    end = threading.Event()
    calls = [0, 0]
    results: list[int] = []

    def call(index: int) -> None:
        while not end.is_set():
            calls[index] += 1
            with suppress(concurrent.futures.CancelledError):
                results.append((add_async, add)[index](1, 2).result(PATIENCE))

    def have_called_more_often_than(seen: list[int]) -> bool:
        return all(now > before for now, before in zip(calls, seen, strict=True))

    threads = [in_thread(partial(call, index)) for index in range(2)]
    try:
        for _ in range(10):
            wait_until(partial(have_called_more_often_than, calls.copy()), "more calls")
            assert unsync.shutdown(timeout=PATIENCE) is True
    finally:
        end.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert set(results) == {3}


@pytest.mark.usefixtures("fresh")
def test_an_interrupted_start_of_the_loop_is_used_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _ = unsync.loop

    @unsync
    async def coroutine() -> threading.Thread:
        return threading.current_thread()

    assert coroutine().result(PATIENCE) is unsync.thread
    assert [thread.name for thread in threading.enumerate()].count("unsync") == 1


@pytest.mark.usefixtures("fresh")
def test_the_default_process_pool_is_replaced_after_somebody_shut_it_down() -> None:
    marked = unsync(cpu_bound=True)(abs)
    assert marked(-1).result(PATIENCE) == 1
    shut_down = unsync.process_executor
    shut_down.shutdown()
    assert marked(-2).result(PATIENCE) == 2
    assert unsync.process_executor is not shut_down
