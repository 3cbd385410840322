"""The notebooks: their form, read without running them, and their checked outputs, by running them."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from influence.companion.ledger import manifest, notebook, paths, reference
from influence.companion.ledger.notebook import Notebook
from influence.companion.runner import run

NOTEBOOKS = list(notebook.discover().values())
CHECK = "nbval-check-output"
FORBIDDEN = {
    "an installation": r"(?m)^\s*[!%](pip|conda|uv)\b|\bpip\b.*\binstall\b",
    "sys.exit": r"\bsys\.exit\b|\bexit\(",
    "rcParams": r"\brcParams\b|\brc\(",
    "an absolute path": r"""["'](/|~|[A-Za-z]:\\)[\w.]""",
    "a shell command": r"(?m)^\s*!",
}

each = pytest.mark.parametrize("book", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])


def _sources(book: Notebook) -> list[str]:
    return ["".join(cell["source"]) for cell in book.cells()]


def _tree(source: str) -> ast.Module:
    return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines()))


def _form(book: Notebook) -> list[str]:
    """What is wrong with the form of a notebook."""
    nbformat.validate(nbformat.from_dict(book.content))
    sources, found = _sources(book), []
    if len(sources) > 15:
        found.append(f"{len(sources)} code cells, at most 15")
    for number, source in enumerate(sources, 1):
        if len(source.splitlines()) > 25:
            found.append(f"code cell {number}: {len(source.splitlines())} lines, at most 25")
        for node in ast.walk(_tree(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 10:
                    found.append(f"code cell {number}: {node.name} has {length} lines, at most 10")
        found += [f"code cell {number}: {what}" for what, pattern in FORBIDDEN.items() if re.search(pattern, source)]
    if book.content["cells"][0]["cell_type"] != "markdown" or book.title == book.stem:
        found.append("does not begin with a title")
    if book.path.stat().st_size > 300_000:
        found.append(f"{book.path.stat().st_size} bytes, at most 300,000")
    return found + _parameters_form(book) + _execution_form(book) + _check_form(book)


def _parameters_form(book: Notebook) -> list[str]:
    cells = book.cells(tag="parameters")
    if len(cells) != 1:
        return [f"{len(cells)} cells with the tag 'parameters', expected one"]
    source = "".join(cells[0]["source"])
    nodes = ast.parse(source).body
    found = [f"parameter without annotation: {ast.unparse(n)}" for n in nodes if not isinstance(n, ast.AnnAssign)]
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != len(nodes):
        found.append("parameters: expected one on each line")
    defaults = {name: parameter.default for name, parameter in book.parameters.items()}
    if (defaults.get("profile"), defaults.get("recompute", True)) not in (("smoke", True), ("cpu", False)):
        found.append("parameters: expected profile: str = 'smoke', or 'cpu' with recompute: bool = False")
    return found


def _execution_form(book: Notebook) -> list[str]:
    found = []
    counts = [cell["execution_count"] for cell in book.cells()]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"execution counts {counts}, expected 1..{len(counts)}: ./run_all.sh --refresh-notebooks")
    if book.content["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernelspec is not python3")
    if "papermill" in book.content["metadata"] or any("papermill" in c["metadata"] for c in book.content["cells"]):
        found.append("has papermill's metadata")
    text = book.path.read_text(encoding="utf-8")
    for output in (o for cell in book.cells() for o in cell["outputs"]):
        if output["output_type"] == "error" or output.get("name") == "stderr":
            found.append(f"an output is an error or a warning: {str(output)[:80]}")
    if re.search(r"(?<![\w./])(/home|/root|/tmp|/Users|/work)/", text):
        found.append("has a path of the machine it ran on")
    return found


def _check_form(book: Notebook) -> list[str]:
    cells, found = book.cells(tag=CHECK), []
    if not cells:
        found.append(f"no cell with the tag {CHECK!r}")
    for cell in cells:
        source = "".join(cell["source"])
        text = "".join("".join(o.get("text", [])) for o in cell["outputs"])
        if not text.strip():
            found.append("a check cell without output: nbval would compare nothing")
        if "print(" not in source or not any(isinstance(n, ast.Assert) for n in ast.walk(_tree(source))):
            found.append("a check cell has to print and to assert")
        if re.search(r"\d\s*(s|ms|sec|seconds|min)\b|it/s", text):
            found.append("a check cell prints a time")
    return found


# -- the real notebooks -----------------------------------------------------------------------------------------------


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each
def test_form(book: Notebook) -> None:
    assert _form(book) == []


@each
def test_starts_under_its_own_name_and_saves(book: Notebook) -> None:
    calls = [node for source in _sources(book) for node in ast.walk(_tree(source)) if isinstance(node, ast.Call)]
    starts = [c for c in calls if ast.unparse(c.func) == "companion.start"]
    assert len(starts) == 1
    assert ast.literal_eval(starts[0].args[0]) == book.stem
    assert ast.unparse(starts[0].args[1]) == "globals()"
    assert sum(ast.unparse(c.func) == "run.save" for c in calls) == 1


def _numbers(text: str) -> list[tuple[float, int]]:
    """Numbers as they are written, without their sign, each with its decimal places; formulas and code left out."""
    text = re.sub(r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|\w*[A-Za-z_][\w-]*|\b(19|20)\d\d\b", " ", text)
    found = re.findall(r"(?<![\d.])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)", text)
    return [(float(number.replace(",", "")), len(number.partition(".")[2])) for number in found]


def _shown(book: Notebook) -> set[float]:
    """Every number of its parameters and outputs, text and tables, without its sign."""
    row = manifest.read("cpu", root=paths.ROOT / "results").get(book.stem, {})
    rules = [rule.value for rule in reference.load(book.stem)]
    texts = [json.dumps([row.get("parameters", {}), row.get("findings", {}), rules])]
    for output in (output for cell in book.cells() for output in cell["outputs"]):
        texts.append("".join(output.get("text", "")))
        texts += ["".join(text) for kind, text in output.get("data", {}).items() if kind == "text/html"]
    plain = re.sub(r"<[^>]*>", " ", " ".join(texts))
    return {abs(float(number)) for number in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", plain)}


def _not_shown(book: Notebook) -> list[str]:
    """Numbers of "What we find" and "What comes out" that the notebook shows nowhere, as they are or as a share."""
    cells = ["".join(cell["source"]) for cell in book.content["cells"] if cell["cell_type"] == "markdown"]
    found = [text.partition("## What we find")[2].partition("\n## ")[0] for text in cells]
    found += re.findall(r"\*\*What comes out\.\*\*[^\n]*", cells[0] if cells else "")
    shown = _shown(book) | {0.95}  # the level of the intervals
    missing = []
    for number, places in _numbers(" ".join(found)):
        if not any(abs(number - factor * value) <= 0.5001 * 10**-places for value in shown for factor in (1, 100)):
            missing.append(f"{number:.{places}f}")
    return missing


@each
def test_sentences_say_what_is_shown(book: Notebook) -> None:
    """A number that changes when results are computed anew must not stay behind in a sentence."""
    assert _not_shown(book) == []


@pytest.mark.parametrize("path", sorted(paths.PROFILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_profile_fits_the_notebooks(path: Path) -> None:
    assert run.plan(path.stem)  # refuses unknown stems and parameters, and wrong types


@each
def test_every_profile_gives_what_the_notebook_leaves_open(book: Notebook) -> None:
    open_ones = {name for name, parameter in book.parameters.items() if parameter.default is None}
    for path in paths.PROFILES.glob("*.yaml"):
        profile = notebook.profile(path.stem)
        if book.stem in profile or path.stem == "smoke":
            assert open_ones <= set(profile.get(book.stem, {})), path.stem


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What nbval finds wrong with every notebook that is asked for, and with two tiny ones, by path or name."""
    folder = tmp_path_factory.mktemp("nbval")
    wanted = [item for item in request.session.items if "found" in item.fixturenames]
    asked = [item.callspec.params["book"].path for item in wanted if hasattr(item, "callspec")]
    book = _tiny()
    nbformat.write(book, folder / "same.ipynb")
    book.cells[3].outputs[0].text = "auc 0.92\n"
    nbformat.write(book, folder / "other.ipynb")
    tiny = {str(folder / f"{name}.ipynb"): name for name in ("same", "other")}
    found = _nbval(*tiny, *asked, folder=folder, timeout=1800)
    return {tiny.get(path, path): wrong for path, wrong in found.items()}


@pytest.mark.notebooks
@pytest.mark.timeout(3600)
@each
def test_outputs(book: Notebook, found: dict[str, list[str]]) -> None:
    """Every notebook runs, and its check cells print what is committed."""
    assert found[str(book.path)] == []


# -- would these tests see it? ----------------------------------------------------------------------------------------


def _nbval(*books: Path | str, folder: Path, timeout: int) -> dict[str, list[str]]:
    """What nbval finds wrong with each notebook, its kernels forked from one process."""
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "nbval_forked", f"--nbval-cell-timeout={timeout}", f"--timeout={timeout}", *map(str, books)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "NBVAL_FOUND": str(folder / "found.json")}
    # The same silence as under the runner: a progress bar is an output too.
    environment |= {"TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}
    finished = subprocess.run(command, env=environment, cwd=paths.ROOT, capture_output=True, text=True)
    assert finished.returncode in (0, 1), finished.stdout[-6000:] + finished.stderr[-2000:]
    found: dict[str, list[str]] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert finished.returncode == any(found.values())
    return found


def _tiny() -> nbformat.NotebookNode:
    """A notebook without fault."""
    code, output = nbformat.v4.new_code_cell, nbformat.v4.new_output
    printed = [output("stream", text="auc 0.91\n")]
    cells = [
        nbformat.v4.new_markdown_cell("# Figure 1"),
        code('profile: str = "smoke"  # name', metadata={"tags": ["parameters"]}, execution_count=1),
        code("auc = 0.91", execution_count=2),
        code("print('auc', auc)\nassert auc > 0.9", metadata={"tags": [CHECK]}, execution_count=3, outputs=printed),
    ]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return book


@pytest.fixture
def tiny() -> nbformat.NotebookNode:
    """A notebook without fault, but for what a test does to it."""
    return _tiny()


def _written(book: nbformat.NotebookNode, folder: Path) -> Notebook:
    path = folder / "tiny.ipynb"
    nbformat.write(book, path)
    return Notebook("tiny", path)


@pytest.mark.timeout(3600)  # the notebooks that are asked for beside it run in the same process
def test_changed_output_fails(found: dict[str, list[str]]) -> None:
    assert found["same"] == []
    [wrong] = found["other"]
    assert "auc 0.92" in wrong


def test_a_number_that_is_not_shown_is_seen(tiny: nbformat.NotebookNode, tmp_path: Path) -> None:
    sentence = "## What we find\n\n$x_2 = 7$: the AUROC is .91 [.9, .92], 91% of 1,500 in 2019.\n\n## After\n\n12"
    tiny.cells.append(nbformat.v4.new_markdown_cell(sentence))
    tiny.cells[2].outputs = [nbformat.v4.new_output("stream", text="0.9051 [0.9, 0.9173], n = 1500\n")]
    assert _not_shown(_written(tiny, tmp_path)) == []
    tiny.cells[-1].source = sentence.replace("AUROC is .91", "AUROC is .93").replace("1,500", "1,600")
    assert _not_shown(_written(tiny, tmp_path)) == ["0.93", "1600"]


def test_form_of_the_tiny_notebook(tiny: nbformat.NotebookNode, tmp_path: Path) -> None:
    assert _form(_written(tiny, tmp_path)) == []


@pytest.mark.parametrize(
    ("cell", "change", "message"),
    [
        (3, {"outputs": []}, "without output"),
        (3, {"metadata": {}}, "no cell with the tag"),
        (3, {"source": "print('auc', auc)"}, "has to print and to assert"),
        (2, {"execution_count": 7}, "execution counts"),
        (2, {"source": "import sys\nsys.exit()"}, "sys.exit"),
        (2, {"source": "!pip install torch"}, "an installation"),
        (2, {"source": "plt.rcParams['font.size'] = 4"}, "rcParams"),
        (2, {"source": "open('/data/mnist')"}, "an absolute path"),
        (2, {"source": "auc = 0.91\n" * 26}, "26 lines"),
        (2, {"source": "def f():\n" + "    x = 1\n" * 10}, "f has 11 lines"),
        (2, {"outputs": [nbformat.v4.new_output("stream", name="stderr", text="careful")]}, "an error or a warning"),
        (1, {"metadata": {}}, "0 cells with the tag 'parameters'"),
        (1, {"source": 'profile = "smoke"'}, "without annotation"),
        (1, {"source": 'profile: str = "cpu"'}, "expected profile"),
        (1, {"source": 'profile: str = "smoke"; n: int = 1'}, "one on each line"),
        (0, {"source": "Figure 1"}, "does not begin with a title"),
    ],
)
def test_bad_form_is_seen(
    tiny: nbformat.NotebookNode, tmp_path: Path, cell: int, change: dict[str, object], message: str
) -> None:
    tiny.cells[cell].update(nbformat.from_dict(change))
    assert any(message in problem for problem in _form(_written(tiny, tmp_path)))
