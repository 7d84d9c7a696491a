"""What goes to another process by value, with cloudpickle; and what upstream's users reported."""

from __future__ import annotations

import functools
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.waiting import PATIENCE

from unsync import _travel, unsync

# Those that the default pool uses.
START_METHODS = sorted(set(multiprocessing.get_all_start_methods()) - {"fork"})

Run = Callable[..., "subprocess.CompletedProcess[str]"]

needs_cloudpickle = pytest.mark.skipif(
    importlib.util.find_spec("cloudpickle") is None, reason="needs cloudpickle"
)

BLOCKED = 'import sys\nsys.modules["cloudpickle"] = None\n'


def at_a_prompt(program: str, how: str) -> subprocess.CompletedProcess[str]:
    """Runs what no process that is started anew can import."""
    program = textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, *(["-c", program] if how == "-c" else ["-"])],
        input=program if how == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        env=os.environ | {"PYTHONPATH": str(Path(_travel.__file__).parent.parent)},
    )


TYPED = """
import functools
import multiprocessing
import os

from unsync import executors, unsync

multiprocessing.set_start_method("{method}")
# A process that is ended before it has ended its own pool leaves semaphores, which is told.
executors.EXIT_SECONDS = 60


class Point:
    def __init__(self, x):
        self.x = x

    def moved(self, by):
        return Point(self.x + by)


class OwnError(Exception):
    pass


class WithMoreArguments(Exception):
    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


@unsync(cpu_bound=True)
def fail_with_code():
    raise ExceptionGroup("both", [WithMoreArguments("own", 7), OwnError()])


class Global:
    loaded = 0

    def __init__(self):
        self.large = list(range(10))

    def __setstate__(self, state):
        type(self).loaded += 1


a_global = Global()


@unsync(cpu_bound=True)
def loads_of_the_global(_):
    return a_global.loaded


@unsync(cpu_bound=True)
def inner(x):
    return x + 1, os.getpid()


@unsync(cpu_bound=True)
def outer(x):
    return inner(x).result(60), os.getpid()


@unsync(cpu_bound=True)
def fail():
    raise OwnError("own")


@unsync(cpu_bound=True)
def factorial(x):
    return 1 if x == 0 else x * factorial.__wrapped__(x - 1)


def point_of(call):
    point = call.result(60)
    assert type(point) is Point
    return point.x


(four, pid), other_pid = outer(3).result(60)
print(four, len({{pid, other_pid, os.getpid()}}))
print(factorial(5).result(60))
print(point_of(unsync(Point(2).moved, cpu_bound=True)(5)))
print(point_of(unsync(lambda point: point.moved(1), cpu_bound=True)(Point(9))))
print(unsync(functools.partial(lambda x, y: x - y, 9), cpu_bound=True)(4).result(60))
print(sorted(unsync(sorted, cpu_bound=True)([3, 1, 2], key=lambda x: -x).result(60)))
error = fail().exception(60)
print(type(error) is OwnError, "in fail" in str(error.__cause__))
error = fail_with_code().exception(60).exceptions[0]
print(type(error) is WithMoreArguments, error.args, error.code)
calls = unsync.calls(loads_of_the_global, range(8), chunksize=8)
print({{call.result(60) for call in calls}})
"""


@needs_cloudpickle
@pytest.mark.parametrize(
    ("method", "how"), [(m, "stdin") for m in START_METHODS] + [("spawn", "-c")]
)
def test_what_was_typed_at_a_prompt_travels_by_value_and_comes_back_as_itself(
    method: str, how: str
) -> None:
    done = at_a_prompt(TYPED.format(method=method), how)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "4 3",  # the one inside ran in a third process
        "120",
        "7",
        "10",
        "5",
        "[1, 2, 3]",
        "True True",
        "True ('own',) 7",
        "{1}",  # it travelled once for all of them
    ]


@pytest.mark.parametrize("method", START_METHODS)
def test_without_cloudpickle_what_was_typed_is_an_error_that_names_it_and_the_extra(
    method: str,
) -> None:
    program = f"""
    {BLOCKED.replace(chr(10), chr(10) + "    ")}
    import multiprocessing
    from unsync import unsync

    multiprocessing.set_start_method("{method}")

    @unsync(cpu_bound=True)
    def typed():
        return 1

    print(typed().exception(60))
    """
    done = at_a_prompt(program, "stdin")
    assert done.stderr == ""
    assert "cannot find the function 'typed' in the module '__main__'" in done.stdout
    assert "pip install cloudpickle" in done.stdout


# Reference or value.

INNER = """
import json
import multiprocessing
import os
import pickle

from unsync import unsync

factor = 10


def times(number):
    @unsync(cpu_bound=True)
    def function(x):
        return factor * number * x, os.getpid()

    return function


def redefined(x):
    return 1, os.getpid()


redefined_first = unsync(redefined, cpu_bound=True)


def redefined(x):
    return 2, os.getpid()


if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    outcomes = []
    for call in (times(3), unsync(lambda x: (-x, os.getpid()), cpu_bound=True), redefined_first):
        try:
            result, pid = call(2).result(60)
            assert pid != os.getpid()
            outcomes.append(result)
        except pickle.PicklingError as error:
            outcomes.append(str(error))
    print(json.dumps(outcomes))
"""


