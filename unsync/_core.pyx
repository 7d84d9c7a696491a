# cython: language_level=3, freethreading_compatible=True, binding=True, auto_pickle=False
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The core, compiled: the hot path of every call.

`_core_py.py` is its twin in plain Python: the same names, the same behaviour, and the types.
Who may touch what:

- What is written under `critical_section(x)` belongs to `x`'s lock. With the GIL that is no lock
  at all: such a section must do nothing that can release the GIL. So nothing in it calls Python
  code, drops a last reference (that may run a `__del__`) or makes a container (that may run the
  garbage collector, before 3.12).
- An Unfuture's `_status` is written in its section and last, and may be read anywhere: a final
  one says that `_outcome` and `_extra` are in place and will not change.
- A waiter belongs to whoever took it from the Unfuture's chain, and is fired once.
- A mailbox's `live` is written by its loop's thread only.
"""

import sys
import threading
from asyncio import CancelledError as AsyncioCancelledError
from asyncio import BaseEventLoop, Task, current_task, isfuture
from asyncio import _get_running_loop as running_loop
from asyncio.tasks import _enter_task, _leave_task
from collections import deque
from time import monotonic
from types import GenericAlias, MethodType
from weakref import ref

cimport cython
from cpython.contextvars cimport (
    PyContext_CopyCurrent,
    PyContext_Enter,
    PyContext_Exit,
    PyContext_New,
)
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM

from unsync._common import (
    PLAIN_TYPES,
    STATE_NAMES,
    TimedOutError,
    Waiters,
    already_done_error,
    awaited_exception,
    cancelled_error,
    check_callable,
    check_exception,
    close_unstarted,
    describe,
    is_awaitable,
    is_coroutine,
    log_failed_callback,
    logger,
    mirror_of,
    name_of as any_name_of,
    orphan_error,
    outcome_of_asyncio,
    rebuild,
    report_failed_callback,
    report_unseen_failure,
    thrown,
    wait_for_awaitable,
    would_deadlock_error,
)
from unsync._views import asyncio_view, concurrent_view

cdef extern from *:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
      #define unsync_load(p) (*(volatile unsigned char *)(p))
      #define unsync_store(p, v) (*(volatile unsigned char *)(p) = (unsigned char)(v))
    #else
      #define unsync_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
      #define unsync_store(p, v) __atomic_store_n((p), (unsigned char)(v), __ATOMIC_RELEASE)
    #endif

    /* A new reference to the `__qualname__` of a plain function. */
    static inline PyObject *unsync_function_name(PyObject *function) {
    #ifdef Py_GIL_DISABLED
        return PyObject_GetAttrString(function, "__qualname__"); /* somebody may be setting it */
    #else
        return Py_NewRef(((PyFunctionObject *)function)->func_qualname);
    #endif
    }
    """
    unsigned char load "unsync_load"(unsigned char *p) nogil
    void store "unsync_store"(unsigned char *p, int v) nogil
    object function_name "unsync_function_name"(object function)

cdef extern from "pythread.h":
    ctypedef void *PyThread_type_lock
    ctypedef long long PY_TIMEOUT_T
    ctypedef enum PyLockStatus:
        PY_LOCK_FAILURE
        PY_LOCK_ACQUIRED
        PY_LOCK_INTR
    PyThread_type_lock PyThread_allocate_lock() nogil
    void PyThread_free_lock(PyThread_type_lock lock) nogil
    PyLockStatus PyThread_acquire_lock_timed(
        PyThread_type_lock lock, PY_TIMEOUT_T microseconds, int intr_flag
    ) nogil
    void PyThread_release_lock(PyThread_type_lock lock) nogil
    unsigned long PyThread_get_thread_ident() nogil

cdef extern from "Python.h":
    ctypedef int (*initproc)(object, object, object) except -1
    ctypedef struct PyTypeObject:
        unsigned long tp_flags
        Py_ssize_t tp_vectorcall_offset
        object (*tp_new)(PyTypeObject *, object, PyObject *)
        initproc tp_init
    unsigned long Py_TPFLAGS_HAVE_VECTORCALL
    ctypedef PyObject *(*vectorcallfunc)(
        PyObject *callee, PyObject *const *args, size_t nargsf, PyObject *names
    ) except NULL
    Py_ssize_t PyVectorcall_NARGS(size_t nargsf) noexcept
    object PyObject_Vectorcall(
        object function, PyObject *const *args, size_t nargsf, PyObject *names
    )
    void PyType_Modified(PyTypeObject *cls) noexcept
    bint PyCoro_CheckExact(object value) noexcept
    bint PyFunction_Check(object value) noexcept
    bint PyObject_IS_GC(object value) noexcept
    bint PyObject_GC_IsTracked(object value) noexcept
    void PyObject_GC_Track(PyObject *value) noexcept
    void PyObject_GC_UnTrack(PyObject *value) noexcept
    int PyErr_CheckSignals() except -1

cdef extern from *:
    """
    /* Wakes a loop that has this descriptor among its readers. */
    #ifdef __linux__
      #include <errno.h>
      #include <stdint.h>
      #include <sys/eventfd.h>
      #include <unistd.h>
      static int bell_open(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }
      static int bell_ring(int bell) {
        const uint64_t one = 1;
        ssize_t written;
        do written = write(bell, &one, sizeof one); while (written < 0 && errno == EINTR);
        return written == sizeof one;
      }
      static void bell_still(int bell) {
        uint64_t rung;
        if (read(bell, &rung, sizeof rung) < 0) { /* nobody had rung */ }
      }
      static void bell_close(int bell) { close(bell); }
    #else
      static int bell_open(void) { return -1; }
      static int bell_ring(int bell) { (void)bell; return 0; }
      static void bell_still(int bell) { (void)bell; }
      static void bell_close(int bell) { (void)bell; }
    #endif

    /* Lets a thread that was just woken have this core, if it waits for it. */
    #ifdef _WIN32
      static void step_aside(void) { }
    #else
      #include <sched.h>
      static void step_aside(void) { sched_yield(); }
    #endif

    /* Whether the stack is far enough from the recursion limit to start something within it: up to
       Python 3.11 the limit holds for calls in C, too. */
    #if PY_VERSION_HEX < 0x030B0000
      static int has_room(void) {
        return PyThreadState_Get()->recursion_depth < Py_GetRecursionLimit() / 2;
      }
    #elif PY_VERSION_HEX < 0x030C0000
      static int has_room(void) {
        const PyThreadState *thread = PyThreadState_Get();
        return thread->recursion_remaining > thread->recursion_limit / 2;
      }
    #else
      static int has_room(void) { return 1; }
    #endif

    #ifdef Py_GIL_DISABLED
      #define UNSYNC_WITH_GIL 0
    #else
      #define UNSYNC_WITH_GIL 1
    #endif
    """
    int bell_open() noexcept
    bint bell_ring(int bell) noexcept nogil
    void bell_still(int bell) noexcept
    void bell_close(int bell) noexcept
    void step_aside() noexcept nogil
    bint has_room() noexcept
    bint WITH_GIL "UNSYNC_WITH_GIL"

# The states, as in `_common`.
cdef enum:
    PENDING = 0
    RUNNING = 1
    CANCELLED = 2
    CANCELLED_AND_NOTIFIED = 3
    FINISHED = 4
    FAILED = 5
    ANY = -1

# What `_source` is.
cdef enum:
    NOTHING = 0
    COROUTINE = 1  # without a task yet; until it is begun `_extra` is the context for it
    JOB = 2  # a function; until it is begun `_outcome` has its arguments, `_extra` its context
    TASK = 3  # `_outcome` is its coroutine's name
    CONTINUATION = 4  # the source of a `then`; until it is done `_outcome` is the function
    MAPPING = 5  # the same of a `map`
    UNFUTURE = 6
    MIRROR = 7
    NAME = 8  # of the function that was behind it, once it is done

# A drain gives the loop back to its timers and I/O after this many seconds.
cdef double DRAIN_SECONDS = 0.002
# How many items pass between two looks at the clock.
cdef int DRAIN_STRIDE = 16
# How many awaited calls may start one within the other: each takes some of the C stack.
cdef int NESTING = 32
# How many may start there and then in one turn of the loop, which others are waiting for.
cdef int STARTS_IN_A_TURN = 256

cdef bint HAS_EAGER_TASKS = sys.version_info >= (3, 12)
cdef bint HAS_TASK_CONTEXT = sys.version_info >= (3, 11)
cdef double LONGEST_WAIT = threading.TIMEOUT_MAX

# Counts the forks above this process: an Unfuture of an older one has nobody to finish it.
cdef unsigned int _generation = 0
# Guards the moment when a child first looks at one of its parent's Unfutures.
cdef object _fork_lock = threading.RLock()

