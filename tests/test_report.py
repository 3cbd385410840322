"""The report: every artifact is there, every link leads somewhere, and a browser has nothing to complain about."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from influence.companion.runner import cli, report
from workspace import Workspace

STEMS = ["sensitivity/fig_a", "00_overview"]
TEXT = "Formula $\\frac{1}{2}\\sigma^2$, [a notebook](sensitivity/fig_a.ipynb), [nothing](nowhere.txt)."


@pytest.fixture(scope="module")
def built(shared_workspace: Workspace) -> Iterator[Path]:
    for stem in STEMS:
        path = shared_workspace.notebook(stem)
        book = nbformat.read(path, as_version=4)
        book.cells[0].source += f"\n\n{TEXT}\n\nMore."
        nbformat.write(book, path)
    shared_workspace.notebook("stability/fig_b")  # never run
    shared_workspace.reference("sensitivity/fig_a,auc,value,0.9,0.05,paper,page 3")
    assert shared_workspace.run("--only", *STEMS) == 0
    assert cli.main(["report"]) == 0
    yield shared_workspace.root / "build" / "site" / "smoke"


class Links(HTMLParser):
    """What a page refers to, and the anchors it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.sources: list[str] = []  # what a browser loads by itself
        self.scripts = 0
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag in ("img", "script", "link", "iframe") and (value := found.get("src") or found.get("href")):
            self.sources.append(value)
        self.scripts += tag == "script"


def broken(site: Path) -> list[str]:
    """References of all pages that lead nowhere, or to the network for something other than a link."""
    found = []
    for page in site.rglob("*.html"):
        links = Links(page)
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            file = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
            if not file.is_file():
                found.append(f"{page.name}: {target}")
            elif parts.fragment and file.suffix == ".html" and parts.fragment not in Links(file).anchors:
                found.append(f"{page.name}: no anchor {target}")
    return found


def test_every_link_leads_somewhere(built: Path) -> None:
    assert broken(built) == []


def test_a_broken_link_is_seen(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(built, copy)
    next(copy.rglob("*.png")).unlink()
    assert broken(copy)


def test_each_artifact_is_there(built: Path) -> None:
    text = (built / "index.html").read_text(encoding="utf-8")
    for stem in [*STEMS, "stability/fig_b"]:
        assert f'data-stem="{stem}"' in text and (built / "notebooks" / f"{stem}.html").is_file()
    assert text.count("<p>Formula <math") == len(STEMS)  # the first paragraph, as the question
    assert 'class="thumbnail" href="notebooks/sensitivity/fig_a.html"' in text
    assert text.index('id="00-overview"') < text.index('id="sensitivity-fig-a"') < text.index('id="stability-fig-b"')
    assert "<li>auc: 0.9 (supported)</li>" in text
    assert "0.9 within 5% (paper)" in text and "not judged" in text and "not run" in text and " s on cpu" in text


def test_pages_need_no_network(built: Path) -> None:
    for page in built.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert Links(page).scripts == 0 and "mathjax" not in text.lower() and "@import" not in text
        assert not [s for s in Links(page).sources if urlsplit(s).scheme not in ("", "data")]
        assert '<link rel="icon" href="data:,">' in text and "width=device-width" in text
    page = (built / "notebooks" / "00_overview.html").read_text(encoding="utf-8")
    assert "<mfrac>" in page and "$" not in page.partition("Formula")[2].partition("</p>")[0]
    assert 'href="../notebooks/sensitivity/fig_a.html"' in page and 'href="nowhere.txt"' not in page


def _console(page: Path, folder: Path) -> list[str]:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--enable-logging=stderr", "--window-size=400,900", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "</html>" in done.stdout, done.stderr[-1000:]
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_has_nothing_to_complain_about(built: Path, tmp_path: Path) -> None:
    for page in sorted(built.rglob("*.html")):
        assert _console(page, tmp_path) == []


def test_the_browser_would_complain(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<html><body><img src='nowhere.png'><script>nothing()</script></body></html>", encoding="utf-8")
    assert _console(page, tmp_path / "profile")


def test_refusals(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--profile", "cpu"]) == 2
    assert "influence run --profile cpu makes them" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("precious", encoding="utf-8")
    assert cli.main(["report", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "precious"
    with pytest.raises(report.ReportError):
        report.build("cpu")
    assert report.build("smoke", tmp_path / "elsewhere").is_file()
    assert report.build("smoke", tmp_path / "elsewhere").is_file()  # a site is replaced
