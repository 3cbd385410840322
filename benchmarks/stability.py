"""Time the loss of stability training, forward and backward, against its peers over the number of classes.

    python -m benchmarks.stability                    # K = 10 ... 131,072
    python -m benchmarks.stability --device cuda --batch 512
    python -m benchmarks.stability --table            # Markdown from the JSON file

All numbers of one run are ratios to the plain eager loss of the same run: interleaved, median of repeats. Every peer is
first held against our loss and gradients; one that differs, or fails, is recorded as such. The loss is a small part of
a training step unless K is of the order of the width of the network times its positions, as for a language model: that
is where a fused kernel matters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import influence
from benchmarks.run import environment
from influence.kernels.stability_loss import stability_loss_torch

CLASSES = (10, 100, 1_000, 10_000, 131_072)
ALPHA = 1.0
AGREE = 1e-4  # of loss and gradients in float32, relative to the largest entry
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(z: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """The loss as most people write it, in float32."""
    log_p, log_q = F.log_softmax(z, dim=1), F.log_softmax(w, dim=1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return F.cross_entropy(z, labels) + ALPHA * divergence


def ours(backend: str) -> Loss:
    return lambda z, w, labels: influence.stability_loss(z, w, labels, alpha=ALPHA, backend=backend)


def compiled() -> Loss:
    torch._dynamo.reset()
    return torch.compile(eager, dynamic=False)


def liger() -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    kernel = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(z: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        # Its gradient is of the second distribution alone: the clean output is held constant.
        log_p, log_q = F.log_softmax(z, dim=1), F.log_softmax(w, dim=1)
        return F.cross_entropy(z, labels) + ALPHA * kernel(log_q, log_p)

    return loss


PEERS: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "influence, torch": lambda: ours("torch"),
    "influence, triton": lambda: ours("triton"),
    "torch.compile": compiled,
    "Liger KL": liger,
}


def problem(classes: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(batch, classes, generator=generator)
    w = z + 0.1 * torch.randn(batch, classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return z.to(device).requires_grad_(), w.to(device).requires_grad_(), labels.to(device)


def step(loss: Loss, z: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(z, w, labels)
    return value.detach(), *torch.autograd.grad(value, (z, w))


def status(loss: Loss, z: Tensor, w: Tensor, labels: Tensor) -> str:
    """Which loss it is: the one with the gradient through both branches, the stopped one, or another."""
    found = step(loss, z, w, labels)
    with torch.no_grad():
        for name, stop in (("ok", False), ("ok, with the clean branch stopped", True)):
            expected = stability_loss_torch(z, w, labels, ALPHA, kl=True, stop=stop)
            pairs = zip(found, expected, strict=True)
            if all((a - b).abs().max() <= AGREE * b.abs().max() for a, b in pairs):
                return name
    return "gives other numbers"


def case(
    classes: int, batch: int, device: torch.device, repeats: int, peers: dict[str, Callable[[], Loss]] | None = None
) -> list[dict[str, object]]:
    """One row for each peer: status, seconds (median), ratio to eager."""
    z, w, labels = problem(classes, batch, device)
    rows: dict[str, dict[str, object]] = {}
    kept: dict[str, Loss] = {}
    for name, make in (PEERS if peers is None else peers).items():
        rows[name] = {"method": name, "classes": classes, "batch": batch}
        try:
            loss = make()
            rows[name]["status"] = status(loss, z, w, labels)
            kept[name] = loss
        except ImportError as missing:
            rows[name]["status"] = f"not installed: {missing.name}"
        except Exception as failed:
            rows[name]["status"] = f"fails: {type(failed).__name__}: {str(failed).splitlines()[0][:120]}"
    seconds: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(repeats):
        for name, loss in kept.items():  # interleaved, so that a busy moment hits all of them
            start = time.perf_counter()
            step(loss, z, w, labels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        rows[name]["seconds"] = statistics.median(times)
        rows[name]["ratio"] = statistics.median(times) / statistics.median(seconds["eager"])
    return list(rows.values())


def table(file: Path) -> str:
    """Markdown: time relative to eager, and what did not run."""
    result = json.loads(file.read_text())
    lines = ["| method | " + " | ".join(f"K = {k:,}" for k in result["classes"]) + " |"]
    lines.append("|" + "---|" * (1 + len(result["classes"])))
    reasons = []
    for name in PEERS:
        rows = [row for row in result["rows"] if row["method"] == name]
        cells = [f"{row['ratio']:.2f}" if "ratio" in row else "-" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        notes = sorted({str(row["status"]) for row in rows} - {"ok"})
        reasons += [f"*{name}*: {note}" for note in notes]
    return "\n".join([*lines, *(["", "; ".join(reasons)] if reasons else [])])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=list(CLASSES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stability")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    file = options.out / f"{device.type}-loss-n{options.batch}.json"
    if options.table:
        print(table(file))
        return
    rows = [row for classes in options.classes for row in case(classes, options.batch, device, options.repeats)]
    result = {"classes": options.classes, "rows": rows, "environment": environment(device)}
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(table(file))


if __name__ == "__main__":
    main()
