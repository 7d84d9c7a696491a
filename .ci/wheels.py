"""Builds the wheels for the interpreters at hand, checks them, and tests what pip installs.

    python .ci/wheels.py [--pythons 3.10 3.13t pypy3.11] [--no-tests | --tests tests/test_then.py]

The source distribution first; from it a wheel for each CPython, and the pure one. All of it twice,
since the same source must give the same bytes. What users would get lies in `dist/` afterwards, and
is installed by name into a clean environment of each interpreter, so that pip itself chooses.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# Where there is no git to ask: the first moment that a zip file can hold.
NO_GIT_EPOCH = "315532800"
# hypothesis is in Rust since then, and has no wheels for these.
CONSTRAINTS = {name: ["hypothesis<6.130"] for name in ("3.13t", "pypy3.11")}
# The versions that have wheels of everything that the tests know how to use.
WITH_COMPANIONS = {"3.10", "3.11", "3.12", "3.13"}


@dataclass(frozen=True)
class Interpreter:
    name: str
    path: str
    compiles: bool


def interpreters() -> list[Interpreter]:
    """Those on PATH, those of pyenv, and the one that `.ci/interpreter` keeps, one of each name."""
    ask = (
        "import json, sys, sysconfig\n"
        "name = '%d.%d' % sys.version_info[:2]\n"
        "name += 't' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''\n"
        "cpython = sys.implementation.name == 'cpython'\n"
        "name = name if cpython else 'pypy' + name\n"
        "print(json.dumps([sys.version_info[:2], name, cpython]))"
    )
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    folders = [*os.environ.get("PATH", "").split(os.pathsep), f"{pyenv}/versions/*/bin"]
    folders.append(f"{cache}/unsync/3.1?t/bin")
    candidates = [sys.executable]
    for folder in folders:
        for pattern in ("python3.[1-9][0-9]", "python3.[1-9][0-9]t", "python", "pypy3.[1-9][0-9]"):
            candidates += sorted(
                glob.glob(f"{folder}/{pattern}{'.exe' if os.name == 'nt' else ''}")
            )
    found: dict[str, tuple[list[int], Interpreter]] = {}
    for path in candidates:
        # A stand-in of pyenv fails for a version that is not chosen; what is not there, too.
        done = subprocess.run([path, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0:
            version, name, cpython = json.loads(done.stdout)
            if version >= [3, 10]:
                found.setdefault(name, (version, Interpreter(name, path, cpython)))
    return [
        each
        for _, each in sorted(
            found.values(), key=lambda it: (not it[1].compiles, it[0], it[1].name)
        )
    ]


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(each) for each in command], cwd=cwd, env={**os.environ, **env}, check=True)


def tool(name: str) -> Path:
    return Path(sys.executable).parent / name


def environment(interpreter: Interpreter, folder: Path) -> Path:
    """The Python of a new virtual environment."""
    run(interpreter.path, "-m", "venv", folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    return python


def epoch() -> str:
    """When the source was last changed, which is the date of every file in what is built."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return given
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else NO_GIT_EPOCH


def build_sdist(out: Path, date: str) -> Path:
    """The source distribution, without the dates and owners that setuptools leaves in it."""
    with tempfile.TemporaryDirectory() as made:
        run(sys.executable, "-m", "build", "--sdist", "--outdir", made)
        (path,) = Path(made).iterdir()
        plain = io.BytesIO()
        with (
            tarfile.open(path) as old,
            tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as new,
        ):
            for member in sorted(old.getmembers(), key=lambda member: member.name):
                member.mtime = int(date)
                member.uid = member.gid = 0
                member.uname = member.gname = ""
                member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                member.pax_headers = {}
                new.addfile(member, old.extractfile(member) if member.isfile() else None)
    target = out / path.name
    target.write_bytes(gzip.compress(plain.getvalue(), mtime=int(date)))
    return target


