"""Compiles `unsync/_core.pyx` where that is possible; all else stands in `pyproject.toml`."""

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PURE = bool(os.environ.get("UNSYNC_NO_EXTENSIONS")) or platform.python_implementation() != "CPython"


class OptionalBuildExt(build_ext):
    """Builds the extension, or says clearly that the installation will be pure Python."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as exc:
            self._go_pure(exc)

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as exc:
            self._go_pure(exc)

    def get_outputs(self) -> list[str]:
        # A failed extension must not be listed among the files to install.
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        # An editable install copies what was built; a failed build left nothing to copy.
        self.extensions = [
            ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_built(ext))
        ]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def _go_pure(self, exc: Exception) -> None:
        print(
            "*" * 78,
            "WARNING: unsync's compiled core could not be built:",
            f"  {type(exc).__name__}: {exc}",
            "unsync is installed as pure Python: the same behaviour, slower.",
            "For the fast core install a C compiler and the Python headers, then run",
            "  pip install --force-reinstall --no-cache-dir unsync",
            "*" * 78,
            sep="\n",
            file=sys.stderr,
        )


class HonestBdistWheel(bdist_wheel):
    """Tags a wheel as pure when its extension could not be built."""

    def run(self) -> None:
        self.run_command("build")
        if (
            self.distribution.ext_modules
            and not self.get_finalized_command("build_ext").get_outputs()
        ):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def extensions() -> list[Extension]:
    if PURE:
        return []
    from Cython.Build import cythonize

    sources = [Extension("unsync._core", ["unsync/_core.pyx"])]
    return list(cythonize(sources, language_level=3, build_dir="build"))


setup(
    ext_modules=extensions(),
    cmdclass={"bdist_wheel": HonestBdistWheel, "build_ext": OptionalBuildExt},
)
