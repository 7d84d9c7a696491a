"""Functions marked `cpu_bound`: how they get into another process, and what comes back.

Here cpu_bound functions do without cloudpickle; test_travelling.py has what it adds.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import importlib
import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest
from support.waiting import PATIENCE, wait_until

from unsync import CancelledError, Unfuture, _backend, _drain, _travel, executors, unsync

START_METHODS = multiprocessing.get_all_start_methods()
# Those that the default pool uses.
ANEW = [method for method in START_METHODS if method != "fork"]

# Python's own word on every fork beside a thread, from 3.12 on.
NO_FORK_WARNING = ("-W", "ignore:This process:DeprecationWarning")

Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.usefixtures("without_cloudpickle")


def plain(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


@unsync(cpu_bound=True)
def square(x: int, *, offset: int = 0) -> int:
    return x * x + offset


@unsync(cpu_bound=True)
def where() -> int:
    return os.getpid()


in_a_thread_first = unsync(unsync(plain), cpu_bound=True)


@unsync(cpu_bound=True)
@unsync
def marked_again(x: int) -> int:
    return x * x


class Power:
    def __init__(self, exponent: int) -> None:
        self.exponent = exponent

    @unsync
    def of(self, x: int) -> int:
        return int(x**self.exponent)


class OddError(Exception):
    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)
        self.number = number


@unsync(cpu_bound=True)
def fail(number: int) -> NoReturn:
    raise OddError(f"{number} is odd", number)


@unsync(cpu_bound=True)
def look_at(unfuture: Unfuture[int]) -> tuple[str, bool, int, int]:
    return type(unfuture).__name__, unfuture.done(), unfuture.result(PATIENCE), os.getpid()


@unsync(cpu_bound=True)
def give_lambda() -> Callable[[], None]:
    return lambda: None


class BadError(Exception):
    pass


class OddlyMadeError(Exception):
    """As many are: it pickles, but not back."""

    code: int

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


class Odd:
    """Does not unpickle."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __setstate__(self, state: dict[str, str]) -> NoReturn:
        raise ValueError(f"a broken {state['what']}")


class OddFileError(OSError):
    def __init__(self, place: str, *, number: int) -> None:
        super().__init__(number, "not there", place)
        self.place = place


class ChoosyError(Exception):
    """Cannot even be made without what it was given, which it does not keep."""

    def __new__(cls, first: str, second: str) -> ChoosyError:
        return super().__new__(cls, first)

    def __init__(self, first: str, second: str) -> None:
        self.args = (first,)


def fail_oddly(kind: str) -> NoReturn:
    error = OddlyMadeError("bad", "worse")
    error.code = 7
    error.add_note("a note")
    if kind == "group":
        raise ExceptionGroup("both", [error, OddFileError("here", number=2)])
    raise error


@unsync(cpu_bound=True)
def give_bad_error(kind: str) -> NoReturn:
    if kind == "choosy":
        raise ChoosyError("bad", "worse")
    raise BadError(threading.Lock())


class Block:
    """Gives pickle its data as arrays do: as a buffer, where the protocol has such a thing."""

    def __init__(self, data: Any) -> None:
        self.data = bytearray(data)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Block, (pickle.PickleBuffer(self.data) if protocol >= 5 else bytes(self.data),)


@unsync(cpu_bound=True)
def double_block(block: Block) -> Block:
    block.data *= 2
    return block


@unsync(cpu_bound=True)
def hold(begun: str, release: str) -> None:
    Path(begun).touch()
    until = time.monotonic() + PATIENCE
    while not Path(release).exists() and time.monotonic() < until:
        time.sleep(0.001)


@unsync(cpu_bound=True)
@functools.lru_cache
def cached(x: int) -> tuple[int, int]:
    return x + 1, os.getpid()


class Multiplier:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: int) -> tuple[int, int]:
        return self.factor * x, os.getpid()


# What comes back.


@pytest.mark.usefixtures("pool")
def test_it_runs_in_another_process() -> None:
    assert where().result(PATIENCE) != os.getpid()


def is_as_it_was(error: BaseException) -> bool:
    assert isinstance(error, OddlyMadeError)
    return (error.args, error.code, error.__notes__[0]) == (("bad",), 7, "a note")


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("way", ["call", "calls"])
@pytest.mark.parametrize("kind", ["alone", "group"])
def test_an_exception_that_pickle_cannot_make_anew_comes_back_all_the_same(
    way: str, kind: str
) -> None:
    marked = unsync(cpu_bound=True)(fail_oddly)
    call = marked(kind) if way == "call" else unsync.calls(marked, [kind])[0]
    error = call.exception(PATIENCE)
    assert error is not None
    if kind == "alone":
        assert is_as_it_was(error)
    else:
        assert isinstance(error, ExceptionGroup)
        first, second = error.exceptions
        assert is_as_it_was(first)
        assert isinstance(second, OddFileError)
        assert (second.errno, second.filename, second.place) == (2, "here", "here")
    if way == "call":
        assert "in fail_oddly" in str(error.__cause__)
        assert "Carrier" not in str(error.__cause__)
    if (way, kind) == ("call", "alone"):  # as if it had travelled by itself
        assert str(error.__cause__).count("OddlyMadeError: bad\n") == 1
        assert "RuntimeError" not in str(error.__cause__)


