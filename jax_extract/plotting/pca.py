"""Picture: rows along the first two principal components of each layer, coloured by token, position or a field.

In: `Components` of each layer, a `Colouring` of the rows. Out: a figure, a panel a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_extract.plotting.colouring import Colouring
from jax_extract.plotting.components import Components
from jax_extract.plotting.config import TOKEN
from jax_extract.plotting.style import (
    COLOURS,
    DEPTH,
    MARKERS,
    OTHERS,
    QUIET,
    grid,
    label_text,
    new_figure,
    styled,
    token_text,
)

_MOST_POINTS = 3_000  # of a panel; more only cover each other
_COLUMNS = 3


def draw_pca(
    found: Mapping[str, Components], colouring: Colouring | None, hook: str, caption: str, seed: int = 0
) -> Figure:
    """`found` by what the layer is called."""
    columns = 2 if len(found) == 4 else min(_COLUMNS, len(found))  # noqa: PLR2004 (two and two)
    lines = -(-len(found) // columns)
    rows = len(next(iter(found.values())).along)
    drawn = np.sort(np.random.default_rng(seed).permutation(rows)[:_MOST_POINTS])
    by = "" if colouring is None else f", coloured by {colouring.name}"
    with styled():
        figure = new_figure(f"Principal components of {hook}{by}", caption, 2.9 * columns + 1.3, 2.75 * lines + 1.0)
        panels = figure.subplots(lines, columns, squeeze=False)
        for axes in panels.flat[len(found) :]:
            axes.set_visible(False)
        points: Any = None
        for axes, (layer, components) in zip(panels.flat, found.items(), strict=False):
            points = _panel(axes, components, colouring, drawn)
            axes.set_title(f"layer {layer}" if layer.isdigit() else layer)
        if colouring is not None and colouring.groups:
            handles, names = panels.flat[0].get_legend_handles_labels()
            order = slice(None, None, -1)  # the most frequent group first
            figure.legend(
                handles[order], names[order], loc="outside right center", title=colouring.name, markerscale=1.6
            )
        elif colouring is not None:
            figure.colorbar(points, ax=list(panels.flat), label=colouring.name, fraction=0.04, pad=0.02)
    return figure


def _panel(axes: Axes, components: Components, colouring: Colouring | None, drawn: np.ndarray) -> Any:
    along = components.along[drawn]
    look: dict[str, Any] = {"s": 9, "linewidths": 0, "rasterized": True}
    points = None
    if colouring is None:
        axes.scatter(*along.T, color=COLOURS[0], **look)
    elif colouring.groups:
        group_of = colouring.group_of[drawn]
        text = token_text if colouring.name == TOKEN else label_text
        if (colouring.group_of < 0).any():
            axes.scatter(*along[group_of < 0].T, color=OTHERS, **{**look, "s": 4}, label="others")
        for number in reversed(range(len(colouring.groups))):  # rare ones lie below no frequent one
            there = along[group_of == number]
            label = text(colouring.groups[number])
            axes.scatter(*there.T, color=COLOURS[number], marker=MARKERS[number], **look, label=label)
    else:
        values = colouring.values[drawn]
        ends = {"vmin": np.nanmin(colouring.values), "vmax": np.nanmax(colouring.values)}
        points = axes.scatter(*along.T, c=values, cmap=DEPTH, **ends, **look)
    shares = [*components.shares[:2], 0.0, 0.0]
    axes.set_xlabel(f"PC 1 ({shares[0]:.1%} of variance)")
    axes.set_ylabel(f"PC 2 ({shares[1]:.1%})")
    axes.tick_params(labelcolor=QUIET, labelsize=7)
    grid(axes)
    return points
