# cython: language_level=3, freethreading_compatible=True, auto_pickle=False
# cython: binding=False, embedsignature=True, embedsignature.format=clinic
# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""The core, compiled: the hot path of every call.

`_core_py.py` is its twin in plain Python: the same names, the same behaviour, and the types.
Who may touch what:

- What is written between `lock(x)` and `unlock(x)` belongs to `x`'s lock. With the GIL that is no
  lock at all: such a section must do nothing that can release the GIL. Without the GIL it is one
  that its own thread cannot take twice. So nothing in it raises, calls Python code, looks up an
  attribute, drops a last reference (that may run a `__del__`) or makes a container (that may run
  the garbage collector, before 3.12).
- An Unfuture's `_status` is written in its section and last, and may be read anywhere with `load`:
  a final one says that `_outcome` and `_extra` are in place and will not change.
- A waiter belongs to whoever took it from the Unfuture's chain, and is fired once.
- A mailbox's `live` is written by its loop's thread only.
"""

import sys
import threading
from asyncio import CancelledError as AsyncioCancelledError
from asyncio import BaseEventLoop, Task, current_task
from asyncio import _get_running_loop as running_loop
from asyncio.tasks import _enter_task, _leave_task
from concurrent.futures import CancelledError as ConcurrentCancelledError
from os import getpid
from time import monotonic
from types import GenericAlias, MethodType
from weakref import ref

cimport cython
from cpython.contextvars cimport (
    PyContext_CheckExact,
    PyContext_CopyCurrent,
    PyContext_Enter,
    PyContext_Exit,
    PyContext_New,
)
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM

from unsync._common import (
    LOOK_AGAIN_SECONDS,
    OWN_RUN,
    PLAIN_TYPES,
    START_ATTEMPTS,
    STATE_NAMES,
    WAKE_AGAIN_SECONDS,
    CancelRequest,
    Enlisting,
    Latch,
    Making,
    ToldEvent,
    Waiters,
    already_done_error,
    awaited_exception,
    buried_error,
    cancelled_error,
    check_callable,
    check_context,
    check_exception,
    check_outcome,
    check_threads,
    check_timeout,
    circle_error,
    close_unstarted,
    describe,
    exhausted_error,
    full_error,
    hint_at_map,
    interrupted_start_error,
    is_asyncio_future,
    is_awaitable,
    is_coroutine,
    let_others_make,
    log_failed_callback,
    log_failed_waking,
    logger,
    may_be_reentered,
    mirror_of,
    name_of as any_name_of,
    no_loop_error,
    not_iterable_error,
    orphan_error,
    outcome_of_asyncio,
    rebuild,
    refused_running_error,
    report_failed_callback,
    report_slow,
    report_unseen_failure,
    set_up_error,
    thrown,
    wait_for_awaitable,
    waits_for_ever,
    warn_if_it_blocks,
    would_block_error,
    would_deadlock_error,
)
from unsync._views import asyncio_view, concurrent_view

cdef extern from *:
    """
    #if defined(_MSC_VER) && !defined(__clang__)
      #define unsync_load(p) (*(volatile unsigned char *)(p))
      #define unsync_store(p, v) (*(volatile unsigned char *)(p) = (unsigned char)(v))
      #define unsync_load_id(p) (*(volatile unsigned long *)(p))
      #define unsync_store_id(p, v) (*(volatile unsigned long *)(p) = (v))
      #define unsync_load_object(p) (*(PyObject *volatile *)(p))
      #define unsync_store_object(p, v) (*(PyObject *volatile *)(p) = (v))
      #define unsync_peek(p) (*(volatile long long *)(p))
      #define unsync_poke(p, v) (*(volatile long long *)(p) = (v))
    #else
      #define unsync_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
      #define unsync_store(p, v) __atomic_store_n((p), (unsigned char)(v), __ATOMIC_RELEASE)
      #define unsync_load_id(p) __atomic_load_n((p), __ATOMIC_RELAXED)
      #define unsync_store_id(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
      #define unsync_load_object(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
      #define unsync_store_object(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
      #define unsync_peek(p) __atomic_load_n((p), __ATOMIC_RELAXED)
      #define unsync_poke(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #endif

    /* An object's own lock. Not as a critical section takes it, which lets it go whenever the
       thread has to wait for something else: dropping a reference to another thread's object can
       come to that. */
    #ifdef Py_GIL_DISABLED
      #define unsync_lock(object) PyMutex_Lock(&((PyObject *)(object))->ob_mutex)
      #define unsync_unlock(object) PyMutex_Unlock(&((PyObject *)(object))->ob_mutex)
      #define unsync_renew_lock(object) (((PyObject *)(object))->ob_mutex = (PyMutex){0})
    #else
      #define unsync_renew_lock(object) ((void)0)
      #define unsync_lock(object) ((void)0)
      #define unsync_unlock(object) ((void)0)
    #endif

    /* What this thread handles in an `except` block, hidden meanwhile. Compiled `try` statements
       look at its traceback. Those who are told of it and raise it again are changing that, and
       CPython 3.13 has no lock for it. */
    #ifdef Py_GIL_DISABLED
      static PyObject *unsync_put_aside(void) {
        PyObject *handled = PyErr_GetHandledException();
        if (handled == NULL) return Py_NewRef(Py_None);
        PyErr_SetHandledException(NULL);
        return handled;
      }
      static void unsync_take_up(PyObject *handled) {
        if (handled != Py_None) PyErr_SetHandledException(handled);
      }
    #else
      #define unsync_put_aside() Py_NewRef(Py_None)
      #define unsync_take_up(handled) ((void)0)
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
    unsigned long load_id "unsync_load_id"(unsigned long *p) nogil
    void store_id "unsync_store_id"(unsigned long *p, unsigned long v) nogil
    PyObject *load_object "unsync_load_object"(PyObject **p) nogil
    void store_object "unsync_store_object"(PyObject **p, PyObject *v) nogil
    # For what one thread counts and others may look at.
    long long peek "unsync_peek"(long long *p) nogil
    void poke "unsync_poke"(long long *p, long long v) nogil
    void lock "unsync_lock"(object)
    void unlock "unsync_unlock"(object)
    void renew_lock "unsync_renew_lock"(object)
    object put_aside "unsync_put_aside"()
    void take_up "unsync_take_up"(object handled)
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
    ctypedef void (*destructor)(PyObject *) noexcept
    ctypedef struct PyTypeObject:
        unsigned long tp_flags
        Py_ssize_t tp_vectorcall_offset
        Py_ssize_t tp_weaklistoffset
        destructor tp_dealloc
        object (*tp_new)(PyTypeObject *, object, PyObject *)
        initproc tp_init
        void *tp_vectorcall
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
    void PyObject_GC_Del(PyObject *value) noexcept
    PyTypeObject *Py_TYPE(PyObject *value) noexcept
    void Py_DECREF(PyObject *value) noexcept
    bint is_container "PyObject_IS_GC"(PyObject *value) noexcept
    int PyErr_CheckSignals() except -1
    PyObject *method_function "PyMethod_GET_FUNCTION"(object method) noexcept

cdef extern from *:
    """
    /* The worker that the calling thread is, if it is one; `JobQueue.work` holds it. */
    #if defined(_MSC_VER) && !defined(__clang__)
      static __declspec(thread) PyObject *unsync_worker = NULL;
    #else
      static __thread PyObject *unsync_worker = NULL;
    #endif
    """
    PyObject *this_worker "unsync_worker"

cdef extern from *:
    """
    /* The context of the call that the calling thread is making fail; `fail_in` holds it. */
    #if defined(_MSC_VER) && !defined(__clang__)
      static __declspec(thread) PyObject *unsync_failing_in = NULL;
    #else
      static __thread PyObject *unsync_failing_in = NULL;
    #endif
    """
    PyObject *failing_in "unsync_failing_in"

cdef extern from *:
    """
    /* In how many a `Making` the calling thread is. */
    #if defined(_MSC_VER) && !defined(__clang__)
      static __declspec(thread) int unsync_makings = 0;
    #else
      static __thread int unsync_makings = 0;
    #endif
    """
    int making_here "unsync_makings"

cdef extern from *:
    """
    /* How many firings call callbacks in this thread, each within the one before it; and where the
       callbacks of a further one are left, if they have to wait: a `_Line` that a firing holds. */
    #if defined(_MSC_VER) && !defined(__clang__)
      static __declspec(thread) int unsync_firings = 0;
      static __declspec(thread) PyObject *unsync_later = NULL;
    #else
      static __thread int unsync_firings = 0;
      static __thread PyObject *unsync_later = NULL;
    #endif
    """
    int firings "unsync_firings"
    PyObject *later "unsync_later"

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

    /* Whether the stack is far enough from the recursion limit to start something within it: on
       Python 3.11 the limit holds for calls in C, too. */
    #if PY_VERSION_HEX < 0x030C0000
      static int has_room(void) {
        const PyThreadState *thread = PyThreadState_Get();
        return thread->recursion_remaining > thread->recursion_limit / 2;
      }
    #else
      static int has_room(void) { return 1; }
    #endif

    /* Only where no other thread could do so at the same time. */
    #ifdef Py_GIL_DISABLED
      #define UNSYNC_WITH_GIL 0
      #define unsync_pause_collector() 0
      #define unsync_resume_collector() ((void)0)
    #else
      #define UNSYNC_WITH_GIL 1
      #define unsync_pause_collector() PyGC_Disable()
      #define unsync_resume_collector() PyGC_Enable()
    #endif
    """
    int bell_open() noexcept
    bint bell_ring(int bell) noexcept nogil
    void bell_still(int bell) noexcept
    void bell_close(int bell) noexcept
    void step_aside() noexcept nogil
    bint has_room() noexcept
    bint WITH_GIL "UNSYNC_WITH_GIL"
    bint pause_collector "unsync_pause_collector"() noexcept  # whether it was at work
    void resume_collector "unsync_resume_collector"() noexcept

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
    JOB = 2  # a function; until it is begun `_outcome` has its arguments, `_extra` its context, and
    # then the worker that runs it
    TASK = 3  # `_outcome` is its coroutine's name
    CONTINUATION = 4  # the source of a `then`; until it is done `_outcome` is the function
    MAPPING = 5  # the same of a `map`
    UNFUTURE = 6
    MIRROR = 7
    SHARE = 8  # the `Batch` that its call belongs to
    NAME = 9  # of the function that was behind it, once it is done

# A drain gives the loop back to its timers and I/O after so many seconds and items, or after the
# longer time: each turn costs a poll, in which other threads take the GIL, if there is one.
cdef double DRAIN_SECONDS = 0.002
cdef int DRAIN_ITEMS = 128
cdef double DRAIN_LONGEST = 0.01
# How many items pass between two looks at the clock.
cdef int DRAIN_STRIDE = 16
# How many awaited calls may start one within the other, and how many firings may call callbacks so:
# each takes some of the C stack.
cdef int NESTING = 32
# How many may start there and then in one turn of the loop, which others are waiting for.
cdef int STARTS_IN_A_TURN = 256

cdef bint HAS_EAGER_TASKS = sys.version_info >= (3, 12)
cdef double LONGEST_WAIT = threading.TIMEOUT_MAX

# Whether somebody has patched the threads: see `check_threads`.
cdef dict threading_names = threading.__dict__
cdef object own_get_ident = threading.get_ident

# Counts the forks above this process: an Unfuture of an older one has nobody to finish it.
cdef unsigned int _generation = 0
cdef object _process = getpid()
# Guards the moment when a child first looks at one of its parent's Unfutures.
cdef object _fork_lock = threading.RLock()

# Whether somebody drains, and what is told of calls then: see `watch_calls`. There is only ever one
# that is told, so it can be read under no lock.
cdef unsigned char _watching = False
cdef object _watcher = None

# The ambient loop's mailbox, or NULL; `_kept` owns it.
cdef PyObject *_home = NULL
cdef object _start_home = None
cdef list _kept = [None]

cdef frozenset plain_types = PLAIN_TYPES

# Answers `_claim` when somebody else was first.
cdef object REFUSED = object()


def __dir__():
    """Without the clock, so that freezegun leaves it alone: see `_common.monotonic`."""
    return [name for name in globals() if name != "monotonic"]


def set_home(Mailbox mailbox, start):
    """Names the ambient loop's mailbox, or with None the function that starts one on first use."""
    global _start_home
    if _start_home != start:
        _start_home = start
    if not WITH_GIL:
        # Whoever reads `_home` takes no lock: what it ever was must not go away meanwhile.
        _kept.append(_kept[0])
    store_object(&_home, NULL if mailbox is None else <PyObject *>mailbox)
    _kept[0] = mailbox


cdef inline Mailbox home_now():
    """The ambient loop's mailbox; None if the loop does not run."""
    cdef PyObject *mailbox = load_object(&_home)
    return None if mailbox is NULL else <Mailbox>mailbox


cdef Mailbox home():
    """The ambient loop's mailbox; the loop is started if it does not run."""
    cdef Mailbox mailbox = home_now()
    if mailbox is not None:
        return mailbox
    if _start_home is None:
        raise RuntimeError("no ambient loop has been set up")
    return _start_home()


def in_home_thread():
    """Whether this is the thread of the ambient loop."""
    return is_in_home_thread()


cdef inline bint is_in_home_thread() noexcept:
    cdef PyObject *mailbox = load_object(&_home)
    return mailbox is not NULL and (
        load_id(&(<Mailbox>mailbox)._thread_id) == PyThread_get_thread_ident()
    )


cdef inline int wake_home_again() except -1:
    """For a thread that is about to wait."""
    cdef Mailbox mailbox = home_now()
    if making_here > 0:
        let_others_make()
    if mailbox is not None:
        mailbox.wake_again()
    return 0


def _note_making(int change):
    """Of the calling thread: how many more a `Making` it is in, so that its waits know."""
    global making_here
    making_here += change


Making.note = _note_making


def after_fork():
    """Run in the child: what was pending before the fork will never be finished here."""
    global _generation, _fork_lock, _process, this_worker
    if _process == getpid():
        return  # it is no child
    _process = getpid()
    _generation += 1
    _fork_lock = threading.RLock()
    this_worker = NULL  # its queue has no workers here


# For the usual kind of task, asked without looking the methods up.
cdef object task_done = Task.done
cdef object task_cancelled = Task.cancelled
cdef object task_exception = Task.exception
cdef object task_result = Task.result


# asyncio's own loops only return their attribute; a subclass may have something else to say.
cdef object own_get_task_factory = BaseEventLoop.get_task_factory


cdef PyObject *own_run = <PyObject *>OWN_RUN  # the name in this module keeps it


cdef inline task_factory_of(loop):
    if type(loop).get_task_factory is own_get_task_factory:
        return loop._task_factory
    return loop.get_task_factory()


cdef inline long long nanoseconds(double seconds) noexcept:
    return <long long>(seconds * 1e9)


def watch_calls(watcher):
    """Has it told of every call and continuation that is made, and of jobs that workers are through
    with; by the threads that do so. With None nobody is told, as is usual.
    """
    global _watcher
    if watcher is not None and _watcher is None:
        _watcher = watcher
    store(&_watching, watcher is not None)


cdef inline context_for(Unfuture unfuture, Unfuture source):
    """The context of a call that is being made: nobody else has seen it yet.

    It is None in place of an empty one, which need not be kept.

    :param source: what it is a continuation of, or None.
    """
    context = PyContext_CopyCurrent()
    if load(&_watching):
        _watcher.made(unfuture, source, job_here(), context)
        return context
    return context if len(context) else None


cdef Unfuture job_here():
    """What this thread works on, if it is a worker."""
    return None if this_worker is NULL else (<_Worker>this_worker).job


cdef Mailbox mailbox_of(loop):
    """The mailbox of the loop that runs in this thread.

    The loop owns it, as an attribute: what is never picked up must not outlive the loop, and
    would as the value of a registry, for it refers to the loop.
    """
    cdef Mailbox mailbox = getattr(loop, "_unsync_mailbox", None)
    if mailbox is None:
        mailbox = home_now()
        if mailbox is None or mailbox._loop() is not loop:
            mailbox = Mailbox(loop)
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
    if is_in_home_thread():
        mailbox = <Mailbox>_home
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

    cdef Unfuture fire(self, Unfuture unfuture):
        """Called once, by the thread that finished `unfuture` (or found it done).

        Returns a follower that just got the same outcome, for the caller to fire its waiters next:
        chains are walked with a queue, never by recursion.
        """
        raise NotImplementedError

    cdef int arrive(self, Mailbox mailbox) except -1:
        """Called in the loop's thread."""
        raise NotImplementedError

    cdef int abandon(self) except -1:
        """Called in any thread, if the loop is closed."""
        raise NotImplementedError


