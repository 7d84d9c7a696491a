"""Streams: marked generator functions, for threads and for loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import queue
import threading
import types
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
from support.waiting import PATIENCE, collect, wait_until

from unsync import Stream, Unfuture, streams, unsync

variable: ContextVar[str] = ContextVar("variable", default="unset")


class Boom(Exception):
    pass


@unsync
def regular(count: int) -> Generator[int, None, None]:
    yield from range(count)


@unsync
async def async_(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


@unsync
async def suspending(count: int) -> AsyncIterator[int]:
    for number in range(count):
        await asyncio.sleep(0)
        yield number


def marked(body: Callable[..., Any], kind: str, **options: Any) -> Callable[..., Stream[Any]]:
    """A generator function of either kind that does what the regular one `body` does."""
    if kind == "regular":
        return unsync(body, **options)

    @functools.wraps(body, assigned=["__name__", "__qualname__"])
    async def async_body(*args: Any) -> AsyncIterator[Any]:
        generator = body(*args)
        try:
            for value in generator:
                yield value
        finally:
            generator.close()

    del async_body.__wrapped__
    return unsync(async_body, **options)


both = pytest.mark.parametrize("kind", ["regular", "async"])


# Where a stream can be read.


def in_thread(stream: Stream[Any]) -> list[Any]:
    return list(stream)


async def read(stream: Stream[Any]) -> list[Any]:
    return [value async for value in stream]


def in_own_loop(stream: Stream[Any]) -> list[Any]:
    return asyncio.run(read(stream))


def in_uvloop(stream: Stream[Any]) -> list[Any]:
    loop = pytest.importorskip("uvloop").new_event_loop()
    try:
        found: list[Any] = loop.run_until_complete(read(stream))
    finally:
        loop.close()
    return found


def in_ambient_loop(stream: Stream[Any]) -> list[Any]:
    return unsync(read)(stream).result(PATIENCE)


def in_worker(stream: Stream[Any]) -> list[Any]:
    return unsync(in_thread)(stream).result(PATIENCE)


everywhere = pytest.mark.parametrize(
    "reader", [in_thread, in_own_loop, in_uvloop, in_ambient_loop, in_worker]
)


@everywhere
@pytest.mark.parametrize("function", [regular, async_, suspending])
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_all_values_come_in_order(
    function: Callable[[int], Stream[int]], count: int, reader: Callable[[Any], list[Any]]
) -> None:
    assert reader(function(count)) == list(range(count))


@everywhere
@both
@pytest.mark.parametrize("read_ahead", [1, 2, 3, 10])
def test_they_come_with_any_read_ahead(
    kind: str, read_ahead: int, reader: Callable[[Any], list[Any]]
) -> None:
    def body() -> Iterator[int]:
        yield from range(25)

    assert reader(marked(body, kind, read_ahead=read_ahead)()) == list(range(25))


def test_the_body_runs_where_functions_of_its_kind_run() -> None:
    @unsync
    def in_threads() -> Generator[str, None, None]:
        yield threading.current_thread().name

    @unsync
    async def in_loop() -> AsyncIterator[int]:
        yield threading.get_ident()

    (name,) = in_threads()
    assert name.startswith("unsync-worker")
    assert list(in_loop()) == [unsync.thread.ident]


def test_an_executor_of_its_own() -> None:
    def body() -> Generator[str, None, None]:
        yield threading.current_thread().name

    with concurrent.futures.ThreadPoolExecutor(1, "mine") as executor:
        (name,) = unsync(body, executor=executor)()
    assert name.startswith("mine")


def test_it_starts_with_the_call() -> None:
    begun = threading.Event()

    @unsync
    def body() -> Generator[int, None, None]:
        begun.set()
        yield 1

    stream = body()
    assert begun.wait(PATIENCE)
    assert next(stream) == 1


def test_wrong_arguments_are_refused_at_the_call() -> None:
    for function in regular, async_:
        with pytest.raises(TypeError, match="argument"):
            function()  # type: ignore[call-arg]


# What can be marked.


class Host:
    @unsync
    def method(self, count: int) -> Generator[Any, None, None]:
        for number in range(count):
            yield type(self).__name__, number

    @unsync
    async def async_method(self, count: int) -> AsyncIterator[Any]:
        for number in range(count):
            yield type(self).__name__, number

    @unsync
    @classmethod
    def of_class(cls, count: int) -> Generator[Any, None, None]:
        for number in range(count):
            yield cls.__name__, number

    @unsync
    @staticmethod
    async def static(count: int) -> AsyncIterator[Any]:
        for number in range(count):
            yield "Host", number


def test_methods_of_all_kinds() -> None:
    host: Any = Host()
    expected = [("Host", 0), ("Host", 1)]
    for call in (
        host.method,
        host.async_method,
        host.of_class,
        host.static,
        functools.partial(Host.method, host),
        Host.of_class,
        Host.static,
    ):
        assert list(call(2)) == expected
        assert list(call(count=2)) == expected


def test_partials_and_callable_objects() -> None:
    class Caller:
        async def __call__(self, count: int) -> AsyncIterator[int]:
            for number in range(count):
                yield number

    def body(count: int, start: int) -> Generator[int, None, None]:
        yield from range(start, start + count)

    assert list(unsync(functools.partial(body, start=5))(2)) == [5, 6]
    assert list(unsync(Caller())(2)) == [0, 1]
    assert list(unsync(read_ahead=5)(body)(2, 0)) == [0, 1]


def test_a_generator_based_coroutine_is_no_stream() -> None:
    @types.coroutine
    def coroutine() -> Generator[Any, Any, int]:
        yield from asyncio.sleep(0).__await__()
        return 42

    assert isinstance(unsync(coroutine)(), Unfuture)


def nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "options", "error", "words"),
    [
        (regular.__wrapped__, {"cpu_bound": True}, TypeError, "regular cannot run in a process"),
        (async_.__wrapped__, {"cpu_bound": True}, TypeError, "async_ .*with cpu_bound=True"),
        (nothing, {"read_ahead": 5}, TypeError, "nothing .*read_ahead=.*generator functions"),
        (read, {"read_ahead": 5}, TypeError, "read .*read_ahead=.*generator functions"),
        (regular.__wrapped__, {"read_ahead": 0}, ValueError, "at least 1, not 0"),
        (regular.__wrapped__, {"read_ahead": -3}, ValueError, "at least 1, not -3"),
        (regular.__wrapped__, {"read_ahead": "5"}, TypeError, "number of values, not '5'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    function: Any, options: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        unsync(function, **options)


def test_a_process_pool_is_refused() -> None:
    with concurrent.futures.ProcessPoolExecutor(1) as executor:
        with pytest.raises(TypeError, match=r"cannot run in a process.*leave executor= away"):
            unsync(regular.__wrapped__, executor=executor)
        with pytest.raises(TypeError, match="cannot be marked with executor="):
            unsync(async_.__wrapped__, executor=executor)


# Back-pressure.


@both
@pytest.mark.parametrize("read_ahead", [1, 2, 3, 8, 64])
def test_the_generator_is_never_further_ahead_than_it_may(kind: str, read_ahead: int) -> None:
    made = 0

    def body() -> Iterator[int]:
        nonlocal made
        while made < 200:
            made += 1
            yield made

    taken = 0
    for value in marked(body, kind, read_ahead=read_ahead)():
        taken += 1
        assert value == taken
        assert made - taken <= read_ahead
    assert taken == 200


@both
def test_one_who_tells_it_late_to_go_on_does_not_have_it_go_too_far(kind: str) -> None:
    """A job, or a wakeup, that was sent for an earlier rest and comes when it rests again."""
    made: list[int] = []

    def body() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    stream = marked(body, kind, read_ahead=1)()
    channel: Any = stream._channel
    wait_until(lambda: channel.made and channel.resting)
    if kind == "regular":
        channel.work()
    else:
        wakeup = channel.wakeup
        wakeup.set_result(None)
        wait_until(lambda: channel.wakeup is not wakeup and channel.resting)
    assert made == [0]
    assert list(stream) == made == list(range(5))


@both
def test_a_consumer_that_does_not_come_holds_it_back(kind: str) -> None:
    made: list[int] = []

    def body() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    stream = marked(body, kind)()
    wait_until(lambda: len(made) == 32)
    for _ in range(3):  # what else is there to do is done
        unsync(lambda: None)().result(PATIENCE)
        Unfuture.from_value(1).map(str).result(PATIENCE)
    assert len(made) == 32
    assert list(stream) == list(range(1000))


@pytest.mark.usefixtures("fresh")
def test_one_that_rests_holds_no_thread() -> None:
    with type(unsync.thread_executor)(1) as executor:  # type: ignore[call-arg]
        unsync.thread_executor = executor
        streams = [regular(1000) for _ in range(3)]
        assert unsync(lambda: 42)().result(PATIENCE) == 42
        for number, values in enumerate(zip(*streams)):  # noqa: B905
            assert values == (number,) * 3
        unsync.thread_executor = None


# Failures.


@everywhere
@both
def test_a_failure_comes_after_the_values_and_once(
    kind: str, reader: Callable[[Any], list[Any]]
) -> None:
    def body() -> Iterator[int]:
        yield 1
        yield 2
        raise Boom("lost")

    stream = marked(body, kind)()
    assert next(stream) == 1
    assert next(stream) == 2
    with pytest.raises(Boom, match="lost"):
        reader(stream)
    assert reader(stream) == []
    assert next(stream, None) is None


@both
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_would_end_the_thread_is_a_failure_too(kind: str, error: type[BaseException]) -> None:
    def body() -> Iterator[int]:
        yield 1
        raise error("now")

    thread = unsync.thread
    stream = marked(body, kind)()
    assert next(stream) == 1
    with pytest.raises(error, match="now"):
        next(stream)
    assert unsync.thread is thread
    assert unsync(lambda: 42)().result(PATIENCE) == 42


@both
def test_the_traceback_leads_to_the_generator(kind: str) -> None:
    def body() -> Iterator[int]:
        yield 1
        raise Boom

    with pytest.raises(Boom) as caught:
        list(marked(body, kind)())
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "body"
    assert not {"fill", "work"} & set(names)


@both
def test_one_that_nobody_asked_for_is_reported(kind: str) -> None:
    def body() -> Iterator[int]:
        yield 1
        raise Boom("nobody asked")

    loop = unsync.loop
    collect()
    # What an earlier test left is reported before.
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(PATIENCE)
    heard: list[dict[str, Any]] = []
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, entries: heard.append(entries))
    try:
        stream = marked(body, kind)()
        wait_until(stream._channel.ended.done)
        del stream
        collect()
        wait_until(lambda: heard)
    finally:
        loop.set_exception_handler(before)
    (entries,) = heard
    assert isinstance(entries["exception"], Boom)


@pytest.mark.usefixtures("fresh")
def test_an_executor_that_takes_no_work_is_a_failure() -> None:
    executor = concurrent.futures.ThreadPoolExecutor(1)
    numbers = unsync(regular.__wrapped__, executor=executor)(1000)
    assert next(numbers) == 0
    executor.shutdown()
    found: list[int] = []
    with pytest.raises(RuntimeError, match="after shutdown"):
        found.extend(numbers)
    assert list(numbers) == []


def test_a_job_that_was_cancelled_before_it_began_ends_the_stream() -> None:
    held, gate = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        gate.wait(PATIENCE)

    executor = concurrent.futures.ThreadPoolExecutor(1)
    executor.submit(hold)
    assert held.wait(PATIENCE)
    stream = unsync(regular.__wrapped__, executor=executor)(1000)
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(asyncio.CancelledError):
        next(stream)
    gate.set()
    assert list(stream) == []


@pytest.mark.usefixtures("fresh")
def test_a_shutdown_cancels_an_async_one_after_the_values_there_are() -> None:
    ended: list[int | None] = []

    @unsync
    async def body() -> AsyncIterator[int]:
        try:
            for number in range(1000):
                yield number
        finally:
            ended.append(threading.get_ident())

    thread = unsync.thread.ident
    stream = body()
    assert next(stream) == 0
    assert unsync.shutdown(PATIENCE)
    found: list[int] = []
    with pytest.raises(asyncio.CancelledError):
        found.extend(stream)
    assert ended == [thread]
    assert list(stream) == []


@pytest.mark.usefixtures("fresh")
def test_a_shutdown_before_it_begins_ends_it() -> None:
    held, gate = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        gate.wait(PATIENCE)

    loop = unsync.loop
    loop.call_soon_threadsafe(hold)
    assert held.wait(PATIENCE)
    stream = async_(1000)
    stopping = threading.Thread(target=unsync.shutdown, args=(PATIENCE,))
    stopping.start()
    gate.set()
    stopping.join(PATIENCE)
    # Cancelled, whether or not it had begun; it does not hang.
    try:
        assert list(stream) == list(range(1000))
    except asyncio.CancelledError:
        assert list(stream) == []


def test_a_thread_loop_in_the_ambient_loop_is_refused_and_does_not_hang() -> None:
    gate = threading.Event()

    @unsync
    def body() -> Generator[int, None, None]:
        gate.wait(PATIENCE)
        yield 1

    @unsync
    async def misuse(stream: Stream[int]) -> None:
        for _ in stream:
            pass

    stream = body()
    with pytest.raises(asyncio.InvalidStateError, match=r"body.*use 'async for' instead"):
        misuse(stream).result(PATIENCE)
    gate.set()
    assert list(stream) == [1]


def double(number: int) -> int:
    return 2 * number


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: regular(3), "regular"),
        (lambda: async_(3), "async_"),
        (lambda: unsync.map(unsync(double), range(3)), "double"),
        (lambda: unsync.map(unsync(double), range(3), in_order=False), "double"),
    ],
)
@pytest.mark.parametrize("look", [list, next, lambda stream: [*zip(stream, "ab", strict=False)]])
def test_it_is_refused_as_well_where_there_are_values(
    look: Callable[[Stream[int]], object], make: Callable[[], Stream[int]], name: str
) -> None:
    stream = make()
    channel: Any = stream._channel
    if isinstance(channel, streams._Generated):
        wait_until(lambda: channel.has_ended)
    else:
        wait_until(lambda: all(part.is_done() for part in channel.parts()))

    @unsync
    async def misuse() -> None:
        look(stream)

    with pytest.raises(
        asyncio.InvalidStateError,
        match=rf"stream of {name}\(\) in unsync\.thread .* use 'async for' instead",
    ):
        misuse().result(PATIENCE)
    assert len(list(stream)) == 3


def test_a_continuation_is_refused_too() -> None:
    # It is called in the ambient loop's thread.
    with pytest.raises(asyncio.InvalidStateError, match="use 'async for' instead"):
        unsync(double)(1).map(lambda _: list(regular(3))).result(PATIENCE)


@both
def test_closing_in_the_ambient_loop_is_refused_and_goes_on(kind: str) -> None:
    left = threading.Event()

    def body() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            left.set()

    @unsync
    async def misuse(stream: Stream[int]) -> None:
        with stream:
            assert await anext(stream) == 0

    stream = marked(body, kind)()
    with pytest.raises(
        asyncio.InvalidStateError, match=r"stream of .*body\(\) .* use 'await stream\.aclose\(\)'"
    ):
        misuse(stream).result(PATIENCE)
    assert left.wait(PATIENCE)
    assert list(stream) == []


@both
def test_one_that_has_ended_can_be_closed_in_the_ambient_loop(kind: str) -> None:
    @unsync
    async def read_it(stream: Stream[int]) -> list[int]:
        with stream:
            return [value async for value in stream]

    def body() -> Iterator[int]:
        yield from range(100)

    for _ in range(20):
        assert read_it(marked(body, kind)()).result(PATIENCE) == list(range(100))


# Leaving early.


def leave_by_break(stream: Stream[int]) -> None:
    for value in stream:
        assert value == 0
        break


def leave_by_close(stream: Stream[int]) -> None:
    assert next(stream) == 0
    stream.close()
    assert list(stream) == []
    stream.close()


def leave_a_with_block(stream: Stream[int]) -> None:
    with suppress(Boom), stream as same:
        assert same is stream
        raise Boom


async def leave_by_aclose(stream: Stream[int]) -> None:
    assert await stream.__anext__() == 0
    await stream.aclose()
    assert await read(stream) == []
    await stream.aclose()


async def leave_an_async_with_block(stream: Stream[int]) -> None:
    with suppress(Boom):
        async with stream as same:
            assert same is stream
            raise Boom


async def leave_by_async_break(stream: Stream[int]) -> None:
    async for value in stream:
        assert value == 0
        break


def never_ask(stream: Stream[int]) -> None:
    pass


def close_when_all_is_made(stream: Stream[int]) -> None:
    wait_until(lambda: stream._channel.ended.done() or stream._channel.resting)
    stream.close()
    assert list(stream) == []


LEAVES = [
    leave_by_break,
    leave_by_close,
    leave_a_with_block,
    leave_by_aclose,
    leave_an_async_with_block,
    leave_by_async_break,
    never_ask,
    close_when_all_is_made,
]


@both
@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("count", [10, 1000])
def test_one_left_early_is_closed_where_it_runs(
    kind: str, leave: Callable[[Any], Any], count: int
) -> None:
    begun = threading.Event()
    ended: list[str] = []

    def body() -> Iterator[int]:
        begun.set()
        try:
            yield from range(count)
        finally:
            ended.append(threading.current_thread().name)

    def start() -> Stream[int]:
        stream = marked(body, kind)()
        assert begun.wait(PATIENCE)
        return stream

    place = unsync.thread.name if kind == "async" else "unsync-worker"
    if inspect.iscoroutinefunction(leave):
        asyncio.run(leave(start()))
    else:
        leave(start())
    collect()
    wait_until(lambda: ended)
    assert len(ended) == 1
    assert ended[0].startswith(place)


def test_a_coroutine_that_waits_is_cancelled() -> None:
    waits = threading.Event()
    seen: list[str] = []

    @unsync
    async def body() -> AsyncIterator[int]:
        yield 1
        try:
            waits.set()
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0)
            seen.append("ended")

    stream = body()
    assert next(stream) == 1
    assert waits.wait(PATIENCE)
    stream.close()
    assert seen == ["cancelled", "ended"]
    assert list(stream) == []


def test_one_that_will_not_be_cancelled_is_closed_at_its_next_value() -> None:
    waits = threading.Event()
    seen: list[str] = []

    @unsync
    async def body() -> AsyncIterator[int]:
        yield 1
        try:
            waits.set()
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            seen.append("cancelled")
        try:
            yield 2
        finally:
            seen.append("closed")

    stream = body()
    assert next(stream) == 1
    assert waits.wait(PATIENCE)
    stream.close()
    assert seen == ["cancelled", "closed"]


def test_closing_waits_for_the_next_value_of_a_regular_one() -> None:
    begun, gate = threading.Event(), threading.Event()
    ended: list[int] = []

    @unsync
    def body() -> Generator[int, None, None]:
        try:
            begun.set()
            gate.wait(PATIENCE)
            yield 1
        finally:
            ended.append(1)

    stream = body()
    assert begun.wait(PATIENCE)
    closing = threading.Thread(target=stream.close)
    closing.start()
    assert ended == []
    gate.set()
    closing.join(PATIENCE)
    assert ended == [1]


@both
def test_a_waiting_consumer_is_released_by_closing(kind: str) -> None:
    gate = threading.Event()

    @unsync
    async def async_body() -> AsyncIterator[int]:
        await asyncio.sleep(1000)
        yield 1

    @unsync
    def body() -> Generator[int, None, None]:
        gate.wait(PATIENCE)
        yield 1

    stream = async_body() if kind == "async" else body()
    found: list[list[int]] = []
    consumer = threading.Thread(target=lambda: found.append(list(stream)))
    consumer.start()
    wait_until(lambda: stream._channel.waiters)
    closing = threading.Thread(target=stream.close)
    closing.start()
    wait_until(lambda: stream._channel.closing)
    gate.set()
    closing.join(PATIENCE)
    consumer.join(PATIENCE)
    assert found == [[]]


@both
def test_closing_raises_what_the_generator_raises_then(kind: str) -> None:
    def body() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            raise Boom("in the end")

    stream = marked(body, kind)()
    assert next(stream) == 0
    with pytest.raises(Boom, match="in the end"):
        stream.close()
    assert list(stream) == []


@both
def test_one_that_ignores_its_closing_is_told_so(kind: str) -> None:
    def body() -> Iterator[int]:
        for number in range(1000):
            try:
                yield number
            except GeneratorExit:
                yield -1

    @unsync
    async def async_body() -> AsyncIterator[int]:
        for number in range(1000):
            try:
                yield number
            except GeneratorExit:
                yield -1

    stream = unsync(body)() if kind == "regular" else async_body()
    assert next(stream) == 0
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        stream.close()


@both
def test_closing_one_that_has_ended_does_nothing(kind: str) -> None:
    def body() -> Iterator[int]:
        yield 1

    stream = marked(body, kind)()
    assert list(stream) == [1]
    stream.close()
    asyncio.run(stream.aclose())


# Consumers.


@both
def test_each_value_goes_to_one_of_several_consumers(kind: str) -> None:
    def body() -> Iterator[int]:
        yield from range(4000)

    stream = marked(body, kind, read_ahead=8)()
    found: list[list[int]] = []

    def consume() -> None:
        found.append(list(stream))

    def consume_in_loop() -> None:
        found.append(asyncio.run(read(stream)))

    consumers = [threading.Thread(target=target) for target in (consume, consume_in_loop) * 2]
    for consumer in consumers:
        consumer.start()
    for consumer in consumers:
        consumer.join(PATIENCE)
    assert len(found) == 4
    assert sorted(value for values in found for value in values) == list(range(4000))
    for values in found:
        assert values == sorted(values)


@both
def test_a_consumer_that_is_cancelled_loses_nothing(kind: str) -> None:
    gate = threading.Event()

    @unsync
    async def async_body() -> AsyncIterator[int]:
        await unsync(gate.wait)(PATIENCE)
        yield 1
        yield 2

    @unsync
    def body() -> Generator[int, None, None]:
        gate.wait(PATIENCE)
        yield 1
        yield 2

    async def main() -> list[int]:
        stream = async_body() if kind == "async" else body()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.01)
        gate.set()
        return await read(stream)

    assert asyncio.run(main()) == [1, 2]


@both
def test_each_of_several_consumers_has_its_values_in_order(kind: str) -> None:
    def body() -> Iterator[int]:
        yield from range(1000)

    stream = marked(body, kind, read_ahead=8)()
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        found = [*threads.map(list, [stream] * 3)]
    for values in found:
        assert values == sorted(values)
    assert sorted(value for values in found for value in values) == list(range(1000))


class Full(streams.Channel[int]):
    """There is always something, as where the producer's thread keeps up."""

    def find(self) -> bool:
        self.taken.extend(range(4))
        return True

    def go_on(self) -> None:
        pass

    def close(self) -> Unfuture[None]:
        return Unfuture.from_value(None)


