"""gunicorn's prefork model: what the master started before the fork, each worker starts anew."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import servers
from support.databases import free_port
from support.needs import packages
from support.waiting import PATIENCE

pytestmark = packages("gunicorn")

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
assert function(0).result(60) == (0, os.getpid())
pending = never()


def app(environ, start_response):
    number = int(environ["QUERY_STRING"])
    calls = [coroutine(number + i) for i in range(5)] + [function(number + i) for i in range(5)]
    body = json.dumps({
        "pid": os.getpid(),
        "answers": [call.result(60) for call in calls],
        "pending": repr(pending.exception(60)) if pending.done() else "pending",
    }).encode()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]
"""

WORKERS = 3
REQUESTS = 120


def ask(url: str, number: int) -> dict[str, Any]:
    status, text = servers.ask(f"{url}/?{number}")
    assert status == 200
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--preload"], id="preload"),  # the core's own matter: it goes through a fork
        pytest.param([], id="no preload", marks=pytest.mark.once),
    ],
)
def test_every_request_is_answered_by_its_own_worker(tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "application.py").write_text(APPLICATION)
    port = free_port()
    command = [
        *("-m", "gunicorn", "application:app", "--bind", f"127.0.0.1:{port}"),
        *("--workers", str(WORKERS), "--worker-class", "gthread", "--threads", "4"),
        *("--log-level", "warning", "--worker-tmp-dir", str(tmp_path), "--timeout", "600"),
        *flags,
    ]
    with servers.served(tmp_path, command, port, path="/?0", HOME=str(tmp_path)) as server:
        pids: set[int] = set()
        until = time.monotonic() + PATIENCE
        with ThreadPoolExecutor(8) as clients:
            # On a busy machine the first worker answers many before the second one has started.
            while len(pids) < 2:
                assert time.monotonic() < until, f"only {pids} answered in {PATIENCE} s"
                answers = list(clients.map(lambda number: ask(server.url, number), range(REQUESTS)))
                for number, answer in enumerate(answers):
                    pids.add(answer["pid"])
                    expected = [[number + i, answer["pid"]] for i in range(5)] * 2
                    assert answer["answers"] == expected
                    # What the master left pending will never be done in a worker, and says so.
                    told = "belongs to the process that forked" in answer["pending"]
                    assert told is bool(flags)
        assert server.process.pid not in pids
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == ""
        assert server.process.returncode == 0
