"""The end of the interpreter: prompt, quiet, with the right status, whatever still runs.

Every program runs in Python's development mode, which reports what was left open or unfinished.
That a program ends at all, and no process of its pools lives on with its output, is shown by
`run_python`, which waits a bounded time for both.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.waiting import PATIENCE

# Those that the default pool uses; the quickest first.
START_METHODS = sorted(set(multiprocessing.get_all_start_methods()) - {"fork"})

Run = Callable[..., "subprocess.CompletedProcess[str]"]

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# Python's own word on every fork beside a thread, from 3.12 on.
FLAGS = ("-X", "dev", "-W", "ignore:This process:DeprecationWarning")

# What is said on a machine under load, by asyncio's debug mode, part of the development mode, and
# by an exit that waits for over two seconds.
NOISE = re.compile(
    r"^(Executing <.*> took \d+\.\d+ seconds|unsync: the exit waits for .*)\n", re.MULTILINE
)


@pytest.fixture
def end(run_python: Run) -> Callable[..., str]:
    """Runs a program that must end with status 0 and nothing on stderr; returns its output."""

    def run(program: str, **env: str) -> str:
        done = run_python(program, *FLAGS, env=env)
        assert NOISE.sub("", done.stderr) == ""
        assert done.returncode == 0
        return done.stdout

    return run


# One program after the other: what it does beyond the beginning, and what it prints.

BEGINNING = """
import asyncio
import atexit
import sys
import threading
import time
from pathlib import Path

from unsync import unsync

begun = threading.Event()


@unsync
async def hour():
    begun.set()
    await asyncio.sleep(3600)


@unsync
def sleep():
    begun.set()
    time.sleep(3600)


def wait_for_file(name):
    until = time.monotonic() + 60
    while not Path(name).exists():
        assert time.monotonic() < until
        time.sleep(0.001)


"""

# Nothing is waited for.
AT_ONCE = "unsync.exit_timeout = 0\n"

PROGRAMS = {
    # Nothing to do, or nothing left to do.
    "untouched": ("pass", ""),
    "loop": ("unsync.loop", ""),
    "thread": ("unsync.thread", ""),
    "thread_executor": ("unsync.thread_executor", ""),
    "process_executor": ("unsync.process_executor", ""),
    "all settings": ("unsync.loop, unsync.thread_executor, unsync.process_executor", ""),
    "shutdown": ("unsync.shutdown()", ""),
    "a loop after a shutdown": ("unsync.loop; unsync.shutdown(); unsync.loop", ""),
    "a loop of its own": ("asyncio.run(asyncio.sleep(0))", ""),
    "work of every kind": (
        """
@unsync
async def coroutine():
    await asyncio.sleep(0)
    return 1

@unsync
def function():
    return 2

@unsync(cpu_bound=True)
def process():
    return 3

if __name__ == "__main__":
    print(coroutine().result(60), function().result(60), process().result(60))
    print(coroutine().then(lambda unfuture: function()).result(60))
""",
        "1 2 3\n2\n",
    ),
    "calls that nest in one thread": (
        """
from unsync.executors import SingleThreadExecutor

one = SingleThreadExecutor()

@unsync(executor=one)
def outer():
    nested = between()  # which starts the ambient loop, where the main program has not ended yet
    begun.set()
    print(nested.result(60))

@unsync
async def between():
    await asyncio.sleep(0.1)
    return await inner()

@unsync(executor=one)
def inner():
    return "nested"

outer()
one.submit(print, "queued")
assert begun.wait(60)
""",
        "nested\nqueued\n",
    ),
    "signal handlers of the ambient loop": (
        """
import signal, sys

if sys.platform == "win32":
    print("heard")
else:
    unsync.loop.add_signal_handler(signal.SIGTERM, begun.set)
    signal.raise_signal(signal.SIGTERM)
    assert begun.wait(60)
    print("heard")
""",
        "heard\n",
    ),
    # Coroutines.
    "a pending coroutine is cancelled": (
        """
@unsync
async def tidy():
    begun.set()
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0.01)
        print("cleaned up")

unfuture = tidy()
unfuture.add_done_callback(lambda unfuture: print("cancelled:", unfuture.cancelled()))
chained = unfuture.then(print)
assert begun.wait(60)
""",
        "cleaned up\ncancelled: True\n",
    ),
    "an asynchronous generator is closed": (
        """
async def numbers():
    try:
        yield 1
        yield 2
    finally:
        print("closed")

