"""What nobody would call in such an order gives a result or an exception, never a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import PATIENCE

pytestmark = pytest.mark.alone  # a program of its own, with threads enough

FUZZ = Path(__file__).parent.parent / "support" / "fuzz.py"
SECONDS = 5


def test_whatever_is_called_crashes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--seconds", str(SECONDS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=SECONDS + 3 * PATIENCE,  # it finds out itself that a thread is stuck
        stdin=subprocess.DEVNULL,
    )
    # The first line has the seed to repeat it with.
    assert done.returncode == 0, done.stdout
    assert "calls," in done.stdout, done.stdout
