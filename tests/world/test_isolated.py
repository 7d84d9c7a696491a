"""Tests of leaks and of the garbage collector: each file of `isolated` in a process of its own.

There is no garbage there but its own, nothing is frozen, and no counts of references change but
those that it changes. Those files are no tests of this process, so their names do not begin as
tests' do; one of them is run with `pytest tests/world/isolated/references.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import PATIENCE

pytestmark = pytest.mark.alone  # each is a program of its own

FOLDER = Path(__file__).parent / "isolated"


@pytest.mark.timeout(9 * PATIENCE)  # a whole file of tests
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.py")))
def test_in_a_process_of_its_own(file: str) -> None:
    done = subprocess.run(
        # The cache is that of the process that runs this.
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "--quiet",
            "-p",
            "no:cacheprovider",
            str(FOLDER / file),
        ],
        cwd=FOLDER.parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=8 * PATIENCE,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
