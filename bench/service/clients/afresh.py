"""Async clients for one call: where each call has a loop of its own, they cannot be kept."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

import aiohttp
import asyncpg
from redis import asyncio as redis

from service.clients.kept import QUERY


def _redis(is_one_connection: bool = True) -> redis.Redis:
    return redis.Redis.from_url(
        os.environ["REDIS_URL"], decode_responses=True, single_connection_client=is_one_connection
    )


async def connect() -> None:
    """There is nothing that could be kept."""


async def disconnect() -> None:
    """Each call has done so."""


async def get(number: int) -> str:
    async with _redis() as client:
        return str(await client.get(f"item:{number}"))


async def get_at_once(numbers: Iterable[int]) -> list[str]:
    """Each on a connection of its own, as all clients do that ask several things at once."""
    async with _redis(is_one_connection=False) as client:
        found = await asyncio.gather(*[client.get(f"item:{number}") for number in numbers])
        return [str(value) for value in found]


async def get_all(numbers: Iterable[int]) -> list[str]:
    """One after the other on one connection: ten of them, each for one question, cost more."""
    async with _redis() as client:
        found = await asyncio.gather(*[client.get(f"item:{number}") for number in numbers])
        return [str(value) for value in found]


async def query(number: int) -> str:
    connection = await asyncpg.connect(os.environ["POSTGRES_URL"])
    try:
        name: str = await connection.fetchval(QUERY, number)
        return name
    finally:
        await connection.close()


async def fetch(number: int) -> str:
    url = f"{os.environ['PRICES_URL']}/{number}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        answer.raise_for_status()
        return await answer.text()
