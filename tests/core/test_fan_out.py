"""`unsync.calls` and `unsync.map`: many calls of one function, in chunks where that pays."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

import pytest
from support.waiting import PATIENCE, collect, wait_until

from unsync import CancelledError, Stream, Unfuture, fan_out, unsync
from unsync.executors import ThreadExecutor

Run = Callable[..., "subprocess.CompletedProcess[str]"]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.fixture
def threads() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def single() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        yield executor


def plain(x: int, y: int = 0) -> int:
    return 10 * x + y


@unsync
def in_thread_pool(x: int, y: int = 0) -> int:
    return plain(x, y)


@unsync
async def in_loop(x: int, y: int = 0) -> int:
    return plain(x, y)


@unsync(cpu_bound=True)
def in_process(x: int, y: int = 0) -> int:
    return plain(x, y)


@unsync(cpu_bound=True)
def where(_: object) -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


class ChoosyError(Exception):
    """It pickles, but not back: it keeps less than what it is made of."""

    def __new__(cls, first: str, second: str) -> ChoosyError:
        return super().__new__(cls, first)

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


class Broken:
    """Does not unpickle."""

    def __setstate__(self, state: object) -> NoReturn:
        raise ValueError("broken")

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


@unsync(cpu_bound=True)
def act(what: Any) -> object:
    if what == "raise":
        raise KeyError("raised")
    if what == "exit":
        raise SystemExit(3)
    if what == "unmade":
        raise ChoosyError("bad", "worse")
    if what == "lambda":
        return lambda: None
    if what == "broken":
        return Broken()
    if what == "pid":
        return [os.getpid()]
    return what


@unsync(cpu_bound=True)
def push(things: list[int]) -> list[int]:
    things.append(1)
    return things


@unsync(cpu_bound=True)
def die(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


class Scale:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    @unsync(cpu_bound=True)
    def up(self, x: int) -> int:
        return self.factor * x

    @unsync
    @classmethod
    def name(cls, x: int) -> str:
        return cls.__name__ * x


WANTED = [plain(x, y) for x, y in zip(range(100), range(5, 105), strict=True)]
pytestmark = pytest.mark.usefixtures("without_cloudpickle")

KINDS = ["loop", "threads", "thread executor", "plain threads", "processes"]


@pytest.fixture(params=KINDS)
def marked(request: pytest.FixtureRequest) -> Iterator[Callable[..., Unfuture[int]]]:
    """`plain`, marked so that it runs in one way after the other."""
    kind = request.param
    if kind == "loop":
        yield in_loop
    elif kind == "threads":
        yield in_thread_pool
    elif kind == "processes":
        request.getfixturevalue("pool")
        yield in_process
    else:
        cls = ThreadExecutor if kind == "thread executor" else concurrent.futures.ThreadPoolExecutor
        with cls(2) as executor:
            yield unsync(plain, executor=executor)


# Values.


@pytest.mark.parametrize("chunksize", [None, 1, 7, 1000])
def test_each_call_has_an_unfuture(
    marked: Callable[..., Unfuture[int]], chunksize: int | None
) -> None:
    calls = unsync.calls(marked, range(100), range(5, 1000), chunksize=chunksize)
    assert all(type(call) is Unfuture for call in calls)
    assert [call.result(PATIENCE) for call in calls] == WANTED


@pytest.mark.parametrize("chunksize", [None, 1, 7, 1000])
@pytest.mark.parametrize("in_order", [True, False])
def test_a_stream_gives_all_results(
    marked: Callable[..., Unfuture[int]], chunksize: int | None, in_order: bool
) -> None:
    stream = unsync.map(marked, range(100), range(5, 1000), chunksize=chunksize, in_order=in_order)
    assert isinstance(stream, Stream)
    found = list(stream)
    assert (found if in_order else sorted(found)) == WANTED


@pytest.mark.parametrize("in_order", [True, False])
def test_a_stream_is_read_in_any_loop(marked: Callable[..., Unfuture[int]], in_order: bool) -> None:
    async def read() -> list[int]:
        pairs = ((x, x + 5) for x in range(100))
        xs, ys = itertools.tee(pairs)
        stream = unsync.map(
            marked, (x for x, _ in xs), (y for _, y in ys), in_order=in_order, read_ahead=10
        )
        return [value async for value in stream]

    assert sorted(asyncio.run(read())) == WANTED
    assert sorted(unsync(read)().result(PATIENCE)) == WANTED


def test_no_arguments_are_no_calls() -> None:
    for iterables in ([[]], [[1], []], [iter(())]):
        assert unsync.calls(in_process, *iterables) == []
        assert list(unsync.map(in_process, *iterables)) == []


def test_methods_and_partials_of_marked_functions_are_called(
    pool: concurrent.futures.ProcessPoolExecutor, threads: concurrent.futures.Executor
) -> None:
    def results(function: Callable[..., Unfuture[Any]], *args: Any) -> list[Any]:
        found = list(unsync.map(function, *args, chunksize=2))
        assert [call.result(PATIENCE) for call in unsync.calls(function, *args)] == found
        return found

    assert results(Scale(3).up, range(3)) == [0, 3, 6]
    assert results(Scale.name, range(3)) == ["", "Scale", "ScaleScale"]
    assert results(functools.partial(in_process, y=2), range(3)) == [2, 12, 22]
    assert results(functools.partial(in_process, 1), range(3)) == [10, 11, 12]
    assert results(functools.partial(Scale.up, Scale(3)), range(3)) == [0, 3, 6]
    assert results(functools.partial(unsync(plain, executor=threads), 1), [2]) == [12]


# In which order, and how far ahead.


def test_values_come_in_order_or_as_their_calls_are_done(
    threads: concurrent.futures.ThreadPoolExecutor,
) -> None:
    gates = [threading.Event(), threading.Event()]

    def wait(number: int) -> int:
        assert gates[number].wait(PATIENCE)
        return number

    for marked in (unsync(wait), unsync(wait, executor=threads)):
        for gate in gates:
            gate.clear()
        stream = unsync.map(marked, range(2), chunksize=1, in_order=False)
        gates[1].set()
        assert next(stream) == 1
        gates[0].set()
        assert list(stream) == [0]
        gates[0].clear()
        stream = unsync.map(marked, range(2), chunksize=1)
        wait_until(lambda stream=stream: [*stream._channel.parts()][1].is_done())  # type: ignore[misc]
        gates[0].set()
        assert list(stream) == [0, 1]


@pytest.mark.parametrize("in_order", [True, False])
def test_an_endless_iterable_is_read_as_far_as_wanted(
    marked: Callable[..., Unfuture[int]], in_order: bool
) -> None:
    read = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    with unsync.map(marked, numbers(), chunksize=3, read_ahead=12, in_order=in_order) as stream:
        assert 9 < len(read) <= 12
        for count in range(1, 40):
            assert next(stream) % 10 == 0
            assert len(read) <= count + 12


def test_chunks_grow_where_nobody_knows_how_many_calls_there_are(
    threads: concurrent.futures.ThreadPoolExecutor,
) -> None:
    before = unsync.stats().executors.started
    marked = unsync(plain, executor=threads)
    assert sum(1 for _ in unsync.map(marked, iter(range(1000)))) == 1000
    assert unsync.stats().executors.started - before == 11  # 1, 2, 4, ... 256, 256, 233


def test_a_chunk_counts_as_one_job(threads: concurrent.futures.ThreadPoolExecutor) -> None:
    marked = unsync(plain, executor=threads)
    before = unsync.stats()
    calls = unsync.calls(marked, range(100), chunksize=30)
    concurrent.futures.wait(calls, PATIENCE)  # type: ignore[type-var]
    wait_until(lambda: unsync.stats().executors.finished - before.executors.finished == 4)
    assert unsync.stats().executors.started - before.executors.started == 4
    unsync.calls(marked, range(100))  # four chunks to each of two workers
    assert unsync.stats().executors.started - before.executors.started == 12


# Outcomes.


def test_a_chunk_that_an_interrupt_leaves_is_counted_to_its_end(
    threads: concurrent.futures.ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = threads.submit
    submitted: list[concurrent.futures.Future[Any]] = []

    def interrupted(*args: Any) -> concurrent.futures.Future[Any]:
        if submitted:
            raise KeyboardInterrupt
        submitted.append(submit(*args))
        return submitted[0]

    monkeypatch.setattr(threads, "submit", interrupted)
    before = unsync.stats().executors
    with pytest.raises(KeyboardInterrupt):
        unsync.calls(unsync(plain, executor=threads), range(4), chunksize=2)
    concurrent.futures.wait(submitted, PATIENCE)
    wait_until(lambda: unsync.stats().executors.pending == before.pending)
    assert unsync.stats().executors.started == before.started + 1


def test_a_chunk_that_an_interrupt_leaves_as_it_is_submitted_is_counted_to_its_end(
    threads: concurrent.futures.ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job is there, but nobody has asked to be told of the job's end."""
    launch = fan_out._Followed.launch
    jobs: list[Any] = []

    def interrupted(chunk: fan_out._Followed, route: Any) -> None:
        launch(chunk, route)
        jobs.append(chunk.job)
        raise KeyboardInterrupt

    monkeypatch.setattr(fan_out._Followed, "launch", interrupted)
    before = unsync.stats().executors
    with pytest.raises(KeyboardInterrupt):
        unsync.calls(unsync(plain, executor=threads), range(4), chunksize=2)
    concurrent.futures.wait(jobs, PATIENCE)
    wait_until(lambda: unsync.stats().executors.pending == before.pending)
    assert unsync.stats().executors.started == before.started + 1


