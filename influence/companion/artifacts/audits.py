"""How examples of each artifact's published tables are computed anew, on the published networks alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from torch import nn

from ..images import outliers
from ..images.data import Split
from ..ledger import paths
from ..ledger.audit import Audit
from ..ledger.results import Run
from ..scores import imagewise, pixelwise
from ..scores.layerwise import score_layers
from ..zoo import finetuning, pretrained, published, recipes, training
from .beyond import table_one_metric, table_stability_family
from .bridge import fig_trace
from .common import Network, Subject, classifier, dataset, groups, named
from .sensitivity import fig_label_noise, fig_vulnerable_areas
from .sensitivity.common import ceiling_check
from .sensitivity.fig_layers import by_definition
from .sensitivity.fig_outlier_ranking import called, score_images
from .sensitivity.fig_what_fi_measures import EPSILON, unit_factors
from .sensitivity.table_accuracy import quality
from .stability import comparison, fig_alpha_sigma, fig_generalisation, table_certified


def _require(recipe: recipes.Recipe) -> None:
    """Refuse a network that would have to be trained, by a TrainingError."""
    row = published.ledger().get(recipe.name)
    if row is None or not row["published"] or row["key"] != training.identity(recipe, recipe.dataset()):
        raise training.TrainingError(f"the network {recipe.name} is not published")


def _places(split: Split, images: ArrayLike) -> list[int]:
    return np.flatnonzero(np.isin(split.index.numpy(), images)).tolist()


def _having(split: Split, images: ArrayLike) -> Split:
    return split.take(_places(split, images))


def _named(run: Run, name: str) -> Network:
    """The network of `common.named`, which is not trained for it."""
    if name not in pretrained.NAMES:
        _require(recipes.named(name))
    return named(run, name)


def _each(
    run: Run, examples: pd.DataFrame, score: Callable[[Subject, Split], pd.DataFrame], *, part: str = "train"
) -> pd.DataFrame:
    """What `score` makes of each network and its images (of a part, else of this one) that examples name."""
    frames = []
    names = [name for name in ("dataset", "model", "seed", "part") if name in examples]
    for about, group in groups(examples, *names):
        data, model, seed = about["dataset"], about["model"], int(about["seed"])
        if f"{model}-{data}" not in pretrained.NAMES:
            _require(recipes.recipe(run.profile, data, model, seed=seed))
        subject = Subject(classifier(run, data, model, seed=seed), dataset(run, data), model, seed)
        split = _having(getattr(subject.dataset, about.get("part", part)), group["image"])
        frames.append(score(subject, split).assign(**about))
    return pd.concat(frames)


def _anew(
    score: Callable[..., pd.DataFrame], run: Run, examples: pd.DataFrame, *, epsilon: float | None = None
) -> pd.DataFrame:
    """Scores of the examples, by their network."""
    options = {"epsilon": run.parameters["epsilon"] if epsilon is None else epsilon, "device": run.device}
    return _each(run, examples, lambda subject, split: score(subject.trained.model, split, **options))


def _rankings(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frame = _anew(score_images, run, examples)
    answers = {
        name: called(dataset(run, name), run.parameters["labels"]).nunique(axis=1) for name in set(frame["dataset"])
    }
    return frame.assign(answers=[answers[name][i] for name, i in zip(frame["dataset"], frame["image"], strict=True)])


_both_parts = partial(_anew, imagewise.predicted_class_scores)
_layers = partial(_anew, score_layers)


def _definitions(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    # Those that were published, among which the examples are.
    return _each(run, examples, lambda subject, _: ceiling_check(subject, device=run.device))


def _all_parameters(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frame = _layers(run, examples)
    return frame[frame["number"] == 0]


def _definitions_of_layers(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    return _each(run, examples, lambda subject, _: by_definition(subject, images=2, layers=6, device=run.device))


def _suspicion(run: Run, model: nn.Module, split: Split) -> pd.DataFrame:
    return imagewise.all_scores(model, split, device=run.device, without=run.parameters["without"])


def _mislabelled(run: Run, name: str, images: pd.Series) -> tuple[nn.Module, Split, np.ndarray]:
    """A published network that learnt labels of CIFAR-10N, held-out images with theirs, and whether these are wrong."""
    recipe = recipes.named(name)
    verified = outliers.human_labels(str(recipe.labels), paths.data_dir())[1]
    _require(recipe)
    found = recipe.dataset()
    split = _having(found.valid, images)
    return training.fit(recipe, found, device=run.device).model, split, (split.labels != verified[split.index]).numpy()


def _wrong_labels(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frames = []
    for of, group in groups(examples.assign(fold=examples["image"] % 4), "kind", "fold"):
        name = f"{fig_label_noise.noisy(of['kind'])}-{of['fold']}-0"
        model, split, wrong = _mislabelled(run, name, group["image"])
        frames.append(_suspicion(run, model, split).assign(kind=of["kind"], model="noisy-resnet20", wrong=wrong))
    return pd.concat(frames)


def _before_fine_tuning(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    examples = examples.assign(dataset=run.parameters["dataset"])
    found = _each(run, examples, lambda subject, split: _suspicion(run, subject.trained.model, split))
    return found.assign(state="before", outlier=False)


def _accuracies(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frames = []
    for about, _ in groups(examples, "network", "dataset", "seed", "part"):
        name, part = about["network"], about["part"]
        network = _named(run, name if name in pretrained.NAMES else f"{name}-{about['seed']}")
        split = network.parts[part]
        sample = split if part == "test" else split.sample(run.parameters["images"] or None)
        frame = quality(network.model, sample, run.device)
        frames.append(frame.assign(gate=network.gate.get(part, float("nan")), **about))
    return pd.concat(frames)


def _one_network(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    """Examples of an artifact with one network, with the columns that name it."""
    p = run.parameters
    return examples.assign(dataset=p["dataset"], model=p["model"], seed=p["seeds"][0])


def _units(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    def scores(subject: Subject, split: Split) -> pd.DataFrame:
        factors, epsilons = unit_factors(subject.dataset.train), run.parameters["epsilons"]
        return imagewise.unit_scores(subject.trained.model, split, factors, epsilons, run.device)

    return _each(run, _one_network(run, examples), scores)


def _definition_of_one(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    return _definitions(run, _one_network(run, examples))


def _shown(run: Run, subject: Subject) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The images that Setup 4 shows of a network, and the scores of their patches."""
    shown = fig_vulnerable_areas.chosen_images(run, subject, images=run.parameters["images"] or None)
    split = subject.dataset.test.take(shown["row"].tolist())
    frame = pixelwise.patch_maps(subject.trained.model, split, run.parameters["epsilon"], run.device)
    return shown, fig_vulnerable_areas.of_kinds(frame, shown)


