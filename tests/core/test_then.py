"""`then` and `map`: going on from an Unfuture without waiting for it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import ACCELERATED, Unfuture, unsync

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

# A recursion as deep would end in Python, or crash in C.
LINKS = 100_000 if ACCELERATED else 10_000

# Both are built before the source is done, and after it.
before_and_after = pytest.mark.parametrize("built", ["before", "after"])
both = pytest.mark.parametrize("method", ["then", "map"])


def failed(error: BaseException) -> Unfuture[Any]:
    unfuture = Unfuture[Any]()
    unfuture.set_exception(error)
    return unfuture


def in_this_thread(function: Callable[[], Any]) -> Any:
    return function()


def in_the_ambient_loop(function: Callable[[], Any]) -> Any:
    """Calls `function` in `unsync.thread`, and waits there for the Unfuture it returns."""

    @unsync
    async def call() -> Any:
        return await function()

    return call()


def continued(built: str, finish: Callable[[Unfuture[Any]], object], method: str, fn: Any) -> Any:
    source = Unfuture[Any]()
    if built == "before":
        unfuture = getattr(source, method)(fn)
        assert not unfuture.done()
        finish(source)
    else:
        finish(source)
        unfuture = getattr(source, method)(fn)
    return unfuture


# What a continuation gets, and where it runs.


@before_and_after
def test_then_passes_the_finished_source_itself(built: str) -> None:
    sources = []

    def look(source: Unfuture[int]) -> int:
        sources.append(source)
        return source.result()

    seen = continued(
        built, lambda source: (sources.append(source), source.set_result(1)), "then", look
    )
    assert seen.result(PATIENCE) == 1
    assert sources[0] is sources[1]


@before_and_after
def test_map_passes_the_result(built: str) -> None:
    value = object()
    unfuture = continued(built, lambda source: source.set_result(value), "map", lambda got: [got])
    assert unfuture.result(PATIENCE) == [value]


@both
@before_and_after
@pytest.mark.parametrize("place", [in_this_thread, in_the_ambient_loop])
def test_it_runs_in_the_ambient_thread(
    method: str, built: str, place: Callable[[Callable[[], Any]], Any]
) -> None:
    def where(_: object) -> threading.Thread:
        return threading.current_thread()

    unfuture = place(lambda: continued(built, lambda source: source.set_result(1), method, where))
    assert unfuture.result(PATIENCE) is unsync.thread


def test_it_never_runs_inside_then_itself() -> None:
    order = []

    @unsync
    async def main() -> None:
        unfuture = Unfuture.from_value(1).map(lambda _: order.append("continued"))
        order.append("made")
        await unfuture

    main().result(PATIENCE)
    assert order == ["made", "continued"]


@both
def test_it_runs_in_the_context_where_it_was_added(method: str) -> None:
    name = ContextVar("name", default="nobody")
    source = Unfuture[int]()

    async def ask(_: object) -> str:
        await asyncio.sleep(0)
        return name.get()

    def add() -> tuple[Unfuture[str], Unfuture[str]]:
        name.set("the adder")
        return getattr(source, method)(lambda _: name.get()), getattr(source, method)(ask)

    def finish() -> None:
        name.set("the finisher")
        source.set_result(1)

    plain, coroutine = copy_context().run(add)
    copy_context().run(finish)
    assert (plain.result(PATIENCE), coroutine.result(PATIENCE)) == ("the adder", "the adder")


@both
def test_a_continuation_must_be_callable(method: str) -> None:
    with pytest.raises(TypeError, match="continuation must be callable, not 42"):
        getattr(Unfuture(), method)(42)


def test_several_continuations_of_one_source_are_called_in_order() -> None:
    source = Unfuture[int]()
    order: list[int] = []
    waiting = [source.then(lambda _, number=number: order.append(number)) for number in range(50)]
    source.set_result(1)
    waiting += [source.then(lambda _, number=number: order.append(number)) for number in (50, 51)]
    for unfuture in waiting:
        unfuture.result(PATIENCE)
    assert order == list(range(52))


def test_source_and_continuation_are_separate() -> None:
    source = Unfuture[int]()
    unfuture = source.map(lambda value: value + 1)
    assert unfuture is not source
    source.set_result(1)
    assert (unfuture.result(PATIENCE), source.result(PATIENCE)) == (2, 1)


# What passes by.


@both
@before_and_after
def test_it_is_skipped_when_the_source_failed(method: str, built: str) -> None:
    error = LookupError("lost")
    called = []
    unfuture = continued(built, lambda source: source.set_exception(error), method, called.append)
    assert unfuture.exception(PATIENCE) is error
    assert unfuture.then(called.append).map(called.append).exception(PATIENCE) is error
    assert called == []


@both
@before_and_after
def test_it_is_skipped_when_the_source_was_cancelled(method: str, built: str) -> None:
    called = []
    unfuture = continued(built, lambda source: source.cancel("enough"), method, called.append)
    with pytest.raises(asyncio.CancelledError, match="enough"):
        unfuture.result(PATIENCE)
    assert unfuture.cancelled()
    assert called == []


def test_cancelling_it_cancels_the_source() -> None:
    source = Unfuture[int]()
    called = []
    unfuture = source.then(called.append)
    assert unfuture.cancel()
    assert unfuture.cancelled()
    assert source.cancelled()
    assert called == []


def test_one_that_was_cancelled_is_not_called() -> None:
    source = Unfuture[int]()
    called = []
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert leave.wait(PATIENCE)

    unsync.loop.call_soon_threadsafe(hold)
    assert entered.wait(PATIENCE)
    source.set_result(1)
    unfuture = source.then(called.append)
    assert unfuture.cancel()
    leave.set()
    Unfuture.from_value(1).then(called.append).result(PATIENCE)
    assert len(called) == 1
    assert called[0] is not source


@both
def test_what_a_continuation_raises_is_the_outcome(method: str) -> None:
    error = LookupError("lost")

    def breaks(_: object) -> None:
        raise error

    unfuture = getattr(Unfuture.from_value(1), method)(breaks)
    assert unfuture.exception(PATIENCE) is error
    assert not unfuture.cancelled()


@both
def test_a_continuation_that_raises_cancelled_error_is_cancelled(method: str) -> None:
    def cancels(_: object) -> None:
        raise asyncio.CancelledError("enough")

    unfuture = getattr(Unfuture.from_value(1), method)(cancels)
    with pytest.raises(asyncio.CancelledError, match="enough"):
        unfuture.result(PATIENCE)
    assert unfuture.cancelled()


@both
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_continuation_that_raises_an_exit_does_not_end_the_loop(
    method: str, kind: type[BaseException]
) -> None:
    def leaves(_: object) -> None:
        raise kind("leaving")

    thread = unsync.thread
    source = Unfuture.from_value(1)
    unfuture, other = getattr(source, method)(leaves), source.map(str)
    with pytest.raises(kind, match="leaving"):
        unfuture.result(PATIENCE)
    assert other.result(PATIENCE) == "1"
    assert unsync.thread is thread


# What a continuation returns is flattened.


class Steps:
    """An awaitable that is no coroutine."""

    def __await__(self) -> Generator[Any, None, int]:
        yield from asyncio.sleep(0).__await__()
        return 42


@types.coroutine
def old_style() -> Generator[Any, None, int]:
    yield
    return 42


async def coroutine() -> int:
    await asyncio.sleep(0)
    return 42


def asyncio_future() -> asyncio.Future[int]:
    future = asyncio.get_running_loop().create_future()
    future.get_loop().call_soon(future.set_result, 42)
    return future


def task() -> asyncio.Task[int]:
    return asyncio.ensure_future(coroutine())


def pending() -> Unfuture[int]:
    unfuture = Unfuture[int]()
    asyncio.get_running_loop().call_soon(unfuture.set_result, 42)
    return unfuture


@unsync
def in_a_thread() -> int:
    return 42


@both
@pytest.mark.parametrize(
    "make",
    [
        lambda: Unfuture.from_value(42),
        pending,
        unsync(coroutine),
        in_a_thread,
        coroutine,
        asyncio_future,
        task,
        Steps,
        old_style,
        lambda: pending().then(lambda source: source),
        lambda: Unfuture.from_value(Unfuture.from_value(42)).map(lambda inner: inner),
    ],
    ids=[
        "finished unfuture",
        "pending unfuture",
        "coroutine call",
        "thread function",
        "coroutine",
        "asyncio future",
        "task",
        "awaitable",
        "generator-based coroutine",
        "continuation that returns its source",
        "unfuture in an unfuture",
    ],
)
def test_an_awaitable_is_flattened(method: str, make: Callable[[], Any]) -> None:
    unfuture = getattr(Unfuture.from_value(None), method)(lambda _: make())
    assert unfuture.result(PATIENCE) == 42


@pytest.mark.parametrize(
    "value", [iter([1]), (number for number in [1]), concurrent.futures.Future(), coroutine, None]
)
def test_what_is_not_awaitable_is_the_result_itself(value: object) -> None:
    assert Unfuture.from_value(1).then(lambda _: value).result(PATIENCE) is value


@both
@pytest.mark.parametrize(
    "value",
    [
        True,
        bytearray(b"1"),
        b"1",
        1j,
        {"a": 1},
        1.5,
        frozenset({1}),
        10**30,
        [1],
        {1},
        "text",
        (1, 2),
        None,
        object(),
        int,
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_comes_through_as_it_is(method: str, value: object) -> None:
    assert getattr(Unfuture.from_value(1), method)(lambda _: value).result(PATIENCE) is value


@both
@pytest.mark.parametrize("container", [list, tuple, set, frozenset])
def test_an_awaitable_in_a_container_is_left_there(
    method: str, container: Callable[..., Any]
) -> None:
    inner = Unfuture[int]()
    result = getattr(Unfuture.from_value(1), method)(lambda _: container([inner])).result(PATIENCE)
    assert list(result) == [inner]
    assert not inner.done()


AWAITABLE_VALUES = [
    type(f"Awaitable{kind.__name__}", (kind,), {"__await__": Steps.__await__})
    for kind in (int, str, bytes, bytearray, float, complex, tuple, list, dict, set, frozenset)
]


@both
@pytest.mark.parametrize("kind", AWAITABLE_VALUES)
def test_a_value_that_can_be_awaited_is_flattened(method: str, kind: type) -> None:
    assert getattr(Unfuture.from_value(1), method)(lambda _: kind()).result(PATIENCE) == 42


@both
@pytest.mark.parametrize("kind", AWAITABLE_VALUES)
def test_a_value_of_a_class_that_cannot_be_awaited_comes_through(method: str, kind: type) -> None:
    value = type("Plain", kind.__bases__, {})()
    assert getattr(Unfuture.from_value(1), method)(lambda _: value).result(PATIENCE) is value


@both
def test_a_generator_based_coroutine_is_awaited_and_a_generator_is_not(method: str) -> None:
    def steps() -> Generator[None, None, int]:
        seen.append("begun")
        yield
        return 42

    seen: list[str] = []
    source = Unfuture.from_value(1)
    generator = getattr(source, method)(lambda _: steps()).result(PATIENCE)
    assert isinstance(generator, types.GeneratorType)
    assert seen == []
    assert getattr(source, method)(lambda _: types.coroutine(steps)()).result(PATIENCE) == 42
    assert seen == ["begun"]


class Duck:
    """A future by asyncio's own definition: it has `_asyncio_future_blocking`."""

    _asyncio_future_blocking = False

    def __init__(self) -> None:
        self.future = asyncio.get_running_loop().create_future()
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self.future, name)