cdef Py_ssize_t note_linked(_Item item, list items) noexcept:
    """In the section: puts it and those linked to it into the list, as far as there is room.

    Returns how many there are: with more than fit the caller makes another list, outside of the
    section. Nothing may be allocated in there, since the collector would run what users wrote.
    """
    cdef Py_ssize_t room = len(items), count = 0
    while item is not None:
        if count < room:
            items[count] = item
        count += 1
        item = item.link
    return count


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

    cdef inline bint take_out(self, _Item item):
        """Whether it still stood there. The caller holds it."""
        cdef _Item before = None, link = self._first
        while link is not None and link is not item:
            before = link
            link = link.link
        if link is None:
            return False
        if before is None:
            self._first = item.link
        else:
            before.link = item.link
        if self._last is item:
            self._last = before
        item.link = None
        return True


@cython.final
cdef class Mailbox(_Line):
    """What other threads leave for one event loop, picked up in batches: one wakeup per burst.

    Any thread may leave something. The first item wakes the loop, later ones only join it,
    until the loop finds the box empty. A closed loop's items are abandoned, each in its own way.

    A platform or an interrupt may lose a wakeup, and an armed box would stay as it is for ever. So
    whoever leaves the 2nd, 4th, 8th item and so on, or begins to wait, looks whether the loop was
    woken a while ago and has not come, and wakes it again.

    What a drain runs may run the loop in turn: Qt's modal dialogs do, and programs that use
    nest_asyncio. Such a loop is asked to come again before a drain begins, so that the inner one
    sees what is left and what arrives.

    The loop is held weakly: it owns the mailbox.
    """

    cdef object __weakref__
    cdef object _loop
    # Whether what the loop runs may run it in turn; None: if its `run_until_complete` was replaced.
    cdef object _reentered
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
    # How often something was left, how often that was an Unfuture, and how often the loop was
    # woken for it. In the section, as is how many Unfutures were abandoned.
    cdef long long _posts
    cdef long long _called
    cdef long long _wakeups
    cdef long long _abandoned
    # In the section: at the how manieth of them somebody looks whether the wakeup was lost, and how
    # many there are from there to the next such look.
    cdef long long _look_at
    cdef long long _stride
    # When the loop was first woken and when for the last time, since it came here, in nanoseconds
    # of the monotonic clock; 0 once it has. Any thread may write them: the worst that can come of
    # it is a wakeup more.
    cdef long long _woken_at
    cdef long long _rung_at
    # These four are counted, and these two set, by the loop's thread: how many began and ended,
    # how long the loop took to come the last time, and since when it has been at work here.
    cdef long long _begun
    cdef long long _finished
    cdef long long _failed
    cdef long long _cancelled
    cdef long long _lag
    cdef long long _busy_since
    # These belong to the loop's thread.
    # How many functions were called in this turn of the loop and the one before, and how many
    # awaited calls were started there and then.
    cdef int _calls
    cdef int _calls_before
    cdef int _starts
    # The loop, while the box is drained, and whether it is in debug mode; and what makes it come
    # again meanwhile, if it may be entered again.
    cdef object _running
    cdef bint _debug
    cdef object _again
    # The keywords for the next task, unless they are in use.
    cdef dict _options
    # Before Python 3.12: the task that is being made, its first step, and what catches that.
    cdef object _beginner
    cdef object _first_step
    cdef object _catch
    cdef dict _attributes

    def __cinit__(self):
        self._bell = -1
        self.live = {}
        self._starting = []

    def __init__(self, loop):
        cdef bint fresh
        reference = ref(loop)
        reentered = may_be_reentered(type(loop))
        lock(self)
        fresh = self._loop is None
        if fresh:
            self._loop = reference
            self._reentered = reentered
        unlock(self)
        if not fresh:
            raise set_up_error(self)

    @property
    def loop(self):
        return self._loop()

    @property
    def thread_id(self):
        return load_id(&self._thread_id) or None

    @thread_id.setter
    def thread_id(self, unsigned long thread_id):
        store_id(&self._thread_id, thread_id)

    cdef int post(self, _Item item) except -1:
        """Leaves `item` for the loop; `item.arrive(mailbox)` is called in its thread."""
        cdef bint wake = False, look = False
        lock(self)
        self.push(item)
        self._posts += 1
        self._called += isinstance(item, Unfuture)
        if not self._armed:
            self._armed = True
            self._wakeups += 1
            self._stride = 1
            self._look_at = self._posts + 1
            wake = True
        elif self._posts == self._look_at:
            self._stride <<= 1
            self._look_at += self._stride
            look = True
        unlock(self)
        if wake:
            self.wake()
        elif look:
            self.wake_again()
        return 0

    cdef int wake_again(self) except -1:
        """Called in any thread now and then: wakes a loop that should have come long since."""
        cdef long long rung_at = peek(&self._rung_at)
        if rung_at and nanoseconds(monotonic()) - rung_at >= nanoseconds(WAKE_AGAIN_SECONDS):
            self.wake()
        return 0

    cdef int wake(self) except -1:
        loop = self._loop()
        try:
            self.wake_loop(loop)
        except BaseException as exc:
            if type(exc) is RuntimeError and loop is not None and loop.is_closed():
                self.close()
                return 0
            # A Ctrl-C, say, and nobody else is coming. Drained once too often does no harm.
            try:
                self.wake_loop(loop)
            except BaseException:
                lock(self)
                self._armed = False  # whoever posts next must try again
                unlock(self)
                raise
            raise
        return 0

    cdef int wake_loop(self, loop) except -1:
        cdef long long now = nanoseconds(monotonic())
        poke(&self._rung_at, now)
        if not peek(&self._woken_at):
            poke(&self._woken_at, now)
        if loop is None:
            self.close()
        elif running_loop() is loop:
            loop.call_soon(self._drain)
        elif not self.ring():
            loop.call_soon_threadsafe(self._drain)
        return 0

    # The bell: an eventfd costs one short system call to ring and one to still. The loop's own way
    # to be woken, call_soon_threadsafe(), takes three on a socket pair, and more Python.

    def open_bell(self):
        """Has the loop woken by a bell of the mailbox's own, where there is such a thing.

        Called before the loop runs, or in its thread.

        :raises RuntimeError: if it runs in another thread.
        """
        loop = self.own_loop()
        cdef int bell = bell_open()
        if bell < 0:
            return
        try:
            loop.add_reader(bell, self._on_bell)
        except Exception:  # the loop has no readers, and will be woken in its own way
            bell_close(bell)
            return
        lock(self)
        self._bell, bell = bell, self._bell
        unlock(self)
        if bell >= 0:  # there was one already
            loop.remove_reader(bell)
            bell_close(bell)

    cdef own_loop(self):
        """The loop, for those who may call this: its thread, and anybody while it does not run."""
        loop = self._loop()
        if running_loop() is not loop and (loop is None or loop.is_running()):
            raise RuntimeError(f"this is for the thread of {loop!r} only")
        return loop

    def close_bell(self):
        """Called in the loop's thread before the loop is closed.

        :raises RuntimeError: if it runs in another thread.
        """
        cdef int bell = -1
        cdef bint in_use = False
        loop = self.own_loop()
        lock(self)
        bell = self._bell
        self._bell = -1
        in_use = self._ringing > 0
        unlock(self)
        self._options = self._catch = self._attributes = None
        if bell >= 0:
            loop.remove_reader(bell)
            if not in_use:
                bell_close(bell)

    cdef bint ring(self) except -1:
        """Rings the bell; False if there is none."""
        cdef int bell = -1
        cdef bint rung = False, forsaken = False
        lock(self)
        bell = self._bell
        if bell >= 0:
            self._ringing += 1
        unlock(self)
        if bell < 0:
            return False
        if WITH_GIL and _idle_thread == PyThread_get_thread_ident():
            with nogil:
                rung = bell_ring(bell)
        else:
            rung = bell_ring(bell)
        lock(self)
        self._ringing -= 1
        forsaken = self._bell < 0 and self._ringing == 0
        unlock(self)
        if forsaken:
            bell_close(bell)  # the loop went in between: the descriptor was left to us
        return rung

    def _on_bell(self):
        bell_still(self._bell)
        self.drain(True)

    cdef _Item take(self):
        """The next item; None, and disarmed, if there is none."""
        cdef _Item item = None
        lock(self)
        item = self.pop()
        if item is None:
            self._armed = False
        note_idle(self._first is None)
        unlock(self)
        return item

    def _drain(self):
        self.drain(False)

    cdef int drain(self, bint in_reader) except -1:
        """Takes what is here, as much as fits in a turn of the loop, in whose thread this is.

        :param in_reader: whether the loop calls this for the bell.
        """
        cdef _Item item
        cdef int _
        cdef int count = 0
        cdef double begun = monotonic()
        cdef double elapsed
        loop = self._loop()
        if running_loop() is not loop or loop is None:
            raise RuntimeError(f"this is for the thread of {loop!r} only")
        self.note_lag(nanoseconds(begun))
        outer, self._running = self._running, loop
        outer_again, self._again = self._again, None
        self._calls_before = self._calls
        self._calls = 0
        self._starts = 0
        try:
            # In here, since these may be the user's: what they raise is the loop's to hear.
            self._debug = loop.get_debug()
            if self.is_reentered(loop):
                if in_reader:
                    # An inner run could not call the reader: the context that it has would be in
                    # use. What is called soon has one of its own.
                    loop.call_soon(self._drain)
                    return 0
                self._again = loop.call_soon(self._drain)
            while True:
                for _ in range(DRAIN_STRIDE):
                    item = self.take()
                    if item is None:
                        return 0
                    if self._debug:
                        self.time(item)
                    else:
                        item.arrive(self)
                count += DRAIN_STRIDE
                elapsed = <double>monotonic() - begun
                if elapsed >= (DRAIN_SECONDS if count >= DRAIN_ITEMS else DRAIN_LONGEST):
                    break
        except BaseException:
            # Only KeyboardInterrupt and SystemExit leave a task; the loop will hear of it, the
            # other items must not suffer.
            self.wake()
            raise
        finally:
            self._running = outer
            poke(&self._busy_since, 0)
            note_idle(False)
            if self._again is not None:
                self._again.cancel()
            self._again = outer_again
        self.wake()
        return 0

    cdef inline bint is_reentered(self, loop) except -1:
        """Whether what the loop runs may run it in turn."""
        if self._reentered is None:
            run = loop.run_until_complete
            return type(run) is not MethodType or method_function(run) is not own_run
        return self._reentered

    cdef inline int note_waiter(self, loop) except -1:
        """In the loop's thread, by who comes to wait there.

        That may be in a drain which has run what patched the loop.
        """
        if self._running is None or self._again is not None or self._reentered is not None:
            return 0
        run = type(loop).run_until_complete  # cheaper than the method, for each who waits
        if <PyObject *>run is not own_run:
            self._again = loop.call_soon(self._drain)
            self.close_bell()  # an inner run could not call the reader, which may be at work
        return 0

    cdef inline void note_lag(self, long long now) noexcept:
        """The loop has come."""
        cdef long long woken_at = peek(&self._woken_at)
        if woken_at:
            poke(&self._lag, now - woken_at)
            poke(&self._woken_at, 0)
            poke(&self._rung_at, 0)
        poke(&self._busy_since, now)

    cdef inline void count_begun(self) noexcept:
        poke(&self._begun, self._begun + 1)

    cdef inline void count_ended(self, Unfuture unfuture) noexcept:
        """In the loop's thread: this is how it ended; if it is not done, it waits for another."""
        cdef int status = load(&unfuture._status)
        if status == FAILED:
            poke(&self._failed, self._failed + 1)
        elif CANCELLED <= status <= CANCELLED_AND_NOTIFIED:
            poke(&self._cancelled, self._cancelled + 1)
        else:
            poke(&self._finished, self._finished + 1)

    def counts(self):
        """For `unsync.stats()`: see `MailboxCounts`."""
        cdef long long called, abandoned, posts, wakeups, began, lag, left = 0
        cdef long long begun, finished, failed, cancelled
        cdef _Item item
        lock(self)
        called = self._called
        abandoned = self._abandoned
        posts = self._posts
        wakeups = self._wakeups
        item = self._first
        while item is not None:
            left += 1
            item = item.link
        unlock(self)
        begun = peek(&self._begun)
        finished = peek(&self._finished)
        failed = peek(&self._failed)
        cancelled = peek(&self._cancelled) + abandoned
        lag = peek(&self._lag)
        began = peek(&self._woken_at) or peek(&self._busy_since)
        if began and left:
            lag = max(lag, nanoseconds(monotonic()) - began)
        pending = max(called - finished - failed - cancelled, 0)
        sums = (begun, finished, failed, cancelled, pending, wakeups, posts - wakeups)
        return sums, left, lag * 1e-9

    def waiting(self):
        """The calls and continuations that wait here and have not begun."""
        cdef list items = []
        cdef Py_ssize_t count = 1
        while len(items) < count:
            items = [None] * (count + 8)
            lock(self)
            count = note_linked(self._first, items)
            unlock(self)
        return [each for each in items[:count] if isinstance(each, Unfuture)]

    def pending(self, mark):
        """In the loop's thread: the calls and continuations that wait here or have begun.

        :param mark: is called with the contexts in which those that wait will run.
        """
        waiting = self.waiting()
        for each in waiting:
            context = (<Unfuture>each).own_context()
            if context is not None:
                mark(context)
        return [*self._starting, *self.live.values(), *waiting]

    cdef int time(self, _Item item) except -1:
        """In debug mode: the loop itself could only name the mailbox."""
        cdef double begun = monotonic()
        try:
            item.arrive(self)
        finally:
            what = item
            if type(item) is _Park:
                what = getattr((<_Park>item).wakeup, "__self__", item)  # the task that went on
            report_slow(self._running, what, <double>monotonic() - begun)
        return 0

    cdef int start_now(self, Unfuture unfuture) except -1:
        """For an `await` in the loop itself: starts what is awaited there and then.

        Only if it is all there is to do: what was called before is started before.
        """
        cdef bint alone = False
        if self._starts >= STARTS_IN_A_TURN or len(self._starting) >= NESTING:
            return 0
        if not has_room():
            return 0
        lock(self)
        alone = self._first is unfuture and self._last is unfuture
        if alone:
            self._first = self._last = None  # the caller holds it
        unlock(self)
        if alone:
            self._starts += 1
            unfuture.arrive(self)
        return 0

    def after_fork(self):
        """In a forked child, first of all: a thread of the parent may have been at it."""
        renew_lock(self)
        renew_lock(self.live)

    def close(self):
        """Abandons what is here, and leaves the box so that later items are abandoned too."""
        cdef _Item item
        while True:
            item = self.take()
            if item is None:
                return
            item.abandon()
            lock(self)
            self._abandoned += isinstance(item, Unfuture)
            unlock(self)

    @property
    def starting(self):
        return list(self._starting)

    cdef int start(self, Unfuture unfuture, coro, context) except -1:
        """Starts `coro` as a task of this loop, in whose thread this is called."""
        failure = None
        self._starting.append(unfuture)
        try:
            name = name_of(coro)
            task = self.make_task(coro, context, name)
        except BaseException as exc:
            # The first step raised KeyboardInterrupt or SystemExit, or the user's task factory
            # refused: the caller hears of it, the loop goes on.
            close_unstarted(coro)
            failure = exc
        finally:
            self._starting.pop()
        if failure is not None:
            unfuture.complete(FAILED, failure, ANY)
            self.count_ended(unfuture)
            return 0
        if task_done(task) if type(task) is Task else task.done():
            unfuture.ended_at_once(task, context)
            self.count_ended(unfuture)
            return 0
        self.live[task] = unfuture
        unfuture.started(task, name)
        cdef _TaskDone done = _TaskDone.__new__(_TaskDone)
        done.mailbox = self
        done.unfuture = unfuture
        task.add_done_callback(done, context=context)
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
        options["context"] = context
        try:
            (<PyTypeObject *>Task).tp_init(task, (coro,), options)
        finally:
            options["context"] = None
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
                self._beginner = self._first_step = None
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
            return None
        loop = self._loop()
        return type(loop).call_soon(loop, callback, *args, context=context)


@cython.final
cdef class _TaskDone:
    """The done-callback of a task that did not end in its first step."""

    cdef Mailbox mailbox
    cdef Unfuture unfuture

    def __call__(self, task):
        self.mailbox.live.pop(task, None)
        self.unfuture.take_outcome(task, None)
        self.mailbox.count_ended(self.unfuture)


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
    if kind == SHARE:
        return (<Batch>source).name
    if kind == NAME:
        return source
    return None


