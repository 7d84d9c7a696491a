"""Signal handlers and finalizers that make calls at any point of our own code, and wait for them.

A trace function of the main thread acts as the handler: it strikes at one of the steps that the
interpreter makes in the package's files, a further one each time. What it calls wants to get at
what the main thread was about to change: the Unfuture that it registers on is finished by the
ambient loop just then, or the pool that it submits to has to run another job.

Programs must not do so from trace functions; as an instrument they are exact. The compiled core has
no such steps: there only the modules around it are struck.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dis
import functools
import gc
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from support.under_test import FOLDER
from support.waiting import PATIENCE, wait_until

from unsync import ACCELERATED, Unfuture, unsync
from unsync.executors import ThreadExecutor
from unsync.streams import Stream

pytestmark = pytest.mark.alone  # there is one main thread

CORE = "unsync._core" if ACCELERATED else "unsync._core_py"

# So many steps of a case are struck at most, spread over all that it makes.
STRIKES = 100

# Which stands where a `try` begins, in no reach of its outer one; nothing can strike there.
NOP = dis.opmap["NOP"]

FILES = frozenset(str(path) for path in Path(FOLDER).glob("*.py"))
OF_STREAMS = frozenset(str(Path(FOLDER, name)) for name in ("fan_out.py", "streams.py"))
# And those of wait() and as_completed().
WITH_FUTURES = FILES | {str(concurrent.futures._base.__file__)}


class Striker:
    """Calls `strike` once, at the step of that number; counts all steps that were made."""

    def __init__(
        self,
        step: int,
        strike: Callable[[], object],
        but_in: frozenset[str] = frozenset(),
        files: frozenset[str] = FILES,
        by_signals: bool = False,
    ) -> None:
        self.step = step
        self.strike = strike
        self.but_in = but_in  # the names of functions that it leaves alone
        self.files = files
        self.by_signals = by_signals  # whether it leaves out where no signal is looked for
        self.count = 0

    def __enter__(self) -> Striker:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if code.co_filename not in self.files or code.co_name in self.but_in:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode" and code.co_code[frame.f_lasti] != NOP:
            if self.by_signals and frame.f_lasti not in where_signals_come(code):
                return self.trace
            self.count += 1
            if self.count == self.step:
                self.strike()  # in which nothing is traced, since a trace function runs
        return self.trace


@functools.cache
def where_signals_come(code: CodeType) -> frozenset[int]:
    """Where the interpreter has just looked for them: after a call, and at the top of a loop."""
    offsets: set[int] = set()
    after_a_call = False
    for each in dis.get_instructions(code):
        if after_a_call:
            offsets.add(each.offset)
        after_a_call = each.opname == "RESUME" or each.opname.startswith("CALL")
        if each.opname.startswith("JUMP_BACKWARD") and "NO_INTERRUPT" not in each.opname:
            offsets.add(each.argval)
    return frozenset(offsets)


class Case:
    """What the main thread is at, and what others want of it meanwhile."""

    def __init__(self) -> None:
        self.executor = ThreadExecutor(1)
        self.function = unsync(self.finish_by_worker, executor=self.executor)
        self.coroutine = unsync(self.finish_by_loop)
        # What the loop finishes when it is struck, and what a worker does.
        self.by_loop: Unfuture[str] = Unfuture()
        self.by_worker: Unfuture[str] = Unfuture()

    async def finish_by_loop(self) -> str:
        finish(self.by_loop)
        # What the main thread has woken, a producer of a stream say, has its turn.
        for _ in range(5):
            await asyncio.sleep(0)
        return "coroutine"

    def finish_by_worker(self) -> str:
        finish(self.by_worker)
        return "function"

    def strike(self) -> None:
        assert self.coroutine().result(PATIENCE) == "coroutine"
        assert self.function().result(PATIENCE) == "function"

    def close(self) -> None:
        self.executor.shutdown(wait=False)
        assert self.executor.join(PATIENCE)


def finish(unfuture: Unfuture[str]) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):
        unfuture.set_result("struck")


@pytest.fixture
def case() -> Iterator[Case]:
    case = Case()
    case.strike()  # all threads are there
    yield case
    case.close()


def strike_everywhere(
    case: Case,
    act: Callable[[], object],
    strikes: int = STRIKES,
    files: frozenset[str] = FILES,
) -> None:
    """Does it again and again, struck at one step after the other."""
    if sys.implementation.name != "cpython":
        pytest.skip("its trace functions are not called for each step")
    assert threading.current_thread() is threading.main_thread()

    def attempt(step: int) -> int:
        case.by_loop, case.by_worker = Unfuture(), Unfuture()
        with Striker(step, case.strike, files=files) as striker:
            act()
        return striker.count

    steps = max(attempt(-1) for _ in range(3))
    for step in strides(steps, strikes):
        attempt(step)
    case.strike()  # nothing is left that keeps it from that


def interrupt_everywhere(
    attempt: Callable[[Striker], object], files: frozenset[str] = FILES
) -> None:
    """Makes the attempt again and again; what it does within the striker meets a Ctrl-C.

    At one step after the other.
    """
    if sys.implementation.name != "cpython":
        pytest.skip("its trace functions are not called for each step")

    def strike() -> None:
        raise KeyboardInterrupt

    def steps_of(step: int) -> int:
        # What a finalizer raises is only reported.
        striker = Striker(step, strike, frozenset({"__del__"}), files)
        attempt(striker)
        return striker.count

    with without_collections():
        for step in range(1, steps_of(-1) + 1):
            steps_of(step)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """One would have finalizers of what other tests left, or former attempts, be struck."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def strides(steps: int, strikes: int) -> list[int]:
    """Which of so many steps to strike at: the second half of them between the first.

    So that a failure shows soon.
    """
    stride = max(1, steps // strikes)
    return [*range(1, steps + 1, 2 * stride), *range(1 + stride, steps + 1, 2 * stride)]


def test_a_worker_that_is_held_up_as_it_waits_is_not_taken_for_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another one, which waits for it, looks meanwhile whether there is any hope."""
    if sys.implementation.name != "cpython":
        pytest.skip("its trace functions are not called for each step")
    monkeypatch.setattr(f"{CORE}.LOOK_AGAIN_SECONDS", 0.001)
    executor = ThreadExecutor(1)

    @unsync(executor=executor)
    def inner() -> str:
        return "inner"

    @unsync(executor=executor)
    def held_up(step: int) -> int:
        call = inner()
        # Ten looks long. If the other one is too slow for them, the test sees less.
        with Striker(step, lambda: time.sleep(0.01)) as striker:
            assert call.result() == "inner"
        return striker.count

    @unsync(executor=executor)
    def outer(step: int) -> int:
        return held_up(step).result()

    steps = outer(-1).result(PATIENCE)
    for step in strides(steps, STRIKES):
        outer(step).result(PATIENCE)
    executor.shutdown()


def test_a_call_of_a_function(case: Case) -> None:
    strike_everywhere(case, lambda: case.function().result(PATIENCE))


def test_calls_of_functions_that_nobody_waits_for(case: Case) -> None:
    def act() -> None:
        for _ in range(3):
            case.function()

    strike_everywhere(case, act)


def test_a_call_of_a_coroutine_function(case: Case) -> None:
    strike_everywhere(case, lambda: case.coroutine().result(PATIENCE))


def test_a_call_that_has_a_thread_started() -> None:
    """The one thread that the pool may have."""
    cases: list[Case] = []
    try:
        case = Case()
        cases.append(case)

        def act() -> None:
            case.function().result(PATIENCE)

        def strike() -> None:
            assert case.coroutine().result(PATIENCE) == "coroutine"
            if not ACCELERATED:
                assert case.function().result(PATIENCE) == "function"

        with Striker(-1, strike) as striker:
            act()
        for step in range(1, striker.count + 1, max(1, striker.count // STRIKES)):
            case = Case()
            cases.append(case)
            with Striker(step, strike):
                act()
            case.close()
    finally:
        for case in cases:
            case.close()


def test_a_call_where_there_is_bounded_room() -> None:
    case = Case()
    case.executor = ThreadExecutor(1, max_queued=4, when_full="wait")
    case.function = unsync(case.finish_by_worker, executor=case.executor)
    try:
        case.strike()
        strike_everywhere(case, lambda: case.function().result(PATIENCE))
    finally:
        case.close()


@pytest.mark.parametrize("by", ["the loop", "a worker"])
def test_callbacks_come_and_go(case: Case, by: str) -> None:
    def act() -> None:
        called: list[Unfuture[str]] = []
        unfuture = case.by_loop if by == "the loop" else case.by_worker
        unfuture.add_done_callback(called.append)
        unfuture.add_done_callback(print)
        unfuture.remove_done_callback(print)
        finish(unfuture)
        assert called == [unfuture]

    strike_everywhere(case, act)


@pytest.mark.parametrize("by", ["the loop", "a worker"])
def test_a_continuation(case: Case, by: str) -> None:
    def act() -> None:
        unfuture = case.by_loop if by == "the loop" else case.by_worker
        continued = unfuture.then(Unfuture.result).map(str.upper)
        finish(unfuture)
        assert continued.result(PATIENCE) == "STRUCK"

    strike_everywhere(case, act)


@pytest.mark.parametrize("by", ["the loop", "a worker"])
def test_waits_that_end_or_do_not(case: Case, by: str) -> None:
    def act() -> None:
        unfuture = case.by_loop if by == "the loop" else case.by_worker
        with contextlib.suppress(TimeoutError):
            unfuture.result(0)
        finish(unfuture)
        assert unfuture.result(PATIENCE) == "struck"

    strike_everywhere(case, act)


@pytest.mark.parametrize("by", ["the loop", "a worker"])
def test_an_outcome_that_is_set(case: Case, by: str) -> None:
    """By both: the one who comes second hears of it."""

    def act() -> None:
        unfuture = case.by_loop if by == "the loop" else case.by_worker
        called: list[object] = []
        unfuture.add_done_callback(called.append)
        follower = Unfuture(unfuture)
        waiting = waits(unfuture)
        try:
            unfuture.set_result("struck")
        except asyncio.InvalidStateError:
            assert unfuture.done()
        assert unfuture.result() == follower.result(PATIENCE) == "struck"
        assert waiting.result(PATIENCE) == "struck"
        assert called == [unfuture]

    strike_everywhere(case, act)


@unsync
async def waits(unfuture: Unfuture[str]) -> str:
    return await unfuture


@unsync
async def waits_for_ever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("by", ["the loop", "a worker"])
def test_cancels(case: Case, by: str) -> None:
    def act() -> None:
        unfuture = case.by_loop if by == "the loop" else case.by_worker
        follower = Unfuture(unfuture)
        is_ours = follower.cancel()
        assert is_ours is unfuture.cancelled() is follower.cancelled()
        coroutine = waits_for_ever()
        coroutine.cancel()
        with pytest.raises(asyncio.CancelledError):
            coroutine.result(PATIENCE)
        case.function().cancel()

    strike_everywhere(case, act)


def wait_for_all(unfutures: list[Any], timeout: float) -> set[Any]:
    return concurrent.futures.wait(unfutures, timeout).done


def as_they_come(unfutures: list[Any], timeout: float) -> set[Any]:
    came: set[Any] = set()
    with contextlib.suppress(TimeoutError):
        came.update(concurrent.futures.as_completed(unfutures, timeout))
    return came


@pytest.mark.parametrize("wait", [wait_for_all, as_they_come])
def test_a_handler_that_waits_while_concurrent_futures_enlists(
    case: Case, wait: Callable[[list[Any], float], set[Any]]
) -> None:
    """What it waits for finishes what is waited for in the step that it has interrupted."""

    def act() -> None:
        case.coroutine()
        case.function()
        unfutures = [case.by_loop, case.by_worker]
        assert wait(unfutures, PATIENCE) == set(unfutures)

    strike_everywhere(case, act, 3 * STRIKES, WITH_FUTURES)


@pytest.mark.parametrize("wait", [wait_for_all, as_they_come])
def test_a_ctrl_c_in_a_wait_of_concurrent_futures_holds_up_nobody(
    wait: Callable[[list[Any], float], set[Any]],
) -> None:
    """It may have taken the conditions of some, and not come to let go of them."""

    def attempt(striker: Striker) -> None:
        unfutures: list[Unfuture[int]] = [Unfuture(), Unfuture()]
        with striker, contextlib.suppress(KeyboardInterrupt):
            wait(unfutures, 0)
        for each in unfutures:
            threads.submit(each.set_result, 1).result(PATIENCE)
        assert wait(unfutures, PATIENCE) == set(unfutures)

    with ThreadPoolExecutor(1) as threads:
        interrupt_everywhere(attempt, WITH_FUTURES)


def test_many_calls_in_one(case: Case) -> None:
    def act() -> None:
        twice = unsync(double, executor=case.executor)
        assert [call.result(PATIENCE) for call in unsync.calls(twice, range(4))] == [0, 2, 4, 6]

    strike_everywhere(case, act)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("what", ["functions", "coroutines"])
def test_a_stream_of_results(case: Case, what: str, in_order: bool) -> None:
    marked = unsync(double, executor=case.executor) if what == "functions" else unsync(redouble)

    def act() -> None:
        found = list(unsync.map(marked, range(4), in_order=in_order, read_ahead=2))
        assert sorted(found) == [0, 2, 4, 6]

    strike_everywhere(case, act, 60)


def double(number: int) -> int:
    return 2 * number


async def redouble(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def test_a_stream_of_a_generator_function(case: Case) -> None:
    """It runs in the one thread that the pool has."""

    def body() -> Iterator[int]:
        yield from range(4)

    numbers = unsync(executor=case.executor, read_ahead=2)(body)

    def act() -> None:
        assert list(numbers()) == [0, 1, 2, 3]

    strike_everywhere(case, act, 60)


def test_a_stream_of_an_async_generator_function(case: Case) -> None:
    @unsync(read_ahead=2)
    async def numbers() -> AsyncIterator[int]:
        for number in range(4):
            yield number

    def act() -> None:
        assert list(numbers()) == [0, 1, 2, 3]
        with numbers() as stream:
            assert next(stream) == 0

    strike_everywhere(case, act, 60)


STREAMS = ["function", "coroutine", "map", "map, as completed"]


def stream_of(what: str, case: Case) -> Stream[int]:
    """The numbers up to eight, in some order."""
    if what == "function":
        return unsync(executor=case.executor, read_ahead=4)(body)()
    if what == "coroutine":
        return unsync(read_ahead=4)(async_body)()
    return unsync.map(unsync(redouble), range(8), read_ahead=4, in_order=what == "map")


def body() -> Iterator[int]:
    yield from range(0, 16, 2)


async def async_body() -> AsyncIterator[int]:
    for number in body():
        yield number


@pytest.mark.parametrize("what", STREAMS)
def test_a_stream_that_the_ambient_loop_reads_too(case: Case, what: str) -> None:
    """Its consumer there must not hold up the loop, which has the handler's call to run."""
    stream = stream_of(what, case)
    by_loop: list[int] = []
    readers: list[asyncio.Task[None]] = []

    async def read_one() -> None:
        with contextlib.suppress(StopAsyncIteration):
            by_loop.append(await anext(stream))

    async def finish_by_loop() -> str:
        readers.append(asyncio.ensure_future(read_one()))
        for _ in range(5):
            await asyncio.sleep(0)
        return "coroutine"

    case.coroutine = unsync(finish_by_loop)

    def act() -> None:
        nonlocal stream
        by_loop.clear()
        stream = stream_of(what, case)
        found = list(stream)
        wait_until(lambda: all(reader.done() for reader in readers))
        assert sorted(found + by_loop) == list(range(0, 16, 2))

    strike_everywhere(case, act, 60)


@pytest.mark.parametrize("what", STREAMS)
def test_what_a_handler_raises_costs_a_stream_one_value_at_most(case: Case, what: str) -> None:
    """The one that was about to be returned. What comes after it is there, in order.

    Unless it was raised where a job is sent, or a call is made: then that has failed with it. What
    is raised in a callback is logged and goes no further, so these are left alone.
    """
    if sys.implementation.name != "cpython":
        pytest.skip("its trace functions are not called for each step")

    but_in = frozenset({"__del__", "arrive", "end"})

    def strike() -> None:
        raise TimeoutError

    def attempt(step: int) -> int:
        stream = stream_of(what, case)
        found: list[int] = []
        striker = Striker(step, strike, but_in, OF_STREAMS, by_signals=True)
        with striker, contextlib.suppress(TimeoutError):
            while (value := next(stream, None)) is not None:
                found.append(value)
        found += stream
        assert len(set(found)) == len(found), (step, found)
        if what != "map, as completed":
            assert found == sorted(found), (step, found)
            assert max(found, default=0) <= 2 * len(found), (step, found)
        return striker.count

    with without_collections():
        steps = max(attempt(-1) for _ in range(3))
        for step in range(1, steps + 1):
            attempt(step)


def test_counts(case: Case) -> None:
    def act() -> None:
        case.function().result(PATIENCE)
        assert unsync.stats().threads.started > 0
        executor = ThreadExecutor(1)
        executor.shutdown()

    strike_everywhere(case, act)


def test_a_ctrl_c_while_it_is_made_done_leaves_nobody_waiting() -> None:
    """Either it is pending yet, or all have heard."""

    def attempt(striker: Striker) -> None:
        unfuture: Unfuture[int] = Unfuture()
        follower = Unfuture(Unfuture(unfuture))
        last = follower.map(str)
        with striker, contextlib.suppress(KeyboardInterrupt):
            unfuture.set_result(1)
        if not unfuture.done():
            unfuture.set_result(1)
        assert follower.done(), striker.step
        with contextlib.suppress(KeyboardInterrupt):  # if it kept a call from the ambient loop
            assert last.result(PATIENCE) == "1", striker.step

    interrupt_everywhere(attempt)


def test_a_ctrl_c_in_map_keeps_nobody_else_from_the_loop(case: Case) -> None:
    """Another thread's call counts on the wakeup that the interrupted one was about to send."""
    finished = Unfuture.from_value(1)

    def attempt(striker: Striker) -> None:
        settled = threading.Event()
        unsync.loop.call_soon_threadsafe(settled.set)
        assert settled.wait(PATIENCE)  # what was left for the loop before has been picked up
        with striker, contextlib.suppress(KeyboardInterrupt):
            finished.map(str)
        other = threads.submit(lambda: case.coroutine().result(PATIENCE))
        assert other.result(2 * PATIENCE) == "coroutine", striker.step

    with ThreadPoolExecutor(1) as threads:
        interrupt_everywhere(attempt)


# Where CPython may overlook an `except`, a `finally` or a `with`, and it does no harm.
HARMLESS = {
    # No signal handler runs in these threads.
    "_AmbientLoop._run",
    "_Followed.__call__",
    "_InAmbientLoop.wait_for_room",
    "_InAmbientLoop.work",
    # They only drop references, or catch what attributes raise.
    "_Chunk.__call__",
    "name_of",
}


def test_no_loop_jumps_back_out_of_a_try() -> None:
    """A Ctrl-C at the end of a loop must not pass by what has to be done after it.

    See `_fire_all` and python/cpython#130279.
    """
    if sys.implementation.name != "cpython":
        pytest.skip("it is about the tables of CPython's compiler")
    found = {
        code.co_qualname: line
        for path in FILES
        for code in all_code(compile(Path(path).read_text(), path, "exec"))
        for line in jumps_out_of_a_try(code)
    }
    assert {name: line for name, line in found.items() if name not in HARMLESS} == {}


def all_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from all_code(const)


def jumps_out_of_a_try(code: CodeType) -> Iterator[int]:
    """The lines of the jumps back that stand between two parts of a `try`, and belong to none."""
    instructions = {each.offset: each for each in dis.get_instructions(code)}
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def targets(offset: int) -> set[int]:
        return {entry.target for entry in entries if entry.start <= offset < entry.end}

    def is_handler(target: int) -> bool:
        """And not only the end of a comprehension within one, say."""
        if instructions[target].opname == "PUSH_EXC_INFO":
            return True
        return any(is_handler(outer) for outer in targets(target) if outer > target)

    for offset, each in instructions.items():
        if each.opname != "JUMP_BACKWARD" or targets(offset):
            continue
        before = {entry.target for entry in entries if entry.end <= offset}
        after = {entry.target for entry in entries if entry.start > offset}
        line = each.positions.lineno if each.positions else None
        # What has no line is the end of an `await` that was interrupted.
        if line is not None and any(is_handler(target) for target in before & after):
            yield line


@pytest.mark.skipif(sys.platform == "win32", reason="no setitimer")
def test_a_signal_handler_calls_and_waits(run_python: Any) -> None:
    """During calls of all kinds, two thousand times a second."""
    run = run_python(
        """
        import asyncio, signal, time
        from unsync import Unfuture, unsync
        from unsync.executors import ThreadExecutor

        pool = ThreadExecutor(1)
        counts = {"handled": 0}
        handling = []

        @unsync(executor=pool)
        def function(number):
            return number

        @unsync
        async def coroutine(number):
            await asyncio.sleep(0)
            return number

        def handle(*_):
            if handling:
                return  # it struck in its own midst
            handling.append(None)
            counts["handled"] += 1
            assert coroutine(1).result(60) == 1
            assert function(2).result(60) == 2
            handling.clear()

        async def numbers():
            for number in range(3):
                yield number

        handle()
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        until = time.monotonic() + 2
        rounds = 0
        while time.monotonic() < until:
            rounds += 1
            assert function(rounds).map(str).result(60) == str(rounds)
            assert coroutine(rounds).then(Unfuture.result).result(60) == rounds
            assert list(unsync(numbers)()) == [0, 1, 2]
            assert [call.result(60) for call in unsync.calls(function, range(3))] == [0, 1, 2]
            assert list(unsync.map(coroutine, range(3))) == [0, 1, 2]
        signal.setitimer(signal.ITIMER_REAL, 0)
        pool.shutdown()  # a worker counts a call after its caller has heard of it
        work = unsync.stats().threads
        assert work.pending == 0 and work.failed == 0, work
        assert work.finished == counts["handled"] + 4 * rounds, (work, counts, rounds)
        assert counts["handled"] > 100 or rounds < 20, counts
        print("done")
        """
    )
    assert (run.stdout, run.stderr, run.returncode) == ("done\n", "", 0)
