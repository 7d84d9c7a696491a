"""Tables and chart of the services, and whether the targets are reached.

PYTHONPATH=bench python -m service.tables                   writes them into the docs
PYTHONPATH=bench python -m service.tables --check           says if the page shows other figures
                                                            than `results/` has; exit code 1 then
PYTHONPATH=bench python -m service.tables --targets FILE    prints the targets; exit code 1 if one
                                                            is missed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
from report import Results, markdown, number

from service.plan import APPLICATIONS, NOISE, OURS, TARGETS

SHARED = report.RESULTS / "services.json"
PINNED = report.RESULTS / "services-pinned.json"
PAGE = report.CHECKOUT / "docs" / "services.md"
CHART = report.CHECKOUT / "docs" / "services.svg"

# What is shown of each row, its unit, and whether more is better.
KINDS = {
    "throughput": ("requests per second", True),
    "median": ("median, ms", False),
    "p99": ("99th percentile, ms", False),
    "cpu": ("CPU, µs per request", False),
    "memory": ("memory, MB", False),
}
NAMES = {
    "throughput": "throughput",
    "p99": "99th percentile",
    "cpu": "CPU per request",
    "memory": "memory",
}


def cell(results: Results, application: str, row: str, way: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = results["services"].get(application, {}).get(row, {}).get(way)
    return found


def figure(results: Results, application: str, row: str, way: str, kind: str) -> float | None:
    found = cell(results, application, row, way)
    return None if found is None else float(found[kind])


def table(results: Results, application: str) -> str:
    """For each row all figures of all ways; the best of each kind is bold."""
    plan = APPLICATIONS[application]
    parts = []
    for row in plan.rows:
        ways = results["services"][application].get(row.name, {})
        if not ways:
            continue
        lines = [[row.label, *(unit for unit, _ in KINDS.values()), "errors"]]
        best = {
            kind: number((max if more else min)(each[kind] for each in ways.values()))
            for kind, (_, more) in KINDS.items()
        }
        for way, chosen in plan.ways.items():
            if way in ways:
                texts = {kind: number(ways[way][kind]) for kind in KINDS}
                marked = [
                    f"**{text}**" if len(ways) > 1 and text == best[kind] else text
                    for kind, text in texts.items()
                ]
                lines.append([chosen.label, *marked, f"{ways[way]['errors']:.0f}"])
        parts.append(markdown(lines))
    parts += [
        f"With {chosen.label} the server logged: `{complaint}`\n"
        for way, chosen in plan.ways.items()
        if (complaint := results["complaints"].get(f"{application}/{way}")) is not None
    ]
    return "\n".join(parts)


def verdicts(results: Results) -> list[tuple[str, str, str, bool]]:
    """(what, at least or at most, reached, whether that is enough) for each target."""
    found = []
    for target in TARGETS:
        plan = APPLICATIONS[target.application]
        values = [
            figure(results, target.application, target.row, way, "throughput")
            for way in (target.way, target.other)
        ]
        label = next(row.label for row in plan.rows if row.name == target.row)
        what = f"{plan.label}, {label}: {plan.ways[target.way].label} against "
        what += plan.ways[target.other].label
        ours, theirs = values
        ratio = None if ours is None or theirs is None else ours / theirs
        text = "not measured" if ratio is None else f"{ratio:.3g}x"
        found.append((what, f"{target.times:.3g}x", text, (ratio or 0) >= target.times))
    for application, plan in APPLICATIONS.items():
        for row in plan.rows:
            for kind, what in NAMES.items():
                verdict = _against_the_best(results, application, row.name, kind)
                if verdict is not None:
                    where = f"{plan.label}, {row.label}: {what}"
                    found.append((where, *verdict))
    errors = sum(
        each["errors"]
        for rows in results["services"].values()
        for ways in rows.values()
        for each in ways.values()
    )
    found.append(("wrong or missing responses", "none", f"{errors:.0f}", not errors))
    return found


def _against_the_best(
    results: Results, application: str, row: str, kind: str
) -> tuple[str, str, bool] | None:
    """Ours, on whichever loop, against the best peer; None if one of them was not measured."""
    plan = APPLICATIONS[application]
    known = {
        way: value
        for way in plan.ways
        if (value := figure(results, application, row, way, kind)) is not None
    }
    ours = [way for way in OURS if way in known]
    peers = [way for way in known if way not in OURS and plan.ways[way].is_peer]
    if not ours or not peers:
        return None
    more = KINDS[kind][1]
    order: Callable[..., str] = max if more else min
    mine, first = order(ours, key=known.__getitem__), order(peers, key=known.__getitem__)
    ratio = known[mine] / known[first] if more else known[first] / known[mine]
    least = 1 / NOISE[kind]
    return f"{least:.2f}x", f"{ratio:.2f}x {plan.ways[first].label}", ratio >= least


def targets(measured: dict[str, Results]) -> str:
    """:param measured: the results, by the head of their column."""
    lines = [["target", "asked", *measured]]
    for several in zip(*map(verdicts, measured.values()), strict=True):
        what, asked, *_ = several[0]
        reached = [got if enough else f"{got}: missed" for _, _, got, enough in several]
        lines.append([what, asked, *reached])
    return markdown(lines)


def caption(results: Results) -> str:
    machine = results["machine"]
    told = ", ".join(f"{name} {text}" for name, text in sorted(results["versions"].items()))
    where = "one of them for the server" if results["pinned"] else "which all processes share"
    heap = "what is made at start frozen" if results["frozen"] else "nothing frozen"
    return (
        f"Measured on {results['date']} with CPython {results['python']} on {machine['cores']} "
        f"cores of {machine['cpu']}, {machine['system']}, {where}, {heap}; {told}. Medians of "
        f"{results['rounds']} rounds of {results['seconds']:g} s, {results['connections']} "
        f"connections, {results['threads']} threads.\n"
    )


def pages(shared: Results, pinned: Results) -> dict[Path, dict[str, str]]:
    """What stands between the markers of the page."""
    parts = {"targets": targets({"cores shared": shared, "a core for the server": pinned})}
    for prefix, results in (("", shared), ("pinned-", pinned)):
        parts[f"{prefix}caption"] = caption(results)
        for application in APPLICATIONS:
            parts[f"{prefix}{application}"] = table(results, application)
    return {PAGE: parts}


# The ways that stand for others in the chart: the colours and shapes are those of `report.py`.
MARKS = {
    "unsync": ("#2f81f7", "o", 9),
    "unsync on uvloop": ("#57ab5a", "s", 7),
    "unsync 1.4.0": ("#e5534b", "X", 7),
    "asgiref": ("#c69026", "D", 7),
    "best other": ("#a371f7", "^", 7),
}


def chart(results: Results) -> None:
    lines: list[tuple[str, dict[str, float | None]]] = []
    for application, plan in APPLICATIONS.items():
        for row in plan.rows:
            points: dict[str, float | None] = {}
            for way, chosen in plan.ways.items():
                value = figure(results, application, row.name, way, "throughput")
                if value is not None and chosen.is_peer:
                    name = chosen.label if chosen.label in MARKS else "best other"
                    points[name] = max(value, points.get(name) or 0.0)
            if len(points) > 1:
                lines.append((f"{plan.label.partition(',')[0]}: {row.label}", points))
    report.draw(lines, MARKS, "requests per second (to the right is faster)", CHART)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--targets", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.targets:
        results = report.load(options.targets)
        print(targets({"reached": results}))
        sys.exit(not all(enough for *_, enough in verdicts(results)))
    shared = report.load(SHARED)
    written = pages(shared, report.load(PINNED))
    if options.check:
        sys.exit("\n".join(report.check_pages(written, "python -m service.tables")) or 0)
    report.write_pages(written)
    chart(shared)


if __name__ == "__main__":
    main()
