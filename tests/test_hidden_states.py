"""The page of the hook points says which of transformers' `hidden_states` each is, and it is, in every family."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, random_ids, row_errors, text_of, tiny_folder, tiny_model

from jax_extract import extract
from models.hooks import HOOK_POINTS

PAGE = Path(__file__).resolve().parent.parent / "docs/commands.md"
ROW = re.compile(r"^\| `(\w+)`[^|]*\|[^|]*\| `hidden_states\[(.+?)\]`(, but for the last block)? \|", re.MULTILINE)
FAMILIES_TRIED = ["qwen2", "llama", "gpt2", "gpt_neox", "phi", "gemma2", "gemma3"]
PLACES: dict[str, Callable[[int], int]] = {
    "0": lambda i: 0,
    "i": lambda i: i,
    "i + 1": lambda i: i + 1,
    "-1": lambda i: -1,
}
BOUND = 1e-5


def _indices() -> dict[str, tuple[str, bool]]:
    """Hook point -> the index as the page has it, and whether the last block is left out."""
    return {name: (index, bool(but_last)) for name, index, but_last in ROW.findall(PAGE.read_text())}


def test_the_page_names_the_index_of_every_hook_point_that_transformers_returns() -> None:
    named = _indices()
    assert set(named) == {"embeddings", "residual_before", "after_block", "final_norm"}
    assert set(named) < set(HOOK_POINTS)


@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_hook_points_are_the_hidden_states_that_the_page_names(family: str) -> None:
    assert family in FAMILIES
    model, [ids] = tiny_model(family), random_ids([19])
    hook_points = ("residual_before", "after_block", "final_norm", *(("embeddings",) if family != "gpt2" else ()))
    folder = str(tiny_folder(family))
    sample = extract(folder, [text_of(ids)], layers="all", hook_points=hook_points, positions="all").sample("0")
    assert list(sample.token_ids) == list(ids)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
    layers = model.config.num_hidden_layers
    assert len(theirs) == layers + 1
    for hook in hook_points:
        index, but_last = _indices()[hook]
        for layer in range(layers - but_last) if HOOK_POINTS[hook].per_layer else (None,):
            state = theirs[PLACES[index](layer or 0)]
            assert row_errors(sample.get(layer, hook), state[0].numpy()).max() <= BOUND, (hook, layer)
    last = sample.get(layers - 1, "after_block")
    assert row_errors(last, theirs[-1][0].numpy()).max() > 100 * BOUND  # the reason of the page's exception
