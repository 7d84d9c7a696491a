"""Take a census of the Python files in a folder: how long, how nested, how branchy they are.

    python examples/census.py [FOLDER] [--engine ENGINE] [--database FILE] [--limit N]

This is unsync at work on a whole job. Files are read in threads, parsed and measured in other
processes, and a coroutine gathers the results; `read`, `measure` and `count` are all there is to
it. The plain sequential loop then does the same work, to check the rows and to compare the time.

The same three functions run on a cluster of machines as well: `--engine` says where files are
measured, in `processes` (the default), in `threads`, in the processes of `loky`, or on a Dask
cluster, at an address (`dask=tcp://127.0.0.1:8786`) or one started here for the while (`dask`).

Without FOLDER, the standard library of the running Python is counted. The rows go into an SQLite
database, one for each file; a new census of a folder replaces the one before. What cannot be read
or parsed is counted and named. The exit status is 0; 1 if the two ways disagree; 2 if there is
nothing to count, nowhere to store it or no such engine; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import atexit
import importlib.util
import io
import os
import shutil
import signal
import sqlite3
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from unsync import Unfuture, unsync

FILES_PER_CALL = 16  # a call to another process has its price: let some files share it
CALLS_IN_FLIGHT = 16  # so at most 256 files are in memory, however many there are


@dataclass(frozen=True)
class Source:
    """The bytes of one file, or the problem that kept them from being read."""

    path: str
    data: bytes = b""
    problem: str | None = None


@dataclass(frozen=True)
class Row:
    """What is known about one file. One that has a problem counts as empty.

    Attributes:
        path: where it is, below the folder, with `/` between the parts.
        package: the top-level package or module that it belongs to.
        problem: why it could not be measured, or None.
        lines: all its lines.
        code_lines: lines with code on them; docstrings are code.
        comment_lines: lines with nothing but a comment.
        functions: `def` statements, methods and nested ones included.
        async_functions: `async def` statements.
        classes: `class` statements.
        imports: `import` and `from ... import` statements.
        nesting: how many levels deep its deepest line is indented.
        complexity: McCabe's number for the whole file, which is one more than its branches;
            a chain of `and` or of `or` is one branch.
    """

    path: str
    package: str
    problem: str | None = None
    lines: int = 0
    code_lines: int = 0
    comment_lines: int = 0
    functions: int = 0
    async_functions: int = 0
    classes: int = 0
    imports: int = 0
    nesting: int = 0
    complexity: int = 0


# With unsync: threads read, processes measure, a coroutine gathers.


@unsync
def read(folder: Path, names: Sequence[str]) -> list[Source]:
    return [read_file(folder, name) for name in names]


@unsync(cpu_bound=True)
def measure(sources: Sequence[Source]) -> list[Row]:
    return [measure_file(source) for source in sources]


def measure_what_was_read(task: Unfuture[list[Source]]) -> Unfuture[list[Row]]:
    return measure(task.result())


@unsync
async def count(folder: Path, names: Sequence[str], progress: Progress) -> list[Row]:
    """Read and measure all files, a bounded number at a time; the rows keep the files' order."""
    in_flight = asyncio.Semaphore(CALLS_IN_FLIGHT)

    async def count_some(some: Sequence[str]) -> list[Row]:
        async with in_flight:
            rows = await read(folder, some).then(measure_what_was_read)
        progress.advance(len(rows))
        return rows

    starts = range(0, len(names), FILES_PER_CALL)
    parts = await asyncio.gather(*(count_some(names[i : i + FILES_PER_CALL]) for i in starts))
    return [row for rows in parts for row in rows]


# Where files are measured: nothing else in this program knows of it.
# Each engine comes with a package.

ENGINES = {"threads": "unsync", "processes": "unsync", "loky": "loky", "dask": "distributed"}


