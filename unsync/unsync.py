"""The decorator `unsync` and its settings: decides once, at decoration, how a function will run.

The module's name is that of earlier versions: `from unsync.unsync import Unfuture` works.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import inspect
import os
import threading
import types
import warnings
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from unsync import _common, context_managers, executors, streams
from unsync._ambient import Ambient, LoopFactory
from unsync._backend import (
    BIND_CLASS,
    BIND_INSTANCE,
    BIND_NOTHING,
    Launcher,
    Route,
    Unfuture,
    after_fork,
)
from unsync.context_managers import AmbientContextManager
from unsync.streams import Stream

__all__ = ["AmbientContextManager", "Stream", "Unfuture", "unsync"]

P = ParamSpec("P")
T = TypeVar("T")


class _Threads:
    """The thread executor in use, and the route of the functions that go there."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # guards what follows; held over a fork
        self._executor: concurrent.futures.Executor | None = None
        self._is_ours = True
        self.route = Route(self._submit_first)

    @property
    def executor(self) -> concurrent.futures.Executor:
        with self.lock:
            if self._executor is None:
                self._use(executors.ThreadExecutor(thread_name_prefix="unsync-worker"))
                self._is_ours = True
            assert self._executor is not None
            return self._executor

    @executor.setter
    def executor(self, executor: concurrent.futures.Executor | None) -> None:
        with self.lock:
            if executor is None:
                self._forget()
            else:
                _check_executor("unsync.thread_executor", executor)
                self._use(executor)
                self._is_ours = False

    def _forget(self) -> None:
        self._executor = None
        self.route.submit = self._submit_first

    def _use(self, executor: concurrent.futures.Executor) -> None:
        self._executor = executor
        self.route.submit = _way_into(executor)

    def _submit_first(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[Any]:
        return _way_into(self.executor)(function, args, kwargs)

    def stop(self, timeout: float | None) -> bool:
        """Ends the executor unless somebody else assigned it; whether it ended in time."""
        with self.lock:
            executor = self._executor
            if executor is None or not self._is_ours:
                return True
            self._forget()
        assert isinstance(executor, executors.ThreadExecutor)
        executor.shutdown(wait=False, cancel_futures=True)
        return executor.join(timeout)

    def after_fork(self) -> None:
        self.lock = threading.RLock()


class _Processes:
    """The process executor in use, and the route of the functions that go there."""

    def __init__(self) -> None:
        self.pool = executors.ProcessPool()
        self._assigned: concurrent.futures.Executor | None = None
        self.route = Route(self.pool.submit)

    @property
    def executor(self) -> concurrent.futures.Executor:
        return self.pool.executor if self._assigned is None else self._assigned

    @executor.setter
    def executor(self, executor: concurrent.futures.Executor | None) -> None:
        if executor is None:
            self._assigned = None
            self.route.submit = self.pool.submit
        else:
            _check_executor("unsync.process_executor", executor)
            self._assigned = executor
            self.route.submit = _way_into(executor)


def _way_into(
    executor: concurrent.futures.Executor,
) -> Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Unfuture[Any]]:
    if type(executor) is executors.ThreadExecutor:
        return executor.jobs.submit
    return functools.partial(executors.submit_to, executor)


def _check_executor(what: str, executor: object) -> None:
    if not isinstance(executor, concurrent.futures.Executor):
        raise TypeError(f"{what} must be a concurrent.futures.Executor, not {executor!r}")


_ambient = Ambient()
_threads = _Threads()
_processes = _Processes()


# One shutdown at a time: the second finds nothing left to end, and so tells the truth.
_ending = threading.RLock()


def _shutdown(timeout: float | None) -> bool:
    until = None if timeout is None else monotonic() + timeout

    def left() -> float | None:
        return None if until is None else max(0.0, until - monotonic())

    _ambient.check_not_inside()
    patience = -1.0 if timeout is None else min(timeout, threading.TIMEOUT_MAX)
    if executors.in_thread_of_a_pool():
        patience = 0.0  # another shutdown would wait for this thread
    if not _ending.acquire(timeout=patience):
        return False
    try:
        # Coroutines first: what they await in the executors is cancelled with them.
        ended = _ambient.stop(left())
        ended = _threads.stop(left()) and ended
        ended = _processes.pool.stop(left()) and ended
        # What ended last may have called a coroutine or a continuation, and so started the loop.
        return _ambient.stop(left()) and ended
    finally:
        _ending.release()


def _at_exit() -> None:
    _common.exiting = True
    _ambient.stop(executors.EXIT_SECONDS)
    executors.stop_threads(executors.EXIT_SECONDS)
    _processes.pool.stop(executors.EXIT_SECONDS)
    _ambient.stop(executors.EXIT_SECONDS)


