"""Where regular functions run: the thread executor, and the way into any other executor."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures.thread import BrokenThreadPool
from contextlib import suppress
from contextvars import copy_context
from functools import lru_cache, partial
from time import sleep
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, ParamSpec, TypeVar

from unsync import _common, _travel
from unsync._backend import (
    Batch,
    Counter,
    JobQueue,
    Unfuture,
    show_to_collector,
    tell_watcher,
)
from unsync._common import WorkCounts, monotonic
from unsync._counts import Book

if TYPE_CHECKING:
    from unsync._single_thread import SingleThreadExecutor
else:

    def __getattr__(name):
        # Imported when somebody asks for it, since most programs never do; and before a fork.
        if name != "SingleThreadExecutor":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from unsync._single_thread import SingleThreadExecutor

        globals()[name] = SingleThreadExecutor
        return SingleThreadExecutor


__all__ = [
    "Engine",
    "Given",
    "ProcessPool",
    "SingleThreadExecutor",
    "ThreadExecutor",
    "submit_to",
    "way_into",
]

P = ParamSpec("P")
T = TypeVar("T")

# What functions can be sent to: any executor, or a callable that gives one when one is needed.
Engine = concurrent.futures.Executor | Callable[[], concurrent.futures.Executor]

# How functions get there.
Way = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Unfuture[Any]]


def _closed_error() -> RuntimeError:
    return RuntimeError("cannot schedule new futures after shutdown")


def _refuse(on_refusal: Callable[[], object] | None) -> RuntimeError:
    if on_refusal is not None:
        on_refusal()
    return _closed_error()


# As many as Java's ForkJoinPool allows itself for the same purpose.
SPARE_WORKERS = 256


class ThreadExecutor(concurrent.futures.ThreadPoolExecutor):
    """A thread pool whose futures are Unfutures; the class of `unsync.thread_executor`.

    It differs from its parent in four ways: `submit` returns an `Unfuture`; functions see the
    submitter's context variables; while a function of the pool waits for an Unfuture, a spare
    thread takes its place, so that functions may wait for other functions of the pool; and while
    the interpreter's exit waits for its functions, these may call others, and Ctrl-C or
    `unsync.exit_timeout` end the wait, since its threads are daemonic.

    :param max_workers: how many functions run at most, not counting those that wait for an
        Unfuture; threads start as they are needed. So 1 is not one thread: see
        `SingleThreadExecutor`.
    :param thread_name_prefix: begins the name of each thread.
    :param initializer: called in each thread before its first job; if it raises, the pool is
        broken and refuses work with `BrokenThreadPool`.
    :param initargs: the arguments for `initializer`.
    :param spare_workers: how many threads there may be beyond `max_workers`, in place of those
        that wait. If they are used up, and all threads wait in `result()` or `exception()` for
        functions that none is left for, that is a RuntimeError. What is over when the waits end
        goes idle, up to `max_workers` threads, or ends.
    :param max_queued: how many calls may wait for a thread; None for any number. Calls that the
        pool's own functions make always may.
    :param when_full: what a call does that would be one too many: `"raise"` a `queue.Full`, or
        `"wait"` in the calling thread until there is room; where an event loop runs it does not
        wait, but raises as well.
    :raises ValueError: if `max_workers` is less than 1, or `spare_workers` or `max_queued` less
        than 0, or `when_full` neither of the two.
    :raises TypeError: if `initializer` is not callable.
    """

    _nesting: ClassVar[_common.Nesting | None] = None

    def __init__(
        self,
        max_workers: int | None = None,
        thread_name_prefix: str = "",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        spare_workers: int = SPARE_WORKERS,
        max_queued: int | None = None,
        when_full: Literal["raise", "wait"] = "raise",
    ) -> None:
        super().__init__(max_workers, thread_name_prefix, initializer, initargs)
        if spare_workers < 0:
            raise ValueError(f"spare_workers must be at least 0, not {spare_workers!r}")
        if max_queued is not None and max_queued < 0:
            raise ValueError(f"max_queued must be at least 0, or None, not {max_queued!r}")
        if when_full not in ("raise", "wait"):
            raise ValueError(f"when_full must be 'raise' or 'wait', not {when_full!r}")
        self._prepare = None if initializer is None else partial(initializer, *initargs)
        self._numbers = itertools.count()
        # The parent's set of threads. Threads are added, removed and listed in one step each, under
        # no lock: while one starts, a finalizer may want to start another one.
        self._threads: set[threading.Thread] = set()
        # The queue outlives the executor in its workers' hands, and must not keep it alive.
        spawn = weakref.WeakMethod(self._spawn)
        # Called when a job is refused after `shutdown`, before the error is made.
        self._on_refusal: Callable[[], object] | None = None
        self._jobs = JobQueue(
            self._max_workers,
            lambda: spawn()(),  # type: ignore[misc]
            spare_workers,
            -1 if max_queued is None else max_queued,
            when_full == "wait",
            self._nesting,
        )
        _queues.close_ended_queues()
        _queues.open(self._jobs)
        weakref.finalize(self, self._jobs.close, _closed_error).atexit = False
        _thread_executors.add(self)

    @property
    def jobs(self) -> JobQueue:
        """The queue in which the jobs wait for a thread."""
        return self._jobs

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Unfuture[T]:
        """Has a thread of the pool call `fn(*args, **kwargs)`.

        :raises queue.Full: if there is no room for it: see `max_queued`.
        :raises RuntimeError: after `shutdown`.
        :raises BrokenThreadPool: if an initializer failed.
        """
        return self._jobs.submit(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuses further work; with `wait`, returns when all that was accepted is done.

        :param cancel_futures: cancel what has not begun.
        """
        self._shutdown = True
        self._jobs.close(partial(_refuse, self._on_refusal))
        if cancel_futures:
            self._jobs.cancel_all()
        if wait:
            self.join(None)

    def join(self, timeout: float | None) -> bool:
        """After `shutdown`, waits until all threads have ended, which `shutdown` can without limit.

        A thread of the pool does not wait for itself, nor for those that wait for it.

        :param timeout: how many seconds to wait at most; None for as long as it takes.
        :returns: whether all threads have ended; False in a thread of the pool.
        """
        if self.owns_this_thread():
            return False
        if timeout is not None:
            timeout = min(timeout, threading.TIMEOUT_MAX)
        until = None if timeout is None else monotonic() + timeout
        if not self._jobs.wait(timeout):
            return False
        # They have no more work, only their last steps to make. One whose start was given up has
        # no part in it, and cannot be waited for.
        threads = [thread for thread in list(self._threads) if thread.is_alive()]
        for thread in threads:
            thread.join(_common.seconds_left(until))
        return not any(thread.is_alive() for thread in threads)

    def when_refused(self, function: Callable[[], object]) -> None:
        """Has it called whenever a job is refused because of `shutdown`."""
        self._on_refusal = function

    def owns_this_thread(self) -> bool:
        return threading.current_thread() in self._threads

    def _spawn(self) -> None:
        _common.check_threads()
        name = f"{self._thread_name_prefix}_{next(self._numbers)}"
        thread = threading.Thread(
            target=_work,
            name=name,
            args=(self._jobs, self._prepare, weakref.ref(self)),
            daemon=_common.DAEMONIC,
        )
        # Before its first job can ask whether it is in one of the pool's threads.
        self._threads.add(thread)
        try:
            thread.start()
        except BaseException:
            # After a Ctrl-C it may run nevertheless; then it lists itself.
            self._threads.discard(thread)
            raise

    def _list_this_thread(self) -> None:
        self._threads.add(threading.current_thread())

    def _forget_this_thread(self) -> None:
        """A spare one ends; at the pool's end they are kept, for `join` to wait for."""
        if not self._shutdown:
            self._threads.discard(threading.current_thread())

    def _after_fork(self) -> None:
        self._threads = set()  # pyright: ignore[reportIncompatibleVariableOverride]
        self._jobs.after_fork()


