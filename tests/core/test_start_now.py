"""`await f()` in the ambient loop: `f` starts there and then if nothing was called before it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from support.waiting import PATIENCE, collect

from unsync import Unfuture, unsync

Main = Callable[[], Coroutine[Any, Any, Any]]
InThread = Callable[[Callable[[], object]], threading.Thread]

pytestmark = pytest.mark.alone  # they count turns of the ambient loop

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

since_312 = pytest.mark.skipif(sys.version_info < (3, 12), reason="came with Python 3.12")


# Who can await in the ambient loop.


def a_call_in_its_first_step(main: Main) -> Any:
    return unsync(main)().result(PATIENCE)


def a_call_in_a_later_step(main: Main) -> Any:
    @unsync
    async def later() -> Any:
        await asyncio.sleep(0)
        return await main()

    return later().result(PATIENCE)


def a_task_that_is_no_call(main: Main) -> Any:
    return asyncio.run_coroutine_threadsafe(main(), unsync.loop).result(PATIENCE)


by = pytest.mark.parametrize(
    "run", [a_call_in_its_first_step, a_call_in_a_later_step, a_task_that_is_no_call]
)


def call_in_thread(function: Callable[[], object]) -> None:
    """Calls it in a thread of its own; returns when that has ended."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@unsync
async def give(value: Any) -> Any:
    return value


