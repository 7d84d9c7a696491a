"""A Dask cluster for real: a scheduler and two workers, each started from the command line."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
from support.needs import packages
from support.waiting import PATIENCE, wait_until
from test_examples import (
    BAD,
    EXAMPLES,
    GOOD,
    census,
    check_census_on_an_engine,
    check_cluster,
    make_tree,
    python,
)

from unsync import CancelledError, Unfuture, unsync

pytestmark = [pytest.mark.once, packages("distributed")]

Run = Callable[..., "subprocess.CompletedProcess[str]"]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Cluster:
    """A scheduler, two workers of one thread each, and this process as their client.

    Each process is the only one of its command: without a nanny nobody starts a worker again.
    """

    def __init__(self, folder: Path, closing: ExitStack) -> None:
        import distributed

        self._folder = folder
        self._closing = closing
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        file = folder / "scheduler.json"
        self._start("scheduler", "--port", "0", "--no-jupyter", "--scheduler-file", str(file))
        # It may be there before all of it is written.
        wait_until(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler")
        self.address = json.loads(file.read_text())["address"]
        for _ in range(2):
            self.start_worker()
        self.client = closing.enter_context(distributed.Client(self.address, timeout=PATIENCE))
        self.client.wait_for_workers(2, timeout=PATIENCE)

    def start_worker(self) -> None:
        scratch = str(self._folder)
        worker = self._start(
            *("worker", self.address, "--nthreads", "1", "--no-nanny"),
            *("--local-directory", scratch, "--death-timeout", "600"),
        )
        self.workers[worker.pid] = worker

    def kill(self, pid: int) -> None:
        worker = self.workers.pop(pid)
        worker.kill()
        worker.wait()

    def tasks(self, name: str) -> set[str]:
        """The keys of the calls of a function that the scheduler or a worker knows."""
        everywhere = [
            self.client.run_on_scheduler(lambda dask_scheduler: [*dask_scheduler.tasks]),
            *self.client.run(lambda dask_worker: [*dask_worker.state.tasks]).values(),
        ]
        return {key for keys in everywhere for key in keys if key.startswith(name + "-")}

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = self._closing.enter_context((self._folder / f"{uuid.uuid4()}.log").open("wb"))
        # The workers find this module where pytest found it, and the same core.
        places = [str(Path(__file__).parent), *filter(None, sys.path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *command, "--host", "127.0.0.1", "--no-dashboard"],
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        self._closing.callback(process.wait)
        self._closing.callback(process.kill)
        return process


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as closing:
        yield Cluster(tmp_path_factory.mktemp("cluster"), closing)


@pytest.fixture
def dask(cluster: Cluster) -> Iterator[Any]:
    """The executor of Dask's, as Dask gives it, where the marked functions of this module run."""
    unsync.process_executor = executor = cluster.client.get_executor()
    yield executor
    unsync.process_executor = None


