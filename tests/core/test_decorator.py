"""The decorator: what it can mark, what it keeps of it, and what runs where."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import inspect
import itertools
import logging
import math
import operator
import os
import pickle
import sys
import threading
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
from support.waiting import PATIENCE, collect, wait_until

from unsync import Stream, Unfuture, unsync
from unsync.executors import ThreadExecutor


class Inline(Executor):
    """Runs what it is given at once, and remembers it."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls.append((args, kwargs))
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def where(value: Any = None) -> tuple[Any, threading.Thread, int]:
    """What it got, and where it ran."""
    return value, threading.current_thread(), os.getpid()


async def async_where(value: Any = None) -> tuple[Any, threading.Thread, int]:
    await asyncio.sleep(0)
    return where(value)


def in_pool(thread: threading.Thread) -> bool:
    return thread.name.startswith("unsync-worker")


FORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "@unsync": lambda func: unsync(func),
    "@unsync()": lambda func: unsync()(func),
    "@unsync(cpu_bound=False)": lambda func: unsync(cpu_bound=False)(func),
    "@unsync(executor=None)": lambda func: unsync(executor=None)(func),
    "unsync(func, cpu_bound=False)": lambda func: unsync(func, cpu_bound=False),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_coroutine_function_runs_in_the_ambient_thread(form: Callable[..., Any]) -> None:
    unfuture = form(async_where)(1)
    assert isinstance(unfuture, Unfuture)
    value, thread, pid = unfuture.result(PATIENCE)
    assert (value, thread, pid) == (1, unsync.thread, os.getpid())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_regular_function_runs_in_a_thread_of_the_pool(form: Callable[..., Any]) -> None:
    unfuture = form(where)(1)
    assert isinstance(unfuture, Unfuture)
    value, thread, pid = unfuture.result(PATIENCE)
    assert (value, pid) == (1, os.getpid())
    assert in_pool(thread)


def test_it_can_be_written_above_a_function() -> None:
    @unsync
    async def one() -> int:
        return 1

    @unsync()
    def two() -> int:
        return 2

    assert (one().result(PATIENCE), two().result(PATIENCE)) == (1, 2)


@unsync(cpu_bound=True)
def pid_of(value: int, **more: int) -> tuple[int, int]:
    return os.getpid(), value + sum(more.values())


@pytest.mark.usefixtures("fresh")
def test_a_cpu_bound_function_runs_in_another_process() -> None:
    unfuture = pid_of(1, self=2, function=3)
    assert isinstance(unfuture, Unfuture)
    pid, value = unfuture.result(PATIENCE)
    assert pid != os.getpid()
    assert value == 6
    assert unsync(cpu_bound=True)(math.hypot)(3, 4).result(PATIENCE) == 5
    assert unsync(functools.partial(pow, 2), cpu_bound=True)(10).result(PATIENCE) == 1024
    assert unsync(os.getpid, cpu_bound=True)().result(PATIENCE) != os.getpid()


def test_a_function_runs_in_the_executor_it_was_given() -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as executor:
        unfuture = unsync(executor=executor)(where)(1)
        assert isinstance(unfuture, Unfuture)
        value, thread, _ = unfuture.result(PATIENCE)
    assert value == 1
    assert thread.name.startswith("mine")


def test_any_kind_of_executor_will_do() -> None:
    executor = Inline()
    assert unsync(where, executor=executor)(5).result(PATIENCE)[0] == 5
    assert executor.calls == [((5,), {})]


def test_a_function_keeps_its_executor_alive() -> None:
    marked = unsync(executor=type(unsync.thread_executor)(1, "kept"))(where)
    collect()
    _, thread, _ = marked().result(PATIENCE)
    assert thread.name.startswith("kept")
    del marked
    collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


# What can be marked.


class Sync:
    def __call__(self, value: int) -> tuple[Any, threading.Thread, int]:
        """Adds one."""
        return where(value + 1)


class Async:
    async def __call__(self, value: int) -> tuple[Any, threading.Thread, int]:
        return await async_where(value + 1)


class Host:
    def method(self, value: int) -> tuple[Any, threading.Thread, int]:
        return where(value + 1)

    async def async_method(self, value: int) -> tuple[Any, threading.Thread, int]:
        return await async_where(value + 1)


def add(one: int, other: int) -> tuple[Any, threading.Thread, int]:
    return where(one + other)


async def async_add(one: int, other: int) -> tuple[Any, threading.Thread, int]:
    return await async_where(one + other)


@pytest.mark.parametrize(
    "func",
    [
        functools.partial(add, 1),
        functools.partial(functools.partial(add), other=1),
        functools.partial(Sync()),
        Sync(),
        Sync().__call__,
        Host().method,
        lambda value: where(value + 1),
    ],
    ids=["partial", "nested-partial", "partial-object", "object", "call", "method", "lambda"],
)
def test_callables_run_in_the_pool(func: Callable[..., Any]) -> None:
    value, thread, _ = unsync(func)(4).result(PATIENCE)
    assert value == 5
    assert in_pool(thread)


