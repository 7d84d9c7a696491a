"""The examples do what they say: each is run as a user runs it, in a process of its own."""

import json
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.needs import is_here, skip_without
from support.waiting import PATIENCE

import unsync

once = pytest.mark.once  # beside these, the plain core runs an example of each kind

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
EXECUTED = r"Executed in \d+\.\d+(e-\d+)? seconds"
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, in which the same unsync and the examples can be imported."""
    env = {**os.environ, **extra}
    here = [str(Path(unsync.__file__).parent.parent), str(EXAMPLES)]
    first = filter(None, [extra.get("PYTHONPATH")])
    last = filter(None, [os.environ.get("PYTHONPATH")])
    env["PYTHONPATH"] = os.pathsep.join([*first, *here, *last])
    return env


def python(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment() if env is None else env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def output_of(name: str, cwd: Path) -> list[str]:
    """The lines that an example prints; it must end well and complain about nothing."""
    done = python(EXAMPLES / name, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@once
def test_simple_sleep(tmp_path: Path) -> None:
    assert output_of("simple_sleep.py", tmp_path) == ["I hate event loops", "I like decorators"]


@once
def test_threading_a_function(tmp_path: Path) -> None:
    results, executed = output_of("threading_a_function.py", tmp_path)
    assert results == str(["Run in parallel!"] * 10)
    assert re.fullmatch(EXECUTED, executed)


@once
def test_chaining(tmp_path: Path) -> None:
    result, executed = output_of("chaining.py", tmp_path)
    assert result == "8"
    assert re.fullmatch(EXECUTED, executed)


def test_mixing_methods(tmp_path: Path) -> None:
    results, executed = output_of("mixing_methods.py", tmp_path)
    assert results == "{0: 2, 1: 4, 2: 6, 3: 8, 4: 10, 5: 12, 6: 14, 7: 16, 8: 18, 9: 20}"
    assert re.fullmatch(EXECUTED, executed)


@once
def test_preserving_typing(tmp_path: Path) -> None:
    assert output_of("preserving_typing.py", tmp_path) == ["ba", "2"]


@once
def test_progress(tmp_path: Path) -> None:
    skip_without("rich")
    bar, result = output_of("progress.py", tmp_path)
    assert re.match(r"Counting primes \S+ 100% ", bar)
    assert result == "There are 2262 primes below 20000"


def test_cpu_bound(tmp_path: Path) -> None:
    asked, *found, executed = output_of("cpu_bound.py", tmp_path)
    asker = re.fullmatch(r"Process (\d+) asked", asked)
    assert asker
    counts = {}
    for line in found:
        match = re.fullmatch(r"Process (\d+) found (\d+) primes below (\d+)", line)
        assert match
        assert match[1] != asker[1]
        counts[int(match[3])] = int(match[2])
    assert counts == {10_000: 1229, 20_000: 2262, 30_000: 3245, 40_000: 4203}
    assert re.fullmatch(EXECUTED, executed)


@once
@pytest.mark.parametrize(
    ("engine", "place"), [("threads", "this process"), ("processes", "others")]
)
def test_cluster(engine: str, place: str, tmp_path: Path) -> None:
    done = python(EXAMPLES / "cluster.py", engine, cwd=tmp_path)
    check_cluster(done, place)


def check_cluster(done: subprocess.CompletedProcess[str], place: str) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"20 calls in {place}", "Pi is about 3.14327"]


@once
def test_importing_an_example_does_nothing(tmp_path: Path) -> None:
    needs = {
        "metrics_opentelemetry": "opentelemetry.sdk",
        "metrics_prometheus": "prometheus_client",
        "progress": "rich",
    }
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    here = [name for name in names if name not in needs or is_here(needs[name])]
    assert len(here) >= len(names) - len(needs)
    code = "import importlib, multiprocessing, sys, threading\n"
    code += f"for name in {here}:\n"
    code += (
        "    assert callable(importlib.import_module(name).main), name\n"
        "    assert threading.active_count() == 1, (name, threading.enumerate())\n"
        "    assert not multiprocessing.active_children(), name\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# The census, on a folder whose every number is known.

COLUMNS = (
    "package, problem, lines, code_lines, comment_lines, functions, async_functions,"
    " classes, imports, nesting, complexity"
)

GOOD = {
    "top.py": b'''"""A docstring