def test_a_loop_has_turns_while_its_consumer_need_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "TURN_SECONDS", 0.0)
    turns: list[int] = []

    async def others() -> None:
        while True:
            turns.append(len(found))
            await asyncio.sleep(0)

    found: list[int] = []

    async def main() -> None:
        task = asyncio.ensure_future(others())
        async for value in Stream(Full()):
            found.append(value)
            if len(found) == 40:
                break
        task.cancel()

    asyncio.run(main())
    assert turns == list(range(0, 40, 4))


def test_a_consumer_that_leaves_when_it_was_woken_wakes_another_one() -> None:
    stream = async_(0)
    channel = stream._channel
    wait_until(channel.ended.done)
    woken: Unfuture[None] = Unfuture()
    other: Unfuture[None] = Unfuture()
    woken.set_result(None)
    channel.waiters.append(other)
    channel.leave(woken)
    assert other.done()


# Contexts.


@both
def test_the_body_sees_the_callers_variables_and_keeps_its_own(kind: str) -> None:
    def body() -> Iterator[str]:
        for number in range(5):
            yield variable.get()
            variable.set(f"number {number}")

    def call() -> None:
        variable.set("caller")
        stream = marked(body, kind, read_ahead=1)()
        variable.set("changed")
        assert list(stream) == ["caller", "number 0", "number 1", "number 2", "number 3"]
        assert variable.get() == "changed"

    copy_context().run(call)


