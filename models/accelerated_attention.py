"""Causal attention in the kernels that accelerators have for it: splash attention on TPU, cuDNN's on NVIDIA GPUs.

In: queries, keys and values as `causal_attention` takes them, with bfloat16 operands. Out: what it gives.
`attention_backend` says which of the three a program computes with, and why. Dimension letters: b batch, t tokens,
g key/value heads, r query heads per key/value head, h head width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.layers import Numerics

_TILE = 128  # tokens: what a block is a multiple of
LARGEST_BLOCK = 512  # tokens: logits of 512 x 512 in float32 are 1 MB of a core's fast memory
_SPLASH_HEADS = 8  # splash attention: a head's width is a multiple of it
_CUDNN_HEADS, _CUDNN_WIDEST = 8, 128  # cuDNN, on every GPU that has bfloat16


class AttentionBackend(NamedTuple):
    """Attributes:
    name: what computes attention; part of the numerics fingerprint.
    reason: why this one, as half a sentence.
    """

    name: Literal["blockwise", "splash", "cudnn"]
    reason: str


def attention_backend(
    platform: str,
    numerics: Numerics,
    *,
    head_width: int,
    soft_cap: float | None = None,
    samples_a_row: int = 1,
) -> AttentionBackend:
    """What a program for this platform computes attention with.

    Args:
      platform: of the devices: `cpu`, `tpu`, `gpu` or `cuda` for NVIDIA's, `rocm` for AMD's.
      soft_cap: of the logits, where the architecture has one.
      samples_a_row: most samples that lie in one row.
    """
    kernel = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform)
    if kernel is None:
        return AttentionBackend("blockwise", f"there is no kernel for {platform}")
    if numerics.dtype != "bfloat16":
        return AttentionBackend("blockwise", f"the {kernel} kernel rounds products of {numerics.dtype} operands")
    if kernel == "splash":
        if head_width % _SPLASH_HEADS:
            return AttentionBackend("blockwise", f"heads are {head_width} wide, no multiple of {_SPLASH_HEADS}")
        return AttentionBackend("splash", "bfloat16 on TPU")
    if soft_cap is not None:
        return AttentionBackend("blockwise", "logits are capped, which the cudnn kernel does not do")
    if samples_a_row > 1:
        return AttentionBackend("blockwise", "rows hold several samples, which the cudnn kernel cannot tell apart")
    if head_width % _CUDNN_HEADS or head_width > _CUDNN_WIDEST:
        widths = f"a multiple of {_CUDNN_HEADS} up to {_CUDNN_WIDEST}"
        return AttentionBackend("blockwise", f"heads are {head_width} wide, not {widths}")
    return AttentionBackend("cudnn", "bfloat16 on GPU")


def kernel_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    positions: Array,
    window: int | None,
    numerics: Numerics,
    soft_cap: float | None = None,
) -> Array:
    """By the kernel that `numerics.attention` names; `positions` int32 [b, t] are those of tokens in their samples."""
    if numerics.attention == "cudnn":
        return cudnn_attention(query, key, value, numerics=numerics, window=window)
    # Each sample begins at position 0, and so does each token of padding.
    segments = jnp.cumsum(positions == 0, axis=1, dtype=jnp.int32)
    return splash_attention(query, key, value, numerics=numerics, window=window, segments=segments, soft_cap=soft_cap)


def splash_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    numerics: Numerics,
    window: int | None = None,
    segments: Array | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> Array:
    """Grouped-query causal attention by the TPU kernel that ships with JAX; inside `shard_map`.

    The kernel skips blocks that the mask empties, never holds more than a block of logits, and sums in float32. Rows
    are padded to a multiple of 128 tokens: on the right, where no real token looks.

    Args:
      query: float32 [b, t, g * r, h], scaled already.
      key, value: float32 [b, t, g, h].
      numerics: the dtype of the operands.
      window: how many positions back a query sees, itself included; None where it sees all.
      segments: int32 [b, t], equal for tokens of one sample; None where a row is one sample.
      soft_cap: as `causal_attention` takes it.
      interpret: computes without a TPU, slowly, for tests.

    Returns:
      float32 [b, t, g * r * h].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    b, tokens, heads, width = query.shape
    padded = -(-tokens // _TILE) * _TILE
    size = attention_block(tokens)
    square = (padded, padded)
    if window is None:
        mask = splash_attention_mask.CausalMask(square)
    else:
        mask = splash_attention_mask.LocalMask(square, window_size=(window - 1, 0), offset=0)
    kernel: Any = splash_attention_kernel.make_splash_mha_single_device(
        mask=splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(block_q=size, block_kv=size, block_kv_compute=size),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )

    def heads_first(x: Array) -> Array:
        x = x.astype(numerics.dtype).transpose(0, 2, 1, 3)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))

    operands = (heads_first(query), heads_first(key), heads_first(value))
    if segments is None:
        mixed = jax.vmap(kernel)(*operands)
    else:
        # Padding is a segment of its own: a segment of a sample might also be numbered 0.
        ids = jnp.pad(segments, ((0, 0), (0, padded - tokens)), constant_values=-1)
        mixed = jax.vmap(kernel)(*operands, splash_attention_kernel.SegmentIds(ids, ids))
    return mixed[:, :, :tokens].transpose(0, 2, 1, 3).reshape(b, tokens, heads * width).astype(jnp.float32)


def attention_block(tokens: int) -> int:
    """Queries, and keys, of a square of logits that splash attention computes at once, in rows of so many tokens.

    It is the largest that divides the row, which is padded to whole tiles.
    """
    padded = -(-tokens // _TILE) * _TILE
    return next(size for size in range(LARGEST_BLOCK, 0, -_TILE) if padded % size == 0)


def computed_pairs(tokens: int, block: int, window: int | None = None) -> int:
    """Pairs of a query and a key that a row of so many tokens costs in squares of so many, whosever they are.

    Args:
      block: `attention_block` of splash attention; 1 of attention that computes no pair beyond the mask.
      window: how many positions back a query sees, itself included; None where it sees all before it.
    """
    number = -(-tokens // block)
    if window is None:  # the planner asks often
        return number * (number + 1) // 2 * block * block
    squares = np.arange(number, dtype=np.int64)
    first = np.maximum(0, squares * block - window + 1) // block
    return int((squares - first + 1).sum()) * block * block


def seen_pairs(lengths: np.ndarray, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees: its own sample's, up to itself.

    Args:
      lengths: int, of any shape: tokens of each sample.
      window: as above.
    """
    whole = lengths.astype(np.int64)
    short = whole if window is None else np.minimum(whole, window)
    return int((short * (short + 1) // 2 + (whole - short) * short).sum())


def cudnn_attention(query: Array, key: Array, value: Array, *, numerics: Numerics, window: int | None = None) -> Array:
    """Grouped-query causal attention by cuDNN, for rows of one sample each; arguments and result as above."""
    b, tokens, heads, width = query.shape
    q, k, v = (x.astype(numerics.dtype) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed.reshape(b, tokens, heads * width).astype(jnp.float32)
