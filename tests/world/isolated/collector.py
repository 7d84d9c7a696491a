"""What the garbage collector finds, and what it must not find."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from support.waiting import (
    PATIENCE,
    ambient_loop_held,
    collect,
    wait_until,
    wait_until_suspended,
)

from unsync import Unfuture, unsync


@unsync
async def coroutine() -> int:
    return 1


# What is at work stays.


@pytest.mark.parametrize("make", [asyncio.Future, Unfuture], ids=["future", "unfuture"])
def test_a_call_that_nobody_keeps_runs_to_its_end(make: Callable[[], Any]) -> None:
    """asyncio refers to its tasks weakly: this one hangs on nothing but itself."""
    waits_for: list[weakref.ref[Any]] = []
    ended = threading.Event()

    @unsync
    async def forgotten() -> None:
        gate = make()
        waits_for.append(weakref.ref(gate))
        await gate
        ended.set()

    forgotten()
    wait_until_suspended(forgotten.__qualname__)
    collect()
    gate = waits_for[0]()
    assert gate is not None
    unsync.loop.call_soon_threadsafe(gate.set_result, None)
    assert ended.wait(PATIENCE)


def test_a_weakly_held_task_that_started_in_an_await_runs_to_its_end() -> None:
    """Its caller is gone, and asyncio refers to its tasks weakly: it hangs on itself only."""
    gates: list[weakref.ref[Any]] = []
    ended = threading.Event()

    @unsync
    async def inner() -> None:
        gate = asyncio.Future[None]()
        gates.append(weakref.ref(gate))
        await gate
        ended.set()

    @unsync
    async def outer() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(inner()), 0.001)

    outer().result(PATIENCE)
    wait_until(lambda: gates)
    collect()
    gate = gates[0]()
    assert gate is not None
    unsync.loop.call_soon_threadsafe(gate.set_result, None)
    assert ended.wait(PATIENCE)


# What is over goes.


def gone(*references: weakref.ref[Any]) -> Callable[[], bool]:
    def look() -> bool:
        coroutine().result(PATIENCE)  # the loop is through with them
        collect()
        return all(reference() is None for reference in references)

    return look


def test_an_ended_call_is_not_kept() -> None:
    @unsync
    async def ask() -> weakref.ref[Any]:
        await asyncio.sleep(0)
        return weakref.ref(asyncio.current_task())

    wait_until(gone(ask().result(PATIENCE)), "the end of its task")


def test_an_idle_worker_keeps_neither_argument_nor_result_alive() -> None:
    class Thing:
        pass

    @unsync
    def pair(thing: Thing) -> list[Thing]:
        return [thing, Thing()]

    things = [weakref.ref(thing) for thing in pair(Thing()).result(PATIENCE)]
    wait_until(gone(*things), "the end of both")


def test_a_request_that_nobody_will_answer_can_be_forgotten() -> None:
    """Continuations hang upon one that waits for a manual Unfuture; nothing else holds them."""
    waiting: list[Unfuture[int]] = []

    class Request:
        def __init__(self, links: int) -> None:
            with ambient_loop_held():
                answer = coroutine().then(self.send)
                for _ in range(links):
                    answer = answer.map(self.use)
                self.answer = answer

        def send(self, _: Unfuture[int]) -> Unfuture[int]:
            waiting.append(Unfuture())
            return waiting[-1]

        def use(self, reply: int) -> int:
            return reply

    references = []
    for links in (0, 1, 5):
        request = Request(links)
        references.append(weakref.ref(request))
        wait_until(lambda: len(waiting) == 1)
        coroutine().result(PATIENCE)  # the loop is through with it
        waiting.clear()
        del request
    wait_until(gone(*references), "the end of the forgotten requests")


@pytest.mark.parametrize("kind", ["regular", "async"])
def test_a_stream_that_it_finds_is_closed_where_it_runs(kind: str) -> None:
    closed: queue.Queue[str] = queue.Queue()

    def close() -> None:
        threading.Event().wait(0.01)  # for another thread to come in, if one wants to
        closed.put(threading.current_thread().name)

    @unsync
    def regular() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            close()

    @unsync
    async def in_the_loop() -> AsyncIterator[int]:
        try:
            for number in range(1000):
                yield number
        finally:
            close()

    def leave_one_in_a_cycle() -> None:
        stream = regular() if kind == "regular" else in_the_loop()
        assert next(stream) == 0
        wait_until(lambda: stream._channel.resting)
        cycle: list[Any] = [stream]
        cycle.append(cycle)

    leave_one_in_a_cycle()
    collect()
    assert closed.get(timeout=PATIENCE).startswith("unsync")
    collect()
    assert closed.empty()
