"""Sphinx configuration of the documentation; build it with `make docs`."""

import re
from importlib.metadata import version as installed_version

project = "rewardmodels"
author = "The rewardmodels authors"
version = release = installed_version("rewardmodels")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "rewardmodels"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"
# Docstrings write code in single backticks, as Markdown does.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


def _markdown(app, what, name, obj, options, lines):
    """Turn the Markdown of docstrings into reStructuredText: formulas, tables and bars."""
    text = "\n".join(lines)

    def formula(match):
        return f"\n{match[1]}.. math:: {' '.join(match[2].split())}\n\n{match[1]}"

    def table(match):
        indent = match[1]
        rows = [line.strip()[1:-1].split("|") for line in match[0].splitlines()]
        cells = [
            f"{indent}   {'* -' if column == 0 else '  -'} {cell.strip()}"
            for row in rows
            if not set("".join(row)) <= set("|-: ")
            for column, cell in enumerate(row)
        ]
        return f"{indent}.. list-table::\n{indent}   :header-rows: 1\n\n" + "\n".join(cells) + "\n"

    # An indented block after a colon is code.
    text = re.sub(r"(?m)^( *)(.*[^:\s]):\n\n(?=\1 {2,}[^ >*-])", r"\1\2::\n\n", text)
    text = re.sub(r"(?m)^([ ]*)\$\$(.+?)\$\$", formula, text, flags=re.DOTALL)
    text = re.sub(r"\$([^$`]+?)\$", lambda m: f":math:`{' '.join(m[1].split())}`", text)
    text = re.sub(r"(?m)^([ ]*)\|.*\|\n[ ]*\|[-| :]+\|(\n[ ]*\|.*\|)+$", table, text)
    # Bars outside code and formulas would be substitutions.
    parts = re.split(r"(`[^`]*`|\.\. math::.*)", text)
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app):
    """Register the hook."""
    app.connect("autodoc-process-docstring", _markdown, priority=400)
