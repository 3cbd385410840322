"""Time the engine against the floor and its peers; one JSON for each result, with its environment.

    python -m benchmarks.run                                  # ResNet50 and DenseNet121 at 32x32, K = 10
    python -m benchmarks.run --classes 100 --batch 4
    python -m benchmarks.run --networks torchvision:resnet18 --size 64 --classes 1000 --batch 2 --repeats 3 \\
        --methods "influence, input" "influence.score, input"
    python -m benchmarks.run --networks channels_last:resnet50 --methods influence  # a network in that memory order
    python -m benchmarks.run --device cuda --batch 64 --tf32  # the same on a GPU
    python -m benchmarks.run --scaling                        # over batch, classes and depth
    python -m benchmarks.run --table                          # Markdown from the JSON files
    python -m benchmarks.run --plot                           # engine.png and scaling.png from the JSON files

Every peer is held against our numbers in float64; one that differs, or fails, is recorded as such.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import methods
from influence.companion.zoo import models

PEERS = ("backpack-for-pytorch", "opacus", "laplace-torch", "nngeometry", "torchjd", "torch", "triton")
# Relative to the largest entry of a layer's Gram, in float64.
AGREE = 1e-8
_SIZE = 32


def contrasts(gram: Tensor) -> Tensor:
    """Gram of all z_k - z_0, the same whatever common row was added to the Jacobian."""
    return gram - gram[..., :1, :] - gram[..., :, :1] + gram[..., :1, :1]


def difference(model: nn.Module, x: Tensor, method: methods.Method, name: str) -> float:
    """Largest difference in float64, relative to each layer's largest entry: a peer from ours, ours from autograd."""
    model, x = model.double(), x[:2].double()
    values = [f(model, x).detach().double() for f in (methods.truth(name), method)]
    mine, other = values if name in methods.SCORES else map(contrasts, values)
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


def measure(model: nn.Module, x: Tensor, method: methods.Method, repeats: int) -> dict[str, dict[str, float]]:
    """The method and the floor in turn; a first run of each is not timed, its memory is watched.

    Returns:
        For each of the two: median seconds and peak memory for one example.
    """
    both = {"floor": methods.floor, "method": method}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    peak = {}
    for name, function in both.items():
        _give_back()
        with Peak(x.device) as memory:
            function(model, x)
        peak[name] = memory.bytes
    for _ in range(repeats):
        for name, function in both.items():
            gc.collect()
            start = time.perf_counter()
            function(model, x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": statistics.median(seconds[name]) / len(x), "megabytes": peak[name] / len(x) / 1e6}
        for name in both
    }


def _give_back() -> None:
    """Return what was freed to the system: memory that a process still holds would hide what the next run takes."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def environment(device: torch.device) -> dict[str, object]:
    versions = {}
    for name in PEERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


# What is varied, what is held meanwhile, and whose curves are drawn.
SCALES = {
    "batch": {"classes": 10, "depth": 16},
    "classes": {"batch": 8, "depth": 16},
    "depth": {"batch": 8, "classes": 10},
}
SCALED = {"influence": "#0072B2", "vmap(jacrev)": "#999999"}


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
    if name.startswith("channels_last:"):
        network = build(name.removeprefix("channels_last:"), classes, width, size)
        return network.to(memory_format=torch.channels_last)
    if name.startswith("chain"):
        return Chain(int(name.removeprefix("chain")), classes).eval()
    if name.startswith("torchvision:"):
        import torchvision  # it brings PyTorch's compiler with it: two seconds of every process

        return torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None, num_classes=classes).eval()
    model = models.build(name, shape=(3, size, size), n_classes=classes, width=width).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # PyTorch's default: nngeometry takes it to be this, whatever the layer says.
            module.eps = 1e-5
    return model


def label(network: str, size: int) -> str:
    """A network with the size of its images where it is not the usual one."""
    return network if size == _SIZE else f"{network} {size}x{size}"


@dataclass(frozen=True)
class Case:
    """One network, one batch, one method."""

    network: str
    classes: int
    batch: int
    method: str
    width: float
    size: int
    repeats: int
    device: str
    tf32: bool

    @property
    def file(self) -> str:
        kind = f"{self.device}-tf32" if self.tf32 else self.device
        text = f"{label(self.network, self.size)} k{self.classes} n{self.batch} w{self.width} {self.method}".lower()
        return f"{kind}-{''.join(c if c.isalnum() else '-' for c in text)}.json"


def run(case: Case) -> dict[str, object]:
    """Time one method beside the floor, and hold its numbers against ours."""
    device = torch.device(case.device)
    method = methods.METHODS[case.method]
    # The numbers are compared at 10 classes at most: in float64 and with two examples, 100 would not fit a laptop.
    small = build(case.network, min(case.classes, 10), case.width, case.size).to(device)
    model = build(case.network, case.classes, case.width, case.size).to(device)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 3, case.size, case.size, generator=random).to(device)
    if case.tf32:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    result: dict[str, object] = asdict(case)
    try:
        timed = measure(model, x, method, case.repeats)
        result.update(
            timed["method"], floor=timed["floor"], ratio=timed["method"]["seconds"] / timed["floor"]["seconds"]
        )
        # After the memory was watched: a float64 network is larger.
        del model
        result["difference"] = error = difference(small, x, method, case.method)
        result["status"] = "ok" if error <= AGREE else f"gives other numbers, by {error:.1e}"
    except ImportError as missing:
        result["status"] = f"not installed: {missing.name}"
    except Exception as failed:
        # A CPU allocation that is refused is a plain RuntimeError.
        memory = isinstance(failed, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(failed)
        text = " ".join(str(failed).split())[:160]
        result["status"] = "out of memory" if memory else f"fails: {type(failed).__name__}: {text}"
    # After the run: a peer that was installed has been imported by now.
    return {**result, "environment": environment(device)}


def alone(case: Case, options: argparse.Namespace) -> None:
    """Run a case in a process of its own, with limits on its memory and its time, and write its JSON."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--case",
        json.dumps(asdict(case)),
        "--memory",
        str(options.memory),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit, check=False)
        lines = done.stdout.splitlines()
        result = json.loads(lines[-1]) if done.returncode == 0 and lines else None
        if result is None:
            result = {**asdict(case), "status": f"fails: the process ended with {done.returncode}"}
    except subprocess.TimeoutExpired:
        result = {**asdict(case), "status": f"not finished in {options.limit:.0f} s"}
    if result["status"] == "out of memory":
        result["status"] = f"needs more than {options.memory:g} GB"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / case.file).write_text(json.dumps(result, indent=1) + "\n")
    print(
        case.network,
        f"K={case.classes} N={case.batch}",
        case.method,
        result["status"],
        result.get("ratio", ""),
        flush=True,
    )


