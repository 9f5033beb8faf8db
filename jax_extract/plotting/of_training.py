"""The pictures of stage 02: the loss of a training, and the map of nodes of its token representations.

In: the folder of a training, of one of its models, or of token representations. Out: `Drawn` pictures, and what was
left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.errors import UserError, damage_is_told, user_path
from jax_extract.inputs.graphs import Graph
from jax_extract.inputs.walk_dataset import WalkDataset
from jax_extract.layer_words import layers_of
from jax_extract.plotting.components import Components
from jax_extract.plotting.config import Picture, PlotConfig
from jax_extract.plotting.loss import LossCurve, draw_loss
from jax_extract.plotting.nodes import NodeMap, draw_nodes
from jax_extract.plotting.pictures import Drawn, LeftOut
from jax_extract.terminal import plural, ranges_text
from jax_extract.training.checkpoints import STATE_FILE, checkpoint_folder, read_state, saved_steps
from jax_extract.walks.saved import FINAL_MODEL, KIND

PICTURES: tuple[Picture, ...] = ("loss", "nodes")
ARRAYS, INFO = "token_representations.npz", "representation_info.json"
_FOLDER = "token_representations"
_PANELS = 5  # layers of the map
_AGAIN = "make it again with jax-extract token-representations"


@dataclass(frozen=True)
class StagePlace:
    """Attributes:
    model: the folder of the model that was trained last, if there is one.
    representations: the folder with the arrays, if there is one.
    """

    model: Path | None
    representations: Path | None

    @classmethod
    def find(cls, folder: Path) -> StagePlace | None:
        """None where the folder is none of stage 02."""
        models = [folder, folder / FINAL_MODEL]
        models += [checkpoint_folder(folder, step) for step in reversed(saved_steps(folder))]
        model = next((each for each in models if (each / STATE_FILE).is_file()), None)
        arrays = next((each for each in (folder, folder / _FOLDER) if (each / ARRAYS).is_file()), None)
        return cls(model, arrays) if model or arrays else None


@dataclass(frozen=True)
class StagePictures:
    place: StagePlace
    config: PlotConfig

    def draw(self) -> Iterator[Drawn | LeftOut]:
        pictures: tuple[tuple[Picture, Path | None, Callable[[Path], Drawn]], ...] = (
            ("loss", self.place.model, self._loss),
            ("nodes", self.place.representations, self._nodes),
        )
        for picture, folder, draw in pictures:
            if folder is None and self.config.asked(picture):
                lacking = STATE_FILE if picture == "loss" else ARRAYS
                raise UserError(f"--pictures {picture}: there is no {lacking} in {self.config.place}, nor below it")
            if folder is not None and self.config.wants(picture):
                yield draw(folder)

    def _loss(self, folder: Path) -> Drawn:
        state = read_state(KIND, folder, "give the folder of another training")
        curve = LossCurve.of(state.log_history, int(state.settings["model_config"]["vocab_size"]))
        if not len(curve.steps):
            raise UserError(f"{folder / STATE_FILE} has logged no loss yet; draw it after --logging_steps steps")
        steps = f"{state.global_step:,} of {plural(state.max_steps, 'step')}"
        said = state.settings
        caption = (
            f"{folder.parent.name}  ·  {said['model_config']['num_hidden_layers']} layers of width "
            f"{said['model_config']['hidden_size']}  ·  {steps} of {said['batch_size']} walks"
        )
        return Drawn("loss", draw_loss(curve, caption))

    def _nodes(self, folder: Path) -> Drawn:
        with damage_is_told(str(folder / INFO), _AGAIN):
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            hook, keys = _keys(info, self.config)
            measured = {
                name: info["graph_distances"][key] for name, key in keys.items() if key in info["graph_distances"]
            }
            distances = {name: _shares(of_pairs) for name, of_pairs in measured.items()}
            vocab_size, name, source = int(info["vocab_size"]), info["graph"], info["source"]
        with damage_is_told(str(folder / ARRAYS), _AGAIN), np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            found = {name: Components.of(arrays[key]) for name, key in keys.items()}
        graph = self._graph(folder, vocab_size, name)
        said = f"{info['model']['name']}  ·  {plural(vocab_size, 'node')}  ·  "
        said += "each node as an input of its own" if source == "tokens" else "means over the nodes' occurrences"
        known = f"  ·  {graph.name}" if graph else ""
        return Drawn("nodes", draw_nodes(NodeMap(hook, found, graph, distances), said + known))

    def _graph(self, folder: Path, nodes: int, name: str | None) -> Graph | None:
        """That of --dataset_dir, or of the dataset beside the training; None where there is none of these nodes."""
        given = self.config.dataset_dir
        if given is not None:
            graph = WalkDataset.open(user_path(given, "--dataset_dir")).graph
            if graph is None or graph.nodes != nodes:
                has = "no graph.json" if graph is None else f"a graph of {graph.nodes} nodes"
                raise UserError(f"--dataset_dir {given} has {has}, and the representations are of {nodes} nodes")
            return graph
        for beside in (folder.resolve().parent.parent / "dataset", folder.resolve().parent / "dataset"):
            if (beside / "graph.json").is_file():
                graph = WalkDataset.open(beside).graph
                if graph is not None and graph.nodes == nodes and name in (None, graph.name):
                    return graph
        return None


def _shares(said: dict[str, Any]) -> dict[int, float]:
    """Edges between two nodes -> mean distance, as a share of that of every two nodes."""
    of_all = float(said["mean_distance_all_pairs"])
    return {int(n): float(distance) / (of_all or 1.0) for n, distance in said["mean_distance_by_hops"].items()}


def _keys(info: dict[str, Any], config: PlotConfig) -> tuple[str, dict[str, str]]:
    """The first hook point asked for, and its arrays by what their layers are called, spread over those there are."""
    hook = config.hook_points[0] if config.hook_points else info["representations"][0]
    blocks = int(info["model"]["num_hidden_layers"])
    there = [layer for layer in range(blocks) if f"layer_{layer}_{hook}" in info["arrays"]]
    wanted = there if config.layers is None else list(layers_of(config.layers, blocks))
    if not there and hook not in info["arrays"]:
        raise UserError(f"--hook_points: there is no array of {hook!r}; there are: {', '.join(info['arrays'])}")
    if not there:
        return hook, {hook: hook}
    if missing := [layer for layer in wanted if layer not in there]:
        raise UserError(f"--layers: there is no layer {missing[0]} of {hook!r}; there are {ranges_text(there)}")
    spread = np.unique(np.linspace(0, len(wanted) - 1, min(_PANELS, len(wanted))).round().astype(int))
    return hook, {f"layer {wanted[i]}": f"layer_{wanted[i]}_{hook}" for i in spread}
