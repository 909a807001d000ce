"""Sphinx: the documentation site and the man pages from the same pages (`make docs`)."""

from __future__ import annotations

import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "mount")]

from sphinx.application import Sphinx

from casfs import __version__

project = "casfs"
author = "The casfs authors"
release = version = __version__

extensions = ["myst_parser", "sphinx_click"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
nitpicky = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"casfs {__version__}"

# `make linkcheck`: addresses in examples lead nowhere, and a server that is slow is no broken link.
linkcheck_ignore = [r"https?://[^/]*example\.(org|com)", r"https?://(127\.0\.0\.1|localhost)"]
linkcheck_timeout = 20
linkcheck_retries = 2

man_pages = [
    ("reference", "casfs", "verified backups of files, mounted like a file system", author, 1),
    ("configuration", "casfs-config", "configuration and profiles of casfs", author, 5),
]

# Pages outside docs/ that the site shows too, and the page that includes each.
INCLUDED = {
    "../casfs/FORMAT.md": "format.md",
    "../bench/README.md": "benchmarking.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../SECURITY.md": "security.md",
    "../README.md": "index.md",
    "../docs/": "",
    "docs/": "",
    "casfs/FORMAT.md": "format.md",
    "bench/README.md": "benchmarking.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}


def _point_to_the_site(_: object, __: str, content: list[str]) -> None:
    """Turn links between files of the repository into links between pages of the site."""
    for target, page in INCLUDED.items():
        content[0] = content[0].replace(f"]({target}", f"]({page}")


def _escape_stars(_: object, __: object, lines: list[str]) -> None:
    """Keep the stars of patterns in help texts from beginning an emphasis."""
    lines[:] = [line.replace("*", r"\*") for line in lines]


def setup(app: Sphinx) -> None:
    """Connect the rewriting of links and of help texts; Sphinx calls this."""
    for part in ("description", "options", "epilog"):
        app.connect(f"sphinx-click-process-{part}", _escape_stars)
    app.connect("source-read", _point_to_the_site)
    app.connect(
        "include-read", lambda app, path, name, content: _point_to_the_site(app, name, content)
    )
