"""What frameworks make of a marked function that is given to them where they call one themselves.

Each either awaits what the call gives, or refuses it; docs/compatibility.md lists those that cannot
be made to do so, and what they show.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
import types
import unittest
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from support.needs import skip_without
from support.waiting import PATIENCE

from unsync import Unfuture, unsync

RunPython = Callable[..., subprocess.CompletedProcess[str]]

KINDS = ["coroutine", "thread", "process"]
all_kinds = pytest.mark.parametrize("kind", KINDS)
not_in_processes = pytest.mark.parametrize("kind", KINDS[:2])


class Refused(Exception):
    pass


def answer(number: int = 1) -> dict[str, int]:
    return {"number": number}


def refuse() -> bool:
    time.sleep(0.01)
    raise Refused


def say_no() -> bool:
    return False


async def answer_async(number: int = 1) -> dict[str, int]:
    return answer(number)


async def refuse_async() -> bool:
    await asyncio.sleep(0.01)
    raise Refused


async def say_no_async() -> bool:
    return False


COROUTINES: dict[Any, Any] = {answer: answer_async, refuse: refuse_async, say_no: say_no_async}


def marked(function: Callable[..., Any], kind: str) -> Any:
    if kind == "coroutine":
        return unsync(COROUTINES[function])
    return unsync(function, cpu_bound=kind == "process")


# FastAPI and Starlette.


def get(app: Any, url: str = "/") -> Any:
    """The response, or what the handler raised."""
    httpx = pytest.importorskip("httpx")

    async def main() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(url)

    return asyncio.run(asyncio.wait_for(main(), PATIENCE))


@all_kinds
def test_a_fastapi_handler_is_awaited(kind: str) -> None:
    app = pytest.importorskip("fastapi").FastAPI()
    app.get("/")(marked(answer, kind))
    response = get(app, "/?number=5")
    assert (response.status_code, response.json()) == (200, {"number": 5})
    app.get("/refused")(marked(refuse, kind))
    with pytest.raises(Refused):
        get(app, "/refused")


@all_kinds
def test_a_fastapi_dependency_is_awaited(kind: str) -> None:
    """What a check refuses must not be granted, since an Unfuture is true, and raises nothing."""
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()
    value = fastapi.Depends(marked(answer, kind))
    permission = fastapi.Depends(marked(say_no, kind))

    @app.get("/value")
    async def give_value(value: Any = value) -> Any:
        return value

    @app.get("/refused", dependencies=[fastapi.Depends(marked(refuse, kind))])
    async def give_nothing() -> None:
        pass

    @app.get("/said_no")
    async def say(permission: Any = permission) -> str:
        return "granted" if permission else "denied"

    assert get(app, "/value?number=5").json() == {"number": 5}
    with pytest.raises(Refused):
        get(app, "/refused")
    assert get(app, "/said_no").json() == "denied"


class Checks:
    @unsync
    def in_a_thread(self) -> bool:
        return False

    @unsync
    async def in_the_loop(self) -> bool:
        return False


def test_a_fastapi_dependency_that_is_a_method() -> None:
    """Of the methods only coroutine functions can say that they are awaited; the docs say so."""
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()
    from_loop = fastapi.Depends(Checks().in_the_loop)
    from_thread = fastapi.Depends(Checks().in_a_thread)

    @app.get("/")
    async def give(loop: Any = from_loop, thread: Any = from_thread) -> list[bool]:
        return [loop, isinstance(thread, Unfuture), await thread]

    assert get(app).json() == [False, True, False]


def test_a_stream_that_a_fastapi_handler_returns_is_taken_for_a_dict() -> None:
    """The page on FastAPI says so: only where each value has two items nobody is told."""
    app = pytest.importorskip("fastapi").FastAPI()

    @unsync
    async def rows(length: int) -> AsyncIterator[str]:
        yield "abc"[:length]

    @app.get("/")
    async def give(length: int):  # type: ignore[no-untyped-def]
        return rows(length)

    @app.get("/list")
    async def give_list(length: int) -> list[str]:
        return rows(length)  # type: ignore[return-value]

    assert get(app, "/?length=2").json() == {"a": "b"}
    assert get(app, "/list?length=2").json() == ["ab"]
    with pytest.raises(ValueError, match="dictionary"):
        get(app, "/?length=3")


@pytest.mark.parametrize("below_middleware", [False, True])
def test_a_middleware_hides_from_a_fastapi_handler_that_its_client_hangs_up(
    below_middleware: bool,
) -> None:
    """The page on FastAPI says so."""
    fastapi = pytest.importorskip("fastapi")
    app = fastapi.FastAPI()
    seen: list[bool] = []

    async def give(request: Any) -> None:
        for _ in range(3):
            seen.append(await request.is_disconnected())
            await asyncio.sleep(0)

    give.__annotations__["request"] = fastapi.Request
    app.get("/")(give)

    async def pass_on(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    if below_middleware:
        app.middleware("http")(pass_on)
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), PATIENCE))
    assert seen[-1] is not below_middleware


@not_in_processes
def test_anyio_starts_no_marked_function_soon(kind: str) -> None:
    """docs/compatibility.md says so, and how it is done."""
    anyio = pytest.importorskip("anyio")
    called = threading.Event()

    if kind == "thread":

        @unsync
        def call() -> None:
            called.set()

    else:

        @unsync
        async def call() -> None:
            called.set()

    async def wait(f: Any, *args: Any) -> Any:
        return await f(*args)

    async def main() -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with anyio.create_task_group() as group:
                group.start_soon(call)
        (problem,) = caught.value.exceptions
        assert isinstance(problem, TypeError)
        assert "to return a coroutine" in str(problem)
        await asyncio.to_thread(called.wait, PATIENCE)
        assert called.is_set()
        called.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(wait, call)
        assert called.is_set()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@all_kinds
def test_a_starlette_background_task_is_awaited(kind: str) -> None:
    background = pytest.importorskip("starlette.background")
    with pytest.raises(Refused):
        asyncio.run(asyncio.wait_for(background.BackgroundTask(marked(refuse, kind))(), PATIENCE))


# unittest.


def outcome_of(case: type[unittest.TestCase]) -> tuple[list[str], list[str]]:
    """The last lines of what failed, and the warnings."""
    result = unittest.TestResult()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        case("test").run(result)
    failed = [text.splitlines()[-1] for _, text in result.errors + result.failures]
    return failed, [str(warning.message) for warning in warned]


@pytest.mark.parametrize("base", [unittest.IsolatedAsyncioTestCase, unittest.TestCase])
@not_in_processes
def test_a_method_that_is_a_test_does_not_pass_in_silence(
    kind: str, base: type[unittest.TestCase]
) -> None:
    class Case(base):  # type: ignore[misc, valid-type]
        if kind == "coroutine":

            @unsync
            async def test(self) -> None:
                raise Refused
        else:

            @unsync
            def test(self) -> None:
                raise Refused

    failed, warned = outcome_of(Case)
    awaited = kind == "coroutine" and base is unittest.IsolatedAsyncioTestCase
    if awaited and sys.version_info >= (3, 14):
        assert failed
        assert "Refused" in failed[0]
    elif awaited and sys.version_info >= (3, 12):
        assert failed
        assert "a coroutine was expected, got <Unfuture" in failed[0]
    else:
        assert not failed
        assert any("return a value that is not None from a test case" in text for text in warned)


@not_in_processes
def test_an_async_set_up_that_is_marked_fails(kind: str) -> None:
    class Case(unittest.IsolatedAsyncioTestCase):
        if kind == "coroutine":

            @unsync
            async def asyncSetUp(self) -> None:  # type: ignore[override]
                raise Refused
        else:

            @unsync
            def asyncSetUp(self) -> None:  # type: ignore[override]
                raise Refused

        def test(self) -> None:
            pass

    failed, _ = outcome_of(Case)
    assert failed


# unittest.mock.


class Host:
    @unsync
    async def coroutine(self, number: int) -> int:
        return number

    @unsync
    def thread(self, number: int) -> int:
        return number


@all_kinds
def test_autospec_checks_the_arguments(kind: str) -> None:
    function = marked(answer, kind)
    module = types.SimpleNamespace(function=function)
    specified = mock.create_autospec(function)
    with mock.patch.object(module, "function", autospec=True):
        for stand_in in module.function, specified:
            with pytest.raises(TypeError, match="too many positional arguments"):
                stand_in(1, 2)
            with pytest.raises(TypeError, match="unexpected keyword argument"):
                stand_in(nothing=1)
            assert not stand_in.called
            stand_in.side_effect = answer
            given = stand_in(number=3)
            assert (asyncio.run(given) if kind == "coroutine" else given) == {"number": 3}
            stand_in.assert_called_once_with(3)


@not_in_processes
def test_autospec_of_a_class_takes_its_methods(kind: str) -> None:
    """Those of a class are not checked, since mock takes them for functions; an instance's are."""
    of_class = mock.create_autospec(Host, instance=True)
    of_instance = mock.create_autospec(Host())
    for host in of_class, of_instance:
        method = getattr(host, kind)
        method.return_value = 5
        given = method(3)
        assert (asyncio.run(given) if kind == "coroutine" else given) == 5
    with pytest.raises(TypeError, match="too many"):
        getattr(of_instance, kind)(1, 2)


