"""Builds the wheels for the interpreters at hand, checks them, and tests what pip installs.

    python .ci/wheels.py all                      all of this, for every interpreter
    python .ci/wheels.py build 3.12 3.13t         the wheels alone, twice, with equal hashes
    python .ci/wheels.py install 3.12             into an environment, and a smoke test
    python .ci/wheels.py test 3.12 --core pure -- tests/core -n 2
    python .ci/wheels.py python 3.12 -- program.py

The source distribution comes first; from it a wheel for each CPython, and the pure one. What users
would get lies in `dist/` afterwards, and is installed by name into an environment of each
interpreter, in `build/environments/`, so that pip itself chooses.
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
ENVIRONMENTS = ROOT / "build" / "environments"
# Where there is no git to ask: the first moment that a zip file can hold.
NO_GIT_EPOCH = "315532800"
CORES = {"compiled": {"UNSYNC_NO_EXTENSIONS": ""}, "pure": {"UNSYNC_NO_EXTENSIONS": "1"}}
# hypothesis is in Rust since then, and has no wheels for these.
CONSTRAINTS = {name: ["hypothesis<6.130"] for name in ("3.13t", "pypy3.11")}
# The versions that have wheels of everything that the tests know how to use.
WITH_COMPANIONS = {"3.11", "3.12", "3.13"}


@dataclass(frozen=True)
class Interpreter:
    name: str
    path: str
    compiles: bool


def interpreters() -> list[Interpreter]:
    """Those on PATH, those of pyenv, and the one that `.ci/interpreter` keeps, one of each name."""
    ask = (
        # One without these, as a system's own may be, can build and test nothing.
        "import ensurepip, json, os, sys, sysconfig\n"
        "header = os.path.join(sysconfig.get_path('include'), 'Python.h')\n"
        "name = '%d.%d' % sys.version_info[:2]\n"
        "name += 't' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''\n"
        "cpython = sys.implementation.name == 'cpython'\n"
        "name = name if cpython else 'pypy' + name\n"
        "if cpython and not os.path.exists(header): sys.exit(1)\n"
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
            if version >= [3, 11]:
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


def python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(interpreter: Interpreter, folder: Path) -> Path:
    """The Python of a new virtual environment."""
    run(interpreter.path, "-m", "venv", folder)
    run(python_in(folder), "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    return python_in(folder)


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


def build_and_check(names: list[str], *, once: bool, pure_only: bool) -> None:
    """Into `dist/`: the source distribution, the pure wheel, and a wheel for each CPython named."""
    found = [each for each in at_hand(names) if each.compiles and not pure_only]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pythons = {each.name: environment(each, work / f"build-{each.name}") for each in found}
        rounds = [work / "first"] if once else [work / "first", work / "second"]
        for out in rounds:
            out.mkdir()
            build(pythons, out)
        first, last = hashes(rounds[0]), hashes(rounds[-1])
        differing = sorted(name for name in {*first, *last} if first.get(name) != last.get(name))
        if differing:
            sys.exit(f"built twice, and not the same: {', '.join(differing)}")
        shutil.rmtree(DIST, ignore_errors=True)
        shutil.copytree(rounds[0], DIST)
    files = sorted(DIST.iterdir())
    run(tool("twine"), "check", "--strict", *files)
    run(tool("check-wheel-contents"), *(each for each in files if each.suffix == ".whl"))
    lines = [f"{first[path.name]}  {path.stat().st_size:>9,}  {path.name}" for path in files]
    how = "Built once" if once else "Built twice with the same hashes"
    print(f"{how}; SHA-256, bytes, name:", *lines, sep="\n")


def place(name: str, wheel: str) -> Path:
    """The Python of the environment in which that wheel (compiled or pure) is installed."""
    return python_in(ENVIRONMENTS / (f"{name}-pure-wheel" if wheel == "pure" else name))


def install(interpreter: Interpreter, *, companions: bool, wheel: str) -> None:
    """Makes the environment anew, and runs `python -m unsync` in it on each core that it has."""
    folder = place(interpreter.name, wheel).parent.parent
    shutil.rmtree(folder, ignore_errors=True)
    python = environment(interpreter, folder)
    groups = ["test-basic"]
    if interpreter.name in WITH_COMPANIONS:
        groups = ["test"] if companions else ["test-basic", "test-engines"]
    chosen = [f"--group={ROOT / 'pyproject.toml'}:{group}" for group in groups]
    extra = CONSTRAINTS.get(interpreter.name, [])
    run(python, "-m", "pip", "install", "--quiet", *chosen, *extra)
    command = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--pre")
    if wheel == "pure":
        (path,) = DIST.glob("*-none-any.whl")
        run(*command, path, cwd=folder)
    else:
        run(*command, f"--find-links={DIST}", "--only-binary=unsync", "unsync", cwd=folder)
    for core in CORES if wheel == "compiled" and interpreter.compiles else ["pure"]:
        check = f"import unsync; assert unsync.ACCELERATED is {core == 'compiled'}, unsync"
        run(python, "-c", check, cwd=folder, **CORES[core])
        run(python, "-m", "unsync", cwd=folder, **CORES[core])


def spread(workers: int) -> list[str]:
    """Options for pytest: over so many processes, each file in one of them."""
    return ["-n", str(workers), "--dist", "loadfile"]


def test(name: str, core: str, wheel: str, arguments: list[str]) -> None:
    env = {**CORES[core], "UNSYNC_TEST_CORE": core, "UNSYNC_TEST_INSTALLED": "1"}
    if name.endswith("t"):
        env["PYTHON_GIL"] = "0"  # whatever the companions would have
    with tempfile.TemporaryDirectory() as scratch:
        # The program, not `python -m pytest`, which would find the checkout's unsync before it.
        pytest = place(name, wheel).with_name("pytest")
        run(pytest, f"--basetemp={scratch}/tmp", *arguments, **env)


def at_hand(names: list[str]) -> list[Interpreter]:
    """The interpreters that are named, or all where none is; one that is missing is an error."""
    found = interpreters()
    print("Found:", *(each.name for each in found))
    missing = {*names} - {each.name for each in found}
    if missing:
        sys.exit(f"not on this machine: {', '.join(sorted(missing))}")
    return [each for each in found if each.name in names] if names else found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    everything = actions.add_parser("all", help="build, install and test, compiled and pure")
    building = actions.add_parser("build", help="build and check the wheels")
    for action in (everything, building):
        action.add_argument("names", nargs="*", metavar="NAME", help="default: all at hand")
        action.add_argument("--once", action="store_true", help="do not compare two builds")
        action.add_argument("--pure-only", action="store_true", help="build no compiled wheel")
    installing = actions.add_parser("install", help="install from dist/, and a smoke test")
    installing.add_argument("--companions", action="store_true", help="and what tests/outside uses")
    testing = actions.add_parser("test", help="run pytest in that environment")
    testing.add_argument("--core", choices=CORES, default="compiled")
    running = actions.add_parser("python", help="run Python in that environment")
    for action in (installing, testing, running):
        action.add_argument("name", metavar="NAME")
        action.add_argument("--wheel", choices=CORES, default="compiled", help="which to install")
    # What comes after `--` is for Python or pytest; with `all`, only files and folders of tests.
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    options, passed_on = parser.parse_args(given[:end]), given[end + 1 :]

    match options.action:
        case "build":
            build_and_check(options.names, once=options.once, pure_only=options.pure_only)
        case "install":
            (interpreter,) = at_hand([options.name])
            install(interpreter, companions=options.companions, wheel=options.wheel)
        case "test":
            test(options.name, options.core, options.wheel, passed_on)
        case "python":
            run(place(options.name, options.wheel), *passed_on)
        case "all":
            build_and_check(options.names, once=options.once, pure_only=options.pure_only)
            for interpreter in at_hand(options.names):
                compiled = interpreter.compiles and not options.pure_only
                for wheel in CORES if compiled else ["pure"]:
                    install(interpreter, companions=True, wheel=wheel)
                    # What does not depend on the core has been run with the compiled one.
                    once = ["-m", "not once"] if compiled and wheel == "pure" else []
                    # A process for each folder: what one imports, the other must not have.
                    for tests in passed_on or ["tests/core", "tests/world", "tests/outside"]:
                        how = ["--quiet", tests, *spread(3), *once]
                        test(interpreter.name, wheel, wheel, how)


if __name__ == "__main__":
    main()
