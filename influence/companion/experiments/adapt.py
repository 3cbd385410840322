"""The four tasks of Shu & Zhu (2019) on a model and data of the reader's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import influence

from .. import adapt, cache, data
from ..evaluation import rank_agreement
from ..material import Examples, Material, load_data, sampled
from ..results import Run

# From here on the trace is estimated from draws of the class: K - 1 backward passes would take too long.
MANY_CLASSES = 64
DRAWS = 64
_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_PATCH_VALUES = 2**24  # float64 entries of the Grams of one image's patches


@dataclass(frozen=True)
class Subject:
    """What is studied.

    Attributes:
        model: takes the examples as they are stored, bytes as 0..255.
        material: training and test examples.
        classes: K.
        device: where the model is.
        image: whether an example is an image ``(C, H, W)``.
        name: how figures call it.
    """

    model: nn.Module
    material: Material
    classes: int
    device: torch.device
    image: bool
    name: str

    def batches(self, examples: Examples, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels on the device of the model."""
        for start in range(0, len(examples), size):
            x, labels = examples.batch(range(start, min(start + size, len(examples))))
            yield x.to(self.device), labels.to(self.device)

    def class_name(self, k: int) -> str:
        """Name of a class, its number where the data have none."""
        return self.material.classes[k] if k < len(self.material.classes) else str(k)


