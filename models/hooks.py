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
      width: whether a row has `d_model` or `d_ff` values, those of all query heads or of all key/value heads, or for
        each query head a weight for every token that a sample may have.
      per_layer: False for the two points that exist once per model.
      residual_stream: True where a row is the residual stream itself (tighter parity bound).
      by_name_only: True where a glob does not mean it.
    """

    name: str
    alias: str
    width: Literal["d_model", "d_ff", "query_heads", "key_heads", "pattern"]
    per_layer: bool = True
    residual_stream: bool = False
    by_name_only: bool = False


HOOK_POINTS: Mapping[str, HookPoint] = {
    point.name: point
    for point in (
        HookPoint("embeddings", "hook_embed", "d_model", per_layer=False, residual_stream=True),
        HookPoint("residual_before", "blocks.{i}.hook_resid_pre", "d_model", residual_stream=True),
        HookPoint("query", "blocks.{i}.attn.hook_q", "query_heads"),
        HookPoint("key", "blocks.{i}.attn.hook_k", "key_heads"),
        HookPoint("query_rotated", "blocks.{i}.attn.hook_rot_q", "query_heads"),
        HookPoint("key_rotated", "blocks.{i}.attn.hook_rot_k", "key_heads"),
        HookPoint("value", "blocks.{i}.attn.hook_v", "key_heads"),
        HookPoint("attention_pattern", "blocks.{i}.attn.hook_pattern", "pattern", by_name_only=True),
        HookPoint("attention_heads", "blocks.{i}.attn.hook_z", "query_heads"),
        HookPoint("attention_out_raw", "blocks.{i}.attn.hook_out", "d_model"),
        HookPoint("attention_out", "blocks.{i}.hook_attn_out", "d_model"),
        HookPoint("after_attention", "blocks.{i}.hook_resid_mid", "d_model", residual_stream=True),
        HookPoint("ffn_gate", "blocks.{i}.mlp.hook_pre", "d_ff"),
        HookPoint("ffn_up", "blocks.{i}.mlp.hook_pre_linear", "d_ff"),
        HookPoint("ffn_hidden", "blocks.{i}.mlp.hook_post", "d_ff"),
        HookPoint("ffn_out_raw", "blocks.{i}.mlp.hook_out", "d_model"),
        HookPoint("ffn_out", "blocks.{i}.hook_mlp_out", "d_model"),
        HookPoint("after_block", "blocks.{i}.hook_resid_post", "d_model", residual_stream=True),
        HookPoint("final_norm", "ln_final.hook_out", "d_model", per_layer=False, residual_stream=True),
    )
}
DEFAULT_HOOK_POINT = "after_block"
PATTERN = "attention_pattern"

HookPoints = Mapping[str, str | None]  # those that an architecture has -> its TransformerLens name there, if any
# What a sublayer gives before a norm behind it; where there is none, that is what it adds to the stream.
_RAW = {"attention_out_raw": "attention_out", "ffn_out_raw": "ffn_out"}
# Of sequential blocks with rotary embedding and a gated feed-forward network; those with one that has no gate; and what
# norms behind the sublayers add to either.
GATED: HookPoints = {point.name: point.alias for point in HOOK_POINTS.values() if point.name not in _RAW}
UNGATED: HookPoints = {
    name: GATED["ffn_gate"] if name == "ffn_up" else alias for name, alias in GATED.items() if name != "ffn_gate"
}
BEFORE_NORMS_BEHIND: HookPoints = {name: HOOK_POINTS[name].alias for name in _RAW}
ROTATED = frozenset({"query_rotated", "key_rotated"})
_WHY_NOT = {
    "ffn_gate": "its feed-forward network has no gate",
    "after_attention": "attention and the feed-forward network read the same stream, so there is none between them",
    "embeddings": "what enters its first block has positions in it already, so it has another name",
    **dict.fromkeys(ROTATED, "it has no rotary embedding, so its queries and keys are not rotated"),
}
_BEHIND_ALL_BLOCKS = 2**31
_NO_PORT = "no port computes it, so only the ends of its blocks are known"

BY_NAME_ONLY = frozenset(point.name for point in HOOK_POINTS.values() if point.by_name_only)


def depth(hook: str, layer: int | None) -> tuple[int, int]:
    """Orders hook points as a forward comes to them."""
    order = list(HOOK_POINTS).index(hook)
    if layer is None:
        return (-1, order) if hook == "embeddings" else (_BEHIND_ALL_BLOCKS, order)
    return layer, order


# What else some are called: by TransformerLens 3 (`blocks.{i}.hook_out`), by its module's name, and by analogy; what
# lies in attention, without a module.
_OTHER_NAMES = {
    "in": "residual_before",
    "out": "after_block",
    "residual_after": "after_block",
    "residual_post": "after_block",
    "ln_final": "final_norm",
    "q": "query",
    "k": "key",
    "v": "value",
    "z": "attention_heads",
    "rot_q": "query_rotated",
    "rot_k": "key_rotated",
    "pattern": "attention_pattern",
}

# Other names that TransformerLens has for some, 3 for the first three; `hook_normalized` lies before the norm's weight
# there, and was the name here of what lies behind it, also in runs that are there.
_SAME_IN_TRANSFORMER_LENS = {
    "embed.hook_out": "hook_embed",
    "blocks.{i}.hook_in": "blocks.{i}.hook_resid_pre",
    "blocks.{i}.hook_out": "blocks.{i}.hook_resid_post",
    "ln_final.hook_normalized": "ln_final.hook_out",
}

_ALIAS_LAYER = re.compile(r"^blocks\.(\d{1,9}|\*|\{i\})\.(.+)$")


def resolve_hook_points(names: Iterable[str], available: HookPoints = GATED) -> dict[str, set[int] | None]:
    """Turns names, TransformerLens aliases and globs into hook points.

    Args:
      names: such as `after_block`, `ffn_*`, `blocks.{i}.hook_resid_post` or `blocks.12.hook_resid_post`. What a
        sublayer gives before a norm behind it is, where there is no such norm, what it adds to the stream.
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


def is_hook_point(name: str) -> bool:
    """Whether it is the name of one, here or in TransformerLens."""
    try:
        return bool(resolve_hook_points([name]))
    except UserError:
        return False


def is_glob(name: str) -> bool:
    """Whether it may mean several, as `ffn_*` does."""
    return any(c in name for c in "*?[")


def _matches(name: str, available: HookPoints) -> list[tuple[str, int | None]]:
    if name in available:
        return [(name, None)]
    layer = None
    template = name
    if alias := _ALIAS_LAYER.match(name):
        layer = int(alias[1]) if alias[1].isdigit() else None
        template = f"blocks.{{i}}.{alias[2]}"
    template = _SAME_IN_TRANSFORMER_LENS.get(template, template)
    by_alias = [point for point, own in available.items() if _SAME_IN_TRANSFORMER_LENS.get(own or "", own) == template]
    globbed = is_glob(name)
    found = fnmatch.filter(available, name) if globbed else []
    if matched := by_alias or [point for point in found if point not in BY_NAME_ONLY]:
        return [(point, layer) for point in matched]
    if found:
        raise UserError(f"hook point {name!r} means {found[0]} alone, which is kept only where its whole name is given")
    elsewhere = [point.name for point in HOOK_POINTS.values() if template in (point.name, point.alias)]
    if elsewhere and (same := _RAW.get(elsewhere[0], "")) in available:
        return [(same, layer)]
    if lacking := elsewhere or (fnmatch.filter(HOOK_POINTS, name) if globbed else []):
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