def test_an_async_body_is_one_task_with_the_functions_name() -> None:
    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[asyncio.Task[Any] | None]:
        for _ in range(5):
            yield asyncio.current_task()
            await asyncio.sleep(0)

    tasks = set(body())
    (task,) = tasks
    assert task is not None
    assert task.get_name() == body.__qualname__


def test_a_timeout_within_an_async_body_holds_over_its_values() -> None:
    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[int]:
        try:
            async with asyncio.timeout(None) as limit:
                for number in range(5):
                    yield number
                limit.reschedule(asyncio.get_running_loop().time())
                await asyncio.sleep(1000)
        except TimeoutError:
            yield -1

    assert list(body()) == [0, 1, 2, 3, 4, -1]


def test_a_timeout_within_an_async_body_strikes_while_it_rests() -> None:
    """It has no value to make, so the task that is cancelled is not in its body."""
    struck = threading.Event()

    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[int]:
        try:
            async with asyncio.timeout(0.01):
                for number in range(5):
                    yield number
        except TimeoutError:
            struck.set()
            yield -1
        yield -2

    stream = body()
    assert struck.wait(PATIENCE)
    assert list(stream) == [0, -1, -2]


def test_a_failed_child_of_an_async_body_is_told_while_it_rests() -> None:
    gate = threading.Event()

    async def fail() -> None:
        gate.set()
        raise Boom

    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[int]:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            for number in range(5):
                yield number

    stream = body()
    assert gate.wait(PATIENCE)
    wait_until(lambda: stream._channel.ended.done())
    assert next(stream) == 0
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the group's
        next(stream)
    failures: Any = caught.value
    assert [type(each) for each in failures.exceptions] == [Boom]


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("rests_at", ["yield", "await"])
def test_a_task_group_in_a_body_that_is_left_early(rests_at: str, guarded: bool) -> None:
    """As in an unmarked generator, but for a body that waits; the guide says so."""
    rests = threading.Event()

    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[int]:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(PATIENCE))
                yield 0
                rests.set()
                if rests_at == "await":
                    await asyncio.sleep(PATIENCE)
                yield 1
        except* GeneratorExit:
            if not guarded:
                raise

    stream = body()
    assert next(stream) == 0
    assert rests.wait(PATIENCE)
    if rests_at == "yield":
        wait_until(lambda: stream._channel.resting)
    if rests_at == "yield" and not guarded:
        with pytest.raises(BaseExceptionGroup) as caught:
            stream.close()
        assert [type(each) for each in caught.value.exceptions] == [GeneratorExit]
    else:
        stream.close()


