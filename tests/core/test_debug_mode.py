"""What asyncio's debug mode shows: a coroutine that blocks the ambient loop is named."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE, collect, wait_until_suspended

from unsync import Unfuture, unsync

SLOW = 0.05


def take_a_turn() -> None:
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), unsync.loop).result(PATIENCE)


@pytest.fixture(autouse=True)
def debug_mode() -> Iterator[None]:
    loop = unsync.loop
    before = loop.get_debug(), loop.slow_callback_duration
    loop.set_debug(True)
    loop.slow_callback_duration = SLOW / 2
    take_a_turn()  # that it was set is seen by the turns that begin after it
    yield
    loop.set_debug(before[0])
    loop.slow_callback_duration = before[1]


def block() -> None:
    time.sleep(SLOW)


async def blocks_at_once() -> None:
    block()


async def blocks_later() -> None:
    await asyncio.sleep(0)
    block()


async def blocks_after_an_await(awaited: Unfuture[Any]) -> None:
    await awaited
    block()


def blocks_as_a_continuation(_: object) -> None:
    block()


def after_an_await() -> Unfuture[Any]:
    awaited: Unfuture[Any] = Unfuture()
    waiting = unsync(blocks_after_an_await)(awaited)
    wait_until_suspended(blocks_after_an_await.__qualname__)
    awaited.set_result(None)
    return waiting


CALLS: dict[Callable[..., Any], Callable[[], Unfuture[Any]]] = {
    blocks_at_once: unsync(blocks_at_once),
    blocks_later: unsync(blocks_later),
    blocks_after_an_await: after_an_await,
    blocks_as_a_continuation: lambda: Unfuture.from_value(1).then(blocks_as_a_continuation),
}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    take_a_turn()  # the loop warns of a callback when it is over, and this is behind it
    return [text for name, _, text in caplog.record_tuples if name == "asyncio"]


@pytest.mark.parametrize("function", CALLS)
def test_what_blocks_the_loop_is_named(
    function: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    CALLS[function]().result(PATIENCE)
    (named, *_) = [text for text in warnings(caplog) if function.__qualname__ in text]
    assert named.startswith("Executing <")
    assert float(named.split(" took ")[1].removesuffix(" seconds")) >= SLOW / 2


def test_what_takes_less_than_the_loop_allows_is_not(caplog: pytest.LogCaptureFixture) -> None:
    unsync.loop.slow_callback_duration = PATIENCE
    for call in CALLS.values():
        call().result(PATIENCE)
    assert warnings(caplog) == []


def test_outside_of_debug_mode_nothing_is(caplog: pytest.LogCaptureFixture) -> None:
    unsync.loop.set_debug(False)
    take_a_turn()
    for call in CALLS.values():
        call().result(PATIENCE)
    assert warnings(caplog) == []


# A failure that nobody looked at: no line is told that is not the call's.


@pytest.fixture
def born_in_debug_mode() -> Iterator[None]:
    def make() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_debug(True)
        return loop

    assert unsync.shutdown(PATIENCE)
    unsync.loop_factory = make
    yield
    assert unsync.shutdown(PATIENCE)
    unsync.loop_factory = None


@unsync
async def fail() -> None:
    raise OSError("nobody looked")


@unsync
async def nothing() -> None:
    pass


def dropped_in_the_loop() -> None:
    @unsync
    async def caller() -> None:
        fail()
        await nothing()  # which comes after it
        collect()  # on Python 3.13 the failure's task is in a circle then

    caller().result(PATIENCE)


def dropped_while_the_loop_has_it() -> None:
    fail()


def dropped_in_another_thread() -> None:
    call = fail()
    assert unsync.drain(PATIENCE)
    del call


@pytest.mark.parametrize(
    "drop", [dropped_in_the_loop, dropped_while_the_loop_has_it, dropped_in_another_thread]
)
def test_the_report_of_a_failure_names_no_line_of_anything_else(
    drop: Callable[[], None], born_in_debug_mode: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert unsync.loop.get_debug()
    drop()
    assert unsync.drain(PATIENCE)
    collect()
    take_a_turn()
    told = [each.getMessage() for each in caplog.records if each.name == "asyncio"]
    # On a busy machine the loop also warns of what took long.
    (report,) = [each for each in told if each.startswith("Unfuture exception was never retrieved")]
    assert [line.partition(":")[0] for line in report.splitlines()[1:]] == ["future"]
