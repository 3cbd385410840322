"""One look for every figure: sizes, fonts, and one colour for each method wherever it appears."""

from __future__ import annotations

import matplotlib as mpl
import seaborn as sns

WIDTH = 7.2  # inches: a text page
# Okabe and Ito (2008): told apart by colour-blind readers.
COLOURS: dict[str, str] = {
    "exact": "#0072B2",
    "released": "#D55E00",
    "ceiling": "#000000",
    "resnet50": "#0072B2",
    "densenet121": "#E69F00",
    "control": "#999999",
    "augmentation": "#009E73",
}
# One for each stability arm: the alphas from the smallest, then the variants.
STABILITY = ("#56B4E9", "#0072B2", "#CC79A7", "#D55E00", "#E69F00")
NAMES = {
    "resnet50": "ResNet50",
    "densenet121": "DenseNet121",
    "digits": "Digits",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "exact": "exact FI",
    "released": "released FI",
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
    _show_figures()


def _show_figures() -> None:
    """Have a notebook show a figure as a picture: one that was made without pyplot is else only named."""
    from IPython.core.getipython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    shell = get_ipython()
    if shell is not None:
        select_figure_formats(shell, {"png"}, bbox_inches=None)


def class_colours(n_classes: int) -> list[tuple[float, float, float]]:
    """One colour for each class of a Manhattan plot."""
    return list(sns.color_palette("tab10" if n_classes <= 10 else "husl", n_classes))


def name(key: object) -> str:
    """How readers know a model, a data set or a method."""
    return NAMES.get(str(key), str(key))