@pytest.mark.parametrize("ends_by", ["value", "return", "failure", "cancel"])
def test_a_body_that_is_cancelled_while_it_rests_decides(ends_by: str) -> None:
    tasks: queue.SimpleQueue[asyncio.Task[Any]] = queue.SimpleQueue()

    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[str]:
        task = asyncio.current_task()
        assert task is not None
        tasks.put(task)
        for number in range(3):
            try:
                yield f"value {number}"
            except asyncio.CancelledError as cancelled:
                if ends_by == "return":
                    return
                if ends_by == "failure":
                    raise Boom from None
                if ends_by == "cancel":
                    raise
                yield f"cancelled by {cancelled}"
                yield "and again"

    stream = body()
    task = tasks.get(timeout=PATIENCE)
    wait_until(lambda: stream._channel.resting)

    async def cancel() -> None:
        task.cancel("the test")

    # Only when the body has suspended is it told, and only then does anybody read on.
    unsync(cancel)().result(PATIENCE)
    found: list[str] = []
    if ends_by in {"failure", "cancel"}:
        with pytest.raises(Boom if ends_by == "failure" else asyncio.CancelledError):
            found.extend(stream)
    else:
        found.extend(stream)
    if ends_by == "value":
        # The first one was in the stream already.
        expected = ["cancelled by the test", "and again", "value 1", "value 2"]
        assert found == ["value 0", *expected]
    else:
        assert found == ["value 0"]


