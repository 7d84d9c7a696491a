"""A Flask service whose handlers, in gunicorn's threads, use the async clients of three servers.

    pip install flask gunicorn redis asyncpg httpx
    export POSTGRES_URL=postgresql://... REDIS_URL=redis://... PRICES_URL=http://...
    gunicorn --config gunicorn.conf.py service:app

An item is one row of PostgreSQL, a counter in Redis and a price that another service knows. They
are asked for at once, by one coroutine in the ambient loop; the handler's thread waits for it.
"""

import asyncio
import gc
import os
from dataclasses import dataclass

import asyncpg
import httpx
from flask import Flask, Response, jsonify
from redis import asyncio as redis

from unsync import unsync

SCHEMA = "CREATE TABLE IF NOT EXISTS items (id integer PRIMARY KEY, name text NOT NULL)"
# In seconds, for what should take milliseconds.
PATIENCE = float(os.environ.get("PATIENCE", "5"))

app = Flask(__name__)


@dataclass
class Clients:
    """One of each for the process: they belong to its ambient loop, and all requests share them."""

    postgres: "asyncpg.Pool[asyncpg.Record]"
    redis: "redis.Redis"
    prices: httpx.AsyncClient


_clients: Clients | None = None


@unsync
async def start() -> None:
    """Connects; each worker does so after the fork, since connections do not survive one."""
    global _clients
    postgres = await asyncpg.create_pool(os.environ["POSTGRES_URL"], min_size=1, max_size=16)
    await postgres.execute(SCHEMA)
    cache = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
    await cache.ping()
    _clients = Clients(postgres, cache, httpx.AsyncClient(base_url=os.environ["PRICES_URL"]))
    # What was made until now stays: the garbage collector need not go through it any more.
    gc.collect()
    gc.freeze()


@unsync
async def stop() -> None:
    """Says goodbye to the servers, when the last request has been answered."""
    global _clients
    clients, _clients = _clients, None
    if clients is not None:
        await clients.prices.aclose()
        await clients.redis.aclose()
        await clients.postgres.close()


def _connected() -> Clients:
    if _clients is None:
        raise RuntimeError("start() has not been called in this process")
    return _clients


@unsync
async def find_item(number: int) -> dict[str, object] | None:
    clients = _connected()
    name, visits, price = await asyncio.gather(
        clients.postgres.fetchval("SELECT name FROM items WHERE id = $1", number),
        clients.redis.incr(f"visits:{number}"),
        clients.prices.get(f"/{number}"),
    )
    if name is None:
        return None
    price.raise_for_status()
    return {"id": number, "name": name, "visits": visits, "price": price.json()}


@unsync
async def check() -> None:
    """Raises if a database does not answer."""
    clients = _connected()
    await asyncio.gather(clients.postgres.fetchval("SELECT 1"), clients.redis.ping())


@app.get("/items/<int:number>")
def item(number: int) -> tuple[Response, int]:
    found = find_item(number).result(PATIENCE)
    if found is None:
        return jsonify({"error": f"there is no item {number}"}), 404
    return jsonify(found), 200


@app.get("/health")
def health() -> tuple[Response, int]:
    try:
        check().result(PATIENCE)
    except Exception as problem:  # a TimeoutError too
        return jsonify({"error": repr(problem)}), 503
    return jsonify({"error": None}), 200


@app.get("/metrics")
def metrics() -> Response:
    """The counts of this worker; `metrics_prometheus.py` beside this folder has more of them."""
    stats = unsync.stats()
    lines = [
        f"unsync_coroutines_started_total {stats.coroutines.started}",
        f"unsync_coroutines_failed_total {stats.coroutines.failed}",
        f"unsync_coroutines_pending {stats.coroutines.pending}",
        f"unsync_loop_lag_seconds {stats.loop_lag}",
    ]
    return Response("\n".join([*lines, ""]), mimetype="text/plain; version=0.0.4")
