"""Pages of the report: HTML that needs nothing from a network, with formulas as MathML."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
from jinja2 import Environment, FileSystemLoader, pass_context
from latex2mathml.converter import convert as to_mathml
from markupsafe import escape
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from ..ledger import paths
from ..ledger.notebook import LAST, Notebook, discover

MARK = "style.css"
_TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)


# In the order of the first page; a notebook belongs where its stem or its folder says.
_BOTH = "One metric tensor for both papers"
_SECTIONS = {
    LAST: _BOTH,
    "bridge": _BOTH,
    "sensitivity": "Sensitivity: Shu & Zhu, AAAI 2019",
    "stability": "Stability: Zheng, Song, Leung & Goodfellow, CVPR 2016",
    "beyond": "Beyond both papers",
    "": "On your own model",
}


class _Renderer(IPythonRenderer):
    """Formulas become MathML, which browsers show by themselves."""

    def block_math(self, body: str) -> str:
        return _mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")


def _mathml(body: str, display: str) -> str:
    try:
        return str(to_mathml(body.strip(), display=display))
    except Exception:  # what it cannot read stays readable as it was written
        return f"<code>{escape(body)}</code>"


class _Exporter(HTMLExporter):
    """Notebook to the HTML of its cells."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        """Markdown of a cell or an output."""
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
        return str(MarkdownWithMath(renderer=renderer).render(source))


def notebook_page(book: Notebook, source: Path, folder: Path, *, note: str = "") -> str:
    """A notebook, with the outputs in `source`, as a page of the site below a note; files it links to are copied."""
    body, _ = _Exporter(template_name="basic").from_notebook_node(nbformat.read(source, as_version=4))
    up = "../" * (book.stem.count("/") + 1)
    body = _linked(body, book, folder, up)
    # A table of results scrolls by itself on a narrow screen.
    body = body.replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")
    return _ENVIRONMENT.get_template("page.html").render(title=book.title, up=up, note=note, body=body)


def question(book: Notebook, folder: Path) -> str:
    """What a notebook asks, as HTML for the first page: the first paragraph below its title."""
    first = next((c for c in book.content["cells"] if c["cell_type"] == "markdown"), {"source": ""})
    paragraphs = "".join(first["source"]).split("\n\n")
    text = next((part for part in paragraphs if part.strip() and not part.startswith("#")), "")
    body = MarkdownWithMath(renderer=_Renderer(escape=False, exclude_anchor_links=True)).render(text)
    return _linked(str(body), book, folder, "")


def _linked(body: str, book: Notebook, folder: Path, up: str) -> str:
    return re.sub(r'href="([^"#][^"]*)"', lambda m: _link(m[1], book, folder, up), body)


def _link(target: str, book: Notebook, folder: Path, up: str) -> str:
    """Where a link of a notebook leads in the site; nowhere if it leads nowhere."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https", "mailto"):
        return f'href="{target}" rel="noreferrer"'
    path = (book.path.parent / unquote(parts.path)).resolve()
    for stem, other in discover().items():
        if path == other.path.resolve():
            return f'href="{up}notebooks/{stem}.html"'
    if path.is_file() and path.is_relative_to(paths.ROOT):
        kept = copied(path, folder, Path("linked") / path.relative_to(paths.ROOT))
        return f'href="{up}{kept}"'
    return f'title="{os.path.basename(parts.path)} is not a part of this site"'


def copied(file: Path, folder: Path, kept: str | Path) -> str:
    """Copy a file into the site; returns its path there."""
    (folder / kept).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / kept)
    return Path(kept).as_posix()


def gallery(profile: str, artifacts: Sequence[dict[str, Any]]) -> str:
    """The first page: every artifact as a card."""
    for artifact in artifacts:
        folder, _, _ = artifact["stem"].rpartition("/")
        artifact["section"] = _SECTIONS.get(artifact["stem"]) or _SECTIONS.get(folder, folder)
    there = {artifact["section"] for artifact in artifacts}
    return _ENVIRONMENT.get_template("gallery.html").render(
        title=f"influence: artifacts of the profile {profile}",
        up="",
        profile=profile,
        artifacts=sorted(artifacts, key=lambda artifact: artifact["stem"] != LAST),
        sections=[
            *(s for s in dict.fromkeys(_SECTIONS.values()) if s in there),
            *sorted(there - {*_SECTIONS.values()}),
        ],
        counts=Counter(artifact["verdict"] for artifact in artifacts),
        slug=lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
    )


def style() -> str:
    """The style sheet of all pages: light and dark as the reader's system is, one column on a phone."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    own = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return f"{own}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: none; }}\n"
