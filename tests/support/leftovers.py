"""What a test can leave changed for those that come after it in the same process.

The guard in `tests/core/conftest.py` compares the state before a test with the one after it. It
does not look at the filters of warnings: pytest sets its own for each phase of a test, and takes
back whatever a test added.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import concurrent.futures.thread
import contextvars
import gc
import logging
import os
import signal
import sys
import threading
import types
from typing import Any

from support.waiting import collect, wait_until

import unsync as package
from unsync import executors

implementation: Any = sys.modules["unsync.unsync"]

LOGGERS = [None, "asyncio", "concurrent.futures", "unsync"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
# pytest's own word on which test runs.
CURRENT = "PYTEST_CURRENT_TEST"


def shared_state(module: types.ModuleType) -> dict[str, object]:
    """What belongs to the process, or to a test's module, and not to a test, by its name.

    Values are compared, so what can be changed in place is copied.
    """
    return {
        **_settings(),
        **_of_the_ambient_loop(),
        **_of_the_interpreter(),
        **_of_logging(),
        **{f"context variable {name.name}": value for name, value in _context()},
        **_of_a_module(module),
    }


def _settings() -> dict[str, object]:
    threads, processes = implementation._threads, implementation._processes
    return {
        "unsync.loop_factory": package.unsync.loop_factory,
        "unsync.thread_executor": threads.assigned,
        "unsync.process_executor": processes.assigned,
    }


def the_ambient_loop() -> Any:
    """The ambient loop and its thread, if they have been started."""
    return implementation._ambient._current


def _of_the_ambient_loop() -> dict[str, object]:
    """One that was not started yet counts as one to which nothing was done."""
    ambient = the_ambient_loop()
    if ambient is None:
        state: list[object] = [None, None, asyncio.coroutines._is_debug_mode(), 0.1]
    else:
        loop = ambient.loop
        state = [
            loop.get_task_factory(),
            loop.get_exception_handler(),
            loop.get_debug(),
            loop.slow_callback_duration,
        ]
    names = ["task factory", "exception handler", "debug mode", "slow_callback_duration"]
    return {f"the ambient loop's {name}": each for name, each in zip(names, state, strict=True)}


def _of_the_interpreter() -> dict[str, object]:
    return {
        "sys.getswitchinterval()": sys.getswitchinterval(),
        "sys.getrecursionlimit()": sys.getrecursionlimit(),
        "sys.gettrace()": sys.gettrace(),
        "sys.getprofile()": sys.getprofile(),
        "sys.excepthook": sys.excepthook,
        "sys.path": [*sys.path],
        "threading.excepthook": threading.excepthook,
        "gc.isenabled()": gc.isenabled(),
        # PyPy's collector has none, and cannot freeze.
        "gc.get_threshold()": getattr(gc, "get_threshold", tuple)(),
        "os.getcwd()": os.getcwd(),
        "os.environ": {name: text for name, text in os.environ.items() if name != CURRENT},
        "signal handlers": [signal.getsignal(number) for number in SIGNALS],
        "the event loop policy": _policy(),
    }


def _policy() -> object:
    """None for Python's own, which is made when somebody asks for it."""
    policy = getattr(asyncio.events, "_event_loop_policy", None)
    return None if type(policy).__module__.startswith("asyncio.") else policy


def _of_logging() -> dict[str, object]:
    state: dict[str, object] = {"logging.disable": logging.root.manager.disable}
    for name in LOGGERS:
        logger = logging.getLogger(name)
        values = [logger.level, logger.disabled, logger.propagate, *logger.handlers]
        state[f"logger {name or 'root'}"] = [*values, *logger.filters]
    return state


def _context() -> list[tuple[contextvars.ContextVar[Any], Any]]:
    """Without the context of `decimal`, which is there from its first use on."""
    return [each for each in contextvars.copy_context().items() if "decimal" not in each[0].name]


def _of_a_module(module: types.ModuleType) -> dict[str, object]:
    own = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    return {f"{module.__name__}.{name}": _copy(value) for name, value in own.items()}


def _copy(value: object) -> object:
    return type(value)(value) if type(value) in (dict, list, set) else value  # type: ignore[call-arg]


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names of what is another thing now, with both."""
    missing = "nothing"
    return [
        f"{name}: was {before.get(name, missing)!r}, is {after.get(name, missing)!r}"
        for name in {**before, **after}
        if not _same(before.get(name, missing), after.get(name, missing))
    ]


def _same(one: object, other: object) -> bool:
    """Only of what was copied are the contents compared: an object may refuse comparison."""
    if one is other:
        return True
    plain = (bool, dict, float, int, list, set, str, tuple)
    return type(one) is type(other) and isinstance(one, plain) and bool(one == other)


def threads() -> set[threading.Thread]:
    """All but those of unsync's own loop and pool, which are there for every test."""
    own = implementation._threads
    pool = own._executor._threads if own._executor is not None and own._is_ours else set()
    ambient = the_ambient_loop()
    return {*threading.enumerate()} - pool - ({ambient.thread} if ambient is not None else set())


def threads_of_no_pool() -> set[threading.Thread]:
    """Several tests may share an executor, which starts its threads when they are wanted."""
    return {thread for thread in threads() if not _is_of_a_pool(thread)}


def _is_of_a_pool(thread: threading.Thread) -> bool:
    if thread in concurrent.futures.thread._threads_queues:  # type: ignore[attr-defined]
        return True
    if any(thread in pool._threads for pool in [*executors._thread_executors]):
        return True
    # The two threads of a process pool.
    return executors._manages_processes(thread) or thread.name == "QueueFeederThread"


def tasks() -> set[asyncio.Task[Any]]:
    ambient = the_ambient_loop()
    return set() if ambient is None else asyncio.all_tasks(ambient.loop)


def wait_for_the_end_of(what: str, look: Any, before: set[Any]) -> None:
    """What a test started may take a moment more to end; an executor ends when it is collected."""

    def have_ended() -> bool:
        return look() <= before or (collect() or look() <= before)

    if not look() <= before:
        wait_until(have_ended, f"the end of the {what} that the test started: {look() - before}")