async def add_one(number: int) -> int:
    await asyncio.sleep(0)
    if number < 0:
        raise ValueError(number)
    return number + 1


@unsync(cpu_bound=True)
def give_coroutine(number: int) -> Any:
    return add_one(number)


@pytest.mark.usefixtures("pool")
def test_a_coroutine_that_it_returns_is_run_in_the_process() -> None:
    assert give_coroutine(1).result(PATIENCE) == 2
    with pytest.raises(ValueError, match="-1"):
        give_coroutine(-1).result(PATIENCE)
    calls = unsync.calls(give_coroutine, [1, 2, -3, 4])
    assert [repr(call.exception(PATIENCE) or call.result()) for call in calls] == [
        "2",
        "3",
        "ValueError(-3)",
        "5",
    ]


@pytest.mark.usefixtures("pool")
def test_arguments_and_result_travel() -> None:
    assert square(3, offset=4).result(PATIENCE) == 13


@pytest.mark.usefixtures("pool")
def test_large_buffers_travel_and_can_be_written_to() -> None:
    block = Block(b"abc")
    call = double_block(block)
    block.data[0:1] = b"x"
    result = call.result(PATIENCE)
    assert result.data == b"abcabc"
    result.data[0:1] = b"y"
    assert result.data == b"ybcabc"


@pytest.mark.usefixtures("pool")
def test_an_exception_comes_back_with_type_message_and_attributes() -> None:
    exc = fail(3).exception(PATIENCE)
    assert type(exc) is OddError
    assert exc.args == ("3 is odd", 3)
    assert exc.number == 3
    assert "in fail" in str(exc.__cause__)  # the worker's traceback


CANNOT_TRAVEL: dict[str, tuple[Callable[[], Unfuture[Any]], type[Exception], str]] = {
    "argument": (
        lambda: square(lambda: None),
        pickle.PicklingError,
        "argument 1 of square, of type function, cannot go to another process: .*lambda",
    ),
    "argument by name": (
        lambda: square(1, offset=threading.Lock()),  # type: ignore[arg-type]
        pickle.PicklingError,
        "the argument 'offset' of square, of type lock, cannot go to another process: .*lock",
    ),
    "function": (
        lambda: unsync(functools.partial(pow, threading.Lock()), cpu_bound=True)(1),
        pickle.PicklingError,
        "the function pow cannot go to another process: .*lock",
    ),
    "argument that does not unpickle": (
        lambda: square(Odd("argument")),  # type: ignore[arg-type]
        pickle.UnpicklingError,
        r"the arguments of square cannot be unpickled in process \d+: a broken argument",
    ),
    "result": (
        lambda: give_lambda(),
        pickle.PicklingError,
        "the result of give_lambda, of type function, cannot come back from another process: .*lam",
    ),
    "exception": (
        lambda: give_bad_error("unpicklable"),
        pickle.PicklingError,
        r"give_bad_error raised BadError\(.*\), which cannot come back from .*: .*lock",
    ),
    "exception that does not unpickle": (
        lambda: give_bad_error("choosy"),
        pickle.PicklingError,
        r"give_bad_error raised ChoosyError\('bad'\), which cannot come back .*: .*missing 1",
    ),
}


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("what", CANNOT_TRAVEL)
def test_what_cannot_travel_is_an_error_that_names_it_for_its_caller_alone(what: str) -> None:
    call, kind, message = CANNOT_TRAVEL[what]
    others = [square(number) for number in range(5)]
    failed = call()
    others += [square(number) for number in range(5, 10)]
    with pytest.raises(kind, match=message):
        failed.result(PATIENCE)
    assert [other.result(PATIENCE) for other in others] == [n * n for n in range(10)]


@pytest.mark.usefixtures("pool")
def test_an_error_about_travelling_shows_where_it_was_raised() -> None:
    shown = str(give_bad_error("choosy").exception(PATIENCE).__cause__)  # type: ignore[union-attr]
    assert "in give_bad_error" in shown
    assert "ChoosyError: bad" in shown


@pytest.mark.usefixtures("pool")
def test_arguments_are_those_of_the_moment_of_the_call() -> None:
    values = [3, 1, 2]
    call = unsync(sorted, cpu_bound=True)(values)
    values.append(0)
    assert call.result(PATIENCE) == [1, 2, 3]


