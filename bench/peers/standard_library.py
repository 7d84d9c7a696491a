"""The standard library's nearest way to each piece of work, on either loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from time import perf_counter
from typing import Any, ClassVar

from peers import base

LACKS = {
    "then_each": "has no chaining",
    "then_chain": "has no chaining",
    "decoration": "marks nothing",
    "import_time": "is the basis",
}
FLOORS = ("bare_send", "eager_task", "two_switches")


def workers() -> int:
    """How many threads a pool has by default, this project's as well; from 3.13 on by affinity."""
    with ThreadPoolExecutor() as executor:
        return executor._max_workers


class StandardLibrary(base.Peer):
    """`run_coroutine_threadsafe` to a loop in a thread, `ThreadPoolExecutor`, `run_in_executor`.

    In the loop itself a coroutine call is a task, and an outcome that comes from another thread a
    `concurrent.futures.Future` in `asyncio.wrap_future`.
    """

    reasons: ClassVar[dict[str, str]] = LACKS
    factory: Callable[[], asyncio.AbstractEventLoop] = staticmethod(asyncio.new_event_loop)

    def __init__(self) -> None:
        self.home = base.LoopThread(self.factory())
        self.executor = ThreadPoolExecutor(workers())

    def close(self) -> None:
        self.home.close()
        self.executor.shutdown()

    def coroutine(self) -> Future[int]:
        return asyncio.run_coroutine_threadsafe(base.coroutine(), self.home.loop)

    def yielding(self) -> Future[int]:
        return asyncio.run_coroutine_threadsafe(base.yielding(), self.home.loop)

    def function(self) -> Future[int]:
        return self.executor.submit(base.function)

    def awaited_coroutine(self) -> asyncio.Task[int]:
        return asyncio.get_running_loop().create_task(base.coroutine())

    def awaited_function(self) -> asyncio.Future[int]:
        return asyncio.get_running_loop().run_in_executor(self.executor, base.function)

    def start_coroutine(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return self.home.start(function())

    def start_function(self, function: Callable[[], Any]) -> Any:
        return self.executor.submit(function)

    def in_the_loop(self, work: Coroutine[Any, Any, float]) -> float:
        seconds: float = self.home.start(work).result()
        return seconds

    def stream_async(self, count: int) -> float:
        """Through a `queue.Queue` without a bound: a loop must not wait for room."""

        def stream(count: int) -> Iterator[int]:
            values: Queue[int | None] = Queue()

            async def produce() -> None:
                async for value in base.async_values(count):
                    values.put(value)
                values.put(None)

            self.home.start(produce())
            return iter(values.get, None)

        return base.read(stream, count)

    def stream_threads(self, count: int) -> float:
        def stream(count: int) -> Iterator[int]:
            values: Queue[int | None] = Queue(64)  # as far ahead as ours

            def produce() -> None:
                for value in base.values(count):
                    values.put(value)
                values.put(None)

            self.executor.submit(produce)
            return iter(values.get, None)

        return base.read(stream, count)

    def stream_to_loop(self, count: int) -> float:
        """Through an `asyncio.Queue`, unbounded: a thread cannot wait for room in it."""

        async def stream(count: int) -> AsyncIterator[int]:
            loop = asyncio.get_running_loop()
            values: asyncio.Queue[int | None] = asyncio.Queue()

            def produce() -> None:
                for value in base.values(count):
                    loop.call_soon_threadsafe(values.put_nowait, value)
                loop.call_soon_threadsafe(values.put_nowait, None)

            self.executor.submit(produce)
            while (value := await values.get()) is not None:
                yield value

        return self.in_own_loop(base.read_in_loop(stream, count))

    def set_result(self, count: int) -> float:
        def start(futures: list[Future[int]]) -> Future[int]:
            async def wrap() -> int:
                return await base.add_up([asyncio.wrap_future(future) for future in futures])

            return self.home.start(wrap())

        began = perf_counter()
        futures: list[Future[int]] = [Future() for _ in range(count)]
        total = start(futures)
        for future in futures:
            future.set_result(1)
        result = total.result()
        seconds = perf_counter() - began
        base.check(result, count)
        return seconds

    def pending(self, count: int) -> float:
        """Both futures that it takes for threads and coroutines to wait for one outcome."""

        def make() -> object:
            future: Future[int] = Future()
            return future, asyncio.wrap_future(future, loop=self.home.loop)

        return base.bytes_each(make, count)

    def bare_send(self, count: int) -> float:
        def send() -> int:
            try:
                base.coroutine().send(None)
            except StopIteration as stop:
                value: int = stop.value
                return value
            raise AssertionError("it was to end at once")

        return base.block_for_each(send, count)

    def eager_task(self, count: int) -> float:
        if sys.version_info < (3, 12):
            raise NotImplementedError("came with Python 3.12")

        async def run() -> float:
            loop = asyncio.get_running_loop()

            def start() -> asyncio.Task[int]:
                return asyncio.Task(base.coroutine(), loop=loop, eager_start=True)

            return base.fan_out(start, count)

        return self.in_own_loop(run())

    def two_switches(self, count: int) -> float:
        there, back = threading.Lock(), threading.Lock()
        there.acquire()
        back.acquire()

        def answer() -> None:
            for _ in range(count):
                there.acquire()
                back.release()

        other = threading.Thread(target=answer)
        other.start()
        start = perf_counter()
        for _ in range(count):
            there.release()
            back.acquire()
        seconds = perf_counter() - start
        other.join()
        return seconds


class OnUvloop(StandardLibrary):
    reasons: ClassVar[dict[str, str]] = {
        **LACKS,
        **dict.fromkeys(("function_each", "function_fan_out", *FLOORS), "needs no loop"),
    }

    def __init__(self) -> None:
        import uvloop

        self.factory = uvloop.new_event_loop
        self.run = uvloop.run
        super().__init__()

    def in_own_loop(self, work: Coroutine[Any, Any, float]) -> float:
        seconds: float = self.run(work)
        return seconds


class ToThread(base.Peer):
    """`asyncio.to_thread`, which runs in the loop's default executor and keeps contexts."""

    reasons: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "coroutine_each",
            "coroutine_fan_out",
            "yielding_each",
            "yielding_fan_out",
            "producers",
            "call",
            "function_each",
            "function_fan_out",
            "then_each",
            "then_chain",
            "loop_coroutine",
            "loop_gather_coroutines",
            "set_result",
            "pending",
            "decoration",
            "import_time",
            *FLOORS,
        ),
        "only calls functions in threads, from a loop",
    )

    def __init__(self) -> None:
        self.home = base.LoopThread(asyncio.new_event_loop())

    def close(self) -> None:
        self.home.close()

    async def awaited_function(self) -> int:
        return await asyncio.to_thread(base.function)

    def in_the_loop(self, work: Coroutine[Any, Any, float]) -> float:
        seconds: float = self.home.start(work).result()
        return seconds
