"""The example services under their real servers, with real databases: right, healthy, graceful."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import databases
import pytest
from conftest import PATIENCE, wait_until
from servers import Answer, Load, Prices, Server, accepts, ask, listening, served

import unsync

reason = databases.missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
IN_FLIGHT = 8  # requests, fewer than the services have threads and connections


@pytest.fixture(scope="module")
def found() -> Iterator[databases.Databases]:
    with databases.databases() as started:
        yield started


@pytest.fixture
def items(found: databases.Databases) -> Iterator[Any]:
    """A connection to a table with a hundred items."""
    with psycopg.connect(found.postgres, autocommit=True) as connection:
        connection.execute("CREATE TABLE items (id integer PRIMARY KEY, name text NOT NULL)")
        connection.execute("INSERT INTO items SELECT n, 'item ' || n FROM generate_series(0, 99) n")
        yield connection
        connection.execute("DROP TABLE items")


@pytest.fixture
def prices() -> Iterator[str]:
    with Prices().served() as url:
        yield url


@pytest.fixture
def urls(found: databases.Databases, items: Any, prices: str) -> dict[str, str]:
    """Where a service finds the three servers; Redis is empty."""
    client = pytest.importorskip("redis", reason="redis is not installed")
    with client.Redis.from_url(found.redis) as connection:
        connection.flushall()
    return {"POSTGRES_URL": found.postgres, "REDIS_URL": found.redis, "PRICES_URL": prices}


NEEDS = {
    "flask": ("asyncpg", "flask", "gunicorn", "httpx"),
    "django": ("django", "gunicorn", "httpx", "psycopg_pool"),
    "django-asgi": ("django", "httpx", "psycopg_pool", "uvicorn"),
    "fastapi": ("fastapi", "psycopg_pool", "uvicorn"),
}
WITH_GUNICORN = {"flask": "service:app", "django": "service:application"}
WITH_UVICORN = {"fastapi": "service:app", "django-asgi": "service:asgi"}

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture
def start(urls: dict[str, str], tmp_path: Path) -> Start:
    """Starts a service by its name, on a port of its own or on a socket that stays open.

    With one worker of gunicorn there is none that still connects to the database when the first
    one answers.
    """

    def start(
        kind: str, listener: socket.socket | None = None, workers: int = 2
    ) -> contextlib.AbstractContextManager[Server]:
        for name in NEEDS[kind]:
            pytest.importorskip(name, reason=f"{name} is not installed")
        port = databases.free_port() if listener is None else listener.getsockname()[1]
        if kind in WITH_GUNICORN:
            bind = f"127.0.0.1:{port}" if listener is None else f"fd://{listener.fileno()}"
            command = ["-m", "gunicorn", "--config", "gunicorn.conf.py", "--bind", bind]
            command += ["--error-logfile", str(tmp_path / "log"), "--workers", str(workers)]
            command += [WITH_GUNICORN[kind]]
        elif listener is None:
            command = ["-m", "uvicorn", "--port", str(port), "--log-level", "warning"]
            command += [WITH_UVICORN[kind]]
        else:
            command = ["serve.py", str(listener.fileno())]
        folder = EXAMPLES / f"service_{kind.removesuffix('-asgi')}"
        env = urls | {"NOTES_FOLDER": str(tmp_path), "HOME": str(tmp_path)}
        return served(folder, command, port, listener, **env)

    return start


@pytest.fixture
def flask_service(start: Start) -> Iterator[Server]:
    with start("flask", workers=1) as started:
        yield started


@pytest.fixture
def fastapi_service(start: Start) -> Iterator[Server]:
    with start("fastapi") as started:
        yield started


def counts(url: str) -> dict[str, float]:
    status, text = ask(f"{url}/metrics")
    assert status == 200
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def end_in_flight(
    server: Server, items: Any, is_ending: Callable[[], bool], ask_one: Callable[[int], Answer]
) -> list[Answer]:
    """What requests answer that wait for a locked table when SIGTERM comes; and it ends well."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    # What a transaction sees of the activity stays as it was: another connection looks at it.
    with (
        psycopg.connect(items.info.dsn, autocommit=True) as observer,
        ThreadPoolExecutor(IN_FLIGHT) as clients,
    ):
        with items.transaction():
            items.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            asked = [clients.submit(ask_one, n) for n in range(IN_FLIGHT)]
            wait_until(
                lambda: observer.execute(waiting).fetchone()[0] == IN_FLIGHT,
                "the requests at the locked table",
            )
            server.process.send_signal(signal.SIGTERM)
            wait_until(is_ending, "the server's beginning to end")
            assert server.process.poll() is None
            assert not any(answer.done() for answer in asked)
        answers = [answer.result(PATIENCE) for answer in asked]
    assert server.end() == ""
    return answers


