"""`python -m unsync`: what it says, and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.under_test import CORE
from support.waiting import PATIENCE

import unsync as package
from unsync import __main__ as program


def run(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unsync", *arguments],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )


def test_it_says_for_machines_what_is_in_use_and_that_it_works(tmp_path: Path) -> None:
    done = run(tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["core"] == CORE
    assert facts["python"] == sys.version.split()[0]
    assert facts["start_method"] in facts["start_methods"]
    assert facts["checks"] == dict.fromkeys(program.CHECKS)
    assert [*facts["figures"]] == (["compiled", "pure"] if CORE == "compiled" else ["pure"])
    for figures in facts["figures"].values():
        assert [*figures] == [*program.ROWS]
        assert min(figures.values()) > 0


def figures() -> dict[str, dict[str, float]]:
    return {CORE: dict.fromkeys(program.ROWS, 1.5)}


@pytest.mark.alone
def test_it_says_the_same_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "measure_both", figures)
    assert program.main([]) == 0
    out = capsys.readouterr().out
    assert f", {CORE} core" in out
    assert out.count(" ok\n") == len(program.CHECKS)
    assert out.count(" 1.50\n") == len(program.ROWS)


@pytest.mark.alone
def test_a_check_that_fails_is_told_and_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "measure_both", figures)
    monkeypatch.setattr(
        program,
        "CHECKS",
        {"division": (lambda: 1 // 0, 1), "sum": (lambda: 1 + 1, 3), "good": (lambda: 1, 1)},
    )
    assert program.main([]) == 1
    out = capsys.readouterr().out
    assert "FAILED: ZeroDivisionError: " in out
    assert "FAILED: gave 2, not 3\n" in out
    assert out.count(" ok\n") == 1


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="it looks for no extension")
def test_an_extension_that_cannot_be_loaded_is_the_exit_status_and_why(tmp_path: Path) -> None:
    source = Path(package.__file__).parent
    shutil.copytree(source, tmp_path / "unsync", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    suffix = "pyd" if sys.platform == "win32" else "so"
    (tmp_path / "unsync" / f"_core.{suffix}").write_bytes(b"no library")
    done = run(tmp_path, UNSYNC_NO_EXTENSIONS="")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert f"_core.{suffix}" in done.stderr
