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

import pytest
from support import databases
from support.needs import packages, skip_without
from support.servers import Answer, Load, Prices, Server, accepts, ask, listening, served
from support.waiting import PATIENCE, wait_until

import unsync

reason = databases.missing()
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    packages("psycopg", "redis"),
]
once = pytest.mark.once  # beside these, the plain core answers for two kinds of servers

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
IN_FLIGHT = 8  # requests, fewer than the services have threads and connections


@pytest.fixture(scope="module")
def found() -> Iterator[databases.Databases]:
    with databases.databases() as started:
        yield started


@pytest.fixture
def items(found: databases.Databases) -> Iterator[Any]:
    """A connection to a table with a hundred items."""
    import psycopg

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
    from redis import Redis

    with Redis.from_url(found.redis) as connection:
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
    one answers. `patience` is the service's own; its default ends requests on a busy machine.
    """

    def start(
        kind: str,
        listener: socket.socket | None = None,
        workers: int = 2,
        patience: float | None = None,
    ) -> contextlib.AbstractContextManager[Server]:
        skip_without(*NEEDS[kind])
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
        if patience is not None:
            env["PATIENCE"] = str(patience)
        return served(folder, command, port, listener, **env)

    return start


def counts(url: str) -> dict[str, float]:
    status, text = ask(f"{url}/metrics")
    assert status == 200
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def end_in_flight(
    server: Server, items: Any, is_ending: Callable[[], bool], ask_one: Callable[[int], Answer]
) -> list[Answer]:
    """What requests answer that wait for a locked table when SIGTERM comes; and it ends well."""
    import psycopg

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


def test_flask(start: Start, items: Any, tmp_path: Path) -> None:
    """One server, asked for one thing after the other: it answers, counts, and ends well."""
    with start("flask", workers=1) as server:
        check_items(server.url)
        found = counts(server.url)
        assert found["unsync_coroutines_started_total"] >= 1  # it has connected
        assert found["unsync_coroutines_failed_total"] == 0
        assert found["unsync_coroutines_pending"] == 0
        # Its workers go on listening while they end, though nobody accepts: its log says when.
        log = tmp_path / "log"
        answers = end_in_flight(
            server,
            items,
            lambda: "Handling signal: term" in log.read_text(),
            lambda n: ask(f"{server.url}/items/{n}"),
        )
    assert "ERROR" not in log.read_text()
    expected = [(200, f"item {n}") for n in range(IN_FLIGHT)]
    assert [(status, json.loads(text)["name"]) for status, text in answers] == expected


@once
@pytest.mark.parametrize("kind", ["django", "django-asgi"])
def test_django(start: Start, items: Any, kind: str) -> None:
    """One server, asked for one thing after the other: it answers, writes, counts, and ends well.

    Under gunicorn its health is looked at in the place of its end, which is that of Flask's.
    """
    with start(kind, workers=1) as server:
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
        assert found["unsync_threads_started_total"] >= 1
        assert found["unsync_threads_failed_total"] == found["unsync_coroutines_failed_total"] == 0
        if kind == "django":
            check_health_without_its_database(url, items)
            return
        answers = end_in_flight(
            server,
            items,
            lambda: not accepts(url),
            lambda n: ask(f"{url}/items/{n}/name", f"newer {n}".encode()),
        )
    assert answers == [(204, "")] * IN_FLIGHT
    names = items.execute("SELECT name FROM items ORDER BY id LIMIT %s", [IN_FLIGHT]).fetchall()
    assert names == [(f"newer {n}",) for n in range(IN_FLIGHT)]


def rename(url: str, number: int) -> Answer:
    return ask(f"{url}/items/{number}/name", f"new {number}".encode())


def test_fastapi(start: Start, items: Any, tmp_path: Path) -> None:
    """One server, asked for one thing after the other: it answers, writes, counts, ends well."""
    with start("fastapi") as server:
        url = server.url
        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda n: ask(f"{url}/items/{n}"), range(100)))
            written = list(
                clients.map(lambda n: ask(f"{url}/items/{n}/note", b"x" * n), range(1, 100))
            )
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
        answers = end_in_flight(
            server, items, lambda: not accepts(url), lambda n: ask(f"{url}/items/{n}")
        )
    expected = [(200, {"id": n, "name": f"item {n}"}) for n in range(IN_FLIGHT)]
    assert [(status, json.loads(text)) for status, text in answers] == expected


def is_item(number: int, answer: Answer) -> bool:
    status, text = answer
    if status != 200:
        return False
    found = json.loads(text)
    return (found["id"], found["name"]) == (number % 100, f"item {number % 100}")


@once
@pytest.mark.parametrize("kind", ["flask", "fastapi", "django"])
def test_a_restart_under_load_loses_no_request(start: Start, tmp_path: Path, kind: str) -> None:
    """The socket stays open: who connects between two servers waits for the second one."""
    with listening() as listener:
        load = Load(listener.getsockname()[1], lambda n: f"/items/{n % 100}", is_item)
        with (
            start(kind, listener, patience=PATIENCE) as first,
            contextlib.ExitStack() as successor,
            load.going_on(),
        ):
            load.wait_for_more(100)
            first.process.send_signal(signal.SIGTERM)
            assert first.end() == ""
            successor.enter_context(start(kind, listener, patience=PATIENCE))
            load.wait_for_more(100)
    assert (load.lost, load.refused) == ([], 0)
    assert load.answered >= 200


@once
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


@once
@pytest.mark.parametrize("kind", ["flask", "django-asgi"])
def test_what_a_service_has_begun_under_load_it_answers(
    start: Start, urls: dict[str, str], kind: str
) -> None:
    """The socket is the server's own: connections that it did not come to are reset, and no others.

    Redis counts what was begun.
    """
    from redis import Redis

    with start(kind, patience=PATIENCE) as server:
        load = Load(int(server.url.split(":")[2]), lambda n: f"/items/{n % 100}", is_item)
        with load.going_on():
            load.wait_for_more(100)
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == ""
    with Redis.from_url(urls["REDIS_URL"]) as connection:
        begun = sum(int(each or 0) for each in connection.mget(f"visits:{n}" for n in range(100)))
    assert begun == load.answered
    reset = ("ConnectionResetError", "RemoteDisconnected")
    assert [lost for lost in load.lost if not any(name in lost for name in reset)] == []


STARTS = {
    "flask": "service.start().result()",
    "django": "service.start().result()",
    "fastapi": "asyncio.run(service.lifespan(service.app).__aenter__())",
}


@once
@pytest.mark.skipif(not hasattr(gc, "freeze"), reason="there is no gc.freeze() here")
@pytest.mark.parametrize("kind", STARTS)
def test_a_full_collection_leaves_out_what_is_made_at_the_start(
    run_python: Run, urls: dict[str, str], kind: str
) -> None:
    skip_without(*NEEDS[kind])
    program = f"import asyncio, gc, os, service\n{STARTS[kind]}\n"
    program += "print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)\nos._exit(0)"
    places = [Path(unsync.__file__).parent.parent, EXAMPLES / f"service_{kind}"]
    done = run_python(program, env=urls | {"PYTHONPATH": os.pathsep.join(map(str, places))})
    assert done.returncode == 0, done.stderr
    frozen, left = map(int, done.stdout.split())
    assert frozen > 10_000 > left


@contextlib.contextmanager
def postgres_unreachable(items: Any) -> Iterator[None]:
    """Ends all other connections to the database, and lets nobody connect while the block runs."""
    import psycopg

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


def check_health_without_its_database(url: str, items: Any) -> None:
    assert ask(f"{url}/health")[0] == 200
    with postgres_unreachable(items):
        status, text = ask(f"{url}/health")
        assert status == 503
        assert json.loads(text)["error"]
    # In whatever thread, and on whatever connection.
    wait_until(lambda: all(ask(f"{url}/health")[0] == 200 for _ in range(20)), "its health again")


@once
def test_without_its_database_flask_is_not_healthy(start: Start, items: Any) -> None:
    with start("flask", workers=1) as server:
        check_health_without_its_database(server.url, items)


@once
def test_fastapi_is_not_healthy_when_it_finds_its_connections_closed(
    start: Start, items: Any
) -> None:
    with start("fastapi") as server:
        assert ask(f"{server.url}/health")[0] == 200
        items.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        status, text = ask(f"{server.url}/health")
        assert status == 503
        assert "terminating connection" in json.loads(text)["error"]
        # The pool has put another in its place.
        assert ask(f"{server.url}/health")[0] == 200