@pytest.mark.parametrize(
    "func",
    [
        functools.partial(async_add, 1),
        functools.partial(functools.partial(async_add), other=1),
        functools.partial(Async()),
        Async(),
        Async().__call__,
        Host().async_method,
    ],
    ids=["partial", "nested-partial", "partial-object", "object", "call", "method"],
)
def test_async_callables_run_in_the_ambient_thread(func: Callable[..., Any]) -> None:
    value, thread, _ = unsync(func)(4).result(PATIENCE)
    assert value == 5
    assert thread is unsync.thread


@pytest.mark.parametrize(
    ("builtin", "args", "expected"),
    [(len, ([1, 2],), 2), (int, ("7",), 7), (str.upper, ("a",), "A"), ([3].count, (3,), 1)],
    ids=["function", "class", "descriptor", "bound"],
)
def test_builtins_can_be_marked(
    builtin: Callable[..., Any], args: tuple[Any, ...], expected: object
) -> None:
    assert unsync(builtin)(*args).result(PATIENCE) == expected


def test_an_object_that_has_every_attribute_is_no_coroutine_function() -> None:
    assert unsync(Mock(return_value=3))().result(PATIENCE) == 3


def test_a_decorated_function_can_be_decorated_further() -> None:
    calls = []

    @unsync
    @functools.lru_cache
    def square(value: int) -> int:
        calls.append(value)
        return value * value

    assert [square(3).result(PATIENCE) for _ in range(2)] == [9, 9]
    assert calls == [3]


# Methods.


class Base:
    def __init__(self, name: str) -> None:
        self.name = name

    @unsync
    def regular(self, value: int) -> tuple[str, int]:
        return self.name, value

    @unsync
    async def coroutine(self, value: int) -> tuple[str, int]:
        return self.name, value

    @unsync
    @staticmethod
    def static_below(value: int) -> tuple[str, int]:
        return "static", value

    @staticmethod
    @unsync
    def static_above(value: int) -> tuple[str, int]:
        return "static", value

    @unsync
    @staticmethod
    async def static_coroutine(value: int) -> tuple[str, int]:
        return "static", value

    @unsync
    @classmethod
    def class_below(cls, value: int) -> tuple[str, int]:
        return cls.__name__, value

    @classmethod
    @unsync
    def class_above(cls, value: int) -> tuple[str, int]:
        return cls.__name__, value

    @unsync
    @classmethod
    async def class_coroutine(cls, value: int) -> tuple[str, int]:
        return cls.__name__, value

    @unsync(executor=Inline())
    @classmethod
    def class_with_option(cls, value: int) -> tuple[str, int]:
        return cls.__name__, value


class Derived(Base):
    pass


@pytest.mark.parametrize("name", ["regular", "coroutine"])
@pytest.mark.parametrize("cls", [Base, Derived])
def test_a_method_gets_its_instance(cls: type[Base], name: str) -> None:
    instance = cls("instance")
    assert getattr(instance, name)(1).result(PATIENCE) == ("instance", 1)
    assert getattr(cls, name)(instance, 2).result(PATIENCE) == ("instance", 2)
    assert getattr(cls, name)(instance, value=3).result(PATIENCE) == ("instance", 3)


@pytest.mark.parametrize("name", ["static_below", "static_above", "static_coroutine"])
@pytest.mark.parametrize("owner", [Base, Base("instance"), Derived, Derived("instance")])
def test_a_static_method_gets_no_instance(owner: Any, name: str) -> None:
    assert getattr(owner, name)(1).result(PATIENCE) == ("static", 1)


@pytest.mark.parametrize(
    "name", ["class_below", "class_above", "class_coroutine", "class_with_option"]
)
@pytest.mark.parametrize("cls", [Base, Derived])
def test_a_class_method_gets_the_class_it_was_looked_up_on(cls: type[Base], name: str) -> None:
    assert getattr(cls, name)(1).result(PATIENCE) == (cls.__name__, 1)
    assert getattr(cls("instance"), name)(2).result(PATIENCE) == (cls.__name__, 2)


def test_a_method_binds_as_functions_do() -> None:
    one, other = Base("one"), Base("other")
    method = one.regular
    assert inspect.ismethod(method)
    assert method.__self__ is one
    assert method.__func__ is Base.__dict__["regular"] is Base.regular
    assert method == one.regular
    assert hash(method) == hash(one.regular)
    assert method != other.regular
    assert method.__name__ == "regular"


def test_it_can_be_bound_by_hand() -> None:
    marked = unsync(add)
    assert marked.__get__(1)(2).result(PATIENCE)[0] == 3
    assert marked.__get__(1, int)(2).result(PATIENCE)[0] == 3
    assert marked.__get__(None, int) is marked
    by_class = unsync(classmethod(lambda cls, value: (cls, value)))
    assert by_class.__get__(1)(2).result(PATIENCE) == (int, 2)
    assert by_class.__get__(None, str)(2).result(PATIENCE) == (str, 2)


# What the wrapper keeps.


@unsync
def documented(value: int, *, word: str = "w") -> str:
    """Says a word."""
    return word * value


def test_the_wrapper_looks_like_the_function() -> None:
    function = documented.__wrapped__
    assert inspect.isfunction(function)
    assert documented.__name__ == documented.__qualname__ == "documented"
    assert documented.__doc__ == inspect.getdoc(documented) == "Says a word."
    assert documented.__module__ == __name__
    assert inspect.signature(documented) == inspect.signature(function)
    assert list(inspect.signature(documented).parameters) == ["value", "word"]
    assert documented.__annotations__ == function.__annotations__
    assert "documented" in repr(documented)


