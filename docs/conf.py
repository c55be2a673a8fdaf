"""Sphinx configuration: ``make docs`` builds the documentation into ``site/``; a broken link is an error."""

from __future__ import annotations

project = "AMIRA ASR server"
extensions = ["myst_parser"]

# The source directory is the checkout, so that links between docs/ and the other Markdown files are checked too.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "perf/*.md", "perf/results/*.md", "training/*.md", "tests/speech/*.md"]
exclude_patterns = [".*", "site"]
myst_heading_anchors = 4
"""Deepest heading level with an anchor. Anchors are those of GitHub."""

nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]  # shortened output in console blocks is no valid input

html_theme = "furo"
html_title = project
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