@pytest.mark.usefixtures("pool")
def test_a_pending_unfuture_as_argument_is_refused_clearly() -> None:
    pending: Unfuture[int] = Unfuture()
    with pytest.raises(pickle.PicklingError, match=r"argument 1 of look_at.*no outcome yet"):
        look_at(pending).result(PATIENCE)


@pytest.mark.usefixtures("pool")
def test_await_and_gather() -> None:
    async def main() -> list[int]:
        first = await square(2)
        return [first, *await asyncio.gather(square(3), square(4))]

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == [4, 9, 16]


@pytest.mark.usefixtures("pool")
def test_await_raises_what_the_function_raised() -> None:
    async def main() -> None:
        with pytest.raises(OddError, match="5 is odd"):
            await fail(5)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.usefixtures("pool")
def test_concurrent_futures_take_it() -> None:
    calls = [square(x) for x in range(5)]
    done, not_done = concurrent.futures.wait(calls, PATIENCE)
    assert not not_done
    assert sorted(call.result(0) for call in done) == [0, 1, 4, 9, 16]


@pytest.mark.usefixtures("pool")
def test_then_goes_on_from_it_in_this_process() -> None:
    chained = where().then(lambda unfuture: (unfuture.result(), os.getpid()))
    worker, here = chained.result(PATIENCE)
    assert worker != here == os.getpid()


@pytest.mark.usefixtures("pool")
def test_as_a_continuation_it_gets_the_finished_unfuture() -> None:
    name, done, result, pid = square(5).then(look_at).result(PATIENCE)
    assert (name, done, result) == ("Unfuture", True, 25)
    assert pid != os.getpid()


@pytest.mark.usefixtures("pool")
def test_as_a_mapped_function_it_gets_the_result() -> None:
    assert square(2).map(square).map(square).result(PATIENCE) == 256


@pytest.mark.usefixtures("pool")
def test_cancel_reaches_what_is_queued_and_not_what_runs(tmp_path: Path) -> None:
    release = tmp_path / "release"
    calls = [hold(str(tmp_path / f"begun{i}"), str(release)) for i in range(8)]
    wait_until((tmp_path / "begun0").exists, "the first call")
    assert calls[-1].cancel()
    assert not calls[0].cancel()
    release.touch()
    with pytest.raises(CancelledError):
        calls[-1].result(PATIENCE)
    for call in calls[:-1]:
        call.result(PATIENCE)
    square(1).result(PATIENCE)  # came after all of them
    assert not (tmp_path / "begun7").exists()


@pytest.mark.usefixtures("pool")
def test_a_drain_waits_for_the_chunks_of_a_stream_that_was_left(
    tmp_path: Path, in_thread: Callable[[Callable[[], object]], threading.Thread]
) -> None:
    release = tmp_path / "release"
    goes_on, answers = threading.Event(), list[bool]()

    def leave(name: str) -> None:
        """With a chunk that runs; the first one ends at once."""
        second = tmp_path / name
        begun = [str(tmp_path / "first"), str(second)]
        with unsync.map(hold, begun, [str(tmp_path), str(release)], chunksize=1) as stream:
            next(iter(stream))
            wait_until(second.exists, "the second chunk")

    leave("before")
    assert unsync.drain(0) is False
    assert [*map(_backend.name_of_call, _drain.pending_now(None))] == ["hold"]
    release.touch()
    assert unsync.drain(PATIENCE) is True

    # And for those that are made meanwhile, by what it waits for.
    release.unlink()
    call = unsync(lambda: goes_on.wait(PATIENCE) and leave("meanwhile"))()
    in_thread(lambda: answers.append(unsync.drain(PATIENCE)))
    drains = _drain._watcher._drains
    wait_until(lambda: drains and not drains[0]._is_looking, "the drain")
    goes_on.set()
    call.result(PATIENCE)
    # The worker that left the stream may not be through with that call yet.
    wait_until(lambda: [*map(_backend.name_of_call, drains[0].pending())] == ["hold"], "the chunk")
    release.touch()
    wait_until(lambda: answers == [True], "the end of the drain")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_not_for_the_workers_of_the_default_pool(run_python: Run) -> None:
    """Nor is it ignored by what they start."""
    program = """
    import multiprocessing
    import os
    import signal
    import subprocess
    import sys
    import time
    from pathlib import Path
    from unsync import unsync

    # What a shell starts in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    @unsync(cpu_bound=True)
    def hold():
        Path("begun").touch()
        until = time.monotonic() + 60
        while not Path("release").exists() and time.monotonic() < until:
            time.sleep(0.001)
        ask = "import signal; print(signal.getsignal(signal.SIGINT).__name__)"
        return subprocess.check_output([sys.executable, "-c", ask], text=True)

    if __name__ == "__main__":
        call = hold()
        while not Path("begun").exists():
            assert not call.done()
            time.sleep(0.001)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)
        Path("release").touch()
        print(call.result(60))
    """
    done = run_python(program)
    assert (done.stdout, done.stderr) == ("default_int_handler\n\n", "")


