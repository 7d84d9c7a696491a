"""One behaviour on whatever runs the functions: each test is run on every kind of executor.

Where an engine cannot do what the others do, the test says so, and so does docs/guide.md.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import CancelledError, Unfuture, unsync
from unsync.executors import ThreadExecutor

HERE = Path(__file__).parent
WORKERS = 2
UNDER_MPIEXEC = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ


class Engine(NamedTuple):
    executor: concurrent.futures.Executor
    is_elsewhere: bool
    """Whether its functions run in another process or interpreter."""


def processes(method: str) -> concurrent.futures.Executor:
    return ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context(method))


def interpreters() -> concurrent.futures.Executor:
    if not hasattr(concurrent.futures, "InterpreterPoolExecutor"):
        pytest.skip("interpreter pools came with Python 3.14")
    # They find what is installed, but not the tests and what these import.
    places = [str(HERE), str(HERE.parent)]
    return concurrent.futures.InterpreterPoolExecutor(
        WORKERS, initializer=exec, initargs=(f"import sys; sys.path += {places}",)
    )


def loky() -> concurrent.futures.Executor:
    return pytest.importorskip("loky").get_reusable_executor(WORKERS)


def mpi() -> concurrent.futures.Executor:
    if not UNDER_MPIEXEC:
        pytest.skip("it is run by test_all_of_this_holds_under_mpiexec")
    return pytest.importorskip("mpi4py.futures").MPIPoolExecutor(WORKERS)


ENGINES: dict[str, tuple[Callable[[], concurrent.futures.Executor], bool]] = {
    "ThreadExecutor": (lambda: ThreadExecutor(WORKERS), False),
    "ThreadPoolExecutor": (lambda: ThreadPoolExecutor(WORKERS), False),
    **{m: (lambda m=m: processes(m), True) for m in multiprocessing.get_all_start_methods()},  # type: ignore[misc]
    "loky": (loky, True),
    "InterpreterPoolExecutor": (interpreters, True),
    "MPIPoolExecutor": (mpi, True),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    make, is_elsewhere = ENGINES[request.param]
    executor = make()
    # A fork pool starts all its workers with the first submission, and a fork inherits the context
    # of the thread that makes it: which test that is depends on the order of the tests.
    contextvars.Context().run(executor.submit, square, 1).result(PATIENCE)
    yield Engine(executor, is_elsewhere)
    executor.shutdown()


pytestmark = [
    # Python's own word on every fork beside a thread, from 3.12 on.
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


# What is run there.


def square(x: int, *, offset: int = 0) -> int:
    return x * x + offset


def where() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


class OddError(Exception):
    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.number = number


def fail(number: int) -> NoReturn:
    raise OddError(f"{number} is odd", number)


def fail_oddly() -> NoReturn:
    raise OddError("odd", cast(int, threading.Lock()))


def give_lock() -> object:
    return threading.Lock()


def hold(begun: str, release: str) -> None:
    Path(begun).touch()
    until = time.monotonic() + PATIENCE
    while not Path(release).exists() and time.monotonic() < until:
        time.sleep(0.001)


def result_of(unfuture: Unfuture[int]) -> int:
    return -unfuture.result(0)


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")


def look() -> str:
    return variable.get()


class Multiplier:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def by(self, x: int) -> int:
        return self.factor * x

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    class Inner:
        @staticmethod
        def halve(x: int) -> int:
            return x // 2


# What comes back.


@pytest.mark.parametrize("given", ["itself", "by a callable"])
@pytest.mark.parametrize("place", ["executor=", "thread_executor", "process_executor"])
def test_it_serves_in_each_place_itself_or_given_by_a_callable(
    fresh: None, engine: Engine, place: str, given: str
) -> None:
    executor: Any = engine.executor if given == "itself" else lambda: engine.executor
    if place == "executor=":
        marked = unsync(square, executor=executor)
    else:
        marked = unsync(square, cpu_bound=place == "process_executor")
        setattr(unsync, place, executor)
    assert marked(3, offset=4).result(PATIENCE) == 13
    if place != "executor=":
        assert getattr(unsync, place) is engine.executor


def test_it_runs_elsewhere(engine: Engine) -> None:
    pid, thread = unsync(where, executor=engine.executor)().result(PATIENCE)
    assert (pid, thread) != (os.getpid(), threading.get_ident())


def test_await_and_gather(engine: Engine) -> None:
    marked = unsync(square, executor=engine.executor)

    async def main() -> list[int]:
        first = await marked(2)
        with pytest.raises(OddError, match="5 is odd"):
            await unsync(fail, executor=engine.executor)(5)
        return [first, *await asyncio.gather(marked(3), marked(4))]

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == [4, 9, 16]


def test_concurrent_futures_take_it(engine: Engine) -> None:
    calls = [unsync(square, executor=engine.executor)(x) for x in range(5)]
    assert sorted(c.result(0) for c in concurrent.futures.as_completed(calls, PATIENCE)) == [
        0,
        1,
        4,
        9,
        16,
    ]


def test_then_and_map_go_on_from_it_and_to_it(engine: Engine) -> None:
    marked = unsync(square, executor=engine.executor)
    here = marked(2).then(lambda unfuture: (unfuture.result(), os.getpid()))
    assert here.result(PATIENCE) == (4, os.getpid())
    there = marked(2).map(marked).then(unsync(result_of, executor=engine.executor))
    assert there.result(PATIENCE) == -16


def test_callbacks(engine: Engine) -> None:
    called: Unfuture[Any] = Unfuture()
    call = unsync(square, executor=engine.executor)(3)
    call.add_done_callback(called.set_result)
    assert called.result(PATIENCE) is call
    assert call.result(0) == 9


def test_an_exception_comes_back_with_type_message_and_attributes(engine: Engine) -> None:
    exc = unsync(fail, executor=engine.executor)(3).exception(PATIENCE)
    assert type(exc) is OddError
    assert (exc.args, exc.number) == (("3 is odd", 3), 3)


def test_an_exception_shows_where_it_was_raised(engine: Engine) -> None:
    exc = unsync(fail, executor=engine.executor)(3).exception(PATIENCE)
    assert exc is not None
    if engine.is_elsewhere:
        shown = f"{exc.__cause__!r}\n{exc.__cause__}"
    else:
        assert exc.__traceback__ is not None
        frames = []
        traceback = exc.__traceback__
        while traceback is not None:
            frames.append(f"in {traceback.tb_frame.f_code.co_name}")
            traceback = traceback.tb_next  # type: ignore[assignment]
        shown = "\n".join(frames)
    assert "in fail" in shown


def test_cancel_reaches_what_is_queued_and_not_what_runs(engine: Engine, tmp_path: Path) -> None:
    release = tmp_path / "release"
    marked = unsync(hold, executor=engine.executor)
    calls = [marked(str(tmp_path / f"begun{i}"), str(release)) for i in range(12)]
    wait_until((tmp_path / "begun0").exists, "the first call")
    wait_until(calls[0].running, "the first call to be known to run")
    assert calls[-1].cancel()
    assert not calls[0].cancel()
    release.touch()
    with pytest.raises(CancelledError):
        calls[-1].result(PATIENCE)
    for call in calls[:-1]:
        call.result(PATIENCE)
    unsync(square, executor=engine.executor)(1).result(PATIENCE)  # came after all of them
    assert not (tmp_path / "begun11").exists()


def test_a_timeout_holds_where_a_loop_runs(engine: Engine, tmp_path: Path) -> None:
    begun, release = tmp_path / "begun", tmp_path / "release"

    async def main() -> None:
        call = unsync(hold, executor=engine.executor)(str(begun), str(release))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.001)
        assert call.cancelled()
        release.touch()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert unsync(square, executor=engine.executor)(2).result(PATIENCE) == 4


def test_context_variables_are_seen_unless_it_is_another_process_or_interpreter(
    engine: Engine,
) -> None:
    token = variable.set("the caller's")
    try:
        seen = unsync(look, executor=engine.executor)().result(PATIENCE)
    finally:
        variable.reset(token)
    assert seen == ("nobody's" if engine.is_elsewhere else "the caller's")


# What can go there, and what cannot.


def test_methods_and_partials(engine: Engine) -> None:
    import functools

    six = Multiplier(6)
    calls = [
        unsync(six.by, executor=engine.executor)(7),
        unsync(Multiplier.name, executor=engine.executor)(),
        unsync(Multiplier.double, executor=engine.executor)(4),
        unsync(Multiplier.Inner.halve, executor=engine.executor)(4),
        unsync(functools.partial(square, offset=1), executor=engine.executor)(3),
        unsync(functools.partial(six.by, 2), executor=engine.executor)(),
    ]
    results: list[object] = [call.result(PATIENCE) for call in calls]
    assert results == [42, "Multiplier", 8, 2, 10, 12]


def test_closures_and_lambdas(engine: Engine) -> None:
    pytest.importorskip("cloudpickle")
    factor = 3

    def times(x: int) -> int:
        return x * factor + square(1)

    assert unsync(times, executor=engine.executor)(5).result(PATIENCE) == 16
    assert unsync(lambda: factor, executor=engine.executor)().result(PATIENCE) == 3
    # As arguments and results, too.
    twice = unsync(lambda f: lambda x: f(f(x)), executor=engine.executor)(times).result(PATIENCE)
    assert twice(1) == 13


def test_fan_out_in_chunks(engine: Engine) -> None:
    marked = unsync(square, executor=engine.executor)
    assert list(unsync.map(marked, range(50), chunksize=7)) == [x * x for x in range(50)]
    if engine.is_elsewhere:
        pytest.importorskip("cloudpickle")
    base = 5

    def add(x: int) -> Callable[[], int]:
        if x == 3:
            raise OddError("odd", x)
        return lambda: base + x

    calls = unsync.calls(unsync(add, executor=engine.executor), range(6), chunksize=4)
    failure = calls[3].exception(PATIENCE)
    assert isinstance(failure, OddError)
    assert failure.number == 3
    del calls[3]
    assert [call.result(PATIENCE)() for call in calls] == [5, 6, 7, 9, 10]


def test_what_cannot_travel_is_an_error_that_names_it_for_its_caller_alone(engine: Engine) -> None:
    marked: Any = unsync(square, executor=engine.executor)
    others = [marked(number) for number in range(5)]
    argument = marked(1, offset=threading.Lock())
    result = unsync(give_lock, executor=engine.executor)()
    error = unsync(fail_oddly, executor=engine.executor)()
    others += [marked(number) for number in range(5, 10)]
    if engine.is_elsewhere:
        for call, message in [
            (argument, "the argument 'offset' of square, of type lock, cannot go to another"),
            (result, "the result of give_lock, of type lock, cannot come back"),
            (error, r"fail_oddly raised OddError\('odd', <.*>\), which cannot come back"),
        ]:
            with pytest.raises(pickle.PicklingError, match=message):
                call.result(PATIENCE)
    else:
        assert type(argument.exception(PATIENCE)) is TypeError  # what `square` says to it
        assert isinstance(result.result(PATIENCE), type(threading.Lock()))
        assert type(error.exception(PATIENCE)) is OddError
    assert [other.result(PATIENCE) for other in others] == [n * n for n in range(10)]


def test_a_generator_function_runs_in_threads_alone(engine: Engine) -> None:
    def numbers() -> Generator[int, None, None]:
        yield from range(3)

    # Whether a callable gives threads is known when it is called.
    stream = unsync(numbers, executor=lambda: engine.executor)()
    if not engine.is_elsewhere:
        assert list(stream) == [0, 1, 2]
        return
    with pytest.raises(pickle.PicklingError, match=r"function .*numbers cannot run in a"):
        list(stream)
    with pytest.raises(TypeError, match="cannot run in a process"):
        unsync(numbers, executor=engine.executor)


@pytest.mark.skipif(UNDER_MPIEXEC, reason="that is this")
def test_all_of_this_holds_under_mpiexec() -> None:
    if importlib.util.find_spec("mpi4py") is None or shutil.which("mpiexec") is None:
        pytest.skip("mpi4py and mpiexec are not installed")
    pytest_here = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "MPIPoolExecutor",
        __file__,
    ]
    done = subprocess.run(
        ["mpiexec", "-n", str(WORKERS + 1), sys.executable, "-m", "mpi4py.futures", *pytest_here],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            # As who the tests run, and on how few cores, is for others to say.
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
        },
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# What a callable gave, and its owner has shut down.


def own_loky() -> concurrent.futures.Executor:
    # Not the one that all who ask for a reusable one share, with the other tests.
    executor: concurrent.futures.Executor = pytest.importorskip("loky").ProcessPoolExecutor(1)
    return executor


def end_the_process() -> None:
    os._exit(1)


# A pool of mpi4py is the whole program's.
GIVEN = {
    **{name: make for name, (make, _) in ENGINES.items() if name != "MPIPoolExecutor"},
    "loky": own_loky,
}


@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
def test_the_next_call_starts_afresh(make: Callable[[], concurrent.futures.Executor]) -> None:
    gave: list[concurrent.futures.Executor] = []

    def give() -> concurrent.futures.Executor:
        gave.append(make())
        return gave[-1]

    marked = unsync(square, executor=give)
    for number in (1, 2):
        assert [marked(x).result(PATIENCE) for x in (2, 3)] == [4, 9]
        assert len(gave) == number
        gave[-1].shutdown()


@pytest.mark.parametrize("name", ["spawn", "loky"])
def test_one_that_broke_is_not_replaced_before_its_owner_shuts_it_down(name: str) -> None:
    gave: list[concurrent.futures.Executor] = []

    def give() -> concurrent.futures.Executor:
        gave.append(GIVEN[name]())
        return gave[-1]

    unsync.process_executor = give
    try:
        marked = unsync(square, cpu_bound=True)
        with pytest.raises(concurrent.futures.BrokenExecutor):
            unsync(end_the_process, cpu_bound=True)().result(PATIENCE)
        with pytest.raises(concurrent.futures.BrokenExecutor):
            marked(3).result(PATIENCE)
        assert len(gave) == 1
        gave[0].shutdown()
        assert marked(3).result(PATIENCE) == 9
    finally:
        unsync.process_executor = None
        for executor in gave:
            executor.shutdown()
