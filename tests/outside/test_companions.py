"""Other libraries, for real: web servers and clients, test plugins, tracing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.needs import skip_without
from support.waiting import PATIENCE, wait_until

from unsync import AmbientContextManager, Unfuture, unsync

THREADS = 4


@unsync
def blocking(value: int) -> str:
    """What a library without asyncio does."""
    assert threading.current_thread() is not unsync.thread
    return f"blocking {value}"


@unsync
async def awaiting(value: int) -> str:
    assert threading.current_thread() is unsync.thread
    await asyncio.sleep(0)
    return f"awaiting {value}"


def in_threads(function: Callable[[int], Any]) -> list[Any]:
    """What several threads get that call it at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, range(3 * THREADS), timeout=3 * PATIENCE))


# aiohttp and httpx.


@pytest.fixture
def aiohttp_server() -> Iterator[str]:
    """The address of a server in the ambient loop, whose handler calls a function in a thread."""
    web = pytest.importorskip("aiohttp.web")

    async def handle(request: Any) -> Any:
        return web.Response(text=await blocking(int(request.match_info["value"])))

    @unsync
    @contextlib.asynccontextmanager
    async def served() -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/{value}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()

    with served() as address:
        yield address


EXPECTED = [f"blocking {value}" for value in range(3 * THREADS)]


def test_an_aiohttp_client_is_driven_from_threads(aiohttp_server: str) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    @unsync
    @contextlib.asynccontextmanager
    async def session() -> AsyncIterator[Any]:
        async with aiohttp.ClientSession() as made:
            yield made

    @unsync
    async def fetch(client: Any, value: int) -> str:
        async with client.get(f"{aiohttp_server}/{value}") as response:
            text: str = await response.text()
            return text

    with session() as client:
        assert in_threads(lambda value: fetch(client, value).result(PATIENCE)) == EXPECTED


def test_an_httpx_client_is_driven_from_threads(aiohttp_server: str) -> None:
    httpx = pytest.importorskip("httpx")

    @unsync
    async def fetch(client: Any, value: int) -> str:
        response = await client.get(f"{aiohttp_server}/{value}")
        text: str = response.text
        return text

    with AmbientContextManager(httpx.AsyncClient(trust_env=False)) as client:
        assert in_threads(lambda value: fetch(client, value).result(PATIENCE)) == EXPECTED


def test_an_aiohttp_response_is_a_stream_in_a_thread(aiohttp_server: str) -> None:
    aiohttp = pytest.importorskip("aiohttp")

    @unsync
    async def chunks(value: int) -> AsyncIterator[bytes]:
        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{aiohttp_server}/{value}") as response,
        ):
            async for chunk in response.content.iter_chunked(3):
                yield chunk

    assert list(chunks(7)) == [b"blo", b"cki", b"ng ", b"7"]


# Web frameworks.


def test_fastapi_awaits_thread_functions_from_its_own_loop() -> None:
    fastapi = pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    app = fastapi.FastAPI()
    loops: set[asyncio.AbstractEventLoop] = set()

    @app.get("/both/{value}")
    async def both(value: int) -> list[str]:
        loops.add(asyncio.get_running_loop())
        return await asyncio.gather(blocking(value), awaiting(value))

    @app.get("/plain/{value}")
    def plain(value: int) -> str:  # in a thread of the framework
        return awaiting(value).result(PATIENCE)

    @app.get("/many")
    async def many() -> Any:
        return fastapi.responses.StreamingResponse(words())

    @unsync
    def words() -> Generator[str, None, None]:
        yield "one "
        yield "two"

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers = await asyncio.gather(*(client.get(f"/both/{n}") for n in range(10)))
            for n, answer in enumerate(answers):
                assert answer.json() == [f"blocking {n}", f"awaiting {n}"]
            assert (await client.get("/plain/3")).json() == "awaiting 3"
            assert (await client.get("/many")).text == "one two"
        assert loops == {asyncio.get_running_loop()}

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert unsync.loop not in loops


def test_flask_handlers_call_coroutines() -> None:
    flask = pytest.importorskip("flask")
    serving = pytest.importorskip("werkzeug.serving")
    httpx = pytest.importorskip("httpx")
    app = flask.Flask("test")

    @app.get("/<int:value>")
    def handle(value: int) -> list[str]:
        calls = [awaiting(value + n) for n in range(3)]
        return [call.result(PATIENCE) for call in calls]

    class Quiet(serving.WSGIRequestHandler):  # type: ignore[misc, name-defined]
        def log(self, *_: object, **__: object) -> None:
            pass

    server = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with httpx.Client(trust_env=False, base_url=f"http://127.0.0.1:{server.port}") as client:
            answers = in_threads(lambda value: client.get(f"/{value}").json())
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()
    assert answers == [[f"awaiting {v + n}" for n in range(3)] for v in range(3 * THREADS)]


