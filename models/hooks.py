"""Hook points: where a forward pass can be read or changed, and the taps that do it.

In: names and aliases as a user writes them. Out: `HookPoint`s, a static and hashable
`CapturePlan`, and `Taps`, the pytree that a port's block passes through its hook points.
Capture and intervention are one mechanism: at each hook point `Taps.visit` first applies
the interventions and then stores what is wanted, so what is stored is what flows on.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.errors import UserError
from models.nearest import nearest
from models.packing import Packing
from models.positions import Positions


@dataclass(frozen=True)
class HookPoint:
    """A place in the forward pass.

    Attributes:
      name: the project's name, used in files and flags.
      alias: the TransformerLens name; `{i}` is the layer.
      width: whether a row has `d_model` or `d_ff` values.
      per_layer: False for the two points that exist once per model.
      residual_stream: True where a row is the residual stream itself (tighter parity bound).
    """

    name: str
    alias: str
    width: Literal["d_model", "d_ff"]
    per_layer: bool = True
    residual_stream: bool = False


HOOK_POINTS: Mapping[str, HookPoint] = {
    point.name: point
    for point in (
        HookPoint("embeddings", "hook_embed", "d_model", per_layer=False, residual_stream=True),
        HookPoint("residual_before", "blocks.{i}.hook_resid_pre", "d_model", residual_stream=True),
        HookPoint("attention_out", "blocks.{i}.hook_attn_out", "d_model"),
        HookPoint("after_attention", "blocks.{i}.hook_resid_mid", "d_model", residual_stream=True),
        HookPoint("ffn_gate", "blocks.{i}.mlp.hook_pre", "d_ff"),
        HookPoint("ffn_up", "blocks.{i}.mlp.hook_pre_linear", "d_ff"),
        HookPoint("ffn_hidden", "blocks.{i}.mlp.hook_post", "d_ff"),
        HookPoint("ffn_out", "blocks.{i}.hook_mlp_out", "d_model"),
        HookPoint("after_block", "blocks.{i}.hook_resid_post", "d_model", residual_stream=True),
        HookPoint("final_norm", "ln_final.hook_normalized", "d_model", per_layer=False, residual_stream=True),
    )
}
DEFAULT_HOOK_POINT = "after_block"

HookPoints = Mapping[str, str | None]  # those that an architecture has -> its TransformerLens name there, if any
# Of sequential blocks with a gated feed-forward network, and of those with one that has no gate.
GATED: HookPoints = {point.name: point.alias for point in HOOK_POINTS.values()}
UNGATED: HookPoints = {
    name: GATED["ffn_gate"] if name == "ffn_up" else alias for name, alias in GATED.items() if name != "ffn_gate"
}
_WHY_NOT = {
    "ffn_gate": "its feed-forward network has no gate",
    "after_attention": "attention and the feed-forward network read the same stream, so there is none between them",
    "embeddings": "what enters its first block has positions in it already, so it has another name",
}
_NO_PORT = "no port computes it, so only the ends of its blocks are known"

# What else some are called: by TransformerLens 3 (`blocks.{i}.hook_out`), by its module's name, and by analogy.
_OTHER_NAMES = {
    "in": "residual_before",
    "out": "after_block",
    "residual_after": "after_block",
    "residual_post": "after_block",
    "ln_final": "final_norm",
}

_ALIAS_LAYER = re.compile(r"^blocks\.(\d{1,9}|\*|\{i\})\.(.+)$")


def resolve_hook_points(names: Iterable[str], available: HookPoints = GATED) -> dict[str, set[int] | None]:
    """Turns names, TransformerLens aliases and globs into hook points.

    Args:
      names: such as `after_block`, `ffn_*`, `blocks.{i}.hook_resid_post` or `blocks.12.hook_resid_post`.
      available: the hook points that the architecture has.

    Returns:
      Hook point name -> the layers that its aliases named, or None where every chosen layer is meant.
      The order is that of `HOOK_POINTS`.

    Raises:
      UserError: a name that is no hook point (with one that is near it), or one this architecture lacks.
    """
    found: dict[str, set[int] | None] = {}
    for name in names:
        for point, layer in _matches(name, available):
            if layer is None:
                found[point] = None
            elif (layers := found.setdefault(point, set())) is not None:
                layers.add(layer)
    if not found:
        raise UserError("no hook point was asked for; name at least one, such as --hook_points after_block")
    return {name: found[name] for name in HOOK_POINTS if name in found}


def _matches(name: str, available: HookPoints) -> list[tuple[str, int | None]]:
    if name in available:
        return [(name, None)]
    layer = None
    template = name
    if alias := _ALIAS_LAYER.match(name):
        layer = int(alias[1]) if alias[1].isdigit() else None
        template = f"blocks.{{i}}.{alias[2]}"
    by_alias = [point for point, own in available.items() if own == template]
    is_glob = any(c in name for c in "*?[")
    if matched := by_alias or (fnmatch.filter(available, name) if is_glob else []):
        return [(point, layer) for point in matched]
    elsewhere = [point.name for point in HOOK_POINTS.values() if template in (point.name, point.alias)]
    if lacking := elsewhere or (fnmatch.filter(HOOK_POINTS, name) if is_glob else []):
        reason = _WHY_NOT.get(lacking[0]) if "ffn_out" in available else _NO_PORT
        why = f" ({reason})" if reason else ""
        raise UserError(
            f"hook point {name!r} does not exist in this architecture{why}; it has: "
            f"{', '.join(p for p in HOOK_POINTS if p in available)}"
        )
    meant = f"; the nearest name is {near!r}" if (near := _nearest(template)) else ""
    raise UserError(f"unknown hook point {name!r}{meant}; the hook points are: {', '.join(HOOK_POINTS)}")


def _nearest(name: str) -> str | None:
    """The hook point that was probably meant, by its alias where the name is written like one.

    Others' names are often written without their block or `hook_`; compared whole, `resid_post` would be nearest
    to `residual_before`.
    """
    spellings = {_short(point.alias): point for point in HOOK_POINTS.values()}
    spellings |= {other: HOOK_POINTS[meant] for other, meant in _OTHER_NAMES.items()}
    spellings |= HOOK_POINTS
    if (near := nearest(_short(name), spellings)) is None:
        return None
    return spellings[near].alias if _ALIAS_LAYER.match(name) else spellings[near].name


def _short(name: str) -> str:
    """`resid_post` of `blocks.{i}.hook_resid_post`; the module stays, as in `mlp.pre`."""
    return _ALIAS_LAYER.sub(r"\2", name.lower()).replace("hook_", "")


@dataclass(frozen=True)
class CapturePlan:
    """What a forward pass keeps: static, hashable, known when the program is compiled.

    Attributes:
      layers: (hook point, ascending layers) pairs; the layers are empty where the point has none.
      positions: which token positions of each sample are kept.
      dtype: the dtype of the kept values, cast on the device after everything else.
    """

    layers: tuple[tuple[str, tuple[int, ...]], ...]
    positions: Positions
    dtype: str = "float32"

    def blocks_needed(self, num_layers: int) -> int:
        """How many blocks must run: none above the deepest one asked for.

        The input of block i is the output of block i - 1, so `residual_before` needs one block less.
        """
        needed = 0
        for hook, layers in self.layers:
            if hook == "final_norm":
                return num_layers
            if layers:
                needed = max(needed, max(layers) + (hook != "residual_before"))
        return needed

    def sites(self) -> list[tuple[str, int | None]]:
        """Every (hook point, layer) that is kept, layer None where the point has none."""
        return [(hook, layer) for hook, layers in self.layers for layer in (layers or (None,))]

    def slot(self, hook: str, layer: int | None) -> int:
        """Index of a layer in the hook point's buffer."""
        return 0 if layer is None else dict(self.layers)[hook].index(layer)

    @property
    def needs_final_norm(self) -> bool:
        return any(hook == "final_norm" for hook, _ in self.layers)