@all_kinds
def test_patch_makes_a_mock_of_the_right_kind(kind: str) -> None:
    """docs/how-to/testing.md shows both."""
    module = types.SimpleNamespace(function=marked(answer, kind))
    with mock.patch.object(module, "function") as stand_in:
        assert isinstance(stand_in, mock.AsyncMock) is (kind == "coroutine")
    with mock.patch.object(module, "function", new_callable=mock.MagicMock) as stand_in:
        stand_in.side_effect = Unfuture.from_value
        assert module.function(5).result(PATIENCE) == 5


# tenacity.


@pytest.mark.parametrize("way", ["function", "method", "below unsync"])
@not_in_processes
def test_tenacity_tries_again(kind: str, way: str) -> None:
    tenacity = pytest.importorskip("tenacity")
    tries: list[int] = []

    def fail(*args: object) -> int:
        tries.append(1)
        if len(tries) < 3:
            raise Refused
        return len(tries)

    async def fail_async(*args: object) -> int:
        return fail()

    again = tenacity.retry(stop=tenacity.stop_after_attempt(3))
    function = fail if kind == "thread" else fail_async
    if way == "below unsync":
        assert unsync(again(function))().result(PATIENCE) == 3
        return
    tried = again(unsync(function))

    class Service:
        method = tried

    asked = Service().method() if way == "method" else tried()
    assert asyncio.run(asyncio.wait_for(asked, PATIENCE)) == 3