cdef Mailbox _home = None
cdef object _start_home = None
cdef list _kept = []

cdef frozenset plain_types = PLAIN_TYPES

# Answers `_claim` when somebody else was first.
cdef object REFUSED = object()
# Answers `change` when the claim must be made again.
cdef object RETRY = object()


def set_home(Mailbox mailbox, start):
    """Names the ambient loop's mailbox, or with None the function that starts one on first use."""
    global _home, _start_home
    if not WITH_GIL:
        # Whoever reads these two takes no lock: what they ever were must not go away under them.
        _kept.append((mailbox, start))
    _home = mailbox
    _start_home = start


cdef Mailbox home():
    """The ambient loop's mailbox; the loop is started if it does not run."""
    cdef Mailbox mailbox = _home
    if mailbox is not None:
        return mailbox
    if _start_home is None:
        raise RuntimeError("no ambient loop has been set up")
    return _start_home()


def in_home_thread():
    """Whether this is the thread of the ambient loop."""
    cdef Mailbox mailbox = _home
    return mailbox is not None and mailbox._thread_id == PyThread_get_thread_ident()


def after_fork():
    """Run in the child: what was pending before the fork will never be finished here."""
    global _generation, _fork_lock
    _generation += 1
    _fork_lock = threading.RLock()


# For the usual kind of task, asked without looking the methods up.
cdef object task_done = Task.done
cdef object task_cancelled = Task.cancelled
cdef object task_exception = Task.exception
cdef object task_result = Task.result


# asyncio's own loops only return their attribute; a subclass may have something else to say.
cdef object own_get_task_factory = BaseEventLoop.get_task_factory


cdef inline task_factory_of(loop):
    if type(loop).get_task_factory is own_get_task_factory:
        return loop._task_factory
    return loop.get_task_factory()


cdef inline copy_context():
    """A copy of the current context; None in place of an empty one, which need not be kept."""
    context = PyContext_CopyCurrent()
    return context if len(context) else None


cdef Mailbox mailbox_of(loop):
    """The mailbox of the loop that runs in this thread.

    The loop owns it, as an attribute: what is never picked up must not outlive the loop, and
    would as the value of a registry, for it refers to the loop.
    """
    cdef Mailbox mailbox = getattr(loop, "_unsync_mailbox", None)
    if mailbox is None:
        mailbox = _home if _home is not None and _home._loop() is loop else Mailbox(loop)
        try:
            loop._unsync_mailbox = mailbox
        except (AttributeError, TypeError):
            pass  # a loop that takes no attribute has a box for every waiter, and more wakeups
    return mailbox


# Who holds the GIL when a thread is woken.
#
# A thread that is woken wants the GIL. On a core that it shares with its waker it runs at once, and
# if the waker holds the GIL it sleeps again: one call costs three times the switches that it
# needs. If the waker lets go of the GIL, the other does its work in that moment. But a burst would
# then be served call by call, with two switches for each, where one wakeup could serve it all. So
# the GIL is handed over, and the core with it, where the waker would soon wait anyway, and kept
# where it has more to do. These are guesses: a wrong one costs a few switches, nothing else. What
# they go by is guarded by the GIL; without it there is nothing to guess.

# How many calls were made since somebody last asked for a result, and in the run before that.
cdef int _calls = 0
cdef int _calls_before = 0
# The loop's thread or the worker whose mailbox or queue is empty; 0 for none.
cdef unsigned long _idle_thread = 0


cdef inline bint is_lone_call() noexcept:
    """Whether this looks like a call that will be waited for before the next is made."""
    global _calls
    cdef Mailbox mailbox
    if not WITH_GIL:
        return False
    mailbox = _home
    if mailbox is not None and mailbox._thread_id == PyThread_get_thread_ident():
        # Every second call at most, so that the loop has its turn.
        mailbox._calls += 1
        return mailbox._calls == 1 and mailbox._calls_before <= 2
    _calls += 1
    return _calls == 1 and _calls_before == 1


cdef inline void note_result() noexcept:
    """Somebody asks for a result: a run of calls has ended."""
    global _calls, _calls_before
    if WITH_GIL and _calls:
        _calls_before = _calls
        _calls = 0


cdef inline void note_idle(bint idle) noexcept:
    """Says whether the calling thread has nothing to do beyond what it does now."""
    global _idle_thread
    if WITH_GIL:
        _idle_thread = PyThread_get_thread_ident() if idle else 0


cdef inline void note_user_code() noexcept:
    """Whoever sets a future by hand is in the middle of something, and goes on with it."""
    global _idle_thread
    if WITH_GIL and _idle_thread == PyThread_get_thread_ident():
        _idle_thread = 0


cdef inline void wake_thread(PyThread_type_lock lock, bint hand_over) noexcept:
    if WITH_GIL and hand_over:
        with nogil:
            PyThread_release_lock(lock)
            step_aside()
    else:
        PyThread_release_lock(lock)


cdef class _Item:
    """What can stand in a mailbox or a job queue, or wait in the chain of an Unfuture.

    In one of them at a time: so that one link serves, and no container has to be made.
    """

    cdef _Item link

    cdef fire(self, Unfuture unfuture):
        """Called once, by the thread that finished `unfuture` (or found it done).

        Returns a follower that just got the same outcome, with its waiters, for the caller to
        fire next: chains are walked with a queue, never by recursion.
        """
        raise NotImplementedError

    cdef int arrive(self, Mailbox mailbox) except -1:
        """Called in the loop's thread."""
        raise NotImplementedError

    cdef int abandon(self) except -1:
        """Called in any thread, if the loop is closed."""
        raise NotImplementedError


cdef class _Line:
    """Items in the order they came; all of it belongs to the section of whoever it is part of."""

    cdef _Item _first
    cdef _Item _last

    cdef inline void push(self, _Item item) noexcept:
        if self._last is None:
            self._first = item
        else:
            self._last.link = item
        self._last = item

    cdef inline _Item pop(self):
        cdef _Item item = self._first
        if item is not None:
            self._first = item.link
            item.link = None
            if self._first is None:
                self._last = None
        return item


