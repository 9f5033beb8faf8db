"""Small walks, a tiny Llama and trainings of it, for the tests of stage 02."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_extract.terminal import Terminal
from jax_extract.walks.command import train
from jax_extract.walks.config import TrainConfig
from jax_extract.walks.dataset import WalksConfig, walks_command

SILENT = Terminal(silent=True)


def make_walks(folder: Path, **options: Any) -> Path:
    """A torus of 5 x 5 nodes, unless something else is said."""
    chosen = {"nodes": 25, "train_walks": 200, "validation_walks": 30, "walk_length": 12, **options}
    walks_command(WalksConfig(dataset_dir=str(folder), **chosen), SILENT)
    return folder


def write_preset(path: Path, **changes: Any) -> Path:
    """A Llama of two layers, with grouped keys, as config.json; None takes a field out."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        **changes,
    }
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def settings(preset: Path, dataset: Path, output: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model_config=str(preset), dataset_dir=str(dataset), output_dir=str(output), **options)


def trained(preset: Path, dataset: Path, output: Path, **options: Any) -> dict[str, Any]:
    """A training in this process, silent."""
    return train(settings(preset, dataset, output, **options), SILENT)
