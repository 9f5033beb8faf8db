"""Hugging Face's model with forward hooks that make the changes of edits: the truth of tests/test_edits.py.

In: a tiny torch model, changes as functions of rows. Out: every hook point afterwards, and logits. Written for the
tests
alone: the product's own torch backend is held to it too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tiny_models import Rows, SeeAttention, head_rows, reference, watched_attention

from models.capture_plan import PATTERN_TOKENS
from models.registry import port_for


class TorchChange(NamedTuple):
    """rows float32 [tokens, width] -> rows, at a hook point of a layer."""

    hook: str
    layer: int | None
    change: Callable[[torch.Tensor], torch.Tensor]


def base_of(model: Any) -> Any:
    return getattr(model.base_model, "language_model", model.base_model)


def modules_of(model: Any) -> dict[str, Any]:
    config = json.loads(base_of(model).config.to_json_string())
    port = port_for(config)
    return dict(port.modules(port.config(config)))


@contextlib.contextmanager
def changed(model: Any, changes: Sequence[TorchChange]) -> Iterator[None]:
    """Inside, the model's forward makes the changes, for one text at a time."""
    base, modules = base_of(model), modules_of(model)
    with contextlib.ExitStack() as hooks:
        for each in changes:
            name, function = each.hook, each.change
            if name == "after_attention":  # no module ends there: what attention must add is worked out instead
                name, function = "attention_out", _added(base, modules, each, hooks)
            path, side, part = modules[name]
            module = base.get_submodule(path.format(i=each.layer))
            if side not in ("input", "output"):
                hooks.enter_context(watched_attention(base, _in_attention(side, each.layer, function)))
                continue
            if part is not None:
                function = _of_part(part, function)
            if side == "output":
                hooks.callback(module.register_forward_hook(_behind(function)).remove)
            else:
                before = _before(function)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


def _added(base: Any, modules: Any, each: TorchChange, hooks: contextlib.ExitStack) -> Callable[..., torch.Tensor]:
    entering: list[torch.Tensor] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        entering[:] = [(args[0] if args else kwargs["hidden_states"])[0].clone()]

    block = base.get_submodule(modules["after_block"][0].format(i=each.layer))
    hooks.callback(block.register_forward_pre_hook(see, with_kwargs=True).remove)
    return lambda update: each.change(entering[0] + update) - entering[0]


def _in_attention(side: str, layer: int | None, function: Callable[[torch.Tensor], torch.Tensor]) -> SeeAttention:
    """A change of rows [tokens, heads * n], where transformers has [1, heads, tokens, n]."""

    def see(at: int, what: str, x: torch.Tensor) -> torch.Tensor | None:
        if (at, what) != (layer, side):
            return None
        width = x.shape[-1] if side != "pattern" else PATTERN_TOKENS
        changed = function(head_rows(x, width)).unflatten(1, (x.shape[1], -1)).transpose(0, 1)[None]
        if side != "pattern":
            return changed
        # What a token does not see it does not mix, whatever a change puts there.
        return torch.where(x > 0, changed[..., : x.shape[-1]], 0)

    return see


def _of_part(part: tuple[int, int, int], function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A change of one of several hook points that a projection gives at once."""
    groups, parts, number = part

    def change(x: torch.Tensor) -> torch.Tensor:
        by_part = x.reshape(len(x), groups, parts, -1).clone()
        by_part[:, :, number] = function(by_part[:, :, number].reshape(len(x), -1)).reshape(len(x), groups, -1)
        return by_part.reshape(len(x), -1)

    return change


def _behind(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def hook(module: Any, args: Any, result: Any) -> Any:
        if isinstance(result, tuple):
            return function(result[0][0])[None], *result[1:]
        return function(result[0])[None]

    return hook


def _before(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (function(args[0][0])[None], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"][0])[None]}

    return hook


def truth_of(
    model: Any, token_ids: np.ndarray, changes: Sequence[TorchChange], pattern_tokens: int | None = None
) -> tuple[Rows, np.ndarray]:
    """Every hook point, as `reference` has them, and logits float32 [tokens, vocabulary]."""
    with changed(model, changes):
        rows = reference(model, token_ids, pattern_tokens=pattern_tokens)
        with torch.inference_mode():
            logits = model(torch.from_numpy(np.asarray(token_ids, np.int64))[None], use_cache=False).logits
    for each in changes:  # the change is behind it, and was made through it
        if each.hook == "after_attention":
            rows.pop(("attention_out", each.layer))
    return rows, logits[0].float().numpy()