@needs_cloudpickle
@pytest.mark.parametrize("method", START_METHODS)
def test_closures_lambdas_and_what_was_defined_anew_travel_by_value(
    run_python: Run, method: str
) -> None:
    done = run_python(INNER.replace("{method}", method))
    assert done.stderr == ""
    assert json.loads(done.stdout) == [60, -2, 1]


@pytest.mark.parametrize("method", START_METHODS)
def test_without_cloudpickle_the_call_says_what_cannot_go_and_why_and_names_the_extra(
    run_python: Run, method: str
) -> None:
    done = run_python(BLOCKED + INNER.replace("{method}", method))
    assert done.stderr == ""
    errors = json.loads(done.stdout)
    expected = [
        ("times.<locals>.function", "it is defined inside another function"),
        ("<lambda>", "it is a lambda"),
        ("redefined", "the name 'redefined' in the module '__main__' is not this function"),
    ]
    for error, (name, why) in zip(errors, expected, strict=True):
        assert f"cannot send the function '{name}' to another process" in error
        assert why in error
        assert "pip install cloudpickle" in error


class Shape:
    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    def method(self) -> str:
        return type(self).__name__

    @unsync
    def marked(self) -> str:
        return "marked"


@pytest.mark.parametrize("function", [Shape.static, Shape.marked.__wrapped__, os.path.join, len])  # type: ignore[attr-defined]
def test_what_can_be_imported_travels_by_reference(function: Callable[..., object]) -> None:
    reference = _travel.reference_to(function)
    assert isinstance(reference, _travel.Reference)
    assert len(pickle.dumps(reference)) < 150


@pytest.mark.parametrize(
    "function", [Shape().method, Shape.of_class, functools.partial(Shape.static)]
)
def test_what_is_bound_or_partial_travels_by_its_own_pickle(
    function: Callable[..., object],
) -> None:
    assert _travel.reference_to(function) is function


@needs_cloudpickle
def test_what_a_closure_holds_and_cannot_be_copied_is_an_error_that_names_the_function() -> None:
    lock = threading.Lock()

    def locked() -> bool:
        return lock.locked()

    with pytest.raises(pickle.PicklingError, match=r"function .*locked cannot go to another.*lock"):
        _travel.reference_to(locked)


def give_pool() -> Executor:
    return ThreadPoolExecutor(1, "given")


@unsync
def of_this_module(x: int) -> int:
    return x


@needs_cloudpickle
def test_cloudpickle_takes_a_marked_function_for_whoever_uses_it() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")

    @unsync
    def local(x: int) -> int:
        return x + 1

    there = pickle.loads(cloudpickle.dumps({"call": local}))["call"]
    assert there is not local
    assert there(1).result(PATIENCE) == 2
    assert pickle.loads(cloudpickle.dumps(of_this_module)) is of_this_module
    with pytest.raises(AttributeError, match="local"):  # any other pickle goes by name
        pickle.dumps(local)


@needs_cloudpickle
def test_cloudpickle_takes_a_marked_function_of_the_main_program(run_python: Run) -> None:
    done = run_python("""
        import subprocess, sys
        import cloudpickle
        from unsync import unsync

        @unsync
        def above(x):
            return x + 1

        call = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(1).result(60))"
        parcel = cloudpickle.dumps(above)
        subprocess.run([sys.executable, "-c", call], input=parcel, check=True)
    """)
    assert (done.stdout, done.stderr) == ("2\n", "")


@needs_cloudpickle
def test_a_marked_function_goes_along_with_one_that_calls_it() -> None:
    def name() -> str:
        return threading.current_thread().name

    given = unsync(name, executor=give_pool)
    plain = unsync(name)

    def call_both() -> tuple[str, str]:
        return given().result(PATIENCE), plain().result(PATIENCE)

    there = pickle.loads(pickle.dumps(_travel.reference_to(call_both)))
    # As whoever hands it on does it, who knows nothing of marked functions.
    cloudpickle = pytest.importorskip("cloudpickle")
    further = pickle.loads(cloudpickle.dumps(there))
    for function in (there, further):
        assert function is not call_both
        first, second = function()
        assert first.startswith("given")
        assert second.startswith("unsync-worker")


@needs_cloudpickle
def test_a_marked_function_whose_executor_belongs_here_does_not_and_is_named() -> None:
    with ThreadPoolExecutor(1) as pool:
        bound_here = unsync(lambda: 1, executor=pool)

        def call() -> Any:
            return bound_here().result(PATIENCE)

        with pytest.raises(
            pickle.PicklingError, match=r"lambda.* belongs to this process; let the"
        ):
            _travel.reference_to(call)


# What upstream's users reported, as programs: alex-sherman/unsync issues 30, 40, 42 and 50.

