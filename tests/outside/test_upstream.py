"""The test suite of upstream unsync 1.3, unchanged, passes: see upstream.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import under_test, upstream
from support.needs import is_here


@pytest.mark.alone
def test_upstreams_own_suite_passes() -> None:
    if not is_here("pip"):
        pytest.skip("pip is not installed")
    done = subprocess.run(
        [sys.executable, str(Path(upstream.__file__))],
        # Its own run is told nothing of this one.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    if done.returncode == upstream.UNREACHABLE and not os.environ.get("CI"):
        pytest.skip("upstream's suite is not in the cache, and the package index is out of reach")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on the {under_test.CORE} core" in done.stdout
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)
