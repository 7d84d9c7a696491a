"""After a fork: the child starts afresh, its parent's pending work neither hangs nor repeats.

Each test is a program of its own. It and its children kill themselves if they hang, and show where
each thread stands, so that a fault is a failure of the program and not of its patience.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import textwrap
from collections.abc import Callable

import pytest
from support.under_test import CORE, WITH_GIL
from support.waiting import PATIENCE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Seconds that a program has: fewer than it is given from outside. A fork resets the alarm.
ALARM = int(1.8 * PATIENCE)

# Python's own word on every fork beside a thread, from 3.12 on.
FLAGS = ("-X", "dev", "-W", "ignore:This process:DeprecationWarning")

# What asyncio's debug mode, part of the development mode, says on a machine under load.
SLOW = re.compile(r"^Executing <.*> took \d+\.\d+ seconds\n", re.MULTILINE)

# What the resource tracker of newer releases of CPython 3.13 says as a forked child ends: it waits
# for the tracker's process, which is a child of its parent.
TRACKER = re.compile(
    r"^Exception ignored in: <function ResourceTracker.__del__ .*\n"
    r"(?:[ T].*\n)+ChildProcessError: .*\n",
    re.MULTILINE,
)

# The beginning of every program; the rest of it stands below the guard.
PRELUDE = """
import asyncio
import concurrent.futures
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback

faulthandler.register(signal.SIGALRM, chain=True)
os.register_at_fork(after_in_child=lambda: signal.alarm(60))  # in the hooks of unsync

from unsync import Unfuture, unsync

os.register_at_fork(after_in_child=lambda: signal.alarm(0))


@unsync
async def coroutine(x=1):
    await asyncio.sleep(0)
    return x + 1


@unsync
def function(x=1):
    return x + 2


@unsync(cpu_bound=True)
def process(x=1):
    return x + 3


def start(in_child):
    # Forks; the child calls the function and ends with status 0 if nothing was raised.
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        status = 1
        try:
            in_child()
            status = 0
            # os._exit leaves the semaphores of a pool that PyPy has not collected yet.
            gc.collect()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def join(pid):
    assert os.waitpid(pid, 0) == (pid, 0), "a child failed"


def fork(in_child):
    join(start(in_child))


def use_all(processes=False):
    assert coroutine().result(60) == 2
    assert function().result(60) == 3
    assert coroutine().then(lambda unfuture: unfuture.result() + 10).result(60) == 12
    assert function().map(coroutine).result(60) == 4
    assert asyncio.run(wait_for_both()) == [2, 3]
    assert unsync.thread.is_alive()
    if processes:
        assert process().result(60) == 4
        assert process().then(process_outcome).result(60) == 7
        assert unsync.shutdown(60)  # a child that ends with os._exit would leave its pool behind


async def wait_for_both():
    return list(await asyncio.gather(coroutine(), function()))


@unsync(cpu_bound=True)
def process_outcome(unfuture):
    return unfuture.result() + 3


@unsync(cpu_bound=True)
def running_process():
    while not os.path.exists("release"):
        time.sleep(0.001)
    return "parent"


"""


@pytest.fixture
def end(run_python: Run) -> Callable[..., str]:
    """Runs a program that must end with status 0 and nothing on stderr; returns its output.

    Its main part is given without the guard. The functions are those that other processes import.
    """

    def run(main: str, *, functions: str = "", flags: tuple[str, ...] = FLAGS, **env: str) -> str:
        main = f"\nsignal.alarm({ALARM})\n{main}"
        guarded = "\nif __name__ == '__main__':" + textwrap.indent(main, "    ")
        done = run_python(PRELUDE + functions + guarded, *flags, env=env)
        assert TRACKER.sub("", SLOW.sub("", done.stderr)) == ""
        assert done.returncode == 0
        return done.stdout

    return run


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_the_child_works_and_so_does_the_parent(
    used: bool, processes: bool, end: Callable[..., str]
) -> None:
    end(f"""
if {used}:
    use_all({processes})
