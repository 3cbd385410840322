"""One look for every figure: sizes, fonts, and one colour for each method wherever it appears."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

WIDTH = 7.2  # inches: a text page
# Okabe and Ito (2008): told apart by colour-blind readers.
COLOURS: dict[str, str] = {
    "exact": "#0072B2",
    "released": "#D55E00",
    "ceiling": "#000000",
    "control": "#999999",
    "augmentation": "#009E73",
}
# One for each stability arm: the alphas from the smallest, then the variants.
STABILITY = ("#56B4E9", "#0072B2", "#CC79A7", "#D55E00", "#E69F00")
# Scores of an example, in the order of `imagewise.NAMES`: colour and line.
SCORES: dict[str, tuple[str, str]] = {
    "exact": ("#0072B2", "-"),
    "released_1e-8": ("#D55E00", "--"),
    "released_1e-3": ("#D55E00", "-"),
    "loss": ("#000000", ":"),
    "jacobian_norm": ("#009E73", "-"),
    "cook": ("#CC79A7", "--"),
    "el2n": ("#E69F00", "--"),
    "grand": ("#009E73", "--"),
    "margin": ("#E69F00", ":"),
    "max_softmax": ("#999999", "-"),
    "trace": ("#56B4E9", "-"),
    "lambda_max": ("#CC79A7", ":"),
    "released": ("#D55E00", "-"),
    "saliency": ("#009E73", "-"),
    "random": ("#999999", ":"),
}
# Rankings of single weights or pixels: name, colour and line.
RANKINGS: dict[str, tuple[str, str, str]] = {
    "exact": ("FI", *SCORES["exact"]),
    "saliency": ("gradient", *SCORES["saliency"]),
    "snip": ("SNIP: |weight × gradient|", "#E69F00", "-"),
    "trace": ("trace", *SCORES["trace"]),
    "fisher": ("weight² × trace", "#CC79A7", "-"),
    "size": ("size", "#000000", "--"),
    "random": ("at random", *SCORES["random"]),
}
NAMES = {
    "resnet50": "ResNet50",
    "densenet121": "DenseNet121",
    "digits": "Digits",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "exact": "exact FI",
    "released": "released FI",
    "released_1e-8": r"released FI, $e = 10^{-8}$",
    "released_1e-3": r"released FI, $e = 10^{-3}$",
    "loss": "loss",
    "jacobian_norm": "Jacobian norm",
    "cook": "Cook's local influence",
    "confident": "confident learning",
    "el2n": "EL2N",
    "aum": "AUM (in training)",
    "early_el2n": "early EL2N (in training)",
    "grand": "GraNd",
    "margin": "margin",
    "max_softmax": "1 - max softmax",
    "trace": "trace of G",
    "lambda_max": r"$\lambda_{max}$(G)",
    "saliency": "gradient saliency",
    "random": "at random",
    "resnet20": "ResNet-20 (He)",
    "resnet56": "ResNet-56 (He)",
    "noisy-resnet20": "ResNet-20, trained on such labels",
    "group-resnet32": "group's ResNet-32",
    "group-resnet32-cifar10": "group's ResNet-32",
    "group-resnet32-mnist": "group's ResNet-32",
    "densenet-bc-40-12": "DenseNet-BC-40-12",
    "inception": "small Inception",
    "aggre_label": "CIFAR-10N aggregate",
    "worse_label": "CIFAR-10N worst",
    "flipped": "synthetic flips",
}


def apply() -> None:
    """Set the look for all figures of this process."""
    sns.set_theme(context="paper", style="ticks", font="DejaVu Sans")
    mpl.rcParams.update(
        {
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "pdf.fonttype": 42,
        }
    )
    from IPython import get_ipython

    # A notebook shows a Figure that ends a cell as a PNG; IPython does so by itself for pyplot's only.
    if (shell := get_ipython()) is not None:
        shell.display_formatter.formatters["image/png"].for_type(Figure, small_png)


_drawn: WeakKeyDictionary[Figure, bytes] = WeakKeyDictionary()


def png(figure: Figure) -> bytes:
    """A figure as a PNG, drawn once for notebook and results as long as nothing of it changes."""
    if figure.stale or figure not in _drawn:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        _drawn[figure] = buffer.getvalue()
        figure.stale = False  # until something of it changes
    return _drawn[figure]


def small_png(figure: Figure) -> bytes:
    """The same in 64 colours: a third of the bytes, so that notebooks with their outputs stay small."""
    small = io.BytesIO()
    Image.open(io.BytesIO(png(figure))).convert("RGB").quantize(64).save(small, format="png", optimize=True)
    return small.getvalue()


def pdf(figure: Figure) -> bytes:
    """A figure as a PDF without dates, in the layout of its PNG."""
    png(figure)
    engine, buffer = figure.get_layout_engine(), io.BytesIO()
    figure.set_layout_engine("none")
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    figure.set_layout_engine(engine)
    figure.stale = False  # nothing but the format was another
    return buffer.getvalue()


def subplots(
    rows: int = 1, columns: int = 1, *, height: float, width: float = 1.0, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, as pyplot makes them, which would keep the figure; inches high, text pages wide."""
    figure = Figure(figsize=(WIDTH * width, height))
    return figure, figure.subplots(rows, columns, **options)