@cython.final
@cython.trashcan(True)
cdef class _Blocked(_Item):
    """A thread that waits in `result()` or `exception()`, or for room in a queue."""

    cdef PyThread_type_lock lock
    # Whether somebody has ended the wait or interrupted it, and so released the lock: belongs to
    # the section.
    cdef bint released
    # For a queue's door: whether it left before it was let in. Belongs to the queue's section.
    cdef bint gone
    # Belongs to the thread that waits: by what the wait was interrupted.
    cdef object request

    def __cinit__(self):
        self.lock = PyThread_allocate_lock()
        if self.lock is NULL:
            raise MemoryError("cannot allocate a lock")
        PyThread_acquire_lock_timed(self.lock, 0, 0)

    def __dealloc__(self):
        if self.lock is not NULL:
            PyThread_free_lock(self.lock)

    cdef inline bint is_first(self) noexcept:
        """Whether nobody has released it before."""
        cdef bint released
        lock(self)
        released = self.released
        self.released = True
        unlock(self)
        return not released

    cdef Unfuture fire(self, Unfuture unfuture):
        if self.is_first():
            wake_thread(self.lock, _idle_thread == PyThread_get_thread_ident())

    cdef int interrupt(self) except -1:
        if self.is_first():
            PyThread_release_lock(self.lock)
        return 0

    cdef bint wait(self, timeout) except? -1:
        """Blocks until it is fired; False after `timeout` seconds. Signal handlers may raise."""
        cdef double until = 0, longest = LOOK_AGAIN_SECONDS, left = longest
        if timeout is not None:
            until = <double>monotonic() + min(max(<double>timeout, 0.0), LONGEST_WAIT)
        while True:
            wake_home_again()
            if timeout is not None:
                left = min(max(until - <double>monotonic(), 0.0), longest)
            if self.acquire(<PY_TIMEOUT_T>(left * 1e6)):
                return True
            if timeout is not None and <double>monotonic() >= until:
                return False

    cdef int park(self) except -1:
        """For a worker that has nothing to do: blocks until it is woken."""
        while not self.acquire(-1):
            pass
        return 0

    cdef bint acquire(self, PY_TIMEOUT_T microseconds) except? -1:
        """Blocks so long, or for ever if that is -1; False if it was not fired, or interrupted."""
        cdef PyLockStatus status
        with nogil:
            status = PyThread_acquire_lock_timed(self.lock, microseconds, 1)
        if status == PY_LOCK_INTR:
            PyErr_CheckSignals()
        return status == PY_LOCK_ACQUIRED


cdef int call_soon(loop, function, argument, context) except -1:
    """The loop's, in its own thread, where nobody else would see to it that this is called."""
    try:
        loop.call_soon(function, argument, context=context)
    except MemoryError:
        # Then nothing was queued. What was given up on the way here is free now.
        loop.call_soon(function, argument, context=context)
    except TypeError:
        # In debug mode asyncio refuses coroutine functions, and takes a marked one for such.
        if not isinstance(getattr(function, "__func__", function), Launcher):
            raise
        loop.call_soon(MethodType(call_with, function), argument, context=context)
    return 0


def call_with(function, argument):
    function(argument)


@cython.final
@cython.trashcan(True)
cdef class _Callback(_Item):
    """A done-callback; bound to the loop that ran where it was added, if one did."""

    cdef object function
    cdef object context
    cdef object loop
    cdef Mailbox mailbox
    # Once it is done; as long as that is None, it arrives only to end the wait.
    cdef Unfuture unfuture
    # Whose thread the loop runs in, and waits there, if it is a worker; and in which era. Added
    # there by gather(), wait(), shield() and the like, it says that their callers wait.
    cdef _Worker worker
    cdef unsigned int era
    # Whether it is bookkeeping of our own, which comes before whoever waits.
    cdef bint own

    cdef int begin_wait(self, Unfuture unfuture) except -1:
        self.worker = <_Worker>this_worker
        self.era = self.worker.era
        self.worker.begin_wait_in(self.loop, unfuture)
        return 0

    cdef int end_wait(self) except -1:
        cdef _Worker worker = self.worker
        if worker is not None:
            self.worker = None
            worker.end_wait(self.era)
        return 0

    cdef int removed(self) except -1:
        """It waits no more, says whoever has taken it from the chain."""
        if self.worker is None:
            return 0
        if this_worker is <PyObject *>self.worker:
            self.end_wait()
        else:
            self.mailbox.post(self)
        return 0

    cdef Unfuture fire(self, Unfuture unfuture):
        """Where it is bound to a loop, or our own; others come last: see `fire_all`."""
        if self.loop is None:
            self.call(unfuture)
        elif running_loop() is self.loop:
            self.end_wait()
            self.schedule(unfuture)
        else:
            self.unfuture = unfuture
            self.mailbox.post(self)

    cdef call(self, Unfuture unfuture):
        if self.context is None:
            self.function(unfuture)
        else:
            self.context.run(self.function, unfuture)

    cdef schedule(self, Unfuture unfuture):
        is_ambient = self.mailbox.thread_id is not None
        function = self.call_in_ambient_loop if is_ambient else self.function
        call_soon(self.loop, function, unfuture, self.context)

    def call_in_ambient_loop(self, unfuture):
        try:
            self.function(unfuture)
        except (KeyboardInterrupt, SystemExit) as exc:
            # It would leave the loop, where nobody runs it who could hear of it.
            log_failed_callback(self.function, unfuture, exc)

    cdef int arrive(self, Mailbox mailbox) except -1:
        """Calls it there and then; a loop in debug mode wants to time each callback."""
        self.end_wait()
        if self.unfuture is None:
            return 0
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
                self.function, self.unfuture, self.context, failure, self.loop, mailbox.thread_id
            )
        return 0

    cdef int abandon(self) except -1:
        if self.unfuture is not None:
            logger.debug("%r: its loop is closed, the callback is not called", self.function)
        return 0


cdef _Callback callback_of(function, context, loop):
    cdef _Callback callback = _Callback.__new__(_Callback)
    callback.function = function
    callback.context = context
    callback.loop = loop
    if loop is not None:
        callback.mailbox = mailbox_of(loop)
        callback.mailbox.note_waiter(loop)
    return callback


def when_done(Unfuture unfuture not None, function):
    """Has the thread that finishes it call `function(unfuture)`, whichever loop may run here.

    If it is done it is called here and now. What a signal handler raises in there is raised here,
    and not logged as of a callback: who has not done its part, waking a consumer say, must know.
    Gives what `no_more` takes.
    """
    cdef _Callback callback = callback_of(function, None, None)
    callback.own = True
    if not unfuture.add_waiter(callback):
        function(unfuture)
    return callback


def no_more(Unfuture unfuture not None, _Callback callback not None):
    """Takes out what `when_done` has given, if that still waits; by a finalizer, say."""
    unfuture.remove_waiter(callback)


def name_of_call(Unfuture unfuture not None):
    """The name of the function behind it; None if there is none."""
    cdef int kind
    lock(unfuture)
    kind = unfuture._kind
    source = unfuture._source
    outcome = unfuture._outcome
    unlock(unfuture)
    return name_behind(kind, source, outcome)


def waiting_upon(Unfuture unfuture not None):
    """Its continuations, and those that are to have its outcome."""
    cdef list waiters = []
    cdef Py_ssize_t count = 1
    while len(waiters) < count:
        waiters = [None] * (count + 8)
        lock(unfuture)
        count = note_linked(unfuture._chain, waiters)
        unlock(unfuture)
    found = []
    for waiter in waiters[:count]:
        if isinstance(waiter, Unfuture):
            found.append(waiter)
        elif isinstance(waiter, _Follower):
            found.append((<_Follower>waiter).target)
    return found


def show_to_collector(list calls not None):
    """Of a batch: calls that are on their way, and may be garbage nevertheless.

    That is so where their executor has forgotten them. The garbage collector sees them anyway;
    the compiled core keeps calls on their way from it.
    """
    cdef Unfuture unfuture
    for unfuture in calls:
        lock(unfuture)
        track(unfuture)
        unlock(unfuture)
    track(calls)


def take_unseen(Unfuture unfuture not None):
    """Its failure, if nobody has looked at that; from now on somebody has."""
    if load(&unfuture._status) != FAILED or not load(&unfuture._unseen):
        return None
    store(&unfuture._unseen, False)
    return unfuture._outcome


cpdef tell_watcher(Unfuture unfuture):
    """A call is being made that goes to an executor which is not ours: see `watch_calls`."""
    if load(&_watching):
        context_for(unfuture, None)


def when_told(Unfuture unfuture not None, function):
    """The same, but when whoever waits has been told, in turn with the callbacks of others."""
    add_callback(unfuture, callback_of(function, None, None))


cdef bint add_callback(Unfuture unfuture, _Callback callback) except -1:
    """Fires it at once if the Unfuture is done; whether it was not."""
    if unfuture.add_waiter(callback):
        return True
    raised = fire_all(unfuture, callback, may_raise())
    if raised is not None:
        raise raised
    return False


@cython.final
@cython.trashcan(True)
cdef class _Park(_Item):
    """One `await`: its iterator, and what the suspended task is parked on.

    It belongs to that one task: `_asyncio_future_blocking` is a handshake between two, and two
    loops that await one Unfuture would race on it.
    """

    cdef public bint _asyncio_future_blocking
    cdef bint ended
    cdef Unfuture unfuture
    # These belong to the section, until the task waits.
    cdef bint begun
    cdef object loop
    cdef Mailbox mailbox
    cdef object wakeup
    cdef object context
    # Whose thread the loop runs in, and waits there, if it is a worker; and in which era.
    cdef _Worker worker
    cdef unsigned int era
    # The task's last request to cancel whose answer comes later. They are answered in the order
    # they were made, so if this one was heard, so were those before it.
    cdef object request

    def __iter__(self):
        return self

    def __next__(self):
        cdef Unfuture unfuture = self.unfuture
        cdef Mailbox mailbox
        cdef bint begun
        if not unfuture.is_done():
            lock(self)
            begun = self.begun
            self.begun = True
            unlock(self)
            if begun:
                raise RuntimeError("await wasn't used with future")
            loop = running_loop()
            if loop is None:
                raise RuntimeError(f"no running event loop to wait in for {unfuture!r}")
            if unfuture.is_call() and is_in_home_thread():
                mailbox = home_now()
                if mailbox is not None:
                    mailbox.start_now(unfuture)
            if not unfuture.is_done():
                unfuture.check_not_own(loop)
                mailbox = mailbox_of(loop)
                mailbox.note_waiter(loop)
                lock(self)
                self.loop = loop
                self.mailbox = mailbox
                unlock(self)
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
        lock(self)
        loop = self.loop
        unlock(self)
        return loop

    def add_done_callback(self, function, *, context=None):
        """:raises RuntimeError: if no task waits here, or it has been called already."""
        cdef bint fresh
        if context is None:
            context = PyContext_CopyCurrent()
        elif not PyContext_CheckExact(context):
            check_context(context)
        lock(self)
        fresh = self.loop is not None and self.wakeup is None
        if fresh:
            self.wakeup = function
            self.context = context
        unlock(self)
        if not fresh:
            raise RuntimeError("only the task that is parked here may ask to be called, and once")
        if not self.unfuture.add_waiter(self):
            call_soon(self.loop, function, self, context)
        elif this_worker is not NULL:
            self.worker = <_Worker>this_worker
            self.era = self.worker.era
            self.worker.begin_wait_in(self.loop, self.unfuture)

    def remove_done_callback(self, function):
        cdef bint removed = self.unfuture.remove_waiter(self)
        if removed:
            self.end_wait()
        return removed

    cdef int end_wait(self) except -1:
        cdef _Worker worker = self.worker
        if worker is not None:
            self.worker = None
            worker.end_wait(self.era)
        return 0

    def _behind(self):
        return self.unfuture

    def cancel(self, msg=None):
        request = CancelRequest(msg)
        if request.repeats(self.request):
            return True
        answer = self.unfuture._request_cancel(request)
        if request.awaited:
            self.request = request
        return answer

    def done(self):
        return load(&self.unfuture._status) >= CANCELLED

    def result(self):
        """The task only asks whether to go on: `__next__` gives the outcome to its coroutine.

        :raises CancelledError: if the task was cancelled, and the outcome came without anybody
            having heard of that.
        """
        # As in asyncio: it was woken for this, even if its coroutine gets CancelledError instead.
        store(&self.unfuture._unseen, False)
        request = self.request
        if request is not None and request.was_lost():
            raise cancelled_error(request.message, True)

    # How the end of the wait reaches the task.

    cdef Unfuture fire(self, Unfuture unfuture):
        if running_loop() is self.loop:
            self.end_wait()
            call_soon(self.loop, self.wakeup, self, self.context)
        else:
            self.mailbox.post(self)

    cdef int arrive(self, Mailbox mailbox) except -1:
        self.end_wait()
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

    cdef Unfuture fire(self, Unfuture unfuture):
        store(&unfuture._unseen, False)
        return pass_on(unfuture, self.target)


@cython.final
@cython.trashcan(True)
cdef class _Failed(_Item):
    """Stands for what was raised when somebody was told, for `fire_all` to come upon."""

    cdef object failure

    cdef Unfuture fire(self, Unfuture unfuture):
        raise self.failure


cdef leave_coroutine(coro, bint unstarted, chain):
    """What stood behind an Unfuture that is done now: closes it if it has not begun.

    Returns the waiters to fire, and what a log handler raised meanwhile, or a Ctrl-C.
    """
    if PyCoro_CheckExact(coro):
        track(coro)
    if unstarted:
        try:
            close_unstarted(coro)
        except BaseException as exc:
            return with_failure(chain, exc)
    return chain


cdef Unfuture pass_on(Unfuture source, Unfuture target):
    """Gives `target` the same outcome; returns it if its waiters, still in its chain, are to fire.

    Nobody adds to that chain any more. Left there it needs no container, whose making may fail.
    """
    cdef int status = load(&source._status)
    if status == CANCELLED_AND_NOTIFIED:
        status = CANCELLED
    failure = None
    try:
        if target._got_unfuture and status == FAILED:
            hint_at_map(source._outcome)
        chain = target.claim(status, source._outcome, ANY)
    except BaseException as exc:
        # A Ctrl-C, or there is no memory. Nobody else would finish it.
        failure = exc
    if failure is not None:
        chain = with_failure(target.claim(status, source._outcome, ANY), failure)
    if chain is REFUSED:
        return None
    if chain is None:
        return None
    lock(target)
    target._chain = <_Item>chain
    unlock(target)
    return target


cdef with_failure(chain, failure):
    """The chain that `claim` is to give; `fire_all` notes the failure when it comes to it."""
    cdef _Failed first
    if chain is REFUSED:
        raise failure
    try:
        first = _Failed.__new__(_Failed)
    except MemoryError:
        return chain
    first.failure = failure
    first.link = <_Item>chain
    return first


# In which order.
#
# Our own bookkeeping comes first: views, streams and batches are as far as their Unfuture when
# somebody sees it done. Then, at once and in the order they came, whoever waits: threads, what is
# bound to a loop, continuations, followers and those who wait for these. Last the callbacks of
# others without a loop, in their order: they may take any time, or wait for one of the former.
#
# Whatever is raised on the way, all are told. A KeyboardInterrupt or SystemExit out of a callback
# then goes on to who called `set_result` and the like; so does what a log handler raises.


cdef fire_all(Unfuture unfuture, _Item chain, bint raises):
    """Fires a finished Unfuture's waiters, then its followers' waiters, then callbacks.

    Returns what is to be raised when all is done, or None. Raises nothing.

    :param raises: whether the caller will; else everything is logged.
    """
    global firings
    cdef Unfuture follower = None
    if chain.link is not None:
        return fire_many(unfuture, chain, raises)
    # There is one waiter, as mostly.
    failure = None
    if type(chain) is not _Callback or (<_Callback>chain).loop is not None:
        try:
            follower = chain.fire(unfuture)
        except BaseException as exc:
            failure = exc
        if follower is not None:
            chain = None
            lock(follower)
            chain, follower._chain = follower._chain, chain
            unlock(follower)
            return fire_many(follower, chain, raises)
    elif (<_Callback>chain).own or later is not NULL or firings >= NESTING - 1:
        return fire_many(unfuture, chain, raises)
    else:
        firings += 1
        try:
            (<_Callback>chain).call(unfuture)
        except BaseException as exc:
            failure = exc
        firings -= 1
    return None if failure is None else note_failure(chain, unfuture, failure, raises, None)


