"""Real PostgreSQL and Redis for the while: own data, loopback, free ports; nothing stays behind.

    with databases() as found:
        print(found.postgres, found.redis)

The servers are those of the machine (on Debian, the packages `postgresql` and `redis-server`).
They end with the block: also when Ctrl-C or SIGTERM ends it, if that is in the main thread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for a server to start or to end

# How a reason ends to skip what a package of the system would run, which `.ci/databases` installs.
NOT_INSTALLED = "is not installed on this system"


@dataclass(frozen=True)
class Databases:
    """Where the servers are.

    Attributes:
        postgres: the URL of an empty database whose owner needs no password.
        redis: the URL of an empty Redis.
    """

    postgres: str
    redis: str


def missing() -> str | None:
    """Why the servers cannot be started here, or None."""
    if os.name != "posix":
        return "the servers are started on POSIX alone"
    if shutil.which("redis-server") is None:
        return f"redis-server {NOT_INSTALLED}"
    if _postgres_folder() is None:
        return f"postgresql {NOT_INSTALLED}"
    if os.geteuid() == 0 and _unprivileged() is None:
        return "PostgreSQL refuses root, and there is no user postgres"
    return None


@contextlib.contextmanager
def databases() -> Iterator[Databases]:
    """Starts the servers, and stops them at the end of the block.

    :raises RuntimeError: a server is not installed, or did not start: its log is in the message.
    """
    with _folder() as folder, _redis(folder) as redis, _postgres(folder) as postgres:
        yield Databases(postgres, redis)


@contextlib.contextmanager
def redis_alone() -> Iterator[str]:
    """Starts Redis, whose URL it gives, and stops it at the end of the block.

    :raises RuntimeError: as for `databases()`.
    """
    with _folder() as folder, _redis(folder) as redis:
        yield redis


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where the servers have their data; SIGTERM, too, ends the block as it should."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    with (
        _sigterm_is_an_exception(),
        tempfile.TemporaryDirectory(prefix="unsync-databases-") as folder,
    ):
        yield Path(folder)


@contextlib.contextmanager
def server(
    command: list[str],
    stop: signal.Signals,
    is_ready: Callable[[], bool],
    log: Path,
    **options: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """Any server, from when it is ready to the end of the block, which the signal `stop` asks for.

    In a session of its own: Ctrl-C at the terminal is for us, and we tell it when to end.

    :raises RuntimeError: it did not start: its log is in the message.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
    try:
        until = time.monotonic() + PATIENCE
        while not is_ready():
            if process.poll() is not None or time.monotonic() > until:
                said = log.read_text(errors="replace")
                raise RuntimeError(f"{command} did not start:\n{said}")
            time.sleep(0.01)
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A port of the loopback that nobody listens at, and that nobody else is given.

    It stays bound, and with that reserved, until this process ends. On Linux a server that sets
    SO_REUSEADDR, as those of today all do, can bind it nevertheless, since the socket here does
    not listen. Elsewhere it cannot, and the port is free for everybody from now on.
    """
    with contextlib.ExitStack() as stack:
        probe = stack.enter_context(socket.socket())
        if sys.platform == "linux":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            atexit.register(stack.pop_all().close)
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def _sigterm_is_an_exception() -> Iterator[None]:
    """By default it ends a process at once, and what it had started stays."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    by_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not by_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _redis(folder: Path) -> Iterator[str]:
    port = free_port()
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]

    def is_ready() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    nothing_saved = ["--save", "", "--appendonly", "no"]
    with server([*command, *nothing_saved], signal.SIGTERM, is_ready, folder / "redis.log"):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    binaries = _postgres_folder()
    assert binaries is not None
    data, port = folder / "postgres", free_port()
    data.mkdir(mode=0o700)
    who: dict[str, Any] = {"cwd": data}
    if os.geteuid() == 0:
        user = _unprivileged()
        assert user is not None
        os.chown(data, *user)
        folder.chmod(0o711)  # so that it comes through to its own
        who |= {"user": user[0], "group": user[1], "extra_groups": []}
    made = subprocess.run(
        [
            *(str(binaries / "initdb"), "--pgdata", str(data), "--username", "unsync"),
            *("--auth", "trust"),
            *("--encoding", "UTF8", "--locale", "C", "--no-sync"),
        ],
        **who,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if made.returncode:
        raise RuntimeError(f"initdb failed with {made.returncode}:\n{made.stdout}{made.stderr}")
    command = [str(binaries / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port)]
    for setting in ("fsync=off", "unix_socket_directories=", "max_connections=200"):
        command += ["-c", setting]

    def is_ready() -> bool:
        asked = [str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        return subprocess.run(asked, start_new_session=True).returncode == 0

    # SIGINT is its fast shutdown, which waits for no client.
    with server(command, signal.SIGINT, is_ready, folder / "postgres.log", **who):
        yield f"postgresql://unsync@127.0.0.1:{port}/postgres"


def _postgres_folder() -> Path | None:
    """Where initdb and postgres are: Debian keeps them off the PATH, one folder a version."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    complete = [folder for folder in folders if (folder / "initdb").exists()]
    return max(complete, key=lambda folder: float(folder.parent.name), default=None)


def _unprivileged() -> tuple[int, int] | None:
    import pwd

    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        return None
    return user.pw_uid, user.pw_gid