def load(
    run: Run,
    model: str,
    dataset: str,
    *,
    architecture: str = "",
    size: int = 0,
    scale: float = 0.0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Subject:
    """The model and the data that two words name, checked with two examples (`companion.adapt` says which words)."""
    material = load_data(dataset, size=size)
    own = model.startswith("companion:")
    network = adapt.load_model(
        model,
        classes=len(material.classes),
        architecture=architecture or None,
        profile=run.profile,
        dataset=dataset if dataset in data.NAMES else "digits",
        device=run.device,
    )
    network = adapt.prepare(network, material.train, scale=1.0 if own else scale, mean=mean, std=std)
    classes = adapt.check(network, material.train)
    adapt.check(network, material.test)
    run.add_input(dataset, cache.fingerprint([material.train.labels.tolist(), material.test.labels.tolist()]))
    shape = material.train[0][0].shape
    image = len(shape) == 3 and shape[0] in (1, 3)
    return Subject(network, material, classes, adapt.device_of(network), image, f"{model}, {dataset}")


# -- examples: suspicious ones, training against test -----------------------------------------------------------------


def scores(subject: Subject, *, images: int, seed: int = 0) -> pd.DataFrame:
    """Influence of the whole input and what it competes with, for a sample of the training and of the test examples.

    Returns:
        One row for each part ("train", "test") and example (its position there): label, predicted, p_label, loss
        (nats), fi and ceiling (f = -log P_label), fi_predicted (f = -log P_predicted), alignment, rank, trace of the
        metric tensor (per squared unit of the data), estimated (whether the trace is).
    """
    frames = []
    for part, everything in (("train", subject.material.train), ("test", subject.material.test)):
        rows = sampled(len(everything), images, seed=seed)
        frame = _score_part(subject, everything.take(rows))
        frame.insert(0, "example", rows)
        frame.insert(0, "part", part)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _score_part(subject: Subject, examples: Examples) -> pd.DataFrame:
    full = subject.classes > MANY_CLASSES and _rank_is_full(subject, examples)
    parts = []
    for x, labels in subject.batches(examples):
        parts.append(_in_closed_form(subject, x, labels) if full else _from_metric(subject, x, labels))
    return pd.concat(parts, ignore_index=True)


def _rank_is_full(subject: Subject, examples: Examples) -> bool:
    x, _ = examples.batch(range(min(2, len(examples))))
    metric = influence.metric_tensor(subject.model, x.to(subject.device), wrt=_perturbed(x), chunk_size=1)
    return bool((metric.rank() == subject.classes - 1).all())


def _perturbed(x: Tensor) -> str:
    # Token numbers cannot be moved a little; the parameters that they meet can.
    return "input" if x.is_floating_point() else "parameters"


def _from_metric(subject: Subject, x: Tensor, labels: Tensor) -> pd.DataFrame:
    metric = influence.metric_tensor(subject.model, x, wrt=_perturbed(x))
    result = influence.first_order_influence(metric, labels)
    predicted = influence.first_order_influence(metric)
    values = {
        "fi": result.fi[:, 0],
        "fi_predicted": predicted.fi[:, 0],
        "alignment": result.alignment[:, 0],
        "rank": result.rank[:, 0],
        "trace": metric.trace()[:, 0],
    }
    return _rows(metric.log_probs, labels, values, estimated=False)


def _in_closed_form(subject: Subject, x: Tensor, labels: Tensor) -> pd.DataFrame:
    with torch.no_grad():
        log_probs = influence.checks.require_logits(subject.model(x)).double().log_softmax(1)
    best = log_probs.argmax(1)
    values = {
        "fi": _odds(log_probs, labels),
        "fi_predicted": _odds(log_probs, best),
        "alignment": torch.ones(len(x)),
        "rank": torch.full((len(x),), subject.classes - 1),
        "trace": input_trace(subject, x).flatten(1).sum(1),
    }
    return _rows(log_probs, labels, values, estimated=True)


def _odds(log_probs: Tensor, labels: Tensor) -> Tensor:
    """(1 - P) / P without the digits that 1 - P would lose."""
    others = log_probs.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return (others - log_probs.gather(1, labels[:, None])[:, 0]).exp()


def _rows(log_probs: Tensor, labels: Tensor, values: dict[str, Tensor], *, estimated: bool) -> pd.DataFrame:
    log_p = log_probs.gather(1, labels[:, None])[:, 0]
    first = {
        "label": labels,
        "predicted": log_probs.argmax(1),
        "p_label": log_p.exp(),
        "loss": -log_p,
        "ceiling": _odds(log_probs, labels),
    }
    frame = pd.DataFrame({name: value.cpu().numpy() for name, value in (first | values).items()})
    return frame.assign(estimated=estimated)


def score_gradients(
    subject: Subject, x: Tensor, *, leaves: Sequence[Tensor], seed: int = 0
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Gradients of log P_k, with weights that make sum w_k s_k s_k^T the metric tensor, or an unbiased estimate of it.

    Args:
        subject: the model.
        x: ``(N, ...)``; one of the leaves, or with N = 1.
        leaves: what to differentiate by.
        seed: of the draws of k, beyond `MANY_CLASSES` classes.

    Yields:
        Weight of each example ``(N,)`` and the gradients, one for each leaf.
    """
    log_probs = influence.checks.require_logits(subject.model(x)).double().log_softmax(1)
    probs = log_probs.detach().exp()
    every = torch.arange(len(x), device=x.device)
    if subject.classes <= MANY_CLASSES:
        chosen = [(probs[:, k], torch.full_like(every, k)) for k in range(subject.classes)]
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(probs.cpu(), DRAWS, replacement=True, generator=generator).to(x.device)
        chosen = [(probs.new_full((len(x),), 1 / DRAWS), drawn[:, i]) for i in range(DRAWS)]
    for place, (weight, k) in enumerate(chosen):
        yield (
            weight,
            torch.autograd.grad(
                log_probs[every, k].sum(), leaves, retain_graph=place < len(chosen) - 1, materialize_grads=True,
                allow_unused=True,
            ),
        )  # fmt: skip


def input_trace(subject: Subject, x: Tensor) -> Tensor:
    """Trace of the metric tensor of each single value of the input, the shape of ``x``."""
    leaf = x.detach().clone().requires_grad_()
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for weight, (grad,) in score_gradients(subject, leaf, leaves=[leaf]):
        total += weight.view(-1, *[1] * (x.ndim - 1)) * grad.double().square()
    return total


def suspicious(subject: Subject, table: pd.DataFrame, *, count: int = 20) -> pd.DataFrame:
    """The `count` training examples of largest FI with the names of their classes and, for images, their pixels."""
    top = table[table["part"] == "train"].nlargest(count, "fi").reset_index(drop=True)
    for column in ("label", "predicted"):
        top[f"{column}_name"] = [subject.class_name(int(k)) for k in top[column]]
    if subject.image:
        top["pixels"] = pd.Series([picture(subject.material.train[int(i)][0]) for i in top["example"]], dtype=object)
    return top


def picture(example: Tensor) -> np.ndarray:
    """An image as (H, W, C) numbers in 0..1, for display alone."""
    image = example.permute(1, 2, 0).double().numpy()
    if example.dtype == torch.uint8:
        return image / 255
    low, high = float(image.min()), float(image.max())
    return image if 0 <= low and high <= 1 else (image - low) / max(high - low, 1e-12)


def train_against_test(table: pd.DataFrame, *, seed: int = 0, repeats: int = 300) -> pd.DataFrame:
    """Quantiles of FI (predicted class) and of the trace on either part, and how well each tells the parts apart.

    Returns:
        One row per score: quantiles, and auroc of test against training examples with its 95% bootstrap interval.
    """
    test = (table["part"] == "test").to_numpy()
    generator = np.random.default_rng(seed)
    rows = []
    for score in ("fi_predicted", "trace"):
        values = table[score].to_numpy()
        draws = []
        for _ in range(repeats):
            chosen = [generator.choice(np.flatnonzero(part), part.sum()) for part in (test, ~test)]
            both = np.concatenate(chosen)
            draws.append(roc_auc_score(test[both], values[both]))
        row = {"score": score, "train": int((~test).sum()), "test": int(test.sum())}
        row |= {"auroc": roc_auc_score(test, values)}
        row |= {"low": np.quantile(draws, 0.025), "high": np.quantile(draws, 0.975)}
        for part, members in (("train", ~test), ("test", test)):
            row |= {f"{part}_{q:g}": np.quantile(values[members], q) for q in _QUANTILES}
        rows.append(row)
    return pd.DataFrame(rows)


# -- layers -----------------------------------------------------------------------------------------------------------


def layers(subject: Subject, *, images: int, relative: float = 0.01, seed: int = 0) -> pd.DataFrame:
    """How far noise in each layer moves the output, in a unit that layers share.

    The noise has a standard deviation of `relative` times the root mean square of the layer's own parameters, so the
    mean divergence is (relative * rms)^2 / 2 * tr G to second order.

    Returns:
        One row per layer, in the order of the network: layer, kind, parameters (their number), divergence (nats, mean
        over examples), share (of the sum over layers), alignment (mean FI / ceiling; NaN where K > 64), examples.
    """
    examples = subject.material.test.sample(images, seed=seed)
    modules = dict(subject.model.named_modules())
    owned = {name: list(module.parameters(recurse=False)) for name, module in modules.items()}
    owned = {name: parameters for name, parameters in owned.items() if parameters}
    if subject.classes <= MANY_CLASSES:
        trace, alignment = _exact_layers(subject, examples)
    else:
        trace, alignment = _drawn_layers(subject, examples, owned), np.full(len(owned), np.nan)
    rows = []
    for name, mean_trace, aligned in zip(owned, trace, alignment, strict=True):
        flat = torch.cat([p.detach().double().flatten() for p in owned[name]])
        rows.append(
            {
                "layer": name.removeprefix("model.") or "(model)",
                "kind": type(modules[name]).__name__,
                "parameters": len(flat),
                "divergence": 0.5 * relative**2 * float(flat.square().mean()) * mean_trace,
                "alignment": aligned,
            }
        )
    frame = pd.DataFrame(rows)
    frame["share"] = frame["divergence"] / max(frame["divergence"].sum(), 1e-300)
    return frame.assign(examples=len(examples))


def _exact_layers(subject: Subject, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    traces, alignments = [], []
    for x, labels in subject.batches(examples):
        metric = influence.metric_tensor(subject.model, x, wrt="layers")
        traces.append(metric.trace().cpu())
        alignments.append(influence.first_order_influence(metric, labels).alignment.cpu())
    return torch.cat(traces).mean(0).numpy(), torch.cat(alignments).mean(0).numpy()


def _drawn_layers(subject: Subject, examples: Examples, owned: dict[str, list[nn.Parameter]]) -> np.ndarray:
    leaves = [p for parameters in owned.values() for p in parameters]
    where = [row for row, parameters in enumerate(owned.values()) for _ in parameters]
    total = np.zeros(len(owned))
    flags = [p.requires_grad for p in leaves]
    try:
        for p in leaves:
            p.requires_grad_(True)
        for n, (x, _) in enumerate(subject.batches(examples, size=1)):
            for weight, grads in score_gradients(subject, x, leaves=leaves, seed=n):
                for row, grad in zip(where, grads, strict=True):
                    total[row] += float(weight) * float(grad.double().square().sum())
    finally:
        for p, flag in zip(leaves, flags, strict=True):
            p.requires_grad_(flag)
    return total / len(examples)


# -- vulnerable areas -------------------------------------------------------------------------------------------------


def maps(subject: Subject, table: pd.DataFrame, *, images: int, size: int = 3) -> pd.DataFrame:
    """Where an image is vulnerable, for the test images of the scores whose prediction is least sure.

    Returns:
        One row per image: example, label_name, predicted_name, ceiling (of the predicted class), pixels (H, W, C),
        trace (H, W; summed over channels), single (H, W; FI of one value, the largest of its channels), patch (FI of a
        `size` x `size` patch on a grid of rows and columns, the largest of the channels; None beyond 64 classes).
    """
    if not subject.image:
        return pd.DataFrame()
    rows = []
    for chosen in table[table["part"] == "test"].nlargest(images, "fi_predicted").to_dict("records"):
        example = int(chosen["example"])
        stored, _ = subject.material.test.stored([example])
        x = subject.material.test.batch([example])[0].to(subject.device)
        trace = input_trace(subject, x)[0]
        leaf = x.clone().requires_grad_()
        log_probs = influence.checks.require_logits(subject.model(leaf)).double().log_softmax(1)
        (slope,) = torch.autograd.grad(log_probs.amax(), leaf)
        single = slope[0].double().square() / trace.clamp(min=torch.finfo(torch.float64).tiny)
        rows.append(
            {
                "example": example,
                "label_name": subject.class_name(int(chosen["label"])),
                "predicted_name": subject.class_name(int(chosen["predicted"])),
                "ceiling": float(_odds(log_probs.detach(), log_probs.argmax(1))),
                "pixels": picture(stored[0]),
                "trace": trace.sum(0).cpu().numpy(),
                "single": single.amax(0).cpu().numpy(),
                "patch": _patch_map(subject, x, size),
                "size": size,
            }
        )
    return pd.DataFrame(rows)


def _patch_map(subject: Subject, x: Tensor, size: int) -> np.ndarray | None:
    if subject.classes > MANY_CLASSES:
        return None
    _, channels, height, width = x.shape
    stride = 1
    while channels * -(-height // stride) * -(-width // stride) * subject.classes**2 > _PATCH_VALUES:
        stride += 1
    metric = influence.metric_tensor(subject.model, x, wrt=influence.Patches(size=size, stride=stride))
    fi = influence.first_order_influence(metric).fi[0]
    found: np.ndarray = fi.view(channels, -(-height // stride), -(-width // stride)).amax(0).cpu().numpy()
    return found


# -- what of it the loss does not say ---------------------------------------------------------------------------------


def beyond_the_loss(table: pd.DataFrame, *, count: int = 20) -> pd.DataFrame:
    """How each score ranks the training examples against their loss.

    Returns:
        One row per score: spearman (rank correlation with the loss), shared (of the `count` largest, how many are among
        those of the loss), mean_alignment (of FI; NaN for the others).
    """
    train = table[table["part"] == "train"]
    top = set(train.nlargest(count, "loss")["example"])
    rows = []
    for score in ("fi", "trace"):
        shared = len(top & set(train.nlargest(count, score)["example"]))
        mean = float(train["alignment"].mean()) if score == "fi" else float("nan")
        agreement = rank_agreement(train[score], train["loss"])
        rows.append({"score": score, "spearman": agreement, "shared": shared, "of": len(top), "mean_alignment": mean})
    return pd.DataFrame(rows)