# All that are alive, for the hooks at fork and at exit.
_thread_executors: weakref.WeakSet[ThreadExecutor] = weakref.WeakSet()

# What was counted, for `unsync.stats()`: by all queues, and of what went to other executors.
_queues = Book(5)
_to_processes = Counter()
_to_others = Counter()


def read_queues() -> tuple[tuple[int, ...], list[tuple[Any, ...]]]:
    """What `Book.read` gives of all thread executors."""
    return _queues.read()


def read_others() -> tuple[WorkCounts, WorkCounts]:
    """What was counted of the calls to process pools, and to executors of other kinds."""
    return _to_processes.work(), _to_others.work()


def open_queues() -> list[JobQueue]:
    """Of all thread executors whose threads may have something to do."""
    _queues.close_ended_queues()
    return _queues.all_open()


def _work(
    jobs: JobQueue, prepare: Callable[[], object] | None, pool: weakref.ref[ThreadExecutor]
) -> None:
    def prepare_or_break() -> None:
        assert prepare is not None
        try:
            prepare()
        except BaseException:
            # In here the thread still counts: nobody must think that the jobs have none left.
            reason = "a thread's initializer failed; the log has its traceback"
            _common.logger.critical("a thread's initializer failed: its pool breaks", exc_info=True)
            jobs.close(lambda: BrokenThreadPool(reason))
            jobs.fail_all(BrokenThreadPool(reason))
            raise

    executor = pool()
    if executor is not None:
        executor._list_this_thread()
    del executor  # which must not live as long as its threads
    with suppress(BaseException):
        jobs.work(None if prepare is None else prepare_or_break)
    executor = pool()
    if executor is not None:
        executor._forget_this_thread()