@cython.final
cdef class Mailbox(_Line):
    """What other threads leave for one event loop, picked up in batches: one wakeup per burst.

    Any thread may leave something. The first item wakes the loop, later ones only join it,
    until the loop finds the box empty. A closed loop's items are abandoned, each in its own way.

    The loop is held weakly: it owns the mailbox.
    """

    cdef object __weakref__
    cdef object _loop
    # Belongs to the section.
    cdef bint _armed
    # The ambient loop's thread; 0 for a foreign loop.
    cdef unsigned long _thread_id
    # The eventfd that wakes the loop, or -1; and who is about to write to it. In the section.
    cdef int _bell
    cdef int _ringing
    # asyncio holds tasks weakly; these have begun and must get to their end.
    cdef readonly dict live
    # Those whose coroutines make their first step now, each within the one before it; its own
    # lock is enough.
    cdef list _starting
    # These belong to the loop's thread.
    # How many functions were called in this turn of the loop and the one before, and how many
    # awaited calls were started there and then.
    cdef int _calls
    cdef int _calls_before
    cdef int _starts
    # The loop, while the box is drained, and whether it is in debug mode.
    cdef object _running
    cdef bint _debug
    # The keywords for the next task, unless they are in use.
    cdef dict _options
    # Before Python 3.12: the task that is being made, its first step, and what catches that.
    cdef object _beginner
    cdef object _first_step
    cdef object _context
    cdef object _catch
    cdef dict _attributes

    def __init__(self, loop):
        self._loop = ref(loop)
        self._bell = -1
        self.live = {}
        self._starting = []

    @property
    def loop(self):
        return self._loop()

    @property
    def thread_id(self):
        return self._thread_id or None

    @thread_id.setter
    def thread_id(self, unsigned long thread_id):
        self._thread_id = thread_id

    cdef inline bint is_of(self, loop) except -1:
        return loop is (self._loop() if self._running is None else self._running)

    cdef int post(self, _Item item) except -1:
        """Leaves `item` for the loop; `item.arrive(mailbox)` is called in its thread."""
        cdef bint wake = False
        with cython.critical_section(self):
            self.push(item)
            if not self._armed:
                self._armed = True
                wake = True
        if wake:
            self.wake()
        return 0

    cdef int wake(self) except -1:
        loop = self._loop()
        try:
            if loop is None:
                self.close()
            elif running_loop() is loop:
                loop.call_soon(self._drain)
            elif not self.ring():
                loop.call_soon_threadsafe(self._drain)
        except BaseException as exc:
            if type(exc) is RuntimeError and loop is not None and loop.is_closed():
                self.close()
                return 0
            # Nobody is coming: whoever posts next must try again. A Ctrl-C may be what failed.
            with cython.critical_section(self):
                self._armed = False
            raise
        return 0

    # The bell: an eventfd costs one short system call to ring and one to still. The loop's own way
    # to be woken, call_soon_threadsafe(), takes three on a socket pair, and more Python.

    def open_bell(self):
        """Has the loop woken by a bell of the mailbox's own, where there is such a thing.

        Called before the loop runs, or in its thread.
        """
        cdef int bell = bell_open()
        if bell < 0:
            return
        try:
            self._loop().add_reader(bell, self._on_bell)
        except Exception:  # the loop has no readers, and will be woken in its own way
            bell_close(bell)
            return
        with cython.critical_section(self):
            self._bell = bell

    def close_bell(self):
        """Called in the loop's thread before the loop is closed."""
        cdef int bell = -1
        cdef bint in_use = False
        with cython.critical_section(self):
            bell = self._bell
            self._bell = -1
            in_use = self._ringing > 0
        self._options = self._catch = self._attributes = None
        if bell >= 0:
            self._loop().remove_reader(bell)
            if not in_use:
                bell_close(bell)

    cdef bint ring(self) except -1:
        """Rings the bell; False if there is none."""
        cdef int bell = -1
        cdef bint rung = False, forsaken = False
        with cython.critical_section(self):
            bell = self._bell
            if bell >= 0:
                self._ringing += 1
        if bell < 0:
            return False
        if WITH_GIL and _idle_thread == PyThread_get_thread_ident():
            with nogil:
                rung = bell_ring(bell)
        else:
            rung = bell_ring(bell)
        with cython.critical_section(self):
            self._ringing -= 1
            forsaken = self._bell < 0 and self._ringing == 0
        if forsaken:
            bell_close(bell)  # the loop went in between: the descriptor was left to us
        return rung

    def _on_bell(self):
        bell_still(self._bell)
        self._drain()

    cdef _Item take(self):
        """The next item; None, and disarmed, if there is none."""
        cdef _Item item = None
        with cython.critical_section(self):
            item = self.pop()
            if item is None:
                self._armed = False
            note_idle(self._first is None)
        return item

    def _drain(self):
        cdef _Item item
        cdef int count = 0
        cdef double until = monotonic() + DRAIN_SECONDS
        self._running = self._loop()
        self._debug = self._running.get_debug()
        self._calls_before = self._calls
        self._calls = 0
        self._starts = 0
        try:
            while True:
                item = self.take()
                if item is None:
                    return
                item.arrive(self)
                count += 1
                if count == DRAIN_STRIDE:
                    count = 0
                    if monotonic() >= until:
                        break
        except BaseException:
            # Only KeyboardInterrupt and SystemExit leave a task; the loop will hear of it, the
            # other items must not suffer.
            self.wake()
            raise
        finally:
            self._running = None
            note_idle(False)
        self.wake()

    cdef int start_now(self, Unfuture unfuture) except -1:
        """For an `await` in the loop itself: starts what is awaited there and then.

        Only if it is all there is to do: what was called before is started before.
        """
        cdef bint alone = False
        if self._starts >= STARTS_IN_A_TURN or len(self._starting) >= NESTING:
            return 0
        if not has_room():
            return 0
        with cython.critical_section(self):
            alone = self._first is unfuture and self._last is unfuture
            if alone:
                self._first = self._last = None  # the caller holds it
        if alone:
            self._starts += 1
            unfuture.arrive(self)
        return 0

    def close(self):
        """Abandons what is here, and leaves the box so that later items are abandoned too."""
        cdef _Item item
        while True:
            item = self.take()
            if item is None:
                return
            item.abandon()

    @property
    def starting(self):
        return list(self._starting)

    cdef int start(self, Unfuture unfuture, coro, context) except -1:
        """Starts `coro` as a task of this loop, in whose thread this is called."""
        self._starting.append(unfuture)
        try:
            name = name_of(coro)
            task = self.make_task(coro, context, name)
        except BaseException as exc:
            # The first step raised KeyboardInterrupt or SystemExit, or the user's task factory
            # refused: the caller hears of it, the loop goes on.
            close_unstarted(coro)
            unfuture.complete(FAILED, exc, ANY)
            return 0
        finally:
            self._starting.pop()
        if task_done(task) if type(task) is Task else task.done():
            unfuture.ended_at_once(task)
            return 0
        self.live[task] = unfuture
        unfuture.started(task, name)
        task.add_done_callback(_TaskDone(self, unfuture), context=context)
        return 0

    cdef make_task(self, coro, context, name):
        loop = self._loop() if self._running is None else self._running
        if task_factory_of(loop) is not None:
            task = context.run(loop.create_task, coro)
            if hasattr(task, "set_name"):
                task.set_name(name)
            return task
        # In two steps: if the coroutine's first step raises KeyboardInterrupt, the task is there
        # to be asked for it, else asyncio would report that nobody did.
        task = (<PyTypeObject *>Task).tp_new(<PyTypeObject *>Task, (), NULL)
        try:
            if HAS_EAGER_TASKS:
                self.init_task(task, loop, coro, context, name)
            else:
                self.begin_at_once(task, loop, coro, context, name)
        except BaseException:
            if task.done():
                outcome_of_asyncio(task)
            raise
        return task

    cdef int init_task(self, task, loop, coro, context, name) except -1:
        cdef dict options = self._options
        # A task within a task's first step finds them in use, and has its own.
        self._options = None
        if options is None:
            options = {"loop": loop}
            if HAS_EAGER_TASKS:
                options["eager_start"] = True
        options["name"] = name
        if HAS_TASK_CONTEXT:
            options["context"] = context
        else:
            PyContext_Enter(context)
        try:
            (<PyTypeObject *>Task).tp_init(task, (coro,), options)
        finally:
            if HAS_TASK_CONTEXT:
                options["context"] = None
            else:
                PyContext_Exit(context)
            self._options = options
        return 0

    cdef int begin_at_once(self, task, loop, coro, context, name) except -1:
        """Before Python 3.12: makes the first step, which the task asks the loop to make soon.

        A loop that takes no attributes makes the step in its turn.
        """
        cdef bint catches = False
        if self._catch is None:
            self._catch = self._catch_first_step
            self._attributes = getattr(loop, "__dict__", {"call_soon": None})
        if self._beginner is None and "call_soon" not in self._attributes:
            self._beginner = task
            self._attributes["call_soon"] = self._catch
            catches = True
        try:
            self.init_task(task, loop, coro, context, name)
        finally:
            if catches:
                del self._attributes["call_soon"]
                step = self._first_step
                context = self._context  # on 3.10 a copy, made by the task
                self._beginner = self._first_step = self._context = None
        if not catches or step is None:
            return 0
        outer = current_task(loop)
        if outer is not None:
            _leave_task(loop, outer)
        PyContext_Enter(context)
        try:
            step()
        finally:
            PyContext_Exit(context)
            if outer is not None:
                _enter_task(loop, outer)
        return 0

    def _catch_first_step(self, callback, *args, context=None):
        """The loop's `call_soon` while `_beginner` is made."""
        if self._first_step is None and getattr(callback, "__self__", None) is self._beginner:
            self._first_step = callback
            self._context = context
            return None
        loop = self._loop()
        return type(loop).call_soon(loop, callback, *args, context=context)


@cython.final
cdef class _TaskDone:
    """The done-callback of a task that did not end in its first step."""

    cdef Mailbox mailbox
    cdef Unfuture unfuture

    def __init__(self, Mailbox mailbox, Unfuture unfuture):
        self.mailbox = mailbox
        self.unfuture = unfuture

    def __call__(self, task):
        self.mailbox.live.pop(task, None)
        self.unfuture.take_outcome(task)


cdef name_of(thing):
    name = quick_name_of(thing)
    return any_name_of(thing) if name is None else name


cdef inline quick_name_of(thing):
    """The name without running Python code; None if that would be needed."""
    if PyFunction_Check(thing):
        return function_name(thing)
    if PyCoro_CheckExact(thing):
        return thing.__qualname__
    return None


cdef name_behind(int kind, source, outcome):
    """The name of the function behind an Unfuture; None if there is none."""
    if kind == COROUTINE or kind == JOB:
        return name_of(source)
    if kind == CONTINUATION or kind == MAPPING:
        return name_of(outcome)
    if kind == TASK:
        return outcome
    if kind == MIRROR:
        return source.function
    if kind == NAME:
        return source
    return None


cdef quick_name_behind(int kind, source, outcome):
    if kind == TASK:
        return outcome
    return quick_name_of(outcome if kind == CONTINUATION or kind == MAPPING else source)


