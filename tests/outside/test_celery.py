"""A real Celery worker on Redis, with each of two pools: right, counted, healthy, graceful."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import databases
from support.needs import packages
from support.servers import Prices
from support.waiting import PATIENCE, wait_until

import unsync

reason = databases.missing()
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    packages("celery", "httpx", "redis"),
]

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples" / "service_celery"
MORE_TASKS = """
import tasks
from tasks import app
from unsync import unsync

# A process has longer to begin in, on a machine that may be busy.
tasks.BEGINNING = 60.0
app.conf.worker_proc_alive_timeout = 120.0


@unsync
async def identity(number):
    return number


# In the worker's main process, before it forks.
assert identity(1).result(60) == 1


@unsync(cpu_bound=True)
def square(number):
    return number * number


@app.task
def compute(number):
    return square(number).result(60)
"""
POOLS = ["prefork", "threads"]
CONCURRENCY = 2
QUEUED = 20  # tasks, many more than run at once


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with databases.redis_alone() as url:
        yield url


@pytest.fixture
def prices() -> Prices:
    return Prices()


@pytest.fixture
def env(
    redis_url: str, prices: Prices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """What the worker and this process, its client, have in common; Redis is empty."""
    from redis import Redis

    with prices.served() as url, Redis.from_url(redis_url) as connection:
        connection.flushall()
        own = {"REDIS_URL": redis_url, "PRICES_URL": url}
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        here = str(Path(unsync.__file__).parent.parent)
        yield os.environ | own | {"PYTHONPATH": os.pathsep.join([here, str(tmp_path)])}


@pytest.fixture
def tasks(env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module, as the client imports it, with another one."""
    (tmp_path / "more_tasks.py").write_text(MORE_TASKS)
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("tasks")
    yield module
    module.app.close()
    del sys.modules["tasks"]


def says(log: Path, text: str) -> bool:
    """Whether it is in the log; to be asked again after a moment, so that waiting is no work."""
    found = text in log.read_text()
    if not found:
        time.sleep(0.02)
    return found


Worker = Callable[[str], "contextlib.AbstractContextManager[subprocess.Popen[str]]"]


@pytest.fixture
def worker(env: dict[str, str], tasks: Any, tmp_path: Path) -> Worker:
    @contextlib.contextmanager
    def run(pool: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "celery", "--app", "tasks", "worker"]
        command += ["--pool", pool, "--concurrency", str(CONCURRENCY)]
        command += ["--loglevel", "INFO", "--without-mingle", "--include", "more_tasks"]
        log = tmp_path / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=FOLDER, env=env, stdout=output, stderr=subprocess.STDOUT, text=True
            )
            try:
                wait_until(
                    lambda: process.poll() is not None or says(log, " ready."),
                    "the worker's start",
                )
                yield process
            finally:
                if process.poll() is None:
                    process.terminate()
                    try:
                        process.wait(PATIENCE)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                print(log.read_text())

    return run


def inspect_ping(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command that the example shows, which asks for a worker's health."""
    command = [sys.executable, "-m", "celery", "--app", "tasks", "inspect", "ping"]
    return subprocess.run(command, cwd=FOLDER, env=env, capture_output=True, text=True)


def total(tasks: Any, count: str) -> int:
    lines = tasks.metrics().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"unsync_{count}_total{{"))


@pytest.mark.parametrize("pool", POOLS)
def test_tasks_use_the_loop_and_the_threads_of_their_process(
    worker: Worker,
    tasks: Any,
    prices: Prices,
    env: dict[str, str],
    tmp_path: Path,
    pool: str,
) -> None:
    paths = [tmp_path / f"{n}.txt" for n in range(10)]
    for n, path in enumerate(paths):
        path.write_text("x" * n)
    with worker(pool) as process:
        totals = [tasks.total.delay(list(range(n))) for n in range(20)]
        digests = tasks.digests.delay([str(path) for path in paths])
        assert [each.get(PATIENCE) for each in totals] == [10 * sum(range(n)) for n in range(20)]
        assert digests.get(PATIENCE) == [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
        ]
        tasks.health.apply_async(expires=PATIENCE).get(PATIENCE)
        prices.is_well = False
        health = tasks.health.apply_async(expires=PATIENCE)
        problem = health.get(PATIENCE, propagate=False)
        assert (health.state, "500" in repr(problem)) == ("FAILURE", True)
        computed = tasks.app.send_task("more_tasks.compute", [3])
        if pool == "threads":
            assert computed.get(PATIENCE) == 9
        else:
            with pytest.raises(AssertionError, match="daemonic processes"):
                computed.get(PATIENCE)
        if pool == "prefork":  # the worker's main process answers, whatever its pool is
            # The command waits for a second, which is less than a busy machine may take.
            wait_until(lambda: "pong" in inspect_ping(env).stdout, "the worker's answer")
        # A task's counts are written when its result is there already.
        wait_until(lambda: total(tasks, "threads_started") == 10, "the threads' counts")
        wait_until(
            lambda: total(tasks, "coroutines_started") >= sum(range(20)), "the loops' counts"
        )
        assert total(tasks, "threads_failed") == 0
        wait_until(lambda: total(tasks, "coroutines_failed") == 1, "the failed check's count")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert tasks.metrics() == ""  # each process has said goodbye
    if pool == "prefork":
        assert inspect_ping(env).returncode != 0


@pytest.mark.parametrize("pool", POOLS)
def test_a_restart_under_load_loses_no_task(
    worker: Worker, tasks: Any, prices: Prices, tmp_path: Path, pool: str
) -> None:
    """What runs at SIGTERM ends well; what waits is done by the next worker; and all of it once."""
    prices.open.clear()
    numbers = [[100 * n + i for i in range(1, 4)] for n in range(QUEUED)]
    with worker(pool) as process:
        results = [tasks.total.delay(some) for some in numbers]
        wait_until(lambda: len(prices.asked) == 3 * CONCURRENCY, "the calls of the tasks that run")
        process.send_signal(signal.SIGTERM)
        log = tmp_path / "log"
        wait_until(lambda: says(log, "Warm shutdown"), "the worker's beginning to end")
        results += [tasks.total.delay(some) for some in [[1], [2, 3]]]
        assert not any(result.ready() for result in results)
        prices.open.set()
        assert process.wait(PATIENCE) == 0
        said = log.read_text()
        assert "ERROR" not in said
        done = [result.ready() for result in results]
        assert CONCURRENCY <= sum(done) < len(results)
    with worker(pool):
        found = [result.get(PATIENCE) for result in results]
    numbers += [[1], [2, 3]]
    assert found == [10 * sum(some) for some in numbers]
    asked = Counter(number for some in numbers for number in some)
    assert prices.asked == asked