fork(lambda: use_all({processes}))
use_all({processes})
""")


SINGLE_THREAD = """
from unsync.executors import SingleThreadExecutor

one = SingleThreadExecutor()
never = Unfuture()
begun = threading.Event()


@unsync(executor=one)
def down(depth):
    return 0 if depth == 0 else up(depth - 1).result(60) + 1


@unsync
async def up(depth):
    return await down(depth)


@unsync(executor=one)
def waiting():
    begun.set()
    return never.result(60) + down(3).result(60)


"""


def test_calls_that_nest_in_one_thread_while_one_of_them_waits(end: Callable[..., str]) -> None:
    end(
        """
call = waiting()
assert begun.wait(60)
fork(lambda: [down(5).result(60), join(start(lambda: down(5).result(60)))])
never.set_result(1)
assert call.result(60) == 4
""",
        functions=SINGLE_THREAD,
    )


def test_in_a_call_that_nests_the_child_has_another_thread(end: Callable[..., str]) -> None:
    end(
        """
def child():
    assert [down(5).result(60), up(4).result(60), asyncio.run(in_own_loop())] == [5, 4, 3]

async def in_own_loop():
    return await down(3)

@unsync
async def middle():
    return await one.submit(fork, child)

one.submit(lambda: middle().result(60)).result(60)
assert down(5).result(60) == 5
""",
        functions=SINGLE_THREAD,
    )


def test_a_child_can_fork_in_turn(end: Callable[..., str]) -> None:
    end("""
def child():
    use_all()
    fork(grandchild)
    use_all()

def grandchild():
    use_all()
    fork(use_all)

use_all()
fork(child)
use_all()
""")


def test_from_a_worker_thread(end: Callable[..., str]) -> None:
    end("""
unsync(fork)(use_all).result(60)
use_all()
""")


def test_from_the_ambient_thread(end: Callable[..., str]) -> None:
    end("""
@unsync
async def forker():
    # Not waited for here: that would block the loop.
    return start(use_all)

join(forker().result(60))
use_all()
""")


def test_from_a_foreign_loop(end: Callable[..., str]) -> None:
    end("""
async def main():
    pending = unsync(lambda: released.wait(60))()
    waiting = asyncio.create_task(asyncio.wait_for(pending, 60))
    await asyncio.sleep(0)
    pid = start(use_all)
    released.set()
    await waiting
    join(pid)
    return await coroutine()

released = threading.Event()
assert asyncio.run(main()) == 2
use_all()
""")


# The parent's work, as the child sees it. `release` lets it end in the parent.
PARENTS_WORK = """
begun = threading.Event()
release = threading.Event()


@unsync
async def running_coroutine():
    begun.set()
    while not release.is_set():
        await asyncio.sleep(0.001)
    return "parent"


@unsync
async def blocked_loop():
    begun.set()
    release.wait(60)
    return "parent"


@unsync
def running_function():
    begun.set()
    release.wait(60)
    return "parent"


@unsync
def queued_function():
    return "parent"


async def foreign():
    while not release.is_set():
        await asyncio.sleep(0.001)
    return "parent"


def make_running_coroutine():
    unfuture = running_coroutine()
    begun.wait(60)
    return unfuture


def make_coroutine_in_its_first_step():
    unfuture = blocked_loop()
    begun.wait(60)
    return unfuture


def make_queued_coroutine():
    blocked_loop()
    begun.wait(60)
    return running_coroutine()


def make_running_function():
    unfuture = running_function()
    begun.wait(60)
    return unfuture


def make_queued_function():
    unsync.thread_executor = type(unsync.thread_executor)(1)
    running_function()
    begun.wait(60)
    return queued_function()


def make_running_process():
    return running_process()


def make_continuation():
    return make_running_coroutine().then(lambda unfuture: unfuture.result())


def make_follower():
    return Unfuture(make_running_coroutine())


def make_flattened():
    return Unfuture.from_value(1).then(lambda unfuture: running_coroutine())


def make_of_a_coroutine():
    return Unfuture(foreign())


def make_of_a_concurrent_future():
    return Unfuture(concurrent.futures.ThreadPoolExecutor(1).submit(release.wait, 60)).map(
        lambda value: "parent"
    )