@cython.final
@cython.trashcan(True)
cdef class _Blocked(_Item):
    """A thread that waits in `result()` or `exception()`."""

    cdef PyThread_type_lock lock

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock is NULL:
            raise MemoryError("cannot allocate a lock")
        PyThread_acquire_lock_timed(self.lock, 0, 0)

    def __dealloc__(self):
        if self.lock is not NULL:
            PyThread_free_lock(self.lock)

    cdef fire(self, Unfuture unfuture):
        wake_thread(self.lock, _idle_thread == PyThread_get_thread_ident())

    cdef bint wait(self, timeout) except? -1:
        """Blocks until it is fired; False after `timeout` seconds. Signal handlers may raise."""
        cdef double until = 0, left = 0
        cdef PY_TIMEOUT_T microseconds = -1
        cdef PyLockStatus status
        if timeout is not None:
            left = min(max(<double>timeout, 0.0), LONGEST_WAIT)
            until = <double>monotonic() + left
            microseconds = <PY_TIMEOUT_T>(left * 1e6)
        while True:
            with nogil:
                status = PyThread_acquire_lock_timed(self.lock, microseconds, 1)
            if status == PY_LOCK_ACQUIRED:
                return True
            if status == PY_LOCK_FAILURE:
                return False
            PyErr_CheckSignals()
            if timeout is not None:
                left = until - <double>monotonic()
                microseconds = <PY_TIMEOUT_T>(max(left, 0.0) * 1e6)


@cython.final
@cython.trashcan(True)
cdef class _Callback(_Item):
    """A done-callback; bound to the loop that ran where it was added, if one did."""

    cdef object function
    cdef object context
    cdef object loop
    cdef Mailbox mailbox
    cdef Unfuture unfuture

    def __init__(self, function, context, loop):
        self.function = function
        self.context = context
        self.loop = loop
        self.mailbox = None if loop is None else mailbox_of(loop)

    cdef fire(self, Unfuture unfuture):
        if self.loop is None:
            self.call(unfuture)
        elif running_loop() is self.loop:
            self.schedule(unfuture)
        else:
            self.unfuture = unfuture
            self.mailbox.post(self)

    cdef call(self, Unfuture unfuture):
        try:
            if self.context is None:
                self.function(unfuture)
            else:
                self.context.run(self.function, unfuture)
        except BaseException as exc:
            log_failed_callback(self.function, unfuture, exc)

    cdef schedule(self, Unfuture unfuture):
        function = self.call_in_ambient_loop if self.mailbox._thread_id else self.function
        self.loop.call_soon(function, unfuture, context=self.context)

    def call_in_ambient_loop(self, unfuture):
        try:
            self.function(unfuture)
        except (KeyboardInterrupt, SystemExit) as exc:
            # It would leave the loop, where nobody runs it who could hear of it.
            log_failed_callback(self.function, unfuture, exc)

    cdef int arrive(self, Mailbox mailbox) except -1:
        """Calls it there and then; a loop in debug mode wants to time each callback."""
        if mailbox._debug:
            self.schedule(self.unfuture)
            return 0
        failure = None
        try:
            PyContext_Enter(self.context)
            try:
                self.function(self.unfuture)
            finally:
                PyContext_Exit(self.context)
        except BaseException as exc:
            failure = exc
        if failure is not None:
            report_failed_callback(
                self.function, self.unfuture, self.context, failure, self.loop, mailbox._thread_id
            )
        return 0

    cdef int abandon(self) except -1:
        logger.debug("%r: its loop is closed, the callback is not called", self.function)
        return 0


def when_done(Unfuture unfuture, function):
    """Has the thread that finishes it call `function(unfuture)`, whichever loop may run here.

    At once if it is done.
    """
    cdef _Callback callback = _Callback(function, None, None)
    if not unfuture.add_waiter(callback):
        callback.fire(unfuture)


@cython.final
@cython.trashcan(True)
cdef class _Park(_Item):
    """One `await`: its iterator, and what the suspended task is parked on.

    It belongs to that one task: `_asyncio_future_blocking` is a handshake between two, and two
    loops that await one Unfuture would race on it.
    """

    cdef public bint _asyncio_future_blocking
    cdef bint begun
    cdef bint ended
    cdef Unfuture unfuture
    cdef object loop
    cdef Mailbox mailbox
    cdef object wakeup
    cdef object context

    def __iter__(self):
        return self

    def __next__(self):
        cdef Unfuture unfuture = self.unfuture
        cdef Mailbox mailbox = _home
        if not unfuture.is_done():
            if self.begun:
                raise RuntimeError("await wasn't used with future")
            self.begun = True
            loop = running_loop()
            if loop is None:
                raise RuntimeError(f"no running event loop to wait in for {unfuture!r}")
            if unfuture.is_call() and mailbox is not None and mailbox.is_of(loop):
                mailbox.start_now(unfuture)
            if not unfuture.is_done():
                unfuture.check_not_own(loop)
                self.loop = loop
                self.mailbox = mailbox_of(loop)
                self._asyncio_future_blocking = True
                return self
        raise StopIteration(unfuture.awaited())

    def send(self, value):
        """As asyncio's: for those who drive a coroutine by hand."""
        if self.ended:
            raise StopIteration
        return self.__next__()

    def throw(self, kind, value=None, traceback=None):
        exc = thrown(kind, value, traceback)
        self.ended = True
        raise exc

    def close(self):
        self.ended = True

    # What a task asks of the future that it is parked on.

    def get_loop(self):
        return self.loop

    def add_done_callback(self, function, *, context=None):
        self.wakeup = function
        self.context = PyContext_CopyCurrent() if context is None else context
        if not self.unfuture.add_waiter(self):
            self.loop.call_soon(function, self, context=self.context)

    def remove_done_callback(self, function):
        return self.unfuture.remove_waiter(self)

    def cancel(self, msg=None):
        return self.unfuture.cancel(msg)

    def done(self):
        return load(&self.unfuture._status) >= CANCELLED

    def result(self):
        """The task only asks whether to go on: `__next__` gives the outcome to its coroutine."""

    # How the end of the wait reaches the task.

    cdef fire(self, Unfuture unfuture):
        if running_loop() is self.loop:
            self.loop.call_soon(self.wakeup, self, context=self.context)
        else:
            self.mailbox.post(self)

    cdef int arrive(self, Mailbox mailbox) except -1:
        PyContext_Enter(self.context)
        try:
            self.wakeup(self)
        finally:
            PyContext_Exit(self.context)
        return 0

    cdef int abandon(self) except -1:
        logger.debug("%r: the loop of a task that awaited it is closed", self.unfuture)
        return 0


@cython.final
@cython.trashcan(True)
cdef class _Follower(_Item):
    """Gives an Unfuture the outcome of the one it waits for."""

    cdef Unfuture target

    cdef fire(self, Unfuture unfuture):
        store(&unfuture._unseen, False)
        return pass_on(unfuture, self.target)


cdef pass_on(Unfuture source, Unfuture target):
    cdef int status = load(&source._status)
    if status == CANCELLED_AND_NOTIFIED:
        status = CANCELLED
    chain = target.claim(status, source._outcome, ANY)
    return None if chain is REFUSED else (target, chain)


cdef int fire_all(Unfuture unfuture, _Item chain) except -1:
    """Fires a finished Unfuture's waiters in the order they came, then its followers' waiters."""
    cdef _Item waiter, following
    backlog = None
    while True:
        waiter = oldest_first(chain)
        while waiter is not None:
            following = waiter.link
            waiter.link = None
            try:
                follower = waiter.fire(unfuture)
            except BaseException:
                logger.exception("waking %r for %r failed", waiter, unfuture)
            else:
                if follower is not None:
                    if backlog is None:
                        backlog = deque()
                    backlog.append(follower)
            waiter = following
        if not backlog:
            return 0
        unfuture, chain = backlog.popleft()


cdef _Item oldest_first(_Item chain):
    cdef _Item first = None, following
    while chain is not None:
        following = chain.link
        chain.link = first
        first = chain
        chain = following
    return first


@cython.final
cdef class _Keywords:
    """The arguments of a function that is called with keywords."""

    cdef tuple args
    cdef dict kwargs

    cdef call(self, function):
        return function(*self.args, **self.kwargs)


cdef inline Unfuture blank():
    return Unfuture.__new__(Unfuture)


# What the garbage collector need not look at.
#
# It walks over all containers again and again as their number grows, and a million calls on their
# way would be millions of them. But a call on its way cannot be garbage: the mailbox, the loop, the
# queue or the worker holds it until it is done, and with it whatever waits in its chain. So the
# Unfuture of a call begins untracked, as does that of a `then` upon one that is. It is tracked from
# when it is done, unless the outcome can refer to nothing, or waits for another. Its coroutine is
# untracked until it begins; CPython wants it tracked when it is freed.


cdef inline Unfuture blank_on_its_way():
    cdef Unfuture unfuture = blank()
    PyObject_GC_UnTrack(<PyObject *>unfuture)
    return unfuture