def _before_fork() -> None:
    # No other thread may be in the middle of starting something: what it holds, the lock of an
    # import included, would be held in the child for ever.
    _ambient.lock.acquire()
    _processes.pool.lock.acquire()
    _threads.lock.acquire()


def _after_fork_in_parent() -> None:
    _threads.lock.release()
    _processes.pool.lock.release()
    _ambient.lock.release()


def _after_fork() -> None:
    global _ending
    _ending = threading.RLock()
    after_fork()
    _ambient.after_fork()
    _threads.after_fork()
    _processes.pool.after_fork()
    executors.after_fork()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork,
    )


class _Settings(type):
    """What is set on the class `unsync` itself, for all functions it marks."""

    @property
    def loop(cls) -> asyncio.AbstractEventLoop:
        """The ambient event loop, which runs the coroutines; started on first use."""
        return _ambient.loop

    @property
    def thread(cls) -> threading.Thread:
        """The ambient loop's thread; started on first use."""
        return _ambient.thread

    @property
    def loop_factory(cls) -> LoopFactory | None:
        """Makes the ambient loop, for example `uvloop.new_event_loop`.

        None, the default, means `asyncio.new_event_loop`, so that an installed policy counts.

        :raises RuntimeError: when set after the loop has started.
        :raises TypeError: when set to what is not callable.
        """
        return _ambient.loop_factory

    @loop_factory.setter
    def loop_factory(cls, factory: LoopFactory | None) -> None:
        _ambient.loop_factory = factory

    @property
    def thread_executor(cls) -> concurrent.futures.Executor:
        """Runs the regular functions: a `ThreadPoolExecutor` made on first use, or any `Executor`.

        Setting it to None brings back the default.

        :raises TypeError: when set to what is no `Executor`.
        """
        return _threads.executor

    @thread_executor.setter
    def thread_executor(cls, executor: concurrent.futures.Executor | None) -> None:
        _threads.executor = executor

    @property
    def process_executor(cls) -> concurrent.futures.Executor:
        """Runs the `cpu_bound` functions: a `ProcessPoolExecutor` made on first use, or any other.

        Setting it to None brings back the default.

        :raises TypeError: when set to what is no `Executor`.
        """
        return _processes.executor

    @process_executor.setter
    def process_executor(cls, executor: concurrent.futures.Executor | None) -> None:
        _processes.executor = executor

    def shutdown(cls, timeout: float | None = None) -> bool:
        """Ends everything that was started; the next call starts afresh.

        Coroutines see `CancelledError`, work that has not begun is cancelled, and functions that
        run are waited for. Executors that were assigned are left to their owners.

        :param timeout: how many seconds to wait in all; None for as long as it takes. After that,
            processes are terminated, and threads that still run are left behind.
        :returns: whether everything ended in time.
        :raises RuntimeError: in `unsync.thread`, which cannot wait for its own end.
        """
        return _shutdown(timeout)


