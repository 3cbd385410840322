"""Pages of the report: HTML that needs nothing from a network, with formulas as MathML."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import nbformat
from jinja2 import Environment, pass_context
from latex2mathml.converter import convert as to_mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from ..ledger import paths
from ..ledger.notebook import Notebook, discover

if TYPE_CHECKING:
    from .report import Artifact

MARK = "style.css"
_WIDGET = "application/vnd.jupyter.widget-view+json"


class _Renderer(IPythonRenderer):
    """Formulas become MathML, which browsers show by themselves."""

    def block_math(self, body: str) -> str:
        return _mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")


def _mathml(body: str, display: str) -> str:
    try:
        formula: str = to_mathml(body.strip(), display=display)
        return formula
    except Exception:  # what it cannot read stays readable as it was written
        return f"<code>{Environment(autoescape=True).from_string('{{ body }}').render(body=body)}</code>"


class _Exporter(HTMLExporter):
    """Notebook to the HTML of its cells."""

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        """Markdown of a cell or an output."""
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
        html: str = MarkdownWithMath(renderer=renderer).render(source)
        return html


def notebook_page(book: Notebook, source: Path, folder: Path, *, note: str = "") -> str:
    """A notebook as a page of the site.

    Args:
        book: the notebook.
        source: the file with its outputs.
        folder: of the site; files that the text links to are copied there.
        note: shown above it.
    """
    content = nbformat.read(source, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            # A widget, such as a bar of the reader's own, would need a kernel.
            cell.outputs = [o for o in cell.outputs if _WIDGET not in o.get("data", {})]
    body, _ = _Exporter(template_name="basic").from_notebook_node(content)
    up = "../" * (book.stem.count("/") + 1)
    body = re.sub(r'href="([^"#][^"]*)"', lambda m: _link(m[1], book, folder, up), body)
    # A table of results scrolls by itself on a narrow screen.
    body = body.replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")
    return _PAGE.render(title=book.title, up=up, note=note, body=body)


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
        kept = Path("linked") / path.relative_to(paths.ROOT)
        (folder / kept).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / kept)
        return f'href="{up}{kept.as_posix()}"'
    return f'title="{os.path.basename(parts.path)} is not a part of this site"'


def gallery(profile: str, artifacts: Sequence[Artifact]) -> str:
    """The first page: every artifact as a card."""
    counts: dict[str, int] = {}
    for artifact in artifacts:
        counts[artifact.verdict] = counts.get(artifact.verdict, 0) + 1
    return _GALLERY.render(profile=profile, artifacts=artifacts, counts=counts, slug=_slug)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def style() -> str:
    """The style sheet of all pages: light and dark as the reader's system is, one column on a phone."""
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{_CSS}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: none; }}\n"


_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
"""
_PAGE = _ENVIRONMENT.from_string(
    _HEAD
    + """<title>{{ title }}</title>
<link rel="stylesheet" href="{{ up }}style.css">
</head>
<body class="notebook">
<nav><a href="{{ up }}index.html">All artifacts</a></nav>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
<main>{{ body | safe }}</main>
</body>
</html>
"""
)
_GALLERY = _ENVIRONMENT.from_string(
    _HEAD
    + """<title>influence: artifacts of the profile {{ profile }}</title>
<link rel="stylesheet" href="style.css">
</head>
<body>
<header>
<h1>Artifacts of the profile {{ profile }}</h1>
<p>{{ artifacts | length }} artifacts:
{%- for verdict, n in counts.items() %} {{ n }} {{ verdict }}{{ "," if not loop.last }}{% endfor %}.</p>
</header>
<nav class="contents">
{% for a in artifacts %}<a href="#{{ slug(a.stem) }}">{{ a.stem }}</a>
{% endfor %}
</nav>
<main class="cards">
{% for a in artifacts %}
<article id="{{ slug(a.stem) }}" data-stem="{{ a.stem }}">
<h2>{{ a.title }}</h2>
<p><span class="verdict {{ slug(a.verdict) }}">{{ a.verdict }}</span>
{% if a.seconds is not none %}
<span class="time">{{ "%.1f" | format(a.seconds) }} s on {{ a.device }}</span>{% endif %}
</p>
{% for figure in a.figures %}
<a href="{{ figure }}"><img src="{{ figure }}" alt="figure of {{ a.stem }}" loading="lazy"></a>
{% endfor %}
{% if a.comparisons %}
<div class="scroll"><table>
<thead><tr><th>finding</th><th>paper</th><th>ours</th><th></th></tr></thead>
<tbody>
{% for c in a.comparisons %}
<tr title="{{ c.source }}"><td>{{ c.item }}</td><td>{{ c.paper }}</td><td>{{ c.ours }}</td><td>{{ c.holds }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if a.table %}<details><summary>Table</summary><div class="scroll">{{ a.table | safe }}</div></details>{% endif %}
<p class="links"><a href="{{ a.page }}">Notebook</a>
{% for label, path in a.downloads %} <a href="{{ path }}">{{ label }}</a>
{% endfor %}</p>
</article>
{% endfor %}
</main>
</body>
</html>
"""
)
_CSS = """:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --back: #ffffff; --card: #f6f8fa;
  --line: #d0d7de; --link: #0550ae; --good: #116329; --bad: #a40e26; --part: #7d4e00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9ea7b3; --back: #0d1117; --card: #161b22; --line: #30363d; --link: #79c0ff;
    --good: #7ee787; --bad: #ff9492; --part: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
body.notebook { max-width: 52rem; }
a { color: var(--link); }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; line-height: 1.3; margin-top: 0; }
.notebook h2 { margin-top: 1.8rem; }
nav.contents { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .85rem; margin-bottom: 1rem; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr));
  align-items: start; }
article { border: 1px solid var(--line); border-radius: 8px; background: var(--card); padding: 1rem; min-width: 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
.verdict { font-weight: 600; } .reproduced { color: var(--good); } .not-reproduced { color: var(--bad); }
.partly { color: var(--part); } .time, .note { color: var(--soft); font-size: .85rem; margin-left: .5rem; }
.scroll { overflow-x: auto; max-width: 100%; } table { border-collapse: collapse; font-size: .8rem; }
table, th, td { border: 0; } table.dataframe thead th { text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .5rem; text-align: left; vertical-align: top; }
.links a { margin-right: .6rem; font-size: .85rem; } summary { cursor: pointer; margin: .5rem 0; }
pre { overflow-x: auto; background: var(--card); padding: .6rem; border-radius: 6px; margin: .4rem 0;
  font-size: .82rem; }
code { font-size: .9em; } .prompt { display: none; } .anchor-link { display: none; }
math { font-size: 1.05em; } math[display="block"] { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
@media (max-width: 32rem) { math { font-size: .85em; } }
"""
