"""Measures all peers side by side, and writes what came out.

    python compare.py [--quick] [--rounds N] [--peers NAME ...] [--rows NAME ...] [--pinned-only]

Each peer has a virtual environment of its own, made on first use, and each of its runs a process
of its own. In every round each peer has its turn, in an order that shifts by one from round to
round, so that a machine that speeds up or slows down favours nobody. First pinned to one core,
where the cost of the software shows, then unpinned, where the wakeup of an idle core counts more.

The figures go to `results/`, the tables and the charts into README and docs: see `report.py`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import report
from peers import WAYS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rows import BY_NAME, GROWTH

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
CPU = 0
# A peer that takes longer than this for one pass over the rows hangs.
PATIENCE = 300
GROWING = {"unsync": GROWTH[-1], "fallback": GROWTH[-1], "upstream": 100_000}
FAIR = ("unsync", "uvloop", "fallback", "upstream", "stdlib")

Samples = dict[str, dict[str, list[dict[str, Any]]]]


def install(home: Path, requirements: tuple[str, ...]) -> Path:
    """The Python of a virtual environment, which is made if there is none yet."""
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    others = [each for each in requirements if each != "."]
    if others:
        subprocess.run([*command, *others], check=True)
    if "." in requirements:
        # Anew each time: it may have changed.
        anew = ["--force-reinstall", "--no-deps", str(CHECKOUT)]
        subprocess.run([*command, *anew], check=True)
    return python


def run(python: Path, peer: str, script: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines of JSON that a script printed; those it managed to print, if it hung or failed."""
    command = [str(python), str(HERE / script), peer, *arguments]
    variables = {"UNSYNC_NO_EXTENSIONS": "", **WAYS[peer].variables}
    environ = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            cwd=HERE,
            env={**environ, **variables},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as exc:
        output = exc.stdout or b""
        text = output.decode() if isinstance(output, bytes) else output
        return [*map(json.loads, text.splitlines()), {"error": f"no end after {PATIENCE} s"}]
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        lines.append({"error": f"exit code {done.returncode}: {' '.join(last)}"})
    return lines


def summary(samples: Samples) -> dict[str, dict[str, dict[str, Any]]]:
    """For each row and peer the median over the rounds, or why there is no figure."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for row, peers in samples.items():
        for peer, found in peers.items():
            figures = [each["figure"] for each in found if "figure" in each]
            cell: dict[str, Any]
            if figures:
                cell = {"figure": statistics.median(figures), "rounds": figures}
            else:
                cell = {"reason": found[0].get("reason", "failed")}
            table.setdefault(row, {})[peer] = cell
    return table


def machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a rough picture, in a few minutes")
    parser.add_argument("--rounds", type=int, help="of each kind; 3, quick 1")
    parser.add_argument("--peers", nargs="+", choices=WAYS, default=list(WAYS), metavar="PEER")
    parser.add_argument("--rows", nargs="+", choices=BY_NAME, default=[], metavar="ROW")
    parser.add_argument("--pinned-only", action="store_true")
    parser.add_argument("--environments", type=Path, default=CHECKOUT / ".venv-bench")
    parser.add_argument("--output", type=Path, help="a JSON file instead of the one in results/")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    arguments = ["--seconds", "0.05", "--share", "0.3"] if options.quick else []
    can_pin = hasattr(os, "sched_setaffinity")
    modes = (["pinned"] if can_pin else []) + ([] if options.pinned_only else ["unpinned"])
    whole = not options.rows and not options.quick

    console = Console(stderr=True)
    samples: dict[str, Samples] = {mode: {} for mode in modes}
    versions: dict[str, dict[str, str]] = {}
    growth: dict[str, Any] = {}
    fairness: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    turns = [(mode, number) for mode in modes for number in range(rounds)]
    extras = [peer for peer in (*GROWING, *FAIR) if peer in options.peers] if whole else []
    with Progress(*columns, console=console) as progress:
        steps = len(options.peers) * (1 + len(turns)) + len(extras)
        task = progress.add_task("", total=steps)

        def begin(what: str) -> None:
            progress.update(task, description=what)

        pythons: dict[str, Path] = {}
        for peer in options.peers:
            begin(f"environment for {WAYS[peer].label}")
            pythons[peer] = install(options.environments / peer, WAYS[peer].requirements)
            progress.advance(task)
        for mode, number in turns:
            cpu = ["--cpu", str(CPU)] if mode == "pinned" else []
            shift = number % len(options.peers)
            for peer in [*options.peers[shift:], *options.peers[:shift]]:
                begin(f"{mode}, round {number + 1}: {WAYS[peer].label}")
                lines = run(pythons[peer], peer, "measure.py", *options.rows, *arguments, *cpu)
                for line in lines:
                    if "row" in line:
                        row = samples[mode].setdefault(line["row"], {})
                        row.setdefault(peer, []).append(line)
                    elif "versions" in line:
                        versions[peer] = line["versions"]
                    else:
                        console.print(f"{WAYS[peer].label}, {mode}: {line['error']}")
                progress.advance(task)
        cpu = ["--cpu", str(CPU)] if can_pin else []
        if whole:
            for peer, most in GROWING.items():
                if peer in options.peers:
                    begin(f"growth: {WAYS[peer].label}")
                    lines = run(pythons[peer], peer, "growth.py", *cpu, "--most", str(most))
                    growth[peer] = lines[0]
                    progress.advance(task)
            for peer in FAIR:
                if peer in options.peers:
                    begin(f"fairness: {WAYS[peer].label}")
                    fairness[peer] = run(pythons[peer], peer, "fairness.py", *cpu)[0]
                    progress.advance(task)

    results = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": machine(),
        "versions": versions,
        "rounds": rounds,
        "growth": growth,
        "fairness": fairness,
        **{mode: summary(found) for mode, found in samples.items()},
    }
    series = ".".join(platform.python_version_tuple()[:2])
    path = options.output or (report.RESULTS / f"cpython-{series}.json" if whole else None)
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"written to {os.path.relpath(path)}")
    for mode in modes:
        print(report.table(results, mode, [peer for peer in WAYS if peer in options.peers]))
    if whole:
        print(report.targets(results))


if __name__ == "__main__":
    main()
