"""From a notebook to its files: one call at the start, one at the end.

    run = companion.start("sensitivity/fig_outliers", profile=profile, seeds=seeds, images=images)
    ...
    run.save(figures=figure, table=table, findings={"auc": 0.97, "fi_beats_jacobian": True})

`save` writes figures, tables, data and provenance of the artifact below `results/PROFILE/`, and last its row in the
ledger: an artifact is there when its row is. Nothing but provenance holds a time, a machine or a version, so the same
run writes the same bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cache, manifest, reference
from .notebook import Notebook, NotebookError, discover

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

_COMPRESS_ABOVE = 1_000_000  # bytes of CSV
_PACKAGES = ("numpy", "scipy", "pandas", "torch", "torchvision", "scikit-learn", "matplotlib", "seaborn", "papermill")
# matplotlib dates a PDF and names its version in both formats
_NO_DATES: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@dataclass
class Run:
    """An artifact in the making.

    Attributes:
        stem: names notebook, files and reference rows.
        profile: `smoke`, `cpu`, `paper` or one of the reader's own.
        parameters: every parameter of the notebook, `profile` and `seeds` among them.
        device: where to compute.
        inputs: name -> hash of the data that were read.
    """

    stem: str
    profile: str
    parameters: dict[str, Any]
    device: torch.device
    inputs: dict[str, str] = field(default_factory=dict)
    _notebook: Notebook = field(repr=False, kw_only=True)
    _key: str = field(repr=False, kw_only=True)
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def add_input(self, name: str, digest: str) -> None:
        """Name an input with the hash of its content.

        Raises:
            ValueError: the name stands for another content already.
        """
        if self.inputs.setdefault(name, digest) != digest:
            raise ValueError(f"input {name!r} has two contents: {self.inputs[name]} and {digest}")

    def save(
        self,
        *,
        table: pd.DataFrame,
        findings: Mapping[str, bool | float],
        figures: Figure | Mapping[str, Figure] | None = None,
        data: pd.DataFrame | None = None,
    ) -> None:
        """Write everything the artifact consists of, its row in the ledger last, and print the verdict.

        Args:
            table: what the paper's table or figure says, long form, in the order in which it is to be written.
            findings: item -> ours, a truth value for a claim. Each item is compared with the reference row it names.
            figures: one figure, or part -> figure (written as STEM.PART).
            data: the points behind the figure; compressed above 1 MB.

        Raises:
            TypeError: a finding is neither a bool nor a number, or not what its reference row asks for.
            ValueError: a table has an index that would be lost.
        """
        ours = {item: _finding(item, value) for item, value in findings.items()}
        comparisons = reference.compare(self.stem, ours)
        outcome = reference.verdict(comparisons)
        root, written = manifest.folder(self.profile), {}
        files = self._figures(figures)
        files[f"tables/{self.stem}.csv"] = _csv(table)
        files[f"tables/{self.stem}.md"] = _markdown(table, comparisons, outcome).encode()
        if data is not None:
            content = _csv(data)
            if len(content) > _COMPRESS_ABOVE:
                files[f"data/{self.stem}.csv.gz"] = gzip.compress(content, 9, mtime=0)
            else:
                files[f"data/{self.stem}.csv"] = content
        for relative, content in files.items():
            _write(root / relative, content)
            written[relative] = manifest.sha256(root / relative)
        provenance = json.dumps(self._provenance(), indent=1, sort_keys=True) + "\n"
        _write(root / f"provenance/{self.stem}.json", provenance.encode())
        manifest.record(self.profile, self._row(ours, comparisons, outcome, written))
        for comparison in comparisons:
            print(comparison.line)
        for item in sorted({r.item for r in reference.load(self.stem) if r.kind != "context"} - set(ours)):
            print(f"{item}: not measured here")
        print(f"verdict: {outcome}")

    def _figures(self, figures: Figure | Mapping[str, Figure] | None) -> dict[str, bytes]:
        parts = figures if isinstance(figures, Mapping) else {"": figures} if figures is not None else {}
        files = {}
        for part, figure in parts.items():
            for suffix, no_dates in _NO_DATES.items():
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix, metadata=no_dates)
                files[f"figures/{self.stem}{'.' if part else ''}{part}.{suffix}"] = buffer.getvalue()
        return files

    def _row(
        self,
        findings: Mapping[str, bool | float | None],
        comparisons: Sequence[reference.Comparison],
        outcome: str,
        files: Mapping[str, str],
    ) -> dict[str, Any]:
        return {
            "stem": self.stem,
            "key": self._key,
            "code_hash": self._notebook.code_hash,
            "package_hash": cache.package_hash(),
            "parameters": {k: v for k, v in self.parameters.items() if k not in ("profile", "seeds")},
            "seeds": self.parameters.get("seeds"),
            "inputs": dict(self.inputs),
            "findings": dict(findings),
            "reference": [
                {"item": r.item, "kind": r.kind, "value": r.value, "tolerance": r.tolerance, "holds": c.holds}
                for c in comparisons
                if (r := c.reference) is not None
            ],
            "verdict": outcome,
            "files": dict(files),
        }

    def _provenance(self) -> dict[str, Any]:
        import torch

        gpu = f"cuda ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else None
        versions = {"python": platform.python_version()}
        for name in _PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        return {
            "stem": self.stem,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.perf_counter() - self._started, 1),
            "device": gpu or self.device.type,
            "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
            "versions": versions,
        }


def start(stem: str, *, profile: str, **parameters: Any) -> Run:
    """Begin an artifact: deterministic arithmetic, device, and one line that names them.

    Args:
        stem: path of the notebook below `notebooks/`, without suffix.
        profile: name of the profile; results go to `results/PROFILE/`.
        **parameters: every other parameter of the notebook (`seeds=seeds, ...`), because the artifact depends on all.

    Raises:
        NotebookError: no such notebook, or parameters other than those of its `parameters` cell.
        ValueError: the profile's name cannot name a folder.
    """
    notebook = discover().get(stem)
    if notebook is None:
        raise NotebookError(f"{stem}: no such notebook")
    missing = set(notebook.parameters) - set(parameters) - {"profile"}
    if missing:
        raise NotebookError(f"{stem}: companion.start() needs every parameter; missing: {', '.join(sorted(missing))}")
    manifest.folder(profile)
    merged = notebook.merge(parameters, profile=profile)
    device = _deterministic_device(merged.get("seeds"))
    print(f"profile {profile}, device {device.type}")
    return Run(stem, profile, merged, device, _notebook=notebook, _key=manifest.key(notebook, merged))


def _deterministic_device(seeds: object) -> torch.device:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # TF32 keeps 10 bits of the mantissa: too few for the small singular values of the metric tensor.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    first = seeds[0] if isinstance(seeds, list | tuple) and seeds else seeds
    # Experiments draw from generators of their own; this is for what forgets to.
    torch.manual_seed(first if isinstance(first, int) else 0)
    np.random.seed(first if isinstance(first, int) else 0)
    name = os.environ.get("INFLUENCE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _finding(item: str, value: object) -> bool | float | None:
    """A plain bool or number; None for what is not finite, which JSON cannot hold."""
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool):
        return plain
    if isinstance(plain, int | float):
        return plain if np.isfinite(plain) else None
    raise TypeError(f"finding {item!r}: expected a bool or a number, got {value!r}")


def _csv(frame: pd.DataFrame) -> bytes:
    """Every float with the digits that give it back."""
    import pandas as pd

    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"the index {frame.index.names} would be lost: use reset_index()")
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text.encode()


def _markdown(table: pd.DataFrame, comparisons: Sequence[reference.Comparison], outcome: str) -> str:
    """The table for readers, then each finding against the paper."""
    import pandas as pd

    blocks = [table.to_markdown(index=False, floatfmt=".4g")]
    rows = []
    for c in comparisons:
        r = c.reference
        expected, status, source = (r.expected, r.status, r.source) if r else ("-", "-", "-")
        holds = {True: "yes", False: "no", None: "-"}[c.holds]
        rows.append([c.item, reference.format_finding(c.ours), expected, status, source, holds])
    if rows:
        names = ["item", "ours", "reference", "status", "source", "holds"]
        blocks.append(pd.DataFrame(rows, columns=names).to_markdown(index=False, disable_numparse=True))
    return "\n\n".join([*blocks, f"Verdict: {outcome}"]) + "\n"


def _write(path: Path, content: bytes) -> None:
    cache.atomic_write(path, lambda temporary: temporary.write_bytes(content))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
