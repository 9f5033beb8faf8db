"""Picture: how long rows are, by layer and position, the first token apart.

In: norms [layers, rows] with their positions. Out: `Norms`, and a figure: a heat map over layers and positions, and
lines over layers. The first token is an attention sink, hundreds of times longer than the others, so that it would take
all of a colour scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from jax_extract.plotting.style import (
    COLOURS,
    DEPTH,
    INK,
    depth_colours,
    grid,
    log_axis,
    new_figure,
    number_text,
    styled,
)

_MOST_BINS = 48  # of positions
_FEW_LAYERS = 3  # and fewer are lines, not a map


@dataclass(frozen=True, eq=False)
class Norms:
    """Attributes:
    layers: what the rows below are called.
    edges: int64 [bins + 1]: bin b is positions edges[b] to edges[b + 1] - 1; the first token is in none.
    by_position: float64 [layers, bins], the median norm; NaN where there is no row.
    first: float64 [layers], the median norm of rows at position 0; NaN where there are none.
    others: float64 [layers, 3], of all other rows: p1, median and p99.
    mean: float64 [layers], the mean norm of all rows.
    """

    layers: tuple[str, ...]
    edges: np.ndarray
    by_position: np.ndarray
    first: np.ndarray
    others: np.ndarray
    mean: np.ndarray

    @property
    def by_positions(self) -> bool:
        """Whether there are several bins."""
        return len(self.edges) > 2  # noqa: PLR2004 (ends of one)

    @classmethod
    def of(
        cls,
        layers: Sequence[str],
        norms: np.ndarray,
        positions: np.ndarray,
        mean: Sequence[float],
        one_a_sample: bool = False,
    ) -> Norms:
        """From norms [layers, rows], NaN for rows that are not finite, and the mean of all rows, those not read too.

        Args:
          one_a_sample: every sample has one row, so that another position is another sample: there are no bins.
        """
        others = positions > 0
        last = 0 if one_a_sample else int(positions.max(initial=0))
        edges = np.unique(np.linspace(1, last + 1, min(_MOST_BINS, last) + 1).round().astype(np.int64))
        bins = np.digitize(positions, edges) - 1
        by_position = [_quantiles(norms[:, others & (bins == b)], [0.5])[:, 0] for b in range(len(edges) - 1)]
        beside = norms[:, others] if others.any() else norms[:, positions != 0]
        return cls(
            tuple(layers),
            edges,
            np.array(by_position).reshape(len(edges) - 1, len(layers)).T,
            _quantiles(norms[:, positions == 0], [0.5])[:, 0],
            _quantiles(beside, [0.01, 0.5, 0.99]),
            np.asarray(mean, np.float64),
        )


def _quantiles(norms: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """float64 [layers, shares] over the rows of each layer; NaN where none is finite."""
    finite = [row[np.isfinite(row)] for row in norms]
    return np.array([np.quantile(row, shares) if len(row) else np.full(len(shares), np.nan) for row in finite])


def draw_norms(norms: Norms, hook: str, caption: str) -> Figure:
    """Without bins there is no map, with one layer nothing over layers; with neither there is nothing to see."""
    one = len(norms.layers) == 1
    axes_are = [name for name, there in (("layer", not one), ("position", norms.by_positions)) if there]
    with styled():
        figure = new_figure(f"Norms of {hook} by {' and '.join(axes_are)}", caption, 4.8 * len(axes_are), 4.3)
        if not norms.by_positions:
            _over_layers(figure.add_subplot(), norms)
        elif one:
            _over_positions(figure.add_subplot(), norms)
        else:
            left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
            if len(norms.layers) < _FEW_LAYERS:
                _over_positions(left, norms)
            else:
                _map(figure, left, norms)
            _over_layers(right, norms)
    return figure


def _map(figure: Figure, axes: Axes, norms: Norms) -> None:
    rows = np.arange(len(norms.layers) + 1) - 0.5
    scale = LogNorm(float(np.nanmin(norms.by_position)), float(np.nanmax(norms.by_position)))
    mesh = axes.pcolormesh(norms.edges, rows, norms.by_position, norm=scale, cmap=DEPTH, rasterized=True)
    axes.set_title("median norm by position, from position 1 on")
    axes.set_xlabel("position in the sample (tokens)")
    _layer_ticks(axes.yaxis, norms.layers)
    axes.set_ylabel("layer")
    bar = figure.colorbar(mesh, ax=axes, label="median Euclidean norm (log scale)", fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _over_positions(axes: Axes, norms: Norms) -> None:
    middle = (norms.edges[:-1] + norms.edges[1:] - 1) / 2
    colours = depth_colours(_FEW_LAYERS)
    for layer, line, first, colour in zip(norms.layers, norms.by_position, norms.first, colours, strict=False):
        name = f"layer {layer}" if layer.isdigit() else layer
        axes.plot(middle, line, color=colour, label=name)
        if np.isfinite(first):
            axes.plot([0], [first], color=colour, marker="s", linestyle="", label=f"{name}, first token (position 0)")
    log_axis(axes, "y", np.concatenate([norms.by_position.ravel(), norms.first]), 1.3)
    axes.set_title("median norm by position")
    axes.set_xlabel("position in the sample (tokens)")
    axes.set_ylabel("Euclidean norm (log scale)")
    axes.legend()
    grid(axes)


def _over_layers(axes: Axes, norms: Norms) -> None:
    x = np.arange(len(norms.layers))
    low, middle, high = norms.others.T
    apart = bool(np.isfinite(norms.first).any())
    others = "all other tokens" if apart else "all rows"
    if apart:
        axes.plot(x, norms.first, color=COLOURS[1], marker="s", markersize=4, label="first token (position 0), median")
    axes.plot(
        x, norms.mean, color=INK, linestyle=(0, (4, 2)), label="mean of all rows" + ", the first tokens too" * apart
    )
    axes.plot(x, middle, color=COLOURS[0], marker="o", markersize=3.5, label=f"{others}, median")
    axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label=f"{others}, p1 to p99")
    log_axis(axes, "y", np.concatenate([norms.first, norms.mean, norms.others.ravel()]), 1.3)
    axes.set_title("norm by layer")
    _layer_ticks(axes.xaxis, norms.layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("Euclidean norm (log scale)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=7.5, columnspacing=1.2)
    grid(axes)


def _layer_ticks(axis: Any, layers: Sequence[str]) -> None:
    """Places 0, 1, … are called by their layers."""
    axis.set_major_locator(MaxNLocator(min(10, len(layers)), integer=True))
    axis.set_major_formatter(
        FuncFormatter(lambda at, _: layers[int(at)] if at == int(at) and 0 <= at < len(layers) else "")
    )
