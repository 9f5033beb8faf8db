"""Simple random walks on a graph, and the entropy that no model of them can go below.

In: a `Graph`, how many walks, how long, a seed. Out: nodes int32 [walks, length]. Every walk begins at a node drawn
from the stationary distribution, so each of its positions is distributed alike.
"""

from __future__ import annotations

import numpy as np

from jax_extract.inputs.graphs import Graph


def random_walks(graph: Graph, walks: int, length: int, random: np.random.Generator) -> np.ndarray:
    """int32 [walks, length]: each next node is drawn from the neighbours of the one before, all alike."""
    nodes = np.empty((walks, length), np.int32)
    nodes[:, 0] = random.choice(graph.nodes, walks, p=graph.stationary)
    for at in range(1, length):
        here = nodes[:, at - 1]
        nodes[:, at] = graph.neighbours[graph.offsets[here] + random.integers(0, graph.degrees[here])]
    return nodes


def step_off_edges(graph: Graph, tokens: np.ndarray, lengths: np.ndarray) -> tuple[int, int] | None:
    """Row and column of the first node that is left for one that is not next to it; None where all keep to edges.

    Args:
      tokens: int32 [walks, t], of which the first `lengths` [walks] of each row are nodes.
    """
    starts = np.repeat(np.arange(graph.nodes), graph.degrees)
    steps = tokens[:, :-1].astype(np.int64) * graph.nodes + tokens[:, 1:]
    off = ~np.isin(steps, starts * graph.nodes + graph.neighbours)
    off &= np.arange(steps.shape[1])[None] < lengths[:, None] - 1
    found = np.argwhere(off)
    return (int(found[0, 0]), int(found[0, 1])) if len(found) else None


def transition_entropy(graph: Graph, tokens: np.ndarray, lengths: np.ndarray) -> float:
    """Nats a step of the very transitions in these walks: the mean of log(degree) over the nodes that are left.

    It is what a model that knows the graph loses on them; the entropy rate is its mean over all walks.

    Args:
      tokens: int32 [walks, t], of which the first `lengths` [walks] of each row are nodes.
    """
    left = np.arange(tokens.shape[1])[None] < lengths[:, None] - 1
    return float(np.log(graph.degrees)[tokens[left]].mean())


def bigram_entropy(nodes: int, tokens: np.ndarray, lengths: np.ndarray) -> float:
    """Nats a step, estimated from the transitions alone, where no graph is known; a little low for few walks.

    A model of walks whose steps depend on more than the node before can lose less.
    """
    left = np.arange(tokens.shape[1] - 1)[None] < lengths[:, None] - 1
    here = tokens[:, :-1][left]
    seen, counts = np.unique(here.astype(np.int64) * nodes + tokens[:, 1:][left], return_counts=True)
    of_node = np.bincount(here, minlength=nodes)[seen // nodes]
    return float(-(counts * np.log(counts / of_node)).sum() / counts.sum())