class DuckInt(int):
    """A value that is a future too: the future counts."""

    _asyncio_future_blocking = False
    future: asyncio.Future[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.future, name)


@both
@pytest.mark.parametrize("done_before", [True, False])
@pytest.mark.parametrize("kind", [Duck, DuckInt])
def test_what_asyncio_takes_for_a_future_is_followed(
    method: str, done_before: bool, kind: type
) -> None:
    ducks: list[Any] = []

    def make(_: object) -> Any:
        duck = kind()
        duck.future = asyncio.get_running_loop().create_future()
        assert asyncio.isfuture(duck)
        if done_before:
            duck.future.set_result(42)
        ducks.append(duck)
        return duck

    unfuture = getattr(Unfuture.from_value(1), method)(make)
    if not done_before:
        wait_until(lambda: ducks)
        Unfuture.from_value(1).map(str).result(PATIENCE)
        assert not unfuture.done()
        unsync.loop.call_soon_threadsafe(ducks[0].future.set_result, 42)
    assert unfuture.result(PATIENCE) == 42


@both
def test_cancelling_cancels_what_asyncio_takes_for_a_future(method: str) -> None:
    ducks: list[Duck] = []

    def make(_: object) -> Any:
        ducks.append(Duck())
        return ducks[0]

    unfuture = getattr(Unfuture.from_value(1), method)(make)
    wait_until(lambda: ducks)
    Unfuture.from_value(1).map(str).result(PATIENCE)
    assert unfuture.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        unfuture.result(PATIENCE)
    assert ducks[0].future.cancelled()
    assert "cancel" in ducks[0].asked


