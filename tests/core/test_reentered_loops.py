"""Loops that are entered again by what they run: Qt's modal dialogs, nest_asyncio, `%gui`.

Whatever arrives while our code runs somebody else's, the inner loop hears of.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from support.waiting import PATIENCE, collect

from unsync import Unfuture, unsync

T = TypeVar("T")
Await = Callable[[Coroutine[Any, Any, Any]], Any]

pytestmark = pytest.mark.alone  # they hold the ambient loop, or patch the class of loops


def run_nested(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T]) -> T:
    """Runs the loop that runs this, until `coro` has ended, as nest_asyncio does."""
    outer = asyncio.current_task(loop)
    if outer is not None:
        asyncio.tasks._leave_task(loop, outer)
    try:
        task = loop.create_task(asyncio.wait_for(coro, PATIENCE))
        while not task.done():
            loop._run_once()  # type: ignore[attr-defined]
        return task.result()
    finally:
        if outer is not None:
            asyncio.tasks._enter_task(loop, outer)


class Ready(deque[asyncio.Handle]):
    """What a loop is to call in its turn: an inner run may have called some of it."""

    def popleft(self) -> asyncio.Handle:
        if self:
            return super().popleft()
        nothing = asyncio.Handle(int, (), asyncio.get_running_loop())
        nothing.cancel()
        return nothing


class Reentrant(asyncio.SelectorEventLoop):
    """Is entered again without a word: only its class tells that it may be."""

    def __init__(self) -> None:
        super().__init__()
        self._ready = Ready()


def of_a_stock_class() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    vars(loop)["_ready"] = Ready()
    return loop


def replaced_in_the_instance() -> asyncio.AbstractEventLoop:
    """As by nest_asyncio."""
    loop = of_a_stock_class()

    def run(coro: Any) -> Any:
        if loop.is_running():
            return run_nested(loop, coro)
        return asyncio.BaseEventLoop.run_until_complete(loop, coro)

    vars(loop)["run_until_complete"] = run
    return loop


@pytest.fixture(params=["class", "instance", "of the class", "debug"])
def factory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], asyncio.AbstractEventLoop]:
    """Of loops that may be entered again, in each way that there is to make one."""
    if request.param == "class":
        return Reentrant
    if request.param == "debug":

        def debugging() -> asyncio.AbstractEventLoop:
            loop = Reentrant()
            loop.set_debug(True)
            loop.slow_callback_duration = PATIENCE
            return loop

        return debugging
    if request.param == "instance":
        return replaced_in_the_instance
    own = asyncio.SelectorEventLoop.run_until_complete

    def run(loop: asyncio.AbstractEventLoop, coro: Any) -> Any:
        return own(loop, coro)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "run_until_complete", run)
    return of_a_stock_class


@unsync
async def give(value: int) -> int:
    return value


@unsync
async def give_late(value: int) -> int:
    await asyncio.sleep(0)
    return value


@unsync
def work(value: int) -> int:
    return value


def set_elsewhere(value: int) -> Unfuture[int]:
    unfuture = Unfuture[int]()
    threading.Thread(target=unfuture.set_result, args=(value,)).start()
    return unfuture


async def everything() -> list[int]:
    """What an inner loop may wait for."""
    here = [await give(1), await give_late(2), await work(3), await give(4).map(give)]
    there = [await set_elsewhere(5), await work(6).map(give_late)]
    burst = [*map(give, range(20)), *map(give_late, range(20)), *map(work, range(20))]
    return [*here, *there, sum(await asyncio.gather(*burst))]


RIGHT = [1, 2, 3, 4, 5, 6, 3 * sum(range(20))]


def re_enter(later: Unfuture[int] | None = None) -> list[int]:
    """Runs the running loop in turn, until everything that it waits for has come.

    :param later: something that stands behind the caller in the box.
    """

    async def inner() -> list[int]:
        seen = await everything()
        if later is not None:
            seen.append(await later)
        return seen

    return run_nested(asyncio.get_running_loop(), inner())


@unsync
async def in_a_first_step(later: Callable[[], Unfuture[int]]) -> list[int]:
    return re_enter(later())


@unsync
async def in_a_later_step(later: Callable[[], Unfuture[int]]) -> list[int]:
    await asyncio.sleep(0)
    return re_enter(later())


@unsync
async def resumed_by_a_worker(later: Callable[[], Unfuture[int]]) -> list[int]:
    await work(1)
    return re_enter(later())


@unsync
async def in_an_awaited_call(later: Callable[[], Unfuture[int]]) -> list[int]:
    return await in_a_first_step(later)


@unsync
async def in_an_awaited_call_of_a_resumed_task(later: Callable[[], Unfuture[int]]) -> list[int]:
    await work(1)
    return await in_a_first_step(later)


def in_a_continuation(later: Callable[[], Unfuture[int]]) -> Unfuture[list[int]]:
    return give(1).map(lambda _: re_enter(later()))


@unsync
async def in_a_callback(later: Callable[[], Unfuture[int]]) -> list[int]:
    seen = asyncio.get_running_loop().create_future()
    unfuture = Unfuture[int]()
    unfuture.add_done_callback(lambda _: seen.set_result(re_enter(later())))
    threading.Thread(target=unfuture.set_result, args=(1,)).start()
    found: list[int] = await seen
    return found


@unsync
async def twice_within(later: Callable[[], Unfuture[int]]) -> list[int]:
    """An inner loop within an inner loop, and one after it."""

    async def inner() -> list[int]:
        await work(1)
        return re_enter()

    await work(1)
    loop = asyncio.get_running_loop()
    assert run_nested(loop, inner()) == RIGHT
    return re_enter(later())


WAYS = [
    in_a_first_step,
    in_a_later_step,
    resumed_by_a_worker,
    in_an_awaited_call,
    in_an_awaited_call_of_a_resumed_task,
    in_a_continuation,
    in_a_callback,
    twice_within,
]
NAMES = [getattr(way, "__name__", "") for way in WAYS]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_an_inner_run_of_the_ambient_loop_hears_of_everything(
    way: Any, factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    unsync.loop_factory = factory
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        leave.wait(PATIENCE)

    unsync.loop.call_soon_threadsafe(hold)
    assert held.wait(PATIENCE)
    behind: list[Unfuture[int]] = []
    outcome = way(lambda: behind[0])
    behind += [give(7), give(8)]
    leave.set()
    assert outcome.result(PATIENCE) == [*RIGHT, 7]
    assert behind[1].result(PATIENCE) == 8
    assert give(9).result(PATIENCE) == 9


@pytest.fixture
def foreign(
    factory: Callable[[], asyncio.AbstractEventLoop],
) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs a coroutine in a loop that is none of unsync's."""
    loop = factory()
    yield lambda coro: asyncio.BaseEventLoop.run_until_complete(
        loop, asyncio.wait_for(coro, PATIENCE)
    )
    loop.close()
    collect()


