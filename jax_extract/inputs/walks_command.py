"""`jax-extract walks`: makes a dataset of random walks on a graph.

In: which graph, how many walks, seeds. Out: a dataset folder, the same bytes for the same options.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.graphs import make_graph
from jax_extract.inputs.walk_dataset import make_dataset
from jax_extract.terminal import Terminal, plural

_MOST_NODES = 10_000  # of which every pair is looked at
_MOST = 2**31 - 1


@dataclass(frozen=True)
class WalksConfig:
    """Make a dataset of random walks on a graph: train.jsonl, validation.jsonl, vocab.json and graph.json.

    Attributes:
      dataset_dir: the folder that is made; the same command again finds it made.
      graph: torus (8 neighbours: a king's moves; 4), ring (a lattice), random_regular or erdos_renyi.
      nodes: how many; of a torus a square number.
      neighbours: of each node; of erdos_renyi on average.
      graph_seed: of the random graphs.
      train_walks: walks to train on.
      validation_walks: walks to evaluate on.
      walk_length: nodes of a walk.
      seed: of the walks.
    """

    dataset_dir: str
    graph: str = "torus"
    nodes: int = 100
    neighbours: int = 8
    graph_seed: int = 0
    train_walks: int = 100_000
    validation_walks: int = 1_000
    walk_length: int = 32
    seed: int = 0

    def check(self) -> None:
        for name, least, most in (
            ("nodes", 2, _MOST_NODES),
            ("train_walks", 1, _MOST),
            ("validation_walks", 1, _MOST),
            ("walk_length", 2, _MOST),
            ("seed", 0, _MOST),
            ("graph_seed", 0, _MOST),
        ):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"--{name} {getattr(self, name)} must be from {least} to {most}")


def walks_command(config: WalksConfig, terminal: Terminal | None = None) -> None:
    """Raises UserError on anything that can be mended; nothing that is there is changed."""
    config.check()
    terminal = terminal or Terminal()
    folder = user_path(config.dataset_dir, "--dataset_dir")
    graph = make_graph(config.graph, config.nodes, config.neighbours, config.graph_seed)
    degrees = graph.degrees
    terminal.line(
        "graph",
        f"{graph.name}: {plural(len(graph.edges), 'edge')}, degrees {degrees.min()} to {degrees.max()}; "
        f"a walk on it has {graph.entropy_rate:.4f} nats a step",
    )
    made = make_dataset(
        folder, graph, config.train_walks, config.validation_walks, config.walk_length, config.seed
    )
    terminal.line(
        "walks",
        f"{plural(config.train_walks, 'walk')} to train on and {config.validation_walks:,} to evaluate on, of "
        f"{plural(config.walk_length, 'node')}: {folder}/" + ("" if made else ", made already"),
    )
