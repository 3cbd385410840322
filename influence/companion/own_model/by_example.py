"""Which examples are suspicious, and whether training and test examples differ, on a model and data of one's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import influence
from influence.last_layer import head
from influence.measures import log_ceiling

from ..scores.detection import spearman
from .material import Examples
from .study import Subject, estimated_trace, log_probs_of, picture

# How FI is found. Beyond 64 classes a sample decides which of the last two may stand in for the first.
METRIC, CLOSED_FORM, FEATURES = "metric tensor", "closed form", "features"
_SAMPLE = 2
_SAME = 1e-2  # relative difference of FI of the features and of the input that counts as none
# Entries of the Jacobians of one part, beyond 64 classes: some thousand backward passes for photographs.
_MOST_IN_JACOBIANS = 2**30
_FEWEST = 4
_FEATURES_AT_ONCE = 1  # a Gram of 1,000 classes has 8 MB: one stays in the cache, several do not


def scores(subject: Subject, *, images: int, seed: int = 0) -> pd.DataFrame:
    """Influence of the whole input and what it competes with, for a sample of each part of the data.

    Beyond 64 classes FI takes its closed form where the rank is full, and is FI of the last layer's inputs where that
    is the same; both are decided on a sample. Where neither holds, a backward pass for each class and example could
    take hours: so many examples are left out that the rest takes a bounded time.

    Returns:
        One row for each part ("train" and "test", or "all") and example (its number there, as given): label, predicted,
        p_label, loss (nats), fi and ceiling (f = -log P_label), fi_predicted (f = -log P_predicted), alignment, rank,
        trace of the metric tensor (per squared unit of the data), estimated (whether the trace is), way (how FI was
        found), asked (examples of this part that were to be scored).
    """
    way = _way(subject, subject.material.train)
    frames = []
    for part, examples in subject.material.parts.items():
        count = asked = images if 0 < images < len(examples) else len(examples)
        if subject.many_classes and way == METRIC:  # what takes a bounded time
            jacobian = (subject.classes - 1) * examples[0][0].numel()
            count = min(asked, max(_FEWEST, _MOST_IN_JACOBIANS // jacobian))
        chosen = examples.sample(count, seed=seed)
        frame = _score_part(subject, chosen, way).assign(way=way, asked=asked)
        frame.insert(0, "example", list(chosen.numbers))
        frame.insert(0, "part", part)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _way(subject: Subject, examples: Examples) -> str:
    """How FI is to be found, by what holds for a sample of the examples."""
    rows = np.linspace(0, len(examples) - 1, min(_SAMPLE, len(examples))).round()
    x = examples.batch(rows)[0].to(subject.device)
    if not subject.many_classes or not x.is_floating_point():
        return METRIC
    metric = influence.metric_tensor(subject.model, x, chunk_size=1)
    predicted = metric.log_probs.argmax(1)
    whole = influence.first_order_influence(metric, predicted)
    if bool((whole.rank == subject.classes - 1).all()):
        return CLOSED_FORM
    found = head(subject.model, x)
    if found is None:
        return METRIC
    features = influence.first_order_influence(influence.metric_tensor(*found), predicted)
    same = torch.isclose(whole.fi, features.fi, rtol=_SAME, atol=0) & (whole.rank == features.rank)
    return FEATURES if bool(same.all()) else METRIC


def _score_part(subject: Subject, examples: Examples, way: str) -> pd.DataFrame:
    score = {METRIC: _from_metric, CLOSED_FORM: _in_closed_form, FEATURES: _from_features}[way]
    return pd.concat([score(subject, x, labels) for x, labels in subject.batches(examples)], ignore_index=True)


def _from_metric(subject: Subject, x: Tensor, labels: Tensor) -> pd.DataFrame:
    # Token numbers cannot be moved a little; the parameters that they meet can.
    wrt = "input" if x.is_floating_point() else "parameters"
    metric = influence.metric_tensor(subject.model, x, wrt=wrt)
    return _rows(metric.log_probs, labels, _influence(metric, labels), metric.trace()[:, 0], estimated=False)


def _from_features(subject: Subject, x: Tensor, labels: Tensor) -> pd.DataFrame:
    found = head(subject.model, x)
    assert found is not None  # it was there for the sample
    layer, features = found
    frames = []
    trace = estimated_trace(subject, x, wrt="input")[:, 0]
    for part in torch.arange(len(x), device=x.device).split(_FEATURES_AT_ONCE):
        metric = influence.metric_tensor(layer, features[part])
        values = _influence(metric, labels[part])
        frames.append(_rows(metric.log_probs, labels[part], values, trace[part], estimated=True))
    return pd.concat(frames, ignore_index=True)


def _influence(metric: influence.MetricTensor, labels: Tensor) -> dict[str, Tensor]:
    result = influence.first_order_influence(metric, labels)
    predicted = result.fi[:, 0].clone()
    seen = metric.log_probs.argmax(1)
    other = labels != seen
    if bool(other.any()):
        part = replace(metric, log_probs=metric.log_probs[other], gram=metric.gram[other])
        predicted[other] = influence.first_order_influence(part, seen[other]).fi[:, 0]
    return {
        "fi": result.fi[:, 0],
        "fi_predicted": predicted,
        "alignment": result.alignment[:, 0],
        "rank": result.rank[:, 0],
    }


def _in_closed_form(subject: Subject, x: Tensor, labels: Tensor) -> pd.DataFrame:
    with torch.no_grad():
        log_probs = log_probs_of(subject, x)
    values = {
        "fi": log_ceiling(log_probs, labels).exp(),
        "fi_predicted": log_ceiling(log_probs, log_probs.argmax(1)).exp(),
        "alignment": torch.ones(len(x)),
        "rank": torch.full((len(x),), subject.classes - 1),
    }
    return _rows(log_probs, labels, values, estimated_trace(subject, x, wrt="input")[:, 0], estimated=True)


def _rows(
    log_probs: Tensor, labels: Tensor, values: dict[str, Tensor], trace: Tensor, *, estimated: bool
) -> pd.DataFrame:
    log_p = log_probs.gather(1, labels[:, None])[:, 0]
    columns = {
        "label": labels,
        "predicted": log_probs.argmax(1),
        "p_label": log_p.exp(),
        "loss": -log_p,
        "ceiling": log_ceiling(log_probs, labels).exp(),
        **values,
        "trace": trace,
    }
    return pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()}).assign(estimated=estimated)


def suspicious(subject: Subject, table: pd.DataFrame, *, count: int = 20) -> pd.DataFrame:
    """The `count` examples of largest FI of the first part, with the names of their classes and, of images, pixels."""
    top = first_part(table).nlargest(count, "fi").reset_index(drop=True)
    for column in ("label", "predicted"):
        top[f"{column}_name"] = [subject.class_name(int(k)) for k in top[column]]
    if subject.image:
        top["pixels"] = pd.Series([picture(subject.material.train.read(int(i))) for i in top["example"]], dtype=object)
    return top


def first_part(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the training examples, or all where the data have no parts."""
    return table[table["part"] != "test"]


