"""model_type of a config.json -> the port that computes it.

In: a Hugging Face configuration dictionary. Out: a `Port`, or a sentence that lists what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models import (
    gemma_jax_with_hooks,
    gpt2_jax_with_hooks,
    gpt_neox_jax_with_hooks,
    phi_jax_with_hooks,
    qwen2_jax_with_hooks,
)
from models.errors import UserError
from models.nearest import nearest
from models.ports import Port

_ARCHITECTURES = (
    qwen2_jax_with_hooks,
    gpt2_jax_with_hooks,
    gpt_neox_jax_with_hooks,
    gemma_jax_with_hooks,
    phi_jax_with_hooks,
)
PORTS: Mapping[str, Port] = {kind: file.PORT for file in _ARCHITECTURES for kind in file.MODEL_TYPES}


def port_for(config: Mapping[str, Any]) -> Port:
    """The port for `config["model_type"]`; UserError where there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(
            "config.json has no 'model_type'; it must be a whole Hugging Face configuration of a decoder: add what it "
            f"is, one of {', '.join(sorted(PORTS))}"
        )
    if model_type not in PORTS:
        meant = f" (the nearest is {near!r})" if (near := nearest(model_type, PORTS)) else ""
        raise UserError(
            f"unsupported architecture {model_type!r}{meant}; supported model types: {', '.join(sorted(PORTS))}"
        )
    return PORTS[model_type]
