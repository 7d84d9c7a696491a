"""The pytest plugin: which tests it fails, and with what words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BEGINNING = """
import asyncio
import threading

import pytest

from unsync import unsync

gate = threading.Event()


@unsync
def fail(error):
    raise error


@unsync
def save(gate):
    gate.wait()


"""


def start(
    folder: Path, tests: str, *options: str, timeout: str = "0.1"
) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text('pytest_plugins = ["unsync.pytest_plugin"]\n')
    (folder / "test_of_a_user.py").write_text(BEGINNING + tests)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly"]
    return subprocess.run(
        [*command, "-o", f"unsync_timeout={timeout}", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run(folder: Path, tests: str, *options: str) -> str:
    return start(folder, tests, *options).stdout


def outcomes(output: str) -> str:
    found = re.search(r"=+ (.*) in .*s =+\n$", output)
    assert found is not None, output
    return found[1]


def test_tests_that_leave_nothing_pass(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
def test_it():
    opened = threading.Event()
    opened.set()
    save(opened)

def test_a_failure_that_is_looked_at():
    with pytest.raises(OSError):
        fail(OSError()).result()

def test_a_stream_that_is_closed():
    @unsync
    def numbers():
        yield from range(1000)
    with numbers() as stream:
        next(stream)
""",
    )
    assert outcomes(output) == "3 passed"


def test_work_that_is_left_fails_its_test_and_no_other(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
def test_it():
    save(gate)
    save(gate).map(print)

async def heartbeat():
    while not gate.is_set():
        await asyncio.sleep(0.001)

def test_another():
    unsync(heartbeat)()

def test_the_next_one():
    pass

def test_the_last():
    gate.set()
""",
    )
    assert outcomes(output) == "4 passed, 2 errors"
    words = "work of this test had not ended 0.1 s after it: "
    assert f"{words}3 calls, 2 of save(), 1 of print()" in output
    assert f"{words}1 call of heartbeat()" in output


def test_failures_that_nobody_looked_at(tmp_path: Path) -> None:
    """Whether the Unfuture was dropped at once, in the test, or is still there."""
    output = run(
        tmp_path,
        """
def test_dropped():
    fail(OSError("dropped"))

def test_kept():
    kept.append(fail(OSError("kept")))

def test_in_a_cycle():
    cycle = [fail(OSError("in a cycle"))]
    cycle.append(cycle)

def test_in_a_coroutine():
    async def coroutine():
        raise OSError("in a coroutine")
    unsync(coroutine)()

def test_the_next_one():
    assert kept[0].exception()

kept = []
""",
    )
    assert outcomes(output) == "5 passed, 4 errors"
    assert output.count("calls of this test failed, and nobody looked: 1") >= 4
    for where in ("dropped", "kept", "in a cycle", "in a coroutine"):
        assert f"OSError: {where}" in output


# What others made.

WIDER_FIXTURE = """
@pytest.fixture(scope="{scope}")
def fixture():
    if {fails} == "set-up":
        fail(OSError("in the set-up"))
    yield
    if {fails} == "teardown":
        fail(OSError("in the teardown"))

class TestIt:
    def test_it(self, fixture):
        assert unsync.drain(10)

    def test_another(self, fixture):
        pass
"""


@pytest.mark.parametrize("where", ["set-up", "teardown"])
@pytest.mark.parametrize("scope", ["class", "module", "package", "session"])
def test_failures_in_fixtures_of_a_wider_scope_are_put_down_to_them(
    tmp_path: Path, scope: str, where: str
) -> None:
    output = run(tmp_path, WIDER_FIXTURE.format(scope=scope, fails=repr(where)))
    assert outcomes(output) == "2 passed, 1 error"
    assert "ERROR at teardown of TestIt.test_another" in output
    assert "calls of the fixture fixture failed, and nobody looked: 1" in output
    assert f"OSError: in the {where}" in output
    assert "calls of this test" not in output


def test_work_that_the_teardown_of_a_wider_fixture_leaves(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
unsync.exit_timeout = 0

@pytest.fixture(scope="module")
def fixture():
    yield
    save(gate)

def test_it(fixture):
    pass
""",
    )
    assert outcomes(output) == "1 passed, 1 error"
    words = "work of the fixture fixture had not ended 0.1 s after it: 1 call of save()"
    assert words in output


