"""What tests of services share: servers in processes of their own, and clients that ask them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.waiting import PATIENCE, wait_until

import unsync

Answer = tuple[int, str]  # status and body


@dataclass
class Server:
    """A process that serves, and where; it has answered already."""

    process: subprocess.Popen[str]
    url: str

    def end(self) -> str:
        """Waits for the end after a SIGTERM, which is to be a good one; what it said."""
        errors: str
        _, errors = self.process.communicate(timeout=PATIENCE)
        # uvicorn raises the signal again at its end.
        assert self.process.returncode in {0, -signal.SIGTERM}, errors
        return errors


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    """A socket that the test holds open, as systemd would, for one server after the other."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        yield listener


@contextlib.contextmanager
def served(
    folder: Path,
    command: list[str],
    port: int,
    listener: socket.socket | None = None,
    path: str = "/health",
    **env: str,
) -> Iterator[Server]:
    """`python *command` in that folder, from its first answer on, to the end of the block.

    :param listener: given to the process, as the descriptor that it has here.
    :param path: asked for until there is an answer, whatever it is.
    """
    url = f"http://127.0.0.1:{port}"
    here = str(Path(unsync.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | env | {"PYTHONPATH": os.pathsep.join([here, str(folder)])},
        pass_fds=[] if listener is None else [listener.fileno()],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: process.poll() is not None or _answers(url + path), "the server's start")
        assert process.poll() is None, "the server ended at once"
        yield Server(process, url)
    finally:
        if process.stderr is not None and not process.stderr.closed:
            process.terminate()
            try:
                _, errors = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                _, errors = process.communicate()
            print(errors)


def ask(url: str, data: bytes | None = None) -> Answer:
    request = urllib.request.Request(url, data, method="GET" if data is None else "PUT")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _answers(url: str) -> bool:
    """To be asked again after a moment, so that waiting for an answer is no work."""
    try:
        ask(url)
    except OSError:
        time.sleep(0.02)
        return False
    return True


def accepts(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError:
        return False
    return True


class Load:
    """Clients that ask and ask, each request over a connection of its own.

    A request is lost if there was a connection, and yet no whole and right answer.

    :param path: what the request of this number asks for.
    :param is_right: whether that is its answer.
    """

    CLIENTS = 24
    LIMIT = 20_000  # requests, so that there is an end to it in any case

    def __init__(
        self, port: int, path: Callable[[int], str], is_right: Callable[[int, Answer], bool]
    ) -> None:
        self._port = port
        self._path = path
        self._is_right = is_right
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._numbers = iter(range(self.LIMIT))
        self.answered = 0
        self.refused = 0
        self.lost: list[str] = []

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """The clients ask while the block runs; at its end each has its last answer."""
        clients = [threading.Thread(target=self._client) for _ in range(self.CLIENTS)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._ended.set()
            for client in clients:
                client.join(PATIENCE)
        assert not any(client.is_alive() for client in clients)

    def wait_for_more(self, count: int) -> None:
        """Waits for so many more right answers, and for none if a request was lost."""
        before = self.answered
        wait_until(lambda: self.lost or self.answered >= before + count, f"{count} more answers")

    def _client(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
            try:
                connection.connect()
            except ConnectionRefusedError:
                with self._lock:
                    self.refused += 1
                return
            except ConnectionResetError as error:  # the socket was closed before it came to this
                problem: str | None = f"{number}: {error!r}"
            else:
                with contextlib.closing(connection):
                    problem = self._problem(connection, number)
            with self._lock:
                if problem is None:
                    self.answered += 1
                else:
                    self.lost.append(problem)

    def _problem(self, connection: http.client.HTTPConnection, number: int) -> str | None:
        try:
            connection.request("GET", self._path(number))
            response = connection.getresponse()
            answer = response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return f"{number}: {error!r}"
        return None if self._is_right(number, answer) else f"{number}: {answer}"


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # with five, clients that come at once try again after a second


class Prices:
    """The other service: the price of an item is ten times its number.

    It can be made to wait, except for item 0, which health checks ask for; and to be not well.
    """

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.is_well = True
        self.asked: Counter[int] = Counter()
        self._lock = threading.Lock()

    def price(self, number: int) -> int:
        if number != 0:
            with self._lock:
                self.asked[number] += 1
            assert self.open.wait(PATIENCE)
        return 10 * number

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        prices = self

        class Price(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(prices.price(int(self.path[1:]))).encode()
                self.send_response(200 if prices.is_well else 500)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        with _Server(("127.0.0.1", 0), Price) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                self.open.set()
                server.shutdown()
                thread.join(PATIENCE)