def class_colours(n_classes: int) -> list[tuple[float, float, float]]:
    """One colour for each class of a Manhattan plot."""
    return list(sns.color_palette("tab10" if n_classes <= 10 else "husl", n_classes))


def dots(
    axes: Axes,
    x: pd.Series,
    y: pd.Series,
    label: ArrayLike,
    colours: Sequence[tuple[float, float, float]],
    *,
    size: float,
) -> None:
    """Points (x, y) in the colour of their class, as pixels; five times as fast as `scatter`, which draws each anew.

    All are (N,); `label` is a place in `colours`, `size` a diameter in points.
    """
    for place, colour in enumerate(colours):
        mine = np.asarray(label) == place
        axes.plot(x[mine], y[mine], "o", color=colour, markersize=size, markeredgewidth=0, rasterized=True)


def error_bars(frame: pd.DataFrame, name: str, ends: str | None = None) -> np.ndarray:
    """How far the interval of a column reaches below and above it, (2, N); `ends` as in `detection.columns`."""
    ends = f"{name}_" if ends is None else ends
    return np.clip([frame[name] - frame[f"{ends}low"], frame[f"{ends}high"] - frame[name]], 0, None)


def picture(axes: Axes, pixels: np.ndarray, title: str = "", *, largest: float = 255) -> None:
    """An image (H, W, C) without ticks, grey where it has one channel."""
    axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=largest)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=7)


def by_share(axes: Axes, table: pd.DataFrame, name: str, ends: str | None = None, *, apart: float, middle: int) -> None:
    """A column (%) against the share taken away (%), a line for each ranking, with its intervals where they are finite.

    So that the bars of one share can be told apart, places beside that of the ranking `middle` are moved by a factor.
    """
    for place, (ranking, line) in enumerate(table.groupby("ranking", sort=False)):
        label, colour, dashes = RANKINGS[str(ranking)]
        x, bars = 100 * line["share"] * apart ** (place - middle), 100 * error_bars(line, name, ends)
        look: Any = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 2.5, "elinewidth": 0.8}
        axes.errorbar(
            x, 100 * line[name], bars if np.isfinite(bars).all() else None, label=label, linewidth=1.2, **look
        )
    shares = sorted(100 * table["share"].unique())
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()


def first_seed(frame: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """What a figure of single networks shows: data set and model, as readers know them, with the rows of one seed."""
    groups = frame[frame["seed"] == frame["seed"].min()].groupby(["dataset", "model"], sort=False)
    return [(name(dataset), name(model), group) for (dataset, model), group in groups]


def network(key: str) -> str:
    """How readers know a network of the zoo, "family-model-dataset", or one that others trained."""
    family, _, rest = key.partition("-")
    if key.startswith("paper-resnet50-cifar10"):  # by SGD, not as the paper trained it
        family = "no augmentation"
    if rest.startswith(("resnet", "densenet121", "inception")) and family != "group":
        return f"{name(rest.partition('-')[0]).removesuffix(' (He)')}, {family}"
    return name(key)


def name(key: object) -> str:
    """How readers know a model, a data set or a method."""
    return NAMES.get(str(key), str(key))


apply()
