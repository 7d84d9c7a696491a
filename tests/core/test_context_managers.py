"""Async context managers marked with `@unsync`, or put into an `AmbientContextManager`."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

import pytest
from support.waiting import PATIENCE, ambient_loop_held, collect, wait_until

from unsync import AmbientContextManager, Unfuture, unsync


class Boom(Exception):
    pass


class Note:
    """An async context manager that notes what happens to it."""

    def __init__(self, suppress: bool = False) -> None:
        self.suppress = suppress
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.threads: list[threading.Thread] = []
        self.error: BaseException | None = None

    def note(self) -> None:
        self.tasks.append(asyncio.current_task())
        self.threads.append(threading.current_thread())

    async def __aenter__(self) -> int:
        await asyncio.sleep(0)
        self.note()
        return 42

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        assert kind is (None if exc is None else type(exc))
        await asyncio.sleep(0)
        self.note()
        self.error = exc
        return self.suppress


Body = Callable[[Any], Any]


def in_thread(manager: AmbientContextManager[Any], body: Body) -> None:
    with manager as value:
        body(value)


async def in_a_coroutine(manager: AmbientContextManager[Any], body: Body) -> None:
    async with manager as value:
        body(value)


def in_foreign_loop(manager: AmbientContextManager[Any], body: Body) -> None:
    asyncio.run(in_a_coroutine(manager, body))


def in_ambient_loop(manager: AmbientContextManager[Any], body: Body) -> None:
    Unfuture(in_a_coroutine(manager, body)).result(PATIENCE)


Enter = Callable[[AmbientContextManager[Any], Body], None]

everywhere = pytest.mark.parametrize("enter", [in_thread, in_foreign_loop, in_ambient_loop])


def fail(_: object) -> None:
    raise Boom("in the body")


# Entering and leaving.


@everywhere
def test_it_gives_the_managers_value_and_enters_and_leaves_in_one_task(enter: Enter) -> None:
    found: list[object] = []
    manager = Note()
    enter(AmbientContextManager(manager), found.append)
    assert found == [42]
    assert manager.threads == [unsync.thread] * 2
    assert manager.tasks[0] is manager.tasks[1]
    assert manager.error is None


@everywhere
def test_a_marked_function_gives_one(enter: Enter) -> None:
    events: list[object] = []

    @unsync
    @contextlib.asynccontextmanager
    async def marked(value: int, *, by: int = 1) -> AsyncIterator[int]:
        events.append(threading.current_thread())
        yield value + by
        events.append("left")

    made = marked(1, by=2)
    assert type(made) is AmbientContextManager
    enter(made, events.append)
    assert events == [unsync.thread, 3, "left"]


def test_the_hosts_task_has_the_functions_name() -> None:
    names: list[str] = []

    @unsync
    @contextlib.asynccontextmanager
    async def marked() -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        names.append(task.get_name())
        yield

    with marked():
        pass
    manager = Note()
    with AmbientContextManager(manager):
        assert manager.tasks[0] is not None
        names.append(manager.tasks[0].get_name())
    assert names == [marked.__qualname__, "Note"]


def test_methods_can_be_marked() -> None:
    class Pool:
        def __init__(self) -> None:
            self.taken = 0

        @unsync
        @contextlib.asynccontextmanager
        async def take(self, count: int) -> AsyncIterator[int]:
            self.taken += count
            yield self.taken
            self.taken -= count

    pool = Pool()
    with pool.take(2) as first, pool.take(3) as second:
        assert (first, second) == (2, 5)
    assert pool.taken == 0


def test_wrong_arguments_are_an_error_of_the_call() -> None:
    @unsync
    @contextlib.asynccontextmanager
    async def marked(value: int) -> AsyncIterator[int]:
        yield value

    with pytest.raises(TypeError, match="value"):
        marked()  # type: ignore[call-arg]


@pytest.mark.parametrize("option", [{"cpu_bound": True}, {"read_ahead": 3}])
def test_options_of_other_functions_are_refused(option: dict[str, Any]) -> None:
    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        yield

    with pytest.raises(TypeError, match=r"manager cannot be marked with"):
        unsync(manager, **option)


def test_what_is_no_async_context_manager_is_refused() -> None:
    for wrong in (threading.Lock(), 3, Note):
        with pytest.raises(TypeError, match="__aenter__") as caught:
            AmbientContextManager(wrong)  # type: ignore[arg-type]
        assert repr(wrong) in str(caught.value)


@everywhere
def test_context_variables_of_who_enters_are_seen(enter: Enter) -> None:
    seen: list[str] = []
    variable = contextvars.ContextVar("variable", default="nothing")

    @unsync
    @contextlib.asynccontextmanager
    async def marked() -> AsyncIterator[None]:
        seen.append(variable.get())
        yield
        seen.append(variable.get())

    def enter_with_a_value() -> None:
        variable.set("mine")
        enter(marked(), lambda _: None)

    contextvars.copy_context().run(enter_with_a_value)
    assert seen == ["mine", "mine"]


def test_with_in_the_ambient_loop_is_an_error_that_says_what_to_do() -> None:
    @unsync
    async def wrong() -> None:
        with AmbientContextManager(Note()):
            pass

    with pytest.raises(RuntimeError, match="async with"):
        wrong().result(PATIENCE)


def test_one_is_entered_once_at_a_time_and_again_when_it_was_left() -> None:
    manager = AmbientContextManager(Note())
    for _ in range(2):
        with manager, pytest.raises(RuntimeError, match="entered already"):
            manager.__enter__()
    with pytest.raises(RuntimeError, match="left before it was entered"):
        manager.__exit__(None, None, None)


def test_its_repr_shows_the_manager() -> None:
    lock = asyncio.Lock()
    assert repr(AmbientContextManager(lock)) == f"<AmbientContextManager of {lock!r}>"


def test_threads_and_loops_share_a_lock() -> None:
    inside: list[int] = []
    lock = asyncio.Lock()

    def alone(_: object) -> None:
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.0001)
        inside.pop()

    def enter_often(enter: Enter) -> None:
        for _ in range(20):
            enter(AmbientContextManager(lock), alone)

    ways = [in_thread, in_thread, in_foreign_loop, in_ambient_loop]
    calls = [unsync(enter_often)(enter) for enter in ways]
    for call in calls:
        call.result(PATIENCE)
    assert not lock.locked()


# Failures.


@everywhere
def test_a_failure_of_the_body_reaches_the_manager_and_then_the_caller(enter: Enter) -> None:
    manager = Note()
    with pytest.raises(Boom) as caught:
        enter(AmbientContextManager(manager), fail)
    assert manager.error is caught.value


@everywhere
def test_a_manager_may_suppress_the_failure(enter: Enter) -> None:
    manager = Note(suppress=True)
    enter(AmbientContextManager(manager), fail)
    assert isinstance(manager.error, Boom)


@everywhere
def test_a_manager_may_turn_the_failure_into_another(enter: Enter) -> None:
    @unsync
    @contextlib.asynccontextmanager
    async def marked() -> AsyncIterator[None]:
        try:
            yield
        except Boom as exc:
            raise LookupError from exc

    with pytest.raises(LookupError) as caught:
        enter(marked(), fail)
    assert isinstance(caught.value.__cause__, Boom)


@everywhere
@pytest.mark.parametrize("error", [Boom("at the door"), asyncio.CancelledError()])
def test_a_failure_to_enter_is_raised_and_nothing_is_left(
    enter: Enter, error: BaseException
) -> None:
    class Closed(Note):
        async def __aenter__(self) -> int:
            raise error

    manager = Closed()
    with pytest.raises(type(error)):
        enter(AmbientContextManager(manager), fail)
    assert manager.tasks == []


@everywhere
def test_a_failure_to_leave_is_raised(enter: Enter) -> None:
    @unsync
    @contextlib.asynccontextmanager
    async def marked() -> AsyncIterator[None]:
        yield
        raise Boom("on the way out")

    with pytest.raises(Boom, match="on the way out"):
        enter(marked(), lambda _: None)


@pytest.mark.parametrize("enter", [in_thread, in_foreign_loop])
def test_failures_are_reported_to_nobody_else(
    enter: Enter, caplog: pytest.LogCaptureFixture
) -> None:
    @unsync
    @contextlib.asynccontextmanager
    async def marked() -> AsyncIterator[None]:
        try:
            yield
        finally:
            raise Boom("on the way out")

    for body in (fail, lambda _: None):
        with pytest.raises(Boom, match="on the way out"):
            enter(marked(), body)
    collect()
    assert caplog.records == []


# Cancelling.


@unsync
@contextlib.asynccontextmanager
async def limited(seconds: float) -> AsyncIterator[Any]:
    """Gives the timeout, which says whether it has struck."""
    async with asyncio.timeout(seconds) as timeout:
        yield timeout


async def run(main: Coroutine[Any, Any, Any]) -> None:
    await asyncio.wait_for(main, PATIENCE)


@pytest.mark.parametrize("where", ["foreign", "ambient"])
def test_a_timeout_in_the_manager_cancels_the_body_in_a_loop(where: str) -> None:
    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(TimeoutError):
            async with limited(0.01):
                await asyncio.Event().wait()
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # nothing is left of it

    if where == "foreign":
        asyncio.run(run(main()))
    else:
        Unfuture(run(main())).result(2 * PATIENCE)


def test_a_timeout_in_the_manager_is_raised_when_a_body_in_a_thread_ends() -> None:
    with pytest.raises(TimeoutError), limited(0.01) as timeout:
        wait_until(timeout.expired)


def test_a_timeout_that_strikes_as_the_body_ends_leaves_nothing_behind() -> None:
    async def main() -> None:
        for _ in range(5):
            # The body's loop hears of the timeout only afterwards.
            with pytest.raises(TimeoutError):
                await in_a_coroutine(limited(0.005), lambda timeout: wait_until(timeout.expired))
            await asyncio.sleep(0)

    asyncio.run(run(main()))


@pytest.mark.parametrize("inner", [0.01, 0.02, 0.03])
def test_a_timeout_around_counts_when_both_strike(inner: float) -> None:
    async def main() -> None:
        async with asyncio.timeout(0.02):
            with contextlib.suppress(TimeoutError):
                async with limited(inner):
                    await asyncio.Event().wait()
            await asyncio.Event().wait()

    for _ in range(5):
        with pytest.raises(TimeoutError):
            asyncio.run(run(main()))


@pytest.mark.parametrize("others", [0, 1])
def test_the_host_counts_who_else_cancelled_the_body(others: int) -> None:
    counts: list[int] = []

    class Counting(Note):
        async def __aexit__(self, *exc: Any) -> bool:
            task = asyncio.current_task()
            assert task is not None
            counts.append(task.cancelling())
            return True

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        async with AmbientContextManager(Counting()):
            for _ in range(others):
                task.cancel()
            await asyncio.sleep(0)
            raise asyncio.CancelledError

    asyncio.run(main())
    assert counts == [others]


def test_a_task_group_in_the_manager_cancels_the_body() -> None:
    @unsync
    @contextlib.asynccontextmanager
    async def group() -> AsyncIterator[Any]:
        async with asyncio.TaskGroup() as tasks:
            yield tasks

    async def fail_soon() -> None:
        await asyncio.sleep(0.005)
        raise Boom

    def begin(tasks: Any) -> None:
        unsync.loop.call_soon_threadsafe(lambda: tasks.create_task(fail_soon()))

    async def main() -> None:
        async with group() as tasks:
            begin(tasks)
            await asyncio.Event().wait()

    with pytest.raises(Exception, match="unhandled errors") as caught:
        asyncio.run(run(main()))
    assert [type(exc) for exc in getattr(caught.value, "exceptions", ())] == [Boom]

    def fail_in_thread(tasks: Any) -> None:
        begin(tasks)
        time.sleep(0.02)

    with pytest.raises(Exception, match="unhandled errors"):
        in_thread(group(), fail_in_thread)


def test_cancelling_the_body_reaches_the_manager() -> None:
    async def main() -> Note:
        manager = Note()

        async def body() -> None:
            async with AmbientContextManager(manager):
                inside.set()
                await asyncio.Event().wait()

        inside = asyncio.Event()
        task = asyncio.create_task(body())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return manager

    manager = asyncio.run(main())
    assert isinstance(manager.error, asyncio.CancelledError)


@pytest.mark.parametrize("failure", [None, Boom("in the body")])
def test_who_is_cancelled_as_the_body_is_left_hears_of_it(failure: Exception | None) -> None:
    """The host has not heard yet that the body was left."""
    note = Note()

    async def use(entered: asyncio.Event, leave: asyncio.Event) -> None:
        async with AmbientContextManager(note):
            entered.set()
            await leave.wait()
            if failure is not None:
                raise failure

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.ensure_future(use(entered, leave))
        await entered.wait()
        with ambient_loop_held():
            leave.set()
            for _ in range(3):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.cancelled()

    asyncio.run(main())
    assert isinstance(note.error, asyncio.CancelledError)


def test_who_is_cancelled_when_the_manager_has_failed_to_enter_hears_of_it() -> None:
    """It still waits for the host's end, and would raise the failure instead."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert release.wait(PATIENCE)

    class Failing(Note):
        async def __aenter__(self) -> int:
            await asyncio.sleep(0)  # what ends in its first step has ended for everybody
            asyncio.get_running_loop().call_soon(hold)
            raise Boom

    async def use() -> None:
        async with AmbientContextManager(Failing()):
            raise AssertionError("it was not entered")

    async def main() -> None:
        task = asyncio.ensure_future(use())
        await asyncio.to_thread(held.wait, PATIENCE)
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        release.set()
        await asyncio.wait([task], timeout=PATIENCE)
        assert task.cancelled()

    asyncio.run(main())


