"""Figures as files: drawn once as long as nothing of them changes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from influence.companion import style


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [1, 0], label="line")
    return figure


def test_a_figure_is_drawn_once(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    first, small, paper = style.png(figure), style.small_png(figure), style.pdf(figure)
    assert first.startswith(b"\x89PNG") and paper.startswith(b"%PDF") and len(small) < len(first)
    monkeypatch.setattr(Figure, "draw", lambda *args: pytest.fail("drawn again"))
    assert style.png(figure) == first and style.small_png(figure) == small


@pytest.mark.parametrize(
    "change",
    [
        lambda axes: axes.set_title("title"),
        lambda axes: axes.lines[0].set_color("red"),
        lambda axes: axes.lines[0].set_data([0, 1], [0, 1]),
        lambda axes: axes.legend(),
        lambda axes: axes.figure.suptitle("title"),
        lambda axes: axes.set_yscale("symlog"),
        lambda axes: axes.figure.set_size_inches(4, 3),
        lambda axes: axes.remove(),
    ],
)
@pytest.mark.parametrize("after", [style.png, style.pdf])
def test_a_figure_that_has_changed_is_drawn_anew(figure, change, after) -> None:
    first = style.png(figure)
    after(figure)
    change(figure.axes[0])
    assert style.png(figure) != first


def test_the_same_bytes_from_a_figure_made_again_and_saved_before_it_is_shown() -> None:
    def made() -> Figure:
        figure = Figure(figsize=(4, 3))
        axes = figure.subplots(1, 2)
        figure.colorbar(axes[0].imshow(np.eye(3)), label="value")
        return figure

    one, other = made(), made()
    shown, paper = style.small_png(one), style.pdf(one)
    assert style.pdf(other) == paper and style.small_png(other) == shown


def test_dots_lie_where_a_scatter_has_them() -> None:
    import pandas as pd

    x, y, label = pd.Series([0.1, 0.5, 0.9]), pd.Series([1.0, 2.0, 3.0]), pd.Series([0, 2, 0])
    axes = Figure().subplots()
    style.dots(axes, x, y, label, style.class_colours(3), size=2)
    drawn = [(line.get_color(), *zip(*line.get_data(), strict=True)) for line in axes.lines]
    colours = style.class_colours(3)
    assert drawn == [(colours[0], (0.1, 1.0), (0.9, 3.0)), (colours[1],), (colours[2], (0.5, 2.0))]
