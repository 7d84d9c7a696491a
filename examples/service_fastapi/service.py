"""A FastAPI service whose handlers, in uvicorn's loop, call what blocks: psycopg and files.

    pip install fastapi uvicorn 'psycopg[binary,pool]'
    export POSTGRES_URL=postgresql://... NOTES_FOLDER=notes
    uvicorn service:app

What blocks is a marked function: the handler awaits it, and it runs in a thread.
"""

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from psycopg_pool import ConnectionPool

from unsync import unsync
from unsync.executors import ThreadExecutor

CONNECTIONS = 16  # and as many threads: one that has no connection could only wait for it
SCHEMA = "CREATE TABLE IF NOT EXISTS items (id integer PRIMARY KEY, name text NOT NULL)"


@unsync
def connect() -> ConnectionPool:
    pool: ConnectionPool = ConnectionPool(
        os.environ["POSTGRES_URL"], min_size=1, max_size=CONNECTIONS, open=False
    )
    pool.open(wait=True, timeout=10)
    with pool.connection() as connection:
        connection.execute(SCHEMA)
    return pool


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Once a process: uvicorn leaves it when the last request has been answered."""
    with ThreadExecutor(CONNECTIONS) as threads:
        unsync.thread_executor = threads
        app.state.pool = await connect()
        # What was made until now stays: the garbage collector need not go through it any more.
        gc.collect()
        gc.freeze()
        yield
        # What requests have called, and did not wait for.
        await asyncio.to_thread(unsync.drain, 10)
        await unsync(app.state.pool.close)()
        unsync.thread_executor = None
    unsync.shutdown(10)


app = FastAPI(lifespan=lifespan)


@unsync
def find_name(pool: ConnectionPool, number: int) -> str | None:
    with pool.connection() as connection:
        row = connection.execute("SELECT name FROM items WHERE id = %s", (number,)).fetchone()
    return None if row is None else row[0]


@unsync
def write_note(number: int, text: bytes) -> int:
    return Path(os.environ["NOTES_FOLDER"], f"{number}.txt").write_bytes(text)


@app.get("/items/{number}")
async def item(number: int) -> dict[str, object]:
    name = await find_name(app.state.pool, number)
    if name is None:
        raise HTTPException(404, f"there is no item {number}")
    return {"id": number, "name": name}


@app.put("/items/{number}/note")
async def note(number: int, request: Request) -> dict[str, int]:
    return {"written": await write_note(number, await request.body())}


@unsync
def check(pool: ConnectionPool) -> None:
    """Raises if the database does not answer."""
    with pool.connection(timeout=5) as connection:
        connection.execute("SELECT 1")


@app.get("/health")
async def health() -> JSONResponse:
    try:
        await check(app.state.pool)
    except Exception as problem:
        return JSONResponse({"error": repr(problem)}, 503)
    return JSONResponse({"error": None})


@app.get("/metrics")
async def metrics() -> PlainTextResponse:
    """The counts of this process; `metrics_prometheus.py` beside this folder has more of them."""
    stats = unsync.stats()
    lines = [
        f"unsync_threads_started_total {stats.threads.started}",
        f"unsync_threads_failed_total {stats.threads.failed}",
        f"unsync_threads_pending {stats.threads.pending}",
        f"unsync_thread_queue {stats.thread_queue}",
    ]
    return PlainTextResponse("\n".join([*lines, ""]))
