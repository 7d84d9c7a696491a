"""A Django service in one module, whose views are at home in both worlds.

    pip install 'django>=5.1' 'psycopg[binary,pool]' redis httpx gunicorn uvicorn
    export POSTGRES_URL=postgresql://... REDIS_URL=redis://... PRICES_URL=http://...
    gunicorn --config gunicorn.conf.py service:application
    uvicorn service:asgi

A regular view runs in a thread of its own, and asks two servers at once through their async
clients, which live in the ambient loop. An async view runs in the server's loop, and awaits what
blocks: a query through Django's ORM, in one of unsync's threads.
"""

import asyncio
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast
from urllib.parse import urlsplit

import django
import httpx
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections, connection, connections, models, transaction
from django.db.backends.postgresql.base import DatabaseWrapper
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from redis import asyncio as redis

from unsync import unsync
from unsync.executors import ThreadExecutor

# In seconds, for what should take milliseconds.
PATIENCE = float(os.environ.get("PATIENCE", "5"))
CONNECTIONS = 16  # for all threads of a process together

_postgres = urlsplit(os.environ["POSTGRES_URL"])
settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    USE_TZ=True,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": _postgres.hostname,
            "PORT": _postgres.port,
            "USER": _postgres.username,
            "PASSWORD": _postgres.password or "",
            "NAME": _postgres.path[1:],
            "CONN_HEALTH_CHECKS": True,
            "OPTIONS": {
                "pool": {"min_size": 1, "max_size": CONNECTIONS, "timeout": 0.4 * PATIENCE}
            },
        }
    },
)
django.setup()


class Item(models.Model):
    id: "models.IntegerField[int, int]" = models.IntegerField(primary_key=True)
    name: "models.TextField[str, str]" = models.TextField()

    class Meta:
        app_label = "service"
        db_table = "items"


P = ParamSpec("P")
T = TypeVar("T")


def query(function: Callable[P, T]) -> Callable[P, T]:
    """For a function that uses the ORM, and is called in unsync's threads.

    Each thread has a connection of its own, from its first query on. Django gives back those of its
    requests' threads when a request ends. Nobody does that for other threads.
    """

    @wraps(function)
    def with_connection(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        finally:
            close_old_connections()

    return with_connection


@dataclass
class Clients:
    """One of each for the process: they belong to its ambient loop, and all requests share them."""

    redis: "redis.Redis"
    prices: httpx.AsyncClient


_clients: Clients | None = None


@unsync
async def start() -> None:
    """Connects, once in each process of the server; where that fails, it does not serve."""
    global _clients
    cache = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
    _clients = Clients(cache, httpx.AsyncClient(base_url=os.environ["PRICES_URL"]))
    unsync.thread_executor = ThreadExecutor(CONNECTIONS)
    await check()
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
    cast("DatabaseWrapper", connections["default"]).close_pool()


def _connected() -> Clients:
    if _clients is None:
        raise RuntimeError("start() has not been called in this process")
    return _clients


@unsync
async def find_visits_and_price(number: int) -> tuple[int, int]:
    clients = _connected()
    visits, price = await asyncio.gather(
        clients.redis.incr(f"visits:{number}"), clients.prices.get(f"/{number}")
    )
    price.raise_for_status()
    return visits, price.json()


def item(request: HttpRequest, number: int) -> HttpResponse:
    """A regular view: while two servers are asked, its own thread asks the third."""
    asked = find_visits_and_price(number)
    found = Item.objects.filter(id=number).first()
    visits, price = asked.result(PATIENCE)
    if found is None:
        return JsonResponse({"error": f"there is no item {number}"}, status=404)
    return JsonResponse({"id": number, "name": found.name, "visits": visits, "price": price})


@unsync
@query
def rename(number: int, name: str) -> bool:
    """A transaction begins and ends in one thread: here is the place for one."""
    with transaction.atomic():
        found = Item.objects.select_for_update().filter(id=number).first()
        if found is None:
            return False
        found.name = name
        found.save()
    return True


async def name(request: HttpRequest, number: int) -> HttpResponse:
    """An async view: what blocks, it awaits."""
    if await rename(number, request.body.decode()):
        return HttpResponse(status=204)
    return JsonResponse({"error": f"there is no item {number}"}, status=404)


@unsync
@query
def ask_postgres() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


@unsync
async def check() -> None:
    """Raises if a database does not answer."""
    await asyncio.gather(ask_postgres(), _connected().redis.ping())


def health(request: HttpRequest) -> HttpResponse:
    try:
        check().result(PATIENCE)
    except Exception as problem:
        return JsonResponse({"error": repr(problem)}, status=503)
    return JsonResponse({"error": None})


def metrics(request: HttpRequest) -> HttpResponse:
    """The counts of this process; `metrics_prometheus.py` beside this folder has more of them."""
    stats = unsync.stats()
    lines = [
        f"unsync_coroutines_started_total {stats.coroutines.started}",
        f"unsync_coroutines_failed_total {stats.coroutines.failed}",
        f"unsync_coroutines_pending {stats.coroutines.pending}",
        f"unsync_threads_started_total {stats.threads.started}",
        f"unsync_threads_failed_total {stats.threads.failed}",
        f"unsync_threads_pending {stats.threads.pending}",
    ]
    return HttpResponse("\n".join([*lines, ""]), content_type="text/plain; version=0.0.4")


urlpatterns = [
    path("items/<int:number>", item),
    path("items/<int:number>/name", name),
    path("health", health),
    path("metrics", metrics),
]

application = get_wsgi_application()  # for gunicorn
_views = get_asgi_application()


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """For uvicorn: Django's application, which knows no lifespan, with one."""
    if scope["type"] != "lifespan":
        await _views(scope, receive, send)
        return
    await receive()
    await start()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    # What requests have called, and did not wait for.
    await asyncio.to_thread(unsync.drain, 10)
    await stop()
    unsync.shutdown(10)
    await send({"type": "lifespan.shutdown.complete"})
