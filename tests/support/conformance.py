"""CPython's own tests of futures, run against an Unfuture and our thread executor.

    python tests/support/conformance.py [NAME ...]

The tests come with the interpreter, in its `test` package: those of concurrent.futures' futures and
thread pools, with `Future` replaced by `Unfuture` and `ThreadPoolExecutor` by the class of
`unsync.thread_executor`; those of asyncio's futures; and those of its tasks, timeouts, task groups,
locks, queues and runners, with every future that a loop makes an `Unfuture`. All of them are run,
side by side in processes of their own, or those whose names (`Class.test`, `module.Class.test` for
the last kind) begin with a NAME.

What is known to differ is in DIFFERENCES, each with its reason. A test that fails and is not listed
is a failure; so is one that is listed and passes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import importlib.util
import subprocess
import sys
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from unsync import ACCELERATED, Unfuture
from unsync.executors import ThreadExecutor

REPR = "the text of its repr is its own"
PRIVATE = "it reads or sets private attributes of its own class"
LOOP = "it is about the one loop that an asyncio future belongs to; an Unfuture belongs to each"
WRAP = "an Unfuture is an asyncio future already: asyncio.wrap_future() gives it back"
DONE = "a cancelled Unfuture is done at once: no executor will come and tell those who wait()"
STOP = "a StopIteration comes as it is, as in concurrent.futures; only await wraps it"
AGAIN = "cancelling what is cancelled is True, as in concurrent.futures"
EXIT = "an atexit handler may still call functions"
PARKED = "what a task is parked on is not the Unfuture, which several tasks may await at once"
WHOLE = "it needs no __init__"
LOOPED_OVER = (
    "an Unfuture is not iterated over: who forgot result() or await would be given nothing"
)
CALLABLE = "a done-callback that cannot be called is a TypeError at once"

OUTSIDE = "where no loop runs, gather(), shield() and ensure_future() refuse an Unfuture"
REFUSED = "run_until_complete() refuses an Unfuture, which is what run_in_executor() gives here"
AT_ONCE = "a callback that is added where no loop runs is called in set_result(), not soon"
INSTANCE = "an Unfuture is no instance of asyncio.Future"
BY_HAND = "it steps the loop by hand: no loop runs in which an Unfuture could be awaited"

DIFFERENCES = {
    "FutureTests.test_repr": REPR,
    "FutureTests.test_multiple_set_result": REPR,
    "FutureTests.test_multiple_set_exception": REPR,
    "FutureTests.test_exception_with_success": PRIVATE,
    "ThreadPoolWaitTests.test_first_completed": DONE,
    "ThreadPoolWaitTests.test_first_exception_some_already_complete": DONE,
    "ThreadPoolFailingInitializerTest.test_initializer": PRIVATE,
    "ThreadPoolShutdownTest.test_submit_after_interpreter_shutdown": EXIT,
    "AsyncioFutureTests.test_cancel": AGAIN,
    "AsyncioFutureTests.test_constructor_use_global_loop": LOOP,
    "AsyncioFutureTests.test_constructor_use_running_loop": LOOP,
    "AsyncioFutureTests.test_constructor_without_loop": LOOP,
    "AsyncioFutureTests.test_future_cancel_message_getter": LOOP,
    "AsyncioFutureTests.test_future_cancel_message_setter": PRIVATE,
    "AsyncioFutureTests.test_future_disallow_multiple_initialization": WHOLE,
    "AsyncioFutureTests.test_future_iter_throw": LOOPED_OVER,
    "AsyncioFutureTests.test_future_repr": REPR,
    "AsyncioFutureTests.test_future_source_traceback": PRIVATE,
    "AsyncioFutureTests.test_future_stop_iteration_args": LOOPED_OVER,
    "AsyncioFutureTests.test_iter": LOOPED_OVER,
    "AsyncioFutureTests.test_log_traceback": PRIVATE,
    "AsyncioFutureTests.test_stop_iteration_exception": STOP,
    "AsyncioFutureTests.test_stop_iteration_subclass_exception": STOP,
    "AsyncioFutureTests.test_uninitialized": WHOLE,
    "AsyncioFutureTests.test_wrap_future": WRAP,
    "AsyncioFutureTests.test_wrap_future_cancel2": WRAP,
    "AsyncioFutureTests.test_wrap_future_use_global_loop": WRAP,
    "AsyncioFutureTests.test_wrap_future_use_running_loop": WRAP,
    "AsyncioFutureTests.test_wrap_future_without_loop": WRAP,
    "AsyncioFutureTests.test_yield_from_twice": PARKED,
}

DIFFERENCES |= {
    f"AsyncioFutureDoneCallbackTests.test_{name}": reason
    for name, reason in {
        "evil_call_soon_list_mutation": LOOP,
        "use_after_free_on_fut_callback_0_with_evil__eq__": CALLABLE,
        "use_after_free_on_fut_callback_0_with_evil__getattribute__": LOOP,
        "use_after_free_on_fut_context_0_with_evil__getattribute__": LOOP,
    }.items()
}
# Until then asyncio's futures refused a StopIteration; now they make another error of it.
if sys.version_info < (3, 11, 8) or (3, 12) <= sys.version_info < (3, 12, 2):
    DIFFERENCES["AsyncioFutureTests.test_exception"] = STOP

# The modules of asyncio's tests in which every future that a loop makes is an Unfuture, as far as a
# Python has them.
MODULES = (
    "test_eager_task_factory",
    "test_locks",
    "test_queues",
    "test_runners",
    "test_staggered",
    "test_taskgroups",
    "test_tasks",
    "test_threads",
    "test_timeouts",
    "test_waitfor",
)

# All classes for one kind of task or another are listed by their base.
DIFFERENCES |= {
    f"test_tasks.BaseTaskTests.test_{name}": reason
    for name, reason in {
        "cancel_gather_1": AT_ONCE,
        "cancel_task_catching": PARKED,
        "cancel_task_ignoring": PARKED,
        "ensure_future_error_msg": LOOP,
        "ensure_future_future": OUTSIDE,
        "gather_shield": OUTSIDE,
        "shield_cancel_inner": OUTSIDE,
        "shield_cancel_outer": OUTSIDE,
        "shield_cancel_outer_exception": OUTSIDE,
        "shield_cancel_outer_exception_never_retrieved": OUTSIDE,
        "shield_cancel_outer_in_task": PRIVATE,
        "shield_cancel_outer_result": OUTSIDE,
        "shield_cancel_outer_twice_exception": OUTSIDE,
        "shield_coroutine_use_global_loop": PRIVATE,
        "shield_coroutine_use_running_loop": PRIVATE,
        "shield_exception": OUTSIDE,
        "shield_gather": OUTSIDE,
        "shield_result": OUTSIDE,
        "shield_shortcut": OUTSIDE,
        "task_cancel_waiter_future": PARKED,
        "task_repr_wait_for": PARKED,
        "wait_discards_awaited_by_for_pending": PRIVATE,
    }.items()
}
if sys.version_info < (3, 14):  # from then on it makes the one step that is needed
    DIFFERENCES["test_tasks.BaseTaskTests.test_log_destroyed_pending_task"] = BY_HAND
DIFFERENCES |= {
    f"test_tasks.FutureGatherTests.test_{name}": reason
    for name, reason in {
        "constructor_empty_sequence_use_global_loop": INSTANCE,
        "constructor_empty_sequence_use_running_loop": INSTANCE,
        "constructor_heterogenous_futures": LOOP,
        "constructor_homogenous_futures": OUTSIDE,
        "one_cancellation": OUTSIDE,
        "one_exception": OUTSIDE,
        "result_exception_one_cancellation": OUTSIDE,
        "result_exception_success": OUTSIDE,
        "return_exceptions": OUTSIDE,
        "success": OUTSIDE,
    }.items()
}
DIFFERENCES |= {
    f"test_tasks.RunCoroutineThreadsafeTests.test_run_coroutine_threadsafe{name}": REFUSED
    for name in ("", "_task_cancelled", "_with_exception", "_with_timeout")
}

# These are not even run: they would wait for ever for what comes of the difference.
NOT_RUN = {
    "test_tasks.BaseTaskTests.test_other_loop_future": LOOP,
    "test_tasks.RunCoroutineThreadsafeTests"
    ".test_run_coroutine_threadsafe_task_factory_exception": REFUSED,
}

# Whether these pass is a matter of who is faster.
EITHER = {
    "ThreadPoolExecutorTest.test_idle_thread_reuse": (
        "a result is handed over before its worker is idle: the next call may start another one"
    ),
}

# Asyncio's tests that look at what is pending, which waits unless it is done in the ambient loop's
# thread, or that suspend themselves, for which a loop must run.
IN_THE_AMBIENT_LOOP = {
    "test_exception",
    "test_futureiter_send_after_close_no_crash",
    "test_futureiter_send_after_throw_no_crash",
    "test_result",
    "test_uninitialized",
    "test_yield_from_twice",
}

STATES: dict[str, dict[str, Any]] = {
    "PENDING_FUTURE": {},
    "RUNNING_FUTURE": {"state": "RUNNING"},
    "CANCELLED_FUTURE": {"state": "CANCELLED"},
    "CANCELLED_AND_NOTIFIED_FUTURE": {"state": "CANCELLED_AND_NOTIFIED"},
    "EXCEPTION_FUTURE": {"state": "FINISHED", "exception": OSError()},
    "SUCCESSFUL_FUTURE": {"state": "FINISHED", "result": 42},
}


def create_future(
    state: str = "PENDING", exception: BaseException | None = None, result: Any = None
) -> Unfuture[Any]:
    """In the place of CPython's helper, which sets private attributes."""
    unfuture: Unfuture[Any] = Unfuture()
    if state.startswith("CANCELLED"):
        unfuture.cancel()
    if state in {"RUNNING", "CANCELLED_AND_NOTIFIED"}:
        unfuture.set_running_or_notify_cancel()
    if state == "FINISHED":
        if exception is None:
            unfuture.set_result(result)
        else:
            unfuture.set_exception(exception)
    return unfuture


