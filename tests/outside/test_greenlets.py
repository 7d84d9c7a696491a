"""gevent and eventlet, which make greenlets of one thread out of all threads, by patching modules.

After that the fallback serves, whose locks are theirs. Each program runs in a process of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import servers
from support.databases import free_port
from support.needs import packages, skip_without
from support.waiting import PATIENCE

RunPython = Callable[..., subprocess.CompletedProcess[str]]

GEVENT = """\
from gevent import monkey
monkey.patch_all()
import gevent
spawn, join = gevent.spawn, lambda greenlet: greenlet.get()
"""
EVENTLET = """\
import warnings
warnings.simplefilter("ignore")
import eventlet
eventlet.monkey_patch()
spawn, join = eventlet.spawn, lambda greenlet: greenlet.wait()
"""
PATCHES = {"gevent": GEVENT, "eventlet": EVENTLET}

FUNCTIONS = """
import asyncio, concurrent.futures, threading, time
from unsync import ACCELERATED, Unfuture, unsync

@unsync
async def coroutine(value):
    await asyncio.sleep(0.01)
    return value

@unsync
def function(value):
    time.sleep(0.01)
    return value

@unsync
def waits(value):
    return coroutine(value).result() + function(1).result()

@unsync
def numbers():
    for number in range(5):
        time.sleep(0.001)
        yield number

async def both():
    loop = asyncio.get_running_loop()
    assert loop is not ambient
    first = await coroutine(1), await function(2), await coroutine(3).map(function), await waits(3)
    gathered = await asyncio.gather(coroutine(5), function(6), waits(6))
    assert asyncio.get_running_loop() is loop
    return [*first, *gathered]

ambient = None
"""

RUN = [1, 2, 3, 4, 5, 6, 7]

# What is done, as an expression, and what comes of it. The first of them starts what it needs.
EXPRESSIONS: dict[str, tuple[str, object]] = {
    "coroutine": ("coroutine(1).result()", 1),
    "coroutine, timeout": ("coroutine(1).result(60)", 1),
    "function": ("function(2).result()", 2),
    "function, timeout": ("function(2).result(60)", 2),
    "continuation": ("function(1).then(lambda done: coroutine(done.result())).result()", 1),
    "functions that wait": (
        "[call.result() for call in [waits(n) for n in range(20)]]",
        [*range(1, 21)],
    ),
    "wait": ("len(concurrent.futures.wait([coroutine(1), function(2), waits(3)]).done)", 3),
    "as_completed": (
        "sorted(f.result() for f in concurrent.futures.as_completed([coroutine(1), function(2)]))",
        [1, 2],
    ),
    "views": (
        "function(1).concurrent_future.result() + coroutine(1).concurrent_future.result()",
        2,
    ),
    "stream": ("list(numbers())", [*range(5)]),
    "map": ("list(unsync.map(function, range(10)))", [*range(10)]),
    "calls": ("[call.result() for call in unsync.calls(function, range(10))]", [*range(10)]),
    "cancelled": (
        "(lambda call: (call.cancel(), call.exception is not None))(coroutine(1))[0]",
        True,
    ),
    "timeout": ("type(Unfuture().exception and Unfuture()).__name__", "Unfuture"),
    "greenlets": (
        "[join(g) for g in [spawn(lambda n=n: waits(n).result()) for n in range(9)]]",
        [*range(1, 10)],
    ),
    "asyncio.run": ("asyncio.run(both())", RUN),
    "asyncio.run twice": ("[asyncio.run(both()) for _ in range(2)]", [RUN, RUN]),
    "asyncio.run in a greenlet": ("join(spawn(lambda: asyncio.run(both())))", RUN),
    "shutdown": ("(coroutine(1).result(), function(1).result(), unsync.shutdown(60))[2]", True),
}


@pytest.mark.once
@pytest.mark.parametrize("library", PATCHES)
@pytest.mark.parametrize("first", ["coroutine", "function", "asyncio.run"])
def test_everything_works_after_the_patch(library: str, first: str, run_python: RunPython) -> None:
    skip_without(library)
    order = {first: EXPRESSIONS[first], **EXPRESSIONS}
    lines = [f"print(repr({code}), flush=True)" for code, _ in order.values()]
    program = "\n".join([PATCHES[library], FUNCTIONS, "assert not ACCELERATED", *lines])
    done = run_python(program, env={"UNSYNC_NO_EXTENSIONS": ""})
    assert done.stderr == ""
    assert dict(zip(order, done.stdout.splitlines(), strict=True)) == {
        name: repr(expected) for name, (_, expected) in order.items()
    }


@pytest.mark.once
@pytest.mark.parametrize("library", PATCHES)
@pytest.mark.parametrize("call", ["coroutine", "function"])
def test_the_other_greenlets_go_on_while_one_waits(
    library: str, call: str, run_python: RunPython
) -> None:
    """One that nothing but another greenlet would release."""
    skip_without(library)
    body = """
    gate = Unfuture()

    def open_the_gate():
        time.sleep(0.01)
        gate.set_result(1)

    @unsync
    async def coroutine():
        return await gate

    @unsync
    def function():
        return gate.result()

    other = spawn(open_the_gate)
    print(CALL().result())
    """.replace("\n    ", "\n").replace("CALL", call)
    done = run_python(PATCHES[library] + FUNCTIONS + body, env={"UNSYNC_NO_EXTENSIONS": ""})
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.parametrize("library", PATCHES)
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_a_patch_that_comes_too_late_is_an_error_that_says_so(
    library: str, used: bool, run_python: RunPython
) -> None:
    skip_without(library)
    waits = [
        "Unfuture().result()",
        "Unfuture().exception(60)",
        "concurrent.futures.wait([Unfuture()])",
    ]
    if not used:  # else they are at work, in the system's threads, and may be done at once
        waits += ["coroutine(1).result()", "function(1).result(60)", "asyncio.run(both())"]
    lines = [
        FUNCTIONS,
        "print(coroutine(1).result(), function(1).result())" if used else "",
        PATCHES[library],
        "def attempt(wait):",
        "    try:",
        "        print(wait())",
        "    except RuntimeError as exc:",
        "        print(exc)",
        *(f"attempt(lambda: {wait})" for wait in waits),
    ]
    done = run_python("\n".join(lines))
    assert done.returncode == 0
    said = done.stdout.splitlines()[used:]
    assert len(said) == len(waits)
    for line in said:
        assert line.startswith(f"{library} has patched Python's threads after unsync was imported")
        assert "before anything imports unsync" in line


@pytest.mark.once
@pytest.mark.parametrize("library", PATCHES)
def test_the_self_check_says_which_core_serves_and_why(library: str, run_python: RunPython) -> None:
    skip_without(library)
    program = f"""
