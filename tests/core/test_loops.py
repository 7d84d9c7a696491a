"""The ambient loop may be of any make, and its own settings are honoured."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any

import pytest
from support.waiting import PATIENCE, ambient_loop_held, collect, wait_until, wait_until_suspended

from unsync import CancelledError, Unfuture, unsync

RunPython = Callable[..., subprocess.CompletedProcess[str]]


class Boom(Exception):
    pass


class CustomLoop(asyncio.SelectorEventLoop):
    pass


def new_uvloop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
    return loop


def a_uvloop() -> asyncio.AbstractEventLoop:
    pytest.importorskip("uvloop")
    return new_uvloop()


def a_debugging_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    return loop


def a_loop_with_a_task_factory() -> asyncio.AbstractEventLoop:
    class Task(asyncio.Task[Any]):
        pass

    def factory(
        loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        return Task(coro, loop=loop, **options)

    loop = asyncio.new_event_loop()
    loop.set_task_factory(factory)
    return loop


def a_loop_of_eager_tasks() -> asyncio.AbstractEventLoop:
    if sys.version_info < (3, 12):
        pytest.skip("came with Python 3.12")
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


MAKERS: list[Callable[[], asyncio.AbstractEventLoop]] = [
    asyncio.new_event_loop,
    CustomLoop,
    a_uvloop,
    a_debugging_loop,
    a_loop_with_a_task_factory,
    a_loop_of_eager_tasks,
]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def made(request: pytest.FixtureRequest, fresh: None) -> asyncio.AbstractEventLoop:
    """The ambient loop, made by each of the ways in turn."""
    loops: list[asyncio.AbstractEventLoop] = []

    def factory() -> asyncio.AbstractEventLoop:
        loops.append(request.param())
        return loops[0]

    if request.param in {a_uvloop, a_loop_of_eager_tasks}:
        request.param().close()  # it skips where there is none
    unsync.loop_factory = factory
    assert unsync.loop is loops[0]
    return loops[0]


@unsync
async def coroutine(value: int) -> int:
    await asyncio.sleep(0)
    return value + 1


@unsync
async def for_ever() -> None:
    await asyncio.Event().wait()


@unsync
def function(value: int) -> int:
    return value + 1


@unsync
async def agen(count: int) -> AsyncIterator[int]:
    for value in range(count):
        await asyncio.sleep(0)
        yield value


@unsync
def gen(count: int) -> Generator[int, None, None]:
    yield from range(count)


@unsync
@contextlib.asynccontextmanager
async def manager() -> AsyncIterator[asyncio.AbstractEventLoop]:
    await asyncio.sleep(0)
    yield asyncio.get_running_loop()


async def everything() -> None:
    assert await asyncio.gather(coroutine(1), function(2)) == [2, 3]
    assert await coroutine(1).map(function).map(coroutine) == 4
    assert [value async for value in agen(3)] == [value async for value in gen(3)] == [0, 1, 2]
    async with manager() as entered:
        assert entered is unsync.loop
    call = for_ever()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


def test_everything_works_from_everywhere(made: asyncio.AbstractEventLoop) -> None:
    assert [coroutine(1).result(PATIENCE), function(1).result(PATIENCE)] == [2, 2]
    assert list(agen(200)) == list(gen(200)) == list(range(200))
    with manager() as entered:
        assert entered is made
    Unfuture(everything()).result(PATIENCE)
    asyncio.run(asyncio.wait_for(everything(), PATIENCE))
    with contextlib.suppress(ImportError), contextlib.closing(new_uvloop()) as foreign:
        foreign.run_until_complete(asyncio.wait_for(everything(), PATIENCE))


def test_all_tasks_shows_the_calls_by_the_names_of_their_functions(
    made: asyncio.AbstractEventLoop,
) -> None:
    calls = [for_ever() for _ in range(3)]
    found = wait_until_suspended(for_ever.__qualname__, 3)
    assert {task.get_name() for task in found} == {for_ever.__qualname__}
    assert set(found) <= set(asyncio.all_tasks(made))
    for call in calls:
        call.cancel()


def test_the_exception_handler_hears_of_a_failure_that_nobody_looked_at(
    made: asyncio.AbstractEventLoop,
) -> None:
    heard: list[tuple[dict[str, Any], threading.Thread]] = []

    def handler(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        assert loop is made
        heard.append((context, threading.current_thread()))

    @unsync
    async def fail() -> None:
        raise Boom

    async def install() -> None:
        made.set_exception_handler(handler)

    Unfuture(install()).result(PATIENCE)
    call = fail()
    wait_until(call.done)
    del call
    wait_until(lambda: heard or collect() or heard, "the report")
    context, thread = heard[0]
    assert isinstance(context["exception"], Boom)
    assert "never retrieved" in context["message"]
    assert thread is unsync.thread


def test_debug_mode_warns_of_a_call_that_blocks_the_loop_and_names_it(
    fresh: None, caplog: pytest.LogCaptureFixture
) -> None:
    unsync.loop_factory = a_debugging_loop

    @unsync
    async def blocks() -> None:
        await asyncio.sleep(0)
        time.sleep(0.15)  # noqa: ASYNC251

    with caplog.at_level(logging.WARNING, logger="asyncio"):
        blocks().result(PATIENCE)
        wait_until(lambda: [r for r in caplog.records if "took" in r.getMessage()], "the warning")
    assert any(blocks.__qualname__ in record.getMessage() for record in caplog.records)


PROGRAM = """
    import asyncio, os, subprocess, sys, threading, time
    from unsync import unsync

    async def plain_task():
        await asyncio.Event().wait()

    @unsync
    async def first_call():
        await second_call()

    @unsync
    async def second_call():
        await asyncio.Event().wait()

    plain = threading.Thread(target=lambda: asyncio.run(plain_task()), daemon=True)
    plain.start()
    first_call()
    while not any(t.get_name() == "second_call" for t in asyncio.all_tasks(unsync.loop)):
        time.sleep(0.01)
    command = [sys.executable, "-m", "asyncio", "ps", str(os.getpid())]
    print(subprocess.run(command, capture_output=True, text=True).stdout, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.version_info < (3, 14), reason="came with Python 3.14")
