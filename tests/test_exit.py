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

START_METHODS = multiprocessing.get_all_start_methods()

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


# Nothing to do.


@pytest.mark.parametrize(
    "use",
    [
        "pass",
        "unsync.loop",
        "unsync.thread",
        "unsync.thread_executor",
        "unsync.process_executor",
        "unsync.loop, unsync.thread_executor, unsync.process_executor",
        "unsync.shutdown()",
        "unsync.loop; unsync.shutdown(); unsync.loop",
        "asyncio.run(asyncio.sleep(0))",
    ],
)
def test_with_settings_touched_only(use: str, end: Callable[..., str]) -> None:
    assert end(f"import asyncio\nfrom unsync import unsync\n{use}\nprint('end')") == "end\n"


def test_after_work_of_every_kind(end: Callable[..., str]) -> None:
    program = """
    import asyncio
    import os
    from unsync import unsync

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
        print(coroutine().result(20), function().result(20), process().result(20))
        print(coroutine().then(lambda unfuture: function()).result(20))
    """
    assert end(program) == "1 2 3\n2\n"


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
        print(unsync(lambda: 2)().result(20))

    pending = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    """
    assert end(program) == "2\n"


# Coroutines.


def test_a_pending_coroutine_is_cancelled(end: Callable[..., str]) -> None:
    program = """
    import asyncio
    import threading
    from unsync import unsync

    @unsync
    async def hour():
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            print("cleaned up")

    begun = threading.Event()
    unfuture = hour()
    unfuture.add_done_callback(lambda unfuture: print("cancelled:", unfuture.cancelled()))
    chained = unfuture.then(print)
    assert begun.wait(20)
    """
    assert end(program) == "cleaned up\ncancelled: True\n"


def test_an_asynchronous_generator_is_closed(end: Callable[..., str]) -> None:
    program = """
    import asyncio
    from unsync import unsync

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

    print(first().result(20))
    """
    assert end(program) == "1\nclosed\n"


def test_a_coroutine_that_ignores_its_cancellation_is_left(end: Callable[..., str]) -> None:
    program = """
    import asyncio
    import threading
    from unsync import unsync

    @unsync
    async def stubborn():
        while True:
            try:
                begun.set()
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                print("no")

    begun = threading.Event()
    unfuture = stubborn()
    assert begun.wait(20)
    """
    assert end(program) == "no\n"


def test_a_coroutine_that_blocks_the_loop_is_left(end: Callable[..., str]) -> None:
    program = """
    import asyncio
    import threading
    import time
    from unsync import unsync

    @unsync
    async def block():
        begun.set()
        time.sleep(3600)

    @unsync
    async def behind():
        print("must not run")

    begun = threading.Event()
    blocking = block()
    assert begun.wait(20)
    waiting = [behind() for _ in range(3)]
    chained = waiting[0].then(print)
    """
    assert end(program) == ""


def test_a_coroutine_that_waits_for_other_work_is_no_news(end: Callable[..., str]) -> None:
    program = """
    import asyncio
    import threading
    import time
    from unsync import unsync

    @unsync
    def sleep():
        time.sleep(3600)

    @unsync(cpu_bound=True)
    def sleep_in_process():
        time.sleep(60)

    @unsync
    async def wait_for_all():
        work = [sleep(), sleep_in_process()]
        begun.set()
        await asyncio.gather(*work)

    if __name__ == "__main__":
        begun = threading.Event()
        wait_for_all()
        assert begun.wait(20)
    """
    assert end(program) == ""


# Threads.


def test_thread_functions_that_sleep_or_wait_do_not_hold_it(end: Callable[..., str]) -> None:
    program = """
    import threading
    import time
    from unsync import unsync

    @unsync
    def sleep():
        begun.release()
        time.sleep(3600)

    @unsync
    def wait():
        begun.release()
        threading.Event().wait()

    begun = threading.Semaphore(0)
    running = [sleep(), wait()]
    for _ in running:
        assert begun.acquire(timeout=20)
    """
    assert end(program) == ""


def test_a_queued_thread_function_never_begins(end: Callable[..., str]) -> None:
    program = """
    import threading
    import time
    from unsync import unsync

    @unsync
    def sleep():
        begun.set()
        time.sleep(3600)

    @unsync
    def queued():
        print("must not run")

    begun = threading.Event()
    unsync.thread_executor = type(unsync.thread_executor)(max_workers=1)
    running = sleep()
    assert begun.wait(20)
    waiting = [queued() for _ in range(3)]
    for unfuture in waiting:
        unfuture.add_done_callback(lambda unfuture: print("cancelled:", unfuture.cancelled()))
    """
    assert end(program) == 3 * "cancelled: True\n"


def test_a_running_thread_function_gets_a_little_time(end: Callable[..., str]) -> None:
    program = """
    import threading
    import time
    from unsync import unsync

    @unsync
    def finish():
        begun.set()
        time.sleep(0.3)
        print("finished")

    begun = threading.Event()
    finish()
    assert begun.wait(20)
    """
    assert end(program) == "finished\n"


def test_a_thread_function_that_waits_for_a_coroutine_is_no_news(end: Callable[..., str]) -> None:
    program = """
    import asyncio
    import threading
    from unsync import unsync

    @unsync
    async def hour():
        begun.set()
        await asyncio.sleep(3600)

    @unsync
    def wait():
        return hour().result()

    begun = threading.Event()
    wait()
    assert begun.wait(20)
    """
    assert end(program) == ""


# Processes.

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
    time.sleep(60)


def began(name):
    return Path(name).exists() and Path(name).read_text()


if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ["START_METHOD"])
    {before}
    work = [sleep(f"begun{{number}}") for number in range(9)]
    {chain}
    until = time.monotonic() + 20
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


@pytest.mark.skipif("fork" not in START_METHODS, reason="needs fork")
def test_workers_that_inherited_a_signal_handler_end_too(end: Callable[..., str]) -> None:
    """A program that handles SIGTERM, as services do, has workers that handle it as well."""
    before = "import signal; signal.signal(signal.SIGTERM, lambda *args: None)"
    assert_gone(end(LONG_WORK.format(before=before, chain=""), START_METHOD="fork"))


def test_running_process_work_gets_a_little_time(end: Callable[..., str]) -> None:
    program = """
    import os
    import time
    from pathlib import Path
    from unsync import unsync

    @unsync(cpu_bound=True)
    def finish():
        Path("begun").touch()
        time.sleep(0.3)
        print("finished", flush=True)

    if __name__ == "__main__":
        unfuture = finish()
        until = time.monotonic() + 20
        while not Path("begun").exists():
            assert time.monotonic() < until
            time.sleep(0.001)
    """
    assert end(program) == "finished\n"


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
            print(call().result(20))
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


def test_a_user_thread_that_goes_on_after_main_can_make_calls(end: Callable[..., str]) -> None:
    program = (
        CALLS
        + """