def test_a_body_that_was_cancelled_while_it_rested_can_be_closed_while_it_waits() -> None:
    tasks: queue.SimpleQueue[asyncio.Task[Any]] = queue.SimpleQueue()
    waits = threading.Event()
    seen: list[str] = []

    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[int]:
        task = asyncio.current_task()
        assert task is not None
        tasks.put(task)
        with suppress(asyncio.CancelledError):
            yield 1
        waits.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    stream = body()
    task = tasks.get(timeout=PATIENCE)
    wait_until(lambda: stream._channel.resting)
    unsync.loop.call_soon_threadsafe(task.cancel)
    assert waits.wait(PATIENCE)
    stream.close()
    assert seen == ["cancelled"]


@both
def test_who_is_cancelled_while_closing_leaves_it_to_end_by_itself(kind: str) -> None:
    gate: Unfuture[None] = Unfuture()
    ended = threading.Event()

    @unsync(read_ahead=1)
    async def body() -> AsyncIterator[int]:
        try:
            yield from_here
            yield from_here
        finally:
            await gate
            ended.set()

    @unsync(read_ahead=1)
    def regular_body() -> Iterator[int]:
        try:
            yield from_here
            yield from_here
        finally:
            gate.result(PATIENCE)
            ended.set()

    from_here = 1

    async def main() -> None:
        stream = body() if kind == "async" else regular_body()
        assert await anext(stream) == 1
        closing = asyncio.ensure_future(stream.aclose())
        others = [asyncio.ensure_future(read(stream)) for _ in range(2)]
        for _ in range(3):
            await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(closing, PATIENCE)
        gate.set_result(None)
        for other in others:
            await asyncio.wait_for(other, PATIENCE)

    asyncio.run(main())
    assert ended.wait(PATIENCE)