@unsync
async def first():
    global kept
    kept = numbers()
    return await anext(kept)

print(first().result(60))
""",
        "1\nclosed\n",
    ),
    "a coroutine that calls functions while it cleans up": (
        """
@unsync
async def tidy():
    begun.set()
    try:
        await asyncio.sleep(3600)
    finally:
        for number in range(3):
            await save(number)
        save("the last")

@unsync
def save(what):
    time.sleep(0.01)
    print("saved", what)

save("the first").result(60)  # 3.12 and later start no thread at the end
tidy()
assert begun.wait(60)
""",
        "saved the first\nsaved 0\nsaved 1\nsaved 2\nsaved the last\n",
    ),
    # Threads.
    "functions that were accepted are finished": (
        """
@unsync
def save(number):
    time.sleep(0.01)
    done.append(number)

done = []
unsync.thread_executor = type(unsync.thread_executor)(max_workers=2)
for number in range(24):
    save(number)
atexit.register(lambda: print(len(done)))
""",
        "24\n",
    ),
    "and what they call in turn, and their continuations": (
        """
@unsync
def fetch(depth):
    time.sleep(0.01)
    return fetch_later(depth - 1).result() if depth else "fetched"

@unsync
async def fetch_later(depth):
    await asyncio.sleep(0.01)
    return await fetch(depth)

@unsync
def save(what):
    time.sleep(0.01)
    print("saved", what)

fetch(3).map(save)
fetch(0).then(lambda unfuture: save(unfuture.result()).map(lambda _: print("the end")))
""",
        "saved fetched\nthe end\nsaved fetched\n",
    ),
    "not what coroutines go on calling": (
        """
@unsync
async def heartbeat():
    while True:
        await beat()

@unsync
def beat():
    begun.set()
    time.sleep(0.001)

heartbeat()
assert begun.wait(60)
""",
        "",
    ),
    "streams are closed": (
        """
@unsync
def in_threads():
    try:
        while True:
            yield 1
    finally:
        print("closed in a thread")

@unsync
async def in_loop():
    try:
        while True:
            yield 1
    finally:
        print("closed in the loop")

streams = [in_loop(), in_threads()]
for stream in streams:
    next(stream)
""",
        "closed in the loop\nclosed in a thread\n",
    ),
    "what threads of the program call": (
        """
def go_on():
    threading.main_thread().join()
    for number in range(3):
        save(number).then(lambda _: save("then"))

@unsync
def save(what):
    time.sleep(0.01)
    done.append(what)

done = []
save("first").result(60)
unsync.loop
threading.Thread(target=go_on).start()
atexit.register(lambda: print(unsync.drain(), len(done)))
""",
        "True 7\n",
    ),
    # Processes.
    "functions in processes are finished": (
        """
@unsync(cpu_bound=True)
def save(number):
    time.sleep(0.01)
    Path(f"saved {number}").touch()

if __name__ == "__main__":
    for number in range(9):
        save(number).map(lambda _: unsync(sys.stdout.write)("saved\\n"))
""",
        9 * "saved\n",
    ),
    "functions in executors of others are finished": (
        """
from concurrent.futures import ThreadPoolExecutor

def save(number):
    time.sleep(0.01)
    return unsync(sys.stdout.write)("saved\\n")

executor = ThreadPoolExecutor(2)
for unfuture in unsync.calls(unsync(save, executor=executor), range(9)):
    unfuture.map(lambda unfuture: unfuture)
""",
        9 * "saved\n",
    ),
}

# What does not end by itself: what is printed, and what is told.
LOST = {
    "a coroutine that ignores its cancellation": (
        """
unsync.exit_timeout = 0.1

@unsync
async def stubborn():
    while True:
        try:
            begun.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            print("no")

unfuture = stubborn()
assert begun.wait(60)
""",
        "no\n",
        "1 call of stubborn()",
    ),
    "a coroutine that blocks the loop, and what waits for it": (
        f"""
{AT_ONCE}
@unsync
async def block():
    begun.set()
    time.sleep(3600)

@unsync
async def behind():
    print("must not run")

blocking = block()
assert begun.wait(60)
waiting = [behind() for _ in range(3)]
chained = waiting[0].then(print)
""",
        "",
        "1 call of block()",
    ),
    "functions that sleep or wait": (
        f"""
{AT_ONCE}
@unsync
def wait():
    waits.set()
    threading.Event().wait()