cdef inline void track(value) noexcept:
    if not PyObject_GC_IsTracked(value):
        PyObject_GC_Track(<PyObject *>value)


@cython.trashcan(True)
cdef class Unfuture(_Item):
    """One future for both worlds: threads wait on it with `result()`, coroutines `await` it.

    It does what an `asyncio.Future` and a `concurrent.futures.Future` do, at once, and every
    method may be called from any thread. It is bound to no loop.

    :param source: nothing, for one to set by hand; an asyncio future or task, a concurrent
        future or another Unfuture, to have the same outcome and pass on cancelling; or a
        coroutine, to run it in the ambient event loop.
    :raises TypeError: if `source` is anything else.
    :raises RuntimeError: if `source` is a pending asyncio future whose loop is closed.
    """

    cdef object __weakref__
    cdef unsigned char _status
    # A failure that nobody has looked at yet.
    cdef unsigned char _unseen
    # What `_source` is.
    cdef unsigned char _kind
    cdef unsigned int _generation
    # The result, the exception, or the message of a cancellation; before that see `_kind`.
    cdef object _outcome
    # The context for what has not begun; the message, in a tuple, of a cancel() that came while
    # a coroutine made its first step; the traceback of a failure.
    cdef object _extra
    # What is behind a pending or running one: see cancel().
    cdef object _source
    cdef _Item _chain
    cdef object _side

    # asyncio.isfuture() looks for it. No task is ever parked on the Unfuture itself: see _Park.
    _asyncio_future_blocking = False

    __class_getitem__ = classmethod(GenericAlias)

    def __cinit__(self):
        self._generation = _generation

    def __dealloc__(self):
        if self._kind == COROUTINE and self._source is not None and PyCoro_CheckExact(self._source):
            track(self._source)

    def __init__(self, source=None):
        if source is None:
            return
        if isinstance(source, Unfuture):
            self.follow(source)
        elif is_coroutine(source):
            mailbox = home()
            self._source = source
            self._extra = copy_context()
            self._kind = COROUTINE
            mailbox.post(self)
        else:
            mirror = mirror_of(self, source)
            self._source = mirror
            self._kind = MIRROR
            mirror.attach()

    @classmethod
    def from_value(cls, value):
        """One that is finished already, with `value` as its result."""
        unfuture = cls()
        unfuture.set_result(value)
        return unfuture

    # Looking at it.

    def result(self, timeout=None):
        """The result, waiting for it as long as it takes or `timeout` seconds.

        It blocks the calling thread, as in concurrent.futures; in `unsync.thread` it never
        waits, as in asyncio.

        :raises TimeoutError: after `timeout` seconds.
        :raises InvalidStateError: in `unsync.thread`, if it is not done.
        :raises CancelledError: if it was cancelled.
        :raises BaseException: what the function raised.
        """
        note_result()
        if load(&self._status) < CANCELLED:
            self.wait(timeout)
        if self._status == FINISHED:
            return self._outcome
        if self._status == FAILED:
            store(&self._unseen, False)
            raise self._outcome.with_traceback(self._extra)
        raise cancelled_error(self._outcome, running_loop() is not None)

    def exception(self, timeout=None):
        """The exception, or None if there is a result; waits as `result` does.

        :raises TimeoutError: after `timeout` seconds.
        :raises InvalidStateError: in `unsync.thread`, if it is not done.
        :raises CancelledError: if it was cancelled.
        """
        note_result()
        if load(&self._status) < CANCELLED:
            self.wait(timeout)
        if self._status == FINISHED:
            return None
        if self._status == FAILED:
            store(&self._unseen, False)
            return self._outcome
        raise cancelled_error(self._outcome, running_loop() is not None)

    cdef bint is_done(self) except -1:
        if load(&self._status) < CANCELLED:
            self.check_fork()
        return load(&self._status) >= CANCELLED

    cdef bint is_call(self) noexcept:
        """Whether behind it is a coroutine that has not begun."""
        cdef bint answer
        with cython.critical_section(self):
            answer = self._status == PENDING and self._kind == COROUTINE
        return answer

    def done(self):
        """Whether it has a result or an exception or was cancelled."""
        return self.is_done()

    def running(self):
        """Whether the work behind it has begun and not ended."""
        cdef Unfuture unfuture = self
        cdef int status, kind
        while True:
            unfuture.check_fork()
            with cython.critical_section(unfuture):
                status = unfuture._status
                kind = unfuture._kind
                source = unfuture._source
            if status != PENDING:
                return status == RUNNING
            if kind != UNFUTURE:
                return kind == MIRROR and source.running()
            unfuture = source

    cdef bint is_cancelled(self) noexcept:
        cdef int status = load(&self._status)
        return CANCELLED <= status <= CANCELLED_AND_NOTIFIED

    def cancelled(self):
        """Whether it was cancelled."""
        return self.is_cancelled()

    def get_loop(self):
        """The running loop, else the ambient one: an Unfuture can be awaited in every loop."""
        loop = running_loop()
        return home()._loop() if loop is None else loop

    @property
    def future(self):
        """A true `asyncio.Future` that shows this one; of the running loop, else the ambient one.

        A new one each time. Outcome and cancellation go both ways, as does what is set.
        """
        return asyncio_view(self, when_done)

    @property
    def concurrent_future(self):
        """A true `concurrent.futures.Future` that shows this one.

        A new one each time. Outcome and cancellation go both ways, as does what is set.
        """
        return concurrent_view(self, when_done)

    def __await__(self):
        """Suspends the calling coroutine, in whatever loop it runs, until there is an outcome.

        A cancelled awaiter cancels what it awaits, as in asyncio.

        :raises asyncio.CancelledError: if it was cancelled.
        :raises BaseException: what the function raised.
        """
        cdef _Park park = _Park.__new__(_Park)
        park.unfuture = self
        return park

    def __iter__(self):
        return self.__await__()

    # Setting it.

    def set_result(self, result):
        """Finishes it with `result`.

        :raises InvalidStateError: if it is done already.
        """
        self.set(FINISHED, result)

    def set_value(self, result):
        """The same as `set_result`."""
        self.set(FINISHED, result)

    def set_exception(self, exception):
        """Finishes it with `exception`, an instance or a class to make one of.

        :raises InvalidStateError: if it is done already.
        :raises TypeError: if it is no exception.
        """
        if self.is_done():
            raise already_done_error(self)
        self.set(FAILED, check_exception(exception))

    cdef int set(self, int status, outcome) except -1:
        note_user_code()
        mirror = None
        with cython.critical_section(self):
            if self._kind == MIRROR:
                mirror = self._source
        if not self.complete(status, outcome, ANY):
            raise already_done_error(self)
        if mirror is not None:
            mirror.push(status, outcome)
        return 0

    def set_running_or_notify_cancel(self):
        """For executors, as in concurrent.futures: marks it running.

        Returns False if it was cancelled: then its work must not begin.

        :raises RuntimeError: if it is running or finished.
        """
        cdef int status
        with cython.critical_section(self):
            status = self._status
            if status == PENDING:
                store(&self._status, RUNNING)
            elif status == CANCELLED:
                store(&self._status, CANCELLED_AND_NOTIFIED)
        if status == PENDING:
            return True
        if CANCELLED <= status <= CANCELLED_AND_NOTIFIED:
            return False
        raise RuntimeError(f"this Unfuture is not pending: {self!r}")

    def cancel(self, msg=None):
        """Cancels what is behind it; `msg` goes with the CancelledError.

        A coroutine sees `CancelledError` and decides, as in asyncio; work that has not begun
        never will; the source of a `then` is cancelled with it, as what is awaited would be.
        A function that already runs in a thread or a process cannot be stopped: a plain thread
        gets False, as in concurrent.futures; where a loop runs the Unfuture is cancelled and the
        function's outcome dropped, as in asyncio.

        Returns whether it is, or is being, cancelled.
        """
        cdef Unfuture behind
        answer, behind = self.cancel_this(msg)
        while behind is not None:
            cancelled, behind = behind.cancel_this(msg)
            if answer is None:
                answer = cancelled
        return bool(answer)

    cdef tuple cancel_this(self, msg):
        """Whether this one is cancelled (None: as the next one is), and the next to cancel."""
        cdef int status, kind
        self.check_fork()
        request = (msg,)
        with cython.critical_section(self):
            status = self._status
            kind = self._kind
            source = self._source
            if status == RUNNING and kind == COROUTINE:
                # The context has been taken, or is in use: nothing is dropped here.
                self._extra, request = request, self._extra
        if status >= CANCELLED:
            store(&self._unseen, False)  # as in asyncio: who cancels does not want to hear of it
            return status <= CANCELLED_AND_NOTIFIED, None
        if status == RUNNING and kind == COROUTINE:
            return True, None
        if kind == UNFUTURE:
            return None, source
        if kind == TASK:
            self.cancel_task(source, msg)
            return True, None
        if status == PENDING:
            if kind == MIRROR:
                if source.cancel(msg):
                    return True, None
            elif self.complete(CANCELLED, msg, PENDING):
                return True, source if kind == CONTINUATION or kind == MAPPING else None
            else:
                return self.cancel_this(msg)  # it began or ended in between
        if running_loop() is not None:
            self.complete(CANCELLED, msg, ANY)
        return self.is_cancelled(), None

    cdef int cancel_task(self, task, msg) except -1:
        loop = task.get_loop()
        try:
            if running_loop() is loop:
                task.cancel(msg)
            else:
                loop.call_soon_threadsafe(task.cancel, msg)
        except RuntimeError:
            self.complete(CANCELLED, msg, ANY)  # the loop is closed, the task will never end
        return 0

    # Going on from it.

    def add_done_callback(self, fn, *, context=None):
        """Has `fn(unfuture)` called once it is done.

        Added where a loop is running: called in that loop's thread, soon, as in asyncio. Added
        elsewhere: called by the thread that finishes it, at once if it is done, as in
        concurrent.futures. What a callback raises is logged and stops no other.

        :param context: the context to call it in; in a loop the default is a copy of the
            current one.
        :raises TypeError: if `fn` is not callable.
        """
        if not callable(fn):
            check_callable("a done-callback", fn)
        loop = running_loop()
        if loop is not None and context is None:
            context = PyContext_CopyCurrent()
        cdef _Callback callback = _Callback(fn, context, loop)
        if not self.add_waiter(callback):
            callback.fire(self)

    def remove_done_callback(self, fn):
        """Removes every callback that equals `fn`; returns how many there were."""
        cdef _Item waiter
        cdef int removed = 0
        found = []
        with cython.critical_section(self):
            waiter = self._chain
            while waiter is not None:
                found.append(waiter)
                waiter = waiter.link
        for waiter in found:
            if type(waiter) is _Callback and (<_Callback>waiter).function == fn:
                removed += self.remove_waiter(waiter)
        return removed

    def then(self, continuation):
        """An Unfuture for what `continuation(unfuture)` returns, called once this one has a result.

        It is called in `unsync.thread`, in the current context, with this finished Unfuture. If
        it returns an awaitable, that one's result counts. It is not called if this one fails or
        is cancelled: the outcome passes on.

        :raises TypeError: if `continuation` is not callable.
        """
        if not callable(continuation):
            check_callable("a continuation", continuation)
        return self.go_on(continuation, CONTINUATION)

    def map(self, fn):
        """The same as `then`, but `fn` is called with the result.

        :raises TypeError: if `fn` is not callable.
        """
        if not callable(fn):
            check_callable("a continuation", fn)
        return self.go_on(fn, MAPPING)

    cdef Unfuture go_on(self, function, int kind):
        # The target is its own continuation: it waits in the chain, and then in the mailbox.
        cdef Unfuture target = blank() if PyObject_GC_IsTracked(self) else blank_on_its_way()
        target._source = self
        target._outcome = function
        target._extra = copy_context()
        target._kind = kind
        if not self.add_waiter(target):
            follower = target.fire(self)
            if follower is not None:
                fire_all(follower[0], follower[1])
        return target

    cdef fire(self, Unfuture source):
        if load(&source._status) != FINISHED:
            store(&source._unseen, False)
            return pass_on(source, self)
        try:
            home().post(self)
        except BaseException as exc:
            # The ambient loop cannot be started: the one who waits must hear of it.
            self.complete(FAILED, exc, ANY)
        return None

    cdef int go_on_now(self, Mailbox mailbox, int kind, Unfuture source, function, context):
        """In the ambient loop: calls the continuation."""
        try:
            PyContext_Enter(context)
            try:
                result = function(source._outcome if kind == MAPPING else source)
            finally:
                PyContext_Exit(context)
            # In here as well: nobody else would finish it if this failed.
            self.resolve(result, context, mailbox)
        except AsyncioCancelledError as exc:
            self.complete(CANCELLED, exc.args[0] if exc.args else None, ANY)
        except BaseException as exc:
            self.complete(FAILED, exc, ANY)
        return 0

    # The room where it changes.

    cdef claim(self, int status, outcome, int expected):
        """Makes it done, once: the waiters to fire, or REFUSED if somebody else was first."""
        self.check_fork()
        chain = self.change(status, outcome, expected, None)
        if chain is RETRY:
            # concurrent.futures.wait() reads the state and enlists under this condition, so the
            # state must not change between the two.
            side = self.side()
            with side.condition:
                chain = self.change(status, outcome, expected, side)
                if chain is not REFUSED:
                    side.tell(self, load(&self._status))
        return chain

    cdef side(self):
        with cython.critical_section(self):
            side = self._side
        return side

    cdef change(self, int status, outcome, int expected, side):
        """The change of state itself; RETRY if `side` is not what belongs to the Unfuture now."""
        cdef int before
        cdef int kind = NOTHING
        traceback = outcome.__traceback__ if status == FAILED else None
        chain = REFUSED
        source = extra = former = name = None
        if status == CANCELLED and side is not None:
            status = CANCELLED_AND_NOTIFIED
        with cython.critical_section(self):
            before = self._status
            if self._side is not side:
                chain = RETRY
            elif before < CANCELLED and (expected == ANY or before == expected):
                kind = self._kind
                # Held in locals, so that nothing is dropped in here.
                source = self._source
                extra = self._extra
                former = self._outcome
                chain = self._chain
                self._chain = None
                self._source = name = quick_name_behind(kind, source, former)
                self._kind = NOTHING if name is None else NAME
                self._outcome = outcome
                self._extra = traceback
                if PyObject_IS_GC(outcome):
                    track(self)
                if status == FAILED:
                    store(&self._unseen, True)
                store(&self._status, status)
        if name is None and kind != NOTHING:
            self.keep_name(name_behind(kind, source, former))
        if kind == COROUTINE and before == PENDING:
            if PyCoro_CheckExact(source):
                track(source)
            close_unstarted(source)
        return chain

    cdef int keep_name(self, name) except -1:
        """For `repr`: the function that was behind it."""
        if name is None:
            return 0
        with cython.critical_section(self):
            if self._kind == NOTHING:
                self._source = name
                self._kind = NAME
        return 0

    def _name_function(self, function):
        """For `repr`: the function behind the future that this was made from."""
        mirror = None
        name = name_of(function)
        with cython.critical_section(self):
            if self._kind == MIRROR:
                mirror = self._source
        if mirror is not None:
            mirror.function = name
        if load(&self._status) >= CANCELLED:
            self.keep_name(name)

    cdef bint complete(self, int status, outcome, int expected) except -1:
        """Makes it done and tells everybody; False if it was done already."""
        chain = self.claim(status, outcome, expected)
        if chain is REFUSED:
            return False
        if chain is not None:
            fire_all(self, chain)
        return True

    def _complete(self, status, outcome, expected=None):
        """Makes it done and tells everybody; False if it was done already."""
        return self.complete(status, outcome, ANY if expected is None else expected)

    cdef int started(self, task, name) except -1:
        """In the ambient loop: its coroutine, called `name`, has become `task`."""
        coro = None
        request = None
        with cython.critical_section(self):
            if self._status == RUNNING and self._kind == COROUTINE:
                coro = self._source
                request = self._extra
                self._source = task
                self._outcome = name
                self._extra = None
                self._kind = TASK
        if type(request) is tuple:
            task.cancel(*request)
        return 0

    cdef int ended_at_once(self, task) except -1:
        """In the ambient loop: its coroutine's first step was its last."""
        request = None
        with cython.critical_section(self):
            if self._status == RUNNING and self._kind == COROUTINE:
                request = self._extra
        if type(request) is tuple and not task.cancelled() and task.exception() is None:
            # As in asyncio: a task that cancels itself and then returns is cancelled.
            self.complete(CANCELLED, request[0], ANY)
        else:
            self.take_outcome(task)
        return 0

    cdef int take_outcome(self, task) except -1:
        """Finishes it as `task` ended."""
        if type(task) is Task and not task_cancelled(task) and task_exception(task) is None:
            self.complete(FINISHED, task_result(task), ANY)
        else:
            status, outcome = outcome_of_asyncio(task)
            self.complete(status, outcome, ANY)
        return 0

    cdef int arrive(self, Mailbox mailbox) except -1:
        """In the ambient loop: starts the coroutine behind it, or calls the continuation."""
        cdef int kind = NOTHING
        source = function = context = None
        with cython.critical_section(self):
            if self._status == PENDING:
                store(&self._status, RUNNING)
                kind = self._kind
                source = self._source
                function = self._outcome
                context = self._extra
        if kind == NOTHING:
            return 0
        if context is None:
            context = PyContext_New()
        if kind == COROUTINE:
            if PyCoro_CheckExact(source):
                track(source)
            mailbox.start(self, source, context)
        else:
            self.go_on_now(mailbox, kind, source, function, context)
        return 0

    cdef int abandon(self) except -1:
        self.complete(CANCELLED, None, ANY)
        return 0

    cdef int resolve(self, result, context, Mailbox mailbox) except -1:
        """In the ambient loop: finishes it with what a continuation returned, flattened."""
        if type(result) in plain_types:
            self.complete(FINISHED, result, ANY)
        elif isinstance(result, Unfuture):
            self.follow(result)
        elif isfuture(result):
            self.follow(Unfuture(result))
        elif is_awaitable(result):
            coro = result if is_coroutine(result) else wait_for_awaitable(result)
            source = former = None
            with cython.critical_section(self):
                if self._status == RUNNING:
                    source = self._source
                    former = self._outcome
                    self._source = coro
                    self._outcome = None
                    self._kind = COROUTINE
            mailbox.start(self, coro, context)
        else:
            self.complete(FINISHED, result, ANY)
        return 0

    cdef int follow(self, Unfuture other) except -1:
        cdef bint pending = False
        if other is self:
            error = TypeError("a continuation cannot return the Unfuture that waits for it")
            self.complete(FAILED, error, ANY)
            return 0
        source = former = None
        with cython.critical_section(self):
            if self._status < CANCELLED:
                pending = True
                track(self)
                source = self._source
                former = self._outcome
                self._source = other
                self._outcome = None
                self._kind = UNFUTURE
        if not pending:
            return 0
        cdef _Follower follower = _Follower.__new__(_Follower)
        follower.target = self
        if not other.add_waiter(follower):
            passed = follower.fire(other)
            if passed is not None:
                fire_all(passed[0], passed[1])
        return 0

    cdef int work(self) except -1:
        """In a worker thread: runs the function behind it, unless it was cancelled."""
        cdef bint begun = False
        function = arguments = context = None
        with cython.critical_section(self):
            if self._status == PENDING:
                store(&self._status, RUNNING)
                begun = True
                function = self._source
                arguments = self._outcome
                context = self._extra
                self._outcome = self._extra = None
        if not begun:
            return 0
        if context is None:
            context = PyContext_New()
        try:
            PyContext_Enter(context)
            try:
                if type(arguments) is tuple:
                    result = function(*<tuple>arguments)
                else:
                    result = (<_Keywords>arguments).call(function)
            finally:
                PyContext_Exit(context)
        except AsyncioCancelledError as exc:
            # What it waited for was cancelled.
            self.complete(CANCELLED, exc.args[0] if exc.args else None, ANY)
        except BaseException as exc:
            self.complete(FAILED, exc, ANY)
        else:
            self.complete(FINISHED, result, ANY)
        return 0

    cdef bint add_waiter(self, _Item waiter) except -1:
        """Adds to the chain; False if it is done, and the caller must fire the waiter itself."""
        cdef bint added = False
        self.check_fork()
        with cython.critical_section(self):
            if self._status < CANCELLED:
                waiter.link = self._chain
                self._chain = waiter
                added = True
        return added

    cdef bint remove_waiter(self, _Item waiter) except -1:
        """Takes one out of the chain; False if it is not there any more."""
        cdef _Item before = None, link
        cdef bint found = False
        with cython.critical_section(self):
            link = self._chain
            while link is not None:
                if link is waiter:
                    if before is None:
                        self._chain = waiter.link
                    else:
                        before.link = waiter.link
                    waiter.link = None
                    found = True
                    break
                before = link
                link = link.link
        return found

    cdef int wait(self, timeout) except -1:
        """Blocks until it is done."""
        cdef Mailbox mailbox = _home
        if mailbox is not None and mailbox._thread_id == PyThread_get_thread_ident():
            if not self.is_done():
                raise would_deadlock_error(self)
            return 0
        cdef _Blocked blocked = _Blocked.__new__(_Blocked)
        cdef bint released = False
        if not self.add_waiter(blocked):
            return 0
        try:
            released = blocked.wait(timeout)
        finally:
            if not released:
                self.remove_waiter(blocked)
        if load(&self._status) < CANCELLED:
            raise TimedOutError(f"no outcome after {timeout} seconds: {self!r}")
        return 0

    cdef int check_fork(self) except -1:
        """After a fork: fails it in the child if its work stayed with the parent."""
        if self._generation != _generation:
            self.disown()
        return 0

    cdef int disown(self) except -1:
        with _fork_lock:
            if self._generation == _generation:
                return 0
            self._generation = _generation
            if self._status >= CANCELLED or (self._status == PENDING and self._source is None):
                return 0
            # Who waited is with the parent too.
            self._chain = None
            self._side = None
        self.complete(FAILED, orphan_error(), ANY)
        store(&self._unseen, False)
        return 0

    cdef int check_not_own(self, loop) except -1:
        """For a coroutine that awaits the Unfuture of its own call, and would wait for ever."""
        cdef int kind = NOTHING
        source = None
        if load(&self._status) != RUNNING:
            return 0
        with cython.critical_section(self):
            kind = self._kind
            source = self._source
        if kind != TASK and kind != COROUTINE:
            return 0
        task = current_task(loop)
        if task is not None and (source is task or source is task.get_coro()):
            raise RuntimeError(f"a coroutine cannot await its own outcome: {self!r}")
        return 0

    cdef awaited(self):
        """The outcome as `await` gives it."""
        if self._status == FINISHED:
            return self._outcome
        if self._status == FAILED:
            store(&self._unseen, False)
            raise awaited_exception(self._outcome.with_traceback(self._extra))
        raise cancelled_error(self._outcome, True)

    # What the two parents' modules look for.

    @property
    def _state(self):
        return STATE_NAMES[load(&self._status)]

    @property
    def _condition(self):
        return self.waiting_side().condition

    @property
    def _waiters(self):
        return self.waiting_side().waiters

    cdef waiting_side(self):
        self.check_fork()
        side = Waiters()  # made out here: see the head of this file
        with cython.critical_section(self):
            track(self)
            if self._side is None:
                self._side = side
            if self._status == CANCELLED:
                # No executor will come to say so, and concurrent.futures.wait() would wait for it.
                store(&self._status, CANCELLED_AND_NOTIFIED)
        return self.side()

    @property
    def _cancel_message(self):
        return self._outcome if self.is_cancelled() else None

    def _make_cancelled_error(self):
        return cancelled_error(self._cancel_message, True)

    # What Python looks for.

    def __repr__(self):
        cdef int status, kind
        with cython.critical_section(self):
            status = self._status
            kind = self._kind
            source = self._source
            outcome = self._outcome
        behind = name_behind(kind, source, outcome)
        if behind is None:
            behind = source
        if kind == MIRROR and status == PENDING and source.running():
            status = RUNNING
        return describe(self, status, outcome, behind)

    def __reduce__(self):
        """A finished one pickles with its outcome.

        :raises TypeError: if it is not done.
        """
        cdef int status = load(&self._status)
        if status < CANCELLED:
            raise TypeError(
                f"cannot pickle {self!r}: it has no outcome yet; wait for it, or pass its result"
            )
        cls = type(self)
        arguments = (None if cls is Unfuture else cls, status, self._outcome)
        return rebuild, arguments, getattr(self, "__dict__", None)

    def __del__(self):
        cdef Mailbox mailbox
        if load(&self._unseen):
            store(&self._unseen, False)
            if report_unseen_failure is None:
                return  # the interpreter has taken its modules apart
            mailbox = _home
            loop = None if mailbox is None else mailbox._loop()
            report_unseen_failure(self, self._outcome, loop)


