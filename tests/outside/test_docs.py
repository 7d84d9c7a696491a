"""The Python shown in the README and the docs runs, and does what is said beside it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.databases import free_port
from support.needs import skip_without
from support.servers import accepts
from support.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The marks of blocks that are not run as programs by themselves, but by a test of their own.
HAS_ITS_TEST = (
    "# batch.py\n",
    "# outbox.py\n",
    "# service.py\n",
    "# test_",
    "# bench/service/pipeline_unsync.py\n",
)

# A busy machine runs what is shown slowly.
PROGRAM_SECONDS = 500

once = pytest.mark.once  # beside these, the plain core runs the first thing and the last one shown

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def patient(code: str) -> str:
    """The same, but where it waits for some seconds at most, it does for many."""
    return re.sub(r"(\.(?:result|shutdown)\((?:timeout=)?)\d+\)", rf"\g<1>{PROGRAM_SECONDS})", code)


def blocks() -> list[object]:
    found = []
    for page in PAGES:
        for number, code in enumerate(BLOCK.findall(page.read_text())):
            if not code.startswith(HAS_ITS_TEST):
                found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@once
@pytest.mark.parametrize("code", blocks())
def test_what_is_shown_runs(run_python: Run, tmp_path: Path, code: str) -> None:
    # Some interpreters lack some of the companions.
    for name in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        skip_without(name)
    run = run_python(patient(code), timeout=PROGRAM_SECONDS, env={"IPYTHONDIR": str(tmp_path)})
    assert (run.returncode, run.stderr) == (0, "")


def test_the_readme_s_taste_prints_what_one_expects(run_python: Run) -> None:
    code = BLOCK.findall((ROOT / "README.md").read_text())[0]
    pages = [f"page {n}" for n in range(10)]
    files = [f"file {n}" for n in range(10)]
    assert run_python(code, timeout=PROGRAM_SECONDS).stdout.splitlines() == [
        str(pages + files),
        "file 1 page 2",
        "['page 3', 'file 4']",
        "PAGE 5",
    ]


@once
def test_the_commands_in_the_readme_exist() -> None:
    commands = re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["demo", "test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(commands) <= set(targets)


@once
def test_the_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# How each command that is shown is run.
COMMANDS = {
    "pip install .": "by tests/outside/test_packaging.py, which builds and installs",
    "python -m unsync": "by tests/world/test_main.py",
    "python -m unsync --json": "by tests/world/test_main.py",
    "python service.py 8000": "by test_the_tutorial_s_service_answers_and_stops",
    "curl http://127.0.0.1:8000/apple": "by test_the_tutorial_s_service_answers_and_stops",
}


@once
def test_each_command_that_is_shown_is_known() -> None:
    shown = {
        line
        for page in PAGES
        for block in SHELL.findall(page.read_text())
        for line in block.splitlines()
    }
    assert shown == set(COMMANDS)


@once
def test_the_tests_that_are_shown_pass(tmp_path: Path) -> None:
    skip_without("anyio", "freezegun", "hypothesis", "pytest_asyncio", "time_machine")
    shown = [
        block
        for block in BLOCK.findall((ROOT / "docs" / "how-to" / "testing.md").read_text())
        if block.startswith(("# test_", "# conftest"))
    ]
    assert len(shown) == 7
    for block in shown:
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(patient(block))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "7 passed" in run.stdout


def program_of(page: str, name: str) -> str:
    """The one block of a page of docs/ that names that file in its first line."""
    blocks: list[str] = BLOCK.findall((ROOT / "docs" / page).read_text())
    (program,) = [block for block in blocks if block.startswith(f"# {name}\n")]
    return program


# Who starts the tests in the background may have SIGINT ignored.
HEEDS_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


@contextlib.contextmanager
def running(code: str, name: str, folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The program in a file of that name; what it prints is for `communicate()`."""
    (folder / name).write_text(code)
    with subprocess.Popen(
        [sys.executable, name, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            yield program
        finally:
            program.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_the_tutorial_s_service_answers_and_stops(tmp_path: Path) -> None:
    code = program_of("tutorial.md", "service.py")
    with running(patient(code), "service.py", tmp_path, "0") as service:
        assert service.stdout is not None
        port = int(service.stdout.readline().rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/apple")
        answer = connection.getresponse()
        assert answer.status == 200
        assert json.load(answer) == {"name": "apple", "price": 5, "stock": 50}
        connection.close()
        service.send_signal(signal.SIGTERM)
        stdout, stderr = service.communicate(timeout=PATIENCE)
    assert (service.returncode, stdout) == (0, "stopped\n")
    assert '"GET /apple HTTP/1.1" 200' in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_the_guide_s_batch_ends_quickly_by_ctrl_c(tmp_path: Path) -> None:
    code = program_of("guide.md", "batch.py")
    # The first file is short, and none of the others ends by itself.
    long = code.replace("time.sleep(1)", f"time.sleep({PROGRAM_SECONDS} if number else 0)")
    assert long != code
    with running(HEEDS_CTRL_C + long, "batch.py", tmp_path) as batch:
        assert batch.stdout is not None
        assert batch.stdout.readline() == "0\n"
        batch.send_signal(signal.SIGINT)
        stdout, stderr = batch.communicate(timeout=PATIENCE)
    assert (batch.returncode, stdout) == (130, "")
    assert stderr == "unsync: the exit lost 999 calls of convert()\n"


@once
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_flask_s_own_server_waits_for_what_requests_have_begun(
    tmp_path: Path, number: signal.Signals
) -> None:
    skip_without("flask")
    port = free_port()
    code = program_of("how-to/flask.md", "outbox.py")
    code = patient(code.replace("8000", str(port)))
    at_work = "    if number == 2:\n        print('at work', flush=True)\n        time.sleep(1)\n"
    code = "import time\n" + code.replace("    send(number)", at_work + "    send(number)")
    with running(HEEDS_CTRL_C + code, "outbox.py", tmp_path) as outbox:
        wait_until(lambda: accepts(f"http://127.0.0.1:{port}"), "the server's start")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("POST", "/messages/1")
        assert connection.getresponse().status == 202
        connection.close()
        connection.request("POST", "/messages/2")
        assert outbox.stdout is not None
        lines = iter(outbox.stdout.readline, "")
        assert "at work\n" in lines
        outbox.send_signal(number)
        assert connection.getresponse().status == 202
        connection.close()
        stdout, _ = outbox.communicate(timeout=PATIENCE)
    assert outbox.returncode == 0
    assert stdout.splitlines()[-1] == "sent 2"


@once
def test_each_room_of_the_house_is_in_the_architecture_s_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "unsync").glob("*.py*"):
        if path.suffix in {".py", ".pyx"}:
            assert f"`unsync/{path.name}`" in text, path.name