if __name__ == "__main__":
    import threading

    def go_on():
        threading.main_thread().join()
        call_all()

    coroutine().result(20)
    function().result(20)
    threading.Thread(target=go_on).start()
"""
    )
    assert_works_or_says_so(end(program), "coroutine", "function")


def test_a_user_thread_that_makes_its_first_calls_after_main(end: Callable[..., str]) -> None:
    program = (
        CALLS
        + """
if __name__ == "__main__":
    import threading

    def go_on():
        threading.main_thread().join()
        call_all()

    threading.Thread(target=go_on).start()
"""
    )
    must_work = ("coroutine", "function") if sys.version_info < (3, 12) else ()
    assert_works_or_says_so(end(program), *must_work)


def test_calls_in_an_exit_handler_work(end: Callable[..., str]) -> None:
    program = (
        CALLS
        + """
if __name__ == "__main__":
    import atexit

    coroutine().result(20)
    function().result(20)
    atexit.register(call_all)
"""
    )
    assert_works_or_says_so(end(program), "coroutine", "function")


@pytest.mark.parametrize("started", [True, False], ids=["started", "not-started"])
def test_calls_in_an_exit_handler_that_comes_after_ours(
    started: bool, end: Callable[..., str]
) -> None:
    """Handlers run last in, first out: one registered before the import comes too late."""
    program = (
        "import atexit\natexit.register(lambda: call_all())\n"
        + CALLS
        + f"""
if __name__ == "__main__" and {started}:
    coroutine().result(20)
    function().result(20)
"""
    )
    assert_works_or_says_so(end(program))


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
assert begun.wait(20)
"""


def test_sys_exit_keeps_its_status(run_python: Run) -> None:
    done = run_python(PENDING + "sys.exit(3)", *FLAGS)
    assert NOISE.sub("", done.stderr) == ""
    assert done.returncode == 3


def test_an_unhandled_exception_keeps_its_status_and_traceback(run_python: Run) -> None:
    done = run_python(PENDING + "raise ValueError('mine')", *FLAGS)
    assert done.returncode == 1
    assert re.fullmatch(
        r"Traceback \(most recent call last\):\n  File .*\n    raise .*\n(    .*\n)?"
        r"ValueError: mine\n",
        NOISE.sub("", done.stderr),
    )


def test_a_failure_raised_by_result_keeps_its_status_and_is_reported_once(run_python: Run) -> None:
    program = PENDING + "unsync(lambda: 1 // 0)().result(20)"
    done = run_python(program, *FLAGS)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith(" by zero\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_in_result_ends_it_as_usual(run_python: Run) -> None:
    program = PENDING + (
        "import os, signal\n"
        # A shell's background jobs inherit that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "unsync(lambda: (time.sleep(0.1), os.kill(os.getpid(), signal.SIGINT)))()\n"
        "pending.result(20)\n"
    )
    done = run_python(program, *FLAGS)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_ends_it_at_once(run_python: Run) -> None:
    done = run_python(
        PENDING + "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(3600)",
        *FLAGS,
    )
    assert NOISE.sub("", done.stderr) == ""
    assert done.returncode == -signal.SIGTERM


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
    assert begun.wait(20)
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
assert begun.wait(20)
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