def test_python_m_asyncio_ps_shows_the_calls(run_python: RunPython) -> None:
    shown = run_python(PROGRAM, timeout=2 * PATIENCE).stdout
    if "plain_task" not in shown:
        pytest.skip(
            "this Python may not look, or shows the main thread only (python/cpython#149230)"
        )
    assert "first_call" in shown
    assert "second_call" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="loops there take no signal handlers")
@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.alone  # there is one handler for a signal
def test_the_loops_signal_handlers_end_with_it(fresh: None, where: str) -> None:
    heard = threading.Event()
    ended: list[bool] = []
    before = signal.getsignal(signal.SIGUSR1)
    unsync.loop.add_signal_handler(signal.SIGUSR1, heard.set)
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert heard.wait(PATIENCE)
        if where == "main":
            assert unsync.shutdown(PATIENCE)
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
            assert signal.set_wakeup_fd(-1) == -1
        else:
            # Which may remove none: but the loop ends without an error all the same.
            other = threading.Thread(target=lambda: ended.append(unsync.shutdown(PATIENCE)))
            other.start()
            other.join(PATIENCE)
            assert ended == [True]
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.alone  # there is one ambient loop
def test_what_has_not_begun_at_a_shutdown_never_does() -> None:
    """Nor is anybody left to wait for it; what tasks call while they clean up does begin."""
    begun: list[str] = []
    cleaned_up: list[str] = []

    @unsync
    async def call(what: str) -> str:
        begun.append(what)
        return what

    runs_now = threading.Event()

    @unsync
    async def runs() -> None:
        runs_now.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned_up.append(await call("clean-up"))

    @unsync
    async def numbers() -> AsyncIterator[int]:
        begun.append("stream")
        yield 1

    @unsync
    @contextlib.asynccontextmanager
    async def resource() -> AsyncIterator[int]:
        begun.append("resource")
        yield 1

    def enter() -> None:
        with resource():
            pass

    task = runs()
    assert runs_now.wait(PATIENCE)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        with ambient_loop_held():
            calls = [call("call"), call("call").map(str), Unfuture.from_value(1).map(begun.append)]
            readers = [threads.submit(next, numbers()), threads.submit(enter)]
            wait_until(lambda: unsync.stats().loop_queue >= len(calls) - 1 + len(readers))
            ending = threads.submit(unsync.shutdown, PATIENCE)
            wait_until(lambda: all(each.cancelled() for each in calls))
        assert ending.result(PATIENCE)
        for reader in readers:
            with pytest.raises(CancelledError):
                reader.result(PATIENCE)
    assert task.cancelled()
    assert cleaned_up == begun == ["clean-up"]