def check_items(url: str) -> None:
    """An item is what PostgreSQL, Redis and the service with the prices say together."""
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda n: ask(f"{url}/items/{n % 10}"), range(100)))
    visits: dict[int, list[int]] = {}
    for n, (status, text) in enumerate(answers):
        answer = json.loads(text)
        visits.setdefault(n % 10, []).append(answer.pop("visits"))
        expected = {"id": n % 10, "name": f"item {n % 10}", "price": n % 10 * 10}
        assert (status, answer) == (200, expected)
    assert all(sorted(of_one) == [*range(1, 11)] for of_one in visits.values())
    status, text = ask(f"{url}/items/100")
    assert (status, json.loads(text)) == (404, {"error": "there is no item 100"})
    assert ask(f"{url}/health")[0] == 200


def test_flask_answers_from_three_servers(flask_service: Server) -> None:
    check_items(flask_service.url)


def test_flask_counts_what_it_did(flask_service: Server) -> None:
    found = counts(flask_service.url)
    assert found["unsync_coroutines_started_total"] >= 1  # it has connected
    assert found["unsync_coroutines_failed_total"] == 0
    assert found["unsync_coroutines_pending"] == 0


def test_flask_loses_nothing_that_is_in_flight_on_sigterm(
    flask_service: Server, items: Any, tmp_path: Path
) -> None:
    # Its workers go on listening while they end, though nobody accepts: its log says when.
    log = tmp_path / "log"
    answers = end_in_flight(
        flask_service,
        items,
        lambda: "Handling signal: term" in log.read_text(),
        lambda n: ask(f"{flask_service.url}/items/{n}"),
    )
    assert "ERROR" not in log.read_text()
    assert [status for status, _ in answers] == [200] * IN_FLIGHT
    assert [json.loads(text)["name"] for _, text in answers] == [
        f"item {n}" for n in range(IN_FLIGHT)
    ]


@pytest.mark.parametrize("kind", ["django", "django-asgi"])
def test_django_answers_from_three_servers_and_writes(start: Start, items: Any, kind: str) -> None:
    with start(kind) as server:
        url = server.url
        check_items(url)
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(rename, url, n) for n in range(100)]
            assert [answer.result(PATIENCE) for answer in asked] == [(204, "")] * 100
        names = items.execute("SELECT name FROM items ORDER BY id").fetchall()
        assert names == [(f"new {n}",) for n in range(100)]
        status, text = rename(url, 100)
        assert (status, json.loads(text)) == (404, {"error": "there is no item 100"})
        found = counts(url)
        assert found["unsync_threads_started_total"] >= 1  # by one of the workers of gunicorn
        assert found["unsync_threads_failed_total"] == found["unsync_coroutines_failed_total"] == 0


def rename(url: str, number: int) -> Answer:
    return ask(f"{url}/items/{number}/name", f"new {number}".encode())


def test_fastapi_answers_from_the_database_and_writes_files(
    fastapi_service: Server, tmp_path: Path
) -> None:
    url = fastapi_service.url
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda n: ask(f"{url}/items/{n}"), range(100)))
        written = list(clients.map(lambda n: ask(f"{url}/items/{n}/note", b"x" * n), range(1, 100)))
    for n, (status, text) in enumerate(answers):
        assert (status, json.loads(text)) == (200, {"id": n, "name": f"item {n}"})
    for n, (status, text) in enumerate(written, 1):
        assert (status, json.loads(text)) == (200, {"written": n})
        assert (tmp_path / f"{n}.txt").read_bytes() == b"x" * n
    assert ask(f"{url}/items/100")[0] == 404
    assert ask(f"{url}/health")[0] == 200
    found = counts(url)
    assert found["unsync_threads_started_total"] >= 200
    assert found["unsync_threads_failed_total"] == 0
    assert found["unsync_threads_pending"] == 0


def test_fastapi_loses_nothing_that_is_in_flight_on_sigterm(
    fastapi_service: Server, items: Any
) -> None:
    url = fastapi_service.url
    answers = end_in_flight(
        fastapi_service, items, lambda: not accepts(url), lambda n: ask(f"{url}/items/{n}")
    )
    expected = [(200, {"id": n, "name": f"item {n}"}) for n in range(IN_FLIGHT)]
    assert [(status, json.loads(text)) for status, text in answers] == expected


def test_django_under_uvicorn_loses_nothing_that_is_in_flight_on_sigterm(
    start: Start, items: Any
) -> None:
    with start("django-asgi") as server:
        answers = end_in_flight(
            server,
            items,
            lambda: not accepts(server.url),
            lambda n: rename(server.url, n),
        )
    assert answers == [(204, "")] * IN_FLIGHT
    names = items.execute("SELECT name FROM items ORDER BY id LIMIT %s", [IN_FLIGHT]).fetchall()
    assert names == [(f"new {n}",) for n in range(IN_FLIGHT)]


