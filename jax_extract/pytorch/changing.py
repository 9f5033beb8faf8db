"""Interventions on Hugging Face's model, made by forward hooks.

In: a base model, where its hook points are, `Intervention`s as JAX takes them, on the host. Out: inside a `with`, the
model's forward makes them. A function of JAX's is called on the rows, on the way back too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_extract.pytorch.hooks import listen
from models.interventions import UNCHANGED, Intervention
from models.ports import Module

Change = Callable[[torch.Tensor], torch.Tensor]


class Hooked(NamedTuple):
    """What flows through a hook point, [b, t, width], is passed through `change`, which gives None where it looks."""

    hook: str
    layer: int | None
    change: Change

    @property
    def is_behind_attention(self) -> bool:
        return self.hook == "after_attention"


@contextlib.contextmanager
def changed(
    model: Any, modules: Mapping[str, Module], interventions: Sequence[Intervention], looks: Sequence[Hooked] = ()
) -> Iterator[None]:
    """Inside, they are made, before everything that looks: what is there already, and `looks`.

    What lies behind attention is made of what attention adds. So it is changed, and looked at, behind all that changes
    or looks at what attention adds.
    """
    blocks = model.config.num_hidden_layers
    changes = [
        Hooked(each.hook, layer, _change(each, layer)) for each in interventions for layer in layers_of(each, blocks)
    ]
    before = [(one, False) for one in looks if not one.is_behind_attention]
    # Each goes before those that are there.
    before += [(one, True) for one in reversed(changes) if not one.is_behind_attention]
    behind = [(one, False) for one in (*changes, *looks) if one.is_behind_attention]
    with contextlib.ExitStack() as hooks:
        for one, first in (*before, *behind):
            _hook(model, modules, one, hooks, prepend=first)
        yield


def layers_of(intervention: Intervention, blocks: int) -> list[int | None]:
    """Those at which it changes something, of so many; of a hook point that has none, None."""
    if intervention.hook in ("embeddings", "final_norm"):
        return [None]
    last = blocks + (intervention.hook == "residual_before")
    return [int(layer) for layer in np.flatnonzero(intervention.layers.any(axis=0)) if layer < last]


def _hook(model: Any, modules: Mapping[str, Module], one: Hooked, hooks: contextlib.ExitStack, prepend: bool) -> None:
    """Until `hooks` are closed."""
    name, layer, change = one
    blocks = model.config.num_hidden_layers
    if name == "residual_before" and layer is not None and layer >= blocks:
        name, layer = "after_block", layer - 1  # which is what enters a block that does not run
    if one.is_behind_attention:
        name, change = "attention_out", _what_attention_adds(model, modules, layer, change, hooks)
    hooks.callback(listen(model, modules[name], layer, change, prepend=prepend).remove)


def _what_attention_adds(
    model: Any, modules: Mapping[str, Module], layer: int | None, change: Change, hooks: contextlib.ExitStack
) -> Change:
    """No module ends between attention and the feed-forward network: attention adds what makes the stream so."""
    entering: list[torch.Tensor] = []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        entering[:] = [args[0] if args else kwargs["hidden_states"]]

    block = model.get_submodule(modules["residual_before"].path.format(i=layer))
    hooks.callback(block.register_forward_pre_hook(see, with_kwargs=True).remove)
    return lambda update: change(entering[0] + update) - entering[0]


def _change(intervention: Intervention, layer: int | None) -> Change:
    numbers = np.asarray(intervention.rows)
    if layer is not None:
        numbers = np.where(np.asarray(intervention.layers)[:, layer, None], numbers, UNCHANGED)

    def change(x: torch.Tensor) -> torch.Tensor:
        here = torch.from_numpy(numbers[:, : x.shape[1]] != UNCHANGED).to(x.device)[:, :, None]
        if intervention.kind == "zero":
            return x.masked_fill(here, 0)
        if callable(intervention.kind):
            return torch.where(here, _by_jax(intervention, x.float()).to(x.dtype), x)
        given = torch.from_numpy(np.array(intervention.operand)).to(x.device)
        whose = torch.from_numpy(np.maximum(numbers[:, : x.shape[1]], 0).astype(np.int64)).to(x.device)
        put = given[whose]
        put = x.float() + put if intervention.kind == "add" else put
        return torch.where(here, put.to(x.dtype), x)

    return change


def _by_jax(intervention: Intervention, x: torch.Tensor) -> torch.Tensor:
    return _JaxFunction.apply(intervention.result, x)  # type: ignore[return-value] (torch does not say so)


class _JaxFunction(torch.autograd.Function):
    """A function of JAX's, with its gradient, on tensors."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[jax.Array], jax.Array], x: torch.Tensor) -> torch.Tensor:
        given = jnp.asarray(x.detach().cpu().numpy())
        if not x.requires_grad:
            return torch.from_numpy(np.array(function(given))).to(x.device)
        result, ctx.back = jax.vjp(function, given)
        return torch.from_numpy(np.array(result)).to(x.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.back(jnp.asarray(gradients[0].detach().cpu().numpy()))
        return None, torch.from_numpy(np.array(gradient)).to(gradients[0].device)