@pytest.mark.parametrize("is_at_work", [True, False])
def test_the_garbage_collector_is_left_as_it_was(
    threads: concurrent.futures.ThreadPoolExecutor, is_at_work: bool
) -> None:
    was_at_work = gc.isenabled()
    try:
        (gc.enable if is_at_work else gc.disable)()
        calls = unsync.calls(unsync(plain, executor=threads), range(9), chunksize=2)
        assert gc.isenabled() == is_at_work
    finally:
        (gc.enable if was_at_work else gc.disable)()
    assert [call.result(PATIENCE) for call in calls] == [plain(x) for x in range(9)]


@pytest.mark.usefixtures("pool")
def test_each_call_of_a_chunk_has_its_own_outcome() -> None:
    given = [1, "raise", threading.Lock(), Broken(), "exit", "unmade", "lambda", "broken", "pid", 2]
    calls = unsync.calls(act, given, chunksize=len(given))
    assert calls[0].result(PATIENCE) == 1
    assert calls[9].result(PATIENCE) == 2
    assert calls[8].result(PATIENCE) != [os.getpid()]
    with pytest.raises(KeyError, match="raised"):
        calls[1].result()
    assert "in act" in str(calls[1].exception().__cause__)  # type: ignore[union-attr]
    with pytest.raises(SystemExit, match="3"):
        calls[4].result()
    for number, kind, message in [
        (2, pickle.PicklingError, "argument 1 of act, of type lock, cannot go to another process"),
        (3, pickle.UnpicklingError, r"the arguments of act cannot be unpickled in process \d+: br"),
        (5, pickle.PicklingError, r"act raised ChoosyError\('bad'\), which cannot come back"),
        (6, pickle.PicklingError, "the result of act, of type function, cannot come back"),
        (7, pickle.UnpicklingError, "the result of act cannot be unpickled in process .*: broken"),
    ]:
        with pytest.raises(kind, match=message):
            calls[number].result()