def test_an_inner_run_of_another_loop_hears_of_everything(foreign: Await) -> None:
    async def main() -> None:
        assert await work(1) == 1  # from here on this runs within a drain
        assert re_enter() == RIGHT
        assert await give_late(2) == 2
        assert re_enter() == RIGHT

    foreign(main())


def test_a_callback_in_another_loop_may_enter_it_again(foreign: Await) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen = loop.create_future()
        unfuture = Unfuture[int]()
        unfuture.add_done_callback(lambda _: seen.set_result(re_enter()))
        threading.Thread(target=unfuture.set_result, args=(1,)).start()
        assert await seen == RIGHT

    foreign(main())


def test_tasks_that_are_resumed_together_may_each_enter_their_loop_again(foreign: Await) -> None:
    async def main() -> None:
        gate = Unfuture[int]()

        async def wait() -> list[int]:
            await gate
            return re_enter()

        tasks = [asyncio.ensure_future(wait()) for _ in range(5)]
        await asyncio.sleep(0)
        threading.Thread(target=gate.set_result, args=(1,)).start()
        assert await asyncio.gather(*tasks) == [RIGHT] * 5

    foreign(main())


@pytest.mark.usefixtures("fresh")
def test_a_loop_that_is_patched_by_what_a_drain_runs_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def patch() -> None:
        monkeypatch.setattr(asyncio.SelectorEventLoop, "run_until_complete", run_nested)

    async def main() -> list[int]:
        await work(1)
        patch()
        return re_enter()

    unsync.loop_factory = of_a_stock_class
    for _ in range(2):
        assert unsync(main)().result(PATIENCE) == RIGHT
    monkeypatch.undo()
    loop = of_a_stock_class()
    assert asyncio.BaseEventLoop.run_until_complete(loop, main()) == RIGHT
    loop.close()


@pytest.mark.usefixtures("fresh")
def test_stock_loops_are_asked_for_nothing_more() -> None:
    """Of the ambient loop, one turn for each call: no other one is asked for."""
    turns: list[str] = []

    @unsync
    async def watch() -> None:
        loop = asyncio.get_running_loop()
        await work(1)
        # Within a drain: nothing but this waits to be called. Where there is no eventfd, the loop
        # was woken by its own pipe, which is read in the same turn.
        ready = [repr(handle) for handle in loop._ready]  # type: ignore[attr-defined]
        turns.extend(handle for handle in ready if "_read_from_self" not in handle)

    unsync.loop_factory = asyncio.SelectorEventLoop
    watch().result(PATIENCE)
    assert turns == []
