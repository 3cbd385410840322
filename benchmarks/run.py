"""Time the engine against the floor and its peers; one JSON for each result, with its environment.

    python -m benchmarks.run                                  # ResNet50 and DenseNet121 at 32x32, K = 10
    python -m benchmarks.run --classes 100 --batch 4
    python -m benchmarks.run --device cuda --batch 64 --tf32  # the same on a GPU
    python -m benchmarks.run --scaling                        # over batch, classes and depth
    python -m benchmarks.run --table                          # Markdown from the JSON files

Every peer is first held against our numbers in float64; one that differs, or fails, is recorded as such.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import threading
import time
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import methods
from influence.companion import models

PEERS = ("backpack-for-pytorch", "opacus", "laplace-torch", "nngeometry", "torch", "triton")
# Relative to the largest entry of a layer's Gram, in float64.
AGREE = 1e-8


def contrasts(gram: Tensor) -> Tensor:
    """Gram of all z_k - z_0, the same whatever common row was added to the Jacobian."""
    return gram - gram[..., :1, :] - gram[..., :, :1] + gram[..., :1, :1]


def difference(model: nn.Module, x: Tensor, method: methods.Method) -> float:
    """Largest difference from ours in float64, relative to each layer's largest entry."""
    model, x = model.double(), x[:2].double()
    try:
        mine, other = (contrasts(f(model, x).detach().double()) for f in (methods.ours, method))
    finally:
        model.float()
    scale = mine.abs().amax(dim=(-1, -2), keepdim=True).clamp(min=1e-300)
    return float(((mine - other).abs() / scale).max())


class Peak:
    """Memory in use at its highest, above what was in use before."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes, self._stop = device, 0, threading.Event()

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = self._highest = _resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._stop.set()
        self._thread.join()
        self.bytes = self._highest - self._before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(model: nn.Module, x: Tensor, method: methods.Method, repeats: int) -> dict[str, float]:
    """Median seconds, after a first run that does not count, and peak memory, for one example."""
    method(model, x)
    seconds = []
    with Peak(x.device) as peak:
        for _ in range(repeats):
            start = time.perf_counter()
            method(model, x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds) / len(x), "megabytes": peak.bytes / len(x) / 1e6}


def environment(device: torch.device) -> dict[str, object]:
    versions = {}
    for name in PEERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


class Chain(nn.Module):
    """Depth and nothing else: 3x3 convolutions with normalisation."""

    def __init__(self, depth: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean(dim=(2, 3)))


def build(name: str, classes: int, width: float, size: int) -> nn.Module:
    if name.startswith("chain"):
        return Chain(int(name.removeprefix("chain")), classes).eval()
    return models.build(name, shape=(3, size, size), n_classes=classes, width=width).eval()


def case(options: argparse.Namespace, name: str, classes: int, batch: int) -> None:
    """All methods on one network: one JSON each."""
    device = torch.device(options.device)
    model = build(name, classes, options.width, options.size).to(device)
    x = torch.randn(batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0)).to(device)
    common = {"network": name, "classes": classes, "batch": batch, "width": options.width, "size": options.size}
    if options.tf32:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    bottom = measure(model, x, methods.floor, options.repeats)
    for label in options.methods or methods.METHODS:
        method = methods.METHODS[label]
        result: dict[str, object] = {**common, "method": label, "tf32": options.tf32, "floor": bottom}
        try:
            result["difference"] = error = difference(model, x, method)
            timed = measure(model, x, method, options.repeats)
            result.update(timed, ratio=timed["seconds"] / bottom["seconds"])
            result["status"] = "ok" if error <= AGREE else f"gives other numbers, by {error:.1e}"
        except ImportError as missing:
            result["status"] = f"not installed: {missing.name}"
        except Exception as failed:
            result["status"] = f"fails: {type(failed).__name__}: {str(failed)[:200]}"
        # After the run: a peer that was installed has been imported by now.
        result["environment"] = environment(device)
        slug = "".join(
            c if c.isalnum() else "-" for c in f"{name} k{classes} n{batch} w{options.width} {label}".lower()
        )
        kind = f"{device.type}-tf32" if options.tf32 else device.type
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{kind}-{slug}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(name, f"K={classes} N={batch}", label, result["status"], result.get("ratio", ""), flush=True)


def table(folder: Path) -> str:
    """Markdown of all results."""
    lines = ["| network | K | batch | method | s / example | of the floor | MB / example | status |", "|" + "---|" * 8]
    for file in sorted(folder.glob("*.json")):
        r = json.loads(file.read_text())
        numbers = f"{r['seconds']:.3g} | {r['ratio']:.2f} | {r['megabytes']:.0f}" if "seconds" in r else "- | - | -"
        lines.append(f"| {r['network']} | {r['classes']} | {r['batch']} | {r['method']} | {numbers} | {r['status']} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--methods", nargs="+", choices=list(methods.METHODS))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.out))
        return
    if options.scaling:
        for batch in (1, 2, 4, 8, 16, 32):
            case(options, "chain16", 10, batch)
        for classes in (2, 5, 10, 20, 50, 100):
            case(options, "chain16", classes, 8)
        for depth in (4, 8, 16, 32, 64):
            case(options, f"chain{depth}", 10, 8)
        return
    for name in options.networks:
        case(options, name, options.classes, options.batch)


if __name__ == "__main__":
    main()