cdef fire_many(Unfuture unfuture, _Item chain, bint raises):
    """`fire_all` where there may be many."""
    cdef _Item own, ready, foreign, waiter, first = None, last = None
    cdef Unfuture follower, following = None, newest = None
    cdef _Line line = None
    raised = None
    while True:
        # The newest of the chain comes first; taken apart, each kind has its oldest first.
        own = ready = foreign = None
        while chain is not None:
            waiter = chain
            chain = waiter.link
            if type(waiter) is not _Callback or (<_Callback>waiter).loop is not None:
                waiter.link = ready
                ready = waiter
            elif (<_Callback>waiter).own:
                waiter.link = own
                own = waiter
            else:
                (<_Callback>waiter).unfuture = unfuture
                waiter.link = foreign
                foreign = waiter
        if own is not None:
            if line is None:
                line = new_line()
            raised = keep_books(unfuture, own, line, raises, raised)
        while ready is not None:
            waiter = ready
            ready = waiter.link
            waiter.link = None
            try:
                follower = waiter.fire(unfuture)
            except BaseException as exc:
                raised = note_failure(waiter, unfuture, exc, raises, raised)
            else:
                if follower is not None:
                    if newest is None:
                        following = follower
                    else:
                        newest.link = follower
                    newest = follower
        if foreign is not None:
            if last is None:
                first = foreign
            else:
                last.link = foreign
            last = foreign
            while last.link is not None:
                last = last.link
        if following is None:
            break
        unfuture = following
        following = <Unfuture>unfuture.link
        unfuture.link = None
        if following is None:
            newest = None
        lock(unfuture)
        chain, unfuture._chain = unfuture._chain, chain
        unlock(unfuture)
    if line is not None and line._first is not None:
        if last is None:
            first = line._first
        else:
            last.link = line._first
        line._first = line._last = None
    if first is not None:
        raised = call_back(first, raises, raised)
    return raised


cdef keep_books(Unfuture unfuture, _Item own, _Line line, bint raises, raised):
    """What others want called for that which ends with it, a batch's calls say, goes to `line`."""
    global later
    cdef _Item waiter
    cdef bint nested = later is not NULL or line is None
    if not nested:
        later = <PyObject *>line
    while own is not None:
        waiter = own
        own = waiter.link
        waiter.link = None
        try:
            waiter.fire(unfuture)
        except BaseException as exc:
            raised = note_failure(waiter, unfuture, exc, raises, raised)
    if not nested:
        later = NULL
    return raised


cdef _Line new_line():
    """None if there is no memory for it: then nothing waits for its turn, but all is called."""
    try:
        return _Line.__new__(_Line)
    except MemoryError:
        return None


cdef call_back(_Item first, bint raises, raised):
    """Calls those callbacks, or leaves them for the firing in this thread that said to."""
    global later, firings
    cdef _Item waiter
    cdef _Line line = None
    cdef Unfuture unfuture
    if later is not NULL:
        while first is not None:
            waiter = first
            first = waiter.link
            waiter.link = None
            (<_Line>later).push(waiter)
        return raised
    firings += 1
    try:
        if firings >= NESTING:
            # Those of the firings within this one come after its own.
            line = new_line()
            later = <PyObject *>line if line is not None else NULL
        while first is not None:
            waiter = first
            first = waiter.link
            waiter.link = None
            unfuture = (<_Callback>waiter).unfuture
            try:
                (<_Callback>waiter).call(unfuture)
            except BaseException as exc:
                raised = note_failure(waiter, unfuture, exc, raises, raised)
            if first is None and line is not None:
                first = line._first
                line._first = line._last = None
    finally:
        if line is not None:
            later = NULL
        firings -= 1
    return raised


cdef note_failure(_Item waiter, Unfuture unfuture, failure, bint raises, raised):
    """What is to be raised in the end, when `raised` was to be, and now this."""
    if raises and isinstance(failure, (KeyboardInterrupt, SystemExit)):
        if not isinstance(raised, (KeyboardInterrupt, SystemExit)):
            return failure
    try:
        if type(waiter) is _Callback:
            log_failed_callback((<_Callback>waiter).function, unfuture, failure)
        else:
            log_failed_waking(waiter, unfuture, failure)
    except BaseException as exc:
        if raises and raised is None:
            return exc
    return raised


