"""The benchmark of real services: what it gives, that it checks what it times, and that it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import databases
from support.needs import packages, skip_without
from support.waiting import PATIENCE, wait_until
from test_databases import programs_in

import unsync

CHECKOUT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(CHECKOUT / "bench"))
from service import plan, running, tables  # noqa: E402

reason = running.missing()
pytestmark = [pytest.mark.once, packages("psycopg_pool", "rich", "urllib3")]
needs_servers = pytest.mark.skipif(reason is not None, reason=str(reason))
KINDS = {"throughput", "median", "p99", "cpu", "memory", "errors"}


def command(output: Path, *arguments: str) -> list[str]:
    # All packages are here: no environment is made.
    briefly = ("--python", sys.executable, "--rounds", "1", "--seconds", "0.2")
    return [sys.executable, "-m", "service", *briefly, "--output", str(output), *arguments]


def environ(**more: str) -> dict[str, str]:
    # The package itself is found as these tests found it, installed or in the checkout.
    places = [CHECKOUT / "bench", CHECKOUT / "tests", Path(unsync.__file__).parent.parent]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))} | more


@needs_servers
def test_every_row_has_each_figure_and_no_errors(tmp_path: Path) -> None:
    skip_without("aiohttp", "asyncpg", "fastapi", "flask", "gunicorn", "redis", "uvicorn")
    output = tmp_path / "services.json"
    done = subprocess.run(
        command(output, "--only", "flask/unsync", "fastapi/unsync"),
        env=environ(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert results["failed"] == {}
    measured = results["services"]
    assert set(measured) == {"flask", "fastapi"}
    for application, cells in measured.items():
        rows = plan.APPLICATIONS[application].rows
        assert set(cells) == {row.name for row in rows if not row.only}
        for (way, cell), *others in (ways.items() for ways in cells.values()):
            assert (way, others) == ("unsync", [])
            assert set(cell) == KINDS | {"rounds"}
            assert cell["errors"] == 0
            assert all(cell[kind] > 0 for kind in KINDS - {"errors", "cpu"})
            assert cell["median"] <= cell["p99"]
    assert "| unsync |" in done.stdout


def processes_with(mark: str) -> set[str]:
    """The first words of the command lines of all processes whose variable MARK has this value."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command_line = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if f"MARK={mark}".encode() in variables:
            found.add(command_line[0].decode(errors="replace"))
    return found


def is_under_load(mark: str) -> bool:
    """Whether wrk runs; to be asked again after a moment, so that waiting is no work."""
    found = "wrk" in processes_with(mark)
    if not found:
        time.sleep(0.1)
    return found


@needs_servers
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_servers_and_removes_their_data(
    open_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    skip_without("fastapi", "redis", "uvicorn")
    mark = str(open_folder)
    process = subprocess.Popen(
        [*command(tmp_path / "json", "--only", "fastapi/unsync"), "--seconds", "600"],
        env=environ(TMPDIR=mark, MARK=mark),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: is_under_load(mark) or process.poll() is not None, "the load")
        assert programs_in(open_folder) >= {"postgres", "redis-server"}
        process.send_signal(number)
        assert process.wait(PATIENCE) != 0
        # They were told to end. Left alone, the load would go on for ten minutes.
        wait_until(lambda: not processes_with(mark), "the end of the load and the servers")
        assert programs_in(open_folder) == set()
        assert not list(open_folder.iterdir())
        assert not (tmp_path / "json").exists()
    finally:
        process.terminate()
        process.wait(PATIENCE)


@needs_servers
def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    port = databases.free_port()
    server = [sys.executable, "-m", "service.backend", str(port)]
    with running.served(server, port, tmp_path / "log", {}) as service:
        right = running.load(service, "/3", "value 3", 4, 0.1)
        wrong = running.load(service, "/3", "value 4", 4, 0.1)
    assert right["requests"] > 0
    assert right["errors"] == 0
    assert 0 < wrong["requests"] <= wrong["errors"]


@needs_servers
def test_a_server_that_does_not_start_is_shown(tmp_path: Path) -> None:
    server = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with (
        pytest.raises(RuntimeError, match="no such thing"),
        running.served(server, databases.free_port(), tmp_path / "log", {}),
    ):
        pass


def cell(throughput: float, **more: float) -> dict[str, float]:
    others = {"median": 1.0, "p99": 2.0, "cpu": 100.0, "memory": 50.0, "errors": 0}
    return {"throughput": throughput, **others, **more}


def results(**ways: dict[str, float]) -> dict[str, Any]:
    return {"services": {"flask": {"several": ways}}, "complaints": {}}


def missed(measured: dict[str, Any]) -> set[str]:
    where = "Flask, gunicorn gthread, ten GETs, ten calls at once: "
    return {
        what.removeprefix(where)
        for what, _, reached, enough in tables.verdicts(measured)
        if not enough and reached != "not measured"
    }


def test_a_target_is_missed_where_somebody_is_before_us() -> None:
    ours = {"unsync": cell(100), "uvloop": cell(150)}
    assert missed(results(**ours, upstream=cell(100), asgiref=cell(15))) == set()
    assert missed(results(**ours, upstream=cell(101), asgiref=cell(16))) == {
        "unsync on uvloop against unsync 1.4.0",
        "unsync on uvloop against asgiref",
    }
    better = cell(160, p99=1.7, cpu=90, memory=40)
    assert missed(results(**ours, anyio=better)) == {
        "throughput",
        "99th percentile",
        "CPU per request",
        "memory",
    }
    assert missed(results(**ours, anyio=cell(152, p99=1.9, cpu=99, memory=49))) == set()
    assert missed(results(**ours, anyio=cell(1, errors=2))) == {"wrong or missing responses"}


def test_the_best_of_each_kind_is_bold() -> None:
    text = tables.table(results(unsync=cell(200), asgiref=cell(100, p99=1.5)), "flask")
    assert "| unsync | **200** | **1.00** | 2.00 | **100** | **50.0** | 0 |" in text
    assert "| asgiref | 100 | **1.00** | **1.50** | **100** | **50.0** | 0 |" in text


def test_what_the_server_of_another_way_logs_is_told() -> None:
    said = """Not Found: /
ERROR:    Exception in ASGI application
Traceback (most recent call last):
  File "a.py", line 1, in b
    c()
RuntimeError: it is broken
"""
    # With all that it measures: the others need no more than the tables.
    from service import __main__ as service_main

    assert service_main.logged_error(said) == "RuntimeError: it is broken"
    assert service_main.logged_error("x\nERROR: not so good\n") == "ERROR: not so good"
    assert service_main.logged_error("Not Found: /\n") is None
    measured = results(unsync=cell(200), asgiref=cell(100))
    measured["complaints"] = {"flask/asgiref": "RuntimeError: it is broken"}
    text = tables.table(measured, "flask")
    assert text.endswith("\nWith asgiref the server logged: `RuntimeError: it is broken`\n")


def test_every_target_names_what_exists() -> None:
    for target in plan.TARGETS:
        application = plan.APPLICATIONS[target.application]
        assert target.row in {row.name for row in application.rows}
        assert {target.way, target.other} <= set(application.ways)
    for application in plan.APPLICATIONS.values():
        for way in application.ways.values():
            assert way.environment in plan.ENVIRONMENTS
            assert (CHECKOUT / "bench" / "service" / "bridges" / f"{way.bridge}.py").exists()
