"""A Celery worker whose tasks make many calls at once, of async clients and of what blocks.

    pip install 'celery[redis]' httpx
    export REDIS_URL=redis://... PRICES_URL=http://...
    celery --app tasks worker --pool prefork --concurrency 4
    celery --app tasks inspect ping

Celery gives tasks to processes or threads, and a task gives its calls to unsync. The clients live
in the ambient loop of the process that runs the tasks: each process of the pool has its own.
"""

import asyncio
import hashlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import httpx
from celery import Celery, signals
from redis import Redis
from redis import asyncio as redis

from unsync import unsync

PATIENCE = 30.0  # seconds for the calls of one task
BEGINNING = 3.0  # seconds to connect in a new process, to which Celery gives four to come up
KEPT = 3600  # seconds that the counts of a process stay that was killed

app = Celery("tasks", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=1,  # a worker takes no more tasks than it can begin
)


@dataclass
class Clients:
    """One of each for the process: they belong to its ambient loop, and all tasks share them."""

    redis: "redis.Redis"
    prices: httpx.AsyncClient


_clients: Clients | None = None


def _connected() -> Clients:
    """Makes them for the first who asks; all ask in the ambient loop, one after the other."""
    global _clients
    if _clients is None:
        cache = redis.Redis.from_url(os.environ["REDIS_URL"])
        prices = httpx.AsyncClient(base_url=os.environ["PRICES_URL"], timeout=PATIENCE)
        _clients = Clients(cache, prices)
    return _clients


@unsync
async def check() -> None:
    """Raises if a server does not answer."""
    clients = _connected()
    _, answer = await asyncio.gather(clients.redis.ping(), clients.prices.get("/0"))
    answer.raise_for_status()


@unsync
async def disconnect() -> None:
    global _clients
    clients, _clients = _clients, None
    if clients is not None:
        await clients.redis.delete(_name())
        await clients.redis.aclose()
        await clients.prices.aclose()


@signals.worker_process_init.connect
def begin(**_: object) -> None:
    """In each process of the prefork pool, after the fork. Elsewhere the first task connects."""
    check().result(BEGINNING)


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def end(**_: object) -> None:
    """In each process of the prefork pool, or the one with the threads, after the last task."""
    if _clients is not None:
        unsync.drain(10)  # what tasks have called, and did not wait for
        disconnect().result(10)
        unsync.shutdown(10)


@unsync
async def find_price(number: int) -> int:
    answer = await _connected().prices.get(f"/{number}")
    answer.raise_for_status()
    price: int = answer.json()
    return price


@app.task
def total(numbers: list[int]) -> int:
    """All prices are asked for at once; the task's thread waits for them."""
    prices = [find_price(number) for number in numbers]
    return sum(price.result(PATIENCE) for price in prices)


@unsync
def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@app.task
def digests(paths: list[str]) -> list[str]:
    """Each file is read in a thread."""
    return [found.result(PATIENCE) for found in [digest(path) for path in paths]]


@app.task
def health() -> None:
    """For `health.apply_async(expires=5).get(5)`: whether a task is run, and can do its work."""
    check().result(PATIENCE)


def _name() -> str:
    return f"unsync:{socket.gethostname()}:{os.getpid()}"


@unsync
async def report() -> None:
    """Leaves the counts of this process where `metrics` finds them."""
    stats = unsync.stats()
    counts = {
        "unsync_coroutines_started_total": stats.coroutines.started,
        "unsync_coroutines_failed_total": stats.coroutines.failed,
        "unsync_threads_started_total": stats.threads.started,
        "unsync_threads_failed_total": stats.threads.failed,
    }
    await _connected().redis.set(_name(), json.dumps(counts), ex=KEPT)


@signals.task_postrun.connect
def count(**_: object) -> None:
    report().result(PATIENCE)


def metrics() -> str:
    """The counts of all processes of all workers, for Prometheus; any web service may serve it."""
    lines: list[str] = []
    with Redis.from_url(os.environ["REDIS_URL"], decode_responses=True) as cache:
        for name in sorted(cache.scan_iter("unsync:*")):
            process = name.removeprefix("unsync:")
            for count, value in json.loads(cache.get(name) or "{}").items():
                lines.append(f'{count}{{process="{process}"}} {value}')
    return "\n".join([*lines, ""])