def test_a_method_keeps_its_qualified_name_and_signature() -> None:
    assert Base.regular.__qualname__ == "Base.regular"
    assert Base.static_below.__qualname__ == "Base.static_below"
    assert list(inspect.signature(Base.regular).parameters) == ["self", "value"]
    assert list(inspect.signature(Base("x").regular).parameters) == ["value"]
    assert list(inspect.signature(Base.class_below).parameters) == ["value"]


def test_a_function_keeps_its_attributes() -> None:
    def function() -> None:
        pass

    function.tags = ["a"]  # type: ignore[attr-defined]
    marked = unsync(function)
    assert marked.tags is function.tags  # type: ignore[attr-defined]
    marked.more = 1
    assert marked.more == 1


def test_it_is_an_instance_of_unsync() -> None:
    assert isinstance(documented, unsync)
    assert isinstance(Base.__dict__["class_below"], unsync)
    assert callable(documented)


def test_it_can_be_annotated_with_its_types() -> None:
    assert unsync[[int], str] is not None  # type: ignore[index]


# What frameworks ask before they call: whether they are to await what that gives. Before Python
# 3.12 asyncio alone knows a mark for it.
is_marked_as_awaited: Callable[[object], bool] = (
    inspect.iscoroutinefunction if sys.version_info >= (3, 12) else asyncio.iscoroutinefunction
)


class WithAsyncMethods:
    @unsync
    async def regular(self) -> object:
        return self

    @unsync
    @classmethod
    async def above(cls) -> object:
        return cls

    @staticmethod
    @unsync
    async def below() -> object:
        return None


class AsyncCallable:
    async def __call__(self) -> None: ...


def values() -> Generator[int, None, None]:
    yield 1


async def async_values() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    "marked",
    [
        unsync(async_where),
        unsync(functools.partial(async_where, 1)),
        unsync(AsyncCallable()),
        unsync(unsync(async_where)),
        unsync(WithAsyncMethods().regular),
        WithAsyncMethods.regular,
        WithAsyncMethods().regular,
        WithAsyncMethods().above,
        WithAsyncMethods().below,
    ],
)
def test_a_coroutine_function_says_that_it_is_awaited(marked: object) -> None:
    assert is_marked_as_awaited(marked)


@pytest.mark.parametrize(
    "marked",
    [
        unsync(where),
        unsync(where, cpu_bound=True),
        unsync(where, executor=Inline()),
        unsync(values),
        unsync(async_values),
        unsync(contextlib.asynccontextmanager(async_values)),
    ],
)
def test_others_do_not(marked: object) -> None:
    assert not is_marked_as_awaited(marked)


@pytest.mark.parametrize(
    ("function", "awaited"),
    [
        (where, True),
        (functools.partial(where, 1), True),
        (async_where, True),
        (len, True),
        (values, False),
        (async_values, False),
        (contextlib.asynccontextmanager(async_values), False),
    ],
)
def test_its_dunder_call_says_whether_what_it_gives_is_awaited(
    function: Callable[..., Any], awaited: bool
) -> None:
    """Some frameworks look there: of thread and process functions it is the only mark."""
    dunder: Any = unsync(function).__call__  # type: ignore[call-overload, operator]
    assert is_marked_as_awaited(dunder) is awaited
    assert inspect.signature(dunder) == inspect.signature(function)
    assert isinstance(dunder.__module__, str)


def test_the_dunder_call_of_a_method_takes_anything() -> None:
    """A mock of the class calls it without the first argument, and that of a function with it."""

    class Host:
        @unsync
        def method(self, value: int) -> int:
            return value

        @unsync
        @staticmethod
        def static(value: int) -> int:
            return value

    for method in Host.method, Host.static:
        assert list(inspect.signature(method.__call__).parameters) == ["args", "kwargs"]

    @unsync
    def function(value: int) -> int:
        return value

    assert list(inspect.signature(function.__call__).parameters) == ["value"]


@pytest.mark.parametrize("function", [where, async_where])
def test_a_wrapper_takes_over_the_functions_attributes_and_not_ours(
    function: Callable[..., Any],
) -> None:
    """It may wait for the result; and it is called itself, not what is in it."""
    marked = unsync(function)
    marked.tag = 1

    @functools.wraps(marked)
    def wrapper() -> object:
        return marked("inside").result(PATIENCE)[0]

    assert vars(wrapper).keys() - {*functools.WRAPPER_ASSIGNMENTS} == {"tag", "__wrapped__"}
    assert not is_marked_as_awaited(wrapper)
    assert not is_marked_as_awaited(wrapper.__call__)
    assert wrapper.__call__() == "inside"
    again = unsync(wrapper)
    assert not is_marked_as_awaited(again)
    assert again().result(PATIENCE) == "inside"
    assert vars(marked)["tag"] == 1


# A function that is marked again.