@cython.final
cdef class JobQueue(_Line):
    """The work of a pool's threads: jobs in the order they came, and the workers that are idle.

    :param limit: how many workers there may be.
    :param spawn: starts a thread that calls `work()`; called by the thread that submits.
    """

    cdef int _limit
    cdef object _spawn
    # These belong to the section, as does the line.
    # What each idle worker waits on; the one that went idle last is woken first.
    cdef list _parked
    cdef int _workers
    cdef object _refuse
    # An event: closed, and no worker is left.
    cdef object _ended

    def __init__(self, int limit, spawn):
        self._limit = limit
        self._spawn = spawn
        self._parked = []
        self._ended = threading.Event()

    def submit(self, function, tuple args, dict kwargs):
        """Has a worker call `function(*args, **kwargs)` in a copy of the current context.

        :raises Exception: what `close` was told to refuse with, once the queue is closed.
        :raises RuntimeError: if there is no worker and none can be started.
        """
        return self.put(function, args, kwargs)

    cdef Unfuture put(self, function, tuple args, dict kwargs):
        cdef Unfuture unfuture = blank_on_its_way()
        cdef _Keywords keywords
        cdef _Blocked idle = None
        cdef bint spawn = False, lone
        refuse = None
        unfuture._source = function
        if kwargs:
            keywords = _Keywords.__new__(_Keywords)
            keywords.args = args
            keywords.kwargs = kwargs
            unfuture._outcome = keywords
        else:
            unfuture._outcome = args
        unfuture._extra = copy_context()
        unfuture._kind = JOB
        with cython.critical_section(self):
            refuse = self._refuse
            if refuse is None:
                self.push(unfuture)
                if self._parked:
                    idle = <_Blocked>self._parked.pop()
                elif self._workers < self._limit:
                    self._workers += 1
                    spawn = True
        if refuse is not None:
            raise refuse()
        lone = is_lone_call()
        if idle is not None:
            wake_thread(idle.lock, lone)
        elif spawn:
            self.add_worker(unfuture)
        return unfuture

    cdef int add_worker(self, Unfuture unfuture) except -1:
        try:
            self._spawn()
        except BaseException as exc:
            stranded = self.end_worker(True)
            if unfuture not in stranded:
                return 0  # another worker does it, or did
            # Who came later counted on the thread that did not start.
            for other in stranded:
                if other is not unfuture:
                    other._complete(FAILED, exc)
            raise
        return 0

    cdef list end_worker(self, bint failed):
        """Counts one worker less; if the last one failed, returns the jobs that nobody will do."""
        cdef list stranded = []
        cdef bint ended = False
        with cython.critical_section(self):
            self._workers -= 1
            if self._workers == 0:
                while failed and self._first is not None:
                    stranded.append(self.pop())
                ended = self._refuse is not None
        if ended:
            self._ended.set()
        return stranded

    def work(self, prepare=None):
        """A worker's life: runs jobs until the queue is closed and empty.

        :raises BaseException: what `prepare` raised; then no job was taken.
        """
        cdef _Blocked parking = _Blocked.__new__(_Blocked)
        cdef Unfuture unfuture
        cdef bint end = False
        try:
            if prepare is not None:
                prepare()
            while True:
                with cython.critical_section(self):
                    unfuture = <Unfuture>self.pop()
                    note_idle(self._first is None)
                    if unfuture is None:
                        end = self._refuse is not None
                        if not end:
                            self._parked.append(parking)
                if unfuture is not None:
                    unfuture.work()
                elif end:
                    return
                else:
                    parking.wait(None)
        finally:
            self.end_worker(False)

    def wait(self, timeout):
        """After `close`: waits up to `timeout` seconds for the last worker's end; whether it came.

        This counts the workers whose threads are only just being started, too.
        """
        return self._ended.wait(timeout)

    def close(self, refuse):
        """Refuses further jobs with `refuse()`; the workers end when the queue is empty."""
        cdef _Blocked parking
        cdef bint ended = False
        parked = []
        with cython.critical_section(self):
            if self._refuse is None:
                self._refuse = refuse
            ended = self._workers == 0
            parked, self._parked = self._parked, parked
        if ended:
            self._ended.set()
        for parking in parked:
            PyThread_release_lock(parking.lock)

    def cancel_all(self):
        """Cancels the jobs that have not begun."""
        cdef Unfuture unfuture = self.take()
        while unfuture is not None:
            unfuture.cancel()
            unfuture = self.take()

    def fail_all(self, error):
        """Fails the jobs that have not begun."""
        cdef Unfuture unfuture = self.take()
        while unfuture is not None:
            unfuture.complete(FAILED, error, ANY)
            unfuture = self.take()

    cdef Unfuture take(self):
        cdef Unfuture unfuture = None
        with cython.critical_section(self):
            unfuture = <Unfuture>self.pop()
        return unfuture

    def after_fork(self):
        """In the child: the workers, and the jobs that waited for them, stayed with the parent."""
        while self.take() is not None:
            pass
        self._parked = []
        self._workers = 0


