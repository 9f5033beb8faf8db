"""Graphs to walk on: regular ones, random ones from a seed, and what is known of a simple random walk on each.

In: a kind of graph, its size, a seed. Out: `Graph`: undirected, connected, without loops or double edges, from which
come the stationary distribution of a walk, its entropy rate and the distance of any two nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_extract.errors import UserError

_SWAPS_AN_EDGE = 10  # double edge swaps that make a regular graph random
_DRAWS = 100  # of a random graph, until one is connected

Edges = set[tuple[int, int]]  # the smaller node first


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes 0 to n - 1; those next to node i are neighbours[offsets[i] : offsets[i + 1]], ascending.

    Attributes:
      name: what it is, for people.
      offsets: int64 [nodes + 1].
      neighbours: int32 [2 * edges].
    """

    name: str
    offsets: np.ndarray
    neighbours: np.ndarray

    @classmethod
    def of(cls, name: str, nodes: int, edges: Iterable[tuple[int, int]]) -> Graph:
        """UserError where a walk could not reach every node."""
        pairs = np.array(sorted(edges), np.int64).reshape(-1, 2)
        both = np.concatenate([pairs, pairs[:, ::-1]])
        both = both[np.lexsort((both[:, 1], both[:, 0]))]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(both[:, 0], minlength=nodes))])
        graph = cls(name, offsets, both[:, 1].astype(np.int32))
        if (graph.hops_from(0) < 0).any():
            raise UserError(f"{name} is not connected, so no walk reaches every node; give more neighbours")
        return graph

    @property
    def nodes(self) -> int:
        return len(self.offsets) - 1

    @property
    def degrees(self) -> np.ndarray:
        """int64 [nodes]."""
        return np.diff(self.offsets)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Each once, the smaller node first, sorted."""
        starts = np.repeat(np.arange(self.nodes), self.degrees)
        return [(int(a), int(b)) for a, b in zip(starts, self.neighbours, strict=True) if a < b]

    @property
    def stationary(self) -> np.ndarray:
        """float64 [nodes]: how often a long simple random walk is at each node, in proportion to its degree."""
        return self.degrees / self.degrees.sum()

    @property
    def entropy_rate(self) -> float:
        """Nats a step of a simple random walk: the sum of pi_i log(degree_i) (Cover and Thomas, 2006, section 4.3)."""
        return float(self.stationary @ np.log(self.degrees))

    def hops_from(self, start: int) -> np.ndarray:
        """int32 [nodes]: edges of a shortest path from `start`; -1 where there is none."""
        hops = np.full(self.nodes, -1, np.int32)
        border, distance = [start], 0
        while border:
            hops[border] = distance
            distance += 1
            next_to = {int(n) for i in border for n in self.neighbours[self.offsets[i] : self.offsets[i + 1]]}
            border = [n for n in next_to if hops[n] < 0]
        return hops

    def hops(self) -> np.ndarray:
        """int32 [nodes, nodes]: between every two nodes."""
        return np.stack([self.hops_from(start) for start in range(self.nodes)])

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "nodes": self.nodes, "edges": self.edges, "entropy_rate_nats": self.entropy_rate}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Graph:
        """What `as_json` gave; ValueError, KeyError or TypeError on anything else."""
        nodes = int(said["nodes"])
        edges = {(int(a), int(b)) for a, b in said["edges"]}
        if not edges or not all(0 <= a < b < nodes for a, b in edges):
            raise ValueError("its edges are not pairs of nodes, the smaller first")
        return cls.of(str(said["name"]), nodes, edges)


# ----------------------------------------------------------------------------------------------- kinds


def _torus(nodes: int, neighbours: int, _: np.random.Generator) -> Edges:
    """A square grid whose edges meet; 8 neighbours are a king's moves, 4 those of one step along an axis."""
    side = math.isqrt(nodes)
    if side * side != nodes or side < 3:  # noqa: PLR2004 (on a smaller one both ways lead to the same node)
        raise UserError(f"a torus of {nodes} nodes is no square; give a square number from 9, such as --nodes 100")
    if neighbours not in (4, 8):
        raise UserError(f"a node of a torus cannot have {neighbours} neighbours; give --neighbours 8 or 4")
    steps = [(0, 1), (1, 0)] + ([(1, 1), (1, -1)] if neighbours == 8 else [])  # noqa: PLR2004 (the diagonals)
    return {
        _edge(row * side + column, (row + down) % side * side + (column + right) % side)
        for row in range(side)
        for column in range(side)
        for down, right in steps
    }