def cancel_queued() -> None:
    """Cancels what waits for a thread anywhere, and refuses what comes."""
    for executor in list(_thread_executors):
        executor.shutdown(wait=False, cancel_futures=True)


def stop_threads(timeout: float) -> None:
    """At exit: waits a little for what runs in any thread executor."""
    until = monotonic() + timeout
    cancel_queued()
    for executor in list(_thread_executors):
        executor.join(max(0.0, until - monotonic()))


class _AtFork(NamedTuple):
    """What the child's hooks need of what other threads may be using, looked up before the fork.

    Without the GIL a dict or a set has a lock, which CPython 3.13 hands to a thread that waits for
    it. Who forks between that and the thread's next step gives the child a lock that nobody
    releases: of 150 forks beside six threads in `dict.get`, one child stood still in its own.
    """

    thread_executors: list[ThreadExecutor]
    given: list[Given]
    fork_server: ModuleType | None


def _look_around() -> _AtFork:
    module = sys.modules.get("multiprocessing.forkserver")
    return _AtFork(list(_thread_executors), list(_given), module)


# Set from the beginning of a fork to its end, under the locks that the hooks hold over it.
_at_fork: _AtFork | None = None


def before_fork() -> None:
    """In the parent, and in the thread that forks."""
    global _at_fork
    _at_fork = _look_around()


def after_fork_in_parent() -> None:
    global _at_fork
    _at_fork = None


def after_fork() -> None:
    """In the child: no executor has threads any more, and nothing was done yet."""
    global _at_fork, _queues, _to_processes, _to_others, _is_past_main
    _is_past_main = False  # a fork server's child may import the main program yet
    _queues, _to_processes, _to_others = Book(5), Counter(), Counter()
    _elsewhere.clear()
    # Without the hook before the fork if that was another's, which imported this module.
    found, _at_fork = _at_fork or _look_around(), None
    for executor in found.thread_executors:
        executor._after_fork()
        _queues.open(executor.jobs)
    for given in found.given:
        given.after_fork()
    _forget_fork_server(found.fork_server)


# Any other executor.


def way_into(engine: concurrent.futures.Executor | Given) -> Way:
    if isinstance(engine, Given):
        return engine.submit
    if type(engine) is ThreadExecutor:
        return engine.jobs.submit
    # A `SingleThreadExecutor` has its own.
    own: Way | None = getattr(engine, "_way", None)
    return partial(submit_to, engine) if own is None else own