class _Marked(Launcher[P, T], metaclass=_Settings):
    """Marks a function: calling it runs it elsewhere and returns an `Unfuture` at once.

    A coroutine function runs in the ambient event loop, in `unsync.thread`; a regular function in
    `unsync.thread_executor`; one marked `cpu_bound=True` in `unsync.process_executor`. Which of
    them is decided once, here. Context variables of the caller are seen by the first two.

    A generator function, async or regular, gives a `Stream` of its values instead: an async one
    runs in the ambient event loop, a regular one in the thread executor. What
    `contextlib.asynccontextmanager` made gives an `AmbientContextManager`.

    It can be written `@unsync`, `@unsync()`, `@unsync(option=...)` or `unsync(function)`, above
    functions, methods, static- and classmethods (or below those two), builtins,
    `functools.partial` and other callable objects.

    :param func: the function to mark; left out in the forms with parentheses.
    :param cpu_bound: run it in a process.
    :param executor: run it there instead: any `concurrent.futures.Executor`.
    :param read_ahead: how many values of a generator function are made, at most, before somebody
        asks for them; 64 if left away.
    :raises TypeError: if `func` is not callable; if a coroutine function is to run in an executor,
        or a generator function in a process; if `executor` is no `Executor`; if `read_ahead` is no
        number, or `func` no generator function.
    :raises ValueError: if `read_ahead` is less than 1.

    An option that nobody knows is ignored with a `RuntimeWarning` that names it.
    """

    def __new__(cls, *func: Callable[..., Any], **options: Any) -> Any:
        if func:
            return super().__new__(cls)
        return functools.partial(cls, **options)

    def __init__(
        self,
        func: Callable[..., Any],
        /,
        *,
        cpu_bound: bool = False,
        executor: concurrent.futures.Executor | None = None,
        read_ahead: int | None = None,
        **unknown: object,
    ) -> None:
        for option in unknown:
            warnings.warn(
                f"unsync() knows no option {option!r}, it is ignored; there are 'cpu_bound', "
                "'executor' and 'read_ahead'",
                RuntimeWarning,
                stacklevel=2,
            )
        function, binding = _unbind(func)
        if not callable(function):
            raise TypeError(f"unsync() marks functions and other callables, not {func!r}")
        if executor is not None:
            _check_executor("the option 'executor'", executor)
        elsewhere = "cpu_bound=True" if cpu_bound else "executor=" if executor is not None else ""
        if read_ahead is not None:
            _check_read_ahead(read_ahead)
        is_stream = True
        route: Route | None
        if _is_kind(inspect.isasyncgenfunction, function):
            if elsewhere:
                raise _no_way("async generator function", function, elsewhere, "async generators")
            route = Route(streams.in_ambient_loop(read_ahead or streams.READ_AHEAD))
        elif _is_generator_function(function):
            if cpu_bound or executors.is_process_pool(executor):
                raise TypeError(
                    f"the generator function {_name_of(function)} cannot run in a process: a "
                    "generator cannot travel; make it a function that returns a list, or leave "
                    f"{elsewhere} away"
                )
            threads = _threads.route if executor is None else Route(_way_into(executor), executor)
            route = Route(streams.in_threads(read_ahead or streams.READ_AHEAD, threads))
        elif context_managers.is_made_by_contextlib(_below_partials(function)):
            is_stream = False
            if elsewhere:
                raise _no_way("async context manager", function, elsewhere, "they")
            route = Route(context_managers.start)
        else:
            is_stream = False
            if _is_coroutine_function(function):
                if elsewhere:
                    raise _no_way("coroutine function", function, elsewhere, "coroutines")
                route = None
            elif executor is not None:
                route = Route(_way_into(executor), executor)
            else:
                route = (_processes if cpu_bound else _threads).route
        if read_ahead is not None and not is_stream:
            raise TypeError(
                f"{_name_of(function)} cannot be marked with read_ahead=: only generator functions "
                "make values ahead"
            )
        super().__init__(function, route, binding)
        functools.update_wrapper(self, function)

    def __getattr__(self, name: str) -> Any:
        if name == "__annotations__":
            # From Python 3.14 on they are not copied but evaluated when somebody asks.
            return self.__wrapped__.__annotations__
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<unsync {self.__wrapped__!r}>"

    def __reduce__(self) -> str:
        """It pickles as functions do: by name."""
        name = getattr(self, "__qualname__", None)
        if not isinstance(name, str):
            import pickle  # which takes longer to import than all the rest of unsync

            raise pickle.PicklingError(f"cannot pickle {self!r}: it has no name to be found by")
        return name


def _unbind(func: Any) -> tuple[Any, int]:
    """The function in a static- or classmethod, and what its first argument will be."""
    if isinstance(func, staticmethod):
        return func.__func__, BIND_NOTHING
    if isinstance(func, classmethod):
        return func.__func__, BIND_CLASS
    return func, BIND_INSTANCE


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _no_way(kind: str, function: Callable[..., Any], option: str, what: str) -> TypeError:
    return TypeError(
        f"the {kind} {_name_of(function)} cannot be marked with {option}: {what} run in the "
        "ambient event loop; make it a regular function or leave that away"
    )


def _check_read_ahead(read_ahead: object) -> None:
    if not isinstance(read_ahead, int):
        raise TypeError(f"read_ahead must be a number of values, not {read_ahead!r}")
    if read_ahead < 1:
        raise ValueError(f"read_ahead must be at least 1, not {read_ahead!r}")


def _is_kind(is_kind: Callable[[object], bool], function: Callable[..., Any]) -> bool:
    function = _below_partials(function)
    if isinstance(function, types.FunctionType):
        return is_kind(function)
    return is_kind(function) or is_kind(getattr(type(function), "__call__", None))  # noqa: B004


def _below_partials(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _is_generator_function(function: Callable[..., Any]) -> bool:
    if not _is_kind(inspect.isgeneratorfunction, function):
        return False
    # One below `types.coroutine` makes coroutines.
    code = getattr(_below_partials(function), "__code__", None)
    return code is None or not code.co_flags & inspect.CO_ITERABLE_COROUTINE


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    if _is_kind(inspect.iscoroutinefunction, function):
        return True
    function = _below_partials(function)
    # Compiled coroutine functions say it in asyncio's way.
    mark = getattr(asyncio.coroutines, "_is_coroutine", None)
    return mark is not None and getattr(function, "_is_coroutine", None) is mark


if TYPE_CHECKING:
    from unsync._types import Unsync

    unsync: Unsync
else:
    _Marked.__name__ = _Marked.__qualname__ = "unsync"
    unsync = _Marked
