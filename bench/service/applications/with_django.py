"""Django, under a WSGI and under an ASGI server, with asgiref or with us."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

from service import bridges
from service.applications import THREADS, settle
from service.clients import afresh, blocking, kept

bridge = bridges.chosen()
IS_ASGIREF = bridge.__name__.endswith("with_asgiref")

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"], ROOT_URLCONF=__name__, SECRET_KEY="none", LOGGING_CONFIG=None
)

get = bridge.one(kept.get)
offloaded = bridge.offload(blocking.query)


async def handle_redis_afresh(request: HttpRequest, number: int) -> JsonResponse:
    """An async view in a WSGI server: Django calls it with `async_to_sync`."""
    return JsonResponse({"value": await afresh.get(number)})


def handle_redis(request: HttpRequest, number: int) -> JsonResponse:
    return JsonResponse({"value": get(number)})


async def handle_postgres(request: HttpRequest, number: int) -> JsonResponse:
    return JsonResponse({"value": await offloaded(number)})


urlpatterns = [
    path("redis/<int:number>", handle_redis),
    path("redis-wsgi/<int:number>", handle_redis_afresh if IS_ASGIREF else handle_redis),
    path("postgres/<int:number>", handle_postgres),
]

app = get_wsgi_application()


def start() -> None:
    """In gunicorn's worker, after the fork."""
    if not IS_ASGIREF:
        bridge.one(kept.connect)()


def stop() -> None:
    """After the last request."""
    if not IS_ASGIREF:
        bridge.one(kept.disconnect)()
        bridge.close()


Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
_django: Any = get_asgi_application()


async def asgi(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Django, and what Django has not: a beginning."""
    if scope["type"] != "lifespan":
        await _django(scope, receive, send)
        return
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            bridge.prepare(THREADS)
            blocking.connect()
            if IS_ASGIREF:
                # Under an ASGI server `async_to_sync` runs the coroutine in the server's loop.
                await kept.connect()
            else:
                await asyncio.to_thread(bridge.one(kept.connect))
            settle()
        elif IS_ASGIREF:
            await kept.disconnect()
        else:
            await asyncio.to_thread(bridge.one(kept.disconnect))
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
