"""Picture: what SAEs of a sweep explain, against how many latents they need for it, with their baselines.

In: `Point`s. Out: a figure: those that no other SAE beats are joined by a line; baselines are hollow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jax_extract.plotting.style import COLOURS, INK, QUIET, grid, log_axis, new_figure, styled
from jax_extract.sae.evaluation.pareto import front

_MARKERS = {None: "o", "frozen_decoder": "s", "frozen_random": "^"}
_MEANT = {None: "trained", "frozen_decoder": "random decoder, frozen", "frozen_random": "random directions, frozen"}


@dataclass(frozen=True)
class Point:
    """Attributes:
    group: what has a colour of its own.
    interval: of the explained variance; None where it is not known.
    """

    group: str
    baseline: str | None
    l0: float
    explained_variance: float
    interval: tuple[float, float] | None


def draw_pareto(points: Sequence[Point], caption: str) -> Figure:
    groups = list(dict.fromkeys(point.group for point in points))
    with styled():
        figure = new_figure("Explained variance against active latents", caption, 8.0, 4.6)
        axes = figure.subplots()
        for point in points:
            colour = COLOURS[groups.index(point.group) % len(COLOURS)]
            below = None
            if point.interval is not None:
                low, high = point.interval
                below = [[point.explained_variance - low], [high - point.explained_variance]]
            axes.errorbar(
                *([point.l0], [point.explained_variance]),
                yerr=below,
                color=colour,
                marker=_MARKERS.get(point.baseline, "x"),
                markersize=6,
                markerfacecolor=colour if point.baseline is None else "none",
                linewidth=1,
                zorder=3,
            )
        trained = [point for point in points if point.baseline is None]
        line = [trained[i] for i in front([(point.l0, point.explained_variance) for point in trained])]
        axes.plot(
            [point.l0 for point in line],
            [point.explained_variance for point in line],
            color=INK,
            linewidth=0.9,
            linestyle=(0, (4, 2)),
            zorder=2,
        )
        log_axis(axes, "x", [point.l0 for point in points], 1.3)
        axes.set_xlabel("active latents of a row, on average (L0, log scale)")
        axes.set_ylabel("explained variance")
        grid(axes)
        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", linestyle="", label=group)
            for i, group in enumerate(groups)
        ]
        kinds = [kind for kind in _MARKERS if any(point.baseline == kind for point in points)]
        handles += [
            Line2D(
                *([], []),
                color=QUIET,
                marker=_MARKERS[kind],
                linestyle="",
                markerfacecolor=QUIET if kind is None else "none",
                label=_MEANT[kind],
            )
            for kind in kinds
        ]
        if len(line) > 1:
            handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (4, 2)), label="Pareto front"))
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
