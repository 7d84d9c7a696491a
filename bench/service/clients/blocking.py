"""Blocking clients, which all threads share; and other work that blocks.

python -m service.clients.blocking      fills the two databases
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import redis
import urllib3
from psycopg_pool import ConnectionPool

CONNECTIONS = 16
ITEMS = 10


@dataclass
class Clients:
    redis: redis.Redis
    postgres: ConnectionPool
    http: urllib3.PoolManager


_clients: Clients | None = None


def connect() -> None:
    global _clients
    postgres: ConnectionPool = ConnectionPool(
        os.environ["POSTGRES_URL"],
        min_size=1,
        max_size=CONNECTIONS,
        open=False,
        kwargs={"autocommit": True},  # as asyncpg does it
    )
    postgres.open(wait=True, timeout=10)
    cache = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
    _clients = Clients(cache, postgres, urllib3.PoolManager(maxsize=CONNECTIONS))


def _connected() -> Clients:
    if _clients is None:
        raise RuntimeError("connect() has not been called in this process")
    return _clients


def disconnect() -> None:
    clients = _connected()
    clients.http.clear()
    clients.redis.close()
    clients.postgres.close()


def get(number: int) -> str:
    return str(_connected().redis.get(f"item:{number}"))


def get_all(numbers: Iterable[int]) -> list[str]:
    return [get(number) for number in numbers]


def query(number: int) -> str:
    with _connected().postgres.connection() as connection:
        found = connection.execute("SELECT name FROM items WHERE id = %s", (number,)).fetchone()
    assert found is not None
    return str(found[0])


def fetch(number: int) -> str:
    answer = _connected().http.request("GET", f"{os.environ['PRICES_URL']}/{number}")
    assert answer.status == 200
    return answer.data.decode()


def digest(number: int) -> str:
    """What takes a microsecond or two: less than any bridge."""
    return hashlib.sha256(b"item %d" % number).hexdigest()


def read(number: int) -> str:
    text = Path(os.environ["NOTES_FOLDER"], f"{number}.txt").read_bytes()
    return hashlib.sha256(text).hexdigest()


def fill() -> None:
    import psycopg

    with psycopg.connect(os.environ["POSTGRES_URL"], autocommit=True) as connection:
        connection.execute("CREATE TABLE items (id integer PRIMARY KEY, name text NOT NULL)")
        connection.execute(
            "INSERT INTO items SELECT n, 'value ' || n FROM generate_series(0, %s) n", (ITEMS - 1,)
        )
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as cache:
        for number in range(ITEMS):
            cache.set(f"item:{number}", f"value {number}")


if __name__ == "__main__":
    fill()