def concurrent_modules() -> list[ModuleType]:
    """CPython's tests of concurrent.futures: a package from Python 3.12 on."""
    package = importlib.import_module("test.test_concurrent_futures")
    if not hasattr(package, "__path__"):
        return [package]
    parts = ["util", "executor"]
    parts += [f"test_{part}" for part in ("future", "wait", "as_completed")]
    parts += [f"test_{part}" for part in ("thread_pool", "init", "shutdown")]
    return [importlib.import_module(f"{package.__name__}.{part}") for part in parts]


def concurrent_tests() -> Iterator[type[unittest.TestCase]]:
    modules = concurrent_modules()
    constants = {name: create_future(**arguments) for name, arguments in STATES.items()}
    for module in modules:
        for name, value in {
            "Future": Unfuture,
            "create_future": create_future,
            "assert_python_ok": with_our_executor(getattr(module, "assert_python_ok", None)),
            **constants,
        }.items():
            if hasattr(module, name):
                setattr(module, name, value)
        if hasattr(module, "ThreadPoolMixin"):
            module.ThreadPoolMixin.executor_type = ThreadExecutor
    replace_classes()
    found = {name: value for module in modules for name, value in vars(module).items()}
    for name, value in found.items():
        if not name.startswith(("Future", "ThreadPool")) or not isinstance(value, type):
            continue
        if issubclass(value, unittest.TestCase):
            yield value


