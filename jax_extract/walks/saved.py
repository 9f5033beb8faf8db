"""A small language model as a folder that transformers loads: config.json, weights, a tokenizer.

In: what was trained, and how far. Out: checkpoint-STEP/ and final_model/.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_extract.inputs.walk_tokenizer import write_tokenizer
from jax_extract.training.checkpoints import Kind, TrainerState, save
from jax_extract.training.place import first_other
from jax_extract.weights.save import WEIGHTS_FILE, write_weights

FINAL_MODEL = "final_model"


def _other(name: str, before: Any, asked: Any) -> str:
    if name == "model_config":
        inner = first_other(before, asked) or ""
        return f"a model with {inner} {before.get(inner)!r}, and {asked.get(inner)!r} was asked for"
    if name == "dataset":
        return "a training on other data than the dataset holds"
    return f"a training with {name} {before!r}, and {asked!r} was asked for"


KIND = Kind(
    command="jax-extract train",
    what="model",
    files=frozenset({"config.json", WEIGHTS_FILE}),
    final=FINAL_MODEL,
    elsewhere="give another --output_dir (OUTPUT_DIR or RUN_NAME)",
    mappings=frozenset({"model_config"}),
    anew="or start anew with --overwrite True (OVERWRITE=true)",
    nevertheless="go on with --allow_numeric_change True (ALLOW_NUMERIC_CHANGE=true)",
    other=_other,
)


@dataclass(frozen=True)
class SavedModel:
    """Everything of a model's folder but its weights."""

    config: Mapping[str, Any]
    vocabulary: Mapping[str, int]
    max_length: int

    def save(
        self,
        target: Path,
        tensors: Mapping[str, np.ndarray],
        state: TrainerState,
        save_optimizer: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes the folder, with what resuming needs where `save_optimizer` is given."""

        def fill(folder: Path) -> None:
            (folder / "config.json").write_text(json.dumps(dict(self.config), indent=2) + "\n", encoding="utf-8")
            write_weights(folder, tensors)
            write_tokenizer(folder, self.vocabulary, self.max_length)

        save(target, state, fill, save_optimizer)
