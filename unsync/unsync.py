"""The decorator `unsync` and its settings: decides once, at decoration, how a function will run.

The module's name is that of earlier versions: `from unsync.unsync import Unfuture` works.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import inspect
import os
import sys
import threading
import types
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import unsync as package
from unsync import _common, _travel, _views, executors
from unsync._ambient import Ambient, LoopFactory
from unsync._backend import (
    BIND_CLASS,
    BIND_INSTANCE,
    BIND_NOTHING,
    JobQueue,
    Launcher,
    Route,
    Unfuture,
    after_fork,
)
from unsync._common import monotonic
from unsync.executors import Engine

if TYPE_CHECKING:
    from unsync._backend import Mailbox
    from unsync.context_managers import AmbientContextManager
    from unsync.streams import Stream

__all__ = ["AmbientContextManager", "Stream", "Unfuture", "unsync"]

P = ParamSpec("P")
T = TypeVar("T")

# What many programs never need is not imported here: where it is used, the package is asked for it,
# which imports it then.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in ("AmbientContextManager", "Stream"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(package, name)
        return found


class _Threads:
    """The thread executor in use, and the route of the functions that go there."""

    def __init__(self) -> None:
        self.lock = _common.Making()  # guards what follows; held over a fork
        self._executor: concurrent.futures.Executor | executors.Given | None = None
        self._is_ours = True
        self.route = Route(self._submit_first)

    @property
    def executor(self) -> concurrent.futures.Executor:
        there = self._executor
        while there is None or self._was_shut_down():
            with self.lock:
                if self._executor is None or self._was_shut_down():
                    made = executors.ThreadExecutor(thread_name_prefix="unsync-worker")
                    made.when_refused(self._replace)
                    # If no finalizer has made one meanwhile.
                    if self._executor is None or self._was_shut_down():
                        self._use(made)
                        self._is_ours = True
            there = self._executor
        return _executor_of(there)

    @executor.setter
    def executor(self, engine: Engine | None) -> None:
        with self.lock:
            if engine is None:
                self._forget()
            else:
                self._use(_engine("unsync.thread_executor", engine))
                self._is_ours = False

    @property
    def assigned(self) -> concurrent.futures.Executor | executors.Given | None:
        return None if self._is_ours else self._executor

    def _was_shut_down(self) -> bool:
        """Whether the default executor was, by whoever used it: `with`, say."""
        return self._is_ours and not _common.exiting and getattr(self._executor, "_shutdown", False)

    def _replace(self) -> None:
        """A call was refused, and finds another executor if it was refused for that reason."""
        with self.lock:
            if self._was_shut_down():
                self._forget()

    def _forget(self) -> None:
        self._executor = None
        self.route.submit = self._submit_first

    def _use(self, engine: concurrent.futures.Executor | executors.Given) -> None:
        self._executor = engine
        self.route.submit = executors.way_into(engine)

    def _submit_first(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[Any]:
        return executors.way_into(self.executor)(function, args, kwargs)

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
        self.lock = _common.Making()


class _Processes:
    """The process executor in use, and the route of the functions that go there."""

    def __init__(self) -> None:
        self.pool = executors.ProcessPool(_before_processes_end)
        self.assigned: concurrent.futures.Executor | executors.Given | None = None
        self.route = Route(self.pool.submit)

    @property
    def executor(self) -> concurrent.futures.Executor:
        assigned = self.assigned
        return self.pool.executor if assigned is None else _executor_of(assigned)

    @executor.setter
    def executor(self, engine: Engine | None) -> None:
        if engine is None:
            self.assigned = None
            self.route.submit = self.pool.submit
        else:
            self.assigned = _engine("unsync.process_executor", engine)
            self.route.submit = executors.way_into(self.assigned)


def _engine(what: str, engine: Engine) -> concurrent.futures.Executor | executors.Given:
    if isinstance(engine, concurrent.futures.Executor | executors.Given):
        return engine
    if callable(engine):
        return executors.Given(what, engine)
    raise TypeError(
        f"{what} must be a concurrent.futures.Executor, or a callable that gives one, not "
        f"{engine!r}"
    )


def _route_to(engine: concurrent.futures.Executor | executors.Given) -> Route:
    return Route(executors.way_into(engine), engine)


def _executor_of(
    engine: concurrent.futures.Executor | executors.Given,
) -> concurrent.futures.Executor:
    return engine.executor if isinstance(engine, executors.Given) else engine


def _before_processes_end() -> None:
    """Has the end of this process begin before it would wait for those of a pool.

    `concurrent.futures` waits for them in a hook of `threading`, of which the last one comes first;
    so this one is added when that is there. In a process of multiprocessing's own an exit function
    of that comes before the hooks, and joins the children.
    """
    import multiprocessing.util

    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(_finish_processes)
    multiprocessing.util.Finalize(None, _finish_processes, exitpriority=100)


_ambient = Ambient()
_threads = _Threads()
_processes = _Processes()


# One shutdown at a time: the second finds nothing left to end, and so tells the truth.
_ending = threading.RLock()


def _until(timeout: float | None) -> float | None:
    """When that is over, on the monotonic clock; None for never, as for an infinite number.

    :raises ValueError: if it is no number.
    """
    if timeout is None:
        return None
    _common.check_timeout(timeout)
    return None if timeout > threading.TIMEOUT_MAX else monotonic() + timeout


def ambient_mailbox() -> Mailbox | None:
    """Of the ambient loop, if it runs."""
    return _ambient.mailbox


def _drain(timeout: float | None) -> bool:
    until = _until(timeout)
    _check_may_drain("drain", timeout)
    return _drain_until(until)


def _check_may_drain(name: str, timeout: float | None, option: str = "") -> None:
    """Of this thread, which is going to wait for everything.

    :param name: of the function that was called, with that timeout.
    :param option: what else it was given, as a call shows it after the timeout.
    :raises RuntimeError: if it must not: it would wait for itself, or keep a loop from its work.
    """
    _ambient.check_not_inside(name)
    if executors.in_thread_of_a_pool() or executors.in_call_elsewhere():
        raise RuntimeError(
            f"unsync.{name}() cannot be called in a thread of a pool: it would wait for itself"
        )
    if _common.running_loop() is not None:
        given = "" if timeout is None else f", {timeout!r}"
        raise RuntimeError(
            f"unsync.{name}() would block the event loop that runs here; there it is "
            f"`await asyncio.to_thread(unsync.{name}{given}{option})`"
        )


def _drain_until(until: float | None) -> bool:
    with package._drain.Drain(ambient_mailbox) as drain:
        return drain.wait(until)


# How long coroutines have to clean up, in seconds, if a drain has taken all the time.
_CLEAN_UP_SECONDS = 1.0


def _shutdown(timeout: float | None, drain: bool) -> bool:
    until = _until(timeout)
    drained = True
    if drain:
        _check_may_drain("shutdown", timeout, ", drain=True")
        drained = _drain_until(until)
        if until is not None:
            until = max(until, monotonic() + _CLEAN_UP_SECONDS)
    else:
        _ambient.check_not_inside("shutdown")
    patience = _common.seconds_left(until)
    if executors.in_thread_of_a_pool():
        patience = 0.0  # another shutdown would wait for this thread
    if not _ending.acquire(timeout=-1.0 if patience is None else patience):
        return False
    try:
        # Coroutines first: what they await in the executors is cancelled with them.
        ended = _ambient.stop(_common.seconds_left(until))
        ended = _threads.stop(_common.seconds_left(until)) and ended
        ended = _processes.pool.stop(_common.seconds_left(until)) and ended
        # What ended last may have called a coroutine or a continuation, and so started the loop.
        return _ambient.stop(_common.seconds_left(until)) and ended and drained
    finally:
        _ending.release()


def _stats() -> package._stats.Stats:
    work = package._stats.Work
    (*loop_sums, wakeups, saved), loops = _ambient.book.read()
    thread_sums, queues = executors.read_queues()
    processes, others = executors.read_others()
    queued, workers, idle, waiting = map(sum, zip((0,) * 4, *queues, strict=True))
    return package._stats.Stats(
        coroutines=work(*loop_sums),
        threads=work(*thread_sums),
        processes=work(*processes),
        executors=work(*others),
        loop_queue=sum(left for left, _ in loops),
        thread_queue=queued,
        workers=workers,
        workers_idle=idle,
        workers_waiting=waiting,
        wakeups=wakeups,
        wakeups_saved=saved,
        loop_lag=max((lag for _, lag in loops), default=0.0),
    )


_exit_timeout: float | None = None


def _check_exit_timeout(timeout: float | None) -> float | None:
    if timeout is not None:
        if not isinstance(timeout, (int, float)):
            raise TypeError(
                f"unsync.exit_timeout must be a number of seconds, or None, not {timeout!r}"
            )
        _common.check_timeout(timeout)
        if timeout < 0:
            raise ValueError(f"unsync.exit_timeout must be at least 0, not {timeout!r}")
    return timeout


# Made by the first of the hooks.
_end: package._exit.End | None = None


def _the_end() -> package._exit.End:
    global _end
    if _end is None:
        _end = package._exit.End(_ambient, _processes.pool, _exit_timeout)
    return _end


def _take_step(step: Callable[[package._exit.End], None]) -> None:
    """Of the end. A Ctrl-C at any point of it ends what it waits for, and not the step itself."""
    interrupted = False
    while True:
        try:
            end = _the_end()
            end.is_interrupted |= interrupted
            step(end)
            return
        except KeyboardInterrupt:
            interrupted = True


def _finish_functions() -> None:
    _take_step(lambda end: end.finish_functions())


def _finish_processes() -> None:
    _take_step(lambda end: end.finish_processes())


def _finish() -> None:
    _take_step(lambda end: end.finish())


def _import_before_fork() -> None:
    # Else another thread may be in the middle of it, and the module's lock held in the child for
    # ever. The package itself may be half imported.
    for name in getattr(package, "_LATER", ()):
        getattr(package, name)


def _before_fork() -> None:
    # No other thread may be in the middle of starting something: what it holds, the lock of an
    # import included, would be held in the child for ever.
    _ambient.lock.acquire()
    _processes.pool.lock.acquire()
    _threads.lock.acquire()
    executors.before_fork()


def _after_fork_in_parent() -> None:
    executors.after_fork_in_parent()
    _threads.lock.release()
    _processes.pool.lock.release()
    _ambient.lock.release()


def _after_fork() -> None:
    global _ending, _end
    _ending, _end = threading.RLock(), None
    after_fork()
    _common.after_fork()
    _views.after_fork()
    if "_drain" in vars(package):
        package._drain.after_fork()
    _ambient.after_fork()
    _threads.after_fork()
    _processes.pool.after_fork()
    executors.after_fork()


if _common.DAEMONIC:
    with contextlib.suppress(RuntimeError, AttributeError):  # imported at the very end
        threading._register_atexit(_finish_functions)  # type: ignore[attr-defined]
    atexit.register(_finish)
else:  # Python waits for our threads after `threading`'s hooks, and would do so for ever
    threading._register_atexit(_finish)  # type: ignore[attr-defined]
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork,
    )
    os.register_at_fork(before=_import_before_fork)  # the last one is called first


def _assigned() -> dict[str, object]:
    """The settings that somebody assigned, as they can be assigned again."""
    settings: dict[str, object] = {
        "exit_timeout": _exit_timeout,
        "loop_factory": _ambient.loop_factory,
        "process_executor": _processes.assigned,
        "thread_executor": _threads.assigned,
    }
    return {name: value for name, value in settings.items() if value is not None}


class _Settings(type):
    """What is set on the class `unsync` itself, for all functions it marks.

    Deleting a setting brings its default back, so that tests can patch it. One that nobody knows is
    an AttributeError.
    """

    @property  # type: ignore[misc]
    def __dict__(cls) -> Any:  # type: ignore[override]
        """With the settings that were assigned.

        mock and pytest's monkeypatch, which replace one for a while, look here for what is to come
        back, and delete what was not here.
        """
        own: Any = type.__dict__["__dict__"].__get__(cls)
        if cls.__module__ != __name__:
            return own
        return types.MappingProxyType({**own, **_assigned()})

    def __dir__(cls) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in vars(_Settings) if name[0] != "_")})

    def __setattr__(cls, name: str, value: object) -> None:
        # Not by hasattr(), which would start what a setting stands for.
        if cls.__module__ == __name__ and not name.startswith("_") and name not in dir(cls):
            import difflib

            (near,) = difflib.get_close_matches(name, dir(cls), 1) or [""]
            hint = f"; did you mean {near!r}?" if near else ""
            raise AttributeError(f"unsync has no setting {name!r}{hint}")
        if name in ("loop", "thread"):
            raise AttributeError(
                f"unsync.{name} is what the first call starts, and cannot be set; "
                "unsync.loop_factory says which event loop that is"
            )
        super().__setattr__(name, value)

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

        None, the default, means `asyncio.new_event_loop`, so that an installed policy counts. It is
        called once for each loop; but if it waits for a call, and another thread needs the loop
        meanwhile, there as well: the first loop counts, and another one is closed.

        :raises RuntimeError: when set after the loop has started.
        :raises TypeError: when set to what is not callable.
        """
        return _ambient.loop_factory

    @loop_factory.setter
    def loop_factory(cls, factory: LoopFactory | None) -> None:
        _ambient.loop_factory = factory

    @loop_factory.deleter
    def loop_factory(cls) -> None:
        _ambient.loop_factory = None

    @property
    def thread_executor(cls) -> concurrent.futures.Executor:
        """Runs the regular functions: a `ThreadExecutor` made on first use, or any `Executor`.

        It can also be set to a callable that gives one, which is called at first use, and again
        when what it gave was shut down. Setting it to None brings back the default.

        :raises TypeError: when set to what is no `Executor` and not callable; when the callable
            gives something else.
        """
        return _threads.executor

    @thread_executor.setter
    def thread_executor(cls, executor: Engine | None) -> None:
        _threads.executor = executor

    @thread_executor.deleter
    def thread_executor(cls) -> None:
        _threads.executor = None

    @property
    def process_executor(cls) -> concurrent.futures.Executor:
        """Runs the `cpu_bound` functions: a `ProcessPoolExecutor` made on first use, or any other.

        It can also be set to a callable that gives one, which is called at first use, and again
        when what it gave was shut down. Setting it to None brings back the default.

        :raises TypeError: when set to what is no `Executor` and not callable; when the callable
            gives something else.
        """
        return _processes.executor

    @process_executor.setter
    def process_executor(cls, executor: Engine | None) -> None:
        _processes.executor = executor

    @process_executor.deleter
    def process_executor(cls) -> None:
        _processes.executor = None

    @property
    def exit_timeout(cls) -> float | None:
        """How many seconds the end of the interpreter waits for functions and coroutines, in all.

        None, the default, is for as long as it takes. What has not ended then is told on stderr.

        :raises TypeError: when set to what is neither a number nor None.
        :raises ValueError: when set to less than 0, or nan.
        """
        return _exit_timeout

    @exit_timeout.setter
    def exit_timeout(cls, timeout: float | None) -> None:
        global _exit_timeout
        _exit_timeout = _check_exit_timeout(timeout)

    @exit_timeout.deleter
    def exit_timeout(cls) -> None:
        global _exit_timeout
        _exit_timeout = None

    def stats(cls) -> package._stats.Stats:
        """What was done and what is pending: counts that only grow, and depths of queues.

        They are always kept; asking for them takes some microseconds, and any thread may.
        """
        return _stats()

    def calls(
        cls, function: Callable[..., Any], *iterables: Iterable[Any], chunksize: int | None = None
    ) -> list[Unfuture[Any]]:
        """Calls `function(a, b, ...)` for each `a, b, ...` of the iterables, until one has ended.

        As if each call were made alone, but calls to processes, and to any executor that is no
        `ThreadExecutor`, travel in chunks: which pays for many small ones. Each has its own
        outcome; also that it was refused.

        :param function: a marked function, or a method or `functools.partial` of one.
        :param chunksize: how many calls go together; None for about four chunks to each worker,
            of up to 1024 calls. Coroutines and thread functions need no chunks.
        :raises TypeError: if the function is not marked, or gives a stream or a context manager; if
            there is no iterable, or `chunksize` is no number.
        :raises ValueError: if `chunksize` is less than 1.
        """
        return package.fan_out.make_calls(_target("calls", function), iterables, chunksize)

    def map(
        cls,
        function: Callable[..., Any],
        *iterables: Iterable[Any],
        chunksize: int | None = None,
        in_order: bool = True,
        read_ahead: int | None = None,
    ) -> package.Stream[Any]:
        """The results of such calls as a `Stream`, made as they are wanted.

        The first calls are made at once, the others when a consumer comes for a value; it then
        reads the iterables, which may be endless. The first failure, of a call or of an iterable,
        is raised in its turn and ends the stream. What has not begun when a stream ends, or is
        left, is cancelled.

        :param function: as for `calls`.
        :param chunksize: as for `calls`; where none of the iterables has a length, None is for
            chunks that grow from one call to 256.
        :param in_order: whether values come in the order of the arguments, or as calls are done.
        :param read_ahead: how many calls are made, at most, whose values nobody has taken; None
            for four chunks to each worker, but at least 64, or 4096 in chunks. More are made when
            a consumer comes and has taken an eighth of them, or half of them in chunks.
        :raises TypeError: as `calls`; if `read_ahead` is no number.
        :raises ValueError: if `chunksize` is less than 1, or `read_ahead` less than `chunksize`.
        """
        if read_ahead is not None:
            _check_read_ahead(read_ahead)
        target = _target("map", function)
        return package.fan_out.stream_calls(target, iterables, chunksize, in_order, read_ahead)

    def drain(cls, timeout: float | None = None) -> bool:
        """Waits, in a plain thread, for what is pending now and for what that calls in turn.

        That is every call of a marked function, to wherever it goes, and every continuation; not
        what others call meanwhile, nor the generator of a stream or a context manager that waits
        for its user. Nothing is cancelled, and nothing refused.

        :param timeout: how many seconds to wait; None for as long as it takes.
        :returns: whether all of it has ended; False after `timeout` seconds.
        :raises RuntimeError: where it must not wait: in `unsync.thread`, in a thread of a pool, in
            a call that another executor makes, and where an event loop runs: there it is
            `await asyncio.to_thread(unsync.drain, timeout)`.
        :raises ValueError: if `timeout` is nan.
        """
        return _drain(timeout)

    def shutdown(cls, timeout: float | None = None, *, drain: bool = False) -> bool:
        """Ends everything that was started; the next call starts afresh.

        Coroutines see `CancelledError`, work that has not begun is cancelled, and functions that
        run are waited for. Executors that were assigned are left to their owners: calls that are
        pending there go on, and do not count here; `drain` waits for them.

        :param timeout: how many seconds to wait in all; None for as long as it takes. After that,
            processes are terminated, and threads that still run are left behind.
        :param drain: waits first, for up to `timeout` seconds, as `unsync.drain()` does. Coroutines
            have a second then to clean up, if that is more than what is left.
        :returns: whether everything that it ends ended in time.
        :raises RuntimeError: in `unsync.thread`, which cannot wait for its own end; with `drain` as
            `unsync.drain()` does: where an event loop runs it is
            `await asyncio.to_thread(unsync.shutdown, timeout, drain=True)`.
        :raises ValueError: if `timeout` is nan.
        """
        return _shutdown(timeout, drain)