cdef inline bint may_raise() noexcept:
    """Whether what callbacks raise goes on to who called a method in this thread.

    It would end the ambient loop, or look like the failure of a function that a worker runs.
    """
    return this_worker is NULL and not is_in_home_thread()


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
    # Whether it waits for what the function of a `then` returned, which got an Unfuture.
    cdef unsigned char _got_unfuture
    cdef unsigned int _generation
    # The result, the exception, or the message of a cancellation; before that see `_kind`.
    cdef object _outcome
    # The context for what has not begun; the worker that a function runs in; the requests to
    # cancel, in a tuple, that came while a coroutine made its first step; the traceback of a
    # failure, with the context that it is reported in, if nobody looks at it: see `_fail_in`.
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
            self.set_up(UNFUTURE, source, None)
            self.follow(source)
        elif is_coroutine(source):
            mailbox = home()
            self.set_up(COROUTINE, source, context_for(self, None))
            mailbox.post(self)
        else:
            mirror = mirror_of(self, source)
            self.set_up(MIRROR, mirror, None)
            mirror.attach()

    cdef int set_up(self, int kind, source, extra) except -1:
        """Puts something behind it, unless there is something, or it has begun or ended."""
        cdef bint fresh
        self.check_fork()
        lock(self)
        fresh = self._status == PENDING and self._kind == NOTHING
        if fresh:
            self._source = source
            self._extra = extra
            self._kind = kind
        unlock(self)
        if not fresh:
            raise set_up_error(self)
        return 0

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
        :raises CancelledError: if it was cancelled; in a function that runs in a thread of ours, if
            its own call is cancelled from a loop: then this one is cancelled, too.
        :raises BaseException: what the function raised.
        """
        cdef int status
        note_result()
        status = load(&self._status)
        if status < CANCELLED:
            self.wait(timeout, True)
            status = load(&self._status)
        if status == FINISHED:
            return self._outcome
        if status == FAILED:
            store(&self._unseen, False)
            raise self._outcome.with_traceback((<tuple>self._extra)[0])
        raise cancelled_error(self._outcome, running_loop() is not None)

    def exception(self, timeout=None):
        """The exception, or None if there is a result; waits as `result` does.

        :raises TimeoutError: after `timeout` seconds.
        :raises InvalidStateError: in `unsync.thread`, if it is not done.
        :raises CancelledError: if it was cancelled.
        """
        cdef int status
        note_result()
        status = load(&self._status)
        if status < CANCELLED:
            self.wait(timeout, True)
            status = load(&self._status)
        if status == FINISHED:
            return None
        if status == FAILED:
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
        lock(self)
        answer = self._status == PENDING and self._kind == COROUTINE
        unlock(self)
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
            lock(unfuture)
            status = unfuture._status
            kind = unfuture._kind
            source = unfuture._source
            unlock(unfuture)
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
        """The running loop: an Unfuture can be awaited in every loop.

        :raises RuntimeError: where none runs, for `asyncio.gather` and its like cannot wait there.
        """
        loop = running_loop()
        if loop is None:
            raise no_loop_error(self)
        return loop

    cdef loop_for_view(self):
        loop = running_loop()
        return home()._loop() if loop is None else loop

    @property
    def future(self):
        """A true `asyncio.Future` that shows this one; of the running loop, else the ambient one.

        A new one each time, which goes when nobody holds it or waits for it. Outcome and
        cancellation go both ways, as does what is set.
        """
        return asyncio_view(self, self.loop_for_view(), when_done, no_more, in_worker)

    @property
    def concurrent_future(self):
        """A true `concurrent.futures.Future` that shows this one.

        A new one each time, which goes when nobody holds it or waits for it. Outcome and
        cancellation go both ways, as does what is set.
        """
        return concurrent_view(self, when_done, when_told, no_more, in_worker, pool_wait)

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
        raise not_iterable_error(self)

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
        self.check_fork()
        mirror = None
        lock(self)
        if self._kind == MIRROR:
            mirror = self._source
        unlock(self)
        raised = self.settle(status, outcome, ANY, True)
        if raised is REFUSED:
            raise already_done_error(self)
        if mirror is not None:
            mirror.push(status, outcome)
        if raised is not None:
            raise raised
        return 0

    def set_running_or_notify_cancel(self):
        """For executors, as in concurrent.futures: marks it running.

        Returns False if it was cancelled: then its work must not begin.

        :raises RuntimeError: if it is running or finished, or something stands behind it: a call,
            a continuation or another future, which says itself when it begins.
        """
        cdef int status, kind
        self.check_fork()
        lock(self)
        status = self._status
        kind = self._kind
        if status == PENDING and kind == NOTHING:
            store(&self._status, RUNNING)
        elif status == CANCELLED:
            store(&self._status, CANCELLED_AND_NOTIFIED)
        unlock(self)
        if status == PENDING and kind == NOTHING:
            return True
        if CANCELLED <= status <= CANCELLED_AND_NOTIFIED:
            return False
        raise refused_running_error(self, status)

    def _begin(self):
        """For a `Batch` that makes the call itself: marks it running, if it is pending."""
        cdef bint begun
        batch = None
        if this_worker is not NULL:
            lock(self)
            if self._kind == SHARE:
                batch = self._source
            unlock(self)
            if batch is not None:
                (<Batch>batch).made_by(<_Worker>this_worker)
                (<_Worker>this_worker).begin_call(self)
        lock(self)
        begun = self._status == PENDING and self._kind == SHARE
        if begun:
            store(&self._status, RUNNING)
        unlock(self)
        return begun

    def cancel(self, msg=None):
        """Cancels what is behind it; `msg` goes with the CancelledError.

        A coroutine sees `CancelledError` and decides, as in asyncio; work that has not begun
        never will; the source of a `then` is cancelled with it, as what is awaited would be.
        A function that already runs in a thread or a process cannot be stopped: a plain thread
        gets False, as in concurrent.futures; where a loop runs the Unfuture is cancelled and the
        function's outcome dropped, as in asyncio. In a thread of ours the function gets
        CancelledError where it waits, or where it does so next: in `result()` and `exception()`,
        which cancel what they wait for, in `concurrent.futures.wait()` and `as_completed()`, and
        for a stream. That happens once. A loop that the function runs is left alone.

        Returns whether it is, or is being, cancelled. In the thread of the loop that a coroutine
        runs in, that is what its task answers: False if it has just ended.
        """
        return self._request_cancel(CancelRequest(msg))

    def _request_cancel(self, request):
        """`cancel()` for one who must know, when the outcome comes, whether it was in time."""
        cdef Unfuture behind, known = None
        cdef long steps = 0, bound = 1024
        if request.asked is None:
            request.asked = self
        answer, behind = self.cancel_this(request)
        while behind is not None and behind is not known:
            steps += 1
            if steps == bound:  # two threads may have made a circle that `follow` did not see
                known = behind
                bound *= 2
            cancelled, behind = behind.cancel_this(request)
            if answer is None:
                answer = cancelled
        if not request.awaited:
            request.asked = None
            if load(&self._status) >= CANCELLED:
                self._overlook()
        raised = request.raised
        if raised is not None:
            request.raised = None
            raise raised
        return bool(answer)

    def _overlook(self):
        """Who cancelled it came too late, and does not want to hear that it failed."""
        store(&self._unseen, False)

    cdef tuple cancel_this(self, request):
        """Whether this one is cancelled (None: as the next one is), and the next to cancel."""
        cdef int status, kind
        worker = None
        self.check_fork()
        lock(self)
        status = self._status
        kind = self._kind
        source = self._source
        if kind == JOB and status == RUNNING:
            worker = self._extra
        unlock(self)
        if status >= CANCELLED:
            self._overlook()
            return status <= CANCELLED_AND_NOTIFIED, None
        if status == RUNNING and kind == COROUTINE:
            if self.note_request(request):
                return True, None
            return self.cancel_this(request)  # its first step has been made
        if kind == UNFUTURE:
            return None, source
        if kind == TASK:
            return self.cancel_task(source, request), None
        if status == PENDING:
            if kind == MIRROR:
                return source.cancel(request), None
            if self.cancel_now(request, PENDING):
                if kind == SHARE:
                    (<Batch>source).lose()
                return True, source if kind == CONTINUATION or kind == MAPPING else None
            return self.cancel_this(request)  # it began or ended in between
        if kind == SHARE:
            worker = (<Batch>source).maker()
        if request.is_from_loop() and self.cancel_now(request, ANY):
            if worker is not None:
                (<_Worker>worker).cancel_call(self, request)
        return self.is_cancelled(), None

    cdef bint cancel_now(self, request, int expected) except -1:
        """Whether it was this; what callbacks raise `_request_cancel` raises in the end."""
        raised = self.settle(CANCELLED, request.message, expected, True)
        if raised is REFUSED:
            return False
        if raised is not None:
            request.raised = raised
        return True

    cdef bint note_request(self, request) except -1:
        """Leaves it for `started`; False if the coroutine does not make its first step any more."""
        cdef bint begins = True, noted = False
        request.awaited = True
        while begins and not noted:
            former = None
            lock(self)
            former = self._extra
            unlock(self)
            # Held here, so that nothing is dropped in the section. If it is the context, that has
            # been taken, or is in use.
            requests = (*former, request) if type(former) is tuple else (request,)
            lock(self)
            begins = self._status == RUNNING and self._kind == COROUTINE
            if begins and self._extra is former:
                self._extra = requests
                noted = True
            unlock(self)
        if not noted:
            request.awaited = False
        return noted

    cdef bint cancel_task(self, task, request) except -1:
        loop = task.get_loop()
        if running_loop() is loop:
            request(task)
            return request.heard
        request.awaited = True
        try:
            loop.call_soon_threadsafe(request, task)
        except RuntimeError:
            # The loop is closed, the task will never end.
            self.cancel_now(request, ANY)
        return True

    # Going on from it.

    def add_done_callback(self, fn, *, context=None):
        """Has `fn(unfuture)` called once it is done.

        Added where a loop is running: called in that loop's thread, soon, as in asyncio. Added
        elsewhere: called by the thread that finishes it, at once if it is done, as in
        concurrent.futures. What a callback raises is logged and stops no other. But a
        KeyboardInterrupt or SystemExit goes on, when all have been called, to a thread that itself
        called `set_result`, `set_exception`, `cancel` or this; in the threads of unsync, and of
        pools that finish what stands behind it, it is logged.

        More than 32 within each other are not called before `set_result` returns, but after the
        ones that they are called in.

        :param context: the context to call it in; in a loop the default is a copy of the
            current one.
        :raises TypeError: if `fn` is not callable.
        """
        if not callable(fn):
            check_callable("a done-callback", fn)
        loop = running_loop()
        if context is not None:
            if not PyContext_CheckExact(context):
                check_context(context)
        elif loop is not None:
            context = PyContext_CopyCurrent()
        cdef _Callback callback = callback_of(fn, context, loop)
        if add_callback(self, callback) and loop is not None and this_worker is not NULL:
            callback.begin_wait(self)

    def remove_done_callback(self, fn):
        """Removes every callback that equals `fn`; returns how many there were."""
        cdef _Item waiter
        cdef int removed = 0
        found = []
        self.check_fork()
        lock(self)
        try:
            waiter = self._chain
            while waiter is not None:
                found.append(waiter)
                waiter = waiter.link
        finally:
            unlock(self)
        for waiter in found:
            if type(waiter) is _Callback and (<_Callback>waiter).function == fn:
                if self.remove_waiter(waiter):
                    removed += 1
                    (<_Callback>waiter).removed()
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
        target._extra = context_for(target, self)
        target._kind = kind
        if not self.add_waiter(target):
            fire_all(self, target, False)
        elif PyObject_GC_IsTracked(self) and not PyObject_GC_IsTracked(target):
            # It came to be tracked meanwhile, and `track_chain` may have passed by.
            lock(target)
            track(target)
            unlock(target)
        return target

    cdef Unfuture fire(self, Unfuture source):
        cdef Mailbox mailbox
        if load(&source._status) != FINISHED:
            store(&source._unseen, False)
            return pass_on(source, self)
        try:
            mailbox = home()  # first: who begins to drain while that starts a loop must be told
            if load(&_watching):
                self.note_fired(source)
            mailbox.post(self)
        except BaseException as exc:
            # The ambient loop cannot be started: the one who waits must hear of it.
            self.complete(FAILED, exc, ANY)
        return None

    cdef own_context(self):
        """The context in which it will run, while it waits for its turn; else None.

        One that is empty is not kept otherwise. It is from now on, for the mark of a drain.
        """
        context = PyContext_CopyCurrent()  # in place of an empty one
        cdef bint waits = False
        lock(self)
        waits = self._status == PENDING and self._kind in (COROUTINE, CONTINUATION, MAPPING)
        if waits and self._extra is None:
            self._extra = context
        elif waits:
            context = self._extra
        unlock(self)
        return context if waits else None

    cdef int note_fired(self, Unfuture source) except -1:
        """By the thread that finished the source of this continuation, while somebody watches."""
        context = self.own_context()
        if context is not None:  # else it is cancelled already
            _watcher.made(self, source, job_here(), context)
        return 0

    cdef int go_on_now(self, Mailbox mailbox, int kind, Unfuture source, function, context):
        """In the ambient loop: calls the continuation."""
        cdef int status = FAILED
        cdef bint went_on = False
        failure = None
        try:
            PyContext_Enter(context)
            try:
                result = function(source._outcome if kind == MAPPING else source)
            finally:
                PyContext_Exit(context)
            # In here as well: nobody else would finish it if this failed.
            went_on = self.resolve(result, context, mailbox)
            status = FINISHED
        except AsyncioCancelledError as exc:
            status = CANCELLED
            failure = exc.args[0] if exc.args else None
        except BaseException as exc:
            failure = exc if kind == MAPPING else hint_at_map(exc)
        # Out here for the reason in `work`.
        if status == CANCELLED:
            self.complete(status, failure, ANY)
        elif status == FAILED:
            self.fail_in(context, failure)
        if not went_on:
            mailbox.count_ended(self)
        return 0

    # The room where it changes.

    cdef tell_waiters(self, side, int status, chain):
        """Those in concurrent.futures.wait(); gives the chain back.

        In a function of its own, as every other `try` on this way: each took 20 instructions of all
        that end, and nearly none come here.
        """
        failure = None
        try:
            failure = side.tell(self, status)
        except BaseException as exc:
            failure = exc
        return chain if failure is None else with_failure(chain, failure)

    cdef side(self):
        lock(self)
        side = self._side
        unlock(self)
        return side

    cdef claim(self, int status, outcome, int expected):
        """Makes it done, once: the waiters to fire, or REFUSED if somebody else was first."""
        cdef int before
        cdef int kind = NOTHING, named
        cdef bint again = True
        self.check_fork()
        failed_at = None
        if status == FAILED:
            failed_at = outcome.__traceback__, None if failing_in is NULL else <object>failing_in
        chain = REFUSED
        extra = side = None
        while again:
            again = False
            behind = detail = name = None
            lock(self)
            named = self._kind
            if named != NOTHING:
                behind = self._source
                detail = self._outcome
            unlock(self)
            # Out here and before: it may run Python code, and an exception that somebody raises in
            # this thread from outside must not come between the change and who waits for it.
            if named != NOTHING:
                name = name_behind(named, behind, detail)
            lock(self)
            before = self._status
            if before < CANCELLED and (expected == ANY or before == expected):
                again = self._kind != named  # it went on meanwhile
                if not again:
                    kind = named
                    side = self._side
                    if status == CANCELLED and side is not None:
                        status = CANCELLED_AND_NOTIFIED
                    # Held in locals, so that nothing is dropped in here.
                    source = self._source
                    extra = self._extra
                    _former = self._outcome
                    chain = self._chain
                    self._chain = None
                    self._source = name
                    self._kind = NOTHING if name is None else NAME
                    self._outcome = outcome
                    self._extra = failed_at
                    if PyObject_IS_GC(outcome):
                        track(self)
                    if status == FAILED:
                        store(&self._unseen, True)
                    store(&self._status, status)
            unlock(self)
        if kind == COROUTINE:
            chain = leave_coroutine(source, before == PENDING, chain)
        return chain if side is None else self.tell_waiters(side, status, chain)

    cdef int keep_name(self, name) except -1:
        """For `repr`: the function that was behind it."""
        if name is None:
            return 0
        lock(self)
        if self._kind == NOTHING:
            self._source = name
            self._kind = NAME
        unlock(self)
        return 0

    def _name_function(self, function):
        """For `repr`: the function behind the future that this was made from."""
        mirror = None
        name = name_of(function)
        lock(self)
        if self._kind == MIRROR:
            mirror = self._source
        unlock(self)
        if mirror is not None:
            mirror.function = name
        if load(&self._status) >= CANCELLED:
            self.keep_name(name)

    cdef bint complete(self, int status, outcome, int expected) except -1:
        """Makes it done and tells everybody; False if it was done already."""
        if WITH_GIL or status != FAILED:  # as in `settle`, of which most ends need no more
            return self.finish(status, outcome, expected, False) is not REFUSED
        return self.settle(status, outcome, expected, False) is not REFUSED

    cdef settle(self, int status, outcome, int expected, bint raises):
        """What `complete` does; REFUSED, or what callbacks raised that the caller is to raise.

        :param raises: whether it will, in a thread that may.
        """
        if WITH_GIL or status != FAILED:
            return self.finish(status, outcome, expected, raises)
        handled = put_aside()
        try:
            return self.finish(status, outcome, expected, raises)
        finally:
            take_up(handled)

    cdef finish(self, int status, outcome, int expected, bint raises):
        chain = self.claim(status, outcome, expected)
        if chain is REFUSED or chain is None:
            return chain
        return fire_all(self, <_Item>chain, raises and may_raise())

    cdef bint keep_result(self, result) noexcept:
        """What `complete` comes to for a call from `fill_batches` that nobody waits for yet.

        In less than half the time; False, and nothing done, for any other.
        """
        cdef bint kept
        batch = None  # held here, so that it is not dropped in the section
        lock(self)
        kept = (
            self._status == PENDING
            and self._kind == SHARE
            and self._chain is None
            and self._side is None
            and self._generation == _generation
        )
        if kept:
            batch = self._source
            self._source = (<Batch>batch).name
            self._kind = NAME
            self._outcome = result  # it was None
            if PyObject_IS_GC(result):
                track(self)
            store(&self._status, FINISHED)
        unlock(self)
        return kept

    def _complete(self, status, outcome, expected=None):
        """Makes it done and tells everybody; False if it was done already."""
        check_outcome(status, outcome)
        return self.complete(status, outcome, ANY if expected is None else expected)

    cdef int fail_in(self, context, failure) except -1:
        """Has a call fail; if nobody looks at that, it is reported in the call's own context.

        Notebooks go by a context variable: the report stands under the cell that made the call.
        """
        global failing_in
        cdef PyObject *former = failing_in
        failing_in = <PyObject *>context
        try:
            self.complete(FAILED, failure, ANY)
        finally:
            failing_in = former
        return 0

    def _fail_in(self, context, failure):
        check_outcome(FAILED, failure)
        self.fail_in(context, failure)

    cdef int started(self, task, name) except -1:
        """In the ambient loop: its coroutine, called `name`, has become `task`."""
        coro = None
        requests = None
        lock(self)
        if self._status == RUNNING and self._kind == COROUTINE:
            coro = self._source
            requests = self._extra
            self._source = task
            self._outcome = name
            self._extra = None
            self._kind = TASK
        unlock(self)
        if type(requests) is tuple:
            for request in <tuple>requests:
                request(task)
        return 0

    cdef int ended_at_once(self, task, context) except -1:
        """In the ambient loop: its coroutine's first step was its last."""
        requests = None
        lock(self)
        if self._status == RUNNING and self._kind == COROUTINE:
            requests = self._extra
        unlock(self)
        if type(requests) is tuple and not task.cancelled() and task.exception() is None:
            # As in asyncio: a task that cancels itself and then returns is cancelled.
            self.complete(CANCELLED, (<tuple>requests)[len(<tuple>requests) - 1].message, ANY)
        else:
            self.take_outcome(task, context)
        if type(requests) is tuple:
            for request in <tuple>requests:
                request.came_too_late()
        return 0

    cdef int take_outcome(self, task, context) except -1:
        """Finishes it as `task` ended.

        :param context: the coroutine's; None: this is called in it.
        """
        if type(task) is Task and not task_cancelled(task) and task_exception(task) is None:
            self.complete(FINISHED, task_result(task), ANY)
        else:
            status, outcome = outcome_of_asyncio(task)
            if status != FAILED:
                self.complete(status, outcome, ANY)
                return 0
            if self._got_unfuture:
                hint_at_map(outcome)
            self.fail_in(PyContext_CopyCurrent() if context is None else context, outcome)
        return 0

    cdef int arrive(self, Mailbox mailbox) except -1:
        """In the ambient loop: starts the coroutine behind it, or calls the continuation."""
        cdef int kind = NOTHING
        source = function = context = None
        lock(self)
        if self._status == PENDING:
            store(&self._status, RUNNING)
            kind = self._kind
            source = self._source
            function = self._outcome
            context = self._extra
        unlock(self)
        if kind == NOTHING:
            mailbox.count_ended(self)
            return 0
        mailbox.count_begun()
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

    cdef bint resolve(self, result, context, Mailbox mailbox) except -1:
        """In the ambient loop: finishes it with what a continuation returned, flattened.

        Returns whether that was a coroutine, which has its turn now.
        """
        cdef bint goes_on
        if type(result) in plain_types:
            self.complete(FINISHED, result, ANY)
        elif isinstance(result, Unfuture):
            self.follow(result)
        elif is_asyncio_future(result):
            self.follow(Unfuture(result))
        elif is_awaitable(result):
            coro = result if is_coroutine(result) else wait_for_awaitable(result)
            source = former = None
            lock(self)
            goes_on = self._status == RUNNING
            if goes_on:
                source = self._source
                former = self._outcome
                self._source = coro
                self._outcome = None
                self._got_unfuture = self._kind == CONTINUATION
                self._kind = COROUTINE
            unlock(self)
            if not goes_on:  # cancelled while the function ran, say
                close_unstarted(coro)
                return False
            mailbox.start(self, coro, context)
            return True
        else:
            self.complete(FINISHED, result, ANY)
        return False

    cdef int follow(self, Unfuture other) except -1:
        cdef bint pending = False, has_chain = False, cancelled = False
        if other is self:
            self.complete(FAILED, circle_error(), ANY)
            return 0
        source = former = message = None
        lock(self)
        if self._status < CANCELLED:
            pending = True
            has_chain = self._chain is not None
            track(self)
            source = self._source
            former = self._outcome
            self._source = other
            self._outcome = None
            self._got_unfuture = self._kind == CONTINUATION
            self._kind = UNFUTURE
        elif self._status <= CANCELLED_AND_NOTIFIED:
            cancelled = True
            message = self._outcome
        unlock(self)
        if cancelled:
            # While the function of a continuation ran, which has returned what to wait for.
            other.cancel(message)
        if not pending:
            return 0
        if has_chain:
            self.track_chain()
            if other.hangs_upon(self):
                self.complete(FAILED, circle_error(), ANY)
        # In a circle, too: it will fail for the same reason, which is no news.
        cdef _Follower follower = _Follower.__new__(_Follower)
        follower.target = self
        if not other.add_waiter(follower):
            fire_all(other, follower, False)
        return 0

    cdef bint hangs_upon(self, Unfuture other) except -1:
        """Whether its outcome is that of `other`, or of a continuation of that, and so on."""
        cdef Unfuture unfuture = self, known = None
        cdef long steps = 0, bound = 1024
        while unfuture is not other:
            steps += 1
            if steps == bound:
                known = unfuture
                bound *= 2
            behind = unfuture._behind()
            if not isinstance(behind, Unfuture) or behind is known:
                return False
            unfuture = behind
        return True

    cdef int track_chain(self) except -1:
        """What goes on from it, and from that, has nobody else to hold it either."""
        cdef Unfuture unfuture
        cdef _Item item
        cdef list todo = [self], untracked
        while todo:
            unfuture = todo.pop()
            untracked = []
            lock(unfuture)
            try:
                item = unfuture._chain
                while item is not None:
                    if isinstance(item, Unfuture) and not PyObject_GC_IsTracked(item):
                        untracked.append(item)
                    item = item.link
            finally:
                unlock(unfuture)
            for unfuture in untracked:
                lock(unfuture)
                track(unfuture)
                unlock(unfuture)
            todo += untracked
        return 0

    cdef bint work(self) except -1:
        """In a worker thread: runs the function behind it, unless it was cancelled.

        Returns whether it began.
        """
        cdef bint begun = False, coroutine = False
        cdef int status = FINISHED
        function = arguments = context = None
        lock(self)
        if self._status == PENDING:
            store(&self._status, RUNNING)
            begun = True
            function = self._source
            arguments = self._outcome
            context = self._extra
            self._outcome = None
            self._extra = <object>this_worker
        unlock(self)
        if not begun:
            return False
        if context is None:
            context = PyContext_New()
        try:
            PyContext_Enter(context)
            try:
                if type(arguments) is tuple:
                    result = function(*<tuple>arguments)
                else:
                    result = (<_Keywords>arguments).call(function)
                if PyCoro_CheckExact(result):
                    # Of a function below a decorator that is none for coroutines, say.
                    result = Unfuture(result)
                    coroutine = True
            finally:
                PyContext_Exit(context)
        except AsyncioCancelledError as exc:
            # What it waited for was cancelled.
            status = CANCELLED
            result = exc.args[0] if exc.args else None
        except BaseException as exc:
            status = FAILED
            result = exc
        # Out here: as long as an exception is being handled, this thread looks at its traceback
        # now and then, and whoever waits is about to change that.
        if coroutine:
            self.follow(result)
        elif status == FAILED:
            self.fail_in(context, result)
        else:
            self.complete(status, result, ANY)
        return True

    cdef bint add_waiter(self, _Item waiter) except -1:
        """Adds to the chain; False if it is done, and the caller must fire the waiter itself."""
        cdef bint added = False
        self.check_fork()
        lock(self)
        if self._status < CANCELLED:
            waiter.link = self._chain
            self._chain = waiter
            added = True
        unlock(self)
        return added

    cdef bint remove_waiter(self, _Item waiter) except -1:
        """Takes one out of the chain; False if it is not there any more."""
        cdef _Item before = None, link
        cdef bint found = False
        lock(self)
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
        unlock(self)
        return found

    def _wait(self, timeout, bint cancels=True):
        """Blocks until it is done.

        :param cancels: whether it is cancelled if that is what ends the wait.
        :raises TimeoutError: after `timeout` seconds.
        :raises InvalidStateError: in `unsync.thread`, if it is not done.
        :raises CancelledError: if the call that runs in this thread was cancelled from a loop.
        """
        self.wait(timeout, cancels)

    cdef int wait(self, timeout, bint cancels) except -1:
        if is_in_home_thread():
            if not self.is_done():
                raise would_deadlock_error(self)
            return 0
        if timeout is not None:
            check_timeout(timeout)
        if threading_names["get_ident"] is not own_get_ident:
            check_threads()
        cdef _Blocked blocked = _Blocked.__new__(_Blocked)
        cdef bint released = False
        if not self.add_waiter(blocked):
            return 0
        loop = running_loop()
        if loop is not None:
            warn_if_it_blocks(loop)
        try:
            if this_worker is NULL:
                released = blocked.wait(timeout)
            else:
                released = (<_Worker>this_worker).wait(self, blocked, timeout)
        finally:
            if not released:
                self.remove_waiter(blocked)
        if blocked.request is not None:
            if cancels:
                self._request_cancel(CancelRequest(blocked.request.message, True))
            raise cancelled_error(blocked.request.message, False)
        if load(&self._status) < CANCELLED:
            raise TimeoutError(f"no outcome after {timeout} seconds: {self!r}")
        if load(&self._status) == FAILED:
            # A Ctrl-C that another thread has received may be what the failure comes of: a worker
            # process died of it. Raised after the failure, it would strike in whatever the program
            # or Python itself does with that.
            PyErr_CheckSignals()
        return 0

    cdef int check_fork(self) except -1:
        """After a fork: fails it in the child if its work stayed with the parent.

        Whatever may come first to one goes by here before it enters the section, in which a thread
        of the parent may have been.
        """
        if self._generation != _generation:
            self.disown()
        return 0

    cdef int disown(self) except -1:
        cdef bint whole
        with _fork_lock:
            if self._generation == _generation:
                return 0
            renew_lock(self)  # a thread of the parent may have had it
            whole = self._status >= CANCELLED or (self._status == PENDING and self._source is None)
            if not whole:
                # Who waited is with the parent too.
                _chain, self._chain = self._chain, None
                _side, self._side = self._side, None
            # Last: another thread of the child that sees it may add itself to the chain.
            self._generation = _generation
        if whole:
            return 0
        self.complete(FAILED, orphan_error(), ANY)
        store(&self._unseen, False)
        return 0

    cdef int check_not_own(self, loop) except -1:
        """For a coroutine that awaits the Unfuture of its own call, and would wait for ever."""
        cdef int kind = NOTHING
        source = None
        if load(&self._status) != RUNNING:
            return 0
        lock(self)
        kind = self._kind
        source = self._source
        unlock(self)
        if kind != TASK and kind != COROUTINE:
            return 0
        task = current_task(loop)
        if task is not None and (source is task or source is task.get_coro()):
            raise RuntimeError(f"a coroutine cannot await its own outcome: {self!r}")
        return 0

    cdef awaited(self):
        """The outcome as `await` gives it."""
        cdef int status = load(&self._status)
        if status == FINISHED:
            return self._outcome
        if status == FAILED:
            store(&self._unseen, False)
            raise awaited_exception(self._outcome.with_traceback((<tuple>self._extra)[0]))
        raise cancelled_error(self._outcome, True)

    def _behind(self):
        """What its outcome hangs upon, if that is an Unfuture, also behind a view, or a task."""
        cdef int kind
        self.check_fork()
        lock(self)
        kind = self._kind
        source = self._source
        unlock(self)
        if kind == MIRROR:
            return source.behind()
        return source if kind == TASK or CONTINUATION <= kind <= UNFUTURE else None

    # What the two parents' modules look for.

    @property
    def _state(self):
        self.check_fork()
        side = self.side()
        seen = None if side is None else side.seen()
        return STATE_NAMES[load(&self._status) if seen is None else seen]

    @property
    def _condition(self):
        return Enlisting(self, self.waiting_side())

    @property
    def _waiters(self):
        return Enlisting(self, self.waiting_side())

    cdef waiting_side(self):
        self.check_fork()
        side = self.side()
        if side is not None:
            return side  # wait() asks five times for each
        side = Waiters(pool_wait)  # made out here: see the head of this file
        lock(self)
        track(self)
        if self._kind == COROUTINE and PyCoro_CheckExact(self._source):
            track(self._source)
        if self._side is None:
            self._side = side
        if self._status == CANCELLED:
            # No executor will come to say so, and concurrent.futures.wait() would wait for it.
            store(&self._status, CANCELLED_AND_NOTIFIED)
        unlock(self)
        return self.side()

    def _get_snapshot(self):
        """What asyncio copies, from Python 3.15 on: done, cancelled, result, exception."""
        cdef int status = load(&self._status)
        if status == FINISHED:
            return True, False, self._outcome, None
        if status == FAILED:
            store(&self._unseen, False)
            return True, False, None, self._outcome
        return status >= CANCELLED, status >= CANCELLED, None, None

    def _peek(self):
        """Status and outcome, for who only shows them; the outcome is None before the end."""
        cdef int status = load(&self._status)
        return status, self._outcome if status >= CANCELLED else None

    @property
    def _cancel_message(self):
        return self._outcome if self.is_cancelled() else None

    def _make_cancelled_error(self):
        return cancelled_error(self._cancel_message, True)

    # What Python looks for.

    def __repr__(self):
        cdef int status, kind
        self.check_fork()
        lock(self)
        status = self._status
        kind = self._kind
        source = self._source
        outcome = self._outcome
        unlock(self)
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
            mailbox = home_now()
            loop = None if mailbox is None else mailbox._loop()
            report_unseen_failure(self, self._outcome, loop, (<tuple>self._extra)[1])