def _ring(nodes: int, neighbours: int, _: np.random.Generator) -> Edges:
    """A ring lattice: every node is joined to the nearest ones on both sides (Watts and Strogatz, 1998, beta 0)."""
    if neighbours % 2:
        raise UserError(f"a ring of {nodes} nodes needs an even number of neighbours from 2 to {nodes - 1}")
    return _lattice(nodes, neighbours)


def _lattice(nodes: int, neighbours: int) -> Edges:
    """A ring lattice; where the neighbours are odd, each node is joined to the opposite one too."""
    steps = [*range(1, neighbours // 2 + 1), *([nodes // 2] if neighbours % 2 else [])]
    return {_edge(i, (i + d) % nodes) for i in range(nodes) for d in steps}


def _regular(nodes: int, neighbours: int, random: np.random.Generator) -> Edges:
    """Random with equal degrees: a ring lattice whose edges are swapped in pairs many times."""
    if nodes * neighbours % 2:
        raise UserError(
            f"no graph of {nodes} nodes has {neighbours} neighbours of each, as one of the two must be even; give "
            f"--neighbours {neighbours - 1}"
        )
    edges = sorted(_lattice(nodes, neighbours))
    there = set(edges)
    for _ in range(_SWAPS_AN_EDGE * len(edges)):
        i, j = (int(n) for n in random.integers(0, len(edges), 2))
        (a, b), (c, d) = edges[i], edges[j]
        if random.integers(2):
            c, d = d, c
        first, second = _edge(a, d), _edge(c, b)
        if a == d or c == b or first == second or first in there or second in there:
            continue
        there -= {edges[i], edges[j]}
        edges[i], edges[j] = first, second
        there |= {first, second}
    return there


def _erdos_renyi(nodes: int, neighbours: int, random: np.random.Generator) -> Edges:
    """Every pair is an edge with the same chance, which gives so many neighbours on average."""
    first, second = np.triu_indices(nodes, 1)
    kept = random.random(len(first)) < neighbours / (nodes - 1)
    return {(int(a), int(b)) for a, b in zip(first[kept], second[kept], strict=True)}


_KINDS: Mapping[str, Callable[[int, int, np.random.Generator], Edges]] = {
    "torus": _torus,
    "ring": _ring,
    "random_regular": _regular,
    "erdos_renyi": _erdos_renyi,
}


def make_graph(kind: str, nodes: int, neighbours: int, seed: int) -> Graph:
    """A connected graph; the same arguments give the same one. UserError where there is none of that kind."""
    if kind not in _KINDS:
        raise UserError(f"unknown graph {kind!r}; the graphs are: {', '.join(_KINDS)}")
    if not 1 <= neighbours < nodes:
        raise UserError(f"{neighbours} neighbours of {nodes} nodes: give from 1 to {nodes - 1}")
    name = f"{kind} of {nodes} nodes, {neighbours} neighbours, seed {seed}"
    random = np.random.default_rng(seed)
    for draw in range(_DRAWS):
        try:
            return Graph.of(name, nodes, _KINDS[kind](nodes, neighbours, random))
        except UserError:
            if kind in ("torus", "ring") or draw == _DRAWS - 1:
                raise
    raise AssertionError("unreachable")


def _edge(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)
