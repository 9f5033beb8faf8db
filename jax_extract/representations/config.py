"""The configuration of `jax-extract token-representations`: one frozen dataclass, which is also the command line.

In: flags. Out: `RepresentationsConfig`, checked as far as that goes without looking at files or devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jax_extract.devices.choice import DeviceChoice
from jax_extract.errors import UserError
from jax_extract.inputs.walk_dataset import TEXT_COLUMN
from jax_extract.layer_words import LayerWord, layer_words
from models.hooks import DEFAULT_HOOK_POINT


@dataclass(frozen=True)
class RepresentationsConfig:
    """Extract a representation of every token of a model's vocabulary, at every layer.

    Attributes:
      model_path: Hugging Face folder, such as final_model/ or checkpoint-STEP/, hub id, or .gguf file.
      representation_dir: folder for token_representations.npz and representation_info.json; what is there is replaced.
      representations: hook points, such as residual_before after_attention after_block ffn_gate ffn_up.
      layers: counted from 0, or from the end: 3, -1 (the last), 2-5 (both among them), all, or several of these; by
        default all.
      source: tokens: each token alone, as an input of one token; occurrences: its mean over all walks of dataset_dir.
      dataset_dir: of the walks; with its graph.json, distances of representations by distance in the graph are told.
      walks: which walks of dataset_dir the occurrences are in.
      text_column: field of the .jsonl files that holds the walk, words between spaces.
      dtype: of the computation; by default bfloat16 on TPU and GPU, float32 on CPU.
      device: auto, cpu, gpu or tpu.
      mesh_shape: DATA,MODEL over all devices; by default all on DATA.
      batch_size: samples that a device computes at once; by default 512 tokens, or 64 walks.
      check_only: refuse what would be refused of these options, and compute nothing; model_path and dataset_dir may
        still have to be made.
    """

    model_path: str
    representation_dir: str
    representations: tuple[str, ...] = (DEFAULT_HOOK_POINT,)
    layers: tuple[LayerWord, ...] | None = None
    source: Literal["tokens", "occurrences"] = "tokens"
    dataset_dir: str | None = None
    walks: Literal["train", "validation"] = "train"
    text_column: str = TEXT_COLUMN
    dtype: Literal["float32", "bfloat16"] | None = None
    device: DeviceChoice = "auto"
    mesh_shape: str | None = None
    batch_size: int | None = None
    check_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_words(self.layers, "--layers"))

    def check(self) -> None:
        if not self.representations:
            raise UserError("--representations is empty; name at least one, such as after_block")
        if self.layers is not None and not self.layers:
            raise UserError("--layers is empty; name at least one layer, or leave the flag out")
        if self.batch_size is not None and not 1 <= self.batch_size < 2**31:
            raise UserError(f"--batch_size {self.batch_size} must be from 1 to {2**31 - 1}")
        if self.source == "occurrences" and self.dataset_dir is None:
            raise UserError("--source occurrences needs walks that tokens occur in; give their --dataset_dir")
