"""Where regular functions run: the thread executor, and the way into any other executor."""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures.thread import BrokenThreadPool
from contextvars import Context, copy_context
from functools import partial
from time import monotonic
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

from unsync import _common
from unsync._backend import JobQueue, Unfuture

__all__ = ["ProcessPool", "ThreadExecutor", "submit_to"]

P = ParamSpec("P")
T = TypeVar("T")


def _closed_error() -> RuntimeError:
    return RuntimeError("cannot schedule new futures after shutdown")


class ThreadExecutor(concurrent.futures.ThreadPoolExecutor):
    """A thread pool whose futures are Unfutures; the class of `unsync.thread_executor`.

    It differs from its parent in three ways: `submit` returns an `Unfuture`; functions see the
    submitter's context variables; and at interpreter exit it does not wait for ever for what
    still runs, since its threads are daemonic.

    :param max_workers: how many threads at most; they start as they are needed.
    :param thread_name_prefix: begins the name of each thread.
    :param initializer: called in each thread before its first job; if it raises, the pool is
        broken and refuses work with `BrokenThreadPool`.
    :param initargs: the arguments for `initializer`.
    :raises ValueError: if `max_workers` is less than 1.
    :raises TypeError: if `initializer` is not callable.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        thread_name_prefix: str = "",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(max_workers, thread_name_prefix, initializer, initargs)
        self._prepare = None if initializer is None else partial(initializer, *initargs)
        self._numbers = itertools.count()
        self._starting = threading.Lock()  # guards _threads, the parent's set of threads
        # The queue outlives the executor in its workers' hands, and must not keep it alive.
        spawn = weakref.WeakMethod(self._spawn)
        self._jobs = JobQueue(self._max_workers, lambda: spawn()())  # type: ignore[misc]
        weakref.finalize(self, self._jobs.close, _closed_error).atexit = False
        _thread_executors.add(self)

    @property
    def jobs(self) -> JobQueue:
        """The queue in which the jobs wait for a thread."""
        return self._jobs

    def submit(  # type: ignore[override]
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Unfuture[T]:
        """Has a thread of the pool call `fn(*args, **kwargs)`.

        :raises RuntimeError: after `shutdown`.
        :raises BrokenThreadPool: if an initializer failed.
        """
        return self._jobs.submit(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuses further work; with `wait`, returns when all that was accepted is done.

        :param cancel_futures: cancel what has not begun.
        """
        self._shutdown = True
        self._jobs.close(_closed_error)
        if cancel_futures:
            self._jobs.cancel_all()
        if wait:
            self.join(None)

    def join(self, timeout: float | None) -> bool:
        """After `shutdown`, waits up to `timeout` seconds; whether all threads have ended.

        A thread of the pool does not wait for itself, nor for those that wait for it.
        """
        if self.owns_this_thread():
            return False
        until = None if timeout is None else monotonic() + timeout
        if not self._jobs.wait(timeout):
            return False
        # They have no more work, only their last steps to make.
        with self._starting:
            threads = list(self._threads)
        for thread in threads:
            thread.join(None if until is None else max(0.0, until - monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def owns_this_thread(self) -> bool:
        return threading.current_thread() in self._threads

    def _spawn(self) -> None:
        name = f"{self._thread_name_prefix}_{next(self._numbers)}"
        thread = threading.Thread(
            target=_work, name=name, args=(self._jobs, self._prepare), daemon=True
        )
        with self._starting:
            # Before its first job can ask whether it is in one of the pool's threads.
            self._threads = {*self._threads, thread}
            try:
                thread.start()
            except BaseException:
                self._threads = self._threads - {thread}
                raise

    def _after_fork(self) -> None:
        self._starting = threading.Lock()
        self._threads = set()
        self._jobs.after_fork()


# All that are alive, for the hooks at fork and at exit.
_thread_executors: weakref.WeakSet[ThreadExecutor] = weakref.WeakSet()


def _work(jobs: JobQueue, prepare: Callable[[], object] | None) -> None:
    try:
        jobs.work(prepare)
    except BaseException:
        _common.logger.critical("a thread's initializer failed, its pool is broken", exc_info=True)
        reason = "a thread's initializer failed; the log has its traceback"
        jobs.close(lambda: BrokenThreadPool(reason))
        jobs.fail_all(BrokenThreadPool(reason))


def stop_threads(timeout: float) -> None:
    """At exit: cancels what waits in any thread executor, and waits a little for what runs."""
    until = monotonic() + timeout
    executors = list(_thread_executors)
    for executor in executors:
        executor.shutdown(wait=False, cancel_futures=True)
    for executor in executors:
        executor.join(max(0.0, until - monotonic()))


def after_fork() -> None:
    """In the child: no executor has threads any more."""
    for executor in list(_thread_executors):
        executor._after_fork()


# How a function gets into another process.


class Reference:
    """A function that the worker process finds by name, below the decorators above it.

    :param peels: how many decorators, static- or classmethods to take off what the name gives.
    """

    __slots__ = ("_module", "_peels", "_qualname")

    def __init__(self, module: str, qualname: str, peels: int) -> None:
        self._module = module
        self._qualname = qualname
        self._peels = peels

    def __reduce__(self) -> tuple[Any, ...]:
        return Reference, (self._module, self._qualname, self._peels)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._find()(*args, **kwargs)

    def _find(self) -> Callable[..., Any]:
        try:
            found = _look_up(self._module, self._qualname)
            for _ in range(self._peels):
                found = _peel(found)
        except (AttributeError, ImportError) as exc:
            raise RuntimeError(
                f"process {os.getpid()} cannot find the function {self._qualname!r} in the module "
                f"{self._module!r}: {exc}. It must be defined whenever the module is imported, "
                "outside `if __name__ == '__main__':`, and not typed in at a prompt"
            ) from exc
        assert callable(found)
        return found


def _look_up(module: str, qualname: str) -> object:
    found: object = sys.modules.get(module) or importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def _peel(found: object) -> object:
    """What is below one decorator, static- or classmethod, or bound method."""
    return getattr(found, "__func__", None) or getattr(found, "__wrapped__")  # noqa: B009


def reference_to(function: Callable[..., Any]) -> Callable[..., Any]:
    """What to send to another process in place of `function`.

    What has no name to be found by (partials, instances, bound methods) travels by its own pickle.

    :raises pickle.PicklingError: if a worker process could not find the function.
    """
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if isinstance(module, str) and isinstance(qualname, str):
        try:
            found = _look_up(module, qualname)
            for peels in itertools.count():
                if found is function:
                    # A worker that was spawned knows its parent's main module by both names, one
                    # that it starts in turn only by this one.
                    name = "__main__" if module == "__mp_main__" else module
                    return Reference(name, qualname, peels)
                found = _peel(found)
        except (AttributeError, ImportError):
            pass
    if not isinstance(function, FunctionType):
        return function
    if "<lambda>" in function.__qualname__:
        why = "it is a lambda"
    elif "<locals>" in function.__qualname__:
        why = "it is defined inside another function"
    else:
        why = f"the name {qualname!r} in the module {module!r} is not this function"
    import pickle  # which takes longer to import than all the rest of unsync

    raise pickle.PicklingError(
        f"cannot send the function {qualname!r} to another process, where it is looked up by name: "
        f"{why}. Define it at the top level of a module (or in a class there), or leave "
        "cpu_bound=True away to run it in a thread"
    )


class ContextCall:
    """A function with its caller's context, for executors that may or may not leave the process.

    Called here, the context counts. Pickled, it leaves the context behind: contexts do not pickle.
    """

    __slots__ = ("_context", "_function")

    def __init__(self, function: Callable[..., Any], context: Context) -> None:
        self._function = function
        self._context = context

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        # A partial, since PyPy's Context.run() has names for its own arguments.
        return self._context.run(partial(self._function, *args, **kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _identity, (reference_to(self._function),)


def _identity(function: T) -> T:
    return function


def submit_to(
    executor: concurrent.futures.Executor,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Unfuture[Any]:
    """Has any executor run the function; its future becomes an Unfuture.

    :raises pickle.PicklingError: if `executor` is a process pool and the function cannot go there.
    """
    call: Callable[..., Any]
    if is_process_pool(executor):
        call = reference_to(function)
    else:
        call = ContextCall(function, copy_context())
    future = executor.submit(call, *args, **kwargs)
    if isinstance(future, Unfuture):
        return future
    unfuture = Unfuture(future)
    unfuture._name_function(function)
    return unfuture


def is_process_pool(executor: concurrent.futures.Executor | None) -> bool:
    # Asking for the class by name would import multiprocessing, which takes a while.
    module = sys.modules.get("concurrent.futures.process")
    return module is not None and isinstance(executor, module.ProcessPoolExecutor)


def in_thread_of_a_pool() -> bool:
    """Whether this thread belongs to some pool, whose end it cannot wait for."""
    thread = threading.current_thread()
    if any(thread in executor._threads for executor in list(_thread_executors)):
        return True
    module = sys.modules.get("concurrent.futures.process")
    return module is not None and isinstance(thread, module._ExecutorManagerThread)


class ProcessPool:
    """The default process executor: made on first use, and made anew when it is broken.

    Which start method it uses is Python's choice, or that of `multiprocessing.set_start_method`.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # guards _executor; held over a fork
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        # Left by a parent process: kept, since ending it here would speak to the parent's workers.
        self._inherited: list[concurrent.futures.ProcessPoolExecutor] = []

    @property
    def executor(self) -> concurrent.futures.ProcessPoolExecutor:
        with self.lock:
            if self._executor is None:
                try:
                    executor = concurrent.futures.ProcessPoolExecutor()
                    _register_process_exit(self)
                except RuntimeError as exc:
                    if "shutdown" not in str(exc):
                        raise
                    # Neither concurrent.futures' exit hook nor ours can be registered any more.
                    raise RuntimeError(
                        "cannot schedule new futures after interpreter shutdown"
                    ) from exc
                self._executor = executor
            return self._executor

    def submit(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[Any]:
        executor = self.executor
        try:
            return submit_to(executor, function, args, kwargs)
        except RuntimeError as exc:
            if not (
                isinstance(exc, concurrent.futures.BrokenExecutor) or executor._shutdown_thread
            ):
                raise
            # A worker died, and those who had work there have been told; or somebody shut the pool
            # down. Either way this call is not concerned.
            with self.lock:
                if self._executor is executor:
                    self._executor = None
            executor.shutdown(wait=False)
            return submit_to(self.executor, function, args, kwargs)

    def stop(self, timeout: float | None) -> bool:
        """Cancels what waits, gives what runs `timeout` seconds, then terminates the processes.

        Returns whether everything ended in time.
        """
        with self.lock:
            executor, self._executor = self._executor, None
        if executor is None:
            return True
        processes = list((executor._processes or {}).values())
        manager: Any = executor._executor_manager_thread
        executor.shutdown(wait=False, cancel_futures=True)
        if manager is None:
            return True
        if manager is threading.current_thread():
            return False  # it cannot wait for itself
        # It waits for the processes. Nobody else may, or each could miss what the other saw.
        manager.join(timeout)
        if not manager.is_alive():
            return True
        for process in processes:
            process.terminate()
        manager.join(_TERMINATE_SECONDS)
        if manager.is_alive():
            # Under fork they have the program's own signal handlers, and some do not end.
            for process in processes:
                process.kill()
            manager.join(_TERMINATE_SECONDS)
        return False

    def after_fork(self) -> None:
        """In the child: the pool's processes are the parent's children, not ours."""
        self.lock = threading.RLock()
        executor, self._executor = self._executor, None
        if executor is not None:
            self._inherited.append(executor)
            # multiprocessing would try to join them when this process ends.
            import multiprocessing.process

            children: set[Any] = getattr(multiprocessing.process, "_children", set())
            children.difference_update((executor._processes or {}).values())


# How long the interpreter's exit waits for what still runs, in seconds.
EXIT_SECONDS = 1.0
# How long a process may take to end when it is told to.
_TERMINATE_SECONDS = 0.5


def _register_process_exit(pool: ProcessPool) -> None:
    """Has the pool's work cancelled at exit, before concurrent.futures would wait for all of it.

    That one waits in `threading`'s own exit hooks, run last in, first out, so this must be one
    as well; no public function adds to them. In a process of multiprocessing's that is too late:
    there its exit function, which joins the process's own children, comes first.
    """

    import multiprocessing.util

    def stop() -> None:
        _common.exiting = True
        pool.stop(EXIT_SECONDS)

    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(stop)
    multiprocessing.util.Finalize(None, stop, exitpriority=100)