# asgiref and Django.


@all_kinds
def test_asgiref_knows_what_is_awaited(kind: str) -> None:
    """It warns where it does not know."""
    sync = pytest.importorskip("asgiref.sync")
    assert sync.async_to_sync(marked(answer, kind))(2) == {"number": 2}
    with pytest.raises(TypeError, match="can only be applied to sync functions"):
        sync.sync_to_async(marked(answer, kind))


DJANGO = """
    import asyncio
    import sys

    import django
    from django.conf import settings

    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF="__main__", MIDDLEWARE=[
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
    ])
    django.setup()

    from django.http import HttpResponse
    from django.test import AsyncClient, Client
    from django.urls import path
    from unsync import unsync

    @unsync
    async def coroutine(request):
        return HttpResponse("coroutine")

    @unsync
    def thread(request):
        return HttpResponse("thread")

    urlpatterns = [path("coroutine", coroutine), path("thread", thread)]

    async def get(url):
        return await AsyncClient().get(url)

    if __name__ == "__main__":
        for ask in Client().get, lambda url: asyncio.run(get(url)):
            print(ask("/coroutine").content.decode())
            try:
                print(ask("/thread").status_code)
            except (AttributeError, TypeError):
                print("refused")
"""


def test_a_django_view_is_awaited_or_refused(run_python: RunPython) -> None:
    skip_without("django")
    done = run_python(DJANGO)
    assert (done.stdout, done.stderr) == ("coroutine\nrefused\n" * 2, "")


# Celery.


@pytest.fixture
def celery_app() -> Iterator[Any]:
    celery = pytest.importorskip("celery")
    app = celery.Celery("frameworks", broker="memory://", backend="cache+memory://")
    with contextlib.closing(app):
        yield app


@all_kinds
def test_celery_takes_a_marked_function_and_checks_its_arguments(
    kind: str, celery_app: Any
) -> None:
    task = celery_app.task(marked(answer, kind))
    assert task.name.endswith("answer_async" if kind == "coroutine" else "answer")
    assert task(3).result(PATIENCE) == {"number": 3}
    with pytest.raises(TypeError):
        task.delay(1, 2)


@not_in_processes
def test_celery_does_not_wait_and_its_backends_refuse_what_the_call_gave(
    kind: str, celery_app: Any
) -> None:
    trace = pytest.importorskip("celery.app.trace")
    task = celery_app.task(name="task")(marked(answer, kind))
    tracer = trace.build_tracer("task", task, app=celery_app)
    tracer("1", (3,), {}, {"id": "1"})
    outcome = celery_app.AsyncResult("1")
    assert outcome.state == "FAILURE"
    assert "Unfuture is not JSON serializable" in str(outcome.result)


# Click and Typer.

COMMAND = """
    import time
    import {framework} as framework
    from unsync import unsync

    @unsync
    def command():
        time.sleep(0.01)
        raise ValueError("it failed")

    if __name__ == "__main__":
        {run}
"""


@pytest.mark.parametrize(
    ("framework", "run"),
    [("click", "framework.command()(command)([])"), ("typer", "framework.run(command)")],
)
def test_commands_do_not_wait_and_their_failures_are_reported(
    framework: str, run: str, run_python: RunPython
) -> None:
    """They look at nothing that a command gives."""
    skip_without(framework)
    done = run_python(COMMAND.format(framework=framework, run=run))
    assert done.stdout == ""
    assert "ValueError: it failed" in done.stderr
    assert "command" in done.stderr
