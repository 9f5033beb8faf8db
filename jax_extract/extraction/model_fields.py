"""What config.json means for the rows of a run: kept with the run, and compared when it goes on.

The weights say nothing of it: with another `rope_theta` the same tensors give other rows. In: an opened model, the
longest sample, a run that is there. Out: plain JSON for run.json; or one sentence that names the fields that differ.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jax_extract.errors import UserError
from jax_extract.store.differences import flattened
from jax_extract.store.ledger import Ledger
from jax_extract.weights.open_model import OpenModel
from models import hf_config
from models.config_fields import BOOKKEEPING
from models.layers import Rotary
from models.ports import Port

MODEL_FIELDS = "model_fields"  # what run.json calls them

_OF_HEAD = ("tie_word_embeddings", "head_soft_cap")
# How long samples may be is told apart from them; the names of types too.
_OF_NO_ROW = ("max_position_embeddings", "model_type")
_FEW = 4  # differences in a sentence


def model_fields(model: OpenModel, longest: int) -> dict[str, Any]:
    """What decides the rows of samples of at most `longest` tokens; flat, plain JSON.

    `understood` is what a port makes of config.json, null where none does; `config.json` what stands there, each value
    as JSON text, since null and nothing are not the same to transformers.
    """
    said = {name: json.dumps(value) for name, value in model.checkpoint.config.items() if name not in BOOKKEEPING}
    understood = understood_fields(model, longest) if isinstance(model.family, Port) else None
    left_out = (*_OF_HEAD, *_OF_NO_ROW)
    if understood is not None:
        understood = {name: value for name, value in understood.items() if name not in left_out}
    return {"understood": understood, "config.json": said}


def understood_fields(model: OpenModel, longest: int) -> dict[str, Any]:
    """A port's configuration, that of the head included; windows that no such sample is longer than are none."""
    config: Any = model.config  # every port's is a dataclass
    fields = dataclasses.asdict(config)
    if "windows" in fields:
        fields["windows"] = _effective(fields["windows"], longest)
    return json.loads(json.dumps(flattened(fields)))


def require_same_fields(found: Ledger, model: OpenModel, longest: int) -> None:
    """UserError where the run that is there was begun under a config.json that means other rows; see `model_fields`."""
    begun = found.run["description"].get(MODEL_FIELDS)
    if begun and (changed := _changed(begun, model_fields(model, longest))):
        raise UserError(
            f"{found.storage} holds a run of this model under another config.json: {changed}; put it back as it was, "
            "or choose another --activations_dir"
        )


def require_meaning_as_begun(found: Ledger, model: OpenModel, longest: int) -> None:
    """UserError where the run that is there was begun by a version that kept no fields, and took them otherwise."""
    if is_older(found) and found.run["numerics"].get("backend") != "torch":  # torch reads config.json as it did
        refuse_changed_meaning(model, longest, str(found.storage))


def is_older(found: Ledger) -> bool:
    """Whether the run was begun by a version whose runs kept nothing from their start."""
    description = found.run["description"]
    return "kept" not in description and MODEL_FIELDS not in description


def refuse_changed_meaning(model: OpenModel, longest: int, place: str) -> None:
    """UserError where a version that kept no fields took config.json otherwise, and rows of `place` would differ."""
    if changed := _otherwise_before(model, longest):
        raise UserError(
            f"{place} was begun by an earlier version, which took config.json otherwise than transformers does: "
            f"{'; '.join(changed)}; its rows and new ones would be of two models: choose another --activations_dir"
        )


def _changed(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`rotary.theta was 10000.0, is now 1000000.0; …`; empty where rows are the same."""
    if begun.get("understood") and now["understood"]:
        before, after = begun["understood"], now["understood"]
        names = [name for name in before if name in after]  # a later version may have more
    else:
        before, after = begun["config.json"], now["config.json"]
        names = list({**before, **after})
    differing = [name for name in names if before.get(name) != after.get(name)]
    said = [f"{name} was {_shown(before.get(name))}, is now {_shown(after.get(name))}" for name in differing]
    return "; ".join(said[:_FEW]) + (f" and {len(said) - _FEW} more" if len(said) > _FEW else "")


def _shown(value: Any) -> str:
    return "not there" if value is None else f"{value!s:.60}"


def _effective(windows: Any, longest: int) -> tuple[int, ...]:
    """Per layer, 0 where it hides nothing; empty where that is so in all."""
    effective = tuple(window if 0 < window < longest else 0 for window in windows)
    return effective if any(effective) else ()


# ------------------------------------------------------------------- as it was before runs kept their fields


def _otherwise_before(model: OpenModel, longest: int) -> list[str]:
    """What the version before took otherwise, of what it did not refuse."""
    said, config = model.checkpoint.config, model.config
    try:
        rotaries, windows = _rotaries_before(said, config), _windows_before(said, config.num_hidden_layers)
    except UserError:  # which it did not read either
        return []
    changed = []
    if rotaries is not None and rotaries != config.rotaries:
        fields = [name for name in ("rope_scaling", "rope_parameters") if said.get(name)]
        if len(fields) < 2:  # noqa: PLR2004 (both)
            fields = ["rope_theta"]
        thetas = " and ".join(f"{rotary.theta:g}" for rotary in dict.fromkeys(rotaries))
        changed.append(f"{' and '.join(fields)} meant rotations of base {thetas}, and now mean other ones")
    if windows is not None and _effective(windows, longest) != _effective(config.attention.windows, longest):
        read = ("sliding_window",) if said["model_type"] == "mistral" else ("sliding_window", "max_window_layers")
        fields = [name for name in read if name not in said]
        changed.append(f"without {' and '.join(fields) or 'layer_types'} layers had other sliding windows")
    return changed


def _rotaries_before(said: Mapping[str, Any], config: Any) -> tuple[Rotary, ...] | None:
    """None where there are none; both spellings were read, one over the other, and GPT-NeoX listened to rope_theta."""
    if not config.rotaries:
        return None
    scaling, named = hf_config.mapping(said, "rope_scaling"), hf_config.mapping(said, "rope_parameters")
    theta = said.get("rope_theta")
    if config.model_type == "gemma3_text":
        wide = {**scaling, **hf_config.mapping(named, "full_attention")}
        near = hf_config.mapping(named, "sliding_attention")
        sets = [(wide, theta, 1e6), (near, said.get("rope_local_base_freq"), 1e4)]
    else:
        if config.model_type == "gpt_neox" and "rope_theta" not in said:
            theta = said.get("rotary_emb_base")
        sets = [({**scaling, **named}, theta, 1e4)] * len(config.rotaries)
    width = getattr(config, "rotated", None) or config.head_dim
    return tuple(hf_config.rotary_of(one, base, absent, said, width) for one, base, absent in sets)


def _windows_before(said: Mapping[str, Any], layers: int) -> tuple[int, ...] | None:
    """None where nothing has changed; without a sliding_window there was none, and every layer had one."""
    if said["model_type"] not in ("mistral", "qwen2", "qwen3"):
        return None
    first = 0
    if said["model_type"] != "mistral":
        if not said.get("use_sliding_window"):
            return ()
        first = said.get("max_window_layers") or 0
    if said.get("sliding_window") is None:
        return ()
    return hf_config.sliding_windows(said, layers, [layer >= first for layer in range(layers)])
