"""Score a whole data set: stream a loader through metric and measure into a table, file by file."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from influence.checks import require_count, require_deterministic, require_labels
from influence.independence import require_independent
from influence.inputs import Batch, Inputs
from influence.last_layer import head
from influence.measures import Estimator, Exact, Influence, Released, first_order_influence, log_ceiling
from influence.memory import in_chunks, is_out_of_memory
from influence.metric import metric_tensor
from influence.pixels import Patches
from influence.progress import progress_bar
from influence.shards import (
    batches,
    claim,
    file_of,
    fingerprint,
    labels_of,
    require_order,
    require_same,
    require_same_model,
    write,
)

Wrt = str | Sequence[str] | Patches
# Fixed, not read off the free memory: the last digits of a Gram depend on it.
_CHUNK = 32
# Float32 values of Jacobian and Grams at once: 256 MiB.
_MOST_VALUES = 2**26
# Entries of the Grams of one part of a batch that stay in a core's cache.
_FEW_VALUES = 2**20
# Relative difference of FI of the features and of the input that rounding explains.
_SAME = 1e-3


def score(
    model: nn.Module,
    loader: Iterable[Any],
    path: str | Path = "scores",
    *,
    wrt: Wrt = "input",
    estimator: Estimator | None = None,
    labels: Literal["given", "predicted"] = "given",
    batches_per_shard: int = 8,
    chunk_size: int | None = None,
    closed_form: int | None = None,
    progress: bool = True,
) -> Path:
    """Compute the influence of every example of a loader and write it to a folder of Parquet files.

    Each file holds some consecutive batches and appears whole or not at all, so that an interrupted run goes on where
    it stopped. Each says which batches it was made from: where the loader yields others, a sample of which is compared,
    the folder is refused. Under ``torchrun`` each process takes every n-th file; they need not talk to one another, and
    any number of them, at any time, with as many threads each, makes the same files byte for byte.

    Args:
        model: As for ``metric_tensor``; batches are moved to its device.
        loader: Yields ``(x, labels, ...)``, x as for ``metric_tensor`` (several tensors in a tuple of their own), or a
            mapping with "labels" or "label" beside what the model takes, as data collators of transformers do; for
            predicted classes labels are not needed. Each time the same in the same order.
        path: The folder; ``read_scores`` or ``pandas.read_parquet`` read it.
        wrt: As for ``metric_tensor``.
        estimator: As for ``first_order_influence``. What ``Released`` finds near its cut is computed again in float64,
            where the model can be.
        labels: Which class y the loss f = -log P_y is of: the loader's labels, or the class that the model predicts.
        batches_per_shard: Batches in one file.
        chunk_size: Examples computed at once. None: 32, fewer for many classes of large inputs, and half of it again
            each time memory runs out.
        closed_form: None computes the metric tensor of every example. A number: compute it for so many examples of the
            first batch, and take a form without a backward pass for the whole data set where it holds for these: FI =
            (1 - P_y) / P_y where all have full rank K - 1 (the rank in the table is then theirs); FI of the features of
            a last linear layer with fewer than K - 1 of them where FI of the input equals it. Each batch takes two
            forward passes: one more proves that its examples are independent. Trace and lambda_max, which need the rest
            of the network, are NaN.
        progress: Whether to show a bar.

    Returns:
        The folder. Its columns are those of ``Influence.to_dataframe``, with trace and lambda_max of the metric tensor.
        ``example`` is the index into the data set of a loader that has indices, so that a sampler's part of the data
        keeps its numbers; else it counts from the loader's first.

    Raises:
        ValueError: If the loader is empty, shuffles, is a process's own part or has no labels where they are to be
            taken, the folder holds the scores of another run, of other data or of a model that computed something else,
            a number is below 1, or a closed form is asked for where neither holds or the estimator is not ``Exact``.
        TypeError, RuntimeError: As ``metric_tensor``.

    Example:
        >>> import tempfile
        >>> from influence import read_scores
        >>> loader = DataLoader(torch.zeros(6, 5), batch_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = score(nn.Linear(5, 3), loader, folder, labels="predicted", progress=False)
        ...     table = read_scores(path)
        >>> len(table)
        6
    """
    sizes = {"batches_per_shard": batches_per_shard, "chunk_size": chunk_size, "closed_form": closed_form}
    require_count(**sizes)
    if labels not in ("given", "predicted"):
        raise ValueError(f"labels must be 'given' or 'predicted', got {labels!r}.")
    require_order(loader)
    require_deterministic(model)
    estimator = Exact() if estimator is None else estimator
    if closed_form is not None and not isinstance(estimator, Exact):
        raise ValueError(f"closed_form is that of Exact(), got {estimator!r}.")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "model": fingerprint(model),
        "wrt": list(wrt) if isinstance(wrt, list | tuple) else repr(wrt),
        "estimator": repr(estimator),
        "labels": labels,
        "data": None if labels == "predicted" else labels_of(loader),
        **sizes,
    }
    claim(folder, run)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))

    def mine(number: int) -> bool:
        return number % world == rank and not file_of(folder, number).exists()

    rows_of: Callable[[Inputs, Tensor | None], pd.DataFrame] | None = None
    rows: list[pd.DataFrame] = []
    digests: list[str] = []
    compared = False
    title = f"scores {rank + 1}/{world}" if world > 1 else "scores"
    with progress_bar(desc=title, unit="example", disable=not progress) as bar:
        for batch in batches(loader, folder, labels, batches_per_shard, mine):
            number, place = divmod(batch.place, batches_per_shard)
            file = file_of(folder, number)
            if batch.wanted:
                x = _like(model, batch.inputs)
                if rows_of is None and closed_form is not None:
                    rows_of = _closed_form(model, x, wrt, estimator, closed_form)
                elif rows_of is None:
                    rows_of = partial(_rows, model, wrt=wrt, estimator=estimator, chunk_size=chunk_size)
                table = rows_of(x, batch.labels)
                rows.append(table.assign(example=np.asarray(batch.numbers)[table["example"]]))
                digests.append(batch.digest)
                bar.update(len(x))
                if batch.is_last or place + 1 == batches_per_shard:
                    claim(folder, run, begin=False)  # nobody has begun another one meanwhile
                    write(file, pd.concat(rows, ignore_index=True), digests, is_last=batch.is_last)
                    rows, digests = [], []
            elif file.exists():
                require_same(file, place, batch)
                if not compared:
                    logits = _like(model, batch.inputs[: chunk_size or _CHUNK]).logits(model).detach()
                    require_same_model(file, batch.numbers[: len(logits)], logits)
                    compared = True
    return folder


def refine(
    result: Influence,
    model: nn.Module,
    x: Batch,
    *,
    wrt: Wrt = "input",
    estimator: Estimator | None = None,
    chunk_size: int | None = None,
) -> Influence:
    """Compute again in float64 the examples that lie near a cut.

    Args:
        result: From ``first_order_influence``.
        model: The model; a float64 copy of it does the work.
        x: What ``result`` was computed for.
        wrt: As for ``metric_tensor``.
        estimator: As for ``first_order_influence``.
        chunk_size: As for ``metric_tensor``.

    Returns:
        The result with these examples replaced.
    """
    chosen = result.near_cut.any(dim=1).nonzero().squeeze(1)
    if not len(chosen):
        return result
    inputs = Inputs.of(x)
    near = inputs[chosen.to(inputs.device)].each(
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )
    metric = metric_tensor(copy.deepcopy(model).double(), near.batch, wrt=wrt, chunk_size=chunk_size)
    better = first_order_influence(metric, result.labels[chosen], estimator=estimator)
    names = ("fi", "alignment", "rank", "near_cut", "ceiling")
    return replace(result, **{n: getattr(result, n).index_copy(0, chosen, getattr(better, n)) for n in names})


def _rows(
    model: nn.Module,
    x: Inputs,
    labels: Tensor | None,
    *,
    wrt: Wrt,
    estimator: Estimator,
    chunk_size: int | None,
    spectrum: bool = True,
) -> pd.DataFrame:
    """Rows of one batch, whose examples count from 0, with trace and lambda_max or without."""

    def compute(part: slice) -> pd.DataFrame:
        few, given = x[part], None if labels is None else labels[part]
        metric = metric_tensor(model, few.batch, wrt=wrt, chunk_size=len(few))
        result = first_order_influence(metric, given, estimator=estimator)
        if isinstance(estimator, Released):
            try:
                result = refine(result, model, few.batch, wrt=wrt, estimator=estimator, chunk_size=len(few))
            except (RuntimeError, TypeError) as error:
                if is_out_of_memory(error):
                    raise
                _warn_of_precision(type(model).__name__, str(error).partition("\n")[0])
        table = result.to_dataframe()
        table["example"] += part.start
        table["trace"] = metric.trace().cpu().flatten().numpy() if spectrum else np.nan
        table["lambda_max"] = metric.lambda_max().cpu().flatten().numpy() if spectrum else np.nan
        return table

    size = chunk_size or min(_CHUNK, _examples_at_once(model, x, wrt))
    return pd.concat(in_chunks(compute, len(x), size, may_halve=chunk_size is None), ignore_index=True)


@cache
def _warn_of_precision(model: str, reason: str) -> None:
    logging.getLogger("influence").warning(
        f"{model} cannot be computed in float64 ({reason}): what lies near a cut keeps its value and its near_cut"
    )


def _examples_at_once(model: nn.Module, x: Inputs, wrt: Wrt) -> int:
    """Examples whose Jacobian and Grams stay small, by numbers that do not depend on the machine."""
    # With a graph: a model may keep what it makes from its parameters for the calls that follow.
    classes = x[:1].logits(model).shape[1]
    of_input = isinstance(wrt, str) and wrt.partition(":")[0] == "input"
    values = x.perturbing(str(wrt).partition(":")[2] or None).x[0].numel() if of_input else 0
    # A Gram is float64, and a few of its size are alive at once.
    return max(1, _MOST_VALUES // (classes * (values + 16 * classes)))


def _like(model: nn.Module, x: Inputs) -> Inputs:
    """Inputs where the model's parameters are, floating ones in their precision."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return x
    return x.each(lambda tensor: tensor.to(parameter) if tensor.is_floating_point() else tensor.to(parameter.device))


def _closed_form(
    model: nn.Module, x: Inputs, wrt: Wrt, estimator: Estimator, count: int
) -> Callable[[Inputs, Tensor | None], pd.DataFrame]:
    """What makes the rows of a batch from its inputs and labels by a forward pass.

    Raises:
        ValueError: If there is no such way for a sample of the batch.
    """
    sample = x[torch.linspace(0, len(x) - 1, min(count, len(x))).round().long().to(x.device)]
    metric = metric_tensor(model, sample.batch, wrt=wrt, chunk_size=1)
    result = first_order_influence(metric, estimator=estimator)
    full = metric.log_probs.shape[1] - 1
    if bool((result.rank == full).all()):
        return partial(_from_logits, model, metric.dtype, metric.blocks)
    found, features_differ = head(model, sample.batch) if wrt == "input" else None, ""
    if found is not None:
        features = first_order_influence(metric_tensor(*found), result.labels, estimator=estimator)
        same = torch.isclose(result.fi, features.fi, rtol=_SAME, atol=0) & (result.rank == features.rank)
        if bool(same.all()):
            return partial(_from_features, model, metric.dtype, estimator)
        features_differ = f", and FI is not that of the last layer's {found[1].shape[1]} features either"
    worst = metric.blocks[int(result.rank.amin(dim=0).argmin())]
    raise ValueError(
        f"closed_form needs a metric tensor of full rank K - 1 = {full}, got rank {int(result.rank.min())} for "
        f"{worst!r} in a sample of {len(sample)}, as where a layer has fewer than {full} values{features_differ}. FI "
        f"then depends on the perturbation: leave closed_form out, for up to {full} backward passes more."
    )


def _from_features(
    model: nn.Module, dtype: torch.dtype, estimator: Estimator, x: Inputs, labels: Tensor | None
) -> pd.DataFrame:
    """Rows of one batch from what the last layer sees."""
    found = head(model, x.batch)
    if found is None:
        raise ValueError("the model's last layer made the logits of the first batch, but not of this one.")
    layer, features = found
    with torch.no_grad():
        require_independent(model, x, layer(features), dtype)
    size = max(1, min(_CHUNK, _FEW_VALUES // layer.classes**2))
    return _rows(layer, Inputs.of(features), labels, wrt="input", estimator=estimator, chunk_size=size, spectrum=False)


def _from_logits(
    model: nn.Module, dtype: torch.dtype, blocks: tuple[str, ...], x: Inputs, labels: Tensor | None
) -> pd.DataFrame:
    """Rows of one batch at full rank, of a model whose coarsest dtype is this."""
    with torch.no_grad():
        logits = x.logits(model)
        require_independent(model, x, logits, dtype)
    log_probs = torch.log_softmax(logits.double(), dim=1)
    labels = log_probs.argmax(dim=1) if labels is None else labels
    labels = require_labels(labels, examples=len(x), classes=logits.shape[1], device=logits.device)
    ceiling = log_ceiling(log_probs, labels).exp()
    fi = ceiling[:, None].expand(-1, len(blocks))
    one = torch.ones_like(fi)
    rank = one.long() * (logits.shape[1] - 1)
    result = Influence(fi, ceiling, one, rank, torch.zeros_like(one, dtype=torch.bool), labels, blocks)
    return result.to_dataframe().assign(trace=np.nan, lambda_max=np.nan)