def _maps(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    return _each(run, examples.assign(image=-1), lambda subject, _: _shown(run, subject)[1])


def _pictures(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    def pictures(subject: Subject, _: Split) -> pd.DataFrame:
        return fig_vulnerable_areas.pictures(run, subject, *_shown(run, subject))

    return _each(run, examples.assign(image=-1), pictures)


def _changes(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    p = run.parameters

    def changed(subject: Subject, split: Split) -> pd.DataFrame:
        whole = subject.dataset.test.sample(p["changed"], seed=subject.seed)
        options: dict[str, Any] = {name: p[name] for name in ("counts", "epsilon")}
        options |= {"patch": fig_vulnerable_areas.PATCH, "seed": subject.seed, "only": _places(whole, split.index)}
        return pixelwise.intervene(subject.trained.model, whole, device=run.device, **options)

    return _each(run, examples, changed, part="test")


def _runs(
    run: Run, examples: pd.DataFrame, *, arms: Callable[[dict[str, Any]], dict[str, Any]] = comparison.standard
) -> pd.DataFrame:
    """Rows of a table of `comparison.measure` for these arms, of one data set and part or of several."""
    chosen, frames = arms(run.parameters), []
    one = {"dataset": run.parameters.get("dataset"), "part": "test"}
    examples = examples.assign(**{name: value for name, value in one.items() if name not in examples})
    for where, group in examples.groupby(list(one), sort=False):
        name, part = map(str, where)
        rows = comparison.measured_again(run, name, chosen, group, part=part)
        frames.append(rows.assign(dataset=name, part=part))
    return pd.concat(frames)


def _traces(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    """Rows of images of the arms of fig_trace, or of its other networks."""
    p = run.parameters
    split = dataset(run, p["dataset"]).test.sample(p["images"])

    def rows(network: Network | training.Trained, seed: int, group: pd.DataFrame) -> pd.DataFrame:
        places = _places(split, group["image"])
        return fig_trace.measures_of(network.model, split, p["sigmas"], p["draws"], run.device, seed, only=places)

    if "network" not in examples:
        return comparison.again(run, p["dataset"], comparison.standard(p), examples, rows)
    frames = []
    for name, group in examples.groupby("network", sort=False):
        found = _named(run, str(name))
        frames.append(rows(found, found.seed, group).assign(network=name))
    return pd.concat(frames)


def _flips(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frames = []
    for name, group in examples.groupby("network", sort=False):
        of, _, arm = str(name).partition("+")
        network = _named(run, of)
        if arm:
            recipe = recipes.named(of)
            if not finetuning.is_published(recipe, table_stability_family.arms(run.parameters)[arm], recipe.dataset()):
                raise training.TrainingError(f"the network {name} is not published")
            network = table_one_metric.network(run, str(name))
        split = _having(network.parts["test"], group["image"])
        frames.append(_one_metric(run, network.model, split).assign(network=name, kind=network.family))
    return pd.concat(frames)


def _wrong_by_one_metric(run: Run, examples: pd.DataFrame) -> pd.DataFrame:
    frames = []
    for name, group in examples.groupby("network", sort=False):
        model, split, wrong = _mislabelled(run, str(name), group["image"])
        about = {"network": name, "kind": str(name).rpartition("-")[0]}
        frames.append(_one_metric(run, model, split).assign(wrong=wrong, **about))
    return pd.concat(frames)


def _one_metric(run: Run, model: nn.Module, split: Split) -> pd.DataFrame:
    return table_one_metric.scores(model, split, radius=run.parameters["radii"][0], device=run.device)


_IMAGE = ("dataset", "model", "seed", "image")
_JUMPS = ("exact", "rank", "released", "kept", "departs")
# Where a network is sure, released FI is the squared component of a unit vector, which rounding moves by 1e-8 of its
# length: a component of 2e-5 was seen to move by 2e-9, its square by 6e-14.
_RELEASED = ("released_1e-8", "released_1e-3")
_SMALL = dict.fromkeys(("released", *_RELEASED), 1e-12)
_FI = partial(Audit, jumps=_JUMPS, atol=_SMALL)
_SUSPICION = partial(Audit, jumps=(*_JUMPS, *_RELEASED), atol=_SMALL)
_SETUP3 = {"scores": _FI((*_IMAGE, "part"), _both_parts, others=("position",))}
# Of ten thousand images one may change sides.
_RUNS = {name: 1.1e-4 for name in ("precision_at_1", "precision_at_5")}
_CELL = ("seed", "arm", "distortion")
AUDITS: dict[str, dict[str, Audit]] = {
    "sensitivity/fig_outlier_ranking": {
        "scores": _FI(_IMAGE, _rankings, others=("position",)),
        "check": Audit(_IMAGE, _definitions),
    },
    "sensitivity/fig_train_vs_test": _SETUP3,
    "sensitivity/table_train_vs_test": _SETUP3,
    "sensitivity/fig_label_noise": {
        "scores": _SUSPICION(("kind", "image"), _wrong_labels, others=("confident", "aum", "early_el2n"))
    },
    "sensitivity/fig_layers": {
        "whole": _FI(_IMAGE, _all_parameters, others=("position",)),
        "definition": Audit(_IMAGE, _definitions_of_layers, within=("layer",)),
        "released": _FI(_IMAGE, _layers, within=("number", "layer")),
    },
    # Before fine-tuning, which is of published networks alone, on images that are not made.
    "sensitivity/fig_outlier_simulation": {
        "scores": _SUSPICION(
            ("seed", "model", "state", "outlier", "image"),
            _before_fine_tuning,
            where="state == 'before' and not outlier",
            others=("weight",),
        )
    },
    "sensitivity/fig_vulnerable_areas": {
        "maps": Audit(
            ("dataset", "model", "seed", "kind"),
            _maps,
            within=("size", "channel", "row", "column"),
            jumps=("exact", "released", "alignment", "rank"),
            atol=_SMALL,
        ),
        "pictures": Audit(("dataset", "model", "seed", "kind"), _pictures),
        # Probabilities of float32 outputs; what a change moves is their difference.
        "changes": Audit(
            _IMAGE,
            _changes,
            within=("ranking", "target", "count", "change"),
            jumps=("p_after", "drop", "flipped"),
            atol=dict.fromkeys(("p_before", "p_after", "drop"), 1e-5),
        ),
    },
    "sensitivity/fig_what_fi_measures": {
        "scores": Audit(
            ("image",), _units, within=("unit", "score", "epsilon"), jumps=("value", "rank"), atol={"value": 1e-12}
        ),
        "definition": Audit(("image",), _definition_of_one),
        "labels": _SUSPICION(("kind", "image"), _wrong_labels, others=("confident",)),
        "parts": replace(_SETUP3["scores"], again=partial(_both_parts, epsilon=EPSILON)),
    },
    "stability/fig_jpeg_quality": {"runs": Audit(_CELL, _runs, atol=_RUNS)},
    "stability/fig_generalisation": {"runs": Audit(_CELL, partial(_runs, arms=fig_generalisation.arms), atol=_RUNS)},
    "stability/table_classification": {"runs": Audit(("dataset", *_CELL), _runs, atol=_RUNS)},
    # Last layers are trained for it, and not published.
    "stability/fig_alpha_sigma": {
        "runs": Audit(
            ("part", *_CELL),
            partial(_runs, arms=fig_alpha_sigma.of_all_layers),
            where="arm.str.startswith('all ')",
            atol=_RUNS,
        )
    },
    # Accuracies of a hundred and of a thousand images, of which one may change sides.
    "stability/table_certified": {
        "certificates": Audit(
            ("seed", "arm"),
            partial(table_certified.again, table="certificates"),
            within=("image",),
            jumps=("abstained",),
            atol={"radius": 0.01},
        ),
        "attacks": Audit(
            ("seed", "arm", "attack", "epsilon"),
            partial(table_certified.again, table="attacks"),
            within=("image",),
            jumps=("right",),
        ),
    },
    # In float64, with the noise of all images.
    "bridge/fig_trace": {
        "measures": Audit(("seed", "arm", "image"), _traces, within=("sigma",)),
        "networks": Audit(("network", "image"), _traces, within=("sigma",)),
    },
    # The noise and the starts of PGD are drawn for all images at once.
    "beyond/table_one_metric": {
        "flips": Audit(
            ("network", "image"),
            _flips,
            others=("noise", "PGD 0.5/255", "PGD 2/255"),
            jumps=("exact", "worst_direction"),
        ),
        "labels": Audit(("network", "image"), _wrong_by_one_metric, jumps=("exact", "worst_direction")),
    },
    "beyond/table_stability_family": {
        "images": Audit(
            ("seed", "arm", "kind", "measure"), table_stability_family.again, within=("image",), jumps=("value",)
        ),
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
    "stability": "its embeddings are trained for it, and not published",
    "beyond": "its other tables are aggregates over changed networks, changed images or retrained layers",
}