@pytest.mark.usefixtures("pool")
def test_plain_arguments_do_not_keep_outcomes_from_being_one_s_own() -> None:
    given = [1, "raise", 2, "lambda", None, "pid", "unmade", "exit", b"3"]
    calls = unsync.calls(act, given, chunksize=len(given))
    kinds = [type(call.exception(PATIENCE)) for call in calls]
    none, bad = type(None), pickle.PicklingError
    assert kinds == [none, KeyError, none, bad, none, none, bad, SystemExit, none]
    assert calls[8].result() == b"3"


class Pickling(concurrent.futures.Executor):
    """Sends its jobs away in its own time, and in its own way."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fn))())))
        except Exception as exc:
            future.set_exception(exc)
        return future


def test_an_executor_may_pickle_chunks_itself() -> None:
    marked = unsync(act.__wrapped__, executor=Pickling())
    for given in ([1, "raise", 2], [1, threading.Lock(), 2]):
        calls = unsync.calls(marked, given, chunksize=3)
        assert [calls[0].result(PATIENCE), calls[2].result(PATIENCE)] == [1, 2]
        assert type(calls[1].exception()) in (KeyError, pickle.PicklingError)
        assert next(unsync.map(marked, given, chunksize=3)) == 1
    assert list(unsync.map(marked, [(1,), (2,)])) == [(1,), (2,)]


class Number(int):
    """Not plain: it may have anything in it."""


def odd(x: int, y: int = 0) -> object:
    if x % 5 == 1:
        raise StopIteration(x)
    return [1.5 * x, "", [x], Number(x), None][x % 5]


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("several", [False, True])
def test_plain_results_others_and_failures_take_turns(several: bool) -> None:
    iterables = (range(12), [0] * 12) if several else (range(12),)
    calls = unsync.calls(unsync(odd, cpu_bound=True), *iterables, chunksize=12)
    for x, call in enumerate(calls):
        if x % 5 == 1:
            failure = call.exception(PATIENCE)
            assert type(failure) is StopIteration
            assert failure.args == (x,)
        else:
            result = call.result(PATIENCE)
            assert result == odd(x)
            assert type(result) is type(odd(x))


@pytest.mark.usefixtures("pool")
def test_what_a_call_does_to_its_argument_no_other_sees() -> None:
    assert list(unsync.map(push, [[0]] * 3, chunksize=3)) == [[0, 1]] * 3


class Afar(concurrent.futures.Executor):
    """The test has the jobs in its hands, and says what comes back."""

    def __init__(self) -> None:
        self.make: type[concurrent.futures.Future[Any]] = concurrent.futures.Future
        self.jobs: list[concurrent.futures.Future[Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        self.jobs.append(self.make())
        return self.jobs[-1]


def test_whoever_is_told_of_a_call_finds_the_others_of_its_chunk_done() -> None:
    afar = Afar()
    calls = unsync.calls(unsync(plain, executor=afar), range(3), chunksize=3)
    found: list[list[bool]] = []
    for call in (calls[0], calls[1]):
        call.add_done_callback(lambda _: found.append([each.done() for each in calls]))
    afar.jobs[0].set_result((True, [5, 6, 7]))
    assert found == [[True, True, True], [True, True, True]]
    assert [call.result(0) for call in calls] == [5, 6, 7]


@pytest.mark.alone  # it counts
@pytest.mark.parametrize("in_order", [True, None])
def test_an_interrupt_while_a_chunk_comes_back_is_not_its_outcome(in_order: bool | None) -> None:
    class Interrupted(concurrent.futures.Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            if self.interrupts:
                raise KeyboardInterrupt
            return super().result(timeout)

        interrupts = True

    afar = Afar()
    afar.make = Interrupted
    work = unsync(plain, executor=afar)
    before = unsync.stats().executors
    if in_order is None:
        calls = unsync.calls(work, range(3), chunksize=3)
    else:
        stream = unsync.map(work, range(3), chunksize=3, in_order=in_order)
    (job,) = afar.jobs
    assert isinstance(job, Interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.set_result((True, [5, 6, 7]))
    assert unsync.stats().executors.pending == before.pending + 1
    # What it had to do is left to do: here another who waits for the job does it.
    job.interrupts = False
    job.add_done_callback(job._done_callbacks[0])  # type: ignore[attr-defined]
    values = [call.result(0) for call in calls] if in_order is None else [*stream]
    assert values == [5, 6, 7]
    assert unsync.stats().executors.pending == before.pending


def test_a_call_whose_outcome_does_not_come_back_fails() -> None:
    afar = Afar()
    first, *others = unsync.calls(unsync(plain, executor=afar), range(3), chunksize=3)
    afar.jobs[0].set_result((True, [5]))
    assert first.result(PATIENCE) == 5
    for call in others:
        with pytest.raises(RuntimeError, match="no outcome of plain came back"):
            call.result(PATIENCE)


def test_a_function_that_cannot_travel_is_every_call_s_failure() -> None:
    calls = unsync.calls(unsync(lambda x: x, cpu_bound=True), range(3))
    for call in calls:
        with pytest.raises(pickle.PicklingError, match="it is a lambda"):
            call.result(PATIENCE)


def test_in_threads_too_each_call_has_its_own_outcome(
    threads: concurrent.futures.ThreadPoolExecutor,
) -> None:
    def divide(x: int) -> float:
        if x == 2:
            raise SystemExit(2)
        return 6 / x

    for marked in (unsync(divide, executor=threads), unsync(divide)):
        kinds = [type(c.exception(PATIENCE)) for c in unsync.calls(marked, range(4), chunksize=4)]
        assert kinds == [ZeroDivisionError, type(None), SystemExit, type(None)]


def test_each_call_sees_a_copy_of_the_caller_s_context_of_its_own(
    threads: concurrent.futures.ThreadPoolExecutor,
) -> None:
    def swap(value: str) -> str:
        found = variable.get()
        variable.set(value)
        return found

    token = variable.set("the caller's")
    try:
        for marked in (unsync(swap, executor=threads), unsync(swap)):
            assert list(unsync.map(marked, "abc", chunksize=3)) == ["the caller's"] * 3
            assert {c.result(PATIENCE) for c in unsync.calls(marked, "abc")} == {"the caller's"}
    finally:
        variable.reset(token)


def test_a_call_that_is_refused_has_that_as_its_outcome() -> None:
    for cls in (ThreadExecutor, concurrent.futures.ThreadPoolExecutor):
        executor = cls(1)
        marked = unsync(plain, executor=executor)
        executor.shutdown()
        for call in unsync.calls(marked, range(3)):
            with pytest.raises(RuntimeError, match="shutdown"):
                call.result(PATIENCE)
        with pytest.raises(RuntimeError, match="shutdown"):
            next(unsync.map(marked, range(3)))


def test_arguments_that_do_not_fit_are_the_call_s_failure(
    marked: Callable[..., Unfuture[int]],
) -> None:
    for call in unsync.calls(marked, [1, 2], [1, 2], [1, 2]):
        with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments but 3 were"):
            call.result(PATIENCE)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_failure_is_raised_in_its_turn_and_ends_the_stream(
    single: concurrent.futures.ThreadPoolExecutor, in_order: bool
) -> None:
    made = []

    def divide(x: int) -> float:
        made.append(x)
        return 6 / (3 - x)

    stream = unsync.map(
        unsync(divide, executor=single),
        itertools.count(),
        chunksize=2,
        read_ahead=8,
        in_order=in_order,
    )
    assert [next(stream) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert list(stream) == []
    single.submit(int).result(PATIENCE)
    assert len(made) <= 4 + 8


@pytest.mark.parametrize("in_order", [True, False])
def test_what_an_iterable_raises_comes_after_the_calls_before_it(
    marked: Callable[..., Unfuture[int]], in_order: bool
) -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise LookupError("no more")

    stream = unsync.map(marked, numbers(), chunksize=3, in_order=in_order)
    assert sorted(next(stream) for _ in range(5)) == [0, 10, 20, 30, 40]
    with pytest.raises(LookupError, match="no more"):
        next(stream)
    assert list(stream) == []
    with pytest.raises(LookupError, match="no more"):
        unsync.calls(marked, numbers())


def test_an_interrupt_while_an_iterable_is_read_is_raised_at_once() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unsync.map(in_thread_pool, numbers())


# Cancelling, leaving, ending.


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("way", ["for", "next"])
@pytest.mark.alone  # there is one main thread
def test_an_interrupt_while_a_value_is_waited_for_ends_the_work(way: str) -> None:
    """Though the exception is kept, and with it the frames that refer to the stream."""
    begun, gate = threading.Event(), threading.Event()
    made: list[int] = []
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        assert begun.wait(PATIENCE)
        wait_until(lambda: stream._channel.waiters)
        signal.pthread_kill(main, signal.SIGINT)

    with ThreadExecutor(1) as executor:

        @unsync(executor=executor)
        def work(number: int) -> int:
            made.append(number)
            begun.set()
            gate.wait(PATIENCE)
            return number

        stream = unsync.map(work, range(20))
        other = threading.Thread(target=interrupt)
        other.start()
        with pytest.raises(KeyboardInterrupt) as kept:
            assert not [*stream] if way == "for" else not next(stream)
        other.join(PATIENCE)
        gate.set()
    assert made == [0]
    assert kept.value.__traceback__ is not None
    assert [*stream] == []


@contextlib.contextmanager
def held(executor: concurrent.futures.Executor) -> Iterator[None]:
    """The only worker of the executor is busy meanwhile."""
    gate = threading.Event()
    busy = executor.submit(gate.wait, PATIENCE)
    try:
        yield
    finally:
        gate.set()
        assert busy.result(PATIENCE)


def test_a_cancelled_call_of_a_chunk_that_waits_is_not_made(
    single: concurrent.futures.ThreadPoolExecutor,
) -> None:
    made: list[int] = []
    with held(single):
        calls = unsync.calls(unsync(made.append, executor=single), range(4), chunksize=4)
        assert calls[1].cancel()
        assert calls[2].cancel()
        assert "append" in repr(calls[0])
        calls[3].set_result(None)
    calls[0].result(PATIENCE)
    single.submit(int).result(PATIENCE)
    assert made == [0]
    with pytest.raises(CancelledError):
        calls[1].result(PATIENCE)


def test_a_chunk_all_of_whose_calls_are_cancelled_is_cancelled(
    single: concurrent.futures.ThreadPoolExecutor,
) -> None:
    before = unsync.stats().executors
    with held(single):
        calls = unsync.calls(unsync(plain, executor=single), range(6), chunksize=3)
        for call in (calls[1], calls[0], calls[4], calls[2]):
            assert call.cancel()
        assert unsync.stats().executors.cancelled - before.cancelled == 1
    assert [calls[3].result(PATIENCE), calls[5].result(PATIENCE)] == [30, 50]
    assert calls[4].cancelled()


@pytest.mark.parametrize(
    "cancel",
    [
        Unfuture.cancel,
        lambda call: call.then(str).cancel(),
        lambda call: call.concurrent_future.cancel(),
        lambda call: asyncio.run(cancel_its_view(call)),
    ],
    ids=["itself", "what goes on from it", "a view", "a view of a loop"],
)
def test_however_the_calls_of_a_chunk_are_cancelled_it_is_cancelled_with_the_last(
    cancel: Callable[[Unfuture[int]], object],
) -> None:
    afar = Afar()
    calls = unsync.calls(unsync(plain, executor=afar), range(3), chunksize=3)
    for call in calls:
        assert not afar.jobs[0].cancelled()
        cancel(call)
        assert call.cancelled()
    assert afar.jobs[0].cancelled()


async def cancel_its_view(call: Unfuture[int]) -> None:
    call.future.cancel()


def test_a_chunk_whose_calls_are_cancelled_from_several_threads_is_cancelled(
    threads: concurrent.futures.ThreadPoolExecutor,
) -> None:
    afar = Afar()
    calls = unsync.calls(unsync(plain, executor=afar), range(400), chunksize=4)
    start = threading.Barrier(2)

    def cancel(mine: list[Unfuture[int]]) -> None:
        start.wait(PATIENCE)
        for call in mine:
            call.cancel()

    list(threads.map(cancel, [calls[0::2], calls[1::2]]))
    assert len(afar.jobs) == 100
    assert all(job.cancelled() for job in afar.jobs)


def test_a_chunk_one_of_whose_calls_was_done_by_hand_is_not_cancelled() -> None:
    afar = Afar()
    calls = unsync.calls(unsync(plain, executor=afar), range(3), chunksize=3)
    calls[1].set_result(5)
    for call in (calls[0], calls[2]):
        assert call.cancel()
    assert not afar.jobs[0].cancelled()


@pytest.mark.parametrize("in_order", [True, False])
def test_a_stream_that_is_left_cancels_what_has_not_begun(
    single: concurrent.futures.ThreadPoolExecutor, in_order: bool
) -> None:
    made: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    def wait(x: int) -> int:
        begun.set()
        assert gate.wait(PATIENCE)
        made.append(x)
        raise ValueError("nobody wants to know")

    stream = unsync.map(
        unsync(wait, executor=single), itertools.count(), chunksize=2, in_order=in_order
    )
    assert begun.wait(PATIENCE)
    stream.close()
    gate.set()
    assert list(stream) == []
    single.submit(int).result(PATIENCE)
    assert made == [0]


@pytest.mark.parametrize("in_order", [True, False])
def test_a_stream_that_nobody_refers_to_cancels_what_has_not_begun(
    single: concurrent.futures.ThreadPoolExecutor, in_order: bool
) -> None:
    made: list[int] = []
    with held(single):
        stream = unsync.map(unsync(made.append, executor=single), range(9), in_order=in_order)
        del stream
        collect()
    single.submit(int).result(PATIENCE)
    assert made == []


def test_a_consumer_that_is_cancelled_loses_no_value() -> None:
    gate = threading.Event()

    @unsync
    def wait(x: int) -> int:
        assert gate.wait(PATIENCE)
        return x

    async def main() -> list[int]:
        stream = unsync.map(wait, range(3))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.001)
        gate.set()
        return [value async for value in stream]

    assert asyncio.run(main()) == [0, 1, 2]


@pytest.mark.parametrize("in_order", [True, False])
def test_so_many_calls_wait_at_once(in_order: bool) -> None:
    """Not half of them: `read_ahead` is how many requests to a service, say, are under way."""
    gates: list[Unfuture[int]] = [Unfuture() for _ in range(20)]
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for x in range(20):
            read.append(x)
            yield x

    @unsync
    async def wait(x: int) -> int:
        return await gates[x]

    with unsync.map(wait, numbers(), in_order=in_order, read_ahead=8) as stream:
        assert len(read) == 8
        for x in range(4):
            gates[x].set_result(x)
            assert next(stream) == x
            assert len(read) == 8 + x


@pytest.mark.alone
@pytest.mark.usefixtures("fresh")
def test_several_consumers_share_the_values(
    in_thread: Callable[[Callable[[], object]], threading.Thread],
) -> None:
    for in_order in (True, False):
        found: list[int] = []
        stream = unsync.map(in_thread_pool, iter(range(500)), read_ahead=5, in_order=in_order)
        consumers = [in_thread(lambda s=stream, f=found: f.extend(s)) for _ in range(4)]  # type: ignore[misc]
        for consumer in consumers:
            consumer.join(PATIENCE)
        assert sorted(found) == [10 * x for x in range(500)]


def test_what_is_raised_as_a_consumer_hears_of_a_call_that_is_done_is_raised_by_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a signal handler. So far it was logged, and the consumer waited for ever."""
    answers = [False]
    failures = [TimeoutError()]

    def is_done(part: fan_out._Single) -> bool:
        return answers.pop() if answers else part.job.done()

    def arrive(outlet: fan_out._InOrder[int], part: fan_out._Part) -> None:
        if failures:
            raise failures.pop()
        hear(outlet, part)

    hear = fan_out._InOrder.arrive
    monkeypatch.setattr(fan_out._Single, "is_done", is_done)
    monkeypatch.setattr(fan_out._InOrder, "arrive", arrive)
    stream = unsync.map(unsync(plain), range(3))
    channel: Any = stream._channel
    wait_until(lambda: all(part.job.done() for part in channel.line), "the calls")
    with pytest.raises(TimeoutError):
        next(stream)
    assert list(stream) == [0, 10, 20]


