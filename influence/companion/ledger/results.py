"""From a notebook to its files: one call at the start, one at the end.

    run = companion.start("sensitivity/fig_outlier_ranking", globals())
    tables = run.tables(fig_outlier_ranking.compute)
    ...
    run.save(figures=figure, table=table, findings=fig_outlier_ranking.claims(tables))

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
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import cache, manifest, paths, reference
from .notebook import Notebook, NotebookError, discover
from .notebook import profile as read_profile

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

SMOKE = "smoke"
COMMITTED = "cpu"  # the profile that comes with its results
_COMPRESS_ABOVE = 1_000_000  # bytes of CSV
_PACKAGES = ("numpy", "scipy", "pandas", "torch", "torchvision", "scikit-learn", "matplotlib", "seaborn", "papermill")


@dataclass
class Run:
    """An artifact in the making."""

    stem: str  # names notebook, files and reference rows
    profile: str  # `smoke`, `cpu`, `paper` or one of the reader's own
    parameters: dict[str, Any]  # every parameter of the notebook, `profile` and `seeds` among them
    device: torch.device  # where to compute
    inputs: dict[str, str] = field(default_factory=dict)  # name -> hash of the data that were read
    recompute: bool = True  # whether tables are computed, not read from the published results
    _content: dict[str, bytes] = field(default_factory=dict, repr=False)
    _computed: dict[str, Any] = field(default_factory=dict, repr=False)
    _compute: dict[str, Any] = field(default_factory=dict, repr=False)
    _notebook: Notebook = field(repr=False, kw_only=True)
    _key: str = field(repr=False, kw_only=True)
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def add_input(self, name: str, digest: str) -> None:
        """Name an input with the hash of its content; a ValueError where it has another already."""
        if self.inputs.setdefault(name, digest) != digest:
            raise ValueError(f"input {name!r} has two contents: {self.inputs[name]} and {digest}")

    def tables(self, compute: Callable[[Run], Mapping[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
        """Everything that claims and figures are made from: as published, or computed where `recompute` asks for it.

        Either way they are returned as a file of them is read, so that a figure redraws bit for bit.

        Raises:
            NotebookError: nothing is published for this profile, or with other parameters.
            ValueError: a table has an index that would be lost.
        """
        if self.recompute:
            began = cache.clock()
            self._content = {name: _parquet(frame) for name, frame in compute(self).items()}
            code = cache.computing_hash(compute.__module__, compute.__name__)
            self._computed = {"code": code, "inputs": dict(self.inputs)}
            self._compute = self._machine() | {
                "seconds": round(cache.clock() - began, 1),
                "commit": cache.commit(),
            }
        else:
            self._read_published()
        return {name: pd.read_parquet(io.BytesIO(content)) for name, content in self._content.items()}

    def _read_published(self) -> None:
        root, row = published(self.stem, self.profile)
        if row is None or "computed" not in row:
            raise NotebookError(
                f"{self.stem}: nothing is published of the profile {self.profile!r}: set recompute = True to compute it"
            )
        ours = self._row_parameters()
        theirs = {**row["parameters"], "seeds": row["seeds"]}
        if other := sorted(name for name in ours if ours[name] != theirs.get(name)):
            shown = ", ".join(f"{name} = {theirs.get(name)!r}" for name in other)
            raise NotebookError(
                f"{self.stem}: published with {shown}: set recompute = True to compute with other values"
            )
        prefix, suffix = f"data/{self.stem}.", ".parquet"
        names = [name for name in row["files"] if name.startswith(prefix) and name.endswith(suffix)]
        self._content = {name.removeprefix(prefix).removesuffix(suffix): (root / name).read_bytes() for name in names}
        self._computed, self.inputs = row["computed"], dict(row["computed"]["inputs"])
        with contextlib.suppress(OSError, ValueError):
            before = json.loads((root / f"provenance/{self.stem}.json").read_text(encoding="utf-8"))
            self._compute = before.get("compute", {})

    def print_claims(self, claims: Mapping[str, Any]) -> None:
        """Print what the claims found, with the numbers where these are the published ones.

        A network trained on another processor is another network: numbers computed here are left to tables and figures,
        so that a check cell prints the same everywhere.
        """
        for item, found in claims.items():
            for one in found if isinstance(found, list | tuple) else (found,):
                of = f" for {one.of}" if isinstance(one, reference.Estimate) and one.of else ""
                print(f"{item}: " + (f"computed{of}, not published" if self.recompute else str(one)))

    def _row_parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self.parameters.items() if name not in ("profile", "recompute")}

    def save(
        self,
        *,
        table: pd.DataFrame,
        findings: Mapping[str, Any],
        figures: Figure | Mapping[str, Figure] | None = None,
        data: pd.DataFrame | None = None,
    ) -> None:
        """Write everything the artifact consists of, its row in the ledger last, and print the verdict.

        Args:
            table: what the paper's table or figure says, long form, in the order in which it is to be written.
            findings: item -> ours: a bool, a number, or an `Estimate` or several. Each item is compared with the
                reference row it names.
            figures: one figure, or part -> figure (written as STEM.PART).
            data: the points behind the figure; compressed above 1 MB.

        Raises:
            TypeError: a finding is none of these, or not what its reference row asks for.
            ValueError: a table has an index that would be lost.
        """
        comparisons = reference.compare(self.stem, findings)
        # The smoke profile shows that everything runs, on networks that no verdict may rest on.
        outcome = reference.NOT_JUDGED if self.profile == SMOKE else reference.verdict(comparisons)
        root, written = manifest.folder(self.profile), {}
        files = self._figures(figures)
        files[f"tables/{self.stem}.csv"] = _csv(table)
        files[f"tables/{self.stem}.md"] = _markdown(table, comparisons, outcome).encode()
        files |= {f"data/{self.stem}.{name}.parquet": content for name, content in self._content.items()}
        if data is not None:
            content = _csv(data)
            if len(content) > _COMPRESS_ABOVE:
                files[f"data/{self.stem}.csv.gz"] = gzip.compress(content, 9, mtime=0)
            else:
                files[f"data/{self.stem}.csv"] = content
        for relative, content in files.items():
            _write(root / relative, content)
            written[relative] = cache.sha256(root / relative)
        provenance = json.dumps(self._provenance(), indent=1, sort_keys=True) + "\n"
        _write(root / f"provenance/{self.stem}.json", provenance.encode())
        manifest.record(self.profile, self._row(comparisons, outcome, written))
        for comparison in comparisons:
            print(comparison.line)
        for item in sorted({r.item for r in reference.load(self.stem) if r.kind != "context"} - set(findings)):
            print(f"{item}: not measured here")
        print(f"verdict: {outcome}")

    def _figures(self, figures: Figure | Mapping[str, Figure] | None) -> dict[str, bytes]:
        from .. import style

        parts = figures if isinstance(figures, Mapping) else {"": figures} if figures is not None else {}
        files: dict[str, bytes] = {}
        for part, figure in parts.items():
            name = f"figures/{self.stem}{'.' if part else ''}{part}"
            files |= {f"{name}.png": style.png(figure), f"{name}.pdf": style.pdf(figure)}
        return files

    def _row(
        self,
        comparisons: Sequence[reference.Comparison],
        outcome: str,
        files: Mapping[str, str],
    ) -> dict[str, Any]:
        return {
            "stem": self.stem,
            "key": self._key,
            "code_hash": self._notebook.code_hash,
            "package_hash": cache.package_hash(),
            "parameters": {k: v for k, v in self._row_parameters().items() if k != "seeds"},
            "seeds": self.parameters.get("seeds"),
            **({"computed": self._computed} if self._computed else {}),
            "inputs": dict(self.inputs),
            "findings": {c.item: reference.plain(c.ours) for c in comparisons},
            "reference": [
                {"item": r.item, "kind": r.kind, "value": r.value, "tolerance": r.tolerance, "outcome": c.outcome}
                for c in comparisons
                if (r := c.reference) is not None
            ],
            "verdict": outcome,
            "files": dict(files),
        }

    def _provenance(self) -> dict[str, Any]:
        seconds = round(time.perf_counter() - self._started, 1)
        drawn = {"stem": self.stem, "seconds": seconds, **self._machine()}
        return drawn | ({"compute": self._compute} if self._compute else {})

    def _machine(self) -> dict[str, Any]:
        import torch

        gpu = f"cuda ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else None
        versions = {"python": platform.python_version()}
        for name in _PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        return {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": gpu or self.device.type,
            "machine": {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
            "versions": versions,
        }


def published(stem: str, profile: str) -> tuple[Path, dict[str, Any] | None]:
    """Folder and row of what is there of an artifact: where results are written, else in the checkout."""
    for root in (paths.results_dir(), paths.ROOT / "results"):
        row = manifest.read(profile, root=root).get(stem)
        if row is not None:
            return root / profile, row
    return manifest.folder(profile), None


def start(stem: str, namespace: Mapping[str, Any]) -> Run:
    """Begin an artifact: deterministic arithmetic, device, and a few lines that name them and what is published.

    Args:
        stem: path of the notebook below `notebooks/`, without suffix.
        namespace: `globals()` of the notebook, which hold its parameters; one that is None is the profile's. Results
            go to `results/PROFILE/`.

    Raises:
        NotebookError: no such notebook, or one of its parameters is missing or of a wrong type.
        ValueError: the profile's name cannot name a folder.
    """
    notebook = discover().get(stem)
    if notebook is None:
        raise NotebookError(f"{stem}: no such notebook")
    given = {name: namespace[name] for name in notebook.parameters if name in namespace}
    if missing := set(notebook.parameters) - set(given):
        raise NotebookError(f"{stem}: companion.start() needs every parameter; missing: {', '.join(sorted(missing))}")
    profile = str(given.pop("profile"))
    manifest.folder(profile)
    own = {name: value for name, value in given.items() if value is not None}
    merged = notebook.merge({**read_profile(profile).get(stem, {}), **own}, profile=profile)
    device = _deterministic_device(merged.get("seeds"))
    print(f"profile {profile}, device {device.type}")
    if left_open := [name for name, parameter in notebook.parameters.items() if parameter.default is None]:
        print(textwrap.fill("with " + ", ".join(f"{name} = {merged[name]}" for name in left_open), width=120))
    recompute = bool(merged.get("recompute", True))
    run = Run(
        stem, profile, merged, device, recompute=recompute, _notebook=notebook, _key=manifest.key(notebook, merged)
    )
    row = None if recompute else published(stem, profile)[1]
    if row is not None:
        compared = reference.compare(stem, row["findings"])
        print("\n".join(c.line for c in compared if c.outcome is not None))
        print(f"verdict: {row['verdict']}")
    return run


def _deterministic_device(seeds: object) -> torch.device:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    import torch

    # use_deterministic_algorithms(True, warn_only=True) by its other name, which leaves PyTorch's compiler alone: to
    # import that takes three seconds of every start.
    torch.set_deterministic_debug_mode("warn")
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


def _require_plain_index(frame: pd.DataFrame) -> None:
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"the index {frame.index.names} would be lost: use reset_index()")


def _parquet(frame: pd.DataFrame) -> bytes:
    _require_plain_index(frame)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()


def _csv(frame: pd.DataFrame) -> bytes:
    """Every float with the digits that give it back."""
    _require_plain_index(frame)
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text.encode()


def _markdown(table: pd.DataFrame, comparisons: Sequence[reference.Comparison], outcome: str) -> str:
    """The table for readers, then each finding against the paper."""
    blocks = [table.to_markdown(index=False, floatfmt=".4g")]
    rows = []
    for c in comparisons:
        r = c.reference
        expected, status, source = (r.expected, r.status, r.source) if r else ("-", "-", "-")
        rows.append([c.item, c.shown, expected, status, source, c.outcome or "-"])
    if rows:
        names = ["item", "ours", "reference", "status", "source", "outcome"]
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
