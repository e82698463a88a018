"""What mkdocs calls while it builds the site: results, the command reference, the map of rooms and
formulas are made here, so that pages cannot fall behind the code."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import commands  # noqa: E402
import rooms  # noqa: E402
import tables  # noqa: E402


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that lie elsewhere in the tree."""
    for name, path in (
        ("contributing.md", ROOT / "CONTRIBUTING.md"),
        ("changelog.md", ROOT / "CHANGELOG.md"),
        ("peers_cpu.svg", tables.RESULTS / "peers_cpu.svg"),
    ):
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Puts in what a page asks for by a comment on a line of its own, and figures in ``{{ }}``."""

    def figure(found: re.Match[str]) -> str:
        return tables.FIGURES[found[1]]()

    def table(found: re.Match[str]) -> str:
        indent, name = found.groups()
        return "\n".join(indent + line for line in tables.markdown(name).splitlines())

    markdown = re.sub(r"\{\{ (.+?) \}\}", figure, markdown)
    markdown = re.sub(r"^( *)<!-- table: (.+?) -->$", table, markdown, flags=re.MULTILINE)
    for name, make in (("commands", commands.reference), ("rooms", rooms.picture)):
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    return markdown


def on_page_content(content: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers set without a script."""

    def formula(found: re.Match[str]) -> str:
        latex = html.unescape(found[2]).strip()
        display = latex.startswith(r"\[")
        return latex2mathml.converter.convert(
            latex[2:-2].strip(), display="block" if display else "inline"
        )

    pattern = r'<(span|div) class="arithmatex">(.*?)</\1>'
    return re.sub(pattern, formula, content, flags=re.DOTALL)
