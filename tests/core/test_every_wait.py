"""Every way to wait: made up for in a pool, refused where it would block the ambient loop."""

from __future__ import annotations

import asyncio
import asyncio.futures
import concurrent.futures
import functools
import gc
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import InvalidStateError, Unfuture, unsync
from unsync.executors import ThreadExecutor


class Boom(Exception):
    pass


@unsync
async def coroutine(x: int) -> int:
    return x


@unsync
def function(x: int) -> int:
    return x


@pytest.fixture
def never() -> Iterator[Unfuture[int]]:
    unfuture: Unfuture[int] = Unfuture()
    yield unfuture
    unfuture.cancel()


# Outside of a running loop asyncio cannot gather: what ends meanwhile is lost.


@pytest.mark.parametrize("call", [coroutine, function])
@pytest.mark.parametrize(
    "way",
    [
        lambda *calls: asyncio.gather(*calls),
        lambda *calls: asyncio.shield(calls[0]),
        lambda *calls: calls[1].get_loop(),
    ],
    ids=["gather", "shield", "get_loop"],
)
def test_what_belongs_in_a_coroutine_is_an_error_outside(
    way: Callable[..., object], call: Callable[[int], Unfuture[int]], never: Unfuture[int]
) -> None:
    with pytest.raises(RuntimeError, match=r"gather\(\), shield\(\) and the like inside a cor"):
        way(never, call(1))


def test_a_finished_one_is_no_exception() -> None:
    done: Unfuture[int] = Unfuture.from_value(1)
    with pytest.raises(RuntimeError, match="inside a coroutine"):
        asyncio.gather(done)


def test_no_ambient_loop_is_started_for_the_error(fresh: None) -> None:
    with pytest.raises(RuntimeError, match="inside a coroutine"):
        Unfuture[int]().get_loop()
    assert not [thread for thread in threading.enumerate() if thread.name == "unsync"]


# In the ambient loop's thread.

