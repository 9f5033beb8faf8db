"""Seeing what flows through the hook points of a Hugging Face model, and changing it.

In: a base model, where it has a hook point (`Module`), a function of rows. Out: a handle that ends it. What attention
multiplies is no module's input or output: there transformers is given an attention function of ours, which shows what
it was called with and then computes as the one before.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.ports import Module

# Of rows [b, t, width] at a hook point: None, or rows that flow on in their place.
See = Callable[[torch.Tensor], torch.Tensor | None]

_SEEN = "_jax_extract_seen"  # of an attention module: what of it is shown -> to whom


def listen(loaded: Any, module: Module, layer: int | None, width: int, see: See) -> RemovableHandle:
    """Has `see` called whenever the model's forward comes to a hook point.

    Args:
      loaded: the base model.
      layer: which stands in the module's path.
      width: values of a row, which for softmax weights decides how many there are of each head.
    """
    part = loaded.get_submodule(module.path.format(i=layer))
    if module.side == "output":
        return part.register_forward_hook(lambda _, args, result: _passed(result, partial(_of_part, module, see)))
    if module.side == "input":
        return part.register_forward_pre_hook(partial(_entering, partial(_of_part, module, see)), with_kwargs=True)
    _show_attention(loaded, needs_weights=module.side == "pattern")
    listeners = vars(part).setdefault(_SEEN, {}).setdefault(module.side, OrderedDict())
    handle = RemovableHandle(listeners)
    listeners[handle.id] = partial(_weights if module.side == "pattern" else _heads, see, width)
    return handle


def _of_part(module: Module, see: See, x: torch.Tensor) -> torch.Tensor | None:
    """What a projection gives, of which a hook point is perhaps a part."""
    if module.part is None:
        return see(x)
    groups, parts, number = module.part
    by_part = x.unflatten(-1, (groups, parts, -1))
    if (changed := see(by_part[..., number, :].flatten(-2))) is None:
        return None
    by_part = by_part.clone()
    by_part[..., number, :] = changed.unflatten(-1, (groups, -1))
    return by_part.flatten(-3)


def _entering(see: See, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if args:
        return None if (changed := _passed(args, see)) is None else (changed, kwargs)
    changed = see(kwargs["hidden_states"])
    return None if changed is None else (args, {**kwargs, "hidden_states": changed})


def _passed(values: Any, see: See) -> Any:
    """A tensor, or the first of several, which alone is a stream; None where it is not changed."""
    if isinstance(values, torch.Tensor):
        return see(values)
    changed = see(values[0])
    return None if changed is None else (changed, *values[1:])


def _heads(see: See, _: int, x: torch.Tensor) -> torch.Tensor | None:
    """x [b, heads, t, h]."""
    changed = see(x.transpose(1, 2).flatten(2))
    return None if changed is None else changed.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


def _weights(see: See, width: int, x: torch.Tensor) -> torch.Tensor | None:
    """x [b, heads, t, s] of rows that begin with their sample."""
    heads, columns = x.shape[1], x.shape[3]
    places = width // heads
    rows = torch.nn.functional.pad(x[..., :places], (0, max(0, places - columns))).transpose(1, 2).flatten(2)
    if (changed := see(rows)) is None:
        return None
    changed = changed.unflatten(-1, (heads, -1)).transpose(1, 2)[..., :columns]
    return torch.nn.functional.pad(changed, (0, max(0, columns - places)))


# ------------------------------------------------------------------------------------ attention functions


def _show_attention(loaded: Any, needs_weights: bool) -> None:
    """Puts a function of ours in the place of the model's attention; one that has the weights, if they are needed."""
    now = str(loaded.config._attn_implementation)
    wanted = _OURS["eager" if needs_weights or "eager" in now else "sdpa"]
    if now != wanted:
        loaded.set_attn_implementation(wanted)


def _attend(kind: str, module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> tuple[Any, Any]:
    """As transformers calls an attention function: queries [b, heads, t, h], keys and values [b, key heads, t, h]."""
    query, key = (_shown(module, side, x) for side, x in (("query", query), ("key", key)))
    if kind == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **given)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    mixed, weights = eager(module, query, key, value, mask, **given)
    if (changed := _shown(module, "pattern", weights)) is not weights:
        seen = torch.where(mask < 0, 0, changed).to(value.dtype)  # what a token does not see it does not mix
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        mixed, weights = (seen @ values).transpose(1, 2).contiguous(), seen
    return mixed, weights


def _shown(module: Any, side: str, x: Any) -> Any:
    for see in list(vars(module).get(_SEEN, {}).get(side, {}).values()):
        changed = see(x)
        x = x if changed is None else changed
    return x


_OURS = {kind: f"jax_extract_{kind}" for kind in ("sdpa", "eager")}
for _kind, _name in _OURS.items():
    AttentionInterface.register(_name, partial(_attend, _kind))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_kind])