class Given:
    """An executor that a callable gives when it is first needed, once in each process.

    And anew when it is needed after somebody shut down what it gave.

    :param what: how errors name the callable.
    """

    def __init__(self, what: str, give: Callable[[], concurrent.futures.Executor]) -> None:
        self._what = what
        self._give = give
        # Held while the callable works. That may take long, or start processes: so a fork does not
        # wait for it.
        self._lock = _common.Making()
        # What it gave, and the way there, which change together.
        self._given: tuple[concurrent.futures.Executor, Way] | None = None
        # Left by a parent process: kept, since their ends would speak to the parent's workers.
        self._inherited: list[concurrent.futures.Executor] = []
        _given.add(self)

    @property
    def executor(self) -> concurrent.futures.Executor:
        """:raises TypeError: if the callable gives something else; what it raises is raised."""
        return self._ask()[0]

    def _ask(self) -> tuple[concurrent.futures.Executor, Way]:
        """What it gave, unless that was shut down, or what it gives now."""
        there = self._given
        if there is not None and not _was_shut_down(there[0]):
            return there
        with self._lock:
            if self._given is there:
                self._lock.check_depth(self._what)
                executor = self._give()
                if not isinstance(executor, concurrent.futures.Executor):
                    raise TypeError(
                        f"{self._what} must give a concurrent.futures.Executor when it is called, "
                        f"but {self._give!r} gave {executor!r}"
                    )
                if self._given is there:  # or it has waited, and another thread was first
                    self._given = executor, way_into(executor)
            assert self._given is not None
            return self._given

    def submit(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[Any]:
        executor, way = self._given or self._ask()
        try:
            return way(function, args, kwargs)
        except RuntimeError:
            if not _was_shut_down(executor):
                raise
        # Not while that is handled: else it would be the context of whatever is raised from now on.
        return self._ask()[1](function, args, kwargs)

    def after_fork(self) -> None:
        """In the child: what the parent was given has no threads or processes here."""
        self._lock = _common.Making()
        if self._given is not None:
            self._inherited.append(self._given[0])
        self._given = None


def _was_shut_down(executor: concurrent.futures.Executor) -> bool:
    """Whether its owner has shut it down, as far as executors tell; not that it broke.

    Thread pools say it by `_shutdown`, and so do those of mpi4py and Dask. What process pools say
    by `_shutdown_thread`, and loky by a flag, they say when they break as well; but they let go of
    the thread that manages them only when they are shut down. At the end of the interpreter
    everything is, and nothing is to be made in its place.
    """
    if _common.exiting:
        return False
    state: Any = executor
    if getattr(state, "_shutdown", False) is True:
        return True
    flags = getattr(state, "_flags", None)
    takes_no_more = getattr(state, "_shutdown_thread", getattr(flags, "shutdown", False))
    return takes_no_more is True and getattr(state, "_executor_manager_thread", None) is None


_given: weakref.WeakSet[Given] = weakref.WeakSet()


def submit_to(
    executor: concurrent.futures.Executor,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Unfuture[Any]:
    """Has any executor run the function; its future becomes an Unfuture, unless it is a batch's.

    :raises pickle.PicklingError: if `executor` is a process pool and the function cannot go there.
    """
    batch = function if isinstance(function, Batch) else None
    imports_main = _leaves(type(executor))  # type: ignore[arg-type]  # mypy takes no class for hashable
    if imports_main is None:
        counter = _to_others
        future = executor.submit(_travel.ContextCall(function, copy_context(), kwargs), *args)
    else:
        counter = _to_processes
        job: tuple[Any, ...]
        if batch is not None:
            job = batch.parcel(imports_main)
        else:
            has_our_main = _travel.has_our_main(imports_main)
            call = _travel.reference_to(function, has_our_main)
            try:
                job = _travel.run, *_travel.pack(function, call, args, kwargs, has_our_main)
            except Exception as exc:
                failed: Unfuture[Any] = Unfuture()
                failed.set_exception(exc)
                return failed
        future = _way_out(executor)(*job)
        if type(future) is concurrent.futures.Future:  # nobody but us will see it
            future.__class__ = _CalmFuture
    if isinstance(future, Unfuture):
        return future
    if not isinstance(future, concurrent.futures.Future) and not _common.is_asyncio_future(future):
        raise TypeError(f"submit() of {executor!r} gave no future, but {future!r}")
    if batch is not None:
        counter.start()
        batch.counter = counter
        batch.in_pool = _is_pool(executor)  # type: ignore[attr-defined]
        return future  # type: ignore[return-value]  # it takes any future for its job
    counter.count(future)
    unfuture = Unfuture(future)
    unfuture._name_function(function)
    tell_watcher(unfuture)
    note_elsewhere(future, [unfuture], _is_pool(executor))
    return unfuture


class _CalmFuture(concurrent.futures.Future[Any]):
    """What the future of a process pool becomes: one that can be failed after it was cancelled.

    When a worker dies, the thread that manages the pool fails all that is pending; up to Python
    3.11 what was cancelled in its queue, too. That raised, and was the end of the thread: the calls
    behind it stayed pending for ever, and the other workers alive.
    """

    def set_exception(self, exception: BaseException | None) -> None:
        try:
            super().set_exception(exception)
        except concurrent.futures.InvalidStateError:
            if not self.cancelled():
                raise


class _Elsewhere:
    """Calls that an executor has which is not ours: told of their end by its future.

    Nobody else holds it. So calls whose executor has forgotten them, as those of tests may, are
    waited for by nobody.

    :param in_pool: whether threads or processes are at them which are sure to end them.
    :param stand_in: makes an Unfuture in place of calls that have none, as those of a stream;
        called when somebody drains.
    """

    __slots__ = ("__weakref__", "calls", "in_pool", "stand_in")

    def __init__(
        self,
        calls: list[Unfuture[Any]],
        in_pool: bool,
        stand_in: Callable[[], Unfuture[Any] | None] | None,
    ) -> None:
        self.calls = calls
        self.in_pool = in_pool
        self.stand_in = stand_in

    def known(self) -> list[Unfuture[Any]]:
        """The calls, for who drains."""
        calls, stand_in = self.calls, self.stand_in
        if stand_in is not None and not calls and (made := stand_in()) is not None:
            # If it ends just now nobody finds this list any more, nor need anybody.
            calls.append(made)
        return calls

    def __call__(self, future: object) -> None:
        """The last to hear of it: all who wait for the calls have been told."""
        _elsewhere.pop(id(self), None)
        # The future keeps what it has called.
        calls, self.calls, self.stand_in = self.calls, [], None
        tell = when_back
        if tell is not None:
            for call in calls:
                tell(call)


# Of what stands in for several calls: how many.
sizes: weakref.WeakKeyDictionary[Unfuture[Any], int] = weakref.WeakKeyDictionary()
# All that are alive.
_elsewhere: dict[int, weakref.ref[_Elsewhere]] = {}
# Set while somebody drains: told of each of those calls when its executor is through with it.
when_back: Callable[[Unfuture[Any]], object] | None = None


def note_elsewhere(
    future: concurrent.futures.Future[Any],
    calls: list[Unfuture[Any]],
    in_pool: bool,
    stand_in: Callable[[], Unfuture[Any] | None] | None = None,
) -> None:
    """For who drains: now, or later."""
    elsewhere = _Elsewhere(calls, in_pool, stand_in)
    forget = partial(_elsewhere.pop, id(elsewhere))
    _elsewhere[id(elsewhere)] = weakref.ref(elsewhere, forget)
    if stand_in is not None and when_back is not None:
        for call in elsewhere.known():
            tell_watcher(call)
    future.add_done_callback(elsewhere)


def calls_elsewhere(in_pools: bool) -> list[Unfuture[Any]]:
    """:param in_pools: only those that threads and processes are sure to end."""
    found = [reference() for reference in list(_elsewhere.values())]
    return [
        call
        for elsewhere in found
        if elsewhere is not None and (elsewhere.in_pool or not in_pools)
        for call in elsewhere.known()
    ]


def collect_forgotten_calls() -> None:
    """Those whose executors are not there any more."""
    if _elsewhere:
        import gc  # only who drains needs it

        for reference in list(_elsewhere.values()):
            if (elsewhere := reference()) is not None:
                show_to_collector(elsewhere.calls)
        elsewhere = None
        gc.collect()


def _is_pool(executor: concurrent.futures.Executor) -> bool:
    return isinstance(executor, concurrent.futures.ThreadPoolExecutor) or is_process_pool(executor)


# Executors whose functions leave this process or interpreter, by name, since asking for their
# classes would import them; and whether what runs there can import this program's main module.
# Others that leave it (Dask's, say) pickle what they are given, in their own way.
_POOLS_ELSEWHERE = {
    ("concurrent.futures.process", "ProcessPoolExecutor"): True,
    ("concurrent.futures.interpreter", "InterpreterPoolExecutor"): False,
    ("loky.process_executor", "ProcessPoolExecutor"): False,
    ("joblib.externals.loky.process_executor", "ProcessPoolExecutor"): False,
    ("mpi4py.futures.pool", "MPIPoolExecutor"): False,
}


@lru_cache
def _leaves(cls: type) -> bool | None:
    """Whether its functions go to where our main module can be imported; None if they stay here."""
    for base in cls.__mro__:
        has_our_main = _POOLS_ELSEWHERE.get((base.__module__, base.__qualname__))
        if has_our_main is not None:
            return has_our_main
    return None


def is_process_pool(executor: object) -> bool:
    return _leaves(type(executor)) is not None  # type: ignore[arg-type]


def in_thread_of_a_pool() -> bool:
    """Whether this thread belongs to some pool, whose end it cannot wait for."""
    thread = threading.current_thread()
    if any(thread in executor._threads for executor in list(_thread_executors)):
        return True
    return _manages_processes(thread)


def in_call_elsewhere() -> bool:
    """Whether an executor that is not ours makes a call of ours in this thread.

    The thread's frames tell, so that the calls pay nothing for it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _travel.ContextCall.__call__.__code__:
            return True
        frame = frame.f_back
    return False


def _manages_processes(thread: threading.Thread) -> bool:
    # Which another thread may be importing just now.
    module = sys.modules.get("concurrent.futures.process")
    return isinstance(thread, getattr(module, "_ExecutorManagerThread", ()))


# A main program without its guard: each worker that imports it would start workers. Such a worker
# ends without a word, with an exit code by which the process that started it knows what to say.

_NO_GUARD = 78  # EX_CONFIG
_ADVICE = (
    "the main program calls functions in processes whenever it is imported, and each process "
    'imports it: put the start of the program below `if __name__ == "__main__":`. unsync\'s own '
    "process pool needs that everywhere, since it never forks"
)

# Pools that broke for that reason.
_unguarded: weakref.WeakSet[concurrent.futures.Executor] = weakref.WeakSet()


# Whether this process was once found not to be importing it: then it never will again.
_is_past_main = False


def _way_out(
    executor: concurrent.futures.Executor,
) -> Callable[..., concurrent.futures.Future[Any]]:
    """Its `submit`, guarded if it starts processes that import the main program.

    Of those of multiprocessing's only; and of none after its shutdown.
    """
    if not _is_past_main:
        _end_if_importing_main()
    context = getattr(executor, "_mp_context", None)
    forks = context is not None and context.get_start_method() == "fork"
    if getattr(executor, "_processes", None) is None:
        return executor.submit
    return partial(_submit if forks else _submit_guarded, executor)


def _submit(executor: concurrent.futures.Executor, *job: Any) -> concurrent.futures.Future[Any]:
    """`executor.submit`, but a broken pool refuses without its lock.

    From Python 3.12 on the thread that manages a pool holds that while it fails the pool's calls:
    whoever is told of one there, and makes another, would wait for himself for ever.
    """
    broken = getattr(executor, "_broken", False)
    if broken:
        raise sys.modules["concurrent.futures.process"].BrokenProcessPool(broken)
    return executor.submit(*job)


def _submit_guarded(
    executor: concurrent.futures.Executor, *job: Any
) -> concurrent.futures.Future[Any]:
    """`_submit`, with advice if the main program has no guard."""
    processes: dict[int, Any] = executor._processes  # type: ignore[attr-defined]
    try:
        future = _submit(executor, *job)
    except concurrent.futures.BrokenExecutor as exc:
        if executor in _unguarded:
            exc.args = (_ADVICE,)
        raise
    except (EOFError, ConnectionError):
        if not _fork_server_found_no_guard():
            raise
        _unguarded.add(executor)
        raise sys.modules["concurrent.futures.process"].BrokenProcessPool(_ADVICE) from None
    future.add_done_callback(partial(_explain, weakref.ref(executor), processes))
    return future


def _end_if_importing_main() -> None:
    """Ends a process of multiprocessing's that imports the main program and is not ready yet."""
    global _is_past_main
    # Which another thread may be importing just now.
    module = sys.modules.get("multiprocessing.process")
    if getattr(getattr(module, "_current_process", None), "_inheriting", False):
        import multiprocessing.util

        # Or semaphores are left, which is complained about.
        multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]
        os._exit(_NO_GUARD)
    _is_past_main = True


def _explain(
    pool: weakref.ref[concurrent.futures.Executor],
    processes: dict[int, Any],
    future: concurrent.futures.Future[Any],
) -> None:
    # Nobody but the thread that waits for the processes may ask for their exit codes.
    if future.cancelled() or not _manages_processes(threading.current_thread()):
        return
    exc = future.exception()
    if not isinstance(exc, concurrent.futures.BrokenExecutor):
        return
    import multiprocessing.connection

    workers = {process.sentinel: process for process in list(processes.values())}
    # They have closed their ends and are about to end.
    ended = [workers[sentinel] for sentinel in multiprocessing.connection.wait(workers, 0)]
    for process in ended:
        process.join(_TERMINATE_SECONDS)
    if any(process.exitcode == _NO_GUARD for process in ended):
        exc.args = (_ADVICE,)
        executor = pool()
        if executor is not None:
            _unguarded.add(executor)


def _fork_server_found_no_guard() -> bool:
    """Whether the fork server, which imports the main module too, ended for want of the guard."""
    module = sys.modules.get("multiprocessing.forkserver")
    pid = None if module is None else module._forkserver._forkserver_pid
    if pid is None:
        return False
    # It has closed its connections, so it is about to end, or has. multiprocessing must find it so.
    until = monotonic() + _TERMINATE_SECONDS
    while monotonic() < until:
        try:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except ChildProcessError:
            return False
        if ended is not None:
            return ended.si_status == _NO_GUARD
        sleep(0.001)
    return False


class ProcessPool:
    """The default process executor: made on first use, and made anew when it is broken.

    Which start method it uses is the choice of `multiprocessing.set_start_method`, or Python's; but
    where that is fork it is forkserver.

    :param at_first: called when one has been made that is the first in its process.
    """

    def __init__(self, at_first: Callable[[], object]) -> None:
        self.lock = _common.Making()  # guards _executor; held over a fork
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        self._at_first = at_first
        self._process: int | None = None  # in which it was called
        # The last one that broke. As it dies it takes its lock, which the thread that finds it
        # broken may hold: see `_submit`.
        self._former: concurrent.futures.ProcessPoolExecutor | None = None
        # Left by a parent process: kept, since ending it here would speak to the parent's workers.
        self._inherited: list[concurrent.futures.ProcessPoolExecutor] = []

    @property
    def executor(self) -> concurrent.futures.ProcessPoolExecutor:
        # No call waits for the lock once there is a pool.
        there = self._executor
        while there is None:
            with self.lock:
                if self._executor is None:
                    made = self._make()
                    if self._executor is None:  # no finalizer has made one meanwhile
                        self._executor = made
            there = self._executor
        return there

    def _make(self) -> concurrent.futures.ProcessPoolExecutor:
        try:
            executor = _make_process_pool()
            if self._process != os.getpid():
                self._at_first()
                self._process = os.getpid()
        except RuntimeError as exc:
            if "shutdown" not in str(exc):
                raise
            # Neither concurrent.futures' exit hook nor ours can be registered any more.
            raise RuntimeError("cannot schedule new futures after interpreter shutdown") from exc
        return executor

    def submit(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unfuture[Any]:
        if not _is_past_main:
            _end_if_importing_main()
        executor = self.executor
        try:
            return submit_to(executor, function, args, kwargs)
        except RuntimeError as exc:
            if not (
                isinstance(exc, concurrent.futures.BrokenExecutor) or executor._shutdown_thread
            ):
                raise
            if executor in _unguarded:
                raise  # so would the next one
            # A worker died, and those who had work there have been told; or somebody shut the pool
            # down. Either way this call is not concerned.
            with self.lock:
                if self._executor is executor:
                    self._executor, self._former = None, executor
        # Not while that is handled: else it would be the context of whatever is raised from now on.
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
        if not executor._broken:  # else it ends by itself, and may have its lock: see `_submit`
            executor.shutdown(wait=False, cancel_futures=True)
        if manager is None:
            return True
        if manager is threading.current_thread():
            return False  # it cannot wait for itself
        try:
            # It waits for the processes. Nobody else may, or each could miss what the other saw.
            manager.join(timeout)
        finally:  # after a Ctrl-C as well
            ended = not manager.is_alive()
            if not ended:
                for process in processes:
                    process.terminate()
                manager.join(_TERMINATE_SECONDS)
            if manager.is_alive():
                # Some have the program's own signal handlers, and do not end.
                for process in processes:
                    process.kill()
                manager.join(_TERMINATE_SECONDS)
            if not manager.is_alive():
                # If it has failed, it has left them alive, and multiprocessing would wait for them.
                for process in processes:
                    if process.is_alive():
                        process.kill()
        return ended

    def after_fork(self) -> None:
        """In the child: the pool's processes are the parent's children, not ours."""
        self.lock = _common.Making()
        left = self._executor, self._former
        self._executor = self._former = None
        for executor in left:
            if executor is None:
                continue
            self._inherited.append(executor)
            manager: Any = executor._executor_manager_thread
            if manager is not None:
                # A weak reference: when the executor dies it would write into the parent's pipe.
                manager.executor_reference = lambda: None
            # multiprocessing would try to join them when this process ends.
            import multiprocessing.process

            children: set[Any] = getattr(multiprocessing.process, "_children", set())
            children.difference_update((executor._processes or {}).values())


def start_method() -> str:
    """How the processes of the default pool begin, which are never forked from this one.

    A process that is forked beside threads, ours among them, takes over the locks that they hold,
    those of imports for one, and waits for them for ever. Nobody can tell whether fork was set, or
    only became Python's choice when somebody asked for it, so a set fork counts as none. In its
    place comes what Python chooses where it does not choose fork, or will from 3.14 on.
    """
    import multiprocessing

    methods = multiprocessing.get_all_start_methods()
    for method in (_pythons_choice(), methods[0], "forkserver"):
        if method != "fork" and method in methods:
            return method
    return "spawn"


def _pythons_choice() -> str:
    import multiprocessing

    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


def _make_process_pool() -> concurrent.futures.ProcessPoolExecutor:
    import multiprocessing

    might_fork = _pythons_choice() == "fork"
    return concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context(start_method()) if might_fork else None,
        initializer=_travel.set_up_process,
        initargs=(_BEGAN_ANEW if might_fork else None,),
    )


# What the first failure that may come of it is told in a process that fork might have given what it
# lacks: see `_travel._may_lack_state`.
_BEGAN_ANEW = (
    "unsync's own process pool never forks, even where Python does. Each process imports the main "
    "program and its modules anew: what the program sets when it runs, below its guard "
    '`if __name__ == "__main__":` for one, is not there. Give it as an argument, or assign an '
    "executor that forks to unsync.process_executor. (This is said once in each process.)"
)

# How long a process may take to end when it is told to.
_TERMINATE_SECONDS = 0.5


def _forget_fork_server(module: ModuleType | None) -> None:
    """In the child of a fork: the fork server is its parent's, and would take no orders from here.

    `multiprocessing` asks after it as its own child, which ends in a `ChildProcessError`.
    """
    server: Any = getattr(module, "_forkserver", None)
    if getattr(server, "_forkserver_pid", None) is None:
        return
    with suppress(OSError):
        # It ends when the last process closes this.
        os.close(server._forkserver_alive_fd)
    anew = type(server)()
    anew._preload_modules = server._preload_modules
    vars(server).update(vars(anew))