def test_a_failure_that_a_wider_fixture_keeps_for_its_tests(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
@pytest.fixture(scope="module")
def call():
    return fail(OSError("to be looked at"))

def test_it(call):
    assert unsync.drain(10)

def test_another(call):
    assert str(call.exception(10)) == "to be looked at"
""",
    )
    assert outcomes(output) == "2 passed"


LATE = """
unsync.exit_timeout = 0
kept = []

@unsync
def save_and_fail():
    gate.wait()
    raise OSError("too late")

@unsync
async def call_later():
    while not gate.is_set():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    fail(OSError("too late"))

def test_it():
    {statement}

def test_another():
    gate.set()
    assert unsync.drain(10)

def test_the_next_one():
    pass
"""


@pytest.mark.parametrize(
    "statement",
    [
        "save_and_fail()",
        "kept.append(save_and_fail())",
        "save_and_fail().map(print)",
        "call_later()",
    ],
)
def test_what_an_earlier_test_left_and_fails_later_is_put_down_to_no_other(
    tmp_path: Path, statement: str
) -> None:
    output = run(tmp_path, LATE.format(statement=statement))
    assert outcomes(output) == "3 passed, 1 error"
    assert "ERROR at teardown of test_it" in output
    assert "calls of this test failed" not in output
    words = "a call of test_of_a_user.py::test_it failed when that was over, and nobody looked:"
    _, _, rest = output.partition(f"\n{words}\n")
    assert "OSError: too late" in rest


def test_a_background_task_of_a_wider_fixture_answers_for_its_calls(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
asked = threading.Event()

async def serve():
    while not asked.is_set():
        await asyncio.sleep(0.001)
    fail(OSError("while a test ran"))

@pytest.fixture(scope="module", autouse=True)
def service():
    unsync(serve)()

def test_it():
    asked.set()
    assert unsync.drain(10)

def test_another():
    pass
""",
    )
    assert outcomes(output) == "2 passed, 1 error"
    assert "ERROR at teardown of test_another" in output
    assert "calls of the fixture service failed, and nobody looked: 1" in output


def test_a_failure_that_comes_when_its_fixture_is_over_fails_the_run(tmp_path: Path) -> None:
    done = start(
        tmp_path,
        """
async def serve():
    while not gate.is_set():
        await asyncio.sleep(0.001)
    fail(OSError("too late"))

@pytest.fixture(scope="class")
def service():
    unsync(serve)()

class TestIt:
    def test_it(self, service):
        pass

def test_another():
    gate.set()
    assert unsync.drain(10)
""",
    )
    assert outcomes(done.stdout) == "2 passed"
    assert "a call of the fixture service failed when that was over" in done.stdout
    assert "OSError: too late" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED


# A wait for what is left would last longer than the program may.
INTERRUPTED = """
unsync.exit_timeout = 0

def test_it():
    save(gate)
    fail(OSError("nobody looked"))
    raise {interrupt}

def test_the_next_one():
    pass
"""


@pytest.mark.parametrize(
    ("interrupt", "words"),
    [("KeyboardInterrupt", "KeyboardInterrupt"), ("pytest.exit('enough')", "Exit: enough")],
)
def test_an_interrupt_ends_the_run_at_once(tmp_path: Path, interrupt: str, words: str) -> None:
    done = start(tmp_path, INTERRUPTED.format(interrupt=interrupt), timeout="3600")
    assert re.search(rf"!!! (.*\.)?{words} !!!", done.stdout), done.stdout
    assert outcomes(done.stdout) == "no tests ran"
    assert done.returncode == pytest.ExitCode.INTERRUPTED


@pytest.mark.parametrize("given", ["abc", "-1", "nan", ""])
def test_a_timeout_that_is_no_number_of_seconds(tmp_path: Path, given: str) -> None:
    done = start(tmp_path, "def test_it(): pass", timeout=given)
    words = f"ERROR: unsync_timeout must be a number of seconds, at least 0, not {given!r}\n"
    assert words in done.stderr
    assert done.returncode == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize("given", ["0", "inf"])
def test_a_timeout_of_nothing_and_one_without_end(tmp_path: Path, given: str) -> None:
    done = start(tmp_path, "def test_it(): pass", timeout=given)
    assert outcomes(done.stdout) == "1 passed"
