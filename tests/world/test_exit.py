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

import pytest

from unsync import executors

# Those that the default pool uses; the quickest first.
START_METHODS = sorted(set(multiprocessing.get_all_start_methods()) - {"fork"})

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Python's own word on every fork beside a thread, from 3.12 on.
FLAGS = ("-X", "dev", "-W", "ignore:This process:DeprecationWarning")

# What asyncio's debug mode, part of the development mode, says on a machine under load.
NOISE = re.compile(r"^Executing <.*> took \d+\.\d+ seconds\n", re.MULTILINE)


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
import threading
import time
from pathlib import Path

from unsync import executors, unsync

begun = threading.Event()


@unsync
async def hour():
    begun.set()
    await asyncio.sleep(3600)


@unsync
def sleep():
    begun.set()
    time.sleep(3600)


"""

# For what has to end in the time that the exit gives it: on a busy machine that takes longer.
PATIENT = "executors.EXIT_SECONDS = 60\n"

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
        f"""
{PATIENT}
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
        f"""
{PATIENT}
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
    "a coroutine that ignores its cancellation is left": (
        """
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
    ),
    "a coroutine that blocks the loop is left": (
        """
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
    ),
    "a coroutine that waits for other work is no news": (
        """
@unsync(cpu_bound=True)
def sleep_in_process():
    time.sleep(600)

@unsync
async def wait_for_all():
    work = [sleep(), sleep_in_process()]
    await asyncio.gather(*work)

if __name__ == "__main__":
    wait_for_all()
    assert begun.wait(60)
""",
        "",
    ),
    # Threads.
    "thread functions that sleep or wait do not hold it": (
        """
@unsync
def wait():
    waits.set()
    threading.Event().wait()

waits = threading.Event()
running = [sleep(), wait()]
assert begun.wait(60)
assert waits.wait(60)
""",
        "",
    ),
    "a queued thread function never begins": (
        """
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
    ),
    "a running thread function gets a little time": (
        f"""
{PATIENT}
@unsync
def finish():
    begun.set()
    assert ending.wait(60)
    print("finished")

ending = threading.Event()
finish()
assert begun.wait(60)
atexit.register(ending.set)  # the exit has begun, and the package's own part of it comes next
""",
        "finished\n",
    ),
    "a thread function that waits for a coroutine is no news": (
        """
@unsync
def wait():
    return hour().result()

wait()
assert begun.wait(60)
""",
        "",
    ),
    # Processes.
    "a running process function gets a little time": (
        f"""
{PATIENT}
@unsync(cpu_bound=True)
def finish():
    Path("begun").touch()
    wait_for("ending")
    print("finished", flush=True)

def wait_for(name):
    until = time.monotonic() + 60
    while not Path(name).exists():
        assert time.monotonic() < until
        time.sleep(0.001)

if __name__ == "__main__":
    unfuture = finish()
    wait_for("begun")
    # Pools are ended by hooks of threading's own, the last one that was registered first.
    threading._register_atexit(Path("ending").touch)
""",
        "finished\n",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_end_of(program: str, end: Callable[..., str]) -> None:
    text, output = PROGRAMS[program]
    assert end(BEGINNING + text) == output


def test_the_exit_waits_for_a_moment_only() -> None:
    assert executors.EXIT_SECONDS == 1


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
    {before}
    work = [sleep(f"begun{{number}}") for number in range(9)]
    {chain}
    until = time.monotonic() + 60
    while not began("begun0"):
        assert time.monotonic() < until
        time.sleep(0.001)
    print(*[child.pid for child in multiprocessing.active_children()])
"""


def assert_gone(pids: str) -> None:
    assert pids
    for pid in pids.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.parametrize("method", START_METHODS)
def test_running_and_queued_process_work_ends_with_its_processes(
    method: str, end: Callable[..., str]
) -> None:
    assert_gone(end(LONG_WORK.format(before="", chain=""), START_METHOD=method))


def test_queued_process_work_is_cancelled(end: Callable[..., str]) -> None:
    chain = "work[-1].add_done_callback(lambda unfuture: print(unfuture.cancelled(), end=' '))"
    output = end(LONG_WORK.format(before="", chain=chain), START_METHOD=START_METHODS[0])
    assert "True" in output


def test_process_work_that_others_go_on_from_is_no_news(end: Callable[..., str]) -> None:
    program = LONG_WORK.format(before="", chain="chained = [each.then(print) for each in work]")
    assert_gone(end(program, START_METHOD=START_METHODS[0]))


def test_workers_that_handle_the_signal_end_too(end: Callable[..., str]) -> None:
    """A program that handles SIGTERM when it is imported has workers that handle it as well."""
    handler = "import signal; signal.signal(signal.SIGTERM, lambda *args: None)"
    program = f"{handler}\n{LONG_WORK.format(before='', chain='')}"
    assert_gone(end(program, START_METHOD=START_METHODS[0]))


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


posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

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