class _Marked(Launcher[P, T], metaclass=_Settings):
    """Marks a function: calling it runs it elsewhere and returns an `Unfuture` at once.

    A coroutine function runs in the ambient event loop, in `unsync.thread`; a regular function in
    `unsync.thread_executor`; one marked `cpu_bound=True` in `unsync.process_executor`. Which of
    them is decided once, here. Context variables of the caller are seen by the first two. If a
    regular function returns a coroutine, that is run, and its outcome is that of the call.

    A generator function, async or regular, gives a `Stream` of its values instead: an async one
    runs in the ambient event loop, a regular one in the thread executor. What
    `contextlib.asynccontextmanager` made gives an `AmbientContextManager`.

    It can be written `@unsync`, `@unsync()`, `@unsync(option=...)` or `unsync(function)`, above
    functions, methods, static- and classmethods (or below those two), builtins,
    `functools.partial` and other callable objects.

    A function that is marked already, or a bound method or `functools.partial` of one, is marked
    anew, with the options that are given now; if none are, with those that it has.

    :param func: the function to mark; left out in the forms with parentheses.
    :param cpu_bound: run it in a process.
    :param executor: run it there instead: any `concurrent.futures.Executor`, or a callable that
        gives one at the first call, and another one after that was shut down.
    :param read_ahead: how many values of a generator function are made, at most, before somebody
        asks for them; 64 if left away.
    :raises TypeError: if `func` is not callable; if a coroutine function is to run in an executor,
        or a generator function in a process; if `executor` is no `Executor` and not callable; if
        `read_ahead` is no number, or `func` no generator function.
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
        executor: Engine | None = None,
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
        wrapped = function
        inner: _Marked[..., Any] | None = None  # whose options are taken
        below, marked = _unmarked(function)
        if marked is not None:
            # What that gives would be an Unfuture within an Unfuture.
            if marked is function:
                func, function, binding = _below(marked, binding)
            else:
                func = function = below
            if not cpu_bound and executor is None and read_ahead is None:
                inner = marked
                _, cpu_bound, executor, read_ahead = inner._marking
        if not callable(function):
            raise TypeError(f"unsync() marks functions and other callables, not {func!r}")
        if isinstance(function, type) and function.__flags__ & _PY_TPFLAGS_HEAPTYPE:
            raise TypeError(
                f"unsync() cannot mark the class {_name_of(function)}: making one would go to "
                "another thread, and its methods stay as they are; mark those, or a function that "
                "makes one"
            )
        engine = None
        if executor is not None and inner is None:
            engine = _engine("the option 'executor'", executor)
        elsewhere = "cpu_bound=True" if cpu_bound else "executor=" if executor is not None else ""
        if read_ahead is not None:
            _check_read_ahead(read_ahead)
        gives = "Stream"
        route: Route | None
        if inner is not None:
            # The same, so that a callable which gives the executor is asked once for both.
            gives, route = inner._gives, inner._goes_to
        elif _is_kind(inspect.isasyncgenfunction, function):
            if elsewhere:
                raise _no_way("async generator function", function, elsewhere, "async generators")
            streams = package.streams
            route = Route(streams.in_ambient_loop(read_ahead or streams.READ_AHEAD))
        elif _is_generator_function(function):
            if cpu_bound or executors.is_process_pool(executor):
                raise TypeError(
                    f"the generator function {_name_of(function)} cannot run in a process: a "
                    "generator cannot travel; make it a function that returns a list, or leave "
                    f"{elsewhere} away"
                )
            streams = package.streams
            threads = _threads.route if engine is None else _route_to(engine)
            route = Route(streams.in_threads(read_ahead or streams.READ_AHEAD, threads))
        elif _is_made_by_contextlib(_below_partials(function)):
            gives = "AmbientContextManager"
            if elsewhere:
                raise _no_way("async context manager", function, elsewhere, "they")
            route = Route(package.context_managers.start)
        else:
            gives = "Unfuture"
            if _is_coroutine_function(function):
                if elsewhere:
                    raise _no_way("coroutine function", function, elsewhere, "coroutines")
                route = None
            elif engine is not None:
                route = _route_to(engine)
            else:
                route = (_processes if cpu_bound else _threads).route
        if read_ahead is not None and gives != "Stream":
            raise TypeError(
                f"{_name_of(function)} cannot be marked with read_ahead=: only generator functions "
                "make values ahead"
            )
        super().__init__(function, route, binding)
        attributes = _Attributes()
        object.__setattr__(self, "__dict__", attributes)
        functools.update_wrapper(self, wrapped)
        self.__wrapped__ = function
        self._marking: tuple[Any, bool, Engine | None, int | None]
        self._marking = func, cpu_bound, executor, read_ahead
        # After what the function may have brought of another one.
        self._gives: str
        self._goes_to: Route | None
        self._gives, self._goes_to = gives, route
        if gives == "Unfuture" and route is None:
            _mark_as_awaited(self)
        # A subclass may have its own way to be called.
        if type(self).__call__ is Launcher.__call__:
            call = _AwaitedCall if gives == "Unfuture" else _Call
            attributes["__call__"] = call(function, route)

    def __getattr__(self, name: str) -> Any:
        if name == "__annotations__":
            # From Python 3.14 on they are not copied but evaluated when somebody asks.
            return self.__wrapped__.__annotations__
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"<unsync {self.__wrapped__!r}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        """It pickles as functions do: by name, or as cloudpickle has it."""
        if "_came_by_value" in self.__dict__ or _is_for_cloudpickle(sys._getframe(1)):
            return _reduce_by_value(self)
        name = getattr(self, "__qualname__", None)
        if not isinstance(name, str):
            import pickle  # which takes longer to import than all the rest of unsync

            raise pickle.PicklingError(f"cannot pickle {self!r}: it has no name to be found by")
        return name


class _Attributes(dict[str, Any]):
    """The attributes of a marked function, without our own for whoever copies them.

    `functools.wraps` does, for a function around the marked one, which may well wait for the result
    itself, and is called itself.
    """

    def keys(self) -> Any:
        return super().keys() - _OURS

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


class _Call(Launcher[P, T]):
    """Returns at once; the function runs elsewhere."""

    # What `marked.__call__` is: it does the same, and tells of itself what a method cannot. Those
    # who are to call something that is no function look there: mock and Celery for its arguments,
    # Jupyter for the docstring, FastAPI, Starlette, tenacity and asgiref for whether they are to
    # await what it gives.
    #
    # It is a launcher of its own: one that knew the marked function would make a circle with it,
    # and that would have to wait for the garbage collector.

    __slots__ = ("__wrapped__",)

    def __init__(self, function: Callable[..., Any], route: Route | None) -> None:
        super().__init__(function, route)
        self.__wrapped__ = function

    @property
    def __signature__(self) -> inspect.Signature:
        function = self.__wrapped__
        if isinstance(function, types.FunctionType):
            _, _, name = function.__qualname__.rpartition("<locals>.")
            if "." in name:  # a method: mock takes it from its class, and leaves the first one away
                function = _take_anything
        return inspect.signature(function)


def _take_anything(*args: Any, **kwargs: Any) -> None: ...


async def _coroutine_function() -> None: ...


class _AwaitedCall(_Call[P, T]):
    """Returns an `Unfuture` at once: `.result()` waits for it in a thread, `await` in any loop."""

    # Marked for thread and process functions, too, which are not marked themselves: FastAPI took
    # what these refuse for granted, where they were dependencies.

    __slots__ = ()

    if sys.version_info < (3, 12):
        # inspect knows no mark yet. What has these is a function to it, and so to tenacity.
        __name__ = "__call__"
        __code__ = _coroutine_function.__code__
        __defaults__ = None
        __kwdefaults__ = None


def _mark_as_awaited(called: Any) -> Any:
    """Says so to those who decide before a call whether they are to await what it gives."""
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(called)
    else:
        called._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
    return called


_mark_as_awaited(_AwaitedCall)

# What the marks are called, inspect and asyncio alone know.
_OURS = {"__call__", "_came_by_value", "_gives", "_goes_to", "_marking"}
_OURS |= vars(_mark_as_awaited(lambda: None)).keys()


def _is_for_cloudpickle(caller: types.FrameType) -> bool:
    """Whether cloudpickle asks, or a copy of it: joblib, loky and Ray have their own.

    It packs by value what cannot be imported, but knows functions and classes alone; of others it
    takes what `__reduce__` says, and does not say who it is.
    """
    return "cloudpickle" in str(caller.f_globals.get("__name__"))


def _reduce_by_value(marked: _Marked[..., Any]) -> str | tuple[Any, ...]:
    """How a marked function travels with one that goes by value and calls it."""
    if _travel.is_importable(marked):
        return marked.__reduce__()
    func, cpu_bound, executor, read_ahead = marked._marking
    if isinstance(executor, concurrent.futures.Executor):
        import pickle

        raise pickle.PicklingError(
            f"{marked!r} cannot go with it, since {executor!r} belongs to this process; let the "
            "option 'executor' be a callable that gives one"
        )
    return _mark_again, (type(marked), func, cpu_bound, executor, read_ahead)


def _mark_again(
    cls: type[_Marked[..., Any]],
    func: Callable[..., Any],
    cpu_bound: bool,
    executor: Engine | None,
    read_ahead: int | None,
) -> object:
    marked: Any = cls(func, cpu_bound=cpu_bound, executor=executor, read_ahead=read_ahead)
    # Whoever hands it on (Dask's scheduler does) cannot do so by its name either.
    marked._came_by_value = True
    return marked


_travel.reducers[_Marked] = _reduce_by_value


# Set for what a class statement makes, and not for int, str and the like, which are as good as
# functions.
_PY_TPFLAGS_HEAPTYPE = 1 << 9

# From Python 3.14 on a partial may leave arguments open before those that it knows. That one is
# refused: its arguments do not simply come first.
_PLACEHOLDER = id(getattr(functools, "Placeholder", functools))


def _target(what: str, function: Callable[..., Any]) -> package.fan_out.Target:
    """What `unsync.calls` or `unsync.map` calls."""
    below: Any = function
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    while True:
        if isinstance(below, types.MethodType):
            below, args = below.__func__, (below.__self__, *args)
        elif isinstance(below, functools.partial) and _PLACEHOLDER not in map(id, below.args):
            below, args, kwargs = below.func, (*below.args, *args), {**below.keywords, **kwargs}
        else:
            break
    if not isinstance(below, _Marked):
        raise TypeError(
            f"unsync.{what}() takes a function marked with @unsync, not {function!r}; mark it, or "
            "give unsync(function)"
        )
    if below._gives != "Unfuture":
        article = "an" if below._gives[0] in "AU" else "a"
        raise TypeError(
            f"unsync.{what}() takes functions whose calls give an Unfuture, but those of "
            f"{_name_of(below)} give {article} {below._gives}: call it yourself, once for each"
        )
    route = below._goes_to
    return package.fan_out.Target(
        function,
        below.__wrapped__,
        args,
        kwargs,
        None if _is_cheap(route) else route,
        _workers_of(route),
    )


def _is_cheap(route: Route | None) -> bool:
    """Whether single calls go there in batches anyway."""
    if route is None:
        return True
    way = executors.way_into(_threads.executor) if route is _threads.route else route.submit
    # Others are given a partial.
    ours = (JobQueue, concurrent.futures.ThreadPoolExecutor)
    return isinstance(getattr(way, "__self__", None), ours)


def _workers_of(route: Route | None) -> int:
    """How many calls run at a time there, as far as one can know."""
    submit: Any = getattr(route, "submit", None)
    executor = submit.args[0] if isinstance(submit, functools.partial) else None
    given = getattr(submit, "__self__", None)
    if isinstance(given, executors.Given):
        executor = given.executor
    workers = getattr(executor, "_max_workers", None)
    return workers if isinstance(workers, int) and workers > 0 else os.cpu_count() or 1


def _unbind(func: Any) -> tuple[Any, int]:
    """The function in a static- or classmethod, and what its first argument will be."""
    if isinstance(func, staticmethod):
        return func.__func__, BIND_NOTHING
    if isinstance(func, classmethod):
        return func.__func__, BIND_CLASS
    return func, BIND_INSTANCE


def _unmarked(function: Any) -> tuple[Any, _Marked[..., Any] | None]:
    """`function` with what is marked in it replaced by the function beneath, and the marked one.

    It may be a bound method or a `functools.partial` of one.
    """
    marked: _Marked[..., Any] | None = None
    if isinstance(function, _Marked):
        # A subclass may have its own way to be called.
        if type(function).__call__ is Launcher.__call__:
            return function.__wrapped__, function
    elif isinstance(function, types.MethodType):
        below, marked = _unmarked(function.__func__)
        # A bound method would be found by its name in another process, and be the marked one there.
        function = functools.partial(below, function.__self__)
    elif isinstance(function, functools.partial):
        below, marked = _unmarked(function.func)
        function = functools.partial(below, *function.args, **function.keywords)
    return function, marked


def _below(marked: _Marked[..., Any], binding: int) -> tuple[Any, Any, int]:
    """What it marks, as it was given and as a function, and what the first argument will be.

    :param binding: of what is marked now, if that is a static- or classmethod around `marked`.
    """
    func: Any = marked._marking[0]
    function, own = _unbind(func)
    if binding == BIND_NOTHING:
        func = staticmethod(function)
    elif binding == BIND_CLASS:
        func = classmethod(function)
    else:
        binding = own
    return func, function, binding


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _no_way(kind: str, function: Callable[..., Any], option: str, what: str) -> TypeError:
    return TypeError(
        f"the {kind} {_name_of(function)} cannot be marked with {option}: {what} run in the "
        "ambient event loop; make it a regular function or leave that out"
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


@contextlib.asynccontextmanager
async def _any() -> AsyncIterator[None]:
    yield


_code_of_contextlib = _any.__code__


def _is_made_by_contextlib(function: Callable[..., Any]) -> bool:
    """Whether `contextlib.asynccontextmanager` made it."""
    return getattr(function, "__code__", None) is _code_of_contextlib


def _is_coroutine_function(function: Callable[..., Any]) -> bool:
    called: Any = _below_partials(function)
    if isinstance(getattr(called, "__func__", called), Launcher):
        return False  # though it says so to others, what it gives is an Unfuture
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