@pytest.mark.parametrize("cls", [ThreadExecutor, concurrent.futures.ThreadPoolExecutor])
def test_a_shutdown_cancels_what_waits(cls: type[concurrent.futures.ThreadPoolExecutor]) -> None:
    executor = cls(1)
    marked = unsync(plain, executor=executor)
    with held(executor):
        calls = unsync.calls(marked, range(3), chunksize=2)
        stream = unsync.map(marked, range(3), chunksize=2)
        executor.shutdown(wait=False, cancel_futures=True)
    for call in calls:
        with pytest.raises(CancelledError):
            call.result(PATIENCE)
    with pytest.raises(CancelledError):
        next(stream)
    assert list(stream) == []


KILLING = """
    import multiprocessing
    import os
    from concurrent.futures.process import BrokenProcessPool
    from unsync import unsync

    @unsync(cpu_bound=True)
    def work(x):
        if x == 70:
            os.kill(os.getpid(), 9)
        return x + 1

    if __name__ == "__main__":
        multiprocessing.set_start_method(START)
        calls = unsync.calls(work, range(100), chunksize=10)
        kinds = {type(call.exception()) for call in calls}
        assert type(calls[70].exception()) is BrokenProcessPool, kinds
        assert kinds <= {type(None), BrokenProcessPool}, kinds
        assert list(unsync.map(work, range(60))) == list(range(1, 61))
        assert sorted(unsync.map(work, range(60), in_order=False)) == list(range(1, 61))
        # What nobody waits for does not keep the program from its end.
        unsync.calls(work, range(60), chunksize=1)
        stream = unsync.map(work, iter(int, 1))
"""