@unsync
async def give_later(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


@pytest.fixture(autouse=True)
def _none_has_started_yet() -> None:
    """Of the 256 that may until the mailbox is emptied, as it is for this call."""
    unsync(asyncio.sleep)(0).result(PATIENCE)


# When it starts.


async def main_that_counts_turns() -> tuple[int, int]:
    """What ten calls gave, and how many turns they took."""
    turns: list[int] = []
    asyncio.get_running_loop().call_soon(turns.append, 1)
    return sum([await give(4) for _ in range(10)]), len(turns)


@by
def test_what_never_suspends_is_done_without_a_turn_of_the_loop(run: Callable[[Main], Any]) -> None:
    assert run(main_that_counts_turns) == (40, 0)


@pytest.mark.usefixtures("fresh")
def test_what_never_suspends_is_done_without_a_turn_of_uvloop() -> None:
    unsync.loop_factory = pytest.importorskip("uvloop").new_event_loop
    assert a_call_in_its_first_step(main_that_counts_turns) == (40, 0)


@by
def test_a_coroutine_wrapped_by_hand_starts_in_the_await_too(run: Callable[[Main], Any]) -> None:
    async def main() -> Any:
        turns: list[int] = []
        asyncio.get_running_loop().call_soon(turns.append, 1)
        return await Unfuture(give.__wrapped__(42)), len(turns)

    assert run(main) == (42, 0)


@by
def test_the_first_step_is_made_in_the_await_and_the_others_in_their_turns(
    run: Callable[[Main], Any],
) -> None:
    order: list[str] = []

    @unsync
    async def inner() -> int:
        order.append("first step")
        await asyncio.sleep(0)
        order.append("second step")
        return 42

    async def main() -> int:
        asyncio.get_running_loop().call_soon(order.append, "turn")
        unfuture = inner()
        order.append("called")
        value = await unfuture
        order.append("awaited")
        return value

    assert run(main) == 42
    assert order == ["called", "first step", "turn", "second step", "awaited"]


@by
def test_what_was_called_before_starts_before(run: Callable[[Main], Any]) -> None:
    order: list[str] = []

    @unsync
    async def note(name: str) -> str:
        order.append(name)
        return name

    async def main() -> str:
        note("one")
        note("two")
        return await note("awaited")

    assert run(main) == "awaited"
    assert order == ["one", "two", "awaited"]


@by
def test_what_was_called_after_starts_after(run: Callable[[Main], Any]) -> None:
    order: list[str] = []

    @unsync
    async def note(name: str) -> str:
        order.append(name)
        return name

    async def main() -> Any:
        first = note("first")
        second, third = note("second"), note("third")
        return await first, await third, await second

    assert run(main) == ("first", "third", "second")
    assert order == ["first", "second", "third"]


@by
def test_everything_that_is_in_the_mailbox_comes_first(run: Callable[[Main], Any]) -> None:
    """Whoever left it there: another thread's call, a continuation, somebody's wakeup."""
    order: list[str] = []
    gate = Unfuture[None]()

    @unsync
    async def note(name: str) -> None:
        order.append(name)

    async def wait() -> None:
        await gate
        order.append("woken")

    async def main() -> None:
        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        call_in_thread(lambda: note("of a thread"))
        call_in_thread(lambda: gate.set_result(None))
        Unfuture.from_value(1).then(lambda _: order.append("continuation"))
        await note("awaited")
        await waiting

    run(main)
    assert order == ["of a thread", "woken", "continuation", "awaited"]


def test_several_in_a_row_alternate_with_their_caller() -> None:
    order: list[Any] = []

    @unsync
    async def note(number: int) -> None:
        order.append(number)

    @unsync
    async def main() -> None:
        for number in range(5):
            await note(number)
            order.append("caller")

    main().result(PATIENCE)
    assert order == [0, "caller", 1, "caller", 2, "caller", 3, "caller", 4, "caller"]


@pytest.mark.parametrize("function", [give, give_later])
def test_one_awaited_in_a_foreign_loop_runs_in_the_ambient_thread(function: Any) -> None:
    @unsync
    async def where() -> Any:
        assert await function(1) == 1
        return threading.current_thread(), asyncio.get_running_loop()

    async def main() -> Any:
        here = asyncio.get_running_loop()
        places = [await where(), await unsync(where)()]
        assert asyncio.get_running_loop() is here
        return places

    # Marked anew it is the same coroutine function.
    assert asyncio.run(main()) == [(unsync.thread, unsync.loop)] * 2


# Bounds.


def nesting_of_the_caller() -> int:
    """How many frames of the calling function are one within the other on this thread's stack."""
    frame: Any = sys._getframe(1)
    code, count = frame.f_code, 0
    while frame is not None:
        count += frame.f_code is code
        frame = frame.f_back
    return count


@by
def test_a_deep_recursion_nests_to_a_bound_only(run: Callable[[Main], Any]) -> None:
    nestings: list[int] = []

    @unsync
    async def count(number: int) -> int:
        nestings.append(nesting_of_the_caller())
        return 1 + await count(number - 1) if number else 0

    async def main() -> int:
        return await count(500)

    assert run(main) == 500
    assert len(nestings) == 501
    assert 1 < max(nestings) < 50


def test_a_failure_comes_up_through_a_deep_recursion() -> None:
    error = LookupError("lost")

    @unsync
    async def count(number: int) -> int:
        if number:
            return 1 + await count(number - 1)
        raise error

    assert count(500).exception(PATIENCE) is error


def test_a_recursion_that_is_deeper_than_python_allows(run_python: RunPython) -> None:
    """A crash would take the whole test run with it."""
    program = """
        import sys
        from unsync import unsync

        @unsync
        async def count(number):
            return 0 if number == 0 else 1 + await count(number - 1)

        assert sys.getrecursionlimit() == 1000
        print(count(500).result(), count(5000).result(), count(20).result())
    """
    done = run_python(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "500 5000 20\n", "")


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="it has another limit")
@pytest.mark.parametrize("nesting", [0, 40])
def test_a_call_at_the_limit_of_the_stack_has_an_outcome_too(
    nesting: int, run_python: RunPython
) -> None:
    """Whatever step of its start a RecursionError hits: who waits is told, and the loop goes on."""
    program = f"""
        from unsync import unsync

        calls = []

        @unsync
        async def inner(levels):
            if levels:
                await inner(levels - 1)
            return "inner"

        async def descend(levels):
            if levels:
                return await descend(levels - 1)
            calls.append(inner({nesting}))
            return await calls[-1]

        @unsync
        async def outer(levels):
            return await descend(levels)

        def outcome(unfuture):
            try:
                return unfuture.result(60)
            except RecursionError:
                return "error"

        print(*sorted({{outcome(outer(levels)) for levels in range(700, 1000)}}))
        print(len(calls) > 100, {{outcome(call) for call in calls}} <= {{"error", "inner"}})
        print(outcome(outer(1)))
    """
    done = run_python(program)
    assert (done.returncode, done.stdout) == (0, "error inner\nTrue True\ninner\n"), done.stderr