@pytest.mark.parametrize("function", [where, async_where, functools.partial(where), len])
def test_a_marked_function_that_is_marked_again_gives_what_the_function_gives(
    function: Callable[..., Any],
) -> None:
    once: Any = unsync(function)
    once.tag = 1
    again: Any = unsync(once)
    assert again is not once
    assert again.tag == 1
    assert again.__wrapped__ is function
    results = [marked("value").result(PATIENCE) for marked in (once, again)]
    assert results == [5, 5] or [value for value, *_ in results] == ["value"] * 2
    assert inspect.signature(again) == inspect.signature(once)
    assert is_marked_as_awaited(again) == is_marked_as_awaited(once)


def test_one_that_is_marked_again_without_options_keeps_those_that_it_has() -> None:
    asked = []
    executor = Inline()

    def give() -> Executor:
        asked.append(1)
        return executor

    once = unsync(where, executor=give)
    again = unsync(unsync()(once))
    me = threading.current_thread()
    assert [marked().result(PATIENCE)[1] for marked in (again, once)] == [me, me]
    assert asked == [1]


def test_one_that_is_marked_again_with_options_has_those() -> None:
    marked = unsync(unsync(where), executor=Inline())
    assert marked("value").result(PATIENCE)[:2] == ("value", threading.current_thread())
    elsewhere = unsync(marked, executor=ThreadPoolExecutor)
    assert elsewhere("value").result(PATIENCE)[1] is not threading.current_thread()
    with pytest.raises(TypeError, match=r"async_where cannot be marked with executor="):
        unsync(unsync(async_where), executor=Inline())
    with pytest.raises(TypeError, match=r"where cannot be marked with read_ahead="):
        unsync(unsync(where), read_ahead=2)


@pytest.mark.parametrize("function", [values, async_values])
def test_a_generator_function_that_is_marked_again_gives_a_stream(
    function: Callable[..., Any],
) -> None:
    for again in (unsync(unsync(function)), unsync(unsync(function), read_ahead=1)):
        with again() as stream:
            assert isinstance(stream, Stream)
            assert list(stream) == [1]


def test_methods_that_are_marked_again() -> None:
    class Service:
        regular = unsync(unsync(lambda self: self))
        of_class = unsync(unsync(classmethod(lambda cls: cls)))
        around_class = unsync(classmethod(unsync(lambda cls: cls)))  # type: ignore[arg-type]
        static = unsync(unsync(staticmethod(lambda: "static")))
        around_static = unsync(staticmethod(unsync(lambda: "static")))

    service: Any = Service()
    assert service.regular().result(PATIENCE) is service
    assert service.of_class().result(PATIENCE) is Service
    assert service.around_class().result(PATIENCE) is Service
    assert service.static().result(PATIENCE) == "static"
    assert service.around_static().result(PATIENCE) == "static"


def test_marking_what_binds_arguments_of_a_marked_function_marks_the_function_beneath() -> None:
    class Service:
        @unsync
        def regular(self, x: int) -> tuple[object, int]:
            return self, x

        @unsync
        async def coroutine(self, x: int) -> tuple[object, int]:
            return self, x

        @unsync
        @classmethod
        def of_class(cls, x: int) -> tuple[object, int]:
            return cls, x

    service: Any = Service()
    for again, owner in [
        (unsync(service.regular), service),
        (unsync(service.coroutine), service),
        (unsync(service.of_class), Service),
        (unsync(functools.partial(Service.regular, service)), service),
        (unsync(functools.partial(service.coroutine)), service),
        (unsync(functools.partial(functools.partial(service.regular), x=1)), service),
    ]:
        args = () if "x" in getattr(again.__wrapped__, "keywords", {}) else (1,)
        assert again(*args).result(PATIENCE) == (owner, 1)
    with pytest.raises(TypeError, match=r"coroutine function .* marked with executor="):
        unsync(service.coroutine, executor=Inline())
    executor = Inline()
    elsewhere = unsync(functools.partial(unsync(where, executor=executor), "value"))
    assert elsewhere().result(PATIENCE)[1] is threading.current_thread()


def test_a_subclass_that_has_its_own_way_to_be_called_is_left_alone() -> None:
    class Traced(unsync):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args)

    inner = unsync(Traced(where))("value").result(PATIENCE)
    assert isinstance(inner, Unfuture)
    assert inner.result(PATIENCE)[0] == "value"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("marked", [documented, pid_of, Base.regular, Base.static_below])
def test_the_wrapper_pickles_by_name(marked: Any, protocol: int) -> None:
    if "." in marked.__qualname__ and protocol < 4:
        pytest.skip("dotted names came with protocol 4")
    data = pickle.dumps(marked, protocol)
    assert pickle.loads(data) is marked


def test_a_wrapper_without_a_name_refuses_to_be_pickled() -> None:
    with pytest.raises(pickle.PicklingError, match=r"partial.* no name"):
        pickle.dumps(unsync(functools.partial(add, 1)))


def test_the_wrapper_copies_as_itself() -> None:
    assert copy.copy(documented) is documented
    assert copy.deepcopy([documented])[0] is documented
    assert copy.copy(local := unsync(lambda: None)) is local


# Arguments.


