"""Async clients that belong to one loop, and that all requests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp
import asyncpg
from redis import asyncio as redis

QUERY = "SELECT name FROM items WHERE id = $1"
CONNECTIONS = 16  # to PostgreSQL
CACHE_CONNECTIONS = 256  # to Redis: more than all requests ask for at a time


@dataclass
class Clients:
    redis: redis.Redis
    postgres: asyncpg.Pool[asyncpg.Record]
    http: aiohttp.ClientSession


_clients: Clients | None = None


async def connect() -> None:
    """In the loop that will use them."""
    global _clients
    postgres = await asyncpg.create_pool(
        os.environ["POSTGRES_URL"], min_size=1, max_size=CONNECTIONS
    )
    cache = redis.Redis.from_url(
        os.environ["REDIS_URL"], decode_responses=True, max_connections=CACHE_CONNECTIONS
    )
    # As many connections to the other service as there are requests at a time.
    http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    _clients = Clients(cache, postgres, http)


def _connected() -> Clients:
    if _clients is None:
        raise RuntimeError("connect() has not been called in this process")
    return _clients


async def disconnect() -> None:
    clients = _connected()
    await clients.http.close()
    await clients.redis.aclose()
    await clients.postgres.close()


async def get(number: int) -> str:
    return str(await _connected().redis.get(f"item:{number}"))


async def get_all(numbers: Iterable[int]) -> list[str]:
    return await asyncio.gather(*[get(number) for number in numbers])


async def query(number: int) -> str:
    name: str = await _connected().postgres.fetchval(QUERY, number)
    return name


async def fetch(number: int) -> str:
    async with _connected().http.get(f"{os.environ['PRICES_URL']}/{number}") as answer:
        answer.raise_for_status()
        return await answer.text()
