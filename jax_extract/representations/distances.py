"""Whether representations have the shape of the graph: how far apart those of nodes are, by their distance in it.

In: float [nodes, width] representations, the graph. Out: mean Euclidean distance of the pairs that are 1, 2, 3, … edges
apart, and how much nearer neighbours are than any two nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jax_extract.inputs.graphs import Graph

MOST_NODES = 2_000  # every pair is compared


@dataclass(frozen=True)
class GraphDistances:
    """Attributes:
    by_hops: edges between two nodes -> mean distance of their representations.
    all_pairs: mean over every two nodes.
    """

    by_hops: Mapping[int, float]
    all_pairs: float

    @property
    def neighbours(self) -> float:
        """Of neighbours, as a share of the mean over all pairs: 1 where the graph does not show."""
        return self.by_hops[1] / self.all_pairs if self.all_pairs else 1.0

    def as_json(self) -> dict[str, object]:
        return {
            "mean_distance_by_hops": {str(hops): distance for hops, distance in self.by_hops.items()},
            "mean_distance_all_pairs": self.all_pairs,
            "neighbours_over_all_pairs": self.neighbours,
        }


def graph_distances(representations: np.ndarray, hops: np.ndarray) -> GraphDistances | None:
    """Euclidean, float64; nodes whose row is not finite (they never occurred) are left out.

    None where no two neighbours are left.

    Args:
      representations: [nodes, width].
      hops: int32 [nodes, nodes], as `Graph.hops` gives them.
    """
    rows = representations.astype(np.float64)
    squares = (rows * rows).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0))
    pairs = np.triu(np.isfinite(distances), 1)
    by_hops = {int(n): float(distances[pairs & (hops == n)].mean()) for n in np.unique(hops[pairs])}
    if 1 not in by_hops:
        return None
    return GraphDistances(by_hops, float(distances[pairs].mean()))


def measurable(graph: Graph) -> bool:
    return graph.nodes <= MOST_NODES
