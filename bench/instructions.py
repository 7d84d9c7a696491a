"""What a call takes: instructions, system calls and bytes; alone, or against a commit.

    python bench/instructions.py                    # of the unsync that this Python imports
    python bench/instructions.py --against main     # beside that commit's; 1 if anything is dearer
    python bench/instructions.py --against A --of B # the commit B beside the commit A

Counts depend on nothing else that the machine does, and differ by little from run to run, where
times differ by more than most changes are worth. `counted.py` says what is counted, `NOTES.md` how
repeatable each row is. valgrind counts the instructions of all threads of the process, not those of
the system nor of child processes; strace the system calls of all threads and child processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
# The variable of the environment that picks each core.
CORES = {"compiled": "", "plain": "1"}
TOOLS = {"valgrind": "valgrind", "strace": "strace"}  # and the package of Debian that brings it
RUNS = 3
# More than this share of instructions more is dearer, and more than so many system calls a call:
# how many threads sleep and are woken in a burst is never quite the same.
DEARER = 0.03
MORE_CALLS = 0.1


@dataclass
class Figures:
    """Of one row: what a call took in each run."""

    instructions: list[float] = field(default_factory=list)
    calls: list[dict[str, float]] = field(default_factory=list)
    bytes: float | None = None

    @property
    def cost(self) -> float:
        return statistics.median(self.instructions)

    @property
    def spread(self) -> float:
        """How far the runs are apart, as a share of the cost."""
        return (max(self.instructions) - min(self.instructions)) / self.cost

    @property
    def all_calls(self) -> list[float]:
        return sorted(sum(run.values()) for run in self.calls)

    def by_name(self) -> dict[str, float]:
        names = sorted(set().union(*self.calls))
        return {name: statistics.median(run.get(name, 0.0) for run in self.calls) for name in names}

    def as_json(self) -> dict[str, object]:
        return {
            "instructions": self.instructions,
            "system calls": self.calls,
            "bytes": self.bytes,
        }


Table = dict[str, Figures]


# What there is to count: a folder with the package, built for this Python.


def here() -> Path:
    spec = importlib.util.find_spec("unsync")
    assert spec is not None, "this Python does not find unsync"
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def build(tree: Path) -> None:
    """Compiles the core where that was not done since it changed."""
    if (tree / "setup.py").exists():
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        run(command, cwd=tree, env=os.environ | {"UNSYNC_NO_EXTENSIONS": ""})


def checkout_of(revision: str) -> Path:
    """The checkout of that commit, built; once for each commit and Python."""
    git = ["git", "-C", str(CHECKOUT)]
    commit = run([*git, "rev-parse", "--verify", f"{revision}^{{commit}}"]).strip()
    kind = f"{platform.python_version()}-{sysconfig.get_config_var('SOABI')}"
    tree = CHECKOUT / "build" / "instructions" / f"{commit[:12]}-{kind}"
    if not tree.exists():
        print(f"building {commit[:12]} in {tree}", file=sys.stderr)
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tree.parent) as folder:
            unfinished = Path(folder) / "tree"
            unfinished.mkdir()
            run([*git, "archive", f"--output={folder}/tree.tar", commit])
            shutil.unpack_archive(f"{folder}/tree.tar", unfinished)
            build(unfinished)
            if not list(unfinished.glob(f"unsync/_core*{sysconfig.get_config_var('EXT_SUFFIX')}")):
                sys.exit(f"the compiled core of {revision} could not be built")
            unfinished.rename(tree)
    return tree


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


# Counting. Each tool writes down what happened between any two markers; every second of these
# parts, from the first on, is a batch of a row.


def instructions(command: list[str], folder: Path, env: dict[str, str]) -> tuple[str, list[int]]:
    watch = ["valgrind", "-q", "--tool=callgrind", "--dump-before=getsid"]
    out = folder / "callgrind"
    answer = run([*watch, f"--callgrind-out-file={out}", *command], env=env)
    parts: list[int] = []
    for number in count(1):
        path = out.with_name(f"callgrind.{number}")
        if not path.exists():
            return answer, parts[1::2]
        found = re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)
        assert found, path
        parts.append(int(found[1]))
    raise AssertionError


def calls(command: list[str], folder: Path, env: dict[str, str]) -> tuple[str, list[Counter[str]]]:
    out = folder / "strace"
    answer = run(["strace", "-f", "-qq", f"--output={out}", *command], env=env)
    parts: list[Counter[str]] = [Counter()]
    for name in re.findall(r"^\d+ +(\w+)\(", out.read_text(errors="replace"), re.MULTILINE):
        if name == "getsid":
            parts.append(Counter())
        else:
            parts[-1][name] += 1
    return answer, parts[1:-1:2]


def measure(tree: Path, core: str, rows: list[str], runs: int) -> Table:
    """What so many runs find with the package in `tree`; rows that it cannot do are left out."""
    table: Table = {}
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONHASHSEED": "0",
        "UNSYNC_NO_EXTENSIONS": CORES[core],
    }
    work = [sys.executable, str(CHECKOUT / "bench" / "counted.py")]
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            answer, costs = instructions([*work, "count", *rows], folder, env)
            for row, each, batches in by_row(answer, len(costs)):
                table.setdefault(row, Figures()).instructions.append(min(costs[batches]) / each)
            answer, kinds = calls([*work, "count", *rows], folder, env)
            for row, each, batches in by_row(answer, len(kinds)):
                fewest = min(kinds[batches], key=Counter.total)
                table[row].calls.append({kind: times / each for kind, times in fewest.items()})
    for row, taken in json.loads(run([*work, "bytes", *rows], env=env)).items():
        if row in table:
            table[row].bytes = taken
    return table


def by_row(answer: str, parts: int) -> Iterator[tuple[str, int, slice]]:
    """Of each row that was done: its name, the calls of a batch, and where its batches are."""
    done = [json.loads(line) for line in answer.splitlines()]
    batches = sum(row["batches"] for row in done)
    assert parts == batches, f"{parts} parts were counted, not {batches}"
    begin = 0
    for row in done:
        yield row["row"], row["count"], slice(begin, begin + row["batches"])
        begin += row["batches"]


# Judging, and the tables.


def faults(before: Figures | None, after: Figures | None) -> list[str]:
    """What is dearer, beyond what differs from run to run anyway."""
    if before is None:
        return []
    if after is None:
        return ["gone"]
    found = []
    if after.cost > before.cost * (1 + max(DEARER, before.spread + after.spread)):
        found.append("dearer")
    if min(after.all_calls) > max(before.all_calls) + MORE_CALLS:
        found.append("more system calls")
    return found


def cells(figures: Figures | None) -> list[str]:
    if figures is None:
        return ["-"] * 4
    size = "-" if figures.bytes is None else f"{figures.bytes:,.0f}"
    return [
        f"{figures.cost:,.0f}",
        f"{figures.spread:.1%}",
        f"{statistics.median(figures.all_calls):.2f}",
        size,
    ]


def show(core: str, rows: list[str], after: Table, before: Table | None, bad: set[str]) -> None:
    kinds = ["instructions", "spread", "system calls", "bytes"]
    if before is None:
        lines = [[core, *kinds], *([row, *cells(after.get(row))] for row in rows)]
    else:
        heads = [f"{kind}{when}" for kind in kinds for when in (" before", " after")]
        lines = [[core, *heads, "ratio", ""]]
        for row in rows:
            old, new = before.get(row), after.get(row)
            ratio = f"{new.cost / old.cost:.3f}" if old and new else "-"
            pairs = zip(cells(old), cells(new), strict=True)
            wrong = ", ".join(faults(old, new)) if row in bad else ""
            lines.append([row, *(cell for pair in pairs for cell in pair), ratio, wrong])
    for number, line in enumerate(lines):
        print(f"| {' | '.join(line)} |")
        if not number:
            print(f"| --- |{' ---: |' * (len(line) - 1)}")
    print(flush=True)


def compare(
    tree: Path, old_tree: Path | None, core: str, rows: list[str], runs: int
) -> tuple[Table, Table | None, set[str]]:
    """What both take, and the rows that were dearer when they were measured again, too."""
    after = measure(tree, core, rows, runs)
    if old_tree is None:
        return after, None, set()
    before = measure(old_tree, core, rows, runs)
    doubted = [row for row in rows if faults(before.get(row), after.get(row))]
    if doubted:
        print(f"measured again: {', '.join(doubted)}", file=sys.stderr)
        after |= measure(tree, core, doubted, runs)
        before |= measure(old_tree, core, doubted, runs)
    return after, before, {row for row in doubted if faults(before.get(row), after.get(row))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", metavar="REVISION", help="compare with this commit")
    parser.add_argument("--of", metavar="REVISION", help="count this commit, not what is imported")
    parser.add_argument("--core", choices=CORES, help="both, if none is named")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="all, if none is named")
    parser.add_argument("--runs", type=int, default=RUNS, help="of which the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what each run found")
    parser.add_argument("--verbose", action="store_true", help="system calls by name")
    options = parser.parse_args()
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            sys.exit(f"{tool} is not there; `apt-get install {package}` brings it")
    listed = run([sys.executable, str(CHECKOUT / "bench" / "counted.py"), "rows"])
    known = listed.split()
    rows = options.rows or known
    if unknown := set(rows) - set(known):
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    tree = checkout_of(options.of) if options.of else here()
    old_tree = checkout_of(options.against) if options.against else None
    cores = [options.core] if options.core else list(CORES)
    if "compiled" in cores:
        build(tree)
    found: dict[str, object] = {}
    failed = False
    for core in cores:
        after, before, bad = compare(tree, old_tree, core, rows, options.runs)
        show(core, rows, after, before, bad)
        failed |= bool(bad)
        sides = {"after": after} if before is None else {"before": before, "after": after}
        found[core] = {
            side: {row: figures.as_json() for row, figures in table.items()}
            for side, table in sides.items()
        }
        if options.verbose:
            for side, table in sides.items():
                for row, figures in table.items():
                    names = (f"{name} {each:.2f}" for name, each in figures.by_name().items())
                    print(f"{core}, {side}, {row}: {', '.join(names)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
