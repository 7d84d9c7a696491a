"""The gate for what a change may cost counts what it says, and lets pass what it should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import under_test

pytestmark = pytest.mark.once  # it picks the cores itself

BENCH = Path(__file__).parent.parent.parent / "bench"

sys.path.insert(0, str(BENCH))
import instructions  # noqa: E402


def figures(*costs: float, calls: float = 2.0) -> instructions.Figures:
    return instructions.Figures(list(costs), [{"futex": calls - 1, "write": 1.0}] * 3)


# Ten seconds of work, most of them valgrind's with Python's start; many more on busy cores.
LIMIT = 900


@pytest.mark.timeout(LIMIT)
@pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="other Pythons compile while they are counted"
)
@pytest.mark.skipif(
    not all(map(shutil.which, instructions.TOOLS)),
    reason="valgrind and strace count: apt-get install valgrind strace",
)
def test_a_row_is_counted(tmp_path: Path) -> None:
    core = "compiled" if under_test.CORE == "compiled" else "plain"
    done = subprocess.run(
        [
            *(sys.executable, str(BENCH / "instructions.py"), "--core", core, "--runs", "1"),
            *("--rows", "unfuture", "callback", "--json", str(tmp_path / "found.json")),
        ],
        env={**os.environ, "PYTHONPATH": str(under_test.FOLDER.parent)},
        capture_output=True,
        text=True,
        timeout=LIMIT - 10,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())[core]["after"]
    made, called = found["unfuture"], found["callback"]
    assert 500 < made["instructions"][0] < called["instructions"][0] < 100_000
    assert 64 < made["bytes"] < called["bytes"] < 10_000
    # An Unfuture that no other thread looks at wakes nobody.
    assert sum(made["system calls"][0].values()) < 0.1
    assert "| unfuture |" in done.stdout


def test_what_is_dearer_than_three_percent_and_than_the_noise_is_a_fault() -> None:
    before = figures(1000, 1000, 1000)
    assert instructions.faults(before, figures(1030, 1030, 1030)) == []
    assert instructions.faults(before, figures(1031, 1031, 1031)) == ["dearer"]
    assert instructions.faults(before, figures(900, 900, 900)) == []
    assert instructions.faults(before, figures(1000, 1050, 1100)) == []


def test_one_more_system_call_is_a_fault() -> None:
    before = figures(1000)
    assert instructions.faults(before, figures(1000, calls=2.05)) == []
    assert instructions.faults(before, figures(1000, calls=3.0)) == ["more system calls"]


def test_a_row_that_is_gone_is_a_fault_and_a_new_one_is_none() -> None:
    assert instructions.faults(figures(1000), None) == ["gone"]
    assert instructions.faults(None, figures(1000)) == []


def test_two_commits_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a count of their packages: those are as many instructions as the commits' names."""

    def measure(tree: Path, core: str, rows: list[str], runs: int) -> instructions.Table:
        return {row: figures(int(tree.name)) for row in rows}

    monkeypatch.setattr(instructions, "TOOLS", {})
    monkeypatch.setattr(instructions, "run", lambda command: "callback unfuture")
    monkeypatch.setattr(instructions, "checkout_of", lambda revision: tmp_path / revision)
    monkeypatch.setattr(instructions, "build", lambda tree: None)
    monkeypatch.setattr(instructions, "measure", measure)
    command = ["instructions.py", "--core", "plain", "--rows", "callback"]
    monkeypatch.setattr(sys, "argv", [*command, "--against", "1000", "--of", "1100"])
    with pytest.raises(SystemExit) as caught:
        instructions.main()
    assert caught.value.code == 1
    assert "| callback | 1,000 | 1,100 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--against", "1100", "--of", "1000"])
    with pytest.raises(SystemExit) as caught:
        instructions.main()
    assert caught.value.code == 0


def test_marks_of_other_rows_are_told_apart() -> None:
    answer = '{"row": "a", "count": 8, "batches": 2}\n{"row": "b", "count": 4, "batches": 3}\n'
    assert list(instructions.by_row(answer, 5)) == [("a", 8, slice(0, 2)), ("b", 4, slice(2, 5))]
    with pytest.raises(AssertionError, match="4 parts were counted, not 5"):
        list(instructions.by_row(answer, 4))