# What can go there.


@pytest.mark.usefixtures("pool")
def test_a_plain_call_of_unsync_leaves_the_function_as_it_is() -> None:
    result, pid = unsync(plain, cpu_bound=True)(3).result(PATIENCE)
    assert result == 9
    assert pid != os.getpid()


@pytest.mark.usefixtures("pool")
def test_a_partial() -> None:
    result, pid = unsync(functools.partial(plain, 4), cpu_bound=True)().result(PATIENCE)
    assert result == 16
    assert pid != os.getpid()


@pytest.mark.usefixtures("pool")
def test_builtins() -> None:
    assert unsync(math.factorial, cpu_bound=True)(5).result(PATIENCE) == 120
    assert unsync(os.getpid, cpu_bound=True)().result(PATIENCE) != os.getpid()


@pytest.mark.usefixtures("pool")
def test_a_callable_instance() -> None:
    result, pid = unsync(Multiplier(6), cpu_bound=True)(7).result(PATIENCE)
    assert result == 42
    assert pid != os.getpid()


@pytest.mark.usefixtures("pool")
def test_a_cached_function() -> None:
    result, pid = cached(6).result(PATIENCE)
    assert result == 7
    assert pid != os.getpid()


# Every shape of function, as a module and as a program.
SHAPES = """
import functools
import os

from unsync import unsync


def tagged(tag):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args):
            return tag, function(*args)

        return wrapper

    return decorate


@unsync(cpu_bound=True)
def function(x):
    return "function", x, os.getpid()


@unsync(cpu_bound=True)
@tagged("below")
def decorated_below(x):
    return "decorated_below", x, os.getpid()


@tagged("above")
@unsync(cpu_bound=True)
def decorated_above(x):
    return "decorated_above", x, os.getpid()


class Shape:
    def __init__(self, name):
        self.name = name

    @unsync(cpu_bound=True)
    def method(self, x):
        return self.name, x, os.getpid()

    @unsync(cpu_bound=True)
    @staticmethod
    def static_below(x):
        return "static_below", x, os.getpid()

    @staticmethod
    @unsync(cpu_bound=True)
    def static_above(x):
        return "static_above", x, os.getpid()

    @unsync(cpu_bound=True)
    @classmethod
    def class_below(cls, x):
        return "class_below " + cls.__name__, x, os.getpid()

    @classmethod
    @unsync(cpu_bound=True)
    def class_above(cls, x):
        return "class_above " + cls.__name__, x, os.getpid()

    class Inner:
        @unsync(cpu_bound=True)
        def method(self, x):
            return "inner", x, os.getpid()


class Heir(Shape):
    pass
"""

# The rest of the program: calls each shape and prints what came of it as JSON.
CALLS = """
if __name__ == "__main__":
    import json
    import multiprocessing

    multiprocessing.set_start_method(os.environ["START_METHOD"])
    shape = shapes.Shape("shape")
    calls = {
        "function": shapes.function,
        "decorated_below": shapes.decorated_below,
        # The one above runs here, and what it returns is not an Unfuture.
        "decorated_above": lambda x: shapes.decorated_above(x)[1],
        "method": shape.method,
        "static_below": shape.static_below,
        "static_below_of_the_class": shapes.Shape.static_below,
        "static_above": shape.static_above,
        "static_above_of_the_class": shapes.Shape.static_above,
        "class_below": shape.class_below,
        "class_below_of_an_heir": shapes.Heir.class_below,
        "class_above": shape.class_above,
        "class_above_of_an_heir": shapes.Heir.class_above,
        "inherited_method": shapes.Heir("heir").method,
        "inner_method": shapes.Shape.Inner().method,
    }
    outcomes = {}
    for number, (name, function) in enumerate(calls.items()):
        try:
            outcomes[name] = function(number).result(60)
        except Exception as exc:
            outcomes[name] = repr(exc)
    print(json.dumps([os.getpid(), outcomes]))
"""


@pytest.fixture
def outcomes(request: pytest.FixtureRequest, run_python: Run, tmp_path: Path) -> dict[str, Any]:
    """What became of each shape, without the worker's pid, which is not the program's."""
    method, place = request.param
    if place == "module":
        (tmp_path / "shapes.py").write_text(SHAPES)
        program = "import os\nimport shapes\n" + CALLS
    else:
        program = SHAPES + "import sys\nshapes = sys.modules[__name__]\n" + CALLS
    done = run_python(program, env={"START_METHOD": method})
    assert done.stderr == ""
    assert done.returncode == 0
    pid, found = json.loads(done.stdout)
    return {name: _without_pid(outcome, pid) for name, outcome in found.items()}


