"""The room with the real servers: it answers, and leaves nothing behind however it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import databases
from support.needs import packages
from support.waiting import PATIENCE

reason = databases.missing()
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    packages("psycopg"),  # without it there are no tests that need the databases
]

PROGRAM = """
import time
from support.databases import databases

with databases() as found:
    print(found.postgres, found.redis, flush=True)
    time.sleep(3600)
"""


def programs_in(folder: Path) -> set[str]:
    """The names of the programs of all processes that work in this folder, or in one in it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            where = os.readlink(process / "cwd")
            name = (process / "comm").read_text().strip()
        except OSError:
            continue  # it ended meanwhile
        # "PATH (deleted)" if somebody removed it.
        if (where + "/").startswith(f"{folder}/"):
            found.add(name)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_servers_and_removes_their_data(
    open_folder: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(open_folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        postgres, redis = process.stdout.readline().split()
        assert postgres.startswith("postgresql://unsync@127.0.0.1:")
        assert redis.startswith("redis://127.0.0.1:")
        (folder,) = open_folder.glob("unsync-databases-*")
        assert programs_in(folder) == {"postgres", "redis-server"}
        process.send_signal(number)
        assert process.wait(PATIENCE) != 0
        assert not folder.exists()
        assert programs_in(folder) == set()
    finally:
        process.kill()
        process.communicate()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="redis-server is not installed"):
        databases.databases().__enter__()
