"""Hook points: the places of a forward pass that can be read or changed, and what they are called.

In: names, TransformerLens names and globs as a user writes them. Out: `HookPoint`s.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from models.errors import UserError
from models.nearest import nearest


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
_BEHIND_ALL_BLOCKS = 2**31
_NO_PORT = "no port computes it, so only the ends of its blocks are known"


def depth(hook: str, layer: int | None) -> tuple[int, int]:
    """Orders hook points as a forward comes to them."""
    order = list(HOOK_POINTS).index(hook)
    if layer is None:
        return (-1, order) if hook == "embeddings" else (_BEHIND_ALL_BLOCKS, order)
    return layer, order


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