# Most Unfutures come to their end as a call that has served: its result can refer to nothing, and
# nobody has to be told of it. Such a one is freed here, in less than half the time.

cdef extern from *:
    """
    static destructor unsync_free_any; /* the type's own */

    /* With what the type's own leaves out where it is not in the type's slot: the finalizer, and
       the trashcan, which frees long chains without recursion. */
    static void unsync_free_slowly(PyObject *unfuture, destructor slot) {
        if (Py_TYPE(unfuture)->tp_dealloc != slot) { /* a subclass, which has seen to both */
            unsync_free_any(unfuture);
            return;
        }
        if (PyObject_CallFinalizerFromDealloc(unfuture)) return;
        PyObject_GC_UnTrack(unfuture);
        Py_TRASHCAN_BEGIN(unfuture, slot)
        unsync_free_any(unfuture);
        Py_TRASHCAN_END
    }
    """
    destructor free_any "unsync_free_any"
    void free_slowly "unsync_free_slowly"(PyObject *unfuture, destructor slot) noexcept


cdef inline bint has_served(PyObject *unfuture) noexcept:
    """Whether it is finished, refers to nothing that could refer to it, and stands in no line."""
    cdef PyObject *nothing = <PyObject *>None
    return (
        Py_TYPE(unfuture) is <PyTypeObject *>Unfuture
        and load(&(<Unfuture>unfuture)._status) == FINISHED
        and (<PyObject **>(<char *>unfuture + weak_references))[0] is NULL
        and <PyObject *>(<Unfuture>unfuture).link is nothing
        and <PyObject *>(<Unfuture>unfuture)._chain is nothing
        and <PyObject *>(<Unfuture>unfuture)._side is nothing
        and <PyObject *>(<Unfuture>unfuture)._extra is nothing
        and not is_container(<PyObject *>(<Unfuture>unfuture)._source)
        and not is_container(<PyObject *>(<Unfuture>unfuture)._outcome)
    )


cdef void free_unfuture(PyObject *unfuture) noexcept:
    """The type's `tp_dealloc`. No reference is left, and nothing here may take one."""
    if not has_served(unfuture):
        free_slowly(unfuture, free_unfuture)
        return
    PyObject_GC_UnTrack(unfuture)
    Py_DECREF(<PyObject *>(<Unfuture>unfuture)._source)
    Py_DECREF(<PyObject *>(<Unfuture>unfuture)._outcome)
    for _ in range(4):
        Py_DECREF(<PyObject *>None)  # that the other fields have; from 3.12 on it is immortal
    PyObject_GC_Del(unfuture)


cdef Py_ssize_t weak_references = (<PyTypeObject *>Unfuture).tp_weaklistoffset
# Another interpreter's import finds the type with its slot set.
if (<PyTypeObject *>Unfuture).tp_dealloc != free_unfuture:
    free_any = (<PyTypeObject *>Unfuture).tp_dealloc
    (<PyTypeObject *>Unfuture).tp_dealloc = free_unfuture


def are_all_of(values, frozenset types not None):
    """Whether each of them is of one of these types, and of no subtype."""
    # Most are of the same type as the one before.
    cdef PyObject *known = NULL
    for value in values:
        kind = type(value)
        if <PyObject *>kind is not known:
            if kind not in types:
                return False
            known = <PyObject *>kind
    return True


def call_each(
    function, arguments, bint star, frozenset types not None, list results not None
):
    """Adds what it gives for each of them; the first that `are_all_of` refuses is the last one.

    :param star: whether they are tuples of arguments, not the only argument.
    :raises BaseException: what the function raises. The iterator goes on from there.
    """
    cdef PyObject *known = NULL
    for argument in arguments:
        result = function(*argument) if star else function(argument)
        results.append(result)
        kind = type(result)
        if <PyObject *>kind is not known:
            if kind not in types:
                return
            known = <PyObject *>kind


@cython.final
cdef class Counter:
    """How many jobs of executors that are not ours were started, and how they ended."""

    # These belong to the section.
    cdef long long _started, _finished, _failed, _cancelled

    def start(self):
        lock(self)
        self._started += 1
        unlock(self)

    def end(self, bint failed, bint cancelled):
        """:param failed: whether with an error; one that is cancelled has not failed."""
        lock(self)
        self._cancelled += cancelled
        self._failed += failed
        self._finished += not (cancelled or failed)
        unlock(self)

    def count(self, future):
        """The job's start, and its end by a callback."""
        self.start()
        future.add_done_callback(self._ended)

    def _ended(self, future):
        try:
            failed = future.exception() is not None
        except ConcurrentCancelledError:
            self.end(False, True)
        else:
            self.end(failed, False)

    def work(self):
        cdef long long started, finished, failed, cancelled
        lock(self)
        started = self._started
        finished = self._finished
        failed = self._failed
        cancelled = self._cancelled
        unlock(self)
        return started, finished, failed, cancelled, started - finished - failed - cancelled


cdef class Batch:
    """Calls of one function that go together, as one job for an executor, which packs itself.

    A subclass sends the job, has `end` called when it is done, and says what then becomes of calls
    that did not simply give their results. An executor that is not ours gives its own future.

    :param name: of the function.
    :param items: what the calls are made with, in a list that nobody changes.
    """

    cdef readonly str name
    cdef readonly Py_ssize_t size  # how many calls
    # Where the job's end is counted, if that is not done elsewhere. Set before `end` can be called.
    cdef public Counter counter
    # These belong to the section.
    cdef object _job
    cdef list _items, _calls
    cdef Py_ssize_t _cancelled  # how many of the calls were
    cdef _Worker _maker  # what makes the calls, if it is a thread of ours

    def __init__(self, str name not None, list items not None):
        cdef bint fresh
        lock(self)
        fresh = self.name is None
        if fresh:
            self.name = name
            self.size = len(items)
            self._items = items
        unlock(self)
        if not fresh:
            raise set_up_error(self)
        for item in items:
            if is_container(<PyObject *>item):
                break
        else:
            # Nothing in there leads anywhere, so the garbage collector need not look at each.
            PyObject_GC_UnTrack(<PyObject *>items)

    @property
    def job(self):
        """The future of what was sent, until it has served; else None."""
        lock(self)
        job = self._job
        unlock(self)
        return job

    @job.setter
    def job(self, job):
        lock(self)
        self._job, job = job, self._job
        unlock(self)

    @property
    def items(self):
        lock(self)
        items = self._items
        unlock(self)
        return [] if items is None else items

    @property
    def calls(self):
        """Their Unfutures, from `fill_batches` on."""
        lock(self)
        calls = self._calls
        unlock(self)
        return [] if calls is None else calls

    def let_go(self):
        """Of its job, which keeps what it calls when done, and of all else; gives the calls."""
        cdef list items = None
        cdef list calls = None
        job = None
        lock(self)
        self._job, job = job, self._job
        self._items, items = items, self._items
        self._calls, calls = calls, self._calls
        unlock(self)
        return [] if calls is None else calls

    cdef int made_by(self, _Worker worker) except -1:
        """Says the thread that is about to begin one of the calls."""
        lock(self)
        self._maker, worker = worker, self._maker
        unlock(self)
        return 0

    cdef _Worker maker(self):
        cdef _Worker worker
        lock(self)
        worker = self._maker
        unlock(self)
        return worker

    cdef int lose(self) except -1:
        """One of the calls was cancelled before it began; the last one takes the job with it."""
        cdef bint is_last
        job = None
        lock(self)
        self._cancelled += 1
        is_last = self._cancelled == self.size
        if is_last:
            job = self._job
        unlock(self)
        if job is not None:
            job.cancel()
        return 0

    def end(self, job):
        """The job is done, says the thread that finished it.

        If it gives True and a result for each call, the calls have them at once. What others want
        called for a call is called when all are done.
        """
        global later
        cdef _Line line = None
        if later is NULL:
            line = new_line()
            later = <PyObject *>line if line is not None else NULL
        try:
            self.end_calls(job)
        finally:
            if line is not None:
                later = NULL
                if line._first is not None:
                    call_back(line._first, False, None)

    cdef int end_calls(self, job) except -1:
        try:
            came_back = job.result()
        except BaseException as exc:
            self.fail(job, exc)
            return 0
        if self.counter is not None:
            self.counter.end(False, False)
        if self.are_results(came_back):
            finish_calls(self.let_go(), (<tuple>came_back)[1])
        else:
            self.arrive(came_back)
        return 0

    cdef bint are_results(self, came_back) except -1:
        cdef bint has_calls
        lock(self)
        has_calls = self._calls is not None
        unlock(self)
        if not has_calls or type(came_back) is not tuple or len(<tuple>came_back) != 2:
            return False
        all_of_them, results = <tuple>came_back
        return all_of_them is True and type(results) is list and len(<list>results) == self.size

    def __call__(self):
        """Makes the calls in this process."""
        raise NotImplementedError

    def parcel(self, imports_main):
        """The function to call in another process, and its arguments: all of it pickles.

        :param imports_main: whether that imports this program's main module, if it is a file.
        :raises pickle.PicklingError: if nothing of it can travel.
        """
        raise NotImplementedError

    def fail(self, job, exc):
        """Asked for its result, the job has raised this, or the thread was interrupted."""
        raise NotImplementedError

    def arrive(self, came_back):
        """The job has given something else. Where it was called here, its calls may be done."""
        raise NotImplementedError


def fill_batches(list batches not None):
    """Makes the calls of each of them, and gives a list of those for each.

    They are neither coroutines nor jobs of a queue. Whoever makes a call holds it until it is done.
    """
    cdef Unfuture unfuture
    cdef Batch batch
    cdef list calls, _former, made = []
    # The garbage collector would look around after each few hundred, and find nothing.
    cdef bint collects = pause_collector()
    try:
        for batch in batches:
            if batch is None:
                raise TypeError("a Batch is needed, not None")
            calls = []
            for _ in range(batch.size):
                unfuture = blank_on_its_way()
                unfuture._source = batch
                unfuture._kind = SHARE
                tell_watcher(unfuture)
                calls.append(unfuture)
            PyObject_GC_UnTrack(<PyObject *>calls)  # it need not look at this one either
            lock(batch)
            _former = batch._calls
            batch._calls = calls
            unlock(batch)
            made.append(calls)
    finally:
        if collects:
            resume_collector()
    return made


@cython.boundscheck(True)  # somebody may have the lists, and change them
cdef int finish_calls(list calls, list results) except -1:
    """Gives each its result, unless it is done.

    Whoever waits for one is told when all have theirs, and so finds the next ones done.
    """
    cdef Py_ssize_t place
    cdef Unfuture unfuture
    cdef list left = []
    for place in range(len(calls)):
        unfuture = calls[place]
        if unfuture is None:
            continue
        if not unfuture.keep_result(results[place]):
            left.append(place)
    for place in left:
        unfuture = calls[place]
        unfuture.complete(FINISHED, results[place], ANY)
    return 0


@cython.final
@cython.trashcan(True)
cdef class _Leaver(_Item):
    """Of a job of a bounded queue: that it is cancelled before it begins makes room."""

    cdef JobQueue queue

    cdef Unfuture fire(self, Unfuture unfuture):
        if unfuture.is_cancelled() and self.queue.drop_cancelled():
            self.queue.open_door()
        return None