def make_of_an_asyncio_task():
    return Unfuture(asyncio.run_coroutine_threadsafe(foreign(), unsync.loop)).map(str)


def is_orphan(exc):
    return type(exc) is RuntimeError and f"(pid {os.getpid()}) and will never finish" in str(exc)


def let_go():
    release.set()
    open("release", "w").close()


"""

KINDS = [
    "running_coroutine",
    "coroutine_in_its_first_step",
    "queued_coroutine",
    "running_function",
    "queued_function",
    "running_process",
    "continuation",
    "follower",
    "flattened",
    "of_a_coroutine",
    "of_a_concurrent_future",
    "of_an_asyncio_task",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_parents_pending_work_fails_in_the_child_and_ends_in_the_parent(
    kind: str, end: Callable[..., str]
) -> None:
    end(f"""
{PARENTS_WORK}
unfuture = make_{kind}()

def child():
    assert is_orphan(unfuture.exception(60)), unfuture
    assert unfuture.done() and not unfuture.running() and not unfuture.cancelled()

fork(child)
assert not unfuture.done()
let_go()
assert unfuture.result(60) == "parent"
""")


WAYS = {
    "result": """
    try:
        unfuture.result(60)
    except RuntimeError as exc:
        assert is_orphan(exc)
    else:
        raise AssertionError(unfuture)
""",
    "await": """
    async def wait():
        return await asyncio.gather(unfuture, return_exceptions=True)

    (exc,) = asyncio.run(asyncio.wait_for(wait(), 60))
    assert is_orphan(exc), exc
    (exc,) = unsync(wait)().result(60)
    assert is_orphan(exc), exc
""",
    "then": """
    assert is_orphan(unfuture.then(print).exception(60))
    assert is_orphan(unfuture.map(print).exception(60))
""",
    "callback": """
    called = []
    unfuture.add_done_callback(called.append)
    assert called == [unfuture]
    assert is_orphan(unfuture.exception(0))
""",
    "polling": """
    until = time.monotonic() + 60
    while not unfuture.done():
        assert time.monotonic() < until
    assert is_orphan(unfuture.exception(0))
""",
    "running": """
    assert not unfuture.running()
    assert is_orphan(unfuture.exception(0))
""",
    "concurrent_wait": """
    done, not_done = concurrent.futures.wait([unfuture], 60)
    assert done == {unfuture}
    assert is_orphan(unfuture.exception(0))
""",
    "concurrent_as_completed": """
    assert list(concurrent.futures.as_completed([unfuture], 60)) == [unfuture]
    assert is_orphan(unfuture.exception(0))
""",
    "asyncio_wait": """
    async def wait():
        return await asyncio.wait([asyncio.ensure_future(unfuture)], timeout=60)

    done, not_done = asyncio.run(wait())
    assert [is_orphan(each.exception()) for each in done] == [True]
""",
    "cancel": """
    assert not unfuture.cancel()
    assert is_orphan(unfuture.exception(60))
""",
    "set_result": """
    try:
        unfuture.set_result(1)
    except concurrent.futures.InvalidStateError:
        assert is_orphan(unfuture.exception(0))
    else:
        raise AssertionError(unfuture)
""",
    "follower": """
    assert is_orphan(Unfuture(unfuture).exception(60))
""",
}


@pytest.mark.parametrize("kind", ["running_coroutine", "running_function"])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_look_at_the_parents_work_hangs(
    way: str, kind: str, end: Callable[..., str]
) -> None:
    end(f"""
{PARENTS_WORK}
unfuture = make_{kind}()

def child():
{WAYS[way]}

fork(child)
let_go()
assert unfuture.result(60) == "parent"
""")


def test_what_nobody_looks_at_in_the_child_is_not_reported_there(end: Callable[..., str]) -> None:
    end(f"""
{PARENTS_WORK}
unfuture = make_queued_function()

def child():
    global unfuture
    assert unfuture.done()
    del unfuture
    gc.collect()