def test_who_is_cancelled_while_entering_has_entered_nothing() -> None:
    events: list[str] = []
    began = threading.Event()

    class Slow(Note):
        async def __aenter__(self) -> int:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.001)
                events.append("gave up")
            return 0

    async def main() -> None:
        task = asyncio.create_task(in_a_coroutine(AmbientContextManager(Slow()), fail))
        await asyncio.to_thread(began.wait, PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert events == ["gave up"]

    asyncio.run(run(main()))


def test_who_is_cancelled_while_the_manager_enters_all_the_same_has_it_left() -> None:
    began, gate = threading.Event(), threading.Event()

    class Stubborn(Note):
        async def __aenter__(self) -> int:
            began.set()
            assert gate.wait(PATIENCE)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            return 0

    manager = Stubborn()

    async def main() -> None:
        task = asyncio.create_task(in_a_coroutine(AmbientContextManager(manager), fail))
        await asyncio.to_thread(began.wait, PATIENCE)
        task.cancel()
        asyncio.get_running_loop().call_later(0.005, gate.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run(main()))
    assert isinstance(manager.error, asyncio.CancelledError)


class Cleaning:
    """Managers that wait for a cancel when they are left: do they absorb it, and what then."""

    def __init__(self, absorb: bool, failure: Exception | None = None) -> None:
        self.absorb = absorb
        self.failure = failure
        self.begun: Unfuture[None] = Unfuture()

    async def clean(self) -> None:
        self.begun.set_result(None)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not self.absorb:
                raise
        if self.failure is not None:
            raise self.failure

    @unsync
    @contextlib.asynccontextmanager
    async def with_a_group(self) -> AsyncIterator[Callable[[], object]]:
        async def fail() -> None:
            await lose.wait()
            raise Boom("lost")

        lose = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            try:
                yield lambda: unsync.loop.call_soon_threadsafe(lose.set)
            finally:
                await self.clean()

    @unsync
    @contextlib.asynccontextmanager
    async def with_a_timeout(self) -> AsyncIterator[Callable[[], object]]:
        async with asyncio.timeout(None) as timeout:
            try:
                yield lambda: unsync.loop.call_soon_threadsafe(timeout.reschedule, 0)
            finally:
                await self.clean()


async def cancel_while_it_is_left(
    cleaning: Cleaning, manager: AmbientContextManager[Callable[[], object]]
) -> BaseException | None:
    """What comes out where first the manager cancels the body, and then somebody the whole."""

    async def use() -> None:
        async with manager as begin:
            begin()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(use())
    await cleaning.begun
    task.cancel("why")
    await asyncio.wait([task], timeout=PATIENCE)
    try:
        task.result()
    except BaseException as exc:
        return exc
    return None


def run_in_foreign_loop(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(main)


def run_in_ambient_loop(main: Coroutine[Any, Any, Any]) -> Any:
    return Unfuture(main).result(PATIENCE)


in_each_loop = pytest.mark.parametrize("run_in", [run_in_foreign_loop, run_in_ambient_loop])


@in_each_loop
@pytest.mark.parametrize("absorb", [True, False])
def test_a_group_in_the_manager_that_is_cancelled_after_a_child_failed_raises_the_failure(
    run_in: Callable[[Any], BaseException | None], absorb: bool
) -> None:
    """As asyncio has it, whether the cancel is absorbed or not."""
    cleaning = Cleaning(absorb)
    exc = run_in(cancel_while_it_is_left(cleaning, cleaning.with_a_group()))
    assert isinstance(exc, ExceptionGroup)
    assert [str(each) for each in exc.exceptions] == ["lost"]


@in_each_loop
def test_a_failure_of_a_manager_that_heard_of_a_cancel_is_not_lost(
    run_in: Callable[[Any], BaseException | None],
) -> None:
    cleaning = Cleaning(absorb=True, failure=Boom("on the way out"))
    exc = run_in(cancel_while_it_is_left(cleaning, cleaning.with_a_timeout()))
    assert repr(exc) == "Boom('on the way out')"


@in_each_loop
def test_a_cancel_that_goes_through_the_manager_keeps_its_message(
    run_in: Callable[[Any], BaseException | None],
) -> None:
    cleaning = Cleaning(absorb=False)
    exc = run_in(cancel_while_it_is_left(cleaning, cleaning.with_a_timeout()))
    assert repr(exc) == "CancelledError('why')"


def test_a_timeout_around_does_not_hide_a_failure_of_the_manager() -> None:
    cleaning = Cleaning(absorb=True)

    async def main() -> None:
        async with asyncio.timeout(None) as timeout, cleaning.with_a_group() as begin:
            loop = asyncio.get_running_loop()

            def strike() -> None:
                cleaning.begun.result(PATIENCE)
                loop.call_soon_threadsafe(timeout.reschedule, 0)

            threading.Thread(target=strike).start()
            begin()
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup):
        asyncio.run(run(main()))


@pytest.mark.parametrize("failure", [None, Boom("in the body")])
def test_the_manager_knows_who_cancelled_a_body_that_raised_something_else(
    failure: Exception | None,
) -> None:
    """Its timeout is then not the only one to strike."""
    counts: list[int] = []

    class Counting(Note):
        async def __aexit__(self, *exc: Any) -> bool:
            task = asyncio.current_task()
            assert task is not None
            counts.append(task.cancelling())
            return True

    async def main(manager: AbstractAsyncContextManager[Any]) -> None:
        task = asyncio.current_task()
        assert task is not None
        async with manager:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            if failure is not None:
                raise failure

    for manager in (Counting(), AmbientContextManager(Counting())):
        asyncio.run(main(manager))
    assert counts == [1, 1]


@pytest.mark.alone
def test_a_shutdown_ends_a_body_in_a_loop() -> None:
    manager = Note()
    inside = threading.Event()

    async def main() -> None:
        async with AmbientContextManager(manager):
            inside.set()
            await asyncio.Event().wait()

    def shut_down() -> bool:
        assert inside.wait(PATIENCE)
        return unsync.shutdown(PATIENCE)

    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(shut_down()))
    thread.start()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run(main()))
    thread.join(PATIENCE)
    assert ended == [True]
    assert isinstance(manager.error, asyncio.CancelledError)


