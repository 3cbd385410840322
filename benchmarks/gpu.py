"""The whole acceptance on a GPU in one command, ten minutes at most; one JSON, written after every stage.

    python -m benchmarks.gpu                        # on "cuda"; run it again, and it goes on where it stopped
    python -m benchmarks.gpu --device cpu --small   # rehearse it without a GPU, in Triton's interpreter
    python -m benchmarks.gpu --table                # Markdown from the JSON file

Stages: every kernel and every kind of layer against the CPU in float64; the engine's table with its floor in float32
and TF32; the kernels against cuBLAS, eager PyTorch, torch.compile and Liger; a timed scan, taken on to 50,000 images x
every layer of ResNet50; peak memory. The exit status is 1 where numbers do not agree or a stage fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import influence
from benchmarks import run, stability
from influence.kernels import gram, relu_norm_backward, stability_loss
from influence.kernels.tolerances import GRAM

IMAGES = 50_000
RESULTS = Path(__file__).parent / "results" / "gpu"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where it runs, and how large."""

    device: torch.device
    small: bool

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same numbers on every device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(self.device)


# -- agreement ------------------------------------------------------------------------------------------------------


def _row(name: str, ours: Tensor, truth: Tensor, tolerance: float) -> Row:
    ours, truth = ours.detach().cpu().double(), truth.detach().cpu().double()
    error = float((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-300))
    return {"name": name, "error": error, "tolerance": tolerance, "ok": error <= tolerance}


def agreement_of_kernels(setting: Setting) -> Iterator[Row]:
    """Each kernel against its reference on the CPU in float64."""
    shapes = (
        [(2, 9, 660), (3, 17, 4097), (2, 64, 129)] if setting.small else [(64, 9, 36864), (8, 17, 99999), (4, 64, 4096)]
    )
    for shape in shapes:
        rows = setting.normal(*shape)
        yield _row(f"gram {shape}", gram.gram_triton(rows), gram.gram_torch(rows.cpu().double()), 1e-12)
    # The last one is past 2^31 entries: offsets wrap where they are 32 bits wide.
    if setting.device.type == "cuda" and not setting.small:
        rows = torch.zeros(9, 1, 2**28, device=setting.device)
        rows[8, 0, -1000:] = setting.normal(1000)
        yield _row("gram past 2^31", gram.gram_triton(rows)[8], gram.gram_torch(rows[8:, :, -1000:].cpu())[0], 1e-12)
        del rows
    images = (3, 2, 5, 6, 6) if setting.small else (9, 64, 256, 32, 32)
    for dtype in (torch.float32, torch.float64):
        for last in (False, True):
            grad = setting.normal(*images, dtype=dtype)
            result = setting.normal(*images[1:], seed=2, dtype=dtype).relu()
            result = result.contiguous(memory_format=torch.channels_last) if last else result
            scale = setting.normal(images[2], seed=3, dtype=dtype)
            ours = relu_norm_backward.relu_norm_backward_triton(grad, result, scale)
            wide = [t.cpu().double() for t in (grad, result, scale)]
            truth = relu_norm_backward.relu_norm_backward_torch(*wide)
            for name, mine, theirs in zip(("masked", "scaled"), ours, truth, strict=True):
                text = f"relu_norm_backward {name} {dtype} {'channels last' if last else 'contiguous'}"
                yield _row(text, mine, theirs, 1e-6 if dtype == torch.float32 else 1e-14)
    for classes in (10, 100, 1000) if setting.small else (10, 100, 1000, 50_000):
        z = 3 * setting.normal(16, classes)
        w, labels = z + 0.1 * setting.normal(16, classes, seed=1), torch.arange(16, device=setting.device) % classes
        for kl in (True, False):
            ours = stability_loss.stability_loss_triton(z, w, labels, 0.7, kl=kl, stop=False)
            wide = (z.cpu().double(), w.cpu().double(), labels.cpu())
            truth = stability_loss.stability_loss_torch(*wide, 0.7, kl=kl, stop=False)
            for name, mine, theirs in zip(("loss", "grad z", "grad w"), ours, truth, strict=True):
                tolerance = 1e-12 if name == "loss" else 1e-6
                yield _row(f"stability_loss {name} K={classes} {'KL' if kl else 'CE'}", mine, theirs, tolerance)