REFUSED: dict[str, Callable[[Any], object]] = {
    "result": lambda u: u.result(),
    "exception": lambda u: u.exception(),
    "result, with a timeout": lambda u: u.result(0.1),
    "wait": lambda u: concurrent.futures.wait([u]),
    "wait, with a timeout": lambda u: concurrent.futures.wait([u], 0.1),
    "wait for the first": lambda u: concurrent.futures.wait(
        [u], return_when=concurrent.futures.FIRST_COMPLETED
    ),
    "as_completed": lambda u: list(concurrent.futures.as_completed([u])),
    "view's result": lambda u: u.concurrent_future.result(),
    "view's exception": lambda u: u.concurrent_future.exception(),
    "wait for the view": lambda u: concurrent.futures.wait([u.concurrent_future]),
    "as_completed of the view": lambda u: list(
        concurrent.futures.as_completed([u.concurrent_future])
    ),
    "wait for another one": lambda u: concurrent.futures.wait([u, concurrent.futures.Future()]),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_would_block_the_ambient_loop_is_an_error(way: str, never: Unfuture[int]) -> None:
    @unsync
    async def main() -> None:
        REFUSED[way](never)

    with pytest.raises(InvalidStateError, match="use 'await' instead"):
        main().result(PATIENCE)


@pytest.mark.parametrize("way", REFUSED)
def test_waiting_for_what_is_done_blocks_nobody(way: str) -> None:
    if way == "wait for another one":
        return

    @unsync
    async def main() -> None:
        REFUSED[way](Unfuture.from_value(1))

    main().result(PATIENCE)


def test_looking_whether_some_are_done_blocks_nobody(never: Unfuture[int]) -> None:
    done: Unfuture[int] = Unfuture.from_value(1)

    @unsync
    async def main() -> Any:
        futures: list[Any] = [never, done]
        return concurrent.futures.wait(futures, timeout=0)

    assert main().result(PATIENCE) == ({done}, {never})


# In a thread of a pool: a spare one takes its place.


async def by_gather(call: Unfuture[int]) -> int:
    return sum(await asyncio.gather(call, call.map(lambda _: 0)))


async def by_wait(call: Unfuture[int]) -> int:
    done, _ = await asyncio.wait([call])  # type: ignore[type-var]
    return done.pop().result()  # type: ignore[no-any-return]


async def by_wait_with_timeout(call: Unfuture[int]) -> int:
    done, _ = await asyncio.wait([call], timeout=PATIENCE)  # type: ignore[type-var]
    return done.pop().result()  # type: ignore[no-any-return]


async def by_as_completed(call: Unfuture[int]) -> int:
    (found,) = [await found for found in asyncio.as_completed([call])]
    return found


async def by_shield(call: Unfuture[int]) -> int:
    return await asyncio.shield(call)


async def by_wait_for(call: Unfuture[int]) -> int:
    return await asyncio.wait_for(call, PATIENCE)


async def by_view(call: Unfuture[int]) -> int:
    return await call.future


async def by_gather_of_views(call: Unfuture[int]) -> int:
    return sum(await asyncio.gather(call.future))


async def by_wrapped_view(call: Unfuture[int]) -> int:
    return await asyncio.wrap_future(call.concurrent_future)


async def by_callback(call: Unfuture[int]) -> int:
    called = asyncio.Event()
    call.add_done_callback(lambda _: called.set())
    await called.wait()
    return call.result()


LOOP_WAYS = [
    by_gather,
    by_wait,
    by_wait_with_timeout,
    by_as_completed,
    by_shield,
    by_wait_for,
    by_view,
    by_gather_of_views,
    by_wrapped_view,
    by_callback,
]


def by_concurrent_view(call: Unfuture[int]) -> int:
    return call.concurrent_future.result()


def by_exception_of_view(call: Unfuture[int]) -> int:
    assert call.concurrent_future.exception() is None
    return call.result()


def by_wait_for_view(call: Unfuture[int]) -> int:
    done, _ = concurrent.futures.wait([call.concurrent_future])
    return done.pop().result()


def by_as_completed_of_view(call: Unfuture[int]) -> int:
    (found,) = concurrent.futures.as_completed([call.concurrent_future])
    return found.result()


THREAD_WAYS = [by_concurrent_view, by_exception_of_view, by_wait_for_view, by_as_completed_of_view]


def in_own_loop(way: Callable[[Unfuture[int]], Any]) -> Callable[[Unfuture[int]], int]:
    @functools.wraps(way)
    def run(call: Unfuture[int]) -> int:
        async def main() -> int:
            found: int = await way(call)
            return found

        return asyncio.run(main())

    return run


@pytest.mark.parametrize(
    "way", [*map(in_own_loop, LOOP_WAYS), *THREAD_WAYS], ids=lambda way: way.__name__
)
def test_thirty_deep_with_one_thread(
    make_pool: Callable[..., ThreadExecutor], way: Callable[[Unfuture[int]], int]
) -> None:
    make_pool(1)

    @unsync
    def down(depth: int) -> int:
        return 0 if depth == 0 else way(down(depth - 1)) + 1

    assert down(30).result(PATIENCE) == 30


def test_many_that_gather_in_loops_of_their_own(make_pool: Callable[..., ThreadExecutor]) -> None:
    make_pool(4)

    @unsync
    def outer(_: int) -> int:
        async def main() -> int:
            return sum(await asyncio.gather(*(function(i) for i in range(3))))

        return asyncio.run(main())

    calls = [outer(k) for k in range(20)]
    assert [call.result(PATIENCE) for call in calls] == [3] * 20


def waiting_workers() -> int:
    return unsync.stats().workers_waiting


async def ends(way: Awaitable[object], never: Unfuture[int]) -> None:
    """Waits in that way until it gives up, by its timeout or because it is cancelled."""
    task = asyncio.ensure_future(way)
    for _ in range(5):
        await asyncio.sleep(0)
    assert waiting_workers() == 1
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)