# As a decorator.


def test_it_decorates_functions_and_coroutine_functions() -> None:
    notes: list[str] = []

    @unsync
    @contextlib.asynccontextmanager
    async def noted(name: str) -> AsyncIterator[None]:
        notes.append(f"enter {name}")
        try:
            yield
        finally:
            notes.append(f"leave {name}")

    @noted("function")
    def function(x: int, *, y: int) -> int:
        """Adds."""
        notes.append("function")
        return x + y

    @noted("coroutine")
    async def coroutine(x: int) -> int:
        notes.append("coroutine")
        return x

    assert (function.__name__, function.__doc__) == ("function", "Adds.")
    for _ in range(2):
        assert function(1, y=2) == 3
        assert asyncio.run(coroutine(1)) == 1
        assert unsync(coroutine)(1).result(PATIENCE) == 1
        assert notes == [
            *("enter function", "function", "leave function"),
            *("enter coroutine", "coroutine", "leave coroutine") * 2,
        ]
        notes.clear()


@pytest.mark.parametrize("kind", ["coroutine", "regular"])
def test_it_does_not_decorate_marked_functions(kind: str) -> None:
    """Their calls go on when the block has been left; the other way round all is well."""
    inside: list[bool] = []

    @unsync
    @contextlib.asynccontextmanager
    async def entered() -> AsyncIterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    def regular() -> bool:
        return inside[-1]

    async def coroutine() -> bool:
        await asyncio.sleep(0)
        return inside[-1]

    function: Callable[[], Any] = regular if kind == "regular" else coroutine
    with pytest.raises(TypeError, match="let @unsync stand above"):
        entered()(unsync(function))
    assert unsync(entered()(function))().result(PATIENCE) is True


def test_as_a_decorator_it_hears_of_failures_and_calls_may_overlap() -> None:
    note = Note(suppress=True)
    both_are_in = threading.Barrier(2)

    @AmbientContextManager(note)
    def fail() -> None:
        both_are_in.wait(PATIENCE)
        raise Boom

    calls = [unsync(fail)() for _ in range(2)]
    assert [call.result(PATIENCE) for call in calls] == [None, None]
    assert type(note.error) is Boom
    assert len(note.tasks) == 4
