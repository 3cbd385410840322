"""What was found on a model and data of the reader's own, in words that are made from the tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from .. import style
from .by_example import CLOSED_FORM, FEATURES, METRIC, first_part
from .by_weight import JUDGED, PLACED
from .study import DRAWS, Subject


def in_words(subject: Subject, *, scores: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> str:
    """One Markdown item for each task; every number in it comes from the tables.

    These are "beyond" of `by_example.beyond_the_loss`, "layers" of `by_layer.layers`, "parts" of
    `by_example.train_against_test`, "maps" of `maps.maps`, "curves" of `robustness.robustness`, "weights" and "places"
    of `by_weight.weights`.
    """
    kind = "examples" if subject.material.test is None else "test examples"
    lines = [*_warnings(subject, scores), *_suspicious(subject, scores, tables["beyond"])]
    lines.append(_layers(tables["layers"], kind))
    lines.append(_weights(subject, tables["weights"], tables["places"]))
    lines += [_parts(row) for row in tables["parts"].to_dict("records")]
    if subject.material.test is None:
        lines.append(
            "**Train against test** is left out: the data have no parts. Give them as two, one that the model was "
            "trained on and one that it was not, to compare these."
        )
    if len(tables["maps"]):
        lines.append(_areas(tables["maps"], kind.replace("examples", "images")))
    if len(tables["curves"]):
        lines.append(_curves(tables["curves"], held_out=subject.material.test is None))
    elif subject.image:
        lines.append(
            "**Robustness** is left out: the distortions need bytes, or floats in [0, 1] before normalisation."
        )
    return "\n".join(f"* {line}" for line in lines)


def _warnings(subject: Subject, scores: pd.DataFrame) -> list[str]:
    """What a reader has to know before the findings."""
    lines = []
    named = len(subject.material.classes)
    if named < subject.classes:
        numbered = subject.material.classes == tuple(map(str, range(named)))
        given = f"The largest label is {named - 1:,}" if numbered else f"The data name {named:,} classes"
        lines.append(
            f"**Labels.** {given}, the model has K = {subject.classes:,} outputs: label k is "
            "taken for output k. Where the model counts its classes otherwise, every score of a label below is "
            "meaningless; relabel the data by a function of yours."
        )
    way = scores["way"].iloc[0]
    if way == METRIC and subject.many_classes:
        done, asked = len(scores), int(scores.groupby("part")["asked"].first().sum())
        text = f"**What FI cost.** Each of the {done} examples took up to {subject.classes - 1:,} backward passes"
        if done < asked:
            text += f", so only so many of the {asked} asked for were scored, drawn at random; the others are left out"
        lines.append(f"{text}. `influence score` has no such bound.")
    elif way != METRIC:
        found = {
            FEATURES: " and a rank below K - 1, FI of the input is taken to be FI of what the last layer sees: no "
            "backward pass through the network. A sample agreed.",
            CLOSED_FORM: ", FI takes its closed form from the loss: a sample had full rank.",
        }[way]
        lines.append(f"**How FI was found.** With K = {subject.classes:,} classes{found}")
    if scores["estimated"].any():
        bound = (2 / DRAWS) ** 0.5
        lines[-1] += (
            f" The trace of an example is an estimate, the mean over {DRAWS} random sums of the classes with random "
            f"signs, with a relative standard deviation of at most {bound:.0%}: part of what parts it from the loss "
            "below is that."
        )
    return lines


def _suspicious(subject: Subject, scores: pd.DataFrame, beyond: pd.DataFrame) -> list[str]:
    searched = first_part(scores)
    kind = "examples" if subject.material.test is None else "training examples"
    by_score: dict[str, Any] = {row["score"]: row for row in beyond.to_dict("records")}
    fi, trace = by_score["fi"], by_score["trace"]
    wrong = int((searched["label"] != searched["predicted"]).sum())
    full = float((scores["rank"] == subject.classes - 1).mean())
    verdict = "something that the loss does not"
    if fi["shared"] == fi["of"]:
        verdict = "nothing that the loss does not"
        if fi["mean_alignment"] <= 0.999:
            verdict = "in its size, not in whom it suspects, something that the loss does not"
    close = "close to" if trace["spearman"] > 0.95 else "not"
    return [
        f"**Suspicious examples.** Of {len(searched)} {kind} scored, {wrong} are not predicted as labelled. The metric "
        f"tensor has full rank K - 1 = {subject.classes - 1} for {full:.0%} of all examples (median rank "
        f"{scores['rank'].median():.0f}), and the mean alignment (FI / ceiling) is {fi['mean_alignment']:.3g}. Of the "
        f"{fi['of']} examples of largest FI, {fi['shared']} are among those of largest loss (rank correlation "
        f"{fi['spearman']:.3f}): here FI says {verdict}.",
        f"**The trace**, how far a unit of noise moves the output, has a rank correlation of {trace['spearman']:.3f} "
        f"with the loss and shares {trace['shared']} of its {trace['of']} largest examples: it is {close} what the "
        "loss says.",
    ]


def _layers(layers: pd.DataFrame, kind: str) -> str:
    first = layers.nlargest(3, "divergence").to_dict("records")
    named = ", ".join(f"`{row['layer']}` ({row['kind']}, {row['share']:.0%})" for row in first)
    examples, samples = int(layers["examples"].iloc[0]), int(layers["samples"].iloc[0])
    text = (
        f"**Sensitive layers.** Of {len(layers)} layers with parameters, noise of 1% of a layer's own size moves the "
        f"output most in {named} (share of the sum over layers; {examples} {kind})."
    )
    if examples > 1:
        text += f" Over these, the shares named have standard errors of up to {max(row['error'] for row in first):.1%}."
    if samples:
        text += (
            f" The trace of each is an estimate from {samples} random sums of the classes, with a relative standard "
            f"deviation of at most {(2 / samples) ** 0.5:.0%}."
        )
    if layers["alignment"].notna().all():
        full = int((layers["alignment"] > 1 - 1e-6).sum())
        text += f" FI is at its ceiling for {full} of the {len(layers)}"
        text += ", so it cannot rank them." if full == len(layers) else "."
    return text


def _weights(subject: Subject, weights: pd.DataFrame, places: pd.DataFrame) -> str:
    if not len(weights):
        return "**Single weights** are left out: the model has no parameter of two or more dimensions."
    about = weights.to_dict("records")[0]
    judged = {row["ranking"]: row for row in weights[weights["share"] == JUDGED].to_dict("records")}
    whole = subject.material.test is None
    ranked = f"{about['examples']} {'' if whole else 'training '}examples"
    if about["examples"] < about["asked"]:
        ranked += f" (of {about['asked']} asked for: the time is bounded)"
    if about["samples"]:
        ranked += (
            f", {about['samples']} random sums of the classes for each, so that trace and FI are estimates (what FI, a "
            "ratio, puts first is in part chance)"
        )
    costs = [f"{_percent(row['accuracy'])} by {style.RANKINGS[name][0]}" for name, row in judged.items()]
    worst = style.RANKINGS[max(judged, key=lambda name: judged[name]["loss"])][0]
    fi, chance = judged["exact"], judged["random"]
    verdict = "cannot be told from those at random: the intervals overlap"
    if fi["high"] < chance["low"]:
        verdict = "cost more than those at random"
    elif fi["low"] > chance["high"]:
        verdict = "cost less than those at random"
    top = places.nlargest(1, "first").to_dict("records")[0]
    share, of_all = top["first"] / places["first"].sum(), top["weights"] / about["total"]
    listed = ", ".join(costs).replace("by at random", "at random")
    tested = f"{about['n']} {'examples, among them those' if whole else 'test examples'}"
    return (
        f"**Single weights.** {about['total']:,} weights in {len(places)} layers were ranked from {ranked}. Setting "
        f"the first {JUDGED:.0%} ({fi['weights']:,}) to 0 takes the accuracy from {_percent(about['accuracy'])} to "
        f"{listed} ({tested}; one network, 95% Wilson intervals in the figure). The loss is largest by {worst}; the "
        f"first by FI {verdict}. Of the first {JUDGED:.0%} by {style.RANKINGS[PLACED][0]}, {_percent(share)} lie in "
        f"`{top['layer']}` ({top['kind']}), which has {_percent(of_all)} of all weights."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _parts(row: dict[Any, Any]) -> str:
    what = {"fi_predicted": "FI of the predicted class", "trace": "the trace"}[row["score"]]
    side = "larger on test examples" if row["low"] > 0.5 else "not told apart"
    if row["high"] < 0.5:
        side = "smaller on test examples"
    return (
        f"**Train against test**, by {what}: {side} (AUROC {row['auroc']:.3f}, 95% bootstrap interval {row['low']:.3f} "
        f"to {row['high']:.3f}; {row['train']} against {row['test']} examples, one model)."
    )


def _areas(areas: pd.DataFrame, kind: str) -> str:
    rows, size = areas.to_dict("records"), int(areas["size"].iloc[0])
    single = np.array([row["single"].max() / row["ceiling"] for row in rows])
    reached = float(np.mean(np.concatenate([(row["patch"] / row["ceiling"]).ravel() for row in rows]) > 0.99))
    flat = "a flat map, which says what the loss says" if reached > 0.9 else "a map that says more than the loss"
    return (
        f"**Vulnerable areas.** On the {len(rows)} least sure {kind}, the best single value reaches "
        f"{single.min():.0%} to {single.max():.0%} of the ceiling; {reached:.0%} of all {size} x {size} patches reach "
        f"99% of it: {flat}."
    )


def _curves(curves: pd.DataFrame, *, held_out: bool) -> str:
    base = curves[curves["arm"] == "as it is"]
    drops = {}
    for family, group in base.groupby("family", sort=False):
        clean = float(group.loc[group["strength"] == 0, "accuracy"].iloc[0])
        drops[str(family).split(":")[0].replace("100 - ", "")] = clean - float(group["accuracy"].iloc[-1])
    worst = max(drops, key=lambda name: drops[name])
    change = "no distortion lowers it"
    if drops[worst] > 0:
        change = f"it falls most under {worst} (by {100 * drops[worst]:.1f} points)"
    text = (
        f"**Robustness.** Accuracy on originals is {100 * float(base['accuracy'].iloc[0]):.1f}%; at the strongest "
        f"setting {change}; {int(base['n'].iloc[0])} images."
    )
    tuned = [arm for arm in curves["arm"].unique() if arm not in ("as it is", "continued")]
    if tuned:
        wide = curves.pivot_table(index=["family", "strength"], columns="arm", values="accuracy")
        gain = (wide[tuned[0]] - wide["continued"])[wide.index.get_level_values("strength") > 0]
        text += (
            f" The stability loss changes accuracy on distorted images by {100 * gain.mean():+.1f} points on average "
            f"over {len(gain)} settings against the same steps without it (n = 1: one run, no interval)."
        )
        if held_out:
            text += " These images were held out of the steps, not of what the model was trained on before."
    return text
