"""Micro-benchmarks of the core in use: `make bench-micro` runs them on both, one after the other.

Each figure is the time of COUNT operations of one kind, without and with waiting for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import pytest

import unsync as package
from unsync import Unfuture, unsync

COUNT = 1000
TASKS = 16


class Benchmark(Protocol):
    """pytest-benchmark's fixture, which has no types of its own."""

    group: str

    def __call__(self, function: Callable[[], int]) -> int: ...


CORE = "compiled" if package.ACCELERATED else "pure"

pytestmark = pytest.mark.benchmark(warmup=True)


@unsync
async def coroutine() -> int:
    return 1


@unsync
async def coroutine_with_a_yield() -> int:
    await asyncio.sleep(0)
    return 1


@unsync
def function() -> int:
    return 1


CALLS = [coroutine, coroutine_with_a_yield, function]


def ident(call: Callable[[], Unfuture[int]]) -> str:
    return str(getattr(call, "__name__", call))


@pytest.mark.parametrize("call", CALLS, ids=ident)
def test_wait_for_each(benchmark: Benchmark, call: Callable[[], Unfuture[int]]) -> None:
    benchmark.group = f"{COUNT} times: call {ident(call)} and wait"

    def run() -> int:
        return sum(call().result() for _ in range(COUNT))

    assert benchmark(run) == COUNT


@pytest.mark.parametrize("call", CALLS, ids=ident)
def test_fan_out(benchmark: Benchmark, call: Callable[[], Unfuture[int]]) -> None:
    benchmark.group = f"call {ident(call)} {COUNT} times, then wait for all"

    def run() -> int:
        calls = [call() for _ in range(COUNT)]
        return sum(unfuture.result() for unfuture in calls)

    assert benchmark(run) == COUNT


def test_chain(benchmark: Benchmark) -> None:
    benchmark.group = f"a chain of {COUNT} map()"

    def run() -> int:
        end = coroutine()
        for _ in range(COUNT):
            end = end.map(lambda value: value + 1)
        return end.result()

    assert benchmark(run) == COUNT + 1


@pytest.mark.parametrize("call", CALLS, ids=ident)
def test_gather_in_the_ambient_loop(
    benchmark: Benchmark, call: Callable[[], Unfuture[int]]
) -> None:
    benchmark.group = f"gather {COUNT} calls of {ident(call)} in the ambient loop"

    @unsync
    async def gather() -> int:
        return sum(await asyncio.gather(*[call() for _ in range(COUNT)]))

    assert benchmark(lambda: gather().result()) == COUNT


@pytest.mark.parametrize("call", CALLS, ids=ident)
def test_tasks_that_await_in_turn(benchmark: Benchmark, call: Callable[[], Unfuture[int]]) -> None:
    """As the requests of a server do: the loop submits a call for each of them in one turn."""
    benchmark.group = f"{TASKS} tasks of the ambient loop await {COUNT} calls of {ident(call)}"

    async def request() -> int:
        return sum([await call() for _ in range(COUNT // TASKS)])

    @unsync
    async def serve() -> int:
        return sum(await asyncio.gather(*[request() for _ in range(TASKS)]))

    assert benchmark(lambda: serve().result()) == COUNT // TASKS * TASKS
