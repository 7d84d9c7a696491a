"""A short run of `stress.py`; `.ci/run` has a long one on each core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import PATIENCE

pytestmark = pytest.mark.alone  # a program of its own, with threads enough

SECONDS = 2


@pytest.mark.parametrize("flags", [[], ["--switch-interval", "1e-5"]], ids=["", "many switches"])
def test_everything_at_once(flags: list[str]) -> None:
    program = Path(__file__).parent.parent / "support" / "stress.py"
    done = subprocess.run(
        [sys.executable, str(program), "--seconds", str(SECONDS), *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=SECONDS + 3 * PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert " cases\n" in done.stdout
    assert " ended: cancelled\n" in done.stdout
    for way in ("timeout", "wait_for", "task_group", "cancel", "ctrl_c"):
        assert f" stopped: by_{way}\n" in done.stdout