@pytest.mark.parametrize("make", [unsync(coroutine), coroutine, pending, Steps, asyncio_future])
def test_flattening_waits_before_the_next_continuation(make: Callable[[], Any]) -> None:
    unfuture = Unfuture.from_value(None).then(lambda _: make()).then(lambda flat: flat.result() + 1)
    assert unfuture.result(PATIENCE) == 43


def test_a_flattened_failure_passes_on() -> None:
    error = LookupError("lost")

    async def breaks(_: object) -> None:
        raise error

    for continuation in (lambda _: failed(error)), breaks, unsync(breaks):
        unfuture = Unfuture.from_value(1).then(continuation)
        assert unfuture.exception(PATIENCE) is error


def test_a_flattened_cancellation_passes_on() -> None:
    inner = Unfuture[int]()
    unfuture = Unfuture.from_value(1).then(lambda _: inner)
    inner.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        unfuture.result(PATIENCE)
    assert unfuture.cancelled()


def test_cancelling_cancels_what_the_continuation_returned() -> None:
    entered, seen = threading.Event(), threading.Event()

    async def waits(_: object) -> None:
        entered.set()
        try:
            await Unfuture()
        except asyncio.CancelledError:
            seen.set()
            raise

    for continuation in waits, unsync(waits):
        entered.clear()
        seen.clear()
        unfuture = Unfuture.from_value(1).then(continuation)
        assert entered.wait(PATIENCE)
        assert unfuture.cancel()
        with pytest.raises(asyncio.CancelledError):
            unfuture.result(PATIENCE)
        assert seen.wait(PATIENCE)


