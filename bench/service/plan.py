"""What is measured: applications, the ways to call in each, the rows; and what is to be reached."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

CONNECTIONS = 16  # that wrk holds, one for each thread; each asks again when it has its answer
THREADS = 16  # of gunicorn's worker, and of each pool

LIBRARIES = (
    *("aiohttp", "anyio", "asgiref", "asyncpg", "django", "fastapi", "flask", "gunicorn"),
    *("psycopg[binary,pool]", "redis[hiredis]", "urllib3", "uvicorn[standard]", "uvloop"),
)
# Two have the same import name. The others share one environment, so that they share all versions.
ENVIRONMENTS = {
    "service": (".", *LIBRARIES),
    "service-upstream": ("unsync==1.4.0", *LIBRARIES),
}
REPORTED = (
    *("aiohttp", "anyio", "asgiref", "asyncpg", "django", "fastapi", "flask", "gunicorn"),
    *("hiredis", "httptools", "psycopg", "redis", "urllib3", "uvicorn", "uvloop"),
)


@dataclass(frozen=True)
class Row:
    """A request, the JSON it is answered with, and what a table calls it.

    :param only: the ways that have it; all if there are none.
    """

    name: str
    label: str
    path: str
    expected: dict[str, object]
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """A column: how the handlers call.

    :param bridge: the module of `bridges/`.
    :param is_peer: whether we are not to be behind it; else it is there to be compared with.
    """

    label: str
    bridge: str
    environment: str = "service"
    variables: dict[str, str] = field(default_factory=dict)
    is_peer: bool = True


@dataclass(frozen=True)
class Application:
    """:param server: the command, after `python -m` and before the address."""

    label: str
    server: tuple[str, ...]
    rows: tuple[Row, ...]
    ways: dict[str, Way]


@dataclass(frozen=True)
class Target:
    """`way` answers at least `times` as many requests as `other`."""

    application: str
    row: str
    way: str
    other: str
    times: float


UVLOOP = {"SERVICE_LOOP": "uvloop"}
OURS = ("unsync", "uvloop")
OURSELVES = {
    "unsync": Way("unsync", "ours"),
    "uvloop": Way("unsync on uvloop", "ours", variables=UVLOOP),
}


def value(number: int) -> str:
    return f"value {number}"


def one(name: str, label: str, path: str = "", *only: str) -> Row:
    return Row(name, label, f"/{path or name}/3", {"value": value(3)}, only)


def digest(data: bytes) -> dict[str, object]:
    return {"value": hashlib.sha256(data).hexdigest()}


SEVERAL: dict[str, object] = {"values": [value((3 + more) % 10) for more in range(10)]}
GUNICORN = ("gunicorn", "--config", "python:service.applications.under_gunicorn")
UVICORN = ("uvicorn", "--log-level", "warning", "--no-access-log", "--lifespan", "on")
NOTE = b"so much for this item\n" * 200  # the small file, "3.txt"

APPLICATIONS = {
    "flask": Application(
        "Flask, gunicorn gthread",
        (*GUNICORN, "service.applications.with_flask:app"),
        (
            # What ten at once leave open would be counted as memory of the rows after them.
            one("redis", "one GET from Redis"),
            one("postgres", "one query of PostgreSQL"),
            one("http", "one request to another service"),
            Row("several", "ten GETs, ten calls at once", "/several/3", SEVERAL),
            Row("gathered", "ten GETs, gathered in one call", "/gathered/3", SEVERAL),
            one("nothing", "nothing is called", "nothing", "blocking"),
        ),
        {
            **OURSELVES,
            "upstream": Way("unsync 1.4.0", "upstream", "service-upstream"),
            "upstream_uvloop": Way(
                "unsync 1.4.0 on uvloop", "upstream", "service-upstream", UVLOOP
            ),
            "threadsafe": Way("run_coroutine_threadsafe", "threadsafe"),
            "anyio": Way("anyio's portal", "portal"),
            "asgiref": Way("asgiref", "with_asgiref"),
            "blocking": Way("blocking clients", "nothing"),
        },
    ),
    "fastapi": Application(
        "FastAPI, uvicorn",
        (*UVICORN, "service.applications.with_fastapi:app"),
        (
            Row("digest", "a digest of a few bytes", "/digest/3", digest(b"item 3")),
            one("postgres", "one query of PostgreSQL"),
            Row("file", "a small file is read", "/file/3", digest(NOTE)),
        ),
        {
            "unsync": Way("unsync", "ours"),
            "def": Way("`def` handlers", "regular_handlers"),
            "to_thread": Way("asyncio.to_thread", "to_thread"),
            "in_executor": Way("run_in_executor", "in_executor"),
            "asgiref": Way("asgiref", "with_asgiref"),
            "in_the_loop": Way("in the loop, which it blocks", "in_the_loop", is_peer=False),
        },
    ),
    "django_wsgi": Application(
        "Django, gunicorn gthread",
        (*GUNICORN, "service.applications.with_django:app"),
        (one("redis", "a view that asks Redis by an async client", "redis-wsgi"),),
        {**OURSELVES, "asgiref": Way("asgiref", "with_asgiref")},
    ),
    "django_asgi": Application(
        "Django, uvicorn",
        (*UVICORN, "service.applications.with_django:asgi"),
        (
            one("redis", "a regular view that asks Redis by an async client"),
            one("postgres", "an async view that asks PostgreSQL by a blocking client"),
        ),
        {**OURSELVES, "asgiref": Way("asgiref", "with_asgiref")},
    ),
}

TARGETS = (
    Target("flask", "several", "uvloop", "upstream", 1.5),
    Target("flask", "several", "uvloop", "asgiref", 10),
    Target("fastapi", "digest", "unsync", "def", 1.3),
)
# Beside that: behind nobody, but for what the rounds of one way differ by.
NOISE = {"throughput": 1.05, "p99": 1.1, "cpu": 1.05, "memory": 1.05}
