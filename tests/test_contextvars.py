"""The caller's context variables, wherever its calls end up running."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token, copy_context
from typing import Any

import pytest
from conftest import PATIENCE

from unsync import Unfuture, unsync
from unsync.executors import ThreadExecutor

variable: ContextVar[str] = ContextVar("variable", default="unset")


@pytest.fixture(autouse=True)
def caller() -> Iterator[None]:
    """The test, which is the caller, has a value of its own."""
    token: Token[str] = variable.set("caller")
    yield
    variable.reset(token)


@pytest.fixture
def pool() -> Iterator[concurrent.futures.Executor]:
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
        yield executor


def look(*_: object) -> str:
    """What is seen there; leaves another value behind."""
    seen = variable.get()
    variable.set("changed")
    return seen


async def look_async(*_: object) -> str:
    seen = look()
    await asyncio.sleep(0)
    assert variable.get() == "changed"
    return seen


async def look_async_later(*_: object) -> str:
    await asyncio.sleep(0)
    return look()


def in_thread() -> Unfuture[str]:
    return unsync(look)()


def in_method() -> Unfuture[str]:
    class Owner:
        look = unsync(look)

    return Owner().look()


def in_coroutine() -> Unfuture[str]:
    return unsync(look_async)()


def in_coroutine_later() -> Unfuture[str]:
    return unsync(look_async_later)()


def in_bare_coroutine() -> Unfuture[str]:
    return Unfuture(look_async())


def in_then() -> Unfuture[str]:
    return Unfuture.from_value(1).then(look)


def in_map() -> Unfuture[str]:
    return Unfuture.from_value(1).map(look)


def in_coroutine_of_then() -> Unfuture[str]:
    return Unfuture.from_value(1).then(look_async)


def in_coroutine_of_map() -> Unfuture[str]:
    return Unfuture.from_value(1).map(look_async_later)


def in_unsynced_continuation() -> Unfuture[str]:
    return Unfuture.from_value(1).then(unsync(look))


def in_own_executor() -> Unfuture[str]:
    return unsync(executor=ThreadExecutor(max_workers=1))(look)()


PLACES = [
    in_thread,
    in_method,
    in_coroutine,
    in_coroutine_later,
    in_bare_coroutine,
    in_then,
    in_map,
    in_coroutine_of_then,
    in_coroutine_of_map,
    in_unsynced_continuation,
    in_own_executor,
]

places = pytest.mark.parametrize("call", PLACES)


@places
def test_the_callers_variables_are_seen(call: Callable[[], Unfuture[str]]) -> None:
    assert call().result(PATIENCE) == "caller"


@places
def test_changes_are_seen_neither_by_the_caller_nor_by_the_next_call(
    call: Callable[[], Unfuture[str]],
) -> None:
    for _ in range(3):
        assert call().result(PATIENCE) == "caller"
        assert variable.get() == "caller"


@places
def test_each_call_sees_the_variables_of_its_own_moment(call: Callable[[], Unfuture[str]]) -> None:
    calls: list[Unfuture[str]] = []
    for number in range(20):
        variable.set(str(number))
        calls.append(call())
    variable.set("later")
    assert [unfuture.result(PATIENCE) for unfuture in calls] == [str(n) for n in range(20)]


@places
def test_a_context_that_somebody_is_in_counts(call: Callable[[], Unfuture[str]]) -> None:
    def call_inside() -> Unfuture[str]:
        variable.set("inside")
        return call()

    assert copy_context().run(call_inside).result(PATIENCE) == "inside"


@places
def test_a_call_in_the_ambient_loop_sees_the_calling_tasks_variables(
    call: Callable[[], Unfuture[str]],
) -> None:
    async def outer() -> tuple[str, str]:
        variable.set("task")
        return await call(), variable.get()

    assert Unfuture(outer()).result(PATIENCE) == ("task", "task")


@places
def test_a_call_in_a_foreign_loop_sees_the_calling_tasks_variables(
    call: Callable[[], Unfuture[str]],
) -> None:
    async def outer() -> tuple[str, str]:
        variable.set("task")
        return await call(), variable.get()

    assert asyncio.run(outer()) == ("task", "task")


@pytest.mark.parametrize("continue_", [Unfuture.then, Unfuture.map])
@pytest.mark.parametrize("function", [look, look_async])
def test_a_continuation_sees_the_variables_of_the_moment_it_was_given(
    continue_: Callable[..., Unfuture[str]], function: Callable[..., Any]
) -> None:
    source: Unfuture[int] = Unfuture()
    end = continue_(source, function)
    variable.set("later")
    copy_context().run(lambda: (variable.set("finishing"), source.set_result(1)))
    assert end.result(PATIENCE) == "caller"


def test_each_continuation_of_one_source_has_its_own_copy() -> None:
    source: Unfuture[int] = Unfuture()
    ends = [source.then(look) for _ in range(3)]
    source.set_result(1)
    assert [end.result(PATIENCE) for end in ends] == ["caller"] * 3


@pytest.mark.parametrize("cls", [concurrent.futures.ThreadPoolExecutor, ThreadExecutor])
def test_a_function_with_an_executor_of_its_own_sees_them(
    cls: Callable[..., concurrent.futures.Executor],
) -> None:
    with cls(max_workers=1) as executor:
        marked = unsync(executor=executor)(look)
        for value in ("first", "second"):
            variable.set(value)
            assert marked().result(PATIENCE) == value
            assert variable.get() == value


def test_a_cpu_bound_function_in_threads_sees_them(
    fresh: None, pool: concurrent.futures.Executor
) -> None:
    unsync.process_executor = pool
    marked = unsync(cpu_bound=True)(look)
    for value in ("first", "second"):
        variable.set(value)
        assert marked().result(PATIENCE) == value


def test_functions_under_an_assigned_executor_see_them(run_python: Any) -> None:
    # In a process of its own: what is assigned stays assigned.
    done = run_python(
        """
        import concurrent.futures, contextvars
        from unsync import unsync

        variable = contextvars.ContextVar("variable")

        @unsync
        def look():
            seen = variable.get()
            variable.set("changed")
            return seen

        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as executor:
            unsync.thread_executor = executor
            for value in ("first", "second"):
                variable.set(value)
                print(look().result(20), variable.get())
        """
    )
    assert done.stdout.split() == ["first", "first", "second", "second"], done.stderr
