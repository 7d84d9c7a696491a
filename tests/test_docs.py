"""The Python shown in the README and the docs runs, and does what is said beside it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def blocks() -> list[object]:
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for number, code in enumerate(BLOCK.findall(page.read_text())):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks())
def test_what_is_shown_runs(run_python: Run, code: str) -> None:
    run = run_python(code)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_readme_s_taste_prints_what_one_expects(run_python: Run) -> None:
    code = BLOCK.findall((ROOT / "README.md").read_text())[0]
    pages = [f"page {n}" for n in range(10)]
    files = [f"file {n}" for n in range(10)]
    assert run_python(code).stdout.splitlines() == [
        str(pages + files),
        "file 1 page 2",
        "['page 3', 'file 4']",
        "PAGE 5",
    ]


def test_the_commands_in_the_readme_exist() -> None:
    commands = re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["demo", "test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(commands) <= set(targets)


def test_the_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_each_room_of_the_house_is_in_the_architecture_s_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "unsync").glob("*.py*"):
        if path.suffix in {".py", ".pyx"}:
            assert f"`unsync/{path.name}`" in text, path.name
