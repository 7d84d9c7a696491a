"""Runs the test suite of upstream unsync 1.3, unchanged, against this package.

Its source distribution is fetched from the package index with pip, checked against a known
hash, and only its tests are unpacked: `python tests/upstream.py` in an environment that has
this package and pytest.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import unsync

RELEASE = "unsync==1.3"
SHA256 = "fb0175b4487bf93b5cc91fcc87654e05da16bced9e6015c120567a3056e399fb"


def fetch(folder: Path) -> Path:
    """Downloads the source distribution into `folder` and returns the path of its archive."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{RELEASE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=:all:", "--dest", str(folder), "--requirement", str(requirements)]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("unsync-*.tar.gz")
    return archive


def unpack_tests(archive: Path, folder: Path) -> Path:
    tests = folder / "test"
    tests.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            source = tar.extractfile(member) if path.parent.name == "test" else None
            if source is not None:
                (tests / path.name).write_bytes(source.read())
    return tests


def main() -> int:
    core = "compiled" if unsync.ACCELERATED else "pure"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = unpack_tests(fetch(folder), folder)
        print(f"upstream's suite ({RELEASE}) on the {core} core", flush=True)
        command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
        command += ["-m", "pytest", "--quiet", "--timeout=60", "--rootdir", str(tests), str(tests)]
        return subprocess.run(command, cwd=tests).returncode


if __name__ == "__main__":
    sys.exit(main())
