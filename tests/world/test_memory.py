"""No memory left: the error surfaces at the call, or in its outcome, and the next call works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

if sys.implementation.name != "cpython":
    pytest.skip("memory cannot be taken away here", allow_module_level=True)
pytest.importorskip("_testcapi", reason="Python was built without its test modules")

PROGRAM = """
import _testcapi, sys, time
from unsync import Unfuture, unsync
from unsync.executors import ThreadExecutor

unsync.thread_executor = ThreadExecutor(1)


@unsync
async def coroutine(number):
    return number


@unsync
def function(number):
    return number


WAYS = {{
    "coroutine": lambda: coroutine(5),
    "function": lambda: function(5),
    "wrapped coroutine": lambda: Unfuture(coroutine.__wrapped__(5)),
    "then": lambda: source.then(Unfuture.result),
}}
source = Unfuture.from_value(5)
call = WAYS[{way!r}]
for _ in range(3):
    assert call().result(60) == 5


def hold(held):
    # Turns, and does not wait: an Event allocates before it blocks, perhaps when memory is gone.
    held[0] = True
    while held[0]:
        pass


def hold_both():
    # The loop and the worker allocate nothing meanwhile: only the call fails.
    cells = [False], [False]
    unsync.loop.call_soon_threadsafe(hold, cells[0])
    unsync(hold)(cells[1])
    while not (cells[0][0] and cells[1][0]):
        time.sleep(0.001)
    return cells


sys.setswitchinterval(1e-4)
failures = 0
for number in range(60):
    cells = hold_both()
    made = None
    _testcapi.set_nomemory(number, number + 1)
    try:
        made = call()
    except MemoryError:
        failures += 1
    except RuntimeError as error:  # Python's own word for the same
        assert "can't allocate lock" in str(error)
        failures += 1
    finally:
        _testcapi.remove_mem_hooks()
    for held in cells:
        held[0] = False
    if made is not None:
        assert isinstance(made.exception(60), (MemoryError, type(None)))
    assert call().result(60) == 5
assert failures, "no allocation failed"
print("end")
"""


@pytest.mark.parametrize("way", ["coroutine", "function", "wrapped coroutine", "then"])
def test_a_call_without_memory(run_python: Callable[..., Any], way: str) -> None:
    done = run_python(PROGRAM.format(way=way), "-W", "ignore:coroutine:RuntimeWarning")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "end\n")