import sys
if __name__ == "__main__":
{"".join(f"    {line}" for line in PATCHES[library].splitlines(keepends=True))}
    import json
    from unsync import __main__ as program
    facts = program.describe()
    print(facts["core"], "|", facts["why_pure"])
"""
    done = run_python(program, env={"UNSYNC_NO_EXTENSIONS": ""})
    assert done.stderr == ""
    assert done.stdout == f"pure | {library} has made greenlets of the threads\n"


APPLICATION = """
import asyncio, json, os, time
from unsync import ACCELERATED, unsync

@unsync
async def coroutine(number):
    await asyncio.sleep(0.001)
    return number

@unsync
def function(number):
    time.sleep(0.001)
    return coroutine(number).result()

async def both(number):
    return [await coroutine(number), await function(number)]

def app(environ, start_response):
    number = int(environ["QUERY_STRING"])
    calls = [coroutine(number + i) for i in range(5)] + [function(number + i) for i in range(5)]
    body = json.dumps([ACCELERATED, *(call.result() for call in calls)]).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]
"""


@pytest.mark.once
@pytest.mark.skipif(sys.platform == "win32", reason="no gunicorn here")
@packages("gunicorn", "gevent")
def test_gunicorns_gevent_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSYNC_NO_EXTENSIONS", "")
    (tmp_path / "application.py").write_text(APPLICATION)
    port = free_port()
    command = [
        *("-m", "gunicorn", "application:app", "--bind", f"127.0.0.1:{port}"),
        *("--workers", "2", "--worker-class", "gevent", "--log-level", "warning"),
        *("--worker-tmp-dir", str(tmp_path), "--timeout", "600"),
    ]

    def ask(number: int) -> Any:
        status, text = servers.ask(f"{server.url}/?{number}")
        assert status == 200
        return json.loads(text)

    with servers.served(tmp_path, command, port, path="/?0", HOME=str(tmp_path)) as server:
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(ask, range(40), timeout=PATIENCE))
        for number, answer in enumerate(answers):
            assert answer == [
                False,
                *(number + i for i in range(5)),
                *(number + i for i in range(5)),
            ]
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == ""
        assert server.process.returncode == 0