# Test plugins.

TESTS = """
    import asyncio

    import pytest

    from unsync import AmbientContextManager, Unfuture, unsync


    @unsync
    def blocking(value):
        return value + 1


    @unsync
    async def awaiting(value):
        await asyncio.sleep(0)
        return value + 1


    @pytest.fixture
    async def made():
        yield await awaiting(1)


    {mark}
    async def test_awaiting(made):
        assert asyncio.get_running_loop() is not unsync.loop
        assert made == 2
        assert await blocking(made) == 3
        assert await asyncio.wait_for(awaiting(made).map(blocking), 60) == 4
        assert [value async for value in counted()] == [0, 1, 2]
        async with AmbientContextManager(asyncio.Lock()):
            pass
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(Unfuture(), 0.01)


    @unsync
    def counted():
        yield from range(3)


    def test_in_a_thread():
        assert awaiting(1).result(60) == 2
"""


@pytest.mark.parametrize(
    ("plugin", "mark", "options"),
    [
        (
            "pytest_asyncio.plugin",
            "",
            ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"],
        ),
        ("anyio.pytest_plugin", "@pytest.mark.anyio", []),
    ],
)
def test_a_test_plugins_own_loop(
    tmp_path: Path, plugin: str, mark: str, options: list[str]
) -> None:
    pytest.importorskip(plugin)
    program = textwrap.dedent(TESTS).format(mark=mark)
    if plugin == "anyio.pytest_plugin":
        program += '\n\n@pytest.fixture\ndef anyio_backend():\n    return "asyncio"\n'
    (tmp_path / "test_with_plugin.py").write_text(program)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-W",
            "error",
            "-p",
            plugin,
            *options,
            str(tmp_path),
        ],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


# asyncio's own scopes.


class Boom(Exception):
    pass


def run_in(where: str, main: Any) -> Any:
    if where == "ambient":
        return Unfuture(main).result(2 * PATIENCE)
    return asyncio.run(main)


everywhere = pytest.mark.parametrize("where", ["ambient", "foreign"])


@everywhere
def test_a_task_group_around_unfutures(where: str) -> None:
    async def wait(unfuture: Unfuture[str]) -> str:
        return await unfuture

    async def main() -> list[str]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wait(call(1))) for call in (blocking, awaiting)]
        return [task.result() for task in tasks]

    assert run_in(where, main()) == ["blocking 1", "awaiting 1"]


@everywhere
def test_a_task_group_makes_no_task_of_an_unfuture(where: str) -> None:
    """Nor of an asyncio future: docs/compatibility.md says what to write."""

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(blocking(1))  # type: ignore[arg-type]

    with pytest.raises(Exception, match="unhandled errors") as caught:
        run_in(where, main())
    (error,) = getattr(caught.value, "exceptions", ())
    assert isinstance(error, TypeError)
    assert "a coroutine was expected, got <Unfuture" in str(error)


@everywhere
def test_a_task_group_that_fails_cancels_the_calls_it_waits_for(where: str) -> None:
    ended: list[BaseException] = []
    begun: Unfuture[None] = Unfuture()

    @unsync
    async def for_ever() -> None:
        begun.set_result(None)
        try:
            await asyncio.Event().wait()
        except BaseException as exc:
            ended.append(exc)
            raise

    @unsync
    def fail() -> None:
        raise Boom

    async def wait(unfuture: Unfuture[None]) -> None:
        await unfuture

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(wait(for_ever()))
            await begun
            group.create_task(wait(fail()))

    with pytest.raises(Exception, match="unhandled errors") as caught:
        run_in(where, main())
    assert [type(exc) for exc in getattr(caught.value, "exceptions", ())] == [Boom]
    wait_until(lambda: ended)
    assert isinstance(ended[0], asyncio.CancelledError)


@everywhere
def test_a_timeout_around_an_unfuture_cancels_it(where: str) -> None:
    calls: list[Unfuture[None]] = []

    @unsync
    async def for_ever() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        calls.append(for_ever())
        async with asyncio.timeout(0.01):
            await calls[0]

    with pytest.raises(TimeoutError):
        run_in(where, main())
    wait_until(calls[0].cancelled)


# Tracing.


