"""A loop that ended is freed, whatever was left in it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from collections.abc import Callable

import pytest
from support.loops import in_own_loop
from support.waiting import PATIENCE, collect, wait_until

from unsync import Unfuture, unsync


@unsync
async def suspended_call() -> int:
    await asyncio.sleep(0)
    return 1


@unsync
def thread_function() -> int:
    return 1


@unsync
def set_later(unfuture: Unfuture[int]) -> None:
    unfuture.set_result(1)


def set_from_outside() -> Unfuture[int]:
    unfuture = Unfuture[int]()
    set_later(unfuture)
    return unfuture


async def use_all() -> weakref.ref[asyncio.AbstractEventLoop]:
    """Leaves in its loop whatever can be left there."""
    loop = asyncio.get_running_loop()
    never = Unfuture[int]()
    never.add_done_callback(lambda _: loop)
    Unfuture(loop.create_future()).add_done_callback(lambda _: loop)
    await asyncio.gather(suspended_call(), thread_function(), set_from_outside())
    await thread_function().map(lambda value: value + 1)
    await asyncio.wait([thread_function()])
    waiting = asyncio.ensure_future(asyncio.wait_for(Unfuture(), PATIENCE))
    await asyncio.sleep(0)
    waiting.cancel()
    return weakref.ref(loop)


def gone(loops: list[weakref.ref[asyncio.AbstractEventLoop]]) -> Callable[[], bool]:
    def look() -> bool:
        collect()
        return all(loop() is None for loop in loops)

    return look


def test_a_loop_that_ended_is_freed() -> None:
    wait_until(gone([in_own_loop(use_all) for _ in range(3)]), "the end of the loops")


def test_a_loop_that_ended_is_freed_though_its_thread_goes_on() -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        loops = [pool.submit(in_own_loop, use_all).result(2 * PATIENCE) for _ in range(3)]
        wait_until(gone(loops), "the end of the loops")


def test_a_loop_that_ended_is_freed_though_what_it_awaited_goes_on() -> None:
    pending = Unfuture[int]()

    async def main() -> weakref.ref[asyncio.AbstractEventLoop]:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(pending), 0.001)
        assert await asyncio.wait([pending], timeout=0.001) == (set(), {pending})
        return weakref.ref(asyncio.get_running_loop())

    wait_until(gone([in_own_loop(main)]), "the end of the loop")
    pending.set_result(1)


@pytest.mark.parametrize("kind", ["callback", "awaiter"])
def test_a_loop_closed_with_an_undelivered_wakeup_is_freed(kind: str) -> None:
    unfuture = Unfuture[int]()

    def run() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)

        async def wait() -> None:
            await unfuture

        async def main() -> None:
            if kind == "callback":
                unfuture.add_done_callback(lambda _: None)
            else:
                asyncio.ensure_future(wait())  # noqa: RUF006
                await asyncio.sleep(0)

        loop.run_until_complete(main())
        unfuture.set_result(1)
        loop.close()
        return weakref.ref(loop)

    wait_until(gone([run()]), "the end of the loop")
