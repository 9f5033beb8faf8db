"""Picture: how often the latents of SAEs are active.

In: SAEs as sae_evaluation.json has them. Out: a figure: for each SAE the histogram of its latents' densities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jax_extract.plotting.style import COLOURS, grid, new_figure, styled

_MOST = 8  # SAEs of a picture, spread over those that there are


def draw_density(saes: Sequence[Mapping[str, Any]], caption: str) -> Figure:
    chosen = [saes[i] for i in np.unique(np.linspace(0, len(saes) - 1, min(_MOST, len(saes))).round().astype(int))]
    with styled():
        figure = new_figure("How often latents are active", caption, 8.0, 4.2)
        axes = figure.subplots()
        for i, sae in enumerate(chosen):
            edges, counts = sae["density"]["log10_edges"], sae["density"]["latents"]
            colour = COLOURS[i % len(COLOURS)]
            label = f"{sae['name']} ({sae['dead']:.1%} never)"
            axes.stairs(counts, edges, color=colour, linewidth=1.4, label=label)
        axes.set_xlabel("share of rows in which a latent is active")
        ticks = range(-6, 1)
        axes.set_xticks(list(ticks), labels=[_share(tick) for tick in ticks])
        axes.set_ylabel("latents")
        axes.set_ylim(bottom=0)
        grid(axes)
        figure.legend(loc="outside lower center", frameon=False, fontsize=7, ncols=1)
    return figure


def _share(exponent: int) -> str:
    """`1 %`, `0.01 %`."""
    return f"{10.0 ** (exponent + 2):.4f}".rstrip("0").rstrip(".") + " %"