def test_a_continuation_cannot_return_what_waits_for_it() -> None:
    source = Unfuture[int]()
    itself: list[Unfuture[Any]] = []
    itself.append(source.then(lambda _: itself[0]))
    source.set_result(1)
    with pytest.raises(TypeError, match="cannot return the Unfuture that waits for it"):
        itself[0].result(PATIENCE)


@pytest.mark.parametrize("kind", ["continuation", "call"])
def test_a_coroutine_that_cancels_its_own_unfuture_in_its_first_step_sees_it(kind: str) -> None:
    """There is no task yet that could be cancelled."""
    itself: list[Unfuture[None]] = []
    seen = []

    async def cancels(_: object) -> None:
        assert itself[0].cancel("enough")
        try:
            await Unfuture()
        except asyncio.CancelledError as exc:
            seen.append(exc.args)
            raise

    async def begin() -> bool:
        # In the ambient loop, where nothing begins before this coroutine has gone on.
        source = Unfuture.from_value(1)
        itself.append(source.then(cancels) if kind == "continuation" else unsync(cancels)(source))
        await asyncio.wait(itself)
        return itself[0].cancelled()

    assert Unfuture(begin()).result(PATIENCE)
    assert seen == [("enough",)]


@pytest.fixture
def future_of_a_closed_loop() -> asyncio.Future[int]:
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    loop.close()
    return future


@both
def test_a_continuation_that_returns_what_cannot_be_awaited_fails(
    method: str, future_of_a_closed_loop: asyncio.Future[int]
) -> None:
    unfuture = getattr(Unfuture.from_value(1), method)(lambda _: future_of_a_closed_loop)
    with pytest.raises(RuntimeError, match="loop is closed"):
        unfuture.result(PATIENCE / 4)


def test_flattening_nests_deeply() -> None:
    def count_down(number: int) -> Any:
        return number and Unfuture.from_value(number - 1).map(count_down)

    assert Unfuture.from_value(10_000).map(count_down).result(PATIENCE) == 0


# Functions marked with @unsync as continuations.


def test_a_thread_function_as_continuation() -> None:
    @unsync
    def double(source: Unfuture[int]) -> Any:
        return threading.current_thread(), source.result() * 2

    thread, result = Unfuture.from_value(21).then(double).result(PATIENCE)
    assert result == 42
    assert thread not in (unsync.thread, threading.current_thread())