def train_against_test(table: pd.DataFrame, *, seed: int = 0, repeats: int = 300) -> pd.DataFrame:
    """How well FI of the predicted class, and the trace, tell the parts apart.

    Returns:
        One row per score: train and test (how many), auroc of test against training examples with its 95% bootstrap
        interval low and high. Empty where the data have no parts.
    """
    if table["part"].nunique() == 1:
        return pd.DataFrame()
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
        low, high = np.quantile(draws, [0.025, 0.975])
        row = {"score": score, "train": int((~test).sum()), "test": int(test.sum())}
        rows.append(row | {"auroc": roc_auc_score(test, values), "low": low, "high": high})
    return pd.DataFrame(rows)


def beyond_the_loss(table: pd.DataFrame, *, count: int = 20) -> pd.DataFrame:
    """How each score ranks the examples of the first part against their loss.

    Returns:
        One row per score: spearman (rank correlation with the loss), shared (of the `count` largest, or of the larger
        half, how many are among those of the loss), of (how many these are), mean_alignment (of FI; NaN for the
        others).
    """
    train = first_part(table)
    # All of a small sample would be shared by any two scores.
    count = min(count, max(1, len(train) // 2))
    top = set(train.nlargest(count, "loss")["example"])
    rows = []
    for score in ("fi", "trace"):
        shared = len(top & set(train.nlargest(count, score)["example"]))
        mean = float(train["alignment"].mean()) if score == "fi" else float("nan")
        order = float(spearman(train[score], train["loss"]))
        rows.append({"score": score, "spearman": order, "shared": shared, "of": len(top), "mean_alignment": mean})
    return pd.DataFrame(rows)