fork(child)
let_go()
assert unfuture.result(60) == "parent"
""")


STREAMS = """
release = threading.Event()


@unsync(read_ahead=2)
async def async_at_work():
    while not release.is_set():
        await asyncio.sleep(0.001)
    yield from_parent


@unsync(read_ahead=2)
async def async_at_rest():
    for _ in range(9):
        yield from_parent


@unsync(read_ahead=2)
def regular_at_work():
    release.wait(60)
    yield from_parent


@unsync(read_ahead=2)
def regular_at_rest():
    for _ in range(9):
        yield from_parent


@unsync
def called(number):
    release.wait(60)
    return from_parent


def make_stream(kind):
    stream = unsync.map(called, range(3)) if kind == "map" else globals()[kind]()
    while kind.endswith("rest") and not stream._channel.resting:
        time.sleep(0.001)
    return stream


def is_orphan(exc):
    return type(exc) is RuntimeError and f"(pid {os.getpid()}) and will never finish" in str(exc)


async def read(stream):
    return [value async for value in stream]


async def read_in_a_block(stream):
    async with stream:
        return [value async for value in stream]


def read_in_a_thread(stream):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(list, stream).result()


from_parent = f"from {os.getpid()}"
"""

STREAM_KINDS = ["async_at_work", "async_at_rest", "regular_at_work", "regular_at_rest", "map"]


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_a_stream_of_the_parent_fails_in_the_child_and_goes_on_in_the_parent(
    kind: str, end: Callable[..., str]
) -> None:
    end(
        f"""
stream = make_stream({kind!r})

def child():
    try:
        reader(stream)
    except RuntimeError as exc:
        assert is_orphan(exc), exc
    else:
        raise AssertionError(reader)

for reader in [
    list,
    next,
    read_in_a_thread,
    lambda stream: asyncio.run(read(stream)),
    lambda stream: asyncio.run(read_in_a_block(stream)),
    lambda stream: unsync(read)(stream).result(60),
]:
    fork(child)
release.set()
assert {{*stream}} == {{from_parent}}
""",
        functions=STREAMS,
    )


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_a_stream_of_the_parent_is_left_in_the_child_and_goes_on_in_the_parent(
    kind: str, end: Callable[..., str]
) -> None:
    end(
        f"""
stream = make_stream({kind!r})

def child():
    leave(stream)
    assert list(stream) == []
    assert asyncio.run(read(stream)) == []
    use_all()

def child_that_forgets():
    global stream
    del stream
    gc.collect()
    assert threading.active_count() == 1

for leave in [
    lambda stream: stream.close(),
    lambda stream: asyncio.run(stream.aclose()),
    lambda stream: unsync(stream.aclose)().result(60),
    lambda stream: stream.__exit__(None, None, None),
]:
    fork(child)
fork(child_that_forgets)
release.set()
assert {{*stream}} == {{from_parent}}
""",
        functions=STREAMS,
    )


def test_a_block_of_a_stream_in_which_the_program_forks(end: Callable[..., str]) -> None:
    out = end(
        """
with async_at_rest() as stream:
    pid = os.fork()
    if pid:
        join(pid)
        assert next(stream) == from_parent
print("parent" if pid else "child")
""",
        functions=STREAMS,
    )
    assert out.splitlines() == ["child", "parent"]


@pytest.mark.parametrize("kind", ["async_at_work", "regular_at_work", "map"])
def test_a_thread_of_the_parent_that_waits_for_a_stream_holds_up_no_child(
    kind: str, end: Callable[..., str]
) -> None:
    end(
        f"""
stream = make_stream({kind!r})
found = []
reader = threading.Thread(target=lambda: found.extend(stream))
reader.start()
while not stream._channel.waiters:
    time.sleep(0.001)

def child():
    try:
        next(stream)
    except RuntimeError as exc:
        assert is_orphan(exc), exc
    else:
        raise AssertionError(stream)
    stream.close()

fork(child)
release.set()
reader.join(60)
assert {{*found}} == {{from_parent}}
""",
        functions=STREAMS,
    )


def test_a_finished_one_keeps_its_outcome(end: Callable[..., str]) -> None:
    end("""
