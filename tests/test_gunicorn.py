"""gunicorn's prefork model: what the master started before the fork, each worker starts anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, wait_until
from databases import free_port

pytest.importorskip("gunicorn", reason="gunicorn is not installed")

APPLICATION = """
import asyncio, json, os, threading, warnings
from unsync import Unfuture, unsync

warnings.filterwarnings("ignore", "This process", DeprecationWarning)


@unsync
async def coroutine(number):
    await asyncio.sleep(0.001)
    return number, os.getpid()


@unsync
def function(number):
    return coroutine(number).result()


@unsync
async def never():
    await asyncio.sleep(3600)


# In the master, if it loads the application before it forks.
assert function(0).result(10) == (0, os.getpid())
pending = never()


def app(environ, start_response):
    number = int(environ["QUERY_STRING"])
    calls = [coroutine(number + i) for i in range(5)] + [function(number + i) for i in range(5)]
    body = json.dumps({
        "pid": os.getpid(),
        "answers": [call.result(10) for call in calls],
        "pending": repr(pending.exception(10)) if pending.done() else "pending",
    }).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]
"""

WORKERS = 3
REQUESTS = 120


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    servers: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> tuple[subprocess.Popen[str], str]:
        (tmp_path / "application.py").write_text(APPLICATION)
        address = f"127.0.0.1:{free_port()}"
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "application:app", "--bind", address),
                *("--workers", str(WORKERS), "--worker-class", "gthread", "--threads", "4"),
                *("--log-level", "warning", "--worker-tmp-dir", str(tmp_path)),
                *flags,
            ],
            cwd=tmp_path,
            env=os.environ | {"HOME": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        servers.append(server)
        wait_until(lambda: server.poll() is not None or _answers(address), "the server's start")
        return server, address

    yield start
    for server in servers:
        if server.poll() is None:
            server.kill()
        server.communicate()


def ask(address: str, number: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://{address}/?{number}", timeout=PATIENCE) as response:
        found: dict[str, Any] = json.load(response)
    return found


def _answers(address: str) -> bool:
    try:
        ask(address, 0)
    except OSError:
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("flags", [["--preload"], []], ids=["preload", "no preload"])
def test_every_request_is_answered_by_its_own_worker(
    serve: Callable[..., tuple[subprocess.Popen[str], str]], flags: list[str]
) -> None:
    server, address = serve(*flags)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda number: ask(address, number), range(REQUESTS)))
    pids: Counter[int] = Counter()
    for number, answer in enumerate(answers):
        pids[answer["pid"]] += 1
        expected = [[number + i, answer["pid"]] for i in range(5)] * 2
        assert answer["answers"] == expected
        # What the master left pending will never be done in a worker, and says so.
        assert ("belongs to the process that forked" in answer["pending"]) is bool(flags)
    assert server.pid not in pids
    assert len(pids) > 1
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=PATIENCE)
    assert (server.returncode, errors) == (0, "")
