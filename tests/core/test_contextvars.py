"""The caller's context variables, wherever its calls end up running."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar, Token, copy_context
from typing import Any

import pytest
from support.waiting import PATIENCE

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


# An empty context: where nothing was ever set, each call has an empty one of its own.


def names_seen(*_: object) -> list[str]:
    """What is set there; sets something itself."""
    seen = [variable.name for variable in copy_context()]
    variable.set("set in a call")
    return seen


async def names_seen_async(*_: object) -> list[str]:
    seen = names_seen()
    await asyncio.sleep(0)
    assert variable.get() == "set in a call"
    return seen


EMPTY_PLACES: dict[str, Callable[[], Unfuture[list[str]]]] = {
    "thread": lambda: unsync(names_seen)(),
    "thread, with keywords": lambda: unsync(lambda **_: names_seen())(word=1),
    "coroutine": lambda: unsync(names_seen_async)(),
    "bare coroutine": lambda: Unfuture(names_seen_async()),
    "then": lambda: Unfuture.from_value(1).then(names_seen),
    "map": lambda: Unfuture.from_value(1).map(names_seen),
    "coroutine of then": lambda: Unfuture.from_value(1).then(names_seen_async),
    "coroutine of map": lambda: Unfuture.from_value(1).map(names_seen_async),
    "unsynced continuation": lambda: Unfuture.from_value(1).then(unsync(names_seen)),
}

empty_places = pytest.mark.parametrize("call", EMPTY_PLACES.values(), ids=EMPTY_PLACES)


@pytest.fixture
def one_worker(fresh: None) -> Iterator[None]:
    """Every function runs in the same thread."""
    with ThreadExecutor(1) as executor:
        unsync.thread_executor = executor
        yield
        unsync.thread_executor = None


@empty_places
@pytest.mark.usefixtures("one_worker")
def test_a_call_from_an_empty_context_leaves_nothing_to_the_next_one(
    call: Callable[[], Unfuture[list[str]]],
) -> None:
    def one_by_one() -> list[list[str]]:
        return [call().result(PATIENCE) for _ in range(5)]

    def in_a_burst() -> list[list[str]]:
        return [unfuture.result(PATIENCE) for unfuture in [call() for _ in range(5)]]

    context = Context()
    for make_calls in one_by_one, in_a_burst:
        assert context.run(make_calls) == [[]] * 5
        assert len(context) == 0
    assert variable.get() == "caller"


@pytest.mark.usefixtures("one_worker")
def test_all_kinds_of_calls_from_an_empty_context_leave_nothing_to_each_other() -> None:
    kinds = list(EMPTY_PLACES.values())

    def make_calls() -> list[list[str]]:
        calls = [kind() for kind in kinds + kinds[::-1]]
        return [unfuture.result(PATIENCE) for unfuture in calls]

    assert Context().run(make_calls) == [[]] * 2 * len(kinds)


@empty_places
@pytest.mark.usefixtures("one_worker")
def test_empty_and_other_contexts_take_turns(call: Callable[[], Unfuture[list[str]]]) -> None:
    """A worker or a loop that has just run in one must not be in it any more for the next."""
    for _ in range(3):
        assert "variable" in call().result(PATIENCE)
        assert Context().run(call).result(PATIENCE) == []
        assert variable.get() == "caller"


@pytest.mark.usefixtures("one_worker")
def test_a_failure_in_an_empty_context_leaves_nothing_either() -> None:
    def fail(*_: object) -> None:
        names_seen()
        raise LookupError("lost")

    async def fail_async() -> None:
        fail()

    def make_calls() -> None:
        for call in (
            unsync(fail),
            unsync(fail_async),
            lambda: Unfuture.from_value(1).then(fail),
            lambda: Unfuture.from_value(1).map(fail),
        ):
            with pytest.raises(LookupError, match="lost"):
                call().result(PATIENCE)
            for seen in [place() for place in EMPTY_PLACES.values()]:
                assert seen.result(PATIENCE) == []

    Context().run(make_calls)


def test_nested_calls_from_an_empty_context_have_one_of_their_own_each() -> None:
    @unsync
    async def nest(levels: int) -> list[Any]:
        before = variable.get()
        variable.set(str(levels))
        below = await nest(levels - 1) if levels else []
        assert variable.get() == str(levels)
        return [before, *below]

    async def fresh(levels: int) -> Any:
        return await Context().run(nest, levels)

    for _ in range(2):
        assert Context().run(nest, 3).result(PATIENCE) == ["unset", "3", "2", "1"]
        assert unsync(fresh)(2).result(PATIENCE) == ["unset", "2", "1"]
    assert variable.get() == "caller"


@pytest.mark.parametrize("function", [names_seen, names_seen_async])
def test_a_call_has_a_context_of_its_own_and_not_its_callers(function: Any) -> None:
    """The very object: what the call sets must not show in a context that is used again."""
    context = Context()
    for _ in range(3):
        assert context.run(unsync(function)).result(PATIENCE) == []
    assert len(context) == 0
    context.run(variable.set, "mine")
    for _ in range(3):
        assert context.run(unsync(function)).result(PATIENCE) == ["variable"]
    assert context[variable] == "mine"


@pytest.mark.parametrize("where", ["thread", "ambient loop"])
def test_a_done_callback_added_in_an_empty_context(where: str) -> None:
    """Called in the loop it has a copy; called by a thread, it has what it finds there."""
    seen: Unfuture[list[str]] = Unfuture()
    source: Unfuture[None] = Unfuture()

    def add() -> None:
        source.add_done_callback(lambda _: seen.set_result(names_seen()))

    async def add_in_loop() -> None:
        Context().run(add)

    if where == "thread":
        Context().run(add)
        Context().run(source.set_result, None)
    else:
        unsync(add_in_loop)().result(PATIENCE)
        source.set_result(None)
    assert seen.result(PATIENCE) == []
    assert variable.get() == "caller"


# Continuations.


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
                print(look().result(60), variable.get())
        """
    )
    assert done.stdout.split() == ["first", "first", "second", "second"], done.stderr