@cython.final
cdef class JobQueue(_Line):
    """The work of a pool's threads: jobs in the order they came, and the workers that are idle.

    A worker that waits for an Unfuture is made up for by a spare one, so that `limit` workers go on
    with the queue.

    :param limit: how many workers may be at work.
    :param spawn: starts a thread that calls `work()`; called by the thread that submits, or by
        a worker that is about to wait.
    :param spares: how many workers there may be beyond `limit`.
    :param room: how many jobs may wait for a worker, or -1 for any number. Those that come from the
        queue's own workers are always let in: the workers might wait for them.
    :param patient: whether `submit` waits for room, where no event loop runs.
    :param nesting: which jobs the worker runs itself while it waits, if there is but one and no
        spare one.
    """

    cdef int _limit
    cdef int _spares
    cdef object _spawn
    cdef unsigned int _generation
    # These belong to the section, as does the line.
    # What each idle worker waits on, by its link the one that went idle before it; and how many.
    cdef _Blocked _parked
    cdef int _idle
    # How many there are, and how many of those have been sent for and not begun. Such a start is
    # taken off this count by the thread that begins, or by who finds that none could be started,
    # whoever is first: so that a start that Ctrl-C interrupts is counted once.
    cdef int _workers
    cdef int _starting
    # Those whose threads have begun, each with the next one, in no order.
    cdef _Worker _all
    # How many of them wait for an Unfuture, the last one that began to, and how many did ever.
    cdef int _blocked
    cdef _Worker _waiting
    cdef long long _waits_begun
    # How many jobs stand in the line, how many the workers are at, and how many were taken ever.
    cdef long _queued
    cdef int _running
    cdef long long _taken
    # How many were submitted, how many of those that ended had begun, and how they ended.
    cdef long long _submitted
    cdef long long _begun
    cdef long long _finished
    cdef long long _failed
    cdef long long _cancelled
    # A worker was woken for the line and has not looked at it yet: if more is there than it takes
    # it wakes the next one.
    cdef bint _rousing
    # The threads that wait for room.
    cdef _Line _door
    cdef object _refuse
    # An event: closed, and no worker is left.
    cdef object _ended
    cdef long _room
    cdef bint _patient
    cdef object _nesting
    # Belongs to the section: what interrupts the worker's wait, where it runs jobs meanwhile, for
    # it to look for one.
    cdef object _bell

    def __cinit__(self):
        self._generation = _generation
        self._room = -1
        self._door = _Line.__new__(_Line)
        self._ended = Latch()

    def __init__(
        self, int limit, spawn, int spares=0, long room=-1, bint patient=False, nesting=None
    ):
        cdef bint fresh
        lock(self)
        fresh = self._spawn is None
        if fresh:
            self._limit = limit
            self._spares = spares
            self._spawn = spawn
            self._room = room
            self._patient = patient
            self._nesting = nesting
        unlock(self)
        if not fresh:
            raise set_up_error(self)

    cdef inline int missing(self) noexcept:
        """In the section: how many more workers there should be at work; negative if too many."""
        return self._limit - (self._workers - self._blocked - self._idle)

    cdef inline _Blocked next_idle(self):
        """In the section: an idle worker to wake, if there is one."""
        cdef _Blocked idle = self._parked
        if idle is not None:
            self._parked = <_Blocked>idle.link
            idle.link = None
            self._idle -= 1
        return idle

    def submit(self, function, tuple args not None, dict kwargs):
        """Has a worker call `function(*args, **kwargs)` in a copy of the current context.

        :raises queue.Full: if there is no room, and it must not wait.
        :raises Exception: what `close` was told to refuse with, once the queue is closed.
        :raises RuntimeError: if there is no worker and none can be started.
        """
        return self.put(function, args, kwargs)

    cdef Unfuture put(self, function, tuple args, dict kwargs):
        """`args` is not None."""
        cdef Unfuture unfuture = blank_on_its_way()
        cdef _Leaver leaver
        cdef _Keywords keywords
        cdef _Blocked idle = None
        cdef bint spawn = False, full = False, lone, in_loop
        refuse = None
        unfuture._source = function
        if kwargs:
            keywords = _Keywords.__new__(_Keywords)
            keywords.args = args
            keywords.kwargs = kwargs
            unfuture._outcome = keywords
        else:
            unfuture._outcome = args
        unfuture._extra = context_for(unfuture, None)
        unfuture._kind = JOB
        if self._room >= 0 and self._patient:
            leaver = _Leaver.__new__(_Leaver)
            leaver.queue = self
            unfuture.add_waiter(leaver)
        # Asked before the section, and only where it counts.
        in_loop = WITH_GIL and self._rousing and running_loop() is not None
        while True:
            lock(self)
            refuse = self._refuse
            full = refuse is None and self.is_full() and not self.is_own_worker()
            if refuse is None and not full:
                self.push(unfuture)
                self._queued += 1
                self._submitted += 1
                if self._workers <= self._limit and self._blocked == 0:
                    # A loop submits the calls of many tasks in a turn. All workers at once would
                    # only take the GIL from it, and from one another.
                    if not (in_loop and self._rousing and self._workers == self._limit):
                        idle = self.next_idle()
                        if idle is not None:
                            self._rousing = WITH_GIL
                        elif self._workers < self._limit:
                            self._workers += 1
                            self._starting += 1
                            spawn = True
                else:
                    idle = self.reinforce(&spawn)
            unlock(self)
            if not full:
                break
            try:
                self.wait_for_room()
            except BaseException:
                unfuture.complete(CANCELLED, None, ANY)  # nobody will see it, but a watcher has
                raise
        if refuse is not None:
            unfuture.complete(CANCELLED, None, ANY)
            raise refuse()
        lone = is_lone_call()
        if idle is not None:
            wake_thread(idle.lock, lone)
        elif spawn:
            self.add_worker(unfuture)
        return unfuture

    cdef inline bint is_full(self) noexcept:
        """In the section."""
        if self._room < 0:
            return False
        # What waits for a worker, beyond those that are about to be taken.
        return self._queued + self._running - self._blocked >= self._limit + self._room

    cdef inline bint is_own_worker(self) noexcept:
        return this_worker is not NULL and (<_Worker>this_worker).queue is self

    cdef int wait_for_room(self) except -1:
        """Returns when it is worth another try."""
        cdef _Blocked blocked
        cdef bint full = False
        if self.drop_cancelled():
            return 0
        if not self._patient or running_loop() is not None:
            raise full_error(self._limit, self._room, self._patient)
        blocked = _Blocked.__new__(_Blocked)
        lock(self)
        full = self.is_full() and self._refuse is None
        if full:
            self._door.push(blocked)
        unlock(self)
        if not full:
            return 0
        try:
            with pool_wait(blocked):  # it may be another pool's thread
                blocked.wait(None)
        except BaseException:
            lock(self)
            blocked.gone = True
            unlock(self)
            self.open_door()  # it may have been let in already
            raise
        return 0

    cdef int open_door(self) except -1:
        """Lets in the first of those that wait for room, if there is some."""
        cdef _Blocked first = None
        if self._room < 0:
            return 0
        lock(self)
        if not self.is_full():
            first = <_Blocked>self._door.pop()
            while first is not None and first.gone:
                first = <_Blocked>self._door.pop()
        unlock(self)
        if first is not None:
            first.interrupt()
        return 0

    cdef bint drop_cancelled(self) except -1:
        """Whether some of the line were cancelled, and so make room."""
        cdef _Item item = None, following = None, dropped = None
        lock(self)
        item = self._first
        self._first = self._last = None
        while item is not None:
            following = item.link
            item.link = None
            if load(&(<Unfuture>item)._status) < CANCELLED:
                self.push(item)
            else:
                self._queued -= 1
                self._cancelled += 1
                item.link = dropped
                dropped = item
            item = following
        unlock(self)
        if dropped is None:
            return False
        while dropped is not None:
            following = dropped.link
            dropped.link = None
            dropped = following
        return True

    cdef _Blocked reinforce(self, bint *spawn):
        """In the section, where some workers wait: one to wake for the line, or one to start."""
        cdef _Blocked idle = None
        if self._first is not None and self.missing() > 0:
            idle = self.next_idle()
            if idle is None and self._workers < self._limit + self._spares:
                self._workers += 1
                self._starting += 1
                spawn[0] = True
        return idle

    cdef relieve(self):
        """Called by a worker that waits: has another one go on with the line.

        Returns why none could be started.
        """
        cdef _Blocked idle = None
        cdef bint spawn = False
        lock(self)
        idle = self.reinforce(&spawn)
        unlock(self)
        return self.send_for(idle, spawn)

    cdef send_for(self, _Blocked idle, bint spawn):
        """Wakes or starts the worker that `reinforce` asked for; returns why it cannot."""
        if idle is not None:
            PyThread_release_lock(idle.lock)
        elif spawn:
            # Whoever waits without a worker at work looks again: see `_Worker.wait`.
            return self.add_worker(None)
        return None

    cdef bint is_stuck(self) except -1:
        """Whether no worker is at work, and all wait for jobs that stand in the line."""
        cdef _Worker worker = None, following
        cdef _Item item = None
        cdef Unfuture job, awaited
        cdef long long taken, waits_begun
        cdef int blocked
        cdef bint at_work = False
        lock(self)
        taken = self._taken
        waits_begun = self._waits_begun
        blocked = self._blocked
        worker = self._waiting
        item = self._first
        at_work = self._workers > self._blocked + self._idle
        unlock(self)
        if at_work or item is None:
            return False
        # Step by step: see the head of this file. If anything moves meanwhile, it shows in the end.
        queued = {}
        while item is not None:
            queued[id(item)] = item
            lock(self)
            item = item.link
            unlock(self)
        waits = []
        while worker is not None:
            following = awaited = job = None
            lock(self)
            awaited = worker.awaited
            job = worker.job
            following = worker.before
            unlock(self)
            if awaited is None:
                return False
            waits.append((job, awaited))
            worker = following
        if not waits_for_ever(Unfuture, queued, waits):
            return False
        lock(self)
        at_work = (
            taken != self._taken
            or waits_begun != self._waits_begun
            or blocked != self._blocked
            or self._workers > self._blocked + self._idle
        )
        unlock(self)
        return not at_work

    # The worker of a queue that is given its `nesting` makes up for itself while it waits: it runs
    # some of the jobs on top of the one that waits. Each has a worker of its own for that time, and
    # so waits and is cancelled as any other. Who brings such a job rings afterwards; the worker
    # first shows by what it can be woken, and then looks.

    def listen(self, bell):
        """For its worker: what `ring` interrupts from now on; gives what it did before."""
        lock(self)
        self._bell, bell = bell, self._bell
        unlock(self)
        return bell

    def ring(self):
        """In any thread: has the worker look for a job, if it waits."""
        bell = None
        lock(self)
        bell = self._bell
        unlock(self)
        if type(bell) is _Blocked:
            (<_Blocked>bell).interrupt()
        elif bell is not None:
            bell.interrupt()

    def run_one(self):
        """In its worker: runs one of the jobs that may run while it waits; whether it did."""
        if not self.is_own_worker() or not (<_Worker>this_worker).waits:
            return False
        return self._nesting.run_one(self)

    def run_within(self, Unfuture unfuture):
        """In its worker, which waits: runs that job, or the first one; whether it was there."""
        global this_worker
        cdef PyObject *outer = this_worker
        cdef _Worker worker = _Worker.__new__(_Worker)
        cdef Unfuture job = unfuture
        cdef bint begun = True, there = True
        worker.queue = self
        lock(self)
        if unfuture is None:
            job = <Unfuture>self.pop()
            there = job is not None
        else:
            there = self.take_out(job)
        if there:
            self._taken += 1
            self._queued -= 1
            self._running += 1
            worker.job = job
            worker.next = self._all
            self._all = worker
        unlock(self)
        if not there:
            return False
        bell = self.listen(None)
        this_worker = <PyObject *>worker
        try:
            begun = job.work()
        except BaseException as exc:
            # As in `work`: somebody raised it in this thread from outside.
            job.complete(FAILED, exc, ANY)
            raise
        finally:
            if this_worker is <PyObject *>worker:  # not in the child of a fork
                this_worker = outer
            if worker.waits:
                worker.end_all_waits()  # of a loop that was left
            self.delist(worker)
            lock(self)
            worker.job = None
            self.count_ended(job, begun)
            unlock(self)
            self.listen(bell)
            if load(&_watching):
                _watcher.is_through(job)
        return True

    cdef bint is_buried(self, Unfuture unfuture) except -1:
        """Whether it hangs upon jobs whose turn comes after the one that waits."""
        cdef _Worker worker = <_Worker>this_worker
        cdef _Item item = None
        cdef Unfuture top = None, job = None
        lock(self)
        top = worker.job
        item = self._first
        worker = self._waiting
        unlock(self)
        if top is None:
            return False
        behind = {}
        # Step by step: see the head of this file.
        while worker is not None:
            lock(self)
            job = worker.job
            worker = worker.before
            unlock(self)
            if job is not None:
                behind[id(job)] = job
        while item is not None:
            behind[id(item)] = item
            lock(self)
            item = item.link
            unlock(self)
        return waits_for_ever(Unfuture, behind, [(top, unfuture)])

    cdef add_worker(self, Unfuture unfuture):
        """Starts the worker that has been counted; returns why it could not.

        If that leaves none, what stands in the line fails.

        :param unfuture: the job that it was sent for, whose caller hears of it; or None.
        :raises Exception: why it could not, if that job is refused.
        :raises KeyboardInterrupt: if it struck meanwhile, or anything that is no Exception; the
            worker has been started, unless that happened again and again.
        """
        cdef int _
        cdef bint pending, refused
        cdef Py_ssize_t others
        failure = interrupt = None
        for _ in range(START_ATTEMPTS):
            failure = None
            try:
                self._spawn()
            except Exception as exc:
                failure = exc
            except BaseException as exc:
                interrupt = exc
            else:
                break
            if failure is not None:
                break
            # Whether one was started nobody knows: of two, the second finds nothing to begin.
            failure = interrupted_start_error(interrupt)
            lock(self)
            pending = self._starting > 0
            unlock(self)
            if not pending:
                break
        if failure is not None:
            stranded = self.give_up_start()
            refused = unfuture is not None and unfuture in stranded
            for other in stranded:
                # Who came later counted on the thread that did not start.
                if other is not unfuture:
                    other._complete(FAILED, failure)
            others = len(stranded) - refused
            lock(self)
            self._submitted -= refused
            self._failed += others
            unlock(self)
            if refused:
                unfuture.complete(CANCELLED, None, ANY)
            if refused and interrupt is None:
                raise failure
        if interrupt is not None:
            raise interrupt
        return failure

    cdef list give_up_start(self):
        """Unless it has begun; returns the jobs that nobody will do."""
        cdef _Item first = None, following
        cdef list stranded = []
        cdef bint ended = False
        lock(self)
        if self._starting > 0:
            self._starting -= 1
            self._workers -= 1
            if self._workers == 0:
                first, self._first = self._first, None
                self._last = None
                self._queued = 0
                ended = self._refuse is not None
        unlock(self)
        if ended:
            self._ended.set()
        while first is not None:
            following = first.link
            first.link = None
            stranded.append(first)
            first = following
        return stranded

    cdef int end_worker(self, bint relieve) except -1:
        """Counts one worker less.

        :param relieve: has another one go on with the line, and in the same section: who looks in
            between would find nobody at work, and take that for the end of all hope.
        """
        cdef _Blocked idle = None
        cdef bint ended, spawn = False
        lock(self)
        self._workers -= 1
        if relieve:
            idle = self.reinforce(&spawn)
        ended = self._workers == 0 and self._refuse is not None
        unlock(self)
        if ended:
            self._ended.set()
        self.send_for(idle, spawn)
        return 0

    def work(self, prepare=None):
        """A worker's life: runs jobs until the queue is closed and empty.

        Returns at once if no worker is missing: its start was given up, or another one was first.

        :raises BaseException: what `prepare` raised; then no job was taken.
        """
        global this_worker
        cdef _Worker worker = _Worker.__new__(_Worker)
        cdef _Blocked parking = _Blocked.__new__(_Blocked), idle
        cdef Unfuture unfuture, done, call = None
        cdef bint end = False, counted = True, begun = False, roused = False, held = False, missing
        request = blocked = None
        worker.queue = self
        lock(self)
        missing = self._starting > 0
        self._starting -= missing
        unlock(self)
        if not missing:
            return
        try:
            if prepare is not None:
                prepare()
        except BaseException:
            self.end_worker(False)
            raise
        try:
            self.enlist(worker)
            this_worker = <PyObject *>worker
            while True:
                if worker.waits:
                    worker.end_all_waits()  # of a loop that was left
                idle = None
                lock(self)
                unfuture = None
                # When those that waited go on, there are too many.
                if (
                    self._workers <= self._limit
                    or self.missing() >= 0
                    or self._refuse is not None
                ):
                    unfuture = <Unfuture>self.pop()
                    note_idle(self._first is None)
                if roused:
                    roused = self._rousing = False
                    if WITH_GIL and unfuture is not None and self._first is not None:
                        idle = self.next_idle()
                        self._rousing = idle is not None
                if unfuture is not None:
                    self._taken += 1
                    self._queued -= 1
                    self._running += 1
                elif self._refuse is not None:
                    end = True
                elif self._idle < self._limit:
                    parking.link = self._parked
                    self._parked = parking
                    self._idle += 1
                else:
                    self._workers -= 1
                    counted = False
                    end = True
                done = worker.job
                worker.job = unfuture
                if done is not None:
                    self.count_ended(done, begun)
                    # Held in locals, so that nothing is dropped in here.
                    if worker.call is not None or worker.request is not None or (
                        worker.blocked is not None  # somebody raised something in the thread
                    ):
                        held = True
                        worker.call, call = None, worker.call
                        worker.request, request = None, worker.request
                        worker.blocked, blocked = None, worker.blocked
                unlock(self)
                if load(&_watching) and done is not None:
                    _watcher.is_through(done)
                done = None
                if held:
                    held = False
                    call = request = blocked = None
                if idle is not None:
                    PyThread_release_lock(idle.lock)
                self.open_door()
                if unfuture is not None:
                    begun = True
                    begun = unfuture.work()
                elif end:
                    return
                else:
                    roused = True
                    parking.park()
        except BaseException as exc:
            # Nothing of ours raises here: somebody raised it in this thread from outside.
            logger.critical("a worker was killed, another one takes its place", exc_info=True)
            if worker.job is not None:
                worker.job.complete(FAILED, exc, ANY)
                lock(self)
                done, worker.job = worker.job, None
                self.count_ended(done, begun)
                unlock(self)
                if load(&_watching):
                    _watcher.is_through(done)
        finally:
            this_worker = NULL
            self.delist(worker)
            if WITH_GIL:
                self._rousing = False
            if counted:
                self.end_worker(True)

    cdef void enlist(self, _Worker worker) noexcept:
        lock(self)
        worker.next = self._all
        self._all = worker
        unlock(self)

    cdef void delist(self, _Worker worker) noexcept:
        cdef _Worker each = None
        lock(self)
        if self._all is worker:
            self._all = worker.next
        else:
            each = self._all
            while each is not None and each.next is not worker:
                each = each.next
            if each is not None:
                each.next = worker.next
        worker.next = None
        unlock(self)

    cdef inline void count_ended(self, Unfuture unfuture, bint begun) noexcept:
        """In the section: a worker is through with it."""
        self._running -= 1
        self._begun += begun
        self.count_outcome(unfuture)

    cdef inline void count_outcome(self, Unfuture unfuture) noexcept:
        """In the section."""
        cdef int status = load(&unfuture._status)
        # The function has ended, even if a coroutine that it returned has not.
        if status < CANCELLED or status == FINISHED:
            self._finished += 1
        elif status == FAILED:
            self._failed += 1
        else:
            self._cancelled += 1

    def counts(self):
        """For `unsync.stats()`: see `QueueCounts`."""
        cdef long long begun, finished, failed, cancelled, pending
        cdef long queued
        cdef int workers, idle, waiting
        lock(self)
        begun = self._begun + self._running
        finished = self._finished
        failed = self._failed
        cancelled = self._cancelled
        pending = self._submitted - finished - failed - cancelled
        queued = self._queued
        workers = self._workers
        idle = self._idle
        # Of those that run jobs while they wait there may be several to a thread.
        waiting = min(self._blocked, workers)
        unlock(self)
        return (begun, finished, failed, cancelled, pending), queued, workers, idle, waiting

    def pending(self):
        """The jobs that wait for a worker, and those that workers are at, also if they are done."""
        cdef list queued = [], at_work = []
        cdef Py_ssize_t count = 1, number = 1, room = 0
        cdef _Worker worker = None
        while len(queued) < count or len(at_work) < number:
            queued = [None] * (count + 8)
            at_work = [None] * (number + 8)
            room = len(at_work)
            number = 0
            lock(self)
            count = note_linked(self._first, queued)
            worker = self._all
            while worker is not None:
                if worker.job is not None:
                    if number < room:
                        at_work[number] = worker.job
                    number += 1
                worker = worker.next
            unlock(self)
        return queued[:count], at_work[:number]

    def wait(self, timeout):
        """After `close`: waits up to `timeout` seconds for the last worker's end; whether it came.

        This counts the workers whose threads are only just being started, too.
        """
        return self._ended.wait(timeout)

    def close(self, refuse):
        """Refuses further jobs with `refuse()`; the workers end when the queue is empty."""
        cdef _Blocked parking = None, following
        cdef bint ended = False
        cdef _Line door = _Line.__new__(_Line)
        lock(self)
        if self._refuse is None:
            self._refuse = refuse
        ended = self._workers == 0
        parking, self._parked = self._parked, parking
        self._idle = 0
        door, self._door = self._door, door
        unlock(self)
        if ended:
            self._ended.set()
        while parking is not None:
            following = <_Blocked>parking.link
            parking.link = None
            PyThread_release_lock(parking.lock)
            parking = following
        parking = <_Blocked>door.pop()
        while parking is not None:
            parking.interrupt()
            parking = <_Blocked>door.pop()

    def cancel_all(self):
        """Cancels the jobs that have not begun."""
        cdef Unfuture unfuture = self.take()
        while unfuture is not None:
            unfuture.complete(CANCELLED, None, PENDING)
            self.count_taken(unfuture)
            unfuture = self.take()

    def fail_all(self, error):
        """Fails the jobs that have not begun."""
        check_outcome(FAILED, error)
        cdef Unfuture unfuture = self.take()
        while unfuture is not None:
            unfuture.complete(FAILED, error, ANY)
            self.count_taken(unfuture)
            unfuture = self.take()

    cdef int count_taken(self, Unfuture unfuture) except -1:
        lock(self)
        self.count_outcome(unfuture)
        unlock(self)
        return 0

    cdef Unfuture take(self):
        cdef Unfuture unfuture = None
        lock(self)
        unfuture = <Unfuture>self.pop()
        if unfuture is not None:
            self._queued -= 1
        unlock(self)
        return unfuture

    def after_fork(self):
        """In the child: the workers, and the jobs that waited for them, stayed with the parent."""
        cdef _Worker worker, before
        if self._generation == _generation:
            return  # it is no child
        self._generation = _generation
        renew_lock(self)  # another thread may have had it
        while self.take() is not None:
            pass
        worker = self._waiting
        while worker is not None:
            worker.waits = 0
            worker.after = NULL
            before, worker.before = worker.before, None
            worker = before
        self._parked = self._waiting = self._all = None
        self._workers = self._starting = self._idle = self._blocked = self._running = 0
        self._submitted = self._begun = self._finished = self._failed = self._cancelled = 0
        self._rousing = False
        self._door = _Line.__new__(_Line)
        self._bell = None


