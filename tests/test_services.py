"""The example services under their real servers, with real databases: right, healthy, graceful."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import databases
import pytest
from conftest import PATIENCE, wait_until

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
    """The other service: the price of an item is ten times its number."""

    class Price(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(10 * int(self.path[1:])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Price) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(PATIENCE)


@contextlib.contextmanager
def served(
    folder: Path, command: list[str], port: int, **env: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service in a process of its own, from its first answer on."""
    url = f"http://127.0.0.1:{port}"
    here = str(Path(unsync.__file__).parent.parent)
    server = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | env | {"PYTHONPATH": os.pathsep.join([here, str(folder)])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: server.poll() is not None or _listens(url), "the server's start")
        yield server, url
    finally:
        server.kill()
        _, errors = server.communicate()
        print(errors)


@pytest.fixture
def flask_service(
    found: databases.Databases, items: Any, prices: str, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    for name in ("asyncpg", "flask", "gunicorn", "httpx", "redis"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    port = databases.free_port()
    command = ["gunicorn", "--config", "gunicorn.conf.py", "--bind", f"127.0.0.1:{port}"]
    command += ["--workers", "2", "--error-logfile", str(tmp_path / "log"), "service:app"]
    urls = {"POSTGRES_URL": found.postgres, "REDIS_URL": found.redis, "PRICES_URL": prices}
    with served(EXAMPLES / "service_flask", command, port, **urls, HOME=str(tmp_path)) as started:
        yield started


@pytest.fixture
def fastapi_service(
    found: databases.Databases, items: Any, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    for name in ("fastapi", "psycopg_pool", "uvicorn"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    port = databases.free_port()
    command = ["uvicorn", "--port", str(port), "--log-level", "warning", "service:app"]
    folder = EXAMPLES / "service_fastapi"
    env = {"POSTGRES_URL": found.postgres, "NOTES_FOLDER": str(tmp_path)}
    with served(folder, command, port, **env) as started:
        yield started


def ask(url: str, data: bytes | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, data, method="GET" if data is None else "PUT")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _listens(url: str) -> bool:
    try:
        ask(f"{url}/health")
    except OSError:
        return False
    return True


def counts(url: str) -> dict[str, float]:
    status, text = ask(f"{url}/metrics")
    assert status == 200
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def end_in_flight(
    server: subprocess.Popen[str], url: str, items: Any, is_ending: Callable[[], bool]
) -> list[tuple[int, str]]:
    """What requests answer that wait for a locked table when SIGTERM comes; and it ends well."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    # What a transaction sees of the activity stays as it was: another connection looks at it.
    with (
        psycopg.connect(items.info.dsn, autocommit=True) as observer,
        ThreadPoolExecutor(IN_FLIGHT) as clients,
    ):
        with items.transaction():
            items.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            asked = [clients.submit(ask, f"{url}/items/{n}") for n in range(IN_FLIGHT)]
            wait_until(
                lambda: observer.execute(waiting).fetchone()[0] == IN_FLIGHT,
                "the requests at the locked table",
            )
            server.send_signal(signal.SIGTERM)
            wait_until(is_ending, "the server's beginning to end")
            assert server.poll() is None
            assert not any(answer.done() for answer in asked)
        answers = [answer.result(PATIENCE) for answer in asked]
    server.wait(PATIENCE)
    assert server.stderr is not None
    assert server.stderr.read() == ""
    assert server.returncode in {0, -signal.SIGTERM}  # uvicorn raises the signal again at its end
    return answers


def _accepts(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError:
        return False
    return True


def test_flask_answers_from_three_servers(flask_service: tuple[Any, str]) -> None:
    _, url = flask_service
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


def test_flask_counts_what_it_did(flask_service: tuple[Any, str]) -> None:
    _, url = flask_service
    found = counts(url)
    assert found["unsync_coroutines_started_total"] >= 1  # it has connected
    assert found["unsync_coroutines_failed_total"] == 0
    assert found["unsync_coroutines_pending"] == 0


def test_flask_loses_nothing_that_is_in_flight_on_sigterm(
    flask_service: tuple[Any, str], items: Any, tmp_path: Path
) -> None:
    # Its workers go on listening while they end, though nobody accepts: its log says when.
    log = tmp_path / "log"
    answers = end_in_flight(
        *flask_service, items, lambda: "Handling signal: term" in log.read_text()
    )
    assert "ERROR" not in log.read_text()
    assert [status for status, _ in answers] == [200] * IN_FLIGHT
    assert [json.loads(text)["name"] for _, text in answers] == [
        f"item {n}" for n in range(IN_FLIGHT)
    ]


def test_fastapi_answers_from_the_database_and_writes_files(
    fastapi_service: tuple[Any, str], tmp_path: Path
) -> None:
    _, url = fastapi_service
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
    fastapi_service: tuple[Any, str], items: Any
) -> None:
    answers = end_in_flight(*fastapi_service, items, lambda: not _accepts(fastapi_service[1]))
    expected = [(200, {"id": n, "name": f"item {n}"}) for n in range(IN_FLIGHT)]
    assert [(status, json.loads(text)) for status, text in answers] == expected


def test_what_is_not_healthy_says_so(fastapi_service: tuple[Any, str], items: Any) -> None:
    _, url = fastapi_service
    items.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    status, text = ask(f"{url}/health")
    assert status == 503
    assert "terminating connection" in json.loads(text)["error"]
    # The pool has put another in its place.
    assert ask(f"{url}/health")[0] == 200