@pytest.mark.parametrize("start", sorted({*multiprocessing.get_all_start_methods()} - {"fork"}))
def test_a_worker_that_is_killed_is_told_to_each_call_and_made_up_for(
    run_python: Run, start: str
) -> None:
    run = run_python(KILLING.replace("START", repr(start)))
    assert (run.returncode, run.stderr) == (0, "")


def test_the_failure_of_a_chunk_has_no_frame_of_ours() -> None:
    class Failing(concurrent.futures.Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            try:
                self.fail()
            except ValueError as exc:
                future.set_exception(exc)
            return future

        def fail(self) -> None:
            raise ValueError("no chunk today")

    for call in unsync.calls(unsync(str, executor=Failing()), range(4), chunksize=2):
        failure = call.exception(PATIENCE)
        assert failure is not None
        frames = traceback.extract_tb(failure.__traceback__)
        assert frames[-1].name == "fail"
        assert not [each for each in frames if each.filename == fan_out.__file__]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_nothing_waits_for_ever_in_a_fork(run_python: Run) -> None:
    run = run_python(
        """
        import concurrent.futures
        import os
        import threading
        from unsync import unsync

        executor = concurrent.futures.ThreadPoolExecutor(1)
        gate = threading.Event()
        wait = unsync(gate.wait, executor=executor)
        calls = unsync.calls(wait, [20] * 4, chunksize=2)
        streams = [unsync.map(wait, [20] * 4, in_order=in_order) for in_order in (True, False)]
        pid = os.fork()
        if pid == 0:
            told = 0
            for look in (calls[3].result, streams[0].__next__, streams[1].__next__):
                try:
                    look()
                except RuntimeError as exc:
                    told += "forked" in str(exc)
            os._exit(told)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        gate.set()
        assert all(call.result() for call in calls)
        assert [*streams[0], *streams[1]] == [True] * 8
        """,
        "-W",
        "ignore:This process:DeprecationWarning",
    )
    assert (run.returncode, run.stderr) == (0, "")


# What is refused.


@unsync
def values(count: int) -> Iterator[int]:
    yield from range(count)


@unsync
@contextlib.asynccontextmanager
async def manager(x: int) -> AsyncIterator[int]:
    yield x


@pytest.mark.parametrize("method", [unsync.calls, unsync.map])
def test_what_makes_no_sense_is_refused(method: Callable[..., object]) -> None:
    name = method.__name__
    for function in (plain, functools.partial(plain, 1), Scale(1), 3):
        with pytest.raises(TypeError, match=rf"unsync.{name}\(\) takes a function marked with"):
            method(function, [1])
    with pytest.raises(TypeError, match="but those of values give a Stream"):
        method(values, [1])
    with pytest.raises(TypeError, match="but those of manager give an AmbientContextManager"):
        method(manager, [1])
    with pytest.raises(TypeError, match="needs at least one iterable"):
        method(in_loop)
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        method(in_loop, 3)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"chunksize must be at least 1, not {bad}"):
            method(in_loop, [1], chunksize=bad)
    with pytest.raises(TypeError, match="chunksize must be a number of calls, or None, not 'a'"):
        method(in_loop, [1], chunksize="a")


def test_a_read_ahead_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="read_ahead must be at least 1, not 0"):
        unsync.map(in_loop, [1], read_ahead=0)
    with pytest.raises(TypeError, match="read_ahead must be a number of values, not 'a'"):
        unsync.map(in_loop, [1], read_ahead="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read_ahead must be at least chunksize, which is 3"):
        unsync.map(in_loop, [1], read_ahead=2, chunksize=3)