def test_opentelemetrys_context_survives_each_hop() -> None:
    api = pytest.importorskip("opentelemetry.context")
    seen: dict[str, object] = {}

    def note(hop: str) -> None:
        seen[hop] = api.get_value("request")

    @unsync
    def in_thread() -> int:
        note("thread")
        return nested().result(PATIENCE)

    @unsync
    async def nested() -> int:
        note("coroutine from a thread")
        await back()
        note("coroutine after a wait")
        return 1

    @unsync
    def back() -> None:
        note("thread from a coroutine")

    @unsync
    async def agen() -> AsyncIterator[int]:
        note("async generator")
        yield 1

    @unsync
    def gen() -> Generator[int, None, None]:
        note("generator")
        yield 1

    @unsync
    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        note("context manager")
        yield

    async def foreign() -> None:
        await back_again()
        note("foreign loop after a wait")

    @unsync
    def back_again() -> None:
        note("thread from a foreign loop")

    token = api.attach(api.set_value("request", "42"))
    try:
        call = in_thread()
        continued = call.then(lambda _: note("continuation"))
        values = [list(agen()), list(gen())]
        with manager():
            note("body")
        asyncio.run(foreign())
    finally:
        api.detach(token)
    continued.result(PATIENCE)
    assert values == [[1], [1]]
    assert set(seen.values()) == {"42"}
    assert len(seen) == 11
    assert api.get_value("request") is None


# asgiref: what docs/how-to/moving-from-asgiref.md says is not alike. The outer function is called
# by `asgiref.sync.sync_to_async` or by us, and calls an inner one in its turn.


def test_asgiref_runs_an_inner_coroutine_in_the_outer_loop_and_we_in_the_ambient_one() -> None:
    sync = pytest.importorskip("asgiref.sync")

    async def where() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def main() -> None:
        outer = asyncio.get_running_loop()
        for sensitive in (True, False):
            inner = sync.sync_to_async(sync.async_to_sync(where), thread_sensitive=sensitive)
            assert await inner() is outer
        assert await unsync(lambda: unsync(where)().result(PATIENCE))() is unsync.loop is not outer

    asyncio.run(main())


@pytest.mark.alone
def test_asgiref_runs_sensitive_functions_in_one_thread_and_we_in_many() -> None:
    sync = pytest.importorskip("asgiref.sync")
    together = threading.Barrier(THREADS)

    def where() -> int:
        return threading.get_ident()

    def where_with_others() -> int:
        together.wait(PATIENCE)
        return threading.get_ident()

    async def with_asgiref() -> set[int]:
        return set(await asyncio.gather(*(sync.sync_to_async(where)() for _ in range(THREADS))))

    async def with_us() -> set[int]:
        return set(await asyncio.gather(*(unsync(where_with_others)() for _ in range(THREADS))))

    # Below an outer async_to_sync it is that one's thread: the main one, if that is where it is.
    assert sync.async_to_sync(with_asgiref)() == {threading.get_ident()}
    (one,) = asyncio.run(with_asgiref())
    assert one != threading.get_ident()
    several = asyncio.run(with_us())
    assert len(several) == THREADS
    assert threading.get_ident() not in several


def test_an_executor_with_one_thread_keeps_functions_together_one_after_the_other() -> None:
    with ThreadPoolExecutor(1) as one_thread:
        in_it = unsync(executor=one_thread)
        begun, may_end = threading.Event(), threading.Event()

        def where() -> threading.Thread:
            return threading.current_thread()

        def outer() -> tuple[threading.Thread, Unfuture[threading.Thread]]:
            inner = in_it(where)()
            begun.set()
            assert may_end.wait(PATIENCE)
            return threading.current_thread(), inner

        waiting = in_it(outer)()
        assert begun.wait(PATIENCE)
        after = in_it(where)()
        # What the outer one would wait for has no thread, as long as it waits.
        assert not after.running()
        may_end.set()
        thread, inner = waiting.result(PATIENCE)
        assert thread is inner.result(PATIENCE) is after.result(PATIENCE)
        assert thread is not threading.main_thread()


def test_asgirefs_callers_see_the_context_variables_that_are_set_and_ours_do_not() -> None:
    sync = pytest.importorskip("asgiref.sync")
    language: contextvars.ContextVar[str] = contextvars.ContextVar("language")

    def translate(into: str) -> str:
        before = language.get()
        language.set(into)
        return before

    async def translate_async(into: str) -> str:
        return translate(into)

    async def main() -> None:
        language.set("la")
        assert await unsync(translate)("el") == "la"
        assert await unsync(translate_async)("el") == "la"
        assert language.get() == "la"
        assert await sync.sync_to_async(translate)("en") == "la"
        assert language.get() == "en"

    asyncio.run(main())
    language.set("la")
    assert unsync(translate)("el").result(PATIENCE) == "la"
    assert unsync(translate_async)("el").result(PATIENCE) == "la"
    assert language.get() == "la"
    assert sync.async_to_sync(translate_async)("en") == "la"
    assert language.get() == "en"


# nest_asyncio.


