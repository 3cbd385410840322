"""A tree with tiny notebooks, to run the companion on without the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml

from influence.companion.runner import cli

PARAMETERS = 'profile: str = "smoke"\nseeds: list[int] = [3]\nscale: float = 2.0\nlimit: int | None = None'
BODY = """table = pd.DataFrame({"x": [0.1, scale / 3], "y": ["a", "b"]})
figure, axes = plt.subplots()
axes.plot([1.0, scale])"""
SAVE = 'run.save(table=table, figures=figure, data=table, findings={"auc": 0.9})'

# These notebooks compute nothing: their kernels do without PyTorch's compiler, which takes seconds to import.
_DRAWING = """
import sys
from influence.companion.runner import cli, kernels
kernels._COMPUTING = ()
sys.exit(cli.main())
"""


class Workspace:
    """`root` stands in the place of the checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results = root / "results"

    def notebook(self, stem: str, *, body: str = BODY, parameters: str = PARAMETERS, save: str = SAVE) -> Path:
        """Write a notebook."""
        code = nbformat.v4.new_code_cell
        cells = [
            nbformat.v4.new_markdown_cell(f"# Title of {stem}"),
            code("import matplotlib.pyplot as plt\nimport pandas as pd\n\nfrom influence import companion"),
            code(parameters, metadata={"tags": ["parameters"]}),
            code(f'run = companion.start("{stem}", globals())'),
            code(body),
            code(save),
        ]
        path = self.root / "notebooks" / f"{stem}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    def profile(self, name: str, content: dict[str, Any]) -> None:
        """Write `notebooks/profiles/NAME.yaml`."""
        path = self.root / "notebooks" / "profiles" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")

    def reference(self, *rows: str) -> None:
        """Write rows of reference values."""
        path = self.results / "reference" / "paper.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["artifact,item,kind,value,tolerance,status,source", *rows, ""]), encoding="utf-8")

    def run(self, *arguments: str) -> int:
        """The command line `run`, in this process."""
        return cli.main(["run", *arguments])

    def start(self, *arguments: str, computing: bool = False) -> subprocess.Popen[str]:
        """The command line `run`, in a process of its own, ready for notebooks that compute where asked to be."""
        command = [sys.executable, *(["-m", "influence.companion"] if computing else ["-c", _DRAWING])]
        command += ["run", *arguments]

        def hear_interrupts() -> None:
            # A shell starts its background jobs deaf to Ctrl-C, and these tests may run in one.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
            preexec_fn=hear_interrupts,
        )

    def manifest(self, profile: str = "smoke") -> dict[str, Any]:
        """The rows of a profile; none before the first."""
        path = self.results / profile / "manifest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def contents(self, profile: str = "smoke") -> dict[str, bytes]:
        """Every results file of a profile but provenance, which holds times."""
        root = self.results / profile
        files = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")]
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in files if "provenance" not in p.parts}
