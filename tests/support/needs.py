"""What a test needs that may not be here: Python packages, and programs of the system.

Nothing is imported to find out. Whoever collects the tests imports each file of them, every process
of pytest-xdist among them, and packages of this size take seconds to import and stay for good.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Generator
from typing import Any

import pytest
from support.databases import NOT_INSTALLED


def is_here(name: str) -> bool:
    """Whether this package, or module of one, could be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def packages(*names: str) -> pytest.MarkDecorator:
    """The mark of tests that are skipped unless all of these can be imported."""
    absent = [name for name in names if not is_here(name)]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def skip_without(*names: str) -> None:
    """Skips the test that runs, unless all of these can be imported."""
    absent = [name for name in names if not is_here(name)]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")


def how_to_get_programs() -> str:
    if shutil.which("apt-get") is not None and getattr(os, "geteuid", lambda: 1)() == 0:
        return "`.ci/databases` installs them"
    if shutil.which("apt-get") is not None:
        return "`sudo .ci/databases` installs them"
    return "install PostgreSQL, Redis and wrk"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: Any, config: pytest.Config
) -> Generator[None, None, None]:
    """Says, as the last things, how to have the tests in this order again, and what was lacking.

    That is, that tests were skipped for want of programs, and what brings them. `tests/conftest.py`
    has it: with pytest-xdist the process that prints loads no other conftest.
    """
    yield
    seed = config.getoption("randomly_seed", default=None)
    if seed is not None:
        terminalreporter.write_line(f"order of the tests: --randomly-seed={seed}")
    programs: set[str] = set()
    count = 0
    for report in terminalreporter.stats.get("skipped", []):
        found = re.search(rf"([\w-]+) {NOT_INSTALLED}", str(report.longrepr))
        if found is not None:
            programs.add(found[1])
            count += 1
    if count:
        terminalreporter.write_line(
            f"{count} skipped without {', '.join(sorted(programs))}: {how_to_get_programs()}",
            yellow=True,
        )