class Tokens(nn.Module):
    """Embedding, attention and layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)).mean(dim=1))


class Recurrent(nn.Module):
    """A recurrent layer, which has kernels of its own on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Residual(nn.Module):
    """Batch normalisation, a residual sum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.inner(self.conv(x)) + x)
        return self.head(torch.cat([x, y], dim=1).mean(dim=(2, 3)))


def _image_model(layer: nn.Module, channels: int) -> nn.Module:
    stem = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(
        stem, nn.Tanh(), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{
        name: (lambda make=make, channels=channels: _image_model(make(), channels), lambda: torch.randn(4, 3, 12, 12))
        for name, make, channels in (
            ("convolution", lambda: nn.Conv2d(8, 12, 3, padding=1), 12),
            ("convolution, 1x1", lambda: nn.Conv2d(8, 12, 1, bias=False), 12),
            ("convolution, stride and dilation", lambda: nn.Conv2d(8, 12, 3, stride=2, dilation=2, padding=2), 12),
            ("convolution, groups", lambda: nn.Conv2d(8, 16, 3, groups=4), 16),
            ("convolution, depthwise", lambda: nn.Conv2d(8, 8, 3, groups=8), 8),
            ("convolution, transposed", lambda: nn.ConvTranspose2d(8, 6, 3, stride=2), 6),
            ("batch normalisation", lambda: nn.BatchNorm2d(8), 8),
            ("group normalisation", lambda: nn.GroupNorm(2, 8), 8),
            ("instance normalisation", lambda: nn.InstanceNorm2d(8, affine=True), 8),
            ("layer normalisation", lambda: nn.LayerNorm([8, 12, 12]), 8),
            ("PReLU", lambda: nn.PReLU(8), 8),
        )
    },
    "residual and dense connections": (Residual, lambda: torch.randn(4, 3, 12, 12)),
    "embedding and attention": (Tokens, lambda: torch.randint(20, (4, 7))),
    "LSTM": (Recurrent, lambda: torch.randn(4, 5, 6)),
}


def agreement_of_layers(setting: Setting) -> Iterator[Row]:
    """The Gram of every layer, and of the input, on the device against the CPU in float64."""
    for name, (make, data) in MODELS.items():
        torch.manual_seed(0)
        model, x = make().double().eval(), data()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        wide = x.double() if x.is_floating_point() else x
        for wrt in ("layers", "input") if x.is_floating_point() else ("layers",):
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                truth = influence.metric_tensor(model.cpu().double(), wide, wrt=wrt)
                for dtype in (torch.float64, torch.float32):
                    moved = wide.to(setting.device, dtype if x.is_floating_point() else None)
                    ours = influence.metric_tensor(model.to(setting.device, dtype), moved, wrt=wrt)
                    for b, block in enumerate(truth.blocks):
                        pair = ours.gram[:, b].cpu(), truth.gram[:, b]
                        yield _row(
                            f"{name}: {block}, {dtype}", *map(run.contrasts, pair), GRAM[dtype, setting.device.type]
                        )


# -- time -----------------------------------------------------------------------------------------------------------


@contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def engine(setting: Setting) -> Iterator[Row]:
    """All layers and the input beside the floor, in float32 and TF32."""
    networks = ["chain2"] if setting.small else ["resnet50", "densenet121"]
    size, batch = (8, 2) if setting.small else (32, 64)
    for network in networks:
        for tf32 in (False,) if setting.small else (False, True):
            for method in ("influence", "influence, input"):
                case = run.Case(network, 10, batch, method, 1.0, size, 3, setting.device.type, tf32)
                with _precision(tf32):
                    result = run.run(case)
                yield {**result, "ok": result["status"] == "ok"}


def _seconds(function: Callable[[], object], setting: Setting, repeats: int) -> float:
    """Median, after one run that is not timed."""
    times = []
    for _ in range(repeats + 1):
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def kernels(setting: Setting) -> Iterator[Row]:
    """Each kernel against eager PyTorch (cuBLAS) and torch.compile; the loss against Liger too; bytes a second."""
    repeats = 1 if setting.small else 20
    for shape in (
        [(2, 9, 500)] if setting.small else [(64, 9, 36_864), (16, 9, 589_824), (16, 31, 262_144), (16, 63, 65_536)]
    ):
        rows = setting.normal(*shape)
        bytes_read = 4 * rows.numel()
        yield from _compared("gram", shape, gram.gram_triton, gram.gram_torch, (rows,), bytes_read, setting, repeats)
    for images in [(2, 2, 3, 6, 6)] if setting.small else [(9, 64, 256, 32, 32), (9, 64, 2048, 4, 4)]:
        grad = setting.normal(*images)
        arguments = (grad, setting.normal(*images[1:], seed=2).relu(), setting.normal(images[2], seed=3))
        ours, eager = relu_norm_backward.relu_norm_backward_triton, relu_norm_backward.relu_norm_backward_torch
        bytes_moved = 4 * (3 * grad.numel() + grad[0].numel())
        yield from _compared("relu_norm_backward", images, ours, eager, arguments, bytes_moved, setting, repeats)
    peers = {name: make for name, make in stability.PEERS.items() if not (setting.small and name == "torch.compile")}
    for classes in (10, 100) if setting.small else stability.CLASSES:
        for row in stability.case(classes, 8 if setting.small else 512, setting.device, repeats, peers):
            yield {"kernel": "stability_loss", **row, "ok": not str(row["status"]).startswith("gives other")}


def _compared(
    name: str,
    shape: tuple[int, ...],
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    arguments: tuple[Tensor, ...],
    size: int,
    setting: Setting,
    repeats: int,
) -> Iterator[Row]:
    torch._dynamo.reset()
    methods = {"triton": ours, "eager": eager} | ({} if setting.small else {"torch.compile": torch.compile(eager)})
    for method, function in methods.items():
        row: Row = {"kernel": name, "shape": list(shape), "method": method, "ok": True}
        try:
            row["seconds"] = _seconds(lambda function=function: function(*arguments), setting, repeats)
            row["gigabytes per second"] = size / row["seconds"] / 1e9
        except Exception as error:  # a compiler's own errors have no common base
            row |= {"status": f"fails: {type(error).__name__}: {str(error)[:160]}", "ok": method != "triton"}
        yield row


def scan(setting: Setting) -> Iterator[Row]:
    """Metric tensor of every layer and FI for batch after batch, taken on to 50,000 images; peak memory."""
    network, size, batch, limit = ("chain2", 8, 4, 1.0) if setting.small else ("resnet50", 32, 256, 90.0)
    model = run.build(network, 10, 1.0, size).to(setting.device)
    x, labels = setting.normal(batch, 3, size, size), torch.arange(batch) % 10

    def once() -> tuple[int, int]:
        metric = influence.metric_tensor(model, x, wrt="layers")
        result = influence.first_order_influence(metric, labels)
        # FI is infinite where a label has no probability left: an untrained network is that sure of some noise.
        return len(result.blocks), int((result.fi <= result.ceiling[:, None] * (1 + 1e-6)).sum())

    for tf32 in (False, True):
        with _precision(tf32):
            once()
            with run.Peak(setting.device) as peak:
                blocks, bounded = once()
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
            start, batches = time.perf_counter(), 0
            while not batches or time.perf_counter() - start < limit / 2:
                once()
                batches += 1
                if setting.device.type == "cuda":
                    torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / (batches * batch)
        yield {
            "network": network,
            "tf32": tf32,
            "layers": blocks,
            "batch": batch,
            "batches": batches,
            "seconds per image": seconds,
            "hours for 50,000 images": seconds * IMAGES / 3600,
            "peak megabytes": peak.bytes / 1e6,
            "ok": bounded == blocks * batch,
        }


STAGES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "agreement of kernels": agreement_of_kernels,
    "agreement of layers": agreement_of_layers,
    "engine": engine,
    "kernels": kernels,
    "scan": scan,
}


def table(done: Row) -> str:
    """Markdown of what a run found: agreement, then times as ratios within the run, then the scan."""
    stages, lines = done["stages"], [f"{done['environment']['device']}, PyTorch {done['environment']['torch']}:", ""]
    for name in ("agreement of kernels", "agreement of layers"):
        rows = stages[name]["rows"]
        worst = max(rows, key=lambda row: row["error"] / row["tolerance"])
        bad = sum(not row["ok"] for row in rows)
        lines.append(
            f"* {name}: {len(rows)} comparisons with the CPU in float64, {bad} beyond their tolerance; the nearest "
            f"to it, {worst['name']}, is off by {worst['error']:.1e} of {worst['tolerance']:.0e} allowed."
        )
    for row in stages["scan"]["rows"]:
        lines.append(
            f"* scan of {row['network']} in {'TF32' if row['tf32'] else 'float32'}: FI of all {row['layers']} layers "
            f"takes {1e3 * row['seconds per image']:.1f} ms an image in batches of {row['batch']}, "
            f"{60 * row['hours for 50,000 images']:.1f} minutes for 50,000 images, "
            f"{row['peak megabytes'] / 1e3:.1f} GB at most."
        )
    lines += [
        "",
        "| network, batch of 64, K = 10 | precision | method | ms / image | of the floor |",
        "|---|---|---|---|---|",
    ]
    for row in stages["engine"]["rows"]:
        precision = "TF32" if row["tf32"] else "float32"
        cells = (row["network"], precision, row["method"], f"{1e3 * row['seconds']:.2f}", f"{row['ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| kernel | shape or classes | of eager PyTorch | torch.compile | Liger |", "|---|---|---|---|---|"]
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in stages["kernels"]["rows"]:
        shape = " x ".join(map(str, row["shape"])) if "shape" in row else f"{row['classes']:,}"
        if "seconds" in row:
            method = row["method"].removeprefix("influence, ")
            cases.setdefault((row["kernel"], shape), {})[method] = row["seconds"]
    for (kernel, shape), seconds in cases.items():
        ratios = (seconds.get(name, math.nan) / seconds["eager"] for name in ("triton", "torch.compile", "Liger KL"))
        lines.append(f"| {kernel} | {shape} | {' | '.join('-' if r != r else f'{r:.2f}' for r in ratios)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where something does not agree, fails or is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes that a CPU does in a minute")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="no stage starts later than this")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--table", action="store_true", help="print what the JSON file says")
    options = parser.parse_args(arguments)
    setting = Setting(torch.device(options.device), options.small)
    if setting.device.type == "cpu" and not options.table and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton looks at this when the kernels are imported.
        command = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    file = options.out or RESULTS / f"{options.device}{'-small' if options.small else ''}.json"
    if options.table:
        print(table(json.loads(file.read_text())))
        return 0
    start = time.perf_counter()
    done: Row = {"environment": run.environment(setting.device), "stages": {}}
    if file.exists() and not options.fresh:
        before = json.loads(file.read_text())
        if before["environment"] == done["environment"]:
            done = before
    for name, stage in STAGES.items():
        if done["stages"].get(name, {}).get("finished"):
            continue
        if time.perf_counter() - start > options.limit:
            print(f"{name}: no time left; run the same command again")
            continue
        began, rows = time.perf_counter(), []
        result: Row = {"finished": True, "rows": rows}
        try:
            rows.extend(stage(setting))
        except Exception as error:
            result["fails"] = f"{type(error).__name__}: {error}"
        result["seconds"] = time.perf_counter() - began
        result["ok"] = "fails" not in result and all(row["ok"] for row in rows)
        done["stages"][name] = result
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(done, indent=1) + "\n")
        part.replace(file)
        print(f"{name}: {'ok' if result['ok'] else 'NOT OK'}, {len(rows)} rows, {result['seconds']:.0f} s", flush=True)
        for row in rows:
            if not row["ok"]:
                print("   ", json.dumps(row))
        if "fails" in result:
            print("   ", result["fails"])
    return int(set(done["stages"]) != set(STAGES) or not all(stage["ok"] for stage in done["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