def plain(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


@unsync(cpu_bound=True)
def square(x: int, *, offset: int = 0) -> int:
    return x * x + offset


@unsync(cpu_bound=True)
def where() -> int:
    return os.getpid()


@unsync(cpu_bound=True)
def meet(folder: str, count: int) -> int:
    """Returns this process when so many have come."""
    Path(folder, str(os.getpid())).touch()
    wait_until(lambda: len([*Path(folder).iterdir()]) >= count, f"{count} processes")
    return os.getpid()


@unsync(cpu_bound=True)
def stamp() -> str:
    return uuid.uuid4().hex


@unsync(cpu_bound=True)
def name(*, key: str, priority: int, pure: bool) -> tuple[str, int, bool]:
    return key, priority, pure


@unsync(cpu_bound=True)
def read_variable() -> str:
    return variable.get()


class OddError(Exception):
    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.number = number


@unsync(cpu_bound=True)
def fail(number: int) -> NoReturn:
    raise OddError(f"{number} is odd", number)


@unsync(cpu_bound=True)
def give_lock() -> object:
    return threading.Lock()


@unsync(cpu_bound=True)
def look_at(unfuture: Unfuture[int]) -> tuple[int, bool]:
    return unfuture.result() + 1, unfuture.done()


@unsync(cpu_bound=True)
def hold(folder: str, number: int) -> int:
    """Begins, and ends when the folder has a file that says so."""
    Path(folder, f"begun-{number}-{os.getpid()}").touch()
    until = time.monotonic() + PATIENCE
    while not Path(folder, "release").exists() and time.monotonic() < until:
        time.sleep(0.001)
    return number


def fail_at_first(folder: str) -> int:
    """Fails the first time that it is called for a folder; then says the how manieth it is."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder, uuid.uuid4().hex).touch()
    times = len(list(Path(folder).iterdir()))
    if times == 1:
        raise OddError("try again", times)
    return times


class Shape:
    def __init__(self, side: int) -> None:
        self.side = side

    @unsync(cpu_bound=True)
    def area(self, height: int) -> int:
        return self.side * height


def begun(folder: Path) -> dict[int, list[int]]:
    """Which of `hold`'s calls have begun, and in which processes."""
    found: dict[int, list[int]] = {}
    for path in folder.glob("begun-*"):
        _, number, pid = path.name.split("-")
        found.setdefault(int(number), []).append(int(pid))
    return found


# What comes back.


@pytest.mark.usefixtures("dask")
def test_it_runs_in_the_workers(cluster: Cluster, tmp_path: Path) -> None:
    # One worker could be quick enough to take all of them, if they did not wait for both.
    calls = [meet(str(tmp_path), 2) for _ in range(8)]
    assert {call.result(PATIENCE) for call in calls} == cluster.workers.keys()


def test_the_option_executor_takes_it_too(cluster: Cluster) -> None:
    marked = unsync(plain, executor=cluster.client.get_executor())
    result, pid = marked(3).result(PATIENCE)
    assert result == 9
    assert pid in cluster.workers


@pytest.mark.usefixtures("dask")
def test_methods_and_builtins() -> None:
    assert Shape(3).area(4).result(PATIENCE) == 12
    assert unsync(pow, cpu_bound=True)(2, 10).result(PATIENCE) == 1024


@pytest.mark.usefixtures("dask")
def test_many_calls_each_with_its_own_outcome() -> None:
    before = unsync.stats().executors
    calls = [square(number, offset=1) for number in range(300)]
    assert [call.result(PATIENCE) for call in calls] == [n * n + 1 for n in range(300)]
    assert unsync.stats().executors.started - before.started == 300


@pytest.mark.usefixtures("dask")
def test_each_call_is_a_call_of_its_own_though_they_are_equal() -> None:
    calls = [stamp() for _ in range(10)]
    assert len({call.result(PATIENCE) for call in calls}) == 10


@pytest.mark.usefixtures("dask")
def test_arguments_may_have_the_names_of_dask_s_own_options() -> None:
    called = name(key="a", priority=1, pure=True)
    assert called.result(PATIENCE) == ("a", 1, True)


@pytest.mark.usefixtures("dask")
def test_context_variables_stay_behind() -> None:
    token = variable.set("set")
    try:
        assert read_variable().result(PATIENCE) == "unset"
    finally:
        variable.reset(token)


def test_dask_knows_a_call_by_the_name_of_its_function(dask: Any) -> None:
    square(2).result(PATIENCE)
    keys = dask._client.run_on_scheduler(lambda dask_scheduler: [*dask_scheduler.task_prefixes])
    assert "square" in keys
    assert not [key for key in keys if "ContextCall" in key]


@pytest.mark.usefixtures("dask")
def test_an_exception_comes_back_with_type_message_and_attributes() -> None:
    exc = fail(3).exception(PATIENCE)
    assert type(exc) is OddError
    assert exc.args == ("3 is odd", 3)
    assert exc.number == 3


@pytest.mark.usefixtures("dask")
def test_what_cannot_travel_fails_for_its_caller_alone() -> None:
    others = [square(number) for number in range(5)]
    with pytest.raises(TypeError, match=r"Could not serialize .*square"):
        square(threading.Lock()).result(PATIENCE)  # type: ignore[arg-type]
    with pytest.raises(pickle.PicklingError, match="the result of give_lock, of type lock, cannot"):
        give_lock().result(PATIENCE)
    others += [square(number) for number in range(5, 10)]
    assert [other.result(PATIENCE) for other in others] == [n * n for n in range(10)]


@pytest.mark.usefixtures("dask")
def test_await_and_gather() -> None:
    async def main() -> list[int]:
        with pytest.raises(OddError, match="5 is odd"):
            await fail(5)
        return [await square(2), *await asyncio.gather(square(3), square(4))]

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == [4, 9, 16]


@pytest.mark.usefixtures("dask")
def test_it_goes_on_here_and_there() -> None:
    here = where().then(lambda unfuture: (unfuture.result(), os.getpid()))
    worker, pid = here.result(PATIENCE)
    assert worker != pid == os.getpid()
    assert square(2).map(square).map(square).result(PATIENCE) == 256
    assert square(5).then(look_at).result(PATIENCE) == (26, True)


# Cancelling, and workers that die.


@pytest.mark.usefixtures("dask")
def test_what_has_not_begun_never_runs_once_a_cancel_has_got_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    calls = [hold(str(tmp_path), number) for number in range(8)]
    wait_until(lambda: len(begun(tmp_path)) == 2, "a call in each worker")
    wait_until(lambda: len(cluster.tasks("hold")) == 8, "the calls at the scheduler")
    cancelled = [number for number in range(8) if number not in begun(tmp_path)][-3:]
    for number in cancelled:
        assert calls[number].cancel()
        with pytest.raises(CancelledError):
            calls[number].result(PATIENCE)
    wait_until(lambda: len(cluster.tasks("hold")) == 5, "the news of it in the workers")
    (tmp_path / "release").touch()
    kept = [number for number in range(8) if number not in cancelled]
    assert [calls[number].result(PATIENCE) for number in kept] == kept
    assert sorted(begun(tmp_path)) == kept


@pytest.mark.usefixtures("dask")
def test_cancelling_one_leaves_its_equals_alone(tmp_path: Path) -> None:
    calls = [hold(str(tmp_path), 1) for _ in range(4)]
    assert calls[2].cancel()
    (tmp_path / "release").touch()
    assert [call.result(PATIENCE) for call in calls if call is not calls[2]] == [1, 1, 1]


@pytest.mark.usefixtures("dask")
def test_a_timeout_holds_while_the_function_runs(tmp_path: Path) -> None:
    async def main() -> None:
        call = hold(str(tmp_path), 0)
        await unsync(wait_until)(lambda: begun(tmp_path), "the call")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.01)
        assert call.cancelled()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    (tmp_path / "release").touch()
    assert square(3).result(PATIENCE) == 9