@by
def test_a_run_of_calls_that_never_suspend_does_not_starve_the_loop(
    run: Callable[[Main], Any],
) -> None:
    turns: Counter[str] = Counter()
    ended = False

    def turn(kind: str, again: Callable[..., object]) -> None:
        turns[kind] += 1
        if not ended:
            again(turn, kind, again)

    async def main() -> list[int]:
        nonlocal ended
        loop = asyncio.get_running_loop()
        for kind, again in ("call_soon", loop.call_soon), ("timer", partial(loop.call_later, 0)):
            again(turn, kind, again)
        values = [await give(number) for number in range(10_000)]
        ended = True
        return values

    assert run(main) == list(range(10_000))
    assert turns["call_soon"] > 10
    assert turns["timer"] > 10


@by
def test_each_turn_of_the_loop_has_its_own_bound(run: Callable[[Main], Any]) -> None:
    async def main() -> Any:
        seen = []
        for _ in range(100):
            seen.append(await main_that_counts_turns())
            await asyncio.sleep(0)
        return seen

    assert run(main) == [(40, 0)] * 100


def test_runs_in_many_tasks_do_not_starve_the_loop() -> None:
    """The bound is the loop's: a task that finds it spent does not get one of its own."""
    seen: list[int] = []
    done = 0

    async def work() -> None:
        nonlocal done
        for number in range(100):
            assert await give(number) == number
            done += 1

    @unsync
    async def main() -> None:
        tasks = [asyncio.ensure_future(work()) for _ in range(100)]
        asyncio.get_running_loop().call_soon(watch)
        await asyncio.gather(*tasks)

    def watch() -> None:
        seen.append(done)
        if done < 10_000:
            asyncio.get_running_loop().call_soon(watch)

    main().result(PATIENCE)
    steps = [after - before for before, after in pairwise(seen)]
    assert done == 10_000
    assert max(steps) < 1000


# Contexts and tasks.


variable: ContextVar[str] = ContextVar("variable", default="unset")


@by
@pytest.mark.parametrize("function", [give, give_later])
def test_each_level_has_a_context_of_its_own(run: Callable[[Main], Any], function: Any) -> None:
    @unsync
    async def inner(levels: int) -> list[str]:
        before = variable.get()
        variable.set(f"{levels}")
        await function(None)
        seen = await inner(levels - 1) if levels else []
        assert variable.get() == f"{levels}"
        return [before, *seen]

    async def main() -> list[str]:
        variable.set("main")
        seen = await inner(3)
        assert variable.get() == "main"
        return seen

    assert run(main) == ["main", "3", "2", "1"]
    assert variable.get() == "unset"


@by
def test_the_context_is_that_of_the_call_and_not_of_the_await(run: Callable[[Main], Any]) -> None:
    @unsync
    async def look() -> str:
        return variable.get()

    async def main() -> str:
        variable.set("call")
        unfuture = look()
        variable.set("await")
        return await unfuture

    assert run(main) == "call"


async def fail() -> None:
    raise LookupError("lost")


async def fail_later() -> None:
    await asyncio.sleep(0)
    raise LookupError("lost")


async def cancel() -> None:
    raise asyncio.CancelledError("enough")


@by
@pytest.mark.parametrize(
    "function", [give.__wrapped__, give_later.__wrapped__, fail, fail_later, cancel]
)
def test_each_level_is_a_task_and_its_callers_comes_back(
    run: Callable[[Main], Any], function: Any
) -> None:
    args = () if function in (fail, fail_later, cancel) else (1,)

    @unsync
    async def inner(levels: int) -> list[Any]:
        task = asyncio.current_task()
        assert task is not None
        assert task.get_name() == inner.__qualname__
        assert task in asyncio.all_tasks()
        if levels:
            below = await inner(levels - 1)
        else:
            below = []
            await asyncio.wait([unsync(function)(*args)])
            try:
                await unsync(function)(*args)
            except (LookupError, asyncio.CancelledError):
                assert args == ()
        assert asyncio.current_task() is task
        return [task, *below]

    async def main() -> list[Any]:
        task = asyncio.current_task()
        tasks = await inner(3)
        assert asyncio.current_task() is task
        return [task, *tasks]

    tasks = run(main)
    assert len(set(tasks)) == 5
    assert len({task.get_coro() for task in tasks[1:]}) == 4


# How it may end.


