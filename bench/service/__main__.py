"""Measures real services with each way to call, and writes what came out.

    PYTHONPATH=bench:tests python -m service [--pinned] [--quick] [--only APPLICATION/WAY ...]

PostgreSQL, Redis and another service are started for the while, on loopback, with data of their
own; they are gone afterwards, also on Ctrl-C. Each application runs under its real server; wrk
loads it and checks every response. All share all cores; or, pinned, the server has one core for
itself, and everything else the others. In every round each way has its turn, with a server of its
own, in an order that shifts by one from round to round.

The figures go to `results/services.json` and `services-pinned.json`, the tables and the chart into
the docs: see `tables.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import compare
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from support import databases

from service import running, tables
from service.plan import (
    APPLICATIONS,
    CONNECTIONS,
    ENVIRONMENTS,
    NOTE,
    OURS,
    REPORTED,
    THREADS,
    Row,
)

HERE = Path(__file__).parent
SERIES = ".".join(platform.python_version_tuple()[:2])
WARM_UP = 0.4  # seconds of load before a row is measured

Figures = dict[str, float]


def configurations() -> list[str]:
    return [
        f"{name}/{way}" for name, application in APPLICATIONS.items() for way in application.ways
    ]


def rows_of(application: str, way: str) -> list[Row]:
    rows = APPLICATIONS[application].rows
    return [row for row in rows if not row.only or way in row.only]


def versions(python: Path) -> dict[str, str]:
    program = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    done = subprocess.run(
        [python, "-c", program, *REPORTED], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def turn(
    application: str,
    way: str,
    python: Path,
    variables: dict[str, str],
    seconds: float,
    core: int | None,
    log: Path,
) -> tuple[dict[str, Figures], str | None]:
    """Starts the application that calls in this way, and measures each of its rows.

    :returns: the figures, and the error that the server has logged, if any.
    :raises RuntimeError: an answer is not what it should be.
    """
    plan = APPLICATIONS[application]
    port = databases.free_port()
    at = ["--bind", f"127.0.0.1:{port}"] if plan.server[0] == "gunicorn" else ["--port", str(port)]
    chosen = plan.ways[way]
    variables = {
        **variables,
        **chosen.variables,
        "SERVICE_BRIDGE": chosen.bridge,
        "SERVICE_THREADS": str(THREADS),
        "UNSYNC_NO_EXTENSIONS": "",
    }
    *server, target = plan.server
    command = [str(python), "-m", *server, *at, target]
    found: dict[str, Figures] = {}
    with running.served(command, port, log, variables, core) as service:
        for row in rows_of(application, way):
            status, body = service.ask(row.path)
            if status != 200 or json.loads(body) != row.expected:
                said = log.read_text(errors="replace")
                raise RuntimeError(f"{row.path} answers {status}, {body.decode()}\n{said}")
            warm_up = min(WARM_UP, seconds)
            running.load(service, row.path, body.decode(), CONNECTIONS, warm_up)
            found[row.name] = running.measure(
                service, row.path, body.decode(), CONNECTIONS, seconds
            )
    said = log.read_text(errors="replace")
    return found, logged_error(said)


def logged_error(said: str) -> str | None:
    """The last line of the first traceback in a log, or the first error without one."""
    _, begun, after = said.partition("Traceback (most recent call last):\n")
    if begun:
        return next(line for line in after.splitlines() if not line.startswith(" "))
    return next((line for line in said.splitlines() if "ERROR" in line), None)


def summary(rounds: list[Figures]) -> dict[str, Any]:
    """The median of each kind of figure; all errors."""
    cell: dict[str, Any] = {
        kind: statistics.median(each[kind] for each in rounds) for kind in rounds[0]
    }
    return {**cell, "errors": sum(each["errors"] for each in rounds), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a rough picture, in a few minutes")
    parser.add_argument("--rounds", type=int, help="turns of each way; 3, quick 1")
    parser.add_argument("--seconds", type=float, help="that a row is measured for; 2.5, quick 1")
    parser.add_argument("--only", nargs="+", choices=configurations(), metavar="APPLICATION/WAY")
    parser.add_argument("--pinned", action="store_true", help="the server has a core for itself")
    parser.add_argument("--unfrozen", action="store_true", help="servers start without gc.freeze()")
    parser.add_argument("--environments", type=Path, default=compare.CHECKOUT / ".venv-bench")
    parser.add_argument("--python", type=Path, help="has all packages; no environment is made")
    parser.add_argument("--output", type=Path, help="a JSON file instead of the one in results/")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    seconds = options.seconds or (1 if options.quick else 2.5)
    wanted = [each.split("/") for each in options.only or configurations()]
    reason = running.missing()
    if reason is not None:
        sys.exit(reason)

    console = Console(stderr=True)
    samples: dict[str, dict[str, dict[str, list[Figures]]]] = {}
    failed: dict[str, str] = {}
    complaints: dict[str, str] = {}  # of the others' servers; ours must have none
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=console))
        task = progress.add_task("environments", total=rounds * len(wanted))
        pythons: dict[str, Path] = {}
        for application, way in wanted:
            name = APPLICATIONS[application].ways[way].environment
            if name not in pythons:
                made = options.environments / f"{name}-{SERIES}"
                python = options.python or compare.install(made, ENVIRONMENTS[name])
                pythons[name] = python.absolute()  # the servers run in a folder of their own
        core = running.split_cores() if options.pinned else None
        # First: in it, SIGTERM also is an exception, and so everything else ends well.
        found = stack.enter_context(databases.databases())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unsync-services-")))
        (folder / "3.txt").write_bytes(NOTE)
        variables = {
            "POSTGRES_URL": found.postgres,
            "REDIS_URL": found.redis,
            "PRICES_URL": stack.enter_context(running.backend(folder / "backend.log")),
            "NOTES_FOLDER": str(folder),
            "SERVICE_FREEZES": "" if options.unfrozen else "1",
        }
        python = next(iter(pythons.values()))
        subprocess.run(
            [python, "-m", "service.clients.blocking"],
            env={**os.environ, **variables, "PYTHONPATH": str(HERE.parent)},
            check=True,
        )
        for number in range(rounds):
            shift = number % len(wanted)
            for application, way in [*wanted[shift:], *wanted[:shift]]:
                plan = APPLICATIONS[application]
                label = plan.ways[way].label
                progress.update(task, description=f"{number + 1}: {plan.label}: {label}")
                python = pythons[plan.ways[way].environment]
                log = folder / f"{application}-{way}-{number}.log"
                try:
                    figures, error = turn(application, way, python, variables, seconds, core, log)
                    if error is not None:
                        kept = failed if way in OURS else complaints
                        kept[f"{application}/{way}"] = error
                        console.print(f"{plan.label}, {label}: {error}", markup=False)
                except RuntimeError as exc:
                    console.print(f"{plan.label}, {label}: {exc}", markup=False)
                    failed[f"{application}/{way}"] = str(exc)
                    continue
                finally:
                    progress.advance(task)
                for name, figure in figures.items():
                    row = samples.setdefault(application, {}).setdefault(name, {})
                    row.setdefault(way, []).append(figure)

    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": compare.machine(),
        "versions": versions(next(iter(pythons.values()))),
        "rounds": rounds,
        "seconds": seconds,
        "connections": CONNECTIONS,
        "threads": THREADS,
        "pinned": core is not None,
        "frozen": not options.unfrozen,
        "failed": failed,
        "complaints": complaints,
        "services": {
            application: {
                row: {way: summary(figures) for way, figures in ways.items()}
                for row, ways in rows.items()
            }
            for application, rows in samples.items()
        },
    }
    whole = not options.only and not options.quick
    shown = tables.SHARED if core is None else tables.PINNED
    path = options.output or (shown if whole else None)
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"written to {os.path.relpath(path)}")
    for application in results["services"]:
        print(tables.table(results, application))
    if whole:
        print(tables.targets({"reached": results}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