@pytest.mark.parametrize("way", [by_wait, by_wait_for, "removed"])
def test_who_gives_up_waits_no_more(
    make_pool: Callable[..., ThreadExecutor], never: Unfuture[int], way: Any
) -> None:
    make_pool(1)

    async def add_and_remove() -> None:
        never.add_done_callback(print)
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            never.remove_done_callback(print)

    @unsync
    def job() -> int:
        async def main() -> int:
            await ends(add_and_remove() if way == "removed" else way(never), never)
            return waiting_workers()

        return asyncio.run(main())

    assert job().result(PATIENCE) == 0


def test_a_callback_that_another_thread_removes_ends_the_wait(
    make_pool: Callable[..., ThreadExecutor], never: Unfuture[int]
) -> None:
    make_pool(1)
    added = threading.Event()

    @unsync
    def job() -> bool:
        async def main() -> bool:
            never.add_done_callback(print)
            assert waiting_workers() == 1
            added.set()
            while waiting_workers():  # noqa: ASYNC110  # another thread's doing, without an event
                await asyncio.sleep(0.001)
            return True

        return asyncio.run(asyncio.wait_for(main(), PATIENCE))

    call = job()
    assert added.wait(PATIENCE)
    assert never.remove_done_callback(print) == 1
    assert call.result(PATIENCE)


def test_a_view_that_is_given_up_ends_the_wait(
    make_pool: Callable[..., ThreadExecutor], never: Unfuture[int]
) -> None:
    make_pool(1)

    @unsync
    def job() -> list[int]:
        async def main() -> list[int]:
            view = never.future
            counts = []
            for callback in (print, repr):
                view.add_done_callback(callback)
                counts.append(waiting_workers())
            for callback in (print, repr):
                view.remove_done_callback(callback)
                counts.append(waiting_workers())
            return counts

        return asyncio.run(main())

    assert job().result(PATIENCE) == [1, 1, 1, 0]


@pytest.mark.parametrize("way", [lambda u: u, asyncio.gather], ids=["await", "gather"])
def test_a_wait_of_an_earlier_job_is_not_taken_for_one_of_this(
    make_pool: Callable[..., ThreadExecutor], never: Unfuture[int], way: Callable[..., Any]
) -> None:
    """A worker may keep its loop: what waits there since an earlier job ends in a later one."""
    make_pool(1)
    loop = asyncio.new_event_loop()
    earlier: Unfuture[int] = Unfuture()

    async def wait(unfuture: Unfuture[int]) -> object:
        return await way(unfuture)

    @unsync
    def first() -> None:
        async def main() -> None:
            loop.kept = asyncio.ensure_future(wait(earlier))  # type: ignore[attr-defined]
            await asyncio.sleep(0)
            assert waiting_workers() == 1

        loop.run_until_complete(main())

    @unsync
    def second() -> list[int]:
        async def main() -> list[int]:
            counts = [waiting_workers()]
            task = asyncio.ensure_future(wait(never))
            await asyncio.sleep(0)
            counts.append(waiting_workers())
            earlier.set_result(1)
            for _ in range(3):
                await asyncio.sleep(0)
            counts.append(waiting_workers())
            never.cancel()
            await asyncio.wait([task, loop.kept])  # type: ignore[attr-defined]
            counts.append(waiting_workers())
            return counts

        return loop.run_until_complete(main())

    first().result(PATIENCE)
    wait_until(lambda: not waiting_workers())  # else a spare thread would take the second one
    assert second().result(PATIENCE) == [0, 1, 1, 0]
    loop.close()


# Views.


@unsync
async def fail() -> None:
    raise Boom