finished = [coroutine(), function(), process()]
finished.append(finished[0].map(str))
failed = unsync(lambda: 1 // 0)()
cancelled = Unfuture()
cancelled.cancel()
concurrent.futures.wait([*finished, failed], 60)

def look():
    assert [each.result(60) for each in finished] == [2, 3, 4, "2"]
    assert isinstance(failed.exception(60), ZeroDivisionError)
    assert cancelled.cancelled()
    assert finished[0].then(lambda unfuture: unfuture.result()).result(60) == 2

fork(look)
look()
""")


def test_a_plain_one_can_be_set_in_the_child(end: Callable[..., str]) -> None:
    end("""
plain = Unfuture()
waiters = [threading.Thread(target=plain.result) for _ in range(3)]
for waiter in waiters:
    waiter.start()

async def wait():
    return await plain

awaiting = unsync(wait)()

def child():
    assert not plain.done()
    chained = plain.then(lambda unfuture: unfuture.result() + 1)
    plain.set_result(1)
    assert plain.result(60) == 1
    assert chained.result(60) == 2
    assert asyncio.run(wait()) == 1

fork(child)
assert not plain.done()
plain.set_result(5)
assert awaiting.result(60) == 5
for waiter in waiters:
    waiter.join(60)
    assert not waiter.is_alive()
""")


def test_the_parents_work_is_done_once(end: Callable[..., str]) -> None:
    output = end("""
release = threading.Event()

@unsync
async def block():
    release.wait(60)

@unsync
async def log_coroutine():
    os.write(1, b"coroutine\\n")

@unsync
def wait():
    release.wait(60)

@unsync
def log_function():
    os.write(1, b"function\\n")

unsync.thread_executor = type(unsync.thread_executor)(2)
work = [block(), wait(), wait()]
work += [log_coroutine() for _ in range(5)] + [log_function() for _ in range(5)]
work.append(work[0].then(lambda unfuture: os.write(1, b"continuation\\n")))
fork(use_all)
release.set()
for unfuture in work:
    unfuture.result(60)
""")
    assert sorted(output.split()) == ["continuation"] + 5 * ["coroutine"] + 5 * ["function"]


def test_many_forks_under_load(end: Callable[..., str]) -> None:
    end("""
stop = threading.Event()

def load():
    while not stop.is_set():
        calls = [coroutine(number) for number in range(20)]
        calls += [function(number) for number in range(20)]
        calls += [call.then(lambda unfuture: unfuture.result()) for call in calls]
        calls.append(asyncio.run(wait_for_both()) and coroutine())
        for call in calls:
            call.result(60)

def child():
    assert coroutine().result(60) == 2
    assert function().result(60) == 3
    assert coroutine().map(function).result(60) == 4

threads = [threading.Thread(target=load) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for _ in range(15):
        children = [start(child) for _ in range(2)]
        for pid in children:
            join(pid)
finally:
    stop.set()
for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
use_all()
""")


def test_the_child_asks_for_nothing_that_other_threads_may_use(end: Callable[..., str]) -> None:
    # Without the GIL the lock of such a dict may be held in the child for ever.
    end("""
class Modules(dict):
    def get(self, *arguments):
        assert os.getpid() == parent, arguments
        return super().get(*arguments)

use_all()
parent = os.getpid()
sys.modules = Modules(sys.modules)
fork(lambda: None)
""")


def test_forks_while_other_threads_touch_the_settings(end: Callable[..., str]) -> None:
    end("""
stop = threading.Event()

def touch():
    while not stop.is_set():
        unsync.loop, unsync.thread, unsync.thread_executor, unsync.process_executor

def child():
    touched = unsync.loop, unsync.thread, unsync.thread_executor, unsync.process_executor
    assert coroutine().result(60) == 2
    assert unsync.shutdown(60)  # a child that ends with os._exit would leave its pool's semaphores

threads = [threading.Thread(target=touch) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for _ in range(20):
        fork(child)
finally:
    stop.set()
for thread in threads:
    thread.join(60)
""")


@pytest.mark.parametrize(
    ("what", "makes"),
    [
        ("loop", "asyncio.new_event_loop"),
        ("thread_executor", "executors.ThreadExecutor.__init__"),
        ("process_executor", "executors._make_process_pool"),
    ],
)
def test_a_fork_waits_for_a_thread_that_makes(
    end: Callable[..., str], what: str, makes: str
) -> None:
    """Else what that holds, the lock of an import say, would be held in the child for ever."""
    end(f"""
from unsync import executors

holds = threading.Lock()
making, forked = threading.Event(), threading.Event()
make = {makes}

def slowly(*args, **kwargs):
    with holds:
        making.set()
        forked.wait(0.5)  # it is not to be seen: the fork waits
        return make(*args, **kwargs)

def child():
    assert not holds.locked()
    assert coroutine().result(60) == 2
    assert function().result(60) == 3

{makes} = slowly
os.register_at_fork(after_in_parent=forked.set, after_in_child=forked.set)
maker = threading.Thread(target=getattr, args=[unsync, {what!r}])
maker.start()
assert making.wait(60)
fork(child)
maker.join(60)
use_all(processes=True)
""")


def test_settings_hold_in_the_child(end: Callable[..., str]) -> None:
    pytest.importorskip("uvloop")
    end("""
import uvloop

unsync.loop_factory = uvloop.new_event_loop
unsync.thread_executor = type(unsync.thread_executor)(1, "mine")
use_all()
loop = unsync.loop

def child():
    use_all()
    assert unsync.loop is not loop and isinstance(unsync.loop, uvloop.Loop)
    name = unsync(lambda: threading.current_thread().name)().result(60)
    assert name.startswith("mine"), name

fork(child)
use_all()
assert unsync.loop is loop
""")


def test_shutdown_in_the_child_leaves_the_parent_alone(end: Callable[..., str]) -> None:
    end(f"""
{PARENTS_WORK}
unfuture = make_running_coroutine()

def child():
    assert unsync.shutdown(timeout=60)
    use_all()
    assert unsync.shutdown(timeout=60)

fork(child)
let_go()
assert unfuture.result(60) == "parent"
use_all()
""")


# The child's end.


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_a_child_that_ends_as_programs_do_is_quiet(
    used: bool, loop: str, end: Callable[..., str]
) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    output = end(f"""
{PARENTS_WORK}
if {loop!r} == "uvloop":
    import uvloop

    unsync.loop_factory = uvloop.new_event_loop
unfuture = make_running_coroutine()
more = [make_running_function(), unfuture.then(print)]
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    if {used}:
        use_all()
        assert process().result(60) == 4
        pending = running_coroutine()
    print("child")
    sys.exit(3)
assert os.waitpid(pid, 0) == (pid, 3 << 8)
let_go()
assert unfuture.result(60) == more[0].result(60) == "parent"
""")
    assert output.splitlines()[0] == "child"


def test_a_child_that_ends_while_the_parent_has_worker_processes_is_quiet(
    end: Callable[..., str],
) -> None:
    end(f"""
{PARENTS_WORK}
unfuture = running_process()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    assert is_orphan(unfuture.exception(60))
    sys.exit(3)
assert os.waitpid(pid, 0) == (pid, 3 << 8)
let_go()
assert unfuture.result(60) == "parent"
""")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_process_of_multiprocessing(method: str, end: Callable[..., str]) -> None:
    end(
        """
multiprocessing.set_start_method(os.environ["START_METHOD"])
use_all(processes=True)
children = [multiprocessing.Process(target=target) for _ in range(2)]
for child in children:
    child.start()
for child in children:
    child.join(60)
    assert child.exitcode == 0, child
use_all()
""",
        functions="""
def target():
    use_all()
    assert process().result(60) == 4  # its pool is left to the end of the process
    global pending
    pending = unsync(asyncio.sleep)(3600)
""",
        START_METHOD=method,
    )


def test_threads_of_a_child_look_at_a_pending_one_at_once(end: Callable[..., str]) -> None:
    # The fallback is stopped at each of its lines; the compiled core has no lines to stop at.
    end("""
LINES = 12
pending = [Unfuture() for _ in range(LINES)]
for unfuture in pending:
    unfuture.set_running_or_notify_cancel()

def child():
    for k, unfuture in enumerate(pending):
        called = threading.Event()
        other = threading.Thread(target=unfuture.add_done_callback, args=[lambda _: called.set()])
        lines = iter(range(LINES))

        def trace(frame, event, argument):
            if frame.f_code.co_name == "_check_fork":
                if event == "line" and next(lines, None) == k:
                    other.start()
                    other.join(0.1)
                return trace

        sys.settrace(trace)
        assert unfuture.done()
        sys.settrace(None)
        if other.ident is None:
            other.start()
        assert called.wait(60), f"the callback was lost at line {k}"

fork(child)
""")


@pytest.mark.skipif(WITH_GIL, reason="with it they take turns")
def test_two_threads_of_a_child_look_at_many_at_once(end: Callable[..., str]) -> None:
    """Where no trace function can stop one between two steps. What is lost is lost by chance."""
    end(
        """
def child():
    places, late = [-1, -1], []

    def add(this, other):
        for number, (unfuture, called) in enumerate(zip(pending, told)):
            add, callback = unfuture.add_done_callback, called.append
            places[this] = number
            while places[other] < number and not late:
                pass
            add(callback)

    timer = threading.Timer(2, late.append, [True])  # on a busy machine it sees less
    timer.start()
    threads = [threading.Thread(target=add, args=each) for each in ((0, 1), (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    timer.cancel()
    lost = [called for called in told if len(called) < 2]
    assert not lost, f"{len(lost)} callbacks were lost"

pending = [Unfuture() for _ in range(50_000)]
for unfuture in pending:
    unfuture.set_running_or_notify_cancel()
told = [[] for _ in pending]
fork(child)
""",
        flags=FLAGS[2:],  # the development mode would have them meet more rarely
    )


@pytest.mark.skipif(WITH_GIL or CORE == "pure", reason="there each object has such a lock")
def test_what_another_thread_had_locked_is_not_locked_in_the_child(end: Callable[..., str]) -> None:
    end("""
import contextlib
import ctypes

WAYS = [
    lambda unfuture: asyncio.run(asyncio.wait_for(unfuture, 0)),
    lambda unfuture: concurrent.futures.wait([unfuture], 0),
    lambda unfuture: unfuture.concurrent_future.result(0),
    lambda unfuture: unfuture.remove_done_callback(print),
    lambda unfuture: unfuture.result(0),
    lambda unfuture: unfuture.set_exception(ValueError()),
    lambda unfuture: unfuture.set_result(1),
    lambda unfuture: unfuture.then(str),
    Unfuture,
    Unfuture.add_done_callback,
    Unfuture.cancel,
    Unfuture.cancelled,
    Unfuture.done,
    Unfuture.running,
    Unfuture.set_running_or_notify_cancel,
    Unfuture._behind,
    Unfuture._state.__get__,
    repr,
]

def child():
    for way, *unfutures in zip(WAYS, plain, calls):
        for unfuture in unfutures:
            with contextlib.suppress(Exception):
                kept.append(way(unfuture))  # else it would be reported
    assert function().result(60) == 3

use_all()
kept = []
sleep = unsync(asyncio.sleep)
plain = [Unfuture() for _ in WAYS]
calls = [sleep(3600) for _ in WAYS]
assert sleep(0).result(60) is None
mailbox = sys.modules["unsync.unsync"]._ambient.mailbox
# The ob_mutex of each. Nobody does anything with them, so it is as if somebody held it.
locks = [
    ctypes.c_uint8.from_address(id(each) + ctypes.sizeof(ctypes.c_void_p) + 2)
    for each in [*plain, *calls, unsync.thread_executor.jobs, mailbox, mailbox.live]
]
assert [lock.value for lock in locks] == [0] * len(locks)
for lock in locks:
    lock.value = 1
pid = start(child)
for lock in locks:
    lock.value = 0
join(pid)
""")


# An executor that a callable gives.

GIVEN = """
import concurrent.futures
import multiprocessing
import os
import threading

from unsync import unsync

begun, go_on = threading.Event(), threading.Event()
giver = os.getpid()
made = []


def give():
    if os.getpid() == giver and {is_busy}:
        begun.set()
        assert go_on.wait(60)
    made.append({give})
    return made[-1]


@unsync{options}
def where():
    return os.getpid()


if __name__ == "__main__":
    {setting}
    calls = []
    first = threading.Thread(target=lambda: calls.append(where()))
    first.start()
    if {is_busy}:
        assert begun.wait(60)
    else:
        first.join(60)
        assert calls[0].result(60)
    pid = os.fork()
    if not pid:
        found = where().result(60)
        assert ({is_process} and found not in (giver, os.getpid())) or found == os.getpid(), found
        made[-1].shutdown()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    go_on.set()
    first.join(60)
    assert calls[0].result(60) != pid
"""


@pytest.mark.parametrize("is_busy", [True, False], ids=["while it is made", "afterwards"])
@pytest.mark.parametrize("place", ["executor=", "thread_executor", "process_executor"])
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_child_is_given_an_executor_of_its_own_and_nothing_hangs(
    run_python: Run, place: str, is_busy: bool, kind: str
) -> None:
    program = GIVEN.format(
        is_busy=is_busy,
        is_process=kind == "processes",
        give={
            "threads": "concurrent.futures.ThreadPoolExecutor(1)",
            # A fork server is not at the disposal of children that os.fork makes.
            "processes": "concurrent.futures.ProcessPoolExecutor("
            "1, mp_context=multiprocessing.get_context('fork'))",
        }[kind],
        options={
            "executor=": "(executor=give)",
            "thread_executor": "",
            "process_executor": "(cpu_bound=True)",
        }[place],
        setting="pass" if place == "executor=" else f"unsync.{place} = give",
    )
    done = run_python(program, "-W", "ignore:This process:DeprecationWarning")
    assert done.stderr == ""
    assert done.returncode == 0


def test_a_view_that_was_taken_before_fails_in_the_child_too(end: Callable[..., str]) -> None:
    end("""
sleep = unsync(asyncio.sleep)
calls = [sleep(3600) for _ in range(5)]
by_hand = Unfuture()
waited, completed, polled, awaited, locked = views = [call.concurrent_future for call in calls]
of_by_hand, told = by_hand.concurrent_future, []
of_by_hand.add_done_callback(told.append)

def is_orphan(failure):
    return type(failure) is RuntimeError and "forked" in str(failure)

async def wait_for_it():
    try:
        await asyncio.wait_for(asyncio.wrap_future(awaited), 60)
    except RuntimeError as exc:
        assert is_orphan(exc)
    else:
        raise AssertionError(awaited)

def child():
    assert concurrent.futures.wait([waited], 60).done == {waited}
    assert list(concurrent.futures.as_completed([completed], 60)) == [completed]
    until = time.monotonic() + 60
    while not polled.done():
        assert time.monotonic() < until
    asyncio.run(wait_for_it())
    assert concurrent.futures.wait([locked], 60).done == {locked}
    assert all(is_orphan(view.exception(0)) for view in views)
    called = []
    waited.add_done_callback(called.append)
    assert called == [waited]
    # Nothing of the parent's is behind this one.
    assert not of_by_hand.done()
    by_hand.set_result(1)
    assert told == [of_by_hand]
    assert concurrent.futures.wait([of_by_hand], 60).done == {of_by_hand}

has_locked, may_let_go = threading.Event(), threading.Event()

def lock():
    with locked._condition:
        has_locked.set()
        may_let_go.wait(60)

thread = threading.Thread(target=lock)
thread.start()
has_locked.wait(60)
fork(child)
may_let_go.set()
thread.join()
assert not any(view.done() for view in (*views, of_by_hand))
by_hand.set_result(2)
assert told == [of_by_hand]
for call in calls:
    call.cancel()
assert concurrent.futures.wait(views, 60).done == set(views)
""")
