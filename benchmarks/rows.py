"""Whether two sides did the same work: the rows of a peer's files against those of our run.

In: a run that we wrote and a folder that a peer wrote. Out: row errors, ‖a - b‖₂ / ‖b‖₂ a row, with b ours; absolute
where b is zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from jax_extract.store.reader import open_activations

# Beyond these, a side computes something else. Rounding stays far below: bfloat16 models differ by some hundredths.
MOST = {"float32": 1e-3, "bfloat16": 0.25}


class OtherRows(Exception):
    """The rows are not the same work."""


def compare(run_folder: Path, peer_folder: Path, prompts: dict[str, Any], layers: tuple[int, ...], dtype: str) -> dict:
    """The largest and the median row error over all layers.

    Args:
      prompts: `ids` and `tokens` as `workloads` wrote them.

    Raises:
      OtherRows: another number of rows, or errors that no rounding makes.
    """
    run = open_activations(run_folder)
    order = json.loads((peer_folder / "order.json").read_text(encoding="utf-8"))
    found: list[np.ndarray] = []
    for layer in layers:
        files = sorted(peer_folder.glob(f"layer_{layer}_batch_*.safetensors"))
        theirs = np.concatenate([safetensors.numpy.load_file(file)["activations"] for file in files])
        at = 0
        for i in order:
            ours = run.sample(prompts["ids"][i]).get(layer=layer)
            found.append(row_errors(theirs[at : at + len(ours)], ours))
            at += len(ours)
        if at != len(theirs):
            raise OtherRows(f"it wrote {len(theirs):,} rows of layer {layer} where we wrote {at:,}")
    errors = np.concatenate(found)
    worst, middle = float(errors.max()), float(np.median(errors))
    if not worst <= MOST[dtype]:
        raise OtherRows(f"its rows are not ours: the largest row error is {worst:.1e}, the median {middle:.1e}")
    return {"max": worst, "median": middle}


def row_errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[rows] of a and b [rows, width]."""
    if a.shape != b.shape:
        raise OtherRows(f"it wrote {a.shape} where we wrote {b.shape}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.linalg.norm(b, axis=1)
    return np.linalg.norm(a - b, axis=1) / np.where(size == 0, 1.0, size)