Change = Literal["replace", "add", "zero", "patch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Intervention:
    """A change of what flows through one hook point.

    `replace` and `patch` put `value` in place of the activation (`patch` only where `mask` is set:
    values of another run at chosen positions), `add` adds it, `zero` needs none.

    Attributes:
      hook: hook point name (static).
      change: what is done (static).
      layer: int32 scalar, may be traced, so one compiled program serves every layer.
      value: float32, broadcasts to [batch, tokens, width]; None for `zero`.
      mask: bool, broadcasts to [batch, tokens, width]; None means everywhere.
    """

    hook: str = dataclasses.field(metadata={"static": True})
    change: Change = dataclasses.field(metadata={"static": True})
    layer: Array | int | None = None
    value: Array | None = None
    mask: Array | None = None

    def __post_init__(self) -> None:
        if self.change in ("replace", "add", "patch") and self.value is None:
            raise UserError(f"the intervention {self.change!r} at {self.hook!r} needs a value")
        if self.change == "patch" and self.mask is None:
            raise UserError(f"the intervention 'patch' at {self.hook!r} needs a mask of positions")

    def apply(self, x: Array, layer: Array | None) -> Array:
        """x [batch, tokens, width] with the change made, if this is the layer meant."""
        if self.change == "zero":
            changed = jnp.zeros_like(x)
        else:
            assert self.value is not None
            value = jnp.broadcast_to(self.value.astype(x.dtype), x.shape)
            changed = x + value if self.change == "add" else value
        here = jnp.bool_(True) if layer is None else layer == jnp.asarray(self.layer, layer.dtype)
        if self.mask is not None:
            here = here & jnp.broadcast_to(self.mask, x.shape)
        return jnp.where(here, changed, x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Taps:
    """The capture buffers and interventions that travel through the blocks.

    A hook point's buffer is [slots, b, rows, width] in the plan's dtype, a slot per wanted layer. A layer that
    is not wanted writes where the next wanted one will overwrite it; where there is no next, a spare slot at
    the end absorbs it. A buffer that is carried takes less temporary memory than stacking every layer and
    slicing, and far less than an unrolled stack.
    """

    plan: CapturePlan = dataclasses.field(metadata={"static": True})
    num_blocks: int = dataclasses.field(metadata={"static": True})
    packing: Packing
    columns: Array | None  # int32 [b, rows], which tokens are kept; None where it takes no gather
    buffers: dict[str, Array]
    interventions: tuple[Intervention, ...] = ()

    @classmethod
    def start(
        cls,
        plan: CapturePlan,
        num_blocks: int,
        packing: Packing,
        widths: Mapping[str, int],
        interventions: Sequence[Intervention] = (),
    ) -> Taps:
        """Empty buffers for samples that lie so in their rows; `widths` by hook point."""
        batch, rows = packing.lengths.shape[0], plan.positions.slots(packing.tokens, packing.samples)
        buffers = {
            hook: jnp.zeros((slots(layers, num_blocks), batch, rows, widths[hook]), plan.dtype)
            for hook, layers in plan.layers
        }
        return cls(plan, num_blocks, packing, plan.positions.columns(packing), buffers, tuple(interventions))

    def visit(self, hook: str, layer: Array | None, x: Array) -> tuple[Array, Taps]:
        """Passes x [batch, tokens, width] through a hook point: changes it, then keeps it."""
        for intervention in self.interventions:
            if intervention.hook == hook:
                x = intervention.apply(x, layer)
        if hook not in self.buffers:
            return x, self
        buffer = self.buffers[hook]
        kept = self.plan.positions.select(x, self.packing, self.columns).astype(buffer.dtype)
        slot = jnp.int32(0) if layer is None else self._slot_table(hook)[layer]
        buffer = jax.lax.dynamic_update_index_in_dim(buffer, kept, slot, axis=0)
        return x, dataclasses.replace(self, buffers={**self.buffers, hook: buffer})

    def _slot_table(self, hook: str) -> Array:
        wanted = dict(self.plan.layers)[hook]
        # One entry past the last block: `residual_before` of the block after it is its output.
        return jnp.asarray(np.searchsorted(wanted, np.arange(self.num_blocks + 1)), jnp.int32)


def slots(layers: tuple[int, ...], num_blocks: int) -> int:
    """How many slots the buffer of these layers (ascending) has when so many blocks run; see `Taps`."""
    if not layers:
        return 1
    return len(layers) + (layers[-1] < num_blocks - 1)
