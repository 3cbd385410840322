"""Metric tensor, influence measure and stability training of deep classifiers.

Sensitivity (Shu & Zhu 2019, arXiv 1901.07152): ``metric_tensor`` then ``first_order_influence``. Influence is that of a
small perturbation of an input or of parameters on one prediction; it is not the influence of a training example on a
model, which the influence functions of Koh & Liang (2017) estimate. How far a perturbation moves the output: ``trace``,
``worst_direction``.
Stability (Zheng et al. 2016, arXiv 1604.04326): ``stability_loss``, ``embedding_stability_loss``, ``triplet_loss``,
``gaussian_perturbation`` and, for a training loop, ``StabilityObjective``.
"""

from influence.areas import patch_influence
from influence.measures import Exact, Influence, Regularised, Released, first_order_influence
from influence.metric import MetricTensor, metric_tensor
from influence.pixels import Patches
from influence.scoring import refine, score
from influence.sensitivity import trace, worst_direction
from influence.shards import read_scores
from influence.stability import (
    StabilityObjective,
    embedding_stability_loss,
    gaussian_perturbation,
    stability_loss,
    triplet_loss,
)
from influence.weights import WeightInfluence, weight_influence

__all__ = [  # noqa: RUF022 (grouped by purpose)
    # the metric tensor
    "MetricTensor",
    "Patches",
    "metric_tensor",
    "trace",
    "worst_direction",
    # the influence measure and its estimators
    "Exact",
    "Influence",
    "Regularised",
    "Released",
    "first_order_influence",
    "WeightInfluence",
    "patch_influence",
    "weight_influence",
    # whole data sets
    "read_scores",
    "refine",
    "score",
    # stability training
    "StabilityObjective",
    "embedding_stability_loss",
    "gaussian_perturbation",
    "stability_loss",
    "triplet_loss",
]