def start_engine(engine: str) -> Executor:
    """Start what runs the functions marked `cpu_bound`; it ends with this program.

    Raises OSError or ValueError if there is no cluster at the address.
    """
    name, _, address = engine.partition("=")
    if name == "threads":
        return unsync.thread_executor
    if name == "processes":
        return start_processes()
    if name == "loky":
        import loky

        pool: Executor = loky.get_reusable_executor(initializer=prepare_process)
        return pool
    from distributed import Client

    if address:
        client = Client(address, timeout=10)
    else:
        # Any port for its pages, since others may have the usual one.
        client = Client(threads_per_worker=1, dashboard_address=":0")
        client.run(prepare_process)
    atexit.register(client.close)  # left to itself, Dask ends with warnings
    # Each call is a call, even if there was one like it.
    cluster: Executor = client.get_executor(pure=False)
    return cluster


def start_processes() -> Executor:
    """Start the processes that measure, deaf to Ctrl-C: it is for this process to react to it.

    Raises KeyboardInterrupt, if it must, only when they have started.
    """
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        executor = ProcessPoolExecutor(initializer=prepare_process)
        wait([executor.submit(int) for _ in range(os.cpu_count() or 1)])  # so they start now
    finally:
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            raise KeyboardInterrupt
    return executor


def prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_style()


# Without: the plain loop.


def count_in_a_loop(folder: Path, names: Sequence[str], progress: Progress) -> list[Row]:
    rows = []
    for name in names:
        rows.append(measure_file(read_file(folder, name)))
        progress.advance(1)
    return rows


# One file.

# What other people's files raise: missing, forbidden, not decodable, not Python, too deep.
PROBLEMS = (
    OSError,
    LookupError,
    ValueError,
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,
)

BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.BoolOp,
    ast.comprehension,
    ast.match_case,
)

LAYOUT = (
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def read_file(folder: Path, name: str) -> Source:
    path = folder / name
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")  # a pipe, for one, might never end
        return Source(name, path.read_bytes())
    except PROBLEMS as error:
        return Source(name, problem=describe(error))


def measure_file(source: Source) -> Row:
    path = printable(source.path)
    package = path.partition("/")[0].removesuffix(".py")
    if source.problem is not None:
        return Row(path, package, source.problem)
    try:
        text = decode(source.data)
        nodes = Counter(map(type, ast.walk(ast.parse(text))))
        lines = io.StringIO(text).readlines()
        code_lines, comment_lines, nesting = measure_layout(lines)
    except PROBLEMS as error:
        return Row(path, package, describe(error))
    return Row(
        path,
        package,
        lines=len(lines),
        code_lines=code_lines,
        comment_lines=comment_lines,
        functions=nodes[ast.FunctionDef],
        async_functions=nodes[ast.AsyncFunctionDef],
        classes=nodes[ast.ClassDef],
        imports=nodes[ast.Import] + nodes[ast.ImportFrom],
        nesting=nesting,
        complexity=1 + sum(nodes[branch] for branch in BRANCHES),
    )


def ignore_style() -> None:
    """Say nothing about the style of other people's code, in any thread of this process."""
    warnings.filterwarnings("ignore", module="<unknown>")  # as `ast.parse` calls what it parses


def decode(data: bytes) -> str:
    """Decode a source file as Python does: by its byte order mark or coding comment, or as UTF-8.

    Raises one of PROBLEMS if it is not text in that encoding.
    """
    stream = io.BytesIO(data)
    encoding, _ = tokenize.detect_encoding(stream.readline)
    stream.seek(0)
    return io.TextIOWrapper(stream, encoding).read()


def measure_layout(lines: Sequence[str]) -> tuple[int, int, int]:
    """Return the code lines, the comment lines and the deepest level of indentation."""
    code: set[int] = set()
    comments: set[int] = set()
    level = deepest = 0
    for token in tokenize.generate_tokens(iter(lines).__next__):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type == tokenize.INDENT:
            level += 1
            deepest = max(deepest, level)
        elif token.type == tokenize.DEDENT:
            level -= 1
        elif token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code), len(comments - code), deepest


