"""What the peers share: the work itself, and how it is timed and checked.

Each operation gives 1, and their sum is checked, so that nobody is timed at something else.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable
from concurrent.futures import Future
from time import perf_counter
from typing import Any, ClassVar, Protocol


async def coroutine() -> int:
    return 1


async def yielding() -> int:
    await asyncio.sleep(0)
    return 1


def function() -> int:
    return 1


async def async_values(count: int) -> AsyncIterator[int]:
    for _ in range(count):
        yield 1


def values(count: int) -> Generator[int, None, None]:
    for _ in range(count):
        yield 1


NO_STREAMS = "has no streams of this kind"


class Waitable(Protocol):
    """What a peer's call returns to a thread."""

    def result(self) -> int: ...


class Peer:
    """One way to do the work.

    Each row of the comparison is a method of the row's name that takes a count and returns the
    seconds (for memory: the bytes) that so many operations took. What they are made of differs
    from peer to peer; what a peer cannot do it lists in `reasons`.
    """

    reasons: ClassVar[dict[str, str]] = {}
    # What a program imports in order to use it; nothing if there is nothing to import.
    modules = ""

    def close(self) -> None:
        """Ends what it started."""

    # Calls from a thread, and from a coroutine.

    def coroutine(self) -> Waitable:
        raise NotImplementedError

    def yielding(self) -> Waitable:
        raise NotImplementedError

    def function(self) -> Waitable:
        raise NotImplementedError

    def awaited_coroutine(self) -> Awaitable[int]:
        raise NotImplementedError

    def awaited_function(self) -> Awaitable[int]:
        raise NotImplementedError

    # The same for any function, where growth and fairness are measured.

    def start_coroutine(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        raise NotImplementedError

    def start_function(self, function: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def chained(self) -> Waitable:
        """A coroutine call, and a continuation upon it."""
        raise NotImplementedError

    # Runs `work` in the peer's own loop, or in one that is none of the peer's.

    def in_the_loop(self, work: Coroutine[Any, Any, float]) -> float:
        raise NotImplementedError

    def in_own_loop(self, work: Coroutine[Any, Any, float]) -> float:
        return asyncio.run(work)

    # The rows.

    def coroutine_each(self, count: int) -> float:
        return wait_for_each(self.coroutine, count)

    def coroutine_fan_out(self, count: int) -> float:
        return fan_out(self.coroutine, count)

    def yielding_each(self, count: int) -> float:
        return wait_for_each(self.yielding, count)

    def yielding_fan_out(self, count: int) -> float:
        return fan_out(self.yielding, count)

    def producers(self, count: int) -> float:
        return from_threads(self.coroutine, count)

    def call(self, count: int) -> float:
        return beyond_bare_call(self.coroutine, count)

    def function_each(self, count: int) -> float:
        return wait_for_each(self.function, count)

    def function_fan_out(self, count: int) -> float:
        return fan_out(self.function, count)

    def then_each(self, count: int) -> float:
        return fan_out(self.chained, count)

    def then_chain(self, count: int) -> float:
        raise NotImplementedError

    def loop_function(self, count: int) -> float:
        return self.in_the_loop(await_each(self.awaited_function, count))

    def loop_gather_functions(self, count: int) -> float:
        return self.in_the_loop(gather(self.awaited_function, count))

    def loop_coroutine(self, count: int) -> float:
        return self.in_the_loop(await_each(self.awaited_coroutine, count))

    def loop_gather_coroutines(self, count: int) -> float:
        return self.in_the_loop(gather(self.awaited_coroutine, count))

    def set_result(self, count: int) -> float:
        raise NotImplementedError

    def foreign_function(self, count: int) -> float:
        return self.in_own_loop(await_each(self.awaited_function, count))

    def foreign_gather(self, count: int) -> float:
        return self.in_own_loop(gather(self.awaited_function, count))

    def foreign_64(self, count: int) -> float:
        return self.in_own_loop(by_64(self.awaited_function, count))

    # Streams: the values of one generator, `async_values` or `values`.

    def stream_async(self, count: int) -> float:
        raise NotImplementedError(NO_STREAMS)

    def stream_threads(self, count: int) -> float:
        raise NotImplementedError(NO_STREAMS)

    def stream_to_loop(self, count: int) -> float:
        raise NotImplementedError(NO_STREAMS)

    def pending(self, count: int) -> float:
        raise NotImplementedError

    def decoration(self, count: int) -> float:
        raise NotImplementedError

    def import_time(self, count: int) -> float:
        basis = "import asyncio, concurrent.futures"
        seconds: dict[str, list[float]] = {basis: [], f"{basis}, {self.modules}": []}
        for _ in range(count):
            for program, samples in seconds.items():
                start = perf_counter()
                subprocess.run([sys.executable, "-c", program], check=True)
                samples.append(perf_counter() - start)
        without, with_it = (statistics.median(samples) for samples in seconds.values())
        return max(0.0, with_it - without) * count

    def bare_send(self, count: int) -> float:
        raise NotImplementedError

    def eager_task(self, count: int) -> float:
        raise NotImplementedError

    def two_switches(self, count: int) -> float:
        raise NotImplementedError


def check(total: int, count: int) -> None:
    if total != count:
        raise AssertionError(f"{count} operations gave {total}")


# In a plain thread.


def wait_for_each(call: Callable[[], Waitable], count: int) -> float:
    total = 0
    start = perf_counter()
    for _ in range(count):
        total += call().result()
    seconds = perf_counter() - start
    check(total, count)
    return seconds


def block_for_each(call: Callable[[], int], count: int) -> float:
    total = 0
    start = perf_counter()
    for _ in range(count):
        total += call()
    seconds = perf_counter() - start
    check(total, count)
    return seconds


def fan_out(call: Callable[[], Waitable], count: int) -> float:
    start = perf_counter()
    calls = [call() for _ in range(count)]
    total = sum([future.result() for future in calls])
    seconds = perf_counter() - start
    check(total, count)
    return seconds


def from_threads(call: Callable[[], Waitable], count: int, threads: int = 4) -> float:
    """`threads` threads fan out at once."""
    share = count // threads
    gate = threading.Barrier(threads + 1)
    totals: list[int] = []

    def produce() -> None:
        gate.wait()
        totals.append(sum([future.result() for future in [call() for _ in range(share)]]))

    producers = [threading.Thread(target=produce) for _ in range(threads)]
    for producer in producers:
        producer.start()
    gate.wait()
    start = perf_counter()
    for producer in producers:
        producer.join()
    seconds = perf_counter() - start
    check(sum(totals), share * threads)
    return seconds * count / (share * threads)


def beyond_bare_call(call: Callable[[], Waitable], count: int) -> float:
    """The calls alone, until they return, less what it takes to call the bare function.

    A burst of 1000 is over before the interpreter would switch to the loop's thread.
    """
    start = perf_counter()
    calls = [call() for _ in range(count)]
    seconds = perf_counter() - start
    check(sum([future.result() for future in calls]), count)
    start = perf_counter()
    bare = [coroutine() for _ in range(count)]
    seconds -= perf_counter() - start
    for each in bare:
        each.close()
    return max(seconds, 0.0)


def decorations(mark: Callable[[Callable[[], Any]], object], count: int) -> float:
    def fresh() -> Callable[[], Coroutine[Any, Any, int]]:
        async def marked() -> int:
            return 1

        return marked

    functions = [fresh() for _ in range(count)]
    start = perf_counter()
    kept = [mark(each) for each in functions]
    seconds = perf_counter() - start
    check(len(kept), count)
    return seconds


def bytes_each(make: Callable[[], object], count: int) -> float:
    """Bytes, not seconds: of memory, for `count` objects that are kept."""
    kept: list[object] = [make() for _ in range(100)]
    time.sleep(0.05)  # whatever a loop was told about these is done before the measurement
    gc.collect()
    tracemalloc.start()
    try:
        kept = [None] * count
        before = tracemalloc.get_traced_memory()[0]
        for index in range(count):
            kept[index] = make()
        time.sleep(0.2)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return float(after - before)


# In an event loop.


async def await_each(call: Callable[[], Awaitable[int]], count: int) -> float:
    total = 0
    start = perf_counter()
    for _ in range(count):
        total += await call()
    seconds = perf_counter() - start
    check(total, count)
    return seconds


async def gather(call: Callable[[], Awaitable[int]], count: int) -> float:
    start = perf_counter()
    total = sum(await asyncio.gather(*[call() for _ in range(count)]))
    seconds = perf_counter() - start
    check(total, count)
    return seconds


async def by_64(call: Callable[[], Awaitable[int]], count: int) -> float:
    """64 coroutines, each awaiting its share one after the other."""
    share = max(1, count // 64)

    async def one() -> int:
        total = 0
        for _ in range(share):
            total += await call()
        return total

    start = perf_counter()
    total = sum(await asyncio.gather(*[one() for _ in range(64)]))
    seconds = perf_counter() - start
    check(total, share * 64)
    return seconds * count / (share * 64)


def read(stream: Callable[[int], Iterable[int]], count: int) -> float:
    start = perf_counter()
    total = sum(stream(count))
    seconds = perf_counter() - start
    check(total, count)
    return seconds


async def read_in_loop(stream: Callable[[int], AsyncIterator[int]], count: int) -> float:
    start = perf_counter()
    total = 0
    async for value in stream(count):
        total += value
    seconds = perf_counter() - start
    check(total, count)
    return seconds


async def add_up(futures: list[Any]) -> int:
    total = 0
    for future in futures:
        total += await future
    return total


# In a loop in a thread of its own, as a program without a bridge would have it.


class LoopThread:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


# What has no counterpart in the standard library.


def chain(call: Callable[[], Any], step: Callable[[Any], int], count: int) -> float:
    """A call and `count` links; from the call to the outcome of the last."""
    start = perf_counter()
    end = call()
    for _ in range(count):
        end = end.then(step)
    total = end.result()
    seconds = perf_counter() - start
    check(total, count + 1)
    return seconds


def set_results(
    make: Callable[[], Any], start: Callable[[Coroutine[Any, Any, int]], Waitable], count: int
) -> float:
    """This thread makes `count` futures and sets them; a coroutine awaits one after the other."""
    began = perf_counter()
    futures = [make() for _ in range(count)]
    total = start(add_up(futures))
    for future in futures:
        future.set_result(1)
    result = total.result()
    seconds = perf_counter() - began
    check(result, count)
    return seconds