def _without_pid(outcome: Any, pid: int) -> Any:
    if isinstance(outcome, str):  # an error
        return outcome
    if isinstance(outcome[-1], list):
        return [*outcome[:-1], _without_pid(outcome[-1], pid)]
    assert outcome[-1] != pid
    return outcome[:-1]


@pytest.mark.parametrize(
    "outcomes",
    [(method, place) for method in ANEW for place in ("module", "__main__")],
    ids=lambda param: "-".join(param),
    indirect=True,
)
def test_every_shape_of_function_is_found_in_the_worker(outcomes: dict[str, Any]) -> None:
    assert outcomes == {
        "function": ["function", 0],
        "decorated_below": ["below", ["decorated_below", 1]],
        "decorated_above": ["decorated_above", 2],
        "method": ["shape", 3],
        "static_below": ["static_below", 4],
        "static_below_of_the_class": ["static_below", 5],
        "static_above": ["static_above", 6],
        "static_above_of_the_class": ["static_above", 7],
        "class_below": ["class_below Shape", 8],
        "class_below_of_an_heir": ["class_below Heir", 9],
        "class_above": ["class_above Shape", 10],
        "class_above_of_an_heir": ["class_above Heir", 11],
        "inherited_method": ["heir", 12],
        "inner_method": ["inner", 13],
    }


@pytest.mark.parametrize("method", ANEW)
def test_a_call_made_in_a_worker_goes_to_a_pool_of_its_own(method: str, run_python: Run) -> None:
    program = """
    import multiprocessing
    import os
    from unsync import executors, unsync

    # A process that is ended before it has ended its own pool leaves semaphores, which is told.
    executors.EXIT_SECONDS = 60

    @unsync(cpu_bound=True)
    def inner():
        return os.getpid()

    @unsync(cpu_bound=True)
    def outer():
        return os.getpid(), inner().result(60)

    if __name__ == "__main__":
        multiprocessing.set_start_method(os.environ["START_METHOD"])
        pids = {os.getpid(), *outer().result(60)}
        assert len(pids) == 3, pids
    """
    # It returns when no process holds its output any more.
    done = run_python(program, env={"START_METHOD": method})
    assert done.stderr == ""
    assert done.returncode == 0


# What cannot go there.


def redefined() -> int:
    return 1


first_definition = unsync(redefined, cpu_bound=True)


def redefined() -> int:  # type: ignore[no-redef]
    return 2


def closure() -> Callable[[], Unfuture[int]]:
    @unsync(cpu_bound=True)
    def inner() -> int:
        return 1

    return inner


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize(
    ("function", "name", "why"),
    [
        (unsync(lambda: 1, cpu_bound=True), "<lambda>", "it is a lambda"),
        (closure(), "closure.<locals>.inner", "it is defined inside another function"),
        (first_definition, "redefined", f"the name 'redefined' in the module '{__name__}' is not"),
    ],
    ids=["lambda", "closure", "redefined"],
)
def test_the_call_says_what_cannot_go_and_why_and_what_to_do(
    function: Callable[[], object], name: str, why: str
) -> None:
    with pytest.raises(pickle.PicklingError) as caught:
        function()
    message = str(caught.value)
    assert f"cannot send the function '{name}' to another process" in message
    assert why in message
    assert "Define it at the top level of a module" in message
    assert "pip install cloudpickle" in message
    assert "leave cpu_bound=True away" in message


def test_a_closure_does_not_start_the_default_pool(fresh: None) -> None:
    with pytest.raises(pickle.PicklingError):
        closure()()
    children = multiprocessing.active_children()
    assert not unsync.process_executor._processes, children


HIDDEN = """
import multiprocessing
import os

from unsync import unsync


@unsync(cpu_bound=True)
def visible(x):
    return x + 1


if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ["START_METHOD"])

    @unsync(cpu_bound=True)
    def hidden(x):
        return x + 2

    print(repr(hidden(1).exception(60)))
    print(visible(1).result(60))
"""


@pytest.mark.parametrize("method", ANEW)
def test_what_only_the_guard_defines_is_a_clear_error_and_the_pool_goes_on(
    method: str, run_python: Run
) -> None:
    done = run_python(HIDDEN, env={"START_METHOD": method})
    assert done.stderr == ""
    error, result = done.stdout.splitlines()
    assert error.startswith("RuntimeError(")
    assert "cannot find the function 'hidden' in the module '__main__'" in error
    assert "outside `if __name__ == '__main__':`" in error
    assert result == "2"


