# SPDX-License-Identifier: BSD-3-Clause
"""Sphinx. `.ci/docs` builds and checks everything; the build alone is

    pip install -e ".[docs]" && sphinx-build -W --keep-going -n -b html docs build/docs

Pages that are not in this folder, and those of the operators, are made by site_pages.py.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import site_pages  # noqa: E402

import glimpse_ext  # noqa: E402

project = "glimpse_ext"
author = "glimpse_ext contributors"
copyright = author
version = release = glimpse_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
# Shell lines with <placeholders> are no shell.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# Names as a reader writes them: Tensor, not torch.Tensor.
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Gradients", "Source"]
# Types of others, whose pages are not here. A name of this package that leads nowhere is an error.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|types|numpy)\..*"),
    (
        "py:.*",
        r"(Tensor|Any|Callable|Iterator|Mapping|Sequence|ModuleType|TracebackType|Self|Compared)",
    ),
    ("py:.*", r"(optional|RLE|Function|glimpse_ext\.(\w+\.)?(_\w+.*|RLE|Compared))"),
]

html_theme = "furo"
html_title = f"glimpse_ext {version}"
html_show_copyright = False


def setup(app):
    site_pages.write(DOCS)
    app.connect("source-read", site_pages.on_source_read)
