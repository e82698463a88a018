"""What mkdocs calls while it builds the site: results, the command reference, the map of rooms and
formulas are made here, so that pages cannot fall behind the code."""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import commands  # noqa: E402
import rooms  # noqa: E402
import tables  # noqa: E402

# MathJax looks at nothing but what pymdownx.arithmatex has marked.
SETTINGS = r"""
window.MathJax = {
  tex: {inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]]},
  options: {ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex"},
};
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that lie elsewhere in the tree."""
    for name, path in (
        ("contributing.md", ROOT / "CONTRIBUTING.md"),
        ("changelog.md", ROOT / "CHANGELOG.md"),
        ("peers_cpu.svg", tables.RESULTS / "peers_cpu.svg"),
        ("mathjax.js", resources.files("mathjax") / "static/mathjax/es5/tex-svg.js"),
    ):
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Puts in what a page asks for by a comment on a line of its own, and figures in ``{{ }}``."""

    def figure(found: re.Match[str]) -> str:
        return tables.FIGURES[found[1]]()

    def table(found: re.Match[str]) -> str:
        indent, name = found.groups()
        # Two numbers of a cell stay on one line.
        text = re.sub(r"(\d%?x?) / (?=\d)", r"\1&nbsp;/&nbsp;", tables.markdown(name))
        return "\n".join(indent + line for line in text.splitlines())

    markdown = re.sub(r"\{\{ (.+?) \}\}", figure, markdown)
    markdown = re.sub(r"^( *)<!-- table: (.+?) -->$", table, markdown, flags=re.MULTILINE)
    for name, make in (("commands", commands.reference), ("rooms", rooms.picture)):
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    return markdown


def on_page_content(content: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Pages with formulas load MathJax, which is part of the site."""
    if 'class="arithmatex"' not in content:
        return content
    script = get_relative_url("mathjax.js", page.url)
    return f'{content}<script>{SETTINGS}</script><script src="{script}" defer></script>'