over two lines."""

import os, sys
from pathlib import Path  # a comment, but with code

# a comment alone


class A:
    def method(self, x):
        if x and os or sys:
            return [y for y in x]
        # a comment alone
        return 1


async def f():
    async for x in Path():
        pass
''',
    "windows.py": b'pattern = "\\d"\r\none = 1if 2 else 3\r\n# the end\r\n',
    "pkg/__init__.py": b"",
    "pkg/sub/__init__.py": b"x = 1",
    "pkg/sub/deep.py": b"""# -*- coding: latin-1 -*-
NAME = "Andr\xe9"

def outer(n):
    def inner():
        return n if n else 0
    while n:
        for i in range(n):
            try:
                inner()
            except OSError:
                continue
    match n:
        case 0:
            return None
        case _:
            return inner
    if n:
        pass
    elif inner:
        pass
""",
}
BAD = {
    "pkg/broken.py": b"x = 1\ndef broken(:\n",
    "pkg/nulls.py": b"x = 1\0\n",
    "pkg/undecodable.py": b"\n\n\nx = '\xff'\n",
}
NOT_PYTHON = {"pkg/notes.txt": b"x = 1\n", "pkg/top.pyc": b"x = 1\n"}

# package, lines, code, comment lines, def, async def, class, import, nesting, complexity
MEASURES = {
    "top.py": ("top", None, 20, 12, 2, 1, 1, 1, 2, 3, 6),
    "windows.py": ("windows", None, 3, 2, 1, 0, 0, 0, 0, 0, 2),
    "pkg/__init__.py": ("pkg", None, 0, 0, 0, 0, 0, 0, 0, 0, 1),
    "pkg/sub/__init__.py": ("pkg", None, 1, 1, 0, 0, 0, 0, 0, 0, 1),
    "pkg/sub/deep.py": ("pkg", None, 21, 19, 1, 2, 0, 0, 0, 4, 9),
}
PROBLEMS = {
    "pkg/broken.py": r"SyntaxError: .*\(line 2\)",
    "pkg/nulls.py": r"(ValueError|SyntaxError): .*null.*",
    "pkg/undecodable.py": r"UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff.*",
}

Rows = dict[str, tuple[object, ...]]


def make_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", {**GOOD, **BAD, **NOT_PYTHON})


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "rows.sqlite3"


def census(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return python(EXAMPLES / "census.py", *arguments, cwd=cwd, env=env)


def rows_in(database: Path, folder: Path) -> Rows:
    connection = sqlite3.connect(database)
    try:
        query = f"SELECT path, {COLUMNS} FROM files WHERE folder = ?"
        found = connection.execute(query, (str(folder.resolve()),)).fetchall()
    finally:
        connection.close()
    rows = {path: tuple(values) for path, *values in found}
    assert len(rows) == len(found)
    return rows


def check_rows(rows: Rows) -> None:
    """Compare with what was worked out by hand for GOOD and BAD."""
    assert rows.keys() == MEASURES.keys() | PROBLEMS.keys()
    assert {path: rows[path] for path in MEASURES} == MEASURES
    for path, pattern in PROBLEMS.items():
        package, problem, *numbers = rows[path]
        assert package == "pkg"
        assert re.fullmatch(pattern, str(problem))
        assert numbers == [0] * 9


def test_census_stores_what_it_measured(tree: Path, database: Path, tmp_path: Path) -> None:
    done = census(tree, "--database", database, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_rows(rows_in(database, tree))
    # Nobody hears of the bad style in windows.py.
    assert done.stderr.splitlines() == [
        f"census.py: {label}: {files} of 8 files"
        for label, counted in (("with unsync", (0, 8)), ("plain loop", (0, 2, 4, 6, 8)))
        for files in counted
    ]
    assert not list(tmp_path.glob("*-journal"))


@once
def test_census_prints_problems_totals_and_times(
    tree: Path, database: Path, tmp_path: Path
) -> None:
    done = census(tree, "--database", database, cwd=tmp_path)
    first, *lines = done.stdout.splitlines()
    assert first == f"8 files in {tree.resolve()}, 3 with problems"
    for line, (path, pattern) in zip(lines[:3], PROBLEMS.items(), strict=True):
        assert re.fullmatch(f"    {path}: {pattern}", line)
    assert [re.sub(" +", " ", line) for line in lines[3:8]] == [
        "package files lines code comments functions classes complexity",
        "pkg 6 22 20 1 2 0 11",
        "top 1 20 12 2 2 1 6",
        "windows 1 3 2 1 0 0 2",
        "in all 8 45 34 4 4 1 19",
    ]
    assert lines[8] == f"Rows stored in {database}"
    assert re.fullmatch(r"With unsync: \d+\.\d\d s", lines[9])
    assert re.fullmatch(r"Plain loop:  \d+\.\d\d s", lines[10])
    same = re.fullmatch(
        r"Both gave the same rows; unsync was (\d+\.\d\d) times as fast\.", lines[11]
    )
    assert same
    admitted = [line for line in lines[12:] if line.startswith("That is slower")]
    assert len(admitted) == len(lines[12:]) == (float(same[1]) < 1)


def start_method_environment(method: str, folder: Path) -> dict[str, str]:
    """An environment in which an example uses that start method, and notes it in `folder`."""
    startup = (  # what the interpreter runs before the example
        "import atexit, multiprocessing, sys\n"
        "def note():\n"
        f"    with open({str(folder / 'method')!r}, 'w') as file:\n"
        "        file.write(multiprocessing.get_start_method())\n"
        "if sys.argv[:1] != ['-c']:\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    atexit.register(note)\n"
    )
    make_tree(folder / "startup", {"sitecustomize.py": startup.encode()})
    return environment(PYTHONPATH=str(folder / "startup"))


@once
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_census_under_every_start_method(
    method: str, tree: Path, database: Path, tmp_path: Path
) -> None:
    env = start_method_environment(method, tmp_path)
    done = census(tree, "--database", database, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "method").read_text() == method
    check_rows(rows_in(database, tree))


@once
@pytest.mark.parametrize("engine", ["threads", "processes", "loky", "dask"])
def test_census_gives_the_same_rows_on_every_engine(
    engine: str, tree: Path, database: Path, tmp_path: Path
) -> None:
    if package := {"loky": "loky", "dask": "distributed"}.get(engine):
        skip_without(package)
    done = census(tree, "--engine", engine, "--database", database, cwd=tmp_path)
    check_census_on_an_engine(done, database, tree)


def check_census_on_an_engine(
    done: subprocess.CompletedProcess[str], database: Path, tree: Path
) -> None:
    assert done.returncode == 0, done.stderr
    assert "Both gave the same rows" in done.stdout
    check_rows(rows_in(database, tree))
    # Dask gives its own workers four seconds to end; on a busy machine it kills them, and says so.
    expected = (" of 8 files", "Worker process still alive after 4.0 seconds, killing")
    assert [line for line in done.stderr.splitlines() if not line.endswith(expected)] == []


@once
@pytest.mark.parametrize(
    ("engine", "package"), [("loky", "loky"), ("dask", "distributed"), ("dask=x", "distributed")]
)
def test_census_says_which_package_an_engine_needs(
    engine: str, package: str, tree: Path, database: Path, tmp_path: Path
) -> None:
    # Stand in for an environment without it.
    hide = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        f"util.find_spec = lambda name: None if name == {package!r} else find(name)\n"
    )
    make_tree(tmp_path / "startup", {"sitecustomize.py": hide.encode()})
    env = environment(PYTHONPATH=str(tmp_path / "startup"))
    done = census(tree, "--engine", engine, "--database", database, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"{engine[:4]} needs another package: pip install {package}"
    )
    assert not database.exists()


@once
def test_census_says_which_engines_there_are(tree: Path, database: Path, tmp_path: Path) -> None:
    for engine in ("steam", "", "loky=tcp://127.0.0.1:1"):
        done = census(tree, "--engine", engine, "--database", database, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].endswith(
            f"no engine {engine!r}; there are threads, processes, loky, dask, dask=ADDRESS"
        )


@once
def test_census_says_when_there_is_no_cluster(tree: Path, database: Path, tmp_path: Path) -> None:
    skip_without("distributed")
    done = census(tree, "--engine", "dask=odd://x", "--database", database, cwd=tmp_path)
    assert done.returncode == 2
    assert "census.py: cannot start the engine dask=odd://x: ValueError: unknown" in done.stderr


@once
def test_a_second_census_replaces_the_first(tree: Path, database: Path, tmp_path: Path) -> None:
    other = make_tree(tmp_path / "other", {"a.py": b"x = 1\n"})
    for folder in (other, tree):
        assert census(folder, "--database", database, cwd=tmp_path).returncode == 0
    (tree / "top.py").unlink()
    (tree / "windows.py").write_bytes(b"x = 1\n" * 7)
    make_tree(tree, {"new.py": b"# new\n"})
    assert census(tree, "--database", database, cwd=tmp_path).returncode == 0
    rows = rows_in(database, tree)
    assert rows.keys() == {"new.py", "windows.py", *MEASURES, *PROBLEMS} - {"top.py"}
    assert rows["windows.py"] == ("windows", None, 7, 7, 0, 0, 0, 0, 0, 0, 1)
    assert rows["new.py"] == ("new", None, 1, 0, 1, 0, 0, 0, 0, 0, 1)
    assert rows["pkg/sub/deep.py"] == MEASURES["pkg/sub/deep.py"]
    assert rows_in(database, other) == {"a.py": ("a", None, 1, 1, 0, 0, 0, 0, 0, 0, 1)}


@once
def test_census_counts_the_standard_library_by_default(tmp_path: Path) -> None:
    # A small one, laid under the interpreter's feet before the example starts.
    library = make_tree(
        tmp_path / "library",
        {
            "json/decoder.py": b"x = 1\n",
            "site-packages/other.py": b"",
            "json/dist-packages/other.py": b"",
        },
    )
    startup = f"import sysconfig; sysconfig.get_path = {{'stdlib': {str(library)!r}}}.get\n"
    make_tree(tmp_path / "startup", {"sitecustomize.py": startup.encode()})
    folder = tmp_path / "temporary"
    folder.mkdir()
    env = environment(
        PYTHONPATH=str(tmp_path / "startup"),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)),
    )
    done = census(cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    database = folder / "unsync-census.sqlite3"
    assert f"Rows stored in {database}\n" in done.stdout
    assert rows_in(database, library).keys() == {"json/decoder.py"}

    # A folder that is named is counted whole.
    assert census(library, cwd=tmp_path, env=env).returncode == 0
    assert len(rows_in(database, library)) == 3


@once
def test_census_limit(tree: Path, database: Path, tmp_path: Path) -> None:
    done = census(tree, "--database", database, "--limit", "2", cwd=tmp_path)
    assert done.returncode == 0
    assert rows_in(database, tree).keys() == {"pkg/__init__.py", "pkg/broken.py"}
    assert done.stdout.startswith("2 files in ")


@once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no such folder: missing"),
        (["a.txt"], "no such folder: a.txt"),
        (["empty"], "no Python files in .*empty"),
        (["full", "--database", "a.txt"], "cannot use the database a.txt: .*not a database"),
        (["full", "--database", "empty"], "cannot use the database empty: unable to open.*"),
    ],
)
def test_census_without_something_to_do(arguments: list[str], message: str, tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.txt": b"text\n" * 200, "empty/a.txt": b"", "full/a.py": b""})
    done = census(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"census.py: {message}\n", done.stderr)


@once
@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_census_refuses_a_senseless_limit(limit: str, tree: Path, tmp_path: Path) -> None:
    done = census(tree, "--limit", limit, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "argument --limit" in done.stderr
    assert "Traceback" not in done.stderr


@once
@POSIX
def test_census_names_files_that_cannot_be_read(database: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"a.py": b"x = 1\n"})
    (tree / "gone.py").symlink_to("nowhere.py")
    os.mkfifo(tree / "pipe.py")
    done = census(tree, "--database", database, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_in(database, tree)
    assert rows["a.py"][1] is None
    assert rows["gone.py"][1] == "FileNotFoundError: No such file or directory"
    assert rows["pipe.py"][1] == "OSError: not a regular file"
    assert "    gone.py: FileNotFoundError" in done.stdout


@once
@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are no text")
def test_census_of_a_file_whose_name_is_no_text(database: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"a.py": b""})
    (tree / os.fsdecode(b"caf\xe9.py")).write_bytes(b"x = 1\n")
    done = census(tree, "--database", database, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows_in(database, tree)["caf\\udce9.py"] == (
        *("caf\\udce9", None, 1, 1, 0, 0, 0, 0, 0, 0, 1),
    )


@once
def test_census_escapes_what_its_output_cannot_say(database: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"caf\xe9.py": b"1 +\n"})
    env = environment(PYTHONIOENCODING="ascii")
    done = census(tree, "--database", database, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "    caf\\xe9.py: SyntaxError" in done.stdout
    assert rows_in(database, tree).keys() == {"caf\xe9.py"}


@once
@pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="how deep a parser goes is its own affair"
)
def test_census_survives_a_file_too_deep_for_the_parser(database: Path, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"deep.py": b"-" * 100_000 + b"1\n", "a.py": b"x = 1\n"})
    done = census(tree, "--database", database, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_in(database, tree)
    assert re.match("MemoryError|RecursionError|SyntaxError", str(rows["deep.py"][1]))
    assert rows["a.py"] == ("a", None, 1, 1, 0, 0, 0, 0, 0, 0, 1)


@once
def test_census_says_when_the_two_ways_disagree(tree: Path, database: Path, tmp_path: Path) -> None:
    # Stand in for a file that changes between the two.
    code = (
        "import dataclasses, sys, census\n"
        "loop = census.count_in_a_loop\n"
        "def changed(*arguments):\n"
        "    *rows, last = loop(*arguments)\n"
        "    return [*rows, dataclasses.replace(last, lines=4)]\n"
        "census.count_in_a_loop = changed\n"
        "sys.exit(census.main())\n"
    )
    done = python("-c", code, tree, "--database", database, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "census.py: the two ways disagree; did these files change? windows.py"
    )
    assert "same rows" not in done.stdout


@once
def test_census_holds_a_bounded_number_of_files(tmp_path: Path) -> None:
    names = [f"m{number:02}.py" for number in range(60)]
    make_tree(tmp_path / "tree", dict.fromkeys(names, b"x = 1\n"))
    code = (
        "import json, threading, census\n"
        "from pathlib import Path\n"
        "lock, held, most, order = threading.Lock(), 0, 0, []\n"
        "read_file = census.read_file\n"
        "def read(folder, name):\n"
        "    global held, most\n"
        "    with lock:\n"
        "        held += 1\n"
        "        most = max(most, held)\n"
        "    return read_file(folder, name)\n"
        "class Progress:\n"
        "    def advance(self, files):\n"
        "        global held\n"
        "        with lock:\n"
        "            held -= files\n"
        "if __name__ == '__main__':\n"
        "    census.read_file = read\n"
        "    census.FILES_PER_CALL, census.CALLS_IN_FLIGHT = 2, 3\n"
        f"    rows = census.count(Path('tree'), {names}, Progress()).result()\n"
        "    print(json.dumps([most, held, [row.path for row in rows]]))\n"
    )
    make_tree(tmp_path, {"drive.py": code.encode()})
    done = python("drive.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    most, held, paths = json.loads(done.stdout)
    assert 2 < most <= 6
    assert held == 0
    assert paths == names


@once
@POSIX
def test_census_draws_a_bar_in_a_terminal(tree: Path, database: Path, tmp_path: Path) -> None:
    try:
        terminal, end = os.openpty()
    except OSError as exc:
        pytest.skip(f"no pseudo-terminals here: {exc}")
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "census.py", tree, "--database", database],
        cwd=tmp_path,
        env=environment(COLUMNS="70"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=end,
    )
    os.close(end)
    drawn = b""
    try:
        while part := os.read(terminal, 4096):
            drawn += part
    except OSError:  # Linux says that way that nobody holds the other end any more
        pass
    finally:
        os.close(terminal)
    assert process.wait(PATIENCE) == 0
    *bars, rest = drawn.decode().split("\r")
    assert rest == ""
    assert "[" + "." * 40 + "] with unsync: 0 of 8 " in "".join(bars)
    assert {len(bar) for bar in bars} == {0, 69}
    assert bars[-1].strip() == ""


@once
@POSIX
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ctrl_c_ends_the_census(method: str, database: Path, tmp_path: Path) -> None:
    work = Path(json.__file__).with_name("decoder.py").read_bytes()
    names = [f"m{number:03}.py" for number in range(400)]
    tree = make_tree(tmp_path / "tree", dict.fromkeys(names, work))
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "census.py", tree, "--database", database],
        cwd=tmp_path,
        env=start_method_environment(method, tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stderr
        while not re.search(r"with unsync: [1-9]", line := process.stderr.readline()):
            assert line, "it ended before it began"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        # This also waits until no worker holds the other ends any more.
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert (tmp_path / "method").read_text() == method
    assert stdout == ""
    # On a busy machine the exit may say then that it waits for what the processes are at.
    assert "census.py: interrupted" in stderr.splitlines()
    assert "Traceback" not in stderr
    assert rows_in(database, tree) == {}


def metrics(lines: list[str]) -> dict[str, float]:
    numbers = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(number) for name, _, number in numbers}


def check_metrics(found: dict[str, float], finished: str, failed: str, pending: str) -> None:
    # The last of the ten may have told its caller, and not be counted yet.
    assert found[finished] == 5
    assert found[failed] + found[pending] == 5
    assert found[pending] <= 1


def test_metrics_prometheus(tmp_path: Path) -> None:
    skip_without("prometheus_client")
    found = metrics(output_of("metrics_prometheus.py", tmp_path))
    check_metrics(
        found,
        'unsync_calls_total{end="finished",way="coroutines"}',
        'unsync_calls_total{end="failed",way="coroutines"}',
        'unsync_calls_pending{way="coroutines"}',
    )
    assert found["unsync_wakeups_total"] >= 1
    assert found["unsync_wakeups_total"] + found["unsync_wakeups_saved_total"] == 10
    assert found["unsync_loop_lag_seconds"] >= 0


@once
def test_metrics_opentelemetry(tmp_path: Path) -> None:
    skip_without("opentelemetry.sdk.metrics")
    found = metrics(output_of("metrics_opentelemetry.py", tmp_path))
    check_metrics(
        found,
        "unsync.calls {'unsync.way': 'coroutines', 'unsync.end': 'finished'}",
        "unsync.calls {'unsync.way': 'coroutines', 'unsync.end': 'failed'}",
        "unsync.calls.pending {'unsync.way': 'coroutines'}",
    )
    assert found["unsync.wakeups {}"] + found["unsync.wakeups_saved {}"] == 10
