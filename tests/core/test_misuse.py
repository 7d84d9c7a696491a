"""Whatever is called on whatever object, in whatever order: the answer is a result or an error."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from support.waiting import PATIENCE, ambient_loop_held, wait_until

from unsync import Unfuture, _backend, unsync
from unsync._core_py import CANCELLED, FAILED, FINISHED, PENDING, RUNNING
from unsync.executors import ThreadExecutor


@unsync
async def coroutine() -> int:
    return 1


@unsync
def function() -> int:
    return 1


# set_running_or_notify_cancel()


def of_coroutine() -> Unfuture[int]:
    return coroutine()


def of_continuation() -> Unfuture[int]:
    return Unfuture[int]().map(abs)


def of_follower() -> Unfuture[int]:
    return Unfuture(Unfuture())


def of_concurrent_future() -> Unfuture[int]:
    return Unfuture(concurrent.futures.Future())


def of_asyncio_future() -> Unfuture[int]:
    return Unfuture(unsync.loop.create_future())


BEHIND = [
    of_coroutine,
    of_continuation,
    of_follower,
    of_concurrent_future,
    of_asyncio_future,
]


@pytest.mark.parametrize("by_view", [False, True], ids=["itself", "view"])
@pytest.mark.parametrize("make", BEHIND)
def test_what_has_something_behind_it_is_not_marked_running(
    make: Callable[[], Unfuture[int]], by_view: bool
) -> None:
    with ambient_loop_held():
        unfuture = make()
        marked: Any = unfuture.concurrent_future if by_view else unfuture
        with pytest.raises(RuntimeError, match="what stands behind this Unfuture says itself"):
            marked.set_running_or_notify_cancel()
        assert not unfuture.running()
        # It can still be set and cancelled.
        unfuture.set_result(2)
        assert unfuture.result(PATIENCE) == 2


@pytest.mark.usefixtures("fresh")
def test_a_job_that_has_not_begun_is_not_marked_running() -> None:
    unsync.thread_executor = pool = ThreadExecutor(1)
    gate = threading.Event()
    try:
        first = unsync(gate.wait)(PATIENCE)
        wait_until(first.running)
        second = function()
        with pytest.raises(RuntimeError, match="what stands behind"):
            second.set_running_or_notify_cancel()
        gate.set()
        assert second.result(PATIENCE) == 1
    finally:
        gate.set()
        pool.shutdown(wait=False)


def test_a_call_that_was_told_to_run_is_not_lost() -> None:
    with ambient_loop_held():
        call = coroutine()
        with pytest.raises(RuntimeError):
            call.set_running_or_notify_cancel()
    assert call.result(PATIENCE) == 1


@pytest.mark.parametrize("make", BEHIND)
def test_one_that_was_cancelled_says_so_whatever_was_behind_it(
    make: Callable[[], Unfuture[int]],
) -> None:
    with ambient_loop_held():
        unfuture = make()
        unfuture.cancel()
        if unfuture.done():
            assert unfuture.set_running_or_notify_cancel() is False


# Made twice.


@pytest.mark.parametrize("make", BEHIND)
@pytest.mark.parametrize(
    "source", [Unfuture, concurrent.futures.Future], ids=["unfuture", "future"]
)
def test_what_has_something_behind_it_is_not_made_again(
    make: Callable[[], Unfuture[int]], source: Callable[[], Any]
) -> None:
    with ambient_loop_held():
        unfuture = make()
        with pytest.raises(RuntimeError, match="has been set up already"):
            unfuture.__init__(source())  # type: ignore[misc]
        unfuture.__init__()  # type: ignore[misc]  # nothing to do
        unfuture.set_result(2)
        assert unfuture.result(PATIENCE) == 2


def test_a_call_is_not_made_again() -> None:
    async def once(found: int) -> int:
        return found

    with ambient_loop_held():
        unfuture: Unfuture[int] = Unfuture(once(1))
        again = once(2)
        with pytest.raises(RuntimeError, match="has been set up already"):
            unfuture.__init__(again)  # type: ignore[misc]
        again.close()
    assert unfuture.result(PATIENCE) == 1


@pytest.mark.parametrize("state", ["running", "done", "cancelled"])
def test_one_that_has_begun_or_ended_gets_nothing_behind_it(state: str) -> None:
    unfuture: Unfuture[int] = Unfuture()
    if state == "running":
        unfuture.set_running_or_notify_cancel()
    elif state == "done":
        unfuture.set_result(1)
    else:
        unfuture.cancel()
    with pytest.raises(RuntimeError, match="has been set up already"):
        unfuture.__init__(Unfuture())  # type: ignore[misc]


def test_one_made_without_init_may_be_set_up_later() -> None:
    unfuture: Unfuture[int] = Unfuture.__new__(Unfuture)
    source: Unfuture[int] = Unfuture()
    unfuture.__init__(source)  # type: ignore[misc]
    source.set_result(3)
    assert unfuture.result(PATIENCE) == 3


def test_a_marked_function_is_not_made_again() -> None:
    marked = unsync(len)
    if not _backend.ACCELERATED:
        pytest.skip("the fallback has nothing to lose")
    with pytest.raises(RuntimeError, match="has been set up already"):
        _backend.Launcher.__init__(marked, abs, None)  # type: ignore[arg-type]
    assert marked([1]).result(PATIENCE) == 1


# What `await` waits on.


@pytest.fixture
def park() -> Iterator[Any]:
    unfuture: Unfuture[int] = Unfuture()
    yield unfuture.__await__()
    unfuture.cancel()


def test_only_a_task_adds_callbacks_to_an_await(park: Any) -> None:
    with pytest.raises(RuntimeError, match="only the task that is parked here"):
        park.add_done_callback(print)
    assert park.get_loop() is None
    assert park.remove_done_callback(print) == 0


def test_and_only_one() -> None:
    unfuture: Unfuture[int] = Unfuture()
    called: list[object] = []

    async def main() -> None:
        park: Any = unfuture.__await__()
        next(park)
        park.add_done_callback(called.append)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="and once"):
                park.add_done_callback(called.append)
        with pytest.raises(RuntimeError, match="await wasn't used"):
            next(park)
        unfuture.set_result(1)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert called == [park]

    asyncio.run(main())


@pytest.mark.parametrize("where", ["unfuture", "await"])
def test_a_context_is_a_context(where: str) -> None:
    async def main() -> None:
        unfuture: Unfuture[int] = Unfuture()
        target: Any = unfuture
        if where == "await":
            target = unfuture.__await__()
            next(target)
        with pytest.raises(TypeError, match="Context is needed, not 5"):
            target.add_done_callback(print, context=5)
        unfuture.cancel()

    asyncio.run(main())


def test_a_context_for_a_callback_outside_of_loops_is_a_context() -> None:
    unfuture: Unfuture[int] = Unfuture()
    with pytest.raises(TypeError, match="Context is needed, not 5"):
        unfuture.add_done_callback(print, context=5)  # type: ignore[arg-type]
    unfuture.add_done_callback(lambda _: None, context=contextvars.copy_context())
    unfuture.set_result(1)


# What is the core's own business.


def test_an_unfuture_ends_in_no_state_but_a_final_one() -> None:
    unfuture: Unfuture[int] = Unfuture()
    for status in (PENDING, RUNNING, FAILED + 1, -1):
        with pytest.raises(ValueError, match="is not the status of anything that is done"):
            unfuture._complete(status, 1)
    with pytest.raises(TypeError, match="a failure is an exception, not 1"):
        unfuture._complete(FAILED, 1)
    assert not unfuture.done()
    assert unfuture._complete(FINISHED, 1)
    assert not unfuture._complete(CANCELLED, None)


def half_made() -> list[Any]:
    return [
        getattr(_backend, name).__new__(getattr(_backend, name))
        for name in ("Batch", "Counter", "JobQueue", "Launcher", "Mailbox", "Route")
    ]


@pytest.mark.skipif(not _backend.ACCELERATED, reason="the fallback has attributes only when made")
@pytest.mark.parametrize("thing", half_made(), ids=lambda thing: type(thing).__name__)
def test_what_was_never_made_breaks_nothing(thing: Any) -> None:
    for name in dir(thing):
        if name in {"__class__", "__subclasshook__", "__init_subclass__", "work"}:
            continue
        for arguments in ((), (None,), (None, None), (print, (), {}), (None, None, None)):
            if name == "wait" and arguments in ((), (None,)):
                continue  # it waits, for ever
            try:
                found = getattr(thing, name)
                if callable(found):
                    found(*arguments)
            except Exception:
                continue


@pytest.mark.skipif(not _backend.ACCELERATED, reason="of C classes only")
def test_nobody_makes_what_only_the_core_makes() -> None:
    park: type[Any] = type(Unfuture[int]().__await__())
    item: type[Any] = Unfuture.__mro__[1]
    for cls in (park, item, *item.__subclasses__()):
        if cls is Unfuture or cls.__name__ in {"Mailbox", "JobQueue"}:
            continue
        for make in (cls, lambda cls=cls: cls.__new__(cls), lambda cls=cls: object.__new__(cls)):
            with pytest.raises(TypeError, match=r"cannot create|is not safe"):
                make()


def test_a_job_has_arguments() -> None:
    queue = _backend.JobQueue(1, lambda: None)
    if _backend.ACCELERATED:  # the fallback has an Unfuture that fails so
        for args in (None, [], 5):
            with pytest.raises(TypeError):
                queue.submit(len, args, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a failure is an exception"):
        queue.fail_all(5)  # type: ignore[arg-type]


def test_a_mailbox_is_emptied_by_its_loop_only() -> None:
    mailbox: Any = _backend.Mailbox(unsync.loop)
    for method in (mailbox._drain, mailbox.open_bell, mailbox.close_bell):
        with pytest.raises(RuntimeError, match="is for the thread of"):
            method()


def test_results_for_calls_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chunk(_backend.Batch):
        def fail(self, job: Any, exc: BaseException) -> None:
            raise exc

    chunk = Chunk("name", [1, 2, 3])
    (calls,) = _backend.fill_batches([chunk])
    kept = list(calls)
    del calls[1:]  # the batch's own list
    job: Unfuture[Any] = Unfuture.from_value((True, [1, 2, 3]))
    with contextlib.suppress(IndexError, ValueError):
        chunk.end(job)
    assert kept[0].result(PATIENCE) == 1
    for call in kept:
        call.cancel()


def test_a_fork_that_was_none_changes_nothing() -> None:
    unfuture: Unfuture[int] = Unfuture(Unfuture())
    _backend.after_fork()
    assert not unfuture.done()
    unfuture.cancel()


# Forgotten.


def test_an_unfuture_takes_no_attributes_but_one_of_a_subclass_does() -> None:
    """With a `__dict__` encoders would answer `{}` for it."""
    unfuture: Any = Unfuture()
    with pytest.raises(AttributeError):
        unfuture.tag = 1
    with pytest.raises(TypeError):
        vars(unfuture)

    class Tagged(Unfuture[int]):
        pass

    tagged: Any = Tagged()
    tagged.tag = 1
    assert tagged.tag == 1
    tags: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary({unfuture: 2})
    assert tags[unfuture] == 2


# Iterating over an Unfuture instead of its result.


OWN_WORDS = r"\.result\(\).*await"
# Where CPython says it in its own words, whatever iter() raises.
PYTHONS_WORDS = "iterable"


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda rows: [*rows], OWN_WORDS),
        (sum, OWN_WORDS),
        (dict, OWN_WORDS),
        (lambda rows: [].extend(rows), OWN_WORDS),
        (",".join, f"{OWN_WORDS}|{PYTHONS_WORDS}"),
        (lambda rows: 1 in rows, f"{OWN_WORDS}|{PYTHONS_WORDS}"),
    ],
    ids=["for", "sum", "dict", "extend", "join", "in"],
)
def test_who_forgets_the_result_hears_of_it(
    use: Callable[[Any], object], words: str, is_done: bool
) -> None:
    unfuture: Unfuture[list[int]] = Unfuture()
    if is_done:
        unfuture.set_result([1, 2])
    with pytest.raises(TypeError, match=words):
        use(unfuture)


def test_yield_from_is_no_await() -> None:
    @types.coroutine
    def old_style() -> Generator[Any, None, int]:
        return (yield from Unfuture.from_value(1))  # type: ignore[misc]

    async def main() -> None:
        with pytest.raises(TypeError, match="await"):
            await old_style()

    asyncio.run(main())


# Waiting where an event loop runs.


def wait_for_a_call() -> object:
    return unsync(asyncio.sleep)(0.001).result(PATIENCE)


def take_from_a_stream() -> object:
    return next(unsync.map(unsync(asyncio.sleep), [0.001]))


def wait_for_a_view() -> object:
    return unsync(asyncio.sleep)(0.001).concurrent_future.result(PATIENCE)


@pytest.mark.alone  # warnings are everybody's
@pytest.mark.parametrize("wait", [wait_for_a_call, take_from_a_stream, wait_for_a_view])
def test_in_debug_mode_a_wait_that_blocks_a_running_loop_warns_once_for_each_place(
    wait: Callable[[], object],
) -> None:
    async def main() -> None:
        for _ in range(3):
            wait()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        asyncio.run(main(), debug=True)
    warned = [each for each in caught if each.category is RuntimeWarning]
    assert [each.filename for each in warned] == [__file__]
    assert "'await'" in str(warned[0].message)
    assert warned[0].lineno == wait.__code__.co_firstlineno + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wait()
        asyncio.run(main(), debug=False)


@pytest.mark.alone  # on the stack of the main thread
@pytest.mark.parametrize("name", ["Launcher", "Route"])
def test_long_chains_of_what_marks_functions_can_be_freed(name: str) -> None:
    """Without recursion, which the stack's 8 MB would not do for."""
    kind = getattr(_backend, name)
    last: object = None
    for _ in range(1_000_000):
        last = kind(last, None)
    del last
