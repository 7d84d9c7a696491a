"""`Unfuture.future` and `.concurrent_future`: true futures of the two kinds that show it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.waiting import PATIENCE, collect, wait_until, wait_until_suspended

from unsync import Unfuture, unsync


class Boom(Exception):
    pass


@unsync
async def coroutine() -> int:
    await asyncio.sleep(0)
    return 42


@unsync
def function() -> int:
    return 42


def done() -> Unfuture[int]:
    return Unfuture.from_value(42)


def set_later() -> Unfuture[int]:
    unfuture: Unfuture[int] = Unfuture()
    threading.Timer(0.001, unfuture.set_result, [42]).start()
    return unfuture


sources = pytest.mark.parametrize("make", [coroutine, function, done, set_later])


async def in_own_task(view: asyncio.Future[Any]) -> Any:
    return await view


# Of asyncio.


@sources
def test_in_a_loop_it_belongs_to_that_loop(make: Callable[[], Unfuture[int]]) -> None:
    async def main() -> int:
        view = make().future
        assert isinstance(view, asyncio.Future)
        assert view.get_loop() is asyncio.get_running_loop()
        return await asyncio.wait_for(view, PATIENCE)

    assert asyncio.run(main()) == 42
    assert unsync(main)().result(PATIENCE) == 42


@sources
def test_elsewhere_it_belongs_to_the_ambient_loop(make: Callable[[], Unfuture[int]]) -> None:
    view = make().future
    assert isinstance(view, asyncio.Future)
    assert view.get_loop() is unsync.loop
    assert unsync(in_own_task)(view).result(PATIENCE) == 42


def test_an_asyncio_view_fails_with_it() -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view = unfuture.future
        assert not view.done()
        unfuture.set_exception(Boom("lost"))
        assert view.done()  # in its own loop at once
        with pytest.raises(Boom, match="lost"):
            await view

    asyncio.run(main())


def test_an_asyncio_view_is_cancelled_with_it_and_it_with_the_view() -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view = unfuture.future
        assert unfuture.cancel("enough")
        with pytest.raises(asyncio.CancelledError) as caught:
            await view
        assert caught.value.args == ("enough",)
        assert view.cancelled()

        started: list[object] = []
        begun: Unfuture[None] = Unfuture()

        @unsync
        async def wait() -> None:
            started.append(1)
            begun.set_result(None)
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                started.append("cancelled")
                raise

        call = wait()
        view_of_call = call.future
        await begun
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(view_of_call, 0.01)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert started == [1, "cancelled"]

    asyncio.run(main())


def test_setting_an_asyncio_view_sets_it() -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        other = unfuture.future
        view = unfuture.future
        assert view is not other
        view.set_result(42)
        assert (unfuture.result(), view.result(), other.result()) == (42, 42, 42)
        for again in view, other, unfuture:
            with pytest.raises(asyncio.InvalidStateError):
                again.set_result(43)
        failing: Unfuture[int] = Unfuture()
        failing.future.set_exception(Boom)
        with pytest.raises(Boom):
            await failing

    asyncio.run(main())


def test_the_callbacks_of_an_asyncio_view_run_in_its_loop() -> None:
    unfuture: Unfuture[int] = Unfuture()
    seen: list[Any] = []
    view = unfuture.future
    unsync.loop.call_soon_threadsafe(
        view.add_done_callback, lambda view: seen.append((view.result(), threading.get_ident()))
    )
    unfuture.set_result(42)
    wait_until(lambda: seen)
    assert seen == [(42, unsync.thread.ident)]


def test_a_view_of_a_loop_that_is_closed_stops_nobody() -> None:
    unfuture: Unfuture[int] = Unfuture()
    calls: list[int] = []

    async def main() -> asyncio.Future[int]:
        return unfuture.future

    view = asyncio.run(main())
    unfuture.add_done_callback(lambda unfuture: calls.append(unfuture.result()))
    unfuture.set_result(42)
    assert calls == [42]
    assert not view.done()


# Of concurrent.futures.


@sources
def test_a_concurrent_view_has_its_outcome(make: Callable[[], Unfuture[int]]) -> None:
    view = make().concurrent_future
    assert isinstance(view, concurrent.futures.Future)
    assert view.result(PATIENCE) == 42
    assert view.exception() is None
    assert view.done()


def test_the_functions_of_concurrent_futures_take_views() -> None:
    unfutures: list[Unfuture[int]] = [Unfuture() for _ in range(4)]
    views = [unfuture.concurrent_future for unfuture in unfutures]
    unfutures[0].set_result(42)
    unfutures[1].set_exception(Boom())
    unfutures[2].cancel()
    finished, pending = concurrent.futures.wait(views, 0)
    assert (finished, pending) == (set(views[:3]), {views[3]})
    completed = concurrent.futures.as_completed(views, PATIENCE)
    assert {next(completed) for _ in range(3)} == set(views[:3])
    unfutures[3].set_result(42)
    assert next(completed) is views[3]
    with pytest.raises(Boom):
        views[1].result()
    with pytest.raises(concurrent.futures.CancelledError):
        views[2].result()


def test_a_concurrent_view_in_a_loop_follows_at_once() -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view = unfuture.concurrent_future
        unfuture.set_result(42)
        assert view.result(0) == 42

    asyncio.run(main())


def test_cancelling_a_concurrent_view_cancels_it() -> None:
    unfuture: Unfuture[int] = Unfuture()
    view, other = unfuture.concurrent_future, unfuture.concurrent_future
    assert view.cancel()
    assert view.cancelled()
    assert other.cancelled()
    assert unfuture.cancelled()


def test_a_concurrent_view_of_a_coroutine_is_cancelled_with_it() -> None:
    @unsync
    async def for_ever() -> None:
        await asyncio.Event().wait()

    unfuture = for_ever()
    view = unfuture.concurrent_future
    wait_until_suspended(for_ever.__qualname__)
    assert unfuture.cancel()
    assert concurrent.futures.wait([view], PATIENCE).done == {view}
    assert view.cancelled()


def test_a_concurrent_view_tells_whether_it_runs_and_can_be_cancelled() -> None:
    begun, gate = threading.Event(), threading.Event()

    @unsync
    def wait() -> int:
        begun.set()
        gate.wait(PATIENCE)
        return 42

    unfuture = wait()
    assert begun.wait(PATIENCE)
    view = unfuture.concurrent_future
    assert view.running()
    assert not view.cancel()
    assert not view.done()
    gate.set()
    assert view.result(PATIENCE) == 42


def test_an_executor_of_ones_own_may_serve_a_concurrent_view() -> None:
    unfuture: Unfuture[int] = Unfuture()
    view = unfuture.concurrent_future
    assert view.set_running_or_notify_cancel()
    assert unfuture.running()
    view.set_result(42)
    assert unfuture.result(PATIENCE) == view.result(PATIENCE) == 42
    with pytest.raises(concurrent.futures.InvalidStateError):
        view.set_result(43)
    failing: Unfuture[int] = Unfuture()
    failing.concurrent_future.set_exception(Boom())
    with pytest.raises(Boom):
        failing.result(PATIENCE)


def test_a_concurrent_view_calls_its_callbacks_though_nobody_holds_it() -> None:
    unfuture: Unfuture[int] = Unfuture()
    called: list[Any] = []
    unfuture.concurrent_future.add_done_callback(called.append)
    unfuture.concurrent_future.add_done_callback(called.append)
    collect()
    unfuture.set_result(42)
    assert [view.result(0) for view in called] == [42, 42]
    unfuture.concurrent_future.add_done_callback(called.append)
    assert called[2].result(0) == 42


def test_each_callback_of_a_concurrent_view_is_called_once() -> None:
    unfuture: Unfuture[int] = Unfuture()
    view = unfuture.concurrent_future
    called: list[int] = []

    def first(view: concurrent.futures.Future[int]) -> None:
        called.append(1)
        view.add_done_callback(lambda _: called.append(2))

    view.add_done_callback(first)
    view.add_done_callback(lambda _: called.append(3))
    unfuture.set_result(42)
    view.add_done_callback(lambda _: called.append(4))
    assert called == [1, 2, 3, 4]


def test_callbacks_that_come_while_it_ends_are_called_once() -> None:
    for _ in range(200):
        unfuture: Unfuture[int] = Unfuture()
        view = unfuture.concurrent_future
        called: list[int] = []

        def add(view: concurrent.futures.Future[int] = view, called: list[int] = called) -> None:
            view.add_done_callback(lambda _: called.append(1))

        threads = [threading.Thread(target=add) for _ in range(2)]
        for thread in threads:
            thread.start()
        unfuture.set_result(42)
        for thread in threads:
            thread.join(PATIENCE)
        assert called == [1, 1]


# Of both.


def test_an_asyncio_view_that_somebody_waits_for_stays() -> None:
    unfuture: Unfuture[int] = Unfuture()
    called: list[Any] = []

    async def wait() -> int:
        return await unfuture.future

    async def main() -> None:
        unfuture.future.add_done_callback(called.append)
        view = unfuture.future
        view.add_done_callback(called.append)
        assert view.remove_done_callback(called.append) == 1
        view.add_done_callback(called.append)
        del view
        # Only the view leads to this task: the loop holds its tasks weakly.
        asyncio.ensure_future(wait()).add_done_callback(called.append)
        for _ in range(3):
            await asyncio.sleep(0)
            collect()
        unfuture.set_result(42)
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert [future.result() for future in called] == [42, 42, 42]


def test_a_view_that_is_told_too_early_stays_pending() -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        view: Any = unfuture.future
        view.follow()
        assert not view.done()
        unfuture.set_result(1)
        assert await view == 1

    asyncio.run(main())
    unfuture: Unfuture[int] = Unfuture()
    view: Any = unfuture.concurrent_future
    called: list[object] = []
    view.add_done_callback(called.append)
    view.follow()
    view.call_back(unfuture)
    assert not view.done()
    assert called == []
    unfuture.set_result(1)
    assert view.result(PATIENCE) == 1
    assert called == [view]


def test_a_view_cannot_be_given_what_is_no_unfuture() -> None:
    """With a class in its place CPython itself would crash: see `_views.py`."""

    async def main() -> asyncio.Future[int]:
        return Unfuture[int]().future

    for view in (asyncio.run(main()), Unfuture[int]().concurrent_future):
        with pytest.raises(TypeError):
            view.__init__(Unfuture, None, None)  # type: ignore[call-arg]