@pytest.mark.parametrize("patched", ["before", "after"])
def test_nest_asyncios_inner_runs_hear_of_everything(
    patched: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Whether it patched the loop before the drain in which it is run again, or in it."""
    skip_without("nest_asyncio")
    program = f"""
        import asyncio, time
        import nest_asyncio
        from unsync import unsync

        @unsync
        def function():
            time.sleep(0.01)
            return 1

        @unsync
        async def coroutine():
            await asyncio.sleep(0.01)
            return 2

        async def inner():
            return await function() + await coroutine() + await function().map(float)

        async def main():
            loop = asyncio.get_running_loop()
            if "{patched}" == "before":
                nest_asyncio.apply(loop)
            await function()
            nest_asyncio.apply(loop)
            first = loop.run_until_complete(asyncio.wait_for(inner(), {PATIENCE}))
            return first, loop.run_until_complete(asyncio.wait_for(inner(), {PATIENCE}))

        print(asyncio.run(main()))
    """
    done = run_python(program)
    assert (done.stdout, done.stderr) == ("(4.0, 4.0)\n", "")


# freezegun.


def test_timeouts_are_in_real_time_though_a_test_has_frozen_it(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """It replaces `time.monotonic` in each module that has it, from whose view no time passes."""
    skip_without("freezegun")
    program = f"""
        import threading
        from freezegun import freeze_time
        from unsync import Unfuture, unsync

        @unsync
        def function():
            return 1

        gate = threading.Event()

        @unsync
        def wait():
            gate.wait({PATIENCE})

        @unsync
        async def coroutine():
            return 2

        @unsync
        def values():
            yield 3

        with freeze_time("2012-01-14"):
            print(function().result({PATIENCE}), coroutine().result({PATIENCE}), *values())
            for ask in Unfuture().result, Unfuture().exception:
                try:
                    ask(0.01)
                except TimeoutError:
                    print("timeout")
            wait()
            print(unsync.shutdown(0.01))
            gate.set()
            print(coroutine().result({PATIENCE}))
            print(unsync.shutdown({PATIENCE}))
    """
    done = run_python(program)
    assert (done.stdout, done.stderr) == ("1 2 3\ntimeout\ntimeout\nFalse\n2\nTrue\n", "")


# anyio's cancel scopes, which Starlette and httpx are made of.


def test_what_a_scope_cancels_may_shield_its_cleaning_up() -> None:
    anyio = pytest.importorskip("anyio")
    cleaned_up: list[str] = []

    async def clean_up(name: str) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)
            cleaned_up.append(name)

    @unsync
    async def coroutine(has_begun: Callable[[], object]) -> None:
        try:
            has_begun()
            await anyio.sleep(PATIENCE)
        finally:
            await clean_up("coroutine")

    @unsync
    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await clean_up("manager")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            await coroutine(partial(loop.call_soon_threadsafe, scope.cancel))
        assert scope.cancelled_caught
        with anyio.CancelScope() as scope:
            async with manager():
                scope.cancel()
                await anyio.sleep(PATIENCE)
        assert scope.cancelled_caught
        assert cleaned_up == ["coroutine", "manager"]

    anyio.run(main)


def test_a_scope_around_a_marked_manager_does_not_hide_its_failure() -> None:
    anyio = pytest.importorskip("anyio")
    cleans = threading.Event()

    @unsync
    @contextlib.asynccontextmanager
    async def service() -> AsyncIterator[Any]:
        async def fail() -> None:
            await lose.wait()
            raise OSError("lost")

        lose = asyncio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            try:
                yield lambda: unsync.loop.call_soon_threadsafe(lose.set)
            finally:
                with anyio.CancelScope(shield=True):
                    cleans.set()
                    await anyio.sleep(0.05)

    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with service() as begin:
                loop = asyncio.get_running_loop()

                def strike() -> None:
                    assert cleans.wait(PATIENCE)
                    loop.call_soon_threadsafe(scope.cancel)

                threading.Thread(target=strike).start()
                begin()
                await anyio.sleep(PATIENCE)

    with pytest.raises(ExceptionGroup) as caught:
        anyio.run(main)
    assert [str(each) for each in caught.value.exceptions] == ["lost"]


@pytest.mark.parametrize("strikes", [True, False])
def test_a_scope_knows_its_cancel_when_it_comes_out_of_a_marked_manager(strikes: bool) -> None:
    """Also where a timeout in the manager strikes as well, and asyncio raises a new one."""
    anyio = pytest.importorskip("anyio")

    @unsync
    @contextlib.asynccontextmanager
    async def service() -> AsyncIterator[None]:
        async with asyncio.timeout(None) as timeout:
            try:
                yield
            finally:
                if strikes:
                    timeout.reschedule(0)
                    await asyncio.sleep(PATIENCE)

    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with service():
                scope.cancel()
                try:
                    await anyio.sleep(PATIENCE)
                except asyncio.CancelledError:
                    raise LookupError from None
        assert scope.cancelled_caught

    if strikes:
        anyio.run(main)
    else:
        # The body heard of it, and chose to raise something else.
        with pytest.raises(LookupError):
            anyio.run(main)