@pytest.mark.parametrize("is_async", [False, True], ids=["regular", "coroutine"])
@pytest.mark.parametrize("option", [None, "executor"])
def test_arguments_pass_through(is_async: bool, option: str | None) -> None:
    def regular(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    async def coroutine(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    if is_async and option:
        pytest.skip("coroutine functions take no executor")
    marked = unsync(coroutine if is_async else regular)
    if option:
        marked = unsync(regular, executor=Inline())
    names = {"self": 1, "func": 2, "function": 3, "executor": 4, "cpu_bound": 5, "fn": 6, "args": 7}
    assert marked().result(PATIENCE) == ((), {})
    assert marked(1, 2).result(PATIENCE) == ((1, 2), {})
    assert marked(**names).result(PATIENCE) == ((), names)
    assert marked(1, **names).result(PATIENCE) == ((1,), names)


def arguments(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What came: keywords in their order."""
    return args, list(kwargs.items())


async def async_arguments(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return arguments(*args, **kwargs)


NO_NAMES: dict[str, int] = {}
SOME_NAMES = {"z": 3, "a": 4}
MANY_NAMES = {f"name{number}": number for number in range(300)}
CLASHES = dict.fromkeys(["self", "args", "kwargs", "function", "func", "fn", "names", "executor"])

# Ways to call: what a marked function gets must be what a plain one gets.
CALLS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "nothing": lambda f: f(),
    "one": lambda f: f(1),
    "some": lambda f: f(1, "2", None),
    "keyword": lambda f: f(word=1),
    "keywords": lambda f: f(z=1, a=2, m=3),
    "mixed": lambda f: f(1, 2, z=3, a=4),
    "stars": lambda f: f(*(1, 2), **SOME_NAMES),
    "empty stars": lambda f: f(*(), **NO_NAMES),
    "all at once": lambda f: f(1, *(2, 3), y=4, **SOME_NAMES, b=6),
    "many": lambda f: f(*range(300)),
    "many names": lambda f: f(**MANY_NAMES),
    "many of both": lambda f: f(*range(300), **MANY_NAMES),
    "many names in another order": lambda f: f(**dict(reversed(MANY_NAMES.items()))),
    "clashes": lambda f: f(**CLASHES),
    "clashes after one": lambda f: f(1, **CLASHES),
    "odd names": lambda f: f(**{"": 1, "a b": 2, "ä": 3, "class": 4}),
    "partial": lambda f: functools.partial(f)(),
    "partial with arguments": lambda f: functools.partial(f, 1, z=2)(3, a=4),
    "partial, overridden": lambda f: functools.partial(f, z=1, a=2)(z=3, b=4),
    "bound": lambda f: types.MethodType(f, "self")(1, a=2),
    "bound, nothing": lambda f: types.MethodType(f, "self")(),
    "bound, partial": lambda f: functools.partial(types.MethodType(f, "self"), 1)(z=2),
    "dunder": lambda f: f.__call__(1, z=2, a=3),
    "by its class": lambda f: type(f).__call__(f, 1, z=2, self=3),
    "map": lambda f: next(map(f, [1], [2])),
    "starmap": lambda f: next(itertools.starmap(f, [(1, 2, 3)])),
    "context": lambda f: contextvars.copy_context().run(f, 1, z=2),
}

by_all_ways = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
A_POOL = ThreadPoolExecutor(1)
MARKS: dict[str, Callable[[], Any]] = {
    "function": lambda: unsync(arguments),
    "coroutine": lambda: unsync(async_arguments),
    "own executor": lambda: unsync(arguments, executor=A_POOL),
    "own executor of ours": lambda: unsync(arguments, executor=type(unsync.thread_executor)(1)),
}


@pytest.fixture(scope="module", autouse=True)
def closed_in_the_end() -> Iterator[None]:
    yield
    A_POOL.shutdown()


marked_all_ways = pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)


@by_all_ways
@marked_all_ways
def test_arguments_come_as_in_a_plain_call(
    call: Callable[[Any], Any], mark: Callable[[], Any]
) -> None:
    assert call(mark()).result(PATIENCE) == call(arguments)


class PlainHost:
    def named(self, one: int, /, other: int = 2, *args: Any, word: str, **more: Any) -> Any:
        assert isinstance(self, PlainHost)
        return one, other, args, word, list(more.items())

    static = staticmethod(arguments)

    @classmethod
    def by_class(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.__name__.replace("Marked", "Plain"), arguments(*args, **kwargs)


class MarkedHost(PlainHost):
    named = unsync(PlainHost.named)  # type: ignore[assignment]
    static = unsync(staticmethod(arguments))
    by_class = unsync(PlainHost.__dict__["by_class"])
    regular = unsync(arguments)
    coroutine = unsync(async_arguments)


METHOD_CALLS: dict[str, Callable[[Any], Any]] = {
    "named": lambda host: host.named(1, word="w"),
    "named, all": lambda host: host.named(1, 3, 4, 5, z=6, word="w", self=7, one=8, a=9),
    "by the class": lambda host: type(host).named(host, 1, word="w"),
    "partial of a bound one": lambda host: functools.partial(host.named, 1, word="w")(3, self=4),
    "static": lambda host: host.static(1, self=2),
    "static by the class": lambda host: type(host).static(1, cls=2),
    "by_class": lambda host: host.by_class(1, self=2),
    "by_class by the class": lambda host: type(host).by_class(1, args=2),
    "map of a static one": lambda host: next(map(host.static, [1])),
    "methodcaller": lambda host: operator.methodcaller("named", 1, word="w", z=2)(host),
}


@pytest.mark.parametrize("call", METHOD_CALLS.values(), ids=METHOD_CALLS)
def test_arguments_come_as_in_a_plain_methods_call(call: Callable[[Any], Any]) -> None:
    assert call(MarkedHost()).result(PATIENCE) == call(PlainHost())


@pytest.mark.parametrize("name", ["regular", "coroutine"])
def test_a_method_gets_its_instance_first_and_any_name_after_it(name: str) -> None:
    host = MarkedHost()
    expected = (host, 1), [("self", 2), ("args", 3)]
    assert getattr(host, name)(1, self=2, args=3).result(PATIENCE) == expected
    assert getattr(MarkedHost, name)(host, 1, self=2, args=3).result(PATIENCE) == expected


def test_marked_functions_are_called_by_map() -> None:
    for mark in MARKS.values():
        calls = list(map(mark(), range(100), range(100, 200)))
        assert [call.result(PATIENCE) for call in calls] == [
            ((number, number + 100), []) for number in range(100)
        ]


@marked_all_ways
def test_keywords_that_are_no_strings_are_refused_at_the_call(mark: Callable[[], Any]) -> None:
    for call in (lambda f: f(**{1: 2}), lambda f: f(1, a=2, **{None: 3})):
        with pytest.raises(TypeError, match="keywords must be strings"):
            call(mark())


@pytest.mark.parametrize("setting", ["executor", "thread_executor", "process_executor"])
def test_an_executor_hears_of_no_keywords(fresh: None, setting: str) -> None:
    """Some would take them for their own: Dask's has `key` and `priority`."""
    executor = Inline()
    if setting == "executor":
        marked = unsync(arguments, executor=executor)
    else:
        setattr(unsync, setting, executor)
        marked = unsync(arguments, cpu_bound=setting == "process_executor")
    assert marked().result(PATIENCE) == ((), [])
    assert marked(1).result(PATIENCE) == ((1,), [])
    assert marked(1, a=2).result(PATIENCE) == ((1,), [("a", 2)])
    assert executor.calls == [((), {}), ((1,), {}), ((1,), {})]


# Subclasses.


class Traced(unsync):  # type: ignore[misc, valid-type]
    """One that has its own way to be called."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("calls", []).append((args, list(kwargs.items())))
        return super().__call__(*args, **kwargs)


class Silent(unsync):  # type: ignore[misc, valid-type]
    """One that has not."""


@by_all_ways
@pytest.mark.parametrize("function", [arguments, async_arguments])
def test_a_subclass_can_have_its_own_way_to_be_called(
    call: Callable[[Any], Any], function: Callable[..., Any]
) -> None:
    marked = Traced(function)
    assert isinstance(marked, unsync)
    assert call(marked).result(PATIENCE) == call(arguments)
    assert marked.calls == [call(arguments)]
    assert call(Silent(function)).result(PATIENCE) == call(arguments)


@pytest.mark.parametrize("function", [arguments, async_arguments])
def test_a_subclass_can_be_given_another_way_to_be_called_later(
    function: Callable[..., Any],
) -> None:
    class Late(unsync):  # type: ignore[misc, valid-type]
        pass

    class Later(Late):
        pass

    marked, further = Late(function), Later(function)
    for one in marked, further:
        assert one(1, a=2).result(PATIENCE) == ((1,), [("a", 2)])
    Late.__call__ = lambda self, *args, **kwargs: (self, args, kwargs)
    for one in marked, further, Late(function):
        assert one(1, a=2) == (one, (1,), {"a": 2})
        assert next(map(one, [1])) == (one, (1,), {})
        assert functools.partial(one, 1)(a=2) == (one, (1,), {"a": 2})
        assert one.__get__(1)(2) == (one, (1, 2), {})
    del Late.__call__
    for one in marked, further, Late(function):
        assert one(1, a=2).result(PATIENCE) == ((1,), [("a", 2)])


def test_each_call_gets_keyword_arguments_of_its_own() -> None:
    given = {"a": [1]}
    result = unsync(lambda **kwargs: kwargs)(**given).result(PATIENCE)
    assert result == given
    assert result is not given


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda marked: marked(), "missing 1 required positional argument: 'one'"),
        (lambda marked: marked(1, 2, 3), "takes .* positional arguments"),
        (lambda marked: marked(1, one=2), "multiple values for argument 'one'"),
        (lambda marked: marked(1, three=3), "unexpected keyword argument 'three'"),
        (lambda marked: functools.partial(marked, 1)(2, 3), "takes .* positional arguments"),
        (lambda marked: marked.__get__(1)(2, 3), "takes .* positional arguments"),
    ],
)
def test_a_coroutine_function_refuses_wrong_arguments_at_the_call(
    call: Callable[[Any], Any], words: str
) -> None:
    async def function(one: int, other: int = 0, *, word: str = "") -> int:
        return one + other

    with pytest.raises(TypeError, match=rf"function\(\).*{words}"):
        call(unsync(function))
    assert unsync(function)(1, other=2).result(PATIENCE) == 3


def test_a_regular_function_refuses_wrong_arguments_through_its_unfuture() -> None:
    with pytest.raises(TypeError, match="where"):
        unsync(where)(1, 2, 3).result(PATIENCE)


# What is refused, and what is ignored.


@pytest.mark.parametrize(
    "func",
    [async_where, functools.partial(async_where), Async().__call__, staticmethod(async_where)],
    ids=["function", "partial", "method", "static"],
)
@pytest.mark.parametrize(
    ("options", "word"),
    [({"cpu_bound": True}, "cpu_bound"), ({"executor": Inline()}, "executor")],
    ids=["cpu_bound", "executor"],
)
def test_a_coroutine_function_for_an_executor_is_a_type_error_that_names_it(
    func: Any, options: dict[str, Any], word: str
) -> None:
    name = "__call__" if inspect.ismethod(func) else "async_where"
    for mark in (lambda: unsync(**options)(func), lambda: unsync(func, **options)):
        with pytest.raises(TypeError, match=name) as info:
            mark()
        assert word in str(info.value)


@pytest.mark.parametrize("thing", [5, "text", None, [], staticmethod(5), classmethod(5)])
def test_what_is_not_callable_is_a_type_error_that_names_it(thing: Any) -> None:
    name = "5" if isinstance(thing, classmethod | staticmethod) else repr(thing)
    for mark in (lambda: unsync(thing), lambda: unsync()(thing)):
        with pytest.raises(TypeError, match="unsync") as info:
            mark()
        assert name in str(info.value) or repr(thing) in str(info.value)


@pytest.mark.parametrize("executor", [5, "threads", []])
def test_what_is_no_executor_is_a_type_error_that_names_it(executor: Any) -> None:
    with pytest.raises(TypeError, match="executor") as info:
        unsync(executor=executor)(where)
    assert repr(executor) in str(info.value)


def test_an_unknown_option_is_ignored_with_a_warning_that_names_it() -> None:
    with pytest.warns(RuntimeWarning, match="'colour'") as warned:
        marked = unsync(colour="red")(where)
    assert [warning.filename for warning in warned] == [__file__]
    assert marked(1).result(PATIENCE)[0] == 1
    with pytest.warns(RuntimeWarning, match="'colour'") as warned:
        marked = unsync(async_where, colour="red")
    assert [warning.filename for warning in warned] == [__file__]
    assert marked(1).result(PATIENCE)[1] is unsync.thread


def test_what_runs_where_is_decided_at_decoration() -> None:
    class Changing:
        def __call__(self) -> threading.Thread:
            return threading.current_thread()

    marked = unsync(Changing())

    def call(self: Changing) -> Generator[int, None, None]:
        yield 1

    Changing.__call__ = call  # type: ignore[assignment, method-assign]
    result: Any = marked().result(PATIENCE)
    assert inspect.isgenerator(result), "it gave a stream"


# How coroutines run.


def test_a_call_from_inside_the_ambient_loop_is_queued_and_not_started_at_once() -> None:
    order: list[str] = []

    @unsync
    async def inner(name: str) -> None:
        order.append(name)

    @unsync
    async def outer() -> None:
        one, other = inner("one"), inner("other")
        order.append("called")
        await other
        await one
        order.append("awaited")

    outer().result(PATIENCE)
    assert order == ["called", "one", "other", "awaited"]


def test_calls_from_another_thread_start_in_their_order() -> None:
    order: list[int] = []

    @unsync
    async def note(number: int) -> None:
        order.append(number)

    for unfuture in [note(number) for number in range(100)]:
        unfuture.result(PATIENCE)
    assert order == list(range(100))


def test_a_coroutine_runs_in_a_task_named_after_the_function() -> None:
    async def name() -> str:
        task = asyncio.current_task()
        assert task is not None
        assert task.get_loop() is unsync.loop
        return task.get_name()

    assert unsync(name)().result(PATIENCE) == name.__qualname__


@pytest.fixture
def task_factory(fresh: None) -> Iterator[Callable[[Callable[..., Any]], None]]:
    def install(factory: Callable[..., Any]) -> None:
        async def set_it() -> None:
            unsync.loop.set_task_factory(factory)

        unsync(set_it)().result(PATIENCE)

    return install


def test_a_task_factory_of_the_user_is_honoured(
    task_factory: Callable[[Callable[..., Any]], None],
) -> None:
    class Task(asyncio.Task):  # type: ignore[type-arg]
        pass

    def factory(
        loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> Task:
        return Task(coro, loop=loop, **options)

    task_factory(factory)

    async def name() -> tuple[type, str]:
        task = asyncio.current_task()
        assert task is not None
        return type(task), task.get_name()

    assert unsync(name)().result(PATIENCE) == (Task, name.__qualname__)


def test_the_caller_hears_of_a_task_factory_that_raises(
    task_factory: Callable[[Callable[..., Any]], None],
) -> None:
    def factory(*args: Any, **options: Any) -> asyncio.Task[Any]:
        raise OSError("no task today")

    task_factory(factory)
    with pytest.raises(OSError, match="no task today"):
        unsync(async_where)().result(PATIENCE)
    assert unsync(where)(1).result(PATIENCE)[0] == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_interrupt_in_a_coroutine_reaches_the_caller_and_the_loop_survives(
    kind: type[BaseException], steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    loop, thread = unsync.loop, unsync.thread

    @unsync
    async def interrupted() -> None:
        for _ in range(steps):
            await asyncio.sleep(0)
        raise kind("now")

    @unsync
    async def other() -> int:
        for _ in range(5):
            await asyncio.sleep(0)
        return 1

    others = [other() for _ in range(3)]
    unfuture = interrupted()
    others += [other() for _ in range(3)]
    error = unfuture.exception(PATIENCE)
    assert type(error) is kind
    assert error.args == ("now",)
    with pytest.raises(kind, match="now"):
        unfuture.result(PATIENCE)
    assert [unfuture.result(PATIENCE) for unfuture in others] == [1] * 6
    assert other().result(PATIENCE) == 1
    assert (unsync.loop, unsync.thread) == (loop, thread)
    del unfuture, error
    collect()
    unsync(async_where)().result(PATIENCE)  # the loop has said what it had to say
    assert caplog.records == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_thread_function_reaches_the_caller_and_the_thread_survives(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with type(unsync.thread_executor)(1) as executor:

        @unsync(executor=executor)
        def interrupted() -> None:
            raise kind("now")

        before = unsync(where, executor=executor)().result(PATIENCE)[1]
        with pytest.raises(kind, match="now"):
            interrupted().result(PATIENCE)
        assert unsync(where, executor=executor)().result(PATIENCE)[1] is before
    assert caplog.records == []


def test_a_class_is_refused() -> None:
    """Made in a thread it would be an Unfuture, and its methods would stay plain."""
    with pytest.raises(TypeError, match=r"cannot mark the class .*Client: .*mark those"):

        @unsync
        class Client:
            async def get(self) -> int:
                return 1


def test_what_is_a_class_in_name_only_is_a_function() -> None:
    assert unsync(int)("5").result(PATIENCE) == 5


# A regular function that returns a coroutine, since its decorator knows none.

number_seen: contextvars.ContextVar[int] = contextvars.ContextVar("number_seen", default=0)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        number_seen.set(number_seen.get() + 1)
        return function(*args)

    return wrapper


@logged
async def double(number: int) -> int:
    assert threading.current_thread() is unsync.thread
    await asyncio.sleep(0)
    if number < 0:
        raise ValueError(number)
    return 2 * number + number_seen.get()


@pytest.fixture(params=["ours", "foreign"])
def double_in_pool(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Unfuture[Any]]]:
    kind = ThreadExecutor if request.param == "ours" else ThreadPoolExecutor
    with kind(1) as executor:
        yield unsync(double, executor=executor)


def test_a_coroutine_that_a_function_returns_is_run(
    double_in_pool: Callable[[int], Unfuture[Any]],
) -> None:
    token = number_seen.set(100)

    async def main() -> Any:
        return await double_in_pool(4)

    assert double_in_pool(3).result(PATIENCE) == 107
    assert asyncio.run(main()) == 109
    assert double_in_pool(3).map(str).result(PATIENCE) == "107"
    with pytest.raises(ValueError, match="-5"):
        double_in_pool(-5).result(PATIENCE)
    assert [call.result(PATIENCE) for call in unsync.calls(double_in_pool, range(3))] == [
        101,
        103,
        105,
    ]
    assert list(unsync.map(double_in_pool, range(3))) == [101, 103, 105]
    number_seen.reset(token)


def test_the_thread_is_free_while_such_a_coroutine_runs() -> None:
    with ThreadExecutor(1, spare_workers=0) as executor:

        @unsync(executor=executor)
        def inner() -> int:
            return 3

        async def wait_for_inner() -> int:
            return await inner()

        @unsync(executor=executor)
        def outer() -> Coroutine[Any, Any, int]:
            return wait_for_inner()

        assert outer().result(PATIENCE) == 3  # type: ignore[comparison-overlap]


@pytest.mark.alone  # what it counts
def test_such_a_call_is_counted_as_a_function_and_as_a_coroutine() -> None:
    wait_until(lambda: unsync.stats().threads.pending == unsync.stats().coroutines.pending == 0)
    before = unsync.stats()
    unsync(double)(1).result(PATIENCE)
    wait_until(lambda: unsync.stats().threads.finished == before.threads.finished + 1)
    wait_until(lambda: unsync.stats().coroutines.finished == before.coroutines.finished + 1)
    assert unsync.stats().threads.pending == before.threads.pending


@pytest.mark.parametrize("place", ["thread", "loop"])
def test_such_a_coroutine_is_cancelled_with_the_call(place: str) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        try:
            await asyncio.sleep(1000)
        finally:
            ended.set()

    async def cancel() -> None:
        task = asyncio.ensure_future(_awaited(call))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def _awaited(awaitable: Any) -> object:
        return await awaitable

    call = unsync(lambda: wait())()
    assert begun.wait(PATIENCE)
    if place == "thread":
        wait_until(call.cancel)  # its function may not have ended yet
    else:
        asyncio.run(cancel())
    assert ended.wait(PATIENCE)
    with pytest.raises(asyncio.CancelledError):
        call.result(PATIENCE)