def describe(error: BaseException) -> str:
    """Return an error's name and message in one line, without the file's name."""
    if isinstance(error, SyntaxError):
        message = error.msg if error.lineno is None else f"{error.msg} (line {error.lineno})"
    else:
        message = getattr(error, "strerror", None) or str(error)
    return printable(": ".join(filter(None, (type(error).__name__, message))))


def printable(text: str) -> str:
    """Escape what UTF-8 cannot say: the undecodable bytes of a file's name, for one."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# Finding, showing, storing.


def find_files(folder: Path, skip: Collection[str] = ()) -> list[str]:
    """Return the sorted paths of the *.py files below `folder`, but not below folders in `skip`."""

    def complain(error: OSError) -> None:
        report(f"cannot look into {error.filename}: {error.strerror}")

    names = []
    for parent, folders, files in os.walk(folder, onerror=complain):
        folders[:] = [name for name in folders if name not in skip]
        below = Path(parent).relative_to(folder)
        names += [(below / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(names)


class Progress:
    """Tells how far a count is: a live bar in a terminal, elsewhere a line at every quarter."""

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self.live = sys.stderr.isatty()
        self.drawn = 0.0  # time.monotonic() of the last bar, in seconds

    def __enter__(self) -> Progress:
        self.advance(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.draw("")

    def advance(self, files: int) -> None:
        quarter = self.done * 4 // self.total
        self.done += files
        text = f"{self.label}: {self.done:,} of {self.total:,} files"
        if not self.live:
            if files == 0 or self.done * 4 // self.total > quarter:
                report(text)
        elif time.monotonic() - self.drawn > 0.05:
            self.drawn = time.monotonic()
            filled = 40 * self.done // self.total
            self.draw(f"[{'#' * filled:.<40}] {text}")

    def draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


CREATE = """
    CREATE TABLE IF NOT EXISTS files (
        folder TEXT NOT NULL, path TEXT NOT NULL, package TEXT NOT NULL, problem TEXT,
        lines INTEGER NOT NULL, code_lines INTEGER NOT NULL, comment_lines INTEGER NOT NULL,
        functions INTEGER NOT NULL, async_functions INTEGER NOT NULL, classes INTEGER NOT NULL,
        imports INTEGER NOT NULL, nesting INTEGER NOT NULL, complexity INTEGER NOT NULL,
        PRIMARY KEY (folder, path)
    )"""
DELETE = "DELETE FROM files WHERE folder = ?"
INSERT = """
    INSERT INTO files VALUES (
        :folder, :path, :package, :problem, :lines, :code_lines, :comment_lines,
        :functions, :async_functions, :classes, :imports, :nesting, :complexity
    )"""
SUMS = """
    count(*) AS files, sum(lines) AS lines, sum(code_lines) AS code,
    sum(comment_lines) AS comments, sum(functions + async_functions) AS functions,
    sum(classes) AS classes, sum(complexity) AS complexity
    FROM files WHERE folder = ?"""
TOP_10 = f"""
    SELECT package, {SUMS} GROUP BY package ORDER BY sum(lines) DESC, package LIMIT 10"""
TOTAL = f"SELECT 'in all', {SUMS}"


def store(database: sqlite3.Connection, folder: str, rows: Sequence[Row]) -> None:
    """Replace what the database holds about a folder."""
    with database:  # one transaction: whoever is interrupted keeps the old rows
        database.execute(DELETE, (folder,))
        database.executemany(INSERT, ({"folder": folder, **vars(row)} for row in rows))


def print_table(database: sqlite3.Connection, folder: str) -> None:
    """Print the ten longest packages and the totals."""
    top = database.execute(TOP_10, (folder,))
    heads = [column[0] for column in top.description]
    lines = [*top, *database.execute(TOTAL, (folder,))]
    width = max(len(name) for name, *_ in [heads, *lines])
    print(f"{heads[0]:{width}}", *(f"{head:>10}" for head in heads[1:]))
    for name, *numbers in lines:
        print(f"{name:{width}}", *(f"{number:10,}" for number in numbers))


def report(message: str) -> None:
    print("census.py:", printable(message), file=sys.stderr, flush=True)


# The job.


def main(arguments: Sequence[str] | None = None) -> int:
    """Take a census and return the exit status."""
    options = parse(arguments)
    ignore_style()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file may have any name
    try:
        return run(options.folder, options.database, options.limit, options.engine)
    except KeyboardInterrupt:
        unsync.shutdown()  # cancels the coroutine, and with it all that it waits for
        report("interrupted")
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return int(text)

    def engine(text: str) -> str:
        name = "dask" if text.startswith("dask=") else text
        if name not in ENGINES:
            known = ", ".join(ENGINES)
            raise argparse.ArgumentTypeError(f"no engine {text!r}; there are {known}, dask=ADDRESS")
        package = ENGINES[name]
        if importlib.util.find_spec(package) is None:
            raise argparse.ArgumentTypeError(f"{name} needs another package: pip install {package}")
        return text

    parser = argparse.ArgumentParser(description="Take a census of the Python files in a folder.")
    parser.add_argument("folder", nargs="?", help="default: Python's own standard library")
    parser.add_argument(
        "--database",
        metavar="FILE",
        default=os.path.join(tempfile.gettempdir(), "unsync-census.sqlite3"),
        help="where the rows go (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        type=engine,
        default="processes",
        help=f"where to measure: {', '.join(ENGINES)} or dask=ADDRESS (default: %(default)s)",
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="count only N files")
    return parser.parse_args(arguments)


def run(folder: str | None, database_file: str, limit: int | None, engine: str) -> int:
    skip: Sequence[str] = ()
    if folder is None:
        folder = sysconfig.get_path("stdlib")
        skip = ("site-packages", "dist-packages")
    if not os.path.isdir(folder):
        report(f"no such folder: {folder}")
        return 2
    root = Path(folder).resolve()
    names = find_files(root, skip)[:limit]
    if not names:
        report(f"no Python files in {root}")
        return 2
    try:
        with closing(sqlite3.connect(database_file)) as database:
            database.execute(CREATE)
            return take_census(root, names, database, database_file, engine)
    except sqlite3.Error as error:
        report(f"cannot use the database {database_file}: {error}")
        return 2


def take_census(
    root: Path,
    names: Sequence[str],
    database: sqlite3.Connection,
    database_file: str,
    engine: str,
) -> int:
    """Count with unsync, store and print; then count in a loop and compare."""
    start = time.perf_counter()
    try:
        unsync.process_executor = start_engine(engine)
    except (OSError, ValueError) as error:
        report(f"cannot start the engine {engine}: {describe(error)}")
        return 2
    with Progress("with unsync", len(names)) as progress:
        task = count(root, names, progress)
        while not task.done():  # an endless wait may miss Ctrl-C, on Windows for one
            with suppress(TimeoutError):
                task.exception(timeout=1)
        rows = task.result()
    seconds = time.perf_counter() - start

    folder = printable(str(root))
    store(database, folder, rows)
    problems = [row for row in rows if row.problem is not None]
    print(f"{len(rows):,} files in {folder}, {len(problems):,} with problems")
    for row in problems:
        print(f"    {row.path}: {row.problem}")
    print_table(database, folder)
    print(f"Rows stored in {printable(database_file)}", flush=True)

    # The loop is the second to come, so the files are in the system's cache for it.
    start = time.perf_counter()
    with Progress("plain loop", len(names)) as progress:
        loop_rows = count_in_a_loop(root, names, progress)
    loop_seconds = time.perf_counter() - start

    print(f"With unsync: {seconds:.2f} s")
    print(f"Plain loop:  {loop_seconds:.2f} s")
    if rows != loop_rows:
        pairs = zip(rows, loop_rows, strict=True)
        differing = [row.path for row, loop_row in pairs if row != loop_row]
        report(f"the two ways disagree; did these files change? {', '.join(differing)}")
        return 1
    print(f"Both gave the same rows; unsync was {loop_seconds / seconds:.2f} times as fast.")
    if seconds > loop_seconds:
        print("That is slower: to start the engine and use it cost more than it saved.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
