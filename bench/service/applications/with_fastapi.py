"""FastAPI: handlers in uvicorn's loop, which call what blocks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service import bridges
from service.applications import THREADS, settle
from service.clients import blocking

bridge = bridges.chosen()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    bridge.prepare(THREADS)
    blocking.connect()
    settle()
    yield
    blocking.disconnect()


app = FastAPI(lifespan=lifespan)


def serve(path: str, function: Callable[[int], str]) -> None:
    if bridge.offload is None:

        @app.get(path)
        def call(number: int) -> dict[str, str]:
            return {"value": function(number)}

        return

    offloaded = bridge.offload(function)

    @app.get(path)
    async def handle(number: int) -> dict[str, str]:
        return {"value": await offloaded(number)}


serve("/digest/{number}", blocking.digest)
serve("/postgres/{number}", blocking.query)
serve("/file/{number}", blocking.read)
