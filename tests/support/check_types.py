"""What type checkers must see. Not run, only checked: by mypy and by basedpyright, in `make lint`.

Both look at it as the oldest Python would, and as the newest, whose libraries have other types.

Each line with an ignore is an error that must be found: one that is not needed is an error, too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from typing import Any, TypeVar, assert_type

from unsync import AmbientContextManager, Stream, Unfuture, unsync

T = TypeVar("T")
N = TypeVar("N", int, str)
B = TypeVar("B", bound=float)

# Functions of every kind, however they are marked.


@unsync
async def coroutine(x: int, *, y: str = "") -> str:
    return y * x


@unsync
def function(x: int, *more: bytes, y: str = "") -> list[int]:
    return [x, len(more), len(y)]


@unsync(cpu_bound=True)
def in_process(x: float) -> float:
    return x


@unsync(executor=concurrent.futures.ThreadPoolExecutor)
def in_given_executor(x: float) -> bytes:
    return str(x).encode()


@unsync(executor=concurrent.futures.ThreadPoolExecutor())
def in_executor(x: float) -> bytes:
    return bytes(int(x))


@unsync()
async def with_parentheses(x: int) -> None:
    pass


@unsync
async def agen(x: int) -> AsyncIterator[str]:
    yield str(x)


@unsync(read_ahead=3)
async def agen_with_option(x: int) -> AsyncGenerator[str, None]:
    yield str(x)


@unsync
def gen(x: int) -> Generator[bytes, None, None]:
    yield bytes(x)


@unsync(read_ahead=3, executor=concurrent.futures.ThreadPoolExecutor())
def gen_with_options(x: int) -> Generator[bytes, None, None]:
    yield bytes(x)


@unsync
@contextlib.asynccontextmanager
async def manager(x: int) -> AsyncGenerator[str, None]:
    yield str(x)


def plain(x: int) -> str:
    return str(x)


assert_type(coroutine(1, y=""), Unfuture[str])
assert_type(function(1, b"", y=""), Unfuture[list[int]])
assert_type(in_process(1.0), Unfuture[float])
assert_type(in_executor(1.0), Unfuture[bytes])
assert_type(in_given_executor(1.0), Unfuture[bytes])
assert_type(unsync.thread_executor, concurrent.futures.Executor)
assert_type(with_parentheses(1), Unfuture[None])
assert_type(agen(1), Stream[str])
assert_type(agen_with_option(1), Stream[str])
assert_type(gen(1), Stream[bytes])
assert_type(gen_with_options(1), Stream[bytes])
assert_type(manager(1), AmbientContextManager[str])
assert_type(unsync(plain)(1), Unfuture[str])
assert_type(unsync(plain, cpu_bound=True)(1), Unfuture[str])
assert_type(unsync(functools.partial(plain))(1), Unfuture[str])
assert_type(unsync(len)([]), Unfuture[int])

coroutine()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
coroutine("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
coroutine(1, "")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
coroutine(1, z="")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
function(1, "")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
in_process("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
gen(b"")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
manager("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
unsync(1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
unsync(cpu_bound="yes")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
unsync(colour="red")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


# Methods, bound and through the class; above staticmethod and classmethod, and below them.


class Service:
    @unsync
    async def coroutine(self, x: int) -> str:
        return str(x)

    @unsync(cpu_bound=True)
    def function(self, x: int) -> str:
        return str(x)

    @unsync
    def values(self, x: int) -> Generator[str, None, None]:
        yield str(x)

    @unsync
    @contextlib.asynccontextmanager
    async def entered(self, x: int) -> AsyncGenerator[str, None]:
        yield str(x)

    @unsync
    @classmethod
    async def above_class(cls, x: int) -> str:
        return str(x)

    @classmethod
    @unsync
    def below_class(cls, x: int) -> str:
        return str(x)

    @unsync
    @staticmethod
    def above_static(x: int) -> str:
        return str(x)

    @staticmethod
    @unsync
    async def below_static(x: int) -> str:
        return str(x)


class Special(Service):
    pass


service = Special()
assert_type(service.coroutine(1), Unfuture[str])
assert_type(service.function(1), Unfuture[str])
assert_type(service.values(1), Stream[str])
assert_type(service.entered(1), AmbientContextManager[str])
assert_type(service.above_class(1), Unfuture[str])
assert_type(service.below_class(1), Unfuture[str])
assert_type(service.above_static(1), Unfuture[str])
assert_type(service.below_static(1), Unfuture[str])
assert_type(Special.coroutine(service, 1), Unfuture[str])
assert_type(Special.function(service, 1), Unfuture[str])
assert_type(Special.above_class(1), Unfuture[str])
assert_type(Special.below_class(1), Unfuture[str])
assert_type(Special.above_static(1), Unfuture[str])
assert_type(Special.below_static(1), Unfuture[str])

service.coroutine("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
service.function()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
service.above_class("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
service.below_static("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Special.below_class("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Special.above_static("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Generic functions.


@unsync
async def same(x: T) -> T:
    return x


@unsync
def twice(x: N) -> N:
    return x + x


@unsync
def first(values: Sequence[T]) -> T:
    return values[0]


@unsync(cpu_bound=True)
def last(values: Sequence[T]) -> T:
    return values[-1]


@unsync
def half(x: B) -> B:
    return x


@unsync
def all_of(values: Sequence[T]) -> list[T]:
    return list(values)


class Chooser:
    @unsync
    def first(self, values: Sequence[T]) -> T:
        return values[0]

    @unsync
    @staticmethod
    def last(values: Sequence[T]) -> T:
        return values[-1]


# The type variable stands alone: what mypy sees is `Any`, and it looks at no argument.
of_function: int = first([1]).result()
of_process: int = last([1]).result()
of_method: int = Chooser().first([1]).result()
of_static: int = Chooser().last([1]).result()
wrong: str = first([1]).result()  # pyright: ignore[reportAssignmentType]
first(1)  # pyright: ignore[reportArgumentType]

assert_type(half(1), Unfuture[int])
half("")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
assert_type(all_of([1]), Unfuture[list[int]])
assert_type(same(1), Unfuture[int])
assert_type(same([""]), Unfuture[list[str]])
assert_type(twice(""), Unfuture[str])


# Going on: what can be awaited is flattened.


def of_unfuture(source: Unfuture[str]) -> int:
    return len(source.result())


async def later(source: Unfuture[str]) -> int:
    return len(await source)


def chained(source: Unfuture[str]) -> Unfuture[int]:
    return source.map(len)


async def of_value(value: str) -> bytes:
    return value.encode()


@unsync
def marked(value: str) -> bytes:
    return value.encode()


text = coroutine(1)
assert_type(text.then(of_unfuture), Unfuture[int])
assert_type(text.then(later), Unfuture[int])
assert_type(text.then(chained), Unfuture[int])
assert_type(text.map(len), Unfuture[int])
assert_type(text.map(str.encode), Unfuture[bytes])
assert_type(text.map(of_value), Unfuture[bytes])
assert_type(text.map(marked), Unfuture[bytes])
assert_type(text.map(marked).map(len).map(float), Unfuture[float])

for _ in text:  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    pass
text.then(1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
text.map(of_unfuture)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]


# The Unfuture.

assert_type(text.result(), str)
assert_type(text.result(timeout=1), str)
assert_type(text.exception(), BaseException | None)
assert_type(text.done(), bool)
assert_type(text.future, asyncio.Future[str])
assert_type(text.concurrent_future, concurrent.futures.Future[str])
assert_type(Unfuture.from_value(1), Unfuture[int])
assert_type(Unfuture(text.future), Unfuture[str])
assert_type(Unfuture(text.concurrent_future), Unfuture[str])
assert_type(Unfuture(text), Unfuture[str])
assert_type(Unfuture(of_value("")), Unfuture[bytes])
by_hand: Unfuture[int] = Unfuture()
by_hand.set_result(1)
by_hand.set_result("")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
by_hand.set_exception(ValueError)
text.add_done_callback(of_unfuture)
as_callable: Callable[[int], Unfuture[str]] = coroutine


async def in_a_loop() -> None:
    assert_type(await text, str)
    assert_type(await coroutine(1), str)
    assert_type(await asyncio.wait_for(text, 1), str)
    assert_type(await asyncio.shield(text), str)
    assert_type(await asyncio.gather(text, function(1)), tuple[str, list[int]])
    texts = {number: coroutine(number) for number in range(3)}
    assert_type(await asyncio.wait([text]), tuple[set[Unfuture[str]], set[Unfuture[str]]])
    done, pending = await asyncio.wait(texts.values(), timeout=1)
    assert_type(done | pending, set[Unfuture[str]])
    await asyncio.wait([*texts.values(), asyncio.create_task(asyncio.sleep(1, ""))])
    for next_text in asyncio.as_completed(texts.values()):
        assert_type(await next_text, str)
    async with asyncio.timeout(1), asyncio.TaskGroup() as group:
        assert_type(group.create_task(in_a_loop()), asyncio.Task[None])
        group.create_task(text)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async for item in agen(1):
        assert_type(item, str)
    async for octets in gen(1):
        assert_type(octets, bytes)
    async with manager(1) as entered:
        assert_type(entered, str)
    async with asyncio.Lock() as nothing, AmbientContextManager(asyncio.Lock()) as other:
        assert_type((nothing, other), tuple[None, None])


texts = [coroutine(1), *unsync.calls(coroutine, [1])]
assert_type(concurrent.futures.wait(texts).done, set[concurrent.futures.Future[str]])
concurrent.futures.wait(set(texts), timeout=1, return_when=concurrent.futures.FIRST_COMPLETED)
for finished in concurrent.futures.as_completed(texts, timeout=1):
    assert_type(finished.result(), str)
concurrent.futures.wait([text, concurrent.futures.Future[str]()])
concurrent.futures.wait([1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

for value in agen(1):
    assert_type(value, str)
with gen(1) as stream:
    assert_type(next(stream), bytes)
with manager(1) as inside:
    assert_type(inside, str)

# The settings.

assert_type(unsync.loop, asyncio.AbstractEventLoop)
assert_type(unsync.shutdown(1), bool)
assert_type(unsync.shutdown(1, drain=True), bool)
assert_type(unsync.drain(), bool)
assert_type(unsync.exit_timeout, float | None)
unsync.exit_timeout = 2.5
unsync.exit_timeout = None
assert_type(unsync.stats().coroutines.pending, int)
assert_type(unsync.stats().loop_lag, float)
unsync.loop_factory = asyncio.new_event_loop
unsync.thread_executor = concurrent.futures.ThreadPoolExecutor(4)
unsync.thread_executor = concurrent.futures.ThreadPoolExecutor
unsync.thread_executor = None
unsync.process_executor = lambda: concurrent.futures.ProcessPoolExecutor(2)
unsync.process_executor = lambda: 4  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]
unsync.process_executor = 4  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
unsync.loop = asyncio.new_event_loop()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
anything: Any = unsync.process_executor


# Fan-out.

assert_type(unsync.calls(function, [1, 2]), list[Unfuture[list[int]]])
assert_type(unsync.calls(service.coroutine, range(2), chunksize=2), list[Unfuture[str]])
assert_type(unsync.map(in_process, [1.0]), Stream[float])
assert_type(unsync.map(coroutine, [1], in_order=False, read_ahead=3), Stream[str])
unsync.calls(function)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
unsync.calls(plain, [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
unsync.map(gen, [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# What says that it returns anything, or says nothing.


@unsync
async def anything_later(x: int) -> Any:
    return x


@unsync
def anything_at_all(x: int) -> Any:
    return x


assert_type(anything_later(1), Unfuture[Any])
assert_type(anything_at_all(1).result(), Any)
anything_at_all("")  # pyright: ignore[reportArgumentType]