@cython.final
cdef class Route:
    """Where regular functions go at the moment: `submit(function, args, kwargs)`.

    All functions that share a setting share its route, so that changing the setting is one
    assignment and a call need not look for it.

    :param owner: what must live as long as the route does.
    """

    cdef object _owner

    # Belong to the section, and change together: a job queue's own `submit` is called directly.
    cdef object _submit
    cdef JobQueue _queue

    def __init__(self, submit, owner=None):
        self.submit = submit
        self._owner = owner

    @property
    def submit(self):
        with cython.critical_section(self):
            submit = self._submit
        return submit

    @submit.setter
    def submit(self, submit):
        queue = getattr(submit, "__self__", None)
        if type(queue) is not JobQueue:
            queue = None
        with cython.critical_section(self):
            self._submit, submit = submit, self._submit
            self._queue, queue = queue, self._queue

    cdef send(self, function, tuple args, dict kwargs):
        cdef JobQueue queue, queue_now
        while True:
            submit = submit_now = None
            with cython.critical_section(self):
                queue = self._queue
                submit = self._submit
            try:
                if queue is not None:
                    return queue.put(function, args, kwargs)
                return submit(function, args, {} if kwargs is None else kwargs)
            except RuntimeError:
                # Was the executor shut down and replaced after `submit` had been read?
                with cython.critical_section(self):
                    queue_now = self._queue
                    submit_now = self._submit
                if queue_now is queue and submit_now == submit:
                    raise