def build(pythons: dict[str, Path], out: Path) -> None:
    """Everything, into an empty folder."""
    date = epoch()
    sdist = build_sdist(out, date)
    # No symbols, and nothing of where it was built.
    flags = {"CFLAGS": "-g0", "LDFLAGS": "-Wl,-s"} if sys.platform == "linux" else {}
    wheel = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir")
    env = {"SOURCE_DATE_EPOCH": date, **flags}
    for name, python in pythons.items():
        raw = out / f"raw-{name}"
        run(python, *wheel, "--wheel-dir", raw, sdist, UNSYNC_NO_EXTENSIONS="", **env)
        (made,) = raw.iterdir()
        if made.name.endswith("-any.whl"):
            sys.exit(f"{name}: the extension could not be built; `pip wheel -v .` says why")
        if sys.platform == "linux":
            # To the oldest tag that the symbols in use allow.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            run(
                tool("auditwheel"),
                "repair",
                "--wheel-dir",
                out,
                made,
                PATH=path,
                SOURCE_DATE_EPOCH=date,
            )
        else:
            shutil.copy(made, out)
        shutil.rmtree(raw)
    run(sys.executable, *wheel, "--wheel-dir", out, sdist, UNSYNC_NO_EXTENSIONS="1", **env)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def install_and_test(
    interpreter: Interpreter, work: Path, tests: list[str], compiled: bool
) -> None:
    python = environment(interpreter, work / f"test-{interpreter.name}")
    group = "test" if interpreter.name in WITH_COMPANIONS else "test-basic"
    extra = CONSTRAINTS.get(interpreter.name, [])
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--group",
        f"{ROOT / 'pyproject.toml'}:{group}",
        *extra,
    )
    install = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--pre")
    cores = ["compiled", "pure"] if compiled else ["pure"]
    for core in cores:
        print(f"== {interpreter.name}, {core}, from a wheel", flush=True)
        if core == cores[0]:
            run(*install, "--find-links", DIST, "--only-binary", "unsync", "unsync", cwd=work)
        else:
            (pure,) = DIST.glob("*-none-any.whl")
            run(*install, "--force-reinstall", pure, cwd=work)
        env = {
            "UNSYNC_NO_EXTENSIONS": "",
            "UNSYNC_TEST_CORE": core,
            "UNSYNC_TEST_INSTALLED": "1",
        }
        scratch = work / f"tmp-{interpreter.name}-{core}"
        run(python.parent / "pytest", "--quiet", f"--basetemp={scratch}", *tests, **env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pythons", nargs="+", metavar="NAME", help="only these (default: all here)"
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="all but these")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what to run of the suite")
    parser.add_argument("--no-tests", action="store_true", help="build and check only")
    parser.add_argument("--sdist-and-pure", action="store_true", help="build no compiled wheel")
    options = parser.parse_args()

    found = interpreters()
    print("Found:", *(each.name for each in found))
    if options.pythons:
        missing = set(options.pythons) - {each.name for each in found}
        if missing:
            parser.error(f"not on this machine: {', '.join(sorted(missing))}")
        found = [each for each in found if each.name in options.pythons]
    found = [each for each in found if each.name not in options.without]
    compiling = [] if options.sdist_and_pure else [each for each in found if each.compiles]

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pythons = {each.name: environment(each, work / f"build-{each.name}") for each in compiling}
        rounds = [work / "first", work / "second"]
        for out in rounds:
            out.mkdir()
            build(pythons, out)
        first, second = map(hashes, rounds)
        differing = sorted(
            name for name in {*first, *second} if first.get(name) != second.get(name)
        )
        if differing:
            sys.exit(f"built twice, and not the same: {', '.join(differing)}")

        shutil.rmtree(DIST, ignore_errors=True)
        shutil.copytree(rounds[0], DIST)
        files = sorted(DIST.iterdir())
        run(tool("twine"), "check", "--strict", *files)
        run(tool("check-wheel-contents"), *(each for each in files if each.suffix == ".whl"))
        lines = [f"{first[path.name]}  {path.stat().st_size:>9,}  {path.name}" for path in files]
        print("Built twice with the same hashes; SHA-256, bytes, name:", *lines, sep="\n")

        if not options.no_tests:
            for interpreter in found:
                install_and_test(interpreter, work, options.tests, interpreter in compiling)


if __name__ == "__main__":
    main()
