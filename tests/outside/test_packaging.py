"""What is built, with a compiler and without, and what an import costs.

`UNSYNC_WHEELS` may name a folder with the source distribution, the pure wheel and a compiled one
for this Python, which are looked at then. If it is not set, they are built here; and `setup.py`
compiles a small extension in the place of the core, which takes a second and not forty. What it
does with an extension does not depend on what is in it. Where it has to work, the one under test,
which somebody compiled already, takes its place.
"""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.needs import skip_without

import unsync as package

pytestmark = pytest.mark.alone  # the builds are shared

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
SOURCES += [f"unsync/{pattern}" for pattern in ("*.py", "*.pyx", "*.pxd", "py.typed")]

# The one place that has it.
(VERSION,) = re.findall(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"))

CORE_SOURCE = "unsync/_core.pyx"
STAND_IN = "def stand_in():\n    return 1\n"

# Of the wheels for this Python: "cp313-cp313", and "cp313-cp313t" without the GIL.
PYTHON_TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
PYTHON_TAG += f"-{PYTHON_TAG}{'t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''}"

once = pytest.mark.once


@pytest.fixture(scope="module")
def build(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a copy of the sources, with the build's own environment variables."""
    skip_without("pip", "setuptools", "Cython")

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("build")
        for pattern in SOURCES:
            for path in ROOT.glob(pattern):
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(path, target)
        (folder / CORE_SOURCE).write_text(STAND_IN)
        inherited = {k: v for k, v in os.environ.items() if k != "UNSYNC_NO_EXTENSIONS"}
        # What is built is thrown away: quick is better than fast.
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={"CFLAGS": "-O0", **inherited, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done

    return run


def given(pattern: str) -> Path | None:
    """The one file of this name in the folder that is given, if one is."""
    folder = os.environ.get("UNSYNC_WHEELS")
    if not folder:
        return None
    found = [*Path(ROOT, folder).glob(pattern)]
    assert len(found) == 1, f"{pattern} in {folder}: {found}"
    return found[0]


WHEEL = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-v")


@pytest.fixture(scope="module")
def sdist(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = given("unsync-*.tar.gz")
    if there is not None:
        return there
    out = tmp_path_factory.mktemp("sdist")
    build: Callable[..., object] = request.getfixturevalue("build")
    build("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})")
    (path,) = out.iterdir()
    return path


def has_compiler() -> bool:
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cl"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return shutil.which(compiler.split()[0]) is not None and header.exists()


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as users without a ready-made one get it: from the source distribution."""
    if sys.implementation.name != "cpython":
        pytest.skip("needs CPython")
    there = given(f"unsync-*-{PYTHON_TAG}-*.whl")
    if there is not None:
        return there
    if not has_compiler():
        pytest.skip("needs Python's headers and a C compiler")
    out = tmp_path_factory.mktemp("compiled")
    sdist: Path = request.getfixturevalue("sdist")
    build: Callable[..., object] = request.getfixturevalue("build")
    build(*WHEEL, "-w", str(out), str(sdist), UNSYNC_NO_EXTENSIONS="")
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def pure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = given("unsync-*-none-any.whl")
    if there is not None:
        return there
    out = tmp_path_factory.mktemp("pure")
    build: Callable[..., object] = request.getfixturevalue("build")
    build(*WHEEL, "-w", str(out), ".", UNSYNC_NO_EXTENSIONS="1")
    (path,) = out.iterdir()
    return path


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def extensions(wheel: Path) -> list[str]:
    return [name for name in names(wheel) if name.endswith((".so", ".pyd"))]


def metadata(wheel: Path, name: str = "METADATA") -> email.message.Message:
    with zipfile.ZipFile(wheel) as file:
        (path,) = [path for path in file.namelist() if path.endswith(f".dist-info/{name}")]
        return email.parser.Parser().parsestr(file.read(path).decode())


def use(wheel: Path, folder: Path, **env: str) -> list[object]:
    """Installs the wheel into a folder, and says what came of using it there."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    for name in extensions(wheel):
        if not os.environ.get("UNSYNC_WHEELS"):
            if not package.ACCELERATED:
                pytest.skip("needs the compiled core, which is the one under test")
            shutil.copy(sys.modules["unsync._core"].__file__ or "", folder / name)
    return use_folder(folder, **env)


def use_folder(folder: Path, **env: str) -> list[object]:
    program = (
        "import json, os, unsync\n"
        "async def one(): return 1\n"
        "results = [unsync.unsync(each)().result(60) for each in (one, lambda: 2)]\n"
        "print(json.dumps([unsync.__file__, unsync.ACCELERATED, unsync.__version__, results]))\n"
    )
    inherited = {k: v for k, v in os.environ.items() if k != "UNSYNC_NO_EXTENSIONS"}
    done = subprocess.run(
        # Without site: the import hook of an editable installation would lend its extension.
        [sys.executable, "-S", "-c", program],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(folder), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, *answer = json.loads(done.stdout)
    assert Path(where).parent == folder / "unsync"
    return answer


WORKS = [VERSION, [1, 2]]


@once
def test_the_source_distribution_has_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}
    assert sdist.name == f"unsync-{VERSION}.tar.gz"
    made = (".c", ".so", ".pyd", ".pyc")
    expected = {str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern)}
    # And whatever else there may be some day in the package: what is compiled may want it.
    package_files = [path for path in (ROOT / "unsync").rglob("*.*") if path.is_file()]
    expected |= {str(p.relative_to(ROOT)) for p in package_files if not p.name.endswith(made)}
    assert CORE_SOURCE in expected
    assert expected <= found
    assert not [name for name in found if name.endswith(made)]


@once
def test_the_compiled_wheel_has_the_extension_and_no_source_of_it(compiled: Path) -> None:
    (extension,) = extensions(compiled)
    assert extension == f"unsync/_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert not [name for name in names(compiled) if name.endswith((".c", ".pyx", ".pxd"))]


@once
def test_the_compiled_wheel_says_which_python_and_platform_it_is_for(compiled: Path) -> None:
    assert f"-{PYTHON_TAG}-" in compiled.name
    assert not compiled.name.endswith("-any.whl")
    assert metadata(compiled, "WHEEL")["Root-Is-Purelib"] == "false"


@once
def test_the_compiled_wheel_works(compiled: Path, tmp_path: Path) -> None:
    assert use(compiled, tmp_path) == [True, *WORKS]


@once
@pytest.mark.parametrize(("value", "accelerated"), [("", True), ("1", False), ("yes", False)])
def test_the_variable_selects_the_fallback_unless_it_is_empty(
    value: str, accelerated: bool, compiled: Path, tmp_path: Path
) -> None:
    assert use(compiled, tmp_path, UNSYNC_NO_EXTENSIONS=value) == [accelerated, *WORKS]


@once
def test_an_extension_that_does_not_load_is_a_fault_to_see(compiled: Path, tmp_path: Path) -> None:
    use(compiled, tmp_path)
    (extension,) = extensions(compiled)
    (tmp_path / extension).write_bytes(b"broken")
    with pytest.raises(AssertionError, match="ImportError"):
        use_folder(tmp_path)
    assert use_folder(tmp_path, UNSYNC_NO_EXTENSIONS="1") == [False, *WORKS]


@once
def test_the_pure_wheel_is_pure(pure: Path) -> None:
    assert pure.name == f"unsync-{VERSION}-py3-none-any.whl"
    assert metadata(pure, "WHEEL")["Root-Is-Purelib"] == "true"
    assert extensions(pure) == []


@once
def test_the_pure_wheel_works(pure: Path, tmp_path: Path) -> None:
    assert use(pure, tmp_path) == [False, *WORKS]


@once
@pytest.mark.parametrize("kind", ["compiled", "pure"])
def test_a_wheel_has_every_module_the_types_and_the_license(
    kind: str, request: pytest.FixtureRequest
) -> None:
    found = set(names(request.getfixturevalue(kind)))
    assert {f"unsync/{path.name}" for path in (ROOT / "unsync").glob("*.py")} <= found
    assert {"unsync/py.typed", f"unsync-{VERSION}.dist-info/licenses/LICENSE"} <= found
    assert {name.partition("/")[0] for name in found} == {"unsync", f"unsync-{VERSION}.dist-info"}


@once
@pytest.mark.parametrize("kind", ["compiled", "pure"])
def test_the_metadata(kind: str, request: pytest.FixtureRequest) -> None:
    found = metadata(request.getfixturevalue(kind))
    assert found["Name"] == "unsync"
    assert found["Version"] == VERSION
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "MIT"
    assert found["License-File"] == "LICENSE"
    # Nothing is needed; what is wanted for more has a name.
    assert found.get_all("Requires-Dist") == ['cloudpickle>=3; extra == "cloudpickle"']


@pytest.fixture(scope="module")
def without_compiler(
    build: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """What a build with a compiler that does not work says, and the wheel it makes."""
    if sys.implementation.name != "cpython" or sys.platform == "win32":
        pytest.skip("needs CPython and the command 'false'")
    out = tmp_path_factory.mktemp("without")
    done = build(*WHEEL, "-w", str(out), ".", CC="false", LDSHARED="false")
    (path,) = out.iterdir()
    return done.stdout, path


@once
def test_without_a_working_compiler_the_build_warns_and_says_why(
    without_compiler: tuple[str, Path],
) -> None:
    output, _ = without_compiler
    assert "WARNING: unsync's compiled core could not be built:" in output
    assert re.search(r"CompileError: .*'?false'?.* (exit code|exit status) 1", output)
    assert "unsync is installed as pure Python" in output
    assert "install a C compiler" in output


@once
def test_without_a_working_compiler_the_wheel_works(
    without_compiler: tuple[str, Path], tmp_path: Path
) -> None:
    _, wheel = without_compiler
    assert extensions(wheel) == []
    assert use(wheel, tmp_path) == [False, *WORKS]


@once
def test_without_a_working_compiler_the_wheel_says_that_it_is_pure(
    without_compiler: tuple[str, Path],
) -> None:
    _, wheel = without_compiler
    assert wheel.name == f"unsync-{VERSION}-py3-none-any.whl"


# What an import does.


def import_it(then: str) -> object:
    program = f"import json, sys, threading\nimport unsync\nprint(json.dumps({then}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(package.__file__).parent.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_starts_no_thread() -> None:
    assert import_it("[thread.name for thread in threading.enumerate()]") == ["MainThread"]


@pytest.mark.parametrize(
    "module", ["multiprocessing", "importlib.metadata", "uvloop", "cloudpickle"]
)
def test_importing_does_not_load(module: str) -> None:
    assert import_it(f"{module!r} in sys.modules") is False


def test_importing_loads_one_core() -> None:
    accelerated, cores = import_it(  # type: ignore[misc]
        "[unsync.ACCELERATED, [each for each in sys.modules if each.startswith('unsync._core')]]"
    )
    assert accelerated is package.ACCELERATED
    assert cores == ["unsync._core" if accelerated else "unsync._core_py"]
