"""How examples of each artifact's published tables are computed anew, on the published networks alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

import influence

from ..images import outliers
from ..images.data import Split
from ..ledger import paths
from ..ledger.audit import Audit
from ..ledger.results import Run
from ..scores import imagewise
from ..scores.layerwise import score_layers, with_all
from ..zoo import pretrained, published, recipes, training
from .beyond import table_stability_family
from .common import Subject, classifier, dataset, named, networks
from .sensitivity.common import ceiling_check
from .sensitivity.fig_layers import by_definition
from .sensitivity.fig_outlier_ranking import score_images
from .sensitivity.table_accuracy import quality
from .stability import table_certified


def _require(recipe: recipes.Recipe) -> None:
    """Refuse a network that would have to be trained, by a TrainingError."""
    row = published.ledger().get(recipe.name)
    if row is None or not row["published"] or row["key"] != training.identity(recipe, recipe.dataset()):
        raise training.TrainingError(f"the network {recipe.name} is not published")


def _having(split: Split, images: pd.Series) -> Split:
    return split.take(np.flatnonzero(np.isin(split.index.numpy(), images)))


def _by_network(run: Run, examples: pd.DataFrame) -> Iterator[tuple[Subject, Split, dict[str, Any]]]:
    """For each network (and part) that examples name: the network, their images, the columns that name it."""
    names = [name for name in ("dataset", "model", "seed", "part") if name in examples]
    for _, group in examples.groupby(names, sort=False):
        about = {name: group[name].iloc[0] for name in names}
        data, model, seed = about["dataset"], about["model"], int(about["seed"])
        if f"{model}-{data}" not in pretrained.NAMES:
            _require(recipes.recipe(run.profile, data, model, seed=seed))
        subject = Subject(classifier(run, data, model, seed=seed), dataset(run, data), model, seed)
        yield subject, _having(getattr(subject.dataset, about.get("part", "train")), group["image"]), about


def _near_cut(metric: influence.MetricTensor, labels: Tensor | None, epsilons: Sequence[float]) -> np.ndarray:
    """Whether rounding may decide FI, exact or released with one of these e, for each example and block, (N * B,)."""
    near = influence.first_order_influence(metric, labels).near_cut
    for epsilon in epsilons:
        released = influence.first_order_influence(metric, labels, estimator=influence.Released(epsilon=epsilon))
        near = near | released.near_cut
    return near.flatten().cpu().numpy()


def _of_image(run: Run, model: nn.Module, split: Split) -> influence.MetricTensor:
    return influence.metric_tensor(model, training.pixels(split.images, run.device), wrt="input")


def _of_layers(run: Run, model: nn.Module, split: Split) -> influence.MetricTensor:
    return with_all(influence.metric_tensor(model, training.pixels(split.images, run.device), wrt="layers"))


def _anew(
    score: Callable[..., pd.DataFrame],
    run: Run,
    examples: pd.DataFrame,
    *,
    of: Callable[[Run, nn.Module, Split], influence.MetricTensor] = _of_image,
    predicted: bool = False,
) -> pd.DataFrame:
    """Scores of the examples, for their labels or the predicted classes, and what rounding may decide of them."""
    frames, epsilon = [], run.parameters["epsilon"]
    for subject, split, about in _by_network(run, examples):
        model = subject.trained.model
        frame = score(model, split, epsilon=epsilon, device=run.device)
        near = _near_cut(of(run, model, split), None if predicted else split.labels.to(run.device), [epsilon])
        frames.append(frame.assign(near_cut=near, **about))
    return pd.concat(frames)


_rankings = partial(_anew, score_images)
_both_parts = partial(_anew, imagewise.predicted_class_scores, predicted=True)
_layers = partial(_anew, score_layers, of=_of_layers)


def _definitions(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    # Those that were published, among which the examples are.
    return pd.concat(
        ceiling_check(subject, device=run.device).assign(seed=subject.seed)
        for subject, _, _ in _by_network(run, examples)
    )


def _all_parameters(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frame = _layers(run, examples)
    return frame[frame["number"] == 0]


def _definitions_of_layers(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    list(_by_network(run, examples))  # refuses a network that is not published
    subject = next(networks(run))
    return by_definition(subject, images=2, layers=6, device=run.device).assign(**subject.columns)


def _wrong_labels(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frames = []
    for kind, of_kind in examples.groupby("kind"):
        verified = outliers.human_labels(str(kind), paths.data_dir())[1]
        for fold, group in of_kind.groupby(of_kind["image"] % 4):
            recipe = recipes.named(f"noisy-{str(kind).removesuffix('_label')}-{fold}-0")
            _require(recipe)
            model = training.fit(recipe, recipe.dataset(), device=run.device).model
            split = _having(recipe.dataset().valid, group["image"])
            frame = imagewise.all_scores(model, split, device=run.device, without=run.parameters["without"])
            near = _near_cut(_of_image(run, model, split), split.labels.to(run.device), [1e-8, 1e-3])
            wrong = (split.labels != verified[split.index]).numpy()
            frames.append(frame.assign(kind=kind, model="noisy-resnet20", wrong=wrong, near_cut=near))
    return pd.concat(frames)


def _accuracies(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frames = []
    for row in examples.to_dict("records"):
        about = {str(column): value for column, value in row.items()}
        name = str(about["network"])
        if name not in pretrained.NAMES:
            name = f"{name}-{about['seed']}"
            _require(recipes.named(name))
        network, part = named(run, name), str(about["part"])
        split = network.parts[part]
        sample = split if part == "test" else split.sample(run.parameters["images"] or None)
        frame = quality(network.model, sample, run.device)
        frames.append(frame.assign(gate=network.gate.get(part, float("nan")), **about))
    return pd.concat(frames)


_IMAGE = ("dataset", "model", "seed", "image")
_JUMPS = ("exact", "rank", "released", "kept", "departs")
# Where a network is sure, released FI is the squared component of a unit vector, which rounding moves by 1e-8 of its
# length: a component of 2e-5 was seen to move by 2e-9, its square by 6e-14.
_SMALL = {name: 1e-12 for name in ("released", "released_1e-8", "released_1e-3")}
_SETUP3 = {"scores": Audit((*_IMAGE, "part"), _both_parts, others=("position",), jumps=_JUMPS, atol=_SMALL)}
AUDITS: dict[str, dict[str, Audit]] = {
    "sensitivity/fig_outlier_ranking": {
        "scores": Audit(_IMAGE, _rankings, others=("position",), jumps=_JUMPS, atol=_SMALL),
        "check": Audit(_IMAGE, _definitions),
    },
    "sensitivity/fig_train_vs_test": _SETUP3,
    "sensitivity/table_train_vs_test": _SETUP3,
    "sensitivity/fig_label_noise": {
        "scores": Audit(
            ("kind", "image"),
            _wrong_labels,
            others=("confident", "aum", "early_el2n"),
            jumps=(*_JUMPS, "released_1e-8", "released_1e-3"),
            atol=_SMALL,
        )
    },
    "sensitivity/fig_layers": {
        "whole": Audit(_IMAGE, _all_parameters, others=("position",), jumps=_JUMPS, atol=_SMALL),
        "definition": Audit(_IMAGE, _definitions_of_layers, within=("layer",)),
        "released": Audit(_IMAGE, _layers, within=("number", "layer"), jumps=_JUMPS, atol=_SMALL),
    },
    # Accuracies of a hundred and of a thousand images, of which one may change sides.
    "stability/table_certified": {
        "attacks": Audit(("seed", "arm", "attack", "epsilon"), table_certified.attacked_again, atol={"accuracy": 0.011})
    },
    "beyond/table_stability_family": {
        "precision": Audit(("seed", "arm", "kind", "measure"), table_stability_family.again, atol={"value": 1.1e-3}),
        "outputs": Audit(("seed", "arm", "measure"), table_stability_family.again),
    },
    # An example is a network with a part of the images, of a thousand of which one may change sides.
    "sensitivity/table_accuracy": {
        "networks": Audit(
            ("network", "dataset", "seed", "part"), _accuracies, atol={"accuracy": 1e-3, "calibration_error": 1e-3}
        )
    },
}
# By stem or folder.
NOT_AUDITED = {
    "00_overview": "its table is an aggregate",
    "sensitivity/fig_outlier_simulation": "its networks are fine-tuned for it, and not published",
    "stability": "its networks are fine-tuned for it, and not published",
    "bridge": "its networks are fine-tuned for it, and its noise is drawn for all images at once",
    "beyond": "its other tables are aggregates over changed networks, changed images or retrained layers",
}