waits = threading.Event()
running = [sleep(), sleep(), wait()]
assert begun.wait(60)
assert waits.wait(60)
""",
        "",
        "3 calls, 2 of sleep(), 1 of wait()",
    ),
    "functions that have not begun": (
        f"""
{AT_ONCE}
@unsync
def queued():
    print("must not run")

unsync.thread_executor = type(unsync.thread_executor)(max_workers=1)
running = sleep()
assert begun.wait(60)
waiting = [queued() for _ in range(3)]
for unfuture in waiting:
    unfuture.add_done_callback(lambda unfuture: print("cancelled:", unfuture.cancelled()))
""",
        3 * "cancelled: True\n",
        "4 calls, 3 of queued(), 1 of sleep()",
    ),
    "a function that waits for a coroutine": (
        f"""
{AT_ONCE}
@unsync
def wait():
    return hour().result()

wait()
assert begun.wait(60)
""",
        "",
        "1 call of wait()",
    ),
    "functions of many names": (
        f"""
{AT_ONCE}
unsync.thread_executor = type(unsync.thread_executor)(max_workers=10)
running = []
for number in range(7):
    def wait():
        threading.Event().wait()
    wait.__qualname__ = f"wait_{{number}}"
    running += [unsync(wait)() for _ in range(8 - number)]
""",
        "",
        "35 calls, 8 of wait_0(), 7 of wait_1(), 6 of wait_2(), 5 of wait_3(), 4 of wait_4(), "
        "5 of others",
    ),
    "processes": (
        f"""
{AT_ONCE}
@unsync(cpu_bound=True)
def sleep_in_process():
    Path("begun").touch()
    time.sleep(600)

if __name__ == "__main__":
    running = sleep_in_process()
    wait_for_file("begun")
""",
        "",
        "1 call of sleep_in_process()",
    ),
    "a coroutine that waits for other work": (
        f"""
{AT_ONCE}
@unsync(cpu_bound=True)
def sleep_in_process():
    Path("begun").touch()
    time.sleep(600)

@unsync
async def wait_for_all():
    work = [sleep(), sleep_in_process()]
    await asyncio.gather(*work)

if __name__ == "__main__":
    wait_for_all()
    wait_for_file("begun")
""",
        "",
        "2 calls, 1 of sleep(), 1 of sleep_in_process()",
    ),
    "calls that nest in one thread": (
        f"""
{AT_ONCE}
from unsync.executors import SingleThreadExecutor

one = SingleThreadExecutor()

@unsync(executor=one)
def down(depth):
    return between(depth - 1).result() if depth else sleep.__wrapped__()

@unsync
async def between(depth):
    return await down(depth)

down(2)
assert begun.wait(60)
""",
        "",
        "3 calls of down()",
    ),
}


@pytest.mark.parametrize("program", LOST)
def test_what_is_lost_is_told(program: str, run_python: Run) -> None:
    text, output, lost = LOST[program]
    done = run_python(BEGINNING + text, *FLAGS)
    assert done.stdout == output
    assert NOISE.sub("", done.stderr) == f"unsync: the exit lost {lost}\n"
    assert done.returncode == 0


# Where the end needs a thread that the program had no need of before.
STARTS_THREADS = {
    "and what they call in turn, and their continuations",
    "functions in processes are finished",
    "functions in executors of others are finished",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_end_of(program: str, end: Callable[..., str]) -> None:
    if (3, 12) <= sys.version_info < (3, 12, 2) and program in STARTS_THREADS:
        pytest.skip("this Python starts no thread once the main program has ended")
    text, output = PROGRAMS[program]
    assert end(BEGINNING + text) == output


def test_context_managers_are_left_whose_bodies_do_not_end(end: Callable[..., str]) -> None:
    program = """
import contextlib

@unsync
@contextlib.asynccontextmanager
async def resource(name):
    try:
        yield name
    finally:
        await asyncio.sleep(0.01)
        print(name)

def use():
    with resource("in a daemonic thread"):
        begun.set()
        time.sleep(3600)

async def use_in_loop():
    await resource("in a loop that stopped").__aenter__()

kept = resource("by hand")
kept.__enter__()
loop = asyncio.new_event_loop()
loop.run_until_complete(use_in_loop())
atexit.register(loop.close)
threading.Thread(target=use, daemon=True).start()
assert begun.wait(60)
"""
    output = end(BEGINNING + program)
    assert sorted(output.splitlines()) == [
        "by hand",
        "in a daemonic thread",
        "in a loop that stopped",
    ]


def test_who_waits_for_what_is_lost_is_told(run_python: Run) -> None:
    """Else Python would wait for that thread for ever."""
    program = """