def is_item(number: int, answer: Answer) -> bool:
    status, text = answer
    if status != 200:
        return False
    found = json.loads(text)
    return (found["id"], found["name"]) == (number % 100, f"item {number % 100}")


@pytest.mark.parametrize("kind", ["flask", "fastapi", "django"])
def test_a_restart_under_load_loses_no_request(start: Start, tmp_path: Path, kind: str) -> None:
    """The socket stays open: who connects between two servers waits for the second one."""
    with listening() as listener:
        load = Load(listener.getsockname()[1], lambda n: f"/items/{n % 100}", is_item)
        with start(kind, listener) as first, contextlib.ExitStack() as successor, load.going_on():
            load.wait_for_more(200)
            first.process.send_signal(signal.SIGTERM)
            assert first.end() == ""
            successor.enter_context(start(kind, listener))
            load.wait_for_more(200)
    assert (load.lost, load.refused) == ([], 0)
    assert load.answered >= 400


def test_who_has_connected_when_uvicorn_begins_to_end_is_answered(start: Start) -> None:
    with listening() as listener, start("fastapi", listener) as server:
        listener.close()
        host, port = server.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        connection.connect()
        assert ask(f"{server.url}/health")[0] == 200  # it connected later: both are accepted
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(server.url), "the server's beginning to end")
        connection.request("GET", "/items/7")
        response = connection.getresponse()
        assert is_item(7, (response.status, response.read().decode()))
        connection.close()
        assert server.end() == ""


@pytest.mark.parametrize("kind", ["flask", "django-asgi"])
def test_what_a_service_has_begun_under_load_it_answers(
    start: Start, urls: dict[str, str], kind: str
) -> None:
    """The socket is the server's own: connections that it did not come to are reset, and no others.

    Redis counts what was begun.
    """
    redis = pytest.importorskip("redis", reason="redis is not installed")
    with start(kind) as server:
        load = Load(int(server.url.split(":")[2]), lambda n: f"/items/{n % 100}", is_item)
        with load.going_on():
            load.wait_for_more(200)
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == ""
    with redis.Redis.from_url(urls["REDIS_URL"]) as connection:
        begun = sum(map(int, connection.mget(f"visits:{n}" for n in range(100))))
    assert begun == load.answered
    reset = ("ConnectionResetError", "RemoteDisconnected")
    assert [lost for lost in load.lost if not any(name in lost for name in reset)] == []


STARTS = {
    "flask": "service.start().result()",
    "django": "service.start().result()",
    "fastapi": "asyncio.run(service.lifespan(service.app).__aenter__())",
}


@pytest.mark.skipif(not hasattr(gc, "freeze"), reason="there is no gc.freeze() here")
@pytest.mark.parametrize("kind", STARTS)
def test_a_full_collection_leaves_out_what_is_made_at_the_start(
    run_python: Run, urls: dict[str, str], kind: str
) -> None:
    for name in NEEDS[kind]:
        pytest.importorskip(name, reason=f"{name} is not installed")
    program = f"import asyncio, gc, os, service\n{STARTS[kind]}\n"
    program += "print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)\nos._exit(0)"
    places = [Path(unsync.__file__).parent.parent, EXAMPLES / f"service_{kind}"]
    done = run_python(program, env=urls | {"PYTHONPATH": os.pathsep.join(map(str, places))})
    assert done.returncode == 0, done.stderr
    frozen, left = map(int, done.stdout.split())
    assert frozen > 10_000 > left


def test_what_is_not_healthy_says_so(fastapi_service: Server, items: Any) -> None:
    items.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    status, text = ask(f"{fastapi_service.url}/health")
    assert status == 503
    assert "terminating connection" in json.loads(text)["error"]
    # The pool has put another in its place.
    assert ask(f"{fastapi_service.url}/health")[0] == 200


@contextlib.contextmanager
def postgres_unreachable(items: Any) -> Iterator[None]:
    """Ends all other connections to the database, and lets nobody connect while the block runs."""
    other = psycopg.conninfo.make_conninfo(items.info.dsn, dbname="template1")
    allow = "ALTER DATABASE postgres ALLOW_CONNECTIONS "
    with psycopg.connect(other, autocommit=True) as connection:
        connection.execute(allow + "false")
        try:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = 'postgres' AND pid <> %s",
                [items.info.backend_pid],
            )
            yield
        finally:
            connection.execute(allow + "true")


@pytest.mark.parametrize("kind", ["flask", "django"])
def test_without_its_database_a_service_is_not_healthy(start: Start, items: Any, kind: str) -> None:
    with start(kind, workers=1) as server:
        assert ask(f"{server.url}/health")[0] == 200
        with postgres_unreachable(items):
            status, text = ask(f"{server.url}/health")
            assert status == 503
            assert json.loads(text)["error"]
        # In whatever thread.
        wait_until(
            lambda: all(ask(f"{server.url}/health")[0] == 200 for _ in range(20)), "its health"
        )
