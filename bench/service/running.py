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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import databases

HERE = Path(__file__).parent
PATIENCE = 30.0  # seconds for a server to start or to end
GRACE = 10.0  # what wrk may take beyond the time it loads for
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    if not Path("/proc/self/smaps_rollup").exists():
        return "what a server costs is read from Linux's /proc"
    if shutil.which("wrk") is None:
        return "wrk is not installed"
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
        log: the file with all it said.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def family(self) -> list[int]:
        """The ids of its processes."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                parent = int(_after_name(path)[1])
                children.setdefault(parent, []).append(int(path.parent.name))
        found = [self.process.pid]
        for each in found:
            found += children.get(each, [])
        return found

    def cpu_seconds(self) -> float:
        ticks = 0
        for each in self.family():
            fields = _after_name(Path(f"/proc/{each}/stat"))
            ticks += int(fields[11]) + int(fields[12])  # in user mode, and in the kernel
        return ticks / TICK

    def memory(self) -> int:
        """Bytes in memory; what several processes share counts once."""
        total = 0
        for each in self.family():
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def ask(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def _after_name(path: Path) -> list[str]:
    """The fields of /proc/PID/stat from the third on: the name may have spaces in it."""
    return path.read_text().rpartition(")")[2].split()


@contextlib.contextmanager
def served(
    command: list[str], port: int, log: Path, variables: dict[str, str], core: int | None = None
) -> Iterator[Service]:
    """The command's server, from when it listens on; it ends with the block.

    :raises RuntimeError: it did not start, or did not end well: what it said is in the message.
    """
    on_core = [] if core is None else ["taskset", "--cpu-list", str(core)]
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C at the terminal is for us, who tell it when to end.
        process = subprocess.Popen(
            [*on_core, *command],
            cwd=HERE / "applications",
            env={**environ, "PYTHONPATH": str(HERE.parent), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(f"http://127.0.0.1:{port}", process, log)
    try:
        until = time.monotonic() + PATIENCE
        while not _listens(service):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.02)
        yield service
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _listens(service: Service) -> bool:
    try:
        service.ask("/")
    except OSError:
        return False
    return True


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
    command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", "1m"]
    command += ["--timeout", f"{PATIENCE:.0f}s", "--script", str(HERE / "check.lua")]
    command += [service.url + path, "--", body]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as wrk:
        try:
            time.sleep(seconds)  # it counts in whole seconds itself, and ends well on SIGINT
            wrk.send_signal(signal.SIGINT)
            said, _ = wrk.communicate(timeout=GRACE)
        finally:
            wrk.kill()
    if wrk.returncode:
        raise RuntimeError(f"wrk failed:\n{said}")
    return json.loads(said.splitlines()[-1])


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
        "memory": service.memory() / 1e6,
        "errors": found["errors"],
    }