def replace_classes() -> None:
    """For the tests that find them in concurrent.futures when they run."""
    concurrent.futures.Future = Unfuture  # type: ignore[assignment, misc]
    concurrent.futures.ThreadPoolExecutor = ThreadExecutor  # type: ignore[assignment, misc]


def with_our_executor(assert_python_ok: Any) -> Callable[..., Any]:
    """Has the programs that CPython's tests start import our executor from concurrent.futures."""
    preamble = (
        f"import sys; sys.path.insert(0, {str(Path(unsync_folder()))!r})\n"
        "import concurrent.futures, unsync.executors\n"
        "concurrent.futures.ThreadExecutor = unsync.executors.ThreadExecutor\n"
        "unsync.executors.EXIT_SECONDS = 60  # a second is just what theirs take\n"
    )

    def start(*args: str, **env: str) -> Any:
        return assert_python_ok(*args[:-1], preamble + args[-1], **env)

    return start


def unsync_folder() -> Path:
    import unsync as package

    return Path(package.__file__).parent.parent


def asyncio_tests() -> Iterator[type[unittest.TestCase]]:
    module = importlib.import_module("test.test_asyncio.test_futures")
    replace_classes()

    def new_future(self: Any, *args: Any, loop: object = None, **kwargs: Any) -> Unfuture[Any]:
        return Unfuture(*args, **kwargs)

    collect_garbage = module.support.gc_collect

    def collect() -> None:
        """Waits for the ambient loop to report the failures of what has died."""
        collect_garbage()
        Unfuture(asyncio.sleep(0)).result()

    module.support.gc_collect = collect

    class Ours:
        cls = Unfuture
        _new_future = new_future

        def _callTestMethod(self, method: Callable[[], None]) -> None:  # noqa: N802
            async def call() -> None:
                method()

            try:
                if method.__name__ in IN_THE_AMBIENT_LOOP:
                    Unfuture(call()).result()
                else:
                    method()
            finally:
                collect()

    for name in ("BaseFutureTests", "BaseFutureDoneCallbackTests"):
        bases = (Ours, getattr(module, name), module.test_utils.TestCase)
        yield type(f"Asyncio{name[4:]}", bases, {})


