"""Runs the test suite of upstream unsync 1.3 against this package.

It is unchanged but for three time limits of 0.1 and 0.2 seconds, which a busy machine outruns.

    python tests/support/upstream.py

in an environment that has this package and pytest. Only the tests are unpacked of upstream's source
distribution, whose hash is known. pip fetches it from the package index once; it is kept in
`unsync/` of the user's cache. Exit code 75 says that there is none yet, and no index to be reached.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import unsync

RELEASE = "unsync==1.3"
SHA256 = "fb0175b4487bf93b5cc91fcc87654e05da16bced9e6015c120567a3056e399fb"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unsync"
UNREACHABLE = 75  # EX_TEMPFAIL


# What is to have come then has a minute.
PATIENT = [
    (b"assertEqual('faff', result.result(timeout=0.1))", b"assertEqual('faff', result.result(60))"),
    (b"self.concurrent_future().result(timeout=0.2)", b"self.concurrent_future().result(60)"),
]


class UnreachableError(Exception):
    """There is no index, or no way to it."""


def fetch() -> Path:
    """The path of the source distribution, which is downloaded if it is not in the cache.

    :raises UnreachableError: the index cannot be reached.
    :raises RuntimeError: pip failed for another reason, which is the message.
    """
    kept = CACHE / "unsync-1.3.tar.gz"
    if kept.exists() and hashlib.sha256(kept.read_bytes()).hexdigest() == SHA256:
        return kept
    CACHE.mkdir(parents=True, exist_ok=True)
    # Beside the place where it will be, so that it comes there at once and whole.
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        requirements = Path(name, "requirements.txt")
        requirements.write_text(f"{RELEASE} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary=:all:", "--dest", name, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = done.stdout + done.stderr
            # What pip says of each attempt, whatever the reason was.
            error = UnreachableError if "connection broken by" in said else RuntimeError
            raise error(said)
        (archive,) = Path(name).glob("unsync-*.tar.gz")
        archive.replace(kept)
    return kept


def unpack_tests(archive: Path, folder: Path) -> Path:
    tests = folder / "test"
    tests.mkdir()
    found = 0
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            source = tar.extractfile(member) if path.parent.name == "test" else None
            if source is not None:
                text = source.read()
                for limited, patient in PATIENT:
                    found += text.count(limited)
                    text = text.replace(limited, patient)
                (tests / path.name).write_bytes(text)
    assert found == 3, "the time limits are not where they were"
    return tests


def main() -> int:
    core = "compiled" if unsync.ACCELERATED else "pure"
    try:
        archive = fetch()
    except UnreachableError as exc:
        print(f"the package index cannot be reached for {RELEASE}:\n{exc}")
        return UNREACHABLE
    with tempfile.TemporaryDirectory() as name:
        tests = unpack_tests(archive, Path(name))
        print(f"upstream's suite ({RELEASE}) on the {core} core", flush=True)
        command = [sys.executable, "-P", "-m", "pytest", "-p", "pytest_timeout", "--timeout=300"]
        command += ["--quiet", "--rootdir", str(tests), str(tests)]
        # It wants no plugin, whatever others are installed.
        env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run(command, cwd=tests, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