def test_a_coroutine_function_as_continuation() -> None:
    @unsync
    async def double(source: Unfuture[int]) -> int:
        assert source.done()
        return await source * 2

    assert Unfuture.from_value(21).then(double).result(PATIENCE) == 42


def test_a_function_marked_with_map_gets_the_result() -> None:
    assert Unfuture.from_value("42").map(unsync(int)).result(PATIENCE) == 42


@unsync(cpu_bound=True)
def doubled_in_a_process(source: Unfuture[int]) -> Any:
    return multiprocessing.parent_process() is not None, source.done(), source.result() * 2


@pytest.fixture
def a_process() -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        unsync.process_executor = executor
        yield
        unsync.process_executor = None


@pytest.mark.usefixtures("a_process")
def test_a_cpu_bound_function_as_continuation_gets_the_finished_source_too() -> None:
    unfuture = in_a_thread().then(doubled_in_a_process)
    assert unfuture.result(2 * PATIENCE) == (True, True, 84)


# Long chains and wide fans.


def chain_of(links: int, method: str, built: str, outcome: Any) -> Unfuture[Any]:
    source = Unfuture[Any]()

    def finish() -> None:
        if isinstance(outcome, Exception):
            source.set_exception(outcome)
        else:
            source.set_result(outcome)

    if built == "after":
        finish()
    unfuture = source
    if method == "then":
        for _ in range(links):
            unfuture = unfuture.then(lambda finished: finished.result() + 1)
    else:
        for _ in range(links):
            unfuture = unfuture.map(lambda value: value + 1)
    if built == "before":
        finish()
    return unfuture


@pytest.mark.parametrize(
    ("method", "built"), [("then", "before"), ("then", "after"), ("map", "before")]
)
def test_a_long_chain(method: str, built: str) -> None:
    assert chain_of(LINKS, method, built, 0).result(PATIENCE) == LINKS


@both
@before_and_after
def test_a_long_chain_built_in_the_ambient_loop(method: str, built: str) -> None:
    chain = in_the_ambient_loop(lambda: chain_of(10_000, method, built, 0))
    assert chain.result(PATIENCE) == 10_000