def module_tests(name: str) -> Iterator[type[unittest.TestCase]]:
    """Those of one of MODULES; from then on loops make Unfutures."""

    def create_future(loop: asyncio.AbstractEventLoop) -> Unfuture[Any]:
        return Unfuture()

    def new_future(self: object, loop: asyncio.AbstractEventLoop) -> Unfuture[Any]:
        return Unfuture()

    asyncio.BaseEventLoop.create_future = create_future  # type: ignore[assignment, method-assign]
    module = importlib.import_module(f"test.test_asyncio.{name}")
    if hasattr(module, "BaseTaskTests"):
        module.BaseTaskTests.new_future = new_future
        module.BaseTaskTests.listed_as = "BaseTaskTests"
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            value.module = name  # type: ignore[attr-defined]
            yield value


def modules() -> list[str]:
    """Those of MODULES that this Python has."""
    return [name for name in MODULES if has(f"test.test_asyncio.{name}")]


def has(module: str) -> bool:
    """Whether this Python has it: some distributions leave tests out."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what it is in
        return False


def tests_of(case: type[unittest.TestCase]) -> Iterator[unittest.TestCase]:
    for test in unittest.TestLoader().loadTestsFromTestCase(case):
        assert isinstance(test, unittest.TestCase)
        if name_of(test) not in NOT_RUN:
            yield test


def name_of(test: unittest.TestCase) -> str:
    name = f"{getattr(test, 'listed_as', type(test).__name__)}.{test._testMethodName}"
    module = getattr(test, "module", None)
    return name if module is None else f"{module}.{name}"


class Outcomes(unittest.TextTestResult):
    """Knows the differences."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.as_listed: list[str] = []

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        if name_of(test) in DIFFERENCES:
            self.addUnexpectedSuccess(test)
        else:
            super().addSuccess(test)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        if not self.is_listed(test):
            super().addFailure(test, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        if not self.is_listed(test):
            super().addError(test, err)

    def is_listed(self, test: unittest.TestCase) -> bool:
        if not isinstance(test, unittest.TestCase):
            return False  # of the class or the module as a whole
        name = name_of(test)
        if name in DIFFERENCES or name in EITHER:
            self.as_listed.append(name)
            return True
        return False


def run(names: list[str]) -> bool:
    from test import support

    # What waits for private attributes to be set waits no longer than this, in seconds.
    support.SHORT_TIMEOUT = 10.0
    asked = [name for name in modules() if any(each.startswith(name) for each in names)]
    if asked:
        classes = [case for name in asked for case in module_tests(name)]
    else:
        classes = [*asyncio_tests()]
        if has("test.test_concurrent_futures"):
            classes += concurrent_tests()
    suite = unittest.TestSuite(
        test
        for case in classes
        for test in tests_of(case)
        if name_of(test).startswith(tuple(names))
    )
    result = unittest.TextTestRunner(verbosity=2, resultclass=Outcomes).run(suite)
    for test in result.unexpectedSuccesses:
        print(f"passes though it is listed to differ: {name_of(test)}", file=sys.stderr)
    return result.wasSuccessful()


def main() -> int:
    if sys.argv[1:]:
        return 0 if run(sys.argv[1:]) else 1
    if not has("test.test_asyncio"):
        print("skipped: this Python has no test package; some distributions leave it out")
        return 0
    names = [*modules(), *sorted({case.__name__ for case in asyncio_tests()})]
    if has("test.test_concurrent_futures"):
        names += sorted({case.__name__ for case in concurrent_tests()})
    else:
        print("left out: this Python has no test.test_concurrent_futures")
    print(f"CPython's tests, {'compiled' if ACCELERATED else 'pure'} core: {', '.join(names)}")
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, f"{name}."],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in names
    ]
    failed = 0
    for name, process in zip(names, runs, strict=True):
        output, _ = process.communicate()
        if process.returncode:
            failed += 1
            print(output)
        print(f"{name}: {'passed' if process.returncode == 0 else 'FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