def results(folder: Path, *, chains: bool = False) -> list[dict[str, Any]]:
    """Results by network, classes, batch and ratio, what did not finish last: of networks, or of chains alone."""
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    found = [r for r in found if r.get("network", "").startswith("chain") == chains and "network" in r]
    return sorted(found, key=lambda r: (r["network"], r["classes"], r["batch"], r.get("ratio", 1e9), r["method"]))


def plot(folder: Path, file: Path) -> None:
    """Draw the ratios to the floor on a logarithmic axis, a panel for each network and number of classes."""
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for r in results(folder):
        if "ratio" in r:
            title = f"{label(r['network'], r['size'])}, K = {r['classes']}, batch {r['batch']}"
            panels.setdefault(title, []).append(r)
    figure = Figure(figsize=(8, 1 + 0.4 * sum(len(rows) for rows in panels.values())), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        colours = ["#0072B2" if r["method"].startswith("influence") else "#999999" for r in rows]
        labels = [r["method"] + ("" if r["status"] == "ok" else " (other numbers)") for r in rows]
        bars = axis.barh(labels, [r["ratio"] for r in rows], color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=title, xscale="log")
        axis.margins(x=0.15)
        axis.invert_yaxis()
    axes[-1].set_xlabel("time of an example / floor")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def plot_scaling(folder: Path, file: Path) -> None:
    """Draw the ratio to the floor over batch, classes and depth of a chain, each with the other two held."""
    from matplotlib.figure import Figure

    rows = [
        {"depth": int(r["network"].removeprefix("chain")), **{k: r[k] for k in ("batch", "classes", "method", "ratio")}}
        for r in results(folder, chains=True)
        if "ratio" in r
    ]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(SCALES), sharey=True)
    for axis, (name, held) in zip(panels, SCALES.items(), strict=True):
        for method, colour in SCALED.items():
            here = [r for r in rows if r["method"] == method and all(r[key] == held[key] for key in held)]
            here.sort(key=lambda r: r[name])
            axis.plot([r[name] for r in here], [r["ratio"] for r in here], "o-", color=colour, label=method)
        title = ", ".join(f"{key} {value}" for key, value in held.items())
        axis.set(xscale="log", xlabel=name, title=title)
        ticks = sorted({r[name] for r in rows if all(r[key] == held[key] for key in held)})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("time of an example / floor")
    panels[0].legend()
    figure.savefig(file, dpi=100, metadata={"Software": None})


def table(folder: Path) -> str:
    """Markdown of all results."""
    lines = ["| network | K | batch | method | s / example | of the floor | MB / example | status |", "|" + "---|" * 8]
    for r in results(folder):
        numbers = f"{r['seconds']:.3g} | {r['ratio']:.2f} | {r['megabytes']:.0f}" if "seconds" in r else "- | - | -"
        network = label(r["network"], r["size"])
        lines.append(
            f"| {network} | {r['classes']} | {r['batch']} | {r['method']} | {numbers} | {_plain(r['status'])} |"
        )
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Without what Markdown would take for markup."""
    return text.replace("<", "&lt;").replace("|", "\\|").replace("`", "")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "densenet121"])
    parser.add_argument("--methods", nargs="+", choices=list(methods.METHODS), default=list(methods.METHODS))
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=_SIZE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for each method")
    parser.add_argument("--memory", type=float, default=16, metavar="GB", help="for each method, on a CPU")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(options.out))
    elif options.plot:
        plot(options.out, options.out / "engine.png")
        plot_scaling(options.out, options.out / "scaling.png")
    elif options.case:
        case = Case(**options.case)
        if case.device == "cpu":
            resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory * 1e9),) * 2)
        print(json.dumps(run(case)))
    else:
        for network, classes, batch, method in cases(options):
            fixed = (options.width, options.size, options.repeats, options.device, options.tf32)
            alone(Case(network, classes, batch, method, *fixed), options)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, int, str]]:
    """Network, classes, batch and method of each run asked for."""
    if options.scaling:
        for method in SCALED:
            yield from (("chain16", 10, batch, method) for batch in (1, 2, 4, 8, 16, 32))
            yield from (("chain16", classes, 8, method) for classes in (2, 5, 20, 50, 100))
            yield from ((f"chain{depth}", 10, 8, method) for depth in (4, 8, 32, 64))
    else:
        yield from ((n, options.classes, options.batch, method) for n in options.networks for method in options.methods)


if __name__ == "__main__":
    main()
