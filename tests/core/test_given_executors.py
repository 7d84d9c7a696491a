"""Executors that a callable gives, when they are first needed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool
from typing import Any
from unittest.mock import Mock

import pytest
from support.waiting import PATIENCE

from unsync import Unfuture, unsync
from unsync.executors import SingleThreadExecutor, ThreadExecutor

# Sets what gives an executor and returns a function that goes there.
PLACES: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "executor=": lambda function, give: unsync(function, executor=give),
    "thread_executor": lambda function, give: (
        setattr(unsync, "thread_executor", give) or unsync(function)  # type: ignore[func-returns-value]
    ),
    "process_executor": lambda function, give: (
        setattr(unsync, "process_executor", give) or unsync(function, cpu_bound=True)  # type: ignore[func-returns-value]
    ),
}

in_each_place = pytest.mark.parametrize("mark", PLACES.values(), ids=PLACES)


@pytest.fixture(autouse=True)
def nothing_is_left(fresh: None) -> None:
    pass


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2, thread_name_prefix="given") as executor:
        yield executor


def where() -> str:
    return threading.current_thread().name


@in_each_place
def test_it_is_called_at_the_first_call_and_once(mark: Any, pool: ThreadPoolExecutor) -> None:
    called = []

    def give() -> ThreadPoolExecutor:
        called.append(1)
        return pool

    marked = mark(where, give)
    assert called == []
    assert [marked().result(PATIENCE)[:5] for _ in range(3)] == ["given"] * 3
    assert called == [1]


@pytest.mark.parametrize("name", ["thread_executor", "process_executor"])
def test_asking_for_the_setting_is_a_first_use(name: str, pool: ThreadPoolExecutor) -> None:
    called = []
    setattr(unsync, name, lambda: called.append(1) or pool)  # type: ignore[func-returns-value]
    assert getattr(unsync, name) is pool
    assert unsync(where, cpu_bound=name == "process_executor")().result(PATIENCE)[:5] == "given"
    assert called == [1]


def call_at_once(marked: Callable[[], Unfuture[str]], in_thread: Any) -> None:
    """Eight threads call it, none before all are there; all calls run in what was given."""
    others_came = threading.Barrier(8)
    calls: list[Unfuture[str]] = []

    def call() -> None:
        others_came.wait(PATIENCE)
        calls.append(marked())

    for thread in [in_thread(call) for _ in range(8)]:
        thread.join(PATIENCE)
    assert [call.result(PATIENCE)[:5] for call in calls] == ["given"] * 8


@in_each_place
def test_it_is_called_once_by_many_threads(
    mark: Any, pool: ThreadPoolExecutor, in_thread: Any
) -> None:
    called = []

    def give() -> ThreadPoolExecutor:
        called.append(1)
        return pool

    marked = mark(where, give)
    call_at_once(marked, in_thread)
    assert called == [1]


@in_each_place
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyboardInterrupt])
def test_what_it_raises_is_raised_by_the_call_and_the_next_call_tries_again(
    mark: Any, pool: ThreadPoolExecutor, kind: type[BaseException]
) -> None:
    failures: list[BaseException] = [kind("first"), kind("second")]

    def give() -> ThreadPoolExecutor:
        if failures:
            raise failures.pop(0)
        return pool

    marked = mark(where, give)
    for message in ("first", "second"):
        with pytest.raises(kind, match=message):
            marked()
    assert marked().result(PATIENCE)[:5] == "given"


@in_each_place
@pytest.mark.parametrize("thing", [5, None, ThreadPoolExecutor], ids=repr)
def test_what_is_no_executor_is_a_type_error_that_names_it(mark: Any, thing: object) -> None:
    def give() -> object:
        return thing

    marked = mark(where, give)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"must give a concurrent\.futures\.Executor") as info:
            marked()
        assert repr(thing) in str(info.value)
        assert repr(give) in str(info.value)


def test_one_whose_submit_gives_no_future_is_named() -> None:
    executor = Mock(spec=Executor)
    marked = unsync(int, executor=executor)
    pending = unsync.stats().executors.pending
    with pytest.raises(TypeError, match=r"submit\(\) of <Mock .* gave no future, but <Mock "):
        marked()
    [call] = unsync.calls(marked, ["1"])
    with pytest.raises(TypeError, match="gave no future"):
        call.result(PATIENCE)
    assert unsync.stats().executors.pending == pending


@in_each_place
def test_a_class_of_executors_is_such_a_callable(mark: Any) -> None:
    marked = mark(where, ThreadPoolExecutor)
    assert marked().result(PATIENCE).startswith("ThreadPoolExecutor-")


def test_an_executor_that_can_be_called_is_an_executor() -> None:
    class CallableExecutor(ThreadExecutor):
        def __call__(self) -> None:
            raise AssertionError("nobody asked")

    with CallableExecutor(1, "callable") as executor:
        unsync.thread_executor = executor
        assert unsync(where)().result(PATIENCE) == "callable_0"


@in_each_place
def test_a_coroutine_function_can_call_there_first(mark: Any, pool: ThreadPoolExecutor) -> None:
    marked = mark(where, lambda: pool)

    @unsync
    async def main() -> str:
        return (await asyncio.gather(marked(), marked()))[0]  # type: ignore[no-any-return]

    assert main().result(PATIENCE)[:5] == "given"


def test_generator_functions_run_there(pool: ThreadPoolExecutor) -> None:
    @unsync(executor=lambda: pool)
    def names() -> Generator[str, None, None]:
        yield where()

    assert [name[:5] for name in names()] == ["given"]


def test_assigning_anew_asks_anew(pool: ThreadPoolExecutor) -> None:
    other = ThreadExecutor(1, "other")
    unsync.thread_executor = lambda: pool
    assert unsync(where)().result(PATIENCE)[:5] == "given"
    unsync.thread_executor = lambda: other
    assert unsync(where)().result(PATIENCE) == "other_0"
    unsync.thread_executor = None
    assert unsync(where)().result(PATIENCE).startswith("unsync-worker")
    other.shutdown()


def single() -> SingleThreadExecutor:
    return SingleThreadExecutor("single")


@in_each_place
@pytest.mark.parametrize("kind", [ThreadExecutor, ThreadPoolExecutor, single])
def test_it_is_called_again_after_what_it_gave_was_shut_down(
    mark: Any, kind: Callable[[], Executor]
) -> None:
    gave: list[Executor] = []

    def give() -> Executor:
        gave.append(kind())
        return gave[-1]

    marked = mark(where, give)
    for number in (1, 2, 3):
        assert [marked().result(PATIENCE) for _ in range(2)]
        assert len(gave) == number
        gave[-1].shutdown()


@in_each_place
def test_it_is_called_again_by_fan_out(mark: Any) -> None:
    gave: list[Executor] = []

    def give() -> Executor:
        gave.append(ThreadPoolExecutor(2))
        return gave[-1]

    marked = mark(abs, give)
    for number in (1, 2):
        assert [call.result(PATIENCE) for call in unsync.calls(marked, range(9))] == [*range(9)]
        assert sum(unsync.map(marked, range(9))) == 36
        assert len(gave) == number
        gave[-1].shutdown()


@pytest.mark.parametrize("name", ["thread_executor", "process_executor"])
def test_asking_for_the_setting_calls_it_again_too(name: str) -> None:
    setattr(unsync, name, ThreadPoolExecutor)
    first = getattr(unsync, name)
    first.shutdown()
    second = getattr(unsync, name)
    assert second is not first
    assert second.submit(where).result(PATIENCE)
    second.shutdown()


@in_each_place
def test_it_is_called_again_once_by_many_threads(mark: Any, in_thread: Any) -> None:
    gave: list[Executor] = []

    def give() -> Executor:
        gave.append(ThreadPoolExecutor(2, thread_name_prefix="given"))
        return gave[-1]

    marked = mark(where, give)
    assert marked().result(PATIENCE)
    gave[0].shutdown()
    call_at_once(marked, in_thread)
    assert len(gave) == 2
    gave[1].shutdown()


@in_each_place
def test_one_that_gives_again_what_was_shut_down_is_refused(
    mark: Any, pool: ThreadPoolExecutor
) -> None:
    marked = mark(where, lambda: pool)
    assert marked().result(PATIENCE)[:5] == "given"
    pool.shutdown()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="after shutdown"):
            marked()


@in_each_place
def test_one_that_broke_is_its_owner_s_affair_until_that_shuts_it_down(mark: Any) -> None:
    gave: list[ThreadPoolExecutor] = []

    def fail() -> None:
        raise OSError("no")

    def give() -> Executor:
        gave.append(ThreadPoolExecutor(1, initializer=None if gave else fail))
        return gave[-1]

    marked = mark(where, give)
    with pytest.raises(BrokenThreadPool):
        marked().result(PATIENCE)
    with pytest.raises(BrokenThreadPool):
        marked()
    assert len(gave) == 1
    gave[0].shutdown()
    assert marked().result(PATIENCE)
    gave[1].shutdown()


def test_another_s_runtime_error_calls_nothing_again() -> None:
    called = []

    class Refusing(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("not today")

    marked = unsync(where, executor=lambda: called.append(1) or Refusing())  # type: ignore[func-returns-value]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not today"):
            marked()
    assert called == [1]


def test_shutdown_leaves_it_to_its_owner(pool: ThreadPoolExecutor) -> None:
    unsync.thread_executor = lambda: pool
    assert unsync(where)().result(PATIENCE)[:5] == "given"
    assert unsync.shutdown(PATIENCE)
    assert pool.submit(where).result(PATIENCE)[:5] == "given"
    assert unsync(where)().result(PATIENCE)[:5] == "given"


def test_its_workers_are_asked_for() -> None:
    """As many chunks are sent as keep them all busy."""
    sent = []

    class Counting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            sent.append(1)
            return super().submit(*args, **kwargs)

    with Counting(16) as executor:
        chunks = []
        for engine in (executor, lambda: executor):
            sent.clear()
            marked = unsync(abs, executor=engine)
            assert [call.result(PATIENCE) for call in unsync.calls(marked, range(640))][-1] == 639
            chunks.append(len(sent))
    assert chunks == [64, 64]