@by
@pytest.mark.parametrize("levels", [0, 1, 3, 100])
@pytest.mark.parametrize("function", [fail, fail_later])
def test_a_failure_reaches_the_caller(
    run: Callable[[Main], Any], levels: int, function: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @unsync
    async def inner(levels: int) -> None:
        if levels:
            await inner(levels - 1)
        await function()

    async def main() -> int:
        with pytest.raises(LookupError, match="lost"):
            await inner(levels)
        return await give(1)

    assert run(main) == 1
    collect()
    give(1).result(PATIENCE)  # the loop has said what it had to say
    assert caplog.records == []


@by
def test_a_cancellation_reaches_the_caller(run: Callable[[Main], Any]) -> None:
    async def main() -> Any:
        unfuture = unsync(cancel)()
        with pytest.raises(asyncio.CancelledError) as caught:
            await unfuture
        assert unfuture.cancelled()
        return type(caught.value), await give(1)

    assert run(main) == (asyncio.CancelledError, 1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("steps", [0, 1])
@by
def test_an_exit_reaches_the_caller_and_the_loop_survives(
    run: Callable[[Main], Any],
    steps: int,
    kind: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    thread = unsync.thread

    @unsync
    async def leave(levels: int) -> None:
        if levels:
            await leave(levels - 1)
        for _ in range(steps):
            await asyncio.sleep(0)
        raise kind("leaving")

    async def main() -> Any:
        task = asyncio.current_task()
        other = give_later(1)
        with pytest.raises(kind, match="leaving"):
            await leave(2)
        assert asyncio.current_task() is task
        with pytest.raises(kind, match="leaving"):
            await leave(2)
        return await other, await give(2)

    assert run(main) == (1, 2)
    with pytest.raises(kind, match="leaving"):
        leave(2).result(PATIENCE)
    assert give(3).result(PATIENCE) == 3
    assert unsync.thread is thread
    collect()
    give(1).result(PATIENCE)
    assert caplog.records == []


@by
def test_cancelling_the_caller_cancels_what_it_started(run: Callable[[Main], Any]) -> None:
    seen: list[tuple[Any, ...]] = []

    @unsync
    async def inner(levels: int) -> None:
        try:
            await (inner(levels - 1) if levels else Unfuture())
        except asyncio.CancelledError as exc:
            seen.append((levels, *exc.args))
            raise

    async def main() -> bool:
        outer = inner(2)
        waiting = asyncio.ensure_future(asyncio.wait([outer]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        outer.cancel("enough")
        await waiting
        return outer.cancelled()

    assert run(main)
    assert [level for level, *_ in seen] == [0, 1, 2]
    assert seen[0] == (0, "enough")


def test_what_cancels_its_caller_in_its_first_step_is_cancelled_with_it() -> None:
    """Neither has a task yet that a cancellation could be given to."""
    outers: list[Unfuture[Any]] = []
    seen: list[str] = []

    @unsync
    async def inner() -> None:
        assert outers[0].cancel("enough")
        try:
            await Unfuture()
        except asyncio.CancelledError:
            seen.append("inner")
            raise

    @unsync
    async def outer() -> None:
        try:
            await inner()
        except asyncio.CancelledError:
            seen.append("outer")
            raise

    @unsync
    async def main() -> bool:
        outers.append(outer())
        await asyncio.wait(outers)
        return outers[0].cancelled()

    assert main().result(PATIENCE)
    assert seen == ["inner", "outer"]


@by
def test_one_that_was_cancelled_before_it_began_never_begins(run: Callable[[Main], Any]) -> None:
    begun: list[str] = []

    @unsync
    async def begin(name: str) -> str:
        begun.append(name)
        return name

    async def main() -> str:
        unfuture = begin("cancelled")
        assert unfuture.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await unfuture
        return await begin("behind it")

    assert run(main) == "behind it"
    assert begun == ["behind it"]


@by
@pytest.mark.parametrize("function", [give, give_later])
def test_it_can_be_awaited_again(run: Callable[[Main], Any], function: Any) -> None:
    value = object()

    async def main() -> list[object]:
        unfuture = function(value)
        return [await unfuture, await unfuture, await unfuture]

    assert run(main) == [value] * 3


@by
@pytest.mark.parametrize("function", [give, give_later])
def test_two_tasks_can_await_it_and_it_runs_once(run: Callable[[Main], Any], function: Any) -> None:
    begun: list[int] = []

    @unsync
    async def begin() -> Any:
        begun.append(1)
        return await function(42)

    async def value_of(unfuture: Unfuture[Any]) -> Any:
        return await unfuture

    async def main() -> Any:
        unfuture = begin()
        tasks = [asyncio.ensure_future(value_of(unfuture)) for _ in range(2)]
        return await unfuture, *await asyncio.gather(*tasks)

    assert run(main) == (42, 42, 42)
    assert begun == [1]


@by
def test_one_that_awaits_itself_in_its_first_step_gets_an_error(
    run: Callable[[Main], Any],
) -> None:
    itself: list[Unfuture[None]] = []

    @unsync
    async def wait() -> None:
        await itself[0]

    async def main() -> None:
        itself.append(wait())
        with pytest.raises(RuntimeError, match="cannot await its own outcome"):
            await itself[0]

    run(main)


def test_one_that_is_awaited_without_a_task_starts_too() -> None:
    """In a callback, by hand: there is no current task to come back to."""

    @unsync
    async def inner() -> Any:
        return asyncio.current_task()

    def drive() -> None:
        waiting = inner().__await__()
        try:
            next(waiting)
        except StopIteration as stop:
            outcome.set_result((stop.value, asyncio.current_task()))
        else:
            outcome.set_result("suspended")

    outcome = Unfuture[Any]()
    unsync.loop.call_soon_threadsafe(drive)
    task, after = outcome.result(PATIENCE)
    assert task.get_name() == inner.__qualname__
    assert after is None


# Shutdown.


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("step", ["first", "later"])
@pytest.mark.parametrize("levels", [1, 3])
def test_a_shutdown_tells_all_that_wait_for_a_start_that_blocks_the_loop(
    step: str, levels: int, in_thread: InThread, caplog: pytest.LogCaptureFixture
) -> None:
    entered, leave = threading.Event(), threading.Event()
    calls: list[Unfuture[None]] = []
    told: list[type[BaseException]] = []

    @unsync
    async def nest(levels: int) -> None:
        if levels:
            if step == "later" and levels == 1:
                await asyncio.sleep(0)
            calls.append(nest(levels - 1))
            await calls[-1]
        else:
            entered.set()
            assert leave.wait(PATIENCE)

    def wait_in_thread(unfuture: Unfuture[None]) -> None:
        try:
            unfuture.result(PATIENCE)
        except BaseException as exc:
            told.append(type(exc).__mro__[-3])

    def wait_in_loop(unfuture: Unfuture[None]) -> None:
        async def main() -> None:
            await asyncio.wait_for(unfuture, PATIENCE)

        try:
            asyncio.run(main())
        except BaseException as exc:
            told.append(type(exc).__mro__[-3])

    thread = unsync.thread
    calls.append(nest(levels))
    try:
        assert entered.wait(PATIENCE)
        behind = give(1)
        waiters = [
            in_thread(partial(wait, unfuture))
            for unfuture in [*calls, behind]
            for wait in (wait_in_thread, wait_in_loop)
        ]
        assert len(waiters) == 2 * (levels + 2)
        assert not unsync.shutdown(timeout=0.01)
        for waiter in waiters:
            waiter.join(PATIENCE)
            assert not waiter.is_alive()
    finally:
        leave.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(told) == len(waiters)
    assert [unfuture.cancelled() for unfuture in calls] == [True] * (levels + 1)
    assert behind.cancelled()
    collect()
    assert caplog.records == []
    assert give(2).result(PATIENCE) == 2


# Task factories.


class Task(asyncio.Task):  # type: ignore[type-arg]
    """A user's own."""


def factory(loop: Any, coro: Coroutine[Any, Any, Any], **options: Any) -> Task:
    return Task(coro, loop=loop, **options)


class FactoryLoop(asyncio.SelectorEventLoop):
    """Has a factory of its own, whatever is set."""

    def get_task_factory(self) -> Any:
        return factory

    def create_task(self, coro: Any, **options: Any) -> Any:
        return factory(self, coro, **options)


def set_factory() -> None:
    async def set_it() -> None:
        unsync.loop.set_task_factory(factory)

    unsync(set_it)().result(PATIENCE)


def set_loop() -> None:
    unsync.loop_factory = FactoryLoop


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("set_up", [set_factory, set_loop])
def test_a_task_factory_makes_the_tasks_of_calls_from_everywhere(
    set_up: Callable[[], None],
) -> None:
    set_up()

    @unsync
    async def look(levels: int) -> list[Any]:
        task = asyncio.current_task()
        below = await look(levels - 1) if levels else []
        assert asyncio.current_task() is task
        assert task is not None
        return [(type(task), task.get_name()), *below]

    assert look(3).result(PATIENCE) == [(Task, look.__qualname__)] * 4
    assert asyncio.run(asyncio.wait_for(look(3), PATIENCE)) == [(Task, look.__qualname__)] * 4
    assert Unfuture.from_value(2).map(look).result(PATIENCE) == [(Task, look.__qualname__)] * 3


@since_312
@pytest.mark.usefixtures("fresh")
def test_asyncios_own_eager_factory_is_honoured() -> None:
    made: list[str] = []

    def eager(loop: Any, coro: Any, **options: Any) -> Any:
        made.append(coro.__qualname__)
        return asyncio.eager_task_factory(loop, coro, **options)

    async def set_it() -> None:
        unsync.loop.set_task_factory(eager)

    unsync(set_it)().result(PATIENCE)
    assert a_call_in_its_first_step(main_that_counts_turns) == (40, 0)
    assert made == [main_that_counts_turns.__qualname__] + [give.__qualname__] * 10


def note_calls(loop: Any, noted: list[Any]) -> None:
    def call_soon(callback: Any, *args: Any, **options: Any) -> Any:
        noted.append(callback)
        return type(loop).call_soon(loop, callback, *args, **options)

    loop.call_soon = call_soon


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="names are plain text")
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("loops", ["asyncio", "uvloop"])
def test_a_loop_has_its_call_soon_back_when_a_task_is_made(loops: str) -> None:
    """Before Python 3.12 it is taken from it for that long."""
    if loops == "uvloop":
        unsync.loop_factory = pytest.importorskip("uvloop").new_event_loop
    loop = unsync.loop

    class Refused(str):
        """A name that no task takes."""

        def __str__(self) -> str:
            raise OSError("no name today")

    async def main() -> None:
        for function in give, give_later:
            assert await function(1) == 1
            assert "call_soon" not in vars(loop)
        refused = give.__wrapped__(1)
        refused.__qualname__ = Refused("refused")
        with pytest.raises(OSError, match="no name today"):
            await Unfuture(refused)
        assert "call_soon" not in vars(loop)
        assert await give(2) == 2

    a_call_in_its_first_step(main)
    a_call_in_a_later_step(main)


@pytest.mark.usefixtures("fresh")
def test_a_call_soon_that_somebody_put_on_the_loop_stays_there() -> None:
    noted: list[Any] = []
    loop = unsync.loop

    async def main() -> Any:
        note_calls(loop, noted)
        own = vars(loop)["call_soon"]
        assert await give(1) == 1
        assert await give_later(2) == 2
        assert vars(loop)["call_soon"] is own
        loop.call_soon(noted.append, "mine")
        return await asyncio.wait_for(give_later(3), PATIENCE)

    assert a_call_in_its_first_step(main) == 3
    assert "mine" in noted


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="names are plain text")
@pytest.mark.usefixtures("fresh")
def test_what_else_is_called_soon_while_a_task_is_made_is_not_lost() -> None:
    """A task's name is turned to text while the task is made: code of anybody's may run there."""
    loop = unsync.loop
    seen: list[str] = []

    class Name(str):
        def __str__(self) -> str:
            loop.call_soon(seen.append, "called soon")
            asyncio.Task(plain(), loop=loop)
            return "a name"

    async def plain() -> None:
        seen.append("another task")

    async def main() -> Any:
        coro = give.__wrapped__(42)
        coro.__qualname__ = Name("name")
        value = await Unfuture(coro)
        for _ in range(3):
            await asyncio.sleep(0)
        return value

    for run in a_call_in_its_first_step, a_call_in_a_later_step:
        assert run(main) == 42
    assert Counter(seen) == {"called soon": 2, "another task": 2}


@pytest.mark.usefixtures("fresh")
def test_a_factory_that_refuses_is_heard_by_the_awaiting_caller() -> None:
    def refuse(loop: Any, coro: Any, **options: Any) -> Any:
        if coro.__qualname__ == give.__qualname__:
            raise OSError("no task today")
        return factory(loop, coro, **options)

    @unsync
    async def main() -> Any:
        unsync.loop.set_task_factory(refuse)
        with pytest.raises(OSError, match="no task today"):
            await give(1)
        return await give_later(2)

    assert main().result(PATIENCE) == 2