@pytest.mark.parametrize(("built", "links"), [("before", LINKS), ("after", LINKS // 5)])
def test_a_long_chain_that_a_failure_passes_through(built: str, links: int) -> None:
    error = LookupError("lost")
    assert chain_of(links, "then", built, error).exception(PATIENCE) is error


def test_a_long_chain_in_the_ambient_loop_that_a_failure_passes_through() -> None:
    error = LookupError("lost")
    chain = in_the_ambient_loop(lambda: chain_of(10_000, "map", "before", error))
    assert chain.exception(PATIENCE) is error


def test_cancelling_the_end_of_a_long_chain() -> None:
    source = unfuture = Unfuture[int]()
    for _ in range(LINKS):
        unfuture = unfuture.map(abs)
    assert unfuture.cancel()
    assert source.cancelled()


def test_a_fan_of_10_000() -> None:
    source = Unfuture[int]()
    fan = [source.map(lambda value, number=number: value + number) for number in range(10_000)]
    source.set_result(1)
    assert [unfuture.result(PATIENCE) for unfuture in fan] == list(range(1, 10_001))


# A crash would take the whole test run with it: these are programs of their own.


def test_dropping_a_pending_chain_of_100_000(run_python: RunPython) -> None:
    program = """
        import gc
        from unsync import Unfuture

        source = end = Unfuture()
        for _ in range(100_000):
            end = end.then(lambda source: source)
        source = end = None
        gc.collect()
        print(sum(isinstance(one, Unfuture) for one in gc.get_objects()))
    """
    done = run_python(program, timeout=2 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    if sys.implementation.name == "cpython":  # PyPy finalizes one of a chain in each round
        assert done.stdout == "0\n"


def test_looking_at_a_deep_nesting(run_python: RunPython) -> None:
    program = """
        from unsync import Unfuture

        source = outer = Unfuture()
        for _ in range(100_000):
            outer = Unfuture(outer)
        print(outer.running(), outer.done(), len(repr(outer)) < 1000)
        source.set_running_or_notify_cancel()
        print(outer.running())
        source.set_result(42)
        print(outer.running(), outer.done(), outer.result(0))
    """
    done = run_python(program)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["False False True", "True", "False True 42"]


# The examples of the project's page.


def test_then_example() -> None:
    @unsync
    async def initiate(request: int) -> int:
        await asyncio.sleep(0.001)
        return request + 1

    @unsync
    async def process(task: Unfuture[int]) -> int:
        await asyncio.sleep(0.001)
        return task.result() * 2

    assert initiate(3).then(process).result(PATIENCE) == 8


def test_mixing_methods_example() -> None:
    @unsync
    def non_async_function(num: int) -> tuple[int, int]:
        return num, num + 1

    @unsync
    async def result_continuation(task: Unfuture[tuple[int, int]]) -> tuple[int, int]:
        await asyncio.sleep(0.001)
        num, res = task.result()
        return num, res * 2

    @unsync
    async def result_processor(tasks: list[Unfuture[tuple[int, int]]]) -> dict[int, int]:
        output = {}
        for task in tasks:
            num, res = await task
            output[num] = res
        return output

    tasks = [non_async_function(i).then(result_continuation) for i in range(10)]
    assert result_processor(tasks).result(PATIENCE) == {i: (i + 1) * 2 for i in range(10)}


def test_the_work_ends_though_nobody_keeps_the_end_of_a_chain() -> None:
    ended = []
    gate = threading.Event()
    unsync(gate.wait)(PATIENCE).map(lambda value: [value]).map(ended.extend)
    gate.set()
    wait_until(lambda: ended == [True])


async def add_at_once(number: Any) -> Any:
    return number + 1


async def add_later(number: Any) -> Any:
    await asyncio.sleep(0.001)
    return number + 1


class AddLater:
    def __init__(self, number: Any) -> None:
        self.number = number

    def __await__(self) -> Generator[Any, None, Any]:
        return add_later(self.number).__await__()


@pytest.mark.parametrize(
    "continuation",
    [
        len,
        int,
        lambda unfuture: unfuture + 1,
        lambda unfuture: unfuture.real,
        add_at_once,
        add_later,
        AddLater,
        unsync(add_at_once),
        unsync(add_later),
        unsync(lambda unfuture: unfuture + 1),
        lambda unfuture: unsync(add_later)(unfuture).future,
    ],
)
def test_who_takes_the_unfuture_for_its_result_is_told_of_map(continuation: Any) -> None:
    exc = unsync(lambda: 20)().then(continuation).exception(PATIENCE)
    assert isinstance(exc, (TypeError, AttributeError))
    assert exc.__notes__ == [
        "then() gives the function the finished Unfuture; map() would give it its result"
    ]


def test_other_failures_have_no_such_note() -> None:
    def fail(_: object) -> None:
        raise TypeError("of another kind")

    call = unsync(lambda: 20)()

    async def fail_later(_: object) -> None:
        await asyncio.sleep(0)
        fail(_)

    for failed in [
        call.then(fail),
        call.then(fail_later),
        call.then(unsync(fail_later)),
        call.map(len),  # type: ignore[arg-type]
        call.map(lambda _: len(Unfuture())),  # type: ignore[arg-type]
        call.map(lambda _: add_at_once(Unfuture())),
        call.map(lambda _: add_later(Unfuture())),
        unsync(add_later)(Unfuture()),
    ]:
        assert not hasattr(failed.exception(PATIENCE), "__notes__")


def test_the_look_at_a_failure_runs_no_code_of_its_own() -> None:
    class Odd:
        def __str__(self) -> str:
            raise AssertionError("asked")

    failure = TypeError(Odd())

    def fail(_: object) -> None:
        raise failure

    async def fail_later(_: object) -> None:
        await asyncio.sleep(0)
        fail(_)

    call = unsync(lambda: 20)()
    for failed in [call.then(fail), call.then(fail_later), call.then(unsync(fail))]:
        assert failed.exception(PATIENCE) is failure


def test_what_failed_twice_is_told_of_map_once() -> None:
    call = unsync(lambda: 20)()
    first = call.then(unsync(add_later))
    exc = call.then(lambda _: first).exception(PATIENCE)
    assert exc is first.exception(PATIENCE)
    assert exc is not None
    assert len(exc.__notes__) == 1