# What a function becomes when it is looked up on an instance or a class.
BIND_INSTANCE = 0
BIND_CLASS = 1
BIND_NOTHING = 2


cdef class Launcher:
    """A function that runs elsewhere: calling it gives an Unfuture at once.

    :param function: a coroutine function if `route` is None, to run in the ambient loop; else any
        other, to be given to `route`, whose answer is returned.
    :param binding: what the first argument is when it is looked up on an instance or a class.
    """

    cdef vectorcallfunc _vectorcall
    cdef object _function
    cdef Route _route
    cdef int _binding

    __class_getitem__ = classmethod(GenericAlias)

    def __cinit__(self):
        self._vectorcall = launch_vector

    def __init__(self, function, Route route, int binding=0):
        self._function = function
        self._route = route
        self._binding = binding

    def __call__(self, *args, **kwargs):
        if self._route is not None:
            return self._route.send(self._function, args, kwargs)
        mailbox = home()
        coro = self._function(*args, **kwargs) if kwargs else self._function(*args)
        return launch_coroutine(mailbox, coro)

    def __get__(self, instance, owner):
        if self._binding == BIND_NOTHING:
            return self
        if self._binding == BIND_CLASS:
            return MethodType(self, type(instance) if owner is None else owner)
        return self if instance is None else MethodType(self, instance)


cdef inline Unfuture launch_coroutine(Mailbox mailbox, coro):
    cdef Unfuture unfuture = blank_on_its_way()
    if PyCoro_CheckExact(coro):
        PyObject_GC_UnTrack(<PyObject *>coro)
    unfuture._source = coro
    unfuture._extra = copy_context()
    unfuture._kind = COROUTINE
    mailbox.post(unfuture)
    return unfuture


cdef PyObject *launch_vector(
    PyObject *callee, PyObject *const *args, size_t nargsf, PyObject *names
) except NULL:
    """`Launcher.__call__` by the vectorcall protocol: no tuple and no dict on the way."""
    cdef Launcher launcher = <Launcher>callee
    cdef Py_ssize_t count = PyVectorcall_NARGS(nargsf), i
    cdef Mailbox mailbox
    cdef dict kwargs = None
    cdef tuple positional = ()
    if launcher._route is None:
        mailbox = home()
        coro = PyObject_Vectorcall(launcher._function, args, nargsf, names)
        unfuture = launch_coroutine(mailbox, coro)
    else:
        if count:
            positional = PyTuple_New(count)
            for i in range(count):
                Py_INCREF(<object>args[i])
                PyTuple_SET_ITEM(positional, i, <object>args[i])
        if names is not NULL:
            kwargs = {}
            for i, name in enumerate(<tuple>names):
                kwargs[name] = <object>args[count + i]
        unfuture = launcher._route.send(launcher._function, positional, kwargs)
    Py_INCREF(unfuture)
    return <PyObject *>unfuture


cdef int offer_vectorcall() except -1:
    """Says in the type where its instances keep `launch_vector`; subclasses made later inherit it.

    Before 3.12 subclasses written in Python do not, and are called by `__call__`.
    """
    cdef Launcher launcher = Launcher.__new__(Launcher)
    cdef PyTypeObject *cls = <PyTypeObject *>Launcher
    cls.tp_vectorcall_offset = <char *>&launcher._vectorcall - <char *><PyObject *>launcher
    cls.tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL
    PyType_Modified(cls)
    return 0


offer_vectorcall()
