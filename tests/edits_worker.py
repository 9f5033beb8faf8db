"""What tests/test_run_edits.py asks of a model, on the mesh of this process.

JAX_NUM_CPU_DEVICES=8 python tests/edits_worker.py FOLDER 2,4 OUT.npz
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_extract import Edit, Model, answer_log_probability, load_model
from models.ports import hook_width

_RANDOM = np.random.default_rng(11)
TEXTS = [_RANDOM.integers(0, 94, length) for length in (21, 17)]  # in one program
ANSWERS = [_RANDOM.integers(0, 94, length) for length in (3, 1)]


def doubled(rows: Any, operand: Any) -> Any:
    return rows * operand["factor"] + operand["bias"]


def edits_of(model: Model) -> list[Edit | Sequence[Edit]]:
    """At every hook point but the pattern, which has another way of computing attention, and together."""
    random = np.random.default_rng(12)
    source = model.run({"only": TEXTS[1]}, capture={"attention_out": "all"}).run
    layers = model.config.num_hidden_layers
    found: list[Edit | Sequence[Edit]] = []
    for i, hook in enumerate(hook for hook in model.hook_points if hook != "attention_pattern"):
        vector = random.standard_normal(hook_width(model.config, hook)).astype(np.float32)
        layer = None if hook in ("embeddings", "final_norm") else i % layers
        # What is added to all keys alike adds the same to all logits of a query, which softmax does not see.
        some = [1, -1] if hook in ("key", "key_rotated") else None
        found.append(Edit(hook, "add", layer=layer, value=vector, scale=2.0, positions=some))
        found.append(Edit(hook, "zero", layer=layer, positions=[0, -1]))
        found.append(Edit(hook, doubled, layer=layer, value={"factor": 1.0 + i, "bias": vector}))
    wide = random.standard_normal(model.config.hidden_size).astype(np.float32)
    added, zeroed = Edit("after_block", "add", layer=1, value=wide), Edit("after_block", "zero", layer=1, positions=4)
    patched = Edit("attention_out", "patch", layer=2, source=source, positions=[1, -1])
    return [*found, [added, zeroed], [zeroed, added], patched, [patched, added, found[0]]]  # type: ignore[list-item]


def asked(model: Model) -> dict[str, np.ndarray]:
    edit = Edit("ffn_out", "add", layer=1, value=np.ones(model.config.hidden_size), samples=[1, 4], positions=[2, -1])
    texts = [TEXTS[i % 2][: 12 - i] for i in range(6)]
    out = model.run(texts, capture={"after_block": "all"}, edits=[edit], logits="last", answers=[ANSWERS[0]] * 6)
    found = {"logits": np.concatenate(out.logits), "answers": np.array([a.log_probability for a in out.answers])}
    for name in out.run.sample_ids:
        found |= {f"rows {name} {layer}": out.run.sample(name).get(layer) for layer in out.run.layers}
    effects = model.run_edits(TEXTS, edits_of(model), answer_log_probability(ANSWERS))
    found |= {"effects": effects.values, "without": effects.without}
    grad = model.gradient(TEXTS, {"after_block": "all", "ffn_hidden": [1]}, metric=answer_log_probability(ANSWERS))
    for name in grad.run.sample_ids:
        found |= {f"gradient {name} {layer}": grad.run.sample(name).get(layer) for layer in grad.run.layers}
        found[f"gradient {name} hidden"] = grad.run.sample(name).get(1, "ffn_hidden")
    return found


if __name__ == "__main__":
    np.savez(sys.argv[3], **asked(load_model(sys.argv[1], mesh_shape=sys.argv[2])))  # type: ignore[arg-type]
