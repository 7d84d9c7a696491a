"""Sub-interpreters, where the compiled core is not to be had: the fallback serves them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

since_313 = pytest.mark.skipif(sys.version_info < (3, 13), reason="Python 3.13 has _interpreters")
since_314 = pytest.mark.skipif(sys.version_info < (3, 14), reason="came with Python 3.14")

WORK = """
import asyncio, sys, threading, time
from unsync import ACCELERATED, unsync

@unsync
async def coroutine(seconds):
    await asyncio.sleep(seconds)
    return "coroutine"

@unsync
def function():
    return "function"

async def main():
    return await coroutine(0)

print(ACCELERATED, coroutine(0).result(60), function().result(60), asyncio.run(main()))
"""
DONE = "False coroutine function coroutine"


def run(run_python: RunPython, kind: str, work: str, *, in_main_too: bool) -> str:
    done = run_python(f"""
        import _interpreters
        if {in_main_too}:
            from unsync import unsync
            assert unsync(int)("5").result(60) == 5
        for _ in range(2):
            interpreter = _interpreters.create({kind!r})
            failure = _interpreters.exec(interpreter, {work!r})
            assert failure is None, failure.errdisplay
            _interpreters.destroy(interpreter)
        if {in_main_too}:
            assert unsync(int)("6").result(60) == 6
        print("end")
    """)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@since_313
@pytest.mark.parametrize("kind", ["isolated", "legacy"])
def test_it_works_beside_the_main_interpreter(run_python: RunPython, kind: str) -> None:
    assert run(run_python, kind, WORK, in_main_too=True) == f"{DONE}\n{DONE}\nend\n"


@since_313
def test_it_works_without_the_main_interpreter(run_python: RunPython) -> None:
    assert run(run_python, "isolated", WORK, in_main_too=False) == f"{DONE}\n{DONE}\nend\n"


@since_313
@pytest.mark.parametrize("kind", ["isolated", "legacy"])
def test_pending_work_does_not_keep_it_from_its_end(run_python: RunPython, kind: str) -> None:
    work = WORK + "\nunfuture = coroutine(1000)\ntime.sleep(0.05)\n"
    assert run(run_python, kind, work, in_main_too=True) == f"{DONE}\n{DONE}\nend\n"


@since_314
@pytest.mark.parametrize("how", ["the option executor", "thread_executor", "process_executor"])
def test_an_interpreter_pool_runs_functions(run_python: RunPython, how: str) -> None:
    done = run_python(f"""
        import concurrent.futures, math
        from unsync import unsync

        if __name__ == "__main__":
            pool = concurrent.futures.InterpreterPoolExecutor(2)
            how = {how!r}
            options = {{"executor": pool}} if how == "the option executor" else {{}}
            if how.endswith("_executor"):
                setattr(unsync, how, pool)
                options = {{"cpu_bound": how == "process_executor"}}
            factorial, sqrt = unsync(math.factorial, **options), unsync(math.sqrt, **options)
            calls = [factorial(number) for number in range(10)]
            assert [call.result(60) for call in calls] == [math.factorial(n) for n in range(10)]
            assert isinstance(sqrt(-1).exception(60), ValueError)
            assert factorial(3).then(lambda call: call.result() + 1).result(60) == 7
            pool.shutdown()
    """)
    assert (done.returncode, done.stderr) == (0, "")