def test_what_was_typed_at_a_prompt_is_a_clear_error() -> None:
    program = """
    import multiprocessing, math, sys
    from unsync import unsync

    sys.modules["cloudpickle"] = None
    multiprocessing.set_start_method("spawn")
    typed = unsync(cpu_bound=True)(exec("def typed(): return 1") or typed)
    print(repr(typed().exception(60)))
    print(unsync(math.factorial, cpu_bound=True)(3).result(60))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.stderr == ""
    error, result = done.stdout.splitlines()
    assert "cannot find the function 'typed'" in error
    assert "typed in at a prompt" in error
    assert "pip install cloudpickle" in error
    assert result == "6"


# Which pool.


def test_the_default_executor_is_a_process_pool_made_on_first_use(fresh: None) -> None:
    executor = unsync.process_executor
    assert isinstance(executor, concurrent.futures.ProcessPoolExecutor)
    assert unsync.process_executor is executor


def test_assigning_an_executor_and_none_for_the_default(
    fresh: None, spawned: concurrent.futures.ProcessPoolExecutor
) -> None:
    unsync.process_executor = spawned
    assert unsync.process_executor is spawned
    assert where().result(PATIENCE) in (spawned._processes or {})
    unsync.process_executor = None
    assert unsync.process_executor is not spawned


def test_assigning_what_is_no_executor_is_refused(fresh: None) -> None:
    with pytest.raises(
        TypeError, match=r"unsync\.process_executor must be .*Executor, or .*, not 4"
    ):
        unsync.process_executor = 4


class Inline(concurrent.futures.Executor):
    """Does at once, in the caller's thread, what it is given."""

    def submit(  # type: ignore[override]
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_an_executor_of_ones_own_takes_any_function(fresh: None) -> None:
    unsync.process_executor = Inline()
    assert where().result(PATIENCE) == os.getpid()
    assert closure()().result(PATIENCE) == 1


class Relay(concurrent.futures.Executor):
    """Hands on to another executor what it is given."""

    def __init__(self, target: concurrent.futures.Executor) -> None:
        self.target = target

    def submit(  # type: ignore[override]
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        return self.target.submit(fn, *args, **kwargs)


def test_an_executor_of_ones_own_may_send_the_function_to_a_process(
    fresh: None, spawned: concurrent.futures.ProcessPoolExecutor
) -> None:
    unsync.process_executor = Relay(spawned)
    assert where().result(PATIENCE) in (spawned._processes or {})


def test_the_option_executor_takes_a_process_pool(
    spawned: concurrent.futures.ProcessPoolExecutor,
) -> None:
    result, pid = unsync(executor=spawned)(plain)(3).result(PATIENCE)
    assert result == 9
    assert pid in (spawned._processes or {})


def test_the_option_executor_counts_whatever_is_assigned(
    fresh: None, spawned: concurrent.futures.ProcessPoolExecutor
) -> None:
    marked = unsync(plain, executor=spawned)
    unsync.process_executor = Inline()
    assert marked(3).result(PATIENCE)[1] != os.getpid()


def test_a_closure_for_the_option_executor_is_refused_at_the_call(
    spawned: concurrent.futures.ProcessPoolExecutor,
) -> None:
    with pytest.raises(pickle.PicklingError, match="it is a lambda"):
        unsync(lambda: 1, executor=spawned)()


# When a worker dies.


@pytest.mark.parametrize("method", ANEW)
def test_after_a_worker_died_the_next_call_has_a_new_pool(method: str, run_python: Run) -> None:
    program = """
    import multiprocessing
    import os
    import time
    from concurrent.futures.process import BrokenProcessPool
    from unsync import unsync

    @unsync(cpu_bound=True)
    def sleep():
        time.sleep(600)

    @unsync(cpu_bound=True)
    def double(x):
        return 2 * x

    if __name__ == "__main__":
        multiprocessing.set_start_method(os.environ["START_METHOD"])
        for number in range(2):
            pool = unsync.process_executor
            affected = [sleep() for _ in range(9)]
            multiprocessing.active_children()[0].kill()
            for call in affected:
                assert isinstance(call.exception(60), BrokenProcessPool), call
            assert double(number).result(60) == 2 * number
            assert unsync.process_executor is not pool
    """
    done = run_python(program, env={"START_METHOD": method})
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("pool", ["None", "ProcessPoolExecutor(1, get_context('spawn'))"])
def test_when_a_worker_dies_what_was_cancelled_in_the_queue_is_in_nobodys_way(
    pool: str, run_python: Run
) -> None:
    program = f"""
    import multiprocessing
    import os
    import time
    from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
    from multiprocessing import get_context
    from unsync import unsync

    @unsync(cpu_bound=True)
    def sleep():
        time.sleep(600)

    if __name__ == "__main__":
        unsync.process_executor = {pool}
        calls = [sleep() for _ in range(3 * os.cpu_count() + 9)]
        cancelled = calls[-4:-2]
        assert all(call.cancel() for call in cancelled)
        multiprocessing.active_children()[0].kill()
        for call in calls:
            assert call in cancelled or isinstance(call.exception(60), BrokenProcessPool), call
    """
    done = run_python(program)
    assert (done.stderr, done.returncode) == ("", 0)


def test_who_is_told_that_a_worker_died_may_make_a_call(run_python: Run) -> None:
    program = """
    import os
    import threading
    from unsync import unsync

    @unsync(cpu_bound=True)
    def die():
        os._exit(1)

    @unsync(cpu_bound=True)
    def double(x):
        return 2 * x

    def go_on(call):
        assert call.exception() is not None
        made.append(double(3))
        told.set()

    if __name__ == "__main__":
        made, told = [], threading.Event()
        die().add_done_callback(go_on)
        assert told.wait(60)
        print(made[0].result(60))
    """
    done = run_python(program)
    assert (done.stdout, done.stderr, done.returncode) == ("6\n", "", 0)


def test_the_call_that_finds_the_pool_broken_goes_to_a_new_one(run_python: Run) -> None:
    program = """
    import os
    import traceback
    from concurrent.futures.process import BrokenProcessPool
    from unsync import unsync

    @unsync(cpu_bound=True)
    def die():
        os._exit(1)

    @unsync(cpu_bound=True)
    def double(x):
        return 2 * x

    if __name__ == "__main__":
        for number in range(5):
            assert isinstance(die().exception(60), BrokenProcessPool)
            assert double(number).result(60) == 2 * number
            text = "".join(traceback.format_exception(double(None).exception(60)))
            assert "BrokenProcessPool" not in text, text
    """
    done = run_python(program)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("chosen", [None, *START_METHODS])
def test_the_default_pool_never_forks(chosen: str | None, run_python: Run) -> None:
    done = run_python(f"""
        import multiprocessing
        from unsync import unsync

        if __name__ == "__main__":
            if {chosen!r}:
                multiprocessing.set_start_method({chosen!r})
            print(unsync.process_executor._mp_context.get_start_method())
    """)
    expected = chosen or START_METHODS[0]
    if expected == "fork":
        expected = "forkserver" if START_METHODS[0] == "fork" else START_METHODS[0]
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


def test_a_process_starts_while_a_thread_is_in_the_middle_of_an_import(
    run_python: Run, tmp_path: Path
) -> None:
    """A forked one would wait for ever for that import's lock."""
    (tmp_path / "library.py").write_text("""
import multiprocessing
import threading

if multiprocessing.parent_process() is None:
    import __main__

    __main__.begun.set()
    assert __main__.goes_on.wait(60)
""")
    done = run_python("""
        import threading
        from unsync import unsync

        begun, goes_on = threading.Event(), threading.Event()

        @unsync
        def load():
            import library

        @unsync(cpu_bound=True)
        def crunch(x):
            import library
            return x + 1

        if __name__ == "__main__":
            loading = load()
            assert begun.wait(60)
            try:
                print(crunch(1).result(60))
            finally:
                goes_on.set()
            loading.result(60)
    """)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_an_executor_that_forks_can_be_assigned(run_python: Run) -> None:
    if "fork" not in START_METHODS:
        pytest.skip("there is no fork here")
    program = """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from unsync import unsync

        @unsync(cpu_bound=True)
        def look():
            return setting

        # There is no guard: this process imports nothing anew.
        setting = "set at run time"
        unsync.process_executor = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
        print(look().result(60))
    """
    done = run_python(program, *NO_FORK_WARNING)
    assert (done.stdout, done.stderr) == ("set at run time\n", "")


def test_functions_that_are_marked_anew_for_a_process(
    pool: concurrent.futures.ProcessPoolExecutor,
) -> None:
    result, pid = in_a_thread_first(3).result(PATIENCE)
    assert (result, pid == os.getpid()) == (9, False)
    assert marked_again(3).result(PATIENCE) == 9
    # Whose method is found by its name there, and is the marked one.
    assert unsync(Power(3).of, cpu_bound=True)(2).result(PATIENCE) == 8
    assert unsync(functools.partial(Power(3).of, 2), cpu_bound=True)().result(PATIENCE) == 8


# What no longer works where Python itself would fork.

NEEDS_WHAT_WAS_SET = """
import collections
import json
import multiprocessing
import os

from unsync import unsync

setting = None


@unsync(cpu_bound=True)
def read_setting(x):
    return setting[x]


def notes_of(failures):
    # How many notes the failures of each process have, which stands in their messages.
    found = collections.Counter()
    for failure in failures:
        assert type(failure) is KeyError
        found[failure.args[0]] += len(getattr(failure, "__notes__", ()))
    return sorted(set(found.values()))


registered = {}


@unsync(cpu_bound=True)
def look_up(x):
    return registered[os.getpid()]


@unsync(cpu_bound=True)
def fail(x):
    raise ValueError("boom")


@unsync(cpu_bound=True)
def upper(text):
    return text.upper()


@unsync
def text():
    return "text"


if __name__ == "__main__":
    if os.environ["START_METHOD"]:
        multiprocessing.set_start_method(os.environ["START_METHOD"])
    setting = {"x": 1}
    # These have nothing to do with it.
    failure = fail(1).exception(60)
    assert not hasattr(failure, "__notes__"), failure.__notes__
    failure = text().then(upper).exception(60)
    assert "map() would give it its result" in "".join(failure.__notes__)
    assert "never forks" not in "".join(failure.__notes__)
    failure = read_setting("x").exception(60)
    assert type(failure) is TypeError, failure
    notes = getattr(failure, "__notes__", [])
    unsync.shutdown()
    chunks = notes_of(call.exception(60) for call in unsync.calls(look_up, range(9), chunksize=3))
    print(json.dumps([notes, chunks]))
"""


@pytest.mark.parametrize("chosen", ["", *sorted({"fork", "spawn"} & {*START_METHODS})])
def test_the_first_failure_for_want_of_it_says_what_fork_would_have_brought(
    chosen: str, run_python: Run
) -> None:
    done = run_python(NEEDS_WHAT_WAS_SET, env={"START_METHOD": chosen})
    assert done.stderr == ""
    notes, of_each_process = json.loads(done.stdout)
    if (chosen or START_METHODS[0]) == "fork":
        (note,) = notes
        assert "unsync's own process pool never forks" in note
        assert "what the program sets when it runs" in note
        assert "assign an executor that forks to unsync.process_executor" in note
        assert of_each_process == [1]
    else:
        assert notes == []
        assert of_each_process == [0]


# In the process, with what is here as it is imported.

setting: Any = None
registered: dict[str, int] = {}
listed: list[int] = []


class Settings:
    values: ClassVar[dict[str, int]] = {}


def raise_it(failure: BaseException) -> NoReturn:
    raise failure


def failure_of(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as exc:
        return exc
    raise AssertionError("it did not fail")


def use_a_dict(given: dict[str, int]) -> int:
    return given["x"]


def use_an_unfuture(unfuture: Any) -> object:
    return unfuture.upper() + setting


def bound_later() -> int:
    return set_later  # noqa: F821  # type: ignore[name-defined]  # pyright: ignore[reportUndefinedVariable]


def unbound() -> int:
    if registered:
        value = 1
    return value  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize(
    "function",
    [
        lambda: setting["x"],
        lambda: setting.value,
        lambda: setting(),
        lambda: registered["x"],
        lambda: listed[0],
        lambda: Settings.values["x"],
        lambda: types.set_later,
        lambda: json.set_later,
        lambda: importlib.import_module("set_later"),
        bound_later,
    ],
)
def test_what_may_come_of_what_a_process_lacks_says_so_once(
    function: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_travel, "_note", "what it lacks")
    for notes in (["what it lacks"], []):
        carried = _travel.pack_failure("function", failure_of(function))
        assert isinstance(carried, bytes)
        assert getattr(pickle.loads(carried), "__notes__", []) == notes


@pytest.mark.parametrize(
    "function",
    [
        lambda: raise_it(ValueError("boom")),
        lambda: raise_it(KeyError("boom")),
        lambda: raise_it(NameError("boom")),
        lambda: raise_it(ImportError("boom")),
        lambda: raise_it(AttributeError("boom")),
        lambda: raise_it(KeyboardInterrupt()),
        lambda: use_a_dict({}),
        lambda: int("x") + setting,
        lambda: 1 / 0,
        lambda: json.loads("{}")["x"],
        lambda: use_an_unfuture(Unfuture.from_value("x")),
        lambda: len(None),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        unbound,
    ],
)
def test_what_does_not_says_nothing(
    function: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_travel, "_note", "what it lacks")
    failure = failure_of(function)
    _travel.pack_failure("function", failure)
    assert not hasattr(failure, "__notes__")


@pytest.mark.alone
def test_a_call_while_another_thread_imports_multiprocessing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = types.ModuleType("multiprocessing.process")
    monkeypatch.setitem(sys.modules, half.__name__, half)
    executors._end_if_importing_main()
    half = types.ModuleType("concurrent.futures.process")
    monkeypatch.setitem(sys.modules, half.__name__, half)
    assert not executors.in_thread_of_a_pool()