@both
def test_an_iteration_that_is_left_loses_nothing(kind: str) -> None:
    def body() -> Iterator[int]:
        yield from range(10)

    with marked(body, kind)() as stream:
        for first in stream:
            assert first == 0
            break
        assert next(stream) == 1
        iterator = iter(stream)
        assert [next(iterator), next(stream), next(iterator)] == [2, 3, 4]
        pairs = zip(stream, iterator, strict=False)  # at the end it asks for one more
        assert list(pairs) == [(5, 6), (7, 8)]
        assert list(iterator) == list(stream) == []


# Many values.


@both
def test_a_long_stream_is_complete(kind: str) -> None:
    count = 5_000

    def body() -> Iterator[int]:
        yield from range(count)

    assert sum(marked(body, kind)()) == sum(range(count))
    assert asyncio.run(read(marked(body, kind)())) == list(range(count))


# Closing, whatever came before.


def stream_that_tells_its_end(kind: str) -> tuple[Stream[int], threading.Event]:
    closed = threading.Event()

    def body() -> Iterator[int]:
        try:
            yield from range(20)
        finally:
            closed.set()

    return marked(body, kind, read_ahead=2)(), closed


@pytest.mark.parametrize("kind", ["regular", "async"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("then", ["close", "nothing"])
def test_a_ctrl_c_while_the_producer_is_told_to_go_on(kind: str, when: str, then: str) -> None:
    stream, closed = stream_that_tells_its_end(kind)
    channel: Any = stream._channel
    resume = channel.resume
    found: list[int] = []

    def interrupted() -> None:
        channel.resume = resume
        if when == "after":
            resume()
        raise KeyboardInterrupt

    wait_until(lambda: channel.made and channel.resting)
    channel.resume = interrupted
    with pytest.raises(KeyboardInterrupt):
        found.extend(next(stream) for _ in range(20))
    if then == "close":
        stream.close()
    assert list(stream) == []
    assert closed.wait(PATIENCE)


@pytest.mark.parametrize("kind", ["regular", "async"])
def test_a_ctrl_c_while_it_is_closed_and_closed_again(kind: str) -> None:
    stream, closed = stream_that_tells_its_end(kind)
    channel: Any = stream._channel
    resume = channel.resume

    def interrupted() -> None:
        channel.resume = resume
        raise KeyboardInterrupt

    wait_until(lambda: channel.made and channel.resting)
    channel.resume = interrupted
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    stream.close()
    assert closed.is_set()


@pytest.mark.parametrize("kind", ["regular", "async"])
@pytest.mark.parametrize("fails", [False, True])
def test_after_its_closing_it_has_ended_whatever_it_had_read_ahead(kind: str, fails: bool) -> None:
    def body() -> Iterator[int]:
        yield from range(3)
        if fails:
            raise Boom

    stream = marked(body, kind)()
    assert next(stream) == 0
    channel: Any = stream._channel
    wait_until(channel.ended.done)
    if fails:
        channel.ended.exception()  # else it is reported when nobody refers to it any more
    stream.close()
    assert next(stream, None) is None
    assert list(stream) == []


def test_what_a_generator_returns_is_the_value_of_its_end_once() -> None:
    @unsync
    def body(values: list[int]) -> Generator[int, None, str]:
        yield from values
        return "all of them"

    def consumer(stream: Stream[int]) -> Generator[int, None, str]:
        found: str = yield from stream
        return found

    stream = body([1])
    assert next(stream) == 1
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value == "all of them"
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value is None

    through = consumer(body([1, 2]))
    assert [next(through), next(through)] == [1, 2]
    with pytest.raises(StopIteration) as end:
        next(through)
    assert end.value.value == "all of them"
    assert list(body([])) == []

    closed = body([1])
    closed.close()
    with pytest.raises(StopIteration) as end:
        next(closed)
    assert end.value.value is None


@both
def test_who_gives_up_closing_leaves_it_to_others(kind: str) -> None:
    begun, gate = threading.Event(), threading.Event()
    ended: list[int] = []

    def body() -> Iterator[int]:
        try:
            yield from range(3)
        finally:
            begun.set()
            gate.wait(PATIENCE)
            ended.append(1)

    @unsync(read_ahead=1)
    async def async_body() -> AsyncIterator[int]:
        try:
            for number in range(3):
                yield number
        finally:
            begun.set()
            await in_thread()
            ended.append(1)

    @unsync
    def in_thread() -> None:
        gate.wait(PATIENCE)

    stream = async_body() if kind == "async" else marked(body, kind, read_ahead=1)()
    channel: Any = stream._channel
    wait_until(lambda: channel.made and channel.resting)

    async def close() -> None:
        closing = asyncio.ensure_future(stream.aclose())
        await asyncio.to_thread(begun.wait, PATIENCE)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        other = asyncio.ensure_future(stream.aclose())
        await asyncio.sleep(0)
        assert not other.done()
        gate.set()
        await other

    asyncio.run(close())
    assert ended == [1]
    stream.close()
