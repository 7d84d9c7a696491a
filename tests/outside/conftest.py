"""What the tests of packages, documents, services and companions share.

They run programs and servers that import what `tests/core` never imports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# They compile, and start databases and servers, on a machine that may be busy with other things:
# this ends what hangs. What they start has no shorter limit of its own.
SECONDS = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that PostgreSQL's own user gets through: those of `tmp_path` are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)
