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
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.capture_plan import PATTERN_TOKENS
from models.ports import Module

# Of rows [b, t, width] at a hook point: None, or rows that flow on in their place.
See = Callable[[torch.Tensor], torch.Tensor | None]

_SEEN = "_jax_extract_seen"  # of an attention module: what of it is shown -> to whom
_OPEN = "_jax_extract_open"  # of a model: the attention it has when nobody looks, and how many do


class Handle(Protocol):
    def remove(self) -> None: ...


def listen(
    loaded: Any,
    module: Module,
    layer: int | None,
    see: See,
    pattern_tokens: int = PATTERN_TOKENS,
    prepend: bool = False,
) -> Handle:
    """Has `see` called whenever the model's forward comes to a hook point, until the handle is removed.

    Args:
      loaded: the base model.
      layer: which stands in the module's path.
      pattern_tokens: weights that a row of softmax weights has of each head.
      prepend: before all others that look there.
    """
    part = loaded.get_submodule(module.path.format(i=layer))
    seen = partial(_changed, see)
    if module.side == "output":
        look = partial(_of_part, module, seen)
        return part.register_forward_hook(lambda _, args, result: _passed(result, look), prepend=prepend)
    if module.side == "input":
        look = partial(_entering, partial(_of_part, module, seen))
        return part.register_forward_pre_hook(look, with_kwargs=True, prepend=prepend)
    listeners = vars(part).setdefault(_SEEN, {}).setdefault(module.side, OrderedDict())
    handle = RemovableHandle(listeners)
    is_pattern = module.side == "pattern"
    listeners[handle.id] = partial(_weights, seen, pattern_tokens) if is_pattern else partial(_heads, seen)
    if prepend:
        listeners.move_to_end(handle.id, last=False)
    return _ShownAttention(loaded, handle, needs_weights=is_pattern)


def _changed(see: See, rows: torch.Tensor) -> torch.Tensor | None:
    changed = see(rows)
    return None if changed is rows else changed


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


def _heads(see: See, x: torch.Tensor) -> torch.Tensor | None:
    """x [b, heads, t, h]."""
    changed = see(x.transpose(1, 2).flatten(2))
    return None if changed is None else changed.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


def _weights(see: See, places: int, x: torch.Tensor) -> torch.Tensor | None:
    """x [b, heads, t, s] of rows that begin with their sample."""
    heads, columns = x.shape[1], x.shape[3]
    rows = torch.nn.functional.pad(x[..., :places], (0, max(0, places - columns))).transpose(1, 2).flatten(2)
    if (changed := see(rows)) is None:
        return None
    changed = changed.unflatten(-1, (heads, -1)).transpose(1, 2)
    return torch.cat([changed[..., :columns], x[..., places:]], dim=-1)


# ------------------------------------------------------------------------------------ attention functions


class _ShownAttention:
    """While one is open, the model has an attention function of ours; one with weights, once somebody needs them."""

    def __init__(self, loaded: Any, handle: RemovableHandle, needs_weights: bool) -> None:
        self._loaded, self._handle = loaded, handle
        now = str(loaded.config._attn_implementation)
        before, count = vars(loaded).get(_OPEN, (now, 0))
        vars(loaded)[_OPEN] = (before, count + 1)
        wanted = _OURS["eager" if needs_weights or "eager" in now else "sdpa"]
        if now != wanted:
            loaded.set_attn_implementation(wanted)

    def remove(self) -> None:
        self._handle.remove()
        before, count = vars(self._loaded)[_OPEN]
        vars(self._loaded)[_OPEN] = (before, count - 1)
        if count == 1:
            del vars(self._loaded)[_OPEN]
            self._loaded.set_attn_implementation(before)


def _attend(kind: str, module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> tuple[Any, Any]:
    """As transformers calls an attention function: queries [b, heads, t, h], keys and values [b, key heads, t, h]."""
    query, key = (_shown(module, side, x) for side, x in (("query", query), ("key", key)))
    if kind == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **given)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    mixed, weights = eager(module, query, key, value, mask, **given)
    # What a token does not see it does not mix, whatever a change puts there.
    seen = None if mask is None else mask >= 0
    if (changed := _shown(module, "pattern", weights, seen)) is not weights:
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        mixed, weights = (changed.to(value.dtype) @ values).transpose(1, 2).contiguous(), changed
    return mixed, weights


def _shown(module: Any, side: str, x: Any, allowed: Any = None) -> Any:
    """As those who look leave it; a change elsewhere than where it is allowed is none."""
    for see in list(vars(module).get(_SEEN, {}).get(side, {}).values()):
        if (changed := see(x)) is not None:
            x = changed if allowed is None else torch.where(allowed, changed, 0)
    return x


_OURS = {kind: f"jax_extract_{kind}" for kind in ("sdpa", "eager")}
for _kind, _name in _OURS.items():
    AttentionInterface.register(_name, partial(_attend, _kind))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_kind])
