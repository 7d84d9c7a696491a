"""How `make docs` builds the site: offline, and with no warning."""

from __future__ import annotations

import inspect
import os

# The fallback has typed signatures; its docstrings are those of the compiled core.
os.environ["UNSYNC_NO_EXTENSIONS"] = "1"

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import signature, stringify_signature

from unsync import unsync

project = "unsync"
author = "The unsync maintainers"
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "unsync"
html_favicon = "icon.svg"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3

# Names in docstrings stand between single backticks.
default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# No inventory is fetched, so that it builds offline: what is not ours leads nowhere.
nitpick_ignore_regex = [
    # The standard library; what is of `types` and `typing` Sphinx knows.
    (r"py:.*", r"(_?asyncio|collections|concurrent|contextlib|contextvars|queue|threading)\..*"),
    (r"py:exc", r"BrokenThreadPool"),
    # Type variables.
    (r"py:.*", r"(.+\.)?[PRT]"),
]


class Settings(SphinxDirective):
    """What is set on the class `unsync`: its metaclass has it, where autodoc does not look."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name, member in vars(type(unsync)).items():
            if name.startswith("_"):
                continue
            if isinstance(member, property):
                lines.append(f".. py:property:: unsync.{name}")
            else:
                shape = signature(member, bound_method=True)
                lines.append(f".. py:method:: unsync.{name}{stringify_signature(shape)}")
                lines.append("   :classmethod:")
            lines.append("")
            lines += ["   " + line for line in inspect.getdoc(member).splitlines()]
            lines.append("")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> None:
    app.add_directive("unsync-settings", Settings)