@pytest.mark.usefixtures("dask")
def test_what_runs_can_be_cancelled_but_runs_on(tmp_path: Path) -> None:
    call = hold(str(tmp_path), 0)
    wait_until(lambda: begun(tmp_path), "the call")
    assert call.cancel()
    with pytest.raises(CancelledError):
        call.result(PATIENCE)
    (tmp_path / "release").touch()
    assert square(3).result(PATIENCE) == 9


def test_dask_tries_again_if_it_is_told_to(cluster: Cluster, tmp_path: Path) -> None:
    marked = unsync(fail_at_first, executor=cluster.client.get_executor(retries=2))
    assert marked(str(tmp_path)).result(PATIENCE) == 2
    marked = unsync(fail_at_first, executor=cluster.client.get_executor())
    with pytest.raises(OddError, match="try again"):
        marked(str(tmp_path / "other")).result(PATIENCE)


def test_scattered_data_arrives_as_the_argument(cluster: Cluster) -> None:
    marked = unsync(sum, executor=cluster.client.get_executor(pure=False))
    (numbers,) = cluster.client.scatter([[1, 2, 3]])
    assert [call.result(PATIENCE) for call in [marked(numbers), marked(numbers)]] == [6, 6]


@pytest.mark.usefixtures("dask")
def test_every_result_comes_though_a_worker_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    calls = [hold(str(tmp_path), number) for number in range(8)]
    wait_until(lambda: len(begun(tmp_path)) == 2, "a call in each worker")
    number, (victim,) = begun(tmp_path).popitem()
    cluster.kill(victim)
    (tmp_path / "release").touch()
    assert [call.result(PATIENCE) for call in calls] == list(range(8))
    # This is why functions must bear to be run twice.
    assert len(begun(tmp_path)[number]) == 2
    cluster.start_worker()


# Programs.

PROGRAM = """
    import json
    import os
    from dataclasses import dataclass

    import distributed
    from unsync import unsync


    @dataclass
    class Row:
        name: str
        pid: int


    def make_row(name):
        return Row(name, os.getpid())


    @unsync(cpu_bound=True)
    def function(name):
        return make_row(name)


    @unsync(cpu_bound=True)
    def count_down(number):
        return number and count_down.__wrapped__(number - 1)


    @unsync(cpu_bound=True)
    def greet(row):
        return f"hello {row.name}"


    def main():
        with distributed.Client(os.environ["ADDRESS"]) as client:
            unsync.process_executor = client.get_executor()
            row = function("a").result(60)
            assert type(row) is Row
            print(json.dumps([row.name, row.pid != os.getpid(), greet(row).result(60)]))
            # A marked function, and a lambda, go along.
            assert count_down(3).result(60) == 0
            by_value = unsync(lambda: function.__wrapped__("b").name, cpu_bound=True)
            assert by_value().result(60) == "b"


    if __name__ == "__main__":
        main()
"""


def test_what_the_program_itself_defines_is_sent_along(cluster: Cluster, run_python: Run) -> None:
    done = run_python(PROGRAM, env={"ADDRESS": cluster.address})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == ["a", True, "hello a"]


def test_the_census_runs_there(cluster: Cluster, tmp_path: Path) -> None:
    tree, database = make_tree(tmp_path / "tree", {**GOOD, **BAD}), tmp_path / "rows.sqlite3"
    engine = f"dask={cluster.address}"
    done = census(tree, "--engine", engine, "--database", database, cwd=tmp_path)
    check_census_on_an_engine(done, database, tree)


def test_the_example_runs_there(cluster: Cluster, tmp_path: Path) -> None:
    done = python(EXAMPLES / "cluster.py", cluster.address, cwd=tmp_path)
    check_cluster(done, "others")