@cython.final
cdef class _Worker:
    """A thread of a pool, and the waits it is in."""

    cdef JobQueue queue
    # These belong to its own thread. There is more than one wait in a loop of its own, with many
    # tasks. Why no spare worker could be started for the last one, if so.
    cdef int waits
    cdef object failure
    # How often it has given up all its waits, at the end of a job: those are nobody's any more.
    cdef unsigned int era
    # These belong to the queue's section: what it works on, and what it waits for.
    cdef Unfuture job
    cdef Unfuture awaited
    # As do its neighbours in the list of those that wait. The later one holds this one.
    cdef _Worker before
    cdef PyObject *after
    # And the next one in the list of all.
    cdef _Worker next
    # And these: which call of a job that makes several it is at; that the call it is at was
    # cancelled from a loop, until a wait has been ended by that; and what to interrupt then, while
    # it waits outside of a loop of its own.
    cdef Unfuture call
    cdef object request
    cdef object blocked

    cdef int begin_wait(self, Unfuture unfuture) except -1:
        """Called before it waits for `unfuture`, or None for something unknown."""
        cdef JobQueue queue = self.queue
        cdef _Blocked idle = None
        cdef bint spawn = False
        self.waits += 1
        if self.waits > 1:
            return 0
        # At once: in between there may be no worker at work, and no reason to worry.
        lock(queue)
        queue._blocked += 1
        self.before = queue._waiting
        if self.before is not None:
            self.before.after = <PyObject *>self
        queue._waiting = self
        queue._waits_begun += 1
        self.awaited = unfuture
        idle = queue.reinforce(&spawn)
        unlock(queue)
        self.failure = queue.send_for(idle, spawn)
        queue.open_door()
        return 0

    cdef int begin_wait_in(self, loop, Unfuture unfuture) except -1:
        """The same, for one that waits in a loop of its own."""
        cdef JobQueue queue = self.queue
        self.begin_wait(unfuture)
        if queue._nesting is not None:
            queue._nesting.wait_in(loop, queue)
        return 0

    cdef int end_wait(self, unsigned int era) except -1:
        """:param era: of when it began. Its loop may have been left since, and run elsewhere."""
        if self.waits and era == self.era and this_worker is <PyObject *>self:
            self.waits -= 1
            if self.waits == 0:
                self.go_on()
        return 0

    cdef int end_all_waits(self) except -1:
        self.era += 1
        self.waits = 0
        self.go_on()
        return 0

    cdef int go_on(self) except -1:
        cdef JobQueue queue = self.queue
        cdef Unfuture awaited = None
        cdef _Worker before
        lock(queue)
        queue._blocked -= 1
        before = self.before
        if before is not None:
            before.after = self.after
        if self.after is NULL:
            queue._waiting = before
        else:
            (<_Worker>self.after).before = before
        self.before = None
        self.after = NULL
        self.awaited, awaited = awaited, self.awaited
        unlock(queue)
        queue.open_door()
        return 0

    # A cancel of the call that it is at, which comes from a loop. The function cannot be stopped,
    # but a wait of it can be ended: that in progress, or else the next one.

    cdef int begin_call(self, Unfuture unfuture) except -1:
        """Of those of its job."""
        cdef JobQueue queue = self.queue
        request = None
        lock(queue)
        self.call, unfuture = unfuture, self.call
        self.request, request = request, self.request
        unlock(queue)
        return 0

    cdef int cancel_call(self, Unfuture unfuture, request) except -1:
        """In any thread: `unfuture` was cancelled; if this is still at it, a wait is to hear."""
        cdef JobQueue queue = self.queue
        blocked = None
        lock(queue)
        if unfuture is self.job or unfuture is self.call:
            self.request, request = request, self.request
            blocked = self.blocked
        unlock(queue)
        if type(blocked) is _Blocked:
            (<_Blocked>blocked).interrupt()
        elif blocked is not None:
            blocked.interrupt()
        return 0

    cdef begin_blocking(self, blocked):
        """The thread is going to wait until that is released.

        Returns why it must not, as `end_blocking` does. A loop of the thread's own is left alone,
        and so is what the core itself asks within a wait.
        """
        cdef JobQueue queue = self.queue
        request = None
        if running_loop() is not None:
            return None
        lock(queue)
        if self.blocked is None:
            self.request, request = request, self.request
            if request is None:
                self.blocked = blocked
        unlock(queue)
        return request

    cdef end_blocking(self, blocked, bint takes):
        """What the wait was ended by, if it was, and asks for that: it is told once."""
        cdef JobQueue queue = self.queue
        request = None
        lock(queue)
        if self.blocked is blocked:
            self.blocked = None  # the caller holds it
            if takes:
                self.request, request = request, self.request
        unlock(queue)
        return request

    cdef bint wait(self, Unfuture unfuture, _Blocked blocked, timeout) except -1:
        """Waits in `blocked`, with a spare worker in its place; False if there is no outcome.

        That is after `timeout` seconds, or for `blocked.request`.

        :raises RuntimeError: if there is none, and the pool would wait for ever.
        """
        cdef bint is_done = True
        request = self.begin_blocking(blocked)
        if request is not None:
            blocked.request = request
            return False
        try:
            try:
                self.begin_wait(unfuture)
                self.wait_in(unfuture, blocked, timeout)
            finally:
                self.end_wait(self.era)
            is_done = load(&unfuture._status) >= CANCELLED
        finally:
            request = self.end_blocking(blocked, not is_done)
        blocked.request = request
        return is_done

    cdef int wait_in(self, Unfuture unfuture, _Blocked blocked, timeout) except -1:
        cdef JobQueue queue = self.queue
        cdef bint at_work = True
        cdef double until = 0
        if timeout is not None:
            until = <double>monotonic() + min(max(<double>timeout, 0.0), LONGEST_WAIT)
        while True:
            lock(queue)
            # A start that is pending may fail.
            at_work = queue._workers > queue._blocked + queue._idle + queue._starting
            unlock(queue)
            if at_work or (self.waits > 1 and queue._nesting is None):
                break
            if queue._nesting is not None:
                return self.work_meanwhile(unfuture, blocked, timeout is None, until)
            # Nobody else would see to the line. What is waited for may come to hang upon it later
            # on, as when a coroutine calls a function. With a timeout it is no deadlock.
            if timeout is None and queue.is_stuck() and not unfuture.is_done():
                raise exhausted_error(queue._workers, unfuture, self.failure)
            left = LOOK_AGAIN_SECONDS
            if timeout is not None:
                left = min(left, until - <double>monotonic())
            if blocked.wait(left):
                return 0
            if timeout is not None and <double>monotonic() >= until:
                return 0
            self.failure = queue.relieve()
        blocked.wait(None if timeout is None else until - <double>monotonic())
        return 0

    cdef int work_meanwhile(
        self, Unfuture unfuture, _Blocked blocked, bint for_ever, double until
    ) except -1:
        """Runs what may run now, one job after the other, until the wait is over."""
        cdef JobQueue queue = self.queue
        cdef double left
        former = queue.listen(blocked)
        try:
            while not unfuture.is_done() and not self.is_cancelled_in(blocked):
                left = LOOK_AGAIN_SECONDS
                if not for_ever:
                    left = min(left, until - <double>monotonic())
                    if left <= 0:
                        break
                if queue.run_one():
                    continue
                if blocked.wait(left):
                    # For the next time. What ended the wait meanwhile is seen at once.
                    lock(blocked)
                    blocked.released = False
                    unlock(blocked)
                    continue
                if not for_ever:
                    continue
                # What it would run before has come before somebody could wait for it.
                if queue.is_buried(unfuture) and not queue.run_one() and not unfuture.is_done():
                    raise buried_error(unfuture)
        finally:
            queue.listen(former)
            queue.ring()  # a loop of its own, which this kept from looking
        return 0

    cdef bint is_cancelled_in(self, _Blocked blocked) except -1:
        """Whether the wait is to be ended by that."""
        cdef JobQueue queue = self.queue
        cdef bint cancelled = False
        lock(queue)
        cancelled = self.blocked is blocked and self.request is not None
        unlock(queue)
        return cancelled


def in_worker():
    """Whether this is a thread of a pool."""
    return this_worker is not NULL


class pool_wait:
    """Around a wait that is none for an Unfuture; nothing in a thread that is not a pool's.

    :param blocked: its `interrupt()` ends the wait.
    :raises InvalidStateError: in the ambient loop's thread, which must not wait.
    :raises CancelledError: at the begin or the end, if the call that runs in this thread was
        cancelled from a loop.
    """

    def __init__(self, blocked):
        self._blocked = blocked

    def __enter__(self):
        if is_in_home_thread():
            raise would_block_error()
        check_threads()
        wake_home_again()
        if this_worker is not NULL:
            request = (<_Worker>this_worker).begin_blocking(self._blocked)
            if request is not None:
                raise cancelled_error(request.message, False)
            (<_Worker>this_worker).begin_wait(None)

    @staticmethod
    def event():
        """What this thread is going to wait for, which tells its pool."""
        nesting = None if this_worker is NULL else (<_Worker>this_worker).queue._nesting
        return ToldEvent(pool_wait) if nesting is None else nesting.event()

    def __exit__(self, kind, *_):
        if this_worker is not NULL:
            (<_Worker>this_worker).end_wait((<_Worker>this_worker).era)
            request = (<_Worker>this_worker).end_blocking(self._blocked, kind is None)
            if request is not None:
                raise cancelled_error(request.message, False)


@cython.final
@cython.trashcan(True)
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
        cdef bint fresh
        lock(self)
        fresh = self._submit is None
        if fresh:
            self._owner = owner
        unlock(self)
        if not fresh:
            raise set_up_error(self)
        self.submit = submit

    @property
    def submit(self):
        lock(self)
        submit = self._submit
        unlock(self)
        return submit

    @submit.setter
    def submit(self, submit):
        queue = getattr(submit, "__self__", None)
        if type(queue) is not JobQueue:
            queue = None
        lock(self)
        self._submit, submit = submit, self._submit
        self._queue, queue = queue, self._queue
        unlock(self)

    def send(self, function, tuple args not None, dict kwargs):
        """What `submit` gives, or its successor if the executor was replaced meanwhile."""
        return self.send_now(function, args, kwargs)

    cdef send_now(self, function, tuple args, dict kwargs):
        cdef JobQueue queue, queue_now
        while True:
            submit = submit_now = None
            lock(self)
            queue = self._queue
            submit = self._submit
            unlock(self)
            try:
                if queue is not None:
                    return queue.put(function, args, kwargs)
                return submit(function, args, {} if kwargs is None else kwargs)
            except RuntimeError:
                # Was the executor shut down and replaced after `submit` had been read?
                lock(self)
                queue_now = self._queue
                submit_now = self._submit
                unlock(self)
                if queue_now is queue and submit_now == submit:
                    raise


# What a function becomes when it is looked up on an instance or a class.
BIND_INSTANCE = 0
BIND_CLASS = 1
BIND_NOTHING = 2


@cython.trashcan(True)
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
        cdef bint fresh
        lock(self)
        fresh = self._function is None
        if fresh:
            self._binding = binding
            self._route = route
            self._function = function
        unlock(self)
        if not fresh:
            raise set_up_error(self)

    def __call__(self, *args, **kwargs):
        if self._route is not None:
            return self._route.send_now(self._function, args, kwargs)
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
    unfuture._extra = context_for(unfuture, None)
    unfuture._source = coro
    unfuture._kind = COROUTINE
    if PyCoro_CheckExact(coro):
        PyObject_GC_UnTrack(<PyObject *>coro)
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
        unfuture = launcher._route.send_now(launcher._function, positional, kwargs)
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


cdef refuse_making(PyTypeObject *cls, args, PyObject *kwargs):
    raise TypeError(f"cannot create {(<object>cls).__name__!r} instances")


cdef int forbid_making(cls) except -1:
    """Python code may not make one: it would lack what only the core gives it."""
    (<PyTypeObject *>cls).tp_new = refuse_making
    (<PyTypeObject *>cls).tp_vectorcall = NULL
    PyType_Modified(<PyTypeObject *>cls)
    return 0


for _class in (
    _Item, _Line, _Blocked, _Callback, _Failed, _Follower, _Keywords, _Leaver, _Park, _TaskDone,
    _Worker,
):
    forbid_making(_class)
del _class