unsync.exit_timeout = 0.1

def wait():
    try:
        sleep().result()
    except asyncio.CancelledError as exc:
        print(exc)

threading.Thread(target=wait).start()
assert begun.wait(60)
"""
    done = run_python(BEGINNING + program)
    assert (done.stdout, done.stderr) == (
        "the interpreter exits\n",
        "unsync: the exit lost 1 call of sleep()\n",
    )


SLOW = f"""
{BEGINNING}
import signal

# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)


at_work = threading.Event()


@unsync
async def tidy():
    at_work.set()
    try:
        await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0.01)
        print("cleaned up")


@unsync
def queued():
    print("must not run")


unsync.thread_executor = type(unsync.thread_executor)(max_workers=1)
tidy()
running = sleep()
waiting = [queued() for _ in range(3)]
assert begun.wait(60) and at_work.wait(60)
"""

WAITS = "unsync: the exit waits for 4 calls, 3 of queued(), 1 of sleep() (Ctrl-C ends the wait)\n"
LOSES = "unsync: the exit lost 4 calls, 3 of queued(), 1 of sleep()\n"


@posix_only
def test_it_says_what_it_waits_for_and_ends_on_ctrl_c() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == WAITS
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("cleaned up\n", LOSES, 0)


@posix_only
def test_a_ctrl_c_before_it_has_said_so() -> None:
    program = f"""
{SLOW}
def interrupt():
    drains = unsync_package._drain._watcher._drains
    while not drains or drains[0]._is_looking:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

import os
import unsync as unsync_package
threading.Thread(target=interrupt, daemon=True).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, NOISE.sub("", done.stderr)) == ("cleaned up\n", LOSES)
    assert done.returncode == 0


def test_the_bound_holds_for_all_of_it_and_is_told(run_python: Run) -> None:
    done = run_python(SLOW + "unsync.exit_timeout = 2.5\n")
    told = WAITS.replace(")\n", ", and so does unsync.exit_timeout)\n")
    # Half a second after it is told the time is up: a machine under load may come too late for it.
    assert done.stderr in (told + LOSES, LOSES)
    assert (done.stdout, done.returncode) == ("cleaned up\n", 0)


def test_when_it_was_imported_in_a_thread(end: Callable[..., str]) -> None:
    program = """
    import threading

    def work():
        import asyncio
        from unsync import unsync

        @unsync
        async def hour():
            await asyncio.sleep(3600)

        pending.append(hour())
        print(unsync(lambda: 2)().result(60))

    pending = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    """
    assert end(program) == "2\n"


# The processes of a pool.

LONG_WORK = """
import multiprocessing
import os
import time
from pathlib import Path

from unsync import unsync


@unsync(cpu_bound=True)
def sleep(name):
    Path(name).write_text(str(os.getpid()))
    # Not an hour: should it be left behind, it must not live that long.
    time.sleep(600)


def began(name):
    return Path(name).exists() and Path(name).read_text()


if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ["START_METHOD"])
    unsync.exit_timeout = 0
    work = [sleep(f"begun{{number}}") for number in range(9)]
    {chain}
    until = time.monotonic() + 60
    while not began("begun0"):
        assert time.monotonic() < until
        time.sleep(0.001)
    print(*[child.pid for child in multiprocessing.active_children()])
"""


def run_long_work(run_python: Run, method: str, begin: str = "", chain: str = "") -> str:
    """Whose processes are gone when it has ended; gives the rest of what it printed."""
    program = begin + LONG_WORK.format(chain=chain)
    done = run_python(program, *FLAGS, env={"START_METHOD": method})
    assert re.fullmatch(r"unsync: the exit lost .*9 .*of sleep\(\).*\n", NOISE.sub("", done.stderr))
    assert done.returncode == 0
    pids, rest = re.fullmatch(r"([\d ]+)\n(.*)", done.stdout, re.DOTALL).groups()  # type: ignore[union-attr]
    for pid in pids.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    return rest


@pytest.mark.parametrize("method", START_METHODS)
def test_running_and_queued_process_work_ends_with_its_processes(
    method: str, run_python: Run
) -> None:
    assert run_long_work(run_python, method) == ""


