"""Servers for the while, the load on them, and what they cost.

All but the server under test runs on the other cores: databases, the other service, wrk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import databases

from service.family import family, memory

HERE = Path(__file__).parent
PATIENCE = 60.0  # seconds for an answer
GRACE = 60.0  # what wrk may take beyond the time it loads for
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    if not Path("/proc/self/smaps_rollup").exists():
        return "what a server costs is read from Linux's /proc"
    if shutil.which("wrk") is None:
        return f"wrk {databases.NOT_INSTALLED}"
    return databases.missing()


def split_cores() -> int | None:
    """Leaves one core, which is given back, to the server under test; None if there is one only."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return None
    os.sched_setaffinity(0, others)
    return first


@dataclass
class Service:
    """A server that runs.

    Attributes:
        url: where it listens.
    """

    url: str
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        ticks = 0
        for each in family(self.process.pid):
            # From the third field on: the name before them may have spaces in it.
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # in user mode, and in the kernel
        return ticks / TICK

    def ask(self, path: str) -> tuple[int, bytes]:
        return _ask(self.url + path)


@contextlib.contextmanager
def served(
    command: list[str], port: int, log: Path, variables: dict[str, str], core: int | None = None
) -> Iterator[Service]:
    """The command's server, from when it listens on; it ends with the block.

    :raises RuntimeError: it did not start: what it said is in the message.
    """
    on_core = [] if core is None else ["taskset", "--cpu-list", str(core)]
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    url = f"http://127.0.0.1:{port}"
    with databases.server(
        [*on_core, *command],
        signal.SIGTERM,
        lambda: _listens(url),
        log,
        cwd=HERE / "applications",
        env={**environ, "PYTHONPATH": str(HERE.parent), **variables},
    ) as process:
        yield Service(url, process)


def _listens(url: str) -> bool:
    try:
        _ask(url)
    except OSError:
        return False
    return True


def _ask(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@contextlib.contextmanager
def backend(log: Path) -> Iterator[str]:
    """The other service that some handlers ask; gives its URL."""
    port = databases.free_port()
    with served([sys.executable, "-m", "service.backend", str(port)], port, log, {}) as service:
        yield service.url


def load(service: Service, path: str, body: str, connections: int, seconds: float) -> Any:
    """Loads the server for so long, and checks each response; what wrk found.

    :raises RuntimeError: wrk failed.
    """
    # Until wrk minds it, a SIGINT must not end it.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    command += ["wrk", "--threads", "1", "--connections", str(connections), "--duration", "1h"]
    command += ["--timeout", f"{PATIENCE:.0f}s", "--script", str(HERE / "check.lua")]
    command += [service.url + path, "--", body]
    release = _hold_signals()  # one that struck in between would leave it to its hour
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as wrk:
        try:
            release()
            time.sleep(seconds)  # it counts in whole seconds itself, and ends well on SIGINT
            said = _interrupt(wrk)
        finally:
            wrk.kill()
    if wrk.returncode:
        raise RuntimeError(f"wrk failed:\n{said}")
    return json.loads(said.splitlines()[-1])


def _hold_signals() -> Callable[[], None]:
    """Has SIGINT and SIGTERM wait until what it gives is called."""
    held: list[int] = []
    former = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }

    def release() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)
        for each in held:
            signal.raise_signal(each)

    return release


def _interrupt(wrk: subprocess.Popen[str]) -> str:
    """What it says in the end.

    It sleeps for as long as it was told to load, and does not say when it has begun to: a SIGINT
    before that stops the load, but not the sleep. So it is told until it has ended.

    :raises subprocess.TimeoutExpired: it did not end in GRACE seconds.
    """
    until = time.monotonic() + GRACE
    while True:
        wrk.send_signal(signal.SIGINT)
        try:
            return wrk.communicate(timeout=0.1)[0]
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                raise


def measure(
    service: Service, path: str, body: str, connections: int, seconds: float
) -> dict[str, float]:
    """One figure of each kind, of a server that is warm.

    :raises RuntimeError: there was no answer, not even in a longer time.
    """
    before = service.cpu_seconds()
    found = load(service, path, body, connections, seconds)
    cpu = service.cpu_seconds() - before
    requests = found["requests"]
    if not requests:
        if seconds > PATIENCE:
            raise RuntimeError(f"{path} was not answered in {seconds:g} s")
        return measure(service, path, body, connections, 4 * seconds)
    return {
        "throughput": requests / found["microseconds"] * 1e6,
        "median": found["median"] / 1e3,
        "p99": found["p99"] / 1e3,
        "cpu": cpu / requests * 1e6,
        "memory": memory(service.process.pid) / 1e6,
        "errors": found["errors"],
    }