@pytest.mark.parametrize("outcome", ["result", "failure", "cancellation"])
def test_the_view_of_a_finished_one_is_finished(outcome: str) -> None:
    unfuture: Unfuture[int] = Unfuture()
    if outcome == "result":
        unfuture.set_result(1)
    elif outcome == "failure":
        unfuture.set_exception(Boom())
    else:
        unfuture.cancel("why")
    views: list[Any] = [unfuture.future, unfuture.concurrent_future]
    for view in views:
        assert view.done()
        if outcome == "cancellation":
            assert view.cancelled()
            with pytest.raises((asyncio.CancelledError, concurrent.futures.CancelledError)):
                view.result()
        elif outcome == "failure":
            assert isinstance(view.exception(), Boom)
        else:
            assert view.result() == 1


def test_the_view_of_a_call_that_somebody_waited_for_is_finished() -> None:
    for _ in range(100):
        call = fail()
        with pytest.raises(Boom):
            call.result(PATIENCE)
        assert isinstance(call.future.exception(), Boom)
        assert isinstance(call.concurrent_future.exception(), Boom)


def test_a_view_that_was_handed_out_before_is_finished_for_who_waits_there() -> None:
    unfuture: Unfuture[int] = Unfuture()
    view = unfuture.concurrent_future
    unfuture.set_result(1)
    assert view.result(0) == 1
    assert view.exception(0) is None


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was reported as never retrieved so far."""
    caplog.set_level(logging.ERROR)

    def read() -> list[str]:
        gc.collect()
        coroutine(1).result(PATIENCE)  # what was reported to the ambient loop is there
        return [m for m in map(logging.LogRecord.getMessage, caplog.records) if "retrieved" in m]

    return read


VIEWS = {
    "asyncio": lambda unfuture: unfuture.future,
    "concurrent": lambda unfuture: unfuture.concurrent_future,
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("first", ["view", "failure"])
def test_seen_on_the_unfuture_is_seen_on_the_view(
    reports: Callable[[], list[str]], kind: str, first: str
) -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view: Any = VIEWS[kind](unfuture) if first == "view" else None
        unfuture.set_exception(Boom())
        if view is None:
            view = VIEWS[kind](unfuture)
        with pytest.raises(Boom):
            await unfuture
        await asyncio.sleep(0)
        assert view.done()

    asyncio.run(main())
    assert reports() == []


def look_by_result(view: Any) -> None:
    with pytest.raises(Boom):
        view.result()


def look_by_exception(view: Any) -> None:
    assert isinstance(view.exception(), Boom)


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("look", [look_by_result, look_by_exception])
def test_seen_on_the_view_is_seen_on_the_unfuture(
    reports: Callable[[], list[str]], kind: str, look: Callable[[Any], None]
) -> None:
    unfuture: Unfuture[int] = Unfuture()
    unfuture.set_exception(Boom())
    look(VIEWS[kind](unfuture))
    del unfuture
    assert reports() == []


@pytest.mark.parametrize("early", [False, True])
def test_awaiting_a_view_is_looking_at_it(reports: Callable[[], list[str]], early: bool) -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view = unfuture.future
        if early:
            unfuture.set_exception(Boom())
            await asyncio.sleep(0)
        else:
            asyncio.get_running_loop().call_soon(unfuture.set_exception, Boom())
        with pytest.raises(Boom):
            await view

    asyncio.run(main())
    assert reports() == []


@pytest.mark.parametrize("kind", VIEWS)
def test_what_is_seen_on_neither_is_reported_once(
    reports: Callable[[], list[str]], kind: str
) -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view = VIEWS[kind](unfuture)
        unfuture.set_exception(Boom())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert view.done()

    asyncio.run(main())
    wait_until(lambda: len(reports()) == 1, "the report")
    assert "Unfuture exception was never retrieved" in reports()[0]


def test_a_view_of_a_stop_iteration_raises_what_await_raises() -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view = unfuture.future
        unfuture.set_exception(StopIteration())
        with pytest.raises(RuntimeError, match="StopIteration"):
            await view

    asyncio.run(main())


# asyncio's way to copy one future's outcome into another.


@pytest.mark.parametrize("outcome", ["result", "failure", "cancellation"])
@pytest.mark.parametrize("make", [lambda u: u, *VIEWS.values()], ids=["itself", *VIEWS])
def test_asyncio_chains_futures_to_it(
    reports: Callable[[], list[str]], outcome: str, make: Callable[[Any], Any]
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        unfuture: Unfuture[int] = Unfuture()
        target: asyncio.Future[int] = loop.create_future()
        source = make(unfuture)
        if isinstance(source, asyncio.Future) and hasattr(
            concurrent.futures.Future, "_get_snapshot"
        ):
            return  # from 3.15 on asyncio does so with no asyncio future
        asyncio.futures._chain_future(source, target)  # type: ignore[attr-defined]
        if outcome == "result":
            unfuture.set_result(1)
            assert await asyncio.wait_for(target, PATIENCE) == 1
        elif outcome == "failure":
            unfuture.set_exception(Boom())
            with pytest.raises(Boom):
                await asyncio.wait_for(target, PATIENCE)
        else:
            unfuture.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(target, PATIENCE)

    asyncio.run(main())
    assert reports() == []


def test_the_snapshot_that_is_copied() -> None:
    unfuture: Any = Unfuture()
    assert unfuture._get_snapshot() == (False, False, None, None)
    unfuture.set_result(1)
    assert unfuture._get_snapshot() == (True, False, 1, None)
    failure = Boom()
    failed: Any = Unfuture()
    failed.set_exception(failure)
    assert failed._get_snapshot() == (True, False, None, failure)
    assert failed.concurrent_future._get_snapshot() == (True, False, None, failure)
    cancelled: Any = Unfuture()
    cancelled.cancel("why")
    assert cancelled._get_snapshot() == (True, True, None, None)


# Timeouts.


def test_a_timeout_is_a_number(never: Unfuture[int]) -> None:
    waits: list[Callable[[Any], object]] = [
        never.result,
        never.exception,
        never.concurrent_future.result,
        lambda timeout: unsync(never.result)(timeout).result(PATIENCE),
    ]
    for wait in waits:
        with pytest.raises(ValueError, match="not nan"):
            wait(math.nan)
        with pytest.raises(TypeError):
            wait("3")


def test_a_timeout_may_be_infinite() -> None:
    gate: Unfuture[int] = Unfuture()
    unsync(gate.set_result)(1)
    assert gate.result(math.inf) == 1
    assert unsync(coroutine(2).result)(math.inf).result(math.inf) == 2
    assert Unfuture.from_value(3).concurrent_future.result(math.inf) == 3


def test_a_shutdown_may_take_for_ever(fresh: None) -> None:
    assert coroutine(1).result(PATIENCE) == 1
    assert function(1).result(PATIENCE) == 1
    assert unsync.shutdown(math.inf)
    with pytest.raises(ValueError, match="not nan"):
        unsync.shutdown(math.nan)


def test_the_end_of_a_pool_may_be_waited_for_for_ever(fresh: None) -> None:
    executor = ThreadExecutor(1)
    executor.submit(abs, 1).result(PATIENCE)
    executor.shutdown(wait=False)
    assert executor.join(math.inf)


@pytest.mark.parametrize("way", ["itself", "view"])
def test_who_would_wait_for_a_while_only_gets_no_error_before(
    make_pool: Callable[..., ThreadExecutor], way: str
) -> None:
    """Past the bound of a pool waiting without a timeout is an error, since it is for ever."""
    make_pool(1, spare_workers=0)

    @unsync
    def impatient() -> int:
        call: Any = function(1)
        if way == "view":
            call = call.concurrent_future
        found: int = call.result(0.05)
        return found

    with pytest.raises((TimeoutError, concurrent.futures.TimeoutError)):
        impatient().result(PATIENCE)
    with pytest.raises(RuntimeError, match="all 1 threads of the pool wait"):
        unsync(lambda: function(1).result())().result(PATIENCE)
