"""Tables and charts from the figures in `results/`, and whether the targets are reached.

python report.py                  writes them into README and docs
python report.py --check          says which pages show other figures than `results/` has, and which
                                  targets those miss; exit code 1 if there is one
python report.py --targets FILE   prints the targets; exit code 1 if one is missed
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from peers import WAYS
from rows import BY_NAME, GROWTH, GROWTH_LIMIT, LIMITS, ROWS, TARGETS, Target

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
RESULTS = HERE / "results"
MAIN = RESULTS / "cpython-3.13.json"

Results = dict[str, Any]

# README shows these rows, these peers, and the best of the others.
README_ROWS = (
    "coroutine_each",
    "coroutine_fan_out",
    "yielding_fan_out",
    "function_each",
    "function_fan_out",
    "then_each",
    "then_chain",
    "loop_function",
    "loop_coroutine",
    "loop_gather_functions",
    "foreign_64",
    "set_result",
    "producers",
    "pending",
)
README_PEERS = ("unsync", "fallback", "upstream", "stdlib")
OTHERS = ("asgiref", "anyio", "synchronicity", "aiothreads")


def figure(results: Results, mode: str, row: str, peer: str) -> float | None:
    cell = results.get(mode, {}).get(row, {}).get(peer, {})
    value = cell.get("figure")
    return None if value is None else float(value)


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(lines: list[list[str]]) -> str:
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *body]) + "\n"


def label(row: str) -> str:
    found = BY_NAME[row]
    return f"{found.label} ({found.unit})" if found.unit != "µs" else found.label


def table(results: Results, mode: str, peers: list[str]) -> str:
    """All rows that somebody has a figure for; the best of each is bold."""
    lines = [[f"µs per operation, {mode}", *(WAYS[peer].label for peer in peers)]]
    for row in ROWS:
        found = [figure(results, mode, row.name, peer) for peer in peers]
        known = [value for value in found if value is not None]
        if known and row.group != "floors":
            cells = ["-" if value is None else number(value) for value in found]
            best = number(min(known))
            lines.append([label(row.name), *(f"**{c}**" if c == best else c for c in cells)])
    text = markdown(lines)
    floors = [row for row in ROWS if row.group == "floors"]
    values = [(row.label, figure(results, mode, row.name, "stdlib")) for row in floors]
    told = [f"{name} {number(value)}" for name, value in values if value is not None]
    return f"{text}\nFloors: {', '.join(told)}.\n" if told else text


def dashes(results: Results, peers: list[str]) -> str:
    """Why there is no figure, for each peer once."""
    told: list[str] = []
    for peer in peers:
        reasons: dict[str, None] = {}
        for row in ROWS:
            reason = results["pinned"].get(row.name, {}).get(peer, {}).get("reason")
            if reason is not None and row.group != "floors":
                reasons[reason] = None
        if reasons:
            told.append(f"- {WAYS[peer].label}: {'; '.join(reasons)}.")
    return "\n".join(told) + "\n"


def short_table(results: Results) -> str:
    peers = [*README_PEERS]
    lines = [
        [
            "µs per operation, one core",
            *(WAYS[peer].label for peer in peers),
            "best of " + ", ".join(OTHERS),
        ]
    ]
    for row in README_ROWS:
        cells = []
        for peer in peers:
            value = figure(results, "pinned", row, peer)
            cells.append("-" if value is None else number(value))
        others = [figure(results, "pinned", row, peer) for peer in OTHERS]
        known = [value for value in others if value is not None]
        cells.append(number(min(known)) if known else "-")
        cells[0] = f"**{cells[0]}**"
        lines.append([label(row), *cells])
    return markdown(lines)


def caption(results: Results) -> str:
    versions: dict[str, str] = {}
    for peer, found in results["versions"].items():
        if peer not in {"unsync", "fallback", "uvloop", "upstream"}:
            versions.update(found)
        versions.update({name: text for name, text in found.items() if name == "uvloop"})
    told = ", ".join(f"{name} {text}" for name, text in sorted(versions.items()))
    machine = results["machine"]
    return (
        f"Measured on {results['date']} with CPython {results['python']} on {machine['cores']} "
        f"cores of {machine['cpu']}, {machine['system']}; {told}. Medians of "
        f"{results['rounds']} rounds.\n"
    )


def ratio(results: Results, target: Target, mode: str = "pinned") -> float | None:
    ours = figure(results, mode, target.row, target.peer)
    theirs = figure(results, mode, target.other_row or target.row, target.other)
    return None if ours is None or theirs is None else theirs / ours


def verdicts(results: Results) -> list[tuple[str, str, str, bool]]:
    """(what, at least or at most, reached, whether that is enough) for each target."""
    found = []
    for target in TARGETS:
        reached = ratio(results, target)
        what = f"{label(target.row)}: {WAYS[target.peer].label} against "
        what += BY_NAME[target.other_row].label if target.other_row else WAYS[target.other].label
        text = "not measured" if reached is None else f"{reached:.3g}x"
        found.append(
            (what, f"{target.times:.3g}x", text, reached is not None and reached >= target.times)
        )
    for limit in LIMITS:
        value = figure(results, "pinned", limit.row, limit.peer)
        text = "not measured" if value is None else number(value)
        enough = value is not None and value <= limit.most
        found.append((label(limit.row), f"at most {limit.most}", text, enough))
    for kind, measured in results["growth"].get("unsync", {}).items():
        for unit, sizes in measured.items():
            grown = sizes[str(GROWTH[-1])] / sizes[str(GROWTH[0])]
            what = f"{kind}, {unit} per call, {GROWTH[-1]:,} pending against {GROWTH[0]:,}"
            found.append((what, f"at most {GROWTH_LIMIT}x", f"{grown:.2f}x", grown <= GROWTH_LIMIT))
    for row in ROWS:
        # On whichever loop: some rivals are on uvloop, too.
        loops = [figure(results, "unpinned", row.name, peer) for peer in ("unsync", "uvloop")]
        ours = [value for value in loops if value is not None]
        if row.group in {"floors", "costs"} or row.name == "call" or not ours:
            continue
        mine = min(ours)
        rivals = {
            peer: value
            for peer in WAYS
            if peer not in {"unsync", "uvloop", "fallback"}
            if (value := figure(results, "unpinned", row.name, peer)) is not None
        }
        first = min(rivals, key=lambda peer: rivals[peer])
        reached_text = f"{rivals[first] / mine:.2f}x {WAYS[first].label}"
        # Level: within a tenth, which is less than the rounds differ by.
        what = f"{label(row.name)}, unpinned: first, or level with the first"
        found.append((what, "0.9x", reached_text, rivals[first] / mine >= 0.9))
    return found


def targets(results: Results) -> str:
    lines = [["target", "asked", "reached", ""]]
    lines += [
        [what, asked, got, "" if ok else "missed"] for what, asked, got, ok in verdicts(results)
    ]
    return markdown(lines)


def growth_table(results: Results) -> str:
    lines = [["pending calls", *(f"{size:,}" for size in GROWTH)]]
    names = {
        "coroutine": "coroutines",
        "function": "thread functions",
        "chained": "`.then` on each",
    }
    for peer, kinds in results["growth"].items():
        for kind, measured in kinds.items():
            for unit, sizes in measured.items():
                values = [sizes.get(str(size)) for size in GROWTH]
                cells = ["-" if value is None else number(value) for value in values]
                lines.append([f"{WAYS[peer].label}: {names[kind]}, {unit} per call", *cells])
    return markdown(lines)


def fairness_table(results: Results) -> str:
    lines = [["a 1 ms timer is late by (ms)", "median", "most"]]
    for peer, late in results["fairness"].items():
        lines.append([WAYS[peer].label, number(late["median"]), number(late["most"])])
    return markdown(lines)


def series_table() -> str:
    """Ratios to upstream on each Python that was measured."""
    found = {
        path.stem.removeprefix("cpython-"): load(path)
        for path in sorted(RESULTS.glob("cpython-*.json"))
    }
    lines = [["times as fast as unsync 1.4.0", *(f"CPython {series}" for series in found)]]
    for target in TARGETS:
        if target.other == "upstream" and target.peer == "unsync":
            ratios = [ratio(results, target) for results in found.values()]
            cells = ["-" if each is None else f"{each:.1f}" for each in ratios]
            lines.append([label(target.row), *cells])
    return markdown(lines)


def insert(text: str, name: str, content: str) -> str:
    """Puts content between the markers `<!-- bench:name -->` and `<!-- /bench:name -->`.

    :raises ValueError: if they are not there.
    """
    begin, end = f"<!-- bench:{name} -->\n", f"<!-- /bench:{name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"there are no markers for bench:{name}")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def pages(results: Results) -> dict[Path, dict[str, str]]:
    """What stands between the markers of each page."""
    everybody = [peer for peer in WAYS if peer in results["versions"]]
    return {
        CHECKOUT / "README.md": {"short": f"{short_table(results)}\n{caption(results)}"},
        CHECKOUT / "docs" / "performance.md": {
            "caption": caption(results),
            "pinned": table(results, "pinned", everybody),
            "unpinned": table(results, "unpinned", everybody),
            "dashes": dashes(results, everybody),
            "growth": growth_table(results),
            "fairness": fairness_table(results),
            "series": series_table(),
        },
    }


def with_figures(path: Path, parts: dict[str, str]) -> tuple[str, str]:
    """The text of a page as it is, and as it would be if it were written anew."""
    text = shown = path.read_text(encoding="utf-8")
    for name, content in parts.items():
        text = insert(text, name, content)
    return shown, text


def write_pages(pages: dict[Path, dict[str, str]]) -> None:
    for path, parts in pages.items():
        path.write_text(with_figures(path, parts)[1], encoding="utf-8")


def check_pages(pages: dict[Path, dict[str, str]], command: str) -> list[str]:
    """Which pages show something else than they would if the command wrote them anew."""
    return [
        f"{path.relative_to(CHECKOUT)} does not show what was measured: run `{command}`"
        for path, parts in pages.items()
        if len({*with_figures(path, parts)}) > 1
    ]


def check(results: Results) -> list[str]:
    """What is wrong with the pages and the figures in them."""
    missed = [
        f"{what}: {reached}, asked was {asked}"
        for what, asked, reached, enough in verdicts(results)
        if not enough
    ]
    return [*check_pages(pages(results), "python bench/report.py"), *missed]


# The chart: one line for each row, a mark for each way, on a scale on which equal steps are equal
# ratios. Greys and hues that are readable on white and on black, and no ground of its own.

INK = "#768390"
MARKS = {
    "unsync": ("#2f81f7", "o"),
    "fallback": ("#57ab5a", "s"),
    "upstream": ("#e5534b", "X"),
    "stdlib": ("#c69026", "D"),
    "others": ("#a371f7", "^"),
}


def chart(results: Results, path: Path) -> None:
    lines = []
    for row in README_ROWS:
        if BY_NAME[row].unit == "µs":
            others = [figure(results, "pinned", row, peer) for peer in (*OTHERS, "to_thread")]
            points = {peer: figure(results, "pinned", row, peer) for peer in README_PEERS}
            points["others"] = min((value for value in others if value is not None), default=None)
            lines.append((BY_NAME[row].label.replace("`", ""), points))
    names = {peer: "best other" if peer == "others" else WAYS[peer].label for peer in MARKS}
    marks = {names[peer]: (*MARKS[peer], 9 if peer == "unsync" else 7) for peer in MARKS}
    draw(
        [
            (label, {names[peer]: value for peer, value in points.items()})
            for label, points in lines
        ],
        marks,
        "microseconds per operation, one core (to the left is faster)",
        path,
    )


def draw(
    lines: list[tuple[str, dict[str, float | None]]],
    marks: dict[str, tuple[str, str, int]],
    unit: str,
    path: Path,
) -> None:
    """Lines with a name and a value for each mark, of which there is colour, shape and size."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "unsync"
    figure_, axes = plt.subplots(figsize=(9, 0.4 * len(lines)))
    for height, (_, points) in enumerate(reversed(lines)):
        known = [value for value in points.values() if value is not None]
        axes.hlines(height, min(known), max(known), color=INK, linewidth=1, alpha=0.5)
        for name, value in points.items():
            if value is not None:
                colour, mark, size = marks[name]
                axes.plot(value, height, mark, color=colour, markersize=size)
    axes.set_xscale("log")
    axes.set_yticks(range(len(lines)), [label for label, _ in reversed(lines)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(unit, color=INK)
    axes.tick_params(colors=INK, which="both", length=0)
    axes.grid(axis="x", color=INK, alpha=0.25)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for name, (colour, mark, _) in marks.items():
        axes.plot([], [], mark, color=colour, label=name)
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.3, 1.0),
        ncols=min(5, len(marks)),
        frameon=False,
        labelcolor=INK,
    )
    figure_.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure_)


def load(path: Path) -> Results:
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--targets", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.targets:
        results = load(options.targets)
        print(targets(results))
        sys.exit(not all(ok for *_, ok in verdicts(results)))
    results = load(MAIN)
    if options.check:
        sys.exit("\n".join(check(results)) or 0)
    write_pages(pages(results))
    chart(results, CHECKOUT / "docs" / "benchmark.svg")


if __name__ == "__main__":
    main()