REPORT_30 = """
import multiprocessing

from unsync import unsync


@unsync(cpu_bound=True)
def heavy_calculation(num: int) -> int:
    return num**num


if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    jobs = [heavy_calculation(i) for i in range(100)]
    print([job.result(60) for job in jobs] == [i**i for i in range(100)])
"""

REPORT_40 = """
import asyncio
import multiprocessing

from unsync import unsync


@unsync
async def download(url):
    await asyncio.sleep(0.001)
    return "data of " + url


@unsync(cpu_bound=True)
def process(task):
    return "processed " + task.result()


@unsync
def store(task):
    return "stored " + task.result()


if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    tasks = [download(url).then(process).then(store) for url in ("1", "2", "3")]
    print([task.result(60) for task in tasks] == [f"stored processed data of {n}" for n in "123"])
"""

REPORT_42 = """
import math
import multiprocessing

from unsync import unsync


@unsync(cpu_bound=True)
def first():
    return math.sqrt(4)


def threaded():
    @unsync
    def function():
        return 3

    return function


def second():
    @unsync(cpu_bound=True)
    def function():
        return math.sqrt(16)

    return function


if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    calls = [first(), threaded()(), second()()]
    print([call.result(60) for call in calls] == [2, 3, 4])
"""

REPORT_50 = """
import multiprocessing

from unsync import unsync

with open("imports", "a") as file:
    print("once more", file=file)
multiprocessing.set_start_method("{method}", force=True)


def parallelize(f):
    def lifted(series):
        futures = [f(i) for i in series]
        return [future.result(60) for future in futures]

    return lifted


@unsync(cpu_bound=True{option})
def slow_inc(n):
    return n + 1


print(parallelize(slow_inc)(range({count})))
"""


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("number", [30, 40, pytest.param(42, marks=needs_cloudpickle)])
def test_what_was_reported_to_upstream_works(run_python: Run, number: int, method: str) -> None:
    program = {30: REPORT_30, 40: REPORT_40, 42: REPORT_42}[number]
    done = run_python(program.replace("{method}", method))
    assert done.stderr == ""
    assert done.stdout == "True\n"


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("method", START_METHODS)
def test_a_missing_guard_is_one_error_that_says_what_to_do(
    run_python: Run, tmp_path: Path, method: str, count: int
) -> None:
    program = REPORT_50.format(method=method, count=count, option="")
    done = run_python(program)
    _check_unguarded(done)
    # A pool that broke meanwhile may have been replaced once.
    imports = (tmp_path / "imports").read_text().splitlines()
    assert len(imports) <= 2 + 2 * (os.cpu_count() or 1)


# Before gh-125451 was mended (3.12.8, 3.13.1) the interpreter's exit could write to a pipe that a
# broken pool was just closing.
RACE_AT_EXIT = re.compile(
    r"Exception ignored (in: <module 'threading'.*|on threading shutdown:)\nTraceback.*\n(  .*\n)*"
    r"    thread_wakeup\.wakeup\(\)\n(  .*\n)*(OSError|TypeError): .*\n"
)


@pytest.mark.parametrize("method", START_METHODS)
def test_a_missing_guard_is_noticed_with_a_pool_of_ones_own(run_python: Run, method: str) -> None:
    option = ", executor=__import__('concurrent.futures').futures.ProcessPoolExecutor(2)"
    _check_unguarded(run_python(REPORT_50.format(method=method, count=3, option=option)))


# On a busy machine the pool breaks while the program is still making its calls: then one of these
# is the error, and those that were made before, which nobody looks at any more, are reported.
UNSEEN = re.compile(
    r"^Unfuture exception was never retrieved\nfuture: .*\n"
    r"concurrent\.futures\.process\.BrokenProcessPool: .*\n",
    re.MULTILINE,
)


def _check_unguarded(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    stderr = UNSEEN.sub("", done.stderr)
    if sys.version_info < (3, 13, 1):
        stderr = RACE_AT_EXIT.sub("", stderr)
    assert stderr.count("Traceback (most recent call last)") == 1, stderr
    assert stderr.count('below `if __name__ == "__main__":`') == 1, stderr
    assert "BrokenProcessPool: the main program calls functions in processes" in stderr


@needs_cloudpickle
@pytest.mark.parametrize("method", START_METHODS)
def test_nested_calls_of_inner_functions_neither_hang_nor_leave_processes(
    run_python: Run, method: str
) -> None:
    program = """
    import multiprocessing
    import os
    from unsync import executors, unsync

    # A process that is ended before it has ended its own pool leaves semaphores, which is told.
    executors.EXIT_SECONDS = 60

    def nest(depth):
        @unsync(cpu_bound=True)
        def function():
            below = nest(depth - 1)().result(60) if depth else []
            return [os.getpid(), *below]

        return function

    if __name__ == "__main__":
        multiprocessing.set_start_method("{method}")
        pids = nest(2)().result(60)
        assert len({os.getpid(), *pids}) == 4, pids
    """
    # It returns when no process holds its output any more.
    done = run_python(program.replace("{method}", method))
    assert done.stderr == ""
    assert done.returncode == 0
