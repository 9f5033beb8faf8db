"""`jax-extract walks`: makes a dataset of random walks on a graph.

In: which graph, how many walks, seeds. Out: a dataset folder, the same bytes for the same options; whole, or not there.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_extract.errors import UserError, user_path
from jax_extract.inputs.graph_walks import random_walks
from jax_extract.inputs.graphs import Graph, make_graph
from jax_extract.inputs.walk_dataset import GRAPH_FILE, TRAIN_FILE, VALIDATION_FILE, node_vocabulary
from jax_extract.inputs.walk_tokenizer import VOCABULARY_FILE, write_vocabulary
from jax_extract.store.folders import require_usable, write_folder
from jax_extract.terminal import Terminal, plural

_MOST_NODES = 10_000  # of which every pair is looked at
_MOST = 2**31 - 1
_MOST_TOKENS = 2**28  # of a file, which are made in memory
_FILES = (TRAIN_FILE, VALIDATION_FILE, GRAPH_FILE, VOCABULARY_FILE)


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
      check_only: refuse what would be refused, and make nothing.
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
    check_only: bool = False

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
        for name in ("train_walks", "validation_walks"):
            if getattr(self, name) * self.walk_length > _MOST_TOKENS:
                raise UserError(
                    f"--{name} {getattr(self, name)} of --walk_length {self.walk_length} are more than the "
                    f"{_MOST_TOKENS:,} nodes that a file may have; give fewer or shorter walks"
                )


def walks_command(config: WalksConfig, terminal: Terminal | None = None) -> None:
    """Raises UserError on anything that can be mended; nothing that is there is changed."""
    config.check()
    terminal = terminal or Terminal()
    folder = user_path(config.dataset_dir, "--dataset_dir")
    if not _is_made(folder):
        require_usable(folder, "--dataset_dir")
    graph = make_graph(config.graph, config.nodes, config.neighbours, config.graph_seed)
    if config.check_only:
        return
    degrees = graph.degrees
    terminal.line(
        "graph",
        f"{graph.name}: {plural(len(graph.edges), 'edge')}, degrees {degrees.min()} to {degrees.max()}; "
        f"a walk on it has {graph.entropy_rate:.4f} nats a step",
    )
    made = _make(folder, graph, config)
    terminal.line(
        "walks",
        f"{plural(config.train_walks, 'walk')} to train on and {config.validation_walks:,} to evaluate on, of "
        f"{plural(config.walk_length, 'node')}: {folder}/" + ("" if made else ", made already"),
    )


def _make(folder: Path, graph: Graph, config: WalksConfig) -> bool:
    """Writes the dataset, or finds the same there and returns False; UserError where another is there."""
    if not _is_made(folder):
        write_folder(folder.resolve(), lambda target: _fill(target, graph, config))
        return True
    with tempfile.TemporaryDirectory(prefix="walks_") as other:
        _fill(Path(other), graph, config)
        for name in _FILES:
            there = folder / name
            if not there.is_file() or there.read_bytes() != Path(other, name).read_bytes():
                raise UserError(
                    f"{folder} is there already and its {name} is not what was asked for; give the options that made "
                    "it, or another --dataset_dir (DATASET_NAME)"
                )
    return False


def _is_made(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _fill(folder: Path, graph: Graph, config: WalksConfig) -> None:
    seeds = np.random.SeedSequence(config.seed).spawn(2)  # so that neither file depends on the other's size
    counts = {TRAIN_FILE: config.train_walks, VALIDATION_FILE: config.validation_walks}
    for (name, walks), of in zip(counts.items(), seeds, strict=True):
        nodes = random_walks(graph, walks, config.walk_length, np.random.default_rng(of))
        lines = (f'{{"text": "{" ".join(map(str, walk.tolist()))}"}}\n' for walk in nodes)
        with (folder / name).open("w", encoding="utf-8") as file:
            file.writelines(lines)
    (folder / GRAPH_FILE).write_text(json.dumps(graph.as_json()) + "\n", encoding="utf-8")
    write_vocabulary(folder, node_vocabulary(graph))
