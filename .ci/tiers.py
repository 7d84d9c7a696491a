"""The test runs of this project, tier by tier, and what runs their stages side by side.

    .venv/bin/python .ci/tiers.py TIER [--at-once N] [--before SECONDS]

`make test` and `make test-core` call it for their tiers, `.ci/run` and `.ci/full` for theirs. A
stage is one command. Stages start in the order of the table, at most N at once, each when those
that it needs have passed. What a stage prints goes to a file in build/stages/; the terminal shows
where each stage is, the end of what a failed one printed, and at last what every stage took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from wheels import interpreters, spread

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "stages"
# How often the terminal is told where the stages are, in seconds.
PROGRESS_SECONDS = 15.0
# A stage that takes this long hangs: the longest of all takes a quarter of it under load.
LIMIT_SECONDS = 3600.0
# How much of what a failed stage printed is shown, in lines; and at the end, of why it failed.
TAIL = 80
REASONS = 40

# That of .venv, which runs this file and `make test`; the tiers test the others from wheels.
PYTHON = "{}.{}".format(*sys.version_info)
# What must be there for a landing, oldest first: one that is missing fails it.
PYTHONS = (os.environ.get("PYTHONS") or "3.11 3.12 3.13 3.13t").split()
WITHOUT_GIL = [python for python in PYTHONS if python.endswith("t")]
OLDEST, NEWEST = ([python for python in PYTHONS if python not in WITHOUT_GIL][at] for at in (0, -1))
CORES = {"compiled": {"UNSYNC_NO_EXTENSIONS": ""}, "pure": {"UNSYNC_NO_EXTENSIONS": "1"}}


@dataclass
class Stage:
    """One command of a tier, and how it went."""

    name: str
    command: str
    env: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    # None until it has ended; then whether its exit status was 0.
    passed: bool | None = None
    seconds: float = 0.0

    @property
    def log(self) -> Path:
        return LOGS / f"{re.sub('[^a-z0-9.]+', '-', self.name.lower()).strip('-')}.log"

    def printed(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def place(self) -> str:
        """Where it is: how far pytest has come, or else the last line that it printed."""
        text = self.printed().rstrip()
        last = text.rpartition("\n")[2]
        percents = re.findall(r"\[ *(\d+%)\]", text)
        at_dots = re.fullmatch(r"[.sxFE]+( +\[ *\d+%\])?", last)
        return percents[-1] if at_dots and percents else last[:100]

    def tail(self) -> list[str]:
        """The end of what it printed, but for the tests that were skipped."""
        lines = self.printed().splitlines()
        return [line for line in lines if not line.startswith(("SKIPPED", "XFAIL"))][-TAIL:]

    def reasons(self) -> list[str]:
        """pytest's own lines on what failed, those of a tier inside this one included.

        And in which order the tests were, by the option that repeats it.
        """
        lines = self.printed().splitlines()
        kinds = r"E  |(FAILED|ERROR) \S+::|order of the tests: "
        return list(dict.fromkeys(line for line in lines if re.match(kinds, line)))[-REASONS:]

    def lacks(self) -> list[str]:
        """What pytest said of tests that were skipped for want of a program."""
        return re.findall(r"^\d+ skipped without .*$", self.printed(), re.MULTILINE)


FOLDERS = ["core", "world", "outside"]
STATES = "tests/core/test_state_machine.py"
MANY_SWITCHES = ("tests/support/stress.py", "--seconds", "20", "--switch-interval", "1e-5")
# Python's own word on every fork beside a thread, from 3.12 on.
FORK_WARNING = "ignore:This process:DeprecationWarning"


def suite(core: str, tests: str, workers: int, *options: str) -> Stage:
    """A folder of the suite on the checkout itself, on one core."""
    command = [
        str(Path(sys.executable).with_name("pytest")),
        "-q",
        f"tests/{tests}",
        *spread(workers),
    ]
    env = {**CORES[core], "UNSYNC_TEST_CORE": core}
    return Stage(f"{tests}, {core}", shlex.join([*command, *options]), env)


def test_core() -> list[Stage]:
    return [suite(core, "core", 2) for core in CORES]


def test() -> list[Stage]:
    """All of the suite on both cores. What waits the most comes first."""
    return [
        suite("compiled", "outside", 3),
        suite("compiled", "world", 3),
        suite("pure", "world", 3),
        *test_core(),
        # What does not depend on the core has been run with the compiled one.
        suite("pure", "outside", 2, "-m", "not once"),
    ]


def wheels(action: str, *arguments: str) -> str:
    return shlex.join([sys.executable, ".ci/wheels.py", action, *arguments])


def build(*arguments: str) -> Stage:
    given = shlex.quote(f"WHEELS={shlex.join(['build', *arguments])}")
    # Both compile the checkout's extension to C in the same place, so one comes after the other.
    return Stage("wheels", f"make wheels VENV=.venv-wheels {given}", needs=("environment",))


def install(python: str, *options: str) -> Stage:
    name = f"install on {python}{', the pure wheel' if 'pure' in options else ''}"
    return Stage(name, wheels("install", python, *options), needs=("wheels",))


def installed_suite(name: str, python: str, core: str, *arguments: str, wheel: str = "") -> Stage:
    """pytest on what pip installed on that Python: of the compiled wheel, if no other is named."""
    made = f"install on {python}{', the pure wheel' if wheel == 'pure' else ''}"
    options = ["--core", core, *(["--wheel", wheel] if wheel else [])]
    command = wheels("test", python, *options, "--", "-q", *arguments)
    return Stage(f"{name} on {python}, {core}", command, needs=(made,))


def program(name: str, python: str, core: str, *arguments: str) -> Stage:
    command = wheels("python", python, "--", *arguments)
    env = CORES[core] | ({"PYTHON_GIL": "0"} if python in WITHOUT_GIL else {})
    return Stage(f"{name} on {python}, {core}", command, env, (f"install on {python}",))


def packaging() -> Stage:
    """The tests of packages, of the wheels that have just been built."""
    stage = installed_suite("wheels", OLDEST, "compiled", "tests/outside/test_packaging.py")
    stage.env["UNSYNC_WHEELS"] = str(ROOT / "dist")
    return stage


def stress(python: str, core: str, seconds: int) -> Stage:
    return program("stress", python, core, "tests/support/stress.py", "--seconds", str(seconds))


def checkout(sanitizer_seconds: int) -> list[Stage]:
    """What is done with the checkout itself, as its developers do it."""
    made = ("environment",)
    return [
        Stage("environment", "make environment"),
        Stage("make test", "make test", {"AT_ONCE": "2"}, made),
        Stage("lint", "make lint", needs=made),
        Stage("docs", "make docs", needs=made),
        Stage("ThreadSanitizer", f".ci/sanitizer {sanitizer_seconds}", needs=made),
    ]


def run() -> list[Stage]:
    """What must pass before a change lands."""
    # `make test` has run all of the suite on the Python that it uses.
    others = [python for python in PYTHONS if python != PYTHON]
    return [
        *checkout(sanitizer_seconds=20),
        build("--once", *PYTHONS),
        *(install(python) for python in PYTHONS),
        packaging(),
        *(
            installed_suite("core", python, core, "tests/core", *spread(2))
            for python in others
            for core in CORES
        ),
        *(
            installed_suite("world", python, "compiled", "tests/world", *spread(3))
            for python in others
            if python in (OLDEST, NEWEST, *WITHOUT_GIL)
        ),
        *(stress(NEWEST, core, 20) for core in CORES),
    ]


def full() -> list[Stage]:
    """Nightly, before a release, and whenever someone doubts."""
    more = [each for each in interpreters() if each.name not in PYTHONS]
    # Of those that the tests need, not of whatever else is on the machine.
    compiled = [*PYTHONS, *(each.name for each in more if each.compiles)]
    stages = [*checkout(sanitizer_seconds=300), build(*compiled), packaging()]
    if os.name == "posix":
        if not {"3.14", "3.15", "pypy3.11"} <= {each.name for each in more}:
            # The longest of all comes first, lest it be alone in the end.
            stages.insert(0, Stage("3.14, 3.15 and PyPy, in Debian sid", ".ci/sid"))
        stages.append(Stage("AddressSanitizer", ".ci/address 30", needs=("environment",)))
    for python in compiled:
        stages.append(install(python, "--companions"))
        # A process for each folder: what one imports, the other must not have.
        stages += [
            installed_suite(folder, python, "compiled", f"tests/{folder}", *spread(3))
            for folder in FOLDERS
        ]
    # What does not depend on the core has been run with the compiled one.
    folders = {folder: [*spread(3), "-m", "not once"] for folder in FOLDERS}
    for python in [*PYTHONS, *(each.name for each in more)]:
        stages.append(install(python, "--companions", "--wheel", "pure"))
        stages += [
            installed_suite(folder, python, "pure", f"tests/{folder}", *options, wheel="pure")
            for folder, options in folders.items()
        ]
    for core in CORES:
        stages += [
            *(stress(python, core, 120) for python in (NEWEST, *WITHOUT_GIL)),
            # With the checks of Python's debug mode, those of its allocator among them.
            program("debug mode", NEWEST, core, "-X", "dev", *MANY_SWITCHES),
            program("soak", NEWEST, core, "-W", FORK_WARNING, "bench/soak.py", "--minutes", "3"),
            installed_suite("hypothesis", NEWEST, core, STATES, "--hypothesis-profile", "full"),
        ]
    for python in WITHOUT_GIL:
        # The plugin comes last, since it changes every run in this environment from then on.
        plugin = ("-m", "pip", "install", "--quiet", "pytest-run-parallel")
        stages.append(program("run-parallel", python, "compiled", *plugin))
        stages[-1].needs += tuple(f"{folder} on {python}, compiled" for folder in FOLDERS)
        options = ("--parallel-threads", "4", "--skip-thread-unsafe", "1", "-p", "no:randomly")
        made = stages[-1].name
        for folder in FOLDERS:
            name = f"{folder} in threads"
            stages.append(installed_suite(name, python, "compiled", f"tests/{folder}", *options))
            stages[-1].needs += (made,)
    return stages


TIERS = {"test-core": test_core, "test": test, "run": run, "full": full}


async def execute(stage: Stage) -> None:
    """Runs the command of a stage to its end, and ends it if this task is cancelled."""
    began = time.monotonic()
    with stage.log.open("wb") as log:
        process = await asyncio.create_subprocess_shell(
            stage.command,
            cwd=ROOT,
            env={**os.environ, **stage.env},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # A group of its own, which can be ended as a whole.
        )
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                status = await process.wait()
        except TimeoutError:
            await end(process)
            log.write(f"ended after {LIMIT_SECONDS:.0f} s\n".encode())
            status = None
        except asyncio.CancelledError:
            await end(process)
            raise
    stage.passed = status == 0
    stage.seconds = time.monotonic() - began


async def end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if os.name == "posix" else os.kill)(process.pid, signal.SIGTERM)
    await process.wait()


async def execute_all(stages: list[Stage], at_once: int, before: float) -> None:
    """Runs the stages, and tells the terminal what happens.

    :param before: how many seconds it took to get so far.
    """
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    named = {stage.name: stage for stage in stages}
    waiting = list(stages)
    at_work: dict[asyncio.Task[None], Stage] = {}
    while waiting or at_work:
        # In the order of the table, where what a stage needs comes before it.
        for stage in [*waiting]:
            needs = [named[name] for name in stage.needs]
            if any(need.passed is False for need in needs):
                stage.passed = False
                waiting.remove(stage)
                say(f"{stage.name}: not run, since what it needs has failed")
            elif len(at_work) < at_once and all(need.passed for need in needs):
                waiting.remove(stage)
                at_work[asyncio.create_task(execute(stage))] = stage
                say(f"{stage.name}: started")
        if not at_work:
            continue  # what was left needs what has failed
        ended, _ = await asyncio.wait(
            at_work, timeout=PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        for task in ended:
            stage = at_work.pop(task)
            await task
            how = "passed" if stage.passed else "FAILED"
            say(f"{stage.name}: {how} in {stage.seconds:.0f} s: {stage.place()}")
            if not stage.passed:
                print(*stage.tail(), sep="\n")
                print(f"== the end of {stage.log.relative_to(ROOT)}; the command was:")
                print(f"   {stage.command}", flush=True)
        if not ended:
            say(" | ".join(f"{stage.name}: {stage.place()}" for stage in at_work.values()))
    print("\nseconds  stage")
    for stage in stages:
        print(f"{stage.seconds:7.0f}  {stage.name}{'' if stage.passed else ': FAILED'}")
    print(f"{before:7.0f}  before that") if before else None
    print(f"{before + time.monotonic() - began:7.0f}  in all, {at_once} stages at once")
    # What could not be tested here, each once, and with what command that can be changed.
    print(*dict.fromkeys(line for stage in stages for line in stage.lacks()), sep="\n")
    # Once more, and last: of a long log the end is what is read.
    for stage in stages:
        if stage.passed is False and (reasons := stage.reasons()):
            print(f"== {stage.name}", *reasons, sep="\n")


def count_tests(stages: list[Stage]) -> str:
    """The closing line: what pytest said at the end of each stage, added up."""
    totals = Counter(passed=0, failed=0, skipped=0)
    for stage in stages:
        text = stage.printed()
        # pytest's own line ends with its time; the one of a tier inside this one is like the one
        # that comes of this. Type checkers count their errors in the same words.
        closing = r"^(?:=+ )?(\d+ [a-z]+(?:, \d+ [a-z]+)* in .*|\d+ passed, \d+ failed, .*)$"
        for line in re.findall(closing, text, re.MULTILINE):
            for number, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", line):
                totals["failed" if what.startswith("error") else what] += int(number)
    return ", ".join(f"{number} {what}" for what, number in totals.items())


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tier", choices=TIERS)
    parser.add_argument(
        "--at-once", type=int, default=int(os.environ.get("AT_ONCE") or 3), metavar="N"
    )
    parser.add_argument("--before", type=float, default=0.0, metavar="SECONDS")
    options = parser.parse_args()
    if os.name == "posix":  # As on Ctrl-C: what the stages have started ends with this program.
        this = asyncio.current_task()
        assert this is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    stages = TIERS[options.tier]()
    LOGS.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        stage.log.unlink(missing_ok=True)
    await execute_all(stages, options.at_once, options.before)
    print(count_tests(stages))
    return 0 if all(stage.passed for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