def test_queued_process_work_is_cancelled(run_python: Run) -> None:
    chain = "work[-1].add_done_callback(lambda unfuture: print(unfuture.cancelled()))"
    assert run_long_work(run_python, START_METHODS[0], chain=chain) == "True\n"


def test_process_work_that_others_go_on_from_is_no_news(run_python: Run) -> None:
    chain = "chained = [each.then(print) for each in work]"
    assert run_long_work(run_python, START_METHODS[0], chain=chain) == ""


def test_workers_that_handle_the_signal_end_too(run_python: Run) -> None:
    """A program that handles SIGTERM when it is imported has workers that handle it as well."""
    handler = "import signal; signal.signal(signal.SIGTERM, lambda *args: None)\n"
    assert run_long_work(run_python, START_METHODS[0], begin=handler) == ""


def test_workers_whose_manager_has_failed_end_too(run_python: Run) -> None:
    """Else multiprocessing would wait for them."""
    done = run_python("""
        import time
        from concurrent.futures import process

        from unsync import unsync

        def fail(manager, cause):
            raise SystemExit

        @unsync(cpu_bound=True)
        def sleep():
            time.sleep(600)

        if __name__ == "__main__":
            process._ExecutorManagerThread.terminate_broken = fail
            unsync.process_executor._max_workers = 2
            calls = [sleep(), sleep()]
            manager = unsync.process_executor._executor_manager_thread
            # Of the second one's death the manager need not hear at once.
            next(iter(unsync.process_executor._processes.values())).kill()
            manager.join(60)
            assert not manager.is_alive()
            unsync.exit_timeout = 0
    """)
    assert (done.stderr, done.returncode) == ("unsync: the exit lost 2 calls of sleep()\n", 0)


LEFT_STREAM = """
import sys
import time
from pathlib import Path

from unsync import unsync


@unsync(cpu_bound=True)
def hold(name):
    Path(name).touch()
    # Not for ever: should it be left behind, it must not live that long.
    time.sleep(0 if name == "first" else 600)


if __name__ == "__main__":
    import signal

    # What a shell starts in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with unsync.map(hold, NAMES, chunksize=SIZE) as stream:
        next(iter(stream))
        until = time.monotonic() + 60
        while not Path("second").exists():
            assert time.monotonic() < until
            time.sleep(0.001)
"""


