"""Picture: how many directions the rows of each layer take, from the variance along their principal components.

In: `Components` of each layer. Out: a figure: the share of the variance that the first components hold together, and
how many hold half, nine tenths and almost all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jax_extract.plotting.components import Components
from jax_extract.plotting.style import COLOURS, MARKERS, depth_bar, depth_colours, grid, log_axis, new_figure, styled

_HELD = (0.99, 0.9, 0.5)


def draw_spectrum(found: Mapping[str, Components], hook: str, caption: str) -> Figure:
    """`found` by what the layer is called."""
    layers = list(found)
    with styled():
        figure = new_figure(f"Variance spectrum of {hook}", caption, 9.6, 4.1)
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        for components, colour in zip(found.values(), depth_colours(len(layers)), strict=True):
            together = np.cumsum(components.shares)
            left.plot(np.arange(1, len(together) + 1), together, color=colour, linewidth=1.4)
        log_axis(left, "x", [1, *(len(components.shares) for components in found.values())], 1.02)
        left.set_ylim(0, 1.02)
        left.yaxis.set_major_formatter(PercentFormatter(1))
        left.set_title("explained by the first components")
        left.set_xlabel("principal components (log scale)")
        left.set_ylabel("explained variance (%)")
        grid(left)
        if len(layers) > 1:
            depth_bar(figure, left, layers)
        for share, colour, marker in zip(_HELD, COLOURS, MARKERS, strict=False):
            needed = [components.needed_for(share) for components in found.values()]
            right.plot(range(len(layers)), needed, color=colour, marker=marker, markersize=4.5, label=f"{share:.0%}")
        log_axis(right, "y", [1, *(components.needed_for(max(_HELD)) for components in found.values())])
        right.set_xticks(range(len(layers)), layers)
        right.set_title("components that hold a share of the variance")
        right.set_xlabel("layer")
        right.set_ylabel("principal components (log scale)")
        right.legend(title="explained", title_fontsize=8)
        grid(right)
    return figure
