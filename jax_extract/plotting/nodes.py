"""Picture: a map of nodes, from what a model makes of each, and whether near nodes of the graph lie near each other.

In: representations [nodes, width] of each layer, the graph where it is known. Out: a figure: a panel a layer with nodes
along its first two principal components, and the mean distance of two nodes by the edges between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from jax_extract.inputs.graphs import Graph
from jax_extract.plotting.components import Components
from jax_extract.plotting.style import DEPTH, INK, MARKERS, QUIET, depth_colours, grid, new_figure, styled

_MOST_EDGES, _MOST_NUMBERS = 4_000, 150  # more lines and words only cover each other
_COLUMNS = 3


@dataclass(frozen=True, eq=False)
class NodeMap:
    """Attributes:
    hook: point that the representations are of.
    components: of the nodes' representations, by layer.
    graph: what was walked on, where it is known.
    distances: by layer, edges between two nodes -> mean distance of their representations, as a share of the mean over
      every two nodes; empty where not known.
    """

    hook: str
    components: Mapping[str, Components]
    graph: Graph | None
    distances: Mapping[str, Mapping[int, float]]


def draw_nodes(nodes: NodeMap, caption: str) -> Figure:
    panels = len(nodes.components) + bool(nodes.distances)
    columns = min(_COLUMNS, panels)
    lines = -(-panels // columns)
    with styled():
        figure = new_figure(
            f"Map of nodes: principal components of {nodes.hook}",
            caption,
            3.2 * columns + 0.6,
            3.0 * lines + 1.0,
        )
        places = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes in places[panels:]:
            axes.set_visible(False)
        hops = None if nodes.graph is None else nodes.graph.hops_from(0)
        colour = "node number" if hops is None else "edges to node 0"
        points = None
        for axes, (name, components) in zip(places, nodes.components.items(), strict=False):
            points = _map(axes, components, nodes.graph, hops)
            axes.set_title(name)
        maps = places[: len(nodes.components)]
        if points is not None:
            figure.colorbar(points, ax=maps, label=colour, fraction=0.03, pad=0.02, location="bottom", aspect=40)
        if nodes.distances:
            _by_hops(places[len(nodes.components)], nodes.distances)
    return figure


def _map(axes: Axes, components: Components, graph: Graph | None, hops: np.ndarray | None) -> PathCollection:
    along = components.along
    if graph is not None and len(edges := graph.edges) <= _MOST_EDGES:
        axes.add_collection(
            LineCollection([along[list(edge)] for edge in edges], colors=QUIET, linewidths=0.35, alpha=0.5)
        )
    values = np.arange(len(along)) if hops is None else hops
    points = axes.scatter(*along.T, c=values, cmap=DEPTH, s=22, linewidths=0.4, edgecolors="white", zorder=2)
    if len(along) <= _MOST_NUMBERS:
        for node, (x, y) in enumerate(along):
            axes.annotate(str(node), (x, y), (2.2, 2.2), textcoords="offset points", fontsize=4.5, color=INK)
    axes.set_xlabel(f"PC 1 ({components.shares[0]:.1%} of variance)")
    axes.set_ylabel(f"PC 2 ({components.shares[1]:.1%})")
    axes.tick_params(labelsize=7)
    grid(axes)
    return points


def _by_hops(axes: Axes, distances: Mapping[str, Mapping[int, float]]) -> None:
    for number, ((name, by_hops), colour) in enumerate(
        zip(distances.items(), depth_colours(len(distances)), strict=True)
    ):
        hops = sorted(by_hops)
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(hops, [by_hops[n] for n in hops], color=colour, marker=marker, markersize=4, label=name)
    axes.set_xticks(sorted({n for by_hops in distances.values() for n in by_hops}))
    axes.axhline(1, color=QUIET, linestyle=":", linewidth=1)
    axes.set_title("do near nodes lie near?")
    axes.set_xlabel("edges between two nodes")
    axes.set_ylabel("mean distance, as a share of all pairs'")
    axes.legend(loc="lower right")
    grid(axes)