@posix_only
@pytest.mark.parametrize(
    ("names", "size", "lost"),
    [('["first", "second"]', 1, "1 call"), ('["first"] * 5 + ["second"] * 5', 5, "5 calls")],
)
def test_it_counts_the_calls_in_the_chunks_of_a_stream_that_was_left(
    tmp_path: Path, names: str, size: int, lost: str
) -> None:
    program = LEFT_STREAM.replace("NAMES", names).replace("SIZE", str(size))
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen(
        [sys.executable, "program.py"], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        waits = f"unsync: the exit waits for {lost} of hold() (Ctrl-C ends the wait)\n"
        assert process.stderr.readline() == waits
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert (errors, process.returncode) == (f"unsync: the exit lost {lost} of hold()\n", 0)


INTERRUPTED = """
import os
import signal
import sys
import time
from pathlib import Path

from unsync import unsync

# What a shell starts in the background ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@unsync(cpu_bound=True)
def sleep():
    Path("begun").write_text(str(os.getpid()))
    # Not for ever: should it be left behind, it must not live that long.
    time.sleep(600)


if __name__ == "__main__":
    import multiprocessing

    multiprocessing.set_start_method(sys.argv[1])
    calls = [sleep()]
    until = time.monotonic() + 60
    while not Path("begun").exists():
        assert time.monotonic() < until
        time.sleep(0.001)
    try:
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@posix_only
@pytest.mark.parametrize("method", START_METHODS)
def test_a_ctrl_c_ends_no_worker_and_one_at_the_exit_ends_all(method: str, tmp_path: Path) -> None:
    """As a terminal sends it: to all processes."""
    (tmp_path / "program.py").write_text(INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, "program.py", method],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            pids = process.stdout.readline().split()
            os.killpg(process.pid, signal.SIGINT)
            waits = "unsync: the exit waits for 1 call of sleep() (Ctrl-C ends the wait)\n"
            assert process.stderr.readline() == waits
            os.killpg(process.pid, signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (output, errors) == ("interrupted\n", "unsync: the exit lost 1 call of sleep()\n")
    assert process.returncode == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


# Calls made at the last moment.


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
def test_calls_made_just_before_it(keep: bool, end: Callable[..., str]) -> None:
    program = f"""
    import asyncio
    from unsync import unsync

    @unsync
    async def coroutine(number):
        await asyncio.sleep(number % 3)

    @unsync
    def function(number):
        return number

    @unsync(cpu_bound=True)
    def process(number):
        return number

    if __name__ == "__main__":
        kept = []
        for number in range(100):
            for call in coroutine, function, process:
                unfuture = call(number)
                if {keep}:
                    kept.append(unfuture.then(lambda source: None))
        del unfuture
    """
    assert end(program) == ""


CALLS = """
import asyncio

from unsync import unsync


@unsync
async def coroutine():
    await asyncio.sleep(0)
    return "coroutine"


@unsync
def function():
    return "function"


@unsync(cpu_bound=True)
def process():
    return "process"


def call_all():
    for call in coroutine, function, process:
        try:
            print(call().result(60))
        except RuntimeError as exc:
            print(call.__name__, "RuntimeError", exc)


"""

# What Python itself, the executors and this package say once it is too late.
TOO_LATE = re.compile(
    r"(coroutine|function|process) RuntimeError "
    r"(can't (start|create) new thread at interpreter shutdown"
    r"|cannot schedule new futures after (interpreter )?shutdown)"
)


def assert_works_or_says_so(output: str, *must_work: str) -> None:
    lines = output.splitlines()
    assert len(lines) == 3, output
    for name, line in zip(("coroutine", "function", "process"), lines, strict=True):
        if name in must_work:
            assert line == name
        else:
            assert line == name or TOO_LATE.fullmatch(line), output


# Both must work, unless the first call comes when Python starts no threads any more.
AFTER_MAIN = ("coroutine", "function") if sys.version_info < (3, 12) else ()

# The beginning, the main part, and what must work.
LAST_CALLS = {
    "in a user's thread that goes on after main": (
        "",
        """
    import threading

    def go_on():
        threading.main_thread().join()
        call_all()

    coroutine().result(60)
    function().result(60)
    threading.Thread(target=go_on).start()
""",
        ("coroutine", "function"),
    ),
    "the first ones, in such a thread": (
        "",
        """
    import threading

    def go_on():
        threading.main_thread().join()
        call_all()

    threading.Thread(target=go_on).start()
""",
        AFTER_MAIN,
    ),
    "in an exit handler": (
        "",
        """
    import atexit

    coroutine().result(60)
    function().result(60)
    atexit.register(call_all)
""",
        ("coroutine", "function"),
    ),
    # Handlers run last in, first out: one registered before the import comes too late.
    "in an exit handler that comes after ours": (
        "import atexit\natexit.register(lambda: call_all())\n",
        """
    coroutine().result(60)
    function().result(60)
""",
        (),
    ),
    "the first ones, in such a handler": (
        "import atexit\natexit.register(lambda: call_all())\n",
        "    pass\n",
        (),
    ),
}


@pytest.mark.parametrize("where", LAST_CALLS)
def test_calls_made_late_work_or_say_that_they_come_too_late(
    where: str, end: Callable[..., str]
) -> None:
    before, main, must_work = LAST_CALLS[where]
    output = end(f'{before}{CALLS}if __name__ == "__main__":\n{main}')
    assert_works_or_says_so(output, *must_work)


# The status.


PENDING = """
import asyncio
import sys
import threading
import time

from unsync import unsync


@unsync
async def hour():
    begun.set()
    await asyncio.sleep(3600)


begun = threading.Event()
pending = hour()
assert begun.wait(60)
"""


# Ways to end while a coroutine is pending: the status, and what stands on stderr, whole.
ENDS = {
    "sys.exit": ("sys.exit(3)", 3, ""),
    "an exception": (
        "raise ValueError('mine')",
        1,
        r"Traceback \(most recent call last\):\n  File .*\n    raise .*\n(    .*\n)?"
        r"ValueError: mine\n",
    ),
    "a failure raised by result": (
        "unsync(lambda: 1 // 0)().result(60)",
        1,
        r"Traceback (?s:(?!Traceback).)* by zero\n",
    ),
    "Ctrl-C in result": (
        "import os, signal\n"
        # A shell's background jobs inherit that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "unsync(lambda: (time.sleep(0.1), os.kill(os.getpid(), signal.SIGINT)))()\n"
        "pending.result(60)\n",
        -signal.SIGINT,
        r"Traceback (?s:(?!Traceback).)*KeyboardInterrupt\n",
    ),
    "SIGTERM": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(3600)",
        -signal.SIGTERM,
        "",
    ),
}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=posix_only) if how in {"Ctrl-C in result", "SIGTERM"} else how
        for how in ENDS
    ],
)
def test_the_status_and_what_is_said_are_the_programs_own(how: str, run_python: Run) -> None:
    program, status, said = ENDS[how]
    done = run_python(PENDING + program, *FLAGS)
    assert done.returncode == status
    assert re.fullmatch(said, NOISE.sub("", done.stderr)), done.stderr


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="no finalizers run at exit")
def test_a_coroutine_that_fails_when_it_is_cancelled_is_reported_once(run_python: Run) -> None:
    program = """
    import asyncio
    import threading
    from unsync import unsync

    @unsync
    async def clumsy():
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            raise ValueError("mine")

    begun = threading.Event()
    clumsy()
    assert begun.wait(60)
    """
    done = run_python(program, *FLAGS)
    assert done.returncode == 0
    assert done.stderr.count("Unfuture exception was never retrieved") == 1
    assert done.stderr.count("ValueError: mine\n") == 1


STRUCK = """
import os
import signal
import sys
import threading

from unsync import unsync

gate = threading.Event()
own = tuple(os.path.join("unsync", name) for name in ("_drain.py", "_exit.py"))
left = {step}


@unsync
def wait():
    gate.wait({patience})


def strike(frame, event, arg):
    global left
    if frame.f_code.co_filename.endswith(own):
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return strike


calls = [wait() for _ in range(40)]
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.settrace(strike)
"""


@pytest.mark.parametrize("step", [1, 2, 5, 10, 20, 50, 100, 200])
def test_a_ctrl_c_at_any_step_of_the_exit_ends_its_wait(run_python: Run, step: int) -> None:
    done = run_python(STRUCK.format(step=step, patience=PATIENCE))
    assert re.fullmatch(r"unsync: the exit lost \d+ calls of wait\(\)\n", done.stderr), done.stderr


# Failures that nobody looked at.

FAILS = """
from unsync import unsync


@unsync
def load(number):
    raise OSError(f"server {number} is down")


@unsync
def store(number):
    raise ValueError(f"no room for {number}")


@unsync(cpu_bound=True)
def compute():
    raise ZeroDivisionError("in a process")


def fail(function, count):
    calls = [function(number) for number in range(count)]
    unsync.drain()
    return calls


"""


def test_failures_are_told_at_the_end_by_function_and_kind(run_python: Run) -> None:
    done = run_python(FAILS + "kept = fail(load, 499) + fail(store, 2)")
    assert done.stderr.count("Unfuture exception was never retrieved\n") == 5
    assert done.stderr.count("OSError: server") == 3
    assert done.stderr.count("ValueError: no room") == 2
    assert done.stderr.count("\nand 496 more calls of load() failed with OSError\n") == 1
    assert done.returncode == 0


BREAKS = (
    FAILS
    + """
import os


@unsync(cpu_bound=True)
def save(number):
    if number == 3:
        os._exit(3)
    return number


if __name__ == "__main__":
    calls = unsync.calls(save, range(100), chunksize=1)
    unsync.drain()
"""
)


def test_calls_that_a_worker_s_death_has_failed_are_told_at_the_end(run_python: Run) -> None:
    done = run_python(BREAKS)
    assert done.returncode == 0
    assert done.stderr.count("Unfuture exception was never retrieved\n") == 3
    assert re.search(
        r"\nand \d+ more calls of save\(\) failed with BrokenProcessPool\n", done.stderr
    )


def test_also_those_that_failed_with_what_has_ended_the_program(run_python: Run) -> None:
    done = run_python(BREAKS + "    for call in calls:\n        call.result()\n")
    assert done.returncode == 1
    _, _, rest = done.stderr.rpartition("BrokenProcessPool: ")
    line = r"nobody looked at it: \d\d calls of save\(\) failed with BrokenProcessPool"
    assert re.fullmatch(line, rest.splitlines()[-1])


def test_a_thread_pool_that_is_broken_is_told_at_the_end(run_python: Run) -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor

def start():
    raise OSError("no licence")

unsync.thread_executor = ThreadPoolExecutor(1, initializer=start)
calls = [load(1), load(2)]
"""
    assert "BrokenThreadPool: " in run_python(FAILS + program).stderr


def test_after_an_uncaught_traceback_few_lines_follow(run_python: Run) -> None:
    program = """
def main():
    calls = [*fail(load, 500), *fail(store, 1)]
    calls[0].result()

main()
"""
    done = run_python(FAILS + program)
    traceback, _, rest = done.stderr.partition("OSError: server 0 is down\n")
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert rest == (
        "nobody looked at it: 499 calls of load() failed with OSError\n"
        "nobody looked at it: 1 call of store() failed with ValueError\n"
    )
    assert done.returncode == 1


def check_that_failures_are_told_in_full(stderr: str) -> None:
    assert "division by zero" in stderr
    assert stderr.count("Unfuture exception was never retrieved\n") == 2
    assert "OSError: server 0 is down\n" in stderr
    assert "ValueError: no room for 0\n" in stderr


UNSEEN = "calls = [*fail(load, 1), *fail(store, 1)]\n"


def test_what_was_only_shown_at_python_s_prompt_has_not_ended_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-i", "-c", FAILS],
        input=f"1 / 0\n{UNSEEN}",
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    check_that_failures_are_told_in_full(done.stderr)


def test_nor_has_what_was_only_shown_at_another_prompt(run_python: Run) -> None:
    """IPython and Jupyter set `ps1` as well, and keep what was raised where Python does."""
    program = f"""
import code
import sys

sys.ps1 = "In : "
code.InteractiveConsole().push("1 / 0")
{UNSEEN}
"""
    check_that_failures_are_told_in_full(run_python(FAILS + program).stderr)


def test_no_more_than_five_lines_for_many_functions(run_python: Run) -> None:
    program = """
calls = []
for number in range(9):
    def load(number):
        raise OSError(number)
    load.__qualname__ = f"load_{number}"
    calls += fail(unsync(load), 2)
raise KeyError("mine")
"""
    done = run_python(FAILS + program)
    _, _, rest = done.stderr.partition("KeyError: 'mine'\n")
    assert rest.splitlines() == [
        *(f"nobody looked at it: 2 calls of load_{n}() failed with OSError" for n in range(4)),
        "and 10 more calls of other functions failed",
    ]


def test_no_failure_is_told_twice(run_python: Run) -> None:
    """Not that which has ended the program, in its causes, or as the outcome of others."""
    program = """
def main():
    first = load(1)
    kept.extend([first, first.map(print), first.then(print)])
    try:
        first.result()
    except OSError as exc:
        error = RuntimeError("mine")
        kept.append(unsync(fail_with)(exc))
        raise error from exc

def fail_with(exc):
    raise exc

kept = []
main()
"""
    done = run_python(FAILS + program)
    assert done.stderr.count("OSError: ") == 1
    assert done.stderr.endswith("RuntimeError: mine\n")


def test_what_is_dropped_while_the_interpreter_dies_is_told_by_nobody(run_python: Run) -> None:
    program = """
class Late:
    def __del__(self, unfuture=load(1)):
        self.made = Unfuture()
        self.made.set_exception(OSError("late"))
        del self.made

from unsync import Unfuture
late = Late()
"""
    done = run_python(FAILS + program)
    assert done.stderr.count("OSError: server 1 is down") == 1
    assert "late" not in done.stderr


# Other loops, and an end before the end.


def test_with_uvloop(end: Callable[..., str]) -> None:
    pytest.importorskip("uvloop")
    program = f"""
import uvloop
from unsync import unsync
unsync.loop_factory = uvloop.new_event_loop
{PENDING}
assert isinstance(unsync.loop, uvloop.Loop)
"""
    assert end(program) == ""


BLOCKED = f"""
{PENDING}
@unsync
async def block():
    begun.set()
    time.sleep(3600)

begun.clear()
blocking = block()
assert begun.wait(60)
"""


@pytest.mark.parametrize("timeout", ["0.1", "0"])
def test_after_a_shutdown_that_gave_up(timeout: str, end: Callable[..., str]) -> None:
    program = BLOCKED + f"print(unsync.shutdown(timeout={timeout}), pending.cancelled())"
    assert end(program) == "False True\n"


def test_what_a_shutdown_gave_up_on_is_cancelled(end: Callable[..., str]) -> None:
    program = f"""
{BLOCKED}
behind = [hour(), hour().then(print)]
unsync.shutdown(timeout=0.1)
print([each.cancelled() for each in (blocking, *behind)])
"""
    assert end(program) == "[True, True, True]\n"
