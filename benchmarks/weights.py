"""Time FI of single weights against what it cannot do without, in networks that keep the channels last.

    python -m benchmarks.weights            # the paper's networks, and a quarter of their width
    python -m benchmarks.weights --networks densenet121 --widths 0.5
    python -m benchmarks.weights --table    # Markdown from the JSON file

The floor is what a gradient of all weights takes for each class but one: a forward and K - 1 backward passes of the
batch, summed over it. To read is to make every entry of the Jacobian, for each example by itself, and to add up its
square. CPU time of one thread: medians of some repeats, in each of which the floor comes before and after.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import influence
from benchmarks.run import build, environment
from influence.grams.gradients import ProductGradient, _Rows, sum_of_squares

NETWORKS = ("resnet50", "densenet121")
WIDTHS = (1.0, 0.25)
CLASSES = 10
BATCH, CHUNKS = 16, 8


def floor(model: nn.Module, batches: list[Tensor]) -> None:
    parameters = list(model.parameters())
    for x in batches:
        logits = model(x)
        for k in range(1, logits.shape[1]):
            torch.autograd.grad((logits[:, k] - logits[:, 0]).sum(), parameters, retain_graph=True)


@contextmanager
def reading() -> Iterator[list[float]]:
    """Seconds in which entries of Jacobians are made and squared while this is open, one number for each time."""
    spent: list[float] = []

    def timed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def entries(*arguments: Any) -> Tensor:
            start = time.thread_time()
            jacobian = make(*arguments)
            sum_of_squares(jacobian.unbind(dim=1))
            spent.append(time.thread_time() - start)
            return jacobian

        return entries

    with (
        mock.patch.object(ProductGradient, "entries", timed(ProductGradient.entries)),
        mock.patch.object(_Rows, "entries", timed(_Rows.entries)),
    ):
        yield spent


def seconds(function: Callable[[], object]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def case(network: str, width: float, batch: int, chunks: int, repeats: int) -> dict[str, object]:
    """CPU seconds for one example of the floor, of reading and of the function, and the last over 1.5 floor + read."""
    model = build(f"channels_last:{network}", CLASSES, width, 32)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch * chunks, 3, 32, 32, generator=random).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.train()(x)  # statistics under which activations keep their size
    model.eval()

    def ours() -> None:
        influence.weight_influence(model, x, "predicted", chunk_size=batch)

    influence.weight_influence(model, x[:1], "predicted")  # finds out how the network is built
    times: dict[str, list[float]] = {"floor": [], "read": [], "seconds": [], "ratio": []}
    for _ in range(repeats):
        before = seconds(lambda: floor(model, list(x.split(batch))))
        taken = seconds(ours)
        with reading() as spent:
            ours()
        after = seconds(lambda: floor(model, list(x.split(batch))))
        least, read = (before + after) / 2, sum(spent)
        found = {"floor": least / len(x), "read": read / len(x), "seconds": taken / len(x)}
        for name, value in (found | {"ratio": taken / (1.5 * least + read)}).items():
            times[name].append(value)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {"network": network, "width": width, "batch": batch, "examples": len(x), **middle}


def table(file: Path) -> str:
    """Markdown: one row for each network."""
    lines = [
        "| network | width | batch | floor, s / example | read | single weights | of 1.5 floor + read |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in json.loads(file.read_text())["rows"]:
        times = " | ".join(f"{row[name]:.3f}" for name in ("floor", "read", "seconds"))
        lines.append(f"| {row['network']} | {row['width']:g} | {row['batch']} | {times} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--widths", type=float, nargs="+", default=WIDTHS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "weights")
    options = parser.parse_args(arguments)
    file = options.out / "cpu.json"
    if not options.table:
        torch.set_num_threads(1)
        rows = []
        for network in options.networks:
            for width in options.widths:
                rows.append(case(network, width, options.batch, options.chunks, options.repeats))
                print(rows[-1], flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"rows": rows, "environment": environment(torch.device("cpu"))}
        file.write_text(json.dumps(result, indent=1) + "\n")
    print(table(file))


if __name__ == "__main__":
    main()
