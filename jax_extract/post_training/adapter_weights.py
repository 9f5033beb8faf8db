"""The matrices of a LoRA adapter by layer, as files of torch: `lora_A_layer_0.pt`, `lora_B_layer_0.pt`.

In: the folder of an adapter. Out: in each file, the layer's adapted modules by name, such as `self_attn.q_proj`: A is
[rank, inputs] and B [outputs, rank], so that what was added to a weight is `scaling · B A` (Hu et al., "LoRA", 2021,
eq. 3); the scaling is in `adapter_config.json`, which is copied beside them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from jax_extract.errors import UserError
from jax_extract.store import torch_file
from jax_extract.store.folders import write_file
from jax_extract.weights.adapter import SETTINGS, WEIGHTS
from jax_extract.weights.checkpoint import SafetensorsFiles

FOLDER = "adapter_weights"
Matrices = dict[int, dict[str, dict[str, np.ndarray]]]

# …layers.3.self_attn.q_proj.lora_A.weight; other families call the list of blocks otherwise.
_MATRIX = re.compile(r".+?\.(?P<layer>\d+)\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


_FILE = re.compile(r"lora_[AB]_layer_\d+\.pt")


def adapter_weights(adapter: Path) -> Matrices:
    """Layer -> `A` or `B` -> module -> matrix, in the dtype that it is stored in.

    Raises:
      UserError: there is no adapter in the folder.
    """
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"there is no {WEIGHTS} in {adapter}; give the folder of an adapter")
    file = SafetensorsFiles([adapter / WEIGHTS])
    found: Matrices = {}
    for name in sorted(file.names()):
        if part := _MATRIX.fullmatch(name):
            sides = found.setdefault(int(part["layer"]), {"A": {}, "B": {}})
            sides[part["side"]][part["module"]] = file.read(name)
    return found


def save_adapter_weights(adapter: Path, target: Path) -> None:
    """Writes the files into a folder, instead of those of another adapter that are there."""
    settings = (adapter / SETTINGS).read_bytes()
    files = {
        f"lora_{side}_layer_{layer}.pt": modules
        for layer, sides in adapter_weights(adapter).items()
        for side, modules in sides.items()
    }
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.iterdir():
        if _FILE.fullmatch(stale.name) and stale.name not in files:
            stale.unlink()
    write_file(target / SETTINGS, lambda path: _write(path, settings))
    for name, modules in files.items():
        write_file(target / name, lambda path, modules=modules: _save(path, modules))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _save(path: Path, modules: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        torch_file.save(file, modules)
