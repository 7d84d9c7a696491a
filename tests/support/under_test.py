"""Which unsync is being tested: the core, and whether the interpreter has a GIL."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import unsync as package

CORE = "compiled" if package.ACCELERATED else "pure"

WITH_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()

FOLDER = Path(package.__file__).parent


def wrong_package() -> str | None:
    """Why the package that was imported is not the one that the environment asks for, if so.

    `UNSYNC_TEST_CORE` (compiled or pure) says which core is to be tested, and
    `UNSYNC_TEST_INSTALLED` that it must be an installed one, not the source tree's. Without this
    check a run on the wrong core would pass unnoticed.
    """
    meant = os.environ.get("UNSYNC_TEST_CORE")
    if meant is not None and meant != CORE:
        return f"the {meant} core was to be tested, but this is the {CORE} one"
    installed = {Path(sysconfig.get_path(each)).resolve() for each in ("purelib", "platlib")}
    if os.environ.get("UNSYNC_TEST_INSTALLED") and FOLDER.parent.resolve() not in installed:
        return f"what was installed was to be tested, but unsync is from {FOLDER.parent}"
    return None
